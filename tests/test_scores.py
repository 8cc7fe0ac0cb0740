"""Metrics against slow definitions and scikit-learn's, their table, and the rule of the best."""

import io
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import AT_ONCE, long_after
from numpy.typing import NDArray
from rich.console import Console
from sklearn import metrics as sklearn
from test_readers import make_sweep
from test_report import make_comparison

from tfkd_ray.cli.main import main
from tfkd_ray.learn import evaluate
from tfkd_ray.learn.loop import train
from tfkd_ray.run.confirm import outcome_table
from tfkd_ray.run.epochs import epochs_here
from tfkd_ray.run.tune import build_tuner
from tfkd_ray.settings.errors import ConfigError
from tfkd_ray.show.chosen import _arm_selection, _best_arm
from tfkd_ray.show.figures import read_sweep
from tfkd_ray.show.live import Progress
from tfkd_ray.show.report import report
from tfkd_ray.show.status import best_lines, read_plan, status, status_lines
from tfkd_ray.show.tensorboard import TAGS
from tfkd_ray.space.arms import arms_of
from tfkd_ray.space.space import build_space
from tfkd_ray.store.assignment import Assignment
from tfkd_ray.store.experiment import best, read_records, selection_metric
from tfkd_ray.verdict.calibration import BINS
from tfkd_ray.verdict.scores import (
    SCORES,
    SELECTABLE,
    accuracy,
    auroc,
    balanced_accuracy,
    brier,
    ece,
    ece_equal_mass,
    macro_f1,
    nll,
    ranked,
    scores,
    sign,
    top_k,
)

Array = NDArray[np.float64]


@pytest.fixture
def answers() -> tuple[Array, NDArray[np.int64]]:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10, 203)
    return rng.standard_normal((203, 10)) * 2 + np.eye(10)[labels], labels


def test_metrics_of_logits_are_their_definitions(answers: tuple[Array, NDArray[np.int64]]) -> None:
    logits, labels = answers
    first, fifth, loss, squares = 0, 0, 0.0, 0.0
    sure: list[tuple[float, float]] = []
    for row, c in zip(logits.tolist(), labels.tolist(), strict=True):
        total = sum(math.exp(z) for z in row)
        p = [math.exp(z) / total for z in row]
        order = sorted(range(10), key=lambda k: -p[k])
        first, fifth, loss = (
            first + (order[0] == c),
            fifth + (c in order[:5]),
            loss - math.log(p[c]),
        )
        squares += sum((p[k] - (k == c)) ** 2 for k in range(10))
        sure.append((max(p), float(order[0] == c)))
    wide = [[s for s in sure if i / BINS < s[0] <= (i + 1) / BINS] for i in range(BINS)]
    sure.sort()
    sizes = [203 // BINS + (i < 203 % BINS) for i in range(BINS)]
    mass = [sure[sum(sizes[:i]) : sum(sizes[: i + 1])] for i in range(BINS)]

    def gap(bins: list[list[tuple[float, float]]]) -> float:
        return sum(abs(sum(p for p, _ in b) - sum(hit for _, hit in b)) for b in bins) / 203

    expected = {
        "accuracy": first / 203, "top5": fifth / 203, "nll": loss / 203, "brier": squares / 203,
        "ece": gap(wide), "ece_equal_mass": gap(mass),
    }  # fmt: skip
    found = scores(logits, labels)
    assert {name: found[name] for name in expected} == pytest.approx(expected)


def test_they_are_the_ones_of_evaluate(answers: tuple[Array, NDArray[np.int64]]) -> None:
    logits, labels = answers
    theirs = evaluate.metrics_from(
        evaluate.metric_sums(torch.from_numpy(logits), torch.from_numpy(labels))
    )
    ours = scores(logits, labels)
    assert {
        f"val_{name}": ours[name] for name in ("accuracy", "top5", "nll", "ece")
    } == pytest.approx(theirs)


def test_huge_logits_are_no_overflow() -> None:
    logits, labels = np.eye(3, dtype=np.float32) * 1e4, np.arange(3)
    assert {name for name, value in scores(logits, labels).items() if value == 0} == {
        "nll",
        "brier",
        "ece",
        "ece_equal_mass",
    }
    assert set(scores(logits, labels).values()) == {0, 1}
    assert nll(logits, (labels + 1) % 3) == pytest.approx(1e4) and brier(
        logits, (labels + 1) % 3
    ) == pytest.approx(2)
    assert ece(logits, (labels + 1) % 3) == 1


def test_equal_logits_are_the_first_class_and_calibrated_by_chance() -> None:
    logits, labels = np.zeros((10, 10)), np.arange(10)
    assert (accuracy(logits, labels), top_k(logits, labels)) == (0.1, 0.5)
    assert nll(logits, labels) == pytest.approx(math.log(10)) and brier(
        logits, labels
    ) == pytest.approx(0.9)
    assert ece(logits, labels) == ece_equal_mass(logits, labels) == pytest.approx(0, abs=1e-9)


def test_the_order_of_images_does_not_matter() -> None:
    rng = np.random.default_rng(0)
    logits, labels = (
        rng.integers(0, 3, (100, 4)).astype(float),
        rng.integers(0, 4, 100),
    )  # many equal confidences
    turn = rng.permutation(100)
    assert scores(logits[turn], labels[turn]) == pytest.approx(scores(logits, labels))


def test_a_shift_of_all_logits_changes_nothing_and_a_sharper_answer_is_less_calibrated(
    answers: tuple[Array, NDArray[np.int64]],
) -> None:
    logits, labels = answers
    assert scores(logits + 7, labels) == pytest.approx(scores(logits, labels))
    for error in (ece, ece_equal_mass):
        assert error(logits * 10, labels) > error(logits, labels)


def test_fewer_images_than_bins_have_a_calibration_error() -> None:
    logits, labels = np.array([[0.0, 3.0], [1.0, 0.0]]), np.array([1, 1])
    p = 1 / (1 + math.exp(-3)), 1 / (1 + math.exp(-1))
    assert (
        ece_equal_mass(logits, labels)
        == pytest.approx((1 - p[0] + p[1]) / 2)
        == ece(logits, labels)
    )


# --- against scikit-learn, also with classes that have no images


def probabilities(logits: Array) -> Array:
    e = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(e / e.sum(axis=1, keepdims=True))


@pytest.mark.parametrize("classes", [2, 3, 10])
@pytest.mark.parametrize("digits", [17, 1, 0], ids=["no ties", "ties", "many ties"])
def test_auroc_f1_and_balanced_accuracy_are_those_of_scikit_learn(
    classes: int, digits: int
) -> None:
    rng = np.random.default_rng(classes)
    labels = np.concatenate([np.arange(classes), rng.integers(0, classes, 300) ** 2 % classes])
    logits = np.round(rng.standard_normal((len(labels), classes)) + np.eye(classes)[labels], digits)
    p, answers = probabilities(logits), logits.argmax(axis=1)
    theirs = sklearn.roc_auc_score(
        labels, p[:, 1] if classes == 2 else p, multi_class="ovr", average="macro"
    )
    assert auroc(logits, labels) == pytest.approx(theirs, abs=1e-3 if digits < 17 else 1e-12)
    assert auroc(np.log(p), labels) == pytest.approx(theirs, abs=1e-3 if digits < 17 else 1e-12)
    assert macro_f1(logits, labels) == pytest.approx(
        sklearn.f1_score(labels, answers, average="macro"), abs=1e-12
    )
    assert balanced_accuracy(logits, labels) == pytest.approx(
        sklearn.balanced_accuracy_score(labels, answers), abs=1e-12
    )


def test_a_class_without_images_is_left_out() -> None:
    rng = np.random.default_rng(0)
    labels = rng.choice([0, 2, 3], 200)  # of 5 classes: 1 is predicted but no label, 4 is neither
    logits = rng.standard_normal((200, 5)) + 2 * np.eye(5)[labels] - [0, 0, 0, 0, 50]
    answers = logits.argmax(axis=1)
    assert set(answers) == {0, 1, 2, 3}
    areas = [sklearn.roc_auc_score(labels == k, probabilities(logits)[:, k]) for k in (0, 2, 3)]
    assert auroc(logits, labels) == pytest.approx(np.mean(areas), abs=1e-12)
    assert macro_f1(logits, labels) == pytest.approx(
        sklearn.f1_score(labels, answers, average="macro"), abs=1e-12
    )
    recalls = sklearn.recall_score(labels, answers, average=None, labels=[0, 2, 3])
    assert balanced_accuracy(logits, labels) == pytest.approx(np.mean(recalls), abs=1e-12)


def test_where_there_is_one_class_there_is_no_area() -> None:
    assert math.isnan(auroc(np.eye(3), np.zeros(3, dtype=int)))
    assert math.isnan(auroc(np.full((2, 2), math.nan), np.array([0, 1])))


def test_an_area_is_a_half_by_guessing_and_one_where_classes_are_apart() -> None:
    labels = np.arange(20) % 4
    assert auroc(np.zeros((20, 4)), labels) == 0.5 and auroc(np.eye(4)[labels], labels) == 1


# --- the table


def test_every_metric_that_can_be_chosen_has_a_whole_row() -> None:
    assert {"val_accuracy", "val_nll", "val_ece", "val_auroc"} <= set(SELECTABLE)
    logits, labels = np.eye(4) + 0.1, np.arange(4)
    for key in SELECTABLE:
        row = SCORES[key]
        assert row.of is not None and TAGS[key] == row.tag and row.margin
        assert row.of(logits, labels) == scores(logits, labels)[row.name]
        assert key == "val_accuracy" or (row.heading is not None and len(row.heading) <= 8)
        better = row.guess(4) < row.of(logits, labels)
        assert better == (row.direction == "max"), key


def test_validation_has_all_others_from_the_logits_of_all_images(
    answers: tuple[Array, NDArray[np.int64]],
) -> None:
    logits, labels = answers
    rows = evaluate.asked_beside([key for key in SELECTABLE if key != "val_nll"])
    assert [row.key for row in rows] == AT_ONCE and not any(row.usual for row in rows)
    batches = list(torch.from_numpy(logits).float().split(50))
    found = evaluate.metrics_at_once(rows, batches, torch.from_numpy(labels), 10, rank=0, workers=1)
    expected = scores(logits.astype(np.float32), labels)
    assert found == {row.key: expected[row.name] for row in rows}
    with pytest.raises(
        ValueError, match="no such metric 'val_auc'; known: val_accuracy, val_top5, val_nll"
    ):
        evaluate.asked_beside(["val_auc"])


def test_the_table_imports_no_torch_no_ray_and_no_numpy() -> None:
    code = "import sys, tfkd_ray.verdict.scores; assert not {'torch', 'ray', 'numpy', 'scipy'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


# --- which is better


@pytest.mark.parametrize("metric", SELECTABLE)
def test_nan_is_never_best_and_of_equals_the_first_is(metric: str) -> None:
    values = [math.nan, 0.2, 0.9, 0.9, math.inf, 0.2, -math.inf, math.nan]
    order = [2, 3, 1, 5] if SCORES[metric].direction == "max" else [1, 5, 2, 3]
    assert ranked(range(8), metric, values.__getitem__) == order


@pytest.mark.slow
@pytest.mark.parametrize("metric", long_after(2, SELECTABLE))
def test_search_readers_live_view_report_and_arms_name_the_same_best_trial(
    metric: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    experiment = tmp_path / "s"
    make_sweep(experiment, 24, search={"metric": metric, "stopping": "none"})
    rng = np.random.default_rng(0)
    for number, folder in enumerate(sorted((experiment / "trials").iterdir())):
        lines = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
        lines[-1] |= {key: float(rng.random()) for key in SELECTABLE}
        lines[-1] |= {metric: math.nan} if number % 5 == 0 else {}
        (folder / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    records = read_records(experiment)
    values = {
        r.name: r.last[metric]
        for r in records
        if r.status == "done" and not math.isnan(r.last[metric])
    }
    pick = max if SCORES[metric].direction == "max" else min
    winner = pick(values, key=values.__getitem__)
    found = best(records, metric)
    assert found is not None and found.name == winner
    assert (
        status(experiment)["best"]["trial"] == winner
        and status(experiment)["mode"] == SCORES[metric].direction
    )
    sweep = read_sweep(experiment, read_plan(experiment))
    assert sweep.ranked(sweep.full)[0].name == winner and len(sweep.full) == len(values)
    view = Progress(experiment, Console(file=io.StringIO()))
    view.setup()
    leader = view._best_of(list(view._runs.values()))
    assert leader is not None and leader.name == winner
    assert (
        max(map(len, view.lines(80, 24))) <= 80
        and max(map(len, status_lines(status(experiment)))) <= 80
    )
    baselines = {"ce", "lsr"}
    others = {
        r.name: values[r.name] for r in records if r.name in values and r.objective not in baselines
    }
    compared = arms_of(experiment, top_k=1)
    assert (
        compared.arms[0].name == pick(others, key=others.__getitem__) and compared.metric == metric
    )
    for verb in ("best", "status", "trials"):
        assert main([verb, str(experiment)]) == 0
        assert metric in capsys.readouterr().out


def test_an_unknown_metric_in_a_file_is_a_sentence(tmp_path: Path) -> None:
    make_sweep(tmp_path / "s", 4)
    path = tmp_path / "s" / "experiment.yaml"
    path.write_text(path.read_text().replace("metric: val_accuracy", "metric: val_auc"))
    for read in (selection_metric, read_plan):
        with pytest.raises(
            ConfigError, match="no such metric 'val_auc'; known: val_accuracy, val_top5"
        ):
            read(tmp_path / "s")


def test_a_front_is_a_table_whose_columns_are_as_wide_as_their_names() -> None:
    values = [
        {"val_auroc": 0.9, "val_balanced_accuracy": 0.8, "parameters": 1234.0},
        {"val_auroc": 0.8, "val_balanced_accuracy": 1.0, "parameters": 9.0},
    ]
    best = [{"trial": f"t000{k}-ce", "values": v} for k, v in enumerate(values)]
    lines = best_lines(
        {"metrics": list(values[0]), "trials": 2, "best": best, "constraints": []}, Path("e")
    )
    assert {len(line) for line in lines[1:4]} == {len(lines[1])} and lines[2].split() == [
        "t0000-ce",
        "0.9000",
        "0.8000",
        "1234",
    ]


# --- chosen by and judged by


@pytest.mark.slow
@pytest.mark.parametrize("metric", AT_ONCE)
def test_a_comparison_is_judged_reported_and_exported_by_it(metric: str, tmp_path: Path) -> None:
    directory = make_comparison(tmp_path / "c", metric=metric)
    result = json.loads((directory / "confirm.json").read_text())
    (found,) = result["verdicts"]
    row = SCORES[metric]
    assert found["metric"] == {
        "name": row.name,
        "larger_is_better": row.direction == "max",
        "percent": row.unit == "%",
        "margin": row.margin,
    }
    guess = sign(metric) * row.guess(10)
    assert found["verdict"] == "better" and all(
        sign(metric) * run[row.name] > guess for arm in result["arms"] for run in arm["runs"]
    )
    lines = outcome_table(result)
    assert max(map(len, lines)) <= 80
    heads = [line[len("means on test") :] for line in lines if line.startswith("means on test")]
    headings = [row.heading for row in SCORES.values() if row.heading and row.of]
    assert " ".join(heads).split() == " ".join(headings).split() and len(heads) > 1
    assert _best_arm(result, row) == "reg"
    values = [run[row.name] for run in result["arms"][2]["runs"]]
    texts = _arm_selection(result, row, directory, "reg", 1001, by_hand=(False, False))
    mean = row.show(float(np.mean(values)))
    assert texts[1].startswith(
        f"Test {row.label} of this run: {row.show(values[0])}. Expect the mean over all 5 seeds: {mean}"
    )
    (page,) = report(directory, tmp_path / "report.html")
    assert f"lead in {row.name}" in page.read_text()
    assert f"test {row.label}".encode() in b"".join(
        p.read_bytes() for p in (directory / "tb/about").glob("events.*")
    )


def test_a_trial_records_what_it_is_judged_by(tmp_path: Path) -> None:
    space = build_space({"student": {"name": "mlp", "hidden": [8]}, "objective": "ce", "epochs": 2})
    told = Assignment("t", 2, directory=tmp_path / "t", metrics=("val_auroc", "parameters"))
    tree = space.single().model_dump(mode="json")
    asked = list(epochs_here(tree, told))
    assert all(0.5 < m["val_auroc"] <= 1 and "val_macro_f1" not in m for m in asked)
    unasked = Assignment("u", 2, directory=tmp_path / "u")
    assert not any("val_auroc" in m for m in epochs_here(tree, unasked))


@pytest.mark.long
@pytest.mark.ray
@pytest.mark.timeout(180)
def test_a_sweep_of_two_workers_is_searched_for_auroc_and_balanced_accuracy(
    tmp_path: Path, ray_cluster: str
) -> None:
    tree = {
        "student": {"name": "mlp", "hidden": [8]}, "objective": "ce", "epochs": 2, "workers": 2,
        "optim": {"lr": {"choices": [0.1, 0.001]}, "batch_size": 64},
        "search": {"sampler": "grid", "stopping": "none", "metric": ["val_auroc", "val_balanced_accuracy"], "baselines": False},
    }  # fmt: skip
    build_tuner(build_space(tree), name="e", storage=tmp_path).fit()
    records = read_records(tmp_path / "e")
    winner = best(records, "val_auroc")
    assert winner is not None and winner.parameters == {"optim.lr": 0.1} and len(records) == 2
    one = build_space({**tree, "workers": 1, "optim": {"lr": 0.1, "batch_size": 64}}).single()
    alone = list(train(one, more_metrics=["val_auroc", "val_balanced_accuracy"]))
    for ours, theirs in zip(winner.metrics, alone, strict=True):
        assert ours["val_auroc"] == pytest.approx(theirs.metrics["val_auroc"], abs=1e-3)
        assert ours["val_balanced_accuracy"] == pytest.approx(
            theirs.metrics["val_balanced_accuracy"], abs=0.01
        )
    events = b"".join(
        path.read_bytes() for path in (tmp_path / "e/tb" / winner.name).glob("events.*")
    )
    assert (
        b"val/auroc" in events and b"val/balanced_acc" in events and b"val/macro_f1" not in events
    )
