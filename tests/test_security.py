"""SECURITY.md, claim by claim: nothing is executed by reading it, no secret is written, no port is open that is not named."""

import ast
import importlib.metadata
import io
import json
import pickle
import re
import shutil
import tomllib
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import optuna
import pytest
import torch
from conftest import ROOT, Run
from packaging.requirements import Requirement
from test_damage import RELEASE, Reached, reads
from test_layers import ORDER, PACKAGE
from test_report import make_comparison

import tfkd_ray.tune
from tfkd_ray.checkpoint import BEFORE, LAST, save_state
from tfkd_ray.cli import main
from tfkd_ray.experiment import read_records
from tfkd_ray.export import export
from tfkd_ray.schema import ConfigError, dump_yaml, read_yaml
from tfkd_ray.tune import resume_tuner

# --- what the package may call -----------------------------------------------------------------------------------

TREES = {module: ast.parse((PACKAGE / f"{module}.py").read_text()) for module in [*ORDER, "__init__"]}
RUN_CODE = {"eval", "exec", "compile", "__import__"}
PICKLES = {"cloudpickle", "dill", "joblib", "shelve", "marshal"}


def calls() -> list[tuple[str, str, ast.Call]]:
    """(module, what is called as it is written, the call) of the whole package."""
    nodes = [(module, node) for module, tree in TREES.items() for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [(module, ast.unparse(node.func), node) for module, node in nodes]


def keywords(call: ast.Call) -> dict[str | None, str]:
    return {k.arg: ast.unparse(k.value) for k in call.keywords}


def test_torch_loads_tensors_and_plain_values_only() -> None:
    loads = [(module, call) for module, name, call in calls() if name == "torch.load"]
    assert {module for module, _ in loads} == {"checkpoint", "weights"}
    assert all(keywords(call).get("weights_only") == "True" for _, call in loads)
    others = {
        "torch.jit.load",
        "torch.hub.load",
        "torch.package.PackageImporter",
        "torch.serialization.add_safe_globals",
    }
    assert not [name for _, name, _ in calls() if name in others]


def test_yaml_is_read_by_the_safe_loader_alone() -> None:
    loads = [(module, name, call) for module, name, call in calls() if re.fullmatch(r"yaml\.(\w+_)?load(_all)?", name)]
    assert [(module, keywords(call).get("Loader")) for module, _, call in loads if module != "clusterfile"] == [
        ("schema", "_Loader")
    ]
    assert all(keywords(call).get("Loader") == "_Loader" for _, _, call in loads)
    from tfkd_ray.schema import _Loader

    assert [base.__name__ for base in _Loader.__bases__] == ["SafeLoader"]


def test_nothing_is_unpickled_and_no_text_is_run() -> None:
    used = {ast.unparse(n) for tree in TREES.values() for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    assert {name for name in used if re.match(r"_?pickle\.", name)} == {"pickle.Unpickler", "pickle.UnpicklingError"}
    bases = [
        ast.unparse(b)
        for tree in TREES.values()
        for n in ast.walk(tree)
        if isinstance(n, ast.ClassDef)
        for b in n.bases
    ]
    assert bases.count("pickle.Unpickler") == 1  # files.ArraysOnly
    for module, tree in TREES.items():
        for node in ast.walk(tree):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.partition(".")[0] for name in names} & PICKLES, module
            assert not (isinstance(node, ast.ImportFrom) and node.module in ("pickle", "os", "subprocess")), module
    for module, name, call in calls():
        assert name not in RUN_CODE and name not in ("os.system", "os.popen"), module
        assert keywords(call).get("shell") in (None, "False") and "allow_pickle" not in keywords(call), module
    assert {m for m, name, _ in calls() if name == "importlib.import_module"} == {
        "__init__",
        "data",
    }  # the latter: own models


# --- what it stands on -------------------------------------------------------------------------------------------

FREE_OF_ADVISORIES = {
    "ray": "2.60",  # token authentication for `ray.init` since 2.59; CVE-2023-48022 is what whoever has no token tries
    "torch": "2.10",  # CVE-2025-32434, CVE-2026-24747: torch.load ran code even with weights_only
    "tensorboard": "2.21",  # its projector read any file
    "pyyaml": "6.0",  # CVE-2020-14343, before 5.4
    "pydantic": "2.7",  # CVE-2024-3772, before 2.4
    "pillow": "12.1.1",  # CVE-2026-25990; CVE-2024-28219 and others before
    "filelock": "3.20.3",  # CVE-2025-68146, CVE-2026-22701: a link in the place of the lock was followed
    "scikit-learn": "1.5",  # CVE-2024-5206
}


@pytest.mark.parametrize("name", FREE_OF_ADVISORIES)
def test_lower_bounds_are_free_of_known_advisories(name: str) -> None:
    listed = [Requirement(r) for r in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]]
    (found,) = [r for r in listed if r.name == name]
    (bound,) = [s for s in found.specifier if s.operator == ">="]
    assert Requirement(f"x>={FREE_OF_ADVISORIES[name]}").specifier.contains(bound.version)
    assert found.specifier.contains(importlib.metadata.version(name))
    pinned = re.search(rf"(?mi)^{re.escape(name)}==(\S+)$", (ROOT / "constraints.txt").read_text())
    assert pinned is not None and found.specifier.contains(pinned[1])


def test_the_pinned_versions_name_no_host_and_no_index() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert all(re.fullmatch(r"#.*|[\w.\-]+==[\w.+]+", line) for line in lines)
    assert not any("://" in line for line in lines)


# --- poisoned experiments ----------------------------------------------------------------------------------------


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def torch_bytes(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


@pytest.fixture
def poisoned(tmp_path: Path) -> tuple[Path, Path]:
    """(a storage with a bomb wherever Ray, torch, numpy or Optuna keep pickles, the file that one makes)."""
    storage, boom = tmp_path / "storage", tmp_path / "boom"
    shutil.copytree(RELEASE, storage, symlinks=True)
    make_comparison(storage / "arms")
    bomb = Bomb(boom)
    raw, text = pickle.dumps(bomb), cloudpickle.dumps(bomb).hex()
    array = io.BytesIO()
    np.save(array, np.array([bomb], dtype=object), allow_pickle=True)
    for experiment in (storage / "sweep", storage / "arms"):
        trials = experiment / "trials"
        for name in ("tuner.pkl", "trainable.pkl", "searcher-state-2026-01-01_00-00-00.pkl", "scheduler-state-1.pkl",
                     "search_gen_state-2026-01-01_00-00-00.pkl", "callbacks-state.pkl", "tuner_params.pkl"):  # fmt: skip
            (trials / name).write_bytes(raw)
        state = {
            "trial_data": [[json.dumps({"stub": {"_type": "CLOUDPICKLE_FALLBACK", "value": text}}), text]],
            "runner_data": {},
            "stats": {},
        }
        for name in ("experiment_state-2026-01-01_00-00-00.json", "search_gen_state-2026-01-01_00-00-00.json"):
            (trials / name).write_text(json.dumps(state))
        for folder in [p for p in trials.iterdir() if p.is_dir()]:
            for name in ("params.pkl", "checkpoint.pkl", ".tune_metadata", "error.pkl", "checkpoint_000000/data.pkl"):
                (folder / name).parent.mkdir(exist_ok=True)
                (folder / name).write_bytes(raw)
            for name in ("student.pt", "student.pth", "model.bin"):
                (folder / name).write_bytes(torch_bytes(bomb))
            (folder / "logits.npy").write_bytes(array.getvalue())
            save_state(folder, {"epoch": bomb})
            save_state(folder, {"epoch": bomb})
            assert (folder / LAST).exists() and (folder / BEFORE).exists()
    for folder in (storage / "teachers").iterdir():
        (folder / "student.pt").write_bytes(torch_bytes(bomb))
        save_state(folder, {"epoch": bomb})
    with (storage / "sweep/study.journal").open("a") as journal:  # where Optuna's CMA-ES keeps its own
        line = {"op_code": 3, "worker_id": "x", "study_id": 0, "system_attr": {"cma:optimizer:0": raw.hex()}}
        journal.write(json.dumps(line) + "\n")
    pickle.loads(raw)
    assert boom.exists(), "the bomb is a real one"
    boom.unlink()
    return storage, boom


@pytest.mark.slow
def test_reading_a_poisoned_experiment_runs_nothing(
    poisoned: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    storage, boom = poisoned

    def reached(config: object) -> None:
        raise Reached

    monkeypatch.setattr(tfkd_ray.tune, "prepare", reached)
    for name, read in reads(storage, tmp_path / "report.html"):
        try:
            assert read() != 2, (name, capsys.readouterr().err)
        except Reached:
            assert name.startswith("resume")
        assert not boom.exists(), name
    made = export(storage / "sweep", tmp_path / "given")
    assert "student.safetensors" in made["files"] and not boom.exists()


@pytest.mark.parametrize("name", ["experiment.yaml", "confirm.yaml"])
def test_a_yaml_file_that_asks_for_code_is_refused(
    poisoned: tuple[Path, Path], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    storage, boom = poisoned
    folder = storage / ("sweep" if name == "experiment.yaml" else "arms")
    with (folder / name).open("a") as file:
        file.write(f"x: !!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path ['{boom}']]\n")
    for verb in ("status", "trials", "report", "best"):
        assert main([verb, str(folder)]) == 2
        assert "not YAML: could not determine a constructor" in capsys.readouterr().err
    assert not boom.exists()


@pytest.mark.slow
@pytest.mark.ray
def test_a_resume_reads_none_of_rays_pickles(ray_cluster: str, poisoned: tuple[Path, Path]) -> None:
    storage, boom = poisoned
    resume_tuner(storage / "sweep", add_trials=1).fit()
    assert [r.number for r in read_records(storage / "sweep")] == list(range(9)) and not boom.exists()


def test_cmaes_goes_on_only_with_a_study_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its state is a pickle in the study: the one place where going on with an experiment would run what is in it."""
    shutil.copytree(RELEASE, tmp_path / "storage", symlinks=True)
    sweep = tmp_path / "storage/sweep"
    about = read_yaml(sweep / "experiment.yaml")
    about["space"]["search"] |= {"sampler": {"name": "cmaes"}, "stopping": {"name": "none"}}
    (sweep / "experiment.yaml").write_text(dump_yaml(about))
    monkeypatch.setattr("os.getuid", lambda: 4321)
    with pytest.raises(
        ConfigError, match=r"study.journal is another user's \(0\), and cmaes keeps its state .* which runs as code"
    ):
        resume_tuner(sweep, add_trials=1)
    assert "pickle.loads" in Path(optuna.samplers._cmaes.__file__).read_text()  # else the rule can go


OWN = """
from pathlib import Path
Path({boom!r}).touch()
import torch
def small(shape, num_classes): return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, num_classes))
"""


def test_reading_imports_no_model_of_ones_own_and_training_does(tmp_path: Path, tfkd: Run) -> None:
    shutil.copytree(RELEASE, tmp_path / "storage", symlinks=True)
    boom = tmp_path / "boom"
    (tmp_path / "their_nets.py").write_text(OWN.format(boom=str(boom)))
    student = {"name": "own", "path": "their_nets:small", "args": {}}
    about = read_yaml(tmp_path / "storage/sweep/experiment.yaml")
    about["space"]["student"] = student
    (tmp_path / "storage/sweep/experiment.yaml").write_text(dump_yaml(about))
    for path in (tmp_path / "storage/sweep/trials").glob("*/trial.json"):
        trial = json.loads(path.read_text())
        path.write_text(json.dumps(trial | {"config": trial["config"] | {"student": student}}))
    for argv in (["status"], ["best"], ["trials"], ["logs"], ["report"]):
        done = tfkd(*argv, "storage/sweep", *(["0"] if argv == ["logs"] else []))
        assert done.returncode == 0 and not boom.exists(), (argv, done.stderr)
    assert tfkd("export", "storage/sweep/trials/t0002-ce").returncode == 2 and boom.exists()  # its weights are an MLP's
