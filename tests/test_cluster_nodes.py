"""Sweeps on real clusters of several nodes: one joins, one dies, one is cut off; wrong tokens.

Three kinds of nodes run on this machine: raylets of `ray.cluster_utils.Cluster`, `ray start` on
loopback with a token, and network namespaces with their own addresses. All have their own ports and
temporary directories.
"""

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import ROOT, Run
from safetensors.torch import load, load_file
from test_faults import assert_no_orphans, outcome
from test_remote import Server

from tfkd_ray.learn.loop import train
from tfkd_ray.settings.yaml import dump_yaml
from tfkd_ray.space.space import build_space
from tfkd_ray.store.experiment import read_metrics, read_records

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(500)]

BIN = Path(sys.executable).parent
SPACE: dict[str, Any] = {
    "student": {"name": "mlp", "hidden": [16]},
    "objective": "ce",
    "epochs": 40,
    "checkpoint_every_s": 0,
    "optim": {"lr": {"choices": [0.1, 0.05]}, "batch_size": 64},
    "search": {"sampler": "random", "num_samples": 10, "stopping": "none", "max_failed_trials": 1},
}


def end(place: Path) -> None:
    """Kill the processes whose command line names a directory of these tests."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                if (
                    f"{place}/".encode() in path.read_bytes()
                    and int(path.parent.name) != os.getpid()
                ):
                    os.kill(int(path.parent.name), number)
        time.sleep(1)


@pytest.fixture
def place() -> Iterator[Path]:
    """Yield a short path: Ray's sockets are below it."""
    folder = Path(tempfile.mkdtemp(prefix="tn"))
    yield folder
    end(folder)
    shutil.rmtree(folder, ignore_errors=True)


# --- raylets that come and go


def reported(script: str, place: Path, what: Any, *more: str) -> Any:
    """Return the report of a script beside this file on a sweep with its own cluster."""
    words = [
        sys.executable,
        str(Path(__file__).parent / script),
        str(place / "s"),
        json.dumps(what),
        *more,
    ]
    env = {**os.environ, "TMPDIR": str(place), "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "t" * 64}
    run = subprocess.run(words, env=env, capture_output=True, text=True, timeout=400)
    lines = [line for line in run.stdout.splitlines() if line.startswith("REPORT ")]
    assert lines, run.stderr[-3000:]
    return json.loads(lines[0][7:])


def sweep_on_nodes(place: Path, space: dict[str, Any], *more: str) -> dict[str, Any]:
    report: dict[str, Any] = reported("sweep_on_nodes.py", place, space, *more)
    places = Counter(where for *_, where in report["epochs"])
    assert places["killed"] == 1, places
    return report


def assert_same_as_never_lost(experiment: Path, trials: int) -> None:
    """Assert that every trial has each epoch once, bit by bit as in an undisturbed run."""
    records = read_records(experiment)
    assert [r.status for r in records] == ["done"] * trials, [
        (r.name, r.status, r.reason) for r in records
    ]
    weights: dict[float, set[bytes]] = {}
    for record in records:
        lr = record.config["optim"]["lr"]
        alone = [e.metrics for e in train(build_space({**record.config, "workers": 1}).single())]
        told = [(m["epoch"], m["train_loss"], m["val_accuracy"]) for m in record.metrics]
        if record.config["workers"] == 1:
            assert told == [(m["epoch"], m["train_loss"], m["val_accuracy"]) for m in alone], (
                record.name
            )
        else:
            assert [epoch for epoch, *_ in told] == [m["epoch"] for m in alone]
        tensors = sorted(load_file(record.folder / "student.safetensors").items())
        weights.setdefault(lr, set()).add(
            b"".join(tensor.numpy().tobytes() for _, tensor in tensors)
        )
    assert all(len(found) == 1 for found in weights.values()), "weights of equal trials differ"


@pytest.mark.slow
def test_a_sweep_goes_on_after_its_machine_was_switched_off(place: Path) -> None:
    """Kill driver, Ray and trials and remove Ray's folder, as a reboot does, three times."""
    search = {"sampler": {"name": "tpe", "startup": 3}, "num_samples": 8, "max_concurrent": 1}
    space = {
        **SPACE,
        "epochs": 90,
        "optim": {"lr": {"low": 0.01, "high": 0.5, "log": True}},
        "search": search,
    }
    (place / "space.yaml").write_text(dump_yaml(space))
    env = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {"TMPDIR": str(place)}
    experiment = place / "tfkd_results/cut"

    def driver(*argv: str) -> subprocess.Popen[bytes]:
        with (place / "said").open("ab") as said:
            return subprocess.Popen(
                [BIN / "tfkd", *argv], cwd=place, env=env, stdout=said, stderr=said
            )

    def lines() -> int:
        return sum(
            path.read_bytes().count(b"\n") for path in experiment.glob("trials/*/metrics.jsonl")
        )

    def in_a_trial() -> bool:
        """Return whether a trial is at work, and not about to end."""
        records = read_records(experiment)
        return any(r.status == "running" and 0 < len(r.metrics) < 70 for r in records)

    assert driver("tune", "space.yaml", "--name", "whole").wait(120) == 0, (
        place / "said"
    ).read_text()
    running = driver("tune", "space.yaml", "--name", "cut")
    for cut in range(3):
        before, until = lines(), time.monotonic() + 60
        while lines() < before + 30 or not in_a_trial():
            assert running.poll() is None and time.monotonic() < until, (
                place / "said"
            ).read_text()[-2000:]
            time.sleep(0.02)
        running.send_signal(signal.SIGSTOP)  # nothing is written while its processes are listed
        for process in [
            psutil.Process(running.pid),
            *psutil.Process(running.pid).children(recursive=True),
        ]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        running.wait()
        shutil.rmtree(place / "ray")
        assert any(r.status == "running" for r in read_records(experiment)), cut
        running = driver("resume", str(experiment))
    assert running.wait(120) == 0, (place / "said").read_text()[-2000:]
    assert (
        outcome(experiment) == outcome(place / "tfkd_results/whole")
        and len(outcome(experiment)) == 8
    )
    assert_no_orphans(experiment)


@pytest.mark.slow
def test_a_node_that_is_added_is_used_and_the_trials_of_one_that_dies_go_on_elsewhere(
    place: Path,
) -> None:
    (place / "slow").touch()  # trials are slow, so that all nodes have one, until one node is dead
    network = {"name": "own", "path": "tests.slow:network", "args": {"file": str(place / "slow")}}
    space = {
        **SPACE,
        "student": network,
        "epochs": 60,
        "search": {**SPACE["search"], "num_samples": 8},
    }
    report = sweep_on_nodes(place, space)
    killed = next(i for i, (*_, where) in enumerate(report["epochs"]) if where == "killed")
    number, at, _ = report["epochs"][killed]
    assert number in report["lost"] and report["nodes"] == 3
    assert {where for *_, where in report["epochs"][:killed]} == {"first", "doomed", "added"}
    later = [(epoch, where) for n, epoch, where in report["epochs"][killed + 1 :] if n == number]
    assert later[0][0] in (at, at + 1) and {where for _, where in later} <= {"first", "added"}, (
        "from its checkpoint"
    )
    assert report["failed"] == 0, "a lost node is not the trial's failure"
    assert_same_as_never_lost(place / "s/e", 8)


@pytest.mark.slow
def test_a_trial_of_two_workers_that_loses_a_node_goes_on_with_the_one_that_was_added(
    place: Path,
) -> None:
    space = {**SPACE, "workers": 2, "search": {**SPACE["search"], "num_samples": 4}}
    report = sweep_on_nodes(place, space)
    killed = next(i for i, (*_, where) in enumerate(report["epochs"]) if where == "killed")
    number, at, _ = report["epochs"][killed]
    assert number in report["lost"] and report["nodes"] == 3 and report["failed"] == 0
    first_again = next(epoch for n, epoch, where in report["epochs"][killed + 1 :] if n == number)
    assert first_again in (at, at + 1), "from its checkpoint"
    assert_same_as_never_lost(place / "s/e", 4)


@pytest.mark.parametrize("workers", [2, pytest.param(1, marks=pytest.mark.slow)])
def test_a_trial_whose_node_is_preempted_goes_on_elsewhere_within_a_minute(
    place: Path, workers: int
) -> None:
    space = {
        **SPACE,
        "epochs": 400,
        "workers": workers,
        # of trials of one worker, one for each node, so that the preempted one has a trial, too
        "search": {**SPACE["search"], "num_samples": 3 if workers == 1 else 1},
    }
    if workers == 1:
        (place / "slow").touch()
        network = {
            "name": "own",
            "path": "tests.slow:network",
            "args": {"file": str(place / "slow")},
        }
        space = {**space, "student": network, "epochs": 60}
    report = sweep_on_nodes(place, space, "drain")
    assert report["lost"] and report["failed"] == 0 and report["nodes"] == 3
    assert report["again_s"] < 5 + 60, report["again_s"]
    assert_same_as_never_lost(place / "s/e", space["search"]["num_samples"])


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_a_node_whose_gpu_is_broken_gets_no_more_trials_and_burns_none(
    place: Path, workers: int
) -> None:
    network = {
        "name": "own",
        "path": "tests.broken:network",
        "args": {"file": str(place / "broken")},
    }
    search = {**SPACE["search"], "num_samples": 8 if workers == 1 else 2}
    space = {**SPACE, "student": network, "epochs": 3, "workers": workers, "search": search}
    report = reported("sweep_beside_broken.py", place, space)
    assert report["states"] == ["done"] * search["num_samples"], report
    assert sum(report["lost"]) <= (3 if workers == 1 else 2), report
    for note in report["notes"]:
        assert (
            f"({report['bad'][:8]}): 3 trials in a row were lost there: AcceleratorError: CUDA error: an illegal"
            in note
        )
        assert note.endswith("the node gets no more trials of this sweep")
    assert len(report["notes"]) == (sum(report["lost"]) == 3), report


@pytest.mark.slow
def test_workers_of_a_trial_are_packed_on_a_node_or_spread_over_all_as_placement_says(
    place: Path,
) -> None:
    space = {**SPACE, "epochs": 2, "workers": 2, "search": {**SPACE["search"], "num_samples": 1}}
    spread, packed = reported(
        "sweep_placed.py",
        place,
        [{**space, "placement": placement} for placement in ("spread", "pack")],
    )
    assert spread == {"errors": 0, "seen": [{"strategy": "SPREAD", "nodes": 2}]}
    assert packed == {"errors": 0, "seen": [{"strategy": "PACK", "nodes": 1}]}


# --- ray start, with a token

PORTS = {"port": 6490, "dashboard-port": 8390, "ray-client-server-port": 6491}
DASHBOARD = "http://127.0.0.1:8390"


def ray_start(
    place: Path, name: str, *words: str, inside: tuple[str, ...] = (), **env: str
) -> None:
    """Start a node; its processes have `place` in their command lines."""
    given = {
        **os.environ,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(place / "token"),
        **env,
    }
    given.pop("RAY_ADDRESS", None)
    given["PATH"] = f"{BIN}{os.pathsep}{given['PATH']}"  # jobs use the node's own python
    command = [*inside, str(BIN / "ray"), "start", *words, "--num-cpus=1", "--object-store-memory=150000000",
               f"--temp-dir={place}/{name}"]  # fmt: skip
    run = subprocess.run(command, env=given, capture_output=True, text=True, timeout=90)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.fixture
def started(place: Path) -> Path:
    """Start a head and two workers on loopback."""
    (place / "token").write_text(secrets.token_hex(32))
    (place / "token").chmod(0o600)
    (place / "wrong").write_text("0" * 64)
    (place / "wrong").chmod(0o600)
    (place / "work").mkdir()
    space = {**SPACE, "search": {**SPACE["search"], "num_samples": 2}}
    (place / "work/space.yaml").write_text(json.dumps(space))
    ports = [f"--{name}={port}" for name, port in PORTS.items()]
    ray_start(place, "h", "--head", "--node-ip-address=127.0.0.1", *ports, "--dashboard-agent-listen-port=6492",
              '--resources={"tfkd_driver": 1000}')  # fmt: skip
    for n in (1, 2):
        ray_start(place, f"w{n}", "--address=127.0.0.1:6490", "--node-ip-address=127.0.0.1",
                  f"--dashboard-agent-listen-port={6492 + n}")  # fmt: skip
    return place


def test_a_head_and_two_workers_take_sweeps_by_address_and_as_jobs_with_the_right_token_only(
    started: Path, tfkd: Run
) -> None:
    place, http, gcs = started, DASHBOARD, "127.0.0.1:6490"

    def run(*words: str, token: str = "token") -> tuple[subprocess.CompletedProcess[str], float]:
        env = {"RAY_AUTH_TOKEN_PATH": str(place / token), "RAY_ADDRESS": ""}
        began = time.monotonic()
        done = tfkd(*words, cwd=place / "work", timeout=150, **env)
        assert (
            place / "token"
        ).read_text() not in done.stdout + done.stderr and "Traceback" not in done.stderr
        return done, time.monotonic() - began

    refusals = {
        ("wrong", gcs): ("it answers, so the token here", 60),
        ("none", gcs): ("there is no token here", 60),
        ("wrong", http): ("rejects the token that is here", 20),
        ("none", http): ("requires a token, and there is none here", 20),
    }

    def refused(token: str, address: str) -> tuple[subprocess.CompletedProcess[str], float]:
        return run(
            "tune", "space.yaml", "--address", address, "--storage", str(place / "s"), token=token
        )

    asked = {key: refused(*key) for key in refusals if key[1] == http}  # alone: theirs take seconds
    with ThreadPoolExecutor() as pool:  # the others mostly wait for Ray
        waiting = {key: pool.submit(refused, *key) for key in refusals if key[1] == gcs}
        swept, _ = run(
            "tune",
            "space.yaml",
            "--address",
            gcs,
            "--storage",
            str(place / "s"),
            "--name",
            "direct",
        )
    asked |= {key: one.result() for key, one in waiting.items()}
    assert swept.returncode == 0, swept.stderr
    assert_same_as_never_lost(place / "s/direct", 2)
    for key, (sentence, seconds) in refusals.items():
        answer, took = asked[key]
        assert answer.returncode == 2 and sentence in answer.stderr, (key, answer.stderr)
        assert took < seconds, (key, took)

    sent, _ = run(
        "tune", "space.yaml", "--address", http, "--storage", str(place / "s"), "--name", "job"
    )
    assert sent.returncode == 0, sent.stderr
    assert_same_as_never_lost(place / "s/job", 2)
    assert {path.name for path in (place / "s").iterdir()} == {"direct", "job"}

    # neither Ray's answers about the job nor its files contain the token
    def told() -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads(asked_of(place, "/api/jobs/"))
        return found

    (job,) = (job for job in told() if job["submission_id"])
    assert job["status"] == "SUCCEEDED" and "--name job" in job["entrypoint"]
    said = [
        asked_of(place, f"/api/jobs/{more}")
        for more in ("", job["submission_id"], f"{job['submission_id']}/logs")
    ]
    assert "trials" in said[-1] and (place / "token").read_text() not in "".join(said)

    # `auto` finds the cluster by the file that `ray start` has written
    (place / "ray").symlink_to(place / "h")
    drivers = sum(job["type"] == "DRIVER" for job in told())
    joined = tfkd("tune", "space.yaml", "--address", "auto", "--storage", str(place / "s"), "--name", "auto",
                  cwd=place / "work", RAY_TMPDIR=str(place), RAY_ADDRESS="", RAY_AUTH_TOKEN_PATH=str(place / "token"))  # fmt: skip
    assert joined.returncode == 0, joined.stderr
    assert_same_as_never_lost(place / "s/auto", 2)
    assert sum(job["type"] == "DRIVER" for job in told()) == drivers + 1


SWEEP = """
import sys
from tfkd_ray.settings.errors import ConfigError
from tfkd_ray.run.tune import build_tuner
try:
    result = build_tuner(sys.argv[1], name="python", storage=sys.argv[2]).fit()
    print("errors:", result.num_errors)
except ConfigError as error:
    print("refused:", error)
"""


@pytest.mark.slow
def test_a_program_with_a_token_at_home_sweeps_on_a_head_without_authentication_unless_it_insists(
    place: Path,
) -> None:
    (place / "token").write_text(secrets.token_hex(32))
    ports = [f"--{name}={port}" for name, port in PORTS.items()]
    ray_start(place, "h", "--head", "--node-ip-address=127.0.0.1", *ports, "--dashboard-agent-listen-port=6492",
              RAY_AUTH_MODE="disabled")  # fmt: skip
    space = {**SPACE, "objective": "kd", "epochs": 1, "search": {"num_samples": 1}}
    space["teacher"] = {"model": SPACE["student"], "epochs": 1}
    (place / "space.yaml").write_text(json.dumps(space))
    given = {k: v for k, v in os.environ.items() if k != "RAY_AUTH_MODE"}
    given |= {"RAY_ADDRESS": "127.0.0.1:6490", "RAY_AUTH_TOKEN_PATH": str(place / "token")}

    def program(storage: str, **env: str) -> str:
        words = [sys.executable, "-c", SWEEP, str(place / "space.yaml"), str(place / storage)]
        return subprocess.run(
            words, env={**given, **env}, capture_output=True, text=True, timeout=100
        ).stdout

    assert "runs without authentication" in program("none", RAY_AUTH_MODE="token")
    assert not (place / "none").exists(), "no teacher was trained"
    assert program("s") == "errors: 0\n"
    assert [r.status for r in read_records(place / "s/python")] == ["done"]


def asked_of(place: Path, path: str) -> str:
    """Return an answer of the started head's dashboard."""
    key = {"Authorization": f"Bearer {(place / 'token').read_text()}"}
    with urllib.request.urlopen(
        urllib.request.Request(DASHBOARD + path, headers=key), timeout=20
    ) as answer:
        return str(answer.read().decode())


def until(there: Callable[[], bool], what: str, *, within_s: float = 90) -> None:
    end_s = time.monotonic() + within_s
    while not there():
        assert time.monotonic() < end_s, what
        time.sleep(0.1)


def hears_a_hangup() -> None:
    """Restore the default SIGHUP, also if the tests were started with nohup."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@contextlib.contextmanager
def begun_by_a_person(
    place: Path, *words: str, **env: str
) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """Start `tfkd tune` as a terminal does, in its own process group: (process, output file)."""
    command = [
        sys.executable,
        "-m",
        "tfkd_ray",
        "tune",
        *words,
        "--address",
        DASHBOARD,
        "--storage",
        str(place / "s"),
    ]
    given = {**os.environ, "RAY_AUTH_TOKEN_PATH": str(place / "token"), "RAY_ADDRESS": "", **env}
    path = place / f"{words[-1]}.said"
    with path.open("w") as said:
        client = subprocess.Popen(command, cwd=place / "work", env=given, stdout=subprocess.DEVNULL, stderr=said,
                                  start_new_session=True, preexec_fn=hears_a_hangup)  # fmt: skip
        try:
            yield client, path
        finally:
            client.kill()
            client.wait()


@pytest.mark.slow
def test_a_job_goes_on_when_the_one_who_follows_it_interrupts_or_hangs_up(started: Path) -> None:
    place = started
    space = {**slowly(place), "search": {**SPACE["search"], "num_samples": 1}}
    (place / "work/slow.yaml").write_text(json.dumps(space))
    numbers = {"interrupted": signal.SIGINT, "hung-up": signal.SIGHUP}
    codes, said = {}, {}
    with contextlib.ExitStack() as clients:
        for name, number in numbers.items():
            client, path = clients.enter_context(
                begun_by_a_person(place, "slow.yaml", "--name", name)
            )
            folder = place / f"s/{name}/trials/t0000-ce"
            while not read_metrics(folder):  # ends by this file's limit
                assert client.poll() is None, path.read_text()
                time.sleep(0.2)
            os.killpg(client.pid, number)
            codes[name] = client.wait(timeout=30)
            said[name] = path.read_text()
    assert codes == {"interrupted": 130, "hung-up": -signal.SIGHUP}
    assert said["interrupted"].endswith("no longer followed; the job continues\n"), said[
        "interrupted"
    ]
    jobs = {
        job["submission_id"]: job["status"] for job in json.loads(asked_of(place, "/api/jobs/"))
    }
    for text in said.values():  # how to follow it again, printed first
        (job,) = (
            job
            for job in jobs
            if job and f"ray job logs --address {DASHBOARD} --follow {job}\n" in text
        )
        assert jobs[job] == "RUNNING" and "Traceback" not in text
    (place / "slow").unlink()
    for name in numbers:
        while (record := read_records(place / "s" / name)[0]).status == "running":
            time.sleep(0.2)
        assert record.status == "done" and [m["epoch"] for m in record.metrics] == [*range(1, 41)]


def slowly(place: Path) -> dict[str, Any]:
    """Return the space with a network that is slow until `place/slow` is removed."""
    shutil.copy(Path(__file__).parent / "slow.py", place / "work/slow.py")
    (place / "slow").touch()
    return {
        **SPACE,
        "student": {"name": "own", "path": "slow:network", "args": {"file": str(place / "slow")}},
    }


@pytest.mark.slow
def test_a_head_that_is_killed_in_the_middle_of_being_sent_a_job_is_told_within_a_minute(
    place: Path,
) -> None:
    (place / "token").write_text(secrets.token_hex(32))
    for name in ("work", "tmp"):
        (place / name).mkdir()
    (place / "work/space.yaml").write_text(json.dumps(SPACE))
    (place / "work/bulk.bin").write_bytes(os.urandom(90_000_000))  # needs time to arrive
    ray_start(place, "h", "--head", "--node-ip-address=127.0.0.1", *(f"--{k}={v}" for k, v in PORTS.items()),
              "--dashboard-agent-listen-port=6492", '--resources={"tfkd_driver": 1000}')  # fmt: skip
    doomed = [p for p in psutil.process_iter(["cmdline"]) if f"{place}/h/" in (line := " ".join(p.info["cmdline"] or []))
              and ("gcs_server" in line or "dashboard.py" in line)]  # fmt: skip
    assert len(doomed) == 2, doomed
    with begun_by_a_person(place, "space.yaml", "--name", "sent", TMPDIR=str(place / "tmp")) as (
        client,
        path,
    ):

        def on_its_way() -> bool:
            """Return True once Ray has packed the folder and is connected to the head."""
            packed = (
                sum(path.stat().st_size for path in (place / "tmp").rglob("*.zip")) > 89_000_000
            )
            assert client.poll() is None, path.read_text()
            sends = [
                p
                for p in psutil.Process(client.pid).children(recursive=True)
                if p.net_connections()
            ]
            return packed and bool(sends)

        until(on_its_way, "nothing is sent")
        for process in doomed:
            process.kill()
        began = time.monotonic()
        assert client.wait(timeout=90) == 1 and time.monotonic() - began < 60
        said = path.read_text()
    last = said.rpartition("tfkd tune: ")[2]
    assert f"the head at {DASHBOARD} disappeared while job tune-" in last, said
    assert "so it is unknown whether the job runs" in last and "ray job list" in last


@pytest.mark.slow
def test_nodes_with_disks_of_their_own_run_a_sweep_on_a_bucket(place: Path, tfkd: Run) -> None:
    (place / "token").write_text(secrets.token_hex(32))
    (place / "work").mkdir()
    space = {**slowly(place), "epochs": 10, "search": {**SPACE["search"], "num_samples": 4}}
    (place / "work/space.yaml").write_text(json.dumps(space))
    server, url = Server(), "s3://bucket/lab/e"
    store = {"AWS_ENDPOINT_URL": server.url}

    def told(*words: str, cache: str, **env: str) -> str:
        given = {
            **store,
            "XDG_CACHE_HOME": str(place / cache),
            "RAY_AUTH_TOKEN_PATH": str(place / "token"),
            **env,
        }
        done = tfkd(*words, cwd=place / "work", timeout=120, RAY_ADDRESS="", **given)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def mirrors(node: str, file: str) -> dict[str, Path]:
        """Return the trials' files on a node's own disk."""
        return {
            path.parent.name: path
            for path in (place / node).glob(f"tfkd_ray/storage/*/e/trials/t*/{file}")
        }

    try:
        server.client().create_bucket(Bucket="bucket")
        ports = [f"--{name}={port}" for name, port in PORTS.items()]
        ray_start(place, "h", "--head", "--node-ip-address=127.0.0.1", *ports, "--dashboard-agent-listen-port=6492",
                  '--resources={"tfkd_driver": 1000}', XDG_CACHE_HOME=str(place / "disk-1"), **store)  # fmt: skip
        ray_start(place, "w", "--address=127.0.0.1:6490", "--node-ip-address=127.0.0.1",
                  "--dashboard-agent-listen-port=6493", XDG_CACHE_HOME=str(place / "disk-2"), **store)  # fmt: skip
        with ThreadPoolExecutor() as pool:
            words = (
                "tune",
                "space.yaml",
                "--address",
                "127.0.0.1:6490",
                "--storage",
                "s3://bucket/lab",
                "--name",
                "e",
            )
            sweep = pool.submit(told, *words, cache="driver")
            until(
                lambda: sweep.done() or all(mirrors(f"disk-{n}", "last.ckpt") for n in (1, 2)),
                "both nodes have one",
            )
            (place / "slow").unlink()
            sweep.result()
        here, there = (mirrors(f"disk-{n}", "student.safetensors") for n in (1, 2))
        assert here and there and not set(here) & set(there) and len(here | there) == 4
        assert not mirrors("driver", "student.safetensors")
        objects = {key.removeprefix("lab/e/"): content for key, content in server.objects().items()}
        for name, path in (here | there).items():
            files = {key.rpartition("/")[2] for key in objects if key.startswith(f"trials/{name}/")}
            assert files == {"trial.json", "metrics.jsonl", "student.safetensors", "last.ckpt"}
            assert objects[f"trials/{name}/student.safetensors"] == path.read_bytes()
            assert load(objects[f"trials/{name}/student.safetensors"])
            assert len(objects[f"trials/{name}/metrics.jsonl"].splitlines()) == 10
            assert [key for key in objects if key.startswith(f"tb/{name}/events")]

        found = json.loads(told("status", url, "--json", cache="laptop"))
        assert found["state"] == "finished" and found["trials"]["done"] == 4
        assert told("report", url, cache="laptop") == "report.html\n"
        assert (place / "work/report.html").read_text().count(found["best"]["trial"])
    finally:
        server.stop()


# --- hosts with their own addresses

HOSTS = {"tn1": "10.213.77.1", "tn2": "10.213.77.2", "tn3": "10.213.77.3"}


def ip(*words: str, inside: str | None = None) -> None:
    netns = ["-n", inside] if inside else []
    run = subprocess.run(["ip", *netns, *words], capture_output=True, text=True)
    assert run.returncode == 0, f"ip {' '.join(words)}: {run.stderr}"


@pytest.fixture
def hosts(place: Path) -> Iterator[Path]:
    """Yield three network namespaces on a bridge: a head without CPUs, and two workers."""
    if os.geteuid() or not shutil.which("ip"):
        pytest.fail("needs root, and: apt-get install iproute2")
    (place / "token").write_text(secrets.token_hex(32))
    (place / "token").chmod(0o600)
    made: list[list[str]] = []
    try:
        ip("link", "add", "tnbr", "type", "bridge")
        made.append(["link", "del", "tnbr"])
        ip("link", "set", "tnbr", "up")
        for name, address in HOSTS.items():
            ip("netns", "add", name)
            made.append(["netns", "del", name])
            ip("link", "add", f"{name}h", "type", "veth", "peer", "name", "eth0", "netns", name)
            ip("link", "set", f"{name}h", "master", "tnbr", "up")
            ip("addr", "add", f"{address}/24", "dev", "eth0", inside=name)
            ip("link", "set", "eth0", "up", inside=name)
            ip("link", "set", "lo", "up", inside=name)
        yield place
    finally:
        end(place)
        for words in reversed(made):
            subprocess.run(["ip", *words], capture_output=True)


@pytest.mark.slow
def test_a_host_that_is_cut_off_in_the_middle_of_a_sweep_costs_no_trial(hosts: Path) -> None:
    place, head = hosts, HOSTS["tn1"]
    (place / "slow").touch()  # no trial ends before the host is cut off
    student = {"path": "tests.slow:network", "args": {"file": str(place / "slow")}}
    space = {
        **SPACE,
        "student": {"name": "own", **student},
        "epochs": 150,
        "search": {**SPACE["search"], "num_samples": 6},
    }
    (place / "space.yaml").write_text(json.dumps(space))
    (place / "other").mkdir()  # where the third host sees its own directory
    inside = {name: ("ip", "netns", "exec", name) for name in HOSTS}
    own = ("bash", "-c", f'mount -t tmpfs none {place}/other && exec "$@"', "--")
    soon = {
        "RAY_health_check_timeout_ms": "2000",
        "RAY_health_check_failure_threshold": "3",
    }  # Ray's own limit: 10 s, five times
    ray_start(place, "h", "--head", f"--node-ip-address={head}", "--port=6379", '--resources={"tfkd_driver": 1000}',
              inside=inside["tn1"], **soon)  # fmt: skip
    for name, more in (("tn2", ()), ("tn3", own)):
        ray_start(
            place,
            name,
            f"--address={head}:6379",
            f"--node-ip-address={HOSTS[name]}",
            inside=inside[name] + more,
        )
    env = {**os.environ, "RAY_AUTH_TOKEN_PATH": str(place / "token"), "PYTHONPATH": str(ROOT)}
    env.pop("RAY_ADDRESS", None)

    def started_on_the_head(verb: str, *words: str, storage: str) -> subprocess.Popen[str]:
        command = [
            *inside["tn1"],
            sys.executable,
            "-m",
            "tfkd_ray",
            verb,
            *words,
            "--address",
            f"{head}:6379",
        ]
        command += ["--storage", str(place / storage)]
        return subprocess.Popen(
            command, env=env, cwd=place, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    looked = started_on_the_head("doctor", storage="other")
    said = " ".join(looked.communicate(timeout=60)[0].split())
    assert looked.returncode == 1 and "ok nodes: 3 of 3 ran a task" in said, said
    assert (
        f"problem storage: {HOSTS['tn3']}" in said and "must be one directory for all nodes" in said
    ), said
    refused = started_on_the_head("tune", "space.yaml", storage="other")
    _, said = refused.communicate(timeout=60)
    assert (
        refused.returncode == 2
        and HOSTS["tn3"] in said
        and "must be one directory for all nodes" in said
    ), said
    assert not list((place / "other").iterdir())

    driver = started_on_the_head("tune", "space.yaml", "--name", "e", storage="s")
    try:
        until = time.monotonic() + 90
        while sum(len(read_metrics(f)) >= 2 for f in (place / "s/e/trials").glob("t0*")) < 3:
            assert driver.poll() is None and time.monotonic() < until, "three trials do not begin"
            time.sleep(0.2)
        running = {r.name for r in read_records(place / "s/e") if r.status == "running"}
        ip("link", "set", "tn3h", "down")
        (place / "slow").unlink()
        _, said = driver.communicate(timeout=150)
    finally:
        driver.kill()
    assert driver.returncode == 0, said
    lost = [
        line.split(":")[0]
        for line in said.splitlines()
        if "its process was lost; it resumes" in line
    ]
    assert len(lost) == 1 and lost[0] in running, said
    assert_same_as_never_lost(place / "s/e", 6)


# --- an autoscaler

HEAD_ID = "f" * 51 + "00000"
SCALED: dict[str, Any] = {
    "cluster_name": "fake", "max_workers": 2, "idle_timeout_minutes": 1, "upscaling_speed": 10,
    "provider": {
        "type": "external", "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
        "head_node_id": HEAD_ID, "launch_multiple": True, "gcs_address": "127.0.0.1:6490",
    },
    "head_node_type": "ray.head.default",
    "available_node_types": {
        "ray.head.default": {"resources": {"CPU": 1, "tfkd_driver": 1000}, "node_config": {}, "max_workers": 0},
        "disks": {"resources": {"CPU": 1, "fast_disk": 1}, "node_config": {}, "min_workers": 0, "max_workers": 2},
    },
    "auth": {}, "file_mounts": {}, "cluster_synced_files": [], "file_mounts_sync_continuously": False,
    **{f"{name}_commands": [] for name in ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")},
}  # fmt: skip


@pytest.mark.slow
def test_a_sweep_waits_for_the_nodes_that_an_autoscaler_starts_and_says_so(
    place: Path, tfkd: Run
) -> None:
    """Uses Ray's autoscaler, with its provider whose nodes are raylets of this machine."""
    (place / "token").write_text(secrets.token_hex(32))
    (place / "scaled.json").write_text(json.dumps(SCALED))
    ids = {"RAY_CLOUD_INSTANCE_ID": HEAD_ID, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID}
    ray_start(place, "h", "--head", "--node-ip-address=127.0.0.1", *(f"--{k}={v}" for k, v in PORTS.items()),
              "--dashboard-agent-listen-port=6492", '--resources={"tfkd_driver": 1000}',
              f"--autoscaling-config={place}/scaled.json", RAY_FAKE_CLUSTER="1",
              RAY_enable_autoscaler_v2="1", RAY_NODE_TYPE_NAME="ray.head.default", TMPDIR=str(place), **ids)  # fmt: skip
    space = {**SPACE, "epochs": 3, "search": {**SPACE["search"], "num_samples": 4}}
    for name in ("fast_disk", "tape"):
        (place / f"{name}.yaml").write_text(json.dumps({**space, "resources": {name: 1}}))

    def tune(name: str) -> subprocess.CompletedProcess[str]:
        words = [
            "tune",
            f"{name}.yaml",
            "--address",
            "127.0.0.1:6490",
            "--storage",
            str(place / "s"),
            "--name",
            name,
        ]
        return tfkd(
            *words, cwd=place, timeout=120, RAY_AUTH_TOKEN_PATH=str(place / "token"), RAY_ADDRESS=""
        )

    refused = tune("tape")
    assert refused.returncode == 2, refused.stderr
    assert (
        "resources.tape: no node has it" in refused.stderr
        and "no autoscaler starts nodes for it" in refused.stderr
    )
    swept = tune("fast_disk")
    assert swept.returncode == 0, swept.stderr
    assert "waiting for nodes: " in swept.stderr and "disks" in swept.stderr, swept.stderr
    assert [r.status for r in read_records(place / "s/fast_disk")] == ["done"] * 4
