"""Throughput of several trials with one thread each, or one trial with several threads, in turns.

    python benchmarks/threads.py [--students cnn,cnn5,resnet18] [--epochs 4] [--repeats 3]

As many concurrent trials as cores, each on one (`cpus_per_worker: 1`), against one trial on all
cores: plain training with batches of 64 images of Fashion-MNIST, cropped and flipped. Printed are
images a second of the whole machine, without the first epoch.
"""

import argparse
import multiprocessing
import os
import statistics

import torch

from tfkd_ray.learn.config import TrainConfig
from tfkd_ray.learn.loop import train
from tfkd_ray.settings.schema import validated


def images_per_s(student: str, threads: int, epochs: int) -> float:
    """Return the median over the epochs of a run in this process."""
    tree = {
        "data": {"name": "fashion_mnist", "subset": 800, "val_fraction": 0.0},
        "student": student,
        "objective": "ce",
        "augment": {"crop_padding": 2, "flip": True},
        "optim": {"batch_size": 64},
        "epochs": epochs,
        "cpus_per_worker": threads,
    }
    run = list(train(validated(TrainConfig, tree)))
    return statistics.median(epoch.metrics["images_per_s"] for epoch in run[1:])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--students", default="cnn,cnn5,resnet18")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    cores = os.cpu_count() or 1
    print(f"{cores} cores, torch {torch.__version__}")
    with multiprocessing.get_context("spawn").Pool(cores) as pool:
        for student in args.students.split(","):
            ratios = []
            for _ in range(args.repeats):
                side_by_side = sum(
                    pool.starmap(images_per_s, [(student, 1, args.epochs)] * cores, chunksize=1)
                )
                ratios.append(
                    side_by_side / pool.apply(images_per_s, (student, cores, args.epochs))
                )
            print(
                f"{student:12} {cores} trials with a thread each over 1 trial with {cores}: "
                f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}, n {args.repeats})",
                flush=True,
            )


if __name__ == "__main__":
    main()
