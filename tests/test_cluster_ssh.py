"""A real cluster of two nodes from clusters/onprem.yaml: sshd on loopback, `up`, a sweep as a job, `down`.

It stands beside other Ray clusters of this machine: its own ports, its own addresses, its own home and temporary
directory. `ray stop`, which would end every Ray process here, is kept from its nodes by a `ray` of the test's own.
"""

import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import ROOT, Run

from tfkd_ray.experiment import read_records

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

HEAD, WORKER = "127.77.0.1", "127.77.0.2"
BIN = Path(sys.executable).parent


@dataclass
class Cluster:
    """Where its files are, and the environment of whoever uses it."""

    place: Path
    file: Path
    env: dict[str, str]


def shared(place: Path) -> Path:
    """The directory that both nodes see: not below /tmp, which `check` knows to be each node's own."""
    return Path("/srv") / place.name


def on_loopback(place: Path) -> str:
    """onprem.yaml with other addresses, and with ports and directories that nothing else here uses."""
    text = (ROOT / "clusters/onprem.yaml").read_text()
    head, workers = text.split("\nworker_start_ray_commands:")
    own = f"--num-cpus=1 --object-store-memory=150000000 --temp-dir={place}"
    changes = {
        "cluster_name: tfkd-onprem": f"cluster_name: tfkd-{place.name}",
        "head_ip: 10.0.0.10": f"head_ip: {HEAD}",
        "[10.0.0.11, 10.0.0.12]": f"[{WORKER}]",
        "ssh_user: tfkd": "ssh_user: root",
        "~/.ssh/id_ed25519": str(place / "key"),
        "/mnt/shared/tfkd_results": str(shared(place)),
        "~/.ray/auth_token: ~/.ray/auth_token": f"~/.ray/auth_token: {place / 'token'}",
        "--head ": f"--head --node-ip-address={HEAD} {own}/h ",
        "--port=6379": "--port=6390",
        "127.0.0.1/6379": "127.0.0.1/6390",
        "--dashboard-port=8265": "--dashboard-port=8299",
        "6380": "6391", "6381": "6392", "10001": "6393", "52365": "6394", "52366": "6395", "52367": "6396",
        "52368": "6397", "20000": "26000", "24999": "26499",
    }  # fmt: skip
    head = re.sub(r"setup_commands:\n.*?\n\n", f'setup_commands: [": {PINNED}"]\n\n', head, flags=re.S)
    for old, new in changes.items():
        assert old in head, old
        head = head.replace(old, new)
    more = {"6380": "6981", "6381": "6982", "52365": "6984", "52366": "6985", "52367": "6986", "52368": "6987",
            "20000": "27000", "24999": "27499",
            "HEAD_IP:6379": f"HEAD_IP:6390 --node-ip-address={WORKER} {own}/w"}  # fmt: skip
    for old, new in more.items():
        assert old in workers, old
        workers = workers.replace(old, new)
    return f"{head}\nworker_start_ray_commands:{workers}"


PINNED = "installed already, ray==2.60.0 torch==2.14.1 python3.11"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    if os.geteuid() or not shutil.which("rsync") or not Path("/usr/sbin/sshd").exists():
        pytest.fail("needs root, and: apt-get install openssh-server rsync")
    place = Path(tempfile.mkdtemp(prefix="tc"))
    before = Path.cwd()
    os.chdir(place)
    (place / "home").mkdir(mode=0o700)
    (place / "bin").mkdir()
    for name in ("host", "key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", name], check=True)
    Path("/run/sshd").mkdir(exist_ok=True)
    (place / "sshd_config").write_text(
        f"ListenAddress {HEAD}:22\nListenAddress {WORKER}:22\nHostKey {place}/host\nAuthorizedKeysFile {place}/key.pub\n"
        f"StrictModes no\nPidFile none\nUsePAM no\nPasswordAuthentication no\nSetEnv HOME={place}/home\n"
    )
    (place / "home/.profile").write_text(f"export PATH={place}/bin:{BIN}:/usr/sbin:/usr/bin:/sbin:/bin\n")
    # `ray stop` ends the head's processes alone; ssh looks for keys in the home of /etc/passwd
    (place / "bin/ray").write_text(
        f'#!/bin/bash\n[ "$1" = stop ] || exec {BIN}/ray "$@"\nfor p in $(pgrep -f {place}/h/session); do kill $p; done\n'
    )
    (place / "bin/ssh").write_text(f'#!/bin/bash\nexec /usr/bin/ssh -i {place}/key "$@"\n')
    for name in ("ray", "ssh"):
        (place / "bin" / name).chmod(0o755)
    (place / "token").write_text(secrets.token_hex(32))
    (place / "cluster.yaml").write_text(on_loopback(place))
    (place / "work").mkdir()
    (place / "work/mine.yaml").write_text(
        "student: {name: mlp, hidden: [8]}\nepochs: 3\nobjective: ce\nsearch: {num_samples: 2, stopping: none}\n"
        "optim: {lr: {low: 0.01, high: 0.5, log: true}}\n"
    )
    (place / "work/.env").write_text("SECRET=1")
    shutil.copy(place / "key", place / "work/plain-name")
    sshd = subprocess.Popen(["/usr/sbin/sshd", "-D", "-f", "sshd_config", "-E", "sshd.log"])
    try:
        until = time.monotonic() + 10
        while subprocess.run(["ss", "-ltnH", f"src {HEAD}:22"], capture_output=True).stdout == b"":
            assert time.monotonic() < until and sshd.poll() is None, (place / "sshd.log").read_text()
            time.sleep(0.1)
        yield Cluster(place, place / "cluster.yaml", {"RAY_AUTH_TOKEN_PATH": str(place / "token")})
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            for path in Path("/proc").glob("[0-9]*/cmdline"):
                try:
                    if re.search(rf"{place}/[hw]/session".encode(), path.read_bytes()):
                        os.kill(int(path.parent.name), number)
                except (OSError, ProcessLookupError):
                    continue
            time.sleep(1)
        sshd.terminate()
        sshd.wait()
        os.chdir(before)
        for path in Path("/tmp/ray").glob(f"cluster-tfkd-{place.name}.*"):
            path.unlink()
        shutil.rmtree(place, ignore_errors=True)
        shutil.rmtree(shared(place), ignore_errors=True)


def test_a_cluster_is_started_by_ssh_runs_a_sweep_as_a_job_and_ends(cluster: Cluster, tfkd: Run) -> None:
    place, file, nfs = cluster.place, str(cluster.file), shared(cluster.place)

    def run(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
        return tfkd(*words, cwd=place / "work", timeout=200, **{**cluster.env, **env})

    checked = run("cluster", "check", file)
    assert checked.returncode == 0, checked.stderr
    assert "is down" in run("cluster", "status", file).stdout

    up = run("cluster", "up", file)
    assert up.returncode == 0, up.stderr
    assert (
        oct((place / "token").stat().st_mode)[-3:] == oct((place / "home/.ray/auth_token").stat().st_mode)[-3:] == "600"
    )
    again = run("cluster", "up", file)  # a running cluster is left alone
    assert again.returncode == 0 and "Ray runtime started" not in again.stdout + again.stderr, again.stderr

    until = time.monotonic() + 60
    while "2 nodes" not in (status := run("cluster", "status", file)).stdout:
        assert time.monotonic() < until, status.stdout + status.stderr
        time.sleep(2)

    # a token that is not the cluster's, and none, each with its own sentence
    (place / "wrong").write_text("0" * 64)
    for env, sentence in (
        ({"RAY_AUTH_TOKEN_PATH": str(place / "wrong")}, "refuses the token that is here"),
        ({"RAY_AUTH_TOKEN_PATH": str(place / "none")}, "wants a token, and there is none here"),
    ):
        refused = run("cluster", "submit", file, "--", "true", **env)
        assert refused.returncode == 2 and sentence in refused.stderr and "Traceback" not in refused.stderr

    # a sweep as a job: both nodes take part, the results are on the shared directory
    swept = run("tune", "mine.yaml", "--cluster", file, "--name", "one")
    assert swept.returncode == 0, swept.stderr
    assert [r.status for r in read_records(nfs / "one")] == ["done", "done"]
    token = (place / "token").read_text()
    written = [p for p in nfs.rglob("*") if p.is_file() and token.encode() in p.read_bytes()]
    assert not written and token not in swept.stderr + swept.stdout
    assert "one" in run("status", str(nfs / "one")).stdout

    # detached, and followed later; a resume as a job
    sent = run("resume", str(nfs / "one"), "--add-trials", "1", "--cluster", file, "--detach")
    assert sent.returncode == 0, sent.stderr
    followed = run("cluster", "logs", file)
    assert followed.returncode == 0 and "3 trials" in followed.stderr, followed.stderr
    assert len(read_records(nfs / "one")) == 3

    # what is sent holds no secrets
    listed = run("cluster", "submit", file, "--", "ls", "-a")
    assert "mine.yaml" in listed.stderr and ".env\n" not in listed.stderr and "plain-name" not in listed.stderr, (
        listed.stderr
    )

    # a job that fails is a failure here
    failed = run("cluster", "submit", file, "--", "false")
    assert failed.returncode == 1 and "failed" in failed.stderr

    down = run("cluster", "down", file)
    assert down.returncode == 0 and "is down: nothing of it runs" in down.stdout, down.stdout + down.stderr
    assert "is down" in run("cluster", "status", file).stdout
