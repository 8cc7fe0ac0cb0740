"""Experiments of earlier releases open in this one: tests/data/experiment-VERSION, one a release.

Made by: python tests/data/make_experiment.py tests/data/experiment-0.1.0
"""

import json
import shutil
from pathlib import Path

import pytest
from conftest import Run
from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer

from tfkd_ray.learn.data import Digits
from tfkd_ray.learn.teachers import load_teacher
from tfkd_ray.run.confirm import openings
from tfkd_ray.run.priors import prior_trials
from tfkd_ray.run.searcher import OptunaSearcher
from tfkd_ray.show.status import status
from tfkd_ray.space.arms import arms_of, untuned
from tfkd_ray.space.space import build_space
from tfkd_ray.store.experiment import read_experiment, read_records, read_teachers

RELEASES = sorted((Path(__file__).parent / "data").glob("experiment-*"))
ENDS = {"kd": 2, "tfkd_reg": 1, "ce": 2, "lsr": 1}
"""Trials of full length, by objective; two were stopped."""


@pytest.fixture(params=RELEASES, ids=lambda p: p.name)
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Return a copy elsewhere: an experiment does not depend on its place."""
    shutil.copytree(request.param, tmp_path / "elsewhere", symlinks=True)
    return tmp_path / "elsewhere"


def test_it_is_small_and_names_no_machine() -> None:
    for release in RELEASES:
        files = [p for p in release.rglob("*") if p.is_file()]
        assert sum(p.stat().st_size for p in files) < 200_000 and len(files) > 40
        assert not [p for p in files if b"/home/" in p.read_bytes() or b"/tmp/" in p.read_bytes()]
        assert not list(release.rglob("*.pkl")), "resume needs none of Ray's pickles"


def test_the_readers_read_it(storage: Path, tfkd_inside: Run) -> None:
    found = status(storage / "sweep")
    assert (
        found["state"] == "finished"
        and found["trials"]["done"] == 6
        and found["trials"]["stopped"] == 2
    )
    assert {name: row["done"] for name, row in found["rows"].items()} == ENDS
    assert found["best"]["value"] == max(
        r.last["val_accuracy"] for r in read_records(storage / "sweep") if r.status == "done"
    )
    for argv in (["status"], ["best"], ["trials", "--sort", "val_accuracy:desc"], ["report"]):
        done = tfkd_inside(*argv, str(storage / "sweep"))
        assert done.returncode == 0 and done.stdout, done.stderr
    assert (
        json.loads(tfkd_inside("best", str(storage / "sweep"), "--json").stdout)["best"][0]["trial"]
        == found["best"]["trial"]
    )
    (teacher,) = read_teachers(storage)
    assert teacher["name"] in tfkd_inside("teacher", "list", "--storage", str(storage)).stdout


def test_tensorboard_reads_it(storage: Path) -> None:
    events = EventMultiplexer().AddRunsFromDirectory(str(storage / "sweep/tb")).Reload()
    for record in read_records(storage / "sweep"):
        seen = [(s.step, s.value) for s in events.Scalars(record.name, "hp/value")]
        assert seen == [(m["epoch"], pytest.approx(m["val_accuracy"])) for m in record.metrics]


def test_confirm_finds_its_arms_and_its_teacher(
    storage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tfkd_ray.space.baselines.FEWEST_TRIALS", 1)
    compared = arms_of(storage / "sweep")
    assert {arm.part for arm in compared.arms} == {
        "candidate",
        "baseline",
        "reference",
    } and untuned(storage / "sweep") == {}
    (run,) = build_space(compared.named("t0000-kd").config.model_dump(mode="json")).teacher_runs()
    (teacher,) = read_teachers(
        storage
    )  # of an earlier loop version: trained again, with an otherwise equal fingerprint
    monkeypatch.setattr("tfkd_ray.learn.teachers.LOOP_VERSION", teacher["loop_version"])
    load_teacher(run, storage)  # its fingerprint and checksum are unchanged
    assert openings(storage, Digits()) == []


def test_its_study_is_one_to_go_on_with_and_to_learn_from(storage: Path) -> None:
    space = build_space(read_experiment(storage / "sweep")["space"])
    searcher = OptunaSearcher(space, storage / "sweep/study.journal")
    assert searcher.remaining() == 0 and searcher.known() == {
        r.number: r.name for r in read_records(storage / "sweep")
    }
    assert len(prior_trials(space, [storage / "sweep"])) == 6


@pytest.mark.slow
@pytest.mark.ray
def test_trials_are_added_to_it(ray_cluster: str, storage: Path, tfkd_inside: Run) -> None:
    before = read_records(storage / "sweep")
    done = tfkd_inside("resume", str(storage / "sweep"), "--add-trials", "4")
    assert done.returncode == 0, done.stderr
    after = read_records(storage / "sweep")
    kept = [(r.number, r.parameters, r.metrics) for r in after[: len(before)]]
    assert kept == [(r.number, r.parameters, r.metrics) for r in before]
    assert [r.number for r in after] == list(range(12)) and {r.status for r in after} <= {
        "done",
        "stopped",
    }
