"""Pausing halving: what happens next, as a pure function of what the studies hold.

At a rung a trial pauses. It goes on when it is among the best 1 / `factor` of the trials of its
group that have reached the rung (Li et al. 2020, arXiv:1810.05934). A search (`run.searcher`) and a
replay (benchmarks/search.py) ask `next_action` whenever a trial could begin.
"""

import math
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
    """Return what to do with room for one more trial.

    1. Start a new trial, until all have begun: then the best of the first rung are known.
    2. Promote a trial that is among the best 1 / `factor` of a rung; from the lowest rung first.
    3. In a group where nothing runs, and nothing has full length, let the best paused trial of its
       highest rung go on, so that every group ends with a trial of full length if any trial can.
    4. Wait for a trial that runs, or end.

    Args:
        groups: the trials of each group, which are judged among themselves.
        rungs: epochs after which trials pause, ascending.
        maximize: higher values are better.
        to_start: number of trials that have not begun.
    """
    if to_start > 0:
        return Action("start")
    known = [list(group) for group in groups]
    for rung in rungs:
        found = [e for group in known for e in promotable(group, rung, factor, maximize=maximize)]
        if found:
            return Action("promote", found[0].number, rung)
    for group in known:
        states = {e.state for e in group}
        if states & {"running", "whole"}:
            continue
        for rung in reversed(rungs):
            for e in best_first(group, rung, maximize=maximize):
                if _is_paused_at(e, rung):
                    return Action("promote", e.number, rung)
    running = any(e.state == "running" for group in known for e in group)
    return Action("wait" if running else "end")


def promotable(
    group: Iterable[Entrant], rung: int, factor: int, *, maximize: bool
) -> Iterator[Entrant]:
    """Yield the paused trials among the best 1 / `factor` of a rung, best first."""
    came = best_first(group, rung, maximize=maximize)
    for e in came[: len(came) // factor]:
        if _is_paused_at(e, rung):
            yield e


def best_first(group: Iterable[Entrant], rung: int, *, maximize: bool) -> list[Entrant]:
    """Return the trials that have reached a rung, best first, those without a value last.

    Of equal ones, the trial with the lower number comes first.
    """

    def place(e: Entrant) -> tuple[bool, float, int]:
        value = e.values[rung]
        if math.isnan(value):
            return True, 0.0, e.number
        return False, -value if maximize else value, e.number

    return sorted((e for e in group if rung in e.values), key=place)


def _is_paused_at(e: Entrant, rung: int) -> bool:
    """Return True if a trial waits at a rung, with a value there."""
    return e.state == "paused" and e.rung == rung and not math.isnan(e.values[rung])
