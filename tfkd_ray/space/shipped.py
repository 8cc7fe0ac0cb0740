"""The search spaces and arms files that ship with tfkd: what each of them is, from the files alone.

The classes of settings are not imported.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tfkd_ray.settings.errors import some_of
from tfkd_ray.settings.yaml import Tree, parse_yaml, shipped_files, text_of


class ShippedSpace(NamedTuple):
    """One shipped file, in words."""

    name: str
    data: str
    objectives: str
    """Objectives, the baselines ce and lsr aside."""
    student: str
    trials: str
    """Number of trials; of arms, how many there are."""
    needs: str
    """GPUs of a trial."""
    about: str
    """The comment that begins the file: its question."""


def shipped_spaces() -> Iterator[ShippedSpace]:
    """Yield every shipped search space and arms file by name."""
    for name, path in sorted(shipped_files("search_spaces").items(), key=lambda found: found[0]):
        text = text_of(path)
        yield _described(name, parse_yaml(text, path), text)


def first_comment(text: str) -> str:
    """Return the comment that begins a file, up to its first empty line, on one line."""
    lines = re.match(r"(# .+\n)*", text)
    return " ".join(line[2:] for line in (lines[0] if lines else "").splitlines())


def _described(name: str, tree: Tree, text: str) -> ShippedSpace:
    parts = [tree, *tree.get("arms", [])]
    students = _names_of_settings(part.get("student") for part in parts)
    listed = [part.get("objective") for part in parts]
    objectives = _names_of_settings(
        o for given in listed for o in (given if isinstance(given, list) else [given])
    )
    trials = str(tree.get("search", {}).get("num_samples", "grid"))
    if "arms" in tree:
        trials = f"{len(tree['arms'])} arms"
    (data,) = _names_of_settings([tree.get("data", "digits")])
    own = [o for o in objectives if o not in ("ce", "lsr")] or objectives
    gpus = max(part.get("gpus_per_worker", 0) * part.get("workers", 1) for part in parts)
    return ShippedSpace(
        name,
        data,
        some_of(own, 2),
        f"{len(students)} networks" if len(students) > 1 else "".join(students) or "mlp",
        trials,
        _gpus(gpus),
        first_comment(text),
    )


def _gpus(count: float) -> str:
    if not count:
        return "-"
    return "GPU" if count <= 1 else f"{count:g} GPUs"


def _names_of_settings(given: Any) -> list[str]:
    """Return the names of settings, once each; of choices those of their items."""
    found: dict[str, None] = {}
    for value in given:
        items = value.get("choices", [value]) if isinstance(value, dict) else [value]
        for item in items:
            name = item.get("name") if isinstance(item, dict) else item
            found |= {str(name): None} if name is not None else {}
    return list(found)


def copied(text: str, name: str, path: Path) -> str:
    """Return the text of a shipped file for a copy at a path, which its commands then name."""
    return text.replace(f"search_spaces/{name}.yaml", str(path))
