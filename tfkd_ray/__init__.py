"""Hyperparameter tuning for knowledge distillation and teacher-free KD on Ray, with an honest verdict."""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from tfkd_ray.config import TrainConfig
    from tfkd_ray.live import Progress
    from tfkd_ray.loop import train
    from tfkd_ray.schema import ConfigError
    from tfkd_ray.search import OptunaSearcher, StudyStopping
    from tfkd_ray.space import build_space, load_space
    from tfkd_ray.teachers import find_or_train
    from tfkd_ray.tensorboard import TensorBoard
    from tfkd_ray.tune import build_tuner, resume_tuner

_HOME = {
    "ConfigError": "schema",
    "OptunaSearcher": "search",
    "Progress": "live",
    "StudyStopping": "search",
    "TensorBoard": "tensorboard",
    "TrainConfig": "config",
    "build_space": "space",
    "build_tuner": "tune",
    "find_or_train": "teachers",
    "load_space": "space",
    "resume_tuner": "tune",
    "train": "loop",
}

__all__ = [
    "ConfigError",
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
