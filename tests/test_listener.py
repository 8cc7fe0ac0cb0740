"""Listeners of Tune's calls: each new epoch once, in a fixed order; and a trial's assignment."""

import dataclasses
import io
import json
import threading
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from filelock import FileLock
from ray import tune
from rich.console import Console
from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer

from tfkd_ray.run.callbacks import Budget, Lock, Losses, Recorder, SoftLabels, in_order
from tfkd_ray.run.searcher import OptunaSearcher
from tfkd_ray.run.stops import Stops
from tfkd_ray.settings.errors import ConfigError
from tfkd_ray.show.listener import Announcer, Listener
from tfkd_ray.show.live import Progress
from tfkd_ray.show.tensorboard import TensorBoard
from tfkd_ray.space.space import build_space
from tfkd_ray.store.assignment import SECTION, Assignment
from tfkd_ray.store.experiment import read_metrics, read_record, write_experiment
from tfkd_ray.store.storage import Directory, experiment_of

EPOCHS = 9
SPACE = build_space(
    {"student": "mlp", "objective": "ce", "epochs": EPOCHS, "search": {"num_samples": 2}}
)


class Heard(Listener):
    """Records its calls."""

    def __init__(self, name: str = "", tape: list[tuple[str, str]] | None = None) -> None:
        self.name, self.tape = name, [] if tape is None else tape
        self.epochs: list[int] = []
        self.results: list[Any] = []
        self.started_at: list[int | None] = []

    def on_start(self, trial: Any, last: Mapping[str, Any]) -> None:
        self.started_at.append(last.get("epoch"))
        self.tape.append((self.name, "start"))

    def on_epoch(self, trial: Any, epoch: int, metrics: Mapping[str, Any]) -> None:
        self.epochs.append(epoch)
        self.tape.append((self.name, f"epoch {epoch}"))

    def on_result(self, trial: Any, result: dict[str, Any]) -> None:
        self.results.append(result.get("epoch"))
        self.tape.append((self.name, "result"))

    def on_end(self, trial: Any) -> None:
        self.tape.append((self.name, "end"))


def trial_of(experiment: Path, attempt: str) -> Any:
    storage, directory = Directory(experiment.parent), experiment / "trials" / "t0000-ce"
    assignment = Assignment("t0000-ce", EPOCHS, storage=storage, directory=directory)
    config = {**SPACE.example.model_dump(mode="json"), SECTION: assignment.section()}
    about = {
        "status": "RUNNING",
        "last_result": {},
        "max_failures": 2,
        "num_failures": 0,
        "evaluated_params": {},
    }
    return SimpleNamespace(trial_id=attempt, config=config, **about)


def tell(announcer: Announcer, trial: Any, epoch: int, **more: Any) -> None:
    values = {
        "epoch": epoch,
        "training_iteration": epoch + 3,
        "val_accuracy": epoch / 10,
        "seconds": 2.0,
    }
    trial.last_result = {**values, "train_loss": 1.0, "done": False, **more}
    announcer.on_trial_result(0, [], trial, trial.last_result)


def session(experiment: Path) -> tuple[Announcer, Heard, Budget, Progress]:
    """Return a driver's listeners, including its view, in the order of a sweep."""
    searcher = OptunaSearcher(SPACE, experiment / "study.journal")
    budget, losses = (
        Budget(experiment, SPACE, searcher, clock=lambda: 0.0),
        Losses(clock=lambda: 0.0),
    )
    heard, view = Heard(), Progress(experiment, Console(file=io.StringIO()))
    board = TensorBoard(experiment / "tb", SPACE)
    announcer = Announcer([board, budget, losses, Recorder(losses, budget), view, heard])
    announcer.setup()
    return announcer, heard, budget, view


def test_each_epoch_is_told_once_over_duplicates_lost_processes_a_resume_and_a_retry(
    tmp_path: Path,
) -> None:
    write_experiment(tmp_path, SPACE.tree, ["tfkd"])
    folder = tmp_path / "trials" / "t0000-ce"
    announcer, heard, budget, view = session(tmp_path)
    trial = trial_of(tmp_path, "first")
    announcer.on_trial_start(0, [], trial)
    for epoch in (1, 2, 2):  # Ray repeats a result
        tell(announcer, trial, epoch)
    announcer.on_trial_recover(0, [], trial)
    announcer.on_trial_start(0, [], trial)
    for epoch in (1, 2, 3):
        tell(announcer, trial, epoch)
    assert (
        heard.epochs == [1, 2, 3]
        and heard.results == [1, 2, 2, 1, 2, 3]
        and heard.started_at == [None, 2]
    )
    assert budget.spent()["cpu_hours"] == pytest.approx(3 * 2 / 3600)
    announcer.on_experiment_end([trial])

    announcer, heard, budget, view = session(tmp_path)  # another driver resumes
    trial = trial_of(tmp_path, "resumed")
    announcer.on_trial_start(0, [], trial)
    for epoch in (1, 2, 3):
        tell(announcer, trial, epoch)
    assert heard.epochs == [] and heard.started_at == [3]
    assert [(run.epoch, run.value, len(view._epochs)) for run in view._runs.values()] == [
        (3, 0.3, 0)
    ]
    tell(announcer, trial, 4)
    trial.last_result = {"failed": "Diverged", "done": True, "training_iteration": 8}
    announcer.on_trial_result(0, [], trial, trial.last_result)
    announcer.on_trial_complete(0, [], trial)
    assert heard.epochs == [4] and heard.results == [1, 2, 3, 4, None], "a failure is of no epoch"
    announcer.on_experiment_end([trial])

    announcer, heard, budget, view = session(tmp_path)  # and retries the failed one
    budget.seconds_left = view.told_left
    trial = trial_of(tmp_path, "retried")
    announcer.on_trial_start(0, [], trial)
    for epoch in range(1, EPOCHS + 1):
        tell(announcer, trial, epoch, done=epoch == EPOCHS)
    announcer.on_trial_complete(0, [], trial)
    announcer.on_experiment_end([trial])
    assert heard.epochs == [5, 6, 7, 8, 9]
    assert [m["epoch"] for m in read_metrics(folder)] == list(range(1, EPOCHS + 1))
    assert read_record(folder).status == "done" and read_record(folder).lost == 1
    events = EventMultiplexer().AddRunsFromDirectory(str(tmp_path / "tb")).Reload()
    assert [s.step for s in events.Scalars("t0000-ce", "val/acc")] == list(range(1, EPOCHS + 1))
    spent = json.loads((tmp_path / "spent.json").read_text())
    assert spent["trial_seconds"] == 2 * EPOCHS and spent["left_s"] > 0


def test_a_trial_that_is_set_back_tells_what_it_told_no_second_time(tmp_path: Path) -> None:
    """Population-based training does this: under the same id, from another checkpoint."""
    heard = Heard()
    announcer, trial = Announcer([heard]), trial_of(tmp_path, "a")
    announcer.on_trial_start(0, [], trial)
    for epoch in (1, 2, 3, 4):
        tell(announcer, trial, epoch)
    announcer.on_trial_start(0, [], trial)
    for epoch in (3, 4, 5):
        tell(announcer, trial, epoch)
    assert heard.epochs == [1, 2, 3, 4, 5] and heard.started_at == [None, 4]


@pytest.mark.parametrize("again", [1, 3])
def test_a_users_own_trainable_has_no_record_and_goes_on_where_its_results_do(again: int) -> None:
    heard, trial = Heard(), SimpleNamespace(trial_id="mine", config={"lr": 0.1})
    announcer = Announcer([heard])
    for step in (1, 2, 3):  # a result before a start is one, too
        announcer.on_trial_result(0, [], trial, {"loss": 1.0, "training_iteration": step})
    announcer.on_trial_start(0, [], trial)
    for step in range(again, 5):
        announcer.on_trial_result(0, [], trial, {"loss": 1.0, "training_iteration": step})
    assert heard.epochs == [1, 2, 3, *range(again, 5)]


def test_an_event_goes_to_all_listeners_in_their_order_before_the_next(tmp_path: Path) -> None:
    tape: list[tuple[str, str]] = []
    announcer = Announcer([Heard("a", tape), Heard("b", tape)])
    trial = trial_of(tmp_path, "x")
    announcer.on_trial_start(0, [], trial)
    tell(announcer, trial, 1)
    announcer.on_trial_complete(0, [], trial)
    assert tape == [
        ("a", "start"), ("b", "start"), ("a", "epoch 1"), ("a", "result"), ("b", "epoch 1"), ("b", "result"),
        ("a", "end"), ("b", "end"),
    ]  # fmt: skip


def test_the_order_is_as_it_is_stated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "tfkd_ray.run.callbacks.Uploads",
        type("Uploads", (Listener,), {"__init__": lambda *_: None}),
    )
    write_experiment(tmp_path, SPACE.tree, ["tfkd"])
    lock, board, losses = Lock(*experiment_of(tmp_path)), TensorBoard(tmp_path / "tb"), Losses()
    budget = Budget(tmp_path, SPACE, OptunaSearcher(SPACE, tmp_path / "study.journal"))
    view, users = Progress(tmp_path), tune.Callback()

    def names(**more: Any) -> list[str]:
        callbacks = in_order(lock, board, losses, [users, view], **more)
        listeners = [c.listeners if isinstance(c, Announcer) else [c] for c in callbacks]
        return [type(listener).__name__ for some in listeners for listener in some]

    assert names() == ["TensorBoard", "Losses", "Recorder", "Callback", "Progress", "Lock"]
    lock.claim = "of a store"  # type: ignore[assignment]
    stops = Stops(experiment_of(tmp_path))
    assert names(budget=budget, stops=stops, labels=SoftLabels(tmp_path)) == [
        "TensorBoard", "Budget", "Losses", "Recorder", "Stops", "SoftLabels", "Callback", "Progress", "Uploads", "Lock",
    ]  # fmt: skip
    assert budget.seconds_left == view.told_left
    lock.claim = None
    lock.release()


def test_the_reason_that_losses_knows_is_what_recorder_writes_and_the_view_says(
    tmp_path: Path,
) -> None:
    """This is the reason for their order."""
    write_experiment(tmp_path, SPACE.tree, ["tfkd"])
    out = io.StringIO()
    lock, losses, view = (
        Lock(*experiment_of(tmp_path)),
        Losses(),
        Progress(tmp_path, Console(file=out, width=200)),
    )
    trial = trial_of(tmp_path, "a")
    callbacks = in_order(lock, TensorBoard(tmp_path / "tb", SPACE), losses, [view])
    for callback in callbacks:
        callback.setup()
    for callback in callbacks:
        callback.on_trial_start(0, [], trial)
    (tmp_path / "trials/t0000-ce/broken_gpu.json").write_text(
        json.dumps({"node": "n1", "host": "h", "reason": "CUDA error: ECC"})
    )
    trial.status = "ERROR"
    for callback in callbacks:
        callback.on_trial_error(0, [], trial)
    for callback in callbacks:
        callback.on_experiment_end([trial])
    reason = "its process was lost 3 times in epoch 1 (CUDA error: ECC)"
    assert read_record(tmp_path / "trials/t0000-ce").reason == reason
    assert f"t0000-ce: failed: {reason}\n" in out.getvalue()
    Lock(*experiment_of(tmp_path)).release()  # the last one has released it


@pytest.mark.slow
def test_a_lock_that_is_freed_a_moment_later_is_taken(tmp_path: Path) -> None:
    held = FileLock(tmp_path / "driver.lock", thread_local=False)
    held.acquire()
    with pytest.raises(ConfigError, match="is being run by another process"):
        Lock(*experiment_of(tmp_path))
    end = threading.Timer(0.3, held.release)  # as a driver that is being killed does
    end.start()
    Lock(*experiment_of(tmp_path)).release()
    end.join()


# --- what a trial is told of itself


SAVED = {
    "number": 7, "name": "t0007-ce", "parameters": {"optim.lr": 0.1}, "epochs": 9, "storage": "/x", "metrics": ["val_nll"],
    "home": {"directory": "/h", "path": [], "safe": False}, "directory": "/x/e/trials/t0007-ce",
    "avoid": ["n1"], "own": 3,
}  # fmt: skip
"""As release 0.1.0 made it, and Ray has saved it; `own` is a user's."""


def test_the_section_that_an_earlier_release_has_saved_is_read_and_written_as_it_was() -> None:
    found = Assignment.of({SECTION: SAVED, "epochs": 9})
    assert found.place == (Directory(Path("/x")), Path("/x/e/trials/t0007-ce"))
    assert (found.number, found.directory, found.metrics, found.avoid) == (
        7, Path("e/trials/t0007-ce"), ("val_nll",), ("n1",)
    )  # fmt: skip
    assert found.section() == {k: v for k, v in SAVED.items() if v is not None}
    assert json.loads(json.dumps(found.section())) == found.section(), (
        "plain: Ray keeps it, and users read it"
    )
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.number = 8  # type: ignore[misc]
    plain = {k: SAVED[k] for k in ("number", "name", "parameters", "epochs")}
    assert Assignment.of({SECTION: plain}).section() == plain, "of a user's own trainable"


@pytest.mark.parametrize(
    "section", [None, 3, "name", {"name": "x"}, {k: SAVED[k] for k in ("number", "name")}]
)
def test_what_no_searcher_of_ours_has_made_is_no_assignment(section: Any) -> None:
    assert Assignment.find({SECTION: section}) is None and Assignment.find({}) is None
    with pytest.raises(
        ConfigError, match="trial: a trial needs number, name, epochs, parameters here, got"
    ):
        Assignment.of({SECTION: section})


def test_a_tensorboard_that_an_earlier_release_has_pickled_goes_on(tmp_path: Path) -> None:
    """Ray's `Tuner.restore` unpickles a run's callbacks."""
    state = {
        k: v
        for k, v in vars(TensorBoard(tmp_path / "tb", SPACE)).items()
        if k not in ("_listeners", "_told")
    }
    board = TensorBoard.__new__(TensorBoard)
    board.__setstate__(state)
    trial = trial_of(tmp_path, "a")
    board.setup()
    board.on_trial_start(0, [], trial)
    tell(board, trial, 1)
    board.on_trial_complete(0, [], trial)
    events = EventMultiplexer().AddRunsFromDirectory(str(tmp_path / "tb")).Reload()
    assert [s.step for s in events.Scalars("t0000-ce", "val/acc")] == [1]
