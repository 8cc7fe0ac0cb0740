"""Experiments of which any one file is damaged: every command that reads says one sentence, or bears it; none fails.

TFKD_FUZZ sets how many damages are tried (500), TFKD_FUZZ_SEED with which seed (printed if one fails).
"""

import json
import os
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_fuzz import TREE
from test_report import make_comparison

import tfkd_ray.tune
from tfkd_ray import arms
from tfkd_ray.cli import main
from tfkd_ray.export import choose
from tfkd_ray.schema import ConfigError, dump_yaml, parse_yaml
from tfkd_ray.tensorboard import side_by_side
from tfkd_ray.tune import resume_tuner

COUNT = int(os.environ.get("TFKD_FUZZ", "500"))
SEED = int(os.environ.get("TFKD_FUZZ_SEED", "0"))
SLOWEST_S = 2.0
RELEASE = Path(__file__).parent / "data" / "experiment-0.1.0"


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real sweep of digits with its teacher, and a judged comparison beside it."""
    storage = tmp_path_factory.mktemp("damage") / "storage"
    shutil.copytree(RELEASE, storage, symlinks=True)
    make_comparison(storage / "arms")
    return storage


def harmed(content: bytes, rng: random.Random, suffix: str) -> bytes:
    """A file as a disk, a crash or a person leaves it."""
    at = rng.randrange(len(content) or 1)
    way = rng.randrange(8)
    if way == 0:
        return content[:at]
    if way == 1:
        return content[:at] + bytes([rng.randrange(256)]) + content[at + 1 :]
    if way == 2:
        return content[:at] + bytes(rng.randrange(1, 60)) + content[at + 40 :]
    if way == 3:
        return content[:at] + content[at : at + 90] * rng.choice([2, 40]) + content[at + 90 :]
    if way == 4:
        return rng.choice(
            [b"", b"\n", b"null\n", b"[]\n", b"{}\n", b"7\n", b'"x"\n', b"\xff\xfe\n", b"[" * 10**5, b"1" * 5000]
        )
    read: Any = parse_yaml if suffix == ".yaml" else lambda text, source: json.loads(text)
    try:  # what it says is changed, and it is written well
        lines = content.decode().splitlines() if suffix == ".jsonl" else [content.decode()]
        number = rng.randrange(len(lines))
        tree = read(lines[number], "it")
        for _ in range(rng.randrange(1, 4)):
            rng.choice(TREE)(tree, rng)
        lines[number] = (
            dump_yaml(tree) if suffix == ".yaml" else json.dumps(tree, indent=None if suffix == ".jsonl" else 1)
        )
        return "\n".join([*lines, ""]).encode(errors="surrogatepass")
    except (ValueError, IndexError, RecursionError, ConfigError, AttributeError, Exception):
        return content[at:]


class Reached(Exception):
    """All that a resume reads before it asks for Ray is read."""


def reads(storage: Path, out: Path) -> Iterator[tuple[str, Any]]:
    """(name, what runs it) of everything that reads an experiment."""
    sweep, compared = storage / "sweep", storage / "arms"
    for argv in (
        ["status", sweep], ["status", sweep, "--json"], ["best", sweep], ["best", sweep, "--json"], ["trials", sweep],
        ["trials", sweep, "-o", "csv"], ["trials", sweep, "-o", "json", "--sort", "val_accuracy:desc"], ["logs", sweep, "0"],
        ["ls", "--storage", storage], ["report", sweep, "-o", out], ["status", compared], ["trials", compared],
        ["report", compared, "-o", out], ["teacher", "list", "--storage", storage],
    ):  # fmt: skip
        words = [str(word) for word in argv]
        yield "tfkd " + " ".join(words), lambda words=words: main(words)
    yield "export, choosing", lambda: choose(sweep)
    yield "export, choosing an arm", lambda: choose(compared)
    yield "confirm, its arms", lambda: arms.arms_of(sweep)
    yield "confirm, its baselines", lambda: arms.baseline_space(sweep, arms.untuned(sweep) or {"ce": 1})
    (out.parent / "tb").mkdir(exist_ok=True)
    yield "tensorboard, several", lambda: side_by_side(out.parent / "tb", {"a": sweep, "b": compared})
    yield "resume, before Ray", lambda: resume_tuner(sweep, add_trials=1)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(10))
def test_a_damaged_file_is_a_sentence_or_is_borne(
    part: int, storage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def reached(config: object) -> None:
        raise Reached

    monkeypatch.setattr(tfkd_ray.tune, "prepare", reached)
    files = sorted(p for p in storage.rglob("*") if p.is_file() and not p.is_symlink() and ".lock" not in p.name)
    refused = 0
    for number in range(COUNT // 10):
        seed = f"{SEED}/{part}/{number}"
        rng = random.Random(seed)
        kind = rng.choice(sorted({p.suffix or p.name.partition(".")[0] for p in files}))
        path = rng.choice([p for p in files if (p.suffix or p.name.partition(".")[0]) == kind])
        whole = path.read_bytes()
        path.write_bytes(harmed(whole, rng, path.suffix))
        name = ""
        try:
            for name, read in reads(storage, tmp_path / "report.html"):  # noqa: B007
                start, cpu = time.monotonic(), time.process_time()
                try:
                    code = read()
                except ConfigError as error:
                    code = 2
                    assert error.source or str(storage) in str(error) or ":" in str(error), str(error)
                except Reached:
                    code = 0
                out, err = capsys.readouterr()
                assert "Traceback" not in out + err
                assert not isinstance(code, int) or code in (0, 2) or (code == 1 and err)
                assert time.process_time() - cpu < SLOWEST_S and time.monotonic() - start < 10 * SLOWEST_S
                refused += code == 2
        except BaseException as error:
            error.add_note(
                f"TFKD_FUZZ_SEED={SEED}, {seed}: {name}; {path.relative_to(storage)}:\n{path.read_bytes()[:3000]!r}"
            )
            raise
        finally:
            path.write_bytes(whole)
            (storage / "sweep/driver.txt").unlink(missing_ok=True)
    assert refused > 0
