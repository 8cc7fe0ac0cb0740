"""Budgets: what they count, when they end a sweep, and how it goes on."""

import json
from pathlib import Path
from typing import Any

import optuna
import pytest
from ray import tune
from test_search import run_sweep, space
from test_tune import TREE

from tfkd_ray.experiment import Record, read_experiment, read_metrics, read_records, write_experiment, write_record
from tfkd_ray.schema import ConfigError
from tfkd_ray.search import OptunaSearcher, open_journal
from tfkd_ray.space import Space, build_space
from tfkd_ray.tune import Budget, build_tuner, over_budget, resume_tuner, spent_so_far


def tree(**search: Any) -> dict[str, Any]:
    return {**TREE, "search": {"num_samples": 4, "stopping": "none", "max_concurrent": 1, **search}}


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class Trial:
    def __init__(self, experiment: Path, number: int) -> None:
        self.trial_id = f"id{number}"
        folder = experiment / "trials" / f"t{number:04d}-ce"
        self.config = {"trial": {"number": number, "directory": str(folder)}}


def budget(experiment: Path, s: Space, said: list[str] | None = None) -> tuple[Budget, Clock]:
    experiment.mkdir(exist_ok=True)
    write_experiment(experiment, s.tree, ["tfkd"])
    clock = Clock()
    searcher = OptunaSearcher(s, experiment / "study.journal")
    return Budget(experiment, s, searcher, on_budget=None if said is None else said.append, clock=clock), clock


def tell(b: Budget, what: str, trial: Trial, **more: Any) -> None:
    getattr(b, f"on_trial_{what}")(iteration=0, trials=[], trial=trial, **more)


def test_a_time_budget_is_over_when_it_is_over_and_is_said_once(tmp_path: Path) -> None:
    said: list[str] = []
    b, clock = budget(tmp_path / "e", build_space(tree(time_budget_s=60)), said)
    b.setup()
    clock.now += 59.9
    assert not b.stop_all() and b.reason is None
    clock.now += 0.2
    assert b.stop_all() and b.stop_all()
    assert said == ["search.time_budget_s: 60.1 of 60 s are reached"] and b.reason == said[0]


def test_hours_count_epochs_and_what_a_running_trial_has_held_since(tmp_path: Path) -> None:
    s = build_space({**tree(cpu_hours=1), "workers": 2, "cpus_per_worker": 3})
    b, clock = budget(tmp_path / "e", s)
    one, two = Trial(tmp_path / "e", 0), Trial(tmp_path / "e", 1)
    b.setup()
    tell(b, "start", one)
    tell(b, "start", two)
    clock.now += 100
    assert b.spent()["cpu_hours"] == pytest.approx(200 * 6 / 3600) and b.spent()["gpu_hours"] == 0
    tell(b, "result", one, result={"epoch": 1, "seconds": 90.0})
    assert b.spent()["cpu_hours"] == pytest.approx((90 + 100) * 6 / 3600)
    tell(b, "result", one, result={"epoch": 1, "seconds": 90.0})  # told again after a resume
    assert b.spent()["cpu_hours"] == pytest.approx((90 + 100) * 6 / 3600)
    tell(b, "recover", two)  # its process was lost: what it held was spent
    clock.now += 50
    tell(b, "start", two)
    clock.now += 50
    assert b.spent()["cpu_hours"] == pytest.approx((90 + 100 + 100 + 50) * 6 / 3600)
    tell(b, "complete", one)
    tell(b, "complete", two)
    before = b.spent()
    clock.now += 1000
    assert b.spent()["cpu_hours"] == before["cpu_hours"] and not b.stop_all()


def test_failed_trials_are_counted_once_each(tmp_path: Path) -> None:
    b, _ = budget(tmp_path / "e", build_space(tree(max_failed_trials=2)))
    for number in (0, 0, 1):
        assert not b.stop_all()
        trial = Trial(tmp_path / "e", number)
        tell(b, "start", trial)
        tell(b, "result", trial, result={"failed": "OSError", "done": True})
        tell(b, "error", trial)
    assert b.stop_all() and b.reason == "search.max_failed_trials: 2 of 2 failed trials are reached"


def test_a_budget_does_not_end_a_search_that_has_ended(tmp_path: Path) -> None:
    s = build_space(tree(time_budget_s=1))
    (tmp_path / "e").mkdir()
    run_sweep(OptunaSearcher(s, tmp_path / "e" / "study.journal"))
    b, clock = budget(tmp_path / "e", s)
    clock.now += 10
    assert not b.stop_all()


def test_what_was_spent_is_read_from_plain_files(tmp_path: Path) -> None:
    for n, status in enumerate(["done", "failed", "interrupted"]):
        folder = tmp_path / "trials" / f"t{n:04d}-ce"
        write_record(Record(folder, n, folder.name, "ce", status, {}, {}))
        (folder / "metrics.jsonl").write_text('{"epoch": 1, "seconds": 900}\n{"epoch": 2, "seconds": 300}\n{"epo')
    assert spent_so_far(tmp_path, workers={"gpus": 2, "cpus": 0.5}) == {
        "time_budget_s": 0, "gpu_hours": 2.0, "cpu_hours": 0.5, "max_failed_trials": 1,
    }  # fmt: skip
    (tmp_path / "spent.json").write_text('{"seconds": 12.5, "trial_seconds": 7200}')
    spent = spent_so_far(tmp_path, workers={"gpus": 0, "cpus": 1})
    assert spent["time_budget_s"] == 12.5 and spent["cpu_hours"] == 2


def test_the_first_budget_that_is_reached_is_named() -> None:
    spent = {"time_budget_s": 5, "gpu_hours": 1.0, "cpu_hours": 3.0, "max_failed_trials": 0}
    assert over_budget({"time_budget_s": 6, "max_failed_trials": 1}, spent) is None
    assert over_budget({"gpu_hours": 2, "cpu_hours": 3}, spent) == "search.cpu_hours: 3 of 3 h are reached"


# --- in a sweep


class Slow(tune.Callback):  # type: ignore[misc]
    """Counts reports, and takes its time at each."""

    def __init__(self, clock: list[int]) -> None:
        self.clock = clock

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        self.clock.append(result["epoch"])


@pytest.mark.ray
def test_a_budget_ends_a_sweep_which_goes_on_with_a_new_one_and_the_total_is_exact(
    ray_cluster: str, tmp_path: Path
) -> None:
    said: list[str] = []
    reports: list[int] = []
    run = {**tree(cpu_hours=1e-9, num_samples=3), "epochs": 40}
    build_tuner(run, name="e", storage=tmp_path, callbacks=[Slow(reports)], on_budget=said.append).fit()
    assert len(said) == 1 and said[0].startswith("search.cpu_hours: ") and len(reports) <= 1
    records = read_records(tmp_path / "e")
    assert [(r.status, r.reason) for r in records] == [("interrupted", said[0])]
    assert len(records[0].metrics) <= 1
    before = (tmp_path / "e" / "experiment.yaml").read_text()
    with pytest.raises(ConfigError, match=r"search.cpu_hours: .* are reached; to go on, give a new one"):
        resume_tuner(tmp_path / "e")
    for wrong in (0, -1.5):
        with pytest.raises(ConfigError, match=rf"cpu_hours: a budget is above 0, got {wrong}"):
            resume_tuner(tmp_path / "e", cpu_hours=wrong)
    for odd in (float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="cpu_hours: "):
            resume_tuner(tmp_path / "e", cpu_hours=odd)
    assert (tmp_path / "e" / "experiment.yaml").read_text() == before
    grid = resume_tuner(tmp_path / "e", cpu_hours=10, on_budget=said.append).fit()
    assert len(grid) == 3 and len(said) == 1
    records = read_records(tmp_path / "e")
    assert [(r.number, r.status, len(r.metrics)) for r in records] == [(n, "done", 40) for n in range(3)]
    total = read_experiment(tmp_path / "e")["space"]["search"]["cpu_hours"]
    assert 10 < total < 10.01  # from then on
    assert json.loads((tmp_path / "e" / "spent.json").read_text())["seconds"] > 0


@pytest.mark.ray
def test_failed_trials_end_a_sweep_and_run_again_when_they_are_asked_to(ray_cluster: str, tmp_path: Path) -> None:
    said: list[str] = []
    run = tree(num_samples=5, max_failed_trials=2, warm_start=False, sampler="random", seed=2)
    run["optim"] = {"lr": {"choices": [1e20, 0.1]}}
    build_tuner(run, name="e", storage=tmp_path, on_budget=said.append).fit()
    records = read_records(tmp_path / "e")
    assert said == ["search.max_failed_trials: 2 of 2 failed trials are reached"]
    failed = [r.number for r in records if r.status == "failed"]
    assert len(failed) == 2 and len(records) < 5
    with pytest.raises(ConfigError, match=r"search.max_failed_trials: 2 of 2 failed trials are reached"):
        resume_tuner(tmp_path / "e")
    folder = next(r.folder for r in records if r.number == failed[0])
    (folder / "error.txt").write_text("of the first attempt")
    resume_tuner(tmp_path / "e", retry_failed=True, max_failed_trials=9).fit()
    after = read_records(tmp_path / "e")
    assert [r.number for r in after] == list(range(5))  # no orphan, no number twice
    assert all(r.status == ("failed" if r.config["optim"]["lr"] > 1 else "done") for r in after)
    assert "of the first attempt" not in (folder / "error.txt").read_text()  # it failed anew
    storage = open_journal(tmp_path / "e" / "study.journal")
    study = optuna.load_study(study_name="tfkd/ce", storage=storage)
    attempts = [(t.user_attrs["number"], t.user_attrs["attempt"]) for t in study.trials if "attempt" in t.user_attrs]
    assert attempts == [(n, 2) for n in failed]


@pytest.mark.ray
def test_a_sweep_goes_on_in_a_wider_space(ray_cluster: str, tmp_path: Path) -> None:
    build_tuner(tree(), name="e", storage=tmp_path).fit()
    before = [(r.name, r.metrics) for r in read_records(tmp_path / "e")]
    wider = {
        **tree(num_samples=6),
        "optim": {"lr": {"low": 0.001, "high": 0.5, "log": True}, "nesterov": {"choices": [False, True]}},
    }
    with pytest.raises(ConfigError) as error:
        resume_tuner(tmp_path / "e", space={**wider, "epochs": 4})
    assert "an experiment goes on in its own space, or in one that holds all of it" in str(error.value)
    assert "epochs: was 3, and is 4 now" in str(error.value)
    assert len(resume_tuner(tmp_path / "e", space=wider).fit()) == 2
    after = read_records(tmp_path / "e")
    assert [(r.name, r.metrics) for r in after][:4] == before
    assert "optim.nesterov" in after[5].parameters
    assert len(resume_tuner(tmp_path / "e", add_trials=1).fit()) == 1  # and from then on it is the experiment's
    assert [r.number for r in read_records(tmp_path / "e")] == list(range(7))


@pytest.mark.ray
def test_a_sweep_begins_with_what_an_earlier_one_has_found(ray_cluster: str, tmp_path: Path) -> None:
    build_tuner(tree(), name="old", storage=tmp_path).fit()
    with pytest.raises(ConfigError, match=r"none lies in this space: epochs: 3 there, 2 here"):
        build_tuner({**tree(), "epochs": 2}, name="e", storage=tmp_path, priors=[tmp_path / "old"])
    assert not (tmp_path / "e").exists()
    build_tuner(tree(num_samples=2), name="e", storage=tmp_path, priors=[tmp_path / "old"]).fit()
    assert [r.number for r in read_records(tmp_path / "e")] == [0, 1]
    study = optuna.load_study(study_name="tfkd/ce", storage=open_journal(tmp_path / "e" / "study.journal"))
    assert [t.user_attrs.get("prior") for t in study.trials] == [f"old/t000{n}-ce" for n in range(4)] + [None] * 2
    assert len(resume_tuner(tmp_path / "e", add_trials=1, priors=[tmp_path / "old"]).fit()) == 1
    assert len(study.trials) == 7


@pytest.mark.ray
def test_rays_asha_is_a_stopping_rule_by_name_and_several_metrics_make_a_front(
    ray_cluster: str, tmp_path: Path
) -> None:
    run = {**tree(num_samples=6, stopping={"name": "asha", "min_epochs": 1}, max_concurrent=2), "epochs": 6}
    build_tuner(run, name="a", storage=tmp_path).fit()
    found = {(r.status, len(r.metrics)) for r in read_records(tmp_path / "a")}
    assert ("done", 6) in found and any(status == "stopped" and n in (1, 3) for status, n in found)
    build_tuner(tree(metric=["val_accuracy", "val_ece"]), name="b", storage=tmp_path).fit()
    study = optuna.load_study(study_name="tfkd/ce", storage=open_journal(tmp_path / "b" / "study.journal"))
    assert all(len(t.values) == 2 for t in study.trials) and study.best_trials


@pytest.mark.ray
def test_trials_whose_study_was_lost_are_not_numbered_anew(ray_cluster: str, tmp_path: Path) -> None:
    build_tuner(tree(num_samples=2), name="e", storage=tmp_path).fit()
    (tmp_path / "e" / "study.journal").unlink()
    with pytest.raises(ConfigError, match=r"study.journal does not hold t0000-ce, t0001-ce, whose files are there"):
        resume_tuner(tmp_path / "e", add_trials=1)
    assert all(len(read_metrics(r.folder)) == 3 for r in read_records(tmp_path / "e"))
    assert space().search.num_samples == 16
