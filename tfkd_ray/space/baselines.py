"""Hardly tuned baselines: those with too few trials, or far below plain training.

A candidate beats such a baseline without being good. `tfkd tune`, the report and the verdict say
which they are, and `tfkd confirm` tunes them first.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tfkd_ray.store.experiment import BASELINES, Record, best
from tfkd_ray.verdict.limits import NO_LIMITS, Limits
from tfkd_ray.verdict.scores import score_of, sign

FEWEST_TRIALS = 6
"""Fewest trials of a tuned baseline: with 6 random ones, `ce` and `lsr` are on average less than a
point below the best settings of a table of 159 to 277 (digits and Fashion-MNIST); with 2, up to 4.6
points (benchmarks/baselines.py)."""
FAR_BEHIND = 10
"""Margins of the metric that a baseline may be below plain training; of accuracy, 2 points.
Label smoothing with a small alpha is plain training, so it can come closer."""


@dataclass(frozen=True)
class Doubt:
    """A baseline that may not count as tuned."""

    baseline: str
    trials: int
    """Its trials, without failed ones."""
    few: bool
    """True: these are fewer than `FEWEST_TRIALS`."""
    below: str
    """Its distance from plain training, if that is far, as text; else empty."""

    def __str__(self) -> str:
        trials = f"{self.trials} trial{'s' * (self.trials != 1)}" if self.few else ""
        return f"{self.baseline} ({', '.join(filter(None, [trials, self.below]))})"


def doubts(records: Sequence[Record], metric: str, limits: Limits = NO_LIMITS) -> tuple[Doubt, ...]:
    """Return which baselines of a sweep may not count as tuned; none if it has no candidate.

    A baseline whose settings are all fixed cannot be tuned with more trials.

    Args:
        records: all trials of the sweep, and of one that tuned its baselines.
        metric: the metric of a trial's value.
        limits: constraints that the best trial should meet.
    """
    if all(record.objective in BASELINES for record in records):
        return ()
    return tuple(_each_doubt(records, metric, limits))


def _each_doubt(records: Sequence[Record], metric: str, limits: Limits) -> Iterator[Doubt]:
    for name in BASELINES:
        mine = [r for r in records if r.objective == name and r.status != "failed"]
        searched = any(record.parameters for record in mine)
        few = searched and len(mine) < FEWEST_TRIALS
        below = _far_below(records, name, metric, limits)
        if few or below:
            yield Doubt(name, len(mine), few, below)


def _far_below(records: Sequence[Record], name: str, metric: str, limits: Limits) -> str:
    """Return how far the best trial of a baseline is below the best of plain training, if far."""
    ours, plain = (
        best([r for r in records if r.objective == objective], metric, limits)
        for objective in (name, "ce")
    )
    if ours is None or plain is None:
        return ""
    row = score_of(metric)
    assert row.margin is not None, f"{metric=}: no search chooses by it"
    gap = sign(metric) * (plain.judged[metric] - ours.judged[metric])
    unit = "points" if row.unit == "%" else row.unit
    return f"{row.number(gap)} {unit} behind ce" if gap > FAR_BEHIND * row.margin else ""


def doubted(found: Sequence[Doubt]) -> str:
    """Return a clause that names baselines; of no doubt, an empty text."""
    names = " and ".join(str(doubt) for doubt in found)
    return f"hardly tuned: {names}" if found else ""
