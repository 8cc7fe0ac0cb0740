"""Rules for KubeRay's files."""

import functools
import json
import math
import re
from pathlib import Path

from tfkd_ray.launch.clusterfile import (
    LOOPBACK,
    ClusterFile,
    NodeType,
    amount_problems,
    below,
    quantity,
    schema_problems,
    versions_in,
)
from tfkd_ray.learn.config import DRIVER
from tfkd_ray.settings.errors import Sentences
from tfkd_ray.settings.yaml import Tree


def volume_problems(file: ClusterFile, field: str) -> Sentences:
    """Yield pods that mount no shared volume at the storage."""
    assert file.storage is not None, f"{file.path=}"
    for place, group in pod_groups(file):
        pod = group["template"]["spec"]
        volumes = {v["name"]: v for v in pod.get("volumes") or []}
        mounts = [m for m in pod["containers"][0].get("volumeMounts") or []
                  if f"{file.storage}/".startswith(m["mountPath"].rstrip("/") + "/")]  # fmt: skip
        kinds = {kind for m in mounts for kind in volumes.get(m["name"], {}) if kind != "name"}
        if not kinds & {"persistentVolumeClaim", "nfs", "csi"}:
            what = f"only {', '.join(sorted(kinds))}" if kinds else "no volume"
            yield (
                f"{place}.template.spec: {field} is {file.storage}, but {what} is mounted there; mount a claim of "
                "ReadWriteMany (persistentVolumeClaim) or nfs"
            )


def pod_kinds(place: str, group: Tree) -> NodeType:
    container = group["template"]["spec"]["containers"][0]
    limits = {
        **container.get("resources", {}).get("requests", {}),
        **container.get("resources", {}).get("limits", {}),
    }
    started = below(group, "rayStartParams")
    cpus = started.get(
        "num-cpus", math.ceil(quantity(limits.get("cpu", 0)) or 0)
    )  # rounded as KubeRay does
    gpus = started.get("num-gpus", next((v for k, v in limits.items() if k.endswith("/gpu")), 0))
    kinds = re.findall(r"(accelerator_type:[\w-]+)", str(started.get("resources", "")))
    has = {"CPU": quantity(cpus) or 0.0, "GPU": quantity(gpus) or 0.0, **dict.fromkeys(kinds, 1.0)}
    head = place.endswith("headGroupSpec")
    hosts = group.get("numOfHosts", 1)
    least, most = (
        (1, 1)
        if head
        else (group.get("minReplicas", 0) * hosts, group.get("maxReplicas", 2**31 - 1) * hosts)
    )
    return NodeType(
        "head" if head else group["groupName"], least, most, {k: v for k, v in has.items() if v}
    )


# --- KubeRay --------------------------------------------------------------------------------------


@functools.cache
def _kuberay_schema() -> Tree:
    schema, pod = (
        json.loads(Path(__file__).with_name(f"{name}-schema.json").read_text())
        for name in ("kuberay", "kubernetes-pod")
    )
    return {**schema, "definitions": {**schema["definitions"], **pod["definitions"]}}


def pod_groups(file: ClusterFile) -> list[tuple[str, Tree]]:
    """Return (place in the file, group of pods) for each group, the head first."""
    at = "spec.rayClusterSpec" if file.tree["kind"] == "RayJob" else "spec"
    workers = file.cluster.get("workerGroupSpecs") or []
    return [
        (f"{at}.headGroupSpec", file.cluster["headGroupSpec"]),
        *((f"{at}.workerGroupSpecs.{i}", group) for i, group in enumerate(workers)),
    ]


def kuberay_problems(file: ClusterFile) -> Sentences:
    found = list(schema_problems(file.tree, _kuberay_schema()))
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
    groups = pod_groups(file)
    at = groups[0][0].removesuffix(".headGroupSpec")
    mode = below(file.cluster, "authOptions").get(
        "mode", "token" if "authOptions" in file.cluster else None
    )
    if mode != "token":
        yield (
            f"{at}.authOptions.mode: must be token, got {mode!r}; without it, anyone who can reach a pod can run code "
            "on it"
        )
    if re.search(r"name:\s*[\"']?RAY_AUTH_TOKEN[\"']?\s*,\s*value:", file.text):
        yield "RAY_AUTH_TOKEN: a token does not belong in a file; authOptions creates a secret for it"
    yield from _kuberay_ports(file, *groups[0])
    yield from _image_problems(file, groups)
    resources = below(groups[0][1], "rayStartParams").get("resources", "")
    if not re.search(rf"{DRIVER}\\?\"\s*:\s*[1-9]", resources):
        wanted = f'resources: \'"{{\\"{DRIVER}\\": 1000}}"\''
        yield f"{groups[0][0]}.rayStartParams: the head lacks the resource '{DRIVER}', which trials of several workers need; add: {wanted}"  # noqa: E501
    for place, group in groups:
        yield from amount_problems(place, group)
    yield from _replica_problems(groups[1:])
    if file.tree["kind"] == "RayJob":
        yield from _rayjob_problems(file.tree["spec"])


def _image_problems(file: ClusterFile, groups: list[tuple[str, Tree]]) -> Sentences:
    """Yield images that are not one release of Ray, the same on all pods."""
    at = groups[0][0].removesuffix(".headGroupSpec")
    version = file.cluster.get("rayVersion")
    if version is None:
        yield f"{at}.rayVersion: required, and not given"
    images = {place: group["template"]["spec"]["containers"][0]["image"] for place, group in groups}
    for place, image in images.items():
        where = f"{place}.template.spec.containers.0.image"
        if ":" not in image.rpartition("/")[2] or re.search(r":(latest|nightly)", image):
            yield f"{where}: {image!r} changes over time; name a release"
        elif image != images[groups[0][0]]:
            yield f"{where}: {image!r}, and the head has {images[groups[0][0]]!r}; use the same on all pods"
        elif (named := versions_in([image])["ray"]) and version is not None and named != {version}:
            yield f"{where}: Ray {min(named)}, and rayVersion is {version}; make them equal"


def _replica_problems(groups: list[tuple[str, Tree]]) -> Sentences:
    """Yield numbers of pods that contradict each other."""
    for place, group in groups:
        low, high = group.get("minReplicas", 0), group.get("maxReplicas", 2**31 - 1)
        if low > high:
            yield f"{place}: minReplicas must not be above maxReplicas, got {low} and {high}"
        if not low <= group.get("replicas", low) <= high:
            yield f"{place}.replicas: must be from {low} to {high}, got {group['replicas']}"


def _rayjob_problems(spec: Tree) -> Sentences:
    """Yield what a RayJob lacks to run and to end."""
    if not spec.get("entrypoint"):
        yield "spec.entrypoint: required, and not given"
    if not spec.get("shutdownAfterJobFinishes"):
        yield "spec.shutdownAfterJobFinishes: must be true, or the cluster costs money after its job has ended"


def _kuberay_ports(file: ClusterFile, place: str, head: Tree) -> Sentences:
    """Yield open ports: only loopback or a NetworkPolicy may give access to the dashboard."""
    if head.get("serviceType", "ClusterIP") != "ClusterIP":
        yield f"{place}.serviceType: {head['serviceType']} opens Ray's ports outside of Kubernetes; use ClusterIP"
    if head.get("enableIngress"):
        yield f"{place}.enableIngress: opens the dashboard outside of Kubernetes; use kubectl port-forward"
    host = below(head, "rayStartParams").get("dashboard-host")
    labels = below(head["template"], "metadata").get("labels") or {}
    guarded = any(
        d.get("kind") == "NetworkPolicy"
        and isinstance(d.get("spec"), dict)
        and "Ingress" in (d["spec"].get("policyTypes") or [])
        and below(d["spec"], "podSelector").get("matchLabels", {}).items() <= labels.items()
        for d in file.others
    )
    if host not in LOOPBACK and not guarded:
        said = "KubeRay's default, 0.0.0.0," if host is None else host
        yield (
            f"{place}.rayStartParams.dashboard-host: {said} lets every pod reach the dashboard; use 127.0.0.1, or add "
            "a NetworkPolicy for the head's pod"
        )
