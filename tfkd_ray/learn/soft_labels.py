"""The bank: a teacher's logits, computed once per view of the images and shared by all trials.

A view is the augmentation of the train images in an epoch: a function of (data, augmentation, seed,
epoch), so trials of a sweep share views. A view is one file per node, memory-mapped by its readers.
Processes that need it at the same time fill it together, chunk by chunk; the holder of a chunk's
lock computes it, and the lock of a killed process is released.

Logits are kept in half precision, less their row means: softmax ignores the mean, and the rounding
is finer. A view with larger logits (`HALF`) is kept in float32. Outputs of the teacher's layers,
which an objective of the user's own may ask for, are views of their own, kept as they are. Files are a cache and may be
deleted at any time. If there is no room for a view, each trial computes it for itself, with one
warning per process.

Shapes: N = images, K = classes, D = numbers of an image in all layers together.
"""

import contextlib
import hashlib
import json
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from threading import Thread
from typing import Any, Protocol

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor, nn

from tfkd_ray.learn import top_labels
from tfkd_ray.settings.errors import ConfigError
from tfkd_ray.settings.files import cache_folder, free_bytes, whole_file

LARGEST = 2**30
"""Bytes of a view above which the teacher runs online: otherwise every epoch would read 2.5 GB for
ImageNet."""
HALF = 128
"""Limit of logits kept in half precision, which rounds them by 1/32 at most; larger ones are kept
in float32."""
CHUNKS = 16
"""Number of parts in which a view is filled."""


class Elsewhere(Protocol):
    """The shared place of views of all nodes; see `trial.Shelf`."""

    def fetch(self, name: str) -> bytes | None:
        """Return the file of a view, or None if no other node has filled it."""

    def offer(self, name: str, content: bytes) -> None:
        """Store the file of a view that this node has filled."""


Compute = Callable[[nn.Module, Tensor], Tensor]
"""Returns what a teacher gives for the images at indices int64 [n]: rows [n, ...]."""
Kept = Callable[[Tensor], Tensor]
"""Returns rows as a view keeps them."""


class Bank:
    """The soft labels of one teacher.

    Args:
        network: returns the teacher in eval mode; called at most once, when logits must be
            computed.
        of: everything that the logits depend on, except the view: the teacher's weights, data,
            augmentation, precision.
        folder: of the files on this node. None: `soft_labels` in ~/.cache/tfkd_ray.
        elsewhere: views of other nodes.
    """

    say: Callable[[str], None] | None = None
    """Called with a sentence if views cannot be kept. None: a warning."""
    meet: Callable[[], None] | None = None
    """Called when a view is complete: waits for workers on other nodes, which may still fill
    theirs."""

    def __init__(
        self,
        network: Callable[[], nn.Module],
        of: dict[str, Any],
        folder: Path | None = None,
        elsewhere: Elsewhere | None = None,
    ) -> None:
        self._make, self._of, self._elsewhere = network, of, elsewhere
        self._network: nn.Module | None = None
        self._folder = folder or cache_folder() / "soft_labels"

    def network(self) -> nn.Module:
        """Return the teacher itself."""
        self._network = self._network or self._make()
        return self._network

    def logits(
        self,
        view: dict[str, Any],
        count: int,
        num_classes: int,
        compute: Compute,
    ) -> Tensor:
        """Return the teacher's logits of a view, less their row means.

        They are float16 or float32 [N, K] on the CPU, and read-only.

        Args:
            view: key that distinguishes it from the teacher's other views.
            count: N.
            compute: returns the logits [n, K] of the images at indices int64 [n].
        """
        return self._found(view, [count, num_classes], compute, _centred)

    def top_logits(
        self, view: dict[str, Any], count: int, num_classes: int, compute: Compute
    ) -> Tensor:
        """Return the largest logits of a view, int16 [N, W], as `top_labels` packs them.

        Else like `logits`.
        """
        shape = [count, top_labels.COLUMNS]
        return self._found(_of_top(view, num_classes), shape, compute, _top)

    def features(
        self,
        view: dict[str, Any],
        count: int,
        layers: Sequence[str],
        numbers: int,
        compute: Compute,
    ) -> Tensor:
        """Return outputs of the teacher's layers for a view, as rows [N, D]; else like `logits`.

        Args:
            layers: their names, in the order of the rows' parts.
            numbers: D.
        """
        of_layers = {**view, "layers": list(layers)}
        return self._found(of_layers, [count, numbers], compute, _as_they_are)

    def _found(
        self, view: dict[str, Any], shape: list[int], compute: Compute, kept: Kept
    ) -> Tensor:
        """Return the numbers of a view: of a file, of another node, or computed."""
        path, about = self._file_of(view, shape)
        found = _read(path, about)
        if (
            found is None
            and self._elsewhere is not None
            and (content := self._elsewhere.fetch(path.stem))
        ):
            if self._has_room(len(content)):
                self._write(path, content)
            found = _read(path, about)
            found = load(content)["logits"] if found is None else found
        found = self._filled(path, about, shape, compute, kept) if found is None else found
        if self.meet is not None:
            self.meet()
        return found

    def read_ahead(
        self, view: dict[str, Any], count: int, num_classes: int, *, top: bool = False
    ) -> Thread:
        """Read the file of a view in a thread, if another run has made it.

        The epoch that needs the view then finds it in memory, with its checksum compared.

        Args:
            view: key of a view, as of `logits`.
            count: N.
            top: that of `top_logits`.
        """
        if top:
            place = self._file_of(_of_top(view, num_classes), [count, top_labels.COLUMNS])
        else:
            place = self._file_of(view, [count, num_classes])
        thread = Thread(target=_read_if_right, args=place, daemon=True)
        thread.start()
        return thread

    def _file_of(self, view: dict[str, Any], shape: list[int]) -> tuple[Path, dict[str, str]]:
        """Return the file of a view, and its header."""
        about = {
            "of": json.dumps(self._of, sort_keys=True),
            "view": json.dumps(view, sort_keys=True),
        }
        about["shape"] = json.dumps(shape)
        name = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:32]
        return self._folder / f"{name}.safetensors", about

    def _filled(
        self, path: Path, about: dict[str, str], shape: list[int], compute: Compute, kept: Kept
    ) -> Tensor:
        """Return the numbers of a view, computed together with concurrent processes."""
        parts: dict[int, Tensor] = {}
        count, columns = shape
        chunks = dict(enumerate(torch.arange(count).tensor_split(CHUNKS)))
        # the view, and as much again for its parts
        if not self._has_room(4 * count * columns):
            return _together([kept(self._asked(compute, chunk)) for chunk in chunks.values()])
        for wait in (False, True):  # first the free chunks, then the locked ones
            for k in chunks.keys() - parts.keys():
                part, mine = path.with_suffix(f".{k}"), about | {"part": str(k)}
                with (
                    contextlib.suppress(Timeout),
                    _locked_file(self._folder / f"lock-{k}", wait=wait),
                ):
                    done = _read(part, mine)
                    if done is None and (whole := _read(path, about)) is not None:
                        return whole  # the others have finished and removed the parts
                    if done is None:
                        done = kept(self._asked(compute, chunks[k]))
                        self._write(part, _view_bytes(done, mine))
                    parts[k] = done
        with _locked_file(self._folder / "lock-whole", wait=True):
            whole = _read(path, about)
            if whole is None:
                whole = _together([parts[k] for k in chunks])
                content = _view_bytes(whole, about)
                if whole.dtype == torch.float16 or self._has_room(len(content)):
                    self._write(path, content)
                if self._elsewhere is not None:
                    self._elsewhere.offer(path.stem, content)
                for k in chunks:
                    with contextlib.suppress(OSError):
                        path.with_suffix(f".{k}").unlink(missing_ok=True)
        return whole

    def _asked(self, compute: Compute, chunk: Tensor) -> Tensor:
        """Return the teacher's numbers of the images at some indices, on the CPU."""
        return compute(self.network(), chunk).cpu()

    def rest(self) -> None:
        """Move the teacher, if it was needed, off the GPU: it may not be needed for long."""
        if self._network is not None:
            self._network.cpu()

    def _has_room(self, size: int) -> bool:
        """Return whether the bank has room, after removing unused files; else report it."""
        if size > limit():
            self._cannot_keep(
                f"TFKD_BANK_GB allows {limit() / 1e6:.0f} MB, and a view needs {size / 1e6:.0f}"
            )
            return False
        _make_room(self._folder, size)
        if (free := free_bytes(self._folder)) < size:
            self._cannot_keep(f"{free / 1e6:.0f} MB are free, and a view needs {size / 1e6:.0f}")
            return False
        return True

    def _write(self, path: Path, content: bytes) -> None:
        """Write a file; report a failure and continue without it."""
        try:
            with whole_file(path) as part:
                part.write_bytes(content)
        except OSError as error:
            self._cannot_keep(error.strerror or str(error))

    def _cannot_keep(self, why: str) -> None:
        if self._folder not in _told:
            _told.add(self._folder)
            text = (
                f"soft labels cannot be kept in {self._folder}: {why}; each trial runs the teacher itself, which gives "
                "the same numbers but takes longer. Free space there, or set XDG_CACHE_HOME to another place"
            )
            self.say(text) if self.say else warnings.warn(text, stacklevel=4)


_told: set[Path] = set()
"""Folders for which this process has reported a failure."""


def _of_top(view: dict[str, Any], num_classes: int) -> dict[str, Any]:
    """Return the key of the largest logits of a view."""
    return {**view, "kept": f"top {top_labels.KEPT} of {num_classes}"}


def fits(count: int, columns: int) -> bool:
    """Return whether a view [N, K], or [N, D], is small enough for the bank."""
    return 2 * count * columns <= LARGEST


def limit() -> float:
    """Return the bank's limit per node in bytes: TFKD_BANK_GB (default 20) gigabytes."""
    return float(os.environ.get("TFKD_BANK_GB", "20")) * 1e9


def _centred(logits: Tensor) -> Tensor:
    logits = _finite_logits(logits)
    return _rounded(logits - logits.mean(dim=1, keepdim=True))


def _top(logits: Tensor) -> Tensor:
    return top_labels.packed(_finite_logits(logits).cpu())


def _finite_logits(logits: Tensor) -> Tensor:
    logits = logits.float()
    if not logits.isfinite().all():
        raise ConfigError(
            "the teacher gives logits that are not finite numbers; look at its weights and at how its images are "
            "normalised, or set precision: fp32"
        )
    return logits


def _as_they_are(features: Tensor) -> Tensor:
    features = features.float()
    if not features.isfinite().all():
        raise ConfigError(
            "a layer of the teacher gives numbers that are not finite; look at its weights and at how its images are "
            "normalised, or set precision: fp32"
        )
    return _rounded(features)


def _rounded(rows: Tensor) -> Tensor:
    """Return rows on the CPU, in half precision if they are below `HALF`."""
    rows = rows.cpu()
    return rows.half() if bool((rows.abs() < HALF).all()) else rows


def _together(parts: list[Tensor]) -> Tensor:
    """Return the joined parts of a view, in float32 if any of them is."""
    widest = max((part.dtype for part in parts), key=lambda dtype: dtype.itemsize)
    return torch.cat([part.to(widest) for part in parts])


@contextlib.contextmanager
def _locked_file(path: Path, *, wait: bool) -> Iterator[None]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path)
        lock.acquire(timeout=-1 if wait else 0)
    except OSError as error:
        if isinstance(error, Timeout):
            raise
        yield  # no place for a lock: every process computes for itself
        return
    try:
        yield
    finally:
        lock.release()


def _view_bytes(logits: Tensor, about: dict[str, str]) -> bytes:
    logits = logits.contiguous()
    return save({"logits": logits}, {**about, "sha256": _checksum(logits)})


def _checksum(logits: Tensor) -> str:
    """Return the SHA-256 of the array, without copying it: a view may be 1 GB."""
    return hashlib.sha256(logits.numpy().data).hexdigest()


def _read(path: Path, about: dict[str, str]) -> Tensor | None:
    """Return the mapped logits of a file, or None if it is missing or damaged.

    Raises:
        ValueError: the file belongs to other soft labels.
    """
    try:
        with safe_open(path, "pt") as file:
            said = dict(file.metadata() or {})
            logits: Tensor = file.get_tensor("logits")
        facts = path.stat()
    except (OSError, SafetensorError):
        return None
    checksum = said.pop("sha256", None)
    if said != about:
        wrong = sorted(_different(said, about))
        raise ValueError(
            f"{path}: soft labels of another {' and '.join(wrong)}; delete it, and it is made again"
        )
    content = (facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns)
    if content not in _intact:
        if _checksum(logits) != checksum:
            warnings.warn(
                f"{path}: damaged (its checksum does not match); computed again", stacklevel=2
            )
            return None
        _intact.add(content)
    with contextlib.suppress(OSError):
        # marks it as recently used; the time of its content stays
        os.utime(path, ns=(time.time_ns(), facts.st_mtime_ns))
    return logits


def _read_if_right(path: Path, about: dict[str, str]) -> None:
    """Read a file; one of other soft labels is left to the epoch that needs it, which raises."""
    with contextlib.suppress(ValueError):
        _read(path, about)


_intact: set[tuple[int, ...]] = set()
"""Files whose checksum fitted in this process, by device, inode, size and time of their content."""


def _different(said: dict[str, str], about: dict[str, str]) -> Iterator[str]:
    """Yield the names of the facts in which a file's header differs from the expected one."""
    for key in {*said, *about}:
        a, b = (json.loads(d.get(key, "null")) for d in (said, about))
        if isinstance(a, dict) and isinstance(b, dict):
            yield from (k for k in {*a, *b} if a.get(k) != b.get(k))
        elif a != b:
            yield key


def _make_room(folder: Path, size: int) -> None:
    """Remove the longest unused files until `size` more bytes fit within the limit."""
    files = [
        (facts.st_atime, facts.st_size, file)
        for file in folder.glob("[0-9a-f]*")
        if (facts := _facts(file))
    ]
    room = limit() - size - sum(size for _, size, _ in files)
    for _, size, file in sorted(files):
        if room >= 0:
            return
        with contextlib.suppress(OSError):
            file.unlink(missing_ok=True)
            room += size


def _facts(file: Path) -> os.stat_result | None:
    try:
        return file.stat()
    except FileNotFoundError:  # removed by another process
        return None
