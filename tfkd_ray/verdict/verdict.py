"""The verdict on each arm, from paired seeds: is it better than every baseline? No torch, no Ray.

An arm's *lead* over a baseline is the difference of their metrics, seed by seed, positive if the arm
is better. The t interval over seeds separates the lead from the luck of the seeds, on this test set.
The bootstrap over test images, shown apart, separates it from the luck of the test images. There are
three verdicts:

    better        beats every baseline: its p, the largest of its comparisons' two-sided p (1 where the lead is not
                  positive), is at most 5 % after Holm over the candidates
    not better    not that, and the 95 % interval of its lead over some baseline ends below the metric's `margin`
                  (or at or below 0), so that a lead worth having is ruled out; being worse is a case of it
    cannot tell   neither

`benchmarks/verdict.py` simulates how often they are wrong. To add a metric, add a row to `scores`.

Shapes: n = seeds, N = test images.
"""

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special, stats
from statsmodels.stats.power import TTestPower

from tfkd_ray.settings.columns import in_columns, wrapped
from tfkd_ray.settings.errors import ConfigError, Sentences
from tfkd_ray.settings.files import json_tree
from tfkd_ray.settings.yaml import Tree
from tfkd_ray.verdict.decision import (
    ALPHA,
    ROUNDING,
    Array,
    Decision,
    Leads,
    decide,
    leads_of,
)
from tfkd_ray.verdict.scores import score_of
from tfkd_ray.verdict.seed_plan import SeedPlan
from tfkd_ray.verdict.sequential import Settled, nominal_levels, settle

Word = Literal["better", "not better", "cannot tell"]

POWER = 0.8
"""Power: the probability behind 'would have been seen' in the sentences."""

RESAMPLES = 2000
"""Resamples of the test images for the bootstrap interval."""

MOST_SEEDS = 10_000
"""Larger numbers of seeds are not computed."""


# --- what is compared ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class JudgedMetric:
    """The metric of a verdict, and its format."""

    name: str
    larger_is_better: bool
    percent: bool
    """True: the metric is a fraction, written in points of a hundred."""
    margin: float
    """The smallest lead worth having, in the metric's own unit. A larger margin turns 'cannot tell'
    into 'not better'; it never makes a 'better'."""

    def show(self, value: float) -> str:
        """Return the value without its unit."""
        return f"{100 * value:z.2f}" if self.percent else f"{value:z.4f}"

    def interval(self, low: float | None, high: float | None) -> str:
        """Return an interval as text: '-0.10 to 0.52'; a dash if there is none."""
        if low is None or high is None or not math.isfinite(high - low):
            return "-"
        return f"{self.show(low)} to {self.show(high)}"

    def smallest_seen_text(self, lead: float) -> str:
        """Return the smallest lead that would be seen; no lead of a share is above 100 points."""
        return "> 100" if self.percent and lead > 1 else self.show(lead)

    def within(self, low: float, high: float) -> tuple[float, float]:
        """Return the part of a finite interval of a mean that is possible: a share is in [0, 1]."""
        if not self.percent or not math.isfinite(high - low):
            return low, high
        return max(low, 0.0), min(high, 1.0)

    @property
    def unit(self) -> str:
        """' points', or an empty text."""
        return " points" if self.percent else ""


def metric_of(key: str) -> JudgedMetric:
    """Return the judged metric of a row of `scores.SCORES`."""
    row = score_of(key)
    assert row.margin is not None, f"{key}: no verdict is about it"
    return JudgedMetric(row.name, row.direction == "max", row.unit == "%", row.margin)


ACCURACY = metric_of("val_accuracy")


@dataclass(frozen=True, eq=False)
class JudgedArm:
    """One configuration, trained once a seed."""

    name: str
    seeds: tuple[int, ...]
    """Seeds of the runs that ended; arms are compared on the seeds that both have."""
    values: Array
    """[n] the metric on the test split, in the order of `seeds`."""
    images: NDArray[Any] | None = None
    """[n, N] the metric of each test image (for accuracy: whether it was right); its mean over
    images is the value."""
    clusters: NDArray[Any] | None = None
    """[N] the cluster of each test image, whose images have something in common, such as the person
    who drew them. None: images are independent."""

    def __post_init__(self) -> None:
        n = len(self.seeds)
        assert self.values.shape == (n,), f"{self.name}: {self.values.shape=} {n=}"
        assert len(set(self.seeds)) == n, f"{self.name}: {self.seeds=}"
        if self.images is not None:
            assert self.images.ndim == 2 and len(self.images) == n, (
                f"{self.name}: {self.images.shape=} {n=}"
            )
            off = np.abs(self.images.mean(axis=1) - self.values).max(initial=0)
            assert not off > 1e-5, f"{self.name}: values are not the means over images, {off=}"
            if self.clusters is not None:
                assert self.clusters.shape == self.images.shape[1:], f"{self.clusters.shape=}"


# --- power -----------------------------------------------------------------------------------------------------


def _power(effect: float, n: float, alpha: float) -> float:
    """Return the probability that a true lead of `effect` standard deviations is found significant.

    Two-sided and positive.
    """
    # use one tail at half the level: SciPy's other tail is NaN if tiny, and statsmodels' solver
    # then errs silently
    power = float(TTestPower().power(effect, n, alpha / 2, alternative="larger"))
    return 1.0 if math.isnan(power) else power  # NaN if the power rounds to 1


def smallest_seen(n: int, alpha: float = ALPHA) -> float:
    """Return the lead that n seeds show with `POWER`, in standard deviations of differences."""
    return float(optimize.brentq(lambda effect: _power(effect, n, alpha) - POWER, 1e-6, 1e4))


def seeds_needed(effect: float, alpha: float = ALPHA) -> int | None:
    """Return how many seeds show a lead of `effect` standard deviations with probability `POWER`.

    None above `MOST_SEEDS`.
    """
    effect = abs(effect)
    if _power(effect, MOST_SEEDS, alpha) < POWER:
        return None
    if _power(effect, 2, alpha) >= POWER:
        return 2
    n = float(optimize.brentq(lambda n: _power(effect, n, alpha) - POWER, 2, MOST_SEEDS))
    return math.ceil(n - 1e-6)  # tolerance: of the smallest lead that n seeds show it is n


# --- one arm, one comparison -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Summary:
    """One arm over its seeds; the interval is of its mean."""

    name: str
    n: int
    mean: float
    sd: float
    low: float
    high: float


def summary(arm: JudgedArm) -> Summary:
    """Return mean, standard deviation (ddof 1) and 95 % t interval of the mean; n >= 2."""
    s = leads_of(arm.values)
    return Summary(
        arm.name, len(arm.seeds), float(s.mean), float(s.sd), float(s.low), float(s.high)
    )


def over_seeds(arm: Tree) -> Summary:
    """Return the test accuracy of an arm of confirm.json over its runs, in per cent.

    The mean of no run, and the spread of fewer than two, are NaN. The interval ends at 0 and 100.
    """
    values = 100 * np.array([run["accuracy"] for run in arm["runs"] if "accuracy" in run])
    if len(values) > 1:
        s = summary(JudgedArm(arm["name"], tuple(range(len(values))), values))
        low, high = (100 * end for end in ACCURACY.within(s.low / 100, s.high / 100))
        return replace(s, low=low, high=high)
    return Summary(arm["name"], len(values), *values, *[math.nan] * (4 - len(values)))


@dataclass(frozen=True)
class Paired:
    """The lead of one arm over another, in the metric's unit, on the seeds that both have."""

    over: str
    seeds: tuple[int, ...]
    lead: float
    """Mean lead; positive is better."""
    sd: float
    """Standard deviation of the differences, ddof 1."""
    low: float
    high: float
    """95 % t interval over seeds, on this test set; infinite if there is none (see `leads_of`)."""
    p: float
    """Two-sided p of the paired t test; of the sign test if `constant`."""
    constant: bool
    """True: the lead is the same in every seed."""
    effect: float | None
    """Cohen's d_z with Hedges' correction. None without spread, or at n = 2, where it is always
    0."""
    smallest_seen: float | None
    """The lead over this arm that so many seeds show with probability 0.8 at the observed spread.
    None without spread."""
    needed: int | None
    """Seeds that show a lead this large with probability 0.8 at the observed spread. None: no lead,
    no spread, or above 10,000. It is as uncertain as the lead itself."""
    images: tuple[float, float] | None
    """95 % bootstrap interval of the lead over test images, all seeds of an image together. None
    without `Arm.images`."""


def paired(
    a: JudgedArm,
    b: JudgedArm,
    metric: JudgedMetric = ACCURACY,
    *,
    candidates: int = 1,
    seed: int = 0,
    level: float = ALPHA,
) -> Paired:
    """Return the lead of `a` over `b`, on the seeds that both have.

    Args:
        candidates: number of judged candidates; power is at the level of Holm's first step,
            5 % over this.
        seed: seed of the bootstrap.
        level: of the interval over seeds; below ALPHA in a sequential comparison.
    """
    seeds = tuple(s for s in a.seeds if s in b.seeds)
    rows_a, rows_b = ([arm.seeds.index(s) for s in seeds] for arm in (a, b))
    sign = 1 if metric.larger_is_better else -1
    stat = leads_of(sign * (a.values[rows_a] - b.values[rows_b]), level)
    lead, sd, n, alpha = float(stat.mean), float(stat.sd), len(seeds), ALPHA / candidates
    images = None
    if a.images is not None and b.images is not None:
        assert a.images.shape[1] == b.images.shape[1], (
            f"{a.name}, {b.name}: {a.images.shape=} {b.images.shape=}"
        )
        images = image_interval(
            sign
            * (
                a.images[rows_a].mean(axis=0, dtype=float)
                - b.images[rows_b].mean(axis=0, dtype=float)
            ),
            seed,
            a.clusters,
        )
    return Paired(
        over=b.name,
        seeds=seeds,
        lead=lead,
        sd=sd,
        low=float(stat.low),
        high=float(stat.high),
        p=float(stat.p),
        constant=bool(stat.constant),
        effect=lead / sd * hedges(n - 1) if sd > 0 and n > 2 else None,
        smallest_seen=smallest_seen(n, alpha) * sd if sd > 0 else None,
        needed=seeds_needed(lead / sd, alpha) if sd > 0 and lead != 0 else None,
        images=images,
    )


def hedges(df: int) -> float:
    """Return Hedges' (1981) exact correction of a standardised difference, for `df` >= 2."""
    return float(np.exp(special.gammaln(df / 2) - special.gammaln((df - 1) / 2)) / np.sqrt(df / 2))


def image_interval(
    leads: Array, seed: int = 0, clusters: NDArray[Any] | None = None
) -> tuple[float, float]:
    """Return the 95 % percentile bootstrap interval of the mean of [N] leads, an image each.

    Args:
        clusters: [N]; whole clusters are resampled. None: each image is its own.
    """
    if np.ptp(leads) == 0:
        return float(leads[0]), float(leads[0])
    samples: tuple[NDArray[Any], ...] = (leads,)
    mean: Callable[..., Any] = np.mean
    if clusters is not None:
        _, of_image = np.unique(clusters, return_inverse=True)
        samples, mean = (np.bincount(of_image, leads), np.bincount(of_image)), _mean_of_clusters
    ci = stats.bootstrap(
        samples, mean, n_resamples=RESAMPLES, confidence_level=1 - ALPHA, method="percentile", batch=100,
        paired=True, rng=np.random.default_rng(seed),
    ).confidence_interval  # fmt: skip
    return float(ci.low), float(ci.high)


def _mean_of_clusters(sums: Array, counts: Array, axis: int) -> Array:
    """Return the mean over images from the sums of clusters and their numbers of images."""
    means: Array = sums.sum(axis) / counts.sum(axis)
    return means


# --- the verdict -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Judged:
    """The verdict on one candidate."""

    name: str
    verdict: Word
    sentence: str
    against: str
    """Name of the baseline in the sentence."""
    p: float
    """p that it is better than every baseline."""
    p_holm: float
    comparisons: tuple[Paired, ...]
    """Comparisons with every baseline, in their order."""


@dataclass(frozen=True)
class BaselineLead:
    """The lead of a baseline over plain training, described and not tested.

    It is outside the family of tests: it has no p and no verdict, and Holm does not count it.
    """

    name: str
    over: str
    seeds: tuple[int, ...]
    lead: float
    """Mean lead in the metric's unit; positive is better."""
    sd: float
    """Standard deviation of the differences, ddof 1."""
    low: float
    high: float
    """Interval over seeds, as of `Paired`."""
    images: tuple[float, float] | None
    """Interval over test images, as of `Paired`."""


@dataclass(frozen=True)
class Verdict:
    """All decisions, and the data behind them."""

    verdict: Word
    """`better` if any candidate is; `not better` if none can be; else `cannot tell`."""
    sentence: str
    metric: JudgedMetric
    searched: int | None
    """Number of configurations from which the search chose the candidates."""
    candidates: tuple[Judged, ...]
    arms: tuple[Summary, ...]
    """Candidates, then baselines."""
    notes: tuple[str, ...]
    """Caveats that a reader must see beside the sentences."""
    baseline_leads: tuple[BaselineLead, ...] = ()
    """Leads of the other baselines over plain training, if that is one of them."""

    def to_json(self) -> Tree:
        """Return everything as JSON types; absent bounds and numbers are None."""
        tree = json_tree({"alpha": ALPHA, "power": POWER, **asdict(self)})
        assert isinstance(tree, dict)
        return tree


def judge(
    candidates: Sequence[JudgedArm],
    baselines: Sequence[JudgedArm],
    metric: JudgedMetric = ACCURACY,
    *,
    searched: int | None = None,
    lost: int = 0,
    plan: SeedPlan | None = None,
    seeds: Sequence[int] = (),
    plain: str | None = None,
) -> Verdict:
    """Judge which candidates are better than every baseline; raise a ConfigError if it cannot.

    Args:
        searched: number of configurations from which the search chose the candidates.
        lost: candidates of the same comparison with too few runs to be judged; Holm counts them.
        plan: of a sequential comparison. None: the number of seeds was fixed.
        seeds: of all looks of a sequential comparison so far, in order; some runs may have failed.
        plain: name of the baseline that is plain training, over which the others are described.
    """
    if problems := _problems(candidates, baselines, metric):
        raise ConfigError(problems)
    k, level, settled = len(candidates) + lost, ALPHA, None
    if plan is not None:
        leads = _leads_by_seed(candidates, baselines, metric, seeds)
        settled = settle(leads, plan, metric.margin, lost)
        level = nominal_levels(ALPHA, plan)[len(seeds) - plan.first]
    rows = [
        [paired(a, b, metric, candidates=k, level=level) for b in baselines] for a in candidates
    ]
    decision = _decision(rows, metric, lost)
    if settled is not None:
        decision = _sequential_decision(rows, settled)
    judged = []
    for i, (arm, row) in enumerate(zip(candidates, rows, strict=True)):
        word: Word = "cannot tell"
        if decision.better[i]:
            word = "better"
        elif decision.not_better[i]:
            word = "not better"
        named, p_holm = row[decision.against[i]], float(decision.p_holm[i])
        if settled is None or plan is None:
            sentence = _verdict_sentence(arm.name, word, named, p_holm, k, metric)
        else:
            at = int(settled.seeds[i])
            hopeless = bool(settled.hopeless[i])
            sentence = _sequential_sentence(
                arm.name, word, named, p_holm, metric, plan, at, hopeless
            )
        judged.append(
            Judged(arm.name, word, sentence, named.over, float(decision.p[i]), p_holm, tuple(row))
        )
    words = {j.verdict for j in judged}
    overall: Word = "cannot tell"
    if "better" in words:
        overall = "better"
    elif words == {"not better"}:
        overall = "not better"
    return Verdict(
        verdict=overall,
        sentence=_overall(judged, baselines),
        metric=metric,
        searched=searched,
        candidates=tuple(judged),
        arms=tuple(summary(arm) for arm in (*candidates, *baselines)),
        notes=tuple(_verdict_notes(judged, [*candidates, *baselines], metric)),
        baseline_leads=tuple(_baseline_leads(baselines, plain, metric, level)),
    )


def _baseline_leads(
    baselines: Sequence[JudgedArm], plain: str | None, metric: JudgedMetric, level: float
) -> Iterator[BaselineLead]:
    """Yield the leads over plain training of the baselines that have two seeds in common with it."""
    training = [arm for arm in baselines if arm.name == plain]
    for over in training:
        for arm in baselines:
            if arm.name != plain and len({*arm.seeds} & {*over.seeds}) > 1:
                c = paired(arm, over, metric, level=level)
                yield BaselineLead(arm.name, c.over, c.seeds, c.lead, c.sd, c.low, c.high, c.images)


def _decision(rows: Sequence[Sequence[Paired]], metric: JudgedMetric, lost: int) -> Decision:
    """Return the decision on a fixed number of seeds."""
    fields = {"mean": "lead"} | {f: f for f in ("sd", "low", "high", "p", "constant")}
    arrays = {
        ours: np.array([[getattr(c, theirs) for c in row] for row in rows])
        for ours, theirs in fields.items()
    }
    return decide(Leads(**arrays), metric.margin, lost)


def _sequential_decision(rows: Sequence[Sequence[Paired]], settled: Settled) -> Decision:
    """Return the decision of a sequence of looks, at the last of them."""
    not_better = settled.ruled_out | settled.hopeless
    lowest = np.array([[c.high for c in row] for row in rows]).argmin(axis=-1)
    against = np.where(not_better, lowest, settled.p_each.argmax(axis=-1))
    return Decision(settled.better, not_better, settled.p, settled.p_holm, against)


def _leads_by_seed(
    candidates: Sequence[JudgedArm],
    baselines: Sequence[JudgedArm],
    metric: JudgedMetric,
    seeds: Sequence[int],
) -> Array:
    """Return the leads [k, m, n] over some seeds in order; NaN where one of both has no run."""
    sign = 1 if metric.larger_is_better else -1

    def values(arms: Sequence[JudgedArm]) -> Array:
        rows = np.full((len(arms), len(seeds)), np.nan)
        for row, arm in zip(rows, arms, strict=True):
            row[[seeds.index(seed) for seed in arm.seeds]] = arm.values
        return rows

    leads: Array = sign * (values(candidates)[:, None] - values(baselines)[None])
    return leads


def undecided(
    reasons: Sequence[str], metric: JudgedMetric = ACCURACY, *, searched: int | None = None
) -> Verdict:
    """Return the verdict if nothing can be judged."""
    return Verdict(
        "cannot tell", f"cannot tell: {'; '.join(reasons)}", metric, searched, (), (), ()
    )


def _problems(
    candidates: Sequence[JudgedArm], baselines: Sequence[JudgedArm], metric: JudgedMetric
) -> list[str]:
    arms = [*candidates, *baselines]
    names = [arm.name for arm in arms]
    found = [f"{what}: none; a verdict needs one or more" for what, group in
             (("candidates", candidates), ("baselines", baselines)) if not group]  # fmt: skip
    found += [
        f"{name}: two arms have this name; give each its own"
        for name in names
        if names.count(name) > 1
    ]
    for arm in arms:
        bad = [s for s, v in zip(arm.seeds, arm.values, strict=True) if not np.isfinite(v)]
        if bad:
            found.append(
                f"{arm.name}: {metric.name} is not a finite number at seed {_list(bad)}; a diverged run is a result "
                "and cannot be left out by itself: fix the configuration, or leave the arm out"
            )
    why = "one run has no spread, so no difference can be told from chance; use 2 seeds or more (5 is a good start)"
    few = [arm for arm in arms if len(arm.seeds) < 2]
    found += [f"{arm.name}: n = {len(arm.seeds)}; {why}" for arm in few]
    for a in candidates:
        for b in baselines:
            n = len(set(a.seeds) & set(b.seeds))
            if n < 2 and a not in few and b not in few:
                found.append(f"{a.name} and {b.name}: n = {n} in common; {why}")
    return found


def _list(items: Sequence[Any]) -> str:
    """Join items: 'a', 'a and b', 'a, b and c'."""
    words = [str(item) for item in items]
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _p(p: float) -> str:
    if p < 0.001:
        return "p < 0.001"
    if p < 0.0995:
        return f"p {p:.3f}"
    return f"p {p:.2f}"


def _p_of_verdict(c: Paired, p: float, over_what: str = "") -> str:
    """Return the p of a verdict, and where it comes from if no lead is there to be tested."""
    if c.lead <= 0 and p >= 1:
        return f"two-sided {_p(c.p)}, which counts as 1 because the lead is not positive"
    return _p(p) + over_what


def _verdict_sentence(
    name: str, word: Word, c: Paired, p_holm: float, k: int, metric: JudgedMetric
) -> str:
    n, unit = len(c.seeds), metric.unit
    corrected = _p_of_verdict(c, p_holm, f" after Holm over {k} candidates" if k > 1 else "")
    lead, interval = metric.show(c.lead) + unit, f"95 % {metric.interval(c.low, c.high)}"
    if word == "better":
        spread = "the same in every seed" if c.constant else interval
        return (
            f"{name} is better than every baseline: its lead over {c.over}, the closest call, is {lead} "
            f"({spread}; {corrected}; n = {n})"
        )
    if word == "not better":
        start = f"{name} is not better than {c.over}: "
        if c.constant and abs(c.lead) <= ROUNDING:
            return f"{start}identical in every seed (n = {n})"
        if c.high <= 0:
            worse = metric.show(-c.lead) + unit
            spread = (
                "the same in every seed"
                if c.constant
                else f"95 % {metric.interval(-c.high, -c.low)}"
            )
            return f"{start}it is worse, by {worse} ({spread}; n = {n})"
        spread = "the same in every seed" if c.constant else interval
        return (
            f"{start}its lead is {lead} ({spread}; n = {n}), and one of {metric.show(metric.margin)}{unit} or more is "
            "ruled out"
        )
    start = f"cannot tell at n = {n} whether {name} is better than {c.over}: its lead is {lead} "
    if c.constant:
        enough = next(m for m in range(2, 99) if stats.binomtest(m, m).pvalue <= ALPHA / k)
        return (
            f"{start}in every seed, which is no spread to measure it by ({corrected}); the same in {enough} seeds "
            "would be enough"
        )
    assert c.smallest_seen is not None
    seen = metric.smallest_seen_text(c.smallest_seen)
    one = "not even one of 100" if seen.startswith(">") else f"one of {seen}"
    start += f"({interval}; {corrected}); {one} would have been seen with probability 0.8"
    if c.lead <= 0:
        return start
    seeds = f"more than {MOST_SEEDS:,}" if c.needed is None else f"about {c.needed:,}"
    return f"{start}, and {seeds} seeds would show one of {metric.show(c.lead)}"


def _sequential_sentence(
    name: str,
    word: Word,
    c: Paired,
    p_holm: float,
    metric: JudgedMetric,
    plan: SeedPlan,
    at: int,
    hopeless: bool,
) -> str:
    """Return the sentence on a candidate that was settled at `at` seeds, or by none of the looks."""
    n, unit = len(c.seeds), metric.unit
    lead = metric.show(c.lead) + unit
    spread = "the same in every seed"
    if not c.constant:
        spread = f"95 % over all looks {metric.interval(c.low, c.high)}"
    when = f"settled at {at} of at most {plan.limit} seeds"
    if word == "better":
        return (
            f"{name} is better than every baseline: its lead over {c.over}, the closest call, is {lead} "
            f"({spread}; {_p(p_holm)} over all looks and candidates; n = {n}; {when})"
        )
    if word == "not better" and c.high <= 0:
        worse = metric.show(-c.lead) + unit
        spread = f"95 % over all looks {metric.interval(-c.high, -c.low)}"
        return f"{name} is not better than {c.over}: it is worse, by {worse} ({spread}; n = {n}; {when})"
    if hopeless:
        return (
            f"{name} is not better than {c.over}, as far as {plan.limit} seeds could show: its lead is {lead} "
            f"({spread}; n = {n}; {when}), and more seeds would hardly show it to be better"
        )
    if word == "not better":
        return (
            f"{name} is not better than {c.over}: its lead is {lead} ({spread}; n = {n}; {when}), and one of "
            f"{metric.show(metric.margin)}{unit} or more is ruled out"
        )
    return (
        f"cannot tell with {plan.limit} seeds whether {name} is better than {c.over}: its lead is {lead} "
        f"({spread}; {_p_of_verdict(c, p_holm, ' over all looks and candidates')}; n = {n})"
    )


def _overall(judged: Sequence[Judged], baselines: Sequence[JudgedArm]) -> str:
    groups = {
        word: [j for j in judged if j.verdict == word]
        for word in ("better", "not better", "cannot tell")
    }
    rest = [
        f"{w}: {_list([j.name for j in groups[w]])}"
        for w in ("not better", "cannot tell")
        if groups[w]
    ]
    if len(judged) == 1:
        return judged[0].sentence
    if not groups["better"]:
        return f"no candidate is shown to be better than {_list([b.name for b in baselines])} ({'; '.join(rest)})"
    if len(groups["better"]) == 1:
        start = groups["better"][0].sentence
    else:
        start = f"{_list([j.name for j in groups['better']])} are each better than every baseline"
    return start + (f"; {'; '.join(rest)}" if rest else "")


def _verdict_notes(
    judged: Sequence[Judged], arms: Sequence[JudgedArm], metric: JudgedMetric
) -> Sentences:
    wanted = sorted({s for arm in arms for s in arm.seeds})
    for arm in arms:
        if lacking := [s for s in wanted if s not in arm.seeds]:
            yield (
                f"{arm.name} has no value at seed {_list(lacking)}: compared on the seeds that both arms have"
            )
    if any(len(c.seeds) == 2 for j in judged for c in j.comparisons):
        yield TWO_SEEDS
    for j in judged:
        for c in j.comparisons:
            if c.constant and abs(c.lead) > ROUNDING:
                yield (
                    f"{j.name} over {c.over}: the same lead in every seed; a sign test stands in for the t test"
                )
        if j.verdict == "better":
            yield from _notes_on_better(j, metric)


def _notes_on_better(j: Judged, metric: JudgedMetric) -> Sentences:
    """Yield what limits the lead of a candidate that is better."""
    nearest = next(c for c in j.comparisons if c.over == j.against)
    if nearest.high < metric.margin:
        worth = metric.show(metric.margin) + metric.unit
        yield (
            f"{j.name} over {nearest.over}: the lead is there, but below {worth}, the smallest worth having"
        )
    for c in j.comparisons:
        if c.images is not None and c.images[0] <= 0:
            yield (
                f"{j.name} over {c.over}: the interval over test images is {metric.interval(*c.images)}, so the lead "
                "holds on this test set but may not hold on another of the same size"
            )


TWO_SEEDS = (
    "n = 2: the spread comes from one difference, so only very large leads can be told from chance"
)


def sentences_beside(overall: str, candidates: Sequence[Tree]) -> list[str]:
    """Return the sentences on candidates that the verdict's own sentence does not have.

    Several candidates that two seeds cannot tell share one sentence: the verdict names them.
    """
    unsure = [
        c
        for c in candidates
        if c["verdict"] == "cannot tell" and all(len(p["seeds"]) == 2 for p in c["comparisons"])
    ]
    together = unsure if len(unsure) > 1 else []
    alone = [c["sentence"] for c in candidates if c not in together]
    found = [sentence for sentence in alone if not overall.startswith(sentence)]
    if together:
        found.append(f"cannot tell of {len(together)} candidates at {TWO_SEEDS}")
    return found


def merged_notes(notes: Sequence[str], arms: Collection[str]) -> list[str]:
    """Return notes on arms, each text once, with the names of the arms or pairs that it is about."""
    about: dict[str, list[str]] = {}
    for note in notes:
        name, _, text = note.partition(": ")
        known = name in arms or set(name.split(" over ")) <= set(arms)
        names = about.setdefault(text if known else note, [])
        names += [name] if known else []
    found = []
    for text, names in about.items():
        everyone = len(names) > 1 and set(names) == set(arms)
        start = "all arms" if everyone else _list(names)
        found.append(f"{start}: {text}" if names else text)
    return found


def verdict_table(verdict: Verdict, *, arms: bool = True) -> list[str]:
    """Return the verdict as lines of at most 80 columns.

    Without `arms` only the comparisons and their verdicts.
    """
    metric = verdict.metric
    unit = "points" if metric.percent else "own unit"
    table = [f"{metric.name}, {unit}\tn\tmean ± sd\t95 % over seeds"]
    for s in verdict.arms:
        spread = f"{metric.show(s.mean)} ± {metric.show(s.sd)}"
        interval = metric.interval(*metric.within(s.low, s.high))
        table.append(f"{s.name}\t{s.n}\t{spread}\t{interval}")
    lines = in_columns(table, 80) if arms else []
    for j in verdict.candidates:
        table = [f"lead of {j.name}\tlead\t95 % over seeds\tover images\tp"]
        details = []
        for c in j.comparisons:
            images = "-" if c.images is None else metric.interval(*c.images)
            p = "<.001" if c.p < 0.001 else f"{c.p:.3f}"
            seeds = metric.interval(c.low, c.high)
            table.append(f"  over {c.over}\t{metric.show(c.lead)}\t{seeds}\t{images}\t{p}")
            effect = "-" if c.effect is None else f"{c.effect:z.2f}"
            seen = "-" if c.smallest_seen is None else metric.smallest_seen_text(c.smallest_seen)
            needed = f"{c.needed:,}" if c.needed else "-"
            details.append(
                f"    n {len(c.seeds)}, effect size {effect}, smallest seen {seen}, seeds needed {needed}"
            )
        head, *rows = in_columns(table, 80)
        lines += ["", head]
        for row, detail in zip(rows, details, strict=True):
            lines += [row, detail]
    lines += _described_lines(verdict)
    told = []
    if verdict.searched is not None:
        told.append(
            f"Candidates are the best of {verdict.searched:,} configurations, on validation."
        )
    sentences = sentences_beside(verdict.sentence, verdict.to_json()["candidates"])
    notes = merged_notes(verdict.notes, [s.name for s in verdict.arms])
    unsaid = [note for note in notes if not any(note in sentence for sentence in sentences)]
    for text in (*sentences, *(f"note: {note}" for note in unsaid)):
        told += wrapped(f"{text}.")
    lines += ["", *told] if told else []
    return [*lines, "", *wrapped(f"verdict: {verdict.sentence}.")]


def _described_lines(verdict: Verdict) -> list[str]:
    """Return the table of the baselines' leads over plain training; no line if there is none."""
    if not verdict.baseline_leads:
        return []
    metric, over = verdict.metric, verdict.baseline_leads[0].over
    table = [f"lead over {over}\tlead\t95 % over seeds\tover images"]
    for c in verdict.baseline_leads:
        images = "-" if c.images is None else metric.interval(*c.images)
        seeds = metric.interval(c.low, c.high)
        table.append(f"  of {c.name}\t{metric.show(c.lead)}\t{seeds}\t{images}")
    return ["", *in_columns(table, 80), *wrapped(f"  {DESCRIBED}.", first="  ")]


DESCRIBED = "baselines over plain training: described, not tested, so no verdict is about them"
"""What is said of `Verdict.baseline_leads` wherever they are shown."""
