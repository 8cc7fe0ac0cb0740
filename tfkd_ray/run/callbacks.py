"""Listeners of a sweep (records, losses, budgets, soft labels, uploads, lock) and their order."""

import contextlib
import json
import math
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from filelock import FileLock, Timeout
from ray import tune

from tfkd_ray.learn.checkpoint import BEFORE, LAST
from tfkd_ray.learn.config import TrainConfig
from tfkd_ray.run.connect import (
    BROKEN_GPU,
    found_broken,
    object_store_here,
    on_this_node,
    room_for,
    short_share,
    shun,
    started_here,
    starting,
)
from tfkd_ray.run.epochs import Shelf, shelf_name
from tfkd_ray.run.searcher import OptunaSearcher
from tfkd_ray.run.stops import Stops
from tfkd_ray.settings import own_code
from tfkd_ray.settings.columns import to_stderr
from tfkd_ray.settings.errors import ConfigError, Say
from tfkd_ray.settings.files import DISK_ERRORS, check_room_for, remove_left_behind, write_text
from tfkd_ray.settings.yaml import Numbers, Tree, Values
from tfkd_ray.show.listener import Announcer, Listener
from tfkd_ray.show.live import Progress
from tfkd_ray.show.status import driver_of
from tfkd_ray.show.tensorboard import TensorBoard
from tfkd_ray.space.space import Space
from tfkd_ray.store import remote
from tfkd_ray.store.assignment import assigned, without_assignment
from tfkd_ray.store.ended import (
    end_record,
    finished_names,
    in_full,
    note_beginning,
    note_end,
    read_briefs,
)
from tfkd_ray.store.experiment import (
    DRIVER_ENDED,
    FULL_LENGTH,
    STOPPED_BY,
    STOPS,
    Record,
    append_line,
    check_no_links,
    read_metrics,
    read_record,
    read_spent,
    trials_folder,
    write_record,
)
from tfkd_ray.store.storage import Storage


class Recorder(Listener):
    """Writes trial.json and metrics.jsonl of every trial, and result.json for Ray's `ResultGrid`.

    If files of a running trial are removed, it reports that and writes them again with all epochs.
    """

    def __init__(
        self,
        losses: "Losses",
        budget: "Budget | None" = None,
        *,
        stops: Stops | None = None,
        on_note: Say | None = None,
    ) -> None:
        self._lines: dict[str, list[str]] = {}
        self._took: dict[str, Numbers] = {}
        self._written: dict[str, Record] = {}
        self._begun: set[str] = set()
        self._paused: set[str] = set()
        self._go_on: dict[str, int] = {}
        self._over: list[Path] = []
        self._losses, self._budget, self._note = losses, budget, on_note or to_stderr
        self._stops = stops

    def on_start(self, trial: Any, last: Values) -> None:
        folder = self._folder(trial)
        self._make_again(trial)
        metrics = read_metrics(folder)
        if (folder / "trial.json").exists():
            note_beginning(folder)
            if read_record(folder).status == "paused":
                self._go_on[trial.trial_id] = len(metrics)
        seconds = sum(m.get("seconds", 0.0) for m in metrics)
        self._took[trial.trial_id] = {"seconds": seconds, "began": time.time()}
        self._lines[trial.trial_id] = [json.dumps(m) for m in metrics]
        self._make(trial)  # without a half-written line that a crash left
        self._begun.add(trial.trial_id)
        self._paused.discard(trial.trial_id)
        for left in ("error.txt", BROKEN_GPU):  # of an earlier attempt
            (folder / left).unlink(missing_ok=True)
        self._write(trial, "running")

    def _make(self, trial: Any) -> None:
        """Write a trial's lines, and create its folder if it is missing."""
        folder = self._folder(trial)
        write_text(
            folder / "metrics.jsonl", "".join(line + "\n" for line in self._lines[trial.trial_id])
        )
        if not (folder / "result.json").exists():
            (folder / "result.json").symlink_to("metrics.jsonl")

    def _make_again(self, trial: Any) -> bool:
        """Restore and report missing files of a running trial; return True if any were missing."""
        folder = self._folder(trial)
        gone = [
            name for name in ("metrics.jsonl", "result.json") if not os.path.lexists(folder / name)
        ]
        if not gone or trial.trial_id not in self._lines:
            return False
        self._make(trial)
        what = f"{gone[0]} was" if len(gone) == 1 else "its folder was"
        self._note(
            f"{folder.name}: {what} removed while it ran; written again, with all epochs reported so far"
        )
        return True

    def on_epoch(self, trial: Any, epoch: int, metrics: Values) -> None:
        line = json.dumps(
            {k: v for k, v in metrics.items() if k in _METRICS or k.startswith("val_")}
        )
        again = self._make_again(trial)
        append_line(self._folder(trial) / "metrics.jsonl", line)
        self._lines.setdefault(trial.trial_id, []).append(line)
        took = self._took.setdefault(trial.trial_id, {"seconds": 0.0, "began": time.time()})
        took["seconds"] += metrics.get("seconds", 0.0)
        if again and not metrics.get("done"):
            self._write(trial, "running")

    def _check_goes_on(self, trial: Any, result: Tree) -> None:
        """Report a trial that was paused and trains known epochs again, for want of a checkpoint.

        Epochs that a checkpoint remembers are reported again with the durations that they had.
        """
        known, epoch = self._go_on.get(trial.trial_id, 0), result.get("epoch", 0)
        if epoch >= known or result.get("failed"):
            self._go_on.pop(trial.trial_id, None)
        if not 1 <= epoch <= known:
            return
        before = json.loads(self._lines[trial.trial_id][int(epoch) - 1])
        if before.get("seconds") != result.get("seconds"):
            self._go_on.pop(trial.trial_id, None)
            self._note(
                f"{self._folder(trial).name}: its checkpoint of epoch {known}, where it paused, is missing or damaged; "
                f"it trains again from epoch {epoch:.0f}"
            )

    def on_result(self, trial: Any, result: Tree) -> None:
        self._check_goes_on(trial, result)
        if result.get(
            "done"
        ):  # before the study is updated: a crash between them repeats the end, never loses it
            self._end(trial, result)

    def on_pause(self, trial: Any) -> None:
        self._paused.add(trial.trial_id)
        self._write(trial, "paused")
        self._list(trial)

    def on_end(self, trial: Any) -> None:
        """Drop the run states once the study has the result, except of failed trials."""
        result = trial.last_result or {}
        self._begun.discard(trial.trial_id)
        self._end(trial, result)
        self._list(trial)
        self._forget(trial)
        if not result.get("failed"):
            self._over.append(self._folder(trial))
            _drop_states(self._over[-1])

    def _end(self, trial: Any, result: Tree) -> None:
        failed = result.get("failed")
        full = result.get("epoch") == assigned(trial).epochs or result.get(FULL_LENGTH)
        ended = "done" if full else "stopped"
        why = failed or (None if full else result.get(STOPPED_BY))
        self._write(trial, "failed" if failed else ended, why)

    def on_failed(self, trial: Any) -> None:
        self._write(trial, "failed", self._losses.reason(trial))
        self._list(trial)
        self._forget(trial)

    def _list(self, trial: Any) -> None:
        """Add a trial that has ended or paused to the list of such."""
        lines, took = self._lines.get(trial.trial_id, []), self._took.get(trial.trial_id, {})
        last = json.loads(lines[-1]) if lines else {}
        note_end(self._written[trial.trial_id], {**last, **took}, assigned(trial).metrics)

    def _forget(self, trial: Any) -> None:
        for known in (self._lines, self._took, self._written):
            known.pop(trial.trial_id, None)

    def _ended_by(self) -> str | None:
        """Return why the sweep ends before all trials have."""
        reasons = (end.reason for end in (self._budget, self._stops) if end is not None)
        return next((reason for reason in reasons if reason), None)

    def on_close(self, trials: Sequence[Any]) -> None:
        for folder in self._over:  # a stopped trial may have been saving until now
            _drop_states(folder)
        for trial in trials:
            ended = trial.status == "ERROR" or (trial.last_result or {}).get("done")
            if trial.trial_id in self._begun - self._paused and not ended:
                self._write(trial, "interrupted", self._ended_by())

    def _folder(self, trial: Any) -> Path:
        return assigned(trial).folder

    def _write(self, trial: Any, status: str, reason: str | None = None) -> None:
        assignment, config = assigned(trial), without_assignment(trial.config)
        self._make_again(trial)
        record = Record(
            folder=assignment.folder,
            number=assignment.number,
            name=assignment.name,
            objective=str(own_code.shown_name(config["objective"])),
            status=status,
            parameters=dict(assignment.parameters),
            config=config,
            reason=reason,
            lost=self._losses.count(trial),
            seed_of=assignment.seed_of,
            seeds=assignment.seeds or 0,
        )
        known, self._written[trial.trial_id] = self._written.get(trial.trial_id), record
        if record != known or not (record.folder / "trial.json").exists():
            write_record(record)

    def __getstate__(self) -> Tree:
        return {**self.__dict__, "_note": None}


def _drop_states(folder: Path) -> None:
    for name in (LAST, BEFORE):
        (folder / name).unlink(missing_ok=True)


_METRICS = {
    "epoch",
    "train_loss",
    "train_ce",
    "train_kd",
    "train_kd_unlabelled",
    "train_kd_ratio",
    "lr",
    "parameters",
    "seconds",
    "images_per_s",
}


QUICK, QUICK_S = 3, 60
"""Trials in a row, each lost within so many seconds without an epoch, that exclude a node."""


class NoNodeLeft(RuntimeError):
    """The GPUs of all nodes that can run a trial are broken; the sweep can be resumed."""


class Losses(Listener):
    """Decides, for a trial whose process died, whether to retry it, fail it, or stop the sweep.

    A trial that is lost `max_failures` + 1 times in the same epoch fails: it is assumed to be the
    cause (out of memory, a crash). A trial that reports no epoch for `timeout_s` hangs: its process
    is killed and the trial fails. If the disk is full or not writable, the system's OSError stops
    the sweep, which can be resumed. A node on which the GPU fails `QUICK` trials in a row, each
    within `QUICK_S`, gets no more trials; if it was the last node, NoNodeLeft stops the sweep.
    """

    def __init__(
        self,
        timeout_s: float | None = None,
        clock: Callable[[], float] = time.monotonic,
        *,
        config: TrainConfig | None = None,
        on_note: Say | None = None,
    ) -> None:
        self._timeout_s, self._clock, self._config, self._note = (
            timeout_s,
            clock,
            config,
            on_note or to_stderr,
        )
        self._began: Numbers = {}
        self._broken: dict[str, list[str]] = {}
        self._why: dict[str, str] = {}
        self._short: Numbers = {}
        self._over: str | None = None
        self._since: dict[str, tuple[float, Any]] = {}
        self._again: dict[str, int] = {}
        self._epoch: dict[str, int] = {}
        self._hung: set[str] = set()
        self._all: dict[str, int] = {}

    def count(self, trial: Any) -> int:
        """Return how often a trial was lost and restarted, earlier sessions included."""
        return self._all.get(trial.trial_id, 0)

    def reason(self, trial: Any) -> str:
        """Return why a lost trial has failed."""
        if trial.trial_id in self._hung:
            return f"no epoch within {self._timeout_s:g} s (search.trial_timeout_s): it hung and was killed"
        epoch = self._epoch.get(trial.trial_id, 0) + 1
        if trial.trial_id in self._short:
            return (
                f"its share of a GPU ({self._short[trial.trial_id]:g}) had too little memory in epoch {epoch}, and its "
                "retries were used up, so it got no larger share; raise gpus_per_worker"
            )
        times = self._again.get(trial.trial_id, trial.max_failures) + 1
        return (
            f"its process was lost {f'{times} times' if times > 1 else 'once'} in epoch "
            f"{epoch} ({self._why.get(trial.trial_id, 'no memory, a crash?')})"
        )

    def on_start(self, trial: Any, last: Values) -> None:
        if trial.trial_id not in self._all:
            folder = assigned(trial).folder
            self._all[trial.trial_id] = (
                read_record(folder).lost if (folder / "trial.json").exists() else 0
            )
        self._epoch[trial.trial_id] = int(last.get("epoch", 0))
        self._again.setdefault(trial.trial_id, trial.max_failures)
        self._began[trial.trial_id] = self._clock()
        self._since[trial.trial_id] = self._clock(), trial

    def on_epoch(self, trial: Any, epoch: int, metrics: Values) -> None:
        """Reset the number of losses at a new epoch."""
        self._epoch[trial.trial_id] = epoch
        self._began.pop(trial.trial_id, None)
        self._broken.pop(metrics.get("node", ""), None)
        if trial.max_failures >= 0:
            trial.max_failures = trial.num_failures + self._again[trial.trial_id]

    def on_result(self, trial: Any, result: Tree) -> None:
        self._since[trial.trial_id] = self._clock(), trial

    def on_pause(self, trial: Any) -> None:
        self._since.pop(trial.trial_id, None)

    def on_end(self, trial: Any) -> None:
        for known in (self._since, self._again, self._epoch, self._began):
            known.pop(trial.trial_id, None)

    def on_lost(self, trial: Any) -> None:
        self._since.pop(trial.trial_id, None)
        self._all[trial.trial_id] = self.count(trial) + 1
        self._check_disk(trial)
        self._check_gpu(trial)

    def on_failed(self, trial: Any) -> None:
        self._since.pop(trial.trial_id, None)
        share = short_share(trial)
        if share is not None:
            self._short[trial.trial_id] = share
        self._check_disk(trial)
        self._check_gpu(trial)

    def on_step(self) -> None:
        if self._over is not None:  # here, after all listeners know the outcome of the trial
            raise NoNodeLeft(self._over)
        if self._timeout_s is None:
            return
        for trial_id, (since, trial) in list(self._since.items()):
            actor = trial.temporary_state.ray_actor
            if self._clock() - since > self._timeout_s and actor is not None:
                del self._since[trial_id]
                self._hung.add(trial_id)
                trial.max_failures = trial.num_failures  # it would hang again
                ray.kill(actor)

    def _check_gpu(self, trial: Any) -> None:
        """Exclude the trial's node if its GPU fails too often; end the sweep if no node is left."""
        broken, began = found_broken(trial), self._began.pop(trial.trial_id, None)
        if broken is None:
            self._why.pop(trial.trial_id, None)
            return
        self._why[trial.trial_id] = broken["reason"]
        storage, folder = assigned(trial).place
        path = folder / BROKEN_GPU
        path.unlink()
        storage.send(path)
        if began is None or self._clock() - began > QUICK_S:
            return
        node, row = broken["node"], self._broken.setdefault(broken["node"], [])
        row.append(trial.trial_id)
        if len(row) == QUICK:
            shun(node)
            why = f"node {broken['host']} ({node[:8]}): {QUICK} trials in a row were lost there: {broken['reason']}"
            if self._config is not None and room_for(self._config) < 1:
                self._over = f"{why}; no other node has room for a trial"
            else:
                self._note(f"{why}; the node gets no more trials of this sweep")

    def _check_disk(self, trial: Any) -> None:
        """Raise if the trial's next checkpoint could not be written."""
        folder = assigned(trial).folder
        state = folder / LAST
        check_room_for(folder, 2 * (state.stat().st_size if state.exists() else 0) + 2**20)

    def __getstate__(self) -> Tree:
        return {**self.__dict__, "_since": {}, "_clock": None, "_note": None}


def spent_so_far(
    experiment: Path, *, workers: Numbers, records: Sequence[Record] | None = None
) -> Numbers:
    """Return what an experiment has spent, by budget: seconds, GPU-hours, CPU-hours, failed trials.

    Hours are the larger of two sums, times the `gpus` and `cpus` of a trial in `workers`: the
    durations of the epochs in metrics.jsonl, or the time that drivers counted, which includes
    epochs that were not reported. Seconds are the running time of all drivers.

    Args:
        records: its trials. None: they are read.
    """
    records = read_briefs(experiment).records if records is None else records
    runs = [run for record in records for run in record.runs]
    counted = read_spent(experiment)
    hours = (
        max(sum(m.get("seconds", 0.0) for r in runs for m in r.metrics), counted["trial_seconds"])
        / 3600
    )
    return {
        "time_budget_s": counted["seconds"],
        "gpu_hours": hours * workers["gpus"],
        "cpu_hours": hours * workers["cpus"],
        "max_failed_trials": sum(r.status == "failed" for r in runs),
    }


def over_budget(budgets: Mapping[str, float], spent: Mapping[str, float]) -> str | None:
    """Return a sentence about the first budget that is spent, or None."""
    for name, limit in budgets.items():
        if spent[name] >= limit:
            unit = {"time_budget_s": "s", "max_failed_trials": "failed trials"}.get(name, "h")
            return f"search.{name}: limit reached ({spent[name]:.4g} of {limit:.4g} {unit})"
    return None


def workers_of(tree: Values) -> Numbers:
    """Return the CPUs and GPUs that a trial holds, from the tree of a space."""
    return {
        "gpus": tree["workers"] * tree["gpus_per_worker"],
        "cpus": tree["workers"] * tree["cpus_per_worker"],
    }


def failed_names(records: Iterable[Record]) -> set[str]:
    """Return the names of the trials, and of runs with further seeds, that have failed."""
    runs = (run for record in records for run in record.runs)
    return {run.name for run in runs if run.status == "failed"}


SPENT_S = 1.0
"""Seconds between two times that spent.json is written."""


class Budget(Listener, tune.Stopper):  # type: ignore[misc]
    """Stops a sweep when a budget of its `search` is spent: trials save, and can be resumed.

    The time since a running trial's last report counts, so no trial runs past its current message.
    """

    reason: str | None = None
    """Why the budget stopped the sweep; None if it did not."""

    def __init__(
        self,
        experiment: Path,
        space: Space,
        searcher: OptunaSearcher,
        *,
        on_budget: Say | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._experiment, self._limits, self._clock, self._on_budget = (
            experiment,
            space.search.budgets,
            clock,
            on_budget,
        )
        self._searcher: OptunaSearcher | None = searcher
        self._workers = workers_of(space.tree)
        records = read_briefs(experiment).records
        self._before = spent_so_far(experiment, workers=self._workers, records=records)
        self._began = clock()
        self._failed = failed_names(records) - searcher.waiting_names()
        self._told = 0.0
        self._wrote = -math.inf
        self._since: Numbers = {}
        self.seconds_left: Callable[[], float | None] = lambda: None
        """Estimates the time left; a live view sets it."""

    def spent(self) -> Numbers:
        """Return what is spent now, by budget."""
        now = self._clock()
        hours = self._held(now) / 3600
        return {
            "time_budget_s": self._before["time_budget_s"] + now - self._began,
            "gpu_hours": self._before["gpu_hours"] + hours * self._workers["gpus"],
            "cpu_hours": self._before["cpu_hours"] + hours * self._workers["cpus"],
            "max_failed_trials": len(self._failed),
        }

    # --- called by Tune

    def __call__(self, trial_id: str, result: Tree) -> bool:
        return False

    def stop_all(self) -> bool:
        if self.reason is None and self._searcher is not None:
            reason = over_budget(self._limits, self.spent())
            if reason and not self._searcher.is_over():
                self.reason = reason
                if self._on_budget is not None:
                    self._on_budget(reason)
        return self.reason is not None

    # --- called by the listener

    def on_begin(self) -> None:
        self._began = self._clock()

    def on_start(self, trial: Any, last: Values) -> None:
        self._since[trial.trial_id] = self._clock()

    def on_epoch(self, trial: Any, epoch: int, metrics: Values) -> None:
        self._told += metrics.get("seconds", 0.0)
        self._since[trial.trial_id] = self._clock()

    def on_result(self, trial: Any, result: Tree) -> None:
        if result.get("failed"):
            self._failed.add(assigned(trial).name)
        if self._clock() - self._wrote >= SPENT_S:
            self._write()

    def on_end(self, trial: Any) -> None:
        self._since.pop(trial.trial_id, None)

    def on_pause(self, trial: Any) -> None:
        self.on_lost(trial)

    def on_lost(self, trial: Any) -> None:
        """Count the time that a process held its resources since the last report."""
        self._told += self._clock() - self._since.pop(trial.trial_id, self._clock())

    def on_failed(self, trial: Any) -> None:
        self.on_lost(trial)
        self._failed.add(assigned(trial).name)

    def on_close(self, trials: Sequence[Any]) -> None:
        self._write(closed=True)
        if self._searcher is not None:
            _end_paused(self._experiment, self._searcher)
            self._searcher.close()

    def _held(self, now: float) -> float:
        """Return the seconds that all trials have run in this session."""
        return self._told + sum(now - since for since in self._since.values())

    def _write(self, *, closed: bool = False) -> None:
        self._wrote = self._clock()
        before = self._before["cpu_hours"] / self._workers["cpus"] * 3600
        counted = {
            "seconds": self.spent()["time_budget_s"],
            "trial_seconds": before + self._held(self._clock()),
        }
        if (left := self.seconds_left()) is not None:
            counted["left_s"] = left
        if closed:
            counted[DRIVER_ENDED] = 1.0
        text = json.dumps({name: round(value, 3) for name, value in counted.items()})
        write_text(self._experiment / "spent.json", text + "\n")

    def __getstate__(self) -> Tree:
        return {
            **self.__dict__,
            "_searcher": None,
            "_on_budget": None,
            "_clock": None,
            "seconds_left": None,
        }


def _end_paused(experiment: Path, searcher: OptunaSearcher) -> None:
    """Record as stopped what an earlier session paused, and this one has ended without it."""
    if not searcher.pauses:
        return
    paused = searcher.paused()
    for record in read_briefs(experiment).records:
        if record.status == "paused" and record.number not in paused:
            ended = replace(in_full(record), status="stopped")
            end_record(ended, searcher.space.search.measured)
            _drop_states(record.folder)


class SoftLabels(Listener):
    """Holds the actor with the soft labels that nodes share, for sweeps on an existing cluster."""

    def __init__(self, experiment: Path) -> None:
        self._name = shelf_name(experiment)
        self._shelf: Any = None

    def on_begin(self) -> None:
        if not started_here():
            # all views lie in the store of the shelf's node, and trials there need some of it
            limit = object_store_here() // 3
            beside = on_this_node()
            shelf = ray.remote(Shelf).options(
                name=self._name, num_cpus=0, scheduling_strategy=beside
            )
            self._shelf = shelf.remote(limit)

    def on_close(self, trials: Sequence[Any]) -> None:
        if self._shelf is not None:
            ray.kill(self._shelf)

    def __getstate__(self) -> Tree:
        return {**self.__dict__, "_shelf": None}


class Uploads(Listener):
    """Uploads a sweep's files every `remote.UPLOAD_S`, and when a trial or the sweep ends.

    If the store does not answer, this is reported once and retried; the sweep continues.
    """

    def __init__(self, claim: remote.Claim, on_note: Say | None) -> None:
        self._store, self._url, self._experiment = claim.store, claim.url, claim.folder
        self._claim, self._upload = claim, remote.Upload(claim.store, claim.name)
        self._note = on_note or to_stderr
        self._trouble: str | None = None
        self._taken_over: ConfigError | None = None
        self._wake, self._over = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="uploads", daemon=True)

    def on_begin(self) -> None:
        self._thread.start()

    def on_end(self, trial: Any) -> None:
        self._wake.set()

    on_failed = on_end

    def on_step(self) -> None:
        if self._taken_over is not None:
            raise self._taken_over

    def on_close(self, trials: Sequence[Any]) -> None:
        self._over.set()
        self._wake.set()
        self._thread.join()
        until = time.monotonic() + remote.UPLOAD_END_S
        while not self._once() and self._taken_over is None:
            if time.monotonic() > until:
                self._note(
                    f"{self._url}: the upload is incomplete: {self._trouble}; the rest is on this machine, in "
                    f"{self._experiment}; when the store answers, upload it from here: tfkd resume {self._url}"
                )
                return
            time.sleep(1)

    def _run(self) -> None:
        while not self._over.is_set():
            self._once()
            self._wake.wait(remote.UPLOAD_S)
            self._wake.clear()
            self._over.wait(1)  # upload trials that end together at once

    def _once(self) -> bool:
        """Upload what has changed; return True on success."""
        try:
            self._claim.refresh()
            self._upload.once()
        except ConfigError as error:
            self._taken_over = error
            self._over.set()
            return False
        except OSError as error:
            if self._trouble is None:
                self._note(
                    f"{self._url}: {self._store.trouble(error)}; the sweep continues, and uploads when it can"
                )
            self._trouble = self._store.trouble(error)
            return False
        if self._trouble is not None:
            self._note(f"{self._url}: responds again; the upload is complete")
        self._trouble = None
        return True

    def __getstate__(self) -> Tree:
        return {"_url": self._url}


KILLED_S = 1.0
"""Longest time to wait for a lock: a killed process frees it a moment after it seems gone."""


class Lock(Listener):
    """Locks the experiment while its sweep runs, so that a second driver is refused.

    The operating system releases the lock however the driver ends.
    """

    def __init__(self, storage: Storage, name: str) -> None:
        self._experiment = storage.folder / name
        self._take(storage, name)

    def _take(self, storage: Storage, name: str) -> None:
        finished = finished_names(self._experiment)
        check_no_links(self._experiment, finished)
        self._lock: FileLock | None = FileLock(self._experiment / "driver.lock", timeout=KILLED_S)
        self.claim: remote.Claim | None = None
        try:
            self._lock.acquire()
        except Timeout:
            driver = driver_of(self._experiment)
            who = f"process {driver[0]} on {driver[1]}" if driver else "another process"
            raise ConfigError(
                f"is being run by {who}; wait for it, or stop it first", self._experiment
            ) from None
        except (
            OSError,
            NotImplementedError,
        ) as error:  # the second is raised by file systems without locks
            if isinstance(error, OSError) and error.errno in DISK_ERRORS:
                raise
            why = getattr(error, "strerror", None) or error
            raise ConfigError(
                f"driver.lock cannot be locked ({why}), so another process may be running it; check that none is, then "
                "remove driver.lock, or use an experiment and a file system with write permission",
                self._experiment,
            ) from None
        try:
            self.claim = storage.hold(name)
        except BaseException:
            self._lock.release()
            raise
        above = trials_folder(self._experiment)
        there = list(above.iterdir()) if above.is_dir() else []
        trials = [folder for folder in there if folder.name not in finished]
        # of a killed driver or trial
        for folder in (self._experiment, self._experiment / STOPS, *trials):
            if not folder.is_symlink():
                remove_left_behind(folder, age_s=1)
        write_text(
            self._experiment / "driver.txt", f"process {os.getpid()} on {socket.gethostname()}\n"
        )

    def on_close(self, trials: Sequence[Any]) -> None:
        self.release()

    def release(self) -> None:
        """Release the lock at the end of the sweep."""
        if self.claim is not None:
            with contextlib.suppress(OSError, ConfigError):  # otherwise it is detected as stale
                self.claim.release()
        if self._lock is not None:
            self._lock.release()

    def __getstate__(self) -> Tree:
        return {**self.__dict__, "_lock": None, "claim": None}


def in_order(
    lock: Lock,
    tensorboard: TensorBoard,
    losses: Losses,
    users: Sequence[tune.Callback],
    *,
    budget: Budget | None = None,
    stops: Stops | None = None,
    labels: SoftLabels | None = None,
    on_note: Say | None = None,
) -> list[tune.Callback]:
    """Return the callbacks of a sweep or a comparison in the order in which they get each event.

    1. TensorBoard and Budget depend on no other listener. Budget counts the time of a lost trial
       before Losses, which raises if the disk is full.
    2. Losses, before Recorder: it determines why a trial failed and how often it was lost, and
       Recorder writes that.
    3. Recorder writes the trial's files.
    4. Stops removes a request of `tfkd stop` after the trial's files say how it ended. SoftLabels
       stops the shared actor after all trials have ended.
    5. The user's callbacks, in the user's order, and the live view: they read Recorder's files.
    6. Uploads sends the files that the listeners above have written.
    7. Lock is last: the experiment stays locked while any other listener still writes.
    """
    for view in users:
        if isinstance(view, Progress):
            view.nodes_starting = starting
            view.stops = stops
            if budget is not None:
                budget.seconds_left = view.told_left
    ours: list[Listener] = [tensorboard]
    ours += [] if budget is None else [budget]
    ours += [losses, Recorder(losses, budget, stops=stops, on_note=on_note)]
    ours += [] if stops is None else [stops]
    ours += [] if labels is None else [labels]
    last: list[Listener] = [] if lock.claim is None else [Uploads(lock.claim, on_note)]
    last.append(lock)
    return [Announcer(ours), *users, Announcer(last)]
