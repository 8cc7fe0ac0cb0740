"""The base classes of data sets: facts, splits, digests and downloads.

Shapes: N = images, C = channels, H, W = height and width.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import http.client
import math
import os
import tempfile
import urllib.request
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

import numpy as np
from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
)

from tfkd_ray.learn.images import FolderSet, Images, ImageSet, check_headers, generator
from tfkd_ray.learn.unlabelled import (
    REST,
    Source,
    absolute_source,
    check_unlabelled,
    count_in,
    found_in,
    sources_of,
    without_labels,
)
from tfkd_ray.settings.errors import ConfigError, Sentences
from tfkd_ray.settings.files import expanded, remembered, state_of, whole_file
from tfkd_ray.settings.schema import Settings
from tfkd_ray.settings.yaml import Tree

if TYPE_CHECKING:
    from torch import Tensor


Split = Literal["train", "test"]
ImageShape = tuple[int, int, int]
"""(C, H, W)."""
Channels = tuple[float, ...]
"""A number for each channel."""
Labelled = tuple["Tensor", "Tensor"]
"""Images, uint8 [N, C, H, W], and their labels, int64 [N]."""
SPLITS: tuple[Split, ...] = ("train", "test")

MODERN: Tree = {
    "optim": {"name": "sgd", "nesterov": True},
    "schedule": {"name": "cosine", "warmup_epochs": 1.0},
}
"""A recipe that beats the paper's on every network for which we know figures."""
PAPER_RECIPE: Tree = {
    "epochs": 200,
    "optim": {
        "name": "sgd",
        "lr": 0.1,
        "weight_decay": 5e-4,
        "momentum": 0.9,
        "nesterov": False,
        "batch_size": 128,
    },
    "schedule": {"name": "step", "milestones": [0.3, 0.6, 0.8], "gamma": 0.2, "warmup_epochs": 1.0},
}
"""The Tf-KD paper's recipe for CIFAR, without its augmentation."""
PATIENT: Tree = {
    "epochs": 1000,
    "optim": {
        "name": "adamw",
        "lr": 0.003,
        "weight_decay": 0.1,
        "clip_norm": 1.0,
        "batch_size": 512,
    },
    "schedule": {"name": "cosine", "warmup_epochs": 15.0},
    "augment": {"mixup": 1.0},
}
"""Function matching: a long schedule, on mixed images that the teacher sees, too. (Beyer et al.
2022, arXiv:2106.05237.) The settings are those of the authors' code for Oxford Pets (`fast` epochs,
`medium` rates), for `kd` with alpha = 1; their weight decay, which no learning rate multiplies, is
divided by the rate here."""
DEIT: Tree = {
    "epochs": 300,
    "optim": {
        "name": "adamw",
        "lr": 0.001,
        "weight_decay": 0.05,
        "no_decay": "norm_and_bias",
        "batch_size": 1024,
    },
    "schedule": {"name": "cosine", "warmup_epochs": 5.0},
    "augment": {"mixup": 0.8, "cutmix": 1.0, "erase": 0.25, "rand": {"ops": 2, "magnitude": 9}},
}
"""Settings of DeiT for training transformers on little data, without its repeated augmentation and
stochastic depth. (Touvron et al. 2021, arXiv:2012.12877, table 9.) Its label smoothing is `lsr`."""
FAST: Tree = {
    "epochs": 10,
    "optim": {
        "name": "sgd",
        "lr": 1.5,
        "weight_decay": 0.00133,
        "momentum": 0.85,
        "nesterov": True,
        "batch_size": 1024,
    },
    "schedule": {"name": "cosine", "warmup_epochs": 2.3},
    "augment": {"crop_padding": 2, "flip": "alternating"},
}
"""A short schedule with large steps, after airbench94. (Jordan 2024, arXiv:2404.00498.) Its learning
rate and weight decay are given for the mean over a batch here; its own network, whitening layer and
rates of biases are not ours. Its label smoothing is `lsr`, with alpha 0.2."""


def augmented(recipe: Tree, **augment: Any) -> Tree:
    """Return a recipe with more augmentation, such as crops and flips of one data set."""
    return {**recipe, "augment": {**recipe["augment"], **augment}}


IMAGENET: Tree = {
    "epochs": 90,
    "optim": {
        "name": "sgd",
        "lr": 0.2,
        "weight_decay": 1e-4,
        "momentum": 0.9,
        "nesterov": False,
        "batch_size": 512,
    },
    "schedule": {
        "name": "step",
        "milestones": [30 / 90, 60 / 90, 80 / 90],
        "gamma": 0.1,
        "warmup_epochs": 0.0,
    },
    "augment": {"resized_crop": True, "flip": True},
}
"""The Tf-KD paper's recipe for ImageNet."""


_test_split_sealed = False


def seal_test_split() -> None:
    """Make `load_test` raise in this process from now on: training must not see test images."""
    global _test_split_sealed
    _test_split_sealed = True


def _count_or_share(value: Any) -> Any:
    if isinstance(value, float) and value > 1 and value.is_integer():
        value = int(value)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not value > 0 or (isinstance(value, float) and value >= 1):
        raise ValueError(
            f"a whole number of images from 1, or a fraction between 0 and 1, got {value!r}"
        )
    return value


CountOrShare = Annotated[int | float, BeforeValidator(_count_or_share)]
"""A whole number from 1, or a fraction above 0 and below 1."""


class Dataset(Settings):
    """Base class of all data sets: their facts, and the validation split cut from train."""

    # facts: class attributes if constant, else settings or properties
    if TYPE_CHECKING:

        @property
        def num_classes(self) -> int: ...
        @property
        def shape(self) -> ImageShape:
            """(C, H, W) of the images."""

        @property
        def mean(self) -> Channels | None:
            """Mean per channel over the official train set, in pixel units of 0 to 255.

            None: measured, see `statistics`.
            """

        @property
        def std(self) -> Channels | None: ...

    name: str
    origin: ClassVar[str]
    """Instructions to get the data; they end the error message for missing data."""
    streams: ClassVar[bool] = False
    """True if images stay on disk and are decoded when needed."""
    brightest: ClassVar[int] = 255
    """Largest value of a pixel."""
    places: ClassVar[set[str]] = {"root", "readers"}
    """Settings of where the images are and how they are read; they affect no number."""
    known_by_digest: ClassVar[set[str]] = set()
    """Settings that identify a data set only if it has no digest."""
    later: ClassVar[frozenset[str]] = frozenset(
        {"digest", "label_noise", "unlabelled", "unlabelled_ratio", "unlabelled_digest"}
    )
    recipes: ClassVar[dict[str, Tree]] = {"plain": {}, "modern": MODERN, "patient": PATIENT}
    """Default settings by recipe name; the first recipe is the default. Explicit settings override
    them."""

    val_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """Fraction of the official train set that is held out for validation, the same fraction of
    every class. 0: no validation split, for training a final student."""
    subset: CountOrShare | None = None
    """Approximate number of images of the official train set to use, for train and validation
    together; below 1, the fraction of the train split to use, with all of validation. The same
    fraction of every class. None: all."""
    label_noise: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Probability that a train image has a wrong label, each of the other classes alike (symmetric
    noise). It depends on (`split_seed`, image) alone; validation and test keep their labels, and
    teachers of this data set learn from the wrong ones, too."""
    split_seed: int = 0
    """Seed of the validation split and the subset, which depend only on (data set, split_seed),
    never on the trial's seed."""
    digest: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")] | None = None
    """Identity of the official train set: see `digest_of`. None: computed and recorded when an
    experiment begins. Data with another digest raise an error, so that no experiment mixes two data
    sets."""
    unlabelled: Annotated[str, AfterValidator(absolute_source)] | None = None
    """Images without labels, for the soft part of objectives with a trained teacher: a folder of
    image files at any depth, a file of one array (.npy, .npz: uint8 [N, C, H, W]), a function of
    your own (`package.module:function`, called with "unlabelled"), or `rest`, what `subset` leaves
    out. They have the size and channels of the data set. Location only: `unlabelled_digest`
    identifies them."""
    unlabelled_ratio: Annotated[float, Field(gt=0, le=1000)] = 1.0
    """Unlabelled images in a step for each labelled one, rounded."""
    unlabelled_digest: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")] | None = None
    """Identity of the unlabelled images, as `digest` for the labelled ones; of `rest`, None."""

    @model_serializer(mode="wrap")
    def _without_neutral(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Return the settings, without those of noise and of unlabelled images if there are none."""
        tree: dict[str, Any] = handler(self)
        if not self.label_noise:
            tree.pop("label_noise", None)
        if self.unlabelled is None:
            for name in OF_UNLABELLED:
                tree.pop(name, None)
        return tree

    def load(self) -> tuple[Images, Images | None]:
        """Return (train, validation): disjoint, stratified parts of the official train set.

        Validation is None if nothing is held out.
        """
        found = load_official(self._of_any_digest)
        if self.digest is not None and found.digest != self.digest:
            raise ConfigError(f"data {self.name}: {self._other_data(found)}")
        return found.train, found.val

    def load_unlabelled(self) -> Images:
        """Return the unlabelled images; the labels are all 0."""
        found = load_unlabelled(self)
        if self.unlabelled_digest is not None and found.digest != self.unlabelled_digest:
            raise ConfigError(
                f"data.unlabelled: the images at {self.unlabelled} differ from the recorded ones (digest "
                f"{found.digest}, not {self.unlabelled_digest}); restore them, or begin a new experiment"
            )
        return found.images

    def pinned(self) -> Self:
        """Return the data set with the local data's digests; raise a ConfigError on a mismatch."""
        found: dict[str, str] = {}
        if self.digest is None:
            official = load_official(self._of_any_digest)
            if not official.checked:
                self._check_same_again(official)
                official.checked = True
            found["digest"] = official.digest
        else:
            self.load()
        if self.unlabelled is not None:
            self.load_unlabelled()
            of_unlabelled = load_unlabelled(self).digest
            found |= {} if of_unlabelled is None else {"unlabelled_digest": of_unlabelled}
        return self.with_digests(found)

    @property
    def digests(self) -> dict[str, str]:
        """Return the recorded digests by the names of their settings."""
        both = {"digest": self.digest, "unlabelled_digest": self.unlabelled_digest}
        return {name: digest for name, digest in both.items() if digest is not None}

    def with_digests(self, digests: Mapping[str, str]) -> Self:
        """Return the data set with these digests recorded."""
        if all(getattr(self, name) == digest for name, digest in digests.items()):
            return self
        return self.model_copy(update=dict(digests))

    @property
    def labelled(self) -> Self:
        """Return the same data set without unlabelled images."""
        if self.unlabelled is None:
            return self
        neutral = {name: type(self).model_fields[name].default for name in OF_UNLABELLED}
        return self.model_copy(update=neutral)

    def identity(self) -> Tree:
        """Return the settings and digests that identify these images, as JSON, without paths."""
        out = self.places | (self.known_by_digest if self.digest else set())
        if self.unlabelled_digest is not None:
            out |= {"unlabelled"}
        return {name: value for name, value in self.content().items() if name not in out}

    @property
    def _of_any_digest(self) -> Self:
        return self.labelled.model_copy(update={"digest": None})

    @property
    def _of_unlabelled(self) -> Source:
        assert self.unlabelled is not None, f"{self.name=}"
        reads = self.in_files if self.streams else None
        return Source(self.unlabelled, self.name, self.shape, self.brightest, reads)

    def in_files(self, folder: Path, files: tuple[str, ...]) -> FolderSet:
        """Return image files below a folder that are decoded when they are read; all labels are 0."""
        raise TypeError(f"{type(self).__name__} keeps its images in memory")

    def _other_data(self, found: OfficialSets) -> str:
        """Return the sentence for data whose digest is not the recorded one."""
        return (
            f"the train images or labels here differ from the recorded ones (digest {found.digest}, not "
            f"{self.digest}); restore them, or begin a new experiment, which trains its teachers again"
        )

    def notes(self) -> Sentences:
        """Yield notes on its splits for the person who uses it; they list files, and read none."""
        return iter(())

    def _check_same_again(self, found: OfficialSets) -> None:
        """Raise a ConfigError if loading again gives different images."""

    def _sources(self, split: Split) -> list[Path]:
        """Return the files of a split, which identify it while unchanged, or an empty list."""
        return []

    def statistics(self) -> tuple[Channels, Channels]:
        """Return (mean, std) per channel, pixel units of 0 to 255: the known or measured ones."""
        return (self.mean, self.std) if self.mean and self.std else _measured(self.labelled)

    def read_files(self, paths: Sequence[Path]) -> Tensor:
        """Return image files as validation has its images, uint8 [B, C, H, W]."""
        raise ConfigError(
            f"data {self.name}: its images do not come from image files, so there is no rule to read one; give the "
            "student images [B, C, H, W] of the same kind, normalised with `data.statistics()`"
        )

    def class_names(self) -> list[str]:
        """Return the name of each class, by its number: the numbers, if the classes have no folders."""
        return [str(k) for k in range(self.num_classes)]

    def load_test(self) -> Images:
        """Return the test split; raise in a process that trains trials of a sweep."""
        if _test_split_sealed:
            raise PermissionError(
                "the test split cannot be opened by a sweep: trials are chosen on validation, and test is opened once, "
                "after everything is chosen"
            )
        return self._whole("test")

    def download(self) -> None:
        """Download the missing official files into `root`; check their md5.

        A file is written completely, or not at all.
        """
        raise ConfigError(f"data {self.name}: not for download; {self.origin}")

    def check(self) -> None:
        """Raise a ConfigError if the data are missing on this machine; cheap, reads no image."""
        self._check()
        if self.unlabelled is not None:
            check_unlabelled(self._of_unlabelled)

    def _check(self) -> None:
        raise TypeError(f"{type(self).__name__} does not say where it is")

    def examine(self) -> None:
        """Raise a ConfigError if a file of either split is missing or malformed; show no image.

        It lists the files and reads their headers, so that a comparison does not train for days
        before it finds an unusable split.
        """
        _examined(self)
        if self.unlabelled is not None:
            images = self.load_unlabelled()
            if isinstance(images, FolderSet):
                check_headers(self.name, [images.folder / file for file in images.files])

    def _examine(self) -> None:
        self._check()

    def split(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return sorted positions in the official train set (train, validation).

        Validation may be empty.

        Args:
            labels: of the official train set, int64 [N].
        """
        used = self._used(labels)
        train, val = used, used[:0]
        if self.val_fraction:
            kept, held = stratified(labels[used], self.val_fraction, seed=self.split_seed)
            train, val = used[kept], used[held]
            if not len(val):
                raise ConfigError(
                    f"data {self.name}: val_fraction: no class has two images, so none can be held out; got "
                    f"{self.val_fraction:g}"
                )
        if self.subset is not None and self.subset < 1:
            train = train[stratified(labels[train], 1 - self.subset, seed=self.split_seed)[0]]
        return train, val

    def _used(self, labels: Tensor) -> Tensor:
        """Return sorted positions in the official train set of train and validation together."""
        import torch

        if self.subset is not None and 1 <= self.subset < len(labels):
            return stratified(labels, 1 - self.subset / len(labels), seed=self.split_seed)[0]
        return torch.arange(len(labels))

    def noisy(self, labels: Tensor, positions: Tensor) -> Tensor:
        """Return train labels with `label_noise`, int64 [N].

        Args:
            labels: the right ones, int64 [N].
            positions: of these images in the official train set, int64 [N].
        """
        import torch

        end = int(positions.max()) + 1 if len(positions) else 0
        draws = torch.rand(end, 2, generator=generator(self.split_seed, "label noise"))[positions]
        other = 1 + (draws[:, 1] * (self.num_classes - 1)).long().clamp(max=self.num_classes - 2)
        wrong = (labels + other) % self.num_classes
        return torch.where(draws[:, 0] < self.label_noise, wrong, labels)

    def rest(self) -> Images:
        """Return the images of the official train set that `subset` leaves out; all labels are 0."""
        import torch

        whole = load_official(self._of_any_digest).whole
        left = torch.ones(len(whole), dtype=torch.bool)
        for part in self.split(whole.labels):
            left[part] = False
        left_out = left.nonzero()[:, 0]
        if not len(left_out):
            raise ConfigError(
                f"data.unlabelled: rest is what data.subset leaves out, and {self.subset} images are all {len(whole)}; "
                "lower it"
            )
        return without_labels(whole.part(left_out))

    def test_clusters(self) -> Tensor | None:
        """Return the cluster of each test image, int64 [N]; None: test images are independent.

        Images of a cluster have something in common, such as the person who drew them. The
        bootstrap over test images resamples whole clusters.
        """
        return None

    def _whole(self, split: Split) -> Images:
        """Return the images of a whole official split."""
        import torch

        images, labels = self._official(split)
        return ImageSet(images, labels, torch.arange(len(labels)), len(labels))

    def _official(self, split: Split) -> Labelled:
        """Return (uint8 [N, C, H, W], int64 [N]) of an official split."""
        raise TypeError(f"{type(self).__name__} does not say how it loads")


# --- data sets in files ---------------------------------------------------------------------------


def _absolute(path: Path) -> Path:
    # a trial's process has its own working directory; each machine expands "~" itself
    return path if path.parts[:1] == ("~",) else path.absolute()


AbsolutePath = Annotated[Path, AfterValidator(_absolute)]


class FileDataset(Dataset):
    """A data set whose official files the user has placed at the same path on every machine."""

    name: str
    root: AbsolutePath
    """Folder of the files. Location only: it does not affect results."""

    @property
    def _root(self) -> Path:
        return expanded(self.root)

    def _wrong(self, path: Path, problem: str) -> ConfigError:
        return ConfigError(f"data {self.name}: {path}: {problem}")

    def _missing(self, what: str, looked: list[Path]) -> ConfigError:
        places = ", ".join(map(str, looked))
        return ConfigError(
            f"data {self.name}: not found: {what} (looked in {places}); {self.origin}, or set data.root"
        )

    def _checked_labels(self, path: Path, labels: Tensor, first: int = 0) -> Tensor:
        """Return labels that begin at 0; those in the file begin at `first`."""
        if problem := label_problem(labels, first, self.num_classes):
            raise self._wrong(path, problem)
        return labels - first

    def _fetch(self, url: str, checksum: str, path: Path) -> None:
        """Download a file completely or not at all.

        Args:
            checksum: md5, or SHA-256 if it has 64 digits.
        """
        kind = "sha256" if len(checksum) == 64 else "md5"
        digest = hashlib.new(kind, usedforsecurity=False)
        try:
            with (
                whole_file(path) as part,
                part.open("wb") as file,
                urllib.request.urlopen(url, timeout=60) as reply,
            ):
                while piece := reply.read(2**20):
                    digest.update(piece)
                    file.write(piece)
                if digest.hexdigest() != checksum:
                    problem = (
                        f"{url} has the {kind} {digest.hexdigest()}, and the official file's is {checksum}; the "
                        "download was discarded"
                    )
                    raise ConfigError(f"data {self.name}: {problem}; try again, or {self.origin}")
        except (OSError, http.client.HTTPException) as error:
            problem = f"{url} cannot be fetched to {path}: {error}; {self.origin}, or set data.root"
            raise ConfigError(f"data {self.name}: {problem}") from None

    def _fetch_folder(self, url: str, md5: str, folder: str) -> None:
        """Download a zip and move its folder into `root`, completely or not at all."""
        root = self._root
        if (root / folder).exists():
            raise self._wrong(
                root / folder,
                "is incomplete; remove it, and it is downloaded again",
            )
        archive = root / f"{folder}.zip"
        self._fetch(url, md5, archive)
        try:
            with (
                tempfile.TemporaryDirectory(dir=root) as unpacked,
                zipfile.ZipFile(archive) as file,
            ):
                file.extractall(unpacked)
                (Path(unpacked) / folder).rename(root / folder)
        finally:
            archive.unlink()


Level = Annotated[float, Field(ge=0, le=255)]
Spread = Annotated[float, Field(ge=1, le=255)]  # a fraction of 255 by mistake is refused


# --- splits ---------------------------------------------------------------------------------------


def stratified(labels: Tensor, fraction: float, *, seed: int) -> tuple[Tensor, Tensor]:
    """Return sorted indices (kept, held out); of each class, `fraction` is held out.

    At least one image of each class is held out, and never all.
    """
    import torch

    order = torch.randperm(len(labels), generator=generator(seed, "split"))
    held = []
    for k in labels.unique().tolist():
        members = order[labels[order] == k]
        held.append(members[: min(max(1, round(len(members) * fraction)), len(members) - 1)])
    out = torch.zeros(len(labels), dtype=torch.bool)
    out[torch.cat(held)] = True
    return (~out).nonzero()[:, 0], out.nonzero()[:, 0]


@dataclass
class OfficialSets:
    whole: Images
    """The official train set."""
    train: Images
    val: Images | None
    state: str | None
    """State of the source files; None for data without whole files."""
    checked: bool = False
    """True if loading again is known to give the same data."""

    @functools.cached_property
    def digest(self) -> str:
        """Return the digest of the official train set, whatever part of it is used."""
        if self.state is None:
            return digest_of(self.whole)
        return remembered(self.state, lambda: digest_of(self.whole))


@functools.lru_cache(maxsize=4)
def _examined(data: Dataset) -> None:
    data._examine()


def load_official(data: Dataset) -> OfficialSets:
    """Return the sets of a data set that this process keeps; files that changed are read again."""
    found, now = _loaded(data), None
    with contextlib.suppress(ConfigError):  # the files are gone, and their images are here
        now = _state(data)
    if now is not None and found.state is not None and now != found.state:
        _loaded.cache_clear()
        found = _loaded(data)
    return found


def forget_loaded() -> None:
    """Free loaded data, in a process that needed only their digest."""
    _loaded.cache_clear()
    _loaded_unlabelled.cache_clear()


OF_UNLABELLED = ("unlabelled", "unlabelled_ratio", "unlabelled_digest")
"""Settings of unlabelled images."""


@dataclass
class UnlabelledSet:
    images: Images
    state: str | None
    """State of the files that are read into memory; None for others."""

    @functools.cached_property
    def digest(self) -> str | None:
        """Return the digest of the images; None for `rest`, which the train set's identifies."""
        if self.state is None:
            return digest_of(self.images)
        return remembered(self.state, lambda: digest_of(self.images))


class _Rest(UnlabelledSet):
    digest = None


def load_unlabelled(data: Dataset) -> UnlabelledSet:
    """Return the unlabelled images that this process keeps; files that changed are read again."""
    if data.unlabelled == REST:
        return _Rest(data.rest(), None)
    files = sources_of(data._of_unlabelled)
    state = state_of(files) if files else None
    if state is not None:  # the same files are other images in another shape
        state = hashlib.sha256(f"{state} {data.shape}".encode()).hexdigest()
    plain = data.model_copy(
        update={"unlabelled_ratio": 1.0, "digest": None, "unlabelled_digest": None}
    )
    return _loaded_unlabelled(plain, state)


def notes_on(data: Dataset) -> Sentences:
    """Yield notes on splits, and one if unlabelled images are validation images; read both."""
    yield from data.notes()
    if data.unlabelled is None:
        return
    images, (_, val) = data.load_unlabelled(), data.load()
    found = count_in(images, val)
    if found:
        yield (
            f"data.unlabelled: {found} of its {len(images)} images are identical to validation images, so students "
            "train on them without labels; remove them, or say so with the results"
        )


@functools.lru_cache(maxsize=2)
def _loaded_unlabelled(data: Dataset, state: str | None) -> UnlabelledSet:
    return UnlabelledSet(found_in(data._of_unlabelled), state)


@functools.lru_cache(maxsize=4)
def _loaded(data: Dataset) -> OfficialSets:
    before = _state(data)  # taken first, so that files that change during the read are read again
    whole = data._whole("train")
    places, held = data.split(whole.labels)
    train, val = whole.part(places), whole.part(held) if len(held) else None
    if data.label_noise:
        train = dataclasses.replace(train, labels=data.noisy(train.labels, places))
    return OfficialSets(whole, train, val, before or _state(data))


def _state(data: Dataset) -> str | None:
    sources = data._sources("train")
    if not sources or not all(path.is_file() for path in sources):
        return None
    return state_of(sources)


ROWS = 64
"""Most 8-byte words that are added up into one word for the digest."""
SUM_COLUMNS = (509, 2_039, 8_191, 32_749, 131_071, 524_287)
"""Candidate block widths in words: the first of these primes above the words of an image is
used."""


def digest_of(images: Images) -> str:
    """Return 32 hex digits that identify an official set: its labels, their order and its images.

    Images in memory count by content. Images in files count by path below the folder and by size,
    not by content, so another file with the same name and size is not noticed. Modification times
    do not count.
    """
    found = hashlib.sha256(images.labels.numpy().astype("<i4").data)
    if isinstance(images, FolderSet):
        for file in images.files:
            size = os.stat(f"{images.folder}/{file}").st_size  # noqa: PTH116  # Path.stat is slower
            found.update(os.fsencode(f"{file}\0{size}\0"))
    else:
        found.update(repr(tuple(images.stored.shape)).encode())
        content = images.stored.contiguous().numpy().reshape(-1)
        for part in _summed(content, math.prod(images.stored.shape[1:])):
            found.update(part.data)
    return found.hexdigest()[:32]


def _summed(
    content: np.ndarray[Any, np.dtype[np.uint8]], each: int
) -> Iterator[np.ndarray[Any, Any]]:
    """Yield sums of the content, 1/64 of its bytes: 8 times faster to hash, but not secure.

    It adds up the columns of blocks of rows of words. No sum holds two words of one image, so a
    change within one image always changes a sum. No sum holds the same word of two images, so
    swapping images changes a sum too.

    Args:
        each: bytes of an image.
    """
    rows = min(ROWS, each // 8)
    columns = next((p for p in SUM_COLUMNS if p > each // 8 + 1 and each % p), 0)
    block = 8 * rows * columns  # 0: images too small or too large to add up
    end = len(content) // block * block if block else 0
    if end:
        words = content[:end].view("<u8").reshape(-1, rows, columns)
        yield np.add.reduce(words, axis=1).astype("<u8", copy=False)
    yield content[end:]


@functools.lru_cache(maxsize=4)
def _measured(data: Dataset) -> tuple[Channels, Channels]:
    """Return (mean, std) per channel of train and validation: exact, the same for every split."""
    import torch

    channels = data.shape[0]
    counts = torch.zeros(channels, 256, dtype=torch.int64)
    for part in data.load():
        assert part is None or isinstance(part, ImageSet), f"{data.name} streams, and says no mean"
        for images in () if part is None else part.read(torch.arange(len(part)).split(4096)):
            counts += torch.stack(
                [images[:, c].flatten().bincount(minlength=256) for c in range(channels)]
            )
    levels, shares = torch.arange(256.0).double(), counts.double() / counts.sum(1, keepdim=True)
    mean = shares @ levels
    std = (shares * (levels - mean[:, None]) ** 2).sum(1).sqrt()
    if not std.all():
        raise ConfigError(
            f"data {data.name}: channel {int(std.argmin())} has one value in all images; leave it out"
        )
    return tuple(mean.tolist()), tuple(std.tolist())


# --- files ----------------------------------------------------------------------------------------


def label_problem(labels: Tensor, first: int, num_classes: int) -> str | None:
    last = first + num_classes - 1
    outside = ((labels < first) | (labels > last)).nonzero()[:, 0]
    return (
        f"label {int(labels[outside[0]])} at {int(outside[0])} is outside {first}..{last}"
        if len(outside)
        else None
    )
