"""How images are prepared for a teacher that was trained elsewhere: normalisation and size."""

import contextlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tfkd_ray.learn.config import TeacherInput, TeacherRun
from tfkd_ray.learn.dataset import Dataset
from tfkd_ray.settings.errors import ConfigError
from tfkd_ray.settings.files import expanded
from tfkd_ray.store.experiment import read_teacher


def untrained(config: TeacherRun) -> nn.Module:
    """Return the teacher's network without its weights; its input is normalised by the data set."""
    module = config.build_student(input_shape(config, input_of(config)))
    if config.weights is not None:
        show(module, config.data, input_of(config))
    return module


def input_of(config: TeacherRun) -> dict[str, Any]:
    """Return the preprocessing that the teacher was trained with: `mean`, `std` and `size`.

    `mean` and `std` are per channel; a `size` of None is the data set's.
    """
    if config.weights is not None and config.input is None:
        beside = expanded(config.weights).parent / "teacher.json"  # a teacher of ours
        if config.weights.partition(":")[0] != "torchvision" and beside.is_file():
            with contextlib.suppress(ConfigError, ValueError):
                about = read_teacher(beside.parent)
                of = about["config"]["data"]
                known = about.get("input") or {"mean": of.get("mean"), "std": of.get("std")}
                if known["mean"] and known["std"]:
                    return TeacherInput.model_validate(known).model_dump(mode="json")
    if config.shown is not None:
        return config.shown.model_dump(mode="json")
    mean, std = config.data.statistics()
    return {"mean": list(mean), "std": list(std), "size": None}


def input_shape(config: TeacherRun, shown: dict[str, Any]) -> tuple[int, int, int]:
    """Return (C, H, W) of the teacher's input images."""
    channels, height, width = config.data.shape
    side = shown["size"]
    return (channels, side or height, side or width)


def show(module: nn.Module, data: Dataset, shown: dict[str, Any]) -> None:
    """Convert images from the data set's preprocessing to the network's own, before its forward.

    Do nothing if they are equal. The state_dict does not change.
    """
    mean, std = data.statistics()
    side = shown["size"]
    fits = side is None or tuple(data.shape[1:]) == (side, side)
    if fits and (list(mean), list(std)) == (shown["mean"], shown["std"]):
        return
    factor = torch.tensor(std) / torch.tensor(shown["std"])
    shift = (torch.tensor(mean) - torch.tensor(shown["mean"])) / torch.tensor(shown["std"])

    def seen(network: nn.Module, images: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        (x,) = images
        a, b = (values.to(x.device, torch.float32).view(1, -1, 1, 1) for values in (factor, shift))
        x = x.float() * a + b
        if not fits:
            x = F.interpolate(x, (side, side), mode="bilinear", antialias=True, align_corners=False)
        return (x,)

    module.register_forward_pre_hook(seen)
