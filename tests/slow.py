"""A network that is slow while a file exists, with the same results."""

import time
from pathlib import Path
from typing import Any

from torch import nn

from tfkd_ray.learn.models import Mlp


def network(shape: tuple[int, int, int], num_classes: int, file: str) -> nn.Module:
    """Return a small network whose training steps wait a little while `file` exists."""
    network = Mlp(hidden=(16,)).build(shape, num_classes)

    def wait(module: nn.Module, inputs: Any) -> None:
        if module.training and Path(file).exists():
            time.sleep(0.2)

    network.register_forward_pre_hook(wait)
    return network
