"""How a space is searched: the `search` of a file. What fits no space is refused in space.py."""

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, field_serializer, model_validator

from tfkd_ray.learn.config import Count, Positive
from tfkd_ray.settings.passwords import FIRST_AT, after_password, masked
from tfkd_ray.settings.schema import Settings, name_alone, tag
from tfkd_ray.verdict.scores import Selectable, SelectableBeside, score_of


class _Sampler(Settings):
    """A sampler of Optuna's; what it cannot do stands here, and the rules in space.py make sentences of it."""

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
        rungs = []
        while 9 * rung <= 8 * epochs:
            rungs.append(rung)
            rung *= self.factor
        return rungs


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
        raise ValueError(
            "a URL: sqlite:///FILE, or postgresql://USER@HOST/DATABASE; null keeps a journal file"
        )
    if "@" in after_password(url):
        raise ValueError(FIRST_AT)
    kind, _, rest = url.partition(":///")
    if url.startswith("sqlite") and rest in ("", ":memory:"):
        raise ValueError("a database in memory ends with the process; name a file: sqlite:///FILE")
    if (
        kind.startswith("sqlite") and rest and not rest.startswith("/")
    ):  # whoever resumes may stand elsewhere
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
    sampler: Annotated[Sampler, Field(discriminator="name"), BeforeValidator(name_alone)] = Tpe()
    warm_start: bool = True
    """Try published settings first, as far as they lie in the space; at most a quarter of an objective's trials."""
    stopping: Annotated[Stopping, Field(discriminator="name"), BeforeValidator(name_alone)] = (
        Halving()
    )
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
        limits = {name: getattr(self, name) for name in names}
        return {name: limit for name, limit in limits.items() if limit is not None}
