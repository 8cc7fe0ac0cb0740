"""A sweep whose trials share a GPU of one kind, on two nodes; prints the places of trials as JSON.

    python tests/sweep_shared.py STORAGE SPACE_AS_JSON

The GPUs exist only for Ray: trials ask for a share and train on the CPU. The first four trials wait
for each other (at most a minute), so the output shows four at once if, and only if, four may run at
once. Run by test_room.py.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster

from tfkd_ray.run import tune as ours
from tfkd_ray.run.connect import DRIVER
from tfkd_ray.run.trial import StudentTrial

TOGETHER = 4


class OnCpu(StudentTrial):
    """A trial that records its node and its times, and trains on the CPU."""

    def _begin(self, config: dict[str, Any]) -> None:
        super()._begin({**config, "gpus_per_worker": 0, "accelerator_type": None})
        epochs, notes = self._epochs, Path(config["trial"]["storage"]) / "notes"
        context = ray.get_runtime_context()
        note = {
            "node": context.get_node_id(),
            "gpus": context.get_accelerator_ids()["GPU"],
            "from": time.time(),
        }
        path = notes / f"{config['trial']['number']}.json"
        path.write_text(json.dumps(note))

        def noted() -> Any:
            until = time.monotonic() + 60
            while len(list(notes.iterdir())) < TOGETHER and time.monotonic() < until:
                time.sleep(0.05)
            yield from epochs
            path.write_text(json.dumps({**note, "to": time.time()}))

        self._epochs = noted()

    def step(self) -> dict[str, Any]:
        result = super().step()
        if result["done"]:
            next(self._epochs, None)
        return result


def main() -> None:
    storage, space = Path(sys.argv[1]), json.loads(sys.argv[2])
    os.environ.pop("RAY_ADDRESS", None)
    ours.check_gpus = lambda: None  # they exist only for Ray
    (storage / "notes").mkdir(parents=True)
    kind = "accelerator_type:"
    head = {
        "num_cpus": 8,
        "num_gpus": 1,
        "resources": {DRIVER: 1000, f"{kind}T4": 1},
        "include_dashboard": False,
    }
    cluster = Cluster(initialize_head=True, head_node_args=head)
    cluster.add_node(num_cpus=8, num_gpus=1, resources={f"{kind}A100": 1})
    ray.init(address=cluster.address, log_to_driver=False, logging_level="CRITICAL")
    names = {
        n["NodeID"]: r.removeprefix(kind)
        for n in ray.nodes()
        for r in n["Resources"]
        if r.startswith(kind)
    }
    ours.StudentTrial = OnCpu
    results = ours.build_tuner(space, name="e", storage=storage).fit()
    notes = [json.loads(path.read_text()) for path in sorted((storage / "notes").iterdir())]
    report = {
        "errors": results.num_errors,
        "notes": [{**note, "node": names[note["node"]]} for note in notes],
    }
    print("REPORT " + json.dumps(report), flush=True)
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main()
