"""An experiment's files, written and read."""

import resource
from pathlib import Path

import pytest

from tfkd_ray.settings.errors import ConfigError
from tfkd_ray.settings.files import DISK_ERRORS, write_text
from tfkd_ray.space.space import build_space
from tfkd_ray.store.experiment import (
    Record,
    append_line,
    best,
    read_experiment,
    read_metrics,
    read_records,
    study_and_space,
    write_experiment,
    write_record,
)


def record(folder: Path, number: int, status: str = "done", accuracy: float = 0.5) -> Record:
    name = f"t{number:04d}-ce"
    metrics = [{"epoch": 1.0, "val_accuracy": accuracy, "val_nll": accuracy}]
    return Record(
        folder / "trials" / name, number, name, "ce", status, {"optim.lr": 0.1}, {}, metrics=metrics
    )


def test_an_experiment_says_what_it_was_made_with(tmp_path: Path) -> None:
    tree = build_space({"objective": "ce", "seed": 3}).tree
    write_experiment(tmp_path, tree, ["tfkd", "tune"])
    about = read_experiment(tmp_path)
    assert about["space"] == tree and about["command"] == ["tfkd", "tune"]
    assert about["seeds"] == {"trials": 3, "proposals": 0, "split": 0}
    assert set(about["versions"]) == {"python", "tfkd_ray", "ray", "torch", "optuna"}


def test_records_read_back_in_order(tmp_path: Path) -> None:
    for number in (10, 2):
        write_record(record(tmp_path, number))
    assert [(r.number, r.status, r.parameters) for r in read_records(tmp_path)] == [
        (2, "done", {"optim.lr": 0.1}),
        (10, "done", {"optim.lr": 0.1}),
    ]


def test_a_file_that_may_not_grow_is_trouble_of_the_disk(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large") as raised:
            write_text(tmp_path / "a", "x" * 2000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert raised.value.errno in DISK_ERRORS and not list(tmp_path.iterdir())


def test_half_a_line_at_the_end_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 1}\n{"epoch": 2}\n{"epo')
    assert read_metrics(tmp_path) == [{"epoch": 1}, {"epoch": 2}]


def test_only_trials_of_full_length_can_be_best_and_of_equals_the_first_is(tmp_path: Path) -> None:
    records = [
        record(tmp_path, 0, "stopped", 0.9),
        record(tmp_path, 1),
        record(tmp_path, 2),
        record(tmp_path, 3, accuracy=0.4),
    ]
    records += [record(tmp_path, 4, accuracy=float("nan"))]
    first, last = best(records, "val_accuracy"), best(records, "val_nll")
    assert first is not None and first.number == 1 and last is not None and last.number == 3
    assert best(records[:1], "val_accuracy") is None


def test_what_is_no_experiment_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"not an experiment: there is no experiment.yaml in it"):
        read_experiment(tmp_path)
    (tmp_path / "experiment.yaml").write_text("layout: 99\n")
    with pytest.raises(ConfigError, match="layout 99, and this release reads layout 1"):
        read_experiment(tmp_path)
    (tmp_path / "experiment.yaml").write_text("layout: 1\n")
    with pytest.raises(ConfigError, match="has no 'space:' with a 'search:' in it"):
        read_experiment(tmp_path)


def test_a_line_after_one_that_was_cut_is_a_line_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    append_line(path, "one")
    path.write_bytes(path.read_bytes() + b"cu")
    append_line(path, "two")
    append_line(path, "three", durable=True)
    assert path.read_text() == "one\ncu\ntwo\nthree\n"


@pytest.mark.parametrize(
    "study, expected",
    [
        (None, ("tfkd", 1)),
        ("mine", ("mine", 1)),
        ("tfkd@2", ("tfkd", 2)),
        ("lab@home", ("lab@home", 1)),  # a name of the user's, in a database
        ("lab@home@13", ("lab@home", 13)),
    ],
)
def test_a_study_says_in_which_space_the_sweep_goes_on(
    study: str | None, expected: tuple[str, int]
) -> None:
    assert study_and_space(study) == expected
