"""Driver time per trial, and memory, for 100 to 10,000 trials without training.

    python benchmarks/scale.py direct [--sampler random|tpe] [--trials 10000]      our part, called as Tune calls it
    python benchmarks/scale.py ray [--trials 1000] [--at-once 4] [--sampler random]    a whole sweep, through Ray
    python benchmarks/scale.py plain [--trials 1000] [--at-once 4]                     Ray Tune alone, for comparison

`direct` drives searcher, stopping rule and callbacks (records, TensorBoard, budget) without Ray:
proposal, start, one result, end. Printed are the driver's CPU time per trial over the last tenth of
the trials (CPU time, so that other jobs on the machine matter little) and its peak memory. One
objective, no early stopping, one epoch. With one trial at a time, Ray's controller searches all
trials whenever none is alive; with several, it need not.
"""

import argparse
import gc
import os
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import ray
from ray import tune

import tfkd_ray.run.tune as ours
from tfkd_ray.run.callbacks import Budget, Losses, Recorder
from tfkd_ray.run.searcher import OptunaSearcher, StudyStopping
from tfkd_ray.show.listener import Announcer
from tfkd_ray.show.tensorboard import TensorBoard
from tfkd_ray.space.space import Space, build_space
from tfkd_ray.store.experiment import write_experiment
from tfkd_ray.store.storage import Directory

RESULT = {
    "epoch": 1,
    "val_accuracy": 0.5,
    "val_nll": 1.0,
    "val_ece": 0.1,
    "train_loss": 1.0,
    "seconds": 0.0,
}


AT_ONCE = 1
"""Number of concurrent trials, set by --at-once."""


def space_of(trials: int, sampler: str) -> Space:
    lr, decay = {"low": 0.01, "high": 0.5, "log": True}, {"low": 1e-5, "high": 1e-2, "log": True}
    search = {
        "num_samples": trials,
        "sampler": sampler,
        "stopping": "none",
        "max_concurrent": AT_ONCE,
        "warm_start": False,
    }
    tree = {"student": {"name": "mlp", "hidden": [8]}, "objective": "ce", "epochs": 1}
    return build_space({**tree, "optim": {"lr": lr, "weight_decay": decay}, "search": search})


class Clock(tune.Callback):  # type: ignore[misc]
    """Records the driver's processor time at the end of every trial."""

    def __init__(self) -> None:
        self.cpu, self.wall = [time.process_time()], [time.perf_counter()]

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.cpu.append(time.process_time())
        self.wall.append(time.perf_counter())

    def __getstate__(self) -> dict[str, Any]:
        return {}


def direct(trials: int, sampler: str, folder: Path) -> Clock:
    """Run this package's part of a sweep, in Tune's order."""
    space = space_of(trials, sampler)
    experiment = folder / "e"
    write_experiment(experiment, space.tree, [])
    searcher = OptunaSearcher(
        space, experiment / "study.journal", place=Directory(experiment.parent).wire()
    )
    stopping, budget, clock = StudyStopping(searcher), Budget(experiment, space, searcher), Clock()
    losses = Losses()
    callbacks = [
        Announcer(
            [TensorBoard(experiment / "tb", space), budget, losses, Recorder(losses, budget)]
        ),
        clock,
    ]
    for callback in callbacks:
        callback.setup()
    for n in range(trials):
        config = searcher.suggest(f"id{n}")
        about = {
            "trial_id": f"id{n}",
            "config": config,
            "last_result": {**RESULT, "done": True},
            "status": "RUNNING",
        }
        trial: Any = SimpleNamespace(
            **about, logdir=str(folder), experiment_tag="", evaluated_params={}
        )
        for callback in callbacks:
            callback.on_trial_start(0, [], trial)
        stopping.on_trial_result(None, trial, trial.last_result)
        searcher.on_trial_result(trial.trial_id, trial.last_result)
        for callback in callbacks:
            callback.on_trial_result(0, [], trial, trial.last_result)
        searcher.on_trial_complete(trial.trial_id, trial.last_result)
        for callback in callbacks:
            callback.on_trial_complete(0, [], trial)
    return clock


class Nothing(tune.Trainable):  # type: ignore[misc]
    """A trial of one epoch without training."""

    def setup(self, config: dict[str, Any]) -> None:
        pass

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        return True

    def step(self) -> dict[str, Any]:
        return {**RESULT, "done": True}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        pass


def through_ray(trials: int, sampler: str, folder: Path) -> Clock:
    """Run `build_tuner` with trials that do nothing."""
    clock = Clock()
    ours.StudentTrial = Nothing  # type: ignore[misc, assignment]
    ours.build_tuner(space_of(trials, sampler), name="e", storage=folder, callbacks=[clock]).fit()
    return clock


def plain(trials: int, sampler: str, folder: Path) -> Clock:
    """Run Ray Tune alone: its own random search, no callbacks but the clock."""
    clock = Clock()
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    tune.Tuner(
        tune.with_resources(Nothing, {"cpu": 1}),
        param_space={"lr": tune.loguniform(0.01, 0.5), "weight_decay": tune.loguniform(1e-5, 1e-2)},
        tune_config=tune.TuneConfig(
            num_samples=trials, max_concurrent_trials=AT_ONCE, reuse_actors=True
        ),
        run_config=tune.RunConfig(storage_path=str(folder), name="e", callbacks=[clock], verbose=0),
    ).fit()
    return clock


def rows(clock: Clock, trials: int) -> Iterator[str]:
    """Yield milliseconds a trial over the last tenth of 100, 1,000 and 10,000 trials."""
    for upto in sorted({n for n in (100, 300, 1000, 3000, 10_000, trials) if 100 <= n <= trials}):
        first = upto - max(50, upto // 10)
        cpu, wall = (1000 * (t[upto] - t[first]) / (upto - first) for t in (clock.cpu, clock.wall))
        yield f"| {upto:,} | {cpu:.2f} | {wall:.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("how", choices=["direct", "ray", "plain"])
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--at-once", type=int, default=1)
    parser.add_argument("--sampler", choices=["random", "tpe"], default="random")
    args = parser.parse_args()
    global AT_ONCE
    AT_ONCE = args.at_once
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if args.how != "direct":
        ray.init(
            num_cpus=args.at_once,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
        )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    with tempfile.TemporaryDirectory() as folder:
        run = {"direct": direct, "ray": through_ray, "plain": plain}[args.how]
        clock = run(args.trials, args.sampler, Path(folder))
        files = {
            p.name: p.stat().st_size
            for p in Path(folder).rglob("*")
            if p.is_file() and p.name != "result.json"
        }
    print(f"{args.how}, {args.sampler}, {args.trials:,} trials, {args.at_once} at a time")
    print("| trials | driver CPU, ms a trial | wall, ms a trial |\n|---|---|---|")
    print("\n".join(rows(clock, args.trials)))
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    gc.collect()
    print(
        f"memory of the driver at most {after:.0f} MiB, {after - before:.0f} more than before the first trial"
    )
    large = sorted(files.items(), key=lambda f: -f[1])[:3]
    print("largest files: " + ", ".join(f"{name} {size / 2**20:.1f} MiB" for name, size in large))


if __name__ == "__main__":
    main()
