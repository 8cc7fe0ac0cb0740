"""Optuna's storage in a journal file, one operation a line, of which a sweep loses no line.

The driver is the only process that runs trials, but others may append to the file (a dashboard).
Operations of a block (`together`) are written at once, under one lock; what is set of a trial that
the block creates becomes part of the line that creates it. So a journal has few lines a trial, and
a sweep of 100,000 trials is opened in seconds. Optuna, and every tool for it, reads such a journal.
"""

import errno
import json
import os
import stat
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path

from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import BaseJournalBackend, JournalFileSymlinkLock
from optuna.trial import TrialState

from tfkd_ray.settings.errors import ConfigError
from tfkd_ray.settings.files import append_whole, opened, whole_file
from tfkd_ray.settings.yaml import Tree
from tfkd_ray.store.experiment import LONGEST_LINE, damaged, parse_json


def open_journal(path: Path) -> BaseStorage:
    """Open Optuna's storage in a journal file; first cut off a half-written end that a crash left.

    Any other damage raises a ConfigError with the byte where it begins, and changes nothing.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with damaged(path) if os.path.lexists(path) else nullcontext():
        if os.path.lexists(path):
            opened(path).close()  # raises if it is no file
        backend = _Journal(path)
        try:
            backend.storage = JournalStorage(backend)
        except (ConfigError, OSError):
            raise
        except Exception:  # Optuna raises any type for a damaged line
            raise _corrupt(path, backend.start, backend.line) from None
        backend.cut_tail()
    return backend.storage


def together(storage: BaseStorage) -> AbstractContextManager[None]:
    """Return a block whose operations a journal writes at once; a database writes each alone."""
    backend = getattr(storage, "_backend", None)
    return backend.together() if isinstance(backend, _Journal) else nullcontext()


SAVED, REPLACED = ".saved", ".replaced"
"""Suffixes of a journal's name: the copy saved after a loss; the file that was replaced."""
JOURNAL_HEAD = 64
"""Number of bytes at the beginning that tell a shortened journal from a new one."""
JOURNAL_TAIL = 4096
"""Number of bytes at the end that identify a journal."""


class _Journal(BaseJournalBackend):  # type: ignore[misc]
    """A journal that detects, before and after each access, that it was deleted, cut or replaced.

    It then saves the storage's content beside the file, and an OSError stops the sweep. Other
    processes may append to the file.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, JournalFileSymlinkLock(str(path))
        self.storage: JournalStorage = None  # set by the caller that opens the storage
        self._head, self._end, self._tail = b"", 0, b""
        self._read = 0
        """Number of bytes that the storage knows."""
        self.start, self.line, self._cut = 0, b"", b""
        """The line that was read last and the byte where it begins; a half-written line after it."""
        self._block: list[Tree] | None = None
        """Operations of the open block."""
        self._taken = 0
        """Number of them that the storage knows."""
        self._is_current = False
        """True if the storage knows all lines of the file, and the block has the lock."""
        if not os.path.lexists(path):
            path.open("ab").close()

    def read_logs(self, log_number_from: int) -> Iterable[Tree]:
        """Yield the operations that the storage does not know yet."""
        if not self._is_current:
            yield from self._unread()
            self._is_current = bool(self._block)
        while self._block is not None and self._taken < len(self._block):
            self._taken += 1
            yield self._block[self._taken - 1]

    def append_logs(self, logs: list[Tree]) -> None:
        """Write operations, or keep them until their block ends."""
        if self._block is None:
            with self._locked():
                self._write(logs)
            return
        as_read = [json.loads(json.dumps(log)) for log in logs]
        if not self._block:
            self._lock.acquire()
        self._block += as_read

    @contextmanager
    def together(self) -> Iterator[None]:
        """Write the operations of a block at once; a block inside of a block is part of it."""
        if self._block is not None:
            yield
            return
        self._block, self._taken = [], 0
        try:
            yield
        finally:
            logs, self._block, self._is_current = self._block, None, False
            if logs:
                with self._locked(acquire=False):
                    self._read = self._write(_with_new_trial(logs), after=self._read)

    @contextmanager
    def _locked(self, *, acquire: bool = True) -> Iterator[None]:
        if acquire:
            self._lock.acquire()
        try:
            yield
        finally:
            with suppress(RuntimeError):  # it went with the folder
                self._lock.release()

    def _write(self, logs: list[Tree], *, after: int | None = None) -> int:
        """Append operations; return the file's size, or raise if it has not the size `after`."""
        lines = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs).encode()
        with self._watched():
            file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
            try:
                size = os.fstat(file).st_size
                if after not in (None, size):
                    what = "another process wrote to it without its lock; resume the sweep"
                    raise OSError(errno.ESTALE, what, str(self._path))
                append_whole(file, lines)
                os.fsync(file)
            finally:
                os.close(file)
        return size + len(lines)

    def _unread(self) -> Iterator[Tree]:
        """Yield the operations of the file's new lines."""
        if self._check() == self._read:
            return
        with opened(self._path) as file:
            file.seek(self._read)
            while line := file.readline(LONGEST_LINE):
                self._cut = b"" if line.endswith(b"\n") else line
                if self._cut and len(line) < LONGEST_LINE:  # still being written, or cut
                    break
                self.start, self.line = self._read, line
                log = _operation(self._path, self.start, line)
                self._read += len(line)
                yield log
        self._check()

    def cut_tail(self) -> None:
        """Remove the half-written line that a crash has left; raise if it is something else."""
        if not self._cut:
            return
        if not self._cut.startswith(b'{"op_code"'[: len(self._cut)]):
            raise _corrupt(self._path, self._read, self._cut)
        os.truncate(self._path, self._read)
        self._end, self._tail, self._cut = 0, b"", b""

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

    def _check(self) -> int:
        """Return the file's size; raise if it has lost content, after saving that content."""
        what = self._changed()
        if what is None:
            return self._end
        saved = self._path.with_name(self._path.name + SAVED)
        try:
            if not self._path.parent.is_dir():
                raise FileNotFoundError(errno.ENOENT, "its directory is gone")
            save_journal(self.storage, saved)
            kept = f"the state of the search is in {saved.name}, and resume continues from there"
        except OSError as error:
            kept = f"the state of the search could not be saved beside it ({error.strerror})"
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


_CREATE, _PARAMETER, _USER_ATTR, _SYSTEM_ATTR = (4, 5, 8, 9)
"""Optuna's codes of the operations that create a trial, and that set one thing of it."""


def _with_new_trial(logs: list[Tree]) -> list[Tree]:
    """Return operations in which a trial is created with all that they set of it afterwards.

    Nothing is changed if they are about more than one new trial.
    """
    created = logs[0]
    others = {log["trial_id"] for log in logs[1:] if "trial_id" in log}
    is_new = created["op_code"] == _CREATE and "state" not in created
    if not is_new or len(others) > 1 or any(log["op_code"] == _CREATE for log in logs[1:]):
        return logs
    whole = {**created, "state": TrialState.RUNNING, "params": {}, "distributions": {}}
    whole |= {"user_attrs": {}, "system_attrs": {}, "intermediate_values": {}}
    rest = []
    for log in logs[1:]:
        if log["op_code"] == _PARAMETER:
            whole["params"][log["param_name"]] = log["param_value_internal"]
            whole["distributions"][log["param_name"]] = log["distribution"]
        elif log["op_code"] == _USER_ATTR:
            whole["user_attrs"] |= log["user_attr"]
        elif log["op_code"] == _SYSTEM_ATTR:
            whole["system_attrs"] |= log["system_attr"]
        else:
            rest.append(log)
    return [whole, *rest]


def _operation(path: Path, start: int, line: bytes) -> Tree:
    """Return the operation in a line of a journal; raise a ConfigError if there is none."""
    try:
        log = parse_json(line)
    except ValueError:
        log = None
    if not line.endswith(b"\n") or not isinstance(log, dict):
        raise _corrupt(path, start, line)
    if not isinstance(log.get("op_code"), int):
        raise _corrupt(path, start, line)
    return log


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
