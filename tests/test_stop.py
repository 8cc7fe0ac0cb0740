"""`tfkd stop`: what is asked of a driver, and how trials and sweeps end by it."""

import json
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Run
from optuna.trial import TrialState
from test_kill_points import killed_at
from test_readers import change, make_sweep
from test_remote import bucket, elsewhere, server  # noqa: F401
from test_search import run_trial, space, trials, value
from test_tune import TREE

from tfkd_ray.cli.main import main
from tfkd_ray.run.callbacks import Lock, Losses, Recorder
from tfkd_ray.run.searcher import OptunaSearcher
from tfkd_ray.run.stops import BY_COMMAND, Stops, drop_stop, end_stopped
from tfkd_ray.settings.yaml import dump_yaml
from tfkd_ray.show.listener import Announcer
from tfkd_ray.show.receipt import receipt
from tfkd_ray.show.report import report
from tfkd_ray.show.status import status, status_lines
from tfkd_ray.space.space import build_space
from tfkd_ray.store import remote
from tfkd_ray.store.assignment import SECTION, Assignment
from tfkd_ray.store.experiment import (
    STOPPED_BY,
    WHOLE_SWEEP,
    Record,
    read_experiment,
    read_metrics,
    read_record,
    read_records,
    stop_requests,
    write_experiment,
    write_record,
)
from tfkd_ray.store.storage import Experiment, checked, experiment_of


class FakeTrial:
    """The attributes of a Tune trial that the listeners read."""

    status = "RUNNING"
    max_failures = 2
    num_failures = 0

    def __init__(self, trial_id: str, config: dict[str, Any]) -> None:
        self.trial_id, self.config = trial_id, config
        self.last_result: dict[str, Any] = {}


def begun(tmp_path: Path, **search: Any) -> tuple[Experiment, OptunaSearcher]:
    """Return an experiment that has begun, and its searcher."""
    s = space(stopping="none", **search)
    folder = tmp_path / "e"
    folder.mkdir()
    write_experiment(folder, s.tree, ["tfkd"])
    found = experiment_of(folder)
    return found, OptunaSearcher(s, folder / "study.journal", folder=folder / "trials")


def proposed(searcher: OptunaSearcher, trial_id: str) -> dict[str, Any]:
    config = searcher.suggest(trial_id)
    assert isinstance(config, dict)
    return config


# --- the driver's side


@pytest.mark.parametrize("judges", [True, False])
@pytest.mark.parametrize("metric", ["val_accuracy", ["val_accuracy", "val_ece"]])
def test_a_trial_that_is_asked_to_stop_ends_after_its_epoch_as_pruned_and_keeps_its_value(
    tmp_path: Path, judges: bool, metric: Any
) -> None:
    found, searcher = begun(tmp_path, metric=metric)
    searcher.judges = judges
    stops = Stops(found)
    recorder = Recorder(Losses(), stops=stops)
    announcer = Announcer([recorder, stops])
    stops._look()
    trial = FakeTrial("a", proposed(searcher, "a"))
    name = Assignment.of(trial.config).name
    announcer.on_trial_start(0, [], trial)

    def told(epoch: int) -> bool:
        result = {"epoch": epoch, "val_accuracy": value(trial.config, epoch), "val_ece": 0.1, "training_iteration": epoch}  # fmt: skip
        over = stops(trial.trial_id, result)
        if not over:
            searcher.report("a", result)
            searcher.on_trial_result("a", result)
        result["done"] = over
        announcer.on_trial_result(0, [], trial, result)
        trial.last_result = result
        return over

    assert not told(1) and not told(2)
    found.storage.request(found.name, name)
    stops._look()
    assert told(3)
    searcher.on_trial_complete("a", trial.last_result)
    announcer.on_trial_complete(0, [], trial)
    (ended,) = trials(found.folder / "study.journal")
    assert ended.state == TrialState.PRUNED
    if metric == "val_accuracy":
        assert ended.value == value(trial.config, 3) and 3 in ended.intermediate_values
    record = read_record(found.folder / "trials" / name)
    assert (record.status, record.reason) == ("stopped", f"{BY_COMMAND} after epoch 3")
    assert len(read_metrics(record.folder)) == 3
    assert stop_requests(found.folder) == {name}  # until both files and study have it
    stops._look()
    assert stop_requests(found.folder) == set()
    assert proposed(searcher, "next")["trial"]["number"] == 1  # the sweep goes on


def test_a_trial_in_its_last_epoch_is_of_full_length_though_it_is_asked_to_stop(
    tmp_path: Path,
) -> None:
    found, searcher = begun(tmp_path)
    stops = Stops(found)
    trial = FakeTrial("a", proposed(searcher, "a"))
    stops.on_start(trial, {})
    found.storage.request(found.name, Assignment.of(trial.config).name)
    stops._look()
    last = run_trial(searcher, "a", trial.config)
    assert not stops("a", {**last, "done": True})
    searcher.on_trial_complete("a", {**last, "done": True})
    assert trials(found.folder / "study.journal")[0].state == TrialState.COMPLETE
    stops.on_end(trial)
    stops._look()
    assert stop_requests(found.folder) == set()


def test_a_request_that_a_killed_driver_has_not_met_is_met_when_the_sweep_is_resumed(
    tmp_path: Path,
) -> None:
    found, searcher = begun(tmp_path)
    names = []
    for k, upto in enumerate((2, 2, 0)):  # the third has reported nothing
        config = proposed(searcher, f"id{k}")
        run_trial(searcher, f"id{k}", config, upto=upto)
        names.append(Assignment.of(config).name)
        bare = {key: v for key, v in config.items() if key != SECTION}
        folder = found.folder / "trials" / names[k]
        write_record(Record(folder, k, names[k], "ce", "running", {}, bare))
        lines = [json.dumps({"epoch": e, "val_accuracy": 0.5}) + "\n" for e in range(1, upto + 1)]
        (folder / "metrics.jsonl").write_text("".join(lines))
    for name in (names[0], names[2], WHOLE_SWEEP, "t0099-ce"):
        found.storage.request(found.name, name)
    searcher.close()
    copy = tmp_path / "copy"
    shutil.copytree(found.folder, copy)

    def resumed(experiment: Experiment) -> OptunaSearcher:
        again = OptunaSearcher(
            space(stopping="none"),
            experiment.folder / "study.journal",
            folder=experiment.folder / "trials",
        )
        drop_stop(experiment)
        end_stopped(experiment, again)
        return again

    again = resumed(found)
    assert again.waiting() == {1, 2}
    first = read_record(found.folder / "trials" / names[0])
    assert (first.status, first.reason) == ("stopped", f"{BY_COMMAND} after epoch 2")
    assert trials(found.folder / "study.journal")[0].state == TrialState.PRUNED
    assert stop_requests(found.folder) == {names[2]}  # it is stopped after its first epoch
    again.close()
    resumed(found).close()  # a second time changes nothing
    # and killed between study and trial.json: the next resume writes it
    cut = experiment_of(copy)
    broken = OptunaSearcher(space(stopping="none"), copy / "study.journal", folder=copy / "trials")
    broken.remaining()
    broken.end_early(0, {})
    broken.close()
    resumed(cut).close()
    assert read_record(copy / "trials" / names[0]).status == "stopped"


@pytest.mark.slow
def test_a_request_to_stop_all_ends_the_sweep_once_and_is_gone_afterwards(tmp_path: Path) -> None:
    found, _ = begun(tmp_path)
    said: list[str] = []
    stops = Stops(found, said.append)
    stops.on_begin()
    assert not stops.stop_all()
    found.storage.request(found.name, WHOLE_SWEEP)
    found.storage.request(found.name, WHOLE_SWEEP)  # asking again changes nothing
    until = time.monotonic() + 30
    while not stops.stop_all():
        assert time.monotonic() < until
        time.sleep(0.05)
    assert stops.stop_all() and stops.reason == BY_COMMAND
    assert said == ["stopping, as tfkd stop asks: trials save their state"]
    stops.on_close([])
    assert stop_requests(found.folder) == set() and not stops._thread.is_alive()


@pytest.mark.slow
def test_requests_reach_a_driver_through_a_bucket(
    bucket: str,  # noqa: F811
    elsewhere: Callable[[str], None],  # noqa: F811
    tmp_path: Path,
) -> None:
    make_sweep(tmp_path / "e", 4)
    driver = checked(bucket)
    shutil.copytree(tmp_path / "e", driver.folder / "e", symlinks=True)
    claim = driver.hold("e")
    assert claim is not None
    remote.Upload(claim.store, "e").once()
    elsewhere("there")
    there = experiment_of(f"{bucket}/e")
    there.storage.request("e", "t0000-kd")
    elsewhere("here")
    assert driver.requests("e") == {"t0000-kd"}
    assert stop_requests(experiment_of(f"{bucket}/e").folder) <= {"t0000-kd"}
    remote.Upload(claim.store, "e").once()  # the driver neither uploads nor removes it
    assert driver.requests("e") == {"t0000-kd"}
    driver.withdraw("e", "t0000-kd")
    assert driver.requests("e") == set() == stop_requests(driver.folder / "e")
    remote.Upload(claim.store, "e").once()
    assert driver.requests("e") == set()


# --- the command's side


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a sweep of which one trial runs; its driver is said to run."""
    make_sweep(tmp_path / "e", 6)
    change(tmp_path / "e", 2, status="running")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tfkd_ray.show.status.is_running", lambda experiment: True)
    return tmp_path / "e"


def test_a_trial_that_is_not_there_is_a_sentence_and_nothing_is_stopped(
    sweep: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    running = read_records(sweep)[2].name
    for words in (["t0099"], [running, "t0099-ce"], ["99"], [running, ""], ["t0"]):
        assert main(["stop", "e", *words]) == 2
        err = capsys.readouterr().err
        assert "nothing is stopped" in err and stop_requests(sweep) == set(), words
    assert main(["stop", "nowhere"]) == 2
    assert "no such directory" in capsys.readouterr().err


def test_a_sweep_that_runs_is_not_confirmed(
    sweep: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["confirm", "e"]) == 2
    err = " ".join(capsys.readouterr().err.split())
    assert (
        "is still running, 5 of 6 trials have ended; wait for its end (tfkd status e --follow)"
        in err
    )
    assert [p.name for p in sweep.parent.iterdir()] == ["e"]


def test_a_trial_is_named_as_in_logs_and_asked_as_often_as_one_likes(
    sweep: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ended, running = (read_records(sweep)[k].name for k in (0, 2))
    for word in (running, running[:5], "2"):
        assert main(["stop", "e", word]) == 0
        said = f"{running} was asked to stop: it ends after its current epoch and keeps its value\n"
        assert capsys.readouterr().out == said
    assert stop_requests(sweep) == {running}
    assert main(["stop", "e", "0"]) == 0
    assert capsys.readouterr().out.startswith(f"{ended} has ended: ")
    assert stop_requests(sweep) == {running}
    found = status(sweep)
    assert found["stopping"] == [running]
    assert f"asked by tfkd stop to stop: {running}" in status_lines(found)


def test_a_sweep_is_asked_to_stop_only_where_something_may_run(
    sweep: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["stop", "e"]) == 0
    out = capsys.readouterr().out
    assert "e was asked to stop" in out and "tfkd resume e" in out
    assert stop_requests(sweep) == {WHOLE_SWEEP}
    drop_stop(experiment_of(sweep))
    monkeypatch.setattr("tfkd_ray.show.status.is_running", lambda experiment: False)
    assert main(["stop", "e"]) == 0  # its driver ran elsewhere, and may only be silent
    assert "its driver on nowhere does not respond; if it still runs" in capsys.readouterr().out
    drop_stop(experiment_of(sweep))
    (sweep / "driver.txt").unlink()
    assert main(["stop", "e"]) == 0
    assert (
        capsys.readouterr().out == "e is interrupted: nothing runs, so there is nothing to stop\n"
    )
    assert stop_requests(sweep) == set()
    assert main(["stop", "e", "2"]) == 0
    assert "it does not run now, and ends when the sweep is resumed" in capsys.readouterr().out


@pytest.mark.fault
@pytest.mark.slow
def test_a_command_that_is_killed_has_asked_or_not_and_asking_again_is_enough(
    tmp_path: Path,
) -> None:
    make_sweep(tmp_path / "made", 6)
    change(tmp_path / "made", 2, status="running")
    running = read_records(tmp_path / "made")[2].name
    for point in range(1, 100):
        here = tmp_path / f"p{point}"
        shutil.copytree(tmp_path / "made", here / "s" / "e", symlinks=True)
        was_killed = killed_at(point, ["stop", "s/e", "2"], here, here / "s")
        asked = stop_requests(here / "s" / "e")
        assert asked in (set(), {running}), f"{point=}"
        if not was_killed:
            break
        assert not killed_at(1000, ["stop", "s/e", "2"], here, here / "s")
        assert stop_requests(here / "s" / "e") == {running}, f"{point=}"
        Lock(*experiment_of(here / "s" / "e")).release()  # a driver removes what is half-written
        time.sleep(1.1)
        Lock(*experiment_of(here / "s" / "e")).release()
        left = [p.name for p in (here / "s" / "e" / "stop").iterdir()]
        assert left == [running], f"{point=}"
    assert point > 1 and asked == {running}


def test_a_link_in_the_place_of_the_requests_is_refused_and_not_followed(
    sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "other").mkdir()
    (sweep / "stop").symlink_to(tmp_path / "other")
    assert main(["stop", "e"]) == 2
    assert "is a link to" in capsys.readouterr().err and not list((tmp_path / "other").iterdir())
    (tmp_path / "other" / WHOLE_SWEEP).write_text("")
    assert stop_requests(sweep) == set()


def test_trials_stopped_by_hand_are_said_with_their_reason_and_save_nothing(sweep: Path) -> None:
    before = receipt(build_space(json_tree(sweep)), read_records(sweep)).saved
    stopped = next(r for r in read_records(sweep) if r.status == "stopped")
    change(sweep, stopped.number, reason=f"{BY_COMMAND} after epoch 2")
    found = status(sweep)
    said = {"trial": stopped.name, "reason": f"{BY_COMMAND} after epoch 2"}
    assert found["stopped"] == [said]
    assert f"stopped: {stopped.name}: {BY_COMMAND} after epoch 2" in status_lines(found)
    assert receipt(build_space(json_tree(sweep)), read_records(sweep)).saved < before
    report(sweep, sweep.parent / "e.html")
    assert "stopped for another reason" in (sweep.parent / "e.html").read_text()


def json_tree(experiment: Path) -> dict[str, Any]:
    return dict(read_experiment(experiment)["space"])


# --- both


@pytest.mark.ray
@pytest.mark.slow
def test_a_running_sweep_is_stopped_from_another_process_and_goes_on(
    ray_cluster: str, tmp_path: Path, tfkd: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = {**TREE, "epochs": 2000, "search": {"num_samples": 2, "stopping": "none", "max_concurrent": 2}}  # fmt: skip
    (tmp_path / "e.yaml").write_text(dump_yaml(tree))
    codes: dict[str, int] = {}

    def wait(ready: Callable[[], bool]) -> None:
        until = time.monotonic() + 120
        while not ready():
            assert time.monotonic() < until
            time.sleep(0.1)

    def stop() -> None:
        e = tmp_path / "e"
        wait(lambda: sum(bool(read_metrics(e / "trials" / f"t000{k}-ce")) for k in (0, 1)) == 2)
        codes["trial"] = tfkd("stop", "e", "0").returncode
        wait(lambda: read_record(e / "trials" / "t0000-ce").status == "stopped")
        codes["sweep"] = tfkd("stop", "e").returncode

    asker = threading.Thread(target=stop)
    asker.start()
    code = main(["tune", str(tmp_path / "e.yaml"), "--name", "e", "--storage", str(tmp_path)])
    asker.join()
    assert (code, codes) == (130, {"trial": 0, "sweep": 0})
    err = capsys.readouterr().err
    assert "t0000-ce: stopped by tfkd stop at epoch " in err
    assert f"{BY_COMMAND}; resume with:" in err
    first, second = read_records(tmp_path / "e")
    assert first.status == "stopped" and str(first.reason).startswith(BY_COMMAND)
    assert (second.status, second.reason) == ("interrupted", BY_COMMAND)
    assert stop_requests(tmp_path / "e") == set()
    states = [t.state for t in trials(tmp_path / "e" / "study.journal")]
    assert states == [TrialState.PRUNED, TrialState.RUNNING]
    assert STOPPED_BY not in json.dumps(first.metrics)
