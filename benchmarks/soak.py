"""Search for leaks: sweeps of tiny trials with random faults, from one driver on one Ray.

    python benchmarks/soak.py [--minutes 30] [--seed N]

After each sweep, when its processes have ended, this samples memory, open files, processes and
shared memory of the driver and of Ray. It fails if the median of the last third of the samples
exceeds that of the first third by more than ALLOWED; the first sweep of each kind is warm-up. Every
sweep must end with its exact number of trials.
"""

import argparse
import contextlib
import logging
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import ray
from ray import tune

from tfkd_ray.run.auth import own_token
from tfkd_ray.run.connect import DRIVER
from tfkd_ray.run.tune import build_tuner, resume_tuner
from tfkd_ray.settings.yaml import dump_yaml
from tfkd_ray.store.experiment import read_records

TRIALS = 6
ALLOWED = {
    "driver's memory (MB)": (0.03, 10),
    "Ray's memory (MB)": (0.10, 60),
    "driver's open files": (0.0, 4),
    "Ray's open files": (0.05, 20),
    "processes": (0.0, 1),
    "shared memory (MB)": (0.0, 2),
    "files in /dev/shm": (0.0, 1),
}
"""Allowed growth from the first to the last third of samples: the larger of share and amount."""


OURS = (
    "ray::StudentTrial",
    "ray::ResourceTrainable",
    "ray::with_resources",
    "ray::RayTrainWorker",
    "ray::TrainController",
)
"""Titles of the processes of trials and groups."""


class Kill(tune.Callback):  # type: ignore[misc]
    """Kills the process of a trial at a random moment after a random epoch."""

    def __init__(self, dice: random.Random, times: int) -> None:
        self.dice, self.times = dice, times

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        if self.times and self.dice.random() < 0.2:
            self.times -= 1
            threading.Timer(self.dice.uniform(0, 0.1), _kill, (result["pid"],)).start()

    def __getstate__(self) -> dict[str, Any]:
        return {}


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def space(**changes: Any) -> dict[str, Any]:
    search = {
        "num_samples": TRIALS,
        "warm_start": False,
        "seed": changes.pop("seed", 0),
        **changes.pop("search", {}),
    }
    tree = {
        "student": {"name": "mlp", "hidden": [8]},
        "objective": "ce",
        "epochs": 9,
        "checkpoint_every_s": 0,
    }
    return {
        **tree,
        "optim": {"lr": {"low": 0.01, "high": 0.5, "log": True}},
        **changes,
        "search": search,
    }


def undisturbed(storage: Path, dice: random.Random) -> None:
    build_tuner(space(seed=dice.randrange(99)), name="e", storage=storage).fit()


def soft_labels(storage: Path, dice: random.Random) -> None:
    """Run a sweep with a teacher, the bank, and a killed trial."""
    teacher = {"model": {"name": "mlp", "hidden": [8]}, "epochs": 1}
    kd = space(objective={"name": "kd", "alpha": 0.5}, teacher=teacher, search={"split": False})
    build_tuner(kd, name="e", storage=storage, callbacks=[Kill(dice, 1)]).fit()


def killed_trials(storage: Path, dice: random.Random) -> None:
    build_tuner(space(epochs=27), name="e", storage=storage, callbacks=[Kill(dice, 2)]).fit()


def failing_trials(storage: Path, dice: random.Random) -> None:
    rates = {"choices": [0.1, 0.01, 1e20]}
    build_tuner(
        space(optim={"lr": rates}, search={"sampler": "random"}), name="e", storage=storage
    ).fit()


def budget(storage: Path, dice: random.Random) -> None:
    """Run a sweep that a budget stops, and resume it."""
    build_tuner(space(search={"cpu_hours": 1e-9}), name="e", storage=storage).fit()
    resume_tuner(storage / "e", cpu_hours=9).fit()


def killed_driver(storage: Path, dice: random.Random) -> None:
    (storage / "space.yaml").write_text(dump_yaml(space(epochs=81)))
    command = [
        sys.executable,
        "-m",
        "tfkd_ray",
        "tune",
        "space.yaml",
        "--name",
        "e",
        "--storage",
        ".",
    ]
    with subprocess.Popen(
        command, cwd=storage, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    ) as driver:
        while driver.poll() is None and not list(storage.glob("e/trials/*/metrics.jsonl")):
            time.sleep(0.05)
        time.sleep(dice.uniform(0, 2))
        driver.kill()
    resume_tuner(storage / "e").fit()


def two_workers(storage: Path, dice: random.Random) -> None:
    """Run trials of two workers, and kill one worker process."""
    both = space(workers=2, optim={"lr": {"low": 0.01, "high": 0.5, "log": True}, "batch_size": 64})
    build_tuner(both, name="e", storage=storage, callbacks=[Kill(dice, 1)]).fit()


FAULTS: list[Callable[[Path, random.Random], None]] = [
    *(undisturbed, soft_labels, killed_trials, failing_trials, budget, killed_driver, two_workers)
]


def what(process: psutil.Process) -> str:
    """Return a process's program, without its arguments."""
    command = process.cmdline()
    scripts = [Path(part).name for part in command[1:] if part.endswith(".py")]
    return scripts[0] if scripts else Path(command[0].split(" ")[0]).name if command else "?"


def sample(before: set[str], files: Counter[str]) -> dict[str, float]:
    """Measure the driver and Ray's processes now, without idle workers, which are Ray's cache.

    `files` receives the open files of each program.
    """
    driver = psutil.Process()
    found: Counter[str] = Counter()
    found["driver's memory (MB)"] = driver.memory_full_info().uss // 2**20
    for process in [driver, *driver.children(recursive=True)]:
        with contextlib.suppress(psutil.Error, FileNotFoundError, ProcessLookupError):
            if " ".join(process.cmdline()).startswith("ray::IDLE"):
                continue
            found["processes"] += 1
            files[what(process)] += (opened := process.num_fds())
            found["driver's open files" if process == driver else "Ray's open files"] += opened
            if process != driver:
                found["Ray's memory (MB)"] += process.memory_full_info().uss // 2**20
            status = dict(
                line.split(":", 1)
                for line in Path(f"/proc/{process.pid}/status").read_text().splitlines()
            )
            found["shared memory (MB)"] += (
                int(status.get("RssShmem", "0").split()[0]) // 1024
            )  # one that ends has none
    found["files in /dev/shm"] = len({p.name for p in Path("/dev/shm").iterdir()} - before)
    return {name: float(found[name]) for name in ALLOWED}


def titles() -> list[str]:
    """Return the command lines of Ray's processes."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            found.append(" ".join(process.cmdline()))
    return found


def quiet(cpus: int) -> None:
    """Wait until trials and groups have ended; exit if they stay."""
    until = time.monotonic() + 60
    left: list[str] = []
    while ray.available_resources().get("CPU") != cpus or (
        left := [t for t in titles() if t.startswith(OURS)]
    ):
        if time.monotonic() > until:
            raise SystemExit(f"soak: after a minute something of a sweep is left: {left}")
        time.sleep(0.2)


def judge(samples: list[dict[str, float]]) -> bool:
    """Print the table; return True if nothing has grown."""
    third = len(samples) // 3
    good = True
    print(f"\n{'':<24} {'first third':>12} {'last third':>12} {'most':>8}")
    for name, (share, amount) in ALLOWED.items():
        values = [s[name] for s in samples]
        first, last = statistics.median(values[:third]), statistics.median(values[-third:])
        grew = last - first > max(share * first, amount)
        good = good and not grew
        print(
            f"{name:<24} {first:>12.0f} {last:>12.0f} {max(values):>8.0f}{'   GREW' if grew else ''}"
        )
    return good


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Sweeps with random faults in a loop; fails if something grows."
    )
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=time.time_ns() % 2**32)
    args = parser.parse_args()
    print(f"soak: {args.minutes:g} minutes, --seed {args.seed}", flush=True)
    dice, samples, ran = random.Random(args.seed), list[dict[str, float]](), Counter[str]()
    opened: list[Counter[str]] = []
    os.environ.pop("RAY_ADDRESS", None)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    before = {p.name for p in Path("/dev/shm").iterdir()}
    own_token()
    ray.init(
        address="local", num_cpus=2, resources={DRIVER: 1000}, include_dashboard=True, log_to_driver=False,
        logging_level="ERROR", object_store_memory=150 * 2**20,
    )  # fmt: skip
    for noisy in ("ray", "ray.tune", "ray.train"):  # it logs every fault
        logging.getLogger(noisy).setLevel(logging.CRITICAL)
    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address  # for the killed drivers
    start = time.monotonic()
    pending: list[Callable[[Path, random.Random], None]] = []
    while (passed := time.monotonic() - start) < 60 * args.minutes:
        if not pending:  # each once, in a new order
            pending = dice.sample(FAULTS, len(FAULTS))
        fault = pending.pop()
        storage = Path(tempfile.mkdtemp(prefix="tfkd-soak-"))
        fault(storage, dice)
        numbers = [r.number for r in read_records(storage / "e") if r.status != "running"]
        if numbers != list(range(TRIALS)):
            print(f"soak: {fault.__name__}: trials {numbers} of {TRIALS}; see {storage}")
            return 1
        shutil.rmtree(storage)
        quiet(2)
        ran[fault.__name__] += 1
        opened.append(Counter())
        found = sample(before, opened[-1])
        print(f"{passed:6.0f} s  {fault.__name__:<15} {list(found.values())}", flush=True)
        if ran.total() > len(FAULTS):  # Ray's state after the first of each is no growth
            samples.append(found)
    print(
        f"\n{ran.total()} sweeps of {TRIALS} trials: {', '.join(f'{n} {name}' for name, n in ran.most_common())}"
    )
    if len(samples) < 6:
        print("soak: too short to say anything; give it more --minutes")
        return 1
    good = judge(samples)
    grown = {name: opened[-1][name] - opened[len(FAULTS)][name] for name in opened[-1]}
    print(
        "open files, last less first: "
        + ", ".join(f"{name} {n:+}" for name, n in grown.items() if n)
    )
    ray.shutdown()
    print("\nsoak: " + ("nothing grows" if good else "something grows"))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
