"""The winner's curse on digits: 64 nearly equal settings, and further seeds of the best 3.

    python benchmarks/finalists.py [--seeds 80] [--epochs 27]      trained together (together.py), no sweep
    python benchmarks/finalists.py --sweep                         one sweep of this package, and 40 seeds of its winner

Without `--sweep`, 64 settings of plain training that hardly differ are trained with every seed, and
each four seeds in a row are one search: the best 3 by the first seed get the other three. By how much
a value is too good is its difference to the mean of that setting over all seeds of other searches.
"""

import argparse
import math
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from together import train_together

from tfkd_ray.learn.config import TrainConfig
from tfkd_ray.learn.loop import train
from tfkd_ray.settings.schema import validated
from tfkd_ray.space.space import build_space
from tfkd_ray.store.experiment import Record, read_records

K, FURTHER, TRIALS = 3, 3, 64
TREE: dict[str, Any] = {
    "student": {"name": "mlp", "hidden": [32]},
    "data": {"name": "digits", "val_fraction": 0.4},
    "objective": "ce",
    "optim": {
        "lr": {"low": 0.1, "high": 0.2, "log": True},
        "weight_decay": {"low": 1e-5, "high": 1e-4, "log": True},
        "batch_size": 64,
    },
    "schedule": "cosine",
}
SEARCH = {"num_samples": TRIALS, "stopping": "none", "sampler": "random", "warm_start": False}


def values(seeds: int, epochs: int) -> np.ndarray:
    """Return the final validation accuracy of all settings with every seed, [64, seeds]."""
    rng = np.random.default_rng(0)
    rates = 0.1 * 2 ** rng.random(TRIALS)
    decays = 1e-5 * 10 ** rng.random(TRIALS)
    columns = []
    for seed in range(seeds):
        configs = []
        for lr, decay in zip(rates.tolist(), decays.tolist(), strict=True):
            optim = {**TREE["optim"], "lr": lr, "weight_decay": decay}
            tree = {**TREE, "optim": optim, "epochs": epochs, "seed": seed}
            configs.append(validated(TrainConfig, tree))
        columns.append(train_together(configs, {}, last=True)["val_accuracy"][:, -1].numpy())
    return np.stack(columns, axis=1)


def curses(found: np.ndarray) -> Iterator[tuple[str, list[float]]]:
    """Yield (what, by how many points it looks too good in each search)."""
    told: dict[str, list[float]] = {}
    for first in range(0, found.shape[1] - FURTHER, 1 + FURTHER):
        mine = slice(first, first + 1 + FURTHER)
        truth = np.delete(found, mine, axis=1).mean(axis=1)
        best = found[:, first].argsort(kind="stable")[::-1][:K]
        means = found[best, first + 1 : first + 1 + FURTHER].mean(axis=1)
        own = found[best, first]
        told.setdefault("best 3, the run that selected", []).append((own - truth[best]).mean())
        told.setdefault("best 3, mean of 3 further seeds", []).append((means - truth[best]).mean())
        told.setdefault("winner, the run that selected", []).append(own[0] - truth[best[0]])
        winner = int(means.argmax())
        told.setdefault("winner, mean of 3 further seeds", []).append(
            means[winner] - truth[best[winner]]
        )
    for what, all_of in told.items():
        yield what, [100 * float(v) for v in all_of]


def sweep(epochs: int, seeds: int) -> Iterator[str]:
    """Yield what one sweep says of its best trials, and what they are over fresh seeds."""
    from tfkd_ray.run.tune import build_tuner

    search = {**SEARCH, "finalists": {"k": K, "seeds": FURTHER}}
    with tempfile.TemporaryDirectory() as storage:
        build_tuner(
            build_space({**TREE, "epochs": epochs, "search": search}), name="e", storage=storage
        ).fit()
        records = read_records(Path(storage) / "e")
    trials = sum(int(r.last["epoch"]) for r in records)
    further = sum(int(run.last["epoch"]) for r in records for run in r.further)
    yield f"{trials} epochs of {len(records)} trials, {further} more ({100 * further / trials:.1f} %)"
    own = max(records, key=lambda r: r.last["val_accuracy"])
    mean = max((r for r in records if r.further), key=lambda r: r.judged["val_accuracy"])
    yield f"best by its own run: {_beside(own, own.last['val_accuracy'], seeds)}"
    error = 100 * (mean.error("val_accuracy") or math.nan)
    told = _beside(mean, mean.judged["val_accuracy"], seeds)
    yield f"best by the mean of further seeds (± {error:.2f}): {told}"


def _beside(record: Record, value: float, seeds: int) -> str:
    """Return a value, and the mean over fresh seeds, in points."""
    again = []
    for seed in range(1000, 1000 + seeds):
        config = validated(TrainConfig, {**record.config, "seed": seed})
        *_, last = train(config)
        again.append(100 * last.metrics["val_accuracy"])
    mean, error = statistics.mean(again), statistics.stdev(again) / math.sqrt(seeds)
    gap = f"{100 * value - mean:.2f} too good"
    return f"{record.name} {100 * value:.2f}; {seeds} fresh seeds {mean:.2f} ± {error:.2f}: {gap}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=80)
    parser.add_argument("--epochs", type=int, default=27)
    parser.add_argument("--sweep", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.sweep:
        print("\n".join(sweep(args.epochs, 40)))
        return
    found = values(args.seeds, args.epochs)
    spread = 100 * found.std(axis=1, ddof=1).mean()
    differ = 100 * found.mean(axis=1).std(ddof=1)
    told = f"sd over seeds {spread:.2f}, of the settings' means {differ:.2f} points"
    print(f"{TRIALS} settings, {args.seeds} seeds: {told}")
    for what, points in curses(found):
        error = statistics.stdev(points) / math.sqrt(len(points))
        print(f"{what}: {statistics.mean(points):.2f} ± {error:.2f} too good (n {len(points)})")


if __name__ == "__main__":
    main()
