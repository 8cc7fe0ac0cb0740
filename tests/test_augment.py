"""Augmentation against torchvision's, and its randomness by (seed, epoch, image)."""

import math

import pytest
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as tv

from tfkd_ray.learn.augment import Augment
from tfkd_ray.learn.config import TrainConfig
from tfkd_ray.learn.loop import train
from tfkd_ray.learn.objectives import CrossEntropy

PAPER = Augment(crop_padding=4, flip=True, rotation_degrees=15)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randint(
        1, 256, (64, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )


@pytest.mark.parametrize(
    "augment",
    [
        Augment(crop_padding=4),
        Augment(flip=True),
        Augment(rotation_degrees=15),
        Augment(rotation_degrees=180),
        PAPER,
    ],
    ids=["crop", "flip", "rotation", "rotation 180", "paper"],
)
def test_it_is_torchvisions_crop_flip_and_rotation(images: torch.Tensor, augment: Augment) -> None:
    view = augment.view(seed=0, epoch=3, official_size=64)
    ours = augment(images, view)
    for k in range(64):
        padded = tv.pad(images[k], [augment.crop_padding])
        one = tv.crop(padded, int(view.top[k]), int(view.left[k]), 32, 32)
        one = tv.hflip(one) if view.flipped[k] else one
        if augment.rotation_degrees:
            one = tv.rotate(one, math.degrees(float(view.angle[k])), InterpolationMode.NEAREST)
        unlike = (ours[k] != one).any(dim=0).float().mean()
        assert unlike <= (
            0.01 if augment.rotation_degrees else 0
        )  # pixels between two others, rounded either way
    assert ours.dtype == torch.uint8 and ours.shape == images.shape


def test_a_rotated_crop_takes_exactly_the_pixels_of_its_formula() -> None:
    g = torch.Generator().manual_seed(0)
    images = torch.randint(1, 256, (100, 3, 20, 33), dtype=torch.uint8, generator=g)
    augment = Augment(crop_padding=6, flip=True, rotation_degrees=180)
    view = augment.view(0, 0, 100)
    y, x = torch.arange(20).view(1, 20, 1), torch.arange(33).view(1, 1, 33)
    cos, sin, flipped = (
        t.view(100, 1, 1) for t in (view.angle.cos(), view.angle.sin(), view.flipped)
    )
    column = (cos * (x - 16.0) - sin * (y - 9.5) + 16.0).round().long()
    row = (sin * (x - 16.0) + cos * (y - 9.5) + 9.5).round().long()
    inside = (column >= 0) & (column < 33) & (row >= 0) & (row < 20)
    column = torch.where(flipped, 32 - column, column) + view.left.view(100, 1, 1) - 6
    row = row + view.top.view(100, 1, 1) - 6
    inside &= (column >= 0) & (column < 33) & (row >= 0) & (row < 20)
    at = torch.arange(100).view(100, 1, 1)
    taken = images.movedim(1, 3)[at, row.clamp(0, 19), column.clamp(0, 32)].movedim(3, 1)
    assert augment(images, view).equal(taken * inside[:, None])


def test_a_view_depends_on_seed_epoch_and_image_alone(images: torch.Tensor) -> None:
    view = PAPER.view(0, 1, 1000)
    again = PAPER.view(0, 1, 1000)
    assert all(a.equal(b) for a, b in zip(view[:5], again[:5], strict=True))
    assert view[5:] == again[5:] == (None, None, None)
    assert not view.angle.equal(PAPER.view(0, 2, 1000).angle) and not view.angle.equal(
        PAPER.view(1, 1, 1000).angle
    )
    some = torch.tensor([5, 3])
    assert PAPER(images[some], view.of(some)).equal(PAPER(images, view.of(torch.arange(64)))[some])


def test_the_draws_are_uniform() -> None:
    view = PAPER.view(0, 0, 20_000)
    assert view.top.bincount().tolist() == pytest.approx([20_000 / 9] * 9, rel=0.1)
    assert view.flipped.float().mean() == pytest.approx(0.5, abs=0.02)
    assert view.angle.abs().max() <= math.radians(15) and view.angle.mean().abs() < 0.005


def test_nothing_is_nothing(images: torch.Tensor) -> None:
    assert Augment().is_none and Augment()(images, Augment().view(0, 0, 64)) is images
    assert not PAPER.is_none


def test_float_images_are_seen_alike(images: torch.Tensor) -> None:
    view = PAPER.view(0, 0, 64)
    assert PAPER(images.float(), view).equal(PAPER(images, view).float())


@pytest.mark.slow
def test_training_sees_other_views_in_other_epochs_and_resumes_to_the_bit() -> None:
    config = TrainConfig(
        objective=CrossEntropy(), epochs=3, augment=Augment(crop_padding=1, rotation_degrees=10)
    )
    whole = [e.metrics["train_loss"] for e in train(config)]
    plain = [
        e.metrics["train_loss"] for e in train(config.model_copy(update={"augment": Augment()}))
    ]
    assert whole[0] != plain[0]
    run = train(config)
    state = next(run).state()
    assert [e.metrics["train_loss"] for e in train(config, state)] == whole[1:]
