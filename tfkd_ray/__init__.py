"""Hyperparameter tuning for knowledge distillation and teacher-free KD on Ray, with an honest verdict."""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from tfkd_ray.learn.config import TrainConfig
    from tfkd_ray.learn.loop import Epoch, train
    from tfkd_ray.learn.objectives import (
        CrossEntropy,
        DecoupledKD,
        Dist,
        KnowledgeDistillation,
        LabelSmoothing,
        StandardisedKD,
        TfkdReg,
        TfkdRegCode,
        TfkdSelf,
    )
    from tfkd_ray.learn.soft_labels import Bank
    from tfkd_ray.learn.teachers import find_or_train
    from tfkd_ray.run.searcher import OptunaSearcher, StudyStopping
    from tfkd_ray.run.tune import build_tuner, resume_tuner
    from tfkd_ray.settings.errors import ConfigError
    from tfkd_ray.show.live import Progress
    from tfkd_ray.show.python import (
        best_config,
        class_names,
        load_student,
        read_images,
        write_report,
    )
    from tfkd_ray.show.tensorboard import TensorBoard
    from tfkd_ray.space.space import build_space, load_space

_HOME = {
    "Bank": "learn.soft_labels",
    "ConfigError": "settings.errors",
    "CrossEntropy": "learn.objectives",
    "DecoupledKD": "learn.objectives",
    "Dist": "learn.objectives",
    "Epoch": "learn.loop",
    "KnowledgeDistillation": "learn.objectives",
    "LabelSmoothing": "learn.objectives",
    "OptunaSearcher": "run.searcher",
    "Progress": "show.live",
    "StandardisedKD": "learn.objectives",
    "StudyStopping": "run.searcher",
    "TensorBoard": "show.tensorboard",
    "TfkdReg": "learn.objectives",
    "TfkdRegCode": "learn.objectives",
    "TfkdSelf": "learn.objectives",
    "TrainConfig": "learn.config",
    "best_config": "show.python",
    "build_space": "space.space",
    "build_tuner": "run.tune",
    "class_names": "show.python",
    "find_or_train": "learn.teachers",
    "load_space": "space.space",
    "load_student": "show.python",
    "read_images": "show.python",
    "resume_tuner": "run.tune",
    "train": "learn.loop",
    "write_report": "show.python",
}

__all__ = [
    "Bank",
    "ConfigError",
    "CrossEntropy",
    "DecoupledKD",
    "Dist",
    "Epoch",
    "KnowledgeDistillation",
    "LabelSmoothing",
    "OptunaSearcher",
    "Progress",
    "StandardisedKD",
    "StudyStopping",
    "TensorBoard",
    "TfkdReg",
    "TfkdRegCode",
    "TfkdSelf",
    "TrainConfig",
    "best_config",
    "build_space",
    "build_tuner",
    "class_names",
    "find_or_train",
    "load_space",
    "load_student",
    "read_images",
    "resume_tuner",
    "train",
    "write_report",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `tfkd --help` needs neither torch nor Ray."""
    if name in _HOME:
        return getattr(importlib.import_module(f"tfkd_ray.{_HOME[name]}"), name)
    raise AttributeError(f"module 'tfkd_ray' has no attribute {name!r}")
