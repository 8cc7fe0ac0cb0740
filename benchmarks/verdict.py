"""How often the verdict is wrong: simulated experiments through the shipped `leads_of` and `decide`.

    python benchmarks/verdict.py [--simulations 20000] [--seed 0] [--sequential] [--finalists]

Each simulation is an experiment: k = 3 candidates and m = 3 baselines, all on the same n seeds and the same test set.

- Test set: N images, drawn anew for each simulation from images of 24 difficulties, so that images are hard or easy for
  all arms and seeds alike. The probability of being right is Beta distributed over them; its mean is the accuracy, and
  the mean of p (1 - p) is 0.04 for the large set, so that runs differ by 0.20 points through single answers.
- Seed: shifts an arm's true accuracy by a normal with standard deviation 0.25 points, half of its variance shared by
  the arms of that seed (so pairing helps some), more on images that are neither hard nor easy.
- Every answer to every image is then a coin toss.

So two runs of one configuration differ by 0.32 points (standard deviation, 0.15 to 0.40 are published for CIFAR-100),
and paired differences have 0.38.
"""

import argparse
import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, stats
from statsmodels.stats.contingency_tables import mcnemar

from tfkd_ray.verdict.decision import ALPHA, decide, leads_of
from tfkd_ray.verdict.seed_plan import SeedPlan
from tfkd_ray.verdict.sequential import nominal_levels, settle
from tfkd_ray.verdict.verdict import ACCURACY

Array = NDArray[np.float64]
CANDIDATES = BASELINES = 3
SEEDS = (3, 5, 10)
PLAN = SeedPlan(3, 20)
SEQUENTIAL_GAINS = (0.0, 0.1, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6)
"""In points; at 20 seeds they take the power of the fixed comparison from 0 to 1."""
CHUNK = 2000
"""Number of simulations at a time."""


@dataclass(frozen=True)
class World:
    """A test set and the variation of runs on it."""

    images: int = 10_000
    accuracy: float = 0.77
    doubt: float = 0.04
    """Mean of p (1 - p) over images."""
    seed_sd: float = 0.0025
    shared: float = 0.5
    """Share of the seeds' variance that all arms have in common."""
    difficulties: int = 24

    def probabilities(self) -> Array:
        """Return the [G] probabilities of a correct answer for G equally large sets of images."""
        middle = (np.arange(self.difficulties) + 0.5) / self.difficulties

        def of(point: Array) -> Array:
            mean, total = 1 / (1 + np.exp(-point[0])), np.exp(point[1])
            return stats.beta.ppf(middle, mean * total, (1 - mean) * total)

        def off(point: Array) -> list[float]:
            p = of(point)
            return [p.mean() - self.accuracy, (p * (1 - p)).mean() - self.doubt]

        return of(optimize.root(off, [np.log(self.accuracy / (1 - self.accuracy)), -1.0]).x)

    def accuracies(
        self,
        rng: np.random.Generator,
        simulations: int,
        seeds: int,
        gains: Array,
        own_images: float = 0.0,
    ) -> tuple[Array, Array]:
        """Return measured [S, arms, seeds] and expected [S, arms] accuracies on the test set.

        Args:
            gains: [arms] or [S, arms], true differences of the arms' accuracies over all images.
            own_images: standard deviation over images of an arm's own probability on them.
        """
        p = self.probabilities()
        weight = p * (1 - p) / (p * (1 - p)).mean()
        counts = rng.multinomial(self.images, np.full(len(p), 1 / len(p)), simulations)
        gains = np.broadcast_to(gains, (simulations, np.shape(gains)[-1]))
        common = rng.standard_normal((simulations, 1, seeds)) * self.seed_sd * self.shared**0.5
        own = rng.standard_normal((*gains.shape, seeds)) * self.seed_sd * (1 - self.shared) ** 0.5
        likes = rng.standard_normal(gains.shape) * own_images / self.images**0.5
        level = (gains + likes)[..., None]
        chance = p + (level + common + own)[..., None] * weight
        measured = (
            rng.binomial(counts[:, None, None, :], np.clip(chance, 0, 1)).sum(axis=-1) / self.images
        )
        return measured, ((p + level * weight) * counts[:, None, :]).sum(axis=-1) / self.images


LARGE = World()
SMALL = World(images=360, accuracy=0.97, doubt=0.012)
"""Like the digits' test split: differences of a few images, often the same for all seeds."""


@dataclass
class Rates:
    """Sums over simulations."""

    simulations: int = 0
    any_better: int = 0
    """Experiments with a 'better' among the counted candidates."""
    any_clear: int = 0
    """Those without a note that it may hold on this test set only."""
    better: int = 0
    """Verdicts, of `judged`."""
    not_better: int = 0
    judged: int = 0
    covered: int = 0
    """Intervals, of `intervals`, that contain the expected lead on this test set."""
    covered_all: int = 0
    """Intervals that contain the lead over all images."""
    intervals: int = 0

    def add(
        self, measured: Array, expected: Array, gains: Array, image_se: float, count: slice
    ) -> None:
        """Count the verdicts of measured [S, k + m, n] on the candidates in `count`."""
        leads = leads_of(_between(measured))
        decision = decide(leads, ACCURACY.margin)
        better, not_better = decision.better[:, count], decision.not_better[:, count]
        clear = better & (
            leads.mean[:, count].min(axis=-1) > 1.96 * image_se
        )  # for the bootstrap, which takes too long
        self.simulations += len(better)
        self.any_better += int(better.any(axis=1).sum())
        self.any_clear += int(clear.any(axis=1).sum())
        self.better += int(better.sum())
        self.not_better += int(not_better.sum())
        self.judged += better.size
        for truth, name in (
            (_between(expected), "covered"),
            (_between(np.atleast_2d(gains)), "covered_all"),
        ):
            setattr(
                self,
                name,
                getattr(self, name) + int(((leads.low <= truth) & (truth <= leads.high)).sum()),
            )
        self.intervals += leads.low.size

    @property
    def family_wise(self) -> float:
        """Return the share of experiments with a 'better'."""
        return self.any_better / self.simulations

    @property
    def coverage(self) -> float:
        """Return the coverage of the intervals on this test set."""
        return self.covered / self.intervals


def _between(arms: Array) -> Array:
    """Return [S, k, m, ...] differences of the first k of [S, k + m, ...] and the others."""
    return arms[:, :CANDIDATES, None] - arms[:, None, CANDIDATES:]


def points(candidates: list[float], baselines: list[float]) -> Array:
    """Return [k + m] true gains, given in points, as fractions."""
    return np.array([*candidates, *baselines]) / 100


SAME = points([0, 0, 0], [0, 0, 0])
ONE_BASELINE = points([0, 0, 0], [0])
"""As for three of which two are surely beaten: the least favourable case for 'better'."""


def simulate(
    simulations: int,
    gains: Array = SAME,
    *,
    world: World = LARGE,
    own_images: float = 0.0,
    trials: int = 0,
    trials_sd: float = 0.0,
    count: slice = slice(None),
    seed: int = 0,
) -> dict[int, Rates]:
    """Return rates for each of `SEEDS`; fewer seeds are the first of those with more.

    Args:
        trials: if not 0, the candidates are the best of so many by one run each on 5,000
            validation images, and are confirmed with new seeds.
        trials_sd: standard deviation of these trials' true accuracies.
        count: the candidates whose verdicts are counted.
    """
    rng = np.random.default_rng(seed)
    rates = {n: Rates() for n in SEEDS}
    for start in range(0, simulations, CHUNK):
        size = min(CHUNK, simulations - start)
        true = np.broadcast_to(gains, (size, len(gains))).copy()
        if trials:
            true[:, :CANDIDATES] = sweep(rng, size, trials, trials_sd)[1]
        measured, expected = world.accuracies(rng, size, max(SEEDS), true, own_images)
        for n in SEEDS:
            image_se = ((2 * world.doubt / n + 2 * own_images**2) / world.images) ** 0.5
            rates[n].add(measured[..., :n], expected, true, image_se, count)
    return rates


def sweep(
    rng: np.random.Generator, simulations: int, trials: int, trials_sd: float
) -> tuple[Array, Array]:
    """Return the best of so many trials: validation accuracy and true gain, each [S, k]."""
    true = rng.standard_normal((simulations, trials)) * trials_sd
    runs = [
        World(images=5000).accuracies(rng, len(part), 1, part)[0][..., 0]
        for part in np.array_split(true, max(1, simulations // 250))
    ]
    seen = np.concatenate(runs)
    best = seen.argsort(axis=1)[:, -CANDIDATES:]
    return np.take_along_axis(seen, best, axis=1), np.take_along_axis(true, best, axis=1)


@dataclass(frozen=True)
class Curse:
    """Means over simulations of one objective's search, in points; each beside its standard error."""

    looks: tuple[float, float]
    """By how much the value of the best `CANDIDATES` is above their true accuracy."""
    winner_looks: tuple[float, float]
    """The same of the best one alone."""
    winner_is: tuple[float, float]
    """True accuracy of the best one, above the mean of all."""


def curse(
    simulations: int, trials: int, trials_sd: float, *, further: int = 0, seed: int = 0
) -> Curse:
    """Return how good the best trials of a search look, and are.

    Args:
        trials_sd: standard deviation of their true accuracies.
        further: seeds of the best `CANDIDATES`, over which alone the mean is their value. 0: the
            run that selected them is.
    """
    rng = np.random.default_rng(seed)
    sums = list[Array]()
    for size in (len(part) for part in np.array_split(np.arange(simulations), simulations // 250)):
        true = rng.standard_normal((size, trials)) * trials_sd
        runs = World(images=5000).accuracies(rng, size, 1 + further, true)[0]
        best = runs[..., 0].argsort(axis=1)[:, -CANDIDATES:]
        seen = runs[..., 1:].mean(axis=-1) if further else runs[..., 0]
        seen, own = (np.take_along_axis(a, best, axis=1) for a in (seen, true))
        above = seen - LARGE.accuracy - own
        first = seen.argmax(axis=1)[:, None]
        winner = np.take_along_axis(above, first, axis=1)
        sums.append(
            np.column_stack([above.mean(axis=1), winner, np.take_along_axis(own, first, axis=1)])
        )
    each = 100 * np.concatenate(sums)
    errors = each.std(axis=0, ddof=1) / simulations**0.5
    return Curse(*zip(each.mean(axis=0).tolist(), errors.tolist(), strict=True))


def print_finalists(simulations: int, seed: int) -> None:
    """Print the winner's curse of searches with and without further seeds, at equal epochs, too."""
    heads = ["configurations, true sd in points", "value", "runs", "best 3 look better by"]
    heads += ["the winner", "it is truly better than the mean by"]
    print(f"\n| {' | '.join(heads)} |")
    print("|---|---|---|---|---|---|")
    for sd in (0.0, 0.1, 0.2, 0.5, 1.0):
        for trials, further in ((64, 0), (73, 0), (64, 3)):
            found = curse(simulations, trials, sd / 100, further=further, seed=seed)
            value = f"mean of {further} further seeds" if further else "the run that selected"
            cells = [f"{trials}, {sd:g}", value, str(trials + CANDIDATES * further)]
            told = (found.looks, found.winner_looks, found.winner_is)
            cells += [f"{mean:.3f} ± {error:.3f}" for mean, error in told]
            print(f"| {' | '.join(cells)} |", flush=True)


@dataclass(frozen=True)
class SequentialRates:
    """What a sequential comparison does, beside a fixed one with as many seeds as its limit."""

    found: float
    """Share of candidates that are found better."""
    found_fixed: float
    family_wise: float
    """Share of experiments with a 'better'."""
    family_wise_fixed: float
    seeds: float
    """Mean seeds of an experiment, as a share of the limit."""
    coverage: float
    """Of the intervals over all looks, at the look at which the experiment stops."""


def sequential(
    simulations: int, gains: Array, candidates: int, *, plan: SeedPlan = PLAN, seed: int = 0
) -> SequentialRates:
    """Return the rates of a comparison of the first `candidates` arms with the others."""
    rng = np.random.default_rng(seed)
    found, fixed, seeds, covered = [], [], [], []
    for start in range(0, simulations, CHUNK):
        size = min(CHUNK, simulations - start)
        measured, expected = LARGE.accuracies(rng, size, plan.limit, gains)
        leads = measured[:, :candidates, None] - measured[:, None, candidates:]
        truth = expected[:, :candidates, None] - expected[:, None, candidates:]
        settled = settle(leads, plan, ACCURACY.margin)
        last = np.where(settled.all_done, settled.seeds.max(axis=-1), plan.limit)
        found.append(settled.better)
        fixed.append(decide(leads_of(leads), ACCURACY.margin).better)
        seeds.append(last)
        for n in plan.looks:
            level = nominal_levels(ALPHA, plan)[n - plan.first]
            at_end = leads_of(leads[last == n][..., :n], level)
            inside = (at_end.low <= truth[last == n]) & (truth[last == n] <= at_end.high)
            covered.append(inside.ravel())
    better, better_fixed = np.concatenate(found), np.concatenate(fixed)
    return SequentialRates(
        found=float(better.mean()),
        found_fixed=float(better_fixed.mean()),
        family_wise=float(better.any(axis=-1).mean()),
        family_wise_fixed=float(better_fixed.any(axis=-1).mean()),
        seeds=float(np.concatenate(seeds).mean() / plan.limit),
        coverage=float(np.concatenate(covered).mean()),
    )


def print_sequential(simulations: int, seed: int) -> None:
    print(
        f"\nSequential, {PLAN.first} to {PLAN.limit} seeds, beside a fixed {PLAN.limit}; all candidates gain the same\n"
        "\n| candidates, baselines | gain, points | found: fixed | sequential | difference | any 'better': fixed | "
        "sequential | seeds, of the limit | coverage at the end |\n|---|---|---|---|---|---|---|---|---|"
    )
    for k, m in ((1, 1), (3, 1), (3, 3)):
        for gain in SEQUENTIAL_GAINS:
            r = sequential(simulations, points([gain] * k, [0] * m), k, seed=seed)
            cells = [
                f"{100 * r.found_fixed:.1f}",
                f"{100 * r.found:.1f}",
                f"{100 * (r.found - r.found_fixed):+.1f}",
                percent(r.family_wise_fixed, simulations),
                percent(r.family_wise, simulations),
                f"{100 * r.seeds:.0f}",
                f"{100 * r.coverage:.1f}",
            ]
            row(f"{k}, {m} | {gain:g}", cells)


def bootstrap_coverage(simulations: int, n: int, seed: int = 0) -> float:
    """Return how often a 95 % percentile bootstrap over n seeds covers the mean of a normal."""
    rng = np.random.default_rng(seed)
    hits = 0
    for start in range(0, simulations, CHUNK):
        x = rng.standard_normal((min(CHUNK, simulations - start), n))
        ci = stats.bootstrap(
            (x,), np.mean, axis=-1, n_resamples=999, batch=50, method="percentile", rng=rng
        )
        hits += int(((ci.confidence_interval.low <= 0) & (ci.confidence_interval.high >= 0)).sum())
    return hits / simulations


def mcnemar_rate(simulations: int, n: int, seed: int = 0) -> float:
    """Return how often McNemar's test at 5 %, pooled over n seeds, separates two equal arms."""
    rng = np.random.default_rng(seed)
    world, p = LARGE, LARGE.probabilities()
    weight = p * (1 - p) / (p * (1 - p)).mean()
    rejected = 0
    for _ in range(simulations):
        counts = rng.multinomial(world.images, np.full(len(p), 1 / len(p)))[None]
        shared = rng.standard_normal((1, n, 1)) * world.shared**0.5
        own = rng.standard_normal((2, n, 1)) * (1 - world.shared) ** 0.5
        a, b = np.clip(p + (shared + own) * world.seed_sd * weight, 0, 1)
        only_a = rng.binomial(counts, a * (1 - b))
        only_b = rng.binomial(counts - only_a, b * (1 - a) / (1 - a * (1 - b)))
        pairs = [[0, only_a.sum()], [only_b.sum(), 0]]
        rejected += mcnemar(pairs, exact=False, correction=False).pvalue <= 0.05
    return rejected / simulations


def percent(rate: float, n: int) -> str:
    """Format '4.9 ± 0.2', with the binomial standard error."""
    return f"{100 * rate:.2f} ± {100 * (rate * (1 - rate) / n) ** 0.5:.2f}"


def row(title: str, values: list[str]) -> None:
    print(f"| {title} | {' | '.join(values)} |", flush=True)


def head(title: str) -> None:
    print(f"\n| {title} | {' | '.join(f'n = {n}' for n in SEEDS)} |\n|---|{'---|' * len(SEEDS)}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--simulations", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sequential", action="store_true", help="only sequential comparisons")
    parser.add_argument("--finalists", action="store_true", help="only the winner's curse")
    args = parser.parse_args()
    if args.finalists:
        print_finalists(args.simulations, args.seed + 11)
        return
    if args.sequential:
        print_sequential(args.simulations, args.seed + 10)
        return
    sims, start = args.simulations, time.perf_counter()
    print(f"{sims:,} simulations a cell, seed {args.seed}; per cent ± standard error")

    false = {
        "all six arms the same": simulate(sims, seed=args.seed),
        "all six the same, 360 images at 97 %": simulate(sims, world=SMALL, seed=args.seed + 1),
        "all the same, candidates the best 3 of 64 on validation": simulate(
            sims, trials=64, seed=args.seed + 2
        ),
        "one baseline (least favourable)": simulate(sims, ONE_BASELINE, seed=args.seed + 3),
        "one baseline, 360 images at 97 %": simulate(
            sims, ONE_BASELINE, world=SMALL, seed=args.seed + 4
        ),
        "one baseline, candidates the best 3 of 64 on validation": simulate(
            sims, ONE_BASELINE, trials=64, seed=args.seed + 5
        ),
        "one baseline, one candidate 1 point better, the other two counted": simulate(
            sims, points([1, 0, 0], [0]), count=slice(1, None), seed=args.seed + 6
        ),
    }
    head("false 'better' in an experiment (family-wise)")
    for title, rates in false.items():
        row(title, [percent(rates[n].family_wise, sims) for n in SEEDS])
    seen = (
        np.concatenate([sweep(np.random.default_rng(i), CHUNK, 64, 0.0)[0] for i in range(2)])
        - LARGE.accuracy
    )
    print(
        f"\nThe best 3 of 64 equal configurations look {100 * seen.mean():.2f} points better than they are."
    )

    head("coverage of the 95 % t intervals over seeds, on the test set")
    spread = simulate(sims, trials=64, trials_sd=0.002, seed=args.seed + 7)
    for title, rates in {**false, "best 3 of 64 that truly differ (sd 0.2 points)": spread}.items():
        row(title, [f"{100 * rates[n].coverage:.2f}" for n in SEEDS])

    head("equal on all images there are, each arm with favourite images of its own, one baseline")
    for own in (0.05, 0.1):
        rates = simulate(sims, ONE_BASELINE, own_images=own, seed=args.seed + 8)
        title = f"sd {own} in probability"
        row(f"{title}: family-wise 'better'", [percent(rates[n].family_wise, sims) for n in SEEDS])
        row(
            f"{title}: those without a note",
            [percent(rates[n].any_clear / sims, sims) for n in SEEDS],
        )
        covered = [f"{100 * rates[n].covered_all / rates[n].intervals:.2f}" for n in SEEDS]
        row(f"{title}: coverage of the lead on all images", covered)

    head(
        "a candidate truly better than three equal baselines by: better / not better / cannot tell"
    )
    for gain in (-1.0, -0.5, 0.0, 0.2, 0.5, 1.0, 2.0):
        rates = simulate(
            sims, points([gain, 0, 0], [0, 0, 0]), count=slice(0, 1), seed=args.seed + 9
        )
        row(f"{gain} points", [verdicts(rates[n]) for n in SEEDS])

    print_sequential(sims, args.seed + 10)
    print_finalists(sims, args.seed + 11)

    head("what we do not use")
    row(
        "coverage of a 95 % percentile bootstrap over seeds",
        [f"{100 * bootstrap_coverage(sims, n, args.seed):.1f}" for n in SEEDS],
    )
    row(
        "two equal arms told apart at 5 % by McNemar on pooled answers",
        [f"{100 * mcnemar_rate(sims, n, args.seed):.1f}" for n in SEEDS],
    )
    print(f"\n{time.perf_counter() - start:.0f} s")


def verdicts(rates: Rates) -> str:
    better, not_better = rates.better / rates.judged, rates.not_better / rates.judged
    return f"{100 * better:.1f} / {100 * not_better:.1f} / {100 * (1 - better - not_better):.1f}"


if __name__ == "__main__":
    main()
