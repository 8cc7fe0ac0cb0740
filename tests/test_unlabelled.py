"""Unlabelled images: the sequence, the loss as a slow loop, bank, resume, workers, bad input."""

import dataclasses
import itertools
import math
import os
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import OBJECTIVES, TwoWorkers, long_after
from PIL import Image
from test_folder import write_folder
from test_loop import numbers, same
from torch import Tensor

from tfkd_ray.learn.augment import Augment
from tfkd_ray.learn.checkpoint import load_state
from tfkd_ray.learn.config import WITHOUT_LABELS, TrainConfig
from tfkd_ray.learn.data import Digits
from tfkd_ray.learn.dataset import load_unlabelled
from tfkd_ray.learn.images import FolderSet, ImageSet, address
from tfkd_ray.learn.loop import LOOP_VERSION, epoch_order, train, train_in
from tfkd_ray.learn.objectives import Terms
from tfkd_ray.learn.soft_labels import Bank
from tfkd_ray.learn.teachers import bank_of, find_or_train
from tfkd_ray.learn.unlabelled import UnlabelledStream, number_beside
from tfkd_ray.settings import own_code
from tfkd_ray.settings.errors import ConfigError
from tfkd_ray.settings.schema import validated
from tfkd_ray.space.arms import build_arms
from tfkd_ray.space.space import build_space

K = 10
TAUGHT = [o for o in OBJECTIVES if o.learns_without_labels]
taught = pytest.mark.parametrize("objective", TAUGHT, ids=lambda o: o.name)
AUGMENTS = {
    "none": {},
    "crop": {"crop_padding": 1, "rotation_degrees": 10},
    "mixup": {"mixup": 0.4},
    "mixup and cutmix": {"mixup": 0.2, "cutmix": 1.0},
    "erasing": {"erase": 0.5},
    "trivial": {"trivial": True},
    "rand": {"rand": {"ops": 2, "magnitude": 5}},
    "alternating flip": {"flip": "alternating"},
    "all": {"crop_padding": 1, "flip": "alternating", "trivial": True, "erase": 0.3, "mixup": 0.2, "cutmix": 1.0},
}  # fmt: skip
augmented = pytest.mark.parametrize("augment", long_after(5, AUGMENTS.values()), ids=AUGMENTS)


def pictures(split: str) -> Any:
    """Return noise in colour: 160 images with labels, 150 without."""
    g = torch.Generator().manual_seed(len(split))
    count = 150 if split == "unlabelled" else 160
    images = torch.randint(0, 256, (count, 3, 8, 8), generator=g, dtype=torch.uint8)
    return images if split == "unlabelled" else (images, torch.arange(count) % K)


DATA = {"name": "own", "path": f"{__name__}:pictures", "shape": [3, 8, 8], "num_classes": K}


def config(**changes: Any) -> TrainConfig:
    """Return a run on 130 labelled images, with 101 unlabelled ones an epoch."""
    data = {**DATA, "unlabelled": f"{__name__}:pictures", "unlabelled_ratio": 0.78}
    tree = {
        "data": data | changes.pop("data", {}),
        "objective": "kd",
        "student": {"name": "mlp", "hidden": [16]},
        "teacher": {"model": {"name": "mlp", "hidden": [12]}, "labels": "online"},
        "optim": {"batch_size": 50},
        "epochs": 3,
        **changes,
    }
    return validated(TrainConfig, tree)


def network(c: TrainConfig) -> Any:
    """Return an untrained teacher of the run, in eval mode; for several, a list."""
    found = [run.build_student().eval() for run in c.teacher_runs()]
    return found[0] if len(found) == 1 else found


@pytest.fixture
def in_float64(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


# --- which images an epoch sees


def stream(count: int, augment: dict[str, Any] | None = None, seed: int = 0) -> UnlabelledStream:
    pixels = torch.arange(count).view(-1, 1, 1, 1).expand(count, 1, 4, 4).to(torch.uint8)
    none = torch.zeros(count, dtype=torch.int64)
    images = ImageSet(pixels, none, torch.arange(count), count)
    return UnlabelledStream(images, "a", Augment(**augment or {}), seed, (4, 4))


@pytest.mark.parametrize("each", [7, 30, 31, 100], ids=lambda n: f"{n} of 30 an epoch")
def test_an_image_comes_once_in_each_pass_however_many_an_epoch_takes(each: int) -> None:
    made = stream(30)
    parts = [made.part(epoch * each, each) for epoch in range(9)]
    assert all(len(part.chosen) == each for part in parts)
    sequence = torch.cat([part.chosen for part in parts])
    passes = sequence[: len(sequence) // 30 * 30].view(-1, 30)
    assert all(row.sort().values.tolist() == list(range(30)) for row in passes)
    assert len({tuple(row.tolist()) for row in passes}) == len(passes), "each has its own order"
    assert not stream(30, seed=1).part(0, 30).chosen.equal(stream(30).part(0, 30).chosen)


def test_the_sequence_does_not_depend_on_the_cut_into_epochs() -> None:
    augment = {"crop_padding": 2, "mixup": 0.4, "cutmix": 1.0, "erase": 0.5}
    made = stream(30, augment)
    whole, (first, second) = made.part(0, 84), (made.part(0, 25), made.part(25, 59))
    assert whole.chosen.equal(torch.cat([first.chosen, second.chosen]))
    assert whole.view.mix and first.view.mix and second.view.mix
    for a, b, c in zip(whole.view.mix[1:], first.view.mix[1:], second.view.mix[1:], strict=True):
        assert a.equal(torch.cat([b, c]))
    for part, at in ((first, 0), (second, 25)):
        n = len(part.chosen)
        for of_whole, of_part in zip(whole.view.view, part.view.view, strict=True):
            if of_part is not None:
                assert of_part[:n].equal(of_whole[at : at + n])
                assert of_part[n:].equal(of_whole[84 + at : 84 + at + n]), "of the partners"


def test_partners_are_unlabelled_images_of_the_same_pass_seen_as_these_are() -> None:
    made = stream(30, {"mixup": 0.4, "crop_padding": 2})
    part = made.part(10, 50)
    assert part.view.mix is not None and len(part.images) == 100
    assert part.view.mix.partner.equal(torch.arange(50, 100))
    pixels = part.images.images[:, 0, 0, 0].long()  # type: ignore[union-attr]
    assert pixels[:50].equal(part.chosen)
    draws = {}
    for k in range(100):
        of_pass = (10 + k % 50) // 30
        drawn = (int(part.view.view.top[k]), int(part.view.view.left[k]))
        assert draws.setdefault((of_pass, int(pixels[k])), drawn) == drawn
    assert (pixels[:50] != pixels[50:]).all()
    for of_pass in (0, 1):  # whole in this part: the second one
        mine = [k for k in range(50) if (10 + k) // 30 == of_pass]
        assert len({int(pixels[50 + k]) for k in mine}) == len(mine)


def test_a_step_takes_the_rounded_number_and_one_at_least() -> None:
    found = [number_beside(64, ratio) for ratio in (1, 0.5, 0.02, 2.51, 7)]
    assert found == [64, 32, 1, 161, 448]
    assert number_beside(3, 0.1) == 1


# --- the loss


def softmax(z: list[float], temperature: float) -> list[float]:
    top = [math.exp((x - max(z)) / temperature) for x in z]
    return [x / sum(top) for x in top]


@pytest.mark.slow
@pytest.mark.parametrize("ratio", [0.5, 1, 4])
def test_the_loss_is_that_of_the_labelled_images_and_the_mean_kd_of_the_others(
    ratio: float, in_float64: None
) -> None:
    """As the docstring of objectives.py defines it: each term is a mean over its own images."""
    c = config(
        objective={"name": "kd", "alpha": 0.7, "temperature": 3, "loss_scale": 0.8},
        data={"unlabelled_ratio": ratio},
        optim={"batch_size": 50, "lr": 0.01},
        epochs=2,
    )
    teacher, net = network(c), c.build_student()
    found = list(train(c, teacher=teacher))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    images, _ = c.data.load()
    others = pictures("unlabelled")
    mean, std = (torch.tensor(x).view(-1, 1, 1) for x in c.data.statistics())
    sequence = [int(k) for p in range(9) for k in _order_of_pass(p)]
    at = 0
    for epoch in range(2):
        order = epoch_order(images, 0, epoch).tolist()
        batches = [order[k : k + 50] for k in range(0, len(order), 50)]
        for step, batch in enumerate(batches):
            count = round(ratio * len(batch))
            mine, at = sequence[at : at + count], at + count
            ce, kd, unlabelled = 0.0, 0.0, 0.0
            for k in batch:
                x = (images.images[k].double() - mean) / std  # type: ignore[union-attr]
                z = net(x[None])[0]
                ce = ce - z.log_softmax(0)[images.labels[k]] / len(batch)
                kd = kd + _kl(teacher(x[None])[0], z, 3) / len(batch)
            for k in mine:
                x = (others[k].double() - mean) / std
                unlabelled = unlabelled + _kl(teacher(x[None])[0], net(x[None])[0], 3) / count
            loss = 0.8 * (0.3 * ce + 0.7 * 9 * kd + 0.7 * 9 * unlabelled)
            for group in optimizer.param_groups:
                group["lr"] = 0.01 * c.schedule.factor(epoch + (step + 0.5) / len(batches), 2)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[attr-defined]
            optimizer.step()
    for name, value in net.state_dict().items():
        ours = found[-1].state()["model"][name]
        assert (ours - value).norm() <= 1e-10 * value.norm(), name


def _order_of_pass(number: int) -> Tensor:
    g = torch.Generator().manual_seed(address(address(0, "unlabelled"), "order", number))
    return torch.randperm(150, generator=g)


def _kl(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    """Return KL(q || p) of one image, class by class."""
    q, p = (torch.softmax(z / temperature, 0) for z in (teacher.detach(), student))
    total = torch.zeros(())
    for k in range(K):
        total = total + q[k] * (q[k] / p[k]).log()
    return total


@taught
def test_the_soft_part_without_labels_is_that_with_any_labels(objective: Any) -> None:
    g = torch.Generator().manual_seed(0)
    logits, teacher = (torch.randn(9, K, generator=g, dtype=torch.float64) for _ in range(2))
    alone = objective.soft_part(logits, teacher)
    for labels in (torch.zeros(9, dtype=torch.int64), torch.arange(9) % K):
        assert alone.equal(objective.terms(logits, labels, teacher).kd)


@taught
def test_without_unlabelled_images_the_loss_is_the_one_of_before(objective: Any) -> None:
    ce, kd, more = torch.tensor(1.3), torch.tensor(0.4), torch.tensor(0.25)
    before = objective.loss_scale * (objective.ce_weight * ce + objective.kd_weight * kd)
    assert objective.combine(Terms(ce, kd)).equal(before)
    whole = objective.combine(Terms(ce, kd), more)
    expected = before + objective.loss_scale * objective.kd_weight * more
    assert whole == pytest.approx(float(expected), rel=1e-6)


def test_metrics_are_means_over_the_epochs_images() -> None:
    """With a learning rate of nearly 0 the student stays as it was."""
    c = config(epochs=1, optim={"batch_size": 50, "lr": 1e-30}, data={"unlabelled_ratio": 2})
    teacher, net = network(c), c.build_student()
    (epoch,) = train(c, teacher=teacher)
    mean, std = (torch.tensor(x).view(-1, 1, 1) for x in c.data.statistics())
    images, _ = c.data.load()
    x = (images.images.float() - mean) / std  # type: ignore[union-attr]
    net.requires_grad_(False)
    teacher.requires_grad_(False)
    terms = c.objective.terms(net(x), images.labels, teacher(x))
    # a whole pass of 150 and the beginning of the next; in steps of 100, 100 and 60, weighted by
    # their 50, 50 and 30 labelled images
    sequence = torch.cat([_order_of_pass(0), _order_of_pass(1)])[:260]
    y = (pictures("unlabelled")[sequence].float() - mean) / std
    unlabelled = c.objective.soft_part(net(y), teacher(y))
    m = epoch.metrics
    assert m["train_ce"] == pytest.approx(float(terms.ce), rel=1e-5)
    assert m["train_kd"] == pytest.approx(float(terms.kd), rel=1e-5)
    assert m["train_kd_unlabelled"] == pytest.approx(float(unlabelled), rel=1e-5)
    whole = c.objective.combine(terms, unlabelled)
    assert m["train_loss"] == pytest.approx(float(whole), rel=1e-5)


@taught
def test_every_objective_with_a_soft_part_of_logits_trains(objective: Any) -> None:
    c = config(objective=objective.model_dump(), teacher=_teacher_for(objective), epochs=2)
    plain = validated(TrainConfig, {**c.tree, "data": c.data.labelled.tree})
    more, before = (list(train(run, teacher=network(run))) for run in (c, plain))
    assert "train_kd_unlabelled" not in before[-1].metrics
    assert math.isfinite(more[-1].metrics["train_kd_unlabelled"])
    assert not same(more[-1].state()["model"], before[-1].state()["model"])


def _teacher_for(objective: Any) -> dict[str, Any] | None:
    if objective.name == "tfkd_self":
        return {"labels": "online"}
    return {"model": {"name": "mlp", "hidden": [12]}, "labels": "online"}


def test_batchnorm_has_the_statistics_of_labelled_and_unlabelled_images_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    c = config(student={"name": "cnn", "widths": [4, 4]}, epochs=1)
    build, sizes = type(c.student).build, list[int]()

    def watched(self: Any, shape: Any, classes: int) -> torch.nn.Module:
        made = build(self, shape, classes)
        made.register_forward_pre_hook(noted)
        return made

    def noted(module: torch.nn.Module, given: Any) -> None:
        if module.training:
            sizes.append(len(given[0]))

    teacher = network(c)
    with monkeypatch.context() as patch:
        patch.setattr(type(c.student), "build", watched)
        next(train(c, teacher=teacher))
    assert sizes == [50 + 39, 50 + 39, 30 + 23]


# --- bank, resume, pieces, workers, validation


@pytest.mark.slow
@augmented
def test_training_from_the_bank_is_training_with_the_teacher_in_every_step(
    augment: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half precision keeps 11 bits. 3 epochs take 300 unlabelled images of 150."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = []
    for labels in ("online", "bank"):
        teacher = {"model": {"name": "mlp", "hidden": [24]}, "epochs": 2, "labels": labels}
        c = config(augment=augment, teacher=teacher)
        found.append(list(train(c, teacher=find_or_train(c, tmp_path))))
    views = list((tmp_path / "tfkd_ray" / "soft_labels").glob("[0-9a-f]*"))
    assert len(views) == (3 if not augment else 7), (
        "3 epochs, 303 places of the sequence, validation"
    )
    for a, b in zip(*found, strict=True):
        for name in ("train_loss", "train_ce", "train_kd", "train_kd_unlabelled", "val_teacher_kl"):
            assert b.metrics[name] == pytest.approx(a.metrics[name], rel=1e-3, abs=5e-4)
        weights = a.state()["model"]
        assert all((b.state()["model"][k] - v).abs().max() < 2e-3 for k, v in weights.items())


@pytest.mark.slow
def test_the_bank_holds_no_more_than_a_run_sees(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without augmentation one view serves all epochs, unless they never see all of it."""
    asked: list[tuple[str, int]] = []
    plain = Bank.logits

    def noted(self: Bank, view: dict[str, Any], count: int, *more: Any) -> Tensor:
        asked.append((view["split"], count))
        return plain(self, view, count, *more)

    monkeypatch.setattr(Bank, "logits", noted)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for epochs, counts in ((1, [130]), (3, [150])):
        asked.clear()
        teacher = {"model": {"name": "mlp", "hidden": [12]}, "epochs": 1, "labels": "bank"}
        c = config(teacher=teacher, epochs=epochs)
        list(train(c, teacher=find_or_train(c, tmp_path)))
        assert [count for split, count in asked if split == "unlabelled"] == counts


@pytest.mark.slow
def test_trials_with_other_ratios_share_views(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    known: list[set[str]] = [set()]
    for ratio in (2, 1, 0.5, 3):
        teacher = {"model": {"name": "mlp", "hidden": [12]}, "epochs": 1, "labels": "bank"}
        data = {"unlabelled_ratio": ratio}
        c = config(teacher=teacher, epochs=2, augment=AUGMENTS["mixup"], data=data)
        bank = find_or_train(c, tmp_path)
        assert isinstance(bank, Bank)
        both = list(train(c, teacher=bank)), list(train(c, teacher=bank.network()))
        for a, b in zip(*both, strict=True):
            key = "train_kd_unlabelled"
            assert a.metrics[key] == pytest.approx(b.metrics[key], rel=1e-3, abs=5e-4)
        views = (tmp_path / "tfkd_ray" / "soft_labels").glob("[0-9a-f]*")
        known.append({path.name for path in views})
    new = [len(more - before) for before, more in itertools.pairwise(known)]
    assert new == [2 + 4 + 1, 0, 0, 2], "epochs, blocks of the sequence, validation"


def test_the_views_of_labelled_images_are_those_of_a_run_without_others(tmp_path: Path) -> None:
    teacher = {"model": {"name": "mlp", "hidden": [12]}, "epochs": 1, "labels": "bank"}
    with_others, c = config(teacher=teacher), config(teacher=teacher)
    without = validated(TrainConfig, {**c.tree, "data": c.data.labelled.tree})
    a, b = find_or_train(with_others, tmp_path), find_or_train(without, tmp_path)
    assert isinstance(a, Bank) and isinstance(b, Bank) and a._of == b._of
    assert len(list((tmp_path / "teachers").iterdir())) == 1, "one teacher for both"
    assert [r.fingerprint() for r in c.teacher_runs()] == [
        r.fingerprint() for r in without.teacher_runs()
    ]
    assert all(run.data.unlabelled is None for run in c.teacher_runs())


def test_unlabelled_images_that_do_not_fit_in_the_bank_run_online(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = {"model": {"name": "mlp", "hidden": [12]}, "epochs": 1, "labels": "bank"}
    c = config(teacher=teacher)
    banked = list(train(c, teacher=find_or_train(c, tmp_path)))
    monkeypatch.setattr("tfkd_ray.learn.loop.fits", lambda count, columns: count == 130)
    online = list(train(c, teacher=find_or_train(c, tmp_path)))
    for a, b in zip(banked, online, strict=True):
        key = "train_kd_unlabelled"
        assert a.metrics[key] == pytest.approx(b.metrics[key], rel=1e-3)
        assert a.metrics[key] != b.metrics[key]


@augmented
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(
    augment: dict[str, Any], tmp_path: Path
) -> None:
    c = config(augment=augment, ema={"decay": 0.9}, checkpoint_every_s=0)
    teacher = network(c)
    whole = list(train(c, teacher=teacher))
    run = train(c, teacher=teacher)
    rest = list(train(c, next(run).state(), teacher=teacher))
    assert numbers(rest) == numbers(whole)[1:]
    assert same(rest[-1].state(), whole[-1].state())


def test_a_run_that_is_killed_within_an_epoch_repeats_it_to_the_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    c = config(augment=AUGMENTS["all"], checkpoint_every_s=0)
    teacher = network(c)
    whole = list(train(c, teacher=teacher))
    steps, plain = [0], torch.optim.SGD.step

    def killed(self: Any, *args: Any) -> Any:
        steps[0] += 1
        if steps[0] == 5:  # the second of the second epoch
            raise KeyboardInterrupt
        return plain(self, *args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch.optim.SGD, "step", killed)
        list(train_in(tmp_path, c, teacher=teacher))
    again = list(train_in(tmp_path, c, teacher=teacher))
    assert numbers(again) == numbers(whole)
    state = load_state(tmp_path)
    assert state is not None and same(state, whole[-1].state())


@pytest.mark.slow
@pytest.mark.parametrize("pieces", [2, 3, 7, 50])
@pytest.mark.parametrize("ratio", long_after(1, [0.78, 0.1, 3]))
def test_a_batch_in_pieces_is_the_whole_batch(pieces: int, ratio: float, in_float64: None) -> None:
    """Also where some pieces have no unlabelled image."""
    optim = {"batch_size": 50, "lr": 0.01, "clip_norm": 0.7}
    augment, data = AUGMENTS["mixup"], {"unlabelled_ratio": ratio}
    found = []
    for accumulate in (1, pieces):
        c = config(optim={**optim, "accumulate": accumulate}, augment=augment, data=data, epochs=2)
        found.append(list(train(c, teacher=network(c))))
    for name, value in found[0][-1].state()["model"].items():
        assert (value - found[1][-1].state()["model"][name]).norm() <= 1e-12 * value.norm(), name
    for a, b in zip(*found, strict=True):
        for name in ("train_loss", "train_kd", "train_kd_unlabelled", "train_kd_ratio", "val_nll"):
            assert b.metrics[name] == pytest.approx(a.metrics[name], rel=1e-11)


def _worker_in_float64(rank: int, folder: str, tree: dict[str, Any]) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    Tensor.float = Tensor.double  # type: ignore[method-assign]
    torch.set_default_dtype(torch.float64)
    c = validated(TrainConfig, tree)
    for epoch in train(c, teacher=network(c)):
        last = epoch
    if rank == 0:
        torch.save(last.state(), f"{folder}/state.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    os._exit(0)  # see test_loop.py


@pytest.mark.parametrize("ratio, pieces", [(0.02, 3), (0.78, 1)])
@pytest.mark.long
def test_two_workers_agree_with_one(
    ratio: float, pieces: int, tmp_path: Path, in_float64: None, as_two_workers: TwoWorkers
) -> None:
    """With one unlabelled image a step, the second worker has none."""
    optim = {"batch_size": 50, "lr": 0.01, "accumulate": pieces}
    c = config(optim=optim, augment=AUGMENTS["mixup"], data={"unlabelled_ratio": ratio})
    one = list(train(c, teacher=network(c)))[-1].state()
    as_two_workers(_worker_in_float64, str(tmp_path), c.model_dump(mode="json"))
    two = torch.load(tmp_path / "state.pt", weights_only=True)
    for name, value in one["model"].items():
        assert (two["model"][name] - value).norm() <= 1e-12 * value.norm(), name
    for a, b in zip(numbers(one["history"]), numbers(two["history"]), strict=True):
        for name in ("train_loss", "train_ce", "train_kd", "train_kd_unlabelled", "val_nll"):
            assert b[name] == pytest.approx(a[name], rel=1e-11)


@pytest.mark.slow
def test_several_teachers_teach_without_labels_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = []
    for labels in ("online", "bank"):
        shared = {"epochs": 1, "labels": labels}
        two = [{"model": {"name": "mlp", "hidden": [n]}, **shared} for n in (12, 20)]
        c = config(teacher=two, augment=AUGMENTS["mixup"], epochs=2)
        found.append(list(train(c, teacher=find_or_train(c, tmp_path))))
    for a, b in zip(*found, strict=True):
        for name in ("train_loss", "train_kd_unlabelled"):
            assert b.metrics[name] == pytest.approx(a.metrics[name], rel=1e-3, abs=5e-4)
    one = config(augment=AUGMENTS["mixup"], epochs=2)
    alone = list(train(one, teacher=find_or_train(one, tmp_path)))
    assert alone[-1].metrics["train_kd_unlabelled"] != found[0][-1].metrics["train_kd_unlabelled"]


def test_validation_images_have_no_part_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever they are, NaN in a format without it included: each byte of them is changed."""
    whole = Digits.load

    def spoiled(self: Digits) -> Any:
        train_set, val_set = whole(self)
        assert isinstance(train_set, ImageSet) and isinstance(val_set, ImageSet)
        stored = train_set.stored.clone()
        stored[val_set.rows] = 255 - stored[val_set.rows]
        train_set = dataclasses.replace(train_set, stored=stored)
        return train_set, dataclasses.replace(val_set, stored=stored)

    data = {"name": "digits", "subset": 300, "unlabelled": "rest"}
    c = config(augment=AUGMENTS["mixup and cutmix"], epochs=2)
    c = validated(TrainConfig, {**c.tree, "data": data})
    teacher = network(c)
    plain = list(train(c, teacher=teacher))[-1]
    monkeypatch.setattr(Digits, "load", spoiled)
    after = list(train(c, teacher=teacher))[-1]
    assert same(plain.state(), after.state())
    assert plain.metrics["val_nll"] != after.metrics["val_nll"]


def test_unlabelled_images_are_in_no_validation_and_not_in_cross_entropy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With alpha 0 they change nothing, and the metrics of an epoch name the same images."""
    c = config(objective={"name": "kd", "alpha": 0}, epochs=2)
    plain = validated(TrainConfig, {**c.tree, "data": c.data.labelled.tree})
    a, b = (list(train(run, teacher=network(run))) for run in (c, plain))
    for name, value in b[-1].state()["model"].items():
        assert torch.allclose(a[-1].state()["model"][name], value, atol=1e-6), name
    assert a[-1].metrics["val_nll"] == pytest.approx(b[-1].metrics["val_nll"], rel=1e-5)
    images, val = c.data.load()
    assert (len(images), len(val or [])) == (130, 30)


# --- where they come from


def png(path: Path, pixels: np.ndarray[Any, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def somewhere(tmp_path: Path) -> dict[str, Any]:
    """Return the same 12 images in every form, by name."""
    pixels = pictures("unlabelled")[:12].numpy()
    for k in range(12):
        image = pixels[k].transpose(1, 2, 0)
        png(tmp_path / "flat" / f"{k:02}.png", image)
        png(tmp_path / "nested" / f"class{k // 5}" / f"{k:02}.png", image)
    (tmp_path / "nested" / "notes.txt").write_text("no image")
    np.save(tmp_path / "a.npy", pixels)
    np.savez(tmp_path / "one.npz", pixels)
    np.savez_compressed(tmp_path / "two.npz", images=pixels, labels=np.zeros(12))
    np.save(tmp_path / "fortran.npy", np.asfortranarray(pixels))
    names = ("flat", "nested", "a.npy", "one.npz", "two.npz", "fortran.npy")
    return {"pixels": torch.from_numpy(pixels), **{name: tmp_path / name for name in names}}


@pytest.mark.parametrize("name", ["flat", "nested", "a.npy", "one.npz", "two.npz", "fortran.npy"])
def test_images_come_from_folders_and_arrays(name: str, somewhere: dict[str, Any]) -> None:
    data = config(data={"unlabelled": str(somewhere[name])}).data
    data.check()
    images = data.load_unlabelled()
    assert isinstance(images, ImageSet) and images.images.equal(somewhere["pixels"])
    assert not images.labels.any()
    digests = {config(data={"unlabelled": str(somewhere["a.npy"])}).data.pinned().unlabelled_digest}
    assert {data.pinned().unlabelled_digest} == digests, "whatever the form"


def test_rest_is_what_the_subset_leaves_out_and_never_validation() -> None:
    data = Digits(subset=300, unlabelled="rest")
    (images, val), rest = data.load(), data.load_unlabelled()
    assert val is not None and isinstance(rest, ImageSet)
    used = {*images.positions.tolist(), *val.positions.tolist()}
    assert used.isdisjoint(rest.positions.tolist())
    assert len(used) + len(rest) == images.official_size and not rest.labels.any()
    final = data.model_copy(update={"val_fraction": 0.0})
    assert final.load_unlabelled().positions.equal(rest.positions), "of a final training, too"


def test_image_files_are_streamed_with_their_own_crops_where_the_data_set_is(
    tmp_path: Path,
) -> None:
    root = write_folder(tmp_path / "labelled", train=6, side=40)
    others = write_folder(tmp_path / "others", train=5, side=50)
    data = {"name": "image_folder", "root": str(root), "num_classes": 2, "image_size": 32,
            "unlabelled": str(others / "train"), "unlabelled_ratio": 2}  # fmt: skip
    augment = {"resized_crop": True, "flip": True, "mixup": 1.0}
    tree = {"objective": "kd", "student": {"name": "mlp", "hidden": [8]}, "epochs": 2,
            "teacher": {"model": {"name": "mlp", "hidden": [9]}, "labels": "online"},
            "optim": {"batch_size": 4}, "recipe": "modern", "augment": augment, "data": data}  # fmt: skip
    c = validated(TrainConfig, tree)
    assert isinstance(c.data.load_unlabelled(), FolderSet)
    assert c.data.unlabelled_digest is None and c.data.pinned().unlabelled_digest is not None
    teacher = network(c)
    whole = list(train(c, teacher=teacher))
    rest = list(train(c, next(train(c, teacher=teacher)).state(), teacher=teacher))
    assert same(rest[-1].state(), whole[-1].state())


def test_a_relative_path_is_the_same_place_from_another_directory(
    somewhere: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    c = config(data={"unlabelled": "flat"})
    monkeypatch.chdir("/")
    again = validated(TrainConfig, c.tree)
    assert again.data.unlabelled == str(tmp_path / "flat") and len(again.data.load_unlabelled())
    assert config(data={"unlabelled": "~/flat"}).data.unlabelled == "~/flat"


def test_their_digest_is_part_of_a_fingerprint_and_their_path_is_not(
    somewhere: dict[str, Any],
) -> None:
    made = {
        name: config(data={"unlabelled": str(somewhere[name])}).pinned().fingerprint()
        for name in ("flat", "a.npy")
    }
    assert made["flat"] == made["a.npy"]
    np.save(somewhere["a.npy"], somewhere["pixels"].numpy()[::-1])
    other = config(data={"unlabelled": str(somewhere["a.npy"])}).pinned()
    assert other.fingerprint() != made["flat"]
    ratio = {"unlabelled": str(somewhere["flat"]), "unlabelled_ratio": 2}
    assert config(data=ratio).pinned().fingerprint() != made["flat"]


def test_images_that_changed_since_they_were_recorded_are_refused(
    somewhere: dict[str, Any],
) -> None:
    pinned = config(data={"unlabelled": str(somewhere["flat"])}).pinned()
    assert pinned.pinned() == pinned
    png(somewhere["flat"] / "03.png", np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(ConfigError, match="differ from the recorded ones"):
        next(train(pinned, teacher=network(pinned)))
    with pytest.raises(ConfigError, match="restore them, or begin a new experiment"):
        pinned.data.pinned()


def test_settings_without_unlabelled_images_are_those_of_before() -> None:
    assert not {"unlabelled", "unlabelled_ratio", "unlabelled_digest"} & {*Digits().tree}
    assert Digits().identity() == {"name": "digits", "val_fraction": 0.2, "subset": None, "split_seed": 0}  # fmt: skip
    run = TrainConfig(objective={"name": "kd"}, teacher={"model": "mlp"})
    assert LOOP_VERSION == 3
    assert run.fingerprint() == "af6d61d355c92987"


# --- what is refused


def arrays(tmp_path: Path) -> dict[str, Callable[[], Any]]:
    """Return functions that write what cannot be used to tmp_path / x.npy or x.npz, by its sentence."""
    npy, npz = tmp_path / "x.npy", tmp_path / "x.npz"
    right = np.zeros((4, 3, 8, 8), np.uint8)

    def two_arrays() -> None:
        np.savez(npz, a=right, b=right)

    def cut() -> None:
        np.save(npy, right)
        npy.write_bytes(npy.read_bytes()[:-10])

    def bomb() -> None:
        with zipfile.ZipFile(npz, "w") as file, file.open("a.npy", "w") as member:
            about = {"descr": "|u1", "fortran_order": False, "shape": (10**12, 3, 8, 8)}
            np.lib.format.write_array_header_1_0(member, about)

    return {
        r"x.npy: needs uint8 \[N, C, H, W\], with C, H, W of 3x8x8, got float64 \[4, 3, 8, 8\]": lambda: np.save(npy, right.astype(float)),
        r"x.npy: needs uint8 .* got uint8 \[4, 8, 8\]": lambda: np.save(npy, right[:, 0]),
        r"x.npy: its images are 1x8x8, and those of own are 3x8x8": lambda: np.save(npy, right[:, :1]),
        r"x.npy: needs uint8 .* got object \[1\]": lambda: np.save(npy, np.array([{}], dtype=object), allow_pickle=True),
        "x.npy: holds no image": lambda: np.save(npy, right[:0]),
        "x.npy: cannot be read as an array": cut,
        "x.npy: cannot be read as an array: .*; write it with numpy.save": lambda: npy.write_bytes(b"no array"),
        "x.npz: cannot be read as an array: it has the arrays a, b; name the one of images 'images'": two_arrays,
        "x.npz: cannot be read as an array: its header says": bomb,
        "x.npz: cannot be read as an array: File is not a zip file": lambda: npz.write_bytes(b"no zip"),
        "x.npy: is a folder, and a name with .npy or .npz is a file's": npy.mkdir,
        r"not found: .*x.npy; give rest, a folder": lambda: None,
    }  # fmt: skip


@pytest.mark.parametrize("sentence", arrays(Path()))
def test_arrays_that_are_no_images_are_refused_before_a_run(sentence: str, tmp_path: Path) -> None:
    arrays(tmp_path)[sentence]()
    data = config(data={"unlabelled": str(tmp_path / f"x.np{'z' if 'x.npz' in sentence else 'y'}")})
    if "is a folder" in sentence:
        assert (tmp_path / "x.npy").is_dir()
    with pytest.raises(ConfigError, match=rf"data.unlabelled: .*{sentence}"):
        data.data.check()


def test_folders_that_hold_no_images_of_the_data_set_are_refused(tmp_path: Path) -> None:
    def of(name: str) -> Any:
        return config(data={"unlabelled": str(tmp_path / name)}).data

    (tmp_path / "empty" / "below").mkdir(parents=True)
    (tmp_path / "file").write_text("")
    png(tmp_path / "small" / "a.png", np.zeros((4, 8, 3), np.uint8))
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "a.png").write_bytes(b"\x89PNG no more")
    for name, sentence in {
        "empty": "empty: no image in it",
        "file": "file: is no folder; one file holds its images as an array",
        "missing": "not found: ",
    }.items():
        with pytest.raises(ConfigError, match=rf"data.unlabelled: .*{sentence}"):
            of(name).check()
    with pytest.raises(ConfigError, match=r"a.png: is 8x4, and all images are 8x8"):
        of("small").load_unlabelled()
    with pytest.raises(ConfigError, match=r"a.png: cannot be read as an image"):
        of("damaged").load_unlabelled()


def test_colours_and_bright_pixels_are_refused_where_the_data_set_has_none(tmp_path: Path) -> None:
    grey = np.full((8, 8), 16, np.uint8)
    png(tmp_path / "grey" / "a.png", grey)
    png(tmp_path / "bright" / "a.png", grey * 15)
    colours = np.zeros((8, 8, 3), np.uint8)
    colours[..., 0] = 9
    png(tmp_path / "colours" / "a.png", colours)
    found = Digits(unlabelled=str(tmp_path / "grey")).load_unlabelled()
    assert isinstance(found, ImageSet) and found.images.shape == (1, 1, 8, 8)
    with pytest.raises(ConfigError, match="pixels reach 240, and those of digits end at 16"):
        Digits(unlabelled=str(tmp_path / "bright")).load_unlabelled()
    with pytest.raises(ConfigError, match=r"a.png: has colours, and its images have none"):
        Digits(unlabelled=str(tmp_path / "colours")).load_unlabelled()


def test_the_directory_of_a_function_is_recorded_as_that_of_other_own_code() -> None:
    tree = {"objective": "kd", "data": {"name": "digits", "unlabelled": "my_data:more"}}
    assert own_code.is_needed(tree)
    for place in ("rest", "/a:b/c", "./a:b", "~/x.npy", None, "a:", "a.b"):
        assert not own_code.is_needed({**tree, "data": {"name": "digits", "unlabelled": place}})


def failing(split: str) -> None:
    raise KeyError(split)


def of_no_argument() -> None:
    """Return nothing, without the name of a split."""


def text(split: str) -> str:
    return split


@pytest.mark.parametrize(
    "name, sentence",
    {
        "failing": "called for 'unlabelled', ends in KeyError: 'unlabelled'",
        "text": "must return images, a tensor or array, got str",
        "of_no_argument": r"cannot be called as function\('unlabelled'\)",
        "missing": "has no 'missing'",
        "K": "is 10, not a function",
    }.items(),
)
def test_functions_that_give_no_images_are_refused(name: str, sentence: str) -> None:
    data = config(data={"unlabelled": f"{__name__}:{name}"}).data
    with pytest.raises(ConfigError, match=sentence):
        data.check()
        data.load_unlabelled()


NO_TEACHER = "has no teacher, and images without labels have no other target"
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "ce": ({"objective": "ce"}, f"data.unlabelled: objective ce {NO_TEACHER}, got .*; use one of dist, kd, "),
    "lsr": ({"objective": "lsr"}, f"objective lsr {NO_TEACHER}"),
    "tfkd_reg": ({"objective": "tfkd_reg"}, f"objective tfkd_reg {NO_TEACHER}"),
    "tfkd_reg_code": ({"objective": "tfkd_reg_code"}, f"objective tfkd_reg_code {NO_TEACHER}"),
    "dkd": ({"objective": "dkd"}, "data.unlabelled: objective dkd has no form for images without labels"),
    "a loss of one's own": ({"objective": "test_own_loss:margin"}, "has no form for images without|has no teacher"),
    "an own loop": ({"loop": "test_own_loop:good"}, "data.unlabelled: the loop of this package adds them to its steps"),
    "ratio 0": ({"data": {"unlabelled_ratio": 0}}, r"data\..*unlabelled_ratio: should be greater than 0, got 0"),
    "a negative ratio": ({"data": {"unlabelled_ratio": -1}}, r"unlabelled_ratio: should be greater than 0, got -1"),
    "ratio NaN": ({"data": {"unlabelled_ratio": math.nan}}, r"unlabelled_ratio: should be a finite number, got nan"),
    "a ratio of none": ({"data": {"unlabelled_ratio": 0.001}}, "data.unlabelled_ratio: with 50 labelled images a step it rounds to none, got 0.001"),
    "a ratio without images": ({"data": {"unlabelled": None}}, "data.unlabelled_ratio: is for unlabelled images, and data.unlabelled gives none, got 0.78"),
    "rest of all": ({"data": {"unlabelled": "rest"}}, "data.unlabelled: rest is what data.subset leaves out, and there is none"),
    "no name": ({"data": {"unlabelled": ""}}, "unlabelled: needs rest, a folder of images, a file"),
    "a list": ({"data": {"unlabelled": ["a", "b"]}}, r"unlabelled: should be a text, got \['a', 'b'\]"),
    "compiled pieces": ({"compile": "on", "optim": {"batch_size": 50, "accumulate": 2}}, "compile: pieces of a batch with unlabelled images"),
}  # fmt: skip


@pytest.mark.parametrize("changes, sentence", REFUSED.values(), ids=REFUSED)
def test_settings_that_do_not_go_together_are_refused(
    changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        config(**changes)


def test_a_crop_of_decoding_is_refused_for_an_array(tmp_path: Path) -> None:
    data = {"name": "image_folder", "root": str(tmp_path), "num_classes": 2, "unlabelled": "x.npy"}
    tree = {"objective": "kd", "teacher": {"model": "mlp"}, "augment": {"resized_crop": True}}
    with pytest.raises(ConfigError, match=r"augment.resized_crop: crops image files as they are"):
        validated(TrainConfig, {**tree, "data": data})


def test_a_subset_of_all_images_leaves_no_rest() -> None:
    with pytest.raises(ConfigError, match="and 5000 images are all 1438; lower it"):
        Digits(subset=5000, unlabelled="rest").load_unlabelled()


# --- spaces and arms

SPACE: dict[str, Any] = {
    "objective": ["kd", "ce"],
    "teacher": {"model": "mlp"},
    "student": {"name": "mlp", "hidden": [16]},
    "optim": {"lr": {"low": 0.01, "high": 0.1}},
    "data": {"name": "digits", "subset": 300, "unlabelled": "rest"},
}


def test_baselines_beside_kd_train_without_them() -> None:
    space = build_space(SPACE)
    seen = {b.objective: b.example.data.unlabelled for b in space.branches}
    assert seen == {"kd": "rest", "ce": None, "lsr": None}
    assert space.example.data.unlabelled == "rest"
    assert build_space(space.tree).tree == space.tree
    plain = build_space({**SPACE, "data": {"name": "digits", "subset": 300}})
    fingerprints = [
        {b.objective: b.example.fingerprint() for b in made.branches} for made in (space, plain)
    ]
    assert fingerprints[0]["ce"] == fingerprints[1]["ce"]
    assert fingerprints[0]["kd"] != fingerprints[1]["kd"]


def test_objectives_that_could_never_use_them_are_refused_in_a_space() -> None:
    for objectives in (["ce", "lsr"], ["tfkd_reg", "ce"], "ce"):
        with pytest.raises(ConfigError, match=NO_TEACHER):
            build_space({**SPACE, "objective": objectives})
    with pytest.raises(ConfigError, match="objective dkd has no form for images without labels"):
        build_space({**SPACE, "objective": ["kd", "dkd"]})


def test_the_ratio_is_searched_for_the_objectives_that_use_it() -> None:
    ranges = {"unlabelled_ratio": {"low": 0.5, "high": 4, "log": True}}
    space = build_space({**SPACE, "data": {**SPACE["data"], **ranges}})
    names = {b.objective: [p.name for p in b.parameters] for b in space.branches}
    assert names["kd"] == ["data.unlabelled_ratio", "optim.lr"] and names["ce"] == ["optim.lr"]
    assert len(space.teacher_runs()) == 1
    with pytest.raises(ConfigError, match=r"data.subset: must have one value for the whole sweep"):
        build_space({**SPACE, "data": {**SPACE["data"], "subset": {"choices": [200, 300]}}})


def test_arms_compare_with_and_without_unlabelled_images() -> None:
    shared = {k: SPACE[k] for k in ("teacher", "student", "data")}
    arms: list[dict[str, Any]] = [
        {"name": "ce", "objective": "ce"},
        {"name": "kd", "objective": "kd", "data": {"unlabelled": None}},
        {"name": "more", "objective": "kd"},
        {"name": "most", "objective": "kd", "data": {"unlabelled_ratio": 4}},
    ]
    made = build_arms({**shared, "arms": arms})
    assert [arm.config.data.unlabelled for arm in made.arms] == [None, None, "rest", "rest"]
    assert made.example.data.unlabelled == "rest"
    other = {"name": "other", "objective": "kd", "data": {"unlabelled": "/elsewhere"}}
    with pytest.raises(ConfigError, match=r"arms.other.data.unlabelled: all arms that have unl"):
        build_arms({**shared, "arms": [*arms, other]})
    with pytest.raises(ConfigError, match=r"data.unlabelled: no arm learns from images without"):
        build_arms({**shared, "arms": arms[:2]})
    own = {"name": "own", "objective": "ce", "data": {"unlabelled": "rest"}}
    with pytest.raises(ConfigError, match=rf"arms.own.data.unlabelled: objective ce {NO_TEACHER}"):
        build_arms({**shared, "arms": [*arms, own]})


def test_every_objective_says_whether_it_learns_without_labels() -> None:
    assert {"kd", "tfkd_self", "dist", "kd_standardised"} == WITHOUT_LABELS
    for objective in OBJECTIVES:
        assert objective.needs_teacher or not objective.learns_without_labels
        if not objective.learns_without_labels:
            with pytest.raises(TypeError, match="has no form for images without labels"):
                objective.soft_part(torch.zeros(2, K), torch.zeros(2, K))


def test_the_digest_of_rest_is_that_of_the_train_set(tmp_path: Path) -> None:
    data = Digits(subset=300, unlabelled="rest")
    assert data.pinned().digests == Digits().pinned().digests
    assert load_unlabelled(data).digest is None
    c = validated(TrainConfig, {**config().tree, "data": data.tree, "epochs": 1})
    teacher = find_or_train(c, tmp_path)
    assert isinstance(teacher, Bank) and bank_of(c, tmp_path) is not None


def test_check_says_how_many_there_are_and_which_are_validation_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tfkd_ray.cli.main import main

    _, val = Digits(subset=300).load()
    assert isinstance(val, ImageSet)
    np.save(tmp_path / "x.npy", torch.cat([val.images[:3], 16 - val.images[:5]]).numpy())
    file = tmp_path / "x.yaml"
    file.write_text(
        "objective: [kd, ce]\nteacher: {model: mlp}\noptim: {lr: {low: 0.1, high: 1}, batch_size: 64}\n"
        f"data: {{name: digits, subset: 300, unlabelled: {tmp_path}/x.npy, "
        "unlabelled_ratio: {choices: [1, 4]}}\n"
    )
    assert main(["check", str(file)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"unlabelled images: 8 ({tmp_path}/x.npy), 64 to 256 beside 64 labelled ones" in said
    assert "note: data.unlabelled: 3 of its 8 images are identical to validation images" in said
    assert main(["plan", str(file)]) == 0
    assert "unlabelled images: 1 to 4 for each labelled one" in capsys.readouterr().out
    (tmp_path / "x.npy").unlink()
    assert main(["check", str(file)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "note: on this machine data.unlabelled: not found" in said
