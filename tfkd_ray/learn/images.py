"""Images of one split, in memory or in their files, and randomness that is addressed instead of consumed.

Every image knows its position in the official train set, so that what is random about it is a function of (seed, epoch,
position) and of nothing else.

Shapes: N = images, B = images of a batch, C = channels, H, W = height and width, S = side of images made square.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import ExifTags, Image

from tfkd_ray.settings.errors import ConfigError
from tfkd_ray.settings.files import opened

if TYPE_CHECKING:
    import torch
    from torch import Tensor


AHEAD = 2
"""Batches that are decoded while the one before them is trained on."""


def address(seed: int, *stream: str | int) -> int:
    """A 63-bit seed for one named use of randomness, such as (seed, "order", epoch)."""
    text = "/".join(str(part) for part in (seed, *stream))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *stream: str | int) -> torch.Generator:
    """A CPU generator at an address: the same numbers on every machine, device and number of workers."""
    import torch

    return torch.Generator().manual_seed(address(seed, *stream))


def seed_all(seed: int) -> None:
    """Seed torch, numpy and `random`, for code that is not ours and may draw from any of them."""
    import torch

    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  (the generator that others draw from)


def random_states() -> Callable[[], None]:
    """What puts numpy and `random` back to where they are now."""
    ours, numpys = random.getstate(), np.random.get_state()  # noqa: NPY002

    def put_back() -> None:
        random.setstate(ours)
        np.random.set_state(numpys)  # noqa: NPY002

    return put_back


def random_position() -> tuple[Any, ...]:
    """Where torch's, numpy's and Python's global random numbers are: another one once some were drawn."""
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
    """Within it torch, numpy and `random` draw from an address; afterwards they go on as if it had not been."""
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
    """uint8 [M, C, H, W]: these images and maybe others; mapped from a file, all processes of a node share them."""
    labels: Tensor
    """int64 [N]."""
    positions: Tensor
    """int64 [N]: each image's place in the official train set (or test set)."""
    official_size: int
    """Images in that official set."""
    rows: Tensor | None = None
    """int64 [N]: where each image is stored. None: N = M, in order."""

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def images(self) -> Tensor:
        """uint8 [N, C, H, W], a copy if they are some of those stored."""
        return self.stored if self.rows is None else self.stored[self.rows]

    def part(self, index: Tensor) -> ImageSet:
        """Some of the images."""
        rows = index if self.rows is None else self.rows[index]
        return ImageSet(
            self.stored, self.labels[index], self.positions[index], self.official_size, rows
        )

    def on(self, device: torch.device) -> ImageSet:
        """The set, its images included, on a device."""
        if device.type == "cpu":
            return self
        images = self.images.to(device)
        return ImageSet(
            images, self.labels.to(device), self.positions.to(device), self.official_size
        )

    def read(self, batches: Sequence[Tensor], crops: Tensor | None = None) -> Iterator[Tensor]:
        """The images of each batch of indices, uint8 [B, C, H, W]; these are whole already, and `crops` unused."""
        return (self.stored[batch if self.rows is None else self.rows[batch]] for batch in batches)


@dataclass(frozen=True)
class FolderSet:
    """Images of one split that stay in their files, each decoded when it is read."""

    name: str
    """Of the data set, for errors."""
    folder: Path
    files: tuple[str, ...]
    """Below the folder, one for each image."""
    labels: Tensor
    """int64 [N]."""
    positions: Tensor
    """int64 [N]: each image's place among all files of the official set, sorted by class and name."""
    official_size: int
    """Images in that official set."""
    side: int
    """S: images are made S x S."""
    readers: int
    """Threads that decode ahead."""

    def __len__(self) -> int:
        return len(self.labels)

    def part(self, index: Tensor) -> FolderSet:
        """Some of the images."""
        files = tuple(self.files[i] for i in index.tolist())
        return replace(
            self, files=files, labels=self.labels[index], positions=self.positions[index]
        )

    def on(self, device: torch.device) -> FolderSet:
        """The set with its labels and positions on a device; images are read on the CPU."""
        return replace(self, labels=self.labels.to(device), positions=self.positions.to(device))

    def read(self, batches: Sequence[Tensor], crops: Tensor | None = None) -> Iterator[Tensor]:
        """The images of each batch of indices, uint8 [B, 3, S, S], on the CPU; `readers` threads decode ahead.

        Args:
            crops: float [N, 4], see `crop_box`, on the CPU. None, or [N, 0]: the shorter side is resized to 256/224 of
                S, and the centre cut out.
        """
        crops = crops if crops is not None and crops.shape[1] else None
        plans = [
            batch.cpu() for batch in batches
        ]  # now: later, each would wait for what the device has to do
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
        """(the batch, of which nothing is there yet; what fills it)."""
        import torch

        images = torch.empty(
            len(plan), 3, self.side, self.side, dtype=torch.uint8, pin_memory=self.labels.is_cuda
        )
        numbers: list[list[float] | None] = (
            [None] * len(plan) if crops is None else crops[plan].tolist()
        )
        pixels, indices = images.numpy(), plan.tolist()
        return images, [
            pool.submit(self._decode, i, crop, pixels[k])
            for k, (i, crop) in enumerate(zip(indices, numbers, strict=True))
        ]

    def _decode(
        self, index: int, crop: list[float] | None, out: np.ndarray[Any, np.dtype[np.uint8]]
    ) -> None:
        def view(image: Image.Image) -> Image.Image:
            return (
                _centre(image, self.side) if crop is None else _cut_to_size(image, crop, self.side)
            )

        out[:] = decoded(self.name, self.folder / self.files[index], view)


def _finished(images: Tensor, jobs: list[Future[None]]) -> Tensor:
    for job in jobs:
        job.result()
    return images


def decoded(
    name: str, path: Path, view: Callable[[Image.Image], Image.Image]
) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """uint8 [3, H, W] of an image file, as `view` shows it in RGB; `name` is the data set's, for errors."""
    try:
        with opened(path) as file, Image.open(file) as image:
            return np.asarray(view(image)).transpose(2, 0, 1)
    except _NotEightBits as error:
        raise ConfigError(f"data {name}: {path}: {error}") from None
    except Exception as error:  # an image that is not one can end in any exception
        problem = f"cannot be read as an image: {error}; replace it, or take it away"
        raise ConfigError(f"data {name}: {path}: {problem}") from None


def check_headers(name: str, paths: Sequence[Path], size: tuple[int, ...] | None = None) -> None:
    """Raise a ConfigError that names the files whose headers are not those of images; no pixel is decoded.

    Args:
        name: of the data set, for errors.
        size: (H, W) that all must have; None: any.
    """

    def problem_of(path: Path) -> str | None:
        try:
            with Image.open(path) as image:
                wide, high = image.size
        except Exception as error:  # as in `decoded`
            return f"cannot be read as an image: {error}; replace it, or take it away"
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


def crop_box(crop: Sequence[float], width: int, height: int) -> tuple[int, int, int, int]:
    """(left, top, width, height) of a random resized crop, inside the image whatever the numbers are.

    As torchvision draws it: 8 to 100 % of the area and a log-uniform shape of 3:4 to 4:3, given that it fits. Instead
    of drawing again until one does, the shape is drawn from what such draws end with. An image so long that nothing
    fits gets the largest box of 3:4 or 4:3.

    Args:
        crop: uniform in [0, 1): area, shape, top, left.
    """
    wide = math.log(width / height)
    shapes = np.linspace(-math.log(4 / 3), math.log(4 / 3), 65)  # log(w / h)
    room = (np.exp(-np.abs(shapes - wide)) - 0.08).clip(
        1e-9
    )  # areas that fit: from 8 % to this much more
    drawn = np.concatenate([[0.0], (room[1:] + room[:-1]).cumsum()])
    shape = float(np.interp(crop[1] * drawn[-1], drawn, shapes))
    most = math.exp(-abs(shape - wide))
    area = (min(0.08, most) + crop[0] * max(most - 0.08, 0)) * width * height
    w = min(max(1, round(math.sqrt(area * math.exp(shape)))), width)
    h = min(max(1, round(math.sqrt(area / math.exp(shape)))), height)
    return int(crop[3] * (width - w + 1)), int(crop[2] * (height - h + 1)), w, h


def _cut_to_size(image: Image.Image, crop: Sequence[float], size: int) -> Image.Image:
    """A random resized crop, RGB."""
    width, height = _upright_size(image)
    left, top, w, h = crop_box(crop, width, height)
    wide, high = _shrunk(image, width * size / w, height * size / h)
    x, y = wide / width, high / height
    box = (left * x, top * y, min((left + w) * x, wide), min((top + h) * y, high))
    return rgb(image).resize((size, size), Image.Resampling.BILINEAR, box)


def _centre(image: Image.Image, size: int) -> Image.Image:
    """The centre of the image, its shorter side resized to size * 256 / 224, RGB; as torchvision does it."""
    short, sides = round(size * 256 / 224), _upright_size(image)
    wide, high = (int(short * side / min(sides)) for side in sides)
    left, top = round((wide - size) / 2), round((high - size) / 2)
    whole = (0.0, 0.0, *_shrunk(image, wide, high))
    resized = rgb(image).resize((wide, high), Image.Resampling.BILINEAR, whole)
    return resized.crop((left, top, left + size, top + size))


def _shrunk(image: Image.Image, width: float, height: float) -> tuple[float, float]:
    """Size, upright, of the image once decoded: a large JPEG at 1/2, 1/4 or 1/8, still twice what is needed of it."""
    turn = _turn(image)
    sides = (height, width) if turn in _SIDEWAYS else (width, height)
    drafted = image.draft(None, (math.ceil(2 * sides[0]), math.ceil(2 * sides[1])))
    if turn is not None or not drafted:
        return _upright_size(image)
    return drafted[1][2:]  # draft's, as 900 / 8 columns are decoded to 113


# --- upright, and in 8 bits ------------------------------------------------------------------------------------

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes an image upright, by its EXIF orientation; 1 is upright."""
_SIDEWAYS = {_TURNS[k] for k in (5, 6, 7, 8)}


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What makes the image upright, as its EXIF data say; None: it is, or they say nothing that can be understood."""
    if image.format not in ("JPEG", "MPO"):
        image.load()  # a TIFF is turned by Pillow itself; others may have their EXIF data behind the pixels
    try:
        return _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged EXIF data can end in any exception, and the pixels are whole
        return None


def _upright_size(image: Image.Image) -> tuple[int, int]:
    """(width, height) of the image when it is upright."""
    sideways = _turn(image) in _SIDEWAYS
    return (image.size[1], image.size[0]) if sideways else image.size


class _NotEightBits(ValueError):
    """The image has values that cannot be brought to 0..255 without a guess."""


def rgb(image: Image.Image) -> Image.Image:
    """The image in RGB, 8 bits a channel, upright."""
    turn, image = _turn(image), _eight_bits(image)
    image.info.pop(
        "transparency", None
    )  # it makes no colour another, and Pillow warns of a palette's
    image = image if image.mode == "RGB" else image.convert("RGB")
    return image if turn is None else image.transpose(turn)


def _eight_bits(image: Image.Image) -> Image.Image:
    """The image with 8 bits a channel: of grey values of 16 bits the upper 8, as Pillow itself does it with colours."""
    is_16_bit = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM")
    if not is_16_bit and image.mode not in ("I", "F"):
        return image
    if not is_16_bit:
        kind = "floating-point numbers" if image.mode == "F" else "whole numbers of 32 bits"
        raise _NotEightBits(
            f"its pixels are {kind} (mode {image.mode}), and nothing says which of them is black and which white; "
            "write it with 8 bits, or with 16 from 0 to 65535"
        )
    values = np.asarray(image)
    tags = getattr(image, "tag_v2", {})
    bits = tags.get(258, (16,))[0]  # of a TIFF: BitsPerSample, 12 or 16
    if (
        tags.get(262) == 0
    ):  # PhotometricInterpretation: 0 is white, which Pillow minds at 8 bits only
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
"""Images of one split, wherever they are."""
