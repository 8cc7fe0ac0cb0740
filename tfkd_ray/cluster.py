"""The Ray cluster a sweep runs on: connect to it, and refuse at once what it can never run."""

import importlib.metadata
import logging
import os
import socket
from pathlib import Path
from typing import Any

import ray
from packaging.requirements import Requirement
from ray.tune import PlacementGroupFactory

from tfkd_ray.auth import own_token, token, token_file
from tfkd_ray.clusterfile import DRIVER as DRIVER
from tfkd_ray.config import TrainConfig
from tfkd_ray.experiment import ctrl_c_waits
from tfkd_ray.schema import ConfigError

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
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": True}
    if address is None:
        own_token()  # Ray turns token authentication on by itself for a new local cluster, if RAY_AUTH_MODE is not set
        with ctrl_c_waits():
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
    path = Path(trial.config["trial"]["directory"]) / OUT_OF_MEMORY
    if path.exists():
        neighbours = max(1, int(1 / float(path.read_text()) + 1e-6) // 2)
        bundle = {**trial.placement_group_factory.required_resources, "GPU": 1 / neighbours}
        trial.update_resources(PlacementGroupFactory([bundle]))
        path.unlink()


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
        raise ConfigError(
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


def check_room(config: TrainConfig) -> int:
    """How many trials of this shape the cluster has room for at once; a ConfigError if not even one."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    need = {kind: float(amount) for kind, amount in
            {"CPU": config.cpus_per_worker, "GPU": config.gpus_per_worker}.items() if amount}  # fmt: skip
    room = sum(int(min(node.get(kind, 0) // amount for kind, amount in need.items())) for node in nodes)
    problems = []
    if room < config.workers:
        shape = " and ".join(f"{amount:g} {kind}" for kind, amount in need.items())
        there = " and ".join(f"{sum(node.get(kind, 0) for node in nodes):g} {kind}" for kind in need)
        problems.append(
            f"workers: a trial needs {config.workers} x {shape}, each on one node, and the cluster has room "
            f"for {room} of them ({len(nodes)} nodes, {there}); use fewer or smaller workers, or a larger cluster"
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
    return room // config.workers
