"""The process that decodes images for reader.py: `python -m tfkd_ray.learn.reader_process HANDLE`.

HANDLE is the descriptor of the memory that it shares with the process that started it.
"""

import contextlib
import io
import json
import mmap
import signal
import sys

import numpy as np

from tfkd_ray.learn.images import Files, decode_into
from tfkd_ray.settings.errors import ConfigError


def answer_requests() -> None:
    """Answer each request with a line, until there are no more.

    An answer has the problems of the images, and what else there is to say.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches this process, too
    memory = mmap.mmap(int(sys.argv[1]), 0)
    for line in sys.stdin.buffer:
        wire, names, crops = json.loads(line)
        files = Files.of_wire(wire)
        shape = len(names), 3, files.side, files.side
        out = np.frombuffer(memory, np.uint8, int(np.prod(shape))).reshape(shape)
        problems: list[str] = []
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            try:
                decode_into(files, names, crops, out)
            except ConfigError as error:
                problems = list(error.problems)
        sys.stdout.write(f"{json.dumps([problems, said.getvalue()])}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    answer_requests()
