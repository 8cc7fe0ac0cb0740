"""Which words of a command line a problem comes from: those without which it is not there."""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from tfkd_ray.settings.errors import ConfigError
from tfkd_ray.settings.passwords import shown_override

MOST_WORDS = 20
"""Most overrides that are left out one by one, each of which takes about 0.1 s."""
COMMAND_LINE = "command line"
"""Source of the problems of overrides."""
Build = Callable[[Sequence[str]], object]
"""Builds a space, or arms, from a file and some overrides."""


def blamed(error: ConfigError, path: Path, overrides: Sequence[str], build: Build) -> ConfigError:
    """Return the error of a file with overrides; problems of overrides name them.

    An error of overrides alone has the command line as its source, not the file.
    """
    words = list(dict.fromkeys(overrides))[:MOST_WORDS]
    without = {text: _problems_without(text, words, build) for text in words}
    causes = {
        problem: _causes(problem, {text for text in words if problem not in without[text]}, words)
        for problem in error.problems
    }
    if not any(causes.values()):
        return error
    alone = all(causes.values())
    where = "" if alone else " on the command line"
    keys = [text.partition("=")[0] for text in words]
    lines: dict[str, str] = {}
    times: Counter[str] = Counter()
    for problem, texts in causes.items():
        rest = _without_arm(problem, keys)
        times[rest] += 1
        shown = " and ".join(repr(shown_override(text)) for text in texts)
        lines.setdefault(rest, f"{problem} (in {shown}{where})" if texts else problem)
    told = [
        f"{line}; the same in {times[rest] - 1} more arms" if times[rest] > 1 else line
        for rest, line in lines.items()
    ]
    return ConfigError(told, COMMAND_LINE if alone else path)


def _problems_without(text: str, words: Sequence[str], build: Build) -> Sequence[str]:
    """Return the problems that are left if one override is left out."""
    try:
        build([word for word in words if word != text])
    except ConfigError as error:
        return error.problems
    return []


def _causes(problem: str, needed: set[str], words: Sequence[str]) -> list[str]:
    """Return the overrides that cause a problem: of those needed for it, the ones that set its field."""
    keys = {text: text.partition("=")[0] for text in words if text in needed}
    field = _without_arm(problem, list(keys.values())).partition(": ")[0]
    own = [text for text, key in keys.items() if field == key or field.startswith(f"{key}.")]
    return own or list(keys)


def _without_arm(problem: str, keys: Sequence[str]) -> str:
    """Return a problem of a setting without the arm that it is in."""
    for key in keys if problem.startswith("arms.") else ():
        _, there, rest = problem.partition(f".{key}")
        if there and rest[:1] in (":", "."):
            return f"{key}{rest}"
    return problem
