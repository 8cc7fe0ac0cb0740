"""Image files read during training: reading ahead, random crops, resuming, and damaged files."""

import errno
import gc
import math
import os
import socket
import struct
import threading
import weakref
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms import functional as tv

from tfkd_ray.learn.augment import Augment
from tfkd_ray.learn.chance import chance_note
from tfkd_ray.learn.config import TrainConfig
from tfkd_ray.learn.dataset import forget_loaded
from tfkd_ray.learn.image_files import ImageFolder, Imagenet
from tfkd_ray.learn.images import _TURNS, AHEAD, Files, FolderSet, crop_box
from tfkd_ray.learn.loop import Epoch, train
from tfkd_ray.learn.models import Cnn
from tfkd_ray.learn.objectives import CrossEntropy
from tfkd_ray.learn.optimizers import OptimConfig
from tfkd_ray.settings.errors import ConfigError
from tfkd_ray.settings.schema import validated
from tfkd_ray.space.fitted import size_notes

VIEWS = Augment(resized_crop=True, flip=True)


def photograph(seed: int, width: int, height: int) -> Image.Image:
    """Return a smooth picture, like a photograph."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def write_folder(
    root: Path, *, classes: int = 2, train: int = 12, test: int = 3, side: int = 40
) -> Path:
    """Write images of various sizes, one grey, one a transparent PNG; `val` is the test split."""
    for split, n in (("train", train), ("val", test)):
        for k in range(classes):
            folder = root / split / f"class {k}"
            folder.mkdir(parents=True)
            for i in range(n):
                image = photograph(100 * k + i, side + 7 * i % 23, side + 11 * i % 31)
                path = folder / f"{i:03}.jpg"
                if split == "train" and (k, i) == (0, 1):
                    image = image.convert("L")
                if split == "train" and (k, i) == (1, 2):
                    image, path = image.convert("RGBA"), path.with_suffix(".PNG")
                image.save(path)
    return root


@pytest.fixture
def data(tmp_path: Path) -> ImageFolder:
    return ImageFolder(root=write_folder(tmp_path), num_classes=2, image_size=32, val_fraction=0.25)


def loaded(data: ImageFolder) -> FolderSet:
    found = data.load()[0]
    assert isinstance(found, FolderSet)
    return found


def config(data: ImageFolder, **settings: object) -> TrainConfig:
    tree = {"epochs": 3, "optim": OptimConfig(batch_size=4, lr=0.05), "augment": VIEWS, **settings}
    return TrainConfig(objective=CrossEntropy(), data=data, student=Cnn(widths=(4,)), **tree)  # type: ignore[arg-type]


def numbers(epochs: list[Epoch]) -> list[dict[str, float]]:
    return [
        {k: v for k, v in e.metrics.items() if k not in ("seconds", "images_per_s")} for e in epochs
    ]


def readers() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("tfkd-reader")]


# --- what is there ---------------------------------------------------------------------------------------------


def test_linked_folders_are_followed_and_loops_of_links_end(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "real")
    more = tmp_path / "more/deeper"
    more.mkdir(parents=True)
    photograph(5, 40, 40).save(more / "m.jpg")
    inside = root / "train/class 0"
    (inside / "linked").symlink_to(more.parent)
    (inside / "itself").symlink_to(inside)
    (inside / "up").symlink_to(root / "train")
    (inside / "nowhere").symlink_to("nowhere")
    (more / "back").symlink_to(more.parent)
    (root / "train/looped").symlink_to("looped")
    (root / "train/class 2").symlink_to(tmp_path / "more")
    (root / "val/class 2").symlink_to(tmp_path / "more")
    data = ImageFolder(root=root, num_classes=3, image_size=32)
    data.check()
    whole = data._whole("train")
    assert isinstance(whole, FolderSet)
    assert [f for f in whole.files if "m.jpg" in f] == [
        "train/class 0/linked/deeper/m.jpg",
        "train/class 2/deeper/m.jpg",
    ]
    assert torch.bincount(whole.labels).tolist() == [13, 12, 1]


def test_files_of_both_splits_are_examined_before_a_comparison(data: ImageFolder) -> None:
    data.examine()
    for split, k in (("train", 0), ("val", 1)):
        (data.root / split / f"class {k}/000.jpg").write_bytes(b"no image")
    other = data.model_copy(update={"split_seed": 1})  # what was found of the first is remembered
    with pytest.raises(ConfigError) as error:
        other.examine()
    assert [p.partition(": cannot be read as an image")[0] for p in error.value.problems] == [
        f"data image_folder: {data.root}/train/class 0/000.jpg"
    ]
    (data.root / "train/class 0/000.jpg").unlink()
    with pytest.raises(
        ConfigError, match=f"^data image_folder: {data.root}/val/class 1/000.jpg: cannot be read"
    ):
        other.examine()
    for path in (data.root / "val/class 1").iterdir():
        path.unlink()
    with pytest.raises(
        ConfigError, match=f"^data image_folder: {data.root}/val/class 1: no image in it"
    ):
        other.examine()


@pytest.mark.parametrize("kind", ["fifo", "device", "socket", "loop", "nowhere", "empty", "float"])
@pytest.mark.timeout(20)
def test_what_is_no_image_in_the_test_split_is_named_before_a_comparison(
    data: ImageFolder, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = data.root / "val/class 1/000.jpg"
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "socket":
        monkeypatch.chdir(path.parent)  # a socket's whole path may be too long
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path.name)
    elif kind in ("device", "loop", "nowhere"):
        path.symlink_to({"device": "/dev/zero", "loop": path, "nowhere": "nowhere"}[kind])
    elif kind == "empty":
        path.touch()
    else:
        Image.new("F", (40, 40)).save(path, format="TIFF")
    with pytest.raises(ConfigError) as error:
        data.examine()
    (problem,) = error.value.problems
    assert problem.startswith(f"data image_folder: {path}: ") and "<" not in problem
    assert ("floating-point numbers" if kind == "float" else "cannot be read as") in problem


@pytest.mark.parametrize("below", ["", "class 0", "class 0/more"])
def test_a_folder_that_cannot_be_listed_is_named_and_not_left_out(
    data: ImageFolder, below: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = data.root / "train" / below
    (data.root / "train/class 0/more").mkdir()
    list_folder, walk_folder = os.listdir, os.scandir

    def denied(listing: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def look(folder: Any) -> Any:
            if Path(folder) == place:
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
            return listing(folder)

        return look

    monkeypatch.setattr(os, "listdir", denied(list_folder))
    monkeypatch.setattr(os, "scandir", denied(walk_folder))
    with pytest.raises(ConfigError, match=f"{place}: cannot be read: Permission denied"):
        data.load()


def test_a_name_that_is_no_utf8_can_be_told(data: ImageFolder, tmp_path: Path) -> None:
    broken = os.fsencode(data.root / "val/class 0") + b"/caf\xe9.jpg"
    Path(os.fsdecode(broken)).write_bytes(b"no image")
    with pytest.raises(ConfigError) as error:
        data.examine()
    assert "caf\\udce9.jpg: cannot be read as an image" in str(error.value)
    str(error.value).encode()


# --- what is read ----------------------------------------------------------------------------------------------


def test_splits_are_stratified_and_positions_are_by_class_and_name(data: ImageFolder) -> None:
    data.check()
    train_set, val_set = data.load()
    assert isinstance(train_set, FolderSet) and isinstance(val_set, FolderSet)
    assert train_set.labels.bincount().tolist() == [
        9,
        9,
    ] and val_set.labels.bincount().tolist() == [3, 3]
    everything = sorted(str(p.relative_to(data.root)) for p in data.root.glob("train/*/*"))
    assert train_set.official_size == 24
    for part in (train_set, val_set):
        assert [everything[i] for i in part.positions.tolist()] == list(part.files)
    assert sorted([*train_set.positions.tolist(), *val_set.positions.tolist()]) == list(range(24))
    test = data.load_test()
    assert isinstance(test, FolderSet) and len(test) == 6 and test.files[0] == "val/class 0/000.jpg"
    assert next(test.read([torch.tensor([0, 5])])).shape == (2, 3, 32, 32)


def test_what_is_hidden_or_no_image_is_left_alone_and_folders_below_are_not(
    data: ImageFolder,
) -> None:
    (data.root / "train/.cache").mkdir()
    (data.root / "train/class 0/._001.jpg").write_bytes(b"of a Mac")
    (data.root / "train/class 0/notes.txt").write_text("no image")
    (data.root / "train/class 0/more").mkdir()
    photograph(0, 40, 40).save(data.root / "train/class 0/more/x.jpg")
    whole = data._whole("train")
    assert (
        isinstance(whole, FolderSet)
        and len(whole) == 25
        and "train/class 0/more/x.jpg" in whole.files
    )


def test_without_crops_the_centre_is_torchvisions(data: ImageFolder) -> None:
    images = loaded(data)
    read = torch.cat(list(images.read(list(torch.arange(len(images)).split(5)))))
    assert read.dtype == torch.uint8 and read.shape == (18, 3, 32, 32)
    for file, ours in zip(images.files, read, strict=True):
        with Image.open(data.root / file) as image:
            theirs = tv.center_crop(tv.resize(image.convert("RGB"), [37]), [32])
        assert (ours == tv.pil_to_tensor(theirs)).all(), file


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_large_jpeg_is_decoded_at_a_smaller_scale_and_looks_the_same(
    tmp_path: Path, mode: str
) -> None:
    root = write_folder(tmp_path, train=2, test=1)
    photograph(7, 900, 700).convert(mode).save(root / "train/class 0/000.jpg", quality=95)
    images = loaded(ImageFolder(root=root, num_classes=2, image_size=32, val_fraction=0))
    with Image.open(root / images.files[0]) as image:
        whole = image.convert("RGB")
    theirs = tv.pil_to_tensor(tv.center_crop(tv.resize(whole, [37]), [32]))
    assert (next(images.read([torch.tensor([0])]))[0].float() - theirs.float()).abs().mean() < 0.5
    crop = [0.9, 0.4, 0.5, 0.5]
    left, top, w, h = crop_box(crop, 900, 700)
    theirs = tv.pil_to_tensor(tv.resized_crop(whole, top, left, h, w, [32, 32]))
    ours = next(images.read([torch.tensor([0])], torch.tensor([crop])))[0]
    assert (ours.float() - theirs.float()).abs().mean() < 0.5


def one_image(path: Path, side: int = 32, crop: list[float] | None = None) -> np.ndarray:  # type: ignore[type-arg]
    """Return the [3, S, S] pixels of a file in training or validation."""
    crops = None if crop is None else torch.tensor([crop])
    place = Files("image_folder", path.parent, side, "none")
    images = FolderSet(place, (path.name,), torch.zeros(1).long(), torch.zeros(1), 1, 1)
    return next(images.read([torch.arange(1)], crops))[0].numpy()


@pytest.mark.parametrize("suffix", [".png", ".tiff", ".jp2.png", ".pgm.ppm"])
@pytest.mark.parametrize("factor", [256, 257])
def test_16_bits_are_read_as_their_upper_8(tmp_path: Path, suffix: str, factor: int) -> None:
    grey = np.asarray(photograph(1, 40, 50).convert("L"))
    wide = Image.fromarray(grey.astype(np.uint16) * np.uint16(factor))
    kinds = {".jp2.png": "JPEG2000", ".pgm.ppm": "PPM"}
    wide.save(tmp_path / f"wide{suffix}", kinds.get(suffix))
    Image.fromarray(grey).save(tmp_path / "plain.png")
    for crop in (None, [0.3, 0.5, 0.2, 0.7]):
        assert (
            one_image(tmp_path / f"wide{suffix}", crop=crop)
            == one_image(tmp_path / "plain.png", crop=crop)
        ).all()


def test_16_bits_of_which_0_is_white_are_turned_round(tmp_path: Path) -> None:
    grey = np.asarray(photograph(1, 40, 50).convert("L"))
    Image.fromarray((255 - grey).astype(np.uint16) * np.uint16(257)).save(
        tmp_path / "a.tiff", tiffinfo={262: 0}
    )
    Image.fromarray(grey).save(tmp_path / "plain.png")
    assert (one_image(tmp_path / "a.tiff") == one_image(tmp_path / "plain.png")).all()


def test_a_palettes_transparency_changes_no_colour_and_is_not_warned_of(tmp_path: Path) -> None:
    palette = photograph(1, 40, 50).convert("P")
    palette.save(tmp_path / "plain.png")
    palette.save(tmp_path / "a.png", transparency=bytes(range(256)))
    for crop in (None, [0.3, 0.5, 0.2, 0.7]):
        assert (
            one_image(tmp_path / "a.png", crop=crop) == one_image(tmp_path / "plain.png", crop=crop)
        ).all()


def test_12_bits_of_a_tiff_are_read_as_their_upper_8(tmp_path: Path) -> None:
    """Pillow writes none: two pixels of 12 bits are three bytes."""
    tags = [(256, 4, 32), (257, 4, 32), (258, 3, 12), (259, 3, 1), (262, 3, 1), (273, 4, 200), (277, 3, 1),
            (278, 4, 32), (279, 4, 32 * 48)]  # fmt: skip
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    head = (b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries).ljust(200, b"\0")
    (tmp_path / "a.tiff").write_bytes(
        head + bytes([0xAB, 0xCA, 0xBC]) * (32 * 16)
    )  # 0xABC everywhere
    assert (one_image(tmp_path / "a.tiff") == 0xAB).all()


@pytest.mark.parametrize(
    ("pixels", "name", "sentence"),
    [
        (
            np.arange(1024, dtype=np.int32).reshape(32, 32),
            "a.tiff",
            "whole numbers of 32 bits \\(mode I\\)",
        ),
        (
            np.linspace(0, 1, 1024, dtype=np.float32).reshape(32, 32),
            "a.tif",
            "floating-point numbers \\(mode F\\)",
        ),
        (
            np.arange(1024, dtype=np.uint16).reshape(32, 32) % 256,
            "a.png",
            "reach 255 of 65535 .*; if white is",
        ),
        (
            np.arange(1024, dtype=np.uint16).reshape(32, 32) * 4,
            "a.png",
            "keep 16 of their levels; if white is",
        ),
        (np.arange(1024, dtype=np.int16).reshape(32, 32), "a.tiff", "whole numbers of 32 bits"),
    ],
    ids=["int32", "float", "8 bits in 16", "12 bits in 16", "signed"],
)
def test_what_cannot_be_brought_to_8_bits_is_refused_by_name(
    tmp_path: Path,
    pixels: np.ndarray,
    name: str,
    sentence: str,  # type: ignore[type-arg]
) -> None:
    if pixels.dtype == np.int16:
        Image.fromarray(pixels.view(np.uint16)).save(tmp_path / name, tiffinfo={339: 2})
    else:
        Image.fromarray(pixels).save(tmp_path / name)
    with pytest.raises(
        ConfigError, match=f"^data image_folder: {tmp_path / name}: its .*{sentence}"
    ):
        one_image(tmp_path / name)


def write_colours_of_16_bits(path: Path, values: np.ndarray) -> None:  # type: ignore[type-arg]
    """Write a PNG of 16 bits per channel, which Pillow cannot."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + check

    high, wide, channels = values.shape
    colour_type = {2: 4, 3: 2, 4: 6}[channels]
    head = struct.pack(">IIBBBBB", wide, high, 16, colour_type, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    parts = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + parts)


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_colours_of_16_bits_are_read_as_their_upper_8_or_refused(
    tmp_path: Path, channels: int
) -> None:
    levels = np.linspace(0, 255, 1024).astype(int).reshape(32, 32, 1).repeat(channels, axis=2)
    eight_bits = np.repeat(levels[..., :1], 3, axis=2).astype(np.uint8)
    Image.fromarray(eight_bits).save(tmp_path / "b.png")
    write_colours_of_16_bits(tmp_path / "a.png", levels * 257)
    assert (one_image(tmp_path / "a.png") == one_image(tmp_path / "b.png")).all()
    for scale in (1, 16):  # 8 and 12 bits in 16
        write_colours_of_16_bits(tmp_path / "a.png", levels * scale)
        with pytest.raises(
            ConfigError, match=r"a.png: the 16-bit values of its colours stay below"
        ):
            one_image(tmp_path / "a.png")


@pytest.mark.parametrize("levels", [[0], [0, 1], [3, 9, 15]])
@pytest.mark.parametrize("channels", [2, 3, 4])
def test_dark_colours_of_16_bits_that_lose_nothing_are_read(
    tmp_path: Path, channels: int, levels: list[int]
) -> None:
    """A wholly black photograph is one; the transparency beside the colours does not count."""
    of_pixels = np.resize(levels, (32, 32, 1)).repeat(channels, axis=2) * 257
    if channels in (2, 4):
        of_pixels[..., -1] = np.arange(1024).reshape(32, 32)
    write_colours_of_16_bits(tmp_path / "a.png", of_pixels)
    eight_bits = np.repeat(of_pixels[..., :1] // 257, 3, axis=2).astype(np.uint8)
    Image.fromarray(eight_bits).save(tmp_path / "b.png")
    assert (one_image(tmp_path / "a.png") == one_image(tmp_path / "b.png")).all()
    of_pixels[7, 7, 0] += 1
    write_colours_of_16_bits(tmp_path / "a.png", of_pixels)
    with pytest.raises(ConfigError, match="the 16-bit values of its colours stay below"):
        one_image(tmp_path / "a.png")


@pytest.mark.parametrize("highest", [0, 255, 4095, 65535])
def test_colours_of_16_bits_in_ppm_are_scaled_or_refused(tmp_path: Path, highest: int) -> None:
    values = np.linspace(0, highest, 3072).astype(">u2")
    (tmp_path / "a.ppm").write_bytes(b"P6 32 32 65535\n" + values.tobytes())
    if highest in (0, 65535):
        eight_bits = (values / 257.0).round().astype(np.uint8).reshape(32, 32, 3)
        Image.fromarray(eight_bits).save(tmp_path / "b.png")
        seen, wanted = (one_image(tmp_path / name).astype(int) for name in ("a.ppm", "b.png"))
        assert abs(seen - wanted).max() <= 1
        return
    with pytest.raises(ConfigError, match="the 16-bit values of its colours stay below"):
        one_image(tmp_path / "a.ppm")


def test_signed_pixels_of_8_bits_are_refused(tmp_path: Path) -> None:
    pixels = Image.fromarray(np.arange(1024, dtype=np.uint8).reshape(32, 32))
    for sample_format in (1, 2):
        pixels.save(tmp_path / f"{sample_format}.tiff", tiffinfo={339: sample_format})
    one_image(tmp_path / "1.tiff")
    with pytest.raises(ConfigError, match=r"2.tiff: its pixels are signed, -128 to 127"):
        one_image(tmp_path / "2.tiff")


def test_dark_images_of_16_bits_that_lose_nothing_are_read(tmp_path: Path) -> None:
    for level in (0, 1, 15):
        Image.fromarray(np.full((32, 32), 257 * level, dtype=np.uint16)).save(tmp_path / "a.png")
        assert (one_image(tmp_path / "a.png") == level).all()


@pytest.mark.parametrize(
    "kind", ["a.jpg", "large.jpg", "a.png", "a.webp", "a.tiff", "grey.tiff", "16.tiff"]
)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_are_turned_upright_as_their_exif_data_say(
    tmp_path: Path, kind: str, orientation: int
) -> None:
    width, height = (640, 400) if kind == "large.jpg" else (64, 40)
    upright, exif = photograph(3, width, height), Image.Exif()
    if kind == "grey.tiff":
        upright = upright.convert("L")
    if kind == "16.tiff":
        upright = Image.fromarray(np.asarray(upright.convert("L")).astype(np.uint16) * 257)
    exif[0x0112] = orientation
    back = {6: 8, 8: 6}.get(orientation, orientation)  # what undoes the turn
    turned = upright if back == 1 else upright.transpose(_TURNS[back])
    turned.save(tmp_path / kind, exif=exif, quality=98)
    upright.save(tmp_path / f"upright-{kind}", quality=98)
    for crop in (None, [0.2, 0.3, 0.1, 0.8]):
        found, wanted = (
            one_image(tmp_path / name, crop=crop).astype(int) for name in (kind, f"upright-{kind}")
        )
        assert abs(found - wanted).mean() < 3, "a half pixel of a shrunk JPEG at most"


@pytest.mark.filterwarnings("default:Corrupt EXIF data")
@pytest.mark.parametrize("exif", [b"Exif\0\0nonsense", b"Exif\0\0II*\0\x08\0\0\0\xff\xff", b"MM"])
def test_damaged_exif_data_do_not_keep_an_image_from_being_read(
    tmp_path: Path, exif: bytes
) -> None:
    photograph(3, 64, 40).save(tmp_path / "a.jpg", exif=exif)
    photograph(3, 64, 40).save(tmp_path / "b.jpg")
    assert (one_image(tmp_path / "a.jpg") == one_image(tmp_path / "b.jpg")).all()


def test_a_crop_is_torchvisions_resized_crop_of_its_box(data: ImageFolder) -> None:
    images = loaded(data)
    crops = VIEWS.view(0, 0, images.official_size).crop[images.positions]
    read = torch.cat(list(images.read(list(torch.arange(len(images)).split(5)), crops)))
    for k, file in enumerate(images.files):
        with Image.open(data.root / file) as image:
            left, top, w, h = crop_box(crops[k].tolist(), *image.size)
            theirs = tv.pil_to_tensor(
                tv.resized_crop(image.convert("RGB"), top, left, h, w, [32, 32])
            )
        unlike = (read[k].float() - theirs.float()).abs()
        assert unlike[:, 3:-3, 3:-3].max() <= 1, (
            file
        )  # at the rim ours also sees what lies just outside the box
        assert unlike.mean() < 3


@pytest.mark.parametrize("width, height", [(500, 375), (375, 500), (640, 360)])
def test_boxes_are_distributed_as_torchvisions(width: int, height: int) -> None:
    # of longer images torchvision takes the largest box whenever ten draws do not fit; ours never gives up
    n = 3000
    torch.manual_seed(0)
    blank = torch.empty(3, height, width, device="meta")
    theirs = [RandomResizedCrop.get_params(blank, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(n)]
    ours = [crop_box(c, width, height) for c in torch.rand(n, 4).tolist()]
    tables = (
        np.array(
            [(w * h / width / height, math.log(w / h), left, top) for left, top, w, h in ours]
        ),
        np.array(
            [(w * h / width / height, math.log(w / h), left, top) for top, left, h, w in theirs]
        ),
    )
    for a, b in zip(tables[0].T, tables[1].T, strict=True):
        grid = np.sort(np.concatenate([a, b]))
        gap = (
            np.abs(
                np.searchsorted(np.sort(a), grid, "right")
                - np.searchsorted(np.sort(b), grid, "right")
            ).max()
            / n
        )
        assert gap < 1.95 * math.sqrt(2 / n)  # Kolmogorov and Smirnov, 1 in 1000


@pytest.mark.parametrize(
    "width, height", [(1, 1), (1, 5000), (5000, 1), (2, 3), (30, 1000), (224, 224), (999, 30)]
)
def test_a_box_lies_inside_whatever_the_numbers_and_the_image(width: int, height: int) -> None:
    last = 1 - 2.0**-24  # the largest that torch.rand gives
    draws = [
        [a, b, c, d]
        for a in (0, last)
        for b in (0, 0.5, last)
        for c in (0, last)
        for d in (0, last)
    ]
    for crop in [*draws, *torch.rand(200, 4, generator=torch.Generator().manual_seed(0)).tolist()]:
        left, top, w, h = crop_box(crop, width, height)
        assert (
            left >= 0 and top >= 0 and w >= 1 and h >= 1 and left + w <= width and top + h <= height
        )
        if min(width, height) > 100:
            assert 0.079 < w * h / width / height <= 1 and 0.74 < w / h < 1.35


# --- a single folder -------------------------------------------------------------------------------------------


def single(root: Path, layout: str) -> Path:
    """Write 2 classes of 20 images in one folder."""
    write_folder(root, train=20, test=1)
    drop(root / "val")
    if layout == "root/CLASS":
        for folder in (root / "train").iterdir():
            folder.rename(root / folder.name)
        (root / "train").rmdir()
    return root


@pytest.mark.parametrize("layout", ["root/CLASS", "root/train/CLASS"])
def test_a_single_folder_is_split_by_class_and_its_classes_are_counted(
    tmp_path: Path, layout: str
) -> None:
    root = single(tmp_path / "pictures", layout)
    tree = {"objective": "ce", "data": {"name": "image_folder", "root": root, "image_size": 32}}
    data = validated(TrainConfig, tree).data
    assert isinstance(data, ImageFolder) and data.num_classes == 2
    data.check()
    data.examine()
    (train, val), test = data.load(), data.load_test()
    assert (
        isinstance(train, FolderSet) and isinstance(val, FolderSet) and isinstance(test, FolderSet)
    )
    sizes = [torch.bincount(part.labels).tolist() for part in (train, val, test)]
    assert sizes == [[13, 13], [3, 3], [4, 4]]
    files = [*train.files, *val.files, *test.files]
    assert len(set(files)) == 40 and all((root / file).is_file() for file in files)
    again = data.load_test()
    assert isinstance(again, FolderSet) and again.files == test.files
    (note,) = data.notes()
    assert "8 images, a fifth of each class, are the test split" in note
    (root / "test").mkdir()
    assert not list(data.notes())
    with pytest.raises(ConfigError):
        data.check()


def test_folders_for_splits_are_not_split_again_and_imagenet_is_none(data: ImageFolder) -> None:
    assert not list(data.notes()) and len(data.load_test()) == 6
    drop(data.root / "val")
    with pytest.raises(ConfigError, match="not found: the folder val or test"):
        Imagenet(root=data.root).load_test()


@pytest.mark.parametrize(
    "batch, says",
    [(2, None), (4, None), (8, "3 steps"), (18, "one step"), (64, "64 of 18 images to train on: an epoch has one step")],
)  # fmt: skip
def test_a_batch_that_leaves_few_steps_is_told(
    data: ImageFolder, batch: int, says: str | None
) -> None:
    *found, validation = size_notes(config(data, optim=OptimConfig(batch_size=batch)))
    assert validation.startswith("validation has 6 images: one image is 16.67 points")
    assert len(found) == (says is not None) and (says or "") in "".join(found)


def test_the_batch_of_a_recipe_for_many_images_is_refused(data: ImageFolder) -> None:
    tree = {"objective": "ce", "data": data.tree, "student": "cnn"}
    for recipe in ("paper", "modern"):
        of_recipe = validated(TrainConfig, {**tree, "recipe": recipe})
        with pytest.raises(
            ConfigError, match=r"512 of 18 images .* `optim.batch_size: 4` gives more"
        ):
            list(size_notes(of_recipe))
        assert "has one step" in "".join(size_notes(of_recipe, begun=True)), "it goes on"
    (_,) = size_notes(validated(TrainConfig, {**tree, "optim": {"batch_size": 4}}))


def test_an_accuracy_of_guessing_is_told(data: ImageFolder) -> None:
    assert "no better than guessing, which classifies 50.0% of the 6" in str(chance_note(data, 0.5))
    forget_loaded()
    with pytest.MonkeyPatch.context() as patch:  # the numbers are kept when the data are gone
        patch.setattr("tfkd_ray.learn.dataset.load_official", None)
        assert chance_note(data, 0.95) is None and chance_note(data, None) is None
    for path in list((data.root / "train/class 1").iterdir())[2:]:
        path.unlink()  # the commonest class is most of validation
    uneven = data.model_copy(update={"split_seed": 1})
    assert "classifies 75.0%" in str(chance_note(uneven, 0.75))


# --- reading ahead ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 4])
def test_reading_ahead_is_reading_one_by_one(data: ImageFolder, n: int) -> None:
    images = loaded(data.model_copy(update={"readers": n}))
    crops = VIEWS.view(3, 1, images.official_size).crop[images.positions]
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    at_once = torch.cat(list(images.read(list(order.split(4)), crops)))
    singly = torch.stack([next(images.read([i.view(1)], crops))[0] for i in order])
    assert at_once.equal(singly)
    assert list(images.read([])) == []


def test_a_closed_generator_leaves_no_thread_and_nothing_pending(data: ImageFolder) -> None:
    images = loaded(data)
    reading = images.read(list(torch.arange(len(images)).split(2)))
    next(reading)
    assert readers()
    reading.close()  # type: ignore[attr-defined]
    assert not readers()
    assert len(list(images.read(list(torch.arange(len(images)).split(2))))) == 9 and not readers()
    run = train(config(data))
    next(run)
    run.close()
    assert not readers()


def test_only_some_batches_are_in_memory(data: ImageFolder) -> None:
    images = loaded(data)
    reading = images.read(list(torch.arange(len(images)).split(1)))
    first = weakref.ref(next(reading))
    gc.collect()
    assert first() is None, "a batch that was handed out is kept by nobody"
    for file in images.files[AHEAD + 1 :]:
        (data.root / file).write_bytes(b"spoilt before it was read")
    got = 1
    with pytest.raises(ConfigError):
        for _ in reading:
            got += 1
    assert got == AHEAD + 1, "none further ahead had been read"
    assert AHEAD >= 4
    assert not readers()


# --- training --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_training_repeats_differs_by_epoch_and_resumes_to_the_bit(data: ImageFolder) -> None:
    whole = list(train(config(data)))
    assert len(whole) == 3 and len({e.metrics["train_loss"] for e in whole}) == 3
    assert numbers(list(train(config(data.model_copy(update={"readers": 1}))))) == numbers(whole)
    again = train(config(data))
    state = next(again).state()
    again.close()
    resumed = list(train(config(data), state))
    assert numbers(resumed) == numbers(whole[1:])
    for name, weights in whole[-1].state()["model"].items():
        assert weights.equal(resumed[-1].state()["model"][name])
    assert numbers(list(train(config(data, augment=Augment()))))[0] != numbers(whole)[0]
    crops = [VIEWS.view(0, epoch, 24).crop for epoch in (0, 1, 0)]
    a, b, c = (torch.cat(list(loaded(data).read([torch.arange(18)], crop))) for crop in crops)
    assert a.equal(c) and not a.equal(b)


def test_training_at_224_with_all_of_train(tmp_path: Path) -> None:
    root = write_folder(tmp_path, train=3, test=1, side=230)
    data = ImageFolder(root=root, num_classes=2, val_fraction=0)
    assert data.shape == (3, 224, 224)
    [epoch] = train(config(data, epochs=1))
    assert "val_nll" not in epoch.metrics and epoch.metrics["train_loss"] < 5


def test_the_papers_recipe_is_the_default() -> None:
    tree = {"objective": "ce", "student": "cnn", "data": {"name": "imagenet", "root": "/nowhere"}}
    found = validated(TrainConfig, tree)
    assert isinstance(found.data, Imagenet) and found.data.num_classes == 1000
    assert (found.epochs, found.optim.lr, found.optim.batch_size) == (
        90,
        0.2,
        512,
    ) and found.augment == VIEWS
    assert [found.schedule.factor(epoch, 90) for epoch in (0.5, 30.5, 60.5, 80.5)] == pytest.approx(
        [1, 0.1, 0.01, 0.001]
    )
    modern = validated(TrainConfig, {**tree, "recipe": "modern"})
    assert (
        modern.optim.nesterov
        and modern.schedule.warmup_epochs == 5
        and modern.schedule.name == "cosine"
    )


# --- what is wrong ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spoil", ["cut", "text", "empty", "gone", "fifo", "device"])
def test_a_file_that_is_no_image_is_named(data: ImageFolder, spoil: str) -> None:
    images = loaded(data)
    path = data.root / images.files[4]
    whole = path.read_bytes()
    if spoil in ("gone", "fifo", "device"):
        path.unlink()
        if spoil == "fifo":
            os.mkfifo(path)
        elif spoil == "device":
            path.symlink_to("/dev/zero")
    else:
        path.write_bytes({"cut": whole[: len(whole) // 2], "text": b"text", "empty": b""}[spoil])
    for crops in (None, torch.full((18, 4), 0.5)):
        with pytest.raises(
            ConfigError,
            match=f"^data image_folder: {path}: cannot be read as an image: .*; replace or remove it",
        ):
            list(images.read(list(torch.arange(18).split(3)), crops))
        assert not readers()
    with pytest.raises(ConfigError, match=str(path)):
        list(train(config(data)))
    assert not readers()


def drop(path: Path) -> None:
    for below in path.iterdir():
        drop(below) if below.is_dir() else below.unlink()
    path.rmdir()


def test_missing_folders_say_where_they_were_looked_for(data: ImageFolder) -> None:
    (data.root / "val").rename(data.root / "validation")
    with pytest.raises(
        ConfigError,
        match=r"not found: the folder val or test .looked in .*; put images at root/train/CLASS/ .*data.root",
    ):
        data.check()
    drop(data.root / "validation")
    (data.root / "train").rename(data.root / "test")
    with pytest.raises(ConfigError, match="not found: the folder train"):
        data.check()
    with pytest.raises(
        ConfigError, match=r"data imagenet: not found: .*; register at https://image-net.org"
    ):
        Imagenet(root=data.root / "nowhere").check()


def test_classes_must_be_as_many_as_declared_and_the_same_in_both_splits(data: ImageFolder) -> None:
    with pytest.raises(ConfigError) as error:
        data.model_copy(update={"num_classes": 5}).check()
    assert error.value.problems == [
        f"data image_folder: {data.root}/train: 2 class folders, and num_classes is 5"
    ]
    (data.root / "val/class 1").rename(data.root / "val/klass 1")
    with pytest.raises(
        ConfigError,
        match=r"/val: its class folders must be those of train: class 1 is in train, but not here .2 class",
    ):
        data.check()
    (data.root / "val/klass 1").rename(data.root / "val/class 1")
    (data.root / "val/class 2").mkdir()
    with pytest.raises(ConfigError, match="class 2 is here, but not in train"):
        data.load_test()
    with pytest.raises(
        ConfigError, match=r"data imagenet: .*/train: 2 class folders, and num_classes is 1000"
    ):
        Imagenet(root=data.root).check()


def test_a_class_without_images_is_named(data: ImageFolder) -> None:
    for path in (data.root / "train/class 1").iterdir():
        path.rename(path.with_suffix(".txt"))
    data.check()
    with pytest.raises(ConfigError, match=r"/train/class 1: no image in it \(.bmp, .jpeg, .jpg, "):
        data.load()


@pytest.mark.parametrize(
    "settings, sentence",
    [
        ({}, "data.image_folder.num_classes: required, and not given"),
        ({"num_classes": 2, "std": [0.229, 0.224, 0.225]}, "data.image_folder.std.0: should be at least 1, got 0.229"),
        ({"num_classes": 2, "mean": [1, 2]}, "data.image_folder.mean"),
        ({"num_classes": 2, "readers": 0}, "data.image_folder.readers: should be at least 1, got 0"),
    ],
)  # fmt: skip
def test_wrong_settings_get_a_sentence(settings: dict[str, object], sentence: str) -> None:
    with pytest.raises(ConfigError) as error:
        validated(
            TrainConfig,
            {"objective": "ce", "data": {"name": "image_folder", "root": "/x", **settings}},
        )
    assert sentence in str(error.value)


def test_a_folder_is_not_for_download(data: ImageFolder) -> None:
    with pytest.raises(
        ConfigError, match="data image_folder: not for download; put images at root/train/CLASS/"
    ):
        data.download()
    with pytest.raises(ConfigError, match="data imagenet: not for download; register at"):
        Imagenet().download()
