"""Ranges and choices: what is searched of one setting, and how it is written in a file.

In YAML a bare value is fixed. `{low, high}`, with `log: true`, `step: s` or `log_complement: true` (log-uniform in
1 - x), or `{choices: [...]}`, is searched.
"""

import copy
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Protocol, get_origin

from tfkd_ray.config import TrainConfig
from tfkd_ray.schema import ConfigError, did_you_mean, dotted, in_yaml, leaves, members, named, tag

Tree = dict[str, Any]
Path_ = tuple[str, ...]


class Suggests(Protocol):
    """The part of `optuna.Trial` that a space needs."""

    def suggest_float(self, name: str, low: float, high: float, *, step: float | None, log: bool) -> float: ...
    def suggest_int(self, name: str, low: int, high: int, *, step: int, log: bool) -> int: ...
    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any: ...


MANY = 2**40
"""Steps beyond which a sampler is asked for any number, which is brought to a step: tpe's probability of one is lost in
a float."""


@dataclass(frozen=True)
class Range:
    """All numbers from low to high, both ends included."""

    low: float
    high: float
    log: bool = False
    step: float | None = None
    log_complement: bool = False
    """Log-uniform in 1 - x: as many trials in 0.9 to 0.99 as in 0.99 to 0.999."""
    whole: bool = False
    """Whole numbers only."""

    def suggest(self, trial: Suggests, name: str) -> float:
        """A value in the range, asked of the sampler under `name`."""
        if self.whole:
            found: float
            first, last, by = int(self.low), int(self.high), int(self.step or 1)
            if last - first > MANY * by:
                found = trial.suggest_float(name, first, last, step=None, log=self.log)
            else:
                found = trial.suggest_int(name, first, last, step=by, log=self.log)
            # a study keeps a float: beyond 2**53 the nearest, which is brought back to a step, and always to the same
            return min(first + (int(float(found)) - first) // by * by, last)
        if self.step and self.high - self.low > MANY * self.step:
            found = trial.suggest_float(name, self.low, self.high, step=None, log=False)
            return min(self.low + round((found - self.low) / self.step) * self.step, self.high)
        if self.log_complement:
            low, high = 1 - self.high, 1 - self.low
            return 1 - trial.suggest_float(f"1 - {name}", low, high, step=None, log=True)
        return trial.suggest_float(name, self.low, self.high, step=self.step, log=self.log)

    @property
    def probes(self) -> list[Any]:
        """Values that are valid only if the whole range is."""
        return [int(self.low), int(self.high)] if self.whole else [self.low, self.high]

    def told(self, name: str, value: Any) -> Tree:
        """The value as `suggest` asks for it."""
        if self.log_complement:
            return {f"1 - {name}": min(max(1 - value, 1 - self.high), 1 - self.low)}
        return {name: value}

    def contains(self, value: Any) -> bool:
        """Whether it may be proposed."""
        if isinstance(value, bool) or not isinstance(value, int | float) or not self.low <= value <= self.high:
            return False
        if self.whole:
            return value == int(value) and (int(value) - int(self.low)) % int(self.step or 1) == 0
        if self.step is None:
            return True
        steps = (value - self.low) / self.step
        rounding = 4 * math.ulp(max(abs(value), abs(self.low))) / self.step
        return abs(steps - round(steps)) <= max(1e-9, rounding)

    def includes(self, other: "Domain") -> bool:
        """Whether all that the other may propose is in here, on the same scale."""
        if not isinstance(other, Range):
            return False
        alike = ("log", "step", "log_complement", "whole")
        return (
            all(getattr(self, a) == getattr(other, a) for a in alike)
            and self.contains(other.low)
            and self.low <= other.low <= other.high <= self.high
        )

    @property
    def middle(self) -> float:
        """The value in the middle, on the scale of the range."""
        if self.log_complement:
            return 1 - math.sqrt((1 - self.low) * (1 - self.high))
        value = (self.low + self.high) / 2
        if self.log:
            product = float(self.low) * float(self.high)
            value = math.sqrt(product) if product < math.inf else math.sqrt(self.low) * math.sqrt(self.high)
        if self.step:
            value = min(self.low + round((value - self.low) / self.step) * self.step, self.high)
        return round(value) if self.whole else value

    @property
    def size(self) -> int | None:
        """How many values there are; None where they have no even steps between them."""
        step = self.step or (1 if self.whole and not self.log else None)
        return None if step is None else _steps(self.low, self.high, step) + 1

    @property
    def points(self) -> list[Any] | None:
        """All values, where they can be counted one by one (`size`: how many)."""
        if self.size is None:
            return None
        found = [min(self.low + k * (self.step or 1), self.high) for k in range(self.size)]
        return [round(v) for v in found] if self.whole else found

    def __str__(self) -> str:
        how = (
            "log" if self.log else "log in 1 - x" if self.log_complement else f"step {self.step:g}" if self.step else ""
        )
        ends = f"{int(self.low)} to {int(self.high)}" if self.whole else f"{self.low:g} to {self.high:g}"
        return ends + (f" ({how})" if how else "")


def _steps(low: float, high: float, step: float) -> int:
    """Whole steps from low to high, in the decimal numbers that a person wrote: as Optuna counts them."""
    return (Fraction(str(high)) - Fraction(str(low))) // Fraction(str(step))


def _last_step(low: float, high: float, step: float) -> float:
    """The last value that steps from low come to, not above high."""
    last = Fraction(str(low)) + _steps(low, high, step) * Fraction(str(step))
    return int(last) if isinstance(high, int) and last.denominator == 1 else float(last)


@dataclass(frozen=True)
class Choices:
    """One of a list of values (numbers, text, settings)."""

    values: tuple[Any, ...]
    """Settings that have ranges of their own without these, which are parameters `within` this one."""
    written: tuple[Any, ...] = ()
    """The values with these ranges; empty: there are none."""

    def suggest(self, trial: Suggests, name: str) -> Any:
        """One of the values; the sampler sees settings as their text."""
        labels = self.points
        return copy.deepcopy(self.values[labels.index(trial.suggest_categorical(name, labels))])

    def told(self, name: str, value: Any) -> Tree:
        """The value as `suggest` asks for it."""
        return {name: self.points[self.values.index(value)]}

    def contains(self, value: Any) -> bool:
        """Whether it is one of the values."""
        return value in self.values

    def includes(self, other: "Domain") -> bool:
        """Whether all that the other may propose is in here."""
        return isinstance(other, Choices) and all(v in self.values for v in other.values)

    @property
    def middle(self) -> Any:
        """The value in the middle of the list."""
        return self.values[(len(self.values) - 1) // 2]

    @property
    def size(self) -> int:
        """How many values there are."""
        return len(self.values)

    @property
    def points(self) -> list[Any]:
        """All values, as the sampler sees them."""
        plain = str | int | float | bool | None
        return [v if isinstance(v, plain) else json.dumps(v, sort_keys=True) for v in self.values]

    @property
    def probes(self) -> list[Any]:
        """Values that are valid only if all are."""
        return list(self.values)

    def __str__(self) -> str:
        return " | ".join(map(in_yaml, self.values))


Domain = Range | Choices
RANGE_KEYS = {"low", "high", "log", "step", "log_complement"}
ENDS = {
    **dict.fromkeys(("min", "minimum", "from", "lower", "lo", "start"), "low"),
    **dict.fromkeys(("max", "maximum", "to", "upper", "hi", "end", "stop"), "high"),
}
"""What the ends of a range are called elsewhere."""


def domain_of(value: Any, path: Path_, notes: list[str], *, whole: bool | None) -> Domain | None:
    """The range or the choices that a value in a space file stands for; None if it is a plain value.

    Args:
        notes: gets what is odd about it.
        whole: whether the setting is an integer; None: if low, high and step are.
    """
    if not is_range(value, path):
        return None
    where = dotted(path)
    if "choices" in value:
        if set(value) != {"choices"}:
            raise ConfigError(f"{where}: choices stand alone, got also {', '.join(sorted(set(value) - {'choices'}))}")
        values = value["choices"]
        if not isinstance(values, list) or not values:
            raise ConfigError(f"{where}.choices: needs a list of at least one value, got {values!r}")
        if len({_frozen(v) for v in values}) < len(values):
            raise ConfigError(f"{where}.choices: a value is given twice in {values!r}")
        return _choices(values, path)
    unknown = [key for key in value if key not in RANGE_KEYS]
    if unknown:
        raise ConfigError(
            f"{where}.{key}: no such key of a range; "
            + (f"it is called {ENDS[key]!r}" if key in ENDS else did_you_mean(key, RANGE_KEYS))
            for key in unknown
        )
    for key in ("low", "high"):
        if not isinstance(value.get(key), int | float) or isinstance(value.get(key), bool):
            raise ConfigError(f"{where}.{key}: a range needs a number here, got {value.get(key)!r}")
    for key in ("low", "high", "step"):
        if not _is_finite(value.get(key)):
            raise ConfigError(f"{where}.{key}: a finite number, got {str(value[key])[:40]}")
    for key in ("log", "log_complement"):
        if not isinstance(value.get(key, False), bool):
            raise ConfigError(f"{where}.{key}: true or false, got {value[key]!r}")
    low, high, step = value["low"], value["high"], value.get("step")
    log, complement = value.get("log", False), value.get("log_complement", False)
    if low > high:
        raise ConfigError(f"{where}: low must not be above high, got low {low:g} and high {high:g}; swap them")
    if low == high:
        raise ConfigError(f"{where}: low and high are both {low:g}; write the value itself to fix it")
    if log and low <= 0:
        raise ConfigError(f"{where}: a log range starts above 0, got low {low:g}; raise low, or leave out log")
    if complement and not 0 <= low < high < 1:
        raise ConfigError(f"{where}: log_complement needs 0 <= low < high < 1, got low {low:g} and high {high:g}")
    if step is not None and (not isinstance(step, int | float) or isinstance(step, bool) or step <= 0):
        raise ConfigError(f"{where}.step: a number above 0, got {step!r}")
    if (step is not None) + log + complement > 1:
        raise ConfigError(f"{where}: only one of log, step and log_complement")
    if whole is None:
        whole = all(isinstance(v, int) for v in (low, high, step if step is not None else 1))
    if whole and any(v is not None and v != int(v) for v in (low, high, step)):
        raise ConfigError(f"{where}: whole numbers only, got {Range(low, high, log, step, complement)}")
    if step is not None:
        high = _stepped(low, high, step, where, notes)
    return Range(low, high, log, step, complement, whole)


def _stepped(low: float, high: float, step: float, where: str, notes: list[str]) -> float:
    """The end that steps from low come to; where it is below `high`, a note says so."""
    if step > high - low:
        raise ConfigError(
            f"{where}.step: {step:g} is larger than the range, {low:g} to {high:g}, and only {low:g} would be "
            "proposed; lower step, or write the value itself to fix it"
        )
    largest = max(abs(low), abs(high))
    if isinstance(low + high + step, float) and step < 2 * math.ulp(largest):
        raise ConfigError(f"{where}.step: {step:g} is lost in a float beside {largest:g}; raise it, or leave it out")
    last = _last_step(low, high, step)
    if last < high:
        notes.append(f"{where}: steps of {step:g} from {low:g} end at {last:g}, which is taken for the range's high")
    return last


def is_range(value: Any, path: Path_) -> bool:
    """Whether a value in a space file is meant as a range or as choices.

    What holds names that are a person's own (`args`, `resources`) is not: there `low` is one of them.
    """
    meant = isinstance(value, dict) and bool({"low", "high", "choices"} & set(value))
    return meant and not any(get_origin(t) is dict for types in _types(path) for t in types)


def _choices(items: list[Any], path: Path_) -> Choices:
    """Choices of which some may be settings with ranges of their own."""
    where = dotted(path)
    bare = [_without_ranges(item, (*path, label)) for item, label in zip(items, labels_of(items), strict=True)]
    for k, (value, item) in enumerate(zip(bare, items, strict=True)):
        if value is None and item is not None:
            raise ConfigError(
                f"{where}.choices: its item {k + 1} is a range; items are values, or settings with ranges in them: "
                "write its values out as items, or one range that holds them all"
            )
        if value != item and set(value) == {"name"} and value["name"] not in items:
            bare[k] = value["name"]
    if len({_frozen(value) for value in bare}) < len(bare):
        for k, value in enumerate(bare):
            if value not in bare[:k]:
                continue
            raise ConfigError(
                f"{where}.choices: its items {bare.index(value) + 1} and {k + 1} differ in ranges only; widen one's, "
                "or write a value where the other has none"
            )
    return Choices(tuple(bare), tuple(items) if bare != items else ())


def _frozen(value: Any) -> Any:
    """A value of a space file that can be a member of a set, equal where the value is."""
    if isinstance(value, dict):
        return frozenset((key, _frozen(below)) for key, below in value.items())
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


def _without_ranges(value: Any, path: Path_) -> Any:
    """Settings without those that are ranges; None for a range."""
    if not isinstance(value, dict):
        return value
    if is_range(value, path):
        return None
    kept = [(k, v, (*path, str(k))) for k, v in value.items()]
    return {k: _without_ranges(v, there) for k, v, there in kept if not is_range(v, there)}


def range_meant(value: Any, path: Path_) -> str:
    """How to write what stands, as a list or settings, where a number belongs."""
    where, got = dotted(path), _flow(value)
    if isinstance(value, list):
        numbers = len(value) == 2 and all(isinstance(v, int | float) and not isinstance(v, bool) for v in value)
        between = f"for all between {{low: {min(value)}, high: {max(value)}}}, " if numbers else ""
        return f"{where}: a list is no range, got {got}; write {between}for one of them {{choices: {got}}}"
    renamed = {ENDS.get(key, key): v for key, v in value.items()}
    right = _flow(renamed) if {"low", "high"} <= set(renamed) else "{low: ..., high: ...}, or {choices: [...]}"
    return f"{where}: needs a number or a range, got {got}; a range is written {right}"


def _flow(value: Any) -> str:
    """A value as YAML on one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {_flow(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_flow, value)) + "]"
    return str(value).lower() if isinstance(value, bool) else "null" if value is None else str(value)


def _is_finite(value: Any) -> bool:
    """Whether a number, if it is one, is finite and of a size that a float can hold."""
    return not isinstance(value, int | float) or (abs(value) < 1e300 and not math.isnan(value))


def name_of(objective: Any) -> str | None:
    """The name of an objective in a file, if it has one."""
    settings = named(objective)
    name = settings.get("name") if isinstance(settings, dict) else None
    return name if isinstance(name, str) else None


def labels_of(items: Sequence[Any]) -> list[str]:
    """What each item of choices is called: by its name, or, where that does not tell it from the others, its number."""
    names = [name_of(v) for v in items]
    return [n if n and names.count(n) == 1 else str(k) for k, n in enumerate(names, start=1)]


def is_whole(name: Path_) -> bool | None:
    """Whether a setting is an integer; None if it is not ours (an argument of a person's own function)."""
    found = _types(name)
    return any(int in types and float not in types for types in found) if found else None


def is_number(name: Path_) -> bool:
    """Whether a setting is a number, or nothing."""
    found = _types(name)
    return bool(found) and all(types <= {int, float, type(None)} for types in found)


def _types(name: Path_) -> list[set[Any]]:
    """What may stand there, for each network, objective, ... that has such a setting; empty if none of ours has."""
    *above, last = name
    models = [TrainConfig]
    for part in (a for a in above if not a.isdecimal()):  # the number of an item
        below = [m for model in models if part in model.model_fields for m in members(model.model_fields[part])]
        if not below and ":" not in part:  # package.module:function, an item's name for short
            below = [m for m in models if tag(m) == part]
        models = below or (models if ":" in part else [])  # type: ignore[assignment]
    return [set(leaves(m.model_fields[last].annotation)) for m in models if last in m.model_fields]


def as_tree(domain: Domain) -> Tree:
    if isinstance(domain, Choices):
        return {"choices": list(domain.written or domain.values)}
    tree: Tree = {"low": domain.probes[0], "high": domain.probes[1]}
    tree |= {"log": True} if domain.log else {}
    tree |= {"step": domain.step} if domain.step else {}
    return tree | ({"log_complement": True} if domain.log_complement else {})
