"""Trials of several workers on Ray Train: resident groups, released resources, and kills."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from conftest import Run, TwoWorkers, long_after
from sweep_under_fire import sweep
from test_folder import write_folder

from tfkd_ray.learn.config import TrainConfig
from tfkd_ray.learn.loop import train
from tfkd_ray.learn.teachers import describe, find_or_train, teacher_folder, train_teacher
from tfkd_ray.run import epochs
from tfkd_ray.run.epochs import COLLECTIVE_TIMEOUT_S
from tfkd_ray.run.group import TrialFailed, WorkerGroup
from tfkd_ray.run.tune import train_teachers
from tfkd_ray.settings.schema import validated
from tfkd_ray.space.space import build_space
from tfkd_ray.store.assignment import Assignment
from tfkd_ray.store.experiment import read_metrics, read_records
from tfkd_ray.store.storage import Directory

pytestmark = pytest.mark.ray

SPACE: dict[str, Any] = {
    "student": {"name": "mlp", "hidden": [16]},
    "objective": "ce",
    "epochs": 9,
    "workers": 2,
    "checkpoint_every_s": 0,
    "optim": {
        "lr": {"choices": [0.1, 0.0005, 1e20]},
        "batch_size": 64,
    },  # the last one diverges at once
    "search": {"sampler": "random"},
}


def _comes_alone(rank: int, alone: int, folder: str) -> None:
    """Let one of two workers come to where the other one never comes; write its answers."""
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    control = dist.new_group(backend="gloo", timeout=epochs.COMMAND_TIMEOUT)
    assert isinstance(control, dist.ProcessGroup)
    epochs.BARRIER_TIMEOUT_S = 1.0
    together = epochs.all_here(control)
    done = Path(folder) / "done"
    if rank == alone:
        done.write_text(json.dumps([together, epochs.all_here(control)]))
    while not done.exists():
        time.sleep(0.05)
    os._exit(0)  # its collective operation is still open


@pytest.mark.timeout(60)
@pytest.mark.parametrize("alone", long_after(0, [0, 1]))
def test_whichever_worker_has_failed_it_soon_knows_that_the_others_are_elsewhere(
    tmp_path: Path, alone: int, as_two_workers: TwoWorkers
) -> None:
    as_two_workers(_comes_alone, alone, str(tmp_path))
    assert json.loads((tmp_path / "done").read_text()) == [True, False]


def sweep_elsewhere(
    tmp_path: Path, cpus: int, space: dict[str, Any], kill: list[list[Any]]
) -> dict[str, Any]:
    """Run on a second cluster: two clusters on one host must not disturb each other."""
    script = Path(__file__).parent / "sweep_under_fire.py"
    plan = json.dumps({"space": space, "kill": kill})
    run = subprocess.run(
        [sys.executable, str(script), str(tmp_path), str(cpus), plan],
        capture_output=True,
        text=True,
        timeout=170,
    )
    lines = [line for line in run.stdout.splitlines() if line.startswith("REPORT ")]
    assert lines, run.stderr[-3000:]
    report: dict[str, Any] = json.loads(lines[0][7:])
    return report


def at(report: dict[str, Any], what: str, number: int | None = None) -> list[float]:
    return [t for t, event, n in report["events"] if event == what and number in (None, n)]


def gaps(report: dict[str, Any]) -> list[float]:
    """Return the seconds from each trial's end to the next one's first epoch, in sequence."""
    times, first = at(report, "end"), at(report, "first epoch")
    return [
        min(t - end for t in first if t > end) for end in times[:-1] if any(t > end for t in first)
    ]


def assert_all_is_free(report: dict[str, Any], cpus: int) -> None:
    assert report["free"] == cpus, report
    assert report["groups"] in ([], ["REMOVED"]), report
    assert report["left"] == [], report


@pytest.mark.timeout(180)
def test_one_group_on_2_cpus_serves_stopped_and_failed_trials_without_a_pause(
    ray_cluster: str, tmp_path: Path
) -> None:
    report = sweep(
        str(tmp_path),
        2,
        {**SPACE, "search": {"sampler": "random", "num_samples": 6, "seed": 6}},
        [],
    )
    assert_all_is_free(report, 2)
    states = [report["trials"][str(n)][0] for n in range(6)]
    assert states == ["done", "failed", "stopped", "done", "stopped", "failed"], report["trials"]
    assert all(
        "Diverged: train_loss is" in reason
        for status, reason in report["trials"].values()
        if status == "failed"
    )
    assert max(gaps(report)) < 2, report["events"]
    one = build_space({**SPACE, "workers": 1, "optim": {"lr": 0.1, "batch_size": 64}}).single()
    for folder in (tmp_path / "e" / "trials").glob("t0*"):
        about = json.loads((folder / "trial.json").read_text())
        if about["status"] == "done" and about["config"]["optim"]["lr"] == 0.1:
            alone = [e.metrics for e in train(one)]
            for ours, theirs in zip(read_metrics(folder), alone, strict=True):
                assert ours["train_loss"] == pytest.approx(theirs["train_loss"], abs=1e-4)
                assert ours["val_accuracy"] == pytest.approx(theirs["val_accuracy"], abs=0.01)


@pytest.mark.fault
@pytest.mark.timeout(2 * COLLECTIVE_TIMEOUT_S)
def test_a_trial_whose_workers_failed_at_different_places_of_a_step_leaves_no_group_out_of_step(
    ray_cluster: str, tmp_path: Path
) -> None:
    def run(*, fails: bool) -> TrainConfig:
        student = {"name": "own", "path": "tests.uneven:network", "args": {"fails": fails}}
        tree = {**SPACE, "student": student, "epochs": 1, "optim": {"lr": 0.01, "batch_size": 64}}
        return build_space({k: v for k, v in tree.items() if k != "search"}).single()

    def about(name: str) -> Assignment:
        return Assignment(
            name, 1, directory=tmp_path / "trials" / name, storage=Directory(tmp_path)
        )

    group = WorkerGroup(run(fails=True), tmp_path / "groups")
    try:
        with pytest.raises(TrialFailed, match="OutOfMemoryError: CUDA out of memory, in forward"):
            list(group.epochs(run(fails=True).model_dump(mode="json"), about("first")))
        began, innocent = time.monotonic(), run(fails=False).model_dump(mode="json")
        assert [m["epoch"] for m in group.epochs(innocent, about("second"))] == [1]
        # a group out of step would hang until this time is over; Ray's start is part of it
        assert time.monotonic() - began < COLLECTIVE_TIMEOUT_S / 2
    finally:
        group.close()


@pytest.mark.timeout(180)
def test_a_group_trains_the_teacher_of_trials_of_several_workers(
    ray_cluster: str, tmp_path: Path
) -> None:
    """One that stops before its last epoch, too."""
    network = {"name": "own", "path": "tests.uneven:counted", "args": {"folder": str(tmp_path)}}
    teacher = {"model": network, "epochs": 3, "stop_epoch": 2, "optim": {"batch_size": 64}}
    tree = {"student": "mlp", "objective": "kd", "epochs": 1, "workers": 2, "teacher": teacher}
    run = validated(TrainConfig, tree).pinned().teacher_run()
    assert run is not None
    told: list[float] = []
    train_teachers(
        [run],
        Directory(tmp_path / "s"),
        lambda run, about: told.append((about or {}).get("metrics", {}).get("epoch", 0)),
    )
    assert told == [0, 2]
    assert {path.name for path in tmp_path.glob("worker-*")} == {"worker-0-of-2", "worker-1-of-2"}
    alone = train_teacher(run, tmp_path / "alone")["metrics"]
    found = describe(run, tmp_path / "s")["metrics"]
    assert found["train_loss"] == pytest.approx(alone["train_loss"], rel=1e-4)
    assert {path.name for path in teacher_folder(run, tmp_path / "s").iterdir()} == {
        ".lock",
        "student.safetensors",
        "teacher.json",
    }


@pytest.mark.fault
@pytest.mark.slow
@pytest.mark.timeout(180)
def test_two_groups_survive_a_killed_worker_and_a_killed_trial(
    ray_cluster: str, tmp_path: Path
) -> None:
    space = {**SPACE, "optim": {"lr": {"choices": [0.1, 0.05]}, "batch_size": 64}}
    space["search"] = {"sampler": "random", "num_samples": 8, "stopping": "none"}
    report = sweep_elsewhere(tmp_path, 4, space, [[2, 3, "worker"], [5, 4, "trial"]])
    assert_all_is_free(report, 4)
    assert [status for status, _ in report["trials"].values()] == ["done"] * 8, report["trials"]
    assert len(at(report, "lost")) == 2
    firsts = at(report, "first epoch")
    begun = firsts[0] - at(report, "start")[0]  # of a group; the busier the machine, the longer
    for killed in at(report, "kill worker") + at(report, "kill trial"):
        assert min(t - killed for t in firsts if t > killed) < 15 + 2 * begun, report["events"]
    one = {}
    for folder in (tmp_path / "e" / "trials").glob(
        "t0*"
    ):  # killed or not: equal numbers for equal configurations
        about = json.loads((folder / "trial.json").read_text())
        losses = [m["train_loss"] for m in read_metrics(folder)]
        assert len(losses) == 9
        assert one.setdefault(about["config"]["optim"]["lr"], losses) == losses


@pytest.mark.fault
@pytest.mark.slow
@pytest.mark.timeout(180)
def test_image_files_at_224_stream_through_a_teacher_two_workers_a_kill_and_a_resume(
    ray_cluster: str, tmp_path: Path, tfkd: Run
) -> None:
    """As for ImageNet: JPEGs decoded during training, random resized crops, KD, several workers."""
    root = write_folder(tmp_path / "photographs", classes=2, train=24, side=230)
    tree = {
        "data": {"name": "image_folder", "root": str(root), "num_classes": 2, "val_fraction": 0.25},
        "student": {
            "name": "mlp",
            "hidden": [4],
        },  # no batch statistics: one worker and two have equal results
        "teacher": {
            "model": {"name": "cnn", "widths": [4]},
            "epochs": 2,
            "optim": {"batch_size": 8},
        },
        "objective": {"name": "kd", "alpha": 0.5},
        "epochs": 6,
        "workers": 2,
        "checkpoint_every_s": 0,
        "optim": {"lr": {"choices": [0.001, 0.0005]}, "batch_size": 8},
        "augment": {"resized_crop": True, "flip": True},
        "search": {"num_samples": 2, "stopping": "none", "sampler": "random"},
    }
    (tmp_path / "space.yaml").write_text(json.dumps(tree))
    command = [sys.executable, "-m", "tfkd_ray", "tune", "space.yaml", "--name", "e"]
    experiment, until = tmp_path / "tfkd_results/e", time.monotonic() + 80
    with subprocess.Popen(
        command, cwd=tmp_path, env=dict(os.environ), stderr=subprocess.DEVNULL
    ) as driver:
        try:
            while not any(
                len(r.metrics) >= 2
                for r in (read_records(experiment) if experiment.exists() else [])
            ):
                assert time.monotonic() < until and driver.poll() is None
                time.sleep(0.05)
        finally:
            driver.send_signal(signal.SIGKILL)
    again = tfkd("resume", "tfkd_results/e")
    assert again.returncode == 0, again.stderr
    records = read_records(experiment)
    assert [(r.status, [m["epoch"] for m in r.metrics]) for r in records] == [
        ("done", [1, 2, 3, 4, 5, 6])
    ] * 2
    alone = validated(TrainConfig, {**records[0].config, "workers": 1})
    teacher = find_or_train(alone, tmp_path / "tfkd_results")
    for ours, theirs in zip(records[0].metrics, train(alone, teacher=teacher), strict=True):
        assert ours["train_loss"] == pytest.approx(theirs.metrics["train_loss"], rel=1e-4)
