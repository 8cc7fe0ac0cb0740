"""Data sets with official files: MNIST and its relatives in IDX format, EMNIST and CIFAR."""

from __future__ import annotations

import gzip
import hashlib
import io
import math
import tarfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from tfkd_ray.learn.cache import cached
from tfkd_ray.settings.errors import ConfigError
from tfkd_ray.settings.files import ArraysOnly, opened, read_at_most

if TYPE_CHECKING:
    from torch import Tensor
from tfkd_ray.learn.dataset import (
    DEIT,
    FAST,
    MODERN,
    PAPER_RECIPE,
    PATIENT,
    SPLITS,
    AbsolutePath,
    Channels,
    FileDataset,
    ImageShape,
    Labelled,
    Split,
    augmented,
)

MOST_PICKLE_BYTES = 2**28
"""Limit of bytes of a CIFAR pickle; the largest official one has 155,249,918."""
MOST_MEMBERS = 10_000
"""Limit of members of a CIFAR archive; the official ones have 9 and 5."""
MOST_READ_BYTES = 2**24
"""Limit of bytes that are read of an archive at once."""


class IdxDataset(FileDataset):
    """A data set in MNIST's format: four IDX files, each plain or gzipped (`.gz`).

    `root` is the folder that holds them, or torchvision's download folder.
    """

    shape: ClassVar[ImageShape] = (1, 28, 28)
    mean: ClassVar[Channels | None] = None
    std: ClassVar[Channels | None] = None
    folders: ClassVar[tuple[str, ...]]
    """Other places of the files, below `root`."""
    url: ClassVar[str] = ""
    """URL of the files, or of the archive that holds them; empty if there is none to download."""
    md5s: ClassVar[tuple[str, ...]] = ()
    """md5 sums of the gzipped files: images and labels of train, then of test."""

    def _check(self) -> None:
        """Raise a ConfigError that names every missing file."""
        self._paths(*self._files("train"), *self._files("test"))

    def download(self) -> None:
        if not self.url:
            super().download()  # refuses, with the data set's origin
        for stem, md5 in zip([*self._files("train"), *self._files("test")], self.md5s, strict=True):
            if not self._found(stem):
                self._fetch(f"{self.url}/{stem}.gz", md5, self._root / f"{stem}.gz")

    def _sources(self, split: Split) -> list[Path]:
        return self._paths(*self._files(split))

    def _files(self, split: Split) -> tuple[str, str]:
        """Return the names (images, labels), without `.gz`."""
        part = {"train": "train", "test": "t10k"}[split]
        return f"{part}-images-idx3-ubyte", f"{part}-labels-idx1-ubyte"

    def _official_size(self, split: Split) -> int:
        return {"train": 60_000, "test": 10_000}[split]

    def _official(self, split: Split) -> Labelled:
        (images_path, labels_path), most = (
            self._paths(*self._files(split)),
            self._official_size(split),
        )
        images = self._array(images_path, 0x803, self.shape[1:], most)
        return images.reshape(-1, *self.shape), self._labels(
            labels_path, most, images_path, len(images)
        )

    def _examine(self) -> None:
        for split in SPLITS:
            (images, labels), most = self._paths(*self._files(split)), self._official_size(split)
            count = len(self._bytes(images, 0x803, self.shape[1:], most)) // math.prod(
                self.shape[1:]
            )
            self._labels(labels, most, images, count)

    def _labels(self, path: Path, most: int, images: Path, count: int) -> Tensor:
        labels = self._array(path, 0x801, (), most).long()
        if count != len(labels):
            raise self._wrong(path, f"{len(labels)} labels, and {images.name} has {count} images")
        return self._checked_labels(path, labels, self._first_label())

    def _first_label(self) -> int:
        return 0

    def _folders(self) -> list[Path]:
        root = self._root
        return [root, *(root / folder for folder in self.folders)]

    def _found(self, stem: str) -> list[Path]:
        return [
            p
            for folder in self._folders()
            for p in (folder / stem, folder / f"{stem}.gz")
            if p.is_file()
        ]

    def _paths(self, *stems: str) -> list[Path]:
        found = [self._found(stem) for stem in stems]
        missing = [stem for stem, paths in zip(stems, found, strict=True) if not paths]
        if missing:
            raise self._missing(f"{', '.join(missing)}, raw or with .gz", self._folders())
        return [paths[0] for paths in found]

    def _array(self, path: Path, magic: int, item: tuple[int, ...], most: int) -> Tensor:
        """Return uint8 [N, *item] of one file, N at most `most`."""
        import torch

        raw = self._bytes(path, magic, item, most)
        return torch.from_numpy(
            np.frombuffer(raw, np.uint8, offset=8 + 4 * len(item)).reshape(-1, *item)
        )

    def _bytes(self, path: Path, magic: int, item: tuple[int, ...], most: int) -> bytearray:
        """Return a file's bytes, header included; raise if it is incomplete or of another kind."""
        head, each = 8 + 4 * len(item), math.prod(item)
        try:
            with opened(path) as kept, gzip.open(kept) if path.suffix == ".gz" else kept as file:
                raw = read_at_most(file, head + most * each + 1)
        except (OSError, EOFError, zlib.error) as error:
            raise self._wrong(path, f"cannot be read: {error}; get it again") from None
        if len(raw) < head:
            raise self._wrong(
                path, f"truncated: its header takes {head} bytes, and there are {len(raw)}"
            )
        found, count, *size = np.frombuffer(raw, ">u4", head // 4).tolist()
        if found != magic:
            raise self._wrong(
                path, f"not this kind of IDX file: it starts with {found:#010x}, not {magic:#010x}"
            )
        if size != list(item):
            expected, got = ("x".join(map(str, sides)) for sides in (item, size))
            raise self._wrong(
                path, f"its images are {got}, and those of {self.name} are {expected}"
            )
        if not 0 < count <= most:
            raise self._wrong(
                path, f"its header says {count} items, and the official file has {most}"
            )
        if len(raw) != head + count * each:
            state = "truncated" if len(raw) < head + count * each else "too long"
            there = f"{'at least ' * (state == 'too long')}{len(raw) - head}"
            raise self._wrong(
                path, f"{state}: {count} items take {count * each} bytes, and there are {there}"
            )
        return raw


class Mnist(IdxDataset):
    """70,000 handwritten digits. (LeCun et al. 1998.)"""

    num_classes: ClassVar[int] = 10
    mean = (0.1307 * 255,)
    std = (0.3081 * 255,)
    folders = ("MNIST/raw",)
    url = "https://ossci-datasets.s3.amazonaws.com/mnist"
    md5s = (
        "f68b3c2dcbeaaa9fbdd348bbdeb94873",
        "d53e105ee54ea40749a09fcbcd1e9432",
        "9fb629c4189551a2d022fa330f9573f3",
        "ec29112dd5afa0611ce80d1b7f02629c",
    )
    origin = "get the four files from https://ossci-datasets.s3.amazonaws.com/mnist/"

    name: Literal["mnist"] = "mnist"
    root: AbsolutePath = Path("~/datasets/mnist")


class FashionMnist(IdxDataset):
    """70,000 pictures of clothes. (Xiao et al. 2017, arXiv:1708.07747.)

    The default `root` is the folder of Debian's package.
    """

    num_classes: ClassVar[int] = 10
    mean = (0.2860 * 255,)
    std = (0.3530 * 255,)
    folders = ("FashionMNIST/raw",)
    url = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"
    md5s = (
        "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "25c81989df183df01b3e8a0aad5dffbe",
        "bef4ecab320f06d8554ea6380940ec79",
        "bb300cfdad3c16e7a12a480ee83cd310",
    )
    origin = (
        "apt-get install dataset-fashion-mnist, or get the four files from "
        "https://github.com/zalandoresearch/fashion-mnist"
    )

    recipes = {
        "plain": {},
        "modern": MODERN,
        "patient": augmented(PATIENT, crop_padding=2, flip=True),
    }

    name: Literal["fashion_mnist"] = "fashion_mnist"
    root: AbsolutePath = Path("/usr/share/datasets/fashion-mnist")


class Kmnist(IdxDataset):
    """70,000 cursive Japanese characters, 10 classes. (Clanuwat et al. 2018, arXiv:1812.01718.)"""

    num_classes: ClassVar[int] = 10
    mean = (0.1904 * 255,)
    std = (0.3475 * 255,)
    folders = ("KMNIST/raw",)
    url = "http://codh.rois.ac.jp/kmnist/dataset/kmnist"
    md5s = (
        "bdb82020997e1d708af4cf47b453dcf7",
        "e144d726b3acfaa3e44228e80efcd344",
        "5c965bf0a639b31b8f53240b1b52f4d7",
        "7320c461ea6c1c855c0b718fb2a4b134",
    )
    origin = "get the four files from http://codh.rois.ac.jp/kmnist/"

    name: Literal["kmnist"] = "kmnist"
    root: AbsolutePath = Path("~/datasets/kmnist")


class Emnist(IdxDataset):
    """Handwritten letters and digits in six variants. (Cohen et al. 2017, arXiv:1702.05373.)

    The files hold transposed images; they are upright here. The paper gives no mean and std: they
    are measured.
    """

    folders = ("gzip", "EMNIST/raw")
    url = "https://biometrics.nist.gov/cs_links/EMNIST/gzip.zip"
    md5s = ("58c8d27c78d21e728a6bc7b3cc06412e",)  # of the archive
    origin = f"get and unpack {url}"
    facts: ClassVar[dict[str, tuple[int, int, int]]] = {
        "balanced": (47, 112_800, 18_800),
        "byclass": (62, 697_932, 116_323),
        "bymerge": (47, 697_932, 116_323),
        "digits": (10, 240_000, 40_000),
        "letters": (26, 124_800, 20_800),
        "mnist": (10, 60_000, 10_000),
    }
    """Classes, train images and test images per variant."""

    name: Literal["emnist"] = "emnist"
    root: AbsolutePath = Path("~/datasets/emnist")
    variant: Literal["balanced", "byclass", "bymerge", "digits", "letters", "mnist"] = "balanced"

    @property
    def num_classes(self) -> int:
        """Return the number of classes of the variant."""
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

    def _official(self, split: Split) -> Labelled:
        images, labels = super()._official(split)
        return images.transpose(2, 3).contiguous(), labels


class _Unpacked(gzip.GzipFile):
    """Content of a gzip file. tarfile reads at once as many bytes as a header claims to have."""

    def read(self, size: int | None = -1) -> bytes:
        """Read as gzip does; raise a ReadError for more than `MOST_READ_BYTES`."""
        if size is None or not 0 <= size <= MOST_READ_BYTES:
            raise tarfile.ReadError(f"a header claims a size of {size} bytes")
        return super().read(size)


class CifarDataset(FileDataset):
    """CIFAR in its "python version": the official archive, or the folder that it unpacks to.

    `root` holds either. If both exist, the archive is read, because its md5 proves its content.
    """

    num_classes: ClassVar[int]
    shape: ClassVar[ImageShape] = (3, 32, 32)
    mean: ClassVar[Channels]
    std: ClassVar[Channels]
    url: ClassVar[str]
    archive: ClassVar[str]
    md5: ClassVar[str]
    folder: ClassVar[str]
    batches: ClassVar[dict[Split, tuple[str, ...]]]
    labels_key: ClassVar[bytes]
    recipes = {
        "paper": {
            **PAPER_RECIPE,
            "augment": {"crop_padding": 4, "flip": True, "rotation_degrees": 15.0},
        },
        "modern": {"epochs": 200, **MODERN, "augment": {"crop_padding": 4, "flip": True}},
        "patient": augmented(PATIENT, crop_padding=4, flip=True),
        "deit": augmented(DEIT, crop_padding=4, flip=True),
        "fast": FAST,
    }

    check_md5: bool = True
    """Raise an error if the archive differs from the official one in any byte."""

    def _check(self) -> None:
        """Raise a ConfigError if both archive and folder are missing."""
        self._source()

    def download(self) -> None:
        root = self._root
        if not (root / self.archive).is_file() and not (root / self.folder).is_dir():
            self._fetch(self.url, self.md5, root / self.archive)

    def _official(self, split: Split) -> Labelled:
        source, names = self._source(), self.batches[split]
        if source.is_dir():
            return self._joined(source, names, self._from_folder(source, names))
        kept = f"{self.name}-{split}" + "-md5" * self.check_md5
        return cached(
            kept, [source], lambda: self._joined(source, names, self._from_archive(source, names))
        )

    def _sources(self, split: Split) -> list[Path]:
        source = self._source()
        return [source / name for name in self.batches[split]] if source.is_dir() else [source]

    def _examine(self) -> None:
        source = self._source()
        names = tuple(name for split in SPLITS for name in self.batches[split])
        read = self._from_folder if source.is_dir() else self._from_archive
        for name, raw in read(source, names).items():
            self._batch(source / name, raw)  # its labels and the number of its images

    def _joined(self, source: Path, names: tuple[str, ...], raw: dict[str, bytearray]) -> Labelled:
        import torch

        parts = [self._batch(source / name, raw[name]) for name in names]
        return torch.cat([images for images, _ in parts]), torch.cat(
            [labels for _, labels in parts]
        )

    def _source(self) -> Path:
        root = self._root
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
                found[name] = read_at_most(file, MOST_PICKLE_BYTES)
        return found

    def _from_archive(self, path: Path, names: tuple[str, ...]) -> dict[str, bytearray]:
        if self.check_md5:
            with opened(path) as file:
                md5 = hashlib.file_digest(
                    file, lambda: hashlib.md5(usedforsecurity=False)
                ).hexdigest()
            if md5 != self.md5:
                problem = (
                    f"its md5 is {md5}, and the official archive's is {self.md5}; {self.origin}"
                )
                raise self._wrong(path, f"{problem}, or set check_md5: false")
        wanted = {f"{self.folder}/{name}": name for name in names}
        found = {}
        try:
            with (
                opened(path) as file,
                _Unpacked(fileobj=file) as unpacked,
                tarfile.open(fileobj=unpacked, mode="r:") as archive,
            ):
                for number, member in enumerate(archive):
                    if fault := self._member_problem(number, member, wanted):
                        raise self._wrong(path, f"{fault}; {self.origin}")
                    batch = wanted.get(member.name)
                    content = archive.extractfile(member) if batch is not None else None
                    if batch is not None and content is not None:
                        found[batch] = read_at_most(content, MOST_PICKLE_BYTES)
        except ConfigError:
            raise
        except Exception as error:  # a damaged header can raise any exception
            raise self._wrong(path, f"cannot be read: {error}; {self.origin}") from None
        missing = [member for member, name in wanted.items() if name not in found]
        if missing:
            raise self._wrong(path, f"lacks {', '.join(missing)}; {self.origin}")
        return found

    def _member_problem(
        self, number: int, member: tarfile.TarInfo, wanted: dict[str, str]
    ) -> str | None:
        """Return what no CIFAR archive has, or None; `number` counts members from 0."""
        if number >= MOST_MEMBERS:
            return f"more than {MOST_MEMBERS} files in it"
        if member.size > MOST_PICKLE_BYTES:
            return f"{member.name} is larger than any file of CIFAR: more than {MOST_PICKLE_BYTES} bytes"
        if member.name in wanted and not member.isreg():
            return f"{member.name} is no file in it, but a link or the like"
        return None

    def _batch(self, path: Path, raw: bytearray) -> Labelled:
        """Return (uint8 [N, 3, 32, 32], int64 [N]) of one pickle."""
        import torch

        if len(raw) >= MOST_PICKLE_BYTES:
            raise self._wrong(
                path, f"larger than any batch of CIFAR: {MOST_PICKLE_BYTES} bytes or more"
            )
        try:
            batch = ArraysOnly(io.BytesIO(raw), encoding="bytes").load()
        except Exception as error:  # a damaged pickle can raise any exception
            raise self._wrong(path, f"not a pickle of arrays, text and numbers: {error}") from None
        if not isinstance(batch, dict) or not {b"data", self.labels_key} <= batch.keys():
            raise self._wrong(path, f"needs the keys {b'data'!r} and {self.labels_key!r}")
        pixels, labels = batch[b"data"], batch[self.labels_key]
        try:
            images = torch.from_numpy(pixels.uint8(math.prod(self.shape)).reshape(-1, *self.shape))
        except (AttributeError, TypeError, ValueError):
            expected = f"an array of uint8, {math.prod(self.shape)} for each image"
            raise self._wrong(path, f"{b'data'!r} must be {expected}") from None
        if not isinstance(labels, list) or not all(
            type(k) is int and abs(k) < 2**31 for k in labels
        ):
            raise self._wrong(path, f"{self.labels_key!r} must be a list of whole numbers")
        if not len(images) == len(labels) > 0:
            raise self._wrong(path, f"{len(labels)} labels for {len(images)} images")
        return images, self._checked_labels(path, torch.tensor(labels))


class Cifar10(CifarDataset):
    """60,000 photographs in 10 classes. (Krizhevsky 2009.)"""

    num_classes = 10
    mean = (0.4914 * 255, 0.4822 * 255, 0.4465 * 255)
    std = (0.2470 * 255, 0.2435 * 255, 0.2616 * 255)
    archive = "cifar-10-python.tar.gz"
    md5 = "c58f30108f718f92721af3b95e74349a"
    folder = "cifar-10-batches-py"
    batches = {
        "train": ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5"),
        "test": ("test_batch",),
    }
    labels_key = b"labels"
    url = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
    origin = f"get {url}"

    name: Literal["cifar10"] = "cifar10"
    root: AbsolutePath = Path("~/datasets/cifar10")


class Cifar100(CifarDataset):
    """60,000 photographs in 100 "fine" classes, the data of the Tf-KD paper. (Krizhevsky 2009.)"""

    num_classes = 100
    mean = (
        0.5070751592371323 * 255,
        0.48654887335491514 * 255,
        0.4409178433670343 * 255,
    )
    std = (
        0.2673342858792401 * 255,
        0.2564384629170883 * 255,
        0.27615047132568404 * 255,
    )
    archive = "cifar-100-python.tar.gz"
    md5 = "eb9058c3a382ffc7106e4002c42a8d85"
    folder = "cifar-100-python"
    batches = {"train": ("train",), "test": ("test",)}
    labels_key = b"fine_labels"
    url = "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz"
    origin = f"get {url}"

    name: Literal["cifar100"] = "cifar100"
    root: AbsolutePath = Path("~/datasets/cifar100")
