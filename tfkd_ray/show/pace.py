"""The time that a sweep still takes: epochs that are left, and how fast epochs go.

Early stopping decides most of it. Where the rule is known (halving), its own expectation is used: of
i trials at a rung, max(1, i // factor) / i of them pass, and more at later rungs, since those that
come there have passed before. Elsewhere the share that was stopped at each epoch so far stays.
benchmarks/eta.py measures the estimate on tables of learning curves.
"""

import bisect
import heapq
import itertools
import math
import random
import statistics
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

LATEST = 100
"""Number of messages with epochs, the latest of an objective, whose durations count."""

TRUST = 2.0
"""Number of trials that pass a rung by the rule alone, before the share that passed counts as much."""
AGAIN = 1.4
"""Times as often as at the rung below it, a trial passes a rung. By simulation of a rule with factor 3, a
correlation of 0.9 between the values at two rungs, and 24 trials: 1.3 to 1.6."""
DRAWS, MOST_DRAWN = 16, 2000
"""Sweeps that are drawn for the time left, and most trials in all of them: the last trials decide
when a sweep ends, and by chance one of them runs long. Larger sweeps get the expectation."""


class Begun(NamedTuple):
    """A trial that has begun."""

    row: str
    """Its objective; its arm in a comparison."""
    epoch: int
    epochs: int
    """Epochs of a trial of full length."""
    status: str


class HalvingRule(NamedTuple):
    """A halving whose expectation is known before a trial is stopped."""

    rungs: tuple[int, ...]
    factor: int
    pauses: bool = False
    """True: trials pause at a rung, and once all are there, 1 of `factor` goes on."""


def epochs_left(
    begun: Sequence[Begun], new: Sequence[tuple[str, int]], rule: HalvingRule | None = None
) -> float:
    """Estimate the epochs still to train.

    Args:
        begun: all trials that have begun.
        new: (row, full length) of each that has not.
    """
    if rule is not None and rule.pauses:
        return sum(_left_of_pausing(begun, new, rule).values())
    shares = _shares_going_on(begun, new, rule)
    going = (b for b in begun if b.status in ("running", "interrupted"))
    left = Counter((row, 0, full) for row, full in new)
    left.update((b.row, b.epoch, b.epochs) for b in going)
    return sum(n * _rest(epoch, full, shares[row]) for (row, epoch, full), n in left.items())


def _left_of_pausing(
    begun: Sequence[Begun], new: Sequence[tuple[str, int]], rule: HalvingRule
) -> dict[str, float]:
    """Return the epochs left of each row whose trials pause: all that it takes, but for those done."""
    full = {**{b.row: b.epochs for b in begun}, **dict(new)}
    counts = Counter([*(b.row for b in begun), *(row for row, _ in new)])
    done = Counter[str]()
    for b in begun:
        done[b.row] += b.epoch
    left = {}
    for row, here in counts.items():
        total, before = 0, 0
        for rung in (*rule.rungs, full[row]):
            total += here * (rung - before)
            before, here = rung, max(1, here // rule.factor)
        left[row] = float(max(0, total - done[row]))
    return left


def _shares_going_on(
    begun: Sequence[Begun], new: Sequence[tuple[str, int]], rule: HalvingRule | None
) -> dict[str, dict[int, float]]:
    """Return the share of trials that goes on at an epoch, by row and epoch."""
    rows = dict.fromkeys([*(b.row for b in begun), *(row for row, _ in new)])
    if rule is None:
        observed = _observed(begun)
        return dict.fromkeys(rows, observed)
    counts = Counter(row for row, _ in new)
    return {row: _expected([b for b in begun if b.row == row], counts[row], rule) for row in rows}


def _observed(begun: Sequence[Begun]) -> dict[int, float]:
    """Return the shares so far, by the estimator of Kaplan and Meier.

    A running trial counts for the epochs that it has finished. Until the first trial is stopped, all
    are assumed to run their full length.
    """
    at_end = sorted(b.epoch for b in begun)
    stopped = Counter(b.epoch for b in begun if b.status in ("stopped", "paused"))
    goes_on = {}
    for epoch, n in sorted(stopped.items()):
        beyond = len(at_end) - bisect.bisect_right(at_end, epoch)
        goes_on[epoch] = beyond / (beyond + n)
    return goes_on


def _expected(begun: Sequence[Begun], new: int, rule: HalvingRule) -> dict[int, float]:
    """Return the shares of one row's trials that are still to come to each rung."""
    goes_on, before, coming = {}, 0, float(new)
    for level, rung in enumerate(rule.rungs):
        coming += sum(
            before <= b.epoch < rung for b in begun if b.status in ("running", "interrupted")
        )
        there, more = sum(b.epoch >= rung for b in begun), max(1, round(coming))
        expected = _passed_by_rule(there, level, rule)
        passing = _passed_by_rule(there + more, level, rule) - expected
        so_far = there - sum(b.epoch == rung and b.status == "stopped" for b in begun)
        ratio = (so_far + TRUST) / (expected + TRUST)
        goes_on[rung] = min(1.0, passing / more * ratio)
        before, coming = rung, coming * goes_on[rung]
    return goes_on


def _passed_by_rule(trials: int, level: int, rule: HalvingRule) -> float:
    """Return how many of the first trials at a rung are expected to pass it.

    At the first rung their values are in no order. Those that come to a later one were mostly the
    best so far at the rungs below it, and pass more often (`AGAIN`).

    Args:
        level: number of rungs below it.
    """
    more = AGAIN**level
    return sum(min(1.0, more * max(1, i // rule.factor) / i) for i in range(1, trials + 1))


def _rest(epoch: int, full: int, goes_on: Mapping[int, float]) -> float:
    """Return the expected epochs of a trial from an epoch on."""
    total, share = 0.0, 1.0
    for stop, part in goes_on.items():
        if epoch < stop < full:
            total, share, epoch = total + share * (stop - epoch), share * part, stop
    return total + share * max(0, full - epoch)


def _drawn(epoch: int, full: int, goes_on: Mapping[int, float], chance: random.Random) -> int:
    """Return the epochs of a trial from an epoch on, where chance stops it."""
    for stop, part in goes_on.items():
        if epoch < stop < full and chance.random() >= part:
            return stop - epoch
    return max(0, full - epoch)


class _Left(NamedTuple):
    """A trial that runs or has not begun."""

    row: str
    at: Begun
    start: float
    """Seconds before its first epoch."""
    gone: float
    """Seconds since it reported its last epoch."""


@dataclass
class _Running:
    row: str
    since: float
    """When it started, or reported its last epoch."""
    begun: bool = False
    """True once it has reported an epoch."""


class _Message(NamedTuple):
    """What a trial told at once."""

    seconds: float
    """Since it told the epoch before."""
    epochs: int


@dataclass
class Pace:
    """How fast trials train; it is told what happens, with the time in seconds."""

    _running: dict[str, _Running] = field(default_factory=dict)
    _messages: dict[str, deque[_Message]] = field(default_factory=dict)
    """The latest messages, by row."""
    _starts: deque[float] = field(default_factory=lambda: deque(maxlen=LATEST))
    """Seconds before the first epoch, of trials that took over the process of another."""
    _slots: int = 0
    _ended: int = 0

    def started(self, trial: str, row: str, now: float) -> None:
        """A process has taken the trial."""
        self._running[trial] = _Running(row, now)
        self._slots = len(self._running)

    def epoch(self, trial: str, seconds: float, now: float) -> None:
        """The trial has reported an epoch, which by itself took so many seconds."""
        run = self._running.get(trial)
        if run is None:
            return
        took = now - run.since
        if not run.begun:
            if self._ended:
                self._starts.append(max(0.0, took - seconds))
            took = seconds
        messages = self._messages.setdefault(run.row, deque(maxlen=LATEST))
        if messages and took < seconds:  # it came with the epoch before
            last = messages.pop()
            messages.append(_Message(last.seconds + took, last.epochs + 1))
        else:
            messages.append(_Message(took, 1))
        run.since, run.begun = now, True

    def ended(self, trial: str) -> None:
        """The trial no longer runs."""
        self._ended += self._running.pop(trial, None) is not None

    def seconds_left(
        self,
        begun: Mapping[str, Begun],
        new: Sequence[tuple[str, int]],
        rule: HalvingRule | None,
        now: float,
    ) -> float | None:
        """Return the seconds until all trials have ended; None before an epoch is known.

        Trials that have not begun take the places of those that end, in their order.

        Args:
            begun: all trials that have begun, by name.
            new: (row, full length) of each that has not.
        """
        if not self._messages:
            return None
        if rule is not None and rule.pauses:
            return self._seconds_of_pausing(list(begun.values()), new, rule)
        shares = _shares_going_on(list(begun.values()), new, rule)
        start = statistics.median(self._starts) if self._starts else 0.0
        going = []
        for name, run in self._running.items():
            if name in begun:
                waited = now - run.since
                before = 0.0 if run.begun else max(0.0, start - waited)
                # a start that takes longer than others took leaves the whole training
                gone = waited if run.begun else 0.0
                going.append(_Left(run.row, begun[name], before, gone))
        later = [_Left(row, Begun(row, 0, full, ""), start, 0.0) for row, full in new]
        epoch_s = {row: self._epoch_s(row) for row in shares}

        def seconds(one: _Left, chance: random.Random | None) -> float:
            if chance is None:
                epochs = _rest(one.at.epoch, one.at.epochs, shares[one.row])
            else:
                epochs = _drawn(one.at.epoch, one.at.epochs, shares[one.row], chance)
            return max(0.0, one.start + epoch_s[one.row] * epochs - one.gone)

        def end(chance: random.Random | None) -> float:
            places = [seconds(one, chance) for one in going]
            places += [0.0] * (max(1, self._slots) - len(places))
            heapq.heapify(places)
            for one in later:
                heapq.heappush(places, heapq.heappop(places) + seconds(one, chance))
            return max(places)

        draws = min(DRAWS, MOST_DRAWN // (1 + len(going) + len(later)))
        if draws < 2 or not any(shares.values()):
            return end(None)
        chance = random.Random(0)
        return statistics.fmean(end(chance) for _ in range(draws))

    def _seconds_of_pausing(
        self, begun: Sequence[Begun], new: Sequence[tuple[str, int]], rule: HalvingRule
    ) -> float:
        left = _left_of_pausing(begun, new, rule)
        work = sum(self._epoch_s(row) * epochs for row, epochs in left.items())
        return work / max(1, self._slots)

    def _epoch_s(self, row: str) -> float:
        """Return the seconds of an epoch of a row; of all rows if it has had none."""
        own = self._messages.get(row) or itertools.chain(*self._messages.values())
        found = list(own)
        return math.fsum(m.seconds for m in found) / sum(m.epochs for m in found)
