"""A network that reads test images during training, for test_confirm.py."""

from typing import Any

from torch import nn

from tfkd_ray.learn.data import Digits


class Peeking(nn.Linear):
    """Linear layer that reads the test answers."""

    def forward(self, x: Any) -> Any:
        if self.training:
            Digits().load_test()
        return super().forward(x.flatten(1))


def network(shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """Return the network of `student: {name: own, path: tests.peeking:network}`."""
    return Peeking(64, num_classes)
