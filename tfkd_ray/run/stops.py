"""Requests of `tfkd stop` to the driver of a sweep: read from the experiment's storage, and acted on.

A request is a file below stop/ in the experiment, or an object of that name in its bucket, written
by another process, perhaps on another machine (see `Storage.request`). It is removed once the trial
has ended, so a driver that is killed meanwhile acts on it when the sweep is resumed. A request to
stop the whole sweep is dropped by the next resume.
"""

import contextlib
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ray import tune

from tfkd_ray.run.searcher import OptunaSearcher
from tfkd_ray.settings.columns import to_stderr
from tfkd_ray.settings.errors import Say
from tfkd_ray.settings.yaml import Tree, Values
from tfkd_ray.show.listener import Listener
from tfkd_ray.store.assignment import assigned
from tfkd_ray.store.ended import end_record
from tfkd_ray.store.experiment import STOPPED_BY, WHOLE_SWEEP, read_record
from tfkd_ray.store.storage import Experiment


class Stops(Listener, tune.Stopper):  # type: ignore[misc]
    """Ends single trials after their current epoch, or the sweep, as `tfkd stop` asks.

    A trial that is stopped keeps its epochs; its value counts as that of a trial stopped early. The
    sweep ends as by Ctrl-C: trials save their state, and it can be resumed.
    """

    reason: str | None = None
    """Why the sweep ends; None if nobody has asked for it."""

    def __init__(self, experiment: Experiment, on_note: Say | None = None) -> None:
        self._storage, self._name = experiment.storage, experiment.name
        self._note = on_note or to_stderr
        self._asked: set[str] = set()
        self._done: set[str] = set()
        self._names: dict[str, str] = {}
        self._paused: dict[str, int] = {}
        self.searcher: OptunaSearcher | None = None
        """Decides which paused trials go on; `tune` sets it."""
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="stops", daemon=True)

    def _run(self) -> None:
        """Look for requests, and remove those that were met, until the sweep ends."""
        while not self._over.is_set():
            self._look()
            self._over.wait(self._storage.look_s)

    def _look(self) -> None:
        with contextlib.suppress(OSError):  # `Uploads` says that a bucket does not answer
            for name in set(self._done):
                self._storage.withdraw(self._name, name)
                self._done.discard(name)
            self._asked = self._storage.requests(self._name)

    # --- called by Tune

    def __call__(self, trial_id: str, result: Tree) -> bool:
        """Return True for the next result of a trial that is to be stopped, and say why in it."""
        if self._names.get(trial_id) not in self._asked or result.get("done"):
            return False
        result[STOPPED_BY] = f"{BY_COMMAND} after epoch {result.get('epoch', '?')}"
        return True

    def stop_all(self) -> bool:
        """Return True once the whole sweep is to be stopped."""
        if self.reason is None and WHOLE_SWEEP in self._asked:
            self.reason = BY_COMMAND
            self._note("stopping, as tfkd stop asks: trials save their state")
        return self.reason is not None

    # --- called by the listener

    def on_begin(self) -> None:
        self._look()
        self._thread.start()

    def on_start(self, trial: Any, last: Values) -> None:
        self._names[trial.trial_id] = assigned(trial).name
        self._paused.pop(assigned(trial).name, None)

    def on_pause(self, trial: Any) -> None:
        self._paused[assigned(trial).name] = assigned(trial).number

    def on_step(self) -> None:
        """Give up paused trials that are asked for: they have no next result, and end with the sweep."""
        for name in self._asked & set(self._paused):
            number = self._paused[name]
            if self.searcher is not None and number in self.searcher.paused():
                self.searcher.give_up({number})
                del self._paused[name]

    def on_end(self, trial: Any) -> None:
        """Note that a request is met: the trial's files and study say how it ended."""
        name = self._names.pop(trial.trial_id, None)
        if name in self._asked:
            self._done.add(str(name))

    on_failed = on_end

    def on_close(self, trials: Sequence[Any]) -> None:
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()
        if self.reason is not None:
            self._done.add(WHOLE_SWEEP)
        self._look()

    def __getstate__(self) -> Tree:
        kept = {**self.__dict__, "_note": None, "_over": None, "_thread": None}
        return {**kept, "_storage": None, "searcher": None}


BY_COMMAND = "stopped by tfkd stop"


def drop_stop(experiment: Experiment) -> None:
    """Drop a request to stop the whole sweep or comparison: it begins anew."""
    experiment.storage.withdraw(experiment.name, WHOLE_SWEEP)


def end_stopped(experiment: Experiment, searcher: OptunaSearcher) -> None:
    """End the unfinished trials that were asked to stop while no driver ran them.

    A trial that has reported no epoch runs on, and is stopped after its first one.
    """
    storage, name = experiment
    for asked in sorted(storage.requests(name) - {WHOLE_SWEEP}):
        folder = experiment.folder / "trials" / asked
        if not (folder / "trial.json").is_file():
            storage.withdraw(name, asked)
            continue
        record = read_record(folder)
        if record.status in ("running", "interrupted", "paused"):
            if not record.metrics:
                continue
            run = "" if record.seed_of is None else record.name
            searcher.end_early(record.number, record.last, name=run)
            reason = f"{BY_COMMAND} after epoch {record.last['epoch']:.0f}"
            ended = replace(record, status="stopped", reason=reason)
            end_record(ended, searcher.space.search.measured)
        storage.withdraw(name, asked)
