"""A sweep on its own Ray cluster whose processes are killed; prints the outcome as JSON.

    python tests/sweep_under_fire.py STORAGE CPUS '{"space": {...}, "kill": [[trial number, epoch, "worker" or "trial"]]}'

`kill` sends signal 9 to a Ray Train worker or to a trial's process when the trial has reported its
epoch; `store` fills Ray's object store three times over, and `tmp` removes all but sockets from
Ray's folder in /tmp. Run by test_groups.py beside the session's cluster: two clusters on one host
are part of the test.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import ray
from ray import tune

from tfkd_ray.run.connect import DRIVER
from tfkd_ray.run.tune import build_tuner

TITLES = {
    "worker": ("ray::RayTrainWorker",),
    "trial": ("ray::StudentTrial", "ray::ResourceTrainable"),
}
ALL = TITLES["worker"] + TITLES["trial"]


class Watch(tune.Callback):  # type: ignore[misc]
    """Records when each trial starts and ends, and kills as planned."""

    def __init__(self, kill: list[list[Any]]) -> None:
        self.kill = {(number, epoch): what for number, epoch, what in kill}
        self.events: list[tuple[float, str, int]] = []

    def _note(self, what: str, trial: Any) -> None:
        self.events.append((time.time(), what, trial.config["trial"]["number"]))

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._note("start", trial)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        if result.get("epoch") == 1:
            self._note("first epoch", trial)
        what = self.kill.pop((trial.config["trial"]["number"], result.get("epoch")), None)
        if what:
            self._note(f"kill {what}", trial)
            if what == "store":
                self.held = [ray.put(os.urandom(10 * 2**20)) for _ in range(45)]
            elif what == "tmp":
                _clean(Path(ray._private.worker._global_node.get_session_dir_path()))
            elif what == "trial":
                os.kill(
                    ray.get(trial.temporary_state.ray_actor.get_current_ip_pid.remote())[1],
                    signal.SIGKILL,
                )
            else:
                os.kill(ray_processes(TITLES["worker"])[0].pid, signal.SIGKILL)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "held": []}

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._note("lost", trial)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._note("end", trial)


def _clean(folder: Path) -> None:
    """Remove all files, open ones included, but no sockets, as a cleaner of /tmp does."""
    for path in folder.rglob("*"):
        if path.is_file():
            path.unlink(missing_ok=True)


def ray_processes(titles: tuple[str, ...]) -> list[psutil.Process]:
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if " ".join(process.cmdline()).startswith(titles):
                found.append(process)
        except psutil.Error:
            continue
    return found


def sweep(storage: str, cpus: int, space: dict[str, Any], kill: list[list[Any]]) -> dict[str, Any]:
    """Run the sweep on the connected Ray; return its outcome and the rest half a minute later."""
    watch = Watch(kill)
    build_tuner(space, name="e", storage=storage, callbacks=[watch]).fit()
    ended = time.time()
    while (
        ray.available_resources().get("CPU") != cpus or ray_processes(ALL)
    ) and time.time() - ended < 30:
        time.sleep(0.2)
    return {
        "events": watch.events,
        "free": ray.available_resources().get("CPU"),
        "groups": sorted({g["state"] for g in ray.util.placement_group_table().values()}),
        "left": [p.name() for p in ray_processes(ALL)],
        "trials": {
            str((about := json.loads(p.read_text()))["number"]): [about["status"], about["reason"]]
            for p in Path(storage).glob("e/trials/*/trial.json")
        },
    }


def main() -> None:
    storage, cpus, plan = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
    os.environ.pop("RAY_ADDRESS", None)
    ray.init(
        address="local", num_cpus=cpus, resources={DRIVER: 1000}, include_dashboard=True, log_to_driver=False,
        logging_level="CRITICAL", object_store_memory=150 * 2**20,
    )  # fmt: skip
    print("REPORT " + json.dumps(sweep(storage, cpus, plan["space"], plan["kill"])))


if __name__ == "__main__":
    main()
