"""Data: real digits, splits that leak nothing, randomness by address."""

import subprocess
import sys

import pytest
import torch

from tfkd_ray.data import Digits, address, generator, stratified


def test_the_digits_are_scikit_learns() -> None:
    sklearn_datasets = pytest.importorskip("sklearn.datasets")
    theirs = sklearn_datasets.load_digits()
    (a, y), (b, z) = Digits()._official("train"), Digits()._official("test")
    assert len(y) + len(z) == len(theirs.target) == 1797
    ours = sorted([*a.flatten(1).tolist(), *b.flatten(1).tolist()])
    assert ours == sorted(theirs.data.astype(int).tolist())


def test_statistics_are_those_of_the_official_train_set() -> None:
    images = Digits()._official("train")[0].float()
    assert Digits.mean[0] == pytest.approx(images.mean().item(), abs=1e-3)
    assert Digits.std[0] == pytest.approx(images.std().item(), abs=1e-3)


def test_the_splits_are_disjoint_complete_and_stratified() -> None:
    train, val = Digits(val_fraction=0.2).load()
    assert len(train) == 1151 and len(val) == 287
    assert not set(train.positions.tolist()) & set(val.positions.tolist())
    assert sorted([*train.positions.tolist(), *val.positions.tolist()]) == list(range(train.official_size))
    shares = val.labels.bincount() / (train.labels.bincount() + val.labels.bincount())
    assert (shares - 0.2).abs().max() < 0.01


def test_the_validation_split_depends_on_the_split_seed_alone() -> None:
    assert Digits().load()[1].positions.equal(Digits().load()[1].positions)
    assert not Digits(split_seed=1).load()[1].positions.equal(Digits().load()[1].positions)


def test_a_rare_class_is_never_emptied() -> None:
    kept, held = stratified(torch.tensor([0] * 10 + [1, 1]), 0.9, seed=0)
    assert set(kept.tolist()) | set(held.tolist()) == set(range(12))
    assert {10, 11} & set(kept.tolist()) and {10, 11} & set(held.tolist())


def test_addresses_are_stable_and_apart() -> None:
    assert address(0, "order", 3) == address(0, "order", 3) == 2723741169552378311
    assert len({address(s, name, e) for s in range(3) for name in ("order", "init") for e in range(3)}) == 18
    a, b = (torch.rand(3, generator=generator(0, "x", k)) for k in (1, 1))
    assert a.equal(b)


def test_a_sealed_process_cannot_open_the_test_split() -> None:
    code = "from tfkd_ray.data import *; seal_test_split(); Digits().load(); Digits().load_test()"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 1 and "PermissionError: the test split cannot be opened by a sweep" in run.stderr
