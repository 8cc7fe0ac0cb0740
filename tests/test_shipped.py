"""Trials of every shipped space train a few steps, on files in the official formats."""

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from conftest import SHIPPED
from test_data import batches, write_cifar, write_drawings, write_idx, write_tiny
from test_folder import write_folder

from tfkd_ray.learn.loop import train
from tfkd_ray.learn.official import Cifar100
from tfkd_ray.learn.teachers import find_or_train
from tfkd_ray.settings.yaml import read_yaml
from tfkd_ray.space.space import Space, build_space, load_space

KNOBS = ("epochs", "stop_epoch")


def scaled_down(path: Path, place: Path) -> Space:
    """Return the space with its objectives, ranges and recipe, few images and small networks."""
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
        data |= {
            "name": "image_folder",
            "num_classes": 2,
            "root": str(write_folder(place, train=4, side=232)),
        }
    elif name == "fashion_mnist":
        write_idx(place, gz=True)
        data |= {"root": str(place)}
    elif name == "omniglot":
        sets, alphabets = ["images_background_small2"], ["Tagalog"]
        write_drawings(place, sets[0], alphabets)
        data |= {"root": str(place), "sets": sets, "alphabets": alphabets, "side": 16}
    else:
        data |= {"subset": 200}
    tree |= {"data": data, "workers": 1, "gpus_per_worker": 0, "cpus_per_worker": 1, "epochs": 1}
    if "choices" not in tree["optim"]:  # else its student is small, and for these optimizers
        tree["student"] = {"name": "cnn", "widths": [2]}
        tree["optim"] = {**tree["optim"], "batch_size": 64}
    if "teacher" in tree:
        teacher = {k: v for k, v in tree["teacher"].items() if k not in KNOBS}
        searched = [
            k for k in KNOBS if isinstance(tree["teacher"].get(k), dict)
        ]  # the accuracy of a teacher
        teacher |= {"epochs": 2, **{k: {"choices": [1, 2]} for k in searched}} if searched else {}
        if "model" in teacher:
            teacher["model"] = {
                "choices": [{"name": "cnn", "widths": [3]}, {"name": "cnn", "widths": [4]}]
            }
        tree["teacher"] = teacher | {"optim": {"batch_size": 64}}
    return build_space(tree, path)


@pytest.mark.slow
@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_every_shipped_space_trains(path: Path, tmp_path: Path) -> None:
    shipped = load_space(path)
    space = scaled_down(
        path, tmp_path / "data" if "tiny" in path.stem or "imagenet" in path.stem else tmp_path
    )
    assert [b.objective for b in space.branches] == [b.objective for b in shipped.branches]
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for group in space.groups:
        _, config = group.propose(study.ask())
        teacher = find_or_train(config, tmp_path / "storage")
        (epoch,) = train(config, teacher=teacher)
        assert epoch.metrics["train_loss"] > 0 and 0 <= epoch.metrics["val_accuracy"] <= 1


def test_a_teacher_of_every_quality_that_is_searched_is_trained_and_teaches(tmp_path: Path) -> None:
    (path,) = (p for p in SHIPPED if p.stem == "cifar100_defective_kd")
    shipped = load_space(path)
    (knob,) = (p for p in shipped.parameters if p.path[0] == "teacher")
    assert (
        knob.name == "teacher.stop_epoch"
        and len(shipped.teacher_runs()) == len(knob.domain.probes) == 4
    )
    space = scaled_down(path, tmp_path)
    assert (
        sorted((run.stop_epoch, run.epochs) for run in space.teacher_runs())
        == [(1, 2)] * 2 + [(2, 2)] * 2
    )
    (taught,) = (b for b in space.branches if b.objective == "kd")
    values = {p.name: p.domain.probes[0] for p in taught.parameters}
    losses = set()
    for stop in (1, 2):
        config = taught.config({**values, "teacher.stop_epoch": stop})
        (epoch,) = train(config, teacher=find_or_train(config, tmp_path / "storage"))
        losses.add(epoch.metrics["train_kd"])
    assert len(losses) == 2
    trained = [
        json.loads(p.read_text())
        for p in (tmp_path / "storage" / "teachers").glob("*/teacher.json")
    ]
    assert sorted(about["metrics"]["epoch"] for about in trained) == [1, 2]


@pytest.mark.parametrize(
    "path",
    [p for p in SHIPPED if "imagenet_" in p.stem and "tiny" not in p.stem],
    ids=lambda p: p.stem,
)
def test_a_trial_on_imagenet_takes_eight_gpus_one_for_each_worker(path: Path) -> None:
    space = load_space(path)
    for branch in space.branches:
        config = branch.example
        assert (config.workers, config.gpus_per_worker) == (8, 1)
        assert config.worker_resources == {"CPU": 4, "GPU": 1}
        assert config.optim.batch_size % config.workers == 0
