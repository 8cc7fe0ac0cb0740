"""A cluster file: read, and checked offline for what Ray, Kubernetes and Slurm would only find when it costs money.

Three kinds, told apart by what is in them: Ray's own (`provider:`), KubeRay's (`apiVersion:`, RayCluster or RayJob)
and a Slurm batch script (`#SBATCH`). What Ray's or KubeRay's schema says is asked of that schema; the rules here are
those it does not see. A rule is a function that yields sentences; `check` runs those of the file's kind.

Beside the cluster itself, a file says where experiments go: `metadata: {tfkd: {storage: ...}}` for Ray,
`metadata: {annotations: {tfkd/storage: ...}}` for KubeRay, `TFKD_RESULTS=...` for Slurm.
"""

import contextlib
import functools
import importlib.metadata
import io
import json
import logging
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tfkd_ray.schema import ConfigError, did_you_mean, dotted, find_file, parse_documents, text_of
from tfkd_ray.storage import is_url, storage_at

if TYPE_CHECKING:
    from tfkd_ray.config import TrainConfig

DRIVER = "tfkd_driver"
"""Custom resource that the process of a trial with several workers takes 0.01 of, so that it takes no CPU from them."""

PROVIDERS = {
    "local": {"head_ip", "worker_ips", "external_head_ip", "coordinator_address"},
    "aws": {"region", "availability_zone", "cache_stopped_nodes", "use_internal_ips", "security_group", "key_pair",
            "aws_credentials", "cloudwatch"},
    "gcp": {"region", "availability_zone", "project_id", "use_internal_ips", "gcp_credentials"},
    "azure": {"location", "resource_group", "subscription_id", "subnet_mask", "unique_id", "tags", "availability_zone",
              "use_internal_ips", "use_external_head_ip", "msi_name", "msi_resource_group", "cache_stopped_nodes"},
}  # fmt: skip
"""What Ray 2.60 reads of `provider`, beside `type`; its schema takes any word there, so that a misspelt one is lost."""

NODE_LOCAL = re.compile(r"^(?!/)|^/(tmp|var|dev|run|root|home|opt|local|scratch|mnt/local)(/|$)")
"""Paths that each node has for itself, as a rule."""

LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class ClusterFile:
    """A cluster file as it was read; nothing is checked yet but its kind."""

    path: Path
    kind: Literal["ray", "kuberay", "slurm"]
    tree: dict[str, Any]
    """Of KubeRay's file, its RayCluster or RayJob; of Slurm's, nothing."""
    text: str
    others: tuple[dict[str, Any], ...] = ()
    """The other documents of KubeRay's file."""

    @property
    def name(self) -> str:
        """What the cluster is called."""
        if self.kind == "ray":
            return str(self.tree.get("cluster_name"))
        if self.kind == "kuberay":
            return str(self.tree["metadata"]["name"])
        found = re.search(r"^#SBATCH\s+(?:--job-name[=\s]|-J\s*)(\S+)", self.text, re.M)
        return found[1] if found else self.path.name

    @property
    def provider(self) -> str:
        """What runs its machines: local, aws, gcp, azure; kuberay; slurm."""
        return str(self.tree["provider"].get("type")) if self.kind == "ray" else self.kind

    @property
    def here(self) -> bool:
        """Whether the cluster is this machine alone, which needs no ssh."""
        provider = self.tree.get("provider") or {}
        return self.provider == "local" and provider.get("head_ip") in LOOPBACK and not provider.get("worker_ips")

    @property
    def storage(self) -> str | None:
        """Where experiments go on the cluster."""
        if self.kind == "slurm":
            found = re.search(r"^TFKD_RESULTS=[\"']?([^\s\"'#]+)", self.text, re.M)
            return found[1] if found else None
        place = ("tfkd", "storage") if self.kind == "ray" else ("annotations", "tfkd/storage")
        below: Any = self.tree.get("metadata")
        for key in place:
            below = below.get(key) if isinstance(below, dict) else None
        return None if below is None else str(below)

    @property
    def head(self) -> str:
        """The commands that start Ray on the head, as one text."""
        return "\n".join(map(str, self.tree.get("head_start_ray_commands") or []))

    @property
    def workers(self) -> str:
        """The commands that start Ray on a worker, as one text."""
        return "\n".join(map(str, self.tree.get("worker_start_ray_commands") or []))

    @property
    def dashboard_port(self) -> int:
        """Where the dashboard listens, on the head's loopback."""
        return int(option(self.head, "dashboard-port") or 8265)

    @property
    def port(self) -> int:
        """Where the head listens."""
        return int(option(self.head, "port") or 6379)

    @property
    def cluster(self) -> dict[str, Any]:
        """KubeRay's: what is said about the cluster itself."""
        spec = self.tree["spec"]
        found: dict[str, Any] = spec.get("rayClusterSpec") or {} if self.tree["kind"] == "RayJob" else spec
        return found


def option(command: str, name: str) -> str | None:
    """The value of a `--name=value` in a shell command."""
    found = re.search(rf"--{name}[=\s]+['\"]?([^\s'\"]+)", command)
    return found[1] if found else None


def load_cluster(path: str | Path) -> ClusterFile:
    """Read a cluster file, or the one of that name that ships with tfkd; a ConfigError if it is none."""
    found = find_file(path, "clusters")
    if not found.exists() and found.suffix in ("", ".sh"):
        found = find_file(path, "clusters", suffix=".sh")
    if found.is_file() and found.suffix == ".sh":
        text = found.read_text(encoding="utf-8", errors="replace")
        if not re.search(r"^#SBATCH\s", text, re.M):
            raise ConfigError("not a Slurm script: there is no line that begins with #SBATCH", found)
        return ClusterFile(found, "slurm", {}, text)
    if found.is_file() and found.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"a cluster file is a .yaml (Ray, KubeRay) or a .sh (Slurm), got {found.suffix!r}", found)
    text = text_of(found)
    if not text.strip():
        raise ConfigError("is empty; begin with one from clusters/", found)
    documents = parse_documents(text, found)
    if not documents or not all(isinstance(tree, dict) for tree in documents):
        raise ConfigError("every document in it must be settings (key: value)", found)
    if "provider" in documents[0] and len(documents) == 1:
        if not isinstance(documents[0]["provider"], dict):
            raise ConfigError(f"provider: needs settings below it (type: aws), got {documents[0]['provider']!r}", found)
        return ClusterFile(found, "ray", documents[0], text)
    ours = [d for d in documents if d.get("kind") in ("RayCluster", "RayJob")]
    if len(ours) == 1 and "apiVersion" in ours[0]:
        return ClusterFile(found, "kuberay", ours[0], text, tuple(d for d in documents if d is not ours[0]))
    if "objective" in documents[0] or "arms" in documents[0]:
        raise ConfigError("is a search space or an arms file, not a cluster file; see the files in clusters/", found)
    raise ConfigError(
        "not a cluster file: it has neither 'provider:' (Ray's own) nor one document of kind RayCluster or RayJob "
        "(KubeRay's); begin with one from clusters/",
        found,
    )


def check(file: ClusterFile, shape: "TrainConfig | None" = None) -> list[str]:
    """What can be said about a good file, in lines; a ConfigError with everything that is wrong.

    Args:
        file: what `load_cluster` read.
        shape: a trial, which the cluster must have room for.
    """
    rules = {"ray": _ray_rules, "kuberay": _kuberay_rules, "slurm": _slurm_rules}[file.kind]
    problems = list(rules(file)) or [*_storage(file), *_room(file, shape)]
    if problems:
        raise ConfigError(problems, file.path)
    lines = [f"{file.name}: {_kind_in_words(file)}", f"experiments go to {file.storage}"]
    nodes = node_types(file)
    if nodes is None:
        lines.append(
            "its nodes' CPUs and GPUs are found by Ray when it starts, so room for a trial is not checked here"
        )
    for node in nodes or []:
        has = ", ".join(_amounts(node)) or "no CPUs"
        lines.append(f"  {node.name}: {node.least} to {node.most} nodes, each with {has}")
    if left := placeholders(file):
        lines.append(f"to change before `tfkd cluster up`: {', '.join(left)}")
    return lines


def _amounts(node: "NodeType") -> Iterator[str]:
    """What a node has, a phrase each."""
    from tfkd_ray.config import KIND

    for kind, amount in node.resources.items():
        if kind != DRIVER:
            yield kind.removeprefix(KIND) if kind.startswith(KIND) else f"{amount:g} {kind}"


PLACEHOLDER = re.compile(
    r"\b(?:ami|fs|sg|subnet)-0123456789abcdef0\b|\b0{8}(?:-0{4}){3}-0{12}\b|\bmy-project\b|\bmystorage\.file\b"
    r"|\bregistry\.example\.com\b"
)
"""What stands in the files that ship where something of one's own must stand."""


def placeholders(file: ClusterFile) -> list[str]:
    """What the file still has of the shipped one and nobody can have."""
    code = "\n".join(line for line in file.text.splitlines() if not line.lstrip().startswith("#"))
    return list(dict.fromkeys(PLACEHOLDER.findall(code)))


def _kind_in_words(file: ClusterFile) -> str:
    if file.here:
        return "this machine, as a cluster of Ray's"
    words = {"local": "machines of your own, by ssh", "kuberay": "Kubernetes, by KubeRay", "slurm": "a Slurm job"}
    return words.get(file.provider, f"Ray's own cluster launcher on {file.provider}")


# --- what all kinds share --------------------------------------------------------------------------------------


def _schema_problems(tree: Any, schema: dict[str, Any]) -> Iterator[str]:
    """What a JSON schema finds, a sentence each."""
    from jsonschema import Draft7Validator

    for error in sorted(Draft7Validator(schema).iter_errors(tree), key=lambda e: list(map(str, e.absolute_path))):
        path = dotted(error.absolute_path)
        value = error.instance
        if error.validator == "additionalProperties" and isinstance(value, dict):
            known = error.schema.get("properties", {})
            for key in sorted(set(value) - set(known)):
                yield f"{dotted([*error.absolute_path, key])}: no such field; {did_you_mean(key, known)}"
        elif error.validator == "required":
            missing = [key for key in error.validator_value if key not in value]
            for key in missing:
                yield f"{dotted([*error.absolute_path, key])}: required, and not given"
        elif error.validator == "enum":
            yield f"{path}: no such value {value!r}; {did_you_mean(str(value), map(str, error.validator_value))}"
        elif error.validator == "type":
            yield f"{path or '(the file)'}: must be of type {error.validator_value}, got {value!r}"
        else:
            yield f"{path or '(the file)'}: {error.message}"


def _storage(file: ClusterFile) -> Iterator[str]:
    """Experiments must go where all nodes see them."""
    field = {"ray": "metadata.tfkd.storage", "kuberay": "metadata.annotations.tfkd/storage"}.get(
        file.kind, "TFKD_RESULTS"
    )
    if file.storage is None:
        yield f"{field}: required, and not given; name a directory that all nodes see, such as /mnt/shared/tfkd_results"
        return
    if is_url(file.storage):
        try:
            storage_at(file.storage)
        except ConfigError as error:
            yield from (f"{field}: {problem.removeprefix('storage: ')}" for problem in error.problems)
        return
    if file.here:
        return
    if file.kind == "slurm":
        if re.match(r"/(tmp|dev/shm|var/tmp|local)(/|$)", file.storage) or "$TMPDIR" in file.storage:
            yield _local_to_a_node(field, file.storage)
    elif NODE_LOCAL.match(file.storage):
        yield _local_to_a_node(field, file.storage)
    elif file.kind == "kuberay":
        yield from _volumes(file, field)
    elif file.provider != "local":
        yield from _mounts(file, field)


def _local_to_a_node(field: str, value: str) -> str:
    return f"{field}: {value} is local to each node, and a trial that moves would not find its checkpoint; name a directory that all nodes see"  # noqa: E501


def _mounts(file: ClusterFile, field: str) -> Iterator[str]:
    """On rented machines nothing is shared unless this file mounts it, on all of them."""
    assert file.storage is not None, f"{file.path=}"
    setup = [*(file.tree.get("initialization_commands") or []), *(file.tree.get("setup_commands") or [])]
    targets = [m[1].rstrip("/") for line in setup for m in re.finditer(r"\bmount\b[^;&|]*\s(/\S+)", str(line))]
    mounted = [t for t in targets if f"{file.storage}/".startswith(f"{t}/")]
    if not mounted:
        there = ", ".join(targets) or "nothing"
        yield (
            f"{field}: {file.storage} is on no file system that the commands for all nodes mount (they mount {there}); "
            "mount one there in initialization_commands"
        )
    elif file.tree.get("docker"):
        given = " ".join(map(str, file.tree["docker"].get("run_options") or []))
        if not any(f"-v {t}:{t}" in given or f"--volume {t}:{t}" in given for t in mounted):
            yield f"docker.run_options: {mounted[0]} is not seen in the container; add: -v {mounted[0]}:{mounted[0]}"


def _volumes(file: ClusterFile, field: str) -> Iterator[str]:
    """Every pod must mount a volume that is shared where the storage is."""
    assert file.storage is not None, f"{file.path=}"
    for place, group in _groups(file):
        pod = group["template"]["spec"]
        volumes = {v["name"]: v for v in pod.get("volumes") or []}
        mounts = [m for m in pod["containers"][0].get("volumeMounts") or []
                  if f"{file.storage}/".startswith(m["mountPath"].rstrip("/") + "/")]  # fmt: skip
        kinds = {kind for m in mounts for kind in volumes.get(m["name"], {}) if kind != "name"}
        if not kinds & {"persistentVolumeClaim", "nfs", "csi"}:
            what = f"only {', '.join(sorted(kinds))}" if kinds else "no volume"
            yield (
                f"{place}.template.spec: {field} is {file.storage}, and {what} is mounted there; mount a claim of "
                "ReadWriteMany (persistentVolumeClaim) or nfs"
            )


@dataclass(frozen=True)
class NodeType:
    """Nodes of one kind: how many, and what each has."""

    name: str
    least: int
    most: int
    resources: dict[str, float]
    """By Ray's names, those of kinds of GPUs among them where the file says them."""


def node_types(file: ClusterFile) -> list[NodeType] | None:
    """What the file says about its nodes; None where Ray finds that out when it starts."""
    if file.kind == "kuberay":
        return [_pods(place, group) for place, group in _groups(file)]
    if file.kind == "slurm":
        nodes = _sbatch(file, "nodes") or 1
        has = {"CPU": _sbatch(file, "cpus-per-task"), "GPU": _sbatch(file, "gpus-per-node")}
        return [NodeType("node", nodes, nodes, {k: float(v) for k, v in has.items() if v})]
    types = file.tree.get("available_node_types")
    if not types or not all(t.get("resources") for t in types.values()):
        return None
    most = file.tree.get("max_workers", 2)
    head = file.tree["head_node_type"]
    return [
        NodeType(
            name,
            t.get("min_workers", 0) + (name == head),
            min(t.get("max_workers", 0 if name == head else most), most) + (name == head),
            {kind: float(amount) for kind, amount in t["resources"].items()},
        )
        for name, t in types.items()
    ]


def _sbatch(file: ClusterFile, name: str) -> int | None:
    found = re.search(rf"^#SBATCH\s+--{name}[=\s]\s*(?:[a-z0-9_-]+:)?(\d+)", file.text, re.M)
    return int(found[1]) if found else None


def _pods(place: str, group: dict[str, Any]) -> NodeType:
    container = group["template"]["spec"]["containers"][0]
    limits = {**container.get("resources", {}).get("requests", {}), **container.get("resources", {}).get("limits", {})}
    started = group.get("rayStartParams") or {}
    cpus = started.get("num-cpus", math.ceil(_quantity(limits.get("cpu", 0)) or 0))  # as KubeRay rounds
    gpus = started.get("num-gpus", next((v for k, v in limits.items() if k.endswith("/gpu")), 0))
    kinds = re.findall(r"(accelerator_type:[\w-]+)", str(started.get("resources", "")))
    has = {"CPU": _quantity(cpus) or 0.0, "GPU": _quantity(gpus) or 0.0, **dict.fromkeys(kinds, 1.0)}
    head = place.endswith("headGroupSpec")
    hosts = group.get("numOfHosts", 1)
    least, most = (1, 1) if head else (group.get("minReplicas", 0) * hosts, group.get("maxReplicas", 2**31 - 1) * hosts)
    return NodeType("head" if head else group["groupName"], least, most, {k: v for k, v in has.items() if v})


_UNITS = {"": 1.0, "n": 1e-9, "u": 1e-6, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18,
          **{f"{unit}i": 1024.0**power for power, unit in enumerate("KMGTPE", 1)}}  # fmt: skip
"""What may follow the number of a Kubernetes quantity."""


def _quantity(value: Any) -> float | None:
    """A Kubernetes quantity (4, "4", "7500m", "1k", "2e3") as a number; None if it is none."""
    found = re.fullmatch(r"([0-9]+\.?[0-9]*|\.[0-9]+)(?:([numkMGTPE]|[KMGTPE]i)?|[eE]([-+]?[0-9]{1,2}))", str(value))
    if found is None or isinstance(value, bool):
        return None
    return float(found[1]) * (10.0 ** int(found[3]) if found[3] else _UNITS[found[2] or ""])


def _amount_problems(place: str, group: dict[str, Any]) -> Iterator[str]:
    """CPUs and GPUs must be what Kubernetes, or `ray start`, reads as an amount."""
    container = group["template"]["spec"]["containers"][0].get("resources") or {}
    for part in ("requests", "limits"):
        for kind, value in (container.get(part) or {}).items():
            field = f"{place}.template.spec.containers.0.resources.{part}.{dotted([kind])}"
            amount = _quantity(value)
            if amount is None:
                yield f"{field}: must be a quantity of Kubernetes' (2, 500m, 8Gi), got {value!r}"
            elif kind.endswith("/gpu") and amount != int(amount):
                yield f"{field}: GPUs are whole, got {value!r}"
    for name in ("num-cpus", "num-gpus"):
        value = (group.get("rayStartParams") or {}).get(name, "0")
        if not re.fullmatch(r"[0-9]{1,9}", str(value)):
            yield f'{place}.rayStartParams.{name}: `ray start` takes a whole number ("4"), got {value!r}'


def _room(file: ClusterFile, shape: "TrainConfig | None") -> Iterator[str]:
    """A trial must fit on the cluster when all its nodes are there."""
    nodes = node_types(file)
    if shape is None or nodes is None:
        return
    from tfkd_ray.config import KIND

    need = {kind: amount for kind, amount in shape.worker_resources.items()
            if kind in ("CPU", "GPU") or (file.kind == "ray" and not kind.startswith(KIND))}  # fmt: skip
    most = file.tree.get("max_workers", 2) if file.kind == "ray" else None
    fits = {n.name: int(min((n.resources.get(k, 0) // v for k, v in need.items()), default=1)) for n in nodes}
    wanted = f"{KIND}{shape.accelerator_type}"
    if shape.accelerator_type and not any(may_have(file, node, wanted) for node in nodes):
        kinds = sorted({kind.removeprefix(KIND) for n in nodes for kind in n.resources if kind.startswith(KIND)})
        said = ", ".join(kinds) or "none"
        place = "rayStartParams.resources" if file.kind == "kuberay" else "resources"
        yield (
            f"accelerator_type: no node type is said to have {shape.accelerator_type} (said is {said})"
            f", and an autoscaler starts what the file says; if one has it, add to its {place}: '{wanted}': 1"
        )
        return
    if shape.accelerator_type:
        fits = {node.name: fits[node.name] if may_have(file, node, wanted) else 0 for node in nodes}
    if most is None:
        room = sum(fits[n.name] * n.most for n in nodes)
    else:  # the biggest nodes first, and no more than max_workers of them in all
        head = file.tree["head_node_type"]
        room, left = fits[head], most
        for node in sorted((n for n in nodes if n.name != head), key=lambda n: -fits[n.name]):
            room, left = room + fits[node.name] * min(node.most, left), left - min(node.most, left)
    if room < shape.workers:
        asked = " and ".join(f"{amount:g} {kind}" for kind, amount in need.items())
        yield (
            f"workers: a trial needs {shape.workers} x {asked}, each on one node, and with all its nodes the cluster "
            f"has room for {room} of them; use fewer or smaller workers, or larger or more nodes"
        )


def may_have(file: ClusterFile, node: NodeType, wanted: str) -> bool:
    """Whether nodes of a type may have a kind of GPU.

    Ray finds the kind when it starts on a node, so one that is there from the start may have any. To start one for a
    trial, the autoscaler must know it before: from the file; on AWS Ray asks for it, if the file says none.
    """
    if not node.resources.get("GPU"):
        return False
    from tfkd_ray.config import KIND

    if any(kind.startswith(KIND) for kind in node.resources):
        return wanted in node.resources
    return file.provider in ("aws", "slurm") or node.least == node.most


# --- Ray's own files -------------------------------------------------------------------------------------------


def _ray_rules(file: ClusterFile) -> Iterator[str]:
    found = list(_ray_schema(file))
    yield from found
    if found:  # what follows takes the file's shape for granted
        return
    for rule in (
        _name,
        _provider,
        _nodes,
        _starts,
        _token_copied,
        _copied,
        _open_to_the_world,
        _machine_image,
        _versions,
    ):
        yield from rule(file)


def _ray_schema(file: ClusterFile) -> Iterator[str]:
    """What Ray itself would say: its schema, then its own preparation and validation."""
    import ray.autoscaler

    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    found = list(_schema_problems(file.tree, schema))
    provider, name = file.tree["provider"], file.provider
    if name not in PROVIDERS:
        found.append(f"provider.type: no such provider {name!r}; {did_you_mean(name, PROVIDERS)}")
    for key in ("head_ip", "external_head_ip", "coordinator_address", "region"):
        if not isinstance(provider.get(key, ""), str):
            found.append(f"provider.{key}: must be text, got {provider[key]!r}")
    hosts = provider.get("worker_ips") or []
    if not isinstance(hosts, list) or not all(isinstance(host, str) for host in hosts):
        found.append(f"provider.worker_ips: must be a list of addresses, got {hosts!r}")
    if name == "local":
        if "coordinator_address" in provider:
            found.append("provider.coordinator_address: tfkd does not ask coordinators; name head_ip and worker_ips")
        else:
            found += [f"provider.{k}: required, and not given" for k in ("head_ip", "worker_ips") if k not in provider]
        if "available_node_types" in file.tree:
            found.append("available_node_types: not for provider local, where head_ip and worker_ips are the nodes")
    elif name in PROVIDERS:
        for key in ("available_node_types", "head_node_type"):
            if key not in file.tree:
                found.append(f"{key}: required, and not given")
        types = file.tree.get("available_node_types")
        head = file.tree.get("head_node_type")
        if isinstance(types, dict) and head is not None and head not in list(types):
            found.append(f"head_node_type: no such node type {head!r}; {did_you_mean(str(head), types)}")
    yield from found
    if not found:
        yield from _ray_validation(file.tree)


def _ray_validation(tree: dict[str, Any]) -> Iterator[str]:
    from ray.autoscaler._private.util import prepare_config, validate_config

    logging.getLogger("ray").setLevel(logging.ERROR)
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            validate_config(prepare_config(json.loads(json.dumps(tree))))
    except (SystemExit, Exception) as error:  # Ray's own has no common class
        if "sum of `min_workers`" not in str(error):  # which is told better below
            yield f"(Ray): {str(error).splitlines()[0] if str(error) else said.getvalue().strip()}"


def _name(file: ClusterFile) -> Iterator[str]:
    """The name becomes part of the names and labels of machines, and of files."""
    name = file.tree["cluster_name"]
    allowed, said = r"[A-Za-z0-9][A-Za-z0-9_-]{0,62}", "letters, digits, - and _"
    if file.provider == "gcp":
        allowed, said = r"[a-z][a-z0-9_-]{0,62}", "small letters, digits, - and _, a letter first"
    if not re.fullmatch(allowed, name):
        yield f"cluster_name: must be of {said}, at most 63, got {name!r}"


def _copied(file: ClusterFile) -> Iterator[str]:
    """What is copied to the nodes must be here; the token is made when the cluster starts."""
    for there, here in (file.tree.get("file_mounts") or {}).items():
        if not isinstance(here, str) or not here:
            yield f"file_mounts.{there}: must be a path on this machine, got {here!r}"
        elif not str(there).endswith("auth_token") and not Path(here).expanduser().exists():
            yield f"file_mounts.{there}: {here} is not there (looked from {Path.cwd()})"


def _provider(file: ClusterFile) -> Iterator[str]:
    """Ray's schema takes any key in `provider`."""
    known = PROVIDERS[file.provider] | {"type"}
    for key in sorted(set(file.tree["provider"]) - known):
        yield f"{dotted(['provider', key])}: Ray reads no such setting for {file.provider}; {did_you_mean(key, known)}"


def _nodes(file: ClusterFile) -> Iterator[str]:
    """Least and most nodes must agree."""
    types = file.tree.get("available_node_types") or {}
    most = file.tree.get("max_workers", 2)
    for name, node in types.items():
        low, high = node.get("min_workers", 0), node.get("max_workers", most)
        if low > high:
            field = dotted(["available_node_types", name])
            yield f"{field}: min_workers must not be above max_workers, got {low} and {high}"
    if (low := sum(node.get("min_workers", 0) for node in types.values())) > most:
        yield f"max_workers: must be at least the sum of all min_workers, {low}, got {most}"
    if (
        types
        and most > 0
        and not any(n.get("max_workers", most) for t, n in types.items() if t != file.tree["head_node_type"])
    ):
        yield "available_node_types: no node type but the head's may start; give one a max_workers above 0"
    hosts = file.tree["provider"].get("worker_ips") or []
    if hosts and len(set(hosts)) < len(hosts):
        yield f"provider.worker_ips: an address is given twice, in {hosts}"
    if file.tree["provider"].get("head_ip") in hosts:
        yield f"provider.worker_ips: the head, {file.tree['provider']['head_ip']}, is a node already; leave it out"
    if hosts and not re.search(r"RAY_enable_autoscaler_v2=[\"']?(0|false)", file.head):
        yield (
            "head_start_ray_commands: with the autoscaler that is Ray's default, one of worker_ips never starts; "
            "set RAY_enable_autoscaler_v2=0 before `ray start`"
        )


def _starts(file: ClusterFile) -> Iterator[str]:
    """How Ray is started: with a token, its dashboard on loopback, the driver's resource on the head."""
    for field in ["head_start_ray_commands", *([] if file.here else ["worker_start_ray_commands"])]:
        lines = [str(line) for line in file.tree.get(field) or [] if re.search(r"\bray start\b", str(line))]
        if not lines:
            yield f"{field}: required, with a `ray start`; Ray's own starts without a token, and may open the dashboard"
            continue
        for line in lines:
            if not re.search(r"RAY_AUTH_MODE=[\"']?token\b", line.partition("ray start")[0]):
                yield f"{field}: no token; put before `ray start`, in the same line: export RAY_AUTH_MODE=token;"
            host = option(line, "dashboard-host")
            if host is not None and host not in LOOPBACK:
                yield (
                    f"{field}: --dashboard-host={host} lets others than this node run code on it; use 127.0.0.1, and "
                    f"reach it by: ray dashboard {file.path}"
                )
    for field, commands in (("head_start_ray_commands", file.head), ("worker_start_ray_commands", file.workers)):
        place = option(commands, "temp-dir")
        if place is not None and len(place) > 40:
            yield f"{field}: --temp-dir={place} is too long for the names of Ray's sockets; use at most 40 characters"
    if file.here and option(file.head, "temp-dir") in (None, "/tmp/ray"):
        yield (
            "head_start_ray_commands: --temp-dir: required, and not /tmp/ray: `down` ends the processes that have it "
            "in their command line; add: --temp-dir=/tmp/tfkd-local"
        )
    if re.search(r"RAY_AUTH_TOKEN=", file.text):
        yield "RAY_AUTH_TOKEN: a token does not belong in a file; put it in ~/.ray/auth_token, and that in file_mounts"
    types = file.tree.get("available_node_types") or {}
    resources = types.get(file.tree.get("head_node_type"), {}).get("resources") or {}
    given = re.search(r"--resources[=\s]+(['\"])(.*?)\1(?=\s|;|$)", file.head, re.M)
    if not resources.get(DRIVER) and (given is None or not re.search(rf"{DRIVER}\\?\"\s*:\s*[1-9]", given[2])):
        yield (
            f"head_start_ray_commands: the head lacks the resource '{DRIVER}', which trials of several workers need; "
            f"add to its `ray start`: --resources='{{\"{DRIVER}\": 1000}}'"
        )


def _token_copied(file: ClusterFile) -> Iterator[str]:
    """Every node must know the token."""
    mounts = file.tree.get("file_mounts") or {}
    if not file.here and not any(str(there).endswith("auth_token") for there in mounts):
        yield "file_mounts: the nodes do not get the token; add: ~/.ray/auth_token: ~/.ray/auth_token"


def _open_to_the_world(file: ClusterFile) -> Iterator[str]:
    """No port may be open to everybody."""
    provider, types = file.tree["provider"], file.tree.get("available_node_types") or {}
    rules = json.dumps(provider.get("security_group") or {})
    if "0.0.0.0/0" in rules or "::/0" in rules:
        yield "provider.security_group: opens a port to the whole world; name your own network's addresses instead"
    inside = provider.get("use_internal_ips") is True
    if file.provider == "azure" and not inside:
        yield "provider.use_internal_ips: must be true: the security group that Ray makes opens port 22 to the world"
    for name, node in types.items():
        config = node.get("node_config") or {}
        if file.provider == "aws" and not inside and not config.get("SecurityGroupIds"):
            yield (
                f"available_node_types.{name}.node_config.SecurityGroupIds: required: the security group that Ray "
                "would make opens port 22 to the world; see clusters/aws-gpu.yaml for one of your own"
            )
        if file.provider == "gcp" and not inside and not config.get("networkInterfaces"):
            yield (
                f"available_node_types.{name}.node_config.networkInterfaces: required: the default network opens port "
                "22 to the world; see clusters/gcp-gpu.yaml for one of your own"
            )


def _versions(file: ClusterFile) -> Iterator[str]:
    """Head and workers must have the same Ray, Python and torch, said exactly; and Ray that of this machine."""
    if file.here:
        return
    docker = file.tree.get("docker") or {}
    shared = [*(file.tree.get("initialization_commands") or []), *(file.tree.get("setup_commands") or [])]
    types = file.tree.get("available_node_types") or {}
    image = docker.get("image", "")
    more = [line for t in types.values() for line in t.get("worker_setup_commands") or []]
    own = [t["docker"]["worker_image"] for t in types.values() if "worker_image" in t.get("docker", {})]
    roles = {
        "head": [docker.get("head_image", image), *shared, *(file.tree.get("head_setup_commands") or [])],
        "workers": [
            docker.get("worker_image", image),
            *own,
            *shared,
            *(file.tree.get("worker_setup_commands") or []),
            *more,
        ],
    }
    found = {role: versions_in(map(str, texts)) for role, texts in roles.items()}
    for what in ("ray", "torch", "python"):
        for role, versions in found.items():
            if len(versions[what]) > 1:
                yield f"{role}: more than one version of {what}, {' and '.join(sorted(versions[what]))}; keep one"
            if not versions[what]:
                yield f"{role}: no exact version of {what} in image or setup_commands; pin it, as clusters/ does"
        head, workers = found["head"][what], found["workers"][what]
        if len(head) == len(workers) == 1 and head != workers:
            yield f"{what}: {min(head)} on the head and {min(workers)} on the workers; use the same on all nodes"
    if all(versions["ray"] for versions in found.values()):
        installed = importlib.metadata.version("ray")
        if found["head"]["ray"] != {installed}:
            yield f"ray: {min(found['head']['ray'])} on the cluster and {installed} here; `ray up` needs one for both"
    for text in {str(line) for texts in roles.values() for line in texts}:
        if found_tag := re.fullmatch(r"[\w./-]+(?::(latest|nightly)[\w.-]*)?", text.strip()):
            yield f"docker: the image {text!r} is {found_tag[1] or 'without a tag'}: it changes by itself; name one"
        if loose := re.search(r"pip install[^;&|]*?\s['\"]?(ray(?:\[[^\]]*\])?|torch)['\"]?(\s|$)", text):
            yield f"setup_commands: {loose[1]} without a version; pin it: {loose[1]}==VERSION"


def versions_in(texts: Iterable[str]) -> dict[str, set[str]]:
    """Exact versions of Ray, torch and Python that images and shell commands name."""
    found: dict[str, set[str]] = {"ray": set(), "torch": set(), "python": set()}
    for text in texts:
        found["ray"] |= set(re.findall(r"\bray(?:\[[^\]]*\])?==([\w.]+)", text))
        found["ray"] |= set(re.findall(r"rayproject/ray(?:-ml)?:(\d[\d.]*\d)", text))
        found["ray"] |= set(re.findall(r":[\w.-]*-ray(\d[\d.]*\d)", text))
        found["torch"] |= set(re.findall(r"\btorch==([\w.+]+)", text))
        found["python"] |= set(re.findall(r"\bpython(3\.\d+)\b", text))
        found["python"] |= {f"3.{minor}" for minor in re.findall(r":[\w.-]*-py3(\d+)", text)}
    return found


def _machine_image(file: ClusterFile) -> Iterator[str]:
    """What a machine on AWS starts from must be said; Ray's own choice is of Ubuntu 18.04 and of some regions only."""
    for name, node in (file.tree.get("available_node_types") or {}).items():
        if file.provider == "aws" and not (node.get("node_config") or {}).get("ImageId"):
            yield (
                f"available_node_types.{name}.node_config.ImageId: required: Ray's own choice is an image of Ubuntu "
                "18.04, and there is none for some regions; clusters/aws-gpu.yaml says how to find one"
            )


# --- KubeRay ---------------------------------------------------------------------------------------------------


@functools.cache
def _kuberay_schema() -> dict[str, Any]:
    schema, pod = (
        json.loads(Path(__file__).with_name(f"{name}-schema.json").read_text())
        for name in ("kuberay", "kubernetes-pod")
    )
    return {**schema, "definitions": {**schema["definitions"], **pod["definitions"]}}


def _groups(file: ClusterFile) -> list[tuple[str, dict[str, Any]]]:
    """(place in the file, group of pods), the head first."""
    at = "spec.rayClusterSpec" if file.tree["kind"] == "RayJob" else "spec"
    workers = file.cluster.get("workerGroupSpecs") or []
    return [
        (f"{at}.headGroupSpec", file.cluster["headGroupSpec"]),
        *((f"{at}.workerGroupSpecs.{i}", group) for i, group in enumerate(workers)),
    ]


def _kuberay_rules(file: ClusterFile) -> Iterator[str]:
    found = list(_schema_problems(file.tree, _kuberay_schema()))
    yield from found
    if found:
        return
    if not file.cluster:
        yield "spec.rayClusterSpec: required, and not given"
        return
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,48}[a-z0-9])?", file.name):
        yield (
            "metadata.name: must be of small letters, digits and -, with a letter first and no - at the end, at "
            f"most 50, got {file.name!r}"
        )
    groups = _groups(file)
    at = groups[0][0].removesuffix(".headGroupSpec")
    mode = (file.cluster.get("authOptions") or {}).get("mode", "token" if "authOptions" in file.cluster else None)
    if mode != "token":
        yield f"{at}.authOptions.mode: must be token, got {mode!r}; without it, whoever reaches a pod runs code on it"
    if re.search(r"name:\s*[\"']?RAY_AUTH_TOKEN[\"']?\s*,\s*value:", file.text):
        yield "RAY_AUTH_TOKEN: a token does not belong in a file; authOptions makes a secret of it"
    yield from _kuberay_ports(file, *groups[0])
    version = file.cluster.get("rayVersion")
    if version is None:
        yield f"{at}.rayVersion: required, and not given"
    images = {place: group["template"]["spec"]["containers"][0]["image"] for place, group in groups}
    for place, image in images.items():
        where = f"{place}.template.spec.containers.0.image"
        if ":" not in image.rpartition("/")[2] or re.search(r":(latest|nightly)", image):
            yield f"{where}: {image!r} changes under you; name a release"
        elif image != images[groups[0][0]]:
            yield f"{where}: {image!r}, and the head has {images[groups[0][0]]!r}; use the same on all pods"
        elif (named := versions_in([image])["ray"]) and version is not None and named != {version}:
            yield f"{where}: Ray {min(named)}, and rayVersion is {version}; make them equal"
    resources = (groups[0][1].get("rayStartParams") or {}).get("resources", "")
    if not re.search(rf"{DRIVER}\\?\"\s*:\s*[1-9]", resources):
        wanted = f'resources: \'"{{\\"{DRIVER}\\": 1000}}"\''
        yield f"{groups[0][0]}.rayStartParams: the head lacks the resource '{DRIVER}', which trials of several workers need; add: {wanted}"  # noqa: E501
    for place, group in groups:
        yield from _amount_problems(place, group)
    for place, group in groups[1:]:
        low, high = group.get("minReplicas", 0), group.get("maxReplicas", 2**31 - 1)
        if low > high:
            yield f"{place}: minReplicas must not be above maxReplicas, got {low} and {high}"
        if not low <= group.get("replicas", low) <= high:
            yield f"{place}.replicas: must be from {low} to {high}, got {group['replicas']}"
    if file.tree["kind"] == "RayJob":
        if not file.tree["spec"].get("entrypoint"):
            yield "spec.entrypoint: required, and not given"
        if not file.tree["spec"].get("shutdownAfterJobFinishes"):
            yield "spec.shutdownAfterJobFinishes: must be true, or the cluster costs money after its job has ended"


def _kuberay_ports(file: ClusterFile, place: str, head: dict[str, Any]) -> Iterator[str]:
    """Nothing leaves the Kubernetes cluster, and the dashboard is on loopback or behind a NetworkPolicy."""
    if head.get("serviceType", "ClusterIP") != "ClusterIP":
        yield f"{place}.serviceType: {head['serviceType']} opens Ray's ports outside of Kubernetes; use ClusterIP"
    if head.get("enableIngress"):
        yield f"{place}.enableIngress: opens the dashboard outside of Kubernetes; use kubectl port-forward"
    host = (head.get("rayStartParams") or {}).get("dashboard-host")
    labels = (head["template"].get("metadata") or {}).get("labels") or {}
    guarded = any(
        d.get("kind") == "NetworkPolicy"
        and isinstance(d.get("spec"), dict)
        and "Ingress" in (d["spec"].get("policyTypes") or [])
        and (d["spec"].get("podSelector") or {}).get("matchLabels", {}).items() <= labels.items()
        for d in file.others
    )
    if host not in LOOPBACK and not guarded:
        said = "KubeRay's default, 0.0.0.0," if host is None else host
        yield f"{place}.rayStartParams.dashboard-host: {said} lets every pod reach the dashboard; use 127.0.0.1, or add a NetworkPolicy for the head's pod"  # noqa: E501


# --- Slurm -----------------------------------------------------------------------------------------------------


def _slurm_rules(file: ClusterFile) -> Iterator[str]:
    text = "\n".join(line for line in file.text.splitlines() if not line.startswith("# "))
    start = re.search(r"\bray (symmetric-run|start)\b", text)
    if start is None:
        yield "ray symmetric-run: not there; the script must start Ray on all nodes, as clusters/slurm.sh does"
        return
    if not re.search(r"RAY_AUTH_MODE=[\"']?token\b", text[: start.start()]):
        yield "RAY_AUTH_MODE: no token; put before Ray starts: export RAY_AUTH_MODE=token"
    if re.search(r"RAY_AUTH_TOKEN=", text):
        yield "RAY_AUTH_TOKEN: a token does not belong in a file; put it in ~/.ray/auth_token"
    found = versions_in(text.splitlines())
    for what in ("ray", "torch"):
        if len(found[what]) != 1:
            got = " and ".join(sorted(found[what])) or "none"
            yield f"{what}: name one exact version, and let the script look for it, as clusters/slurm.sh does; got {got}"  # noqa: E501
    host = option(text, "dashboard-host")
    if host is not None and host not in LOOPBACK:
        yield f"--dashboard-host: {host} lets others run code on the node; use 127.0.0.1"
    if not re.search(rf"--resources[=\s].*{DRIVER}\\?\"\s*:\s*[1-9]", text):
        yield f"--resources: the head lacks '{DRIVER}', which trials of several workers need; add: --resources='{{\"{DRIVER}\": 1000}}'"  # noqa: E501
    if start[1] == "symmetric-run":
        if not re.search(r"^#SBATCH\s+--exclusive", text, re.M):
            yield "#SBATCH --exclusive: required, and not given; when it ends, `ray symmetric-run` ends all of your Ray on its nodes"  # noqa: E501
        if "--min-nodes" not in text:
            yield "--min-nodes: required, and not given; the sweep would begin before all nodes are there"
    if not re.search(r"^#SBATCH\s+(--nodes|-N)", text, re.M):
        yield "#SBATCH --nodes: required, and not given"
    if not re.search(r"^#SBATCH\s+(--time|-t)", text, re.M):
        yield "#SBATCH --time: required, and not given; a sweep that hangs would hold its nodes for as long as Slurm allows"  # noqa: E501
