"""As many seeds as a question needs: looks after each seed, until every candidate is settled.

A *look* judges the seeds so far. Looking often would make false discoveries likelier, so each look
has its own, smaller level, and their sum over all looks is the level of one test (alpha spending,
Lan and DeMets 1983). Levels are those of a normal process with independent increments, and p-values
of t tests are compared with them (the significance-level approach of Jennison and Turnbull 2000,
chapter 3.8).

Over several candidates, Holm's procedure becomes group-sequential (Maurer and Bretz 2013,
doi:10.1080/19466315.2013.807748): of r candidates that are not yet better, each is tested at the
look's level for ALPHA / r. Intervals are repeated confidence intervals (Jennison and Turnbull 1989):
all looks together cover the lead with probability 1 - ALPHA, so an interval holds at whatever look
a candidate stops.

A candidate is settled as

    better        its p-values over all baselines reach the look's level
    not better    an interval ends below the margin or at 0; or it is hopeless: even a favourable lead
                  over some baseline would hardly be found by the limit. Levels ignore this rule, so
                  false discoveries stay as rare if somebody goes on in spite of it (non-binding).

Shapes: k = candidates, m = baselines, n = seeds; `...` = any, as in decision.py.
"""

import functools
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, stats

from tfkd_ray.verdict.decision import ALPHA, Array, Leads, holm, leads_of
from tfkd_ray.verdict.seed_plan import SeedPlan

SPENDING_POWER = 4
"""rho: after the share t of the seeds, t^rho of the level is spent. (Kim and DeMets 1987.) Smaller
values stop earlier and find less: see benchmarks/RESULTS.md."""
FUTILE_FROM = 0.4
"""Share of the limit from which a candidate may be hopeless; before, the spread is too uncertain."""
FAVOUR = 1.6
"""Standard errors above the measured lead that count as a favourable one."""
LEAST_CHANCE = 0.1
"""A candidate is hopeless if a favourable lead would be found with less than this probability."""
GRID = 601
"""Points at which the density of the process is calculated."""


class Settled(NamedTuple):
    """The state of a sequential comparison after its last look, each [..., k]."""

    better: NDArray[np.bool_]
    hopeless: NDArray[np.bool_]
    """True: it would hardly be found better by the limit."""
    ruled_out: NDArray[np.bool_]
    """True: the interval over some baseline ended below the margin, or at or below 0."""
    seeds: NDArray[np.intp]
    """Seeds at which it was settled; of others, the seeds so far."""
    p: Array
    """p that it is better than every baseline, over all looks until it was settled."""
    p_holm: Array
    p_each: Array
    """[..., k, m] p of each comparison over these looks: the smallest level at which one of them
    would have found a lead."""

    @property
    def all_done(self) -> NDArray[np.bool_]:
        """Return whether no candidate needs more seeds, [...]."""
        return np.asarray((self.better | self.hopeless | self.ruled_out).all(axis=-1))


@functools.lru_cache(maxsize=256)
def nominal_levels(level: float, plan: SeedPlan) -> tuple[float, ...]:
    """Return the two-sided level of each look, for a two-sided level over all looks.

    The probability that a process without drift first exceeds its boundary at look i is
    level / 2 * (t_i^rho - t_(i-1)^rho), by recursive integration of its density (Armitage, McPherson
    and Rowe 1969).
    """
    times = [n / plan.limit for n in plan.looks]
    boundaries: list[float] = []
    points = weights = density = np.zeros(0)
    spent = before = 0.0
    for time in times:
        to_spend = level / 2 * time**SPENDING_POWER - spent
        step = (time - before) ** 0.5
        root = time**0.5
        if not boundaries:
            boundary = float(stats.norm.isf(to_spend))
        else:

            def excess(z: float, to_spend: float = to_spend, step: float = step) -> float:
                crossing = stats.norm.sf((z * root - points) / step)  # noqa: B023
                return float((crossing * density * weights).sum()) - to_spend  # noqa: B023

            boundary = float(optimize.brentq(excess, -4, 12))
        boundaries.append(boundary)
        inside = np.linspace(-8 * root, boundary * root, GRID)
        if len(boundaries) == 1:
            density = stats.norm.pdf(inside, scale=root)
        else:
            moved = stats.norm.pdf(inside[:, None], points, step)
            density = (moved * density * weights).sum(axis=1)
        points = inside
        weights = np.full(GRID, points[1] - points[0])
        weights[[0, -1]] /= 2
        spent += to_spend
        before = time
    return tuple(float(p) for p in 2 * stats.norm.sf(boundaries))


def settle(leads: Array, plan: SeedPlan, margin: float, lost: int = 0) -> Settled:
    """Return which candidates are settled by leads [..., k, m, n] of the seeds so far, in order.

    It repeats all looks up to n, so the answer depends on the leads alone. A candidate that is settled
    needs no leads of later seeds; those of failed runs are NaN.

    Args:
        margin: the smallest lead worth having, as in `decision.decide`.
        lost: number of further candidates that cannot be judged; the correction counts them.
    """
    shape, k = leads.shape[:-2], leads.shape[-3]
    better, hopeless, ruled_out = (np.zeros(shape, bool) for _ in range(3))
    seeds = np.full(shape, leads.shape[-1])
    p_each, unjudged = np.ones(leads.shape[:-1]), np.ones((*shape[:-1], lost))
    of_looks = nominal_levels(ALPHA, plan)
    for n in range(plan.first, leads.shape[-1] + 1):
        look = n - plan.first
        found = _leads_at(leads, n, of_looks[look])
        is_open = ~(better | hopeless | ruled_out)
        p_now = np.where(found.mean > 0, _over_looks(found.p, look, plan, k + lost), 1.0)
        p_each = np.where(is_open[..., None], np.minimum(p_each, p_now), p_each)
        p = p_each.max(axis=-1)
        p_holm = holm(np.concatenate([p, unjudged], axis=-1))[..., :k]
        better |= is_open & (p_holm <= ALPHA)
        high = found.high.min(axis=-1)
        ruled_out |= is_open & ~better & ((high < margin) | (high <= 0))
        if FUTILE_FROM * plan.limit <= n < plan.limit:
            left = is_open & ~better & ~ruled_out
            hopeless |= left & _is_hopeless(found, n / plan.limit, of_looks[-1])
        seeds = np.where(is_open & (better | hopeless | ruled_out), n, seeds)
    return Settled(better, hopeless, ruled_out, seeds, p, p_holm, p_each)


LEVELS = tuple(float(x) for x in np.geomspace(1e-6, 0.9, 25))
"""Levels over all looks between which p-values are interpolated."""


def _over_looks(p: Array, look: int, plan: SeedPlan, total: int) -> Array:
    """Return p-values of a look as levels over all looks, 1e-6 at least.

    They are exact at ALPHA / 1, 2, ... `total`, where decisions are made.

    Args:
        look: its number, from 0.
    """
    levels = sorted({*LEVELS, *(ALPHA / r for r in range(1, total + 1))})
    nominal = [nominal_levels(level, plan)[look] for level in levels]
    logs = np.interp(np.log(np.maximum(p, 1e-300)), np.log(nominal), np.log(levels), right=0.0)
    exact = np.minimum(np.exp(logs), 1.0)
    for r in range(1, total + 1):  # rounding of logarithms must not decide
        boundary, level = nominal_levels(ALPHA / r, plan)[look], ALPHA / r
        exact = np.where(p <= boundary, np.minimum(exact, level), exact)
    return exact


def _is_hopeless(leads: Leads, time: float, last: float) -> NDArray[np.bool_]:
    """Return which candidates [..., k] would hardly be found better than some baseline.

    The conditional probability of passing the last look's level [...], if the lead is `FAVOUR`
    standard errors above the measured one.
    """
    z = np.sign(leads.mean) * stats.norm.isf(leads.p / 2)
    drift = (z + FAVOUR) / time**0.5
    goal = stats.norm.isf(last / 2)
    expected = z * time**0.5 + drift * (1 - time)
    chance = stats.norm.sf((goal - expected) / (1 - time) ** 0.5)
    hopeless: NDArray[np.bool_] = (chance < LEAST_CHANCE).any(axis=-1)
    return hopeless


def _leads_at(leads: Array, n: int, level: float) -> Leads:
    """Return the statistics of the first n seeds, with intervals of `level`; see `leads_of`."""
    seen = leads[..., :n]
    if np.isfinite(seen).all():
        return leads_of(seen, level)
    rows = [row[np.isfinite(row)] for row in seen.reshape(-1, n)]
    nothing = Leads(*map(np.array, (0.0, 0.0, -np.inf, np.inf, 1.0, False)))
    found = [leads_of(row, level) if len(row) > 1 else nothing for row in rows]
    return Leads(*(np.array(part).reshape(seen.shape[:-1]) for part in zip(*found, strict=True)))
