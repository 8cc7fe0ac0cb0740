"""Files: only regular files are opened, writes are atomic, and text is made safe for terminals.

Untrusted files are read without running anything in them. Decoded copies are cached where decoding
takes long.
"""

import errno
import fcntl
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
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
import tempfile

from tfkd_ray.settings.errors import ConfigError


def write_text(path: Path, text: str, *, durable: bool = False) -> None:
    """Write a text file atomically: a reader sees the old content or the new.

    `durable`: this also holds after a power cut.
    """
    write_bytes(path, text.encode(errors="backslashreplace"), durable=durable)


def _nearest_of(folder: Path) -> Path:
    return next(p for p in (folder, *folder.parents) if p.exists())


def check_room_for(folder: Path, size: int) -> None:
    """Raise the system's OSError if a folder, existing or not, lacks room for `size` more bytes."""
    there = _nearest_of(folder)
    with tempfile.TemporaryFile(dir=there) as file:
        for _ in range(0, size, 2**20):
            file.write(bytes(2**20))
        file.flush()


def check_writable(folder: Path, option: str) -> None:
    """Raise if a folder, or its nearest existing parent, is not writable.

    `option` names the option that the error suggests.
    """
    there = _nearest_of(folder)
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        message = f"{there} cannot be written to ({error.strerror}); choose another place: {option}"
        raise ConfigError(message, folder) from None


DISK_ERRORS = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EIO,
    errno.ESTALE,
    errno.ENODEV,
    errno.ENOTCONN,
    errno.ETIMEDOUT,
    errno.EFBIG,
}
"""errno values of a full, read-only or lost disk, and of a file size limit."""


def free_bytes(folder: Path) -> float:
    """Return the bytes free for a folder, existing or not; infinite if they are unknown."""
    disk = shutil.disk_usage(_nearest_of(folder))
    return disk.free if disk.total else math.inf


def cached_file(name: str, first: Path) -> Path:
    """Return the path where `cached` keeps its result, by the first of the files."""
    return (
        cache_folder() / f"{name}-{hashlib.sha256(os.fsencode(first)).hexdigest()[:16]}.safetensors"
    )


def state_of(paths: Iterable[Path]) -> str:
    """Return a key that changes when one of the files does: a hash of paths, sizes and times."""
    found = hashlib.sha256()
    for path in paths:
        facts = path.stat()
        found.update(os.fsencode(path) + f"\0{facts.st_size} {facts.st_mtime_ns}\0".encode())
    return found.hexdigest()


def remembered(state: str, make: Callable[[], str]) -> str:
    """Return the digest that this node has cached for a `state_of`; else `make` it and cache it."""
    path = cache_folder() / "digests" / state
    with suppress(OSError, UnicodeDecodeError):
        with opened(path) as file:
            found = file.read(33).decode()
        if re.fullmatch("[0-9a-f]{32}", found):
            return found
    found = make()
    with suppress(OSError), whole_file(path) as part:
        part.write_text(found)
    return found


def cache_folder() -> Path:
    """Return the folder of this node's cache, ~/.cache/tfkd_ray, whose files can be made again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or expanded("~/.cache")) / "tfkd_ray"


def expanded(path: Path | str) -> Path:
    """Return a path with its ~ replaced; raise a ConfigError if that home directory is unknown."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        whose = Path(path).parts[0]
        message = f"{path}: the home directory is unknown for {whose}; name the whole path"
        raise ConfigError(message) from None


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a new, empty file to write to. It replaces `path` on success and is removed on failure.

    All files are written in this way. The temporary name cannot be guessed. A link at `path` is
    replaced, never followed. What killed writers left in the folder is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_left_behind(path.parent)
    part = path.with_name(f".{secrets.token_hex(8)}{PART}")
    handle = os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW, 0o666)
    try:
        with suppress(OSError):  # the file system has no locks
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield part
        part.replace(path)
    finally:
        os.close(handle)
        part.unlink(missing_ok=True)


PART = ".part"
"""Suffix of a file that is being written. One that remains belongs to a writer that was killed."""
_PART_NAME = re.compile(rf"\.[0-9a-f]{{16}}{re.escape(PART)}")
LEFT_BEHIND_S = 60.0
"""Seconds after which a partial file that nobody holds and nobody writes counts as left behind."""


def remove_left_behind(folder: Path, age_s: float = LEFT_BEHIND_S) -> None:
    """Remove partial files that killed writers left: of some age, and with a lock nobody holds."""
    with suppress(OSError), os.scandir(folder) as entries:
        names = [entry.name for entry in entries if _PART_NAME.fullmatch(entry.name)]
        for path in (folder / name for name in names):
            facts = path.lstat()
            if not stat.S_ISREG(facts.st_mode) or time.time() - facts.st_mtime < age_s:
                continue
            handle = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
            finally:
                os.close(handle)


def sha256_of(path: Path) -> str:
    with opened(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_bytes(path: Path, content: bytes, *, durable: bool = False) -> None:
    """Write a file atomically: a reader sees the old content or the new.

    `durable`: this also holds after a power cut.
    """
    with whole_file(path) as part, part.open("wb") as file:
        file.write(content)
        file.flush()
        if durable:
            os.fsync(file.fileno())


def append_whole(handle: int, content: bytes) -> None:
    """Append to an open file; if that fails, on a full disk, leave the file as it was."""
    size, left = os.fstat(handle).st_size, memoryview(content)
    try:
        while left:
            left = left[os.write(handle, left) :]
    except OSError:
        with suppress(OSError):
            os.ftruncate(handle, size)
        raise


# --- reading ---------------------------------------------------------------------------------------------------------

_FILE_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
    stat.S_IFDIR: "a directory",
    stat.S_IFLNK: "a link",
}


def kind_of(path: Path, *, follow: bool = True) -> str | None:
    """Return the kind of a path that is no regular file ('a directory', ...).

    None for a regular file, or if the path does not exist.
    """
    try:
        return _FILE_KINDS.get(stat.S_IFMT(path.stat(follow_symlinks=follow).st_mode))
    except (FileNotFoundError, NotADirectoryError):
        return None


def opened(path: Path, *, follow: bool = True) -> io.BufferedReader:
    """Open a regular file for reading; raise an OSError for anything else, as a pipe may block.

    Paths by which a shell passes input, such as /dev/stdin or /dev/fd/63, are always opened.

    Args:
        follow: whether `path` may be a link. Experiments contain none, so a planted link
            cannot expose another file.
    """
    if descriptor_of(path) is not None:
        return path.open("rb")
    if kind := kind_of(path, follow=follow):
        raise OSError(errno.EINVAL, f"is {kind}, and only regular files are read", str(path))
    handle = os.open(
        path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | (0 if follow else os.O_NOFOLLOW)
    )
    if not stat.S_ISREG(os.fstat(handle).st_mode):  # replaced since `kind_of` looked
        os.close(handle)
        raise OSError(errno.EINVAL, "is not a file, and only regular files are read", str(path))
    return os.fdopen(handle, "rb")


def descriptor_of(path: Path) -> int | None:
    """Return the descriptor that a path such as /dev/stdout or /dev/fd/63 names, else None."""
    names = {"/dev/stdin": 0, "/dev/stdout": 1, "/dev/stderr": 2}
    match = re.fullmatch(r"(?:/dev/fd|/proc/self/fd)/(\d{1,6})", str(path))
    return int(match[1]) if match else names.get(str(path))


# --- showing ---------------------------------------------------------------------------------------------------------


def legible(text: str) -> str:
    """Escape, as JSON does (\\u001b), characters that control a terminal or reverse text.

    Line breaks and tabs are kept.
    """
    if text.isprintable():
        return text
    table = {ord(c): _legible(c) for c in set(text)}
    odd = {c: shown for o, shown in table.items() if (c := chr(o)) != shown}
    if len(odd) > 100:
        return text.translate(table)
    for c, shown in odd.items():  # many times faster than a look at each character
        text = text.replace(c, shown)
    return text


def _legible(c: str) -> str:
    if c.isprintable() or c in "\n\t" or unicodedata.category(c) == "Zs":
        return c
    units = c.encode("utf-16-be", "surrogatepass").hex()
    return "".join(f"\\u{units[k : k + 4]}" for k in range(0, len(units), 4))


class Legible:
    """Stream that escapes its text by `legible`, such as every verb's standard output.

    Args:
        shaped: changes the escaped text, such as the length of its lines.
    """

    def __init__(self, stream: Any, shaped: Callable[[str], str] | None = None) -> None:
        self.stream = stream
        self._shaped = shaped or (lambda text: text)

    def write(self, text: str) -> int:
        """Write escaped text; see `legible`."""
        self.stream.write(self._shaped(legible(text)))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def read_at_most(file: IO[bytes] | gzip.GzipFile, most: int) -> bytearray:
    """Read the first `most` bytes of a file, or all of it.

    It reads in pieces, so that memory grows with the content and not with the size that is claimed.
    """
    found = bytearray()
    while piece := file.read(min(2**16, most - len(found))):
        found += piece
    return found


class ArraysOnly(pickle.Unpickler):
    """Unpickler for numpy arrays, text and numbers. It calls nothing that the pickle names."""

    def find_class(self, module: str, name: str) -> Any:
        """Return a stand-in for the four names that a pickled array needs; raise for others."""
        multiarray = (
            module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct"
        )
        if multiarray or (module == "numpy" and name in ("ndarray", "dtype")):
            return _Pickled
        if (module, name) == ("_codecs", "encode"):
            return functools.partial(
                _encode
            )  # a new class each time: a pickle may set attributes of the class that it gets
        raise pickle.UnpicklingError(
            f"it asks for {module}.{name}, which could run code; nothing was run"
        )


def _encode(text: str, encoding: str) -> bytes:
    if encoding not in ("latin1", b"latin1"):
        raise pickle.UnpicklingError(f"bytes as {encoding!r}, not latin1")
    return text.encode("latin1")


class _Pickled:
    """State of a pickled array or dtype, without behaviour: numpy gets its bytes alone."""

    def __init__(self, *args: Any) -> None:
        self.args = args
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def uint8(self, width: int) -> "np.ndarray[Any, np.dtype[np.uint8]]":
        """Return the array if it is uint8 [N, width]; raise a TypeError or ValueError if not."""
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
        # bytearray: torch needs writable memory
        return np.frombuffer(bytearray(raw), np.uint8).reshape(
            (count, width), order="F" if fortran else "C"
        )


def write_whole(path: Path, content: bytes) -> None:
    """Write a file atomically: after a crash it has the old content or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if free_bytes(path.parent) < len(content):  # leave the last bytes to smaller files
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    write_bytes(path, content, durable=True)


def remove_partial(directory: Path) -> None:
    """Remove the partial files of writers that were killed. No writer may be active there."""
    for partial in directory.glob(f".*{PART}"):
        partial.unlink(missing_ok=True)


def json_tree(tree: Any) -> Any:
    """Return a tree for a JSON file, in which a number that is infinite or NaN is None."""
    if isinstance(tree, dict):
        return {key: json_tree(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [json_tree(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree
