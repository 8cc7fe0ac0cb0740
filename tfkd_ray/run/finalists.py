"""Runs of finalists with further seeds, in a study of their own that no sampler and no rung reads.

The study holds all there is to know of them: which have begun, their values after every epoch, and
how they ended. `OptunaSearcher` proposes them once an objective's trials have ended.
"""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from optuna import Study
from optuna.trial import FrozenTrial, TrialState, create_trial

FURTHER = "(further seeds)"
"""Name of the study, after that of the others."""


class FurtherSeed(NamedTuple):
    """A finalist's run with a further seed."""

    number: int
    """Of the finalist."""
    further: int
    """1 is the seed after the finalist's own."""


class FurtherSeeds:
    """The runs of one study: those that have begun, run now, or must run again."""

    def __init__(self, study: Study) -> None:
        self.study = study
        self.take_stock()

    def take_stock(self) -> None:
        """Read the study: of each run the last attempt counts."""
        self._known = {_run_of(trial): trial.user_attrs["name"] for trial in self._trials()}
        latest = {_run_of(trial): trial for trial in self._trials()}
        self._unfinished: dict[FurtherSeed, int] = {
            run: trial.number for run, trial in latest.items() if not trial.state.is_finished()
        }
        self._running: set[FurtherSeed] = set()

    def next(self, numbers: Iterable[int], seeds: int) -> FurtherSeed | None:
        """Return the next run: one that an earlier session left, or a new one; None if all have begun.

        Args:
            numbers: the finalists, the first to run first.
            seeds: further seeds of each.
        """
        if self._unfinished:
            return min(self._unfinished)
        wanted = (FurtherSeed(n, k) for n in numbers for k in range(1, seeds + 1))
        return next((run for run in wanted if run not in self._known), None)

    def begin(self, run: FurtherSeed, name: str) -> int:
        """Record that a run begins, or goes on; return its number in the study."""
        number = self._unfinished.pop(run, None)
        if number is None:
            self.study.add_trial(_running(run, name))
            number = len(self._trials()) - 1
        self._known[run] = name
        self._running.add(run)
        return number

    def end(self, run: FurtherSeed) -> None:
        """Take up that a run has ended in the study."""
        self._running.discard(run)

    @property
    def is_running(self) -> bool:
        """True while a run that has begun in this session has not ended."""
        return bool(self._running)

    def names(self) -> set[str]:
        """Return the names of all runs."""
        return set(self._known.values())

    def waiting(self) -> set[str]:
        """Return the names of the runs that will be proposed again."""
        return {self._known[run] for run in self._unfinished}

    def called(self, name: str) -> FurtherSeed | None:
        """Return the run of this name; None if there is none."""
        return next((run for run, known in self._known.items() if known == name), None)

    def retry_failed(self) -> int:
        """Queue the runs whose last attempt failed, with their values so far; return their number."""
        latest = {_run_of(trial): trial for trial in self._trials()}
        failed = [trial for trial in latest.values() if trial.state == TrialState.FAIL]
        for trial in failed:
            again = _running(_run_of(trial), trial.user_attrs["name"], trial.intermediate_values)
            self.study.add_trial(again)
        self.take_stock()
        return len(failed)

    def end_early(self, run: FurtherSeed) -> None:
        """Record an unfinished run of an earlier session as stopped; it is not proposed again."""
        number = self._unfinished.pop(run, None)
        if number is not None:
            self.study.tell(number, state=TrialState.PRUNED, skip_if_finished=True)

    def copies(self, outside: Iterable[int]) -> Iterator[FrozenTrial]:
        """Yield all runs for a study of another space; of finalists outside of it, none goes on."""
        left_out = set(outside)
        for trial in self._trials():
            ended = trial.state.is_finished()
            stops = not ended and trial.user_attrs["number"] in left_out
            yield create_trial(
                state=TrialState.PRUNED if stops else trial.state,
                values=trial.values if trial.state == TrialState.COMPLETE else None,
                user_attrs=trial.user_attrs,
                intermediate_values=trial.intermediate_values,
            )

    def _trials(self) -> list[FrozenTrial]:
        trials: list[FrozenTrial] = self.study.get_trials(deepcopy=False)
        return trials


def _run_of(trial: FrozenTrial) -> FurtherSeed:
    return FurtherSeed(trial.user_attrs["number"], trial.user_attrs["further"])


def _running(run: FurtherSeed, name: str, values: Any = None) -> FrozenTrial:
    about = {"name": name, "number": run.number, "further": run.further}
    return create_trial(
        state=TrialState.RUNNING, user_attrs=about, intermediate_values=values or {}
    )
