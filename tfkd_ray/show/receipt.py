"""What a sweep took beside what was planned, and whether its rungs told the good trials from the bad. No Ray.

How many trials pass a rung is an expectation: trial i is judged among the i that have come so far, and with equal
chances it is among the best i / `factor` of them, or the best. Better proposals later on pass more.
"""

import itertools
import math
import statistics
import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from tfkd_ray.space.ranges import Range
from tfkd_ray.space.search_config import Halving, Hyperband
from tfkd_ray.space.space import Space
from tfkd_ray.store.experiment import Record
from tfkd_ray.verdict import scores

MIN_TRIALS = 8
"""Fewest full-length trials of an objective from which a rung is judged."""
LOW = 0.3
"""A correlation below this is too low for stopping by."""
Z = 1.645
"""Of a one-sided 95 % interval."""


# --- planned, used, saved --------------------------------------------------------------------------------------


def shares(space: Space) -> dict[str, int]:
    """Trials of each objective, were they dealt out equally."""
    trials, n = space.search.num_samples, len(space.branches)
    return {
        branch.objective: trials // n + (k < trials % n) for k, branch in enumerate(space.branches)
    }


def reaching(space: Space, trials: int) -> tuple[tuple[int, float], ...]:
    """(epoch, trials of one objective that are expected to come to it), for each rung and the last epoch."""
    stopping, epochs = space.search.stopping, space.epochs
    halvings, sizes, factor = [list[int]()], {0: trials}, 1
    if isinstance(stopping, Halving):
        halvings, factor = [stopping.rungs(epochs)], stopping.factor
    if isinstance(stopping, Hyperband):
        halvings, sizes = stopping.brackets(epochs), stopping.dealt(epochs, trials)
    come = dict.fromkeys(sorted({epochs, *itertools.chain(*halvings)}), 0.0)
    for b, rungs in enumerate(halvings):
        here = float(sizes[b])
        for epoch in come:
            come[epoch] += here
            if epoch in rungs:
                here = _passing(round(here), factor)
    return tuple(come.items())


EXACT = 10_000
"""Trials up to which what is expected is summed up one by one."""


def _passing(trials: int, factor: int) -> float:
    """Trials that are expected to pass a rung: the sum of max(1, i // factor) / i over the i-th that comes there.

    Beyond `EXACT`, with n = trials // factor and the harmonic numbers H, the sum of (i // factor) / i is n H(trials)
    less the H(j factor - 1) of j = 1 to n: of these, Euler's and Stirling's formulas give the sum at once.
    """
    if trials <= EXACT:
        return sum(max(1, i // factor) / i for i in range(1, trials + 1))
    first = _harmonic(min(factor - 1, trials))
    n = trials // factor
    if n <= EXACT:
        return first + sum(_harmonic(trials) - _harmonic(j * factor - 1) for j in range(1, n + 1))
    logs = math.lgamma(n + 1) + n * math.log(factor)
    lower = logs + n * EULER - _harmonic(n) / (2 * factor) - math.pi**2 / 72 / factor**2
    return first + n * _harmonic(trials) - lower


EULER = 0.5772156649015329


def _harmonic(n: int) -> float:
    """1 + 1/2 + ... + 1/n."""
    if n < 100:
        return sum(1 / i for i in range(1, n + 1))
    return math.log(n) + EULER + 1 / (2 * n) - 1 / (12 * n**2)


def expected_epochs(space: Space, trials: int) -> float:
    """Epochs that trials of one objective are expected to take in all."""
    come = reaching(space, trials)
    return sum(
        count * (epoch - before)
        for (epoch, count), before in zip(come, (0, *(e for e, _ in come)), strict=False)
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
        return float(
            held
            / 3600
            * sum(e * (seconds[o] / took[o] if took[o] else mean) for o, e in epochs.items())
        )

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


class Ranking(NamedTuple):
    """How well the value at a rung told the final one, for one objective."""

    objective: str
    rung: int
    """Epochs before it."""
    n: int
    """Trials of full length: only they have a final value."""
    judged: int
    """Trials that came to the rung."""
    rank: float
    """Spearman's rank correlation of the two values over them."""
    corrected: float
    """The correlation (of normal scores) over all trials that were judged at the rung, as far as the survivors tell.

    Those who survive a rung differ less there than those who came to it, which hides a correlation; this is
    Thorndike's correction (1949, case 2) for the ratio of the two spreads."""
    most: float
    """The upper end of its one-sided 95 % interval (Fisher's z)."""


def rank_correlations(space: Space, records: Sequence[Record]) -> Iterator[Ranking]:
    """For each objective and rung, where there are enough trials of full length and they differ."""
    from scipy.stats import spearmanr

    for branch, rung in itertools.product(
        space.branches, space.search.stopping.rungs(space.epochs)
    ):
        pairs = _pairs(space, records, branch.objective, rung)
        at_rung, at_end = [pair[1] for pair in pairs], [pair[2] for pair in pairs]
        if len(pairs) < MIN_TRIALS or len(set(at_rung)) == 1 or len(set(at_end)) == 1:
            continue
        judged = [
            v
            for r in records
            if r.objective == branch.objective
            for v in [_value_at(space, r, rung)]
        ]
        judged = [v for v in judged if math.isfinite(v)]
        score = dict(zip(judged, _normal_scores(judged), strict=True))
        seen = [score[v] for v in at_rung]
        z = math.atanh(
            max(-0.999, min(0.999, statistics.correlation(seen, _normal_scores(at_end))))
        )
        ratio = statistics.pstdev(score[v] for v in judged) / statistics.pstdev(seen)
        corrected, most = (
            x * ratio / math.sqrt(1 - x * x + x * x * ratio * ratio)
            for x in (math.tanh(z), math.tanh(z + Z / math.sqrt(len(pairs) - 3)))
        )
        rank = float(spearmanr(at_rung, at_end).statistic)
        yield Ranking(branch.objective, rung, len(pairs), len(judged), rank, corrected, most)


def _normal_scores(values: Sequence[float]) -> list[float]:
    """Each value's place among all, as a quantile of the normal distribution."""
    from scipy.stats import norm, rankdata

    return [float(x) for x in norm.ppf((rankdata(values) - 0.5) / len(values))]


def _value_at(space: Space, record: Record, epoch: int) -> float:
    """The metric of a trial after an epoch; NaN if it did not come to it."""
    return next(
        (m.get(space.search.metric, math.nan) for m in record.metrics if m.get("epoch") == epoch),
        math.nan,
    )


def _pairs(
    space: Space, records: Sequence[Record], objective: str, rung: int
) -> list[tuple[Record, float, float]]:
    """The full-length trials of an objective, with their values at a rung and at the end."""
    found = [
        (r, _value_at(space, r, rung), r.last.get(space.search.metric, math.nan))
        for r in records
        if r.objective == objective and r.status == "done"
    ]
    return [pair for pair in found if math.isfinite(pair[1]) and math.isfinite(pair[2])]


def fidelity_warnings(space: Space, records: Sequence[Record]) -> list[str]:
    """Where early stopping may not have been safe: a sentence for each objective, at its first rung that did not rank.

    The rule, for 8 or more full-length trials of the objective: the correlation of the value at the rung with the
    final one, corrected for the selection there, is below 0.3 with 95 % confidence; or it is below 0.3, and a setting
    goes with rising in rank after the rung. How often that is right is measured: benchmarks/RESULTS.md.
    """
    found: dict[str, str] = {}
    rungs = space.search.stopping.rungs(space.epochs)
    for at in rank_correlations(space, records):
        bloomers = _late_bloomers(space, records, at.objective, at.rung)
        if at.objective not in found and (at.most < LOW or (at.corrected < LOW and bloomers)):
            later = [r for r in rungs if r > at.rung]
            instead = (
                f"set search.stopping.min_epochs: {later[0]}, or stopping: none"
                if later
                else "set stopping: none"
            )
            found[at.objective] = (
                f"stopping {at.objective} after {at.rung} epochs may not have been safe: over the {at.n} trials of "
                f"full length the rank correlation of the value there with the final one is {at.rank:.2f}, corrected "
                f"for the selection there {at.corrected:.2f} (below {LOW}){bloomers}; {instead}"
            )
    return list(found.values())


def _late_bloomers(space: Space, records: Sequence[Record], objective: str, rung: int) -> str:
    """Which setting goes with rising in rank after a rung, if one does clearly; the others are allowed for."""
    from scipy.stats import rankdata, spearmanr

    pairs = _pairs(space, records, objective, rung)
    sign = scores.sign(space.search.metric)
    rises = rankdata([sign * p[2] for p in pairs]) - rankdata([sign * p[1] for p in pairs])
    strongest: tuple[float, str] = (0.05, "")
    searched = [
        p
        for b in space.branches
        if b.objective == objective
        for p in b.parameters
        if isinstance(p.domain, Range)
    ]
    for p in searched:
        having = [k for k, pair in enumerate(pairs) if p.name in pair[0].parameters]
        values, rise = [pairs[k][0].parameters[p.name] for k in having], [rises[k] for k in having]
        if len(set(values)) > 1 and len(set(rise)) > 1:
            rank = spearmanr(values, rise)
            which = "high" if rank.statistic > 0 else "low"
            sentence = f"; trials with {which} {p.name} rise after it"
            strongest = min(strongest, (float(rank.pvalue) * len(searched), sentence))
    return strongest[1]


def receipt_lines(space: Space, records: Sequence[Record], width: int = 80) -> Iterator[str]:
    """Receipt and warnings for a terminal."""
    rows = receipt_rows(receipt(space, records))
    yield from (f"{what:<24} {amount}" for what, amount in rows)
    for warning in fidelity_warnings(space, records):
        yield from textwrap.wrap(f"warning: {warning}", width, subsequent_indent="  ")
