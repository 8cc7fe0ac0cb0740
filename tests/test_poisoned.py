"""A table of all verbs: experiments and files that are malicious, or damaged by a disk.

The verbs and their arguments come from the parser: a new verb is included automatically, and a new
argument needs an entry in `VALUES`. Each verb runs in this process, until it would start Ray,
TensorBoard or a cluster.
"""

import argparse
import contextlib
import fcntl
import json
import os
import shutil
import signal
import socket
import sys
import time
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import long_after
from ray.tune.experiment import Trial
from test_damage import RELEASE
from test_report import make_comparison

from tfkd_ray.cli import compare, show, sweep, terminal, train
from tfkd_ray.cli import main as cli
from tfkd_ray.cli.main import main
from tfkd_ray.launch import verbs as cluster_verbs
from tfkd_ray.run.connect import found_broken, give_larger_share
from tfkd_ray.run.nodes import Mark, _look
from tfkd_ray.settings.errors import ConfigError
from tfkd_ray.settings.files import LEFT_BEHIND_S, whole_file, write_text
from tfkd_ray.settings.yaml import dump_yaml, parse_yaml, read_yaml
from tfkd_ray.store import remote
from tfkd_ray.store.assignment import SECTION, Assignment
from tfkd_ray.store.experiment import check_name, read_records
from tfkd_ray.store.remote import Claim, Store, store_of

LONGEST_S = 20
SECRET = "s3cret-0f-an0ther"


class Reached(Exception):
    """Raised when a verb has read everything that it reads before it starts something."""


def verbs(parser: argparse.ArgumentParser | None = None) -> dict[str, argparse.ArgumentParser]:
    """Return every command by its words."""
    parser = parser or cli._parser()
    found = {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, sub in action.choices.items():
                found |= {
                    f"{name} {more}".strip(): leaf
                    for more, leaf in (verbs(sub) or {"": sub}).items()
                }
    return found


VERBS = verbs()
READ_MOST = ("status", "report", "resume", "export")
"""Verbs that read all files of an experiment between them."""


def values(storage: Path, out: Path) -> dict[str, list[str]]:
    """Return values for an argument by name; of the options, only files and directories."""
    sweep, arms = str(storage / "sweep"), str(storage / "arms")
    return {
        "experiment": [sweep, arms],
        "experiments": [sweep, arms],
        "others": [sweep],
        "source": [sweep, arms],
        "file": [sweep],
        "overrides": [],
        "trial": ["0"],
        "trials": ["0"],
        "name": ["mlp"],
        "job": [],
        "storage": [str(storage)],
        "out": [str(out)],
        "figures": [],
        "confirm": [arms],
        "prior": [sweep],
        "space": [str(storage / "sweep/experiment.yaml")],
        "cluster": [],
        "data": [],
        "shell": ["bash"],
    }


def is_of_files(action: argparse.Action) -> bool:
    return action.metavar in ("DIR", "FILE") or action.type in (
        Path, terminal.place_or_url, terminal.experiment_place,
    )  # fmt: skip


def commands(verb: str, storage: Path, out: Path) -> Iterator[list[str]]:
    """Yield the verb with each value of its required arguments, and with its file options."""
    known, parser = values(storage, out), VERBS[verb]
    options, needed = list[str](), list[list[str]]()
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction):
            continue
        if action.option_strings and not is_of_files(action):
            continue
        assert action.dest in known, (
            f"say in `values` what {action.dest!r} of tfkd {verb} stands for"
        )
        given = known[action.dest]
        if not given:
            continue
        if action.option_strings:
            options += [action.option_strings[-1], given[0]]
        else:
            needed.append(given)
    first, *rest = needed or [[]]
    others = [given[0] for given in rest]
    tail = ["--", "true"] if verb == "cluster submit" else []
    for one in first or [None]:
        yield [*verb.split(), *options, *([one] if one else []), *others, *tail]


@pytest.mark.slow
def test_every_verb_and_every_argument_is_in_the_table(tmp_path: Path) -> None:
    for verb in VERBS:
        for argv in commands(verb, tmp_path, tmp_path / "out"):
            parser = cli._parser()
            parser.parse_known_args(cli._command_of(argv)[0])
    assert {"status", "teacher show", "cluster check"} <= set(VERBS)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a real sweep of digits with its teacher, and a judged comparison beside it."""
    storage = tmp_path_factory.mktemp("poisoned") / "storage"
    shutil.copytree(RELEASE, storage, symlinks=True)
    driver = f"process {os.getpid()} on {socket.gethostname()}\n"  # then its lock is looked at
    (storage / "sweep/driver.txt").write_text(driver)
    failed = storage / "sweep/trials/t0000-kd"  # then its error.txt is shown
    about = json.loads((failed / "trial.json").read_text())
    (failed / "trial.json").write_text(json.dumps({**about, "status": "failed"}))
    make_comparison(storage / "arms")
    return storage


@pytest.fixture
def storage(whole: Path, tmp_path: Path) -> Path:
    """Return a copy that a test may change."""
    return Path(shutil.copytree(whole, tmp_path / "storage", symlinks=True))


Answer = Callable[[list[str]], str]


@pytest.fixture
def answer(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> Iterator[Answer]:
    """Run a verb until it starts something; return its output: a sentence or a result, soon."""

    def reached(*args: Any, **kwargs: Any) -> Any:
        raise Reached

    def late(number: int, frame: Any) -> None:
        raise AssertionError(f"not over after {LONGEST_S} s")

    for verbs in (compare, show, sweep, train):
        monkeypatch.setattr(verbs, "join_ray", reached)
    monkeypatch.setattr(show, "_check_port", reached)
    monkeypatch.setattr(cluster_verbs, "run", reached)
    monkeypatch.setattr("tfkd_ray.run.tune.prepare", reached)
    monkeypatch.setattr("tfkd_ray.launch.doctor.doctor", lambda *args, **kwargs: [])
    monkeypatch.setattr(
        "tfkd_ray.show.export._program", reached
    )  # everything is read by then, and a graph takes half a second
    monkeypatch.chdir(tmp_path)
    before = signal.signal(signal.SIGALRM, late)

    def run(argv: list[str]) -> str:
        code: Any = None
        signal.alarm(LONGEST_S)
        try:
            with contextlib.suppress(Reached):
                code = main(argv)
        except SystemExit as end:
            code = end.code
        except BaseException as error:
            error.add_note(f"tfkd {' '.join(argv)}")
            raise
        finally:
            signal.alarm(0)
        out, err = capfd.readouterr()
        assert code in (None, 0, 1, 2, 7), (code, argv, out + err)
        assert "Traceback" not in out + err, argv
        assert code in (None, 0) or err.strip(), argv
        return out + err

    yield run
    signal.signal(signal.SIGALRM, before)


# --- what is no file in the place of a file --------------------------------------------------------------------


def fifo(path: Path, victim: Path) -> None:
    os.mkfifo(path)


def device(path: Path, victim: Path) -> None:
    path.symlink_to("/dev/zero")


def directory(path: Path, victim: Path) -> None:
    path.mkdir()


def link(path: Path, victim: Path) -> None:
    path.symlink_to(victim)


def loop(path: Path, victim: Path) -> None:
    path.symlink_to(path.name)


def unix_socket(path: Path, victim: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # its path may be too long for a socket
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(path.name)
    os.chdir(here)


def garbage(path: Path, victim: Path) -> None:
    path.write_bytes(b"\xff\x00{]")


def huge(path: Path, victim: Path) -> None:
    """Write 64 GiB of zeros that take no room."""
    with path.open("wb") as file:
        file.truncate(2**36)


# hangs and foreign files in `make test`; the others with the faults
POISONS: list[Any] = [fifo, link]
POISONS += [
    pytest.param(p, marks=pytest.mark.fault)
    for p in (device, directory, loop, unix_socket, garbage, huge)
]
BEST = "t0003-lsr"
"""The best trial of the sweep, which is exported."""
FILES = [
    "sweep/experiment.yaml", "sweep/driver.txt", "sweep/driver.json", "sweep/driver.lock", "sweep/spent.json",
    "sweep/study.journal", "sweep/confirm.yaml", "sweep/trials/t0000-kd", "sweep/trials",
    "sweep/trials/t0000-kd/trial.json", "sweep/trials/t0000-kd/metrics.jsonl", "sweep/trials/t0000-kd/error.txt",
    f"sweep/trials/{BEST}/student.safetensors", "sweep/tb", "arms/confirm.yaml", "arms/confirm.json", "arms/trials",
    "teachers/T/teacher.json", "teachers", "other", "test_openings.jsonl",
]  # fmt: skip


def name_of(poison: Callable[[Path, Path], None]) -> str:
    return poison.__name__


def sees(argv: list[str], storage: Path, name: str) -> bool:
    """Return True if a command gets the experiment of a file, or all experiments."""
    top = name.partition("/")[0]
    if top in ("sweep", "arms") and str(storage) not in argv:
        return any(word.startswith(str(storage / top)) for word in argv)
    return any(word.startswith(str(storage)) for word in argv)


def place_of(storage: Path, name: str) -> Path:
    if name.startswith("teachers/T"):
        teacher = next(p for p in sorted((storage / "teachers").iterdir()) if p.is_dir())
        return teacher / name.rpartition("/")[2]
    return storage / name


def removed(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@pytest.mark.slow
@pytest.mark.parametrize("poison", POISONS, ids=name_of)
@pytest.mark.parametrize(
    "verb",
    long_after(len(READ_MOST), [*READ_MOST, *(verb for verb in VERBS if verb not in READ_MOST)]),
)
def test_no_verb_hangs_fails_or_shows_another_file(
    verb: str, poison: Callable[[Path, Path], None], whole: Path, tmp_path: Path, answer: Answer
) -> None:
    victim = tmp_path / "victim"
    victim.write_text(f"{SECRET}\n")
    kept = tmp_path / "kept"
    for number, name in enumerate(FILES):
        path = place_of(whole, name)
        if there := os.path.lexists(path):
            path.rename(kept)
        poison(path, victim)
        try:
            for argv in commands(verb, whole, tmp_path / f"out-{number}"):
                if not sees(argv, whole, name):
                    continue
                assert SECRET not in answer(argv), argv
        finally:
            removed(path)
            if there:
                kept.rename(path)
        assert victim.read_text() == f"{SECRET}\n", name
        for written in tmp_path.glob("out-*"):
            assert not written.is_file() or SECRET not in written.read_text(), name


READERS = {
    "sweep/experiment.yaml": "status", "sweep/driver.txt": "status", "sweep/driver.json": "status",
    "sweep/spent.json": "status", "sweep/study.journal": "status", "sweep/confirm.yaml": "status",
    "sweep/trials/t0000-kd/trial.json": "trials", "sweep/trials/t0000-kd/metrics.jsonl": "trials",
    "sweep/trials/t0000-kd/error.txt": "logs", f"sweep/trials/{BEST}/student.safetensors": "export",
    "arms/confirm.yaml": "status", "arms/confirm.json": "status",
    "teachers/T/teacher.json": "teacher list",
}  # fmt: skip
"""A verb that reads each file. The other places are folders, a lock, and what only runs read."""


@pytest.mark.slow
def test_the_files_of_the_table_are_read_by_a_verb(
    storage: Path, tmp_path: Path, answer: Answer
) -> None:
    """Without this, a poison that no verb meets would count as harmless."""
    now = None

    def heard(event: str, given: tuple[Any, ...]) -> None:
        nonlocal met
        if now is not None and event == "open" and str(given[0]) == str(now):
            met = True

    sys.addaudithook(heard)
    assert set(READERS) < set(FILES)
    for number, (name, verb) in enumerate(READERS.items()):
        path, met = place_of(storage, name), False
        if there := path.exists():
            kept = path.rename(tmp_path / "kept")
        path.write_bytes(b"{")
        now = path
        for argv in commands(verb, storage, tmp_path / f"out-{number}"):
            met = path.name in answer(argv) or met  # libraries in C open files without a sound
        now = None
        path.unlink()
        if there:
            kept.rename(path)
        assert met, name


@pytest.mark.parametrize("poison", POISONS, ids=name_of)
@pytest.mark.parametrize(
    "verb", [v for v in VERBS if any(is_of_files(a) or a.dest == "file" for a in VERBS[v]._actions)]
)
def test_no_argument_that_names_a_file_hangs_a_verb(
    verb: str, poison: Callable[[Path, Path], None], storage: Path, tmp_path: Path, answer: Answer
) -> None:
    victim = tmp_path / "victim"
    victim.write_text(f"{SECRET}\n")
    path = tmp_path / "given.yaml"
    poison(path, victim)
    (argv, *_) = commands(verb, storage, tmp_path / "out")
    there = [i for i, word in enumerate(argv) if word.startswith(str(tmp_path))]
    for i in there:
        answer([*argv[:i], str(path), *argv[i + 1 :]])
        assert victim.read_text() == f"{SECRET}\n", argv
        assert poison in (garbage, huge) or not path.is_file() or path.is_symlink(), (
            f"{argv}: it was replaced"
        )


# --- what steers a terminal ------------------------------------------------------------------------------------

EVIL = "\x1b[31m\x1b]0;pwned\x07\x9b2J\u202egpj\u2066\u200e\rX"


def poisoned_texts(tree: Any) -> Any:
    """Return a copy with escape sequences in all texts, except those that decide how it is read."""
    if isinstance(tree, dict):
        return {key: value if key in KEPT else poisoned_texts(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [poisoned_texts(value) for value in tree]
    return f"{tree}{EVIL}" if isinstance(tree, str) else tree


KEPT = (
    "config",
    "space",
    "name",
    "compared",
    "status",
    "student",
    "objective",
    "loop_version",
    "seeds",
    "test",
)


@pytest.fixture
def evil(storage: Path) -> Path:
    """Put escape sequences into all names, reasons, notes and traces in a storage directory."""
    for path in [*storage.glob("*/trials/*/trial.json"), *storage.glob("teachers/*/teacher.json")]:
        about = json.loads(path.read_text())
        changes = {"name": f"{about['name']}{EVIL}", "reason": f"so{EVIL}\nand{EVIL}"}
        if path.name == "trial.json":
            changes["parameters"] = {**about["parameters"], f"x.y{EVIL}": f"v{EVIL}"}
            changes["status"] = "failed" if about["number"] == 0 else about["status"]
        path.write_text(
            json.dumps({**about, **(changes if path.name == "trial.json" else {"note": EVIL})})
        )
        (path.parent / "error.txt").write_text(f"A trace of another\n{EVIL}\n")
        if "arms" in path.parts:
            continue
        metrics = path.with_name("metrics.jsonl")
        if metrics.exists():
            lines = [
                json.dumps({**json.loads(one), f"val_{EVIL}": 1})
                for one in metrics.read_text().splitlines()
            ]
            metrics.write_text("\n".join([*lines, ""]))
    for path in (storage / "sweep/experiment.yaml", storage / "arms/confirm.yaml"):
        path.write_text(dump_yaml(poisoned_texts(read_yaml(path))))
    judged = json.loads((storage / "arms/confirm.json").read_text())
    (storage / "arms/confirm.json").write_text(json.dumps(poisoned_texts(judged)))
    (storage / f"odd{EVIL}").mkdir()
    (storage / f"odd{EVIL}/experiment.yaml").write_text(f"layout: {json.dumps(EVIL)}\n")
    return storage


@pytest.mark.slow
@pytest.mark.parametrize("verb", VERBS)
def test_no_verb_steers_the_terminal(verb: str, evil: Path, tmp_path: Path, answer: Answer) -> None:
    given = [*commands(verb, evil, tmp_path / "out")]
    given += [[word.replace("/sweep", f"/odd{EVIL}") for word in argv] for argv in given]
    for argv in given:
        said = answer(argv).replace("A trace of another", "")
        steering = {
            c for c in said if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")
        } - {"\n", "\t"}
        assert not steering, argv


@pytest.mark.parametrize(
    "more", [[], ["-o", "csv"], ["-o", "json"], ["--columns", "trial,reason,number"]]
)
def test_no_format_of_trials_steers_the_terminal(
    more: list[str], evil: Path, answer: Answer
) -> None:
    said = answer(["trials", str(evil / "sweep"), *more])
    assert "\x1b" not in said and "\u202e" not in said and "\r" not in said and "\\u001b" in said
    if "json" in more:
        assert any(EVIL in row["trial"] for row in json.loads(said)), (
            "and a program reads what there was"
        )


def test_a_trial_that_tells_of_others_stays_on_its_line(evil: Path, answer: Answer) -> None:
    lines = answer(["trials", str(evil / "sweep")]).splitlines()
    assert len(lines) == 1 + len(read_records(evil / "sweep"))


def test_yaml_that_is_shown_reads_back_as_what_it_was() -> None:
    from tfkd_ray.settings.files import legible

    tree = {
        "a": EVIL,
        "b": "größe 2 試",
        "c": [f"\ud83d\ude00{EVIL}".encode("utf-16", "surrogatepass").decode("utf-16")],
    }
    assert parse_yaml(legible(dump_yaml(tree)), "shown") == tree


# --- all experiments -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "what", ["driver.json", "folder of another", "loop", "folder for a file", "fifo"]
)
def test_one_bad_experiment_does_not_end_ls(what: str, storage: Path, answer: Answer) -> None:
    bad = storage / "bad"
    if what == "loop":
        bad.symlink_to("bad")
    else:
        shutil.copytree(storage / "sweep", bad, symlinks=True)
    if what == "driver.json":
        (bad / "driver.txt").write_text("process 1 on nowhere\n")
        (bad / "driver.json").write_text("{garbage")
    elif what == "folder for a file":
        removed(bad / "experiment.yaml")
        (bad / "experiment.yaml").mkdir()
    elif what == "fifo":
        removed(bad / "experiment.yaml")
        os.mkfifo(bad / "experiment.yaml")
    elif what == "folder of another":
        bad.chmod(0)
    reason = {
        "loop": "Too many levels",
        "folder of another": "Permission denied",
        "fifo": "is a named pipe",
    }.get(what, "")
    opened_up = [p for p in (storage, *storage.parents) if p.stat().st_uid == 0]
    if what == "folder of another" and os.getuid() == 0:
        pytest.importorskip("resource")
        said = as_nobody(storage, opened_up)
    else:
        said = answer(["ls", "--storage", str(storage)])
    rows = {line.split()[0]: line for line in said.splitlines()[1:] if not line.startswith(" ")}
    assert set(rows) == {"arms", "bad", "sweep"}
    assert (
        "unreadable" in rows["bad"]
        and reason in said
        and "unreadable" not in rows["arms"] + rows["sweep"]
    )


def as_nobody(storage: Path, above: list[Path]) -> str:
    """Return the output of `tfkd ls` for a user who may not read everything, as root may."""
    from tfkd_ray.show.status import ls, ls_lines

    before = {path: path.stat().st_mode for path in above}
    for path in above:
        path.chmod(path.stat().st_mode | 0o055)
    os.seteuid(65534)
    try:
        return "\n".join(ls_lines(ls(storage), 120))
    finally:
        os.seteuid(0)
        for path, mode in before.items():
            path.chmod(mode)


# --- links that are planted ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["driver.txt", "driver.lock", "study.journal", "tb", "trials/t0000-kd/metrics.jsonl",
                                  "trials/t0000-kd/error.txt", "trials/tuner.pkl", "trials/t0099-kd", "spent.json",
                                  "ended.jsonl"])  # fmt: skip
def test_a_resume_writes_through_no_link(name: str, storage: Path, tmp_path: Path) -> None:
    from tfkd_ray.run.tune import resume_tuner

    victim = tmp_path / "victim"
    victim.mkdir() if name in ("tb", "trials/t0099-kd") else victim.write_text("precious")
    path = storage / "sweep" / name
    removed(path)
    path.symlink_to(victim)
    with pytest.raises(ConfigError) as told:
        resume_tuner(storage / "sweep", add_trials=1)
    assert f"{name}: is a link" in str(told.value)
    assert list(victim.iterdir()) == [] if victim.is_dir() else victim.read_text() == "precious"


def test_a_trials_folder_that_is_a_link_is_not_counted_twice(storage: Path) -> None:
    from tfkd_ray.show.status import read_lasts, status

    trials = storage / "sweep/trials"
    before = status(storage / "sweep")
    (trials / "t0098-kd").symlink_to("t0000-kd")
    assert (
        len(read_records(storage / "sweep"))
        == len(read_lasts(storage / "sweep"))
        == before["trials"]["started"]
    )
    assert status(storage / "sweep")["rows"] == before["rows"]


def test_a_file_is_written_under_a_name_that_nobody_can_guess(tmp_path: Path) -> None:
    victim, path = tmp_path / "victim", tmp_path / "r.html"
    victim.write_text("precious")
    for planted in (".r.html.new", "r.html.part", f".r.html.{os.getpid()}", "r.html"):
        (tmp_path / planted).symlink_to(victim)
    write_text(path, "page")
    assert victim.read_text() == "precious" and path.read_text() == "page" and not path.is_symlink()
    assert not list(tmp_path.glob(".*.part"))


def test_what_a_killed_writer_left_is_removed_by_the_next_write_beside_it_and_nothing_else(
    storage: Path, tmp_path: Path, answer: Answer
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    stays = {
        ".0123456789abcdef.part": False,  # old, and nobody holds it
        ".1111111111111111.part": True,  # held by a writer
        ".2222222222222222.part": True,  # young: its writer may be about to hold it
        ".33333333.part": True,  # of an export
        ".mine.part": True,
        "0123456789abcdef.part": True,
        ".4444444444444444.part": True,  # a link
        ".5555555555555555.part": True,  # a pipe
    }
    for name in stays:
        path = out / name
        if name.startswith(".4"):
            path.symlink_to("r.html")
        elif name.startswith(".5"):
            os.mkfifo(path)
        else:
            path.write_text("half a page")
        if not name.startswith(".2"):
            old = time.time() - 2 * LEFT_BEHIND_S
            os.utime(path, (old, old), follow_symlinks=False)
    with (out / ".1111111111111111.part").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        answer(["report", str(storage / "sweep"), "-o", str(out / "r.html")])
    assert {p.name for p in out.iterdir()} == {"r.html", *(n for n in stays if stays[n])}


def test_a_file_that_is_being_written_is_held_by_its_writer(tmp_path: Path) -> None:
    with whole_file(tmp_path / "a") as part:
        old = time.time() - 2 * LEFT_BEHIND_S
        os.utime(part, (old, old))
        write_text(tmp_path / "b", "beside it")
        part.write_text("whole")
    assert (tmp_path / "a").read_text() == "whole"
    assert {p.name for p in tmp_path.iterdir()} == {"a", "b"}


# --- what -o may be --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", ["link to a file", "dangling link", "directory", "device", "socket"]
)
def test_report_replaces_nothing_but_a_file(
    kind: str, storage: Path, tmp_path: Path, answer: Answer
) -> None:
    out, victim = tmp_path / "out.html", tmp_path / "victim"
    if kind == "device":
        out = Path("/dev/zero")
    elif kind == "socket":
        unix_socket(out, victim)
    elif kind == "directory":
        out.mkdir()
    else:
        victim.write_text("precious") if kind == "link to a file" else None
        out.symlink_to(victim)
    before = out.lstat()
    said = answer(["report", str(storage / "sweep"), "-o", str(out)])
    assert "name" in said and "-o report.html" in said
    assert out.lstat().st_mode == before.st_mode and out.lstat().st_ino == before.st_ino
    assert not victim.exists() or victim.read_text() == "precious"


@pytest.mark.slow
def test_report_goes_where_a_stream_is_meant(storage: Path, tmp_path: Path, answer: Answer) -> None:
    sweep = str(storage / "sweep")
    page = answer(["report", sweep, "-o", "/dev/stdout"])
    assert page.startswith("<!DOCTYPE html>") and page.rstrip().endswith("</html>")
    assert answer(["report", sweep, "-o", "-"]).startswith("<!DOCTYPE html>")
    assert not (tmp_path / "-").exists()
    for_reading = os.open(os.devnull, os.O_RDONLY)
    said = answer(["report", sweep, "-o", f"/dev/fd/{for_reading}"])
    assert "cannot be written to: it is open for reading only" in said
    os.close(for_reading)
    assert answer(["report", sweep, "-o", "/dev/null"]) == "" and Path("/dev/null").is_char_device()
    read, write = os.pipe()
    os.close(read)
    os.close(write)
    assert "cannot be written to" in answer(["report", sweep, "-o", f"/dev/fd/{write + 900}"])
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    assert (
        "no process reads from it" in answer(["report", sweep, "-o", str(pipe)]) and pipe.is_fifo()
    )


@pytest.mark.parametrize("kind", ["link", "fifo", "file", "device"])
def test_export_and_train_make_folders_out_of_nothing_else(
    kind: str, storage: Path, tmp_path: Path, answer: Answer
) -> None:
    out, target = tmp_path / "given", tmp_path / "target"
    if kind == "link":
        target.mkdir()
        out.symlink_to(target)
    elif kind == "fifo":
        os.mkfifo(out)
    elif kind == "file":
        out.write_text("precious")
    else:
        out = Path("/dev/null")
    before = out.lstat()
    assert "-o DIR" in answer(["export", str(storage / "sweep"), "-o", str(out)])
    if kind != "link":  # a folder of one's own may be elsewhere
        config = tmp_path / "c.yaml"
        config.write_text("objective: ce\nstudent: mlp\nepochs: 1\n")
        assert "--out DIR" in answer(["train", str(config), "--out", str(out)])
    assert out.lstat().st_mode == before.st_mode and out.lstat().st_ino == before.st_ino
    assert not target.exists() or not list(target.iterdir())


# --- names -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", [v for v in VERBS if "--name" in VERBS[v]._option_string_actions])
@pytest.mark.parametrize("name", ["teachers", "Teachers", "test_openings.jsonl", "a/b", "..", ".x", "-x", "x\n", "x\x1b[31m",
                                  "x" * 256, "x.part", " x", "a\\b", "", ".", "x\u202e", "teachers.", "teachers\ufe0f", "x.",
                                  "\uff54eachers", "te\u0430chers", "te\u0301achers", "TEST_Openings.jsonl.", "a\uff0fb",
                                  "experiment.yaml", "\uff0e\uff0e", "\u2025", "~", "~root", "\u2212x", "x.PART",
                                  "tea\u200bchers", "Confirm.YAML"])  # fmt: skip
def test_no_experiment_has_a_name_that_is_taken_or_is_none(
    verb: str, name: str, tmp_path: Path, answer: Answer
) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("objective: ce\nstudent: mlp\nepochs: 1\n" if verb == "tune" else ARMS)
    said = answer([verb, str(file), f"--name={name}", "--storage", str(tmp_path / "s")])
    assert "--name" in said and "choose" in said and "\x1b" not in said
    assert not (tmp_path / "s").exists()


def test_a_name_in_any_language_is_one() -> None:
    for name in (
        "a.b",
        "études 2",
        "учителя",
        "δάσκαλοι",
        "教師",
        "teachers2",
        "my-teachers",
        "x-1",
        "a~b",
        "é" * 90,
    ):
        check_name(name)


ARMS = "student: mlp\narms:\n- {name: a, objective: ce}\n- {name: b, objective: lsr}\n"


# --- what processes of a sweep leave for one another


def left(what: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Callable[[], Any]]:
    """A file that this package writes, and its reader."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(place))
    store = Store("s3://bucket/prefix")
    folder, mark = store.folder, Mark(place / "shared")
    (place / "trial").mkdir()
    trial = Trial(
        "x", stub=True, config={SECTION: Assignment("t0", 9, directory=place / "trial").section()}
    )
    if what in (".session", ".objects.json", "driver.json", "metrics.jsonl"):
        folder = store.mark() / "e"
    folder.mkdir(parents=True, exist_ok=True)
    return {
        ".store.json": (folder / ".store.json", lambda: store_of(folder)),
        ".session": (folder / ".session", lambda: remote._session(folder)),
        ".objects.json": (folder / ".objects.json", lambda: remote._read_index(folder)),
        "driver.json": (folder / "driver.json", lambda: Claim(store, "e")._fetched()),
        "metrics.jsonl": (folder / "metrics.jsonl", lambda: remote._files_in(folder)),
        "an answer": (mark.folder / "node", lambda: mark.answered("node")),
        "the word": (mark.folder / "driver", lambda: _look(str(mark.folder), mark.word, "node", None)["storage"]),
        "out_of_memory": (place / "trial/out_of_memory", lambda: give_larger_share(trial)),
        "broken_gpu.json": (place / "trial/broken_gpu.json", lambda: found_broken(trial)),
    }[what]  # fmt: skip


@pytest.mark.parametrize("kind", ["FIFO", "link", "garbage"])
@pytest.mark.parametrize(
    "what, seen",
    [
        *((".store.json", None), (".session", None), (".objects.json", {}), ("driver.json", None)),
        *(("metrics.jsonl", []), ("an answer", False), ("the word", ...)),
        *(("out_of_memory", None), ("broken_gpu.json", None)),
    ],
)
def test_what_processes_leave_for_one_another_is_read_as_a_file_or_not_at_all(
    what: str, seen: Any, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, read = left(what, tmp_path, monkeypatch)
    path.unlink(missing_ok=True)
    (tmp_path / "secret").write_text(SECRET)
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "link":
        path.symlink_to(tmp_path / "secret")
    else:
        path.write_bytes(b"\xff{")
    before = signal.signal(
        signal.SIGALRM, lambda number, frame: pytest.fail("waits for who writes to a pipe")
    )
    signal.alarm(LONGEST_S)
    try:
        found = read()
    except ConfigError as error:
        assert (
            path.name in str(error)
            and SECRET not in str(error)
            and what not in ("an answer", "the word")
        )
        return
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    if what == "metrics.jsonl" and kind == "garbage":
        seen = [path]
    if what == "the word":
        assert found == "holds other files there" or found.startswith("cannot use it (")
    else:
        assert found == seen
