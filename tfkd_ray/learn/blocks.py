"""Modules that torch lacks; `models.py` imports them when it builds or tries a network.

Shapes: B = batch, C = channels, H, W = height and width.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode


class MeanOfMap(nn.AdaptiveAvgPool2d):
    """Global average pooling whose gradient has the same memory format as its input.

    Torch's own pooling changes the format, which makes the backward pass of a preceding ReLU 20
    times slower.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad and not torch.compiler.is_compiling():
            last = x.is_contiguous(memory_format=torch.channels_last)
            order = torch.channels_last if last else torch.contiguous_format
            x.register_hook(lambda gradient: gradient.contiguous(memory_format=order))
        return super().forward(x)


class WideBlock(nn.Module):
    """BatchNorm, ReLU and 3x3 convolution, twice; a 1x1 shortcut if the shape changes."""

    def __init__(self, channels: int, out: int, *, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, out, 3, stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        same = channels == out and stride == 1
        self.shortcut = None if same else nn.Conv2d(channels, out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(x))
        shortcut = x if self.shortcut is None else self.shortcut(y)
        residual: Tensor = self.conv2(F.relu(self.norm2(self.conv1(y))))
        return residual + shortcut


class ValuesUsed(TorchDispatchMode):
    """Records whether code reads values of a tensor, on which its control flow may then depend."""

    seen = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen = self.seen or torch.Tag.data_dependent_output in func.tags
        return func(*args, **(kwargs or {}))
