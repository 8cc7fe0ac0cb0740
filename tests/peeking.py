"""A network that looks at test images while it is trained, for test_confirm.py."""

from typing import Any

from torch import nn

from tfkd_ray.learn.data import Digits


class Peeking(nn.Linear):
    """Linear, with a look at the answers."""

    def forward(self, x: Any) -> Any:
        if self.training:
            Digits().load_test()
        return super().forward(x.flatten(1))


def network(shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """What `student: {name: own, path: tests.peeking:network}` asks for."""
    return Peeking(64, num_classes)
