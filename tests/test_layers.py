"""Imports point down through nine folders, and the light commands stay light."""

import ast
import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest

import tfkd_ray

PACKAGE = Path(tfkd_ray.__file__).parent
FOLDERS = ["settings", "verdict", "store", "learn", "space", "show", "run", "launch", "cli"]
"""From the bottom: a module imports those of its own folder and of the folders before it."""
RAY = {"show/listener", "show/tensorboard"}
"""Modules outside of `run` that know Ray, and those of `launch`."""
LIGHT = {"settings", "verdict", "store"}
"""Folders that know neither torch nor Ray."""
MODULES = [
    path.relative_to(PACKAGE).with_suffix("").as_posix()
    for path in sorted(PACKAGE.glob("*/*.py"))
    if path.stem != "__init__"
]


@functools.cache
def parsed(module: str) -> ast.Module:
    return ast.parse((PACKAGE / f"{module}.py").read_text())


def imports(module: str) -> set[str]:
    """Return the dotted names that a module imports, at its top and in its functions."""
    found = set()
    for node in ast.walk(parsed(module)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def own(module: str) -> set[str]:
    """Return the modules of this package that a module imports, as `folder/module`."""
    names = {
        name.removeprefix("tfkd_ray.").replace(".", "/")
        for name in imports(module)
        if name.startswith("tfkd_ray.")
    }
    return {name for name in names if name in MODULES}


def test_every_module_is_in_one_of_nine_folders() -> None:
    assert {path.stem for path in PACKAGE.glob("*.py")} == {"__init__", "__main__"}
    assert {module.partition("/")[0] for module in MODULES} == set(FOLDERS)


@pytest.mark.slow
def test_imports_point_down() -> None:
    up = [
        f"{module} imports {name}"
        for module in MODULES
        for name in own(module)
        if FOLDERS.index(name.partition("/")[0]) > FOLDERS.index(module.partition("/")[0])
    ]
    assert up == []


def test_no_imports_go_in_circles() -> None:
    todo = {module: own(module) - {module} for module in MODULES}
    while ready := [module for module, needs in todo.items() if not needs & todo.keys()]:
        for module in ready:
            del todo[module]
    assert todo == {}


def test_only_some_folders_know_torch_or_ray() -> None:
    for module in MODULES:
        folder = module.partition("/")[0]
        known = {name.partition(".")[0] for name in imports(module)}
        assert "ray" not in known or folder in ("run", "launch") or module in RAY, module
        assert folder not in LIGHT or "torch" not in known, module


def test_every_folder_says_what_lives_there() -> None:
    for folder in FOLDERS:
        tree = ast.parse((PACKAGE / folder / "__init__.py").read_text())
        said = " ".join((ast.get_docstring(tree) or "").split())
        assert "Begin with" in said and re.search(r"may import|knows neither", said), folder


def test_no_name_means_two_things() -> None:
    homes: dict[str, list[str]] = {}
    for module in MODULES:
        for name in sorted(defined(parsed(module))):
            homes.setdefault(name, []).append(module)
    assert {name: found for name, found in homes.items() if len(found) > 1} == {}


def defined(tree: ast.Module) -> set[str]:
    """Return the names that a module defines at its top."""
    found = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.add(node.target.id)
        elif isinstance(node, ast.Assign):
            found |= {
                name.id
                for target in node.targets
                for name in ast.walk(target)
                if isinstance(name, ast.Name)
            }
    return found


def test_no_conditional_expression_holds_another() -> None:
    nested = [
        f"{module}:{node.lineno}"
        for module in MODULES
        for node in ast.walk(parsed(module))
        if isinstance(node, ast.IfExp)
        and (isinstance(node.body, ast.IfExp) or isinstance(node.orelse, ast.IfExp))
    ]
    assert nested == []


def test_sentences_go_to_standard_error_in_one_way() -> None:
    """So that their lines end at a space on a terminal; Rich draws by consoles of its own."""
    sources = {module: (PACKAGE / f"{module}.py").read_text() for module in MODULES}
    told = [name for name, text in sources.items() if ", file=sys.stderr" in " ".join(text.split())]
    assert told == ["settings/columns"]


def test_contributing_says_where_every_module_is_changed() -> None:
    table = (
        (PACKAGE.parent / "CONTRIBUTING.md").read_text().partition("## The shape of the code")[0]
    )
    assert [module for module in MODULES if f"`{module}.py`" not in table] == []


def test_public_names_are_there() -> None:
    assert all(getattr(tfkd_ray, name) is not None for name in tfkd_ray.__all__)
    with pytest.raises(AttributeError, match="no attribute 'tran'"):
        _ = tfkd_ray.tran


@pytest.mark.parametrize("command", ["--help", "--version"])
def test_help_imports_neither_torch_nor_ray(command: str) -> None:
    code = (
        "import sys; from tfkd_ray.cli.main import main\n"
        f"try: main(['{command}'])\nexcept SystemExit: pass\n"
        "assert not {'torch', 'ray', 'optuna', 'yaml'} & set(sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


EXPERIMENT = next((Path(__file__).parent / "data").rglob("experiment.yaml")).parent
LOOKING = [
    ["check", "digits_tfkd"],
    ["plan", "digits_tfkd"],
    ["explain", "digits_tfkd"],
    ["status", str(EXPERIMENT)],
    ["best", str(EXPERIMENT)],
    ["trials", str(EXPERIMENT)],
    ["logs", str(EXPERIMENT), "0"],
    ["ls", "--storage", str(EXPERIMENT.parent)],
    ["report", str(EXPERIMENT), "-o", "page.html"],  # the last: it alone may import SciPy's
]


@pytest.mark.slow
def test_looking_imports_neither_torch_nor_ray(tmp_path: Path) -> None:
    """On a first-release experiment: importing torch alone takes a second and 600 MB.

    SciPy's statistics take half a second and 60 MB.
    """
    code = (
        "import sys; from tfkd_ray.cli.main import main\n"
        f"for command in {LOOKING!r}:\n"
        "    assert main(command) == 0, command\n"
        "    assert not {'torch', 'ray', 'optuna'} & set(sys.modules), command\n"
        "    assert 'scipy.stats' not in sys.modules or command[0] == 'report', command"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
