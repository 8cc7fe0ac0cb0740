"""A network that simulates a broken GPU: it fails as CUDA does, on nodes that a file names."""

from pathlib import Path
from typing import Any

import ray
import torch
from torch import nn

from tfkd_ray.learn.models import Mlp


def network(shape: tuple[int, int, int], num_classes: int, file: str, after: int = 0) -> nn.Module:
    """Return a small network that fails after some steps if `file` has its node or `everywhere`."""
    network, steps = Mlp(hidden=(16,)).build(shape, num_classes), [0]

    def fail(module: nn.Module, inputs: Any) -> None:
        steps[0] += module.training
        if module.training and steps[0] > after and Path(file).exists():
            named = Path(file).read_text().split()
            if "everywhere" in named or ray.get_runtime_context().get_node_id() in named:
                raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    network.register_forward_pre_hook(fail)
    return network
