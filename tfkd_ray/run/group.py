"""Resident groups of Ray Train workers, which run one trial after another."""

import functools
import os
import queue
import shutil
import signal
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
import torch
import torch.distributed as dist

from tfkd_ray.learn.config import TeacherRun, TrainConfig
from tfkd_ray.learn.dataset import seal_test_split
from tfkd_ray.learn.loop import Diverged
from tfkd_ray.learn.teachers import fetch_teacher, teacher_folder
from tfkd_ray.run.connect import label_selectors, on_this_node
from tfkd_ray.run.epochs import (
    COLLECTIVE_TIMEOUT_S,
    COMMAND_TIMEOUT,
    Metrics,
    Stopped,
    agreed,
    all_here,
    check_metrics,
    is_of_broken_gpu,
    is_of_storage,
    note_broken,
    prepared_epochs,
    reason_of,
    stop_epochs,
    unheard,
)
from tfkd_ray.settings import own_code
from tfkd_ray.settings.yaml import Tree
from tfkd_ray.store.assignment import Assignment
from tfkd_ray.store.storage import Storage

STOP_TIMEOUT_S = 10.0
"""Maximum time for a group to save and stop when the sweep ends."""


class GroupLost(RuntimeError):
    """A group's workers died, not because of the trial's configuration."""


class TrialFailed(RuntimeError):
    """The trial itself failed, as reported by a worker."""

    def __init__(self, reason: str, trace: str) -> None:
        super().__init__(reason)
        self.trace = trace


# --- several workers ------------------------------------------------------------------------------


class WorkerGroup:
    """A resident group of Ray Train workers, as seen by the trial that uses it.

    Args:
        config: sets the number of workers and their resources.
        folder: for Ray Train's own files while the group lives; visible to all nodes.
        say: called with the workers' notes.
    """

    def __init__(
        self, config: TrainConfig, folder: Path, say: Callable[[str], None] | None = None
    ) -> None:
        self._config, self._folder, self._say = config, folder, say or unheard
        self._runs = 0
        self._desk: Any = None

    def epochs(self, run: Tree | TeacherRun, assignment: Assignment) -> Iterator[Metrics]:
        """Yield the epochs of a trial, or of a teacher, on the group; (re)start it if necessary."""
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
                if kind == "ended":  # a teacher that stops early
                    done = True
                    return
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
        """End the workers."""
        if self._desk is not None:
            with suppress(ray.exceptions.RayError, GroupLost):
                self._tell(("leave",))
                ray.get(self._desk.ended.remote(STOP_TIMEOUT_S), timeout=STOP_TIMEOUT_S + 5)
            ray.kill(self._desk)
            self._desk = None

    def _start(self, avoid: Sequence[str]) -> None:
        if self._desk is not None:
            ray.kill(self._desk)
        # Ray's placement-group cleaner inherits this; without it, two clusters on a host break it
        env = {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
        env |= {k: v for k, v in os.environ.items() if k.startswith("RAY_TRAIN_")}
        env.setdefault(
            "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5"
        )  # how soon a lost worker is noticed
        env.setdefault(
            "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "1800"
        )  # a node may have to be started first
        desk = ray.remote(_Desk).options(
            num_cpus=0,
            max_concurrency=16,
            runtime_env={"env_vars": env},
            scheduling_strategy=on_this_node(),
        )
        self._desk = desk.remote(self._config, str(self._folder), own_code.here(), avoid)

    def _alive(self) -> bool:
        try:
            return ray.get(self._desk.trouble.remote()) is None
        except ray.exceptions.RayError:
            return False

    def _tell(self, message: tuple[Any, ...]) -> None:
        try:
            ray.get(self._desk.put_command.remote(message))
        except ray.exceptions.RayError as error:
            raise GroupLost(f"the group's desk is gone: {reason_of(error)}") from None

    def _next(self, number: int) -> tuple[str, Any]:
        """Return the workers' next message about run `number`; raise GroupLost if they are gone."""
        while True:
            try:
                answer, trouble = ray.get(self._desk.get_result.remote(1.0))
            except ray.exceptions.RayError as error:
                raise GroupLost(f"the group's desk is gone: {reason_of(error)}") from None
            if answer is not None and answer[0] == number:
                return answer[1], answer[2]
            if answer is None and trouble is not None:
                raise GroupLost(f"the group of {self._config.workers} workers is gone: {trouble}")

    def _wait_until_saved(self, number: int) -> None:
        until = time.monotonic() + STOP_TIMEOUT_S
        with suppress(GroupLost):
            while time.monotonic() < until and self._next(number)[0] != "saved":
                pass


def teacher_epochs(run: TeacherRun, storage: Storage) -> Iterator[Metrics]:
    """Yield the epochs of a teacher that a group of its own trains in the teacher's folder.

    Raises:
        GroupLost: its workers died.
        TrialFailed: it cannot be trained.
    """
    folder = teacher_folder(run, storage.folder)
    place = folder.relative_to(storage.folder)
    group = WorkerGroup(run, folder / "group")
    try:
        about = Assignment(folder.name, run.epochs, directory=place, storage=storage)
        yield from group.epochs(run, about)
    finally:
        group.close()
    fetch_teacher(run, storage)


class _Desk:
    """Actor between a trial and its workers: owns their TorchTrainer and passes messages both ways.

    The trial owns it, so it ends with the trial's process, and controller and workers with it.
    """

    def __init__(
        self, config: TrainConfig, storage: str, home: own_code.Place, avoid: Sequence[str]
    ) -> None:
        own_code.enter(home)
        self._home, self._avoid = home, avoid
        self._commands: queue.Queue[tuple[Any, ...]] = queue.Queue()
        self._results: queue.Queue[tuple[int, str, Any]] = queue.Queue()
        self._trouble: str | None = None
        self._starts: set[str] = set()
        self._desk = ray.get_runtime_context().current_actor
        self._thread = threading.Thread(target=self._fit, args=(config, storage), daemon=True)
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
                    backend="nccl" if config.gpus_per_worker else "gloo",
                    timeout_s=COLLECTIVE_TIMEOUT_S,
                ),
                scaling_config=ScalingConfig(
                    num_workers=config.workers,
                    use_gpu=config.gpus_per_worker > 0,
                    resources_per_worker=config.worker_resources,
                    placement_strategy=config.placement.upper(),
                    label_selector=label_selectors(self._avoid, 1).get(
                        "bundle_label_selector", [None]
                    )[0],
                ),
                run_config=RunConfig(
                    name=name,
                    storage_path=storage,
                    # Ray would restart a preempted node's workers; the trial continues elsewhere
                    failure_config=FailureConfig(
                        max_failures=0, max_preemption_failures=0, controller_failure_limit=2
                    ),
                ),
            ).fit()
            self._trouble = "it has ended"
        except BaseException as error:  # reported to the trial when it asks
            self._trouble = reason_of(error).splitlines()[0]
        finally:  # Ray Train's own folder, with none of our files
            shutil.rmtree(Path(storage) / name, ignore_errors=True)
            with suppress(OSError):
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
        """Register the workers' start; after a second one, by Ray, the running trial is lost."""
        self._starts.add(start)
        if len(self._starts) > 1:
            self._trouble = (
                self._trouble or "its workers were lost, and others started in their place"
            )

    def give_up(self, reason: str, last: tuple[int, str, Any] | None = None) -> None:
        """End the group, so that no trial starts on it; `last` is a result of the running trial."""
        self._trouble = self._trouble or reason
        if last is not None:
            self._results.put(last)

    def get_result(self, timeout_s: float) -> tuple[tuple[int, str, Any] | None, str | None]:
        """Return (a result or None, the group's failure or None)."""
        trouble = self._trouble  # read first: earlier results are still returned
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
    """Flag that SIGTERM reached a worker: its node is being preempted.

    Ray unpickles a worker's arguments in the main thread, the only one that may set a signal
    handler; the worker itself runs in another. During a trial, the trial saves and exits.
    """

    def __init__(self) -> None:
        self.came = self.training = False

    def __setstate__(self, state: Tree) -> None:
        self.__dict__.update(state)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._leave)

    def _leave(self, number: int, frame: Any) -> None:
        self.came = True
        if not self.training:
            os._exit(1)

    def came_to_any(self, control: dist.ProcessGroup) -> bool:
        """Return True if any worker got the signal; all workers call this together."""
        came = torch.tensor(int(self.came))
        dist.all_reduce(came, dist.ReduceOp.MAX, group=control)
        return bool(came)


def _worker(given: Tree) -> None:
    """Run trials one after another, in step with the group's other workers."""
    seal_test_split()
    own_code.enter(given["home"])
    worker, notice = _GroupWorker(given["desk"], given["notice"]), given["notice"]
    while True:
        what, *rest = worker.command()
        if what == "leave":
            return
        if what != "run":
            continue  # for a trial that has already failed
        worker.run_trial(*rest)
        if notice.came:
            return


class _GroupWorker:
    """One of a group's workers.

    The first worker fetches commands from the desk and broadcasts them, also what follows an epoch,
    so no worker waits in a collective operation that others skipped. A group survives a failed
    trial only if no worker has a collective operation open: if all failed before the first one,
    between epochs, or by a loss that is the same on all.
    """

    def __init__(self, desk: Any, notice: _Notice) -> None:
        self._desk, self._notice, self._first = desk, notice, dist.get_rank() == 0
        # gloo also if gradients use nccl
        control = dist.new_group(backend="gloo", timeout=COMMAND_TIMEOUT)
        assert isinstance(control, dist.ProcessGroup)
        self._control = control
        self._in_step = True  # no collective operation of a trial is open
        if self._first:
            ray.get(desk.started.remote(uuid.uuid4().hex))

    def command(self) -> tuple[Any, ...]:
        """Return the next command, the same on all workers."""
        message: list[Any] = [None]
        while self._first and message[0] is None:
            message[0] = ray.get(self._desk.get_command.remote(5.0))
        dist.broadcast_object_list(message, src=0, group=self._control)
        return tuple(message[0])

    def run_trial(self, number: int, run: Tree | TeacherRun, assignment: Assignment) -> None:
        """Run a trial until it ends; raise if the group cannot run another one."""
        self._notice.training = self._in_step = True
        say = functools.partial(self._tell, number, "note") if self._first else unheard
        epoch = 0.0
        try:
            epochs = prepared_epochs(run, assignment, say, self._meet)
            while (metrics := self._next(epochs)) is not None:
                check_metrics(metrics, assignment)
                epoch = metrics["epoch"]
                if self._first:
                    self._tell(number, "epoch", metrics)
                if epoch != assignment.epochs:
                    self._after_epoch(number, epochs)
            if self._first and epoch != assignment.epochs:
                self._tell(number, "ended", None)
        except (Exception, SystemExit) as error:
            if not self._goes_on_after(error, number, assignment):
                raise
        self._notice.training = False

    def _next(self, epochs: Iterator[Metrics]) -> Metrics | None:
        self._in_step = False
        metrics = next(epochs, None)
        self._in_step = True
        return metrics

    def _after_epoch(self, number: int, epochs: Iterator[Metrics]) -> None:
        """Do what the trial asks for; if a node is being preempted, save and exit."""
        if self._notice.came_to_any(self._control):
            epochs.close()  # type: ignore[attr-defined]
            all_here(self._control)  # when one exits, Ray ends the others
            os._exit(1)  # the trial continues in another group
        what, *_ = self.command()
        if what == "save":
            epochs.close()  # type: ignore[attr-defined]
            if self._first:
                self._tell(number, "saved", None)
        elif what == "stop":
            stop_epochs(epochs)

    def _goes_on_after(self, error: BaseException, number: int, assignment: Assignment) -> bool:
        """Report a trial's failure; return whether the group can run the next trial."""
        broken = is_of_broken_gpu(error)
        own = not (is_of_storage(error) or _is_of_communication(error) or broken)
        if broken:
            note_broken(assignment, reason_of(error))
        in_step = self._in_step or isinstance(error, Diverged)
        goes_on, mine = agreed(self._control, in_step, own)
        told = (reason_of(error), traceback.format_exc())
        if goes_on:
            if mine:
                self._tell(number, "failed", told)
        else:  # the others need this one, or may wait in a collective operation
            why = "a worker failed" if own else reason_of(error)
            last = (number, "failed", told) if mine else None
            ray.get(self._desk.give_up.remote(why, last))
        return goes_on

    def _meet(self) -> None:
        dist.all_reduce(torch.zeros(1), group=self._control)

    def _tell(self, number: int, kind: str, value: Any) -> None:
        ray.get(self._desk.put_result.remote(number, kind, value))


def _is_of_communication(error: BaseException) -> bool:
    """Return True if an error means that another worker is gone: not the trial's fault."""
    return (
        isinstance(error, dist.DistError)
        or "gloo" in str(error).lower()
        or "nccl" in str(error).lower()
    )
