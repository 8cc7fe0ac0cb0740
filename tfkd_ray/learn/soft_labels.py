"""The bank: a teacher's logits, computed once for each view of the images and shared by all trials that ask for it.

A view is how an epoch shows the train images: a function of (data, augmentation, seed, epoch), so trials of a sweep see
the same ones. A view is one file on a node, memory-mapped by all who read it. Processes that want it at the same time
fill it together, chunk by chunk; a chunk belongs to whoever holds its lock, and the lock of a killed process is free.

Logits are kept in half precision with their row means taken off: softmax does not see it, and the rounding is finer.
A view whose logits are too large for that (`HALF`) is kept in float32.
Nothing here is needed twice: a file may be deleted at any time, and is computed again. Where there is no room for a
view, each trial computes it for itself, and that is said once in a process.

Shapes: N = images, K = classes.
"""

import contextlib
import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor, nn

from tfkd_ray.settings.errors import ConfigError
from tfkd_ray.settings.files import cache_folder, free_bytes, whole_file

LARGEST = 2**30
"""Bytes of a view above which a teacher is asked online: 2.5 GB of ImageNet's would be read for each epoch."""
HALF = 128
"""Logits below this are kept in half precision, which rounds them by 1/32 at most; others in float32."""
CHUNKS = 16
"""Parts in which a view is filled."""


class Elsewhere(Protocol):
    """Where other nodes leave views; see `trial.Shelf`."""

    def fetch(self, name: str) -> bytes | None:
        """The file of a view, if another node has filled it."""

    def offer(self, name: str, content: bytes) -> None:
        """Leave the file of a view that this node has filled."""


class Bank:
    """The soft labels of one teacher.

    Args:
        network: gives the teacher, in eval mode; called when something has to be computed, at most once.
        of: all that the logits depend on, but for the view: the teacher's weights, data, augmentation, precision.
        folder: of the files on this node. None: `soft_labels` in ~/.cache/tfkd_ray.
        elsewhere: views of other nodes.
    """

    say: Callable[[str], None] | None = None
    """Called with a sentence where views cannot be kept. None: it is a warning."""
    meet: Callable[[], None] | None = None
    """Called when a view is there: waits for the workers of other nodes, which may have theirs to fill."""

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
        """The teacher itself."""
        self._network = self._network or self._make()
        return self._network

    def logits(
        self,
        view: dict[str, Any],
        count: int,
        num_classes: int,
        compute: Callable[[nn.Module, Tensor], Tensor],
    ) -> Tensor:
        """The teacher's logits of a view, less their row means: float16 or float32 [N, K] on the CPU, not to write to.

        Args:
            view: what tells it from the teacher's other views.
            count: N.
            compute: gives the logits [n, K] of the images at some indices, int64 [n].
        """
        about = {
            "of": json.dumps(self._of, sort_keys=True),
            "view": json.dumps(view, sort_keys=True),
        }
        about["shape"] = json.dumps([count, num_classes])
        name = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:32]
        path = self._folder / f"{name}.safetensors"
        found = _read(path, about)
        if (
            found is None
            and self._elsewhere is not None
            and (content := self._elsewhere.fetch(name))
        ):
            if self._has_room(len(content)):
                self._write(path, content)
            found = _read(path, about)
            found = load(content)["logits"] if found is None else found
        found = self._filled(path, about, count, compute) if found is None else found
        if self.meet is not None:
            self.meet()
        return found

    def _filled(
        self,
        path: Path,
        about: dict[str, str],
        count: int,
        compute: Callable[[nn.Module, Tensor], Tensor],
    ) -> Tensor:
        """The logits of a view, computed together with whoever wants them at the same time."""
        parts: dict[int, Tensor] = {}
        chunks = dict(enumerate(torch.arange(count).tensor_split(CHUNKS)))
        if not self._has_room(
            4 * count * int(json.loads(about["shape"])[1])
        ):  # the view, and once more its parts
            return _together(
                [_centred(compute(self.network(), chunk)) for chunk in chunks.values()]
            )
        for wait in (False, True):  # first what nobody is at, then what somebody was at
            for k in chunks.keys() - parts.keys():
                part, mine = path.with_suffix(f".{k}"), about | {"part": str(k)}
                with (
                    contextlib.suppress(Timeout),
                    _locked_file(self._folder / f"lock-{k}", wait=wait),
                ):
                    done = _read(part, mine)
                    if done is None and (whole := _read(path, about)) is not None:
                        return whole  # the others have finished, and removed the parts
                    if done is None:
                        done = _centred(compute(self.network(), chunks[k]))
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

    def _has_room(self, size: int) -> bool:
        """Whether so many bytes more may be kept, for which the longest unused make way; where not, it is said."""
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
        """Keep a file; where it cannot be, do not, and say so."""
        try:
            with whole_file(path) as part:
                part.write_bytes(content)
        except OSError as error:
            self._cannot_keep(error.strerror or str(error))

    def _cannot_keep(self, why: str) -> None:
        if self._folder not in _told:
            _told.add(self._folder)
            text = (
                f"soft labels cannot be kept in {self._folder}: {why}; each trial asks the teacher itself, which gives "
                "the same numbers and takes longer. Make room there, or set XDG_CACHE_HOME to another place"
            )
            self.say(text) if self.say else warnings.warn(text, stacklevel=4)


_told: set[Path] = set()
"""Folders of which this process has said that nothing can be kept there."""


def fits(count: int, num_classes: int) -> bool:
    """Whether a view is small enough for the bank."""
    return 2 * count * num_classes <= LARGEST


def limit() -> float:
    """Bytes that the bank may take on a node: TFKD_BANK_GB (20) gigabytes."""
    return float(os.environ.get("TFKD_BANK_GB", "20")) * 1e9


def _centred(logits: Tensor) -> Tensor:
    logits = logits.float()
    if not logits.isfinite().all():
        raise ConfigError(
            "the teacher gives logits that are not finite numbers; look at its weights and at how its images are "
            "normalised, or set precision: fp32"
        )
    logits = (logits - logits.mean(dim=1, keepdim=True)).cpu()
    return logits.half() if bool((logits.abs() < HALF).all()) else logits


def _together(parts: list[Tensor]) -> Tensor:
    """The parts of a view, in float32 if any of them is."""
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
        yield  # nowhere to lock: everyone for himself
        return
    try:
        yield
    finally:
        lock.release()


def _view_bytes(logits: Tensor, about: dict[str, str]) -> bytes:
    logits = logits.contiguous()
    return save({"logits": logits}, {**about, "sha256": _checksum(logits)})


def _checksum(logits: Tensor) -> str:
    """SHA-256 of the array, which is not copied for it: a view may be 1 GB."""
    return hashlib.sha256(logits.numpy().data).hexdigest()


def _read(path: Path, about: dict[str, str]) -> Tensor | None:
    """The logits in a file, mapped; None where there is none, or a damaged one. Another's is a ValueError."""
    try:
        with safe_open(path, "pt") as file:
            said = dict(file.metadata() or {})
            logits: Tensor = file.get_tensor("logits")
    except (OSError, SafetensorError):
        return None
    checksum = said.pop("sha256", None)
    if said != about:
        wrong = sorted(_different(said, about))
        raise ValueError(
            f"{path}: soft labels of another {' and '.join(wrong)}; delete it, and it is made again"
        )
    if _checksum(logits) != checksum:
        warnings.warn(f"{path}: damaged (its checksum does not fit); computed again", stacklevel=2)
        return None
    with contextlib.suppress(OSError):
        os.utime(path)  # the last to be removed
    return logits


def _different(said: dict[str, str], about: dict[str, str]) -> Iterator[str]:
    """What soft labels are of, as a file says it, against what they should be of: the words that differ."""
    for key in {*said, *about}:
        a, b = (json.loads(d.get(key, "null")) for d in (said, about))
        if isinstance(a, dict) and isinstance(b, dict):
            yield from (k for k in {*a, *b} if a.get(k) != b.get(k))
        elif a != b:
            yield key


def _make_room(folder: Path, size: int) -> None:
    """Remove files, the longest unused first, until so many bytes more are within the limit."""
    files = [
        (facts.st_mtime, facts.st_size, file)
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
    except FileNotFoundError:  # removed meanwhile
        return None
