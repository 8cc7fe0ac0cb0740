"""Data sets, their splits, and randomness that is addressed instead of consumed.

A data set is a frozen Settings class that also loads itself. To add one: a class with a `name`, its facts and
`_official`, and one line in `Data`. Images live as uint8 tensors; every image knows its position in the official
train set, so that what is random about it is a function of (seed, epoch, position) and of nothing else.

Nothing is downloaded and nothing unpacked to disk. Files are checked as input from elsewhere: an IDX file takes no more
memory than the official one, and a pickle may hold arrays of bytes, text and numbers only.

Shapes: N = images, C = channels, H, W = height and width.
"""

import functools
import gzip
import hashlib
import importlib.util
import io
import math
import pickle
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import AfterValidator, BeforeValidator, Field
from torch import Tensor

from tfkd_ray.schema import ConfigError, Settings, named

Split = Literal["train", "test"]

MODERN: dict[str, Any] = {"optim": {"nesterov": True}, "schedule": {"name": "cosine", "warmup_epochs": 1.0}}
"""A recipe that does better than the paper's on every network we know figures of."""
PAPER: dict[str, Any] = {
    "epochs": 200,
    "optim": {"lr": 0.1, "weight_decay": 5e-4, "momentum": 0.9, "nesterov": False, "batch_size": 128},
    "schedule": {"name": "step", "milestones": [0.3, 0.6, 0.8], "gamma": 0.2, "warmup_epochs": 1.0},
}
"""The Tf-KD paper's recipe for CIFAR, without its augmentation."""

_test_split_sealed = False


def address(seed: int, *stream: str | int) -> int:
    """A 63-bit seed for one named use of randomness, such as (seed, "order", epoch)."""
    text = "/".join(str(part) for part in (seed, *stream))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *stream: str | int) -> torch.Generator:
    """A CPU generator at an address: the same numbers on every machine, device and number of workers."""
    return torch.Generator().manual_seed(address(seed, *stream))


def seal_test_split() -> None:
    """Make `load_test` refuse in this process, for good: a process that trains has no business with test images."""
    global _test_split_sealed
    _test_split_sealed = True


@dataclass(frozen=True)
class ImageSet:
    """Images of one split, in memory."""

    images: Tensor
    """uint8 [N, C, H, W]."""
    labels: Tensor
    """int64 [N]."""
    positions: Tensor
    """int64 [N]: each image's place in the official train set (or test set)."""
    official_size: int
    """Images in that official set."""

    def __len__(self) -> int:
        return len(self.labels)

    def on(self, device: torch.device) -> "ImageSet":
        """The set, its images included, on a device."""
        return ImageSet(self.images.to(device), self.labels.to(device), self.positions.to(device), self.official_size)

    def read(self, batches: Sequence[Tensor], crops: Tensor | None = None) -> Iterator[Tensor]:
        """The images of each batch of indices, uint8 [B, C, H, W]; these are whole already, and `crops` unused."""
        return (self.images[batch] for batch in batches)


class Dataset(Settings):
    """What every data set has: its facts as class attributes, and how validation is cut from train."""

    name: str
    num_classes: ClassVar[int]
    shape: ClassVar[tuple[int, int, int]]
    """(C, H, W)."""
    mean: ClassVar[tuple[float, ...]]
    """Per channel, over the official train set, in units of a uint8 step."""
    std: ClassVar[tuple[float, ...]]
    streams: ClassVar[bool] = False
    """Whether images stay on the disk and are decoded when they are needed."""
    recipes: ClassVar[dict[str, dict[str, Any]]] = {"plain": {}, "modern": MODERN}
    """Settings by recipe name, for whatever a configuration does not say; the first is the default."""

    val_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """Part of the official train set that is held out for validation, the same part of every class. 0: none, as when a
    student is trained for good."""
    subset: Annotated[int, Field(ge=1)] | None = None
    """About how many images of the official train set to use, the same part of every class; None: all."""
    split_seed: int = 0
    """Which images those are: fixed by (data set, split_seed), whatever the trial's seed."""

    def load(self) -> tuple[ImageSet, ImageSet | None]:
        """(train, validation): disjoint, stratified, both from the official train set; None if nothing is held out."""
        return _load(self)

    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """(mean, std) per channel, in units of a uint8 step."""
        return self.mean, self.std

    def load_test(self) -> ImageSet:
        """The test split. Refused in any process that trains trials of a sweep."""
        if _test_split_sealed:
            raise PermissionError(
                "the test split cannot be opened by a sweep: trials are chosen on validation, and test is opened once, "
                "after everything is chosen"
            )
        images, labels = self._official("test")
        return ImageSet(images, labels, torch.arange(len(labels)), len(labels))

    def check(self) -> None:
        """Raise a ConfigError if the data are not on this machine; cheap, reads no image."""
        raise TypeError(f"{type(self).__name__} does not say where it is")

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

    name: Literal["digits"] = "digits"

    def check(self) -> None:
        """Raise a ConfigError if scikit-learn's file is not there."""
        _digits()

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

    origin: ClassVar[str]
    """How to get the files: ends the sentence that says they are missing."""

    name: str
    root: Place
    """The folder that holds the files. A place, not content: it changes no number."""

    def _wrong(self, path: Path, problem: str) -> ConfigError:
        return ConfigError(f"data {self.name}: {path}: {problem}")

    def _missing(self, what: str, looked: list[Path]) -> ConfigError:
        places = ", ".join(map(str, looked))
        return ConfigError(f"data {self.name}: not found: {what} (looked in {places}); {self.origin}, or set data.root")

    def _checked_labels(self, path: Path, labels: Tensor) -> Tensor:
        outside = ((labels < 0) | (labels >= self.num_classes)).nonzero()[:, 0]
        if len(outside):
            i = int(outside[0])
            raise self._wrong(path, f"label {int(labels[i])} at {i} is outside 0..{self.num_classes - 1}")
        return labels


class IdxDataset(FileDataset):
    """A data set in MNIST's format: four IDX files, each as it is or gzipped (`.gz`).

    `root` is the folder that holds them, or one that torchvision has downloaded to.
    """

    num_classes: ClassVar[int] = 10
    shape: ClassVar[tuple[int, int, int]] = (1, 28, 28)
    official_sizes: ClassVar[dict[Split, int]] = {"train": 60_000, "test": 10_000}
    files: ClassVar[dict[Split, tuple[str, str]]] = {
        "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
        "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
    }
    torchvision_folder: ClassVar[str]

    def check(self) -> None:
        """Raise a ConfigError that names every file that is not there."""
        self._paths(*self.files["train"], *self.files["test"])

    def _official(self, split: Split) -> tuple[Tensor, Tensor]:
        images_path, labels_path = self._paths(*self.files[split])
        images = self._array(images_path, 0x803, self.shape[1:], self.official_sizes[split])
        labels = self._array(labels_path, 0x801, (), self.official_sizes[split]).long()
        if len(images) != len(labels):
            raise self._wrong(labels_path, f"{len(labels)} labels, and {images_path.name} has {len(images)} images")
        return images.reshape(-1, *self.shape), self._checked_labels(labels_path, labels)

    def _paths(self, *stems: str) -> list[Path]:
        root = self.root.expanduser()
        folders = [root, root / self.torchvision_folder / "raw"]
        found = [[p for d in folders for p in (d / stem, d / f"{stem}.gz") if p.is_file()] for stem in stems]
        missing = [stem for stem, paths in zip(stems, found, strict=True) if not paths]
        if missing:
            raise self._missing(f"{', '.join(missing)}, raw or with .gz", folders)
        return [paths[0] for paths in found]

    def _array(self, path: Path, magic: int, item: tuple[int, ...], most: int) -> Tensor:
        """uint8 [N, *item] of one file, N at most `most`."""
        head, each = 8 + 4 * len(item), math.prod(item)
        try:
            with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
                raw = _read(file, head + most * each + 1)
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
        return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=head).reshape(count, *item))


class Mnist(IdxDataset):
    """70,000 handwritten digits. (LeCun et al. 1998.)"""

    mean: ClassVar[tuple[float, ...]] = (0.1307 * 255,)
    std: ClassVar[tuple[float, ...]] = (0.3081 * 255,)
    torchvision_folder: ClassVar[str] = "MNIST"
    origin: ClassVar[str] = "get the four files from https://ossci-datasets.s3.amazonaws.com/mnist/"

    name: Literal["mnist"] = "mnist"
    root: Place = Path("~/datasets/mnist")


class FashionMnist(IdxDataset):
    """70,000 pictures of clothes. (Xiao et al. 2017, arXiv:1708.07747.) `root` is by default where Debian puts them."""

    mean: ClassVar[tuple[float, ...]] = (0.2860 * 255,)
    std: ClassVar[tuple[float, ...]] = (0.3530 * 255,)
    torchvision_folder: ClassVar[str] = "FashionMNIST"
    origin: ClassVar[str] = (
        "apt-get install dataset-fashion-mnist, or get the four files from "
        "https://github.com/zalandoresearch/fashion-mnist"
    )

    name: Literal["fashion_mnist"] = "fashion_mnist"
    root: Place = Path("/usr/share/datasets/fashion-mnist")


class Kmnist(IdxDataset):
    """70,000 cursive Japanese characters in 10 classes. (Clanuwat et al. 2018, arXiv:1812.01718.)"""

    mean: ClassVar[tuple[float, ...]] = (0.1904 * 255,)
    std: ClassVar[tuple[float, ...]] = (0.3475 * 255,)
    torchvision_folder: ClassVar[str] = "KMNIST"
    origin: ClassVar[str] = "get the four files from http://codh.rois.ac.jp/kmnist/"

    name: Literal["kmnist"] = "kmnist"
    root: Place = Path("~/datasets/kmnist")


class CifarDataset(FileDataset):
    """CIFAR's "python version": the official archive, read in place, or else the folder that it unpacks to.

    `root` holds either. Where both are there the archive is read, because its md5 vouches for it.
    """

    shape: ClassVar[tuple[int, int, int]] = (3, 32, 32)
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

    def _official(self, split: Split) -> tuple[Tensor, Tensor]:
        source, names = self._source(), self.batches[split]
        raw = self._from_folder(source, names) if source.is_dir() else self._from_archive(source, names)
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
            with (folder / name).open("rb") as file:
                found[name] = _read(file, _MOST_BYTES)
        return found

    def _from_archive(self, path: Path, names: tuple[str, ...]) -> dict[str, bytearray]:
        if self.check_md5:
            with path.open("rb") as file:
                md5 = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
            if md5 != self.md5:
                problem = f"its md5 is {md5}, and the official archive's is {self.md5}; {self.origin}"
                raise self._wrong(path, f"{problem}, or set check_md5: false")
        wanted = {f"{self.folder}/{name}": name for name in names}
        found = {}
        try:
            with tarfile.open(path, "r:gz") as archive:
                for member in archive:
                    if member.name in wanted and (content := archive.extractfile(member)):
                        found[wanted[member.name]] = _read(content, _MOST_BYTES)
        except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
            raise self._wrong(path, f"cannot be read: {error}; {self.origin}") from None
        missing = [member for member, name in wanted.items() if name not in found]
        if missing:
            raise self._wrong(path, f"lacks {', '.join(missing)}; {self.origin}")
        return found

    def _batch(self, path: Path, raw: bytearray) -> tuple[Tensor, Tensor]:
        """(uint8 [N, 3, 32, 32], int64 [N]) of one pickle."""
        if len(raw) >= _MOST_BYTES:
            raise self._wrong(path, f"larger than any batch of CIFAR: {_MOST_BYTES} bytes or more")
        try:
            batch = _ArraysOnly(io.BytesIO(raw), encoding="bytes").load()
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
    origin: ClassVar[str] = "get https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"

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
    origin: ClassVar[str] = "get https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz"

    name: Literal["cifar100"] = "cifar100"
    root: Place = Path("~/datasets/cifar100")


Data = Annotated[
    Digits | Mnist | FashionMnist | Kmnist | Cifar10 | Cifar100, Field(discriminator="name"), BeforeValidator(named)
]


def stratified(labels: Tensor, fraction: float, *, seed: int) -> tuple[Tensor, Tensor]:
    """(kept, held out): sorted indices; `fraction` of every class is held out, at least one image, never all."""
    order = torch.randperm(len(labels), generator=generator(seed, "split"))
    held = []
    for k in labels.unique().tolist():
        members = order[labels[order] == k]
        held.append(members[: min(max(1, round(len(members) * fraction)), len(members) - 1)])
    out = torch.zeros(len(labels), dtype=torch.bool)
    out[torch.cat(held)] = True
    return (~out).nonzero()[:, 0], out.nonzero()[:, 0]


@functools.lru_cache(maxsize=4)
def _load(data: Dataset) -> tuple[ImageSet, ImageSet | None]:
    images, labels = data._official("train")
    train, val = split(labels, data)
    parts = [ImageSet(images[part], labels[part], part, len(labels)) for part in (train, val)]
    return parts[0], parts[1] if len(val) else None


def split(labels: Tensor, data: Dataset) -> tuple[Tensor, Tensor]:
    """(train, validation): positions in the official train set, sorted; validation may be empty."""
    used = torch.arange(len(labels))
    if data.subset is not None and data.subset < len(labels):
        used = stratified(labels, 1 - data.subset / len(labels), seed=data.split_seed)[0]
    if not data.val_fraction:
        return used, used[:0]
    train, val = stratified(labels[used], data.val_fraction, seed=data.split_seed)
    return used[train], used[val]


@functools.cache
def _digits() -> tuple[Tensor, Tensor]:
    # found without importing scikit-learn, whose import takes 2 s in every new trial process
    spec = importlib.util.find_spec("sklearn")
    path = Path(spec.origin).parent / "datasets/data/digits.csv.gz" if spec and spec.origin else None
    if path is None or not path.is_file():
        raise ConfigError(
            f"data digits: not found (looked for {path}); it comes with scikit-learn: pip install scikit-learn"
        )
    with gzip.open(path, "rt") as file:
        table = torch.from_numpy(np.loadtxt(file, delimiter=",", dtype=np.uint8))
    return table[:, :-1].reshape(-1, 1, 8, 8).contiguous(), table[:, -1].long()


_MOST_BYTES = 2**28
"""More than the largest pickle of CIFAR, which has 155,249,918 bytes."""


def _read(file: IO[bytes] | gzip.GzipFile, most: int) -> bytearray:
    """The file's first `most` bytes, or all; piecewise, so that memory follows what is there, not what is claimed."""
    found = bytearray()
    while piece := file.read(min(2**20, most - len(found))):
        found += piece
    return found


class _ArraysOnly(pickle.Unpickler):
    """Reads a pickle of numpy arrays, text and numbers without calling anything that the pickle names."""

    def find_class(self, module: str, name: str) -> Any:
        """A stand-in for one of the four names that a pickled array needs; any other is an error."""
        multiarray = module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct"
        if multiarray or (module == "numpy" and name in ("ndarray", "dtype")):
            return _Pickled
        if (module, name) == ("_codecs", "encode"):
            return functools.partial(_encode)  # a new one each time: a pickle may set attributes of what it gets
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which could run code; nothing was run")


def _encode(text: str, encoding: str) -> bytes:
    if encoding not in ("latin1", b"latin1"):
        raise pickle.UnpicklingError(f"bytes as {encoding!r}, not latin1")
    return text.encode("latin1")


class _Pickled:
    """What a pickle says about an array or a dtype, inert: numpy sees none of it but the bytes."""

    def __init__(self, *args: Any) -> None:
        self.args = args
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def uint8(self, width: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """The array, if it is one of uint8 [N, width]; else a TypeError or ValueError."""
        _, (count, columns), dtype, fortran, raw = self.state
        if not isinstance(dtype, _Pickled) or dtype.args[:1] not in (("u1",), (b"u1",)) or not isinstance(raw, bytes):
            raise TypeError("not uint8")
        if columns != width:
            raise ValueError(f"{columns} columns, not {width}")
        # bytearray: torch wants memory that it may write to
        return np.frombuffer(bytearray(raw), np.uint8).reshape((count, width), order="F" if fortran else "C")
