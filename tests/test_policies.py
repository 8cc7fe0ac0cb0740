"""TrivialAugment, RandAugment and random erasing against torchvision v2, image by image."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import InterpolationMode, functional

from tfkd_ray.learn.augment import Augment, RandAugment
from tfkd_ray.learn.policies import (
    MAGNITUDES,
    OPERATIONS,
    RAND,
    WIDE,
    distorted,
    erased,
    erased_box,
    strengths,
)

THEIRS = ("Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness", "Color", "Contrast",
          "Sharpness", "Posterize", "Solarize", "AutoContrast", "Equalize")  # fmt: skip
POLICIES: dict[str, Any] = {"wide": v2.TrivialAugmentWide(), "rand": v2.RandAugment()}
EXACT = {
    "Identity",
    "TranslateX",
    "TranslateY",
    "Posterize",
    "Solarize",
    "AutoContrast",
    "Equalize",
}


def made(count: int, shape: tuple[int, int, int]) -> Tensor:
    """Return images of smooth shapes and of noise, a dark one and one of a single colour."""
    g = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (count, *shape), dtype=torch.uint8, generator=g)
    coarse = torch.rand(count, shape[0], 4, 4, generator=g) * 255
    smooth = torch.nn.functional.interpolate(coarse, shape[1:], mode="bilinear").to(torch.uint8)
    images = torch.where(torch.arange(count).view(-1, 1, 1, 1) % 2 == 0, noise, smooth)
    images[-1], images[-2] = 7, images[-2] // 8
    return images


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 8, 8), (3, 20, 33)], ids=str)
@pytest.mark.parametrize("policy", ["wide", "rand"])
@pytest.mark.parametrize("number", range(len(OPERATIONS)), ids=OPERATIONS)
def test_every_operation_is_torchvisions_at_every_level(
    number: int, policy: str, shape: tuple[int, int, int]
) -> None:
    """Nearest pixels may be rounded either way; colours may be cut down from 1 less than a whole."""
    theirs, name = POLICIES[policy], THEIRS[number]
    levels, signed = theirs._AUGMENTATION_SPACE[name]
    table = levels(MAGNITUDES, *shape[1:])
    ours = strengths(WIDE if policy == "wide" else RAND)[number]
    signs = (1, -1) if signed else (1,)
    images = made(6, shape)
    for level in (0, 1, 6, 9, 12, 22, 30):
        for sign in signs:
            magnitude = 0.0 if table is None else sign * float(table[level])
            wanted = theirs._apply_image_or_video_transform(
                images,
                name,
                magnitude,
                interpolation=InterpolationMode.NEAREST,
                fill={torch.Tensor: None},
            )
            strength = (sign * ours[level]).repeat(6, 1)
            op = torch.full((6, 1), number)
            found = distorted(images, op, strength, relative=policy == "rand")
            unlike = found != wanted
            assert found.dtype == torch.uint8 and found.shape == images.shape
            if number <= OPERATIONS.index("rotate"):
                assert unlike.any(dim=1).float().mean() <= (0 if name in EXACT else 0.01), (
                    level,
                    sign,
                )
            else:
                away = (found.int() - wanted.int()).abs().max()
                assert away <= (0 if name in EXACT else 1), (level, sign)
                assert unlike.float().mean() <= 0.01, (level, sign)


@pytest.mark.parametrize("relative", [False, True])
def test_moved_images_take_exactly_the_pixels_of_the_formula(relative: bool) -> None:
    count, (H, W) = 200, (20, 33)
    images = made(count, (3, H, W))
    op = torch.arange(count)[:, None] % 5 + 1
    level = torch.arange(count)[:, None] % MAGNITUDES
    strength = (
        strengths(RAND if relative else WIDE)[op, level] * (-1.0) ** torch.arange(count)[:, None]
    )
    shear_x, shear_y, across, down, turn = (
        torch.where(op == k, strength, 0.0).view(count, 1, 1) for k in range(1, 6)
    )
    y, x = torch.arange(float(H)).view(1, H, 1), torch.arange(float(W)).view(1, 1, W)
    dy, dx, angle = y - (H - 1) / 2, x - (W - 1) / 2, torch.deg2rad(turn)
    column = angle.cos() * dx - angle.sin() * dy + (W - 1) / 2 + shear_x * (y + 0.5)
    column = (column - (across * (W if relative else 1)).trunc()).round().long()
    row = angle.sin() * dx + angle.cos() * dy + (H - 1) / 2 + shear_y * (x + 0.5)
    row = (row - (down * (H if relative else 1)).trunc()).round().long()
    inside = (column >= 0) & (column < W) & (row >= 0) & (row < H)
    at = torch.arange(count).view(count, 1, 1)
    taken = images.movedim(1, 3)[at, row.clamp(0, H - 1), column.clamp(0, W - 1)].movedim(3, 1)
    assert distorted(images, op, strength, relative=relative).equal(taken * inside[:, None])


def test_operations_are_named_as_in_torchvision() -> None:
    for theirs in POLICIES.values():
        assert tuple(theirs._AUGMENTATION_SPACE) == THEIRS
    assert [name.lower() for name in THEIRS] == [name.replace("_", "") for name in OPERATIONS]


@pytest.mark.parametrize(
    "augment", [Augment(trivial=True), Augment(rand=RandAugment(ops=3))], ids=["trivial", "rand"]
)
def test_an_image_alone_is_changed_as_in_any_batch(augment: Augment) -> None:
    images, view = made(40, (3, 32, 32)), augment.view(0, 1, 40)
    whole = augment(images, view)
    assert not whole.equal(images)
    index = torch.tensor([3, 17, 0])
    assert augment(images[index], view.of(index)).equal(whole[index])
    for k in range(40):
        alone = torch.tensor([k])
        assert augment(images[alone], view.of(alone)).equal(whole[alone])


def test_rounds_follow_each_other() -> None:
    images = made(8, (3, 32, 32))
    op, strength = torch.tensor([[6, 10]] * 8), torch.tensor([[0.5, 4.0]] * 8)
    wanted = functional.posterize(functional.adjust_brightness(images, 1.5), 4)
    assert distorted(images, op, strength, relative=True).equal(wanted)


def test_operations_and_levels_are_drawn_evenly() -> None:
    view = Augment(trivial=True).view(0, 0, 28_000)
    assert view.op is not None and view.strength is not None
    assert view.op.flatten().bincount().tolist() == pytest.approx([2000] * 14, rel=0.1)
    shears = view.strength[view.op == OPERATIONS.index("shear_x")]
    assert shears.abs().max() == pytest.approx(0.99) and (
        shears < 0
    ).float().mean() == pytest.approx(0.5, abs=0.04)
    assert (view.strength[view.op > OPERATIONS.index("sharpness")] >= 0).all()
    rand = Augment(rand=RandAugment(ops=2, magnitude=30)).view(0, 0, 100)
    assert rand.op is not None and rand.op.shape == (100, 2)


# --- random erasing


@pytest.mark.parametrize("size", [(32, 32), (8, 8), (20, 33)], ids=str)
def test_erasing_is_torchvisions_with_a_rectangle_that_it_could_draw(size: tuple[int, int]) -> None:
    H, W = size
    draws = torch.rand(400, 5, generator=torch.Generator().manual_seed(0))
    images = torch.randn(400, 3, H, W, generator=torch.Generator().manual_seed(1))
    boxes = erased_box(draws, 1.0, H, W)
    found = erased(images, draws, 1.0)
    for k in range(400):
        _, area, shape, row, column = draws[k].tolist()
        pixels = H * W * (0.02 + 0.31 * area)
        ratio = math.exp(math.log(0.3) + (math.log(3.3) - math.log(0.3)) * shape)
        h, w = (
            min(round(math.sqrt(pixels * ratio)), H - 1),
            min(round(math.sqrt(pixels / ratio)), W - 1),
        )
        i, j = int(row * (H - h + 1)), int(column * (W - w + 1))
        assert boxes[k].tolist() == [i, j, i + h, j + w]
        assert found[k].equal(functional.erase(images[k], i, j, h, w, torch.zeros(1)))


def test_the_erased_share_is_that_of_torchvision() -> None:
    draws = torch.rand(4000, 5, generator=torch.Generator().manual_seed(0))
    box = erased_box(draws, 1.0, 32, 32)
    ours = ((box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1])).double() / 1024
    torch.manual_seed(0)
    theirs = v2.RandomErasing(p=1)
    drawn = [theirs.make_params([torch.ones(3, 32, 32)]) for _ in range(1000)]
    mean = sum(one["h"] * one["w"] for one in drawn) / 1024 / len(drawn)
    assert float(ours.mean()) == pytest.approx(mean, abs=0.01)
    assert ours.min() > 0.01 and ours.max() < 0.36


def test_the_coin_decides_which_images_are_erased() -> None:
    draws = torch.rand(10_000, 5, generator=torch.Generator().manual_seed(0))
    images = torch.ones(10_000, 1, 8, 8)
    changed = (erased(images, draws, 0.25) != images).flatten(1).any(1)
    assert changed.equal(draws[:, 0] < 0.25)
    assert erased(images, draws, 0.0).equal(images)
