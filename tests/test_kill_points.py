"""Verbs killed before each file access, a full temporary disk, five sweeps in one process."""

import contextlib
import gc
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import killed
import psutil
import pytest
from conftest import Run, is_whole
from test_faults import assert_no_orphans, tree

from tfkd_ray.learn.checkpoint import WEIGHTS, save_weights
from tfkd_ray.learn.loop import train_in
from tfkd_ray.run.confirm import LOGITS
from tfkd_ray.run.tune import build_tuner
from tfkd_ray.settings.files import write_text
from tfkd_ray.settings.yaml import dump_yaml
from tfkd_ray.space.arms import build_arms, new_comparison, read_comparison
from tfkd_ray.space.space import build_space
from tfkd_ray.store.experiment import Record, read_records, write_experiment, write_record

pytestmark = [pytest.mark.fault]


def killed_at(
    point: int,
    words: list[str],
    here: Path,
    below: Path,
    after: Path | None = None,
    limit_s: float = 100,
) -> bool:
    """Run `tfkd WORDS`; return True if it was killed before its end."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        [
            "tfkd_ray.run.tune",
            "tfkd_ray.run.confirm",
            "tfkd_ray.show.export",
            "tfkd_ray.show.report",
        ]
    )
    process = context.Process(target=killed.run, args=(words, here, below, point, after))
    process.start()
    process.join(limit_s)
    assert process.exitcode in (0, -signal.SIGKILL), (
        process.exitcode,
        (here / "said").read_text()[-2000:],
    )
    return process.exitcode != 0


def contents(folder: Path) -> dict[str, str]:
    """Return the digests of all files below a folder."""
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Return an experiment of one trial, without Ray."""
    experiment = tmp_path / "s" / "e"
    space = build_space({"student": {"name": "mlp", "hidden": [8]}, "epochs": 2, "objective": "ce"})
    write_experiment(experiment, space.tree, ["tfkd", "tune"])
    folder = experiment / "trials" / "t0000-ce"
    metrics = list(train_in(folder, space.example, about={"trial": "t0000-ce"}))
    write_text(folder / "metrics.jsonl", "".join(json.dumps(m) + "\n" for m in metrics))
    config = space.example.model_dump(mode="json")
    write_record(Record(folder, 0, "t0000-ce", "ce", "done", {}, config))
    return experiment


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_an_export_that_is_killed_at_any_file_leaves_nothing_or_all_and_the_next_one_is_whole(
    sweep: Path, tmp_path: Path
) -> None:
    before, out = contents(sweep), tmp_path / "out" / "x"
    for point in range(1, 100):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        was_killed = killed_at(
            point, ["export", str(sweep), "-o", str(out)], tmp_path, tmp_path / "out"
        )
        assert not out.exists() or is_whole(out), f"{point=}"
        assert contents(sweep) == before, f"{point=}"
        if not was_killed:
            break
        if point % 4 == 1 and not out.exists():
            assert not killed_at(
                1000, ["export", str(sweep), "-o", str(out)], tmp_path, tmp_path / "out"
            )
            assert is_whole(out) and [p.name for p in out.parent.iterdir()] == ["x"], f"{point=}"
    assert point > 8 and is_whole(out) and sorted(p.name for p in out.parent.iterdir()) == ["x"]


def test_a_report_that_is_killed_at_any_file_leaves_the_old_page_or_the_new_one(
    sweep: Path, tmp_path: Path
) -> None:
    before, out = contents(sweep), tmp_path / "out" / "r.html"
    out.parent.mkdir()
    for point in range(1, 100):
        out.write_text("the old page")
        was_killed = killed_at(
            point, ["report", str(sweep), "-o", str(out)], tmp_path, tmp_path / "out"
        )
        page = out.read_text()
        assert page == "the old page" or page.rstrip().endswith("</html>"), f"{point=}"
        assert contents(sweep) == before, f"{point=}"
        if not was_killed:
            break
    assert point > 2 and page != "the old page"


def comparison(storage: Path) -> Path:
    """Return a comparison of two arms, trained twice, without Ray and before its test."""
    directory = storage / "c"
    arms = [{"name": "ce", "objective": "ce"}, {"name": "ls", "objective": "lsr", "baseline": "ce"}]
    new_comparison(
        build_arms(
            {"title": "a try", "student": {"name": "mlp", "hidden": [8]}, "epochs": 1, "arms": arms}
        ),
        [1, 2],
        directory,
    )
    for number, run in enumerate(read_comparison(directory).runs_on_data):
        folder = directory / "trials" / run.name
        folder.mkdir(parents=True)
        save_weights(folder / WEIGHTS, run.config.build_student().state_dict(), {})
        config = run.config.model_dump(mode="json")
        objective = run.config.objective.name
        write_record(Record(folder, number, run.name, objective, "done", {}, config))
        write_text(
            folder / "metrics.jsonl",
            json.dumps({"epoch": 1, "train_loss": 1.0, "val_accuracy": 0.5}) + "\n",
        )
    return directory


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_comparison_that_is_killed_at_any_file_while_it_opens_the_test_split_has_opened_it_once(
    tmp_path: Path,
) -> None:
    made = comparison(tmp_path / "made" / "s")
    whole: dict[str, Any] = {}
    for point in [1000, *range(1, 1000)]:  # undisturbed first
        here = tmp_path / f"p{point}"
        shutil.copytree(made.parent, here / "s")
        directory, noted = here / "s" / "c", here / "s" / "test_openings.jsonl"
        was_killed = killed_at(point, ["resume", "s/c"], here, here / "s")
        logits = sorted(p.parent.name for p in directory.glob(f"trials/*/{LOGITS}"))
        assert noted.exists() or not logits, (
            f"{point=}: the test split was opened, and nobody can tell"
        )
        if was_killed:
            assert not killed_at(1000, ["resume", "s/c"], here, here / "s")
        result = json.loads((directory / "confirm.json").read_text())
        assert len(result.pop("opened")) == 1 == len(noted.read_text().splitlines()), f"{point=}"
        whole = whole or result
        assert result == whole, f"{point=}"
        if point < 1000 and not was_killed:
            break
        shutil.rmtree(here)
    assert point > 20


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_sweep_that_is_killed_between_its_last_trial_and_its_summary_has_lost_nothing(
    ray_cluster: str, tmp_path: Path, tfkd: Run
) -> None:
    """Kill at every third file access after the only trial's weights exist."""
    space = tree({"num_samples": 1}, epochs=2, checkpoint_every_s=1000)
    (tmp_path / "space.yaml").write_text(dump_yaml(space))
    experiment = tmp_path / "tfkd_results" / "e"
    weights = experiment / "trials" / "t0000-ce" / WEIGHTS
    for point in range(1, 100, 3):
        shutil.rmtree(experiment, ignore_errors=True)
        was_killed = killed_at(
            point, ["tune", "space.yaml", "--name", "e"], tmp_path, experiment, weights
        )
        if not was_killed:
            break
        ended = [r.metrics for r in read_records(experiment) if r.status == "done"]
        run = tfkd("resume", "tfkd_results/e")
        assert (
            run.returncode == 0 and "1 trials, " in run.stdout and "best: t0000-ce" in run.stdout
        ), run.stderr
        records = read_records(experiment)
        assert [(r.status, len(r.metrics)) for r in records] == [("done", 2)], f"{point=}"
        assert not ended or [r.metrics for r in records] == ended, (
            f"{point=}: an ended trial ran again"
        )
        assert_no_orphans(experiment)
    assert point > 6


@contextlib.contextmanager
def small_disk(place: Path, size: str) -> Iterator[Path]:
    """Yield a disk in memory."""
    place.mkdir()
    if os.geteuid() != 0:
        assert "CI" not in os.environ, "CI runs as root, so that it can mount"
        pytest.skip("mounting a disk needs root")
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        assert "CI" not in os.environ, done.stderr
        pytest.skip(f"this machine cannot mount: {done.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], capture_output=True)


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_a_full_temporary_disk_harms_no_sweep_that_writes_elsewhere(
    ray_cluster: str, tmp_path: Path, tfkd: Run
) -> None:
    (tmp_path / "space.yaml").write_text(dump_yaml(tree({"num_samples": 1}, epochs=2)))
    with small_disk(tmp_path / "t", "64k") as full:
        (full / "ballast").write_bytes(bytes(2**16))
        run = tfkd("tune", "space.yaml", "--name", "e", TMPDIR=str(full), XDG_CACHE_HOME=str(full))
        assert run.returncode == 0 and "Traceback" not in run.stderr, run.stderr
        for words in (
            ["status", "tfkd_results/e"],
            ["report", "tfkd_results/e"],
            ["export", "tfkd_results/e"],
        ):
            done = tfkd(*words, TMPDIR=str(full), XDG_CACHE_HOME=str(full))
            assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert [r.status for r in read_records(tmp_path / "tfkd_results" / "e")] == ["done"]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_five_sweeps_in_one_process_leave_no_files_threads_or_memory_behind(
    ray_cluster: str, tmp_path: Path
) -> None:
    """The first two are warm-up: libraries cache some files and memory."""
    process, found = psutil.Process(), []
    for number in range(5):
        build_tuner(tree({"num_samples": 2}, epochs=3), name=f"e{number}", storage=tmp_path).fit()
        gc.collect()
        found.append(
            (process.num_fds(), threading.active_count(), process.memory_info().rss / 2**20)
        )
    files, threads, memory = zip(*found, strict=True)
    assert files[4] <= files[1] and threads[4] <= threads[1] and memory[4] <= memory[1] + 20, found
