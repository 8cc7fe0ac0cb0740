"""Commands that start, stop, list and reach a cluster of each kind."""

import shlex
from collections.abc import Sequence

from tfkd_ray.launch.clusterfile import ClusterFile, below, option
from tfkd_ray.settings.errors import ConfigError
from tfkd_ray.settings.files import expanded

SSH_S = 10
"""Maximum time for a host of an on-premises cluster to answer by ssh."""

Command = list[str]
RAYCLUSTER = "RAYCLUSTER"
"""Placeholder in printed commands for a name that only KubeRay knows."""


def up_commands(file: ClusterFile) -> list[Command]:
    """Return the commands that start a cluster."""
    path = str(file.path)
    if file.here:
        return [["bash", "-c", str(line)] for line in file.tree["head_start_ray_commands"]]
    if file.kind == "ray":
        return [["ray", "up", "--yes", "--no-config-cache", path]]
    if file.kind == "slurm":
        raise ConfigError(
            "a Slurm cluster lives as long as its job; start both: tfkd cluster submit FILE -- tfkd tune SPACE",
            path,
        )
    apply = kube(file, "apply --filename", path)
    if is_rayjob(file):
        return [apply]
    ready = "wait --for=condition=HeadPodReady --timeout=900s"
    return [apply, kube(file, ready, f"raycluster/{file.name}")]


def down_commands(file: ClusterFile) -> list[Command]:
    """Return the commands that stop a cluster; the storage stays."""
    if file.here:
        # does what _end_here does, without `pkill`; the brackets keep the shell from finding itself
        mark = shlex.quote(f"[/]{sockets_dir(file).lstrip('/')}/session")
        return [["bash", "-c", f"pkill --full {mark}; sleep 2; pkill --signal KILL --full {mark}"]]
    if file.kind == "ray":
        return [["ray", "down", "--yes", str(file.path)]]
    if file.kind == "slurm":
        return [["scancel", "--me", "--name", file.name]]
    name = f"{file.tree['kind'].lower()}/{file.name}"
    return [kube(file, "delete --ignore-not-found --timeout=300s", name)]


def tidy_commands(file: ClusterFile) -> list[Command]:
    """Return the commands that delete the NetworkPolicies, after the pods that they protect."""
    names = [d["metadata"]["name"] for d in file.others if d.get("kind") == "NetworkPolicy"]
    return [
        kube(file, "delete --ignore-not-found --timeout=60s", f"networkpolicy/{name}")
        for name in names
    ]


def rayclusters_command(file: ClusterFile) -> Command:
    """Return the command that lists a RayJob's clusters, RAYCLUSTER in other commands."""
    selector = f"ray.io/originated-from-crd=RayJob,ray.io/originated-from-cr-name={file.name}"
    return kube(file, "get rayclusters --output name --selector", selector)


def head_command(file: ClusterFile, clusters: Sequence[str] = (RAYCLUSTER,)) -> Command:
    """Return the command that names the head's pod of a RayJob, HEAD in other commands."""
    selector = f"ray.io/node-type=head,{_selector(file, clusters)}"
    words = "--field-selector", "status.phase=Running"
    return kube(file, "get pods --output name --selector", selector, *words)


def nodes_commands(file: ClusterFile, clusters: Sequence[str] = (RAYCLUSTER,)) -> list[Command]:
    """Return the commands that list running nodes from the provider, so also after Ray has stopped.

    Args:
        file: the cluster file.
        clusters: those that a RayJob has created.
    """
    provider = file.tree.get("provider", {})
    if file.here:
        return [["pgrep", "--list-full", "--full", f"{sockets_dir(file)}/session"]]
    if file.provider == "local":
        return [ssh(file, host, f"pgrep -f {shlex.quote(_raylet(file))} > /dev/null && echo {host}; true")
                for host in hosts(file)]  # fmt: skip
    if file.provider == "aws":
        return [["aws", "ec2", "describe-instances", "--region", provider["region"], "--output", "text",
                 "--filters", f"Name=tag:ray-cluster-name,Values={file.name}",
                 "Name=instance-state-name,Values=pending,running,shutting-down,stopping,stopped", "--query",
                 "Reservations[].Instances[].[InstanceId,InstanceType,State.Name,InstanceLifecycle]"]]  # fmt: skip
    if file.provider == "gcp":
        return [["gcloud", "compute", "instances", "list", "--project", provider["project_id"],
                 "--filter", f"labels.ray-cluster-name={file.name}",
                 "--format", "value(name,machineType,status,scheduling.preemptible)"]]  # fmt: skip
    if file.provider == "azure":
        query = f"[?tags.\"ray-cluster-name\"=='{file.name}'].[name,hardwareProfile.vmSize,powerState,priority]"
        return [["az", "vm", "list", "--resource-group", provider["resource_group"], "--show-details",
                 "--query", query, "--output", "tsv"]]  # fmt: skip
    if file.kind == "slurm":
        shown = "--format", "%i %T %D nodes %R %L left"
        return [["squeue", "--me", "--noheader", "--name", file.name, *shown]]
    if is_rayjob(file) and not clusters:
        return []
    listed = "get pods --no-headers --ignore-not-found --selector"
    return [kube(file, listed, _selector(file, clusters))]


def is_rayjob(file: ClusterFile) -> bool:
    return file.kind == "kuberay" and file.tree["kind"] == "RayJob"


def _selector(file: ClusterFile, clusters: Sequence[str]) -> str:
    """Return the selector of a cluster's pods, which KubeRay labels with the cluster's name."""
    names = clusters if is_rayjob(file) else [file.name]
    return (
        f"ray.io/cluster={names[0]}"
        if len(names) == 1
        else f"ray.io/cluster in ({','.join(names)})"
    )


def kube(file: ClusterFile, verb: str, *words: str) -> Command:
    """Return a `kubectl` command in the file's namespace, its first words as one text."""
    namespace = file.tree["metadata"].get("namespace")
    return ["kubectl", *(["--namespace", namespace] if namespace else []), *verb.split(), *words]


def hosts(file: ClusterFile) -> list[str]:
    """Return the addresses of an on-premises cluster's machines from here, the head's first."""
    provider = file.tree["provider"]
    return [
        provider.get("external_head_ip") or provider["head_ip"],
        *(provider["worker_ips"] or []),
    ]


def ssh(file: ClusterFile, host: str, command: str) -> Command:
    """Return an ssh command on a node, with the file's user, key and proxy."""
    auth = below(file.tree, "auth")
    key = ["-i", str(expanded(auth["ssh_private_key"]))] if "ssh_private_key" in auth else []
    options = ["BatchMode=yes", f"ConnectTimeout={SSH_S}", "LogLevel=ERROR"]
    options += (
        [f"ProxyCommand={auth['ssh_proxy_command']}"] if auth.get("ssh_proxy_command") else []
    )
    options += ["StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null"]  # as `ray up` does
    user = f"{auth['ssh_user']}@" if "ssh_user" in auth else ""
    return ["ssh", *key, *(word for o in options for word in ("-o", o)), f"{user}{host}", command]


def _raylet(file: ClusterFile) -> str:
    """Return a pattern of this cluster's raylets; the brackets keep it from matching itself."""
    return f"[r]aylet .*--gcs-address=[0-9.]*:{file.port} "


def tunnel_command(file: ClusterFile, port: int, head: str = "pod/HEAD") -> Command | None:
    """Return the command that forwards the head's dashboard to a local port; None if it is local.

    Args:
        file: the cluster file.
        port: port of this machine.
        head: the head's pod, for a RayJob.
    """
    if file.here:
        return None
    if file.kind == "ray":
        ports = ["--port", str(port), "--remote-port", str(file.dashboard_port)]
        return ["ray", "dashboard", *ports, str(file.path)]
    target = head if is_rayjob(file) else f"service/{file.name}-head-svc"
    return kube(file, "port-forward --address 127.0.0.1", target, f"{port}:8265")


def logs_command(address: str, job: str) -> Command:
    """Return the command that follows a job's log."""
    return ["ray", "job", "logs", "--address", address, "--follow", job]


def slurm_submit(file: ClusterFile, words: Sequence[str]) -> Command:
    """Return the command that submits a Slurm job."""
    return ["sbatch", str(file.path), *words]


def slurm_logs(file: ClusterFile) -> Command:
    """Return the command that follows the newest Slurm output in the directory of submission."""
    return ["bash", "-c", f'tail -n +1 -F "$(ls -t {shlex.quote(file.name)}-*.log | head -n 1)"']


def sockets_dir(file: ClusterFile) -> str:
    """Return a local cluster's directory of sockets, which its processes' command lines contain."""
    place = option(file.head, "temp-dir")
    assert place is not None, f"{file.path}: checked to have one of its own"
    return place
