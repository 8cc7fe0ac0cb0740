"""The exponential moving average of a student's weights.

With it, the averaged weights are the student: `model` in a run state, `student.safetensors`, what is
exported, and what a comparison judges on test.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tfkd_ray.learn.optimizers import Momentum
from tfkd_ray.settings.schema import Settings

if TYPE_CHECKING:
    from torch import Tensor, nn


class Ema(Settings):
    """Exponential moving average of the weights, one step after each update.

    The averaged weights are the student that is kept, exported and judged on test. Floating-point
    buffers, such as BatchNorm's statistics, are averaged alike; others are copied.
    """

    decay: Momentum = 0.999
    """Weight of the average so far. At update n, from 1, it is at most (1 + n) / (10 + n), so that
    the first weights are forgotten in a short run, too. 0: the student's last weights."""

    def at(self, update: int) -> float:
        """Return the weight of the average so far at an update, counted from 1."""
        return min(self.decay, (1 + update) / (10 + update))


class Average:
    """The running average of a student's weights; its state is that of its network.

    Args:
        network: a student of the same configuration; it gets the first weights of `student`.
    """

    def __init__(self, ema: Ema, network: nn.Module, student: nn.Module) -> None:
        network.load_state_dict(student.state_dict())
        self.network = network.eval().requires_grad_(False)
        self._ema, self._student = ema, student

    def update(self, update: int) -> None:
        """Move the average towards the student's weights after its update, counted from 1."""
        import torch

        averaged: list[Tensor] = []
        current: list[Tensor] = []
        with torch.no_grad():
            for ours, theirs in zip(_tensors(self.network), _tensors(self._student), strict=True):
                if ours.is_floating_point() or ours.is_complex():
                    averaged.append(ours)
                    current.append(theirs.detach())
                else:
                    ours.copy_(theirs)
            torch._foreach_lerp_(averaged, current, 1 - self._ema.at(update))

    def state_dict(self) -> dict[str, Any]:
        """Return the averaged weights."""
        return self.network.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load averaged weights."""
        self.network.load_state_dict(state)


def _tensors(network: nn.Module) -> list[Tensor]:
    """Return the parameters and buffers of a network, each once, as they are now."""
    return [*network.parameters(), *network.buffers()]
