"""What samplers see of Optuna's studies, and databases with a URL as their storage."""

import bisect
import copy
import dataclasses
import itertools
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias, TypeVar

import optuna
from optuna.storages import BaseStorage, RDBStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from tfkd_ray.settings.errors import ConfigError
from tfkd_ray.settings.passwords import (
    FIRST_AT,
    HIDDEN,
    after_password,
    masked,
    shown,
    without_secrets,
)
from tfkd_ray.space.search_config import ENVIRONMENT
from tfkd_ray.space.space import Searched

_Rank: TypeAlias = tuple[int, float, float]
AnySpace = TypeVar("AnySpace", bound=Searched)

BEST_SEEN, NEWEST_SEEN = 200, 800
"""Number of ended trials that a model sees of a study: the newest, and the best of the others."""


class Seen:
    """What a sampler sees of a study: each trial once, and of many the best and the newest.

    A trial that was paused and goes on is a second attempt in its study. Seen is the last attempt
    that has ended, or else the one that runs. What is seen is a function of the study, whatever the
    order in which its trials are taken.

    Optuna's TPE fits its good trials to 25 at most, all of which are among the best; of the others,
    it weighs the newest most. So its time for a proposal does not grow with the study.

    Args:
        directions: of the study.
        limited: False for a sampler that needs all trials.
    """

    def __init__(self, directions: Sequence[StudyDirection], *, limited: bool = True) -> None:
        self._signs = [-1 if d == StudyDirection.MAXIMIZE else 1 for d in directions]
        self._limited = limited
        self._running: dict[Any, FrozenTrial] = {}
        self._ended: dict[Any, FrozenTrial] = {}
        self._by_number: list[int] = []
        self._of_number: dict[int, FrozenTrial] = {}
        self._ranked: list[tuple[_Rank, int]] = []
        self._front: list[FrozenTrial] = []

    def take(self, trial: FrozenTrial) -> None:
        """Take up the state of a trial: of a new one, of one that has ended, of a new attempt."""
        key = trial.user_attrs.get("number", (trial.number,))
        if not trial.state.is_finished():
            self._running[key] = trial
            return
        if key in self._running and self._running[key].number <= trial.number:
            del self._running[key]
        known = self._ended.get(key)
        if known is not None and known.number > trial.number:
            return
        if known is not None:
            self._drop(known)
        self._ended[key] = trial
        if trial.state in (TrialState.COMPLETE, TrialState.PRUNED):
            bisect.insort(self._by_number, trial.number)
            self._of_number[trial.number] = trial
            self._rank(trial)

    def last(self, number: int) -> FrozenTrial:
        """Return the last attempt at a trial that has ended, by the trial's own number."""
        return self._ended[number]

    def trials(self) -> list[FrozenTrial]:
        """Return the trials that are seen, by their number in the study."""
        numbers = self._by_number
        if self._limited and len(numbers) > BEST_SEEN + NEWEST_SEEN:
            newest = numbers[-NEWEST_SEEN:]
            numbers = [*self._best(before=newest[0]), *newest]
        found = [self._of_number[number] for number in numbers]
        found += [t for key, t in self._running.items() if not self._has_values(key)]
        return sorted(found, key=lambda t: t.number)

    def _has_values(self, key: Any) -> bool:
        """Return True if an attempt at a trial has ended, and not failed."""
        return key in self._ended and self._ended[key].state != TrialState.FAIL

    def _best(self, before: int) -> list[int]:
        """Return the numbers of the best trials, of those with smaller numbers than the newest."""
        if len(self._signs) > 1:
            return [t.number for t in self._front if t.number < before][-BEST_SEEN:]
        older = (number for _, number in self._ranked if number < before)
        return list(itertools.islice(older, BEST_SEEN))

    def _rank(self, trial: FrozenTrial) -> None:
        if len(self._signs) == 1:
            bisect.insort(self._ranked, (self._place(trial), trial.number))
        elif trial.state == TrialState.COMPLETE and not _exceeded(trial):
            self._add_to_front(trial)

    def _add_to_front(self, trial: FrozenTrial) -> None:
        """Keep the trials of several metrics that no other beats in all of them."""
        if any(self._beats(other, trial) for other in self._front):
            return
        kept = [t for t in self._front if not self._beats(trial, t)]
        self._front = sorted([*kept, trial], key=lambda t: t.number)

    def _drop(self, trial: FrozenTrial) -> None:
        """Forget an attempt that a later one replaces."""
        if self._of_number.pop(trial.number, None) is None:
            return
        del self._by_number[bisect.bisect_left(self._by_number, trial.number)]
        if len(self._signs) == 1:
            place = self._place(trial), trial.number
            del self._ranked[bisect.bisect_left(self._ranked, place)]

    def _beats(self, a: FrozenTrial, b: FrozenTrial) -> bool:
        pairs = [(s * x, s * y) for s, x, y in zip(self._signs, a.values, b.values, strict=True)]
        return all(x <= y for x, y in pairs) and any(x < y for x, y in pairs)

    def _place(self, trial: FrozenTrial) -> _Rank:
        """Return a key that sorts trials as TPE ranks them, the best first.

        Those of full length, then those that went further, then those that exceed constraints.
        """
        if excess := _exceeded(trial):
            return (2, excess, 0.0)
        if trial.state == TrialState.COMPLETE:
            return (0, 0.0, self._signs[0] * float(trial.value))
        if not trial.intermediate_values:
            return (1, 1.0, 0.0)
        step = max(trial.intermediate_values)
        value = trial.intermediate_values[step]
        return (1, -float(step), math.inf if math.isnan(value) else self._signs[0] * value)


def _exceeded(trial: FrozenTrial) -> float:
    """Return by how much a trial exceeds its constraints."""
    return float(sum(value for value in trial.constraints.values() if value > 0))


class SeenStorage:
    """A study's storage as a sampler sees it: it holds the trials of a `Seen`."""

    def __init__(self, storage: BaseStorage, seen: Seen) -> None:
        self._storage, self._seen = storage, seen

    def __getattr__(self, name: str) -> Any:
        return getattr(self._storage, name)

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Any = None
    ) -> list[FrozenTrial]:
        """Return the trials that are seen, in some states; none waits."""
        if states == (TrialState.WAITING,):
            return []
        kept = [t for t in self._seen.trials() if states is None or t.state in states]
        return copy.deepcopy(kept) if deepcopy else kept


SQLITE_WAIT_S = 20.0
"""Maximum time to wait for another process that writes to an SQLite database."""


def open_storage(url: str) -> BaseStorage:
    """Open the Optuna storage at a URL; raise ConfigError if it cannot be reached."""
    kind = whole_url(url).partition(":")[0]
    wait = {"sqlite": {"timeout": SQLITE_WAIT_S}}.get(
        kind.partition("+")[0], {"connect_timeout": 10}
    )
    template = (
        whole_url(url).replace("{", "{{").replace("}", "}}")
    )  # Optuna inserts its version at the braces
    with database(url):
        return RDBStorage(template, engine_kwargs={"connect_args": wait})


@contextmanager
def database(url: str) -> Iterator[None]:
    """Turn a database's errors into a ConfigError."""
    whole = whole_url(url)
    told = shown(url)
    kind = whole.partition(":")[0]
    try:
        yield
    except ImportError as error:
        missing = getattr(error.__cause__ or error, "name", None) or kind
        package = {
            "psycopg": "'psycopg[binary]'",
            "psycopg2": "psycopg2-binary",
            "MySQLdb": "mysqlclient",
        }.get(missing)
        package = package or missing
        raise ConfigError(
            f"search.storage: {told} needs the package {package}, which is not here: pip install {package}"
        ) from None
    except (ArgumentError, ValueError):  # of SQLAlchemy, for a port that is no number
        raise ConfigError(
            f"search.storage: {told} is no URL of a database that SQLAlchemy knows"
        ) from None
    except (
        SQLAlchemyError,
        optuna.exceptions.StorageInternalError,
        RuntimeError,
        OSError,
        TypeError,
    ) as error:
        cause = error.__cause__ or error
        reason = str(getattr(cause, "orig", None) or cause).strip().splitlines()[0]
        raise ConfigError(
            f"search.storage: {told} cannot be used: {without_secrets(reason, [whole])}"
        ) from None


def close_storage(storage: BaseStorage) -> None:
    """Close a database's connections."""
    if isinstance(storage, RDBStorage):
        storage.remove_session()
        storage.engine.dispose()


def whole_url(url: str) -> str:
    """Return the URL with its password; *** is replaced by the password in TFKD_STORAGE."""
    if HIDDEN not in url:
        return url
    given = os.environ.get(ENVIRONMENT)
    if given is None:
        raise ConfigError(
            f"search.storage: the password of {url} is not kept; set {ENVIRONMENT} to the whole URL"
        )
    if "@" in after_password(given):
        raise ConfigError(f"search.storage: {ENVIRONMENT}: {FIRST_AT}")
    if masked(given) != url:
        raise ConfigError(
            f"search.storage: {ENVIRONMENT} is {shown(given)}, and the experiment's storage is {url}"
        )
    return given


def without_password(space: AnySpace) -> AnySpace:
    """Return the space with *** for its storage's password, safe to pickle, log and display."""
    url = space.search.storage
    if url is None or masked(url) == url:
        return space
    return dataclasses.replace(
        space, search=space.search.model_copy(update={"storage": masked(url)})
    )
