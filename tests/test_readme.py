"""README keeps to its limits, and its commands and Python, and those of docs/, run as they stand there."""

import contextlib
import re
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
PARTS = (ROOT / "docs/parts.md").read_text()
PAGES = sorted((ROOT / "docs").glob("*.md"))
WITH_OUTPUT = "<!-- shown:"
"""Marks blocks of a page whose commands docs/outputs.py runs."""


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page, re.S)


def commands(page: str, *start: str) -> list[str]:
    lines = [line for block in blocks(page, "sh") for line in block.splitlines()]
    return [line.split("  #")[0].strip() for line in lines if line.startswith(start)]


def test_the_readme_is_short_and_narrow_and_shows_a_picture_and_an_output_first() -> None:
    lines = README.splitlines()
    assert len(lines) <= 150
    assert not [line for line in lines if len(line) > 100]
    first = README.partition("\n## ")[0]
    assert "$ tfkd tune" in first and "best:" in first and "![" in first


def test_the_readme_says_in_seven_lines_what_it_adds() -> None:
    section = README.partition("## What you get")[2].partition("\n## ")[0]
    assert section.count("\n- **") == 7


RUN_HERE = [page for page in PAGES if WITH_OUTPUT not in page.read_text()]


@pytest.mark.ray
@pytest.mark.docs
@pytest.mark.timeout(300)
@pytest.mark.parametrize("page", RUN_HERE, ids=lambda p: p.stem)
def test_the_commands_of_the_docs_run(
    ray_cluster: str, tfkd: Run, tmp_path: Path, page: Path
) -> None:
    text = page.read_text()
    for code, name in re.findall(r"```(?:python|yaml)\n(# (\S+)\n.*?)```", text, re.S):
        (tmp_path / name).write_text(code)
    for command in commands(text, "tfkd ", "python "):
        if command.startswith("tfkd tensorboard"):
            if page.stem == "commands":
                assert_tensorboard_answers(command, tmp_path)
            continue
        words, _, target = command.replace("--seeds 10", "--seeds 2").partition(" > ")
        program, *rest = words.split()
        if program == "python":
            if (tmp_path / rest[0]).is_file():  # else it is of the repository
                script = [sys.executable, *rest]
                subprocess.run(script, cwd=tmp_path, check=True, timeout=110)
            continue
        run = tfkd(*rest, cwd=tmp_path)
        assert run.returncode == 0, f"{command}: {run.stderr}"
        if target:
            (tmp_path / target).write_text(run.stdout)


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


PYTHON = [
    pytest.param(page, code, id=f"{page.stem}-{number}")
    for page in (ROOT / "README.md", ROOT / "docs/python.md")
    for number, code in enumerate(blocks(page.read_text(), "python"))
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("python")


@pytest.mark.ray
@pytest.mark.docs
@pytest.mark.parametrize("page, code", PYTHON)
def test_the_python_of_readme_and_docs_runs(
    ray_cluster: str, place: Path, page: Path, code: str
) -> None:
    folder = place / page.stem
    folder.mkdir(exist_ok=True)
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=110
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout


def test_the_spaces_of_readme_and_docs_are_valid() -> None:
    (text,) = blocks(README, "yaml")
    space = build_space(parse_yaml(text, "README"))
    assert [b.objective for b in space.branches] == ["tfkd_reg", "ce", "lsr"]
    (own,) = blocks(PARTS, "yaml")
    with pytest.raises(ConfigError) as error:  # its modules are the reader's
        build_space(parse_yaml(own, "parts.md"))
    assert all("there is no module 'my_" in problem for problem in error.value.problems)


def test_the_make_targets_of_the_readme_are_there() -> None:
    makefile = (ROOT / "Makefile").read_text()
    shown = commands(README, "make ")
    assert any(command.startswith("make test") for command in shown)
    for command in shown:
        assert re.search(rf"^{command.split()[1]}:", makefile, re.M)


def test_the_links_of_the_readme_lead_somewhere() -> None:
    for page in (ROOT / "README.md", *PAGES):
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
