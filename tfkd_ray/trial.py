"""One trial: in this process, or on a resident group of Ray Train workers.

Both run `loop.train_in`, so a trial's files and numbers do not depend on which. `StudentTrial` is a reused Tune actor:
a trial of one worker trains inside it; for trials of several workers it owns a `Group`, one TorchTrainer whose workers
stay and take one trial after the other (a TorchTrainer started for each trial would cost 14 to 22 s each).
"""

import contextlib
import functools
import json
import os
import queue
import re
import shutil
import signal
import socket
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import ray
import torch
import torch.distributed as dist
from ray import tune

from tfkd_ray import own_code, teachers
from tfkd_ray.assignment import Assignment, without_assignment
from tfkd_ray.cluster import BROKEN_GPU, DRIVER, OUT_OF_MEMORY, label_selectors, shunning
from tfkd_ray.config import TrainConfig
from tfkd_ray.data import seal_test_split
from tfkd_ray.experiment import write_text
from tfkd_ray.files import DISK_ERRORS
from tfkd_ray.loop import Diverged, train_in
from tfkd_ray.schema import ConfigError, readable, validated

Metrics = dict[str, float]

BARRIER_TIMEOUT_S = 10.0
"""Longest wait for the other workers after a failure."""
STOP_TIMEOUT_S = 10.0
"""Longest wait for a group to save and stop when the sweep ends."""
COLLECTIVE_TIMEOUT_S = 300
"""Longest wait of a worker for the others inside a training step or a validation."""
COMMAND_TIMEOUT = timedelta(days=30)
"""Longest wait of a worker for what comes next: a command, or a slower node that reads data or fills soft labels."""


class Stopped(Exception):
    """Thrown into a running trial that is stopped for good: nothing of it needs to be saved."""


class GroupLost(RuntimeError):
    """A group's workers are gone, by no fault of the trial's configuration."""


class BrokenGpu(RuntimeError):
    """A GPU, or what CUDA keeps of it in this process, is broken, by no fault of the trial's configuration."""


class TrialFailed(RuntimeError):
    """The trial's own failure, as a worker told it."""

    def __init__(self, reason: str, trace: str) -> None:
        super().__init__(reason)
        self.trace = trace


def resources_of(config: TrainConfig) -> tune.PlacementGroupFactory:
    """What Tune reserves for a trial's own process (a group's workers are reserved by Ray Train)."""
    if config.workers > 1:
        return tune.PlacementGroupFactory([{DRIVER: 0.01}])
    return shunning(tune.PlacementGroupFactory([config.worker_resources]))


class StudentTrial(tune.Trainable):  # type: ignore[misc]
    """A Tune trainable for proposals of `OptunaSearcher`: one step is one epoch, `done` after the last.

    A failure of the trial itself is a result with `failed` (the reason), so that the actor can be used again; only a
    lost process, and a disk that cannot be written to, are errors for Tune, which then starts the trial again, from its
    last checkpoint. A result's `note` is a sentence for who looks on.
    """

    def setup(self, config: dict[str, Any]) -> None:
        seal_test_split()
        self._group: Group | None = None
        self._epochs: Iterator[Metrics] = iter(())
        self._notes: list[str] = []
        self._leaving = False
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._leave)
        self._begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        with contextlib.suppress(
            Exception
        ):  # the trial before has ended, and its end was told: no matter of this one's
            _stop(self._epochs)
        self._begin(new_config)
        return True

    def _leave(self, number: int, frame: Any) -> None:
        """SIGTERM, as a node gets that is taken away: save and go, now or after the epoch that is being trained."""
        self._leaving = True
        if not getattr(self._epochs, "gi_running", False):
            self._save_and_go()

    def _save_and_go(self) -> None:
        try:
            if hasattr(self._epochs, "close"):
                self._epochs.close()
        finally:
            os._exit(1)  # the trial goes on in another process

    def _begin(self, config: dict[str, Any]) -> None:
        self._assignment = Assignment.of(config)
        if self._assignment.home is not None:  # each time: Ray has gone to a folder of its own
            own_code.enter(self._assignment.home)
        run = without_assignment(config)
        workers = run["workers"]
        if workers == 1:
            self._epochs = _epochs_here(run, self._assignment, self._notes.append)
        else:
            folder = self._assignment.folder.parent.parent / "groups"
            self._group = self._group or Group(validated(TrainConfig, run), folder, self._notes.append)
            self._epochs = self._group.epochs(run, self._assignment)

    def step(self) -> dict[str, Any]:
        try:
            metrics = next(self._epochs)
            check_metrics(metrics, self._assignment)
        except GroupLost:
            raise
        except (Exception, SystemExit) as error:
            if _is_of_storage(error):
                raise
            return self._failed(error)
        if self._leaving:
            self._save_and_go()
        epoch = int(metrics["epoch"])
        note = {"note": "; ".join(self._notes)} if self._notes else {}
        self._notes.clear()
        return {**metrics, **note, "epoch": epoch, "done": epoch == self._assignment.epochs, "node": _node()}

    def _failed(self, error: BaseException) -> dict[str, Any]:
        if isinstance(error, TrialFailed):
            reason, trace = str(error), error.trace
        else:
            reason, trace = _reason(error), "".join(traceback.format_exception(error))
        storage, folder = self._assignment.place
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "error.txt", trace)
        with contextlib.suppress(OSError):  # the reason is told all the same
            storage.send(folder / "error.txt")
        share = self.trial_resources.required_resources.get("GPU", 0) if self.trial_resources else 0
        if _is_out_of_memory(error) and 0 < share < 1:
            write_text(folder / OUT_OF_MEMORY, str(share))
            storage.send(folder / OUT_OF_MEMORY)
            raise error  # ends this process; the trial starts again, with a larger share
        if _is_of_broken_gpu(error) or (share and not _gpu_answers()):
            _note_broken(self._assignment, reason)
            raise BrokenGpu(reason) from None  # ends this process; the trial goes on elsewhere
        return {"failed": reason, "done": True}

    def cleanup(self) -> None:
        if hasattr(self._epochs, "close"):
            with contextlib.suppress(GroupLost):
                self._epochs.close()  # saves what is not saved yet
        if self._group is not None:
            self._group.close()


def check_metrics(metrics: Mapping[str, Any], assignment: Assignment) -> None:
    """Raise where an epoch's metrics are no numbers, or lack one by which the trial is judged."""
    for name, value in metrics.items():
        if not isinstance(value, int | float):
            raise TypeError(f"{name} is {value!r:.80} at epoch {metrics['epoch']:.0f}, and no number")
    missing = [name for name in assignment.metrics if name not in metrics]
    if missing:
        raise LookupError(f"{' and '.join(missing)} missing at epoch {metrics['epoch']:.0f}; the search needs it")


def _epochs_here(
    run: dict[str, Any], assignment: Assignment, say: Callable[[str], None] | None = None
) -> Iterator[Metrics]:
    """The epochs of a trial in this process."""
    yield from _prepared(run, assignment, say)


def _prepared(
    run: dict[str, Any],
    assignment: Assignment,
    say: Callable[[str], None] | None = None,
    meet: Callable[[], None] | None = None,
) -> Iterator[Metrics]:
    """The epochs of a trial in this process, once its data and its teacher are found here.

    Args:
        meet: waits for the group's other workers, however long their node takes. None: there are no others.
    """
    config = validated(TrainConfig, run)
    check_data_here(config)
    storage, directory = assignment.place
    shelf = _Elsewhere(shelf_name(directory.parent.parent)) if ray.is_initialized() else None
    storage.begin_trial(directory)
    if (run_of_teacher := config.teacher_run()) is not None:
        teachers.fetch(run_of_teacher, storage)
    teacher = teachers.bank_of(config, storage.folder, shelf)
    if meet is not None:
        config.data.load()  # kept, as its statistics are: the loop gets the same
        config.data.statistics()
        if teacher is not None:
            teacher.meet = meet
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


def check_data_here(config: TrainConfig) -> None:
    """Raise where this node, unlike the driver's, has no copy of the data, or has others; with the node's name."""
    try:
        config.data.check()
        if config.data.digest is not None:
            config.data.pinned()
    except ConfigError as error:
        raise ConfigError(
            f"node {socket.gethostname()}: {'; '.join(error.problems)}. Each node reads its own copy: put it there, in "
            "setup_commands of the cluster file, or use a file system that all nodes see (docs/storage.md)"
        ) from None


def _stop(epochs: Iterator[Metrics]) -> None:
    """End a trial without saving; fine if it ended already."""
    if hasattr(epochs, "throw"):
        with contextlib.suppress(Stopped, StopIteration):
            epochs.throw(Stopped())


def _reason(error: BaseException) -> str:
    text = ""
    with contextlib.suppress(Exception):  # an exception of the user's own may not even have a text
        text = readable(str(error)).strip()
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _is_out_of_memory(error: BaseException | None) -> bool:
    """Whether a GPU's memory is what an error came of: torch's allocator says so, or CUDA and its libraries."""
    while error is not None:
        text = _reason(error)
        if isinstance(error, torch.OutOfMemoryError) or re.search("CUDA error: out of memory|_ALLOC_FAILED", text):
            return True
        error = error.__cause__
    return False


_BROKEN = re.compile(
    "illegal memory access|illegal instruction|device-side assert|misaligned address|invalid program counter"
    "|hardware stack error|launch timed out|un(specified|known) launch failure|CUDA error: un(specified|known)"
    r"|uncorrectable (ECC|NVLink)|ECC error|\bXid\b|nvlink or a hardware error|fallen off the bus|GPU is lost"
    "|devices? (is/)?(is|are) busy or unavailable|no CUDA-capable device|no CUDA GPUs are available|torch sees no GPU"
    "|ncclRemoteError|ncclUnhandledCudaError|remote process exited|(CUBLAS|CUDNN)_STATUS_EXECUTION_FAILED",
    re.IGNORECASE,
)
"""What errors say after which every later use of the GPU in the same process fails, or that leave no GPU to use."""


def _is_of_broken_gpu(error: BaseException | None) -> bool:
    """Whether an error, or one that it came of, leaves this process without a GPU that works."""
    while error is not None:
        known = isinstance(error, RuntimeError | OSError)  # torch's are, torch.AcceleratorError among them
        if known and not _is_out_of_memory(error) and _BROKEN.search(_reason(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def _gpu_answers() -> bool:
    """Whether this process's GPU can still be used after a trial has failed on it."""
    try:
        torch.cuda.synchronize()
    except Exception:
        return False
    return True


def _node() -> str:
    """Id of the node that this process is on."""
    return str(ray.get_runtime_context().get_node_id()) if ray.is_initialized() else ""


def _note_broken(assignment: Assignment, reason: str) -> None:
    """Leave word of a broken GPU in the trial's directory, for the driver."""
    storage, folder = assignment.place
    told = {"node": _node(), "host": socket.gethostname(), "reason": reason.splitlines()[0]}
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / BROKEN_GPU, json.dumps(told))
    with contextlib.suppress(OSError):
        storage.send(folder / BROKEN_GPU)


def _is_of_storage(error: BaseException) -> bool:
    """Whether an error says that a disk is full, read-only or gone, and nothing of the trial itself."""
    return isinstance(error, OSError) and error.errno in DISK_ERRORS


# --- soft labels of other nodes ----------------------------------------------------------------------------------


def shelf_name(experiment: Path) -> str:
    """Name, on every node and within its driver's job, of the actor that holds an experiment's soft labels."""
    return f"tfkd-soft-labels:{experiment.name}"


class Shelf:
    """Actor with the views that a node has filled, for the other nodes, in Ray's object store.

    The driver owns it, so a view outlives the trial that filled it. The oldest go when there are `limit` bytes.
    """

    def __init__(self, limit: int) -> None:
        self._limit, self._views = limit, dict[str, tuple[Any, int]]()

    def fetch(self, name: str) -> list[Any]:
        """A reference to a view's file, or nothing."""
        return [self._views[name][0]] if name in self._views else []

    def offer(self, name: str, content: bytes) -> None:
        """Keep a view's file, unless it alone is above the limit."""
        if len(content) > self._limit:
            return
        while self._views and sum(size for _, size in self._views.values()) + len(content) > self._limit:
            del self._views[next(iter(self._views))]
        self._views[name] = (ray.put(content), len(content))


class _Elsewhere:
    """The shelf of an experiment from a trial's side; where there is none, nobody else has anything."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._shelf: Any = None

    def fetch(self, name: str) -> bytes | None:
        with contextlib.suppress(ValueError, ray.exceptions.RayError):
            self._shelf = self._shelf or ray.get_actor(self._name)
            refs = ray.get(self._shelf.fetch.remote(name))
            return ray.get(refs[0]) if refs else None
        return None

    def offer(self, name: str, content: bytes) -> None:
        if self._shelf is not None:
            with contextlib.suppress(ray.exceptions.RayError):
                ray.get(self._shelf.offer.remote(name, content))


# --- several workers -------------------------------------------------------------------------------------------


class Group:
    """A resident group of Ray Train workers, from the side of the trial that uses it.

    Args:
        config: says how many workers, and on what.
        folder: where Ray Train may keep its own files while the group lives; all nodes see it.
        say: called with what the workers have to say beside their metrics.
    """

    def __init__(self, config: TrainConfig, folder: Path, say: Callable[[str], None] | None = None) -> None:
        self._config, self._folder, self._say = config, folder, say or _unheard
        self._runs = 0
        self._desk: Any = None

    def epochs(self, run: dict[str, Any], assignment: Assignment) -> Iterator[Metrics]:
        """The epochs of one trial on the group, which is started, or started again, if need be."""
        if self._desk is None or not self._alive():
            self._start(assignment.avoid)
        self._runs += 1
        number, done = self._runs, False
        self._tell(("run", number, run, assignment))
        try:
            while not done:
                kind, value = self._next(number)
                if kind == "failed":
                    done = True
                    raise TrialFailed(*value)
                if kind == "note":
                    self._say(value)
                    continue
                done = value["epoch"] == assignment.epochs
                yield value
                if not done:
                    self._tell(("next",))
        except GeneratorExit:
            if not done:
                self._tell(("save",))
                self._wait_until_saved(number)
            raise
        except Stopped:
            if not done:
                self._tell(("stop",))
            raise

    def close(self) -> None:
        """Let the workers leave."""
        if self._desk is not None:
            with contextlib.suppress(ray.exceptions.RayError, GroupLost):
                self._tell(("leave",))
                ray.get(self._desk.ended.remote(STOP_TIMEOUT_S), timeout=STOP_TIMEOUT_S + 5)
            ray.kill(self._desk)
            self._desk = None

    def _start(self, avoid: Sequence[str]) -> None:
        if self._desk is not None:
            ray.kill(self._desk)
        # Ray's cleaner of placement groups inherits this; without it, it gives up where two clusters share a host
        env = {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
        env |= {k: v for k, v in os.environ.items() if k.startswith("RAY_TRAIN_")}
        env.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")  # how soon a lost worker is noticed
        env.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "1800")  # a node may have to be started first
        desk = ray.remote(_Desk).options(num_cpus=0, max_concurrency=16, runtime_env={"env_vars": env})
        self._desk = desk.remote(self._config.model_dump(mode="json"), str(self._folder), own_code.here(), avoid)

    def _alive(self) -> bool:
        try:
            return ray.get(self._desk.trouble.remote()) is None
        except ray.exceptions.RayError:
            return False

    def _tell(self, message: tuple[Any, ...]) -> None:
        try:
            ray.get(self._desk.put_command.remote(message))
        except ray.exceptions.RayError as error:
            raise GroupLost(f"the group's desk is gone: {_reason(error)}") from None

    def _next(self, number: int) -> tuple[str, Any]:
        """What the workers say next about run `number`; GroupLost if there is no group left to say anything."""
        while True:
            try:
                answer, trouble = ray.get(self._desk.get_result.remote(1.0))
            except ray.exceptions.RayError as error:
                raise GroupLost(f"the group's desk is gone: {_reason(error)}") from None
            if answer is not None and answer[0] == number:
                return answer[1], answer[2]
            if answer is None and trouble is not None:
                raise GroupLost(f"the group of {self._config.workers} workers is gone: {trouble}")

    def _wait_until_saved(self, number: int) -> None:
        until = time.monotonic() + STOP_TIMEOUT_S
        with contextlib.suppress(GroupLost):
            while time.monotonic() < until and self._next(number)[0] != "saved":
                pass


class _Desk:
    """Actor between a trial and its workers: owns their TorchTrainer, and passes messages both ways.

    The trial owns it, so it ends with the trial's process, however that ends; controller and workers end with it.
    """

    def __init__(self, config: dict[str, Any], storage: str, home: own_code.Place, avoid: Sequence[str]) -> None:
        own_code.enter(home)
        self._home, self._avoid = home, avoid
        self._commands: queue.Queue[tuple[Any, ...]] = queue.Queue()
        self._results: queue.Queue[tuple[int, str, Any]] = queue.Queue()
        self._trouble: str | None = None
        self._starts: set[str] = set()
        self._desk = ray.get_runtime_context().current_actor
        self._thread = threading.Thread(target=self._fit, args=(validated(TrainConfig, config), storage), daemon=True)
        self._thread.start()

    def _fit(self, config: TrainConfig, storage: str) -> None:
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer

        name = f"group-{uuid.uuid4().hex[:12]}"
        try:
            TorchTrainer(
                _worker,
                train_loop_config={"desk": self._desk, "notice": _Notice(), "home": self._home},
                torch_config=TorchConfig(
                    backend="nccl" if config.gpus_per_worker else "gloo", timeout_s=COLLECTIVE_TIMEOUT_S
                ),
                scaling_config=ScalingConfig(
                    num_workers=config.workers,
                    use_gpu=config.gpus_per_worker > 0,
                    resources_per_worker=config.worker_resources,
                    placement_strategy=config.placement.upper(),
                    label_selector=label_selectors(self._avoid, 1).get("bundle_label_selector", [None])[0],
                ),
                run_config=RunConfig(
                    name=name,
                    storage_path=storage,
                    # Ray would start the workers of a preempted node again, for ever; the trial goes on elsewhere
                    failure_config=FailureConfig(max_failures=0, max_preemption_failures=0, controller_failure_limit=2),
                ),
            ).fit()
            self._trouble = "it has ended"
        except BaseException as error:  # told to the trial, which asks for it
            self._trouble = _reason(error).splitlines()[0]
        finally:  # Ray Train's own folder: nothing of ours is in it
            shutil.rmtree(Path(storage) / name, ignore_errors=True)
            with contextlib.suppress(OSError):
                Path(storage).rmdir()

    def put_command(self, message: tuple[Any, ...]) -> None:
        self._commands.put(message)

    def get_command(self, timeout_s: float) -> tuple[Any, ...] | None:
        try:
            return self._commands.get(timeout=timeout_s)
        except queue.Empty:
            return None

    def put_result(self, number: int, kind: str, value: Any) -> None:
        self._results.put((number, kind, value))

    def started(self, start: str) -> None:
        """The workers are there. A second time, Ray has started others: those do not know of the trial that runs."""
        self._starts.add(start)
        if len(self._starts) > 1:
            self._trouble = self._trouble or "its workers were lost, and others started in their place"

    def give_up(self, reason: str, last: tuple[int, str, Any] | None = None) -> None:
        """The group ends, and no trial begins on it; `last` is a result of the trial that ran."""
        self._trouble = self._trouble or reason
        if last is not None:
            self._results.put(last)

    def get_result(self, timeout_s: float) -> tuple[tuple[int, str, Any] | None, str | None]:
        """(a result or None, what is wrong with the group or None)."""
        trouble = self._trouble  # first: results that came before it are still given out
        try:
            return self._results.get(timeout=timeout_s), trouble
        except queue.Empty:
            return None, trouble

    def trouble(self) -> str | None:
        return self._trouble

    def ended(self, timeout_s: float) -> bool:
        self._thread.join(timeout_s)
        return not self._thread.is_alive()


class _Notice:
    """Whether SIGTERM came to a worker, as to all processes of a node that is taken away.

    Ray unpickles what a worker is given in the process's main thread, the only one that may say what a signal does; the
    worker itself runs in another. In the middle of a trial it is left to that trial to save and go.
    """

    def __init__(self) -> None:
        self.came = self.training = False

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._leave)

    def _leave(self, number: int, frame: Any) -> None:
        self.came = True
        if not self.training:
            os._exit(1)

    def came_to_any(self, control: dist.ProcessGroup) -> bool:
        """Asked by all workers together."""
        came = torch.tensor(int(self.came))
        dist.all_reduce(came, dist.ReduceOp.MAX, group=control)
        return bool(came)


def _worker(given: dict[str, Any]) -> None:
    """What every worker of a group runs: one trial after the other, in step with the other workers.

    The first worker asks the desk for commands and passes them on. All hear what comes after an epoch by the same
    broadcast, so no worker is ever left waiting in a collective operation that the others skipped. A group outlives a
    failed trial only where no worker has a collective operation open: where all failed before the first one, or between
    epochs, or by a loss that is the same number on all.
    """
    seal_test_split()
    own_code.enter(given["home"])
    desk, notice, first = given["desk"], given["notice"], dist.get_rank() == 0
    control = dist.new_group(backend="gloo", timeout=COMMAND_TIMEOUT)  # also where gradients go by nccl
    assert isinstance(control, dist.ProcessGroup)
    if first:
        ray.get(desk.started.remote(uuid.uuid4().hex))

    def command() -> tuple[Any, ...]:
        message: list[Any] = [None]
        while first and message[0] is None:
            message[0] = ray.get(desk.get_command.remote(5.0))
        dist.broadcast_object_list(message, src=0, group=control)
        return tuple(message[0])

    def meet() -> None:
        dist.all_reduce(torch.zeros(1), group=control)

    def tell(number: int, kind: str, value: Any) -> None:
        ray.get(desk.put_result.remote(number, kind, value))

    while True:
        what, *rest = command()
        if what == "leave":
            return
        if what != "run":
            continue  # meant for a trial that has failed meanwhile
        number, run, assignment = rest
        notice.training, in_step = True, True
        try:
            epochs = _prepared(run, assignment, functools.partial(tell, number, "note") if first else _unheard, meet)
            while True:
                in_step = False
                metrics = next(epochs, None)
                in_step = True
                if metrics is None:
                    break
                check_metrics(metrics, assignment)
                if first:
                    tell(number, "epoch", metrics)
                if metrics["epoch"] == assignment.epochs:
                    continue
                if notice.came_to_any(control):
                    epochs.close()  # type: ignore[attr-defined]
                    _all_here(control)  # when one has gone, Ray ends the others
                    os._exit(1)  # the trial goes on in another group
                what, *_ = command()
                if what == "save":
                    epochs.close()  # type: ignore[attr-defined]
                    if first:
                        tell(number, "saved", None)
                elif what == "stop":
                    _stop(epochs)
        except (Exception, SystemExit) as error:
            own = not (_is_of_storage(error) or _is_of_communication(error) or _is_of_broken_gpu(error))
            if _is_of_broken_gpu(error):
                _note_broken(assignment, _reason(error))
            keeps, mine = _agreed(control, in_step or isinstance(error, Diverged), own)
            told = (number, "failed", (_reason(error), traceback.format_exc()))
            if keeps:
                if mine:
                    tell(*told)
            else:  # the others cannot go on without this one, or nobody knows what they still wait for
                why = "a worker failed" if own else _reason(error)
                ray.get(desk.give_up.remote(why, told if mine else None))
                raise
        notice.training = False
        if notice.came:
            return


def _unheard(text: str) -> None:
    """Nobody needs to know, or another worker says it."""


def _all_here(control: dist.ProcessGroup) -> bool:
    """Whether every worker comes here, so that all are in step again."""
    try:
        dist.monitored_barrier(group=control, timeout=timedelta(seconds=BARRIER_TIMEOUT_S))
    except RuntimeError:
        return False
    return True


def _agreed(control: dist.ProcessGroup, in_step: bool, own: bool) -> tuple[bool, bool]:
    """After a failure: whether the group can take the next trial, and whether this worker is to tell the reason.

    Args:
        in_step: this worker has no collective operation open.
        own: the failure is the trial's own.
    """
    if not _all_here(control):
        return False, own
    owners = torch.zeros(dist.get_world_size(), dtype=torch.int64)
    owners[dist.get_rank()] = own
    out_of_step = torch.tensor(int(not (in_step and own)))
    dist.all_reduce(owners, group=control)
    dist.all_reduce(out_of_step, group=control)
    return not out_of_step, own and int(owners.argmax()) == dist.get_rank()


def _is_of_communication(error: BaseException) -> bool:
    """Whether an error says that another worker is gone, and nothing of the trial itself."""
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower() or "nccl" in str(error).lower()
