"""The Ray cluster a sweep runs on: connect to it, and refuse at once what it can never run."""

import contextlib
import importlib.metadata
import logging
import os
import socket
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from packaging.requirements import Requirement
from ray.job_config import JobConfig
from ray.tune import PlacementGroupFactory
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from tfkd_ray import remote
from tfkd_ray.auth import own_token, token, token_file
from tfkd_ray.clusterfile import DRIVER as DRIVER
from tfkd_ray.config import KIND, RAYS_OWN, TrainConfig
from tfkd_ray.experiment import ctrl_c_waits
from tfkd_ray.own_code import before_the_library, safe_path
from tfkd_ray.schema import ConfigError, Unreachable

AUTOSCALER_S = 15
"""How long an autoscaler may take to say whether it can start nodes for a trial; it looks every 5 s."""
TIMEOUT_S = 10
"""How long a head may take to answer at all; one that answers and refuses the token takes Ray half a minute."""


def check_ray() -> None:
    """Raise where Ray is there without `ray[default]`: a stopped trial of several workers would hang then."""
    missing = []
    for text in importlib.metadata.requires("ray") or []:
        requirement = Requirement(text)
        needed = requirement.marker is not None and requirement.marker.evaluate({"extra": "default"})
        if needed and not requirement.marker.evaluate({"extra": ""}):  # type: ignore[union-attr]
            try:
                importlib.metadata.version(requirement.name)
            except importlib.metadata.PackageNotFoundError:
                missing.append(requirement.name)
    if missing:
        raise ConfigError(
            f"Ray is installed without its 'default' extra ({', '.join(sorted(set(missing)))} missing): a "
            "stopped trial can then block the sweep for ever; run: pip install 'ray[default,train,tune]'"
        )


def connect(address: str | None = None, *, workers: int = 1) -> bool:
    """Connect to a Ray cluster, or start one here; whether one was started.

    An existing connection is used as it is. Otherwise `address`, then RAY_ADDRESS, say which cluster; with neither, a
    new one starts on this machine, with token authentication, and ends with this process. For trials of several
    `workers` it has a dashboard, on loopback: Ray's clean-up after a killed trial asks there who is alive.
    """
    check_ray()
    if ray.is_initialized():
        return False
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    address = address or os.environ.get("RAY_ADDRESS") or None
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": True}
    quiet["job_config"] = _PathAsHere()
    if address is None:
        own_token()  # Ray turns token authentication on by itself for a new local cluster, if RAY_AUTH_MODE is not set
        with ctrl_c_waits(), safe_path():
            ray.init(address="local", resources={DRIVER: 1000}, include_dashboard=workers > 1, **quiet)
        _started.append(ray.get_runtime_context().gcs_address)
        return True
    if address != "auto":
        _check_answers(address)
    try:
        ray.init(address=address, **quiet)
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise ConfigError(_cannot_join(address, str(error).strip() or type(error).__name__)) from None
    return False


class _PathAsHere(JobConfig):  # type: ignore[misc]
    """Lets workers find modules where this process does, in the same order.

    Ray would put the working directory first on their path, so that they run whatever is called `torch.py` there. Where
    a job has a `working_dir`, Ray puts its copy first, and adds nothing.
    """

    def _serialize(self) -> Any:
        if not self._runtime_env_has_working_dir():
            self._py_driver_sys_path = before_the_library()
            self._cached_pb = None
        return super()._serialize()


def keep_keys_at_home() -> None:
    """Let Tune not copy this process's AWS keys into its trials' environments, which Ray logs and its dashboard shows.

    A node has keys of its own: by its role, or by the environment that Ray was started with there.
    """
    from ray.tune.execution import class_cache

    keys = [name for name in class_cache.ENV_VARS_TO_PROPAGATE if name.startswith("AWS_")]
    class_cache.ENV_VARS_TO_PROPAGATE.difference_update(keys)


OUT_OF_MEMORY = "out_of_memory"
"""File in a trial's folder: the share of a GPU whose memory was not enough for it."""


def give_larger_share(trial: Any) -> None:
    """Let a failed trial that shares a GPU have half as many neighbours, if memory was what it lacked.

    Args:
        trial: Ray Tune's, which has ended with an error and is not pending again yet.
    """
    path = remote.bring(Path(trial.config["trial"]["directory"]) / OUT_OF_MEMORY)
    if path.exists():
        neighbours = max(1, int(1 / float(path.read_text()) + 1e-6) // 2)
        bundle = {**trial.placement_group_factory.required_resources, "GPU": 1 / neighbours}
        trial.update_resources(PlacementGroupFactory([bundle]))
        trial.max_failures += trial.max_failures >= 0  # it was not lost
        path.unlink()
        remote.send(path)


_started: list[str] = []


def started_here() -> bool:
    """Whether this process has started the cluster that it is connected to, so that it is this machine alone."""
    return ray.get_runtime_context().gcs_address in _started


def _check_answers(address: str) -> None:
    """Raise where nothing listens at HOST:PORT; Ray would take minutes to say so."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise ConfigError(f"--address (or RAY_ADDRESS): auto, HOST:PORT or http://HOST:PORT (a job), got {address!r}")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=TIMEOUT_S).close()
    except (OSError, OverflowError) as error:
        raise Unreachable(
            f"no Ray head answers at {address} within {TIMEOUT_S} s ({error}); is it up, and is this machine one of "
            "its nodes? From elsewhere, submit a job: --cluster FILE, or --address http://127.0.0.1:8265 and a tunnel"
        ) from None


def _cannot_join(address: str, reason: str) -> str:
    """Why Ray could not join a cluster that is there."""
    first = f"cannot join the Ray cluster at {address}: {reason.splitlines()[0]}"
    if token() is None or os.environ.get("RAY_AUTH_MODE") != "token":
        return f"{first}; there is no token here ({token_file()}), which the cluster may want: copy its own, mode 600"
    if "Failed to connect" in reason or "uthenticat" in reason:
        return f"{first}; it answers, so the token here ({token_file()}, or RAY_AUTH_TOKEN) is probably not its own"
    if "raylet" in reason or "node_ip_address" in reason or "local node" in reason:
        return (
            f"{first}; this machine is no node of it: submit a job instead, with --address http://... or --cluster FILE"
        )
    return first


def _state_api_answers() -> bool:
    """Whether Ray can be asked which actors live; its clean-up after a lost trial depends on it."""
    from ray.util.state import list_nodes
    from ray.util.state.exception import RayStateApiException

    try:
        list_nodes(address=ray.get_runtime_context().gcs_address, limit=1, timeout=10)
    except (RayStateApiException, ConnectionError, ValueError):
        return False
    return True


def _amount(kind: str, amount: float) -> str:
    """An amount of a resource, for a person."""
    return f"a GPU of kind {kind.removeprefix(KIND)}" if kind.startswith(KIND) else f"{amount:g} {kind}"


def _absent(config: TrainConfig, nodes: list[dict[str, float]]) -> Iterator[str]:
    """What no node has any of, beside CPUs and GPUs."""
    there = {kind for node in nodes for kind, amount in node.items() if amount}
    kinds = sorted(kind.partition(":")[2] for kind in there if kind.startswith(KIND))
    own = sorted(kind for kind in there if kind not in (*RAYS_OWN, DRIVER) and ":" not in kind)
    for kind in set(config.worker_resources) - there - {"CPU", "GPU"}:
        if kind.startswith(KIND):
            yield f"accelerator_type: no node has {config.accelerator_type}; they have {', '.join(kinds) or 'none'}"
        else:
            yield f"resources.{kind}: no node has it; they have {', '.join(own) or 'none'} (ray start --resources=...)"


def _nodes() -> list[dict[str, float]]:
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _workers_on(node: dict[str, float], need: dict[str, float]) -> int:
    return int(min(node.get(kind, 0) / amount + 1e-9 for kind, amount in need.items()))


def room_for(config: TrainConfig) -> int:
    """How many trials of this shape the nodes that are there have room for at once."""
    return sum(_workers_on(node, config.worker_resources) for node in _nodes()) // config.workers


def check_room(config: TrainConfig) -> int:
    """How many trials of this shape the cluster has room for at once; a ConfigError if not even one."""
    nodes, need = _nodes(), config.worker_resources
    room = sum(_workers_on(node, need) for node in nodes)
    problems = []
    if room < config.workers and not grows_for(config, 1):
        problems += list(_absent(config, nodes))
        shape = " and ".join(_amount(kind, amount) for kind, amount in need.items())
        kinds = [kind for kind in need if not kind.startswith(KIND)]
        there = " and ".join(f"{sum(node.get(kind, 0) for node in nodes):g} {kind}" for kind in kinds)
        problems.append(
            f"workers: a trial needs {config.workers} x {shape}, each on one node, and the cluster has room "
            f"for {room} of them ({len(nodes)} nodes, {there}); use fewer or smaller workers, or a larger cluster"
            + ("" if started_here() else "; no autoscaler starts nodes for it")
        )
    if config.workers > 1 and sum(node.get(DRIVER, 0) for node in nodes) < 0.01:
        problems.append(
            f"workers: trials of several workers need the resource '{DRIVER}' on the cluster, and it has none; "
            f"start its head with: ray start --head --resources='{{\"{DRIVER}\": 1000}}'"
        )
    if config.workers > 1 and not _state_api_answers():
        problems.append(
            "workers: trials of several workers need Ray's State API, and this cluster's does not answer: without it a "
            "killed trial keeps its CPUs for ever; start Ray with its dashboard (include_dashboard=True)"
        )
    if problems:
        raise ConfigError(problems, "this cluster")
    return max(1, room // config.workers)


def grows_for(config: TrainConfig, trials: int) -> bool:
    """Whether nodes are started for so many trials at once. Asked by a placement group that is removed again."""
    if started_here() or not any(node.ray_node_type_name for node in _status().cluster_resource_state.node_states):
        return False  # nobody has started its nodes by their types
    group = placement_group([config.worker_resources] * config.workers * trials, strategy=config.placement.upper())
    try:
        begun = None
        until = time.monotonic() + AUTOSCALER_S
        while time.monotonic() < until:
            time.sleep(0.5)
            state = _status().autoscaling_state
            version = state.last_seen_cluster_resource_state_version
            begun = version if begun is None else begun
            if any(_is_of(gang, config) for gang in state.infeasible_gang_resource_requests):
                return False
            if version > begun and (state.pending_instance_requests or state.pending_instances):
                return True
            if group.wait(0):
                return True
        return False
    finally:
        remove_placement_group(group)


def _is_of(gang: Any, config: TrainConfig) -> bool:
    return any(dict(r.resources_bundle) == config.worker_resources for r in gang.requests)


def _status() -> Any:
    """What the head knows of nodes and autoscaler; an empty answer where it gives none."""
    from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply

    reply = GetClusterStatusReply()
    with contextlib.suppress(ray.exceptions.RayError):
        gcs = ray._raylet.GcsClient(ray.get_runtime_context().gcs_address)
        reply.ParseFromString(gcs.get_cluster_status(timeout_s=TIMEOUT_S))
    return reply


def starting() -> list[str]:
    """Nodes that the autoscaler is starting, or could not, a phrase for each type; empty: none."""
    if not ray.is_initialized() or started_here():
        return []
    state = _status().autoscaling_state
    found = [f"{request.count} {request.ray_node_type_name} asked for" for request in state.pending_instance_requests]
    kinds = Counter(node.ray_node_type_name for node in state.pending_instances)
    found += [f"{count} {name} starting" for name, count in kinds.items()]
    found += [f"{r.count} {r.ray_node_type_name} refused ({r.reason or 'no reason given'})"
              for r in state.failed_instance_requests]  # fmt: skip
    return found


# --- what Ray does not say by a public name: for `tfkd doctor` ---------------------------------------------------


def other_clusters(ours: str | None) -> set[str]:
    """Addresses of the Ray clusters that have a node on this machine, but for ours."""
    from ray._private.services import find_gcs_addresses

    find_gcs_addresses.cache_clear()
    found = set(find_gcs_addresses())
    port = (ours or "").rpartition(":")[2]
    mine = {*(node["NodeManagerAddress"] for node in ray.nodes()), "127.0.0.1"} if ours else set()
    return {a for a in found if not (a.rpartition(":")[2] == port and a.rpartition(":")[0] in mine)}


def temp_dir() -> str:
    """Where a Ray that starts here would keep its sockets."""
    from ray._common.utils import get_default_ray_temp_dir

    return str(get_default_ray_temp_dir())


def dashboard() -> str | None:
    """HOST:PORT of the cluster's dashboard."""
    from ray._private.worker import get_dashboard_url

    return get_dashboard_url() or None


@dataclass(frozen=True)
class LeakedGroup:
    """A placement group of a job that has ended."""

    id: str
    bundles: tuple[dict[str, float], ...]


def leaked_groups() -> list[LeakedGroup] | None:
    """Placement groups that no running job has made; None where Ray's State API does not answer."""
    from ray.util.state import list_jobs, list_placement_groups
    from ray.util.state.exception import RayStateApiException

    options = {"address": ray.get_runtime_context().gcs_address, "limit": 10_000, "timeout": TIMEOUT_S}
    try:
        running = {job.job_id for job in list_jobs(**options) if job.status in ("PENDING", "RUNNING")}
        groups = list_placement_groups(detail=True, **options)
    except (RayStateApiException, ConnectionError, ValueError):
        return None
    return [
        LeakedGroup(g.placement_group_id, tuple(b.get("unit_resources", {}) for b in g.bundles or []))
        for g in groups
        if g.state != "REMOVED" and g.creator_job_id not in running
    ]


def remove_group(group_id: str) -> None:
    """Remove a placement group by its id."""
    remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(group_id))))
