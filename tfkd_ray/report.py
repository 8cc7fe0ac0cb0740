"""One HTML file about an experiment that opens from disk, on paper and on a phone; `--figures` writes the plots as SVG.

A report is a list of `Section`s, each of HTML and `Figure`s. A figure says what is drawn and nothing of how; plotly.js
(from the plotly package, once, in the page) and matplotlib both draw it. To add a figure: a function that returns one,
and its place in `_sweep_sections`. The page forbids itself the network, and every script but its own, by a
Content-Security-Policy; all that comes from files is escaped.
"""

import base64
import hashlib
import html
import importlib.util
import json
import math
import os
import shlex
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from tfkd_ray.config import TrainConfig
from tfkd_ray.data import only_reading
from tfkd_ray.experiment import (
    Record,
    check_output,
    check_writable,
    damaged,
    pareto,
    parse_json,
    ranked,
    read_metrics,
    read_text,
    write_output,
)
from tfkd_ray.explain import TOLERANCE, amounts_to
from tfkd_ray.files import descriptor_of, kind_of, whole_file
from tfkd_ray.ranges import Choices, Range
from tfkd_ray.readers import Plan, duration, read_lasts, read_plan, status
from tfkd_ray.receipt import MIN_TRIALS, fidelity_warnings, rank_correlations, receipt, receipt_rows
from tfkd_ray.schema import ConfigError, dump_yaml, validated
from tfkd_ray.scores import score_of
from tfkd_ray.space import Parameter, Space, build_space

MAX_CURVES = 200
"""Most trials whose epochs are drawn, over all objectives."""
MAX_POINTS = 100
"""Most epochs drawn of a trial."""
MAX_FOREST = 150
"""Most trials that importance is computed from."""
MAX_FAILURES = 50
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8A6D3B", "#555555")
RANKED = ("#FDE725", "#5EC962", "#21918C", "#3B528B", "#440154")
"""From the last to the first: viridis."""
PALE, DARK = "#C4C4C4", "#222222"
LUCK = "the luckiest of many trials is always ahead of its true value"


# --- what is drawn ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Axis:
    """One axis of a panel."""

    label: str
    log: bool = False
    ticks: tuple[tuple[float, str], ...] = ()
    """(position, label); empty: numbers."""
    span: tuple[float, float] | None = None
    """What is shown; None: all there is."""


@dataclass(frozen=True)
class Series:
    """Points, lines, horizontal bars or text in a panel. None in `y` breaks a line."""

    kind: str
    x: Sequence[float | None]
    y: Sequence[float | None]
    name: str = ""
    """In the legend; empty: not there."""
    colour: str = DARK
    text: Sequence[str] = ()
    """Of each point: what hovering shows; of kind `text`, what is written."""
    width: float = 1.5
    opacity: float = 1.0


@dataclass(frozen=True)
class Panel:
    """One pair of axes."""

    title: str
    x: Axis
    y: Axis
    series: Sequence[Series]
    rules: Sequence[tuple[float, str]] = ()
    """Vertical dashed lines: position and label."""
    surface: tuple[Sequence[float], Sequence[float], Sequence[Sequence[float | None]], str] | None = None
    """Filled contours: x, y, z by row, and what z is."""
    height: int = 320
    """In pixels."""


@dataclass(frozen=True)
class Figure:
    """A title, a plain sentence, and panels side by side; without panels the sentence says why there are none."""

    key: str
    """Names its SVG file."""
    title: str
    sentence: str
    panels: Sequence[Panel] = ()
    wide: bool = False
    """Its panels need more width."""


@dataclass(frozen=True)
class Section:
    """A heading and what is below it: HTML, and figures."""

    title: str
    parts: Sequence[str | Figure] = field(default_factory=list)


# --- the report ------------------------------------------------------------------------------------------------


@only_reading()
def report(experiment: Path, out: Path, *, figures: Path | None = None, comparisons: Sequence[Path] = ()) -> list[Path]:
    """Write a report on a sweep or on a comparison of arms; returns the files written, the page first.

    Args:
        experiment: its directory.
        out: the HTML file.
        figures: a directory for the same figures as SVG; needs matplotlib.
        comparisons: directories of comparisons that confirm the sweep; their verdicts come first.
    """
    plan = read_plan(experiment)
    for directory in comparisons:
        if read_plan(directory).kind != "comparison":
            raise ConfigError("not a comparison of arms: there is no confirm.yaml in it", directory)
    check_output(out, "-o report.html")
    if figures is not None and importlib.util.find_spec("matplotlib") is None:
        raise ConfigError(
            "--figures: SVG files are drawn by matplotlib, which is not installed: pip install matplotlib"
        )
    places = [] if kind_of(out) or descriptor_of(out) is not None else [(out.parent, "-o FILE")]
    for folder, option in (*places, *([(figures, "--figures DIR")] if figures else [])):
        check_writable(folder.absolute(), option)
    if plan.kind == "comparison":
        sections = list(_comparison_sections(experiment))
    else:
        sections = list(_sweep_sections(experiment, plan, comparisons))
    name = str(plan.about.get("compared", {}).get("title") or experiment.absolute().name)
    written = [out] if write_output(out, _page(name, _subtitle(experiment, plan), sections)) else []
    drawn = [part for section in sections for part in section.parts if isinstance(part, Figure) and part.panels]
    return [*written, *(_draw_svg(figure, figures) for figure in drawn if figures is not None)]


def _subtitle(experiment: Path, plan: Plan) -> str:
    s = status(experiment)
    what = "comparison of arms" if plan.kind == "comparison" else "sweep"
    counts = ", ".join(
        f"{s['trials'][key]:,} {word}"
        for key, word in (("done", "of full length"), ("stopped", "stopped early"), ("failed", "failed"),
                          ("running", "running"), ("interrupted", "interrupted"))
        if s["trials"][key]
    )  # fmt: skip
    made = f"{plan.created[:16].replace('T', ' ')}; report of {time.strftime('%Y-%m-%d %H:%M')}"
    ran = f"{s['trials']['planned']:,} {'runs' if plan.kind == 'comparison' else 'trials'} planned"
    name = f"{experiment.absolute().name}: " if plan.kind == "comparison" else ""
    return f"{name}{what}, {s['state']}; {ran}{': ' + counts if counts else ''}; begun {made}"


@dataclass(frozen=True)
class Sweep:
    """A sweep with all epochs of its trials."""

    plan: Plan
    space: Space
    records: Sequence[Record]

    @property
    def metric(self) -> str:
        assert self.plan.metric is not None, f"{self.plan=}"
        return self.plan.metric

    @property
    def full(self) -> list[Record]:
        """Trials of full length with a finite value: all that a value can be read from."""
        return sorted(self.ranked(self.records), key=lambda r: r.number)

    def of(self, objective: str, records: Sequence[Record]) -> list[Record]:
        return [r for r in records if r.objective == objective]

    def value(self, metrics: Mapping[str, float], metric: str | None = None) -> float:
        """The metric in the unit that is shown."""
        key = metric or self.metric
        return score_of(key).factor * metrics.get(key, math.nan)

    def ranked(self, records: Sequence[Record]) -> list[Record]:
        """Those of full length with a value, best first."""
        return ranked(records, self.metric)

    def colour(self, objective: str) -> str:
        return COLOURS[list(self.plan.rows).index(objective) % len(COLOURS)]

    def axis(self, metric: str | None = None) -> Axis:
        row = score_of(metric or self.metric)
        return Axis(f"{row.title}, {row.unit}")

    def hover(self, record: Record) -> str:
        settings = ", ".join(f"{_short(k)} {_number(v)}" for k, v in record.parameters.items())
        return f"{record.name}: {_shown(self, record)}<br>{_text(settings)}"


def _read_sweep(experiment: Path, plan: Plan) -> Sweep:
    records = []
    for record in read_lasts(experiment):
        records.append(replace(record, metrics=read_metrics(record.folder)))
    return Sweep(plan, build_space(plan.about["space"], experiment / "experiment.yaml"), records)


def _sweep_sections(experiment: Path, plan: Plan, comparisons: Sequence[Path]) -> Iterator[Section]:
    sweep = _read_sweep(experiment, plan)
    yield _verdict_section(sweep, experiment, comparisons)
    yield Section("Best configurations", [_best_table(sweep)])
    if sweep.records:
        yield Section("How settings and values go together", [_parallel(sweep), _slices(sweep), _contours(sweep)])
        yield Section("Which settings matter", [_importance(sweep)])
        yield Section("Training", [_curves(sweep), _pareto(sweep), _fidelity(sweep)])
    yield Section("Receipt", [_receipt(sweep)])
    yield Section("Failures", [_failures(sweep)])
    for directory in comparisons:
        for section in _comparison_sections(directory, inside=True):
            yield replace(section, title=f"{directory.absolute().name}: {section.title}")
    yield Section("How to reproduce", list(_reproduce(plan, experiment)))


def _verdict_section(sweep: Sweep, experiment: Path, comparisons: Sequence[Path]) -> Section:
    parts: list[str | Figure] = []
    for directory in comparisons:
        with damaged(directory / "confirm.json"):
            parts += _verdict_boxes(directory)
    if not parts:
        parts.append(_box("open", "Not confirmed yet", _not_a_verdict(sweep)))
    return Section("Verdict", parts)


def _not_a_verdict(sweep: Sweep) -> str:
    n = len(sweep.records)
    if not sweep.full:
        return f"No trial of full length yet ({n} trials), so there is no best one."
    first, *rest = sweep.ranked(sweep.full)
    ties = sum(r.last[sweep.metric] == first.last[sweep.metric] for r in rest)
    shared = f" {ties + 1} trials share this value; the first of them is named." if ties else ""
    return (
        f"Best: {first.name}, {score_of(sweep.metric).title} {_shown(sweep, first)}.{shared} This is not a verdict: it "
        f"is the best of {n} on validation, and {LUCK}. Only new runs over several seeds, judged on the test split, "
        "can say whether it is better than the baselines (tfkd confirm)."
    )


# --- tables ----------------------------------------------------------------------------------------------------


def _best_table(sweep: Sweep) -> str:
    rows = []
    winners = sweep.ranked([f[0] for o in sweep.plan.rows if (f := sweep.ranked(sweep.of(o, sweep.full)))])
    for record in winners:
        gap = sweep.value(record.last) - sweep.value(winners[0].last)
        settings = "\n".join(f"{_short(k)} = {_number(v)}" for k, v in record.parameters.items())
        part = " (baseline)" if record.objective in ("ce", "lsr") else ""
        n = len(sweep.of(record.objective, sweep.records))
        rows.append(
            [record.objective + part, record.name, _shown(sweep, record), f"{gap:+.2f}" if gap else "0", str(n),
             settings, _equivalence(record)]
        )  # fmt: skip
    none = [o for o in sweep.plan.rows if not sweep.of(o, sweep.full)]
    text = f"<p>No trial of full length yet: {_text(', '.join(none))}.</p>" if none else ""
    if not rows:
        return text or "<p>None.</p>"
    head = ["objective", "trial", sweep.axis().label, "from the best", "trials", "searched settings", "its loss"]
    start = (
        "<p>The best trial of each objective, by its value after the last epoch; trials that were stopped early cannot "
        "be best.</p>"
    )
    return start + _table(head, rows) + text


def _equivalence(record: Record) -> str:
    """What a trial's objective amounts to, as a sentence."""
    if record.objective in ("ce", "lsr"):
        return "plain training" if record.objective == "ce" else "label smoothing itself"
    try:
        config = validated(TrainConfig, record.config, record.folder / "trial.json")
    except ConfigError as error:
        return f"cannot be read by this release: {error.problems[0]}"
    amount = amounts_to(config.objective, config.data.num_classes)
    teacher = " (with a synthetic teacher)" if config.objective.needs_teacher else ""
    lsr = f"alpha {amount.lsr.alpha:.3g}"
    if amount.residual < TOLERANCE:
        scale = f"{amount.lsr.loss_scale:.3g}"
        return f"this equals label smoothing {lsr} times {scale} within {amount.residual:.1g} of its gradient{teacher}"
    return f"no label smoothing: the nearest, {lsr}, leaves {100 * amount.residual:.0f} % of its gradient{teacher}"


def _receipt(sweep: Sweep) -> str:
    seconds = sum(m.get("seconds", 0.0) for r in sweep.records for m in r.metrics)
    count = Counter(r.status for r in sweep.records)
    trials = f"{sweep.plan.trials:,} planned, {len(sweep.records):,} begun, {count['stopped']:,} stopped early"
    rows = [["trials", trials], *map(list, receipt_rows(receipt(sweep.space, sweep.records)))]
    time = f"{duration(seconds)} (h:mm:ss or m:ss), all trials together"
    return _table(["", ""], [*rows, ["time inside the training loop", time]])


def _failures(sweep: Sweep) -> str:
    failed = [r for r in sweep.records if r.status == "failed"]
    if not failed:
        return "<p>None.</p>"
    reasons: dict[str, list[str]] = {}
    for record in failed:
        reasons.setdefault((record.reason or "no reason is known").strip(), []).append(record.name)
    rows = [[str(len(names)), why, _some(names)] for why, names in sorted(reasons.items(), key=lambda i: -len(i[1]))]
    more = len(rows) - MAX_FAILURES
    text = f"<p>and {more} other reasons</p>" if more > 0 else ""
    return _table(["trials", "reason", "which"], rows[:MAX_FAILURES]) + text


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def _reproduce(plan: Plan, experiment: Path) -> Iterator[str]:
    about = plan.about
    argv = [str(word) for word in about.get("command") or []]
    command = shlex.join([Path(argv[0]).name, *argv[1:]]) if argv else "not known"
    versions = ", ".join(f"{name} {version}" for name, version in (about.get("versions") or {}).items())
    seeds = about.get("seeds")
    rows = [
        ["command", command],
        ["versions", versions],
        ["git commit", str(about.get("git_commit") or "none: it was not run in a repository")],
        ["seeds", ", ".join(f"{k} {v}" for k, v in seeds.items()) if isinstance(seeds, dict) else str(seeds)],
    ]
    if plan.kind == "sweep":
        where = shlex.quote(experiment.absolute().name)
        rows.append(["the best trial again", f"tfkd best {where} > best.yaml && tfkd train best.yaml"])
    yield _table(["", ""], rows)
    tree = about.get("space") or about.get("compared") or {}
    yield f"<details><summary>Everything as it was understood</summary><pre>{_text(dump_yaml(tree))}</pre></details>"


# --- figures of a sweep ----------------------------------------------------------------------------------------


def _parallel(sweep: Sweep) -> Figure:
    full = [sweep.value(r.last) for r in sweep.full]
    low, high = (min(full), max(full)) if full else (0.0, 1.0)
    return Figure(
        "parallel",
        "Parallel coordinates",
        "Each line is one trial: it crosses every upright axis at the trial's setting, and the last one at its value "
        f"({sweep.axis().label}); dark lines are the best. Trials stopped early are grey and have no value.",
        [_parallel_panel(sweep, objective, low, high) for objective in sweep.plan.rows if _searched(sweep, objective)],
        wide=True,
    )


def _parallel_panel(sweep: Sweep, objective: str, low: float, high: float) -> Panel:
    searched = _searched(sweep, objective)
    last = len(searched)
    full = sweep.ranked(sweep.of(objective, sweep.full))
    other = [r for r in sweep.of(objective, sweep.records) if r not in full]

    def line(record: Record) -> list[float | None]:
        """Heights of one trial on the axes, in [0, 1]."""
        heights: list[float | None] = [_place(p, record.parameters.get(p.name)) for p in searched]
        value = (sweep.value(record.last) - low) / (high - low) if high > low else 0.5
        return [*heights, value if record in full else None]

    series = [_lines("not of full length", other, line, sweep, PALE, 0.8)] if other else []
    groups = min(len(RANKED), len(full))
    for k in reversed(range(groups)):  # the best on top
        some = full[k * len(full) // groups : (k + 1) * len(full) // groups]
        first = k * len(full) // groups + 1
        name = f"rank {first}" if len(some) == 1 else f"rank {first} to {first + len(some) - 1}"
        series.append(_lines(name, some, line, sweep, RANKED[::-1][k * len(RANKED) // groups], 1.6))
    ends = [_ends(p) for p in searched] + [(f"{low:.2f}", f"{high:.2f}")]
    series.append(Series("text", [float(i) for i in range(last + 1)] * 2, [-0.1] * (last + 1) + [1.1] * (last + 1),
                         text=[e[0] for e in ends] + [e[1] for e in ends]))  # fmt: skip
    names = [
        _short(p.name).replace("weight_decay", "weight<br>decay").replace("correct_prob", "correct<br>prob")
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


def _lines(name: str, records: Sequence[Record], line: Any, sweep: Sweep, colour: str, width: float) -> Series:
    """One broken line for many trials."""
    x: list[float | None] = []
    y: list[float | None] = []
    text: list[str] = []
    for record in records:
        heights = line(record)
        x += [*range(len(heights)), None]
        y += [*heights, None]
        text += [sweep.hover(record)] * len(heights) + [""]
    return Series("lines", x, y, name, colour, text, width)


def _slices(sweep: Sweep) -> Figure:
    panels = []
    shared = [p for p in sweep.space.parameters if p.path[0] != "objective"]
    for objective in sweep.plan.rows:
        for p in _searched(sweep, objective):
            if p not in shared:
                panels.append(_slice(sweep, p, [objective], f"{objective}: {_short(p.name)}"))
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
        some = [r for r in sweep.of(objective, sweep.full) if p.name in r.parameters]
        x = [_at(p, r.parameters[p.name]) for r in some]
        y = [sweep.value(r.last) for r in some]
        series.append(Series("points", x, y, objective if len(objectives) > 1 else "", sweep.colour(objective),
                             [sweep.hover(r) for r in some]))  # fmt: skip
    return Panel(title, _axis(p), sweep.axis(), [s for s in series if s.x], height=280)


def _contours(sweep: Sweep) -> Figure:
    panels, few = [], []
    for objective in sweep.plan.rows:
        searched = {p.name.rpartition(".")[2]: p for p in _searched(sweep, objective) if p.path[0] == "objective"}
        t, alpha = searched.get("temperature"), searched.get("alpha")
        if t is None or alpha is None or not all(isinstance(p.domain, Range) for p in (t, alpha)):
            continue  # choices have nothing between them
        full = sweep.of(objective, sweep.full)
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


def _contour(sweep: Sweep, objective: str, t: Parameter, alpha: Parameter, full: Sequence[Record]) -> Panel | None:
    from scipy.interpolate import griddata
    from scipy.spatial import QhullError

    points = np.array([[_place(p, r.parameters[p.name]) for p in (t, alpha)] for r in full], dtype=float)
    values = [sweep.value(r.last) for r in full]
    grid = np.linspace(0, 1, 25)
    try:
        z = griddata(points, values, (grid[None, :], grid[:, None]), method="linear")
    except QhullError:  # all on one line
        return None
    x, y = (_positions(p, grid.tolist()) for p in (t, alpha))
    cells = [[float(v) if math.isfinite(v) else None for v in row] for row in z]
    dots = Series("points", [_at(t, r.parameters[t.name]) for r in full],
                  [_at(alpha, r.parameters[alpha.name]) for r in full],
                  text=[sweep.hover(r) for r in full])  # fmt: skip
    return Panel(objective, _axis(t), _axis(alpha), [dots], surface=(x, y, cells, sweep.axis().label))


def _importance(sweep: Sweep) -> Figure:
    panels, few, cut = [], [], False
    for objective in sweep.plan.rows:
        full = sweep.of(objective, sweep.full)
        searched = [p for p in _searched(sweep, objective) if p.within is None]  # what every trial has
        if len(searched) < 2:
            continue
        if len(full) < MIN_TRIALS:
            few.append(f"{objective} ({len(full)})")
            continue
        cut |= len(full) > MAX_FOREST
        shares = sorted(_shares(sweep, searched, _evenly(full, MAX_FOREST)).items(), key=lambda item: item[1])
        ticks = tuple((float(i), _short(name)) for i, (name, _) in enumerate(shares))
        bars = Series(
            "bars", [100 * share for _, share in shares], [i for i, _ in ticks], colour=sweep.colour(objective)
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


def _shares(sweep: Sweep, searched: Sequence[Parameter], records: Sequence[Record]) -> dict[str, float]:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize" if sweep.plan.mode == "max" else "minimize")
    flat = {p.name: optuna.distributions.FloatDistribution(0.0, 1.0) for p in searched}
    for record in records:
        params = {p.name: min(1.0, max(0.0, _place(p, record.parameters[p.name]) or 0.0)) for p in searched}
        trial = optuna.trial.create_trial(params=params, distributions=flat, value=record.last[sweep.metric])
        study.add_trial(trial)
    if len({record.last[sweep.metric] for record in records}) == 1:  # nothing to explain
        return dict.fromkeys(flat, 0.0)
    evaluator = optuna.importance.FanovaImportanceEvaluator(n_trees=32, seed=0)
    return {k: float(v) for k, v in optuna.importance.get_param_importances(study, evaluator=evaluator).items()}


def _curves(sweep: Sweep) -> Figure:
    share = max(1, MAX_CURVES // len(sweep.plan.rows))
    rungs = sweep.space.search.stopping.rungs(sweep.space.epochs)
    cut = False
    panels = []
    for objective in sweep.plan.rows:
        mine = [r for r in sweep.of(objective, sweep.records) if r.metrics]
        full = sweep.ranked(sweep.of(objective, sweep.full))
        keep = full[:10]
        drawn = keep + _evenly([r for r in mine if r not in keep], share - len(keep))
        cut |= len(drawn) < len(mine)
        best, whole, rest = full[:1], [r for r in drawn if r in full[1:]], [r for r in drawn if r not in full]
        series = [
            _epochs("not of full length", rest, sweep, PALE, 0.8),
            _epochs("full length", whole, sweep, sweep.colour(objective), 1.0),
            _epochs("best", best, sweep, DARK, 2.2),
        ]
        if not mine:
            continue
        rules = [(float(rung), f"{rung}") for rung in rungs]
        x, y = Axis("epoch", span=(0.0, float(sweep.space.epochs))), replace(sweep.axis(), span=_zoom(sweep))
        panels.append(Panel(objective, x, y, [s for s in series if s.x], rules))
    name = score_of(sweep.metric).title
    sentence = f"Each line is a trial: its {name} after every epoch."
    if rungs:
        sentence += " Dashed lines are the rungs, where trials are judged and only the best of their objective go on."
    if cut:
        sentence += f" Of {len(sweep.records):,} trials {MAX_CURVES} or fewer are drawn: the best, and the rest evenly."
    return Figure("curves", f"{name[0].upper()}{name[1:]} over epochs", sentence, panels, wide=True)


def _zoom(sweep: Sweep) -> tuple[float, float] | None:
    """The part of the value's axis where trials are told apart; the first epochs of many are below it."""
    early = sorted(sweep.value(r.metrics[len(r.metrics) // 9]) for r in sweep.full)
    if not early or sweep.plan.mode == "min":
        return None
    ends = sorted(v for r in sweep.records if r.metrics and math.isfinite(v := sweep.value(r.last)))
    return _padded([min(early[len(early) // 10], ends[len(ends) // 4]), ends[-1]])


def _epochs(name: str, records: Sequence[Record], sweep: Sweep, colour: str, width: float) -> Series:
    x: list[float | None] = []
    y: list[float | None] = []
    text: list[str] = []
    for record in records:
        some = _evenly(record.metrics, MAX_POINTS)
        x += [*(m["epoch"] for m in some), None]
        y += [*(round(sweep.value(m), 4) for m in some), None]
        text += [record.name] * len(some) + [""]
    return Series("lines", x, y, name, colour, text, width)


def _pareto(sweep: Sweep) -> Figure:
    searched = sweep.space.search.metrics
    first, *others = searched if len(searched) > 1 else ("val_accuracy", "val_nll")
    front = pareto(sweep.full, searched) if len(searched) > 1 else []
    panels = []
    for other in others:
        some = [r for r in sweep.full if all(math.isfinite(r.last.get(m, math.nan)) for m in (first, other))]
        if not some:
            continue
        series = []
        for objective in sweep.plan.rows:
            mine = sweep.of(objective, some)
            x, y = ([sweep.value(r.last, m) for r in mine] for m in (other, first))
            series.append(Series("points", x, y, objective, sweep.colour(objective), [sweep.hover(r) for r in mine]))
        x, y = ([sweep.value(r.last, m) for r in pareto(some, (first, other))] for m in (other, first))
        series.insert(0, Series("lines", x, y, "front", DARK, width=1.2))
        panels.append(Panel("all objectives", sweep.axis(other), sweep.axis(first), [s for s in series if s.x]))
    names = [score_of(m).title for m in (first, *others)]
    many = f" Of all {len(searched)} together the front is: {_some([r.name for r in front])}."
    return Figure(
        "pareto",
        f"{names[0][0].upper()}{names[0][1:]} against {' and '.join(names[1:])}",
        "Each point is a trial of full length; those on the line are beaten by no other in both."
        + (many if front else ""),
        panels,
    )


def _fidelity(sweep: Sweep) -> Figure:
    ranks = {(found.objective, found.rung): found for found in rank_correlations(sweep.space, sweep.records)}
    panels: list[Panel] = []
    few = sorted({f"{o} ({len(sweep.of(o, sweep.full))})" for o in sweep.plan.rows
                  if len(sweep.of(o, sweep.full)) < MIN_TRIALS})  # fmt: skip
    for rung in sweep.space.search.stopping.rungs(sweep.space.epochs):
        series = []
        for objective in sweep.plan.rows:
            pairs = [(v, sweep.value(r.last), r) for r in sweep.of(objective, sweep.full)
                     if math.isfinite(v := _value_after(sweep, r, rung))]  # fmt: skip
            if len(pairs) < MIN_TRIALS:
                continue
            x, y = [p[0] for p in pairs], [p[1] for p in pairs]
            found = ranks.get((objective, rung))
            told = "no spread"
            if found:
                corrected = f", {found.corrected:.2f}" if found.judged > found.n else ""
                told = f"{found.rank:.2f}{corrected} (n = {found.n})"
            name = f"{objective}: {told}"
            series.append(Series("points", x, y, name, sweep.colour(objective), [sweep.hover(p[2]) for p in pairs]))
        if series:
            axis = replace(sweep.axis(), label=f"{sweep.axis().label}, after {rung} epochs")
            panels.append(Panel(f"rung at {rung} epochs", axis, sweep.axis(), series))
    warnings = [f" Warning: {warning}." for warning in fidelity_warnings(sweep.space, sweep.records)]
    sentence = (
        "The value at a rung against the final one, over trials of full length; the legend has Spearman's rank "
        "correlation (1: the rung ranks trials as the end does). Trials that a rung stopped have no final value, and "
        "over the survivors a correlation is lower than over all that came to the rung; a second number is "
        "corrected for that." + "".join(warnings)
    )
    if not sweep.space.search.stopping.rungs(sweep.space.epochs):
        return Figure(
            "fidelity", "Do the rungs rank right?", "This sweep has no rungs: every trial runs its full length."
        )
    return Figure("fidelity", "Do the rungs rank right?", _but_few(sentence, panels, few), panels)


def _value_after(sweep: Sweep, record: Record, epoch: int) -> float:
    return next((sweep.value(m) for m in record.metrics if m.get("epoch") == epoch), math.nan)


def _but_few(sentence: str, panels: Sequence[Panel], few: Sequence[str]) -> str:
    """The sentence, and which objectives have too few trials for it."""
    if not panels and not few:
        return "Nothing that is searched here can be shown in this way."
    lacking = f"Fewer than {MIN_TRIALS} trials of full length, too few to tell: {', '.join(few)}." if few else ""
    return f"{sentence} {lacking}".strip() if panels else lacking


def _searched(sweep: Sweep, objective: str) -> list[Parameter]:
    """What is searched for an objective, its own settings first."""
    found = [p for b in sweep.space.branches if b.objective == objective for p in b.parameters]
    return sorted(found, key=lambda p: p.path[0] != "objective")


def _place(p: Parameter, value: Any) -> float | None:
    """Where a value lies in its range or list, 0 to 1; None if it is no such value."""
    if isinstance(p.domain, Choices):
        return p.domain.place(value) if value in p.domain.values else None
    return p.domain.place(value) if isinstance(value, int | float) else None


def _at(p: Parameter, value: Any) -> float:
    """A value's position on the axis that `_axis` makes."""
    if isinstance(p.domain, Choices):
        return float(p.domain.values.index(value)) if value in p.domain.values else math.nan
    return float(p.domain.shown(value))


def _positions(p: Parameter, places: Sequence[float]) -> list[float]:
    """The positions on a range's axis of places in it."""
    assert isinstance(p.domain, Range), f"{p=}"
    return [_at(p, p.domain.at(place)) for place in places]


def _axis(p: Parameter) -> Axis:
    name, domain = _short(p.name).replace("temperature", "temperature T"), p.domain
    if isinstance(domain, Choices):
        ticks = tuple((float(i), _number(v)[:24]) for i, v in enumerate(domain.values))
        return Axis(name, ticks=ticks, span=(-0.5, len(ticks) - 0.5))
    low, high = domain.span
    if not domain.logarithmic:
        return Axis(name, span=_padded([low, high]))
    margin = (high / low) ** 0.05
    span = (low / margin, high * margin)
    return Axis(f"{domain.label(name)} (log scale)", log=True, ticks=_log_ticks(low, high), span=span)


def _log_ticks(low: float, high: float) -> tuple[tuple[float, str], ...]:
    """A few round numbers in a range, for a log scale."""
    decades = math.log10(high / low)
    steps = (1, 2, 5) if decades < 1.6 else (1, 3) if decades < 2.6 else (1,)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [step * 10.0**k for k in powers for step in steps]
    return tuple((t, f"{t:g}") for t in ticks if low / 1.001 <= t <= high * 1.001)


def _padded(values: Sequence[float]) -> tuple[float, float]:
    """A span that holds the values, with a margin."""
    low, high = min(values), max(values)
    margin = 0.05 * (high - low) or 0.1
    return low - margin, high + margin


def _ends(p: Parameter) -> tuple[str, str]:
    values = p.domain.probes
    return _number(values[0])[:12], _number(values[-1])[:12]


def _evenly(items: Sequence[Any], most: int) -> list[Any]:
    """At most so many of the items, evenly spaced, the first and last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / max(1, most - 1))] for i in range(max(0, most))]


# --- a comparison of arms --------------------------------------------------------------------------------------


def _comparison_sections(directory: Path, *, inside: bool = False) -> list[Section]:
    with damaged(directory / "confirm.json"):
        return list(_sections_of_comparison(directory, inside=inside))


def _sections_of_comparison(directory: Path, *, inside: bool) -> Iterator[Section]:
    """Sections about a comparison; `inside` the report of a sweep its verdict stands elsewhere."""
    plan, judged = read_plan(directory), _read_judged(directory)
    if not inside:
        yield Section("Verdict", _verdict_boxes(directory))
    if judged is not None:
        notes = [*judged["notes"], *(note for found in judged["verdicts"] for note in found["notes"])]
        listed = "".join(f"<li>{_text(note)}</li>" for note in notes)
        yield Section("Arms", [_arms_table(judged), *_arm_figures(judged), f"<ul>{listed}</ul>" if notes else ""])
        if judged["verdicts"]:
            yield Section("Candidates against baselines", [*_lead_figures(judged), _leads_table(judged)])
    failed = [r for r in read_lasts(directory) if r.status == "failed"]
    rows = [[r.name, (r.reason or "no reason is known").strip()] for r in failed]
    yield Section("Failures", [_table(["run", "reason"], rows) if rows else "<p>None.</p>"])
    if not inside:
        yield Section("How to reproduce", list(_reproduce(plan, directory)))


def _read_judged(directory: Path) -> dict[str, Any] | None:
    """confirm.json; None if the test split was not opened yet."""
    path = directory / "confirm.json"
    if not os.path.lexists(path):
        return None
    with damaged(path):
        judged: dict[str, Any] = parse_json(read_text(path))
        missing = {"title", "arms", "verdicts", "notes", "test", "trained_on", "opened", "preset"} - judged.keys()
    if missing:
        raise ConfigError(
            f"lacks {', '.join(sorted(missing))}; write it again: tfkd resume {shlex.quote(str(directory))}", path
        )
    return judged


def _verdict_boxes(directory: Path) -> list[str | Figure]:
    judged = _read_judged(directory)
    if judged is None:
        s = status(directory)["trials"]
        text = f"{s['done']} of {s['planned']} runs are trained, and the test split is still shut."
        return [_box("open", "Not judged yet", f"{text} Go on with: tfkd resume {shlex.quote(directory.name)}")]
    boxes: list[str | Figure] = []
    where = f"test split of {judged['test']}, trained on {judged['trained_on']}"
    if judged["preset"]:
        where += f"; preset {judged['preset']}: scaled down to see it run, comparable with nothing published"
    for found in judged["verdicts"]:
        kind = {"better": "yes", "not better": "no"}.get(found["verdict"], "open")
        searched = f"; the best of {found['searched']:,} configurations, on validation" if found["searched"] else ""
        text = f"{found['sentence']}."
        context = f"{judged['title'] or directory.name}; student {found['student']}; {where}{searched}"
        more = [c["sentence"] for c in found["candidates"] if c["sentence"] != found["sentence"]]
        boxes.append(_box(kind, str(found["verdict"]).capitalize(), text, more, context))
    if not judged["verdicts"]:
        text = f"There are no candidates and baselines of the same student with two runs or more each ({where})."
        boxes.append(_box("open", "No verdict", text))
    return boxes


def _arms_table(judged: dict[str, Any]) -> str:
    printed = any(arm["published"] is not None for arm in judged["arms"])
    rows = []
    for arm in judged["arms"]:
        n, mean, sd, low, high = _over_seeds(arm)
        row = [arm["name"], arm["role"], arm["student"], _settings(arm["objective"]), str(n)]
        row += [f"{mean:.2f}" if n else "", f"{sd:.2f}" if n > 1 else "", _interval(low, high)]
        if printed:
            row += ["" if arm["published"] is None else f"{arm['published']:.2f}"]
        rows.append(row)
    head = ["arm", "role", "student", "objective", "runs", "test accuracy, %", "sd", "95 % over seeds"]
    return _table(head + (["published, %"] if printed else []), rows)


def _over_seeds(arm: dict[str, Any]) -> tuple[int, float, float, float, float]:
    """(runs, mean, sd, low and high end of the 95 % interval of the mean) of test accuracy in per cent."""
    from tfkd_ray import verdict

    values = np.array([100 * run["accuracy"] for run in arm["runs"] if "accuracy" in run], dtype=float)
    if len(values) < 2:
        return len(values), float(values.mean()) if len(values) else math.nan, math.nan, math.nan, math.nan
    s = verdict.summary(verdict.Arm(arm["name"], tuple(range(len(values))), values))
    return s.n, s.mean, s.sd, s.low, s.high


def _interval(low: float | None, high: float | None) -> str:
    finite = low is not None and high is not None and math.isfinite(low) and math.isfinite(high)
    return f"{low:.2f} to {high:.2f}" if finite else "-"


def _settings(objective: dict[str, Any]) -> str:
    rest = ", ".join(f"{k} {_number(v)}" for k, v in objective.items() if k != "name" and (k, v) != ("loss_scale", 1.0))
    return f"{objective['name']}: {rest}" if rest else str(objective["name"])


def _arm_figures(judged: dict[str, Any]) -> Iterator[Figure]:
    panels = []
    for student in dict.fromkeys(arm["student"] for arm in judged["arms"]):
        arms = [a for a in judged["arms"] if a["student"] == student and any("accuracy" in run for run in a["runs"])]
        if not arms:
            continue
        dots, means = Series("points", [], [], "a seed", "#7A9CC6", opacity=0.6), {"x": [], "y": []}  # type: ignore[var-annotated]
        x, y, text = [], [], []
        spread_x: list[float | None] = []
        spread_y: list[float | None] = []
        for row, arm in enumerate(reversed(arms)):
            runs = [run for run in arm["runs"] if "accuracy" in run]
            x += [100 * run["accuracy"] for run in runs]
            y += [float(row)] * len(runs)
            text += [f"{_text(arm['name'])}, seed {run['seed']}: {100 * run['accuracy']:.2f} %" for run in runs]
            _, mean, _, low, high = _over_seeds(arm)
            means["x"].append(mean)
            means["y"].append(float(row))
            if math.isfinite(low) and math.isfinite(high):
                spread_x += [low, high, None]
                spread_y += [float(row), float(row), None]
        ticks = tuple((float(i), arm["name"]) for i, arm in enumerate(reversed(arms)))
        series = [replace(dots, x=x, y=y, text=text), Series("lines", spread_x, spread_y, "95 % of the mean", width=3),
                  Series("points", means["x"], means["y"], "mean")]  # fmt: skip
        rows = Axis("", ticks=ticks, span=(-0.6, len(arms) - 0.4))
        title, height = f"student {student}", 150 + 26 * len(arms)
        all_x = [*x, *(v for v in spread_x if v is not None)]
        panels.append(Panel(title, Axis("test accuracy, %", span=_padded(all_x)), rows, series, height=height))
    if panels:
        sentence = (
            "Each pale point is one run with its own seed; the dark point is the mean, and the bar its 95 % interval "
            "over seeds."
        )
        yield Figure("arms", "Test accuracy of the arms", sentence, panels)


def _lead_figures(judged: dict[str, Any]) -> Iterator[Figure]:
    panels = []
    for found in judged["verdicts"]:
        scale = 100.0 if found["metric"]["percent"] else 1.0
        pairs = [(c["name"], p) for c in found["candidates"] for p in c["comparisons"]][::-1]
        spread_x: list[float | None] = []
        spread_y: list[float | None] = []
        for row, (_, p) in enumerate(pairs):
            if p["low"] is not None and p["high"] is not None:
                spread_x += [scale * p["low"], scale * p["high"], None]
                spread_y += [float(row), float(row), None]
        all_x = [0.0, *(x for x in spread_x if x is not None), *(scale * p["lead"] for _, p in pairs)]
        ticks = tuple((float(i), f"{name} over {p['over']}") for i, (name, p) in enumerate(pairs))
        points = Series("points", [scale * p["lead"] for _, p in pairs], [i for i, _ in ticks], "mean lead", COLOURS[0])
        margin = found["metric"]["margin"]
        unit = "points" if found["metric"]["percent"] else "own unit"
        x = Axis(f"lead in {found['metric']['name']}, {unit}", span=_padded(all_x))
        y = Axis("", ticks=ticks, span=(-0.6, len(pairs) - 0.4))
        bars = Series("lines", spread_x, spread_y, "95 % over seeds", COLOURS[0], width=3)
        rules = [(0.0, ""), (scale * margin, f"{scale * margin:g}")]
        panels.append(Panel(f"student {found['student']}", x, y, [bars, points], rules, height=150 + 24 * len(pairs)))
    if panels:
        sentence = (
            "How much better a candidate is than a baseline, seed by seed, with the 95 % interval of the mean; right "
            "of 0 it is ahead, and the second line is the smallest lead worth having."
        )
        yield Figure("leads", "Leads over the baselines", sentence, panels)


def _leads_table(judged: dict[str, Any]) -> str:
    rows = []
    for found in judged["verdicts"]:
        scale = 100.0 if found["metric"]["percent"] else 1.0

        def scaled(bound: float | None, scale: float = scale) -> float | None:
            return None if bound is None else scale * bound

        for candidate in found["candidates"]:
            for p in candidate["comparisons"]:
                images = _interval(*map(scaled, p["images"])) if p["images"] else "-"
                seen = "-" if p["smallest_seen"] is None else f"{scale * p['smallest_seen']:.2f}"
                value = "< 0.001" if p["p"] < 0.001 else f"{p['p']:.3f}"
                rows.append([candidate["name"], p["over"], str(len(p["seeds"])), f"{scale * p['lead']:.2f}",
                             _interval(scaled(p["low"]), scaled(p["high"])), images, value, seen,
                             str(p["needed"] or "-"), candidate["verdict"]])  # fmt: skip
    head = ["candidate", "over", "seeds", "lead, points", "95 % over seeds", "95 % over images", "p",
            "smallest lead seen with probability 0.8", "seeds needed", "verdict on the candidate"]  # fmt: skip
    return _table(head, rows)


# --- words -----------------------------------------------------------------------------------------------------


def _text(text: str) -> str:
    """Escaped for HTML (which plotly's labels are, too)."""
    return html.escape(text, quote=True)


def _short(name: str) -> str:
    """alpha for objective.kd.alpha, lr for optim.lr."""
    return name.rpartition(".")[2]


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)


def _shown(sweep: Sweep, record: Record) -> str:
    """A trial's value with its unit; its last one, and after which epoch, if it is not of full length."""
    value = sweep.value(record.last)
    if not math.isfinite(value):
        return "no value"
    shown = score_of(sweep.metric).show(record.last[sweep.metric])
    return shown if record.status == "done" else f"{shown} after epoch {record.last['epoch']:.0f}"


# --- HTML ------------------------------------------------------------------------------------------------------

STYLE = """
:root { color: #1b1b1b; background: #fff; font: 16px/1.5 system-ui, sans-serif; }
body { max-width: 72rem; margin: 0 auto; padding: 1rem; }
h1 { margin: .5rem 0 0; font-size: 1.7rem; overflow-wrap: anywhere; }
h2 { margin: 2.2rem 0 .6rem; padding-bottom: .2rem; border-bottom: 1px solid #ccc; font-size: 1.3rem; }
h3 { margin: 1.4rem 0 .2rem; font-size: 1.05rem; }
h4 { margin: .4rem 0 0; font-size: .95rem; font-weight: 600; }
p { margin: .3rem 0 .6rem; max-width: 50rem; overflow-wrap: anywhere; }
.sub { color: #555; }
nav { margin: .8rem 0; font-size: .9rem; }
nav a { margin-right: 1rem; white-space: nowrap; }
.box { border-left: .5rem solid #888; background: #f4f4f4; padding: .6rem 1rem; margin: .6rem 0; }
.box.yes { border-color: #009e73; background: #eaf7f2; }
.box.no { border-color: #d55e00; background: #fdf1ea; }
.box strong { font-size: 1.2rem; }
.box li { overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; }
th, td { text-align: left; vertical-align: top; padding: .25rem .8rem .25rem 0; border-bottom: 1px solid #ddd;
  white-space: pre-line; }
th { font-weight: 600; vertical-align: bottom; }
.short { white-space: pre; }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 21rem), 1fr)); gap: 0 1.5rem; }
.panels.wider { grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); }
.panels.one { max-width: 46rem; grid-template-columns: 1fr; }
.panel { min-width: 0; }
pre { overflow-x: auto; font-size: .8rem; background: #f4f4f4; padding: .6rem; }
@media print {
  :root { font-size: 11px; }
  body { max-width: none; padding: 0; }
  nav, details { display: none; }
  .panels, .panels.wider { grid-template-columns: 1fr 1fr; }
  .panels.one { grid-template-columns: 1fr; }
  .panel, .box, tr, figure:has(.one) { break-inside: avoid; }
  h2, h3, h4, figcaption { break-after: avoid; }
  .wide { overflow: visible; }
}
@page { margin: 14mm; }
figure { margin: 0; }
"""

SCRIPT = """
const plots = [...document.querySelectorAll('.plot')];
const touch = matchMedia('(pointer: coarse)').matches;
for (const plot of plots) {
  const drawn = JSON.parse(plot.nextElementSibling.textContent);
  if (touch) drawn.layout.dragmode = false;
  Plotly.newPlot(plot, drawn.data, drawn.layout, {responsive: true, displayModeBar: false});
}
const fit = () => plots.forEach(plot => Plotly.relayout(plot, {width: plot.parentElement.clientWidth}));
matchMedia('print').addEventListener('change', fit);
addEventListener('beforeprint', fit);
addEventListener('afterprint', () => plots.forEach(plot => Plotly.relayout(plot, {width: null, autosize: true})));
document.documentElement.dataset.drawn = plots.length;
"""


def _page(title: str, subtitle: str, sections: Sequence[Section]) -> str:
    """The whole file."""
    from plotly.offline import get_plotlyjs

    scripts = (
        [get_plotlyjs(), SCRIPT] if any(isinstance(p, Figure) and p.panels for s in sections for p in s.parts) else []
    )
    hashes = " ".join(map(_hash, scripts)) or "'none'"
    policy = f"default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; script-src {hashes}"
    links = " ".join(f'<a href="#s{i}">{_text(section.title)}</a>' for i, section in enumerate(sections))
    body = "".join(
        f'<section id="s{i}"><h2>{_text(section.title)}</h2>{"".join(map(_part, section.parts))}</section>\n'
        for i, section in enumerate(sections)
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(title)}</title>\n<style>{STYLE}</style></head>\n<body>\n"
        f'<h1>{_text(title)}</h1>\n<p class="sub">{_text(subtitle)}</p>\n<nav>{links}</nav>\n'
        "<noscript><p>The plots need JavaScript, from this file alone; all else does not.</p></noscript>\n"
        f"{body}{''.join(f'<script>{script}</script>' for script in scripts)}</body></html>\n"
    )


def _hash(script: str) -> str:
    """The name of a script in a Content-Security-Policy."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _part(part: str | Figure) -> str:
    if isinstance(part, str):
        return part
    panels = "".join(
        f'<div class="panel"><h4>{_text(panel.title)}</h4><div class="plot" style="height:{panel.height}px"></div>'
        f'<script type="application/json">{_inert(_plotly(panel))}</script></div>'
        for panel in part.panels
    )
    kind = "panels one" if len(part.panels) == 1 else "panels wider" if part.wide else "panels"
    figcaption = f"<figcaption><h3>{_text(part.title)}</h3><p>{_text(part.sentence)}</p></figcaption>"
    return f'<figure>{figcaption}<div class="{kind}">{panels}</div></figure>\n'


def _box(kind: str, word: str, text: str, more: Sequence[str] = (), context: str = "") -> str:
    listed = "".join(f"<li>{_text(sentence)}</li>" for sentence in more)
    return (
        f'<div class="box {kind}"><strong>{_text(word)}</strong><p>{_text(text)}</p>'
        f"{f'<ul>{listed}</ul>' if more else ''}{f'<p class=sub>{_text(context)}</p>' if context else ''}</div>\n"
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    top = f"<thead><tr>{''.join(f'<th>{_text(h)}</th>' for h in head)}</tr></thead>" if any(head) else ""
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>\n" for row in rows)
    return f'<div class="wide"><table>{top}<tbody>{body}</tbody></table></div>\n'


def _cell(text: str) -> str:
    """A cell of a table; one of short lines is not wrapped."""
    short = max(map(len, text.splitlines()), default=0) <= 28
    return f'<td class="short">{_text(text)}</td>' if short else f"<td>{_text(text)}</td>"


def _inert(tree: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    return json.dumps(_finite(tree), ensure_ascii=True, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _finite(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _finite(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_finite(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


# --- plotly ----------------------------------------------------------------------------------------------------


def _plotly(panel: Panel) -> dict[str, Any]:
    """What `Plotly.newPlot` takes: data and layout."""
    data: list[dict[str, Any]] = []
    if panel.surface is not None:
        x, y, z, label = panel.surface
        data.append({"type": "contour", "x": x, "y": y, "z": z, "colorscale": "Viridis", "hoverinfo": "skip",
                     "colorbar": {"title": {"text": _text(label), "side": "right"}, "thickness": 12},
                     "contours": {"coloring": "heatmap"}, "line": {"width": 0.5}, "connectgaps": False})  # fmt: skip
    for s in panel.series:
        trace: dict[str, Any] = {"x": s.x, "y": s.y, "name": _text(s.name), "showlegend": bool(s.name)}
        if s.kind == "bars":
            trace |= {"type": "bar", "orientation": "h", "marker": {"color": s.colour}, "hoverinfo": "x"}
        else:
            mode = {"points": "markers", "lines": "lines", "text": "text"}[s.kind]
            trace |= {"type": "scatter", "mode": mode, "opacity": s.opacity, "connectgaps": False}
            trace |= {"line": {"color": s.colour, "width": s.width}, "marker": {"color": s.colour, "size": 7}}
            trace |= {"textfont": {"size": 10, "color": "#555"}} if s.kind == "text" else {}
            trace |= {"text" if s.kind == "text" else "hovertext": list(s.text)} if s.text else {}
            trace["hoverinfo"] = "skip" if s.kind == "text" else "text" if s.text else "x+y"
        data.append(trace)
    rules = [{"type": "line", "yref": "paper", "y0": 0, "y1": 1, "x0": x, "x1": x, "layer": "below",
              "line": {"color": "#999", "width": 1, "dash": "dash"}} for x, _ in panel.rules]  # fmt: skip
    notes = [{"x": x, "y": 1, "yref": "paper", "yanchor": "bottom", "text": _text(label), "showarrow": False,
              "font": {"size": 10, "color": "#555"}} for x, label in panel.rules if label]  # fmt: skip
    named = any(s.name for s in panel.series)
    layout = {
        "autosize": True,
        "height": panel.height,
        "margin": {"l": 8, "r": 8, "t": 26, "b": 8},
        "font": {"family": "system-ui, sans-serif", "size": 12, "color": DARK},
        "plot_bgcolor": "#fff",
        "paper_bgcolor": "#fff",
        "hovermode": "closest",
        "showlegend": named,
        "legend": {"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom", "x": 0, "font": {"size": 11}},
        "shapes": rules,
        "annotations": notes,
        "xaxis": _plotly_axis(panel.x),
        "yaxis": _plotly_axis(panel.y),
    }
    return {"data": data, "layout": layout}


def _plotly_axis(axis: Axis) -> dict[str, Any]:
    made: dict[str, Any] = {
        "title": {"text": _text(axis.label), "standoff": 6},
        "type": "log" if axis.log else "linear",
        "automargin": True,
        "zeroline": False,
        "gridcolor": "#e6e6e6",
        "nticks": 6,
        "exponentformat": "power",
        "linecolor": "#999",
    }
    if axis.ticks:
        made |= {"tickvals": [x for x, _ in axis.ticks], "showgrid": False}
        made["ticktext"] = [_text(label).replace("&lt;br&gt;", "<br>") for _, label in axis.ticks]
    if axis.span is not None:
        made["range"] = [math.log10(end) for end in axis.span] if axis.log else list(axis.span)
    return made


# --- matplotlib ------------------------------------------------------------------------------------------------


def _draw_svg(figure: Figure, folder: Path) -> Path:
    """The figure as an SVG file, its panels in rows of two or three."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure as Canvas

    columns = min(2 if figure.wide or len(figure.panels) in (2, 4) else 3, len(figure.panels))
    rows = math.ceil(len(figure.panels) / columns)
    height = max(panel.height for panel in figure.panels) / 90
    with rc_context({"svg.hashsalt": "tfkd", "font.size": 8, "svg.fonttype": "none", "axes.spines.top": False}):
        canvas = Canvas(figsize=(4.2 * columns, height * rows + 0.6), layout="constrained")
        canvas.suptitle(figure.title, parse_math=False)
        for number, panel in enumerate(figure.panels):
            _draw_panel(canvas.add_subplot(rows, columns, number + 1), canvas, panel)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{figure.key}.svg"
        with whole_file(path) as part:
            canvas.savefig(part, format="svg", metadata={"Date": None})
    return path


def _draw_panel(axes: Any, canvas: Any, panel: Panel) -> None:
    axes.set_title(panel.title, parse_math=False)
    if panel.x.log:
        axes.set_xscale("log")
    if panel.y.log:
        axes.set_yscale("log")
    if panel.surface is not None:
        across, up, z, label = panel.surface
        grid = np.ma.masked_invalid(np.array(z, dtype=float))
        canvas.colorbar(axes.contourf(across, up, grid, levels=12), ax=axes, label=label)
    for s in panel.series:
        x, y = (np.array(values, dtype=float) for values in (s.x, s.y))
        if s.kind == "bars":
            axes.barh(y, x, color=s.colour)
        elif s.kind == "text":
            for left, height, text in zip(x, y, s.text, strict=True):
                axes.text(left, height, text, ha="center", va="center", fontsize=6, parse_math=False)
        elif s.kind == "points":
            axes.plot(x, y, "o", color=s.colour, alpha=s.opacity, markersize=3.5, label=s.name or None)
        else:
            axes.plot(x, y, color=s.colour, linewidth=0.6 * s.width, alpha=s.opacity, label=s.name or None)
    for at, label in panel.rules:
        axes.axvline(at, color="#999999", linewidth=0.8, linestyle="--", zorder=0)
        axes.text(at, 1, label, transform=axes.get_xaxis_transform(), ha="center", va="bottom", fontsize=6)
    for name, axis in (("x", panel.x), ("y", panel.y)):
        getattr(axes, f"set_{name}label")(axis.label, parse_math=False)
        if axis.ticks:
            labels = [label.replace("<br>", "\n") for _, label in axis.ticks]
            getattr(axes, f"set_{name}ticks")([x for x, _ in axis.ticks], labels, parse_math=False)
            axes.minorticks_off()
        if axis.span is not None:
            getattr(axes, f"set_{name}lim")(axis.span)
    if any(s.name for s in panel.series):
        axes.legend(fontsize=6, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3)
