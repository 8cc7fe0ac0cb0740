"""Processes that decode image files, so that decoding takes no time from Python's lock of training.

A reader is a process of reader_process.py: it imports neither torch nor Ray, gets one request at a
time as a line of JSON, decodes its images into memory that it shares with the process that asked,
and answers with a line. One that was killed is started again and asked again, so the images are the
same. Readers are kept from epoch to epoch, and end with the process that started them.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import mmap
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tfkd_ray.settings.columns import to_stderr
from tfkd_ray.settings.errors import ConfigError

if TYPE_CHECKING:
    from numpy.typing import NDArray

Wire = list[Any]
"""Where files are and how they are decoded, as JSON: a data set's name, a folder, S, ..."""

IMAGES_AT_ONCE = 8
"""Images of a request."""
MOST_DEATHS = 3
"""Readers that may die over a request before it fails."""


class ReaderDied(RuntimeError):
    """Reader processes died over the same images: these may be what kills them."""


class _Reader:
    """A reader process and the memory that it shares.

    Args:
        image_bytes: of one decoded image.
    """

    def __init__(self, image_bytes: int) -> None:
        size = IMAGES_AT_ONCE * image_bytes
        self._handle = os.memfd_create("tfkd-reader")
        os.ftruncate(self._handle, size)
        self._memory = mmap.mmap(self._handle, size)
        self._process = self._started()

    def _started(self) -> subprocess.Popen[bytes]:
        handle = str(self._handle)
        package = str(Path(__file__).parents[2])
        paths = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
        return subprocess.Popen(
            [sys.executable, "-m", "tfkd_ray.learn.reader_process", handle],
            pass_fds=[self._handle],
            env={**os.environ, "PYTHONPATH": paths},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def fill(
        self, files: Wire, names: Sequence[str], crops: Sequence[Any], out: NDArray[np.uint8]
    ) -> None:
        """Decode images into `out`, uint8 [n, 3, S, S]."""
        request = json.dumps([files, names, crops]).encode() + b"\n"
        for _ in range(MOST_DEATHS):
            answer = self._asked(request)
            if answer is not None:
                break
            self._kill()
            self._process = self._started()
        else:
            raise ReaderDied(
                f"data {files[0]}: {MOST_DEATHS} reader processes died over {names[0]} and the {len(names) - 1} "
                f"images after it in {files[1]}; is there enough memory, or is one of them damaged?"
            )
        problems, said = json.loads(answer)
        _say_once(said)
        if problems:
            raise ConfigError(problems)
        out[:] = np.frombuffer(self._memory, np.uint8, out.size).reshape(out.shape)

    def _asked(self, request: bytes) -> bytes | None:
        """Return the answer; None if the process has ended."""
        assert self._process.stdin and self._process.stdout, f"{self._process=}"
        with contextlib.suppress(BrokenPipeError, ValueError):  # ValueError: its pipes are closed
            self._process.stdin.write(request)
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
            return answer if answer.endswith(b"\n") else None
        return None

    def _kill(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()

    def end(self) -> None:
        """End the process, and give the memory back."""
        self._kill()
        self._memory.close()
        os.close(self._handle)


_passed_on: set[str] = set()
"""What reader processes said, and this one has passed on."""


def _say_once(text: str) -> None:
    """Write what a reader said to stderr, unless another one has said the same."""
    if text and text not in _passed_on:
        _passed_on.add(text)
        to_stderr(text.removesuffix("\n"))


_idle: dict[int, list[_Reader]] = {}
"""Readers that nobody uses, by the bytes of an image."""


@atexit.register
def end_readers() -> None:
    """End the reader processes that this process has started."""
    for readers in _idle.values():
        while readers:
            readers.pop().end()


@contextlib.contextmanager
def one_of(image_bytes: int) -> Iterator[_Reader]:
    """Yield a reader for images of this size: an idle one, or a new one."""
    idle = _idle.setdefault(image_bytes, [])
    try:
        reader = idle.pop()
    except IndexError:
        reader = _Reader(image_bytes)
    try:
        yield reader
    finally:
        idle.append(reader)


def fill(files: Wire, names: Sequence[str], crops: Sequence[Any], out: NDArray[np.uint8]) -> None:
    """Decode at most `IMAGES_AT_ONCE` images in a reader process, into uint8 [n, 3, S, S].

    Args:
        names: paths below the folder.
        crops: the numbers of each image's crop; see `images.Crop`.
    """
    with one_of(out[0].size) as reader:
        reader.fill(files, names, crops, out)
