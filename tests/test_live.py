"""The view of a running sweep, fed with events by hand."""

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tfkd_ray.live import Progress

ROWS = ["ce", "lsr"]


class FakeTrial:
    """What the view reads of a Tune trial."""

    def __init__(self, name: str) -> None:
        self.trial_id = name
        self.config = {"trial": {"name": name, "epochs": 9}, "objective": {"name": name.split("-")[1]}}
        self.last_result = dict[str, Any]()


def view(tmp_path: Path, *, terminal: bool = False, width: int = 80) -> tuple[Progress, io.StringIO]:
    out = io.StringIO()
    progress = Progress(
        tmp_path, ROWS, 4, "val_accuracy", "max", Console(file=out, force_terminal=terminal, width=width)
    )
    progress.setup()
    return progress, out


def run(progress: Progress, name: str, epoch: int, value: float | None, failed: str | None = None) -> None:
    trial = FakeTrial(name)
    progress.on_trial_start(0, [], trial)
    if value is not None:
        progress.on_trial_result(0, [], trial, {"epoch": epoch, "val_accuracy": value})
    trial.last_result = {"failed": failed} if failed else {}
    progress.on_trial_complete(0, [], trial)


def test_piped_it_says_one_line_an_event(tmp_path: Path) -> None:
    progress, out = view(tmp_path)
    run(progress, "t0000-ce", 9, 0.9)
    run(progress, "t0001-lsr", 1, 0.5)
    run(
        progress,
        "t0002-ce",
        0,
        None,
        failed="RuntimeError: [/pytorch/third_party/gloo/x.cc:81] [enforce fail] timed out",
    )
    assert out.getvalue().splitlines() == [
        "t0000-ce: started",
        "t0000-ce: done, val_accuracy 0.9000",
        "t0001-lsr: started",
        "t0001-lsr: stopped early at epoch 1, val_accuracy 0.5000",
        "t0002-ce: started",
        "t0002-ce: failed: RuntimeError: [/pytorch/third_party/gloo/x.cc:81] [enforce fail] timed out",
    ]


@pytest.mark.parametrize("width", [20, 80, 200])
def test_on_a_terminal_it_is_one_screen(tmp_path: Path, width: int) -> None:
    progress, _ = view(tmp_path, terminal=True, width=width)
    run(progress, "t0000-ce", 9, 0.0)
    run(progress, "t0001-lsr", 0, None, failed="ValueError: " + "x" * 300)
    progress.on_trial_start(0, [], FakeTrial("t0002-lsr"))
    screen = io.StringIO()
    Console(file=screen, width=width).print(progress.table())
    progress.stop()
    lines = screen.getvalue().splitlines()
    assert len(lines) <= 24 and max(len(line) for line in lines) <= width
    if width >= 80:
        assert "2 of 4 trials, 1 running" in lines[0]
        assert "0.0000" in screen.getvalue() and "t0002 0/9" in screen.getvalue()
