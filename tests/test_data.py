"""Data: real digits, splits that leak nothing, randomness by address."""

import gzip
import hashlib
import io
import pickle
import struct
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tfkd_ray.config import TrainConfig
from tfkd_ray.data import (
    Cifar10,
    Cifar100,
    CifarDataset,
    Digits,
    FashionMnist,
    IdxDataset,
    Kmnist,
    Mnist,
    address,
    generator,
    stratified,
)
from tfkd_ray.schema import ConfigError, dump_yaml, parse_yaml, validated


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


# --- IDX -------------------------------------------------------------------------------------------------------

IDX = [Mnist, FashionMnist, Kmnist]
IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


def idx(array: np.ndarray[Any, Any]) -> bytes:
    """An array of uint8 in LeCun's format."""
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def pixels(n: int, *shape: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(n).integers(0, 256, (n, *shape), dtype=np.uint8)


def write_idx(folder: Path, *, gz: bool = False) -> None:
    """40 train and 20 test images, the classes in turn."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, n in (("train", 40), ("t10k", 20)):
        for stem, array in (
            ("images-idx3-ubyte", pixels(n, 28, 28)),
            ("labels-idx1-ubyte", np.arange(n, dtype=np.uint8) % 10),
        ):
            raw = idx(array)
            (folder / f"{split}-{stem}{'.gz' * gz}").write_bytes(gzip.compress(raw, 1) if gz else raw)


@pytest.mark.parametrize("gz", [False, True], ids=["raw", "gz"])
@pytest.mark.parametrize("kind", IDX)
def test_idx_files_are_read_to_the_pixel(tmp_path: Path, kind: type[IdxDataset], gz: bool) -> None:
    write_idx(tmp_path, gz=gz)
    data = kind(root=tmp_path)  # type: ignore[call-arg]
    data.check()
    for split, n in (("train", 40), ("test", 20)):
        images, labels = data._official(split)  # type: ignore[arg-type]
        assert images.dtype == torch.uint8 and images.shape == (n, *kind.shape)
        assert (images.numpy()[:, 0] == pixels(n, 28, 28)).all() and labels.tolist() == [i % 10 for i in range(n)]
    train, val = data.load()
    assert val.labels.bincount().tolist() == [1] * 10 and train.labels.bincount().tolist() == [3] * 10
    assert len(data.load_test()) == 20


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


@pytest.mark.parametrize("spoil", [cut(300), lambda _: b"no gzip", lambda raw: raw[:50] + bytes(50) + raw[100:]])
def test_a_broken_gzip_gets_a_sentence(tmp_path: Path, spoil: Callable[[bytes], bytes]) -> None:
    write_idx(tmp_path, gz=True)
    path = tmp_path / f"{IMAGES}.gz"
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(ConfigError, match=r"images-idx3-ubyte.gz: cannot be read: .*; get it again"):
        Mnist(root=tmp_path).load()


@pytest.mark.parametrize("kind", [*IDX, Cifar10, Cifar100])
def test_missing_files_say_where_they_were_looked_for_and_how_to_get_them(
    tmp_path: Path, kind: type[IdxDataset] | type[CifarDataset]
) -> None:
    data = kind(root=tmp_path)  # type: ignore[call-arg]
    for look in (data.check, data.load, data.load_test):
        with pytest.raises(ConfigError) as error:
            look()
        text = str(error.value)
        assert text.startswith(f"data {data.name}: not found: ") and f"(looked in {tmp_path}" in text
        assert kind.origin in text and text.endswith(", or set data.root")


def test_every_missing_file_is_named_at_once(tmp_path: Path) -> None:
    write_idx(tmp_path)
    (tmp_path / IMAGES).unlink()
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(ConfigError, match=f"not found: {IMAGES}, t10k-labels-idx1-ubyte, raw or with .gz"):
        Mnist(root=tmp_path).check()


def test_the_real_fashion_mnist() -> None:
    data = FashionMnist()
    if not data.root.is_dir():
        pytest.skip(f"{data.root} is not there: apt-get install dataset-fashion-mnist")
    images, labels = data._official("train")
    assert images.shape == (60_000, 1, 28, 28) and labels.bincount().tolist() == [6_000] * 10
    values = images.double()
    assert values.mean().item() / 255 == pytest.approx(data.mean[0] / 255, abs=5e-5)
    assert values.std().item() / 255 == pytest.approx(data.std[0] / 255, abs=5e-5)
    assert len(data.load_test()) == 10_000
    assert data.load()[1].labels.bincount().tolist() == [1_200] * 10


# --- CIFAR -----------------------------------------------------------------------------------------------------


def batches(kind: type[CifarDataset]) -> dict[str, dict[bytes, Any]]:
    """By file name: 40 images a batch, the classes in turn, as the official pickles hold them."""
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


def write_cifar(root: Path, kind: type[CifarDataset], files: dict[str, bytes], *, archive: bool) -> CifarDataset:
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
def test_cifar_is_read_to_the_pixel(tmp_path: Path, kind: type[CifarDataset], archive: bool) -> None:
    data = write_cifar(tmp_path, kind, pickled(kind), archive=archive)
    before = sorted(tmp_path.rglob("*"))
    data.check()
    for split in ("train", "test"):
        images, labels = data._official(split)  # type: ignore[arg-type]
        theirs = [batches(kind)[name] for name in kind.batches[split]]  # type: ignore[index]
        assert images.dtype == torch.uint8 and labels.dtype == torch.int64
        assert (images.numpy() == np.concatenate([b[b"data"] for b in theirs]).reshape(-1, 3, 32, 32)).all()
        assert labels.tolist() == [label for b in theirs for label in b[kind.labels_key]]
    assert sorted(tmp_path.rglob("*")) == before, "nothing is extracted"


def test_the_cifar_splits_are_stratified(tmp_path: Path) -> None:
    train, val = write_cifar(tmp_path, Cifar10, pickled(Cifar10), archive=False).load()
    assert val.labels.bincount().tolist() == [4] * 10 and train.labels.bincount().tolist() == [16] * 10


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL))
def test_pickles_of_any_protocol_and_memory_order_are_read(tmp_path: Path, protocol: int) -> None:
    batch = batches(Cifar100)["test"]
    files = {"test": pickle.dumps(batch | {b"data": np.asfortranarray(batch[b"data"])}, protocol)}
    images, _ = write_cifar(tmp_path, Cifar100, files, archive=False)._official("test")
    assert (images.numpy().reshape(40, 3072) == batch[b"data"]).all()


def test_a_pickle_by_python_2_and_old_numpy_is_read(tmp_path: Path) -> None:
    # what the official files look like: text is bytes, and numpy.core has no underscore
    raw = pixels(1, 3072).tobytes()
    stream = (
        b"\x80\x02}(U\x04datacnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        b"(K\x01K\x01M\x00\x0c\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R"
        b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T" + struct.pack("<I", 3072) + raw + b"tb"
        b"U\x0bfine_labels]K\x07au."
    )
    images, labels = write_cifar(tmp_path, Cifar100, {"test": stream}, archive=False)._official("test")
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
    with pytest.raises(ConfigError, match=r"/test: not a pickle of arrays.*: it asks for .*could run code"):
        data.load_test()
    assert not trap.exists()
    pickle.loads(poisoned)
    assert trap.exists(), "the bomb is a real one"


@pytest.mark.parametrize(
    "name",
    [b"os\nsystem", b"builtins\neval", b"__builtin__\neval", b"numpy\nload", b"numpy\nndarray.tofile", b"numpy.core.multiarray\nfromfile", b"copyreg\n_reconstructor", b"_codecs\ndecode", b"tfkd_ray.data\n_encode"],
)  # fmt: skip
def test_a_pickle_may_name_nothing_but_arrays(tmp_path: Path, name: bytes) -> None:
    data = write_cifar(tmp_path, Cifar100, {"test": b"c" + name + b"\n(S'1'\ntR."}, archive=False)
    with pytest.raises(ConfigError, match=f"it asks for {name.decode().replace(chr(10), '.')}, which could run code"):
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
def test_a_wrong_batch_gets_a_sentence(tmp_path: Path, change: dict[bytes, Any], sentence: str) -> None:
    files = {"test": pickle.dumps(batches(Cifar100)["test"] | change, 2)}
    with pytest.raises(ConfigError) as error:
        write_cifar(tmp_path, Cifar100, files, archive=False).load_test()
    assert error.value.problems == [f"data cifar100: {tmp_path}/cifar-100-python/test: {sentence}"]


@pytest.mark.parametrize(
    "raw", [b"", b"text", pickle.dumps([1]), pickle.dumps({b"data": 1}), pickled(Cifar100)["test"][:-99]]
)
def test_a_file_that_is_no_batch_gets_a_sentence(tmp_path: Path, raw: bytes) -> None:
    with pytest.raises(ConfigError, match=r"/test: (not a pickle of arrays|needs the keys b'data' and b'fine_labels')"):
        write_cifar(tmp_path, Cifar100, {"test": raw}, archive=False).load_test()


def test_an_archive_with_another_md5_is_refused_unless_told_otherwise(tmp_path: Path) -> None:
    write_cifar(tmp_path, Cifar10, pickled(Cifar10), archive=True)
    path = tmp_path / Cifar10.archive
    md5 = hashlib.md5(path.read_bytes()).hexdigest()
    with pytest.raises(ConfigError) as error:
        Cifar10(root=tmp_path).load()
    expected = f"its md5 is {md5}, and the official archive's is c58f30108f718f92721af3b95e74349a; {Cifar10.origin}"
    assert error.value.problems == [f"data cifar10: {path}: {expected}, or set check_md5: false"]


@pytest.mark.parametrize("archive, prefix", [(True, "cifar-10-batches-py/"), (False, "")], ids=["tar.gz", "folder"])
def test_a_missing_batch_is_named(tmp_path: Path, archive: bool, prefix: str) -> None:
    files = pickled(Cifar10)
    del files["data_batch_2"], files["data_batch_5"]
    with pytest.raises(ConfigError, match=f": lacks {prefix}data_batch_2, {prefix}data_batch_5; get https"):
        write_cifar(tmp_path, Cifar10, files, archive=archive).load()


def test_a_broken_archive_gets_a_sentence(tmp_path: Path) -> None:
    data = write_cifar(tmp_path, Cifar100, pickled(Cifar100), archive=True)
    path = tmp_path / Cifar100.archive
    whole = path.read_bytes()
    for broken in (whole[: len(whole) // 2], b"text", b"", whole[:100] + bytes(100) + whole[200:]):
        path.write_bytes(broken)
        with pytest.raises(ConfigError, match=r"cifar-100-python.tar.gz: (cannot be read: .*|lacks .*); get https"):
            data.load_test()


# --- as settings -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Digits, *IDX, Cifar10, Cifar100])
def test_a_data_set_is_picked_by_name_and_survives_yaml(kind: type[Digits]) -> None:
    data = validated(TrainConfig, {"objective": "ce", "data": kind().name}).data
    assert data == kind() and len(kind.mean) == len(kind.std) == kind.shape[0]
    text = dump_yaml({"objective": {"name": "ce"}, "data": data.model_dump(mode="json")})
    assert validated(TrainConfig, parse_yaml(text, "f")).data == data


def test_root_is_kept_as_a_path_that_holds_in_any_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = validated(TrainConfig, {"objective": "ce", "data": {"name": "mnist", "root": "here"}}).data
    assert isinstance(data, Mnist) and data.root == tmp_path / "here"
    assert data.model_dump(mode="json")["root"] == str(tmp_path / "here")
    assert Mnist().root == Path("~/datasets/mnist"), "each machine has a home of its own"
    monkeypatch.setenv("HOME", str(tmp_path))
    write_idx(tmp_path / "datasets/mnist")
    Mnist().check()
