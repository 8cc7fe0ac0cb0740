"""The tables of benchmarks/omniglot.py, from made-up comparisons."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from safetensors.numpy import save_file

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
IMAGES = 968


@pytest.fixture(scope="module")
def said() -> ModuleType:
    """Load benchmarks/omniglot.py."""
    sys.path.insert(0, str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("omniglot_said", BENCHMARKS / "omniglot.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path.remove(str(BENCHMARKS))
    return module


def compare(storage: Path, stage: str, arms: dict[str, list[int]], teacher: int = 0) -> None:
    """Write a comparison of arms: for each of its seeds, how many of the first images it gets right."""
    listed = []
    for name, right in arms.items():
        runs = []
        for seed, count in enumerate(right, 1001):
            logits = np.zeros((IMAGES, 2), np.float32)
            logits[:, 1] = np.where(np.arange(IMAGES) < count, 1, -1)
            arrays = {"logits": logits, "labels": np.ones(IMAGES, np.int64)}
            if teacher:
                arrays["teacher"] = (np.arange(IMAGES) < teacher).astype(np.int64)
            folder = storage / stage / "trials" / f"{name}-s{seed}"
            folder.mkdir(parents=True)
            save_file(arrays, folder / "test.safetensors")
            runs.append({"seed": seed, "accuracy": count / IMAGES, "nll": 1.0, "ece": 0.1})
        listed.append({"name": name, "objective": {"name": name.split("-")[-1]}, "runs": runs})
    (storage / stage / "confirm.json").write_text(json.dumps({"arms": listed}))


def test_a_claim_is_supported_not_supported_or_open_by_its_interval(
    said: ModuleType, tmp_path: Path
) -> None:
    compare(
        tmp_path, "free", {"ce": [800, 804, 802], "lsr": [820, 825, 821], "reg": [803, 801, 802]}
    )
    text = "\n".join(said.tables(tmp_path))
    rows = {line.split("  ")[0]: line for line in text.splitlines()}
    assert rows["label smoothing beats plain training"].endswith("  supported")
    assert rows["Tf-KD_reg beats label smoothing"].endswith("not supported")
    assert rows["Tf-KD_reg beats plain training"].endswith("cannot tell")
    assert rows["normal KD beats plain training"].endswith("not run yet")
    assert "Network B" not in text and "twins" not in text


def test_twins_tie_if_their_interval_has_0_in_it(said: ModuleType, tmp_path: Path) -> None:
    arms = {"ce": [800, 804, 802], "rerun-ce-scaled": [700, 702, 705]}
    arms |= {"rerun-ce-lr-wd": [701, 702, 703], "rerun-reg-code": [650, 652, 651]}
    compare(tmp_path, "scale", arms | {"rerun-lsr-scaled": [660, 662, 663]})
    text = "\n".join(said.tables(tmp_path))
    rows = [line for line in text.splitlines() if line.startswith("twins")]
    assert rows[0].endswith("  tie") and rows[1].endswith("do not tie")
    assert "canonical" in text and rows[2].endswith("not run yet")


def test_the_arms_of_patient_are_found_by_their_objective(said: ModuleType, tmp_path: Path) -> None:
    compare(tmp_path, "confirm-patient", {"t0007-kd": [810, 812], "t0003-ce": [800, 803]})
    text = "\n".join(said.tables(tmp_path))
    assert "patient-kd" in text and "patient KD beats tuned ce on its recipe" in text


@pytest.mark.slow
@pytest.mark.long
def test_the_curve_of_poor_teachers_is_drawn_over_their_test_accuracy(
    said: ModuleType, tmp_path: Path
) -> None:
    compare(tmp_path, "free", {"ce": [800, 804, 802]})
    compare(tmp_path, "taught", {"kd": [820, 825, 821]}, teacher=900)
    curve = {f"dekd-{stop}": [700 + stop, 705 + stop, 706 + stop] for stop in said.STOPS}
    compare(tmp_path, "curve", curve, teacher=484)
    found = said.ended(tmp_path, said.NETWORK_A)
    assert said.taught_by(found["dekd-1"]) == 50
    assert np.isnan(said.taught_by(found["ce"]))
    said.draw_curve(tmp_path, tmp_path / "one.svg")
    said.draw_curve(tmp_path, tmp_path / "two.svg")
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()
