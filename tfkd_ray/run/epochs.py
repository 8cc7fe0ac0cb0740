"""The epochs of a trial in one process, errors of GPUs and disks, and soft labels between nodes."""

import json
import re
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import ray
import torch
import torch.distributed as dist

from tfkd_ray.learn import teachers
from tfkd_ray.learn.config import TeacherRun, TrainConfig
from tfkd_ray.learn.loop import train_in
from tfkd_ray.learn.several import banks_in
from tfkd_ray.run.connect import BROKEN_GPU
from tfkd_ray.settings.errors import ConfigError, Say, readable
from tfkd_ray.settings.files import DISK_ERRORS, write_text
from tfkd_ray.settings.schema import validated
from tfkd_ray.store.assignment import Assignment

Metrics = dict[str, float]

BARRIER_TIMEOUT_S = 10.0
"""Maximum time to wait for the other workers after a failure."""
COLLECTIVE_TIMEOUT_S = 300
"""Maximum time that a worker waits for the others in a training step or a validation."""
COMMAND_TIMEOUT = timedelta(days=30)
"""Maximum time that a worker waits for a command, or for a node that reads data or soft labels."""


class Stopped(Exception):
    """Thrown into a trial that is stopped for good: nothing needs to be saved."""


def check_metrics(metrics: Mapping[str, Any], assignment: Assignment) -> None:
    """Raise if an epoch's metrics are not numbers, or lack one that the search needs."""
    for name, value in metrics.items():
        if not isinstance(value, int | float):
            raise TypeError(
                f"{name} is {value!r:.80} at epoch {metrics['epoch']:.0f}, not a number"
            )
    missing = [name for name in assignment.metrics if name not in metrics]
    if missing:
        raise LookupError(
            f"{' and '.join(missing)} missing at epoch {metrics['epoch']:.0f}; the search needs it"
        )


def epochs_here(
    run: dict[str, Any], assignment: Assignment, say: Say | None = None
) -> Iterator[Metrics]:
    """Yield the epochs of a trial in this process."""
    yield from prepared_epochs(run, assignment, say)


def prepared_epochs(
    run: dict[str, Any] | TeacherRun,
    assignment: Assignment,
    say: Say | None = None,
    meet: Callable[[], None] | None = None,
) -> Iterator[Metrics]:
    """Yield the epochs of a trial in this process, after preparing its data and its teacher.

    Args:
        run: a trial's configuration, or a teacher in training.
        meet: waits for the group's other workers, without a time limit. None: there are no others.
    """
    if isinstance(run, TeacherRun):
        return _epochs_of_teacher(run, assignment, say, meet)
    config = validated(TrainConfig, run)
    check_data_here(config)
    storage, directory = assignment.place
    shelf = _Elsewhere(shelf_name(directory.parent.parent)) if ray.is_initialized() else None
    storage.begin_trial(directory)
    for run_of_teacher in config.teacher_runs():
        teachers.fetch_teacher(run_of_teacher, storage)
    teacher = teachers.bank_of(config, storage.folder, shelf)
    if meet is not None:
        config.data.load()  # cached with its statistics; the loop uses the same
        config.data.statistics()
        for bank in banks_in(teacher):
            bank.meet = meet
        meet()
    return train_in(
        directory,
        config,
        teacher=teacher,
        more_metrics=assignment.metrics,
        about={"trial": assignment.name},
        say=say,
        on_saved=storage.on_saved(directory),
    )


def _epochs_of_teacher(
    run: TeacherRun, assignment: Assignment, say: Say | None, meet: Callable[[], None] | None
) -> Iterator[Metrics]:
    """Yield the epochs of a teacher in this process, one of a group's workers."""
    check_data_here(run)
    storage, directory = assignment.place
    teachers.fetch_teacher(run, storage)
    run.data.load()
    run.data.statistics()
    if meet is not None:
        meet()
    return train_in(directory, run, say=say, on_saved=storage.on_saved(directory))


def check_data_here(config: TrainConfig) -> None:
    """Raise, with this node's name, if its data are missing or differ from the driver's."""
    try:
        config.data.check()
        if config.data.digests:
            config.data.pinned()
    except ConfigError as error:
        raise ConfigError(
            f"node {socket.gethostname()}: {'; '.join(error.problems)}. Each node reads its own copy: put it there, in "
            "setup_commands of the cluster file, or use a file system that all nodes see (docs/storage.md)"
        ) from None


def stop_epochs(epochs: Iterator[Metrics]) -> None:
    """End a trial without saving; do nothing if it has already ended."""
    if hasattr(epochs, "throw"):
        with suppress(Stopped, StopIteration):
            epochs.throw(Stopped())


def reason_of(error: BaseException) -> str:
    text = ""
    with suppress(Exception):  # even its text may raise
        text = readable(str(error)).strip()
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


_NO_MEMORY = re.compile(
    r"(CUDA (driver )?error|Triton Error \[CUDA\]|Cuda failure.*): '?out of memory|Cuda failure \d* ?'out of memory'"
    r"|_ALLOC_FAILED|cublasCreate\(|unable to find an engine to execute",
    re.IGNORECASE,
)
"""Parts of error messages of CUDA, its driver, Triton, cuBLAS, cuDNN and NCCL on a GPU without room."""


def is_out_of_memory(error: BaseException | None) -> bool:
    """Return True if a GPU ran out of memory, by torch's allocator, CUDA or one of its libraries."""
    while error is not None:
        text = reason_of(error)
        if isinstance(error, torch.OutOfMemoryError) or _NO_MEMORY.search(text):
            return True
        error = error.__cause__
    return False


_BROKEN = re.compile(
    "illegal memory access|illegal instruction|device-side assert|misaligned address|invalid program counter"
    "|hardware stack error|launch timed out|un(specified|known) launch failure|CUDA error: un(specified|known)"
    r"|uncorrectable (ECC|NVLink)|ECC error|\bXid\b|nvlink or a hardware error|fallen off the bus|GPU is lost"
    "|devices? (is/)?(is|are) busy or unavailable|no CUDA-capable device|no CUDA GPUs are available|torch sees no GPU"
    "|has compute capability|no kernel image is available|driver version is insufficient"
    "|ncclRemoteError|ncclUnhandledCudaError|remote process exited|(CUBLAS|CUDNN)_STATUS_EXECUTION_FAILED",
    re.IGNORECASE,
)
"""Parts of error messages after which the GPU is unusable in this process, or no GPU is left."""


def is_of_broken_gpu(error: BaseException | None) -> bool:
    """Return True if an error, or one of its causes, leaves this process without a working GPU."""
    while error is not None:
        known = isinstance(
            error, RuntimeError | OSError
        )  # torch's own subclass it, torch.AcceleratorError among them
        if known and not is_out_of_memory(error) and _BROKEN.search(reason_of(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def this_node() -> str:
    """Return the id of the node of this process."""
    return str(ray.get_runtime_context().get_node_id()) if ray.is_initialized() else ""


def note_broken(assignment: Assignment, reason: str) -> None:
    """Write a note about a broken GPU to the trial's directory, for the driver."""
    storage, folder = assignment.place
    told = {"node": this_node(), "host": socket.gethostname(), "reason": reason.splitlines()[0]}
    write_text(folder / BROKEN_GPU, json.dumps(told))
    with suppress(OSError):
        storage.send(folder / BROKEN_GPU)


def is_of_storage(error: BaseException) -> bool:
    """Return True if an error means a full, read-only or lost disk: not the trial's fault."""
    return isinstance(error, OSError) and error.errno in DISK_ERRORS


# --- soft labels of other nodes -------------------------------------------------------------------


def shelf_name(experiment: Path) -> str:
    """Return the name of the actor that holds an experiment's soft labels, within its job."""
    return f"tfkd-soft-labels:{experiment.name}"


class Shelf:
    """Actor that shares each view that a node has filled with the others, in Ray's object store.

    The driver owns it, so a view outlives the trial that filled it. At `limit` bytes, the oldest
    views are removed.
    """

    def __init__(self, limit: int) -> None:
        self._limit, self._views = limit, dict[str, tuple[Any, int]]()

    def fetch(self, name: str) -> list[Any]:
        """Return a reference to a view's file in a list, or an empty list."""
        return [self._views[name][0]] if name in self._views else []

    def offer(self, name: str, content: bytes) -> None:
        """Store a view's file, unless it alone exceeds the limit."""
        if len(content) > self._limit:
            return
        while (
            self._views
            and sum(size for _, size in self._views.values()) + len(content) > self._limit
        ):
            del self._views[next(iter(self._views))]
        self._views[name] = (ray.put(content), len(content))


class _Elsewhere:
    """A trial's client of the experiment's shelf; without a shelf, it finds nothing."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._shelf: Any = None

    def fetch(self, name: str) -> bytes | None:
        with suppress(ValueError, ray.exceptions.RayError):
            self._shelf = self._shelf or ray.get_actor(self._name)
            refs = ray.get(self._shelf.fetch.remote(name))
            return ray.get(refs[0]) if refs else None
        return None

    def offer(self, name: str, content: bytes) -> None:
        if self._shelf is not None:
            with suppress(ray.exceptions.RayError):
                ray.get(self._shelf.offer.remote(name, content))


def unheard(text: str) -> None:
    """Discard a note: nobody needs it, or another worker reports it."""


def all_here(control: dist.ProcessGroup) -> bool:
    """Return True if every worker reaches this point in time, so that all are in step again.

    In torch's `monitored_barrier` only the first worker has a timeout: any other one would wait
    until the rest give up their training step.
    """
    try:
        reached = dist.all_reduce(torch.zeros(1), group=control, async_op=True)
        reached.wait(timedelta(seconds=BARRIER_TIMEOUT_S))
    except RuntimeError:
        return False
    return True


def agreed(control: dist.ProcessGroup, in_step: bool, own: bool) -> tuple[bool, bool]:
    """Return (whether the group can run the next trial, whether this worker reports the failure).

    Args:
        in_step: this worker has no collective operation open.
        own: the trial itself has failed.
    """
    if not all_here(control):
        return False, own
    owners = torch.zeros(dist.get_world_size(), dtype=torch.int64)
    owners[dist.get_rank()] = own
    out_of_step = torch.tensor(int(not (in_step and own)))
    dist.all_reduce(owners, group=control)
    dist.all_reduce(out_of_step, group=control)
    return not out_of_step, own and int(owners.argmax()) == dist.get_rank()
