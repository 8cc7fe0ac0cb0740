"""What an objective amounts to, and which of its searched settings do anything. (`tfkd explain`, `tfkd check`.)

Training sees an objective only through its gradient by the logits, so objectives are compared there, in float64, on a
fixed synthetic batch: images whose logits are normal plus a bump of 0 to 4 at the label, times 1, 5 and 10, so that
there are images early and late in training, right and wrong. The teacher of `kd` and its kin is as synthetic: normal
logits of deviation 2 plus a bump of 0 to 10 at the label, independent of the student's. It resembles no real teacher:
read those figures as orders of magnitude.

Shapes: S = logit scales, B = images, K = classes, N = B * K.
"""

import functools
import itertools
import math
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tfkd_ray.learn.config import TrainConfig
from tfkd_ray.learn.images import address
from tfkd_ray.learn.objectives import Canonical, CrossEntropy, LabelSmoothing, softmax
from tfkd_ray.space.ranges import Choices, Domain
from tfkd_ray.space.space import Branch, Parameter, Space

ExplainArray = NDArray[Any]
SCALES = (1.0, 5.0, 10.0)
"""Factors on the student's synthetic logits."""
EXPLAIN_TOLERANCE = 0.02
"""Two gradients are the same where less than this share of one is left unexplained by the other."""
POINTS = 9
"""Values of a range that are looked at, evenly on its own scale."""
EXPLAINED_CORNERS = 16
"""Most combinations of ends of the other settings at which one is looked at, beside their middle."""
LIMIT = f"{100 * EXPLAIN_TOLERANCE:g} %"
WIDTH = 80
TINY_PROBABILITY = 1e-30


@dataclass(frozen=True)
class Amount:
    """An objective in canonical form, and the label smoothing nearest to it."""

    objective: Canonical
    lsr: LabelSmoothing
    """The `lsr` whose gradient is nearest, over all logit scales alike."""
    residuals: tuple[float, ...]
    """Share of the gradient that this `lsr` leaves unexplained, for each of SCALES."""

    @property
    def ce_weight(self) -> float:
        """Weight of CE in the whole loss: s * (1 - alpha)."""
        return self.objective.loss_scale * self.objective.ce_weight

    @property
    def soft_weight(self) -> float:
        """Weight of the soft part in the whole loss: s * alpha * T^2, or s * alpha where there is no T^2."""
        return self.objective.loss_scale * self.objective.kd_weight

    @property
    def residual(self) -> float:
        """The largest of `residuals`."""
        return max(self.residuals)


@dataclass(frozen=True)
class Knob:
    """A searched setting of an objective, and what it does to the gradient over its range."""

    name: str
    """As in the space: objective.kd.temperature."""
    domain: Domain
    residual: float
    """How far the gradient is from the best scalar times that at the range's middle, relative to its size; the largest.
    One scalar for all logit scales: above 1 where they want different ones."""
    scalars: tuple[float, float]
    """Least and largest of these scalars: what the setting does to the size of the gradient."""

    @property
    def spread(self) -> float:
        """How many times the largest scalar is the least."""
        low, high = self.scalars
        return high / low if low > 0 else math.inf

    @property
    def verdict(self) -> Literal["live", "redundant", "dead"]:
        """dead: it does nothing. redundant: it only scales the loss."""
        if self.residual >= EXPLAIN_TOLERANCE:
            return "live"
        return "dead" if all(abs(s - 1) < EXPLAIN_TOLERANCE for s in self.scalars) else "redundant"


def amounts_to(objective: Canonical, num_classes: int) -> Amount:
    """The label smoothing nearest to an objective, and how near.

    s * LSR(eps) has the gradient s * (p - y) + s * eps * (y - 1/K), so the two are found by least squares.
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
    """The searched settings of a branch's objective, each varied with the others at their middle and at their ends."""
    searched = _searched_values(branch)
    gradient = _gradients(num_classes)
    middle = _middle(branch)
    found = []
    for parameter in searched:
        others = [p for p in searched if p is not parameter]
        field, domain = parameter.path[-1], parameter.domain
        ends = itertools.product((0.0, 1.0), repeat=len(others))
        moved = []
        for corner in [(0.5,) * len(others), *itertools.islice(ends, EXPLAINED_CORNERS)]:
            there = _moved_to(middle, others, corner)
            reference = gradient(there.model_copy(update={field: _at_place(domain, 0.5)}))
            for value in _values(domain):
                varied = gradient(there.model_copy(update={field: value}))
                moved.append(_moved_from(varied, reference))
        residuals, scalars = zip(*moved, strict=True)
        scaled = (min(scalars), max(scalars))
        found.append(Knob(parameter.name, domain, max(residuals), scaled))
    return found


def warnings_of(space: Space) -> list[str]:
    """A sentence for every searched setting of an objective that does nothing of its own, naming a way out."""
    K = space.example.data.num_classes
    both = {"optim.lr", "optim.weight_decay"} <= {p.name for p in space.parameters}
    way_out = "both are searched already: fix it" if both else "search these instead, or fix it"
    sentences: list[str] = []
    for branch in space.branches:
        found = knobs(branch, K)
        for knob in found:
            sentences += _about_knob(knob, way_out)
        sentences += _about_all(branch, found, K)
    return sentences


def _about_knob(knob: Knob, way_out: str) -> Iterator[str]:
    """That a setting does nothing, or only scales the loss."""
    if knob.verdict == "dead":
        least, largest = knob.scalars
        moved = max(abs(least - 1), abs(largest - 1))
        yield (
            f"{knob.name}: dead: over its range the logit gradient moves by {_percent(knob.residual)} (below {LIMIT}), "
            f"and its size by {_percent(moved)}; fix it, or widen it"
        )
    if knob.verdict == "redundant":
        yield (
            f"{knob.name}: redundant: it only scales the loss ({knob.spread:.3g}-fold over its range), which is "
            f"optim.lr times that and optim.weight_decay divided by it; {way_out}"
        )


def _about_all(branch: Branch, found: Sequence[Knob], num_classes: int) -> Iterator[str]:
    """That several live settings of an objective amount to the alpha of a label smoothing."""
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


def explained(space: Space) -> Iterator[str]:
    """What every objective of a space amounts to, and what its searched settings do: lines of at most 80 columns."""
    data = space.example.data
    K = data.num_classes
    scales = ", ".join(f"{s:g}" for s in SCALES)
    yield f"{data.name}, K = {K}: judged on {_random_images(K)} synthetic images, logits times {scales}"
    for branch in space.branches:
        found = knobs(branch, K)
        amounts = [amounts_to(o, K) for o in _ends_searched(branch)]
        yield ""
        teacher = ", synthetic teacher" if amounts[0].objective.needs_teacher else ""
        yield f"objective.{branch.objective}{teacher}"
        yield from _indented(_sentences(amounts))
        if found:
            yield f"  {'searched':<16} {'range':<32} {'moves':>6} {'scales':>9}  verdict"
        for knob in found:
            name = knob.name.rpartition(".")[2]
            domain = textwrap.shorten(str(knob.domain), 32, placeholder=" ...")
            numbers = f"{_percent(knob.residual):>6} {f'{knob.spread:.2g}x':>9}"
            yield f"  {name:<16} {domain:<32} {numbers}  {knob.verdict}"
    if any(p.path[0] == "objective" for p in space.parameters):
        yield ""
        yield from textwrap.wrap(
            "moves: how far the logit gradient is from the best multiple of that at the range's middle, relative to "
            "its size; the largest over the range, with the other settings at their middle and at their ends. scales: "
            f"the largest multiple over the least. live: moves by {LIMIT} or more. redundant: only scales the loss. "
            "dead: neither.",
            WIDTH,
        )


def arm_line(name: str, config: TrainConfig) -> Iterator[str]:
    """What the objective of one configuration amounts to: a line with its name, and a few below it."""
    yield textwrap.shorten(f"{name}: {config.objective.name}", WIDTH, placeholder=" ...")
    yield from _indented(_sentences([amounts_to(config.objective, config.data.num_classes)]))


# --- gradients -------------------------------------------------------------------------------------------------


def _random_images(num_classes: int) -> int:
    """B: 256, and less where there are more than 128 classes, so that a gradient has 2^15 numbers."""
    return max(16, min(256, 2**15 // num_classes))


class _Draws:
    """Numbers as torch's generator draws them on the CPU, without torch, whose import takes a second."""

    def __init__(self, seed: int) -> None:
        self.twister = np.random.RandomState(seed % 2**32)

    def bits(self, count: int) -> ExplainArray:
        """Whole numbers of 32 bits, [count]."""
        found: ExplainArray = self.twister.randint(2**32, size=count, dtype=np.uint32)
        return found

    def uniform(self, count: int) -> ExplainArray:
        """Like `torch.rand` in float64, [count]."""
        high, low = self.bits(2 * count).astype(np.uint64).reshape(-1, 2).T
        found: ExplainArray = ((high << np.uint64(32) | low) & np.uint64(2**53 - 1)) / 2**53
        return found

    def normal(self, rows: int, columns: int) -> ExplainArray:
        """Like `torch.randn` in float64, [rows, columns]: by 16 numbers, the last of which are drawn again."""
        found = self.uniform(rows * columns)
        whole = found.size // 16 * 16
        found[:whole] = _box_muller(found[:whole])
        if whole < found.size:
            found[-16:] = _box_muller(self.uniform(16))
        return found.reshape(rows, columns)


def _box_muller(uniform: ExplainArray) -> ExplainArray:
    """Normal numbers of uniform ones, 16 at a time. (Box and Muller 1958.)"""
    first, second = uniform.reshape(-1, 2, 8).swapaxes(0, 1)
    radius, angle = np.sqrt(-2 * np.log1p(-first)), 2 * np.pi * second
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).ravel()


@functools.lru_cache(maxsize=1)
def _batch(num_classes: int) -> tuple[ExplainArray, ExplainArray, ExplainArray]:
    """(student logits [S, B, K], labels [B], teacher logits [B, K])."""
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
    """p - y, the gradient of CE, and y - 1/K; [S, N], means over the batch."""
    logits, labels, _ = _batch(num_classes)
    y = np.eye(num_classes)[labels]
    ce = softmax(logits) - y
    flatter = np.broadcast_to(y - 1 / num_classes, logits.shape)
    return _means(ce), _means(flatter)


def _means(gradient: ExplainArray) -> ExplainArray:
    """[S, B, K] as [S, N], means over the batch."""
    found: ExplainArray = gradient.reshape(len(gradient), -1) / gradient.shape[1]
    return found


def _gradients(num_classes: int) -> Callable[[Canonical], ExplainArray]:
    """The gradient [S, N] of an objective; the soft part is kept, so that alpha and loss_scale cost nothing."""
    logits, labels, teacher = _batch(num_classes)
    ce, _ = _directions(num_classes)

    @functools.lru_cache(maxsize=64)  # of 0.8 MB, or less where there are few classes
    def soft(objective: Canonical) -> ExplainArray:
        target = objective.soft_target(labels, teacher)
        if target is None:
            return _by_torch(objective, logits, labels, teacher)
        q, temperature = target
        return _means((softmax(logits / temperature) - q) / temperature)

    def gradient(objective: Canonical) -> ExplainArray:
        if not objective.kd_weight:
            return objective.loss_scale * objective.ce_weight * ce
        weights = {"loss_scale": 1.0, "alpha": 0.5}
        own = {k: v for k, v in weights.items() if k in type(objective).model_fields}
        kd = soft(objective.model_copy(update=own))
        parts = objective.ce_weight * ce + objective.kd_weight * kd
        return objective.loss_scale * parts

    return gradient


def _by_torch(
    objective: Canonical, logits: ExplainArray, labels: ExplainArray, teacher: ExplainArray
) -> ExplainArray:
    """The gradient [S, N] of `Terms.kd`, of any objective."""
    import torch

    z = torch.tensor(logits, requires_grad=True)
    right, target = torch.tensor(labels.astype(np.int64)), torch.tensor(teacher)
    total = 0 * z.sum()
    for each in z:
        kd = objective.terms(each, right, target).kd
        if kd is not None:
            total = total + kd
    found: ExplainArray = torch.autograd.grad(total, z)[0].flatten(1).numpy()
    return found


def _moved_from(gradient: ExplainArray, reference: ExplainArray) -> tuple[float, float]:
    """(share of `gradient` that the best multiple of `reference` leaves, at the worst logit scale; the multiple)."""
    size = _size(gradient)
    g, r = gradient / size, reference / size
    scalar = float((g * r).sum() / max((r * r).sum(), TINY_PROBABILITY))
    left = np.linalg.norm(g - scalar * r, axis=1)
    return float(left.max()), scalar


def _size(gradient: ExplainArray) -> ExplainArray:
    """Length at each logit scale, [S, 1]."""
    found: ExplainArray = np.maximum(
        np.linalg.norm(gradient, axis=1, keepdims=True), TINY_PROBABILITY
    )
    return found


# --- ranges ----------------------------------------------------------------------------------------------------


def _at_place(domain: Domain, t: float) -> Any:
    """The value at a fraction t of the way through a range on its own scale, or through sorted choices."""
    if isinstance(domain, Choices):
        last = len(domain.values) - 1
        return sorted(domain.values)[round(t * last)]
    return domain.at(t)


def _values(domain: Domain) -> list[Any]:
    if isinstance(domain, Choices):
        return list(domain.values)
    return [_at_place(domain, k / (POINTS - 1)) for k in range(POINTS)]


def _searched_values(branch: Branch) -> list[Parameter]:
    """The searched settings of the branch's objective: all of them numbers."""
    return [p for p in branch.parameters if p.path[0] == "objective"]


def _middle(branch: Branch) -> Canonical:
    """The branch's objective with its searched settings at their middle."""
    values = {p.name: p.domain.probes[0] for p in branch.parameters}
    for p in _searched_values(branch):
        values[p.name] = _at_place(p.domain, 0.5)
    return branch.config(values).objective


def _moved_to(
    objective: Canonical, parameters: Sequence[Parameter], places: Sequence[float]
) -> Canonical:
    """The objective with the values of parameters at these places of their ranges."""
    values = {}
    for p, place in zip(parameters, places, strict=True):
        values[p.path[-1]] = _at_place(p.domain, place)
    return objective.model_copy(update=values)


def _ends_searched(branch: Branch) -> Iterator[Canonical]:
    """The branch's objective at the middle and at all ends of its ranges; once if nothing of it is searched."""
    searched = _searched_values(branch)
    middle = _middle(branch)
    yield middle
    if not searched:
        return
    for corner in itertools.product((0.0, 1.0), repeat=len(searched)):
        yield _moved_to(middle, searched, corner)


# --- words -----------------------------------------------------------------------------------------------------


def _sentences(amounts: Sequence[Amount]) -> Iterator[str]:
    """On an objective, given what it amounts to at its middle and at all ends of its ranges (once if it is fixed)."""
    objective = amounts[0].objective
    settings = [
        f"{label} {_span([getattr(a.objective, field) for a in amounts])}"
        for label, field in (
            ("alpha", "alpha"),
            ("T", "temperature"),
            ("correct_prob", "correct_prob"),
        )
        if field in type(objective).model_fields
    ]
    yield f"loss_scale {_span([a.objective.loss_scale for a in amounts])}" + "".join(
        f", {text}" for text in settings
    )
    soft = f", of the soft part {_span([a.soft_weight for a in amounts])}" if settings else ""
    yield f"weight of CE {_span([a.ce_weight for a in amounts])}{soft}"
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


def _indented(sentences: Iterator[str]) -> Iterator[str]:
    for sentence in sentences:
        yield from textwrap.wrap(sentence, WIDTH, initial_indent="  ", subsequent_indent="    ")
