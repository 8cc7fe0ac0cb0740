"""Data sets, their splits, and randomness that is addressed instead of consumed.

A data set is a frozen Settings class that also loads itself. To add one: a class with a `name`, its facts and
`_official`, and one line in `Data`. Images live as uint8 tensors; every image knows its position in the official
train set, so that what is random about it is a function of (seed, epoch, position) and of nothing else.

Shapes: N = images, C = channels, H, W = height and width.
"""

import functools
import gzip
import hashlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from pydantic import BeforeValidator, Field
from torch import Tensor

from tfkd_ray.schema import ConfigError, Settings, named

_test_split_sealed = False


def address(seed: int, *stream: str | int) -> int:
    """A 63-bit seed for one named use of randomness, such as (seed, "order", epoch)."""
    text = "/".join(str(part) for part in (seed, *stream))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *stream: str | int) -> torch.Generator:
    """A CPU generator at an address: the same numbers on every machine, device and number of workers."""
    return torch.Generator().manual_seed(address(seed, *stream))


def seal_test_split() -> None:
    """Make `load_test` refuse in this process, for good: a process that trains has no business with test images."""
    global _test_split_sealed
    _test_split_sealed = True


@dataclass(frozen=True)
class ImageSet:
    """Images of one split, in memory."""

    images: Tensor
    """uint8 [N, C, H, W]."""
    labels: Tensor
    """int64 [N]."""
    positions: Tensor
    """int64 [N]: each image's place in the official train set (or test set)."""
    official_size: int
    """Images in that official set."""

    def __len__(self) -> int:
        return len(self.labels)


class Dataset(Settings):
    """What every data set has: its facts as class attributes, and how validation is cut from train."""

    num_classes: ClassVar[int]
    shape: ClassVar[tuple[int, int, int]]
    """(C, H, W)."""
    mean: ClassVar[tuple[float, ...]]
    """Per channel, over the official train set, in units of a uint8 step."""
    std: ClassVar[tuple[float, ...]]

    val_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Part of the official train set that is held out for validation, the same part of every class."""
    split_seed: int = 0
    """Which images those are: fixed by (data set, split_seed), whatever the trial's seed."""

    def load(self) -> tuple[ImageSet, ImageSet]:
        """(train, validation): disjoint, stratified, both from the official train set."""
        return _load(self)

    def load_test(self) -> ImageSet:
        """The test split. Refused in any process that trains trials of a sweep."""
        if _test_split_sealed:
            raise PermissionError(
                "the test split cannot be opened by a sweep: trials are chosen on validation, and test is opened once, "
                "after everything is chosen"
            )
        images, labels = self._official("test")
        return ImageSet(images, labels, torch.arange(len(labels)), len(labels))

    def _official(self, split: Literal["train", "test"]) -> tuple[Tensor, Tensor]:
        """(uint8 [N, C, H, W], int64 [N]) of an official split."""
        raise TypeError(f"{type(self).__name__} does not say how it loads")


class Digits(Dataset):
    """1,797 real 8x8 handwritten digits (Alpaydin and Kaynak 1998), as scikit-learn carries them.

    They have no official split: a fifth of every class, fixed for good, is the test set here (359 images).
    """

    num_classes: ClassVar[int] = 10
    shape: ClassVar[tuple[int, int, int]] = (1, 8, 8)
    mean: ClassVar[tuple[float, ...]] = (4.8826,)
    std: ClassVar[tuple[float, ...]] = (6.0141,)

    name: Literal["digits"] = "digits"

    def _official(self, split: Literal["train", "test"]) -> tuple[Tensor, Tensor]:
        images, labels = _digits()
        train, test = stratified(labels, 0.2, seed=1998)
        chosen = train if split == "train" else test
        return images[chosen], labels[chosen]


Data = Annotated[Digits, BeforeValidator(named)]


def stratified(labels: Tensor, fraction: float, *, seed: int) -> tuple[Tensor, Tensor]:
    """(kept, held out): sorted indices; `fraction` of every class is held out, at least one image, never all."""
    order = torch.randperm(len(labels), generator=generator(seed, "split"))
    held = []
    for k in labels.unique().tolist():
        members = order[labels[order] == k]
        held.append(members[: min(max(1, round(len(members) * fraction)), len(members) - 1)])
    out = torch.zeros(len(labels), dtype=torch.bool)
    out[torch.cat(held)] = True
    return (~out).nonzero()[:, 0], out.nonzero()[:, 0]


@functools.lru_cache(maxsize=4)
def _load(data: Dataset) -> tuple[ImageSet, ImageSet]:
    images, labels = data._official("train")
    train, val = stratified(labels, data.val_fraction, seed=data.split_seed)
    return (
        ImageSet(images[train], labels[train], train, len(labels)),
        ImageSet(images[val], labels[val], val, len(labels)),
    )


@functools.cache
def _digits() -> tuple[Tensor, Tensor]:
    # found without importing scikit-learn, whose import takes 2 s in every new trial process
    spec = importlib.util.find_spec("sklearn")
    path = Path(spec.origin).parent / "datasets/data/digits.csv.gz" if spec and spec.origin else None
    if path is None or not path.is_file():
        raise ConfigError(
            f"data digits: not found (looked for {path}); it comes with scikit-learn: pip install scikit-learn"
        )
    with gzip.open(path, "rt") as file:
        table = torch.from_numpy(np.loadtxt(file, delimiter=",", dtype=np.uint8))
    return table[:, :-1].reshape(-1, 1, 8, 8).contiguous(), table[:, -1].long()
