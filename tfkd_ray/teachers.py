"""Teachers are artifacts: named by the fingerprint of all that made them, trained once, verified when loaded.

A teacher lives in `<storage>/teachers/<network>-<fingerprint>/`: `student.safetensors` (it was a student when it was
trained) and `teacher.json`, which says how it was made and how good it is on validation.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import nn

from tfkd_ray import remote
from tfkd_ray.checkpoint import LAST, WEIGHTS, load_weights, save_weights, write_whole
from tfkd_ray.config import TeacherRun, TrainConfig
from tfkd_ray.evaluate import evaluate
from tfkd_ray.experiment import read_teacher
from tfkd_ray.loop import LOOP_VERSION, train_in
from tfkd_ray.schema import ConfigError, check_kind
from tfkd_ray.soft_labels import Bank, Elsewhere


def teacher_name(config: TeacherRun) -> str:
    """Name of the teacher that `config` (a `TrainConfig.teacher_run`) makes: network and fingerprint."""
    return f"{config.student.name}-{config.fingerprint(LOOP_VERSION)}"


def teacher_folder(config: TeacherRun, storage: Path) -> Path:
    """Where that teacher is, or will be."""
    return storage / "teachers" / teacher_name(config)


def is_trained(config: TeacherRun, storage: Path) -> bool:
    """Whether that teacher is there, complete."""
    return (teacher_folder(config, storage) / "teacher.json").exists()


def train_teacher(
    config: TeacherRun,
    storage: Path,
    on_epoch: Callable[[dict[str, float]], None] | None = None,
    on_saved: Callable[[bool], None] | None = None,
) -> dict[str, Any]:
    """Train the teacher, or take it from its file, unless it is there; returns what `teacher.json` says.

    One process at a time trains a teacher, others wait for it; one that was killed half-way goes on where it was.
    """
    folder = teacher_folder(config, storage)
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        if not is_trained(config, storage):
            taken = config.weights is not None
            metrics = _taken(config, folder) if taken else _trained(config, folder, on_epoch, on_saved)
            about = {
                "name": teacher_name(config),
                "loop_version": LOOP_VERSION,
                "torch": torch.__version__,
                "metrics": metrics,
                "sha256": _sha256(folder / WEIGHTS),
                "config": config.model_dump(mode="json"),
            }
            if config.weights is not None:
                about["source_sha256"] = _source_sha256(config)
            write_whole(folder / "teacher.json", json.dumps(about, indent=1).encode())
            for state in folder.glob("*.ckpt*"):
                state.unlink()
    check_source(config, storage)
    return describe(config, storage)


def check_source(config: TeacherRun, storage: Path) -> None:
    """Raise where the file that a teacher was taken from has changed since."""
    about, source = describe(config, storage), _source_sha256(config)
    if source is not None and about.get("source_sha256") != source:
        raise ConfigError(
            f"teacher.weights: {config.weights}: has changed since it became teacher {about['name']}; give the new "
            f"file another name, or delete {teacher_folder(config, storage)}"
        )


def _trained(
    config: TeacherRun,
    folder: Path,
    on_epoch: Callable[[dict[str, float]], None] | None,
    on_saved: Callable[[bool], None] | None,
) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for metrics in train_in(folder, config, on_saved=on_saved):
        if on_epoch:
            on_epoch(metrics)
    if config.stop_accuracy is not None and metrics["val_accuracy"] < config.stop_accuracy:
        raise ConfigError(
            f"teacher.stop_accuracy: {config.stop_accuracy:g} was not reached in {config.epochs} epochs, only "
            f"{metrics['val_accuracy']:g} after the last; lower it, or train the teacher longer"
        )
    return metrics


def _taken(config: TeacherRun, folder: Path) -> dict[str, float]:
    """Copy weights from elsewhere; their metrics on validation, if there is one."""
    from tfkd_ray.weights import load_outside

    assert config.weights is not None, f"{config.weights=}"
    data = config.data
    weights = load_outside(config.weights, config.student, data.shape, data.num_classes, data)
    save_weights(folder / WEIGHTS, weights, {"from": config.weights})
    module = config.student.build(data.shape, data.num_classes)
    module.load_state_dict(weights)
    val_set = data.load()[1]
    return {} if val_set is None else evaluate(module, data, val_set)


def _source_sha256(config: TeacherRun) -> str | None:
    """Of the file that weights come from; None where there is none, or it is not here any more."""
    path = Path(config.weights).expanduser() if config.weights else None
    return _sha256(path) if path and path.is_file() else None


def describe(config: TeacherRun, storage: Path) -> dict[str, Any]:
    """What `teacher.json` says of a trained teacher."""
    return read_teacher(teacher_folder(config, storage))


def fetch(config: TeacherRun, storage: Path, *, weights: bool = True) -> None:
    """Where a storage mirrors a store: get what there is of a teacher, with its weights, or those of a half-trained."""
    store = remote.store_of(storage)
    if store is not None:
        below = f"teachers/{teacher_name(config)}"
        remote.patiently(lambda: remote.fetch(store, below, remote.everything if weights else remote.light), store)


def upload(config: TeacherRun, storage: Path) -> None:
    """The other way, for a trained one."""
    store, folder = remote.store_of(storage), teacher_folder(config, storage)
    if store is not None:
        remote.patiently(lambda: remote.send(folder / WEIGHTS, folder / "teacher.json", folder / LAST), store)


def load_teacher(config: TeacherRun, storage: Path) -> nn.Module:
    """A trained teacher, in eval mode, its file checked against the checksum it was written with."""
    if not is_trained(config, storage):
        raise FileNotFoundError(
            f"teacher {teacher_name(config)} is not under {storage / 'teachers'}: it is trained before a "
            "sweep starts, so either the folder was emptied since, or this node does not see the driver's storage"
        )
    module = config.student.build(config.data.shape, config.data.num_classes)
    path = teacher_folder(config, storage) / WEIGHTS
    module.load_state_dict(load_weights(path, describe(config, storage)["sha256"]))
    return module.eval()


def bank_of(config: TrainConfig, storage: Path, elsewhere: Elsewhere | None = None) -> Bank | None:
    """The soft labels of a student's trained teacher, which is loaded when it is asked; None if it needs none."""
    run = config.teacher_run()
    if run is None:
        return None
    if not is_trained(run, storage):
        load_teacher(run, storage)  # says what is wrong
    of = {
        "teacher": describe(run, storage)["sha256"],
        "network": run.student.model_dump(mode="json"),  # weights from elsewhere may be those of several
        "data": config.data.model_dump(mode="json", exclude=config.data.places),
        "precision": config.precision,
        "loop": LOOP_VERSION,
    }
    return Bank(lambda: load_teacher(run, storage), of, elsewhere=elsewhere)


def find_or_train(config: TrainConfig, storage: Path | str) -> Bank | None:
    """The teacher that a student's configuration needs, trained first if it is not there; None if it needs none."""
    check_kind(config, TrainConfig, "config")
    run = config.teacher_run()
    if run is None:
        return None
    train_teacher(run, Path(storage))
    return bank_of(config, Path(storage))


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
