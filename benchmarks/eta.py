"""The time left that the live view shows, against the time that was left: sweeps over learning curves.

    python benchmarks/eta.py digits [--repeats 10]

A sweep is simulated on a clock of its own: this package's searcher and stopping rule, without Ray;
a trial is a measured run of its objective, drawn from the table. A process takes START_S to begin,
and hands a trial on within AGAIN_S; an epoch takes EPOCH_S of its objective, with a log-normal
deviation of SPREAD, of the trial and of the epoch each. After every epoch between 20 and 95 % of the
sweep's time, the time left as shown is divided by the time that was left.
"""

import argparse
import heapq
import itertools
import statistics
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from curves import SPACES, Table, load
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher
from search import studies_in_memory

from tfkd_ray.run.searcher import OptunaSearcher, StudyStopping
from tfkd_ray.show.pace import Begun, Pace
from tfkd_ray.show.status import halving_rule, left_by_row
from tfkd_ray.space.space import Space, build_space

HERE = Path(__file__).parent
START_S, AGAIN_S, SPREAD = 8.0, 0.3, 0.1
EPOCH_S = {"ce": 0.5, "lsr": 0.5, "tfkd_reg": 0.55, "tfkd_self": 0.7, "kd": 0.9}
SWEEPS = [(n, slots, stopping) for n, slots in ((30, 2), (60, 4), (60, 16), (200, 8))
          for stopping in ("halving", "none", "median", "hyperband")]  # fmt: skip


def simulate(space: Space, table: Table, slots: int, seed: int) -> list[tuple[float, float]]:
    """Return (time, time left as shown) after each epoch of a sweep; the last time is its end."""
    g = np.random.default_rng(seed)
    searcher = OptunaSearcher(space, Path("in memory"))
    stopping, rule = StudyStopping(searcher), halving_rule(space.tree["search"], space.epochs)
    searcher.judges = True
    rows = {branch.objective: space.epochs for branch in space.branches}
    mine = {row: np.flatnonzero((table.objective == row) & (table.seed == 0)) for row in rows}
    pace, begun = Pace(), dict[str, Begun]()
    events: list[tuple[float, int, str]] = []
    about: dict[str, Any] = {}
    told: list[tuple[float, float]] = []
    order, asked, now = itertools.count(), 0, 0.0

    def start(at: float, wait: float) -> bool:
        nonlocal asked
        name = f"id{asked}"
        proposal = searcher.suggest(name)
        if proposal == Searcher.FINISHED:
            return False
        assert isinstance(proposal, dict), "a search waits"
        asked += 1
        row = proposal["objective"]["name"]
        epoch_s = EPOCH_S[row] * g.lognormal(0, SPREAD)
        about[name] = row, table.curves[g.choice(mine[row])], epoch_s
        begun[name] = Begun(row, 0, space.epochs, "running")
        pace.started(name, row, at)
        heapq.heappush(events, (at + wait + epoch_s, next(order), name))
        return True

    for _ in range(slots):
        start(now, START_S)
    while events:
        now, _, name = heapq.heappop(events)
        row, curve, epoch_s = about[name]
        epoch = begun[name].epoch + 1
        value = float(curve[epoch - 1])
        took = epoch_s * g.lognormal(0, SPREAD)
        pace.epoch(name, took, now)
        result: dict[str, Any] = {"epoch": epoch, space.search.metric: value}
        if np.isnan(value):
            result, status = {"failed": "Diverged", "done": True}, "failed"
        else:
            told_to = stopping.on_trial_result(None, SimpleNamespace(trial_id=name), result)
            status = "stopped" if told_to == TrialScheduler.STOP else "running"
            searcher.on_trial_result(name, result)
        if epoch == space.epochs and status == "running":
            status = "done"
        begun[name] = Begun(row, epoch, space.epochs, status)
        if status == "running":
            heapq.heappush(events, (now + took, next(order), name))
        else:
            searcher.on_trial_complete(name, result)
            pace.ended(name)
            start(now, AGAIN_S)
        new = left_by_row(rows, space.search.num_samples, [b.row for b in begun.values()])
        left = pace.seconds_left(begun, new, rule, now)
        assert left is not None
        told.append((now, left))
    return told


def ratios(told: list[tuple[float, float]]) -> list[float]:
    """Return (time left as shown) / (time left) between 20 and 95 % of the time."""
    end = told[-1][0]
    return [left / (end - now) for now, left in told if 0.2 * end <= now <= 0.95 * end]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("table", choices=SPACES)
    parser.add_argument("--repeats", type=int, default=10)
    args = parser.parse_args()
    studies_in_memory()
    table = load(args.table)
    print(
        "| trials | at once | stopping | ratio, median (5 % to 95 %) | within 1.5 |\n|" + "---|" * 5
    )
    for trials, slots, stopping in SWEEPS:
        search = {"num_samples": trials, "sampler": "random", "stopping": stopping}
        found: list[float] = []
        for seed in range(args.repeats):
            space = build_space({**SPACES[args.table], "seed": seed, "search": search})
            found += ratios(simulate(space, table, slots, seed))
        within = statistics.fmean(1 / 1.5 <= ratio <= 1.5 for ratio in found)
        low, middle, high = np.quantile(found, [0.05, 0.5, 0.95])
        cells = f"{middle:.2f} ({low:.2f} to {high:.2f}) | {within:.1%}"
        print(f"| {trials} | {slots} | {stopping} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
