"""A process that has imported torch, Ray and the package, and forks others: see tests/warm.py.

An import of these takes 3 to 5 s, and the tests start some hundred processes: workers of Ray, and commands of
`tfkd`. Not for tests of signals, of what is imported, or of another installation: they start new processes.
"""

import array
import contextlib
import gc
import importlib
import json
import os
import select
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock
from warm import MOST_BYTES, WARM

IMPORTS = (
    "ray.tune",
    "ray.train.torch",
    "ray._private.workers.default_worker",
    "sklearn.datasets",
    "torchvision",
    "tfkd_ray.cli.main",
    "tfkd_ray.cli.fit",
    "tfkd_ray.run.confirm",
    "tfkd_ray.run.trial",
    "tfkd_ray.run.tune",
    "tfkd_ray.show.export",
    "tfkd_ray.show.report",
)
_READ_BY_IMPORTS = {
    "OMP_NUM_THREADS": "1",  # as Ray sets it for trials
    "OPENBLAS_NUM_THREADS": "1",
    "RAY_JOB_ID": "ffffffff",  # a worker of any job; and RAY_RAYLET_PID: it ends after that process
}


@contextlib.contextmanager
def warm_server(folder: Path, end_with: int) -> Iterator[None]:
    """Use the server that has its socket in a folder; start it if none has.

    The server ends with the process `end_with`.
    """
    path = str(folder / "warm")
    with FileLock(f"{path}.lock"):
        if not Path(path).exists():
            _start(path, end_with)
    os.environ[WARM] = path
    yield
    del os.environ[WARM]


def _start(path: str, end_with: int) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(path)
        listener.listen(100)
        listener.set_inheritable(True)
        command = [sys.executable, __file__, str(listener.fileno()), str(end_with)]
        env = {**os.environ, **_READ_BY_IMPORTS, "RAY_RAYLET_PID": str(end_with)}
        os.posix_spawn(sys.executable, command, env)


def requests(listener: socket.socket, user: int) -> dict[str, Any]:
    """Fork a process for each request, in which this returns the request.

    Args:
        user: file descriptor of the process with which the server ends.
    """
    asked: dict[int, socket.socket] = {}
    ended, end = os.pipe()
    os.set_blocking(end, False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal.set_wakeup_fd(end)
    while True:
        ready, _, _ = select.select([user, ended, listener, *asked.values()], [], [])
        if user in ready:
            os._exit(0)
        if ended in ready:
            os.read(ended, 1000)
            _tell_ends(asked)
        for pid, client in asked.items():
            if client in ready:  # it was killed
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        if listener not in ready:
            continue
        client, _ = listener.accept()
        text, rights, _, _ = client.recvmsg(MOST_BYTES, socket.CMSG_SPACE(12))
        streams = array.array("i", rights[0][2])
        pid = os.fork()
        if pid == 0:
            signal.set_wakeup_fd(-1)
            for number, stream in enumerate(streams):
                os.dup2(stream, number)
            for number in (user, ended, end, *streams):
                os.close(number)
            for connection in (listener, client, *asked.values()):
                connection.close()
            request: dict[str, Any] = json.loads(text)
            return request
        for stream in streams:
            os.close(stream)
        asked[pid] = client


def _tell_ends(asked: dict[int, socket.socket]) -> None:
    for pid in list(asked):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            with asked.pop(pid) as client, contextlib.suppress(OSError):
                client.send(str(os.waitstatus_to_exitcode(status)).encode())


def begin(words: list[str], env: dict[str, str], cwd: str) -> None:
    """Run a command in this process, which is forked, as if it had begun with it."""
    import random
    import runpy

    import numpy
    from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setpgid(0, 0)  # Ray kills groups of processes
    os.environ.clear()
    os.environ.update({name: value for name, value in env.items() if name != WARM})
    os.chdir(cwd)
    sys.stdin = sys.__stdin__ = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = sys.__stdout__ = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.__stderr__ = open(2, "w", 1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    sys.orig_argv = [sys.executable, *words]
    random.seed()
    numpy.random.seed()  # noqa: NPY002
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()
    if words[0] == "-m":
        sys.path[0] = cwd
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = str(Path(words[0]).parent)
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")


def import_all() -> None:
    """Import what processes need, without a draw from Ray's generator of ids.

    Its state would be the same in all forked processes, and so would their placement groups' ids.
    """
    import ray
    import ray.actor

    class Ids:
        """In the place of `ActorClassID`, from which each class of actors draws at its import."""

        @staticmethod
        def from_random() -> Any:
            return ray.ActorClassID(os.urandom(28))

    before, ray.actor.ActorClassID = ray.actor.ActorClassID, Ids
    for module in IMPORTS:
        importlib.import_module(module)
    ray.actor.ActorClassID = before
    gc.collect()
    gc.freeze()


if __name__ == "__main__":
    user = os.pidfd_open(int(sys.argv[2]))
    import_all()
    begin(**requests(socket.socket(fileno=int(sys.argv[1])), user))
