"""Image files decoded in processes and from the cache of smaller images: the same images, whatever fails."""

import errno
import json
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image
from test_folder import VIEWS, photograph, write_folder
from torch import Tensor

from tfkd_ray.learn import images as images_module
from tfkd_ray.learn import reader, shrunk, teachers
from tfkd_ray.learn.config import TrainConfig
from tfkd_ray.learn.image_files import ImageFolder
from tfkd_ray.learn.images import Files, FolderSet, crop_box, decode_into
from tfkd_ray.settings.errors import ConfigError
from tfkd_ray.settings.schema import validated

SIDE = 28
"""For which the cache has a short side of 32."""


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Yield a folder of 20 train images of 40 to 70 pixels, with a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield write_folder(tmp_path / "images", train=10)
    reader.end_readers()


def read(root: Path, *, crops: bool = True, batch: int = 10, **settings: Any) -> Tensor:
    """Return all train images, uint8 [20, 3, S, S]."""
    data = ImageFolder(root=root, num_classes=2, image_size=SIDE, val_fraction=0.0, **settings)
    found = data.load()[0]
    assert isinstance(found, FolderSet)
    crop = VIEWS.view(3, 1, found.official_size).crop[found.positions] if crops else None
    return torch.cat(list(found.read(list(torch.arange(len(found)).split(batch)), crop)))


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["none", "raw", 256])
def test_processes_give_the_images_of_threads(root: Path, cache: Any) -> None:
    for crops in (True, False):
        threads = read(root, crops=crops, cache=cache)
        assert read(root, crops=crops, cache=cache, decode_in="processes", readers=2).equal(threads)


@pytest.mark.slow
@pytest.mark.parametrize("when", ["idle", "at work"])
def test_a_killed_reader_is_started_again_and_the_images_are_unchanged(
    when: str, root: Path
) -> None:
    expected = read(root, decode_in="processes", readers=1)
    (idle,) = reader._idle[3 * SIDE * SIDE]
    killed = idle._process
    if when == "at work":  # it is asked, and does not come to an answer
        os.kill(killed.pid, signal.SIGSTOP)
        threading.Timer(1.0, os.kill, [killed.pid, signal.SIGKILL]).start()
    else:
        os.kill(killed.pid, signal.SIGKILL)
        killed.wait()
    assert read(root, decode_in="processes", readers=1).equal(expected)
    assert idle._process is not killed


@pytest.mark.slow
def test_a_reader_that_could_not_be_started_again_is_started_by_the_next_request(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = read(root, decode_in="processes", readers=1)
    (idle,) = reader._idle[3 * SIDE * SIDE]
    idle._process.kill()
    with monkeypatch.context() as patch:
        patch.setattr(reader.subprocess, "Popen", Mock(side_effect=BlockingIOError("no process")))
        with pytest.raises(BlockingIOError):
            read(root, decode_in="processes", readers=1)
    assert read(root, decode_in="processes", readers=1).equal(expected)


@pytest.mark.slow
def test_an_image_that_cannot_be_decoded_in_a_process_is_named(root: Path) -> None:
    bad = root / "train" / "class 0" / "004.jpg"
    bad.write_bytes(bad.read_bytes()[:200])
    with pytest.raises(ConfigError, match=r"class 0/004\.jpg: cannot be read as an image"):
        read(root, decode_in="processes", readers=1)


def test_images_over_which_readers_die_are_named(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader.sys, "executable", "false")
    with pytest.raises(reader.ReaderDied, match=r"3 reader processes died over train/class 0/000"):
        read(root, decode_in="processes", readers=1)


def test_validation_from_raw_pixels_is_that_from_the_files_and_crops_are_alike(root: Path) -> None:
    assert read(root, crops=False, cache="raw").equal(read(root, crops=False))
    raw, plain = read(root, cache="raw"), read(root)
    assert not raw.equal(plain) and (raw.float() - plain.float()).abs().mean() < 12
    jpeg = read(root, crops=False, cache=256)
    assert (jpeg.float() - read(root, crops=False).float()).abs().mean() < 4


def test_crops_of_raw_pixels_are_those_of_the_whole_image(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = Files("x", root, SIDE, "raw")
    names = [f"train/{path.parent.name}/{path.name}" for path in (root / "train").glob("*/*.jpg")]
    crops = torch.rand(len(names), 4, generator=torch.Generator().manual_seed(0)).tolist()
    found = np.zeros((2, len(names), 3, SIDE, SIDE), np.uint8)
    real = np.empty
    monkeypatch.setattr(shrunk.np, "empty", lambda *args: real(*args) * 0 + 255)  # rows not read
    for out in found:  # made, then read
        decode_into(files, names, crops, out)
    for k, name in enumerate(names):
        with Image.open(root / name) as image:
            wide, high = (int(files.short * side / min(image.size)) for side in image.size)
            image.draft(None, (2 * wide, 2 * high))
            small = image.convert("RGB").resize((wide, high), Image.Resampling.BILINEAR)
        left, top, w, h = crop_box(crops[k], wide, high)
        box = (left, top, left + w, top + h)
        cut = small.convert("RGBX").resize((SIDE, SIDE), Image.Resampling.BILINEAR, box)
        expected = np.asarray(cut)[..., :3].transpose(2, 0, 1)
        assert (found[:, k] == expected).all(), name


@pytest.mark.parametrize("cache", ["raw", 256])
def test_a_kept_image_is_decoded_no_more_and_a_damaged_one_again(
    root: Path, cache: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = read(root, cache=cache)
    decoded: list[Path] = []
    real = images_module.opened_as

    def counted(name: str, path: Path, view: Any) -> Image.Image:
        decoded.append(path)
        return real(name, path, view)

    monkeypatch.setattr(images_module, "opened_as", counted)
    assert read(root, cache=cache).equal(first) and not decoded
    kept = sorted(path for path in shrunk.small_images().rglob("*") if path.is_file())
    assert len(kept) == 20
    kept[0].write_bytes(kept[0].read_bytes()[:30])
    kept[1].write_bytes(b"")
    kept[2].write_bytes(bytes(8))
    assert read(root, cache=cache).equal(first) and len(decoded) == 3
    changed = root / "train" / "class 0" / "003.jpg"
    photograph(77, 60, 60).save(changed)
    assert not read(root, cache=cache).equal(first) and decoded[3:] == [changed]
    changed.unlink()
    with pytest.raises(ConfigError, match=r"003\.jpg: cannot be read as an image: No such file"):
        read(root, cache=cache)


@pytest.mark.parametrize(
    "decode_in", ["threads", pytest.param("processes", marks=pytest.mark.slow)]
)
def test_without_room_the_pixels_are_the_same_and_that_is_said_once(
    root: Path,
    tmp_path: Path,
    decode_in: Any,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    first = read(root, cache=256)
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert read(root, cache=256, decode_in=decode_in, readers=2).equal(first)
    assert capfd.readouterr().err.count("images cannot be kept in") == 1
    data = ImageFolder(root=root, num_classes=2, image_size=SIDE, cache="raw")
    monkeypatch.setattr("tfkd_ray.learn.image_files.free_bytes", lambda path: 1000.0)
    assert any("data.cache: raw may need" in note for note in data.notes())


@pytest.mark.parametrize("cache", ["raw", 256])
def test_a_disk_that_is_full_costs_time_alone(
    root: Path, cache: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def full(path: Path, content: bytes) -> int:
        with path.open("wb") as file:
            file.write(content[:100])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        found = read(root, cache=cache)
    said = capfd.readouterr().err
    assert said.count("images cannot be kept in") == said.count("No space left on device") == 1
    assert not [path for path in shrunk.small_images().rglob("*") if path.is_file()]
    assert read(root, cache=cache).equal(found)


def test_the_cache_is_part_of_the_datas_identity_and_readers_are_not(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = ImageFolder(root=root, num_classes=2, image_size=224)
    of = [
        data.model_copy(update=update).identity()
        for update in ({}, {"cache": "raw"}, {"cache": 256}, {"decode_in": "processes"})
    ]
    assert of[0] == of[3] and not {"cache", "decode_in"} & set(of[0])
    assert of[1]["cache"] == "raw, short side 256, bilinear"
    assert of[2]["cache"] == "256, short side 256, bilinear, JPEG 90"
    tree: dict[str, Any] = {"objective": "kd", "student": "cnn", "teacher": {"model": "cnn"}}
    tree["optim"] = {"batch_size": 4}
    runs, banks = set(), set()
    for cache in ("none", "raw", 256):
        run = validated(TrainConfig, {**tree, "data": {**data.model_dump(), "cache": cache}})
        runs |= {run.fingerprint(), run.teacher_runs()[0].fingerprint()}
        monkeypatch.setattr(teachers, "is_here", lambda *given: True)
        monkeypatch.setattr(teachers, "describe", lambda *given: {"sha256": "the same"})
        monkeypatch.setattr(teachers, "Bank", lambda load, of, **more: banks.add(json.dumps(of)))
        teachers.bank_of(run, root)
    assert len(runs) == 6 and len(banks) == 3


def test_reader_processes_need_as_many_cpus(root: Path) -> None:
    data = {"name": "image_folder", "root": str(root), "num_classes": 2, "readers": 3}
    tree = {"objective": "ce", "student": "cnn", "cpus_per_worker": 2, "optim": {"batch_size": 4}}
    validated(TrainConfig, {**tree, "data": data})  # threads
    data["decode_in"] = "processes"
    with pytest.raises(ConfigError, match=r"data.readers: 3 processes .*cpus_per_worker is 2"):
        validated(TrainConfig, {**tree, "data": data})
    validated(TrainConfig, {**tree, "data": data, "cpus_per_worker": 3})
