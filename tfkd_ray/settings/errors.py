"""TODO settings.errors."""

import difflib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tfkd_ray.settings.passwords import masked_words

OK, FAILED, WRONG_INPUT, NOT_BETTER, INTERRUPTED = 0, 1, 2, 7, 130


class ConfigError(Exception):
    """Wrong input by a person: every problem at once, each a sentence that begins with the field it is about."""

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


def readable(text: str) -> str:
    """The text, with escapes for what UTF-8 has no bytes for: parts of a file's name that is no UTF-8."""
    return text.encode(errors="backslashreplace").decode()


def check_kind(value: object, kind: type, name: str) -> None:
    """Refuse an argument of a public function that is of another kind."""
    if not isinstance(value, kind):
        raise ConfigError(f"{name}: needs a {kind.__name__}, got a {type(value).__name__}")


class Unreachable(ConfigError):
    """What was named does not answer: it may be named wrongly, or be down, so that a command has failed."""


def _shortened(problem: str) -> str:
    """A sentence without the middle of what it quotes, where that is long."""
    problem = readable(problem)
    return (
        problem
        if len(problem) <= LONGEST
        else f"{problem[: LONGEST * 2 // 3]} ... {problem[-LONGEST // 4 :]}"
    )


LONGEST = 1000
"""Characters of a problem; who has quoted a whole file wants to read the rule, not the file."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A hint that ends a sentence: the nearest known word, one that `word` begins before others; or all of them."""
    options = sorted(known)
    near = difflib.get_close_matches(word, options, n=3, cutoff=0.6)
    if not near:
        return f"known: {', '.join(options)}"
    return f"did you mean {max(near, key=lambda option: option.startswith(word))!r}?"


def dotted(path: Iterable[object]) -> str:
    """The names of a field and of those above it, joined by dots; one that is empty or has blanks in it is quoted."""
    names = [name if len(name) <= 80 else f"{name[:60]}..." for name in map(str, path)]
    return ".".join(
        name if re.fullmatch(r"\S+", name) and name.isprintable() else repr(name) for name in names
    )
