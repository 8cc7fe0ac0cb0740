"""Data sets and their splits.

A data set is a frozen Settings class that also loads itself. To add one, write a class with a
`name`, its facts and `_official`, and add one line to `Data`. Images live as uint8 tensors, or stay
in their files (`streams`). Every image knows its position in the official train set, so randomness
is a function of (seed, epoch, position) only.

Only `download` downloads. Results of slow unpacking or decoding are cached (see `cache.cached`).
Files are untrusted input: an IDX file takes no more memory than the official one, and a pickle may
hold only arrays of bytes, text and numbers.

Shapes: N = images, C = channels, H, W = height and width.
"""

from __future__ import annotations

import functools
import gzip
import importlib.util
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

import numpy as np
from pydantic import BeforeValidator, Field, JsonValue, model_validator

from tfkd_ray.learn.images import (
    seeded,
)
from tfkd_ray.settings import own_code
from tfkd_ray.settings.errors import ConfigError
from tfkd_ray.settings.schema import name_alone

if TYPE_CHECKING:
    from torch import Tensor
from tfkd_ray.learn.dataset import (
    Channels,
    Dataset,
    ImageShape,
    Labelled,
    Level,
    OfficialSets,
    Split,
    digest_of,
    label_problem,
    stratified,
)
from tfkd_ray.learn.image_files import ImageFolder, Imagenet, TinyImagenet
from tfkd_ray.learn.official import Cifar10, Cifar100, Emnist, FashionMnist, Kmnist, Mnist
from tfkd_ray.learn.omniglot import Omniglot
from tfkd_ray.learn.own import imported


class Digits(Dataset):
    """1,797 real 8x8 handwritten digits from scikit-learn. (Alpaydin and Kaynak 1998.)

    They have no official split: a fixed fifth of every class is the test split here (359 images).
    """

    num_classes: ClassVar[int] = 10
    shape: ClassVar[ImageShape] = (1, 8, 8)
    mean: ClassVar[Channels] = (4.8826,)
    std: ClassVar[Channels] = (6.0141,)
    brightest: ClassVar[int] = 16
    origin = "it comes with scikit-learn: pip install scikit-learn"

    name: Literal["digits"] = "digits"

    def _check(self) -> None:
        """Raise a ConfigError if scikit-learn's file is missing."""
        _digits_file()

    def _official(self, split: Split) -> Labelled:
        images, labels = _digits()
        train, test = stratified(labels, 0.2, seed=1998)
        chosen = train if split == "train" else test
        return images[chosen], labels[chosen]


Side = Annotated[int, Field(ge=1, le=4096)]


class OwnData(Dataset):
    """A data set from your own function: `function(split, **args)`, with split "train" or "test".

    It returns (images, labels): uint8 [N, C, H, W] and whole numbers [N] from 0, as torch tensors
    or numpy arrays. Every training process calls it, and it must return the same data each time.
    The global random generators of torch, numpy and Python are seeded identically before each call.
    """

    known_by_digest = {"path", "args"}
    origin = "the function at data.path makes it"

    name: Literal["own"] = "own"
    path: str
    """Path of the function: `package.module:function`."""
    shape: tuple[Side, Side, Side]
    """(C, H, W) of the images."""
    num_classes: Annotated[int, Field(ge=2)]
    args: dict[str, JsonValue] = {}
    """Keyword arguments of the function."""
    mean: tuple[Level, ...] | None = None
    """Mean per channel, in pixel units of 0 to 255. None: measured."""
    std: tuple[Annotated[float, Field(gt=0, le=255)], ...] | None = None
    """Standard deviation per channel, in pixel units of 0 to 255. None: measured."""

    def __hash__(self) -> int:
        return hash(json.dumps(self.tree))

    @model_validator(mode="after")
    def _statistics_for_all_channels(self) -> Self:
        if (self.mean is None) != (self.std is None):
            raise ValueError("mean and std: give both, or neither and they are measured")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if values is not None and len(values) != self.shape[0]:
                raise ValueError(
                    f"{name}: {len(values)} values for {self.shape[0]} channels, see shape"
                )
        return self

    def _check(self) -> None:
        """Raise a ConfigError if the function is missing or refuses these arguments; not called."""
        self._function()

    def _examine(self) -> None:
        try:
            self._official("test")  # dropped unseen; its kinds, sizes and labels are right
        except ConfigError:
            raise
        except Exception as error:  # the author's code may raise anything
            problem = f"ends in {type(error).__name__}: {error}"
            raise self._returned("test", problem) from error

    def _function(self) -> Callable[..., Any]:
        function: Callable[..., Any] = imported(self.path, "data.path")
        if not callable(function):
            raise ConfigError(f"data.path: {self.path} is {function!r}, not a function")
        try:
            inspect.signature(function).bind("train", **self.args)
        except TypeError as error:
            given = "".join(f", {key}={value!r}" for key, value in self.args.items())
            problem = f"cannot be called as function('train'{given}): {error}"
            raise ConfigError(f"data.path: {self.path} {problem}; see data.args") from None
        except ValueError:  # written in C, without a signature
            pass
        return own_code.at_home(function)

    def _official(self, split: Split) -> Labelled:
        import torch

        function = self._function()
        # of the global generators; code with its own generator seeds that itself
        with seeded(0, "data", split):
            found = function(split, **self.args)
        if not isinstance(found, tuple | list) or len(found) != 2:
            raise self._returned(split, f"must return (images, labels), got {_brief(found)}")
        images, labels = (_tensor(part) for part in found)
        if images is None or images.dtype != torch.uint8 or images.ndim != 4:
            expected = "a uint8 tensor or array [N, C, H, W]"
            raise self._returned(split, f"images must be {expected}, got {_brief(found[0])}")
        if images.shape[1:] != self.shape:
            got, declared = (
                " x ".join(map(str, sides)) for sides in (images.shape[1:], self.shape)
            )
            raise self._returned(split, f"images are {got}, and data.shape says {declared}")
        whole = labels is not None and not (
            labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool
        )
        if labels is None or not whole or labels.ndim != 1:
            raise self._returned(split, f"labels must be whole numbers [N], got {_brief(found[1])}")
        if not len(images) == len(labels) > 0:
            raise self._returned(split, f"{len(labels)} labels for {len(images)} images")
        if problem := label_problem(labels.long(), 0, self.num_classes):
            raise self._returned(split, f"{problem} (data.num_classes is {self.num_classes})")
        return images, labels.long()

    def _other_data(self, found: OfficialSets) -> str:
        self._check_same_again(found)
        return super()._other_data(found) + (
            f". {self.path} must return the same in every process: seed what is random in it, and sort what it lists"
        )

    def _check_same_again(self, found: OfficialSets) -> None:
        if digest_of(self._whole("train")) != found.digest:
            problem = "returns other images or labels at each call"
            raise self._returned(
                "train",
                f"{problem}; seed what is random in it, so that all trials get the same data",
            )

    def _returned(self, split: Split, problem: str) -> ConfigError:
        return ConfigError(f"data own: {self.path}, called for {split!r}: {problem}")


def _tensor(value: Any) -> Tensor | None:
    """Return a value as a CPU tensor, or None if it cannot be one."""
    import torch
    from torch import Tensor

    if isinstance(value, Tensor):
        return value.detach().cpu().contiguous()
    try:
        return torch.from_numpy(np.require(value, requirements=["C", "W"]))
    except (TypeError, ValueError):  # not numbers, or rows of different lengths
        return None


def _brief(value: Any) -> str:
    """Return the type, and shape or length, of a value for a sentence."""
    from torch import Tensor

    if isinstance(value, Tensor | np.ndarray):
        return f"{type(value).__name__} of {str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return (
        f"{type(value).__name__} of {len(value)}"
        if isinstance(value, tuple | list | dict)
        else repr(value)[:60]
    )


Data = Annotated[
    Digits
    | Mnist
    | FashionMnist
    | Kmnist
    | Emnist
    | Omniglot
    | Cifar10
    | Cifar100
    | TinyImagenet
    | ImageFolder
    | Imagenet
    | OwnData,
    Field(discriminator="name"),
    BeforeValidator(name_alone),
]


def _digits_file() -> Path:
    # found without importing scikit-learn, whose import takes 2 s in every new trial process
    spec = importlib.util.find_spec("sklearn")
    path = (
        Path(spec.origin).parent / "datasets/data/digits.csv.gz" if spec and spec.origin else None
    )
    if path is None or not path.is_file():
        raise ConfigError(f"data digits: not found (looked for {path}); {Digits.origin}")
    return path


@functools.cache
def _digits() -> Labelled:
    import torch

    with gzip.open(_digits_file(), "rt") as file:
        table = torch.from_numpy(np.loadtxt(file, delimiter=",", dtype=np.uint8))
    return table[:, :-1].reshape(-1, 1, 8, 8).contiguous(), table[:, -1].long()
