"""A sweep on its own Ray cluster of three nodes, of which one dies; prints the outcome as JSON.

    python tests/sweep_on_nodes.py STORAGE SPACE_AS_JSON [drain]

The head and two more nodes have one CPU each. After the first epoch of any trial, a fourth node
joins; when a trial has reported an epoch on it, or a group could not, signal 9 kills the raylet of
the second node, and the file `slow` beside the storage is removed (see slow.py). With `drain`, the
second node is instead announced to be preempted within 5 s, as spot machines are, as soon as a trial
has reported its second epoch on it. Run by test_cluster_nodes.py.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import ray
from ray import tune
from ray.cluster_utils import Cluster

from tfkd_ray.run.callbacks import spent_so_far
from tfkd_ray.run.connect import DRIVER
from tfkd_ray.run.tune import build_tuner


class Nodes(tune.Callback):  # type: ignore[misc]
    """Adds a node, kills another, and records the node of each epoch."""

    def __init__(
        self, cluster: Cluster, doomed: Any, workers: int, place: Path, *, drain: bool
    ) -> None:
        self.place, self.drain, self.at = place, drain, 0.0
        self.again_s: float | None = None
        self.cluster, self.doomed, self.workers, self.added = cluster, doomed, workers, ""
        self.epochs: list[tuple[int, int, str]] = []
        self.lost: list[int] = []
        self.seconds: dict[tuple[int, int], Any] = {}
        self.places: dict[Any, str] = {}
        self.names = {node_id(doomed): "doomed"}

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        number, epoch = trial.config["trial"]["number"], result.get("epoch", 0)
        if self.seconds.get((number, epoch)) == result.get("seconds"):
            return  # reported again from its run state, not trained again
        self.seconds[number, epoch] = result.get("seconds")
        if self.lost and self.again_s is None:
            self.again_s = time.monotonic() - self.at
        where = self.names.get(self.place_of(trial), "first")
        self.epochs.append((number, epoch, where))
        if not self.added:
            self.added = node_id(self.cluster.add_node(num_cpus=1))
            self.names[self.added] = "added"
        used = self.workers > 1 or self.drain or any(w == "added" for *_, w in self.epochs)
        here = not result.get("done") and (
            self.workers > 1 or where == "doomed"
        )  # an ending trial frees its place
        if self.doomed and used and epoch >= 2 and here:
            self.at = time.monotonic()
            raylet = psutil.Process(self.doomed.all_processes["raylet"][0].process.pid)
            if not self.drain:
                kill_node(raylet)
            else:
                preempt(self.cluster.address, node_id(self.doomed))
                threading.Timer(5, kill_node, [raylet]).start()  # as the machine is switched off
            self.doomed = None
            self.epochs.append((number, epoch, "killed"))

    def place_of(self, trial: Any) -> str:
        """Return the node of a trial's process."""
        actor = trial.temporary_state.ray_actor
        if actor not in self.places:
            self.places[actor] = ray.get(
                actor.__ray_call__.remote(lambda _: ray.get_runtime_context().get_node_id())
            )
        return self.places[actor]

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.lost.append(trial.config["trial"]["number"])
        (self.place / "slow").unlink(missing_ok=True)

    def __getstate__(self) -> dict[str, Any]:
        return {}


def node_id(node: Any) -> str:
    """Return Ray's id of a node that this script started."""
    store = node.plasma_store_socket_name
    return next(str(n["NodeID"]) for n in ray.nodes() if n["ObjectStoreSocketName"] == store)


def kill_node(raylet: psutil.Process) -> None:
    """Kill a node: its raylet, and the workers that it takes along."""
    with contextlib.suppress(psutil.NoSuchProcess):  # a drained node that is idle ends by itself
        for process in (raylet, *raylet.children(recursive=True)):
            process.send_signal(signal.SIGKILL)


def preempt(address: str, node: str) -> None:
    """Announce that a node is preempted in 5 s."""
    words = ["--address", address, "--node-id", node, "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
    words += ["--reason-message", "spot", "--deadline-remaining-seconds", "5"]
    subprocess.run(
        [Path(sys.executable).parent / "ray", "drain-node", *words], check=True, capture_output=True
    )


def free_port() -> int:
    """Return a free port for a dashboard: Ray tries no second port beside another cluster."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main() -> None:
    storage, space = Path(sys.argv[1]), json.loads(sys.argv[2])
    os.environ.pop("RAY_ADDRESS", None)
    workers = space.get("workers", 1)
    head = {
        "num_cpus": 1 if workers == 1 else 0,
        "resources": {DRIVER: 1000},
        "include_dashboard": workers > 1,
    }
    head["dashboard_port"] = free_port()
    cluster = Cluster(initialize_head=True, head_node_args=head)
    doomed = cluster.add_node(num_cpus=1)
    cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="CRITICAL")
    watch = Nodes(cluster, doomed, workers, storage.parent, drain=sys.argv[3:] == ["drain"])
    build_tuner(space, name="e", storage=storage, callbacks=[watch]).fit()
    until = time.monotonic() + 60
    while sum(node["Alive"] for node in ray.nodes()) > 3 and time.monotonic() < until:
        time.sleep(0.5)  # Ray takes a while to report that a node is dead
    report = {
        "epochs": watch.epochs,
        "lost": watch.lost,
        "again_s": watch.again_s,
        "nodes": sum(node["Alive"] for node in ray.nodes()),
        "failed": spent_so_far(storage / "e", workers={"gpus": 0, "cpus": 1})["max_failed_trials"],
    }
    print("REPORT " + json.dumps(report), flush=True)
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main()
