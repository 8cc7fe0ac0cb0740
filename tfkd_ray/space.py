"""A search space: the tree of `TrainConfig` with ranges in it, and how it is searched.

In YAML a bare value is fixed. `{low, high}`, with `log: true`, `step: s` or `log_complement: true` (log-uniform in
1 - x), or `{choices: [...]}`, is searched. `objective` may be a list: a conditional choice, each member with its own
parameters. Settings that are an item of choices may have ranges, too, which are asked for where the item is chosen.
What stands in the file is checked through `TrainConfig` itself, at both ends of every range.
"""

import copy
import dataclasses
import importlib.util
import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Protocol, Self, get_origin

from pydantic import AfterValidator, BeforeValidator, Field, field_serializer, model_validator

from tfkd_ray.config import RUN_ONLY, Count, OptimConfig, Positive, TeacherRun, TrainConfig
from tfkd_ray.data import Dataset
from tfkd_ray.objectives import PUBLISHED, Canonical
from tfkd_ray.passwords import FIRST_AT, after_password, masked
from tfkd_ray.schema import (
    ConfigError,
    Settings,
    did_you_mean,
    dotted,
    find_file,
    in_yaml,
    leaves,
    members,
    named,
    parse_yaml,
    read_yaml,
    settings_at,
    tag,
    validated,
)
from tfkd_ray.scores import Selectable, SelectableBeside, score_of

Tree = dict[str, Any]
Path_ = tuple[str, ...]

# --- how a space is searched -----------------------------------------------------------------------------------


class _Sampler(Settings):
    """A sampler of Optuna's; what it cannot do stands here, and `_search_problems` makes sentences of it."""

    choices: ClassVar[bool] = True
    """It can propose one of a list."""
    together: ClassVar[bool] = False
    """It can choose among objectives (`split: false`), or items of choices, that have parameters of their own."""
    several: ClassVar[bool] = True
    """It can make several metrics good at once."""
    priors: ClassVar[bool] = True
    """Results of earlier experiments help it."""
    full_length_only: ClassVar[bool] = False
    """A trial that is stopped early breaks it."""
    needs: ClassVar[str | None] = None
    """A package that is not among our requirements."""

    def __str__(self) -> str:
        return str(tag(type(self)))


class Tpe(_Sampler):
    """Tree-structured Parzen estimators: models where good trials are. Stopped trials count, too."""

    together: ClassVar[bool] = True
    name: Literal["tpe"] = "tpe"
    startup: Count | None = None
    """Proposals before it begins, quasi-random ones where an objective has a sampler of its own and nothing is known of
    it. None: 10, or half of an objective's trials if that is less (at least 3)."""
    candidates: Count = 24
    """Candidates that it chooses a proposal from."""
    multivariate: bool = True
    """One model over all parameters. false: one for each, as if they did not act together."""


class Gp(_Sampler):
    """A Gaussian process with log expected improvement. It learns from full-length trials only."""

    name: Literal["gp"] = "gp"
    startup: Count | None = None
    """Proposals before it begins, as of tpe."""


class CmaEs(_Sampler):
    """CMA-ES: moves a normal distribution, generation by generation. Ranges only, one metric, no early stopping."""

    choices: ClassVar[bool] = False
    several: ClassVar[bool] = False
    priors: ClassVar[bool] = False
    full_length_only: ClassVar[bool] = True
    needs: ClassVar[str | None] = "cmaes"
    name: Literal["cmaes"] = "cmaes"
    startup: Count = 1
    """Random proposals before it begins."""
    population: Annotated[int, Field(ge=2)] | None = None
    """Trials of a generation. None: 4 + 3 log(parameters)."""


class Qmc(_Sampler):
    """Quasi-random points, which cover the space more evenly than random ones."""

    priors: ClassVar[bool] = False
    name: Literal["qmc"] = "qmc"
    kind: Literal["sobol", "halton"] = "sobol"


class Random(_Sampler):
    """Independent random proposals."""

    together: ClassVar[bool] = True
    priors: ClassVar[bool] = False
    name: Literal["random"] = "random"


class Grid(_Sampler):
    """Every combination of choices and steps once, in random order; so many trials, no more and no fewer."""

    priors: ClassVar[bool] = False
    name: Literal["grid"] = "grid"


Sampler = Tpe | Gp | CmaEs | Qmc | Random | Grid


class Halving(Settings):
    """Successive halving: at each rung only the best 1 / `factor` of its objective's trials go on."""

    name: Literal["halving"] = "halving"
    factor: Annotated[int, Field(ge=2)] = 3
    min_epochs: Count | None = None
    """Epochs before the first rung. None: epochs / factor^2, so that the rungs are at 1/9 and 1/3 of the epochs."""

    def rungs(self, epochs: int) -> list[int]:
        """Epochs after which a trial is judged, ascending; none in the last ninth, where there is little to save."""
        rung = self.min_epochs or max(1, epochs // self.factor**2)
        return list(
            itertools.takewhile(lambda r: 9 * r <= 8 * epochs, (rung * self.factor**k for k in itertools.count()))
        )


class Hyperband(Halving):
    """Several halvings side by side, which begin to judge at different rungs; one of them never stops a trial.

    (Li et al. 2018, arXiv:1603.06560.) Trials are judged among those of their own halving. They are dealt out as
    Optuna's pruner does it: a bracket that stops more gets more.
    """

    name: Literal["hyperband"] = "hyperband"  # type: ignore[assignment]

    def brackets(self, epochs: int) -> list[list[int]]:
        """The rungs of each halving."""
        rungs = self.rungs(epochs)
        return [rungs[k:] for k in range(len(rungs) + 1)]

    def bracket(self, epochs: int, k: int) -> int:
        """Which halving the k-th trial of an objective belongs to."""
        weights = self._weights(epochs)
        *_, last = self._deal(weights, k % sum(weights) + 1)
        return last

    def dealt(self, epochs: int, trials: int) -> dict[int, int]:
        """How many of the first trials of an objective belong to each halving."""
        weights = self._weights(epochs)
        rounds, rest = divmod(trials, sum(weights))
        found = {b: rounds * weight for b, weight in enumerate(weights)}
        for b in self._deal(weights, rest):
            found[b] += 1
        return found

    def _weights(self, epochs: int) -> list[int]:
        """Trials that each halving gets in one round."""
        n = len(self.brackets(epochs))
        return [math.ceil(n * self.factor ** (n - 1 - b) / (n - b)) for b in range(n)]

    def _deal(self, weights: list[int], trials: int) -> Iterator[int]:
        """Which halving gets each trial of a round."""
        dealt, total = [0] * len(weights), sum(weights)
        for j in range(trials):
            last = max(range(len(weights)), key=lambda b: weights[b] * (j + 1) / total - dealt[b])
            dealt[last] += 1
            yield last


class Asha(Halving):
    """Ray's own ASHAScheduler. Its rungs live in the driver: after a kill -9 they begin anew, so it is not exact."""

    name: Literal["asha"] = "asha"  # type: ignore[assignment]


class Median(Settings):
    """Stops a trial whose best value so far is worse than the median of full-length trials at the same epoch."""

    name: Literal["median"] = "median"
    startup: Count = 5
    """Full-length trials of an objective before the first is stopped."""
    min_epochs: Count | None = None
    """Epochs before the first judgment, and between two. None: a ninth of the epochs."""

    def rungs(self, epochs: int) -> list[int]:
        """Epochs after which a trial is judged, ascending; the last epoch is not among them."""
        every = self.min_epochs or max(1, epochs // 9)
        return list(range(every, epochs, every))


class NoStopping(Settings):
    """Every trial runs its full length."""

    name: Literal["none"] = "none"

    def rungs(self, epochs: int) -> list[int]:
        """None."""
        return []


Stopping = Halving | Hyperband | Asha | Median | NoStopping

ENVIRONMENT = "TFKD_STORAGE"
"""Variable that holds a storage's whole URL where the password in the experiment's is ***."""


def _storage_url(url: str | None) -> str | None:
    if url is None:
        return None
    if not re.match(r"[a-z][a-z0-9+_]*://", url):
        raise ValueError("a URL: sqlite:///FILE, or postgresql://USER@HOST/DATABASE; null keeps a journal file")
    if "@" in after_password(url):
        raise ValueError(FIRST_AT)
    kind, _, rest = url.partition(":///")
    if url.startswith("sqlite") and rest in ("", ":memory:"):
        raise ValueError("a database in memory ends with the process; name a file: sqlite:///FILE")
    if kind.startswith("sqlite") and rest and not rest.startswith("/"):  # whoever resumes may stand elsewhere
        return f"{kind}:///{Path(rest).absolute()}"
    return url


class SearchConfig(Settings):
    """How many trials, proposed and stopped by what, for how long, and where that is kept."""

    num_samples: Count = 24
    """Trials, over all objectives. With the grid sampler: left out, the size of the grid."""
    split: bool = True
    """Give every objective equally many trials and a sampler of its own. false: the sampler chooses the objective."""
    baselines: bool = True
    """Add `ce` and `lsr` where a list of objectives lacks them, so that the baselines are tuned as hard as the rest."""
    sampler: Annotated[Sampler, Field(discriminator="name"), BeforeValidator(named)] = Tpe()
    warm_start: bool = True
    """Try published settings first, as far as they lie in the space; at most a quarter of an objective's trials."""
    stopping: Annotated[Stopping, Field(discriminator="name"), BeforeValidator(named)] = Halving()
    metric: Selectable = "val_accuracy"
    """A trial's value: this metric after its last epoch, on validation. NLL and ECE are minimised, the others are
    maximised. A list, [val_accuracy, val_ece], makes all of them good at once; then `best` is a front, and the first
    one leads."""
    more_metrics: tuple[SelectableBeside, ...] = ()
    """The rest of a list given as `metric`; also `parameters`, the number of the student's weights, minimised."""
    max_concurrent: Count | None = None
    """Trials at a time. None: as many as the cluster has room for."""
    max_failures: Annotated[int, Field(ge=0)] = 2
    """Times that a trial whose process was lost goes on from its last checkpoint; lost once more in the same epoch, it
    has failed."""
    trial_timeout_s: Positive | None = None
    """Seconds that a trial may take for one epoch, its start included; then it hangs: its process is ended, and it has
    failed."""
    time_budget_s: Positive | None = None
    """Seconds of trials, all sessions together, after which the sweep ends; unfinished trials are kept for resume."""
    gpu_hours: Positive | None = None
    """The same, in hours of one GPU that trials hold."""
    cpu_hours: Positive | None = None
    """The same, in hours of one CPU that trials hold."""
    max_failed_trials: Count | None = None
    """Failed trials after which the sweep ends."""
    storage: Annotated[str | None, AfterValidator(_storage_url), Field(repr=False)] = None
    """URL of an Optuna storage for the studies. None: a journal file in the experiment. Its password is never written:
    where one is needed again, the whole URL is taken from the environment variable TFKD_STORAGE."""
    study: Annotated[str, Field(min_length=1)] | None = None
    """What the studies are called in the storage. None: the experiment's name there, `tfkd` in a journal file."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of the proposals: proposal n is a function of this seed, n, and what the study holds."""

    @model_validator(mode="before")
    @classmethod
    def _metrics_as_a_list(cls, tree: Any) -> Any:
        if isinstance(tree, Mapping) and isinstance(tree.get("metric"), list | tuple) and tree["metric"]:
            return {**tree, "metric": tree["metric"][0], "more_metrics": tree["metric"][1:]}
        return tree

    @model_validator(mode="after")
    def _different_metrics(self) -> Self:
        if len(set(self.metrics)) < len(self.metrics):
            raise ValueError(f"metric: a list of different metrics, got {', '.join(self.metrics)}")
        return self

    @field_serializer("storage")
    def _without_password(self, storage: str | None) -> str | None:
        return None if storage is None else masked(storage)

    @property
    def metrics(self) -> tuple[str, ...]:
        """All metrics that are made good at once; mostly one."""
        return (self.metric, *self.more_metrics)

    @property
    def mode(self) -> Literal["max", "min"]:
        """Which way is better."""
        return score_of(self.metric).direction

    @property
    def budgets(self) -> dict[str, float]:
        """The limits that are set, beside the number of trials."""
        names = ("time_budget_s", "gpu_hours", "cpu_hours", "max_failed_trials")
        return {name: value for name in names if (value := getattr(self, name)) is not None}


# --- ranges ----------------------------------------------------------------------------------------------------


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
MAX_CORNERS = 256
TAUGHT = {
    str(tag(m)) for m in members(TrainConfig.model_fields["objective"]) if issubclass(m, Canonical) and m.needs_teacher
} - {"tfkd_self"}
"""Objectives whose teacher has a network of its own."""
RANGE_KEYS = {"low", "high", "log", "step", "log_complement"}
ENDS = {
    **dict.fromkeys(("min", "minimum", "from", "lower", "lo", "start"), "low"),
    **dict.fromkeys(("max", "maximum", "to", "upper", "hi", "end", "stop"), "high"),
}
"""What the ends of a range are called elsewhere."""


def _domain(value: Any, path: Path_, notes: list[str], *, whole: bool | None) -> Domain | None:
    """The range or the choices that a value in a space file stands for; None if it is a plain value.

    Args:
        notes: gets what is odd about it.
        whole: whether the setting is an integer; None: if low, high and step are.
    """
    if not _is_range(value, path):
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


def _is_range(value: Any, path: Path_) -> bool:
    """Whether a value in a space file is meant as a range or as choices.

    What holds names that are a person's own (`args`, `resources`) is not: there `low` is one of them.
    """
    meant = isinstance(value, dict) and bool({"low", "high", "choices"} & set(value))
    return meant and not any(get_origin(t) is dict for types in _types(path) for t in types)


def _choices(items: list[Any], path: Path_) -> Choices:
    """Choices of which some may be settings with ranges of their own."""
    where = dotted(path)
    bare = [_without_ranges(item, (*path, label)) for item, label in zip(items, _labels(items), strict=True)]
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
    if _is_range(value, path):
        return None
    kept = [(k, v, (*path, str(k))) for k, v in value.items()]
    return {k: _without_ranges(v, there) for k, v, there in kept if not _is_range(v, there)}


def _range_meant(value: Any, path: Path_) -> str:
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


# --- the space -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parameter:
    """One searched setting."""

    name: str
    """Dotted path; below `objective` the objective's name comes next: objective.kd.temperature; below choices the name
    of the item, or its number: student.mlp.dropout, augment.2.flip."""
    path: Path_
    """Where it stands in the tree of a configuration with one objective."""
    domain: Domain
    within: tuple[str, Any] | None = None
    """Where it is asked for: (name of a parameter that is a choice, the value it must have). None: always."""

    def is_asked(self, chosen: Mapping[str, Any]) -> bool:
        """Whether it is there beside these values of parameters that are."""
        return self.within is None or (self.within[0] in chosen and chosen[self.within[0]] == self.within[1])

    def put(self, tree: Tree, value: Any) -> None:
        """Fill its hole in a tree; settings with ranges of their own have theirs filled after it."""
        value = copy.deepcopy(value)
        _put(tree, self.path, named(value) if isinstance(self.domain, Choices) and self.domain.written else value)


@dataclass(frozen=True)
class Branch:
    """The space of one objective: a tree with holes, and the parameters that fill them."""

    objective: str
    tree: Tree
    parameters: tuple[Parameter, ...]
    """Choices come before what is within them."""

    def asked(self, values: Mapping[str, Any]) -> Iterator[Parameter]:
        """The parameters that there are with these values; the values may be filled in on the way."""
        there: Tree = {}
        for p in self.parameters:
            if p.is_asked(there):
                yield p
                there[p.name] = values[p.name]

    def config(self, values: Mapping[str, Any]) -> TrainConfig:
        """The configuration for these values, by parameter name."""
        tree = copy.deepcopy(self.tree)
        for p in self.asked(values):
            p.put(tree, values[p.name])
        return validated(TrainConfig, tree)

    def around(self, parameter: Parameter) -> Tree:
        """Values of a configuration that has this parameter, the first of each."""
        values = {p.name: p.domain.probes[0] for p in self.parameters}
        within = parameter.within
        while within is not None:
            values[within[0]] = within[1]
            within = next(p.within for p in self.parameters if p.name == within[0])
        return values

    @property
    def makes_teachers(self) -> list[Parameter]:
        """The parameters that a trial's teacher depends on; none where it needs no teacher."""
        if not _needs_teacher(self.tree):
            return []
        parts = {"teacher", "augment", "init"}
        if self.objective not in TAUGHT or self.tree.get("init") == "trained":
            parts.add("student")
        return [p for p in self.parameters if p.path[0] in parts]

    @property
    def example(self) -> TrainConfig:
        """A configuration of this branch."""
        return self.config({p.name: p.domain.probes[0] for p in self.parameters})


@dataclass(frozen=True)
class Group:
    """Branches that share one sampler. Of several, the sampler chooses."""

    name: str
    branches: tuple[Branch, ...]

    def propose(self, trial: Suggests) -> tuple[dict[str, Any], TrainConfig]:
        """(values by parameter name, the configuration they make), asked of the sampler."""
        names = [b.objective for b in self.branches]
        chosen = trial.suggest_categorical("objective", names) if len(names) > 1 else names[0]
        branch = self.branches[names.index(chosen)]
        values: Tree = {}
        for p in branch.asked(values):
            values[p.name] = p.domain.suggest(trial, p.name)
        return values, branch.config(values)

    def told(self, branch: Branch, values: Mapping[str, Any]) -> Tree:
        """The values of one of its branches as the sampler is asked for them."""
        chosen = {"objective": branch.objective} if len(self.branches) > 1 else {}
        return chosen | {k: v for p in branch.asked(values) for k, v in p.domain.told(p.name, values[p.name]).items()}

    @property
    def conditional(self) -> bool:
        """Whether its trials differ in which parameters they have."""
        return len(self.branches) > 1 or any(p.within for p in self.branches[0].parameters)

    @property
    def grid(self) -> dict[str, list[Any]] | None:
        """All values of every parameter, as the sampler sees them; None where they cannot be counted."""
        if len(self.branches) > 1:
            return None
        points = {p.name: p.domain.points for p in self.branches[0].parameters}
        return None if None in points.values() else {k: v for k, v in points.items() if v is not None}

    @property
    def grid_size(self) -> int | None:
        """Combinations in the grid; counted, not listed."""
        return None if len(self.branches) > 1 or self.conditional else self.size

    @property
    def size(self) -> int | None:
        """How many different trials it can propose; None where they cannot be counted."""
        sizes = [_combinations(branch.parameters) for branch in self.branches]
        return None if None in sizes else sum(size for size in sizes if size is not None)


@dataclass(frozen=True)
class Space:
    """A validated search space."""

    branches: tuple[Branch, ...]
    search: SearchConfig
    tree: Tree
    """The whole file as it is understood: every default in it, ranges where they were. It reads back as this space."""
    notes: tuple[str, ...] = ()
    """What was added to what the file says, or is odd about it."""

    @property
    def groups(self) -> list[Group]:
        """What is sampled apart; trial n belongs to group n mod their number."""
        if self.search.split:
            return [Group(b.objective, (b,)) for b in self.branches]
        return [Group("all", self.branches)]

    @property
    def parameters(self) -> list[Parameter]:
        """All searched settings of all objectives, once each."""
        return list({p.name: p for b in self.branches for p in b.parameters}.values())

    @property
    def epochs(self) -> int:
        """Full length of a trial."""
        return int(self.tree["epochs"])

    @property
    def example(self) -> TrainConfig:
        """One configuration of the space; all that says where a trial runs is the same in every other."""
        return self.branches[0].example

    def single(self) -> TrainConfig:
        """The one configuration of a file without ranges; a ConfigError that says what to fix otherwise."""
        problems = [
            f"{p.name}: is searched ({p.domain}), and one run needs one value; fix it: {p.name}={p.domain.probes[0]}"
            for p in self.parameters
            if p.within is None
        ]
        if len(self.branches) > 1:
            names = ", ".join(b.objective for b in self.branches)
            problems.insert(
                0, f"objective: is a choice of {names}, and one run needs one; fix it: objective={names[:2]}"
            )
        if problems:
            raise ConfigError(problems)
        return self.branches[0].config({})

    def teacher_runs(self) -> list[TeacherRun]:
        """Every teacher that a trial of this space may need, once each."""
        runs: dict[str, TeacherRun] = {}
        for branch in self.branches:
            first = {p.name: p.domain.probes[0] for p in branch.parameters}
            for values in _every_choice(branch.makes_teachers):
                run = branch.config({**first, **values}).teacher_run()
                if run is not None:
                    runs.setdefault(run.fingerprint(), run)
        return list(runs.values())


def load_space(path: Path | str, overrides: Sequence[str] = ()) -> Space:
    """Read, override and check a space file; every problem in it is in one ConfigError.

    Args:
        path: of the file, or the name of one that ships with the package.
        overrides: `key.path=value` each, in YAML, as on the command line.
    """
    if not isinstance(path, str | Path):
        raise ConfigError(f"path: the name of a file, got {path!r}; build_space makes a space of a tree")
    if isinstance(overrides, str) or not all(isinstance(text, str) for text in overrides or ()):
        raise ConfigError(f"overrides: a list of texts, ['optim.lr=0.1'], got {masked(repr(overrides))}")
    path = find_file(path, "search_spaces")
    tree = read_yaml(path)
    problems: list[str] = []
    for text in overrides or ():
        try:
            override(tree, text)
        except ConfigError as error:
            problems += [f"{p.replace(text, masked(text))} (in {masked(text)!r})" for p in error.problems]
    if problems:
        raise ConfigError(problems, "command line")
    return build_space(tree, path)


def build_space(tree: Tree, source: str | Path | None = None) -> Space:
    """A space from its tree, `{"objective": ["ce", "kd"], "optim": {"lr": {"low": 0.01, "high": 1}}}`.

    Every problem in it is in one ConfigError, which names `source` as where it stands.
    """
    if not isinstance(tree, Mapping):
        raise ConfigError(f"a space is settings (key: value), got {masked(repr(tree))}", source)
    tree = dict(copy.deepcopy(tree))
    if "arms" in tree:
        raise ConfigError("arms: this file lists arms, which are compared, not searched: tfkd confirm FILE", source)
    problems: list[str] = []
    notes: list[str] = []
    search = SearchConfig()
    given = tree.pop("search", None)
    if given is not None and not isinstance(given, dict):
        problems.append(f"search: needs settings below it (key: value), got {masked(repr(given))}")
        given = None
    try:
        search = validated(SearchConfig, given or {})
    except ConfigError as error:
        problems += [f"search.{p}" for p in error.problems]
    branches: list[Branch] = []
    try:
        objectives = _objectives(tree.pop("objective", None), search, notes)
        names = [_name(o) for o in objectives]
        for name, objective in zip(names, objectives, strict=True):
            shared = dict(tree)
            if name == "tfkd_self" and TAUGHT & set(names) and isinstance(shared.get("teacher"), dict):
                # the network given is that of the others' teacher; a self teacher is the student's
                shared["teacher"] = {k: v for k, v in shared["teacher"].items() if k != "model"}
            try:
                branches.append(_branch({**shared, "objective": objective}, notes))
            except ConfigError as error:
                problems += error.problems
    except ConfigError as error:
        problems += error.problems
    if problems:
        raise ConfigError(problems, source)
    unused = _ranges(tree.get("teacher"), ("teacher",)) if not any(_needs_teacher(b.tree) for b in branches) else ()
    problems = [f"{name}: is searched, and no objective here needs a teacher; leave it out" for name in unused]
    if problems:
        raise ConfigError(problems, source)
    problems = [
        f"teacher: for {b.objective} there are {_teachers(b)} to train before the sweep, and {MAX_TEACHERS} are the "
        "most; give teacher and student fewer choices"
        for b in branches
        if _teachers(b) > MAX_TEACHERS
    ]
    if problems:
        raise ConfigError(problems, source)
    space = Space(tuple(branches), search, {})
    if weights := {str(run.weights) for run in space.teacher_runs() if run.weights}:
        notes.append(
            f"teacher.weights: what {' and '.join(sorted(weights))} was trained on is not known here; if it has seen "
            "the validation images, its students look better than they are"
        )
    given_samples = "num_samples" in search.model_fields_set
    space = dataclasses.replace(space, notes=tuple(dict.fromkeys(notes)))
    size = sum(group.grid_size or 0 for group in space.groups)
    if isinstance(search.sampler, Grid) and not given_samples and size:
        search = search.model_copy(update={"num_samples": size})
    space = dataclasses.replace(space, search=search, tree=_resolved(branches, search))
    if (space.parameters or len(branches) > 1) and not space.example.data.val_fraction:
        raise ConfigError("data.val_fraction: a sweep chooses on validation, so it must be above 0, got 0", source)
    if search.num_samples < len(branches) and search.split:
        message = f"search.num_samples: {len(branches)} objectives share it equally, got {search.num_samples}"
        raise ConfigError(message, source)
    problems = [f"search.{p}" for p in _search_problems(space, size)]
    if problems:
        raise ConfigError(problems, source)
    return dataclasses.replace(space, notes=(*space.notes, *_idle(space), *_few_points(space)))


def _idle(space: Space) -> Iterator[str]:
    """That trials differ in nothing, where they do."""
    share = space.search.num_samples // len(space.groups)
    idle = [b.objective for b in space.branches if not b.parameters]
    if share < 2 or not idle or (len(idle) < len(space.branches) and not space.search.split):
        return
    whose = f"the {share} trials of {', '.join(idle)} each" if len(space.groups) > 1 else f"all {share} trials"
    what = "nothing is searched" if len(idle) == len(space.branches) else f"nothing is searched for {', '.join(idle)}"
    yield (
        f"{what}: {whose} are one and the same run, seed included; write a range, or train it once with tfkd train, or "
        "over several seeds with tfkd confirm and a file of arms"
    )


def _teachers(branch: Branch) -> int:
    """Combinations of choices that a trial's teacher may depend on."""
    return _combinations([dataclasses.replace(p, domain=_one_of(p.domain)) for p in branch.makes_teachers]) or 1


def _one_of(domain: Domain) -> Domain:
    """Choices as they are, and a range as its low end alone, with which teachers are trained."""
    return domain if isinstance(domain, Choices) else Choices((domain.probes[0],))


def _few_points(space: Space) -> Iterator[str]:
    """That trials repeat others, where there are hardly more of them than different ones."""
    share = space.search.num_samples // len(space.groups)
    sizes = {g.name: g.size for g in space.groups if any(b.parameters for b in g.branches)}
    few = {name: size for name, size in sizes.items() if size is not None and size < 2 * share}
    if share < 2 or not few or isinstance(space.search.sampler, Grid):
        return
    points = ", ".join(f"{size} different trials of {name}" for name, size in few.items())
    gridded = all((group.grid_size or MAX_GRID + 1) <= MAX_GRID for group in space.groups)
    way = "write a range, or more choices, or lower search.num_samples"
    if gridded:
        way = "search.sampler: grid, with num_samples left out, runs each once"
    yield f"there are only {points}: of {share} that are proposed, some are likely to repeat others; {way}"


MAX_TEACHERS = 1000
MAX_GRID = 100_000
MAX_RUNGS = 10_000
MAX_STEPS = 1_000_000


def _search_problems(space: Space, grid_size: int) -> Iterator[str]:
    """What does not go together in how a space is searched."""
    search, sampler, stopping, epochs = space.search, space.search.sampler, space.search.stopping, space.epochs
    share = search.num_samples // len(space.groups)
    if sampler.needs and importlib.util.find_spec(sampler.needs) is None:
        yield f"sampler: {sampler} needs the package {sampler.needs}, which is not here: pip install {sampler.needs}"
    if not sampler.choices:
        for p in (p for p in space.parameters if isinstance(p.domain, Choices)):
            yield f"sampler: {sampler} proposes numbers only, and {p.name} is a choice; use tpe, or fix {p.name}"
    if not sampler.together and not search.split and len(space.branches) > 1:
        yield f"sampler: {sampler} cannot choose among objectives; use tpe or random, or split: true"
    elif not sampler.together and (nested := sorted({p.within[0] for p in space.parameters if p.within})):
        yield (
            f"sampler: {sampler} cannot choose among items of {' and '.join(nested)} with ranges of their own; use tpe "
            "or random"
        )
    elif isinstance(sampler, Grid):
        endless = [p for p in space.parameters if p.domain.size is None]
        for p in endless:
            yield f"sampler: grid needs choices or a step, and {p.name} is {p.domain}; write {{choices: [...]}}"
        if grid_size > MAX_GRID:
            yield f"sampler: a grid of {grid_size} trials is more than {MAX_GRID}; use qmc or random"
        elif not endless and search.num_samples != grid_size:
            given = search.num_samples
            yield f"num_samples: the grid has {grid_size} points, each is one trial, got {given}; leave it out"
    if isinstance(sampler, Gp):  # Optuna lists all values of each
        for p in (p for p in space.parameters if (p.domain.size or 0) > MAX_STEPS):
            yield f"sampler: gp cannot propose one of {p.domain.size} values of {p.name}; raise its step, or use tpe"
    if search.more_metrics and not sampler.several:
        yield f"sampler: {sampler} has one metric only; use tpe or gp for {', '.join(search.metrics)}"
    if "parameters" in search.more_metrics and not any(p.path[0] == "student" for p in space.parameters):
        yield "more_metrics: parameters are the same in all trials where the student is fixed; search it, or leave them"
    if search.more_metrics and not isinstance(stopping, NoStopping):
        yield (
            f"stopping: {stopping.name} judges by one metric, and there are {len(search.metrics)}: a trial that is "
            "behind in one may be ahead in another; set stopping: none"
        )
    if sampler.full_length_only and not isinstance(stopping, NoStopping):
        yield f"stopping: a trial that is stopped early is missing from a generation of {sampler}; set stopping: none"
    if isinstance(stopping, Halving) and stopping.min_epochs and epochs > 1 and not stopping.rungs(epochs):
        yield (
            f"stopping: {stopping.name} would never stop a trial: min_epochs is {stopping.min_epochs} of {epochs}, and "
            "none is stopped in the last ninth; lower it, or set stopping: none"
        )
    elif isinstance(stopping, Hyperband):
        n = len(stopping.brackets(epochs))
        if n < 2:
            yield f"stopping: hyperband has no rung in {epochs} epochs, so it would stop nothing; lower min_epochs"
        elif share < 2 * n:
            yield f"stopping: hyperband's {n} brackets need {2 * n} trials of each objective, got {share}; use halving"
    if isinstance(stopping, Median) and epochs // (stopping.min_epochs or epochs) > MAX_RUNGS:
        yield f"stopping: median would judge a trial {epochs // (stopping.min_epochs or 1)} times; raise min_epochs"
    if isinstance(stopping, Median) and share <= stopping.startup:
        yield (
            f"stopping: median begins after {stopping.startup} full-length trials of an objective, and each has "
            f"{share}; lower startup, or use halving"
        )
    if search.gpu_hours is not None and not space.example.gpus_per_worker:
        yield "gpu_hours: trials here use no GPU, so it would never end; set gpus_per_worker, or use cpu_hours"


# --- published settings, and other spaces -----------------------------------------------------------------------


@dataclass(frozen=True)
class WarmPoint:
    """A published setting as it lies in a space."""

    objective: str
    values: Tree
    """By parameter name."""
    origin: str


def warm_points(space: Space) -> list[WarmPoint]:
    """What the sweep tries first, each group's in the order in which it tries them.

    A setting is left out where a value of its objective is outside of the space or fixed otherwise. What it does not
    speak of is as in the paper (the defaults of `OptimConfig`) if that is inside, else in the middle of its range.
    """
    return [point for group in space.groups for point in group_points(space, group)]


def group_points(space: Space, group: Group) -> list[WarmPoint]:
    """The first of `warm_points` of one group: objectives in turn, at most a quarter of the group's trials."""
    if not space.search.warm_start or isinstance(space.search.sampler, Grid):
        return []
    found = [list(_published(branch)) for branch in group.branches]
    in_turn = [point for row in itertools.zip_longest(*found) for point in row if point is not None]
    return in_turn[: space.search.num_samples // len(space.groups) // 4]


def _published(branch: Branch) -> Iterator[WarmPoint]:
    seen: list[Tree] = []
    for setting in PUBLISHED:
        if tag(type(setting.objective)) != branch.objective:
            continue
        values: Tree = {}
        for p in branch.asked(values):
            if p.path[0] == "objective":
                values[p.name] = getattr(setting.objective, p.path[1])
            else:
                usual = PAPER.get(p.path)
                values[p.name] = usual if usual is not None and p.domain.contains(usual) else p.domain.middle
        if values in seen or not all(p.domain.contains(values[p.name]) for p in branch.asked(values)):
            continue
        try:
            config = branch.config(values)
        except ConfigError:  # its parts are allowed, but not together
            continue
        if config.objective == setting.objective:
            seen.append(values)
            yield WarmPoint(branch.objective, values, setting.origin)


PAPER: dict[Path_, Any] = {("optim", name): value for name, value in OptimConfig().model_dump().items()}
"""The paper's recipe, which is also our default."""


def not_superset(old: Space, new: Space) -> list[str]:
    """Why the trials of one space would not all be trials of another: a sentence each; empty if they would."""
    problems = [
        f"objective: {b.objective} is in the trials that are there, and not in the new space; add it"
        for b in old.branches
        if b.objective not in {n.objective for n in new.branches}
    ]
    if old.search.split != new.search.split:
        problems.append("search.split: cannot change while a sweep goes on")
    if old.search.metrics != new.search.metrics:
        problems.append(f"search.metric: was {', '.join(old.search.metrics)}, and trials were judged by it")
    for was in old.branches:
        for now in (b for b in new.branches if b.objective == was.objective):
            problems += _narrower(was, now)
    return list(dict.fromkeys(problems))


def _narrower(was: Branch, now: Branch) -> Iterator[str]:
    """Where one branch's space is no part of another's."""
    before, after = ({_place(p): p for p in b.parameters} for b in (was, now))
    example = was.example.model_dump(mode="json")
    for place, p in before.items():
        if place not in after:
            yield f"{p.name}: was searched ({p.domain}), and is fixed now; leave it searched"
        elif not after[place].domain.includes(p.domain):
            yield f"{p.name}: was {p.domain}, and {after[place].domain} does not hold all of it; widen it"
    for place, p in after.items():
        choices = next((q.domain for q in before.values() if p.within and q.name == p.within[0]), None)
        if place in before or (p.within and not (choices and choices.contains(p.within[1]))):
            continue
        there = was.config(was.around(p)) if p.within else was.example
        value = value_at(there.model_dump(mode="json"), p.path)
        if not p.domain.contains(value):
            yield f"{p.name}: was fixed at {value!r}, which {p.domain} does not hold"
    searched = {p.path for p in (*before.values(), *after.values())}
    for path, a, b in _differences(example, now.example.model_dump(mode="json")):
        if not any(path[: len(s)] == s for s in searched):
            yield f"{'.'.join(_public(path, was.objective))}: was {a!r}, and is {b!r} now"


def _place(p: Parameter) -> tuple[Path_, str]:
    """What makes a parameter the same in another space, where items of choices may be counted otherwise."""
    return p.path, json.dumps(p.within[1] if p.within else None, sort_keys=True)


DIGEST = ("data", "digest")


def _differences(a: Tree, b: Tree) -> Iterator[tuple[Path_, Any, Any]]:
    """Where two configurations differ in what makes their numbers; of two unlike kinds of a thing only the names."""
    left, right = dict(_leaves(a)), dict(_leaves(b))
    if None in (left.get(DIGEST), right.get(DIGEST)):  # one began before data had digests, or has not begun
        left[DIGEST] = right[DIGEST] = None
    paths = [p for p in sorted({*left, *right}) if left.get(p) != right.get(p)]
    kinds = {p[:-1] for p in paths if p[-1] == "name"}
    for path in paths:
        if path[-1] != "name" and any(path[:n] in kinds for n in range(1, len(path))):
            continue
        if path[0] not in {"recipe", *RUN_ONLY} and not (path[0] == "data" and path[-1] in Dataset.places):
            yield path, left.get(path), right.get(path)


def pinned(space: Space) -> Space:
    """The same space on the data that are here, which it names by their digest; see `Dataset.pinned`."""
    return with_digest(space, space.example.data.pinned().digest)


def with_digest(space: Space, digest: str | None) -> Space:
    """The same space on data of this digest."""
    if space.example.data.digest == digest:
        return space
    found = build_space({**space.tree, "data": {**space.tree["data"], "digest": digest}})
    return dataclasses.replace(found, notes=space.notes, search=space.search)  # a tree has no password


def _leaves(tree: Any, path: Path_ = ()) -> Iterator[tuple[Path_, Any]]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _leaves(value, (*path, str(key)))
    else:
        yield path, tree


def value_at(tree: Any, path: Path_) -> Any:
    """What stands at a path of a tree; None where it ends before."""
    for part in path:
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree


def placed(space: Space, config: TrainConfig) -> tuple[Group, Tree] | list[str]:
    """(group, values by parameter name) of a configuration of another space in this one, or what is different.

    The seed, and where a run runs, may differ.
    """
    tree = config.model_dump(mode="json")
    for group in space.groups:
        for branch in group.branches:
            if branch.objective == config.objective.name:
                found = _values_of(branch, tree)
                return found if isinstance(found, list) else (group, found)
    return [f"objective: {config.objective.name} there, and not among {', '.join(b.objective for b in space.branches)}"]


def _values_of(branch: Branch, tree: Tree) -> Tree | list[str]:
    values: Tree = {}
    different = []
    for p in branch.asked(values):
        value = value_at(tree, p.path)
        if isinstance(p.domain, Choices):  # in a file, a choice may be a name or a part of its settings
            same = [c for c in p.domain.values if _is_item(branch, values, p, c, tree)]
            fits, value = bool(same), same[0] if same else value
        else:
            fits = p.domain.contains(value)
        if not fits:
            different.append(f"{p.name}: {value!r} there, {p.domain} here")
        values[p.name] = value
    if different:
        return different
    try:
        here = branch.config(values).model_dump(mode="json")
    except ConfigError as error:
        return error.problems
    for path, a, b in _differences(tree, here):
        if path != ("seed",):
            different.append(f"{'.'.join(_public(path, branch.objective))}: {a!r} there, {b!r} here")
    return different or values


def _is_item(branch: Branch, values: Tree, choices: Parameter, item: Any, tree: Tree) -> bool:
    """Whether a configuration has this item of choices: what is fixed of it is alike, what is searched is inside."""
    inside = [p for p in branch.parameters if p.within == (choices.name, item)]
    if not all(isinstance(p.domain, Choices) or p.domain.contains(value_at(tree, p.path)) for p in inside):
        return False
    others = branch.around(choices) | values | {choices.name: item}
    here = value_at(branch.config(others).model_dump(mode="json"), choices.path)
    depth = len(choices.path)
    loose = [p.path[depth:] for p in inside]
    there = value_at(tree, choices.path)
    if not isinstance(here, dict) or not isinstance(there, dict):
        return bool(here == there)
    left, right = dict(_leaves(here)), dict(_leaves(there))
    return all(
        left.get(path) == right.get(path)
        for path in {*left, *right}
        if not any(path[: len(part)] == part for part in loose)
    )


def _objectives(given: Any, search: SearchConfig, notes: list[str]) -> list[Any]:
    if given is None:
        raise ConfigError("objective: required, and not given; for example: objective: [ce, lsr, tfkd_reg]")
    if not isinstance(given, list):
        return [given]
    if not given:
        raise ConfigError("objective: an empty list; for example: objective: [ce, lsr, tfkd_reg]")
    names = [_name(o) for o in given]
    twice = {n for n in names if n is not None and names.count(n) > 1}
    if twice:
        raise ConfigError(f"objective: {', '.join(sorted(twice))} is listed twice; widen one range instead")
    added: list[Any] = []
    if search.baselines and len(given) > 1:
        if "ce" not in names:
            added.append({"name": "ce"})
        if "lsr" not in names:
            added.append({"name": "lsr", "alpha": {"low": 0.02, "high": 0.4, "log": True}})
    if added:
        notes.append(
            f"added {' and '.join(a['name'] for a in added)}: baselines are tuned as hard as the rest "
            "(search.baselines: false leaves them out)"
        )
    return given + added


def _needs_teacher(tree: Tree) -> bool:
    """Whether a run of this tree, with one objective, needs a trained network before it."""
    return tree.get("init") == "trained" or _name(tree.get("objective")) in {*TAUGHT, "tfkd_self"}


def _name(objective: Any) -> str | None:
    """The name of an objective in a file, if it has one."""
    settings = named(objective)
    name = settings.get("name") if isinstance(settings, dict) else None
    return name if isinstance(name, str) else None


def _ranges(value: Any, path: Path_) -> Iterator[str]:
    """Dotted paths of the ranges in a part of a space."""
    if _is_range(value, path):
        yield dotted(path)
    elif isinstance(value, dict):
        for key, below in value.items():
            yield from _ranges(below, (*path, str(key)))


def _branch(tree: Tree, notes: list[str]) -> Branch:
    tree = {**tree, "objective": named(tree["objective"])}
    if not isinstance(tree["objective"], dict):
        raise ConfigError(f"objective: needs a name or settings, got {tree['objective']!r}")
    objective = str(tree["objective"].get("name", "?"))
    problems: list[str] = []
    found: list[Parameter] = []

    def visit(value: Any, path: Path_, name: Path_, within: tuple[str, Any] | None = None) -> Any:
        """The tree without its ranges; a faulty one leaves the default, so that the rest can be checked, too.

        Args:
            name: the path as a person writes it.
            within: the item of choices that this is a part of.
        """
        if not isinstance(value, dict):
            return value
        below = {}
        for key, v in value.items():
            there = (*path, str(key))
            called = (*name, str(key)) if within else _public(there, objective)
            try:
                domain = _domain(v, called, notes, whole=_is_whole(called))
                if domain is None and isinstance(v, list | dict) and _is_number(called):
                    raise ConfigError(_range_meant(v, called))
            except ConfigError as error:
                problems.extend(error.problems)
                continue
            if domain is None:
                below[key] = visit(v, there, called, within)
                continue
            parameter = Parameter(".".join(called), there, domain, within)
            found.append(parameter)
            below[key] = None
            if isinstance(domain, Choices) and domain.written:
                for item, bare, label in zip(domain.written, domain.values, _labels(domain.values), strict=True):
                    visit(item, there, (*called, label), (parameter.name, bare))
        return below

    template: Tree = visit(tree, (), ())
    names = [p.name for p in found]
    problems += [
        f"{name}: two settings are searched under this name, as a key has a dot in it; give the key another name"
        for name in dict.fromkeys(names)
        if names.count(name) > 1
    ]
    # by name: the order in which a sampler is asked is part of its answers, and must outlive the file's layout
    parameters = tuple(sorted(found, key=lambda p: p.name))
    if not _needs_teacher(tree):  # its settings do nothing here, so they are not searched
        idle = Branch(objective, template, tuple(p for p in parameters if p.path[0] == "teacher"))
        first = {p.name: p.domain.probes[0] for p in idle.parameters}
        for p in idle.asked(first):
            p.put(template, first[p.name])
        parameters = tuple(p for p in parameters if p.path[0] != "teacher")
    for p in parameters:
        problems += _not_searchable(p.path, p.domain, p.name)
    branch = Branch(objective, template, parameters)
    for values in _corners(parameters):
        try:
            allowed = branch.config(values).objective.searchable
            for p in parameters:
                if p.path[0] == "objective" and allowed is not None and p.path[-1] not in allowed:
                    problems.append(
                        f"{p.name}: fixed only: whatever its value, this loss is a label smoothing times a constant; "
                        f"search {' and '.join(sorted(allowed))}"
                    )
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    # one for the sweep, also where students are searched: that of those that gain, as the others lose little
    first = {p.name: p.domain.probes[0] for p in parameters}
    students = itertools.islice(_every_choice([p for p in parameters if p.path[0] == "student"]), MAX_CORNERS)
    precisions = {branch.config({**first, **values}).precision for values in students}
    template |= {"precision": "bf16" if "bf16" in precisions else "fp32"}
    return branch


def _labels(items: Sequence[Any]) -> list[str]:
    """What each item of choices is called: by its name, or, where that does not tell it from the others, its number."""
    names = [_name(v) for v in items]
    return [n if n and names.count(n) == 1 else str(k) for k, n in enumerate(names, start=1)]


def _not_searchable(path: Path_, domain: Domain, name: str) -> Iterator[str]:
    top = path[0]
    if top in RUN_ONLY or top in ("recipe", "data", "epochs", "seed", "batch_norm", "precision", "compile"):
        yield f"{name}: one value for the whole sweep; trials that differ in it cannot be compared"
    if path in (("objective",), ("objective", "name")):
        yield f"{name}: write a list instead: objective: [ce, lsr, ...]"
    elif path[-1] == "name":
        above = ".".join(path[:-1])
        yield f"{name}: search the whole setting instead: {above}: {{choices: [NAME, {{name: NAME, ...}}]}}"
    if top == "teacher" and isinstance(domain, Range):
        yield f"{name}: choices only (teachers are trained before the sweep, each once): {{choices: [...]}}"


def _is_whole(name: Path_) -> bool | None:
    """Whether a setting is an integer; None if it is not ours (an argument of a person's own function)."""
    found = _types(name)
    return any(int in types and float not in types for types in found) if found else None


def _is_number(name: Path_) -> bool:
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


def _public(path: Path_, objective: str) -> Path_:
    """The path as a person writes it: objective.kd.alpha for alpha of the kd in the list."""
    return (
        (path[0], objective, *path[1:]) if path[:1] == ("objective",) and path[1:] != ("name",) and path[1:] else path
    )


def _put(tree: Tree, path: Path_, value: Any) -> None:
    for part in path[:-1]:
        tree = tree[part]
    tree[path[-1]] = value


def _every_choice(parameters: Sequence[Parameter], end: int = 0) -> Iterator[Tree]:
    """Values for every combination of choices, with all ranges at their low (0) or high (1) end."""
    begun: list[tuple[int, Tree]] = [(0, {})]
    while begun:
        k, chosen = begun.pop()
        while k < len(parameters) and not parameters[k].is_asked(chosen):
            k += 1
        if k == len(parameters):
            yield chosen
            continue
        p = parameters[k]
        values = p.domain.probes if isinstance(p.domain, Choices) else [p.domain.probes[end]]
        begun += [(k + 1, {**chosen, p.name: value}) for value in reversed(values)]


def _combinations(parameters: Sequence[Parameter], within: tuple[str, Any] | None = None) -> int | None:
    """How many combinations of values there are, within an item of choices; None where a range has no steps."""
    count = 1
    for p in (p for p in parameters if p.within == within):
        size = p.domain.size
        if isinstance(p.domain, Choices) and p.domain.written:
            sizes = [_combinations(parameters, (p.name, value)) for value in p.domain.values]
            size = None if None in sizes else sum(s for s in sizes if s is not None)
        if size is None:
            return None
        count *= size
    return count


def _corners(parameters: Sequence[Parameter]) -> Iterator[dict[str, Any]]:
    """Values to check a space with: every combination of choices (of many, the first), at both ends of the ranges."""
    for end in (0, 1):
        yield from itertools.islice(_every_choice(parameters, end), MAX_CORNERS)


def _resolved(branches: Sequence[Branch], search: SearchConfig) -> Tree:
    trees = []
    for branch in branches:
        tree = branch.config({p.name: p.domain.probes[0] for p in branch.parameters}).model_dump(mode="json")
        for parameter in branch.parameters:
            if parameter.within is None:
                _put(tree, parameter.path, _as_tree(parameter.domain))
        trees.append(tree)
    objectives = [tree["objective"] for tree in trees]
    teachers = [tree["teacher"] for tree in trees if _needs_teacher(tree)] or [trees[0]["teacher"]]
    return {
        **trees[0],
        "teacher": next((t for t in teachers if t and ("choices" in t or t["model"])), teachers[0]),
        "objective": objectives if len(objectives) > 1 else objectives[0],
        "search": search.model_dump(mode="json"),
    }


def _as_tree(domain: Domain) -> Tree:
    if isinstance(domain, Choices):
        return {"choices": list(domain.written or domain.values)}
    tree: Tree = {"low": domain.probes[0], "high": domain.probes[1]}
    tree |= {"log": True} if domain.log else {}
    tree |= {"step": domain.step} if domain.step else {}
    return tree | ({"log_complement": True} if domain.log_complement else {})


def override(tree: Tree, text: str) -> None:
    """Put one `key.path=value` of the command line into the tree of a configuration or of a space."""
    key, equals, value = text.partition("=")
    path = key.split(".")
    if not equals or not all(path):
        raise ConfigError(f"{text}: an override is key.path=value, for example optim.lr=0.1")
    if path[0] not in {"search", *TrainConfig.model_fields}:
        known = settings_at(TrainConfig, ()) | {"search"}
        raise ConfigError(f"{path[0]}: no such setting; {did_you_mean(path[0], known)}")
    here: Any = tree
    if path[0] == "objective" and len(path) > 2:
        here, path = _one_objective(tree, path)
    for depth, part in enumerate(path[:-1]):
        at: str | int = part
        if _is_range(here, tuple(path[:depth])) and isinstance(
            here.get("choices"), list
        ):  # an item, by what `check` calls it
            labels = _labels(here["choices"])
            if part not in labels:
                where = dotted(path[: depth + 1])
                raise ConfigError(f"{where}: no such item of {dotted(path[:depth])}; {did_you_mean(part, labels)}")
            here, at = here["choices"], labels.index(part)
        below = here.get(at) if isinstance(here, dict) else here[at]
        if below is None or isinstance(below, str):
            here[at] = {} if below is None else named(below)
        elif not isinstance(below, dict):
            raise ConfigError(f"{dotted(path[: depth + 1])}: is {below!r}, with nothing below it")
        here = here[at]
    here[path[-1]] = parse_yaml(value, key)


def _one_objective(tree: Tree, path: list[str]) -> tuple[Tree, list[str]]:
    """The settings of the objective that an override names, and what is left of the path."""
    given = tree.get("objective")
    listed = given if isinstance(given, list) else [given]
    settings = [named(o) for o in listed]
    names = [_name(o) for o in settings]
    if path[1] not in names:
        known = [str(n) for n in names if n]
        raise ConfigError(f"objective.{path[1]}: not among the file's objectives; {did_you_mean(path[1], known)}")
    tree["objective"] = settings if isinstance(given, list) else settings[0]
    return settings[names.index(path[1])], path[2:]
