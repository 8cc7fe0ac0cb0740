"""Omniglot: fixtures in the official layout, with drawings made here."""

import runpy
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from test_data import drawing, png, write_drawings, zipped

from tfkd_ray.learn.config import TrainConfig
from tfkd_ray.learn.images import ImageSet
from tfkd_ray.learn.loop import train
from tfkd_ray.learn.omniglot import (
    BACKGROUND,
    CHARACTERS,
    EVALUATION,
    SETS,
    Omniglot,
)
from tfkd_ray.run.confirm import _judged_arm
from tfkd_ray.settings.errors import ConfigError
from tfkd_ray.space.arms import Run, build_arms
from tfkd_ray.space.space import load_space
from tfkd_ray.store.experiment import Record
from tfkd_ray.verdict.verdict import image_interval

SMALL = ("images_background_small1", "images_background_small2")


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def tagalog(root: Path, **settings: object) -> Omniglot:
    return Omniglot.model_validate(
        {"root": root, "sets": [SMALL[1]], "alphabets": ["Tagalog"], **settings}
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("omniglot")
    write_drawings(root, SMALL[1], ["Tagalog"])
    return root


def images_of(data: Omniglot) -> list[ImageSet]:
    train_set, val_set = data.load()
    found = [train_set, val_set, data.load_test()]
    assert all(isinstance(part, ImageSet) for part in found)
    return found  # type: ignore[return-value]


def test_the_table_of_alphabets_is_the_papers() -> None:
    assert sum(BACKGROUND.values()) == 964 and len(BACKGROUND) == 30
    assert sum(EVALUATION.values()) == 659 and len(EVALUATION) == 20
    small = [sum(CHARACTERS[a] for a in SETS[name]) for name in SMALL]
    assert small == [136, 156]
    assert Omniglot(root=Path("nowhere")).num_classes == 242


@pytest.mark.slow
@pytest.mark.parametrize("side", [105, 28])
def test_drawings_are_read_to_the_pixel_and_split_by_drawer(folder: Path, side: int) -> None:
    data = tagalog(folder, side=side)
    train_set, val_set, test_set = images_of(data)
    assert [len(train_set), len(val_set), len(test_set)] == [17 * 12, 17 * 4, 17 * 4]
    first = 1000 * sorted(CHARACTERS).index("Tagalog")
    for part, per_class, before in ((train_set, 16, 1), (val_set, 16, 1), (test_set, 4, 17)):
        for image, label, position in zip(part.images, part.labels, part.positions, strict=True):
            character, drawer = int(position) // per_class, int(position) % per_class + before
            assert int(label) == character
            paper = drawing(first + 20 * (character + 1) + drawer)
            grey = Image.fromarray((paper * 255).astype(np.uint8))
            seen = np.asarray(grey.resize((side, side), Image.Resampling.BILINEAR))
            assert image.shape == (1, side, side)
            np.testing.assert_array_equal(image[0].numpy(), 255 - seen)
    held = {int(p) % 16 for p in val_set.positions}
    assert len(held) == 4 and not held & {int(p) % 16 for p in train_set.positions}


def test_validation_and_subset_are_whole_drawers(folder: Path) -> None:
    def drawers(**settings: object) -> tuple[set[int], set[int]]:
        train_set, val_set = tagalog(folder, **settings).load()
        seen = {int(p) % 16 for p in train_set.positions}
        assert len(train_set) == 17 * len(seen)
        return seen, {int(p) % 16 for p in val_set.positions} if val_set else set()

    kept, held = drawers()
    assert drawers(subset=17 * 5) == (drawers(subset=17 * 5)[0], held)
    few = drawers(subset=17 * 5)[0]
    assert len(few) == 5 and few < kept
    assert len(drawers(subset=1)[0]) == 1
    assert drawers(split_seed=3)[1] != held
    assert [len(drawers(val_fraction=f)[1]) for f in (0, 0.01, 0.25, 0.5, 0.99)] == [0, 1, 4, 8, 15]


@pytest.mark.parametrize("place", ["zip", "torchvision"])
def test_zips_and_torchvisions_folder_give_the_same(
    folder: Path, tmp_path: Path, place: str
) -> None:
    there = tmp_path / "data"
    there.mkdir()
    if place == "zip":
        zipped(folder / SMALL[1], there / f"{SMALL[1]}.zip")
    else:
        shutil.copytree(folder, there / "omniglot-py")
    data, before = tagalog(there), tagalog(folder)
    data.examine()
    for found, expected in zip(images_of(data), images_of(before), strict=True):
        assert torch.equal(found.images, expected.images)
        assert torch.equal(found.labels, expected.labels)
    assert data.pinned().digest == before.pinned().digest


@pytest.mark.slow
def test_a_class_of_both_small_sets_is_one_if_its_files_are_the_same(tmp_path: Path) -> None:
    for name in SMALL:
        write_drawings(tmp_path, name, ["Greek"])
    data = Omniglot(root=tmp_path, alphabets=("Greek",))
    train_set, val_set, test_set = images_of(data)
    assert data.num_classes == 24
    assert [len(train_set), len(val_set), len(test_set)] == [24 * 12, 24 * 4, 24 * 4]
    odd = tmp_path / SMALL[1] / "Greek/character03/0003_18.png"
    odd.write_bytes(png(drawing(0)))
    with pytest.raises(ConfigError, match=r"0003_18.png: differs from .*drawer 18 of Greek/char"):
        data.examine()


def lacks(folder: Path) -> None:
    for name in ("0003_18.png", "0003_02.png"):
        (folder / "Tagalog/character03" / name).unlink()


def lacks_class(folder: Path) -> None:
    shutil.rmtree(folder / "Tagalog/character17")


def odd_name(folder: Path) -> None:
    (folder / "Tagalog/character03/extra.png").write_bytes(png(drawing(0)))


def one_more(folder: Path) -> None:
    (folder / "Tagalog/character03/0003_21.png").write_bytes(png(drawing(0)))


def twice(folder: Path) -> None:
    (folder / "Tagalog/character03/0004_05.png").write_bytes(png(drawing(0)))


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lacks, "Tagalog/character03: drawers are missing: 02, 18; get the zips"),
        (lacks_class, "Tagalog/character17: drawers are missing: 01, 02"),
        (odd_name, "character03/extra.png is no drawing: ALPHABET/characterNN/"),
        (one_more, "Tagalog/character03: 21 is no official drawer"),
        (twice, "are the same drawer of one character"),
    ],
)
def test_wrong_drawers_are_named_before_anything_trains(
    folder: Path, tmp_path: Path, spoil: Callable[[Path], None], sentence: str
) -> None:
    there = tmp_path / "data"
    shutil.copytree(folder, there)
    spoil(there / SMALL[1])
    for look in (Omniglot.examine, Omniglot.load):
        with pytest.raises(ConfigError) as caught:
            look(tagalog(there))
        assert sentence in str(caught.value)
        assert "data omniglot" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "cannot be read as an image"),
        (b"\x89PNG\r\n\x1a\nrubbish", "cannot be read as an image"),
        (png(np.ones((28, 28), bool)), "is 28x28, and all drawings are 105x105"),
    ],
)
def test_a_wrong_drawing_gets_a_sentence(
    folder: Path, tmp_path: Path, content: bytes, sentence: str
) -> None:
    there = tmp_path / "data"
    shutil.copytree(folder, there)
    (there / SMALL[1] / "Tagalog/character03/0003_18.png").write_bytes(content)
    with pytest.raises(ConfigError, match=sentence) as caught:
        tagalog(there).load_test()
    assert "0003_18.png" in str(caught.value)


@pytest.mark.slow
def test_a_wrong_zip_gets_a_sentence(folder: Path, tmp_path: Path) -> None:
    whole = tmp_path / f"{SMALL[1]}.zip"
    zipped(folder / SMALL[1], whole)
    content = whole.read_bytes()
    spoilt = bytearray(content)
    middle = content.index(b"IDAT", len(content) // 3)
    spoilt[middle + 8] ^= 255
    for wrong in (content[: len(content) // 2], b"", b"PK\x03\x04", bytes(spoilt)):
        whole.write_bytes(wrong)
        with pytest.raises(ConfigError, match=r"small2.zip: cannot be read: .*; get the zips"):
            tagalog(tmp_path).load()
    with zipfile.ZipFile(whole, "w", zipfile.ZIP_DEFLATED) as archive:  # a bomb is not unpacked
        archive.writestr(f"{SMALL[1]}/Tagalog/character01/0001_01.png", bytes(2**28))
    with pytest.raises(ConfigError, match="drawers are missing"):
        tagalog(tmp_path).load()


def test_missing_sets_and_unknown_alphabets_get_a_sentence(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"not found: images_background_small1, as zip or folder"):
        Omniglot(root=folder).check()
    with pytest.raises(
        ConfigError, match=r"alphabets: 'Tagalgo' is in none of .*did you mean 'Taga"
    ):
        Omniglot(root=folder, alphabets=("Tagalgo",))


@pytest.mark.slow
def test_the_cache_knows_sets_alphabets_and_size_apart(tmp_path: Path) -> None:
    write_drawings(tmp_path, SMALL[1], ["Tagalog", "Latin"])
    zipped(tmp_path / SMALL[1], tmp_path / f"{SMALL[1]}.zip")
    for side in (28, 32):
        for alphabets in (["Tagalog"], ["Latin"], ["Tagalog", "Latin"]):
            data = tagalog(tmp_path, side=side, alphabets=alphabets)
            for _ in range(2):  # decoded, then from the cache
                images, labels = data._official("train")
                assert len(images) == len(labels) == 16 * sum(CHARACTERS[a] for a in alphabets)
                assert images.shape[2] == side


def test_the_bootstrap_resamples_the_drawers_of_each_alphabet(folder: Path) -> None:
    data = tagalog(folder, alphabets=["Tagalog", "Latin"])
    clusters = data.test_clusters()
    expected = [(k, d) for k in range(2) for _ in range([26, 17][k]) for d in range(4)]
    names = [expected.index(pair) for pair in expected]
    assert torch.equal(clusters, torch.tensor([4 * k + d for k, d in expected]))
    assert len(set(names)) == 8
    config = TrainConfig(objective="ce", data=tagalog(folder))  # type: ignore[arg-type]
    runs = [Run("a", s, config) for s in (1, 2)]
    right = [np.arange(68) % (3 + s) == 0 for s in (1, 2)]
    found = [{"seed": s, "status": "done"} for s in (1, 2)]
    arm = _judged_arm("a", runs, found, right, "val_accuracy")
    np.testing.assert_array_equal(arm.clusters, np.arange(68) % 4)


def test_an_interval_over_clusters_is_as_wide_as_their_number_says() -> None:
    rng = np.random.default_rng(0)
    clusters = np.arange(2000) % 50
    leads = rng.normal(0, 1, 50)[clusters]
    low, high = image_interval(leads, 0, clusters)
    expected = 2 * 1.96 * leads.reshape(40, 50).mean(axis=0).std() / np.sqrt(50)
    assert high - low == pytest.approx(expected, rel=0.05)
    low, high = image_interval(leads)
    assert high - low < 0.2 * expected


def test_it_is_trained_on(folder: Path) -> None:
    tree = {"objective": "ce", "data": tagalog(folder), "epochs": 2, "optim": {"lr": 0.01}}
    metrics = [epoch.metrics for epoch in train(TrainConfig.model_validate(tree))]
    assert metrics[1]["train_loss"] < metrics[0]["train_loss"]


# --- benchmarks/omniglot.py


@pytest.fixture(scope="module")
def bench() -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(ROOT / "benchmarks" / "omniglot.py")))


@pytest.mark.slow
def test_every_arm_that_the_papers_claims_compare_is_in_a_comparison(
    bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def best(storage: Path, sweep: str, objective: str) -> Record:
        file, *overrides = bench.SWEEPS[sweep]
        for branch in load_space(file, overrides).branches:
            if branch.objective == objective:
                values = {p.name: p.domain.probes[0] for p in branch.parameters}
                values["optim.lr"] = 0.01 * len(sweep + objective)  # no two arms are the same
                config = branch.config(values)
                return Record(Path(), 0, objective, objective, "done", {}, config.tree)
        raise AssertionError(f"{sweep} does not tune {objective}")

    monkeypatch.setitem(bench.arms_of.__globals__, "best", best)
    there = set()
    for stage in ("free", "own", "taught", "curve", "controls", "b", "transfer"):
        compared = build_arms(bench.arms_of(Path(), stage), overrides=["resources={}"])
        there |= {arm.name for arm in compared.arms} if stage != "b" else set()
    claims = (*bench.CLAIMS, *bench.TRANSFER_CLAIMS)
    claimed = {name for claim in claims for name in (claim.arm, claim.over)}
    assert claimed <= there


@pytest.mark.parametrize(
    "kind, low, high, word",
    [
        ("better", 0.1, 0.9, "supported"),
        ("better", -0.1, 0.9, "cannot tell"),
        ("better", -0.9, 0.1, "not supported"),
        ("equal", -0.9, 0.4, "supported"),
        ("equal", -0.9, -0.1, "supported"),
        ("equal", -1.5, 0.4, "cannot tell"),
        ("equal", -1.5, -0.1, "not supported"),
        ("twins", -0.2, 0.1, "tie"),
        ("twins", 0.1, 0.3, "do not tie"),
    ],
)
def test_a_claim_is_judged_by_its_interval_and_margin(
    bench: SimpleNamespace, kind: str, low: float, high: float, word: str
) -> None:
    lead = SimpleNamespace(low=low / 100, high=high / 100)
    assert bench.word(bench.Claim("", "a", "b", kind), lead) == word
