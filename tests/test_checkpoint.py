"""Run states and weights: written atomically, checked, and never executed."""

import contextlib
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from tfkd_ray.learn.checkpoint import (
    BEFORE,
    FRESH,
    LAST,
    load_state,
    load_weights,
    save_state,
    save_weights,
)
from tfkd_ray.settings.files import write_whole

STATE = {"model": {"w": torch.arange(3.0)}, "epoch": 2, "history": [{"epoch": 1.0}], "run": "abc"}


def test_a_state_reads_back(tmp_path: Path) -> None:
    save_state(tmp_path, STATE)
    state = load_state(tmp_path)
    assert (
        state is not None
        and state["model"]["w"].equal(STATE["model"]["w"])
        and state["history"] == [{"epoch": 1.0}]
    )  # type: ignore[index]


def test_no_state_is_none(tmp_path: Path) -> None:
    assert load_state(tmp_path) is None


def test_the_state_before_is_kept_and_no_other(tmp_path: Path) -> None:
    for epoch in (1, 2, 3):
        save_state(tmp_path, {"epoch": epoch})
    assert sorted(p.name for p in tmp_path.iterdir()) == [BEFORE, LAST]


@pytest.mark.parametrize("damage", ["cut", "flipped", "emptied"])
def test_a_damaged_state_is_said_and_the_one_before_is_used(tmp_path: Path, damage: str) -> None:
    save_state(tmp_path, {"epoch": 1})
    save_state(tmp_path, {"epoch": 2})
    content = bytearray((tmp_path / LAST).read_bytes())
    content[200] ^= 1
    (tmp_path / LAST).write_bytes(
        {"cut": content[:300], "flipped": content, "emptied": b""}[damage]
    )
    with pytest.warns(UserWarning, match="damaged"):
        assert load_state(tmp_path) == {"epoch": 1}


class Killed(BaseException):
    """Signal 9 at a system call."""


@pytest.mark.parametrize("last_is", ["whole", "damaged", "gone"])
@pytest.mark.parametrize("moves", [0, 1, 2])
def test_a_kill_between_any_two_moves_leaves_a_whole_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moves: int, last_is: str
) -> None:
    """Kill `save_state` before its first, second or third rename: a whole state remains."""
    for epoch in (1, 2):
        save_state(tmp_path, {"epoch": epoch})
    if last_is == "damaged":
        (tmp_path / LAST).write_bytes((tmp_path / LAST).read_bytes()[:300])
    elif last_is == "gone":
        (tmp_path / LAST).unlink()
    made: list[str] = []
    replace = Path.replace

    def moved(self: Path, target: Path) -> Path:
        if len(made) == moves:
            raise Killed
        made.append(target.name)
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", moved)
    with contextlib.suppress(Killed):
        save_state(tmp_path, {"epoch": 3})
    monkeypatch.undo()
    said: list[str] = []
    found = load_state(tmp_path, said.append)
    assert found is not None
    expected = 2 if last_is == "whole" else 1
    if FRESH in made and not (last_is == "whole" and BEFORE not in made):
        expected = 3
    assert found["epoch"] == expected
    save_state(tmp_path, {"epoch": 4})  # and it resumes from there
    assert load_state(tmp_path) == {"epoch": 4} and not (tmp_path / FRESH).exists()


def test_a_crash_while_writing_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_whole(tmp_path / "f", b"old")
    monkeypatch.setattr(
        os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(OSError, match="No space"):
        write_whole(tmp_path / "f", b"new")
    assert (tmp_path / "f").read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["f"]


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.path,))


def test_reading_a_state_never_runs_code(tmp_path: Path) -> None:
    save_state(tmp_path, {"epoch": Bomb(tmp_path / "boom")})
    with pytest.raises(pickle.UnpicklingError):
        load_state(tmp_path)
    assert not (tmp_path / "boom").exists()


def test_weights_read_back_and_damage_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    digest = save_weights(path, {"w": torch.arange(3.0)}, {"run": "abc"})
    assert load_weights(path, digest)["w"].equal(torch.arange(3.0))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="damaged"):
        load_weights(path, digest)


def test_where_there_is_no_room_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Free space on a full disk is left for the sweep's own records."""
    write_whole(tmp_path / "f", b"old")
    monkeypatch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(100, 97, 3))  # type: ignore[attr-defined]
    write_whole(tmp_path / "f", b"new")
    with pytest.raises(OSError, match=r"No space left on device: '.*f'"):
        write_whole(tmp_path / "f", b"four")
    assert (tmp_path / "f").read_bytes() == b"new" and len(list(tmp_path.iterdir())) == 1
