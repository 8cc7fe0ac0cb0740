"""Augmentation on batches of tensors, on any device: crop, flip and rotation in one gather.

The augmentation of an image is a function of (seed, epoch, position in the official train set)
only. The split, the batch, the worker and the number of reads do not change it. Only the partner
with which mixup and cutmix mix an image depends on the split, too; see mixing.py.

An image is cropped, flipped and rotated, then changed by TrivialAugment or RandAugment, normalised,
erased, and mixed last with its partner, which is seen as its own view of the epoch.

Shapes: N = images of the official set, B = batch, C = channels, H, W = height and width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple, Self

from pydantic import (
    BeforeValidator,
    Field,
    SerializerFunctionWrapHandler,
    TypeAdapter,
    ValidationError,
    model_serializer,
    model_validator,
)

from tfkd_ray.learn.images import Images, generator
from tfkd_ray.learn.mixing import Mix, Mixed, drawn_mix, within
from tfkd_ray.settings.schema import Settings

if TYPE_CHECKING:
    import torch
    from torch import Tensor


IN_CACHE = 64
"""Images that are moved together on a CPU: 256 of 32x32 at once take about twice as long."""


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
    op: Tensor | None = None
    """int64 [N, R]: operations of TrivialAugment or RandAugment by number; see policies.py."""
    strength: Tensor | None = None
    """float32 [N, R]: strengths of these operations."""
    hole: Tensor | None = None
    """float32 [N, 5], uniform in [0, 1): draws of random erasing."""

    def of(self, index: Tensor | slice) -> View:
        """Return the draws of the images at some indices."""
        return self._each(lambda part: part[index])

    def on(self, device: torch.device) -> View:
        """Return the same draws on a device."""
        return self._each(lambda part: part.to(device))

    def _each(self, change: Callable[[Tensor], Tensor]) -> View:
        parts = [None if part is None else change(part) for part in self]
        return View(*parts)  # type: ignore[arg-type]


class EpochView(NamedTuple):
    """How an epoch sees the train images of a split."""

    view: View
    """Draws of each image of the split."""
    mix: Mix | None
    """Partners of the images; None without mixup and cutmix."""

    def of_each(self, batches: Sequence[Tensor], device: torch.device) -> Iterator[View]:
        """Yield the draws of each batch of indices, on a device.

        Operations stay on the CPU, where they decide what is computed: no step waits for a GPU.
        """
        op = self.view.op
        there = self.view._replace(op=None).on(device)
        plans = batches if op is None else [batch.cpu() for batch in batches]
        for index, plan in zip(batches, plans, strict=True):
            drawn = there.of(index)
            yield drawn if op is None else drawn._replace(op=op[plan])

    def labels_of(self, hard: Tensor) -> Callable[[Tensor], Tensor | Mixed]:
        """Return the function that gives the labels of a batch of indices.

        Args:
            hard: int64 [n], the labels of the split.
        """
        if self.mix is None:
            return hard.__getitem__
        return self.mix.on(hard.device).labels(hard).of


def _as_coin(value: Any) -> Any:
    if value == "alternating":
        return value
    try:
        return TypeAdapter(bool).validate_python(value)
    except ValidationError:
        raise ValueError(f"must be true, false or alternating, got {value!r}") from None


class RandAugment(Settings):
    """RandAugment, as in torchvision. (Cubuk et al. 2019, arXiv:1909.13719.)"""

    ops: Annotated[int, Field(ge=1, le=14)] = 2
    """Number of operations, one after the other, each drawn from 14."""
    magnitude: Annotated[int, Field(ge=0, le=30)] = 9
    """Level of strength of every operation."""


class Augment(Settings):
    """Random crop of the zero-padded image, horizontal flip and rotation, in the paper's order.

    Then TrivialAugment or RandAugment, random erasing, and mixup or cutmix with another train image
    of the split.
    """

    later: ClassVar[frozenset[str]] = frozenset({"trivial", "rand", "erase", "mixup", "cutmix"})

    resized_crop: bool = False
    """Crop 8 to 100 % of the area, with sides of 3:4 to 4:3, and resize it, as for ImageNet
    (Szegedy et al. 2014, arXiv:1409.4842). Only for data sets that decode image files while
    training: the crop is part of decoding."""

    crop_padding: Annotated[int, Field(ge=0, le=64)] = 0
    """Pixels of black padding on each side before a random crop. 0: no crop. The paper uses 4."""
    flip: Annotated[bool | Literal["alternating"], BeforeValidator(_as_coin)] = False
    """Mirror half of the images. alternating: a coin decides for the first epoch, and each image is
    mirrored in every other epoch (Jordan 2024, arXiv:2404.00498)."""
    rotation_degrees: Annotated[float, Field(ge=0, le=180)] = 0.0
    """Largest rotation in degrees, in either direction; nearest pixel, black corners. The paper
    uses 15."""

    trivial: bool = False
    """TrivialAugment, its wide version: one of 14 operations of random strength on each image, as in
    torchvision: translations by up to 32 pixels, nearest pixel, black corners. (Müller and Hutter
    2021, arXiv:2103.10158.)"""
    rand: RandAugment | None = None
    """RandAugment in place of `trivial`: `{ops, magnitude}`."""
    erase: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Probability of erasing a rectangle of 2 to 33 % of the area, with sides of 3:10 to 33:10: it
    becomes the data set's mean. (Zhong et al. 2017, arXiv:1708.04896.) 0: none."""
    mixup: Annotated[float, Field(ge=0, le=100)] = 0.0
    """alpha: mixes each image and its label with another one, with a share from Beta(alpha, alpha).
    (Zhang et al. 2017, arXiv:1710.09412.) 0: none."""
    cutmix: Annotated[float, Field(ge=0, le=100)] = 0.0
    """alpha: pastes a box of another image into each, 1 - share of its area, with the share from
    Beta(alpha, alpha); the label is mixed by the area that is left. (Yun et al. 2019,
    arXiv:1905.04899.) 0: none. With `mixup`, a coin decides for each image and epoch."""

    @model_validator(mode="after")
    def _one_policy(self) -> Self:
        if self.trivial and self.rand is not None:
            raise ValueError(
                "trivial and rand: one of the two; leave rand out, or set trivial: false"
            )
        return self

    @model_serializer(mode="wrap")
    def _as_before(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Return the settings, without those that are `later` and neutral."""
        tree: dict[str, Any] = handler(self)
        for name in self.later:
            if not tree[name]:
                del tree[name]
        return tree

    @property
    def is_none(self) -> bool:
        """Return whether augmentation leaves every decoded image unchanged."""
        return not (self.varies or self.erase or self.mixes)

    @property
    def is_fixed(self) -> bool:
        """Return whether images look the same in all epochs."""
        return self.is_none and not self.resized_crop

    @property
    def mixes(self) -> bool:
        """Return whether images are mixed, and their labels with them."""
        return bool(self.mixup or self.cutmix)

    @property
    def varies(self) -> bool:
        """Return whether decoded images are changed before they are normalised."""
        return self._moves or self.has_policy

    @property
    def _moves(self) -> bool:
        return bool(self.crop_padding or self.flip or self.rotation_degrees)

    @property
    def has_policy(self) -> bool:
        """Return whether TrivialAugment or RandAugment changes the images."""
        return self.trivial or self.rand is not None

    def key(self, seed: int, epoch: int) -> dict[str, Any]:
        """Return the key of an epoch's view; without random augmentation all epochs share one."""
        which = {} if self.is_fixed else {"seed": seed, "epoch": epoch}
        return {"split": "train", "augment": self.model_dump(mode="json"), **which}

    def of_epoch(self, seed: int, epoch: int, images: Images, size: tuple[int, int]) -> EpochView:
        """Return how an epoch sees the train images of a split, on the CPU.

        Args:
            size: (H, W).
        """
        view = self.view(seed, epoch, images.official_size).of(images.positions)
        if not self.mixes:
            return EpochView(view, None)
        return EpochView(view, drawn_mix(images, size, seed, epoch, self.mixup, self.cutmix))

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
        view = View(
            offsets[0], offsets[1], (coins < 0.5) & bool(self.flip), (2 * turns - 1) * reach, crop
        )
        if self.flip == "alternating":
            first = torch.rand(official_size, generator=generator(seed, "flip")) < 0.5
            view = view._replace(flipped=first ^ (epoch % 2 == 1))
        if self.has_policy or self.erase:
            view = self._with_later_draws(view, seed, epoch, official_size)
        return view

    def _with_later_draws(self, view: View, seed: int, epoch: int, official_size: int) -> View:
        from tfkd_ray.learn.policies import drawn_holes, drawn_policy

        if self.has_policy:
            asked = self.rand.model_dump() if self.rand else {}
            op, strength = drawn_policy(official_size, seed, epoch, **asked)
            view = view._replace(op=op, strength=strength)
        if self.erase:
            view = view._replace(hole=drawn_holes(official_size, seed, epoch))
        return view

    def __call__(self, images: Tensor, view: View) -> Tensor:
        """Return augmented images [B, C, H, W], same dtype; `view` holds the draws of these B.

        They are not yet erased or mixed; see `erased` and `Mix`.
        """
        if self._moves:
            images = self._moved(images, view)
        if view.op is None or view.strength is None:
            return images
        from tfkd_ray.learn.policies import distorted

        return distorted(images, view.op, view.strength, relative=self.rand is not None)

    def erased(self, images: Tensor, view: View) -> Tensor:
        """Return normalised images [B, C, H, W] with erased rectangles, which are 0."""
        if view.hole is None:
            return images
        from tfkd_ray.learn.policies import erased

        return erased(images, view.hole, self.erase)

    def normalised(
        self, images: Tensor, view: View, scale: Sequence[Tensor], mix: Mix | None = None
    ) -> Tensor:
        """Return augmented images normalised, erased and mixed, as a network sees them.

        Args:
            images: [B, C, H, W]; with a mix [2 B, C, H, W], the images and then their partners.
            view: draws of all these.
            scale: mean and deviation of the channels, [1, C, 1, 1] each.
            mix: of the B images.
        """
        mean, std = scale
        normal = images.to(mean.dtype, copy=True).sub_(mean).div_(std)
        normal = self.erased(normal, view)
        return normal if mix is None else mix(*normal.chunk(2))

    def _moved(self, images: Tensor, view: View) -> Tensor:
        """Return cropped, flipped and rotated images."""
        import torch

        if images.device.type == "cpu" and len(images) > IN_CACHE:
            parts = [slice(k, k + IN_CACHE) for k in range(0, len(images), IN_CACHE)]
            return torch.cat([self._moved(images[part], view.of(part)) for part in parts])
        from tfkd_ray.learn.policies import gathered

        B, _, H, W = images.shape
        top = (view.top - self.crop_padding).view(B, 1, 1)
        left = (view.left - self.crop_padding).view(B, 1, 1)
        flipped = view.flipped.float().view(B, 1, 1)
        y = torch.arange(H, dtype=torch.float32, device=images.device).view(1, H, 1)
        x = torch.arange(W, dtype=torch.float32, device=images.device).view(1, 1, W)
        if self.rotation_degrees:  # maps each output pixel to its source, last step first
            cos, sin = view.angle.cos().view(B, 1, 1), view.angle.sin().view(B, 1, 1)
            dy, dx = y - (H - 1) / 2, x - (W - 1) / 2
            x = (cos * dx - sin * dy).add_((W - 1) / 2).round_()
            y = (sin * dx + cos * dy).add_((H - 1) / 2).round_()
            if self.crop_padding:  # what is not in the crop is black
                crop = torch.cat([top, left, top + H, left + W], dim=1)
                images = images * within(crop, H, W, images.dtype)
        if self.flip:
            x = x * (1 - 2 * flipped) + (W - 1) * flipped
        return gathered(images, y + top, x + left)
