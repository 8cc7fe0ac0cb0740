"""Comparisons on a real Ray: every arm with every seed, once; then the test split is opened."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ROOT, Run
from safetensors.numpy import load_file
from test_data import pickled, write_cifar
from test_folder import write_folder
from test_loop import float32_precisions

from tfkd_ray.learn.checkpoint import WEIGHTS, save_weights
from tfkd_ray.learn.data import Digits
from tfkd_ray.learn.dataset import digest_of
from tfkd_ray.learn.loop import train
from tfkd_ray.learn.official import Cifar10
from tfkd_ray.run import confirm
from tfkd_ray.run.confirm import (
    LOGITS,
    ListSearcher,
    _note_opening,
    comparison_tuner,
    judge_on_test,
    openings,
    outcome,
    outcome_table,
)
from tfkd_ray.settings.errors import ConfigError
from tfkd_ray.settings.yaml import dump_yaml, read_yaml
from tfkd_ray.space.arms import build_arms, new_comparison, read_comparison
from tfkd_ray.store.assignment import SECTION, Assignment
from tfkd_ray.store.experiment import Record, read_records, write_record

TABLE_2 = ROOT / "search_spaces/paper/table_2.yaml"
TREE: dict[str, Any] = {
    "title": "a try",
    "student": {"name": "mlp", "hidden": [8]},
    "epochs": 3,
    "checkpoint_every_s": 0,
    "arms": [
        {"name": "ce", "objective": "ce", "published": 97.0, "published_std": 0.2},
        {"name": "self", "objective": "tfkd_self", "baseline": "ce"},
    ],
}


def compare(directory: Path, tree: dict[str, Any], seeds: list[int]) -> dict[str, Any]:
    new_comparison(build_arms(tree), seeds, directory)
    comparison_tuner(directory).fit()
    return judge_on_test(directory)


@pytest.mark.ray
def test_every_arm_is_trained_with_every_seed_and_judged_on_test_once(
    tmp_path: Path, ray_cluster: str
) -> None:
    result = compare(tmp_path / "c", TREE, [1, 2])
    assert [(a["name"], [r["seed"] for r in a["runs"]]) for a in result["arms"]] == [
        ("ce", [1, 2]),
        ("self", [1, 2]),
    ]
    assert json.loads((tmp_path / "c/confirm.json").read_text()) == result
    assert [o["experiment"] for o in result["opened"]] == ["c"] and result["test"] == "digits"
    # the numbers are those of the loop and of the test split
    run = read_comparison(tmp_path / "c").runs[0]
    *_, last = train(run.config)
    kept = load_file(tmp_path / "c/trials" / run.name / LOGITS)
    test = Digits().load_test()
    assert (kept["labels"] == test.labels.numpy()).all()
    net = run.config.student.build((1, 8, 8), 10).eval()
    net.load_state_dict(last.state()["model"])
    logits = net((test.images.float() - Digits.mean[0]) / Digits.std[0])
    assert result["arms"][0]["runs"][0]["accuracy"] == pytest.approx(
        (logits.argmax(1) == test.labels).double().mean()
    )
    lent = confirm._LentTester(tmp_path / "c", run.config.data, 0.0)  # in a process of Ray's
    try:
        found, labels = lent.logits(run)
    finally:
        lent.close()
    assert found.equal(torch.from_numpy(kept["logits"])) and labels.equal(test.labels)
    # a second time: nothing is run or opened
    assert judge_on_test(tmp_path / "c") == result and read_comparison(tmp_path / "c").is_trained
    lines = outcome_table(result)
    assert max(map(len, lines)) <= 80
    assert "self is tfkd_self: alpha 0.9, temperature 4" in lines
    row = next(line for line in lines if line.startswith("ce "))
    mean = 50 * sum(r["accuracy"] for r in result["arms"][0]["runs"])
    assert row.split()[1] == f"{mean:.2f}" and f"{mean - 97:+.2f}" in row and " 97.00 " in row


@pytest.mark.ray
def test_a_run_that_fails_is_tried_twice_and_reported(tmp_path: Path, ray_cluster: str) -> None:
    bad = {"name": "bad", "objective": "ce", "optim": {"lr": 1e9}}
    result = compare(tmp_path / "c", {**TREE, "arms": [TREE["arms"][0], bad]}, [1, 2])
    good, failed = result["arms"]
    assert [r["status"] for r in good["runs"]] == ["done"] * 2 and [
        r["status"] for r in failed["runs"]
    ] == ["failed"] * 2
    assert "Diverged" in failed["runs"][0]["reason"]
    assert any(line.startswith("bad, seed 1: failed: Diverged") for line in outcome_table(result))
    assert any(line.startswith("bad ") and " none " in line for line in outcome_table(result))


def test_each_arms_own_network_is_tried_once_before_a_comparison(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trying builds it twice, to see what a seed leaves open; a third build would be for nothing."""
    (tmp_path / "counted.py").write_text(
        "import torch\n\nBUILT = []\n\n\ndef net(shape, num_classes, width):\n    BUILT.append(width)\n"
        "    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, num_classes))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    arms = [
        {"name": f"w{width}", "objective": "ce", "student": {"name": "own", "path": "counted:net", "args": {"width": width}}}
        for width in (1, 2)
    ]  # fmt: skip
    new_comparison(build_arms({**TREE, "arms": arms}), [1], tmp_path / "c")

    def no_ray(**kwargs: Any) -> None:
        raise ConfigError("no Ray here")

    monkeypatch.setattr("tfkd_ray.run.tune.connect", no_ray)
    with pytest.raises(ConfigError, match="no Ray here"):
        comparison_tuner(tmp_path / "c")
    assert sys.modules["counted"].BUILT == [1, 1, 2, 2]


def test_a_failing_run_comes_back_once() -> None:
    a, b = ({SECTION: Assignment(name, 9).section()} for name in "ab")
    searcher = ListSearcher([a, b])
    assert searcher.suggest("1") == a
    searcher.on_trial_complete("1", {"failed": "it broke"})
    assert searcher.suggest("2") == b
    assert searcher.suggest("3") == a
    assert searcher.suggest("4") is None  # both may be retried
    searcher.on_trial_complete("2", {"epoch": 3})
    searcher.on_trial_complete("3", error=True)
    assert searcher.suggest("4") == "FINISHED"


@pytest.mark.ray
@pytest.mark.fault
@pytest.mark.slow
def test_a_killed_comparison_goes_on_and_repeats_nothing(
    tmp_path: Path, ray_cluster: str, tfkd: Run
) -> None:
    tree = {**TREE, "epochs": 40, "student": {"name": "mlp", "hidden": [64]}}
    (tmp_path / "arms.yaml").write_text(json.dumps(tree))
    command = [
        sys.executable,
        "-m",
        "tfkd_ray",
        "confirm",
        "arms.yaml",
        "--seeds",
        "2",
        "--name",
        "c",
    ]
    driver = subprocess.Popen(
        command, cwd=tmp_path, env=dict(os.environ), stderr=subprocess.DEVNULL
    )
    folder = tmp_path / "tfkd_results/c"
    until = time.monotonic() + 60
    while not any(r.status == "done" for r in (read_records(folder) if folder.exists() else [])):
        assert time.monotonic() < until and driver.poll() is None
        time.sleep(0.05)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    assert not (folder / "confirm.json").exists()
    done = {
        r.name: (r.folder / "student.safetensors").stat().st_mtime_ns
        for r in read_records(folder)
        if r.status == "done"
    }
    again = tfkd("resume", "tfkd_results/c")
    assert again.returncode == 0, again.stderr
    assert done and not any(f"{name}: started" in again.stderr for name in done)
    assert all(
        (folder / "trials" / n / "student.safetensors").stat().st_mtime_ns == t
        for n, t in done.items()
    )
    result = json.loads((folder / "confirm.json").read_text())
    assert [len(a["runs"]) for a in result["arms"]] == [2, 2]
    assert {r.name for r in read_records(folder)} == {
        "ce-s1001",
        "self-s1001",
        "ce-s1002",
        "self-s1002",
    }
    run = read_comparison(folder).runs[0]
    *_, last = train(run.config)
    assert read_records(folder)[0].last["train_loss"] == last.metrics["train_loss"]


def test_a_comparison_without_a_trained_run_is_refused(tmp_path: Path) -> None:
    new_comparison(build_arms(TREE), [1, 2], tmp_path / "c")
    with pytest.raises(ConfigError, match="none of its 4 runs was trained to the end"):
        judge_on_test(tmp_path / "c")
    assert not (tmp_path / "test_openings.jsonl").exists()


def of_photographs(tmp_path: Path) -> dict[str, Any]:
    """Return arms of photographs in a folder, with a test split of two classes."""
    data = {
        "name": "image_folder",
        "root": str(write_folder(tmp_path / "photos")),
        "num_classes": 2,
        "image_size": 16,
    }
    return {**TREE, "data": data}


@pytest.mark.parametrize("broken", ["no image", "no class"])
def test_a_broken_test_split_is_told_before_anything_trains(
    broken: str, tmp_path: Path, tfkd_inside: Run
) -> None:
    tree, split = of_photographs(tmp_path), tmp_path / "photos/val/class 1"
    (tmp_path / "arms.yaml").write_text(json.dumps(tree))
    for path in split.iterdir():
        path.write_bytes(b"") if broken == "no image" else path.unlink()
    run = tfkd_inside("confirm", "arms.yaml", "--seeds", "2", "--name", "c")
    assert run.returncode == 2 and f"data image_folder: {split}" in run.stderr
    assert "cannot be read as an image" in run.stderr or "no image in it" in run.stderr
    assert not (tmp_path / "tfkd_results").exists()


def test_a_test_split_that_cannot_be_read_was_not_opened(tmp_path: Path) -> None:
    directory = tmp_path / "s/c"
    new_comparison(build_arms(of_photographs(tmp_path)), [1, 2], directory)
    run = read_comparison(directory).runs[0]
    folder = directory / "trials" / run.name
    folder.mkdir(parents=True)
    network = run.config.student.build(run.config.data.shape, 2)
    save_weights(folder / WEIGHTS, network.state_dict(), {})
    about = {"parameters": {}, "config": run.config.model_dump(mode="json")}
    write_record(Record(folder, 0, run.name, "ce", "done", **about))
    path = tmp_path / "photos/val/class 1/002.jpg"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])  # its header is whole
    with pytest.raises(ConfigError, match=r"002\.jpg: cannot be read as an image"):
        judge_on_test(directory)
    assert (
        not (directory.parent / "test_openings.jsonl").exists() and not (folder / LOGITS).exists()
    )
    path.write_bytes(content)
    assert len(judge_on_test(directory)["opened"]) == 1 and (folder / LOGITS).exists()


@pytest.mark.parametrize(
    "of_node, share, where",
    [(None, 1, "taken"), (None, 0, "cpu"), (4, 0, "cpu"), (0, 1, "cpu"), (1, 0.5, "lent 0.5"), (2, 2, "lent 1.0")],
)  # fmt: skip
def test_a_gpu_for_the_test_split_is_lent_by_ray(
    of_node: float | None, share: float, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = []

    class Lent:
        def __init__(self, directory: Path, data: Any, share: float) -> None:
            used.append(f"lent {share}")

        def close(self) -> None:
            used.append("closed")

    def here(directory: Path, data: Any, *, on_gpu: bool) -> None:
        used.append("taken" if on_gpu else "cpu")

    nodes = [{"NodeID": "a", "Resources": {"GPU": of_node}}, {"NodeID": "b", "Resources": {}}]
    context = SimpleNamespace(get_node_id=lambda: "a" if of_node else "b")
    for name, answer in (("is_initialized", of_node is not None), ("nodes", nodes), ("get_runtime_context", context)):  # fmt: skip
        monkeypatch.setattr(confirm.ray, name, lambda answer=answer: answer)
    monkeypatch.setattr(confirm, "_LentTester", Lent)
    monkeypatch.setattr(confirm, "_Tester", here)
    runs: Any = [
        SimpleNamespace(config=SimpleNamespace(gpus_per_worker=n, data=None)) for n in (0, share)
    ]
    with confirm._opened_test(Path(), runs):
        pass
    assert used == ([where, "closed"] if "lent" in where else [where])


def test_the_test_split_is_judged_in_exact_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def looked(network: Any, images: Any, data: Any) -> Any:
        seen.extend(float32_precisions())
        yield torch.zeros(1, 2), torch.zeros(1)

    monkeypatch.setattr(confirm, "predictions", looked)
    network, data, labels = Any, Any, SimpleNamespace(device=torch.device("cuda", 0))
    confirm._logits(network, data, SimpleNamespace(labels=labels))  # type: ignore[arg-type]
    assert seen == ["ieee"] * 3


@pytest.mark.ray
def test_a_comparison_whose_runs_all_failed_does_not_say_that_it_opens_the_test_split(
    tmp_path: Path, ray_cluster: str, tfkd_inside: Run
) -> None:
    tree = {
        **TREE,
        "arms": [{"name": "ce", "objective": "ce"}, {"name": "lsr", "objective": "lsr"}],
    }
    (tmp_path / "arms.yaml").write_text(
        json.dumps({**tree, "optim": {"lr": 1e9}, "student": "mlp"})
    )
    run = tfkd_inside("confirm", "arms.yaml", "--seeds", "2", "--name", "c")
    assert run.returncode != 0 and "none of its 4 runs was trained to the end" in run.stderr, (
        run.stderr
    )
    assert "opening the test split" not in run.stderr
    assert not (tmp_path / "tfkd_results/test_openings.jsonl").exists()


@pytest.mark.ray
@pytest.mark.parametrize("objective", ["ce", "tfkd_self"])
def test_the_test_split_cannot_be_opened_from_inside_a_trial_or_a_teacher(
    tmp_path: Path, ray_cluster: str, objective: str
) -> None:
    from tfkd_ray.run.tune import TeacherFailed, build_tuner

    space = {
        "objective": objective,
        "student": {"name": "own", "path": "tests.peeking:network"},
        "epochs": 1,
        "search": {"num_samples": 1},
    }
    tuner = None
    try:
        tuner = build_tuner(space, name="e", storage=tmp_path)
    except TeacherFailed as error:
        assert (
            objective == "tfkd_self"
            and "PermissionError: the test split cannot be opened by a sweep" in str(error)
        )
    if tuner is not None:
        tuner.fit()
        (record,) = read_records(tmp_path / "e")
        assert record.status == "failed"
        assert str(record.reason).startswith(
            "PermissionError: the test split cannot be opened by a sweep"
        )


@pytest.mark.long
@pytest.mark.ray
def test_a_table_of_the_paper_runs_scaled_down_on_official_files(
    tmp_path: Path, ray_cluster: str, tfkd_inside: Run
) -> None:
    """Four of its 18 arms: KD of the CNN, its baselines and its teacher's plain training."""
    write_cifar(tmp_path, Cifar10, pickled(Cifar10), archive=True)
    kept, table = ("cnn", "r18", "cnn-kd-r18", "cnn-ce-x0.1"), read_yaml(TABLE_2)
    table["arms"] = [arm for arm in table["arms"] if arm["name"] in kept]
    (tmp_path / "table_2.yaml").write_text(dump_yaml(table))
    run = tfkd_inside(
        "confirm", "table_2.yaml", "--preset", "smoke", "--seeds", "2", "--name", "t",
        f"data.root={tmp_path}", "data.check_md5=false",
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert (
        "PRESET smoke: scaled down for a quick try; not comparable with published results"
        in run.stdout
    )
    for line in run.stdout.splitlines():
        assert len(line) <= 80 or line == f"  data.root={tmp_path}", line  # no word is broken
    result = json.loads((tmp_path / "tfkd_results/t/confirm.json").read_text())
    assert result["preset"] == "smoke" and len(result["arms"]) == 4
    assert all(r["status"] == "done" for a in result["arms"] for r in a["runs"])
    r18 = next(line for line in run.stdout.splitlines() if line.startswith("r18 "))
    assert " 95.12 " in r18


@pytest.mark.ray
@pytest.mark.slow
def test_a_sweep_is_confirmed_against_baselines_that_are_tuned_first(
    tmp_path: Path, ray_cluster: str, tfkd_inside: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tfkd_ray.space.arms.FEWEST_TRIALS", 2)
    space = {
        "student": {"name": "mlp", "hidden": [8]},
        "epochs": 2,
        "objective": "tfkd_reg",
        "optim": {"lr": {"low": 0.01, "high": 0.5, "log": True}},
        "search": {"num_samples": 2, "stopping": "none"},
    }
    (tmp_path / "space.yaml").write_text(json.dumps(space))
    assert tfkd_inside("tune", "space.yaml", "--name", "s").returncode == 0
    run = tfkd_inside(
        "confirm", "tfkd_results/s", "--seeds", "2", "--name", "c", "--fail-if-not-better"
    )
    assert run.returncode == 7, run.stderr
    assert (
        "baselines: ce and lsr had fewer trials than the winner's objective, or are hardly tuned; "
        "tuning them first" in run.stderr
    )
    assert "Baselines hardly tuned: ce (2 trials) and lsr (2 trials" in run.stderr
    baselines = read_records(tmp_path / "tfkd_results/s-baselines")
    assert sorted(r.objective for r in baselines) == ["ce", "ce", "lsr", "lsr"]
    result = json.loads((tmp_path / "tfkd_results/c/confirm.json").read_text())
    (found,) = result["verdicts"]
    assert found["verdict"] != "better" and f"verdict: {found['sentence']}"[:40] in run.stdout
    assert len(found["candidates"][0]["comparisons"]) == 3 and found["searched"] == 2
    assert "hardly tuned" in " ".join(run.stdout.split()) and "hardly tuned" in result["note"]


# --- a sceptical reader's questions, on made-up outcomes


def outcome_of(
    tmp_path: Path, values: dict[str, list[float | None]], name: str = "c", reason: str = "lost"
) -> dict[str, Any]:
    """Return the outcome of arms with these test accuracies of 1,000 images; None: a failed run."""
    tree = {**TREE, "arms": [{"name": n, "objective": "ce" if n == "ce" else "lsr" if n == "lsr" else "tfkd_reg",
                              "optim": {"lr": 0.1 + 0.01 * k}} for k, n in enumerate(values)]}  # fmt: skip
    new_comparison(build_arms(tree), [1, 2, 3, 4, 5], tmp_path / name)
    labels = torch.zeros(1000, dtype=torch.int64)
    for number, run in enumerate(read_comparison(tmp_path / name).runs):
        value = values[run.arm][run.seed - 1]
        folder, config = tmp_path / name / "trials" / run.name, run.config.model_dump(mode="json")
        status, why = ("done", None) if value is not None else ("failed", reason)
        write_record(
            Record(folder, number, run.name, config["objective"]["name"], status, {}, config, why)
        )
        if value is not None:
            logits = torch.zeros(1000, 10)
            logits[torch.arange(1000), (torch.arange(1000) >= round(1000 * value)).long()] = 5.0
            save_weights(folder / LOGITS, {"logits": logits, "labels": labels}, {})
    return outcome(tmp_path / name)


GOOD = [0.95, 0.952, 0.951, 0.949, 0.953]
FAIR = [0.90, 0.903, 0.899, 0.901, 0.904]


@pytest.mark.slow
def test_an_arm_that_beats_every_baseline_is_better(tmp_path: Path) -> None:
    (found,) = outcome_of(tmp_path, {"ce": FAIR, "lsr": FAIR[::-1], "reg": GOOD})["verdicts"]
    assert found["verdict"] == "better" and "reg is better than every baseline" in found["sentence"]
    assert [(row["name"], row["over"]) for row in found["baseline_leads"]] == [("lsr", "ce")]


@pytest.mark.slow
def test_every_line_of_an_outcome_fits_80_columns_whatever_the_file_and_the_data_are(
    tmp_path: Path,
) -> None:
    result = outcome_of(tmp_path, {"ce": [0.9] * 5, "lsr": FAIR, "reg": GOOD})
    result["title"] = "Omniglot: " + "the best of each objective, " * 4
    result["test"] = json.dumps({"name": "omniglot", "sets": ["images_background"] * 4})
    result["arms"][0]["runs"][0] |= {"status": "failed", "reason": "its process was lost " * 8}
    lines = outcome_table(result)
    assert max(map(len, lines)) <= 80
    text = " ".join(map(str.strip, lines))
    for sentence in (result["title"], "split of omniglot;", result["arms"][0]["runs"][0]["reason"]):
        assert sentence.strip() in text


@pytest.mark.slow
def test_equal_runs_have_no_interval_in_the_table(tmp_path: Path) -> None:
    lines = outcome_table(outcome_of(tmp_path, {"ce": [0.9] * 5, "lsr": FAIR, "reg": GOOD}))
    row = next(line for line in lines if line.startswith("ce "))
    assert row.split() == ["ce", "90.00", "±", "0.00", "5", "-"]
    assert not any("inf" in line for line in lines)


def test_nothing_is_better_where_a_baseline_has_no_two_runs(tmp_path: Path) -> None:
    (found,) = outcome_of(
        tmp_path, {"ce": FAIR, "lsr": [0.9, None, None, None, None], "reg": GOOD}
    )["verdicts"]
    assert (
        found["verdict"] == "cannot tell" and "baseline lsr has 1 of its runs" in found["sentence"]
    )


def test_nothing_is_better_where_a_baseline_diverged(tmp_path: Path) -> None:
    values = {"ce": FAIR, "lsr": [*FAIR[:4], None], "reg": GOOD}
    (found,) = outcome_of(tmp_path, values, reason="Diverged: train_loss is nan")["verdicts"]
    assert found["verdict"] == "cannot tell" and "baseline lsr diverged" in found["sentence"]


@pytest.mark.slow
def test_a_candidate_that_diverges_is_judged_by_it(tmp_path: Path) -> None:
    values = {"ce": FAIR, "lsr": FAIR[::-1], "reg": [*GOOD[:4], None]}
    (found,) = outcome_of(tmp_path, values, reason="Diverged: train_loss is nan")["verdicts"]
    assert found["verdict"] != "better"
    (lost,) = outcome_of(tmp_path, values, name="d", reason="its process was lost")["verdicts"]
    assert lost["verdict"] == "better" and any(
        "no value at seed 5" in note for note in lost["notes"]
    )


def test_a_second_opening_of_the_same_split_is_said_whatever_it_is_called(tmp_path: Path) -> None:
    line = json.dumps(
        {"test": "digits", "when": "2026-01-01T00:00:00+0000", "experiment": "c", "id": "another"}
    )
    (tmp_path / "test_openings.jsonl").write_text(line + "\n" + line[:20])
    result = outcome_of(tmp_path, {"ce": FAIR, "reg": GOOD})
    assert any(
        "was opened once before in this storage, first on 2026-01-01 by c" in note
        for note in result["notes"]
    )


@pytest.mark.parametrize(
    "line",
    ["17", "null", "[]", '"test"', "{}", '{"test": "digits"}', '{"test": 1, "when": 2, "experiment": 3}'],
)  # fmt: skip
def test_a_line_that_tells_of_no_opening_is_a_sentence(line: str, tmp_path: Path) -> None:
    (tmp_path / "test_openings.jsonl").write_text(f"{line}\n")
    with pytest.raises(
        ConfigError, match=r"test_openings.jsonl.*\n? *was changed by hand or truncated"
    ):
        openings(tmp_path, Digits())


def test_the_test_splits_digest_is_kept_at_its_opening_and_another_is_refused(
    tmp_path: Path,
) -> None:
    compared = build_arms(TREE)
    new_comparison(compared, [1, 2], tmp_path / "c")
    made, digest = read_comparison(tmp_path / "c"), digest_of(Digits().load_test())
    assert made.digests == Digits().pinned().digests != {"digest": digest}
    _note_opening(tmp_path / "c", made, digest, 4)
    assert [o["digest"] for o in openings(tmp_path, Digits())] == [digest]
    _note_opening(tmp_path / "c", made, digest, 4)  # it was killed before anybody saw a verdict
    assert len(openings(tmp_path, Digits())) == 1
    _note_opening(tmp_path / "c", made, digest, 5)
    (tmp_path / "c" / "confirm.json").write_text("{}")
    with pytest.raises(
        ConfigError, match="the test split of digits has changed since this comparison opened it"
    ):
        _note_opening(tmp_path / "c", made, "0" * 32, 5)
    assert len(openings(tmp_path, Digits())) == 2
    _note_opening(tmp_path / "c", made, digest, 5)
    elsewhere = {
        "test": "a copy elsewhere",
        "when": "2026-01-01",
        "experiment": "d",
        "id": "d",
        "digest": digest,
    }
    with (tmp_path / "test_openings.jsonl").open("a") as file:
        file.write(json.dumps(elsewhere) + "\n")
    assert len(openings(tmp_path, Digits())) == 4, "the same images under another name"
