"""Rules for Ray's own cluster files."""

import contextlib
import importlib.metadata
import io
import json
import logging
import re
from pathlib import Path
from typing import Any

from tfkd_ray.launch.clusterfile import (
    LOOPBACK,
    ClusterFile,
    below,
    copy_problems,
    name_problems,
    option,
    schema_problems,
    versions_in,
)
from tfkd_ray.learn.config import DRIVER
from tfkd_ray.settings.errors import Sentences, did_you_mean, dotted
from tfkd_ray.settings.yaml import Tree

PROVIDERS = {
    "local": {"head_ip", "worker_ips", "external_head_ip", "coordinator_address"},
    "aws": {"region", "availability_zone", "cache_stopped_nodes", "use_internal_ips", "security_group", "key_pair",
            "aws_credentials", "cloudwatch"},
    "gcp": {"region", "availability_zone", "project_id", "use_internal_ips", "gcp_credentials"},
    "azure": {"location", "resource_group", "subscription_id", "subnet_mask", "unique_id", "tags", "availability_zone",
              "use_internal_ips", "use_external_head_ip", "msi_name", "msi_resource_group", "cache_stopped_nodes"},
}  # fmt: skip
"""Keys of `provider` that Ray 2.60 reads, besides `type`; its schema accepts misspelt keys."""

NODE_LOCAL = re.compile(r"^(?!/)|^/(tmp|var|dev|run|root|home|opt|local|scratch|mnt/local)(/|$)")
"""Path prefixes that are usually node-local."""


def mount_problems(file: ClusterFile, field: str) -> Sentences:
    """Yield missing mounts: rented machines share nothing unless the file mounts it."""
    assert file.storage is not None, f"{file.path=}"
    setup = [
        *(file.tree.get("initialization_commands") or []),
        *(file.tree.get("setup_commands") or []),
    ]
    targets = [
        m[1].rstrip("/")
        for line in setup
        for m in re.finditer(r"\bmount\b[^;&|]*\s(/\S+)", str(line))
    ]
    mounted = [t for t in targets if f"{file.storage}/".startswith(f"{t}/")]
    if not mounted:
        there = ", ".join(targets) or "nothing"
        yield (
            f"{field}: {file.storage} is not on a file system that the commands for all nodes mount (they mount "
            f"{there}); mount one there in initialization_commands"
        )
    elif file.tree.get("docker"):
        given = " ".join(map(str, file.tree["docker"].get("run_options") or []))
        if not any(f"-v {t}:{t}" in given or f"--volume {t}:{t}" in given for t in mounted):
            yield f"docker.run_options: {mounted[0]} is not visible in the container; add: -v {mounted[0]}:{mounted[0]}"


# --- Ray's own files ------------------------------------------------------------------------------


def ray_problems(file: ClusterFile) -> Sentences:
    found = list(_ray_schema(file))
    yield from found
    if found:  # the other rules need a file of the right shape
        return
    for rule in (
        name_problems,
        _provider,
        _node_problems,
        _starts,
        _token_copied,
        copy_problems,
        _open_to_the_world,
        _machine_image,
        _versions,
        _nvidia_driver,
    ):
        yield from rule(file)


def _ray_schema(file: ClusterFile) -> Sentences:
    """Yield the errors of Ray itself: its schema, then its preparation and validation."""
    import ray.autoscaler

    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    found = list(schema_problems(file.tree, schema))
    name = file.provider
    if name not in PROVIDERS:
        found.append(f"provider.type: no such provider {name!r}; {did_you_mean(name, PROVIDERS)}")
    found += _other_types(file.tree)
    if name == "local":
        found += _local_problems(file.tree)
    elif name in PROVIDERS:
        found += _node_type_problems(file.tree)
    yield from found
    if not found:
        yield from _ray_validation(file.tree)


def _other_types(tree: Tree) -> Sentences:
    """Yield values of a type that Ray's schema accepts and Ray itself does not."""
    provider, mounts = tree["provider"], tree.get("file_mounts")
    for key in ("head_ip", "external_head_ip", "coordinator_address", "region"):
        if not isinstance(provider.get(key, ""), str):
            yield f"provider.{key}: must be text, got {provider[key]!r}"
    for there, here in mounts.items() if isinstance(mounts, dict) else ():
        if not isinstance(here, str) or not here.strip() or "\0" in here:
            yield f"file_mounts.{there}: must be a path on this machine, got {here!r}"
    hosts = provider.get("worker_ips") or []
    if not isinstance(hosts, list) or not all(isinstance(host, str) for host in hosts):
        yield f"provider.worker_ips: must be a list of addresses, got {hosts!r}"


def _local_problems(tree: Tree) -> Sentences:
    if "coordinator_address" in tree["provider"]:
        yield "provider.coordinator_address: tfkd does not support coordinators; name head_ip and worker_ips"
    else:
        for key in ("head_ip", "worker_ips"):
            if key not in tree["provider"]:
                yield f"provider.{key}: required, and not given"
    if "available_node_types" in tree:
        yield "available_node_types: not for provider local, where head_ip and worker_ips are the nodes"


def _node_type_problems(tree: Tree) -> Sentences:
    for key in ("available_node_types", "head_node_type"):
        if key not in tree:
            yield f"{key}: required, and not given"
    types, head = tree.get("available_node_types"), tree.get("head_node_type")
    if isinstance(types, dict) and head is not None and head not in list(types):
        yield f"head_node_type: no such node type {head!r}; {did_you_mean(str(head), types)}"


def _ray_validation(tree: Tree) -> Sentences:
    from ray.autoscaler._private.util import prepare_config, validate_config

    logging.getLogger("ray").setLevel(logging.ERROR)
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            validate_config(prepare_config(json.loads(json.dumps(tree))))
    except (SystemExit, Exception) as error:  # Ray's errors have no common class
        if "sum of `min_workers`" not in str(error):  # a better message follows below
            yield f"(Ray): {str(error).splitlines()[0] if str(error) else said.getvalue().strip()}"


def _provider(file: ClusterFile) -> Sentences:
    """Yield unknown keys of `provider`, which Ray's schema accepts."""
    known = PROVIDERS[file.provider] | {"type"}
    for key in sorted(set(file.tree["provider"]) - known):
        yield f"{dotted(['provider', key])}: Ray reads no such setting for {file.provider}; {did_you_mean(key, known)}"


def _node_problems(file: ClusterFile) -> Sentences:
    """Yield contradictions between minimum and maximum numbers of nodes."""
    types = below(file.tree, "available_node_types")
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
        and not any(
            n.get("max_workers", most) for t, n in types.items() if t != file.tree["head_node_type"]
        )
    ):
        yield "available_node_types: no node type but the head's may start; give one a max_workers above 0"
    hosts = file.tree["provider"].get("worker_ips") or []
    if hosts and len(set(hosts)) < len(hosts):
        yield f"provider.worker_ips: an address is given twice, in {hosts}"
    if file.tree["provider"].get("head_ip") in hosts:
        yield f"provider.worker_ips: the head, {file.tree['provider']['head_ip']}, is already a node; leave it out"
    if hosts and not re.search(r"RAY_enable_autoscaler_v2=[\"']?(0|false)", file.head):
        yield (
            "head_start_ray_commands: with the autoscaler that is Ray's default, one of worker_ips never starts; "
            "set RAY_enable_autoscaler_v2=0 before `ray start`"
        )


def _starts(file: ClusterFile) -> Sentences:
    """Yield faults of Ray's start: token, dashboard on loopback, the head's driver resource."""
    yield from _start_lines(file, "head_start_ray_commands")
    if not file.here:
        yield from _start_lines(file, "worker_start_ray_commands")
    for field, commands in (
        ("head_start_ray_commands", file.head),
        ("worker_start_ray_commands", file.workers),
    ):
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
    yield from _driver_resource(file)


def _start_lines(file: ClusterFile, field: str) -> Sentences:
    commands = [str(line) for line in file.tree.get(field) or []]
    lines = [line for line in commands if re.search(r"\bray start\b", line)]
    if not lines:
        yield (
            f"{field}: required, with a `ray start`; Ray's default starts without a token, and may expose the dashboard"
        )
    for line in lines:
        if not re.search(r"RAY_AUTH_MODE=[\"']?token\b", line.partition("ray start")[0]):
            yield f"{field}: no token; put before `ray start`, in the same line: export RAY_AUTH_MODE=token;"
        host = option(line, "dashboard-host")
        if host is not None and host not in LOOPBACK:
            yield (
                f"{field}: --dashboard-host={host} lets other machines run code on this node; use 127.0.0.1, and reach "
                f"the dashboard by: ray dashboard {file.path}"
            )


def _driver_resource(file: ClusterFile) -> Sentences:
    types = below(file.tree, "available_node_types")
    resources = below(below(types, str(file.tree.get("head_node_type"))), "resources")
    given = re.search(r"--resources[=\s]+(['\"])(.*?)\1(?=\s|;|$)", file.head, re.M)
    if not resources.get(DRIVER) and (
        given is None or not re.search(rf"{DRIVER}\\?\"\s*:\s*[1-9]", given[2])
    ):
        yield (
            f"head_start_ray_commands: the head lacks the resource '{DRIVER}', which trials of several workers need; "
            f"add to its `ray start`: --resources='{{\"{DRIVER}\": 1000}}'"
        )


def _token_copied(file: ClusterFile) -> Sentences:
    """Yield a problem if not every node gets the token."""
    mounts = below(file.tree, "file_mounts")
    if not file.here and not any(str(there).endswith("auth_token") for there in mounts):
        yield "file_mounts: the nodes do not get the token; add: ~/.ray/auth_token: ~/.ray/auth_token"


def _open_to_the_world(file: ClusterFile) -> Sentences:
    """Yield ports that are open to everyone."""
    provider, types = file.tree["provider"], below(file.tree, "available_node_types")
    rules = json.dumps(below(provider, "security_group"))
    if "0.0.0.0/0" in rules or "::/0" in rules:
        yield "provider.security_group: opens a port to the whole world; name your own network's addresses instead"
    inside = provider.get("use_internal_ips") is True
    if file.provider == "azure" and not inside:
        yield "provider.use_internal_ips: must be true: the security group that Ray makes opens port 22 to the world"
    for name, node in types.items():
        config = below(node, "node_config")
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


def _versions(file: ClusterFile) -> Sentences:
    """Yield versions of Ray, Python and torch that are inexact or different between machines."""
    if file.here:
        return
    texts = _role_texts(file)
    found = {role: versions_in(map(str, lines)) for role, lines in texts.items()}
    for what in ("ray", "torch", "python"):
        yield from _inexact(what, {role: versions[what] for role, versions in found.items()})
    if all(versions["ray"] for versions in found.values()):
        installed = importlib.metadata.version("ray")
        if found["head"]["ray"] != {installed}:
            yield f"ray: {min(found['head']['ray'])} on the cluster and {installed} here; `ray up` needs one for both"
    for text in {str(line) for lines in texts.values() for line in lines}:
        yield from _loose(text)


def _role_texts(file: ClusterFile) -> dict[str, list[Any]]:
    """Return the images and set-up commands of the head and of the workers."""

    def commands(tree: Tree, *keys: str) -> list[Any]:
        return [line for key in keys for line in tree.get(key) or []]

    docker, types = below(file.tree, "docker"), below(file.tree, "available_node_types")
    image = docker.get("image", "")
    heads = [docker.get("head_image", image)]
    heads += commands(file.tree, "initialization_commands", "setup_commands", "head_setup_commands")
    workers = [docker.get("worker_image", image)]
    for node in types.values():
        if "worker_image" in node.get("docker", {}):
            workers.append(node["docker"]["worker_image"])
        workers += commands(node, "worker_setup_commands")
    workers += commands(
        file.tree, "initialization_commands", "setup_commands", "worker_setup_commands"
    )
    return {"head": heads, "workers": workers}


def _inexact(what: str, found: dict[str, set[str]]) -> Sentences:
    """Yield a role that has no version of something, or several, and roles that differ."""
    for role, versions in found.items():
        if len(versions) > 1:
            yield f"{role}: more than one version of {what}, {' and '.join(sorted(versions))}; keep one"
        if not versions:
            yield f"{role}: no exact version of {what} in image or setup_commands; pin it, as clusters/ does"
    head, workers = found["head"], found["workers"]
    if len(head) == len(workers) == 1 and head != workers:
        yield f"{what}: {min(head)} on the head and {min(workers)} on the workers; use the same on all nodes"


def _loose(text: str) -> Sentences:
    """Yield a problem if an image or a command does not say which version it means."""
    if tag := re.fullmatch(r"[\w./-]+(?::(latest|nightly)[\w.-]*)?", text.strip()):
        yield f"docker: the image {text!r} is {tag[1] or 'without a tag'}, which changes over time; name a fixed one"
    pip = r"pip install[^;&|]*?\s['\"]?(ray(?:\[[^\]]*\])?|torch)['\"]?(\s|$)"
    if loose := re.search(pip, text):
        yield f"setup_commands: {loose[1]} without a version; pin it: {loose[1]}==VERSION"


CUDA_DRIVER = 580
"""NVIDIA's oldest driver for CUDA 13, for which torch 2.14 is built."""


def _nvidia_driver(file: ClusterFile) -> Sentences:
    """Yield rented machines with GPUs whose driver is too old, or is not looked at."""
    types = below(file.tree, "available_node_types")
    for name, node in types.items():
        if not below(node, "resources").get("GPU"):
            continue
        image = re.search(r"nvidia-(\d{3})\b", json.dumps(below(node, "node_config")))
        if image and int(image[1]) < CUDA_DRIVER:
            yield (
                f"available_node_types.{name}.node_config: the image has NVIDIA's driver {image[1]}, and torch needs "
                f"{CUDA_DRIVER} or later (CUDA 13); name a newer image"
            )
        own = node.get("initialization_commands", file.tree.get("initialization_commands"))
        if "nvidia-smi" not in "\n".join(map(str, own or [])):
            yield (
                f"available_node_types.{name}: no command waits for NVIDIA's driver, and a node that joins before its "
                "driver is loaded fails each trial; add the line with nvidia-smi of clusters/aws-gpu.yaml to "
                "initialization_commands"
            )


def _machine_image(file: ClusterFile) -> Sentences:
    """Yield AWS machines without an image; Ray's default is Ubuntu 18.04, in few regions."""
    for name, node in below(file.tree, "available_node_types").items():
        if file.provider == "aws" and not below(node, "node_config").get("ImageId"):
            yield (
                f"available_node_types.{name}.node_config.ImageId: required: Ray's own choice is an image of Ubuntu "
                "18.04, and there is none for some regions; clusters/aws-gpu.yaml says how to find one"
            )
