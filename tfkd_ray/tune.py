"""A sweep: space, teachers, search and stopping put together as a `ray.tune.Tuner`."""

import dataclasses
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import optuna
import ray
from filelock import FileLock, Timeout
from ray import tune

from tfkd_ray import teachers
from tfkd_ray.cluster import check_room, connect
from tfkd_ray.config import TeacherRun, TrainConfig
from tfkd_ray.data import seal_test_split
from tfkd_ray.experiment import (
    Record,
    check_new,
    check_writable,
    read_experiment,
    read_metrics,
    trials_folder,
    write_experiment,
    write_record,
    write_text,
)
from tfkd_ray.models import Own, Timm
from tfkd_ray.schema import ConfigError, dump_yaml
from tfkd_ray.search import OptunaSearcher, StudyStopping
from tfkd_ray.space import Space, build_space, load_space
from tfkd_ray.tensorboard import TensorBoard
from tfkd_ray.trial import StudentTrial, resources_of

STORAGE = Path("tfkd_results")
"""Where experiments and teachers go if nothing is said, below the current directory."""


def build_tuner(
    space: Space | dict[str, Any] | Path | str,
    *,
    name: str | None = None,
    storage: Path | str = STORAGE,
    callbacks: Sequence[tune.Callback] = (),
    tune_config: tune.TuneConfig | None = None,
    run_config: tune.RunConfig | None = None,
    on_teacher: Callable[[TeacherRun, dict[str, Any] | None], None] | None = None,
) -> tune.Tuner:
    """A `ray.tune.Tuner` that runs a space; `.fit()` returns Ray's own `ResultGrid`.

    Connects to Ray if nothing is connected yet, makes the experiment's directory, and trains the teachers that are
    missing, once, before it returns. Wrong input is a ConfigError, raised before anything is written.

    Args:
        space: a `Space`, the tree of one, or the path of a space file.
        name: of the experiment, a directory below `storage` that is not there yet. None: the file's name and the time.
        storage: directory that all nodes see; teachers are shared by the experiments in it.
        callbacks: Tune callbacks beside ours, for example of MLflow or W&B.
        tune_config: Ray's own; what it sets goes before the space's `search`. Searcher and number of trials are ours.
        run_config: Ray's own; its `name` and `storage_path` stand for `name` and `storage`.
        on_teacher: called with a teacher's run before it is trained (None) and after (what teacher.json says).
    """
    space, stem = _as_space(space)
    run_config = run_config or tune.RunConfig()
    tune_config = tune_config or tune.TuneConfig()
    _check_ray_configs(tune_config, run_config)
    if run_config.storage_path != tune.RunConfig().storage_path:  # Ray's default is no wish of the user's
        storage = run_config.storage_path
    if "://" in str(storage):
        raise ConfigError(f"needs a directory that all nodes see (NFS, for example), got {storage}", "storage")
    storage = Path(storage).expanduser().absolute()
    name = run_config.name or name or f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    experiment = storage / name
    check_new(experiment)
    prepare(space.example)
    train_teachers(space.teacher_runs(), storage, on_teacher)
    experiment.mkdir(parents=True)
    write_experiment(experiment, space.tree, sys.argv)
    return _tuner(space, experiment, Lock(experiment), callbacks, tune_config, run_config)


def resume_tuner(
    experiment: Path | str,
    *,
    add_trials: int = 0,
    callbacks: Sequence[tune.Callback] = (),
    on_teacher: Callable[[TeacherRun, dict[str, Any] | None], None] | None = None,
) -> tune.Tuner:
    """A Tuner that goes on with an experiment: unfinished trials first, from their last checkpoint, then new ones.

    What is finished is in the study, and is not run again; Ray's own snapshot is not read.
    """
    experiment = Path(experiment).expanduser().absolute()
    about = read_experiment(experiment)
    check_writable(experiment, "an experiment directory of yours")
    lock = Lock(experiment)
    about["space"]["search"]["num_samples"] += add_trials
    space = build_space(about["space"], experiment / "experiment.yaml")
    prepare(space.example)
    if add_trials:
        write_text(experiment / "experiment.yaml", dump_yaml(about))
    train_teachers(space.teacher_runs(), experiment.parent, on_teacher)
    return _tuner(space, experiment, lock, callbacks, tune.TuneConfig(), tune.RunConfig())


def prepare(config: TrainConfig) -> None:
    """Refuse missing data, connect to Ray, and refuse what its cluster can never run, before a directory is made."""
    config.data.check()
    for network in (config.student, config.teacher and config.teacher.model):
        if isinstance(network, Own | Timm):  # not ours: whether it can be built is found out here
            network.build(config.data.shape, config.data.num_classes)
    connect(workers=config.workers)
    check_room(config)


class TeacherFailed(RuntimeError):
    """A teacher that a sweep needs could not be trained; the sweep has not begun."""


def train_teachers(
    runs: Iterable[TeacherRun],
    storage: Path,
    on_teacher: Callable[[TeacherRun, dict[str, Any] | None], None] | None = None,
) -> None:
    """Train the teachers that are not there, as Ray tasks side by side, each on one worker's resources.

    If one fails the others are left to finish: they are kept, and `ray.cancel` of a task that just ended can end the
    driver (Ray 2.60).
    """
    on_teacher = on_teacher or (lambda run, about: None)
    missing = [run for run in runs if not teachers.is_trained(run, storage)]
    tasks = []
    for run in missing:
        on_teacher(run, None)
        task = ray.remote(_teacher).options(num_cpus=run.cpus_per_worker, num_gpus=run.gpus_per_worker, max_retries=2)
        tasks.append(task.remote(run, storage))
    for run, task in zip(missing, tasks, strict=True):
        try:
            on_teacher(run, ray.get(task))
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, ConfigError):
                raise error.cause from None
            name = teachers.teacher_name(run)
            raise TeacherFailed(f"teacher {name}: {type(error.cause).__name__}: {error.cause}") from None


def _teacher(run: TeacherRun, storage: Path) -> dict[str, Any]:
    seal_test_split()
    return teachers.train_teacher(run, storage)


def _as_space(space: Space | dict[str, Any] | Path | str) -> tuple[Space, str]:
    if isinstance(space, Space):
        return space, "sweep"
    if isinstance(space, dict):
        return build_space(space), "sweep"
    return load_space(Path(space)), Path(space).stem


def _check_ray_configs(tune_config: tune.TuneConfig, run_config: tune.RunConfig) -> None:
    """Refuse what would be ignored: settings of Ray's that a space, or a trial, has its own word on."""
    problems = []
    if tune_config.search_alg is not None:
        problems.append(
            "tune_config.search_alg: build_tuner brings its own searcher; to use another, give StudentTrial to a Tuner "
            "of your own"
        )
    if tune_config.num_samples != tune.TuneConfig().num_samples:
        problems.append("tune_config.num_samples: the space says how many trials; set search.num_samples there")
    if run_config.checkpoint_config not in (None, tune.CheckpointConfig()):
        problems.append("run_config.checkpoint_config: trials keep their own checkpoints; see checkpoint_every_s")
    if problems:
        raise ConfigError(problems)


def _tuner(
    space: Space,
    experiment: Path,
    lock: "Lock",
    callbacks: Sequence[tune.Callback],
    tune_config: tune.TuneConfig,
    run_config: tune.RunConfig,
) -> tune.Tuner:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    (experiment / "study.journal.lock").unlink(missing_ok=True)  # of a driver that is dead: the lock is ours
    searcher = OptunaSearcher(space, experiment / "study.journal", place=place_of(experiment))
    told = getattr(tune_config.scheduler, "metric", None) is not None  # Tune refuses to be told twice
    ours = [lock, TensorBoard(experiment / "tb", space, space.search.metric), Recorder()]
    tune_config = dataclasses.replace(
        tune_config,
        metric=None if told else tune_config.metric or space.search.metric,
        mode=None if told else tune_config.mode or space.search.mode,
        search_alg=searcher,
        scheduler=tune_config.scheduler or StudyStopping(searcher),
        num_samples=max(1, searcher.remaining()),
        max_concurrent_trials=tune_config.max_concurrent_trials or space.search.max_concurrent,
    )
    callbacks = [*ours, *callbacks, *(run_config.callbacks or [])]
    return assemble(
        space.example, experiment, tune_config, run_config, callbacks, max_failures=space.search.max_failures
    )


def place_of(experiment: Path) -> dict[str, str]:
    """Where a trial of an experiment writes, and where it finds teachers; {name} is its name."""
    return {"directory": str(trials_folder(experiment) / "{name}"), "storage": str(experiment.parent)}


def assemble(
    config: TrainConfig,
    experiment: Path,
    tune_config: tune.TuneConfig,
    run_config: tune.RunConfig,
    callbacks: Sequence[tune.Callback],
    *,
    max_failures: int,
) -> tune.Tuner:
    """A Tuner over `StudentTrial` in an experiment's directory.

    Args:
        config: says what each trial needs of the cluster.
        tune_config: with a searcher whose proposals have a `trial` section (see `OptunaSearcher`).
        callbacks: all of them.
        max_failures: times that a trial whose process was lost is started again.
    """
    os.environ.update(_TUNE_SETTINGS)
    at_once = tune_config.max_concurrent_trials
    if config.workers > 1:  # their own processes take next to nothing, so Tune would start them all
        at_once = min(at_once or sys.maxsize, check_room(config))
    return tune.Tuner(
        tune.with_resources(StudentTrial, resources_of(config)),
        tune_config=dataclasses.replace(
            tune_config,
            max_concurrent_trials=at_once,
            reuse_actors=True,
            trial_name_creator=_trial_name,
            trial_dirname_creator=_trial_name,
        ),
        run_config=dataclasses.replace(
            run_config,
            name=trials_folder(experiment).name,
            storage_path=str(experiment),
            callbacks=list(callbacks),
            failure_config=(
                run_config.failure_config
                if run_config.failure_config not in (None, tune.FailureConfig())
                else tune.FailureConfig(max_failures=max_failures)
            ),
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            verbose=0,
        ),
    )


_TUNE_SETTINGS = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # ours write less, and in one place
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # one trial without its metric is one failed trial
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
}


def _trial_name(trial: Any) -> str:
    return str(trial.config["trial"]["name"])


class Recorder(tune.Callback):  # type: ignore[misc]
    """Writes trial.json and metrics.jsonl of every trial, and the same lines for Ray's `ResultGrid` as result.json."""

    def __init__(self) -> None:
        self._seen: dict[str, int] = {}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        folder = self._folder(trial)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        metrics = read_metrics(folder)
        path.write_text("".join(json.dumps(m) + "\n" for m in metrics))  # without a line that a crash left half-written
        if not (folder / "result.json").exists():
            (folder / "result.json").symlink_to(path.name)
        self._seen[trial.trial_id] = int(metrics[-1]["epoch"]) if metrics else 0
        self._write(trial, "running")

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        epoch = result.get("epoch", 0)
        if epoch > self._seen.get(trial.trial_id, 0):
            line = {k: v for k, v in result.items() if k in _METRICS or k.startswith("val_")}
            with (self._folder(trial) / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")
            self._seen[trial.trial_id] = epoch
        if result.get("done"):  # before the study is told: a crash between repeats the end, and never loses it
            self._end(trial, result)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._end(trial, trial.last_result or {})

    def _end(self, trial: Any, result: dict[str, Any]) -> None:
        failed = result.get("failed")
        full = result.get("epoch") == trial.config["trial"]["epochs"]
        self._write(trial, "failed" if failed else "done" if full else "stopped", failed)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._write(trial, "failed", "its process was lost, and again when it was started anew")

    def on_experiment_end(self, trials: list[Any], **info: Any) -> None:
        for trial in trials:
            if trial.trial_id in self._seen and trial.status not in ("ERROR",) and not _ended(trial):
                self._write(trial, "interrupted")

    def _folder(self, trial: Any) -> Path:
        return Path(trial.config["trial"]["directory"])

    def _write(self, trial: Any, status: str, reason: str | None = None) -> None:
        about = trial.config["trial"]
        trial_config = {k: v for k, v in trial.config.items() if k != "trial"}
        write_record(
            Record(
                folder=self._folder(trial),
                number=about["number"],
                name=about["name"],
                objective=trial_config["objective"]["name"],
                status=status,
                parameters=about["parameters"],
                config=trial_config,
                reason=reason,
            )
        )


_METRICS = {"epoch", "train_loss", "train_ce", "train_kd", "lr", "seconds", "images_per_s"}


def _ended(trial: Any) -> bool:
    return bool((trial.last_result or {}).get("done"))


class Lock(tune.Callback):  # type: ignore[misc]
    """Holds the experiment while its sweep runs, so that a second driver is refused; freed by however this one ends."""

    def __init__(self, experiment: Path) -> None:
        self._experiment = experiment
        self._take()

    def _take(self) -> None:
        self._lock: FileLock | None = FileLock(self._experiment / "driver.lock", blocking=False)
        owner = self._experiment / "driver.txt"
        try:
            self._lock.acquire()
        except Timeout:
            who = owner.read_text().strip() if owner.exists() else "another process"
            raise ConfigError(f"is being run by {who}; wait for it, or stop it first", self._experiment) from None
        owner.write_text(f"process {os.getpid()} on {socket.gethostname()}\n")

    def on_experiment_end(self, trials: list[Any], **info: Any) -> None:
        self.release()

    def release(self) -> None:
        """Let others run it; done when the sweep ends."""
        if self._lock is not None:
            self._lock.release()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_lock": None}
