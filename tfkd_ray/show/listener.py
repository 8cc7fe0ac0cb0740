"""One listener between Ray Tune and what a sweep does with what Tune says.

Tune calls its callbacks for every result, and a trial says some epochs again: after it was lost, resumed or restored it
goes on from its last checkpoint. `Announcer` is the one Tune callback that decides which epochs are new, and tells them
to `Listener`s, each epoch once, in the order of the list that it is given. That order is in `callbacks.in_order`.

To do something more in a sweep: a `Listener` in callbacks.py, and its place in `in_order`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ray import tune

from tfkd_ray.store.assignment import Assignment
from tfkd_ray.store.experiment import as_number, read_metrics


class Listener:
    """Base of what listens to a sweep. Its methods do nothing; override those that matter.

    A `trial` is Ray Tune's; `Assignment.of(trial.config)` says what it was assigned.
    """

    def on_begin(self) -> None:
        """Called before the first trial."""

    def on_start(self, trial: Any, last: Mapping[str, Any]) -> None:
        """Called when a process takes a trial, for the first time or again.

        Args:
            last: metrics of the last epoch that was told, in this session or an earlier one. Empty: there is none.
        """

    def on_epoch(self, trial: Any, epoch: int, metrics: Mapping[str, Any]) -> None:
        """Called for each new epoch of a trial, once."""

    def on_result(self, trial: Any, result: dict[str, Any]) -> None:
        """Called for every result, after `on_epoch`: also for one that says an epoch again, or a failure."""

    def on_lost(self, trial: Any) -> None:
        """Called when a trial's process was lost and the trial will go on."""

    def on_failed(self, trial: Any) -> None:
        """Called when a trial has ended because its process was lost, or raised an error."""

    def on_end(self, trial: Any) -> None:
        """Called when a trial has ended, with its last result in `trial.last_result`."""

    def on_step(self) -> None:
        """Called after every step of Tune's loop, several times a second."""

    def on_close(self, trials: Sequence[Any]) -> None:
        """Called when the sweep has ended, however it did."""


class Epochs:
    """The epochs of one trial: which one a result is of, and whether it is new."""

    def __init__(self, last: Mapping[str, Any] | None = None) -> None:
        self.last: Mapping[str, Any] = last or {}
        """Metrics of the last epoch that was told."""
        self._number = int(self.last["epoch"]) if self.last else None
        self._counts = bool(self.last)

    def of(self, result: Mapping[str, Any]) -> int | None:
        """Return the result's epoch. Of a trial that reports none, that is Ray's own count of its results."""
        epoch = as_number(result.get("epoch"))
        self._counts |= epoch is not None
        if not self._counts:
            epoch = as_number(result.get("training_iteration"))
        return int(epoch) if epoch is not None and math.isfinite(epoch) else None

    def new(self, result: Mapping[str, Any]) -> int | None:
        """Return the result's epoch if it is told for the first time. A failure is of no epoch."""
        epoch = self.of(result)
        if (
            result.get("failed")
            or epoch is None
            or (self._number is not None and epoch <= self._number)
        ):
            return None
        self._number, self.last = epoch, result
        return epoch


class Announcer(tune.Callback):  # type: ignore[misc]
    """The Tune callback that tells listeners what happens, each event to all of them before the next."""

    def __init__(self, listeners: Sequence[Listener]) -> None:
        self._listeners = tuple(listeners)
        self._told: dict[str, Epochs] = {}

    @property
    def listeners(self) -> tuple[Listener, ...]:
        """Who is told, first to last."""
        return self._listeners

    def setup(self, **info: Any) -> None:
        for listener in self.listeners:
            listener.on_begin()

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        last = self._started(trial).last
        for listener in self.listeners:
            listener.on_start(trial, last)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        if trial.trial_id not in self._told:
            self.on_trial_start(iteration, trials, trial)
        epoch = self._told[trial.trial_id].new(result)
        for listener in self.listeners:
            if epoch is not None:
                listener.on_epoch(trial, epoch, result)
            listener.on_result(trial, result)

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        for listener in self.listeners:
            listener.on_lost(trial)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._told.pop(trial.trial_id, None)
        for listener in self.listeners:
            listener.on_failed(trial)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._told.pop(trial.trial_id, None)
        for listener in self.listeners:
            listener.on_end(trial)

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        for listener in self.listeners:
            listener.on_step()

    def on_experiment_end(self, trials: list[Any], **info: Any) -> None:
        for listener in self.listeners:
            listener.on_close(trials)

    def _started(self, trial: Any) -> Epochs:
        """Find out what was told of a trial that starts: in this session, or by its metrics.jsonl.

        A trainable of the user's own has no such file: its first result says where it goes on.
        """
        assignment = Assignment.find(trial.config)
        if assignment is None or assignment.directory is None:
            self._told[trial.trial_id] = Epochs()
        elif trial.trial_id not in self._told:
            metrics = read_metrics(assignment.folder)
            self._told[trial.trial_id] = Epochs(metrics[-1] if metrics else None)
        return self._told[trial.trial_id]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_told": {}}


class OwnCallback(Announcer, Listener):
    """A listener that is a Tune callback by itself, so that it can be given to any Tuner."""

    def __init__(self) -> None:
        super().__init__(())

    @property
    def listeners(self) -> tuple[Listener, ...]:
        """Itself alone."""
        return (self,)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update({"_told": {}, **state})  # earlier releases have saved none
