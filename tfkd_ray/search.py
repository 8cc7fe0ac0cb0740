"""Optuna behind Ray Tune's public Searcher and TrialScheduler interfaces. The study is the truth.

Every group of a space (see `Space.groups`) is a study of its own in one storage, the experiment's journal file by
default. Proposal n is made by a sampler seeded with (seed, n), so it is a function of what the studies hold: after a
crash, the search goes on as if nothing had happened. A trial that was running then is handed out again, with the same
number and parameters. Only the driver process talks to Optuna.
"""

import json
import math
import warnings
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from tfkd_ray.images import address
from tfkd_ray.space import Group, Halving, Space

STARTUP = 10
"""Most random proposals before TPE begins; fewer in a small study."""


class _Live:
    """A trial that runs: its place in a study, and the epochs reported there, in this session and before."""

    def __init__(self, study: optuna.Study, trial: optuna.Trial, reported: set[int]) -> None:
        self.study, self.trial, self.reported = study, trial, reported
        self.before = max(reported, default=0)


class OptunaSearcher(Searcher):  # type: ignore[misc]
    """Proposes the trials of a space.

    A proposal is the whole configuration as a tree, with a `trial` section beside it: its `number`, its `name`
    (t0007-tfkd_reg), and what `place` adds. Results must carry `epoch` and the space's metric. A trial is COMPLETE
    after its last epoch, FAIL with its reason where a result says `failed` or Ray lost it, and PRUNED where it was
    stopped before.

    Args:
        space: what to search.
        journal: Optuna's journal file; made if it is not there, continued if it is.
        study: prefix of the studies' names.
        place: added to the `trial` section of every proposal.
    """

    def __init__(
        self, space: Space, journal: Path, *, study: str = "tfkd", place: dict[str, str] | None = None
    ) -> None:
        super().__init__(metric=space.search.metric, mode=space.search.mode)
        self.space, self.journal, self.study, self.place = space, Path(journal), study, place or {}
        self._studies: list[optuna.Study] | None = None
        self._storage: Any = None
        self._live: dict[str, _Live] = {}
        self._unfinished: list[tuple[Group, optuna.Study, int, int]] = []
        self._next = 0

    # --- what Tune calls

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """The next configuration: first the unfinished trials, then new ones, FINISHED after `num_samples`."""
        studies = self._open()
        if self._unfinished:
            group, study, number, n = self._unfinished.pop(0)
            study.sampler = self._sampler(n)
            trial = self._again(study, number)
            reported = set(study.get_trials(deepcopy=False)[number].intermediate_values)
        elif self._next < self.space.search.num_samples:
            n = self._next
            self._next += 1
            group, study = self.space.groups[n % len(studies)], studies[n % len(studies)]
            study.sampler = self._sampler(n)
            trial = study.ask()
            reported = set()
        else:
            return str(Searcher.FINISHED)
        trial.set_user_attr("number", n)
        values, config = group.propose(trial)
        name = f"t{n:04d}-{config.objective.name}"
        trial.set_user_attr("name", name)
        self._live[trial_id] = _Live(study, trial, reported)
        place = {key: value.replace("{name}", name) for key, value in self.place.items()}
        about = {"number": n, "name": name, "parameters": values, "epochs": config.epochs, **place}
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
        failed = "its process was lost" if error else str((result or {}).get("failed") or "")
        if result and not failed:
            self._put(live, result)
        if failed or not result:
            trial.set_user_attr("reason", failed or "ended without a result")
            study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
        elif result.get("epoch") == self.space.epochs:
            value = result.get(self.space.search.metric)
            if isinstance(value, int | float) and math.isfinite(value):
                study.tell(trial.number, float(value), skip_if_finished=True)
            else:
                trial.set_user_attr("reason", f"{self.space.search.metric} is {value}")
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
        return {**self.__dict__, "_studies": None, "_storage": None, "_live": {}, "_unfinished": [], "_next": 0}

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

    def remaining(self) -> int:
        """Trials still to be handed out: unfinished and new ones."""
        self._open()
        return len(self._unfinished) + self.space.search.num_samples - self._next

    def _put(self, live: _Live, result: dict[str, Any]) -> bool:
        """Whether the value is new to the study, and a number."""
        epoch, value = result.get("epoch"), result.get(self.space.search.metric)
        if not isinstance(epoch, int | float) or not isinstance(value, int | float) or not math.isfinite(value):
            return False
        if int(epoch) in live.reported:
            return False
        live.reported.add(int(epoch))
        live.trial.report(float(value), int(epoch))
        return True

    # --- Optuna

    def _open(self) -> list[optuna.Study]:
        """The studies, made or continued; what is unfinished in them is queued."""
        if self._studies is None:
            self._storage = open_journal(self.journal)
            direction = "maximize" if self.mode == "max" else "minimize"
            self._studies = [
                optuna.create_study(
                    storage=self._storage,
                    study_name=f"{self.study}/{group.name}",
                    direction=direction,
                    pruner=self._pruner(),
                    load_if_exists=True,
                )
                for group in self.space.groups
            ]
            known: set[int] = set()
            unfinished: list[tuple[Group, optuna.Study, int, int]] = []
            unnumbered: list[tuple[Group, optuna.Study, int]] = []
            for group, study in zip(self.space.groups, self._studies, strict=True):
                for trial in study.get_trials(deepcopy=False):
                    n = trial.user_attrs.get("number")
                    if n is None:
                        unnumbered.append((group, study, trial.number))
                        continue
                    known.add(n)
                    if not trial.state.is_finished():
                        unfinished.append((group, study, trial.number, n))
            for group, study, number in unnumbered:  # the driver died between asking and numbering
                n = len(known)
                known.add(n)
                unfinished.append((group, study, number, n))
            self._unfinished = sorted(unfinished, key=lambda entry: entry[3])
            self._next = len(known)
        return self._studies

    def _again(self, study: optuna.Study, number: int) -> optuna.Trial:
        """A handle on a trial of an earlier session: asked for its parameters, it returns what it was given then."""
        study_id = self._storage.get_study_id_from_name(study.study_name)
        return optuna.Trial(study, self._storage.get_trial_id_from_study_id_trial_number(study_id, number))

    def _sampler(self, n: int) -> optuna.samplers.BaseSampler:
        search = self.space.search
        seed = address(search.seed, "proposal", n) % 2**32
        if search.sampler == "random":
            return optuna.samplers.RandomSampler(seed=seed)
        share = search.num_samples // len(self.space.groups)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return optuna.samplers.TPESampler(
                seed=seed,
                multivariate=True,
                group=len(self.space.branches) > 1 and not search.split,
                constant_liar=True,
                n_startup_trials=min(STARTUP, max(3, share // 2)),
            )

    def _pruner(self) -> optuna.pruners.BasePruner:
        stopping = self.space.search.stopping
        if isinstance(stopping, Halving):
            return Rungs(stopping.rungs(self.space.epochs), stopping.factor)
        return optuna.pruners.NopPruner()


class Rungs(optuna.pruners.BasePruner):  # type: ignore[misc]
    """Asynchronous successive halving. (Li et al. 2020, arXiv:1810.05934, without promotion of stopped trials.)

    At a rung a trial goes on if its value is among the best 1 / `factor` of those that have come there, and at least if
    it is the best. Unlike Optuna's own pruner it keeps no notes: its answer is a function of the reported values alone,
    so that it can be asked again after a crash.
    """

    def __init__(self, rungs: list[int], factor: int) -> None:
        self._rungs, self._factor = rungs, factor

    def prune(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> bool:
        """Whether the trial should stop at the epoch it has reported last."""
        rung = trial.last_step
        if rung not in self._rungs:
            return False
        came = [t.intermediate_values[rung] for t in study.get_trials(deepcopy=False) if rung in t.intermediate_values]
        came.sort(reverse=study.direction == optuna.study.StudyDirection.MAXIMIZE)
        last_good = came[max(1, len(came) // self._factor) - 1]
        return came.index(trial.intermediate_values[rung]) > came.index(last_good)


class StudyStopping(FIFOScheduler):  # type: ignore[misc]
    """Stops trials where the searcher's study says so: the rungs live in the study, and so survive the driver."""

    def __init__(self, searcher: OptunaSearcher) -> None:
        super().__init__()
        self.searcher = searcher

    def on_trial_result(self, tune_controller: Any, trial: TuneTrial, result: dict[str, Any]) -> str:
        """STOP at a rung where the trial is not among the best 1 / factor of its group."""
        stop = self.searcher.report(trial.trial_id, result)
        return str(TrialScheduler.STOP if stop else TrialScheduler.CONTINUE)


def open_journal(path: Path) -> BaseStorage:
    """Optuna's storage in a journal file; what a crash left half-written at its end is cut off first."""
    if path.exists():
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            with path.open("r+b") as file:
                file.truncate(whole)
    path.parent.mkdir(parents=True, exist_ok=True)
    return JournalStorage(JournalFileBackend(str(path)))
