"""Constraints on metrics, `search.constraints`: which trials meet them, and by how much others miss.

They are read by the search, which tells Optuna, and by everything that names a best trial, which
prefers those that meet them. Knows neither torch, Ray nor Optuna.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

from tfkd_ray.verdict.scores import score_of

Limits = Mapping[str, Mapping[str, float | None]]
"""For each metric its `low` and `high`, either of them None: {"parameters": {"high": 2e6}}."""
NO_LIMITS: Limits = {}
NOT_MEASURED = 1e6
"""Excess of a metric that a trial lacks."""
Limited = TypeVar("Limited")


def as_limits(told: Any) -> Limits:
    """Return the limits of a file, `search.constraints`; raise a ValueError if it holds others."""
    limits = dict(told or {})
    for name, bounds in limits.items():
        score_of(name)
        ends = [bounds.get("low"), bounds.get("high")]
        if any(isinstance(end, bool) or not isinstance(end, int | float | None) for end in ends):
            raise ValueError(f"constraints.{name} is {bounds!r}")
    return limits


def excesses(limits: Limits, metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return by how much each bound is exceeded, relative to it; 0 or less where it is met.

    Relative, because a sampler adds them up: 10 % too many parameters count as 10 % too high an ECE.
    """
    return {
        f"{name}: {end}": _excess(metrics.get(name), end, bound)
        for name, end, bound in _bounds(limits)
    }


def _bounds(limits: Limits) -> Iterator[tuple[str, str, float]]:
    for name, bounds in limits.items():
        for end in ("low", "high"):
            bound = bounds.get(end)
            if bound is not None:
                yield name, end, bound


def _excess(value: Any, end: str, bound: float) -> float:
    if not isinstance(value, int | float) or not math.isfinite(value):
        return NOT_MEASURED
    beyond = value - bound if end == "high" else bound - value
    return beyond / abs(bound) if bound else beyond


def is_feasible(limits: Limits, metrics: Mapping[str, Any]) -> bool:
    """Return whether metrics meet all limits."""
    return all(excess <= 0 for excess in excesses(limits, metrics).values())


def feasible_first(
    things: Iterable[Limited], limits: Limits, metrics_of: Callable[[Limited], Mapping[str, Any]]
) -> list[Limited]:
    """Return things in their order, those that meet all limits before the others."""
    if not limits:
        return list(things)
    return sorted(things, key=lambda thing: not is_feasible(limits, metrics_of(thing)))


def limits_text(limits: Limits) -> str:
    """Return the limits in words: parameters at most 2e+06 and val_ece at most 0.05."""
    words = {"low": "at least", "high": "at most"}
    return " and ".join(f"{name} {words[end]} {bound:.6g}" for name, end, bound in _bounds(limits))


def met_text(limits: Limits, metrics: Mapping[str, Any]) -> str:
    """Return whether metrics meet the limits, in words; empty if there are none."""
    if not limits:
        return ""
    if is_feasible(limits, metrics):
        return "meets the constraints"
    missed = [key.partition(": ")[0] for key, by in excesses(limits, metrics).items() if by > 0]
    told = [f"{name} is {_told_number(metrics.get(name))}" for name in dict.fromkeys(missed)]
    return f"does not meet the constraints ({', '.join(told)})"


def _told_number(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, int | float) else "not measured"


def impossible(limits: Limits) -> Iterator[str]:
    """Yield a sentence for each bound that no trial can meet."""
    for name, end, bound in _bounds(limits):
        least, most = (1, math.inf) if name == "parameters" else (0, math.inf)
        if score_of(name).unit == "%":
            most = 1
        if end == "high" and bound < least:
            yield f"constraints.{name}.high: no trial is below {least}, got {bound:g}"
        if end == "low" and bound > most:
            yield f"constraints.{name}.low: no trial is above {most:g}, got {bound:g}"
