"""Platform time of a trial and of a report: what they cost in addition to training.

    python benchmarks/platform_time.py [--workers 1|2] [--trials 30] [--epochs 5] [--repeats 3]

A trial's platform time is the wall time between the ends of consecutive trials, minus the seconds
in the loop. The first 5 trials, which start processes and import torch, are left out. A message's is
the time between the results of consecutive epochs, minus the seconds in the loop, without
checkpoints; the callback that measures it makes each epoch a message. Without it, messages bring
several epochs: a report's cost is then the driver's CPU time for each further epoch of a trial.
Printed are the medians of each repeat, and their spread.
"""

import argparse
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import ray
import torch
from ray import tune

from tfkd_ray import build_tuner
from tfkd_ray.run.connect import connect
from tfkd_ray.store.experiment import read_records

LEFT_OUT = 5
MANY_EPOCHS = 55


class Ends(tune.Callback):  # type: ignore[misc]
    """Records when each trial ends, and the time between epochs' results minus the epoch."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.reports: list[float] = []
        self._last = 0.0

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        now = time.perf_counter()
        if result["epoch"] > 1:
            self.reports.append(now - self._last - result["seconds"])
        self._last = now

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.times.append(time.perf_counter())


def space_of(workers: int, trials: int, epochs: int) -> dict[str, Any]:
    return {
        "student": {"name": "mlp", "hidden": [32]},
        "objective": "ce",
        "epochs": epochs,
        "checkpoint_every_s": 1000,
        "workers": workers,
        "optim": {"lr": {"low": 0.01, "high": 0.5, "log": True}},
        "search": {"num_samples": trials, "stopping": "none", "max_concurrent": 1},
    }


def driver_seconds(workers: int, trials: int, epochs: int) -> float:
    """Return the driver's CPU seconds for a sweep without callbacks."""
    with tempfile.TemporaryDirectory() as storage:
        tuner = build_tuner(space_of(workers, trials, epochs), name="e", storage=storage)
        before = time.process_time()
        tuner.fit()
        return time.process_time() - before


def measure(workers: int, trials: int, epochs: int) -> tuple[list[float], list[float]]:
    """Return the platform seconds of each steady-state trial, and of each message."""
    ends = Ends()
    with tempfile.TemporaryDirectory() as storage:
        space = space_of(workers, trials, epochs)
        build_tuner(space, name="e", storage=storage, callbacks=[ends]).fit()
        records = read_records(Path(storage) / "e")
    inside = [sum(m["seconds"] for m in r.metrics) for r in records]
    walls = [b - a for a, b in zip(ends.times, ends.times[1:], strict=False)]
    times = [wall - loop for wall, loop in zip(walls, inside[1:], strict=True)]
    return times[LEFT_OUT:], ends.reports[LEFT_OUT * (epochs - 1) :]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--trials", type=int, default=30)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    connect(workers=args.workers)
    medians = []
    for repeat in range(args.repeats):
        times, reports = measure(args.workers, args.trials, args.epochs)
        medians.append(statistics.median(times))
        spread = f"range {min(times):.4f} to {max(times):.4f}"
        print(f"repeat {repeat + 1}: median {medians[-1]:.4f} s, {spread}, n {len(times)}")
        cuts = [1000 * c for c in statistics.quantiles(reports, n=20)]
        print(
            f"  a message: median {cuts[9]:.1f} ms (5 to 95 %: {cuts[0]:.1f} to {cuts[18]:.1f}), n {len(reports)}"
        )
        few, many = (driver_seconds(args.workers, args.trials, n) for n in (5, MANY_EPOCHS))
        cost = 1000 * (many - few) / args.trials / (MANY_EPOCHS - 5)
        print(f"  a report: {cost:.2f} ms of the driver's CPU, n {args.trials * (MANY_EPOCHS - 5)}")
    versions = (
        f"python {platform.python_version()}, ray {ray.__version__}, torch {torch.__version__}"
    )
    print(
        f"platform time per trial, {args.workers} worker(s): {statistics.median(medians):.4f} s "
        f"(repeats {min(medians):.4f} to {max(medians):.4f}); {versions}, {platform.machine()}"
    )


if __name__ == "__main__":
    main()
