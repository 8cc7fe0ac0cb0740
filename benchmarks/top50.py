"""Measure soft labels of the 50 largest logits: what they lose, their size, and the time of a step.

    python benchmarks/top50.py [--epochs 12] [--rounds 9] [--student resnet18] [--out FILE]

The data have 1,000 classes in 100 families: an image is its class's picture, which is like those of
its family, shifted, with noise. A teacher is trained on them here. Printed are, at each temperature,
KL(full || kept) in nats an image, and its share of KL(full || uniform), the KD term of a student
that knows nothing; bytes of an image; and the CPU seconds of an epoch of 8 batches of the same student with `ce`, `kd`
from a whole bank and `kd` from the largest logits, interleaved: medians of the ratios to `ce` of the
same round. The student is small, so the ratios are high: the soft part of a batch of 1,000 classes
takes the same time beside a large one.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))

from tfkd_ray.learn.config import TrainConfig
from tfkd_ray.learn.evaluate import predictions
from tfkd_ray.learn.loop import train
from tfkd_ray.learn.soft_labels import Bank
from tfkd_ray.learn.teachers import find_or_train, load_teacher
from tfkd_ray.learn.top_labels import COLUMNS, packed, share_lost, unpacked
from tfkd_ray.settings.schema import validated

CLASSES, FAMILIES, SIDE = 1000, 100, 16
TRAIN, TEST = 14, 2
"""Images of each class."""
TIMED = 1024
"""Images of an epoch whose time is taken."""
NOISE = 2.2
TEMPERATURES = (1, 2, 4, 8, 20)


def load(split: str) -> tuple[Any, Any]:
    """Return uint8 [N, 3, 16, 16] and labels."""
    same = np.random.default_rng(0)
    families = same.normal(size=(FAMILIES, 3, SIDE, SIDE))
    pictures = 0.7 * families[np.arange(CLASSES) % FAMILIES]
    pictures += 0.7 * same.normal(size=(CLASSES, 3, SIDE, SIDE))
    each = TRAIN if split == "train" else TEST
    draw = np.random.default_rng(1 if split == "train" else 2)
    labels = np.repeat(np.arange(CLASSES), each)
    images = pictures[labels] + NOISE * draw.normal(size=(len(labels), 3, SIDE, SIDE))
    return np.clip(128 + 40 * images, 0, 255).astype(np.uint8), labels


def few(split: str) -> tuple[Any, Any]:
    """Return the first images of each class, for the time of an epoch."""
    images, labels = load(split)
    return images[::TRAIN][:TIMED], labels[::TRAIN][:TIMED]


def config(
    objective: Any, labels: str, epochs: int, data: str = "load", student: str = "cnn"
) -> TrainConfig:
    tree = {
        "data": {
            "name": "own",
            "path": f"top50:{data}",
            "shape": [3, SIDE, SIDE],
            "num_classes": CLASSES,
            "val_fraction": 0.0 if data == "few" else 0.1,
        },
        "objective": objective,
        "student": {"name": "cnn", "widths": [64, 128]} if student == "cnn" else student,
        "teacher": {
            "model": {"name": "mlp", "hidden": [512]},
            "epochs": epochs,
            "labels": labels,
            "optim": {"batch_size": 128, "lr": 0.05},
        },
        "optim": {"batch_size": 128},
        "epochs": 100,
    }
    return validated(TrainConfig, tree)


def lost(logits: torch.Tensor, temperature: float) -> float:
    """Return KL(full || kept) in nats, the mean over images."""
    kept = unpacked(packed(logits), logits.shape[1], temperature)
    p, q = ((z.double() / temperature).log_softmax(dim=1) for z in (logits, kept))
    return float((p.exp() * (p - q)).sum(dim=1).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--student", default="cnn", help="whose steps are timed")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    kd = {"name": "kd", "alpha": 0.9, "temperature": 1}
    ways = {"ce": ("ce", "bank"), "kd bank": (kd, "bank"), "kd top50": (kd, "top50")}
    configs = {name: config(*way, args.epochs, "few", args.student) for name, way in ways.items()}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        whole = config(kd, "bank", args.epochs)
        find_or_train(whole, folder)
        run = whole.pinned().teacher_run()
        assert run is not None
        val_set = run.data.load()[1]
        assert val_set is not None
        teacher = load_teacher(run, Path(folder))
        found = list(predictions(teacher, val_set, run.data))
        logits = torch.cat([guess for guess, _ in found])
        right = (logits.argmax(dim=1) == val_set.labels).double().mean()
        rows = [
            {"T": T, "kl": lost(logits, T), "share": share_lost(logits, T)} for T in TEMPERATURES
        ]
        report: dict[str, Any] = {
            "classes": CLASSES,
            "images": len(logits),
            "teacher_val_accuracy": float(right),
            "lost": rows,
            "bytes_an_image": {"bank": 2 * CLASSES, "top50": 2 * COLUMNS},
        }
        print(json.dumps(report, indent=1), flush=True)
        bank = Bank(lambda: teacher, {"teacher": run.fingerprint()}, Path(folder))
        runs = {name: train(c, teacher=bank) for name, c in configs.items()}
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(args.rounds + 1):
            for name, epochs in runs.items():
                start = time.process_time()
                next(epochs)
                seconds[name].append(time.process_time() - start)
        report["cpu_s"] = {name: statistics.median(times[1:]) for name, times in seconds.items()}
        for name in ("kd bank", "kd top50"):
            ratios = [kd / ce for kd, ce in zip(seconds[name], seconds["ce"], strict=True)][1:]
            report[f"{name} / ce"] = {
                "median": statistics.median(ratios),
                "from": min(ratios),
                "to": max(ratios),
                "n": len(ratios),
            }
    print(json.dumps(report, indent=1))
    if args.out:
        args.out.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
