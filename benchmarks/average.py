"""Which value of a run with `ema` should a rung judge: that of the weights in training, or the average's?

    python benchmarks/average.py [--data digits] [--subset N] [--configs 32] [--epochs 27] [--threads 1]

Random configurations (optimizer, learning rate, weight decay, decay of the average) are trained to
the end. Printed is, for each rung of halving, the rank correlation (Kendall's tau-b) of both values
there with the final value of the averaged weights, which are the student: the mean and the interval
of 95 % of 2,000 bootstrap samples of the configurations, and of their difference. Then the share of
the best third at the end that is in the best third at the rung.
"""

import argparse
import json
import math
import platform
import time
from typing import Any

import numpy as np
import torch
from scipy import stats

from tfkd_ray.learn.config import TrainConfig
from tfkd_ray.learn.loop import Diverged, train
from tfkd_ray.settings.schema import validated

VALUES = {"in training": "val_accuracy", "average": "val_ema_accuracy"}


def proposal(rng: np.random.Generator) -> dict[str, Any]:
    """Return a random optimizer and average."""
    name = str(rng.choice(["sgd", "adamw"]))
    rates = (0.003, 0.5) if name == "sgd" else (1e-4, 0.03)
    decays = (1e-5, 1e-2) if name == "sgd" else (1e-3, 0.5)

    def between(low: float, high: float) -> float:
        return float(math.exp(rng.uniform(math.log(low), math.log(high))))

    optim = {
        "name": name,
        "lr": between(*rates),
        "weight_decay": between(*decays),
        "batch_size": int(rng.choice([32, 64, 128])),
    }
    return {"optim": optim, "ema": {"decay": 1 - between(1e-3, 0.1)}}


def curves(tree: dict[str, Any], count: int) -> list[list[dict[str, float]]]:
    """Return the metrics of all epochs of each configuration; those that diverge are left out."""
    rng, found = np.random.default_rng(0), []
    for number in range(count):
        config = validated(TrainConfig, {**tree, **proposal(rng), "seed": number})
        try:
            found.append([epoch.metrics for epoch in train(config)])
        except Diverged:
            print(f"  configuration {number} diverged", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", default="digits")
    parser.add_argument("--subset", type=int)
    parser.add_argument("--configs", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=27)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    data = {"name": args.data, "val_fraction": 0.4}
    tree = {
        "data": data if args.subset is None else {**data, "subset": args.subset},
        "student": {"name": "cnn", "widths": [8, 16]},
        "objective": "ce",
        "epochs": args.epochs,
        "cpus_per_worker": args.threads,
    }
    start = time.monotonic()
    runs = curves(tree, args.configs)
    print(
        f"{json.dumps(tree)}, {len(runs)} configurations, torch {torch.__version__}, {platform.machine()}, "
        f"{time.monotonic() - start:.0f} s"
    )
    final = np.array([run[-1]["val_ema_accuracy"] for run in runs])
    print(f"final value of the average: {final.min():.4f} to {final.max():.4f}")
    picks = np.random.default_rng(1).integers(0, len(runs), (2000, len(runs)))
    for rung in (args.epochs // 9, args.epochs // 3):
        taus = {}
        for name, key in VALUES.items():
            there = np.array([run[rung - 1][key] for run in runs])
            whole = stats.kendalltau(there, final).statistic
            taus[name] = np.array([stats.kendalltau(there[p], final[p]).statistic for p in picks])
            low, high = np.nanquantile(taus[name], [0.025, 0.975])
            third = len(runs) // 3
            kept = len({*np.argsort(-there)[:third]} & {*np.argsort(-final)[:third]}) / third
            print(
                f"epoch {rung:3}, {name:12} tau {whole:.3f} ({low:.3f} to {high:.3f}), kept {kept:.0%}"
            )
        low, high = np.nanquantile(taus["average"] - taus["in training"], [0.025, 0.975])
        print(f"epoch {rung:3}, average - in training {low:+.3f} to {high:+.3f}")


if __name__ == "__main__":
    main()
