"""Ranks of trials by several metrics: fronts, and within a front those that are far apart.

As in multi-objective successive halving (Schmucker et al. 2021, arXiv:2106.12639): the trials are
sorted into fronts (no trial of a front beats another one of it in all metrics), and the trials of a
front so that its first few cover it.

Shapes: N = trials, M = metrics.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

Table = NDArray[np.float64]


def by_fronts(values: Table) -> list[int]:
    """Return the indices of trials, best first.

    Of a front, the first trial is the one nearest to the best of every metric; each next one is the
    farthest from those before it. Distances are relative to the range of each metric in the front.
    Of equal ones, the earlier trial comes first. Trials with a NaN come last.

    Args:
        values: [N, M], higher is better.
    """
    order: list[int] = []
    for front in _fronts(values):
        order += front[_spread(values[front])].tolist()
    return order + np.flatnonzero(~np.isfinite(values).all(axis=1)).tolist()


def _fronts(values: Table) -> Iterator[NDArray[np.intp]]:
    """Yield the indices of each front of [N, M] values, ascending; those with a NaN are in none."""
    left = np.flatnonzero(np.isfinite(values).all(axis=1))
    while len(left):
        unbeaten = _unbeaten(values[left])
        yield left[unbeaten]
        left = left[~unbeaten]


def _unbeaten(values: Table) -> NDArray[np.bool_]:
    """Return which of [N, M] values no other one beats: at least as good in all, better in one."""
    found = np.zeros(len(values), dtype=bool)
    front = values[:0]
    for n in np.argsort(-values.sum(axis=1), kind="stable"):  # what beats a value has a larger sum
        here = values[n]
        beats = np.all(front >= here, axis=1) & np.any(front > here, axis=1)
        if not beats.any():
            found[n] = True
            front = np.vstack([front, here])
    return found


def _spread(values: Table) -> list[int]:
    """Return the order of a front's [N, M] values in which the first few cover it."""
    low, high = values.min(axis=0), values.max(axis=0)
    placed = (values - low) / np.where(high > low, high - low, 1.0)
    order = [int(np.linalg.norm(1 - placed, axis=1).argmin())]
    nearest = np.linalg.norm(placed - placed[order[0]], axis=1)
    nearest[order] = -1.0
    while len(order) < len(values):
        order.append(int(nearest.argmax()))
        nearest = np.minimum(nearest, np.linalg.norm(placed - placed[order[-1]], axis=1))
        nearest[order] = -1.0
    return order


def goes_on(values: Table, factor: int) -> bool:
    """Return whether the last of some trials is among the best 1 / `factor` of them, or the best.

    Args:
        values: [N, M] at a rung, in the order in which the trials reached it; higher is better.
    """
    own, room = len(values) - 1, max(1, len(values) // factor)
    for front in _fronts(values):
        if front[-1] == own:  # the indices ascend
            place = _spread(values[front]).index(len(front) - 1)
            return place < room
        room -= len(front)
        if room <= 0:
            return False
    return len(values) == 1
