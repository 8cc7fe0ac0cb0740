"""What a sweep took beside what was planned, and whether its rungs told the good trials from the bad. No Ray.

How many trials pass a rung is an expectation: trial i is judged among the i that have come so far, and with equal
chances it is among the best i / `factor` of them, or the best. Better proposals later on pass more.
"""

import itertools
import math
import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tfkd_ray.experiment import DIRECTIONS, Record
from tfkd_ray.space import Halving, Hyperband, Parameter, Range, Space

MIN_TRIALS = 8
"""Fewest full-length trials of an objective from which a rung is judged."""
LOW = 0.3
"""A rank correlation below this is a warning."""


# --- planned, used, saved --------------------------------------------------------------------------------------


def shares(space: Space) -> dict[str, int]:
    """Trials of each objective, were they dealt out equally."""
    trials, n = space.search.num_samples, len(space.branches)
    return {branch.objective: trials // n + (k < trials % n) for k, branch in enumerate(space.branches)}


def reaching(space: Space, trials: int) -> tuple[tuple[int, float], ...]:
    """(epoch, trials of one objective that are expected to come to it), for each rung and the last epoch."""
    stopping, epochs = space.search.stopping, space.epochs
    halvings, sizes, factor = [list[int]()], Counter({0: trials}), 1
    if isinstance(stopping, Halving):
        halvings, factor = [stopping.rungs(epochs)], stopping.factor
    if isinstance(stopping, Hyperband):
        halvings, sizes = stopping.brackets(epochs), Counter(stopping.bracket(epochs, k) for k in range(trials))
    come = dict.fromkeys(sorted({epochs, *itertools.chain(*halvings)}), 0.0)
    for b, rungs in enumerate(halvings):
        here = float(sizes[b])
        for epoch in come:
            come[epoch] += here
            if epoch in rungs:
                here = sum(max(1, i // factor) / i for i in range(1, round(here) + 1))
    return tuple(come.items())


def expected_epochs(space: Space, trials: int) -> float:
    """Epochs that trials of one objective are expected to take in all."""
    come = reaching(space, trials)
    return sum(
        count * (epoch - before) for (epoch, count), before in zip(come, (0, *(e for e, _ in come)), strict=False)
    )


@dataclass(frozen=True)
class Receipt:
    """Epochs, and hours of what they ran on: planned and actual."""

    most: int
    """Epochs if no trial were stopped."""
    expected: float
    """Epochs that `tfkd plan` expects."""
    used: int
    saved: int
    """Epochs that stopped trials did not take."""
    unit: str
    """GPU-hours, or CPU-hours where trials use no GPU."""
    hours: Mapping[str, float]
    """Of each of the above by its name, all at the measured seconds an epoch of each objective; `used` as it was."""


def receipt(space: Space, records: Sequence[Record]) -> Receipt:
    """What a sweep was planned to take, took, and saved."""
    length, config = space.epochs, space.tree
    took: Counter[str] = Counter()
    seconds: Counter[str] = Counter()
    saved: Counter[str] = Counter()
    for r in records:
        epochs = int(r.last.get("epoch", 0))
        took[r.objective] += epochs
        seconds[r.objective] += sum(m.get("seconds", 0.0) for m in r.metrics)  # type: ignore[assignment]
        saved[r.objective] += length - epochs if r.status == "stopped" else 0
    most = {o: n * length for o, n in shares(space).items()}
    expected = {o: expected_epochs(space, n) for o, n in shares(space).items()}
    gpus = config["workers"] * config["gpus_per_worker"]
    held = gpus or config["workers"] * config["cpus_per_worker"]
    mean = seconds.total() / took.total() if took.total() else 0.0

    def hours(epochs: Mapping[str, float]) -> float:
        return float(held / 3600 * sum(e * (seconds[o] / took[o] if took[o] else mean) for o, e in epochs.items()))

    return Receipt(
        sum(most.values()), sum(expected.values()), took.total(), saved.total(), "GPU-hours" if gpus else "CPU-hours",
        {"most": hours(most), "expected": hours(expected), "used": hours(took), "saved": hours(saved)},
    )  # fmt: skip


def receipt_rows(found: Receipt) -> list[tuple[str, str]]:
    """A receipt as (what, how much)."""

    def amount(name: str, epochs: float) -> str:
        return f"{epochs:,.0f} epochs, {found.hours[name]:.2g} {found.unit}"

    share = f" ({100 * found.saved / found.most:.0f} % of the plan)" if found.most else ""
    return [
        ("planned, none stopped", amount("most", found.most)),
        ("expected by tfkd plan", amount("expected", found.expected)),
        ("used", amount("used", found.used)),
        ("saved by early stopping", amount("saved", found.saved) + share),
    ]


# --- rungs -----------------------------------------------------------------------------------------------------


def rank_correlations(space: Space, records: Sequence[Record]) -> Iterator[tuple[str, int, int, float]]:
    """(objective, rung, n, Spearman's rank correlation of the value there with the final one), where n is enough.

    Over the full-length trials of the objective: those that were stopped have no final value.
    """
    from scipy.stats import spearmanr

    for branch, rung in itertools.product(space.branches, space.search.stopping.rungs(space.epochs)):
        pairs = _pairs(space, records, branch.objective, rung)
        if len(pairs) >= MIN_TRIALS and all(len({p[k] for p in pairs}) > 1 for k in (1, 2)):
            rank = float(spearmanr([p[1] for p in pairs], [p[2] for p in pairs]).statistic)
            yield branch.objective, rung, len(pairs), rank


def _pairs(space: Space, records: Sequence[Record], objective: str, rung: int) -> list[tuple[Record, float, float]]:
    """The full-length trials of an objective, with their values at a rung and at the end."""
    metric = space.search.metric
    found = [
        (r, next((m.get(metric, math.nan) for m in r.metrics if m.get("epoch") == rung), math.nan), r.last[metric])
        for r in records
        if r.objective == objective and r.status == "done" and metric in r.last
    ]
    return [pair for pair in found if math.isfinite(pair[1]) and math.isfinite(pair[2])]


def fidelity_warnings(space: Space, records: Sequence[Record]) -> list[str]:
    """Where early stopping was not safe: a sentence for each objective, at its first rung that does not rank.

    The rule: of 8 or more full-length trials of the objective, the rank correlation of the value at the rung with the
    final one is below 0.3.
    """
    found: dict[str, str] = {}
    rungs = space.search.stopping.rungs(space.epochs)
    for objective, rung, n, rank in rank_correlations(space, records):
        if rank < LOW and objective not in found:
            later = [r for r in rungs if r > rung]
            instead = (
                f"set search.stopping.min_epochs: {later[0]}, or stopping: none" if later else "set stopping: none"
            )
            found[objective] = (
                f"stopping {objective} after {rung} epochs was not safe: over the {n} trials of full length the rank "
                f"correlation of the value there with the final one is {rank:.2f} (below {LOW}; of survivors it is "
                f"often low){_late_bloomers(space, records, objective, rung)}; {instead}"
            )
    return list(found.values())


def _late_bloomers(space: Space, records: Sequence[Record], objective: str, rung: int) -> str:
    """Which setting goes with rising in rank after a rung, if one does clearly."""
    from scipy.stats import rankdata, spearmanr

    pairs = _pairs(space, records, objective, rung)
    sign = 1 if DIRECTIONS[space.search.metric] == "max" else -1
    rise = rankdata([sign * p[2] for p in pairs]) - rankdata([sign * p[1] for p in pairs])
    strongest: tuple[float, Parameter | None] = (0.0, None)
    for p in next(b for b in space.branches if b.objective == objective).parameters:
        values: list[Any] = [pair[0].parameters.get(p.name, math.nan) for pair in pairs]
        if isinstance(p.domain, Range) and len(set(values)) > 1 and len(set(rise)) > 1:
            rank = float(spearmanr(values, rise).statistic)
            strongest = max(strongest, (rank, p), key=lambda found: abs(found[0]))
    if strongest[1] is None or abs(strongest[0]) < 0.5:
        return ""
    return f"; trials with {'high' if strongest[0] > 0 else 'low'} {strongest[1].name} rise after it"


def receipt_lines(space: Space, records: Sequence[Record], width: int = 80) -> Iterator[str]:
    """Receipt and warnings for a terminal."""
    rows = receipt_rows(receipt(space, records))
    yield from (f"{what:<24} {amount}" for what, amount in rows)
    for warning in fidelity_warnings(space, records):
        yield from textwrap.wrap(f"warning: {warning}", width, subsequent_indent="  ")
