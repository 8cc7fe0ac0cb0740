"""Utilisation of 20 to 1,000 claimed GPUs by a sweep, and its driver's cost.

    python benchmarks/slots.py [--slots 1000] [--epoch-s 20] [--epochs 2] [--rounds 2] [--each]

One node claims these CPUs and GPUs, and a sweep of one-GPU trials runs on it: search, stopping,
records, TensorBoard, Tune's controller and a real placement group for each trial. Only the trials'
processes are replaced, since a thousand do not fit on one machine: four real actors answer for all
of them, with real messages, and an epoch is a sleep. So the benchmark measures the driver and Ray's
scheduling, without the start of processes. A message brings several epochs, as those of trials do;
with `--each` one.

Utilisation is the share of a window's slot-seconds in which a stand-in trains an epoch.
"""

import argparse
import asyncio
import itertools
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import ray
from ray import tune
from ray.air.execution.resources.placement_group import PlacementGroupAcquiredResources

import tfkd_ray.run.tune as ours
from tfkd_ray.show.listener import OwnCallback
from tfkd_ray.space.space import Space, build_space

HOSTS = 4
WINDOW_S = 10
RESULT = {"val_accuracy": 0.5, "val_nll": 1.0, "val_ece": 0.1, "train_loss": 1.0}


@ray.remote(num_cpus=0, max_concurrency=1000)
class Host:
    """Answers for many trials."""

    def __init__(self, epoch_s: float, epochs: int) -> None:
        self.epoch_s, self.epochs = epoch_s, epochs
        self.done: dict[int, int] = {}

    async def call(self, key: int, method: str, *limits: float) -> Any:
        """Return what the method of a trial's process would return."""
        if method == "reset":
            self.done[key] = 0
            return True
        if method == "train":
            return await self.epoch(key)
        if method != "train_buffered":
            return None
        results: list[dict[str, Any]] = []
        until = time.monotonic() + min(limits)
        while True:
            results.append(await self.epoch(key))
            last = results[-1]
            if last["done"] or last["epoch"] == 1 or time.monotonic() >= until:
                return results

    async def epoch(self, key: int) -> dict[str, Any]:
        """Return the result of an epoch."""
        await asyncio.sleep(self.epoch_s)
        epoch = self.done[key] = self.done.get(key, 0) + 1
        return {
            **RESULT,
            "epoch": epoch,
            "training_iteration": epoch,
            "seconds": self.epoch_s,
            "ended": time.monotonic(),
            "time_total_s": 0.0,
            "time_this_iter_s": self.epoch_s,
            "pid": 0,
            "node_ip": "",
            "done": epoch == self.epochs,
        }


class StandIn:
    """Replaces the handle of a trial's process."""

    def __init__(self, key: int, host: Any) -> None:
        self._key, self._host = key, host

    def __getattr__(self, method: str) -> Any:
        return Method(lambda *limits: self._host.call.remote(self._key, method, *limits))


class Method:
    """Replaces a method of such a handle, or of the class that creates one."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def remote(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args)


class Clock(OwnCallback):
    """Records when epochs end, and the driver's CPU time and memory after each window."""

    def __init__(self) -> None:
        super().__init__()
        self.begun = time.monotonic()
        self.epochs: list[float] = []
        self.windows: list[tuple[float, float, float, int]] = []
        self.running: set[str] = set()
        self.full = 0.0
        self.slots = 0

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        now = time.monotonic() - self.begun
        if now >= (len(self.windows) + 1) * WINDOW_S:
            self.windows.append((now, time.process_time(), memory_mb(), len(self.epochs)))

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.running.add(trial.trial_id)
        if len(self.running) == self.slots and not self.full:
            self.full = time.monotonic() - self.begun

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: Any, **info: Any
    ) -> None:
        self.epochs.append(result["ended"] - self.begun)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.running.discard(trial.trial_id)

    def __getstate__(self) -> dict[str, Any]:
        return {}


def memory_mb() -> float:
    """Return the resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def space_of(trials: int, epochs: int) -> Space:
    search = {"num_samples": trials, "sampler": "random", "stopping": "none", "warm_start": False}
    tree = {
        "student": {"name": "mlp", "hidden": [8]},
        "objective": "ce",
        "epochs": epochs,
        "gpus_per_worker": 1,
    }
    return build_space(
        {**tree, "optim": {"lr": {"low": 0.01, "high": 0.5, "log": True}}, "search": search}
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--slots", type=int, default=1000)
    parser.add_argument("--epoch-s", type=float, default=20)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2, help="trials for each slot")
    parser.add_argument("--each", action="store_true", help="a message for each epoch")
    args = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    none = {"prestart_worker_first_driver": False}  # else Ray starts a process for each claimed CPU
    ray.init(address="local", num_cpus=args.slots, num_gpus=args.slots, include_dashboard=False, log_to_driver=False,
             logging_level="ERROR", object_store_memory=150 * 2**20, _system_config=none)  # fmt: skip
    hosts = itertools.cycle([Host.remote(args.epoch_s, args.epochs) for _ in range(HOSTS)])
    keys = itertools.count()
    ours.check_gpus = lambda: None  # these GPUs exist only for Ray
    new = Method(lambda *given: StandIn(next(keys), next(hosts)))
    PlacementGroupAcquiredResources.annotate_remote_entities = lambda self, entities: [
        new for _ in entities
    ]
    kill = ray.kill
    ray.kill = lambda actor, **options: (
        None if isinstance(actor, StandIn) else kill(actor, **options)
    )
    clock = Clock()
    clock.slots = args.slots
    before, cpu = memory_mb(), time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        trials = args.slots * args.rounds
        callbacks = [clock, tune.Callback()] if args.each else [clock]
        tuner = ours.build_tuner(
            space_of(trials, args.epochs), name="e", storage=folder, callbacks=callbacks
        )
        clock.begun = time.monotonic()
        tuner.fit()
    wall, cpu = time.monotonic() - clock.begun, time.process_time() - cpu
    done = len(clock.epochs)
    print(
        f"{args.slots} slots, {trials} trials of {args.epochs} epochs of {args.epoch_s:g} s: {wall:.0f} s"
    )
    print(f"all slots in use after {clock.full:.1f} s; {done} results; driver {cpu:.0f} s of CPU, "
          f"{1000 * cpu / done:.1f} ms a result, memory {before:.0f} to {memory_mb():.0f} MB")  # fmt: skip
    print("| to second | slots in use | driver's CPU | driver's memory |\n|---|---|---|---|")
    last, last_cpu = 0.0, clock.windows[0][1] if clock.windows else 0.0
    for now, used, held, _ in clock.windows:
        busy = sum(max(0.0, min(now, end) - max(last, end - args.epoch_s)) for end in clock.epochs)
        share = busy / ((now - last) * args.slots)
        print(
            f"| {now:.0f} | {share:.0%} | {(used - last_cpu) / (now - last):.0%} | {held:.0f} MB |"
        )
        last, last_cpu = now, used
    ray.shutdown()


if __name__ == "__main__":
    main()
