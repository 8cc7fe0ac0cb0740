"""Teachers: trained once, named by their configuration, checked when loaded."""

import hashlib
import multiprocessing
import re
import time
from pathlib import Path

import pytest
import torch

from tfkd_ray.learn import teachers
from tfkd_ray.learn.config import TeacherConfig, TeacherRun, TrainConfig
from tfkd_ray.learn.loop import train
from tfkd_ray.learn.models import Mlp
from tfkd_ray.learn.objectives import CrossEntropy, TfkdSelf
from tfkd_ray.learn.teachers import (
    PROGRESS,
    find_or_train,
    load_teacher,
    progress_of,
    progress_teller,
    take_weights,
    teacher_folder,
    teacher_name,
    train_teacher,
)
from tfkd_ray.run.tune import train_teachers
from tfkd_ray.settings.errors import ConfigError
from tfkd_ray.settings.schema import validated
from tfkd_ray.settings.yaml import Numbers
from tfkd_ray.store.storage import Directory

RUN = TeacherRun(objective=CrossEntropy(), student=Mlp(hidden=(8,)), epochs=2)


def test_a_teacher_is_trained_once_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[float] = []
    about = train_teacher(RUN, tmp_path, lambda m: seen.append(m["epoch"]))
    assert seen == [1.0, 2.0] and about["metrics"]["val_accuracy"] > 0.3
    monkeypatch.setattr(teachers, "train_in", lambda *a: pytest.fail("trained again"))
    assert train_teacher(RUN, tmp_path) == about
    assert sorted(p.name for p in teacher_folder(RUN, tmp_path).iterdir()) == [
        ".lock",
        "student.safetensors",
        "teacher.json",
    ]


def test_how_far_a_teacher_is_can_be_read_while_it_trains(tmp_path: Path) -> None:
    storage, seen = Directory(tmp_path), list[float]()
    assert progress_of(RUN, storage) == {}
    tell = progress_teller(RUN, storage)

    def look(metrics: Numbers) -> None:
        tell(metrics)
        seen.append(progress_of(RUN, storage)["epoch"])
        assert progress_of(RUN, storage)["val_accuracy"] == metrics["val_accuracy"]

    train_teacher(RUN, tmp_path, look)
    assert seen == [1.0, 2.0] and progress_of(RUN, storage) == {}


def test_progress_that_is_cut_is_no_progress(tmp_path: Path) -> None:
    path = teacher_folder(RUN, tmp_path) / PROGRESS
    path.parent.mkdir(parents=True)
    path.write_text('{"epoch": ')
    assert progress_of(RUN, Directory(tmp_path)) == {}


def test_the_loaded_teacher_is_the_trained_one(tmp_path: Path) -> None:
    config = TrainConfig(
        objective=TfkdSelf(), student=Mlp(hidden=(8,)), teacher=TeacherConfig(epochs=2)
    )
    teacher = find_or_train(config, tmp_path)
    assert teacher is not None and not teacher.network().training
    again = find_or_train(config, tmp_path)
    assert again is not None
    x = torch.randn(3, 1, 8, 8)
    assert teacher.network()(x).equal(again.network()(x))
    assert find_or_train(RUN, tmp_path) is None


def test_the_name_changes_with_everything_that_makes_the_teacher(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = {
        teacher_name(RUN.model_copy(update=u))
        for u in ({}, {"seed": 1}, {"epochs": 3}, {"student": Mlp(hidden=(9,))})
    }
    monkeypatch.setattr(teachers, "LOOP_VERSION", 99)
    assert len(names | {teacher_name(RUN)}) == 5
    assert all(n.startswith("mlp-") for n in names)


def test_a_damaged_teacher_is_refused(tmp_path: Path) -> None:
    train_teacher(RUN, tmp_path)
    path = teacher_folder(RUN, tmp_path) / "student.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match="damaged"):
        load_teacher(RUN, tmp_path)


def test_a_missing_teacher_is_explained(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="this node does not reach the driver's storage"):
        load_teacher(RUN, tmp_path)


def _train(storage: Path, times: "multiprocessing.Queue[int]") -> None:
    count = 0

    def on_epoch(metrics: dict[str, float]) -> None:
        nonlocal count
        count += 1
        time.sleep(0.1)

    train_teacher(RUN, storage, on_epoch)
    times.put(count)


def test_two_processes_train_it_once(
    tmp_path: Path, forkserver: multiprocessing.context.ForkServerContext
) -> None:
    epochs: multiprocessing.Queue[int] = forkserver.Queue()
    both = [forkserver.Process(target=_train, args=(tmp_path, epochs)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert sorted([epochs.get(), epochs.get()]) == [0, 2]


# --- De-KD, double training, teachers from elsewhere


def test_a_stopped_teacher_is_the_full_run_cut_short(tmp_path: Path) -> None:
    whole = TeacherRun(objective=CrossEntropy(), student=Mlp(hidden=(8,)), epochs=4)
    cut = whole.model_copy(update={"stop_epoch": 2})
    about = train_teacher(cut, tmp_path)
    second = [e.metrics for e in train(whole)][1]
    assert about["metrics"]["epoch"] == 2 and about["metrics"]["train_loss"] == second["train_loss"]
    assert load_teacher(cut, tmp_path) is not None and teacher_name(cut) != teacher_name(whole)


def test_a_teacher_can_be_stopped_at_an_accuracy(tmp_path: Path) -> None:
    run = TeacherRun(
        objective=CrossEntropy(), student=Mlp(hidden=(32,)), epochs=20, stop_accuracy=0.6
    )
    metrics = train_teacher(run, tmp_path)["metrics"]
    assert 0.6 <= metrics["val_accuracy"] < 0.95 and metrics["epoch"] < 20
    with pytest.raises(
        ConfigError, match=r"teacher.stop_accuracy: 0.99 was not reached in 1 epochs, only 0\.\d+"
    ):
        train_teacher(run.model_copy(update={"epochs": 1, "stop_accuracy": 0.99}), tmp_path)


def test_double_training_starts_from_the_trained_student(tmp_path: Path) -> None:
    config = TrainConfig(
        objective=CrossEntropy(), student=Mlp(hidden=(8,)), epochs=3, init="trained"
    )
    first = find_or_train(config, tmp_path)
    assert first is not None
    again = list(train(config, teacher=first))
    plain = list(train(config.model_copy(update={"init": "random"})))
    assert again[0].metrics["train_loss"] < 0.7 * plain[0].metrics["train_loss"]
    assert "train_kd" not in again[0].metrics


def test_a_teacher_from_a_file_is_taken_judged_and_watched(tmp_path: Path) -> None:
    torch.manual_seed(0)
    made = Mlp(hidden=(8,)).build((1, 8, 8), 10)
    path = tmp_path / "mine.pt"
    torch.save(made.state_dict(), path)
    tree = {
        "objective": "kd",
        "student": {"name": "mlp", "hidden": [4]},
        "teacher": {"model": {"name": "mlp", "hidden": [8]}, "weights": str(path)},
    }
    config = validated(TrainConfig, tree)
    teacher = find_or_train(config, tmp_path)
    assert teacher is not None
    x = torch.randn(3, 1, 8, 8)
    assert teacher.network()(x).equal(made.eval()(x))
    run = config.teacher_run()
    assert run is not None and 0 < teachers.describe(run, tmp_path)["metrics"]["val_accuracy"] < 0.5
    torch.save(Mlp(hidden=(8,)).build((1, 8, 8), 10).state_dict(), path)
    with pytest.raises(ConfigError, match="has changed since it was loaded as teacher mlp-"):
        find_or_train(config, tmp_path)
    path.unlink()  # it is no longer needed
    assert find_or_train(config, tmp_path) is not None


def test_a_doubtful_teacher_is_told_by_what_trains_a_sweeps_teachers_each_time(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    network = Mlp(hidden=(32,)).build((1, 8, 8), 10)
    torch.save({name: value * 0 for name, value in network.state_dict().items()}, tmp_path / "w.pt")
    teacher = {"model": {"name": "mlp", "hidden": [32]}, "weights": str(tmp_path / "w.pt")}
    run = (
        validated(TrainConfig, {"objective": "kd", "student": "mlp", "teacher": teacher})
        .pinned()
        .teacher_run()
    )
    assert run is not None
    train_teacher(run, tmp_path)
    for _ in range(2):
        said: list[str] = []
        train_teachers([run], Directory(tmp_path), on_note=said.append)
        assert (
            len(said) == 1
            and said[0].startswith("WARNING: teacher ")
            and not capfd.readouterr().err
        )
    train_teachers([run], Directory(tmp_path))
    assert said[0] in capfd.readouterr().err


def test_a_task_judges_weights_whose_file_only_the_driver_sees(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, network = tmp_path / "w.pt", Mlp(hidden=(32,)).build((1, 8, 8), 10)
    torch.save(network.state_dict(), file)
    teacher = {"model": {"name": "mlp", "hidden": [32]}, "weights": str(file)}
    tree = {"objective": "kd", "student": "mlp", "teacher": teacher, "workers": 2}
    run = validated(TrainConfig, tree).pinned().teacher_run()
    assert run is not None and run.workers == 1
    monkeypatch.setattr(teachers, "evaluate", lambda *given: pytest.fail("judged by the driver"))
    take_weights(run, tmp_path)
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    monkeypatch.undo()
    file.unlink()  # as on another node
    about = train_teacher(run, tmp_path)
    assert about["source_sha256"] == sha256 and 0 < about["metrics"]["val_accuracy"] < 1
    loaded = load_teacher(run, tmp_path).state_dict()
    assert all(loaded[name].equal(value) for name, value in network.state_dict().items())


def test_a_teacher_has_as_many_workers_as_its_students_and_their_batch_statistics() -> None:
    tree = {"objective": "kd", "student": "mlp", "teacher": "cnn", "workers": 3}
    run = validated(TrainConfig, {**tree, "placement": "spread"}).teacher_run()
    one = validated(TrainConfig, {**tree, "workers": 1}).teacher_run()
    assert run is not None and one is not None
    assert (run.workers, run.placement) == (3, "spread")
    assert run.fingerprint() == one.fingerprint()
    small = {**tree, "teacher": {"model": "cnn", "optim": {"batch_size": 2}}}
    with pytest.raises(ConfigError, match=r"teacher.optim.batch_size: 3 workers cannot share 2"):
        validated(TrainConfig, small)


@pytest.mark.parametrize("moved", [[1, 0], [1, 2, 0], [1, 0, 3, 2], []], ids=str)
def test_a_teacher_that_takes_some_classes_for_one_another_is_told(
    moved: list[int], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """It is far better than guessing, as most of its classes are in the data's order."""
    network = Mlp(hidden=(32,))
    good = validated(TrainConfig, {"objective": "ce", "student": network.model_dump(), "epochs": 6})
    weights = list(train(good))[-1].state()["model"]
    order = [*moved, *range(len(moved), 10)]
    weights = {k: v[order] if k.startswith("3") else v for k, v in weights.items()}
    torch.save(weights, tmp_path / "w.pt")
    teacher = {"model": network.model_dump(), "weights": str(tmp_path / "w.pt")}
    run = validated(TrainConfig, {"objective": "kd", "student": "mlp", "teacher": teacher})
    for _ in range(2):
        find_or_train(run, tmp_path)
        told = capfd.readouterr().err
        assert ("WARNING" in told) == bool(moved)
        if moved:
            shown = ", ".join(f"{k} is {label}" for k, label in enumerate(moved))
            assert f"has {len(moved)} classes in another order than the data ({shown})" in told


@pytest.mark.parametrize("fault", ["order", "constant", "none", "nonsense"])
def test_a_teacher_no_better_than_guessing_is_told_before_students_train_and_each_time(
    fault: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    network = Mlp(hidden=(32,))
    good = validated(TrainConfig, {"objective": "ce", "student": network.model_dump(), "epochs": 6})
    weights = list(train(good))[-1].state()["model"]
    if fault == "order":
        weights = {k: v.roll(1, 0) if k.startswith("3") else v for k, v in weights.items()}
    if fault == "constant":
        weights["3.bias"][7] += 1e3
    if fault == "nonsense":
        weights = {k: -v.flip(0) if k == "1.weight" else v for k, v in weights.items()}
    torch.save(weights, tmp_path / "w.pt")
    teacher = {"model": network.model_dump(), "weights": str(tmp_path / "w.pt")}
    run = validated(TrainConfig, {"objective": "kd", "student": "mlp", "teacher": teacher})
    cause = {
        "order": "its classes are in another order .* it would classify 9",
        "constant": "it assigns class 7 to .*: it is",
    }
    for _ in range(2):
        find_or_train(run, tmp_path)
        told = capfd.readouterr().err
        if fault == "none":
            assert not told
        elif fault in cause:
            assert re.search(
                f"WARNING: teacher .* of the validation split correctly; guessing would reach 1.*{cause[fault]}",
                told,
            ), told
