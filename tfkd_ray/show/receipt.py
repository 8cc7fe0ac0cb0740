"""Planned and actual cost of a sweep, and whether its rungs separated good trials from bad. No Ray.

The number of trials that pass a rung is an expectation: trial i is judged among the i that reached
the rung so far, and with equal chances it is among the best i / `factor` of them, or the best. If
later proposals are better, more of them pass. Where trials pause, all come to the first rung before
any passes it.
"""

import itertools
import math
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from tfkd_ray.settings.columns import in_columns, wrapped
from tfkd_ray.space.ranges import Range
from tfkd_ray.space.search_config import Halving, Hyperband, Pausing
from tfkd_ray.space.space import Space
from tfkd_ray.store.experiment import Record
from tfkd_ray.verdict import scores

MIN_TRIALS = 8
"""Fewest full-length trials of an objective for which a rung is judged."""
LOW = 0.3
"""Correlations below this are too low for early stopping."""
Z = 1.645
"""Normal quantile of a one-sided 95 % interval."""


# --- planned, used, saved --------------------------------------------------------------------------------------


def shares(space: Space, begun: int = 0) -> dict[str, int]:
    """Return the trials of each objective if they were dealt out equally.

    Args:
        begun: number of trials to deal out if a budget alone ends the search.
    """
    trials, n = space.search.num_samples, len(space.branches)
    trials = begun if trials is None else trials
    return {
        branch.objective: trials // n + (k < trials % n) for k, branch in enumerate(space.branches)
    }


def reaching(space: Space, trials: int) -> tuple[tuple[int, float], ...]:
    """Return (epoch, expected number of one objective's trials that reach it).

    For each rung and the last epoch.
    """
    stopping, epochs = space.stopping, space.epochs
    halvings, sizes, factor = [list[int]()], {0: trials}, 1
    if isinstance(stopping, Halving):
        halvings, factor = [stopping.rungs(epochs)], stopping.factor
    if isinstance(stopping, Hyperband):
        halvings, sizes = stopping.brackets(epochs), stopping.dealt(epochs, trials)
    passing = _going_on if isinstance(stopping, Pausing) else _passing
    come = dict.fromkeys(sorted({epochs, *itertools.chain(*halvings)}), 0.0)
    for b, rungs in enumerate(halvings):
        here = float(sizes[b])
        for epoch in come:
            come[epoch] += here
            if epoch in rungs:
                here = passing(round(here), factor)
    return tuple(come.items())


EXACT = 10_000
"""Most trials for which the expectation is summed term by term."""


def _passing(trials: int, factor: int) -> float:
    """Return how many trials are expected to pass a rung.

    It is the sum of max(1, i // factor) / i over the trials i that reach it.

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


def _going_on(trials: int, factor: int) -> float:
    """Return how many of the trials that pause at a rung go on, once all are there."""
    return max(1, trials // factor)


EULER = 0.5772156649015329


def _harmonic(n: int) -> float:
    """Return 1 + 1/2 + ... + 1/n."""
    if n < 100:
        return sum(1 / i for i in range(1, n + 1))
    return math.log(n) + EULER + 1 / (2 * n) - 1 / (12 * n**2)


def expected_epochs(space: Space, trials: int) -> float:
    """Return the expected epochs of all trials of one objective."""
    come = reaching(space, trials)
    return sum(
        count * (epoch - before)
        for (epoch, count), before in zip(come, (0, *(e for e, _ in come)), strict=False)
    )


@dataclass(frozen=True)
class Receipt:
    """Planned and actual epochs and hours."""

    most: int
    """Epochs if no trial were stopped."""
    expected: float
    """Epochs that `tfkd plan` expects."""
    used: int
    saved: int
    """Epochs that stopped trials skipped."""
    unit: str
    """GPU-hours, or CPU-hours if trials use no GPU."""
    endless: bool
    """True if a budget alone ends the search: the plan is then one of the trials that have begun."""
    hours: Mapping[str, float]
    """Hours of each of the above by its name, at each objective's measured seconds an epoch; `used`
    is the measured total."""
    further: int | None = None
    """Epochs of finalists' runs with further seeds, beside those used; None if the space has none."""


def receipt(space: Space, records: Sequence[Record]) -> Receipt:
    """Compare the plan of a sweep with what it took and saved."""
    length, config = space.epochs, space.tree
    took: Counter[str] = Counter()
    seconds: Counter[str] = Counter()
    saved: Counter[str] = Counter()
    for r in records:
        epochs = int(r.last.get("epoch", 0))
        took[r.objective] += epochs
        seconds[r.objective] += sum(m.get("seconds", 0.0) for m in r.metrics)  # type: ignore[assignment]
        early = r.status == "stopped" and r.reason is None  # not by tfkd stop
        saved[r.objective] += length - epochs if early else 0
    dealt = shares(space, len(records))
    most = {o: n * length for o, n in dealt.items()}
    expected = {o: expected_epochs(space, n) for o, n in dealt.items()}
    gpus = config["workers"] * config["gpus_per_worker"]
    held = gpus or config["workers"] * config["cpus_per_worker"]
    mean = seconds.total() / took.total() if took.total() else 0.0

    again = [run for r in records for run in r.further]
    further = sum(int(run.last.get("epoch", 0)) for run in again)
    took_further = sum(m.get("seconds", 0.0) for run in again for m in run.metrics)

    def hours(epochs: Mapping[str, float]) -> float:
        return float(
            held
            / 3600
            * sum(e * (seconds[o] / took[o] if took[o] else mean) for o, e in epochs.items())
        )

    return Receipt(
        sum(most.values()), sum(expected.values()), took.total(), saved.total(), "GPU-hours" if gpus else "CPU-hours",
        space.search.num_samples is None,
        {"most": hours(most), "expected": hours(expected), "used": hours(took), "saved": hours(saved),
         "further": held / 3600 * took_further},
        None if space.search.finalists is None else further,
    )  # fmt: skip


def receipt_rows(found: Receipt) -> list[tuple[str, str]]:
    """Return a receipt as rows (name, amount)."""

    def amount(name: str, epochs: float) -> str:
        return f"{epochs:,.0f} epochs, {found.hours[name]:.2g} {found.unit}"

    whole = "these trials" if found.endless else "the plan"
    further = (
        []
        if found.further is None
        else [("used for further seeds", amount("further", found.further))]
    )
    share = f" ({100 * found.saved / found.most:.0f} % of {whole})" if found.most else ""
    return [
        (
            "begun, none stopped" if found.endless else "planned, none stopped",
            amount("most", found.most),
        ),
        ("expected by tfkd plan", amount("expected", found.expected)),
        ("used", amount("used", found.used)),
        *further,
        ("saved by early stopping", amount("saved", found.saved) + share),
    ]


# --- rungs -----------------------------------------------------------------------------------------------------


class Ranking(NamedTuple):
    """The agreement between the value at a rung and the final one, for one objective."""

    objective: str
    rung: int
    """Epochs before the rung."""
    n: int
    """Trials of full length: only they have a final value."""
    judged: int
    """Trials that reached the rung."""
    rank: float
    """Spearman's rank correlation of the two values, over the trials of full length."""
    corrected: float
    """Correlation of normal scores over all trials judged at the rung, estimated from survivors.

    Survivors of a rung differ less there than all trials that reached it, which lowers the
    correlation. This is Thorndike's correction (1949, case 2) for the ratio of the two spreads."""
    most: float
    """Upper end of its one-sided 95 % interval (Fisher's z)."""


def rank_correlations(space: Space, records: Sequence[Record]) -> Iterator[Ranking]:
    """Yield a ranking for each objective and rung with enough full-length trials that differ."""
    from scipy.stats import spearmanr

    for branch, rung in itertools.product(space.branches, space.rungs):
        pairs = _pairs(space, records, branch.objective, rung)
        at_rung, at_end = [pair[1] for pair in pairs], [pair[2] for pair in pairs]
        if len(pairs) < MIN_TRIALS or len(set(at_rung)) == 1 or len(set(at_end)) == 1:
            continue
        judged = [
            v
            for r in records
            if r.objective == branch.objective
            for v in [value_at_rung(space, r, rung)]
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
    """Return each value's rank as a quantile of the normal distribution."""
    from scipy.stats import norm, rankdata

    return [float(x) for x in norm.ppf((rankdata(values) - 0.5) / len(values))]


def value_at_rung(space: Space, record: Record, epoch: int) -> float:
    """Return the metric of a trial after an epoch; NaN if the trial did not reach it."""
    return next(
        (m.get(space.search.metric, math.nan) for m in record.metrics if m.get("epoch") == epoch),
        math.nan,
    )


def _pairs(
    space: Space, records: Sequence[Record], objective: str, rung: int
) -> list[tuple[Record, float, float]]:
    """Return the full-length trials of an objective with their values at a rung and at the end."""
    found = [
        (r, value_at_rung(space, r, rung), r.last.get(space.search.metric, math.nan))
        for r in records
        if r.objective == objective and r.status == "done"
    ]
    return [pair for pair in found if math.isfinite(pair[1]) and math.isfinite(pair[2])]


def fidelity_warnings(space: Space, records: Sequence[Record]) -> list[str]:
    """Return a warning for each objective whose early stopping may have been unsafe.

    It names the objective's first rung that did not rank trials well.

    The rule, for 8 or more full-length trials of the objective: the correlation of the value at the
    rung with the final one, corrected for the selection there, is below 0.3 with 95 % confidence;
    or it is below 0.3, and a setting correlates with a rise in rank after the rung.
    benchmarks/RESULTS.md has measurements of how often that is right.
    """
    found: dict[str, str] = {}
    if space.search.more_metrics:  # rungs judge by all of them, and this rule by one
        return []
    rungs = space.rungs
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
                "full length, the rank correlation between the value at that epoch and the final value is "
                f"{at.rank:.2f}, or {at.corrected:.2f} (below {LOW}) after a correction for the trials that were "
                f"stopped there{bloomers}; {instead}"
            )
    return list(found.values())


def _late_bloomers(space: Space, records: Sequence[Record], objective: str, rung: int) -> str:
    """Return a phrase on the setting that correlates clearly with a rise in rank after a rung.

    Empty if none does. The test is corrected for the number of settings.
    """
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
            sentence = f"; trials with {which} {p.name} gain ranks after that epoch"
            strongest = min(strongest, (float(rank.pvalue) * len(searched), sentence))
    return strongest[1]


def receipt_lines(space: Space, records: Sequence[Record], width: int = 80) -> Iterator[str]:
    """Yield the receipt and its warnings for a terminal."""
    rows = receipt_rows(receipt(space, records))
    yield from in_columns(map("\t".join, rows))
    for warning in fidelity_warnings(space, records):
        yield from wrapped(f"warning: {warning}", width)
