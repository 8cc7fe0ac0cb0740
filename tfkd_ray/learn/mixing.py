"""Mixed images and their labels: mixup, cutmix, and what an objective learns from both.

An image x of class a is mixed with a partner y of class b: mixup gives l * x + (1 - l) * y, cutmix
pastes a box of y into x, and l is the share of x that is left. Its label is the soft target
q = l * e_a + (1 - l) * e_b, kept as (a, b, l). Partner, l and box are functions of (seed, epoch,
image) and of the split: partners are train images of the split only, and may lie outside the batch.

Shapes: n = images of the split, B = batch, K = classes, H, W = height and width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from tfkd_ray.learn.images import Images, address, generator

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Mixed(NamedTuple):
    """The labels of mixed images: q = share * e_first + (1 - share) * e_second."""

    first: Tensor
    """int64 [B]: classes of the images."""
    second: Tensor
    """int64 [B]: classes of their partners."""
    share: Tensor
    """float32 [B]: l, the share of the image in its mix."""

    def of(self, index: Tensor) -> Mixed:
        """Return the labels of the images at some indices."""
        return Mixed(*(part[index] for part in self))

    def mean(self, first: Tensor, second: Tensor) -> Tensor:
        """Return share * first + (1 - share) * second, [B]."""
        share = self.share.to(first.dtype)
        return share * first + (1 - share) * second

    def expected(self, values: Tensor) -> Tensor:
        """Return the sum over classes of q * values, [B], of values [B, K]."""
        both = values.gather(1, self.both)
        return self.mean(both[:, 0], both[:, 1])

    @property
    def both(self) -> Tensor:
        """Return the two classes of each image, int64 [B, 2]."""
        import torch

        return torch.stack([self.first, self.second], dim=1)

    def probabilities(self, num_classes: int) -> Tensor:
        """Return q, float32 [B, K]."""
        import torch

        shares = torch.stack([self.share, 1 - self.share], dim=1)
        q = shares.new_zeros(len(shares), num_classes)
        return q.scatter_add(1, self.both, shares)


class Mix(NamedTuple):
    """How the images of a split are mixed in an epoch."""

    partner: Tensor
    """int64 [n]: index of each image's partner."""
    share: Tensor
    """float32 [n]: l."""
    weight: Tensor
    """float32 [n]: weight of the image outside its box: l of mixup, 1 of cutmix."""
    box: Tensor
    """int64 [n, 4]: top, left, bottom, right of the partner's box; empty of mixup."""

    def of(self, index: Tensor) -> Mix:
        """Return what concerns the images at some indices."""
        return Mix(*(part[index] for part in self))

    def on(self, device: torch.device) -> Mix:
        """Return the same on a device."""
        return Mix(*(part.to(device) for part in self))

    def labels(self, hard: Tensor) -> Mixed:
        """Return the labels of the mixes, of the hard labels of the split."""
        return Mixed(hard, hard[self.partner], self.share)

    def __call__(self, images: Tensor, partners: Tensor) -> Tensor:
        """Return the mixes [B, C, H, W] of float images with their partners; `self` is of these."""
        H, W = images.shape[-2:]
        inside = within(self.box, H, W, images.dtype)
        weight = self.weight.view(-1, 1, 1, 1).to(images.dtype)
        return partners.lerp(images, inside.neg_().add_(1).mul_(weight))


def within(box: Tensor, height: int, width: int, dtype: torch.dtype) -> Tensor:
    """Return [B, 1, H, W], 1 inside of boxes [B, 4] of top, left, bottom, right, and 0 outside.

    Numbers, not truth values: to multiply by those takes 5 times as long on a CPU.
    """
    import torch

    top, left, bottom, right = box.view(-1, 4, 1, 1, 1).unbind(1)
    y = torch.arange(height, device=box.device).view(1, 1, height, 1)
    x = torch.arange(width, device=box.device).view(1, 1, 1, width)
    rows, columns = (y >= top) & (y < bottom), (x >= left) & (x < right)
    return rows.to(dtype) * columns.to(dtype)


def drawn_mix(
    images: Images, size: tuple[int, int], seed: int, epoch: int, mixup: float, cutmix: float
) -> Mix:
    """Return the mix of an epoch, on the CPU.

    The images of the official set stand in a random circle; an image's partner is the next one
    that belongs to the split. So each train image is the partner of exactly one.

    Args:
        images: the train images of the split.
        size: (H, W).
        mixup: its alpha; 0: none. If both are given, a coin decides for each image.
        cutmix: likewise.
    """
    import torch

    count, positions = images.official_size, images.positions
    g = generator(seed, "mix", epoch)
    place = torch.randperm(count, generator=g)[positions]
    coins, down, right = torch.rand(3, count, generator=g)[:, positions]
    circle = place.argsort()
    partner = torch.empty_like(circle)
    partner[circle] = circle.roll(-1)
    boxed = coins < cutmix_chance(mixup, cutmix)
    share = _betas(seed, epoch, mixup, count)[positions]
    cut = _betas(seed, epoch, cutmix, count)[positions]
    box = _boxes(cut, down, right, size) * boxed[:, None]
    left_over = 1 - _area(box) / (size[0] * size[1])
    share = torch.where(boxed, left_over, share).float()
    return Mix(partner, share, share.masked_fill(boxed, 1), box)


def cutmix_chance(mixup: float, cutmix: float) -> float:
    """Return the probability that an image is mixed by cutmix rather than by mixup."""
    if not cutmix:
        return 0.0
    return 0.5 if mixup else 1.0


def _betas(seed: int, epoch: int, alpha: float, count: int) -> Tensor:
    """Return draws from Beta(alpha, alpha), float64 [count]; ones if alpha is 0."""
    import numpy as np
    import torch

    if not alpha:
        return torch.ones(count, dtype=torch.float64)
    # torch draws no Beta with a generator of one's own
    draws = np.random.Generator(np.random.PCG64(address(seed, "mix", epoch, "share")))
    return torch.from_numpy(draws.beta(alpha, alpha, count))


def _boxes(share: Tensor, down: Tensor, right: Tensor, size: tuple[int, int]) -> Tensor:
    """Return boxes int64 [n, 4] of sides sqrt(1 - share), cut off at the images' edges.

    Args:
        down: uniform in [0, 1): place of their centres.
        right: likewise.
    """
    import torch

    ends = []
    for place, side in ((down, size[0]), (right, size[1])):
        centre = (place * side).long().clamp(max=side - 1)
        half = (0.5 * (1 - share).sqrt() * side).long()
        ends.append(((centre - half).clamp(min=0), (centre + half).clamp(max=side)))
    (top, bottom), (left, right_end) = ends
    return torch.stack([top, left, bottom, right_end], dim=1)


def _area(box: Tensor) -> Tensor:
    return (box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1])
