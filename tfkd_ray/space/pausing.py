"""Pausing halving: what happens next, as a pure function of what the studies hold.

At a rung a trial pauses. It goes on when it is among the best 1 / `factor` of the trials of its
group that have reached the rung (Li et al. 2020, arXiv:1810.05934). A search (`run.searcher`) tells
a `Ladder` every change, and asks for the `next_action` whenever a trial could begin.
"""

import bisect
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple


def halving_rungs(epochs: int, factor: int, min_epochs: int | None = None) -> list[int]:
    """Return the epochs after which a halving judges a trial, ascending; none in the last ninth.

    The first is `min_epochs`, or epochs / factor^2, which puts the rungs at 1/9 and 1/3 of the epochs.
    """
    rung = min_epochs or max(1, epochs // factor**2)
    rungs = []
    while 9 * rung <= 8 * epochs:
        rungs.append(rung)
        rung *= factor
    return rungs


@dataclass(frozen=True, slots=True)
class Entrant:
    """A trial as the rule sees it: the last attempt of its number."""

    number: int
    state: Literal["running", "paused", "whole", "over"]
    """`whole`: ended with full length. `over`: ended otherwise; it does not go on."""
    values: Mapping[int, float] = field(default_factory=dict)
    """Value at each rung that it has reached. NaN: it had none there."""
    rung: int = 0
    """The rung at which it paused last."""


class Action(NamedTuple):
    """What happens next."""

    what: Literal["start", "promote", "further", "wait", "end"]
    number: int = -1
    """The trial that goes on, if one is promoted; the finalist that runs with a further seed."""
    rung: int = 0
    """The rung from which it goes on."""
    further: int = 0
    """Which of its further seeds runs: 1 is the number after its own."""


def next_action(
    groups: Sequence[Iterable[Entrant]],
    rungs: Sequence[int],
    factor: int,
    *,
    maximize: bool,
    to_start: int,
) -> Action:
    """Return what `Ladder.next_action` says of these trials.

    Args:
        groups: the trials of each group, which are judged among themselves.
        rungs: epochs after which trials pause, ascending.
        factor: one in so many trials of a rung goes on.
        maximize: higher values are better.
        to_start: number of trials that have not begun.
    """
    ladder = Ladder(len(groups), rungs, factor, maximize=maximize)
    for g, group in enumerate(groups):
        for entrant in group:
            ladder.put(g, entrant)
    return ladder.next_action(to_start)


class Ladder:
    """The trials at the rungs of each group, in order; a change or a question costs O(log n)."""

    def __init__(self, groups: int, rungs: Sequence[int], factor: int, *, maximize: bool) -> None:
        self._rungs, self._factor, self._sign = rungs, factor, -1 if maximize else 1
        self._entrants: list[dict[int, Entrant]] = [{} for _ in range(groups)]
        self._states: list[Counter[str]] = [Counter() for _ in range(groups)]
        self._came: list[dict[int, list[_Place]]] = [{r: [] for r in rungs} for _ in range(groups)]
        self._waiting: list[dict[int, list[_Place]]] = [
            {r: [] for r in rungs} for _ in range(groups)
        ]

    def put(self, g: int, entrant: Entrant) -> None:
        """Take what is now known of a trial of group g."""
        known = self._entrants[g].get(entrant.number)
        if known is not None:
            self._states[g][known.state] -= 1
            for places, place in self._places(g, known):
                del places[bisect.bisect_left(places, place)]
        self._entrants[g][entrant.number] = entrant
        self._states[g][entrant.state] += 1
        for places, place in self._places(g, entrant):
            bisect.insort(places, place)

    def entrant(self, g: int, number: int) -> Entrant:
        """Return what is known of a trial of group g."""
        return self._entrants[g][number]

    def numbers(self, g: int) -> Iterable[int]:
        """Return the numbers of the trials of group g."""
        return self._entrants[g].keys()

    def paused(self) -> set[int]:
        """Return the numbers of the paused trials."""
        return {n for group in self._entrants for n, e in group.items() if e.state == "paused"}

    def next_action(self, to_start: int) -> Action:
        """Return what to do with room for one more trial.

        1. Start a new trial, until all have begun: then the best of the first rung are known.
        2. Promote a trial that is among the best 1 / `factor` of a rung; from the lowest rung
           first.
        3. In a group where nothing runs, and nothing has full length, let the best paused trial of
           its highest rung go on, so that every group ends with a trial of full length if any trial
           can.
        4. Wait for a trial that runs, or end.
        """
        return Action("start") if to_start > 0 else self._next_of(range(len(self._entrants)))

    def has_ended(self, g: int) -> bool:
        """Return True if no trial of group g runs, and none may go on."""
        return self._next_of([g]).what == "end"

    def _next_of(self, groups: Sequence[int]) -> Action:
        """Return what to do with some groups whose trials have all begun."""
        for rung in self._rungs:
            for g in groups:
                for number in self.promotable(g, rung):
                    return Action("promote", number, rung)
        for g in groups:
            if self._states[g]["running"] or self._states[g]["whole"]:
                continue
            for rung in reversed(self._rungs):
                if self._waiting[g][rung]:
                    return Action("promote", self._waiting[g][rung][0].number, rung)
        running = any(self._states[g]["running"] for g in groups)
        return Action("wait" if running else "end")

    def promotable(self, g: int, rung: int) -> Iterator[int]:
        """Yield the paused trials among the best 1 / `factor` of a rung of group g, best first."""
        came = self._came[g][rung]
        for place in self._waiting[g][rung]:
            if bisect.bisect_left(came, place) >= len(came) // self._factor:
                return
            yield place.number

    def _places(self, g: int, e: Entrant) -> Iterator[tuple[list["_Place"], "_Place"]]:
        """Yield (the places of a rung, the trial's own there), where it has come or waits."""
        for rung, value in e.values.items():
            if rung not in self._came[g]:
                continue
            is_missing = math.isnan(value)
            place = _Place(is_missing, 0.0 if is_missing else self._sign * value, e.number)
            yield self._came[g][rung], place
            if e.state == "paused" and e.rung == rung and not is_missing:
                yield self._waiting[g][rung], place


class _Place(NamedTuple):
    """Sorts the trials of a rung, the best first, those without a value last."""

    is_missing: bool
    value: float
    number: int
    """Of equal ones, the trial with the lower number comes first."""
