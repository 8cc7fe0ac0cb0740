"""The loop: its computations, stopping and resuming bit by bit, and agreement of workers."""

import errno
import functools
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import AT_ONCE, TwoWorkers, long_after
from torch import Tensor, nn

from tfkd_ray.learn import loop
from tfkd_ray.learn.augment import Augment
from tfkd_ray.learn.checkpoint import LAST, WEIGHTS, load_state, load_weights, save_state
from tfkd_ray.learn.config import Constant, Step, TrainConfig
from tfkd_ray.learn.data import Digits
from tfkd_ray.learn.evaluate import predictions, tf32
from tfkd_ray.learn.images import ImageSet
from tfkd_ray.learn.loop import (
    Diverged,
    Epoch,
    epoch_order,
    gradient_norms,
    gradient_ratio,
    split_batches,
    train,
    train_in,
)
from tfkd_ray.learn.models import Cnn, Mlp
from tfkd_ray.learn.objectives import CrossEntropy, LabelSmoothing, TfkdReg, TfkdSelf
from tfkd_ray.learn.optimizers import OptimConfig
from tfkd_ray.settings.schema import validated
from tfkd_ray.verdict.scores import scores

TIMES = {
    "seconds",
    "images_per_s",
    "train_kd_ratio",
}  # the ratio: of the first worker's part of a batch


def config(**changes: Any) -> TrainConfig:
    tree = {
        "objective": {"name": "ce"},
        "student": {"name": "mlp", "hidden": [16]},
        "epochs": 3,
        **changes,
    }
    return validated(TrainConfig, tree)


def numbers(epochs: list[Epoch] | list[dict[str, float]]) -> list[dict[str, float]]:
    """Return metrics without times."""
    metrics = [e.metrics if isinstance(e, Epoch) else e for e in epochs]
    return [{k: v for k, v in m.items() if k not in TIMES} for m in metrics]


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Return True if two trees of tensors are equal, bit by bit."""
    return a.keys() == b.keys() and all(
        same(v, b[k])
        if isinstance(v, dict)
        else v.equal(b[k])
        if isinstance(v, Tensor)
        else v == b[k]
        for k, v in a.items()
        if k != "history"
    )


# --- what it computes


def plain(shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """A user's network, which relies on the order of pixels in memory."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution = nn.Conv2d(shape[0], 4, 3, padding=1)
            self.last = nn.Linear(4 * shape[1] * shape[2], num_classes)

        def forward(self, images: Tensor) -> Tensor:
            features = self.convolution(images).relu()
            return cast(Tensor, self.last(features.view(len(images), -1)))

    return Net()


@pytest.mark.slow
@pytest.mark.parametrize("student", [{"name": "cnn", "widths": [16, 32]}, f"{__name__}:plain"])
def test_bfloat16_changes_the_arithmetic_and_not_the_outcome(student: Any) -> None:
    found = {}
    for precision in ("fp32", "bf16"):
        last = list(train(config(student=student, epochs=6, precision=precision)))[-1]
        assert all(v.dtype != torch.bfloat16 for v in last.state()["model"].values())
        found[precision] = last.metrics
    assert found["bf16"]["val_nll"] != found["fp32"]["val_nll"]
    assert found["bf16"]["val_accuracy"] == pytest.approx(found["fp32"]["val_accuracy"], abs=0.04)
    assert found["fp32"]["val_accuracy"] > 0.8


@pytest.mark.slow
def test_a_compiled_step_is_the_same_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced by torch.compile, without a C++ compiler."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    off, on = (list(train(config(epochs=2, compile=word))) for word in ("off", "on"))
    assert numbers(on) == numbers(off)
    assert set(on[-1].state()["model"]) == set(off[-1].state()["model"])


def test_an_epoch_is_the_textbook_loop() -> None:
    """Compare with torch's own SGD, without a DataLoader but otherwise the common loop."""
    c = config(
        epochs=2, optim={"lr": 0.05, "weight_decay": 1e-3, "nesterov": True, "batch_size": 100}
    )
    ours = list(train(c))[-1].state()["model"]
    from tfkd_ray.learn.images import address

    torch.manual_seed(address(0, "init"))
    net = Mlp(hidden=(16,)).build((1, 8, 8), 10)
    optimizer = torch.optim.SGD(
        net.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3, nesterov=True
    )
    images, _ = Digits().load()
    for epoch in range(2):
        batches = epoch_order(images, 0, epoch).split(100)
        for step, batch in enumerate(batches):
            for group in optimizer.param_groups:
                group["lr"] = 0.05 * c.schedule.factor(epoch + (step + 0.5) / len(batches), 2)
            x = (images.images[batch].float() - Digits.mean[0]) / Digits.std[0]
            loss = F.cross_entropy(net(x), images.labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    for name, value in net.state_dict().items():
        assert torch.allclose(ours[name], value, atol=1e-6), name


def test_no_gradient_is_in_memory_during_a_forward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    held, learn = [], loop._learn

    def looked(forward: Any, *given: Any) -> Any:
        held.append(any(p.grad is not None for p in forward.parameters()))
        return learn(forward, *given)

    monkeypatch.setattr(loop, "_learn", looked)
    next(train(config(epochs=1)))
    assert len(held) > 1 and not any(held)


def test_a_step_seeds_as_torch_does_without_a_look_at_each_kind_of_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    c = config(student={"name": "mlp", "hidden": [16], "dropout": 0.5}, epochs=1)
    ours, called, seed_all = numbers(list(train(c))), list[int](), torch.manual_seed
    monkeypatch.setattr(torch, "manual_seed", lambda seed: called.append(seed) or seed_all(seed))
    assert numbers(list(train(c))) == ours and len(called) < 2
    monkeypatch.setattr(loop, "_seed_generators", lambda device, seed: torch.manual_seed(seed))
    assert numbers(list(train(c))) == ours and len(called) > 2
    gpus = [torch.Generator(), torch.Generator()]
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "default_generators", gpus)
    loop._seed_generators(torch.device("cuda", 1), 7)
    assert [g.initial_seed() == 7 for g in gpus] == [False, True]


def test_students_learn_real_digits() -> None:
    last = list(train(config(epochs=15, student={"name": "mlp", "hidden": [32]})))[-1].metrics
    assert last["val_accuracy"] > 0.93 and last["val_nll"] < 0.3


def test_the_parts_of_the_loss_are_unweighted_and_add_up() -> None:
    objective = TfkdReg(alpha=0.3, temperature=5.0, loss_scale=0.5)
    for epoch in train(config(objective=objective.model_dump(), epochs=2)):
        m = epoch.metrics
        assert m["train_loss"] == pytest.approx(
            0.5 * (0.7 * m["train_ce"] + 0.3 * 25 * m["train_kd"]), rel=1e-5
        )


def test_plain_training_has_no_kd_part() -> None:
    assert "train_kd" not in next(train(config())).metrics


def test_the_student_is_in_train_mode_in_every_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[bool] = []

    class Spy(torch.nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            modes.append(self.training)
            return super().forward(x.flatten(1))

    monkeypatch.setattr(Mlp, "build", lambda self, shape, K: Spy(64, K))
    list(
        train(config(optim={"batch_size": 2000}))
    )  # one step an epoch, then one batch of validation
    assert modes == [True, False] * 3


def test_the_learning_rate_follows_the_schedule() -> None:
    c = config(epochs=10, schedule=Step(warmup_epochs=0).model_dump(), optim={"lr": 0.1})
    assert [round(e.metrics["lr"], 9) for e in train(c)] == [0.1] * 3 + [0.02] * 3 + [0.004] * 2 + [
        0.0008
    ] * 2


def test_one_epoch_of_one_step_trains() -> None:
    run = train(config(epochs=1, optim={"lr": 0.1, "batch_size": 2000}))
    assert next(run).metrics["lr"] > 0.05


def test_a_teacher_is_left_alone() -> None:
    teacher = Mlp(hidden=(8,)).build((1, 8, 8), 10).train()
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    c = config(objective={"name": "kd"}, teacher={"model": {"name": "mlp", "hidden": [8]}})
    list(train(c, teacher=teacher))
    assert same(before, teacher.state_dict()) and not teacher.training
    assert all(p.grad is None for p in teacher.parameters())


def test_a_missing_teacher_is_said() -> None:
    with pytest.raises(ValueError, match="objective tfkd_self: needs a teacher"):
        next(train(config(objective=TfkdSelf().model_dump())))


def test_a_diverging_run_says_at_which_epoch() -> None:
    with pytest.raises(
        Diverged, match=r"train_loss is (nan|inf) at epoch \d; a smaller optim.lr may help"
    ):
        list(train(config(optim={"lr": 1e20})))


# --- common random numbers


@pytest.mark.parametrize("say", [True, False])
def test_a_run_whose_loss_explodes_without_becoming_infinite_is_told_once(
    say: bool, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    heard: list[str] = []
    run = config(student=f"{__name__}:loud", optim={"lr": 1e-12})
    last = list(train_in(tmp_path, run, say=heard.append if say else None))[-1]
    assert 230 < last["val_nll"] < float("inf")
    told = "\n".join(heard) if say else capfd.readouterr().err
    assert told.count("training has exploded") == 1 and "guessing would reach 2.3" in told
    heard.clear()
    list(train_in(tmp_path / "fine", config(), say=heard.append))
    assert not heard


@pytest.mark.slow
def test_a_head_that_starts_at_zero_learns_from_standardised_logits_and_relations() -> None:
    teacher = Mlp(hidden=(32,))
    made = teacher.build((1, 8, 8), 10)
    made.load_state_dict(
        list(train(config(student=teacher.model_dump(), epochs=8)))[-1].state()["model"]
    )
    for objective, precision in (
        ("kd_standardised", "fp32"),
        ("dist", "fp32"),
        ("kd_standardised", "bf16"),
    ):
        run = config(objective=objective, student=f"{__name__}:zero_head", precision=precision, epochs=6,
                     teacher={"model": teacher.model_dump()})  # fmt: skip
        last = list(train(run, teacher=made))[-1].metrics
        assert last["val_nll"] < 1 and last["val_accuracy"] > 0.85, objective


def loud(shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """Return large logits, as after far too large a step."""
    network = Mlp(hidden=(16,)).build(shape, num_classes)
    nn.init.normal_(network.get_parameter("3.weight"), std=1e6)
    return network


def zero_head(shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    network = Mlp(hidden=(64,)).build(shape, num_classes)
    for parameter in cast(nn.Sequential, network)[-1].parameters():
        nn.init.zeros_(parameter)
    return network


def test_a_teacher_that_is_no_number_is_named_as_the_cause() -> None:
    broken = Mlp(hidden=(16,)).build((1, 8, 8), 10)
    nn.init.constant_(broken.get_parameter("1.bias"), float("inf"))
    run = config(objective="kd", teacher={"model": {"name": "mlp", "hidden": [16]}})
    with pytest.raises(Diverged, match="the teacher's logits are not finite numbers"):
        next(train(run, teacher=broken))


def test_trials_differ_by_their_hyperparameters_and_nothing_else() -> None:
    a, b = (
        next(train(config())),
        next(train(config(objective=LabelSmoothing(alpha=0.0).model_dump()))),
    )
    assert a.metrics["train_ce"] == pytest.approx(b.metrics["train_ce"], rel=1e-6)
    assert next(train(config(seed=1))).metrics["train_ce"] != a.metrics["train_ce"]


def test_the_order_is_a_permutation_that_does_not_depend_on_what_else_is_in_the_split() -> None:
    whole, _ = Digits().load()
    half = ImageSet(whole.images[::2], whole.labels[::2], whole.positions[::2], whole.official_size)
    order = epoch_order(whole, 0, 3)
    assert sorted(order.tolist()) == list(range(len(whole)))
    kept = [p for p in whole.positions[order].tolist() if p in set(half.positions.tolist())]
    assert half.positions[epoch_order(half, 0, 3)].tolist() == kept
    assert epoch_order(whole, 0, 4).tolist() != order.tolist()


@pytest.mark.parametrize(
    "n, size, workers, sizes",
    [(10, 4, 1, [4, 4, 2]), (9, 4, 1, [4, 5]), (9, 4, 2, [4, 5]), (3, 4, 2, [3])],
)
def test_a_last_batch_too_small_for_its_workers_is_joined(
    n: int, size: int, workers: int, sizes: list[int]
) -> None:
    assert [len(b) for b in split_batches(torch.arange(n), size, workers)] == sizes


# --- stop and resume

RUNS = {
    "mlp with dropout": config(student={"name": "mlp", "hidden": [16], "dropout": 0.3}, epochs=4),
    "cnn with batch statistics": config(
        student={"name": "cnn", "widths": [4]}, epochs=4, schedule="step"
    ),
    "tfkd_reg, nesterov": config(
        objective={"name": "tfkd_reg"}, optim={"nesterov": True, "batch_size": 50}, epochs=4
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS.keys())
@pytest.mark.parametrize("stop", [1, 2, 3])
def test_stop_and_resume_equals_never_stopped(run: TrainConfig, stop: int, tmp_path: Path) -> None:
    whole = list(train(run))
    first = train(run)
    states = [next(first) for _ in range(stop)]
    state = states[-1].state()
    first.close()
    rest = list(train(run, state))
    assert numbers(states) + numbers(rest) == numbers(whole)
    assert same(rest[-1].state(), whole[-1].state())


def test_a_state_is_a_copy_that_training_does_not_touch() -> None:
    run = train(config())
    state = next(run).state()
    weights = {k: v.clone() for k, v in state["model"].items()}
    next(run)
    assert same(weights, state["model"])


def test_the_state_of_another_run_is_refused() -> None:
    state = next(train(config())).state()
    with pytest.raises(ValueError, match="the state is of another run"):
        next(train(config(seed=1), state))


def test_closing_gives_the_threads_back() -> None:
    before = torch.get_num_threads()
    run = train(config(cpus_per_worker=before + 1))
    next(run)
    assert torch.get_num_threads() == before + 1
    run.close()
    assert torch.get_num_threads() == before


def test_a_run_in_a_directory_leaves_its_last_state_and_its_weights(tmp_path: Path) -> None:
    metrics = list(train_in(tmp_path, config(checkpoint_every_s=0)))
    assert numbers(metrics) == numbers(list(train(config())))
    state = load_state(tmp_path)
    assert state is not None and state["epoch"] == 3
    assert same(load_weights(tmp_path / WEIGHTS), state["model"])


def test_a_closed_run_saves_itself_and_goes_on_there(tmp_path: Path) -> None:
    run = train_in(tmp_path, config())
    first = [next(run), next(run)]
    assert not (tmp_path / LAST).exists()  # 10 s are not over
    run.close()
    state = load_state(tmp_path)
    assert state is not None and state["epoch"] == 2
    again = list(train_in(tmp_path, config()))
    assert again[:2] == first and numbers(again) == numbers(list(train(config())))


def test_a_slow_disk_delays_no_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first state is written slowly; the next epochs are trained meanwhile, without a save."""
    may_write, saved = threading.Event(), list[int]()

    def slow(directory: Path, state: dict[str, Any]) -> None:
        assert may_write.wait(60)
        save_state(directory, state)
        saved.append(state["epoch"])

    monkeypatch.setattr("tfkd_ray.learn.loop.save_state", slow)
    c = config(checkpoint_every_s=0, epochs=6)
    run = train_in(tmp_path, c)
    first = [next(run) for _ in range(5)]  # would hang if an epoch waited
    assert saved == [] and not (tmp_path / LAST).exists()
    may_write.set()
    assert numbers([*first, *run]) == numbers(list(train(c)))
    assert (
        saved[0] == 1 and saved[-1] == 6
    )  # of the state after epoch 1, though five more were trained
    state = load_state(tmp_path)
    assert state is not None and state["epoch"] == 6


@pytest.mark.slow
def test_a_full_disk_costs_a_checkpoint_and_that_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two states fail for lack of room, later ones are written; a kill costs no more than usual."""
    room, tried = [False], list[float]()

    def limited(directory: Path, state: dict[str, Any]) -> None:
        tried.append(state["epoch"])
        if not room[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "last.ckpt")
        save_state(directory, state)

    monkeypatch.setattr("tfkd_ray.learn.loop.save_state", limited)
    said: list[str] = []
    c = config(checkpoint_every_s=0, epochs=40)
    run = train_in(tmp_path, c, say=said.append)
    while len(tried) < 3:
        next(run)
    assert len(said) == 1 and said[0] == (
        "no checkpoint: [Errno 28] No space left on device: 'last.ckpt'; training continues, and the next checkpoint is tried in 0 s"
    )
    run_on = next(run)
    room[0] = True
    run.close()  # saves what is unsaved: all of it, after the failures
    state = load_state(tmp_path)
    assert state is not None and state["epoch"] == run_on["epoch"] and len(said) == 1
    room[0] = False
    with pytest.raises(OSError, match="No space left"):  # the last one must exist
        list(train_in(tmp_path, c, say=said.append))
    room[0] = True
    assert numbers(list(train_in(tmp_path, c))) == numbers(list(train(c)))


def test_a_run_that_is_stopped_for_good_saves_nothing(tmp_path: Path) -> None:
    run = train_in(tmp_path, config())
    next(run)
    with pytest.raises(KeyError):
        run.throw(KeyError("stopped"))
    assert not list(tmp_path.iterdir())


def test_a_finished_run_is_told_again_without_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = list(train_in(tmp_path, config()))
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self: pytest.fail("trained again"))
    assert list(train_in(tmp_path, config())) == whole


# --- one worker or two


def _worker(rank: int, folder: str, tree: dict[str, Any]) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    for epoch in train(validated(TrainConfig, tree), more_metrics=AT_ONCE):
        last = epoch
    if rank == 0:
        torch.save(last.state(), f"{folder}/state.pt")
    dist.barrier()
    dist.destroy_process_group()
    # the tests are over; torch's threads have aborted here at interpreter exit (about once in 80
    # runs, on a busy machine: "terminate called without an active exception"), so exit without them
    os._exit(0)


AGREE = [CrossEntropy(), TfkdReg(alpha=0.5, temperature=4.0)]


@pytest.mark.parametrize("objective", long_after(1, AGREE), ids=lambda o: o.name)
def test_two_workers_agree_with_one(
    objective: CrossEntropy, tmp_path: Path, as_two_workers: TwoWorkers
) -> None:
    """No batch statistics, no dropout: 1,151 images in batches of 64 leave a last batch of 63."""
    c = config(
        objective=objective.model_dump(),
        optim=OptimConfig(batch_size=64).model_dump(),
        schedule=Constant().model_dump(),
    )
    one = list(train(c, more_metrics=AT_ONCE))[-1].state()
    as_two_workers(_worker, str(tmp_path), c.model_dump(mode="json"))
    two = torch.load(tmp_path / "state.pt", weights_only=True)
    for name, value in one["model"].items():
        assert (two["model"][name] - value).abs().max() < 1e-5, name
    for a, b in zip(numbers(one["history"]), numbers(two["history"]), strict=True):
        assert b == pytest.approx(a, abs=1e-5)
        assert set(AT_ONCE) <= set(b)


def test_metrics_that_are_asked_for_are_those_of_the_last_weights_and_change_no_other_number() -> (
    None
):
    c = config()
    asked = list(train(c, more_metrics=("val_accuracy", "parameters", *AT_ONCE)))
    _, val = c.data.load()
    assert val is not None
    student = c.build_student()
    student.load_state_dict(asked[-1].state()["model"])
    logits, labels = (
        torch.cat(parts).numpy() for parts in zip(*predictions(student, val, c.data), strict=True)
    )
    expected = scores(logits, labels)
    assert {k: asked[-1].metrics[k] for k in AT_ONCE} == {
        k: expected[k.removeprefix("val_")] for k in AT_ONCE
    }
    rest = [{k: v for k, v in m.items() if k not in AT_ONCE} for m in numbers(asked)]
    assert rest == numbers(list(train(c)))


def _worker_that_tells(rank: int, folder: str, tree: dict[str, Any]) -> None:
    """Run `_worker`; record whether unused gradients are searched for."""
    parallel = loop.DistributedDataParallel

    def told(network: torch.nn.Module, **how: Any) -> torch.nn.Module:
        Path(folder, f"looks{rank}").write_text(str(how["find_unused_parameters"]))
        return parallel(network, **how)

    loop.DistributedDataParallel = told  # type: ignore[assignment, misc]
    _worker(rank, folder, tree)


@pytest.mark.long
@pytest.mark.parametrize(
    "path, args, looks",
    [
        pytest.param("test_models:odd", {"kind": "auxiliary"}, "True", marks=pytest.mark.long),
        (f"{__name__}:plain", {}, "False"),
    ],
    ids=["a head that only training uses", "all is used"],
)
def test_two_workers_agree_with_one_on_an_own_network_and_look_for_missing_gradients_where_needed(
    path: str, args: dict[str, str], looks: str, tmp_path: Path, as_two_workers: TwoWorkers
) -> None:
    student = {"name": "own", "path": path, "args": args}
    c = config(
        student=student,
        optim=OptimConfig(batch_size=64).model_dump(),
        schedule=Constant().model_dump(),
    )
    one = list(train(c, more_metrics=AT_ONCE))[-1].state()
    as_two_workers(_worker_that_tells, str(tmp_path), c.model_dump(mode="json"))
    assert [(tmp_path / f"looks{rank}").read_text() for rank in range(2)] == [looks] * 2
    two = torch.load(tmp_path / "state.pt", weights_only=True)
    for name, value in one["model"].items():
        assert (two["model"][name] - value).abs().max() < 1e-5, name
    for a, b in zip(numbers(one["history"]), numbers(two["history"]), strict=True):
        assert b == pytest.approx(a, abs=1e-5)


@pytest.mark.gpu
def test_the_loop_runs_on_a_gpu() -> None:
    c = config(student=Cnn().model_dump(), gpus_per_worker=1, epochs=9)
    assert list(train(c))[-1].metrics["val_accuracy"] > 0.5


def float32_precisions() -> list[str]:
    """Return torch's float32 precision of products, convolutions and recurrent layers on CUDA."""
    parts = torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn
    return [part.fp32_precision for part in parts]


def test_tf32_is_on_and_off_on_cuda_alone_and_put_back() -> None:
    """The settings belong to the process, and can be tested without a GPU."""
    before = float32_precisions()
    for on, word in ((True, "tf32"), (False, "ieee")):
        with pytest.raises(KeyboardInterrupt), tf32(torch.device("cuda"), on):
            assert float32_precisions() == [word] * 3
            raise KeyboardInterrupt
        assert float32_precisions() == before
        with tf32(torch.device("cpu"), on):
            assert float32_precisions() == before


@pytest.mark.long
@pytest.mark.slow
def test_a_run_leaves_torchs_precision_to_the_process_that_has_set_it() -> None:
    """Once a process has used torch's new settings, a look at the old ones raises an error."""
    code = (
        "import torch; torch.backends.fp32_precision = 'tf32'\n"
        "from tfkd_ray import TrainConfig, train\n"
        "list(train(TrainConfig(objective='ce', epochs=1)))\n"
        "assert torch.backends.fp32_precision == 'tf32'"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert run.returncode == 0, run.stderr


def test_a_gpu_is_used_only_if_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    next(train(config()))  # on the CPU: there is no CUDA here to run on
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="gpus_per_worker is 1, and torch sees no GPU here"):
        next(train(config(gpus_per_worker=1)))


def test_a_crash_between_weights_and_state_repeats_the_last_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = numbers(list(train(config())))
    run = train_in(tmp_path, config(checkpoint_every_s=0))
    seen = [next(run), next(run)]
    monkeypatch.setattr(
        "tfkd_ray.learn.loop.save_state", lambda *a: (_ for _ in ()).throw(OSError("killed"))
    )
    with pytest.raises(OSError, match="killed"):
        next(run)
    monkeypatch.undo()
    assert numbers(seen) == whole[:2] and numbers(list(train_in(tmp_path, config()))) == whole
    assert (tmp_path / WEIGHTS).exists()


# --- torch.compile

COMPILED = """
import json, sys
from torch._dynamo.utils import counters
from tfkd_ray.learn.config import TrainConfig
from tfkd_ray.learn.loop import train
from tfkd_ray.settings.schema import validated
from tfkd_ray.verdict.scores import scores
tree = {"objective": "ce", "student": {"name": "mlp", "hidden": [8]}, "epochs": 2, "compile": sys.argv[1]}
metrics = [e.metrics for e in train(validated(TrainConfig, {**tree, "optim": {"lr": float(sys.argv[2])}}))]
hits, misses = (counters["inductor"]["fxgraph_cache_" + what] for what in ("hit", "miss"))
print(json.dumps([metrics[-1]["train_loss"], metrics[-1]["val_nll"], hits, misses]))
"""


@pytest.mark.slow
@pytest.mark.tools
def test_a_compiled_step_learns_the_same_and_is_compiled_for_the_first_trial_alone(
    tmp_path: Path,
) -> None:
    """Runs in own processes, like a sweep's trials with different learning rates."""
    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    found = []
    for how, lr in (("off", "0.1"), ("on", "0.1"), ("on", "0.05"), ("off", "0.05")):
        run = subprocess.run(
            [sys.executable, "-c", COMPILED, how, lr],
            env=env,
            capture_output=True,
            text=True,
            timeout=110,
        )
        assert run.returncode == 0, run.stderr[-2000:]
        found.append(json.loads(run.stdout))
    plain, first, second, plain_too = found
    assert first[:2] == pytest.approx(plain[:2], rel=1e-4) and second[:2] == pytest.approx(
        plain_too[:2], rel=1e-4
    )
    assert plain[2:] == [0, 0] and first[2] == 0 < first[3]
    assert second[2] == first[3] and second[3] == 0


def forgotten(monkeypatch: pytest.MonkeyPatch, backend: Callable[..., Any]) -> None:
    """Forget all compiled code of this process, and compile with `backend` from now on."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    monkeypatch.setattr("tfkd_ray.learn.loop._COMPILED", {})
    torch.compiler.reset()


def compiled_batches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that gets the size of each batch for which torch compiles from now on."""
    batches: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        batches.extend(len(x) for x in inputs if x.dim() == 4)
        return graph

    forgotten(monkeypatch, backend)
    return batches


@pytest.mark.long
@pytest.mark.slow
def test_every_run_of_a_process_is_compiled_however_many_kinds_there_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """torch silently stops after 8 graphs a process: four kinds of run, two batches each."""
    batches = compiled_batches(monkeypatch)
    sizes = (63, 47, 41, 57, 71, 79)  # of 320 images, so that all last batches differ
    for size in (*sizes, 79, 63):
        runs = [
            config(compile=how, data=Digits(subset=400), epochs=1, optim={"batch_size": size})
            for how in ("on", "off")
        ]
        compiled, plain = (next(train(c)).metrics["train_loss"] for c in runs)
        assert compiled == pytest.approx(plain, rel=1e-5)
    assert [b for b in batches if b in sizes] == [*sizes, 63]  # 79 was still cached, and 63 was not
    assert len(batches) == 2 * 7


@pytest.mark.long
@pytest.mark.slow
def test_pieces_of_a_batch_are_compiled_however_many_kinds_there_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Uneven pieces of whole batches and of the last one are four sizes a kind of run."""
    batches = compiled_batches(monkeypatch)
    for size in (63, 47, 57):
        optim = {"batch_size": size, "accumulate": 2}
        runs = [
            config(compile=how, data=Digits(subset=400), epochs=1, optim=optim)
            for how in ("on", "off")
        ]
        compiled, plain = (next(train(c)).metrics["train_loss"] for c in runs)
        assert compiled == pytest.approx(plain, rel=1e-5)
    pieces = {32, 31, 3, 2}, {24, 23, 19}, {29, 28, 18, 17}
    assert [*map(set, (batches[:4], batches[4:7], batches[7:]))] == [*pieces]


def _compiled_worker(rank: int, folder: str, tree: dict[str, Any]) -> None:
    """Train as one of two workers; the first writes which batches torch compiles, and what DDP wraps."""
    found: dict[str, Any] = {"batches": []}

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        found["batches"].extend(len(x) for x in inputs if x.dim() == 4)
        return graph

    def wraps(module: nn.Module, **settings: Any) -> nn.Module:
        found.update(module=type(module).__name__, **settings)
        return nn.parallel.DistributedDataParallel(module, **settings)

    with pytest.MonkeyPatch.context() as patch:
        forgotten(patch, backend)
        patch.setattr(loop, "DistributedDataParallel", wraps)
        patch.setattr(os, "_exit", lambda status: None)  # of `_worker`
        _worker(rank, folder, tree)
    if rank == 0:
        Path(folder, "found.json").write_text(json.dumps(found))
    os._exit(0)  # see `_worker`


@pytest.mark.long
@pytest.mark.slow
def test_several_workers_compile_the_student_before_ddp_wraps_it(
    tmp_path: Path, as_two_workers: TwoWorkers
) -> None:
    """Gradients of the compiled one are those of the plain one; DDP broadcasts no buffers in steps."""
    states = []
    for how in ("on", "off"):
        c = config(compile=how, epochs=1, workers=2, optim=OptimConfig(batch_size=64).model_dump())
        as_two_workers(_compiled_worker, str(tmp_path), c.model_dump(mode="json"))
        found = json.loads((tmp_path / "found.json").read_text())
        states.append(torch.load(tmp_path / "state.pt", weights_only=True)["model"])
        settings = {"forward_sync_buffers": False, "gradient_as_bucket_view": True}
        assert settings.items() <= found.items()
        compiles = how == "on"
        assert (found["module"] == "OptimizedModule") is compiles
        assert found["batches"] == (
            [32] if compiles else []
        )  # of the last batch, 63, it has 32, too
    for name, value in states[0].items():
        assert (states[1][name] - value).abs().max() < 1e-5, name


@pytest.mark.parametrize(
    "gpus, workers, mode", [(1, 1, "reduce-overhead"), (1, 2, None), (0, 1, None)]
)
def test_one_worker_on_a_gpu_replays_cuda_graphs_and_of_several_none(
    gpus: int, workers: int, mode: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str | None] = []
    monkeypatch.setattr(torch, "compile", lambda module, **s: asked.append(s["mode"]) or module)
    monkeypatch.setattr(loop, "_COMPILED", {})
    loop.compiled(nn.Linear(1, 1), config(gpus_per_worker=gpus, workers=workers), 100)
    assert asked == [mode]


@pytest.mark.parametrize(
    "text, what", [("No C++ compiler\nand more", "No C++ compiler"), ("", "OSError")]
)
def test_what_cannot_be_compiled_is_told_with_the_way_out(
    monkeypatch: pytest.MonkeyPatch, text: str, what: str
) -> None:
    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> None:
        raise OSError(text)

    forgotten(monkeypatch, backend)
    with pytest.raises(RuntimeError) as raised:
        next(train(config(compile="on")))
    assert str(raised.value) == (
        f"compile: torch cannot compile mlp here: {what}; if g++ or Python's headers are missing, install them on "
        "every node, or set compile=off"
    )


@pytest.mark.long
@pytest.mark.slow
def test_a_node_without_a_compiler_says_so(tmp_path: Path) -> None:
    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "CXX": "no-such-compiler"}
    run = subprocess.run(
        [sys.executable, "-c", COMPILED, "on", "0.1"],
        env=env,
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert (
        "RuntimeError: compile: torch cannot compile mlp here: " in run.stderr
        and "no-such-compiler" in run.stderr
    )


# --- what is said of a teacher


def test_agreement_and_distance_to_the_teacher_are_those_of_their_definition() -> None:
    teacher = Mlp(hidden=(8,)).build((1, 8, 8), 10).eval()
    c = config(
        objective={"name": "kd", "alpha": 0.5},
        teacher={"model": {"name": "mlp", "hidden": [8]}},
        epochs=2,
    )
    for epoch in train(c, teacher=teacher):
        student = c.student.build((1, 8, 8), 10).eval()
        student.load_state_dict(epoch.state()["model"])
        _, val = Digits().load()
        assert val is not None
        x = (val.images.float() - Digits.mean[0]) / Digits.std[0]
        with torch.no_grad():
            p, q = student(x).double().softmax(1), teacher(x).double().softmax(1)
        assert epoch.metrics["val_agreement"] == pytest.approx(
            (p.argmax(1) == q.argmax(1)).double().mean().item()
        )
        assert epoch.metrics["val_teacher_kl"] == pytest.approx(
            (q * (q / p).log()).sum(1).mean().item(), rel=1e-4
        )
    assert "val_agreement" not in next(train(config())).metrics


def test_the_gradient_ratio_is_that_of_the_weighted_parts() -> None:
    objective = TfkdReg(alpha=0.3, temperature=5.0)
    logits, labels = torch.randn(16, 10, requires_grad=True), torch.arange(16) % 10
    terms = objective.terms(logits, labels)
    ce = torch.autograd.grad(0.7 * terms.ce, logits, retain_graph=True)[0].norm()
    kd = torch.autograd.grad(0.3 * 25 * terms.kd, logits, retain_graph=True)[0].norm()
    norms = gradient_norms(objective, terms, logits)
    assert gradient_ratio([norms]) == pytest.approx((kd / ce).item(), rel=1e-5)
    alone = gradient_norms(CrossEntropy(), CrossEntropy().terms(logits, labels), logits)
    assert gradient_ratio([alone]) == 0


# --- what a GPU does at once ----------------------------------------------------------------------


def count_augmented(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that gets the number of images of each call of an augmentation."""
    called: list[int] = []
    real = Augment.__call__

    def counted(self: Augment, images: Tensor, view: Any) -> Tensor:
        called.append(len(images))
        return real(self, images, view)

    monkeypatch.setattr(Augment, "__call__", counted)
    return called


def test_images_augmented_many_at_once_are_those_of_one_batch_after_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    augment = {"crop_padding": 1, "flip": True, "rotation_degrees": 15, "erase": 0.5, "mixup": 0.2}
    data = {"name": "digits", "subset": 300}
    tree = {"objective": "ce", "student": "mlp", "augment": augment, "data": data, "epochs": 2}
    c = validated(TrainConfig, {**tree, "optim": {"batch_size": 32}})
    called = count_augmented(monkeypatch)
    singly = numbers(list(train(c)))
    assert max(called) <= 2 * 34
    called.clear()
    monkeypatch.setitem(loop.TOGETHER, "cpu", 100 * 64)  # three batches
    assert numbers(list(train(c))) == singly
    assert max(called) == 2 * 96


def test_the_next_epoch_is_drawn_while_one_trains_on_a_gpu() -> None:
    asked, drawn = [threading.Event() for _ in range(4)], list[int]()

    def draw(epoch: int) -> Any:
        drawn.append(epoch)
        asked[epoch].set()
        return epoch

    ahead = loop._drawn_ahead(draw, range(1, 4), torch.device("cuda", 0))
    assert next(ahead) == 1 and asked[2].wait(10) and not asked[3].is_set()  # type: ignore[comparison-overlap]
    assert [*ahead] == [2, 3] and drawn == [1, 2, 3]  # type: ignore[comparison-overlap]
    assert [*loop._drawn_ahead(draw, range(3, 3), torch.device("cuda", 0))] == []
    here = loop._drawn_ahead(draw, range(1, 3), torch.device("cpu"))
    assert next(here) == 1 and drawn == [1, 2, 3, 1]  # type: ignore[comparison-overlap]
