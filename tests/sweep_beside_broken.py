"""A sweep on its own Ray cluster with a broken GPU on one node; prints the outcome as JSON.

    python tests/sweep_beside_broken.py STORAGE SPACE_AS_JSON

The file `broken` beside the storage names the first node after the head (see broken.py). The head
has no CPU.
"""

import json
import os
import sys
from pathlib import Path

import ray
from ray.cluster_utils import Cluster
from sweep_on_nodes import free_port, node_id

from tfkd_ray.run.connect import DRIVER
from tfkd_ray.run.tune import build_tuner
from tfkd_ray.store.experiment import read_records


def main() -> None:
    storage, space = Path(sys.argv[1]), json.loads(sys.argv[2])
    os.environ.pop("RAY_ADDRESS", None)
    head = {
        "num_cpus": 0,
        "resources": {DRIVER: 1000},
        "include_dashboard": True,
        "dashboard_port": free_port(),
    }
    cluster = Cluster(initialize_head=True, head_node_args=head)
    bad = cluster.add_node(num_cpus=1)
    for _ in range(space["workers"]):
        cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="CRITICAL")
    (storage.parent / "broken").write_text(node_id(bad))
    notes: list[str] = []
    build_tuner(space, name="e", storage=storage, on_note=notes.append).fit()
    records = read_records(storage / "e")
    print("REPORT " + json.dumps({
        "bad": node_id(bad), "notes": notes, "states": [r.status for r in records], "lost": [r.lost for r in records],
    }), flush=True)  # fmt: skip
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main()
