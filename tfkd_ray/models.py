"""Student and teacher networks: each a frozen set of hyperparameters that builds a torch module.

To add a network: a class with a `name` and `build`, and one line in `Model`.

Shapes: images [B, C, H, W] float in, logits [B, K] out.
"""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field
from torch import nn

from tfkd_ray.schema import Settings, named

Width = Annotated[int, Field(ge=1, le=65536)]


class Network(Settings):
    """A network by name; `build` makes it for a data set's shape."""

    def check(self, shape: tuple[int, int, int]) -> None:
        """Raise ValueError where it cannot be built for images of this shape (C, H, W)."""

    def build(self, shape: tuple[int, int, int], num_classes: int) -> nn.Module:
        """A new module, weights drawn from torch's global generator; shape is (C, H, W)."""
        raise TypeError(f"{type(self).__name__} does not say how it is built")


class Mlp(Network):
    """Fully connected ReLU network: no batch statistics, and no dropout unless asked for."""

    name: Literal["mlp"] = "mlp"
    hidden: Annotated[tuple[Width, ...], Field(max_length=16)] = (64,)
    """Width of each hidden layer."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Probability of dropping a hidden unit."""

    def build(self, shape: tuple[int, int, int], num_classes: int) -> nn.Module:
        channels, height, width = shape
        layers: list[nn.Module] = [nn.Flatten()]
        features = channels * height * width
        for units in self.hidden:
            layers += [nn.Linear(features, units), nn.ReLU()]
            layers += [nn.Dropout(self.dropout)] if self.dropout else []
            features = units
        return nn.Sequential(*layers, nn.Linear(features, num_classes))


class Cnn(Network):
    """Small convolutional network for small images: 3x3 convolutions with BatchNorm, ReLU and 2x2 pooling."""

    name: Literal["cnn"] = "cnn"
    widths: Annotated[tuple[Width, ...], Field(min_length=1, max_length=5)] = (16, 32)
    """Channels of each stage; images are halved between stages."""

    def check(self, shape: tuple[int, int, int]) -> None:
        _, height, width = shape
        if min(height, width) < 2 ** (len(self.widths) - 1):
            raise ValueError(f"widths: {len(self.widths)} stages halve a {height}x{width} image to nothing")

    def build(self, shape: tuple[int, int, int], num_classes: int) -> nn.Module:
        self.check(shape)
        channels = shape[0]
        layers: list[nn.Module] = []
        for stage, out in enumerate(self.widths):
            layers += [nn.MaxPool2d(2)] if stage else []
            layers += [nn.Conv2d(channels, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
            channels = out
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes))


Model = Annotated[Mlp | Cnn, Field(discriminator="name"), BeforeValidator(named)]
