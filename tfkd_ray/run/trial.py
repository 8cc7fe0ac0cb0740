"""One trial: in this process, or on a resident group of Ray Train workers.

Both run `loop.train_in`, so the files and numbers are the same. `StudentTrial` is a reused Tune
actor: a trial of one worker trains inside it; for trials of several workers it owns a
`WorkerGroup`, one TorchTrainer whose workers run one trial after another (starting a TorchTrainer
for each trial would take 14 to 22 s).
"""

import os
import signal
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import torch
from ray import tune

from tfkd_ray.learn.config import TrainConfig
from tfkd_ray.learn.dataset import seal_test_split
from tfkd_ray.run.connect import DRIVER, OUT_OF_MEMORY, enlarged, shunning
from tfkd_ray.run.epochs import (
    Metrics,
    check_metrics,
    epochs_here,
    is_of_broken_gpu,
    is_of_storage,
    is_out_of_memory,
    note_broken,
    reason_of,
    stop_epochs,
    this_node,
)
from tfkd_ray.run.group import GroupLost, TrialFailed, WorkerGroup
from tfkd_ray.settings import own_code
from tfkd_ray.settings.files import write_text
from tfkd_ray.settings.schema import validated
from tfkd_ray.settings.yaml import Tree
from tfkd_ray.store.assignment import Assignment, without_assignment


class BrokenGpu(RuntimeError):
    """A GPU or this process's CUDA context is broken, not because of the trial's configuration."""


def resources_of(config: TrainConfig) -> tune.PlacementGroupFactory:
    """Return the resources of a trial's own process; Ray Train reserves its workers'."""
    if config.workers > 1:
        return tune.PlacementGroupFactory([{DRIVER: 0.01}])
    return shunning(enlarged(tune.PlacementGroupFactory([config.worker_resources])))


class StudentTrial(tune.Trainable):  # type: ignore[misc]
    """A Tune trainable for proposals of `OptunaSearcher`: one step is one epoch, then `done`.

    A message to the driver may bring several epochs (`train_buffered`). A trial that continues from
    a checkpoint reports all epochs before it again, so those of a lost message are not lost.

    If the trial itself fails, its result has `failed` (the reason), and the actor is reused. Only a
    lost process and a disk that cannot be written to are errors for Tune, which restarts the trial
    from its last checkpoint. A result's `note` is a sentence for the user.
    """

    def setup(self, config: Tree) -> None:
        seal_test_split()
        self._group: WorkerGroup | None = None
        self._epochs: Iterator[Metrics] = iter(())
        self._notes: list[str] = []
        self._raised: Exception | None = None
        self._leaving = False
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._leave)
        self._begin(config)

    def reset_config(self, new_config: Tree) -> bool:
        with suppress(
            Exception
        ):  # an error while closing the previous trial must not fail this one
            stop_epochs(self._epochs)
        self._epochs = iter(())  # the last that holds the previous network and its data
        if 0 < _gpu_of(self) < 1:  # others on this GPU may need what torch keeps of them
            torch.cuda.empty_cache()
        self._begin(new_config)
        return True

    def save(self, checkpoint_dir: str | None = None) -> Any:
        """Save the trial for a pause, in its own folder; Ray gets no checkpoint of it.

        Ray's would be files of the node on which it paused, and it may go on elsewhere.
        """
        if hasattr(self._epochs, "close"):
            self._epochs.close()
        self._begin(self.config)  # where it goes on, if it is not paused after all
        return SimpleNamespace(checkpoint=None, metrics={})

    def _leave(self, number: int, frame: Any) -> None:
        """On SIGTERM (the node is preempted), save and exit, now or after the current epoch."""
        self._leaving = True
        if not getattr(self._epochs, "gi_running", False):
            self._save_and_go()

    def _save_and_go(self) -> None:
        try:
            if hasattr(self._epochs, "close"):
                self._epochs.close()
        finally:
            os._exit(1)  # the trial continues in another process

    def _begin(self, config: Tree) -> None:
        self._assignment, self._raised, self._is_silent = Assignment.of(config), None, True
        if self._assignment.home is not None:  # each time: Ray has changed to its own folder
            own_code.enter(self._assignment.home)
        run = without_assignment(config)
        workers = run["workers"]
        if workers == 1:
            self._epochs = epochs_here(run, self._assignment, self._notes.append)
        else:
            folder = self._assignment.folder.parent.parent / "groups"
            self._group = self._group or WorkerGroup(
                validated(TrainConfig, run), folder, self._notes.append
            )
            self._epochs = self._group.epochs(run, self._assignment)

    def train_buffered(self, *limits: float) -> list[Tree]:
        """Return the results of epochs until some seconds have passed, or a decision is due.

        A decision is due where the search judges the trial, and at its end. The first epoch in this
        process is told at once: it shows that the trial runs.

        Args:
            limits: seconds and number of results. Ray 2.60 passes them in either order, so the
                number that `tune` sets is larger than the seconds.
        """
        if self._raised is not None:
            raise self._raised
        results: list[Tree] = []
        until = time.monotonic() + min(limits)
        while True:
            try:
                results.append(self.train())
            except Exception as error:  # of the process or its disk: the epochs before are told
                if not results:
                    raise
                self._raised = error
                return results
            last = results[-1]
            is_due = last["done"] or last.get("epoch") in self._assignment.judged
            is_first, self._is_silent = self._is_silent, False
            if is_first or is_due or time.monotonic() >= until:
                return results

    def step(self) -> Tree:
        try:
            metrics = next(self._epochs)
            check_metrics(metrics, self._assignment)
        except GroupLost:
            raise
        except (Exception, SystemExit) as error:
            if is_of_storage(error):
                raise
            return self._failed(error)
        if self._leaving:
            self._save_and_go()
        epoch = int(metrics["epoch"])
        note = {"note": "; ".join(self._notes)} if self._notes else {}
        self._notes.clear()
        return {
            **metrics,
            **note,
            "epoch": epoch,
            "done": epoch == self._assignment.epochs,
            "node": this_node(),
        }

    def _failed(self, error: BaseException) -> Tree:
        if isinstance(error, TrialFailed):
            reason, trace = str(error), error.trace
        else:
            reason, trace = reason_of(error), "".join(traceback.format_exception(error))
        storage, folder = self._assignment.place
        write_text(folder / "error.txt", trace)
        with suppress(OSError):  # the reason is reported anyway
            storage.send(folder / "error.txt")
        share = _gpu_of(self)
        if is_out_of_memory(error) and 0 < share < 1:
            write_text(folder / OUT_OF_MEMORY, str(share))
            storage.send(folder / OUT_OF_MEMORY)
            raise error  # ends this process; the trial restarts with a larger share
        if is_of_broken_gpu(error) or (share and not _gpu_answers()):
            note_broken(self._assignment, reason)
            raise BrokenGpu(reason) from None  # ends this process; the trial continues elsewhere
        return {"failed": reason, "done": True}

    def cleanup(self) -> None:
        if hasattr(self._epochs, "close"):
            with suppress(GroupLost):
                self._epochs.close()  # saves if necessary
        if self._group is not None:
            self._group.close()


def _gpu_of(trial: StudentTrial) -> float:
    """Return the share of a GPU that Ray has lent to a trial's process."""
    resources = trial.trial_resources
    return float(resources.required_resources.get("GPU", 0)) if resources else 0.0


def _gpu_answers() -> bool:
    """Return True if this process's GPU still works after a trial has failed on it."""
    try:
        torch.cuda.synchronize()
    except Exception:
        return False
    return True
