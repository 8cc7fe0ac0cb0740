"""Code of a person's own: found last, and run where `tfkd` was started, in every process of a sweep. No Ray, no torch.

A process that trains gets the driver's `Place`: its working directory, where relative paths begin, and the folders that
only the driver looks into for modules. In a job, each node has a copy of that directory, beside that of this package.
"""

import itertools
import os
import site
import sys
import sysconfig
from pathlib import Path
from typing import TypedDict

JOB_FOLDER = "TFKD_JOB_FOLDER"
"""Environment variable: in a job, the copy of the working directory, below the folder that holds this package."""

PACKAGE = Path(__file__).parent


class Place(TypedDict):
    """Where a driver was started, and what it finds modules in after the standard library."""

    directory: str
    path: list[str]


def here() -> Place:
    """The place of this process."""
    rest = sys.path[len(before_the_library()) :]
    pythons = [*map(sysconfig.get_path, ("stdlib", "platstdlib", "purelib", "platlib")), site.getusersitepackages()]
    own = [str(Path(p).absolute()) for p in rest if not any(Path(p).is_relative_to(folder) for folder in pythons)]
    return {"directory": str(Path.cwd()), "path": [p for p in own if not p.endswith(_ZIP)]}


def enter(place: Place) -> None:
    """Let this process work in a driver's place; where a node has no such directory, it stays where it is."""
    directory = _copy_of_job() or Path(place["directory"])
    if directory.is_dir():
        os.chdir(directory)
        place = {"directory": str(directory), "path": [*place["path"], str(directory)]}
    sys.path += [p for p in place["path"] if p not in sys.path]


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
    if not sys.flags.safe_path and first.is_dir() and first.samefile(Path()) and not first.samefile(PACKAGE.parent):
        sys.path.append(sys.path.pop(0))


def _copy_of_job() -> Path | None:
    name = os.environ.get(JOB_FOLDER)
    return PACKAGE.parent / name if name else None


_ZIP = f"{os.sep}python{sys.version_info.major}{sys.version_info.minor}.zip"
"""End of the place where Python looks for its library first."""
