"""`tfkd WORDS` that gets signal 9 when it touches a file below a folder for the n-th time."""

import contextlib
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TOUCHES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.symlink", "os.link", "os.truncate"}


def run(
    words: Sequence[str], here: Path, below: Path, point: int, after: Path | None = None
) -> None:
    """Run in `here`, with the output in the file `said` there.

    Args:
        point: the touch that kills, counted from 1: just after a file is opened for writing, or
            before a file is renamed or removed, or a folder created.
        after: counting starts once this file exists. None: from the start.
    """
    os.chdir(here)
    sys.stdout = sys.stderr = (here / "said").open("a", buffering=1)
    left = point

    def heard(event: str, given: tuple[Any, ...]) -> None:
        nonlocal left
        if event != "open" and event not in TOUCHES:
            return
        if event == "open" and not (given[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return
        paths = [
            str(Path(os.fsdecode(p)).absolute())
            for p in given[:2]
            if isinstance(p, str | bytes | os.PathLike)
        ]
        if not any(p.startswith(f"{below}/") for p in paths) or (
            after is not None and not after.exists()
        ):
            return
        left -= 1
        if left == 0:
            if event == "open":
                with contextlib.suppress(OSError):
                    os.close(os.open(paths[0], given[2], 0o666))
            os.kill(os.getpid(), signal.SIGKILL)

    from tfkd_ray.cli.main import main

    sys.addaudithook(heard)
    sys.exit(main(list(words)))
