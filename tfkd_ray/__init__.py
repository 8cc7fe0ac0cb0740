"""Hyperparameter tuning for knowledge distillation and teacher-free KD on Ray, with an honest verdict."""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from tfkd_ray.learn.config import TrainConfig
    from tfkd_ray.learn.loop import Epoch, train
    from tfkd_ray.learn.teachers import find_or_train
    from tfkd_ray.run.searcher import OptunaSearcher, StudyStopping
    from tfkd_ray.run.tune import build_tuner, resume_tuner
    from tfkd_ray.settings.errors import ConfigError
    from tfkd_ray.show.live import Progress
    from tfkd_ray.show.tensorboard import TensorBoard
    from tfkd_ray.space.space import build_space, load_space

_HOME = {
    "ConfigError": "settings.errors",
    "Epoch": "learn.loop",
    "OptunaSearcher": "run.searcher",
    "Progress": "show.live",
    "StudyStopping": "run.searcher",
    "TensorBoard": "show.tensorboard",
    "TrainConfig": "learn.config",
    "build_space": "space.space",
    "build_tuner": "run.tune",
    "find_or_train": "learn.teachers",
    "load_space": "space.space",
    "resume_tuner": "run.tune",
    "train": "learn.loop",
}

__all__ = [
    "ConfigError",
    "Epoch",
    "OptunaSearcher",
    "Progress",
    "StudyStopping",
    "TensorBoard",
    "TrainConfig",
    "build_space",
    "build_tuner",
    "find_or_train",
    "load_space",
    "resume_tuner",
    "train",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `tfkd --help` needs neither torch nor Ray."""
    if name in _HOME:
        return getattr(importlib.import_module(f"tfkd_ray.{_HOME[name]}"), name)
    raise AttributeError(f"module 'tfkd_ray' has no attribute {name!r}")
