"""One Ray cluster of 2 CPUs for the whole session; commands that tests start join it by RAY_ADDRESS."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault(
    "RAY_worker_niceness", "0"
)  # Ray's 15 starves trials while the other half of the tests runs
os.environ.setdefault("COLUMNS", "100")
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="tfkd-cache-")  # decoded data sets
# of test_remote.py's own server; here, so that the processes of the session's Ray have them
os.environ |= {
    "AWS_ACCESS_KEY_ID": "tfkd-key",
    "AWS_SECRET_ACCESS_KEY": "s3cret-of-s3",
    "AWS_DEFAULT_REGION": "us-east-1",
}

if (
    signal.getsignal(signal.SIGINT) == signal.SIG_IGN
):  # as a shell leaves it to what runs behind `&`
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).parent.parent
ARMS = [p for p in sorted((ROOT / "search_spaces").rglob("*.yaml")) if "\narms:" in p.read_text()]
SHIPPED = [p for p in sorted((ROOT / "search_spaces").rglob("*.yaml")) if p not in ARMS]

torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _no_power_cut() -> Iterator[None]:
    """Nothing here outlives a power cut, and a busy disk takes 5 ms to promise it, thousands of times."""
    before = os.fsync
    os.fsync = lambda fd: None
    yield
    os.fsync = before


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[str]:
    """Address of the session's cluster."""
    import ray

    from tfkd_ray.run.auth import own_token
    from tfkd_ray.run.connect import DRIVER

    own_token()
    ray.init(
        address="local", num_cpus=2, resources={DRIVER: 1000}, include_dashboard=True, log_to_driver=False,
        logging_level="ERROR", object_store_memory=150 * 2**20,
    )  # fmt: skip
    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
    yield os.environ["RAY_ADDRESS"]
    del os.environ["RAY_ADDRESS"]
    ray.shutdown()


@pytest.hookimpl(tryfirst=True)  # before -m is looked at
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` run where there is one; those that need Ray share one process, and so one cluster."""
    for item in items:
        if "ray_cluster" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.ray)
        if item.get_closest_marker("ray"):
            item.add_marker(pytest.mark.xdist_group("ray"))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA GPU on this machine"))


def pytest_collection_finish(session: pytest.Session) -> None:
    """pytest-xdist 3.8 with pytest 9.2 ignores groups without a word: each process would start a Ray of its own."""
    if getattr(session.config.option, "loadgroup", False):
        apart = [
            item.nodeid
            for item in session.items
            if item.get_closest_marker("ray") and "@ray" not in item.nodeid
        ]
        if apart:
            raise pytest.UsageError(
                f"{len(apart)} tests would not share one Ray, among them {apart[0]}"
            )


Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def tfkd(tmp_path: Path) -> Run:
    """Run `tfkd ARGS` in an empty directory, as a person does."""

    def run(
        *args: str, cwd: Path = tmp_path, timeout: float = 110, **env: str
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "tfkd_ray", *args],
            cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, timeout=timeout,
        )  # fmt: skip

    return run
