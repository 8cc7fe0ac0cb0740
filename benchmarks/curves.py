"""Tables of real learning curves: many short runs of this loop, packed for replaying searches.

    python benchmarks/curves.py digits [--trials 1600]       (again: goes on where it was stopped)
    python benchmarks/curves.py omniglot --trials 200 --root DATA --threads 1
    python benchmarks/curves.py digits --published           adds the published settings to a table

The runs 0 to N - 1 of a space are quasi-random, with equally many of each objective, one after
another in this process; every eighth is repeated with three seeds, to measure the noise. The last
runs of a table are the published settings that a search would try first, each with three seeds.
Each run adds a line to a file in DIR; finally all are packed into benchmarks/curves-NAME.npz, which
`load` reads and benchmarks/search.py replays.
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
from tfkd_ray.space.relate import warm_points
from tfkd_ray.space.space import Space, build_space
from tfkd_ray.store.experiment import about_now

HERE = Path(__file__).parent
SEEDS_EVERY = 8
SEEDS = (0, 1, 2)
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
    "omniglot": {
        **SHARED,
        "data": {"name": "omniglot", "side": 16, "split_seed": 1},
        "student": {"name": "mlp", "hidden": [64]},
        "epochs": 18,
        "teacher": {
            "model": {"name": "mlp", "hidden": [256]},
            "optim": {"lr": 0.1, "batch_size": 128},
        },
        "optim": {**SHARED["optim"], "batch_size": 128},
    },
}
"""Defaults are chosen on the first and checked on the second. The third is for one evaluation of a choice
that was made before."""
GUESS = {"omniglot": 1 / 242}
"""Accuracy of guessing, where it is not 0.1: a run that diverged counts as this."""


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
    published: int
    """The number of runs with published settings; they are the last ones."""
    guess: float
    """Accuracy of guessing."""


def make(name: str, trials: int, work: Path, root: Path | None) -> None:
    """Run what is missing, and pack all runs."""
    lines = work / f"curves-{name}.jsonl"
    done = _begun(lines)
    space = space_of(name, num_samples=trials, sampler="qmc", stopping="none", warm_start=False)
    with tempfile.TemporaryDirectory() as folder, lines.open("a") as file:
        searcher = OptunaSearcher(space, Path(folder) / "study.journal")
        for n in range(trials):
            proposal = searcher.suggest(str(n))
            assert isinstance(proposal, dict), f"{proposal=}"
            searcher.on_trial_complete(str(n), {"failed": "only asked for"})
            about = proposal.pop("trial")
            for seed in SEEDS if n // len(space.branches) % SEEDS_EVERY == 0 else SEEDS[:1]:
                if (n, seed) not in done:
                    row = {"number": n, "seed": seed, "objective": proposal["objective"]["name"]}
                    row |= {
                        "parameters": about["parameters"],
                        **_run({**proposal, "seed": seed}, work, root),
                    }
                    file.write(json.dumps(row) + "\n")
                    file.flush()
    pack(name, lines)


def add_published(name: str, work: Path, root: Path | None) -> None:
    """Run the published settings that lie in a table's space, and put them at the table's end."""
    lines = work / f"published-{name}.jsonl"
    done = _begun(lines)
    space = space_of(name, num_samples=10_000)
    branches = {branch.objective: branch for branch in space.branches}
    with lines.open("a") as file:
        for n, point in enumerate(warm_points(space)):
            tree = branches[point.objective].config(point.values).tree
            for seed in SEEDS:
                if (n, seed) not in done:
                    row = {"number": n, "seed": seed, "objective": point.objective}
                    row |= {
                        "parameters": point.values,
                        **_run({**tree, "seed": seed}, work, root),
                    }
                    file.write(json.dumps(row) + "\n")
                    file.flush()
    table = load(name)
    measured = len(table.seed) - table.published
    old = [
        {
            "objective": str(table.objective[i]),
            "parameters": table.parameters[i],
            "seed": int(table.seed[i]),
            "accuracy": [float(v) for v in table.curves[i] if np.isfinite(v)],
        }
        for i in range(measured)
    ]
    new = _in_order(_read(lines))
    _save(name, old + new, {**table.about, "published": {**_about(new), "runs": len(new)}})


def _begun(lines: Path) -> set[tuple[int, int]]:
    """Return the (number, seed) of the runs in a file of lines; drop a truncated last line."""
    lines.parent.mkdir(parents=True, exist_ok=True)
    have = _read(lines)
    lines.write_text("".join(json.dumps(row) + "\n" for row in have))
    return {(row["number"], row["seed"]) for row in have}


def _run(tree: dict[str, Any], work: Path, root: Path | None) -> dict[str, Any]:
    from tfkd_ray.learn.config import TrainConfig

    if root is not None:
        tree = {**tree, "data": {**tree["data"], "root": root}}
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


def _in_order(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(rows, key=lambda row: (row["number"], row["seed"]))


def pack(name: str, lines: Path) -> None:
    """Pack the runs of a file of lines into a table."""
    rows = _in_order(_read(lines))
    _save(name, rows, {**_about(rows), "space": SPACES[name]})


def _about(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return when, where and in how many seconds runs were made."""
    kept = {
        k: v for k, v in about_now([], {}).items() if k in ("created", "versions", "git_commit")
    }
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads"
    return {**kept, "machine": machine, "seconds": sum(row["seconds"] for row in rows)}


def _save(name: str, rows: list[dict[str, Any]], about: dict[str, Any]) -> None:
    """Write runs as a table."""
    epochs = about["space"]["epochs"]
    curves = np.full((len(rows), epochs), np.nan, np.float32)
    for i, row in enumerate(rows):
        curves[i, : len(row["accuracy"])] = row["accuracy"]
    names = sorted({p for row in rows for p in row["parameters"]})
    parameters = np.array(
        [[row["parameters"].get(p, np.nan) for p in names] for row in rows], np.float64
    )
    np.savez_compressed(
        HERE / f"curves-{name}.npz",
        curves=curves,
        parameters=parameters,
        seed=np.array([row["seed"] for row in rows], np.uint8),
        objective=np.array([row["objective"] for row in rows]),
        about=np.array(json.dumps({**about, "parameters": names})),
    )


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
        published, guess = about.get("published", {}).get("runs", 0), GUESS.get(name, 0.1)
        return Table(
            space, about, file["objective"], parameters, file["seed"], file["curves"], published, guess
        )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=list(SPACES))
    parser.add_argument("--trials", type=int, default=1600)
    parser.add_argument("--published", action="store_true", help="only these settings")
    parser.add_argument("--root", type=Path, help="folder of the data, if not the usual one")
    parser.add_argument(
        "--work", type=Path, default=Path(tempfile.gettempdir()) / "tfkd-curves", metavar="DIR"
    )
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    torch.set_num_threads(args.threads)
    if not args.published:
        make(args.name, args.trials, args.work, args.root)
    add_published(args.name, args.work, args.root)
    path = HERE / f"curves-{args.name}.npz"
    print(f"{path}: {path.stat().st_size / 1e3:.0f} kB, {len(load(args.name).seed)} runs")


if __name__ == "__main__":
    main()
