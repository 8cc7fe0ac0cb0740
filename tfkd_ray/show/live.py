"""The live view of a sweep: one screen on a terminal, one updating output in a notebook, or one line
per event in a pipe.

The plan is read from the experiment. The view goes to standard error; `tfkd tune` prints its
results to standard output at the end. The last screen stays. To show more, add a line to
`Progress.screen`. Colours are those of the report; nothing is said by colour alone.
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

from rich.cells import cell_len
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from tfkd_ray.settings import own_code
from tfkd_ray.settings.columns import fitted, folded, in_columns, on_one_line
from tfkd_ray.settings.files import legible
from tfkd_ray.settings.schema import validated
from tfkd_ray.settings.yaml import Numbers, Tree, Values, in_yaml
from tfkd_ray.show.colours import objective_colour
from tfkd_ray.show.listener import OwnCallback
from tfkd_ray.show.pace import Begun, Pace, epochs_left
from tfkd_ray.show.running_arms import ArmSoFar, baselines_by_arm, table_of_arms
from tfkd_ray.show.status import (
    ExperimentPlan,
    counted,
    duration,
    error_text,
    further_line,
    read_plan,
    spent,
)
from tfkd_ray.show.waiting import FRAMES, Waiting
from tfkd_ray.space.arms import Arms
from tfkd_ray.space.search_config import Pausing, SearchConfig
from tfkd_ray.store.assignment import assigned
from tfkd_ray.store.ended import in_full, read_briefs
from tfkd_ray.store.experiment import (
    FULL_LENGTH,
    STATUSES,
    STOPPED_BY,
    Record,
    means_of,
    read_record,
)
from tfkd_ray.verdict import scores
from tfkd_ray.verdict.limits import feasible_first, met_text

_AGAIN = {"running": "started again", "paused": "goes on"}
"""What a trial does that starts, by what it was."""
REFRESH_S = 0.25
"""Least seconds between two drawings."""
DRAWING = 0.05
"""Most of the driver's time that is spent on drawing: of very many trials, it takes long."""
NODES_S = 5
"""Seconds between questions to the autoscaler about starting nodes, while no trial trains."""
SPEED_EPOCHS = 200
"""Number of epochs, the latest of all trials together, over which speed is measured."""
NOTEBOOK = (110, 30)
"""Columns and lines in a notebook."""
WITH_SETTINGS = 100
"""Columns from which on the settings of running trials are shown."""
SPARKS = "▁▂▃▄▅▆▇█"


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
    last: Numbers = field(default_factory=dict)
    """Metrics of its last epoch, as far as they judge it."""
    objective: str = ""
    of: str | None = None
    """The trial of which it is a run with a further seed."""
    seeds: int = 0
    """Number of further seeds that this trial gets."""

    @property
    def begun(self) -> Begun:
        """What the estimate of the time left needs."""
        return Begun(self.row, self.epoch, self.epochs, self.status)


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


def bar(share: float, width: int, *, ascii_only: bool = False) -> tuple[str, str]:
    """Return the full and the empty part of a bar of so many columns."""
    full, empty = ("#", "-") if ascii_only else ("━", "─")
    n = round(width * min(1.0, max(0.0, share)))
    return full * n, empty * (width - n)


def sparkline(values: Sequence[float], width: int) -> str:
    """Return values as bars of one column each; of more than fit, the last of each group."""
    each = math.ceil(len(values) / max(1, width))
    shown = list(values[::-1][::each][::-1])
    low, high = min(shown), max(shown)
    if high == low:
        return SPARKS[3] * len(shown)
    return "".join(SPARKS[round((v - low) / (high - low) * (len(SPARKS) - 1))] for v in shown)


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
        self._wait = Waiting(self._console)
        self._cell: Any = None
        self._runs: dict[str, _Run] = {}
        self._further: dict[str, dict[str, _Run]] = {}
        self._failures: list[str] = []
        self._notes: list[str] = []
        self._epochs: deque[float] = deque(maxlen=SPEED_EPOCHS)
        self._pace = Pace()
        self._winner: _Run | None = None
        self._bests: list[float] = []
        """The best value after each trial that ended, once one has full length."""
        self._next_drawing = 0.0
        self._next_estimate = 0.0
        self._told_left: float | None = None
        self._looked = -math.inf
        self._waiting = ""
        self.stops: Any = None
        """Has the `reason` why `tfkd stop` ends the sweep; a sweep sets it."""
        self.nodes_starting: Callable[[], list[str]] = list
        """Asks an autoscaler which nodes it is starting; a sweep on a cluster sets it."""

    # --- events

    def on_teacher_epoch(self, run: Any, metrics: Numbers) -> None:
        """Show how far a teacher is, which is trained before the sweep begins."""
        self._wait.on_teacher_epoch(run, metrics)

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
        self._wait.stop()
        self._plan: ExperimentPlan = read_plan(self._experiment)
        self._metric = self._plan.metric or "train_loss"
        self._compared = _compared_metric(self._plan)
        is_sweep = self._plan.kind == "sweep"
        if not is_sweep:
            arms = validated(Arms, self._plan.about["compared"])
            self._baselines = baselines_by_arm(arms)
        search = self._plan.about["space"]["search"] if is_sweep else {}
        self._search = validated(
            SearchConfig, {k: v for k, v in search.items() if k in ("stopping", *SHOWN_BUDGETS)}
        )
        self._start = time.time()
        self._take_up_earlier()
        if self._console.is_jupyter:
            self._cell = _Cell()
        elif self._console.is_terminal and not self._console.is_dumb_terminal:
            self._live = Live(console=self._console, auto_refresh=False)
            self._live.start()
        self._draw(force=True)

    def _take_up_earlier(self) -> None:
        """Take up the results of earlier sessions."""
        trials = read_briefs(self._experiment).records
        for record in (record for trial in trials for record in trial.runs):
            if record.status in ("done", "stopped", "failed", "paused"):
                self._take_up(run := self._earlier(record))
                self._note_best(run)
        best = self._best_of(list(self._runs.values())) if self._plan.metric else None
        for trial in trials:
            if best is not None and trial.name == best.name:  # its parameters are shown
                best.parameters = in_full(trial).parameters

    def _take_up(self, run: _Run) -> None:
        self._runs[run.name] = run
        if run.of is not None:
            self._further.setdefault(run.of, {})[run.name] = run

    def _earlier(self, record: Record) -> _Run:
        """Return a trial of an earlier session."""
        row, last = self._plan.row(record), record.last
        run = _Run(record.name, row, self._plan.rows.get(row, 0), record.parameters)
        run.epoch, run.status = int(last.get("epoch", 0)), record.status
        run.value, run.last, run.objective = (
            _number_cell(last, self._metric),
            last,
            record.objective,
        )
        run.of, run.seeds = record.seed_of, record.seeds
        return run

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
        objective = str(own_code.shown_name(trial.config["objective"]))
        row = assignment.arm or objective
        run = _Run(assignment.name, row, assignment.epochs, dict(assignment.parameters))
        run.epoch, run.value = int(last.get("epoch", 0)), _number_cell(last, self._metric)
        run.last, run.objective = dict(last), objective
        run.of, run.seeds = assignment.seed_of, assignment.seeds or 0
        self._take_up(run)
        self._pace.started(run.name, row, time.monotonic())
        self._say(f"{run.name}: {again}")

    def on_epoch(self, trial: Any, epoch: int, metrics: Values) -> None:
        run = self._run_of(trial)
        if run is not None:
            run.epoch, run.value = epoch, _number_cell(metrics, self._metric)
            kept = [*self._plan.limits, self._compared, self._metric]
            run.last = {name: metrics[name] for name in kept if name in metrics}
            run.images_per_s = _number_cell(metrics, "images_per_s")
            seconds = _number_cell(metrics, "seconds")
            now = time.monotonic()
            if not self._epochs:  # the time before the first epoch is that of its process
                self._epochs.append(now - (0.0 if math.isnan(seconds) else seconds))
            self._epochs.append(now)
            self._pace.epoch(run.name, 0.0 if math.isnan(seconds) else seconds, now)

    def on_result(self, trial: Any, result: Tree) -> None:
        run = self._run_of(trial)
        if run is not None and "note" in result:
            self.note(f"{run.name}: {result['note']}")

    def on_pause(self, trial: Any) -> None:
        run = self._run_of(trial)
        if run is not None:
            run.status = "paused"
            self._pace.ended(run.name)
            self._say(f"{run.name}: paused at epoch {run.epoch}, {self._metric} {run.value:.4f}")

    def on_end(self, trial: Any) -> None:
        self._end(trial, (trial.last_result or {}).get("failed"))

    def on_failed(self, trial: Any) -> None:
        self._end(trial, read_record(assigned(trial).folder).reason or "its process was lost")

    def on_lost(self, trial: Any) -> None:
        name = assigned(trial).name
        self._pace.ended(name)
        self._say(f"{name}: its process was lost; it resumes from its last checkpoint")

    def on_close(self, trials: Sequence[Any]) -> None:
        self._draw(force=True)
        self.stop()

    def _run_of(self, trial: Any) -> _Run | None:
        return self._runs.get(assigned(trial).name)

    def stop(self) -> None:
        """Stop drawing; the last state stays."""
        self._wait.stop()
        if self._live is not None:
            self._live.stop()
            self._live = None
        self._cell = None

    def note(self, text: str) -> None:
        """Show a message that is no event of a trial."""
        if self._cell is not None:
            self._notes.append(text)
        else:
            shown = legible(text)
            if self._console.is_terminal:  # a pipe gets each event on one line
                shown = folded(shown, self._console.width)
            self._console.print(shown, highlight=False, markup=False, soft_wrap=True)

    def _end(self, trial: Any, failed: str | None) -> None:
        run = self._run_of(trial)
        if run is None or run.status not in ("running", "paused"):
            return
        value = f"{self._metric} {run.value:.4f}"
        self._pace.ended(run.name)
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
        self._note_best(run)

    def _note_best(self, ended: _Run) -> None:
        """Note the best value after the end of a trial."""
        if self._plan.metric is None or ended.of is not None:
            return
        before = [] if self._winner is None else [self._winner]
        self._winner = self._best_of([*before, ended])
        if self._winner is not None:
            self._bests.append(self._winner.value)

    def _say(self, text: str) -> None:
        if self._live is None and self._cell is None:
            self.note(text)

    # --- what is shown

    def _draw(self, *, force: bool = False) -> None:
        now = time.monotonic()
        if (self._live is None and self._cell is None) or (not force and now < self._next_drawing):
            return
        if self._live is not None:
            self._live.update(Group(*self.screen(*self._console.size)), refresh=True)
        else:
            self._cell.show(self.lines(*NOTEBOOK))
        self._next_drawing = now + max(REFRESH_S, (time.monotonic() - now) / DRAWING)

    def lines(self, width: int, height: int) -> list[str]:
        """Return the current state as text; see `screen`."""
        return [line.plain for line in self.screen(width, height)]

    def screen(self, width: int, height: int) -> list[Text]:
        """Return the current state as lines that leave at least one of the screen's free."""
        both = list(self._runs.values())
        runs = [run for run in both if run.of is None]
        count = Counter(run.status for run in runs)
        going = sum(run.status == "running" for run in both)
        failed = sum(run.status == "failed" for run in both)
        used = spent(self._experiment, going, since=self._start)
        left = self._epochs_left(runs) + self._further_left()
        further = going - count["running"]
        lines = [
            self._title(runs, count, further, used, width),
            *self._progress(both, used, left, width),
        ]
        parts = [*self._speed(both), *self._budgets(used, failed)]
        lines += map(Text, self._joined(parts, width))
        below = [*self._best_so_far(width), *map(Text, self._best_lines(runs, width))]
        below += map(Text, self._rungs(runs, width))
        below += map(Text, self._further_lines())
        if self._plan.metric is None:
            below += [Text(line, "dim") for line in _NO_VERDICT[self._compared]]
        below += [Text(text) for text in self._waits(runs)]
        below += [Text(f"failed: {text}", "red") for text in self._failures[-3:]]
        below += map(Text, self._notes[-2:])
        room = max(3, height - len(lines) - len(below) - 4)
        rows = self._rows(runs, width, most=max(3, room - min(going, max(2, room // 3)) - 1))
        trials = self._running(both, width, most=max(1, room - len(rows) - 1))
        lines += [Text(""), *rows, *([Text("")] if trials else []), *trials]
        lines += [Text(""), *below] if below else []
        shown = lines[: max(1, height - 1)]
        for line in shown:
            line.no_wrap = True
            line.rstrip()
            line.truncate(width, overflow="ellipsis")
        return shown

    def _title(
        self, runs: Sequence[_Run], count: Counter[str], further: int, used: Numbers, width: int
    ) -> Text:
        """Return the first line: how many trials, and runs with further seeds, there are."""
        over = count["done"] + count["stopped"] + count["failed"]
        planned = "" if self._plan.trials is None else f" of {self._plan.trials:,}"
        paused = f"{count['paused']:,} paused, " if count["paused"] else ""
        more = f"{counted(further, 'further seed')} running, " if further else ""
        title = f"{over:,}{planned} trials, {count['running']} running, {paused}{more}"
        title += duration(used["seconds"]) + self._left(runs, used)
        name = fitted(self._experiment.absolute().name, max(8, width - len(title) - 2))
        return Text(f"{name}: {title}", "bold")

    def _epochs_left(self, runs: Sequence[_Run]) -> float:
        """Return the epochs that are expected still; inf if a budget alone ends the sweep."""
        if self._plan.trials is None:
            return math.inf
        begun = [run.begun for run in runs]
        return epochs_left(begun, self._plan.not_begun(b.row for b in begun), self._plan.rule)

    def _progress(
        self, runs: Sequence[_Run], used: Numbers, left: float, width: int
    ) -> Iterator[Text]:
        """Yield a bar: the share of the expected epochs that is done, or of the time budget."""
        done = sum(run.epoch for run in runs)
        if left < math.inf:
            share = done / (done + left) if done + left else 1.0
        elif self._search.time_budget_s:
            share = used["seconds"] / self._search.time_budget_s
        else:
            return
        text = f" {min(1.0, share) * 100:3.0f} %"
        yield self._bar(share, max(4, min(width, WITH_SETTINGS) - len(text)), "").append(text)

    def _bar(self, share: float, width: int, style: str) -> Text:
        ascii_only = self._console.options.ascii_only
        full, empty = bar(share, width, ascii_only=ascii_only)
        return Text.assemble((full, style), (empty, "dim"))

    def _best_so_far(self, width: int) -> Iterator[Text]:
        """Yield the best value after each ended trial as a sparkline, from the first to the last.

        They are of trials' own runs, while means over further seeds are named as such.
        """
        if len(self._bests) < 2:
            return
        head = "best so far, of single runs" if self._further else "best so far"
        first, last = f"{self._bests[0]:.4f}", f"{self._bests[-1]:.4f}"
        ends = f" {last}" if first == last else f" {first} to {last}"
        line = ""
        if not self._console.options.ascii_only:
            line = " " + sparkline(self._bests, max(4, min(width - len(ends) - len(head) - 2, 60)))
        yield Text(f"{head}{line}{ends}")

    def _waits(self, runs: Sequence[_Run]) -> Iterator[str]:
        """Yield what is waited for while no trial trains."""
        if self._waiting:
            yield f"waiting for nodes: {self._waiting}"
        elif not self._epochs and (self._live is not None or self._cell is not None):
            frame = FRAMES[int(time.monotonic() / REFRESH_S) % len(FRAMES)]
            turning = "..." if self._console.options.ascii_only else frame
            yield f"{turning} processes start and load torch and the data; no epoch has ended yet"

    def _colour(self, row: str, runs: Sequence[_Run]) -> str:
        """Return the colour of a row: that of its objective."""
        if self._plan.kind == "sweep":
            return objective_colour(row, list(self._plan.rows))
        objectives = list(dict.fromkeys(run.objective for run in self._runs.values()))
        return objective_colour(runs[0].objective, objectives) if runs else ""

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

    def told_left(self) -> float | None:
        """Return the seconds left for `tfkd status`; None while they are unknown.

        They are estimated again as often as the view would be drawn.
        """
        now = time.monotonic()
        if self.begun and now >= self._next_estimate:
            runs = [run for run in self._runs.values() if run.of is None]
            left = self._seconds_left(runs)
            self._told_left = None if left is None or left == math.inf else left
            self._next_estimate = now + (time.monotonic() - now) / DRAWING
        return self._told_left

    def _seconds_left(self, runs: Sequence[_Run]) -> float | None:
        """Return the seconds left at this speed; inf if a budget alone ends the sweep."""
        begun = {run.name: run.begun for run in runs}
        new = self._plan.not_begun(b.row for b in begun.values())
        left = self._pace.seconds_left(begun, new, self._plan.rule, time.monotonic())
        is_over = not new and all(run.status not in ("running", "paused") for run in runs)
        if left is None or (is_over and not self._further_left()):
            return None
        if rate := self._rate():
            left += self._further_left() / rate
        return math.inf if self._plan.trials is None else left

    def _left(self, runs: Sequence[_Run], used: Numbers) -> str:
        """Return the remaining time at this speed; empty while the speed is unknown."""
        left = self._seconds_left(runs)
        if left is None:
            return ""
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
        """Return the best trial of full length; those with a mean over further seeds come first."""
        full = [run for run in runs if run.status == "done"]
        ranked = scores.ranked(full, self._metric, lambda run: self._judged(run)[self._metric])
        ranked.sort(key=lambda run: self._metric not in self._means(run))
        return next(iter(feasible_first(ranked, self._plan.limits, self._judged)), None)

    def _means(self, run: _Run) -> Numbers:
        """Return the means of a trial's metrics over its further seeds, once they have ended."""
        return means_of(list(self._further.get(run.name, {}).values()))

    def _judged(self, run: _Run) -> Numbers:
        return {self._metric: run.value, **run.last, **self._means(run)}

    def _most_further(self) -> int:
        """Return how many runs with further seeds there are at most."""
        told = self._plan.finalists
        return 0 if told is None else told["k"] * told["seeds"] * len(self._plan.rows)

    def _further_left(self) -> int:
        """Return the epochs of further seeds that are left, at most."""
        length = max(self._plan.rows.values(), default=0)
        done = sum(run.epoch for runs in self._further.values() for run in runs.values())
        return max(0, self._most_further() * length - done)

    def _further_lines(self) -> list[str]:
        """Return a line on the runs with further seeds, once one has begun."""
        count = Counter(run.status for runs in self._further.values() for run in runs.values())
        if not count:
            return []
        told = {state: count[state] for state in STATUSES}
        return [further_line({"planned": self._most_further(), **told})]

    def _best_lines(self, runs: Sequence[_Run], width: int) -> list[str]:
        """Return lines on the best trial of a sweep and its parameters."""
        winner = self._best_of(runs) if self._plan.metric else None
        if winner is None:
            return []
        values = _settings_of(winner)
        judged = self._judged(winner)
        limited = met_text(self._plan.limits, judged)
        text = f"best: {winner.name}, {self._metric} {judged[self._metric]:.4f}"
        if self._means(winner):
            text += error_text(None, len(self._further[winner.name]))
        text += f", {limited}" if limited else ""
        text += f": {values}" if values else ""
        return textwrap.wrap(
            text, max(8, width), subsequent_indent="  ", max_lines=2, placeholder=" ...",
            break_long_words=False, break_on_hyphens=False,
        )  # fmt: skip

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
            ["  reached it", *came],
            ["  paused there" if pauses else "  were stopped", *stopped, ""],
        )
        return in_columns(map("\t".join, table))

    def _rows(self, runs: Sequence[_Run], width: int, *, most: int) -> list[Text]:
        """Return a line for each objective or arm.

        Of many, those that run or ran last, and a line that counts the rest.
        """
        by_row: dict[str, list[_Run]] = {row: [] for row in self._plan.rows}
        for run in runs:
            by_row.setdefault(run.row, []).append(run)
        shown = _latest(list(by_row), runs, most)
        table = (
            self._table_of_arms(by_row, shown)
            if self._plan.metric is None
            else self._table_of_objectives(by_row, shown)
        )
        dot = "*" if self._console.options.ascii_only else "●"
        head, *lines = in_columns(table, width - 2)
        found = [Text(f"  {head}", "dim")]
        for row, line in zip(shown, lines, strict=True):
            found.append(Text.assemble((dot, self._colour(row, by_row[row])), " ", line))
        if hidden := [row for row in by_row if row not in shown]:
            begun = sum(bool(by_row[row]) for row in hidden)
            found.append(Text(f"and {len(hidden)} more, of which {begun} have begun"))
        return found

    def _table_of_objectives(
        self, by_row: dict[str, list[_Run]], shown: Sequence[str]
    ) -> Iterator[str]:
        ce = self._best_of(by_row.get("ce", []))
        versus = "ce" in by_row and len(by_row) > 1
        head = fitted(f"best {self._metric}", 17)
        yield f"\tfull\tstopped\tfailed\trunning\t{head}" + "\tvs ce" * versus
        for row in shown:
            count, best = Counter(run.status for run in by_row[row]), self._best_of(by_row[row])
            value = f"{self._judged(best)[self._metric]:.4f}" if best else ""
            lead = ""
            if best and ce and best is not ce:
                lead = f"{self._judged(best)[self._metric] - self._judged(ce)[self._metric]:+.4f}"
            counts = [str(count[s]) for s in ("done", "stopped", "failed", "running")]
            yield "\t".join([on_one_line(row), *counts, value]) + f"\t{lead}" * versus

    def _table_of_arms(self, by_row: dict[str, list[_Run]], shown: Sequence[str]) -> Iterator[str]:
        arms = {row: ArmSoFar() for row in by_row}
        for row, runs in by_row.items():
            for run in runs:
                arms[row].counts[run.status] += 1
                value = _number_cell(run.last, self._compared)
                if run.status == "done" and math.isfinite(value):
                    arms[row].values[int(run.parameters["seed"])] = value
        sign = "+-" if self._console.options.ascii_only else "±"
        return table_of_arms(arms, shown, self._baselines, metric=self._compared, plus_minus=sign)

    def _running(self, runs: Sequence[_Run], width: int, *, most: int) -> list[Text]:
        """Return a line for each running trial: how far it is, its value, and its settings."""
        going = [run for run in runs if run.status == "running"]
        shown = going if len(going) <= most else going[: max(1, most - 1)]
        if not shown:
            return []
        longest = max(cell_len(on_one_line(run.name)) for run in shown)
        names = min(longest, max(8, width - 45))
        rows = []
        for run in shown:
            known = run.value if self._plan.metric else _number_cell(run.last, self._compared)
            value = f"{known:.4f}" if math.isfinite(known) else ""
            rows.append(f"{fitted(run.name, names)}\t{run.epoch}/{run.epochs}\t{value}")
        lines = in_columns(["\t\t", *rows])[1:]
        size = max(map(cell_len, lines))
        length = max(4, min(30, (width - size - 2) // (2 if width >= WITH_SETTINGS else 1)))
        found = []
        for run, line in zip(shown, lines, strict=True):
            colour = self._colour(run.row, [run])
            done = self._bar(run.epoch / max(1, run.epochs), length, colour)
            settings = ""
            if width >= WITH_SETTINGS:
                room = width - length - size - 3
                texts = textwrap.wrap(_settings_of(run), room, max_lines=1, placeholder=" ...")
                settings = "".join(texts)
            found.append(Text.assemble(done, " ", line.ljust(size), "  ", (settings, "dim")))
        if len(shown) < len(going):
            found.append(Text(f"and {len(going) - len(shown)} more running trials"))
        return found

    def __getstate__(self) -> Tree:
        return {
            **super().__getstate__(),
            "_live": None,
            "_wait": None,
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


def _settings_of(run: _Run) -> str:
    """Return the searched settings of a trial by their short names."""
    short = {name.rpartition(".")[2]: value for name, value in run.parameters.items()}
    texts = []
    for name, value in short.items():
        shown = f"{value:.3g}" if isinstance(value, float) else in_yaml(value)
        texts.append(f"{name} {shown}")
    return on_one_line(", ".join(texts))


def _compared_metric(plan: ExperimentPlan) -> str:
    """Return by what runs of arms can be compared before the test split is opened.

    Validation if it is held out of training; else the cross-entropy on the images of training, which
    all objectives have, and which says how far a run has fitted them, not how good it is.
    """
    return "val_accuracy" if plan.about.get("hold_out") else "train_ce"


_OVER_SEEDS = "mean and sd over seeds; vs: the same of differences by seed (number of pairs)"
_NO_VERDICT = {
    "val_accuracy": (
        _OVER_SEEDS,
        "not a verdict: accuracy on validation; the test split decides",
    ),
    "train_ce": (
        _OVER_SEEDS,
        "not a verdict: cross-entropy on the images of training; the test split decides",
    ),
}
"""What the table of a comparison shows, and what it is not, by its metric."""


def _number_cell(metrics: Values, name: str) -> float:
    value = metrics.get(name)
    return math.nan if value is None else float(value)
