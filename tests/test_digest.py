"""Digests of data, which name teachers, soft labels and runs, and are recorded in experiments."""

import json
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Run
from PIL import Image
from test_data import pickled, write_cifar, write_idx

from tfkd_ray.learn import dataset
from tfkd_ray.learn.config import TrainConfig
from tfkd_ray.learn.data import Digits, OwnData
from tfkd_ray.learn.dataset import FileDataset, digest_of, forget_loaded
from tfkd_ray.learn.image_files import ImageFolder
from tfkd_ray.learn.images import ImageSet
from tfkd_ray.learn.loop import LOOP_VERSION
from tfkd_ray.learn.official import Cifar10, Mnist
from tfkd_ray.learn.teachers import (
    bank_of,
    find_or_train,
    is_here,
    is_trained,
    load_teacher,
    teacher_name,
    train_teacher,
)
from tfkd_ray.run.epochs import check_data_here
from tfkd_ray.run.tune import build_tuner, resume_tuner
from tfkd_ray.settings.errors import ConfigError
from tfkd_ray.settings.schema import validated
from tfkd_ray.settings.yaml import dump_yaml, read_yaml
from tfkd_ray.space.relate import placed
from tfkd_ray.space.space import build_space, pinned
from tfkd_ray.store.experiment import read_experiment, read_records


@pytest.fixture(autouse=True)
def fresh(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """Give each test its own cache, and load nothing."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    forget_loaded()
    yield
    forget_loaded()


def images(n: int = 64) -> ImageSet:
    pixels = np.random.default_rng(0).integers(0, 256, (n, 1, 28, 28), dtype=np.uint8)
    return ImageSet(torch.from_numpy(pixels), torch.arange(n) % 4, torch.arange(n), n)


def changed(found: ImageSet, **parts: Any) -> ImageSet:
    return ImageSet(
        parts.get("stored", found.stored),
        parts.get("labels", found.labels),
        found.positions,
        len(found),
    )


def test_every_byte_and_every_label_counts() -> None:
    whole = images()
    digests = {digest_of(whole)}
    for place in (
        0,
        7,
        8,
        1023,
        8191,
        8192,
        49151,
        49152,
        64 * 784 - 1,
    ):  # 49152 bytes are whole blocks
        stored = whole.stored.clone()
        stored.view(-1)[place] ^= 128
        digests.add(digest_of(changed(whole, stored=stored)))
    for first, second in (
        (7, 15),
        (8191, 7),
        (11, 19),
        (3, 4),
    ):  # two changes at once, which a sum might miss
        stored = whole.stored.clone()
        stored.view(-1)[[first, second]] ^= 128
        digests.add(digest_of(changed(whole, stored=stored)))
    digests.add(digest_of(changed(whole, labels=whole.labels.flip(0))))
    digests.add(digest_of(changed(whole, stored=whole.stored.flip(0), labels=whole.labels.flip(0))))
    digests.add(digest_of(changed(whole, stored=whole.stored.transpose(2, 3))))
    digests.add(digest_of(changed(whole, stored=whole.stored.view(64, 1, 14, 56))))
    assert len(digests) == 18 and digest_of(images()) == digest_of(whole)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("n", "shape"),
    [(9000, (1, 8, 8)), (9000, (1, 28, 28)), (6000, (1, 1, 509)), (1500, (3, 32, 32)), (40, (3, 160, 160)), (9, (1, 1, 1))],
    ids=str,
)  # fmt: skip
def test_an_image_that_changes_in_any_way_or_changes_places_counts(
    n: int, shape: tuple[int, int, int]
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (n, *shape), dtype=np.uint8)
    pixels[[3, n // 2, n - 1]] = 0  # which a sum does not detect
    one, size = torch.zeros(n, dtype=torch.int64), pixels[0].size
    cases = {"as it was": pixels}
    for k in (0, 3, n // 2, n - 1):
        cases[f"{k}: the highest bit of every pixel"] = flipped = pixels.copy()
        flipped[k] ^= 128
        cases[f"{k}: of every eighth"] = flipped = pixels.copy()
        flipped[k].reshape(-1)[7 % size :: 8] ^= 128
        cases[f"{k}: upside down"] = turned = pixels.copy()
        turned[k] = ~pixels[k].reshape(-1)[::-1].reshape(shape)
    for distance in {1, 8, 64, 509, 2039, 4072, n - 1}:
        if distance < n:
            cases[f"exchanged: 0 and {distance}"] = swapped = pixels.copy()
            swapped[[0, distance]] = pixels[[distance, 0]]
    cases["moved"] = np.roll(pixels, 1, axis=0)
    cases["one pixel of all"] = marked = pixels.copy()
    marked.reshape(n, -1)[:, 7 % size] ^= 128
    found = {
        digest_of(ImageSet(torch.from_numpy(p), one, torch.arange(n), n)) for p in cases.values()
    }
    same = {p.tobytes() for p in cases.values()}
    assert len(found) == len(same) > 5


def test_the_digest_is_pinned_since_it_names_teachers() -> None:
    assert [digest_of(images()), digest_of(images(1000))] == [
        "dd7dd3e100ee896222585996dba35035",
        "14a4360b090e729f5390f64d2728726f",
    ]


def test_it_is_of_the_whole_train_set_whatever_part_of_it_is_used() -> None:
    assert (
        len(
            {
                Digits(**s).pinned().digest
                for s in ({}, {"subset": 100}, {"split_seed": 3}, {"val_fraction": 0})
            }
        )
        == 1
    )


# --- files -----------------------------------------------------------------------------------------------------


def idx_at(root: Path, *, gz: bool = False, spoil: bool = False) -> Mnist:
    write_idx(root, gz=gz)
    if spoil:
        path = root / "train-images-idx3-ubyte"
        raw = bytearray(path.read_bytes())
        raw[-1] ^= 1
        path.write_bytes(raw)
    return Mnist(root=root)


def test_a_process_that_has_loaded_data_notices_that_their_files_changed(tmp_path: Path) -> None:
    data = idx_at(tmp_path)
    path = tmp_path / "train-images-idx3-ubyte"
    pinned, raw = data.pinned(), path.read_bytes()
    path.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    assert data.pinned().digest != pinned.digest
    with pytest.raises(ConfigError, match=str(pinned.digest)):
        pinned.load()
    path.write_bytes(raw)
    pinned.load()
    path.unlink()
    pinned.load()  # its images are in memory


def test_two_roots_of_the_same_content_are_one_data_set_and_of_other_content_two(
    tmp_path: Path,
) -> None:
    a, b, c = (
        idx_at(tmp_path / "a"),
        idx_at(tmp_path / "b", gz=True),
        idx_at(tmp_path / "c", spoil=True),
    )
    os.utime(tmp_path / "b/train-images-idx3-ubyte.gz", (1, 1))

    def name(data: FileDataset) -> str:
        tree = {
            "objective": "kd",
            "teacher": {"model": "cnn"},
            "data": data.model_dump(mode="json"),
        }
        run = validated(TrainConfig, tree).teacher_run()
        assert run is not None
        return teacher_name(run)

    assert name(a) == name(b) != name(c)


def test_an_archive_and_its_folder_are_one_data_set(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    archive = write_cifar(tmp_path / "a", Cifar10, pickled(Cifar10), archive=True)
    folder = write_cifar(tmp_path / "b", Cifar10, pickled(Cifar10), archive=False)
    assert archive.pinned().digest == folder.pinned().digest


def test_a_digest_is_taken_once_on_a_node_and_again_when_a_file_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []
    monkeypatch.setattr(dataset, "digest_of", lambda found: taken.append(1) or digest_of(found))  # type: ignore[func-returns-value]
    data = idx_at(tmp_path)
    first = data.pinned()
    forget_loaded()
    assert data.pinned() == first and taken == [1]
    path = tmp_path / "train-labels-idx1-ubyte"
    os.utime(path, (1, 1))  # its time only decides whether the digest is still cached
    forget_loaded()
    assert data.pinned() == first and taken == [1, 1]
    raw = bytearray(path.read_bytes())
    raw[8] = 9
    path.write_bytes(raw)
    os.utime(path, (2, 2))
    forget_loaded()
    with pytest.raises(ConfigError, match="data mnist: the train images or labels here differ"):
        first.load()


def folder_at(root: Path, classes: str = "ab", n: int = 6) -> ImageFolder:
    for split in ("train", "val"):
        for k, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for i in range(n):
                pixels = np.random.default_rng(10 * k + i).integers(
                    0, 256, (12, 12, 3), dtype=np.uint8
                )
                Image.fromarray(pixels).save(root / split / name / f"{i}-{k}.png")
    return ImageFolder(root=root, num_classes=len(classes), image_size=8)


def test_an_image_that_changes_its_class_makes_another_data_set(tmp_path: Path) -> None:
    here, copy = folder_at(tmp_path / "a"), folder_at(tmp_path / "b")
    for path in (tmp_path / "b").rglob("*.png"):
        os.utime(path, (1, 1))
    was = here.pinned()
    assert copy.pinned().digest == was.digest and copy.pinned().identity() == was.identity()
    (tmp_path / "a/train/a/0-0.png").rename(tmp_path / "a/train/b/0-0.png")
    forget_loaded()
    assert here.pinned().digest != was.digest
    with pytest.raises(ConfigError, match="restore them, or begin a new experiment"):
        was.load()


# --- one's own -------------------------------------------------------------------------------------------------

MODULE = """
import json, random, numpy as np, torch
from pathlib import Path

def make(split):
    how = Path("HERE/how.txt").read_text()
    r = np.random.default_rng(0)
    labels = np.arange(120) % 4
    images = r.integers(0, 60, (120, 1, 8, 8), dtype=np.uint8)
    images[np.arange(120), 0, 2 * labels] += 120
    order = np.arange(120)[::-1] if how == "turned" else np.arange(120)
    if how == "global":
        images = np.random.randint(0, 256, (120, 1, 8, 8)).astype(np.uint8)
        images[0, 0, 0, 0], labels = random.randrange(256), torch.randint(4, (120,)).numpy()
        labels[:4] = np.arange(4)
    if how == "random":
        order = np.random.default_rng().permutation(120)
    return images[order].copy(), torch.from_numpy(labels[order].copy())
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    name = f"mine_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(MODULE.replace("HERE", str(tmp_path)))
    (tmp_path / "how.txt").write_text("as it was")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield {"name": "own", "path": f"{name}:make", "shape": [1, 8, 8], "num_classes": 4}
    sys.modules.pop(name, None)


def taught(data: dict[str, Any], **settings: Any) -> dict[str, Any]:
    small = {"name": "mlp", "hidden": [8]}
    teacher = {"model": {"name": "mlp", "hidden": [16]}, "epochs": 2, "labels": "bank"}
    return {
        "objective": "kd",
        "teacher": teacher,
        "student": small,
        "data": data,
        "epochs": 2,
        **settings,
    }


def turn(how: str) -> None:
    Path("how.txt").write_text(how)
    forget_loaded()


def test_a_function_that_returns_other_images_gets_another_teacher_and_other_soft_labels(
    mine: dict[str, Any], tmp_path: Path
) -> None:
    config = validated(TrainConfig, taught(mine))
    first = find_or_train(config, tmp_path)
    turn("turned")
    second = find_or_train(config, tmp_path)
    assert first is not None and second is not None and first._of != second._of
    assert len(list((tmp_path / "teachers").iterdir())) == 2
    turn("as it was")
    again = find_or_train(config, tmp_path)
    assert (
        again is not None
        and again._of == first._of
        and len(list((tmp_path / "teachers").iterdir())) == 2
    )


def test_a_function_that_returns_other_images_at_each_call_is_refused(mine: dict[str, Any]) -> None:
    turn("random")
    data = validated(TrainConfig, taught(mine)).data
    assert isinstance(data, OwnData)
    with pytest.raises(
        ConfigError, match="returns other images or labels at each call; seed what is random in it"
    ):
        data.pinned()
    turn("as it was")
    was = data.pinned()
    turn("random")
    with pytest.raises(ConfigError, match="at each call"):
        was.load()


def test_an_own_set_that_draws_from_the_global_random_numbers_is_the_same_in_every_process(
    mine: dict[str, Any],
) -> None:
    found = []
    for other in range(3):
        turn("global")
        np.random.seed(other)  # noqa: NPY002
        random.seed(other)
        torch.manual_seed(other)
        before = (
            random.getstate(),
            np.random.get_state()[1].tolist(),  # type: ignore[index]  # noqa: NPY002
            torch.get_rng_state().tolist(),
        )
        data = validated(TrainConfig, taught(mine)).data.pinned()
        test = data.load_test()
        after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # type: ignore[index]  # noqa: NPY002
        assert after == before, "and they are put back"
        found.append((data.digest, digest_of(test)))
    assert found[0] == found[1] == found[2] and found[0][0] != found[0][1], (
        "the test split is another draw"
    )


def test_a_process_takes_the_digest_of_a_set_once_whatever_it_trains_on_it(
    mine: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node's many trials share it: the digest of a user's data set is cached in no file."""
    pinned = validated(TrainConfig, taught(mine)).pinned()
    forget_loaded()
    taken = []

    def counted(found: Any) -> str:
        taken.append(found)
        return digest_of(found)

    monkeypatch.setattr(dataset, "digest_of", counted)
    for k in range(5):
        check_data_here(pinned.model_copy(update={"seed": k}))
    assert len(taken) == 1


def test_a_node_with_other_data_refuses_with_its_name(mine: dict[str, Any]) -> None:
    config = validated(TrainConfig, taught(mine)).pinned()
    check_data_here(config)
    turn("turned")
    with pytest.raises(
        ConfigError, match=r"node .*: data own: the train images or labels here differ"
    ):
        check_data_here(config)


def test_a_teacher_of_before_digests_is_found_by_its_name_and_not_taken_for_new_data(
    tmp_path: Path,
) -> None:
    run = validated(TrainConfig, taught({"name": "digits"})).teacher_run()
    assert run is not None
    about = train_teacher(run, tmp_path)
    old = tmp_path / "teachers" / f"mlp-{run.fingerprint(LOOP_VERSION)}"
    (tmp_path / "teachers" / about["name"]).rename(old)
    assert not is_trained(run, tmp_path) and is_here(run, tmp_path)
    load_teacher(run, tmp_path)


def test_a_run_goes_on_only_with_the_data_that_it_began_with(
    mine: dict[str, Any], tfkd: Run, tmp_path: Path
) -> None:
    (tmp_path / "run.yaml").write_text(dump_yaml(taught(mine)))
    command = ["train", "run.yaml", "--out", "out", "--storage", "."]
    done = tfkd(*command)
    assert done.returncode == 0, done.stderr
    assert read_yaml(tmp_path / "out/config.yaml")["data"]["digest"]
    (tmp_path / "how.txt").write_text("turned")
    refused = tfkd(*command)
    assert refused.returncode == 2 and "differ from the recorded ones" in refused.stderr
    assert "Traceback" not in refused.stderr
    other = tfkd("train", "run.yaml", "--out", "other", "--storage", ".")
    assert other.returncode == 0 and len(list((tmp_path / "teachers").iterdir())) == 2


@pytest.mark.ray
def test_an_experiment_records_the_digest_and_goes_on_with_these_data_only(
    tmp_path: Path, ray_cluster: str
) -> None:
    data = idx_at(tmp_path / "data")
    path = tmp_path / "data/train-images-idx3-ubyte"
    search = {
        "num_samples": 2,
        "stopping": "none",
        "baselines": False,
        "sampler": "random",
        "warm_start": False,
    }
    space = taught(
        data.model_dump(mode="json"), optim={"lr": {"low": 0.01, "high": 0.1}}, search=search
    )
    build_tuner(space, name="a", storage=tmp_path).fit()
    digest = read_experiment(tmp_path / "a")["space"]["data"]["digest"]
    assert digest == data.pinned().digest
    assert {
        r.config["data"]["digest"] for r in read_records(tmp_path / "a") if r.status == "done"
    } == {digest}
    raw, forget = path.read_bytes(), forget_loaded
    path.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    forget()
    with pytest.raises(ConfigError, match=digest):
        resume_tuner(tmp_path / "a", add_trials=1)
    said: list[str] = []
    other = build_tuner(space, name="b", storage=tmp_path, on_note=said.append)
    anew, doubt = said  # of random images no teacher learns anything
    assert "the teacher and its soft labels are computed again" in anew and digest in anew, other
    assert "guessing would reach" in doubt
    path.write_bytes(raw)
    forget()
    wider = {**space, "optim": {"lr": {"low": 0.01, "high": 0.2}}}
    assert resume_tuner(tmp_path / "a", add_trials=1, space=wider) is not None
    assert read_experiment(tmp_path / "a")["space"]["data"]["digest"] == digest


def test_trials_on_other_data_are_no_priors(mine: dict[str, Any]) -> None:
    tree = taught(mine, optim={"lr": {"low": 0.01, "high": 0.1}})
    space = pinned(build_space(tree))
    config = validated(TrainConfig, taught(mine, optim={"lr": 0.05}))
    assert not isinstance(placed(space, config), list), "of before digests"
    assert not isinstance(placed(space, config.pinned()), list)
    turn("turned")
    found = placed(space, config.pinned())
    assert isinstance(found, list) and found[0].startswith("data.digest: ")


def test_soft_labels_are_of_the_digest(mine: dict[str, Any], tmp_path: Path) -> None:
    config = validated(TrainConfig, taught(mine))
    find_or_train(config, tmp_path)
    bank = bank_of(config, tmp_path)
    assert bank is not None and bank._of["data"]["digest"] == config.data.pinned().digest
    assert "path" not in bank._of["data"] and json.dumps(bank._of)
