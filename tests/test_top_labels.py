"""The 50 largest logits and what the others share, against full logits."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tfkd_ray.learn import loop
from tfkd_ray.learn.config import TrainConfig
from tfkd_ray.learn.loop import train
from tfkd_ray.learn.teachers import find_or_train
from tfkd_ray.learn.top_labels import COLUMNS, KEPT, packed, share_lost, unpacked
from tfkd_ray.settings.errors import ConfigError
from tfkd_ray.settings.schema import validated
from tfkd_ray.show.plan import resident_bytes

K = 60


def load(split: str) -> tuple[Any, Any]:
    """Return images of 60 classes: a bright pixel each, and noise."""
    n, noise = 240, np.random.default_rng(0)
    labels = np.arange(n) % K
    images = noise.integers(0, 60, (n, 1, 8, 8)).astype(np.uint8)
    images.reshape(n, -1)[np.arange(n), labels] = 255
    return images, labels


def config(labels: str = "top50", temperature: float = 1.0, **changes: Any) -> TrainConfig:
    tree = {
        "data": {"name": "own", "path": "test_top_labels:load", "shape": [1, 8, 8]},
        "objective": {"name": "kd", "alpha": 0.7, "temperature": temperature},
        "student": {"name": "mlp", "hidden": [16]},
        "teacher": {"epochs": 4, "optim": {"batch_size": 16}, "labels": labels},
        "optim": {"batch_size": 32},
        "epochs": 1,
        **changes,
    }
    tree["data"] = {**tree["data"], "num_classes": K}
    tree["teacher"] = {"model": {"name": "mlp", "hidden": [64]}, **tree["teacher"]}
    return validated(TrainConfig, tree)


def normal(count: int, classes: int) -> Tensor:
    return 3 * torch.randn(count, classes, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("temperature", [1.0, 4.0, 20.0])
def test_the_largest_logits_keep_their_differences_and_the_others_their_probability(
    temperature: float,
) -> None:
    full = normal(200, 1000)
    kept = unpacked(packed(full), 1000, temperature)
    assert packed(full).shape == (200, COLUMNS) and packed(full).dtype == torch.int16
    top = full.topk(KEPT, dim=1)
    shift = kept.gather(1, top.indices) - top.values
    assert (shift - shift.mean(dim=1, keepdim=True)).abs().max() < 0.01
    others = torch.ones_like(full).scatter(1, top.indices, 0)
    p, q = (((z.double() / temperature).softmax(dim=1) * others).sum(dim=1) for z in (full, kept))
    assert (p / q).log().abs().max() < 0.4 / temperature


def test_mean_and_variance_of_the_others_are_those_of_a_slow_loop() -> None:
    full = normal(3, K)
    about = packed(full)[:, 2 * KEPT :].contiguous().view(torch.float32)
    for row, (mean, variance) in zip(full, about, strict=True):
        others = (row - row.max()).sort().values[: K - KEPT]
        assert mean == pytest.approx(others.mean(), rel=1e-5)
        assert variance == pytest.approx(others.var(correction=0), rel=1e-4)


def test_the_lost_share_is_the_kl_of_a_slow_loop_and_grows_with_temperature() -> None:
    full, T = normal(2, K), 4.0
    kept = unpacked(packed(full), K, T)
    lost = whole = 0.0
    for z, guess in zip(full.double(), kept.double(), strict=True):
        p, q = (z / T).softmax(dim=0), (guess / T).softmax(dim=0)
        lost += float((p * (p / q).log()).sum())
        whole += float((p * (p * K).log()).sum())
    assert share_lost(full, T) == pytest.approx(lost / whole, rel=1e-6)
    many = normal(50, 1000)
    assert share_lost(many, 1.0) < share_lost(many, 4.0) < share_lost(many, 20.0)


@pytest.mark.slow
def test_a_student_learns_from_the_largest_logits_as_from_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(loop, "_told_once", set())
    said: list[str] = []

    def first(c: TrainConfig) -> dict[str, float]:
        return next(train(c, teacher=find_or_train(c, tmp_path), say=said.append)).metrics

    full, top = (first(config(labels)) for labels in ("bank", "top50"))
    assert top["train_kd"] == pytest.approx(full["train_kd"], rel=0.01)
    assert top["train_kd"] != full["train_kd"]  # it is not the same code
    assert top["val_teacher_kl"] == pytest.approx(full["val_teacher_kl"], rel=0.02)
    assert len(said) == 1 and "top50 loses" in said[0] and "at 20" in said[0]
    with pytest.raises(ConfigError, match=r"at temperature 20 .*more than 0.01; use bank"):
        first(config(temperature=20.0))
    monkeypatch.setattr(loop, "fits", lambda count, columns: columns != K)
    first(config("bank"))
    assert len(said) == 2 and "top50 keeps fewer" in said[1]  # it ran online, and said so
    first(config("top50"))
    assert len(said) == 2


def test_a_run_from_the_largest_logits_is_another_run_with_its_own_size() -> None:
    full, top, online = map(config, ("bank", "top50", "online"))
    assert len({full.fingerprint(), top.fingerprint(), online.fingerprint()}) == 3
    count = sum(len(found) for found in top.data.load() if found is not None)
    assert resident_bytes(top) - resident_bytes(full) == 2 * count * (COLUMNS - K)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"objective": {"name": "dist"}}, "top50 is for kd and tfkd_self, and objective dist"),
        ({"data": "digits"}, "top50 is for 51 to 32768 classes, and digits has 10"),
    ],
    ids=["objective", "classes"],
)
def test_top50_is_refused_where_it_cannot_be_right(changes: dict[str, Any], text: str) -> None:
    tree = {**config().tree, "teacher": {"model": "mlp", "labels": "top50"}, **changes}
    with pytest.raises(ConfigError) as error:
        validated(TrainConfig, tree)
    assert text in str(error.value)
