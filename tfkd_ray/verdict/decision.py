"""The decision on arrays of leads: statistics, 'better' and 'not better', and Holm's correction.

Shapes: n = seeds, k = candidates, m = baselines; `...` = any, so that one call decides thousands of
simulated experiments.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Array = NDArray[np.float64]

ALPHA = 0.05
"""Two-sided level of all tests; intervals have level 1 - ALPHA."""

ROUNDING = 1e-6
"""Leads within this are equal: float32 rounds accuracies near 1 by 6e-8; one image in 100,000 is
1e-5."""


class Leads(NamedTuple):
    """Statistics of leads, each [...]."""

    mean: Array
    sd: Array
    """Standard deviation, ddof 1."""
    low: Array
    high: Array
    """The interval is `low` to `high`; infinite if there is none."""
    p: Array
    """Two-sided p of the hypothesis that there is no lead."""
    constant: NDArray[np.bool_]
    """True: the lead is the same in every seed."""


def leads_of(leads: Array, level: float = ALPHA) -> Leads:
    """Return mean, spread, t interval and p of leads [..., n], n >= 2 paired differences each.

    The interval covers the lead with probability 1 - `level`.

    A lead that is the same in every seed has no spread to measure by, and happens by chance on small test sets, so the
    t test (which would say p = 0) is replaced by the sign test and its interval: p = 2 / 2^n, and no interval at 95 %
    before n = 6. Where every difference is 0, p is 1 and the interval is 0 to 0.
    """
    n = leads.shape[-1]
    assert n >= 2, f"{leads.shape=}"
    constant = np.ptp(leads, axis=-1) <= ROUNDING
    identical = np.abs(leads).max(axis=-1) <= ROUNDING
    mean = np.where(identical, 0.0, leads.mean(axis=-1))
    spread = np.where(constant[..., None], np.nan, leads)
    test = stats.ttest_1samp(spread, 0, axis=-1)
    low, high = test.confidence_interval(1 - level)
    sign_p = float(stats.binomtest(n, n).pvalue)
    width = np.where(identical | (sign_p <= level), 0.0, np.inf)
    return Leads(
        mean=mean,
        sd=np.where(constant, 0.0, leads.std(axis=-1, ddof=1)),
        low=np.where(constant, mean - width, low),
        high=np.where(constant, mean + width, high),
        p=np.where(identical, 1.0, np.where(constant, sign_p, test.pvalue)),
        constant=constant,
    )


class Decision(NamedTuple):
    """Verdicts on the candidates, each [..., k]."""

    better: NDArray[np.bool_]
    not_better: NDArray[np.bool_]
    p: Array
    """p that it is better than every baseline: the largest p of its comparisons."""
    p_holm: Array
    against: NDArray[np.intp]
    """Index of the decisive baseline: the closest call, or the one over which a lead is most
    clearly ruled out."""


def decide(leads: Leads, margin: float, lost: int = 0) -> Decision:
    """Decide for leads [..., k, m] of k candidates over m baselines.

    `lost` is the number of further candidates that cannot be judged.

    The largest p of several tests is a valid p of 'not better than every one' (Berger 1982), so the
    correction counts only the candidates. 'Not better' is about one baseline, at the level of the
    interval printed beside it.
    """
    p_each = np.where(leads.mean > 0, leads.p, 1.0)
    p = p_each.max(axis=-1)
    p_holm = holm(np.concatenate([p, np.ones((*p.shape[:-1], lost))], axis=-1))[..., : p.shape[-1]]
    better = p_holm <= ALPHA
    ruled_out = (leads.high < margin) | (leads.high <= 0)
    not_better = ~better & ruled_out.any(axis=-1)
    closest = np.lexsort((-leads.mean, p_each), axis=-1)[..., -1]
    return Decision(
        better, not_better, p, p_holm, np.where(not_better, leads.high.argmin(axis=-1), closest)
    )


def holm(p: Array) -> Array:
    """Return Holm's adjusted p over the last axis.

    statsmodels' `multipletests` takes one row at a time, 18 ms each.
    """
    k = p.shape[-1]
    order = p.argsort(axis=-1)
    steps = np.take_along_axis(p, order, axis=-1) * np.arange(k, 0, -1)
    adjusted = np.empty_like(steps)
    np.put_along_axis(
        adjusted, order, np.minimum(np.maximum.accumulate(steps, axis=-1), 1.0), axis=-1
    )
    return adjusted
