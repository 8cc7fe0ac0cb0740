"""Sweeps on two own Ray nodes with 2 CPUs each; prints where their workers were as JSON.

    python tests/sweep_placed.py STORAGE '[SPACE, ...]'

The script reads Ray's table of placement groups after a trial's first epoch. Run by
test_cluster_nodes.py.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.cluster_utils import Cluster
from sweep_on_nodes import free_port

from tfkd_ray.run.connect import DRIVER
from tfkd_ray.run.tune import build_tuner


class Places(tune.Callback):  # type: ignore[misc]
    """Records the nodes of the placement group of a trial's workers."""

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self.seen: list[dict[str, Any]] = []

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        if result.get("epoch") == 1:
            for group in ray.util.placement_group_table().values():
                nodes = [*group["bundles_to_node_id"].values()]
                if group["state"] == "CREATED" and len(nodes) == self.workers:
                    self.seen.append({"strategy": group["strategy"], "nodes": len(set(nodes))})

    def __getstate__(self) -> dict[str, Any]:
        return {"workers": self.workers, "seen": []}


def main() -> None:
    storage, spaces = Path(sys.argv[1]), json.loads(sys.argv[2])
    os.environ.pop("RAY_ADDRESS", None)
    head = {
        "num_cpus": 2,
        "resources": {DRIVER: 1000},
        "include_dashboard": True,
        "dashboard_port": free_port(),
    }
    cluster = Cluster(initialize_head=True, head_node_args=head)
    cluster.add_node(num_cpus=2)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="CRITICAL")
    report = []
    for number, space in enumerate(spaces):
        places = Places(space["workers"])
        results = build_tuner(space, name=f"e{number}", storage=storage, callbacks=[places]).fit()
        report.append({"errors": results.num_errors, "seen": places.seen})
        until = time.monotonic() + 30  # so that the next sweep finds both nodes free
        while ray.available_resources().get("CPU") != 4 and time.monotonic() < until:
            time.sleep(0.1)
    print("REPORT " + json.dumps(report), flush=True)
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main()
