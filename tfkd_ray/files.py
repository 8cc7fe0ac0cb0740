"""Files from elsewhere: read without running them, and kept decoded where that takes long."""

import contextlib
import errno
import functools
import gzip
import hashlib
import math
import os
import pickle
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError, safe_open

if TYPE_CHECKING:
    from torch import Tensor

DISK_ERRORS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE, errno.ENODEV, errno.ENOTCONN, errno.ETIMEDOUT),
    errno.EFBIG,
}
"""What the system says of a disk that is full, read-only or gone, or of a file that may not grow: no fault of who
wants to write."""


def free_bytes(folder: Path) -> float:
    """Bytes that may be written to a folder, there already or not; infinite where its file system does not say."""
    disk = shutil.disk_usage(next(p for p in (folder, *folder.parents) if p.exists()))
    return disk.free if disk.total else math.inf


def cached(name: str, read: Iterable[Path], make: Callable[[], "tuple[Tensor, Tensor]"]) -> "tuple[Tensor, Tensor]":
    """(images, labels) that `make` makes of some files; if it has before, mapped from a file in ~/.cache/tfkd_ray/.

    One file for each name and first path; made anew where a path, size or time differs. No cache where none can be
    written: it saves time, and changes no number.
    """
    from safetensors.torch import save_file

    digest = hashlib.sha256()
    first = None
    for path in read:
        first = first or hashlib.sha256(str(path).encode()).hexdigest()[:16]
        facts = path.stat()
        digest.update(f"{path}\0{facts.st_size} {facts.st_mtime_ns}\0".encode())
    kept, key = cache_folder() / f"{name}-{first}.safetensors", digest.hexdigest()
    found = _kept(kept, key)
    if found is None:
        images, labels = found = make()
        try:
            with whole_file(kept) as part:
                save_file({"images": images, "labels": labels}, part, {"key": key})
                with part.open("rb") as written:
                    os.fsync(written)
        except (OSError, SafetensorError):
            return found
        found = _kept(kept, key) or found  # mapped: processes that read it share its memory
    return found


def _kept(path: Path, key: str) -> "tuple[Tensor, Tensor] | None":
    try:
        with safe_open(path, "pt") as file:
            if file.metadata() == {"key": key}:
                return file.get_tensor("images"), file.get_tensor("labels")
    except (OSError, SafetensorError):
        pass
    return None


def cache_folder() -> Path:
    """Where this node keeps what can be made again: ~/.cache/tfkd_ray."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tfkd_ray"


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A place to write to: it becomes `path` if all goes well, and nothing if not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def read_at_most(file: IO[bytes] | gzip.GzipFile, most: int) -> bytearray:
    """The file's first `most` bytes, or all; piecewise, so that memory follows what is there, not what is claimed."""
    found = bytearray()
    while piece := file.read(min(2**20, most - len(found))):
        found += piece
    return found


class ArraysOnly(pickle.Unpickler):
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
