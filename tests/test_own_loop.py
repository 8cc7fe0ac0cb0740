"""Training loops of the user's own: the contract, resuming, what is refused, and from tune to confirm."""

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, Run
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer
from test_readers import make_sweep

from tfkd_ray import find_or_train
from tfkd_ray.learn.checkpoint import load_state
from tfkd_ray.learn.config import TrainConfig
from tfkd_ray.learn.images import random_position
from tfkd_ray.learn.loop import LOOP_VERSION, Diverged, train, train_in
from tfkd_ray.learn.own import only_reading
from tfkd_ray.settings.errors import ConfigError
from tfkd_ray.settings.schema import validated
from tfkd_ray.show.export import export
from tfkd_ray.show.plan import plan
from tfkd_ray.show.report import report
from tfkd_ray.space.arms import arms_of
from tfkd_ray.space.space import build_space, load_space
from tfkd_ray.store.experiment import read_experiment, read_records

EXAMPLES = ROOT / "examples"
LOOPS = """
import numpy as np
import torch
from torch.nn import functional as F
from tfkd_ray import Epoch

def parts(config, state):
    student = config.build_student()
    optimizer = torch.optim.SGD(student.parameters(), config.optim.lr, momentum=0.9)
    if state is not None:
        student.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    return student, optimizer

def told(epoch, student, **metrics):
    found = {"epoch": epoch, "train_loss": 1.0, "val_accuracy": 0.5, **metrics}
    return Epoch(found, lambda: {"model": student.state_dict()})

def good(config, state, teacher, width: int = 3):
    assert config.loop.args.get("width", 3) == width
    student, optimizer = parts(config, state)
    images, _ = config.data.load()
    for epoch in range(state["epoch"] + 1 if state else 1, config.epochs + 1):
        batch = torch.randperm(len(images))[:64]  # from the global generator
        noise = float(np.random.rand())
        logits = student(images.images[batch].float())
        soft = None if teacher is None else teacher(images.images[batch].float())
        assert soft is None or not soft.requires_grad and not teacher.training
        loss = config.objective.ready()(logits, images.labels[batch], soft)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        metrics = {"epoch": epoch, "train_loss": loss.item(), "val_accuracy": 0.5, "noise": noise}
        yield Epoch(metrics, lambda: {"model": student.state_dict(), "optimizer": optimizer.state_dict(), "seen": [epoch, "x"]})

def none(config, state, teacher):
    yield from ()
def short(config, state, teacher):
    yield told(1, config.build_student())
def skips(config, state, teacher):
    for epoch in (1, 3):
        yield told(epoch, config.build_student())
def zero(config, state, teacher):
    yield told(0, config.build_student())
def restarts(config, state, teacher):
    for epoch in (1, 2):
        yield told(epoch, config.build_student())
def more(config, state, teacher):
    for epoch in range(1, config.epochs + 2):
        yield told(epoch, config.build_student())
def nan(config, state, teacher):
    yield told(1, config.build_student(), train_loss=float("nan"))
def inf(config, state, teacher):
    yield told(1, config.build_student(), mine=float("inf"))
def a_tensor(config, state, teacher):
    yield told(1, config.build_student(), train_loss=torch.ones(()))
def text(config, state, teacher):
    yield told(1, config.build_student(), mine="0.5")
def reserved(config, state, teacher):
    yield told(1, config.build_student(), failed=1.0)
def number(config, state, teacher):
    yield 0.5
def no_metrics(config, state, teacher):
    yield Epoch(None, dict)
def no_state(config, state, teacher):
    yield Epoch({"epoch": 1, "train_loss": 1.0}, {"model": {}})
def no_loss(config, state, teacher):
    yield Epoch({"epoch": 1}, dict)
def no_model(config, state, teacher):
    yield Epoch({"epoch": 1, "train_loss": 1.0}, lambda: {"weights": {}})
def other_model(config, state, teacher):
    yield Epoch({"epoch": 1, "train_loss": 1.0}, lambda: {"model": torch.nn.Linear(2, 2).state_dict()})
def an_array(config, state, teacher):
    model = config.build_student().state_dict()
    yield Epoch({"epoch": 1, "train_loss": 1.0}, lambda: {"model": model, "mine": {"a": [np.zeros(2)]}})
def returns(config, state, teacher):
    return [told(1, config.build_student())]
def raises(config, state, teacher):
    yield told(1, config.build_student())
    raise ArithmeticError("of its own")
def too_few(config, state): yield
def needs_more(config, state, teacher, width): yield
three = 3

def cleans_up(config, state, teacher):
    student = config.build_student()
    try:
        for epoch in range(1, config.epochs + 1):
            yield told(epoch, student)
        with torch.no_grad():  # after its last epoch
            [p.zero_() for p in student.parameters()]
    finally:
        closed.append(epoch)
closed = []

def with_arrays(config, state, teacher):
    for epoch in range(1, config.epochs + 1):
        yield {"epoch": np.int64(epoch), "train_loss": np.float32(0.5)}, lambda: {"model": config.build_student().state_dict()}

def logits(config, network, images):
    assert images.dtype == torch.uint8 and not network.training and not torch.is_grad_enabled()
    return network(images.float()) + 100
def bad_shape(config, network, images): return network(images.float())[:-1]
def bad_type(config, network, images): return 0.5
def bad_numbers(config, network, images): return network(images.float()) / 0
"""
BASE: dict[str, Any] = {
    "objective": "ce",
    "epochs": 3,
    "student": {"name": "mlp", "hidden": [8]},
    "data": {"name": "digits", "subset": 300},
}
TEACHER: dict[str, Any] = {"teacher": {"model": {"name": "mlp", "hidden": [16]}}}


@pytest.fixture(scope="session")
def loops(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Write LOOPS as the module `loops_of_mine`, once."""
    folder = tmp_path_factory.mktemp("loops")
    (folder / "loops_of_mine.py").write_text(LOOPS)
    sys.path.append(str(folder))
    yield folder
    sys.path.remove(str(folder))


def run_of(name: str, *, test: str | None = None, **changes: Any) -> TrainConfig:
    args = changes.pop("args", {})
    loop = {"path": f"loops_of_mine:{name}", "args": args}
    loop |= {} if test is None else {"test": f"loops_of_mine:{test}"}
    return validated(TrainConfig, {**BASE, "loop": loop, **changes})


# --- what stays as it was


def test_a_run_without_a_loop_of_ones_own_is_written_and_named_as_before() -> None:
    plain = validated(TrainConfig, BASE)
    assert "loop" not in plain.model_dump(mode="json") and '"loop"' not in plain.model_dump_json()
    assert validated(TrainConfig, {**BASE, "loop": None}).fingerprint() == plain.fingerprint()
    assert plain.fingerprint(LOOP_VERSION) == "0f3a52d2f67e2d93", "as of release 0.1.0"
    assert "loop" not in build_space(dict(BASE)).tree


# --- the contract


def test_a_loop_gets_state_and_teacher_and_its_epochs_are_those_of_train(
    loops: Path, tmp_path: Path
) -> None:
    run = run_of("good", objective="kd", args={"width": 4}, **TEACHER)
    assert run.loop is not None and run.loop.digest is not None
    teacher = find_or_train(run, tmp_path)
    found = list(train(run, teacher=teacher))
    assert [epoch.metrics["epoch"] for epoch in found] == [1, 2, 3]
    last = found[-1].metrics
    assert last["parameters"] == 64 * 8 + 8 + 8 * 10 + 10
    assert last["seconds"] > 0 and last["images_per_s"] > 0 and 0 < last["noise"] < 1
    (about,) = (tmp_path / "teachers").glob("*/teacher.json")
    taught = json.loads(about.read_text())
    assert taught["config"]["loop"]["path"] == "loops_of_mine:good", "the same loop trains it"
    with pytest.raises(ValueError, match="needs a teacher"):
        next(train(run))


def test_a_resumed_loop_gives_the_numbers_of_one_that_never_stopped(
    loops: Path, tmp_path: Path
) -> None:
    run = run_of("good", checkpoint_every_s=0)
    whole = list(train_in(tmp_path / "whole", run))
    for k in (1, 2):
        folder = tmp_path / f"at-{k}"
        epochs = train_in(folder, run)
        for _ in range(k):
            next(epochs)
        epochs.close()
        kept = load_state(folder)
        assert kept is not None and kept["loop"]["seen"] == [k, "x"] and kept["epoch"] == k
        again = list(train_in(folder, run))
        timed = ("seconds", "images_per_s")
        assert [{n: v for n, v in m.items() if n not in timed} for m in again] == [
            {n: v for n, v in m.items() if n not in timed} for m in whole
        ]
        ends = [load_file(at / "student.safetensors") for at in (folder, tmp_path / "whole")]
        assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert [m["epoch"] for m in train_in(tmp_path / "whole", run)] == [1, 2, 3], "nothing to do"
    with pytest.raises(ValueError, match="the state is of another run"):
        list(train_in(tmp_path / "whole", run_of("good", seed=1)))


def test_a_loop_is_closed_however_its_run_ends_and_its_last_state_is_of_its_last_yield(
    loops: Path, tmp_path: Path
) -> None:
    closed: list[int] = importlib.import_module("loops_of_mine").closed
    closed.clear()
    begun = train(run_of("cleans_up"))
    next(begun)
    begun.close()
    assert closed == [1]
    list(train_in(tmp_path, run_of("cleans_up")))
    assert closed == [1, 3]
    kept = load_file(tmp_path / "student.safetensors")
    assert any(bool(value.any()) for value in kept.values()), "not what came after it"


def test_numbers_of_numpy_and_plain_pairs_are_epochs_too(loops: Path) -> None:
    found = list(train(run_of("with_arrays")))
    assert [type(epoch.metrics["train_loss"]) for epoch in found] == [float] * 3


def test_a_loop_leaves_the_generators_of_numpy_and_python_as_they_were(loops: Path) -> None:
    before = random_position()[:2]
    list(train(run_of("good")))
    assert random_position()[:2] == before


def test_a_teacher_that_stops_early_stops_the_loop(loops: Path, tmp_path: Path) -> None:
    tree = {"teacher": {**TEACHER["teacher"], "stop_epoch": 2}}
    find_or_train(run_of("good", objective="kd", **tree), tmp_path)
    (about,) = (tmp_path / "teachers").glob("*/teacher.json")
    assert json.loads(about.read_text())["metrics"]["epoch"] == 2


def test_the_searched_arguments_of_a_loop_are_not_its_teachers(loops: Path) -> None:
    taught = {"objective": "kd", **TEACHER}
    runs = [run_of("good", args={"width": n}, **taught).teacher_run() for n in (3, 4)]
    runs += [run_of("good", test="logits", **taught).teacher_run()]
    assert len({run.fingerprint() for run in runs if run is not None}) == 1
    with pytest.raises(ConfigError, match="the teacher is trained with its defaults; give each"):
        run_of("needs_more", args={"width": 4}, **taught)
    run_of("needs_more", args={"width": 4})


# --- what is refused

YIELDED = {
    "none": "yields no epoch; it must yield one Epoch for each of the 3 epochs",
    "short": "ends after epoch 1; it must yield one Epoch for each of the 3 epochs",
    "skips": "yields epoch 3 where epoch 2 is next; they count from 1",
    "zero": "yields epoch 0 where epoch 1 is next",
    "more": "yields another epoch after its last, 3 (config.epochs)",
    "a_tensor": "yields train_loss as a Tensor [], not a number; of a tensor take .item()",
    "text": "yields mine as a str, not a number",
    "reserved": "yields a metric called 'failed'",
    "number": "yields a float; it must yield Epoch(metrics, state)",
    "no_metrics": "yields metrics that are None, not a dictionary",
    "no_state": "yields a state that is a dict, not a function",
    "no_loss": "yields no 'train_loss' in metrics, only ['epoch']",
    "no_model": "yields a state at epoch 1 that has no state_dict under 'model'",
    "other_model": "yields a state whose 'model' does not fit the student mlp",
    "an_array": "yields a state at epoch 1 that has a ndarray at mine.a.0; a checkpoint holds",
    "returns": "returns a list; it must be a generator that yields epochs",
}


@pytest.mark.parametrize("name", YIELDED)
def test_what_breaks_the_contract_is_a_sentence(loops: Path, name: str) -> None:
    with pytest.raises(ConfigError) as error:
        list(train(run_of(name)))
    assert str(error.value).startswith(f"loop.path: loops_of_mine:{name} {YIELDED[name]}")


def test_a_loop_that_begins_again_after_a_resume_is_told_where_it_goes_on(
    loops: Path, tmp_path: Path
) -> None:
    run = run_of("restarts", epochs=3, checkpoint_every_s=0)
    begun = train_in(tmp_path, run)
    next(begun)
    begun.close()
    with pytest.raises(
        ConfigError, match=r"yields epoch 1 where epoch 2 is next.*state\['epoch'\]"
    ):
        list(train_in(tmp_path, run))


@pytest.mark.parametrize("name, what", [("nan", "train_loss is nan"), ("inf", "mine is inf")])
def test_numbers_that_are_not_finite_are_a_run_that_diverged(
    loops: Path, name: str, what: str
) -> None:
    with pytest.raises(Diverged, match=f"{what} at epoch 1; a smaller learning rate may help"):
        list(train(run_of(name)))


def test_an_error_of_a_loop_comes_through(loops: Path) -> None:
    with pytest.raises(ArithmeticError, match="of its own"):
        list(train(run_of("raises")))


REFUSED = {
    "missing": ({"loop": "loops_of_mine:goood"}, "loops_of_mine has no 'goood'; did you mean 'good'"),
    "no module": ({"loop": "nowhere:train"}, "there is no module 'nowhere'"),
    "no function": ({"loop": "loops_of_mine:three"}, "loops_of_mine:three is 3, not a function"),
    "few": ({"loop": "loops_of_mine:too_few"}, "cannot be called as function(config, state, teacher)"),
    "lacking": ({"loop": "loops_of_mine:needs_more"}, "missing a required argument: 'width'"),
    "argument": ({"loop": {"path": "loops_of_mine:good", "args": {"w": 1}}}, "got an unexpected keyword argument 'w'; see loop.args"),
    "test": ({"loop": {"path": "loops_of_mine:good", "test": "loops_of_mine:good"}}, ""),
    "workers": ({"loop": "loops_of_mine:good", "workers": 2}, "workers: a loop of your own trains in one process, got 2"),
    "init": ({"loop": "loops_of_mine:good", "init": "trained"}, "init: 'trained' is for the loop of this package"),
    "searched": ({"loop": {"choices": ["loops_of_mine:good", "loops_of_mine:short"]}}, "loop: one loop for the whole sweep; search its arguments"),
    "unknown": ({"loop": {"path": "loops_of_mine:good", "agrs": {}}}, "loop.agrs: no such setting; did you mean 'args'?"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_loop_that_cannot_be_called_is_refused_before_anything_starts(
    loops: Path, name: str
) -> None:
    changes, sentence = REFUSED[name]
    if not sentence:  # three parameters, as config, network and images
        build_space({**BASE, **changes})
        return
    with pytest.raises(ConfigError) as error:
        build_space({**BASE, **changes})
    assert sentence in str(error.value)


def test_the_arguments_of_a_loop_are_searched_as_real_numbers(loops: Path) -> None:
    args = {"width": {"low": 1, "high": 9, "step": 2}}
    space = build_space({**BASE, "loop": {"path": "loops_of_mine:good", "args": args}})
    assert [(p.name, p.domain.probes) for p in space.parameters] == [("loop.args.width", [1, 9])]
    args = {"width": {"low": 0, "high": 1}}
    space = build_space({**BASE, "loop": {"path": "loops_of_mine:good", "args": args}})
    assert repr([p.domain.probes for p in space.parameters]) == "[[0.0, 1.0]]"
    assert build_space(space.tree).parameters == space.parameters


@pytest.mark.slow
def test_code_that_has_changed_refuses_to_go_on_and_is_told_by_confirm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "swept_loop.py").write_text(LOOPS)
    objectives = ["tfkd_reg", "ce", "lsr"]
    make_sweep(tmp_path / "e", 24, 9, objective=objectives, loop="swept_loop:good")
    run = validated(TrainConfig, {**BASE, "loop": "swept_loop:good"})
    space = build_space(read_experiment(tmp_path / "e")["space"])
    before = arms_of(tmp_path / "e", top_k=1)
    assert before.note == ""
    (tmp_path / "swept_loop.py").write_text(LOOPS + "\n# changed\n")
    del sys.modules["swept_loop"]
    importlib.invalidate_caches()
    with pytest.raises(
        ConfigError, match=r"loop\.digest: the code of the loop good is not what it"
    ):
        next(train(run))
    with pytest.raises(
        ConfigError, match=r"loop\.digest: the code of the loop good is not what it"
    ):
        space.try_own_code()  # as resume does, before any trial
    after = arms_of(tmp_path / "e", top_k=1)
    assert (
        "Since the sweep the code of the loop good is not what it was: swept_loop.py" in after.note
    )
    assert "settings were tuned for the old code" in after.note
    assert after.arms[0].config.fingerprint() != before.arms[0].config.fingerprint()


def test_a_loop_that_breaks_the_contract_is_wrong_input_for_the_command_line(
    tfkd: Run, tmp_path: Path
) -> None:
    (tmp_path / "loops_of_mine.py").write_text(LOOPS)
    (tmp_path / "one.yaml").write_text(json.dumps({**BASE, "loop": "loops_of_mine:skips"}))
    run = tfkd("train", "one.yaml", "--out", "one")
    assert run.returncode == 2, run.stderr
    assert "loop.path: loops_of_mine:skips yields epoch 3 where epoch 2 is next" in run.stderr
    assert "Traceback" not in run.stderr


def test_an_experiment_with_a_loop_of_ones_own_is_read_without_its_code() -> None:
    tree = {**BASE, "loop": {"path": "nowhere:train", "digest": "0" * 16}}
    with only_reading():
        assert build_space(tree).tree["loop"]["digest"] == "0" * 16
    with pytest.raises(ConfigError, match="there is no module 'nowhere'"):
        build_space(tree)


# --- on test


@pytest.mark.parametrize(
    "name, sentence",
    [
        ("bad_shape", r"must return logits \[359, 10\], a tensor, got a Tensor \[358, 10\]"),
        ("bad_type", r"must return logits \[359, 10\], a tensor, got a float"),
        ("bad_numbers", "returns logits that are not finite numbers"),
    ],
)
def test_what_is_no_logits_on_test_is_a_sentence(loops: Path, name: str, sentence: str) -> None:
    run = run_of("good", test=name)
    assert run.loop is not None
    test = run.data.load_test()
    with pytest.raises(ConfigError, match=f"loop.test: loops_of_mine:{name} {sentence}"):
        run.loop.test_logits(run, run.build_student(), test)


# --- from tune to confirm


@pytest.mark.long
@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_loop_is_swept_stopped_early_resumed_shown_and_confirmed_by_its_test_function(
    ray_cluster: str, tfkd: Run, loops: Path, tmp_path: Path
) -> None:
    (tmp_path / "own_loop.py").write_text((EXAMPLES / "own_loop.py").read_text())
    (tmp_path / "loops_of_mine.py").write_text(LOOPS)
    (tmp_path / "own_loop.yaml").write_text((EXAMPLES / "own_loop.yaml").read_text())
    more = ("epochs=5", "data.subset=300", "search.num_samples=9")
    more = (*more, "loop.test=loops_of_mine:logits")
    run = tfkd("tune", "own_loop.yaml", "--name", "loop", *more, timeout=400)
    assert run.returncode == 0, run.stderr
    experiment = tmp_path / "tfkd_results/loop"
    records = read_records(experiment)
    assert {r.status for r in records} == {"done", "stopped"} and len(records) == 9
    assert all("loop.args.beta2" in r.parameters for r in records)
    tree = read_experiment(experiment)["space"]
    assert tree["loop"]["digest"] and tree["loop"]["test"] == "loops_of_mine:logits"
    run = tfkd("resume", str(experiment), "--add-trials", "3", timeout=400)
    assert run.returncode == 0, run.stderr
    assert len(read_records(experiment)) == 12
    events = EventMultiplexer().AddRunsFromDirectory(str(experiment / "tb")).Reload()
    assert len(events.Scalars(records[0].name, "val/acc")) == len(records[0].metrics)
    (page,) = report(experiment, tmp_path / "page.html")
    assert "own_loop:train" in page.read_text()
    few = ("--seeds", "2", "--baselines", "scaled")  # which nothing tunes
    run = tfkd("confirm", str(experiment), *few, "--name", "verdict", timeout=400)
    assert run.returncode == 0, run.stderr
    result = json.loads((tmp_path / "tfkd_results/verdict/confirm.json").read_text())
    assert result["verdicts"]
    for file in (tmp_path / "tfkd_results/verdict/trials").glob("*/test.safetensors"):
        assert float(load_file(file)["logits"].mean()) > 50, "they are the test function's"
    export(experiment, tmp_path / "student")


# --- the examples


def test_the_loop_of_the_example_is_plain_pytorch_in_under_40_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len((EXAMPLES / "own_loop.py").read_text().splitlines()) < 40
    monkeypatch.syspath_prepend(str(EXAMPLES))
    space = load_space(EXAMPLES / "own_loop.yaml", ["epochs=2", "data.subset=300"])
    assert space.try_own_code() == []
    for branch in space.branches:
        run = branch.example
        epochs = train(run, teacher=find_or_train(run, tmp_path))
        first = next(epochs)
        state = first.state()
        second = next(epochs).metrics
        again = next(train(run, state, teacher=find_or_train(run, tmp_path))).metrics
        assert again["val_nll"] == second["val_nll"] < first.metrics["val_nll"]


def test_a_plan_measures_the_epochs_of_a_loop_of_ones_own(loops: Path) -> None:
    found = plan(build_space({**BASE, "loop": "loops_of_mine:good"}), probe=True)
    assert found.seconds is not None and found.seconds > 0


def test_the_loop_of_the_example_with_accelerate_resumes_bit_identically(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    tree = {**BASE, "optim": {"lr": 0.01}, "loop": "accelerated_loop:train"}
    run = validated(TrainConfig, tree)
    epochs = train(run)
    first = next(epochs)
    state = first.state()
    second = next(epochs).metrics
    again = next(train(run, state)).metrics
    assert again["val_nll"] == second["val_nll"] < first.metrics["val_nll"]


@pytest.mark.long
@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_text_of_the_example_is_distilled_and_ends_in_a_verdict(
    ray_cluster: str, tfkd: Run, tmp_path: Path
) -> None:
    for name in ("own_loop.py", "text.py", "text.yaml"):
        (tmp_path / name).write_text((EXAMPLES / name).read_text())
    more = ("epochs=2", "search.num_samples=3", "data.args.pieces=40")
    run = tfkd("check", "text.yaml", *more)
    assert run.returncode == 0, run.stderr
    run = tfkd("tune", "text.yaml", "--name", "text", *more, timeout=300)
    assert run.returncode == 0, run.stderr
    experiment = tmp_path / "tfkd_results/text"
    assert [r.objective for r in read_records(experiment)].count("kd") == 1
    few = ("--seeds", "2", "--baselines", "scaled")  # which nothing tunes
    run = tfkd("confirm", str(experiment), *few, "--name", "verdict", timeout=300)
    assert run.returncode == 0, run.stderr
    result = json.loads((tmp_path / "tfkd_results/verdict/confirm.json").read_text())
    (verdict,) = result["verdicts"]
    assert verdict["text"] and {arm["role"] for arm in result["arms"]} >= {"candidate", "baseline"}
    run = tfkd("export", str(experiment), "-o", "student", timeout=200)
    assert run.returncode == 0, run.stderr
