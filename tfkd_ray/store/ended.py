"""A line for each trial that has ended or paused, so that readers of many trials open few files.

ended.jsonl is only read if there are more than `MANY_ENDED` trials. trial.json and metrics.jsonl stay the
truth: a line counts if the trial's folder is there, and a trial that begins again takes its line
back with a further one. A trial without a line (one that runs, or that a crash ended) is read from
its folder.
"""

import contextlib
import gc
import json
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from tfkd_ray.settings.files import opened, read_at_most
from tfkd_ray.settings.yaml import Numbers, Tree
from tfkd_ray.store.experiment import (
    MOST_EPOCHS,
    STATUSES,
    Record,
    append_line,
    damaged,
    gone_trials,
    is_json_number,
    parse_json,
    read_record,
    read_records,
    trials_folder,
    with_further,
    write_record,
)

ENDED = "ended.jsonl"
MOST_BYTES = 2**30
"""Most bytes of a list; 100,000 trials have 25 million."""
MANY_ENDED = 2_000
"""Most trials that readers read from their own folders."""


class Briefs(NamedTuple):
    """The trials of an experiment, in brief if there are many."""

    records: list[Record]
    """By number. In brief, one that has ended or paused has neither parameters (but its arm) nor
    configuration (but its epochs), and of its metrics one line: the last epoch with the values by
    which trials are judged, the `seconds` of all epochs, and when it `began` and `ended`."""
    gone: list[str]
    """Names of trials of the study whose folders are gone; of many, only those that are listed."""


def note_end(record: Record, last: Numbers, measured: Iterable[str]) -> None:
    """Add a trial that has ended or paused to its experiment's list.

    Args:
        last: metrics of its last epoch; with `seconds` of all its epochs, and when it `began`.
        measured: names of the metrics by which trials are judged.
    """
    kept = ("epoch", *measured, "seconds", "began")
    about = {
        "name": record.name,
        "number": record.number,
        "objective": record.objective,
        "status": record.status,
        "reason": record.reason,
        "lost": record.lost,
        "arm": record.parameters.get("arm"),
        "epochs": record.config.get("epochs"),
        "last": {name: last[name] for name in kept if name in last} | {"ended": time.time()},
    }
    if record.seed_of is not None:
        about |= {"seed_of": record.seed_of, "seeds": record.seeds, "seed": record.config["seed"]}
    append_line(_list_of(record.folder), json.dumps(about, separators=(",", ":")))


def end_record(record: Record, measured: Iterable[str]) -> None:
    """Write the end of a trial that no process runs, and list it.

    Args:
        record: the trial as it has ended, with the metrics of all its epochs.
        measured: as of `note_end`.
    """
    write_record(record)
    seconds = sum(metrics.get("seconds", 0.0) for metrics in record.metrics)
    note_end(record, {**record.last, "seconds": seconds}, measured)


def note_beginning(folder: Path) -> None:
    """Take a trial's line back: it begins again."""
    if _list_of(folder).exists():
        append_line(_list_of(folder), json.dumps({"name": folder.name, "status": "running"}))


def _list_of(folder: Path) -> Path:
    """Return the list of a trial's experiment."""
    return folder.parent.parent / ENDED


def are_many(experiment: Path) -> bool:
    """Return True if readers take the trials that have ended from their list."""
    if not (experiment / ENDED).exists():
        return False
    with contextlib.suppress(OSError), os.scandir(trials_folder(experiment)) as entries:
        return any(n > MANY_ENDED for n, _ in enumerate(_folders(entries), 1))
    return False


def read_briefs(experiment: Path, *, alive: bool = True) -> Briefs:
    """Read all trials, in brief if there are many; their runs with further seeds are in them.

    Args:
        alive: False: no driver runs the experiment, so of many, those that run were interrupted.
    """
    if not are_many(experiment):
        return Briefs(read_records(experiment), gone_trials(experiment))
    names, above = _folder_names(experiment), trials_folder(experiment)
    with without_collector():
        ended = _read_ended(experiment / ENDED)
        found: list[Record] = [_Brief(above, ended[name]) for name in ended if name in names]
    for name in names - ended.keys():
        if (above / name / "trial.json").exists():
            record = read_record(above / name)
            is_dead = record.status == "running" and not alive
            found.append(replace(record, status="interrupted") if is_dead else record)
    found = with_further(found)
    found.sort(key=lambda record: record.number)
    return Briefs(found, sorted(ended.keys() - names))


@contextlib.contextmanager
def without_collector() -> Iterator[None]:
    """Make many objects without Python's collector, which would look through all of them often."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class _Brief(Record):
    """A listed trial, in brief; of 100,000 lines, made in a second, so nothing is copied."""

    def __init__(self, above: Path, about: Tree) -> None:
        about["_above"] = above
        if "epoch" not in about["last"]:
            about["last"] = {}
        object.__setattr__(self, "__dict__", about)

    @property
    def last(self) -> Numbers:
        """Metrics of the last epoch by which trials are judged."""
        last: Numbers = self.__dict__["last"]
        return last

    @property
    def metrics(self) -> list[Numbers]:
        """The last epoch's line alone."""
        return [self.last] if self.last else []

    @property
    def config(self) -> Tree:
        """Its epochs, and the seed of a run with a further seed."""
        return {key: self.__dict__[key] for key in ("epochs", "seed") if key in self.__dict__}

    @property
    def parameters(self) -> Tree:
        """The arm of a comparison's run."""
        arm = self.__dict__["arm"]
        return {} if arm is None else {"arm": arm}

    @property
    def folder(self) -> Path:
        """The trial's folder."""
        above: Path = self.__dict__["_above"]
        return above / self.name

    def with_runs(self, further: tuple[Record, ...]) -> Record:
        """Return itself, with its runs with further seeds."""
        self.__dict__["further"] = further
        return self


def finished_names(experiment: Path) -> set[str]:
    """Return, of many trials, the names of those that have ended and did not fail."""
    if not are_many(experiment):
        return set()
    ended = _read_ended(experiment / ENDED)
    return {name for name, about in ended.items() if about["status"] in ("done", "stopped")}


def in_full(record: Record) -> Record:
    """Return a trial with all that its folder holds."""
    if not isinstance(record, _Brief):
        return record
    return replace(read_record(record.folder), further=record.further)


def _folder_names(experiment: Path) -> set[str]:
    """Return the names of the folders of trials."""
    try:
        with os.scandir(trials_folder(experiment)) as entries:
            return {entry.name for entry in _folders(entries)}
    except OSError:
        return set()


def _folders(entries: Iterable[os.DirEntry[str]]) -> Iterator[os.DirEntry[str]]:
    """Return the entries of a directory that are directories, and no links."""
    return (entry for entry in entries if entry.is_dir(follow_symlinks=False))


def _read_ended(path: Path) -> dict[str, Tree]:
    """Return the lines of listed trials, by name; the last line of a trial counts."""
    with damaged(path), opened(path, follow=False) as file:
        content, _, _ = bytes(read_at_most(file, MOST_BYTES)).rpartition(b"\n")  # one is unfinished
        try:
            lines = {about["name"]: about for about in _uncut_lines(content)}
            found = {name: about for name, about in lines.items() if about["status"] != "running"}
            are_trials = all(map(_is_trial, found.values()))
        except (KeyError, TypeError, AttributeError):
            are_trials = False
        if not are_trials:
            raise ValueError("a line is no trial; remove the file: the folders of trials hold all")
    return found


def _uncut_lines(lines: bytes) -> list[Tree]:
    """Return the lines, without those that a full disk or a lost machine has cut."""
    try:
        whole: list[Tree] = parse_json(b"[" + lines.replace(b"\n", b",") + b"]")
    except ValueError:
        whole = []
        for line in lines.split(b"\n"):
            with contextlib.suppress(ValueError):
                whole.append(parse_json(line))
    return whole


def _is_trial(about: Tree) -> bool:
    """Return whether a line has all that a record in brief needs."""
    text, number, last = about["objective"], about["number"], about["last"]
    if type(text) is not str or type(number) is not int or about["status"] not in STATUSES:
        return False
    if about["reason"] is not None and type(about["reason"]) is not str:
        return False
    numbers = (*last.values(), about["epochs"], about["lost"])
    are_numbers = all(map(is_json_number, numbers)) and 0 <= last.get("epoch", 0) <= MOST_EPOCHS
    is_whole = type(about["name"]) is str and are_numbers and "arm" in about
    if "seed_of" not in about:
        return is_whole
    seeds = {type(about["seeds"]), type(about["seed"])}
    return is_whole and type(about["seed_of"]) is str and seeds == {int}
