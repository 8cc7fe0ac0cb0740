"""Figures of a sweep, as data: `page` draws them."""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tfkd_ray.settings.errors import some_of
from tfkd_ray.show.page import DARK, PALE, Axis, Figure, Panel, Series, escaped
from tfkd_ray.show.receipt import MIN_TRIALS, fidelity_warnings, rank_correlations, value_at_rung
from tfkd_ray.show.status import ExperimentPlan, read_lasts
from tfkd_ray.space.ranges import Choices, Range
from tfkd_ray.space.relate import lies_in
from tfkd_ray.space.space import Parameter, Space, build_space
from tfkd_ray.store.experiment import Record, pareto, ranked_trials, read_metrics
from tfkd_ray.verdict.limits import Limits
from tfkd_ray.verdict.scores import score_of

MAX_CURVES = 200
"""Most trials whose epochs are drawn, over all objectives."""
MAX_POINTS = 100
"""Most epochs drawn of one trial."""
MAX_FOREST = 150
"""Most trials from which importance is computed."""
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8A6D3B", "#555555")
RANKED = ("#FDE725", "#5EC962", "#21918C", "#3B528B", "#440154")
"""Colours from the last rank to the first: viridis."""
LUCK = "the best of many trials looks better than it is (selection bias)"


@dataclass(frozen=True)
class Sweep:
    """A sweep with all epochs of its trials."""

    plan: ExperimentPlan
    space: Space
    records: Sequence[Record]

    @property
    def metric(self) -> str:
        assert self.plan.metric is not None, f"{self.plan=}"
        return self.plan.metric

    @property
    def full(self) -> list[Record]:
        """Trials of full length with a finite value, by number."""
        return sorted(self.ranked(self.records), key=lambda r: r.number)

    def of(self, objective: str, records: Sequence[Record]) -> list[Record]:
        return [r for r in records if r.objective == objective]

    def full_of(self, objective: str) -> list[Record]:
        return self.of(objective, self.full)

    def inside(self, objective: str) -> list[Record]:
        """Full-length trials that lie in the space as it is now.

        Of a sweep that went on in a wider or narrower one, others lie outside.
        """
        branch = next(b for b in self.space.branches if b.objective == objective)
        return [r for r in self.full_of(objective) if lies_in(branch, r.parameters)]

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
        return COLOURS[list(self.plan.rows).index(objective) % len(COLOURS)]

    def axis(self, metric: str | None = None) -> Axis:
        row = score_of(metric or self.metric)
        return Axis(f"{row.title}, {row.unit}")

    def hover(self, record: Record) -> str:
        settings = ", ".join(
            f"{short_name(k)} {number_text(v)}" for k, v in record.parameters.items()
        )
        return f"{record.name}: {trial_value(self, record)}<br>{escaped(settings)}"


def read_sweep(experiment: Path, plan: ExperimentPlan) -> Sweep:
    records = []
    for record in read_lasts(experiment):
        records.append(replace(record, metrics=read_metrics(record.folder)))
    return Sweep(plan, build_space(plan.about["space"], experiment / "experiment.yaml"), records)


# --- figures of a sweep ----------------------------------------------------------------------------------------


def parallel(sweep: Sweep) -> Figure:
    full = [sweep.value(r.last) for r in sweep.full]
    low, high = (min(full), max(full)) if full else (0.0, 1.0)
    return Figure(
        "parallel",
        "Parallel coordinates",
        "Each line is one trial: it crosses every upright axis at the trial's setting, and the last one at its value "
        f"({sweep.axis().label}); dark lines are the best. Trials stopped early are grey and have no value.",
        [
            _parallel_panel(sweep, objective, low, high)
            for objective in sweep.plan.rows
            if _searched(sweep, objective)
        ],
        wide=True,
    )


def _parallel_panel(sweep: Sweep, objective: str, low: float, high: float) -> Panel:
    searched = _searched(sweep, objective)
    last = len(searched)
    full = sweep.ranked(sweep.full_of(objective))
    other = [r for r in sweep.of(objective, sweep.records) if r not in full]

    def line(record: Record) -> Iterator[tuple[float, float | None, str]]:
        """Yield the heights of one trial on the axes, in [0, 1]."""
        heights: list[float | None] = [
            _axis_place(p, record.parameters.get(p.name)) for p in searched
        ]
        value = (sweep.value(record.last) - low) / (high - low) if high > low else 0.5
        heights.append(value if record in full else None)
        hover = sweep.hover(record)
        yield from ((axis, height, hover) for axis, height in enumerate(heights))

    series = [_broken_line("not of full length", other, line, PALE, 0.8)] if other else []
    groups = min(len(RANKED), len(full))
    for k in reversed(range(groups)):  # draws the best last, on top
        some = full[k * len(full) // groups : (k + 1) * len(full) // groups]
        first = k * len(full) // groups + 1
        name = f"rank {first}" if len(some) == 1 else f"rank {first} to {first + len(some) - 1}"
        colour = RANKED[::-1][k * len(RANKED) // groups]
        series.append(_broken_line(name, some, line, colour, 1.6))
    ends = [_ends(p) for p in searched] + [(f"{low:.2f}", f"{high:.2f}")]
    series.append(Series("text", [float(i) for i in range(last + 1)] * 2, [-0.1] * (last + 1) + [1.1] * (last + 1),
                         text=[e[0] for e in ends] + [e[1] for e in ends]))  # fmt: skip
    names = [
        short_name(p.name)
        .replace("weight_decay", "weight<br>decay")
        .replace("correct_prob", "correct<br>prob")
        for p in searched
    ]
    ticks = (
        *((float(i), name) for i, name in enumerate(names)),
        (float(last), f"value, {score_of(sweep.metric).unit}"),
    )
    return Panel(
        objective,
        Axis("searched settings", ticks=ticks, span=(-0.4, last + 0.4)),
        Axis("place in its range", ticks=((0.0, "low"), (1.0, "high")), span=(-0.2, 1.2)),
        series,
        [(float(i), "") for i in range(last + 1)],
    )


def _broken_line(
    name: str,
    records: Sequence[Record],
    points: Callable[[Record], Iterable[tuple[float, float | None, str]]],
    colour: str,
    width: float,
) -> Series:
    """Return one broken line for many trials; `points`: x, y and the text of a trial's."""
    x: list[float | None] = []
    y: list[float | None] = []
    text: list[str] = []
    for record in records:
        for across, up, hover in points(record):
            x.append(across)
            y.append(up)
            text.append(hover)
        x.append(None)
        y.append(None)
        text.append("")
    return Series("lines", x, y, name, colour, text, width)


def slices(sweep: Sweep) -> Figure:
    panels = []
    shared = [p for p in sweep.space.parameters if p.path[0] != "objective"]
    for objective in sweep.plan.rows:
        for p in _searched(sweep, objective):
            if p not in shared:
                panels.append(_slice(sweep, p, [objective], f"{objective}: {short_name(p.name)}"))
    panels += [_slice(sweep, p, list(sweep.plan.rows), p.name) for p in shared]
    return Figure(
        "slices",
        "Slices",
        "Each point is one trial of full length: its value over one of its settings; all other settings differ from "
        "point to point, too, so a trend is a hint and no more.",
        panels if sweep.full else [],
    )


def _slice(sweep: Sweep, p: Parameter, objectives: Sequence[str], title: str) -> Panel:
    series = []
    for objective in objectives:
        some = [r for r in sweep.full_of(objective) if p.name in r.parameters]
        x = [_at(p, r.parameters[p.name]) for r in some]
        y = [sweep.value(r.last) for r in some]
        series.append(Series("points", x, y, objective if len(objectives) > 1 else "", sweep.colour(objective),
                             [sweep.hover(r) for r in some]))  # fmt: skip
    return Panel(title, _axis(p), sweep.axis(), [s for s in series if s.x], height=280)


def contours(sweep: Sweep) -> Figure:
    panels, few = [], []
    for objective in sweep.plan.rows:
        searched = {
            p.name.rpartition(".")[2]: p
            for p in _searched(sweep, objective)
            if p.path[0] == "objective"
        }
        t, alpha = searched.get("temperature"), searched.get("alpha")
        if t is None or alpha is None or not all(isinstance(p.domain, Range) for p in (t, alpha)):
            continue  # nothing lies between choices
        full = sweep.inside(objective)
        panel = _contour(sweep, objective, t, alpha, full) if len(full) >= MIN_TRIALS else None
        if panel:
            panels.append(panel)
        else:
            few.append(f"{objective} ({len(full)})")
    sentence = (
        "Colour is the value, interpolated between the trials of full length (points); the other settings differ "
        "between them, and where no trial is near there is no colour."
    )
    return Figure("contour", "Temperature against alpha", _but_few(sentence, panels, few), panels)


def _contour(
    sweep: Sweep, objective: str, t: Parameter, alpha: Parameter, full: Sequence[Record]
) -> Panel | None:
    from scipy.interpolate import griddata
    from scipy.spatial import QhullError

    points = np.array(
        [[_axis_place(p, r.parameters[p.name]) for p in (t, alpha)] for r in full], dtype=float
    )
    values = [sweep.value(r.last) for r in full]
    grid = np.linspace(0, 1, 25)
    try:
        z = griddata(points, values, (grid[None, :], grid[:, None]), method="linear")
    except QhullError:  # all points are on one line
        return None
    x, y = (_positions(p, grid.tolist()) for p in (t, alpha))
    cells = [[float(v) if math.isfinite(v) else None for v in row] for row in z]
    dots = Series("points", [_at(t, r.parameters[t.name]) for r in full],
                  [_at(alpha, r.parameters[alpha.name]) for r in full],
                  text=[sweep.hover(r) for r in full])  # fmt: skip
    return Panel(
        objective, _axis(t), _axis(alpha), [dots], surface=(x, y, cells, sweep.axis().label)
    )


def importance_section(sweep: Sweep) -> Figure:
    panels, few, cut = [], [], False
    for objective in sweep.plan.rows:
        full = sweep.inside(objective)
        searched = [
            p for p in _searched(sweep, objective) if p.within is None
        ]  # settings of every trial
        if len(searched) < 2:
            continue
        if len(full) < MIN_TRIALS:
            few.append(f"{objective} ({len(full)})")
            continue
        cut |= len(full) > MAX_FOREST
        shares = sorted(
            _shares(sweep, searched, _evenly(full, MAX_FOREST)).items(), key=lambda item: item[1]
        )
        ticks = tuple((float(i), short_name(name)) for i, (name, _) in enumerate(shares))
        bars = Series(
            "bars",
            [100 * share for _, share in shares],
            [i for i, _ in ticks],
            colour=sweep.colour(objective),
        )
        height = 130 + 26 * len(shares)
        panels.append(Panel(f"{objective}, {len(full)} trials", Axis("share of the spread, %", span=(0.0, 100.0)),
                            Axis("", ticks=ticks, span=(-0.6, len(shares) - 0.4)), [bars], height=height))  # fmt: skip
    sentence = (
        "Share of the spread of values that each setting explains by itself or with others (Optuna's fANOVA, trials of "
        "full length only); of few trials this is rough, and settings are ranked within their ranges."
    )
    sentence += f" At most {MAX_FOREST} trials of an objective are looked at." if cut else ""
    return Figure("importance", "Importance", _but_few(sentence, panels, few), panels)


def _shares(
    sweep: Sweep, searched: Sequence[Parameter], records: Sequence[Record]
) -> dict[str, float]:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize" if sweep.plan.mode == "max" else "minimize")
    flat = {p.name: optuna.distributions.FloatDistribution(0.0, 1.0) for p in searched}
    for record in records:
        params = {
            p.name: min(1.0, max(0.0, _axis_place(p, record.parameters[p.name]) or 0.0))
            for p in searched
        }
        trial = optuna.trial.create_trial(
            params=params, distributions=flat, value=record.last[sweep.metric]
        )
        study.add_trial(trial)
    if len({record.last[sweep.metric] for record in records}) == 1:  # all are equal
        return dict.fromkeys(flat, 0.0)
    evaluator = optuna.importance.FanovaImportanceEvaluator(n_trees=32, seed=0)
    return {
        k: float(v)
        for k, v in optuna.importance.get_param_importances(study, evaluator=evaluator).items()
    }


def curves(sweep: Sweep) -> Figure:
    share = max(1, MAX_CURVES // len(sweep.plan.rows))
    rungs = sweep.space.rungs
    cut = False
    panels = []

    def curve(record: Record) -> Iterator[tuple[float, float | None, str]]:
        for m in _evenly(record.metrics, MAX_POINTS):
            yield m["epoch"], round(sweep.value(m), 4), record.name

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
        series = [
            _broken_line("not of full length", rest, curve, PALE, 0.8),
            _broken_line("full length", whole, curve, sweep.colour(objective), 1.0),
            _broken_line("best", best, curve, DARK, 2.2),
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
    if cut:
        sentence += f" Of {len(sweep.records):,} trials {MAX_CURVES} or fewer are drawn: the best, and the rest evenly."
    return Figure("curves", f"{name[0].upper()}{name[1:]} over epochs", sentence, panels, wide=True)


def _zoom(sweep: Sweep) -> tuple[float, float] | None:
    """Return the part of the value's axis where trials differ; many first epochs lie below it."""
    early = sorted(sweep.value(r.metrics[len(r.metrics) // 9]) for r in sweep.full)
    if not early or sweep.plan.mode == "min":
        return None
    ends = sorted(v for r in sweep.records if r.metrics and math.isfinite(v := sweep.value(r.last)))
    return with_margin([min(early[len(early) // 10], ends[len(ends) // 4]), ends[-1]])


def pareto_section(sweep: Sweep) -> Figure:
    searched = sweep.space.search.metrics
    first, *others = searched if len(searched) > 1 else ("val_accuracy", "val_nll")
    front = pareto(sweep.full, searched, sweep.limits) if len(searched) > 1 else []
    panels = []
    for other in others:
        lasts = (record.last for record in sweep.full)
        if any(_has_numbers(last, (first, other)) for last in lasts):
            panels.append(_front_panel(sweep, first, other))
    names = [score_of(m).title for m in (first, *others)]
    many = f" Of all {len(searched)} together the front is: {some_of([r.name for r in front], 10)}."
    return Figure(
        "pareto",
        f"{names[0][0].upper()}{names[0][1:]} against {' and '.join(names[1:])}",
        "Each point is a trial of full length; those on the line are beaten by no other in both."
        + (many if front else ""),
        panels,
    )


def _has_numbers(last: Mapping[str, Any], metrics: Sequence[str]) -> bool:
    return all(math.isfinite(last.get(metric, math.nan)) for metric in metrics)


def _front_panel(sweep: Sweep, first: str, other: str) -> Panel:
    """Return the trials by two metrics, with the line of those that none beats in both."""
    some = [record for record in sweep.full if _has_numbers(record.last, (first, other))]

    def points(records: Sequence[Record]) -> tuple[list[float], list[float]]:
        x, y = ([sweep.value(r.last, metric) for r in records] for metric in (other, first))
        return x, y

    series = [Series("lines", *points(pareto(some, (first, other))), "front", DARK, width=1.2)]
    for objective in sweep.plan.rows:
        mine = sweep.of(objective, some)
        hover = [sweep.hover(record) for record in mine]
        colour = sweep.colour(objective)
        series.append(Series("points", *points(mine), objective, colour, hover))
    shown = [one for one in series if one.x]
    return Panel("all objectives", sweep.axis(other), sweep.axis(first), shown)


def fidelity(sweep: Sweep) -> Figure:
    ranks = {
        (found.objective, found.rung): found
        for found in rank_correlations(sweep.space, sweep.records)
    }
    panels: list[Panel] = []
    few = sorted({f"{o} ({len(sweep.full_of(o))})" for o in sweep.plan.rows
                  if len(sweep.full_of(o)) < MIN_TRIALS})  # fmt: skip
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
                    [sweep.hover(p[2]) for p in pairs],
                )
            )
        if series:
            axis = replace(sweep.axis(), label=f"{sweep.axis().label}, after {rung} epochs")
            panels.append(Panel(f"rung at {rung} epochs", axis, sweep.axis(), series))
    warnings = [
        f" Warning: {warning}." for warning in fidelity_warnings(sweep.space, sweep.records)
    ]
    sentence = (
        "The value at a rung against the final one, over trials of full length; the legend has Spearman's rank "
        "correlation (1: the rung ranks trials as the end does). Trials that a rung stopped have no final value, and "
        "over the survivors a correlation is lower than over all that came to the rung; a second number is "
        "corrected for that." + "".join(warnings)
    )
    if not sweep.space.rungs:
        return Figure(
            "fidelity",
            "Do the rungs rank right?",
            "This sweep has no rungs: every trial runs its full length.",
        )
    return Figure("fidelity", "Do the rungs rank right?", _but_few(sentence, panels, few), panels)


def _but_few(sentence: str, panels: Sequence[Panel], few: Sequence[str]) -> str:
    """Return the sentence, followed by the objectives that have too few trials."""
    if not panels and not few:
        return "Nothing that is searched here can be shown in this way."
    lacking = (
        f"Fewer than {MIN_TRIALS} trials of full length, too few to tell: {', '.join(few)}."
        if few
        else ""
    )
    return f"{sentence} {lacking}".strip() if panels else lacking


def _searched(sweep: Sweep, objective: str) -> list[Parameter]:
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
    """Return a trial's value with its unit; below full length, the last one with its epoch."""
    value = sweep.value(record.last)
    if not math.isfinite(value):
        return "no value"
    shown = score_of(sweep.metric).show(record.last[sweep.metric])
    return shown if record.status == "done" else f"{shown} after epoch {record.last['epoch']:.0f}"
