"""Optuna behind Ray Tune's public Searcher and TrialScheduler interfaces. The study is the truth.

Every group of a space (see `Space.groups`) is a study of its own in one storage: the experiment's journal file, or any
storage of Optuna's by its URL. Proposal n is made by a sampler seeded with (seed, n), so it is a function of what the
studies hold: after a crash, the search goes on as if nothing had happened. A trial that was running then is handed out
again, with the same number and parameters. Only the driver process talks to Optuna.

A trial's number is the last thing that is written of a proposal. A trial in a study without one is either the rest of a
proposal that a crash cut off (it failed, without a value, and is proposed again), or a result of an earlier experiment.
"""

import collections
import contextlib
import dataclasses
import itertools
import json
import math
import os
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

import optuna
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import BaseJournalBackend, JournalFileBackend
from optuna.trial import FrozenTrial, TrialState
from ray import cloudpickle
from ray.exceptions import RayTaskError
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from tfkd_ray.cluster import give_larger_share, send_elsewhere
from tfkd_ray.config import TrainConfig
from tfkd_ray.experiment import DIRECTIONS, Record, damaged, parse_json, read_experiment, read_records
from tfkd_ray.images import address
from tfkd_ray.schema import ConfigError, validated
from tfkd_ray.space import (
    ENVIRONMENT,
    CmaEs,
    Gp,
    Grid,
    Group,
    Halving,
    Hyperband,
    Median,
    Qmc,
    Space,
    Tpe,
    build_space,
    group_points,
    masked,
    placed,
)

STARTUP = 10
"""Most random proposals before a model begins; fewer in a small study."""
LONGEST_LINE = 2**24
"""Bytes of a journal's line; Optuna's are of some hundred."""


class _Live:
    """A trial that runs: its place in a study, and the epochs reported there, in this session and before."""

    def __init__(self, study: optuna.Study, trial: optuna.Trial, reported: set[int]) -> None:
        self.study, self.trial, self.reported = study, trial, reported
        self.before = max(reported, default=0)


class OptunaSearcher(Searcher):  # type: ignore[misc]
    """Proposes the trials of a space.

    A proposal is the whole configuration as a tree, with a `trial` section beside it: its `number`, its `name`
    (t0007-tfkd_reg), the `metrics` it is judged by, and what `place` adds. Results must carry `epoch` and these.
    A trial is COMPLETE after its last epoch, FAIL with its reason where a result says `failed`, it raised an error or
    Ray lost it, and PRUNED where it was stopped before.

    Args:
        space: what to search.
        journal: Optuna's journal file; made if it is not there, continued if it is. Not used with a `storage`.
        study: prefix of the studies' names. None: `search.study` of the space, or else `tfkd`.
        place: added to the `trial` section of every proposal.
        storage: URL of an Optuna storage. None: `search.storage` of the space, or else the journal.
        priors: directories of earlier experiments whose results the sampler should know (see `prior_trials`).
    """

    def __init__(
        self,
        space: Space,
        journal: Path,
        *,
        study: str | None = None,
        place: dict[str, str] | None = None,
        storage: str | None = None,
        priors: Sequence[Path | str] = (),
    ) -> None:
        super().__init__(metric=space.search.metric, mode=space.search.mode)
        self.storage = storage or space.search.storage
        self.space, self.journal = without_password(space), Path(journal)
        self.study, self.place = study or space.search.study or "tfkd", place or {}
        self.priors = [Path(p) for p in priors]
        self._forget()

    def _forget(self) -> None:
        self._studies: list[optuna.Study] | None = None
        self._storage: Any = None
        self._live: dict[str, _Live] = {}
        self._errors: dict[str, str] = {}
        self._todo: list[int] = []
        self._started: dict[int, int] = {}
        self._group_of: dict[int, int] = {}
        self._counts: collections.Counter[int] = collections.Counter()
        self._next = 0
        self._warm: dict[int, list[dict[str, Any]]] = {}
        self._points: dict[int, list[dict[str, Any]]] = {}
        self._dealt: dict[int, optuna.Study] = {}

    # --- what Tune calls

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """The next configuration: first what is unfinished, then new ones, FINISHED after `num_samples`."""
        studies = self._open()
        if self._todo:
            n = self._todo.pop(0)
        elif self._next < self.space.search.num_samples:
            n = self._next
            self._next += 1
        else:
            return str(Searcher.FINISHED)
        number = self._started.pop(n, None)
        g, k = (self._group_of[n], 0) if number is not None else self._deal(n)
        group, study = self.space.groups[g], studies[g]
        if number is None:
            study.sampler = self._sampler(n, g, k)
            trial, reported = study.ask(), set[int]()
            if isinstance(self.space.search.stopping, Hyperband):
                trial.set_user_attr("bracket", self.space.search.stopping.bracket(self.space.epochs, k))
        else:
            trial = self._again(study, number)
            reported = set(study.get_trials(deepcopy=False)[number].intermediate_values)
        values, config = group.propose(trial)
        name = f"t{n:04d}-{config.objective.name}"
        if number is None:
            trial.set_user_attr("name", name)
            trial.set_user_attr("number", n)  # last: now the proposal is whole
        self._live[trial_id] = _Live(study, trial, reported)
        place = {key: value.replace("{name}", name) for key, value in self.place.items()}
        about = {"number": n, "name": name, "parameters": values, "epochs": config.epochs, **place}
        about["metrics"] = list(self.space.search.metrics)
        return {"trial": about, **config.model_dump(mode="json")}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Put the epoch's value into the study."""
        self.report(trial_id, result)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Tell the study how the trial ended; telling it twice changes nothing."""
        live = self._live.pop(trial_id, None)
        if live is None:
            return
        study, trial = live.study, live.trial
        lost = self._errors.pop(trial_id, "its process was lost")
        failed = lost if error else str((result or {}).get("failed") or "")
        if result and not failed:
            self._put(live, result)
        if failed or not result:
            trial.set_user_attr("reason", failed or "ended without a result")
            study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
        elif result.get("epoch") == self.space.epochs:
            bad = [f"{m} is {result.get(m)}" for m in self.space.search.metrics if not _is_number(result.get(m))]
            if not bad:
                values = [float(result[m]) for m in self.space.search.metrics]
                study.tell(trial.number, values, skip_if_finished=True)
            else:
                trial.set_user_attr("reason", ", ".join(bad))
                study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
        else:
            study.tell(trial.number, state=TrialState.PRUNED, skip_if_finished=True)

    def save(self, checkpoint_path: str) -> None:
        """Nothing but a note: all that matters is in the study."""
        Path(checkpoint_path).write_text(json.dumps({"journal": str(self.journal)}))

    def restore(self, checkpoint_path: str) -> None:
        """Go on from the study."""
        self._studies = None

    def __getstate__(self) -> dict[str, Any]:
        kept = {key: value for key, value in self.__dict__.items() if key not in _ALIVE}
        return {**kept, "storage": self.storage and masked(self.storage)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    # --- for the scheduler and the driver

    def report(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Put an epoch's value into the study, once; whether the trial is now at a rung where it should stop.

        A resumed trial tells its epochs again. They are known, and were judged, but for the last: the driver may have
        died before it acted on that.
        """
        live = self._live.get(trial_id)
        if live is None:
            return False
        fresh = self._put(live, result)
        epoch = result.get("epoch")
        if epoch == self.space.epochs or not (fresh or (epoch == live.before and epoch in live.reported)):
            return False
        return bool(live.trial.should_prune())

    def note_error(self, trial_id: str, error: BaseException | None) -> None:
        """Why a trial is about to end with an error: the exception, where it raised one itself."""
        if isinstance(error, RayTaskError):
            self._errors[trial_id] = f"{type(error.cause).__name__}: {error.cause}"

    def remaining(self) -> int:
        """Trials still to be handed out: unfinished and new ones."""
        self._open()
        return len(self._todo) + self.space.search.num_samples - self._next

    def close(self) -> None:
        """Leave the storage; whatever is asked next opens it again."""
        if self._studies is not None:
            close_storage(self._storage)
            self._studies = None

    def retry_failed(self) -> int:
        """Queue the failed trials, with their numbers, parameters and values on the way; how many they are."""
        studies = self._open()
        latest = {
            t.user_attrs["number"]: (study, t)
            for study in studies
            for t in study.get_trials(deepcopy=False)
            if "number" in t.user_attrs
        }
        failed = [entry for entry in latest.values() if entry[1].state == TrialState.FAIL]
        for study, trial in failed:
            about = {k: v for k, v in trial.user_attrs.items() if k != "reason"}
            study.add_trial(
                optuna.trial.create_trial(
                    state=TrialState.RUNNING,
                    params=trial.params,
                    distributions=trial.distributions,
                    user_attrs={**about, "attempt": about.get("attempt", 1) + 1},
                    intermediate_values=trial.intermediate_values,
                )
            )
        self._take_stock(studies)
        return len(failed)

    def add_priors(self, priors: Sequence["Prior"]) -> None:
        """Give the studies results of earlier experiments, each once.

        They have no number, so they are no trials of this experiment, and no values on the way, so that no rung and no
        median is made of them: there are none here of the trials that were stopped there.
        """
        studies = dict(zip([group.name for group in self.space.groups], self._open(), strict=True))
        for prior in priors:
            study = studies[prior.group]
            if all(t.user_attrs.get("prior") != prior.origin for t in study.get_trials(deepcopy=False)):
                study.add_trial(
                    optuna.trial.create_trial(
                        values=prior.values,
                        params=prior.params,
                        distributions=prior.distributions,
                        user_attrs={"prior": prior.origin},
                    )
                )

    def waiting(self) -> set[int]:
        """Numbers of the trials that are to be handed out again."""
        self._open()
        return set(self._todo)

    def open_trials(self) -> int:
        """Trials that are handed out and have not ended."""
        return len(self._live)

    def known(self) -> dict[int, str]:
        """The names of the trials that the studies hold, by number."""
        trials = [t for study in self._open() for t in study.get_trials(deepcopy=False)]
        return {t.user_attrs["number"]: str(t.user_attrs.get("name")) for t in trials if "number" in t.user_attrs}

    def recorded(self) -> list[dict[str, Any]]:
        """The trees of the spaces for which the studies were made; mostly one. Release 0.1.0 noted none."""
        noted = {str(tree) for study in self._open() if (tree := study.user_attrs.get("space")) is not None}
        trees = []
        for text in sorted(noted):
            with damaged(self.journal):
                trees.append(dict(parse_json(text)))
        return trees

    def studies(self) -> list[optuna.Study]:
        """The studies, one for each group of the space."""
        return self._open()

    def optuna_storage(self) -> BaseStorage:
        """Where the studies are."""
        self._open()
        storage: BaseStorage = self._storage
        return storage

    def _put(self, live: _Live, result: dict[str, Any]) -> bool:
        """Whether the value is new to the study, and a number."""
        epoch, value = result.get("epoch"), result.get(self.space.search.metric)
        if self.space.search.more_metrics:  # Optuna keeps no values on the way for several
            return False
        if not isinstance(epoch, int | float) or not _is_number(value) or int(epoch) in live.reported:
            return False
        live.reported.add(int(epoch))
        live.trial.report(float(value), int(epoch))
        return True

    # --- Optuna

    def _open(self) -> list[optuna.Study]:
        """The studies, made or continued; what is unfinished in them is queued."""
        if self._studies is None:
            self._forget()
            self._storage = open_journal(self.journal) if self.storage is None else open_storage(self.storage)
            with contextlib.nullcontext() if self.storage is None else _database(self.storage):
                studies = self._make_studies()
            self._studies = studies
            self.add_priors(prior_trials(self.space, self.priors))
            self._take_stock(studies)
        return self._studies

    def _make_studies(self) -> list[optuna.Study]:
        """The studies, with a note of the space for which they were made, so that a change by hand is noticed."""
        directions = {"max": "maximize", "min": "minimize"}
        studies = [
            optuna.create_study(
                storage=self._storage,
                study_name=f"{self.study}/{group.name}",
                directions=[directions[DIRECTIONS[m]] for m in self.space.search.metrics],
                pruner=self._pruner(),
                load_if_exists=True,
            )
            for group in self.space.groups
        ]
        for study in studies:
            if "space" not in study.user_attrs and not study.get_trials(deepcopy=False):
                study.set_user_attr("space", json.dumps(self.space.tree))
        return studies

    def _take_stock(self, studies: Sequence[optuna.Study]) -> None:
        """Find out what is there: which numbers, in which group, and what of them is to be done (again)."""
        latest: dict[int, FrozenTrial] = {}
        for g, study in enumerate(studies):
            for trial in study.get_trials(deepcopy=False):
                n = trial.user_attrs.get("number")
                if n is not None:
                    latest[n], self._group_of[n] = trial, g  # a later attempt stands for an earlier one
                elif trial.state == TrialState.RUNNING:
                    study.tell(trial.number, state=TrialState.FAIL)
        self._started = {n: trial.number for n, trial in latest.items() if not trial.state.is_finished()}
        self._next = max(latest, default=-1) + 1
        self._todo = sorted({*self._started, *(n for n in range(self._next) if n not in latest)})
        self._counts = collections.Counter(self._group_of.values())

    def _deal(self, n: int) -> tuple[int, int]:
        """(group of trial n, how many of the group came before it): the group that has the fewest so far."""
        newest = len(self._group_of) == n  # nothing is missing before it
        counts = self._counts if newest else collections.Counter(g for m, g in self._group_of.items() if m < n)
        groups = self.space.groups
        sizes = [g.grid_size if isinstance(self.space.search.sampler, Grid) else None for g in groups]
        room = [g for g, size in enumerate(sizes) if size is None or counts[g] < size]
        g = min(room, key=lambda g: (counts[g], g))
        k = counts[g]
        self._group_of[n] = g
        self._counts[g] += 1
        return g, k

    def _again(self, study: optuna.Study, number: int) -> optuna.Trial:
        """A handle on a trial of an earlier session: asked for its parameters, it returns what it was given then."""
        study.sampler = optuna.samplers.RandomSampler(seed=0)  # has nothing to say: all parameters are there
        study_id = self._storage.get_study_id_from_name(study.study_name)
        return optuna.Trial(study, self._storage.get_trial_id_from_study_id_trial_number(study_id, number))

    def _sampler(self, n: int, g: int, k: int) -> optuna.samplers.BaseSampler:
        """What proposes trial n, the k-th of its group."""
        search, group = self.space.search, self.space.groups[g]
        settings, seed = search.sampler, address(search.seed, "proposal", n) % 2**32
        random = optuna.samplers.RandomSampler(seed=seed)
        if g not in self._warm:
            points = group_points(self.space, group)
            self._warm[g] = [group.told(_branch(group, p.objective), p.values) for p in points]
        given = self._warm[g][k] if k < len(self._warm[g]) else None
        share = search.num_samples // len(self.space.groups)
        startup = getattr(settings, "startup", None) or min(STARTUP, max(3, share // 2))
        if given is None and (isinstance(settings, Qmc | Grid) or self._begins_evenly(g, k < startup)):
            given = self._point(g, k)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            if given is not None:
                return optuna.samplers.PartialFixedSampler(given, random)
            if isinstance(settings, Tpe):
                return optuna.samplers.TPESampler(
                    seed=seed,
                    multivariate=settings.multivariate,
                    group=settings.multivariate and group.conditional,
                    constant_liar=True,
                    n_startup_trials=startup,
                    n_ei_candidates=settings.candidates,
                )
            if isinstance(settings, Gp):
                return optuna.samplers.GPSampler(seed=seed, n_startup_trials=startup, warn_independent_sampling=False)
            if isinstance(settings, CmaEs):
                return optuna.samplers.CmaEsSampler(
                    seed=seed,
                    n_startup_trials=settings.startup,
                    popsize=settings.population,
                    warn_independent_sampling=False,
                )
        return random

    def _begins_evenly(self, g: int, early: bool) -> bool:
        """Whether a model begins with quasi-random points: where nothing is known yet, and there is one branch."""
        modelled = isinstance(self.space.search.sampler, Tpe | Gp)
        if not (early and modelled and len(self.space.groups[g].branches) == 1):
            return False
        return all("prior" not in t.user_attrs for t in self._open()[g].get_trials(deepcopy=False))

    def _point(self, g: int, k: int) -> dict[str, Any]:
        """Point k of a sampler that looks at no values: the k-th that Optuna's own gives to a study in memory.

        So it depends on k alone, whatever else the real study holds: priors, attempts, the rest of a crash.
        """
        search, group = self.space.search, self.space.groups[g]
        points = self._points.setdefault(g, [])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            if g not in self._dealt:
                seed = address(search.seed, "points", g) % 2**32
                sampler = (
                    optuna.samplers.QMCSampler(
                        qmc_type=getattr(search.sampler, "kind", "sobol"),
                        scramble=True,
                        seed=seed,
                        warn_independent_sampling=False,
                    )
                    if not isinstance(search.sampler, Grid)
                    else optuna.samplers.GridSampler(group.grid or {}, seed=seed)
                )
                self._dealt[g] = optuna.create_study(sampler=sampler)
            while len(points) <= k:
                trial = self._dealt[g].ask()
                for p in group.branches[0].parameters:
                    p.domain.suggest(trial, p.name)
                points.append(dict(trial.params))
                if not isinstance(search.sampler, Grid):
                    self._dealt[g].tell(trial, 0.0)
        return points[k]

    def _pruner(self) -> optuna.pruners.BasePruner:
        stopping, epochs = self.space.search.stopping, self.space.epochs
        if isinstance(stopping, Hyperband):
            return Rungs(stopping.brackets(epochs), stopping.factor)
        if type(stopping) is Halving:
            return Rungs([stopping.rungs(epochs)], stopping.factor)
        if isinstance(stopping, Median):
            every = stopping.rungs(epochs)[:1] or [epochs]
            return optuna.pruners.MedianPruner(
                n_startup_trials=stopping.startup,
                n_min_trials=stopping.startup,  # of this experiment: priors have no values on the way
                n_warmup_steps=every[0],
                interval_steps=every[0],
            )
        return optuna.pruners.NopPruner()


_ALIVE = {
    *("_studies", "_storage", "_live", "_errors", "_todo", "_started", "_group_of", "_counts", "_next", "_warm"),
    *("_points", "_dealt"),
}


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and math.isfinite(value)


def _branch(group: Group, objective: str) -> Any:
    return next(b for b in group.branches if b.objective == objective)


class Rungs(optuna.pruners.BasePruner):  # type: ignore[misc]
    """Asynchronous successive halving. (Li et al. 2020, arXiv:1810.05934, without promotion of stopped trials.)

    At a rung a trial goes on if its value is among the best 1 / `factor` of those that have come there, and at least if
    it is the best. Unlike Optuna's own pruner it keeps no notes: its answer is a function of the reported values alone,
    so that it can be asked again after a crash.

    Args:
        brackets: the rungs of each halving; a trial's is its user attribute `bracket`, or the first.
        factor: one in so many goes on.
    """

    def __init__(self, brackets: list[list[int]], factor: int) -> None:
        self._brackets, self._factor = brackets, factor

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        """Whether the trial should stop at the epoch it has reported last."""
        rung, bracket = trial.last_step, trial.user_attrs.get("bracket", 0)
        if rung not in self._brackets[bracket]:
            return False
        values: dict[Any, float] = {}
        for t in study.get_trials(deepcopy=False):  # of a trial that was tried again, the last attempt
            if rung in t.intermediate_values and t.user_attrs.get("bracket", 0) == bracket:
                values[t.user_attrs.get("number", (t.number,))] = t.intermediate_values[rung]
        came = sorted(values.values(), reverse=study.direction == optuna.study.StudyDirection.MAXIMIZE)
        last_good = came[max(1, len(came) // self._factor) - 1]
        return came.index(trial.intermediate_values[rung]) > came.index(last_good)


class StudyStopping(FIFOScheduler):  # type: ignore[misc]
    """Stops trials where the searcher's study says so: the rungs live in the study, and so survive the driver."""

    def __init__(self, searcher: OptunaSearcher) -> None:
        super().__init__()
        self.searcher = searcher

    def choose_trial_to_run(self, tune_controller: Any) -> TuneTrial | None:
        """As FIFOScheduler, which looks through all trials there ever were, each time."""
        waiting = [t for t in tune_controller.get_live_trials() if t.status in (TuneTrial.PENDING, TuneTrial.PAUSED)]
        return min(waiting, key=lambda t: (t.status == TuneTrial.PAUSED, t.config["trial"]["number"]), default=None)

    def on_trial_error(self, tune_controller: Any, trial: TuneTrial) -> None:
        """Tell the searcher, which hears of an error only that there was one, what it was."""
        if trial.pickled_error_file is not None:  # by Tune, a moment ago
            self.searcher.note_error(trial.trial_id, cloudpickle.loads(Path(trial.pickled_error_file).read_bytes()))
        if "directory" in trial.config["trial"]:  # a trial of `StudentTrial`, not of a user's own trainable
            give_larger_share(trial)
            send_elsewhere(trial)

    def on_trial_result(self, tune_controller: Any, trial: TuneTrial, result: dict[str, Any]) -> str:
        """STOP at a rung where the trial is not among the best 1 / factor of its group."""
        stop = self.searcher.report(trial.trial_id, result)
        return str(TrialScheduler.STOP if stop else TrialScheduler.CONTINUE)


# --- storages --------------------------------------------------------------------------------------------------


def open_journal(path: Path) -> BaseStorage:
    """Optuna's storage in a journal file; what a crash left half-written at its end is cut off first.

    Anything else that is wrong with the file is a ConfigError with the byte where it begins, and changes nothing.
    """
    if path.exists():
        _mend(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    return JournalStorage(JournalFileBackend(str(path)))


def _mend(path: Path) -> None:
    lines = _Lines(path)
    try:
        JournalStorage(lines)
    except ConfigError:
        raise
    except Exception:  # whatever Optuna makes of a line that it cannot make sense of
        raise _corrupt(path, lines.start, lines.line) from None
    if lines.tail and not lines.tail.startswith(b'{"op_code"'[: len(lines.tail)]):
        raise _corrupt(path, lines.end, lines.tail)
    if lines.tail:
        with path.open("r+b") as file:
            file.truncate(lines.end)


def _corrupt(path: Path, byte: int, line: bytes) -> ConfigError:
    return ConfigError(
        f"byte {byte}: this is no line of Optuna's journal: {line[:40]!r}; nothing was changed. Put back a copy of the "
        f"file, or give up what comes after (head -c {byte} {path.name} > mended) with the folders of those trials",
        path,
    )


LOCK_S = 3.0
"""Longest time that somebody who lives takes to write to a journal."""


def drop_stale_locks(journal: Path) -> None:
    """Remove what a process that was killed has left of Optuna's lock; one that is held now is waited for."""
    began = time.monotonic()
    seen = _locks(journal)
    while seen and time.monotonic() - began < LOCK_S and min(made for made, _ in seen) > time.time() - 60:
        time.sleep(0.02)
        seen &= _locks(journal)
    for _, path in seen:
        path.unlink(missing_ok=True)


def _locks(journal: Path) -> set[tuple[float, Path]]:
    """(when it was made, file) of every lock of a journal."""
    found = set()
    for path in journal.parent.glob(f"{journal.name}.lock*"):
        with contextlib.suppress(FileNotFoundError):  # free again
            found.add((path.lstat().st_mtime, path))
    return found


class _Lines(BaseJournalBackend):  # type: ignore[misc]
    """A journal to try out, read line by line: `line` is the last that Optuna was given, and began at byte `start`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.start = self.end = 0
        self.line = self.tail = b""

    def read_logs(self, log_number_from: int) -> Iterable[dict[str, Any]]:
        assert log_number_from == 0, f"{log_number_from=}"
        with self._path.open("rb") as file:
            while line := file.readline(LONGEST_LINE):
                if not line.endswith(b"\n") and len(line) < LONGEST_LINE:
                    self.tail = line
                    return
                self.start, self.end, self.line = self.end, self.end + len(line), line
                try:
                    log = parse_json(line)
                    if not line.endswith(b"\n") or not isinstance(log, dict) or not isinstance(log.get("op_code"), int):
                        raise ValueError("no operation")
                except ValueError:
                    raise _corrupt(self._path, self.start, line) from None
                yield log

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        raise AssertionError("only read here")


SQLITE_WAIT_S = 20.0
"""Longest wait for somebody else who writes to an SQLite database."""


def open_storage(url: str) -> BaseStorage:
    """Optuna's storage behind a URL, or a ConfigError if it cannot be reached."""
    kind = whole_url(url).partition(":")[0]
    wait = {"sqlite": {"timeout": SQLITE_WAIT_S}}.get(kind.partition("+")[0], {"connect_timeout": 10})
    with _database(url):
        return RDBStorage(whole_url(url), engine_kwargs={"connect_args": wait})


@contextlib.contextmanager
def _database(url: str) -> Iterator[None]:
    """What is wrong with a database behind a URL is a ConfigError."""
    whole = whole_url(url)
    shown = masked(url)
    kind = whole.partition(":")[0]
    try:
        yield
    except ImportError as error:
        missing = getattr(error.__cause__ or error, "name", None) or kind
        package = {"psycopg": "'psycopg[binary]'", "psycopg2": "psycopg2-binary", "MySQLdb": "mysqlclient"}.get(missing)
        package = package or missing
        raise ConfigError(
            f"search.storage: {shown} needs the package {package}, which is not here: pip install {package}"
        ) from None
    except ArgumentError:
        raise ConfigError(f"search.storage: {shown} is no URL of a database that SQLAlchemy knows") from None
    except (SQLAlchemyError, optuna.exceptions.StorageInternalError, RuntimeError, OSError, TypeError) as error:
        cause = error.__cause__ or error
        reason = str(getattr(cause, "orig", None) or cause).strip().splitlines()[0]
        raise ConfigError(f"search.storage: {shown} cannot be used: {_hidden(reason, whole)}") from None


def close_storage(storage: BaseStorage) -> None:
    """Close a database's connections."""
    if isinstance(storage, RDBStorage):
        storage.remove_session()
        storage.engine.dispose()


def _hidden(text: str, url: str) -> str:
    """A database's own words, without the password of the URL."""
    for secret in set(_secrets(url)):
        text = text.replace(secret, "***")
    return masked(text)


def _secrets(url: str) -> Iterable[str]:
    hidden = masked(url).split("***")
    for before, after in itertools.pairwise(hidden):
        start = url.index(before) + len(before)
        end = url.index(after, start) if after else len(url)
        if end > start:
            yield url[start:end]


def whole_url(url: str) -> str:
    """The URL with its password; where that is ***, from TFKD_STORAGE."""
    if ":***@" not in url and "=***" not in url:
        return url
    given = os.environ.get(ENVIRONMENT)
    if given is None:
        raise ConfigError(f"search.storage: the password of {url} is not kept; set {ENVIRONMENT} to the whole URL")
    if masked(given) != url:
        raise ConfigError(f"search.storage: {ENVIRONMENT} is {masked(given)}, and the experiment's storage is {url}")
    return given


def without_password(space: Space) -> Space:
    """The same space, with *** for the password of its storage: what may be pickled, logged and shown."""
    url = space.search.storage
    if url is None or masked(url) == url:
        return space
    return dataclasses.replace(space, search=space.search.model_copy(update={"storage": masked(url)}))


# --- earlier experiments ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Prior:
    """A finished trial of an earlier experiment, as a trial of this space."""

    group: str
    params: dict[str, Any]
    distributions: dict[str, Any]
    values: list[float]
    origin: str
    """experiment/trial."""


def prior_trials(space: Space, experiments: Sequence[Path | str]) -> list[Prior]:
    """The full-length trials of earlier experiments that lie in this space and were trained as its trials are.

    The old space may have been larger or smaller: what counts is each trial's own configuration. Only the seed, and
    where it ran, may differ. An experiment without any such trial is a ConfigError that says what is different.
    """
    if not experiments:
        return []
    sampler, metrics = space.search.sampler, space.search.metrics
    if not sampler.priors:
        raise ConfigError(f"priors: earlier results would change nothing for the sampler {sampler}; use tpe or gp")
    found: list[Prior] = []
    problems = []
    for experiment in (Path(e) for e in experiments):
        read_experiment(experiment)
        differences: collections.Counter[str] = collections.Counter()
        before = len(found)
        full = [r for r in read_records(experiment) if r.status == "done"]
        for record in full:
            prior = _prior(space, record, metrics, f"{experiment.name}/{record.name}")
            if isinstance(prior, Prior):
                found.append(prior)
            else:
                differences.update(prior)
        if len(found) == before:
            why = "; ".join(d for d, _ in differences.most_common(5)) or "it has no full-length trial"
            problems.append(f"priors: of {len(full)} full-length trials of {experiment} none lies in this space: {why}")
    if problems:
        raise ConfigError(problems)
    return found


def _prior(space: Space, record: Record, metrics: Sequence[str], origin: str) -> Prior | list[str]:
    try:
        config = validated(TrainConfig, record.config)
    except ConfigError as error:
        return error.problems
    place = placed(space, config)
    if isinstance(place, list):
        return place
    values = [v for metric in metrics if _is_number(v := record.last.get(metric))]
    if len(values) < len(metrics) or record.last["epoch"] != config.epochs:
        return [f"{' or '.join(metrics)}: not measured there, or not a number"]
    group, parameters = place
    params, distributions = _asked(group, config.objective.name, parameters)
    return Prior(group.name, params, distributions, values, origin)


def _asked(group: Group, objective: str, values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(parameters, distributions) of a trial of a study with these values."""
    fixed = optuna.trial.FixedTrial(group.told(_branch(group, objective), values))
    group.propose(fixed)
    return fixed.params, fixed.distributions


def copy_trials(old: OptunaSearcher, new: OptunaSearcher) -> None:
    """Give the studies of a wider space (see `not_superset`) all trials of a narrower one; what was in them is lost.

    What was fixed before, and is searched now, is a parameter of the copied trials.
    """
    copies: list[tuple[int, str, FrozenTrial]] = []
    for group, study in zip(old.space.groups, old.studies(), strict=True):
        for trial in study.get_trials(deepcopy=False):
            if "number" in trial.user_attrs or "prior" in trial.user_attrs:
                _, config = group.propose(optuna.trial.FixedTrial(trial.params))
                place = placed(new.space, config)
                assert not isinstance(place, list), f"{trial.user_attrs=} {place=}"
                params, distributions = _asked(place[0], config.objective.name, place[1])
                copied = optuna.trial.create_trial(
                    state=trial.state,
                    values=trial.values if trial.state == TrialState.COMPLETE else None,
                    params=params,
                    distributions=distributions,
                    user_attrs=trial.user_attrs,
                    intermediate_values=trial.intermediate_values,
                )
                copies.append((trial.user_attrs.get("number", -1), place[0].name, copied))
    for name in optuna.study.get_all_study_names(storage=old.optuna_storage()):
        if name.startswith(f"{new.study}/"):  # the rest of a crash
            optuna.delete_study(study_name=name, storage=old.optuna_storage())
    studies = dict(zip([g.name for g in new.space.groups], new.studies(), strict=True))
    for _, name, copied in sorted(copies, key=lambda entry: entry[0]):
        studies[name].add_trial(copied)
    old.close()
    new.close()


# --- what mattered ---------------------------------------------------------------------------------------------

EVALUATORS = ("pedanova", "fanova", "mdi")
ENOUGH = 4
"""Fewest full-length trials of an objective from which importance is told."""


def importance(experiment: Path | str, *, evaluator: str = "pedanova") -> dict[str, dict[str, float]]:
    """How much of the metric each searched setting explains: {objective: {parameter: share}}, shares that sum to 1.

    Over the full-length trials of each objective apart; an objective with fewer than 4 of them, or with nothing
    searched, has no shares, nor has a setting that only some of its trials have. With several metrics, of the first.
    `evaluator` is one of Optuna's: pedanova, fanova, mdi.
    """
    if evaluator not in EVALUATORS:
        raise ConfigError(f"evaluator: no such evaluator {evaluator!r}; known: {', '.join(EVALUATORS)}")
    experiment = Path(experiment)
    space = build_space(read_experiment(experiment)["space"], experiment / "experiment.yaml")
    metric = space.search.metric
    records = [r for r in read_records(experiment) if r.status == "done" and _is_number(r.last.get(metric))]
    found: dict[str, dict[str, float]] = {}
    for branch in space.branches:
        mine = [r for r in records if r.objective == branch.objective]
        found[branch.objective] = {}
        if len(mine) < ENOUGH or all(p.within for p in branch.parameters):
            continue
        direction = "maximize" if space.search.mode == "max" else "minimize"
        study = optuna.create_study(direction=direction)
        group = Group(branch.objective, (branch,))
        for r in mine:
            params, distributions = _asked(group, branch.objective, r.parameters)
            study.add_trial(optuna.trial.create_trial(value=r.last[metric], params=params, distributions=distributions))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            everywhere = set.intersection(*(set(t.params) for t in study.get_trials(deepcopy=False)))
            shares = optuna.importance.get_param_importances(
                study, evaluator=_evaluator(evaluator), params=sorted(everywhere)
            )
        found[branch.objective] = {name.removeprefix("1 - "): float(share) for name, share in shares.items()}
    return found


def _evaluator(name: str) -> Any:
    if name == "pedanova":
        return optuna.importance.PedAnovaImportanceEvaluator()
    if name == "fanova":
        return optuna.importance.FanovaImportanceEvaluator(seed=0)
    return optuna.importance.MeanDecreaseImpurityImportanceEvaluator(seed=0)
