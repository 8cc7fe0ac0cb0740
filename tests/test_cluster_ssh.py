"""A real cluster of two nodes from clusters/onprem.yaml: sshd, `up`, a sweep as a job, `down`.

It runs beside other Ray clusters of this machine, with its own ports, addresses, home and temporary
directory. Its nodes have an environment without tfkd, as the files install it, which comes with each
job. They use the test's own `ray`, since `ray stop` would end every Ray process here.
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
import venv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import ROOT, Run

from tfkd_ray.store.experiment import read_records

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

HEAD, WORKER = "127.77.0.1", "127.77.0.2"


@dataclass
class Cluster:
    """A cluster's files (`work/` is its user's folder) and the environment of its user."""

    place: Path
    env: dict[str, str]


def shared(place: Path) -> Path:
    """Return a directory that both nodes see, not below /tmp, which `check` takes as node-local."""
    return Path("/srv") / place.name


def on_loopback(place: Path) -> str:
    """Return onprem.yaml with other addresses, and unused ports and directories."""
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
    head = re.sub(
        r"setup_commands:\n.*?\n\n", f'setup_commands: [": {PINNED}"]\n\n', head, flags=re.S
    )
    for old, new in changes.items():
        assert old in head, old
        head = head.replace(old, new)
    more = {"RAY_AUTH_MODE=token": "RAY_AUTH_MODE=token RAY_gcs_rpc_server_reconnect_timeout_s=5",  # not 60
            "6380": "6981", "6381": "6982", "52365": "6984", "52366": "6985", "52367": "6986", "52368": "6987",
            "20000": "27000", "24999": "27499",
            "HEAD_IP:6379": f"HEAD_IP:6390 --node-ip-address={WORKER} {own}/w"}  # fmt: skip
    for old, new in more.items():
        assert old in workers, old
        workers = workers.replace(old, new)
    return f"{head}\nworker_start_ray_commands:{workers}"


def without_tfkd(place: Path) -> Path:
    """Create an environment with the packages of this one but tfkd; return its programs."""
    venv.create(place, symlinks=True)
    (into,) = place.glob("lib/python*/site-packages")
    for folder in map(Path, sys.path):
        for package in folder.iterdir() if folder.name == "site-packages" else ():
            if package.suffix != ".pth" and "tfkd_ray" not in package.name:
                (into / package.name).symlink_to(package)
    ray = place / "bin/ray"
    ray.write_text(f"#!{place}/bin/python\nfrom ray.scripts.scripts import main\nmain()\n")
    ray.chmod(0o755)
    return place / "bin"


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
    (place / "work").mkdir()
    for name in ("host", "key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", name], check=True)
    Path("/run/sshd").mkdir(exist_ok=True)
    (place / "sshd_config").write_text(
        f"ListenAddress {HEAD}:22\nListenAddress {WORKER}:22\nHostKey {place}/host\nAuthorizedKeysFile {place}/key.pub\n"
        f"StrictModes no\nPidFile none\nUsePAM no\nPasswordAuthentication no\nSetEnv HOME={place}/home\n"
    )
    programs = without_tfkd(place / "env")
    (place / "home/.profile").write_text(
        f"export PATH={place}/bin:{programs}:/usr/sbin:/usr/bin:/sbin:/bin\n"
    )
    # `ray stop` ends only the head's processes; ssh searches keys in the home of /etc/passwd
    (place / "bin/ray").write_text(
        f'#!/bin/bash\n[ "$1" = stop ] || exec {programs}/ray "$@"\nfor p in $(pgrep -f {place}/h/session); do kill $p; done\n'
    )
    (place / "bin/ssh").write_text(f'#!/bin/bash\nexec /usr/bin/ssh -i {place}/key "$@"\n')
    for name in ("ray", "ssh"):
        (place / "bin" / name).chmod(0o755)
    (place / "token").write_text(secrets.token_hex(32))
    (place / "work/mine.yaml").write_text(on_loopback(place))
    (place / "work/space.yaml").write_text(
        "student: {name: mlp, hidden: [8]}\nepochs: 3\nobjective: ce\nsearch: {num_samples: 2, stopping: none}\n"
        "optim: {lr: {low: 0.01, high: 0.5, log: true}}\n"
    )
    (place / "work/.env").write_text("SECRET=1")
    shutil.copy(place / "key", place / "work/plain-name")
    sshd = subprocess.Popen(["/usr/sbin/sshd", "-D", "-f", "sshd_config", "-E", "sshd.log"])
    try:
        until = time.monotonic() + 10
        while subprocess.run(["ss", "-ltnH", f"src {HEAD}:22"], capture_output=True).stdout == b"":
            assert time.monotonic() < until and sshd.poll() is None, (
                place / "sshd.log"
            ).read_text()
            time.sleep(0.1)
        yield Cluster(place, {"RAY_AUTH_TOKEN_PATH": str(place / "token")})
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


SHOWN = re.findall(r"^\$ tfkd (.*?)(?:  +#.*)?$", (ROOT / "docs/clusters.md").read_text(), re.M)


@pytest.mark.slow
def test_the_commands_of_the_page_start_a_cluster_by_ssh_run_a_sweep_on_it_and_end_it(
    cluster: Cluster, tfkd: Run
) -> None:
    place, nfs = cluster.place, shared(cluster.place)

    def run(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
        return tfkd(*words, cwd=place / "work", timeout=200, **{**cluster.env, **env})

    def page(verb: str, *more: str, name: str = "") -> subprocess.CompletedProcess[str]:
        """Run the command of docs/clusters.md that begins with these words."""
        (line,) = (line for line in SHOWN if line.startswith(verb))
        return run(*line.replace("/mnt/shared/tfkd_results/NAME", f"{nfs}/{name}").split(), *more)

    assert len(SHOWN) == 6
    checked = run("cluster", "check", "mine.yaml")
    assert checked.returncode == 0, checked.stderr
    assert "is down" in page("cluster status").stdout

    up = page("cluster up")
    assert up.returncode == 0, up.stderr
    assert (
        "  its dashboard:   ray dashboard --port 8299 --remote-port 8299 mine.yaml\n" in up.stderr
    ), up.stderr
    modes = {
        oct(path.stat().st_mode)[-3:] for path in (place / "token", place / "home/.ray/auth_token")
    }
    assert modes == {"600"}
    again = page("cluster up")  # a running cluster is unchanged
    assert again.returncode == 0 and "Ray runtime started" not in again.stdout + again.stderr, (
        again.stderr
    )
    missing = subprocess.run([place / "env/bin/python", "-c", "import tfkd_ray"], cwd=place)
    assert missing.returncode == 1  # the jobs below bring it
    until = time.monotonic() + 60
    while "2 nodes" not in (status := page("cluster status")).stdout:
        assert time.monotonic() < until, status.stdout + status.stderr
        time.sleep(2)

    # a wrong token and no token, each with its own sentence
    (place / "wrong").write_text("0" * 64)
    for path, sentence in (
        ("wrong", "rejects the token that is here"),
        ("none", "requires a token, and there is none"),
    ):
        refused = run(
            "cluster", "submit", "mine.yaml", "--", "true", RAY_AUTH_TOKEN_PATH=str(place / path)
        )
        assert (
            refused.returncode == 2
            and sentence in refused.stderr
            and "Traceback" not in refused.stderr
        )

    # a detached sweep as a job, followed later; the results are on the shared directory
    sent = page("tune")
    assert sent.returncode == 0, sent.stderr
    followed = page("cluster logs")
    assert followed.returncode == 0 and "2 trials" in followed.stderr, followed.stderr
    (experiment,) = (path.parent for path in nfs.glob("*/experiment.yaml"))
    assert [r.status for r in read_records(experiment)] == ["done", "done"]
    assert f"job tune-{experiment.name.removeprefix('space-')[:8]}" in page("cluster status").stdout
    assert "2 of 2" in run("status", str(experiment)).stdout
    resumed = page("resume", "--add-trials", "1", name=experiment.name)
    assert resumed.returncode == 0 and "3 trials" in resumed.stderr, resumed.stderr
    assert len(read_records(experiment)) == 3
    reported = run("report", str(experiment), "-o", "page.html")
    assert reported.returncode == 0 and (place / "work/page.html").stat().st_size > 10_000, (
        reported.stderr
    )
    looked = run("doctor", "--cluster", "mine.yaml")
    said = " ".join((looked.stdout + looked.stderr).split())
    assert (
        looked.returncode == 0 and "ok nodes: 2 of 2 ran a task" in said and "ok storage: " in said
    ), said

    # the token is neither in the experiment's files nor in the output
    token = (place / "token").read_text()
    files = [path for path in nfs.rglob("*") if path.is_file()]
    assert files and not [path for path in files if token.encode() in path.read_bytes()]
    assert not [r for r in (up, sent, followed, resumed) if token in r.stdout + r.stderr]

    # a failed job makes this command fail; the files sent contain no secrets
    failed = run("cluster", "submit", "mine.yaml", "--", "sh", "-c", "ls -a; exit 3")
    assert failed.returncode == 1 and "failed" in failed.stderr
    assert "space.yaml\n" in failed.stderr
    assert ".env\n" not in failed.stderr and "plain-name\n" not in failed.stderr, failed.stderr

    down = page("cluster down")
    assert down.returncode == 0 and "is down: nothing of it runs" in down.stdout, (
        down.stdout + down.stderr
    )


def test_a_cluster_on_this_machine_starts_runs_a_job_and_ends_without_touching_others(
    tfkd: Run,
) -> None:
    place = Path(tempfile.mkdtemp(prefix="tc"))
    text = (ROOT / "clusters/local.yaml").read_text()
    ports = "--ray-client-server-port=6491 --dashboard-agent-listen-port=6492 --min-worker-port=28000 --max-worker-port=28499"
    changes = {"6379": "6490", "8265": "8399", "/tmp/tfkd-local": f"{place}/t", "2000000000": "150000000",
               "--num-cpus=$(nproc)": f"--num-cpus=1 {ports}"}  # fmt: skip
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    (place / "mine.yaml").write_text(text)
    (place / "token").write_text("t" * 64)

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return tfkd(
            "cluster", *words, cwd=place, timeout=100, RAY_AUTH_TOKEN_PATH=str(place / "token")
        )

    bystander = subprocess.Popen(["bash", "-c", "sleep 200", f"{place}/other/session"])
    try:
        up = run("up", "mine.yaml")
        assert up.returncode == 0, up.stderr
        assert "1 node" in run("status", "mine.yaml").stdout
        assert run("submit", "mine.yaml", "--", "false").returncode == 1
    finally:
        down = run("down", "mine.yaml")
        ended = bystander.poll()
        bystander.kill()
        bystander.wait()
    assert down.returncode == 0 and "is down" in down.stdout and ended is None, down.stderr
    left = [
        p
        for p in Path("/proc").glob("[0-9]*/cmdline")
        if f"{place}/t/session".encode() in p.read_bytes()
    ]
    assert not left
    shutil.rmtree(place, ignore_errors=True)
