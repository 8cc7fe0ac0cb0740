"""Optuna behind Ray Tune's public Searcher and TrialScheduler interfaces.

The studies hold the state of a search. Each group of a space (see `Space.groups`) has its own study
in a common storage: the experiment's journal file, or an Optuna storage with a URL. The sampler of
proposal n is seeded with (seed, n), so a proposal depends on the studies alone: after a crash the
search continues unchanged. A trial that was running is proposed again, with the same number and
parameters. Only the driver process calls Optuna.

A trial's number is written last. A study trial without a number is either an incomplete proposal
(after a crash: it failed without a value and is proposed again) or a result of an earlier
experiment.
"""

import collections
import contextlib
import dataclasses
import json
import math
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna import Study, Trial, pruners, samplers
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState, create_trial
from ray import cloudpickle
from ray.exceptions import RayTaskError
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher
from ray.tune.search.repeater import TRIAL_INDEX

from tfkd_ray.learn.config import TrainConfig
from tfkd_ray.learn.images import address
from tfkd_ray.run.connect import (
    caller_argument,
    give_larger_share,
    raise_own_error,
    report_each_epoch,
    send_elsewhere,
)
from tfkd_ray.run.finalists import FURTHER, FurtherSeed, FurtherSeeds
from tfkd_ray.run.journal import REPLACED, SAVED, drop_stale_locks, open_journal, together
from tfkd_ray.run.priors import Prior, prior_trials
from tfkd_ray.run.rungs import Rungs, first_step
from tfkd_ray.run.studies import (
    Seen,
    SeenStorage,
    close_storage,
    database,
    open_storage,
    without_password,
)
from tfkd_ray.run.tune_space import tune_space
from tfkd_ray.settings.errors import ConfigError, check_kind, did_you_mean, readable
from tfkd_ray.settings.passwords import masked, shown
from tfkd_ray.settings.schema import validated
from tfkd_ray.settings.yaml import Tree, Values
from tfkd_ray.show.listener import Epochs
from tfkd_ray.space import fronts
from tfkd_ray.space.finalists import Candidate, finalists
from tfkd_ray.space.pausing import Action, Entrant, Ladder
from tfkd_ray.space.plain import PlainSpace, parameters_from, plain_space, search_settings
from tfkd_ray.space.relate import as_asked, branch_of, group_points, is_number, placed
from tfkd_ray.space.search_config import (
    Asha,
    CmaEs,
    Gp,
    Grid,
    Halving,
    Hyperband,
    Median,
    Pausing,
    Qmc,
    Tpe,
)
from tfkd_ray.space.space import Branch, BranchGroup, Searched, Space, share_of
from tfkd_ray.store.assignment import SECTION, Assignment
from tfkd_ray.store.ended import without_collector
from tfkd_ray.store.experiment import (
    FULL_LENGTH,
    STOPPED_BY,
    as_number,
    damaged,
    parse_json,
    study_and_space,
)
from tfkd_ray.verdict.limits import excesses

STARTUP = 10
"""Maximum number of random proposals before a model starts; fewer in a small study."""


OUTSIDE = "(outside)"
"""Name, after that of the studies, of the study with the trials that a narrower space leaves out."""
OUTSIDE_ATTRS = ("group", "config")
"""What its trials note besides: the group that they count for, and their whole configuration."""
END_OF_STEPS = 2**31
"""Epochs from here on are not written: a database keeps them in 32 bits."""


class _Live:
    """A running trial: its place in a study and the epochs reported, in all sessions."""

    def __init__(
        self, study: Study, trial: Trial, known: FrozenTrial, run: FurtherSeed | None = None
    ) -> None:
        self.study, self.trial, about = study, trial, known.user_attrs
        self.run = run
        """Which further seed of which finalist it is; None: a trial of the search."""
        self.number: int = about["number"]
        self.bracket: int = about.get("bracket", 0)
        self.reported = set(known.intermediate_values)
        """The epochs of which the study has the value."""
        self.before = max(self.reported, default=0)
        self.judged = int(about.get("judged", 0))
        """The last epoch after which a rung let it continue."""
        self.counts_from_0 = 0 in self.reported
        self.epochs = Epochs()
        self.told: Any = None
        """Ray's iteration of the last result that did not end the trial."""
        self.stopped = False
        """True once the study has decided that the trial should stop, or pause."""
        self.promoted = int(about.get("promoted", 0))
        """The highest rung from which the trial may go on."""
        self.rung = 0
        """The rung at which it should pause."""
        self.last: Tree = {}
        """Its last result."""

    def tell(self, values: Any = None, state: TrialState | None = None) -> None:
        """Record the end of the trial in its study; repeating it changes nothing."""
        self.study.tell(self.trial, values, state, skip_if_finished=True)


class OptunaSearcher(Searcher):  # type: ignore[misc]
    """Proposes the trials of a space.

    A proposal is the whole configuration as a tree, with a `trial` section: its `number`, its
    `name` (t0007-tfkd_reg), the `metrics` that judge it, its `directory` in `folder`, and the items
    of `place`. For a plain dictionary, it is that dictionary with a value in place of each domain,
    and nothing else.

    Results must contain the metrics. A result without `epoch` counts as one epoch. A trial is
    COMPLETE after its last epoch, or if it ended by itself or by the `stop` of its `RunConfig`;
    FAIL with a reason if a result has `failed`, it raised an error, or Ray lost it; PRUNED if it
    was stopped before. (Ray does not distinguish a stop of a `RunConfig` from one of its own
    schedulers: with those, the trial is PRUNED.)

    Args:
        space: the space to search; or a dictionary with Ray Tune's domains in it (`tune.uniform`
            and the like) for a trainable of your own. None: the `param_space` of your Tuner.
        journal: Optuna's journal file, created or continued. Not used with a `storage`.
        study: prefix of the studies' names. None: `search.study` of the space, or `tfkd`.
        folder: contains a directory for each trial. None: trials get no directory.
        place: added unchanged to the `trial` section of every proposal.
        storage: URL of an Optuna storage. None: `search.storage` of the space, or the journal.
        priors: directories of earlier experiments whose results the sampler uses (`prior_trials`).
        points_to_evaluate: points to propose first: parameters by name, `objective` among them, or
            whole configurations. The sampler chooses the missing values.
        metric: for a dictionary: the name of its trainable's metric. None: TuneConfig's.
        mode: for a dictionary: "max" or "min". None: TuneConfig's.
        epochs: for a dictionary: the number of results that a full-length trial reports.
        search: for a dictionary: settings as below `search` in a file: `sampler`, `stopping`,
            `num_samples`, `seed`, `storage`, `study`.
    """

    _most: int | None = None
    """Maximum number of concurrent trials, where paused ones are not to be counted."""

    def __init__(
        self,
        space: Space | Values | None,
        journal: Path | str,
        *,
        study: str | None = None,
        folder: Path | None = None,
        place: Values | None = None,
        storage: str | None = None,
        priors: Sequence[Path | str] = (),
        points_to_evaluate: Sequence[Values] = (),
        metric: str | None = None,
        mode: str | None = None,
        epochs: int | None = None,
        search: Values | None = None,
    ) -> None:
        super().__init__()
        self._plain: Tree = {"epochs": epochs, "search": dict(search or {})}
        self._told = (metric, mode)
        self._points_given = list(points_to_evaluate)
        if isinstance(space, Space):
            _refuse_arguments_of_plain_spaces(metric, mode, epochs, search)
            settings: Any = space.search
        else:
            _check_plain(space, epochs, folder, place, priors)
            settings = search_settings(self._plain["search"])
        self.storage = storage or settings.storage
        self._plain["search"].pop("storage", None)  # its password is not kept
        self.study, self.place = study or settings.study or "tfkd", dict(place or {})
        self.journal = Path(journal).absolute()
        self.folder = folder
        self.priors = [Path(p) for p in priors]
        self.judges = False
        """True if trials are stopped only by the studies' decisions (see `StudyStopping`)."""
        self._saved: dict[str, int] = {}
        self._saved_paused: dict[int, str] = {}
        self._saved_further: dict[str, str] = {}
        self._space: Space | PlainSpace | None = None
        self._given: dict[str, list[Tree]] = {}
        if space is not None:
            self._take_space(
                space if isinstance(space, Space) else tune_space(space, **self._plain)
            )
        self._forget()

    @property
    def space(self) -> Space | PlainSpace:
        """Return the space; raise a ConfigError while a Tuner has not said it."""
        if self._space is None:
            raise ConfigError(
                "space: none yet; give OptunaSearcher a space or a dictionary, or your Tuner a param_space"
            )
        return self._space

    def _take_space(self, space: Space | PlainSpace) -> None:
        """Use a space from now on, and check what was given beside it."""
        metric, mode = self._told
        if isinstance(space, PlainSpace) and metric is not None:
            space = space.judged_by(metric, mode)
        self._given = given_points(space, self._points_given)
        self._space = without_password(space)
        self._know_metric()

    def _know_metric(self) -> None:
        """Tell Ray's part of the searcher what the space is searched for, once it is known."""
        search = self.space.search
        if search.metric:
            self._metric, self._mode = search.metric, search.mode

    def _forget(self) -> None:
        self._studies: list[Study] | None = None
        self._outside: list[FrozenTrial] = []
        self._storage: Any = None
        self._asked = False
        self._live: dict[str, _Live] = {}
        self._errors: dict[str, str] = {}
        self._todo: list[int] = []
        self._started: dict[int, int] = {}
        self._group_of: dict[int, int] = {}
        self._counts: collections.Counter[int] = collections.Counter()
        self._next = 0
        self._ladder = Ladder(0, (), 1, maximize=True)
        self._seen: list[Seen] = []
        self._rungs: list[Rungs | None] = []
        self._action: Action | None = None
        self._further: FurtherSeeds | None = None
        self._held: dict[int, str] = {}
        self._warm: dict[int, list[Tree]] = {}
        self._points: dict[int, list[Tree]] = {}
        self._dealt: dict[int, Study] = {}

    # --- called by Tune

    def set_search_properties(
        self, metric: str | None, mode: str | None, config: Any, **spec: Any
    ) -> bool:
        """Take the space of a Tuner with `param_space`; refuse another metric than the space's."""
        is_told = self._space is None or (
            isinstance(self._space, PlainSpace) and not self._space.constants
        )
        if is_told:
            self._take_space(tune_space(config, **self._plain, constants=False))
            self._forget()
        self.check_metric(metric, mode)
        return is_told  # else the space is fixed, and Tune refuses another

    def check_metric(self, metric: str | None, mode: str | None) -> None:
        """Raise if a `tune.TuneConfig` has a metric other than the space's, which rules.

        A plain dictionary without a metric gets it from there.
        """
        if self._space is None:  # a restored Tuner says it before `restore` knows the space
            self._told = (metric, mode) if metric is not None else self._told
            return
        space = self._space
        if isinstance(space, PlainSpace) and not space.search.metric and metric is not None:
            self._space = space.judged_by(metric, mode)
            self._know_metric()
        search = self.space.search
        given = [
            (n, told)
            for n, told in (("metric", metric), ("mode", mode))
            if told not in (None, getattr(search, n))
        ]
        if given:
            told = ", ".join(f"{name}={value!r}" for name, value in given)
            raise ConfigError(
                f"TuneConfig: {told}, and the space is searched for {search.metric} ({search.mode}); leave it out, or "
                f"{self._where_metric}"
            )

    @property
    def _where_metric(self) -> str:
        if isinstance(self.space, PlainSpace):
            return "give OptunaSearcher this metric and mode"
        return "set search.metric in the space"

    def suggest(self, trial_id: str) -> Tree | str | None:
        """Return the next configuration: unfinished trials, new ones, then FINISHED."""
        if not self._asked:
            self._asked = True
            self.check_metric(caller_argument("run", "metric"), caller_argument("run", "mode"))
        self._open()
        action = self.next_action()
        if action.what == "end":
            self.finish()
            return str(Searcher.FINISHED)
        if not self._has_room() or action.what == "wait" or action.number in self._held:
            return None
        if action.what == "further":
            return self._suggest_further(trial_id, FurtherSeed(action.number, action.further))
        if action.what == "promote":
            n = action.number
            self._started[n] = self._attempt(n, action.rung)
        elif self._todo:
            n = self._todo.pop(0)
        else:
            n = self._next
            self._next += 1
        number = self._started.pop(n, None)
        if number is None:
            self._live[trial_id], values, config = self._begin(n)
            if self._follows:
                self._notice(n, Entrant(n, "running"))
        else:
            live = self._live[trial_id] = self._continued(n, number)
            values, config = self._proposal(n, live.trial)
        if config is None:
            assert isinstance(self.space, PlainSpace), f"{self.space=}"
            return self.space.filled(values)
        name = _name_of(n, config)
        assignment = Assignment(
            number=n,
            name=name,
            epochs=config.epochs,
            parameters=values,
            metrics=self.space.search.measured,
            judged=tuple(self.space.rungs),
            directory=None if self.folder is None else self.folder / name,
            more=self.place,
        )
        return {SECTION: assignment.section(), **config.tree}

    def _begin(self, n: int) -> tuple[_Live, Values, TrainConfig | None]:
        """Ask a study for trial n, and note its name and number there."""
        g, k = self._deal(n)
        study, space = self._open()[g], self.space
        sampler = self._sampler(n, g, k)
        seen: Any = SeenStorage(self._storage, self._seen[g])
        # this model may take long, and others break the lock of a journal after 30 s
        is_slow = isinstance(space.sampler, Gp)
        with contextlib.nullcontext() if is_slow else together(self._storage):
            trial = Study(study.study_name, seen, sampler=sampler, pruner=study.pruner).ask()
            if isinstance(space.stopping, Hyperband):
                trial.set_user_attr("bracket", space.stopping.bracket(space.epochs, k))
            values, config = self._proposal(n, trial)
            trial.set_user_attr("name", _name_of(n, config))
            trial.set_user_attr("number", n)  # last: now the proposal is complete
        live = self._continued(n, trial.number)
        self._see(live)
        return live, values, config

    def _proposal(self, n: int, trial: Trial) -> tuple[Values, TrainConfig | None]:
        """Return the values of a trial, and its configuration; None for a plain dictionary."""
        branch, values = self.space.groups[self._group_of[n]].values(trial)
        return values, branch.config(values) if isinstance(self.space, Space) else None

    def _continued(self, n: int, number: int) -> _Live:
        """Return trial n, which its study has already under a number of its own."""
        study = self._open()[self._group_of[n]]
        trial = self._again(study, number)
        return _Live(study, trial, self._known(trial))

    def _known(self, trial: Trial) -> FrozenTrial:
        """Return what a study knows of one of its trials."""
        found: FrozenTrial = self._storage.get_trial(trial._trial_id)
        return found

    def on_trial_result(self, trial_id: str, result: Tree) -> None:
        """Write the epoch's value to the study."""
        live = self._live.get(trial_id)
        if live is None or not (self.pauses and live.stopped):  # judged once, by the scheduler
            self.report(trial_id, result)
        if live is not None:
            live.told = result.get("training_iteration")

    def on_trial_complete(
        self, trial_id: str, result: Tree | None = None, error: bool = False
    ) -> None:
        """Record in the study how the trial ended; repeating it changes nothing."""
        raise_own_error()
        live = self._live.get(trial_id)
        if live is None:
            return
        failed = self._failure(trial_id, result or {}, error)
        with together(self._storage):
            self._tell_end(live, result or {}, failed)
        del self._live[trial_id]
        self._notice_end(live)

    def _tell_end(self, live: _Live, result: Tree, failed: str) -> None:
        if not failed:
            self._put(live, result or live.last, is_last=True)
        if failed or not (result or live.last or live.reported):
            self._fail(live, failed or "ended without a result")
        elif result and self._is_whole(live, result):
            self._limit(live.trial, result)
            self._tell_values(live, {m: result.get(m) for m in self.space.search.metrics})
        else:
            self._limit(live.trial, result)
            live.tell(state=TrialState.PRUNED)

    def _limit(self, trial: Trial, metrics: Values) -> None:
        """Tell the study by how much a trial that ends exceeds its constraints."""
        limits = self.space.search.limits
        if not metrics or not limits:
            return
        # known already if the driver was killed between this and the end of the trial
        known = self._known(trial).constraints
        for name, excess in excesses(limits, metrics).items():
            if name not in known:
                trial.set_constraint(name, excess)

    def _fail(self, live: _Live, reason: str) -> None:
        live.trial.set_user_attr("reason", reason)
        live.tell(state=TrialState.FAIL)

    def _failure(self, trial_id: str, result: Tree, error: bool) -> str:
        """Return why a trial failed, or an empty text."""
        # with a value, the error is that of another repeat of a `Repeater`
        if error and not is_number(result.get(self.space.search.metric)):
            return self._errors.pop(trial_id, "") or _raised() or "its process was lost"
        return str(result.get("failed") or "")

    def _tell_values(self, live: _Live, values: Tree) -> None:
        """Record a trial of full length in the study: done, or failed if a value is no number."""
        bad = [
            f"{metric} is {_as_told(value)}"
            for metric, value in values.items()
            if not is_number(value)
        ]
        if bad:
            self._fail(live, ", ".join(bad))
        else:
            live.tell([as_number(value) for value in values.values()])

    def _is_whole(self, live: _Live, result: Tree) -> bool:
        """Return True if an ended trial has full length, by its epochs, by itself or by the user."""
        if not {"epoch", "training_iteration", "done"} & set(result):
            return True  # from a `Repeater`: the mean of trials that have ended
        told = live.told is not None and live.told == result.get(
            "training_iteration"
        )  # it ended after its last report
        by_itself = bool(result.get("done")) and (told or (self.judges and not live.stopped))
        by_itself = by_itself and not result.get(STOPPED_BY)
        epoch, last = (
            live.epochs.of(result),
            self.space.epochs - (1 if live.counts_from_0 else 0),
        )  # some count from 0
        return by_itself or bool(result.get(FULL_LENGTH)) or (epoch is not None and epoch >= last)

    def set_max_concurrency(self, max_concurrent: int) -> bool:
        """Take the limit of Ray's `ConcurrencyLimiter`, which would count paused trials."""
        if self._space is None or not self.pauses:
            return False
        self._most = max_concurrent
        return True

    def save(self, checkpoint_path: str) -> None:
        """Save which Tune trial belongs to which study trial; the study holds everything else."""
        numbers, further = dict[str, int](), dict[str, str]()
        for i, live in self._live.items():
            if live.run is None:
                numbers[i] = live.number
            else:
                further[i] = live.trial.user_attrs["name"]
        state: Tree = {"journal": str(self.journal), "trials": numbers}
        state |= {"further": further} if further else {}
        state |= {"paused": self._held} if self._held else {}
        if isinstance(self._space, PlainSpace) and not self._space.constants:
            # a restored Tuner does not say its param_space again
            state |= {"parameters": self._space.parameters_text}
        Path(checkpoint_path).write_text(json.dumps(state))

    def restore(self, checkpoint_path: str) -> None:
        """Continue from the study, with the trials that Tune resumes."""
        state = json.loads(Path(checkpoint_path).read_text())
        self._saved = state.get("trials", {})
        self._saved_paused = {int(n): i for n, i in state.get("paused", {}).items()}
        self._saved_further = state.get("further", {})
        if self._space is None and "parameters" in state:
            parameters = parameters_from(state["parameters"])
            self._take_space(plain_space({}, parameters, **self._plain, constants=False))
        if self.storage is None:
            drop_stale_locks(self.journal)  # of a killed driver
        self._studies = None
        self._open()

    def __getstate__(self) -> Tree:
        alive = object.__new__(OptunaSearcher)
        alive._forget()
        kept = {key: value for key, value in self.__dict__.items() if key not in alive.__dict__}
        return {**kept, "storage": self.storage and masked(self.storage)}

    def __setstate__(self, state: Tree) -> None:
        earlier: Tree = {
            "_space": state.get("space"),
            "_plain": {},
            "_told": (None, None),
            "_saved_paused": {},
            "_saved_further": {},
        }
        kept = {key: value for key, value in state.items() if key != "space"}
        self.__dict__.update({**earlier, "_points_given": [], **kept})
        self._forget()

    # --- called by scheduler and driver

    def report(self, trial_id: str, result: Tree) -> bool:
        """Write an epoch's value to the study, once; return True if the trial should stop here.

        A resumed trial reports its epochs again. They are known and judged, except for the last:
        the driver may have died before it stopped the trial.
        """
        live = self._live.get(trial_id)
        if live is None:
            return False
        with together(self._storage):
            return self._report(live, result)

    def _report(self, live: _Live, result: Tree) -> bool:
        fresh, live.last = self._put(live, result), result
        epoch = live.epochs.of(result)
        live.counts_from_0 |= epoch == 0
        if epoch is None or epoch >= self.space.epochs or live.run is not None:
            return False
        if self.pauses and self.judges:  # with another scheduler, nothing would pause
            value = as_number(result.get(self.space.search.metric))
            live.stopped = self._pauses_at(live, epoch, value)
            return live.stopped
        if self.space.search.more_metrics:
            live.stopped = self._stops_by_fronts(live, epoch, result)
            return live.stopped
        again = epoch == live.before and epoch in live.reported and epoch > live.judged
        if fresh or again:
            live.stopped = self._stops_at(live, epoch)
        return live.stopped and (fresh or again)

    def _stops_at(self, live: _Live, epoch: int) -> bool:
        """Return True if a trial should stop after an epoch of which the study has the value."""
        rungs = self._rungs[self._group_of[live.number]]
        if rungs is None:  # of Optuna's own pruner
            return bool(live.trial.should_prune())
        rung = rungs.at(live.bracket, epoch, live.reported - {epoch})
        if rung is None:
            return False
        if rungs.stops(live.bracket, live.number, rung):
            return True
        live.judged = epoch
        live.trial.set_user_attr("judged", epoch)
        return False

    def _stops_by_fronts(self, live: _Live, epoch: int, result: Tree) -> bool:
        """Return True if a trial should stop at a rung, by all metrics; note values and decision.

        Optuna keeps no intermediate values of several metrics, so they are attributes of the trial.
        """
        rung = max((r for r in self.space.rungs if r <= epoch), default=None)
        if rung is None:
            return False
        known = live.trial.user_attrs.get(_attribute_of(rung))
        if known is not None:  # a resumed trial reports its epochs again
            return known["epoch"] == epoch and not known["goes_on"]
        stopping = self.space.stopping
        assert isinstance(stopping, Halving), f"{stopping=}"
        told = [as_number(result.get(metric)) for metric in self.space.search.metrics]
        values = [value if is_number(value) else None for value in told]
        there = [t.user_attrs.get(_attribute_of(rung)) for t in self._numbered(live.study).values()]
        came = [about["values"] for about in there if about is not None] + [values]
        signs = [1.0 if mode == "max" else -1.0 for mode in self.space.search.modes]
        passes = fronts.goes_on(np.array(came, dtype=float) * signs, stopping.factor)
        about = {"epoch": epoch, "values": values, "goes_on": passes}
        live.trial.set_user_attr(_attribute_of(rung), about)
        return not passes

    # --- pausing

    @property
    def pauses(self) -> bool:
        """True if trials pause at rungs; then a True of `report` means: pause."""
        return isinstance(self.space.stopping, Pausing)

    def next_action(self) -> Action:
        """Return what to do with room for one more trial."""
        self._open()
        to_start = self.remaining()
        if self._todo:
            return Action("start")
        if not self.pauses and (to_start or self._further is None):
            return Action("start" if to_start else "end")
        if self._action is None:
            self._action = self._ladder.next_action(to_start)
            if self._action.what in ("wait", "end") and self._further is not None:
                self._action = self._next_further(self._further)
        return self._action

    def pause(self, trial_id: str) -> None:
        """Record that a trial has paused at the rung that it has reached."""
        live = self._live.pop(trial_id)
        n, rung = live.number, live.rung
        with together(self._storage):
            live.trial.set_user_attr("paused", rung)
            self._limit(live.trial, live.last)
            live.tell(state=TrialState.PRUNED)
        self._see(live)
        self._held[n] = trial_id
        self._notice(n, self._entrant(n, state="paused", rung=rung))

    def promoted(self) -> str | None:
        """Let the next paused trial of this session go on; return its id, or None: not now."""
        action = self.next_action()
        if action.what != "promote" or action.number not in self._held or not self._has_room():
            return None
        n = action.number
        trial_id = self._held[n]
        self._live[trial_id] = self._continued(n, self._attempt(n, action.rung))
        return trial_id

    def is_paused(self, trial_id: str) -> bool:
        """Return True if a trial of this session is known to be paused."""
        return trial_id not in self._live

    def finish(self) -> None:
        """Record that the paused trials are over: more trials of this search do not bring them back."""
        self.give_up(self.paused())

    def give_up(self, numbers: Iterable[int]) -> None:
        """Record that paused trials do not go on."""
        for g, study in enumerate(self._open()):
            known = self._ladder.numbers(g)
            mine = [n for n in numbers if n in known]
            if mine:
                study.set_user_attr("over", sorted({*study.user_attrs.get("over", []), *mine}))
            for n in mine:
                self._notice(n, self._entrant(n, state="over"))

    def paused(self) -> set[int]:
        """Return the numbers of the trials that are paused and may go on."""
        return self._ladder.paused()

    def _attempt(self, n: int, rung: int) -> int:
        """Add a paused trial to its study again, to run from a rung on; return its number there."""
        g = self._group_of[n]
        study, last = self._open()[g], self._seen[g].last(n)
        number = self._add(study, _running_again(last, promoted=rung))
        self._held.pop(n, None)
        self._notice(n, self._entrant(n, state="running"))
        return number

    def _add(self, study: Study, trial: FrozenTrial) -> int:
        """Add a trial to a study; return its number there."""
        study_id = self._storage.get_study_id_from_name(study.study_name)
        added: int = self._storage.get_trial(
            self._storage.create_new_trial(study_id, template_trial=trial)
        ).number
        return added

    def _pauses_at(self, live: _Live, epoch: int, value: float | None) -> bool:
        """Return True if a trial should pause after an epoch; note its value at a rung."""
        n = live.number
        rung = max((r for r in self.space.rungs if r <= epoch), default=0)
        seen = first_step(live.reported, self.space.rungs, rung)
        if rung <= live.promoted or seen not in (None, epoch):
            return False
        known = self._entrant(n)
        told = value if seen is not None and value is not None else math.nan
        here = dataclasses.replace(known, values={**known.values, rung: told})
        self._notice(n, dataclasses.replace(here, state="paused", rung=rung))
        goes_on = self.next_action() == Action("promote", n, rung)
        self._notice(n, here)
        if goes_on:
            live.trial.set_user_attr("promoted", rung)
            live.promoted = rung
        else:
            live.rung = rung
        return not goes_on

    def _entrant(self, n: int, **changes: Any) -> Entrant:
        return dataclasses.replace(self._ladder.entrant(self._group_of[n], n), **changes)

    @property
    def _follows(self) -> bool:
        """True if it matters which trials have ended, beside how many have begun."""
        return self.pauses or self._further is not None

    def _notice(self, n: int, entrant: Entrant) -> None:
        """Tell the rule for pausing what is now known of a trial."""
        self._ladder.put(self._group_of[n], entrant)
        self._action = None

    def _notice_end(self, live: _Live) -> None:
        """Take up how a trial has ended in its study."""
        if live.run is not None and self._further is not None:
            self._further.end(live.run)
            self._action = None
            return
        state = self._see(live).state
        if not self._follows:
            return
        ended: Any = "whole" if state == TrialState.COMPLETE else "over"
        self._notice(live.number, self._entrant(live.number, state=ended))

    def _see(self, live: _Live) -> FrozenTrial:
        """Let the samplers see a trial as its study knows it; return it."""
        known = self._known(live.trial)
        self._seen[self._group_of[live.number]].take(known)
        return known

    def _has_room(self) -> bool:
        return self._most is None or len(self._live) < self._most

    # --- further seeds of finalists

    def _next_further(self, further: FurtherSeeds) -> Action:
        """Return which finalist runs with a further seed, once its group's trials have ended."""
        settings = self.space.search.finalists
        assert settings is not None, "a search with further seeds"
        ended = [self._ladder.has_ended(g) for g in range(len(self.space.groups))]
        chosen = [n for g, over in enumerate(ended) if over for n in self._finalists(g, settings.k)]
        run = further.next(chosen, settings.seeds)
        if run is not None:
            return Action("further", run.number, further=run.further)
        return Action("end" if all(ended) and not further.is_running else "wait")

    def _finalists(self, g: int, k: int) -> list[int]:
        """Return the best k trials of each objective of a group."""
        group, study = self.space.groups[g], self._open()[g]
        found = []
        for n, trial in self._numbered(study).items():
            if trial.state != TrialState.COMPLETE:
                continue
            branch, _ = group.values(optuna.trial.FixedTrial(trial.params))
            met = all(excess <= 0 for excess in trial.constraints.values())
            found.append(Candidate(n, branch.objective, trial.values[0], met))
        return finalists(found, k, maximize=self.space.search.mode == "max")

    def _numbered(self, study: Study) -> dict[int, FrozenTrial]:
        """Return the trials of a study by number, of each the last attempt."""
        numbered = (t for t in _trials(study) if "number" in t.user_attrs)
        return {t.user_attrs["number"]: t for t in numbered}

    def _suggest_further(self, trial_id: str, run: FurtherSeed) -> Tree:
        """Return the configuration of a finalist with a further seed, and record that it begins."""
        assert isinstance(self.space, Space) and self.space.search.finalists, f"{self.space=}"
        g = self._group_of[run.number]
        trial = self._numbered(self._open()[g])[run.number]
        parameters, config = self.space.groups[g].propose(optuna.trial.FixedTrial(trial.params))
        config = config.model_copy(update={"seed": config.seed + run.further})
        of = str(trial.user_attrs["name"])
        name = f"{of}-seed{config.seed}"
        self._begin_further(trial_id, run, name)
        assignment = Assignment(
            number=run.number,
            name=name,
            epochs=config.epochs,
            parameters=parameters,
            seed_of=of,
            seeds=self.space.search.finalists.seeds,
            metrics=self.space.search.measured,
            directory=None if self.folder is None else self.folder / name,
            more=self.place,
        )
        return {SECTION: assignment.section(), **config.tree}

    def _begin_further(self, trial_id: str, run: FurtherSeed, name: str) -> None:
        assert self._further is not None, f"{run=}"
        number, study = self._further.begin(run, name), self._further.study
        trial = self._again(study, number)
        self._live[trial_id] = _Live(study, trial, self._known(trial), run)
        self._action = None

    def note_error(self, trial_id: str, error: BaseException | None) -> None:
        """Remember the exception that ended a trial."""
        if isinstance(error, RayTaskError):
            self._errors[trial_id] = readable(f"{type(error.cause).__name__}: {error.cause}")

    def number_of(self, trial_id: str) -> int:
        """Return the number of a running trial; 0 if it is not in a study."""
        live = self._live.get(trial_id)
        return 0 if live is None else live.number

    def remaining(self) -> int:
        """Return the number of trials still to be proposed, unfinished and new."""
        self._open()
        return len(self._todo) + self.space.search.most_trials - self._next

    def close(self) -> None:
        """Close the storage; the next access opens it again."""
        if self._studies is not None:
            close_storage(self._storage)
            self._studies = None

    def retry_failed(self) -> int:
        """Queue the failed trials again, with numbers, parameters and values; return their number."""
        studies = self._open()
        latest = {n: (study, t) for study in studies for n, t in self._numbered(study).items()}
        failed = [entry for entry in latest.values() if entry[1].state == TrialState.FAIL]
        for study, trial in failed:
            study.add_trial(_running_again(trial, attempt=trial.user_attrs.get("attempt", 1) + 1))
        self._take_stock(studies)
        further = 0 if self._further is None else self._further.retry_failed()
        return len(failed) + further

    def add_priors(self, priors: Sequence["Prior"]) -> None:
        """Add results of earlier experiments to the studies, each once.

        They have no number, so they are not trials of this experiment. They have no intermediate
        values, so they affect no rung and no median: values of trials that were stopped are
        missing.
        """
        studies = dict(zip([group.name for group in self.space.groups], self._open(), strict=True))
        for prior in priors:
            about = {"params": prior.params, "distributions": prior.distributions}
            about["constraints"] = excesses(self.space.search.limits, prior.metrics)
            self._add_once(studies[prior.group], prior.origin, values=prior.values, **about)

    def add_evaluated_point(
        self,
        parameters: Values,
        value: Any,
        error: bool = False,
        pruned: bool = False,
        intermediate_values: Sequence[float] | None = None,
    ) -> None:
        """Add a point that was evaluated elsewhere to the study, once; it is no trial of this search.

        Args:
            parameters: all searched parameters by name, with `objective` if there are several; or a
                whole configuration.
            value: of the metric; a list for several metrics. None if it failed.
            error: it failed.
            pruned: it was stopped early.
            intermediate_values: after epochs 1, 2, ...
        """
        if self.space.search.constraints:
            raise ConfigError(
                "add_evaluated_point: the space has constraints, and the point no values of their metrics; leave it out"
            )
        group, objective, values = point_in(self.space, parameters, whole=True)
        params, distributions = as_asked(group, objective, values)
        told = list(value) if isinstance(value, list | tuple) else [value]
        on_the_way = {
            epoch: as_number(v) for epoch, v in enumerate(intermediate_values or (), start=1)
        }
        state = _evaluated_state(error=error, pruned=pruned)
        whole = state == TrialState.COMPLETE
        if whole:
            self._check_values(told, value)
        if pruned and not error and not on_the_way and is_number(value):
            on_the_way = {1: as_number(value)}
        about = {
            "parameters": params,
            "values": told if whole else [],
            "on_the_way": on_the_way,
            "state": state.name,
        }
        origin = f"evaluated: {json.dumps(about, sort_keys=True, default=str)}"
        study = self._open()[self.space.groups.index(group)]
        self._add_once(
            study,
            origin,
            state=state,
            values=[as_number(v) for v in told] if whole else None,
            params=params,
            distributions=distributions,
            intermediate_values={} if self.space.search.more_metrics else on_the_way,
        )

    def _check_values(self, told: list[Any], value: Any) -> None:
        metrics = self.space.search.metrics
        if len(told) != len(metrics) or not all(is_number(v) for v in told):
            raise ConfigError(f"add_evaluated_point: a number for each of {metrics}, got {value!r}")

    def _add_once(self, study: Study, origin: str, **trial: Any) -> None:
        """Add a trial from elsewhere to a study that has none of this origin."""
        there = _trials(study)
        if all(known.user_attrs.get("prior") != origin for known in there):
            study.add_trial(create_trial(user_attrs={"prior": origin}, **trial))
            if self._seen:  # else the studies are being opened
                g = self._open().index(study)
                _look_at(_trials(study)[-1], self._seen[g], self._rungs[g])

    def is_over(self) -> bool:
        """Return True if no trial runs, and none will."""
        return not self._live and self.next_action().what == "end"

    def end_early(self, number: int, metrics: Values, *, name: str = "") -> None:
        """Record an unfinished trial of an earlier session as stopped; it is not proposed again.

        Args:
            metrics: those of its last epoch.
            name: of a run with a further seed.
        """
        self._open()
        if self._further is not None and (run := self._further.called(name)) is not None:
            self._further.end_early(run)
            self._action = None
            return
        known = self._started.pop(number, None)
        if known is not None:
            live = self._continued(number, known)
            with together(self._storage):
                self._put(live, dict(metrics), is_last=True)
                self._limit(live.trial, metrics)
                live.tell(state=TrialState.PRUNED)
            self._todo.remove(number)
            self._notice_end(live)
        elif number in self.paused():
            self.give_up({number})

    def waiting(self) -> set[int]:
        """Return the numbers of the trials that will be proposed again."""
        self._open()
        return set(self._todo)

    def known(self) -> dict[int, str]:
        """Return the names of all trials in the studies, by number."""
        trials = [t for study in self._open() for t in _trials(study)]
        return {
            t.user_attrs["number"]: str(t.user_attrs.get("name"))
            for t in trials
            if "number" in t.user_attrs
        } | self.outside()

    def names(self) -> set[str]:
        """Return the names of all trials in the studies, and of their runs with further seeds."""
        names = set(self.known().values())
        return names if self._further is None else names | self._further.names()

    def waiting_names(self) -> set[str]:
        """Return the names of the trials, and of runs with further seeds, that run again."""
        known = self.known()
        names = {known[n] for n in self.waiting() if n in known}
        return names if self._further is None else names | self._further.waiting()

    def recorded(self) -> list[Tree]:
        """Return the trees of these studies' spaces, mostly one. Release 0.1.0 recorded none."""
        noted = {
            str(tree)
            for study in self._open()
            if (tree := study.user_attrs.get("space")) is not None
        }
        trees = []
        for text in sorted(noted):
            with damaged(self.journal):
                trees.append(dict(parse_json(text)))
        return trees

    def studies(self) -> list[Study]:
        """Return the studies, one for each group of the space."""
        return self._open()

    def further_copies(self, outside: Sequence[int]) -> list[FrozenTrial]:
        """Return the runs with further seeds, for a space in which some trials lie outside."""
        self._open()
        return [] if self._further is None else list(self._further.copies(outside))

    def optuna_further(self) -> Study:
        """Return the study of the runs with further seeds, which is created where there is none."""
        self._open()
        return self._make_study(FURTHER) if self._further is None else self._further.study

    def optuna_storage(self) -> BaseStorage:
        """Return the storage of the studies."""
        self._open()
        storage: BaseStorage = self._storage
        return storage

    def _put(self, live: _Live, result: Tree, *, is_last: bool = False) -> bool:
        """Write a value that the study keeps; return True if it is new there and a number."""
        epoch, value = live.epochs.of(result), as_number(result.get(self.space.search.metric))
        if self.space.search.more_metrics:  # Optuna keeps no intermediate values then
            return False
        if epoch is None or not is_number(value) or epoch in live.reported:
            return False
        if not 0 <= epoch < END_OF_STEPS:  # a study has no such step; what a trial ends with counts
            return False
        if not (is_last or self._keeps(live, epoch)):
            return False
        rungs = None if live.run is not None else self._rungs[self._group_of[live.number]]
        rung = None if rungs is None else rungs.at(live.bracket, epoch, live.reported)
        if rungs is not None and rung is not None:
            rungs.take(live.bracket, live.number, rung, value)
        live.reported.add(epoch)
        live.trial.report(value, epoch)
        return True

    def _keeps(self, live: _Live, epoch: int) -> bool:
        """Return True if the study keeps the value of an epoch that is not the trial's last."""
        stopping = self.space.stopping
        if self.space.search.report == "all" or isinstance(stopping, Median):
            return True
        if not isinstance(stopping, Halving) or isinstance(stopping, Asha) or live.run is not None:
            return False
        rungs = self._brackets()[live.bracket]
        rung = max((r for r in rungs if r <= epoch), default=None)
        return rung is not None and first_step(live.reported, rungs, rung) is None

    # --- Optuna

    @without_collector()
    def _open(self) -> list[Study]:
        """Create or continue the studies, and queue their unfinished trials."""
        if self._studies is None:
            self._forget()
            if not self.space.search.metric:
                self.check_metric(caller_argument("run", "metric"), caller_argument("run", "mode"))
            if not self.space.search.metric:
                raise ConfigError(
                    "metric: none is named; OptunaSearcher(..., metric='val_loss', mode='min'), or the same two in "
                    "TuneConfig"
                )
            self._storage = (
                open_journal(self.journal) if self.storage is None else open_storage(self.storage)
            )
            with contextlib.nullcontext() if self.storage is None else database(self.storage):
                studies = self._make_studies()
                self._outside = self._read_outside()
                self._further = self._read_further()
            self._studies = studies
            if isinstance(self.space, Space):
                self.add_priors(prior_trials(self.space, self.priors))
            self._take_stock(studies)
            for trial_id, n in self._saved.items():
                self._take_up(trial_id, n)
            paused = self.paused()
            self._held = {n: i for n, i in self._saved_paused.items() if n in paused}
            for trial_id, name in self._saved_further.items():
                self._take_up_further(trial_id, name)
            self._saved, self._saved_paused, self._saved_further = {}, {}, {}
        return self._studies

    def _make_studies(self) -> list[Study]:
        """Create or load the studies; record their space in them, so that edits are detected."""
        directions = {"max": "maximize", "min": "minimize"}
        record = json.dumps(self.space.tree)
        self._refuse_another_dictionary(record)
        studies = [
            optuna.create_study(
                storage=self._storage,
                study_name=f"{self.study}/{group.name}",
                directions=[directions[mode] for mode in self.space.search.modes],
                sampler=samplers.RandomSampler(seed=0),  # not asked: each proposal has its own
                pruner=self._pruner(),
                load_if_exists=True,
            )
            for group in self.space.groups
        ]
        for study in studies:
            if "space" not in study.user_attrs and not _trials(study):
                study.set_user_attr("space", record)
        return studies

    def _read_outside(self) -> list[FrozenTrial]:
        """Return the trials that this space leaves out; there are none before it was changed."""
        name = f"{self.study}/{OUTSIDE}"
        is_first = study_and_space(self.study)[1] == 1
        if is_first or name not in optuna.study.get_all_study_names(self._storage):
            return []
        study = optuna.load_study(study_name=name, storage=self._storage)
        return list(_trials(study))

    def make_outside(self) -> Study:
        """Create the study of the trials that this space leaves out."""
        self._open()
        return self._make_study(OUTSIDE)

    def _make_study(self, name: str) -> Study:
        """Create or continue a study that no sampler reads."""
        return optuna.create_study(
            storage=self._storage,
            study_name=f"{self.study}/{name}",
            directions=[{"max": "maximize", "min": "minimize"}[m] for m in self.space.search.modes],
            sampler=samplers.RandomSampler(seed=0),
            load_if_exists=True,
        )

    def _read_further(self) -> FurtherSeeds | None:
        """Return the runs of finalists with further seeds; None if the space asks for none."""
        if self.space.search.finalists is None:
            return None
        return FurtherSeeds(self._make_study(FURTHER))

    def outside(self) -> dict[int, str]:
        """Return the names of the trials that this space leaves out, by number."""
        self._open()
        numbered = [t.user_attrs for t in self._outside if "number" in t.user_attrs]
        return {about["number"]: str(about.get("name")) for about in numbered}

    def configured(self) -> Iterator[tuple[FrozenTrial, TrainConfig]]:
        """Yield all trials, also those left out and of earlier experiments, with configurations."""
        for group, study in zip(self.space.groups, self.studies(), strict=True):
            for trial in _trials(study):
                if "number" in trial.user_attrs or "prior" in trial.user_attrs:
                    _, config = group.propose(optuna.trial.FixedTrial(trial.params))
                    yield trial, config
        for trial in self._outside:
            with damaged(self.journal):
                yield trial, validated(TrainConfig, parse_json(trial.user_attrs["config"]))

    def _refuse_another_dictionary(self, record: str) -> None:
        """Raise if the storage has this study of another plain dictionary, before it is changed."""
        name = f"{self.study}/{self.space.groups[0].name}"
        if isinstance(self.space, Space) or name not in optuna.study.get_all_study_names(
            self._storage
        ):
            return
        there = optuna.load_study(study_name=name, storage=self._storage).user_attrs.get("space")
        if there != record:
            where = self.journal.name if self.storage is None else shown(self.storage)
            raise ConfigError(
                f"{where}: its study {self.study!r} searches another space: {there}, and this one is {record}; give "
                "OptunaSearcher another journal, or another study"
            )

    def _take_stock(self, studies: Sequence[Study]) -> None:
        """Read the studies: trial numbers, their groups, and the trials that must run (again)."""
        latest = self._latest_attempts(studies)
        self._started = {
            n: trial.number for n, trial in latest.items() if not trial.state.is_finished()
        }
        self._next = max(latest, default=-1) + 1
        self._todo = sorted({*self._started, *(n for n in range(self._next) if n not in latest)})
        self._counts = collections.Counter(self._group_of.values())
        self._look(studies)
        self._fill_ladder(studies, latest)
        self._action = None

    def _latest_attempts(self, studies: Sequence[Study]) -> dict[int, FrozenTrial]:
        """Return the last attempt at each trial, by number, and note its group.

        An incomplete proposal has failed.
        """
        latest: dict[int, FrozenTrial] = {}
        for g, study in enumerate(studies):
            for trial in _trials(study):
                n = trial.user_attrs.get("number")
                if n is not None:
                    latest[n], self._group_of[n] = trial, g
                elif trial.state == TrialState.RUNNING:
                    study.tell(trial.number, state=TrialState.FAIL)
        places = {group.name: g for g, group in enumerate(self.space.groups)}
        for trial in self._outside:  # they have ended, and count for their group
            n = trial.user_attrs.get("number")
            if n is not None:
                latest[n], self._group_of[n] = trial, places.get(trial.user_attrs["group"], -1)
        return latest

    def _fill_ladder(self, studies: Sequence[Study], latest: Mapping[int, FrozenTrial]) -> None:
        """Take up what pausing halving sees of the trials."""
        factor, maximize = (
            getattr(self.space.stopping, "factor", 1),
            self.space.search.mode == "max",
        )
        rungs = self.space.rungs if self.pauses else []
        self._ladder = Ladder(len(studies), rungs, factor, maximize=maximize)
        outside = {t.user_attrs.get("number") for t in self._outside}
        over = {n for study in studies for n in study.user_attrs.get("over", [])}
        for n, trial in latest.items():
            if self._follows and n not in outside:
                entrant = _as_entrant(trial, self.space.rungs, over=n in over)
                self._ladder.put(self._group_of[n], entrant)

    def _look(self, studies: Sequence[Study]) -> None:
        """Take up what samplers and rungs see of the studies."""
        limited = not isinstance(self.space.sampler, CmaEs)
        self._seen = [Seen(study.directions, limited=limited) for study in studies]
        self._rungs = [self._new_rungs() for _ in studies]
        for study, seen, rungs in zip(studies, self._seen, self._rungs, strict=True):
            for trial in _trials(study):
                _look_at(trial, seen, rungs)

    def _new_rungs(self) -> Rungs | None:
        """Return the rungs of a group, of which nothing is known yet; None if none of ours judge."""
        stopping, maximize = self.space.stopping, self.space.search.mode == "max"
        if not isinstance(stopping, Halving) or isinstance(stopping, Asha | Pausing):
            return None
        return Rungs(self._brackets(), stopping.factor, maximize=maximize)

    def _brackets(self) -> list[list[int]]:
        """Return the rungs of each halving."""
        stopping, epochs = self.space.stopping, self.space.epochs
        if isinstance(stopping, Hyperband):
            return stopping.brackets(epochs)
        return [stopping.rungs(epochs)]

    def _take_up(self, trial_id: str, n: int) -> None:
        """Leave an unfinished trial to Tune, which resumes it under its old id."""
        number = self._started.pop(n, None)
        if number is None:
            return
        self._todo.remove(n)
        self._live[trial_id] = self._continued(n, number)

    def _take_up_further(self, trial_id: str, name: str) -> None:
        """Leave an unfinished run with a further seed to Tune, which resumes it under its old id."""
        run = None if self._further is None else self._further.called(name)
        if run is not None and self._further is not None and name in self._further.waiting():
            self._begin_further(trial_id, run, name)

    def _deal(self, n: int) -> tuple[int, int]:
        """Return (the smallest group, which gets trial n; the number of earlier trials in it)."""
        newest = len(self._group_of) == n  # no number is missing before it
        counts = (
            self._counts
            if newest
            else collections.Counter(g for m, g in self._group_of.items() if m < n)
        )
        groups = self.space.groups
        sizes = [g.grid_size if isinstance(self.space.sampler, Grid) else None for g in groups]
        room = [g for g, size in enumerate(sizes) if size is None or counts[g] < size]
        g = min(room, key=lambda g: (counts[g], g))
        k = counts[g]
        self._group_of[n] = g
        self._counts[g] += 1
        return g, k

    def _again(self, study: Study, number: int) -> Trial:
        """Return a trial of an earlier session, which returns the parameters that it got then."""
        study_id = self._storage.get_study_id_from_name(study.study_name)
        return Trial(study, self._storage.get_trial_id_from_study_id_trial_number(study_id, number))

    def _sampler(self, n: int, g: int, k: int) -> samplers.BaseSampler:
        """Return the sampler of trial n, the k-th of its group."""
        search, group = self.space.search, self.space.groups[g]
        settings, seed = search.sampler, address(search.seed, "proposal", n) % 2**32
        random = samplers.RandomSampler(seed=seed)
        if g not in self._warm:
            published = group_points(self.space, group) if isinstance(self.space, Space) else []
            told = [group.told(branch_of(group, p.objective), p.values) for p in published]
            points = self._given.get(group.name, [])
            self._warm[g] = [*points, *(point for point in told if point not in points)]
        given = self._warm[g][k] if k < len(self._warm[g]) else None
        share = share_of(self.space)
        startup = getattr(settings, "startup", None) or min(STARTUP, max(3, share // 2))
        if given is None and (
            isinstance(settings, Qmc | Grid) or self._begins_evenly(g, k < startup)
        ):
            given = self._point(g, k)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            if given is not None:
                return samplers.PartialFixedSampler(given, random)
            if isinstance(settings, Tpe):
                return samplers.TPESampler(
                    seed=seed,
                    multivariate=settings.multivariate,
                    group=settings.multivariate and group.conditional,
                    constant_liar=True,
                    n_startup_trials=startup,
                    n_ei_candidates=settings.candidates,
                )
            if isinstance(settings, Gp):
                return samplers.GPSampler(
                    seed=seed, n_startup_trials=startup, warn_independent_sampling=False
                )
            if isinstance(settings, CmaEs):
                return samplers.CmaEsSampler(
                    seed=seed,
                    n_startup_trials=settings.startup,
                    popsize=settings.population,
                    warn_independent_sampling=False,
                )
        return random

    def _begins_evenly(self, g: int, early: bool) -> bool:
        """Return True if a model starts with quasi-random points: one branch, no results yet."""
        modelled = isinstance(self.space.sampler, Tpe | Gp)
        if not (early and modelled and len(self.space.groups[g].branches) == 1):
            return False
        return all("prior" not in t.user_attrs for t in _trials(self._open()[g]))

    def _point(self, g: int, k: int) -> Tree:
        """Return point k of a sampler that ignores values, as Optuna gives it to a study in memory.

        It depends on k alone, whatever the real study contains: priors, attempts, incomplete
        proposals.
        """
        search, group = self.space.search, self.space.groups[g]
        points = self._points.setdefault(g, [])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            if g not in self._dealt:
                seed = address(search.seed, "points", g) % 2**32
                sampler = (
                    samplers.QMCSampler(
                        qmc_type=getattr(search.sampler, "kind", "sobol"),
                        scramble=True,
                        seed=seed,
                        warn_independent_sampling=False,
                    )
                    if not isinstance(search.sampler, Grid)
                    else samplers.GridSampler(group.grid or {}, seed=seed)
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

    def _pruner(self) -> pruners.BasePruner:
        """Return Optuna's pruner, where it has one of this kind; `Rungs` judges the others."""
        stopping, epochs = self.space.stopping, self.space.epochs
        if isinstance(stopping, Median):
            every = stopping.rungs(epochs)[:1] or [epochs]
            return pruners.MedianPruner(
                n_startup_trials=stopping.startup,
                n_min_trials=stopping.startup,  # priors have no intermediate values
                n_warmup_steps=every[0],
                interval_steps=every[0],
            )
        return pruners.NopPruner()


def _attribute_of(rung: int) -> str:
    """Return the attribute of a trial with its values of several metrics at a rung."""
    return f"at epoch {rung}"


def _trials(study: Study) -> Any:
    return study.get_trials(deepcopy=False)


def _look_at(trial: FrozenTrial, seen: Seen, rungs: Rungs | None) -> None:
    """Take up what a sampler and the rungs see of a trial."""
    seen.take(trial)
    if rungs is not None and trial.intermediate_values:
        about = trial.user_attrs
        who = about.get("number", (trial.number,))
        rungs.take_all(about.get("bracket", 0), who, trial.intermediate_values)


def _name_of(n: int, config: TrainConfig | None) -> str:
    return f"t{n:04d}" if config is None else f"t{n:04d}-{config.objective.called}"


def _as_told(value: Any) -> str:
    """Return a value that is no number, for a sentence; a text, which may look like one, in quotes."""
    return f"the text {value!r}" if isinstance(value, str) else str(value)


def _raised() -> str | None:
    """Return the exception of the trial that Tune reports as failed, if the trial raised it."""
    error = caller_argument("_process_trial_failure", "exception")
    return (
        f"{type(error.cause).__name__}: {error.cause}" if isinstance(error, RayTaskError) else None
    )


def _running_again(trial: FrozenTrial, **about: Any) -> FrozenTrial:
    """Return another attempt at a trial that has ended, with its parameters and values."""
    kept = {k: v for k, v in trial.user_attrs.items() if k != "reason"}
    return create_trial(
        state=TrialState.RUNNING,
        params=trial.params,
        distributions=trial.distributions,
        user_attrs={**kept, **about},
        intermediate_values=trial.intermediate_values,
    )


def _as_entrant(trial: FrozenTrial, rungs: Sequence[int], *, over: bool) -> Entrant:
    """Return what pausing halving sees of a trial, the last attempt of its number.

    Args:
        over: the trial does not go on, even if it has paused.
    """
    about, values = trial.user_attrs, trial.intermediate_values
    n, rung = about["number"], about.get("paused", 0)
    found = {r: values[step] for r in rungs if (step := first_step(values, rungs, r)) is not None}
    if not trial.state.is_finished():
        return Entrant(n, "running", found, rung)
    if trial.state == TrialState.COMPLETE:
        return Entrant(n, "whole", found, rung)
    waits = trial.state == TrialState.PRUNED and rung > about.get("promoted", 0) and not over
    if rung > about.get("promoted", 0):
        found.setdefault(rung, math.nan)
    return Entrant(n, "paused" if waits else "over", found, rung)


class StudyStopping(FIFOScheduler):  # type: ignore[misc]
    """Stops or pauses trials as the searcher's study decides, so rungs survive a driver's crash."""

    def __init__(self, searcher: OptunaSearcher) -> None:
        check_kind(searcher, OptunaSearcher, "searcher")
        super().__init__()
        self.searcher = searcher

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        """Refuse a metric other than the space's."""
        self.searcher.check_metric(metric, mode)
        return True

    def on_trial_add(self, tune_controller: Any, trial: TuneTrial) -> None:
        """Let the searcher know that no other scheduler stops trials early."""
        self.searcher.judges = True

    def choose_trial_to_run(self, tune_controller: Any) -> TuneTrial | None:
        """Choose as FIFOScheduler does, without looking through all past trials each time.

        A paused trial is chosen when the studies promote it; when they end the search, it ends.
        """
        live = list(tune_controller.get_live_trials())
        if self.searcher.pauses:
            paused = {t.trial_id: t for t in live if t.status == TuneTrial.PAUSED}
            for trial_id in paused:
                if not self.searcher.is_paused(trial_id):
                    self.searcher.pause(trial_id)
            waiting = [t for t in live if t.status == TuneTrial.PENDING]
            if len(waiting) < _most_pending() and (chosen := self.searcher.promoted()):
                return paused[chosen]
            if not waiting and paused and self.searcher.next_action().what == "end":
                self.searcher.finish()
                for trial in paused.values():
                    tune_controller.stop_trial(trial)
            return min(waiting, key=self._number, default=None)
        waiting = [t for t in live if t.status in (TuneTrial.PENDING, TuneTrial.PAUSED)]
        return min(
            waiting,
            key=lambda t: (t.status == TuneTrial.PAUSED, self._number(t)),
            default=None,
        )

    def _number(self, trial: TuneTrial) -> int:
        """Return a trial's number; a plain dictionary does not hold it, and the study does."""
        assignment = Assignment.find(trial.config)
        return self.searcher.number_of(trial.trial_id) if assignment is None else assignment.number

    def on_trial_error(self, tune_controller: Any, trial: TuneTrial) -> None:
        """Pass the exception to the searcher, which otherwise learns only that a trial failed."""
        if trial.pickled_error_file is not None:  # just written by Tune
            self.searcher.note_error(
                trial.trial_id, cloudpickle.loads(Path(trial.pickled_error_file).read_bytes())
            )
        assignment = Assignment.find(trial.config)
        if assignment is not None and assignment.directory is not None:  # no trainable of a user's
            give_larger_share(trial)
            send_elsewhere(trial)
            report_each_epoch(trial)

    def on_trial_result(self, tune_controller: Any, trial: TuneTrial, result: Tree) -> str:
        """Return STOP at a rung if the trial is not among the best 1 / factor of its group.

        With `pausing`, return PAUSE.
        """
        if not self.searcher.report(trial.trial_id, result):
            return str(TrialScheduler.CONTINUE)
        return str(TrialScheduler.PAUSE if self.searcher.pauses else TrialScheduler.STOP)


def _most_pending() -> int:
    """Return how many trials Tune starts at a time; `tune.assemble` sets it."""
    told = os.environ.get("TUNE_MAX_PENDING_TRIALS_PG", "")
    return int(told) if told.isdigit() else 1


def take_saved_journal(journal: Path) -> bool:
    """Restore a lost journal from the copy that a search saved; return True if there was a copy."""
    saved = journal.with_name(journal.name + SAVED)
    if saved.is_symlink() or not saved.is_file():
        return False
    if os.path.lexists(journal):
        journal.replace(journal.with_name(journal.name + REPLACED))
    saved.replace(journal)
    return True


def _refuse_arguments_of_plain_spaces(*given: Any) -> None:
    names = ("metric", "mode", "epochs", "search")
    wrong = [name for name, value in zip(names, given, strict=True) if value is not None]
    if wrong:
        raise ConfigError(
            f"{name}: the space says it already; leave it out (it is of plain dictionaries)"
            for name in wrong
        )


def _check_plain(
    space: object, epochs: object, folder: object, place: object, priors: object
) -> None:
    """Raise a ConfigError for arguments that a plain dictionary cannot have, or lacks."""
    if space is not None:
        check_kind(space, Mapping, "space")
    problems = []
    if not isinstance(epochs, int) or isinstance(epochs, bool) or epochs < 1:
        problems.append(
            "epochs: how many results a trial of full length reports, OptunaSearcher(..., epochs=9), got "
            f"{epochs!r}"
        )
    for name, value in (("folder", folder), ("place", place), ("priors", priors)):
        if value:
            problems.append(f"{name}: only for spaces of this package, not for a plain dictionary")
    if problems:
        raise ConfigError(problems)


def _evaluated_state(*, error: bool, pruned: bool) -> TrialState:
    if error:
        return TrialState.FAIL
    return TrialState.PRUNED if pruned else TrialState.COMPLETE


def point_in(
    space: Space | PlainSpace, parameters: Values, *, whole: bool = False
) -> tuple[BranchGroup, str, Tree]:
    """Return (group, objective, values by parameter name) of a given point; all values if `whole`.

    A point is a whole configuration, or values by parameter name, with the `objective` if needed.
    """
    if isinstance(space, PlainSpace):
        given = space.point({k: v for k, v in parameters.items() if k != TRIAL_INDEX})
        _check_names(space, given)
        asked, problems = _against(space.branch, given, whole)
        if problems:
            raise ConfigError(f"a point: {problem}" for problem in problems)
        values = {name: given[name] for name in asked if name in given}
        return space.groups[0], space.branch.objective, values
    given = {key: value for key, value in parameters.items() if key not in (SECTION, TRIAL_INDEX)}
    if isinstance(given.get("objective"), Mapping):
        config = validated(TrainConfig, given)
        place = placed(space, config)
        if isinstance(place, list):
            raise ConfigError(f"a point lies outside of the space: {problem}" for problem in place)
        return place[0], config.objective.called, place[1]
    objective = given.pop("objective", None)
    _check_names(space, given)
    problems = []
    for group in space.groups:
        for branch in group.branches:
            if objective not in (None, branch.objective):
                continue
            asked, wrong = _against(branch, given, whole)
            if not wrong:
                values = {name: given[name] for name in asked if name in given}
                return group, branch.objective, values
            problems += wrong
    known = ", ".join(b.objective for b in space.branches)
    problems = problems or [f"objective: {objective!r} is not among {known}"]
    raise ConfigError(f"a point: {problem}" for problem in dict.fromkeys(problems))


def _check_names(space: Searched, given: Values) -> None:
    names = {p.name for p in space.parameters}
    unknown = [name for name in given if name not in names]
    if unknown:
        raise ConfigError(
            f"a point: {name}: no such parameter; {did_you_mean(name, names)}" for name in unknown
        )


def _against(branch: Branch, given: Tree, whole: bool) -> tuple[list[str], list[str]]:
    """Return the names of the parameters that a branch asks a point for, and what is wrong."""
    filled = {p.name: p.domain.middle for p in branch.parameters} | given
    asked = list(branch.asked(filled))
    names = [p.name for p in asked]
    problems = [
        f"{p.name}: {filled[p.name]!r}, and the space has {p.domain}"
        for p in asked
        if not p.domain.contains(filled[p.name])
    ]
    lacking = [name for name in names if whole and name not in given]
    problems += [f"{name} is searched, and the point lacks it" for name in lacking]
    left = [name for name in given if name not in names]
    problems += [f"{n}: objective {branch.objective} has no such parameter then" for n in left]
    return names, problems


def given_points(space: Space | PlainSpace, points: Sequence[Values]) -> dict[str, list[Tree]]:
    """Return points by the name of their group, in the form of its sampler."""
    if points and isinstance(space.sampler, Grid):
        raise ConfigError(
            "points_to_evaluate: a grid is every combination once; leave them out, or choose a sampler"
        )
    found: dict[str, list[Tree]] = {}
    for point in points:
        group, objective, values = point_in(space, point)
        told = {"objective": objective} if len(group.branches) > 1 else {}
        for p in branch_of(group, objective).parameters:
            told |= p.domain.told(p.name, values[p.name]) if p.name in values else {}
        found.setdefault(group.name, []).append(told)
    share = share_of(space)
    for name, those in found.items():
        if len(those) > share:
            raise ConfigError(
                f"points_to_evaluate: {len(those)} of {name}, which gets {share} trials; raise num_samples"
            )
    return found


def copy_trials(old: OptunaSearcher, new: OptunaSearcher) -> None:
    """Replace the studies of a space by all trials of an earlier one, in which a sweep began.

    A value that was fixed before and is searched now becomes a parameter of the copied trials. A
    trial that lies outside goes to a study of its own, which no sampler and no rung reads.
    """
    assert isinstance(new.space, Space), f"{new.space=}"
    copies: list[tuple[int, str, FrozenTrial]] = []
    over = sorted({n for study in old.studies() for n in study.user_attrs.get("over", [])})
    for trial, config in old.configured():
        place = placed(new.space, config)
        number = trial.user_attrs.get("number", -1)
        if isinstance(place, list):
            copies.append((number, OUTSIDE, _outside_copy(new.space, trial, config)))
            continue
        params, distributions = as_asked(place[0], config.objective.called, place[1])
        told = {k: v for k, v in trial.user_attrs.items() if k not in OUTSIDE_ATTRS}
        copied = create_trial(
            state=trial.state,
            values=trial.values if trial.state == TrialState.COMPLETE else None,
            params=params,
            distributions=distributions,
            user_attrs=told,
            intermediate_values=trial.intermediate_values,
            constraints=trial.constraints,
        )
        copies.append((number, place[0].name, copied))
    for name in optuna.study.get_all_study_names(storage=old.optuna_storage()):
        if name.startswith(f"{new.study}/"):  # left by a crash
            optuna.delete_study(study_name=name, storage=old.optuna_storage())
    studies = dict(zip([g.name for g in new.space.groups], new.studies(), strict=True))
    outside = [number for number, name, _ in copies if name == OUTSIDE]
    for run in old.further_copies(outside):
        new.optuna_further().add_trial(run)
    if any(name == OUTSIDE for _, name, _ in copies):
        studies[OUTSIDE] = new.make_outside()
    for _, name, copied in sorted(copies, key=lambda entry: entry[0]):
        studies[name].add_trial(copied)
    for study in studies.values() if over else ():
        study.set_user_attr("over", over)
    old.close()
    new.close()


def _outside_copy(space: Space, trial: FrozenTrial, config: TrainConfig) -> FrozenTrial:
    """Return a trial that lies outside of a space, for the record; unfinished, it has ended.

    Its parameters are those of another space, so its configuration stands for them.
    """
    group = None  # an objective that the space leaves out
    for g in space.groups:
        if config.objective.called in (branch.objective for branch in g.branches):
            group = g.name
    about = dict(zip(OUTSIDE_ATTRS, (group, json.dumps(config.tree)), strict=True))
    return create_trial(
        state=trial.state if trial.state.is_finished() else TrialState.PRUNED,
        values=trial.values if trial.state == TrialState.COMPLETE else None,
        user_attrs={**trial.user_attrs, **about},
        intermediate_values=trial.intermediate_values,
        constraints=trial.constraints,
    )


def outside_of(
    searcher: OptunaSearcher, space: Space
) -> tuple[dict[int, str], dict[int, list[str]]]:
    """Return the numbered trials of a search that lie in another space, and those that do not.

    The first by name, the others with what differs.
    """
    inside: dict[int, str] = {}
    outside: dict[int, list[str]] = {}
    for trial, config in searcher.configured():
        if "number" not in trial.user_attrs:
            continue
        place, number = placed(space, config), trial.user_attrs["number"]
        if isinstance(place, list):
            outside[number] = place
        else:
            inside[number] = str(trial.user_attrs.get("name"))
    return inside, outside
