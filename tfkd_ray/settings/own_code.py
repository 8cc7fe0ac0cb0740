"""Code of a person's own: found last, and run where `tfkd` was started, in every process of a sweep. No Ray, no torch.

A process that trains gets the driver's `Place`: its working directory, where relative paths begin, and the folders that
only the driver looks into for modules. In a job, each node has a copy of that directory, beside that of this package.
"""

import contextlib
import functools
import itertools
import os
import site
import sys
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypedDict, TypeVar

JOB_FOLDER = "TFKD_JOB_FOLDER"
"""Environment variable: in a job, the copy of the working directory, below the folder that holds this package."""

SAFE_PATH = "PYTHONSAFEPATH"

PACKAGE = Path(__file__).parent.parent


_T = TypeVar("_T")


class Place(TypedDict):
    """Where a driver was started, and what it finds modules in after the standard library."""

    directory: str
    path: list[str]
    safe: bool
    """Whether Python there is to leave a script's own folder out (PYTHONSAFEPATH)."""


_home: Path | None = None


def remember(directory: str | None) -> str | None:
    """Have code of one's own run where an experiment was begun, if that is elsewhere and still there; says so."""
    global _home
    if directory is None or JOB_FOLDER in os.environ or not (there := Path(directory)).is_dir():
        return None
    if there.samefile(Path()):
        return None
    _home = there
    return f"code of your own is looked for and run in {there}, where the experiment was begun"


def at_home(function: Callable[..., _T]) -> Callable[..., _T]:
    """A function of one's own that runs in the directory that is remembered, if one is."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> _T:
        with contextlib.nullcontext() if _home is None else contextlib.chdir(_home):
            return function(*args, **kwargs)

    return function if _home is None else run


def is_needed(tree: Any) -> bool:
    """Whether a configuration's tree names code of one's own."""
    if isinstance(tree, Mapping):
        return tree.get("name") == "own" or any(map(is_needed, tree.values()))
    return isinstance(tree, list | tuple) and any(map(is_needed, tree))


def here() -> Place:
    """The place of this process."""
    rest = sys.path[len(before_the_library()) :]
    pythons = [
        *map(sysconfig.get_path, ("stdlib", "platstdlib", "purelib", "platlib")),
        site.getusersitepackages(),
    ]
    own = [
        str(Path(p).absolute())
        for p in rest
        if not any(Path(p).is_relative_to(folder) for folder in pythons)
    ]
    path = [p for p in own if not p.endswith(_ZIP)]
    return {"directory": str(_home or Path.cwd()), "path": path, "safe": SAFE_PATH in os.environ}


def enter(place: Place) -> None:
    """Let this process work in a driver's place; where a node has no such directory, it stays where it is."""
    directory, path = _copy_of_job() or Path(place["directory"]), list(place["path"])
    if directory.is_dir():
        os.chdir(directory)
        path.append(str(directory))
    sys.path += [p for p in path if p not in sys.path]
    if not place["safe"]:  # see `safe_path`
        os.environ.pop(SAFE_PATH, None)


@contextlib.contextmanager
def safe_path() -> Iterator[None]:
    """Within it, processes that are started do not look for modules where they are started: Ray's dashboard would."""
    before = os.environ.get(SAFE_PATH)
    os.environ[SAFE_PATH] = "1"
    try:
        yield
    finally:
        del os.environ[SAFE_PATH]
        if before is not None:
            os.environ[SAFE_PATH] = before


def enter_job() -> None:
    """In a job's driver: begin in the copy of the directory that it was submitted from."""
    if (copy := _copy_of_job()) is not None:
        os.chdir(copy)


def before_the_library() -> list[str]:
    """The folders that this process looks into before the standard library: the script's own, and PYTHONPATH."""
    library = sysconfig.get_path("stdlib")
    found = itertools.takewhile(lambda p: p != library and not p.endswith(_ZIP), sys.path)
    return [str(Path(p).absolute()) for p in found]


def working_directory_last() -> None:
    """Undo what `python -m` does: it looks for modules in the working directory first, whatever lies there."""
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
"""End of the place where Python looks for its library first."""
