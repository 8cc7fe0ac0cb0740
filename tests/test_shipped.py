"""Every search space that ships proposes trials that train: a few steps on files in the official formats."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from conftest import SHIPPED
from test_data import batches, write_cifar, write_tiny
from test_folder import write_folder

from tfkd_ray.data import Cifar100
from tfkd_ray.loop import train
from tfkd_ray.schema import read_yaml
from tfkd_ray.space import Space, build_space, load_space
from tfkd_ray.teachers import find_or_train


def scaled_down(path: Path, place: Path) -> Space:
    """The space with its objectives, ranges and recipe, on a few images and with small networks."""
    tree = read_yaml(path)
    name = tree["data"] if isinstance(tree["data"], str) else tree["data"]["name"]
    data: dict[str, Any] = {"name": name, "val_fraction": 0.5}
    if name == "cifar100":
        twice = {name: pickle.dumps({k: v * 2 if isinstance(v, list) else np.tile(v, (2, 1)) for k, v in batch.items()})
                 for name, batch in batches(Cifar100).items()}  # fmt: skip
        write_cifar(place, Cifar100, twice, archive=True)
        data |= {"root": str(place), "check_md5": False}
    elif name == "tiny_imagenet":
        data |= {"root": str(write_tiny(place))}
    elif name == "imagenet":  # a thousand classes are too many files
        data |= {"name": "image_folder", "num_classes": 2, "root": str(write_folder(place, train=4, side=232))}
    else:
        data |= {"subset": 200}
    tree |= {"data": data, "workers": 1, "gpus_per_worker": 0, "cpus_per_worker": 1, "epochs": 1}
    tree["student"] = {"name": "cnn", "widths": [2]}
    tree["optim"] = {**tree["optim"], "batch_size": 64}
    if "teacher" in tree:
        teacher = {k: v for k, v in tree["teacher"].items() if k not in ("epochs", "stop_epoch")}
        if "model" in teacher:
            teacher["model"] = {"choices": [{"name": "cnn", "widths": [3]}, {"name": "cnn", "widths": [4]}]}
        tree["teacher"] = teacher | {"optim": {"batch_size": 64}}
    return build_space(tree, path)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_every_shipped_space_trains(path: Path, tmp_path: Path) -> None:
    shipped = load_space(path)
    space = scaled_down(path, tmp_path / "data" if "tiny" in path.stem or "imagenet" in path.stem else tmp_path)
    assert [b.objective for b in space.branches] == [b.objective for b in shipped.branches]
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for group in space.groups:
        _, config = group.propose(study.ask())
        teacher = find_or_train(config, tmp_path / "storage")
        (epoch,) = train(config, teacher=teacher)
        assert epoch.metrics["train_loss"] > 0 and 0 <= epoch.metrics["val_accuracy"] <= 1
