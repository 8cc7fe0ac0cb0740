"""What has come to the rungs of a group of trials, and which trial continues there."""

import bisect
import math
from collections.abc import Hashable, Iterable, Sequence


class Rungs:
    """Asynchronous successive halving (Li et al. 2020, arXiv:1810.05934), without promotion.

    At a rung a trial continues if its value is among the best 1 / `factor` of those that reached
    it, and always if it is the best. A trial's value there is the first that it reported at or
    after the rung, and before the next one. The values of each rung are kept sorted, so a trial is
    judged in O(log n); they are those of the studies, from which a resumed search takes them again.

    Args:
        brackets: the rungs of each halving, ascending; a trial's is its user attribute `bracket`,
            or the first.
        factor: one in so many trials continues.
        maximize: higher values are better.
    """

    def __init__(self, brackets: Sequence[Sequence[int]], factor: int, *, maximize: bool) -> None:
        self._brackets, self._factor, self._sign = brackets, factor, -1 if maximize else 1
        self._sorted: dict[tuple[int, int], list[float]] = {}
        self._values: dict[tuple[int, int], dict[Hashable, float]] = {}

    def at(self, bracket: int, epoch: int, before: Iterable[int]) -> int | None:
        """Return the rung that a trial reaches at an epoch, or None.

        Args:
            before: the other epochs that the trial has reported.
        """
        rungs = self._brackets[bracket]
        rung = max((r for r in rungs if r <= epoch), default=None)
        if rung is None or first_step([*before, epoch], rungs, rung) != epoch:
            return None
        return rung

    def take(self, bracket: int, trial: Hashable, rung: int, value: float) -> None:
        """Take the value with which a trial reaches a rung, in place of an earlier attempt's."""
        values = self._values.setdefault((bracket, rung), {})
        came = self._sorted.setdefault((bracket, rung), [])
        if trial in values:
            del came[bisect.bisect_left(came, values[trial])]
        values[trial] = self._sign * value
        bisect.insort(came, values[trial])

    def take_all(self, bracket: int, trial: Hashable, values: dict[int, float]) -> None:
        """Take the values of a trial, by epoch, wherever they reach a rung."""
        for rung in self._brackets[bracket]:
            step = first_step(values, self._brackets[bracket], rung)
            if step is not None:
                self.take(bracket, trial, rung, values[step])

    def stops(self, bracket: int, trial: Hashable, rung: int) -> bool:
        """Return True if a trial stops at a rung that it has reached."""
        came = self._sorted[bracket, rung]
        last_good = came[max(1, len(came) // self._factor) - 1]
        return self._values[bracket, rung][trial] > last_good


def first_step(steps: Iterable[int], rungs: Sequence[int], rung: int) -> int | None:
    """Return the first epoch reported at or after a rung, before the next rung."""
    upto = min((r for r in rungs if r > rung), default=math.inf)
    return min((step for step in steps if rung <= step < upto), default=None)
