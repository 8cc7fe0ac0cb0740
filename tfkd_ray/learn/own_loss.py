"""A loss of the user's own: its signature, its arguments, and a trial of it on two small batches.

`OwnObjective` (objectives.py) is its setting. The loss is a function `(logits, labels, **args)` or
`(logits, labels, teacher, **args)`, or a class whose objects have `terms(logits, labels)` or
`terms(logits, labels, teacher)`, created with `**args`. Its parameters
`student_features` and `teacher_features` ask for outputs of layers; see features.py.

Shapes: B = batch, K = classes.
"""

from __future__ import annotations

import copy
import functools
import inspect
import json
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError

from tfkd_ray.learn.images import seeded
from tfkd_ray.learn.own import Code, code_of, imported
from tfkd_ray.settings import own_code
from tfkd_ray.settings.errors import ConfigError, Sentences, did_you_mean
from tfkd_ray.settings.schema import in_our_words
from tfkd_ray.settings.yaml import Tree, Values

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

TEACHER = "teacher"
"""Name of the parameter for the teacher's logits."""
SIDES = ("student", "teacher")
"""Networks whose layers a loss may ask for: as `student_features`, `teacher_features`."""
_FEATURES = {f"{side}_features": side for side in SIDES}
_SHAPES = {f"{side}_shapes": side for side in SIDES}
"""Parameters of a class that get the shapes of these layers' outputs."""
_GIVEN = 2
"""Number of leading parameters that training gives: logits and labels."""
_KEYWORDS = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


class Facts(NamedTuple):
    """Facts from the code of a loss, which a run records."""

    code: Code
    taught: bool
    """True if its signature asks for a teacher's logits or layers."""


class _Call(NamedTuple):
    """The parameters of a loss: those of a batch, those of shapes, and those that are settings."""

    batch: dict[str, inspect.Parameter]
    shapes: dict[str, inspect.Parameter]
    args: dict[str, inspect.Parameter]
    hints: Tree
    """Annotations of `args`, without those that cannot be resolved."""
    any_more: bool
    """True if it accepts other arguments, too (`**kwargs`)."""
    takes_teacher: bool
    """True if it needs a teacher's logits."""

    @property
    def taught(self) -> bool:
        """Return whether it needs a teacher: its logits, or the outputs of its layers."""
        features = self.batch.get("teacher_features")
        return self.takes_teacher or (features is not None and _is_required(features))


def _is_required(parameter: inspect.Parameter) -> bool:
    return parameter.default is inspect.Parameter.empty


Shape = tuple[int, ...]


class Layers(NamedTuple):
    """The layers that a loss asks for, with the shape of an image's output."""

    student: Mapping[str, Shape]
    teacher: Mapping[str, Shape]


class Features(NamedTuple):
    """Outputs of layers for a batch, [B, ...] each, by the names of the layers."""

    student: Mapping[str, Tensor]
    teacher: Mapping[str, Tensor]


class Batch(NamedTuple):
    """The inputs of a loss for one batch."""

    logits: Tensor
    labels: Tensor
    teacher: Tensor | None
    features: Features | None = None


class Result(NamedTuple):
    """The result of a user's own loss for one batch."""

    whole: Tensor | None
    """The whole loss; None if the parts are known."""
    ce: Tensor | None = None
    kd: Tensor | None = None


def facts_of(path: str) -> Facts | None:
    """Return the facts about the loss at a path; None if `loss_problems` finds no loss there."""
    try:
        call = _call_of(_found_at(path, "path"))
    except ConfigError:
        return None
    return Facts(code_of(path), call.taught)


def loss_problems(
    path: str, args: Values, asked: Mapping[str, Sequence[str]], where: str
) -> list[str]:
    """Return a sentence for each reason why a loss cannot be called with these arguments.

    Args:
        asked: names of the layers of each side.
        where: dotted path of its settings.
    """
    try:
        call = _call_of(_found_at(path, f"{where}.path"))
    except ConfigError as error:
        return error.problems
    name = str(own_code.shown_name(path))
    problems = list(_argument_problems(call, args, f"{where}.args", name))
    for side in SIDES:
        problems += _feature_problems(call, side, asked[side], f"{where}.features.{side}", name)
    return problems


def takes_soft_labels(path: str) -> bool:
    """Return whether a loss declares `soft_labels = True`; True if it cannot be imported."""
    try:
        found = _found_at(path, "path")
    except ConfigError:  # `loss_problems` reports it
        return True
    return getattr(found, "soft_labels", False) is True


def temperature_of(path: str, args: Values) -> float:
    """Return the argument `temperature` of a loss, given or by default; 1 if it is no number above 0."""
    value = args.get("temperature")
    parameter = _call_of(_found_at(path, "path")).args.get("temperature")
    if "temperature" not in args and parameter is not None:
        value = parameter.default
    if isinstance(value, int | float) and not isinstance(value, bool) and value > 0:
        return float(value)
    return 1.0


def whole_numbers(path: str) -> dict[str, bool]:
    """Return for each argument with the annotation of a number whether that is a whole one."""
    try:
        call = _call_of(_found_at(path, "path"))
    except ConfigError:
        return {}
    found = {}
    for name, hint in call.hints.items():
        kinds = {*map(_bare, typing.get_args(hint))} if _is_union(hint) else {_bare(hint)}
        if kinds & {int, float}:
            found[name] = float not in kinds
    return found


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _bare(hint: Any) -> Any:
    """Return an annotation without `Annotated`."""
    return typing.get_args(hint)[0] if typing.get_origin(hint) is typing.Annotated else hint


def _found_at(path: str, where: str) -> Any:
    """Return the function or class at a path; raise a ConfigError if it is no loss."""
    found = imported(path, where)
    if isinstance(found, type) and not callable(getattr(found, "terms", None)):
        raise ConfigError(
            f"{where}: {path} is a class without `terms`: give it terms(self, logits, labels, teacher), which returns "
            "(ce, soft), or name a function"
        )
    if not callable(found):
        raise ConfigError(f"{where}: {path} is {found!r}, neither a function nor a class")
    try:
        call = _call_of(found)
    except (TypeError, ValueError):
        raise ConfigError(
            f"{where}: {path} has no signature that Python can read; wrap it in a function of your own"
        ) from None
    of_batch = [name for name in call.batch if name not in {TEACHER, *_FEATURES}]
    if len(of_batch) < _GIVEN:
        what = "its terms" if isinstance(found, type) else "it"
        raise ConfigError(
            f"{where}: {path}: {what} must take logits and labels first, then teacher if it needs one: "
            f"(logits, labels, teacher, ...), got ({', '.join(call.batch)})"
        )
    return found


def _call_of(found: Any) -> _Call:
    """Return the parameters of a loss."""
    is_class = isinstance(found, type)
    batch_of = list(inspect.signature(found.terms if is_class else found).parameters.values())
    if is_class and not isinstance(inspect.getattr_static(found, "terms"), staticmethod):
        batch_of = batch_of[1:]  # self
    names = [p.name for p in batch_of if p.kind in _POSITIONAL][:_GIVEN]
    batch = {p.name: p for p in batch_of if p.name in {*names, TEACHER, *_FEATURES}}
    if is_class:
        args_of, target = list(inspect.signature(found).parameters.values()), found.__init__
    else:
        args_of, target = [p for p in batch_of if p.name not in batch], found
    args = {p.name: p for p in args_of if p.kind in _KEYWORDS}
    shapes = {name: args.pop(name) for name in _SHAPES if is_class and name in args}
    any_more = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in args_of)
    needed = TEACHER in batch and _is_required(batch[TEACHER])
    declared = TEACHER in batch and getattr(found, "needs_teacher", False) is True
    return _Call(batch, shapes, args, _hints_of(target, args), any_more, needed or declared)


def _hints_of(target: Any, names: Iterable[str]) -> Tree:
    """Return the annotations of these parameters; none if one of a function's is unknown."""
    try:
        hints = typing.get_type_hints(target, include_extras=True)
    except Exception:  # an annotation may name anything
        return {}
    return {name: hints[name] for name in names if name in hints}


_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


# --- arguments ------------------------------------------------------------------------------------


def _argument_problems(call: _Call, given: Values, where: str, name: str | None) -> Sentences:
    """Yield a sentence for each argument that is unknown, missing or of another type."""
    for key, value in given.items():
        if key in call.batch:
            yield f"{where}.{key}: training gives it for each batch; leave it out"
        elif key in call.shapes:
            yield f"{where}.{key}: training gives it, from the layers of features; leave it out"
        elif key in call.args:
            if problem := _value_problem(call.args[key], call.hints.get(key), value):
                yield f"{where}.{key}: {problem} (the signature says {_as_written(call.args[key])})"
        elif not call.any_more:
            hint = did_you_mean(key, call.args) if call.args else "it has none"
            yield f"{where}.{key}: {name} has no such argument; {hint}"
    for key, parameter in call.args.items():
        if _is_required(parameter) and key not in given:
            hint = (
                "; a teacher's logits come as a parameter named teacher" if "teach" in key else ""
            )
            yield f"{where}.{key}: required by {name}, and not given{hint}"


def _feature_problems(
    call: _Call, side: str, layers: Sequence[str], where: str, name: str
) -> Sentences:
    """Yield a sentence for each reason why a loss cannot get these layers of a network."""
    key = f"{side}_features"
    takes = call.batch.get(key)
    if takes is not None and takes.kind not in _KEYWORDS:
        yield f"{where}: {name} takes {key} by position alone; take it by name: remove the / from its signature"
    if layers and takes is None:
        yield (
            f"{where}: nothing would use {' and '.join(layers)}: {name} has no parameter {key}; add it, or leave them "
            "out"
        )
    asks = [k for k in (key, f"{side}_shapes") if k in {**call.batch, **call.shapes}]
    asks = [k for k in asks if _is_required({**call.batch, **call.shapes}[k])]
    if asks and not layers:
        yield (
            f"{where}: required, as {name} takes {' and '.join(asks)}: name layers of the {side}'s network, as in "
            f"features: {{{side}: [layer3]}}"
        )
    if twice := sorted({layer for layer in layers if layers.count(layer) > 1}):
        yield f"{where}: {twice[0]} is listed twice"


def _value_problem(parameter: inspect.Parameter, hint: Any, value: Any) -> str | None:
    """Return why a value does not fit an argument, or None."""
    expected = hint if hint is not None else _kind_of(parameter.default)
    if expected is None:
        return None
    try:
        TypeAdapter(expected).validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        return f"{in_our_words(error.errors(include_url=False)[0]['msg'])}, got {value!r}"
    except (PydanticUserError, TypeError, ValueError, NameError):  # a type that is no setting's
        return None
    return None


def _kind_of(default: Any) -> Any:
    """Return the type that a default stands for; None if it may be any."""
    if isinstance(default, bool | str):
        return type(default)
    return float if isinstance(default, int | float) else None


def _as_written(parameter: inspect.Parameter) -> str:
    return f"{parameter}".replace(" = ", "=").replace("=", " = ")


# --- the loss itself ------------------------------------------------------------------------------


class OwnLoss:
    """A loss of the user's own, ready for batches; a class is instantiated once.

    Args:
        layers: those that it asks for, of the networks at hand; None: none.
        seed: of the weights that it draws. It matters only if they are trained: with layers.
    """

    def __init__(
        self, path: str, args: Values, layers: Layers | None = None, seed: int = 0
    ) -> None:
        found = _found_at(path, "path")
        call = _call_of(found)
        self.called = own_code.shown_name(path)
        self.path = path
        self.takes_teacher = call.takes_teacher
        self.has_parts = isinstance(found, type)
        self.layers = layers
        arguments = copy.deepcopy(dict(args))
        if self.has_parts:
            for name, side in _SHAPES.items():
                if name in call.shapes and layers is not None:
                    arguments[name] = dict(getattr(layers, side))
            self.object = self._made(found, arguments, seed)
            self._call = own_code.at_home(self.object.terms)
        else:
            self.object = found
            self._call = functools.partial(own_code.at_home(found), **arguments)
        kind = call.batch[TEACHER].kind if call.takes_teacher else None
        self._by_name = kind in _KEYWORDS
        self._sides = {
            name: side
            for name, side in _FEATURES.items()
            if name in call.batch and layers is not None and getattr(layers, side)
        }
        self._to = getattr(self.object, "to", None) if self.has_parts else None
        self._device: Any = None

    def _made(self, found: Any, arguments: Tree, seed: int) -> Any:
        """Return an object of the user's class."""
        try:
            with seeded(seed, "objective"):
                return own_code.at_home(found)(**arguments)
        except ConfigError:
            raise
        except Exception as error:  # the user's class may raise anything
            given = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
            raise self.wrong(
                f"made with ({given}), it ends in {type(error).__name__}: {error}"
            ) from error

    def __call__(
        self,
        logits: Tensor,
        labels: Tensor,
        teacher: Tensor | None,
        features: Features | None = None,
    ) -> Result:
        """Return the loss of a batch; raise a ConfigError if it is none."""
        if self._to is not None and self._device != logits.device:  # a module, with buffers
            self._device = logits.device
            self._to(self._device)
        more = {name: getattr(features, side) for name, side in self._sides.items()}
        if not self.takes_teacher:
            found = self._call(logits, labels, **more)
        elif self._by_name:
            found = self._call(logits, labels, teacher=teacher, **more)
        else:
            found = self._call(logits, labels, teacher, **more)
        if not self.has_parts:
            return Result(self._scalar(found, "it"))
        if not isinstance(found, tuple | list) or len(found) != 2:
            raise self.wrong(f"terms must return (ce, soft), got {_brief_of(found)}")
        ce, kd = found
        ce = self._scalar(ce, "the first of its terms")
        return Result(None, ce, None if kd is None else self._scalar(kd, "the second of its terms"))

    def owned(self) -> nn.Module:
        """Return a module of what its object owns: itself, or its attributes that are modules.

        Only an object that asks for layers may own parameters.
        """
        from torch import nn

        if isinstance(self.object, nn.Module):
            return self.object
        owned = nn.Module()
        for name, value in getattr(self.object, "__dict__", {}).items() if self.has_parts else ():
            if isinstance(value, nn.Module):
                owned.add_module(name, value)
            elif isinstance(value, nn.Parameter):
                owned.register_parameter(name, value)
        return owned

    def random_features(self, count: int, generator: torch.Generator) -> Features | None:
        """Return random outputs of the layers that it asks for; None if it asks for none."""
        import torch

        if self.layers is None:
            return None
        sides = (
            {name: torch.randn(count, *shape, generator=generator) for name, shape in side.items()}
            for side in self.layers
        )
        return Features(*sides)

    def weight(self, name: str) -> float:
        """Return a number of a class's object, such as `ce_weight`; 1 if it has none."""
        found = getattr(self.object, name, 1.0) if self.has_parts else 1.0
        if not isinstance(found, int | float):
            raise self.wrong(f"{name} must be a number, got {_brief_of(found)}")
        return float(found)

    def wrong(self, problem: str) -> ConfigError:
        """Return an error of this loss."""
        return ConfigError(f"objective {self.called}: {self.path}: {problem}")

    def _scalar(self, value: Any, what: str) -> Tensor:
        from torch import Tensor

        if not isinstance(value, Tensor) or value.ndim or not value.is_floating_point():
            raise self.wrong(
                f"{what} must be a scalar, the mean over the batch, got {_brief_of(value)}; a .mean() may be missing"
            )
        return value


def _brief_of(value: Any) -> str:
    from torch import Tensor

    if isinstance(value, Tensor):
        return f"a tensor {str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return f"{type(value).__name__}: {str(value)[:60]!r}"


# --- a trial of it --------------------------------------------------------------------------------

TRIED_IMAGES = 8
"""Images of a batch on which a loss is tried."""
Total = typing.Callable[[Batch], "Tensor"]


def tried(
    loss: OwnLoss, total: Total, num_classes: int, batches: Sequence[Batch] | None = None
) -> list[str]:
    """Call a loss on two small batches, so that its errors appear before anything starts.

    Return notes on what is allowed but probably a mistake.

    Args:
        total: gives the whole loss of a batch, from this `OwnLoss`.
        batches: two, with the outputs of the layers that it asks for. None: it asks for none.

    Raises:
        ConfigError: if it raises, is no finite scalar, has no gradient, or keeps state.
    """
    import torch

    K = num_classes
    first, second = batches or _made_up_batches(K)
    owned = loss.owned()
    for name, tensor in [*owned.named_parameters(), *owned.named_buffers()]:
        if torch.nn.parameter.is_lazy(tensor):
            raise loss.wrong(
                f"its {name} has no shape before the first batch, when the optimizer needs it; build it from the "
                "parameters student_shapes and teacher_shapes, without lazy modules"
            )
    if loss.layers is None and any(p.requires_grad for p in owned.parameters()):
        raise loss.wrong(
            "it has parameters, and nothing trains them; use buffers or numbers, or freeze them with "
            "requires_grad_(False)"
        )
    once = _asked(loss, total, first)
    _asked(loss, total, second)
    before = _data_of(loss)
    again = _asked(loss, total, first)
    _asked(loss, total, second)
    if once != again:
        raise _stateful(loss, f"the same batch gives {once:.6g}, and {again:.6g} when asked again")
    if changed := _first_change(before, _data_of(loss)):
        raise _stateful(loss, f"{changed} changes from batch to batch")
    if getattr(loss.object, "soft_labels", False):
        mixed = (torch.eye(K)[first.labels] + torch.eye(K)[first.labels.flip(0)]) / 2
        _asked(loss, total, first._replace(labels=mixed))
    if abs(_asked(loss, total, _twice(first)) - 2 * once) < 1e-4 * abs(once):
        return [
            f"objective {loss.called}: a batch of twice the size gives twice the loss. It seems to be a sum over the "
            "images; training expects their mean"
        ]
    return []


def _made_up_batches(num_classes: int) -> list[Batch]:
    import torch

    K, B = num_classes, TRIED_IMAGES
    with seeded(0, "objective", K):
        return [
            Batch(torch.randn(B, K), torch.randint(K, (B,)), 2 * torch.randn(B, K))
            for _ in range(2)
        ]


def _twice(batch: Batch) -> Batch:
    """Return a batch with each image twice."""
    import torch

    def doubled(features: Features | None) -> Features | None:
        if features is None:
            return None
        return Features(*({k: torch.cat([x, x]) for k, x in side.items()} for side in features))

    logits, labels, teacher, features = batch
    soft = None if teacher is None else torch.cat([teacher, teacher])
    return Batch(torch.cat([logits, logits]), torch.cat([labels, labels]), soft, doubled(features))


def _asked(loss: OwnLoss, total: Total, batch: Batch) -> float:
    """Return the loss of a batch; raise a ConfigError if it is no number or has no gradient."""
    import torch

    leaf = batch.logits.clone().requires_grad_()
    seen, leaves = None, {}
    if batch.features is not None:
        leaves = {k: x.clone().requires_grad_() for k, x in batch.features.student.items()}
        known = {k: x.clone() for k, x in batch.features.teacher.items()}
        seen = Features({k: x * 1 for k, x in leaves.items()}, known)
    soft = batch.teacher
    if soft is not None:
        soft = soft.clone() if loss.takes_teacher else None
    given = _given(loss, batch)
    try:
        with seeded(0, "objective", leaf.shape[1]), torch.enable_grad():
            value = total(Batch(leaf * 1, batch.labels.clone(), soft, seen))
    except ConfigError:
        raise
    except Exception as error:  # the user's function may raise anything
        raise loss.wrong(f"given {given}, it ends in {type(error).__name__}: {error}") from error
    if not value.isfinite():
        raise loss.wrong(
            f"given {given} of ordinary size, it returns {value.item()}; look for log(0), 0/0 or an overflow"
        )
    if not value.requires_grad:
        raise loss.wrong("it has no gradient; look for a detach, a no_grad or an argmax in it")
    _check_gradients(loss, value, leaf, leaves)
    return float(value.detach())


def _given(loss: OwnLoss, batch: Batch) -> str:
    """Return what a loss is given, in words."""
    given = f"logits {list(batch.logits.shape)}, labels {list(batch.labels.shape)}"
    if loss.takes_teacher and batch.teacher is not None:
        given += f" and a teacher's logits {list(batch.teacher.shape)}"
    for side, features in zip(SIDES, batch.features or (), strict=False):
        shapes = ", ".join(f"{name}: {list(x.shape)}" for name, x in features.items())
        given += f", {side}_features {{{shapes}}}" if features else ""
    return given


def _check_gradients(
    loss: OwnLoss, value: Tensor, logits: Tensor, features: Mapping[str, Tensor]
) -> None:
    """Raise a ConfigError if what should learn from a loss does not, or if anything else would.

    Args:
        features: the student's, leaves of the graph like the logits.
    """
    import torch

    learning = {name: p for name, p in loss.owned().named_parameters() if p.requires_grad}
    wanted = [logits, *features.values(), *learning.values()]
    gradient, *others = torch.autograd.grad(value, wanted, retain_graph=True, allow_unused=True)
    if gradient is None:
        raise loss.wrong("it does not depend on the logits, so nothing would be learned")
    if not gradient.isfinite().all():
        raise loss.wrong("its gradient by the logits is not finite; look for the root or log of 0")
    for name, found in zip(features, others, strict=False):
        if found is None:
            raise loss.wrong(
                f"it does not depend on the student's layer {name}, which features.student asks for; use it, or leave "
                "it out"
            )
        if not found.isfinite().all():
            raise loss.wrong(
                f"its gradient by the student's layer {name} is not finite; look for the root or log of 0"
            )
    for name, found in zip(learning, others[len(features) :], strict=True):
        if found is None:
            raise loss.wrong(
                f"its parameter {name} {list(learning[name].shape)} gets no gradient, so it would not be trained; use "
                "it in the loss, or leave it out"
            )
    known = {id(tensor) for tensor in wanted}
    for tensor in _ends_of_graph(value):
        if id(tensor) not in known:
            way = "detach it, or make it a number"
            if loss.layers is not None:
                way = "make it, or its module, an attribute of an object of a class with terms"
            raise loss.wrong(
                f"a tensor {list(tensor.shape)} with requires_grad takes part in it, and nothing trains it; {way}"
            )


def _ends_of_graph(value: Tensor) -> Iterator[Tensor]:
    """Yield the tensors at which a gradient of `value` would arrive."""
    waiting, seen = [value.grad_fn], set[Any]()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if (tensor := getattr(node, "variable", None)) is not None:
            yield tensor
        waiting += [step for step, _ in node.next_functions]


def _stateful(loss: OwnLoss, problem: str) -> ConfigError:
    return loss.wrong(
        f"it keeps state between batches ({problem}), which checkpoints lack: a resumed run would give other numbers; "
        "let the loss depend on its arguments alone"
    )


_LARGE = 1_000_000
"""Numbers in a tensor that is data, not state."""
_PLAIN = (bool, int, float, complex, str, bytes, list, dict, set, type(None))


def _data_of(loss: OwnLoss) -> Tree:
    """Return copies of the data that a loss may change: its object's and its module's.

    What checkpoints hold does not count: the state_dict of what it owns, if it asks for layers.
    """
    from torch import Tensor

    found: Tree = {}
    module = inspect.getmodule(type(loss.object) if loss.has_parts else loss.object)
    of_module = vars(module) if module is not None else {}
    of_object = getattr(loss.object, "__dict__", {})
    owned = loss.owned()
    inside = Tree(owned.named_buffers()) | dict(owned.named_parameters())
    kept = {"_parameters", "_buffers", "_modules"}
    if loss.layers is not None:
        kept |= owned.state_dict().keys()
    of_object = {k: v for k, v in {**of_object, **inside}.items() if k not in kept}
    for whose, data in (("the module's", of_module), ("its", of_object)):
        for name, value in data.items():
            small = not isinstance(value, Tensor) or value.numel() < _LARGE
            if isinstance(value, (*_PLAIN, Tensor)) and small and not name.startswith("__"):
                found[f"{whose} {name}"] = _copied(value)
    return found


def _copied(value: Any) -> Any:
    try:
        return copy.deepcopy(value)
    except Exception:  # it may hold anything
        return None


def _first_change(before: Values, after: Values) -> str | None:
    """Return the name of the first datum that differs, or None."""
    for name in {**before, **after}:
        if not _same(before.get(name), after.get(name)):
            return name
    return None


def _same(a: Any, b: Any) -> bool:
    from torch import Tensor

    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_same, a, b))
    try:
        return bool(type(a) is type(b) and (a == b or a != a))
    except Exception:  # objects whose comparison fails say nothing
        return True
