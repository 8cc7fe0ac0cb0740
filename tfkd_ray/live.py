"""The view of a running sweep: one table that refreshes in place on a terminal, one line an event when piped.

Results go to standard output at the end (`summary`); everything here goes to standard error.
"""

import math
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ray import tune
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from tfkd_ray.experiment import read_records

REFRESH_S = 0.25


class Progress(tune.Callback):  # type: ignore[misc]
    """Shows a sweep, or a comparison of arms, while it runs.

    Args:
        experiment: its directory.
        rows: of the table: the objectives of a sweep, or the arms.
        total: trials in all.
        metric: whose last value is shown for each trial, and the best for each row; `mode` says which way is better.
    """

    def __init__(
        self,
        experiment: Path,
        rows: Sequence[str],
        total: int,
        metric: str,
        mode: str,
        console: Console | None = None,
    ) -> None:
        self._experiment, self._total, self._metric, self._mode = experiment, total, metric, mode
        self._console = console or Console(file=sys.stderr)
        self._live: Live | None = None
        self._start = self._drawn = time.monotonic()
        self._running: dict[str, dict[str, Any]] = {}
        self._counts: dict[str, Counter[str]] = {row: Counter() for row in rows}
        self._best: dict[str, float] = {}
        self._failures: list[str] = []
        self.ended_by = ""
        """The budget that ended the sweep, if one did."""

    # --- events

    def end(self, budget: str) -> None:
        """Hear that a budget ends the sweep."""
        self.ended_by = budget
        self.note(f"ending: {budget}")

    def setup(self, **info: Any) -> None:
        self._start = time.monotonic()
        for record in read_records(self._experiment):  # what earlier sessions did
            if record.status in ("done", "stopped", "failed"):
                row = record.parameters.get("arm", record.objective)
                self._count(row, record.status, record.last.get(self._metric, math.nan))
        if self._console.is_terminal:
            self._live = Live(console=self._console, auto_refresh=False, transient=True)
            self._live.start()
        self._draw(force=True)

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        self._draw()

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        again = trial.trial_id in self._running
        about = trial.config["trial"]
        self._running[trial.trial_id] = {
            "name": about["name"],
            "row": about.get("arm") or trial.config["objective"]["name"],
            "epoch": 0,
            "epochs": about["epochs"],
        }
        self._say(f"{about['name']}: {'started again' if again else 'started'}")

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        if "epoch" in result and trial.trial_id in self._running:
            self._running[trial.trial_id] |= {"epoch": result["epoch"], "value": result.get(self._metric)}

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._end(trial, (trial.last_result or {}).get("failed"))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._end(trial, "its process was lost")

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._say(f"{trial.config['trial']['name']}: its process was lost; it goes on from its last checkpoint")

    def on_experiment_end(self, trials: list[Any], **info: Any) -> None:
        self.stop()

    def stop(self) -> None:
        """Leave the terminal as it was."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def note(self, text: str) -> None:
        """Say something that is no trial's event."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _end(self, trial: Any, failed: str | None) -> None:
        run = self._running.pop(trial.trial_id, None)
        if run is None:
            return
        metric, value = self._metric, run.get("value")
        value = math.nan if value is None else float(value)
        if failed:
            self._count(run["row"], "failed", value)
            self._failures.append(f"{run['name']}: {failed.splitlines()[0]}")
            self._say(f"{run['name']}: failed: {failed.splitlines()[0]}")
        elif run["epoch"] < run["epochs"]:
            self._count(run["row"], "stopped", value)
            self._say(f"{run['name']}: stopped early at epoch {run['epoch']}, {metric} {value:.4f}")
        else:
            self._count(run["row"], "done", value)
            self._say(f"{run['name']}: done, {metric} {value:.4f}")

    def _count(self, row: str, status: str, value: float) -> None:
        self._counts[row][status] += 1
        sign = 1 if self._mode == "max" else -1
        if status == "done" and sign * value > sign * self._best.get(row, -sign * math.inf):
            self._best[row] = value

    def _say(self, text: str) -> None:
        if self._live is None:
            self.note(text)

    # --- the table

    def _draw(self, *, force: bool = False) -> None:
        now = time.monotonic()
        if self._live is not None and (force or now - self._drawn >= REFRESH_S):
            self._drawn = now
            self._live.update(self.table(), refresh=True)

    def table(self) -> Group:
        """The current state, at most one screen high."""
        over = sum(sum(c.values()) for c in self._counts.values())
        total = self._total
        title = f"{self._experiment.name}: {over} of {total} trials, {len(self._running)} running, {self._elapsed()}"
        table = Table(box=None, pad_edge=False)
        for column in ("", "full", "stopped", "failed", f"best {self._metric}", "running"):
            table.add_column(column, justify="left" if column in ("", "running") else "right", no_wrap=True)
        for row, counts in self._counts.items():
            runs = [r for r in self._running.values() if r["row"] == row]
            running = ", ".join(f"{r['name'].split('-')[0]} {r['epoch']}/{r['epochs']}" for r in runs[:3])
            best = f"{self._best[row]:.4f}" if row in self._best else ""
            cells = [str(counts[k]) for k in ("done", "stopped", "failed")]
            table.add_row(row, *cells, best, running + (f" +{len(runs) - 3}" if len(runs) > 3 else ""))
        failures = [
            Text(f"failed: {text}", style="red", overflow="ellipsis", no_wrap=True) for text in self._failures[-3:]
        ]
        return Group(Text(title, style="bold", overflow="ellipsis", no_wrap=True), table, *failures)

    def _elapsed(self) -> str:
        seconds = int(time.monotonic() - self._start)
        return f"{seconds // 60}:{seconds % 60:02d}"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_live": None, "_console": None}
