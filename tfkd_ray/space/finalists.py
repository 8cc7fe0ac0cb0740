"""Finalists: the trials of each objective that get further seeds, as a function of the studies."""

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple


class Candidate(NamedTuple):
    """A trial of full length."""

    number: int
    objective: str
    value: float
    """By the metric that judges, after its last epoch. Finite."""
    feasible: bool
    """It meets the constraints."""


def finalists(found: Iterable[Candidate], k: int, *, maximize: bool) -> list[int]:
    """Return the numbers of the best k trials of each objective, best first.

    Those that meet the constraints come before the others; of equal ones, the lower number comes
    first.
    """

    def place(trial: Candidate) -> tuple[bool, float, int]:
        return not trial.feasible, -trial.value if maximize else trial.value, trial.number

    taken: Counter[str] = Counter()
    chosen = []
    for trial in sorted(found, key=place):
        if taken[trial.objective] < k:
            taken[trial.objective] += 1
            chosen.append(trial.number)
    return chosen
