"""Optimizers: their settings, and the updates that they make.

To add one, write a class of settings with a `name` and `_parts`, and one line in `Optim`.
`new_optimizer` sorts the parameters of a student into groups; an `Updates` makes the updates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple, Self

from pydantic import (
    BeforeValidator,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from tfkd_ray.settings import own_code
from tfkd_ray.settings.errors import ConfigError
from tfkd_ray.settings.schema import Settings

if TYPE_CHECKING:
    import torch
    from torch import nn

Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
Momentum = Annotated[float, Field(ge=0, lt=1)]
Decay = Annotated[float, Field(ge=0)]

ADDED = frozenset({"no_decay", "clip_norm", "accumulate"})
"""Settings that came after the first release, with neutral defaults."""


class Group(NamedTuple):
    """Parameters that are updated alike."""

    parameters: list[nn.Parameter]
    factor: float
    """Multiple of the learning rate."""
    decays: bool
    """False: without weight decay."""


class Optimization(Settings):
    """What the settings of all optimizers share: how the gradient of one update is made."""

    name: str
    lr: Positive
    """Peak learning rate for the whole batch, over all workers."""
    batch_size: Count = 128
    """Images per update, over all workers."""
    no_decay: Literal["none", "norm_and_bias"] = "none"
    """Parameters without weight decay. norm_and_bias: biases, and parameters of at most one
    dimension, such as the weights of norms."""
    clip_norm: Positive | None = None
    """Largest global norm of an update's gradient; a larger one is scaled down to it. None: off."""
    accumulate: Count = 1
    """Number of pieces in which a worker runs its share of a batch, to save memory. The gradient is
    that of the whole batch; BatchNorm's statistics and the terms of a loss that compare images with
    each other are those of a piece."""

    @property
    def called(self) -> str:
        """Return the name in sentences."""
        return self.name

    @model_serializer(mode="wrap")
    def _as_before(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Return the settings, without those that are `later` and at their default."""
        tree: dict[str, Any] = handler(self)
        for name in self.later:
            if getattr(self, name) == type(self).model_fields[name].default:
                tree.pop(name, None)
        return tree

    def parts(self, trained: nn.Module, groups: list[Group]) -> dict[str, Part]:
        """Return the optimizers of torch that make an update together, by their names."""
        raise TypeError(f"{type(self).__name__} does not say how it updates")

    def group(self, group: Group, weight_decay: float) -> dict[str, Any]:
        """Return a group as torch's optimizers take it."""
        decay = weight_decay if group.decays else 0.0
        return {"params": group.parameters, "weight_decay": decay}


class Part(NamedTuple):
    """One optimizer of torch, with the peak learning rate of each of its groups."""

    optimizer: torch.optim.Optimizer
    peaks: list[float]


class OptimConfig(Optimization):
    """SGD with momentum; the optimizer without a name. Weight decay applies to all parameters, as
    in the paper's code, unless `no_decay` says otherwise."""

    later: ClassVar[frozenset[str]] = ADDED | {"name"}

    name: Literal["sgd"] = "sgd"
    lr: Positive = 0.1
    """Peak learning rate for the whole batch, over all workers."""
    weight_decay: Decay = 5e-4
    momentum: Momentum = 0.9
    nesterov: bool = False
    """Use Nesterov's momentum. The paper's recipe does not."""

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> Self:
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs a momentum above 0")
        return self

    def parts(self, trained: nn.Module, groups: list[Group]) -> dict[str, Part]:
        """Return torch's SGD."""
        import torch

        optimizer = torch.optim.SGD(
            [self.group(group, self.weight_decay) for group in groups],
            lr=self.lr,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            nesterov=self.nesterov,
            fused=_can_be_fused(groups),
        )
        # torch's fused SGD fails if a parameter's first gradient comes after the others'
        if self.momentum:
            for parameter in _all_of(groups):
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return {"sgd": Part(optimizer, [self.lr * group.factor for group in groups])}


class AdamW(Optimization):
    """AdamW: Adam with weight decay apart from the gradient. (Loshchilov and Hutter 2019,
    arXiv:1711.05101.)

    No recipe of `sgd` reaches it, but for `batch_size`. The default weight decay is that of DeiT and
    ConvNeXt, as torch's 0.01 is chosen for no kind of data.
    """

    name: Literal["adamw"] = "adamw"
    lr: Positive = 1e-3
    """Peak learning rate for the whole batch, over all workers."""
    weight_decay: Decay = 0.05
    betas: tuple[Momentum, Momentum] = (0.9, 0.999)
    """Decay rates of the averages of the gradient and of its square."""
    eps: Positive = 1e-8
    """Number that is added to the root of the average square."""

    def parts(self, trained: nn.Module, groups: list[Group]) -> dict[str, Part]:
        """Return torch's AdamW."""
        return {"adamw": _adamw(self, groups, self.lr)}


class Muon(Optimization):
    """Muon for hidden matrices, AdamW for all else. (Jordan 2024, kellerjordan.github.io/posts/muon.)

    Hidden matrices are the two-dimensional weights of the student, without its first and its last
    weight, embeddings, and what an objective owns. Convolutions, norms and biases are AdamW's.
    """

    name: Literal["muon"] = "muon"
    lr: Positive = 0.02
    """Peak learning rate of the hidden matrices."""
    weight_decay: Decay = 0.01
    """Weight decay of both parts."""
    momentum: Momentum = 0.95
    nesterov: bool = True
    adamw_lr: Positive = 3e-4
    """Peak learning rate of AdamW's part; the schedule is the same."""
    betas: tuple[Momentum, Momentum] = (0.9, 0.95)
    """Decay rates of AdamW's part."""
    eps: Positive = 1e-8
    """Number that AdamW's part adds to the root of the average square."""

    def parts(self, trained: nn.Module, groups: list[Group]) -> dict[str, Part]:
        """Return torch's Muon and AdamW; raise a ConfigError if a student has nothing for Muon."""
        import torch

        hidden = {id(parameter) for parameter in _hidden_matrices(_student_of(trained))}
        ours = [_only(group, lambda p: id(p) in hidden) for group in groups]
        others = [_only(group, lambda p: id(p) not in hidden) for group in groups]
        ours = [group for group in ours if group.parameters]
        others = [group for group in others if group.parameters]
        if not ours:
            raise ConfigError(
                "optim.muon: is for hidden matrices, and the student has none (its first and last weights, "
                "convolutions, norms and biases are AdamW's); use adamw"
            )
        muon = torch.optim.Muon(
            [self.group(group, self.weight_decay) for group in ours],
            lr=self.lr,
            weight_decay=self.weight_decay,
            momentum=self.momentum,
            nesterov=self.nesterov,
        )
        peaks = [self.lr * group.factor for group in ours]
        return {"muon": Part(muon, peaks), "adamw": _adamw(self, others, self.adamw_lr)}


def _adamw(settings: AdamW | Muon, groups: list[Group], lr: float) -> Part:
    import torch

    optimizer = torch.optim.AdamW(
        [settings.group(group, settings.weight_decay) for group in groups],
        lr=lr,
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        fused=_can_be_fused(groups),
    )
    return Part(optimizer, [lr * group.factor for group in groups])


def _hidden_matrices(student: nn.Module) -> list[nn.Parameter]:
    """Return the matrices for Muon: without the first and the last weight, and embeddings."""
    from torch import nn

    weights = [parameter for parameter in student.parameters() if parameter.ndim >= 2]
    embeddings = {
        id(module.weight)
        for module in student.modules()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag)
    }
    return [weight for weight in weights[1:-1] if weight.ndim == 2 and id(weight) not in embeddings]


def _only(group: Group, belongs: Callable[[nn.Parameter], bool]) -> Group:
    """Return a group with those of its parameters that belong to a part."""
    return group._replace(parameters=[p for p in group.parameters if belongs(p)])


def _with_name(value: Any) -> Any:
    """Return settings by a name alone as settings; without a name, they are those of sgd."""
    tree = own_code.spelled_out(value)
    return {"name": "sgd", **tree} if isinstance(tree, Mapping) and "name" not in tree else tree


Optim = Annotated[
    OptimConfig | AdamW | Muon, Field(discriminator="name"), BeforeValidator(_with_name)
]


def _all_of(groups: Iterable[Group]) -> list[nn.Parameter]:
    return [parameter for group in groups for parameter in group.parameters]


def _can_be_fused(groups: Iterable[Group]) -> bool:
    """Return whether torch's fused optimizers step these parameters: they take no complex ones."""
    return not any(parameter.is_complex() for parameter in _all_of(groups))


class Updates:
    """Makes the updates of a run: learning rates, clipping, and the steps of its optimizers.

    Its state is that of torch's optimizer; of several, theirs by name.

    Args:
        parts: see `Optimization.parts`.
        clip_norm: see `Optimization.clip_norm`.
    """

    def __init__(
        self, parts: Mapping[str, Part], lr: float, clip_norm: float | None = None
    ) -> None:
        self.parts = dict(parts)
        self._lr, self._clip_norm = lr, clip_norm
        self._clipped = [
            parameter
            for part in self.parts.values()
            for group in part.optimizer.param_groups
            for parameter in group["params"]
            if clip_norm is not None
        ]

    def set_rate(self, factor: float) -> float:
        """Set the learning rate of every group to `factor` times its peak; return the run's rate."""
        for part in self.parts.values():
            for group, peak in zip(part.optimizer.param_groups, part.peaks, strict=True):
                group["lr"] = peak * factor
        return self._lr * factor

    def zero_grad(self) -> None:
        """Drop the gradients."""
        for part in self.parts.values():
            part.optimizer.zero_grad()

    def step(self) -> None:
        """Update the parameters by their gradients, which are clipped first, all together."""
        if self._clip_norm is not None:
            import torch

            torch.nn.utils.clip_grad_norm_(self._clipped, self._clip_norm)
        for part in self.parts.values():
            part.optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        """Return the state: that of a single optimizer of torch is its own."""
        states = {name: part.optimizer.state_dict() for name, part in self.parts.items()}
        return next(iter(states.values())) if len(states) == 1 else states

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load a state that `state_dict` returned."""
        if len(self.parts) == 1:
            state = dict.fromkeys(self.parts, state)
        for name, part in self.parts.items():
            part.optimizer.load_state_dict(state[name])


def new_optimizer(
    trained: nn.Module, optim: Optimization, factors: Mapping[str, float] | None = None
) -> Updates:
    """Return what updates a student, or a student and what its objective owns.

    Args:
        trained: the student, or a `Tapped` with it.
        factors: multiples of the learning rate by the names of the student's parameters, above 0;
            those that are not named have 1. Parameters that do not require a gradient get no update.
    """
    groups = _groups(trained, optim, factors or {})
    return Updates(optim.parts(trained, groups), optim.lr, optim.clip_norm)


def _student_of(trained: nn.Module) -> nn.Module:
    """Return the student without what its objective owns."""
    from tfkd_ray.learn.features import Tapped

    return trained.student if isinstance(trained, Tapped) else trained


def _groups(trained: nn.Module, optim: Optimization, factors: Mapping[str, float]) -> list[Group]:
    """Return the parameters by factor and weight decay; in one group, they keep their order.

    Parameters without a gradient stay where they are, as in earlier run states: they are skipped in
    every update, and a network of the user's own may let them learn later.
    """
    by_name = dict(_student_of(trained).named_parameters())
    unknown = sorted({*factors} - {*by_name})
    assert not unknown, f"{unknown=}"
    factor_of = {id(by_name[name]): factor for name, factor in factors.items()}
    found: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in trained.named_parameters():
        spared = parameter.ndim <= 1 or name.rpartition(".")[2].endswith("bias")
        decays = optim.no_decay == "none" or not spared
        key = factor_of.get(id(parameter), 1.0), decays
        found.setdefault(key, []).append(parameter)
    return [Group(parameters, *key) for key, parameters in found.items()]
