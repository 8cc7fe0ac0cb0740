"""What an own loss costs: python benchmarks/own.py [--rounds 31] [--before CHECKOUT] [--report EXPERIMENT]

One process and one thread, CPU time. A round trains one epoch of each run on digits, the order of
the runs turning from round to round; printed are the medians of the ratios within rounds, with
quartiles.

    kd, own kd     `kd`, and a function of one's own that computes it, from the same teacher's bank
    ce             plain training

With --before, each round is also run with the package in another checkout, one process beside the
other in turns: `ce`, `kd`, and with --report the report of an experiment.
Figures: benchmarks/RESULTS.md.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

STUDENTS: dict[str, dict[str, Any]] = {
    "mlp": {"name": "mlp", "hidden": [64]},
    "cnn": {"name": "cnn", "widths": [16, 32]},
}
ALPHA, TEMPERATURE = 0.9, 4.0


def own_kd(
    logits: Tensor, labels: Tensor, teacher: Tensor, alpha: float, temperature: float
) -> Tensor:
    """KD, in the operations that the package's own uses."""
    log_p = F.log_softmax(logits / temperature, dim=1)
    log_q = F.log_softmax(teacher / temperature, dim=1)
    soft = F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)
    return (1 - alpha) * F.cross_entropy(logits, labels) + alpha * temperature**2 * soft


def runs(student: str, folder: Path, kinds: list[str], epochs: int) -> dict[str, Iterator[Any]]:
    """Return the epochs of each kind of run."""
    from tfkd_ray import TrainConfig, find_or_train, train

    args = {"alpha": ALPHA, "temperature": TEMPERATURE}
    objectives = {
        "ce": {"name": "ce"},
        "kd": {"name": "kd", **args},
        "own kd": {"name": "own", "path": "own:own_kd", "args": args},
    }
    found = {}
    for kind in kinds:
        tree: dict[str, Any] = {"objective": objectives[kind], "epochs": epochs}
        tree |= {"student": STUDENTS[student], "optim": {"batch_size": 64}}
        if kind != "ce":
            teacher = {"name": "mlp", "hidden": [256]}
            tree["teacher"] = {"model": teacher, "epochs": 2, "labels": "bank"}
        config = TrainConfig(**tree)
        found[kind] = train(config, teacher=find_or_train(config, folder))
    return found


def timed(student: str, folder: Path, kinds: list[str], rounds: int) -> dict[str, list[float]]:
    """Return the CPU seconds of each epoch but the first, which fills caches."""
    torch.set_num_threads(1)
    epochs = runs(student, folder, kinds, rounds + 1)
    taken: dict[str, list[float]] = {kind: [] for kind in kinds}
    for number in range(rounds + 1):
        at = number % len(kinds)
        for kind in kinds[at:] + kinds[:at]:
            start = time.process_time()
            next(epochs[kind])
            if number:
                taken[kind].append(time.process_time() - start)
    return taken


def ratios(first: list[float], second: list[float]) -> str:
    """Return the median of the ratios second / first, with quartiles."""
    found = [b / a for a, b in zip(first, second, strict=True)]
    low, middle, high = statistics.quantiles(found, n=4)
    return f"{middle:.3f} ({low:.3f} to {high:.3f}, n {len(found)})"


PART = """
import sys, time
sys.path[:0] = [{checkout!r}, {here!r}]
from pathlib import Path
import own
import json
print(json.dumps(own.part({student!r}, Path({folder!r}), {experiment!r})))
"""


def part(student: str, folder: Path, experiment: str | None) -> dict[str, float]:
    """Return what a process of its own measures: the median epoch of ce and kd, and a report."""
    found = {}
    for kind in ("ce", "kd"):
        found[kind] = statistics.median(timed(student, folder, [kind], 9)[kind])
    if experiment:
        from tfkd_ray.show.report import report

        start = time.process_time()
        report(Path(experiment), folder / "report.html")
        found["report"] = time.process_time() - start
    return found


def beside(checkouts: list[str], student: str, rounds: int, experiment: str | None) -> None:
    """Print the ratio of this checkout to the one before, processes in turns."""
    found: list[list[dict[str, float]]] = [[] for _ in checkouts]
    with tempfile.TemporaryDirectory() as folder:
        for number in range(rounds):
            order = range(len(checkouts)) if number % 2 else reversed(range(len(checkouts)))
            for k in order:
                text = PART.format(
                    checkout=checkouts[k], here=str(Path(__file__).parent), student=student,
                    folder=str(Path(folder) / str(k)), experiment=experiment,
                )  # fmt: skip
                done = subprocess.run(
                    [sys.executable, "-c", text], capture_output=True, text=True, check=True
                )
                found[k].append(json.loads(done.stdout.splitlines()[-1]))
    for kind in found[0][0]:
        before, after = ([one[kind] for one in measured] for measured in found)
        print(f"{student}, {kind}, after over before:", ratios(before, after))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--before")
    parser.add_argument("--report")
    args = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parent))
    for student in STUDENTS:
        with tempfile.TemporaryDirectory() as folder:
            taken = timed(student, Path(folder), ["kd", "own kd"], args.rounds)
        print(f"{student}, own kd over kd:", ratios(taken["kd"], taken["own kd"]))
        if args.before:
            here = str(Path(__file__).parent.parent)
            beside([args.before, here], student, args.rounds, args.report)


if __name__ == "__main__":
    main()
