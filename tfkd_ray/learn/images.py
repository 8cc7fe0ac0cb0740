"""Images of one split, in memory or in files, and random numbers by address.

Every image knows its position in the official train set, so randomness is a function of (seed,
epoch, position) only; no draw depends on the draws before it.

Shapes: N = images, B = images of a batch, C = channels, H, W = height and width, S = side of images
made square.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import math
import os
import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

from tfkd_ray.learn.reader import IMAGES_AT_ONCE, fill
from tfkd_ray.learn.shrunk import Kind, NeededRows, SmallImages, all_rows
from tfkd_ray.settings.errors import ConfigError
from tfkd_ray.settings.files import opened

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray
    from torch import Tensor

    Pixels = NDArray[np.uint8]


AHEAD = 4
"""Batches that are decoded ahead of the one in training."""
Crop = Sequence[float] | None
"""Numbers of a random crop, see `crop_box`. None: the shorter side is resized to 256/224 of S, and
the centre is cropped."""


def address(seed: int, *stream: str | int) -> int:
    """Return a 63-bit seed for one named use of randomness, such as (seed, "order", epoch)."""
    text = "/".join(str(part) for part in (seed, *stream))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *stream: str | int) -> torch.Generator:
    """Return a CPU generator at an address, the same on every machine."""
    import torch

    return torch.Generator().manual_seed(address(seed, *stream))


def seed_all(seed: int) -> None:
    """Seed torch, numpy and `random`, for external code that may draw from any of them."""
    import torch

    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  (the generator that others draw from)


def random_states() -> Callable[[], None]:
    """Return a function that restores numpy and `random` to their present state."""
    ours, numpys = random.getstate(), np.random.get_state()  # noqa: NPY002

    def put_back() -> None:
        random.setstate(ours)
        np.random.set_state(numpys)  # noqa: NPY002

    return put_back


def random_position() -> tuple[Any, ...]:
    """Return the state of the global generators of torch, numpy and Python; a draw changes it."""
    import torch

    _, keys, *rest = np.random.get_state()  # noqa: NPY002
    torchs = [
        torch.get_rng_state(),
        *(torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else ()),
    ]
    return (
        random.getstate(),
        np.asarray(keys).tobytes(),
        *rest,
        [state.numpy().tobytes() for state in torchs],
    )


@contextlib.contextmanager
def seeded(seed: int, *stream: str | int) -> Iterator[None]:
    """Seed torch, numpy and `random` from an address inside the block; restore them afterwards."""
    import torch

    put_back = random_states()
    try:
        with torch.random.fork_rng(devices=[]):
            seed_all(address(seed, *stream))
            yield
    finally:
        put_back()


@dataclass(frozen=True)
class ImageSet:
    """Images of one split, in memory."""

    stored: Tensor
    """uint8 [M, C, H, W]: these images and possibly others; if mapped from a file, all processes of
    a node share them."""
    labels: Tensor
    """int64 [N]."""
    positions: Tensor
    """int64 [N]: position of each image in the official train (or test) set."""
    official_size: int
    """Number of images in that official set."""
    rows: Tensor | None = None
    """int64 [N]: row of each image in `stored`. None: N = M, in order."""

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def images(self) -> Tensor:
        """Return uint8 [N, C, H, W]; a copy if `stored` holds other images too."""
        return self.stored if self.rows is None else self.stored[self.rows]

    @property
    def read_from(self) -> torch.device:
        """Return the device on which `read` takes indices without a wait."""
        return self.stored.device

    def part(self, index: Tensor) -> ImageSet:
        """Return the images at some indices."""
        here, positions = index.to(self.labels.device), self.positions[index.cpu()]
        rows = here if self.rows is None else self.rows[here]
        return ImageSet(self.stored, self.labels[here], positions, self.official_size, rows)

    def on(self, device: torch.device) -> ImageSet:
        """Return the set on a device, images included, but for the positions: the host draws by them."""
        if device.type == "cpu":
            return self
        images = self.images.to(device)
        return ImageSet(images, self.labels.to(device), self.positions, self.official_size)

    def read(self, batches: Sequence[Tensor], crops: Tensor | None = None) -> Iterator[Tensor]:
        """Yield the images of each batch of indices, uint8 [B, C, H, W]; `crops` is unused."""
        # `stored[rows]` takes about 8 times as long on a CPU: it copies pixel by pixel
        rows = (batch if self.rows is None else self.rows[batch] for batch in batches)
        return (self.stored.index_select(0, row) for row in rows)


class Files(NamedTuple):
    """Where image files are, and how they are decoded: all that a reader process needs to know."""

    name: str
    """Name of the data set, for errors."""
    folder: Path
    side: int
    """S: images are decoded to S x S."""
    cache: Kind
    """Whether images are kept with a short side of `short`, and how; see `shrunk`."""

    @property
    def short(self) -> int:
        """Return the short side to which images are brought before a centre crop: 256 for 224."""
        return round(self.side * 256 / 224)

    def wire(self) -> list[Any]:
        """Return the same as JSON."""
        return [self.name, str(self.folder), self.side, self.cache]

    @classmethod
    def of_wire(cls, wire: list[Any]) -> Files:
        """Return what `wire` has made JSON of."""
        name, folder, side, cache = wire
        return cls(name, Path(folder), side, cache)


def decode_into(files: Files, names: Sequence[str], crops: Sequence[Crop], out: Pixels) -> None:
    """Decode image files into `out`, uint8 [n, 3, S, S].

    Args:
        names: paths below the folder.
        crops: one for each of them.
    """
    small = SmallImages.of(files.cache, files.short)
    for name, crop, pixels in zip(names, crops, out, strict=True):
        path = f"{files.folder}/{name}"
        view = functools.partial(_viewed, crop=crop, size=files.side)
        if files.cache == "none":
            image = opened_as(files.name, Path(path), view)
        else:
            make = functools.partial(_made_small, files, path)
            image = view(small.read(path, make, _rows_of(crop, files.side)))
        _copy(image, pixels)


def _viewed(image: Image.Image, crop: Crop, size: int) -> Image.Image:
    return _centre(image, size) if crop is None else _cut_to_size(image, crop, size)


def _made_small(files: Files, path: str) -> Image.Image:
    """Return an image brought to the size that the cache keeps."""
    return opened_as(files.name, Path(path), lambda image: _brought_to(image, files.short))


def _rows_of(crop: Crop, size: int) -> NeededRows:
    """Return the rows that a random crop is made of.

    Pillow's bilinear filter looks beyond a box, by at most the rows that become one, or by 1.
    """
    if crop is None:
        return all_rows

    def rows(width: int, height: int) -> tuple[int, int]:
        _, top, _, h = crop_box(crop, width, height)
        beyond = math.ceil(h / size) + 2
        return max(0, top - beyond), min(height, top + h + beyond)

    return rows


@dataclass(frozen=True)
class FolderSet:
    """Images of one split that stay in their files; each is decoded when it is read."""

    place: Files
    files: tuple[str, ...]
    """Paths below the folder, one per image."""
    labels: Tensor
    """int64 [N]."""
    positions: Tensor
    """int64 [N]: position of each image among all files of the official set, sorted by class and
    name."""
    official_size: int
    """Number of images in that official set."""
    readers: int
    """Number of threads, or processes, that decode ahead."""
    decode_in: Literal["threads", "processes"] = "threads"

    @property
    def folder(self) -> Path:
        """Return the folder of all files."""
        return self.place.folder

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def read_from(self) -> torch.device:
        """Return the device on which `read` takes indices without a wait: files are read by the host."""
        import torch

        return torch.device("cpu")

    def part(self, index: Tensor) -> FolderSet:
        """Return the images at some indices."""
        files = tuple(self.files[i] for i in index.tolist())
        return replace(
            self, files=files, labels=self.labels[index], positions=self.positions[index]
        )

    def on(self, device: torch.device) -> FolderSet:
        """Return the set with labels and positions on a device; images are read on the CPU."""
        return replace(self, labels=self.labels.to(device))

    def read(self, batches: Sequence[Tensor], crops: Tensor | None = None) -> Iterator[Tensor]:
        """Yield the images of each batch of indices, uint8 [B, 3, S, S], on the CPU.

        `readers` threads or processes decode ahead.

        Args:
            crops: float [N, 4] on the CPU, see `crop_box`. None, or [N, 0]: the shorter side is
                resized to 256/224 of S, and the centre is cropped.
        """
        crops = crops if crops is not None and crops.shape[1] else None
        # copied now: a later copy would wait for the device
        plans = [batch.cpu() for batch in batches]
        ahead: deque[tuple[Tensor, list[Future[None]]]] = deque()
        pool = ThreadPoolExecutor(self.readers, "tfkd-reader")
        try:
            for plan in plans:
                ahead.append(self._start(pool, plan, crops))
                if len(ahead) > AHEAD:
                    yield _finished(*ahead.popleft())
            while ahead:
                yield _finished(*ahead.popleft())
        finally:
            pool.shutdown(cancel_futures=True)

    def _start(
        self, pool: ThreadPoolExecutor, plan: Tensor, crops: Tensor | None
    ) -> tuple[Tensor, list[Future[None]]]:
        """Return (the batch, still empty; the futures that fill it)."""
        images = self._empty_batch(len(plan))
        numbers: list[Crop] = [None] * len(plan) if crops is None else crops[plan].tolist()
        names = [self.files[i] for i in plan.tolist()]
        fill, size = self._filler()
        jobs = []
        for start in range(0, len(names), size):
            part = slice(start, start + size)
            jobs.append(
                pool.submit(fill, self.place, names[part], numbers[part], images.numpy()[part])
            )
        return images, jobs

    def _empty_batch(self, count: int) -> Tensor:
        """Return uint8 [count, 3, S, S]; on a CPU in large pages, which numpy asks for."""
        import torch

        shape = count, 3, self.place.side, self.place.side
        if self.labels.is_cuda:
            return torch.empty(shape, dtype=torch.uint8, pin_memory=True)
        return torch.from_numpy(np.empty(shape, np.uint8))

    def _filler(self) -> tuple[Callable[..., None], int]:
        """Return what decodes some images in a thread of this process, and how many at once."""
        if self.decode_in == "threads":
            return decode_into, IMAGES_AT_ONCE
        return _decode_in_process, IMAGES_AT_ONCE


def _decode_in_process(
    files: Files, names: Sequence[str], crops: Sequence[Crop], out: Pixels
) -> None:
    """Decode as `decode_into` does, in a process of its own."""
    fill(files.wire(), names, crops, out)


def _finished(images: Tensor, jobs: list[Future[None]]) -> Tensor:
    for job in jobs:
        job.result()
    return images


def decoded(name: str, path: Path, view: Callable[[Image.Image], Image.Image]) -> Pixels:
    """Return uint8 [3, H, W] of an image file after `view`, in RGB.

    Args:
        name: of the data set, for errors.
    """
    image = opened_as(name, path, view)
    wide, high = image.size
    pixels = np.empty((3, high, wide), np.uint8)
    _copy(image, pixels)
    return pixels


def _copy(image: Image.Image, out: Pixels) -> None:
    """Copy an RGB or RGBX image into uint8 [3, H, W].

    Channel by channel, which is faster than a transposed copy of all.
    """
    for channel, pixels in zip("RGB", out, strict=True):
        pixels[:] = np.frombuffer(image.tobytes("raw", channel), np.uint8).reshape(pixels.shape)


def opened_as(name: str, path: Path, view: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """Return an image file after `view`; raise a ConfigError that names one which cannot be read.

    Args:
        name: of the data set, for errors.
    """
    try:
        with opened(path) as file, Image.open(file) as image:
            _check_kept_values(image, file)
            found = view(image)
            found.load()
            return found
    except _NotEightBits as error:
        raise ConfigError(f"data {name}: {path}: {error}") from None
    except Exception as error:  # a damaged image can raise any exception
        raise ConfigError(f"data {name}: {path}: {_unreadable(error)}") from None


def _unreadable(error: Exception) -> str:
    reason = str(error)
    if isinstance(error, OSError) and error.strerror:
        reason = error.strerror
    if isinstance(error, UnidentifiedImageError):  # its text names Python's file object
        reason = "no known format begins like it"
    return f"cannot be read as an image: {reason}; replace or remove it"


IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


def is_image_name(name: str) -> bool:
    """Return whether a file ends as image files do, and is not hidden."""
    return not name.startswith(".") and name.lower().endswith(IMAGE_SUFFIXES)


def image_names(folder: Path) -> Iterator[str]:
    """Yield the image files below a folder, relative to it, in any order; see `file_names`."""
    return (name for name in file_names(folder) if is_image_name(name.rpartition("/")[2]))


def file_names(folder: Path) -> Iterator[str]:
    """Yield the files below a folder, relative to it, in any order; links may form cycles.

    Names that begin with a dot are skipped.

    A folder that cannot be listed raises its OSError.
    """

    def stop(error: OSError) -> None:
        raise error

    above: dict[str, set[tuple[int, int]]] = {
        str(folder): {_folder_identity(p) for p in folder.resolve().parents}
    }
    for place, folders, names in os.walk(folder, onerror=stop, followlinks=True):
        passed = above.pop(place) | {_folder_identity(Path(place))}
        folders[:] = [
            f
            for f in folders
            if not f.startswith(".") and _folder_identity(Path(place, f)) not in passed
        ]
        above |= {f"{place}/{name}": passed for name in folders}
        below = place[len(str(folder)) + 1 :]
        for name in names:
            if not name.startswith("."):
                yield f"{below}/{name}" if below else name


def _folder_identity(folder: Path) -> tuple[int, int]:
    facts = folder.stat()
    return facts.st_dev, facts.st_ino


def all_decoded(name: str, paths: Sequence[Path], shape: tuple[int, int, int]) -> Tensor:
    """Return uint8 [N, C, H, W] of image files that all have this shape.

    Args:
        name: of the data set, for errors.
        shape: (C, H, W); C is 3, or 1 for files without colours.
    """
    import torch

    images = torch.empty(len(paths), *shape, dtype=torch.uint8)
    size = f"{shape[2]}x{shape[1]}"

    def fill(start: int) -> None:
        for k, path in enumerate(paths[start : start + 100], start):
            pixels = decoded(name, path, rgb)
            if pixels.shape[1:] != shape[1:]:
                found = f"{pixels.shape[2]}x{pixels.shape[1]}"
                raise ConfigError(f"data {name}: {path}: is {found}, and all images are {size}")
            if shape[0] == 1 and not (pixels == pixels[:1]).all():
                raise ConfigError(f"data {name}: {path}: has colours, and its images have none")
            images.numpy()[k] = pixels[: shape[0]]

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        try:
            list(pool.map(fill, range(0, len(paths), 100)))
        finally:
            pool.shutdown(cancel_futures=True)
    return images


def check_headers(name: str, paths: Sequence[Path], size: tuple[int, ...] | None = None) -> None:
    """Raise a ConfigError that names files without a valid image header; decode no pixel.

    Args:
        name: of the data set, for errors.
        size: (H, W) that all must have; None: any.
    """

    def problem_of(path: Path) -> str | None:
        try:
            with opened(path) as file, Image.open(file) as image:
                wide, high = image.size
                _check_kind_of_pixels(image)
        except _NotEightBits as error:
            return str(error)
        except Exception as error:  # as in `decoded`
            return _unreadable(error)
        return (
            f"is {wide}x{high}, and all images are {size[1]}x{size[0]}"
            if size and size != (high, wide)
            else None
        )

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = [
            (path, problem)
            for path, problem in zip(paths, pool.map(problem_of, paths), strict=True)
            if problem
        ]
    problems = [f"data {name}: {path}: {problem}" for path, problem in found[:10]]
    if len(found) > 10:
        problems.append(f"data {name}: {len(found) - 10} more files")
    if problems:
        raise ConfigError(problems)


_CROP_SHAPES = np.linspace(-math.log(4 / 3), math.log(4 / 3), 65)
"""log(w / h) of crops, from 3:4 to 4:3."""


def crop_box(crop: Sequence[float], width: int, height: int) -> tuple[int, int, int, int]:
    """Return (left, top, width, height) of a random resized crop, always inside the image.

    The distribution is torchvision's: 8 to 100 % of the area and a log-uniform aspect ratio of 3:4
    to 4:3, given that the crop fits. Instead of rejection sampling, the aspect ratio is drawn from
    the resulting conditional distribution. If an image is so elongated that nothing fits, it gets
    the largest box of 3:4 or 4:3.

    Args:
        crop: uniform in [0, 1): area, shape, top, left.
    """
    wide = math.log(width / height)
    drawn = _drawn_shapes(wide)
    shape = float(np.interp(crop[1] * drawn[-1], drawn, _CROP_SHAPES))
    most = math.exp(-abs(shape - wide))
    area = (min(0.08, most) + crop[0] * max(most - 0.08, 0)) * width * height
    w = min(max(1, round(math.sqrt(area * math.exp(shape)))), width)
    h = min(max(1, round(math.sqrt(area / math.exp(shape)))), height)
    return int(crop[3] * (width - w + 1)), int(crop[2] * (height - h + 1)), w, h


@functools.lru_cache(4096)
def _drawn_shapes(wide: float) -> NDArray[np.float64]:
    """Return the distribution of `_CROP_SHAPES`, not normalised, in an image of this log(w / h)."""
    # width of the interval of fitting areas, which begins at 8 %
    room = (np.exp(-np.abs(_CROP_SHAPES - wide)) - 0.08).clip(1e-9)
    return np.concatenate([[0.0], (room[1:] + room[:-1]).cumsum()])


def _cut_to_size(image: Image.Image, crop: Sequence[float], size: int) -> Image.Image:
    """Return a random resized crop, RGB."""
    width, height = _upright_size(image)
    left, top, w, h = crop_box(crop, width, height)
    wide, high = _shrunk(image, width * size / w, height * size / h)
    x, y = wide / width, high / height
    box = (left * x, top * y, min((left + w) * x, wide), min((top + h) * y, high))
    return rgb(image).resize((size, size), Image.Resampling.BILINEAR, box)


def _centre(image: Image.Image, size: int) -> Image.Image:
    """Return the centre crop as torchvision does: shorter side resized to size * 256 / 224, RGB."""
    resized = _resized(image, round(size * 256 / 224))
    wide, high = resized.size
    left, top = round((wide - size) / 2), round((high - size) / 2)
    return resized.crop((left, top, left + size, top + size))


def _resized(image: Image.Image, short: int) -> Image.Image:
    """Return the image with its shorter side resized to `short`, RGB."""
    sides = _upright_size(image)
    wide, high = (int(short * side / min(sides)) for side in sides)
    whole = (0.0, 0.0, *_shrunk(image, wide, high))
    return rgb(image).resize((wide, high), Image.Resampling.BILINEAR, whole)


def _brought_to(image: Image.Image, short: int) -> Image.Image:
    """Return the image with a shorter side of at most `short`, RGB."""
    return rgb(image) if min(image.size) <= short else _resized(image, short)


def _shrunk(image: Image.Image, width: float, height: float) -> tuple[float, float]:
    """Return the decoded upright size: a large JPEG at 1/2, 1/4 or 1/8, still twice the need."""
    turn = _turn(image)
    sides = (height, width) if turn in _SIDEWAYS else (width, height)
    drafted = image.draft(None, (math.ceil(2 * sides[0]), math.ceil(2 * sides[1])))
    if turn is not None or not drafted:
        return _upright_size(image)
    return drafted[1][2:]  # draft's own size, because 900 / 8 columns are decoded to 113


# --- upright, and in 8 bits -----------------------------------------------------------------------

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""Transposition that makes an image upright, by EXIF orientation; 1 is upright."""
_SIDEWAYS = {_TURNS[k] for k in (5, 6, 7, 8)}


def _turn(image: Image.Image) -> Image.Transpose | None:
    """Return the transposition that makes the image upright, or None.

    None: the image is upright, or its EXIF data are missing or unreadable.
    """
    if image.format is None:  # of no file, but of the cache, whose images are upright
        return None
    if image.format not in ("JPEG", "MPO"):
        image.load()  # Pillow turns a TIFF itself; others may store EXIF data after the pixels
    try:
        return _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged EXIF data can raise any exception, and the pixels are intact
        return None


def _upright_size(image: Image.Image) -> tuple[int, int]:
    """Return (width, height) of the upright image."""
    sideways = _turn(image) in _SIDEWAYS
    return (image.size[1], image.size[0]) if sideways else image.size


class _NotEightBits(ValueError):
    """Raised for an image whose values cannot be scaled to 0..255 without a guess."""


def _check_kept_values(image: ImageFile.ImageFile, file: BinaryIO) -> None:
    """Raise for an image, not yet decoded, of which Pillow itself makes other values in 8 bits."""
    tags = getattr(image, "tag_v2", {})
    if image.mode == "L" and 2 in tags.get(339, ()):  # SampleFormat: Pillow takes -1 for 255
        raise _NotEightBits(
            "its pixels are signed, -128 to 127, and it is unknown which value is black; write it with values from 0 "
            "to 255"
        )
    tiles = image.tile
    wide = any(_has_16_bits(tile) for tile in tiles)
    if image.mode not in ("RGB", "RGBA", "CMYK") or not wide:
        return
    upper = _colours_of(image)
    highest = int(upper.max())
    if highest <= 16 and _loses_levels(file, tiles, upper):
        raise _NotEightBits(
            f"the 16-bit values of its colours stay below {256 * (highest + 1)} of 65535 (mode {image.mode}), so that "
            f"8 bits would keep {len(np.unique(upper))} of their levels; if white is a smaller number, as in 12 bits, "
            "scale it to 65535, or write it with 8 bits"
        )


def _colours_of(image: Image.Image) -> Pixels:
    """Return the pixels, decoded, without their transparency."""
    return np.asarray(image)[..., : 4 if image.mode == "CMYK" else 3]


def _has_16_bits(tile: Any) -> bool:
    """Return whether Pillow reads a part of a file with 16 bits a colour; see `ImageFile.tile`."""
    if tile.codec_name in ("ppm", "ppm_plain"):
        return bool(tile.args[1] > 255)
    return ";16" in str(tile.args)


def _loses_levels(file: BinaryIO, tiles: Sequence[Any], upper: Pixels) -> bool:
    """Return whether values differ in 16 bits that are the same in the upper 8.

    Pillow keeps the upper bytes alone. The file is read again for the lower ones.
    """
    if any(tile.codec_name == "ppm_plain" for tile in tiles):  # rare, and all of it is text
        return True
    if tiles[0].codec_name == "ppm":
        file.seek(tiles[0].offset)
        values = np.frombuffer(file.read(2 * upper.size), ">u2")
        highest = int(values.max(initial=0))
        levels = len(np.unique(upper))
        return highest < 4096 * tiles[0].args[1] // 65535 and len(np.unique(values)) > levels
    if upper.max() == 16:
        return False
    file.seek(0)
    with Image.open(file) as again:
        again.tile = [tile._replace(args=_swapped(tile.args)) for tile in tiles]
        # grey with transparency, read as four bytes: the grey's lower one is the second
        is_grey = "LA;16" in str(tiles[0].args)
        lower = np.asarray(again)[..., 1:2] if is_grey else _colours_of(again)
    values = upper[..., : lower.shape[2]].astype(np.uint16) * 256 + lower
    return len(np.unique(values)) > len(np.unique(upper))


def _swapped(args: Any) -> Any:
    """Return a decoder's arguments with which the lower byte of each value is taken."""
    if isinstance(args, tuple):
        return (_swapped(args[0]), *args[1:])
    if args == "LA;16B":
        return "RGBA"
    return args[:-1] + ("B" if args[-1] in ("L", "N") else "L")  # N: the machine's own, little


def rgb(image: Image.Image) -> Image.Image:
    """Return the image in RGB, or in RGBX if it is, 8 bits per channel, upright."""
    turn, image = _turn(image), _eight_bits(image)
    # no colour changes, and Pillow would warn about a palette's transparency
    image.info.pop("transparency", None)
    image = image if image.mode in ("RGB", "RGBX") else image.convert("RGB")  # X: no channel
    return image if turn is None else image.transpose(turn)


def _is_16_bit(image: Image.Image) -> bool:
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM")


def _check_kind_of_pixels(image: Image.Image) -> None:
    """Raise if the header says numbers whose black and white are unknown; look at no pixel."""
    if image.mode not in ("I", "F") or _is_16_bit(image):
        return
    kind = "floating-point numbers" if image.mode == "F" else "whole numbers of 32 bits"
    raise _NotEightBits(
        f"its pixels are {kind} (mode {image.mode}), and it is unknown which value is black and which is white; write "
        "it with 8 bits, or with 16 bits from 0 to 65535"
    )


def _eight_bits(image: Image.Image) -> Image.Image:
    """Return the image with 8 bits per channel; of 16-bit grey, the upper 8, as in Pillow."""
    _check_kind_of_pixels(image)
    if not _is_16_bit(image):
        return image
    values = np.asarray(image)
    tags = getattr(image, "tag_v2", {})
    bits = tags.get(258, (16,))[0]  # a TIFF's BitsPerSample, 12 or 16
    # PhotometricInterpretation: 0 is white, which Pillow respects at 8 bits only
    if tags.get(262) == 0:
        values = 65535 - values
    levels = (values >> (bits - 8)).astype(np.uint8)
    if values.max() < 4096 and bits == 16 and len(np.unique(values)) > len(np.unique(levels)):
        raise _NotEightBits(
            f"its 16-bit values reach {values.max()} of 65535 (mode {image.mode}), so that 8 bits would keep "
            f"{len(np.unique(levels))} of their levels; if white is a smaller number, as in 12 bits, scale it to "
            "65535, or write it with 8 bits"
        )
    return Image.fromarray(levels)


Images = ImageSet | FolderSet
"""Images of one split, in memory or in files."""
