"""SECURITY.md, claim by claim: reading executes nothing, secrets stay secret, ports closed."""

import ast
import contextlib
import functools
import importlib.metadata
import io
import itertools
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import optuna
import psutil
import pytest
import torch
from conftest import ROOT, Run
from packaging.requirements import Requirement
from test_damage import RELEASE, Reached, reads
from test_layers import PACKAGE, parsed
from test_report import make_comparison
from test_storage import postgres  # noqa: F401

import tfkd_ray.run.tune
import tfkd_ray.settings.yaml
from tfkd_ray.cli.main import main
from tfkd_ray.launch.jobs import stage, submit_command
from tfkd_ray.learn.checkpoint import BEFORE, LAST, load_state, save_state
from tfkd_ray.learn.models import Mlp
from tfkd_ray.learn.weights import load_outside
from tfkd_ray.run.tune import resume_tuner
from tfkd_ray.settings.errors import ConfigError
from tfkd_ray.settings.passwords import masked
from tfkd_ray.settings.yaml import dump_yaml, read_yaml
from tfkd_ray.show.export import export
from tfkd_ray.show.tensorboard import side_by_side
from tfkd_ray.store.experiment import read_experiment, read_records

# --- what the package may call -----------------------------------------------------------------------------------

ALL = [
    path.relative_to(PACKAGE).with_suffix("").as_posix() for path in sorted(PACKAGE.rglob("*.py"))
]
RUN_CODE = {"eval", "exec", "compile", "__import__"}
PICKLES = {"cloudpickle", "dill", "joblib", "shelve", "marshal"}


@functools.cache
def calls() -> list[tuple[str, str, ast.Call]]:
    """Return (module, called name as written, call) for the whole package."""
    nodes = [
        (module, node)
        for module in ALL
        for node in ast.walk(parsed(module))
        if isinstance(node, ast.Call)
    ]
    return [(module, ast.unparse(node.func), node) for module, node in nodes]


def keywords(call: ast.Call) -> dict[str | None, str]:
    return {k.arg: ast.unparse(k.value) for k in call.keywords}


@pytest.mark.slow
def test_torch_loads_tensors_and_plain_values_only() -> None:
    loads = [(module, call) for module, name, call in calls() if name == "torch.load"]
    assert {module for module, _ in loads} == {"learn/checkpoint", "learn/weights"}
    assert all(keywords(call).get("weights_only") == "True" for _, call in loads)
    others = {
        "torch.jit.load",
        "torch.hub.load",
        "torch.package.PackageImporter",
        "torch.serialization.add_safe_globals",
    }
    assert not [name for _, name, _ in calls() if name in others]


@pytest.mark.parametrize("version", ["2.9.1", "2.9.1+cu128", "1.13.0"])
def test_an_older_torch_is_refused_before_it_reads_a_file(
    version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pip enforces the lower bound; else an error reports it, and `weights_only` is not trusted."""
    network = Mlp(hidden=(8,))
    save_state(tmp_path, {"epoch": 1})
    torch.save(network.build((1, 8, 8), 10).state_dict(), tmp_path / "w.pt")
    monkeypatch.setattr(torch, "__version__", version)
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: pytest.fail("it was read"))
    sentence = f"torch {re.escape(version)}: .* weights_only=True .*; install torch >= 2.10"
    with pytest.raises(ConfigError, match=sentence):
        load_state(tmp_path)
    with pytest.raises(ConfigError, match=sentence):
        load_outside(str(tmp_path / "w.pt"), network, (1, 8, 8), 10)


@pytest.mark.parametrize("version", ["2.10.0", "2.10.0+cu128", "2.11.0a0+git1234", "3.0"])
def test_a_new_torch_is_not(version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_state(tmp_path, {"epoch": 1})
    monkeypatch.setattr(torch, "__version__", version)
    assert load_state(tmp_path) == {"epoch": 1}


def test_yaml_is_read_by_the_safe_loader_alone() -> None:
    loads = [
        (module, name, call)
        for module, name, call in calls()
        if re.fullmatch(r"yaml\.(\w+_)?load(_all)?", name)
    ]
    assert [
        (module, keywords(call).get("Loader"))
        for module, _, call in loads
        if module != "clusterfile"
    ] == [("settings/yaml", "_Loader")]
    assert all(keywords(call).get("Loader") == "_Loader" for _, _, call in loads)
    assert [base.__name__ for base in tfkd_ray.settings.yaml._Loader.__bases__] == ["SafeLoader"]


@pytest.mark.slow
def test_nothing_is_unpickled_and_no_text_is_run() -> None:
    used = {
        ast.unparse(n)
        for module in ALL
        for n in ast.walk(parsed(module))
        if isinstance(n, ast.Attribute)
    }
    assert {name for name in used if re.match(r"_?pickle\.", name)} == {
        "pickle.Unpickler",
        "pickle.UnpicklingError",
    }
    bases = [
        ast.unparse(b)
        for module in ALL
        for n in ast.walk(parsed(module))
        if isinstance(n, ast.ClassDef)
        for b in n.bases
    ]
    assert bases.count("pickle.Unpickler") == 1  # files.ArraysOnly
    for module in ALL:
        for node in ast.walk(parsed(module)):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.partition(".")[0] for name in names} & PICKLES, module
            assert not (
                isinstance(node, ast.ImportFrom) and node.module in ("pickle", "os", "subprocess")
            ), module
    for module, name, call in calls():
        assert name not in RUN_CODE and name not in ("os.system", "os.popen"), module
        assert keywords(call).get("shell") in (None, "False") and "allow_pickle" not in keywords(
            call
        ), module
    assert {m for m, name, _ in calls() if name == "importlib.import_module"} == {
        "__init__",
        "learn/own",
    }  # the latter: own models


# --- what it stands on -------------------------------------------------------------------------------------------

FREE_OF_ADVISORIES = {
    "ray": "2.60",  # token authentication for `ray.init` since 2.59; CVE-2023-48022 is what whoever has no token tries
    "torch": "2.10",  # CVE-2025-32434, CVE-2026-24747: torch.load ran code even with weights_only
    "tensorboard": "2.21",  # its projector read any file
    "pyyaml": "6.0",  # CVE-2020-14343, before 5.4
    "pydantic": "2.7",  # CVE-2024-3772, before 2.4
    "pillow": "13.0.0",  # CVE-2026-96639, GHSA-5x8w-8jj5-q52h (JPEG); CVE-2026-25990 and others before
    "filelock": "3.20.3",  # CVE-2025-68146, CVE-2026-22701: a link in the place of the lock was followed
    "scikit-learn": "1.5",  # CVE-2024-5206
    "numpy": "1.22",  # CVE-2021-41495, CVE-2021-41496
    "scipy": "1.10",  # CVE-2023-25399, CVE-2023-29824
    "pyarrow": "14.0.1",  # CVE-2023-47248: reading its files ran code
    "accelerate": "1.15",  # CVE-2025-14925, before 1.12; CVE-2026-69112, through 1.14: paths in an index
    "plotly": "6",  # brings plotly.js 3; CVE-2023-46308, before plotly.js 2.25.2
    "onnx": "1.21",  # CVE-2022-25882, CVE-2024-27318, CVE-2026-27489, CVE-2026-34446: files beside the model were read
}
NO_ADVISORY = {  # that we know of, so they have the bound that our use of them needs, or none
    "torchvision",  # its releases go with torch's
    "mkdocs", "mkdocs-material",  # they read our own pages
    "optuna", "statsmodels", "safetensors", "packaging", "rich", "timm", "torchdistill", "matplotlib", "onnxscript", "onnxruntime",
}  # fmt: skip
LISTED = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = {
    extra: lines for extra, lines in LISTED["optional-dependencies"].items() if extra != "dev"
}
REQUIRED = [
    Requirement(line)
    for line in [*LISTED["dependencies"], *(line for lines in EXTRAS.values() for line in lines)]
]


def test_every_dependency_has_a_bound_or_is_named_as_one_without_advisories() -> None:
    """`dev` is left out: those packages read no foreign input."""
    names = {r.name for r in REQUIRED}
    assert (
        names == FREE_OF_ADVISORIES.keys() | NO_ADVISORY
        and not FREE_OF_ADVISORIES.keys() & NO_ADVISORY
    )


@pytest.mark.parametrize("name", FREE_OF_ADVISORIES)
def test_lower_bounds_are_free_of_known_advisories(name: str) -> None:
    (found,) = [r for r in REQUIRED if r.name == name]
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
    """Creates a file when it is unpickled."""

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
    """Return (a storage with bombs in all pickles of the libraries, a bomb's file)."""
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
            "trial_data": [
                [json.dumps({"stub": {"_type": "CLOUDPICKLE_FALLBACK", "value": text}}), text]
            ],
            "runner_data": {},
            "stats": {},
        }
        for name in (
            "experiment_state-2026-01-01_00-00-00.json",
            "search_gen_state-2026-01-01_00-00-00.json",
        ):
            (trials / name).write_text(json.dumps(state))
        for folder in [p for p in trials.iterdir() if p.is_dir()]:
            for name in (
                "params.pkl",
                "checkpoint.pkl",
                ".tune_metadata",
                "error.pkl",
                "checkpoint_000000/data.pkl",
            ):
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
    with (storage / "sweep/study.journal").open(
        "a"
    ) as journal:  # where Optuna's CMA-ES keeps its own
        line = {
            "op_code": 3,
            "worker_id": "x",
            "study_id": 0,
            "system_attr": {"cma:optimizer:0": raw.hex()},
        }
        journal.write(json.dumps(line) + "\n")
    pickle.loads(raw)
    assert boom.exists(), "the bomb is a real one"
    boom.unlink()
    return storage, boom


@pytest.mark.slow
def test_reading_a_poisoned_experiment_runs_nothing(
    poisoned: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    storage, boom = poisoned

    def reached(*args: object, **more: object) -> None:
        raise Reached

    monkeypatch.setattr(tfkd_ray.run.tune, "prepare", reached)
    for name, read in reads(storage, tmp_path / "report.html"):
        try:
            assert read() != 2, (name, capsys.readouterr().err)
        except Reached:
            assert name.startswith("resume")
        assert not boom.exists(), name
    made = export(storage / "sweep", tmp_path / "given")
    assert "student.safetensors" in made["files"] and not boom.exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["experiment.yaml", "confirm.yaml"])
def test_a_yaml_file_that_asks_for_code_is_refused(
    poisoned: tuple[Path, Path], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    storage, boom = poisoned
    folder = storage / ("sweep" if name == "experiment.yaml" else "arms")
    with (folder / name).open("a") as file:
        file.write(
            f"x: !!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path ['{boom}']]\n"
        )
    for verb in ("status", "trials", "report", "best"):
        assert main([verb, str(folder)]) == 2
        assert "not YAML: could not determine a constructor" in capsys.readouterr().err
    assert not boom.exists()


@pytest.mark.slow
@pytest.mark.ray
def test_a_resume_reads_none_of_rays_pickles(ray_cluster: str, poisoned: tuple[Path, Path]) -> None:
    storage, boom = poisoned
    resume_tuner(storage / "sweep", add_trials=1).fit()
    assert [r.number for r in read_records(storage / "sweep")] == list(
        range(9)
    ) and not boom.exists()


def test_cmaes_goes_on_only_with_a_study_of_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its state in the study is a pickle, the only one that a resume would execute."""
    shutil.copytree(RELEASE, tmp_path / "storage", symlinks=True)
    sweep = tmp_path / "storage/sweep"
    about = read_yaml(sweep / "experiment.yaml")
    about["space"]["search"] |= {"sampler": {"name": "cmaes"}, "stopping": {"name": "none"}}
    (sweep / "experiment.yaml").write_text(dump_yaml(about))
    monkeypatch.setattr("os.getuid", lambda: 4321)
    with pytest.raises(
        ConfigError,
        match=r"study.journal is another user's \(0\), and cmaes keeps its state .* which can run code",
    ):
        resume_tuner(sweep, add_trials=1)
    assert (
        "pickle.loads" in Path(optuna.samplers._cmaes.__file__).read_text()
    )  # otherwise the rule is obsolete


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
    assert (
        tfkd("export", "storage/sweep/trials/t0002-ce").returncode == 2 and boom.exists()
    )  # its weights are an MLP's


# --- secrets -----------------------------------------------------------------------------------------------------

CANARIES = {
    "AWS_SECRET_ACCESS_KEY": "canary-aws-5f1c",
    "AWS_SESSION_TOKEN": "canary-session-77aa",
    "AZURE_CLIENT_SECRET": "canary-azure-0b1d",
    "HF_TOKEN": "hf_canary5e2a",
    "WANDB_API_KEY": "canary-wandb-9d3e",
    "RAY_AUTH_TOKEN": "canary0000111122223333444455556666777788889999aaaabbbbccccdddd00",
}
SMALL = """
student: {name: mlp, hidden: [8]}
epochs: 2
objective: [{name: tfkd_reg, alpha: {low: 0.1, high: 0.9}}, ce]
optim: {lr: {low: 0.01, high: 0.5, log: true}}
search: {num_samples: 4, baselines: false, stopping: none}
"""


def places_of(words: dict[str, str], folders: list[Path]) -> list[tuple[str, Path]]:
    """Return (owner of the secret, file) for each place that contains a canary."""
    found = []
    for path in (
        p for folder in folders for p in folder.rglob("*") if p.is_file() and not p.is_symlink()
    ):
        with contextlib.suppress(FileNotFoundError):  # Ray is still ending
            content = path.read_bytes()
            found += [(name, path) for name, word in words.items() if word.encode() in content]
    return found


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.tools
@pytest.mark.timeout(180)
def test_no_secret_is_written_anywhere(
    postgres: str,  # noqa: F811
    tfkd_inside: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A sweep with its own Ray and its storage's password on the command line; then all readers."""
    canaries = CANARIES | {"the storage's password": "s3cret-word"}
    temp = Path(tempfile.mkdtemp(prefix="tfkd-"))  # Ray's, whose logs are searched, too
    env = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "TFKD_STORAGE")}
    env |= CANARIES | {"RAY_TMPDIR": str(temp), "PYTHONUNBUFFERED": "1"}
    (tmp_path / "small.yaml").write_text(SMALL)
    said: list[str] = []
    seen: set[str] = set()

    def run(*words: str) -> None:
        command = [sys.executable, "-m", "tfkd_ray", *words]
        with subprocess.Popen(
            command,
            cwd=tmp_path,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                said.append(line)
                with contextlib.suppress(psutil.Error):
                    seen.add(" ".join(psutil.Process(process.pid).cmdline()))
        assert process.returncode == 0, (words, said[-20:])

    def read(*words: str) -> None:
        done = tfkd_inside(*words)
        said.extend([done.stdout, done.stderr])
        assert done.returncode == 0, (words, said[-2:])

    try:
        run("tune", "small.yaml", "--name", "e", f"search.storage={postgres}")
        for name, word in (CANARIES | {"TFKD_STORAGE": postgres}).items():
            monkeypatch.setenv(name, word)
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
        for verb in ("status", "best", "trials", "report", "export"):
            read(verb, "tfkd_results/e")
        read("ls")
        side_by_side(tmp_path, {"both": tmp_path / "tfkd_results/e"})
        assert (
            read_experiment(tmp_path / "tfkd_results/e")["space"]["search"]["storage"]
            == masked(postgres)
            != postgres
        )
        assert seen and [words for words in seen if "s3cret-word" in words] == [], (
            "Ray lists a driver's command"
        )
        assert [line for line in said for word in canaries.values() if word in line] == []
        assert places_of(canaries, [tmp_path]) == []
        assert places_of(canaries, [temp]) == []
        assert list(temp.rglob("raylet.out")), f"Ray logged elsewhere: {list(temp.iterdir())}"
    finally:
        shutil.rmtree(temp, ignore_errors=True)


def test_a_jobs_metadata_and_files_hold_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, word in CANARIES.items():
        monkeypatch.setenv(name, word)
    home, staged = tmp_path / "home", tmp_path / "staged"
    (home / ".aws").mkdir(parents=True)
    for name in (".env", ".aws/credentials", "notes.txt", "token.txt"):
        (home / name).write_text(
            {"notes.txt": "mine", "token.txt": CANARIES["RAY_AUTH_TOKEN"]}.get(
                name, CANARIES["AWS_SECRET_ACCESS_KEY"]
            )
        )
    staged.mkdir()
    stage(home, staged)
    assert (staged / "notes.txt").exists() and places_of(CANARIES, [staged]) == []
    command = submit_command(
        "http://127.0.0.1:8265", "job", staged, ["python", "-m", "tfkd_ray", "tune"]
    )
    assert not [word for word in CANARIES.values() if any(word in part for part in command)]
    monkeypatch.chdir(home)
    (home / "small.yaml").write_text(SMALL)
    for words in (
        ["search.storage=postgresql://me:pw-canary@db/x"],
        ["search={storage: 'postgresql://me:pw-canary@db/x'}"],
        ["--study-storage", "postgresql://me:pw-canary@db/x"],
    ):
        assert main(["tune", "small.yaml", "--cluster", "local", *words]) == 2
        err = capsys.readouterr().err
        assert "the dashboard shows a job's command" in err and "pw-canary" not in err


# --- ports -------------------------------------------------------------------------------------------------------

TWO_WORKERS = {
    "student": {"name": "mlp", "hidden": [16]}, "objective": "ce", "epochs": 400, "workers": 2,
    "optim": {"lr": {"choices": [0.1, 0.05]}}, "search": {"num_samples": 2, "stopping": "none", "sampler": "random"},
}  # fmt: skip


def allowed() -> dict[str, str]:
    """Return where each kind of process may listen: the table of docs/clusters.md."""
    table = (
        (ROOT / "docs/clusters.md")
        .read_text()
        .partition("| process | listens on |")[2]
        .partition("\n\n")[0]
    )
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]
    ]
    return {row[0].strip("`"): row[1] for row in rows}


def may(kind: str, host: str, port: int) -> bool:
    """Return True if a process of this kind may listen there."""
    where = allowed().get(kind, "").split(", ")
    loopback = host in ("127.0.0.1", "::1", "::ffff:127.0.0.1")
    return "all" in where or str(port) in where or ("loopback" in where and loopback)


def kind_of(process: psutil.Process) -> str:
    """Return a process's name in the table, by its title, file, script or module."""
    words = process.cmdline()
    title = words[0].split()[0] if words and words[0].strip() else ""
    if title.startswith("ray::"):
        return title if title in allowed() else "worker"
    names = [Path(word).name for word in words if not word.startswith("--")][:4]
    return next((kind for kind in allowed() if kind in names), " ".join(names))


def listening(root: psutil.Process) -> set[tuple[str, str, int]]:
    """Return (kind of process, address, port) of a driver's and its children's open sockets."""
    found = set()
    for process in [root, *root.children(recursive=True)]:
        with contextlib.suppress(psutil.Error):
            kind = "driver" if process == root and root.cmdline()[1] != "-m" else kind_of(process)
            sockets = [c for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN]
            found |= {(kind, c.laddr.ip, c.laddr.port) for c in sockets}
    return found


@pytest.mark.ray
@pytest.mark.cluster
@pytest.mark.timeout(180)
def test_no_port_is_open_that_is_not_named(tmp_path: Path) -> None:
    """A sweep of trials with two workers on an own Ray, with its dashboard, and TensorBoard."""
    plan = json.dumps({"space": TWO_WORKERS, "kill": []})
    shutil.copytree(RELEASE, tmp_path / "storage", symlinks=True)
    board = [
        sys.executable,
        "-m",
        "tfkd_ray",
        "tensorboard",
        str(tmp_path / "storage/sweep"),
        "--port",
        "0",
    ]
    driver = [
        sys.executable,
        str(ROOT / "tests/sweep_under_fire.py"),
        str(tmp_path / "own"),
        "2",
        plan,
    ]
    seen: set[tuple[str, str, int]] = set()
    with (
        subprocess.Popen(board, stderr=subprocess.PIPE) as shown,
        subprocess.Popen(driver, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as sweep,
    ):
        try:
            while sweep.poll() is None:
                start = time.monotonic()
                for process in (shown, sweep):
                    with contextlib.suppress(psutil.Error):
                        seen |= listening(psutil.Process(process.pid))
                time.sleep(0.2 + 3 * (time.monotonic() - start))  # the sweep needs the cores
            assert sweep.stdout is not None and b'"done"' in sweep.stdout.read()
        finally:  # or leaving would wait for ever
            shown.terminate()
            sweep.terminate()
    # a process has no command line while it ends or changes its title; its socket is found before
    # or after, with its name
    nameless = {found for found in seen if not found[0]}
    seen -= nameless
    assert {found[1:] for found in nameless} <= {found[1:] for found in seen}, sorted(nameless)
    kinds = {kind for kind, _, _ in seen}
    assert kinds >= {"tfkd_ray", "gcs_server", "raylet", "dashboard.py", "worker", "driver"}, kinds
    assert not [found for found in seen if not may(*found)], sorted(seen)


LOOPBACK = {"127.0.0.1", "::1", "localhost"}


def served_at(call: ast.Call, name: str) -> str | None:
    """Return the host, as written, that a call binds to or serves at; None if it does neither."""
    last, given = name.rpartition(".")[2], keywords(call)
    server = last.endswith(("Server", "HTTPServer")) or last in (
        "create_server",
        "start_server",
        "run_server",
        "serve",
    )
    if last in ("bind", "bind_tcp") and call.args and isinstance(call.args[0], ast.Tuple):
        return ast.unparse(call.args[0].elts[0])
    if last == "bind" and call.args and isinstance(call.args[0], ast.Name | ast.Attribute):
        return ast.unparse(call.args[0])
    if server:
        first = call.args[0] if call.args else None
        return given.get("host") or ast.unparse(
            first.elts[0]
            if isinstance(first, ast.Tuple) and first.elts
            else first or ast.Constant("")
        )
    return None


@pytest.mark.slow
def test_our_own_code_binds_to_loopback_alone() -> None:
    """Check every bind or serve call in the package; TensorBoard and Ray get options."""
    places = [(module, served_at(call, name)) for module, name, call in calls()]
    hosts = [(module, host) for module, host in places if host is not None]
    # TensorBoard's server has its own `--host`, which is looked at below
    hosts = [(module, host) for module, host in hosts if module != "show/board"]
    assert {module for module, _ in hosts} == {"cli/show", "launch/verbs", "show/follow"}, hosts
    assert all(host.strip("'") in LOOPBACK for _, host in hosts), hosts
    for module in ALL:
        words = [
            n.value
            for n in ast.walk(parsed(module))
            if isinstance(n, ast.Constant) and isinstance(n.value, str)
        ]
        for word in ("0.0.0.0", "::", "[::]"):
            assert word not in words, module
        lists = [n.elts for n in ast.walk(parsed(module)) if isinstance(n, ast.List | ast.Tuple)]
        for elements in lists:
            for option, host in itertools.pairwise(elements):
                if isinstance(option, ast.Constant) and option.value in (
                    "--host",
                    "--bind_all",
                    "--dashboard-host",
                ):
                    assert ast.unparse(host).strip("'") in LOOPBACK, (module, ast.unparse(host))
        for call in (n for n in ast.walk(parsed(module)) if isinstance(n, ast.Call)):
            for option in ("host", "dashboard_host", "bind_all"):
                host = keywords(call).get(option, "'localhost'").strip("'")
                assert host in LOOPBACK or not _starts_a_server(call), (module, ast.unparse(call))


def _starts_a_server(call: ast.Call) -> bool:
    return (
        ast.unparse(call.func) in ("ray.init", "board.configure")
        or served_at(call, ast.unparse(call.func)) is not None
    )


@pytest.mark.parametrize(
    "code, host",
    [
        ("s.bind(('0.0.0.0', 1))", "'0.0.0.0'"), ("s.bind(('', 1))", "''"), ("s.bind(address)", "address"),
        ("socket.create_server(('::', 1))", "'::'"), ("http.server.HTTPServer(('', 1), H)", "''"),
        ("asyncio.start_server(f, host='0.0.0.0')", "'0.0.0.0'"), ("inspect.signature(f).bind('train', **args)", None),
        ("s.connect(('10.0.0.1', 1))", None),
    ],
)  # fmt: skip
def test_what_binds_is_seen(code: str, host: str | None) -> None:
    (call,) = [n for n in ast.walk(ast.parse(code, mode="eval")) if isinstance(n, ast.Call)][:1]
    assert served_at(call, ast.unparse(call.func)) == host


def test_the_table_of_ports_is_read_as_it_is_meant() -> None:
    assert {
        "gcs_server",
        "raylet",
        "worker",
        "driver",
        "dashboard.py",
        "tfkd_ray",
    } <= allowed().keys()
    assert (
        may("raylet", "::", 6380)
        and may("dashboard.py", "127.0.0.1", 8265)
        and may("dashboard.py", "0.0.0.0", 44227)
    )
    assert not may("dashboard.py", "0.0.0.0", 8265) and not may("tfkd_ray", "0.0.0.0", 6006)
    assert not may("sshd", "127.0.0.1", 22) and not may("", "127.0.0.1", 1)
