"""Arms of a running comparison, by what is known of them before the test split is opened.

That is validation, or the fit to the images of training; never a figure of the test split.
"""

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from tfkd_ray.settings.columns import on_one_line
from tfkd_ray.space.arms import Arms
from tfkd_ray.store.experiment import STATUSES


@dataclass
class ArmSoFar:
    """What is known of an arm."""

    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(STATUSES, 0))
    """Number of runs by status."""
    values: dict[int, float] = field(default_factory=dict)
    """Metric after the last epoch of each finished run, by seed."""


def baselines_by_arm(compared: Arms) -> dict[str, str]:
    """Return the arm with which each arm is compared; an arm without one is missing.

    It is the one that the arm names, else the first baseline with the same student.
    """
    # own networks cannot be keys: their arguments are a dict
    baselines = [arm for arm in compared.arms if arm.part == "baseline"]
    found = {}
    for arm in compared.arms:
        alike = (b.name for b in baselines if b.config.student == arm.config.student)
        named = arm.baseline or next(alike, arm.name)
        if named != arm.name:
            found[arm.name] = named
    return found


def paired_differences(a: Mapping[int, float], b: Mapping[int, float]) -> list[float]:
    """Return the differences of two arms, a - b, on the seeds that both have."""
    return [value - b[seed] for seed, value in a.items() if seed in b]


def table_of_arms(
    arms: Mapping[str, ArmSoFar],
    shown: Sequence[str],
    baselines: Mapping[str, str],
    *,
    metric: str,
    plus_minus: str = "±",
) -> Iterator[str]:
    """Yield the lines of a table, with tabs: counts, mean over seeds, difference to the baseline.

    Args:
        shown: the arms that get a line.
        baselines: see `baselines_by_arm`.
    """
    states = ["done", "running"]
    if any(arm.counts["failed"] for arm in arms.values()):
        states.append("failed")
    rivals = set(baselines.values())
    versus = f"vs {on_one_line(min(rivals))}" if len(rivals) == 1 else "vs its baseline"
    yield "\t".join(["", *states, metric, *([versus] if rivals else [])])
    for name in shown:
        arm = arms[name]
        cells = [on_one_line(name), *(str(arm.counts[state]) for state in states)]
        cells.append(_mean_and_sd(list(arm.values.values()), ".4f", plus_minus))
        if rivals:
            rival = arms.get(baselines.get(name, ""), ArmSoFar())
            pairs = paired_differences(arm.values, rival.values)
            lead = _mean_and_sd(pairs, "+.4f", plus_minus)
            cells.append(f"{lead} ({len(pairs)})" if pairs else "")
        yield "\t".join(cells)


def _mean_and_sd(values: Sequence[float], form: str, plus_minus: str) -> str:
    """Return mean and standard deviation of finite values as text; empty without values."""
    known = [value for value in values if math.isfinite(value)]
    if not known:
        return ""
    mean = format(statistics.fmean(known), form)
    return f"{mean} {plus_minus} {statistics.stdev(known):.4f}" if len(known) > 1 else mean
