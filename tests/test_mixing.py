"""Mixup, cutmix and their labels: against torchvision, objectives as slow loops, bank and resume."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import OBJECTIVES, TwoWorkers
from test_folder import write_folder
from test_loop import _worker, count_augmented, numbers, same
from torch import Tensor
from torchvision.transforms import v2

from tfkd_ray.learn import loop
from tfkd_ray.learn.augment import Augment
from tfkd_ray.learn.config import TrainConfig
from tfkd_ray.learn.data import Digits
from tfkd_ray.learn.images import ImageSet, address
from tfkd_ray.learn.loop import epoch_order, train
from tfkd_ray.learn.mixing import Mix, Mixed, drawn_mix
from tfkd_ray.learn.objectives import (
    Canonical,
    CrossEntropy,
    DecoupledKD,
    Dist,
    KnowledgeDistillation,
    LabelSmoothing,
    StandardisedKD,
    TfkdReg,
    TfkdRegCode,
    TfkdSelf,
)
from tfkd_ray.learn.teachers import find_or_train
from tfkd_ray.settings.errors import ConfigError
from tfkd_ray.settings.schema import validated
from tfkd_ray.space.space import build_space


def split_of(positions: list[int], official: int = 60) -> ImageSet:
    """Return a split with images at these positions of the official set; their labels are positions."""
    at = torch.tensor(positions)
    pixels = torch.randint(0, 256, (len(at), 3, 8, 12), dtype=torch.uint8)
    return ImageSet(pixels, at % 10, at, official)


def pictures(split: str) -> tuple[Tensor, Tensor]:
    """Return 300 blurred patterns of noise in colour, one pattern a class."""
    g = torch.Generator().manual_seed(0)
    classes = torch.rand(10, 3, 8, 8, generator=g) * 200
    labels = torch.arange(300) % 10
    noise = torch.randint(0, 56, (300, 3, 8, 8), generator=g)
    return (classes[labels] + noise).to(torch.uint8), labels


DATA = {"name": "own", "path": f"{__name__}:pictures", "shape": [3, 8, 8], "num_classes": 10}


def config(**changes: Any) -> TrainConfig:
    tree = {
        "data": DATA,
        "objective": "ce",
        "student": {"name": "mlp", "hidden": [16]},
        "optim": {"batch_size": 50},
        "epochs": 3,
        **changes,
    }
    return validated(TrainConfig, tree)


EVERY = {
    "mixup": {"mixup": 0.4},
    "cutmix": {"cutmix": 1.0},
    "mixup and cutmix": {"mixup": 0.2, "cutmix": 1.0},
    "erasing": {"erase": 0.5},
    "trivial": {"trivial": True},
    "rand": {"rand": {"ops": 2, "magnitude": 5}},
    "alternating flip": {"flip": "alternating"},
    "all": {"crop_padding": 1, "flip": "alternating", "trivial": True, "erase": 0.3, "mixup": 0.2, "cutmix": 1.0},
}  # fmt: skip
every = pytest.mark.parametrize("augment", EVERY.values(), ids=EVERY)


# --- images and labels, as torchvision mixes them


def drawn(mixup: float, cutmix: float, count: int = 40) -> Mix:
    split = split_of(list(range(count)), count)
    return drawn_mix(split, (8, 12), seed=0, epoch=2, mixup=mixup, cutmix=cutmix)


def test_mixup_is_torchvisions() -> None:
    images, mix = torch.randn(40, 3, 8, 12), drawn(0.4, 0)
    ours, theirs = mix(images, images[mix.partner]), v2.MixUp(num_classes=10)
    labels = torch.arange(40) % 10
    q = mix.labels(labels).probabilities(10)
    for k in range(40):
        pair = torch.stack([images[k], images[mix.partner[k]]])
        lam = float(mix.share[k])
        wanted = theirs.transform(pair, {"labels": None, "lam": lam, "batch_size": 2})
        assert torch.allclose(ours[k], wanted[0], atol=1e-6)
        both = F.one_hot(torch.stack([labels[k], labels[mix.partner[k]]]), 10)
        assert torch.allclose(q[k], theirs._mixup_label(both, lam=lam)[0], atol=1e-6)


def test_cutmix_is_torchvisions() -> None:
    images, mix = torch.randn(40, 3, 8, 12), drawn(0, 1.0)
    ours, theirs = mix(images, images[mix.partner]), v2.CutMix(num_classes=10)
    for k in range(40):
        top, left, bottom, right = mix.box[k].tolist()
        pair = torch.stack([images[k], images[mix.partner[k]]])
        how = {"labels": None, "box": (left, top, right, bottom), "batch_size": 2}
        assert ours[k].equal(theirs.transform(pair, how)[0])
        assert mix.share[k] == pytest.approx(1 - (bottom - top) * (right - left) / 96)


def test_boxes_are_those_that_torchvision_draws_for_the_same_numbers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from tfkd_ray.learn.mixing import _boxes

    share = torch.rand(200, dtype=torch.float64)
    down, right = torch.rand(200), torch.rand(200)
    ours, theirs = _boxes(share, down, right, (8, 12)), v2.CutMix(num_classes=10)
    for k in range(200):
        centres = iter([torch.tensor([int(right[k] * 12)]), torch.tensor([int(down[k] * 8)])])
        with monkeypatch.context() as patch:
            patch.setattr(torch, "randint", lambda *size, centres=centres, **more: next(centres))
            patch.setattr(theirs, "_dist", torch.distributions.Categorical(torch.ones(1)))
            patch.setattr(theirs._dist, "sample", lambda size, k=k: share[k])
            x1, y1, x2, y2 = theirs.make_params([torch.zeros(3, 8, 12)])["box"]
        assert ours[k].tolist() == [y1, x1, y2, x2]


def test_shares_have_the_beta_distribution_and_a_coin_decides_between_both() -> None:
    count = 20_000
    for alpha in (0.2, 1.0, 4.0):
        share = drawn(alpha, 0, count).share
        assert float(share.mean()) == pytest.approx(0.5, abs=0.01)
        assert float(share.var()) == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.03)
    both = drawn(0.2, 1.0, count)
    pasted = both.weight == 1
    assert float(pasted.float().mean()) == pytest.approx(0.5, abs=0.02)
    assert (both.box[~pasted] == 0).all() and both.weight[~pasted].equal(both.share[~pasted])
    pieces = (both.box[pasted] != 0).any(1).float().mean()
    assert pieces > 0.8


# --- partners


@pytest.mark.slow
def test_each_image_of_the_split_is_the_partner_of_one_other() -> None:
    split = split_of([3, 50, 7, 21, 22, 40, 59, 0])
    partners = [drawn_mix(split, (8, 12), 0, epoch, 0.2, 0).partner for epoch in range(30)]
    for partner in partners:
        assert partner.sort().values.tolist() == list(range(8))
        assert (partner != torch.arange(8)).all()
    assert len({tuple(p.tolist()) for p in partners}) > 25
    counts = torch.zeros(8, 8)
    for epoch in range(2000):
        counts[torch.arange(8), drawn_mix(split, (8, 12), 0, epoch, 0.2, 0).partner] += 1
    others = counts[~torch.eye(8, dtype=torch.bool)]
    assert others.min() > 200 and others.max() < 380  # 2000 / 7


def test_partner_share_and_box_belong_to_the_image_not_to_its_index() -> None:
    positions = [3, 50, 7, 21, 22, 40, 59, 0]
    split = split_of(positions)
    turned = split.part(torch.arange(7, -1, -1))
    a, b = (drawn_mix(s, (8, 12), 5, 1, 0.2, 1.0) for s in (split, turned))
    assert split.positions[a.partner].equal(turned.positions[b.partner].flip(0))
    assert a.share.equal(b.share.flip(0)) and a.box.equal(b.box.flip(0))


def test_partners_come_from_the_train_images_of_the_split_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = Digits.load

    def spoiled(self: Digits) -> Any:
        train_set, val_set = whole(self)
        stored = 255 - train_set.stored
        rows = torch.arange(len(train_set)) if train_set.rows is None else train_set.rows
        stored[rows] = train_set.images
        return dataclasses.replace(train_set, stored=stored), val_set

    c = config(augment=EVERY["mixup and cutmix"], data={"name": "digits", "subset": 300})
    plain = list(train(c))[-1].state()
    monkeypatch.setattr(Digits, "load", spoiled)
    train_set, _ = c.data.load()
    assert isinstance(train_set, ImageSet)
    assert not train_set.stored.equal(whole(c.data)[0].stored)  # type: ignore[arg-type]
    assert same(plain, list(train(c))[-1].state())


def test_the_batch_size_does_not_change_what_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for size in (50, 32):
        seen: dict[int, Tensor] = {}
        c = config(augment=EVERY["all"], epochs=1, optim={"batch_size": size})
        for index, images in batches_of(c, monkeypatch):
            seen |= dict(zip(index.tolist(), images, strict=True))
        found.append(seen)
    assert found[0].keys() == found[1].keys()
    assert all(found[0][k].equal(found[1][k]) for k in found[0])


def test_images_augmented_ahead_of_the_steps_are_those_of_each_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A mixed image is augmented once an epoch, unless the images would take too much memory."""
    c = config(augment={**EVERY["all"], "trivial": True}, epochs=2)
    called = count_augmented(monkeypatch)
    images, _ = c.data.load()
    ahead, count = list(train(c))[-1].state(), len(images)
    assert sum(called) == 2 * count
    half, cpu = [torch.arange(count // 2)], torch.device("cpu")  # of one of two workers
    assert not loop._augments_ahead(images, c, half, cpu)
    called.clear()
    monkeypatch.setattr(loop, "AUGMENTED_AHEAD", count * 64 * 3 - 1)
    assert same(ahead, list(train(c))[-1].state()) and sum(called) == 4 * count


def batches_of(c: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Tensor]]:
    """Return the indices and the images of each batch of the first epoch."""
    images: list[Tensor] = []
    build = type(c.student).build

    def watched(self: Any, shape: Any, classes: int) -> torch.nn.Module:
        network = build(self, shape, classes)
        network.register_forward_pre_hook(lambda m, given: images.append(given[0].clone()))
        return network

    with monkeypatch.context() as patch:
        patch.setattr(type(c.student), "build", watched)
        next(train(c))
    train_set, _ = c.data.load()
    batches = epoch_order(train_set, c.seed, 0).split(c.optim.batch_size)
    trained = [x for x in images if len(x) > 2][: len(batches)]
    return list(zip(batches, trained, strict=True))


def test_partners_in_a_streamed_folder_are_decoded_with_their_own_crops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = str(write_folder(tmp_path, train=4, side=40))
    data = {
        "name": "image_folder",
        "root": root,
        "num_classes": 2,
        "image_size": 32,
        "val_fraction": 0.0,
    }
    augment = {"resized_crop": True, "flip": False, "rotation_degrees": 0, "mixup": 1.0}
    c = config(data=data, augment=augment, epochs=1, optim={"batch_size": 4}, recipe="modern")
    images, _ = c.data.load()
    view, mix = c.augment.of_epoch(0, 0, images, c.data.shape[1:])
    assert mix is not None
    mean, std = (torch.tensor(x).view(-1, 1, 1) for x in c.data.statistics())

    def seen(k: int) -> Tensor:
        (image,) = next(images.read([torch.tensor([k])], view.crop))
        return (image.float() - mean) / std

    for index, batch in batches_of(c, monkeypatch):
        for k, found in zip(index.tolist(), batch, strict=True):
            share = float(mix.share[k])
            wanted = share * seen(k) + (1 - share) * seen(int(mix.partner[k]))
            assert torch.allclose(found, wanted, atol=1e-5)


# --- a whole epoch, and the rules of a run


def test_an_epoch_is_the_textbook_loop_with_images_mixed_one_by_one() -> None:
    augment = Augment(crop_padding=1, erase=0.3, mixup=0.4, cutmix=1.0)
    c = config(augment=augment.model_dump(), epochs=2)
    ours = list(train(c))[-1].state()["model"]
    net = c.build_student()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    images, _ = c.data.load()
    mean, std = (torch.tensor(x).view(1, -1, 1, 1) for x in c.data.statistics())
    for epoch in range(2):
        view, mix = augment.of_epoch(0, epoch, images, (8, 8))
        assert mix is not None
        seen = []
        for k in range(len(images)):
            one = torch.tensor([k])
            x = augment(next(images.read([one])), view.of(one)).float()
            seen.append(augment.erased((x - mean) / std, view.of(one))[0])
        batches = epoch_order(images, 0, epoch).split(50)
        for step, batch in enumerate(batches):
            x, q = torch.zeros(len(batch), 3, 8, 8), torch.zeros(len(batch), 10)
            for i, k in enumerate(batch.tolist()):
                p, share = int(mix.partner[k]), float(mix.share[k])
                top, left, bottom, right = mix.box[k].tolist()
                x[i] = float(mix.weight[k]) * seen[k] + (1 - float(mix.weight[k])) * seen[p]
                x[i, :, top:bottom, left:right] = seen[p][:, top:bottom, left:right]
                q[i, images.labels[k]] += share
                q[i, images.labels[p]] += 1 - share
            for group in optimizer.param_groups:
                group["lr"] = 0.1 * c.schedule.factor(epoch + (step + 0.5) / len(batches), 2)
            torch.manual_seed(address(0, "step", epoch, step, 0))
            optimizer.zero_grad()
            F.cross_entropy(net(x), q).backward()
            optimizer.step()
    for name, value in net.state_dict().items():
        assert torch.allclose(ours[name], value, atol=1e-5), name


@pytest.mark.slow
@every
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(augment: dict[str, Any]) -> None:
    c = config(augment=augment, objective="tfkd_reg")
    whole = list(train(c))
    plain = next(train(config(objective="tfkd_reg"))).metrics["train_loss"]
    assert whole[0].metrics["train_loss"] != plain
    run = train(c)
    rest = list(train(c, next(run).state()))
    assert numbers(rest) == numbers(whole)[1:]
    assert same(rest[-1].state(), whole[-1].state())


@pytest.mark.slow
@every
def test_training_from_the_bank_is_training_with_the_teacher_in_every_step(
    augment: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half precision keeps 11 bits."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = []
    for labels in ("online", "bank"):
        teacher = {"model": {"name": "mlp", "hidden": [24]}, "epochs": 2, "labels": labels}
        c = config(augment=augment, objective="kd", teacher=teacher, epochs=2)
        found.append(list(train(c, teacher=find_or_train(c, tmp_path))))
    views = list((tmp_path / "tfkd_ray" / "soft_labels").glob("[0-9a-f]*"))
    assert len(views) == 3  # two epochs and validation
    for a, b in zip(*found, strict=True):
        for name in ("train_loss", "train_ce", "train_kd", "val_teacher_kl"):
            assert b.metrics[name] == pytest.approx(a.metrics[name], rel=1e-3, abs=5e-4)
        weights = a.state()["model"]
        assert all((b.state()["model"][k] - v).abs().max() < 2e-3 for k, v in weights.items())


def test_a_teacher_is_trained_on_the_mixes_of_the_run() -> None:
    c = config(objective="tfkd_self", augment=EVERY["mixup"])
    (run,) = c.teacher_runs()
    assert run.augment == c.augment
    (plain,) = config(objective="tfkd_self").teacher_runs()
    assert run.fingerprint() != plain.fingerprint()


@pytest.mark.long
def test_two_workers_agree_with_one(tmp_path: Path, as_two_workers: TwoWorkers) -> None:
    c = config(augment=EVERY["all"], objective="tfkd_reg", optim={"batch_size": 64})
    one = list(train(c))[-1].state()
    as_two_workers(_worker, str(tmp_path), c.model_dump(mode="json"))
    two = torch.load(tmp_path / "state.pt", weights_only=True)
    for name, value in one["model"].items():
        assert (two["model"][name] - value).abs().max() < 1e-5, name
    for a, b in zip(numbers(one["history"]), numbers(two["history"]), strict=True):
        assert {k: b[k] for k in a} == pytest.approx(a, abs=1e-5)


def test_a_batch_of_mixes_in_pieces_is_the_whole_batch() -> None:
    one, three = (
        list(train(config(augment=EVERY["all"], optim={"batch_size": 50, "accumulate": pieces})))
        for pieces in (1, 3)
    )
    for a, b in zip(one, three, strict=True):
        assert b.metrics["train_loss"] == pytest.approx(a.metrics["train_loss"], rel=1e-4)
    weights = one[-1].state()["model"]
    assert all((three[-1].state()["model"][k] - v).abs().max() < 1e-4 for k, v in weights.items())


def test_validation_is_not_mixed(monkeypatch: pytest.MonkeyPatch) -> None:
    c = config(augment=EVERY["all"], epochs=1)
    _, val = c.data.load()
    assert val is not None
    found: list[Tensor] = []
    network = c.build_student()
    network.load_state_dict(next(train(c)).state()["model"])
    mean, std = (torch.tensor(x).view(1, -1, 1, 1) for x in c.data.statistics())
    for images in val.read(list(torch.arange(len(val)).split(50))):
        found.append(network.eval()((images.float() - mean) / std))
    nll = F.cross_entropy(torch.cat(found), val.labels)
    assert next(train(c)).metrics["val_nll"] == pytest.approx(nll.item(), rel=1e-5)


# --- alternating flip, and what stays as it was


def test_an_alternating_flip_mirrors_each_image_in_every_other_epoch() -> None:
    augment = Augment(flip="alternating")
    views = [augment.view(0, epoch, 1000).flipped for epoch in range(4)]
    assert float(views[0].float().mean()) == pytest.approx(0.5, abs=0.06)
    assert views[1].equal(~views[0]) and views[2].equal(views[0]) and views[3].equal(views[1])
    assert not Augment(flip="alternating").view(1, 0, 1000).flipped.equal(views[0])


def test_settings_and_bank_keys_of_before_are_unchanged() -> None:
    paper = Augment(crop_padding=4, flip=True, rotation_degrees=15)
    tree = {"resized_crop": False, "crop_padding": 4, "flip": True, "rotation_degrees": 15.0}
    assert paper.model_dump(mode="json") == paper.content() == tree
    assert paper.key(3, 1) == {"split": "train", "augment": tree, "seed": 3, "epoch": 1}
    assert "epoch" not in Augment().key(0, 1)
    for augment in EVERY.values():
        made = validated(Augment, augment)
        assert not made.is_none and made.key(0, 1) != made.key(0, 2)
        assert validated(Augment, made.model_dump(mode="json")) == made
    keys = [str(validated(Augment, augment).key(0, 1)) for augment in EVERY.values()]
    assert len(set(keys)) == len(keys)


def test_the_new_draws_do_not_move_the_old_ones() -> None:
    old = {"crop_padding": 4, "flip": True, "rotation_degrees": 15}
    plain = validated(Augment, old).view(0, 3, 500)
    full = validated(Augment, {**old, "trivial": True, "erase": 1, "mixup": 1}).view(0, 3, 500)
    for a, b in zip(plain[:5], full[:5], strict=True):
        assert a.equal(b)
    assert plain.angle[:3].tolist() == pytest.approx([-0.0, 0.0, 0.0], abs=math.pi)


# --- objectives: each formula as a slow loop

K, T = 6, 3.0


def softmax(z: list[float], temperature: float = 1.0) -> list[float]:
    top = [math.exp((x - max(z)) / temperature) for x in z]
    return [x / sum(top) for x in top]


def kl(q: list[float], p: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(q, p, strict=True) if a > 0)


def given() -> tuple[Tensor, Mixed, Tensor]:
    g = torch.Generator().manual_seed(0)
    logits, teacher = (3 * torch.randn(9, K, generator=g, dtype=torch.float64) for _ in range(2))
    first, second = torch.randint(K, (2, 9), generator=g)
    second[0] = first[0]  # two images of one class
    share = torch.rand(9, generator=g, dtype=torch.float64)
    share[1], share[2] = 0, 1
    return logits, Mixed(first, second, share), teacher


def flat(label: int, a: float) -> list[float]:
    return [a if k == label else (1 - a) / (K - 1) for k in range(K)]


def reg(a: float, T: float) -> Callable[[int], list[float]]:
    return lambda label: softmax([math.log(p) for p in flat(label, a)], T)


def reg_code(a: float, T: float) -> Callable[[int], list[float]]:
    return lambda label: softmax(flat(label, a), T)


def slow(
    objective: Canonical, soft: Callable[[int, list[float]], list[float]], temperature: float
) -> float:
    """Return the mean of (1 - alpha) CE(q) + weight * KL(soft || student_T), image by image.

    Args:
        soft: returns the target of an image, of its number and the teacher's logits.
    """
    logits, labels, teacher = given()
    total = 0.0
    for i, (z, t) in enumerate(zip(logits.tolist(), teacher.tolist(), strict=True)):
        a, b, share = (part[i].item() for part in labels)
        p = softmax(z)
        ce = -share * math.log(p[int(a)]) - (1 - share) * math.log(p[int(b)])
        distance = kl(soft(i, t), softmax(z, temperature))
        total += objective.ce_weight * ce + objective.kd_weight * distance
    return objective.loss_scale * total / len(logits)


def mixture(of: Callable[[int], list[float]]) -> Callable[[int, list[float]], list[float]]:
    _, labels, _ = given()

    def target(i: int, t: list[float]) -> list[float]:
        a, b, share = (part[i].item() for part in labels)
        return [share * x + (1 - share) * y for x, y in zip(of(int(a)), of(int(b)), strict=True)]

    return target


DEFINED: dict[str, tuple[Canonical, Callable[[int, list[float]], list[float]], float]] = {
    "ce": (CrossEntropy(loss_scale=0.5), lambda i, t: [1 / K] * K, 1.0),
    "lsr": (LabelSmoothing(alpha=0.3), lambda i, t: [1 / K] * K, 1.0),
    "kd": (KnowledgeDistillation(alpha=0.7, temperature=T), lambda i, t: softmax(t, T), T),
    "tfkd_self": (TfkdSelf(alpha=0.7, temperature=T), lambda i, t: softmax(t, T), T),
    "tfkd_reg": (TfkdReg(alpha=0.6, temperature=T, correct_prob=0.9), mixture(reg(0.9, T)), T),
    "tfkd_reg_code": (
        TfkdRegCode(alpha=0.6, temperature=0.3, correct_prob=0.9), mixture(reg_code(0.9, 0.3)), 1.0,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DEFINED)
def test_an_objective_of_mixed_labels_is_its_definition(name: str) -> None:
    objective, soft, temperature = DEFINED[name]
    logits, labels, teacher = given()
    found = objective(logits, labels, teacher)
    assert found.item() == pytest.approx(slow(objective, soft, temperature), rel=1e-10)


@pytest.mark.parametrize("objective", [Dist(), StandardisedKD()], ids=lambda o: o.name)
def test_soft_parts_of_a_teachers_logits_know_no_label(objective: Canonical) -> None:
    logits, labels, teacher = given()
    mixed, hard = (objective.terms(logits, x, teacher) for x in (labels, labels.first))
    assert mixed.kd is not None and hard.kd is not None and mixed.kd.equal(hard.kd)
    q = labels.probabilities(K).double()
    assert mixed.ce.item() == pytest.approx(F.cross_entropy(logits, q).item(), rel=1e-12)


@pytest.mark.parametrize(
    "objective", [o for o in OBJECTIVES if o.soft_labels], ids=lambda o: o.name
)
@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_mix_of_one_image_alone_has_its_hard_label(objective: Canonical, share: float) -> None:
    logits, labels, teacher = given()
    alone = labels._replace(share=torch.full((9,), share, dtype=torch.float64))
    hard = labels.first if share else labels.second
    a, b = objective(logits, alone, teacher), objective(logits, hard, teacher)
    assert a.item() == pytest.approx(b.item(), rel=1e-12)


@pytest.mark.parametrize("name", ["lsr", "kd", "tfkd_reg", "tfkd_reg_code"])
def test_the_soft_target_of_a_mix_gives_the_gradient(name: str) -> None:
    objective, _, _ = DEFINED[name]
    logits, labels, teacher = given()
    logits.requires_grad_()
    soft = objective.terms(logits, labels, teacher).kd
    assert soft is not None
    (gradient,) = torch.autograd.grad(soft, logits)
    shares = labels.probabilities(K).numpy()
    found = objective.soft_target(shares, teacher.numpy())
    assert found is not None
    q, temperature = found
    p = (logits.detach() / temperature).softmax(1).numpy()
    assert gradient.numpy() == pytest.approx((p - q) / temperature / 9, abs=1e-12)


# --- what has no such form


def test_dkd_is_refused_with_mixed_labels_and_no_other_objective() -> None:
    teacher = {"model": "mlp"}
    for name in ("mixup", "cutmix"):
        with pytest.raises(ConfigError) as error:
            config(objective="dkd", teacher=teacher, augment={name: 0.2})
        assert f"augment.{name}: objective dkd has no form for the labels of mixed images" in str(
            error.value
        )
    config(objective="dkd", teacher=teacher, augment={"trivial": True, "erase": 0.1})
    logits, labels, soft = given()
    with pytest.raises(ValueError, match="dkd: has no form"):
        DecoupledKD()(logits, labels, soft)


def test_a_space_with_a_mix_that_an_objective_cannot_learn_from_is_refused() -> None:
    tree = {"objective": ["dkd", "ce"], "teacher": {"model": "mlp"}}
    with pytest.raises(ConfigError, match=r"augment\.mixup: objective dkd has no form"):
        build_space({**tree, "augment": {"mixup": {"choices": [0, 0.2]}}})
    build_space({**tree, "augment": {"mixup": 0}})


LOSSES = """
import torch
import torch.nn.functional as F

def soft(logits, labels, scale: float = 1.0):
    assert labels.shape in (logits.shape, logits.shape[:1])
    return F.cross_entropy(logits, labels) * scale
soft.soft_labels = True

def hard(logits, labels):
    return F.cross_entropy(logits, labels)

def layered(logits, labels, student_features):
    return F.cross_entropy(logits, labels) + 0.1 * student_features["1"].square().mean()
layered.soft_labels = True

def loop(config, state, teacher):
    yield
"""


def test_an_own_loss_that_takes_probabilities_learns_from_them_and_others_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "losses_of_mixes.py").write_text(LOSSES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    augment = EVERY["mixup and cutmix"]
    own = next(train(config(objective="losses_of_mixes:soft", augment=augment))).metrics
    ce = next(train(config(augment=augment))).metrics
    assert own["train_loss"] == pytest.approx(ce["train_loss"], rel=1e-5)
    layers = {"name": "own", "path": "losses_of_mixes:layered", "features": {"student": "1"}}
    assert next(train(config(objective=layers, augment=augment))).metrics["train_loss"] > 0
    with pytest.raises(ConfigError) as error:
        config(objective="losses_of_mixes:hard", augment=augment)
    assert "declare hard.soft_labels = True if it takes probabilities [B, K]" in str(error.value)
    with pytest.raises(ConfigError, match=r"augment\.mixup: the loop of this package mixes images"):
        config(loop="losses_of_mixes:loop", augment=augment)


@pytest.mark.parametrize(
    "augment, sentence",
    [
        (
            {"flip": "alternate"},
            "augment.flip: must be true, false or alternating, got 'alternate'",
        ),
        ({"trivial": True, "rand": {}}, "augment: trivial and rand: one of the two"),
        (
            {"rand": {"ops": 0}},
            "augment.rand.ops: should be at least 1, got 0",
        ),
        ({"erase": 1.5}, "augment.erase: should be at most 1, got 1.5"),
        ({"mixup": -0.1}, "augment.mixup: should be at least 0, got -0.1"),
        (
            {"trivial": True, "mixup": 1},
            "augment.trivial: is for pixels of 0 to 255, and those of digits end at 16",
        ),
        ({"cutmx": 1}, "augment.cutmx: no such setting; did you mean 'cutmix'?"),
    ],
)
def test_a_wrong_setting_is_told_with_field_rule_and_value(augment: Any, sentence: str) -> None:
    with pytest.raises(ConfigError) as error:
        config(augment=augment, data="digits")
    assert sentence in str(error.value)


# --- spaces


def test_a_range_on_which_a_teacher_depends_is_refused_and_choices_make_one_teacher_each() -> None:
    kd = {"objective": "kd", "teacher": {"model": "mlp"}}
    for augment in ({"mixup": {"low": 0, "high": 1}}, {"rotation_degrees": {"low": 0, "high": 9}}):
        (name,) = augment
        with pytest.raises(
            ConfigError, match=f"augment.{name}: choices only .teachers are trained"
        ):
            build_space({**kd, "augment": augment})
        build_space({"objective": "ce", "augment": augment})
    space = build_space({**kd, "augment": {"mixup": {"choices": [0, 0.2, 1]}}})
    assert len(space.teacher_runs()) == 3
    with pytest.raises(ConfigError, match=r"student\.dropout: choices only"):
        build_space(
            {
                "objective": "tfkd_self",
                "student": {"name": "mlp", "dropout": {"low": 0, "high": 0.5}},
            }
        )


def test_every_setting_is_searched_and_the_space_reads_back() -> None:
    augment = {
        "mixup": {"low": 0, "high": 1},
        "cutmix": {"choices": [0, 1]},
        "erase": {"low": 0, "high": 0.5},
        "flip": {"choices": [False, True, "alternating"]},
        "rand": {"ops": {"low": 1, "high": 3}, "magnitude": {"low": 1, "high": 14}},
    }
    space = build_space({"objective": "ce", "augment": augment, "data": "fashion_mnist"})
    assert len(space.parameters) == 6 and build_space(space.tree).tree == space.tree
    policies = {"choices": [{"mixup": 0.2}, {"trivial": True}, {"rand": {"magnitude": 5}}]}
    space = build_space({"objective": "ce", "augment": policies, "data": "fashion_mnist"})
    assert build_space(space.tree).tree == space.tree
