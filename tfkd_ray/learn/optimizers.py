"""Optimizers: their settings, and the updates that they make.

To add one, write a class of settings with a `name` and `_parts`, and one line in `Optim`.
`new_optimizer` sorts the parameters of a student into groups; an `Updates` makes the updates.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple, Self

from pydantic import (
    BeforeValidator,
    Field,
    JsonValue,
    SerializationInfo,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from tfkd_ray.learn.images import seeded
from tfkd_ray.learn.own import code_of, imported, is_only_reading
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


WHOLE = "whole"
"""Context of `model_dump` in which no setting is left out."""


class Group(NamedTuple):
    """Parameters that are updated alike."""

    parameters: list[nn.Parameter]
    factor: float
    """Multiple of the learning rate."""
    decays: bool
    """False: without weight decay."""


class Optimization(Settings):
    """What the settings of all optimizers share: how the gradient of one update is made."""

    moments: ClassVar[int] = 2
    """Most numbers that its state has for each weight."""

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

    def smallest_piece(self, workers: int) -> int:
        """Return the images of the smallest piece of a full batch."""
        return self.batch_size // workers // self.accumulate

    def pieces(self, images: int, workers: int) -> int:
        """Return in how many pieces a worker runs its share of a batch, of so many images.

        A share that is smaller than others, at the end of an epoch, has fewer pieces, so that each
        has 2 images if those of a full batch have.
        """
        if self.accumulate == 1:
            return 1
        least = min(2, self.smallest_piece(workers))
        return max(1, min(self.accumulate, images // least))

    @model_validator(mode="before")
    @classmethod
    def _no_setting_of_another(cls, tree: Any) -> Any:
        """Reject a setting of another optimizer by the name of that one."""
        if not isinstance(tree, Mapping):
            return tree
        kinds = Optimization.__subclasses__()
        for setting in sorted({*map(str, tree)} - {*cls.model_fields}):
            names = [
                kind.model_fields["name"].default for kind in kinds if setting in kind.model_fields
            ]
            if names:
                own = cls.model_fields["name"].default
                way = f"write name: {names[0]}"
                if "args" in cls.model_fields:
                    way = f"if it is an argument of its class, write it below args: args: {{{setting}: ...}}"
                raise ValueError(
                    f"{setting} is a setting of {' and '.join(names)}, not of {own}; leave it out, or {way}"
                )
        return tree

    @model_serializer(mode="wrap")
    def _as_before(
        self, handler: SerializerFunctionWrapHandler, info: SerializationInfo
    ) -> dict[str, Any]:
        """Return the settings, without those that are `later` and at their default; see `WHOLE`."""
        tree: dict[str, Any] = handler(self)
        if info.context == WHOLE:
            return tree
        for name in self.later:
            if getattr(self, name) == type(self).model_fields[name].default:
                tree.pop(name, None)
        return tree

    def problems(self, where: str) -> Iterator[str]:
        """Yield a sentence for each reason why it cannot be used; `where`: dotted path."""
        yield from ()

    def try_out(self, build: Callable[[], nn.Module], where: str) -> None:
        """Raise a ConfigError if it cannot update a network; `where`: dotted path."""

    def parts(self, trained: nn.Module, groups: list[Group]) -> dict[str, RatedOptimizer]:
        """Return the optimizers of torch that make an update together, by their names."""
        raise TypeError(f"{type(self).__name__} does not say how it updates")

    def group(self, group: Group, weight_decay: float) -> dict[str, Any]:
        """Return a group as torch's optimizers take it."""
        decay = weight_decay if group.decays else 0.0
        return {"params": group.parameters, "weight_decay": decay}


class RatedOptimizer(NamedTuple):
    """One optimizer of torch, with the peak learning rate of each of its groups."""

    optimizer: torch.optim.Optimizer
    peaks: list[float]


class OptimConfig(Optimization):
    """SGD with momentum; the optimizer without a name. Weight decay applies to all parameters, as
    in the paper's code, unless `no_decay` says otherwise."""

    later: ClassVar[frozenset[str]] = ADDED | {"name"}
    moments: ClassVar[int] = 1

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

    def parts(self, trained: nn.Module, groups: list[Group]) -> dict[str, RatedOptimizer]:
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
        return {"sgd": RatedOptimizer(optimizer, [self.lr * group.factor for group in groups])}


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

    def parts(self, trained: nn.Module, groups: list[Group]) -> dict[str, RatedOptimizer]:
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

    def try_out(self, build: Callable[[], nn.Module], where: str) -> None:
        """Raise a ConfigError if a student has nothing for Muon."""
        if not hidden_matrices(build()):
            raise ConfigError(f"{where}: {NOTHING_HIDDEN}")

    def parts(self, trained: nn.Module, groups: list[Group]) -> dict[str, RatedOptimizer]:
        """Return torch's Muon and AdamW; raise a ConfigError if a student has nothing for Muon."""
        import torch

        hidden = {id(parameter) for parameter in hidden_matrices(_student_of(trained))}
        ours = [_some_of(group, lambda p: id(p) in hidden) for group in groups]
        others = [_some_of(group, lambda p: id(p) not in hidden) for group in groups]
        ours = [group for group in ours if group.parameters]
        others = [group for group in others if group.parameters]
        if not ours:
            raise ConfigError(f"optim: {NOTHING_HIDDEN}")
        muon = torch.optim.Muon(
            [self.group(group, self.weight_decay) for group in ours],
            lr=self.lr,
            weight_decay=self.weight_decay,
            momentum=self.momentum,
            nesterov=self.nesterov,
        )
        peaks = [self.lr * group.factor for group in ours]
        return {"muon": RatedOptimizer(muon, peaks), "adamw": _adamw(self, others, self.adamw_lr)}


NOTHING_HIDDEN = (
    "muon is for hidden matrices, and the student has none (its first and last weights, convolutions, norms and "
    "biases are AdamW's); use adamw"
)


def _adamw(settings: AdamW | Muon, groups: list[Group], lr: float) -> RatedOptimizer:
    import torch

    optimizer = torch.optim.AdamW(
        [settings.group(group, settings.weight_decay) for group in groups],
        lr=lr,
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        fused=_can_be_fused(groups),
    )
    return RatedOptimizer(optimizer, [lr * group.factor for group in groups])


def hidden_matrices(student: nn.Module) -> list[nn.Parameter]:
    """Return the matrices for Muon: without the first and the last weight, and embeddings."""
    from torch import nn

    weights = [parameter for parameter in student.parameters() if parameter.ndim >= 2]
    embeddings = {
        id(module.weight)
        for module in student.modules()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag)
    }
    inner = [weight for weight in weights[1:-1] if weight.ndim == 2 and not weight.is_complex()]
    return [weight for weight in inner if id(weight) not in embeddings]


def _some_of(group: Group, belongs: Callable[[nn.Parameter], bool]) -> Group:
    """Return a group with those of its parameters that belong to a part."""
    return group._replace(parameters=[p for p in group.parameters if belongs(p)])


class OwnOptimizer(Optimization):
    """An optimizer of your own: `package.module:Class`, a `torch.optim.Optimizer`.

    It is called as `Class(groups, lr=lr, **args)`, where `groups` is a list of dictionaries with
    `params`, as torch's optimizers take it. Before each update, the learning rate of the schedule is
    in `group["lr"]`. Its weight decay is one of its `args`.
    """

    name: Literal["own"] = "own"
    path: str
    """Path of the class, `package.module:Class`, in an installed package or in the working directory
    of `tfkd`, where it also runs."""
    args: dict[str, JsonValue] = {}
    """More arguments of the class. Each may be searched."""
    digest: str | None = None
    """Digest of the class's file and of all files of your own that it imports, recorded when a file
    is read. A run refuses other code; without it, the code as it is now counts."""

    def __hash__(self) -> int:
        return hash(json.dumps(self.model_dump(mode="json")))

    @property
    def called(self) -> str:
        """Return the name of its class."""
        return str(own_code.shown_name(self.path))

    @model_validator(mode="before")
    @classmethod
    def _recorded(cls, tree: Any) -> Any:
        path = tree.get("path") if isinstance(tree, Mapping) else None
        if not isinstance(path, str) or is_only_reading() or tree.get("digest") is not None:
            return tree
        try:
            imported(path, "path")
        except ConfigError:  # `problems` tells it
            return tree
        return {**tree, "digest": code_of(path).digest}

    def problems(self, where: str) -> Iterator[str]:
        """Yield a sentence if the class is missing or refuses these arguments."""
        if is_only_reading():
            return
        try:
            found = imported(self.path, f"{where}.path")
        except ConfigError as error:
            yield from error.problems
            return
        if not callable(found):
            yield f"{where}.path: {self.path} is {found!r}, not a class"
            return
        try:
            inspect.signature(found).bind([], lr=self.lr, **self.args)
        except TypeError as error:
            yield f"{where}.args: {self.path} is called with groups, lr and these: {error}"
        except ValueError:  # written in C, without a signature
            pass

    def changed(self) -> str | None:
        """Return a sentence if the code is not what was recorded, else None."""
        try:
            imported(self.path, "optim.path")
        except ConfigError:
            return None
        code = code_of(self.path)
        if self.digest in (None, code.digest):
            return None
        return (
            f"the code of the optimizer {self.called} is not what it was: {code} had digest {self.digest}, and has "
            f"{code.digest} now"
        )

    def as_it_is_now(self) -> Self:
        """Return the same optimizer with its present code recorded."""
        return self.model_copy(update={"digest": code_of(self.path).digest})

    def parts(self, trained: nn.Module, groups: list[Group]) -> dict[str, RatedOptimizer]:
        """Return the user's optimizer; raise a ConfigError if its code is not what was recorded."""
        if (changed := self.changed()) is not None:
            raise ConfigError(
                f"optim.digest: {changed}. Put the old code back, or begin anew with the code as it is (in a file of "
                "one run: leave digest out)"
            )
        return {"own": self._part(groups, "optim")}

    def try_out(self, build: Callable[[], nn.Module], where: str) -> None:
        """Raise a ConfigError if it cannot update a small network, or goes on otherwise when resumed."""
        import torch
        from torch import nn

        from tfkd_ray.learn.checkpoint import reread

        def begun() -> tuple[nn.Module, Updates]:
            with seeded(0, "optimizer"):
                network = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
            groups = _groups(network, self, {})
            return network, Updates({"own": self._part(groups, where)}, self.lr)

        def updated(network: nn.Module, updates: Updates) -> None:
            updates.set_rate(1.0)
            updates.zero_grad()
            with seeded(0, "images"):
                images = torch.randn(8, 3)
            network(images).square().mean().backward()
            updates.step()

        network, updates = begun()
        resumed, others = begun()
        try:
            updated(network, updates)
            resumed.load_state_dict(network.state_dict())
            others.load_state_dict(reread(updates.state_dict()))
            updated(network, updates)
            updated(resumed, others)
        except ConfigError:
            raise
        except Exception as error:  # the author's code may raise anything
            problem = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise ConfigError(
                f"{where}: {self.called} fails when two updates of a small network are tried: {problem}"
            ) from error
        same = zip(network.parameters(), resumed.parameters(), strict=True)
        if not all(torch.equal(a, b) for a, b in same):
            raise ConfigError(
                f"{where}: {self.called} continues differently after load_state_dict; keep all that it needs in "
                "self.state and in its groups"
            )

    def _part(self, groups: list[Group], where: str) -> RatedOptimizer:
        import torch

        given: list[dict[str, Any]] = []
        for group in groups:
            spared = {} if group.decays else {"weight_decay": 0.0}
            given.append({"params": group.parameters, **spared})
        try:
            optimizer = own_code.at_home(imported(self.path, f"{where}.path"))(
                given, lr=self.lr, **self.args
            )
        except ConfigError:
            raise
        except Exception as error:  # the author's code may raise anything
            problem = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise ConfigError(f"{where}.args: {self.called} refuses them: {problem}") from error
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise ConfigError(
                f"{where}.path: {self.path} gives {type(optimizer).__name__}; an optimizer is a torch.optim.Optimizer"
            )
        if self.no_decay != "none" and "weight_decay" not in optimizer.defaults:
            raise ConfigError(
                f"{where}.no_decay: {self.called} has no weight_decay to leave out; set no_decay: none"
            )
        return RatedOptimizer(optimizer, [self.lr * group.factor for group in groups])


def _with_name(value: Any) -> Any:
    """Return settings by a name alone as settings; without a name, they are those of sgd."""
    tree = own_code.spelled_out(value)
    return {"name": "sgd", **tree} if isinstance(tree, Mapping) and "name" not in tree else tree


Optim = Annotated[
    OptimConfig | AdamW | Muon | OwnOptimizer,
    Field(discriminator="name"),
    BeforeValidator(_with_name),
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
        self, parts: Mapping[str, RatedOptimizer], lr: float, clip_norm: float | None = None
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
        factors: multiples of the learning rate by the names of the parameters of `trained`, above 0;
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
    named = list(trained.named_parameters())
    unknown = sorted({*factors} - {name for name, _ in named})
    assert not unknown, f"{unknown=}"
    found: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in named:
        spared = parameter.ndim <= 1 or name.rpartition(".")[2].endswith("bias")
        decays = optim.no_decay == "none" or not spared
        key = factors.get(name, 1.0), decays
        found.setdefault(key, []).append(parameter)
    return [Group(parameters, *key) for key, parameters in found.items()]
