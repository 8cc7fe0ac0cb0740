"""The steps of `make test-gpu`: one that fails, hangs or gives nothing costs the others nothing."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import OBJECTIVES

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu_steps

    yield gpu_steps
    del sys.modules["gpu_steps"]


CODE = {
    "good": "open({place!r}, 'w').write('{{}}')",
    "bad": "raise SystemExit('a reason')",
    "slow": "import time; time.sleep(60)",
    "silent": "pass",
}
ENDS = {
    "good": "ok",
    "bad": "failed (1)",
    "slow": "did not end within 0.5 s",
    "silent": "gave no figures",
}


@pytest.mark.slow
def test_each_step_has_its_own_process_limit_and_files(steps: Any, tmp_path: Path) -> None:
    for name, code in CODE.items():
        (tmp_path / f"{name}.json").write_text("of a run before")
        command = [sys.executable, "-S", "-c", code.format(place=str(tmp_path / f"{name}.json"))]
        start = time.monotonic()
        row = steps.run_step(command, name, 0.5 if name == "slow" else 60, tmp_path, {})
        assert row["step"] == name and row["ended"] == ENDS[name]
        assert time.monotonic() - start < 30
        assert (tmp_path / f"{name}.json").exists() is (name == "good")
    assert (tmp_path / "bad.log").read_text() == "a reason\n"


def test_all_steps_run_in_their_order_within_15_minutes_whatever_ends_badly(
    steps: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_step(command: list[str], name: str, limit_s: float, *rest: Any) -> dict[str, Any]:
        return {"step": name, "ended": "failed (1)" if name == "tests" else "ok", "seconds": 1}

    monkeypatch.setattr(steps, "run_step", run_step)
    assert steps.run_all(list(steps.STEPS), tmp_path, {}) == 1
    rows = json.loads((tmp_path / "summary.json").read_text())
    assert [row["step"] for row in rows] == list(steps.STEPS)
    assert sum(limit for _, limit in steps.STEPS.values()) <= 900
    assert steps.run_all(["driver"], tmp_path, {}) == 0


@pytest.mark.slow
def test_the_step_of_tests_compiles_nothing_and_has_all_objectives(steps: Any) -> None:
    command = [sys.executable, "-m", "pytest", "--collect-only", "-vv", *steps.UNCOMPILED]
    run = subprocess.run(command, cwd=BENCHMARKS.parent, capture_output=True, text=True)
    learn = re.findall(r"test_students_learn_real_digits\[(.*)\]", run.stdout)
    assert learn == ["fp32-off", "bf16-off"], run.stdout + run.stderr
    waits = re.findall(r"test_no_step_waits_for_the_device\[(.*)\]", run.stdout)
    assert set(waits) == {f"{o.name}-{kept}" for o in OBJECTIVES for kept in ("bank", "online")}


def test_without_a_gpu_the_simulated_part_runs_and_that_is_said(
    steps: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    called: list[list[str]] = []

    def run(command: list[str], **more: Any) -> Any:
        called.append(command)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(steps.subprocess, "run", run)
    monkeypatch.setattr(sys, "argv", ["gpu_steps.py"])
    assert steps.main() == 0
    assert "no CUDA GPU here (" in capsys.readouterr().out
    assert called[0][-4:] == ["-m", "", "tests/test_fake_gpu.py", "tests/test_gpu_look.py"]


def test_a_step_ends_with_the_process_that_runs_it(
    steps: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`run_step` ends it whatever is raised, and SIGTERM raises."""
    monkeypatch.setattr(steps, "run_all", lambda *given: os.kill(os.getpid(), signal.SIGTERM))
    monkeypatch.setattr(sys, "argv", ["gpu_steps.py", "--rehearse", "--out", str(tmp_path)])
    before = signal.signal(signal.SIGTERM, lambda number, frame: None)
    try:
        with pytest.raises(SystemExit, match="143"):
            steps.main()
    finally:
        signal.signal(signal.SIGTERM, before)
