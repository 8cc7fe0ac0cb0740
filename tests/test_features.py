"""Losses of the user's own on layers of the networks: hooks, projectors, the bank, what is refused."""

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, TwoWorkers, train_as_worker
from test_loop import numbers, same
from torch import Tensor, nn
from torch.nn import functional as F

from tfkd_ray import find_or_train
from tfkd_ray.learn import loop, soft_labels
from tfkd_ray.learn.checkpoint import WEIGHTS, load_state, load_weights
from tfkd_ray.learn.config import Constant, TrainConfig
from tfkd_ray.learn.data import Digits
from tfkd_ray.learn.features import shapes_of
from tfkd_ray.learn.images import address
from tfkd_ray.learn.loop import Epoch, epoch_order, train, train_in
from tfkd_ray.learn.objectives import OwnObjective
from tfkd_ray.learn.own import only_reading
from tfkd_ray.learn.soft_labels import Bank
from tfkd_ray.settings.errors import ConfigError
from tfkd_ray.settings.schema import validated
from tfkd_ray.show.plan import resident_bytes
from tfkd_ray.space.explain import explained, warnings_of
from tfkd_ray.space.space import build_space, load_space

LOSSES = """
import torch
from torch import nn
from torch.nn import functional as F

def ce(logits, labels): return F.cross_entropy(logits, labels)
def mine(x): return next(iter(x.values()))

def without_weight(logits, labels, student_features, weight: float = 0.0):
    return ce(logits, labels) + weight * mine(student_features).square().mean()

def plain(logits, labels): return ce(logits, labels)
def optional(logits, labels, teacher=None, student_features=None, teacher_features=None):
    assert teacher is None
    if teacher_features is None: return ce(logits, labels)
    return ce(logits, labels) + (mine(student_features).mean() - mine(teacher_features).mean()).square()
def by_position(logits, labels, student_features, /): return ce(logits, labels)

class Base(nn.Module):
    def __init__(self, student_shapes, teacher_shapes, width: int = 3):
        super().__init__()
        (self.student,), (self.teacher,) = student_shapes.values(), teacher_shapes.values()
        self.project = nn.Conv2d(self.student[0], self.teacher[0], 1)
    def terms(self, logits, labels, student_features, teacher_features):
        return ce(logits, labels), (self.project(mine(student_features)) - mine(teacher_features)).square().mean()

class Looks(Base):
    def terms(self, logits, labels, teacher, student_features, teacher_features):
        tensors = logits, teacher, *student_features.values(), *teacher_features.values()
        assert all(x.dtype == torch.float32 for x in tensors) and len(tensors) == 6
        assert mine(student_features).requires_grad and not mine(teacher_features).requires_grad
        assert [*student_features] == ["6", "2"] and self.training
        assert self.project(mine(student_features)).dtype == torch.float32
        return super().terms(logits, labels, student_features, teacher_features)
    def __init__(self, student_shapes, teacher_shapes):
        nn.Module.__init__(self)
        assert [*student_shapes] == [*teacher_shapes] == ["6", "2"]
        self.project = nn.Conv2d(student_shapes["6"][0], teacher_shapes["6"][0], 1)

class With_kd(Base):
    def terms(self, logits, labels, teacher, student_features, teacher_features):
        kd = F.kl_div(F.log_softmax(logits, 1), F.log_softmax(teacher, 1), reduction="batchmean", log_target=True)
        return ce(logits, labels), kd + super().terms(logits, labels, student_features, teacher_features)[1]

class Normed(Base):
    def __init__(self, student_shapes, teacher_shapes):
        super().__init__(student_shapes, teacher_shapes)
        self.project = nn.Sequential(self.project, nn.BatchNorm2d(self.teacher[0]), nn.Dropout(0.1))

class Attribute:
    "No module, but it has two."
    def __init__(self, student_shapes, teacher_shapes):
        self.project = nn.Conv2d(student_shapes["2"][0], teacher_shapes["2"][0], 1)
        self.scale = nn.Parameter(torch.ones(()))
    def terms(self, logits, labels, student_features, teacher_features):
        return ce(logits, labels), self.scale * (self.project(mine(student_features)) - mine(teacher_features)).square().mean()

class Flat(Base):
    def __init__(self, student_shapes, teacher_shapes):
        nn.Module.__init__(self)
        (student,), (teacher,) = student_shapes.values(), teacher_shapes.values()
        self.project = nn.Linear(student[0], teacher[0])

class Lazy(Base):
    def __init__(self, student_shapes, teacher_shapes):
        super().__init__(student_shapes, teacher_shapes)
        self.project = nn.LazyConv2d(self.teacher[0], 1)

class Mismatch(Base):
    def terms(self, logits, labels, student_features, teacher_features):
        return ce(logits, labels), (mine(student_features) - mine(teacher_features)).square().mean()

class Unused(Base):
    def terms(self, logits, labels, student_features, teacher_features):
        return ce(logits, labels), (mine(student_features).mean() - mine(teacher_features).mean()).square()

class Detached(Base):
    def terms(self, logits, labels, student_features, teacher_features):
        with torch.no_grad(): mapped = self.project(mine(student_features))
        return ce(logits, labels), (mapped - mine(teacher_features)).square().mean() + mine(student_features).mean() * 0

class Hidden(Base):
    def __init__(self, student_shapes, teacher_shapes):
        super().__init__(student_shapes, teacher_shapes)
        self.hidden = [self.project]
        del self.project
    def terms(self, logits, labels, student_features, teacher_features):
        self.project = self.hidden[0]
        try: return super().terms(logits, labels, student_features, teacher_features)
        finally: del self.project

class Averaging(Normed):
    def __init__(self, student_shapes, teacher_shapes):
        super().__init__(student_shapes, teacher_shapes)
        self.register_buffer("center", torch.zeros(()), persistent=False)
    def terms(self, logits, labels, student_features, teacher_features):
        self.center += 1
        return super().terms(logits, labels, student_features, teacher_features)

class Wrong_shape(Base):
    def __init__(self, student_shapes, teacher_shapes):
        super().__init__({}, teacher_shapes)

_projector = None
def of_module(logits, labels, student_features):
    global _projector
    x = mine(student_features)
    _projector = _projector or nn.Conv2d(x.shape[1], 1, 1)
    return ce(logits, labels) + _projector(x).square().mean()

def ignores(logits, labels, student_features): return ce(logits, labels)
def rooted(logits, labels, student_features): return ce(logits, labels) + (mine(student_features) * 0).square().sum().sqrt()
def on_layers_alone(logits, labels, student_features): return mine(student_features).square().mean()
def viewed(logits, labels, student_features): return ce(logits, labels) + mine(student_features).view(-1).square().mean()

def odd_net(shape, num_classes):
    return Odd(shape, num_classes)

class Odd(nn.Module):
    def __init__(self, shape, num_classes):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(shape[0], 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
        self.relu, self.pool = nn.ReLU(), nn.Module()
        self.pool.max, self.pool.flat = nn.AdaptiveMaxPool2d(2, return_indices=True), nn.Flatten()
        self.pool.drop = nn.Dropout(0.5, inplace=True)
        self.only_eval = nn.Identity()
        self.unused, self.head = nn.Linear(2, 2), nn.Linear(16, num_classes)
    def forward(self, x):
        x, _ = self.pool.max(self.relu(self.relu(self.body(x))))
        x = self.pool.drop(self.pool.flat(x))
        return self.head(x if self.training else self.only_eval(x))
"""
CNN = {"name": "cnn", "widths": [4, 8]}
BASE: dict[str, Any] = {
    "epochs": 2,
    "student": CNN,
    "data": {"name": "digits", "subset": 300},
    "optim": {"batch_size": 64, "lr": 0.05},
    "schedule": Constant().model_dump(),
    "teacher": {"model": {"name": "cnn", "widths": [6, 8]}, "epochs": 1},
}
MLP = {"student": {"name": "mlp", "hidden": [16]}, "teacher": {"model": {"name": "mlp", "hidden": [24]}}}  # fmt: skip
BOTH = {"student": [2], "teacher": [2]}


@pytest.fixture(scope="session", autouse=True)
def losses(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Write LOSSES as the module `losses_on_layers`, once; find the examples, too."""
    folder = tmp_path_factory.mktemp("layers")
    (folder / "losses_on_layers.py").write_text(LOSSES)
    sys.path += [str(folder), str(ROOT / "examples")]
    yield folder
    for path in (str(folder), str(ROOT / "examples")):
        sys.path.remove(path)


def own(name: str, features: Any = BOTH, **args: Any) -> dict[str, Any]:
    module = "losses_on_layers" if name in LOSSES else "feature_losses"
    tree = {"name": "own", "path": f"{module}:{name}", "args": args}
    return tree if features is None else {**tree, "features": features}


def run_of(name: str, features: Any = BOTH, *, args: Any = None, **changes: Any) -> TrainConfig:
    tree = {"objective": own(name, features, **(args or {})), **BASE, **changes}
    return validated(TrainConfig, tree)


def teacher_of(run: TrainConfig) -> nn.Module:
    """Return the run's teacher, untrained."""
    made = run.teacher_run()
    assert made is not None
    return made.build_student().eval()


# --- what it computes


def test_the_hint_and_attention_transfer_are_their_formulas() -> None:
    from feature_losses import Hint, attention_transfer

    g = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(5, 10, generator=g), torch.arange(5)
    s, t = torch.randn(5, 3, 4, 4, generator=g), torch.randn(5, 6, 4, 4, generator=g)
    ce = -np.mean([p.log_softmax(0)[k].item() for p, k in zip(logits, labels, strict=True)])

    hint = Hint({"a": (3, 4, 4)}, {"b": (6, 4, 4)}, weight=0.5)
    first, second = hint.terms(logits, labels, {"a": s}, {"b": t})
    mapped, weight, bias = np.zeros((5, 6, 4, 4)), hint.regressor.weight, hint.regressor.bias
    assert bias is not None
    padded = np.pad(s.numpy(), ((0, 0), (0, 0), (1, 1), (1, 1)))
    for y in range(4):
        for x in range(4):
            window = padded[:, None, :, y : y + 3, x : x + 3] * weight.detach().numpy()
            mapped[:, :, y, x] = window.sum(axis=(2, 3, 4)) + bias.detach().numpy()
    distances = [0.5 * np.sum((a - b) ** 2) for a, b in zip(mapped, t.numpy(), strict=True)]
    assert first.item() == pytest.approx(ce, rel=1e-5)
    assert second.item() == pytest.approx(np.mean(distances), rel=1e-4)
    assert hint.kd_weight == 0.5

    def attention(maps: Tensor) -> list[float]:
        image = [sum(float(c[y, x]) ** 2 for c in maps) for y in range(4) for x in range(4)]
        length = math.sqrt(sum(a * a for a in image))
        return [a / length for a in image]

    apart = [
        (a - b) ** 2
        for mine, theirs in zip(s, t, strict=True)
        for a, b in zip(attention(mine), attention(theirs), strict=True)
    ]
    maps = {"a": s, "b": s}, {"a": t, "b": t}
    found = attention_transfer(logits, labels, *maps, beta=30.0)
    assert found.item() == pytest.approx(ce + 30 / 2 * 2 * np.mean(apart), rel=1e-5)


def test_an_epoch_with_a_hint_is_the_textbook_loop() -> None:
    """Compare with hooks and SGD by hand: student, regressor and teacher."""
    from feature_losses import Hint

    run = run_of("Hint", args={"weight": 0.1})
    teacher = teacher_of(run)
    ours = list(train(run, teacher=teacher))[-1].state()
    torch.manual_seed(address(0, "init"))
    student = run.student.build((1, 8, 8), 10).to(memory_format=torch.channels_last)
    torch.manual_seed(address(0, "objective"))
    hint = Hint({"2": (4, 8, 8)}, {"2": (6, 8, 8)}, weight=0.1)
    optimizer = torch.optim.SGD(
        [*student.parameters(), *hint.parameters()], lr=0.05, momentum=0.9, weight_decay=5e-4
    )
    outputs: dict[str, Tensor] = {}
    student[2].register_forward_hook(lambda m, i, out: outputs.update(student=out))  # type: ignore[index]
    teacher[2].register_forward_hook(lambda m, i, out: outputs.update(teacher=out))  # type: ignore[index]
    images, _ = run.data.load()
    rate = run.schedule
    for epoch in range(2):
        batches = loop.split_batches(epoch_order(images, 0, epoch), 64, 1)
        for step, batch in enumerate(batches):
            for group in optimizer.param_groups:
                group["lr"] = 0.05 * rate.factor(epoch + (step + 0.5) / len(batches), 2)
            x = (images.images[batch].float() - Digits.mean[0]) / Digits.std[0]
            with torch.no_grad():
                teacher(x)
            logits = student(x)
            distance = hint.regressor(outputs["student"]) - outputs["teacher"]
            loss = F.cross_entropy(logits, images.labels[batch])
            loss = loss + 0.1 * distance.square().flatten(1).sum(1).mean() / 2
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    for module, name in ((student, "model"), (hint, "objective")):
        for key, value in module.state_dict().items():
            assert torch.allclose(ours[name][key].float(), value.float(), atol=2e-5), key


def test_a_feature_loss_of_weight_zero_gives_the_student_of_plain_training_bitwise() -> None:
    plain = list(train(run_of("without_weight", {"student": [0, 6]})))
    ce = list(train(validated(TrainConfig, {**BASE, "objective": "ce"})))
    assert same(plain[-1].state()["model"], ce[-1].state()["model"])
    assert [e.metrics["train_loss"] for e in plain] == [e.metrics["train_loss"] for e in ce]


@pytest.mark.parametrize("labels", ["bank", "online"])
def test_a_loss_gets_its_layers_in_float32_and_in_their_order_whatever_the_precision(
    labels: str, tmp_path: Path
) -> None:
    tree = {**BASE["teacher"], "labels": labels}
    run = run_of("Looks", {"student": [6, 2], "teacher": [6, 2]}, precision="bf16", teacher=tree)
    assert last_of(run, find_or_train(run, tmp_path)).metrics["train_kd"] > 0


def last_of(run: TrainConfig, teacher: nn.Module | Bank | None) -> Epoch:
    return list(train(run, teacher=teacher))[-1]


@pytest.mark.parametrize("name", ["Base", "Attribute", "Normed"])
def test_a_projector_is_trained_and_neither_exported_nor_counted(name: str, tmp_path: Path) -> None:
    run = run_of(name)
    teacher = teacher_of(run)
    *_, metrics = train_in(tmp_path, run, teacher=teacher)
    plain = validated(TrainConfig, {**BASE, "objective": "ce"})
    student = plain.build_student()
    assert load_weights(tmp_path / WEIGHTS).keys() == student.state_dict().keys()
    assert metrics["parameters"] == sum(p.numel() for p in student.parameters())
    assert metrics["train_kd"] > 0 and "train_kd_ratio" not in metrics
    begun = run.ready_objective()
    assert isinstance(begun, OwnObjective)
    ended = last_of(run, teacher).state()["objective"]
    assert ended.keys() == begun.owned().state_dict().keys()
    trained = dict(begun.owned().named_parameters())
    assert trained and all(not ended[key].equal(value) for key, value in trained.items())


def test_the_weights_of_a_projector_are_drawn_from_the_seed_of_the_run() -> None:
    drawn = []
    for seed in (0, 0, 1):
        begun = run_of("Base", seed=seed).ready_objective()
        assert isinstance(begun, OwnObjective)
        drawn.append(begun.owned().state_dict()["project.weight"])
    assert drawn[0].equal(drawn[1]) and not drawn[0].equal(drawn[2])


@pytest.mark.parametrize("name", ["Base", "Normed"])
def test_a_run_with_a_projector_that_is_stopped_and_resumed_equals_one_never_stopped(
    name: str, tmp_path: Path
) -> None:
    run = run_of(name, epochs=3, checkpoint_every_s=0)
    teacher = teacher_of(run)
    whole = list(train(run, teacher=teacher))
    first = train_in(tmp_path, run, teacher=teacher)
    next(first)
    first.close()
    again = list(train_in(tmp_path, run, teacher=teacher))
    assert numbers(again) == numbers(whole)
    state = load_state(tmp_path)
    assert state is not None and same(state, whole[-1].state())


OWN_NETWORK = {"name": "own", "path": "test_models:odd", "args": {"kind": "auxiliary"}}
TWO = {
    "a class": pytest.param("Flat", {"student": ["1"], "teacher": ["1"]}, {}, marks=pytest.mark.long),
    "a network that lacks gradients": ("Flat", {"student": ["last"], "teacher": ["1"]}, {"student": OWN_NETWORK}),
}  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("name, features, changes", TWO.values(), ids=TWO)
def test_two_workers_agree_with_one_on_a_projector(
    name: str, features: Any, changes: dict[str, Any], tmp_path: Path, as_two_workers: TwoWorkers
) -> None:
    run = run_of(name, features, **{**MLP, **changes})
    one = last_of(run, teacher_of(run)).state()
    as_two_workers(train_as_worker, str(tmp_path), run.model_dump(mode="json"), teacher_of)
    two = torch.load(tmp_path / "state.pt", weights_only=True)
    for part in ("model", "objective"):
        assert one[part].keys() == two[part].keys() and one[part]
        for key, value in one[part].items():
            assert (two[part][key] - value).abs().max() < 1e-5, key
    for a, b in zip(numbers(one["history"]), numbers(two["history"]), strict=True):
        assert b == pytest.approx(a, abs=1e-5)


# --- the teacher's layers: from the bank, or the teacher itself


@pytest.mark.slow
def test_the_bank_holds_the_teachers_layers_and_they_are_those_of_the_teacher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = {**BASE["teacher"], "labels": "bank"}
    run = run_of("With_kd", teacher=tree, augment={"flip": True})
    bank = find_or_train(run, tmp_path)
    assert isinstance(bank, Bank) and run.banked
    online = run.model_copy(update={"teacher": run.teacher.model_copy(update={"labels": "online"})})  # type: ignore[union-attr]
    from_bank, asked = last_of(run, bank), last_of(online, bank.network())
    for key, value in asked.state()["model"].items():
        assert torch.allclose(from_bank.state()["model"][key].float(), value.float(), atol=1e-3)
    monkeypatch.setattr(Bank, "network", lambda self: pytest.fail("the teacher ran again"))
    again = find_or_train(run, tmp_path)
    assert same(last_of(run, again).state(), from_bank.state()), "all of it is in the bank"


def test_a_plan_counts_the_layers_that_the_bank_keeps_on_the_device() -> None:
    tree = {**BASE["teacher"], "labels": "bank"}
    plain, tapped = (run_of("plain", None, teacher=tree), run_of("Base", teacher=tree))
    kd = validated(TrainConfig, {**BASE, "objective": "kd", "teacher": tree})
    count = len(tapped.data.load()[0])
    assert resident_bytes(plain) < resident_bytes(kd)
    assert resident_bytes(tapped) - resident_bytes(kd) == 2 * count * 6 * 64


def test_layers_too_large_for_the_bank_are_asked_of_the_teacher_which_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = {**BASE["teacher"], "labels": "bank"}
    run = run_of("With_kd", teacher=tree)
    count, said = len(run.data.load()[0]), list[str]()
    bank = find_or_train(run, tmp_path)
    assert isinstance(bank, Bank)
    network = bank.network()
    monkeypatch.setattr(soft_labels, "LARGEST", 2 * count * 6 * 64 - 1)
    monkeypatch.setattr(Bank, "logits", lambda *args: pytest.fail("the bank was asked"))
    ended = [list(train(run, teacher=bank, say=said.append))[-1] for _ in range(2)]
    assert said == [
        "the outputs of the teacher's 2, 384 numbers an image, are too large for the bank of soft labels: the teacher "
        "runs in every step"
    ]
    online = last_of(run, network)
    assert all(same(one.state(), online.state()) for one in ended)


@pytest.mark.slow
def test_layers_for_which_the_disk_has_no_room_are_the_same_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of("With_kd", teacher={**BASE["teacher"], "labels": "bank", "seed": 7})
    bank, said = find_or_train(run, tmp_path), list[str]()
    assert isinstance(bank, Bank)
    bank.say = said.append
    monkeypatch.setattr(soft_labels, "_told", set())
    monkeypatch.setenv("TFKD_BANK_GB", "0.00005")  # logits have room, layers have none
    without = last_of(run, bank)
    assert len(said) == 1 and "TFKD_BANK_GB allows 0 MB, and a view needs" in said[0]
    monkeypatch.delenv("TFKD_BANK_GB")
    assert same(without.state(), last_of(run, find_or_train(run, tmp_path)).state())


@pytest.mark.slow
def test_layers_of_the_bank_are_not_taken_for_those_of_other_layers(tmp_path: Path) -> None:
    tree = {**BASE["teacher"], "labels": "bank"}
    ends = []
    for layer in (2, 1):
        run = run_of("Base", {"student": [2], "teacher": [layer]}, teacher=tree)
        ends.append(last_of(run, find_or_train(run, tmp_path)).metrics["train_kd"])
    assert ends[0] != ends[1]


def test_an_optional_teacher_is_needed_once_its_layers_are_named() -> None:
    assert not run_of("optional", None).needs_teacher
    run = run_of("optional")
    assert run.needs_teacher and run.try_own_code() == []
    assert last_of(run, teacher_of(run)).metrics["train_loss"] > 0


# --- what is refused

SETTINGS = {
    "not taken": (own("plain"), {}, "objective.plain.features.student: nothing would use 2: plain has no parameter student_features; add it, or leave them out"),
    "teacher not taken": (own("without_weight"), {}, "objective.without_weight.features.teacher: nothing would use 2: without_weight has no parameter teacher_features"),
    "not named": (own("without_weight", None), {}, "objective.without_weight.features.student: required, as without_weight takes student_features: name layers of the student's network, as in features: {student: [layer3]}"),
    "shapes": (own("Base", {"student": [2]}), {}, "objective.Base.features.teacher: required, as Base takes teacher_features and teacher_shapes"),
    "no teacher": (own("Base"), {"teacher": None}, "teacher.model: objective Base needs a teacher's network, and none is given"),
    "twice": (own("without_weight", {"student": ["2", 2]}), {}, "objective.without_weight.features.student: 2 is listed twice"),
    "by position": (own("by_position", {"student": [2]}), {}, "objective.by_position.features.student: by_position takes student_features by position alone; take it by name"),
    "shapes as argument": (own("Base", student_shapes={}), {}, "objective.Base.args.student_shapes: training gives it, from the layers of features; leave it out"),
    "features as argument": (own("without_weight", student_features=1), {}, "objective.without_weight.args.student_features: training gives it for each batch; leave it out"),
    "compile": (own("Base"), {"compile": "on"}, "compile: objective Base needs the outputs of layers, which a compiled student does not provide; set compile: off"),
    "own loop": (own("Base"), {"loop": "own_loop:train"}, "objective.Base.features: the loop of this package takes them from the networks; leave them out, and take them in your own loop"),
    "side": (own("plain", {"pupil": [2]}), {}, "objective.own.features.pupil: no such setting"),
    "no names": (own("without_weight", {"student": {"a": 1}}), {}, "objective.own.features.student: should be a list, got {'a': 1}"),
    "no name": (own("without_weight", {"student": [""]}), {}, "objective.own.features.student.0: String should have at least 1 character, got ''"),
}  # fmt: skip


@pytest.mark.parametrize("objective, changes, sentence", SETTINGS.values(), ids=SETTINGS)
def test_layers_that_nothing_could_use_are_told_from_the_signature(
    objective: dict[str, Any], changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ConfigError) as error:
        validated(TrainConfig, {**BASE, "objective": objective, **changes})
    assert any(problem.startswith(sentence) for problem in error.value.problems), str(error.value)


RESNET = {"student": "resnet18", "teacher": {"model": "resnet18"}}
ODD = {"student": "losses_on_layers:odd_net"}
TRIED = {
    "layer": (run_of, "without_weight", {"student": ["layr3"]}, RESNET, "objective.without_weight.features.student: resnet18 has no layer 'layr3'; did you mean 'layer3'?"),
    "far layer": (run_of, "without_weight", {"student": ["x"]}, {}, "objective.without_weight.features.student: cnn has no layer 'x'; its outer layers: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9"),
    "teacher's layer": (run_of, "Base", {"student": [2], "teacher": ["layer3.2"]}, {"teacher": {"model": "resnet18"}}, "objective.Base.features.teacher: resnet18 has no layer 'layer3.2'; did you mean 'layer3.1'?"),
    "mismatch": (run_of, "Mismatch", BOTH, {}, "objective Mismatch: losses_on_layers:Mismatch: given logits [8, 10], labels [8], student_features {2: [8, 4, 8, 8]}, teacher_features {2: [8, 6, 8, 8]}, it ends in RuntimeError: The size of tensor a (4) must match"),
    "of another width": (run_of, "Base", BOTH, MLP, "objective Base: losses_on_layers:Base: given logits [8, 10], labels [8], student_features {2: [8, 16]}"),
    "shapes": (run_of, "Wrong_shape", BOTH, {}, "objective Wrong_shape: losses_on_layers:Wrong_shape: made with (student_shapes={'2': (4, 8, 8)}, teacher_shapes={'2': (6, 8, 8)}), it ends in ValueError: not enough values to unpack"),
    "lazy": (run_of, "Lazy", BOTH, {}, "its project.weight has no shape before the first batch, when the optimizer needs it; build it from the parameters student_shapes and teacher_shapes"),
    "unused projector": (run_of, "Unused", BOTH, {}, "its parameter project.weight [6, 4, 1, 1] gets no gradient, so it would not be trained"),
    "detached projector": (run_of, "Detached", BOTH, {}, "its parameter project.weight [6, 4, 1, 1] gets no gradient, so it would not be trained"),
    "hidden projector": (run_of, "Hidden", BOTH, {}, "with requires_grad takes part in it, and nothing trains it; make it, or its module, an attribute of an object of a class with terms"),
    "of the module": (run_of, "of_module", {"student": [2]}, {}, "with requires_grad takes part in it, and nothing trains it"),
    "ignored": (run_of, "ignores", {"student": [2]}, {}, "it does not depend on the student's layer 2, which features.student asks for; use it, or leave it out"),
    "rooted": (run_of, "rooted", {"student": [2]}, {}, "its gradient by the student's layer 2 is not finite"),
    "no logits": (run_of, "on_layers_alone", {"student": [2]}, {}, "it does not depend on the logits"),
    "viewed": (run_of, "viewed", {"student": [2]}, {}, "student_features {2: [8, 4, 8, 8]}, it ends in RuntimeError: view size is not compatible"),
    "lost buffer": (run_of, "Averaging", BOTH, {}, "it keeps state between batches (its center changes from batch to batch)"),
    "twice in a pass": (run_of, "without_weight", {"student": ["relu"]}, ODD, "losses_on_layers:odd_net: layer 'relu' runs 2 times in a forward pass, and must run once"),
    "never": (run_of, "without_weight", {"student": ["unused"]}, ODD, "layer 'unused' runs 0 times in a forward pass"),
    "in place": (run_of, "without_weight", {"student": ["body.1"]}, ODD, "layer 'body.1' is overwritten in place by the next layer"),
    "not in training": (run_of, "without_weight", {"student": ["only_eval"]}, ODD, "objective.without_weight.features.student: layer 'only_eval' runs 0 times"),
    "in place in training": (run_of, "without_weight", {"student": ["pool.flat"]}, ODD, "features.student: layer 'pool.flat' is overwritten in place"),
    "no tensor": (run_of, "without_weight", {"student": ["pool.max"]}, ODD, "layer 'pool.max' gives tuple, not a tensor"),
}  # fmt: skip


@pytest.mark.parametrize("made, name, features, changes, sentence", TRIED.values(), ids=TRIED)
def test_a_loss_on_layers_that_cannot_be_trained_with_is_told_before_anything_starts(
    made: Any, name: str, features: Any, changes: dict[str, Any], sentence: str
) -> None:
    run = made(name, features, **changes)
    with pytest.raises(ConfigError) as error:
        run.try_own_code()
    assert sentence in str(error.value)


@pytest.mark.parametrize("name", ["Base", "With_kd", "Normed", "Attribute", "Flat"])
def test_a_loss_on_layers_that_is_one_is_accepted_and_moves_no_random_number(name: str) -> None:
    before = torch.get_rng_state()
    run = run_of(name, BOTH, **(MLP if name == "Flat" else {}))
    assert run.try_own_code() == []
    assert torch.equal(before, torch.get_rng_state())


def test_the_shape_of_a_layer_is_that_of_an_image_and_the_network_is_as_before() -> None:
    network = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(108, 5))
    state = {key: value.clone() for key, value in network.state_dict().items()}
    assert shapes_of(network, ["0", "2"], (1, 8, 8), "") == {"0": (3, 6, 6), "2": (108,)}
    assert network.training and same(state, dict(network.state_dict()))
    assert not any(module._forward_hooks for module in network.modules())


# --- what is remembered, searched and explained


def test_fingerprints_of_objectives_without_layers_do_not_know_of_them() -> None:
    plain = run_of("plain", None)
    assert "features" not in plain.objective.content()
    named = {run_of("without_weight", {"student": k}).fingerprint() for k in ([0], [2], "2", 2)}
    assert len(named) == 2


SPACE = {
    **BASE,
    "objective": [
        own("without_weight", {"student": {"choices": [[2], [6]]}}, weight={"low": 0.1, "high": 1}),
        own("Base", weight=None) | {"args": {}},
        "kd",
    ],
    "search": {"num_samples": 10},
}


def test_layers_may_be_searched_and_a_space_reads_back_without_their_code() -> None:
    space = build_space(SPACE)
    names = {p.name for p in space.parameters if "features" in p.name}
    assert names == {"objective.without_weight.features.student"}
    ends = [b.config({p.name: p.domain.probes[-1] for p in b.parameters}) for b in space.branches]
    assert isinstance(ends[0].objective, OwnObjective)
    assert ends[0].objective.features.student == ("6",)
    assert [end.needs_teacher for end in ends[:3]] == [False, True, True]
    assert space.try_own_code() == []
    with only_reading():
        again = build_space(space.tree)
    assert again.parameters == space.parameters


def test_explain_says_that_a_gradient_by_the_logits_does_not_show_a_loss_on_layers() -> None:
    space = build_space(SPACE)
    text = " ".join(" ".join(explained(space)).split())
    assert text.count("also learns from layers of the networks") == 2
    assert not [w for w in warnings_of(space) if "without_weight" in w]


def test_the_weight_of_ce_is_known_of_a_class_on_layers() -> None:
    assert (
        run_of("Base").ce_share == 1 and run_of("without_weight", {"student": [2]}).ce_share is None
    )


# --- the example


@pytest.mark.slow
def test_the_losses_of_the_example_train_and_search_what_they_say(tmp_path: Path) -> None:
    changes = ["epochs=1", "data.subset=300", "teacher.epochs=1"]
    space = load_space(ROOT / "examples/feature_losses.yaml", changes)
    assert space.try_own_code() == []
    assert [b.objective for b in space.branches][:2] == ["Hint", "attention_transfer"]
    for branch in space.branches[:2]:
        teacher = find_or_train(branch.example, tmp_path)
        (epoch,) = train(branch.example, teacher=teacher)
        assert epoch.metrics["train_loss"] < 10
