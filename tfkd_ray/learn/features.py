"""Layers of the networks, for objectives of the user's own that learn from them.

A layer's output is caught by a forward hook while a batch runs. `Tapped` is the student together
with the parameters that the objective owns: DDP wraps it, and the optimizer trains both. The
teacher's outputs come from the bank or from the teacher itself, see `loop._Lesson`.

Shapes: B = batch, N = images, K = classes, D = numbers of an image in all layers together.
"""

import contextlib
import functools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tfkd_ray.learn.images import seeded
from tfkd_ray.learn.mixing import Mixed
from tfkd_ray.learn.objectives import Canonical, OwnObjective
from tfkd_ray.learn.own_loss import TRIED_IMAGES, Batch, Features, Shape
from tfkd_ray.settings.errors import ConfigError, did_you_mean

Caught = dict[str, list[tuple[Any, int | None]]]
"""Each output of each layer, with its version then, which counts changes in place."""


@contextlib.contextmanager
def caught(network: nn.Module, layers: Iterable[str]) -> Iterator[Caught]:
    """Yield a mapping that gets the outputs of these layers while the network runs inside."""
    found: Caught = {}
    hooks = [
        network.get_submodule(name).register_forward_hook(functools.partial(_keep, found, name))
        for name in layers
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _keep(found: Caught, name: str, module: nn.Module, given: tuple[Any, ...], output: Any) -> None:
    version = output._version if isinstance(output, Tensor) else None
    found.setdefault(name, []).append((output, version))


def outputs_of(found: Caught, layers: Iterable[str], count: int, about: str) -> dict[str, Tensor]:
    """Take the outputs of one forward pass, float32 [B, ...], in the order of `layers`.

    Args:
        count: B.
        about: whose layers they are, for the ConfigError if one has no single output.
    """
    outputs = {}
    for name in layers:
        passes = found.pop(name, [])
        if (problem := _problem_of(passes, count)) is not None:
            raise ConfigError(f"{about}: layer {name!r} {problem}")
        outputs[name] = passes[0][0].float()
    return outputs


def _problem_of(passes: Sequence[tuple[Any, int | None]], count: int) -> str | None:
    """Return why what a layer gave for `count` images is of no use, or None."""
    if len(passes) != 1:
        return (
            f"runs {len(passes)} times in a forward pass, and must run once; name another one, such as the block "
            "around it"
        )
    output, version = passes[0]
    if not isinstance(output, Tensor):
        return (
            f"gives {type(output).__name__}, not a tensor; name a layer inside it, or one after it"
        )
    if output.ndim < 2 or len(output) != count or not output.is_floating_point():
        return (
            f"gives {list(output.shape)} for {count} images; an output is a float tensor [B, ...]"
        )
    if output._version != version:
        return (
            "is overwritten in place by the next layer (as by ReLU(inplace=True)), so its output is lost; name the "
            "next layer instead, or the block around both"
        )
    return None


class Tapped(nn.Module):
    """A student and the objective that learns from its layers, in one module.

    Args:
        objective: a `ready` one.
        autocast: the precision of the student; the loss is computed in float32.
    """

    def __init__(
        self, student: nn.Module, objective: OwnObjective, autocast: torch.autocast
    ) -> None:
        super().__init__()
        self.student, self.owned = student, objective.owned()
        self._objective, self._autocast = objective, autocast

    def forward(
        self,
        images: Tensor,
        labels: Tensor | Mixed,
        soft: Tensor | None,
        taught: Mapping[str, Tensor],
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return (logits [B, K], CE or the whole loss, the soft part or None).

        Args:
            soft: the teacher's logits [B, K].
            taught: outputs of the teacher's layers.
        """
        layers = self._objective.features.student
        with self._autocast, caught(self.student, layers) as found:
            logits = self.student(images)
        logits = logits.float()
        about = f"objective {self._objective.called}: student"
        features = Features(outputs_of(found, layers, len(images), about), taught)
        ce, kd = self._objective.terms(logits, labels, soft, features)
        return logits, ce, kd


def tapped_student(
    student: nn.Module, objective: Canonical, autocast: torch.autocast
) -> Tapped | None:
    """Return the student with an objective that learns from its layers; None if it does not."""
    if not objective.asks_for_layers:
        return None
    assert isinstance(objective, OwnObjective), f"{objective=}"
    return Tapped(student, objective, autocast)


# --- which layers there are -----------------------------------------------------------------------


def shapes_of(
    network: nn.Module, layers: Sequence[str], shape: tuple[int, int, int], about: str
) -> dict[str, Shape]:
    """Return the shape of an image's output of each layer; raise a ConfigError if one has none.

    The network runs on two random images, in eval mode.

    Args:
        shape: (C, H, W) of its images.
        about: the setting that names the layers, and the network, for sentences.
    """
    if not layers:
        return {}
    names = [name for name, _ in network.named_modules() if name]
    for name in layers:
        if name not in names:
            raise ConfigError(f"{about} has no layer {name!r}; {_nearest(name, names)}")
    training = network.training
    with torch.no_grad(), seeded(0, "layers"), caught(network, layers) as found:
        network.eval()(torch.randn(2, *shape))
    network.train(training)
    outputs = outputs_of(found, layers, 2, about)
    return {name: tuple(output.shape[1:]) for name, output in outputs.items()}


MOST_NAMED = 12
"""Most layers that a sentence lists."""


def _nearest(name: str, names: Sequence[str]) -> str:
    """Return the layer that is likely meant, or the first ones of the network."""
    hint = did_you_mean(name, names)
    if hint.startswith("did you mean"):
        return hint
    depth = min(n.count(".") for n in names) if names else 0
    top = [n for n in names if n.count(".") == depth]
    more = ", ..." if len(top) > MOST_NAMED else ""
    return f"its outer layers: {', '.join(top[:MOST_NAMED])}{more}"


# --- all layers of an image in one row, as the bank keeps them ------------------------------------


def numbers_of(shapes: Mapping[str, Shape]) -> int:
    """Return D."""
    return sum(map(math.prod, shapes.values()))


def in_rows(outputs: Mapping[str, Tensor]) -> Tensor:
    """Return outputs of layers [B, ...] as rows, float32 [B, D]."""
    return torch.cat([output.flatten(1) for output in outputs.values()], dim=1)


def from_rows(rows: Tensor, shapes: Mapping[str, Shape]) -> dict[str, Tensor]:
    """Return the outputs of layers, float32 [B, ...], from rows [B, D]."""
    parts = rows.float().split([math.prod(shape) for shape in shapes.values()], dim=1)
    return {
        name: part.reshape(-1, *shape)
        for part, (name, shape) in zip(parts, shapes.items(), strict=True)
    }


# --- a trial --------------------------------------------------------------------------------------


def trial_batches(
    student: nn.Module,
    teacher: nn.Module | None,
    objective: OwnObjective,
    shapes: tuple[tuple[int, int, int], tuple[int, int, int]],
    num_classes: int,
) -> list[Batch]:
    """Return two small batches of random images, with logits and outputs of layers.

    Args:
        student: it runs in training mode, as does the teacher, since an untrained network's logits
            may be huge in eval mode. Their batch statistics change.
        teacher: None if the objective needs none.
        shapes: (C, H, W) of the student's images and of the teacher's.
    """
    layers, where = objective.features, f"objective.{objective.called}.features"
    batches = []
    with seeded(0, "objective", num_classes), torch.no_grad():
        for _ in range(2):
            labels = torch.randint(num_classes, (TRIED_IMAGES,))
            with caught(student, layers.student) as found:
                logits = student.train()(torch.randn(TRIED_IMAGES, *shapes[0]))
            mine = outputs_of(found, layers.student, TRIED_IMAGES, f"{where}.student")
            soft, theirs = 2 * torch.randn_like(logits), dict[str, Tensor]()
            if teacher is not None:
                with caught(teacher, layers.teacher) as found:
                    soft = teacher.train()(torch.randn(TRIED_IMAGES, *shapes[1]))
                theirs = outputs_of(found, layers.teacher, TRIED_IMAGES, f"{where}.teacher")
            features = Features(mine, theirs)
            batches.append(Batch(logits.float(), labels, soft.float(), features))
    return batches
