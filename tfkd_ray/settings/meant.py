"""What is meant by a setting that does not exist: one near it, or one of that name elsewhere.

It knows the settings by `KNOWN` in `known.py`, which `python docs/api.py` writes from the classes, so
that a wrong one is answered before they are imported.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from tfkd_ray.settings.errors import did_you_mean, dotted, near_to, some_of
from tfkd_ray.settings.known import KNOWN

CLOSED = ("data", "augment", "optim", "schedule", "teacher", "search")
"""Settings below which only those of `KNOWN` may stand, names of networks and losses aside."""
OTHER_NAMES = {
    "learning_rate": "lr",
    "wd": "weight_decay",
    "t": "temperature",
    "tau": "temperature",
    "temp": "temperature",
    "bs": "batch_size",
    "batchsize": "batch_size",
    "num_epochs": "epochs",
    "n_epochs": "epochs",
    "max_epochs": "epochs",
    "optimizer": "optim",
    "scheduler": "schedule",
    "dataset": "data",
    "loss": "objective",
    "n_trials": "num_samples",
}
"""Names that other programs and papers give to settings, in lower case."""
IN_RANGES = {"name", "low", "high", "log", "log_complement", "step", "choices"}


def settings_below(*path: str) -> set[str]:
    """Return the names of the settings below a path, of all classes that may stand there."""
    above = "".join(f"{part}." for part in path)
    return {name.removeprefix(above).partition(".")[0] for name in KNOWN if name.startswith(above)}


def places_of(word: str) -> list[str]:
    """Return where a setting of this name stands, the likeliest place first; its own path is one."""
    found = [name for name in KNOWN if name == word or name.endswith(f".{word}")]
    return sorted(found, key=lambda name: (name.startswith("teacher"), name.count("."), len(name)))


def no_such_setting(path: Sequence[str], known: Iterable[str]) -> str:
    """Return a sentence on a setting that does not exist; `known` are those that may stand there."""
    *above, word = path
    name, colon, value = word.partition(":")
    if colon and name in known:
        return (
            f"{dotted(path)}: no such setting; YAML needs a blank after the colon: {name}: {value}"
        )
    sentence, near = f"{dotted(path)}: no such setting", near_to(word, known)
    other = OTHER_NAMES.get(word.lower())
    if other is not None and (other in known or not above):
        word, near = other, other if other in known else None
    if near is None and not places_of(word):  # a letter more or less than a setting elsewhere
        word = near_to(word, {name.rpartition(".")[2] for name in KNOWN}, 0.8) or word
    places = _places_but(path, word)
    if near is not None and (above or not places):
        return f"{sentence}; did you mean {near!r}?"
    if not places:
        return f"{sentence}; {did_you_mean(word, known)}"
    return f"{sentence}; did you mean {_offered(places)}"


def _places_but(path: Sequence[str], word: str) -> list[str]:
    """Return where a setting of this name stands, but not at a path nor in the path's own part."""
    *above, _ = path
    if not above:
        return places_of(word)
    here = f".{'.'.join(path)}"
    found = [place for place in places_of(word) if not f".{place}".endswith(here)]
    # another kind of the same part may have it, which this one is not
    return [place for place in found if place.partition(".")[0] != above[0]]


def _offered(places: Sequence[str]) -> str:
    """Return the likeliest places of a setting, as the end of a question."""
    first, *others = places
    objectives = [place.split(".")[1] for place in places if place.startswith("objective.")]
    if first.startswith("objective.") and len(objectives) > 1:
        names = some_of(objectives)
        return f"{first!r}? The objectives {names} have it"
    if others and others[0].count(".") == first.count(".") and not others[0].startswith("teacher"):
        return f"{first!r}, or {others[0]!r}?"
    return f"{first!r}?"


def wrong_names(tree: dict[str, Any]) -> Iterator[str]:
    """Yield a sentence on each setting of a file that surely does not exist."""
    for key, below in tree.items():
        yield from _wrong_path([key])
        if isinstance(below, dict) and not (IN_RANGES - {"name"}) & below.keys():
            for part in below:
                yield from _wrong_path([key, part])
    given = tree.get("objective")
    for objective in given if isinstance(given, list) else [given]:
        if isinstance(objective, dict) and isinstance(objective.get("name"), str):
            for part in objective:
                yield from _wrong_path(["objective", objective["name"], part])


def wrong_words(tree: dict[str, Any], overrides: Iterable[str]) -> Iterator[str]:
    """Yield a sentence on each override of a file that sets what surely does not exist."""
    for text in overrides:
        key, equals, _ = text.partition("=")
        path, section = key.split("."), tree.get(key.partition(".")[0])
        if equals and all(path) and not (isinstance(section, dict) and "choices" in section):
            checked = path[:3] if path[0] == "objective" else path[:2]
            yield from (f"{problem} (in {text!r})" for problem in _wrong_path(checked))


def _wrong_path(path: list[str]) -> Iterator[str]:
    """Yield a sentence if no setting may have this path, of one or two names; of objectives, three."""
    if path[0] not in settings_below():
        yield no_such_setting(path[:1], settings_below())
    elif len(path) == 3:
        known = settings_below(*path[:2])
        if known and path[2] not in known | {"name"}:
            yield no_such_setting(path, known)
    elif len(path) > 1 and path[0] in CLOSED and not path[1].isdecimal():
        known = settings_below(path[0])
        if path[1] not in known | IN_RANGES:
            yield no_such_setting(path, known)
