"""Faults in sweeps: killed drivers and trials, signals, failing trials, full disks, clock jumps.

The faults are real: signal 9, small disks, networks that crash. Random moments come from
TFKD_FAULT_SEED, or from the time (a failing test prints its seed); TFKD_FAULT_MOMENTS sets their
number (20 for a driver, 10 for a trial).
"""

import contextlib
import errno
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import ray
import torch
from conftest import ROOT, Run
from ray import tune
from ray.tune.schedulers import FIFOScheduler
from sweep_under_fire import TITLES, ray_processes
from test_groups import sweep_elsewhere
from test_tune import alone, times_aside
from torch import nn

from tfkd_ray.learn.checkpoint import LAST, WEIGHTS, load_state, load_weights
from tfkd_ray.learn.soft_labels import Bank
from tfkd_ray.run.callbacks import Losses
from tfkd_ray.run.searcher import OptunaSearcher
from tfkd_ray.run.tune import build_tuner, disk_trouble, resume_tuner
from tfkd_ray.settings.errors import ConfigError
from tfkd_ray.settings.yaml import dump_yaml
from tfkd_ray.show.listener import Announcer
from tfkd_ray.store.assignment import SECTION, Assignment
from tfkd_ray.store.experiment import read_metrics, read_records

pytestmark = [pytest.mark.ray, pytest.mark.fault]

TREE: dict[str, Any] = {
    "student": {"name": "mlp", "hidden": [8]},
    "epochs": 12,
    "checkpoint_every_s": 0,
    "objective": "ce",
    "optim": {"lr": {"low": 0.01, "high": 0.5, "log": True}},
    "search": {"num_samples": 3, "stopping": "none", "max_concurrent": 1},
}


def tree(search: dict[str, Any] | None = None, **settings: Any) -> dict[str, Any]:
    return {**TREE, **settings, "search": {**TREE["search"], **(search or {})}}


@pytest.fixture
def moments() -> random.Random:
    """Return the generator of random moments."""
    seed = int(os.environ.get("TFKD_FAULT_SEED", time.time_ns() % 2**32))
    print(f"TFKD_FAULT_SEED={seed}")
    return random.Random(seed)


def wait(until: Callable[[], Any], what: str, timeout_s: float = 120) -> None:
    end = time.monotonic() + timeout_s
    while not until():
        assert time.monotonic() < end, f"{what}: not within {timeout_s} s"
        time.sleep(0.02)


@contextlib.contextmanager
def tuning(space: dict[str, Any], here: Path, *argv: str) -> Iterator[subprocess.Popen[bytes]]:
    """Start `tfkd tune` on a space, called e, in a process; its output goes to the file `said`."""
    (here / "space.yaml").write_text(dump_yaml(space))
    command = [sys.executable, "-m", "tfkd_ray", "tune", "space.yaml", "--name", "e", *argv]
    with (here / "said").open("wb") as said:
        driver = subprocess.Popen(command, cwd=here, stderr=said, stdout=said)
    try:
        yield driver
    finally:
        print((here / "said").read_text())
        driver.kill()
        driver.wait()


def outcome(experiment: Path) -> list[tuple[Any, ...]]:
    """Return the results of a sweep's trials, without their times."""
    return [
        (r.number, r.status, r.parameters, times_aside(r.metrics)) for r in read_records(experiment)
    ]


def ended(experiment: Path) -> dict[str, Any]:
    """Return the metrics of the ended trials, times included."""
    records = read_records(experiment) if experiment.exists() else []
    return {r.name: r.metrics for r in records if r.status in ("done", "stopped")}


def assert_no_orphans(experiment: Path) -> None:
    """Assert one TensorBoard run for each trial, one about all, and no rest of an interrupted write."""
    names = [r.name for r in read_records(experiment)]
    assert sorted(p.name for p in (experiment / "trials").iterdir() if p.is_dir()) == names
    runs = sorted(p.name for p in (experiment / "tb").iterdir() if p.is_dir())
    assert runs == sorted([*names, "about"])
    kept = {
        "trial.json",
        "metrics.jsonl",
        "result.json",
        "student.safetensors",
        "last.ckpt",
        "before.ckpt",
    }
    kept |= {"error.txt", "error.pkl"}  # Tune's, where a process was lost
    assert {p.name for name in names for p in (experiment / "trials" / name).iterdir()} <= kept
    assert not [
        p.name for p in experiment.iterdir() if p.name.startswith((".", "study.journal.lock"))
    ]


# --- the driver


def drive(space: dict[str, Any], storage: Path, address: str) -> None:
    """Run a driver: begin the experiment, or resume it."""
    os.environ["RAY_ADDRESS"], os.environ["RAY_AUTH_MODE"] = address, "token"
    sys.stderr = sys.stdout = (storage / "driver.log").open("a")
    if (storage / "e" / "experiment.yaml").exists():
        resume_tuner(storage / "e").fit()
    else:
        build_tuner(space, name="e", storage=storage).fit()


def written(experiment: Path) -> dict[Path, int]:
    """Return the last write time of each trial's metrics."""
    return {p: p.stat().st_mtime_ns for p in experiment.glob("trials/*/metrics.jsonl")}


def trained(folder: Path) -> list[dict[str, float]]:
    """Return the epochs behind a trial's last whole checkpoint, times included.

    metrics.jsonl keeps the first report of an epoch, so only this shows an epoch trained again.
    """
    state = load_state(folder, str)
    return list(state["history"]) if state else []


@pytest.mark.slow
@pytest.mark.timeout(500)
@pytest.mark.parametrize("place", ["journal", "SQLite"])
@pytest.mark.parametrize("at_once, stopping", [(1, "halving"), (1, "pausing"), (2, "none")])
def test_a_driver_killed_at_20_random_moments_ends_as_if_undisturbed(
    ray_cluster: str,
    tmp_path: Path,
    moments: random.Random,
    place: str,
    at_once: int,
    stopping: str,
) -> None:
    """One trial at a time: bit by bit, with stopping. Several: each grid point's value."""
    lr = (
        {"choices": [0.02, 0.03, 0.05, 0.08, 0.1, 0.2, 0.3, 0.4]}
        if at_once > 1
        else TREE["optim"]["lr"]
    )
    search = {"num_samples": 8, "max_concurrent": at_once, "stopping": stopping}
    search |= {"sampler": "grid" if at_once > 1 else {"name": "tpe", "startup": 3}}

    def space(name: str) -> dict[str, Any]:
        url = {"storage": f"sqlite:///{tmp_path}/{name}.db"} if place == "SQLite" else {}
        return tree({**search, **url}, epochs=243 if at_once == 1 else 162, optim={"lr": lr})

    build_tuner(space("whole"), name="whole", storage=tmp_path).fit()
    context = multiprocessing.get_context("forkserver")  # drivers that have finished their imports
    context.set_forkserver_preload(["tfkd_ray.run.tune"])
    experiment, kills = tmp_path / "e", 0
    before: dict[str, Any] = {}
    saved: dict[Path, list[dict[str, float]]] = {}
    most = int(os.environ.get("TFKD_FAULT_MOMENTS", "20"))
    while True:
        driver = context.Process(target=drive, args=(space("e"), tmp_path, ray_cluster))
        seen = written(experiment)
        driver.start()
        if kills < most:
            if moments.random() < 0.25:  # while it starts
                driver.join(moments.uniform(0, 4))
            else:
                wait(
                    lambda seen=seen, d=driver: written(experiment) != seen or not d.is_alive(),
                    "a trial",
                )  # type: ignore[misc]
                driver.join(moments.uniform(0, 0.4))
        else:
            driver.join(150)
        alive = driver.is_alive()
        driver.kill()
        driver.join()
        now = ended(experiment)
        assert all(
            now[name] == metrics for name, metrics in before.items()
        )  # also the times: nothing ran again
        before = now
        records = read_records(experiment) if experiment.exists() else []
        for record in [r for r in records if r.status not in ("done", "stopped")]:
            states = trained(record.folder)
            assert states or len(record.metrics) < 10, (
                record.name
            )  # the first is saved while others are trained
            kept = saved.get(record.folder, [])
            assert states[: len(kept)] == kept, (
                record.name
            )  # it resumed there, and trained nothing again
            saved[record.folder] = states
        if not alive:
            break
        kills += 1
        print(f"kill {kills}: {sorted(now)} have ended")
    assert driver.exitcode == 0, (tmp_path / "driver.log").read_text()[-3000:]
    assert kills == most, f"only {kills} kills"
    if at_once == 1:
        assert outcome(experiment) == outcome(tmp_path / "whole")
        for record in read_records(experiment):
            if record.status == "done":
                ours, theirs = (
                    load_weights(e / "trials" / record.name / WEIGHTS)
                    for e in (experiment, tmp_path / "whole")
                )
                assert ours.keys() == theirs.keys() and all(ours[k].equal(theirs[k]) for k in ours)
    else:
        values = [
            sorted(
                (r.parameters["optim.lr"], *times_aside(r.metrics)[-1].items())
                for r in read_records(e)
            )
            for e in (experiment, tmp_path / "whole")
        ]
        assert values[0] == values[1] and len(values[0]) == 8
    assert [r.number for r in read_records(experiment)] == list(range(8))
    assert_no_orphans(experiment)
    wait(lambda: ray.available_resources().get("CPU") == 2, "the killed drivers' trials are gone")


def drive_until(moment: str, space: dict[str, Any], storage: Path, address: str) -> None:
    """Run a driver that gets signal 9 at its second pause, or at its first promotion."""
    pause, attempt, pauses = OptunaSearcher.pause, OptunaSearcher._attempt, list[str]()

    def paused(searcher: OptunaSearcher, trial_id: str) -> None:
        pauses.append(trial_id)
        if moment == "between save and pause" and len(pauses) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        pause(searcher, trial_id)

    def promoted(searcher: OptunaSearcher, n: int, rung: int) -> int:
        found = attempt(searcher, n, rung)
        if moment == "between promotion and start":
            os.kill(os.getpid(), signal.SIGKILL)
        return found

    OptunaSearcher.pause, OptunaSearcher._attempt = paused, promoted  # type: ignore[method-assign]
    drive(space, storage, address)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("moment", ["between save and pause", "between promotion and start"])
def test_a_driver_killed_while_a_trial_pauses_or_goes_on_ends_as_if_undisturbed(
    ray_cluster: str, tmp_path: Path, moment: str
) -> None:
    search = {"num_samples": 9, "stopping": "pausing", "sampler": {"name": "tpe", "startup": 3}}
    space = tree(search, epochs=9, checkpoint_every_s=1000)
    build_tuner(space, name="whole", storage=tmp_path).fit()
    context = multiprocessing.get_context("forkserver")
    driver = context.Process(target=drive_until, args=(moment, space, tmp_path, ray_cluster))
    driver.start()
    driver.join(150)
    assert driver.exitcode == -signal.SIGKILL, (tmp_path / "driver.log").read_text()[-3000:]
    experiment = tmp_path / "e"
    before = {r.name: r.metrics for r in read_records(experiment)}
    assert before and outcome(experiment) != outcome(tmp_path / "whole")
    resume_tuner(experiment).fit()
    assert outcome(experiment) == outcome(tmp_path / "whole")
    for record in read_records(experiment):  # also the times: no epoch was trained again
        kept = before.get(record.name, [])
        assert record.metrics[: len(kept)] == kept
    assert_no_orphans(experiment)
    assert not list(experiment.glob("trials/*/*.ckpt"))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_second_driver_is_refused_a_killed_ones_lock_is_stale_and_damaged_checkpoints_are_passed_over(
    ray_cluster: str, tmp_path: Path, epoch_by_epoch: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = tmp_path / "tfkd_results" / "e"
    with tuning(tree({"max_concurrent": 2, "num_samples": 2}, epochs=1500), tmp_path) as driver:
        wait(
            lambda: sum(len(m) > 3 for m in written_metrics(experiment)) == 2,
            "two trials of 3 epochs",
        )
        with pytest.raises(
            ConfigError,
            match=f"is being run by process {driver.pid} on {socket.gethostname()}; wait",
        ):
            resume_tuner(experiment)
        assert driver.poll() is None
    killed = {r.name: r for r in read_records(experiment)}
    assert [r.status for r in killed.values()] == ["running"] * 2
    wait(lambda: ray.available_resources().get("CPU") == 2, "the killed driver's trials are gone")
    for (name, record), damage in zip(killed.items(), ("cut", "flipped"), strict=True):
        content = bytearray((record.folder / LAST).read_bytes())
        content[len(content) // 2] ^= 4
        (record.folder / LAST).write_bytes(
            content[: len(content) // 2] if damage == "cut" else content
        )
        assert (record.folder / "before.ckpt").exists(), name
    states: dict[str, list[dict[str, float]]] = {}
    for name in ("MIN", "MAX"):  # what is left needs no message for each epoch
        monkeypatch.delenv(f"TUNE_RESULT_BUFFER_{name}_TIME_S")
    command = [sys.executable, "-m", "tfkd_ray", "resume", "tfkd_results/e"]
    with subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as driver:
        while driver.poll() is None:
            for name, record in killed.items():
                if len(state := trained(record.folder)) > len(record.metrics):
                    states[name] = state
            time.sleep(0.1)
        assert driver.stderr is not None
        said_then = driver.stderr.read()
    assert driver.returncode == 0, said_then
    for record in read_records(experiment):
        assert record.status == "done" and times_aside(record.metrics) == alone(record.config)
        said = (
            f"{record.name}: {record.folder / LAST}: damaged (its checksum does not match); skipped"
        )
        assert said in said_then.splitlines(), said_then
        kept = (
            len(killed[record.name].metrics) - 3
        )  # it resumed from the previous checkpoint, as the times show
        assert kept > 0 and states[record.name][:kept] == killed[record.name].metrics[:kept]
    assert_no_orphans(experiment)


@pytest.mark.timeout(300)
def test_a_journal_that_is_deleted_while_a_sweep_runs_ends_it_with_a_sentence_and_resume_loses_nothing(
    ray_cluster: str, tmp_path: Path, tfkd: Run, epoch_by_epoch: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    experiment = tmp_path / "tfkd_results" / "e"
    with tuning(tree({"max_concurrent": 2, "num_samples": 4}, epochs=150), tmp_path) as driver:
        wait(
            lambda: ended(experiment) and len(written_metrics(experiment)) > 2,
            "a trial has ended, two run",
        )
        (experiment / "study.journal").unlink()
        assert driver.wait(60) == 1
    said = (tmp_path / "said").read_text()
    assert (
        "study.journal: was deleted while the sweep ran; the state of the search is in study.journal.saved"
        in said
    )
    assert "tfkd resume tfkd_results/e" in said and "Traceback" not in said
    before = ended(experiment)
    for name in ("MIN", "MAX"):  # what is left needs no message for each epoch
        monkeypatch.delenv(f"TUNE_RESULT_BUFFER_{name}_TIME_S")
    run = tfkd("resume", "tfkd_results/e")
    assert run.returncode == 0, run.stderr
    assert (
        "study.journal was lost while the sweep ran: continuing with what the search saved then"
        in run.stderr
    )
    assert all(ended(experiment)[name] == metrics for name, metrics in before.items())
    for record in read_records(experiment):
        assert record.status == "done" and times_aside(record.metrics) == alone(record.config)
    assert len(read_records(experiment)) == 4
    wait(lambda: ray.available_resources().get("CPU") == 2, "no child is left")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_folders_of_trials_that_are_removed_while_a_sweep_runs_are_said_by_tune_and_by_resume(
    ray_cluster: str, tmp_path: Path, tfkd: Run, epoch_by_epoch: None
) -> None:
    experiment = tmp_path / "tfkd_results" / "e"
    with tuning(tree({"max_concurrent": 1, "num_samples": 3}, epochs=200), tmp_path) as driver:
        wait(
            lambda: ended(experiment) and len(written_metrics(experiment)) > 1,
            "a trial has ended, one runs",
        )
        shutil.rmtree(experiment / "trials" / "t0000-ce")  # one that has ended
        shutil.rmtree(experiment / "trials" / "t0001-ce")  # one that runs
        code = driver.wait(100)
    said = " ".join((tmp_path / "said").read_text().split())
    assert "Traceback" not in said and code == 0
    assert "the study has t0000-ce, and its folder is gone" in said
    assert [(r.name, r.status) for r in read_records(experiment)][-1] == ("t0002-ce", "done")
    run = tfkd("resume", "tfkd_results/e")
    assert run.returncode == 0 and "the study has t0000-ce, and its folder is gone" in run.stderr


@pytest.mark.parametrize("failures", [0, 3])
@pytest.mark.parametrize("part", ["searcher", "callback", "scheduler"])
def test_what_the_driver_itself_raises_when_a_trial_ends_is_no_lost_trial(
    ray_cluster: str, tmp_path: Path, part: str, failures: int
) -> None:
    class Trouble(tune.Callback):  # type: ignore[misc]
        def on_trial_result(
            self, iteration: Any, trials: Any, trial: Any, result: Any, **_: Any
        ) -> None:
            if part == "searcher" and result["training_iteration"] == 2:  # the study is told next
                (tmp_path / "e" / "study.journal").unlink()

        def on_trial_complete(self, *args: Any, **_: Any) -> None:
            if part == "callback":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "log")

    class Scheduler(FIFOScheduler):  # type: ignore[misc]
        def on_trial_complete(self, *args: Any) -> None:
            if part == "scheduler":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "log")

    tuner = build_tuner(
        tree({"max_failures": failures}, epochs=2), name="e", storage=tmp_path, callbacks=[Trouble()],
        tune_config=tune.TuneConfig(scheduler=Scheduler()),
    )  # fmt: skip
    with pytest.raises(Exception) as raised:
        tuner.fit()
    where = {"searcher": "study.journal: was deleted"}.get(part, "log: No space left on device")
    assert where in str(disk_trouble(raised.value))
    resume_tuner(tmp_path / "e").fit()
    assert [r.status for r in read_records(tmp_path / "e")] == ["done"] * 3


def written_metrics(experiment: Path) -> list[list[dict[str, float]]]:
    return [read_metrics(p.parent) for p in experiment.glob("trials/*/metrics.jsonl")]


def test_an_experiment_whose_driver_was_killed_while_it_was_made_can_be_made(
    ray_cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any) -> None:
        raise KeyboardInterrupt  # as good as a kill: nothing more is done

    for url in ({}, {"storage": f"sqlite:///{tmp_path}/s.db"}):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr("tfkd_ray.run.tune.write_experiment", killed)
            build_tuner(tree(url), name="e", storage=tmp_path)
        assert (tmp_path / "e").is_dir() and not (tmp_path / "e" / "experiment.yaml").exists()
        build_tuner(tree({**url, "num_samples": 1}, epochs=1), name="e", storage=tmp_path).fit()
        assert [r.status for r in read_records(tmp_path / "e")] == ["done"]
        shutil.rmtree(tmp_path / "e")


# --- a trial's process


def any_worker(result: dict[str, Any]) -> int:
    """Return the process of one of Ray Train's workers."""
    return int(random.choice(ray_processes(TITLES["worker"])).pid)


class Kill(tune.Callback):  # type: ignore[misc]
    """Sends a signal to a trial's process (or to `victim`) some time after an epoch's report."""

    def __init__(
        self,
        plan: dict[tuple[int, int], float],
        number: int = signal.SIGKILL,
        victim: Callable[[dict[str, Any]], int] = lambda result: int(result["pid"]),
    ) -> None:
        self.plan, self.number, self.victim = dict(plan), number, victim
        self.sent: list[tuple[float, Any]] = []
        self.lost: list[tuple[float, Any]] = []
        self.told: dict[str, int] = {}
        self.saved: list[tuple[Path, list[dict[str, float]]]] = []
        self.whole: dict[Path, list[dict[str, float]]] = {}

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        self.told[trial.trial_id] = max(self.told.get(trial.trial_id, 0), result.get("epoch", 0))
        if result.get("done"):
            folder = Path(trial.config["trial"]["directory"])
            self.whole[folder] = trained(folder)
        after = self.plan.pop((trial.config["trial"]["number"], result.get("epoch", 0)), None)
        if after is not None:
            self.sent.append((time.monotonic() + after, trial))
            threading.Timer(after, os.kill, (self.victim(result), self.number)).start()

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.lost.append((time.monotonic(), trial))
        folder = Path(trial.config["trial"]["directory"])
        self.saved.append((folder, trained(folder)))
        assert self.saved[-1][1] or self.told.get(trial.trial_id, 0) < 10, folder.name

    def assert_nothing_was_trained_again(self) -> None:
        """Assert that all trials resumed from their last checkpoints."""
        assert any(states for _, states in self.saved)
        for folder, states in self.saved:
            assert self.whole[folder][: len(states)] == states, folder.name

    def __getstate__(self) -> dict[str, Any]:
        return {}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("workers", "victim"), [(1, "trial"), (2, "trial"), (2, "worker")])
def test_trials_killed_at_10_random_moments_end_as_if_undisturbed(
    ray_cluster: str, tmp_path: Path, moments: random.Random, workers: int, victim: str
) -> None:
    most = int(os.environ.get("TFKD_FAULT_MOMENTS", "10"))
    points = moments.sample([(n, epoch) for n in range(4) for epoch in range(1, 38)], most)
    plan = {point: moments.uniform(0, 0.05) for point in points}
    kill = Kill(plan, victim=any_worker) if victim == "worker" else Kill(plan)
    space = tree(
        {"num_samples": 5}, epochs=40, workers=workers, optim={"lr": 0.1, "batch_size": 64}
    )
    build_tuner(space, name="e", storage=tmp_path, callbacks=[kill]).fit()
    records = read_records(tmp_path / "e")
    assert (
        not kill.plan and most - 2 <= len(kill.lost) <= most
    )  # two may hit one process that is already ending
    assert [(r.status, len(r.metrics)) for r in records] == [("done", 40)] * 5
    whole = (
        alone(records[4].config) if workers == 1 else times_aside(records[4].metrics)
    )  # nobody killed the last one
    assert all(times_aside(r.metrics) == whole for r in records)
    kill.assert_nothing_was_trained_again()
    assert_no_orphans(tmp_path / "e")


def test_a_trial_that_gets_sigterm_saves_and_goes_on_from_there(
    ray_cluster: str, tmp_path: Path
) -> None:
    assert_sigterm_saves(tmp_path, workers=1)


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.parametrize("victim", ["trial", "worker"])
def test_a_trial_of_two_workers_that_gets_sigterm_saves_and_goes_on_from_there(
    ray_cluster: str, tmp_path: Path, victim: str
) -> None:
    assert_sigterm_saves(tmp_path, workers=2, victim=victim)


def assert_sigterm_saves(tmp_path: Path, workers: int, victim: str = "trial") -> None:
    plan = {(0, 10): 0.01}  # in the middle of an epoch
    kill = (
        Kill(plan, signal.SIGTERM, any_worker) if victim == "worker" else Kill(plan, signal.SIGTERM)
    )
    saved: list[int] = []

    class Look(tune.Callback):  # type: ignore[misc]
        def on_trial_recover(
            self, iteration: int, trials: list[Any], trial: Any, **info: Any
        ) -> None:
            state = load_state(Path(trial.config["trial"]["directory"]))
            saved.append(state["epoch"] if state else 0)

    space = tree(
        {"num_samples": 2}, epochs=40, checkpoint_every_s=1000, workers=workers, optim={"lr": 0.1}
    )
    build_tuner(space, name="e", storage=tmp_path, callbacks=[kill, Look()]).fit()
    assert len(saved) == 1 and saved[0] >= 10  # nothing else would have saved anything
    [(sent, _)], [(lost, _)] = kill.sent, kill.lost
    assert lost - sent < 10
    first, second = read_records(tmp_path / "e")
    assert [r.status for r in (first, second)] == ["done"] * 2
    assert times_aside(first.metrics) == times_aside(second.metrics)
    if workers == 1:
        assert times_aside(first.metrics) == alone(first.config)
    kill.assert_nothing_was_trained_again()


def test_a_driver_that_gets_sigterm_saves_and_says_how_to_go_on(
    ray_cluster: str, tmp_path: Path, tfkd: Run, epoch_by_epoch: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    space = tree({"max_concurrent": 2, "num_samples": 2}, epochs=1500, checkpoint_every_s=1000)
    experiment = tmp_path / "tfkd_results" / "e"
    with tuning(space, tmp_path) as driver:
        wait(
            lambda: sum(len(m) > 3 for m in written_metrics(experiment)) == 2,
            "two trials of 3 epochs",
        )
        start = time.monotonic()
        driver.send_signal(signal.SIGTERM)
        assert driver.wait(30) == 130 and time.monotonic() - start < 10
    said = (tmp_path / "said").read_text()
    assert "tfkd resume tfkd_results/e\n" in said and "Traceback" not in said
    records = read_records(experiment)
    for record in records:
        state = load_state(record.folder)
        assert (
            record.status == "interrupted"
            and state is not None
            and state["epoch"] >= len(record.metrics)
        )
    for name in ("MIN", "MAX"):  # the 3,000 epochs that are left need no message each
        monkeypatch.delenv(f"TUNE_RESULT_BUFFER_{name}_TIME_S")
    assert tfkd("resume", "tfkd_results/e").returncode == 0
    for record, again in zip(records, read_records(experiment), strict=True):
        assert again.status == "done" and again.metrics[: len(record.metrics)] == record.metrics


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    ("number", "when"),
    [
        (signal.SIGINT, "while Ray starts"),
        (signal.SIGINT, "while it runs"),
        (signal.SIGTERM, "while it runs"),
    ],
)
def test_a_second_and_third_signal_end_a_sweep_with_a_sentence_its_code_and_nothing_running(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, when: str
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)  # on a Ray of its own
    experiment = tmp_path / "tfkd_results" / "e"
    ours: set[psutil.Process] = set()

    def ready() -> bool:
        ours.update(psutil.Process(driver.pid).children(recursive=True))
        if when == "while Ray starts":
            return len(ours) > 1
        return any(len(m) > 3 for m in written_metrics(experiment))

    with tuning(tree({"num_samples": 2}, epochs=100_000), tmp_path) as driver:
        wait(ready, when)
        for _ in range(3):
            driver.send_signal(number)
            with contextlib.suppress(psutil.NoSuchProcess):
                ours.update(psutil.Process(driver.pid).children(recursive=True))
            time.sleep(0.2)
        assert driver.wait(100) == 130
        said = (tmp_path / "said").read_text()
        assert "Traceback" not in said
        ends = (
            ("interrupted", "stopped at once")
            if when == "while it runs"
            else ("so there is nothing to resume",)
        )
        assert any(end in said for end in ends), said
        wait(
            lambda: not [p for p in ours if p.is_running() and p.status() != "zombie"],
            "all has ended",
            20,
        )


TERMINATED = """
import os, signal, sys, time
import ray._private.worker as worker
from tfkd_ray.cli.main import main

connect = worker.connect

def terminated(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGTERM)  # Ray's processes run, and Ray has said what SIGTERM does
    time.sleep(1)
    return connect(*args, **kwargs)

worker.connect = terminated
sys.exit(main(sys.argv[1:]))
"""


def test_sigterm_while_ray_starts_ends_with_a_sentence_and_our_exit_code(tmp_path: Path) -> None:
    (tmp_path / "space.yaml").write_text(dump_yaml(tree({"num_samples": 2})))
    env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, "-c", TERMINATED, "tune", "space.yaml", "--name", "e"],
        cwd=tmp_path, env=env, capture_output=True, text=True, timeout=150,
    )  # fmt: skip
    assert done.returncode == 130 and "interrupted before a trial ran" in done.stderr, (
        done.returncode,
        done.stderr,
    )
    assert "Traceback" not in done.stderr


def assert_ends_without_its_head(
    driver: "subprocess.Popen[bytes]", place: Path, advice: str
) -> None:
    """Kill the head of a driver's own Ray: it ends with a sentence and leaves nothing running."""
    ours = psutil.Process(driver.pid).children(recursive=True)
    (gcs,) = (process for process in ours if process.name() == "gcs_server")
    gcs.kill()
    assert driver.wait(58) == 1
    said = (place / "said").read_text()
    assert "stopped: Ray's head at " in said and said.endswith(advice), said
    assert "Traceback" not in said
    wait(
        lambda: not [p for p in ours if p.is_running() and p.status() != "zombie"],
        "all has ended",
        10,
    )


def test_a_sweep_whose_head_is_killed_says_how_to_go_on_and_leaves_nothing_running(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)  # on a Ray of its own
    experiment = tmp_path / "tfkd_results" / "e"
    with tuning(tree({"num_samples": 2}, epochs=100_000), tmp_path) as driver:
        wait(lambda: any(len(m) > 3 for m in written_metrics(experiment)), "a trial of 3 epochs")
        assert_ends_without_its_head(
            driver, tmp_path, "resume with:\n  tfkd resume tfkd_results/e\n"
        )


@pytest.mark.timeout(300)
def test_a_head_that_is_killed_while_a_teacher_trains_is_said_and_nothing_is_left_running(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)  # on a Ray of its own
    teacher = {"model": {"name": "mlp", "hidden": [8]}, "epochs": 100_000}
    kd = tree({"num_samples": 1}, objective="kd", teacher=teacher)
    with tuning(kd, tmp_path) as driver:
        wait(lambda: list(tmp_path.glob("tfkd_results/teachers/*/.lock")), "a teacher", 200)
        again = "run the same command again; trained teachers are kept\n"
        assert_ends_without_its_head(driver, tmp_path, again)


# --- trials that fail

FAULTS = {
    "none": ("done", None),
    "nan": ("failed", "Diverged: train_loss is nan at epoch 3"),
    "inf": ("failed", "Diverged: train_loss is inf at epoch 3"),
    "exception": ("failed", "ValueError: as it was told to"),
    "silent": ("failed", "Silent"),
    "memory": ("failed", "RuntimeError: .*(memory|alloc|size)"),
    "no memory in Python": ("failed", "MemoryError"),
    "exit": ("failed", "SystemExit: 1"),
    "crash": ("failed", r"its process was lost 3 times in epoch 3 \(no memory, a crash\?\)"),
    "hang": ("failed", r"no epoch within 15 s \(search.trial_timeout_s\): it hung and was killed"),
    "unpicklable": ("failed", "TypeError: val_ece is <function .* at epoch 3, not a number"),
    "no metric": ("failed", "LookupError: val_accuracy missing at epoch 3; the search needs it"),
}


@pytest.mark.timeout(300)
def test_faults_of_every_kind_in_one_sweep_have_each_their_reason_and_a_good_checkpoint(
    ray_cluster: str, tmp_path: Path, tfkd: Run
) -> None:
    students = [
        {"name": "own", "path": "tests.faulty:network", "args": {"fault": fault}}
        for fault in FAULTS
    ]
    search = {
        "sampler": "grid",
        "num_samples": len(FAULTS),
        "max_concurrent": 2,
        "trial_timeout_s": 15,
    }
    space = tree(
        {**search, "warm_start": False}, student={"choices": students}, epochs=5, optim={"lr": 0.1}
    )
    (tmp_path / "space.yaml").write_text(dump_yaml(space))
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    run = tfkd("tune", "space.yaml", "--name", "e", PYTHONPATH=path, timeout=200)
    assert run.returncode == 0 and "Traceback" not in run.stderr, run.stderr
    records = {
        r.config["student"]["args"]["fault"]: r
        for r in read_records(tmp_path / "tfkd_results" / "e")
    }
    assert records.keys() == FAULTS.keys()
    for fault, (status, reason) in FAULTS.items():
        record = records[fault]
        assert record.status == status, f"{fault}: {record.status} {record.reason}"
        assert re.match(reason or "None$", str(record.reason)), f"{fault}: {record.reason}"
        assert (
            f"{record.name}: {'done' if reason is None else f'failed: {record.reason}'}"
            in run.stderr
        ), run.stderr
        assert len(record.metrics) == (5 if reason is None else 2), fault
        if reason is None:
            assert all(
                bool(torch.isfinite(t).all())
                for t in load_weights(record.folder / WEIGHTS).values()
            )
            continue
        state = load_state(record.folder)
        trained_well = 3 if fault in ("unpicklable", "no metric") else 2
        assert state is not None and 1 <= state["epoch"] <= trained_well, fault
        assert all(bool(torch.isfinite(t).all()) for t in state["model"].values()), fault
    assert (
        f"{len(FAULTS)} trials, " in run.stdout
        and f"1 of full length, 0 stopped early, {len(FAULTS) - 1} failed" in run.stdout
    )


def test_a_loss_is_forgiven_after_a_new_epoch_and_a_hang_is_noticed_after_the_time(
    tmp_path: Path,
) -> None:
    now = [0.0]
    losses = Losses(10, lambda: now[0])
    tune = Announcer([losses])
    assignment = Assignment("t0", 9, directory=tmp_path / "not yet")
    trial = SimpleNamespace(
        trial_id="a", max_failures=2, num_failures=0, config={SECTION: assignment.section()}
    )
    trial.temporary_state = SimpleNamespace(ray_actor=None)
    tune.on_trial_start(0, [], trial)
    trial.num_failures = 2  # lost twice before its first epoch
    tune.on_trial_recover(0, [], trial)
    tune.on_trial_start(0, [], trial)
    tune.on_trial_result(0, [], trial, {"epoch": 1})
    assert trial.max_failures == 4  # two more in the next one
    tune.on_trial_result(0, [], trial, {"epoch": 1})  # reported again after a restart
    trial.num_failures = 5
    tune.on_trial_result(0, [], trial, {"epoch": 1})
    assert trial.max_failures == 4 and losses.reason(trial).startswith(
        "its process was lost 3 times in epoch 2"
    )
    ended: list[Any] = []
    trial.temporary_state.ray_actor = "actor"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tfkd_ray.run.callbacks.ray.kill", ended.append)
        now[0] += 10
        tune.on_step_end(0, [])
        assert not ended
        now[0] += 0.1
        tune.on_step_end(0, [])
        tune.on_step_end(0, [])
    assert (
        ended == ["actor"]
        and trial.max_failures == trial.num_failures
        and "hung" in losses.reason(trial)
    )


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_a_group_of_two_workers_that_hangs_is_ended_and_the_next_trial_starts_another(
    ray_cluster: str, tmp_path: Path
) -> None:
    students = [
        {"name": "own", "path": "tests.faulty:network", "args": {"fault": fault}}
        for fault in ("hang", "none")
    ]
    search = {"sampler": "grid", "num_samples": 2, "trial_timeout_s": 40, "warm_start": False}
    space = tree(
        search,
        student={"choices": students},
        epochs=5,
        workers=2,
        optim={"lr": 0.1, "batch_size": 64},
    )
    build_tuner(space, name="e", storage=tmp_path).fit()
    found = {
        r.config["student"]["args"]["fault"]: (r.status, len(r.metrics))
        for r in read_records(tmp_path / "e")
    }
    assert found["none"] == ("done", 5) and found["hang"][0] == "failed" and found["hang"][1] >= 2
    wait(lambda: ray.available_resources().get("CPU") == 2, "the hung workers are gone", 30)


# --- disks


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Yield a small mounted disk with a file system of this kind."""
    place, image = tmp_path / "disk", tmp_path / "image"
    place.mkdir()
    if os.geteuid() != 0:
        assert "CI" not in os.environ, "CI runs as root, so that it can mount"
        pytest.skip("mounting a disk needs root")

    def mount(kind: str) -> Path:
        if kind == "tmpfs":
            command = ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(place)]
        else:
            with image.open("wb") as file:
                file.truncate(64 * 2**20)
            subprocess.run(["mkfs.ext4", "-q", "-F", str(image)], check=True, capture_output=True)
            command = ["mount", "-o", "loop,errors=remount-ro", str(image), str(place)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            assert "CI" not in os.environ, done.stderr
            pytest.skip(f"this machine cannot mount: {done.stderr.strip()}")
        return place

    yield mount
    subprocess.run(["umount", "-l", str(place)], capture_output=True)


def fill(where: Path) -> None:
    """Fill a disk."""
    with (where / "ballast").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


def test_a_bank_without_room_computes_what_it_cannot_keep(disk: Callable[[str], Path]) -> None:
    where = disk("tmpfs")
    asked: list[int] = []

    def logits(network: nn.Module, index: torch.Tensor) -> torch.Tensor:
        asked.extend(index.tolist())
        return torch.arange(3.0) + index.unsqueeze(1)

    for full in (False, True):
        said: list[str] = []
        bank = Bank(nn.Identity, {"teacher": f"{full}"}, folder=where / "bank")
        bank.say = said.append
        if full:
            fill(where)
        for _ in range(2):
            assert bank.logits({"epoch": 1}, 40, 3, logits).tolist() == [[-1.0, 0.0, 1.0]] * 40
        assert len(asked) == (120 if full else 40)  # twice where it could not be kept
        assert len(said) == int(full) and all(
            "soft labels cannot be kept in" in text for text in said
        ), said


@pytest.mark.timeout(300)
@pytest.mark.parametrize("trouble", ["full", pytest.param("read-only", marks=pytest.mark.slow)])
@pytest.mark.parametrize("place", ["journal", pytest.param("SQLite", marks=pytest.mark.slow)])
def test_a_sweep_on_a_bad_disk_stops_with_a_sentence_and_goes_on_when_it_is_mended(
    ray_cluster: str,
    tmp_path: Path,
    tfkd: Run,
    disk: Callable[[str], Path],
    trouble: str,
    place: str,
) -> None:
    where = disk("tmpfs" if trouble == "full" else "ext4")
    url = {"storage": f"sqlite:///{where}/s.db"} if place == "SQLite" else {}
    teacher = {"model": {"name": "mlp", "hidden": [8]}, "epochs": 2}
    space = tree(
        {"max_concurrent": 2, **url},
        epochs=60,
        objective={"name": "kd", "alpha": 0.5},
        teacher=teacher,
    )
    space["search"]["split"] = False
    experiment = where / "r" / "e"
    with tuning(space, tmp_path, "--storage", str(where / "r")) as driver:
        wait(lambda: sum(len(m) > 3 for m in written_metrics(experiment)) >= 1, "3 epochs")
        if trouble == "full":
            fill(where)
        else:
            device = Path(
                subprocess.check_output(
                    ["findmnt", "-n", "-o", "SOURCE", str(where)], text=True
                ).strip()
            )
            Path("/sys/fs/ext4", device.name, "trigger_fs_error").write_text("a test")
        assert driver.wait(90) == 1
    said = (tmp_path / "said").read_text()
    stopped = [line for line in said.splitlines() if line.startswith("stopped: ")]
    words = (
        "No space left on device|disk is full"
        if trouble == "full"
        else "Read-only file system|readonly|read-only|I/O"
    )
    assert len(stopped) == 1 and re.search(words, stopped[0]) and "Traceback" not in said, said
    assert said.endswith("tfkd resume disk/r/e\n")
    before = read_records(experiment)  # what was written is readable
    assert 1 <= len(before) <= 3 and all(r.status != "failed" for r in before)
    status = tfkd("status", str(experiment))
    assert status.returncode == 0, status.stderr
    if trouble == "full":
        refused = tfkd("resume", str(experiment))
        assert (
            refused.returncode != 0
            and "Traceback" not in refused.stderr
            and "No space" in refused.stderr
        )
        (where / "ballast").unlink()
    else:
        refused = tfkd("resume", str(experiment))
        assert (
            refused.returncode == 2
            and "cannot be written to (Read-only file system)" in refused.stderr
        )
        wait(
            lambda: subprocess.run(["umount", str(where)], capture_output=True).returncode == 0,
            "nobody is there",
            30,
        )
        subprocess.run(["fsck.ext4", "-p", str(tmp_path / "image")], capture_output=True)
        subprocess.run(["mount", "-o", "loop", str(tmp_path / "image"), str(where)], check=True)
    resumed = tfkd("resume", str(experiment))
    assert resumed.returncode == 0, resumed.stderr
    after = read_records(experiment)
    assert [(r.number, r.status, len(r.metrics)) for r in after] == [
        (n, "done", 60) for n in range(3)
    ]
    for record in after:
        ours = next((r.metrics for r in before if r.number == record.number), [])
        assert times_aside(record.metrics[: len(ours)]) == times_aside(ours)
    assert_no_orphans(experiment)


# --- the machine


def test_a_clock_that_jumps_changes_neither_budgets_nor_speeds_nor_results(
    ray_cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = time.time
    shift = [0.0]
    monkeypatch.setattr(time, "time", lambda: real() + shift[0])

    class Jump(tune.Callback):  # type: ignore[misc]
        def on_trial_result(
            self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
        ) -> None:
            shift[0] = {2: 5 * 3600.0, 3: -9 * 3600.0, 4: 24 * 3600.0}.get(
                result["epoch"], shift[0]
            )

        def __getstate__(self) -> dict[str, Any]:
            return {}

    student = {
        "name": "own",
        "path": "tests.faulty:network",
        "args": {"fault": "clock"},
    }  # 1970, in the trial itself
    budgets = {"time_budget_s": 600, "cpu_hours": 1, "trial_timeout_s": 300}
    build_tuner(
        tree(budgets, student=student, epochs=5), name="e", storage=tmp_path, callbacks=[Jump()]
    ).fit()
    records = read_records(tmp_path / "e")
    assert [(r.status, len(r.metrics)) for r in records] == [("done", 5)] * 3
    assert all(0 < m["seconds"] < 60 and m["images_per_s"] > 0 for r in records for m in r.metrics)
    spent = json.loads((tmp_path / "e" / "spent.json").read_text())
    assert 0 < spent["seconds"] < 120 and 0 < spent["trial_seconds"] < 120
    monkeypatch.undo()
    for record in records:
        sane = {**record.config, "student": {**record.config["student"], "args": {"fault": "none"}}}
        assert times_aside(record.metrics) == alone(sane)


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_a_full_object_store_and_a_cleaned_tmp_end_no_sweep(
    ray_cluster: str, tmp_path: Path
) -> None:
    """Fill an own cluster's store, clean Ray's folder, then kill a process, to start another."""
    teacher = {"model": {"name": "mlp", "hidden": [8]}, "epochs": 2}
    space = tree(
        {"num_samples": 4, "max_concurrent": 2, "split": False},
        objective={"name": "kd", "alpha": 0.5}, teacher=teacher, epochs=20,
    )  # fmt: skip
    report = sweep_elsewhere(tmp_path, 2, space, [[0, 2, "store"], [0, 4, "tmp"], [2, 3, "trial"]])
    assert [status for status, _ in report["trials"].values()] == ["done"] * 4, report
    assert {event for _, event, _ in report["events"]} >= {
        "kill store",
        "kill tmp",
        "kill trial",
        "lost",
    }
    assert report["left"] == [] and report["free"] == 2, report
    teacherless = read_records(tmp_path / "e")
    assert all(len(r.metrics) == 20 for r in teacherless)
