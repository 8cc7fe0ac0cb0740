"""Driver time per trial, and memory, for 100 to 100,000 trials without training.

    python benchmarks/scale.py direct [--sampler random|tpe] [--trials 10000]      our part, called as Tune calls it
    python benchmarks/scale.py direct --trials 100000 --filled 99000               the first ones written at once
    python benchmarks/scale.py direct --trials 200 --epochs 51 [--stopping halving]    what a report costs
    python benchmarks/scale.py ray [--trials 1000] [--at-once 4] [--sampler random]    a whole sweep, through Ray
    python benchmarks/scale.py plain [--trials 1000] [--at-once 4]                     Ray Tune alone, for comparison

`direct` drives searcher, stopping rule and callbacks (records, TensorBoard, budget) without Ray:
proposal, start, results, end. Printed are the driver's CPU time per trial over the last tenth of
the trials (CPU time, so that other jobs on the machine matter little) and its peak memory. One
objective, one epoch. Then the experiment is opened again as `tfkd resume` does, without Ray, and
`tfkd status` and `tfkd report` run in processes of their own. With `--filled`, the files of the first
trials are written by this script, in the form that the driver writes, at random points. With one
trial at a time, Ray's controller searches all trials whenever none is alive; with several, it need
not.
"""

import argparse
import gc
import json
import math
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import ray
from ray import tune

import tfkd_ray.run.tune as ours
from tfkd_ray.run.callbacks import Budget, Lock, Losses, Recorder
from tfkd_ray.run.searcher import OptunaSearcher, StudyStopping
from tfkd_ray.show.listener import Announcer
from tfkd_ray.show.tensorboard import TensorBoard
from tfkd_ray.space.space import Space, build_space
from tfkd_ray.store.ended import note_end, read_briefs
from tfkd_ray.store.experiment import (
    Record,
    read_record,
    trials_folder,
    write_experiment,
)
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


def space_of(trials: int, sampler: str, epochs: int = 1, stopping: str = "none") -> Space:
    lr, decay = {"low": 0.01, "high": 0.5, "log": True}, {"low": 1e-5, "high": 1e-2, "log": True}
    search = {
        "num_samples": trials,
        "sampler": sampler,
        "stopping": stopping,
        "max_concurrent": AT_ONCE,
        "warm_start": False,
    }
    tree = {"student": {"name": "mlp", "hidden": [8]}, "objective": "ce", "epochs": epochs}
    return build_space({**tree, "optim": {"lr": lr, "weight_decay": decay}, "search": search})


def value_of(lr: float, epoch: int = 1) -> float:
    """Return an accuracy that is best at a learning rate of 0.1."""
    return round(0.9 - abs(math.log10(lr / 0.1)) / 10 - 0.1 / epoch, 6)


class Clock(tune.Callback):  # type: ignore[misc]
    """Records the driver's processor time at the end of every trial."""

    def __init__(self) -> None:
        self.cpu, self.wall = [time.process_time()], [time.perf_counter()]

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.cpu.append(time.process_time())
        self.wall.append(time.perf_counter())

    def __getstate__(self) -> dict[str, Any]:
        return {}


class Driver:
    """This package's part of a sweep, called in Tune's order."""

    def __init__(self, space: Space, experiment: Path) -> None:
        self.space, self.experiment = space, experiment
        place = Directory(experiment.parent).wire()
        folder = trials_folder(experiment)
        self.searcher = OptunaSearcher(
            space, experiment / "study.journal", folder=folder, place=place
        )
        self.stopping = StudyStopping(self.searcher)
        budget, losses = Budget(experiment, space, self.searcher), Losses()
        tensorboard = TensorBoard(experiment / "tb", space)
        self.told = Announcer([tensorboard, budget, losses, Recorder(losses, budget)])
        self.told.setup()
        self.stopping.on_trial_add(None, None)

    def trial(self, n: int) -> None:
        """Run a trial."""
        config = self.searcher.suggest(f"id{n}")
        assert isinstance(config, dict), f"{config=}"
        trial: Any = SimpleNamespace(
            trial_id=f"id{n}",
            config=config,
            last_result={},
            status="RUNNING",
            experiment_tag="",
            evaluated_params={},
            max_failures=3,
            num_failures=0,
        )
        self.told.on_trial_start(0, [], trial)
        for epoch in range(1, self.space.epochs + 1):
            value = value_of(config["optim"]["lr"], epoch)
            result = {**RESULT, "epoch": epoch, "val_accuracy": value, "training_iteration": epoch}
            stops = self.stopping.on_trial_result(None, trial, result) == "STOP"
            result["done"] = stops or epoch == self.space.epochs
            if not stops:
                self.searcher.on_trial_result(trial.trial_id, result)
            self.told.on_trial_result(0, [], trial, result)
            trial.last_result = result
            if stops:
                break
        self.searcher.on_trial_complete(trial.trial_id, trial.last_result)
        self.told.on_trial_complete(0, [], trial)


def direct(args: argparse.Namespace, folder: Path) -> Clock:
    """Run this package's part of a sweep."""
    space = space_of(args.trials, args.sampler, args.epochs, args.stopping)
    experiment, clock = folder / "e", Clock()
    write_experiment(experiment, space.tree, [])
    if args.filled:
        fill(space, experiment, args.filled)
    driver = Driver(space, experiment)
    clock.cpu, clock.wall = [time.process_time()], [time.perf_counter()]
    for n in range(args.filled, args.trials):
        driver.trial(n)
        clock.on_trial_complete(0, [], None)
    if args.epochs > 1:
        took = 1000 * (clock.cpu[-1] - clock.cpu[0]) / (args.trials - args.filled) / args.epochs
        print(f"{took:.3f} ms of CPU an epoch, start and end of the trial included")
    driver.told.on_experiment_end([])
    print(f"memory of this process before it opens the experiment again: {peak_mib():.0f} MiB")
    del driver
    print("\n".join(reopened(space, experiment)))
    return clock


def peak_mib() -> float:
    """Return the most memory that this process had, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def fill(space: Space, experiment: Path, trials: int) -> None:
    """Write the files of a sweep's first trials, in the form that the driver writes."""
    journal, draw = experiment / "study.journal", random.Random(0)
    Driver(space, experiment).trial(0)
    (name,) = (folder.name for folder in trials_folder(experiment).iterdir())
    lines = journal.read_text().splitlines()
    at = next(k for k, line in enumerate(lines) if f'"name":"{name}"' in line)
    head, created, rest = lines[:at], json.loads(lines[at]), list(map(json.loads, lines[at + 1 :]))
    files = {p.name: p.read_bytes() for p in (experiment / "tb" / name).iterdir()}
    record = read_record(trials_folder(experiment) / name)
    with journal.open("w") as out:
        out.writelines(line + "\n" for line in head)
        for n in range(trials):
            params = {"optim.lr": 10 ** draw.uniform(-2, -0.31), "optim.weight_decay": 1e-3}
            last = {**record.last, "val_accuracy": value_of(params["optim.lr"])}
            there = record.folder.with_name(f"t{n:04d}-ce")
            about = {"number": n, "name": there.name}
            for log in ({**created, "params": params, "user_attrs": about}, *rest):
                told = dict(log)
                told |= {"trial_id": n} if "trial_id" in log else {}
                value = last["val_accuracy"]
                told |= {"values": [value]} if log.get("values") else {}
                told |= {"intermediate_value": value} if "step" in log else {}
                out.write(json.dumps(told, separators=(",", ":")) + "\n")
            parameters = dict(params)
            one = replace(record, folder=there, **about, parameters=parameters, metrics=[])
            fill_folders(one, last, files if n else {})


def fill_folders(record: Record, last: dict[str, float], files: dict[str, bytes]) -> None:
    """Write the folders of a trial that has ended."""
    record.folder.mkdir(exist_ok=True)
    left_out = ("folder", "metrics", "further", "seed_of", "seeds")
    told = {k: v for k, v in vars(record).items() if k not in left_out}
    (record.folder / "trial.json").write_text(json.dumps(told, indent=1) + "\n")
    (record.folder / "metrics.jsonl").write_text(json.dumps(last) + "\n")
    if files:
        (record.folder / "result.json").symlink_to("metrics.jsonl")
        note_end(record, last, ["val_accuracy"])
    events = record.folder.parent.parent / "tb" / record.name
    events.mkdir(exist_ok=True)
    for name, content in files.items():
        (events / name).write_bytes(content)


def reopened(space: Space, experiment: Path) -> Iterator[str]:
    """Yield what it takes to open an experiment again, to ask for its status, and to report on it."""
    gc.collect()
    began = time.process_time()
    lock = Lock(Directory(experiment.parent), experiment.name)
    driver = Driver(space, experiment)
    ours._check_unchanged(space, driver.searcher)
    there, gone = read_briefs(experiment)
    ours._check_all_there(driver.searcher, experiment, there)
    left, took = driver.searcher.remaining(), time.process_time() - began
    yield f"resume, without Ray: {took:.1f} s of CPU; {left} trials left, {len(gone)} gone"
    lock.release()
    page = experiment.parent / "report.html"
    for words in (["status"], ["report", "-o", str(page)]):
        before = os.times()
        command = [sys.executable, "-m", "tfkd_ray", words[0], str(experiment), *words[1:]]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        after = os.times()
        took = sum(after[k] - before[k] for k in (2, 3))
        yield f"tfkd {words[0]}: {took:.1f} s of CPU"
    yield f"the report has {page.stat().st_size / 2**20:.1f} MiB"


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


def rows(clock: Clock, begun: int, trials: int) -> Iterator[str]:
    """Yield milliseconds a trial over the last tenth, and at most 1,000, up to several numbers."""
    for upto in sorted({n for n in (100, 1000, 5000, 20_000, 100_000, trials) if n <= trials}):
        first = max(upto - min(1000, max(50, upto // 10)), begun)
        if first < upto:
            last, k = upto - begun, first - begun
            cpu, wall = (1000 * (t[last] - t[k]) / (upto - first) for t in (clock.cpu, clock.wall))
            yield f"| {upto:,} | {cpu:.2f} | {wall:.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("how", choices=["direct", "ray", "plain"])
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--at-once", type=int, default=1)
    parser.add_argument("--filled", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--stopping", default="none")
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
    before = peak_mib()
    with tempfile.TemporaryDirectory() as folder:
        if args.how == "direct":
            clock = direct(args, Path(folder))
        else:
            run = {"ray": through_ray, "plain": plain}[args.how]
            clock = run(args.trials, args.sampler, Path(folder))
        files = {
            p.name: p.stat().st_size
            for p in Path(folder).rglob("*")
            if p.is_file() and p.name != "result.json"
        }
    print(f"{args.how}, {args.sampler}, {args.trials:,} trials, {args.at_once} at a time")
    print("| trials | driver CPU, ms a trial | wall, ms a trial |\n|---|---|---|")
    print("\n".join(rows(clock, args.filled, args.trials)))
    after = peak_mib()
    print(
        f"memory of the driver at most {after:.0f} MiB, {after - before:.0f} more than before the first trial"
    )
    large = sorted(files.items(), key=lambda f: -f[1])[:3]
    print("largest files: " + ", ".join(f"{name} {size / 2**20:.1f} MiB" for name, size in large))


if __name__ == "__main__":
    main()
