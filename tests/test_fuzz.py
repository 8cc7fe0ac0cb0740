"""Random files: a valid one is read, any other is refused with a sentence, and nothing starts.

TFKD_FUZZ sets the number of files (50), TFKD_FUZZ_SEED the seed (printed on failure).
"""

import contextlib
import copy
import os
import random
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ARMS, ROOT, SHIPPED
from hypothesis import HealthCheck, settings

from tfkd_ray.cli.main import main
from tfkd_ray.launch.check import check
from tfkd_ray.launch.clusterfile import ClusterFile, load_cluster
from tfkd_ray.settings.errors import ConfigError
from tfkd_ray.settings.yaml import dump_yaml, parse_yaml
from tfkd_ray.space.arms import Arms, load_arms
from tfkd_ray.space.space import Space, build_space, load_space

pytestmark = pytest.mark.slow
COUNT = int(os.environ.get("TFKD_FUZZ", "50"))
SEED = int(os.environ.get("TFKD_FUZZ_SEED", "0"))
SLOWEST_S = 2.0
often = settings(
    max_examples=max(1, COUNT * 60 // 500),
    deadline=None,
    derandomize="TFKD_FUZZ_SEED"
    not in os.environ,  # else pytest's --hypothesis-seed, as `make fuzz` gives it
    database=None,
    suppress_health_check=list(HealthCheck),
)
"""For tests by hypothesis, here and in other files."""


@pytest.fixture(scope="module", autouse=True)
def _timm() -> None:
    """Import what a model may be of: it takes seconds, of which a file has two."""
    import timm  # noqa: F401


CLUSTERS = [p for p in sorted((ROOT / "clusters").glob("*.yaml")) if "\n---" not in p.read_text()]
SCRIPTS = [
    ROOT / "clusters" / "slurm.sh",
    *sorted((ROOT / "clusters").glob("kuberay-*.yaml")),
]  # changed as text
FILES = [p for p in SHIPPED + ARMS if len(p.read_text()) < 6000]
SPACES = [p for p in FILES if p in SHIPPED]

ODD: list[Any] = [
    None, True, 0, -1, 1, 2, 1e-300, -0.0, 1e308, 10**400, float("nan"), float("inf"), -float("inf"), "", " ", "x", "ce", "null",
    "1e-3", "\0", "ü" * 300, "a" * 100_000, "${HOME}", "../../etc/passwd", "package.module:function", "os:system", "timm:x", [], {},
    [[]], [None], [{}], {"": ""}, {"name": None}, {"name": "ce"}, {"name": []}, {"low": 0, "high": 1}, {"low": 1, "high": 0},
    {"low": 0, "high": "1"}, {"low": -1e308, "high": 1e308}, {"low": 0, "high": 1, "log": True}, {"choices": []}, {"choices": [1, 1]},
    {"choices": [None, [], {}]}, {"low": 0}, {"low": 0, "high": 1, "step": 0}, {"low": 0, "high": 1, "step": 1e-300},
    {"low": 1, "high": 10**30, "step": 1}, list(range(2000)), {1: 2}, {None: None},
]  # fmt: skip


def places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the positions in a tree, without the root."""
    items = (
        tree.items()
        if isinstance(tree, dict)
        else enumerate(tree)
        if isinstance(tree, list)
        else ()
    )
    found = []
    for key, value in items:
        found += [(*path, key), *places(value, (*path, key))]
    return found


def holder(tree: Any, path: tuple[Any, ...]) -> Any:
    for key in path[:-1]:
        tree = tree[key]
    return tree


def replaced(tree: Any, rng: random.Random) -> None:
    path = rng.choice(places(tree))
    holder(tree, path)[path[-1]] = copy.deepcopy(rng.choice(ODD))


def removed(tree: Any, rng: random.Random) -> None:
    path = rng.choice(places(tree))
    del holder(tree, path)[path[-1]]


def renamed(tree: Any, rng: random.Random) -> None:
    path = rng.choice(places(tree))
    above = holder(tree, path)
    if isinstance(above, dict):
        word = str(path[-1])
        new = rng.choice(
            [word[:-1], word + "s", word.upper(), word[::-1], "low", "choices", "name", ""]
        )
        above[new] = above.pop(path[-1])


def moved(tree: Any, rng: random.Random) -> None:
    a, b = rng.choice(places(tree)), rng.choice(places(tree))
    holder(tree, a)[a[-1]] = copy.deepcopy(holder(tree, b)[b[-1]])


def nested(tree: Any, rng: random.Random) -> None:
    path = rng.choice(places(tree))
    value = holder(tree, path)[path[-1]]
    for _ in range(rng.choice([1, 3, 200])):
        value = {rng.choice(["name", "x", "objective"]): value} if rng.random() < 0.5 else [value]
    holder(tree, path)[path[-1]] = value


def added(tree: Any, rng: random.Random) -> None:
    path = rng.choice(places(tree))
    above = holder(tree, path)
    if isinstance(above, dict):
        above[rng.choice(["x", "seed", "search", "arms", "teacher", "epochs", "data", 7])] = (
            rng.choice(ODD)
        )


def numbered(tree: Any, rng: random.Random) -> None:
    """Change a number a little, or wildly."""
    numbers = [p for p in places(tree) if isinstance(holder(tree, p)[p[-1]], int | float)]
    if numbers:
        path = rng.choice(numbers)
        value = holder(tree, path)[path[-1]]
        holder(tree, path)[path[-1]] = rng.choice(
            [-value, value + 0.5, value * 1e9, value / 3, str(value), [value], not value]
        )


TREE: list[Callable[[Any, random.Random], None]] = [
    replaced,
    removed,
    renamed,
    moved,
    nested,
    added,
    numbered,
]


def torn(text: str, rng: random.Random) -> str:
    """Damage the text as text."""
    at, lines = rng.randrange(len(text)), text.split("\n")
    line = rng.randrange(len(lines))
    way = rng.randrange(9)
    if way == 0:
        return text[:at]
    if way == 1:
        return text[:at] + rng.choice("\t\0:{}[]&*!|>'\"%@`,#-\x7f\ud7ff\u2028") + text[at:]
    if way == 2:
        lines.insert(line, rng.choice(lines))
    if way == 3:
        lines[line] = " " * rng.randrange(9) + lines[line].strip()
    if way == 4:
        lines[line] = rng.choice(
            [
                "a: &a [*a]",
                "x: !!python/object/apply:os.system ['true']",
                "<<: *x",
                "? [1]",
                "---",
                "...",
            ]
        )
    if way == 5:
        return text.replace("\n", rng.choice(["\r\n", "\r", "\n\n", "\x85"]))
    if way == 6:
        return "\ufeff" + text
    if way == 7:
        lines = ["a: &a0 [x, x, x, x, x, x, x, x, x]",
                 *(f"b{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 9)}]" for k in range(1, 9)), *lines]  # fmt: skip
    if way == 8:
        del lines[line]
    return "\n".join(lines)


def mutated(rng: random.Random, files: list[Path] = FILES) -> str:
    """Return a file with one to four changes."""
    tree = parse_yaml(rng.choice(files).read_text(), "shipped")
    for _ in range(rng.randrange(5)):
        with contextlib.suppress(
            IndexError, OverflowError
        ):  # nothing is left of it, or a number is too large already
            rng.choice(TREE)(tree, rng)
    with contextlib.suppress(yaml.YAMLError, RecursionError):
        text = yaml.safe_dump(tree, allow_unicode=True)
        return torn(text, rng) if rng.random() < 0.4 else text
    return torn("objective: ce\n", rng)


def understood(path: Path) -> Space | Arms | None:
    """Return a file's content; None if a ConfigError with a sentence per problem refuses it."""
    try:
        is_arms = "arms" in (parse_yaml(path.read_text(), path) or {})
        return load_arms(path) if is_arms else load_space(path)
    except ConfigError as error:
        refused(path, error)
        return None


def checked(path: Path) -> ClusterFile | None:
    """Return a cluster file that passes `tfkd cluster check`, or None if refused."""
    try:
        file = load_cluster(path)
        assert check(file) and (file.kind == "slurm" or file.tree)
        return file
    except ConfigError as error:
        refused(path, error)
        return None


FIELD = r"(#SBATCH )?(\S|'[^']*'|\"[^\"]*\")+"
WHOLE = (
    r"is empty[;,] |must be settings \(key: value\), got |every document in it must be settings |not YAML: nested too deeply$|"
    r"not a (cluster file|Slurm script|text file in UTF-8): |is a search space or an arms file, not a cluster file|\(the file\): |"
    r"ray symmetric-run: not there; the script must"
)
"""How a problem begins that is about no one place of a file."""


def refused(path: Path, error: ConfigError) -> None:
    """Assert that the error names the file, and each sentence its field or line."""
    assert str(path) in str(error) or path.name in str(error), str(error)
    for problem in error.problems:
        assert re.match(rf"{FIELD}: \S|line \d+(, column \d+)?: \S|{WHOLE}", problem), problem[
            :3000
        ]
        assert re.search(r"\S.*\S$", problem) and len(problem) < 1001, problem[:3000]
        assert "Traceback" not in problem and "pydantic" not in problem


PARTS = min(10, max(1, COUNT // 50))


@pytest.mark.parametrize("part", range(PARTS))
def test_a_file_is_understood_or_refused_with_sentences(part: int, tmp_path: Path) -> None:
    valid = 0
    for number in range(COUNT // PARTS):
        seed = f"{SEED}/{part}/{number}"
        path = tmp_path / "mutated.yaml"
        path.write_text(mutated(random.Random(seed)), encoding="utf-8", errors="surrogatepass")
        start = time.perf_counter()
        try:
            found = understood(path)
            if isinstance(found, Space):
                again = build_space(parse_yaml(dump_yaml(found.tree), "again"))
                assert again.tree == found.tree and again.parameters == found.parameters
            elif isinstance(found, Arms):
                assert Arms.model_validate(found.model_dump(mode="json")) == found
        except BaseException as error:
            error.add_note(f"TFKD_FUZZ_SEED={SEED}, file {seed}:\n{path.read_bytes()[:4000]!r}")
            raise
        assert time.perf_counter() - start < SLOWEST_S, f"{seed}: {path.read_bytes()[:2000]!r}"
        valid += found is not None
    assert 0 < valid < COUNT // PARTS  # some survive, or it would show nothing


CLUSTER_PARTS = min(5, PARTS)


@pytest.mark.parametrize("part", range(CLUSTER_PARTS))
def test_a_cluster_file_is_understood_or_refused_with_sentences(part: int, tmp_path: Path) -> None:
    valid = 0
    for number in range(COUNT // 2 // CLUSTER_PARTS):
        seed = f"{SEED}/cluster/{part}/{number}"
        rng = random.Random(seed)
        whole = number % 4 == 0
        text = (
            torn((script := rng.choice(SCRIPTS)).read_text(), rng)
            if whole
            else mutated(rng, CLUSTERS)
        )
        path = tmp_path / f"mutated{script.suffix if whole else '.yaml'}"
        path.write_text(text, encoding="utf-8", errors="surrogatepass")
        start, cpu = time.monotonic(), time.process_time()
        try:
            valid += checked(path) is not None
        except BaseException as error:
            error.add_note(f"TFKD_FUZZ_SEED={SEED}, file {seed}:\n{path.read_bytes()[:4000]!r}")
            raise
        assert (
            time.process_time() - cpu < SLOWEST_S and time.monotonic() - start < 10 * SLOWEST_S
        ), seed
    assert 0 < valid < COUNT // 2 // CLUSTER_PARTS


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a test fail that connects to Ray or starts it."""
    for name in (
        "ray.init",
        "tfkd_ray.run.connect.connect",
        "tfkd_ray.run.tune.connect",
        "tfkd_ray.run.tune.prepare",
    ):
        monkeypatch.setattr(name, started)


def started(*args: object, **kwargs: object) -> None:
    raise AssertionError("Ray was started")


@pytest.mark.parametrize(
    "verb, files", [("tune", SPACES), ("confirm", ARMS)], ids=["tune", "confirm"]
)
def test_a_refused_file_ends_its_command_before_ray(
    verb: str,
    files: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Run commands with invalid files: exit code 2, the file's name, no traceback, no files."""
    monkeypatch.chdir(tmp_path)
    done = 0
    for number in range(2000):
        seed = f"{SEED}/{verb}/{number}"
        path = tmp_path / "mutated.yaml"
        path.write_text(
            mutated(random.Random(seed), files), encoding="utf-8", errors="surrogatepass"
        )
        if understood(path) is not None:
            continue
        code = main([verb, path.name])
        out, err = capsys.readouterr()
        assert code == 2 and path.name in err and "Traceback" not in out + err, (
            seed,
            path.read_bytes()[:4000],
            err,
        )
        assert [p.name for p in tmp_path.iterdir()] == [path.name], seed
        if (done := done + 1) == COUNT // 10:
            return
    raise AssertionError(f"only {done} files were refused")


def test_a_good_file_does_reach_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The counterpart of the test above, with valid files."""
    monkeypatch.chdir(tmp_path)
    for argv in (["tune", "digits_tfkd"], ["confirm", "digits_arms", "--preset", "smoke"]):
        with pytest.raises(AssertionError, match="Ray was started"):
            main(argv)
