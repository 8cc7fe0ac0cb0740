"""The bank: the same labels as a teacher that is asked in every step, computed once, by whoever lives."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tfkd_ray import soft_labels
from tfkd_ray.config import TrainConfig
from tfkd_ray.loop import train
from tfkd_ray.schema import validated
from tfkd_ray.soft_labels import CHUNKS, Bank, fits
from tfkd_ray.teachers import bank_of, find_or_train

N, K = 100, 5
LOGITS = 10 * torch.randn(N, K, generator=torch.Generator().manual_seed(0)) + 40


class Counted:
    """Computes the logits above, and counts how often each image was asked."""

    def __init__(self) -> None:
        self.asked = torch.zeros(N, dtype=torch.int64)

    def __call__(self, network: nn.Module, index: Tensor) -> Tensor:
        self.asked[index] += 1
        return LOGITS[index]


def files(folder: Path) -> list[Path]:
    """The bank's files in a folder, without its locks."""
    return sorted(folder.glob("[0-9a-f]*"))


def bank(folder: Path, **of: Any) -> Bank:
    return Bank(nn.Identity, {"teacher": "a", **of}, folder)


# --- against a teacher that is asked in every step


def config(labels: str, **changes: Any) -> TrainConfig:
    tree = {
        "objective": {"name": "kd", "alpha": 0.7, "temperature": 3},
        "student": {"name": "cnn", "widths": [8]},
        "teacher": {"model": {"name": "cnn", "widths": [16]}, "epochs": 2, "labels": labels},
        "augment": {"crop_padding": 1, "flip": True, "rotation_degrees": 15},
        "epochs": 3,
        **changes,
    }
    return validated(TrainConfig, tree)


def test_three_epochs_from_the_bank_are_those_of_a_teacher_in_every_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Crop, flip and rotation. Logits: half precision keeps 11 bits, of numbers below 32 that is 2 ** -7 at worst."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    online, banked = (list(train(c, teacher=find_or_train(c, tmp_path))) for c in map(config, ("online", "bank")))
    assert len(files(tmp_path / "tfkd_ray" / "soft_labels")) == 4  # three epochs and validation
    for a, b in zip(online, banked, strict=True):
        assert a.metrics["train_kd"] == pytest.approx(b.metrics["train_kd"], rel=1e-3)
        assert a.metrics["val_teacher_kl"] == pytest.approx(b.metrics["val_teacher_kl"], rel=1e-3)
    ours, theirs = (run[-1].state()["model"] for run in (banked, online))
    assert all((ours[k].float() - v.float()).abs().max() < 2e-3 for k, v in theirs.items())
    assert any(not ours[k].equal(v) for k, v in theirs.items())  # it is not the same code


def test_the_logits_of_a_view_are_the_teachers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Tensor] = []
    whole = Bank.logits

    def kept(self: Bank, view: dict[str, Any], count: int, num_classes: int, compute: Any) -> Tensor:
        online = compute(self.network(), torch.arange(count))
        logits = whole(self, view, count, num_classes, compute)
        found.append((logits.float() - (online - online.mean(dim=1, keepdim=True))).abs().max())
        return logits

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(Bank, "logits", kept)
    c = config("bank")
    list(train(c, teacher=find_or_train(c, tmp_path)))
    assert len(found) == 4 and max(found) < 2**-7


def test_a_second_trial_asks_no_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = config("bank")
    list(train(first, teacher=find_or_train(first, tmp_path)))
    other = config("bank", objective={"name": "kd", "alpha": 0.2, "temperature": 9}, optim={"lr": 0.02})
    teacher = bank_of(other, tmp_path)
    assert teacher is not None

    def refuse() -> nn.Module:
        raise AssertionError("the teacher was asked")

    teacher._make = refuse
    assert len(list(train(other, teacher=teacher))) == 3
    elsewhere = config("bank", seed=1)  # it sees other views of the images
    teacher = bank_of(elsewhere, tmp_path)
    assert teacher is not None
    teacher._make = refuse
    with pytest.raises(AssertionError, match="was asked"):
        next(train(elsewhere, teacher=teacher))


def test_tiny_teachers_and_huge_views_are_left_online() -> None:
    assert not config("auto").banked and config("bank").banked
    assert config("auto", teacher={"model": "resnet18"}).banked
    assert not validated(TrainConfig, {"objective": "ce", "init": "trained", "student": "resnet18"}).banked
    assert config("bank").fingerprint() != config("online").fingerprint()
    assert fits(50_000, 100) and not fits(1_281_167, 1000)


# --- files


def test_labels_are_centred_and_half_precision(tmp_path: Path) -> None:
    logits = bank(tmp_path).logits({"epoch": 1}, N, K, Counted())
    assert logits.dtype == torch.float16 and logits.shape == (N, K)
    assert logits.float().mean(dim=1).abs().max() < 0.01
    assert (logits.float().softmax(1) - LOGITS.softmax(1)).abs().max() < 2e-3


def test_a_view_is_computed_once(tmp_path: Path) -> None:
    counted = Counted()
    first = bank(tmp_path).logits({"epoch": 1}, N, K, counted)
    again = bank(tmp_path).logits({"epoch": 1}, N, K, counted)
    assert counted.asked.tolist() == [1] * N and again.equal(first)
    bank(tmp_path).logits({"epoch": 2}, N, K, counted)
    bank(tmp_path, teacher="b").logits({"epoch": 1}, N, K, counted)
    assert counted.asked.tolist() == [3] * N


def test_who_wants_a_view_at_the_same_time_fills_it_together(tmp_path: Path) -> None:
    counted = Counted()

    def slow(network: nn.Module, index: Tensor) -> Tensor:
        time.sleep(0.01)
        return counted(network, index)

    with ThreadPoolExecutor(4) as pool:
        banks = [bank(tmp_path) for _ in range(4)]
        found = list(pool.map(lambda b: b.logits({"epoch": 1}, N, K, slow), banks))
    assert counted.asked.tolist() == [1] * N and all(f.equal(found[0]) for f in found)
    assert len(files(tmp_path)) == 1


FILLER = """
import sys, time, torch
from pathlib import Path
from torch import nn
from tests.test_soft_labels import LOGITS, N, K, bank
def compute(network, index):
    print(int(index[0]), flush=True)
    time.sleep(0.05 if index[0] < N // 2 else 600)
    return LOGITS[index]
bank(Path(sys.argv[1])).logits({"epoch": 1}, N, K, compute)
"""


def test_the_first_filler_is_killed_half_way(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FILLER, str(tmp_path)]
    root, started = Path(__file__).parent.parent, [0]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) as filler:
        assert filler.stdout is not None
        while started[-1] < N // 2:
            started.append(int(filler.stdout.readline()))
        os.kill(filler.pid, signal.SIGKILL)
    counted = Counted()
    logits = bank(tmp_path).logits({"epoch": 1}, N, K, counted)
    assert (logits.float().softmax(1) - LOGITS.softmax(1)).abs().max() < 2e-3
    assert counted.asked[: started[-1]].sum() == 0  # what it had filled was of use
    assert counted.asked[started[-1] :].tolist() == [1] * (N - started[-1])


def test_labels_of_another_teacher_are_an_error(tmp_path: Path) -> None:
    for teacher in ("a", "b"):
        bank(tmp_path, teacher=teacher).logits({"epoch": 1}, N, K, Counted())
    one, two = files(tmp_path)
    two.replace(one)
    with pytest.raises(ValueError, match="soft labels of another of; delete it"):
        for teacher in ("a", "b"):
            bank(tmp_path, teacher=teacher).logits({"epoch": 1}, N, K, Counted())


@pytest.mark.parametrize("harm", ["cut", "flipped"])
def test_a_damaged_file_is_computed_again(tmp_path: Path, harm: str) -> None:
    first = bank(tmp_path).logits({"epoch": 1}, N, K, Counted()).clone()
    (path,) = files(tmp_path)
    content = bytearray(path.read_bytes())
    content[-7] ^= 1
    path.unlink()  # it may be mapped
    path.write_bytes(content if harm == "flipped" else content[:-100])
    counted = Counted()
    if harm == "flipped":
        with pytest.warns(UserWarning, match="damaged"):
            again = bank(tmp_path).logits({"epoch": 1}, N, K, counted)
    else:
        again = bank(tmp_path).logits({"epoch": 1}, N, K, counted)
    assert again.equal(first) and counted.asked.tolist() == [1] * N


def test_it_stays_below_its_limit_and_drops_the_longest_unused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bank(tmp_path).logits({"epoch": 0}, N, K, Counted())
    (path,) = files(tmp_path)
    size = path.stat().st_size
    monkeypatch.setenv("TFKD_BANK_GB", str(3.5 * size / 1e9))
    for epoch in (1, 2):
        bank(tmp_path).logits({"epoch": epoch}, N, K, Counted())
    for age, file in enumerate(sorted(files(tmp_path), key=lambda f: f.stat().st_mtime)):
        os.utime(file, (1000 + age, 1000 + age))
    bank(tmp_path).logits({"epoch": 0}, N, K, Counted())  # used, so it stays
    monkeypatch.setattr(soft_labels, "CHUNKS", 1)
    bank(tmp_path).logits({"epoch": 3}, N, K, Counted())
    assert sum(f.stat().st_size for f in files(tmp_path)) <= 3.5 * size
    counted = Counted()
    bank(tmp_path).logits({"epoch": 0}, N, K, counted)
    assert counted.asked.sum() == 0


def test_where_nothing_can_be_written_everyone_is_for_himself(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    counted = Counted()
    for _ in range(2):
        logits = bank(tmp_path / "file" / "below").logits({"epoch": 1}, N, K, counted)
        assert logits.shape == (N, K)
    assert counted.asked.tolist() == [2] * N


def test_what_another_node_has_filled_is_not_computed(tmp_path: Path) -> None:
    class Shelf(dict[str, bytes]):
        def fetch(self, name: str) -> bytes | None:
            return self.get(name)

        def offer(self, name: str, content: bytes) -> None:
            self[name] = content

    shelf, counted = Shelf(), Counted()
    found = [
        Bank(nn.Identity, {}, tmp_path / node, shelf).logits({"epoch": 1}, N, K, counted) for node in ("one", "two")
    ]
    assert found[0].equal(found[1]) and counted.asked.tolist() == [1] * N and len(shelf) == 1
    assert CHUNKS < N


# --- between nodes


def fill(experiment: Path, folder: Path, asked: bool) -> float:
    """In a process of its own, as of another node: whether the view had to be computed is checked against `asked`."""
    from tfkd_ray.trial import _Elsewhere, shelf_name

    counted = Counted()
    there = Bank(nn.Identity, {}, folder, _Elsewhere(shelf_name(experiment)))
    logits = there.logits({"epoch": 1}, N, K, counted)
    assert counted.asked.tolist() == [int(asked)] * N
    return float(logits.float().sum())


@pytest.mark.ray
def test_a_view_reaches_other_nodes_and_outlives_the_trial_that_filled_it(tmp_path: Path, ray_cluster: str) -> None:
    import ray
    from ray import cloudpickle

    from tfkd_ray.tune import SoftLabels

    cloudpickle.register_pickle_by_value(sys.modules[__name__])

    shared = SoftLabels(tmp_path)
    shared.setup()
    task = ray.remote(max_calls=1)(fill)  # its process ends with it
    first = ray.get(task.remote(tmp_path, tmp_path / "one", True))
    assert ray.get(task.remote(tmp_path, tmp_path / "two", False)) == first
    shared.on_experiment_end([])
    assert ray.get(task.remote(tmp_path, tmp_path / "three", True)) == first
