"""The verb `stop`: ask the driver of a sweep to stop trials, or to end."""

import socket
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from tfkd_ray.cli.terminal import resume_command
from tfkd_ray.settings.errors import OK, ConfigError

if TYPE_CHECKING:
    from tfkd_ray.store.storage import Experiment


def stop_verb(args: Namespace) -> int:
    from tfkd_ray.show.status import read_plan
    from tfkd_ray.store.storage import experiment_of

    found = experiment_of(args.experiment)
    plan = read_plan(found.folder)
    if not args.trials:
        return _stop_all(found)
    if plan.kind == "comparison":
        raise ConfigError(
            "is a comparison of arms, which needs all of its runs; name no trials, to stop the whole comparison",
            found.folder,
        )
    return _stop_trials(found, args.trials)


def _stop_all(found: "Experiment") -> int:
    """Ask the driver to end; say so, or that nothing runs."""
    from tfkd_ray.show.status import driver_of, status
    from tfkd_ray.store.experiment import WHOLE_SWEEP

    state, driver = status(found.folder)["state"], driver_of(found.folder)
    told = (found.folder / "driver.json").exists()  # of a bucket, where a driver refreshes it
    unseen = driver is not None and driver[1] != socket.gethostname() and not told
    if state == "finished" or (state != "running" and not unseen):
        print(f"{found.name} is {state}: nothing runs, so there is nothing to stop")
        return OK
    found.storage.request(found.name, WHOLE_SWEEP)
    if state == "running":
        print(
            f"{found.name} was asked to stop: running trials save their state at the end of their epoch"
        )
    else:
        print(
            f"{found.name}: its driver on {driver[1] if driver else '?'} does not respond; if it still runs, it stops"
        )
    print(f"resume with:\n  {resume_command(found.folder)}")
    return OK


def _stop_trials(found: "Experiment", trials: list[str]) -> int:
    """Ask the driver to stop trials; say what becomes of each."""
    from tfkd_ray.show.status import is_running, record_of
    from tfkd_ray.show.trials import folder_of_trial

    folders: dict[str, Path] = {}
    problems = []
    for trial in trials:
        try:
            folder = folder_of_trial(found.folder, trial)
            folders[folder.name] = folder
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError([*problems, "nothing is stopped"], found.folder)
    alive = is_running(found.folder)
    for name, folder in folders.items():
        record = record_of(folder)
        if record is not None and record.status in ("done", "stopped", "failed"):
            print(f"{name} has ended: {record.status}")
            continue
        found.storage.request(found.name, name)
        if alive and record is not None and record.status == "paused":
            print(f"{name} is paused: it does not continue, and ends with the sweep")
        elif alive:
            print(f"{name} was asked to stop: it ends after its current epoch and keeps its value")
        else:
            print(
                f"{name} was asked to stop: it does not run now, and ends when the sweep is resumed"
            )
    return OK
