"""Readers never block, lock or write: a sweep that ten of them look at all the time ends as one that nobody looks at."""

import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer

from tfkd_ray.cli import main
from tfkd_ray.experiment import read_records
from tfkd_ray.export import choose
from tfkd_ray.schema import ConfigError

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
]


def read_on(number: int, experiment: Path, out: Path, over: Any, counts: Any) -> None:
    """Reader `number` of ten: one verb, export's choice, or TensorBoard's reader, again and again."""
    os.nice(10)
    sys.stdout = sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115
    while not over.is_set():
        if number < len(VERBS):
            verb, *rest = VERBS[number]
            more = [*rest, str(out / f"{number}.html")] if verb == "report" else rest
            code = main([verb, str(experiment), *more])
            assert code in (0, 2), VERBS[number]
        elif number == len(VERBS):
            EventMultiplexer().AddRunsFromDirectory(str(experiment / "tb")).Reload()
        else:
            try:
                choose(experiment)
            except ConfigError as error:
                assert "no trial of full length yet" in str(error) or "not an experiment" in str(error), str(error)
        counts[number] += 1
        time.sleep(0.05)


def outcome(experiment: Path) -> list[Any]:
    """What a sweep found, without times."""
    timed = ("seconds", "images_per_s")
    return [
        (r.name, r.status, r.parameters, [{k: v for k, v in m.items() if k not in timed} for m in r.metrics])
        for r in read_records(experiment)
    ]


def sweep(folder: Path, name: str) -> subprocess.Popen[str]:
    (folder / "small.yaml").write_text(TREE)
    command = [sys.executable, "-m", "tfkd_ray", "tune", "small.yaml", "--name", name, "--storage", "results"]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


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
        over, counts = spawn.Event(), spawn.Array("i", 10)
        readers = [spawn.Process(target=read_on, args=(n, experiment, tmp_path, over, counts)) for n in range(10)]
        for reader in readers:
            reader.start()
        said, _ = driver.communicate(timeout=100)
        assert driver.returncode == 0, said
        during = list(counts)
        before = {p: (p.lstat().st_mtime_ns, p.lstat().st_size) for p in experiment.rglob("*")}
        while any(now < then + 2 for now, then in zip(counts, during, strict=True)):  # each reads it whole, too
            assert all(reader.is_alive() for reader in readers), list(counts)
            time.sleep(0.1)
        over.set()
        for reader in readers:
            reader.join(60)
        assert [reader.exitcode for reader in readers] == [0] * 10
    assert sum(during) >= 10, f"the readers were too late to see it run: {during}"
    assert {p: (p.lstat().st_mtime_ns, p.lstat().st_size) for p in experiment.rglob("*")} == before
    assert outcome(experiment) == outcome(tmp_path / "results/alone"), alone
