"""Several sweeps side by side: the best of each, the settings that differ, pairs of equal trials.

Values are compared only by one metric. The best of many trials looks better than it is, so a
difference of two best ones is no verdict; trials that have the same objective, searched settings and
seed in two sweeps are pairs, whose mean difference is due to what else differs.
"""

import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tfkd_ray.settings import own_code
from tfkd_ray.settings.columns import in_columns, on_one_line
from tfkd_ray.settings.errors import ConfigError, Sentences
from tfkd_ray.settings.yaml import in_yaml
from tfkd_ray.show.figures import Sweep, epoch_line, read_sweep
from tfkd_ray.show.page import Axis, Figure, Panel, Series
from tfkd_ray.show.status import TERMINAL_WIDTH, read_plan
from tfkd_ray.store.experiment import Record
from tfkd_ray.verdict.scores import score_of

DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
"""Lines of experiments in their order; the colour is the objective's."""
Rows = list[list[str]]
"""A table; its first row is the head."""


@dataclass(frozen=True)
class NamedSweep:
    """A sweep with the name by which it is told from the others."""

    name: str
    sweep: Sweep


def read_several(experiments: Sequence[Path]) -> list[NamedSweep]:
    """Read sweeps; the numbers of their trials are made different."""
    several: list[NamedSweep] = []
    begun = 0
    for experiment in experiments:
        plan = read_plan(experiment)
        if plan.kind != "sweep":
            raise ConfigError(
                "a comparison of arms; only sweeps are shown side by side; for a comparison use tfkd report",
                experiment,
            )
        first = several[0].sweep.metric if several else plan.metric
        if plan.metric != first:
            raise ConfigError(
                f"ranks its trials by {plan.metric}, and {several[0].name} by {first}: values of two metrics cannot be "
                "compared",
                experiment,
            )
        sweep = read_sweep(experiment, plan)
        records = [replace(r, number=begun + k) for k, r in enumerate(sweep.records)]
        begun += len(records)
        name = experiment.absolute().name
        taken = {one.name for one in several}
        several.append(
            NamedSweep(
                name if name not in taken else f"{name}-{len(several) + 1}",
                replace(sweep, records=records),
            )
        )
    return several


# --- tables ----------------------------------------------------------------------------------------------------


def best_rows(several: Sequence[NamedSweep]) -> Rows:
    """Return the best trial of each sweep and objective, best first within an objective."""
    metric = score_of(several[0].sweep.metric)
    found = []
    for objective in _all_objectives(several):
        best = [
            (one, ranked[0])
            for one in several
            if (ranked := one.sweep.ranked(one.sweep.of(objective, one.sweep.records)))
        ]
        sign = -1 if metric.direction == "max" else 1
        best.sort(key=lambda pair: sign * pair[1].judged[metric.key])
        for one, record in best:
            gap = record.judged[metric.key] - best[0][1].judged[metric.key]
            begun = len(one.sweep.of(objective, one.sweep.records))
            found.append(
                [objective, one.name, record.name, metric.number(record.judged[metric.key]),
                 metric.number(gap) if gap else "0", str(begun), str(one.sweep.space.epochs)]
            )  # fmt: skip
    head = [
        "objective",
        "experiment",
        "best",
        f"value, {metric.unit}",
        "behind",
        "trials",
        "epochs",
    ]
    return [head, *found]


def differing_rows(several: Sequence[NamedSweep]) -> Rows:
    """Return the settings, ranges included, that are not the same in all sweeps."""
    settings = [dict(_all_settings(one.sweep.plan.about["space"])) for one in several]
    names = list(dict.fromkeys(name for flat in settings for name in flat))
    rows = []
    for name in names:
        values = [flat.get(name, "-") for flat in settings]
        if len(set(values)) > 1:
            rows.append([name, *values])
    return [["setting", *(one.name for one in several)], *rows]


def _all_settings(tree: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Yield (dotted name, value as YAML) of every setting; an objective's begin with its name."""
    if isinstance(tree, Mapping) and tree and not _is_range(tree):
        for key, value in tree.items():
            yield from _all_settings(value, f"{name}.{key}" if name else str(key))
    elif isinstance(tree, list) and tree and all(isinstance(item, Mapping) for item in tree):
        for k, item in enumerate(tree):
            label = str(own_code.shown_name(item) or item.get("name") or k + 1)
            yield from _all_settings(item, f"{name}.{label}")
    else:
        yield name, in_yaml(tree)


def _is_range(tree: Mapping[str, Any]) -> bool:
    return "choices" in tree or {"low", "high"} <= tree.keys()


def pair_rows(several: Sequence[NamedSweep]) -> Rows:
    """Return the mean difference of each sweep from the first, over pairs of equal trials."""
    metric = score_of(several[0].sweep.metric)
    first, *others = several
    rows = []
    for one in others:
        for objective in _all_objectives(several):
            before, after = (_by_settings(s.sweep, objective) for s in (first, one))
            differences = [
                metric.factor * (after[key] - before[key]) for key in before if key in after
            ]
            if differences:
                mean = statistics.fmean(differences)
                names, n = f"{one.name} - {first.name}", str(len(differences))
                rows.append([objective, names, n, f"{mean:+.2f}", _interval(differences)])
    unit = "points" if metric.unit == "%" else metric.unit
    head = ["objective", "difference", "pairs", f"mean, {unit}", "95 % over pairs"]
    return [head, *rows]


def _by_settings(sweep: Sweep, objective: str) -> dict[str, float]:
    """Return the values of full-length trials by their searched settings and seed."""
    found = {}
    for record in sweep.full_of(objective):
        key = json.dumps([record.parameters, record.config.get("seed")], sort_keys=True)
        found[key] = record.last[sweep.metric]
    return found


def _interval(differences: Sequence[float]) -> str:
    """Return the 95 % t interval of a mean; of fewer than three pairs there is none to show."""
    from scipy.stats import t

    n = len(differences)
    if n < 3:
        return "-"
    half = float(t.ppf(0.975, n - 1)) * statistics.stdev(differences) / math.sqrt(n)
    mean = statistics.fmean(differences)
    return f"{mean - half:+.2f} to {mean + half:+.2f}"


def _all_objectives(several: Sequence[NamedSweep]) -> list[str]:
    return list(dict.fromkeys(o for one in several for o in one.sweep.plan.rows))


# --- as lines and as a figure ----------------------------------------------------------------------------------


def side_by_side_lines(several: Sequence[NamedSweep], width: int = TERMINAL_WIDTH) -> Sentences:
    """Yield what `tfkd compare` prints, in lines of at most `width` columns."""
    yield f"value: {score_of(several[0].sweep.metric).title} after the last epoch"
    yield ""
    yield from _columns(best_rows(several), width)
    rows = differing_rows(several)
    yield ""
    yield "settings that differ:" if len(rows) > 1 else "all settings are the same"
    yield from _columns(rows, width) if len(rows) > 1 else []
    rows = pair_rows(several)
    yield ""
    if len(rows) > 1:
        yield "trials of equal searched settings and seed:"
        yield from _columns(rows, width)
    else:
        yield "no two trials have the same searched settings and seed"
    yield ""
    yield "This is not a verdict: the best of many trials looks better than it is."


def _columns(rows: Rows, width: int) -> list[str]:
    return in_columns(["\t".join(map(on_one_line, row)) for row in rows], width)


def best_curves(several: Sequence[NamedSweep]) -> Figure:
    """Return the curves of the best trials, those of one objective over each other."""
    metric = score_of(several[0].sweep.metric)
    panels = []
    for objective in _all_objectives(several):
        series = []
        for k, one in enumerate(several):
            ranked = one.sweep.ranked(one.sweep.of(objective, one.sweep.records))
            if ranked:
                series.append(_curve(one, ranked[0], DASHES[k % len(DASHES)]))
        if series:
            panels.append(Panel(objective, Axis("epoch"), one.sweep.axis(), series))
    title = f"{metric.title[0].upper()}{metric.title[1:]} of the best over epochs"
    sentence = "Each line is the best trial of an experiment; the line style shows which."
    return Figure("best-curves", title, sentence, panels, wide=True)


def _curve(one: NamedSweep, record: Record, dash: str) -> Series:
    points = list(epoch_line(one.sweep, record))
    colour = one.sweep.colour(record.objective)
    return Series("lines", [x for x, _ in points], [y for _, y in points], one.name, colour, width=2.0,
                  trials=[record.number] * len(points), dash=dash)  # fmt: skip
