"""Readers never block, lock or write: with ten of them, a sweep ends as without them."""

import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tfkd_ray.cli.main import main
from tfkd_ray.store.experiment import read_records

TREE = """
student: {name: mlp, hidden: [8]}
epochs: 9
checkpoint_every_s: 0
objective: [{name: tfkd_reg, alpha: {low: 0.1, high: 0.9}}, ce]
optim: {lr: {low: 0.01, high: 0.5, log: true}}
search: {num_samples: 12, max_concurrent: 1}
"""
VERBS = [
    ["status"],
    ["status", "--json"],
    ["best"],
    ["best", "--json"],
    ["trials"],
    ["trials", "-o", "csv"],
    ["logs", "0"],
    ["report", "-o"],
    ["tensorboard"],
    ["export", "-o"],
]


def read_once(verb: str, rest: list[str], experiment: Path, out: Path) -> int:
    """Run a verb once, with its output in `out`; return its exit code."""
    if verb == "tensorboard":
        return shown(experiment)
    more = [str(out / verb)] if rest == ["-o"] else []
    try:
        return main([verb, str(experiment), *rest, *more])
    finally:
        shutil.rmtree(out / verb, ignore_errors=True)


def shown(experiment: Path) -> int:
    """Run `tfkd tensorboard`, ask for its runs once, end it, and return its exit code."""
    command = [sys.executable, "-m", "tfkd_ray", "tensorboard", str(experiment), "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as board:
        assert board.stderr is not None
        first = board.stderr.readline()
        if url := re.search(r"http://127\.0\.0\.1:\d+/", first):
            with urllib.request.urlopen(f"{url[0]}data/runs", timeout=30) as answer:
                assert isinstance(json.load(answer), list)
            board.terminate()
        board.stderr.read()
    return board.returncode


def read_on(
    number: int, experiment: Path, out: Path, ended: Any, over: Any, counts: Any, wholes: Any
) -> None:
    """Run reader `number` of ten in a loop; only during the sweep may there be nothing to read."""
    os.nice(10)
    sys.stdout = sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115
    verb, *rest = VERBS[number]
    while not over.is_set():
        whole = ended.is_set()
        code = read_once(verb, rest, experiment, out)
        assert code in ((0,) if whole else (0, 2)), (VERBS[number], code)
        counts[number] += 1
        wholes[number] += whole
        time.sleep(0.05)


def outcome(experiment: Path) -> list[Any]:
    """Return the results of a sweep, without times."""
    timed = ("seconds", "images_per_s")
    return [
        (
            r.name,
            r.status,
            r.parameters,
            [{k: v for k, v in m.items() if k not in timed} for m in r.metrics],
        )
        for r in read_records(experiment)
    ]


def sweep(folder: Path, name: str) -> subprocess.Popen[str]:
    (folder / "small.yaml").write_text(TREE)
    command = [
        sys.executable,
        "-m",
        "tfkd_ray",
        "tune",
        "small.yaml",
        "--name",
        name,
        "--storage",
        "results",
    ]
    return subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.mark.fault
@pytest.mark.slow
@pytest.mark.ray
def test_ten_readers_disturb_nothing(ray_cluster: str, tmp_path: Path) -> None:
    alone, _ = sweep(tmp_path, "alone").communicate(timeout=100)
    experiment = tmp_path / "results/watched"
    with sweep(tmp_path, "watched") as driver:
        while not (experiment / "experiment.yaml").exists():
            assert driver.poll() is None
            time.sleep(0.02)
        spawn = multiprocessing.get_context("spawn")
        ended, over = spawn.Event(), spawn.Event()
        counts, wholes = spawn.Array("i", 10), spawn.Array("i", 10)
        readers = [
            spawn.Process(
                target=read_on, args=(n, experiment, tmp_path, ended, over, counts, wholes)
            )
            for n in range(10)
        ]
        for reader in readers:
            reader.start()
        said, _ = driver.communicate(timeout=100)
        assert driver.returncode == 0, said
        during = list(counts)
        ended.set()
        before = {p: (p.lstat().st_mtime_ns, p.lstat().st_size) for p in experiment.rglob("*")}
        while not all(wholes):  # each reads everything, too, and then finds something
            assert all(reader.is_alive() for reader in readers), list(wholes)
            time.sleep(0.1)
        over.set()
        for reader in readers:
            reader.join(60)
        assert [reader.exitcode for reader in readers] == [0] * 10
    assert sum(during) >= 10, f"the readers were too late to see it run: {during}"
    assert {p: (p.lstat().st_mtime_ns, p.lstat().st_size) for p in experiment.rglob("*")} == before
    assert outcome(experiment) == outcome(tmp_path / "results/alone"), alone
