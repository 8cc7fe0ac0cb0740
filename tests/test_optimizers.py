"""Optimizers: each is torch's own, whatever else a step does; wrong settings are sentences."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import TwoWorkers
from test_loop import numbers, same
from torch import Tensor, nn
from torch.nn import functional as F

from tfkd_ray.learn import loop
from tfkd_ray.learn.config import TrainConfig
from tfkd_ray.learn.images import address
from tfkd_ray.learn.loop import Epoch, epoch_order, train
from tfkd_ray.learn.optimizers import AdamW, Muon, OptimConfig, hidden_matrices, new_optimizer
from tfkd_ray.learn.soft_labels import Bank
from tfkd_ray.settings.errors import ConfigError
from tfkd_ray.settings.schema import validated
from tfkd_ray.space.relate import not_superset, placed, warm_points
from tfkd_ray.space.space import build_space

SMALL: dict[str, Any] = {
    "data": {"name": "digits", "subset": 200},
    "student": {"name": "mlp", "hidden": [12, 10]},
    "objective": "ce",
    "epochs": 2,
}


def config(**changes: Any) -> TrainConfig:
    return validated(TrainConfig, SMALL | changes)


class Lion(torch.optim.Optimizer):
    """A user's optimizer: the sign of an average. (Chen et al. 2023.)"""

    def __init__(
        self, groups: Any, lr: float, beta: float = 0.9, weight_decay: float = 0.0
    ) -> None:
        if not 0 <= beta < 1:
            raise ValueError(f"beta is from 0 to 1, got {beta}")
        super().__init__(groups, {"lr": lr, "beta": beta, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                average = self.state[p].setdefault("average", torch.zeros_like(p))
                average.lerp_(p.grad, 1 - group["beta"])
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(average.sign(), alpha=group["lr"])


class Forgetful(Lion):
    """Keeps its step count where no state dict holds it."""

    count = 0

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.count += 1
        for group in self.param_groups:
            group["lr"] /= self.count
        super().step()


class Plain(torch.optim.Optimizer):
    """Without weight decay."""

    def __init__(self, groups: Any, lr: float) -> None:
        super().__init__(groups, {"lr": lr})


def nothing(groups: Any, lr: float) -> int:
    return 3


def normed(shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    layers = nn.Linear(shape[1] * shape[2], 4), nn.BatchNorm1d(4), nn.Linear(4, num_classes)
    return nn.Sequential(nn.Flatten(), *layers)


OWN = {"name": f"{__name__}:Lion", "lr": 0.01}

KINDS: dict[str, dict[str, Any]] = {
    "sgd": {"name": "sgd", "lr": 0.05},
    "adamw": {"name": "adamw", "lr": 0.01, "betas": [0.8, 0.99]},
    "muon": {"name": "muon", "adamw_lr": 0.01},
    "own": {**OWN, "args": {"beta": 0.8}},
}


# --- what an update computes


def torchs_own(optim: Any, net: nn.Module) -> list[tuple[torch.optim.Optimizer, float]]:
    """Return torch's optimizers with their peaks, written without this package."""
    parameters = list(net.parameters())
    if isinstance(optim, AdamW):
        own = torch.optim.AdamW(parameters, betas=(0.8, 0.99), weight_decay=0.05)
        return [(own, 0.01)]
    if isinstance(optim, Muon):
        hidden = [p for name, p in net.named_parameters() if name in HIDDEN]
        rest = [p for name, p in net.named_parameters() if name not in HIDDEN]
        assert len(hidden) == 1
        return [
            (torch.optim.Muon(hidden, momentum=0.95, weight_decay=0.01), 0.02),
            (torch.optim.AdamW(rest, betas=(0.9, 0.95), weight_decay=0.01), 0.01),
        ]
    if isinstance(optim, OptimConfig):
        return [(torch.optim.SGD(parameters, momentum=0.9, weight_decay=5e-4), 0.05)]
    return [(Lion(parameters, 1.0, beta=0.8), 0.01)]


HIDDEN = [
    name
    for name, p in config().build_student().named_parameters()
    if any(p.shape == hidden.shape for hidden in hidden_matrices(config().build_student()))
    and p.ndim == 2
]


@pytest.mark.parametrize("kind", KINDS)
def test_an_epoch_is_the_textbook_loop_with_torchs_own_optimizer(kind: str) -> None:
    c = config(optim=KINDS[kind] | {"batch_size": 64, "clip_norm": 0.5})
    ours = list(train(c))[-1].state()["model"]
    torch.manual_seed(address(0, "init"))
    net = c.student.build((1, 8, 8), 10)
    optimizers = torchs_own(c.optim, net)
    train_set, _ = c.data.load()
    mean, std = c.data.statistics()
    for epoch in range(2):
        batches = epoch_order(train_set, 0, epoch).split(64)
        for step, batch in enumerate(batches):
            factor = c.schedule.factor(epoch + (step + 0.5) / len(batches), 2)
            for optimizer, peak in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = peak * factor
            x = (train_set.part(batch).images.float() - mean[0]) / std[0]  # type: ignore[union-attr]
            net.zero_grad()
            F.cross_entropy(net(x), train_set.labels[batch]).backward()
            norm = nn.utils.get_total_norm([p.grad for p in net.parameters()])
            for p in net.parameters():
                assert p.grad is not None
                p.grad *= min(1.0, 0.5 / (norm + 1e-6))
            for optimizer, _ in optimizers:
                optimizer.step()
    for name, value in net.state_dict().items():
        assert torch.allclose(ours[name], value, atol=1e-5), name


def test_muon_has_the_hidden_matrices_and_adamw_all_else() -> None:
    net = config(student={"name": "mlp", "hidden": [12, 10, 8]}).build_student()
    updates = new_optimizer(net, Muon())
    matrices = [p for p in net.parameters() if p.ndim == 2]
    (mine,) = updates.parts["muon"].optimizer.param_groups
    assert [id(p) for p in mine["params"]] == [id(p) for p in matrices[1:-1]]
    (rest,) = updates.parts["adamw"].optimizer.param_groups
    assert len(rest["params"]) + len(mine["params"]) == len(list(net.parameters()))
    assert updates.set_rate(0.5) == 0.01 and (mine["lr"], rest["lr"]) == (0.01, 1.5e-4)


def test_norms_and_biases_have_no_weight_decay_if_asked() -> None:
    net = config(student={"name": "cnn", "widths": [4]}).build_student()
    optim = AdamW(no_decay="norm_and_bias", weight_decay=0.3)
    (part,) = new_optimizer(net, optim).parts.values()
    decay = {id(p): g["weight_decay"] for g in part.optimizer.param_groups for p in g["params"]}
    for module in net.modules():
        for name, p in module.named_parameters(recurse=False):
            norm = isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d)
            assert decay[id(p)] == (0 if norm or name == "bias" else 0.3)
    assert len(decay) == len(list(net.parameters()))


def test_a_factor_of_a_parameter_multiplies_its_learning_rate() -> None:
    net = config().build_student()
    first, *_, last = (name for name, _ in net.named_parameters())
    for optim in (OptimConfig(), AdamW(no_decay="norm_and_bias"), Muon()):
        updates = new_optimizer(net, optim, {first: 0.25})
        updates.set_rate(0.5)
        rate = {
            id(p): group["lr"] / part.optimizer.defaults["lr"]
            for part in updates.parts.values()
            for group in part.optimizer.param_groups
            for p in group["params"]
        }
        named = dict(net.named_parameters())
        assert rate[id(named[first])] == 0.125 and rate[id(named[last])] == 0.5
        assert len(rate) == len(named)


def test_sgd_without_more_settings_has_the_state_of_earlier_releases() -> None:
    net = config().build_student()
    plain = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, fused=True)
    theirs = plain.state_dict()
    ours = new_optimizer(net, OptimConfig()).state_dict()
    assert ours["param_groups"] == theirs["param_groups"]
    assert sorted(ours["state"]) == theirs["param_groups"][0]["params"]


# --- pieces of a batch


@pytest.fixture
def in_float64(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Train in float64 throughout."""
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("pieces", [2, 3, 7, 64])
@pytest.mark.parametrize("kind", ["sgd", "adamw", "own"])
def test_a_batch_in_pieces_is_the_whole_batch(kind: str, pieces: int, in_float64: None) -> None:
    """160 images in batches of 64 end in one of 32; 7 pieces of 64 images are uneven."""
    optim = {**KINDS[kind], "lr": 0.01, "batch_size": 64, "clip_norm": 0.7}
    run = {"objective": "tfkd_reg", "optim": optim, "data": {"name": "digits", "subset": 200}}
    whole = list(train(config(**run)))
    parts = list(train(config(**run | {"optim": optim | {"accumulate": pieces}})))
    for name, value in whole[-1].state()["model"].items():
        theirs = parts[-1].state()["model"][name]
        assert value.dtype == torch.float64
        assert (value - theirs).norm() <= 1e-12 * value.norm(), name
    for a, b in zip(whole, parts, strict=True):
        for name in ("train_loss", "train_ce", "train_kd", "train_kd_ratio", "val_nll"):
            assert b.metrics[name] == pytest.approx(a.metrics[name], rel=1e-12)


def test_clipping_acts_once_on_the_summed_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    clipped: list[float] = []
    plain = torch.nn.utils.clip_grad_norm_

    def noted(parameters: Any, most: float) -> Any:
        clipped.append(most)
        return plain(parameters, most)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", noted)
    optim = {"clip_norm": 0.3, "accumulate": 4, "batch_size": 40}
    list(train(config(epochs=1, optim=optim)))
    assert clipped == [0.3] * 4, "160 images in batches of 40"


def test_a_smaller_last_batch_has_fewer_pieces_and_none_has_a_single_image() -> None:
    optim = OptimConfig(batch_size=64, accumulate=16)
    assert [optim.pieces(n, 1) for n in (64, 65, 32, 31, 5, 3, 2, 1)] == [
        16,
        16,
        16,
        15,
        2,
        1,
        1,
        1,
    ]
    alone = OptimConfig(batch_size=8, accumulate=8)
    assert [alone.pieces(n, 1) for n in (8, 9, 3)] == [8, 8, 3]
    assert OptimConfig(batch_size=64, accumulate=4).pieces(32, 2) == 4


def test_dropout_is_addressed_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []
    monkeypatch.setattr(loop, "_seed_generators", lambda device, seed: seeds.append(seed))
    student = {"name": "mlp", "hidden": [12], "dropout": 0.5}
    run = config(epochs=1, student=student, optim={"batch_size": 80, "accumulate": 2})
    list(train(run))
    steps = [address(0, "step", 0, step, 0, *k) for step in (0, 1) for k in ((), (1,))]
    assert [seed for seed in seeds if seed in steps] == steps


def test_a_step_draws_what_torchs_own_seed_gives_and_formats_no_stack(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = config(epochs=2, student={"name": "mlp", "hidden": [12], "dropout": 0.5})
    with monkeypatch.context() as patch:
        patch.setattr(loop, "_seed_generators", lambda device, seed: torch.manual_seed(seed))
        by_torch = list(train(run))[-1].state()
    steps = [address(0, "step", epoch, step, 0) for epoch in (0, 1) for step in range(3)]
    seeds: list[int] = []
    torchs = torch.manual_seed
    monkeypatch.setattr(torch, "manual_seed", lambda seed: (seeds.append(seed), torchs(seed))[1])
    assert same(list(train(run))[-1].state(), by_torch)
    assert not set(seeds) & set(steps)


@pytest.mark.parametrize(
    "objective, optim, said",
    [
        ("dist", {"accumulate": 2}, True),
        ("dist", {"accumulate": {"choices": [1, 2]}}, True),
        ("dist", {"choices": [{"name": "sgd"}, {"name": "adamw", "accumulate": 4}]}, True),
        ("dist", {}, False),
        ("kd", {"accumulate": 2}, False),
    ],
)
def test_a_loss_that_compares_images_is_noted_where_it_sees_pieces(
    objective: str, optim: dict[str, Any], said: bool
) -> None:
    space = build_space(
        {"objective": objective, "optim": optim, "teacher": {"model": "mlp"}, "epochs": 9}
    )
    notes = [n for n in space.notes if n.startswith("optim.accumulate: dist compares the images")]
    assert len(notes) == said


def test_the_bank_gives_pieces_the_same_soft_labels(tmp_path: Path) -> None:
    optim = {"batch_size": 64, "accumulate": 3}
    teacher = {"model": {"name": "mlp", "hidden": [8]}}
    found = {}
    for labels in ("bank", "online"):
        run = config(objective="kd", optim=optim, teacher={**teacher, "labels": labels}, epochs=2)
        network: nn.Module | Bank = run.teacher_runs()[0].build_student().eval()
        if labels == "bank":
            network = Bank(run.teacher_runs()[0].build_student, {"seed": 0}, tmp_path)
        found[labels] = list(train(run, teacher=network))[-1]
    for name, value in found["online"].state()["model"].items():
        assert torch.allclose(found["bank"].state()["model"][name], value, atol=1e-3), name


def _worker(rank: int, folder: str, tree: dict[str, Any]) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    synchronised: list[bool] = []
    parallel = loop._synchronised

    def noted(model: nn.Module, *, last: bool) -> Any:
        synchronised.append(last)
        return parallel(model, last=last)

    loop._synchronised = noted
    last: Epoch = list(train(validated(TrainConfig, tree)))[-1]
    if rank == 0:
        torch.save(last.state() | {"synchronised": synchronised}, f"{folder}/state.pt")
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # as in test_loop


@pytest.mark.long
def test_two_workers_in_pieces_agree_with_one_without(
    tmp_path: Path, as_two_workers: TwoWorkers
) -> None:
    """Gradients of two workers are added in the last piece alone."""
    run = {
        "optim": {"name": "adamw", "batch_size": 48, "clip_norm": 0.5},
        "schedule": "constant",
        "ema": {"decay": 0.9},
    }
    one = list(train(config(**run)))[-1].state()
    two = run | {"workers": 2, "optim": {**run["optim"], "accumulate": 3}}  # type: ignore[dict-item]
    as_two_workers(_worker, str(tmp_path), SMALL | two)
    found = torch.load(tmp_path / "state.pt", weights_only=True)
    assert found["synchronised"][:6] == [False, False, True] * 2
    for part in ("model", "trained"):
        for name, value in one[part].items():
            assert (found[part][name] - value).abs().max() < 1e-4, name
    for a, b in zip(numbers(one["history"]), numbers(found["history"]), strict=True):
        assert b == pytest.approx(a, abs=1e-3)


# --- stop and resume

RESUMED: dict[str, dict[str, Any]] = {
    **{kind: {"optim": KINDS[kind]} for kind in KINDS},
    "pieces, clipping, average": {
        "student": {"name": "cnn", "widths": [4]},
        "optim": {"name": "adamw", "batch_size": 50, "accumulate": 3, "clip_norm": 0.5},
        "ema": {"decay": 0.9},
    },
    "groups": {
        "student": {"name": "mlp", "hidden": [12, 10], "dropout": 0.3},
        "optim": {"name": "muon", "no_decay": "norm_and_bias", "accumulate": 2},
    },
}


@pytest.mark.parametrize("changes", RESUMED.values(), ids=RESUMED.keys())
def test_stop_and_resume_equals_never_stopped(changes: dict[str, Any]) -> None:
    run = config(**{"epochs": 3} | changes)
    whole = list(train(run))
    begun = train(run)
    first = next(begun)
    state = first.state()
    begun.close()
    rest = list(train(run, state))
    assert numbers([first, *rest]) == numbers(whole)
    assert same(rest[-1].state(), whole[-1].state())


# --- settings


def test_existing_files_keep_their_meaning_and_their_form() -> None:
    plain = config(optim={"lr": 0.2, "nesterov": True})
    named = config(optim={"name": "sgd", "lr": 0.2, "nesterov": True, "accumulate": 1})
    assert plain == named and plain.fingerprint(3) == named.fingerprint(3)
    written = plain.model_dump(mode="json")
    assert written["optim"] == plain.content()["optim"]
    assert set(written["optim"]) == {"lr", "weight_decay", "momentum", "nesterov", "batch_size"}
    assert "ema" not in written and "ema" not in plain.content()
    assert validated(TrainConfig, written) == plain


def test_every_new_setting_has_a_fingerprint_of_its_own_and_is_written() -> None:
    changed: list[dict[str, Any]] = [
        {"optim": "adamw"},
        {"optim": "muon"},
        {"optim": OWN},
        {"optim": {"clip_norm": 1.0}},
        {"optim": {"accumulate": 2}},
        {"optim": {"no_decay": "norm_and_bias"}},
        {"ema": {"decay": 0.9}},
    ]
    runs = [config(), *(config(**changes) for changes in changed)]
    assert len({run.fingerprint(3) for run in runs}) == len(runs)
    for run in runs:
        assert validated(TrainConfig, run.model_dump(mode="json")) == run


@pytest.mark.parametrize("data", ["cifar100", "imagenet"])
def test_a_recipe_of_sgd_does_not_reach_another_optimizer(data: str) -> None:
    """The number of images of an update is no optimizer's own."""
    tree = {"data": data, "objective": "tfkd_self", "optim": "adamw", "student": "resnet18"}
    found = validated(TrainConfig, {**tree, "teacher": {"optim": {"name": "adamw", "lr": 0.5}}})
    plain = validated(TrainConfig, tree | {"optim": {"name": "sgd"}})
    assert found.optim == AdamW(batch_size=plain.optim.batch_size)
    assert found.teacher is not None
    assert found.teacher.optim == AdamW(lr=0.5, batch_size=plain.optim.batch_size)
    unnamed = validated(TrainConfig, {**tree, "optim": {}})
    assert plain.optim == unnamed.optim


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "momentum with adamw": (
        {"optim": {"name": "adamw", "momentum": 0.9}},
        "optim.adamw: momentum is a setting of sgd and muon, not of adamw; leave it out, or write name: sgd",
    ),
    "betas without a name": (
        {"optim": {"betas": [0.9, 0.9]}},
        "optim: betas is a setting of adamw and muon, not of sgd; leave it out, or write name: adamw",
    ),
    "a slip": ({"optim": {"name": "adamw", "bets": 1}}, "optim.adamw.bets: no such setting; did you mean 'betas'?"),
    "no such name": ({"optim": "adamm"}, "optim: no such name 'adamm'; did you mean 'adamw'?"),
    "a teacher's": (
        {"objective": "kd", "teacher": {"model": "mlp", "optim": {"name": "muon", "path": "a:b"}}},
        "teacher.optim.muon: path is a setting of own, not of muon; leave it out, or write name: own",
    ),
    "clipping to nothing": ({"optim": {"clip_norm": 0}}, "optim.clip_norm: should be greater than 0, got 0"),
    "more pieces than images": (
        {"optim": {"batch_size": 8, "accumulate": 9}},
        "optim.accumulate: 9 pieces of 8 images; lower it to 8, or raise batch_size",
    ),
    "more pieces than a worker's images": (
        {"workers": 4, "optim": {"batch_size": 30, "accumulate": 8}},
        "optim.accumulate: 8 pieces of a worker's share of 30, 7 images; lower it to 7, or raise batch_size",
    ),
    "an own one's momentum": (
        {"optim": OWN | {"momentum": 0.9}},
        "optim.own: momentum is a setting of sgd and muon, not of own; leave it out, or if it is an argument of its "
        "class, write it below args: args: {momentum: ...}",
    ),
    "no learning rate": ({"optim": f"{__name__}:Lion"}, "optim.own.lr: required, and not given"),
    "no module": ({"optim": {"name": "nowhere:Lion", "lr": 1}}, "optim.path: nowhere:Lion: there is no module 'nowhere'"),
    "no such argument": (
        {"optim": OWN | {"args": {"gamma": 1}}},
        "optim.args: test_optimizers:Lion is called with groups, lr and these: got an unexpected keyword argument 'gamma'",
    ),
    "a decay of 1": ({"ema": {"decay": 1}}, "ema.decay: should be less than 1, got 1"),
}  # fmt: skip


@pytest.mark.parametrize("tree, sentence", BAD.values(), ids=BAD.keys())
def test_a_wrong_optimizer_is_a_sentence(tree: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as error:
        config(**tree)
    assert sentence in str(error.value)


TRIED: dict[str, tuple[dict[str, Any], str]] = {
    "nothing for muon": (
        {"optim": "muon", "student": {"name": "cnn", "widths": [4]}},
        "optim: muon is for hidden matrices, and the student has none",
    ),
    "a teacher without": (
        {"objective": "kd", "teacher": {"model": {"name": "cnn", "widths": [4]}, "optim": "muon"}},
        "teacher.optim: muon is for hidden matrices",
    ),
    "refused": ({"optim": OWN | {"args": {"beta": 2}}}, "optim.args: Lion refuses them: ValueError: beta is from 0 to 1"),
    "no optimizer": (
        {"optim": {"name": f"{__name__}:nothing", "lr": 1}},
        "optim.path: test_optimizers:nothing gives int; an optimizer is a torch.optim.Optimizer",
    ),
    "no weight decay": (
        {"optim": {"name": f"{__name__}:Plain", "lr": 1, "no_decay": "norm_and_bias"}},
        "optim.no_decay: Plain has no weight_decay to leave out; set no_decay: none",
    ),
    "no step": ({"optim": {"name": f"{__name__}:Plain", "lr": 1}}, "optim: Plain fails when two updates of a small network"),
    "forgetful": (
        {"optim": {"name": f"{__name__}:Forgetful", "lr": 0.1}},
        "optim: Forgetful continues differently after load_state_dict",
    ),
    "single images": (
        {"optim": {"batch_size": 8, "accumulate": 8}, "student": f"{__name__}:normed"},
        "optim.batch_size: leaves a single image a worker in a step",
    ),
}  # fmt: skip


@pytest.mark.parametrize("tree, sentence", TRIED.values(), ids=TRIED.keys())
def test_what_cannot_train_is_said_before_it_is_started(
    tree: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ConfigError) as error:
        config(**tree).try_own_code()
    assert sentence in str(error.value)


def test_the_code_of_an_own_optimizer_is_recorded_and_other_code_is_refused() -> None:
    run = config(optim=OWN)
    assert run.optim.digest and config(optim=run.optim.model_dump()).optim == run.optim  # type: ignore[union-attr]
    other = config(optim=OWN | {"digest": "0" * 16})
    with pytest.raises(ConfigError, match=r"optim.digest: the code of the optimizer Lion is not"):
        next(train(other))


# --- in a space


def test_optimizers_are_searched_each_with_its_own_ranges() -> None:
    tree = {
        **SMALL,
        "optim": {
            "choices": [
                {"name": "sgd", "lr": {"low": 0.01, "high": 0.5, "log": True}},
                {"name": "adamw", "lr": {"low": 1e-4, "high": 0.5, "log": True}},
                {**OWN, "args": {"beta": {"low": 0, "high": 0.9}}},
            ]
        },
    }
    space = build_space(tree)
    assert [p.name for p in space.parameters] == [
        "optim",
        "optim.adamw.lr",
        "optim.sgd.lr",
        f"optim.{__name__}:Lion.args.beta",
    ]
    again = build_space(space.tree)
    assert [str(p) for p in again.parameters] == [str(p) for p in space.parameters]


def test_the_papers_learning_rate_is_tried_first_for_sgd_alone() -> None:
    wide = {"low": 1e-4, "high": 0.5, "log": True}
    tried = {}
    for name in ("sgd", "adamw"):
        tree = {**SMALL, "objective": ["tfkd_reg"], "optim": {"name": name, "lr": wide}}
        tree["objective"] = {"name": "tfkd_reg", "temperature": {"low": 1, "high": 50}}
        tried[name] = {point.values["optim.lr"] for point in warm_points(build_space(tree))}
    assert tried["sgd"] == {0.1} and 0.1 not in tried["adamw"] and tried["adamw"]


def test_a_space_that_begins_to_search_a_new_setting_holds_the_trials_before() -> None:
    optim = {"lr": {"low": 0.01, "high": 0.5}}
    old = build_space({**SMALL, "optim": optim})
    for name, wider, narrower in (
        ("no_decay", ["none", "norm_and_bias"], []),
        ("accumulate", [1, 2], [2, 4]),
        ("clip_norm", [None, 1.0], [1.0, 2.0]),
    ):
        space = build_space({**SMALL, "optim": optim | {name: {"choices": wider}}})
        assert not not_superset(old, space)
        found = placed(space, old.branches[0].config({"optim.lr": 0.1}))
        assert not isinstance(found, list) and found[1][f"optim.{name}"] == wider[0]
        if len(narrower) > 1:
            space = build_space({**SMALL, "optim": optim | {name: {"choices": narrower}}})
            assert f"optim.{name}: was fixed at {wider[0]!r}" in not_superset(old, space)[0]
    other = build_space({**SMALL, "optim": {"name": "adamw", "lr": optim["lr"]}})
    assert not_superset(old, other) == ["optim.name: was 'sgd', and is 'adamw' now"]
