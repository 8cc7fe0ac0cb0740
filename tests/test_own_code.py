"""User code: searched last, run from the directory of `tfkd`, in every process; nothing else."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Run
from test_folder import write_folder

from tfkd_ray.launch.jobs import JOB_FOLDER, WORKING, stage_apart, submit_command
from tfkd_ray.settings import own_code
from tfkd_ray.store.experiment import read_experiment, read_records

MODULE = """
import numpy as np, torch

def make(split):
    n = int(open("count.txt").read())
    return np.random.default_rng(split == "test").integers(0, 256, (n, 1, 8, 8), dtype=np.uint8), torch.arange(n) % 4

def net(shape, num_classes):
    open("count.txt").close()
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, num_classes))
"""
SPACE = """
data: {name: own, path: "my_own:make", shape: [1, 8, 8], num_classes: 4}
student: "my_own:net"
objective: kd
teacher: {model: "my_own:net", epochs: 1}
epochs: 1
optim: {lr: {low: 0.01, high: 0.1}}
search: {num_samples: 2, stopping: none, sampler: random}
"""
TRAP = "raise SystemExit('{} of the working directory was run')"
SHADOWS = ("torch", "numpy", "ray", "yaml", "optuna", "pydantic", "tfkd_ray")


def lay_out(folder: Path) -> Path:
    """Write user code that opens a relative path, and other code that must not run."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "my_own.py").write_text(MODULE)
    (folder / "space.yaml").write_text(SPACE)
    (folder / "count.txt").write_text("80")
    for name in SHADOWS:
        (folder / f"{name}.py").write_text(TRAP.format(name))
    return folder


def python(code: str, *options: str, cwd: Path, **env: str) -> list[str]:
    """Return the lines that code prints, in a new process with its own path."""
    clean = {
        k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONSAFEPATH", JOB_FOLDER)
    }
    command = [sys.executable, *options, *(["-c", code] if code else [])]
    run = subprocess.run(
        command, cwd=cwd, env={**clean, **env}, capture_output=True, text=True, timeout=100
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()


# --- where modules are looked for --------------------------------------------------------------------------------


@pytest.mark.slow
def test_python_m_runs_nothing_that_merely_lies_in_the_working_directory(tmp_path: Path) -> None:
    lay_out(tmp_path)
    (tmp_path / "tfkd_ray.py").unlink()  # which Python itself would run
    assert "data" in "\n".join(python("", "-m", "tfkd_ray", "check", "space.yaml", cwd=tmp_path))


@pytest.mark.parametrize(
    "options, path, expected", [((), "", ["HERE"]), (("-P",), "", []), (("-P",), "a", ["HERE/a"]), ((), "a", ["HERE", "HERE/a"])]
)  # fmt: skip
def test_workers_look_where_the_driver_does_before_the_library(
    options: tuple[str, ...], path: str, expected: list[str], tmp_path: Path
) -> None:
    code = "from tfkd_ray.settings.own_code import before_the_library as b; [print(p) for p in b()]"
    env = {"PYTHONPATH": str(tmp_path / path)} if path else {}
    assert python(code, *options, cwd=tmp_path, **env) == [
        e.replace("HERE", str(tmp_path)) for e in expected
    ]


def test_a_process_enters_the_drivers_place_and_looks_there_last(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    enter = "from tfkd_ray.settings import own_code; own_code.enter({}); import os, sys; print(os.getcwd()); print(sys.path[-1])"
    place = {"directory": str(tmp_path / "a"), "path": [], "safe": True}
    assert python(enter.format(place), cwd=tmp_path / "b") == [str(tmp_path / "a")] * 2
    gone = {"directory": str(tmp_path / "gone"), "path": [str(tmp_path / "lib")], "safe": False}
    assert python(enter.format(gone), cwd=tmp_path / "b") == [
        str(tmp_path / "b"),
        str(tmp_path / "lib"),
    ]


# --- sweeps --------------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.ray
def test_trials_and_teachers_run_where_the_sweep_was_started(
    ray_cluster: str, tfkd: Run, tmp_path: Path
) -> None:
    work = lay_out(tmp_path / "w{name}%s{}")
    name = "e{name}%(x)s{0}"
    run = tfkd("tune", "space.yaml", "--name", name, cwd=work, PYTHONSAFEPATH="1", timeout=400)
    assert run.returncode == 0, run.stderr
    experiment = work / "tfkd_results" / name
    assert [r.status for r in read_records(experiment)] == ["done", "done"], (
        "a trial's actor is used again"
    )
    assert read_experiment(experiment)["directory"] == str(work)
    (tmp_path / "elsewhere").mkdir()
    more = tfkd(
        "resume", str(experiment), "--add-trials", "1", cwd=tmp_path / "elsewhere", timeout=400
    )
    assert (
        more.returncode == 0 and f"run in {work}, where the experiment was begun" in more.stderr
    ), more.stderr
    assert [r.status for r in read_records(experiment)] == ["done"] * 3


@pytest.mark.long
@pytest.mark.ray
def test_a_broken_image_whose_name_is_no_utf8_fails_its_trials_with_the_reason(
    ray_cluster: str, tfkd: Run, tmp_path: Path
) -> None:
    root = write_folder(tmp_path / "photos")
    for k in range(12):
        broken = root / f"train/class 0/{k:03}.jpg"
        if broken.exists():
            broken.rename(Path(os.fsdecode(os.fsencode(broken.parent) + b"/caf\xe9%d.jpg" % k)))
    for path in (root / "train/class 0").glob("caf*"):
        path.write_bytes(b"no image")
    data = {"name": "image_folder", "root": str(root), "num_classes": 2, "image_size": 16}
    space = {
        "data": data,
        "objective": "ce",
        "epochs": 1,
        "optim": {"lr": {"low": 0.01, "high": 0.1}, "batch_size": 4},
    }
    search = {"num_samples": 1, "sampler": "random"}
    (tmp_path / "space.yaml").write_text(json.dumps({**space, "student": "mlp", "search": search}))
    run = tfkd("tune", "space.yaml", "--name", "e", PYTHONIOENCODING="utf-8")
    experiment = tmp_path / "tfkd_results/e"
    (record,) = read_records(experiment)
    assert record.status == "failed" and record.lost == 0 and "\\udce9" in str(record.reason)
    assert run.returncode == 1 and "cannot be read as an image" in run.stdout, run.stderr
    assert "\\udce9" in (record.folder / "error.txt").read_text(encoding="utf-8")
    report = tfkd("report", str(experiment))
    assert report.returncode == 0, report.stderr


@pytest.mark.ray
def test_a_budget_that_ends_before_a_trial_has_begun_is_told_so(
    ray_cluster: str, tfkd: Run, tmp_path: Path
) -> None:
    (tmp_path / "space.yaml").write_text(
        "{objective: ce, epochs: 2, optim: {lr: {low: 0.01, high: 0.1}}}"
    )
    run = tfkd("tune", "space.yaml", "--name", "e", "--time-budget", "0.001")
    assert "no trial had begun when the sweep ended" in run.stdout, run.stdout + run.stderr
    assert "ended early: search.time_budget_s: " in run.stdout


@pytest.mark.long
@pytest.mark.ray
def test_groups_run_where_the_sweep_was_started(
    ray_cluster: str, tfkd: Run, tmp_path: Path
) -> None:
    work = lay_out(tmp_path / "work")
    words = ("objective=ce", "teacher=null", "workers=2", "search.num_samples=1")
    run = tfkd(
        "tune", "space.yaml", *words, "--name", "e", cwd=work, PYTHONSAFEPATH="1", timeout=400
    )
    assert run.returncode == 0, run.stderr
    assert [r.status for r in read_records(work / "tfkd_results/e")] == ["done"]


# --- jobs ----------------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.slow
def test_a_job_has_the_working_directory_beside_the_package_not_before_it(tmp_path: Path) -> None:
    work, folder = lay_out(tmp_path / "work"), tmp_path / "job"
    folder.mkdir()
    assert stage_apart(work, folder, work / "space.yaml") == "space.yaml"
    assert {p.name for p in folder.iterdir()} == {"tfkd_ray", WORKING}, (
        "all that Ray lets a job's processes import"
    )
    command = submit_command("http://x", "job", folder, ["python", "-m", "tfkd_ray"], WORKING)
    env = json.loads(command[command.index("--runtime-env-json") + 1])["env_vars"]
    assert env[JOB_FOLDER] == WORKING
    said = python(
        "",
        "-m",
        "tfkd_ray",
        "check",
        "space.yaml",
        cwd=folder,
        PYTHONPATH=str(folder),
        **{JOB_FOLDER: WORKING},
    )
    assert any("data" in line for line in said)
    enter = (
        "from tfkd_ray.settings import own_code; own_code.enter({}); import os; print(os.getcwd())"
    )
    place = {"directory": "/on/the/head", "path": [], "safe": True}
    there = python(enter.format(place), cwd=folder, PYTHONPATH=str(folder), **{JOB_FOLDER: WORKING})
    assert there == [str(folder / WORKING)], "each node has a copy of its own"


def test_the_directory_of_an_earlier_experiment_is_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    earlier = tmp_path / "earlier"
    earlier.mkdir()
    monkeypatch.chdir(tmp_path)
    assert str(earlier) in (own_code.remember(str(earlier)) or "")
    assert own_code.here()["directory"] == str(earlier)
    assert own_code.remember(str(tmp_path)) is None
    assert own_code.here()["directory"] == str(tmp_path)
