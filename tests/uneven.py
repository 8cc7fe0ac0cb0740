"""A network that runs out of memory on all workers in the same step, in different places.

The first worker fails in the forward pass, before gradients are exchanged; the others at the end of
the backward pass. Used by test_groups.py.
"""

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Uneven(nn.Module):
    """An MLP wide enough that its gradients are exchanged in several parts."""

    def __init__(self, inputs: int, classes: int, fails: bool) -> None:
        super().__init__()
        self.first = nn.Linear(inputs, 1500)
        self.rest = nn.ModuleList(nn.Linear(1500, 1500) for _ in range(6))
        self.last = nn.Linear(1500, classes)
        self.fails, self.steps = fails, 0

    def forward(self, x: Tensor) -> Tensor:
        self.steps += self.training and torch.is_grad_enabled()
        if self.fails and self.steps == 4:
            if dist.get_rank() == 0:
                raise torch.OutOfMemoryError("CUDA out of memory, in forward")
            self.first.weight.register_hook(self.fail)
        x = self.first(x.flatten(1)).relu()
        for layer in self.rest:
            x = layer(x).relu()
        return self.last(x)  # type: ignore[no-any-return]

    @staticmethod
    def fail(gradient: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory, in backward")


def network(shape: tuple[int, int, int], num_classes: int, fails: bool) -> nn.Module:
    """Return a network that fails in its fourth step if `fails`."""
    channels, height, width = shape
    return Uneven(channels * height * width, num_classes, fails)


class Counted(nn.Linear):
    """A linear network that writes which of how many workers has trained it."""

    def __init__(self, inputs: int, classes: int, folder: str) -> None:
        super().__init__(inputs, classes)
        self.folder = folder

    def forward(self, x: Tensor) -> Tensor:
        if dist.is_initialized():
            rank, workers = dist.get_rank(), dist.get_world_size()
            Path(self.folder, f"worker-{rank}-of-{workers}").touch()
        return super().forward(x.flatten(1))


def counted(shape: tuple[int, int, int], num_classes: int, folder: str) -> nn.Module:
    """Return a linear network that notes in a folder who trains it."""
    channels, height, width = shape
    return Counted(channels * height * width, num_classes, folder)
