"""The live view of a sweep: one screen on a terminal, one updating output in a notebook, or one line
per event in a pipe.

The plan is read from the experiment. The view goes to standard error; `tfkd tune` prints its
results to standard output at the end. To show more, add a line to `Progress.lines`.
"""

import html
import math
import sys
import textwrap
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.cells import cell_len, set_cell_size
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from tfkd_ray.settings import own_code
from tfkd_ray.settings.columns import fitted, in_columns, on_one_line
from tfkd_ray.settings.files import legible
from tfkd_ray.settings.schema import validated
from tfkd_ray.settings.yaml import Numbers, Tree, Values, in_yaml
from tfkd_ray.show.listener import OwnCallback
from tfkd_ray.show.status import (
    ExperimentPlan,
    duration,
    epochs_left,
    read_plan,
    spent,
)
from tfkd_ray.space.search_config import Pausing, SearchConfig
from tfkd_ray.store.assignment import assigned
from tfkd_ray.store.experiment import FULL_LENGTH, STOPPED_BY, read_record, read_records
from tfkd_ray.verdict import scores
from tfkd_ray.verdict.limits import feasible_first, met_text

_AGAIN = {"running": "started again", "paused": "goes on"}
"""What a trial does that starts, by what it was."""
REFRESH_S = 0.25
NODES_S = 5
"""Seconds between questions to the autoscaler about starting nodes, while no trial trains."""
SPEED_EPOCHS = 200
"""Number of epochs, the latest of all trials together, over which speed is measured."""
NOTEBOOK = (110, 30)
"""Columns and lines in a notebook."""


@dataclass
class _Run:
    """A trial that has begun, in this session or an earlier one."""

    name: str
    row: str
    epochs: int
    """Epochs of a trial of full length."""
    parameters: Tree
    epoch: int = 0
    status: str = "running"
    value: float = math.nan
    images_per_s: float = 0.0
    last: Values = field(default_factory=dict)
    """Metrics of its last epoch."""


def _latest(rows: list[str], runs: Sequence[_Run], most: int) -> list[str]:
    """Return the rows, in their order; of many, those that run or ran last."""
    if len(rows) < most:
        return rows
    last = {run.row: number for number, run in enumerate(runs)}
    for number, run in enumerate(runs):
        if run.status == "running":
            last[run.row] = len(runs) + number
    first = sorted(rows, key=lambda row: -last.get(row, -1))[: max(1, most - 2)]
    return [row for row in rows if row in first]


class Progress(OwnCallback):
    """Shows a sweep, or a comparison of arms, while it runs. To use it with `build_tuner`:

        build_tuner(space, name="mine", callbacks=[Progress(Path("tfkd_results/mine"))]).fit()

    Args:
        experiment: its directory, which must exist when the sweep begins.
        console: where it is shown. None: standard error, or the cell of a notebook that calls `fit`.
    """

    begun = False
    """True once the sweep has begun."""
    ended_by = ""
    """The budget that ended the sweep, if one did."""

    def __init__(self, experiment: Path | str, console: Console | None = None) -> None:
        super().__init__()
        self._experiment = Path(experiment)
        self._console = console or Console(file=sys.stderr)
        self._live: Live | None = None
        self._cell: Any = None
        self._runs: dict[str, _Run] = {}
        self._failures: list[str] = []
        self._notes: list[str] = []
        self._epochs: deque[float] = deque(maxlen=SPEED_EPOCHS)
        self._drawn = 0.0
        self._looked = -math.inf
        self._waiting = ""
        self.stops: Any = None
        """Has the `reason` why `tfkd stop` ends the sweep; a sweep sets it."""
        self.nodes_starting: Callable[[], list[str]] = list
        """Asks an autoscaler which nodes it is starting; a sweep on a cluster sets it."""

    # --- events

    @property
    def stopped_by(self) -> str | None:
        """Return what ended the sweep if `tfkd stop` did."""
        return None if self.stops is None else self.stops.reason

    def end(self, budget: str) -> None:
        """Called when a budget ends the sweep."""
        self.ended_by = budget
        self.note(f"ending: {budget}")

    def on_begin(self) -> None:
        self.begun = True
        self._plan: ExperimentPlan = read_plan(self._experiment)
        self._metric = self._plan.metric or "train_loss"
        search = self._plan.about["space"]["search"] if self._plan.kind == "sweep" else {}
        self._search = validated(
            SearchConfig, {k: v for k, v in search.items() if k in ("stopping", *SHOWN_BUDGETS)}
        )
        self._start = time.time()
        for record in read_records(self._experiment):  # results of earlier sessions
            if record.status in ("done", "stopped", "failed", "paused"):
                row, last = self._plan.row(record), record.last
                run = _Run(record.name, row, self._plan.rows.get(row, 0), record.parameters)
                run.epoch, run.status, run.value = (
                    int(last.get("epoch", 0)),
                    record.status,
                    _number_cell(last, self._metric),
                )
                run.last = last
                self._runs[record.name] = run
        if self._console.is_jupyter:
            self._cell = _Cell()
        elif self._console.is_terminal:
            self._live = Live(console=self._console, auto_refresh=False, transient=True)
            self._live.start()
        self._draw(force=True)

    def on_step(self) -> None:
        self._look_for_nodes()
        self._draw()

    def _look_for_nodes(self) -> None:
        """Show which nodes an autoscaler is starting while trials wait for nodes."""
        now = time.monotonic()
        if now - self._looked <= NODES_S:
            return
        self._looked = now
        if any(run.status == "running" and run.epoch for run in self._runs.values()):
            self._waiting = ""
        else:
            before, self._waiting = self._waiting, ", ".join(self.nodes_starting())
            if self._waiting and self._waiting != before:
                self._say(f"waiting for nodes: {self._waiting}")

    def on_start(self, trial: Any, last: Values) -> None:
        assignment = assigned(trial)
        before = self._runs.pop(assignment.name, None)  # moves a restarted trial to the end
        again = "started" if before is None else _AGAIN.get(before.status, "started")
        row = assignment.arm or str(own_code.shown_name(trial.config["objective"]))
        run = _Run(assignment.name, row, assignment.epochs, dict(assignment.parameters))
        run.epoch, run.value = int(last.get("epoch", 0)), _number_cell(last, self._metric)
        run.last = last
        self._runs[run.name] = run
        if not self._epochs:
            self._epochs.append(time.monotonic())
        self._say(f"{run.name}: {again}")

    def on_epoch(self, trial: Any, epoch: int, metrics: Values) -> None:
        run = self._run_of(trial)
        if run is not None:
            run.epoch, run.value = epoch, _number_cell(metrics, self._metric)
            run.last = {name: metrics[name] for name in self._plan.limits if name in metrics}
            run.images_per_s = _number_cell(metrics, "images_per_s")
            self._epochs.append(time.monotonic())

    def on_result(self, trial: Any, result: Tree) -> None:
        run = self._run_of(trial)
        if run is not None and "note" in result:
            self.note(f"{run.name}: {result['note']}")

    def on_pause(self, trial: Any) -> None:
        run = self._run_of(trial)
        if run is not None:
            run.status = "paused"
            self._say(f"{run.name}: paused at epoch {run.epoch}, {self._metric} {run.value:.4f}")

    def on_end(self, trial: Any) -> None:
        self._end(trial, (trial.last_result or {}).get("failed"))

    def on_failed(self, trial: Any) -> None:
        self._end(trial, read_record(assigned(trial).folder).reason or "its process was lost")

    def on_lost(self, trial: Any) -> None:
        name = assigned(trial).name
        self._say(f"{name}: its process was lost; it resumes from its last checkpoint")

    def on_close(self, trials: Sequence[Any]) -> None:
        self._draw(force=True)
        self.stop()

    def _run_of(self, trial: Any) -> _Run | None:
        return self._runs.get(assigned(trial).name)

    def stop(self) -> None:
        """Leave the terminal as it was; in a notebook, leave the last state."""
        if self._live is not None:
            self._live.stop()
            self._live = None
        self._cell = None

    def note(self, text: str) -> None:
        """Show a message that is no event of a trial."""
        if self._cell is not None:
            self._notes.append(text)
        else:
            self._console.print(legible(text), highlight=False, markup=False, soft_wrap=True)

    def _end(self, trial: Any, failed: str | None) -> None:
        run = self._run_of(trial)
        if run is None or run.status not in ("running", "paused"):
            return
        value = f"{self._metric} {run.value:.4f}"
        if failed:
            run.status, reason = "failed", failed.splitlines()[0]
            self._failures.append(f"{run.name}: {reason}")
            self._say(f"{run.name}: failed: {reason}")
        elif run.epoch < run.epochs and not (trial.last_result or {}).get(FULL_LENGTH):
            paused, run.status = run.status == "paused", "stopped"
            how = (
                "stopped by tfkd stop"
                if (trial.last_result or {}).get(STOPPED_BY)
                else "stopped early"
            )
            if not paused:  # otherwise that is said already
                self._say(f"{run.name}: {how} at epoch {run.epoch}, {value}")
        else:
            run.status = "done"
            self._say(f"{run.name}: done, {value}")

    def _say(self, text: str) -> None:
        if self._live is None and self._cell is None:
            self.note(text)

    # --- what is shown

    def _draw(self, *, force: bool = False) -> None:
        now = time.monotonic()
        if (self._live is None and self._cell is None) or (
            not force and now - self._drawn < REFRESH_S
        ):
            return
        self._drawn = now
        if self._live is not None:
            self._live.update(self._styled(self.lines(*self._console.size)), refresh=True)
        else:
            self._cell.show(self.lines(*NOTEBOOK))

    def _styled(self, lines: Sequence[str]) -> Group:
        def style(line: str) -> str:
            return "red" if line.startswith("failed:") else ""

        first, *rest = lines
        return Group(
            Text(first, style="bold", no_wrap=True),
            *(Text(t, style=style(t), no_wrap=True) for t in rest),
        )

    def lines(self, width: int, height: int) -> list[str]:
        """The current state, as lines that leave at least one of the screen's free."""
        runs = list(self._runs.values())
        count = Counter(run.status for run in runs)
        over = count["done"] + count["stopped"] + count["failed"]
        used = spent(self._experiment, count["running"], since=self._start)
        planned = "" if self._plan.trials is None else f" of {self._plan.trials:,}"
        paused = f"{count['paused']:,} paused, " if count["paused"] else ""
        title = f"{over:,}{planned} trials, {count['running']} running, {paused}"
        title += duration(used["seconds"])
        title += self._left(runs, used)
        lines = [
            f"{fitted(self._experiment.absolute().name, max(8, width - len(title) - 2))}: {title}"
        ]
        lines += self._joined([*self._speed(runs), *self._budgets(used, count["failed"])], width)
        below = [*self._best_lines(runs, width), *self._rungs(runs, width)]
        below += [f"waiting for nodes: {self._waiting}"] if self._waiting else []
        below += [f"failed: {text}" for text in self._failures[-3:]] + self._notes[-2:]
        rows = self._rows(runs, width, most=max(3, height - len(lines) - len(below) - 4))
        lines += ["", *rows, "", *below]
        return [fitted(line.rstrip(), width) for line in lines[: max(1, height - 1)]]

    def _joined(self, parts: Sequence[str], width: int) -> list[str]:
        """Join parts by commas, on as few lines as they need."""
        lines: list[str] = []
        for part in parts:
            if lines and len(lines[-1]) + len(part) + 2 <= width:
                lines[-1] += f", {part}"
            else:
                lines.append(part)
        return lines

    def _speed(self, runs: Sequence[_Run]) -> Iterator[str]:
        if rate := self._rate():
            per_minute = 60 * rate
            yield (
                f"{per_minute:,.0f} epochs/min"
                if per_minute >= 10
                else f"{per_minute:.2g} epochs/min"
            )
        images = sum(
            run.images_per_s for run in runs if run.status == "running" and run.images_per_s > 0
        )
        if images:
            yield f"{images:,.0f} images/s"

    def _rate(self) -> float:
        """Return epochs a second of all trials together; 0 before there are any."""
        seconds = time.monotonic() - self._epochs[0] if self._epochs else 0.0
        return (len(self._epochs) - 1) / seconds if seconds > 0 else 0.0

    def _left(self, runs: Sequence[_Run], used: Numbers) -> str:
        """Return the remaining time at this speed; empty while the speed is unknown."""
        rate = self._rate()
        if not rate:
            return ""
        new = self._plan.not_begun(Counter(run.row for run in runs))
        left = epochs_left([(run.epoch, run.epochs, run.status) for run in runs], new) / rate
        if self._plan.trials is None:
            left = math.inf
        budget = (self._search.time_budget_s or math.inf) - used["seconds"]
        if budget < left:
            return f", {duration(max(0.0, budget))} left of the time budget"
        if left == math.inf:  # a budget of hours ends it, which its own line shows
            return ""
        return f", about {duration(left)} left"

    def _budgets(self, used: Numbers, failed: int) -> Iterator[str]:
        tree = self._plan.about.get("space", {})
        hours = used["trial_seconds"] / 3600 * tree.get("workers", 1)
        for name, limit in self._search.budgets.items():
            if name == "time_budget_s":
                yield f"time {duration(used['seconds'])} of {duration(limit)}"
            elif name == "max_failed_trials":
                yield f"{failed} of {limit:g} failures"
            else:
                unit = name.removesuffix("_hours")
                yield f"{hours * tree[f'{unit}s_per_worker']:.2f} of {limit:g} {unit.upper()}-hours"

    def _best_of(self, runs: Sequence[_Run]) -> _Run | None:
        full = [run for run in runs if run.status == "done"]
        ranked = scores.ranked(full, self._metric, lambda run: run.value)
        return next(iter(feasible_first(ranked, self._plan.limits, lambda run: run.last)), None)

    def _best_lines(self, runs: Sequence[_Run], width: int) -> list[str]:
        """Return lines on the best trial of a sweep and its parameters."""
        winner = self._best_of(runs) if self._plan.metric else None
        if winner is None:
            return []
        short = {name.rpartition(".")[2]: value for name, value in winner.parameters.items()}
        values = ", ".join(
            f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {in_yaml(v)}"
            for k, v in short.items()
        )
        limited = met_text(self._plan.limits, winner.last)
        text = f"best: {winner.name}, {self._metric} {winner.value:.4f}"
        text += f", {limited}" if limited else ""
        text += f": {values}" if values else ""
        return textwrap.wrap(
            text, max(8, width), subsequent_indent="  ", max_lines=2, placeholder=" ..."
        )

    def _rungs(self, runs: Sequence[_Run], width: int) -> list[str]:
        """Count the trials that reached each rung, and those stopped there.

        Neighbouring rungs share a column if there is too little room.
        """
        epochs = max(self._plan.rows.values(), default=0)
        rungs = self._search.stopping.rungs(epochs) if self._plan.kind == "sweep" else []
        if not rungs or not runs:
            return []
        room = (width - 14) // (2 * len(str(epochs)) + 3)  # of ranges, and two blanks before each
        each = math.ceil(len(rungs) / max(1, room - 1))
        groups = [*(rungs[k : k + each] for k in range(0, len(rungs), each)), [epochs]]
        ends = [run.epoch for run in runs if run.status in ("stopped", "paused")]
        pauses = isinstance(self._search.stopping, Pausing)
        ranges = [str(g[0]) if len(g) == 1 else f"{g[0]}-{g[-1]}" for g in groups]
        came = [str(sum(run.epoch >= g[0] for run in runs)) for g in groups]
        stopped = [str(sum(g[0] <= epoch <= g[-1] for epoch in ends)) for g in groups[:-1]]
        table = (
            ["rung at epoch", *ranges],
            ["  came there", *came],
            ["  paused there" if pauses else "  were stopped", *stopped, ""],
        )
        return in_columns(map("\t".join, table))

    def _rows(self, runs: Sequence[_Run], width: int, *, most: int) -> list[str]:
        """Return a line for each objective or arm.

        Of many, those that run or ran last, and a line that counts the rest.
        """
        by_row: dict[str, list[_Run]] = {row: [] for row in self._plan.rows}
        for run in runs:
            by_row.setdefault(run.row, []).append(run)
        shown = _latest(list(by_row), runs, most)
        ce = self._best_of(by_row.get("ce", []))
        versus = self._plan.metric is not None and "ce" in by_row and len(by_row) > 1
        head = fitted(f"best {self._metric}", 17) if self._plan.metric else f"least {self._metric}"
        table = [f"\tfull\tstopped\tfailed\t{head}" + "\tvs ce" * versus]
        for row in shown:
            count, best = Counter(run.status for run in by_row[row]), self._best_of(by_row[row])
            value = f"{best.value:.4f}" if best else ""
            lead = f"{best.value - ce.value:+.4f}" if best and ce and best is not ce else ""
            text = f"{count['done']}\t{count['stopped']}\t{count['failed']}\t{value}"
            table.append(f"{on_one_line(row)}\t{text}" + f"\t{lead}" * versus)
        head, *lines = in_columns(table, width - 20 if width < 120 else width - 50)
        lines = [f"{head}  running", *lines]
        for place, row in enumerate(shown, start=1):
            running = self._running(by_row[row], width - cell_len(head) - 2)
            lines[place] = f"{set_cell_size(lines[place], cell_len(head))}  {running}"
        if hidden := [row for row in by_row if row not in shown]:
            begun = sum(bool(by_row[row]) for row in hidden)
            lines.append(f"and {len(hidden)} more, of which {begun} have begun")
        return lines

    def _running(self, runs: Sequence[_Run], width: int) -> str:
        """Return the running trials of a row, as many as fit."""
        texts = []
        for run in (run for run in runs if run.status == "running"):
            name = (
                run.name.split("-")[0]
                if self._plan.kind == "sweep"
                else run.name.removeprefix(f"{run.row}-")
            )
            value = f" {run.value:.4f}" if width >= 60 and math.isfinite(run.value) else ""
            texts.append(f"{name} {run.epoch}/{run.epochs}{value}")
        for shown in range(len(texts), 0, -1):
            more = f" +{len(texts) - shown}" if shown < len(texts) else ""
            text = ", ".join(texts[:shown]) + more
            if len(text) <= width or shown == 1:
                return text
        return ""

    def __getstate__(self) -> Tree:
        return {
            **super().__getstate__(),
            "_live": None,
            "_cell": None,
            "_console": None,
            "stops": None,
        }


SHOWN_BUDGETS = ("time_budget_s", "gpu_hours", "cpu_hours", "max_failed_trials")


class _Cell:
    """One output of a notebook's cell, updated in place. It needs IPython alone, no widgets."""

    def __init__(self) -> None:
        self._handle: Any = None

    def show(self, lines: Sequence[str]) -> None:
        """Replace the output."""
        from IPython import display

        text = "\n".join(lines)
        both = {"text/plain": text, "text/html": f"<pre>{html.escape(text)}</pre>"}
        if self._handle is None:
            self._handle = display.display(both, raw=True, display_id=True)  # type: ignore[no-untyped-call]
        else:
            self._handle.update(both, raw=True)


def _number_cell(metrics: Values, name: str) -> float:
    value = metrics.get(name)
    return math.nan if value is None else float(value)
