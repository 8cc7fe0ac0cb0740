"""The assignment of a trial: its number, name, parameters, and the places where it reads and writes.

In Ray's configuration of a trial it is a plain dictionary, the `trial` section: users' trainables read it there, and
states that Ray saved with earlier releases contain it. `Assignment.of` reads it, `section` makes it.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tfkd_ray.settings.errors import ConfigError
from tfkd_ray.settings.own_code import Place
from tfkd_ray.settings.yaml import Values
from tfkd_ray.store.storage import Directory, Storage, received

SECTION = "trial"
_REQUIRED = ("number", "name", "epochs", "parameters")
_LISTS = ("metrics", "avoid", "judged")
_OF_BUCKETS = ("store", "endpoint")


@dataclass(frozen=True)
class Assignment:
    """Values that this package's searchers assign to a trial, beside its training configuration."""

    name: str
    """For example t0007-tfkd_reg."""
    epochs: int
    """Epochs of a trial of full length."""
    number: int = 0
    parameters: Values = field(default_factory=dict)
    """Searched values by parameter name; in a comparison the run's arm and seed."""
    arm: str | None = None
    """The arm of a comparison's run."""
    seed_of: str | None = None
    """The trial of which this is a run with a further seed."""
    seeds: int | None = None
    """Number of further seeds that this trial gets."""
    metrics: tuple[str, ...] = ()
    """Metrics that every epoch must report, because the search judges by them."""
    storage: Storage | None = None
    """Folder for teachers and experiments. None: a user's own searcher did not set it."""
    directory: Path | None = None
    """Folder of its files: below the storage's, or absolute. None: a user's own trainable."""
    home: Place | None = None
    """Place of the user's own modules."""
    avoid: tuple[str, ...] = ()
    """Ids of the nodes on which the trial must not run."""
    judged: tuple[int, ...] = ()
    """Epochs after which the search may stop or pause the trial, so it waits for the answer."""
    more: Values = field(default_factory=dict)
    """Other keys of the section, unchanged: a searcher's `place`, or what a user added."""

    @classmethod
    def find(cls, config: Values) -> "Assignment | None":
        """Return the assignment in a trial's configuration; None if it has no such section."""
        section = config.get(SECTION)
        known = _FOUND.get(id(section))
        if known is not None and known[1] == section:
            return known[2]
        if not isinstance(section, Mapping) or not set(_REQUIRED) <= set(section):
            return None
        told = {name: value for name, value in section.items() if name in _KNOWN}
        for name in _LISTS:
            told[name] = tuple(told.get(name, ()))
        told["storage"] = received(section)
        if (directory := section.get("directory")) is not None:
            told["directory"] = Path(directory)
            place = section.get("storage", "")
            if told["directory"].is_relative_to(
                place
            ):  # the storage's folder may differ on this node
                told["directory"] = told["directory"].relative_to(place)
        more = {
            name: value for name, value in section.items() if name not in (*_KNOWN, *_OF_BUCKETS)
        }
        found = cls(**told, more=more)
        if len(_FOUND) >= MOST_FOUND:
            _FOUND.clear()
        _FOUND[id(section)] = (section, dict(section), found)
        return found

    @classmethod
    def of(cls, config: Values) -> "Assignment":
        """Return the assignment in a trial's configuration; raise a ConfigError where there is none."""
        found = cls.find(config)
        if found is None:
            raise ConfigError(
                f"{SECTION}: a trial needs {', '.join(_REQUIRED)} here, got {config.get(SECTION)!s:.80}; let "
                "OptunaSearcher propose it, or add what is missing"
            )
        return found

    def section(self) -> dict[str, Any]:
        """Return the plain dictionary for Ray's configuration; it omits unset values."""
        section = {name: getattr(self, name) for name in _KNOWN}
        for name in _LISTS:
            section[name] = list(section[name]) or None
        section["directory"] = None if self.directory is None else str(self.folder)
        section |= {} if self.storage is None else self.storage.wire()
        return {
            **self.more,
            **{name: value for name, value in section.items() if value is not None},
        }

    @property
    def folder(self) -> Path:
        """Return the trial's directory on this node; the trial must have one."""
        assert self.directory is not None, f"{self.name} has no directory"
        return self.directory if self.storage is None else self.storage.folder / self.directory

    @property
    def place(self) -> tuple[Storage, Path]:
        """Return (storage, trial directory) here. Without a storage there are no teachers."""
        return self.storage or Directory(self.folder), self.folder


MOST_FOUND = 4096
_FOUND: dict[int, tuple[Values, Values, Assignment]] = {}
"""The sections that were read last (which keeps their ids), their contents then, and assignments."""
_KNOWN = [f.name for f in dataclasses.fields(Assignment) if f.name != "more"]


def without_assignment(config: Values) -> dict[str, Any]:
    """Return the training configuration alone."""
    return {name: value for name, value in config.items() if name != SECTION}


def assigned(trial: Any) -> Assignment:
    """Return the assignment of one of Tune's trials."""
    return Assignment.of(trial.config)
