"""Objectives: each a frozen set of hyperparameters that is also the loss.

Every objective but the later variants (dkd, dist, kd_standardised) is one instance of the canonical
loss

    L = s * [(1 - alpha) * CE + alpha * T^2 * KL_batchmean(target_T || student_T)]

with s = `loss_scale`, so that alpha, T and s have the same meaning everywhere and transfer between
data sets. `batchmean` (sum over classes, mean over the batch) is the only reduction. To add an
objective, write a class with a `name`, and add one line to `Objective`. A loss of the user's own
needs no change here: `OwnObjective` names it.

Of mixed images (mixup, cutmix) the labels are `Mixed`: classes a and b and a share l, the soft target
q = l * e_a + (1 - l) * e_b. In place of the hard label, CE is that with q,
l * CE(a) + (1 - l) * CE(b), in every objective; the virtual teachers of tfkd_reg and tfkd_reg_code
are mixed as q is; soft parts of a teacher's logits know no label and stay, with the logits of the
mixed image. dkd has no such form.

Unlabelled images (`data.unlabelled`) take part in the soft part alone. A step of B labelled images
and U unlabelled ones, for the objectives that have a `soft_part` of logits only, has the loss

    L = s * [(1 - alpha) * CE(B) + alpha * T^2 * KD(B) + alpha * T^2 * KD(U)]

where each term is the mean over its own images: CE(B) and KD(B) over the labelled ones, as without
the others, and KD(U) over the unlabelled ones. Without any, KD(U) is left out. So the weight of the
unlabelled images does not depend on their number.

Shapes: B = batch, K = classes. Logits are float [B, K], labels int64 [B]; every loss is a scalar.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BeforeValidator, Field, JsonValue, PrivateAttr, model_validator

from tfkd_ray.learn.mixing import Mixed
from tfkd_ray.learn.own import code_of, is_only_reading
from tfkd_ray.learn.own_loss import (
    SIDES,
    Batch,
    Features,
    Layers,
    OwnLoss,
    Shape,
    facts_of,
    loss_problems,
    takes_soft_labels,
    temperature_of,
    tried,
)
from tfkd_ray.settings import own_code
from tfkd_ray.settings.errors import ConfigError
from tfkd_ray.settings.schema import Settings, leaves, tag

if TYPE_CHECKING:
    from torch import Tensor, nn

    Labels = Tensor | Mixed


NumpyArray = NDArray[Any]
Weight = Annotated[float, Field(ge=0, le=1)]
Temperature = Annotated[float, Field(gt=0, le=1e4)]
"""At 1e4 float32 rounds the gradient of a soft part by 0.04 % (K = 1000), at 1e7 by half of it."""
PositiveNumber = Annotated[float, Field(gt=0)]


class Terms(NamedTuple):
    """The two unweighted parts of a loss: scalars, means over the batch."""

    ce: Tensor
    """Cross-entropy with the labels, hard or mixed, in nats."""
    kd: Tensor | None
    """KL_batchmean(target_T || student_T) in nats, without T^2; None if there is no soft part."""


class Canonical(Settings):
    """Base class of objectives: the loss scale, and the combination of the two parts."""

    needs_teacher: ClassVar[bool] = False
    soft_labels: ClassVar[bool] = True
    """Whether labels may be mixed."""
    learns_without_labels: ClassVar[bool] = False
    """Whether images without labels may take part; see `soft_part`."""
    compares_images: ClassVar[bool] = False
    """Whether the loss of a batch is more than a mean over its images, so that pieces change it."""
    has_parts: ClassVar[bool] = True
    """Whether `terms` are CE and a soft part; False: `Terms.ce` is the whole loss."""
    searchable: ClassVar[frozenset[str] | None] = None
    """Names of settings that a space may search; None: all. The others duplicate the searchable
    ones."""

    loss_scale: PositiveNumber = 1.0
    """s: factor on the whole loss; at fixed weight decay it acts like a learning rate."""

    @property
    def called(self) -> str:
        """Return the name by which its trials are listed."""
        return str(tag(type(self)))

    @property
    def ce_share(self) -> float | None:
        """Return the weight of CE in the whole loss, s * (1 - alpha); None if it is unknown."""
        return self.loss_scale * self.ce_weight if self.has_parts else None

    @property
    def kd_weight(self) -> float:
        """Return alpha * T^2, the weight of `Terms.kd` inside the brackets."""
        return 0.0

    @property
    def ce_weight(self) -> float:
        """Return 1 - alpha, the weight of `Terms.ce` inside the brackets."""
        return 1.0

    @property
    def teacher_temperature(self) -> float:
        """Return T at which the probabilities of several teachers are averaged.

        It is the temperature by which the loss divides the teacher's logits; 1 if there is none.
        """
        return 1.0

    def check(self, num_classes: int) -> None:
        """Raise ValueError if a hyperparameter makes no sense for this number of classes."""

    @property
    def asks_for_layers(self) -> bool:
        """Return whether it learns from layers of the networks, too; see features.py."""
        return False

    @property
    def teacher_layers(self) -> Mapping[str, Shape]:
        """Return the teacher's layers that a `ready` objective asks for, with their shapes."""
        return {}

    def try_out(self, num_classes: int, batches: list[Batch] | None = None) -> list[str]:
        """Call a loss of the user's own once, so that its errors appear before anything starts.

        Return notes on what is allowed but probably a mistake. A loss that asks for layers is
        `ready`, and gets two batches with their outputs.
        """
        return []

    def ready(self, layers: Layers | None = None, seed: int = 0) -> Self:
        """Return this objective for the batches of a run; the user's own code is loaded once.

        Args:
            layers: those that it asks for, of the run's networks.
            seed: of the run, for weights of its own.
        """
        return self

    def terms(self, logits: Tensor, labels: Labels, teacher: Tensor | None = None) -> Terms:
        """Return the unweighted CE and KL of one batch (means over the batch, nats)."""
        return Terms(_cross_entropy(logits, labels), None)

    def soft_part(self, logits: Tensor, teacher: Tensor) -> Tensor:
        """Return `Terms.kd` of images without labels, a scalar; see `learns_without_labels`."""
        raise TypeError(f"objective {self.called}: has no form for images without labels")

    def soft_target(
        self, labels: NumpyArray, teacher: NumpyArray
    ) -> tuple[NumpyArray, float] | None:
        """Return (q, T), the soft target and the temperature of an image's soft part.

        The gradient of `Terms.kd` by an image's logits z is (softmax(z / T) - q) / (T * B). None if
        the gradient does not have this form, or the objective does not give it; `tfkd explain` then
        computes it with torch. This function does not use torch.

        Args:
            labels: [B]; of mixed images the probabilities q, [B, K].
            teacher: logits, float64 [B, K].
        """
        return None

    def combine(self, terms: Terms, unlabelled: Tensor | None = None) -> Tensor:
        """Return the loss of these terms, a scalar: the canonical one, or s times the whole.

        Args:
            unlabelled: `soft_part` of the step's unlabelled images. None: there are none.
        """
        if not self.has_parts:
            return terms.ce if self.loss_scale == 1 else self.loss_scale * terms.ce
        loss = self.ce_weight * terms.ce
        if terms.kd is not None:
            loss = loss + self.kd_weight * terms.kd
        if unlabelled is not None:
            loss = loss + self.kd_weight * unlabelled
        return self.loss_scale * loss

    def __call__(self, logits: Tensor, labels: Labels, teacher: Tensor | None = None) -> Tensor:
        return self.combine(self.terms(logits, labels, teacher))


class CrossEntropy(Canonical):
    """Plain training; with `loss_scale` below 1, the control for losses of a smaller CE weight.

    Of mixed images: l * CE(a) + (1 - l) * CE(b).
    """

    name: Literal["ce"] = "ce"


class LabelSmoothing(Canonical):
    """Label-smoothing regularisation. (Szegedy et al. 2016, arXiv:1512.00567.)

    As in Eq. 1-3 of Yuan et al. 2020, alpha is spread over all K classes, the label included. The
    Tf-KD authors' code leaves exactly 1 - alpha on the label and spreads alpha over the other K - 1
    classes: its alpha is (K - 1) / K times this one. The second term is KL(u || p) with u = 1/K;
    the loss is torch's `label_smoothing=alpha` less alpha * log K. Of mixed images, q is smoothed:
    (1 - alpha) * CE(q) + alpha * KL(u || p).
    """

    name: Literal["lsr"] = "lsr"
    alpha: Weight = 0.1
    """Probability moved from the label to the uniform distribution."""

    @property
    def kd_weight(self) -> float:
        return self.alpha

    @property
    def ce_weight(self) -> float:
        return 1 - self.alpha

    def terms(self, logits: Tensor, labels: Labels, teacher: Tensor | None = None) -> Terms:
        from torch.nn import functional as F

        log_p = F.log_softmax(logits, dim=1)
        uniform_ce = -log_p.mean(dim=1).mean()
        return Terms(_nll(log_p, labels), uniform_ce - math.log(logits.shape[1]))

    def soft_target(self, labels: NumpyArray, teacher: NumpyArray) -> tuple[NumpyArray, float]:
        return np.full_like(teacher, 1 / teacher.shape[1]), 1.0


class _Distillation(Canonical):
    """The parts of a KD loss in canonical form: `alpha` and `temperature`."""

    alpha: Weight = 0.9
    """Weight of the soft part; 1 - alpha is the weight of cross-entropy."""
    temperature: Temperature = 4.0
    """T: divides the logits of both sides; T^2 keeps the gradient's size (Hinton et al. 2015)."""

    @property
    def kd_weight(self) -> float:
        return self.alpha * self.temperature**2

    @property
    def ce_weight(self) -> float:
        return 1 - self.alpha

    @property
    def teacher_temperature(self) -> float:
        return self.temperature


class KnowledgeDistillation(_Distillation):
    """Knowledge distillation with a trained teacher. (Hinton et al. 2015, arXiv:1503.02531.)

    Yuan et al. 2020 print it as Eq. 4 without T^2 and release it with `mean` reduction, which
    divides by B * K: see `from_released`. Of mixed images: CE with q, and the KL to the teacher's
    probabilities of the mixed image (function matching, Beyer et al. 2022, arXiv:2106.05237).
    """

    needs_teacher: ClassVar[bool] = True
    learns_without_labels: ClassVar[bool] = True
    name: Literal["kd"] = "kd"

    def terms(self, logits: Tensor, labels: Labels, teacher: Tensor | None = None) -> Terms:
        teacher = _needed(teacher, logits, self.name)
        return Terms(_cross_entropy(logits, labels), self.soft_part(logits, teacher))

    def soft_part(self, logits: Tensor, teacher: Tensor) -> Tensor:
        return softened_kl(logits, teacher, self.temperature)

    def soft_target(self, labels: NumpyArray, teacher: NumpyArray) -> tuple[NumpyArray, float]:
        return softmax(teacher / self.temperature), self.temperature


class TfkdSelf(KnowledgeDistillation):
    """Tf-KD_self: KD from a trained copy of the student itself. (Eq. 7 of Yuan et al. 2020.)"""

    name: Literal["tfkd_self"] = "tfkd_self"  # type: ignore[assignment]


class DecoupledKD(_Distillation):
    """Decoupled KD: KL of label against rest, and KL within the rest. (arXiv:2203.08679.)

    (Zhao et al. 2022.) The soft part is `target_weight` * TCKD + `nontarget_weight` * NCKD. The
    published code adds both, with T^2, to a CE of weight 1: that is alpha = 1/2 and loss_scale = 2
    here. Both parts are computed from logarithms, so they stay finite if a probability rounds to 0
    or 1. Its parts need one label an image, so there is no form for mixed images.
    """

    needs_teacher: ClassVar[bool] = True
    soft_labels: ClassVar[bool] = False
    name: Literal["dkd"] = "dkd"
    target_weight: Annotated[float, Field(ge=0)] = 1.0
    """alpha of the paper."""
    nontarget_weight: Annotated[float, Field(ge=0)] = 8.0
    """beta of the paper."""

    def terms(self, logits: Tensor, labels: Labels, teacher: Tensor | None = None) -> Terms:
        import torch
        from torch.nn import functional as F

        teacher = _needed(teacher, logits, self.name)
        if isinstance(labels, Mixed):
            raise ValueError(f"objective {self.name}: has no form for the labels of mixed images")
        ce = _cross_entropy(logits, labels)
        other = torch.arange(logits.shape[1] - 1, device=logits.device)[None, :]
        other = other + (other >= labels[:, None])  # a boolean mask would wait for the device
        log_p, log_p_else, among_p = _decoupled(logits / self.temperature, labels, other)
        log_q, log_q_else, among_q = _decoupled(teacher / self.temperature, labels, other)
        target = (
            log_q.exp() * (log_q - log_p) + log_q_else.exp() * (log_q_else - log_p_else)
        ).mean()
        nontarget = F.kl_div(among_p, among_q, reduction="batchmean", log_target=True)
        return Terms(ce, self.target_weight * target + self.nontarget_weight * nontarget)


class Dist(_Distillation):
    """DIST: correlation with the teacher's probabilities. (Huang et al. 2022, arXiv:2205.10536.)

    Eq. 6-9: the soft part is 1 - Pearson correlation with the teacher's softened probabilities:
    over the classes of an image (`inter_weight`), and over the images of the batch for each class
    (`intra_weight`). The second depends on the batch size and on the split of the batch over
    workers. The gradient is bounded for a student whose deviation is nearly 0. Of mixed images: CE
    with q, and the relations with the teacher's probabilities of these images.
    """

    needs_teacher: ClassVar[bool] = True
    learns_without_labels: ClassVar[bool] = True
    compares_images: ClassVar[bool] = True
    name: Literal["dist"] = "dist"
    temperature: Temperature = 1.0
    inter_weight: Annotated[float, Field(ge=0)] = 1.0
    """beta of the paper."""
    intra_weight: Annotated[float, Field(ge=0)] = 1.0
    """gamma of the paper."""

    def terms(self, logits: Tensor, labels: Labels, teacher: Tensor | None = None) -> Terms:
        teacher = _needed(teacher, logits, self.name)
        return Terms(_cross_entropy(logits, labels), self.soft_part(logits, teacher))

    def soft_part(self, logits: Tensor, teacher: Tensor) -> Tensor:
        from torch.nn import functional as F

        p = F.softmax(logits / self.temperature, dim=1)
        q = F.softmax(teacher.to(logits.dtype) / self.temperature, dim=1)
        return self.inter_weight * _unlike(p, q) + self.intra_weight * _unlike(p.T, q.T)


class StandardisedKD(_Distillation):
    """KD of standardised logits: mean 0 and deviation 1 per image on both sides, then divided by T.

    (Sun et al. 2024, arXiv:2403.01427, Eq. 9 and Algorithm 1; their weights .1 for CE and 9 are
    alpha = .989, s = 9.1.) A student's deviation below 0.1 counts as 0.1, so that the gradient
    stays bounded for a head that starts at zero. Of mixed images: CE with q, and the KL to the
    teacher's standardised logits of the mixed image.
    """

    needs_teacher: ClassVar[bool] = True
    learns_without_labels: ClassVar[bool] = True
    name: Literal["kd_standardised"] = "kd_standardised"
    temperature: Temperature = 2.0

    @property
    def teacher_temperature(self) -> float:
        """Return 1: its temperature divides standardised logits, not the teacher's."""
        return 1.0

    def terms(self, logits: Tensor, labels: Labels, teacher: Tensor | None = None) -> Terms:
        teacher = _needed(teacher, logits, self.name)
        return Terms(_cross_entropy(logits, labels), self.soft_part(logits, teacher))

    def soft_part(self, logits: Tensor, teacher: Tensor) -> Tensor:
        return softened_kl(_standardised(logits, LEAST), _standardised(teacher), self.temperature)


class TfkdReg(_Distillation):
    """Tf-KD_reg: KD from a virtual teacher, as the paper defines it, with T^2.

    (Eq. 8 and 9 of Yuan et al. 2020.) The virtual teacher gives p^d = `correct_prob` to the label
    and shares the rest equally. Its logits are log p^d; T softens both sides. Without T^2, as Eq. 9
    is printed, the term is nearly zero (about 1e-3 of CE's gradient at T = 20). The authors' code
    computes another loss: `tfkd_reg_code`. Of mixed images, the softened virtual teachers t of both
    labels are mixed: KL(l * t_a + (1 - l) * t_b || student_T).
    """

    name: Literal["tfkd_reg"] = "tfkd_reg"
    alpha: Weight = 0.1
    temperature: Temperature = 20.0
    correct_prob: Annotated[float, Field(gt=0, lt=1)] = 0.99
    """a of Eq. 8: the virtual teacher's probability of the label; at least 1/K, below 1."""

    def check(self, num_classes: int) -> None:
        if self.correct_prob < 1 / num_classes:
            raise ValueError(
                f"objective.{self.name}.correct_prob: must be at least 1/K = {1 / num_classes:g} (K = {num_classes} "
                f"classes), got {self.correct_prob:g}: below it the virtual teacher prefers the wrong classes"
            )

    def terms(self, logits: Tensor, labels: Labels, teacher: Tensor | None = None) -> Terms:
        gap = self._gap(logits.shape[1])
        return Terms(_cross_entropy(logits, labels), flat_kl(logits, labels, gap, self.temperature))

    def soft_target(self, labels: NumpyArray, teacher: NumpyArray) -> tuple[NumpyArray, float]:
        return _flat(labels, self._gap(teacher.shape[1]), teacher.shape[1]), self.temperature

    def _gap(self, num_classes: int) -> float:
        """Return the softened logit of the label minus that of the other classes."""
        gap = math.log(self.correct_prob) - math.log((1 - self.correct_prob) / (num_classes - 1))
        return gap / self.temperature


class TfkdRegCode(Canonical):
    """Tf-KD_reg as the authors released it (commit d000ab3), in canonical numbers.

    It differs from Eq. 9: the target is softmax(p^d / T), a temperature on probabilities; the
    student is not softened; there is no T^2. It equals s * LSR(eps) + constant for every T and
    correct_prob (`as_label_smoothing`), so a space searches `alpha` and `loss_scale` only. Of mixed
    images, its targets t are mixed: KL(l * t_a + (1 - l) * t_b || student).
    """

    searchable: ClassVar[frozenset[str] | None] = frozenset({"alpha", "loss_scale"})
    name: Literal["tfkd_reg_code"] = "tfkd_reg_code"
    alpha: Weight = 0.1
    """Weight of the soft part in canonical form (not the released alpha: `from_released`)."""
    temperature: Temperature = 20.0
    """Divides the virtual teacher's probabilities, not its logits."""
    correct_prob: Annotated[float, Field(gt=0, le=1)] = 0.99
    """p^d of the label; the release hard-codes 0.99."""

    @property
    def kd_weight(self) -> float:
        return self.alpha

    @property
    def ce_weight(self) -> float:
        return 1 - self.alpha

    def check(self, num_classes: int) -> None:
        if self.correct_prob < 1 / num_classes:
            raise ValueError(
                f"objective.{self.name}.correct_prob: must be at least 1/K = {1 / num_classes:g} (K = {num_classes} "
                f"classes), got {self.correct_prob:g}"
            )

    def terms(self, logits: Tensor, labels: Labels, teacher: Tensor | None = None) -> Terms:
        return Terms(
            _cross_entropy(logits, labels), flat_kl(logits, labels, self._gap(logits.shape[1]), 1.0)
        )

    def soft_target(self, labels: NumpyArray, teacher: NumpyArray) -> tuple[NumpyArray, float]:
        return _flat(labels, self._gap(teacher.shape[1]), teacher.shape[1]), 1.0

    def as_label_smoothing(self, num_classes: int) -> LabelSmoothing:
        """Return the `lsr` whose loss is this one less a constant, with the same scale.

        Its alpha is alpha * (1 - p_c) * K / (K - 1), where p_c is the target's probability of the
        label, softmax(p^d / T).
        """
        K = num_classes
        e = math.exp(-self._gap(K))
        other = e / (1 + (K - 1) * e)  # probability of each class that is not the label
        return LabelSmoothing(alpha=min(self.alpha * other * K, 1.0), loss_scale=self.loss_scale)

    def _gap(self, num_classes: int) -> float:
        """Return the logit of the label minus that of the other classes."""
        return (self.correct_prob - (1 - self.correct_prob) / (num_classes - 1)) / self.temperature


def _as_text(name: Any) -> Any:
    """Return the name of a layer of `nn.Sequential`, which YAML reads as a number, as text."""
    return str(name) if isinstance(name, int) and not isinstance(name, bool) else name


def _as_list(names: Any) -> Any:
    """Return the name of a single layer as a list."""
    return [names] if isinstance(names, str | int) else names


LayerNames = Annotated[
    tuple[Annotated[str, Field(min_length=1), BeforeValidator(_as_text)], ...],
    BeforeValidator(_as_list),
]


class FeatureLayers(Settings):
    """Layers whose outputs an own objective gets for each batch.

    They are named as in `named_modules()` of the network: layer3, layer3.0.conv1, or 4 in an
    nn.Sequential. A layer runs once in a forward pass and gives a tensor [B, ...].
    """

    student: LayerNames = ()
    """The loss gets a parameter `student_features`: a mapping from layer to output, with
    gradient."""
    teacher: LayerNames = ()
    """The loss gets a parameter `teacher_features`: a mapping from layer to output. They come from
    the bank if all of them together fit as logits do, otherwise the teacher runs in every step."""


class OwnObjective(Canonical):
    """A loss of your own: `package.module:function`, or a class with `terms`.

    A function is called as `function(logits, labels, **args)`, or `function(logits, labels,
    teacher, **args)` if it needs a teacher, and returns a scalar, the mean over the batch. An object
    of a class, `Class(**args)`, has `terms(logits, labels[, teacher])`, which returns (ce, soft);
    its loss is `ce_weight` * ce + `kd_weight` * soft, where a weight that it lacks is 1. Logits and
    teacher's logits are float32 [B, K], labels int64 [B]. The name of its trials is the function's.
    Of mixed images, a function or class with `soft_labels = True` gets q as labels, float32 [B, K].
    """

    later: ClassVar[frozenset[str]] = frozenset({"features"})
    name: Literal["own"] = "own"
    path: str
    """Path of the function or class, `package.module:name`, in an installed package or in the
    working directory of `tfkd`, where it also runs."""
    args: dict[str, JsonValue] = {}
    """Arguments besides those of a batch. Each may be searched."""
    digest: str | None = None
    """Digest of the function's file and of all files of your own that it imports, recorded when a
    file is read. A run refuses other code; without it, the code as it is now counts."""
    taught: bool | None = None
    """Whether it needs a teacher, recorded from its signature: it has a parameter `teacher` or
    `teacher_features` without a default, or `features` names layers of the teacher."""
    features: FeatureLayers = FeatureLayers()
    """Layers of student and teacher whose outputs it gets, too."""
    _loss: OwnLoss | None = PrivateAttr(None)

    def __hash__(self) -> int:
        return hash(json.dumps(self.model_dump(mode="json")))

    @model_validator(mode="before")
    @classmethod
    def _recorded(cls, tree: Any) -> Any:
        if not isinstance(tree, Mapping):
            return tree
        if others := sorted({*tree} - {*cls.model_fields}):
            raise ValueError(
                f"{others[0]}: an own objective has no such setting; if it is an argument of its function, write it "
                f"below args: args: {{{others[0]}: ...}}"
            )
        return recorded(tree)

    @property
    def called(self) -> str:
        return str(own_code.shown_name(self.path))

    @property
    def needs_teacher(self) -> bool:  # type: ignore[override]
        """Return whether its function needs a teacher's logits or layers."""
        return bool(self.taught)

    @property
    def asks_for_layers(self) -> bool:
        return bool(self.features.student or self.features.teacher)

    @property
    def teacher_layers(self) -> Mapping[str, Shape]:
        layers = self._ready_loss.layers if self.asks_for_layers else None
        return {} if layers is None else layers.teacher

    @property
    def has_parts(self) -> bool:  # type: ignore[override]
        """Return whether it is a class with `terms`; a function gives the whole loss."""
        return self._ready_loss.has_parts

    @property
    def soft_labels(self) -> bool:  # type: ignore[override]
        """Return whether it declares `soft_labels = True`: labels may be probabilities [B, K].

        True if its code may not be read, or cannot.
        """
        return is_only_reading() or takes_soft_labels(self.path)

    @property
    def kd_weight(self) -> float:
        return self._ready_loss.weight("kd_weight") * self._ready_loss.weight("loss_scale")

    @property
    def ce_weight(self) -> float:
        return self._ready_loss.weight("ce_weight") * self._ready_loss.weight("loss_scale")

    @property
    def teacher_temperature(self) -> float:
        """Return its argument `temperature`, given or by default; 1 without one."""
        return temperature_of(self.path, self.args)

    @property
    def ce_share(self) -> float | None:
        """Return the weight of CE; None for a function, or if the first term is another.

        Of an objective that asks for layers, it is known when it is `ready`.
        """
        if (self.asks_for_layers and self._loss is None) or not self.has_parts:
            return None
        import torch

        g = torch.Generator().manual_seed(0)
        logits, teacher = (torch.randn(4, 3, generator=g) for _ in range(2))
        labels = torch.tensor([0, 1, 2, 0])
        features = self._ready_loss.random_features(4, g)
        ce = self.terms(logits, labels, teacher if self.needs_teacher else None, features).ce
        same = torch.allclose(ce, _cross_entropy(logits, labels), rtol=1e-4)
        return self.loss_scale * self.ce_weight if same else None

    def check(self, num_classes: int) -> None:
        """Raise ValueError if the function is missing or refuses these arguments."""
        if is_only_reading():
            return
        problems = []
        if self.called in NAMES:
            problems.append(
                f"objective.own.path: {self.path} has the name of the objective {self.called}; rename your function"
            )
        if not re.fullmatch(r"\w{1,40}", self.called, re.ASCII):
            problems.append(
                f"objective.own.path: its function's name becomes that of trials and arms, so it has up to 40 letters "
                f"from a to z, digits and _, got {self.called!r}; rename it"
            )
        asked = {side: getattr(self.features, side) for side in SIDES}
        problems += loss_problems(self.path, self.args, asked, f"objective.{self.called}")
        if problems:
            raise ValueError("\n".join(problems))

    def try_out(self, num_classes: int, batches: list[Batch] | None = None) -> list[str]:
        ready = self if batches else self.ready()

        def total(batch: Batch) -> Tensor:
            return ready.combine(ready.terms(*batch))

        return tried(ready._ready_loss, total, num_classes, batches)

    def ready(self, layers: Layers | None = None, seed: int = 0) -> Self:
        if (changed := self.changed()) is not None:
            raise ConfigError(
                f"objective.{self.called}.digest: {changed}. Put the old code back, or begin anew with the code as it "
                "is (in a file of one run: leave digest out)"
            )
        return self.loaded(layers, seed)

    def loaded(self, layers: Layers | None = None, seed: int = 0) -> Self:
        """Return `ready`, whatever its code is now."""
        assert self.asks_for_layers == (layers is not None), f"{self.features=} {layers=}"
        found = self.model_copy()
        found._loss = OwnLoss(self.path, self.args, layers, seed if layers else 0)
        return found

    def owned(self) -> nn.Module:
        """Return a module of the parameters that it owns, of a `ready` objective."""
        return self._ready_loss.owned()

    def changed(self) -> str | None:
        """Return a sentence if the code is not what was recorded, else None."""
        facts = facts_of(self.path)
        if facts is None or self.digest in (None, facts.code.digest):
            return None
        return (
            f"the code of {self.called} is not what it was: {facts.code} had digest {self.digest}, and has "
            f"{facts.code.digest} now"
        )

    def as_it_is_now(self) -> Self:
        """Return the same objective with its present code recorded."""
        return self.model_copy(update={"digest": code_of(self.path).digest})

    def terms(
        self,
        logits: Tensor,
        labels: Labels,
        teacher: Tensor | None = None,
        features: Features | None = None,
    ) -> Terms:
        loss = self._ready_loss
        if loss.takes_teacher:
            teacher = _needed(teacher, logits, self.called)
        if isinstance(labels, Mixed):
            labels = labels.probabilities(logits.shape[1])
        whole, ce, kd = loss(logits, labels, teacher, features)
        if whole is not None:
            return Terms(whole, None)
        assert ce is not None, f"{ce=}"
        return Terms(ce, kd)

    @property
    def _ready_loss(self) -> OwnLoss:
        """Return the loss of `ready`, or another one for a single use."""
        if self._loss is not None:
            return self._loss
        assert not self.asks_for_layers, f"{self.called} must be ready: it needs the networks"
        return OwnLoss(self.path, self.args)


def recorded(tree: Any) -> Any:
    """Return an objective's settings; an own one's with what its code says, where it is run."""
    tree = own_code.spelled_out(tree)
    if not isinstance(tree, Mapping) or tree.get("name") != "own" or is_only_reading():
        return tree
    path = tree.get("path")
    facts = facts_of(path) if isinstance(path, str) else None
    if facts is None:
        return tree
    features = tree.get("features")
    asked = features.get("teacher") if isinstance(features, Mapping) else None
    taught = facts.taught or bool(asked)
    return {**tree, "digest": tree.get("digest") or facts.code.digest, "taught": taught}


Objective = Annotated[
    CrossEntropy
    | LabelSmoothing
    | KnowledgeDistillation
    | TfkdSelf
    | TfkdReg
    | TfkdRegCode
    | DecoupledKD
    | Dist
    | StandardisedKD
    | OwnObjective,
    Field(discriminator="name"),
    BeforeValidator(own_code.spelled_out),
]
NAMES = {str(tag(kind)) for kind in leaves(Objective)}
"""Names of the objectives, which a function of the user's own cannot have."""


def _needed(teacher: Tensor | None, logits: Tensor, name: str) -> Tensor:
    """Return the teacher's logits; raise a ValueError if they are none, or not of the student's shape.

    Torch would broadcast logits [1, K] to each image of the batch.
    """
    if teacher is None:
        raise ValueError(f"objective {name}: needs the teacher's logits [B, K], got none")
    if teacher.shape != logits.shape:
        raise ValueError(
            f"objective {name}: needs the teacher's logits in the shape of the student's, "
            f"{list(logits.shape)}, got {list(teacher.shape)}"
        )
    return teacher


def _decoupled(logits: Tensor, labels: Tensor, other: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return log p(label) [B], log(1 - p(label)) [B], and the log-softmax of the others [B, K - 1].

    Args:
        other: int64 [B, K - 1], the classes that are not the label.
    """
    rest = logits.gather(1, other)
    norm, rest_norm = logits.logsumexp(dim=1), rest.logsumexp(dim=1)
    return (
        logits.gather(1, labels[:, None])[:, 0] - norm,
        rest_norm - norm,
        rest - rest_norm[:, None],
    )


LEAST = 0.1
"""Smallest deviation of a student's logits that is scaled up to 1; smaller ones count as this.

Without this bound, the gradient grows as 1 over the deviation: 1e7 times too large for a head that
starts at zero. Heads with usual initialisation have deviations of at least 0.2, where the bound
changes nothing.
"""


def _unlike(a: Tensor, b: Tensor, eps: float = 1e-8) -> Tensor:
    """Return the mean over rows of 1 - Pearson correlation; `a` holds the student's probabilities.

    `LEAST` bounds the deviation of a row of `a` over its mean, which for probabilities is the
    deviation of the logits.
    """
    import torch
    from torch.nn import functional as F

    least = LEAST * math.sqrt(a.shape[1]) * a.detach().mean(dim=1, keepdim=True) + eps
    a, b = a - a.mean(dim=1, keepdim=True), b - b.mean(dim=1, keepdim=True)
    a = a / torch.maximum(a.norm(dim=1, keepdim=True), least)
    return 1 - (a * F.normalize(b, dim=1, eps=eps)).sum(dim=1).mean()


def _standardised(logits: Tensor, least: float = 0.0) -> Tensor:
    """Return each row with mean 0 and (unbiased) deviation 1; the deviation is at least `least`."""
    deviation = logits.std(dim=1, keepdim=True).clamp(min=least) + 1e-7
    return (logits - logits.mean(dim=1, keepdim=True)) / deviation


def _cross_entropy(logits: Tensor, labels: Labels) -> Tensor:
    """Return the cross-entropy with the labels in nats, mean over the batch."""
    from torch.nn import functional as F

    if isinstance(labels, Mixed):
        return _nll(F.log_softmax(logits, dim=1), labels)
    return F.cross_entropy(logits, labels)


def _nll(log_p: Tensor, labels: Labels) -> Tensor:
    """Return the cross-entropy of log-probabilities [B, K] with the labels, mean over the batch."""
    from torch.nn import functional as F

    if isinstance(labels, Mixed):
        return -labels.expected(log_p).mean()
    return F.nll_loss(log_p, labels)


def softened_kl(logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return KL(teacher_T || student_T) in nats, without T^2, from logits [B, K].

    It is summed over classes, and the mean over the batch.
    """
    from torch.nn import functional as F

    log_p = F.log_softmax(logits / temperature, dim=1)
    log_q = F.log_softmax(teacher.to(logits.dtype) / temperature, dim=1)
    return F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)


def flat_kl(logits: Tensor, labels: Labels, gap: float, temperature: float) -> Tensor:
    """Return KL_batchmean(q || student_T); q's logit is `gap` at the label, 0 at the other classes.

    The target has only two distinct probabilities, so no [B, K] target is made: besides CE, it
    costs one softmax. Of mixed labels, the targets of both are mixed.
    """
    from torch.nn import functional as F

    K = logits.shape[1]
    log_other = -gap - math.log1p((K - 1) * math.exp(-gap))
    other, label = math.exp(log_other), math.exp(log_other + gap)
    log_p = F.log_softmax(logits / temperature, dim=1)
    negative_entropy: Tensor | float = label * (log_other + gap) + (K - 1) * other * log_other
    if isinstance(labels, Mixed):
        at_label = labels.expected(log_p).mean()
        negative_entropy = _mixed_entropy(labels, label, other, K, log_p)
    else:
        at_label = log_p.gather(1, labels[:, None]).mean()
    everywhere = log_p.sum(dim=1).mean()
    return negative_entropy - (label - other) * at_label - other * everywhere


def _mixed_entropy(
    labels: Mixed, label: float, other: float, num_classes: int, like: Tensor
) -> Tensor:
    """Return the mean over the batch of sum q log q, of the mixtures q of two flat targets.

    Args:
        label: a target's probability of its label.
        other: its probability of each other class.
    """
    import torch

    share, same = labels.share.to(like.dtype), labels.first == labels.second
    first = torch.where(same, label, other + share * (label - other))
    second = torch.where(same, other, other + (1 - share) * (label - other))
    at_labels = (torch.xlogy(first, first) + torch.xlogy(second, second)).mean()
    elsewhere: Tensor = at_labels + (num_classes - 2) * other * math.log(other)
    return elsewhere


def softmax(logits: NumpyArray) -> NumpyArray:
    """Return probabilities along the last axis, without torch."""
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    found: NumpyArray = powers / powers.sum(axis=-1, keepdims=True)
    return found


def _flat(labels: NumpyArray, gap: float, num_classes: int) -> NumpyArray:
    """Return the target of `flat_kl`, [B, K], of labels [B] or of probabilities [B, K]."""
    if labels.ndim == 1:
        return softmax(gap * (labels[:, None] == np.arange(num_classes)))
    label, other, *_ = softmax(gap * (np.arange(num_classes) == 0))
    mixed: NumpyArray = other + (label - other) * labels
    return mixed


def from_released(
    name: Literal["kd", "tfkd_self", "tfkd_reg"],
    *,
    alpha: float,
    temperature: float,
    num_classes: int,
    multiplier: float = 1.0,
) -> KnowledgeDistillation | TfkdRegCode:
    """Return the canonical objective that exactly equals a setting of the authors' release.

    Their `KLDivLoss` has reduction `mean`, which divides by B * K. With w = alpha * m / K: s = 1 -
    alpha + w, and our alpha is w / s. T^2 stands inside the canonical loss for kd and tfkd_self;
    the released tfkd_reg has none.
    """
    if not (0 <= alpha <= 1 and multiplier > 0 and num_classes > 1 and temperature > 0):
        raise ConfigError(
            f"released setting: needs 0 <= alpha <= 1, temperature and multiplier above 0 and at least 2 classes, "
            f"got {alpha=}, {temperature=}, {multiplier=}, {num_classes=}"
        )
    weight = alpha * multiplier / num_classes
    scale = 1 - alpha + weight
    kinds: dict[str, type[KnowledgeDistillation | TfkdRegCode]] = {
        "kd": KnowledgeDistillation,
        "tfkd_self": TfkdSelf,
        "tfkd_reg": TfkdRegCode,
    }
    return kinds[name](alpha=weight / scale, temperature=temperature, loss_scale=scale)


# --- published settings ---------------------------------------------------------------------------


class Published(NamedTuple):
    """A published setting, in canonical numbers."""

    objective: Canonical
    origin: str


PUBLISHED: tuple[Published, ...] = (
    Published(CrossEntropy(), "the paper's baseline"),
    Published(
        CrossEntropy(loss_scale=0.05),
        "control for the paper's MobileNetV2 and ShuffleNetV2: CE's weight there",
    ),
    Published(CrossEntropy(loss_scale=0.4), "control for the paper's Re-KD: CE's weight there"),
    Published(LabelSmoothing(alpha=0.1), "Szegedy et al. 2016, and the paper's baseline"),
    Published(LabelSmoothing(alpha=0.2), "twice the usual label smoothing"),
    Published(KnowledgeDistillation(alpha=0.9, temperature=4), "CRD and mdistiller"),
    Published(
        KnowledgeDistillation(alpha=0.1597, temperature=20, loss_scale=0.0595),
        "the paper's code, MobileNetV2 and ShuffleNetV2",
    ),
    Published(
        KnowledgeDistillation(alpha=0.0148, temperature=20, loss_scale=0.406),
        "the paper's code, Re-KD",
    ),
    Published(KnowledgeDistillation(alpha=0.9, temperature=20), "Nasty Teacher (Ma et al. 2021)"),
    Published(
        KnowledgeDistillation(alpha=0.95, temperature=20),
        "the paper's alpha and T, read as batchmean with T^2",
    ),
    Published(KnowledgeDistillation(alpha=0.1, temperature=20), "the paper's ImageNet setting"),
    Published(KnowledgeDistillation(alpha=0.1, temperature=1), "torchdistill, ImageNet"),
    Published(KnowledgeDistillation(alpha=0.5, temperature=3), "equal weights, as DLB has them"),
    Published(
        StandardisedKD(alpha=0.989, temperature=2, loss_scale=9.1),
        "Sun et al. 2024: weights .1 for CE and 9, rounded",
    ),
    Published(
        TfkdSelf(alpha=0.9048, temperature=6, loss_scale=0.525), "the paper's code, ResNet-18"
    ),
    Published(
        TfkdSelf(alpha=0.8182, temperature=20, loss_scale=0.55), "the paper's code, DenseNet-121"
    ),
    Published(TfkdSelf(alpha=0.25, temperature=20, loss_scale=0.8), "the paper's code, GoogLeNet"),
    Published(TfkdSelf(alpha=0.9, temperature=20), "the paper's code, ResNeXt-29"),
    Published(
        TfkdSelf(alpha=0.1597, temperature=20, loss_scale=0.0595),
        "the paper's code, MobileNetV2 and ShuffleNetV2",
    ),
    Published(
        TfkdReg(alpha=0.1, temperature=20, correct_prob=0.99),
        "Eq. 9 with T^2, the paper's ImageNet setting",
    ),
    Published(
        TfkdReg(alpha=0.5, temperature=20, correct_prob=0.9),
        "Eq. 9 with T^2, a softer virtual teacher",
    ),
    Published(TfkdRegCode(alpha=0.1), "the paper's code, ResNet-18"),
    Published(
        TfkdRegCode(alpha=0.1597, loss_scale=0.0595),
        "the paper's code, MobileNetV2 and ShuffleNetV2",
    ),
    Published(TfkdRegCode(alpha=0.0526, loss_scale=0.95), "the paper's code, GoogLeNet"),
    Published(TfkdRegCode(alpha=0.5), "the paper's code, ResNeXt-29"),
)
"""Initial trials of a search (`search.warm_start`). Numbers are rounded to four digits."""
