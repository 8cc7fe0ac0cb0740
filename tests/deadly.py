"""A network whose process dies at the same training step each time, as if out of memory."""

import os
from typing import Any

from torch import nn

from tfkd_ray.learn.models import Mlp


def network(shape: tuple[int, int, int], num_classes: int, after: int) -> nn.Module:
    """Return a network that kills its process with signal 9 in its n-th training step."""
    network, steps = Mlp(hidden=(4,)).build(shape, num_classes), [0]

    def die(module: nn.Module, inputs: Any) -> None:
        steps[0] += module.training
        if steps[0] >= after:
            os.kill(os.getpid(), 9)

    network.register_forward_pre_hook(die)
    return network
