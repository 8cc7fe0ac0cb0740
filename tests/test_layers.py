"""Imports point one way, and the light commands stay light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import tfkd_ray

PACKAGE = Path(tfkd_ray.__file__).parent

# from the bottom: a module may import those of the rows before it, and the earlier ones of its own row
ORDER = [
    "passwords", "files", "schema", "own_code", "calibration", "scores", "verdict", "auth", "experiment", "remote",
    "storage", "assignment",
    "images",
    "objectives", "data", "blocks", "models", "augment",
    "config",
    "checkpoint", "evaluate", "soft_labels", "search_config", "ranges", "space", "relate",
    "explain", "readers", "receipt", "report",
    "loop", "weights", "plan", "clusterfile", "jobs",
    "teachers",
    "arms", "export",
    "cluster", "listener", "search", "tensorboard", "live", "trial", "nodes",
    "callbacks", "tune", "doctor",
    "confirm",
    "cluster_verbs",
    "cli",
    "__main__",
]  # fmt: skip
RAY = {
    "cluster", "clusterfile", "listener", "search", "tensorboard", "trial", "callbacks", "tune", "confirm", "doctor", "nodes"
}  # fmt: skip


def imports(module: str) -> list[tuple[str, bool]]:
    """(imported module, whether at the top of the file)."""
    tree = ast.parse((PACKAGE / f"{module}.py").read_text())
    found = []
    for node in ast.walk(tree):
        top = node in tree.body
        if isinstance(node, ast.Import):
            found += [(alias.name, top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"tfkd_ray.{a.name}" for a in node.names] if node.module == "tfkd_ray" else [node.module]
            found += [(name, top) for name in names]
    return found


def test_every_module_has_its_place() -> None:
    assert {p.stem for p in PACKAGE.glob("*.py")} - {"__init__"} == set(ORDER)


@pytest.mark.parametrize("module", ORDER)
def test_imports_point_down(module: str) -> None:
    below = ORDER[: ORDER.index(module)]
    for name, _ in imports(module):
        parts = name.split(".")
        if parts[0] == "tfkd_ray" and len(parts) > 1 and parts[1] != "__version__":
            assert parts[1] in below, f"{module} imports {name}"
        if parts[0] == "ray":
            assert module in RAY, f"{module} imports {name}"


def test_one_place_asks_whether_a_path_is_a_mirror_and_buckets_are_behind_the_storage() -> None:
    texts = {m: (PACKAGE / f"{m}.py").read_text() for m in ORDER if m != "remote"}
    assert {m: text.count("store_of(") for m, text in texts.items() if "store_of" in text} == {"storage": 1}
    # the sweep's uploads are the other part of a bucket that lasts as long as its driver
    assert {m for m in texts for name, _ in imports(m) if name == "tfkd_ray.remote"} <= {"storage", "callbacks"}


def test_only_a_range_knows_its_scale() -> None:
    for module in set(ORDER) - {"ranges"}:
        names = {
            n.attr for n in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text())) if isinstance(n, ast.Attribute)
        }
        assert "log_complement" not in names, f"{module} asks a range for its scale; Range.place, at and shown answer"


def test_contributing_says_where_every_module_is_changed() -> None:
    table = (PACKAGE.parent / "CONTRIBUTING.md").read_text().partition("## The shape of the code")[0]
    assert [m for m in ORDER if m != "__main__" and f"`{m}.py`" not in table] == []


def test_public_names_are_there() -> None:
    assert all(getattr(tfkd_ray, name) is not None for name in tfkd_ray.__all__)
    with pytest.raises(AttributeError, match="no attribute 'tran'"):
        _ = tfkd_ray.tran


@pytest.mark.parametrize("command", ["--help", "--version"])
def test_help_imports_neither_torch_nor_ray(command: str) -> None:
    code = (
        "import sys; from tfkd_ray.cli import main\n"
        f"try: main(['{command}'])\nexcept SystemExit: pass\n"
        "assert not {'torch', 'ray', 'optuna', 'yaml'} & set(sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


EXPERIMENT = next((Path(__file__).parent / "data").rglob("experiment.yaml")).parent


@pytest.mark.parametrize(
    "command",
    [
        ["check", "digits_tfkd"],
        ["plan", "digits_tfkd"],
        ["explain", "digits_tfkd"],
        ["status", str(EXPERIMENT)],
        ["best", str(EXPERIMENT)],
        ["trials", str(EXPERIMENT)],
        ["logs", str(EXPERIMENT), "0"],
        ["ls", "--storage", str(EXPERIMENT.parent)],
        ["report", str(EXPERIMENT), "-o", "page.html"],
    ],
    ids=lambda command: command[0],
)
def test_looking_imports_neither_torch_nor_ray(command: list[str], tmp_path: Path) -> None:
    """Import of torch alone takes a second and 600 MB. Over an experiment of the first release."""
    code = (
        "import sys; from tfkd_ray.cli import main\n"
        f"assert main({command!r}) == 0\n"
        "assert not {'torch', 'ray', 'optuna'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
