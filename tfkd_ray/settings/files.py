"""Files: opened only if they are files, written whole or not at all; text as a terminal may get it.

Those from elsewhere are read without running them, and kept decoded where that takes long.
"""

import contextlib
import errno
import functools
import gzip
import hashlib
import io
import math
import os
import pickle
import re
import secrets
import shutil
import stat
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
import tempfile

from tfkd_ray.settings.errors import ConfigError


def write_text(path: Path, text: str, *, durable: bool = False) -> None:
    """Write a text file so that a reader sees the old one or the new one; `durable`: also after a power cut."""
    write_bytes(path, text.encode(errors="backslashreplace"), durable=durable)


def check_room_for(folder: Path, size: int) -> None:
    """Raise the system's own OSError where `size` more bytes cannot be written to a folder, there already or not."""
    there = next(p for p in (folder, *folder.parents) if p.exists())
    with tempfile.TemporaryFile(dir=there) as file:
        for _ in range(0, size, 2**20):
            file.write(bytes(2**20))
        file.flush()


def check_writable(folder: Path, option: str) -> None:
    """Raise where a folder, or the nearest above it that is there, cannot be written to; `option` names the way out."""
    there = next(p for p in (folder, *folder.parents) if p.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        message = f"{there} cannot be written to ({error.strerror}); choose another place: {option}"
        raise ConfigError(message, folder) from None


DISK_ERRORS = {
    *(
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EROFS,
        errno.EIO,
        errno.ESTALE,
        errno.ENODEV,
        errno.ENOTCONN,
        errno.ETIMEDOUT,
    ),
    errno.EFBIG,
}
"""What the system says of a disk that is full, read-only or gone, or of a file that may not grow: no fault of who
wants to write."""


def free_bytes(folder: Path) -> float:
    """Bytes that may be written to a folder, there already or not; infinite where its file system does not say."""
    disk = shutil.disk_usage(next(p for p in (folder, *folder.parents) if p.exists()))
    return disk.free if disk.total else math.inf


def cached_file(name: str, first: Path) -> Path:
    """Where `cached` keeps what it made of files, the first of them."""
    return (
        cache_folder() / f"{name}-{hashlib.sha256(os.fsencode(first)).hexdigest()[:16]}.safetensors"
    )


def state_of(paths: Iterable[Path]) -> str:
    """A key that changes when one of the files does: of their paths, sizes and times."""
    found = hashlib.sha256()
    for path in paths:
        facts = path.stat()
        found.update(os.fsencode(path) + f"\0{facts.st_size} {facts.st_mtime_ns}\0".encode())
    return found.hexdigest()


def remembered(state: str, make: Callable[[], str]) -> str:
    """The digest that `make` takes of files in a state (`state_of`), which this node remembers from then on."""
    path = cache_folder() / "digests" / state
    with contextlib.suppress(OSError, UnicodeDecodeError):
        with opened(path) as file:
            found = file.read(33).decode()
        if re.fullmatch("[0-9a-f]{32}", found):
            return found
    found = make()
    with contextlib.suppress(OSError), whole_file(path) as part:
        part.write_text(found)
    return found


def cache_folder() -> Path:
    """Where this node keeps what can be made again: ~/.cache/tfkd_ray."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tfkd_ray"


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A new, empty file to write to: it becomes `path` if all goes well, and nothing if not.

    All files are written so. Nobody can guess its name, and a link at `path` is replaced, never followed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{secrets.token_hex(8)}{PART}")
    try:
        os.close(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW, 0o666))
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


PART = ".part"
"""Ends the name of a file that is being written; one that stays is of a writer that was killed."""


def write_bytes(path: Path, content: bytes, *, durable: bool = False) -> None:
    """Write a file so that a reader sees the old one or the new one; `durable`: also after a power cut."""
    with whole_file(path) as part, part.open("wb") as file:
        file.write(content)
        file.flush()
        if durable:
            os.fsync(file.fileno())


# --- what is read ----------------------------------------------------------------------------------------------

_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
    stat.S_IFDIR: "a directory",
    stat.S_IFLNK: "a link",
}


def kind_of(path: Path, *, follow: bool = True) -> str | None:
    """What stands at a path in the place of a file: a named pipe, a directory, ...; None for a file, or for nothing."""
    try:
        return _KINDS.get(stat.S_IFMT(path.stat(follow_symlinks=follow).st_mode))
    except (FileNotFoundError, NotADirectoryError):
        return None


def opened(path: Path, *, follow: bool = True) -> io.BufferedReader:
    """A file, open for reading; an OSError where it is none, as reading a pipe or a device may never end.

    What a shell hands over as a file, such as /dev/stdin or /dev/fd/63, is opened whatever it is.

    Args:
        follow: whether `path` may be a link. An experiment has none: what is planted there shows no other file.
    """
    if descriptor_of(path) is not None:
        return path.open("rb")
    if kind := kind_of(path, follow=follow):
        raise OSError(errno.EINVAL, f"is {kind}, and only regular files are read", str(path))
    handle = os.open(
        path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | (0 if follow else os.O_NOFOLLOW)
    )
    if not stat.S_ISREG(os.fstat(handle).st_mode):  # it was put there since
        os.close(handle)
        raise OSError(errno.EINVAL, "is no file, and only regular files are read", str(path))
    return os.fdopen(handle, "rb")


def descriptor_of(path: Path) -> int | None:
    """The number of an open file that a path such as /dev/stdout or /dev/fd/63 names; None for any other path."""
    names = {"/dev/stdin": 0, "/dev/stdout": 1, "/dev/stderr": 2}
    match = re.fullmatch(r"(?:/dev/fd|/proc/self/fd)/(\d{1,6})", str(path))
    return int(match[1]) if match else names.get(str(path))


# --- what is shown ---------------------------------------------------------------------------------------------


def legible(text: str) -> str:
    """Text without what steers a terminal, or turns the order of letters: such characters as \\u001b, as JSON has them.

    Line breaks and tabs stay.
    """
    return text if text.isprintable() else "".join(map(_legible, text))


def _legible(c: str) -> str:
    if c.isprintable() or c in "\n\t" or unicodedata.category(c) == "Zs":
        return c
    units = c.encode("utf-16-be", "surrogatepass").hex()
    return "".join(f"\\u{units[k : k + 4]}" for k in range(0, len(units), 4))


class Legible:
    """A stream that gets legible text: what all verbs write to standard output passes through here."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        """Write text; see `legible`."""
        self.stream.write(legible(text))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


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
        multiarray = (
            module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct"
        )
        if multiarray or (module == "numpy" and name in ("ndarray", "dtype")):
            return _Pickled
        if (module, name) == ("_codecs", "encode"):
            return functools.partial(
                _encode
            )  # a new one each time: a pickle may set attributes of what it gets
        raise pickle.UnpicklingError(
            f"it asks for {module}.{name}, which could run code; nothing was run"
        )


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

    def uint8(self, width: int) -> "np.ndarray[Any, np.dtype[np.uint8]]":
        """The array, if it is one of uint8 [N, width]; else a TypeError or ValueError."""
        import numpy as np

        _, (count, columns), dtype, fortran, raw = self.state
        if (
            not isinstance(dtype, _Pickled)
            or dtype.args[:1] not in (("u1",), (b"u1",))
            or not isinstance(raw, bytes)
        ):
            raise TypeError("not uint8")
        if columns != width:
            raise ValueError(f"{columns} columns, not {width}")
        # bytearray: torch wants memory that it may write to
        return np.frombuffer(bytearray(raw), np.uint8).reshape(
            (count, width), order="F" if fortran else "C"
        )


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that a reader, or a crash, sees the old content or the new one and nothing between."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if free_bytes(path.parent) < len(content):  # what is left is for those who need less
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    write_bytes(path, content, durable=True)


def remove_partial(directory: Path) -> None:
    """Remove what processes that were killed while they wrote have left; nobody may be writing there."""
    for partial in directory.glob(f".*{PART}"):
        partial.unlink(missing_ok=True)
