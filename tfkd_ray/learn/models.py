"""Student and teacher networks: each a frozen set of hyperparameters that builds a torch module.

To add a network, write a class with a `name` and `build`, and add its name to `Model`. For one of
torchvision's, write a subclass of `TorchvisionNetwork` with a `name` (and the pools of its stem);
torchvision is imported when such a network is built. No change is needed for `timm:NAME`, any of
timm's networks, or for `package.module:function`, your own.

Shapes: images [B, C, H, W] float in, logits [B, K] out.
"""

from __future__ import annotations

import copy
import difflib
import functools
import inspect
import itertools
import json
import math
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field, JsonValue

from tfkd_ray.learn.images import random_position, seeded
from tfkd_ray.learn.own import imported, is_only_reading
from tfkd_ray.settings import own_code
from tfkd_ray.settings.errors import ConfigError
from tfkd_ray.settings.schema import Settings, name_alone

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


Prepared = tuple[tuple[float, ...], tuple[float, ...], int | None]
"""(mean, std) per channel in pixel units of 0 to 255, and height and width in pixels."""
Width = Annotated[int, Field(ge=1, le=65536)]


class Network(Settings):
    """A network by name; `build` makes it for the image shape of a data set."""

    name: str
    layout: ClassVar[str] = "channels_last"
    """Name of torch's `memory_format`."""
    fast_in_bf16: ClassVar[bool] = True
    """True if bfloat16 makes it faster on processors that support it; measured by
    benchmarks/formats.py."""

    @property
    def called(self) -> str:
        """Return the network's name in sentences."""
        return self.name

    @property
    def memory_format(self) -> torch.memory_format:
        """Return the memory format of weights and images in training; shapes do not change."""
        import torch

        found: torch.memory_format = getattr(torch, self.layout)
        return found

    def check(self, shape: tuple[int, int, int]) -> None:
        """Raise ValueError if it cannot be built for images of this shape (C, H, W)."""

    def operations(self, shape: tuple[int, int, int]) -> float:
        """Return the multiplications and additions of a forward pass of one image (C, H, W).

        Infinity, the default, is for networks that are never tiny.
        """
        return math.inf

    def weights(self, shape: tuple[int, int, int], num_classes: int) -> int | None:
        """Return the number of weights and batch statistics, or None if only `build` can tell."""
        return None

    def trained_with(self, shape: tuple[int, int, int]) -> Prepared | None:
        """Return the preprocessing of its library's pretrained weights; None if unknown.

        Args:
            shape: (C, H, W) of the images at hand.
        """
        return None

    def build(self, shape: tuple[int, int, int], num_classes: int) -> nn.Module:
        """Return a new module for (C, H, W), its weights drawn from torch's global generator."""
        raise TypeError(f"{type(self).__name__} does not say how it is built")


class Mlp(Network):
    """Fully connected ReLU network without batch statistics; dropout is optional."""

    name: Literal["mlp"] = "mlp"
    hidden: Annotated[tuple[Width, ...], Field(max_length=16)] = (64,)
    """Width of each hidden layer."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Probability of dropping a hidden unit."""

    def operations(self, shape: tuple[int, int, int]) -> float:
        units = (math.prod(shape), *self.hidden)
        return 2.0 * sum(a * b for a, b in itertools.pairwise(units))

    def weights(self, shape: tuple[int, int, int], num_classes: int) -> int:
        units = (math.prod(shape), *self.hidden, num_classes)
        return sum((a + 1) * b for a, b in itertools.pairwise(units))

    def build(self, shape: tuple[int, int, int], num_classes: int) -> nn.Module:
        from torch import nn

        channels, height, width = shape
        layers: list[nn.Module] = [nn.Flatten()]
        features = channels * height * width
        for units in self.hidden:
            layers += [nn.Linear(features, units), nn.ReLU()]
            layers += [nn.Dropout(self.dropout)] if self.dropout else []
            features = units
        return nn.Sequential(*layers, nn.Linear(features, num_classes))


class Cnn(Network):
    """Small convolutional network: 3x3 convolutions with BatchNorm, ReLU and 2x2 pooling."""

    name: Literal["cnn"] = "cnn"
    widths: Annotated[tuple[Width, ...], Field(min_length=1, max_length=5)] = (16, 32)
    """Channels of each stage; pooling halves the images between stages."""

    def check(self, shape: tuple[int, int, int]) -> None:
        _, height, width = shape
        if min(height, width) < 2 ** (len(self.widths) - 1):
            raise ValueError(
                f"widths: {len(self.widths)} stages halve a {height}x{width} image to nothing"
            )

    def operations(self, shape: tuple[int, int, int]) -> float:
        channels = (shape[0], *self.widths)
        pixels = [(shape[1] >> stage) * (shape[2] >> stage) for stage in range(len(self.widths))]
        return 2.0 * sum(
            9 * a * b * n for (a, b), n in zip(itertools.pairwise(channels), pixels, strict=True)
        )

    def weights(self, shape: tuple[int, int, int], num_classes: int) -> int:
        channels = (shape[0], *self.widths)
        # BatchNorm: 4 per channel, and a count
        stages = sum(9 * a * b + 4 * b + 1 for a, b in itertools.pairwise(channels))
        return stages + (channels[-1] + 1) * num_classes

    def build(self, shape: tuple[int, int, int], num_classes: int) -> nn.Module:
        from torch import nn

        from tfkd_ray.learn.blocks import MeanOfMap

        self.check(shape)
        channels = shape[0]
        layers: list[nn.Module] = []
        for stage, out in enumerate(self.widths):
            layers += [nn.MaxPool2d(2)] if stage else []
            layers += [
                nn.Conv2d(channels, out, 3, padding=1, bias=False),
                nn.BatchNorm2d(out),
                nn.ReLU(),
            ]
            channels = out
        return nn.Sequential(*layers, MeanOfMap(1), nn.Flatten(), nn.Linear(channels, num_classes))


class Cnn5(Network):
    """The Tf-KD paper's plain CNN: three 3x3 convolutions and two linear layers.

    BatchNorm, ReLU and 2x2 pooling follow each convolution. As in the authors' code, BatchNorm also
    follows the first linear layer.
    """

    later: ClassVar[frozenset[str]] = frozenset({"width"})

    name: Literal["cnn5"] = "cnn5"
    width: Annotated[int, Field(ge=1, le=64)] = 1
    """Factor on the 32, 64 and 128 channels of the convolutions, and on the 128 units of the first
    linear layer; the paper's is 1."""

    def check(self, shape: tuple[int, int, int]) -> None:
        _at_least(8, "cnn5", shape)

    def build(self, shape: tuple[int, int, int], num_classes: int) -> nn.Module:
        from torch import nn

        self.check(shape)
        channels, height, width = shape
        layers: list[nn.Module] = []
        for out in (32 * self.width, 64 * self.width, 128 * self.width):
            layers += [
                nn.Conv2d(channels, out, 3, padding=1),
                nn.BatchNorm2d(out),
                nn.ReLU(),
                nn.MaxPool2d(2),
            ]
            channels = out
        features, hidden = channels * (height // 8) * (width // 8), 128 * self.width
        layers += [
            nn.Flatten(),
            nn.Linear(features, hidden),
            nn.BatchNorm1d(hidden),
            nn.ReLU(),
            nn.Dropout(0.5),
        ]
        return nn.Sequential(*layers, nn.Linear(hidden, num_classes))


class AlexNetSmall(Network):
    """AlexNet for small images with one linear layer: "AlexNet-CIFAR" of the Tf-KD authors' code.

    At 32x32 three poolings leave one pixel. At other sizes the remaining map is averaged, or not
    pooled further.
    """

    name: Literal["alexnet_small"] = "alexnet_small"
    layout: ClassVar[str] = "contiguous_format"
    fast_in_bf16: ClassVar[bool] = False

    def build(self, shape: tuple[int, int, int], num_classes: int) -> nn.Module:
        from torch import nn

        def pool() -> nn.Module:
            return nn.MaxPool2d(2, ceil_mode=True)

        layers = [nn.Conv2d(shape[0], 64, 11, stride=4, padding=5), nn.ReLU(), pool()]
        layers += [nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), pool()]
        for channels, out in ((192, 384), (384, 256), (256, 256)):
            layers += [nn.Conv2d(channels, out, 3, padding=1), nn.ReLU()]
        return nn.Sequential(
            *layers, pool(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, num_classes)
        )


# --- Wide residual networks -----------------------------------------------------------------------


def _six_n_plus_four(depth: int) -> int:
    if depth % 6 != 4:
        raise ValueError(f"must be 6n + 4 (10, 16, 22, 28, 34, 40, ...), got {depth}")
    return depth


class WideResNet(Network):
    """Wide residual network without dropout, e.g. WRN-28-10.

    (Zagoruyko and Komodakis 2016, arXiv:1605.07146.) It is designed for 32x32: its stem keeps the
    full resolution at any image size.
    """

    name: Literal["wide_resnet"] = "wide_resnet"
    depth: Annotated[int, Field(ge=10, le=1000), AfterValidator(_six_n_plus_four)] = 16
    """Layers with weights on the longest path, of the form 6n + 4."""
    width: Annotated[int, Field(ge=1, le=64)] = 2
    """Factor on the 16, 32 and 64 channels of the three stages."""

    def build(self, shape: tuple[int, int, int], num_classes: int) -> nn.Module:
        from torch import nn

        from tfkd_ray.learn.blocks import WideBlock

        channels = 16
        layers: list[nn.Module] = [nn.Conv2d(shape[0], channels, 3, padding=1, bias=False)]
        for stage, out in enumerate((16 * self.width, 32 * self.width, 64 * self.width)):
            for block in range((self.depth - 4) // 6):
                layers.append(WideBlock(channels, out, stride=2 if stage and not block else 1))
                channels = out
        layers += [nn.BatchNorm2d(channels), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        network = nn.Sequential(*layers, nn.Linear(channels, num_classes))
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        return network


# --- torchvision ----------------------------------------------------------------------------------

SMALL_IMAGE = 64
"""Largest shorter side, in pixels, of images that get a small-image stem."""


class TorchvisionNetwork(Network):
    """A torchvision network with random weights, and a stem that fits the images.

    For images up to 64 pixels the first convolution becomes 3x3 with stride 1, without pooling
    after it. Larger images keep torchvision's stem. A replaced first convolution (also for other
    than 3 channels) is initialised from He's normal, fan out, whatever torchvision uses.
    """

    stem_pools: ClassVar[tuple[str, ...]] = ()
    """Names of pooling modules that small images skip."""
    options: ClassVar[dict[str, Any]] = {}
    """Arguments of torchvision's builder."""
    smallest: ClassVar[int] = 8
    """Smallest accepted side of an image, in pixels."""

    def check(self, shape: tuple[int, int, int]) -> None:
        _at_least(self.smallest, self.name, shape)

    def build(self, shape: tuple[int, int, int], num_classes: int) -> nn.Module:
        self.check(shape)
        network = self.original(num_classes)
        small = min(shape[1:]) <= SMALL_IMAGE
        if small or shape[0] != 3:
            _replace_first_convolution(network, shape[0], small)
        if small:
            self.shrink(network)
        return network

    def trained_with(self, shape: tuple[int, int, int]) -> Prepared | None:
        """Return ImageNet's mean and std at 224 pixels, right for all but the refused GoogLeNet."""
        return (0.485 * 255, 0.456 * 255, 0.406 * 255), (0.229 * 255, 0.224 * 255, 0.225 * 255), 224

    def original(self, num_classes: int) -> nn.Module:
        """Return torchvision's own network, for 3 channels and large images."""
        from torchvision.models import get_model  # type: ignore[import-untyped]

        network: nn.Module = get_model(
            self.name, weights=None, num_classes=num_classes, **self.options
        )
        return network

    def shrink(self, network: nn.Module) -> None:
        """Adapt the layers after the first convolution to small images."""
        from torch import nn

        for pool in self.stem_pools:
            network.set_submodule(pool, nn.Identity(), strict=True)


def _at_least(smallest: int, name: str, shape: tuple[int, int, int]) -> None:
    _, height, width = shape
    if min(height, width) < smallest:
        raise ValueError(
            f"name: {name} needs images of {smallest}x{smallest} or more, these are {height}x{width}"
        )


def _replace_first_convolution(network: nn.Module, channels: int, small: bool) -> None:
    """Replace the first convolution for this number of channels; small images: 3x3, stride 1."""
    from torch import nn

    path, old = next((path, m) for path, m in network.named_modules() if isinstance(m, nn.Conv2d))
    kernel, stride, padding = (
        (3, 1, 1) if small else (old.kernel_size[0], old.stride[0], old.padding[0])
    )
    assert isinstance(padding, int), f"{padding=}"
    new = nn.Conv2d(channels, old.out_channels, kernel, stride, padding, bias=old.bias is not None)
    nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")
    if new.bias is not None:
        nn.init.zeros_(new.bias)
    network.set_submodule(path, new, strict=True)


class AlexNet(TorchvisionNetwork):
    """AlexNet with its two layers of 4096. (Krizhevsky 2014, arXiv:1404.5997.)"""

    name: Literal["alexnet"] = "alexnet"
    stem_pools: ClassVar[tuple[str, ...]] = ("features.2",)


class _ResNet(TorchvisionNetwork):
    stem_pools: ClassVar[tuple[str, ...]] = ("maxpool",)


class ResNet18(_ResNet):
    """Residual network; up to 64 pixels that of the Tf-KD paper.

    (He et al. 2015, arXiv:1512.03385.)
    """

    name: Literal["resnet18"] = "resnet18"


class ResNet34(_ResNet):
    """Residual network. (He et al. 2015, arXiv:1512.03385.)"""

    name: Literal["resnet34"] = "resnet34"


class ResNet50(_ResNet):
    """Residual network with bottlenecks; up to 64 pixels that of the Tf-KD paper.

    (He et al. 2015, arXiv:1512.03385.)
    """

    name: Literal["resnet50"] = "resnet50"


class ResNet101(_ResNet):
    """Residual network with bottlenecks; up to 64 pixels that of the Tf-KD paper.

    (He et al. 2015, arXiv:1512.03385.)
    """

    name: Literal["resnet101"] = "resnet101"


class ResNeXt50(_ResNet):
    """Residual network of 32 groups. (Xie et al. 2016, arXiv:1611.05431.)"""

    name: Literal["resnext50_32x4d"] = "resnext50_32x4d"


class ResNeXt101(_ResNet):
    """Residual network of 32 groups. (Xie et al. 2016, arXiv:1611.05431.)"""

    name: Literal["resnext101_32x8d"] = "resnext101_32x8d"


class ResNeXt29(_ResNet):
    """ResNeXt-29 8x64d, three stages of three blocks; up to 64 pixels the Tf-KD paper's version.

    (Xie et al. 2016, arXiv:1611.05431.)
    """

    name: Literal["resnext29"] = "resnext29"

    def original(self, num_classes: int) -> nn.Module:
        from torch import nn
        from torchvision.models.resnet import Bottleneck, ResNet  # type: ignore[import-untyped]

        network: nn.Module = ResNet(Bottleneck, [3, 3, 3, 1], groups=8, width_per_group=64)
        network.layer4 = nn.Identity()  # torchvision always makes four stages
        network.fc = nn.Linear(1024, num_classes)
        return network


class MobileNetV2(TorchvisionNetwork):
    """MobileNetV2; up to 64 pixels its first two strides are 1.

    (Sandler et al. 2018, arXiv:1801.04381.) The Tf-KD authors' version has biases, a 1x1 stem
    padded to 34x34 and one more 1x1 convolution in its first block. It halves the image at 24, 32
    and 64 channels, this one at 32, 64 and 160; this one has 17,408 parameters less at K = 100.
    """

    name: Literal["mobilenet_v2"] = "mobilenet_v2"

    def shrink(self, network: Any) -> None:
        depthwise = network.features[2].conv[1][0]
        assert depthwise.stride == (2, 2), f"{depthwise.stride=}"
        depthwise.stride = (1, 1)


class ShuffleNetV2(TorchvisionNetwork):
    """ShuffleNetV2 x1. (Ma et al. 2018, arXiv:1807.11164.)

    The Tf-KD authors' version has biases on its convolutions, 24 instead of 58 channels inside its
    first unit, and no ReLU after the stem; this one has 4,792 parameters less.
    """

    name: Literal["shufflenet_v2_x1_0"] = "shufflenet_v2_x1_0"
    fast_in_bf16: ClassVar[bool] = False
    stem_pools: ClassVar[tuple[str, ...]] = ("maxpool",)


class GoogLeNet(TorchvisionNetwork):
    """GoogLeNet with BatchNorm and without auxiliary classifiers.

    (Szegedy et al. 2014, arXiv:1409.4842.) The Tf-KD authors' version has biases, two 3x3
    convolutions in a row instead of one, a single 3x3 of 192 channels as its stem, and dropout 0.4
    instead of 0.2; this one has 563,776 parameters less.
    """

    name: Literal["googlenet"] = "googlenet"
    stem_pools: ClassVar[tuple[str, ...]] = ("maxpool1", "maxpool2")
    options: ClassVar[dict[str, Any]] = {"aux_logits": False, "init_weights": True}


class DenseNet121(TorchvisionNetwork):
    """DenseNet with growth rate 32. (Huang et al. 2016, arXiv:1608.06993.)

    Up to 64 pixels it is the Tf-KD paper's version, plus BatchNorm and ReLU after the stem (128
    parameters) and a ReLU in each transition.
    """

    name: Literal["densenet121"] = "densenet121"
    stem_pools: ClassVar[tuple[str, ...]] = ("features.pool0",)


class _Vgg(TorchvisionNetwork):
    smallest: ClassVar[int] = 32  # five poolings halve it

    def shrink(self, network: nn.Module) -> None:
        """Do nothing: a VGG begins with 3x3 at stride 1 and pools late enough."""


class Vgg16(_Vgg):
    """VGG with BatchNorm and two layers of 4096. (Simonyan and Zisserman 2014, arXiv:1409.1556.)"""

    name: Literal["vgg16_bn"] = "vgg16_bn"


class Vgg19(_Vgg):
    """VGG with BatchNorm and two layers of 4096, as in the Tf-KD code. (arXiv:1409.1556.)"""

    name: Literal["vgg19_bn"] = "vgg19_bn"


class ViTTiny(TorchvisionNetwork):
    """Vision transformer with 12 blocks of width 192 and 3 heads, as torchvision's larger ones.

    (Dosovitskiy et al. 2020, arXiv:2010.11929; this size: Touvron et al. 2020, arXiv:2012.12877.)
    Images are square. Its names are those of torchvision's ViT; timm's are another network's.
    """

    name: Literal["vit_tiny"] = "vit_tiny"
    patch: Annotated[int, Field(ge=1, le=64)] | None = None
    """Side of a patch in pixels, which divides the image's. None: the largest of 16, 8, 4, 2 and 1
    that gives 7 by 7 patches at least: 16 at 224 pixels, 8 at 64, 4 at 32."""

    def check(self, shape: tuple[int, int, int]) -> None:
        super().check(shape)
        _, height, width = shape
        if height != width:
            raise ValueError(f"name: {self.name} needs square images, these are {height}x{width}")
        if height % self.side_of_patch(shape):
            raise ValueError(
                f"patch: must divide the {height} pixels of the images, got {self.patch}"
            )

    def side_of_patch(self, shape: tuple[int, int, int]) -> int:
        """Return the side of a patch of these images, in pixels."""
        if self.patch is not None:
            return self.patch
        side = shape[1]
        return next((p for p in (16, 8, 4, 2) if side % p == 0 and side // p >= 7), 1)

    def build(self, shape: tuple[int, int, int], num_classes: int) -> nn.Module:
        from torchvision.models import VisionTransformer

        self.check(shape)
        network: nn.Module = VisionTransformer(
            image_size=shape[1],
            patch_size=self.side_of_patch(shape),
            num_layers=12,
            num_heads=3,
            hidden_dim=192,
            mlp_dim=768,
            num_classes=num_classes,
        )
        if shape[0] != 3:
            _replace_patches(network, "conv_proj", shape[0], self.side_of_patch(shape))
        # torchvision begins with logits of zero, so that no gradient reaches the layers below
        head = network.get_submodule("heads.head")
        _normal_weights(head)
        return network


class _ConvNeXt(TorchvisionNetwork):
    blocks: ClassVar[tuple[int, int, int, int]] = (2, 2, 6, 2)
    widths: ClassVar[tuple[int, int, int, int]]
    stochastic_depth: ClassVar[float] = 0.0

    patch: Literal[1, 2, 4] | None = None
    """Side and stride, in pixels, of the first convolution; 4 in the original. None: 2 for images
    up to 64 pixels, 1 below 16, else 4."""

    def check(self, shape: tuple[int, int, int]) -> None:
        super().check(shape)
        side, patch = min(shape[1:]), self.side_of_patch(shape)
        if side // patch < 8:
            raise ValueError(
                f"patch: {patch} leaves {side // patch} of {side} pixels, which are halved three times; lower it"
            )

    def side_of_patch(self, shape: tuple[int, int, int]) -> int:
        """Return the side of the first convolution for these images, in pixels."""
        if self.patch is not None:
            return self.patch
        side = min(shape[1:])
        if side > SMALL_IMAGE:
            return 4
        return 2 if side >= 16 else 1

    def build(self, shape: tuple[int, int, int], num_classes: int) -> nn.Module:
        from torchvision.models.convnext import (  # type: ignore[import-untyped]
            CNBlockConfig,
            ConvNeXt,
        )

        self.check(shape)
        stages = [
            CNBlockConfig(width, out, count)
            for width, out, count in zip(
                self.widths, (*self.widths[1:], None), self.blocks, strict=True
            )
        ]
        network: nn.Module = ConvNeXt(stages, self.stochastic_depth, num_classes=num_classes)
        patch = self.side_of_patch(shape)
        if patch != 4 or shape[0] != 3:
            _replace_patches(network, "features.0.0", shape[0], patch)
        return network


class ConvNeXtAtto(_ConvNeXt):
    """ConvNeXt of 3.7 million parameters, of torchvision's blocks; timm's has other names.

    (Liu et al. 2022, arXiv:2201.03545; this size: Woo et al. 2023, arXiv:2301.00808.)
    """

    name: Literal["convnext_atto"] = "convnext_atto"
    widths: ClassVar[tuple[int, int, int, int]] = (40, 80, 160, 320)


class ConvNeXtFemto(_ConvNeXt):
    """ConvNeXt of 5.2 million parameters, of torchvision's blocks; timm's has other names.

    (Liu et al. 2022, arXiv:2201.03545; this size: Woo et al. 2023, arXiv:2301.00808.)
    """

    name: Literal["convnext_femto"] = "convnext_femto"
    widths: ClassVar[tuple[int, int, int, int]] = (48, 96, 192, 384)


class ConvNeXtTiny(_ConvNeXt):
    """ConvNeXt of 28.6 million parameters; above 64 pixels torchvision's own.

    (Liu et al. 2022, arXiv:2201.03545.) As there, it drops blocks by chance, up to 10 % of them.
    """

    name: Literal["convnext_tiny"] = "convnext_tiny"
    blocks: ClassVar[tuple[int, int, int, int]] = (3, 3, 9, 3)
    widths: ClassVar[tuple[int, int, int, int]] = (96, 192, 384, 768)
    stochastic_depth: ClassVar[float] = 0.1


def _replace_patches(network: nn.Module, path: str, channels: int, side: int) -> None:
    """Replace the convolution of the patches, for this number of channels and side in pixels."""
    from torch import nn

    old = network.get_submodule(path)
    assert isinstance(old, nn.Conv2d), f"{old=}"
    new = nn.Conv2d(channels, old.out_channels, side, side)
    _normal_weights(new)
    network.set_submodule(path, new, strict=True)


def _normal_weights(layer: nn.Module) -> None:
    """Draw a layer's weights from a normal of deviation 0.02, cut off; set its bias to 0."""
    from torch import nn

    assert isinstance(layer, nn.Conv2d | nn.Linear), f"{layer=}"
    nn.init.trunc_normal_(layer.weight, std=0.02)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


# --- external networks ----------------------------------------------------------------------------


class Timm(Network):
    """Any timm network with random weights; `timm:NAME` for short.

    Source: github.com/huggingface/pytorch-image-models. Its name, its arguments and timm's version
    define it; a fingerprint does not record the version.
    """

    name: Literal["timm"] = "timm"
    model: str
    """timm's name for it, e.g. `resnet26` or `vit_tiny_patch16_224`."""
    args: dict[str, JsonValue] = {}
    """More arguments of `timm.create_model`, e.g. `{drop_path_rate: 0.1}`, or for a ViT `{img_size:
    32, patch_size: 4}`."""
    stem: Literal["small", "timm"] = "small"
    """timm: the original stem. small: for images up to 64 pixels, a first convolution of stride 2
    becomes 3x3 with stride 1, and a `maxpool` is removed; a convolution as wide as its stride (the
    patches of a ViT or ConvNeXt) stays."""

    def __hash__(self) -> int:
        return hash(json.dumps(self.model_dump(mode="json")))

    @property
    def called(self) -> str:
        """Return `timm:NAME`."""
        return f"timm:{self.model}"

    def check(self, shape: tuple[int, int, int]) -> None:
        try:
            import timm
        except ModuleNotFoundError:
            raise ValueError(
                "name: timm is not installed here: pip install 'tfkd_ray[timm]'"
            ) from None
        if not timm.is_model(self.model):
            near = difflib.get_close_matches(self.model.partition(".")[0], timm.list_models(), n=3)
            hint = (
                f"did you mean {' or '.join(map(repr, near))}?"
                if near
                else "timm.list_models() names them all"
            )
            raise ValueError(f"model: timm {timm.__version__} has no model {self.model!r}; {hint}")
        for key in {"pretrained", "checkpoint_path", "num_classes", "in_chans"} & self.args.keys():
            raise ValueError(
                f"args.{key}: not for you to set: weights are random, the rest is the data's; leave it out"
            )

    def trained_with(self, shape: tuple[int, int, int]) -> Prepared | None:
        """Return timm's preprocessing; None if the stem or the patches differ from the original."""
        changed = self.stem == "small" and min(shape[1:]) <= SMALL_IMAGE
        try:
            self.check(shape)
        except ValueError:  # reported elsewhere
            return None
        if changed or "img_size" in self.args:
            return None
        import timm

        about = timm.get_pretrained_cfg(self.model) or timm.get_pretrained_cfg(
            self.model.partition(".")[0]
        )
        if about is None or len(about.mean) != shape[0]:
            return None
        mean, std = (
            tuple(255 * float(value) for value in values) for values in (about.mean, about.std)
        )
        return mean, std, int(about.input_size[-1])

    def build(self, shape: tuple[int, int, int], num_classes: int) -> nn.Module:
        self.check(shape)
        make = functools.partial(self._made, shape, num_classes, pretrained=False)
        return _tried(f"model timm:{self.model}", make, shape, num_classes)

    def pretrained(self, shape: tuple[int, int, int], num_classes: int) -> nn.Module:
        """Return timm's network with its weights, downloaded if missing.

        The stem is timm's. A head of other classes is random.
        """
        self.check(shape)
        with_weights: nn.Module = self._made(shape, num_classes, pretrained=True)
        return with_weights

    def _made(self, shape: tuple[int, int, int], num_classes: int, *, pretrained: bool) -> Any:
        import timm
        from torch import nn

        given = {
            "pretrained": pretrained,
            "num_classes": num_classes,
            "in_chans": shape[0],
            **self.args,
        }
        network = timm.create_model(self.model, **given)
        first = next((m for m in network.modules() if isinstance(m, nn.Conv2d)), None)
        if pretrained or self.stem == "timm" or min(shape[1:]) > SMALL_IMAGE or first is None:
            return network
        if first.in_channels == shape[0] and 1 < first.stride[0] < first.kernel_size[0]:
            _replace_first_convolution(network, shape[0], small=True)
            if hasattr(network, "maxpool"):
                network.maxpool = nn.Identity()
        return network


class OwnNetwork(Network):
    """A network from your own function; `package.module:function` for short.

    Called as `function(shape=(C, H, W), num_classes=K, **args)`. Its module may return the logits,
    a dict or an object with `logits` (or `out`), or a tuple that begins with them; other outputs
    are dropped. A fingerprint holds the path and arguments of the function, not its code: after a
    change of the code, earlier runs and teachers are taken for the same.
    """

    name: Literal["own"] = "own"
    layout: ClassVar[str] = "preserve_format"  # code with a `view` may depend on the memory order
    path: str
    """Path of the function, `package.module:function`, in an installed package or in the working
    directory of `tfkd`, where it also runs."""
    args: dict[str, JsonValue] = {}
    """More arguments of the function."""

    def __hash__(self) -> int:
        return hash(json.dumps(self.model_dump(mode="json")))

    @property
    def called(self) -> str:
        """Return its path."""
        return self.path

    def check(self, shape: tuple[int, int, int]) -> None:
        if is_only_reading():
            return
        try:
            function = imported(self.path, "path")
        except ConfigError as error:
            raise ValueError(str(error)) from None
        if not callable(function):
            raise ValueError(f"path: {self.path} is {function!r}, not a function")
        try:
            inspect.signature(function).bind(shape=shape, num_classes=2, **self.args)
        except TypeError as error:
            raise ValueError(
                f"args: {self.path} is called with shape, num_classes and these: {error}"
            ) from None
        except ValueError:  # written in C, without a signature
            pass

    def build(self, shape: tuple[int, int, int], num_classes: int) -> nn.Module:
        self.check(shape)
        function = imported(self.path, "path")
        make = functools.partial(
            own_code.at_home(function), shape=shape, num_classes=num_classes, **self.args
        )
        return _tried(f"model {self.path}", make, shape, num_classes)


def _tried(
    what: str, make: Callable[[], Any], shape: tuple[int, int, int], num_classes: int
) -> nn.Module:
    """Return the module from `make`, wrapped to return logits only.

    Two empty images test it first, in eval mode and without a change of the random state. Any error
    becomes a ConfigError.
    """
    import torch
    from torch import nn

    images = [2, *shape]
    try:
        doing = f"being built for images {list(shape)} and {num_classes} classes"
        network = make()
        if not isinstance(network, nn.Module):
            raise ConfigError(
                f"{what}: gives {type(network).__name__}; a network is a torch.nn.Module"
            )
        doing = f"given images {images}"
        network.register_forward_hook(functools.partial(_only_logits, what, num_classes))
        training = network.training
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            logits = network.eval()(torch.zeros(images))
        if not logits.is_meta and not logits.isfinite().all():
            raise ConfigError(
                f"{what}: gives logits that are not finite numbers for images {images} of zeros"
            )
        return network.train(training)
    except ConfigError:
        raise
    except Exception as error:  # the author's code may raise anything
        raise ConfigError(f"{what}: {type(error).__name__} when {doing}: {error}") from error


def _only_logits(
    what: str, num_classes: int, module: nn.Module, inputs: tuple[Tensor, ...], output: Any
) -> Tensor:
    """Return the logits from a module's output; a forward hook."""
    from torch import Tensor

    logits = output
    if isinstance(output, Mapping):
        logits = output.get("logits", output.get("out"))
    elif not isinstance(output, Tensor):
        first = output[0] if isinstance(output, tuple | list) and output else output
        logits = getattr(output, "logits", getattr(output, "out", first))
    wanted = [inputs[0].shape[0], num_classes]
    if not isinstance(logits, Tensor) or list(logits.shape) != wanted:
        got = (
            list(logits.shape)
            if isinstance(logits, Tensor)
            else f"{type(output).__name__} without a tensor of them"
        )
        raise ConfigError(
            f"{what}: gives {got} for images {list(inputs[0].shape)}; logits of {num_classes} classes are {wanted}"
        )
    return logits


def check_learns(what: str, network: nn.Module) -> None:
    """Raise a ConfigError if a network has nothing to train."""
    if not any(parameter.requires_grad for parameter in network.parameters()):
        frozen = sum(1 for _ in network.parameters())
        why = f"all {frozen} have requires_grad False" if frozen else "it has none"
        raise ConfigError(
            f"model {what}: no parameter learns ({why}), so there is nothing to train; unfreeze at least its head"
        )
    _check_gradients_are_dense(what, network)


def _check_gradients_are_dense(what: str, network: nn.Module) -> None:
    """Raise a ConfigError if an embedding learns by sparse gradients, which fused SGD refuses."""
    from torch import nn

    for name, module in network.named_modules():
        embeds = isinstance(module, nn.Embedding | nn.EmbeddingBag)
        if embeds and module.sparse and module.weight.requires_grad:
            raise ConfigError(
                f"model {what}: {name} has sparse=True, and torch's fused SGD takes no sparse gradients; leave it out"
            )


def check_lone_image(what: str, network: nn.Module, shape: tuple[int, int, int]) -> None:
    """Raise a ConfigError if a network cannot train on one image per worker, as with BatchNorm."""
    import torch

    first = next(network.parameters())
    lone = "optim.batch_size: leaves a single image a worker in a step"
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            copy.deepcopy(network).train()(
                torch.zeros(1, *shape, device=first.device, dtype=first.dtype)
            )
    except Exception as error:  # the author's code may raise anything
        if "more than 1 value per channel" in str(error):
            raise ConfigError(
                f"{lone}, and BatchNorm of model {what} needs two at least; raise it to 2 times workers (times "
                "optim.accumulate) or more, or use a network without BatchNorm"
            ) from None
        raise ConfigError(
            f"{lone}, and model {what} fails on it ({type(error).__name__}: {error}); raise it to 2 times workers or "
            "more"
        ) from None


_KEEP_GRADIENTS = {"DropPath", "StochasticDepth"}
"""Modules of timm and torchvision that multiply by random zeros, like dropout: their zero gradients
still exist."""


def may_lack_gradients(network: nn.Module, shape: tuple[int, int, int]) -> bool:
    """Return whether a trainable parameter may get no gradient in a step, which DDP must know.

    Two steps are tried on a copy. If the forward pass can vary what it uses (it draws random
    numbers other than dropout's, reads tensor values, or counts steps), a parameter may lack a
    gradient in a later step or on another worker. A network that cannot be tried counts as varying.
    """
    import torch
    from torch import nn

    from tfkd_ray.learn.blocks import ValuesUsed

    try:
        tried = copy.deepcopy(network).train()
        for module in tried.modules():
            if (
                isinstance(module, nn.modules.dropout._DropoutNd)
                or type(module).__name__ in _KEEP_GRADIENTS
            ):
                module.eval()
        first = next(tried.parameters())
        images = torch.randn(2, 2, *shape, generator=torch.Generator().manual_seed(0)).to(
            first.device, first.dtype
        )
        kept = _kept_by(tried)
        with seeded(0, "gradients"), ValuesUsed() as values:  # type: ignore[no-untyped-call]
            position = random_position()
            for batch in images:
                tried.zero_grad()
                tried(batch).sum().backward()
                if any(p.requires_grad and p.grad is None for p in tried.parameters()):
                    return True
            return values.seen or random_position() != position or _kept_by(tried) != kept
    except Exception:
        return True


def _kept_by(network: nn.Module) -> list[Any]:
    """Return what modules keep between steps, except parameters and normalisation statistics.

    That is any attribute by its `repr`, which shows counts inside lists and iterators; and the
    numbers of the author's classes and Python modules.
    """
    import torch
    from torch import nn

    inner = vars(nn.Module()).keys()  # parameters, submodules, hooks
    found = list[Any]()
    for module in network.modules():
        own = {name: value for name, value in vars(module).items() if name not in inner}
        found.append(
            {
                name: value.tolist() if isinstance(value, torch.Tensor) else repr(value)
                for name, value in own.items()
                if not isinstance(value, nn.Module)
            }
        )
        for kind in type(module).__mro__:
            if kind.__module__.partition(".")[0] not in ("torch", "builtins"):
                places = (vars(kind), vars(sys.modules.get(kind.__module__, nn)))
                found += [_counts_in(place) for place in places]
        if not isinstance(module, nn.modules.batchnorm._NormBase):
            found += [buffer.tolist() for buffer in module.buffers(recurse=False)]
    return found


def _counts_in(names: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in names.items() if isinstance(value, int | float)}


def last_step(network: nn.Module, shape: tuple[int, int, int]) -> str | None:
    """Return "softmax" or "sigmoid" if a network outputs numbers in 0..1, not logits; else None.

    Of softmax, rows sum to 1. Outputs that are the same for all images are of neither.
    """
    import torch

    images = 100 * torch.randn(8, *shape, generator=torch.Generator().manual_seed(0))
    rows = _logits_of(network, images)
    if rows.is_meta or not bool(((rows >= 0) & (rows <= 1.01)).all()):
        return None
    if bool(((rows.float().sum(dim=1) - 1).abs() < 1e-2).all()):
        return "softmax"
    return "sigmoid" if bool((rows != rows[0]).any()) and bool((rows <= 1).all()) else None


def what_a_seed_leaves_open(
    first: nn.Module, second: nn.Module, shape: tuple[int, int, int]
) -> str | None:
    """Return what differs between two networks that were built alike, from the same seed.

    "weights": the initial ones. "logits": those of the same weights, as by random numbers that are
    kept elsewhere. None: nothing. The second network gets the weights of the first.
    """
    import torch

    mine, others = first.state_dict(), second.state_dict()
    other = [name for name, value in mine.items() if not _equal(value, others.get(name))]
    if mine.keys() != others.keys():
        return "weights"
    second.load_state_dict(mine)
    images = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    with seeded(0, "built again"):
        one = _logits_of(first, images)
    with seeded(0, "built again"):
        two = _logits_of(second, images)
    if not one.is_meta and not torch.allclose(one, two, rtol=1e-3, atol=1e-5):
        return "logits"
    return "weights" if other else None


def _equal(a: Tensor, b: Tensor | None) -> bool:
    return b is not None and (a.is_meta or a.nan_to_num().equal(b.nan_to_num()))


def _logits_of(network: nn.Module, images: Tensor) -> Tensor:
    """Return a network's output in eval mode; change neither its mode nor the random state."""
    import torch

    training = network.training
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        rows: Tensor = network.eval()(images)
    network.train(training)
    return rows


def _shorthand(value: Any) -> Any:
    """Accept `timm:NAME` and `package.module:function` as shorthands for settings."""
    tree = name_alone(value)
    name = tree.get("name") if isinstance(tree, dict) else None
    if isinstance(name, str) and name.startswith("timm:"):
        return {**tree, "name": "timm", "model": name.removeprefix("timm:")}
    return own_code.spelled_out(tree)


Model = Annotated[
    Mlp
    | Cnn
    | Cnn5
    | AlexNetSmall
    | WideResNet
    | AlexNet
    | ResNet18
    | ResNet34
    | ResNet50
    | ResNet101
    | ResNeXt29
    | ResNeXt50
    | ResNeXt101
    | MobileNetV2
    | ShuffleNetV2
    | GoogLeNet
    | DenseNet121
    | Vgg16
    | Vgg19
    | ViTTiny
    | ConvNeXtAtto
    | ConvNeXtFemto
    | ConvNeXtTiny
    | Timm
    | OwnNetwork,
    Field(discriminator="name"),
    BeforeValidator(_shorthand),
]
