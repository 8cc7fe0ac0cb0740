"""Ranges and choices: the searched values of one setting, and their form in a file.

In YAML a bare value is fixed. `{low, high}`, with `log: true`, `step: s` or `log_complement: true`
(log-uniform in 1 - x), or `{choices: [...]}`, is searched.
"""

import copy
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, Protocol, TypeVar, get_origin

from tfkd_ray.learn.config import TrainConfig
from tfkd_ray.settings.errors import ConfigError, Sentences, did_you_mean, dotted
from tfkd_ray.settings.schema import Settings, leaves, members, name_alone, tag
from tfkd_ray.settings.yaml import Tree, in_yaml

Path_ = tuple[str, ...]
Item = TypeVar("Item")
Rule = Callable[[Item], Sentences]
"""A function that yields a sentence for each problem of its argument, and nothing if it is
valid."""


class Suggests(Protocol):
    """The part of `optuna.Trial` that a space needs."""

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None, log: bool
    ) -> float: ...
    def suggest_int(self, name: str, low: int, high: int, *, step: int, log: bool) -> int: ...
    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any: ...


MANY = 2**40
"""Steps beyond which the sampler proposes a continuous value, rounded to a step afterwards: a float
loses tpe's probability of one."""


@dataclass(frozen=True)
class Range:
    """All numbers from low to high, both ends included, on a scale.

    Only this class knows the scales: linear, log and log complement, with or without steps. Other
    code asks it for the place of a value (`place`), the value at a place (`at`), and the axis
    (`shown`, `label`, `span`).
    """

    low: float
    high: float
    log: bool = False
    step: float | None = None
    log_complement: bool = False
    """True for log-uniform in 1 - x: as many trials in 0.9 to 0.99 as in 0.99 to 0.999."""
    whole: bool = False
    """True for whole numbers only."""

    @property
    def logarithmic(self) -> bool:
        """Return whether the scale is logarithmic, in x or in 1 - x."""
        return self.log or self.log_complement

    def shown(self, value: float) -> float:
        """Return the number that samplers and axes show, 1 - x under log_complement.

        It is its own inverse.
        """
        return 1 - value if self.log_complement else value

    def label(self, name: str) -> str:
        """Return the axis label of a setting."""
        return f"1 - {name}" if self.log_complement else name

    @property
    def _ends(self) -> tuple[float, float]:
        return self.shown(self.low), self.shown(self.high)

    @property
    def span(self) -> tuple[float, float]:
        """Return the smallest and the largest number shown."""
        low, high = self._ends
        return (high, low) if self.log_complement else (low, high)

    def place(self, value: float) -> float:
        """Return the place of a value on the range's own scale: 0 at low, 1 at high."""
        return self._way(self.low, value)

    def at(self, place: float) -> float:
        """Return the value at a place, the inverse of `place`; it need not lie on a step."""
        low, high = self._ends
        if not self.logarithmic:
            return low * (1 - place) + high * place
        return self.shown(float(low ** (1 - place) * high**place))

    def distance(self, a: float, b: float) -> float:
        """Return the distance of two values, as a share of the range on its own scale."""
        return abs(self._way(a, b))

    def _way(self, start: float, end: float) -> float:
        whole = self._scaled(self.high) - self._scaled(self.low)
        return (self._scaled(end) - self._scaled(start)) / whole

    def _scaled(self, value: float) -> float:
        return math.log(self.shown(value)) if self.logarithmic else float(value)

    def _on_step(self, value: float) -> float:
        """Return the step nearest to a value."""
        assert self.step, f"{self=}"
        steps = round((value - self.low) / self.step)
        return min(self.low + steps * self.step, self.high)

    def suggest(self, trial: Suggests, name: str) -> float:
        """Return a value in the range, proposed by the sampler under `name`."""
        if self.log and self.step:  # of Ray Tune's qloguniform; a range in a file has one scale
            value = trial.suggest_float(name, self.low, self.high, step=None, log=True)
            return round(self._on_step(value)) if self.whole else self._on_step(value)
        if self.whole:
            return self._suggest_whole(trial, name)
        if self.step and self.high - self.low > MANY * self.step:
            return self._on_step(
                trial.suggest_float(name, self.low, self.high, step=None, log=False)
            )
        low, high = self.span
        label, log = self.label(name), self.logarithmic
        return self.shown(trial.suggest_float(label, low, high, step=self.step, log=log))

    def _suggest_whole(self, trial: Suggests, name: str) -> int:
        found: float
        first, last = int(self.low), int(self.high)
        by = int(self.step or 1)
        if last - first > MANY * by:
            found = trial.suggest_float(name, first, last, step=None, log=self.log)
        else:
            found = trial.suggest_int(name, first, last, step=by, log=self.log)
        # a study keeps a float: beyond 2**53 the nearest one, which always rounds to the same step
        steps = (int(float(found)) - first) // by
        return min(first + steps * by, last)

    @property
    def probes(self) -> list[Any]:
        """Return values that are all valid only if the whole range is."""
        if self.whole:
            return [int(self.low), int(self.high)]
        return [self.low, self.high]

    def told(self, name: str, value: Any) -> Tree:
        """Return the value in the form in which `suggest` asks for it."""
        if not self.log_complement:
            return {name: value}
        low, high = self.span
        shown = max(self.shown(value), low)
        return {self.label(name): min(shown, high)}

    def contains(self, value: Any) -> bool:
        """Return whether a value may be proposed."""
        if not _is_plain_number(value) or not self.low <= value <= self.high:
            return False
        if self.whole:
            above = int(value) - int(self.low)
            return bool(value == int(value)) and above % int(self.step or 1) == 0
        if self.step is None:
            return True
        steps = (value - self.low) / self.step
        rounding = 4 * math.ulp(max(abs(value), abs(self.low))) / self.step
        return bool(abs(steps - round(steps)) <= max(1e-9, rounding))

    def includes(self, other: "Domain") -> bool:
        """Return whether this contains every proposal of the other, on the same scale."""
        if not isinstance(other, Range):
            return False
        alike = replace(other, low=self.low, high=self.high) == self
        return alike and self.contains(other.low) and other.low <= other.high <= self.high

    @property
    def middle(self) -> float:
        """Return the value in the middle, on the scale of the range."""
        low, high = self._ends
        value = (low + high) / 2
        if self.logarithmic:
            product = float(low) * float(high)
            value = math.sqrt(product)
            if product == math.inf:
                value = math.sqrt(low) * math.sqrt(high)
        value = self.shown(value)
        if self.step:
            value = self._on_step(value)
        return round(value) if self.whole else value

    @property
    def size(self) -> int | None:
        """Return the number of values; None without even steps."""
        step = self.step or (1 if self.whole and not self.log else None)
        return None if step is None else _steps(self.low, self.high, step) + 1

    @property
    def points(self) -> list[Any] | None:
        """Return all values if they can be listed (`size`: how many), else None."""
        if self.size is None:
            return None
        step = self.step or 1
        found = [min(self.low + k * step, self.high) for k in range(self.size)]
        return [round(v) for v in found] if self.whole else found

    @property
    def spelled(self) -> "Range":
        """Return the same range, whose numbers say by themselves whether it is of whole numbers."""
        if self.whole:
            return self
        step = None if self.step is None else float(self.step)
        return replace(self, low=float(self.low), high=float(self.high), step=step)

    @property
    def tree(self) -> Tree:
        """Return the range in the form of a file."""
        low, high = self.probes
        scale = {"log": self.log, "step": self.step, "log_complement": self.log_complement}
        return {"low": low, "high": high, **{key: value for key, value in scale.items() if value}}

    def __str__(self) -> str:
        ends = (
            f"{int(self.low)} to {int(self.high)}"
            if self.whole
            else f"{self.low:g} to {self.high:g}"
        )
        if self.log:
            return f"{ends} (log)"
        if self.log_complement:
            return f"{ends} (log in 1 - x)"
        return f"{ends} (step {self.step:g})" if self.step else ends


def _steps(low: float, high: float, step: float) -> int:
    """Return the number of whole steps from low to high, in decimal arithmetic as in Optuna."""
    first, last = Fraction(str(low)), Fraction(str(high))
    return (last - first) // Fraction(str(step))


def _last_step(low: float, high: float, step: float) -> float:
    """Return the last value that steps from low reach, not above high."""
    last = Fraction(str(low)) + _steps(low, high, step) * Fraction(str(step))
    return int(last) if isinstance(high, int) and last.denominator == 1 else float(last)


@dataclass(frozen=True)
class Choices:
    """One of a list of values (numbers, text, settings)."""

    values: tuple[Any, ...]
    """The values without the ranges of their settings, which are parameters `within` this one."""
    written: tuple[Any, ...] = ()
    """The values with their ranges; empty if there are none."""

    def suggest(self, trial: Suggests, name: str) -> Any:
        """Return one of the values; the sampler sees settings as text."""
        labels = self.points
        label = trial.suggest_categorical(name, labels)
        return copy.deepcopy(self.values[labels.index(label)])

    def told(self, name: str, value: Any) -> Tree:
        """Return the value in the form in which `suggest` asks for it."""
        return {name: self.points[self.values.index(value)]}

    def contains(self, value: Any) -> bool:
        """Return whether it is one of the values."""
        return value in self.values

    def includes(self, other: "Domain") -> bool:
        """Return whether this contains every proposal of the other."""
        return isinstance(other, Choices) and all(v in self.values for v in other.values)

    def place(self, value: Any) -> float:
        """Return the place of a value in the list: 0 for the first, 1 for the last."""
        return self.values.index(value) / max(1, len(self.values) - 1)

    def distance(self, a: Any, b: Any) -> float:
        """Return 0 for equal values, else 1."""
        return float(a != b)

    @property
    def middle(self) -> Any:
        """Return the value in the middle of the list."""
        return self.values[(len(self.values) - 1) // 2]

    @property
    def size(self) -> int:
        """Return the number of values."""
        return len(self.values)

    @property
    def points(self) -> list[Any]:
        """Return all values, as the sampler sees them."""
        plain = str | int | float | bool | None
        return [v if isinstance(v, plain) else json.dumps(v, sort_keys=True) for v in self.values]

    @property
    def probes(self) -> list[Any]:
        """Return values that are all valid only if every choice is."""
        return list(self.values)

    @property
    def tree(self) -> Tree:
        """Return the choices in the form of a file."""
        return {"choices": list(self.written or self.values)}

    def __str__(self) -> str:
        return " | ".join(map(in_yaml, self.values))


Domain = Range | Choices
RANGE_KEYS = {"low", "high", "log", "step", "log_complement"}
ENDS = {
    **dict.fromkeys(("min", "minimum", "from", "lower", "lo", "start"), "low"),
    **dict.fromkeys(("max", "maximum", "to", "upper", "hi", "end", "stop"), "high"),
}
"""Other tools' names for the ends of a range."""


def domain_of(value: Any, path: Path_, notes: list[str], *, whole: bool | None) -> Domain | None:
    """Return the range or choices of a value in a space file; None for a plain value.

    Args:
        notes: gets a sentence on each oddity.
        whole: True for an integer setting; None: decided by low, high and step.
    """
    if not is_range(value, path):
        return None
    where = dotted(path)
    if "choices" in value:
        refuse(where, CHOICES_RULES, value)
        return _choices(value["choices"], path)
    refuse(where, KEY_RULES, value)
    found = Range(**value)
    if whole is None:
        whole = all(isinstance(v, int | None) for v in (found.low, found.high, found.step))
    found = replace(found, whole=whole)
    refuse(where, RANGE_RULES, found)
    return found if found.step is None else _ended_by_its_steps(found, found.step, where, notes)


def first_found(rules: Sequence[Rule[Item]], given: Item) -> list[str]:
    """Return the problems of the first rule that finds any."""
    for rule in rules:
        problems = list(rule(given))
        if problems:
            return problems
    return []


def refuse(where: str, rules: Sequence[Rule[Item]], given: Item) -> None:
    """Raise a ConfigError with the problems of the first rule that finds any."""
    problems = first_found(rules, given)
    if problems:
        raise ConfigError(where + problem for problem in problems)


def _ended_by_its_steps(given: Range, step: float, where: str, notes: list[str]) -> Range:
    """Return the range with its last step as high; add a note if that lowers it."""
    last = _last_step(given.low, given.high, step)
    if last < given.high:
        notes.append(
            f"{where}: steps of {step:g} from {given.low:g} end at {last:g}, which is taken for the range's high"
        )
    return replace(given, high=last)


# --- rules of a file: each yields a sentence that continues the setting's path


def _stands_alone(given: Tree) -> Sentences:
    """Reject other keys besides choices."""
    others = set(given) - {"choices"}
    if others:
        yield f": choices stand alone, got also {', '.join(sorted(others))}"


def _is_a_list(given: Tree) -> Sentences:
    """Reject choices that are not a list of at least one value."""
    values = given["choices"]
    if not isinstance(values, list) or not values:
        yield f".choices: needs a list of at least one value, got {values!r}"


def _is_given_once(given: Tree) -> Sentences:
    """Reject duplicate choices."""
    values = given["choices"]
    if len(set(map(_frozen, values))) < len(values):
        yield f".choices: a value is given twice in {values!r}"


def _equal_themselves(given: Tree) -> Sentences:
    """Reject NaN among choices: no trial could be told that it has this value."""
    if "nan" in (repr(number) for number in _numbers_in(given["choices"])):
        yield f".choices: nan equals no value, not even itself, got {given['choices']!r}; leave it out"


def _numbers_in(value: Any) -> Iterator[float]:
    """Yield the floating-point numbers in a value of a space file."""
    if isinstance(value, float):
        yield value
    elif isinstance(value, dict | list):
        for below in value.values() if isinstance(value, dict) else value:
            yield from _numbers_in(below)


def _differ_as_texts(given: Tree) -> Sentences:
    """Reject a text that is how the sampler sees another choice's settings."""
    texts = Choices(tuple(given["choices"])).points
    if len(set(texts)) < len(texts):
        yield f".choices: a text and the settings that it stands for, in {given['choices']!r}; leave one out"


def _has_keys_of_a_range(given: Tree) -> Sentences:
    """Reject keys that a range does not have."""
    for key in given:
        if key in ENDS:
            yield f".{key}: no such key of a range; it is called {ENDS[key]!r}"
        elif key not in RANGE_KEYS:
            yield f".{key}: no such key of a range; {did_you_mean(key, RANGE_KEYS)}"


def _ends_are_numbers(given: Tree) -> Sentences:
    """Reject ends that are not numbers."""
    for key in ("low", "high"):
        if not _is_plain_number(given.get(key)):
            yield f".{key}: a range needs a number here, got {given.get(key)!r}"


def _numbers_are_finite(given: Tree) -> Sentences:
    """Reject the first number that a float cannot hold."""
    for key in ("low", "high", "step"):
        if not _is_finite(given.get(key)):
            yield f".{key}: a finite number, got {str(given[key])[:40]}"
            return


def _flags_are_flags(given: Tree) -> Sentences:
    """Reject a log or log_complement that is neither true nor false."""
    for key in ("log", "log_complement"):
        if not isinstance(given.get(key, False), bool):
            yield f".{key}: true or false, got {given[key]!r}"
            return


def _low_is_below_high(given: Range) -> Sentences:
    """Reject a low end that is not below the high one."""
    low, high = given.low, given.high
    if low > high:
        yield f": low must not be above high, got low {low:g} and high {high:g}; swap them"
    if low == high:
        yield f": low and high are both {low:g}; write the value itself to fix it"


def _log_has_logarithms(given: Range) -> Sentences:
    """Reject a log range that reaches 0 or below."""
    if given.log and given.low <= 0:
        yield f": a log range starts above 0, got low {given.low:g}; raise low, or leave out log"


def _log_complement_has_logarithms(given: Range) -> Sentences:
    """Reject a log_complement range outside [0, 1)."""
    low, high = given.low, given.high
    if given.log_complement and not 0 <= low < high < 1:
        yield f": log_complement needs 0 <= low < high < 1, got low {low:g} and high {high:g}"


def _step_is_above_0(given: Range) -> Sentences:
    """Reject a step that is not a number above 0."""
    step = given.step
    if step is not None and (not _is_plain_number(step) or step <= 0):
        yield f".step: a number above 0, got {step!r}"


def _scale_is_one(given: Range) -> Sentences:
    """Reject a range with two scales."""
    if (given.step is not None) + given.log + given.log_complement > 1:
        yield ": only one of log, step and log_complement"


def _numbers_are_whole(given: Range) -> Sentences:
    """Reject fractions in the range of a whole-number setting."""
    numbers = [v for v in (given.low, given.high, given.step) if v is not None]
    if given.whole and any(v != int(v) for v in numbers):
        yield f": whole numbers only, got {replace(given, whole=False)}"


def _step_is_within(given: Range) -> Sentences:
    """Reject a step larger than its range."""
    low, high, step = given.low, given.high, given.step
    if step is not None and step > high - low:
        yield (
            f".step: {step:g} is larger than the range, {low:g} to {high:g}, and only {low:g} would be proposed; lower "
            "step, or write the value itself to fix it"
        )


def _step_moves_a_float(given: Range) -> Sentences:
    """Reject a step too small to change the float that it is added to."""
    low, high, step = given.low, given.high, given.step
    if step is None or isinstance(low + high + step, int):
        return
    largest = max(abs(low), abs(high))
    if step < 2 * math.ulp(largest):
        yield f".step: {step:g} is lost in a float beside {largest:g}; raise it, or leave it out"


CHOICES_RULES = (
    _stands_alone,
    _is_a_list,
    _equal_themselves,
    _is_given_once,
    _differ_as_texts,
)
KEY_RULES = (
    _has_keys_of_a_range,
    _ends_are_numbers,
    _numbers_are_finite,
    _flags_are_flags,
)
RANGE_RULES = (
    _low_is_below_high,
    _log_has_logarithms,
    _log_complement_has_logarithms,
    _step_is_above_0,
    _scale_is_one,
    _numbers_are_whole,
    _step_is_within,
    _step_moves_a_float,
)
"""Rules in the order in which they are checked; only the first broken one is reported."""


# --- values of a file -----------------------------------------------------------------------------


def is_range(value: Any, path: Path_) -> bool:
    """Return whether a value in a space file is meant as a range or as choices.

    Settings that hold names of the user's own (`args`, `resources`) are not: there, `low` is such a
    name.
    """
    if not isinstance(value, dict) or not {"low", "high", "choices"} & set(value):
        return False
    may_stand = set().union(*_types(path))
    return not any(get_origin(t) is dict for t in may_stand)


def _choices(items: list[Any], path: Path_) -> Choices:
    """Return choices, some of which may be settings with their own ranges."""
    where = f"{dotted(path)}.choices"
    bare = []
    for number, (item, label) in enumerate(zip(items, labels_of(items), strict=True), start=1):
        value = _without_ranges(item, (*path, label))
        if value is None and item is not None:
            raise ConfigError(
                f"{where}: its item {number} is a range; items are values, or settings with ranges in them: write its "
                "values out as items, or one range that holds them all"
            )
        only_named = value != item and set(value) == {"name"} and value["name"] not in items
        bare.append(value["name"] if only_named else value)
    if len(set(map(_frozen, bare))) < len(bare):
        _refuse_twins(where, bare)
    return Choices(tuple(bare), tuple(items) if bare != items else ())


def _refuse_twins(where: str, bare: list[Any]) -> None:
    """Raise for the first item that equals another without their ranges."""
    for k, value in enumerate(bare):
        if value in bare[:k]:
            raise ConfigError(
                f"{where}: its items {bare.index(value) + 1} and {k + 1} differ in ranges only; widen one's, or write "
                "a value where the other has none"
            )


def _frozen(value: Any) -> Any:
    """Return a hashable form of a value of a space file; equal values give equal forms."""
    if isinstance(value, dict):
        return frozenset((key, _frozen(below)) for key, below in value.items())
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


def _without_ranges(value: Any, path: Path_) -> Any:
    """Return settings without those that are ranges; None for a range."""
    if not isinstance(value, dict):
        return value
    if is_range(value, path):
        return None
    kept = {}
    for key, below in value.items():
        there = (*path, str(key))
        if not is_range(below, there):
            kept[key] = _without_ranges(below, there)
    return kept


def range_meant(value: Any, path: Path_) -> str:
    """Return advice on writing the list or settings found in place of a number."""
    where, got = dotted(path), _flow(value)
    if isinstance(value, list):
        between = ""
        if len(value) == 2 and all(map(_is_plain_number, value)):
            between = f"for all between {{low: {min(value)}, high: {max(value)}}}, "
        return f"{where}: a list is no range, got {got}; write {between}for one of them {{choices: {got}}}"
    renamed = {ENDS.get(key, key): v for key, v in value.items()}
    right = "{low: ..., high: ...}, or {choices: [...]}"
    if {"low", "high"} <= set(renamed):
        right = _flow(renamed)
    return f"{where}: needs a number or a range, got {got}; a range is written {right}"


def _flow(value: Any) -> str:
    """Return a value as one line of YAML."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {_flow(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_flow, value)) + "]"
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _is_plain_number(value: Any) -> bool:
    """Return whether a value is a number other than true and false."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
    """Return whether a value is not a number, or one that is finite and fits into a float."""
    if not isinstance(value, int | float):
        return True
    return abs(value) < 1e300  # false for nan


def name_of(objective: Any) -> str | None:
    """Return the name of an objective in a file, or None."""
    settings = name_alone(objective)
    name = settings.get("name") if isinstance(settings, dict) else None
    return name if isinstance(name, str) else None


def labels_of(items: Sequence[Any]) -> list[str]:
    """Return the label of each item of choices: its name, or its number if that is ambiguous."""
    names = [name_of(v) for v in items]
    labels = []
    for number, name in enumerate(names, start=1):
        labels.append(name if name and names.count(name) == 1 else str(number))
    return labels


def holds_whole_numbers(path: Path_) -> bool | None:
    """Return whether a setting is an integer; None for an argument of the user's own function."""
    found = _types(path)
    if not found:
        return None
    return any(int in types and float not in types for types in found)


def holds_a_number(path: Path_) -> bool:
    """Return whether a setting is a number, or None."""
    found = _types(path)
    return bool(found) and all(types <= {int, float, type(None)} for types in found)


def _types(path: Path_) -> list[set[Any]]:
    """Return the possible types of a setting in each network, objective, ...; empty if unknown."""
    *above, last = path
    models: list[type[Settings]] = [TrainConfig]
    for part in above:
        if not part.isdecimal():  # skips the number of an item
            models = _below(models, part)
    fields = [m.model_fields[last] for m in models if last in m.model_fields]
    return [set(leaves(field.annotation)) for field in fields]


def _below(models: list[type[Settings]], part: str) -> list[type[Settings]]:
    """Return the settings classes that a path's part leads to: a field's, or the named item's."""
    found: list[type[Settings]] = []
    for model in models:
        if part in model.model_fields:
            found += members(model.model_fields[part])
    if found:
        return found
    if ":" in part:  # package.module:function, a shorthand for an item
        return models
    return [m for m in models if tag(m) == part]
