"""A user's own code: found last, and run where `tfkd` was started, in every process of a sweep.

It needs neither Ray nor torch. A training process gets the driver's `Place`: its working directory,
to which paths are relative, and the module folders that only the driver has. In a job, each node
has a copy of that directory beside the copy of this package.
"""

import contextlib
import functools
import itertools
import os
import re
import site
import sys
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypedDict, TypeVar

JOB_FOLDER = "TFKD_JOB_FOLDER"
"""Environment variable: in a job, the name of the working directory's copy, beside this package."""

SAFE_PATH = "PYTHONSAFEPATH"

PACKAGE = Path(__file__).parent.parent


_T = TypeVar("_T")


class Place(TypedDict):
    """The driver's working directory, and its module folders after the standard library."""

    directory: str
    path: list[str]
    safe: bool
    """True if Python in that process must leave out a script's own folder (PYTHONSAFEPATH)."""


_home: Path | None = None


def remember(directory: str | None) -> str | None:
    """Run the user's own code in the directory where an experiment began, and no earlier one.

    Returns a note for the user; None if that directory is the current one or no longer exists.
    """
    global _home
    _home = None
    if directory is None or JOB_FOLDER in os.environ or not (there := Path(directory)).is_dir():
        return None
    if there.samefile(Path()):
        return None
    _home = there
    return f"your own code is imported from, and runs in, {there}, where the experiment was begun"


def at_home(function: Callable[..., _T]) -> Callable[..., _T]:
    """Wrap a user's own function so that it runs in the remembered directory, if there is one."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> _T:
        with contextlib.nullcontext() if _home is None else contextlib.chdir(_home):
            return function(*args, **kwargs)

    return function if _home is None else run


def is_function(text: Any) -> bool:
    """Return whether a text is `package.module:function`."""
    return isinstance(text, str) and re.fullmatch(r"[^\W\d][\w.]*:[^\W\d]\w*", text) is not None


def is_needed(tree: Any) -> bool:
    """Return whether a configuration tree names the user's own code."""
    if isinstance(tree, Mapping):
        named = tree.get("name") == "own" or is_function(tree.get("unlabelled"))
        return named or any(map(is_needed, tree.values()))
    return isinstance(tree, list | tuple) and any(map(is_needed, tree))


def spelled_out(value: Any) -> Any:
    """Return `{name: own, path: a:b}` for `a:b`, alone or as a name, and `{name: x}` for `x`."""
    tree = {"name": value} if isinstance(value, str) else value
    name = tree.get("name") if isinstance(tree, Mapping) else None
    if not isinstance(name, str) or ":" not in name:
        return tree
    return {**tree, "name": "own", "path": name}


def shown_name(settings: Any) -> str | None:
    """Return the name by which settings are listed: the function's, if they name the user's own."""
    tree = spelled_out(settings)
    name = tree.get("name") if isinstance(tree, Mapping) else None
    if not isinstance(name, str):
        return None
    return str(tree.get("path", "")).rpartition(":")[2] or name if name == "own" else name


def is_installed(path: Path | str) -> bool:
    """Return whether a file is Python's, or of an installed package."""
    path = Path(path)
    pythons = [
        *map(sysconfig.get_path, ("stdlib", "platstdlib", "purelib", "platlib")),
        site.getusersitepackages(),
    ]
    return any(path.is_relative_to(folder) for folder in pythons)


def here() -> Place:
    """Return the place of this process."""
    rest = sys.path[len(before_the_library()) :]
    own = [str(Path(p).absolute()) for p in rest if not is_installed(p)]
    path = [p for p in own if not p.endswith(_ZIP)]
    return {"directory": str(_home or Path.cwd()), "path": path, "safe": SAFE_PATH in os.environ}


def enter(place: Place) -> None:
    """Move this process to a driver's place; it keeps its directory if the node lacks that one."""
    directory, path = _copy_of_job() or Path(place["directory"]), list(place["path"])
    if directory.is_dir():
        os.chdir(directory)
        path.append(str(directory))
    sys.path += [p for p in path if p not in sys.path]
    if not place["safe"]:  # see `safe_path`
        os.environ.pop(SAFE_PATH, None)


@contextlib.contextmanager
def safe_path() -> Iterator[None]:
    """Start processes, within this context, that do not search their working directory for modules.

    Ray's dashboard would.
    """
    before = os.environ.get(SAFE_PATH)
    os.environ[SAFE_PATH] = "1"
    try:
        yield
    finally:
        del os.environ[SAFE_PATH]
        if before is not None:
            os.environ[SAFE_PATH] = before


def enter_job() -> None:
    """Change to the copy of the directory that a job was submitted from, in the job's driver."""
    if (copy := _copy_of_job()) is not None:
        os.chdir(copy)


def before_the_library() -> list[str]:
    """Return the folders searched before the standard library: the script's own, and PYTHONPATH."""
    library = sysconfig.get_path("stdlib")
    found = itertools.takewhile(lambda p: p != library and not p.endswith(_ZIP), sys.path)
    return [str(Path(p).absolute()) for p in found]


def working_directory_last() -> None:
    """Undo an effect of `python -m`: it searches the working directory for modules first."""
    first = Path(sys.path[0] or ".")
    if (
        not sys.flags.safe_path
        and first.is_dir()
        and first.samefile(Path())
        and not first.samefile(PACKAGE.parent)
    ):
        sys.path.append(sys.path.pop(0))


def _copy_of_job() -> Path | None:
    name = os.environ.get(JOB_FOLDER)
    return PACKAGE.parent / name if name else None


_ZIP = f"{os.sep}python{sys.version_info.major}{sys.version_info.minor}.zip"
"""End of the first path on which Python looks for its standard library."""
