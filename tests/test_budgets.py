"""Budgets: their counts, the moment they stop a sweep, and resuming."""

import dataclasses
import functools
import io
import json
import re
from pathlib import Path
from typing import Any

import optuna
import pytest
from ray import tune
from rich.console import Console
from test_readers import make_sweep
from test_search import run_sweep, space
from test_tune import TREE

from tfkd_ray.cli.main import main
from tfkd_ray.run.callbacks import Budget, over_budget, spent_so_far
from tfkd_ray.run.journal import open_journal
from tfkd_ray.run.searcher import OptunaSearcher
from tfkd_ray.run.tune import build_tuner, resume_tuner
from tfkd_ray.settings.errors import ConfigError
from tfkd_ray.settings.yaml import dump_yaml
from tfkd_ray.show.listener import Announcer
from tfkd_ray.show.live import Progress
from tfkd_ray.show.plan import lines, plan
from tfkd_ray.show.report import report
from tfkd_ray.show.status import ls, ls_lines, status, status_lines
from tfkd_ray.space.space import Space, build_space
from tfkd_ray.store.assignment import SECTION, Assignment
from tfkd_ray.store.experiment import (
    Record,
    read_experiment,
    read_metrics,
    read_records,
    write_experiment,
    write_record,
)


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
        self.config = {SECTION: Assignment(folder.name, 40, number, directory=folder).section()}


def budget(experiment: Path, s: Space, said: list[str] | None = None) -> tuple[Budget, Clock]:
    experiment.mkdir(exist_ok=True)
    write_experiment(experiment, s.tree, ["tfkd"])
    clock = Clock()
    searcher = OptunaSearcher(s, experiment / "study.journal")
    return Budget(
        experiment, s, searcher, on_budget=None if said is None else said.append, clock=clock
    ), clock


@functools.cache
def announcer(b: Budget) -> Announcer:
    return Announcer([b])


def tell(b: Budget, what: str, trial: Trial, **more: Any) -> None:
    getattr(announcer(b), f"on_trial_{what}")(iteration=0, trials=[], trial=trial, **more)


def test_a_time_budget_is_over_when_it_is_over_and_is_said_once(tmp_path: Path) -> None:
    said: list[str] = []
    b, clock = budget(tmp_path / "e", build_space(tree(time_budget_s=60)), said)
    b.on_begin()
    clock.now += 59.9
    assert not b.stop_all() and b.reason is None
    clock.now += 0.2
    assert b.stop_all() and b.stop_all()
    assert said == ["search.time_budget_s: limit reached (60.1 of 60 s)"] and b.reason == said[0]


def test_hours_count_epochs_and_what_a_running_trial_has_held_since(tmp_path: Path) -> None:
    s = build_space({**tree(cpu_hours=1), "workers": 2, "cpus_per_worker": 3})
    b, clock = budget(tmp_path / "e", s)
    one, two = Trial(tmp_path / "e", 0), Trial(tmp_path / "e", 1)
    b.on_begin()
    tell(b, "start", one)
    tell(b, "start", two)
    clock.now += 100
    assert b.spent()["cpu_hours"] == pytest.approx(200 * 6 / 3600) and b.spent()["gpu_hours"] == 0
    tell(b, "result", one, result={"epoch": 1, "seconds": 90.0})
    assert b.spent()["cpu_hours"] == pytest.approx((90 + 100) * 6 / 3600)
    tell(b, "result", one, result={"epoch": 1, "seconds": 90.0})  # reported again after a resume
    assert b.spent()["cpu_hours"] == pytest.approx((90 + 100) * 6 / 3600)
    tell(b, "recover", two)  # its process was lost, but its time was spent
    clock.now += 50
    tell(b, "start", two)
    clock.now += 50
    assert b.spent()["cpu_hours"] == pytest.approx((90 + 100 + 100 + 50) * 6 / 3600)
    tell(b, "complete", one)
    tell(b, "complete", two)
    before = b.spent()
    clock.now += 1000
    assert b.spent()["cpu_hours"] == before["cpu_hours"] and not b.stop_all()


def test_gpu_hours_are_over_by_no_more_than_the_epoch_that_each_running_trial_is_in(
    tmp_path: Path,
) -> None:
    said: list[str] = []
    b, clock = budget(
        tmp_path / "e", build_space({**tree(gpu_hours=0.5), "gpus_per_worker": 1}), said
    )
    running = [Trial(tmp_path / "e", n) for n in (0, 1)]
    b.on_begin()
    for trial in running:
        tell(b, "start", trial)
    epoch = 0
    while not b.stop_all():  # an epoch takes two and a half minutes of GPU time
        assert b.spent()["gpu_hours"] < 0.5
        epoch += 1
        clock.now += 150
        for trial in running:
            tell(b, "result", trial, result={"epoch": epoch, "seconds": 150.0})
    assert said == ["search.gpu_hours: limit reached (0.5 of 0.5 h)"] and epoch == 6
    clock.now += 150  # they finish their current epoch
    for trial in running:
        tell(b, "result", trial, result={"epoch": 7, "seconds": 150.0})
        tell(b, "complete", trial)
    clock.now += 900
    assert (
        b.spent()["gpu_hours"] == pytest.approx(0.5 + 2 * 150 / 3600) and b.spent()["cpu_hours"] > 0
    )
    assert b.stop_all() and len(said) == 1
    b.on_close([])
    again, _ = budget(tmp_path / "e", build_space({**tree(gpu_hours=0.5), "gpus_per_worker": 1}))
    assert again.spent()["gpu_hours"] == pytest.approx(
        b.spent()["gpu_hours"], abs=1e-5
    )  # it is kept


def test_failed_trials_are_counted_once_each(tmp_path: Path) -> None:
    b, _ = budget(tmp_path / "e", build_space(tree(max_failed_trials=2)))
    for number in (0, 0, 1):
        assert not b.stop_all()
        trial = Trial(tmp_path / "e", number)
        tell(b, "start", trial)
        tell(b, "result", trial, result={"failed": "OSError", "done": True})
        tell(b, "error", trial)
    assert (
        b.stop_all()
        and b.reason == "search.max_failed_trials: limit reached (2 of 2 failed trials)"
    )


def test_a_budget_does_not_end_a_search_that_has_ended(tmp_path: Path) -> None:
    s = build_space(tree(time_budget_s=1))
    (tmp_path / "e").mkdir()
    run_sweep(OptunaSearcher(s, tmp_path / "e" / "study.journal"))
    b, clock = budget(tmp_path / "e", s)
    clock.now += 10
    assert not b.stop_all()


def test_what_was_spent_is_read_from_plain_files(tmp_path: Path) -> None:
    for n, ended in enumerate(["done", "failed", "interrupted"]):
        folder = tmp_path / "trials" / f"t{n:04d}-ce"
        write_record(Record(folder, n, folder.name, "ce", ended, {}, {}))
        (folder / "metrics.jsonl").write_text(
            '{"epoch": 1, "seconds": 900}\n{"epoch": 2, "seconds": 300}\n{"epo'
        )
    assert spent_so_far(tmp_path, workers={"gpus": 2, "cpus": 0.5}) == {
        "time_budget_s": 0, "gpu_hours": 2.0, "cpu_hours": 0.5, "max_failed_trials": 1,
    }  # fmt: skip
    (tmp_path / "spent.json").write_text('{"seconds": 12.5, "trial_seconds": 7200}')
    spent = spent_so_far(tmp_path, workers={"gpus": 0, "cpus": 1})
    assert spent["time_budget_s"] == 12.5 and spent["cpu_hours"] == 2


def test_the_first_budget_that_is_reached_is_named() -> None:
    spent = {"time_budget_s": 5, "gpu_hours": 1.0, "cpu_hours": 3.0, "max_failed_trials": 0}
    assert over_budget({"time_budget_s": 6, "max_failed_trials": 1}, spent) is None
    assert (
        over_budget({"gpu_hours": 2, "cpu_hours": 3}, spent)
        == "search.cpu_hours: limit reached (3 of 3 h)"
    )


# --- in a sweep


class Slow(tune.Callback):  # type: ignore[misc]
    """Counts reports, and delays each."""

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
    run = {**tree(cpu_hours=1e-9, num_samples=3), "epochs": 12}
    build_tuner(
        run, name="e", storage=tmp_path, callbacks=[Slow(reports)], on_budget=said.append
    ).fit()
    assert len(said) == 1 and said[0].startswith("search.cpu_hours: ") and len(reports) <= 1
    records = read_records(tmp_path / "e")
    assert [(r.status, r.reason) for r in records] == [("interrupted", said[0])]
    assert len(records[0].metrics) <= 1
    before = (tmp_path / "e" / "experiment.yaml").read_text()
    with pytest.raises(
        ConfigError, match=r"search.cpu_hours: limit reached .*; to resume, give a new budget"
    ):
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
    assert [(r.number, r.status, len(r.metrics)) for r in records] == [
        (n, "done", 12) for n in range(3)
    ]
    total = read_experiment(tmp_path / "e")["space"]["search"]["cpu_hours"]
    assert 10 < total < 10.01  # from then on
    assert json.loads((tmp_path / "e" / "spent.json").read_text())["seconds"] > 0


FILE = """
student: {name: mlp, hidden: [8]}
epochs: 5000
objective: ce
optim: {lr: {low: 0.01, high: 0.5, log: true}}
search: {num_samples: 6, stopping: none, max_concurrent: 2}
"""


@pytest.mark.ray
@pytest.mark.parametrize(
    "option, most, name, more",
    [
        ("--time-budget", "5", "time_budget_s", "--time-budget SECONDS"),
        ("--cpu-hours", "0.0005", "cpu_hours", "--cpu-hours HOURS"),
        ("--max-failures", "2", "max_failed_trials", "--max-failures N"),
    ],
)
def test_a_budget_of_the_command_line_ends_a_sweep_and_is_over_by_one_report_of_each_running_trial(
    ray_cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    option: str, most: str, name: str, more: str,
) -> None:  # fmt: skip
    told: list[str] = []
    end, on_trial_result = Progress.end, Progress.on_trial_result

    def noted(self: Progress, budget: str) -> None:
        told.append("the end")
        end(self, budget)

    def heard(
        self: Progress, iteration: int, trials: list[Any], trial: Any, result: Any, **info: Any
    ) -> None:
        told.append(trial.config["trial"]["name"])
        on_trial_result(self, iteration, trials, trial, result, **info)

    monkeypatch.setattr(Progress, "end", noted)
    monkeypatch.setattr(Progress, "on_trial_result", heard)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "e.yaml").write_text(FILE)
    diverge = (
        ["optim.lr={choices: [1e20, 2e20]}", "search.num_samples=4"]
        if name == "max_failed_trials"
        else []
    )
    assert main(["tune", "e.yaml", "--name", "e", "--storage", ".", option, most, *diverge]) == (
        1 if diverge else 0
    )
    out, err = capsys.readouterr()
    said = rf"search\.{name}: limit reached \([0-9.]+ of {most} (s|h|failed trials)\)"
    assert re.search(rf"^ending: {said}$", err, re.M), err
    assert re.search(rf"^ended early: {said}; resume with:\n  tfkd resume e {more}$", out, re.M), (
        out
    )
    after = told[told.index("the end") :]
    assert told.count("the end") == 1 and all(after.count(trial) <= 1 for trial in after)
    records = read_records(tmp_path / "e")
    assert len(records) <= (3 if diverge else 2)
    held = [[m["seconds"] for m in r.metrics] for r in records]
    if name == "time_budget_s":
        assert all(sum(seconds[:-1]) <= float(most) for seconds in held)
        assert all(r.status == "interrupted" and r.metrics for r in records)
    elif name == "cpu_hours":
        assert sum(sum(seconds[:-1]) for seconds in held) <= 1.8
    else:
        assert 2 <= sum(r.status == "failed" for r in records) <= 3
        changes = ["--retry-failed", "--max-failures", "20"]  # which fail again, in the same way
        assert main(["resume", "e", *changes]) == 1
        again = read_records(tmp_path / "e")
        assert [(r.number, r.status) for r in again] == [(n, "failed") for n in range(4)]
        study = optuna.load_study(
            study_name="tfkd/ce", storage=open_journal(tmp_path / "e" / "study.journal")
        )
        attempts = [
            t.user_attrs["number"] for t in study.trials if t.user_attrs.get("attempt") == 2
        ]
        assert attempts == [r.number for r in records if r.status == "failed"]


def test_gpu_hours_where_trials_use_no_gpu_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "e.yaml").write_text(FILE)
    assert (
        main(["tune", str(tmp_path / "e.yaml"), "--storage", str(tmp_path), "--gpu-hours", "1"])
        == 2
    )
    assert (
        "gpu_hours: trials here use no GPU, so the sweep would never end" in capsys.readouterr().err
    )
    assert [p.name for p in tmp_path.iterdir()] == ["e.yaml"]


@pytest.mark.ray
def test_failed_trials_end_a_sweep_and_run_again_when_they_are_asked_to(
    ray_cluster: str, tmp_path: Path
) -> None:
    said: list[str] = []
    run = tree(num_samples=5, max_failed_trials=2, warm_start=False, sampler="random", seed=2)
    run["optim"] = {"lr": {"choices": [1e20, 0.1]}}
    build_tuner(run, name="e", storage=tmp_path, on_budget=said.append).fit()
    records = read_records(tmp_path / "e")
    assert said == ["search.max_failed_trials: limit reached (2 of 2 failed trials)"]
    failed = [r.number for r in records if r.status == "failed"]
    assert len(failed) == 2 and len(records) < 5
    with pytest.raises(
        ConfigError, match=r"search.max_failed_trials: limit reached \(2 of 2 failed trials\)"
    ):
        resume_tuner(tmp_path / "e")
    folder = next(r.folder for r in records if r.number == failed[0])
    (folder / "error.txt").write_text("of the first attempt")
    resume_tuner(tmp_path / "e", retry_failed=True, max_failed_trials=9).fit()
    after = read_records(tmp_path / "e")
    assert [r.number for r in after] == list(range(5))  # no orphan, no duplicate number
    assert all(r.status == ("failed" if r.config["optim"]["lr"] > 1 else "done") for r in after)
    assert "of the first attempt" not in (folder / "error.txt").read_text()  # it failed again
    storage = open_journal(tmp_path / "e" / "study.journal")
    study = optuna.load_study(study_name="tfkd/ce", storage=storage)
    attempts = [
        (t.user_attrs["number"], t.user_attrs["attempt"])
        for t in study.trials
        if "attempt" in t.user_attrs
    ]
    assert attempts == [(n, 2) for n in failed]


@pytest.mark.ray
def test_a_sweep_goes_on_in_a_wider_space(ray_cluster: str, tmp_path: Path) -> None:
    build_tuner(tree(), name="e", storage=tmp_path).fit()
    before = [(r.name, r.metrics) for r in read_records(tmp_path / "e")]
    wider = {
        **tree(num_samples=6),
        "optim": {
            "lr": {"low": 0.001, "high": 0.5, "log": True},
            "nesterov": {"choices": [False, True]},
        },
    }
    with pytest.raises(ConfigError) as error:
        resume_tuner(tmp_path / "e", space={**wider, "epochs": 4})
    assert "an experiment is resumed in its own space, or in a wider or narrower one" in str(
        error.value
    )
    assert "epochs: was 3, and is 4 now" in str(error.value)
    assert len(resume_tuner(tmp_path / "e", space=wider).fit()) == 2
    after = read_records(tmp_path / "e")
    assert [(r.name, r.metrics) for r in after][:4] == before
    assert "optim.nesterov" in after[5].parameters
    assert (
        len(resume_tuner(tmp_path / "e", add_trials=1).fit()) == 1
    )  # from then on, it is the experiment's
    assert [r.number for r in read_records(tmp_path / "e")] == list(range(7))


@pytest.mark.ray
def test_a_sweep_begins_with_what_an_earlier_one_has_found(
    ray_cluster: str, tmp_path: Path
) -> None:
    build_tuner(tree(), name="old", storage=tmp_path).fit()
    with pytest.raises(ConfigError, match=r"none lies within this space: epochs: 3 there, 2 here"):
        build_tuner({**tree(), "epochs": 2}, name="e", storage=tmp_path, priors=[tmp_path / "old"])
    assert not (tmp_path / "e").exists()
    build_tuner(tree(num_samples=2), name="e", storage=tmp_path, priors=[tmp_path / "old"]).fit()
    assert [r.number for r in read_records(tmp_path / "e")] == [0, 1]
    study = optuna.load_study(
        study_name="tfkd/ce", storage=open_journal(tmp_path / "e" / "study.journal")
    )
    assert [t.user_attrs.get("prior") for t in study.trials] == [
        f"old/t000{n}-ce" for n in range(4)
    ] + [None] * 2
    assert len(resume_tuner(tmp_path / "e", add_trials=1, priors=[tmp_path / "old"]).fit()) == 1
    assert len(study.trials) == 7


@pytest.mark.ray
def test_rays_asha_is_a_stopping_rule_by_name_and_several_metrics_make_a_front(
    ray_cluster: str, tmp_path: Path
) -> None:
    run = {
        **tree(num_samples=6, stopping={"name": "asha", "min_epochs": 1}, max_concurrent=2),
        "epochs": 6,
    }
    build_tuner(run, name="a", storage=tmp_path).fit()
    found = {(r.status, len(r.metrics)) for r in read_records(tmp_path / "a")}
    assert ("done", 6) in found and any(status == "stopped" and n in (1, 3) for status, n in found)
    build_tuner(tree(metric=["val_accuracy", "val_ece"]), name="b", storage=tmp_path).fit()
    study = optuna.load_study(
        study_name="tfkd/ce", storage=open_journal(tmp_path / "b" / "study.journal")
    )
    assert all(len(t.values) == 2 for t in study.trials) and study.best_trials


@pytest.mark.ray
def test_trials_whose_study_was_lost_are_not_numbered_anew(
    ray_cluster: str, tmp_path: Path
) -> None:
    build_tuner(tree(num_samples=2), name="e", storage=tmp_path).fit()
    (tmp_path / "e" / "study.journal").unlink()
    with pytest.raises(
        ConfigError, match=r"study.journal does not hold t0000-ce, t0001-ce, whose files are there"
    ):
        resume_tuner(tmp_path / "e", add_trials=1)
    assert all(len(read_metrics(r.folder)) == 3 for r in read_records(tmp_path / "e"))
    assert space().search.num_samples == 16


# --- no number of trials: until a budget is spent


def endless(**search: Any) -> dict[str, Any]:
    return tree(**{"num_samples": None, "time_budget_s": 60, **search})


@pytest.mark.parametrize("search", [{}, {"max_failed_trials": 3}])
def test_a_sweep_without_a_number_of_trials_needs_a_budget_that_is_spent_in_the_end(
    search: dict[str, Any],
) -> None:
    with pytest.raises(
        ConfigError, match=r"search\.num_samples: null means until a budget is spent"
    ):
        build_space(endless(time_budget_s=None, **search))
    with pytest.raises(ConfigError, match="each is one trial, got null; leave it out"):
        build_space({**endless(sampler="grid"), "optim": {"lr": {"choices": [0.1, 0.2]}}})


@pytest.mark.slow
def test_a_search_without_a_number_of_trials_proposes_as_long_as_it_is_asked(
    tmp_path: Path,
) -> None:
    s = space(num_samples=None, time_budget_s=60, sampler="random", warm_start=False)
    searcher = OptunaSearcher(s, tmp_path / "journal")
    assert len(run_sweep(searcher, most=40)) == 40 and searcher.remaining() > 10**6
    assert build_space(s.tree).search.num_samples is None  # experiment.yaml reads back
    again = OptunaSearcher(s, tmp_path / "journal")
    assert again.suggest("next")["trial"]["number"] == 40  # type: ignore[index, call-overload]


def test_a_plan_without_a_number_of_trials_says_how_many_the_budget_is_enough_for() -> None:
    found = plan(build_space(endless(cpu_hours=1)))
    assert [(p.trials, p.epochs) for p in found.parts] == [(100, 300)]
    text = "\n".join(lines(found))
    assert "trials until a budget is spent: 60 time_budget_s, 1 cpu_hours" in text
    timed = dataclasses.replace(
        found, teacher_s=0.0, parts=(dataclasses.replace(found.parts[0], epoch_s=0.5),)
    )
    text = "\n".join(lines(timed, slots=2))
    assert "60 time_budget_s: about 80 trials" in text and "1 cpu_hours: about 2400 trials" in text


def test_readers_of_a_sweep_without_a_number_of_trials_count_to_no_end(tmp_path: Path) -> None:
    e = tmp_path / "endless"
    make_sweep(e, 4, search={"time_budget_s": 60})
    (e / "driver.txt").unlink()
    about = read_experiment(e)
    about["space"]["search"]["num_samples"] = None
    (e / "experiment.yaml").write_text(dump_yaml(about))
    found = status(e)
    assert found["state"] == "interrupted" and found["left_s"] is None
    assert (found["trials"]["planned"], found["epochs"]["planned"]) == (None, None)
    assert status_lines(found)[0].startswith("endless: interrupted, 4 trials, ")
    assert ls_lines(ls(tmp_path))[1].split()[4] == "4"
    (e / "spent.json").write_text('{"seconds": 60.1, "trial_seconds": 50.0}')
    assert status(e)["state"] == "finished"
    report(e, tmp_path / "e.html")
    page = (tmp_path / "e.html").read_text()
    assert "trials until a budget is spent" in page and "begun, none stopped" in page
    view = Progress(e, Console(file=io.StringIO(), width=80))
    view.setup()
    assert view.lines(80, 24)[0].startswith("endless: 4 trials, 0 running, ")


def test_trials_are_not_added_where_their_number_is_open(tmp_path: Path) -> None:
    write_experiment(tmp_path, build_space(endless()).tree, ["tfkd"])
    with pytest.raises(ConfigError, match=r"add_trials: search\.num_samples is null"):
        resume_tuner(tmp_path, add_trials=3)


@pytest.mark.ray
def test_a_sweep_without_a_number_of_trials_ends_with_its_budget_and_goes_on_with_another(
    ray_cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "e.yaml").write_text(FILE.replace("5000", "3"))
    words = ["search.num_samples=null", "--cpu-hours", "0.0004"]
    assert main(["tune", "e.yaml", "--name", "e", "--storage", ".", *words]) == 0
    out, _ = capsys.readouterr()
    said = r"^ended: search\.cpu_hours: limit reached \([0-9.]+ of 0\.0004 h\); resume with:"
    assert re.search(said, out, re.M) and "next:" in out and "--add-trials" not in out, out
    begun = len(read_records(tmp_path / "e"))
    assert begun > 1 and status(tmp_path / "e")["state"] == "finished"
    assert main(["resume", "e", "--cpu-hours", "0.0004"]) == 0
    assert len(read_records(tmp_path / "e")) > begun
