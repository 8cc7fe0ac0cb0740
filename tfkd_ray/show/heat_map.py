"""Two settings against each other, combination by combination: a heat map, a CSV and a LaTeX table.

A `Grid` of a sweep has trials in its cells; one of a comparison has arms, each over its seeds. To
give other experiments a heat map, write a function that returns grids, and call `grid_figure`.
"""

import csv
import io
import json
import math
import re
import statistics
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from tfkd_ray.settings.yaml import Tree, Values
from tfkd_ray.show.figures import Sweep, listed_values, number_text, searched_of, short_name
from tfkd_ray.show.page import Axis, Figure, Heat, Panel
from tfkd_ray.show.status import inert
from tfkd_ray.space.ranges import Choices
from tfkd_ray.space.search_config import Grid
from tfkd_ray.space.space import Parameter
from tfkd_ray.store.experiment import Record
from tfkd_ray.verdict.limits import is_feasible
from tfkd_ray.verdict.scores import Score, score_of, sign

MOST_CELLS_ACROSS = 40
"""Most rows or columns of a heat map."""
FILLED = 0.75
"""Share of the combinations of T and alpha that arms have, from which they are a grid."""
PAIR = ("temperature", "alpha")
"""Settings, down and across, that a paper's grid is over."""
SYMBOLS = {"temperature": "$T$", "alpha": r"$\alpha$"}
"""Names of settings in LaTeX."""


class CellValue(NamedTuple):
    """One value of a cell."""

    name: str
    number: int | None
    """Number of the trial; None of a run that is none."""
    settings: str
    """All else that is searched; equal for runs that differ in their seeds alone."""
    value: float
    """In the recorded unit."""
    epoch: int | None
    """Epoch of the value below full length; None: the last one."""
    rank: tuple[bool, bool] = (True, True)
    """It meets the constraints, and is one of further seeds: both come before any value."""


@dataclass(frozen=True)
class Cell:
    """The runs of one combination: of its other settings, those with the best mean."""

    runs: Sequence[CellValue]
    """One for each seed."""
    tried: int
    """Number of other settings that were tried."""

    @property
    def mean(self) -> float:
        return statistics.fmean(run.value for run in self.runs)

    @property
    def sd(self) -> float | None:
        """Standard deviation over seeds; None of one run."""
        values = [run.value for run in self.runs]
        return statistics.stdev(values) if len(values) > 1 else None

    @property
    def epoch(self) -> int | None:
        """Epoch of the value below full length; None: full length."""
        return self.runs[0].epoch

    @property
    def rank(self) -> tuple[bool, bool]:
        return self.runs[0].rank


@dataclass(frozen=True)
class HeatMap:
    """The values of two settings' combinations."""

    title: str
    metric: str
    """Key of the metric."""
    label: str
    """The metric with its split."""
    names: tuple[str, str]
    """The two settings, down and across."""
    down: Sequence[str]
    across: Sequence[str]
    cells: dict[tuple[int, int], Cell] = field(default_factory=dict)
    """By row and column; a combination without a value is left out."""

    @property
    def score(self) -> Score:
        return score_of(self.metric)

    @cached_property
    def best(self) -> frozenset[tuple[int, int]]:
        """All cells of full length that share the best value; empty if no cell has full length.

        The order is that of `tfkd best`: a cell that meets the constraints, then one of further
        seeds, comes before all others, whatever these show.
        """
        full = {place: cell for place, cell in self.cells.items() if cell.epoch is None}
        if not full:
            return frozenset()
        first = max(full.values(), key=lambda cell: _order(cell, self.score))
        return frozenset(
            place
            for place, cell in full.items()
            if cell.rank == first.rank and math.isclose(cell.mean, first.mean, rel_tol=1e-9)
        )


# --- from a sweep and from a comparison ------------------------------------------------------------------------


def sweep_grids(sweep: Sweep) -> Iterator[HeatMap]:
    """Yield a heat map of each objective whose T and alpha, or two settings of a grid, are lists."""
    for objective in sweep.plan.rows:
        pair = _pair_of(sweep, objective)
        if pair is None:
            continue
        runs: dict[tuple[int, int], list[CellValue]] = {}
        for record in sweep.of(objective, sweep.records):
            place = tuple(_index(p, record.parameters.get(p.name)) for p in pair)
            if None in place or record.status == "failed":
                continue
            names = [p.name for p in pair]
            rest = {k: v for k, v in record.parameters.items() if k not in names}
            for value in _cell_values(sweep, record, _text(rest)):
                runs.setdefault(place, []).append(value)  # type: ignore[arg-type]
        labels = [[number_text(value) for value in listed_values(p)] for p in pair]
        down, across = (short_name(p.name) for p in pair)
        metric = score_of(sweep.metric)
        grid = HeatMap(
            objective, metric.key, metric.title, (down, across), labels[0], labels[1], _cells(runs, metric)
        )  # fmt: skip
        if grid.cells:
            yield grid


def _cell_values(sweep: Sweep, record: Record, settings: str) -> Iterator[CellValue]:
    """Yield a trial's value, or of a finalist those of its further seeds: their mean is its value.

    A trial without a value yields nothing.
    """
    epoch, again = None, sweep.metric in record.means
    values = [(run.name, run.last.get(sweep.metric, math.nan)) for run in (record, *record.further)]
    values = values[1:] if again else values[:1]
    if record.status != "done":
        epoch, shown = sweep.shown(record)
        values = [(record.name, shown / score_of(sweep.metric).factor)]
    rank = (is_feasible(sweep.limits, record.judged), again)
    for name, value in values:
        if math.isfinite(value):
            yield CellValue(name, record.number, settings, value, epoch, rank)


def _arms_with_both(judged: Tree) -> dict[tuple[str, str], list[Tree]]:
    """Return the arms that have T and alpha, by student and objective."""
    groups: dict[tuple[str, str], list[Tree]] = {}
    for arm in judged["arms"]:
        if all(name in arm["objective"] for name in PAIR):
            groups.setdefault((arm["student"], arm["objective"]["name"]), []).append(arm)
    return groups


def arm_grids(judged: Tree) -> Iterator[HeatMap]:
    """Yield a heat map of the arms of one objective and student that differ in T and alpha.

    Arms are a grid if they have two values or more of each, and `FILLED` of the combinations.
    """
    metric = score_of("val_accuracy")
    for (student, objective), arms in _arms_with_both(judged).items():
        values = [sorted({arm["objective"][name] for arm in arms}) for name in PAIR]
        if min(map(len, values)) < 2 or max(map(len, values)) > MOST_CELLS_ACROSS:
            continue
        runs: dict[tuple[int, int], list[CellValue]] = {}
        for arm in arms:
            place = tuple(
                column.index(arm["objective"][name])
                for name, column in zip(PAIR, values, strict=True)
            )
            for run in arm["runs"]:
                if "accuracy" in run:
                    name = f"{arm['name']}, seed {run['seed']}"
                    runs.setdefault(place, []).append(  # type: ignore[arg-type]
                        CellValue(name, None, arm["name"], run["accuracy"], None)
                    )
        if len(runs) < FILLED * len(values[0]) * len(values[1]):
            continue
        labels = [[number_text(value) for value in column] for column in values]
        title = f"{objective}, student {student}"
        yield HeatMap(
            title, metric.key, f"test {metric.label}", PAIR, labels[0], labels[1], _cells(runs, metric)
        )  # fmt: skip


def _pair_of(sweep: Sweep, objective: str) -> tuple[Parameter, Parameter] | None:
    """Return the two settings of an objective's heat map, down and across; None without one."""
    of_grid = isinstance(sweep.space.sampler, Grid)
    listed = [
        p
        for p in searched_of(sweep, objective)
        if (of_grid or isinstance(p.domain, Choices))
        and 2 <= (p.domain.size or 0) <= MOST_CELLS_ACROSS
    ]
    own = {short_name(p.name): p for p in listed if p.path[0] == "objective"}
    if all(name in own for name in PAIR):
        return own[PAIR[0]], own[PAIR[1]]
    return (listed[0], listed[1]) if of_grid and len(listed) > 1 else None


def _index(p: Parameter, value: Any) -> int | None:
    """Return the place of a value among those of a setting; None if it is not one of them."""
    values = listed_values(p)
    if isinstance(p.domain, Choices):
        return values.index(value) if value in values else None
    if not isinstance(value, int | float):
        return None
    return min(range(len(values)), key=lambda k: abs(values[k] - value))


def _text(settings: Values) -> str:
    return json.dumps(settings, sort_keys=True, default=str)


def _cells(
    runs: dict[tuple[int, int], list[CellValue]], metric: Score
) -> dict[tuple[int, int], Cell]:  # fmt: skip
    """Return the cells: of each combination the best other settings, of full length if any are."""
    found = {}
    for place in sorted(runs):
        groups: dict[str, list[CellValue]] = {}
        whole = [run for run in runs[place] if run.epoch is None]
        for run in whole or runs[place]:
            groups.setdefault(run.settings, []).append(run)
        cells = []
        for group in groups.values():
            first = max(run.rank for run in group)
            cells.append(Cell([run for run in group if run.rank == first], len(groups)))
        latest = max(cell.epoch or 0 for cell in cells)
        comparable = [cell for cell in cells if (cell.epoch or 0) == latest]
        found[place] = max(comparable, key=lambda cell: _order(cell, metric))
    return found


def _order(cell: Cell, metric: Score) -> tuple[tuple[bool, bool], float]:
    """Return a key by which better cells are larger."""
    return cell.rank, sign(metric.key) * cell.mean


# --- as a figure, as CSV, and as LaTeX -------------------------------------------------------------------------


def grid_figure(grids: Iterable[HeatMap], key: str = "grid") -> Figure:
    """Return the heat maps as one figure, with a CSV file of all and a LaTeX table of each."""
    grids = list(grids)
    cells = [cell for grid in grids for cell in grid.cells.values()]
    sentence = "Each cell is one combination"
    if grids:
        sentence += (
            f": its {' or '.join(dict.fromkeys(g.label for g in grids))}, {grids[0].score.unit}"
        )
    if seeds := {len(cell.runs) for cell in cells if len(cell.runs) > 1}:
        sentence += f", the mean ± standard deviation over its seeds (n = {_span_text(seeds)})"
    sentence += "; the best is bold."
    if seeds and any(len(cell.runs) == 1 for cell in cells):
        sentence += " Cells without ± are single runs."
    if any(cell.tried > 1 for cell in cells):
        sentence += " Where other settings are searched, too, a cell has the best of them."
    if any(cell.epoch is not None for cell in cells):
        sentence += " Values in brackets are of trials below full length, at their last rung: the others are ahead."
    names = {grid.names for grid in grids}
    title = "Two settings against each other"
    if len(names) == 1:
        down, across = names.pop()
        title = f"{down.capitalize().replace('_', ' ')} against {across.replace('_', ' ')}"
    panels = [Panel(g.title, Axis(_axis_name(g.names[1])), Axis(_axis_name(g.names[0])), [], heat=_heat(g),
                    height=90 + 34 * len(g.down)) for g in grids]  # fmt: skip
    files = {f"{key}.csv": as_csv(grids)} if grids else {}
    for grid in grids:
        stem = re.sub(r"\W+", "-", grid.title).strip("-")
        files[f"{key}-{stem}.tex"] = as_latex(grid)
    return Figure(key, title, sentence, panels, files=files)


def _span_text(numbers: Collection[int]) -> str:
    """Return '2', or '2 to 5'."""
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low} to {high}"


def _axis_name(name: str) -> str:
    return name.replace("temperature", "temperature T")


def _heat(grid: HeatMap) -> Heat:
    def table(of: Any, empty: Any) -> list[list[Any]]:
        rows = range(len(grid.down))
        return [
            [
                of(grid.cells[i, j], i, j) if (i, j) in grid.cells else empty
                for j in range(len(grid.across))
            ]
            for i in rows
        ]

    def text(cell: Cell, i: int, j: int) -> str:
        shown = grid.score.number(cell.mean)
        if cell.epoch is not None:
            return f"({shown})\nepoch {cell.epoch}"
        return shown if cell.sd is None else f"{shown}\n± {grid.score.number(cell.sd)}"

    def about(cell: Cell, i: int, j: int) -> str:
        where = f"{grid.names[0]} {grid.down[i]}, {grid.names[1]} {grid.across[j]}"
        runs = ", ".join(run.name for run in cell.runs)
        n = f" (n = {len(cell.runs)})" if len(cell.runs) > 1 else ""
        best = f"; the best of {cell.tried}" if cell.tried > 1 else ""
        return f"{where}: {grid.score.show(cell.mean)}{n}: {runs}{best}"

    return Heat(
        grid.across,
        grid.down,
        table(lambda cell, i, j: cell.mean, None),
        table(text, ""),
        table(about, ""),
        table(
            lambda cell, i, j: [run.number for run in cell.runs if run.number is not None], []
        ),
        low_is_good=grid.score.direction == "min",
        best=grid.best,
        unit=f"{grid.label}, {grid.score.unit}",
        factor=grid.score.factor,
    )  # fmt: skip


def as_csv(grids: Sequence[HeatMap]) -> str:
    """Return the cells of all grids as CSV, one line each, in the unit that figures show."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    head = "objective,down,down_value,across,across_value,metric,unit,mean,sd,n,tried,epoch,runs"
    writer.writerow(head.split(","))
    for grid in grids:
        for (i, j), cell in grid.cells.items():
            places = [
                *(inert(grid.names[0]), _value_cell(grid.down[i])),
                *(inert(grid.names[1]), _value_cell(grid.across[j])),
            ]
            sd = "" if cell.sd is None else grid.score.number(cell.sd)
            found = [grid.score.number(cell.mean), sd, len(cell.runs), cell.tried, cell.epoch or ""]
            runs = "; ".join(run.name for run in cell.runs)
            metric = [grid.label, grid.score.unit]  # our own words: no formula can be among them
            writer.writerow([inert(grid.title), *places, *metric, *found, inert(runs)])
    return out.getvalue()


def _value_cell(text: str) -> str:
    """Return a setting's value for a spreadsheet; a number, also a negative one, is no formula."""
    return text if _PLAIN_NUMBER.fullmatch(text) else inert(text)


_PLAIN_NUMBER = re.compile(r"[+-]?\d+(\.\d+)?(e[+-]?\d+)?")


def as_latex(grid: HeatMap) -> str:
    """Return a grid as a LaTeX table, the best in bold; the package booktabs draws its rules."""
    down, across = (SYMBOLS.get(name, _latex(name)) for name in grid.names)
    lines = [
        rf"% {grid.title}: {grid.label}, {grid.score.unit}; needs \usepackage{{booktabs}}",
        *_latex_comments(grid),
        rf"\begin{{tabular}}{{l{'r' * len(grid.across)}}}",
        r"\toprule",
        rf" & \multicolumn{{{len(grid.across)}}}{{c}}{{{across}}} \\",
        f"{down} & {' & '.join(map(_latex, grid.across))} \\\\",
        r"\midrule",
    ]
    for i, head in enumerate(grid.down):
        cells = [_latex_cell(grid, i, j) for j in range(len(grid.across))]
        lines.append(f"{_latex(head)} & {' & '.join(cells)} \\\\")
    lines += [r"\bottomrule", r"\end{tabular}"]
    return "\n".join(lines) + "\n"


def _latex_comments(grid: HeatMap) -> Iterator[str]:
    """Yield what the numbers of a table are, for those who write its caption."""
    cells = grid.cells.values()
    if seeds := {len(cell.runs) for cell in cells if len(cell.runs) > 1}:
        yield f"% mean and standard deviation over seeds, n = {_span_text(seeds)}"
        if any(len(cell.runs) == 1 for cell in cells):
            yield "% without a standard deviation: a single run"
    if any(cell.epoch is not None for cell in cells):
        yield "% in brackets: below full length, at the last rung"
    if len(cells) < len(grid.down) * len(grid.across):
        yield "% --: no value"


def _latex_cell(grid: HeatMap, i: int, j: int) -> str:
    cell = grid.cells.get((i, j))
    if cell is None:
        return "--"
    text = grid.score.number(cell.mean)
    if cell.epoch is not None:
        return f"({text})"
    if cell.sd is not None:
        text += rf" \pm {grid.score.number(cell.sd)}"
        return rf"$\mathbf{{{text}}}$" if (i, j) in grid.best else f"${text}$"
    return rf"\textbf{{{text}}}" if (i, j) in grid.best else text


_SPECIAL = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    **{character: f"\\{character}" for character in "&%$#_{}"},
}  # fmt: skip


def _latex(text: str) -> str:
    """Return text as LaTeX prints it."""
    return "".join(_SPECIAL.get(character, character) for character in text)
