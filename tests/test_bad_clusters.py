"""Failures on the way to a cluster: each has its sentence, its exit code and a time limit."""

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import ray
from conftest import ROOT

from tfkd_ray.cli.main import main
from tfkd_ray.launch.verbs import StepFailed, run, waiting_lines

SPACE = "objective: ce\nstudent: {name: mlp, hidden: [8]}\n"


class Head(BaseHTTPRequestHandler):
    """A head of the right version that disappears or falls silent as soon as it gets a job."""

    silent = False
    ended: int | str | None = "no job"
    """With which exit code every file `tune-...` of this folder has ended, as a job."""

    def do_GET(self) -> None:
        if self.path == "/api/version":
            body = json.dumps(
                {
                    "ray_version": ray.__version__,
                    "version": "4",
                    "ray_commit": "",
                    "session_name": "",
                }
            )
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())
        elif self.path.startswith("/api/jobs") and (self.silent or self.ended != "no job"):
            state = {
                "status": "SUCCEEDED" if self.ended == 0 else "FAILED",
                "message": "what Ray says",
                "entrypoint": "x",
            }
            jobs = [
                {**state, "submission_id": path.name, "driver_exit_code": self.ended}
                for path in Path().glob("tune-*")
            ]
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(jobs).encode())
        else:
            self.go()

    def go(self) -> None:
        """Stop the head."""
        if self.silent:
            time.sleep(60)
            return
        self.server.socket.close()
        threading.Thread(target=self.server.shutdown, daemon=True).start()
        self.connection.shutdown(socket.SHUT_RDWR)

    do_POST = do_PUT = go

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "x")
    (tmp_path / "mine.yaml").write_text(SPACE)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Head)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


@pytest.mark.slow
def test_a_head_that_dies_while_a_job_is_sent_is_told_from_a_job_that_failed(
    head: str, capfd: pytest.CaptureFixture[str]
) -> None:
    began = time.monotonic()
    assert main(["tune", "mine.yaml", "--address", head, "--storage", "/mnt/x"]) == 1
    assert time.monotonic() - began < 60
    last = capfd.readouterr().err.rpartition("tfkd tune: ")[2]
    assert (
        f"the head at {head} disappeared while job tune-" in last
        and "so it is unknown whether the job runs" in last
    )


@pytest.mark.slow
def test_a_head_that_falls_silent_while_a_job_is_sent_is_given_up(
    head: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Head, "silent", True)
    monkeypatch.setattr("tfkd_ray.launch.verbs.SUBMIT_S", 6)
    began = time.monotonic()
    assert main(["tune", "mine.yaml", "--address", head, "--storage", "/mnt/x"]) == 1
    assert time.monotonic() - began < 30
    assert (
        "the job did not start" in (said := capfd.readouterr().err)
        and "did not end within 6 s" in said
    )


@pytest.mark.parametrize(
    "code, ends", [(0, 0), (1, 1), (2, 2), (3, 1), (7, 7), (-9, 1), (None, 1)], ids=lambda n: f"{n}"
)
@pytest.mark.slow
def test_a_job_ends_with_the_exit_code_that_tfkd_has_there(
    head: str,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    code: int | None,
    ends: int,
) -> None:
    monkeypatch.setattr(Head, "ended", code)
    monkeypatch.setattr(
        "tfkd_ray.launch.verbs.submit_command", lambda address, job, *more: ["touch", job]
    )
    monkeypatch.setattr("tfkd_ray.launch.verbs.logs_command", lambda address, job: ["true"])
    assert main(["tune", "mine.yaml", "--address", head, "--storage", "/mnt/x"]) == ends
    err = capfd.readouterr().err
    assert ("failed: what Ray says" in err) is bool(ends) and "Traceback" not in err


def test_a_command_that_takes_too_long_is_ended() -> None:
    began = time.monotonic()
    with pytest.raises(StepFailed, match=r"sleeping did not end within 0\.5 s"):
        run(["sleep", "30"], what="sleeping", limit_s=0.5)
    assert time.monotonic() - began < 5


PROVIDERS = {
    "aws": (
        {"boto3.py": "boto3"},
        "boto3.py",
        "class Session:\n    def get_credentials(self): {}\n",
        "aws configure",
    ),
    "gcp": (
        {
            "googleapiclient.py": "google-api-python-client",
            "google/auth.py": "google-auth",
            "google_auth_httplib2.py": "google-auth-httplib2",
        },
        "google/auth.py",
        "def default(): {}\n",
        "gcloud auth application-default login",
    ),
    "azure": (
        {
            "azure/identity.py": "azure-identity",
            "azure/mgmt/compute.py": "azure-mgmt-compute",
            "azure/mgmt/network.py": "azure-mgmt-network",
            "azure/mgmt/resource.py": "azure-mgmt-resource",
            "azure/common/credentials.py": "azure-common",
            "bin/az": "azure-cli",
        },
        "bin/az",
        "#!{python}\n{}\n",
        "az login",
    ),
}
"""By provider: fakes of its packages; the one that checks credentials; the login command."""


@pytest.fixture
def rented(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str, str], dict[str, Path]]:
    """Install a provider's fake packages, with an answer about credentials; return (name, path)."""

    def put(provider: str, answer: str) -> dict[str, Path]:
        names, asked, content, _ = PROVIDERS[provider]
        found = {}
        for name, package in names.items():
            path = found[package] = tmp_path / "site" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content.format(answer, python=sys.executable) if name == asked else "")
            path.chmod(0o755)
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "site"), str(ROOT)]))
        monkeypatch.setenv("PATH", f"{tmp_path / 'site/bin'}:/usr/bin:/bin")
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setenv("RAY_AUTH_TOKEN", "x")
        (tmp_path / ".ray").mkdir(exist_ok=True)
        (tmp_path / ".ray/auth_token").write_text("x")
        return found

    return put


def refusing(provider: str) -> str:
    return {
        "aws": "return None",
        "gcp": "raise ValueError('none')",
        "azure": "raise SystemExit(1)",
    }[provider]


@pytest.mark.parametrize(
    "provider, package",
    [
        (provider, package)
        for provider, (names, *_) in PROVIDERS.items()
        for package in names.values()
    ],
)
def test_a_missing_package_of_a_provider_is_named_and_not_taken_for_missing_credentials(
    rented: Callable[[str, str], dict[str, Path]],
    capsys: pytest.CaptureFixture[str],
    provider: str,
    package: str,
) -> None:
    path = rented(provider, refusing(provider))[package]
    if path.suffix:
        path.write_text("raise ImportError")
    else:
        path.unlink()
    assert main(["cluster", "up", f"{provider}-gpu"]) == 2
    err = capsys.readouterr().err
    assert f"provider {provider} needs " in err and f"here; pip install {package}\n" in err, err
    assert "no credentials" not in err


@pytest.mark.parametrize("provider", PROVIDERS)
def test_without_a_providers_credentials_nothing_is_started(
    rented: Callable[[str, str], dict[str, Path]], capsys: pytest.CaptureFixture[str], provider: str
) -> None:
    rented(provider, refusing(provider))
    assert main(["cluster", "up", f"{provider}-gpu"]) == 2
    assert (
        f"no credentials for {provider} here; {PROVIDERS[provider][-1]}" in capsys.readouterr().err
    )


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.slow
def test_a_provider_that_does_not_answer_is_given_up(
    rented: Callable[[str, str], dict[str, Path]], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    provider: str,
) -> None:  # fmt: skip
    monkeypatch.setattr("tfkd_ray.launch.verbs.ASK_S", 2)
    rented(provider, "import time; time.sleep(60)")
    began = time.monotonic()
    assert main(["cluster", "up", f"{provider}-gpu"]) == 1
    assert time.monotonic() - began < 20
    err = capsys.readouterr().err
    assert (
        f"{provider} did not answer within 2 s, so nothing was started" in err
        and "Traceback" not in err
    )


def test_a_kubectl_that_does_not_answer_is_given_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tfkd_ray.launch.verbs.ASK_S", 0.5)
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "kubectl").write_text("#!/bin/bash\nexec /bin/sleep 60\n")
    (tmp_path / "kubectl").chmod(0o755)
    assert main(["cluster", "up", "kuberay-cluster"]) == 1
    assert "kubectl did not answer within 0.5 s" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv, sentence",
    [
        (["confirm", "digits_arms", "--detach"], "--detach: needs --cluster FILE or --address http://..."),
        (["confirm", "digits_arms", "--address", "http://127.0.0.1:9"], "--storage: required with --address http://..."),
        (["confirm", ".", "--address", "http://127.0.0.1:9"], "an absolute path that the cluster can reach, got ."),
        (["confirm", "digits_arms", "--cluster", "aws-gpu", "cpus_per_worker=500"], "room for 0 of them"),
        (["teacher", "train", "digits_tfkd", "--address", "http://127.0.0.1:9"], "--storage: required with --address http://..."),
        (["teacher", "train", "digits_tfkd", "--cluster", "mine.yaml"], "is a search space or an arms file, not a cluster file"),
        (["doctor", "--cluster", "mine.yaml"], "is a search space or an arms file, not a cluster file"),
    ],
)  # fmt: skip
def test_what_runs_as_a_job_is_checked_before_it_is_sent(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    argv: list[str],
    sentence: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(SPACE)
    assert main(argv) == 2
    assert sentence in capsys.readouterr().err


JOBS = {
    ("confirm", "digits_arms", "--preset", "smoke", "--seeds", "2", "--name", "n"):
        "-m tfkd_ray confirm digits_arms.yaml --preset smoke --seeds 2 --name n --storage /mnt/x",
    ("confirm", "/mnt/x/e", "--top-k", "1", "--train-only"):
        "-m tfkd_ray confirm /mnt/x/e --top-k 1 --train-only",
    ("teacher", "train", "digits_tfkd", "epochs=2"): "-m tfkd_ray teacher train digits_tfkd.yaml epochs=2 --storage /mnt/x",
    ("doctor", "--reap", "--space", "mine.yaml"): "-m tfkd_ray doctor --reap --space mine.yaml --storage /mnt/x",
}  # fmt: skip


@pytest.mark.parametrize("argv", JOBS, ids=lambda argv: " ".join(argv[:2]))
def test_what_a_job_is_sent_is_the_command_with_paths_of_the_cluster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, argv: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(SPACE)
    sent: list[list[str]] = []
    for module in ("verbs", "as_job"):
        monkeypatch.setattr(f"tfkd_ray.launch.{module}.check_ray_version", lambda address: None)
    monkeypatch.setattr(
        "tfkd_ray.launch.verbs._submit_job", lambda command, *more: sent.append(command)
    )
    detach = [] if argv[0] == "doctor" else ["--detach"]
    monkeypatch.setattr(
        "tfkd_ray.launch.verbs._state_of", lambda address, job: {"status": "SUCCEEDED"}
    )
    monkeypatch.setattr("tfkd_ray.launch.verbs.logs_command", lambda address, job: ["true"])
    storage = (
        [] if argv[1] == "/mnt/x/e" else ["--storage", "/mnt/x"]
    )  # a comparison is stored beside its sweep
    assert main([*argv, "--address", "http://127.0.0.1:9", *storage, *detach]) == 0
    ((*_, words),) = [" ".join(command).partition(" -- ") for command in sent]
    assert words == f"python {JOBS[argv]}"


def test_what_an_autoscaler_waits_for_is_read_from_rays_own_status() -> None:
    text = (
        "Node status\nActive:\n 1 head\nPending:\n 10.0.0.5: gpu1, setting-up\n gpu4, 2 launching\nRecent failures:\n"
        " (no failures)\n\nResources\nPending Demands:\n {'CPU': 1.0, 'GPU': 1.0} * 1 (PACK): 3+ pending placement groups\n"
    )
    assert waiting_lines(text) == [
        "starting: 10.0.0.5: gpu1, setting-up",
        "starting: gpu4, 2 launching",
        "waits: {'CPU': 1.0, 'GPU': 1.0} * 1 (PACK): 3+ pending placement groups",
    ]
    assert (
        waiting_lines("Pending:\n (no pending nodes)\nPending Demands:\n (no resource demands)\n")
        == []
    )
