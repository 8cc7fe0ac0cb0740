"""What `make` installs, how large that is, and torch from an index that the user names."""

import csv
import functools
import http.server
import os
import shutil
import subprocess
import threading
import tomllib
import zipfile
from collections.abc import Iterable, Iterator
from importlib.metadata import Distribution, distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
GB = 1e9


@functools.cache
def installed() -> dict[str, Distribution]:
    return {canonicalize_name(d.metadata["Name"]): d for d in distributions()}


def needed(requirements: Iterable[str]) -> set[str]:
    """Return the installed packages that requirements need, directly or not."""
    todo, seen = [Requirement(r) for r in requirements], set[tuple[str, frozenset[str]]]()
    while todo:
        asked = todo.pop()
        key = canonicalize_name(asked.name), frozenset(asked.extras)
        if key in seen or key[0] not in installed():
            continue
        seen.add(key)
        extras = asked.extras or {""}
        for text in installed()[key[0]].requires or []:
            below = Requirement(text)
            if not below.marker or any(below.marker.evaluate({"extra": e}) for e in extras):
                todo.append(below)
    return {name for name, _ in seen}


def size_on_disk(names: Iterable[str]) -> float:
    """Return the bytes of some packages, from pip's records."""
    records = [installed()[name].read_text("RECORD") or "" for name in names]
    rows = [row for text in records for row in csv.reader(text.splitlines())]
    return sum(int(row[2]) for row in rows if len(row) > 2 and row[2].isdigit())


def is_of_torch(name: str) -> bool:
    return name in ("torch", "triton") or name.startswith(("nvidia-", "cuda-"))


@pytest.mark.slow
def test_the_sizes_that_make_names_are_those_of_the_packages() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for_sweeps = needed(project["dependencies"])
    for_tests = needed(project["optional-dependencies"]["dev"]) - for_sweeps
    named = {
        line.split(" := ")[0]: float(line.split(" := ")[1].removesuffix(" GB"))
        for line in (ROOT / "Makefile").read_text().splitlines()
        if line.startswith("SIZE_")
    }
    of_torch = {name for name in for_sweeps if is_of_torch(name)}
    beside, tests = size_on_disk(for_sweeps - of_torch) / GB, size_on_disk(for_tests) / GB
    assert named["SIZE_BESIDE_IT"] == pytest.approx(beside, abs=0.2)
    assert named["SIZE_FOR_TESTS"] == pytest.approx(tests, abs=0.2)
    assert beside + tests < 1.8, "with a torch of 1.2 GB an environment stays below 3 GB"
    if any(name.startswith("nvidia-") for name in of_torch):  # not so with a build for CPUs
        assert named["SIZE_OF_TORCH"] == pytest.approx(size_on_disk(of_torch) / GB, abs=0.5)


def stand_in(folder: Path, name: str, version: str) -> None:
    """Write an index page and a wheel that has nothing but a name and a version."""
    place = folder / name
    place.mkdir(parents=True)
    stem, about = f"{name}-{version}", f"{name}-{version}.dist-info"
    wheel = place / f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr(
            f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        )
        file.writestr(
            f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        file.writestr(f"{about}/RECORD", "")
    link = wheel.name.replace("+", "%2B")
    (place / "index.html").write_text(f'<a href="{link}">{wheel.name}</a>')


@pytest.fixture
def index(tmp_path: Path) -> Iterator[str]:
    """Yield the URL of an index with builds for CPUs of the tested versions: stand-ins."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    for name in ("torch", "torchvision"):
        version = next(line.split("==")[1] for line in lines if line.startswith(f"{name}=="))
        stand_in(tmp_path / "index", name, f"{version}+cpu")
    handler = functools.partial(
        http.server.SimpleHTTPRequestHandler, directory=str(tmp_path / "index")
    )
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}/"
        server.shutdown()
        thread.join()


def make(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    bare = {key: value for key, value in os.environ.items() if not key.startswith(("PIP_", "MAKE"))}
    environ = {**bare, "PIP_CONFIG_FILE": os.devnull}
    return subprocess.run(
        ["make", *words], cwd=folder, env=environ, capture_output=True, text=True, timeout=300
    )


def checkout(folder: Path) -> Path:
    """Return a folder with the files that a set-up reads."""
    place = folder / "checkout"
    place.mkdir()
    for name in ("Makefile", "constraints.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, place)
    return place


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_torch_comes_from_the_index_that_is_named_and_stays(tmp_path: Path, index: str) -> None:
    folder = checkout(tmp_path)
    done = make(folder, "torch", f"TORCH_INDEX={index}")
    assert done.returncode == 0, done.stderr
    assert f"installing torch from {index}; the other packages take 1 GB on disk" in done.stdout
    there = [p.name for p in (folder / ".venv").glob("lib/*/site-packages/*.dist-info")]
    of_torch = [name for name in there if is_of_torch(name.split("-")[0].replace("_", "-"))]
    assert len(of_torch) == 1 and of_torch[0].endswith("+cpu.dist-info")
    other = make(folder, "torch", "TORCH_INDEX=http://127.0.0.1:1/")
    assert (
        other.returncode == 2
        and "is from elsewhere; remove it first, with: make clean" in other.stderr
    )
    shown = make(folder, "-n", "demo").stdout
    assert (
        "pip install --disable-pip-version-check --constraint constraints.txt --editable ." in shown
    )
    assert "--quiet" not in shown
    assert f"--index-url '{index}'" in make(folder, "-n", "torch").stdout, "it is remembered"


def test_make_says_how_large_torch_is_before_it_is_fetched(tmp_path: Path) -> None:
    shown = make(checkout(tmp_path), "-n", "torch").stdout
    assert "a build for CUDA, which takes 5.5 GB on disk, and the other packages 1 GB" in shown
    assert "make demo TORCH_INDEX=URL" in shown
