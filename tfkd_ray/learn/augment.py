"""Augmentation on batches of tensors, on any device: crop, flip and rotation in one gather.

The augmentation of an image is a function of (seed, epoch, position in the official train set)
only. The split, the batch, the worker and the number of reads do not change it.

Shapes: N = images of the official set, B = batch, C = channels, H, W = height and width.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from pydantic import Field

from tfkd_ray.learn.images import generator
from tfkd_ray.settings.schema import Settings

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class View(NamedTuple):
    """The random draws of one epoch, for every image of a set."""

    top: Tensor
    """int64 [N]: rows between the padded image's top and the crop's."""
    left: Tensor
    """int64 [N]: columns between the padded image's left edge and the crop's."""
    flipped: Tensor
    """bool [N]: True if the image is mirrored."""
    angle: Tensor
    """float32 [N]: counter-clockwise, in radians."""
    crop: Tensor
    """float32 [N, 4], uniform in [0, 1): size, shape, top and left of a resized crop; [N, 0]
    without one."""

    def of(self, index: Tensor) -> View:
        """Return the draws of the images at some indices."""
        return View(*(part[index] for part in self))

    def on(self, device: torch.device) -> View:
        """Return the same draws on a device."""
        return View(*(part.to(device) for part in self))


class Augment(Settings):
    """Random crop of the zero-padded image, horizontal flip and rotation, in the paper's order."""

    resized_crop: bool = False
    """Crop 8 to 100 % of the area, with sides of 3:4 to 4:3, and resize it, as for ImageNet
    (Szegedy et al. 2014, arXiv:1409.4842). Only for data sets that decode image files while
    training: the crop is part of decoding."""

    crop_padding: Annotated[int, Field(ge=0, le=64)] = 0
    """Pixels of black padding on each side before a random crop. 0: no crop. The paper uses 4."""
    flip: bool = False
    """Mirror half of the images."""
    rotation_degrees: Annotated[float, Field(ge=0, le=180)] = 0.0
    """Largest rotation in degrees, in either direction; nearest pixel, black corners. The paper
    uses 15."""

    @property
    def is_none(self) -> bool:
        """Return whether augmentation leaves every decoded image unchanged."""
        return not (self.crop_padding or self.flip or self.rotation_degrees)

    def key(self, seed: int, epoch: int) -> dict[str, Any]:
        """Return the key of an epoch's view; without random augmentation all epochs share one."""
        fixed = self.is_none and not self.resized_crop
        which = {} if fixed else {"seed": seed, "epoch": epoch}
        return {"split": "train", "augment": self.model_dump(mode="json"), **which}

    def view(self, seed: int, epoch: int, official_size: int) -> View:
        """Return the view of all N images of an official set in an epoch, on the CPU."""
        import torch

        g = generator(seed, "augment", epoch)
        offsets = torch.randint(0, 2 * self.crop_padding + 1, (2, official_size), generator=g)
        coins, turns = (
            torch.rand(official_size, generator=g),
            torch.rand(official_size, generator=g),
        )
        reach = math.radians(self.rotation_degrees)
        crop = torch.rand(official_size, 4 if self.resized_crop else 0, generator=g)
        return View(
            offsets[0], offsets[1], (coins < 0.5) & self.flip, (2 * turns - 1) * reach, crop
        )

    def __call__(self, images: Tensor, view: View) -> Tensor:
        """Return augmented images [B, C, H, W], same dtype; `view` holds the draws of these B."""
        import torch

        if self.is_none:
            return images
        B, C, H, W = images.shape
        y = torch.arange(H, device=images.device).view(1, H, 1).expand(B, H, W)
        x = torch.arange(W, device=images.device).view(1, 1, W).expand(B, H, W)
        inside = None
        if self.rotation_degrees:  # maps each output pixel to its source, last step first
            cos, sin = view.angle.cos().view(B, 1, 1), view.angle.sin().view(B, 1, 1)
            dy, dx = y - (H - 1) / 2, x - (W - 1) / 2
            x, y = (
                (cos * dx - sin * dy + (W - 1) / 2).round().long(),
                (sin * dx + cos * dy + (H - 1) / 2).round().long(),
            )
            inside = (x >= 0) & (x < W) & (y >= 0) & (y < H)
        if self.flip:
            x = torch.where(view.flipped.view(B, 1, 1), W - 1 - x, x)
        if self.crop_padding:
            x, y = (
                x + view.left.view(B, 1, 1) - self.crop_padding,
                y + view.top.view(B, 1, 1) - self.crop_padding,
            )
            within = (x >= 0) & (x < W) & (y >= 0) & (y < H)
            inside = within if inside is None else inside & within
        index = (y.clamp(0, H - 1) * W + x.clamp(0, W - 1)).view(B, 1, H * W).expand(B, C, H * W)
        seen = images.view(B, C, H * W).gather(2, index).view(B, C, H, W)
        return seen if inside is None else seen * inside.view(B, 1, H, W)
