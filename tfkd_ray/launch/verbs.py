"""`tfkd cluster check|up|status|submit|logs|down`, and jobs: thin wrappers of ray, kubectl, Slurm.

A verb first builds the list of its commands; `--print` prints it instead of running it. Running a
command shows its output; the first that fails ends the verb. Ray is not imported.
"""

import io
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, redirect_stderr, suppress
from pathlib import Path
from typing import Any

from tfkd_ray.launch.check import check, placeholders
from tfkd_ray.launch.clusterfile import ClusterFile, below, load_cluster
from tfkd_ray.launch.commands import (
    SSH_S,
    Command,
    down_commands,
    head_command,
    hosts,
    is_rayjob,
    kube,
    logs_command,
    nodes_commands,
    rayclusters_command,
    slurm_logs,
    slurm_submit,
    sockets_dir,
    ssh,
    tidy_commands,
    tunnel_command,
    up_commands,
)
from tfkd_ray.launch.jobs import (
    as_entrypoint,
    ask,
    check_ray_version,
    jobs_at,
    stage,
    submit_command,
)
from tfkd_ray.run.auth import own_token, token, token_file, token_in
from tfkd_ray.settings.columns import to_stderr as say
from tfkd_ray.settings.errors import (
    FAILED,
    INTERRUPTED,
    NOT_BETTER,
    OK,
    WRONG_INPUT,
    ConfigError,
    Unreachable,
)
from tfkd_ray.settings.files import expanded

TUNNEL_S = 60
"""Maximum time for a tunnel to a head to open."""
SUBMIT_S = 300
"""Maximum time for a head to accept a job, including its working directory."""
JOB_END_S = 30
"""Maximum time between a job's last line and the report of its end."""
ASK_S = 60
"""Maximum time for a provider's tools to say whether there are credentials."""
LIST_S = 60
"""Maximum time for a list of nodes, from a provider or by ssh."""
DOWN_S = 600
"""Maximum time of a step of `down`."""
LEFT_S = 120
"""Maximum time for nodes to end after `down`; without its head, a Ray node ends within a minute."""


class StepFailed(Exception):
    """A command failed; the message is for a person who has seen its output."""

    def __init__(self, message: str, *, code: int = 1, said: str = "", ends: int = FAILED) -> None:
        """Store the failure.

        Args:
            message: a sentence for a person.
            code: the exit code of the command.
            said: the command's output.
            ends: the exit code of this program.
        """
        super().__init__(message)
        self.code, self.said, self.ends = code, said, ends


def cluster(args: Namespace) -> int:
    """Run one of `tfkd cluster`'s verbs and return its exit code."""
    file = load_cluster(args.file)
    lines = check(file, _shape(args.space) if args.do == "check" and args.space else None)
    if args.do == "check":
        print("\n".join(lines))
        return OK
    if args.print:
        print("\n".join(_shown(command) for command in _commands(file, args)))
        if args.do == "submit" and file.kind != "slurm":
            print(_folder_in_words(_verb_words(args)))
        return OK
    try:
        code: int = {
            "up": _up,
            "status": _status_lines,
            "submit": _submit,
            "logs": _cluster_logs,
            "down": _down,
        }[args.do](file, args)
    except StepFailed as error:
        say(f"tfkd cluster {args.do}: {error}")
        return error.ends
    except Unreachable as error:
        say(f"tfkd cluster {args.do}: {error}")
        return FAILED
    return code


def _shape(space: str) -> Any:
    from tfkd_ray.space.space import load_space

    return load_space(space).example


# --- commands of a verb ---------------------------------------------------------------------------


def _commands(file: ClusterFile, args: Namespace) -> list[Command]:
    """Return a verb's commands for --print, with capitals for names that only a cluster knows."""
    if args.do == "up":
        return up_commands(file)
    asked = [rayclusters_command(file)] if is_rayjob(file) else []
    if args.do == "status":
        return [*asked, *nodes_commands(file)]
    if args.do == "down":
        return [*asked, *down_commands(file), *nodes_commands(file), *tidy_commands(file)]
    if file.kind == "slurm":
        return [slurm_submit(file, _verb_words(args)) if args.do == "submit" else slurm_logs(file)]
    if args.do == "logs" and is_rayjob(file):
        return [kube(file, "logs --follow", f"job/{file.name}")]
    address = f"http://127.0.0.1:{file.dashboard_port}"
    tunnel = tunnel_command(file, file.dashboard_port)
    before = [
        *asked,
        *([head_command(file)] if asked else []),
        *([] if tunnel is None else [[*tunnel, "&"]]),
    ]
    if args.do == "logs":
        return [*before, logs_command(address, args.job or "JOB")]
    with tempfile.TemporaryDirectory() as folder:
        entrypoint = as_entrypoint(_verb_words(args), Path(folder))
    follow = [] if args.detach else [logs_command(address, "JOB")]
    return [*before, submit_command(address, "JOB", Path("FOLDER"), entrypoint), *follow]


def _folder_in_words(words: Sequence[str]) -> str:
    """Return a shell comment that explains FOLDER."""
    text = "# FOLDER: a copy of this folder without data, results, keys and what .rayignore names, and with this tfkd"
    return (
        text
        if shlex.join(words) == " ".join(words)
        else f"{text};\n#   in it tfkd_job.sh: exec {shlex.join(words)}"
    )


def _shown(command: Command) -> str:
    return shlex.join(command[:-1]) + " &" if command[-1] == "&" else shlex.join(command)


def _verb_words(args: Namespace) -> list[str]:
    if not args.command:
        raise ConfigError("what to run? tfkd cluster submit FILE -- COMMAND", "submit")
    return [*args.command]


# --- running --------------------------------------------------------------------------------------


def run(command: Command, *, what: str, quiet: bool = False, limit_s: float | None = None) -> str:
    """Run a command and show its output; raise StepFailed if it fails.

    Args:
        quiet: return standard output instead; on failure, standard error is part of the message.
        limit_s: kill the command and its children after so many seconds and raise. None: no limit.
    """
    said, late = [], threading.Event()
    with tempfile.TemporaryFile() as aside, subprocess.Popen(
        _found(command), env=_env(), stdin=subprocess.DEVNULL, text=True, errors="replace",
        stdout=subprocess.PIPE, stderr=aside if quiet else subprocess.STDOUT, start_new_session=limit_s is not None,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        clock = threading.Timer(limit_s or threading.TIMEOUT_MAX, _too_late, (process, late))
        clock.daemon = True
        clock.start()
        try:
            for line in process.stdout:
                said.append(line)
                if not quiet:
                    sys.stderr.write(line)
                    sys.stderr.flush()
            code = process.wait()
        except BaseException:
            _end(process, signal.SIGTERM, group=limit_s is not None)
            raise
        finally:
            clock.cancel()
        aside.seek(0)
        beside = aside.read().decode(errors="replace")
    text = "".join(said)
    if late.is_set():
        message = f"{what} did not end within {limit_s:g} s:\n  {_shown(command)}"
    elif code:
        above = "" if quiet else "; see its output above"
        message = f"{what} failed (exit code {code}){above}:\n  {_shown(command)}"
    else:
        return text
    raise StepFailed(f"{message}\n{beside.strip()[-2000:]}".strip(), code=code, said=text + beside)


def _too_late(process: subprocess.Popen[str], late: threading.Event) -> None:
    late.set()
    _end(process, signal.SIGKILL, group=True)


def _end(process: subprocess.Popen[str], number: signal.Signals, *, group: bool) -> None:
    """Send a signal to a command, and to its group if it leads one."""
    with suppress(ProcessLookupError):
        if group:
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)


def _found(command: Command) -> Command:
    """Return the command with its program's path; raise ConfigError if it is not installed."""
    name = command[0]
    beside = (
        Path(sys.executable).parent / name
    )  # ray's commands belong to this environment, on PATH or not
    path = str(beside) if name == "ray" and beside.exists() else shutil.which(name)
    if path is None:
        raise ConfigError(
            f"{name} is not installed, or not on PATH, and this cluster file needs it; install it, or print the "
            "commands: --print"
        )
    return [path, *command[1:]]


def _env() -> dict[str, str]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    settings = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_UP_enable_autoscaler_v2": "1"}
    settings |= (
        {"RAY_AUTH_MODE": "token"} if token() is not None else {}
    )  # without a token, Ray would not even ask
    return {**os.environ, **settings, "PATH": path}


@contextmanager
def reached(file: ClusterFile) -> Iterator[str]:
    """Yield the address of the cluster's dashboard, through a tunnel that closes at the end."""
    if file.kind == "slurm":
        raise ConfigError(
            "a Slurm cluster runs the one command it was submitted with; read its experiment on the shared storage",
            file.path,
        )
    port = file.dashboard_port if file.here else _free_port()
    address = f"http://127.0.0.1:{port}"
    command = tunnel_command(file, port, _head_pod(file) if is_rayjob(file) else "")
    if command is None:
        check_ray_version(address)
        yield address
        return
    with tempfile.TemporaryFile() as said:
        tunnel = subprocess.Popen(
            _found(command), env=_env(), stdin=subprocess.DEVNULL, stdout=said, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            until = time.monotonic() + TUNNEL_S
            while not _listens(port):
                if tunnel.poll() is not None or time.monotonic() > until:
                    said.seek(0)
                    text = said.read().decode(errors="replace").strip()
                    raise Unreachable(
                        f"no tunnel to the head of {file.name} within {TUNNEL_S} s; check that it is up: tfkd cluster "
                        f"status {file.path}\n"
                        f"  {_shown(command)}\n"
                        f"{text[-2000:]}"
                    )
                time.sleep(0.2)
            check_ray_version(address)
            yield address
        finally:
            with suppress(ProcessLookupError):
                os.killpg(tunnel.pid, signal.SIGTERM)
            tunnel.wait()


def _rayclusters(file: ClusterFile) -> list[str]:
    """Return the names of a RayJob's clusters, which end soon after it; none for other files."""
    if not is_rayjob(file):
        return []
    said = run(rayclusters_command(file), what="listing its clusters", quiet=True, limit_s=LIST_S)
    return [line.rpartition("/")[2] for line in said.split()]


def _head_pod(file: ClusterFile) -> str:
    clusters = _rayclusters(file)
    command = head_command(file, clusters)
    pods = (
        run(command, what="looking for its head", quiet=True, limit_s=LIST_S).split()
        if clusters
        else []
    )
    if not pods:
        raise Unreachable(
            f"{file.name} has no running head: it has not started yet, or has ended; "
            f"{_shown(kube(file, 'describe', f'rayjob/{file.name}'))} tells"
        )
    return pods[-1]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


# --- up and down ----------------------------------------------------------------------------------


def _up(file: ClusterFile, args: Namespace) -> int:
    commands = up_commands(file)
    if file.kind == "ray":
        own_token()
        _check_token_mounts(file)
        _check_key(file)
    _check_credentials(file)
    if file.kind == "ray" and (left := placeholders(file)):
        raise ConfigError(
            f"{', '.join(left)}: placeholders of the shipped file; copy the file, and name your own in it",
            file.path,
        )
    if file.provider == "local" and not file.here:
        _check_hosts(file)
    for n, command in enumerate(commands, 1):
        _step(command, what=f"step {n} of {len(commands)}")
    if file.here:
        check_ray_version(f"http://127.0.0.1:{file.dashboard_port}")
    say(f"{file.name} is up")
    if file.kind != "kuberay" or file.tree["kind"] == "RayCluster":
        say(f"  a sweep on it:   tfkd tune SPACE --cluster {file.path}")
        if tunnel := tunnel_command(file, file.dashboard_port):
            say(f"  its dashboard:   {_shown(tunnel)}")
    say(
        f"  what runs:       tfkd cluster status {file.path}\n  end it:          tfkd cluster down {file.path}"
    )
    return OK


def _step(command: Command, *, what: str, limit_s: float | None = None) -> None:
    """Run a step; retry once after a known race of Ray 2.60 when one of its processes ends."""
    for attempt in (1, 2, 3):
        try:
            run(command, what=what, limit_s=limit_s)
            return
        except StepFailed as error:
            if (
                attempt == 3
                or "'>' not supported between instances of 'NoneType' and 'int'" not in error.said
            ):
                raise
            say("(a bug in Ray, not in the cluster file; trying again)")


def _check_token_mounts(file: ClusterFile) -> None:
    """Raise if the token for the nodes is missing or not private."""
    for there, here in below(file.tree, "file_mounts").items():
        if str(there).endswith("auth_token"):
            path = expanded(str(here))
            if not path.is_file():
                raise ConfigError(
                    f"file_mounts: {here} should be the nodes' token, but does not exist; create it: ray "
                    "get-auth-token --generate",
                    file.path,
                )
            if token_in(path) != token():
                raise ConfigError(
                    f"file_mounts: {here} should be the nodes' token, but differs from the one used here "
                    f"({token_file()} or RAY_AUTH_TOKEN); make them equal",
                    file.path,
                )
            path.chmod(0o600)


def _check_key(file: ClusterFile) -> None:
    """Raise if the ssh key is missing or not private: ssh would refuse it much later."""
    key = below(file.tree, "auth").get("ssh_private_key")
    if key is None:
        return
    path = expanded(str(key))
    if not path.is_file():
        raise ConfigError(
            f"auth.ssh_private_key: {key} does not exist; name a key of yours, or create one: ssh-keygen -t ed25519",
            file.path,
        )
    if path.stat().st_mode & 0o077:
        raise ConfigError(
            f"auth.ssh_private_key: {key} can be read by other users (mode {path.stat().st_mode & 0o777:o}), and ssh "
            f"refuses such a key; chmod 600 {key}",
            file.path,
        )


def _check_hosts(file: ClusterFile) -> None:
    """Raise if a machine does not accept the key by ssh; Ray would wait 15 minutes for it."""

    def asked(host: str) -> StepFailed | None:
        try:  # ssh times out after SSH_S, but not if a host falls silent
            run(ssh(file, host, "true"), what="ssh", quiet=True, limit_s=1.5 * SSH_S)
        except StepFailed as error:
            return error
        return None

    with ThreadPoolExecutor(16) as pool:
        found = {
            host: error
            for host, error in zip(hosts(file), pool.map(asked, hosts(file)), strict=True)
            if error
        }
    refused = [host for host, error in found.items() if "Permission denied" in error.said]
    if refused and len(refused) == len(found):
        raise ConfigError(
            f"auth: {', '.join(refused)} responds, but rejects this user or key; add the key to its "
            "~/.ssh/authorized_keys, or name others in auth.ssh_user and auth.ssh_private_key",
            file.path,
        )
    if found:
        lines = [
            f"  {h}: {(error.said.strip().splitlines() or ['it says nothing'])[-1]}"
            for h, error in found.items()
        ]
        raise StepFailed(
            f"{file.path}: no answer by ssh within {SSH_S} s from {', '.join(found)}, so nothing was started; check "
            "that they are up and that provider.head_ip and worker_ips name them\n"
            + "\n".join(lines)
        )


_ASKED = {
    "aws": (
        {"boto3": "boto3"},
        [
            sys.executable,
            "-c",
            "import boto3, sys; sys.exit(boto3.Session().get_credentials() is None)",
        ],
        "aws configure",
    ),
    "gcp": (
        {
            "googleapiclient": "google-api-python-client",
            "google.auth": "google-auth",
            "google_auth_httplib2": "google-auth-httplib2",
        },
        [sys.executable, "-c", "import google.auth; google.auth.default()"],
        "gcloud auth application-default login",
    ),
    "azure": (
        {
            "azure.identity": "azure-identity",
            "azure.mgmt.compute": "azure-mgmt-compute",
            "azure.mgmt.network": "azure-mgmt-network",
            "azure.mgmt.resource": "azure-mgmt-resource",
            "azure.common.credentials": "azure-common",
        },
        ["az", "account", "show"],
        "az login",
    ),
}
"""By provider: Ray's module for it and the package, a command that checks credentials, a hint."""


def _check_credentials(file: ClusterFile) -> None:
    """Raise if the provider does not accept the credentials, before Ray asks."""
    if file.kind == "kuberay":
        found = _provider_asked(_found(["kubectl", "config", "current-context"]), "kubectl")
        if found.returncode:
            raise ConfigError(
                "kubectl knows no Kubernetes cluster (no current context); get one's credentials, such as: "
                "gcloud container clusters get-credentials NAME",
                file.path,
            )
    if file.provider in _ASKED:
        modules, question, login = _ASKED[file.provider]
        absent = _provider_asked(
            [sys.executable, "-c", _IMPORTED, *modules], "Python"
        ).stdout.split()
        packages = [modules[module] for module in absent]
        if file.provider == "azure" and not shutil.which("az"):
            absent, packages = [*absent, "az"], [*packages, "azure-cli"]
        if absent:
            raise ConfigError(
                f"provider {file.provider} needs {', '.join(absent)} here; pip install {' '.join(packages)}",
                file.path,
            )
        if _provider_asked(_found(question), file.provider).returncode:
            raise ConfigError(f"no credentials for {file.provider} here; {login}", file.path)


_IMPORTED = """
import importlib, sys
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except ImportError:
        print(name)
"""
"""A program that prints the modules that cannot be imported."""


def _provider_asked(command: Command, whom: str) -> subprocess.CompletedProcess[str]:
    """Run a short query; raise StepFailed if there is no answer in time."""
    try:
        return subprocess.run(
            command, env=_env(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            text=True, timeout=ASK_S,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise StepFailed(
            f"{whom} did not answer within {ASK_S:g} s, so nothing was started; check that this machine reaches "
            "the provider's servers"
        ) from None


def _down(file: ClusterFile, args: Namespace) -> int:
    if file.here:
        _end_here(file)
    clusters = _rayclusters(file)
    for command in [] if file.here else down_commands(file):
        _step(command, what="down", limit_s=DOWN_S)
    left, until = _nodes_up(file, clusters), time.monotonic() + LEFT_S
    while left and time.monotonic() < until:
        say(f"{file.name}: {len(left)} still ending")
        time.sleep(5)
        left = _nodes_up(file, clusters)
    if left:
        listed = "\n  ".join(left)
        raise StepFailed(
            f"{LEFT_S} s later these still exist, and may cost money; end them by hand:\n  {listed}"
        )
    for command in tidy_commands(file):
        _step(command, what="down", limit_s=DOWN_S)
    print(f"{file.name} is down: nothing of it runs{_what_stays(file)}")
    return OK


def _what_stays(file: ClusterFile) -> str:
    """Return a line about what `down` leaves and the provider bills; empty if nothing."""
    if file.provider not in _PRICED - {"slurm"}:
        return ""
    return f"\n  {file.storage} stays: its file system, volume or bucket costs money until you delete it"


def _end_here(file: ClusterFile) -> None:
    """End the processes of this cluster on this machine, and no others."""
    mark = f"{sockets_dir(file)}/session".encode()
    for number in (signal.SIGTERM, signal.SIGKILL):
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with suppress(OSError):
                if mark in path.read_bytes() and int(path.parent.name) != os.getpid():
                    os.kill(int(path.parent.name), number)
        time.sleep(2)


def _nodes_up(file: ClusterFile, clusters: Sequence[str]) -> list[str]:
    """Return the running nodes of the cluster, one line each, from the provider's list."""
    found = []
    for command in nodes_commands(file, clusters):
        try:
            found += run(command, what="listing its nodes", quiet=True, limit_s=LIST_S).splitlines()
        except StepFailed as error:
            if not (command[0] == "pgrep" and error.code == 1):  # it found none
                raise
    return [line for line in found if line.strip()]


# --- status, jobs ---------------------------------------------------------------------------------


_PRICED = {"aws", "gcp", "azure", "kuberay", "slurm"}


def _status_lines(file: ClusterFile, args: Namespace) -> int:
    nodes = _nodes_up(file, _rayclusters(file))
    if file.here:
        nodes = nodes and ["127.0.0.1"]
    if not nodes:
        free = ", no node costs money" if file.provider in _PRICED else ""
        print(f"{file.name} is down: nothing of it runs{free}{_what_stays(file)}")
        return OK
    what = (
        "costs money until `tfkd cluster down`"
        if file.provider in _PRICED
        else "runs until `tfkd cluster down`"
    )
    print(f"{file.name}: {len(nodes)} node{'s' if len(nodes) > 1 else ''}; each {what}")
    print("\n".join(f"  {line}" for line in nodes))
    if file.kind == "slurm":
        return OK
    with reached(file) as address:
        jobs = jobs_at(address)
        text = ask(address, "/api/cluster_status?format=1")["data"].get("clusterStatus") or ""
    for job in jobs[:10]:
        print(f"  job {job['submission_id']}: {job['status'].lower()}: {job['entrypoint']}")
    print("\n".join(f"  {line}" for line in waiting_lines(text)) or "  no node is being started")
    return OK


def waiting_lines(text: str) -> list[str]:
    """Return what `ray status` reports as pending: starting or failed nodes, and demands."""
    found = []
    parts = (("Pending", "starting"), ("Recent failures", "failed"), ("Pending Demands", "waits"))
    for title, word in parts:
        section = re.search(rf"^{title}:\n((?:[ \t]+\S.*\n?)*)", text, re.M)
        lines = [line.strip() for line in section[1].splitlines()] if section else []
        found += [f"{word}: {line}" for line in lines if not line.startswith("(no ")]
    return found


def _submit(file: ClusterFile, args: Namespace) -> int:
    words = _verb_words(args)
    if file.kind == "slurm":
        run(slurm_submit(file, words), what="submitting")
        return OK
    with tempfile.TemporaryDirectory(prefix="tfkd-job-") as folder, reached(file) as address:
        stage(Path.cwd(), Path(folder))
        return run_job(file.path, address, Path(folder), words, name="job", detach=args.detach)


def run_job(
    where: Path | str,
    address: str,
    folder: Path,
    words: Sequence[str],
    *,
    name: str,
    detach: bool,
    working: str | None = None,
) -> int:
    """Submit a staged folder as a job, follow it unless detached, and return its exit code."""
    job = f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    follow = (
        _shown(logs_command(address, job))
        if str(where).startswith("http")
        else f"tfkd cluster logs {where} {job}"
    )
    command = submit_command(address, job, folder, as_entrypoint(words, folder), working)
    say(f"submitting job {job}; follow it again, from here or elsewhere:\n  {follow}")
    sent = False
    try:
        _submit_job(command, address, job)
        sent = True
        if detach:
            return OK
        with suppress(StepFailed):  # a failed job, too; its state is read below
            run(logs_command(address, job), what="following the job")
    except KeyboardInterrupt:
        say(
            "no longer followed; the job continues"
            if sent
            else "interrupted while it was sent: it may or may not run"
        )
        return INTERRUPTED
    until = time.monotonic() + JOB_END_S
    while (state := _state_of(address, job)) and state["status"] in ("PENDING", "RUNNING"):
        if time.monotonic() > until:
            raise StepFailed(
                f"job {job} runs but is no longer followed; follow it again:\n  {follow}"
            )
        time.sleep(0.5)
    if state is None or state["status"] != "SUCCEEDED":
        told = (
            "is no longer known there"
            if state is None
            else f"{state['status'].lower()}: {state.get('message')}"
        )
        code = (state or {}).get("driver_exit_code")  # of tfkd there, which has reported the reason
        raise StepFailed(
            f"job {job}: {told}".strip(), ends=code if code in (WRONG_INPUT, NOT_BETTER) else FAILED
        )
    return OK


def _submit_job(command: Command, address: str, job: str) -> None:
    """Submit a job; if this fails, say whether the job exists anyway."""
    try:
        run(command, what="submitting the job", limit_s=SUBMIT_S)
    except StepFailed as error:
        try:
            there = _state_of(address, job) is not None
        except Unreachable as gone:
            raise StepFailed(
                f"the head at {address} disappeared while job {job} was sent, so it is unknown whether the job runs; "
                f"when the head is back, `ray job list --address {address}` shows it ({gone})"
            ) from None
        if not there:
            raise StepFailed(f"the job did not start; see Ray's output above: {error}") from None


def _state_of(address: str, job: str) -> dict[str, Any] | None:
    return next((j for j in jobs_at(address) if j["submission_id"] == job), None)


def _cluster_logs(file: ClusterFile, args: Namespace) -> int:
    if file.kind == "slurm" or is_rayjob(file):
        run(_commands(file, args)[0], what="following")
        return OK
    with reached(file) as address:
        known = [job["submission_id"] for job in jobs_at(address)]
        if not known:
            raise ConfigError(
                "no job has been submitted to it; tfkd tune SPACE --cluster FILE", file.path
            )
        if args.job and args.job not in known:
            raise ConfigError(f"no job {args.job!r}; there are {', '.join(known)}", file.path)
        run(logs_command(address, args.job or known[0]), what="following")
    return OK


# --- sweeps as jobs -------------------------------------------------------------------------------


def is_job(args: Namespace) -> bool:
    """Return True if a sweep should run as a job on a cluster."""
    return bool(args.cluster) or str(args.address or "").startswith(("http://", "https://"))


PLACES = ("cluster", "address", "detach")
"""Options that choose where a command runs, and so are not sent."""
SENT = "\0"
"""Placeholder for the sent file in a job's words; no command line can contain it."""


def job_words(args: Namespace, *, sent: str | None = None, storage: str | None = None) -> list[str]:
    """Return the command line without the options that choose where it runs.

    Args:
        sent: the argument that names a file of this machine to send; SENT stands for it.
        storage: replaces `--storage` on the cluster.
    """
    replaced = [] if storage is None else ["storage"]
    dropped = ArgumentParser(add_help=False)
    for name in (*PLACES, *replaced):
        dropped.add_argument(f"--{name}", action="store_true" if name == "detach" else "store")
    words = _without_secrets(dropped.parse_known_args(args.words)[1])
    if sent is not None and (value := getattr(args, sent)) is not None:
        words = _with_sent(args, words, sent, str(value))
    return [*words, *(["--storage", storage] if storage is not None else [])]


def _with_sent(args: Namespace, words: list[str], name: str, value: str) -> list[str]:
    """Return the words with SENT as an argument's value, at the one place that has this value."""
    for place, word in enumerate(words):
        option, equals, _ = word.removesuffix(value).partition("=")
        if word.endswith(value) and (equals or not option):
            changed = [*words[:place], *([option] if option else []), SENT, *words[place + 1 :]]
            with redirect_stderr(io.StringIO()), suppress(SystemExit):
                if getattr(args.parsed(changed), name) == SENT:
                    return changed
    raise AssertionError(f"{words=} {name=} {value=}")


def _without_secrets(words: list[str]) -> list[str]:
    """Return the words; raise if one contains a password."""
    from tfkd_ray.settings.passwords import masked
    from tfkd_ray.space.search_config import ENVIRONMENT

    here = os.environ.get(ENVIRONMENT)
    for word in words:
        if masked(word) != word or (
            here is not None and masked(here) != here and masked(here) in word
        ):
            raise ConfigError(
                "--study-storage (search.storage): the dashboard shows a job's command, including a password; instead "
                f"set {ENVIRONMENT} on the cluster, not here, and write *** for the password"
            )
    return words


def check_places(places: Sequence[Path | str], what: str) -> None:
    """Raise if a place exists only in this machine's working directory."""
    for place in places:
        if isinstance(place, Path) and not place.is_absolute():
            raise ConfigError(
                f"an absolute path that the cluster can reach, or a URL, got {place}", what
            )


def is_arms(args: Namespace) -> bool:
    """Return True if `tfkd confirm` gets an arms file (in a job: an absolute path), not a sweep."""
    given = Path(args.file)
    there = is_job(args) and given.is_absolute() and not given.is_file()
    return not ("://" in args.file or given.is_dir() or there)
