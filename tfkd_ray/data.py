"""Data sets and their splits.

A data set is a frozen Settings class that also loads itself. To add one: a class with a `name`, its facts and
`_official`, and one line in `Data`. Images live as uint8 tensors, or stay in their files (`streams`); every image knows
its position in the official train set, so that what is random about it is a function of (seed, epoch, position) and of
nothing else.

Nothing is downloaded but by `download`. What takes long to unpack or to decode is kept in a cache (see `files.cached`).
Files are checked as input from elsewhere: an IDX file takes no more memory than the official one, and a pickle may hold
arrays of bytes, text and numbers only.

Shapes: N = images, C = channels, H, W = height and width.
"""

from __future__ import annotations

import contextlib
import functools
import gzip
import hashlib
import http.client
import importlib.util
import inspect
import io
import json
import math
import os
import re
import sys
import tarfile
import tempfile
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

import numpy as np
from pydantic import AfterValidator, BeforeValidator, Field, JsonValue, model_validator

from tfkd_ray import own_code
from tfkd_ray.files import (
    ArraysOnly,
    cached,
    cached_file,
    opened,
    read_at_most,
    remembered,
    state_of,
    whole_file,
)
from tfkd_ray.images import (
    FolderSet,
    Images,
    ImageSet,
    check_headers,
    decoded,
    generator,
    rgb,
    seeded,
)
from tfkd_ray.schema import ConfigError, Settings, did_you_mean, named

if TYPE_CHECKING:
    from torch import Tensor

Split = Literal["train", "test"]
SPLITS: tuple[Split, ...] = ("train", "test")

MODERN: dict[str, Any] = {"optim": {"nesterov": True}, "schedule": {"name": "cosine", "warmup_epochs": 1.0}}
"""A recipe that does better than the paper's on every network we know figures of."""
PAPER: dict[str, Any] = {
    "epochs": 200,
    "optim": {"lr": 0.1, "weight_decay": 5e-4, "momentum": 0.9, "nesterov": False, "batch_size": 128},
    "schedule": {"name": "step", "milestones": [0.3, 0.6, 0.8], "gamma": 0.2, "warmup_epochs": 1.0},
}
"""The Tf-KD paper's recipe for CIFAR, without its augmentation."""
IMAGENET: dict[str, Any] = {
    "epochs": 90,
    "optim": {"lr": 0.2, "weight_decay": 1e-4, "momentum": 0.9, "nesterov": False, "batch_size": 512},
    "schedule": {"name": "step", "milestones": [30 / 90, 60 / 90, 80 / 90], "gamma": 0.1, "warmup_epochs": 0.0},
    "augment": {"resized_crop": True, "flip": True},
}
"""The Tf-KD paper's recipe for ImageNet."""

MOST_BYTES = 2**28
"""More than the largest pickle of CIFAR, which has 155,249,918 bytes."""
MOST_LIST = 2**24
"""More than the lists of Tiny ImageNet, which have less than a megabyte."""


_test_split_sealed = False


def seal_test_split() -> None:
    """Make `load_test` refuse in this process, for good: a process that trains has no business with test images."""
    global _test_split_sealed
    _test_split_sealed = True


class Dataset(Settings):
    """What every data set has: its facts, and how validation is cut from train."""

    if TYPE_CHECKING:  # facts: class attributes where they are the same for all, settings or properties elsewhere

        @property
        def num_classes(self) -> int: ...
        @property
        def shape(self) -> tuple[int, int, int]:
            """(C, H, W)."""

        @property
        def mean(self) -> tuple[float, ...] | None:
            """Per channel, over the official train set, in units of a uint8 step. None: measured, see `statistics`."""

        @property
        def std(self) -> tuple[float, ...] | None: ...

    name: str
    origin: ClassVar[str]
    """How to get the data: ends the sentence that says they are missing."""
    streams: ClassVar[bool] = False
    """Whether images stay on the disk and are decoded when they are needed."""
    places: ClassVar[set[str]] = {"root", "readers"}
    """Settings that say where the images are and how they are read, and change no number."""
    known_by_digest: ClassVar[set[str]] = set()
    """Settings that tell data sets apart, and need not where their digest does."""
    later: ClassVar[frozenset[str]] = frozenset({"digest"})
    recipes: ClassVar[dict[str, dict[str, Any]]] = {"plain": {}, "modern": MODERN}
    """Settings by recipe name, for whatever a configuration does not say; the first is the default."""

    val_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """Part of the official train set that is held out for validation, the same part of every class. 0: none, as when a
    student is trained for good."""
    subset: Annotated[int, Field(ge=1)] | None = None
    """About how many images of the official train set to use, the same part of every class; None: all."""
    split_seed: int = 0
    """Which images those are: fixed by (data set, split_seed), whatever the trial's seed."""
    digest: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")] | None = None
    """What the official train set is: see `digest_of`. None: found when an experiment begins, which records it. Data of
    another digest are refused, so that no experiment mixes two data sets."""

    def load(self) -> tuple[Images, Images | None]:
        """(train, validation): disjoint, stratified, both from the official train set; None if nothing is held out."""
        found = _load(self._of_any_digest)
        if self.digest is not None and found.digest != self.digest:
            raise ConfigError(f"data {self.name}: {self._other_data(found)}")
        return found.train, found.val

    def pinned(self) -> Self:
        """The data set with the digest of what is here; a ConfigError if it has that of other data."""
        if self.digest is None:
            found = _load(self._of_any_digest)
            if not found.checked:
                self._check_same_again(found)
                found.checked = True
            return self.model_copy(update={"digest": found.digest})
        self.load()
        return self

    def identity(self) -> dict[str, Any]:
        """What makes these images the ones they are, as JSON: the settings, but for places, and the digest."""
        out = self.places | (self.known_by_digest if self.digest else set())
        return {name: value for name, value in self.content().items() if name not in out}

    @property
    def _of_any_digest(self) -> Self:
        return self.model_copy(update={"digest": None})

    def _other_data(self, found: _Loaded) -> str:
        """Says that the data here are not those of the digest."""
        return (
            f"the train images or labels here are others than those that were recorded (digest {found.digest}, not "
            f"{self.digest}); put those back, or begin a new experiment, whose teachers are trained anew"
        )

    def _check_same_again(self, found: _Loaded) -> None:
        """Raise a ConfigError where loading again gives other images."""

    def _sources(self, split: Split) -> list[Path]:
        """Files that a split comes from, whole and unchanged while they are; none where that cannot be said."""
        return []

    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """(mean, std) per channel, in units of a uint8 step: the known ones, or else those of train and validation."""
        return (self.mean, self.std) if self.mean and self.std else _measured(self)

    def load_test(self) -> Images:
        """The test split. Refused in any process that trains trials of a sweep."""
        if _test_split_sealed:
            raise PermissionError(
                "the test split cannot be opened by a sweep: trials are chosen on validation, and test is opened once, "
                "after everything is chosen"
            )
        return self._whole("test")

    def download(self) -> None:
        """Fetch the official files into `root`, unless they are there: all of each, of the right md5, or nothing."""
        raise ConfigError(f"data {self.name}: not for download; {self.origin}")

    def check(self) -> None:
        """Raise a ConfigError if the data are not on this machine; cheap, reads no image."""
        raise TypeError(f"{type(self).__name__} does not say where it is")

    def examine(self) -> None:
        """Raise a ConfigError if a file of either split is missing or is not what it says; shows nobody an image.

        Files are listed, and their headers read, so that a comparison does not train for days to find a split of which
        nothing can be measured.
        """
        _examined(self)

    def _examine(self) -> None:
        self.check()

    def _whole(self, split: Split) -> Images:
        """An official split."""
        import torch

        images, labels = self._official(split)
        return ImageSet(images, labels, torch.arange(len(labels)), len(labels))

    def _official(self, split: Split) -> tuple[Tensor, Tensor]:
        """(uint8 [N, C, H, W], int64 [N]) of an official split."""
        raise TypeError(f"{type(self).__name__} does not say how it loads")


class Digits(Dataset):
    """1,797 real 8x8 handwritten digits (Alpaydin and Kaynak 1998), as scikit-learn carries them.

    They have no official split: a fifth of every class, fixed for good, is the test set here (359 images).
    """

    num_classes: ClassVar[int] = 10
    shape: ClassVar[tuple[int, int, int]] = (1, 8, 8)
    mean: ClassVar[tuple[float, ...]] = (4.8826,)
    std: ClassVar[tuple[float, ...]] = (6.0141,)
    origin: ClassVar[str] = "it comes with scikit-learn: pip install scikit-learn"

    name: Literal["digits"] = "digits"

    def check(self) -> None:
        """Raise a ConfigError if scikit-learn's file is not there."""
        _digits_file()

    def _official(self, split: Split) -> tuple[Tensor, Tensor]:
        images, labels = _digits()
        train, test = stratified(labels, 0.2, seed=1998)
        chosen = train if split == "train" else test
        return images[chosen], labels[chosen]


# --- data sets in files ----------------------------------------------------------------------------------------


def _absolute(path: Path) -> Path:
    # a trial's process has a working directory of its own; "~" stays, for each machine to expand
    return path if path.parts[:1] == ("~",) else path.absolute()


Place = Annotated[Path, AfterValidator(_absolute)]


class FileDataset(Dataset):
    """A data set whose official files a person has put somewhere: the same place on every machine."""

    name: str
    root: Place
    """The folder that holds the files. A place, not content: it changes no number."""

    def _wrong(self, path: Path, problem: str) -> ConfigError:
        return ConfigError(f"data {self.name}: {path}: {problem}")

    def _missing(self, what: str, looked: list[Path]) -> ConfigError:
        places = ", ".join(map(str, looked))
        return ConfigError(f"data {self.name}: not found: {what} (looked in {places}); {self.origin}, or set data.root")

    def _checked_labels(self, path: Path, labels: Tensor, first: int = 0) -> Tensor:
        """Labels from 0; in the file they count from `first`."""
        if problem := _label_problem(labels, first, self.num_classes):
            raise self._wrong(path, problem)
        return labels - first

    def _fetch(self, url: str, md5: str, path: Path) -> None:
        """Download a file; it is there whole, or not at all."""
        digest = hashlib.md5(usedforsecurity=False)
        try:
            with (
                whole_file(path) as part,
                part.open("wb") as file,
                urllib.request.urlopen(url, timeout=60) as reply,
            ):
                while piece := reply.read(2**20):
                    digest.update(piece)
                    file.write(piece)
                if digest.hexdigest() != md5:
                    problem = (
                        f"{url} has the md5 {digest.hexdigest()}, and the official file's is {md5}; it is not kept"
                    )
                    raise ConfigError(f"data {self.name}: {problem}; try again, or {self.origin}")
        except (OSError, http.client.HTTPException) as error:
            problem = f"{url} cannot be fetched to {path}: {error}; {self.origin}, or set data.root"
            raise ConfigError(f"data {self.name}: {problem}") from None

    def _fetch_folder(self, url: str, md5: str, folder: str) -> None:
        """Download a zip, and put the folder that it holds into `root`, whole or not at all."""
        root = self.root.expanduser()
        if (root / folder).exists():
            raise self._wrong(root / folder, "is there, but not complete; take it away, and it is downloaded again")
        archive = root / f"{folder}.zip"
        self._fetch(url, md5, archive)
        try:
            with tempfile.TemporaryDirectory(dir=root) as unpacked, zipfile.ZipFile(archive) as file:
                file.extractall(unpacked)
                (Path(unpacked) / folder).rename(root / folder)
        finally:
            archive.unlink()


class IdxDataset(FileDataset):
    """A data set in MNIST's format: four IDX files, each as it is or gzipped (`.gz`).

    `root` is the folder that holds them, or one that torchvision has downloaded to.
    """

    shape: ClassVar[tuple[int, int, int]] = (1, 28, 28)
    folders: ClassVar[tuple[str, ...]]
    """Where else the files may be, below `root`."""
    url: ClassVar[str]
    """Where the files are, or the archive that holds them."""
    md5s: ClassVar[tuple[str, ...]]
    """Of the gzipped files: images and labels of train, and of test."""

    def check(self) -> None:
        """Raise a ConfigError that names every file that is not there."""
        self._paths(*self._files("train"), *self._files("test"))

    def download(self) -> None:
        for stem, md5 in zip([*self._files("train"), *self._files("test")], self.md5s, strict=True):
            if not self._found(stem):
                self._fetch(f"{self.url}/{stem}.gz", md5, self.root.expanduser() / f"{stem}.gz")

    def _sources(self, split: Split) -> list[Path]:
        return self._paths(*self._files(split))

    def _files(self, split: Split) -> tuple[str, str]:
        """(images, labels), without `.gz`."""
        part = {"train": "train", "test": "t10k"}[split]
        return f"{part}-images-idx3-ubyte", f"{part}-labels-idx1-ubyte"

    def _official_size(self, split: Split) -> int:
        return {"train": 60_000, "test": 10_000}[split]

    def _official(self, split: Split) -> tuple[Tensor, Tensor]:
        (images_path, labels_path), most = self._paths(*self._files(split)), self._official_size(split)
        images = self._array(images_path, 0x803, self.shape[1:], most)
        return images.reshape(-1, *self.shape), self._labels(labels_path, most, images_path, len(images))

    def _examine(self) -> None:
        for split in SPLITS:
            (images, labels), most = self._paths(*self._files(split)), self._official_size(split)
            count = len(self._bytes(images, 0x803, self.shape[1:], most)) // math.prod(self.shape[1:])
            self._labels(labels, most, images, count)

    def _labels(self, path: Path, most: int, images: Path, count: int) -> Tensor:
        labels = self._array(path, 0x801, (), most).long()
        if count != len(labels):
            raise self._wrong(path, f"{len(labels)} labels, and {images.name} has {count} images")
        return self._checked_labels(path, labels, self._first_label())

    def _first_label(self) -> int:
        return 0

    def _folders(self) -> list[Path]:
        root = self.root.expanduser()
        return [root, *(root / folder for folder in self.folders)]

    def _found(self, stem: str) -> list[Path]:
        return [p for folder in self._folders() for p in (folder / stem, folder / f"{stem}.gz") if p.is_file()]

    def _paths(self, *stems: str) -> list[Path]:
        found = [self._found(stem) for stem in stems]
        missing = [stem for stem, paths in zip(stems, found, strict=True) if not paths]
        if missing:
            raise self._missing(f"{', '.join(missing)}, raw or with .gz", self._folders())
        return [paths[0] for paths in found]

    def _array(self, path: Path, magic: int, item: tuple[int, ...], most: int) -> Tensor:
        """uint8 [N, *item] of one file, N at most `most`."""
        import torch

        raw = self._bytes(path, magic, item, most)
        return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=8 + 4 * len(item)).reshape(-1, *item))

    def _bytes(self, path: Path, magic: int, item: tuple[int, ...], most: int) -> bytearray:
        """A file's bytes, its header with them; whole, and of the kind that is expected."""
        head, each = 8 + 4 * len(item), math.prod(item)
        try:
            with opened(path) as kept, gzip.open(kept) if path.suffix == ".gz" else kept as file:
                raw = read_at_most(file, head + most * each + 1)
        except (OSError, EOFError, zlib.error) as error:
            raise self._wrong(path, f"cannot be read: {error}; get it again") from None
        if len(raw) < head:
            raise self._wrong(path, f"truncated: its header takes {head} bytes, and there are {len(raw)}")
        found, count, *size = np.frombuffer(raw, ">u4", head // 4).tolist()
        if found != magic:
            raise self._wrong(path, f"not this kind of IDX file: it starts with {found:#010x}, not {magic:#010x}")
        if size != list(item):
            expected, got = ("x".join(map(str, sides)) for sides in (item, size))
            raise self._wrong(path, f"its images are {got}, and those of {self.name} are {expected}")
        if not 0 < count <= most:
            raise self._wrong(path, f"its header says {count} items, and the official file has {most}")
        if len(raw) != head + count * each:
            state = "truncated" if len(raw) < head + count * each else "too long"
            there = f"{'at least ' * (state == 'too long')}{len(raw) - head}"
            raise self._wrong(path, f"{state}: {count} items take {count * each} bytes, and there are {there}")
        return raw


class Mnist(IdxDataset):
    """70,000 handwritten digits. (LeCun et al. 1998.)"""

    num_classes: ClassVar[int] = 10
    mean: ClassVar[tuple[float, ...]] = (0.1307 * 255,)
    std: ClassVar[tuple[float, ...]] = (0.3081 * 255,)
    folders: ClassVar[tuple[str, ...]] = ("MNIST/raw",)
    url: ClassVar[str] = "https://ossci-datasets.s3.amazonaws.com/mnist"
    md5s: ClassVar[tuple[str, ...]] = (
        "f68b3c2dcbeaaa9fbdd348bbdeb94873",
        "d53e105ee54ea40749a09fcbcd1e9432",
        "9fb629c4189551a2d022fa330f9573f3",
        "ec29112dd5afa0611ce80d1b7f02629c",
    )
    origin: ClassVar[str] = "get the four files from https://ossci-datasets.s3.amazonaws.com/mnist/"

    name: Literal["mnist"] = "mnist"
    root: Place = Path("~/datasets/mnist")


class FashionMnist(IdxDataset):
    """70,000 pictures of clothes. (Xiao et al. 2017, arXiv:1708.07747.) `root` is by default where Debian puts them."""

    num_classes: ClassVar[int] = 10
    mean: ClassVar[tuple[float, ...]] = (0.2860 * 255,)
    std: ClassVar[tuple[float, ...]] = (0.3530 * 255,)
    folders: ClassVar[tuple[str, ...]] = ("FashionMNIST/raw",)
    url: ClassVar[str] = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"
    md5s: ClassVar[tuple[str, ...]] = (
        "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "25c81989df183df01b3e8a0aad5dffbe",
        "bef4ecab320f06d8554ea6380940ec79",
        "bb300cfdad3c16e7a12a480ee83cd310",
    )
    origin: ClassVar[str] = (
        "apt-get install dataset-fashion-mnist, or get the four files from "
        "https://github.com/zalandoresearch/fashion-mnist"
    )

    name: Literal["fashion_mnist"] = "fashion_mnist"
    root: Place = Path("/usr/share/datasets/fashion-mnist")


class Kmnist(IdxDataset):
    """70,000 cursive Japanese characters in 10 classes. (Clanuwat et al. 2018, arXiv:1812.01718.)"""

    num_classes: ClassVar[int] = 10
    mean: ClassVar[tuple[float, ...]] = (0.1904 * 255,)
    std: ClassVar[tuple[float, ...]] = (0.3475 * 255,)
    folders: ClassVar[tuple[str, ...]] = ("KMNIST/raw",)
    url: ClassVar[str] = "http://codh.rois.ac.jp/kmnist/dataset/kmnist"
    md5s: ClassVar[tuple[str, ...]] = (
        "bdb82020997e1d708af4cf47b453dcf7",
        "e144d726b3acfaa3e44228e80efcd344",
        "5c965bf0a639b31b8f53240b1b52f4d7",
        "7320c461ea6c1c855c0b718fb2a4b134",
    )
    origin: ClassVar[str] = "get the four files from http://codh.rois.ac.jp/kmnist/"

    name: Literal["kmnist"] = "kmnist"
    root: Place = Path("~/datasets/kmnist")


class Emnist(IdxDataset):
    """Handwritten letters and digits, cut in six ways. (Cohen et al. 2017, arXiv:1702.05373.)

    The files hold images transposed; here they are upright. The paper gives no mean and std: they are measured.
    """

    mean: ClassVar[tuple[float, ...] | None] = None
    std: ClassVar[tuple[float, ...] | None] = None
    folders: ClassVar[tuple[str, ...]] = ("gzip", "EMNIST/raw")
    url: ClassVar[str] = "https://biometrics.nist.gov/cs_links/EMNIST/gzip.zip"
    md5s: ClassVar[tuple[str, ...]] = ("58c8d27c78d21e728a6bc7b3cc06412e",)  # of the archive
    origin: ClassVar[str] = f"get and unpack {url}"
    facts: ClassVar[dict[str, tuple[int, int, int]]] = {
        "balanced": (47, 112_800, 18_800),
        "byclass": (62, 697_932, 116_323),
        "bymerge": (47, 697_932, 116_323),
        "digits": (10, 240_000, 40_000),
        "letters": (26, 124_800, 20_800),
        "mnist": (10, 60_000, 10_000),
    }
    """Classes, train images and test images by variant."""

    name: Literal["emnist"] = "emnist"
    root: Place = Path("~/datasets/emnist")
    variant: Literal["balanced", "byclass", "bymerge", "digits", "letters", "mnist"] = "balanced"

    @property
    def num_classes(self) -> int:
        """By variant."""
        return self.facts[self.variant][0]

    def download(self) -> None:
        if any(not self._found(stem) for stem in (*self._files("train"), *self._files("test"))):
            self._fetch_folder(self.url, self.md5s[0], "gzip")

    def _files(self, split: Split) -> tuple[str, str]:
        stem = f"emnist-{self.variant}-{split}"
        return f"{stem}-images-idx3-ubyte", f"{stem}-labels-idx1-ubyte"

    def _official_size(self, split: Split) -> int:
        return self.facts[self.variant][1 if split == "train" else 2]

    def _first_label(self) -> int:
        return 1 if self.variant == "letters" else 0

    def _official(self, split: Split) -> tuple[Tensor, Tensor]:
        images, labels = super()._official(split)
        return images.transpose(2, 3).contiguous(), labels


class CifarDataset(FileDataset):
    """CIFAR's "python version": the official archive, read in place, or else the folder that it unpacks to.

    `root` holds either. Where both are there the archive is read, because its md5 vouches for it.
    """

    shape: ClassVar[tuple[int, int, int]] = (3, 32, 32)
    url: ClassVar[str]
    archive: ClassVar[str]
    md5: ClassVar[str]
    folder: ClassVar[str]
    batches: ClassVar[dict[Split, tuple[str, ...]]]
    labels_key: ClassVar[bytes]
    recipes: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": {**PAPER, "augment": {"crop_padding": 4, "flip": True, "rotation_degrees": 15.0}},
        "modern": {"epochs": 200, **MODERN, "augment": {"crop_padding": 4, "flip": True}},
    }

    check_md5: bool = True
    """Refuse an archive that is not the official one, byte for byte."""

    def check(self) -> None:
        """Raise a ConfigError if there is neither archive nor folder."""
        self._source()

    def download(self) -> None:
        root = self.root.expanduser()
        if not (root / self.archive).is_file() and not (root / self.folder).is_dir():
            self._fetch(self.url, self.md5, root / self.archive)

    def _official(self, split: Split) -> tuple[Tensor, Tensor]:
        source, names = self._source(), self.batches[split]
        if source.is_dir():
            return self._joined(source, names, self._from_folder(source, names))
        kept = f"{self.name}-{split}" + "-md5" * self.check_md5
        return cached(kept, [source], lambda: self._joined(source, names, self._from_archive(source, names)))

    def _sources(self, split: Split) -> list[Path]:
        source = self._source()
        return [source / name for name in self.batches[split]] if source.is_dir() else [source]

    def _examine(self) -> None:
        source, names = self._source(), [name for split in SPLITS for name in self.batches[split]]
        (self._from_folder if source.is_dir() else self._from_archive)(source, tuple(names))

    def _joined(self, source: Path, names: tuple[str, ...], raw: dict[str, bytearray]) -> tuple[Tensor, Tensor]:
        import torch

        parts = [self._batch(source / name, raw[name]) for name in names]
        return torch.cat([images for images, _ in parts]), torch.cat([labels for _, labels in parts])

    def _source(self) -> Path:
        root = self.root.expanduser()
        if (root / self.archive).is_file():
            return root / self.archive
        if (root / self.folder).is_dir():
            return root / self.folder
        raise self._missing(f"{self.archive}, or the folder {self.folder} from it", [root])

    def _from_folder(self, folder: Path, names: tuple[str, ...]) -> dict[str, bytearray]:
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise self._wrong(folder, f"lacks {', '.join(missing)}; {self.origin}")
        found = {}
        for name in names:
            with opened(folder / name) as file:
                found[name] = read_at_most(file, MOST_BYTES)
        return found

    def _from_archive(self, path: Path, names: tuple[str, ...]) -> dict[str, bytearray]:
        if self.check_md5:
            with opened(path) as file:
                md5 = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
            if md5 != self.md5:
                problem = f"its md5 is {md5}, and the official archive's is {self.md5}; {self.origin}"
                raise self._wrong(path, f"{problem}, or set check_md5: false")
        wanted = {f"{self.folder}/{name}": name for name in names}
        found = {}
        try:
            with tarfile.open(path, "r:gz") as archive:
                for member in archive:
                    if member.name not in wanted:
                        continue
                    if not member.isreg():
                        raise self._wrong(
                            path, f"{member.name} is no file in it, but a link or the like; {self.origin}"
                        )
                    if content := archive.extractfile(member):
                        found[wanted[member.name]] = read_at_most(content, MOST_BYTES)
        except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
            raise self._wrong(path, f"cannot be read: {error}; {self.origin}") from None
        missing = [member for member, name in wanted.items() if name not in found]
        if missing:
            raise self._wrong(path, f"lacks {', '.join(missing)}; {self.origin}")
        return found

    def _batch(self, path: Path, raw: bytearray) -> tuple[Tensor, Tensor]:
        """(uint8 [N, 3, 32, 32], int64 [N]) of one pickle."""
        import torch

        if len(raw) >= MOST_BYTES:
            raise self._wrong(path, f"larger than any batch of CIFAR: {MOST_BYTES} bytes or more")
        try:
            batch = ArraysOnly(io.BytesIO(raw), encoding="bytes").load()
        except Exception as error:  # a pickle that is not one can end in any exception
            raise self._wrong(path, f"not a pickle of arrays, text and numbers: {error}") from None
        if not isinstance(batch, dict) or not {b"data", self.labels_key} <= batch.keys():
            raise self._wrong(path, f"needs the keys {b'data'!r} and {self.labels_key!r}")
        pixels, labels = batch[b"data"], batch[self.labels_key]
        try:
            images = torch.from_numpy(pixels.uint8(math.prod(self.shape)).reshape(-1, *self.shape))
        except (AttributeError, TypeError, ValueError):
            expected = f"an array of uint8, {math.prod(self.shape)} for each image"
            raise self._wrong(path, f"{b'data'!r} must be {expected}") from None
        if not isinstance(labels, list) or not all(type(k) is int and abs(k) < 2**31 for k in labels):
            raise self._wrong(path, f"{self.labels_key!r} must be a list of whole numbers")
        if not len(images) == len(labels) > 0:
            raise self._wrong(path, f"{len(labels)} labels for {len(images)} images")
        return images, self._checked_labels(path, torch.tensor(labels))


class Cifar10(CifarDataset):
    """60,000 photographs in 10 classes. (Krizhevsky 2009.)"""

    num_classes: ClassVar[int] = 10
    mean: ClassVar[tuple[float, ...]] = (0.4914 * 255, 0.4822 * 255, 0.4465 * 255)
    std: ClassVar[tuple[float, ...]] = (0.2470 * 255, 0.2435 * 255, 0.2616 * 255)
    archive: ClassVar[str] = "cifar-10-python.tar.gz"
    md5: ClassVar[str] = "c58f30108f718f92721af3b95e74349a"
    folder: ClassVar[str] = "cifar-10-batches-py"
    batches: ClassVar[dict[Split, tuple[str, ...]]] = {
        "train": ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5"),
        "test": ("test_batch",),
    }
    labels_key: ClassVar[bytes] = b"labels"
    url: ClassVar[str] = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
    origin: ClassVar[str] = f"get {url}"

    name: Literal["cifar10"] = "cifar10"
    root: Place = Path("~/datasets/cifar10")


class Cifar100(CifarDataset):
    """60,000 photographs in 100 classes, the "fine" ones; the data of the Tf-KD paper. (Krizhevsky 2009.)"""

    num_classes: ClassVar[int] = 100
    mean: ClassVar[tuple[float, ...]] = (0.5070751592371323 * 255, 0.48654887335491514 * 255, 0.4409178433670343 * 255)
    std: ClassVar[tuple[float, ...]] = (0.2673342858792401 * 255, 0.2564384629170883 * 255, 0.27615047132568404 * 255)
    archive: ClassVar[str] = "cifar-100-python.tar.gz"
    md5: ClassVar[str] = "eb9058c3a382ffc7106e4002c42a8d85"
    folder: ClassVar[str] = "cifar-100-python"
    batches: ClassVar[dict[Split, tuple[str, ...]]] = {"train": ("train",), "test": ("test",)}
    labels_key: ClassVar[bytes] = b"fine_labels"
    url: ClassVar[str] = "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz"
    origin: ClassVar[str] = f"get {url}"

    name: Literal["cifar100"] = "cifar100"
    root: Place = Path("~/datasets/cifar100")


# --- data sets of image files ----------------------------------------------------------------------------------


class TinyImagenet(FileDataset):
    """Tiny ImageNet: 110,000 photographs of 64x64 in 200 classes, in memory. (Stanford's CS231n, 2015.)

    The official layout, which is `root` or root/tiny-imagenet-200. Its `val` is the test split here, as the labels of
    its `test` were never published. Classes are in the order of their WordNet ids.
    """

    num_classes: ClassVar[int] = 200
    shape: ClassVar[tuple[int, int, int]] = (3, 64, 64)
    mean: ClassVar[tuple[float, ...]] = (0.4802 * 255, 0.4481 * 255, 0.3975 * 255)
    std: ClassVar[tuple[float, ...]] = (0.2302 * 255, 0.2265 * 255, 0.2262 * 255)
    url: ClassVar[str] = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
    md5: ClassVar[str] = "90528d7ca1a48142e341f4ef8d21d0de"
    origin: ClassVar[str] = f"get and unpack {url}"
    recipes: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": {
            **PAPER,
            "schedule": {**PAPER["schedule"], "gamma": 0.1},
            "augment": {"flip": True, "rotation_degrees": 20.0},
        },
        "modern": {"epochs": 200, **MODERN, "augment": {"crop_padding": 8, "flip": True}},
    }

    name: Literal["tiny_imagenet"] = "tiny_imagenet"
    root: Place = Path("~/datasets/tiny_imagenet")

    def check(self) -> None:
        """Raise a ConfigError if its lists and folders are not there."""
        self._folder()

    def download(self) -> None:
        try:
            self._folder()
        except ConfigError:
            self._fetch_folder(self.url, self.md5, "tiny-imagenet-200")

    def _folder(self) -> Path:
        root = self.root.expanduser()
        folders = [root, root / "tiny-imagenet-200"]
        needs = ("wnids.txt", "train", "val/images", "val/val_annotations.txt")
        for folder in folders:
            if all((folder / name).exists() for name in needs):
                return folder
        raise self._missing(f"{', '.join(needs)}, all in one folder", folders)

    def _wnids(self, folder: Path) -> list[str]:
        classes = sorted(self._text(folder / "wnids.txt").split())
        if len(set(classes)) != self.num_classes:
            raise self._wrong(folder / "wnids.txt", f"names {len(set(classes))} classes, not {self.num_classes}")
        if odd := [wnid for wnid in classes if not re.fullmatch(r"[\w.-]{1,100}", wnid)]:
            raise self._wrong(folder / "wnids.txt", f"{odd[0][:100]!r} is no name of a class")
        return classes

    def _official(self, split: Split) -> tuple[Tensor, Tensor]:
        import torch

        folder = self._folder()
        classes = self._wnids(folder)
        files = self._train_files(folder, classes) if split == "train" else self._val_files(folder, classes)
        lists = [folder / "wnids.txt", *([folder / "val/val_annotations.txt"] if split == "test" else [])]
        return cached(
            f"{self.name}-{split}",
            [*(path for path, _ in files), *lists],
            lambda: (self._images([path for path, _ in files]), torch.tensor([k for _, k in files])),
        )

    def _sources(self, split: Split) -> list[Path]:
        """The file of decoded images, which is replaced when one of 100,000 images changes."""
        folder = self._folder()
        wnid = min(self._text(folder / "wnids.txt").split(), default="")
        first = min((folder / split / wnid / "images").glob("*.JPEG"), default=None)
        return [cached_file(f"{self.name}-{split}", first)] if first else []

    def _examine(self) -> None:
        folder = self._folder()
        classes = self._wnids(folder)
        files = [*self._train_files(folder, classes), *self._val_files(folder, classes)]
        check_headers(self.name, [path for path, _ in files], self.shape[1:])

    def _train_files(self, folder: Path, classes: list[str]) -> list[tuple[Path, int]]:
        found = []
        for k, wnid in enumerate(classes):
            place = folder / "train" / wnid / "images"
            if not (names := sorted(place.glob("*.JPEG"))):
                raise self._wrong(place, f"there is no image (*.JPEG) of this class; {self.origin}")
            found += [(name, k) for name in names]
        return found

    def _val_files(self, folder: Path, classes: list[str]) -> list[tuple[Path, int]]:
        path, number = folder / "val/val_annotations.txt", {wnid: k for k, wnid in enumerate(classes)}
        try:
            there = {entry.name for entry in os.scandir(folder / "val/images")}
        except OSError as error:
            raise self._wrong(folder / "val/images", f"cannot be read: {error.strerror}") from None
        found = []
        for n, line in enumerate(self._text(path).splitlines(), start=1):
            name, _, rest = line.partition("\t")
            wnid = rest.partition("\t")[0]
            if wnid not in number:
                raise self._wrong(path, f"line {n}: needs an image and a class of wnids.txt, got {line[:200]!r}")
            if name not in there:
                raise self._wrong(path, f"line {n}: {name[:200]} is not in val/images; {self.origin}")
            found.append((folder / "val/images" / name, number[wnid]))
        if not found:
            raise self._wrong(path, f"is empty; {self.origin}")
        return sorted(found)

    def _text(self, path: Path) -> str:
        """One of its lists."""
        try:
            with opened(path) as file:
                raw = read_at_most(file, MOST_LIST)
            if len(raw) == MOST_LIST:
                raise self._wrong(path, f"larger than any such list: {MOST_LIST} bytes or more")
            return raw.decode()
        except UnicodeDecodeError as error:
            raise self._wrong(
                path, f"not text in UTF-8: byte {error.start} is {error.object[error.start]:#x}"
            ) from None
        except OSError as error:
            raise self._wrong(path, f"cannot be read: {error.strerror}") from None

    def _images(self, paths: list[Path]) -> Tensor:
        import torch

        images = torch.empty(len(paths), *self.shape, dtype=torch.uint8)

        def fill(start: int) -> None:
            for k, path in enumerate(paths[start : start + 100], start):
                pixels = decoded(self.name, path, rgb)
                if pixels.shape != self.shape:
                    raise self._wrong(path, f"is {pixels.shape[2]}x{pixels.shape[1]}, and all images are 64x64")
                images.numpy()[k] = pixels

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            try:
                list(pool.map(fill, range(0, len(paths), 100)))
            finally:
                pool.shutdown(cancel_futures=True)
        return images


Level = Annotated[float, Field(ge=0, le=255)]
Spread = Annotated[float, Field(ge=1, le=255)]  # a fraction of 255 by mistake is refused
IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


class FolderDataset(FileDataset):
    """Image files of any size in a folder for each class, as torchvision's ImageFolder has them; read while training.

    root/train/CLASS/* and root/val/CLASS/*, which is the test split here; root/test/CLASS/* where there is no `val`.
    Classes and images are in the order of their names. What begins with a dot is left alone, and so is what does not
    end as images do.
    """

    streams: ClassVar[bool] = True
    recipes: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": IMAGENET,
        "modern": {
            **IMAGENET,
            "optim": {**IMAGENET["optim"], **MODERN["optim"]},
            "schedule": {**MODERN["schedule"], "warmup_epochs": 5.0},
        },
    }

    image_size: Annotated[int, Field(ge=8, le=1024)] = 224
    """Height and width in pixels, S, that images get when they are read."""
    mean: tuple[Level, Level, Level] = (0.485 * 255, 0.456 * 255, 0.406 * 255)
    """Of red, green and blue, in units of a uint8 step (0 to 255); ImageNet's."""
    std: tuple[Spread, Spread, Spread] = (0.229 * 255, 0.224 * 255, 0.225 * 255)
    """In the same units."""
    readers: Annotated[int, Field(ge=1, le=256)] = 4
    """Threads that decode ahead of training, for each worker. They change no number."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(3, S, S)."""
        return 3, self.image_size, self.image_size

    def check(self) -> None:
        """Raise a ConfigError if a split is not there, or its classes are not as declared; looks at folders only."""
        self._classes("test")

    def _folder(self, split: Split) -> Path:
        root = self.root.expanduser()
        names = ("train",) if split == "train" else ("val", "test")
        for name in names:
            if (root / name).is_dir():
                return root / name
        raise self._missing(f"the folder {' or '.join(names)}", [root])

    def _classes(self, split: Split) -> list[str]:
        """Names of the class folders, sorted."""
        folder = self._folder(split)
        classes = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
        if split == "train":
            if len(classes) != self.num_classes:
                raise self._wrong(folder, f"{len(classes)} class folders, and num_classes is {self.num_classes}")
            return classes
        if differing := sorted(set(classes) ^ set(train := self._classes("train"))):
            where = "here, but not in train" if differing[0] in classes else "in train, but not here"
            count = f"{len(classes)} class folders here, {len(train)} in train"
            raise self._wrong(folder, f"its class folders must be those of train: {differing[0]} is {where} ({count})")
        return classes

    def _examine(self) -> None:
        for split in SPLITS:
            images = self._whole(split)
            assert isinstance(images, FolderSet), f"{images=}"
            check_headers(self.name, [images.folder / file for file in images.files])

    def _whole(self, split: Split) -> Images:
        import torch

        folder, files, labels = self._folder(split), list[str](), list[int]()
        for k, name in enumerate(self._classes(split)):
            found = sorted(_image_files(folder / name))
            if not found:
                raise self._wrong(folder / name, f"no image in it ({', '.join(IMAGE_SUFFIXES)})")
            files += [f"{folder.name}/{name}/{file}" for file in found]
            labels += [k] * len(found)
        root, positions = self.root.expanduser(), torch.arange(len(files))
        return FolderSet(
            self.name, root, tuple(files), torch.tensor(labels), positions, len(files), self.image_size, self.readers
        )


def _image_files(folder: Path) -> Iterator[str]:
    """Image files below a folder, relative to it, in any order; links are followed, but not to what they lie in."""
    above: dict[str, set[tuple[int, int]]] = {str(folder): {_identity(p) for p in folder.resolve().parents}}
    for place, folders, names in os.walk(folder, followlinks=True):
        passed = above.pop(place) | {_identity(Path(place))}
        folders[:] = [f for f in folders if not f.startswith(".") and _identity(Path(place, f)) not in passed]
        above |= {f"{place}/{name}": passed for name in folders}
        below = place[len(str(folder)) + 1 :]
        for name in names:
            if not name.startswith(".") and name.lower().endswith(IMAGE_SUFFIXES):
                yield f"{below}/{name}" if below else name


def _identity(folder: Path) -> tuple[int, int]:
    facts = folder.stat()
    return facts.st_dev, facts.st_ino


class ImageFolder(FolderDataset):
    """Image files of your own."""

    places: ClassVar[set[str]] = {"readers"}  # here the folder is what tells one data set from another
    known_by_digest: ClassVar[set[str]] = {"root"}
    origin: ClassVar[str] = "put images at root/train/CLASS/ and root/val/CLASS/"

    name: Literal["image_folder"] = "image_folder"
    num_classes: Annotated[int, Field(ge=2)]
    """As many as there are folders in root/train."""


class Imagenet(FolderDataset):
    """ImageNet of 2012: 1.28 million photographs in 1000 classes. (Russakovsky et al. 2015, arXiv:1409.0575.)

    50,000 more, its validation images, are the test split here.
    """

    num_classes: ClassVar[int] = 1000
    origin: ClassVar[str] = (
        "register at https://image-net.org for ILSVRC2012, and unpack it to root/train/CLASS/ and root/val/CLASS/"
    )

    name: Literal["imagenet"] = "imagenet"
    root: Place = Path("~/datasets/imagenet")


# --- your own --------------------------------------------------------------------------------------------------


_reads_only: ContextVar[bool] = ContextVar("_reads_only", default=False)


@contextlib.contextmanager
def only_reading() -> Iterator[None]:
    """Within it, settings that name code of one's own are believed: who reads an experiment imports nothing of it."""
    before = _reads_only.set(True)
    try:
        yield
    finally:
        _reads_only.reset(before)


def is_only_reading() -> bool:
    """Whether this is within `only_reading`."""
    return _reads_only.get()


def imported(path: str, what: str) -> Any:
    """The object at "package.module:name", also of a module in the working directory.

    Args:
        what: begins the ConfigError.
    """
    module_name, _, name = path.partition(":")
    if not all(part.isidentifier() for part in (*module_name.split("."), name)):
        raise ConfigError(f"{what}: must be 'package.module:name', got {path!r}")
    top = module_name.partition(".")[0]
    try:
        if top not in sys.modules and importlib.util.find_spec(top) is None:
            sys.path.append(own_code.here()["directory"])
            importlib.invalidate_caches()
        with seeded(0, "import", module_name):
            module = own_code.at_home(lambda: importlib.import_module(module_name))()
    except (Exception, SystemExit) as error:  # whatever somebody's module does
        if isinstance(error, ModuleNotFoundError) and error.name and f"{module_name}.".startswith(f"{error.name}."):
            looked = f"looked in {own_code.here()['directory']} and wherever Python does"
            raise ConfigError(f"{what}: {path}: there is no module {error.name!r} ({looked})") from None
        problem = f"importing {module_name} ends in {type(error).__name__}: {error}"
        raise ConfigError(f"{what}: {path}: {problem}") from error
    if not hasattr(module, name):
        hint = did_you_mean(name, [n for n in vars(module) if not n.startswith("_")])
        raise ConfigError(f"{what}: {path}: {module_name} has no {name!r}; {hint}")
    return getattr(module, name)


Side = Annotated[int, Field(ge=1, le=4096)]


class Own(Dataset):
    """Data from a function of yours: `function(split, **args)`, where split is "train" or "test".

    It returns (images, labels): uint8 [N, C, H, W] and whole numbers [N] from 0, as torch tensors or numpy arrays. It
    is called in every process that trains, and must return the same each time. torch's, numpy's and Python's global
    random numbers are seeded for it, always the same.
    """

    known_by_digest: ClassVar[set[str]] = {"path", "args"}
    origin: ClassVar[str] = "the function at data.path makes it"

    name: Literal["own"] = "own"
    path: str
    """package.module:function."""
    shape: tuple[Side, Side, Side]
    """(C, H, W)."""
    num_classes: Annotated[int, Field(ge=2)]
    args: dict[str, JsonValue] = {}
    """Keyword arguments of the function."""
    mean: tuple[Level, ...] | None = None
    """Per channel, in units of a uint8 step (0 to 255). None: measured."""
    std: tuple[Annotated[float, Field(gt=0, le=255)], ...] | None = None
    """In the same units."""

    def __hash__(self) -> int:
        return hash(json.dumps(self.model_dump(mode="json")))

    @model_validator(mode="after")
    def _statistics_for_all_channels(self) -> Self:
        if (self.mean is None) != (self.std is None):
            raise ValueError("mean and std: give both, or neither and they are measured")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if values is not None and len(values) != self.shape[0]:
                raise ValueError(f"{name}: {len(values)} values for {self.shape[0]} channels, see shape")
        return self

    def check(self) -> None:
        """Raise a ConfigError if the function is not there or does not take these arguments; it is not called."""
        self._function()

    def _function(self) -> Callable[..., Any]:
        function: Callable[..., Any] = imported(self.path, "data.path")
        if not callable(function):
            raise ConfigError(f"data.path: {self.path} is {function!r}, not a function")
        try:
            inspect.signature(function).bind("train", **self.args)
        except TypeError as error:
            given = "".join(f", {key}={value!r}" for key, value in self.args.items())
            problem = f"cannot be called as function('train'{given}): {error}"
            raise ConfigError(f"data.path: {self.path} {problem}; see data.args") from None
        except ValueError:  # written in C, without a signature
            pass
        return own_code.at_home(function)

    def _official(self, split: Split) -> tuple[Tensor, Tensor]:
        import torch

        function = self._function()
        with seeded(0, "data", split):  # of the global generators; what draws from one of its own seeds it itself
            found = function(split, **self.args)
        if not isinstance(found, tuple | list) or len(found) != 2:
            raise self._returned(split, f"must return (images, labels), got {_brief(found)}")
        images, labels = (_tensor(part) for part in found)
        if images is None or images.dtype != torch.uint8 or images.ndim != 4:
            expected = "a uint8 tensor or array [N, C, H, W]"
            raise self._returned(split, f"images must be {expected}, got {_brief(found[0])}")
        if images.shape[1:] != self.shape:
            got, declared = (" x ".join(map(str, sides)) for sides in (images.shape[1:], self.shape))
            raise self._returned(split, f"images are {got}, and data.shape says {declared}")
        whole = labels is not None and not (
            labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool
        )
        if labels is None or not whole or labels.ndim != 1:
            raise self._returned(split, f"labels must be whole numbers [N], got {_brief(found[1])}")
        if not len(images) == len(labels) > 0:
            raise self._returned(split, f"{len(labels)} labels for {len(images)} images")
        if problem := _label_problem(labels.long(), 0, self.num_classes):
            raise self._returned(split, f"{problem} (data.num_classes is {self.num_classes})")
        return images, labels.long()

    def _other_data(self, found: _Loaded) -> str:
        self._check_same_again(found)
        return super()._other_data(found) + (
            f". {self.path} must return the same in every process: seed what is random in it, and sort what it lists"
        )

    def _check_same_again(self, found: _Loaded) -> None:
        if digest_of(self._whole("train")) != found.digest:
            problem = "returns other images or labels at each call"
            raise self._returned("train", f"{problem}; seed what is random in it, so that all trials see the same")

    def _returned(self, split: Split, problem: str) -> ConfigError:
        return ConfigError(f"data own: {self.path}, called for {split!r}: {problem}")


def _tensor(value: Any) -> Tensor | None:
    """A tensor on the CPU of what may be one, else None."""
    import torch
    from torch import Tensor

    if isinstance(value, Tensor):
        return value.detach().cpu().contiguous()
    try:
        return torch.from_numpy(np.require(value, requirements=["C", "W"]))
    except (TypeError, ValueError):  # not numbers, or rows of different lengths
        return None


def _brief(value: Any) -> str:
    """Type, and shape or length, for a sentence."""
    from torch import Tensor

    if isinstance(value, Tensor | np.ndarray):
        return f"{type(value).__name__} of {str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return f"{type(value).__name__} of {len(value)}" if isinstance(value, tuple | list | dict) else repr(value)[:60]


Data = Annotated[
    Digits | Mnist | FashionMnist | Kmnist | Emnist | Cifar10 | Cifar100 | TinyImagenet | ImageFolder | Imagenet | Own,
    Field(discriminator="name"),
    BeforeValidator(named),
]


# --- splits ----------------------------------------------------------------------------------------------------


def stratified(labels: Tensor, fraction: float, *, seed: int) -> tuple[Tensor, Tensor]:
    """(kept, held out): sorted indices; `fraction` of every class is held out, at least one image, never all."""
    import torch

    order = torch.randperm(len(labels), generator=generator(seed, "split"))
    held = []
    for k in labels.unique().tolist():
        members = order[labels[order] == k]
        held.append(members[: min(max(1, round(len(members) * fraction)), len(members) - 1)])
    out = torch.zeros(len(labels), dtype=torch.bool)
    out[torch.cat(held)] = True
    return (~out).nonzero()[:, 0], out.nonzero()[:, 0]


@dataclass
class _Loaded:
    whole: Images
    """The official train set."""
    train: Images
    val: Images | None
    state: str | None
    """Of the files it was read from; None: not in files that are whole."""
    checked: bool = False
    """Whether it is known to be the same when it is loaded again."""

    @functools.cached_property
    def digest(self) -> str:
        """Of the official train set, whatever part of it is used."""
        if self.state is None:
            return digest_of(self.whole)
        return remembered(self.state, lambda: digest_of(self.whole))


@functools.lru_cache(maxsize=4)
def _examined(data: Dataset) -> None:
    data._examine()


@functools.lru_cache(maxsize=4)
def _load(data: Dataset) -> _Loaded:
    before = _state(data)  # before it is read: what is written meanwhile is read again
    whole = data._whole("train")
    train, val = split(whole.labels, data)
    return _Loaded(whole, whole.part(train), whole.part(val) if len(val) else None, before or _state(data))


def _state(data: Dataset) -> str | None:
    sources = data._sources("train")
    if not sources or not all(path.is_file() for path in sources):
        return None
    return state_of(sources)


def forget_loaded() -> None:
    """Free what was loaded, in a process that only had to know what it is."""
    _load.cache_clear()


ROWS = 64
"""Words of 8 bytes that are at most added up to one for the digest."""
COLUMNS = (509, 2_039, 8_191, 32_749, 131_071, 524_287)
"""Words from one of a sum to the next: the first of these primes that is more than an image has."""


def digest_of(images: Images) -> str:
    """32 hex digits that tell an official set from others: of its labels, their order, and its images.

    Images in memory count by their content. Of images that stay in their files the content is not read: their names,
    below the folder, and sizes count, so that a file of the same name and size is taken for the same. No time counts.
    """
    found = hashlib.sha256(images.labels.numpy().astype("<i4").data)
    if isinstance(images, FolderSet):
        for file in images.files:
            size = os.stat(f"{images.folder}/{file}").st_size  # noqa: PTH116  # a Path would take as long again
            found.update(os.fsencode(f"{file}\0{size}\0"))
    else:
        found.update(repr(tuple(images.stored.shape)).encode())
        content = images.stored.contiguous().numpy().reshape(-1)
        for part in _summed(content, math.prod(images.stored.shape[1:])):
            found.update(part.data)
    return found.hexdigest()[:32]


def _summed(content: np.ndarray[Any, np.dtype[np.uint8]], each: int) -> Iterator[np.ndarray[Any, Any]]:
    """The content in about 1/64 of its bytes, for a hash 8 times as fast as SHA-256, and no protection against forgery.

    Blocks of rows of words, of each of which the columns are added up. No sum has two words of one image, so a change
    of an image always changes a sum; nor has one the same word of two images, which somebody might exchange.

    Args:
        each: bytes of an image.
    """
    rows = min(ROWS, each // 8)
    columns = next((p for p in COLUMNS if p > each // 8 + 1 and each % p), 0)
    block = 8 * rows * columns  # 0: an image is so small or large that nothing is added up
    end = len(content) // block * block if block else 0
    if end:
        words = content[:end].view("<u8").reshape(-1, rows, columns)
        yield np.add.reduce(words, axis=1).astype("<u8", copy=False)
    yield content[end:]


@functools.lru_cache(maxsize=4)
def _measured(data: Dataset) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, std) per channel of train and validation, exact sums: the same however they are split."""
    import torch

    channels = data.shape[0]
    counts = torch.zeros(channels, 256, dtype=torch.int64)
    for part in data.load():
        assert part is None or isinstance(part, ImageSet), f"{data.name} streams, and says no mean"
        for images in () if part is None else part.read(torch.arange(len(part)).split(4096)):
            counts += torch.stack([images[:, c].flatten().bincount(minlength=256) for c in range(channels)])
    levels, shares = torch.arange(256.0).double(), counts.double() / counts.sum(1, keepdim=True)
    mean = shares @ levels
    std = (shares * (levels - mean[:, None]) ** 2).sum(1).sqrt()
    if not std.all():
        raise ConfigError(f"data {data.name}: channel {int(std.argmin())} has one value in all images; leave it out")
    return tuple(mean.tolist()), tuple(std.tolist())


def split(labels: Tensor, data: Dataset) -> tuple[Tensor, Tensor]:
    """(train, validation): positions in the official train set, sorted; validation may be empty."""
    import torch

    used = torch.arange(len(labels))
    if data.subset is not None and data.subset < len(labels):
        used = stratified(labels, 1 - data.subset / len(labels), seed=data.split_seed)[0]
    if not data.val_fraction:
        return used, used[:0]
    train, val = stratified(labels[used], data.val_fraction, seed=data.split_seed)
    if not len(val):
        raise ConfigError(f"data {data.name}: val_fraction: no class has two images, so none can be held out; got "
                          f"{data.val_fraction:g}")  # fmt: skip
    return used[train], used[val]


def _digits_file() -> Path:
    # found without importing scikit-learn, whose import takes 2 s in every new trial process
    spec = importlib.util.find_spec("sklearn")
    path = Path(spec.origin).parent / "datasets/data/digits.csv.gz" if spec and spec.origin else None
    if path is None or not path.is_file():
        raise ConfigError(f"data digits: not found (looked for {path}); {Digits.origin}")
    return path


@functools.cache
def _digits() -> tuple[Tensor, Tensor]:
    import torch

    with gzip.open(_digits_file(), "rt") as file:
        table = torch.from_numpy(np.loadtxt(file, delimiter=",", dtype=np.uint8))
    return table[:, :-1].reshape(-1, 1, 8, 8).contiguous(), table[:, -1].long()


# --- files -----------------------------------------------------------------------------------------------------


def _label_problem(labels: Tensor, first: int, num_classes: int) -> str | None:
    last = first + num_classes - 1
    outside = ((labels < first) | (labels > last)).nonzero()[:, 0]
    return f"label {int(labels[outside[0]])} at {int(outside[0])} is outside {first}..{last}" if len(outside) else None
