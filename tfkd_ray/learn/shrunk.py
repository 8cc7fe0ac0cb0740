"""A cache of images brought to a short side of about 256, which are decoded much faster.

Each image has one file, made when it is read for the first time, by whoever reads it: `raw` pixels,
or a JPEG. It is known by the path, size and time of its source. A smaller image is kept at its own
size. The cache may be deleted at any time; where it cannot be written, images are brought to that
size each time they are read, with the same pixels.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image

from tfkd_ray.settings.columns import to_stderr
from tfkd_ray.settings.files import cache_folder, whole_file

Kind = Literal["none", "raw", 256]
NeededRows = Callable[[int, int], tuple[int, int]]
"""Returns (the first row that is needed, the first after them) for an image's width and height."""
QUALITY = 90
"""Of JPEG, without subsampling of colours."""
_SIZES = struct.Struct("<II")
"""Width and height, before raw pixels of 4 bytes, as Pillow has RGB in memory."""


def all_rows(width: int, height: int) -> tuple[int, int]:
    """Return the rows of a whole image; see `NeededRows`."""
    return 0, height


def kept_as(kind: Kind, short: int) -> str:
    """Return what determines the pixels of the cache, for fingerprints."""
    quality = f", JPEG {QUALITY}" if kind == 256 else ""
    return f"{kind}, short side {short}, bilinear{quality}"


def kept_bytes(kind: Kind, short: int) -> float:
    """Return about how many bytes a photograph of 4:3 has in the cache."""
    pixels = short * short * 4 / 3
    return 4 * pixels if kind == "raw" else 0.7 * pixels


def small_images() -> Path:
    """Return the folder of the cache on this node."""
    return cache_folder() / "images"


class SmallImages(NamedTuple):
    """The cache of images of one kind and size."""

    folder: str
    kind: Kind
    short: int
    """The short side, at most, in pixels."""

    @classmethod
    def of(cls, kind: Kind, short: int) -> SmallImages:
        """Return this node's cache."""
        return cls(str(small_images()), kind, short)

    def read(
        self, source: str, make: Callable[[], Image.Image], rows: NeededRows = all_rows
    ) -> Image.Image:
        """Return an image with a short side of at most `short`, RGB or RGBX, and upright.

        Paths are text, as a Path for each image would take longer than finding its file.

        Args:
            source: an absolute path.
            make: reads it from its source, brought to that size.
            rows: those of raw pixels that are read; the others may hold anything.
        """
        try:
            kept = self._place_of(source)
        except OSError:
            return make()  # which says what is wrong with it
        with contextlib.suppress(OSError, ValueError):
            return _raw_of(kept, rows) if self.kind == "raw" else _of_jpeg(Path(kept).read_bytes())
        small = make()
        content = _encoded(small, self.kind)
        try:
            with whole_file(Path(kept)) as part:
                part.write_bytes(content)
        except OSError as error:
            _cannot_keep(error)
        if self.kind != "raw":
            return _of_jpeg(content)
        return _of_raw(small.size, np.frombuffer(content, np.uint8, offset=_SIZES.size))

    def _place_of(self, source: str) -> str:
        """Return the file that an image has in the cache."""
        facts = os.stat(source)  # noqa: PTH116
        known_by = f"{source}|{facts.st_size}|{facts.st_mtime_ns}|{kept_as(self.kind, self.short)}"
        name = hashlib.sha256(os.fsencode(known_by)).hexdigest()[:32]
        return f"{self.folder}/{name[:3]}/{name}"


def _encoded(image: Image.Image, kind: Kind) -> bytes:
    if kind == "raw":
        return _SIZES.pack(*image.size) + image.convert("RGBX").tobytes()
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=QUALITY, subsampling=0)
    return buffer.getvalue()


def _of_jpeg(content: bytes) -> Image.Image:
    """Return the image of a JPEG; raise OSError or ValueError if it is damaged."""
    image = Image.open(io.BytesIO(content))
    image.load()
    return image


def _raw_of(kept: str, rows: NeededRows) -> Image.Image:
    """Return the image of a file of raw pixels; raise OSError or ValueError if it is damaged."""
    handle = os.open(kept, os.O_RDONLY | os.O_CLOEXEC)
    try:
        width, height = size = _SIZES.unpack(_filled(handle, bytearray(_SIZES.size), 0))
        pixels = np.empty(os.fstat(handle).st_size - _SIZES.size, np.uint8)
        if not len(pixels) or len(pixels) != 4 * width * height:
            raise ValueError(f"{len(pixels)} bytes of {width}x{height} pixels")
        first, end = (4 * width * row for row in rows(width, height))
        _filled(handle, pixels[first:end], _SIZES.size + first)
    finally:
        os.close(handle)
    return _of_raw(size, pixels)


def _of_raw(size: tuple[int, int], pixels: Any) -> Image.Image:
    """Return the RGB image of pixels of 4 bytes, which are not copied.

    Pillow resizes RGB, which is RGBX in memory, in four fifths of the time of RGBX.
    """
    return Image.fromarrow(Image.frombuffer("RGBX", size, pixels, "raw", "RGBX", 0, 1), "RGB", size)


def _filled(handle: int, into: Any, start: int) -> Any:
    """Return `into`, filled with a file's bytes from `start`."""
    found = os.preadv(handle, [into], start)
    if found != len(into):
        raise ValueError(f"{found} bytes of {len(into)} at {start}")
    return into


_told_of: set[Path] = set()
"""Folders that this process could not write to, and said so."""


def _cannot_keep(error: OSError) -> None:
    folder = small_images()
    if folder in _told_of:
        return
    _told_of.add(folder)
    to_stderr(
        f"tfkd: images cannot be kept in {folder}: {error.strerror or error}; each image is decoded again, which gives "
        "the same pixels but takes longer. Free space there, or set XDG_CACHE_HOME to another place"
    )
