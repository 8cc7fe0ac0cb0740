"""The search settings of a space, `search` in a file; space.py checks them against the space."""

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    field_serializer,
    field_validator,
    model_validator,
)

from tfkd_ray.learn.optimizers import Count, Positive
from tfkd_ray.settings.errors import ConfigError, did_you_mean
from tfkd_ray.settings.passwords import FIRST_AT, after_password, masked
from tfkd_ray.settings.schema import Settings, name_alone, tag
from tfkd_ray.space.pausing import halving_rungs
from tfkd_ray.verdict.limits import Limits
from tfkd_ray.verdict.scores import Searchable, SearchableBeside, score_of


class _Sampler(Settings):
    """A sampler of Optuna, with its limits, from which the rules in space.py make sentences."""

    choices: ClassVar[bool] = True
    """True if it can propose one of a list."""
    together: ClassVar[bool] = False
    """True if it can choose among objectives (`split: false`) or items of choices that have their
    own parameters."""
    several: ClassVar[bool] = True
    """True if it can optimise several metrics."""
    priors: ClassVar[bool] = True
    """True if results of earlier experiments help it."""
    constrained: ClassVar[bool] = False
    """True if it learns which trials meet constraints."""
    full_length_only: ClassVar[bool] = False
    """True if it needs every trial to run its full length."""
    needs: ClassVar[str | None] = None
    """Package that it needs beyond our requirements."""

    def __str__(self) -> str:
        return str(tag(type(self)))


class Tpe(_Sampler):
    """Tree-structured Parzen estimators: models where good trials are, stopped ones included."""

    together = True
    constrained = True
    name: Literal["tpe"] = "tpe"
    startup: Count | None = None
    """Proposals before the model is used; quasi-random if an objective has its own sampler and no
    earlier results. None: 10, or half of an objective's trials if that is less (at least 3)."""
    candidates: Count = 24
    """Candidates from which each proposal is chosen."""
    multivariate: bool = True
    """Use one model over all parameters. false: one model per parameter, which treats them as
    independent."""


class Gp(_Sampler):
    """A Gaussian process with log expected improvement. It learns from full-length trials only."""

    constrained = True
    name: Literal["gp"] = "gp"
    startup: Count | None = None
    """Proposals before the model is used, as in tpe."""


class CmaEs(_Sampler):
    """CMA-ES: adapts a normal distribution by generations; ranges only, one metric, no stopping."""

    choices = False
    several = False
    priors = False
    full_length_only = True
    needs = "cmaes"
    name: Literal["cmaes"] = "cmaes"
    startup: Count = 1
    """Random proposals before it begins."""
    population: Annotated[int, Field(ge=2)] | None = None
    """Trials per generation. None: 4 + 3 log(parameters)."""


class Qmc(_Sampler):
    """Quasi-random points, which cover the space more evenly than random ones."""

    priors = False
    name: Literal["qmc"] = "qmc"
    kind: Literal["sobol", "halton"] = "sobol"


class Random(_Sampler):
    """Independent random proposals."""

    together = True
    priors = False
    name: Literal["random"] = "random"


class Grid(_Sampler):
    """Every combination of choices and steps once, in random order; no more and no fewer trials.

    Each runs its full length, unless the file sets `search.stopping`.
    """

    priors = False
    name: Literal["grid"] = "grid"


Sampler = Tpe | Gp | CmaEs | Qmc | Random | Grid


class Halving(Settings):
    """Successive halving: at each rung the best 1 / `factor` of its objective's trials continue."""

    name: Literal["halving"] = "halving"
    factor: Annotated[int, Field(ge=2)] = 3
    min_epochs: Count | None = None
    """Epochs before the first rung. None: epochs / factor^2, which puts the rungs at 1/9 and 1/3 of
    the epochs."""

    def rungs(self, epochs: int) -> list[int]:
        """Return the epochs after which a trial is judged, ascending; none in the last ninth."""
        return halving_rungs(epochs, self.factor, self.min_epochs)


class Hyperband(Halving):
    """Several halvings in parallel, with different first rungs; one of them never stops a trial.

    (Li et al. 2018, arXiv:1603.06560.) Trials are judged within their own halving. They are
    assigned as in Optuna's pruner: a bracket that stops more gets more trials.
    """

    name: Literal["hyperband"] = "hyperband"  # type: ignore[assignment]

    def brackets(self, epochs: int) -> list[list[int]]:
        """Return the rungs of each halving."""
        rungs = self.rungs(epochs)
        return [rungs[k:] for k in range(len(rungs) + 1)]

    def bracket(self, epochs: int, k: int) -> int:
        """Return the halving of an objective's k-th trial."""
        weights = self._weights(epochs)
        *_, last = self._deal(weights, k % sum(weights) + 1)
        return last

    def dealt(self, epochs: int, trials: int) -> dict[int, int]:
        """Return the number of an objective's first trials that each halving gets."""
        weights = self._weights(epochs)
        rounds, rest = divmod(trials, sum(weights))
        found = {b: rounds * weight for b, weight in enumerate(weights)}
        for b in self._deal(weights, rest):
            found[b] += 1
        return found

    def _weights(self, epochs: int) -> list[int]:
        """Return the number of trials per round for each halving."""
        n = len(self.brackets(epochs))
        return [math.ceil(n * self.factor ** (n - 1 - b) / (n - b)) for b in range(n)]

    def _deal(self, weights: list[int], trials: int) -> Iterator[int]:
        """Yield the halving of each trial of a round."""
        dealt, total = [0] * len(weights), sum(weights)
        for j in range(trials):
            last = max(range(len(weights)), key=lambda b: weights[b] * (j + 1) / total - dealt[b])
            dealt[last] += 1
            yield last


class Asha(Halving):
    """Ray's own ASHAScheduler. It is not exact after a kill -9: its rungs live in the driver."""

    name: Literal["asha"] = "asha"  # type: ignore[assignment]


class Pausing(Halving):
    """Halving that pauses instead of stopping: a trial goes on once it is among the best of a rung.

    A paused trial keeps its checkpoint, and holds no process, GPU or place among the concurrent
    trials. The sweep ends when no trial may go on and every objective has a full-length trial.
    """

    name: Literal["pausing"] = "pausing"  # type: ignore[assignment]


class Median(Settings):
    """Stops a trial whose best value is worse than the full-length trials' median at that epoch."""

    name: Literal["median"] = "median"
    startup: Count = 5
    """Full-length trials of an objective before any trial is stopped."""
    min_epochs: Count | None = None
    """Epochs before the first judgment, and between judgments. None: a ninth of the epochs."""

    def rungs(self, epochs: int) -> list[int]:
        """Return the epochs after which a trial is judged, ascending, without the last one."""
        every = self.min_epochs or max(1, epochs // 9)
        return list(range(every, epochs, every))


class NoStopping(Settings):
    """Every trial runs its full length."""

    name: Literal["none"] = "none"

    def rungs(self, epochs: int) -> list[int]:
        """Return an empty list."""
        return []


Stopping = Halving | Pausing | Hyperband | Asha | Median | NoStopping


class Finalists(Settings):
    """Further seeds for the best trials of each objective, once all of its trials have ended.

    The mean over the further seeds is the value of such a trial. The run that was selected is left
    out of it: the best of many runs looks better than it is.
    """

    k: Count = 3
    """Number of trials of each objective that get further seeds."""
    seeds: Count = 3
    """Further seeds of each: the numbers after the trial's own `seed`."""


ENDLESS = 10**9
"""Trials of a search that does not end by their number."""
TIME_BUDGETS = ("time_budget_s", "gpu_hours", "cpu_hours")
"""Budgets that every search spends sooner or later."""
ENVIRONMENT = "TFKD_STORAGE"
"""Environment variable with the storage's whole URL, needed if the experiment's shows *** as the
password."""


def _storage_url(url: str | None) -> str | None:
    if url is None:
        return None
    if not re.match(r"[a-z][a-z0-9+_]*://", url):
        raise ValueError(
            "a URL: sqlite:///FILE, or postgresql://USER@HOST/DATABASE; null keeps a journal file"
        )
    if "@" in after_password(url):
        raise ValueError(FIRST_AT)
    kind, _, rest = url.partition(":///")
    if url.startswith("sqlite") and rest in ("", ":memory:"):
        raise ValueError("a database in memory ends with the process; name a file: sqlite:///FILE")
    # a resumed run may have another working directory
    if kind.startswith("sqlite") and rest and not rest.startswith("/"):
        return f"{kind}:///{Path(rest).absolute()}"
    return url


class Limit(Settings):
    """Limits of a metric, both ends included."""

    low: float | None = None
    """Least value that meets the constraint. None: no lower limit."""
    high: float | None = None
    """Greatest value that meets the constraint. None: no upper limit."""

    @model_validator(mode="after")
    def _is_a_limit(self) -> Self:
        if self.low is None and self.high is None:
            raise ValueError("needs a limit, {high: 0.05}, {low: 0.9} or both")
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError(
                f"low must not be above high, got low {self.low:g}, high {self.high:g}"
            )
        return self


class SearchConfig(Settings):
    """Search settings: number of trials, sampler, stopping, budgets and storage."""

    num_samples: Count | None = 24
    """Number of trials, over all objectives. With the grid sampler and no explicit value: the size
    of the grid. None: trials are added until `time_budget_s`, `gpu_hours` or `cpu_hours` is spent."""
    split: bool = True
    """Give every objective the same number of trials and its own sampler. false: the sampler
    chooses the objective."""
    baselines: bool = True
    """Add `ce` and `lsr` to a list of objectives without them, so that baselines are tuned as hard
    as the rest."""
    sampler: Annotated[Sampler, Field(discriminator="name"), BeforeValidator(name_alone)] = Tpe()
    warm_start: bool = True
    """Try published settings first if they lie in the space: one of each objective, and at most a
    quarter of its trials if that is more."""
    points: tuple[dict[str, Any], ...] = ()
    """Trials to run first, before the published settings: a list of partial settings, each of one
    objective, such as {objective: kd, optim.lr: 0.05}. Searched settings that a point leaves out take
    the paper's value, or the middle of their range. They count as trials."""
    stopping: Annotated[Stopping, Field(discriminator="name"), BeforeValidator(name_alone)] = (
        Halving()
    )
    """Early stopping. With the grid sampler, or several metrics, and no explicit value: none."""
    finalists: Finalists | None = None
    """Further seeds for the best trials of each objective, such as {k: 3, seeds: 3}; the mean over
    them is then the trial's value. None: a trial's own run is its value."""
    metric: Searchable = "val_accuracy"
    """Validation metric after a trial's last epoch, which is the trial's value; val_ema_accuracy by
    default if all trials have `ema`. NLL and ECE are minimised, others maximised. A list, such as
    [val_accuracy, val_ece], optimises all of them; `best` is then a Pareto front, led by the first
    metric."""
    more_metrics: tuple[SearchableBeside, ...] = ()
    """The other metrics of a list given as `metric`; also `parameters`, the number of the student's
    weights, minimised."""
    constraints: dict[str, Limit] = {}
    """Limits of metrics that the best trial should meet, such as {parameters: {high: 2e6}, val_ece:
    {high: 0.05}}. The sampler learns which trials meet them (tpe, gp)."""
    report: Literal["judged", "all"] = "judged"
    """Values that the study keeps of a trial: `judged` where early stopping judges it, and its last;
    `all` after every epoch, for the curves of optuna-dashboard. metrics.jsonl has all in any case."""
    max_concurrent: Count | None = None
    """Concurrent trials. None: as many as fit on the cluster."""
    max_failures: Annotated[int, Field(ge=0)] = 2
    """Number of times that a trial whose process is lost is retried in the same epoch, from its
    last checkpoint. One more loss there fails the trial."""
    trial_timeout_s: Positive | None = None
    """Timeout in seconds for one epoch of a trial, its start included; a trial that exceeds it is
    killed and fails."""
    time_budget_s: Positive | None = None
    """Seconds of trials, over all sessions, after which the sweep ends. Resume continues unfinished
    trials."""
    gpu_hours: Positive | None = None
    """Budget of GPU time, in hours that trials hold one GPU; otherwise as `time_budget_s`."""
    cpu_hours: Positive | None = None
    """Budget of CPU time, in hours that trials hold one CPU; otherwise as `time_budget_s`."""
    max_failed_trials: Count | None = None
    """Number of failed trials after which the sweep ends."""
    storage: Annotated[str | None, AfterValidator(_storage_url), Field(repr=False)] = None
    """URL of an Optuna storage for the studies. None: a journal file in the experiment. A password
    is never written; on resume, the environment variable TFKD_STORAGE must hold the URL with it."""
    study: Annotated[str, Field(min_length=1)] | None = None
    """Name of the studies in the storage. None: the experiment's name; in a journal file,
    `tfkd`."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the proposals: proposal n is a function of this seed, n, and the content of the
    study."""

    @field_validator("points", mode="before")
    @classmethod
    def _points_are_settings(cls, given: Any) -> Any:
        if not isinstance(given, list | tuple):
            raise ValueError(f"a list of settings, [{{optim.lr: 0.1}}, ...], got {given!r}")
        for number, point in enumerate(given, start=1):
            if not isinstance(point, Mapping) or not point:
                raise ValueError(f"number {number} needs settings (key: value), got {point!r}")
        return given

    @field_validator("constraints", mode="before")
    @classmethod
    def _constraints_are_of_metrics(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            raise ValueError(f"limits by metric, {{val_ece: {{high: 0.05}}}}, got {given!r}")
        known = get_args(SearchableBeside)
        for name in given:
            if name not in known:
                raise ValueError(f"no metric {name!r}; {did_you_mean(str(name), known)}")
        return given

    @model_validator(mode="before")
    @classmethod
    def _metrics_as_a_list(cls, tree: Any) -> Any:
        given = tree.get("metric") if isinstance(tree, Mapping) else None
        if not isinstance(given, list | tuple) or not given:
            return tree
        first, *others = given
        return {**tree, "metric": first, "more_metrics": others}

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
        """Return all optimised metrics; usually one."""
        return (self.metric, *self.more_metrics)

    @property
    def measured(self) -> tuple[str, ...]:
        """Return all metrics that every trial must report: those optimised, and those limited."""
        return tuple(dict.fromkeys((*self.metrics, *self.constraints)))

    @property
    def limits(self) -> Limits:
        """Return the constraints as plain numbers."""
        return {name: limit.tree for name, limit in self.constraints.items()}

    @property
    def most_trials(self) -> int:
        """Return the number of trials; `ENDLESS` if a budget alone ends the search."""
        return ENDLESS if self.num_samples is None else self.num_samples

    @property
    def mode(self) -> Literal["max", "min"]:
        """Return the direction in which the first metric is better."""
        return score_of(self.metric).direction

    @property
    def modes(self) -> tuple[Literal["max", "min"], ...]:
        """Return the direction in which each metric is better."""
        return tuple(score_of(metric).direction for metric in self.metrics)

    @property
    def budgets(self) -> dict[str, float]:
        """Return the limits that are set, besides the number of trials."""
        names = ("time_budget_s", "gpu_hours", "cpu_hours", "max_failed_trials")
        limits = {name: getattr(self, name) for name in names}
        return {name: limit for name, limit in limits.items() if limit is not None}


def more_samples(num_samples: int | None, more: int) -> int | None:
    """Return `num_samples` with trials added; raise a ConfigError if a budget alone ends the search."""
    if num_samples is None and more:
        raise ConfigError(
            f"add_trials: search.num_samples is null, so trials are added until a budget is spent, got {more}; give "
            "another budget instead, such as --time-budget SECONDS"
        )
    return None if num_samples is None else num_samples + more
