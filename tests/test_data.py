"""Data: real digits, splits without leaks, addressed randomness."""

import functools
import gzip
import hashlib
import http.server
import io
import math
import os
import pickle
import struct
import subprocess
import sys
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import DATA_SETS
from PIL import Image

from tfkd_ray.learn.config import TrainConfig
from tfkd_ray.learn.data import Digits, OwnData
from tfkd_ray.learn.dataset import FileDataset, stratified
from tfkd_ray.learn.image_files import TinyImagenet
from tfkd_ray.learn.images import ImageSet, address, generator
from tfkd_ray.learn.loop import train
from tfkd_ray.learn.official import (
    Cifar10,
    Cifar100,
    CifarDataset,
    Emnist,
    FashionMnist,
    IdxDataset,
    Mnist,
)
from tfkd_ray.learn.omniglot import CHARACTERS, CHECKSUMS, Omniglot
from tfkd_ray.learn.own import imported
from tfkd_ray.run.confirm import split_id
from tfkd_ray.settings.errors import ConfigError
from tfkd_ray.settings.schema import validated
from tfkd_ray.settings.yaml import dump_yaml, parse_yaml


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give each test its own cache."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder / "tfkd_ray"


MAPPED = """
import sys, torch
from pathlib import Path
from tfkd_ray.learn.cache import cached
from tfkd_ray.learn.images import ImageSet

def memory():
    lines = Path("/proc/self/status").read_text().splitlines()
    return {line.split()[0]: int(line.split()[1]) / 1024 for line in lines if line.startswith("Rss")}

def make():
    assert len(sys.argv) < 3, "made again"
    return torch.ones(40 * 2**8, 2**12, 1, 1, dtype=torch.uint8), torch.arange(40 * 2**8)

stored, labels = cached("x", [Path(sys.argv[1])], make)
part = ImageSet(stored, labels, labels, len(labels)).part(torch.arange(36 * 2**8))
before = memory()
seen = sum(int(batch.sum()) for batch in part.read(list(torch.arange(36 * 2**8).split(16))))
assert seen == 36 * 2**20
grown = {kind: size - before[kind] for kind, size in memory().items()}
assert grown["RssFile:"] > 30 and grown["RssAnon:"] < 18, grown
"""


@pytest.mark.long
@pytest.mark.slow
def test_processes_share_the_memory_of_decoded_images(tmp_path: Path) -> None:
    """Measure 36 MB of images of 4 kB, of 40 stored: mapped from the file, also a new one."""
    (tmp_path / "source").touch()
    for more in ([], ["made"]):
        command = [sys.executable, "-c", MAPPED, str(tmp_path / "source"), *more]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


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
    assert sorted([*train.positions.tolist(), *val.positions.tolist()]) == list(
        range(train.official_size)
    )
    shares = val.labels.bincount() / (train.labels.bincount() + val.labels.bincount())
    assert (shares - 0.2).abs().max() < 0.01


def test_the_validation_split_depends_on_the_split_seed_alone() -> None:
    assert Digits().load()[1].positions.equal(Digits().load()[1].positions)
    assert not Digits(split_seed=1).load()[1].positions.equal(Digits().load()[1].positions)


def test_a_subset_takes_the_same_part_of_every_class_and_splits_within_it() -> None:
    train_set, val_set = Digits(subset=300).load()
    positions = torch.cat([train_set.positions, val_set.positions])
    assert len(positions.unique()) == len(positions) == pytest.approx(300, abs=10)
    labels = Digits()._official("train")[1]
    for part in (train_set, val_set):
        assert (
            part.labels.equal(labels[part.positions]) and part.official_size == len(labels) == 1438
        )
    shares = labels[positions].bincount() / labels.bincount()
    assert shares.max() - shares.min() < 0.02
    assert (
        Digits(subset=300, split_seed=1).load()[0].positions.tolist()
        != train_set.positions.tolist()
    )
    assert len(Digits(subset=5000, val_fraction=0).load()[0]) == 1438


def test_without_validation_all_images_are_trained_on() -> None:
    train_set, val_set = Digits(val_fraction=0).load()
    assert val_set is None and train_set.positions.tolist() == list(range(1438))
    [epoch] = train(TrainConfig(objective="ce", data=Digits(val_fraction=0, subset=200), epochs=1))  # type: ignore[arg-type]
    assert not [name for name in epoch.metrics if name.startswith("val_")]


def test_a_rare_class_is_never_emptied() -> None:
    kept, held = stratified(torch.tensor([0] * 10 + [1, 1]), 0.9, seed=0)
    assert set(kept.tolist()) | set(held.tolist()) == set(range(12))
    assert {10, 11} & set(kept.tolist()) and {10, 11} & set(held.tolist())


def test_addresses_are_stable_and_apart() -> None:
    assert address(0, "order", 3) == address(0, "order", 3) == 2723741169552378311
    assert (
        len({address(s, name, e) for s in range(3) for name in ("order", "init") for e in range(3)})
        == 18
    )
    a, b = (torch.rand(3, generator=generator(0, "x", k)) for k in (1, 1))
    assert a.equal(b)


@pytest.mark.slow
def test_a_sealed_process_cannot_open_the_test_split() -> None:
    code = "from tfkd_ray.learn.data import *; from tfkd_ray.learn.dataset import seal_test_split; seal_test_split(); Digits().load(); Digits().load_test()"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (
        run.returncode == 1
        and "PermissionError: the test split cannot be opened by a sweep" in run.stderr
    )


# --- IDX -------------------------------------------------------------------------------------------------------

IDX = [
    kind
    for kind in DATA_SETS.values()
    if issubclass(kind, IdxDataset) and kind._official is IdxDataset._official
]
"""Data sets of IDX files that are read as they stand; EMNIST's are transposed."""
IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


def idx(array: np.ndarray[Any, Any]) -> bytes:
    """Return the bytes of a uint8 array in LeCun's format."""
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def pixels(n: int, *shape: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(n).integers(0, 256, (n, *shape), dtype=np.uint8)


def write_idx(folder: Path, *, gz: bool = False, kind: type[IdxDataset] = Mnist) -> None:
    """Write 4 train and 2 test images of each class, the classes in turn."""
    folder.mkdir(parents=True, exist_ok=True)
    data = kind()  # type: ignore[call-arg]
    for split, each in (("train", 4), ("test", 2)):
        n = each * data.num_classes
        labels = np.arange(n, dtype=np.uint8) % data.num_classes
        arrays = pixels(n, *data.shape[1:]), labels
        for stem, array in zip(data._files(split), arrays, strict=True):  # type: ignore[arg-type]
            raw = idx(array)
            (folder / f"{stem}{'.gz' * gz}").write_bytes(gzip.compress(raw, 1) if gz else raw)


@pytest.mark.parametrize("gz", [False, True], ids=["raw", "gz"])
@pytest.mark.parametrize("kind", IDX)
def test_idx_files_are_read_to_the_pixel(tmp_path: Path, kind: type[IdxDataset], gz: bool) -> None:
    write_idx(tmp_path, gz=gz, kind=kind)
    data = kind(root=tmp_path)  # type: ignore[call-arg]
    data.check()
    K = data.num_classes
    for split, n in (("train", 4 * K), ("test", 2 * K)):
        images, labels = data._official(split)  # type: ignore[arg-type]
        assert images.dtype == torch.uint8 and images.shape == (n, *kind.shape)
        assert (images.numpy()[:, 0] == pixels(n, *kind.shape[1:])).all()
        assert labels.tolist() == [i % K for i in range(n)]
    train, val = data.load()
    assert val.labels.bincount().tolist() == [1] * K and train.labels.bincount().tolist() == [3] * K
    assert len(data.load_test()) == 2 * K


def test_a_folder_that_torchvision_downloaded_to_will_do(tmp_path: Path) -> None:
    write_idx(tmp_path / "MNIST/raw")
    assert len(Mnist(root=tmp_path)._official("train")[1]) == 40


def cut(n: int) -> Callable[[bytes], bytes]:
    return lambda raw: raw[:n]


@pytest.mark.parametrize(
    "file, spoil, sentence",
    [
        (IMAGES, cut(5), "truncated: its header takes 16 bytes, and there are 5"),
        (IMAGES, cut(1000), "truncated: 40 items take 31360 bytes, and there are 984"),
        (IMAGES, lambda raw: raw + b"xy", "too long: 40 items take 31360 bytes, and there are at least 31362"),
        (IMAGES, lambda raw: b"\x1f\x8b" + raw[2:], "not this kind of IDX file: it starts with 0x1f8b0803, not 0x00000803"),
        (IMAGES, lambda _: idx(pixels(40, 32, 32)), "its images are 32x32, and those of mnist are 28x28"),
        (IMAGES, lambda raw: raw[:4] + b"\xff" * 4 + raw[8:], "its header says 4294967295 items, and the official file has 60000"),
        (IMAGES, lambda _: idx(pixels(0, 28, 28)), "its header says 0 items, and the official file has 60000"),
        (LABELS, lambda _: idx(np.arange(39, dtype=np.uint8) % 10), f"39 labels, and {IMAGES}SUFFIX has 40 images"),
        (LABELS, lambda raw: raw[:-3] + b"\x0a" + raw[-2:], "label 10 at 37 is outside 0..9"),
        (LABELS, lambda _: b"", "truncated: its header takes 8 bytes, and there are 0"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("gz", [False, True], ids=["raw", "gz"])
def test_a_wrong_idx_file_gets_a_sentence(
    tmp_path: Path, file: str, spoil: Callable[[bytes], bytes], sentence: str, gz: bool
) -> None:
    write_idx(tmp_path, gz=gz)
    path = tmp_path / f"{file}{'.gz' * gz}"
    raw = spoil(gzip.decompress(path.read_bytes()) if gz else path.read_bytes())
    path.write_bytes(gzip.compress(raw, 1) if gz else raw)
    with pytest.raises(ConfigError) as error:
        Mnist(root=tmp_path).load()
    assert error.value.problems == [f"data mnist: {path}: {sentence.replace('SUFFIX', '.gz' * gz)}"]


@pytest.mark.parametrize(
    "spoil", [cut(300), lambda _: b"no gzip", lambda raw: raw[:50] + bytes(50) + raw[100:]]
)
def test_a_broken_gzip_gets_a_sentence(tmp_path: Path, spoil: Callable[[bytes], bytes]) -> None:
    write_idx(tmp_path, gz=True)
    path = tmp_path / f"{IMAGES}.gz"
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(
        ConfigError, match=r"images-idx3-ubyte.gz: cannot be read: .*; get it again"
    ):
        Mnist(root=tmp_path).load()


@pytest.mark.parametrize(
    "kind", [k for k in DATA_SETS.values() if issubclass(k, IdxDataset | CifarDataset)]
)
def test_missing_files_say_where_they_were_looked_for_and_how_to_get_them(
    tmp_path: Path, kind: type[IdxDataset] | type[CifarDataset]
) -> None:
    data = kind(root=tmp_path)  # type: ignore[call-arg]
    for look in (data.check, data.load, data.load_test):
        with pytest.raises(ConfigError) as error:
            look()
        text = str(error.value)
        assert (
            text.startswith(f"data {data.name}: not found: ") and f"(looked in {tmp_path}" in text
        )
        assert kind.origin in text and text.endswith(", or set data.root")


def test_every_missing_file_is_named_at_once(tmp_path: Path) -> None:
    write_idx(tmp_path)
    (tmp_path / IMAGES).unlink()
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(
        ConfigError, match=f"not found: {IMAGES}, t10k-labels-idx1-ubyte, raw or with .gz"
    ):
        Mnist(root=tmp_path).check()


@pytest.mark.tools
def test_the_real_fashion_mnist() -> None:
    data = FashionMnist()
    images, labels = data._official("train")
    assert images.shape == (60_000, 1, 28, 28) and labels.bincount().tolist() == [6_000] * 10
    values = images.double()
    assert values.mean().item() / 255 == pytest.approx(data.mean[0] / 255, abs=5e-5)
    assert values.std().item() / 255 == pytest.approx(data.std[0] / 255, abs=5e-5)
    assert len(data.load_test()) == 10_000
    assert data.load()[1].labels.bincount().tolist() == [1_200] * 10


# --- small data and wrong labels


def parts_of(**settings: Any) -> tuple[ImageSet, ImageSet]:
    """Return train and validation of the digits."""
    train, val = Digits(**settings).load()
    assert isinstance(train, ImageSet) and isinstance(val, ImageSet)
    return train, val


def test_wrong_labels_are_of_train_images_alone_and_of_the_other_classes_alike() -> None:
    (clean, val), (train, same) = parts_of(), parts_of(label_noise=0.4)
    assert train.positions.equal(clean.positions) and train.images.equal(clean.images)
    assert same.labels.equal(val.labels)
    wrong = train.labels != clean.labels
    n = len(wrong)
    assert abs(int(wrong.sum()) - 0.4 * n) < 4 * math.sqrt(0.4 * 0.6 * n)
    shift = (train.labels - clean.labels)[wrong].remainder(10).bincount(minlength=10)
    assert shift[0] == 0 and train.labels.min() == 0 and train.labels.max() == 9
    share = shift[1:] / shift.sum()
    assert (share - 1 / 9).abs().max() < 4 * math.sqrt(8 / 81 / int(shift.sum()))


def test_an_images_wrong_label_depends_on_the_split_seed_and_the_image_alone() -> None:
    whole, _ = parts_of(label_noise=0.3)
    of = dict(zip(whole.positions.tolist(), whole.labels.tolist(), strict=True))
    for settings in ({"subset": 0.5}, {"subset": 600}, {"val_fraction": 0.5}):
        part, _ = parts_of(label_noise=0.3, **settings)
        found = zip(part.positions.tolist(), part.labels.tolist(), strict=True)
        assert all(of[place] == label for place, label in found if place in of)
    more, _ = parts_of(label_noise=0.6)  # wrong at 0.3 is wrong at 0.6, in the same way
    clean, _ = parts_of()
    still = whole.labels != clean.labels
    assert more.labels[still].equal(whole.labels[still])
    other, _ = parts_of(label_noise=0.3, split_seed=1)
    both = dict(zip(other.positions.tolist(), other.labels.tolist(), strict=True))
    shared = [p for p in both if p in of]
    assert sum(both[p] != of[p] for p in shared) > len(shared) / 4


def test_a_fraction_is_of_the_train_split_and_leaves_validation_whole() -> None:
    (clean, val), (train, same) = parts_of(), parts_of(subset=0.25)
    assert same.positions.equal(val.positions)
    assert set(train.positions.tolist()) < set(clean.positions.tolist())
    per_class, part = clean.labels.bincount(), train.labels.bincount()
    assert (part - per_class * 0.25).abs().max() <= 1
    rest = Digits(subset=0.25, unlabelled="rest").load_unlabelled()
    assert len(rest) == len(clean) - len(train)


def test_noise_and_fraction_are_in_the_identity_and_old_names_stay() -> None:
    assert "label_noise" not in Digits().identity() and "label_noise" not in Digits().tree
    assert Digits(label_noise=0.1).identity()["label_noise"] == 0.1
    assert Digits(subset=0.5).identity()["subset"] == 0.5
    assert split_id(Digits(label_noise=0.1)) == split_id(Digits())


@pytest.mark.parametrize("subset", [0, -3, 1.0, 1.5, "many", True, float("nan")])
def test_a_wrong_subset_gets_one_sentence(subset: Any) -> None:
    with pytest.raises(ConfigError) as error:
        validated(TrainConfig, {"objective": "ce", "data": {"name": "digits", "subset": subset}})
    (problem,) = error.value.problems
    assert problem.endswith(
        f"subset: a whole number of images from 1, or a fraction between 0 and 1, got {subset!r}"
    )


# --- EMNIST ----------------------------------------------------------------------------------------------------


def write_emnist(folder: Path, variant: str, labels: np.ndarray[Any, Any], n: int = 130) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        for stem, array in (
            ("images-idx3-ubyte", pixels(n, 28, 28)),
            ("labels-idx1-ubyte", labels),
        ):
            raw = gzip.compress(idx(array.astype(np.uint8)), 1)
            (folder / f"emnist-{variant}-{split}-{stem}.gz").write_bytes(raw)


@pytest.mark.parametrize(
    "variant, classes",
    [
        ("balanced", 47),
        ("byclass", 62),
        ("bymerge", 47),
        ("digits", 10),
        ("letters", 26),
        ("mnist", 10),
    ],
)
def test_emnist_is_upright_and_its_labels_count_from_0(
    tmp_path: Path, variant: str, classes: int
) -> None:
    labels = np.arange(130) % classes
    write_emnist(tmp_path / "gzip", variant, labels + (variant == "letters"))
    data = validated(
        TrainConfig,
        {"objective": "ce", "data": {"name": "emnist", "root": str(tmp_path), "variant": variant}},
    ).data
    assert isinstance(data, Emnist) and data.num_classes == classes
    data.check()
    images, found = data._official("train")
    assert (
        images[:, 0].numpy() == pixels(130, 28, 28).transpose(0, 2, 1)
    ).all() and found.tolist() == labels.tolist()
    assert len(data.load_test()) == 130


def test_emnists_mean_and_std_are_measured_once_whatever_the_split(tmp_path: Path) -> None:
    write_emnist(tmp_path, "digits", np.arange(130) % 10)
    data = Emnist(root=tmp_path, variant="digits")
    (mean,), (std,) = data.statistics()
    assert mean == pytest.approx(pixels(130, 28, 28).mean()) and std == pytest.approx(
        pixels(130, 28, 28).std()
    )
    assert data.statistics() == Emnist(root=tmp_path, variant="digits", val_fraction=0).statistics()
    for path in tmp_path.iterdir():
        path.unlink()
    assert data.statistics() == ((mean,), (std,))


@pytest.mark.parametrize(
    "variant, label, sentence",
    [("letters", 0, "label 0 at 7 is outside 1..26"), ("letters", 27, "label 27 at 7 is outside 1..26"), ("balanced", 47, "label 47 at 7 is outside 0..46")],
)  # fmt: skip
def test_a_wrong_label_of_emnist_is_named_as_it_stands_in_the_file(
    tmp_path: Path, variant: str, label: int, sentence: str
) -> None:
    labels = np.ones(130)
    labels[7] = label
    write_emnist(tmp_path, variant, labels)
    with pytest.raises(ConfigError) as error:
        Emnist(root=tmp_path, variant=variant).load()  # type: ignore[arg-type]
    path = tmp_path / f"emnist-{variant}-train-labels-idx1-ubyte.gz"
    assert error.value.problems == [f"data emnist: {path}: {sentence}"]


def test_another_variant_of_emnist_is_another_file(tmp_path: Path) -> None:
    write_emnist(tmp_path, "digits", np.arange(130) % 10)
    with pytest.raises(
        ConfigError,
        match=r"data emnist: not found: emnist-mnist-train-images-idx3-ubyte, .*gzip.zip, or set",
    ):
        Emnist(root=tmp_path, variant="mnist").check()
    with pytest.raises(
        ConfigError, match=r"variant: no such name 'digit'; did you mean 'digits'\?"
    ):
        validated(TrainConfig, {"objective": "ce", "data": {"name": "emnist", "variant": "digit"}})


# --- CIFAR -----------------------------------------------------------------------------------------------------


def batches(kind: type[CifarDataset]) -> dict[str, dict[bytes, Any]]:
    """Return batches by file name: 40 images each, the classes in turn, as the official pickles."""
    names = [*kind.batches["train"], *kind.batches["test"]]
    return {
        name: {
            b"batch_label": name.encode(),
            kind.labels_key: [i % kind.num_classes for i in range(40)],
            b"data": pixels(40 + n, 3072)[:40],
            b"filenames": [b"a.png"] * 40,
        }
        for n, name in enumerate(names)
    }


@pytest.mark.parametrize("gz", [False, True], ids=["raw", "gz"])
@pytest.mark.parametrize("part", ["images-idx3-ubyte", "labels-idx1-ubyte"])
@pytest.mark.parametrize("fault", ["missing", "empty", "cut"])
def test_a_broken_idx_file_of_the_test_split_is_named_before_a_comparison(
    tmp_path: Path, fault: str, part: str, gz: bool
) -> None:
    write_idx(tmp_path, gz=gz)
    path = tmp_path / f"t10k-{part}{'.gz' * gz}"
    content = path.read_bytes()
    path.unlink()
    if fault != "missing":
        path.write_bytes(content[: len(content) // 2] if fault == "cut" else b"")
    data = Mnist(root=tmp_path)
    data._official("train")
    with pytest.raises(ConfigError, match=f"^data mnist: .*t10k-{part}"):
        data.examine()


def write_cifar(
    root: Path, kind: type[CifarDataset], files: dict[str, bytes], *, archive: bool
) -> CifarDataset:
    if archive:
        with tarfile.open(root / kind.archive, "w:gz", compresslevel=1) as tar:
            for name, raw in files.items():
                member = tarfile.TarInfo(f"{kind.folder}/{name}")
                member.size = len(raw)
                tar.addfile(member, io.BytesIO(raw))
    else:
        (root / kind.folder).mkdir()
        for name, raw in files.items():
            (root / kind.folder / name).write_bytes(raw)
    return kind(root=root, check_md5=False)  # type: ignore[call-arg]


def pickled(kind: type[CifarDataset], protocol: int = 2) -> dict[str, bytes]:
    return {name: pickle.dumps(batch, protocol) for name, batch in batches(kind).items()}


@pytest.mark.parametrize("archive", [True, False], ids=["tar.gz", "folder"])
@pytest.mark.parametrize("kind", [Cifar10, Cifar100])
def test_cifar_is_read_to_the_pixel(
    tmp_path: Path, kind: type[CifarDataset], archive: bool
) -> None:
    data = write_cifar(tmp_path, kind, pickled(kind), archive=archive)
    before = sorted(tmp_path.rglob("*"))
    data.check()
    for split in ("train", "test"):
        images, labels = data._official(split)  # type: ignore[arg-type]
        theirs = [batches(kind)[name] for name in kind.batches[split]]  # type: ignore[index]
        assert images.dtype == torch.uint8 and labels.dtype == torch.int64
        assert (
            images.numpy() == np.concatenate([b[b"data"] for b in theirs]).reshape(-1, 3, 32, 32)
        ).all()
        assert labels.tolist() == [label for b in theirs for label in b[kind.labels_key]]
    assert sorted(tmp_path.rglob("*")) == before, "nothing is extracted"


def test_the_cifar_splits_are_stratified(tmp_path: Path) -> None:
    train, val = write_cifar(tmp_path, Cifar10, pickled(Cifar10), archive=False).load()
    assert (
        val.labels.bincount().tolist() == [4] * 10 and train.labels.bincount().tolist() == [16] * 10
    )


@pytest.mark.parametrize("archive", [True, False], ids=["tar.gz", "folder"])
@pytest.mark.parametrize("fault", ["cut", "empty", "no labels", "label", "fewer labels", "sizes"])
def test_a_broken_batch_of_cifars_test_split_is_named_before_a_comparison(
    tmp_path: Path, fault: str, archive: bool
) -> None:
    batch = batches(Cifar100)["test"]
    changes: dict[str, dict[bytes, Any]] = {
        "label": {b"fine_labels": [100] * 40},
        "fewer labels": {b"fine_labels": [1] * 39},
        "sizes": {b"data": pixels(40, 3071)},
    }
    batch |= changes.get(fault, {})
    if fault == "no labels":
        del batch[b"fine_labels"]
    raw = pickle.dumps(batch, 2)
    raw = {"cut": raw[: len(raw) // 2], "empty": b""}.get(fault, raw)
    files = {**pickled(Cifar100), "test": raw}
    data = write_cifar(tmp_path, Cifar100, files, archive=archive)
    data._official("train")
    with pytest.raises(ConfigError, match=f"^data cifar100: .*{Cifar100.archive[:5]}.*/test: "):
        data.examine()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL))
def test_pickles_of_any_protocol_and_memory_order_are_read(tmp_path: Path, protocol: int) -> None:
    batch = batches(Cifar100)["test"]
    files = {"test": pickle.dumps(batch | {b"data": np.asfortranarray(batch[b"data"])}, protocol)}
    images, _ = write_cifar(tmp_path, Cifar100, files, archive=False)._official("test")
    assert (images.numpy().reshape(40, 3072) == batch[b"data"]).all()


def test_a_pickle_by_python_2_and_old_numpy_is_read(tmp_path: Path) -> None:
    # the official files have bytes as text, and numpy.core without an underscore
    raw = pixels(1, 3072).tobytes()
    stream = (
        b"\x80\x02}(U\x04datacnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        b"(K\x01K\x01M\x00\x0c\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R"
        b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T"
        + struct.pack("<I", 3072)
        + raw
        + b"tb"
        b"U\x0bfine_labels]K\x07au."
    )
    images, labels = write_cifar(tmp_path, Cifar100, {"test": stream}, archive=False)._official(
        "test"
    )
    assert images.numpy().tobytes() == raw and labels.tolist() == [7]


class Bomb:
    """Runs a command when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("archive", [True, False], ids=["tar.gz", "folder"])
def test_a_poisoned_pickle_is_refused_and_runs_nothing(tmp_path: Path, archive: bool) -> None:
    trap = tmp_path / "trap"
    poisoned = pickle.dumps(batches(Cifar100)["test"] | {b"x": Bomb(trap)}, 2)
    data = write_cifar(tmp_path, Cifar100, {"test": poisoned}, archive=archive)
    with pytest.raises(
        ConfigError, match=r"/test: not a pickle of arrays.*: it asks for .*could run code"
    ):
        data.load_test()
    assert not trap.exists()
    pickle.loads(poisoned)
    assert trap.exists(), "the bomb is a real one"


@pytest.mark.parametrize(
    "name",
    [b"os\nsystem", b"builtins\neval", b"__builtin__\neval", b"numpy\nload", b"numpy\nndarray.tofile", b"numpy.core.multiarray\nfromfile", b"copyreg\n_reconstructor", b"_codecs\ndecode", b"tfkd_ray.settings.files\n_encode"],
)  # fmt: skip
def test_a_pickle_may_name_nothing_but_arrays(tmp_path: Path, name: bytes) -> None:
    data = write_cifar(tmp_path, Cifar100, {"test": b"c" + name + b"\n(S'1'\ntR."}, archive=False)
    with pytest.raises(
        ConfigError,
        match=f"it asks for {name.decode().replace(chr(10), '.')}, which could run code",
    ):
        data.load_test()


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({b"data": None}, "b'data' must be an array of uint8, 3072 for each image"),
        ({b"data": np.zeros((40, 3072), np.float32)}, "b'data' must be an array of uint8, 3072 for each image"),
        ({b"data": np.zeros((40, 3071), np.uint8)}, "b'data' must be an array of uint8, 3072 for each image"),
        ({b"data": np.zeros((40, 3072), object)}, "b'data' must be an array of uint8, 3072 for each image"),
        ({b"data": np.zeros((39, 3072), np.uint8)}, "40 labels for 39 images"),
        ({b"fine_labels": [0.5] * 40}, "b'fine_labels' must be a list of whole numbers"),
        ({b"fine_labels": [2**70] * 40}, "b'fine_labels' must be a list of whole numbers"),
        ({b"fine_labels": [0] * 39 + [100]}, "label 100 at 39 is outside 0..99"),
        ({b"fine_labels": [-1] * 40}, "label -1 at 0 is outside 0..99"),
    ],
)  # fmt: skip
def test_a_wrong_batch_gets_a_sentence(
    tmp_path: Path, change: dict[bytes, Any], sentence: str
) -> None:
    files = {"test": pickle.dumps(batches(Cifar100)["test"] | change, 2)}
    with pytest.raises(ConfigError) as error:
        write_cifar(tmp_path, Cifar100, files, archive=False).load_test()
    assert error.value.problems == [f"data cifar100: {tmp_path}/cifar-100-python/test: {sentence}"]


@pytest.mark.parametrize(
    "raw",
    [b"", b"text", pickle.dumps([1]), pickle.dumps({b"data": 1}), pickled(Cifar100)["test"][:-99]],
    ids=["empty", "text", "a list", "one entry", "cut short"],
)
def test_a_file_that_is_no_batch_gets_a_sentence(tmp_path: Path, raw: bytes) -> None:
    with pytest.raises(
        ConfigError,
        match=r"/test: (not a pickle of arrays|needs the keys b'data' and b'fine_labels')",
    ):
        write_cifar(tmp_path, Cifar100, {"test": raw}, archive=False).load_test()


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE]
)
@pytest.mark.parametrize("target", ["/etc/passwd", "meta", "nowhere"])
def test_an_archive_with_something_else_for_a_file_gets_a_sentence(
    tmp_path: Path, kind: bytes, target: str
) -> None:
    with tarfile.open(tmp_path / Cifar100.archive, "w:gz") as tar:
        member = tarfile.TarInfo(f"{Cifar100.folder}/test")
        member.type, member.linkname = kind, target
        tar.addfile(member)
    with pytest.raises(
        ConfigError, match=r"cifar-100-python.tar.gz: cifar-100-python/test is no file .*; "
    ):
        Cifar100(root=tmp_path, check_md5=False)._official("test")


def header(name: bytes, size: int | bytes, kind: bytes) -> bytes:
    """Return a member's header in a tar file, whatever the size is."""
    size = b"%011o\0" % size if isinstance(size, int) else size.rjust(12, b"\xff")
    made = name.ljust(100, b"\0") + b"0000644\0" + b"0000000\0" * 2 + size + b"00000000000\0"
    made = (made + b" " * 8 + kind).ljust(257, b"\0") + b"ustar\x0000"
    made = made.ljust(512, b"\0")
    return made[:148] + b"%06o\0 " % sum(made) + made[156:]


def pax(text: bytes) -> bytes:
    """Return an extended header with one line of text, and a member behind it."""
    line = b"%d %s\n" % (len(text) + 4 + (len(text) > 95), text)
    return header(b"pax", len(line), b"x") + line.ljust(512, b"\0") + header(b"x", 0, b"0")


@pytest.mark.parametrize(
    "made, sentence",
    [
        (pax(b"GNU.sparse.size=abc"), "cannot be read: invalid literal"),
        (pax(b"GNU.sparse.map=a,b"), "cannot be read: invalid literal"),
        (header(b"x", b"\xfe\x00", b"x"), "cannot be read: a header claims a size of -"),
        (header(b"x", b"\x80" + b"\x7f" * 11, b"x"), "cannot be read: a header claims a size of 15"),
        (header(b"x", 2**32, b"L"), "cannot be read: a header claims a size of 4294967296 bytes"),
        (header(b"x", 0, b"x") * 5000, "cannot be read: maximum recursion"),
        (header(b"big", 2**33 - 1, b"0"), "big is larger than any file of CIFAR"),
        (header(b"small", 0, b"0") * 10_001, "more than 10000 files in it"),
    ],
    ids=["sparse size", "sparse map", "negative", "huge", "long name", "nested", "bomb", "many"],
)  # fmt: skip
def test_an_archive_whose_headers_claim_what_is_not_there_gets_a_sentence(
    tmp_path: Path, made: bytes, sentence: str
) -> None:
    path = tmp_path / Cifar100.archive
    path.write_bytes(gzip.compress(made + bytes(1024)))
    with pytest.raises(ConfigError) as error:
        Cifar100(root=tmp_path, check_md5=False)._official("test")
    assert f"{path}: {sentence}" in str(error.value), error.value
    assert Cifar100.origin in str(error.value)


def test_an_archive_with_another_md5_is_refused_unless_told_otherwise(tmp_path: Path) -> None:
    write_cifar(tmp_path, Cifar10, pickled(Cifar10), archive=True)
    path = tmp_path / Cifar10.archive
    md5 = hashlib.md5(path.read_bytes()).hexdigest()
    with pytest.raises(ConfigError) as error:
        Cifar10(root=tmp_path).load()
    expected = f"its md5 is {md5}, and the official archive's is c58f30108f718f92721af3b95e74349a; {Cifar10.origin}"
    assert error.value.problems == [f"data cifar10: {path}: {expected}, or set check_md5: false"]


@pytest.mark.parametrize(
    "archive, prefix", [(True, "cifar-10-batches-py/"), (False, "")], ids=["tar.gz", "folder"]
)
def test_a_missing_batch_is_named(tmp_path: Path, archive: bool, prefix: str) -> None:
    files = pickled(Cifar10)
    del files["data_batch_2"], files["data_batch_5"]
    with pytest.raises(
        ConfigError, match=f": lacks {prefix}data_batch_2, {prefix}data_batch_5; get https"
    ):
        write_cifar(tmp_path, Cifar10, files, archive=archive).load()


def test_a_broken_archive_gets_a_sentence(tmp_path: Path) -> None:
    data = write_cifar(tmp_path, Cifar100, pickled(Cifar100), archive=True)
    path = tmp_path / Cifar100.archive
    whole = path.read_bytes()
    for broken in (whole[: len(whole) // 2], b"text", b"", whole[:100] + bytes(100) + whole[200:]):
        path.write_bytes(broken)
        with pytest.raises(
            ConfigError, match=r"cifar-100-python.tar.gz: (cannot be read: .*|lacks .*); get https"
        ):
            data.load_test()


def test_an_archive_is_unpacked_once(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_cifar(tmp_path, Cifar100, pickled(Cifar100), archive=True)
    images, labels = data._official("train")
    path = tmp_path / Cifar100.archive
    assert len(list(cache.iterdir())) == 1
    facts = path.stat()
    path.write_bytes(bytes(facts.st_size))
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    again = data._official("train")
    assert images.equal(again[0]) and labels.equal(again[1]), "from the cache"
    with pytest.raises(
        ConfigError, match="its md5 is"
    ):  # a cache of unchecked files is not reused for checked ones
        Cifar100(root=tmp_path).load()
    os.utime(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        data._official("train")


# --- Tiny ImageNet ---------------------------------------------------------------------------------------------

WNIDS = [f"n{k:08}" for k in range(200)]


@functools.cache
def jpeg(seed: int, side: int = 64, mode: str = "RGB") -> bytes:
    image = Image.fromarray(pixels(seed + 1, 4, 4, 3)[seed]).resize(
        (side, side), Image.Resampling.BICUBIC
    )
    image.convert(mode).save(raw := io.BytesIO(), "JPEG")
    return raw.getvalue()


def write_tiny(root: Path) -> Path:
    """Write two train images a class, one of them grey, and 9 for val; wnids.txt is unsorted."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "wnids.txt").write_text("\n".join(reversed(WNIDS)) + "\n")
    for k, wnid in enumerate(WNIDS):
        folder = root / "train" / wnid / "images"
        folder.mkdir(parents=True)
        for i in range(2):
            (folder / f"{wnid}_{i}.JPEG").write_bytes(
                jpeg(k % 9 + i, mode="L" if k == 0 and i else "RGB")
            )
    (root / "val/images").mkdir(parents=True)
    for i in range(9):
        (root / f"val/images/val_{i}.JPEG").write_bytes(jpeg(i))
    lines = [f"val_{i}.JPEG\t{WNIDS[20 * i]}\t0\t32\t44\t62" for i in reversed(range(9))]
    (root / "val/val_annotations.txt").write_text("\n".join(lines))
    return root


def decoded(raw: bytes) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(io.BytesIO(raw)).convert("RGB")).transpose(2, 0, 1)


@pytest.mark.parametrize("below", ["", "tiny-imagenet-200"])
def test_tiny_imagenet_is_read_to_the_pixel(tmp_path: Path, below: str) -> None:
    write_tiny(tmp_path / below)
    data = TinyImagenet(root=tmp_path, val_fraction=0.5)
    data.check()
    images, labels = data._official("train")
    assert images.shape == (400, 3, 64, 64) and images.dtype == torch.uint8
    assert labels.tolist() == [k for k in range(200) for _ in range(2)]
    assert (images[1].numpy() == decoded(jpeg(1, mode="L"))).all() and images[1, 0].equal(
        images[1, 2]
    )
    assert all(
        (images[2 * k + i].numpy() == decoded(jpeg(k % 9 + i))).all()
        for k in range(1, 200)
        for i in range(2)
    )
    test = data.load_test()
    assert test.labels.tolist() == [20 * i for i in range(9)]
    assert all(
        (next(test.read([torch.tensor([i])]))[0].numpy() == decoded(jpeg(i))).all()
        for i in range(9)
    )


@pytest.mark.slow
def test_decoded_images_are_kept_until_a_file_changes(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = TinyImagenet(root=write_tiny(tmp_path / "tiny"))
    images, labels = data._official("train")
    [kept] = cache.iterdir()
    path = tmp_path / "tiny/train/n00000005/images/n00000005_0.JPEG"
    facts = path.stat()
    path.write_bytes(bytes(facts.st_size))
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    again = data._official("train")
    assert images.equal(again[0]) and labels.equal(again[1]), "from the cache"
    path.write_bytes(jpeg(3))
    changed, _ = data._official("train")
    assert not images.equal(changed) and list(cache.iterdir()) == [kept], (
        "one file, of what is there now"
    )
    half = kept.read_bytes()[:1000]
    kept.unlink()  # it is mapped
    kept.write_bytes(half)
    assert data._official("train")[0].equal(changed), "a broken cache is made anew"
    assert data._official("train")[0].equal(changed) and kept.stat().st_size > 400 * 3 * 64 * 64
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert data._official("train")[0].equal(changed), "no cache can be written there"


def test_labels_of_decoded_images_follow_their_lists(tmp_path: Path, cache: Path) -> None:
    data = TinyImagenet(root=write_tiny(tmp_path / "tiny"))
    assert data.load_test().labels.tolist() == [20 * i for i in range(9)]
    path = tmp_path / "tiny/val/val_annotations.txt"
    path.write_text(
        path.read_text().replace(f"val_3.JPEG\t{WNIDS[60]}", f"val_3.JPEG\t{WNIDS[61]}")
    )
    assert data.load_test().labels[3] == 61, "of the same image files"
    path = tmp_path / "tiny/wnids.txt"
    path.write_text(path.read_text().replace(WNIDS[199], "n99999999"))
    (tmp_path / "tiny/train" / WNIDS[199]).rename(tmp_path / "tiny/train/n99999999")
    assert len(data._official("train")[1]) == 400


def test_wrong_files_of_tiny_imagenet_get_a_sentence(tmp_path: Path, cache: Path) -> None:
    data = TinyImagenet(root=write_tiny(tmp_path))
    path = tmp_path / "train/n00000005/images/n00000005_0.JPEG"
    for raw, sentence in (
        (jpeg(0, side=32), "is 32x32, and all images are 64x64"),
        (jpeg(0)[:200], r"cannot be read as an image: .*; replace or remove it"),
        (b"", r"cannot be read as an image: .*; replace or remove it"),
    ):
        path.write_bytes(raw)
        with pytest.raises(ConfigError, match=f"^data tiny_imagenet: {path}: {sentence}"):
            data.load()
    assert not cache.exists(), "nothing is kept of what is wrong"
    path.unlink()
    (path.parent / "n00000005_1.JPEG").unlink()
    with pytest.raises(
        ConfigError, match=r"/n00000005/images: there is no image .*; get and unpack http"
    ):
        data.load()
    notes = tmp_path / "val/val_annotations.txt"
    for line, sentence in (
        (
            "val_0.JPEG\tn77",
            "line 1: needs an image and a class of wnids.txt, got 'val_0.JPEG.tn77'",
        ),
        ("val_99.JPEG\tn00000000\t0", "line 1: val_99.JPEG is not in val/images"),
        ("", "is empty"),
    ):
        notes.write_text(line)
        with pytest.raises(
            ConfigError, match=f"val_annotations.txt: {sentence.replace('.tn77', '..?tn77')}"
        ):
            data.load_test()
    (tmp_path / "wnids.txt").write_text("n00000000")
    with pytest.raises(ConfigError, match=r"wnids.txt: names 1 classes, not 200"):
        data.load()
    notes.unlink()
    with pytest.raises(
        ConfigError,
        match=r"not found: wnids.txt, train, .*, all in one folder .looked in .*; get and unpack .*data.root",
    ):
        data.check()


def test_tiny_imagenet_has_the_papers_recipe() -> None:
    config = validated(TrainConfig, {"objective": "ce", "student": "cnn", "data": "tiny_imagenet"})
    assert (
        config.schedule.gamma == 0.1 and config.epochs == 200 and config.optim.weight_decay == 5e-4
    )  # type: ignore[union-attr]
    assert (
        config.augment.rotation_degrees == 20
        and config.augment.flip
        and not config.augment.crop_padding
    )


# --- one's own -------------------------------------------------------------------------------------------------

MODULE = """
import numpy as np, torch

calls = []

def make(split, n=20, offset=0):
    calls.append(split)
    r = np.random.default_rng(split == "test")
    return r.integers(0, 256, (n, 3, 8, 6), dtype=np.uint8), torch.arange(n) % 4 + offset

def give(split, what):
    images, labels = make(split)
    return eval(what)

def sized(split):
    return np.zeros((20, 1, 8, 6), np.uint8), np.arange(20) % 4

table = {}
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Yield a module in the working directory, which is not on Python's path."""
    name = f"mine_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    (tmp_path / f"{name}_broken.py").write_text("import numpy\nnumpy.nothing")
    (tmp_path / f"{name}_needy.py").write_text("import not_there_either")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(tmp_path))])
    yield name
    for module in [m for m in sys.modules if m.startswith(name)]:
        del sys.modules[module]


def own(path: str, **settings: Any) -> OwnData:
    tree = {"name": "own", "path": path, "shape": [3, 8, 6], "num_classes": 4, **settings}
    data = validated(TrainConfig, {"objective": "ce", "data": tree, "epochs": 1}).data
    assert isinstance(data, OwnData)
    return data


def test_data_of_ones_own_are_trained_on(mine: str) -> None:
    data = own(f"{mine}:make", args={"n": 40}, val_fraction=0.25)
    data.check()
    module = sys.modules[mine]
    assert module.calls == [], "check does not call it"
    [epoch] = train(TrainConfig(objective="ce", data=data, epochs=1))  # type: ignore[arg-type]
    assert 0 <= epoch.metrics["val_accuracy"] <= 1
    images, _ = module.make("train", 40)
    assert np.allclose(data.statistics()[0], images.mean((0, 2, 3))) and np.allclose(
        data.statistics()[1], images.std((0, 2, 3))
    )
    assert module.calls == ["train", "train"], "once by us, once by this test"
    assert len(data.load_test()) == 40 and module.calls[-1] == "test"
    given = own(f"{mine}:make", mean=[1, 2, 3], std=[4, 5, 6])
    assert given.statistics() == ((1, 2, 3), (4, 5, 6))
    text = dump_yaml({"objective": {"name": "ce"}, "data": data.model_dump(mode="json")})
    assert validated(TrainConfig, parse_yaml(text, "f")).data == data


@pytest.mark.parametrize(
    "what, sentence",
    [
        ("images", "must return (images, labels), got ndarray of uint8 [20, 3, 8, 6]"),
        ("None", "must return (images, labels), got None"),
        ("(images, labels, 1)", "must return (images, labels), got tuple of 3"),
        ("(images / 255, labels)", "images must be a uint8 tensor or array [N, C, H, W], got ndarray of float64 [20, 3, 8, 6]"),
        ("(torch.tensor(images).float(), labels)", "images must be a uint8 tensor or array [N, C, H, W], got Tensor of float32 [20, 3, 8, 6]"),
        ("(images[0], labels)", "images must be a uint8 tensor or array [N, C, H, W], got ndarray of uint8 [3, 8, 6]"),
        ("('x', labels)", "images must be a uint8 tensor or array [N, C, H, W], got 'x'"),
        ("(images.transpose(0, 2, 3, 1), labels)", "images are 8 x 6 x 3, and data.shape says 3 x 8 x 6"),
        ("(images, labels / 2)", "labels must be whole numbers [N], got Tensor of float32 [20]"),
        ("(images, labels > 1)", "labels must be whole numbers [N], got Tensor of bool [20]"),
        ("(images, labels[:, None])", "labels must be whole numbers [N], got Tensor of int64 [20, 1]"),
        ("(images, ['cat'] * 20)", "labels must be whole numbers [N], got list of 20"),
        ("(images, labels[:19])", "19 labels for 20 images"),
        ("(images[:0], labels[:0])", "0 labels for 0 images"),
        ("(images, labels + 1)", "label 4 at 3 is outside 0..3 (data.num_classes is 4)"),
        ("(images, labels - 1)", "label -1 at 0 is outside 0..3 (data.num_classes is 4)"),
    ],
)  # fmt: skip
def test_what_ones_own_function_returns_is_checked(mine: str, what: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as error:
        own(f"{mine}:give", args={"what": what}).load()
    assert error.value.problems == [f"data own: {mine}:give, called for 'train': {sentence}"]


@pytest.mark.parametrize(
    "what, sentence",
    [
        ("None if split == 'test' else (images, labels)", "must return (images, labels), got None"),
        ("(images, labels + (split == 'test'))", "label 4 at 3 is outside 0..3 (data.num_classes is 4)"),
        ("(images, labels[: -1 if split == 'test' else None])", "19 labels for 20 images"),
        ("(images[: 0 if split == 'test' else None], labels)", "20 labels for 0 images"),
        ("open('test.npy') if split == 'test' else (images, labels)", "ends in FileNotFoundError: [Errno 2] No such file or directory: 'test.npy'"),
    ],
)  # fmt: skip
def test_what_ones_own_function_returns_as_test_split_is_checked_before_a_comparison(
    mine: str, what: str, sentence: str
) -> None:
    data = own(f"{mine}:give", args={"what": what})
    data.load()
    with pytest.raises(ConfigError) as error:
        data.examine()
    assert error.value.problems == [f"data own: {mine}:give, called for 'test': {sentence}"]


@pytest.mark.parametrize(
    "what", ["(torch.tensor(images), labels.tolist())", "[images[:, :, ::-1], labels.numpy().astype('uint8')]", "(np.broadcast_to(images[:1], images.shape), labels.int())"]
)  # fmt: skip
def test_tensors_arrays_and_lists_will_do(mine: str, what: str) -> None:
    images, labels = own(f"{mine}:give", args={"what": what})._official("train")
    assert images.dtype == torch.uint8 and images.shape == (20, 3, 8, 6) and images.is_contiguous()
    assert labels.dtype == torch.int64 and labels.tolist() == [i % 4 for i in range(20)]


@pytest.mark.parametrize(
    "path, sentence",
    [
        ("MINE.make", "data.path: must be 'package.module:name', got 'MINE.make'"),
        ("MINE.py:make", "data.path: MINE.py:make: there is no module 'MINE.py' (searched in CWD and on Python's path)"),
        ("not_there:make", "data.path: not_there:make: there is no module 'not_there' (searched in CWD and on Python's path)"),
        ("MINE:mkae", "data.path: MINE:mkae: MINE has no 'mkae'; did you mean 'make'?"),
        ("MINE_broken:f", "data.path: MINE_broken:f: importing MINE_broken ends in AttributeError: module 'numpy' has no attribute 'nothing'"),
        ("MINE_needy:f", "data.path: MINE_needy:f: importing MINE_needy ends in ModuleNotFoundError: No module named 'not_there_either'"),
        ("MINE:table", "data.path: MINE:table is {}, not a function"),
        ("MINE:give", "data.path: MINE:give cannot be called as function('train'): missing a required argument: 'what'; see data.args"),
    ],
)  # fmt: skip
def test_a_function_that_is_not_there_gets_a_sentence(mine: str, path: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as error:
        own(path.replace("MINE", mine)).check()
    assert error.value.problems == [sentence.replace("MINE", mine).replace("CWD", str(Path.cwd()))]


def test_an_import_path_leads_to_any_object(mine: str) -> None:
    assert imported("os.path:join", "x") is os.path.join
    assert imported(f"{mine}:table", "x") is sys.modules[mine].table


def test_ones_own_constant_channel_cannot_be_normalised(mine: str) -> None:
    with pytest.raises(
        ConfigError, match="data own: channel 0 has one value in all images; leave it out"
    ):
        own(f"{mine}:sized", shape=[1, 8, 6]).statistics()


@pytest.mark.parametrize(
    "settings, sentence",
    [
        ({"mean": [1, 2, 3]}, "mean and std: give both, or neither and they are measured"),
        ({"mean": [1, 2], "std": [1, 2, 3]}, "mean: 2 values for 3 channels, see shape"),
        ({"num_classes": 1}, "num_classes: should be at least 2, got 1"),
        ({"shape": [8, 6]}, "shape"),
        ({"args": {"f": object()}}, "args.f"),
    ],
)  # fmt: skip
def test_wrong_settings_of_ones_own_data_get_a_sentence(
    settings: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ConfigError, match=r"^data\.own") as error:
        own("os:getcwd", **settings)
    assert sentence in str(error.value)


# --- downloads -------------------------------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Path]]:
    """Yield (address, folder) of a server on this machine."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            pass

    monkeypatch.setenv("no_proxy", "*")
    folder = tmp_path / "served"
    folder.mkdir()
    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=folder)
    ) as found:
        thread = threading.Thread(target=found.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{found.server_port}", folder
        found.shutdown()
        thread.join()


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def zipped(folder: Path, path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*")):
            archive.write(file, f"{folder.name}/{file.relative_to(folder)}")


def drawing(seed: int) -> np.ndarray[Any, Any]:
    """Return bool [105, 105], True where the paper is white."""
    return np.random.default_rng(seed).random((105, 105)) > 0.2


def png(pixels: np.ndarray[Any, Any]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def write_drawings(root: Path, name: str, alphabets: list[str]) -> Path:
    """Write some alphabets of an official set; a drawing depends on its alphabet and place alone."""
    for alphabet in alphabets:
        first = 1000 * sorted(CHARACTERS).index(alphabet)
        for character in range(1, CHARACTERS[alphabet] + 1):
            folder = root / name / alphabet / f"character{character:02}"
            folder.mkdir(parents=True)
            for drawer in range(1, 21):
                content = png(drawing(first + 20 * character + drawer))
                (folder / f"{character:04}_{drawer:02}.png").write_bytes(content)
    return root / name


@pytest.fixture
def served(
    server: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], FileDataset]:
    """Return a function that makes a data set with official files on that server and a new root."""
    url, folder = server
    root = tmp_path / "new/root"

    def make(name: str) -> FileDataset:
        kind, data = DATA_SETS[name], DATA_SETS[name](root=root)
        if kind in IDX:
            write_idx(folder, gz=True, kind=kind)
            stems = [*data._files("train"), *data._files("test")]
            monkeypatch.setattr(type(data), "url", url)
            monkeypatch.setattr(
                type(data), "md5s", tuple(md5(folder / f"{stem}.gz") for stem in stems)
            )
        elif name == "emnist":
            data = Emnist(root=root, variant="mnist")
            write_emnist(tmp_path / "gzip", "mnist", np.arange(130) % 10)
            zipped(tmp_path / "gzip", folder / "gzip.zip")
            monkeypatch.setattr(Emnist, "url", f"{url}/gzip.zip")
            monkeypatch.setattr(Emnist, "md5s", (md5(folder / "gzip.zip"),))
        elif name == "omniglot":
            write_drawings(tmp_path, "images_background_small2", ["Tagalog"])
            zipped(tmp_path / "images_background_small2", folder / "images_background_small2.zip")
            checksum = hashlib.sha256((folder / "images_background_small2.zip").read_bytes())
            data = Omniglot(root=root, sets=("images_background_small2",), alphabets=("Tagalog",))
            monkeypatch.setattr(Omniglot, "url", url)
            monkeypatch.setitem(CHECKSUMS, "images_background_small2", checksum.hexdigest())
        elif name == "tiny_imagenet":
            zipped(write_tiny(tmp_path / "tiny-imagenet-200"), folder / "tiny.zip")
            monkeypatch.setattr(TinyImagenet, "url", f"{url}/tiny.zip")
            monkeypatch.setattr(TinyImagenet, "md5", md5(folder / "tiny.zip"))
        else:
            assert issubclass(kind, CifarDataset), f"write here what the server has of {name}"
            write_cifar(folder, kind, pickled(kind), archive=True)
            monkeypatch.setattr(kind, "url", f"{url}/{kind.archive}")
            monkeypatch.setattr(kind, "md5", md5(folder / kind.archive))
        return data

    return make


DOWNLOADED = [name for name, kind in DATA_SETS.items() if getattr(kind, "url", "")]


@pytest.mark.parametrize("name", DOWNLOADED)
@pytest.mark.slow
def test_a_data_set_is_downloaded_once(
    served: Callable[[str], FileDataset], server: tuple[str, Path], name: str
) -> None:
    data = served(name)
    data.download()
    data.check()
    data.load_test()
    left = [
        path.name
        for path in data.root.rglob("*")
        if path.suffix in (".part", ".zip") or path.name.startswith("tmp")
    ]
    if name == "omniglot":  # is read as a zip
        left.remove("images_background_small2.zip")
    assert not left
    for path in server[1].iterdir():
        path.unlink()
    data.download()


@pytest.mark.parametrize("name", DOWNLOADED)
def test_nothing_is_kept_of_a_download_of_another_md5(
    served: Callable[[str], FileDataset], server: tuple[str, Path], name: str
) -> None:
    data = served(name)
    for path in server[1].iterdir():
        path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(
        ConfigError,
        match=rf"^data {name}: http\S* has the (md5|sha256) \w+, and the official file's is \w+; the download was discarded; try again, or ",
    ):
        data.download()
    assert not list(data.root.iterdir())


@pytest.mark.parametrize("name", DOWNLOADED)
def test_a_download_that_fails_says_so_and_leaves_nothing(
    served: Callable[[str], FileDataset],
    server: tuple[str, Path],
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = served(name)
    for path in server[1].iterdir():
        path.unlink()
    with pytest.raises(
        ConfigError,
        match=rf"^data {name}: http\S* cannot be fetched to /.*: HTTP Error 404.*; .*, or set data.root",
    ):
        data.download()
    assert not list(data.root.iterdir())
    monkeypatch.setattr(type(data), "url", "http://127.0.0.1:1")  # nobody listens there
    with pytest.raises(ConfigError, match=r"cannot be fetched to .*Connection refused"):
        data.download()
    assert not list(data.root.iterdir())


def test_a_place_that_cannot_be_written_is_named(
    served: Callable[[str], FileDataset], tmp_path: Path
) -> None:
    data = served("mnist")
    (tmp_path / "new").write_text("a file")
    with pytest.raises(
        ConfigError, match=r"cannot be fetched to /.*Not a directory.*, or set data.root"
    ):
        data.download()


def test_only_files_that_are_missing_are_downloaded(
    served: Callable[[str], FileDataset], server: tuple[str, Path]
) -> None:
    data = served("mnist")
    data.download()
    (data.root / f"{IMAGES}.gz").unlink()
    for path in server[1].iterdir():
        if path.name != f"{IMAGES}.gz":
            path.unlink()
    data.download()
    data.check()


def test_a_folder_that_is_not_complete_is_not_overwritten(
    served: Callable[[str], FileDataset],
) -> None:
    data = served("tiny_imagenet")
    (data.root / "tiny-imagenet-200").mkdir(parents=True)
    with pytest.raises(ConfigError, match="tiny-imagenet-200: is incomplete; remove it"):
        data.download()


def test_what_is_not_for_download_says_how_to_get_it() -> None:
    with pytest.raises(
        ConfigError,
        match=r"^data digits: not for download; it comes with scikit-learn: pip install scikit-learn$",
    ):
        Digits().download()
    with pytest.raises(
        ConfigError, match=r"^data own: not for download; the function at data.path makes it"
    ):
        own("os:getcwd").download()


# --- as settings -----------------------------------------------------------------------------------------------

BY_NAME = [
    name
    for name, kind in DATA_SETS.items()
    if not any(field.is_required() for field in kind.model_fields.values())
]
"""Data sets of which the name says all."""


@pytest.mark.parametrize("name", BY_NAME)
def test_a_data_set_is_picked_by_name_and_survives_yaml(name: str) -> None:
    kind = DATA_SETS[name]
    data = validated(TrainConfig, {"objective": "ce", "student": "cnn", "data": name}).data
    assert data == kind()
    if data.mean is None:  # they are measured
        assert data.std is None
    else:
        assert len(data.mean) == len(data.std) == data.shape[0]
    text = dump_yaml({"objective": {"name": "ce"}, "data": data.model_dump(mode="json")})
    assert validated(TrainConfig, parse_yaml(text, "f")).data == data


def test_root_is_kept_as_a_path_that_holds_in_any_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = validated(
        TrainConfig, {"objective": "ce", "data": {"name": "mnist", "root": "here"}}
    ).data
    assert isinstance(data, Mnist) and data.root == tmp_path / "here"
    assert data.model_dump(mode="json")["root"] == str(tmp_path / "here")
    assert Mnist().root == Path("~/datasets/mnist"), "each machine has a home of its own"
    monkeypatch.setenv("HOME", str(tmp_path))
    write_idx(tmp_path / "datasets/mnist")
    Mnist().check()


def test_a_data_set_with_one_image_a_class_cannot_be_held_out(tmp_path: Path) -> None:
    data = write_cifar(tmp_path, Cifar100, pickled(Cifar100), archive=True)
    with pytest.raises(
        ConfigError,
        match=r"val_fraction: no class has two images, so none can be held out; got 0.2",
    ):
        data.load()
    assert data.model_copy(update={"val_fraction": 0.0}).load()[1] is None
