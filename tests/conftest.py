"""Fixtures: a Ray cluster of 2 CPUs for the session, which tests' commands join by RAY_ADDRESS."""

import contextlib
import gc
import io
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from warm_server import warm_server

from tfkd_ray.learn.data import Data
from tfkd_ray.learn.objectives import Objective, OwnObjective
from tfkd_ray.settings import own_code
from tfkd_ray.settings.schema import leaves, tag
from tfkd_ray.verdict.scores import SCORES, SELECTABLE

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault(
    "RAY_worker_niceness", "0"
)  # Ray's default of 15 starves trials while the other tests run
os.environ.setdefault("COLUMNS", "100")
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="tfkd-cache-")  # decoded data sets
# for test_remote.py's server; set here so that the session's Ray processes inherit them
os.environ |= {
    "AWS_ACCESS_KEY_ID": "tfkd-key",
    "AWS_SECRET_ACCESS_KEY": "s3cret-of-s3",
    "AWS_DEFAULT_REGION": "us-east-1",
}

if (
    signal.getsignal(signal.SIGINT) == signal.SIG_IGN
):  # as a shell sets it for commands that end with `&`
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).parent.parent
ARMS = [p for p in sorted((ROOT / "search_spaces").rglob("*.yaml")) if "\narms:" in p.read_text()]
SHIPPED = [p for p in sorted((ROOT / "search_spaces").rglob("*.yaml")) if p not in ARMS]
OBJECTIVES = [kind() for kind in leaves(Objective) if kind is not OwnObjective]
"""Every objective with its defaults, except losses of the user's own."""
DATA_SETS = {str(tag(kind)): kind for kind in leaves(Data)}
"""Every kind of data set by its name."""
AT_ONCE = [key for key in SELECTABLE if not SCORES[key].usual]
"""The metrics that validation calculates only where a search asks for them."""
RAY_HALVES_AT = "test_own_loop"
"""The files before this name take about as long with Ray as those after it."""

SERVED = {"warm", "tfkd", "forkserver", "bucket"}
"""Fixtures that start a server of some seconds."""

torch.set_num_threads(1)
_capabilities = torch.cpu.get_capabilities()
torch.cpu.get_capabilities = lambda: {
    **_capabilities,
    "amx_bf16": False,
}  # else `auto` is bf16 on some machines


@pytest.fixture(scope="session", autouse=True)
def _no_power_cut() -> Iterator[None]:
    """Replace fsync: no file here must survive a power cut, and each call takes up to 5 ms."""
    before = os.fsync
    os.fsync = lambda fd: None
    yield
    os.fsync = before


@pytest.fixture(scope="session", autouse=True)
def _no_server_left() -> Iterator[None]:
    """Fail if a server still runs: on a closed socket it spins, and slows all tests after it."""
    yield
    left = [t.name for t in threading.enumerate() if "serve_forever" in t.name]
    assert not left, left


@pytest.fixture(autouse=True)
def _no_home_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each test look for code of one's own where it is, not where an earlier one resumed."""
    monkeypatch.setattr(own_code, "_home", None)


@pytest.fixture(scope="session")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """Yield the beginning of a command whose process has its imports behind it, for example `-m tfkd_ray`.

    All processes of pytest-xdist share one server.
    """
    folder, end_with = tmp_path_factory.getbasetemp(), os.getpid()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder, end_with = folder.parent, os.getppid()
    with warm_server(folder, end_with):
        yield [sys.executable, "-S", str(ROOT / "tests/warm.py")]


def of_faults(item: pytest.Item) -> bool:
    """Return True if a test breaks things on purpose, which it does with processes as users have them."""
    return any(item.get_closest_marker(mark) for mark in ("fault", "cluster"))


@contextlib.contextmanager
def warm_workers() -> Iterator[None]:
    """Make a node of Ray that starts here begin its workers with tests/warm.py.

    It starts neither an autoscaler nor a monitor of logs: no test of it asks for nodes or for the
    output of workers.
    """
    from ray._private.parameter import RayParams

    before = RayParams.update_if_absent

    def updated(self: Any, **usual: Any) -> None:
        if "setup_worker_path" in usual:
            usual["setup_worker_path"] = str(ROOT / "tests/warm.py")
            usual["include_log_monitor"] = False
            self.no_monitor = True
        before(self, **usual)

    RayParams.update_if_absent = updated
    yield
    RayParams.update_if_absent = before


@pytest.fixture(scope="session")
def ray_cluster(request: pytest.FixtureRequest) -> Iterator[str]:
    """Yield the address of the session's cluster.

    Its workers have their imports behind them, unless faults are to be tested.
    """
    import ray

    from tfkd_ray.run.auth import own_token
    from tfkd_ray.run.connect import DRIVER

    own_token()
    with contextlib.ExitStack() as stack:
        if not any(of_faults(item) for item in request.session.items):
            request.getfixturevalue("warm")
            stack.enter_context(warm_workers())
        ray.init(
            address="local", num_cpus=2, resources={DRIVER: 1000}, include_dashboard=True, log_to_driver=False,
            logging_level="ERROR", object_store_memory=150 * 2**20,
        )  # fmt: skip
    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
    yield os.environ["RAY_ADDRESS"]
    del os.environ["RAY_ADDRESS"]
    ray.shutdown()


@pytest.fixture
def epoch_by_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a trial tell each epoch at once, not those of a second, so that tiny epochs take a while."""
    monkeypatch.setenv("TUNE_RESULT_BUFFER_MIN_TIME_S", "0")
    monkeypatch.setenv("TUNE_RESULT_BUFFER_MAX_TIME_S", "0")


@pytest.hookimpl(tryfirst=True)  # before -m is evaluated
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what fixtures imply, skip tests marked `gpu` without a GPU, and form groups for pytest-xdist.

    Tests that need a server which takes seconds to start are slow: the first waits for it. Tests
    with Ray come first, as two groups with a cluster each. The others are grouped by file, or by the
    server that they use, so that each server, module fixture and large import is paid once.
    """
    faults = 0
    for item in items:
        names = getattr(item, "fixturenames", ())
        if "ray_cluster" in names:
            item.add_marker(pytest.mark.ray)
        if not of_faults(item) and not SERVED.isdisjoint(names):
            item.add_marker(pytest.mark.slow)
        group = "forkserver" if "forkserver" in names else item.path.stem
        if item.get_closest_marker("ray"):
            second = item.path.name >= RAY_HALVES_AT
            if of_faults(item):
                faults += 1
                second = bool(faults % 2)
            group = "ray-2" if second else "ray-1"
        item.add_marker(pytest.mark.xdist_group(group))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA GPU on this machine"))
    items.sort(key=lambda item: item.get_closest_marker("ray") is None)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Collect without garbage collections: what is imported stays, and each would take 1.5 s.

    What is there at the end is left out of later ones, too.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_collection_finish(session: pytest.Session) -> None:
    """Fail if pytest-xdist ignores groups (3.8 with pytest 9.2): each process starts a Ray."""
    if getattr(session.config.option, "loadgroup", False):
        apart = [
            item.nodeid
            for item in session.items
            if item.get_closest_marker("ray") and "@ray" not in item.nodeid
        ]
        if apart:
            raise pytest.UsageError(
                f"{len(apart)} tests would not share a Ray, among them {apart[0]}"
            )


def long_after(first: int, values: Iterable[Any]) -> list[Any]:
    """Return the values of a parameter; all after the first ones are marked `long`."""
    every = list(values)
    return [*every[:first], *(pytest.param(v, marks=pytest.mark.long) for v in every[first:])]


Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def tfkd(tmp_path: Path, request: pytest.FixtureRequest) -> Run:
    """Return a function that runs `tfkd ARGS` in an empty directory, in a process of its own.

    The process has its imports behind it, unless it gets a variable of Python's own, or is to test
    faults.
    """
    python = [sys.executable]
    warm = python if of_faults(request.node) else request.getfixturevalue("warm")

    def run(
        *args: str, cwd: Path = tmp_path, timeout: float = 110, **env: str
    ) -> subprocess.CompletedProcess[str]:
        new = any(name.startswith("PYTHON") for name in env)
        return subprocess.run(
            [*(python if new else warm), "-m", "tfkd_ray", *args],
            cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, timeout=timeout,
        )  # fmt: skip

    return run


@pytest.fixture
def tfkd_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return a function that runs `tfkd ARGS` in this process, without seconds of imports.

    Not for tests of signals, pipes, the environment, or code of one's own.
    """

    def run(*args: str, cwd: Path = tmp_path) -> subprocess.CompletedProcess[str]:
        from tfkd_ray.cli.main import main

        out, err = io.StringIO(), io.StringIO()
        monkeypatch.chdir(cwd)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(args)
        return subprocess.CompletedProcess(args, code, out.getvalue(), err.getvalue())

    return run


def is_whole(export: Path) -> bool:
    """Return whether sha256sum finds all files of an exported folder as they are listed, no others."""
    listed = (export / "SHA256SUMS").read_text().splitlines()
    names = {"SHA256SUMS", *(line.partition("  ")[2] for line in listed)}
    found = subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=export)
    return found.returncode == 0 and names == {path.name for path in export.iterdir()}


@pytest.fixture(scope="session")
def forkserver() -> multiprocessing.context.ForkServerContext:
    """Return a way to start processes that have torch and the loop imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["hypothesis", "pytest", "torch.nn.parallel", "tfkd_ray.learn.loop", "tfkd_ray.run.tune"]
    )
    return context


TwoWorkers = Callable[..., None]


@pytest.fixture
def as_two_workers(forkserver: object) -> TwoWorkers:
    """Return a function that calls another in two processes, with their ranks and what is given."""

    def run(function: Callable[..., None], *given: Any) -> None:
        torch.multiprocessing.start_processes(function, given, nprocs=2, start_method="forkserver")

    return run


def train_as_worker(
    rank: int, folder: str, tree: dict[str, Any], teachers: Callable[..., Any]
) -> None:
    """Train as one of two workers, in a process of its own; the first saves the last state.

    Args:
        teachers: returns the teachers of a run.
    """
    from tfkd_ray.learn.config import TrainConfig
    from tfkd_ray.learn.loop import train
    from tfkd_ray.settings.schema import validated

    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    run = validated(TrainConfig, tree)
    for epoch in train(run, teacher=teachers(run)):
        last = epoch
    if rank == 0:
        torch.save(last.state(), f"{folder}/state.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    os._exit(0)  # see test_loop.py
