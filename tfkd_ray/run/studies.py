"""Storages of Optuna's studies: the journal file, and databases with a URL."""

import copy
import dataclasses
import errno
import json
import os
import stat
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import optuna
from optuna import Study
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import BaseJournalBackend, JournalFileBackend
from optuna.trial import FrozenTrial
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from tfkd_ray.settings.errors import ConfigError
from tfkd_ray.settings.files import opened, whole_file
from tfkd_ray.settings.passwords import (
    FIRST_AT,
    HIDDEN,
    after_password,
    masked,
    shown,
    without_secrets,
)
from tfkd_ray.settings.yaml import Tree
from tfkd_ray.space.search_config import ENVIRONMENT
from tfkd_ray.space.space import Searched
from tfkd_ray.store.experiment import LONGEST_LINE, damaged, parse_json

AnySpace = TypeVar("AnySpace", bound=Searched)

# --- storages -------------------------------------------------------------------------------------


def open_journal(path: Path) -> BaseStorage:
    """Open Optuna's storage in a journal file; first cut off a half-written end that a crash left.

    Any other damage raises a ConfigError with the byte where it begins, and changes nothing.
    """
    if os.path.lexists(path):
        with damaged(path):
            _mend(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    backend = _Journal(path)
    backend.storage = JournalStorage(backend)
    return backend.storage


SAVED, REPLACED = ".saved", ".replaced"
"""Suffixes of a journal's name: the copy saved after a loss; the file that was replaced."""
JOURNAL_HEAD = 64
"""Number of bytes at the beginning that tell a shortened journal from a new one."""
JOURNAL_TAIL = 4096
"""Number of bytes at the end that identify a journal."""


class _Journal(JournalFileBackend):  # type: ignore[misc]
    """A journal that detects, before and after each access, that it was deleted, cut or replaced.

    It then saves the storage's content beside the file, and an OSError stops the sweep. Other
    processes may append to the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.storage: JournalStorage = None  # set by the caller that opens the storage
        self._head, self._end, self._tail = b"", 0, b""
        super().__init__(str(path))

    def read_logs(self, log_number_from: int) -> Iterable[Tree]:
        with self._watched():
            yield from super().read_logs(log_number_from)

    def append_logs(self, logs: list[Tree]) -> None:
        with self._watched():
            super().append_logs(logs)

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Check the file before and after it is used: it may be lost at any moment between."""
        self._check()
        try:
            yield
        except OSError:
            self._check()
            raise
        self._check()

    def _check(self) -> None:
        """Raise if the file has lost content, after saving that content."""
        what = self._changed()
        if what is None:
            return
        saved = self._path.with_name(self._path.name + SAVED)
        try:
            if not self._path.parent.is_dir():
                raise FileNotFoundError(errno.ENOENT, "its directory is gone")
            save_journal(self.storage, saved)
            kept = f"what the search knows is in {saved.name}, and resuming continues from there"
        except OSError as error:
            kept = f"what the search knows could not be saved beside it ({error.strerror})"
        raise OSError(errno.ESTALE, f"was {what} while the sweep ran; {kept}", str(self._path))

    def _changed(self) -> str | None:
        """Return how the file has lost content; or remember its end and return None."""
        try:
            file = os.open(self._path, os.O_RDONLY | os.O_NONBLOCK)
        except FileNotFoundError:
            return "deleted"
        except OSError as error:
            return f"made unreadable ({error.strerror})"
        try:
            about = os.fstat(file)
            if not stat.S_ISREG(about.st_mode):
                return "replaced by what is no file"
            if about.st_size < self._end:
                begins = os.pread(file, len(self._head), 0)
                if self._head.startswith(begins):
                    return "cut, or replaced by an older one,"
                return "deleted"  # as Optuna was about to append, which began the file anew
            if os.pread(file, len(self._tail), self._end - len(self._tail)) != self._tail:
                return "replaced by another one"
            self._end, start = about.st_size, max(0, about.st_size - JOURNAL_TAIL)
            self._tail = os.pread(file, self._end - start, start)
            self._head = os.pread(file, JOURNAL_HEAD, 0)
            return None
        finally:
            os.close(file)


def save_journal(storage: JournalStorage, path: Path) -> None:
    """Write a new journal with the storage's content in memory, atomically."""
    logs = _Logs()
    copy = JournalStorage(logs)
    for study in storage._replay_result.get_all_studies():  # in memory: its file is gone
        number = copy.create_new_study(study.directions, study.study_name)
        for key, value in study.user_attrs.items():
            copy.set_study_user_attr(number, key, value)
        for key, value in study.system_attrs.items():
            copy.set_study_system_attr(number, key, value)
        for trial in storage._replay_result.get_all_trials(study._study_id, states=None):
            copy.create_new_trial(number, template_trial=trial)
    with whole_file(path) as part, part.open("w") as file:
        file.writelines(json.dumps(log, separators=(",", ":")) + "\n" for log in logs.logs)
        file.flush()
        os.fsync(file.fileno())


class _Logs(BaseJournalBackend):  # type: ignore[misc]
    """A journal in memory."""

    def __init__(self) -> None:
        self.logs: list[Tree] = []

    def read_logs(self, log_number_from: int) -> Iterable[Tree]:
        return self.logs[log_number_from:]

    def append_logs(self, logs: list[Tree]) -> None:
        self.logs += logs


def _mend(path: Path) -> None:
    lines = _Lines(path)
    try:
        JournalStorage(lines)
    except (ConfigError, OSError):
        raise
    except Exception:  # Optuna raises any type for a damaged line
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
"""Maximum time that a living process takes to write to a journal."""


def drop_stale_locks(journal: Path) -> None:
    """Remove the locks of killed processes from Optuna's journal; wait for a lock in use."""
    began = time.monotonic()
    seen = _locks(journal)
    while (
        seen
        and time.monotonic() - began < LOCK_S
        and min(made for made, _ in seen) > time.time() - 60
    ):
        time.sleep(0.02)
        seen &= _locks(journal)
    for _, path in seen:
        path.unlink(missing_ok=True)


def _locks(journal: Path) -> set[tuple[float, Path]]:
    """Return (creation time, file) of every lock of a journal."""
    found = set()
    for path in journal.parent.glob(f"{journal.name}.lock*"):
        with suppress(FileNotFoundError):  # already released
            found.add((path.lstat().st_mtime, path))
    return found


class _Lines(BaseJournalBackend):  # type: ignore[misc]
    """A journal read line by line for a check; `line` is the last, from byte `start`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.start = self.end = 0
        self.line = self.tail = b""

    def read_logs(self, log_number_from: int) -> Iterable[Tree]:
        assert log_number_from == 0, f"{log_number_from=}"
        with opened(self._path) as file:
            while line := file.readline(LONGEST_LINE):
                if not line.endswith(b"\n") and len(line) < LONGEST_LINE:
                    self.tail = line
                    return
                self.start, self.end, self.line = self.end, self.end + len(line), line
                try:
                    log = parse_json(line)
                    if (
                        not line.endswith(b"\n")
                        or not isinstance(log, dict)
                        or not isinstance(log.get("op_code"), int)
                    ):
                        raise ValueError("no operation")
                except ValueError:
                    raise _corrupt(self._path, self.start, line) from None
                yield log

    def append_logs(self, logs: list[Tree]) -> None:
        raise AssertionError("only read here")


class EachOnce(BaseSampler):  # type: ignore[misc]
    """A sampler that sees each trial of a study once: what is known of it, not its attempts.

    A trial that was paused and goes on is a second attempt in its study. The sampler sees the last
    attempt that has ended, or the only one.
    """

    def __init__(self, sampler: BaseSampler, study: str, storage: BaseStorage) -> None:
        self._sampler, seen = sampler, _EachOnce(storage)
        self._study = Study(study, seen, sampler=sampler)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> Any:
        return self._sampler.infer_relative_search_space(self._study, trial)

    def sample_relative(self, study: Study, trial: FrozenTrial, search_space: Any) -> Any:
        return self._sampler.sample_relative(self._study, trial, search_space)

    def sample_independent(self, study: Study, trial: FrozenTrial, name: str, domain: Any) -> Any:
        return self._sampler.sample_independent(self._study, trial, name, domain)

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        self._sampler.before_trial(self._study, trial)


class _EachOnce:
    """A storage that hides attempts whose trial has a later one, or, while that runs, the later."""

    def __init__(self, storage: BaseStorage) -> None:
        self._storage = storage

    def __getattr__(self, name: str) -> Any:
        return getattr(self._storage, name)

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Any = None
    ) -> list[FrozenTrial]:
        """Return the trials of a study, each once."""
        found: dict[Any, FrozenTrial] = {}
        for trial in self._storage.get_all_trials(study_id, deepcopy=False):
            key = trial.user_attrs.get("number", (trial.number,))
            if trial.state.is_finished() or key not in found:
                found[key] = trial
        kept = [t for t in found.values() if states is None or t.state in states]
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
