"""A run's settings without those that are as its recipe or by default."""

import copy
from collections.abc import Iterable, Iterator
from typing import Any

from tfkd_ray.learn.config import TrainConfig
from tfkd_ray.learn.own import only_reading
from tfkd_ray.settings.errors import ConfigError
from tfkd_ray.settings.schema import validated
from tfkd_ray.settings.yaml import Tree, value_at

SettingPath = tuple[str, ...]

ALWAYS_SHOWN = (
    *("data.name", "student.name", "objective.name"),
    *("epochs", "optim.lr", "precision", "seed"),
)
"""Settings that are kept, whatever their values."""


def without_defaults(tree: Any, kept: Iterable[str] = ()) -> Tree:
    """Return the settings of a run without those that are as its recipe or by default.

    Reading them gives the same run. The user's own code is not imported.

    Args:
        tree: a run's settings, with every default filled in.
        kept: names of searched settings, which are kept besides `ALWAYS_SHOWN`.
    """
    stay = [_path_of(name) for name in (*ALWAYS_SHOWN, *kept)]
    with only_reading():
        whole = validated(TrainConfig, tree).tree
        left = copy.deepcopy(whole)
        for path in sorted(_paths(whole), key=lambda path: (len(path), path)):
            above = value_at(left, path[:-1])
            if not isinstance(above, dict) or path[-1] not in above or path[-1] == "name":
                continue
            if any(path == one[: len(path)] for one in stay):
                continue
            value = above.pop(path[-1])
            if not _is_of(left, whole):
                above[path[-1]] = value
    return {key: left[key] for key in whole if key in left}


def _path_of(name: str) -> SettingPath:
    """Return the path of a searched setting: objective.kd.alpha is the objective's alpha."""
    top, *below = name.split(".")
    return (top, *(below[1:] if top == "objective" and len(below) > 1 else below))


def _paths(tree: Tree, above: SettingPath = ()) -> Iterator[SettingPath]:
    """Yield the paths of all settings, and of those that have settings below them."""
    for key, value in tree.items():
        yield (*above, key)
        if isinstance(value, dict):
            yield from _paths(value, (*above, key))


def _is_of(tree: Tree, whole: Tree) -> bool:
    """Return whether settings are those of a run."""
    try:
        return bool(validated(TrainConfig, copy.deepcopy(tree)).tree == whole)
    except ConfigError:
        return False
