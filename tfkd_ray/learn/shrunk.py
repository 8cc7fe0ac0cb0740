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
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from tfkd_ray.settings.files import cache_folder, whole_file

Kind = Literal["none", "raw", 256]
QUALITY = 90
"""Of JPEG, without subsampling of colours."""
_SIZES = struct.Struct("<II")
"""Width and height, before raw pixels of 4 bytes, as Pillow has RGB in memory."""


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


def shrunk(
    source: Path, kind: Kind, short: int, make: Callable[[Path], Image.Image]
) -> Image.Image:
    """Return an image with a short side of at most `short`, RGB or RGBX, and upright.

    Args:
        source: an absolute path.
        make: reads it from its source, brought to that size.
    """
    facts = source.stat()
    known_by = f"{source}|{facts.st_size}|{facts.st_mtime_ns}|{kept_as(kind, short)}"
    name = hashlib.sha256(os.fsencode(known_by)).hexdigest()[:32]
    kept = small_images() / name[:3] / name
    with contextlib.suppress(OSError, ValueError):
        return _opened(kept.read_bytes(), kind)
    content = _encoded(make(source), kind)
    try:
        with whole_file(kept) as part:
            part.write_bytes(content)
    except OSError as error:
        _cannot_keep(error)
    return _opened(content, kind)


def _encoded(image: Image.Image, kind: Kind) -> bytes:
    if kind == "raw":
        return _SIZES.pack(*image.size) + image.convert("RGBX").tobytes()
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=QUALITY, subsampling=0)
    return buffer.getvalue()


def _opened(content: bytes, kind: Kind) -> Image.Image:
    """Return the image in a file's content; raise OSError or ValueError if it is damaged.

    Raw pixels are not copied.
    """
    if kind != "raw":
        image = Image.open(io.BytesIO(content))
        image.load()
        return image
    if len(content) < _SIZES.size:
        raise ValueError(f"{len(content)} bytes")
    size = _SIZES.unpack_from(content)
    pixels = np.frombuffer(content, np.uint8, offset=_SIZES.size)
    if len(pixels) != 4 * size[0] * size[1]:
        raise ValueError(f"{len(pixels)} bytes of {size[0]}x{size[1]} pixels")
    return Image.frombuffer("RGBX", size, pixels, "raw", "RGBX", 0, 1)


_told_of: set[Path] = set()
"""Folders that this process could not write to, and said so."""


def _cannot_keep(error: OSError) -> None:
    folder = small_images()
    if folder in _told_of:
        return
    _told_of.add(folder)
    print(
        f"tfkd: images cannot be kept in {folder}: {error.strerror or error}; each is decoded anew, which gives the "
        "same pixels and takes longer. Make room there, or set XDG_CACHE_HOME to another place",
        file=sys.stderr,
        flush=True,
    )
