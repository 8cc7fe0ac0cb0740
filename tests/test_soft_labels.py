"""The bank: the labels of a teacher that runs in every step, computed once, by any process."""

import errno
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

from tfkd_ray.learn import soft_labels
from tfkd_ray.learn.checkpoint import save_weights
from tfkd_ray.learn.config import TrainConfig
from tfkd_ray.learn.loop import train, train_in
from tfkd_ray.learn.soft_labels import CHUNKS, LARGEST, Bank, fits
from tfkd_ray.learn.teachers import bank_of, find_or_train, load_teacher
from tfkd_ray.settings.errors import ConfigError
from tfkd_ray.settings.schema import validated

N, K = 100, 5
LOGITS = 10 * torch.randn(N, K, generator=torch.Generator().manual_seed(0)) + 40


class Counted:
    """Computes the logits above, and counts the requests of each image."""

    def __init__(self) -> None:
        self.asked = torch.zeros(N, dtype=torch.int64)

    def __call__(self, network: nn.Module, index: Tensor) -> Tensor:
        self.asked[index] += 1
        return LOGITS[index]


def files(folder: Path) -> list[Path]:
    """Return the bank's files in a folder, without its locks."""
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


@pytest.mark.slow
def test_three_epochs_from_the_bank_are_those_of_a_teacher_in_every_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Crop, flip and rotation. Half precision keeps 11 bits: below 32, at worst 2 ** -7."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    online, banked = (
        list(train(c, teacher=find_or_train(c, tmp_path))) for c in map(config, ("online", "bank"))
    )
    assert len(files(tmp_path / "tfkd_ray" / "soft_labels")) == 4  # three epochs and validation
    for a, b in zip(online, banked, strict=True):
        assert a.metrics["train_kd"] == pytest.approx(b.metrics["train_kd"], rel=1e-3)
        assert a.metrics["val_teacher_kl"] == pytest.approx(b.metrics["val_teacher_kl"], rel=1e-3)
    ours, theirs = (run[-1].state()["model"] for run in (banked, online))
    assert all((ours[k].float() - v.float()).abs().max() < 2e-3 for k, v in theirs.items())
    assert any(not ours[k].equal(v) for k, v in theirs.items())  # it is not the same code


@pytest.mark.slow
def test_the_logits_of_a_view_are_the_teachers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Tensor] = []
    whole = Bank.logits

    def kept(
        self: Bank, view: dict[str, Any], count: int, num_classes: int, compute: Any
    ) -> Tensor:
        online = compute(self.network(), torch.arange(count))
        logits = whole(self, view, count, num_classes, compute)
        found.append((logits.float() - (online - online.mean(dim=1, keepdim=True))).abs().max())
        return logits

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(Bank, "logits", kept)
    c = config("bank")
    list(train(c, teacher=find_or_train(c, tmp_path)))
    assert len(found) == 4 and max(found) < 2**-7


@pytest.mark.slow
def test_a_second_trial_asks_no_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = config("bank")
    list(train(first, teacher=find_or_train(first, tmp_path)))
    other = config(
        "bank", objective={"name": "kd", "alpha": 0.2, "temperature": 9}, optim={"lr": 0.02}
    )
    teacher = bank_of(other, tmp_path)
    assert teacher is not None

    def refuse() -> nn.Module:
        raise AssertionError("the teacher was asked")

    teacher._make = refuse
    assert len(list(train(other, teacher=teacher))) == 3
    elsewhere = config("bank", seed=1)  # it has other views of the images
    teacher = bank_of(elsewhere, tmp_path)
    assert teacher is not None
    teacher._make = refuse
    with pytest.raises(AssertionError, match="was asked"):
        next(train(elsewhere, teacher=teacher))


def test_tiny_teachers_and_huge_views_are_left_online() -> None:
    assert not config("auto").banked and config("bank").banked
    assert config("auto", teacher={"model": "resnet18"}).banked
    assert not validated(
        TrainConfig, {"objective": "ce", "init": "trained", "student": "resnet18"}
    ).banked
    assert config("bank").fingerprint() != config("online").fingerprint()
    assert fits(50_000, 100) and not fits(1_281_167, 1000)


# --- files


def test_labels_are_centred_and_half_precision(tmp_path: Path) -> None:
    logits = bank(tmp_path).logits({"epoch": 1}, N, K, Counted())
    assert logits.dtype == torch.float16 and logits.shape == (N, K)
    assert logits.float().mean(dim=1).abs().max() < 0.01
    assert (logits.float().softmax(1) - LOGITS.softmax(1)).abs().max() < 2e-3


@pytest.mark.parametrize("scale", [100.0, 1e3, 1e6, 1e30])
@pytest.mark.parametrize("part", ["all", "one image"])
@pytest.mark.parametrize("room", [True, False])
def test_large_logits_are_kept_in_a_form_that_holds_them(
    tmp_path: Path, scale: float, part: str, room: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = LOGITS.clone()
    large[-1 if part == "one image" else slice(None)] *= scale

    def compute(network: nn.Module, index: Tensor) -> Tensor:
        return large[index]

    if not room:
        monkeypatch.setenv("TFKD_BANK_GB", "0")
        monkeypatch.setattr(soft_labels, "_told", {tmp_path})
    found = [bank(tmp_path).logits({"epoch": 1}, N, K, compute) for _ in range(2)]
    assert found[0].dtype == torch.float32 and found[0].equal(found[1])
    wanted = large - large.mean(dim=1, keepdim=True)
    assert torch.allclose(found[0], wanted, rtol=1e-3, atol=1 / 32)
    assert (found[0].softmax(1) - wanted.softmax(1)).abs().max() < 2e-3
    assert bool(files(tmp_path)) == room


@pytest.mark.parametrize("bad", ["inf", "-inf", "nan"])
def test_logits_that_are_no_numbers_are_refused_when_a_view_is_filled(
    tmp_path: Path, bad: str
) -> None:
    with pytest.raises(ConfigError, match="the teacher gives logits that are not finite numbers"):
        bank(tmp_path).logits({}, N, K, lambda network, index: LOGITS[index] + float(bad))


@pytest.mark.slow
def test_a_teacher_with_logits_of_a_million_teaches_from_the_bank_as_it_does_online(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = []
    for labels in ("online", "bank"):
        run = config(labels, epochs=1)
        of = run.teacher_run()
        teacher = find_or_train(run, tmp_path)
        assert teacher is not None and of is not None
        loud = nn.Sequential(load_teacher(of, tmp_path), Times(1e5))
        teacher._make, teacher._of = lambda loud=loud: loud, {"loud": True}  # type: ignore[misc]
        found.append(next(train(run, teacher=teacher)).metrics)
    assert found[1]["train_kd"] == pytest.approx(found[0]["train_kd"], rel=1e-3)


class Times(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x


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


@pytest.mark.fault
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
    assert counted.asked[: started[-1]].sum() == 0  # its labels were used
    assert counted.asked[started[-1] :].tolist() == [1] * (N - started[-1])


def asked_for(tree: dict[str, Any], **of: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return (key of a bank, view of epoch 1), as `teachers.bank_of` and the loop do."""
    c = config("bank", **tree)
    about = {"teacher": "sha256", "data": c.data.model_dump(mode="json"), "precision": "fp32", **of}
    return about, c.augment.key(c.seed, 1)


@pytest.mark.parametrize(
    "tree, of, what",
    [
        ({}, {"teacher": "another"}, "teacher"),
        ({"data": {"name": "digits", "split_seed": 1}}, {}, "data"),
        ({"augment": {"crop_padding": 1, "flip": True}}, {}, "augment"),
        ({"seed": 1}, {}, "seed"),
        ({}, {"precision": "bf16"}, "precision"),
        ({"augment": {}}, {}, "augment and epoch and seed"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_labels_of_another_teacher_or_other_images_are_an_error(
    tmp_path: Path, tree: dict[str, Any], of: dict[str, Any], what: str
) -> None:
    mine, theirs = asked_for({}), asked_for(tree, **of)
    counted = Counted()
    for about, view in (mine, theirs):
        Bank(nn.Identity, about, tmp_path).logits(view, N, K, counted)
    assert counted.asked.tolist() == [2] * N  # both are computed: neither was used for the other
    one, two = files(tmp_path)
    content = one.read_bytes(), two.read_bytes()
    one.unlink(), two.unlink()  # they may be mapped
    one.write_bytes(content[1]), two.write_bytes(content[0])
    for about, view in (mine, theirs):
        with pytest.raises(
            ValueError, match=rf"soft labels of another {what}; delete it, and it is made again"
        ):
            Bank(nn.Identity, about, tmp_path).logits(view, N, K, counted)
    assert counted.asked.tolist() == [2] * N


class Scaled(nn.Linear):
    """A network whose weights do not determine everything."""

    scale: float

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(1)) * self.scale


def scaled(shape: tuple[int, int, int], num_classes: int, scale: float) -> nn.Module:
    network = Scaled(shape[0] * shape[1] * shape[2], num_classes)
    network.scale = scale
    return network


@pytest.mark.slow
def test_two_teachers_with_the_same_weights_share_no_labels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    save_weights(tmp_path / "w.safetensors", scaled((1, 8, 8), 10, 1.0).state_dict(), {})
    found: dict[str, list[float]] = {"bank": [], "online": []}
    for labels, kd in found.items():
        for scale in (1.0, 5.0):
            model = {
                "name": "own",
                "path": "tests.test_soft_labels:scaled",
                "args": {"scale": scale},
            }
            teacher = {"model": model, "weights": str(tmp_path / "w.safetensors"), "labels": labels}
            c = config(labels, teacher=teacher, epochs=1)
            kd.append(next(train(c, teacher=find_or_train(c, tmp_path))).metrics["train_kd"])
    assert (
        found["bank"] == pytest.approx(found["online"], rel=2e-3)
        and found["bank"][1] > 2 * found["bank"][0]
    )


@pytest.mark.slow
def test_a_view_is_mapped_and_not_read_into_memory(tmp_path: Path) -> None:
    """Ten trials read 40 MB: private memory does not grow, and all share the pages."""
    count, classes = 20_000, 1000

    def compute(network: nn.Module, index: Tensor) -> Tensor:
        return torch.zeros(len(index), classes).index_fill_(1, torch.tensor([3]), 2.0)

    def own() -> int:
        """Return this process's bytes that are in no file."""
        text = Path("/proc/self/smaps_rollup").read_text()
        return (
            int(
                next(line.split()[1] for line in text.splitlines() if line.startswith("Anonymous:"))
            )
            * 1024
        )

    Bank(nn.Identity, {}, tmp_path).logits({}, count, classes, compute)
    before = own()
    held = [Bank(nn.Identity, {}, tmp_path).logits({}, count, classes, compute) for _ in range(10)]
    assert all(float(view[count - 1, 3]) > 1 for view in held)
    assert own() - before < 20_000_000
    (path,) = files(tmp_path)
    assert Path("/proc/self/maps").read_text().count(str(path)) >= 10
    whole = path.stat().st_size
    assert 2 * count * classes < whole < 2 * count * classes + 10_000 and whole < LARGEST


def test_a_file_is_read_for_its_checksum_once_a_process_and_again_when_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[int] = []
    checksum = soft_labels._checksum
    monkeypatch.setattr(
        soft_labels, "_checksum", lambda logits: computed.append(len(logits)) or checksum(logits)
    )
    first = bank(tmp_path).logits({"epoch": 1}, N, K, Counted()).clone()  # written: computed
    computed.clear()
    for _ in range(3):
        assert bank(tmp_path).logits({"epoch": 1}, N, K, Counted()).equal(first)
    once = len(computed)
    (path,) = files(tmp_path)
    content = path.read_bytes()
    path.unlink()  # it may be mapped
    path.write_bytes(content)  # of another inode or time, as another process would write it
    for _ in range(3):
        assert bank(tmp_path).logits({"epoch": 1}, N, K, Counted()).equal(first)
    assert once <= 1 and len(computed) == once + 1


@pytest.mark.parametrize("top", [False, True])
def test_a_view_that_was_read_ahead_needs_no_checksum_when_its_epoch_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, top: bool
) -> None:
    logits = torch.randn(N, 60, generator=torch.Generator().manual_seed(1))

    def labels(of: Bank) -> Tensor:
        kept = of.top_logits if top else of.logits
        return kept({"epoch": 2}, N, 60, lambda network, index: logits[index])

    first = labels(bank(tmp_path)).clone()
    (path,) = files(tmp_path)
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content)  # as another process writes it: unknown to this one
    monkeypatch.setattr(soft_labels, "_intact", set())
    bank(tmp_path).read_ahead({"epoch": 2}, N, 60, top=top).join()
    monkeypatch.setattr(soft_labels, "_checksum", lambda logits: pytest.fail("not read ahead"))
    assert labels(bank(tmp_path)).equal(first)


def test_what_is_read_ahead_may_be_missing_or_another_view(tmp_path: Path) -> None:
    bank(tmp_path).read_ahead({"epoch": 1}, N, K).join()  # of which no file is there
    assert not files(tmp_path)
    bank(tmp_path).logits({"epoch": 1}, N, K, Counted())
    (path,) = files(tmp_path)
    place, _ = bank(tmp_path)._file_of({"epoch": 2}, [N, K])
    path.rename(place)  # the thread leaves it, the epoch that needs it raises
    bank(tmp_path).read_ahead({"epoch": 2}, N, K).join()
    with pytest.raises(ValueError, match="soft labels of another epoch"):
        bank(tmp_path).logits({"epoch": 2}, N, K, Counted())


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


def test_it_stays_below_its_limit_and_drops_the_longest_unused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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


def test_where_nothing_can_be_written_everyone_is_for_himself_and_that_is_said_once(
    tmp_path: Path,
) -> None:
    (tmp_path / "file").touch()
    counted, said = Counted(), list[str]()
    for _ in range(2):
        mine = bank(tmp_path / "file" / "below")
        mine.say = said.append
        logits = mine.logits({"epoch": 1}, N, K, counted)
        assert logits.shape == (N, K)
    assert counted.asked.tolist() == [2] * N
    assert len(said) == 1 and said[0].startswith(
        f"soft labels cannot be kept in {tmp_path}/file/below: "
    )


class Usage:
    total, free = 10**9, 0


def test_where_there_is_no_room_the_teacher_is_asked_and_that_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = bank(tmp_path / "a").logits({"epoch": 1}, N, K, Counted())
    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage)
    Usage.free = 4 * N * K - 1
    counted, said = Counted(), list[str]()
    for epoch in (1, 1, 2):
        mine = bank(tmp_path / "b")
        mine.say = said.append
        assert mine.logits({"epoch": epoch}, N, K, counted).equal(kept)  # the same numbers
    assert counted.asked.tolist() == [3] * N and not (tmp_path / "b").exists()
    assert (
        len(said) == 1
        and "0 MB are free, and a view needs 0; each trial runs the teacher itself" in said[0]
    )
    Usage.free = 4 * N * K
    for _ in range(2):
        assert bank(tmp_path / "b").logits({"epoch": 1}, N, K, counted).equal(kept)
    assert counted.asked.tolist() == [4] * N and len(files(tmp_path / "b")) == 1
    Usage.free = 0
    with pytest.warns(UserWarning, match="soft labels cannot be kept in"):  # nobody listens
        bank(tmp_path / "c").logits({"epoch": 1}, N, K, counted)


@pytest.mark.slow
def test_a_disk_that_fills_up_while_a_view_is_written_fails_no_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trial's loop reports the sentence; its numbers are those with a bank."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "whole"))
    c = config("bank", epochs=2)
    with_bank = [
        times_aside(m) for m in train_in(tmp_path / "t1", c, teacher=find_or_train(c, tmp_path))
    ]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "full"))
    write = Path.write_bytes

    def full(path: Path, content: bytes) -> int:
        if "soft_labels" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    said: list[str] = []
    teacher = find_or_train(c, tmp_path)
    assert [
        times_aside(m) for m in train_in(tmp_path / "t2", c, teacher=teacher, say=said.append)
    ] == with_bank
    assert len(said) == 1 and "soft_labels: No space left on device; each trial runs" in said[0]
    assert not files(tmp_path / "full" / "tfkd_ray" / "soft_labels")


def times_aside(metrics: dict[str, float]) -> dict[str, float]:
    return {k: v for k, v in metrics.items() if k not in ("seconds", "images_per_s")}


def test_what_another_node_has_filled_is_not_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Shelf(dict[str, bytes]):
        def fetch(self, name: str) -> bytes | None:
            return self.get(name)

        def offer(self, name: str, content: bytes) -> None:
            self[name] = content

    shelf, counted = Shelf(), Counted()
    found = [
        Bank(nn.Identity, {}, tmp_path / node, shelf).logits({"epoch": 1}, N, K, counted)
        for node in ("one", "two")
    ]
    assert found[0].equal(found[1]) and counted.asked.tolist() == [1] * N and len(shelf) == 1
    assert CHUNKS < N
    # other views count for the limit, too, and labels that cannot be kept are still used
    (kept,) = files(tmp_path / "two")
    limit = str(1.5 * kept.stat().st_size / 1e9)
    for epoch in (2, 3):
        monkeypatch.setenv("TFKD_BANK_GB", "1")
        Bank(nn.Identity, {}, tmp_path / "one", shelf).logits({"epoch": epoch}, N, K, counted)
        monkeypatch.setenv("TFKD_BANK_GB", limit)
        Bank(nn.Identity, {}, tmp_path / "two", shelf).logits({"epoch": epoch}, N, K, counted)
        assert len(files(tmp_path / "two")) == 1
    monkeypatch.setenv("TFKD_BANK_GB", "1e-9")
    said: list[str] = []
    small = Bank(nn.Identity, {}, tmp_path / "three", shelf)
    small.say = said.append
    assert (
        small.logits({"epoch": 1}, N, K, counted).equal(found[0])
        and counted.asked.tolist() == [3] * N
    )
    assert not (tmp_path / "three").exists()
    assert len(said) == 1 and "TFKD_BANK_GB allows 0 MB, and a view needs 0" in said[0]
    assert (
        small.logits({"epoch": 4}, N, K, counted).equal(found[0])
        and counted.asked.tolist() == [4] * N
    )
    assert not files(tmp_path / "three")


# --- between nodes


def test_the_shelf_stays_below_its_limit_and_drops_the_oldest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from tfkd_ray.run import epochs

    monkeypatch.setattr(epochs.ray, "put", lambda content: content)  # its object store
    shelf = epochs.Shelf(100)
    for name in ("a", "b", "c"):
        shelf.offer(name, name.encode() * 40)
        assert shelf.fetch(name) == [name.encode() * 40]
    assert [shelf.fetch(name) != [] for name in ("a", "b", "c", "none")] == [
        False,
        True,
        True,
        False,
    ]
    shelf.offer("d", b"d" * 90)  # two must be removed for it
    assert [shelf.fetch(name) != [] for name in ("b", "c", "d")] == [False, False, True]
    assert sum(size for _, size in shelf._views.values()) <= 100
    shelf.offer("e", b"e" * 101)
    assert list(shelf._views) == ["d"]


def fill(experiment: Path, folder: Path, asked: bool) -> float:
    """Fill a view in another process, as another node does; `asked` is whether it is computed."""
    from tfkd_ray.run.epochs import _Elsewhere, shelf_name

    counted = Counted()
    there = Bank(nn.Identity, {}, folder, _Elsewhere(shelf_name(experiment)))
    logits = there.logits({"epoch": 1}, N, K, counted)
    assert counted.asked.tolist() == [int(asked)] * N
    return float(logits.float().sum())


@pytest.mark.ray
def test_a_view_reaches_other_nodes_and_outlives_the_trial_that_filled_it(
    tmp_path: Path, ray_cluster: str
) -> None:
    import ray
    from ray import cloudpickle

    from tfkd_ray.run.callbacks import SoftLabels

    cloudpickle.register_pickle_by_value(sys.modules[__name__])

    shared = SoftLabels(tmp_path)
    shared.on_begin()
    task = ray.remote(max_calls=1)(fill)  # its process ends with it
    first = ray.get(task.remote(tmp_path, tmp_path / "one", True))
    assert ray.get(task.remote(tmp_path, tmp_path / "two", False)) == first
    shared.on_close([])
    assert ray.get(task.remote(tmp_path, tmp_path / "three", True)) == first
