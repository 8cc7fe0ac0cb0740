"""Constraints on metrics: what the search learns of them, and which trial is best."""

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState
from rich.console import Console
from test_search import EPOCHS, trials

from tfkd_ray.cli.main import main
from tfkd_ray.run.priors import prior_trials
from tfkd_ray.run.searcher import OptunaSearcher, copy_trials
from tfkd_ray.settings.errors import ConfigError
from tfkd_ray.settings.yaml import dump_yaml
from tfkd_ray.show.chosen import choose
from tfkd_ray.show.live import Progress
from tfkd_ray.show.report import report
from tfkd_ray.show.status import status, status_lines
from tfkd_ray.space.arms import arms_of
from tfkd_ray.space.relate import not_superset
from tfkd_ray.space.space import Space, build_space
from tfkd_ray.store.experiment import (
    best,
    pareto,
    ranked_trials,
    read_experiment,
    read_records,
    write_record,
)
from tfkd_ray.verdict.limits import (
    as_limits,
    excesses,
    feasible_first,
    is_feasible,
    limits_text,
    met_text,
)

LIMITS = {"parameters": {"low": None, "high": 2e6}, "val_ece": {"low": None, "high": 0.05}}


def test_a_limit_is_met_at_its_end_and_exceeded_relative_to_it() -> None:
    assert excesses(LIMITS, {"parameters": 3e6, "val_ece": 0.05}) == {"parameters: high": 0.5, "val_ece: high": 0.0}  # fmt: skip
    assert is_feasible(LIMITS, {"parameters": 2e6, "val_ece": 0.05})
    assert not is_feasible(LIMITS, {"parameters": 2e6, "val_ece": 0.051})
    both = {"val_accuracy": {"low": 0.9, "high": 0.95}}
    assert [is_feasible(both, {"val_accuracy": v}) for v in (0.89, 0.9, 0.95, 0.96)] == [
        False, True, True, False,
    ]  # fmt: skip
    assert excesses({"val_nll": {"high": 0.0}}, {"val_nll": 0.3}) == {"val_nll: high": 0.3}
    for lacking in ({}, {"val_accuracy": math.nan}, {"val_accuracy": None}):
        assert not is_feasible(both, lacking) and "not measured" not in met_text({}, lacking)
    assert limits_text(LIMITS) == "parameters at most 2e+06 and val_ece at most 0.05"
    assert met_text(LIMITS, {"parameters": 3e6}) == "does not meet the constraints (parameters is 3e+06, val_ece is not measured)"  # fmt: skip
    assert feasible_first([3, 1, 2], {"val_ece": {"high": 2.0}}, lambda n: {"val_ece": n}) == [1, 2, 3]  # fmt: skip
    assert as_limits(None) == {}
    for wrong in ({"val_ec": {"high": 1}}, {"val_ece": {"high": "x"}}):
        with pytest.raises(ValueError, match="val_ec"):
            as_limits(wrong)


# --- the search


def space(**search: Any) -> Space:
    return build_space(
        {
            "student": "mlp",
            "epochs": EPOCHS,
            "objective": "tfkd_reg",
            "optim": {"lr": {"low": 0.01, "high": 1, "log": True}},
            "search": {"num_samples": 40, "warm_start": False, "stopping": "none", **search},
        }
    )


def result(config: dict[str, Any], epoch: int) -> dict[str, float]:
    """Return metrics of which accuracy grows with the learning rate, and so does the ECE."""
    lr = config["optim"]["lr"]
    return {"epoch": epoch, "val_accuracy": 0.5 + lr / 3, "val_ece": lr / 2}


def run(searcher: OptunaSearcher, most: int = 1000) -> list[float]:
    """Run trials one after another; return their learning rates."""
    found = []
    for k in range(most):
        config = searcher.suggest(f"id{k}")
        if not isinstance(config, dict):
            break
        found.append(config["optim"]["lr"])
        told: dict[str, float] = {}
        for epoch in range(1, EPOCHS + 1):
            told = result(config, epoch)
            if searcher.report(f"id{k}", told):
                break
            searcher.on_trial_result(f"id{k}", told)
        searcher.on_trial_complete(f"id{k}", told)
    return found


CONSTRAINED = {"constraints": {"val_ece": {"high": 0.05}}}


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["tpe", pytest.param("gp", marks=pytest.mark.long)])
def test_a_search_learns_which_trials_meet_its_constraints(tmp_path: Path, sampler: str) -> None:
    samples = {"sampler": sampler, "num_samples": 30}
    free = run(OptunaSearcher(space(**samples), tmp_path / "free"))
    held = run(OptunaSearcher(space(**samples, **CONSTRAINED), tmp_path / "held"))

    def met(rates: list[float]) -> int:  # gp proposes many at the very edge, of both sides
        return sum(lr <= 0.13 for lr in rates[-15:])

    assert met(free) <= 4 and met(held) >= 8, (free, held)
    for trial in trials(tmp_path / "held"):
        lr = trial.params["optim.lr"]
        assert trial.constraints == {"val_ece: high": pytest.approx((lr / 2 - 0.05) / 0.05)}
    assert all(trial.constraints == {} for trial in trials(tmp_path / "free"))


def test_a_trial_that_is_stopped_early_has_constraints_too_and_resuming_repeats_none(
    tmp_path: Path,
) -> None:
    s = space(stopping="halving", num_samples=12, **CONSTRAINED)
    searcher = OptunaSearcher(s, tmp_path / "journal")
    run(searcher, most=6)
    config = searcher.suggest("cut")
    assert isinstance(config, dict)
    for epoch in range(1, EPOCHS + 1):
        searcher.report("cut", result(config, epoch))
    live = searcher._live["cut"]
    searcher._limit(live.trial, result(config, EPOCHS))  # and the driver is killed here
    searcher.close()
    run(OptunaSearcher(s, tmp_path / "journal"))
    found = trials(tmp_path / "journal")
    assert len(found) == 12 and {len(t.constraints) for t in found} == {1}
    assert {t.state for t in found} == {TrialState.COMPLETE, TrialState.PRUNED}


@pytest.mark.slow
def test_constraints_of_earlier_experiments_and_of_a_wider_space_are_learnt(tmp_path: Path) -> None:
    s = space(sampler="gp", num_samples=8, **CONSTRAINED)
    e = tmp_path / "e"
    make_experiment(e, s)
    priors = prior_trials(s, [e])
    assert len(priors) == 3
    searcher = OptunaSearcher(s, tmp_path / "journal", priors=[e])
    run(searcher)
    (study,) = searcher.studies()
    assert {tuple(t.constraints) for t in study.get_trials()} == {("val_ece: high",)}
    with pytest.raises(ConfigError, match="add_evaluated_point: the space has constraints"):
        searcher.add_evaluated_point({"optim.lr": 0.1}, 0.9)
    before = [t.constraints for t in study.get_trials()]
    new = OptunaSearcher(s, tmp_path / "journal", study="tfkd@2")
    copy_trials(searcher, new)
    (study,) = new.studies()
    assert sorted(map(str, before)) == sorted(str(t.constraints) for t in study.get_trials())


def make_experiment(e: Path, s: Space) -> None:
    """Write an experiment of three trials; ECE and accuracy grow with the learning rate."""
    from tfkd_ray.store.experiment import Record, write_experiment

    write_experiment(e, s.tree, ["tfkd"])
    for n, lr in enumerate((0.5, 0.05, 0.08)):
        config = s.branches[0].config({"optim.lr": lr})
        name = f"t000{n}-tfkd_reg"
        folder = e / "trials" / name
        tree = config.model_dump(mode="json")
        write_record(Record(folder, n, name, "tfkd_reg", "done", {"optim.lr": lr}, tree))
        lines = [json.dumps({**result(tree, k), "train_loss": 1.0}) for k in range(1, EPOCHS + 1)]
        (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
        (folder / "result.json").symlink_to("metrics.jsonl")


@pytest.mark.parametrize(
    "search, sentence",
    [
        ({"constraints": {"val_ace": {"high": 1}}}, "search.constraints: no metric 'val_ace'; did you mean 'val_ece'?"),
        ({"constraints": ["val_ece"]}, "search.constraints: limits by metric, {val_ece: {high: 0.05}}, got ['val_ece']"),
        ({"constraints": {"val_ece": 0.05}}, "search.constraints.val_ece: needs settings below it (key: value), got 0.05"),
        ({"constraints": {"val_ece": {}}}, "search.constraints.val_ece: needs a limit, {high: 0.05}, {low: 0.9} or both"),
        ({"constraints": {"val_ece": {"hgih": 1}}}, "search.constraints.val_ece.hgih: no such setting; did you mean 'high'?"),
        ({"constraints": {"val_ece": {"low": 0.3, "high": 0.2}}}, "search.constraints.val_ece: low must not be above high, got low 0.3, high 0.2"),
        ({"constraints": {"val_accuracy": {"low": 1.5}}}, "search.constraints.val_accuracy.low: no trial is above 1, got 1.5"),
        ({"constraints": {"val_nll": {"high": -1}}}, "search.constraints.val_nll.high: no trial is below 0, got -1"),
        ({"constraints": {"parameters": {"high": 1e6}}}, "search.constraints: the number of parameters is the same in all trials, because the student is fixed"),
        ({"constraints": {"val_ema_ece": {"high": 0.1}}}, "search.metric: val_ema_ece is of averaged weights, and not all trials have ema"),
        *(({"sampler": s, **CONSTRAINED}, f"search.constraints: {s} does not learn which trials meet them; use tpe or gp") for s in ("random", "qmc", "cmaes")),
    ],
)  # fmt: skip
def test_constraints_that_make_no_sense_are_a_sentence(
    search: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ConfigError) as error:
        space(**search)
    assert any(p.startswith(sentence) for p in error.value.problems), str(error.value)


def test_constraints_stay_when_a_sweep_is_resumed() -> None:
    old, new = space(**CONSTRAINED), space()
    (problem,) = not_superset(old, new)
    assert (
        problem == "search.constraints: were val_ece at most 0.05, and trials were judged by them"
    )
    assert not_superset(old, build_space(old.tree)) == []


def test_trials_report_the_metrics_that_are_limited(tmp_path: Path) -> None:
    s = space(constraints={"val_auroc": {"low": 0.9}})
    config = OptunaSearcher(s, tmp_path / "journal").suggest("a")
    assert config["trial"]["metrics"] == ["val_accuracy", "val_auroc"]  # type: ignore[index, call-overload]


# --- the best trial


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a sweep whose trial of the highest accuracy has too high an ECE."""
    make_experiment(tmp_path / "e", space(**CONSTRAINED))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "e"


def limited_to(experiment: Path, high: float) -> None:
    about = read_experiment(experiment)
    about["space"]["search"]["constraints"]["val_ece"]["high"] = high
    (experiment / "experiment.yaml").write_text(dump_yaml(about))


def test_a_trial_that_meets_the_constraints_is_best_and_the_others_follow(sweep: Path) -> None:
    records, limits = read_records(sweep), {"val_ece": {"high": 0.05}}
    names = [r.name[:5] for r in ranked_trials(records, "val_accuracy", limits)]
    assert names == ["t0002", "t0001", "t0000"]
    assert best(records, "val_accuracy").name == "t0000-tfkd_reg"  # type: ignore[union-attr]
    front = pareto(records, ["val_accuracy", "val_ece"], limits)
    assert [r.name[:5] for r in front] == ["t0002", "t0001"]
    assert len(pareto(records, ["val_accuracy", "val_ece"], {"val_ece": {"high": 0.001}})) == 3
    assert arms_of(sweep, top_k=1, rivals=()).arms[0].name == "t0002-tfkd_reg"


def test_readers_say_that_the_best_trial_meets_the_constraints(
    sweep: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = status(sweep)
    assert found["constraints"] == "val_ece at most 0.05"
    assert (found["best"]["trial"], found["best"]["feasible"]) == ("t0002-tfkd_reg", True)
    assert "meets the constraints: val_ece at most 0.05" in status_lines(found)
    assert main(["best", "e"]) == 0
    out = capsys.readouterr().out
    assert "# constraints: val_ece at most 0.05; it meets the constraints\n" in out
    assert main(["best", "e", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["best"][0]["feasible"] is True and told["constraints"] == "val_ece at most 0.05"
    view = Progress(sweep, Console(file=io.StringIO(), width=100))
    view.setup()
    shown = " ".join(" ".join(view.lines(100, 40)).split())
    assert "best: t0002-tfkd_reg, val_accuracy 0.5267, meets the constraints" in shown
    report(sweep, sweep.parent / "e.html")
    page = (sweep.parent / "e.html").read_text()
    assert "constraints: val_ece at most 0.05" in page and "meets the constraints" in page
    assert "t0002-tfkd_reg" in choose(sweep).name


def test_readers_say_that_no_trial_meets_the_constraints(
    sweep: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    limited_to(sweep, 0.001)
    found = status(sweep)
    assert (found["best"]["trial"], found["best"]["feasible"]) == ("t0000-tfkd_reg", False)
    assert "no trial meets the constraints: val_ece at most 0.001" in status_lines(found)
    assert main(["best", "e"]) == 0
    out = capsys.readouterr().out
    said = " ".join(out.replace("\n#", "").split())
    assert "it does not meet the constraints (val_ece is 0.25)" in said
    assert "no trial of full length meets them; this is the best of the others" in said
    report(sweep, sweep.parent / "e.html")
    assert "No trial of full length meets them" in (sweep.parent / "e.html").read_text()
    note = arms_of(sweep, top_k=1, rivals=()).note
    assert note.startswith("No trial of the sweep meets its constraints (val_ece at most 0.001)")
    assert "does not meet the constraints" in choose(sweep).selection[0]


def test_constraints_that_were_damaged_by_hand_are_a_sentence(
    sweep: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (sweep / "experiment.yaml").read_text()
    (sweep / "experiment.yaml").write_text(text.replace("high: 0.05", "high: lots"))
    for words in (["status", "e"], ["best", "e"], ["report", "e"], ["stop", "e"]):
        assert main(words) == 2, words
        assert "experiment.yaml" in capsys.readouterr().err
