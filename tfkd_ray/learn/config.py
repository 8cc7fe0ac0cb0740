"""The configuration of one training run: every default, range and unit, defined once.

`TrainConfig` is the whole tree. A search space (`space.py`) is the same tree with ranges in it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)

from tfkd_ray.learn.augment import Augment
from tfkd_ray.learn.average import Ema
from tfkd_ray.learn.data import Data, Digits
from tfkd_ray.learn.dataset import Dataset, Level, Spread
from tfkd_ray.learn.images import seeded
from tfkd_ray.learn.models import (
    Mlp,
    Model,
    Network,
    OwnNetwork,
    Timm,
    check_learns,
    check_lone_image,
    last_step,
    what_a_seed_leaves_open,
)
from tfkd_ray.learn.objectives import (
    Canonical,
    CrossEntropy,
    KnowledgeDistillation,
    LabelSmoothing,
    Objective,
    OwnObjective,
    TfkdSelf,
)
from tfkd_ray.learn.optimizers import Count, Optim, OptimConfig, Positive
from tfkd_ray.learn.own_loop import OwnLoop
from tfkd_ray.learn.own_loss import Layers
from tfkd_ray.learn.top_labels import KEPT, MOST_CLASSES
from tfkd_ray.learn.unlabelled import REST, is_array
from tfkd_ray.settings import own_code
from tfkd_ray.settings.errors import ConfigError, Sentences, did_you_mean
from tfkd_ray.settings.schema import Settings, leaves, members, name_alone, tag

if TYPE_CHECKING:
    from torch import nn


KIND = "accelerator_type:"
"""Prefix of the resource by which Ray names the kind of a node's GPUs."""
RAYS_OWN = ("CPU", "GPU", "memory", "object_store_memory")
"""Resources that Ray assigns to every node itself."""


LAST_STEPS = {
    "softmax": "returns probabilities (numbers from 0 to 1 that sum to 1), not logits. It seems to end in softmax, "
    "which training applies itself; applied twice, it makes training slow and inaccurate. Remove the softmax from "
    "its forward",
    "sigmoid": "returns numbers from 0 to 1, not logits. It seems to end in sigmoid, so no class can get a probability "
    "near 1, and training is slow and inaccurate. Remove the sigmoid from its forward",
}
"""Notes on networks that end in what a loss applies itself."""


class Schedule(Settings):
    """Learning rate as a function of the fractional epoch: linear warm-up, then the rest."""

    warmup_epochs: Annotated[float, Field(ge=0)] = 1.0
    """Epochs of linear warm-up from 0 to the peak; at most half of the run."""

    def factor(self, epoch: float, epochs: int) -> float:
        """Return the factor on the peak rate at `epoch` in [0, epochs), the middle of a step."""
        warmup = min(self.warmup_epochs, epochs / 2)
        if epoch < warmup:
            return epoch / warmup
        return self._after_warmup((epoch - warmup) / (epochs - warmup), epoch / epochs)

    def _after_warmup(self, progress: float, fraction: float) -> float:
        raise TypeError(f"{type(self).__name__} does not say how it goes on")


class Constant(Schedule):
    """Keep the peak learning rate throughout."""

    name: Literal["constant"] = "constant"

    def _after_warmup(self, progress: float, fraction: float) -> float:
        return 1.0


class Cosine(Schedule):
    """Decay along half a cosine from the peak to `final` of it.

    (Loshchilov and Hutter 2017, arXiv:1608.03983.)
    """

    name: Literal["cosine"] = "cosine"
    final: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Last learning rate, as a fraction of the peak."""

    def _after_warmup(self, progress: float, fraction: float) -> float:
        return self.final + (1 - self.final) * (1 + math.cos(math.pi * progress)) / 2


class Step(Schedule):
    """Multiply by `gamma` at each milestone. The paper: by 0.2 at epochs 60, 120 and 160 of 200."""

    name: Literal["step"] = "step"
    milestones: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = (0.3, 0.6, 0.8)
    """Fractions of the run, so that a shorter run decays at the same relative points."""
    gamma: Annotated[float, Field(gt=0, le=1)] = 0.2

    def _after_warmup(self, progress: float, fraction: float) -> float:
        return self.gamma ** sum(fraction >= m for m in self.milestones)


AnySchedule = Annotated[
    Cosine | Step | Constant, Field(discriminator="name"), BeforeValidator(name_alone)
]


def _absolute_weights(weights: str) -> str:
    # a trial's process has its own working directory
    elsewhere = weights.split(":")[0] == "torchvision" or weights.startswith("~")
    return weights if elsewhere else str(Path(weights).absolute())


def _absolute_beginning(weights: str) -> str:
    if not weights:
        raise ValueError("needs a file, torchvision, torchvision:NAME or timm, got ''")
    return weights if weights == "timm" else _absolute_weights(weights)


class InitialWeights(Settings):
    """External weights with which a student begins, as for fine-tuning.

    Images are normalised by the data set, whatever the weights were trained with; `mean` and `std`
    of image folders and of data of your own can be set to theirs.
    """

    weights: Annotated[str, AfterValidator(_absolute_beginning)]
    """A file (safetensors or a torch state_dict), at the same path on every machine; `torchvision`,
    or `torchvision:NAME` for one of its sets of ImageNet weights; or `timm`, for a network of timm:
    its default weights of that name. Those of torchvision and timm are downloaded when a run
    begins. If they are for other classes, or have no head, the student gets a new head. The
    fingerprint of a run contains the name, not the content: rename a changed file. It is unknown
    what they were trained on."""
    lr_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Factor on the learning rate for each block between a parameter and the head, which has the
    full rate; 0.75 gives the third block from the end 0.56 of it. See `initial.depths` for what a
    block is."""


OF_LIBRARIES = ("torchvision", "timm")
"""Libraries that know how images were prepared for their weights."""


def _listed(numbers: Iterable[float]) -> str:
    return f"[{', '.join(f'{number:.4g}' for number in numbers)}]"


def _read_init(value: Any) -> Any:
    """Return settings of weights from a mapping; refuse other words than `random` and `trained`."""
    if isinstance(value, InitialWeights):
        return value
    if isinstance(value, Mapping):
        tree = dict(value)
        name = tree.pop("name", None)  # of a word among choices, or below which an override writes
        if name in ("random", "trained") and not tree:
            return name
        return InitialWeights.model_validate(tree if name == "random" else value)
    if value not in ("random", "trained"):
        hint = "random, trained, or settings: {weights: FILE}"
        if isinstance(value, str):
            raise ValueError(f"no such name {value!r}; it is {hint}")
        raise ValueError(f"needs {hint}, got {value!r}")
    return value


def _one_or_more(value: Any) -> Any:
    """Return a list of names; one name alone is a list of one."""
    return [value] if isinstance(value, str) else value


class TeacherInput(Settings):
    """Preprocessing of images for a teacher with external weights."""

    mean: Annotated[tuple[Level, ...], Field(min_length=1)]
    """Mean per channel, in pixel units of 0 to 255; ImageNet: 123.675, 116.28 and 103.53."""
    std: Annotated[tuple[Spread, ...], Field(min_length=1)]
    """Standard deviation per channel, in pixel units of 0 to 255; ImageNet: 58.395, 57.12 and
    57.375."""
    size: Annotated[int, Field(ge=8, le=1024)] | None = None
    """Height and width in pixels to which images are resized. None: the size of the data set's
    images."""


class TeacherConfig(Settings):
    """The teacher: trained on the student's train split with hard labels, or loaded from a file."""

    later: ClassVar[frozenset[str]] = frozenset({"input"})

    model: Model | None = None
    """The teacher's network. None: the student's network, as `tfkd_self` requires."""
    objective: Annotated[
        CrossEntropy | LabelSmoothing, Field(discriminator="name"), BeforeValidator(name_alone)
    ] = CrossEntropy()
    epochs: Count | None = None
    """Epochs of the teacher's training. None: as many as the student's."""
    optim: Optim = OptimConfig()
    schedule: AnySchedule = Cosine()
    seed: Annotated[int, Field(ge=0)] = 1_000_000
    """Seed of the teacher's run; it differs from the student's, so that a self teacher is a
    different run."""
    stop_epoch: Count | None = None
    """Stop after this epoch; the schedule still spans `epochs`. This makes a poorly trained teacher
    (De-KD of Yuan et al. 2020)."""
    stop_accuracy: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Stop after the first epoch with at least this accuracy on validation."""
    weights: Annotated[str, AfterValidator(_absolute_weights)] | None = None
    """External weights to load instead of training: a file (safetensors or a torch state_dict),
    `torchvision`, or `torchvision:NAME` for one of its sets of ImageNet weights. It is unknown what
    they were trained on."""
    input: TeacherInput | None = None
    """Preprocessing that `weights` were trained with. None: that of torchvision's weights or of
    timm's network; for other files, that of the data set."""
    labels: Literal["auto", "bank", "online", "top50"] = "auto"
    """bank: computes the teacher's logits once per view of the images, caches them on the node and
    shares them between all trials with that view, in half precision (float32 if they reach 128).
    online: computes them in every step. auto: bank, except for tiny teachers; online if a view
    takes more than 1 GiB. top50: a bank of the 50 largest logits and the mean and variance of the
    others, 208 bytes an image, for `kd` and `tfkd_self`. It does not keep which of the others are
    likelier, which matters more the higher T is. A run that would lose more than 1 % of its soft
    part is refused."""


class SharingTeacher(TeacherConfig):
    """One of several teachers: the student learns from the mean of their softened probabilities."""

    share: Positive = 1.0
    """Weight of its probabilities in the mean; the shares of all teachers are divided by their sum.
    It may be searched by a range, because no teacher depends on it."""


def _input_problems(teacher: TeacherConfig, channels: int, where: str) -> Iterator[str]:
    if teacher.input is None:
        return
    if teacher.weights is None:
        yield (
            f"{where}.input: is for {where}.weights; a teacher that is trained here gets the same images as the "
            "student; leave it out"
        )
        return
    for name, values in (("mean", teacher.input.mean), ("std", teacher.input.std)):
        if len(values) != channels:
            yield f"{where}.input.{name}: {len(values)} values for {channels} channels"


def number_teachers(tree: dict[str, Any]) -> None:
    """Put a list of teachers in a tree where their settings stand by number: below `teachers`.

    A name alone is that of the teacher's network: `teacher: cnn`.
    """
    given = tree.get("teacher")
    if isinstance(given, str):
        tree["teacher"] = {"model": given}
    if isinstance(given, list | tuple) and given and not tree.get("teachers"):
        tree["teachers"] = {
            str(k): {"model": teacher} if isinstance(teacher, str) else teacher
            for k, teacher in enumerate(given, start=1)
        }
        del tree["teacher"]


class TrainConfig(Settings):
    """The complete configuration of one training run: network, data, objective, optimizer, seed."""

    later: ClassVar[frozenset[str]] = frozenset({"loop", "teachers", "ema", "freeze"})

    recipe: str | None = None
    """Named settings to start from: `paper`, `modern`, ... (see `Dataset.recipes`). None: the data
    set's first recipe. Explicit settings override it."""
    data: Data = Digits()
    augment: Augment = Augment()
    """Augmentation of train images; none by default."""
    student: Model = Mlp()
    objective: Objective
    teacher: TeacherConfig | None = None
    """The teacher of `kd` and the other distillation objectives. `tfkd_self` has a default: the
    student's network under the recipe. The name of a network stands for `{model: NAME}`, and a list
    for `teachers`."""
    teachers: dict[str, SharingTeacher] = {}
    """Two or more teachers by number, from 1; written as a list, `teacher: [{...}, {...}]`. Each is
    an artifact of its own; the student learns from the mean of their softened probabilities."""
    init: Annotated[Literal["random", "trained"] | InitialWeights, BeforeValidator(_read_init)] = (
        "random"
    )
    """trained: starts from the weights of a trained copy of the student. With `ce`, that is
    training twice: the control for the time that `tfkd_self` spends on its teacher. Settings, such
    as `{weights: FILE}`: starts from external weights; so does the teacher of `tfkd_self`."""
    freeze: Annotated[
        tuple[Annotated[str, Field(min_length=1)], ...], BeforeValidator(_one_or_more)
    ] = ()
    """Parts of the student that are not trained, by their names in the network, with everything
    inside them; `*` and `?` are wildcards. Their BatchNorm keeps its statistics; dropout stays
    active. The teacher of `tfkd_self` has the same frozen parts, unless `init` is `trained`."""
    epochs: Count = 27
    optim: Optim = OptimConfig()
    """Optimizer, and the batch of an update; settings without a name are those of `sgd`."""
    schedule: AnySchedule = Cosine()
    ema: Ema | None = None
    """Exponential moving average of the weights; the average is then the student. None: off."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of initialisation, data order, augmentation and dropout, all of them pure functions of
    it."""
    workers: Annotated[int, Field(ge=1, le=4096)] = 1
    """Ray Train workers per trial; each processes its share of every batch."""
    cpus_per_worker: Count = 1
    """CPUs, and torch threads, per worker."""
    gpus_per_worker: Annotated[float, Field(ge=0)] = 0
    """GPUs per worker: 1, or a fraction, with which one-worker trials share a GPU. Above 1 only with
    a `loop` of your own, which uses them itself. 0: use the CPU, even on a node with GPUs."""
    accelerator_type: Annotated[str, Field(min_length=1)] | None = None
    """Kind of GPU that a worker needs, by Ray's name: H100, A100, ... None: any."""
    resources: dict[str, Positive] = {}
    """Custom Ray resources that each worker needs besides CPUs and GPUs, by the names that the
    nodes declare."""
    placement: Literal["pack", "spread"] = "pack"
    """Pack the workers of a trial on as few nodes as possible, or spread them over as many; a
    preference, not a requirement."""
    batch_norm: Literal["local", "sync"] = "local"
    """Compute batch statistics over each worker's share, or over all workers (GPU only)."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of student and teacher in training and validation; losses, weights, the optimizer
    and the test are always fp32. auto: bf16 on GPUs since Ampere and on CPUs with AMX, if the
    student gains by it (not below 2 million operations an image; on CPUs not `shufflenet_v2_x1_0`
    and `alexnet_small`). It is resolved when the file is read, and recorded."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Use torch.compile for the student. auto: off, because on CPUs it takes 10 to 50 s per batch
    shape, needs a C++ compiler, and makes large networks only 1 to 12 % faster."""
    checkpoint_every_s: Annotated[float, Field(ge=0)] = 10.0
    """Seconds between checkpoints of the whole run state, each written at the end of an epoch. 0:
    after every epoch."""
    loop: Annotated[OwnLoop | None, BeforeValidator(own_code.spelled_out)] = None
    """Training loop of your own, for student and teacher; `package.module:function` for short. None:
    that of this package."""

    @model_validator(mode="before")
    @classmethod
    def _with_recipe(cls, tree: Any) -> Any:
        """Return the tree with missing settings filled in from the recipe."""
        if not isinstance(tree, Mapping):
            return tree
        tree = dict(tree)
        number_teachers(tree)
        recipe = _recipe(tree.get("data"), tree.get("recipe"))
        result = filled(tree, recipe)
        of_teacher = {k: v for k, v in recipe.items() if k in TEACHER_RECIPE}
        if isinstance(tree.get("teacher"), Mapping):
            result["teacher"] = filled(tree["teacher"], of_teacher)
        if isinstance(tree.get("teachers"), Mapping):
            result["teachers"] = {
                str(number): filled(one, of_teacher) if isinstance(one, Mapping) else one
                for number, one in tree["teachers"].items()
            }
        return result

    @model_serializer(mode="wrap")
    def _as_before(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Return the settings, without those that are `later` and empty."""
        tree: dict[str, Any] = handler(self)
        if self.loop is None:
            tree.pop("loop", None)
        if not self.teachers:
            tree.pop("teachers", None)
        if self.ema is None:
            tree.pop("ema", None)
        if not self.freeze:
            tree.pop("freeze", None)
        self._name_optimizers(tree)
        return tree

    def _name_optimizers(self, tree: dict[str, Any]) -> None:
        """Write `name: sgd`, which is left out else, where the recipe has another optimizer."""
        recipes = self.data.recipes
        recipe = recipes[self.recipe] if self.recipe else next(iter(recipes.values()))
        if recipe.get("optim", {}).get("name", "sgd") == "sgd":
            return
        for part in (tree, tree.get("teacher"), *tree.get("teachers", {}).values()):
            if part and part.get("optim"):
                part["optim"].setdefault("name", "sgd")

    @field_validator("precision")
    @classmethod
    def _decided(cls, value: str, info: ValidationInfo) -> str:
        known = {"data", "student", "gpus_per_worker"} <= info.data.keys()
        if value != "auto" or not known:
            return value
        student, on_gpu = info.data["student"], info.data["gpus_per_worker"] > 0
        gains = student.operations(info.data["data"].shape) >= TINY_NETWORK and (
            student.fast_in_bf16 or on_gpu
        )
        return "bf16" if gains and _multiplies_bf16(on_gpu) else "fp32"

    @field_validator("compile")
    @classmethod
    def _off_if_auto(cls, value: str) -> str:
        return "off" if value == "auto" else value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        problems = list(self._teacher_problems())
        try:
            self.objective.check(self.data.num_classes)
        except ValueError as error:
            problems.append(str(error))
        if self.augment.resized_crop and not self.data.streams:
            problems.append(
                f"augment.resized_crop: for data sets of image files; {self.data.name} is in memory"
            )
        problems += [*self._network_problems(), *self._worker_problems(), *self._loop_problems()]
        problems += [*self._augment_problems(), *self._unlabelled_problems()]
        problems += [*self._layer_problems(), *self._optim_problems()]
        if self.teachers:
            problems += self._several_problems() or self._twins()
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def _network_problems(self) -> Iterator[str]:
        found: list[tuple[str, Network | None, tuple[int, int, int]]] = [
            ("student", self.student, self.data.shape)
        ]
        for where, teacher in self._given_teachers().items():
            found.append((f"{where}.model", teacher.model, self._teacher_shape(teacher)))
        for path, network, shape in found:
            try:
                if network is not None:
                    network.check(shape)
            except ValueError as error:
                yield f"{path}.{error}"

    def _worker_problems(self) -> Iterator[str]:
        gpus, workers = self.gpus_per_worker, self.workers
        if gpus > 1 and self.loop is None:
            yield (
                f"gpus_per_worker: one process trains on one GPU, got {gpus:g}; set gpus_per_worker: 1 and "
                f"workers: {workers * math.ceil(gpus)}, so that each GPU has a worker of its own"
            )
        elif gpus > 1 and gpus % 1:
            yield f"gpus_per_worker: above 1 it must be a whole number, got {gpus:g}"
        readers = getattr(self.data, "readers", 0)
        if (
            getattr(self.data, "decode_in", "threads") == "processes"
            and readers > self.cpus_per_worker
        ):
            yield (
                f"data.readers: {readers} processes that decode images need as many CPUs, and cpus_per_worker is "
                f"{self.cpus_per_worker}; set both alike, or data.decode_in: threads"
            )
        if self.accelerator_type and not gpus:
            yield (
                f"accelerator_type: {self.accelerator_type} is a kind of GPU; set gpus_per_worker, too"
            )
        if own := sorted(set(RAYS_OWN) & set(self.resources)):
            yield (
                f"resources.{own[0]}: is reserved by Ray; use custom resources only (cpus_per_worker, gpus_per_worker)"
            )
        if workers > 1 and 0 < gpus < 1:
            yield f"gpus_per_worker: {workers} workers need whole GPUs, got {gpus:g}"
        if self.batch_norm == "sync" and gpus == 0:
            yield (
                "batch_norm: sync needs GPUs (torch's SyncBatchNorm has no CPU form); set gpus_per_worker"
            )
        if workers > self.optim.batch_size:
            yield (
                f"optim.batch_size: {workers} workers cannot share {self.optim.batch_size} images"
            )

    def _optim_problems(self) -> Iterator[str]:
        found = [("optim", self.optim, self.workers)]
        for where, teacher in self._given_teachers().items():
            found.append((f"{where}.optim", teacher.optim, self._workers_of(teacher)))
        for where, optim, workers in found:
            if where != "optim" and workers > optim.batch_size:
                yield f"{where}.batch_size: {workers} workers cannot share {optim.batch_size} images"
            share = optim.batch_size // workers
            if 0 < share < optim.accumulate:
                of_worker = "" if workers == 1 else f" a worker's share of {optim.batch_size},"
                yield (
                    f"{where}.accumulate: {optim.accumulate} pieces of{of_worker} {share} images; lower it to {share}, "
                    "or raise batch_size"
                )
            yield from optim.problems(where)

    def _loop_problems(self) -> Iterator[str]:
        if self.loop is None:
            return
        if self.workers > 1:
            yield f"workers: a loop of your own trains in one process, got {self.workers}; set workers: 1"
        if self.init == "trained":
            yield "init: 'trained' is for the loop of this package; load the weights in your own one"
        if self.ema is not None:
            yield "ema: is for the loop of this package; average the weights in your own one, or leave it out"
        if self.initial_weights is not None:
            yield "init.weights: is for the loop of this package; load the weights in your own one"
        if self.freeze:
            yield "freeze: is for the loop of this package; freeze these parts in your own one"
        trains_teacher = self.needs_teacher and not (self.teacher and self.teacher.weights)
        yield from self.loop.problems(trains_teacher=trains_teacher)

    def _layer_problems(self) -> Iterator[str]:
        """Yield a sentence for each setting under which no layer's output reaches an objective."""
        called = self.objective.called
        if not self.objective.asks_for_layers:
            return
        if self.compile == "on":
            yield (
                f"compile: objective {called} needs the outputs of layers, which a compiled student does not provide; "
                "set compile: off"
            )
        if self.loop is not None:
            yield (
                f"objective.{called}.features: the loop of this package takes them from the networks; leave them out, "
                "and take them in your own loop"
            )

    def _augment_problems(self) -> Iterator[str]:
        """Yield a sentence for each augmentation that these images, or this objective, cannot have."""
        called, brightest = self.objective.called, self.data.brightest
        if self.augment.has_policy and brightest != 255:
            where = "augment.trivial" if self.augment.trivial else "augment.rand"
            yield f"{where}: is for pixels of 0 to 255, and those of {self.data.name} end at {brightest}; leave it out"
        if not self.augment.mixes:
            return
        where = "augment.mixup" if self.augment.mixup else "augment.cutmix"
        if self.loop is not None:
            yield f"{where}: the loop of this package mixes images; leave it out, and mix them in your own loop"
            return
        if self.objective.soft_labels:
            return
        way = "leave mixup and cutmix out, or choose another objective"
        if isinstance(self.objective, OwnObjective):
            way = f"declare {called}.soft_labels = True if it takes probabilities [B, K], or leave mixup and cutmix out"
        yield f"{where}: objective {called} has no form for the labels of mixed images; {way}"

    def _unlabelled_problems(self) -> Iterator[str]:
        """Yield a sentence for each setting that does not go with images without labels."""
        data, called = self.data, self.objective.called
        if data.unlabelled is None:
            if data.unlabelled_ratio != 1:
                yield (
                    f"data.unlabelled_ratio: is for unlabelled images, and data.unlabelled gives none, got "
                    f"{data.unlabelled_ratio:g}; leave it out"
                )
            return
        if not self.objective.learns_without_labels:
            why = "has no teacher, and images without labels have no other target"
            if self.objective.needs_teacher:
                why = "has no form for images without labels"
            yield (
                f"data.unlabelled: objective {called} {why}, got {data.unlabelled}; use one of "
                f"{', '.join(sorted(WITHOUT_LABELS))}, or leave it out"
            )
        if self.loop is not None:
            yield (
                "data.unlabelled: the loop of this package adds them to its steps; leave it out, and read them in your "
                "own loop"
            )
        if data.unlabelled == REST and data.subset is None:
            yield "data.unlabelled: rest is what data.subset leaves out, and there is none; set data.subset"
        if self.augment.resized_crop and (
            own_code.is_function(data.unlabelled) or is_array(data.unlabelled)
        ):
            yield (
                f"augment.resized_crop: crops image files as they are decoded, and data.unlabelled, {data.unlabelled}, "
                "is an array; give a folder of images, or leave the crop out"
            )
        size = self.optim.batch_size
        if round(data.unlabelled_ratio * size) < 1:
            yield (
                f"data.unlabelled_ratio: with {size} labelled images a step it rounds to none, got "
                f"{data.unlabelled_ratio:g}; raise it, or leave data.unlabelled out"
            )
        if self.compile == "on" and self.optim.accumulate > 1:
            yield (
                "compile: pieces of a batch with unlabelled images have more sizes than torch keeps graphs of; set "
                "compile: off, or optim.accumulate: 1"
            )

    def _given_teachers(self) -> dict[str, TeacherConfig]:
        """Return the settings of each teacher by their path; without any, the defaults of one."""
        if self.teachers:
            return {f"teachers.{number}": one for number, one in self.teachers.items()}
        return {"teacher": self.teacher or TeacherConfig()}

    def _teacher_problems(self) -> Iterator[str]:
        for where, teacher in self._given_teachers().items():
            yield from self._problems_of(teacher, where)

    def _problems_of(self, teacher: TeacherConfig, where: str) -> Iterator[str]:
        own_teacher = self.objective.needs_teacher and not isinstance(self.objective, TfkdSelf)
        if own_teacher and teacher.model is None:
            yield (
                f"{where}.model: objective {self.objective.called} needs a teacher's network, and none is given; add "
                "teacher: {model: ...}, or use tfkd_self, whose teacher is the student itself"
            )
        other = not self.teachers and teacher.model not in (None, self.student)
        if isinstance(self.objective, TfkdSelf) and other:
            yield "teacher.model: objective tfkd_self learns from a copy of the student; leave it out, or use kd"
        if self.init == "trained" and other:
            yield "init: 'trained' starts from a trained copy of the student, and the teacher here is another network"
        yield from _input_problems(teacher, self.data.shape[0], where)
        yield from self._top_problems(teacher, where)
        epochs = teacher.epochs or self.epochs
        if teacher.stop_epoch is not None and teacher.stop_epoch > epochs:
            yield f"{where}.stop_epoch: must be at most {where}.epochs, {epochs}, got {teacher.stop_epoch}"
        if teacher.stop_accuracy is not None and not self.data.val_fraction:
            yield (
                f"{where}.stop_accuracy: needs a validation split, and data.val_fraction is 0; use stop_epoch, or "
                "confirm --train-only"
            )

    def _top_problems(self, teacher: TeacherConfig, where: str) -> Iterator[str]:
        """Yield a sentence for each reason against a bank of the largest logits, if it is wanted."""
        if teacher.labels != "top50" or not self.objective.needs_teacher:
            return
        classes = self.data.num_classes
        if not isinstance(self.objective, KnowledgeDistillation):
            yield (
                f"{where}.labels: top50 is for kd and tfkd_self, and objective {self.objective.called} may need all "
                "logits; use bank or online"
            )
        if not KEPT < classes <= MOST_CLASSES:
            yield (
                f"{where}.labels: top50 is for {KEPT + 1} to {MOST_CLASSES} classes, and {self.data.name} has "
                f"{classes}; use bank or online"
            )
        if self.loop is not None:
            yield f"{where}.labels: a loop of your own calls the teacher itself, got top50; leave it out"

    def _several_problems(self) -> list[str]:
        """Return a sentence for each setting that does not go with several teachers."""
        count, found = len(self.teachers), []
        if wrong := next((name for name in self.teachers if not name.isdecimal()), None):
            found.append(
                f"teachers.{wrong}: teachers have numbers, got {wrong!r}; write a list, teacher: [{{...}}, {{...}}]"
            )
        if count == 1:
            found.append(
                "teacher: a list of one teacher, and several are two or more; write its settings without the list"
            )
        if self.teacher is not None:
            found.append(
                f"teacher: is one teacher beside the {count} of teachers; put all of them in one list"
            )
        if isinstance(self.objective, TfkdSelf):
            found.append(
                f"teacher: objective tfkd_self learns from one copy of the student, and {count} teachers are given; "
                "leave them out, or use kd"
            )
        if self.init == "trained":
            found.append(
                f"init: 'trained' starts from one trained copy of the student, and {count} teachers are given; give one"
            )
        if self.loop is not None and self.objective.needs_teacher:
            found.append(
                f"loop: a loop of your own gets one teacher, and {count} are given; give one, or combine them in a "
                "network of your own"
            )
        if isinstance(self.objective, OwnObjective) and self.objective.features.teacher:
            found.append(
                f"objective.{self.objective.called}.features.teacher: layers are those of one teacher, and {count} are "
                "given; give one, or leave these layers out"
            )
        return found

    def _twins(self) -> list[str]:
        """Return a sentence if two of several teachers are the same one."""
        made: dict[str, str] = {}
        for where, teacher in self._given_teachers().items():
            twin = made.setdefault(self._run_of(teacher).fingerprint(), where)
            if twin != where:
                return [
                    f"{where}: is the same teacher as {twin}; leave one out and change the other's share, or give "
                    "them different seeds"
                ]
        return []

    @property
    def worker_resources(self) -> dict[str, float]:
        """Return the resources that Ray reserves per worker, by Ray's names, with the GPU kind."""
        gpus = {"GPU": self.gpus_per_worker} if self.gpus_per_worker else {}
        kind = {f"{KIND}{self.accelerator_type}": 0.001} if self.accelerator_type else {}
        return {"CPU": float(self.cpus_per_worker), **gpus, **self.resources, **kind}

    @property
    def needs_teacher(self) -> bool:
        """Return whether this run needs a trained network before it starts."""
        return self.objective.needs_teacher or self.init == "trained"

    @property
    def initial_weights(self) -> str | None:
        """Return the external weights with which the student begins, or None."""
        return self.init.weights if isinstance(self.init, InitialWeights) else None

    @property
    def lr_decay(self) -> float:
        """Return the factor on the learning rate for each block before the head."""
        return self.init.lr_decay if isinstance(self.init, InitialWeights) else 1.0

    @property
    def banked(self) -> bool:
        """Return whether the logits of all teachers come from the bank; see `banks`."""
        return bool(self.banks) and all(self.banks)

    @property
    def banks(self) -> tuple[bool, ...]:
        """Return for each teacher whether its logits and layers come from the bank, if they fit.

        It is empty if the objective needs no teacher.
        """
        return tuple(kind != "online" for kind in self.label_kinds)

    @property
    def label_kinds(self) -> tuple[str, ...]:
        """Return for each teacher how its logits are kept: online, bank or top50."""
        if not self.objective.needs_teacher:
            return ()
        return tuple(map(self._labels_of, self._given_teachers().values()))

    def _labels_of(self, teacher: TeacherConfig) -> str:
        if self.loop is not None:
            return "online"
        if teacher.labels != "auto":
            return teacher.labels
        network = teacher.model or self.student
        return "bank" if network.operations(self.data.shape) >= TINY_NETWORK else "online"

    @property
    def shares(self) -> tuple[float, ...]:
        """Return the weights of several teachers in the mean of their probabilities; their sum is 1."""
        total = math.fsum(one.share for one in self.teachers.values())
        return tuple(one.share / total for one in self.teachers.values())

    def teacher_runs(self) -> tuple[TeacherRun, ...]:
        """Return the runs that train this run's teachers; empty if it needs none."""
        if not self.needs_teacher:
            return ()
        if self.teachers:
            return tuple(map(self._run_of, self.teachers.values()))
        recipe = {k: v for k, v in _recipe(self.data, self.recipe).items() if k in TEACHER_RECIPE}
        return (self._run_of(self.teacher or TeacherConfig(**recipe)),)

    def teacher_run(self) -> TeacherRun | None:
        """Return the run that trains this run's only teacher, or None if it needs none."""
        runs = self.teacher_runs()
        if len(runs) > 1:
            raise ValueError(f"this run has {len(runs)} teachers; ask for teacher_runs()")
        return runs[0] if runs else None

    def _workers_of(self, teacher: TeacherConfig) -> int:
        """Return how many workers train a teacher: as many as a student; one judges weights."""
        return 1 if teacher.weights else self.workers

    def _run_of(self, teacher: TeacherConfig) -> TeacherRun:
        begins: dict[str, Any] = {}
        if isinstance(self.objective, TfkdSelf) and self.init != "trained" and not teacher.weights:
            # it is the student itself, trained; the student's learning rates are its own
            begins["freeze"] = self.freeze
            if self.initial_weights is not None:
                begins["init"] = InitialWeights(weights=self.initial_weights)
        return TeacherRun(
            **begins,
            recipe=self.recipe,
            data=self.data.labelled,
            augment=self.augment,
            student=teacher.model or self.student,
            objective=teacher.objective,
            epochs=teacher.epochs or self.epochs,
            optim=teacher.optim,
            schedule=teacher.schedule,
            seed=teacher.seed,
            stop_epoch=teacher.stop_epoch,
            stop_accuracy=teacher.stop_accuracy,
            weights=teacher.weights,
            input=teacher.input,
            workers=self._workers_of(teacher),
            batch_norm=self.batch_norm,
            placement=self.placement,
            cpus_per_worker=self.cpus_per_worker,
            gpus_per_worker=min(self.gpus_per_worker, 1),
            accelerator_type=self.accelerator_type,
            resources=self.resources,
            precision=self.precision,
            compile=self.compile,
            loop=self.loop and self.loop.of_teacher(),
        )

    def try_own_code(self) -> list[str]:
        """Build external networks and call an own loss once, so that their errors appear at once.

        Return notes on settings that are allowed but probably a mistake.
        """
        if self.loop is not None:
            self.loop.ready()  # refuses other code than was recorded
        notes = [*self.try_objective(), *own_code.at_home(self._try_networks)()]
        self.try_optimizer()
        return list(dict.fromkeys([*notes, *self.try_beginning()]))

    def try_beginning(self) -> list[str]:
        """Load the student's external weights, if they are here, and freeze its parts.

        Nothing is downloaded. Return notes on what is new in the student.
        """
        if self.initial_weights is None and not self.freeze:
            return []
        return own_code.at_home(self._try_beginning)()

    def _try_beginning(self) -> list[str]:
        return [*self._normalised_otherwise(), *self.begin(self.build_student(), download=False)]

    def _normalised_otherwise(self) -> Sentences:
        """Yield a note if weights of torchvision or timm were trained on other statistics."""
        source = str(self.initial_weights).partition(":")[0]
        known = self.student.trained_with(self.data.shape) if source in OF_LIBRARIES else None
        of_data = self.data.mean, self.data.std
        if known is None or not all(of_data):
            return
        mean, std = (tuple(map(float, values)) for values in of_data if values)
        pairs = zip(mean, std, known[0], known[1], strict=True)
        if any(abs(m - a) > 0.1 * b or abs(s - b) > 0.1 * b for m, s, a, b in pairs):
            yield (
                f"init.weights: {self.initial_weights}: were trained on images with mean {_listed(known[0])} and std "
                f"{_listed(known[1])}, and the data here has {_listed(mean)} and {_listed(std)}; if parts are frozen, "
                "set data.mean and data.std to those of the weights, where the data has these settings"
            )

    def begin(self, student: nn.Module, *, load: bool = True, download: bool = True) -> list[str]:
        """Load a new student's external weights, and freeze its parts; return notes.

        Args:
            load: False only freezes.
            download: False checks what can be known of the weights without a download.
        """
        if self.initial_weights is None and not self.freeze:
            return []
        from tfkd_ray.learn import initial

        return initial.begin(
            student,
            self.student,
            self.data.shape,
            self.data.num_classes,
            weights=self.initial_weights if load else None,
            freeze=self.freeze,
            download=download,
        )

    def try_optimizer(self) -> None:
        """Raise a ConfigError if an optimizer has nothing to update, or is one's own and fails."""
        runs = [("optim", self), *(("teacher.optim", run) for run in self.teacher_runs())]
        for where, run in runs:
            trains = not isinstance(run, TeacherRun) or run.weights is None
            if trains and run.loop is None:
                run.optim.try_out(run.build_student, where)

    def _try_networks(self) -> list[str]:
        """Build the external networks of student and teacher, and train a step; return notes."""
        notes = []
        for run in (self, *self.teacher_runs()):
            alone = run.optim.smallest_piece(run.workers) < 2 and run.batch_norm != "sync"
            trains = not isinstance(run, TeacherRun) or run.weights is None
            if not isinstance(run.student, OwnNetwork | Timm) and not (alone and trains):
                continue
            shape = self.data.shape
            if run is not self and isinstance(run, TeacherRun):
                shape = resized(shape, run.shown)
            network = run.build_student(shape)
            what = run.student.called
            if trains:
                check_learns(what, network)
            if trains and alone:
                check_lone_image(what, network, shape)
            last = last_step(network, shape)
            if last is not None:
                notes.append(f"model {what}: {LAST_STEPS[last]}")
            if isinstance(run.student, OwnNetwork):
                again = run.build_student(shape)
                notes += _notes_of_chance(what, what_a_seed_leaves_open(network, again, shape))
        return notes

    def try_objective(self) -> list[str]:
        """Call an own loss on two small batches, with this run's networks if it asks for layers.

        Return notes on what is allowed but probably a mistake.
        """
        if not self.objective.asks_for_layers:
            return self.objective.try_out(self.data.num_classes)
        from tfkd_ray.learn.features import trial_batches

        objective, student, teacher = self._with_networks()
        assert isinstance(objective, OwnObjective), f"{objective=}"
        shapes = self.data.shape, self._teacher_shape(self._first_teacher)
        batches = trial_batches(student, teacher, objective, shapes, self.data.num_classes)
        return objective.try_out(self.data.num_classes, batches)

    def ready_objective(self) -> Canonical:
        """Return the objective for the batches of this run; see `Canonical.ready`.

        Raises:
            ConfigError: if it asks for a layer that its network lacks.
        """
        if not self.objective.asks_for_layers:
            return self.objective.ready()
        return self._with_networks()[0]

    @property
    def ce_share(self) -> float | None:
        """Return the weight of CE in the loss; see `Canonical.ce_share`."""
        if not self.objective.asks_for_layers:
            return self.objective.ce_share
        return self.ready_objective().ce_share

    def _with_networks(self) -> tuple[Canonical, nn.Module, nn.Module | None]:
        """Return the ready objective that asks for layers, and untrained networks that have them.

        The teacher is the first one, or None if the objective needs none.
        """
        from tfkd_ray.learn.features import shapes_of

        assert isinstance(self.objective, OwnObjective), f"{self.objective=}"
        asked, where = self.objective.features, f"objective.{self.objective.called}.features"
        student = self.build_student().to(memory_format=self.student.memory_format)
        about = f"{where}.student: {self.student.called}"
        of_student = shapes_of(student, asked.student, self.data.shape, about)
        runs = self.teacher_runs() if self.objective.needs_teacher else ()
        if not runs:
            return self.objective.ready(Layers(of_student, {}), self.seed), student, None
        run, shape = runs[0], self._teacher_shape(self._first_teacher)
        teacher = run.build_student(shape).to(memory_format=run.student.memory_format)
        about = f"{where}.teacher: {run.student.called}"
        of_teacher = shapes_of(teacher, asked.teacher, shape, about)
        layers = Layers(of_student, of_teacher)
        return self.objective.ready(layers, self.seed), student, teacher

    def build_student(self, shape: tuple[int, int, int] | None = None) -> nn.Module:
        """Return the student with its initial weights, all drawn from the run's seed."""
        with seeded(self.seed, "init"):
            return self.student.build(shape or self.data.shape, self.data.num_classes)

    @property
    def _first_teacher(self) -> TeacherConfig:
        return next(iter(self._given_teachers().values()))

    def _teacher_shape(self, teacher: TeacherConfig) -> tuple[int, int, int]:
        """Return (C, H, W) of a teacher's input images."""
        shown = known_input(
            teacher.weights, teacher.model or self.student, teacher.input, self.data
        )
        return resized(self.data.shape, shown)

    def pinned(self) -> Self:
        """Return the same run with the digests of the local data recorded; see `Dataset.pinned`."""
        return self.model_copy(update={"data": self.data.pinned()})

    def with_digests(self, digests: Mapping[str, str]) -> Self:
        """Return the same run with these digests of its data, where it has none already."""
        known = {*self.data.digests}
        if self.data.unlabelled is None:
            known.add("unlabelled_digest")
        new = {name: digest for name, digest in digests.items() if name not in known}
        return self.model_copy(update={"data": self.data.with_digests(new)}) if new else self

    def is_last(self, metrics: Mapping[str, float]) -> bool:
        """Return whether the run ends after the epoch with these metrics."""
        return metrics["epoch"] >= self.epochs

    def fingerprint(self, *more: Any) -> str:
        """Return 16 hex digits over all settings that affect the run's numbers.

        Settings of where it runs (`RUN_ONLY`) are excluded.
        """
        tree = {
            name: value
            for name, value in self.content().items()
            if name not in {*RUN_ONLY, "recipe", "teacher", "teachers"}
        }
        tree["data"] = self.data.identity()
        made: Any = [run.fingerprint() for run in self.teacher_runs()]
        banked: Any = self.banked
        if len(made) > 1:
            made, banked = [*zip(made, self.shares, strict=True)], self.banks
        else:
            made = made[0] if made else None
        if "top50" in self.label_kinds:
            banked = self.label_kinds
        text = json.dumps([tree, made, banked, *more], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


class TeacherRun(TrainConfig):
    """A run that makes a teacher: it may stop early or load its weights from a file."""

    stop_epoch: Count | None = None
    stop_accuracy: float | None = None
    weights: str | None = None
    input: TeacherInput | None = None
    later: ClassVar[frozenset[str]] = TrainConfig.later | {"input"}

    def is_last(self, metrics: Mapping[str, float]) -> bool:
        """Return whether the run ends after the epoch with these metrics."""
        return metrics["epoch"] >= (self.stop_epoch or self.epochs) or (
            self.stop_accuracy is not None and metrics["val_accuracy"] >= self.stop_accuracy
        )

    def fingerprint(self, *more: Any) -> str:
        """Return the run's fingerprint; external weights count by name, network and data."""
        if self.weights is None:
            return super().fingerprint(*more)
        tree = {
            "weights": self.weights,
            "student": self.student.content(),
            "data": self.data.identity(),
        }
        if (shown := self.shown) is not None:
            tree["input"] = shown.content()
        return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def shown(self) -> TeacherInput | None:
        """Return the preprocessing for external weights; None: that of the data set."""
        return known_input(self.weights, self.student, self.input, self.data)


def known_input(
    weights: str | None, network: Network, given: TeacherInput | None, data: Dataset
) -> TeacherInput | None:
    """Return the preprocessing of external weights: the given one, or torchvision's or timm's."""
    if weights is None or given is not None:
        return given
    if isinstance(network, Timm) or weights.partition(":")[0] == "torchvision":
        known = network.trained_with(data.shape)
        return TeacherInput(mean=known[0], std=known[1], size=known[2]) if known else None
    return None


def resized(shape: tuple[int, int, int], shown: TeacherInput | None) -> tuple[int, int, int]:
    """Return (C, H, W) of the images after this preprocessing."""
    return shape if shown is None or shown.size is None else (shape[0], shown.size, shown.size)


TEACHER_RECIPE = {"optim", "schedule"}
"""Recipe settings that a teacher with its own configuration also takes; it shares the rest with the
student."""


def _recipe(data: Any, name: Any) -> dict[str, Any]:
    """Return a recipe's settings; empty for an invalid data set, which is reported elsewhere."""
    given = name_alone(data if data is not None else Digits())
    word = None
    if isinstance(given, dict):
        word = given.get("name")
    elif isinstance(given, Dataset):
        word = given.name
    kinds = [
        m
        for m in members(TrainConfig.model_fields["data"])
        if tag(m) == word and issubclass(m, Dataset)
    ]
    if not kinds:
        return {}
    recipes = kinds[0].recipes
    if isinstance(name, str) and name not in recipes:
        raise ValueError(f"recipe: {word} has no recipe {name!r}; {did_you_mean(name, recipes)}")
    return recipes[name] if isinstance(name, str) else next(iter(recipes.values()))


def filled(tree: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return `tree` with defaults filled in; settings with a different `name` are left alone."""
    result = dict(tree)
    for key, default in defaults.items():
        given = name_alone(result[key]) if key in result else {}
        if key not in result:
            result[key] = default
        elif key == "optim" and _is_named_apart(given, default):
            result[key] = filled(given, {k: v for k, v in default.items() if k in OF_ALL})
        elif (
            isinstance(given, dict)
            and isinstance(default, dict)
            and given.get("name", "") in ("", default.get("name"))
        ):
            result[key] = filled(given, default)
    return result


OF_ALL = {"batch_size"}
"""Settings of a recipe's optimizer that are those of any other one, too."""


def _is_named_apart(given: Any, default: Any) -> bool:
    """Return whether settings have another name than a recipe's."""
    return (
        isinstance(given, Mapping)
        and isinstance(default, Mapping)
        and given.get("name", default.get("name")) != default.get("name")
    )


WITHOUT_LABELS = {
    str(tag(kind))
    for kind in leaves(Objective)
    if issubclass(kind, Canonical) and kind.learns_without_labels
}
"""Objectives that learn from images without labels, too."""
TINY_NETWORK = 2e6
"""Operations per forward pass below which bfloat16 gains nothing (measured: 0.5 to 1.5 times as
fast, above it 1.9 times)."""


def _multiplies_bf16(gpu: bool) -> bool:
    """Return whether bfloat16 is faster than float32 here.

    AVX512-BF16 without AMX is slower (benchmarks/formats.py). GPUs of other nodes are assumed to
    support it.
    """
    import torch

    if gpu:
        return not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] >= 8
    known = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(known.get("amx_bf16"))


RUN_ONLY = {"workers", "cpus_per_worker", "gpus_per_worker", "accelerator_type", "resources", "placement",
            "checkpoint_every_s"}  # fmt: skip
"""Settings of TrainConfig on where and how safely it runs. A sweep has one value of each and never
searches them."""

DRIVER = "tfkd_driver"
"""Custom resource of which the driver process of a multi-worker trial takes 0.01, so that it takes
no CPU from the workers."""


def _notes_of_chance(what: str, left_open: str | None) -> list[str]:
    """Return a note on a network of one's own that differs each time it is built; see
    `what_a_seed_leaves_open`."""
    way = (
        "seed its own generators, or draw from the global ones of torch, numpy or Python, which the run's seed sets; "
        "and initialise every weight (torch.empty does not)"
    )
    if left_open == "logits":
        raise ConfigError(
            f"model {what}: rebuilt with the same weights it gives other logits, so a loaded network would differ from "
            f"the trained one; {way}"
        )
    if left_open == "weights":
        return [
            f"model {what}: starts with other weights each time it is built, so the same configuration gives other "
            f"results each time; {way}"
        ]
    return []
