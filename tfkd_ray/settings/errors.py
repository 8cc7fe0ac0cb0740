"""Errors that a user can fix, their messages, and the exit codes of the command line."""

import contextlib
import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tfkd_ray.settings.passwords import masked_words

OK, FAILED, WRONG_INPUT, NOT_BETTER, INTERRUPTED = 0, 1, 2, 7, 130
Say = Callable[[str], None]
"""Tells a sentence to the user."""
Sentences = Iterator[str]
"""Sentences, or lines of text, one by one."""


def some_of(names: Sequence[str], most: int = 5) -> str:
    """Return a list of names, of many the first ones and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


class ConfigError(Exception):
    """Wrong input: lists every problem at once, each as a sentence that begins with its field."""

    def __init__(self, problems: str | Iterable[str], source: str | Path | None = None) -> None:
        found = [problems] if isinstance(problems, str) else list(problems)
        self.problems = [_shortened(masked_words(problem)) for problem in dict.fromkeys(found)]
        self.source = None if source is None else readable(masked_words(str(source)))
        lines = (
            self.problems
            if source is None
            else [f"{self.source}:", *(f"  {p}" for p in self.problems)]
        )
        super().__init__("\n".join(lines))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.problems, self.source)


@contextlib.contextmanager
def in_file(source: str | Path | None) -> Iterator[None]:
    """Name a file in each ConfigError of the block that names none; None: name none."""
    try:
        yield
    except ConfigError as error:
        if error.source is not None or source is None:
            raise
        raise type(error)(error.problems, source) from None


def readable(text: str) -> str:
    """Return the text with escapes for bytes that are not UTF-8, which a file's name may have."""
    return text.encode(errors="backslashreplace").decode()


def check_kind(value: object, kind: type, name: str) -> None:
    """Raise a ConfigError if an argument of a public function is of the wrong kind."""
    if not isinstance(value, kind):
        raise ConfigError(f"{name}: needs a {kind.__name__}, got a {type(value).__name__}")


class Unreachable(ConfigError):
    """Raised when a named host or service does not answer (wrong name, or down); exit code 1."""


def _shortened(problem: str) -> str:
    """Return the sentence; a long one without its middle."""
    problem = readable(problem)
    return (
        problem
        if len(problem) <= LONGEST
        else f"{problem[: LONGEST * 2 // 3]} ... {problem[-LONGEST // 4 :]}"
    )


LONGEST = 1000
"""Most characters of a problem. Longer ones are elided in the middle: they often quote a whole
file."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return a hint that ends a sentence: the nearest known word, or else all of them."""
    options = sorted(known)
    near = near_to(word, options)
    return f"known: {', '.join(options)}" if near is None else f"did you mean {near!r}?"


def near_to(word: str, known: Iterable[str], alike: float = 0.6) -> str | None:
    """Return the known word that is nearest to `word`; None if none is near.

    Words that begin with `word` come before other near ones. `alike` is the least share of letters
    in common.
    """
    near = difflib.get_close_matches(word, sorted(known), n=3, cutoff=alike)
    return max(near, key=lambda option: option.startswith(word), default=None)


def dotted(path: Iterable[object]) -> str:
    """Return the names of a field and its parents, joined by dots.

    A name that is empty or has blanks in it is quoted.
    """
    names = [name if len(name) <= 80 else f"{name[:60]}..." for name in map(str, path)]
    return ".".join(
        name if re.fullmatch(r"\S+", name) and name.isprintable() else repr(name) for name in names
    )
