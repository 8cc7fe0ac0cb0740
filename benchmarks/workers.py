"""Efficiency of two workers that share a batch: images a second of 2 single-core workers against 1.

    python benchmarks/workers.py [--student cnn5|resnet18|...] [--epochs 5] [--repeats 3]

Both train the same student with the same batches of 128 images (Fashion-MNIST, cropped and
flipped), in turns, without the first epoch of each run. 100 % is twice the throughput of one
worker.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

import torch

from tfkd_ray.learn.config import TrainConfig
from tfkd_ray.run.connect import connect
from tfkd_ray.run.group import WorkerGroup
from tfkd_ray.settings.schema import validated
from tfkd_ray.store.assignment import Assignment
from tfkd_ray.store.storage import Directory


def images_per_s(group: WorkerGroup, config: TrainConfig, folder: Path) -> float:
    """Return the median over the epochs of a run on a group."""
    assignment = Assignment(
        folder.name, config.epochs, directory=folder, storage=Directory(folder.parent)
    )
    epochs = list(group.epochs(config.model_dump(mode="json"), assignment))
    return statistics.median(epoch["images_per_s"] for epoch in epochs[1:])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--student", default="resnet18")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    connect(workers=2)
    found: dict[int, list[float]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as name:
        configs = {
            workers: validated(
                TrainConfig,
                {
                    "data": {"name": "fashion_mnist", "subset": 1500},
                    "student": args.student,
                    "objective": "ce",
                    "augment": {"crop_padding": 2, "flip": True},
                    "epochs": args.epochs,
                    "workers": workers,
                },
            )
            for workers in found
        }
        for repeat in range(args.repeats):
            for workers, config in configs.items():
                group = WorkerGroup(config, Path(name) / "groups")
                found[workers].append(
                    images_per_s(group, config, Path(name) / f"{workers}-{repeat}")
                )
                group.close()
                print(f"{workers} workers: {found[workers][-1]:.1f} images/s", flush=True)
    shares = [100 * two / (2 * one) for one, two in zip(found[1], found[2], strict=True)]
    print(
        f"{args.student}, {configs[2].precision}, torch {torch.__version__}: efficiency of 2 workers "
        f"{statistics.median(shares):.0f} % ({min(shares):.0f} to {max(shares):.0f}, {args.repeats} repeats)"
    )


if __name__ == "__main__":
    main()
