"""Check of a cluster file: the rules of its kind, then nodes, storage and room for trials."""

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from tfkd_ray.settings.errors import ConfigError
from tfkd_ray.store.storage import is_url, storage_at

if TYPE_CHECKING:
    from tfkd_ray.learn.config import TrainConfig
from tfkd_ray.launch.clusterfile import ClusterFile, NodeType
from tfkd_ray.launch.kuberay_rules import kuberay_problems, pod_groups, pod_kinds, volume_problems
from tfkd_ray.launch.ray_rules import NODE_LOCAL, mount_problems, ray_problems
from tfkd_ray.launch.slurm_rules import sbatch_lines, slurm_problems
from tfkd_ray.learn.config import DRIVER, KIND


def check(file: ClusterFile, shape: "TrainConfig | None" = None) -> list[str]:
    """Return facts about a valid file, in lines; raise ConfigError with all problems.

    Args:
        file: the result of `load_cluster`.
        shape: a trial that the cluster must have room for.
    """
    rules = {"ray": ray_problems, "kuberay": kuberay_problems, "slurm": slurm_problems}[file.kind]
    problems = list(rules(file)) or [*_storage(file), *_room(file, shape)]
    if problems:
        raise ConfigError(problems, file.path)
    lines = [f"{file.name}: {_kind_in_words(file)}", f"experiments go to {file.storage}"]
    nodes = node_types(file)
    if nodes is None:
        lines.append(
            "Ray finds the CPUs and GPUs of its nodes when it starts, so room for a trial is not checked here"
        )
    for node in nodes or []:
        has = ", ".join(_amounts(node)) or "no CPUs"
        lines.append(f"  {node.name}: {node.least} to {node.most} nodes, each with {has}")
    if left := placeholders(file):
        lines.append(f"to change before `tfkd cluster up`: {', '.join(left)}")
    return lines


def _amounts(node: "NodeType") -> Iterator[str]:
    """Yield what a node has, one phrase each."""

    for kind, amount in node.resources.items():
        if kind != DRIVER:
            yield kind.removeprefix(KIND) if kind.startswith(KIND) else f"{amount:g} {kind}"


PLACEHOLDER = re.compile(
    r"\b(?:ami|fs|sg|subnet)-0123456789abcdef0\b|\b0{8}(?:-0{4}){3}-0{12}\b|\bmy-project\b|\bmystorage\.file\b"
    r"|\bregistry\.example\.com\b"
)
"""Placeholders in the shipped files, to be replaced by the user's values."""


def placeholders(file: ClusterFile) -> list[str]:
    """Return the placeholders of the shipped file that still stand in this file."""
    code = "\n".join(line for line in file.text.splitlines() if not line.lstrip().startswith("#"))
    return list(dict.fromkeys(PLACEHOLDER.findall(code)))


def _kind_in_words(file: ClusterFile) -> str:
    if file.here:
        return "this machine, as a cluster of Ray's"
    words = {
        "local": "machines of your own, by ssh",
        "kuberay": "Kubernetes, by KubeRay",
        "slurm": "a Slurm job",
    }
    return words.get(file.provider, f"Ray's own cluster launcher on {file.provider}")


def _storage(file: ClusterFile) -> Iterator[str]:
    """Yield problems with the storage: all nodes must see it."""
    field = {"ray": "metadata.tfkd.storage", "kuberay": "metadata.annotations.tfkd/storage"}.get(
        file.kind, "TFKD_RESULTS"
    )
    if file.storage is None:
        yield (
            f"{field}: required, and not given; name a directory that all nodes can reach, such as "
            "/mnt/shared/tfkd_results"
        )
        return
    if is_url(file.storage):
        try:
            storage_at(file.storage)
        except ConfigError as error:
            yield from (
                f"{field}: {problem.removeprefix('storage: ')}" for problem in error.problems
            )
        return
    if file.here:
        return
    if file.kind == "slurm":
        if (
            re.match(r"/(tmp|dev/shm|var/tmp|local)(/|$)", file.storage)
            or "$TMPDIR" in file.storage
        ):
            yield _local_to_a_node(field, file.storage)
    elif NODE_LOCAL.match(file.storage):
        yield _local_to_a_node(field, file.storage)
    elif file.kind == "kuberay":
        yield from volume_problems(file, field)
    elif file.provider != "local":
        yield from mount_problems(file, field)


def _local_to_a_node(field: str, value: str) -> str:
    return (
        f"{field}: {value} is local to each node, so a trial that moves would not find its checkpoint; name a "
        "directory that all nodes can reach"
    )


def node_types(file: ClusterFile) -> list[NodeType] | None:
    """Return the file's types of nodes; None if Ray finds them at start."""
    if file.kind == "kuberay":
        return [pod_kinds(place, group) for place, group in pod_groups(file)]
    if file.kind == "slurm":
        nodes = sbatch_lines(file, "nodes") or 1
        has = {
            "CPU": sbatch_lines(file, "cpus-per-task"),
            "GPU": sbatch_lines(file, "gpus-per-node"),
        }
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


def _room(file: ClusterFile, shape: "TrainConfig | None") -> Iterator[str]:
    """Yield problems with the room for a trial on the complete cluster."""
    nodes = node_types(file)
    if shape is None or nodes is None:
        return

    need = {kind: amount for kind, amount in shape.worker_resources.items()
            if kind in ("CPU", "GPU") or (file.kind == "ray" and not kind.startswith(KIND))}  # fmt: skip
    fits = {
        n.name: int(min((n.resources.get(k, 0) // v for k, v in need.items()), default=1))
        for n in nodes
    }
    wanted = f"{KIND}{shape.accelerator_type}"
    if shape.accelerator_type and not any(may_have(file, node, wanted) for node in nodes):
        yield _no_such_gpu(file, nodes, shape.accelerator_type)
        return
    if shape.accelerator_type:
        fits = {node.name: fits[node.name] if may_have(file, node, wanted) else 0 for node in nodes}
    room = _most_workers(file, nodes, fits)
    if room < shape.workers:
        asked = " and ".join(f"{amount:g} {kind}" for kind, amount in need.items())
        yield (
            f"workers: a trial needs {shape.workers} x {asked}, each on one node, and with all its nodes the cluster "
            f"has room for {room} of them; use fewer or smaller workers, or larger or more nodes"
        )


def _no_such_gpu(file: ClusterFile, nodes: Sequence[NodeType], gpu: str) -> str:

    kinds = {kind for node in nodes for kind in node.resources if kind.startswith(KIND)}
    said = ", ".join(sorted(kind.removeprefix(KIND) for kind in kinds)) or "none"
    place = "rayStartParams.resources" if file.kind == "kuberay" else "resources"
    return (
        f"accelerator_type: no node type declares {gpu} (declared: {said})"
        f", and an autoscaler starts only declared kinds; if one has it, add to its {place}: '{KIND}{gpu}': 1"
    )


def _most_workers(file: ClusterFile, nodes: Sequence[NodeType], fits: dict[str, int]) -> int:
    """Return how many workers have room on the complete cluster; `fits`: on a node of each type."""
    if file.kind != "ray":
        return sum(fits[node.name] * node.most for node in nodes)
    head, left = file.tree["head_node_type"], file.tree.get("max_workers", 2)
    room = fits[head]
    others = [node for node in nodes if node.name != head]
    for node in sorted(others, key=lambda node: -fits[node.name]):  # the largest first
        count = min(node.most, left)
        room, left = room + fits[node.name] * count, left - count
    return room


def may_have(file: ClusterFile, node: NodeType, wanted: str) -> bool:
    """Return True if nodes of a type may have a kind of GPU.

    Ray detects the kind when it starts on a node, so a node that runs from the start may have any.
    The autoscaler must know it before it starts a node for a trial: from the file, or, on AWS, from
    Ray's query if the file gives none.
    """
    if not node.resources.get("GPU"):
        return False

    if any(kind.startswith(KIND) for kind in node.resources):
        return wanted in node.resources
    return file.provider in ("aws", "slurm") or node.least == node.most
