"""The time of an epoch's steps: the host's clock on the CPU, the device's own on a GPU."""

import time
from typing import Any

import pytest
import torch

from tfkd_ray.learn import loop
from tfkd_ray.learn.config import TrainConfig
from tfkd_ray.learn.loop import train
from tfkd_ray.learn.stopwatch import Stopwatch
from tfkd_ray.settings.schema import validated


class FakeEvent:
    """Stands for torch.cuda.Event: a GPU that comes to each event 2 s after the one before."""

    number = 0

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing
        self.at_ms = -1.0

    def record(self) -> None:
        FakeEvent.number += 1
        self.at_ms = 2000.0 * FakeEvent.number

    def elapsed_time(self, other: "FakeEvent") -> float:
        return other.at_ms - self.at_ms


def test_a_gpu_tells_the_time_that_it_worked_and_no_one_waits_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *given: pytest.fail("waited"))
    watch = Stopwatch(torch.device("cuda", 0))
    watch.stop()
    assert watch.seconds() == 2.0


def test_images_a_second_are_those_of_the_steps_and_leave_validation_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    validate = loop._validate

    def slowly(*given: Any, **more: Any) -> Any:
        time.sleep(0.2)
        return validate(*given, **more)

    monkeypatch.setattr(loop, "_validate", slowly)
    tree = {"objective": "ce", "student": {"name": "mlp", "hidden": [4]}, "epochs": 1}
    metrics = next(train(validated(TrainConfig, tree))).metrics
    steps_s = 1150 / metrics["images_per_s"]
    assert 0 < steps_s < metrics["seconds"] - 0.19
