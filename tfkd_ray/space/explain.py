"""Equivalents of objectives, and searched settings without effect; `tfkd explain`, `tfkd check`.

Training depends on an objective only through its gradient by the logits, so objectives are compared
by it, in float64, on a fixed synthetic batch: images whose logits are normal plus a bump of 0 to 4
at the label, times 1, 5 and 10, to cover early and late training, right and wrong predictions. The
teacher of `kd` and similar objectives is synthetic, too: normal logits of deviation 2 plus a bump
of 0 to 10 at the label, independent of the student's. It resembles no real teacher: read those
figures as orders of magnitude.

Shapes: S = logit scales, B = images, K = classes, N = B * K.
"""

import copy
import functools
import itertools
import math
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tfkd_ray.learn.config import TrainConfig
from tfkd_ray.learn.images import address, seeded
from tfkd_ray.learn.objectives import (
    Canonical,
    CrossEntropy,
    LabelSmoothing,
    OwnObjective,
    softmax,
)
from tfkd_ray.learn.optimizers import AdamW, Muon
from tfkd_ray.settings.columns import in_columns, wrapped
from tfkd_ray.settings.errors import Sentences
from tfkd_ray.settings.yaml import value_at
from tfkd_ray.space.ranges import Choices, Domain
from tfkd_ray.space.space import Branch, Parameter, Space

ExplainArray = NDArray[Any]
SCALES = (1.0, 5.0, 10.0)
"""Factors on the student's synthetic logits."""
EXPLAIN_TOLERANCE = 0.02
"""Two gradients count as equal if one leaves less than this share of the other unexplained."""
POINTS = 9
"""Number of values of a range that are examined, evenly on its own scale."""
EXPLAINED_CORNERS = 16
"""Most combinations of the other settings' ends at which a setting is examined, besides their
middle."""
LIMIT = f"{100 * EXPLAIN_TOLERANCE:g} %"
WIDTH = 80
TINY_PROBABILITY = 1e-30
LAYERS_TOO = (
    "also learns from layers of the networks: its gradient by the logits shows neither its equivalent nor which "
    "settings matter"
)
"""Sentence about an objective that asks for layers."""


@dataclass(frozen=True)
class Amount:
    """An objective in canonical form, and the nearest label smoothing."""

    objective: Canonical
    lsr: LabelSmoothing
    """The `lsr` with the nearest gradient, over all logit scales together."""
    residuals: tuple[float, ...]
    """Share of the gradient that this `lsr` leaves unexplained, per value of SCALES."""

    @property
    def ce_weight(self) -> float | None:
        """Return the weight of CE in the whole loss, s * (1 - alpha); None if it is unknown."""
        return self.objective.ce_share

    @property
    def soft_weight(self) -> float:
        """Return the weight of the soft part in the whole loss: s * alpha * T^2 (or s * alpha)."""
        return self.objective.loss_scale * self.objective.kd_weight

    @property
    def residual(self) -> float:
        """Return the largest of `residuals`."""
        return max(self.residuals)


@dataclass(frozen=True)
class Knob:
    """A searched setting of an objective, and its effect on the gradient over its range."""

    name: str
    """Name as in the space: objective.kd.temperature."""
    domain: Domain
    residual: float
    """Largest relative distance of the gradient from the best multiple of that at the range's
    middle. One factor serves all logit scales; above 1 if they need different ones."""
    scalars: tuple[float, float]
    """Smallest and largest of these factors: the setting's effect on the size of the gradient."""

    @property
    def spread(self) -> float:
        """Return the ratio of the largest factor to the smallest."""
        low, high = self.scalars
        return high / low if low > 0 else math.inf

    @property
    def verdict(self) -> Literal["live", "redundant", "dead"]:
        """Return the effect: dead does nothing, redundant only scales the loss."""
        if self.residual >= EXPLAIN_TOLERANCE:
            return "live"
        return "dead" if all(abs(s - 1) < EXPLAIN_TOLERANCE for s in self.scalars) else "redundant"


def amounts_to(objective: Canonical, num_classes: int) -> Amount:
    """Return the label smoothing nearest to an objective, and its distance.

    s * LSR(eps) has the gradient s * (p - y) + s * eps * (y - 1/K), so least squares finds both
    numbers.
    """
    gradient = _gradients(num_classes)(objective)
    ce, flatter = _directions(num_classes)
    size = _size(gradient)
    g, a, b = (x / size for x in (gradient, ce, flatter))
    both = np.stack([a.ravel(), b.ravel()], axis=1)
    c, d = np.linalg.lstsq(both, g.ravel())[0].tolist()
    tried = [0.0, 1.0]
    if c > 0 and 0 <= d <= c:
        tried = [d / c]

    def fit(eps: float) -> Amount:
        smoothed = a + eps * b
        best = (g * smoothed).sum() / (smoothed * smoothed).sum()
        scale = max(float(best), TINY_PROBABILITY)
        lsr = LabelSmoothing(alpha=eps, loss_scale=scale)
        residuals = np.linalg.norm(g - scale * smoothed, axis=1)
        return Amount(objective, lsr, tuple(residuals.tolist()))

    return min(map(fit, tried), key=lambda amount: math.hypot(*amount.residuals))


def knobs(branch: Branch, num_classes: int) -> list[Knob]:
    """Return the searched settings of a branch, each varied while the others are fixed.

    The others are at their middle, and at combinations of their ends. None are returned of an
    objective that asks for layers: a gradient by the logits does not show what it does.
    """
    if branch.example.objective.asks_for_layers:
        return []
    searched = _searched_values(branch)
    gradient = _gradients(num_classes)
    middle = _middle(branch)
    found = []
    for parameter in searched:
        others = [p for p in searched if p is not parameter]
        domain = parameter.domain
        around = middle if parameter.within is None else _middle(branch, parameter)
        ends = itertools.product((0.0, 1.0), repeat=len(others))
        moved = []
        for corner in [(0.5,) * len(others), *itertools.islice(ends, EXPLAINED_CORNERS)]:
            there = _moved_to(around, others, corner)
            reference = gradient(_with_value(there, parameter, _at_place(domain, 0.5)))
            for value in _values(domain):
                varied = gradient(_with_value(there, parameter, value))
                moved.append(_moved_from(varied, reference))
        residuals, scalars = zip(*moved, strict=True)
        scaled = (min(scalars), max(scalars))
        found.append(Knob(parameter.name, domain, max(residuals), scaled))
    return found


def warnings_of(space: Space) -> list[str]:
    """Return a sentence, with a way out, for each searched setting without an effect of its own."""
    K = space.example.data.num_classes
    both = {"optim.lr", "optim.weight_decay"} <= {p.name for p in space.parameters}
    way_out = "both are searched already: fix it" if both else "search these instead, or fix it"
    sentences: list[str] = []
    for branch in space.branches:
        found = knobs(branch, K)
        blind = _blind_to_scale(branch)
        for knob in found:
            sentences += _about_knob(knob, way_out, blind)
        sentences += _about_all(branch, found, K)
    return sentences


def _blind_to_scale(branch: Branch) -> str | None:
    """Return the optimizer of all trials if its updates do not depend on the gradient's size."""
    searched = any(p.path in (("optim",), ("optim", "clip_norm")) for p in branch.parameters)
    optim = branch.example.optim
    if searched or optim.clip_norm is not None or not isinstance(optim, AdamW | Muon):
        return None
    return optim.name


def _about_knob(knob: Knob, way_out: str, blind: str | None) -> Sentences:
    """Yield a sentence if a setting does nothing or only scales the loss.

    Args:
        blind: an optimizer for which the size of the gradient has no effect.
    """
    if knob.verdict == "dead":
        least, largest = knob.scalars
        moved = max(abs(least - 1), abs(largest - 1))
        yield (
            f"{knob.name}: dead: over its range the logit gradient moves by {_percent(knob.residual)} (below "
            f"{LIMIT}), and its size by {_percent(moved)}; fix it, or widen it"
        )
    if knob.verdict == "redundant" and blind is not None:
        yield (
            f"{knob.name}: redundant: it only scales the loss ({knob.spread:.3g}-fold over its range), and updates of "
            f"{blind} do not depend on that; fix it"
        )
    elif knob.verdict == "redundant":
        yield (
            f"{knob.name}: redundant: it only scales the loss ({knob.spread:.3g}-fold over its range), which equals "
            f"optim.lr times that factor and optim.weight_decay divided by it; {way_out}"
        )


def _about_all(branch: Branch, found: Sequence[Knob], num_classes: int) -> Sentences:
    """Yield a sentence if several live settings together amount to one label-smoothing alpha."""
    live = [k.name.rpartition(".")[2] for k in found if k.verdict == "live"]
    if len(live) < 2:
        return
    ends = list(_ends_searched(branch))
    if ends[0].searchable is not None:
        return
    amounts = [amounts_to(objective, num_classes) for objective in ends]
    if max(a.residual for a in amounts) < EXPLAIN_TOLERANCE:
        yield (
            f"objective.{branch.objective}: {' and '.join(live)} are one knob: at all ends of their ranges it "
            f"{_as_smoothing(amounts)}; search one of them, or lsr"
        )


def explained(space: Space) -> Sentences:
    """Yield the equivalents of a space's objectives and searched settings, 80 columns a line."""

    data = space.example.data
    K = data.num_classes
    scales = ", ".join(f"{s:g}" for s in SCALES)
    yield f"{data.name}, K = {K}: judged on {_random_images(K)} synthetic images, logits times {scales}"
    for branch in space.branches:
        if branch.example.objective.asks_for_layers:
            yield from ("", f"objective.{branch.objective}", *_indented([LAYERS_TOO]))
            continue
        found = knobs(branch, K)
        amounts = [amounts_to(o, K) for o in _ends_searched(branch)]
        yield ""
        teacher = ", synthetic teacher" if amounts[0].objective.needs_teacher else ""
        yield f"objective.{branch.objective}{teacher}"
        yield from _indented(_sentences(amounts))
        table = ["  searched\trange\tmoves\tscales\tverdict"] if found else []
        for knob in found:
            name = knob.name.rpartition(".")[2]
            domain = textwrap.shorten(str(knob.domain), 32, placeholder=" ...")
            numbers = f"{_percent(knob.residual)}\t{knob.spread:.2g}x"
            table.append(f"  {name}\t{domain}\t{numbers}\t{knob.verdict}")
        yield from in_columns(table, WIDTH)
    if any(p.path[0] == "objective" for p in space.parameters):
        yield ""
        yield from textwrap.wrap(
            "moves: the distance of the logit gradient from the best multiple of the gradient at the range's middle, "
            "relative to its size. It is the largest over the range, with the other settings at their middle and at "
            f"their ends. scales: the largest multiple over the smallest. live: moves by {LIMIT} or more. redundant: "
            "only scales the loss. dead: neither.",
            WIDTH,
        )


def arm_line(name: str, config: TrainConfig) -> Sentences:
    """Yield the equivalent of one configuration's objective: a line with its name, then details."""
    yield textwrap.shorten(f"{name}: {config.objective.called}", WIDTH, placeholder=" ...")
    if config.objective.asks_for_layers:
        yield from _indented([LAYERS_TOO])
        return
    yield from _indented(_sentences([amounts_to(config.objective, config.data.num_classes)]))


# --- gradients ------------------------------------------------------------------------------------


def _random_images(num_classes: int) -> int:
    """Return B: 256, or fewer for more than 128 classes, so that a gradient has 2^15 numbers."""
    return max(16, min(256, 2**15 // num_classes))


class _Draws:
    """The random numbers of torch's CPU generator, without torch, whose import takes a second."""

    def __init__(self, seed: int) -> None:
        self.twister = np.random.RandomState(seed % 2**32)

    def bits(self, count: int) -> ExplainArray:
        """Return whole numbers of 32 bits, [count]."""
        found: ExplainArray = self.twister.randint(2**32, size=count, dtype=np.uint32)
        return found

    def uniform(self, count: int) -> ExplainArray:
        """Return numbers like `torch.rand` in float64, [count]."""
        high, low = self.bits(2 * count).astype(np.uint64).reshape(-1, 2).T
        found: ExplainArray = ((high << np.uint64(32) | low) & np.uint64(2**53 - 1)) / 2**53
        return found

    def normal(self, rows: int, columns: int) -> ExplainArray:
        """Return numbers like `torch.randn` in float64, [rows, columns].

        They are drawn in blocks of 16; torch draws the last 16 again.
        """
        found = self.uniform(rows * columns)
        whole = found.size // 16 * 16
        found[:whole] = _box_muller(found[:whole])
        if whole < found.size:
            found[-16:] = _box_muller(self.uniform(16))
        return found.reshape(rows, columns)


def _box_muller(uniform: ExplainArray) -> ExplainArray:
    """Return normal numbers from uniform ones, 16 at a time. (Box and Muller 1958.)"""
    first, second = uniform.reshape(-1, 2, 8).swapaxes(0, 1)
    radius, angle = np.sqrt(-2 * np.log1p(-first)), 2 * np.pi * second
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).ravel()


@functools.lru_cache(maxsize=1)
def _batch(num_classes: int) -> tuple[ExplainArray, ExplainArray, ExplainArray]:
    """Return (student logits [S, B, K], labels [B], teacher logits [B, K])."""
    draws, B = _Draws(address(0, "explain", num_classes)), _random_images(num_classes)
    labels = draws.bits(B) % num_classes

    def bumpy(deviation: float, height: float) -> ExplainArray:
        logits = deviation * draws.normal(B, num_classes)
        logits[np.arange(B), labels] += height * draws.uniform(B)
        return logits

    student, teacher = bumpy(1, 4), bumpy(2, 10)
    return np.stack([s * student for s in SCALES]), labels, teacher


@functools.lru_cache(maxsize=1)
def _directions(num_classes: int) -> tuple[ExplainArray, ExplainArray]:
    """Return p - y, the gradient of CE, and y - 1/K; [S, N], means over the batch."""
    logits, labels, _ = _batch(num_classes)
    y = np.eye(num_classes)[labels]
    ce = softmax(logits) - y
    flatter = np.broadcast_to(y - 1 / num_classes, logits.shape)
    return _means(ce), _means(flatter)


def _means(gradient: ExplainArray) -> ExplainArray:
    """Return a gradient [S, B, K] as [S, N], means over the batch."""
    found: ExplainArray = gradient.reshape(len(gradient), -1) / gradient.shape[1]
    return found


def _gradients(num_classes: int) -> Callable[[Canonical], ExplainArray]:
    """Return a function from an objective to its gradient [S, N]; soft parts are cached."""
    logits, labels, teacher = _batch(num_classes)
    ce, _ = _directions(num_classes)

    @functools.lru_cache(maxsize=64)  # entries of at most 0.8 MB
    def soft(objective: Canonical) -> ExplainArray:
        target = objective.soft_target(labels, teacher)
        if target is None:
            return _by_torch(lambda *batch: objective.terms(*batch).kd, logits, labels, teacher)
        q, temperature = target
        return _means((softmax(logits / temperature) - q) / temperature)

    @functools.lru_cache(maxsize=64)
    def whole(objective: Canonical) -> ExplainArray:
        if isinstance(objective, OwnObjective):
            return _of_own(objective, logits, labels, teacher)
        return _by_torch(objective, logits, labels, teacher)

    def gradient(objective: Canonical) -> ExplainArray:
        if isinstance(objective, OwnObjective) or not objective.has_parts:
            return whole(objective)
        if not objective.kd_weight:
            return objective.loss_scale * objective.ce_weight * ce
        weights = {"loss_scale": 1.0, "alpha": 0.5}
        own = {k: v for k, v in weights.items() if k in type(objective).model_fields}
        kd = soft(objective.model_copy(update=own))
        parts = objective.ce_weight * ce + objective.kd_weight * kd
        return objective.loss_scale * parts

    return gradient


def _by_torch(
    loss: Callable[..., Any], logits: ExplainArray, labels: ExplainArray, teacher: ExplainArray
) -> ExplainArray:
    """Return the gradient [S, N] of a loss, computed by torch.

    Args:
        loss: a function of (logits, labels, teacher), such as an objective, or a part of it; it
            returns a scalar, or None, which counts as 0.
    """
    import torch

    z = torch.tensor(logits, requires_grad=True)
    right, target = torch.tensor(labels.astype(np.int64)), torch.tensor(teacher)
    total = 0 * z.sum()
    for each in z:
        part = loss(each, right, target)
        if part is not None:
            total = total + part
    found: ExplainArray = torch.autograd.grad(total, z)[0].flatten(1).numpy()
    return found


def _of_own(
    objective: OwnObjective, logits: ExplainArray, labels: ExplainArray, teacher: ExplainArray
) -> ExplainArray:
    """Return the gradient [S, N] of a whole loss of the user's own, in float32 as in training."""
    import torch

    ready = objective.loaded()
    z = torch.tensor(logits, dtype=torch.float32, requires_grad=True)
    right = torch.tensor(labels.astype(np.int64))
    target = torch.tensor(teacher, dtype=torch.float32) if objective.needs_teacher else None
    total = torch.zeros(())
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more wait for each other longer than a small batch takes
    try:
        with seeded(0, "explain"):
            for each in z:
                total = total + ready(each, right, target)
        found: ExplainArray = torch.autograd.grad(total, z)[0].flatten(1).double().numpy()
    finally:
        torch.set_num_threads(threads)
    return found


def _moved_from(gradient: ExplainArray, reference: ExplainArray) -> tuple[float, float]:
    """Return (residual, factor) of the best multiple of `reference`, at the worst logit scale."""
    size = _size(gradient)
    g, r = gradient / size, reference / size
    scalar = float((g * r).sum() / max((r * r).sum(), TINY_PROBABILITY))
    left = np.linalg.norm(g - scalar * r, axis=1)
    return float(left.max()), scalar


def _size(gradient: ExplainArray) -> ExplainArray:
    """Return the norm at each logit scale, [S, 1]."""
    found: ExplainArray = np.maximum(
        np.linalg.norm(gradient, axis=1, keepdims=True), TINY_PROBABILITY
    )
    return found


# --- ranges ---------------------------------------------------------------------------------------


def _at_place(domain: Domain, t: float) -> Any:
    """Return the value at a fraction t of a range, on its own scale, or of sorted choices."""
    if isinstance(domain, Choices):
        last = len(domain.values) - 1
        numbers = all(isinstance(value, int | float) for value in domain.values)
        return (sorted(domain.values) if numbers else domain.values)[round(t * last)]
    return round(domain.at(t)) if domain.whole else domain.at(t)


def _values(domain: Domain) -> list[Any]:
    if isinstance(domain, Choices):
        return list(domain.values)
    return [_at_place(domain, k / (POINTS - 1)) for k in range(POINTS)]


def _searched_values(branch: Branch) -> list[Parameter]:
    """Return the searched settings of the branch's objective; only own ones may not be numbers."""
    return [p for p in branch.parameters if p.path[0] == "objective"]


def _middle(branch: Branch, inside: Parameter | None = None) -> Canonical:
    """Return the branch's objective with its searched settings at their middle.

    Args:
        inside: a parameter within an item of choices, which is chosen then.
    """
    values = {p.name: p.domain.probes[0] for p in branch.parameters}
    for p in _searched_values(branch):
        values[p.name] = _at_place(p.domain, 0.5)
    if inside is not None:
        chosen = {p.within[0] for p in branch.parameters if p.within}
        values |= {k: v for k, v in branch.around(inside).items() if k in chosen}
    return branch.config(values).objective


def _moved_to(
    objective: Canonical, parameters: Sequence[Parameter], places: Sequence[float]
) -> Canonical:
    """Return the objective with parameters at these places of their ranges."""
    for p, place in zip(parameters, places, strict=True):
        objective = _with_value(objective, p, _at_place(p.domain, place))
    return objective


def _with_value(objective: Canonical, parameter: Parameter, value: Any) -> Canonical:
    """Return the objective with another value of a parameter.

    A parameter within an item of choices that is not chosen has no place: it changes nothing.
    """
    _, top, *below = parameter.path
    if not below:
        return objective.model_copy(update={top: value})
    whole = copy.deepcopy(getattr(objective, top))
    part = value_at(whole, below[:-1])
    if not isinstance(part, dict) or below[-1] not in part:
        return objective
    part[below[-1]] = value
    return objective.model_copy(update={top: whole})


def _ends_searched(branch: Branch) -> Iterator[Canonical]:
    """Yield the branch's objective at the middle and all ends of its ranges, or once if fixed."""
    searched = _searched_values(branch)
    middle = _middle(branch)
    yield middle
    if not searched:
        return
    for corner in itertools.product((0.0, 1.0), repeat=len(searched)):
        yield _moved_to(middle, searched, corner)


# --- words ----------------------------------------------------------------------------------------


def _sentences(amounts: Sequence[Amount]) -> Sentences:
    """Yield sentences on an objective, from its amounts at middle and ends (one if it is fixed)."""
    objective = amounts[0].objective
    yield ", ".join(_shown_settings(amounts))
    weights = [a.ce_weight for a in amounts]
    known = [weight for weight in weights if weight is not None]
    if len(known) == len(weights):
        soft = f", of the soft part {_span([a.soft_weight for a in amounts])}"
        yield f"weight of CE {_span(known)}{soft * (not isinstance(objective, CrossEntropy))}"
    elif objective.has_parts:
        yield f"weight of CE unknown: the first part of {objective.called} is not CE"
    else:
        yield f"weight of CE unknown: {objective.called} gives the whole loss"
    if isinstance(objective, CrossEntropy | LabelSmoothing):
        return
    alpha = _span([a.lsr.alpha for a in amounts])
    off = [a.residual for a in amounts]
    if max(off) < EXPLAIN_TOLERANCE:
        yield _as_smoothing(amounts)
    elif len(amounts) == 1:
        residuals = zip(amounts[0].residuals, SCALES, strict=True)
        by_scale = ", ".join(f"{_percent(r)} at {s:g}" for r, s in residuals)
        yield (
            f"no label smoothing is within {LIMIT}; the nearest, alpha {alpha}, is {_percent(off[0])} off "
            f"(by the size of the logits: {by_scale})"
        )
    else:
        yield f"the nearest label smoothing, alpha {alpha}, is {_percent(min(off))} to {_percent(max(off))} off"


def _shown_settings(amounts: Sequence[Amount]) -> Iterator[str]:
    """Yield an objective's settings with their values; of an own loss, its loss scale alone."""
    yield f"loss_scale {_span([a.objective.loss_scale for a in amounts])}"
    objective = amounts[0].objective
    if isinstance(objective, OwnObjective):
        return
    for field in type(objective).model_fields:
        if field in ("name", "loss_scale"):
            continue
        values = [getattr(a.objective, field) for a in amounts]
        label = "T" if field == "temperature" else field
        if all(isinstance(value, int | float) for value in values):
            yield f"{label} {_span(values)}"
        else:
            yield f"{label} {' or '.join(dict.fromkeys(map(str, values)))}"


def _as_smoothing(amounts: Sequence[Amount]) -> str:
    alpha = _span([a.lsr.alpha for a in amounts])
    scale = _span([a.lsr.loss_scale for a in amounts])
    return f"equals lsr alpha {alpha} with loss_scale {scale} (to {_percent(max(a.residual for a in amounts))})"


def _span(values: Sequence[float]) -> str:
    low, high = (f"{v:.4g}" for v in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def _percent(share: float) -> str:
    if share < EXPLAIN_TOLERANCE:
        return f"{100 * share:.2f} %"
    return f"{100 * share:.1f} %" if share < 0.1 else f"{100 * share:.0f} %"


def _indented(sentences: Iterable[str]) -> Sentences:
    for sentence in sentences:
        yield from wrapped(sentence, WIDTH, first="  ", rest="    ")
