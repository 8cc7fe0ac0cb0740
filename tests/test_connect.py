"""Connecting to Ray with or without the token, as the head requires; and heads that have died."""

import errno
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tfkd_ray.run import connect as cluster
from tfkd_ray.run.connect import _found_here, connect
from tfkd_ray.settings.errors import ConfigError, Unreachable

CONNECT = """
import ray
from tfkd_ray.run.connect import connect
from tfkd_ray.settings.errors import ConfigError
try:
    connect()
    print("joined", ray.get(ray.remote(lambda: "and answered").options(num_cpus=0).remote()))
except ConfigError as error:
    print("refused:", error)
"""


def connected(address: str, **env: str) -> str:
    """Return the output of a Python program that imports Ray and joins RAY_ADDRESS's cluster."""
    given = {k: v for k, v in os.environ.items() if not k.startswith("RAY_AUTH")} | {
        "RAY_ADDRESS": address,
        **env,
    }
    run = subprocess.run(
        [sys.executable, "-c", CONNECT], env=given, capture_output=True, text=True, timeout=110
    )
    return run.stdout or run.stderr


@pytest.mark.long
@pytest.mark.ray
def test_a_program_that_imported_ray_first_joins_a_cluster_with_the_token_that_it_wants(
    ray_cluster: str,
) -> None:
    assert "joined and answered" in connected(ray_cluster)


@pytest.mark.ray
@pytest.mark.parametrize(
    ("env", "sentence"),
    [
        ({"RAY_AUTH_TOKEN": "x" * 64}, "it answers, so the token here"),
        pytest.param(
            {"RAY_AUTH_TOKEN_PATH": "/nowhere/token"},
            "it requires a token, and there is no token here (/nowhere/token)",
            marks=pytest.mark.long,
        ),
        pytest.param(
            {"RAY_AUTH_MODE": "disabled"},
            "RAY_AUTH_MODE=disabled here sends none; unset RAY_AUTH_MODE",
            marks=pytest.mark.long,
        ),
    ],
    ids=["another's", "none", "disabled"],
)
def test_a_token_that_a_cluster_does_not_take_is_said_at_once(
    ray_cluster: str, env: dict[str, str], sentence: str
) -> None:
    said = connected(ray_cluster, **env)
    assert said.startswith("refused:") and sentence in said, said


def test_a_ray_that_does_not_start_in_time_is_a_sentence(
    no_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(**options: object) -> None:
        raise Exception("The current node timed out during startup.\nDid not find socket name")

    monkeypatch.setattr("tfkd_ray.run.connect.ray.init", slow)
    monkeypatch.setenv("RAY_ADDRESS", "")
    with pytest.raises(
        Unreachable,
        match=r"Ray did not start on this machine: The current node timed out .* try again",
    ):
        connect()


@pytest.mark.parametrize("package", [pytest.param("torch", marks=pytest.mark.long), "pydantic"])
@pytest.mark.slow
def test_a_python_that_lacks_a_package_says_which_python_and_which_package(
    package: str, tmp_path: Path
) -> None:
    """Simulates a head whose `python` runs a job outside of tfkd's environment."""
    code = f"import sys; sys.modules[{package!r}] = None; from tfkd_ray.cli.main import main; sys.exit(main(['tune', 'digits_tfkd']))"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=110
    )
    assert run.returncode == 1 and "Traceback" not in run.stderr, run.stderr
    assert f"tfkd tune: {sys.executable} has no '{package}', which tfkd needs" in run.stderr


# --- heads that are gone


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulate a machine without Ray, in a process that is not connected."""
    monkeypatch.setattr("tfkd_ray.run.connect.ray.is_initialized", lambda: False)
    monkeypatch.setattr("psutil.process_iter", lambda *args, **options: iter(()))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize("by", ["--address", "RAY_ADDRESS"])
def test_auto_with_an_address_that_an_ended_cluster_has_left_is_said_within_seconds(
    no_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray/ray_current_cluster").write_text(f"127.0.0.1:{free_port()}")
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setenv("RAY_ADDRESS", "auto" if by == "RAY_ADDRESS" else "")
    began = time.monotonic()
    with pytest.raises(
        Unreachable,
        match=r"no Ray head answers at 127.*ray_current_cluster, which a cluster that has ",
    ):
        connect("auto" if by == "--address" else None)
    assert time.monotonic() - began < 15


@pytest.mark.parametrize("kind", ["folder", "pipe", "binary", "another user's"])
@pytest.mark.timeout(20)
def test_auto_with_an_address_file_that_cannot_be_read_is_said_at_once(
    no_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    file = tmp_path / "ray/ray_current_cluster"
    file.parent.mkdir()
    if kind == "folder":
        file.mkdir()
    elif kind == "pipe":
        os.mkfifo(file)
    else:
        file.write_bytes(b"127.0.0.1:1" if kind == "another user's" else b"\xff\xfe\x00")
    if kind == "another user's":  # root may read every file

        def no(path: Path) -> None:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))

        monkeypatch.setattr("tfkd_ray.run.connect.opened", no)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    with pytest.raises(
        Unreachable, match=r"ray_current_cluster, where Ray notes its last .* cannot be read: "
    ):
        connect("auto")


@pytest.mark.parametrize("host", ["head..local", ".", "é..x", f"{'a' * 70}.example"])
def test_what_is_no_name_of_a_host_is_said(no_ray: None, host: str) -> None:
    with pytest.raises(Unreachable, match=r"no Ray head answers at .*:6379"):
        connect(f"{host}:6379")


@pytest.mark.slow
def test_auto_where_no_ray_runs_is_said(
    no_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    with pytest.raises(
        Unreachable, match="no Ray cluster runs on this machine; start one with `ray start --head`"
    ):
        _found_here()


class Page(BaseHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(params=["a web server", "silent"])
def stranger(request: pytest.FixtureRequest) -> Iterator[str]:
    """Yield the address of a listening socket that is not a Ray head."""
    if request.param == "silent":
        with socket.create_server(("127.0.0.1", 0)) as server:
            yield f"127.0.0.1:{server.getsockname()[1]}"
        return
    with ThreadingHTTPServer(("127.0.0.1", 0), Page) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{web.server_address[1]}"
        web.shutdown()


@pytest.mark.slow
def test_a_port_where_something_else_listens_is_said_within_seconds(
    no_ray: None, stranger: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cluster.CONNECT_TIMEOUT_S <= 10
    monkeypatch.setattr(cluster, "CONNECT_TIMEOUT_S", 2)
    began = time.monotonic()
    with pytest.raises(
        ConfigError, match=f"what listens at {stranger} does not answer as a Ray head does"
    ):
        connect(stranger)
    assert time.monotonic() - began < 7


def test_the_address_of_a_client_is_refused_with_the_one_that_is_meant(no_ray: None) -> None:
    for address in ("ray://head:10001", "ray://[::1]:10001", "ray://head"):
        with pytest.raises(ConfigError, match=r"got 'ray://.*the port of `ray start` instead"):
            connect(address)
    with pytest.raises(ConfigError, match=r"got 'http://head:8265'; only --address takes it"):
        connect("http://head:8265")
    with pytest.raises(ConfigError, match=r"\(a job\), got 'anyscale://head:1'$"):
        connect("anyscale://head:1")
