"""Figures of a sweep, as data: `page` draws them."""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tfkd_ray.settings.errors import some_of
from tfkd_ray.show.colours import objective_colour
from tfkd_ray.show.page import Axis, Figure, Panel, Series, escaped
from tfkd_ray.show.page_script import DARK, PALE_LINE
from tfkd_ray.show.receipt import MIN_TRIALS, fidelity_warnings, rank_correlations, value_at_rung
from tfkd_ray.show.status import ExperimentPlan, counted, read_all, read_lasts
from tfkd_ray.space.ranges import Choices, Range
from tfkd_ray.space.relate import lies_in
from tfkd_ray.space.space import Parameter, Space, build_space
from tfkd_ray.store.ended import are_many, in_full
from tfkd_ray.store.experiment import Record, pareto, ranked_trials, read_metrics
from tfkd_ray.verdict.limits import Limits
from tfkd_ray.verdict.scores import score_of

MAX_CURVES = 200
"""Most trials whose epochs are drawn, over all objectives."""
MAX_POINTS = 100
"""Most epochs drawn of one trial."""
MAX_FOREST = 150
"""Most trials from which importance is computed."""
FEWEST = 5
"""Fewest trials of an objective, at one epoch, over which anything is interpolated or modelled."""
FADED = (1.0, 0.65, 0.45, 0.3, 0.2)
"""Opacity of trials of full length from the first ranks to the last."""
SHOWN_BELOW = ("stopped", "paused", "running", "interrupted")
"""States of trials that are drawn below full length; failed ones are not."""
LUCK = "the best of many trials looks better than it is (selection bias)"


@dataclass(frozen=True)
class Sweep:
    """A sweep with all epochs of its trials."""

    plan: ExperimentPlan
    space: Space
    records: Sequence[Record]
    """The trials that are shown, with all their epochs and those of their further seeds."""
    everything: Sequence[Record] = ()
    """All trials if only a sample is shown, with one line of metrics (see `store.ended`)."""

    @property
    def all(self) -> Sequence[Record]:
        """All trials, for counts and ranks."""
        return self.everything or self.records

    @property
    def metric(self) -> str:
        assert self.plan.metric is not None, f"{self.plan=}"
        return self.plan.metric

    def inside(self, objective: str, records: Sequence[Record]) -> list[Record]:
        """Return an objective's trials that lie in the space as it is now.

        Of a sweep that went on in another space, others lie outside.
        """
        branch = next(b for b in self.space.branches if b.objective == objective)
        return [r for r in self.of(objective, records) if lies_in(branch, r.parameters)]

    def below(self, objective: str) -> list[Record]:
        """Return an objective's trials below full length that have a value to show."""
        mine = self.of(objective, self.records)
        return [r for r in mine if r.status in SHOWN_BELOW and math.isfinite(self.shown(r)[1])]

    def shown(self, record: Record) -> tuple[int, float]:
        """Return (epoch, value in the unit that is shown) at which a trial is drawn.

        Of a trial of full length the last epoch, of others the last rung that they reached; NaN
        before the first. One that `tfkd stop` or a budget ended has the value of its last epoch,
        as has one that was stopped before the first rung. A finalist has the mean over its further
        seeds.
        """
        epoch = int(record.last.get("epoch", 0))
        if record.status == "done":
            return epoch, self.value(record.judged)
        rungs = [rung for rung in self.space.rungs if rung <= epoch]
        if record.status == "stopped" and (record.reason or not rungs):
            return epoch, self.value_at(record, epoch)
        return (rungs[-1], self.value_at(record, rungs[-1])) if rungs else (epoch, math.nan)

    def value_at(self, record: Record, epoch: int) -> float:
        """Return a trial's value after an epoch in the unit that is shown; NaN if it has none."""
        return score_of(self.metric).factor * value_at_rung(self.space, record, epoch)

    def judged(self, objective: str) -> tuple[int, list[tuple[Record, float]]]:
        """Return (epoch, trials of an objective inside of the space with their values there).

        The epoch is the full length if enough trials have it, else the last rung that enough
        reached, else the rung that most reached.
        """
        full = self.inside(objective, self.full)
        found = self.space.epochs, [(r, self.value(r.last)) for r in full]
        for rung in reversed(self.space.rungs):
            if len(found[1]) >= MIN_TRIALS:
                break
            there = [(r, self.value_at(r, rung)) for r in self.inside(objective, self.records)]
            there = [(r, value) for r, value in there if math.isfinite(value)]
            if len(there) > len(found[1]):
                found = rung, there
        return found

    @property
    def full(self) -> list[Record]:
        """Trials of full length with a finite value, by number."""
        return sorted(self.ranked(self.records), key=lambda r: r.number)

    def of(self, objective: str, records: Sequence[Record]) -> list[Record]:
        return [r for r in records if r.objective == objective]

    def full_of(self, objective: str) -> list[Record]:
        return self.of(objective, self.full)

    def value(self, metrics: Mapping[str, float], metric: str | None = None) -> float:
        """Return the metric in the unit that is shown."""
        key = metric or self.metric
        return score_of(key).factor * metrics.get(key, math.nan)

    def ranked(self, records: Sequence[Record]) -> list[Record]:
        """Return the trials of full length with a value, best first."""
        return ranked_trials(records, self.metric, self.limits)

    @property
    def limits(self) -> Limits:
        """Constraints that the best trial should meet."""
        return self.space.search.limits

    def colour(self, objective: str) -> str:
        left_out = (record.objective for record in self.records)
        return objective_colour(objective, list(dict.fromkeys([*self.plan.rows, *left_out])))

    def axis(self, metric: str | None = None) -> Axis:
        row = score_of(metric or self.metric)
        return Axis(f"{row.title}, {row.unit}")

    def hover(self, record: Record) -> str:
        """Return what is shown of a trial where it is pointed at, as HTML of plotly's labels."""
        epoch, value = self.shown(record)
        unit = score_of(self.metric).unit
        at = f"{value:.4g} {unit} after epoch {epoch}" if math.isfinite(value) else "no value"
        if record.status != "done":
            at += f", {record.status}"
        elif self.metric in record.means:
            at += f", mean of {counted(len(record.further), 'further seed')}"
        lines = [f"{record.name}: {at}"]
        lines += [f"{name}: {number_text(v)}" for name, v in record.parameters.items()]
        return "<br>".join(map(escaped, lines))


def read_sweep(experiment: Path, plan: ExperimentPlan) -> Sweep:
    space = build_space(plan.about["space"], experiment / "experiment.yaml")
    if are_many(experiment):
        everything, _ = read_all(experiment)
        shown = _sample(everything, list(plan.rows), plan.metric or "", plan.limits)
        return Sweep(plan, space, list(map(in_full, shown)), everything)
    records = []
    for record in read_lasts(experiment):
        further = tuple(replace(run, metrics=read_metrics(run.folder)) for run in record.further)
        records.append(replace(record, metrics=read_metrics(record.folder), further=further))
    return Sweep(plan, space, records)


MOST_BEST, MOST_OTHERS = 500, 1_000
"""Trials that a report shows of more than it can show: the best of each objective, with equal shares,
and others, evenly by their numbers."""


def _sample(
    records: Sequence[Record], objectives: Sequence[str], metric: str, limits: Limits
) -> list[Record]:
    """Return the trials that a report shows of many, by number."""
    kept: dict[int, Record] = {}
    for objective in objectives:
        mine = [record for record in records if record.objective == objective]
        best = ranked_trials(mine, metric, limits)[: MOST_BEST // len(objectives)]
        kept |= {record.number: record for record in best}
    others = [record for record in records if record.number not in kept]
    every = max(1, math.ceil(len(others) / MOST_OTHERS))
    kept |= {record.number: record for record in others[::every]}
    return sorted(kept.values(), key=lambda record: record.number)


# --- figures of a sweep ----------------------------------------------------------------------------------------


def parallel(sweep: Sweep) -> Figure:
    drawn = [
        sweep.shown(r)[1]
        for objective in sweep.plan.rows
        for r in (*sweep.full_of(objective), *sweep.below(objective))
    ]
    low, high = (min(drawn), max(drawn)) if drawn else (0.0, 1.0)
    below = any(map(sweep.below, sweep.plan.rows))
    sentence = (
        "Each line is one trial. It crosses each vertical axis at the trial's setting, and the last axis at its value "
        f"({sweep.axis().label}). The strongest lines are the best trials."
    )
    sentence += (
        " Dotted lines are trials below full length, with their value at the last rung."
        if below
        else ""
    )
    panels = [
        _parallel_panel(sweep, objective, low, high)
        for objective in sweep.plan.rows
        if searched_of(sweep, objective)
    ]
    return Figure("parallel", "Parallel coordinates", sentence, panels if drawn else [], wide=True)


def _parallel_panel(sweep: Sweep, objective: str, low: float, high: float) -> Panel:
    searched = searched_of(sweep, objective)
    last = len(searched)
    full, below = sweep.ranked(sweep.full_of(objective)), sweep.below(objective)
    colour = sweep.colour(objective)

    def line(record: Record) -> Iterator[tuple[float, float | None]]:
        """Yield the heights of one trial on the axes, in [0, 1]."""
        heights: list[float | None] = [
            _axis_place(p, record.parameters.get(p.name)) for p in searched
        ]
        heights.append((sweep.shown(record)[1] - low) / (high - low) if high > low else 0.5)
        yield from ((float(axis), height) for axis, height in enumerate(heights))

    ups: list[float | None] = [0.0, 1.0, None]
    across = [x for axis in range(last + 1) for x in (float(axis), float(axis), None)]
    series = [Series("lines", across, ups * (last + 1), colour=PALE_LINE, width=1.0)]
    if below:
        lines = _broken_line("below full length", below, line, colour, 1.4)
        series.append(replace(lines, hollow=True, opacity=0.6))
    groups = min(len(FADED), len(full))
    for k in reversed(range(groups)):  # draws the best last, on top
        some = full[k * len(full) // groups : (k + 1) * len(full) // groups]
        first = k * len(full) // groups + 1
        name = f"rank {first}" if len(some) == 1 else f"rank {first} to {first + len(some) - 1}"
        lines = _broken_line(name, some, line, colour, 1.6 if k else 2.6)
        series.append(replace(lines, opacity=FADED[k]))
    ends = [_ends(p) for p in searched] + [(f"{low:.2f}", f"{high:.2f}")]
    series.append(Series("text", [float(i) for i in range(last + 1)] * 2, [-0.1] * (last + 1) + [1.1] * (last + 1),
                         text=[e[0] for e in ends] + [e[1] for e in ends]))  # fmt: skip
    between = [
        (float(axis), _axis_place(p, value), number_text(value)[:12])
        for axis, p in enumerate(searched)
        for value in _few_values(p)[1:-1]
    ]
    if between:
        series.append(Series("text", [x - 0.08 for x, _, _ in between], [y for _, y, _ in between],
                             text=[text for _, _, text in between]))  # fmt: skip
    names = [short_name(p.name).replace("_", "<br>") for p in searched]
    ticks = (
        *((float(i), name) for i, name in enumerate(names)),
        (float(last), f"value,<br>{score_of(sweep.metric).unit}"),
    )
    return Panel(
        objective,
        Axis("searched settings", ticks=ticks, span=(-0.4, last + 0.4)),
        Axis("place in its range", ticks=((0.0, "low"), (1.0, "high")), span=(-0.2, 1.2)),
        series,
    )


def _broken_line(
    name: str,
    records: Sequence[Record],
    points: Callable[[Record], Iterable[tuple[float, float | None]]],
    colour: str,
    width: float,
) -> Series:
    """Return one broken line for many trials; `points`: x and y of a trial's."""
    x: list[float | None] = []
    y: list[float | None] = []
    trials: list[int | None] = []
    for record in records:
        for across, up in points(record):
            x.append(across)
            y.append(up)
            trials.append(record.number)
        x.append(None)
        y.append(None)
        trials.append(None)
    return Series("lines", x, y, name, colour, width=width, trials=trials)


def slices(sweep: Sweep) -> Figure:
    panels = []
    shared = [p for p in sweep.space.parameters if p.path[0] != "objective"]
    for objective in sweep.plan.rows:
        for p in searched_of(sweep, objective):
            if p not in shared:
                panels.append(_slice(sweep, p, [objective], f"{objective}: {short_name(p.name)}"))
    panels += [_slice(sweep, p, list(sweep.plan.rows), p.name) for p in shared]
    sentence = (
        "Each point is one trial: its value against one of its settings. All other settings also differ from point to "
        "point, so a trend is only a hint."
    )
    sentence += HOLLOW if any(map(sweep.below, sweep.plan.rows)) else ""
    return Figure("slices", "Slices", sentence, [panel for panel in panels if panel.series])


HOLLOW = " Hollow points are trials below full length, at their value at the last rung."


def _slice(sweep: Sweep, p: Parameter, objectives: Sequence[str], title: str) -> Panel:
    series = []
    for objective in objectives:
        full, below = sweep.full_of(objective), sweep.below(objective)
        name = objective if len(objectives) > 1 else ""
        for some, hollow in ((full, False), (below, True)):
            there = [r for r in some if p.name in r.parameters]
            if there:
                series.append(_dots(sweep, there, p, None, name, hollow=hollow))
                name = ""  # once in the legend
    return Panel(title, _axis(p), sweep.axis(), series, height=280)


def _dots(
    sweep: Sweep, some: Sequence[Record], x: Parameter, y: Parameter | None, name: str, *, hollow: bool
) -> Series:  # fmt: skip
    """Return trials of one objective as points over one setting, or over two (`y`)."""
    across = [_at(x, r.parameters[x.name]) for r in some]
    up = [sweep.shown(r)[1] if y is None else _at(y, r.parameters[y.name]) for r in some]
    colour = sweep.colour(some[0].objective) if y is None else DARK
    return Series("points", across, up, name, colour,
                  trials=[r.number for r in some], hollow=hollow)  # fmt: skip


def contours(sweep: Sweep) -> Figure:
    panels, few = [], []
    for objective in sweep.plan.rows:
        searched = {
            p.name.rpartition(".")[2]: p
            for p in searched_of(sweep, objective)
            if p.path[0] == "objective"
        }
        t, alpha = searched.get("temperature"), searched.get("alpha")
        if t is None or alpha is None or not all(isinstance(p.domain, Range) for p in (t, alpha)):
            continue  # nothing lies between choices
        panel = _contour(sweep, objective, t, alpha)
        if panel:
            panels.append(panel)
        else:
            few.append(objective)
    sentence = (
        "Colour is the value at the epoch in the title, interpolated between the trials that reached it. The other "
        "settings differ from trial to trial. Areas far from any trial have no colour. Points are all trials, hollow "
        "below full length."
    )
    lacking = f"temperature against alpha of {some_of(few)}" if few else ""
    return Figure("contour", "Temperature against alpha", sentence, panels, lacking=lacking)


def _contour(sweep: Sweep, objective: str, t: Parameter, alpha: Parameter) -> Panel | None:
    """Return the surface over T and alpha; None without enough trials."""
    from scipy.interpolate import griddata
    from scipy.spatial import QhullError

    epoch, judged = sweep.judged(objective)
    if len(judged) < FEWEST:
        return None
    points = np.array(
        [[_axis_place(p, r.parameters[p.name]) for p in (t, alpha)] for r, _ in judged], dtype=float
    )
    values = [value for _, value in judged]
    grid = np.linspace(0, 1, 25)
    try:
        z = griddata(points, values, (grid[None, :], grid[:, None]), method="linear")
    except QhullError:  # all points are on one line
        return None
    x, y = (_positions(p, grid.tolist()) for p in (t, alpha))
    cells = [[float(v) if math.isfinite(v) else None for v in row] for row in z]
    all_trials = ((sweep.full_of(objective), False), (sweep.below(objective), True))
    inside = [(sweep.inside(objective, some), hollow) for some, hollow in all_trials]
    dots = [_dots(sweep, some, t, alpha, "", hollow=hollow) for some, hollow in inside if some]
    title = f"{objective}, {len(judged)} trials at epoch {epoch}"
    return Panel(title, _axis(t), _axis(alpha), dots, surface=(x, y, cells, sweep.axis().label))


def importance_section(sweep: Sweep) -> Figure:
    panels, few, cut = [], [], False
    for objective in sweep.plan.rows:
        epoch, judged = sweep.judged(objective)
        searched = [
            p for p in searched_of(sweep, objective) if p.within is None
        ]  # settings of every trial
        if len(searched) < 2:
            continue
        if len(judged) < FEWEST:
            few.append(objective)
            continue
        cut |= len(judged) > MAX_FOREST
        shares = sorted(
            _shares(sweep, searched, _evenly(judged, MAX_FOREST)).items(), key=lambda item: item[1]
        )
        ticks = tuple((float(i), short_name(name)) for i, (name, _) in enumerate(shares))
        bars = Series(
            "bars",
            [100 * share for _, share in shares],
            [i for i, _ in ticks],
            colour=sweep.colour(objective),
        )
        height = 130 + 26 * len(shares)
        title = f"{objective}, {len(judged)} trials at epoch {epoch}"
        panels.append(Panel(title, Axis("share of the spread, %", span=(0.0, 100.0)),
                            Axis("", ticks=ticks, span=(-0.6, len(shares) - 0.4)), [bars], height=height))  # fmt: skip
    sentence = (
        "Share of the spread of values that each setting explains, alone or together with others. The model is "
        "Optuna's fANOVA: a forest over the settings, each scaled to its range. The values are those at the epoch in "
        f"the title: at full length if {MIN_TRIALS} trials of an objective have it, else at a rung. At a rung, trials "
        "that were stopped later also count, and settings that learn fast look better. With few trials, the shares "
        "are rough."
    )
    sentence += f" At most {MAX_FOREST} trials of an objective are used." if cut else ""
    lacking = f"importance of the settings of {some_of(few)}" if few else ""
    return Figure("importance", "Importance", sentence, panels, lacking=lacking)


def _shares(
    sweep: Sweep, searched: Sequence[Parameter], judged: Sequence[tuple[Record, float]]
) -> dict[str, float]:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize" if sweep.plan.mode == "max" else "minimize")
    flat = {p.name: optuna.distributions.FloatDistribution(0.0, 1.0) for p in searched}
    for record, value in judged:
        params = {
            p.name: min(1.0, max(0.0, _axis_place(p, record.parameters[p.name]) or 0.0))
            for p in searched
        }
        study.add_trial(optuna.trial.create_trial(params=params, distributions=flat, value=value))
    if len({value for _, value in judged}) == 1:  # all are equal
        return dict.fromkeys(flat, 0.0)
    evaluator = optuna.importance.FanovaImportanceEvaluator(n_trees=32, seed=0)
    return {
        k: float(v)
        for k, v in optuna.importance.get_param_importances(study, evaluator=evaluator).items()
    }


def epoch_line(sweep: Sweep, record: Record) -> Iterator[tuple[float, float | None]]:
    """Yield (epoch, value) of a trial, of many epochs an even selection."""
    for m in _evenly(record.metrics, MAX_POINTS):
        yield m["epoch"], round(sweep.value(m), 4)


def curves(sweep: Sweep) -> Figure:
    share = max(1, MAX_CURVES // len(sweep.plan.rows))
    rungs = sweep.space.rungs
    cut = False
    panels = []

    def curve(record: Record) -> Iterator[tuple[float, float | None]]:
        return epoch_line(sweep, record)

    for objective in sweep.plan.rows:
        mine = [r for r in sweep.of(objective, sweep.records) if r.metrics]
        full = sweep.ranked(sweep.full_of(objective))
        keep = full[:10]
        drawn = keep + _evenly([r for r in mine if r not in keep], share - len(keep))
        cut |= len(drawn) < len(mine)
        best, whole, rest = (
            full[:1],
            [r for r in drawn if r in full[1:]],
            [r for r in drawn if r not in full],
        )
        colour = sweep.colour(objective)
        series = [
            replace(_broken_line("below full length", rest, curve, colour, 1.0), opacity=0.55),
            replace(_broken_line("full length", whole, curve, colour, 1.4), opacity=0.7),
            _broken_line("best", best, curve, colour, 3.0),
        ]
        if not mine:
            continue
        rules = [(float(rung), f"{rung}") for rung in rungs]
        x, y = (
            Axis("epoch", span=(0.0, float(sweep.space.epochs))),
            replace(sweep.axis(), span=_zoom(sweep)),
        )
        panels.append(Panel(objective, x, y, [s for s in series if s.x], rules))
    name = score_of(sweep.metric).title
    sentence = f"Each line is a trial: its {name} after every epoch."
    if rungs:
        sentence += " Dashed lines are the rungs: only the best trials of an objective continue."
    if any(panel.y.span is not None for panel in panels):
        sentence += " The axis begins where trials differ; early epochs may lie below it."
    if cut:
        sentence += f" Of {len(sweep.records):,} trials {MAX_CURVES} or fewer are drawn: the best, and the rest evenly."
    return Figure("curves", f"{name[0].upper()}{name[1:]} over epochs", sentence, panels, wide=True)


def _zoom(sweep: Sweep) -> tuple[float, float] | None:
    """Return the part of the value's axis where trials differ; many first epochs lie below it."""
    early = sorted(sweep.value(r.metrics[len(r.metrics) // 9]) for r in sweep.full)
    if not early or sweep.plan.mode == "min":
        return None
    ends = sorted(v for r in sweep.records if r.metrics and math.isfinite(v := sweep.value(r.last)))
    every = (sweep.value(metrics) for r in sweep.records for metrics in r.metrics)
    highest = max(v for v in every if math.isfinite(v))
    return with_margin([min(early[len(early) // 10], ends[len(ends) // 4]), highest])


def pareto_section(sweep: Sweep) -> Figure:
    searched = sweep.space.search.metrics
    first, *others = searched if len(searched) > 1 else ("val_accuracy", "val_nll")
    front = pareto(sweep.full, searched, sweep.limits) if len(searched) > 1 else []
    panels = []
    for other in others:
        values = (record.judged for record in sweep.full)
        if any(_has_numbers(found, (first, other)) for found in values):
            panels.append(_front_panel(sweep, first, other))
    names = [score_of(m).title for m in (first, *others)]
    many = f" The Pareto front of {len(searched)} metrics: {some_of([r.name for r in front], 10)}."
    return Figure(
        "pareto",
        f"{names[0][0].upper()}{names[0][1:]} against {' and '.join(names[1:])}",
        "Each point is a trial of full length. No other trial beats a trial on the line in both metrics."
        + (many if front else ""),
        panels,
    )


def _has_numbers(last: Mapping[str, Any], metrics: Sequence[str]) -> bool:
    return all(math.isfinite(last.get(metric, math.nan)) for metric in metrics)


def _front_panel(sweep: Sweep, first: str, other: str) -> Panel:
    """Return the trials by two metrics, with the line of those that none beats in both."""
    some = [record for record in sweep.full if _has_numbers(record.judged, (first, other))]

    def points(records: Sequence[Record]) -> tuple[list[float], list[float]]:
        x, y = ([sweep.value(r.judged, metric) for r in records] for metric in (other, first))
        return x, y

    series = [Series("lines", *points(pareto(some, (first, other))), "front", DARK, width=1.2)]
    for objective in sweep.plan.rows:
        mine = sweep.of(objective, some)
        numbers = [record.number for record in mine]
        colour = sweep.colour(objective)
        series.append(Series("points", *points(mine), objective, colour, trials=numbers))
    shown = [one for one in series if one.x]
    return Panel("all objectives", sweep.axis(other), sweep.axis(first), shown)


def fidelity(sweep: Sweep) -> Figure:
    ranks = {
        (found.objective, found.rung): found
        for found in rank_correlations(sweep.space, sweep.records)
    }
    panels: list[Panel] = []
    few = [o for o in sweep.plan.rows if len(sweep.full_of(o)) < MIN_TRIALS]
    for rung in sweep.space.rungs:
        series = []
        for objective in sweep.plan.rows:
            full, factor = sweep.full_of(objective), score_of(sweep.metric).factor
            there = ((factor * value_at_rung(sweep.space, r, rung), r) for r in full)
            pairs = [(value, sweep.value(r.last), r) for value, r in there if math.isfinite(value)]
            if len(pairs) < MIN_TRIALS:
                continue
            x, y = [p[0] for p in pairs], [p[1] for p in pairs]
            found = ranks.get((objective, rung))
            told = "no spread"
            if found:
                corrected = f", {found.corrected:.2f}" if found.judged > found.n else ""
                told = f"{found.rank:.2f}{corrected} (n = {found.n})"
            name = f"{objective}: {told}"
            series.append(
                Series(
                    "points",
                    x,
                    y,
                    name,
                    sweep.colour(objective),
                    trials=[p[2].number for p in pairs],
                )
            )
        if series:
            axis = replace(sweep.axis(), label=f"{sweep.axis().label}, after {rung} epochs")
            panels.append(Panel(f"rung at {rung} epochs", axis, sweep.axis(), series))
    warnings = [
        f" Warning: {warning}." for warning in fidelity_warnings(sweep.space, sweep.records)
    ]
    sentence = (
        "The value at a rung against the final value, for trials of full length. The legend shows Spearman's rank "
        "correlation (1: both values rank the trials alike). Trials that a rung stopped have no final value, so the "
        "correlation over the survivors is lower than over all trials that reached the rung. The second number "
        "corrects for that." + "".join(warnings)
    )
    lacking = ""
    if sweep.space.rungs and few:
        lacking = f"whether the rungs predict the final ranking of {some_of(few)}"
    return Figure(
        "fidelity", "Do the rungs predict the final ranking?", sentence, panels, lacking=lacking
    )


def searched_of(sweep: Sweep, objective: str) -> list[Parameter]:
    """Return the parameters searched for an objective, its own first."""
    found = [p for b in sweep.space.branches if b.objective == objective for p in b.parameters]
    return sorted(found, key=lambda p: p.path[0] != "objective")


def _axis_place(p: Parameter, value: Any) -> float | None:
    """Return the place of a value in its range or list, 0 to 1; None if it is not in it."""
    if isinstance(p.domain, Choices):
        return p.domain.place(value) if value in p.domain.values else None
    return p.domain.place(value) if isinstance(value, int | float) else None


def _at(p: Parameter, value: Any) -> float:
    """Return a value's position on the axis of `_axis`."""
    if isinstance(p.domain, Choices):
        return float(p.domain.values.index(value)) if value in p.domain.values else math.nan
    return float(p.domain.shown(value))


def _positions(p: Parameter, places: Sequence[float]) -> list[float]:
    """Return positions on a range's axis from places in the range, 0 to 1."""
    assert isinstance(p.domain, Range), f"{p=}"
    return [_at(p, p.domain.at(place)) for place in places]


def _axis(p: Parameter) -> Axis:
    name, domain = short_name(p.name).replace("temperature", "temperature T"), p.domain
    if isinstance(domain, Choices):
        ticks = tuple((float(i), number_text(v)[:24]) for i, v in enumerate(domain.values))
        return Axis(name, ticks=ticks, span=(-0.5, len(ticks) - 0.5))
    low, high = domain.span
    if not domain.logarithmic:
        return Axis(name, span=with_margin([low, high]))
    margin = (high / low) ** 0.05
    span = (low / margin, high * margin)
    return Axis(
        f"{domain.label(name)} (log scale)", log=True, ticks=_log_ticks(low, high), span=span
    )


def _log_ticks(low: float, high: float) -> tuple[tuple[float, str], ...]:
    """Return a few round numbers in a range, for a log scale."""
    decades = math.log10(high / low)
    steps: tuple[int, ...] = (1,)
    if decades < 1.6:
        steps = (1, 2, 5)
    elif decades < 2.6:
        steps = (1, 3)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [step * 10.0**k for k in powers for step in steps]
    return tuple((t, f"{t:g}") for t in ticks if low / 1.001 <= t <= high * 1.001)


def with_margin(values: Sequence[float]) -> tuple[float, float]:
    """Return a span that holds the values, with a margin."""
    low, high = min(values), max(values)
    margin = 0.05 * (high - low) or 0.1
    return low - margin, high + margin


MOST_TICKS = 8
"""Most values of a setting that are all written beside its axis."""


def _few_values(p: Parameter) -> Sequence[Any]:
    """Return all values of a setting that has few, in order; else none."""
    return listed_values(p) if (p.domain.size or math.inf) <= MOST_TICKS else []


def listed_values(p: Parameter) -> Sequence[Any]:
    """Return all values of a setting, in order; empty if they cannot be listed."""
    return p.domain.values if isinstance(p.domain, Choices) else p.domain.points or []


def _ends(p: Parameter) -> tuple[str, str]:
    values = p.domain.probes
    return number_text(values[0])[:12], number_text(values[-1])[:12]


def _evenly(items: Sequence[Any], most: int) -> list[Any]:
    """Return at most so many of the items, evenly spaced, with the first and the last."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / max(1, most - 1))] for i in range(max(0, most))]


def short_name(name: str) -> str:
    """Return the last part of a name: alpha for objective.kd.alpha, lr for optim.lr."""
    return name.rpartition(".")[2]


def number_text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, str):
        return value
    return json.dumps(value)


def trial_value(sweep: Sweep, record: Record) -> str:
    """Return a trial's value with its unit; below full length, the last one with its epoch.

    Of a finalist, the mean over its further seeds, with its standard error.
    """
    value, metric = sweep.value(record.judged), score_of(sweep.metric)
    if not math.isfinite(value):
        return "no value"
    shown = metric.show(record.judged[sweep.metric])
    if sweep.metric in record.means:
        error = record.error(sweep.metric)
        shown += "" if error is None else f" ± {metric.number(error)}"
        return f"{shown} (mean of {counted(len(record.further), 'further seed')})"
    return shown if record.status == "done" else f"{shown} after epoch {record.last['epoch']:.0f}"
