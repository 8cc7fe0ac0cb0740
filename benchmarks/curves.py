"""Tables of real learning curves: many short runs of this loop, packed for replaying searches.

    python benchmarks/curves.py digits [--trials 1600]       (again: goes on where it was stopped)

The runs 0 to N - 1 of a space are quasi-random, with equally many of each objective, one after
another in this process; every eighth is repeated with three seeds, to measure the noise. Each run
adds a line to `DIR/curves-NAME.jsonl`; finally all are packed into benchmarks/curves-NAME.npz,
which `load` reads and benchmarks/search.py replays.
"""

import argparse
import contextlib
import dataclasses
import json
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import torch

from tfkd_ray.learn.loop import Diverged, train
from tfkd_ray.learn.teachers import find_or_train
from tfkd_ray.run.searcher import OptunaSearcher
from tfkd_ray.settings.schema import validated
from tfkd_ray.space.space import Space, build_space
from tfkd_ray.store.experiment import about_now

HERE = Path(__file__).parent
SEEDS_EVERY = 8
SHARED: dict[str, Any] = {
    "student": {"name": "mlp", "hidden": [32]},
    "epochs": 27,
    "objective": [
        "ce",
        {"name": "lsr", "alpha": {"low": 0.02, "high": 0.4, "log": True}},
        {
            "name": "tfkd_reg",
            "temperature": {"low": 1.5, "high": 20, "log": True},
            "alpha": {"low": 0.05, "high": 0.95},
            "correct_prob": {"low": 0.9, "high": 0.999, "log_complement": True},
        },
        {
            "name": "tfkd_self",
            "temperature": {"low": 1, "high": 20, "log": True},
            "alpha": {"low": 0.05, "high": 0.95},
        },
        {
            "name": "kd",
            "temperature": {"low": 1, "high": 20, "log": True},
            "alpha": {"low": 0.05, "high": 0.95},
        },
    ],
    "teacher": {
        "model": {"name": "cnn", "widths": [16, 32]},
        "optim": {"lr": 0.1, "batch_size": 64},
    },
    "optim": {
        "lr": {"low": 0.003, "high": 1, "log": True},
        "weight_decay": {"low": 1e-5, "high": 1e-2, "log": True},
        "batch_size": 64,
    },
    "schedule": "cosine",
}
SPACES: dict[str, dict[str, Any]] = {
    "digits": {**SHARED, "data": {"name": "digits", "val_fraction": 0.4}},
    "fashion": {**SHARED, "data": {"name": "fashion_mnist", "subset": 2000, "val_fraction": 0.5}},
}
"""Defaults are chosen on the first; published figures come from the second."""


def space_of(name: str, **search: Any) -> Space:
    """Return the space of a table with these search settings."""
    return build_space({**SPACES[name], "search": search})


@dataclasses.dataclass(frozen=True)
class Table:
    """Runs with their validation accuracy after every epoch."""

    space: Space
    about: dict[str, Any]
    objective: np.ndarray
    """[N], text."""
    parameters: list[dict[str, Any]]
    seed: np.ndarray
    """[N]."""
    curves: np.ndarray
    """[N, epochs] in [0, 1]; NaN from the epoch in which a run diverged."""


def make(name: str, trials: int, work: Path) -> Path:
    """Run what is missing, pack all runs, and return the table's file."""
    lines = work / f"curves-{name}.jsonl"
    work.mkdir(parents=True, exist_ok=True)
    have = _read(lines)
    lines.write_text("".join(json.dumps(row) + "\n" for row in have))  # drop a truncated last line
    done = {(row["number"], row["seed"]) for row in have}
    space = space_of(name, num_samples=trials, sampler="qmc", stopping="none", warm_start=False)
    with tempfile.TemporaryDirectory() as folder, lines.open("a") as file:
        searcher = OptunaSearcher(space, Path(folder) / "study.journal")
        for n in range(trials):
            proposal = searcher.suggest(str(n))
            assert isinstance(proposal, dict), f"{proposal=}"
            searcher.on_trial_complete(str(n), {"failed": "only asked for"})
            about = proposal.pop("trial")
            for seed in (0, 1, 2) if n // len(space.branches) % SEEDS_EVERY == 0 else (0,):
                if (n, seed) not in done:
                    row = {"number": n, "seed": seed, "objective": proposal["objective"]["name"]}
                    row |= {
                        "parameters": about["parameters"],
                        **_run({**proposal, "seed": seed}, work),
                    }
                    file.write(json.dumps(row) + "\n")
                    file.flush()
    return pack(name, lines)


def _run(tree: dict[str, Any], work: Path) -> dict[str, Any]:
    from tfkd_ray.learn.config import TrainConfig

    config = validated(TrainConfig, tree)
    teacher = (
        find_or_train(config.model_copy(update={"seed": 0}), work) if config.needs_teacher else None
    )
    accuracy, started = [], time.perf_counter()
    with contextlib.suppress(Diverged):
        accuracy += [epoch.metrics["val_accuracy"] for epoch in train(config, teacher=teacher)]
    return {"accuracy": accuracy, "seconds": round(time.perf_counter() - started, 3)}


def _read(lines: Path) -> list[dict[str, Any]]:
    text = lines.read_text() if lines.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def pack(name: str, lines: Path) -> Path:
    """Pack the runs of a file of lines into a table."""
    rows = sorted(_read(lines), key=lambda row: (row["number"], row["seed"]))
    epochs = SPACES[name]["epochs"]
    curves = np.full((len(rows), epochs), np.nan, np.float32)
    for i, row in enumerate(rows):
        curves[i, : len(row["accuracy"])] = row["accuracy"]
    names = sorted({p for row in rows for p in row["parameters"]})
    parameters = np.array(
        [[row["parameters"].get(p, np.nan) for p in names] for row in rows], np.float64
    )
    about = {
        **{k: v for k, v in about_now([]).items() if k in ("created", "versions", "git_commit")},
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads", "space": SPACES[name],
        "parameters": names, "seconds": sum(row["seconds"] for row in rows),
    }  # fmt: skip
    path = HERE / f"curves-{name}.npz"
    np.savez_compressed(
        path, curves=curves, parameters=parameters, seed=np.array([row["seed"] for row in rows], np.uint8),
        objective=np.array([row["objective"] for row in rows]), about=np.array(json.dumps(about)),
    )  # fmt: skip
    return path


def load(name: str) -> Table:
    """Load the table of this name."""
    with np.load(HERE / f"curves-{name}.npz") as file:
        about = json.loads(str(file["about"]))
        names = about["parameters"]
        parameters = [
            {p: float(v) for p, v in zip(names, row, strict=True) if np.isfinite(v)}
            for row in file["parameters"]
        ]
        space = build_space({**about["space"], "search": {}})
        return Table(space, about, file["objective"], parameters, file["seed"], file["curves"])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=list(SPACES))
    parser.add_argument("--trials", type=int, default=1600)
    parser.add_argument(
        "--work", type=Path, default=Path(tempfile.gettempdir()) / "tfkd-curves", metavar="DIR"
    )
    args = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    path = make(args.name, args.trials, args.work)
    print(f"{path}: {path.stat().st_size / 1e3:.0f} kB, {len(load(args.name).seed)} runs")


if __name__ == "__main__":
    main()
