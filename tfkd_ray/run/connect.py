"""The Ray cluster of a sweep: connect to it, and refuse early the trials that it can never run."""

import importlib.metadata
import inspect
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from packaging.requirements import Requirement
from ray.job_config import JobConfig
from ray.tune import PlacementGroupFactory
from ray.tune.error import _TuneStopTrialError
from ray.tune.experiment import Trial
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from tfkd_ray.learn.config import DRIVER as DRIVER
from tfkd_ray.learn.config import KIND, RAYS_OWN, TrainConfig
from tfkd_ray.run.auth import own_token, token, token_file
from tfkd_ray.settings.errors import ConfigError, Say, Sentences, Unreachable
from tfkd_ray.settings.files import opened, read_at_most, write_text
from tfkd_ray.settings.own_code import before_the_library, safe_path
from tfkd_ray.settings.passwords import shown
from tfkd_ray.settings.yaml import Numbers
from tfkd_ray.store.assignment import SECTION, assigned
from tfkd_ray.store.experiment import damaged, parse_json, read_text

AUTOSCALER_S = 15
"""Maximum time until an autoscaler says whether it can start nodes; it polls every 5 s."""
MOST_ADDRESS_BYTES = 2**12
"""Largest part that is read of the file in which Ray notes the address of its last cluster."""
CONNECT_TIMEOUT_S = 10
"""Maximum time for a head to answer; if it refuses the token, Ray takes half a minute."""


def check_ray() -> None:
    """Raise if Ray lacks `ray[default]`: a stopped trial of several workers would hang."""
    missing = []
    for text in importlib.metadata.requires("ray") or []:
        requirement = Requirement(text)
        needed = requirement.marker is not None and requirement.marker.evaluate(
            {"extra": "default"}
        )
        if needed and not requirement.marker.evaluate({"extra": ""}):  # type: ignore[union-attr]
            try:
                importlib.metadata.version(requirement.name)
            except importlib.metadata.PackageNotFoundError:
                missing.append(requirement.name)
    if missing:
        raise ConfigError(
            f"Ray is installed without its 'default' extra ({', '.join(sorted(set(missing)))} missing): without it, a "
            "stopped trial can block the sweep for ever; run: pip install 'ray[default,train,tune]'"
        )


def connect(address: str | None = None, *, workers: int = 1) -> bool:
    """Connect to a Ray cluster, or start one here; return True if one was started.

    An existing connection is used unchanged. Otherwise `address`, then RAY_ADDRESS, name the
    cluster; with neither, a new cluster starts on this machine, with token authentication, and ends
    with this process. For trials of several `workers` it has a dashboard on loopback: Ray's
    clean-up after a killed trial asks it which actors are alive.
    """
    check_ray()
    if ray.is_initialized():
        if not started_here():
            _check_speaks_alike(ray.get_runtime_context().gcs_address)
        return False
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    address = address or os.environ.get("RAY_ADDRESS") or None
    quiet: dict[str, Any] = {
        "log_to_driver": False,
        "logging_level": logging.ERROR,
        "configure_logging": True,
    }
    quiet["job_config"] = _PathAsHere()
    if address is None:
        own_token()
        _set_token_mode("token")
        try:
            with ctrl_c_waits(), safe_path(), _own_sigterm():
                ray.init(
                    address="local",
                    resources={DRIVER: 1000},
                    include_dashboard=workers > 1,
                    **quiet,
                )
        except Exception as error:  # a bare one if a node does not start within 30 s
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise Unreachable(
                f"Ray did not start on this machine: {reason}; its logs are in {ray_temp_dir()}/session_latest/logs; "
                "if the machine was busy, try again"
            ) from None
        _started.append(ray.get_runtime_context().gcs_address)
        return True
    address = _found_here() if address == "auto" else address
    _check_answers(address)
    _join_with_token_or_without(address)
    try:
        with _own_sigterm():
            ray.init(address=address, **quiet)
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise ConfigError(
            _cannot_join(address, str(error).strip() or type(error).__name__)
        ) from None
    return False


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """Keep this program's SIGTERM handler: Ray's own, during its start, exits without a message."""
    utils = ray._private.utils
    rays = utils.set_sigterm_handler
    if callable(signal.getsignal(signal.SIGTERM)):
        utils.set_sigterm_handler = lambda handler: None
    try:
        yield
    finally:
        utils.set_sigterm_handler = rays


class _PathAsHere(JobConfig):  # type: ignore[misc]
    """Gives workers this process's module search path, in the same order.

    Otherwise Ray puts the working directory first, so that workers would import any `torch.py`
    there. If a job has a `working_dir`, Ray puts its copy first, and this class adds nothing.
    """

    def _serialize(self) -> Any:
        if not self._runtime_env_has_working_dir():
            self._py_driver_sys_path = before_the_library()
            self._cached_pb = None
        return super()._serialize()


def keep_keys_at_home() -> None:
    """Prevent Tune from copying this process's AWS keys into trials: Ray logs them and shows them.

    A node has its own keys, from its role or from the environment in which Ray was started.
    """
    from ray.tune.execution import class_cache

    keys = [name for name in class_cache.ENV_VARS_TO_PROPAGATE if name.startswith("AWS_")]
    class_cache.ENV_VARS_TO_PROPAGATE.difference_update(keys)


OUT_OF_MEMORY = "out_of_memory"
"""File in a trial's folder: the share of a GPU whose memory was not enough for it."""


_least_share = 0.0
"""Share of a GPU that trials of this process's sweep get at least: a smaller one was not enough."""


def give_larger_share(trial: Any) -> None:
    """Halve the number of trials that share a GPU with a failed trial if it ran out of memory.

    All later trials of the sweep get this share, too; see `enlarged`. Those that Tune has queued
    already keep theirs: Tune finds them by it.

    Args:
        trial: a trial of Ray Tune that has ended with an error and is not pending again yet.
    """
    global _least_share
    share = short_share(trial) if _goes_on(trial) else None
    if share is None:
        return
    neighbours = max(1, int(1 / share + 1e-6) // 2)
    _least_share = max(_least_share, 1 / neighbours)
    trial.update_resources(enlarged(trial.placement_group_factory))
    trial.max_failures += trial.max_failures >= 0  # do not count this as a loss


def _goes_on(trial: Any) -> bool:
    """Return whether Tune restarts a failed trial; it leaves one without failures left RUNNING."""
    return bool(trial.status != Trial.RUNNING)


def enlarged(request: PlacementGroupFactory) -> PlacementGroupFactory:
    """Return a request with at least the share of a GPU that trials of this sweep need."""
    share = request.required_resources.get("GPU", 0)
    if not 0 < share < _least_share:
        return request
    bundle = {**request.required_resources, "GPU": _least_share}
    return PlacementGroupFactory([bundle])


def short_share(trial: Any) -> float | None:
    """Return the GPU share that was too small for a failed trial, once; None otherwise."""
    share = _left_by(trial, OUT_OF_MEMORY)
    if share is None:
        return None
    storage, folder = assigned(trial).place
    path = folder / OUT_OF_MEMORY
    path.unlink()
    storage.send(path)
    return float(share)


BROKEN_GPU = "broken_gpu.json"
"""File in a trial's folder: the node (`node`: id, `host`) with a broken GPU, and the `reason`."""

_shunned: set[str] = set()
"""Ids of the nodes that get no more trials of this process's sweep."""


def shun(node: str) -> None:
    """Exclude a node from all trials that are not placed yet."""
    _shunned.add(node)


def forget_lessons() -> None:
    """Forget excluded nodes and shares of GPUs at the start of a sweep.

    A node may have been repaired, and another sweep may need less memory.
    """
    global _least_share
    _shunned.clear()
    _least_share = 0.0


def label_selectors(avoid: Iterable[str], bundles: int) -> dict[str, Any]:
    """Return label selectors that keep placement groups off these nodes; empty for none."""
    nodes = sorted(avoid)
    if not nodes:
        return {}
    others = f"!in({','.join(nodes)})" if len(nodes) > 1 else f"!{nodes[0]}"
    return {"bundle_label_selector": [{"ray.io/node-id": others}] * bundles}


def shunning(request: PlacementGroupFactory, more: str | None = None) -> PlacementGroupFactory:
    """Return the request without the excluded nodes, and without `more` while others exist."""
    there = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
    avoid = _shunned | ({more} if more is not None and there - _shunned - {more} else set())
    return PlacementGroupFactory(
        request.bundles, request.strategy, **label_selectors(avoid, len(request.bundles))
    )


def found_broken(trial: Any) -> dict[str, str] | None:
    """Return what a failed trial reported about a broken GPU, or None."""
    broken = _left_by(trial, BROKEN_GPU)
    return None if broken is None else dict(broken)


def _left_by(trial: Any, name: str) -> Any:
    """Return the JSON content of a file that a trial left in its folder, or None."""
    storage, folder = assigned(trial).place
    path = storage.bring(folder / name)
    if not os.path.lexists(path):
        return None
    with damaged(path):
        return parse_json(read_text(path))


def send_elsewhere(trial: Any) -> None:
    """Restart a lost trial off the excluded nodes and the one whose GPU failed it, if possible."""
    broken = found_broken(trial)
    if _goes_on(trial) and (broken is not None or _shunned):
        avoid = sorted(_shunned | ({broken["node"]} if broken else set()))
        trial.config[SECTION] = replace(assigned(trial), avoid=tuple(avoid)).section()
        trial.update_resources(
            shunning(trial.placement_group_factory, broken["node"] if broken else None)
        )


def on_this_node() -> NodeAffinitySchedulingStrategy:
    """Return the strategy that places an actor beside this process, and not on a node that may go."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)


def object_store_here() -> int:
    """Return the size in bytes of the object store of this process's node."""
    here = ray.get_runtime_context().get_node_id()
    found = [node["Resources"] for node in ray.nodes() if node["NodeID"] == here]
    return int(found[0].get("object_store_memory", 0)) if found else 0


def skip_snapshots(tune_controller: Any) -> None:
    """Let Ray write an empty snapshot of an experiment.

    Ray has no setting for that, and needs the file to return a `ResultGrid`. The controller that a
    scheduler gets wraps the real one.
    """
    controller: Any = getattr(tune_controller, "_tune_controller", None)

    def save_to_dir() -> None:
        write_text(Path(controller.experiment_state_path), json.dumps({"trial_data": []}))

    if controller is not None:
        controller.save_to_dir = save_to_dir


def report_each_epoch(trial: Any) -> None:
    """Let a lost trial report every epoch at once: losses in the same epoch are counted."""
    assignment = assigned(trial)
    epochs = tuple(range(1, assignment.epochs + 1))
    trial.config[SECTION] = replace(assignment, judged=epochs).section()


_started: list[str] = []


def started_here() -> bool:
    """Return True if this process started its cluster, which then is this machine alone."""
    return ray.get_runtime_context().gcs_address in _started


def _check_answers(address: str) -> None:
    """Raise if nothing listens at HOST:PORT; Ray would take minutes to report it."""
    host, _, port = address.rpartition(":")
    if not host or "@" in host or "://" in address or not port.isdecimal():
        got = shown(address)
        instead = {
            "ray": "; that is Ray's client: name the port of `ray start` instead (6379)",
            "http": "; only --address takes it, and submits a job",
        }
        raise ConfigError(
            f"--address (or RAY_ADDRESS): auto, HOST:PORT or http://HOST:PORT (a job), got {got!r}"
            f"{instead.get(address.partition('://')[0], '')}"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT_S).close()
    except (OSError, OverflowError, UnicodeError) as error:  # the last: no name of a host
        raise Unreachable(
            f"no Ray head answers at {address} within {CONNECT_TIMEOUT_S} s ({error}); check that it is up and that "
            "this machine is one of its nodes. From another machine, submit a job: --cluster FILE, or --address "
            "http://127.0.0.1:8265 and a tunnel"
        ) from None


def _found_here() -> str:
    """Return the address that `auto` means: a local cluster, or the last that Ray noted."""
    from ray._private.services import find_gcs_addresses, get_ray_address_from_environment
    from ray._private.utils import get_ray_address_file

    find_gcs_addresses.cache_clear()
    _check_address_file(Path(get_ray_address_file(None)))
    given = os.environ.pop("RAY_ADDRESS", None)  # otherwise Ray would use it for `auto`
    try:
        address = str(get_ray_address_from_environment("auto", None))
    except ConnectionError:
        raise Unreachable(
            "--address auto (or RAY_ADDRESS): no Ray cluster runs on this machine; start one with `ray start --head`, "
            "name another one's HOST:PORT, or leave it out, and one is started here for as long as the sweep runs"
        ) from None
    finally:
        if given is not None:
            os.environ["RAY_ADDRESS"] = given
    if address not in find_gcs_addresses():
        try:
            _check_answers(address)
        except ConfigError as error:
            file = get_ray_address_file(None)
            why = "; ".join(error.problems).partition("; is it up")[0]
            raise Unreachable(
                f"{why}; `auto` found that address in {file}, which a cluster that has ended has left: delete the "
                "file, or name the cluster: --address HOST:PORT"
            ) from None
    return address


def _check_address_file(file: Path) -> None:
    """Raise if Ray could not read the address that its last cluster has noted, or would wait."""
    try:
        with opened(file) as noted:
            read_at_most(noted, MOST_ADDRESS_BYTES).decode()
    except FileNotFoundError:
        return
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no text"
        raise Unreachable(
            f"--address auto (or RAY_ADDRESS): {file}, where Ray notes its last cluster, cannot be read: {why}; "
            "delete it, set RAY_TMPDIR, or name the cluster: --address HOST:PORT"
        ) from None


# --- token authentication -------------------------------------------------------------------------

_chosen: set[str] = set()
"""Values of RAY_AUTH_MODE that this module set, as opposed to the user."""


def _set_token_mode(mode: str | None) -> None:
    """Enable or disable the token in this process and its children, unless the user has set it.

    Ray reads the mode at import and the token at first use: both are reloaded.
    """
    from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

    if _mode_given() is None:
        if mode is None:
            os.environ.pop("RAY_AUTH_MODE", None)
        else:
            os.environ["RAY_AUTH_MODE"] = mode
            _chosen.add(mode)
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


def _uses_tls() -> bool:
    return os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true")


def _mode_given() -> str | None:
    """Return RAY_AUTH_MODE if the user has set it."""
    mode = os.environ.get("RAY_AUTH_MODE")
    return None if mode is None or mode in _chosen else mode.lower()


def _join_with_token_or_without(address: str) -> None:
    """Set the token mode that the head at HOST:PORT wants; raise ConfigError if impossible."""
    given = _mode_given()
    if _uses_tls():  # never ask without TLS
        _set_token_mode("token" if token() is not None else None)
    elif _lets_in(address):
        if given == "token":
            raise ConfigError(_open_head(address))
        _set_token_mode(None)
    elif (ours := token()) is None:
        raise ConfigError(
            f"cannot join the Ray cluster at {address}: it requires a token, and there is no token here "
            f"({token_file()}): copy the cluster's token to that path, mode 600, or set RAY_AUTH_TOKEN"
        )
    elif given not in (None, "token"):
        raise ConfigError(
            f"cannot join the Ray cluster at {address}: it requires its token, and RAY_AUTH_MODE={given} here sends "
            "none; unset RAY_AUTH_MODE"
        )
    elif not _lets_in(address, ours):
        raise ConfigError(
            f"cannot join the Ray cluster at {address}: it answers, so the token here ({token_file()}, or "
            "RAY_AUTH_TOKEN) is another cluster's: copy the right one, mode 600"
        )
    else:
        _set_token_mode("token")


def _check_speaks_alike(address: str) -> None:
    """Raise if the user's connection sends a token to a cluster without: it could not answer."""
    from ray._raylet import AuthenticationMode, get_authentication_mode  # type: ignore[attr-defined]

    if (
        not _uses_tls()
        and get_authentication_mode() == AuthenticationMode.TOKEN
        and _lets_in(address)
    ):
        raise ConfigError(_open_head(address))


def _open_head(address: str) -> str:
    return (
        f"the Ray cluster at {address} runs without authentication, and this process with (RAY_AUTH_MODE=token), so "
        "its trials could not answer; restart the cluster with RAY_AUTH_MODE=token and this machine's token, or, "
        "where nobody else reaches it, unset RAY_AUTH_MODE here"
    )


def _lets_in(address: str, key: str | None = None) -> bool:
    """Return True if the head at HOST:PORT accepts `key` (None: no token); raise if it is no head."""
    import grpc  # type: ignore[import-untyped]

    metadata = None if key is None else [("authorization", f"Bearer {key}")]
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        alive = channel.unary_unary("/ray.rpc.NodeInfoGcsService/CheckAlive")
        try:
            alive(b"", timeout=CONNECT_TIMEOUT_S, metadata=metadata)
        except grpc.RpcError as error:
            if error.code() in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
                return False
            raise Unreachable(
                f"what listens at {address} does not answer as a Ray head does ({error.code().name}); is that the port "
                "of `ray start --head` (6379 unless --port says another), not the dashboard's, and does the head run?"
            ) from None
    return True


def end_children() -> None:
    """Kill all descendants of this process, a Ray that was started here included."""
    import psutil  # a dependency of Ray

    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            process.kill()


HEAD_GONE_S = 30
"""Time without an answer after which a command ends with a sentence; Ray exits silently at 60 s."""


@contextmanager
def head_watched(when_gone: Say) -> Iterator[None]:
    """Call `when_gone` with a sentence, in a thread, when the head of the cluster dies.

    Before that, all processes of a cluster that was started here are killed.
    """
    address, over = str(ray.get_runtime_context().gcs_address), threading.Event()
    ours = started_here()

    def watch() -> None:
        answered = time.monotonic()
        while not over.wait(2):
            try:
                _check_answers(address)
                answered = time.monotonic()
            except Unreachable:
                if time.monotonic() - answered > HEAD_GONE_S and not over.is_set():
                    if ours:
                        end_children()
                    when_gone(
                        f"Ray's head at {address} is gone (its GCS has not answered for {HEAD_GONE_S} s)"
                    )
                    return

    thread = threading.Thread(target=watch, name="head", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()


def _cannot_join(address: str, reason: str) -> str:
    """Return why Ray could not join an existing cluster."""
    first = f"cannot join the Ray cluster at {address}: {reason.splitlines()[0]}"
    if "raylet" in reason or "node_ip_address" in reason or "local node" in reason:
        return (
            f"{first}; this machine is no node of it: submit a job instead, "
            "with --address http://... or --cluster FILE"
        )
    return first


def _state_api_answers() -> bool:
    """Return True if Ray's State API answers; Ray's clean-up after a lost trial depends on it."""
    from ray.util.state import list_nodes
    from ray.util.state.exception import RayStateApiException

    try:
        list_nodes(address=ray.get_runtime_context().gcs_address, limit=1, timeout=10)
    except (RayStateApiException, ConnectionError, ValueError):
        return False
    return True


def _amount(kind: str, amount: float) -> str:
    """Format an amount of a resource for a person."""
    return (
        f"a GPU of kind {kind.removeprefix(KIND)}"
        if kind.startswith(KIND)
        else f"{amount:g} {kind}"
    )


def _absent(config: TrainConfig, nodes: list[Numbers]) -> Sentences:
    """Yield the resources, other than CPUs and GPUs, that no node has."""
    there = {kind for node in nodes for kind, amount in node.items() if amount}
    kinds = sorted(kind.partition(":")[2] for kind in there if kind.startswith(KIND))
    own = sorted(kind for kind in there if kind not in (*RAYS_OWN, DRIVER) and ":" not in kind)
    for kind in set(config.worker_resources) - there - {"CPU", "GPU"}:
        if kind.startswith(KIND):
            yield f"accelerator_type: no node has {config.accelerator_type}; they have {', '.join(kinds) or 'none'}"
        else:
            yield f"resources.{kind}: no node has it; they have {', '.join(own) or 'none'} (ray start --resources=...)"


def _nodes_alive() -> list[Numbers]:
    return [
        node["Resources"]
        for node in ray.nodes()
        if node["Alive"] and node["NodeID"] not in _shunned
    ]


def _workers_on(node: Numbers, need: Numbers) -> int:
    return int(min(node.get(kind, 0) / amount + 1e-9 for kind, amount in need.items()))


def room_for(config: TrainConfig) -> int:
    """Return how many trials of this shape fit on the current nodes at once."""
    return (
        sum(_workers_on(node, config.worker_resources) for node in _nodes_alive()) // config.workers
    )


def check_room(config: TrainConfig) -> int:
    """Return how many trials of this shape fit on the cluster; raise ConfigError if none does."""
    nodes, need = _nodes_alive(), config.worker_resources
    room = sum(_workers_on(node, need) for node in nodes)
    problems = []
    if room < config.workers and not grows_for(config, 1):
        problems += list(_absent(config, nodes))
        shape = " and ".join(_amount(kind, amount) for kind, amount in need.items())
        kinds = [kind for kind in need if not kind.startswith(KIND)]
        there = " and ".join(
            f"{sum(node.get(kind, 0) for node in nodes):g} {kind}" for kind in kinds
        )
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
    """Return True if so many trials would start nodes; asks with a temporary placement group."""
    if started_here() or not any(
        node.ray_node_type_name for node in _cluster_status().cluster_resource_state.node_states
    ):
        return False  # no autoscaler with node types
    group = placement_group(
        [config.worker_resources] * config.workers * trials, strategy=config.placement.upper()
    )
    try:
        begun = None
        until = time.monotonic() + AUTOSCALER_S
        while time.monotonic() < until:
            time.sleep(0.5)
            state = _cluster_status().autoscaling_state
            version = state.last_seen_cluster_resource_state_version
            begun = version if begun is None else begun
            gangs = state.infeasible_gang_resource_requests
            bundles = [dict(r.resources_bundle) for gang in gangs for r in gang.requests]
            if config.worker_resources in bundles:
                return False
            if version > begun and (state.pending_instance_requests or state.pending_instances):
                return True
            if group.wait(0):
                return True
        return False
    finally:
        remove_placement_group(group)


def _cluster_status() -> Any:
    """Return the head's status of nodes and autoscaler; empty if it gives none."""
    from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply

    reply = GetClusterStatusReply()
    with suppress(ray.exceptions.RayError):
        gcs = ray._raylet.GcsClient(ray.get_runtime_context().gcs_address)
        reply.ParseFromString(gcs.get_cluster_status(timeout_s=CONNECT_TIMEOUT_S))
    return reply


def starting() -> list[str]:
    """Return a phrase for each type of node that the autoscaler is starting or failed to start."""
    if not ray.is_initialized() or started_here():
        return []
    state = _cluster_status().autoscaling_state
    found = [
        f"{request.count} {request.ray_node_type_name} requested"
        for request in state.pending_instance_requests
    ]
    kinds = Counter(node.ray_node_type_name for node in state.pending_instances)
    found += [f"{count} {name} starting" for name, count in kinds.items()]
    found += [f"{r.count} {r.ray_node_type_name} refused ({r.reason or 'no reason given'})"
              for r in state.failed_instance_requests]  # fmt: skip
    return found


# --- private parts of Ray, for `tfkd doctor` ------------------------------------------------------


def other_clusters(ours: str | None) -> set[str]:
    """Return addresses of other Ray clusters that have a node on this machine."""
    from ray._private.services import find_gcs_addresses

    find_gcs_addresses.cache_clear()
    found = set(find_gcs_addresses())
    port = (ours or "").rpartition(":")[2]
    mine = {*(node["NodeManagerAddress"] for node in ray.nodes()), "127.0.0.1"} if ours else set()
    return {a for a in found if not (a.rpartition(":")[2] == port and a.rpartition(":")[0] in mine)}


def ray_temp_dir() -> str:
    """Return the directory in which a Ray started here would keep its sockets."""
    from ray._common.utils import get_default_ray_temp_dir

    return str(get_default_ray_temp_dir())


def dashboard() -> str | None:
    """Return HOST:PORT of the cluster's dashboard."""
    from ray._private.worker import get_dashboard_url

    return get_dashboard_url() or None


@dataclass(frozen=True)
class LeakedGroup:
    """A placement group of a job that has ended."""

    id: str
    bundles: tuple[Numbers, ...]


def leaked_groups() -> list[LeakedGroup] | None:
    """Return the placement groups of no running job; None if Ray's State API does not answer."""
    from ray.util.state import list_jobs, list_placement_groups
    from ray.util.state.exception import RayStateApiException

    options = {
        "address": ray.get_runtime_context().gcs_address,
        "limit": 10_000,
        "timeout": CONNECT_TIMEOUT_S,
    }
    try:
        running = {
            job.job_id for job in list_jobs(**options) if job.status in ("PENDING", "RUNNING")
        }
        groups = list_placement_groups(detail=True, **options)
    except (RayStateApiException, ConnectionError, ValueError):
        return None
    return [
        LeakedGroup(
            g.placement_group_id, tuple(b.get("unit_resources", {}) for b in g.bundles or [])
        )
        for g in groups
        if g.state != "REMOVED" and g.creator_job_id not in running
    ]


def remove_group(group_id: str) -> None:
    """Remove a placement group by its id."""
    remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(group_id))))


def caller_argument(function: str, name: str) -> Any:
    """Return an argument of the Ray Tune function that is calling this code, or None.

    Ray 2.60 passes neither the Tuner's metric nor a trial's exception to a searcher.
    """
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_name == function and frame.f_globals.get("__name__", "").startswith(
            "ray.tune."
        ):
            return frame.f_locals.get(name)
        frame = frame.f_back
    return None


def raise_own_error() -> None:
    """Raise the exception of the driver's own code that Tune is about to count as a trial's failure.

    When a trial ends, Ray 2.60 catches what searchers, schedulers and callbacks raise, a lost study
    or a full disk too. It would then run that trial again, or call it failed.
    """
    if isinstance(caller_argument("_process_trial_failure", "exception"), _TuneStopTrialError):
        error = sys.exception()
        assert error is not None
        raise error


@contextmanager
def ctrl_c_waits() -> Iterator[None]:
    """Delay Ctrl-C, and SIGTERM if handled alike, to the end of a block.

    A half-started Ray would crash and leave processes, and an import may swallow the signal.
    """
    pressed: list[int] = []
    numbers = [
        number for number in (signal.SIGINT, signal.SIGTERM) if callable(signal.getsignal(number))
    ]
    if threading.current_thread() is not threading.main_thread() or not numbers:
        yield
        return
    before = {n: signal.signal(n, lambda number, frame: pressed.append(number)) for n in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if pressed:
        signal.raise_signal(pressed[0])
