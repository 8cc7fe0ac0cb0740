"""Text for a terminal: on one line, cut to its columns, and tables. Characters may be two columns wide."""

import re
import shutil
import sys
import textwrap
from collections.abc import Iterable
from typing import Any

from rich.cells import cell_len, set_cell_size

from tfkd_ray.settings.files import legible

_NUMBER = re.compile(r"([-+<]?[\d.,/]+(e[-+]?\d+)?( ?%|x)?( (±|to) -?[\d.,]+)?|-|none|nan|)")
"""What a column of numbers may have below its head; intervals and missing numbers count."""

_COMMAND = re.compile(r"(?!tfkd [a-z ]+: )(tfkd|ssh|pip) ")
"""Begin of a command; a message begins with the verb that it is of, such as `tfkd tune: `."""
_NO_BREAK = "\N{NO-BREAK SPACE}"


def on_one_line(text: str) -> str:
    """Return escaped text without line ends and tabs."""
    return legible(text.replace("\n", "\\n").replace("\t", "\\t"))


def fitted(text: str, width: int) -> str:
    """Return escaped text on one line, cut to a number of terminal columns."""
    most = 16 * width  # a character may take no column, as an accent does
    text = on_one_line(text[:most]) + "…" * (len(text) > most)
    return text if cell_len(text) <= width else set_cell_size(text, width - 1).rstrip() + "…"


def wrapped(text: str, width: int = 80, *, first: str = "", rest: str = "  ") -> list[str]:
    """Break text into lines at spaces, but not inside `95 %` or `n = 5`.

    A word longer than a line, such as an address, stays whole. `first` and `rest` indent the first
    line and the others.
    """
    kept = re.sub(r"(?<=\d) (?=%)|(?<=\bn) (?== )|(?<= n =) (?=\d)", _NO_BREAK, text)
    lines = textwrap.wrap(
        kept, width, initial_indent=first, subsequent_indent=rest,
        break_on_hyphens=False, break_long_words=False,
    )  # fmt: skip
    return [line.replace(_NO_BREAK, " ") for line in lines]


def folded(text: str, width: int) -> str:
    """Break the lines of a text that are longer than a terminal's at spaces, and indent what follows.

    Commands stay whole: a terminal breaks them so that they can be copied as one.
    """
    return "\n".join(_folded_line(line, width) for line in text.split("\n"))


def _folded_line(line: str, width: int) -> str:
    words = line.lstrip(" ")
    if cell_len(line) <= width or _COMMAND.match(words):
        return line
    indent = " " * min(len(line) - len(words), width // 2)
    return "\n".join(wrapped(words, width, first=indent, rest=f"{indent}  "))


def terminal_width(stream: Any) -> int | None:
    """Return the columns of a stream that is a terminal; None of another stream."""
    try:
        if not stream.isatty():
            return None
    except (AttributeError, ValueError):  # no stream of text, or closed
        return None
    return shutil.get_terminal_size((USUAL_WIDTH, 24)).columns


def to_stderr(text: str) -> None:
    """Print a sentence to standard error; on a terminal, its lines end at a space."""
    width = terminal_width(sys.stderr)
    print(text if width is None else folded(text, width), file=sys.stderr, flush=True)


USUAL_WIDTH = 120
"""Columns of a terminal that does not tell how wide it is."""


def in_columns(rows: Iterable[str], width: int | None = None) -> list[str]:
    """Return a table as lines: its head, then its rows, with numbers set to the right.

    Tabs separate the cells of a row, which are on one line. With a `width`, the first column is cut
    where lines would be longer, to no fewer than 8.
    """
    table = [row.split("\t") for row in rows]
    sizes, numbers = [], []
    for head, *below in zip(*table, strict=True):
        sizes.append(max(map(cell_len, (head, *below))))
        numbers.append(all(map(_NUMBER.fullmatch, below)))
    if width is not None and table:
        rest = sum(size + 2 for size in sizes[1:])
        sizes[0] = min(sizes[0], max(8, width - rest))
    lines = []
    for first, *others in table:
        cells = [set_cell_size(fitted(first, sizes[0]), sizes[0])]
        for cell, size, number in zip(others, sizes[1:], numbers[1:], strict=True):
            blank = " " * (size - cell_len(cell))
            cells.append(blank + cell if number else cell + blank)
        lines.append("  ".join(cells).rstrip())
    return lines
