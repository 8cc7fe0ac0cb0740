"""The one layer between Ray Tune's callbacks and the parts of a sweep that follow its epochs.

Tune calls its callbacks for every result, and a trial reports some epochs again: when it was lost,
resumed or restored, it continues from its last checkpoint. `Announcer` is the one Tune callback
that decides which epochs are new. It passes each to its `Listener`s once, in the order of its list,
which `callbacks.in_order` defines.

To react to a sweep in a new way, write a `Listener` in callbacks.py and add it to `in_order`.
"""

import math
from collections.abc import Sequence
from typing import Any

from ray import tune

from tfkd_ray.settings.yaml import Tree, Values
from tfkd_ray.store.assignment import Assignment
from tfkd_ray.store.experiment import as_number, read_metrics


class Listener:
    """Base class of listeners to a sweep. Its methods do nothing; override those that you need.

    A `trial` is Ray Tune's; `Assignment.of(trial.config)` returns its assignment.
    """

    def on_begin(self) -> None:
        """Called before the first trial."""

    def on_start(self, trial: Any, last: Values) -> None:
        """Called when a process takes a trial, for the first time or again.

        Args:
            last: metrics of the last epoch reported, in this session or an earlier one; empty if
                none.
        """

    def on_epoch(self, trial: Any, epoch: int, metrics: Values) -> None:
        """Called for each new epoch of a trial, once."""

    def on_result(self, trial: Any, result: Tree) -> None:
        """Called for every result, after `on_epoch`: also for repeated epochs and failures."""

    def on_lost(self, trial: Any) -> None:
        """Called when a trial's process was lost and the trial will be retried."""

    def on_failed(self, trial: Any) -> None:
        """Called when a trial has ended because its process was lost, or raised an error."""

    def on_pause(self, trial: Any) -> None:
        """Called when a trial has saved its state and pauses; `on_start` follows if it goes on."""

    def on_end(self, trial: Any) -> None:
        """Called when a trial has ended, with its last result in `trial.last_result`."""

    def on_step(self) -> None:
        """Called after every step of Tune's loop, several times a second."""

    def on_close(self, trials: Sequence[Any]) -> None:
        """Called when the sweep has ended, however it did."""


class Epochs:
    """The epochs of one trial: finds a result's epoch, and whether it is new."""

    def __init__(self, last: Values | None = None) -> None:
        self.last: Values = last or {}
        """Begin after the last reported epoch, given by its metrics."""
        self._number = int(self.last["epoch"]) if self.last else None
        self._counts = bool(self.last)

    def of(self, result: Values) -> int | None:
        """Return the result's epoch; if the trial reports none, Ray's count of its results."""
        epoch = _finite(result.get("epoch"))
        self._counts |= epoch is not None
        if not self._counts:
            epoch = _finite(result.get("training_iteration"))
        return None if epoch is None else int(epoch)

    def new(self, result: Values) -> int | None:
        """Return the result's epoch, if it is new; a failure has none."""
        epoch = self.of(result)
        if (
            result.get("failed")
            or epoch is None
            or (self._number is not None and epoch <= self._number)
        ):
            return None
        self._number, self.last = epoch, result
        return epoch


def _finite(value: Any) -> float | None:
    number = as_number(value)
    return number if number is not None and math.isfinite(number) else None


class Announcer(tune.Callback):  # type: ignore[misc]
    """The Tune callback that passes each event to all listeners before the next event."""

    def __init__(self, listeners: Sequence[Listener]) -> None:
        self._listeners = tuple(listeners)
        self._told: dict[str, Epochs] = {}

    @property
    def listeners(self) -> tuple[Listener, ...]:
        """Listeners in the order in which they are called."""
        return self._listeners

    def setup(self, **info: Any) -> None:
        for listener in self.listeners:
            listener.on_begin()

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        last = self._started(trial).last
        for listener in self.listeners:
            listener.on_start(trial, last)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: Tree, **info: Any
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

    def on_trial_save(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Announce a pause: that is all for which Tune saves trials of this package."""
        assignment = Assignment.find(trial.config)
        if assignment is not None and assignment.directory is not None:
            for listener in self.listeners:
                listener.on_pause(trial)

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
        """Find a starting trial's last reported epoch, of this session or in metrics.jsonl.

        A user's own trainable has no such file: its first result shows where it continues.
        """
        assignment = Assignment.find(trial.config)
        if assignment is None or assignment.directory is None:
            self._told[trial.trial_id] = Epochs()
        elif trial.trial_id not in self._told:
            metrics = read_metrics(assignment.folder)
            self._told[trial.trial_id] = Epochs(metrics[-1] if metrics else None)
        return self._told[trial.trial_id]

    def __getstate__(self) -> Tree:
        return {**self.__dict__, "_told": {}}


class OwnCallback(Announcer, Listener):
    """A listener that is a Tune callback by itself, for use with any Tuner."""

    def __init__(self) -> None:
        super().__init__(())

    @property
    def listeners(self) -> tuple[Listener, ...]:
        """Itself alone."""
        return (self,)

    def __setstate__(self, state: Tree) -> None:
        self.__dict__.update({"_told": {}, **state})  # earlier releases saved none
