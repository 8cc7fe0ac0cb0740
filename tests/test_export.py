"""An exported student has the student's outputs, records its selection, and needs only torch."""

import contextlib
import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, is_whole, long_after
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from tfkd_ray import best_config, class_names, load_student, read_images, write_report
from tfkd_ray.learn.config import TrainConfig
from tfkd_ray.learn.data import Digits
from tfkd_ray.learn.dataset import Dataset
from tfkd_ray.learn.images import FolderSet
from tfkd_ray.learn.loop import LOOP_VERSION, train_in
from tfkd_ray.learn.teachers import find_or_train, teacher_name
from tfkd_ray.settings import own_code
from tfkd_ray.settings.errors import ConfigError
from tfkd_ray.settings.files import write_text
from tfkd_ray.settings.schema import validated
from tfkd_ray.settings.yaml import dump_yaml, read_yaml
from tfkd_ray.show import chosen
from tfkd_ray.show import export as exporting
from tfkd_ray.show.card import card_text
from tfkd_ray.show.chosen import GRAPH, NOT_CONFIRMED, ONNX, SUMS
from tfkd_ray.show.export import ExportFailed, export
from tfkd_ray.space.arms import build_arms, new_comparison, read_comparison
from tfkd_ray.space.space import build_space
from tfkd_ray.store.experiment import Record, best, read_records, write_experiment, write_record
from tfkd_ray.verdict.scores import score_of

SMALL: dict[str, Any] = {
    "student": {"name": "mlp", "hidden": [8]},
    "epochs": 2,
    "checkpoint_every_s": 100,
}
CNN: dict[str, Any] = {"student": {"name": "cnn", "widths": [4, 8]}, "epochs": 2}


# --- networks of a person's own --------------------------------------------------------------------------------


class Wrapped(nn.Module):
    """BatchNorm, and logits in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.BatchNorm2d(1), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.head(self.norm(x).flatten(1))}


class Branching(nn.Linear):
    """Uses the values of the images for control flow: no graph."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(1)) * (1.0 if x.mean().item() > 0 else 2.0)


class Noisy(nn.Linear):
    """Gives another answer each time."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(1)) + torch.rand(len(x), 10)


def wrapped(shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    return Wrapped()


def branching(shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    return Branching(64, num_classes)


def noisy(shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    return Noisy(64, num_classes)


# --- what is exported: real runs, in the folders that tune, train and confirm make -------------------------------


def trained(folder: Path, config: TrainConfig, storage: Path) -> list[dict[str, float]]:
    """Train as a trial does, without Ray."""
    found = list(
        train_in(
            folder, config, teacher=find_or_train(config, storage), about={"trial": folder.name}
        )
    )
    write_text(folder / "metrics.jsonl", "".join(json.dumps(m) + "\n" for m in found))
    return found


def run_of(folder: Path, tree: dict[str, Any]) -> Path:
    """Return a run as `tfkd train` leaves it."""
    config = validated(TrainConfig, {"objective": "ce", **tree})
    write_text(folder / "config.yaml", dump_yaml(config.model_dump(mode="json")))
    trained(folder, config, folder.parent)
    return folder


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a sweep `sweep`, a comparison `arms` that judged one of its trials, a run `run`."""
    place = tmp_path_factory.mktemp("storage")
    tree = build_space({**SMALL, "objective": ["lsr", "tfkd_self"]}).tree
    write_experiment(place / "sweep", tree, ["/somewhere/bin/tfkd", "tune", "mine.yaml"])
    for number, (objective, status, lr) in enumerate(
        [
            ("lsr", "done", 0.01),
            ("tfkd_self", "done", 0.2),
            ("lsr", "stopped", 0.1),
            ("ce", "failed", 0.1),
        ]
    ):
        name = f"t{number:04d}-{objective}"
        config = validated(TrainConfig, {**SMALL, "objective": objective, "optim": {"lr": lr}})
        folder = place / "sweep/trials" / name
        if status == "done":
            trained(folder, config, place)
        reason = "Diverged: train_loss is nan" if status == "failed" else None
        write_record(
            Record(
                folder, number, name, objective, status, {}, config.model_dump(mode="json"), reason
            )
        )
    arms = {
        **SMALL,
        "arms": [
            {"name": "ce", "objective": "ce", "optim": {"lr": 0.2}},
            {"name": "self", "objective": "tfkd_self", "optim": {"lr": 0.2}},
            {"name": "slow", "objective": "tfkd_self", "optim": {"lr": 0.001}},
        ],
    }
    new_comparison(build_arms(arms), [1, 2, 3], place / "arms")
    for number, run in enumerate(read_comparison(place / "arms").runs):
        folder = place / "arms/trials" / run.name
        status = "failed" if run.name == "slow-s3" else "done"
        if status == "done":
            trained(folder, run.config, place)
        told = {"arm": run.arm, "seed": run.seed}
        write_record(
            Record(
                folder,
                number,
                run.name,
                run.arm,
                status,
                told,
                run.config.model_dump(mode="json"),
                "out",
            )
        )
    from tfkd_ray.run.confirm import judge_on_test

    judge_on_test(place / "arms")
    run_of(place / "run", CNN)
    return place


@pytest.fixture(autouse=True)
def _no_test_split(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Dataset, "load_test", lambda self: pytest.fail("the test split was opened"))


def student(folder: Path) -> tuple[nn.Module, Dataset]:
    """Return the student of an exported folder's weights and configuration."""
    config = validated(TrainConfig, read_yaml(folder / "config.yaml"))
    network = config.student.build(config.data.shape, config.data.num_classes)
    network.load_state_dict(load_file(folder / "student.safetensors"))
    return network.eval(), config.data


# --- what is written -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_fresh_process_with_torch_alone_gives_the_students_logits(
    tmp_path: Path, storage: Path
) -> None:
    result = export(storage / "run", tmp_path / "out")
    assert result["files"] == ["README.md", "config.yaml", GRAPH, "student.safetensors", SUMS]
    assert {p.name for p in (tmp_path / "out").iterdir()} == set(result["files"])
    assert is_whole(tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    network, data = student(tmp_path / "out")
    images = data.load()[0].part(torch.arange(64)).images  # type: ignore[union-attr]
    with torch.no_grad():
        wanted = network((images.float() - Digits.mean[0]) / Digits.std[0])
    torch.save({"images": images, "logits": wanted}, tmp_path / "wanted.pt")
    code = (
        "import sys\n"
        "for name in ('tfkd_ray', 'ray', 'torchvision', 'timm', 'safetensors', 'numpy'): sys.modules[name] = None\n"
        "import torch\n"
        f"student = torch.export.load('out/{GRAPH}').module()\n"
        "wanted = torch.load('wanted.pt')\n"
        "for size in (1, 7, 64):\n"
        "    logits = student(wanted['images'][:size])\n"
        "    torch.testing.assert_close(logits, wanted['logits'][:size], rtol=1e-5, atol=1e-5)\n"
    )
    ran = subprocess.run(
        [sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr


@pytest.mark.long
@pytest.mark.slow
def test_onnx_gives_the_students_logits_at_every_batch_size(tmp_path: Path, storage: Path) -> None:
    import onnx
    import onnxruntime

    result = export(storage / "run", tmp_path / "out", onnx=True)
    assert result["images"] == 256 and result["split"] == "validation" and not result["problems"]
    assert {n: d["largest"] < 1e-5 < d["scale"] for n, d in result["differences"].items()} == {
        GRAPH: True,
        ONNX: True,
    }
    model = onnx.load(tmp_path / "out" / ONNX)
    onnx.checker.check_model(model)
    assert [o.version for o in model.opset_import if not o.domain] == [exporting.OPSET]
    session = onnxruntime.InferenceSession(tmp_path / "out" / ONNX)
    network, data = student(tmp_path / "out")
    images = data.load()[0].part(torch.arange(30)).images  # type: ignore[union-attr]
    with torch.no_grad():
        wanted = network((images.float() - Digits.mean[0]) / Digits.std[0])
    for size in (1, 7, 30):
        (logits,) = session.run(["logits"], {"images": images[:size].numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), wanted[:size], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_weights_and_configuration_are_those_of_the_run(tmp_path: Path, storage: Path) -> None:
    export(storage / "run", tmp_path / "out", licence="apache-2.0")
    first, copy = (
        load_file(f / "student.safetensors") for f in (storage / "run", tmp_path / "out")
    )
    assert first.keys() == copy.keys() and all(first[k].equal(copy[k]) for k in first)
    assert read_yaml(tmp_path / "out/config.yaml") == read_yaml(storage / "run/config.yaml")
    with safe_open(tmp_path / "out/student.safetensors", "pt") as file:
        header = file.metadata()
    with safe_open(storage / "run/student.safetensors", "pt") as file:
        assert header["run"] == file.metadata()["run"]
    assert json.loads(header["mean"]) == list(Digits.mean) and header["license"] == "apache-2.0"


@pytest.mark.parametrize("file", long_after(0, [GRAPH, ONNX]))
@pytest.mark.slow
def test_no_place_on_this_machine_is_in_a_graph(tmp_path: Path, storage: Path, file: str) -> None:
    export(storage / "run", tmp_path / "out", onnx=True)
    content = (tmp_path / "out" / file).read_bytes()
    assert not [
        p
        for p in (Path(torch.__file__).parent, Path(exporting.__file__).parent)
        if str(p).encode() in content
    ]


@pytest.mark.slow
def test_all_or_nothing_is_written(
    tmp_path: Path, storage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*args: Any) -> None:
        raise KeyboardInterrupt

    (tmp_path / "out").mkdir()  # an empty one may be there
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(torch.export, "save", stopped)
        export(storage / "run", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"] and not list(
        (tmp_path / "out").iterdir()
    )
    export(storage / "run", tmp_path / "out")
    assert is_whole(tmp_path / "out")
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o777 & ~umask


@pytest.mark.slow
def test_what_a_killed_export_left_is_removed_by_the_next_to_the_same_place_and_nothing_else(
    tmp_path: Path, storage: Path
) -> None:
    names = {
        ".out.0123abcd.part": False,
        ".out.ffffffff.part": True,
        ".other.0123abcd.part": True,
        ".out.part": True,
    }
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "student.pt2").write_bytes(b"half")
    handle = os.open(tmp_path / ".out.ffffffff.part", os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)  # its export still runs
    try:
        export(storage / "run", tmp_path / "out")
    finally:
        os.close(handle)
    assert {p.name for p in tmp_path.iterdir()} == {
        "out",
        *(name for name, stays in names.items() if stays),
    }


# --- networks that are not ours --------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_own_network_with_a_dict_of_logits_is_exported(tmp_path: Path) -> None:
    run_of(tmp_path / "run", {"student": "test_export:wrapped", "epochs": 1})
    result = export(tmp_path / "run", tmp_path / "out")
    assert not result["problems"] and result["differences"][GRAPH]["largest"] < 1e-5


@pytest.mark.slow
def test_a_sweep_with_own_code_is_exported_from_any_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, name = tmp_path / "begun", f"exported_{tmp_path.name}"
    (begun / "e/trials").mkdir(parents=True)
    (begun / f"{name}.py").write_text(
        "import pathlib, torch\n\ndef network(shape, num_classes):\n"
        "    width = int(pathlib.Path('width.txt').read_text())\n"
        "    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(width, num_classes))\n"
    )
    (begun / "width.txt").write_text("64")
    monkeypatch.setattr(own_code, "_home", None)
    monkeypatch.setattr(sys, "path", list(sys.path))
    with contextlib.chdir(begun):
        space = build_space({"objective": "ce", "student": f"{name}:network", "epochs": 1})
        write_experiment(begun / "e", space.tree, ["tfkd", "tune", "mine.yaml"])
        config = space.single()
        folder = begun / "e/trials/t0000-ce"
        trained(folder, config, begun)
        write_record(Record(folder, 0, folder.name, "ce", "done", {}, config.model_dump(mode="json"), None))  # fmt: skip
        monkeypatch.delitem(sys.modules, name)
    export(begun / "e", tmp_path / "out")
    assert (tmp_path / "out" / SUMS).is_file()


@pytest.mark.long
@pytest.mark.slow
def test_a_network_of_timm_is_exported(tmp_path: Path) -> None:
    tree = {
        "student": {"name": "timm", "model": "test_resnet"},
        "epochs": 1,
        "data": {"name": "digits", "subset": 300},
    }
    run_of(tmp_path / "run", tree)
    result = export(tmp_path / "run", tmp_path / "out", onnx=True)
    assert not result["problems"] and (result["split"], result["images"]) == (
        "train",
        len(Digits(subset=300).load()[0]),
    )
    assert all(d["largest"] < 1e-4 * d["scale"] for d in result["differences"].values())


@pytest.mark.slow
def test_without_a_graph_the_weights_are_there_and_the_card_says_why(tmp_path: Path) -> None:
    run_of(tmp_path / "run", {"student": "test_export:branching", "epochs": 1})
    result = export(tmp_path / "run", tmp_path / "out", onnx=True)
    assert result["files"] == ["README.md", "config.yaml", "student.safetensors", SUMS]
    assert set(result["problems"]) == {GRAPH, ONNX} and not result["differences"]
    card = (tmp_path / "out/README.md").read_text()
    assert f"`{GRAPH}` is missing, because the export failed: `torch.export: " in card
    assert "torch.export.load" not in card and is_whole(tmp_path / "out")


@pytest.mark.slow
def test_a_graph_that_computes_something_else_is_refused(tmp_path: Path) -> None:
    run_of(tmp_path / "run", {"student": "test_export:noisy", "epochs": 1})
    with pytest.raises(
        ExportFailed,
        match=r"student\.pt2: its logits differ from the student's by up to 0\.\d+ on 256",
    ):
        export(tmp_path / "run", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


# --- which student, and what the card says ---------------------------------------------------------------------


def card_of(source: Path, out: Path, **which: Any) -> tuple[str, str]:
    """Return (name, card on one line)."""
    name: str = export(source, out, **which)["name"]
    return name, " ".join((out / "README.md").read_text().split())


@pytest.mark.slow
def test_of_a_sweep_the_best_trial_is_taken_and_the_card_says_of_how_many(
    tmp_path: Path, storage: Path
) -> None:
    name, card = card_of(storage / "sweep", tmp_path / "out")
    records = read_records(storage / "sweep")
    value = records[1].last["val_accuracy"]
    assert name == "sweep/t0001-tfkd_self" and value > records[0].last["val_accuracy"]
    assert (
        f"The best of 4 trials of the sweep `sweep` on validation (2 of full length): val_accuracy {value:.4f}"
        in card
    )
    assert f"| val_accuracy | {value:.4f} |" in card
    assert (
        "tfkd tune mine.yaml" in card
        and "/somewhere" not in card
        and f"torch=={torch.__version__[:4]}" in card
    )


@pytest.mark.slow
def test_the_card_has_the_verdict_on_the_trials_configuration(
    tmp_path: Path, storage: Path
) -> None:
    _, card = card_of(storage / "sweep", tmp_path / "out")
    (found,) = json.loads((storage / "arms/confirm.json").read_text())["verdicts"]
    mine = next(c for c in found["candidates"] if c["name"] == "self")
    assert f"**{mine['sentence']}.**" in card and "95 %" in mine["sentence"]
    low, high = (100 * mine["comparisons"][0][end] for end in ("low", "high"))
    assert f"| {low:z.2f} to {high:z.2f} |" in card
    assert "These weights themselves were not judged" in card and "Not confirmed" not in card


@pytest.mark.slow
def test_the_card_names_the_teacher_and_what_is_known_of_it(tmp_path: Path, storage: Path) -> None:
    _, card = card_of(storage / "sweep", tmp_path / "out")
    run = validated(TrainConfig, read_yaml(tmp_path / "out/config.yaml")).teacher_run()
    assert run is not None
    about = json.loads((storage / "teachers" / teacher_name(run) / "teacher.json").read_text())
    assert f"`{teacher_name(run)}`" in card and about["sha256"] in card
    assert f"val_accuracy: {about['metrics']['val_accuracy']:.4f}" in card


@pytest.mark.slow
@pytest.mark.parametrize("loop", [LOOP_VERSION, 2])
def test_the_card_describes_a_teacher_of_before_data_had_digests(
    tmp_path: Path, storage: Path, loop: int
) -> None:
    place = tmp_path / "storage"
    for name in ("sweep", "teachers"):
        shutil.copytree(storage / name, place / name)
    [record] = [r for r in read_records(place / "sweep") if r.name == "t0001-tfkd_self"]
    run = validated(TrainConfig, record.config).teacher_run()
    assert run is not None and run.data.digest is None
    new, old = teacher_name(run), f"mlp-{run.fingerprint(loop)}"
    (place / "teachers" / new).rename(place / "teachers" / old)
    path = place / "teachers" / old / "teacher.json"
    about = {**json.loads(path.read_text()), "name": old, "loop_version": loop}
    path.write_text(json.dumps(about))
    _, card = card_of(place / "sweep", tmp_path / "out")
    assert f"`{old}` (fingerprint `{old[4:]}`)." in card and "Its files are not beside" not in card
    assert about["sha256"] in card


@pytest.mark.slow
def test_another_trial_is_picked_by_hand_and_not_confirmed(tmp_path: Path, storage: Path) -> None:
    name, card = card_of(storage / "sweep/trials/t0000-lsr", tmp_path / "out")
    assert (
        name == "sweep/t0000-lsr"
        and "picked by hand" in card
        and "its best trial is `t0001-tfkd_self`" in card
    )
    assert NOT_CONFIRMED in card


@pytest.mark.slow
def test_a_run_of_a_comparison_is_the_best_candidates_first_seed(
    tmp_path: Path, storage: Path
) -> None:
    name, card = card_of(storage / "arms", tmp_path / "out")
    assert name == "arms/self-s1"
    assert (
        "the first of the 2 candidates of the comparison `arms`, ordered by verdict" in card
        and "Seed 1: the first that was trained to the end" in card
    )
    assert (
        "There is no value on validation, because the run also trained on it." in card
        and "images of train:" in card
    )
    result = json.loads((storage / "arms/confirm.json").read_text())
    values = [
        run["accuracy"] for run in next(a for a in result["arms"] if a["name"] == "self")["runs"]
    ]
    assert f"Test accuracy of this run: {100 * values[0]:.2f} %" in card
    assert f"the mean over all 3 seeds: {100 * sum(values) / 3:.2f} %" in card


@pytest.mark.parametrize(
    ("words", "first"),
    [
        ({"a": "better", "b": "not better"}, "a"),
        ({"a": "cannot tell", "b": "not better"}, "b"),
        ({"a": "better", "b": "better"}, "b"),
        ({"b": "not better"}, "b"),
    ],
)
def test_a_better_arm_goes_first_and_else_the_mean_decides(
    words: dict[str, str], first: str
) -> None:
    means = {"base": 0.99, "a": 0.5, "b": 0.6}
    arms = [
        {"name": n, "role": "baseline" if n == "base" else "candidate", "runs": [{"accuracy": v}]}
        for n, v in means.items()
    ]
    verdicts = [{"candidates": [{"name": n, "verdict": w} for n, w in words.items()]}]
    assert chosen._best_arm({"arms": arms, "verdicts": verdicts}, score_of("val_accuracy")) == first


def test_of_a_comparison_by_nll_the_least_mean_is_best_and_nan_never_is() -> None:
    means = {"base": 0.1, "a": float("nan"), "b": 0.9, "c": 0.6}
    arms = [
        {
            "name": n,
            "role": "baseline" if n == "base" else "candidate",
            "runs": [{"accuracy": v, "nll": v}],
        }
        for n, v in means.items()
    ]
    result: dict[str, Any] = {"arms": arms, "verdicts": []}
    assert chosen._best_arm(result, score_of("val_nll")) == "c"
    assert chosen._best_arm(result, score_of("val_accuracy")) == "b"


@pytest.mark.slow
@pytest.mark.parametrize("by_folder", [False, True], ids=["--arm --seed", "the trial's folder"])
def test_an_arm_and_a_seed_can_be_asked_for(tmp_path: Path, storage: Path, by_folder: bool) -> None:
    asked = {} if by_folder else {"arm": "ce", "seed": 2}
    name, card = card_of(
        storage / "arms" / ("trials/ce-s2" if by_folder else ""), tmp_path / "out", **asked
    )
    assert (
        name == "arms/ce-s2"
        and "Seed 2: picked by hand" in card
        and "No verdict on `ce`: it is a baseline" in card
    )


@pytest.mark.slow
def test_the_front_matter_names_a_licence_or_that_there_is_none(
    tmp_path: Path, storage: Path
) -> None:
    for licence, wanted in (
        (None, {"license": "other", "license_name": "none-given"}),
        ("mit", {"license": "mit"}),
    ):
        out = tmp_path / str(licence)
        export(storage / "run", out, licence=licence)
        front = (out / "README.md").read_text().split("---\n")[1]
        (tmp_path / "front.yaml").write_text(front)
        found = read_yaml(tmp_path / "front.yaml")
        assert {k: v for k, v in found.items() if "license" in k} == wanted
        assert found["pipeline_tag"] == "image-classification" and "ce" in found["tags"]


@pytest.mark.slow
def test_weights_of_another_release_are_exported_with_a_word(tmp_path: Path, storage: Path) -> None:
    shutil.copytree(storage / "run", tmp_path / "run")
    tree = read_yaml(tmp_path / "run/config.yaml")
    write_text(tmp_path / "run/config.yaml", dump_yaml({**tree, "seed": 5}))
    _, card = card_of(tmp_path / "run", tmp_path / "out")
    assert "another release trained them, or a file was changed by hand" in card


# --- damage ----------------------------------------------------------------------------------------------------


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.slow
def test_sha256sum_finds_what_was_changed(tmp_path: Path, storage: Path) -> None:
    export(storage / "run", tmp_path / "out")
    assert is_whole(tmp_path / "out")
    for name in ("student.safetensors", GRAPH):
        _flip(tmp_path / "out" / name)
        assert not is_whole(tmp_path / "out")
        _flip(tmp_path / "out" / name)
    assert is_whole(tmp_path / "out")
    (tmp_path / "out/README.md").unlink()
    assert not is_whole(tmp_path / "out")


# --- wrong input -----------------------------------------------------------------------------------------------


def _unfinished(storage: Path, place: Path) -> Path:
    shutil.copytree(storage / "run", place)
    (place / "student.safetensors").unlink()
    return place


def _unjudged(storage: Path, place: Path) -> Path:
    place.mkdir()
    shutil.copy(storage / "arms/confirm.yaml", place)
    return place


def _without_a_full_trial(storage: Path, place: Path) -> Path:
    shutil.copytree(storage / "sweep", place, ignore=shutil.ignore_patterns("t0000*", "t0001*"))
    return place


def _torn(storage: Path, place: Path) -> Path:
    shutil.copytree(storage / "run", place)
    path = place / "student.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    return place


def _misfit(storage: Path, place: Path) -> Path:
    shutil.copytree(storage / "run", place)
    tree = read_yaml(place / "config.yaml")
    write_text(
        place / "config.yaml", dump_yaml({**tree, "student": {"name": "cnn", "widths": [4, 9]}})
    )
    return place


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "which", "sentence"),
    [
        ("sweeep", {}, "no such folder"),
        ("run/config.yaml", {}, "is a file; name the folder it is in"),
        ("teachers", {}, "has no student: an experiment has experiment.yaml"),
        (
            "sweep",
            {"arm": "ce"},
            "--arm: picks a run of a comparison, and there is no confirm.yaml here",
        ),
        ("run", {"seed": 1}, "--seed: picks a run of a comparison"),
        (
            "sweep/trials/t0002-lsr",
            {},
            "stopped; only a trial of full length has weights to export",
        ),
        (
            "sweep/trials/t0003-ce",
            {},
            "failed: Diverged: train_loss is nan; only a trial of full length",
        ),
        ("arms", {"arm": "sself"}, "--arm: no arm 'sself'; did you mean 'self'?"),
        (
            "arms",
            {"arm": "ce", "seed": 9},
            "--seed: ce with 9: no such seed; trained to the end: 1, 2, 3",
        ),
        (
            "arms",
            {"arm": "slow", "seed": 3},
            "--seed: slow with 3: failed: out; trained to the end: 1, 2",
        ),
        ("run", {"licence": "my licence"}, "--licence: a short name such as apache-2.0"),
        (_unfinished, {}, "not finished: 2 of 2 epochs done, and it has no student.safetensors"),
        (_unjudged, {}, "not finished: it has no confirm.json, so it is not judged yet"),
        (_without_a_full_trial, {}, "no trial of full length yet (2 trials)"),
        (_torn, {}, "damaged: "),
        (_misfit, {}, "its weights do not fit its configuration"),
    ],
    ids=[
        "no folder",
        "a file",
        "no student",
        "arm of a sweep",
        "seed of a run",
        "stopped",
        "failed",
        "no arm",
        "no seed",
        "failed seed",
        "licence",
        "unfinished",
        "unjudged",
        "no full trial",
        "torn weights",
        "misfit weights",
    ],
)
def test_wrong_input_is_a_sentence(
    tmp_path: Path, storage: Path, source: Any, which: dict[str, Any], sentence: str
) -> None:
    place = storage / source if isinstance(source, str) else source(storage, tmp_path / "source")
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        export(place, tmp_path / "out", **which)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("there", ["folder", "file"])
def test_nothing_is_written_over(tmp_path: Path, storage: Path, there: str) -> None:
    out = tmp_path / "out"
    if there == "folder":
        out.mkdir()
        (out / "mine.txt").touch()
    else:
        out.touch()
    with pytest.raises(
        ConfigError, match=f"is {'not empty' if there == 'folder' else 'a file'}; choose another"
    ):
        export(storage / "run", out)


def test_without_the_packages_onnx_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(
        ConfigError, match=r"--onnx: onnxruntime not installed here: pip install 'tfkd_ray\[onnx\]'"
    ):
        export(tmp_path / "nothing", tmp_path / "out", onnx=True)


# --- from Python


def test_a_script_gets_the_best_configuration_and_its_student_with_weights(storage: Path) -> None:
    config = best_config(str(storage / "sweep"))
    winner = best(read_records(storage / "sweep"), "val_accuracy")
    assert winner is not None and config == validated(TrainConfig, winner.config)
    network = load_student(str(storage / "sweep"))
    weights = load_file(winner.folder / "student.safetensors")
    assert all(network.state_dict()[name].equal(value) for name, value in weights.items())
    assert not network.training and all(p.requires_grad for p in network.parameters())
    mean, std = config.data.statistics()
    images = config.data.load()[1].images  # type: ignore[union-attr]
    logits = network((images.float() - mean[0]) / std[0])
    assert logits.shape == (len(images), 10)


def test_the_script_of_the_cookbook_names_the_classes_of_image_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for k in range(20):
        for name, colour in (("red", (200, 20, 0)), ("blue", (0, 20, 200))):
            path = tmp_path / f"photos/{name}/{k}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (20 + k, 30), colour).save(path)
    tree: dict[str, Any] = {
        "data": {"name": "image_folder", "root": str(tmp_path / "photos"), "image_size": 8},
        "student": {"name": "mlp", "hidden": [8]},
        "objective": "ce",
        "epochs": 4,
        "optim": {"lr": 0.05, "batch_size": 4},
        "schedule": "cosine",
    }
    sweep = tmp_path / "tfkd_results/photos"
    write_experiment(sweep, build_space(tree).tree, ["tfkd", "tune", "photos.yaml"])
    config, folder = validated(TrainConfig, tree), sweep / "trials/t0000-ce"
    trained(folder, config, sweep)
    write_record(
        Record(folder, 0, folder.name, "ce", "done", {}, config.model_dump(mode="json"), None)
    )
    page = (ROOT / "docs/cookbook.md").read_text()
    (code,) = re.findall(r"```python\n(# classify.py\n.*?)```", page, re.S)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["classify.py", "photos/red/0.png", "photos/blue/1.png"])
    exec(code, {})
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("photos/red/0.png: red,") and second.startswith("photos/blue/1.png: b")

    val = config.data.load()[1]
    assert isinstance(val, FolderSet)
    mean, std = (torch.tensor(x).view(1, -1, 1, 1) for x in config.data.statistics())
    (pixels,) = val.read([torch.arange(len(val))])
    mine = read_images(config, [val.folder / file for file in val.files])
    assert mine.equal((pixels - mean) / std) and mine.shape[1:] == (3, 8, 8)
    card = "\n".join(
        card_text(chosen.choose(sweep, None, None), {"differences": {}, "problems": {}}, [], None)
    )
    assert '["blue", "red"]' in card


def test_data_without_image_files_say_so_and_their_classes_are_numbers() -> None:
    config = validated(TrainConfig, {"objective": "ce"})
    assert class_names(config) == [str(k) for k in range(10)]
    with pytest.raises(ConfigError, match="data digits: its images do not come from image files"):
        read_images(config, ["3.png"])


def test_a_script_picks_a_run_of_a_comparison(storage: Path) -> None:
    arms = storage / "arms"
    network = load_student(arms, arm="slow")
    run = sorted((arms / "trials").glob("slow-*"))[0]
    weights = load_file(run / "student.safetensors")
    assert all(network.state_dict()[name].equal(value) for name, value in weights.items())


def test_a_script_writes_the_report_with_the_comparisons_that_it_names(
    storage: Path, tmp_path: Path
) -> None:
    sweep, page = str(storage / "sweep"), tmp_path / "r.html"
    assert write_report(sweep, str(page)) == [page]
    assert "not a verdict" in page.read_text() and "slow" not in page.read_text()
    write_report(sweep, page, comparisons=[str(storage / "arms")])
    assert "slow" in page.read_text()


@pytest.mark.parametrize("call", [best_config, load_student, write_report])
def test_a_script_gets_a_sentence_where_there_is_nothing(call: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        call(tmp_path / "nothing")
    assert str(tmp_path / "nothing") in str(error.value) and "no such" in str(error.value)
    with pytest.raises(ConfigError):
        call(str(tmp_path))
