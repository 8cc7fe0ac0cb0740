"""TrivialAugment, RandAugment and random erasing, on batches of tensors, on any device.

The operations, their strengths and their nearest-pixel sampling with black corners are those of
torchvision's `TrivialAugmentWide` and `RandAugment`. Images that drew the same operation are
computed together.

Shapes: N = images of the official set, B = batch, R = operations of an image, C = channels, H, W =
height and width.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from tfkd_ray.learn.images import generator
from tfkd_ray.learn.mixing import within

MAGNITUDES = 31
"""Levels of strength, from 0 to 30."""
ERASED_SHARE = (0.02, 0.33)
"""Smallest and largest share of an image's area that is erased."""
ERASED_SHAPE = (0.3, 3.3)
"""Smallest and largest ratio of the erased rectangle's height to its width."""


# --- geometry -------------------------------------------------------------------------------------


def gathered(images: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """Return new images [B, C, H, W] whose pixels are those at rows y and columns x; black outside.

    Args:
        y, x: whole numbers, float32, that broadcast to [B, H, W].
    """
    B, C, H, W = images.shape
    framed = pad(images, (1, 1, 1, 1)).flatten(2)  # a black frame needs no mask
    row, column = y.clamp(-1, H).int(), x.clamp(-1, W).int()
    place = torch.add(column, row, alpha=W + 2).add_(W + 3).long()
    index = place.view(B, 1, H * W).expand(B, C, H * W)
    return framed.gather(2, index).view(B, C, H, W)


def _displaced(images: Tensor, op: Tensor, strength: Tensor, *, relative: bool) -> Tensor:
    """Return images sheared, moved or rotated; `strength` in pixels or, if relative, in sides."""
    B, _, H, W = images.shape
    across = W if relative else 1
    down = H if relative else 1
    x = torch.arange(W, device=images.device, dtype=torch.float32).view(1, 1, W)
    y = torch.arange(H, device=images.device, dtype=torch.float32).view(1, H, 1)

    def only(name: str) -> Tensor:
        return (strength * (op == OPERATIONS.index(name))).view(B, 1, 1)

    turned = (op == OPERATIONS.index("rotate")).view(B, 1, 1)
    angle = torch.deg2rad(only("rotate"))
    cos, sin = angle.cos(), angle.sin()
    dx, dy = x - (W - 1) / 2, y - (H - 1) / 2
    # the source of each pixel, in terms of its column, its row and neither: one addition of whole
    # planes serves all operations; shears keep the upper left corner
    of_column = torch.where(turned, cos * dx, x)
    of_row = sin * dy - only("shear_x") * (y + 0.5)
    fixed = torch.where(turned, (W - 1) / 2, -(across * only("translate_x")).trunc())
    from_x = (of_column - of_row).add_(fixed).round_()
    of_column = sin * dx + only("shear_y") * (x + 0.5)
    of_row = torch.where(turned, cos * dy, y)
    fixed = torch.where(turned, (H - 1) / 2, -(down * only("translate_y")).trunc())
    from_y = (of_column + of_row).add_(fixed).round_()
    return gathered(images, from_y, from_x)


# --- colours: each takes images [B, C, H, W] and factors or levels [B, 1, 1, 1] -------------------


def _stretched(images: Tensor, other: Tensor, strength: Tensor) -> Tensor:
    """Return images, moved away from other ones by a strength, as uint8."""
    found = images * (1 + strength.double()).float()
    return found.addcmul_(-strength, other).clamp_(0, 255).to(torch.uint8)


def _grey(images: Tensor) -> Tensor:
    """Return the whole-numbered brightness of colour images; others as they are."""
    if images.shape[1] != 3:
        return images.float()
    red, green, blue = images.unbind(1)
    return (0.2989 * red + 0.587 * green + 0.114 * blue).floor_()[:, None]


def _brightness(images: Tensor, strength: Tensor) -> Tensor:
    return (images * (1 + strength.double()).float()).clamp_(0, 255).to(torch.uint8)


def _color(images: Tensor, strength: Tensor) -> Tensor:
    if images.shape[1] != 3:
        return images
    return _stretched(images, _grey(images), strength)


def _contrast(images: Tensor, strength: Tensor) -> Tensor:
    mean = _grey(images).mean(dim=(1, 2, 3), keepdim=True)
    return _stretched(images, mean, strength)


def _sharpness(images: Tensor, strength: Tensor) -> Tensor:
    if min(images.shape[-2:]) <= 2:
        return images
    plain = images.float()
    inner = plain[..., 1:-1, 1:-1]
    rows = plain[..., :-2, :] + plain[..., 1:-1, :] + plain[..., 2:, :]
    nine = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]
    blurred = ((nine + 4 * inner) / 13).round_()
    inner.sub_((blurred - inner) * strength)
    return plain.clamp_(0, 255).to(torch.uint8)


def _posterize(images: Tensor, strength: Tensor) -> Tensor:
    return images & (256 - 2 ** (8 - strength)).to(torch.uint8)


def _solarize(images: Tensor, strength: Tensor) -> Tensor:
    # rounded once, as thresholds may be whole numbers
    threshold = (255 * strength.double()).float().ceil().to(torch.uint8)
    bright = (images >= threshold).to(torch.uint8)
    return images ^ bright.mul_(255)


def _autocontrast(images: Tensor, strength: Tensor) -> Tensor:
    low = images.amin(dim=(2, 3), keepdim=True).float()
    high = images.amax(dim=(2, 3), keepdim=True).float()
    flat = low == high
    scale = (high - low).mul_(1 / 255).masked_fill_(flat, 1)
    return (images - low.masked_fill_(flat, 0)).div_(scale).clamp_(0, 255).to(torch.uint8)


def _equalize(images: Tensor, strength: Tensor) -> Tensor:
    from torchvision.transforms.v2 import functional  # type: ignore[import-untyped]

    found: Tensor = functional.equalize_image(images)
    return found


# --- policies -------------------------------------------------------------------------------------

MOVES = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")
RECOLOURINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "brightness": _brightness,
    "color": _color,
    "contrast": _contrast,
    "sharpness": _sharpness,
    "posterize": _posterize,
    "solarize": _solarize,
    "autocontrast": _autocontrast,
    "equalize": _equalize,
}
OPERATIONS = ("identity", *MOVES, *RECOLOURINGS)
"""Operations by number."""
SIGNED = OPERATIONS.index("sharpness")
"""Number of the last operation whose strength may be negative."""
WIDE: dict[str, float] = {
    "shear": 0.99,
    "translate": 32,
    "rotate": 135,
    "color": 0.99,
    "posterize": 6,
}
"""Largest strengths of TrivialAugment: translations in pixels, degrees, bits less than 8."""
RAND: dict[str, float] = {
    "shear": 0.3,
    "translate": 150 / 331,
    "rotate": 30,
    "color": 0.9,
    "posterize": 4,
}
"""Largest strengths of RandAugment: translations as a share of the side."""


def strengths(largest: dict[str, float]) -> Tensor:
    """Return the strength of each operation at each level, float32 [operations, MAGNITUDES]."""
    colours = ("brightness", "color", "contrast", "sharpness")
    ends = dict.fromkeys(colours, largest["color"])
    ends |= {name: largest[name.partition("_")[0]] for name in MOVES}
    rows = {name: torch.linspace(0, end, MAGNITUDES) for name, end in ends.items()}
    rows["posterize"] = (
        8 - torch.arange(MAGNITUDES) / ((MAGNITUDES - 1) / largest["posterize"])
    ).round()
    rows["solarize"] = torch.linspace(1, 0, MAGNITUDES)
    return torch.stack([rows.get(name, torch.zeros(MAGNITUDES)) for name in OPERATIONS])


def drawn_policy(
    count: int, seed: int, epoch: int, *, ops: int = 1, magnitude: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return the operations of each image of an epoch, int64 [N, R], and strengths [N, R].

    Args:
        count: N.
        ops: R.
        magnitude: level of RandAugment. None: TrivialAugment, which draws it.
    """
    g = generator(seed, "policy", epoch)
    op = torch.randint(len(OPERATIONS), (count, ops), generator=g)
    level = torch.randint(MAGNITUDES, (count, ops), generator=g)
    negative = torch.rand(count, ops, generator=g) < 0.5
    if magnitude is not None:
        level = torch.full_like(level, magnitude)
    strength = strengths(WIDE if magnitude is None else RAND)[op, level]
    return op, torch.where(negative & (op <= SIGNED), -strength, strength)


def distorted(images: Tensor, op: Tensor, strength: Tensor, *, relative: bool) -> Tensor:
    """Return uint8 images after their operations, one after the other.

    Args:
        op: int64 [B, R], on the CPU or the images' device; on the CPU, nothing waits for a GPU.
        strength: float32 [B, R], on the images' device.
        relative: whether translations are shares of the side, as RandAugment's.
    """
    device = images.device
    for ops, strengths_ in zip(op.unbind(1), strength.unbind(1), strict=True):
        order = ops.argsort()
        counts = ops.bincount(minlength=len(OPERATIONS)).tolist()
        by_op, back = ops[order].to(device, non_blocking=True), order.argsort()
        order = order.to(device, non_blocking=True)
        changed = images.index_select(0, order)
        _apply_in_place(changed, by_op, strengths_[order], counts, relative=relative)
        images = changed.index_select(0, back.to(device, non_blocking=True))
    return images


def _apply_in_place(
    images: Tensor, op: Tensor, strength: Tensor, counts: Sequence[int], *, relative: bool
) -> None:
    """Change images in place, which are sorted by their operation."""
    start = counts[0]
    end = start + sum(counts[1 : len(MOVES) + 1])
    if end > start:
        some = slice(start, end)
        images[some] = _displaced(images[some], op[some], strength[some], relative=relative)
    for count, change in zip(counts[len(MOVES) + 1 :], RECOLOURINGS.values(), strict=True):
        start, end = end, end + count
        if count:
            images[start:end] = change(images[start:end], strength[start:end].view(-1, 1, 1, 1))


# --- random erasing -------------------------------------------------------------------------------


def erased(images: Tensor, draws: Tensor, probability: float) -> Tensor:
    """Return normalised images with a rectangle set to 0, the data set's mean, in some of them.

    Args:
        draws: uniform in [0, 1), [B, 5]: coin, area, shape, row and column.
    """
    H, W = images.shape[-2:]
    hole = within(erased_box(draws, probability, H, W), H, W, images.dtype)
    return images * hole.neg_().add_(1)


def erased_box(draws: Tensor, probability: float, height: int, width: int) -> Tensor:
    """Return the erased rectangle of each image, int64 [B, 4]: top, left, bottom, right.

    Empty if the coin says so. A side that does not fit is cut to one pixel less than the image's.
    """
    coin, area, shape, row, column = draws.double().unbind(1)
    small, large = ERASED_SHARE
    flat, high = map(math.log, ERASED_SHAPE)
    pixels = height * width * (small + (large - small) * area)
    ratio = (flat + (high - flat) * shape).exp()
    sides = []
    for side, place, most in (
        ((pixels * ratio).sqrt(), row, height),
        ((pixels / ratio).sqrt(), column, width),
    ):
        length = side.round().long().clamp(max=most - 1)
        begin = (place * (most - length + 1)).long()
        sides.append((begin, begin + length * (coin < probability)))
    (top, bottom), (left, right) = sides
    return torch.stack([top, left, bottom, right], dim=1)


def drawn_holes(count: int, seed: int, epoch: int) -> Tensor:
    """Return the draws of random erasing of each image of an epoch, [N, 5]; see `erased`."""
    return torch.rand(count, 5, generator=generator(seed, "erase", epoch))
