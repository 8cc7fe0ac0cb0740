"""Images without labels: where they come from, and which of them each step sees.

They take part in the soft part of a loss alone, see `objectives`; they are in no validation and no
test, and no teacher is trained on them.

A run sees them in one long sequence: pass after pass over all of them, each pass in an order of its
own and as a view of its own (crops, partners), functions of (seed, pass). Each epoch takes its next
part. So an image comes once a pass, whether they are more or fewer than what an epoch takes, and no
image is the partner of one of another pass.

Shapes: M = unlabelled images, n = those of an epoch, C = channels, H, W = height and width.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import math
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tfkd_ray.learn.augment import Augment, EpochView, View
from tfkd_ray.learn.cache import cached
from tfkd_ray.learn.images import (
    IMAGE_SUFFIXES,
    FolderSet,
    Images,
    ImageSet,
    address,
    all_decoded,
    generator,
    image_names,
    seeded,
)
from tfkd_ray.learn.mixing import Mix
from tfkd_ray.learn.own import imported
from tfkd_ray.settings import own_code
from tfkd_ray.settings.errors import ConfigError
from tfkd_ray.settings.files import expanded, opened

if TYPE_CHECKING:
    from torch import Tensor

REST = "rest"
"""The images of the official train set that `data.subset` leaves out."""
ARRAYS = (".npy", ".npz")
IN_NPZ = "images"
"""Name of the array in a .npz file that has several."""
MOST_COMPARED = 2**30
"""Bytes of images up to which they are compared with those of validation."""


def is_array(source: str) -> bool:
    """Return whether a source is a file of one array."""
    return not own_code.is_function(source) and source.lower().endswith(ARRAYS)


def absolute_source(source: str) -> str:
    """Return a source with its path made absolute: a trial has another working directory."""
    if not source:
        raise ValueError(
            "needs rest, a folder of images, a file (.npy, .npz) or package.module:function, got ''"
        )
    if source == REST or own_code.is_function(source) or Path(source).parts[:1] == ("~",):
        return source
    return str(Path(source).absolute())


# --- where they are -------------------------------------------------------------------------------


class Source(NamedTuple):
    """Where unlabelled images are, and what the images of their data set are like."""

    place: str
    """See `Dataset.unlabelled`."""
    name: str
    """Name of the data set."""
    shape: tuple[int, int, int]
    """(C, H, W)."""
    brightest: int
    """Largest value of a pixel."""
    reads: Callable[[Path, tuple[str, ...]], FolderSet] | None
    """Returns images in files, which are decoded when they are read. None: they are in memory."""


def check_unlabelled(source: Source) -> None:
    """Raise a ConfigError if the unlabelled images are not here; cheap, reads no image."""
    if source.place == REST:
        return
    if own_code.is_function(source.place):
        _function(source.place)
    elif is_array(source.place):
        with _header(_path(source.place)) as (shape, dtype):
            _check_array(source, shape, dtype)
    else:
        _first_image(_path(source.place))


def sources_of(source: Source) -> list[Path]:
    """Return the files of unlabelled images that are read into memory, or an empty list."""
    if source.place == REST or own_code.is_function(source.place):
        return []
    path = _path(source.place)
    if is_array(source.place):
        return [path]
    return [] if source.reads else [path / name for name in _names(path)]


def found_in(source: Source) -> Images:
    """Return the unlabelled images of a folder, a file or a function; the labels are all 0."""
    if own_code.is_function(source.place):
        return _in_memory(source, _from_function(source))
    if is_array(source.place):
        return _in_memory(source, _from_array(source))
    folder = _path(source.place)
    names = tuple(_names(folder))
    if source.reads is not None:
        return source.reads(folder, names)
    files = [folder / name for name in names]
    name = "unlabelled-" + "x".join(map(str, source.shape))
    images, _ = cached(name, files, lambda: _decoded(source, files))
    return _in_memory(source, images)


def without_labels(images: Images) -> Images:
    """Return the images with 0 in place of every label, which nothing may learn."""
    return dataclasses.replace(images, labels=images.labels.new_zeros(len(images)))


def _path(source: str) -> Path:
    path = expanded(source)
    if not path.exists():
        raise ConfigError(
            f"data.unlabelled: not found: {path}; give rest, a folder of images, a file (.npy, .npz) or "
            "package.module:function, at the same place on every machine"
        )
    if path.is_dir() == is_array(source):
        kind = "is a folder, and a name with .npy or .npz is a file's"
        if not path.is_dir():
            kind = "is no folder; one file holds its images as an array (.npy, .npz)"
        raise ConfigError(f"data.unlabelled: {path}: {kind}")
    return path


def _names(folder: Path) -> list[str]:
    """Return the image files at any depth of a folder, sorted."""
    try:
        names = sorted(image_names(folder))
    except OSError as error:
        raise ConfigError(
            f"data.unlabelled: {error.filename or folder}: cannot be read: {error.strerror}"
        ) from None
    if not names:
        raise _empty(folder)
    return names


def _first_image(folder: Path) -> None:
    """Raise a ConfigError if there is no image in a folder; stop at the first one."""
    try:
        if next(image_names(folder), None) is not None:
            return
    except OSError:
        _names(folder)  # says which
    raise _empty(folder)


def _empty(folder: Path) -> ConfigError:
    return ConfigError(f"data.unlabelled: {folder}: no image in it ({', '.join(IMAGE_SUFFIXES)})")


def _decoded(source: Source, files: Sequence[Path]) -> tuple[Tensor, Tensor]:
    import torch

    if source.shape[0] not in (1, 3):
        raise ConfigError(
            f"data.unlabelled: image files have 1 or 3 channels, and images of {source.name} have "
            f"{source.shape[0]}; give an array of them (.npy, .npz), or package.module:function"
        )
    images = all_decoded(source.name, files, source.shape)
    return images, torch.zeros(len(images), dtype=torch.int64)


def _in_memory(source: Source, images: Tensor) -> ImageSet:
    """Return images in memory as a set; raise a ConfigError if a pixel is brighter than theirs."""
    import torch

    if source.brightest < 255 and (highest := int(images.max())) > source.brightest:
        raise ConfigError(
            f"data.unlabelled: {source.place}: pixels reach {highest}, and those of {source.name} end at "
            f"{source.brightest}; scale them"
        )
    count = len(images)
    none = torch.zeros(count, dtype=torch.int64)
    return ImageSet(images, none, torch.arange(count), count)


def _check_array(source: Source, shape: Sequence[int], dtype: Any) -> None:
    """Raise a ConfigError if an array does not hold images of the data set."""
    said = "x".join(map(str, source.shape))
    if str(dtype).removeprefix("torch.") != "uint8" or len(shape) != 4:
        raise ConfigError(
            f"data.unlabelled: {source.place}: needs uint8 [N, C, H, W], with C, H, W of {said}, got "
            f"{str(dtype).removeprefix('torch.')} {list(shape)}"
        )
    if tuple(shape[1:]) != tuple(source.shape):
        got = "x".join(map(str, shape[1:]))
        raise ConfigError(
            f"data.unlabelled: {source.place}: its images are {got}, and those of {source.name} are {said} (C, H, W)"
        )
    if not shape[0]:
        raise ConfigError(f"data.unlabelled: {source.place}: holds no image")


def _function(source: str) -> Callable[..., Any]:
    function: Callable[..., Any] = imported(source, "data.unlabelled")
    if not callable(function):
        raise ConfigError(f"data.unlabelled: {source} is {function!r}, not a function")
    try:
        inspect.signature(function).bind("unlabelled")
    except TypeError as error:
        raise ConfigError(
            f"data.unlabelled: {source} cannot be called as function('unlabelled'): {error}"
        ) from None
    except ValueError:  # written in C, without a signature
        pass
    return own_code.at_home(function)


def _from_function(source: Source) -> Tensor:
    """Return what a user's function gives for "unlabelled": images alone, or with labels."""
    import torch

    function = _function(source.place)
    try:
        with seeded(0, "data", "unlabelled"):
            found = function("unlabelled")
    except Exception as error:  # the author's code may raise anything
        problem = f"called for 'unlabelled', ends in {type(error).__name__}: {error}"
        raise ConfigError(f"data.unlabelled: {source.place}, {problem}") from error
    if isinstance(found, tuple | list) and len(found) == 2:
        found = found[0]  # without the labels, which it returns as for "train"
    if isinstance(found, torch.Tensor):
        images = found.detach().cpu().contiguous()
    elif isinstance(found, np.ndarray):
        _check_array(source, found.shape, found.dtype)
        images = torch.from_numpy(np.require(found, requirements=["C", "W"]))
    else:
        raise ConfigError(
            f"data.unlabelled: {source.place}: must return images, a tensor or array, got {type(found).__name__}"
        )
    _check_array(source, images.shape, images.dtype)
    return images


def _from_array(source: Source) -> Tensor:
    """Return the images of a file; those of .npy are mapped, so that processes share them."""
    import torch

    path = _path(source.place)
    with _header(path) as (shape, dtype):
        _check_array(source, shape, dtype)
    with _readable(path):
        if path.suffix.lower() == ".npy":
            return torch.from_numpy(np.require(np.load(path, mmap_mode="c"), requirements="C"))
        with np.load(path) as arrays:
            return torch.from_numpy(np.require(arrays[_name_in(arrays.files)], requirements="C"))


_DAMAGED = (OSError, ValueError, EOFError, KeyError, RuntimeError, SyntaxError, MemoryError)
"""What numpy and zipfile raise for a damaged file, besides their own errors."""


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Raise a ConfigError for a file that is damaged, or holds something else."""
    try:
        yield
    except (*_DAMAGED, zipfile.BadZipFile, zlib.error) as error:
        problem = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"data.unlabelled: {path}: cannot be read as an array: {problem}; write it with numpy.save"
        ) from None


def _name_in(names: Sequence[str]) -> str:
    """Return the name of the array of images in a .npz file."""
    if IN_NPZ in names:
        return IN_NPZ
    if len(names) != 1:
        listed = ", ".join(names) or "none"
        raise ValueError(f"it has the arrays {listed}; name the one of images {IN_NPZ!r}")
    return names[0]


@contextlib.contextmanager
def _header(path: Path) -> Iterator[tuple[tuple[int, ...], np.dtype[Any]]]:
    """Yield the shape and kind of the array in a file, without its content."""
    with _readable(path), contextlib.ExitStack() as opened_files:
        file: Any = opened_files.enter_context(opened(path))
        size = path.stat().st_size
        if path.suffix.lower() == ".npz":
            arrays = opened_files.enter_context(zipfile.ZipFile(file))
            members = [name.removesuffix(".npy") for name in arrays.namelist()]
            about = arrays.getinfo(f"{_name_in(members)}.npy")
            file, size = opened_files.enter_context(arrays.open(about)), about.file_size
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0
        if version != (1, 0):
            read = np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
        if file.tell() + math.prod(shape) * dtype.itemsize > size:
            raise ValueError(f"its header says {list(shape)}, and it has {size} bytes")
    yield shape, dtype


# --- validation images among them -----------------------------------------------------------------


def count_in(images: Images, others: Images | None) -> int | None:
    """Return how many images are, byte for byte, among others; None if they are not compared.

    Images in files and more than `MOST_COMPARED` bytes are not.
    """
    if others is None:
        return 0
    if not isinstance(images, ImageSet) or not isinstance(others, ImageSet):
        return None
    if (len(images) + len(others)) * images.stored[0].numel() > MOST_COMPARED:
        return None
    known = {image.tobytes() for image in others.images.numpy()}
    return sum(image.tobytes() in known for image in images.images.numpy())


# --- which of them an epoch sees ------------------------------------------------------------------


class UnlabelledPart(NamedTuple):
    """The unlabelled images of an epoch, in the order in which its steps take them."""

    chosen: Tensor
    """int64 [n]: indices among all unlabelled images."""
    images: Images
    """The n images, and with mixup or cutmix the partner of each, [2n]."""
    view: EpochView
    """How they are seen, likewise."""
    key: dict[str, Any]
    """Key of this view in the bank."""


class UnlabelledStream(NamedTuple):
    """The sequence in which a run sees its unlabelled images.

    Args:
        images: all of them, on a device.
        known_as: their digest, or `rest`; part of the key of views.
        size: (H, W).
    """

    images: Images
    known_as: str
    augment: Augment
    seed: int
    size: tuple[int, int]

    @property
    def key(self) -> dict[str, Any]:
        """Return the key of all of them as one view; see `UnlabelledPart.key`."""
        tree = self.augment.model_dump(mode="json")
        return {"split": "unlabelled", "images": self.known_as, "augment": tree}

    @property
    def whole(self) -> UnlabelledPart:
        """Return all of them, as they are seen without random augmentation."""
        import torch

        every = torch.arange(len(self.images))
        return UnlabelledPart(every, self.images, self._of_pass(0)[1], self.key)

    def part(self, start: int, count: int) -> UnlabelledPart:
        """Return `count` images from a place in the sequence on."""
        import torch

        M = len(self.images)
        chosen: list[Tensor] = []
        views: list[View] = []
        mixes: list[Mix] = []
        of_partners: list[View] = []
        for number in range(start // M, (start + count - 1) // M + 1):
            order, (view, mix) = self._of_pass(number)
            mine = order[max(start - number * M, 0) : start + count - number * M]
            chosen.append(mine)
            views.append(view.of(mine))
            if mix is not None:
                mixes.append(mix.of(mine))
                of_partners.append(view.of(mix.partner[mine]))
        joined = torch.cat(chosen)
        rows, mixed = joined, None
        if mixes:
            partner, *rest = (torch.cat(part) for part in zip(*mixes, strict=True))
            mixed = Mix(torch.arange(count, 2 * count), *rest)
            rows = torch.cat([joined, partner])
        images = self.images.part(rows.to(self.images.labels.device))
        seen = EpochView(_joined([*views, *of_partners]), mixed)
        which = {"seed": self.seed, "from": start, "count": count}
        return UnlabelledPart(joined, images, seen, self.key | which)

    def _of_pass(self, number: int) -> tuple[Tensor, EpochView]:
        """Return the order of a pass over all images, and how it sees them."""
        import torch

        seed = address(self.seed, "unlabelled")
        order = torch.randperm(len(self.images), generator=generator(seed, "order", number))
        return order, self.augment.of_epoch(seed, number, self.images, self.size)


def _joined(views: Sequence[View]) -> View:
    import torch

    parts = [None if part[0] is None else torch.cat(part) for part in zip(*views, strict=True)]
    return View(*parts)  # type: ignore[arg-type]


def number_beside(count: int, ratio: float) -> int:
    """Return how many unlabelled images a step takes beside its labelled ones: one at least."""
    return max(1, round(ratio * count))
