"""An experiment's directory: what is in it, written and read plainly. No Ray, no torch, no unpickling.

    experiment.yaml                the space as it was understood, versions, git commit, seeds, command line
    study.journal                  Optuna's journal: proposals, values after every epoch, ends
    spent.json                     seconds of all drivers, and of all trials, for budgets
    trials/t0007-tfkd_reg/         one folder a trial
        trial.json                 number, objective, searched parameters, configuration, status, reason
        metrics.jsonl              one line an epoch
        student.safetensors        weights after the last epoch (full-length trials)
        last.ckpt, before.ckpt     run state to go on from, and the one before it
    tb/t0007-tfkd_reg/             TensorBoard events
    trials/*.pkl, *.json           Ray Tune's own files; nothing here reads them

`teachers/` lies beside the experiments, because teachers are shared by them.
"""

import contextlib
import errno
import importlib.metadata
import json
import math
import os
import platform
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

from tfkd_ray.schema import ConfigError, dump_yaml, read_yaml

VERSION = 1
"""Of this layout; raised when a reader must know the difference."""
DIRECTIONS: dict[str, Literal["max", "min"]] = {
    "val_accuracy": "max",
    "val_nll": "min",
    "val_ece": "min",
    "parameters": "min",
}
"""Of what a search may make good: which way is better."""


def trials_folder(experiment: Path) -> Path:
    """Where the trials' folders are; also Ray Tune's experiment directory."""
    return experiment / "trials"


@dataclass(frozen=True)
class Record:
    """A trial as its files tell it."""

    folder: Path
    number: int
    name: str
    objective: str
    status: str
    """running, done, stopped (early), failed, interrupted."""
    parameters: dict[str, Any]
    config: dict[str, Any]
    reason: str | None = None
    metrics: list[dict[str, float]] = field(default_factory=list)
    """One entry an epoch."""

    @property
    def last(self) -> dict[str, float]:
        """Metrics of the last epoch; empty before the first."""
        return self.metrics[-1] if self.metrics else {}


def write_experiment(experiment: Path, tree: Mapping[str, Any], argv: list[str]) -> None:
    """Write experiment.yaml: everything needed to say what was run, and to run it again."""
    seeds = {"trials": tree["seed"], "proposals": tree["search"]["seed"], "split": tree["data"]["split_seed"]}
    write_text(
        experiment / "experiment.yaml",
        dump_yaml({**about_now(argv), "seeds": seeds, "space": dict(tree)}),
        durable=True,
    )


def about_now(argv: list[str]) -> dict[str, Any]:
    """What runs here and now: layout, time, command, versions, git commit."""
    return {
        "layout": VERSION,
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": argv,
        "versions": {
            "python": platform.python_version(),
            **{p: importlib.metadata.version(p) for p in ("tfkd_ray", "ray", "torch", "optuna")},
        },
        "git_commit": _git_commit(),
    }


def read_experiment(experiment: Path) -> dict[str, Any]:
    """What experiment.yaml says, or a ConfigError if the directory is no experiment."""
    if not (experiment / "experiment.yaml").is_file():
        raise ConfigError("not an experiment: there is no experiment.yaml in it", experiment)
    about = read_yaml(experiment / "experiment.yaml")
    if about.get("layout") != VERSION:
        message = (
            f"layout {about.get('layout')!r}, and this release reads layout {VERSION}; use the release that wrote it"
        )
        raise ConfigError(message, experiment / "experiment.yaml")
    if not isinstance(about.get("space"), dict) or not isinstance(about["space"].get("search"), dict):
        raise ConfigError("has no 'space:' with a 'search:' in it; it was changed by hand, or cut", experiment)
    return about


def read_records(experiment: Path) -> list[Record]:
    """All trials, by number; a line that is only half there yet is left out."""
    return [read_record(path.parent) for path in sorted(trials_folder(experiment).glob("*/trial.json"))]


def read_record(folder: Path) -> Record:
    """One trial."""
    about = json.loads((folder / "trial.json").read_text())
    return Record(folder=folder, metrics=read_metrics(folder), **about)


def write_record(record: Record) -> None:
    """Write trial.json, whole."""
    about = {k: v for k, v in record.__dict__.items() if k not in ("folder", "metrics")}
    write_text(record.folder / "trial.json", json.dumps(about, indent=1) + "\n", durable=True)


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """The whole lines of metrics.jsonl."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return []
    text = path.read_text()
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def read_teachers(storage: Path) -> list[dict[str, Any]]:
    """What teacher.json says of every finished teacher under a storage directory, by name."""
    return [json.loads(path.read_text()) for path in sorted((storage / "teachers").glob("*/teacher.json"))]


def write_text(path: Path, text: str, *, durable: bool = False) -> None:
    """Write a text file so that a reader sees the old one or the new one; `durable`: also after a power cut."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.new")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


DISK_ERRORS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE, errno.ENODEV, errno.ENOTCONN, errno.ETIMEDOUT)
}
"""What the system says of a disk that is full, read-only or gone: no fault of who wants to write."""


def check_room_for(folder: Path, size: int) -> None:
    """Raise the system's own OSError where `size` more bytes cannot be written to a folder, there already or not."""
    there = next(p for p in (folder, *folder.parents) if p.exists())
    with tempfile.TemporaryFile(dir=there) as file:
        for _ in range(0, size, 2**20):
            file.write(bytes(2**20))
        file.flush()


def check_new(experiment: Path) -> None:
    """Raise where an experiment of this name is there already, or cannot be made there."""
    if experiment.exists() and not is_begun(experiment):
        message = f"experiment {experiment.name!r} exists already; choose another name, or go on with it: tfkd resume"
        raise ConfigError(f"{message} {experiment}", experiment.parent)
    check_writable(experiment.parent, "--storage DIR")


_BEGINNING = {"driver.lock", "driver.txt", "study.journal", "study.journal.lock", ".experiment.yaml.new"}


def is_begun(experiment: Path) -> bool:
    """Whether a directory is what a driver has left that was killed before it had written experiment.yaml."""
    names = {p.name for p in experiment.iterdir()} if experiment.is_dir() else set()
    return "driver.lock" in names and names <= _BEGINNING


def check_writable(folder: Path, option: str) -> None:
    """Raise where a folder, or the nearest above it that is there, cannot be written to; `option` names the way out."""
    there = next(p for p in (folder, *folder.parents) if p.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        message = f"{there} cannot be written to ({error.strerror}); choose another place: {option}"
        raise ConfigError(message, folder) from None


def best(records: list[Record], metric: str, mode: str) -> Record | None:
    """The best of the full-length trials; of equals, the first."""
    sign = 1 if mode == "max" else -1
    full = [r for r in records if r.status == "done"]
    return max(full, key=lambda r: (sign * r.last[metric], -r.number), default=None)


class _Judged(Protocol):
    """The part of an `experiment.Record` that a front needs."""

    @property
    def status(self) -> str: ...
    @property
    def last(self) -> dict[str, float]: ...
    @property
    def number(self) -> int: ...


_J = TypeVar("_J", bound=_Judged)


def pareto(records: Iterable[_J], metrics: Sequence[str]) -> list[_J]:
    """The full-length trials that no other beats: none is at least as good in every metric and better in one.

    Best in the first metric first; of equals all are in, the first of them first.
    """
    signs = [1 if DIRECTIONS[m] == "max" else -1 for m in metrics]

    def values(record: _J) -> tuple[float, ...]:
        return tuple(sign * record.last.get(m, math.nan) for sign, m in zip(signs, metrics, strict=True))

    full = [(values(r), r) for r in records if r.status == "done"]
    full = [(v, r) for v, r in full if all(math.isfinite(x) for x in v)]
    front = [
        (v, r) for v, r in full if not any(w != v and all(b >= a for a, b in zip(v, w, strict=True)) for w, _ in full)
    ]
    return [r for _, r in sorted(front, key=lambda entry: (tuple(-x for x in entry[0]), entry[1].number))]


@contextlib.contextmanager
def ctrl_c_waits() -> Iterator[None]:
    """Let Ctrl-C take effect afterwards: a Ray that is half started crashes and leaves processes behind, and an import
    may swallow it."""
    pressed: list[int] = []
    if threading.current_thread() is not threading.main_thread() or not callable(signal.getsignal(signal.SIGINT)):
        yield
        return
    before = signal.signal(signal.SIGINT, lambda number, frame: pressed.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed:
        signal.raise_signal(signal.SIGINT)


def _git_commit() -> str | None:
    """Commit of the repository in the current directory, with '+' where files differ from it; None outside of one."""
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=True)
        changes = subprocess.run(
            ["git", "status", "--porcelain"], capture_output=True, text=True, timeout=5, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return commit.stdout.strip() + ("+" if changes.stdout.strip() else "")
