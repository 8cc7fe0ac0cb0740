"""`tfkd doctor`: each check finds its problem and prints a solution; the exit code follows."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from conftest import Run

from tfkd_ray.launch import doctor
from tfkd_ray.launch.doctor import Found
from tfkd_ray.run.connect import leaked_groups
from tfkd_ray.run.nodes import Node, versions_of_node
from tfkd_ray.store.storage import Directory

SPACE = "student: {name: mlp, hidden: [8]}\nobjective: ce\noptim: {lr: {low: 0.01, high: 0.5}}\n"


def one(found: Iterator[Found]) -> Found:
    (only,) = found
    return only


# --- each check by itself


def test_ray_with_and_without_its_default_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    assert one(doctor.check_installed()).level == "ok"
    needs = ["colorful; extra == 'default'", "no-such-package; extra == 'default'"]
    monkeypatch.setattr("importlib.metadata.requires", lambda name: needs)
    found = one(doctor.check_installed())
    assert (
        found.level == "problem"
        and "no-such-package" in found.text
        and "pip install 'ray[default" in found.text
    )


@pytest.mark.parametrize(
    "env, mode, level, text",
    [
        ({"RAY_AUTH_MODE": "disabled"}, 0o600, "problem", "RAY_AUTH_MODE=disabled: anyone who can reach the cluster can run code"),
        ({"RAY_AUTH_TOKEN": "x"}, None, "ok", "from RAY_AUTH_TOKEN"),
        ({}, None, "warning", "none yet"),
        ({}, 0o644, "problem", "can be read by other users (mode 644); chmod 600 "),
        ({}, 0o600, "ok", "mode 600"),
    ],
)  # fmt: skip
def test_the_token_is_on_and_private(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    env: dict[str, str],
    mode: int | None,
    level: str,
    text: str,
) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "token"), **env}.items():
        monkeypatch.setenv(name, value)
    if mode is not None:
        (tmp_path / "token").write_text("secret-word")
        (tmp_path / "token").chmod(mode)
    found = one(doctor.check_token())
    assert found.level == level and text in found.text and "secret-word" not in found.text


def test_another_cluster_on_the_host_is_named() -> None:
    """A real process with a raylet's command line represents it."""
    raylet = "import sys, time; print('up', flush=True); time.sleep(60)"
    words = [
        "bash",
        "-c",
        f'exec -a raylet {sys.executable} -c "{raylet}" --gcs-address=127.9.9.9:6399',
    ]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as other:
        try:
            assert other.stdout is not None and other.stdout.readline() == b"up\n"
            found = one(doctor.check_others(None))
            assert found.level == "warning" and "127.9.9.9:6399" in found.text
        finally:
            other.kill()
    assert "127.9.9.9:6399" not in one(doctor.check_others(None)).text


def test_a_long_temporary_directory_is_measured_against_107_bytes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for place, level in (("/tmp/ray", "ok"), ("/tmp/" + "x" * 60, "problem")):
        found = one(doctor.check_sockets({"n": len(place) + len(doctor.LONGEST_SOCKET)}))
        assert found.level == level and "107" in found.text
    assert "RAY_TMPDIR=/tmp/ray" in found.text


def test_little_shared_memory_is_said_with_the_size_to_give() -> None:
    found = one(doctor.check_shared_memory({"a": (64 * 10**6, 2e9), "b": (20 * 10**9, 2e9)}))
    assert (
        found.level == "warning"
        and "a: /dev/shm has 0.064 GB" in found.text
        and "--shm-size=2.2g" in found.text
    )
    assert one(doctor.check_shared_memory({"b": (20 * 10**9, 2e9)})).level == "ok"


def test_storage_of_this_machine_is_written_to_and_left_as_it_was(tmp_path: Path) -> None:
    assert one(doctor.check_storage_here(Directory(tmp_path / "a/b"))).level == "ok" and not list(
        tmp_path.iterdir()
    )
    (tmp_path / "file").write_text("")
    found = one(doctor.check_storage_here(Directory(tmp_path / "file")))
    assert found.level == "problem" and "choose another place: --storage DIR" in found.text


def test_a_node_that_does_not_see_the_storage_or_answer_is_named(tmp_path: Path) -> None:
    good, dead = Node("good"), Node("dead", silent="does not answer within 30 s")
    bad = Node("10.0.0.9 (ab)", storage="cannot use it (No such file or directory)")
    found = one(doctor.check_storage(Directory(tmp_path), [good, bad]))
    assert (
        found.level == "problem"
        and "10.0.0.9 (ab) cannot use it" in found.text
        and "mount it there" in found.text
    )
    assert one(doctor.check_storage(Directory(tmp_path), [good])).level == "ok"
    assert one(doctor.check_storage(None, [good])).level == "warning"
    assert one(doctor.check_nodes([good, dead])).text == "dead does not answer within 30 s"


def test_other_versions_on_a_node_are_named() -> None:
    here = versions_of_node()
    found = one(doctor.check_versions([Node("a", here), Node("b", {**here, "torch": "2.13.0"})]))
    assert found.level == "problem" and "torch 2.13.0" in found.text and "on b" in found.text
    assert one(doctor.check_versions([Node("a", here)])).level == "ok"


@pytest.mark.parametrize(
    "code, level", [(200, "problem"), (401, "ok"), (403, "ok"), (500, "warning")]
)
def test_a_cluster_that_lets_anyone_in_is_found(
    monkeypatch: pytest.MonkeyPatch, code: int, level: str
) -> None:
    class Head(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(code)
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Head) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        monkeypatch.setattr(doctor, "dashboard", lambda: f"127.0.0.1:{server.server_address[1]}")
        assert one(doctor.check_asked()).level == level


def test_lines_fit_80_columns() -> None:
    text = one(doctor.check_shared_memory({"10.0.0.1 (abcdef01)": (64 * 10**6, 2e9)})).line()
    assert max(map(len, text.splitlines())) <= 80 and text.startswith("warning  memory: ")
    assert all(line.startswith(" " * 9) for line in text.splitlines()[1:])


# --- the verb


def test_without_a_cluster_this_machine_is_looked_at(
    tfkd: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    run = tfkd("doctor", RAY_AUTH_TOKEN_PATH="none")
    lines = run.stdout.splitlines()
    assert run.returncode == 0, run.stdout + run.stderr
    assert {"ray", "token", "clusters", "sockets", "memory", "storage"} == {
        line.split(":")[0].split()[1] for line in lines if line[0] != " "
    }
    assert not [line for line in lines if len(line) > 80 and str(tmp_path) not in line]
    assert not (tmp_path / "tfkd_results").exists()
    (tmp_path / "token").write_text("x")
    (tmp_path / "token").chmod(0o644)
    assert tfkd("doctor", RAY_AUTH_TOKEN_PATH=str(tmp_path / "token")).returncode == 1


@pytest.mark.ray
def test_a_cluster_is_looked_at_and_a_leaked_group_is_removed(
    ray_cluster: str, tfkd: Run, warm: list[str], tmp_path: Path
) -> None:
    leak = (
        "import ray\n"
        f"ray.init('{ray_cluster}', log_to_driver=False)\n"
        "g = ray.util.placement_group([{'CPU': 1}], lifetime='detached'); ray.get(g.ready())\n"
    )
    (tmp_path / "leak.py").write_text(leak)
    env = {**os.environ, "RAY_AUTH_MODE": "token"}
    subprocess.run([*warm, "leak.py"], cwd=tmp_path, env=env, check=True, timeout=60)
    (tmp_path / "mine.yaml").write_text(SPACE)
    (tmp_path / "large.yaml").write_text(SPACE + "workers: 4\ncpus_per_worker: 2\n")

    run = tfkd("doctor", "--space", "large.yaml", "--storage", "mine.yaml")
    said = " ".join(run.stdout.split())
    assert run.returncode == 1, run.stdout + run.stderr
    assert "problem groups: 1 of ended jobs hold 1 CPU; tfkd doctor --reap removes them" in said
    assert "problem trials: workers: a trial needs 4 x 2 CPU" in said
    assert "problem storage: " in said and "mine.yaml cannot be written to from here" in said

    run = tfkd("doctor", "--space", "mine.yaml", "--storage", "results", "--reap")
    said = " ".join(run.stdout.split())
    assert run.returncode == 0, run.stdout + run.stderr
    for line in (
        "ok nodes: 1 of 1 ran a task", "ok access: refused without the token", "ok versions: ",
        "is one directory for 1 nodes", "ok trials: room for 2 at a time", "ok groups: removed 1 of ended jobs",
    ):  # fmt: skip
        assert line in said, run.stdout
    assert leaked_groups() == [] and not (tmp_path / "results").exists()


def test_what_cannot_be_looked_at_is_wrong_input(tfkd: Run, tmp_path: Path) -> None:
    run = tfkd("doctor", "--address", "127.0.0.1:9", RAY_ADDRESS="")
    assert run.returncode == 1 and "no Ray head answers at 127.0.0.1:9 within 10 s" in run.stderr
    run = tfkd("doctor", "--cluster", "aws-gpu", "--address", "auto")
    assert run.returncode == 2 and "--cluster and --address: one of them" in run.stderr
