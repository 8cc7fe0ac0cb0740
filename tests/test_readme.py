"""Every command and piece of Python of the README runs, in order, in one directory."""

import contextlib
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from conftest import ROOT, Run

from tfkd_ray.settings.errors import ConfigError
from tfkd_ray.settings.yaml import parse_yaml
from tfkd_ray.space.space import build_space

README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def commands(start: str) -> list[str]:
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    return [line.split("  #")[0].strip() for line in lines if line.startswith(start)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("readme")
    shutil.copytree(ROOT / "search_spaces", folder / "search_spaces")
    return folder


@pytest.mark.ray
@pytest.mark.docs
@pytest.mark.timeout(300)
def test_the_commands_of_the_readme_run_in_their_order(
    ray_cluster: str, tfkd: Run, place: Path
) -> None:
    shown = [c for c in commands("tfkd ") if not c.startswith("tfkd tensorboard")]
    assert len(shown) == 16
    for command in shown:
        words, _, target = command.removeprefix("tfkd ").partition(" > ")
        run = tfkd(*words.split(), cwd=place)
        assert run.returncode == 0, f"{command}: {run.stderr}"
        if target:
            (place / target).write_text(run.stdout)
    (command,) = commands("tfkd tensorboard")
    assert_tensorboard_answers(command, place)


def assert_tensorboard_answers(command: str, place: Path) -> None:
    """Assert that it serves the runs of the sweep, on loopback, within half a minute."""
    server = subprocess.Popen(
        [sys.executable, "-m", "tfkd_ray", *command.split()[1:], "--port", "16006"],
        cwd=place,
        stderr=subprocess.PIPE,
    )
    runs, until = "", time.monotonic() + 30
    try:
        while "t0000-tfkd_reg" not in runs and time.monotonic() < until and server.poll() is None:
            with contextlib.suppress(OSError):
                runs = (
                    urllib.request.urlopen("http://127.0.0.1:16006/data/runs", timeout=5)
                    .read()
                    .decode()
                )
            time.sleep(0.1)
    finally:
        server.terminate()
        _, err = server.communicate()
    assert '"t0000-tfkd_reg"' in runs and '"t0003-ce"' in runs, err.decode()


@pytest.mark.ray
@pytest.mark.docs
@pytest.mark.timeout(300)
@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda p: p.stem)
def test_the_commands_of_the_docs_run(
    ray_cluster: str, tfkd: Run, tmp_path: Path, page: Path
) -> None:
    lines = [
        line
        for block in re.findall(r"```sh\n(.*?)```", page.read_text(), re.S)
        for line in block.splitlines()
    ]
    for line in lines:
        command = line.split("  #")[0].strip().replace("--seeds 10", "--seeds 2")
        if command.startswith("tfkd ") and not command.startswith("tfkd tensorboard"):
            run = tfkd(*command.split()[1:], cwd=tmp_path)
            assert run.returncode == 0, f"{command}: {run.stderr}"


@pytest.mark.ray
@pytest.mark.docs
@pytest.mark.parametrize("k", range(4))
def test_the_python_of_the_readme_runs(ray_cluster: str, place: Path, k: int) -> None:
    code = blocks("python")
    assert len(code) == 4
    run = subprocess.run(
        [sys.executable, "-c", code[k]], cwd=place, capture_output=True, text=True, timeout=110
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout


def test_the_space_of_the_readme_is_valid() -> None:
    text, own = blocks("yaml")
    space = build_space(parse_yaml(text, "README"))
    assert [b.objective for b in space.branches] == ["tfkd_reg", "ce", "lsr"]
    with pytest.raises(ConfigError) as error:  # its modules are the reader's
        build_space(parse_yaml(own, "README"))
    assert all("there is no module 'my_" in problem for problem in error.value.problems)


def test_the_make_targets_of_the_readme_are_there() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for command in commands("make "):
        assert re.search(rf"^{command.split()[1]}:", makefile, re.M)


def test_the_links_of_the_readme_lead_somewhere() -> None:
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
