"""Trials that share a GPU (only claimed): out of memory leads to a retry with a larger share."""

import json
import os
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ray.tune import PlacementGroupFactory
from ray.tune.experiment import Trial

from tfkd_ray.cli.main import main
from tfkd_ray.learn import loop
from tfkd_ray.learn.config import TrainConfig
from tfkd_ray.run.callbacks import Losses
from tfkd_ray.run.connect import forget_lessons, give_larger_share
from tfkd_ray.run.epochs import is_out_of_memory
from tfkd_ray.run.trial import StudentTrial, resources_of
from tfkd_ray.settings.errors import FAILED
from tfkd_ray.settings.schema import validated
from tfkd_ray.store.assignment import SECTION, Assignment
from tfkd_ray.store.experiment import read_records


@pytest.fixture(autouse=True)
def _no_lesson_left() -> Iterator[None]:
    """Leave no share of a GPU that the sweeps of other tests would begin with."""
    yield
    forget_lessons()


SWEEP = """
import json, os, sys
os.environ.pop("RAY_ADDRESS", None)
import ray, torch
from pathlib import Path
from ray import cloudpickle, tune
from tfkd_ray.run import tune as ours
from tfkd_ray.space.space import build_space
from tfkd_ray.run.trial import StudentTrial

class Full(StudentTrial):
    '''A trial that needs half of a GPU's memory, as long as it does not ask for a GPU that is not there.'''
    def _begin(self, config):
        super()._begin({**config, "gpus_per_worker": 0})
        share, epochs = self.trial_resources.required_resources["GPU"], self._epochs
        def limited():
            for metrics in epochs:
                if metrics["epoch"] == 2 and share < 0.5:
                    raise torch.OutOfMemoryError("CUDA out of memory.")
                yield metrics
        self._epochs = limited()

ray.init(address="local", num_cpus=2, num_gpus=1, include_dashboard=False, log_to_driver=False)
ours.StudentTrial, ours.check_gpus = Full, lambda: None
tree = {"objective": "ce", "student": "mlp", "epochs": 3, "gpus_per_worker": 0.25, "checkpoint_every_s": 0,
        "optim": {"lr": {"low": 0.01, "high": 0.1}}, "search": {"num_samples": 2, "stopping": sys.argv[2], "max_failures": int(sys.argv[3])}}
results = ours.build_tuner(tree, name="e", storage=sys.argv[1]).fit()
print(json.dumps([(r.metrics.get("failed"), r.metrics["epoch"]) for r in results]))
"""


LENT = """
import os
os.environ.pop("RAY_ADDRESS", None)
import ray
from tfkd_ray.run.lent import with_a_gpu

def told():
    return os.getpid() == HERE, ray.get_gpu_ids()

def wrong():
    raise ValueError("no such net")

HERE = os.getpid()
ray.init(address="local", num_cpus=0, num_gpus=1, include_dashboard=False, log_to_driver=False)
for gpus in (1.0, 0.5, 2.0):
    print(*with_a_gpu(gpus, told))
try:
    with_a_gpu(1.0, wrong)
except ValueError as error:
    print(error)
"""


@pytest.mark.ray
@pytest.mark.fault
@pytest.mark.timeout(100)
def test_what_needs_a_gpu_beside_trials_gets_it_from_ray() -> None:
    """With no CPU free it has room still; what asks for more than this node has is done here."""
    env = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}
    done = subprocess.run([sys.executable, "-c", LENT], capture_output=True, text=True, timeout=90, env=env)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    told = done.stdout.splitlines()[-4:]
    assert told == ["False [0]", "False [0]", "True []", "no such net"]


@pytest.mark.parametrize("gpus, lent", [(0, []), (0.25, [0.25]), (1, [1.0])])
def test_a_plan_is_probed_on_a_gpu_that_is_lent(
    gpus: float, lent: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[float] = []
    monkeypatch.setattr(
        "tfkd_ray.run.lent.with_a_gpu", lambda gpus, work: asked.append(gpus) or work()
    )
    for name, told in (("_epoch_seconds", 1.0), ("_view_seconds", 1.0), ("_gpu_share", None)):
        monkeypatch.setattr(f"tfkd_ray.show.plan.{name}", lambda config, told=told: told)
    for name in ("digits_tfkd", "digits_arms"):
        argv = ["plan", name, "--probe", "--slots", "1", f"gpus_per_worker={gpus}"]
        assert main(argv) == 0
    assert asked == lent * 2


@pytest.mark.parametrize("name", ["digits_tfkd", "digits_arms"])
def test_a_probe_that_cannot_run_is_a_sentence(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An old driver, or a net that does not fit on the GPU."""
    full = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    def fails(config: TrainConfig) -> float:
        raise full

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["plan", name, "--probe", "--slots", "1", "gpus_per_worker=1"]) == FAILED
    assert "tfkd plan: --probe: gpus_per_worker is 1, and torch sees" in capsys.readouterr().err
    monkeypatch.setattr("tfkd_ray.show.plan._epoch_seconds", fails)
    assert main(["plan", name, "--probe", "--slots", "1"]) == FAILED
    assert capsys.readouterr().err == f"tfkd plan: --probe: {full}\n"


TOO_LITTLE = (
    "its share of a GPU (0.25) had too little memory in epoch 2, and its retries were used up"
)


def swept(tmp_path: Path, stopping: str, max_failures: int) -> list[tuple[str | None, int]]:
    """Return (failure, last epoch) of both trials."""
    done = subprocess.run(
        [sys.executable, "-c", SWEEP, str(tmp_path), stopping, str(max_failures)],
        capture_output=True, text=True, timeout=200, env={**os.environ, "RAY_USAGE_STATS_ENABLED": "0"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    ended: list[tuple[str | None, int]] = json.loads(done.stdout.splitlines()[-1])
    return ended


@pytest.mark.ray
@pytest.mark.fault
@pytest.mark.slow
@pytest.mark.timeout(220)
@pytest.mark.parametrize("stopping", ["halving", "asha"])
def test_a_trial_without_enough_memory_gets_a_larger_share(tmp_path: Path, stopping: str) -> None:
    ended = swept(tmp_path, stopping, 1)
    assert [failed for failed, _ in ended] == [None, None] and max(epoch for _, epoch in ended) == 3
    assert not list(tmp_path.rglob("out_of_memory"))


@pytest.mark.ray
@pytest.mark.fault
@pytest.mark.slow
@pytest.mark.timeout(220)
def test_a_trial_without_enough_memory_ends_with_that_reason_where_its_failures_are_spent(
    tmp_path: Path,
) -> None:
    swept(tmp_path, "halving", 0)
    records = read_records(tmp_path / "e")
    failed = [r.reason or "" for r in records if r.status == "failed"]
    assert failed and all(reason.startswith(TOO_LITTLE) for reason in failed), records
    assert not list(tmp_path.rglob("out_of_memory"))


@pytest.mark.parametrize(
    "status, share, failures", [(Trial.RUNNING, 0.25, 0), (Trial.PENDING, 0.5, 1)]
)
def test_a_trial_that_ends_for_good_is_given_no_larger_share(
    status: str, share: float, failures: int, tmp_path: Path
) -> None:
    """Tune leaves a trial RUNNING without failures left, and never changes its resources."""
    trial = Trial(
        "x", stub=True, config={SECTION: Assignment("t0", 9, directory=tmp_path).section()}
    )
    trial.placement_group_factory = PlacementGroupFactory([{"CPU": 1, "GPU": 0.25}])
    trial.status, trial.max_failures = status, 0
    (tmp_path / "out_of_memory").write_text("0.25")
    give_larger_share(trial)
    if status == Trial.RUNNING:
        losses = Losses()
        losses.on_failed(trial)
        assert losses.reason(trial).startswith(TOO_LITTLE.replace("epoch 2", "epoch 1"))
    assert (
        trial.placement_group_factory.required_resources["GPU"] == share
        and trial.max_failures == failures
    )
    assert not (tmp_path / "out_of_memory").exists()


def test_what_one_trial_learns_of_a_gpus_memory_the_rest_of_the_sweep_knows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Later trials begin with the share that was enough; a next sweep with its own."""
    monkeypatch.setattr("tfkd_ray.run.trial.shunning", lambda request: request)
    tree = {"objective": "ce", "student": "mlp", "gpus_per_worker": 0.2}
    config = validated(TrainConfig, tree)

    def share_of_next() -> float:
        return float(resources_of(config).required_resources["GPU"])

    forget_lessons()
    assert share_of_next() == 0.2
    trial = Trial(
        "x", stub=True, config={SECTION: Assignment("t0", 9, directory=tmp_path).section()}
    )
    trial.placement_group_factory = resources_of(config)
    for enough in (0.5, 1.0):
        now = trial.placement_group_factory.required_resources["GPU"]
        (tmp_path / "out_of_memory").write_text(str(now))
        give_larger_share(trial)
        assert share_of_next() == enough
        assert trial.placement_group_factory.required_resources == {"CPU": 1, "GPU": enough}
    forget_lessons()
    assert share_of_next() == 0.2


@pytest.mark.parametrize("share, given_back", [(0.25, [False, True]), (1, []), (0, [])])
def test_a_process_gives_memory_back_between_trials_that_share_a_gpu(
    share: float, given_back: list[bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of the batches where a run ends, and the network's once nothing holds it."""
    networks, found, new_student = [], [], loop._new_student

    def watched(*given: Any) -> Any:
        student, unused = new_student(*given)
        networks.append(weakref.ref(student))
        return student, unused

    monkeypatch.setattr(loop, "_new_student", watched)
    monkeypatch.setattr(loop, "device_of", lambda config: torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: found.append(networks[0]() is None))
    monkeypatch.setattr(StudentTrial, "_begin", lambda trial, config: None)
    tree = {"objective": "ce", "student": "mlp", "gpus_per_worker": share, "epochs": 2}
    trial = object.__new__(StudentTrial)
    request = PlacementGroupFactory([{"CPU": 1, "GPU": share}])
    trial._trial_info = SimpleNamespace(trial_resources=request)
    trial._epochs = loop.train_in(tmp_path, validated(TrainConfig, tree))
    assert [next(trial._epochs)["epoch"] for _ in range(2)] == [1, 2]
    assert trial.reset_config({}) and found == given_back


@pytest.mark.parametrize(
    "error, is_it",
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be ..."), True),
        (
            RuntimeError(
                "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
            ),
            True,
        ),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("CUDA driver error: out of memory"), True),
        (RuntimeError("Triton Error [CUDA]: out of memory"), True),
        (
            RuntimeError(
                "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"
            ),
            True,
        ),
        (RuntimeError("GET was unable to find an engine to execute this computation"), True),
        (
            RuntimeError(
                "NCCL error: unhandled cuda error\nLast error:\nCuda failure 2 'out of memory'"
            ),
            True,
        ),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError("the worker's host is out of memory"), False),
        (RuntimeError("CUDA error: device-side assert triggered"), False),
        (MemoryError("out of memory"), False),
    ],
)
def test_what_is_for_want_of_a_gpus_memory(error: Exception, is_it: bool) -> None:
    assert is_out_of_memory(error) == is_it
    outer = RuntimeError("compile: torch cannot compile cnn here")
    outer.__cause__ = error
    assert is_out_of_memory(outer) == is_it
