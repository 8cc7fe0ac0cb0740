"""Sweeps on a real Ray: their results, their files, and the costs of a failure or a kill."""

import dataclasses
import datetime
import errno
import os
import shlex
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import optuna
import pytest
import ray
import torch
from pyarrow.fs import LocalFileSystem
from ray import tune
from ray.tune.schedulers import ASHAScheduler

from tfkd_ray.learn.config import TeacherRun, TrainConfig
from tfkd_ray.learn.loop import train
from tfkd_ray.learn.objectives import CrossEntropy
from tfkd_ray.learn.teachers import train_teacher
from tfkd_ray.run import connect as cluster
from tfkd_ray.run import tune as sweep
from tfkd_ray.run.callbacks import Lock, Losses, NoNodeLeft, Recorder
from tfkd_ray.run.connect import check_ray, check_room
from tfkd_ray.run.epochs import is_of_broken_gpu
from tfkd_ray.run.journal import open_journal
from tfkd_ray.run.tune import TeacherFailed, _overridden, build_tuner, resume_tuner
from tfkd_ray.settings.errors import ConfigError
from tfkd_ray.settings.schema import validated
from tfkd_ray.show.listener import Announcer
from tfkd_ray.space.space import build_space
from tfkd_ray.store.experiment import read_experiment, read_record, read_records
from tfkd_ray.store.storage import Directory, experiment_of

pytestmark = pytest.mark.ray

TREE: dict[str, Any] = {
    "student": {"name": "mlp", "hidden": [8]},
    "epochs": 3,
    "checkpoint_every_s": 0,
    "objective": "ce",
    "optim": {"lr": {"low": 0.01, "high": 0.5, "log": True}},
    "search": {"num_samples": 3, "stopping": "none"},
}


class Watch(tune.Callback):  # type: ignore[misc]
    """Records times, and kills a trial's process when it has reported an epoch."""

    def __init__(self, kill: tuple[int, int] | None = None) -> None:
        self.kill, self.starts, self.ends, self.lost = kill, list[float](), list[float](), 0
        self.killed_at = 0.0

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.starts.append(time.monotonic())

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        if (trial.config["trial"]["number"], result.get("epoch")) == self.kill:
            self.kill, self.killed_at = None, time.monotonic()
            os.kill(result["pid"], signal.SIGKILL)

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.lost += 1

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.ends.append(time.monotonic())


@pytest.fixture(autouse=True)
def all_cpus_are_free_afterwards(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "ray_cluster" in request.fixturenames:
        until = time.monotonic() + 10
        while ray.available_resources().get("CPU") != 2 and time.monotonic() < until:
            time.sleep(0.1)
        assert ray.available_resources()["CPU"] == 2


def times_aside(metrics: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{k: v for k, v in m.items() if k not in ("seconds", "images_per_s")} for m in metrics]


def alone(config: dict[str, Any]) -> list[dict[str, float]]:
    return times_aside([e.metrics for e in train(TrainConfig.model_validate(config))])


def test_a_sweep_returns_rays_result_grid_and_writes_plain_files(
    ray_cluster: str, tmp_path: Path
) -> None:
    mine = Watch()
    grid = build_tuner(
        {**TREE, "objective": ["tfkd_self", "ce"], "search": {"num_samples": 6, "stopping": "none"}},
        name="e", storage=tmp_path, callbacks=[mine],
    ).fit()  # fmt: skip
    assert isinstance(grid, tune.ResultGrid) and len(grid) == 6 and grid.num_errors == 0
    assert len(mine.ends) == 6  # the user's callback was called, too
    best = grid.get_best_result()
    assert best.metrics is not None and best.metrics["epoch"] == 3
    assert best.config is not None and best.config["student"] == {
        "name": "mlp",
        "hidden": [8],
        "dropout": 0.0,
    }
    assert best.metrics_dataframe is not None and list(best.metrics_dataframe["epoch"]) == [1, 2, 3]
    experiment = tmp_path / "e"
    assert {p.name for p in experiment.iterdir()} == {
        "experiment.yaml", "study.journal", "spent.json", "ended.jsonl", "trials", "tb", "driver.lock",
        "driver.txt",
    }  # fmt: skip
    records = read_records(experiment)
    assert [r.name for r in records] == [
        "t0000-tfkd_self", "t0001-ce", "t0002-lsr", "t0003-tfkd_self", "t0004-ce", "t0005-lsr",
    ]  # fmt: skip
    for record in records:
        assert record.status == "done" and len(record.metrics) == 3
        files = {p.name for p in record.folder.iterdir()}
        assert files == {
            "trial.json",
            "metrics.jsonl",
            "result.json",
            "student.safetensors",
        }  # no run state any more
        assert list((experiment / "tb" / record.name).glob("events.*"))
        if record.objective != "tfkd_self":  # a trial is `train(config)`, bit by bit
            assert times_aside(record.metrics) == alone(record.config)
    assert len(list((tmp_path / "teachers").iterdir())) == 1
    about = read_experiment(experiment)  # the file contains the space that was run
    assert (
        build_space(about["space"]).tree == about["space"] and len(about["space"]["objective"]) == 3
    )


def test_one_process_trains_one_trial_after_the_other(ray_cluster: str, tmp_path: Path) -> None:
    """Includes stopped, finished and failed trials; torch is imported once."""
    tree = {**TREE, "epochs": 9, "optim": {"lr": {"choices": [0.1, 0.0005, 1e20]}}}
    tree["search"] = {"num_samples": 7, "sampler": "random", "max_concurrent": 1, "seed": 6}
    grid = build_tuner(tree, name="e", storage=tmp_path).fit()
    assert {r.status for r in read_records(tmp_path / "e")} == {"done", "stopped", "failed"}
    assert len(grid) == 7 and len({result.metrics["pid"] for result in grid if result.metrics}) == 1


def test_teachers_among_which_a_sweep_chooses_are_trained_before_it_each_once(
    ray_cluster: str, tmp_path: Path
) -> None:
    def learned(k: int) -> dict[str, Any]:
        return {"name": "mlp", "hidden": [k]}

    tree: dict[str, Any] = {
        **TREE,
        "epochs": 1,
        "objective": {"name": "kd"},
        "search": {"num_samples": 6, "stopping": "none"},
    }
    tree |= {"teacher": {"model": {"choices": [learned(4), learned(5), learned(6)]}, "epochs": 1}}
    there = next(
        run
        for run in build_space(tree).teacher_runs()
        if run.student.model_dump()["hidden"] == (5,)
    )
    train_teacher(there, tmp_path)
    told: list[tuple[int, bool]] = []
    watch = Watch()

    def on_teacher(run: TeacherRun, about: dict[str, Any] | None) -> None:
        assert not watch.starts  # before the first trial
        told.append((run.student.model_dump()["hidden"][0], about is not None))

    build_tuner(tree, name="e", storage=tmp_path, callbacks=[watch], on_teacher=on_teacher).fit()
    assert sorted(told) == [(4, False), (4, True), (6, False), (6, True)]  # the other was there
    records = read_records(tmp_path / "e")
    assert [r.status for r in records] == ["done"] * 6
    assert len({tuple(r.config["teacher"]["model"]["hidden"]) for r in records}) == 3
    written = {p: p.stat().st_mtime_ns for p in (tmp_path / "teachers").glob("*/teacher.json")}
    assert len(written) == 3
    watch.starts.clear()
    resume_tuner(tmp_path / "e", add_trials=1, on_teacher=on_teacher).fit()
    assert len(told) == 4 and {p: p.stat().st_mtime_ns for p in written} == written


def test_after_a_failed_or_a_stopped_trial_the_next_starts_at_once(
    ray_cluster: str, tmp_path: Path
) -> None:
    watch = Watch()
    tree = {**TREE, "optim": {"lr": {"choices": [0.1, 0.0005, 1e20]}}}
    tree["search"] = {"num_samples": 6, "sampler": "random", "max_concurrent": 1, "seed": 6}
    grid = build_tuner(tree, name="e", storage=tmp_path, callbacks=[watch]).fit()
    assert len(grid) == 6 and grid.num_errors == 0
    records = read_records(tmp_path / "e")
    for record in records:
        bad = record.config["optim"]["lr"] > 1
        assert (record.status == "failed") == bad
        assert (record.folder / "error.txt").exists() == bad
        assert not bad or "Diverged: train_loss is" in str(record.reason)
    assert [r.status for r in records] == ["done", "failed", "stopped", "done", "stopped", "failed"]
    assert max(start - end for end, start in zip(watch.ends, watch.starts[1:], strict=False)) < 2


def test_a_killed_trial_goes_on_from_its_checkpoint_bit_by_bit(
    ray_cluster: str, tmp_path: Path
) -> None:
    watch = Watch(kill=(1, 2))
    tree = {
        **TREE,
        "epochs": 5,
        "search": {"num_samples": 3, "stopping": "none", "max_concurrent": 1},
    }
    grid = build_tuner(tree, name="e", storage=tmp_path, callbacks=[watch]).fit()
    assert watch.lost == 1 and watch.kill is None and grid.num_errors == 0
    assert min(t - watch.killed_at for t in watch.starts if t > watch.killed_at) < 30
    records = read_records(tmp_path / "e")
    assert [r.status for r in records] == ["done"] * 3
    for record in records:
        assert times_aside(record.metrics) == alone(record.config)


def test_a_trial_that_is_lost_too_often_fails_alone(ray_cluster: str, tmp_path: Path) -> None:
    tree = {
        **TREE,
        "search": {"num_samples": 2, "stopping": "none", "max_concurrent": 1, "max_failures": 0},
    }
    grid = build_tuner(tree, name="e", storage=tmp_path, callbacks=[Watch(kill=(0, 1))]).fit()
    assert grid.num_errors == 1
    assert [r.status for r in read_records(tmp_path / "e")] == ["failed", "done"]


def test_rays_own_objects_pass_through(ray_cluster: str, tmp_path: Path) -> None:
    mine = Watch()
    tuner = build_tuner(
        TREE,
        run_config=tune.RunConfig(name="mine", storage_path=str(tmp_path), callbacks=[mine]),
        tune_config=tune.TuneConfig(metric="val_nll", mode="min", max_concurrent_trials=1),
    )
    grid = tuner.fit()
    assert (tmp_path / "mine" / "experiment.yaml").exists() and len(mine.ends) == 3
    best = grid.get_best_result().metrics
    assert best is not None and best["val_nll"] == min(
        r.metrics["val_nll"] for r in grid if r.metrics
    )
    assert (
        read_experiment(tmp_path / "mine")["space"]["search"]["metric"] == "val_nll"
    )  # it was also searched for
    storage = open_journal(tmp_path / "mine" / "study.journal")
    (study,) = optuna.study.get_all_study_summaries(storage=storage)
    assert study.direction == optuna.study.StudyDirection.MINIMIZE
    asha = ASHAScheduler(metric="val_accuracy", mode="max")
    for wrong, message in [
        (
            {"tune_config": tune.TuneConfig(search_alg=object())},
            "tune_config.search_alg: build_tuner brings its own",
        ),
        (
            {"tune_config": tune.TuneConfig(num_samples=9)},
            "tune_config.num_samples: the space says how many",
        ),
        (
            {"run_config": tune.RunConfig(checkpoint_config=tune.CheckpointConfig(num_to_keep=1))},
            "run_config.checkpoint",
        ),
        (
            {"tune_config": tune.TuneConfig(metric="loss")},
            "tune_config.metric: no such name 'loss'; known: val_accuracy",
        ),
        (
            {"tune_config": tune.TuneConfig(metric="val_nll", mode="max")},
            "tune_config.mode: val_nll is better the lower",
        ),
        (
            {"tune_config": tune.TuneConfig(mode="min")},
            "tune_config.mode: val_accuracy is better the higher it is",
        ),
        (
            {"tune_config": tune.TuneConfig(metric="val_nll", scheduler=asha)},
            "tune_config.metric: the scheduler has a",
        ),
        (
            {"tune_config": tune.TuneConfig(max_concurrent_trials=-1)},
            "max_concurrent_trials: 0 (no limit) or more, got",
        ),
        (
            {"tune_config": tune.TuneConfig(time_budget_s=0)},
            "search.time_budget_s: should be greater than 0",
        ),
        (
            {"tune_config": tune.TuneConfig(trial_name_creator=str)},
            "tune_config.trial_name_creator: tfkd finds trials by the names",
        ),
        (
            {"tune_config": tune.TuneConfig(trial_dirname_creator=str)},
            "tune_config.trial_dirname_creator: tfkd finds trials",
        ),
        (
            {"tune_config": tune.TuneConfig(chdir_to_trial_dir=False)},
            "tune_config.chdir_to_trial_dir: Ray no longer supports",
        ),
        (
            {"run_config": tune.RunConfig(failure_config=tune.FailureConfig(fail_fast=True))},
            "run_config.failure_config.fail_fast: a failed trial does not raise here; set search.max_failed_trials",
        ),
        (
            {"run_config": tune.RunConfig(storage_filesystem=LocalFileSystem())},
            "run_config.storage_filesystem: an exp",
        ),
        (
            {"run_config": tune.RunConfig(name="y")},
            "name: 'x', and run_config.name is 'y'; give one of them",
        ),
        (
            {"run_config": tune.RunConfig(storage_path="/z")},
            "and run_config.storage_path is /z; give one of them",
        ),
        (
            {"storage": "ftp://host/x"},
            "storage: a directory, s3://BUCKET/PREFIX or gs://BUCKET/PREFIX, got 'ftp://host/x'",
        ),
    ]:
        with pytest.raises(ConfigError) as error:
            build_tuner(TREE, **{"name": "x", "storage": tmp_path, **wrong})
        assert message in str(error.value)


def test_every_setting_of_rays_configs_is_obeyed_or_refused() -> None:
    obeyed = {
        "metric",
        "mode",
        "scheduler",
        "max_concurrent_trials",
        "time_budget_s",
        "reuse_actors",
    }
    refused = {
        "search_alg",
        "num_samples",
        "trial_name_creator",
        "trial_dirname_creator",
        "chdir_to_trial_dir",
    }
    assert {f.name for f in dataclasses.fields(tune.TuneConfig)} == obeyed | refused
    obeyed = {
        "name",
        "storage_path",
        "failure_config",
        "sync_config",
        "verbose",
        "stop",
        "callbacks",
    }
    refused = {"storage_filesystem", "checkpoint_config", "local_dir"}  # the last by Ray itself
    assert {f.name for f in dataclasses.fields(tune.RunConfig)} == obeyed | refused | {
        "progress_reporter",
        "log_to_file",
    }
    space = build_space(TREE)
    for told, found in [
        (tune.TuneConfig(metric="val_ece"), ("val_ece", None)),
        (tune.TuneConfig(metric="val_nll", mode="min"), ("val_nll", None)),
        (tune.TuneConfig(time_budget_s=90), ("val_accuracy", 90)),
        (tune.TuneConfig(time_budget_s=datetime.timedelta(minutes=2)), ("val_accuracy", 120)),
    ]:
        search = _overridden(space, told)[0].search
        assert (search.metric, search.time_budget_s) == found


def test_trials_that_the_users_own_stop_ends_are_of_full_length(
    ray_cluster: str, tmp_path: Path
) -> None:
    """Ray also handles the rest of its `RunConfig`."""

    class Reporter(tune.CLIReporter):  # type: ignore[misc]
        told = 0

        def report(self, trials: list[Any], done: bool, *sys_info: Any) -> None:
            self.told += 1

    reporter = Reporter()
    run = tune.RunConfig(stop={"epoch": 2}, progress_reporter=reporter)
    asha = ASHAScheduler(
        metric="val_accuracy", mode="max", time_attr="epoch", max_t=3, grace_period=3
    )
    for name, more in (("study", {}), ("asha", {"tune_config": tune.TuneConfig(scheduler=asha)})):
        build_tuner(TREE, name=name, storage=tmp_path, run_config=run, **more).fit()
        records = read_records(tmp_path / name)
        assert [(r.status, len(r.metrics)) for r in records] == [("done", 2)] * 3
        storage = open_journal(tmp_path / name / "study.journal")
        (study,) = optuna.study.get_all_study_names(storage)
        assert {
            t.state.name for t in optuna.load_study(study_name=study, storage=storage).trials
        } == {"COMPLETE"}
    assert reporter.told


@pytest.mark.long
def test_two_drivers_that_begin_in_the_same_second_stage_their_files_apart(
    ray_cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray.tune.utils.date_str", lambda: "the-same-second")
    tree = {**TREE, "epochs": 1, "search": {"num_samples": 2, "stopping": "none"}}
    for place in ("a", "b"):
        grid = build_tuner(tree, name="e", storage=tmp_path / place).fit()
        folders = {Path(result.path) for result in grid}
        assert folders == {record.folder for record in read_records(tmp_path / place / "e")}
        assert all((folder / "result.json").read_text() for folder in folders)
        folder = tmp_path / place / "e/trials"
        (state,) = folder.glob("experiment_state-*.json")
        assert state.read_text() == '{"trial_data": []}'  # it grows, and nothing reads it
        assert grid.experiment_path == str(folder)


def test_rays_asha_is_selectable_as_its_docs_show(ray_cluster: str, tmp_path: Path) -> None:
    asha = ASHAScheduler(
        metric="val_accuracy", mode="max", time_attr="epoch", max_t=3, grace_period=1
    )
    grid = build_tuner(
        TREE, name="e", storage=tmp_path, tune_config=tune.TuneConfig(scheduler=asha)
    ).fit()
    assert len(grid) == 3 and {r.status for r in read_records(tmp_path / "e")} <= {
        "done",
        "stopped",
    }


def test_a_teacher_that_cannot_be_trained_is_said_and_uses_up_no_name(
    ray_cluster: str, tmp_path: Path
) -> None:
    tree = {**TREE, "objective": "tfkd_self", "teacher": {"optim": {"lr": 1e20}}}
    with pytest.raises(TeacherFailed, match=r"teacher mlp-\w+: Diverged: train_loss is"):
        build_tuner(tree, name="e", storage=tmp_path)
    assert not (tmp_path / "e").exists()


def test_trials_are_added_to_a_finished_sweep(ray_cluster: str, tmp_path: Path) -> None:
    build_tuner(TREE, name="e", storage=tmp_path).fit()
    before = [(r.name, r.metrics) for r in read_records(tmp_path / "e")]
    assert len(resume_tuner(tmp_path / "e", add_trials=2).fit()) == 2
    after = [(r.name, r.metrics) for r in read_records(tmp_path / "e")]
    assert after[:3] == before and [name for name, _ in after[3:]] == ["t0003-ce", "t0004-ce"]
    (tmp_path / "e").rename(tmp_path / "f")  # an experiment may be moved
    assert len(resume_tuner(tmp_path / "f", add_trials=1).fit()) == 1
    assert [r.name for r in read_records(tmp_path / "f")][5:] == ["t0005-ce"]


# --- refused before anything is written


def test_an_experiment_is_not_written_over(ray_cluster: str, tmp_path: Path) -> None:
    (tmp_path / "e").mkdir()
    with pytest.raises(
        ConfigError, match=r"experiment 'e' exists already; choose another name, or resume it"
    ):
        build_tuner(TREE, name="e", storage=tmp_path)


def test_a_command_that_is_shown_can_be_typed_whatever_the_name(
    ray_cluster: str, tmp_path: Path
) -> None:
    (tmp_path / "a 'b' $c").mkdir()
    with pytest.raises(ConfigError) as refused:
        build_tuner(TREE, name="a 'b' $c", storage=tmp_path)
    (problem,) = refused.value.problems
    assert shlex.split(problem.partition("resume it: ")[2]) == [
        "tfkd",
        "resume",
        str(tmp_path / "a 'b' $c"),
    ]


def test_a_second_driver_is_refused(ray_cluster: str, tmp_path: Path) -> None:
    tuner = build_tuner(TREE, name="e", storage=tmp_path)
    before = (tmp_path / "e" / "experiment.yaml").read_text()
    with pytest.raises(ConfigError, match=rf"is being run by process {os.getpid()} on "):
        resume_tuner(tmp_path / "e", add_trials=4)
    assert (tmp_path / "e" / "experiment.yaml").read_text() == before
    assert len(tuner.fit()) == 3
    resume_tuner(tmp_path / "e").fit()  # released


def test_more_workers_than_cpus_are_refused_at_once(ray_cluster: str, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError,
        match=r"a trial needs 3 x 1 CPU, each on one node, and the cluster has room for 2",
    ):
        build_tuner({**TREE, "workers": 3}, name="e", storage=tmp_path)
    with pytest.raises(
        ConfigError,
        match=r"a trial needs 1 x 1 CPU and 1 GPU, each on one node, and the cluster has room for 0",
    ):
        build_tuner({**TREE, "gpus_per_worker": 1}, name="e", storage=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_place_without_write_permission_is_refused(ray_cluster: str) -> None:
    with pytest.raises(ConfigError, match="/proc cannot be written to"):
        build_tuner(TREE, name="e", storage="/proc/here")


def nodes(monkeypatch: pytest.MonkeyPatch, *resources: dict[str, float]) -> None:
    found = [{"Alive": True, "NodeID": f"{k}", "Resources": r} for k, r in enumerate(resources)]
    monkeypatch.setattr(cluster.ray, "nodes", lambda: found)


TWO = TrainConfig(objective=CrossEntropy(), workers=2)


def test_a_cluster_without_the_driver_resource_is_refused(
    ray_cluster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes(monkeypatch, {"CPU": 2.0})
    with pytest.raises(
        ConfigError, match="need the resource 'tfkd_driver' on the cluster, and it has none"
    ):
        check_room(TWO)
    assert check_room(TWO.model_copy(update={"workers": 1})) == 2


def test_room_is_counted_node_by_node(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes(monkeypatch, *[{"CPU": 3.0, "tfkd_driver": 1.0}] * 3)
    monkeypatch.setattr(cluster, "_state_api_answers", lambda: True)
    assert (
        check_room(TWO.model_copy(update={"cpus_per_worker": 2})) == 1
    )  # one worker a node: three, so one trial of two
    with pytest.raises(
        ConfigError, match=r"needs 1 x 4 CPU, each on one node, and the cluster has room for 0"
    ):
        check_room(TWO.model_copy(update={"workers": 1, "cpus_per_worker": 4}))


def test_a_cluster_whose_state_api_is_silent_is_refused_for_several_workers(
    ray_cluster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def silent(**_: Any) -> None:
        raise ConnectionError("no dashboard")

    assert check_room(TWO) == 1
    monkeypatch.setattr("ray.util.state.list_nodes", silent)
    with pytest.raises(
        ConfigError, match="need Ray's State API, and this cluster's does not answer"
    ):
        check_room(TWO)


def test_a_ray_without_its_default_extra_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check_ray()
    real = cluster.importlib.metadata.version

    def version(name: str) -> str:
        if name == "aiohttp":
            raise cluster.importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(cluster.importlib.metadata, "version", version)
    with pytest.raises(
        ConfigError, match=r"aiohttp missing\).*pip install 'ray\[default,train,tune\]'"
    ):
        check_ray()


def test_what_a_stopped_trial_saves_late_is_removed_with_the_end_of_the_sweep(
    tmp_path: Path,
) -> None:
    trial = SimpleNamespace(
        trial_id="a", status="TERMINATED", last_result={"epoch": 1, "done": True},
        config={"trial": {"directory": str(tmp_path), "number": 0, "name": "t0", "epochs": 9, "parameters": {}},
                "objective": {"name": "ce"}},
    )  # fmt: skip
    recorder = Announcer([Recorder(Losses())])
    for failed, left in ((True, ["before.ckpt", "last.ckpt"]), (False, [])):
        if failed:
            trial.last_result["failed"] = "no reason"
        else:
            del trial.last_result["failed"]
        for name in ("last.ckpt", "before.ckpt"):
            (tmp_path / name).touch()
        recorder.on_trial_complete(0, [], trial)
        assert sorted(p.name for p in tmp_path.glob("*.ckpt")) == left
    (tmp_path / "last.ckpt").touch()  # its process was at it
    recorder.on_experiment_end([])
    assert not list(tmp_path.glob("*.ckpt"))


def test_a_lock_that_cannot_be_taken_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "driver.lock").mkdir()
    with pytest.raises(
        ConfigError, match=r"driver.lock cannot be locked \(Is a directory\).* remove driver.lock"
    ):
        Lock(*experiment_of(tmp_path))
    (tmp_path / "driver.lock").rmdir()
    for error, why in (
        (PermissionError(errno.EACCES, os.strerror(errno.EACCES)), "Permission denied"),
        (OSError(errno.ENOLCK, os.strerror(errno.ENOLCK)), "No locks available"),
        (
            NotImplementedError("FileSystem does not appear to support flock"),
            "does not appear to support flock",
        ),
    ):
        with (
            monkeypatch.context() as patch,
            pytest.raises(ConfigError, match=rf"cannot be locked \(.*{why}"),
        ):
            patch.setattr("filelock.FileLock._acquire", Mock(side_effect=error))
            Lock(*experiment_of(tmp_path))
    lock = Lock(*experiment_of(tmp_path))  # and none was left
    lock.release()


def test_what_is_removed_of_a_trial_that_runs_is_said_and_written_again(tmp_path: Path) -> None:
    folder = tmp_path / "t0"
    trial = SimpleNamespace(
        trial_id="a", status="RUNNING", last_result={},
        config={"trial": {"directory": str(folder), "number": 0, "name": "t0", "epochs": 9, "parameters": {}},
                "objective": {"name": "ce"}},
    )  # fmt: skip
    said: list[str] = []
    recorder = Announcer([Recorder(Losses(), on_note=said.append)])
    recorder.on_trial_start(0, [], trial)

    def tell(epoch: int, **more: Any) -> None:
        recorder.on_trial_result(0, [], trial, {"epoch": epoch, "val_accuracy": 0.5, **more})

    tell(1)
    shutil.rmtree(folder)
    tell(2)
    tell(3)
    assert said == [
        "t0: its folder was removed while it ran; written again, with all epochs reported so far"
    ]
    assert [m["epoch"] for m in read_record(folder).metrics] == [1, 2, 3] and read_record(
        folder
    ).status == "running"
    (folder / "metrics.jsonl").unlink()
    recorder.on_trial_start(0, [], trial)  # its process was lost
    assert said[1:] == [
        "t0: metrics.jsonl was removed while it ran; written again, with all epochs reported so far"
    ]
    assert [m["epoch"] for m in read_record(folder).metrics] == [1, 2, 3]
    shutil.rmtree(folder)
    recorder.on_experiment_end([trial])
    assert read_record(folder).status == "interrupted" and len(read_record(folder).metrics) == 3
    shutil.rmtree(folder)
    tell(4, done=True)
    recorder.on_trial_complete(0, [], trial)
    assert (
        len(read_record(folder).metrics) == 4
        and (folder / "result.json").read_text().count("epoch") == 4
    )


# --- GPUs


@pytest.mark.parametrize("gpus", [1, 0.25, 0])
def test_a_sweep_on_gpus_looks_at_them_and_its_teachers_get_what_a_worker_gets(
    gpus: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[bool] = []
    for name in ("connect", "check_room", "check_shared"):
        monkeypatch.setattr(sweep, name, lambda *given, **more: None)
    monkeypatch.setattr(sweep, "check_gpus", lambda: looked.append(True))
    teacher = {"model": {"name": "mlp"}, "weights": str(tmp_path / "w.pt")}
    tree = {"objective": "kd", "student": "mlp", "teacher": teacher, "cpus_per_worker": 2}
    config = validated(TrainConfig, {**tree, "gpus_per_worker": gpus})
    sweep.prepare(config, Directory(tmp_path), notes=[])
    assert looked == ([True] if gpus else [])
    asked: dict[str, Any] = {}
    task = SimpleNamespace(remote=lambda *given: None)
    there = SimpleNamespace(options=lambda **settings: asked.update(settings) or task)
    monkeypatch.setattr(sweep.ray, "remote", lambda function: there)
    sweep._begun_teacher(config.teacher_runs()[0], Directory(tmp_path))
    assert (asked["num_cpus"], asked["num_gpus"]) == (2, gpus)


# --- a GPU that is broken


BROKEN = {
    "illegal access": torch.AcceleratorError(
        "CUDA error: an illegal memory access was encountered\nCompile with ..."
    ),
    "assert": torch.AcceleratorError("CUDA error: device-side assert triggered"),
    "launch": RuntimeError("CUDA error: unspecified launch failure"),
    "ECC": RuntimeError("CUDA error: uncorrectable ECC error encountered"),
    "NCCL": RuntimeError(
        "NCCL error: remote process exited or there was a network error, ncclRemoteError"
    ),
    "cuBLAS": RuntimeError(
        "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm(...)`"
    ),
    "no GPU": RuntimeError("gpus_per_worker is 1, and torch sees no GPU here"),
    "another architecture": RuntimeError(
        "gpus_per_worker is 1, and Tesla V100 has compute capability 7.0, and torch 2.14.1 has code for sm_80"
    ),
    "no code": torch.AcceleratorError(
        "CUDA error: no kernel image is available for execution on the device"
    ),
    "old driver": RuntimeError(
        "CUDA error: CUDA driver version is insufficient for CUDA runtime version"
    ),
}
SOUND = {
    "memory": torch.OutOfMemoryError("CUDA out of memory"),
    "memory in CUDA": RuntimeError("CUDA error: out of memory"),
    "arguments": torch.AcceleratorError("CUDA error: invalid configuration argument"),
    "own": ValueError("illegal memory access, says the user's own check"),
    "shapes": RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
}


@pytest.mark.parametrize("name", [*BROKEN, *SOUND])
def test_an_error_after_which_a_process_has_no_gpu_is_told_from_the_trials_own(name: str) -> None:
    assert is_of_broken_gpu((BROKEN | SOUND)[name]) is (name in BROKEN)
    behind = RuntimeError("while tidying up")
    behind.__context__ = (BROKEN | SOUND)[name]
    assert is_of_broken_gpu(behind) is (name in BROKEN)


def test_a_gpu_that_breaks_ends_the_process_and_the_sweep_before_it_burns_the_proposals(
    ray_cluster: str, tmp_path: Path
) -> None:
    file = tmp_path / "broken"
    file.write_text("everywhere")
    student = {"name": "own", "path": "tests.broken:network", "args": {"file": str(file)}}
    search = {**TREE["search"], "num_samples": 5, "max_concurrent": 1}
    space = {**TREE, "student": student, "epochs": 1, "search": search}
    with pytest.raises(NoNodeLeft) as ended:
        build_tuner(space, name="e", storage=tmp_path).fit()
    assert "3 trials in a row were lost there: AcceleratorError: CUDA error: an illegal" in str(
        ended.value
    )
    (record,) = read_records(tmp_path / "e")  # the other proposals were not wasted
    assert (
        record.status == "failed"
        and "lost 3 times in epoch 1 (AcceleratorError: CUDA error" in str(record.reason)
    )
    file.unlink()
    resume_tuner(tmp_path / "e", retry_failed=True).fit()
    assert [r.status for r in read_records(tmp_path / "e")] == ["done"] * 5


def test_a_gpu_that_breaks_in_a_later_epoch_costs_one_process_and_no_trial(
    ray_cluster: str, tmp_path: Path
) -> None:
    file = tmp_path / "broken"
    file.write_text("everywhere")

    class Mended(tune.Callback):  # type: ignore[misc]
        def on_trial_recover(
            self, iteration: int, trials: list[Any], trial: Any, **info: Any
        ) -> None:
            file.unlink(missing_ok=True)

    student = {
        "name": "own",
        "path": "tests.broken:network",
        "args": {"file": str(file), "after": 12},
    }
    search = {**TREE["search"], "num_samples": 2, "max_concurrent": 1}
    space = {**TREE, "student": student, "search": search}
    build_tuner(space, name="e", storage=tmp_path, callbacks=[Mended()]).fit()
    records = read_records(tmp_path / "e")
    assert [(r.status, r.lost, len(r.metrics)) for r in records] == [("done", 1, 3), ("done", 0, 3)]
