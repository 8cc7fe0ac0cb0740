"""A command in a process that has its imports behind it: `python tests/warm.py -m MODULE WORDS`.

Sends words, environment, directory and streams to the server of tests/warm_server.py, which forks a process for
them, and ends as that does. In the place of Ray's setup_worker.py, it begins a worker so.

Imports nothing that takes time.
"""

import array
import json
import os
import signal
import socket
import sys

WARM = "TFKD_TEST_WARM"
"""Environment variable: the path of the server's socket."""
MOST_BYTES = 2**20
"""Largest request."""


def main(words: list[str]) -> int:
    """Run a command in a forked process; return its exit code."""
    request = {"words": words, "env": dict(os.environ), "cwd": os.getcwd()}  # noqa: PTH109
    streams = array.array("i", [0, 1, 2])
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MOST_BYTES)
        server.connect(os.environ[WARM])
        server.sendmsg(
            [json.dumps(request).encode()], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, streams)]
        )
        answer = server.recv(100)
    if not answer:
        sys.exit("tests/warm.py: the server has ended")
    code = int(answer)
    if code < 0:  # killed by a signal, and so is this process
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    return code


def worker(words: list[str]) -> int:
    """Begin a worker of Ray; one with more of a runtime environment than variables begins as Ray does it."""
    own = [word for word in words if word.startswith(("--serialized-runtime-env", "--language="))]
    context = next((word.partition("=")[2] for word in own if "runtime-env" in word), "") or "{}"
    given = json.loads(context)
    variables = given.pop("env_vars", None) or {}
    given.pop("py_executable", None)
    if any(given.values()) or any("$" in value for value in variables.values()):
        import ray._private.workers.setup_worker as rays

        os.execv(sys.executable, [sys.executable, rays.__file__, *words])
    os.environ.update(variables)
    return main([word for word in words if word not in own])


if __name__ == "__main__":
    begin = worker if sys.argv[1].endswith("default_worker.py") else main
    sys.exit(begin(sys.argv[1:]))
