"""Storages of studies: journals, damaged ones included, SQLite, PostgreSQL, the dashboard."""

import contextlib
import os
import pwd
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import optuna
import pytest
import ray
from conftest import Run, long_after
from test_search import run_sweep, space

from tfkd_ray.run import journal as journal_file
from tfkd_ray.run import studies
from tfkd_ray.run.journal import drop_stale_locks, open_journal
from tfkd_ray.run.searcher import OptunaSearcher
from tfkd_ray.run.studies import open_storage, whole_url
from tfkd_ray.run.tune import build_tuner, resume_tuner
from tfkd_ray.settings.errors import ConfigError
from tfkd_ray.settings.yaml import dump_yaml
from tfkd_ray.space.space import build_space
from tfkd_ray.store.experiment import read_experiment, read_records, write_experiment

TREE: dict[str, Any] = {
    "student": {"name": "mlp", "hidden": [8]},
    "epochs": 2,
    "objective": "ce",
    "optim": {"lr": {"low": 0.01, "high": 0.5, "log": True}},
}


def tree(**search: Any) -> dict[str, Any]:
    return {**TREE, "search": {"num_samples": 3, "stopping": "none", "max_concurrent": 1, **search}}


# --- the journal


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    path = tmp_path / "study.journal"
    run_sweep(OptunaSearcher(space(num_samples=4), path))
    return path


@pytest.mark.slow
def test_a_line_that_a_crash_left_half_written_is_cut_off_wherever_it_was_cut(
    journal: Path,
) -> None:
    content = journal.read_bytes()
    start = content[:-1].rfind(b"\n") + 1
    for upto in range(start + 1, len(content)):
        journal.write_bytes(content[:upto])
        open_journal(journal)
        assert journal.read_bytes() == content[:start]


def broken(content: bytes, how: str) -> tuple[bytes, int]:
    """Return (a damaged journal, the byte of the damage)."""
    lines = content.splitlines(keepends=True)
    byte = len(b"".join(lines[:5]))
    if how == "zeros":
        return content[:byte] + bytes(40) + content[byte + 40 :], byte
    if how == "a half line in the middle":
        return content[: byte + 9] + content[byte + len(lines[5]) :], byte
    if how == "an operation that is none":
        return content[:byte] + b'{"op_code":99,"worker_id":"x"}\n' + content[byte:], byte
    if how == "a line without what it needs":
        return content[:byte] + b'{"op_code":4,"worker_id":"x"}\n' + content[byte:], byte
    if how == "another file's text":
        return content[:byte] + b"hello\n" + content[byte:], byte
    return content + b"\0" * 30, len(content)


@pytest.mark.parametrize(
    "how",
    [
        "zeros", "a half line in the middle", "an operation that is none", "a line without what it needs",
        "another file's text", "zeros at the end",
    ],
)  # fmt: skip
def test_anything_worse_is_reported_with_the_byte_and_nothing_is_changed(
    journal: Path, how: str
) -> None:
    content, byte = broken(journal.read_bytes(), how)
    journal.write_bytes(content)
    with pytest.raises(
        ConfigError,
        match=rf"byte {byte}: this is no line of Optuna's journal: b'.*nothing was changed",
    ):
        OptunaSearcher(space(), journal).suggest("a")
    assert journal.read_bytes() == content


def lock(journal: Path) -> Path:
    """Create Optuna's lock of a journal."""
    path = journal.with_name("study.journal.lock")
    path.symlink_to(journal)
    return path


def test_a_lock_that_a_killed_driver_left_is_removed(
    journal: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_file, "LOCK_S", 0.2)
    rest = journal.with_name("study.journal.lock5ca2.rename")
    rest.symlink_to(journal)
    young, other = lock(journal), journal.with_name("another.journal.lock")
    other.write_text("")
    start = time.monotonic()
    drop_stale_locks(journal)
    assert not young.is_symlink() and not rest.is_symlink() and other.exists()
    assert 0.2 <= time.monotonic() - start < 2
    monkeypatch.setattr(journal_file, "LOCK_S", 60)
    os.utime(lock(journal), (0, 0), follow_symlinks=False)  # old: nothing to wait for
    drop_stale_locks(journal)
    drop_stale_locks(journal)
    assert not young.is_symlink() and OptunaSearcher(space(num_samples=6), journal).remaining() == 2


def test_a_lock_that_somebody_holds_is_waited_for_and_not_taken_away(journal: Path) -> None:
    """A dashboard writes a note while a sweep is resumed."""
    path = lock(journal)
    inode = path.lstat().st_ino

    def write() -> None:
        time.sleep(0.3)
        assert path.lstat().st_ino == inode  # it still belongs to the writer
        path.unlink()

    with ThreadPoolExecutor(1) as pool:
        writer, start = pool.submit(write), time.monotonic()
        drop_stale_locks(journal)
        assert 0.25 < time.monotonic() - start < journal_file.LOCK_S
        writer.result()


# --- SQLite


@pytest.mark.slow
def test_a_sweep_in_sqlite_proposes_what_one_in_a_journal_does_also_after_a_kill(
    tmp_path: Path,
) -> None:
    url = f"sqlite:///{tmp_path}/s.db"
    whole = run_sweep(OptunaSearcher(space(num_samples=8), tmp_path / "a"))
    before = run_sweep(
        OptunaSearcher(space(num_samples=8, storage=url), tmp_path / "none"), kill_at=5
    )
    after = run_sweep(OptunaSearcher(space(num_samples=8, storage=url), tmp_path / "none"))
    assert before + after[1:] == whole and not (tmp_path / "none").exists()
    assert OptunaSearcher(space(num_samples=8), tmp_path / "none", storage=url).remaining() == 0


UNREACHABLE = [
    ("sqlite:////nowhere/s.db", "cannot be used: unable to open database file"),
    ("postgresql://me:secret@127.0.0.1:1/db", "Connection refused"),
    ("oracle9://me:secret@host/db", "is no URL of a database that SQLAlchemy knows"),
    ("mysql+nodriver://me:secret@host/db", "is no URL of a database that SQLAlchemy knows"),
    ("mysql+pymysql://me:secret@host/db", "needs the package"),
]


@pytest.mark.parametrize("url, sentence", UNREACHABLE, ids=[u for u, _ in UNREACHABLE])
def test_a_storage_that_cannot_be_reached_is_refused_before_anything_is_written(
    tmp_path: Path, url: str, sentence: str
) -> None:
    with pytest.raises(ConfigError) as error:
        build_tuner(tree(storage=url), name="e", storage=tmp_path)
    assert str(error.value).startswith("search.storage: ") and sentence in str(error.value)
    assert "secret" not in str(error.value) and list(tmp_path.iterdir()) == []


def test_the_password_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TFKD_STORAGE", raising=False)
    hidden, whole = "postgresql://me:***@host/db", "postgresql://me:secret@host/db"
    assert whole_url(whole) == whole
    with pytest.raises(
        ConfigError,
        match=r"the password of postgresql://me:\*\*\*@host/db is not kept; set TFKD_STORAGE",
    ):
        whole_url(hidden)
    monkeypatch.setenv("TFKD_STORAGE", whole)
    assert whole_url(hidden) == whole
    monkeypatch.setenv("TFKD_STORAGE", "postgresql://me:secret@other/db")
    with pytest.raises(ConfigError) as error:
        whole_url(hidden)
    assert "secret" not in str(error.value) and "other" in str(error.value)


@pytest.mark.parametrize("how", long_after(1, ["IMMEDIATE", "EXCLUSIVE"]))
@pytest.mark.slow
def test_a_database_that_somebody_else_writes_to_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setattr(studies, "SQLITE_WAIT_S", 0.1)
    url = f"sqlite:///{tmp_path}/s.db"
    s = build_space(
        {**space(num_samples=4).tree, "search": {"num_samples": 4, "storage": url, "study": "e"}}
    )
    run_sweep(OptunaSearcher(s, tmp_path / "none"), kill_at=3)
    (tmp_path / "e").mkdir()
    write_experiment(tmp_path / "e", s.tree, ["tfkd"])
    with contextlib.closing(sqlite3.connect(tmp_path / "s.db", isolation_level=None)) as other:
        other.execute(f"BEGIN {how}")
        new = OptunaSearcher(build_space(s.tree), tmp_path / "none", study="another")
        with pytest.raises(ConfigError) as error:
            new.remaining()
        assert str(error.value) == f"search.storage: {url} cannot be used: database is locked"
        if how == "EXCLUSIVE":  # nobody may read
            with pytest.raises(ConfigError, match="cannot be used: database is locked"):
                resume_tuner(tmp_path / "e")
    assert OptunaSearcher(s, tmp_path / "none").remaining() == 1  # released


@pytest.mark.ray
def test_an_experiment_in_sqlite_resumes_and_keeps_its_name_to_itself(
    ray_cluster: str, tmp_path: Path
) -> None:
    url = f"sqlite:///{tmp_path}/s.db"
    build_tuner(tree(storage=url), name="e", storage=tmp_path / "x").fit()
    experiment = tmp_path / "x" / "e"
    assert not (experiment / "study.journal").exists() and optuna.get_all_study_names(
        open_storage(url)
    ) == ["e/ce"]
    assert read_experiment(experiment)["space"]["search"]["study"] == "e"
    with pytest.raises(ConfigError, match=r"has studies called 'e' already; choose another --name"):
        build_tuner(tree(storage=url), name="e", storage=tmp_path / "y")
    assert not (tmp_path / "y").exists()
    experiment.rename(tmp_path / "x" / "moved")
    assert len(resume_tuner(tmp_path / "x" / "moved", add_trials=1).fit()) == 1
    assert [r.number for r in read_records(tmp_path / "x" / "moved")] == [0, 1, 2, 3]
    moved = tmp_path / "other.db"
    shutil.copy(tmp_path / "s.db", moved)
    assert (
        len(
            resume_tuner(
                tmp_path / "x" / "moved", add_trials=1, study_storage=f"sqlite:///{moved}"
            ).fit()
        )
        == 1
    )
    with pytest.raises(
        ConfigError, match=r"does not hold t0000-ce, t0001-ce, .* whose files are there"
    ):
        resume_tuner(
            tmp_path / "x" / "moved", add_trials=1, study_storage=f"sqlite:///{tmp_path}/empty.db"
        )


# --- PostgreSQL

BIN = next(iter(sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)), None)


@pytest.fixture
def postgres(request: pytest.FixtureRequest) -> Iterator[str]:
    """Yield the URL, with its password, of an own server on loopback; ended by its process id."""
    password = getattr(request, "param", "s3cret-word")
    if BIN is None or shutil.which("runuser") is None or os.geteuid() != 0:
        pytest.fail("needs root, and: apt-get install postgresql")
    user = pwd.getpwnam("postgres")
    folder = Path(
        tempfile.mkdtemp(prefix="tfkd-pg-")
    )  # pytest's directory is closed to the user postgres
    os.chown(folder, user.pw_uid, user.pw_gid)
    secret = folder / "password"
    secret.write_text(f"{unquote(password)}\n")
    os.chown(secret, user.pw_uid, user.pw_gid)

    def as_user(*command: str) -> list[str]:
        return ["runuser", "-u", "postgres", "--", *command]

    data = str(folder / "data")
    subprocess.run(
        as_user(f"{BIN}/initdb", "-D", data, "-A", "scram-sha-256", "-U", "tfkd", "--pwfile", str(secret), "-N"),
        check=True, capture_output=True, cwd=folder,
    )  # fmt: skip
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    server = subprocess.Popen(
        [f"{BIN}/postgres", "-D", data, "-p", str(port), "-c", "listen_addresses=127.0.0.1", "-c", f"unix_socket_directories={folder}", "-F"],
        user="postgres", group="postgres", extra_groups=[], cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    url = f"postgresql://tfkd:{password}@127.0.0.1:{port}/postgres"
    try:
        for _ in range(100):
            ready = subprocess.run(
                [f"{BIN}/pg_isready", "-h", "127.0.0.1", "-p", str(port)], capture_output=True
            )
            if ready.returncode == 0:
                break
            time.sleep(0.1)
        yield url
    finally:
        server.send_signal(signal.SIGINT)  # fast: without waiting for its clients
        server.wait(timeout=20)
        shutil.rmtree(folder)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.tools
def test_a_sweep_in_postgresql_resumes_and_writes_its_password_nowhere(
    ray_cluster: str, tmp_path: Path, postgres: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["tfkd", "tune", f"search.storage={postgres}"])
    monkeypatch.delenv("TFKD_STORAGE", raising=False)
    wrong = postgres.replace("s3cret-word", "an0ther")
    with pytest.raises(ConfigError) as error:
        build_tuner(tree(storage=wrong), name="e", storage=tmp_path)
    assert "password authentication failed" in str(error.value) and "an0ther" not in str(
        error.value
    )
    assert list(tmp_path.iterdir()) == []
    grid = build_tuner(tree(storage=postgres), name="e", storage=tmp_path).fit()
    assert len(grid) == 3 and grid.num_errors == 0
    with pytest.raises(ConfigError, match="is not kept; set TFKD_STORAGE"):
        resume_tuner(tmp_path / "e", add_trials=1)
    monkeypatch.setenv("TFKD_STORAGE", postgres)
    assert len(resume_tuner(tmp_path / "e", add_trials=1).fit()) == 1
    assert [(r.number, r.status) for r in read_records(tmp_path / "e")] == [
        (n, "done") for n in range(4)
    ]
    files = [p for p in (tmp_path / "e").rglob("*") if p.is_file()]
    assert any(p.suffix == ".pkl" for p in files)
    assert [p for p in files if b"s3cret-word" in p.read_bytes()] == []
    whole = run_sweep(
        OptunaSearcher(space(num_samples=8), tmp_path / "a")
    )  # and proposes as a journal does
    searchers = [
        OptunaSearcher(space(num_samples=8), tmp_path / "none", storage=postgres, study="k")
        for _ in "ab"
    ]
    before, after = run_sweep(searchers[0], kill_at=5), run_sweep(searchers[1])
    assert before + after[1:] == whole
    for searcher in searchers:
        searcher.close()


CANARY = "kanarienvogel"


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.tools
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "postgres",
    [f"{CANARY} {CANARY}/{CANARY}:{CANARY}#{CANARY}", f"{CANARY}'\"{CANARY}}}{{{CANARY}+{CANARY}&{CANARY}", f"%40{CANARY}%2F%3F{CANARY}%25"],
    indirect=True,
    ids=["blank, slash, colon, hash", "quotes, braces, plus, and", "encoded"],
)  # fmt: skip
def test_no_file_no_page_and_no_output_of_a_sweep_holds_a_part_of_an_odd_password(
    ray_cluster: str, tmp_path: Path, postgres: str, tfkd: Run
) -> None:
    (tmp_path / "given").mkdir()
    (tmp_path / "given/space.yaml").write_text(dump_yaml(tree(storage=postgres, num_samples=2)))
    wrong = postgres.replace(CANARY, f"{CANARY}s", 1)
    begun, said = time.time(), []
    for words, code, env in (
        (["check", "given/space.yaml"], 0, {}),
        (["tune", "given/space.yaml", "--name", "w", "--study-storage", wrong], 2, {}),
        (["tune", "given/space.yaml", "--name", "e"], 0, {}),
        (["resume", "tfkd_results/e", "--add-trials", "1"], 2, {}),
        (["resume", "tfkd_results/e", "--add-trials", "1", "--study-storage", postgres], 0, {}),
        (["resume", "tfkd_results/e", "--add-trials", "1"], 2, {"TFKD_STORAGE": wrong}),
        *(
            (([verb, "tfkd_results/e"], 0, {"TFKD_STORAGE": postgres}))
            for verb in ("status", "trials", "best")
        ),
        (["ls"], 0, {"TFKD_STORAGE": postgres}),
        (["report", "tfkd_results/e", "-o", "page.html"], 0, {"TFKD_STORAGE": postgres}),
    ):
        done = tfkd(*words, **env)
        assert done.returncode == code, (words, done.stderr)
        said.append(done.stdout + done.stderr)
    assert [text for text in said if CANARY in text] == []
    written = [p for p in tmp_path.rglob("*") if p.is_file() and p.parent.name != "given"]
    logs = [p for p in session_folder().rglob("*") if p.is_file() and p.stat().st_mtime >= begun]
    kinds = {"page.html", "tuner.pkl", "experiment.yaml", "driver.txt"}
    assert (
        kinds <= {p.name for p in written} and any("tfevents" in p.name for p in written) and logs
    )
    assert [p for p in (*written, *logs) if CANARY.encode() in p.read_bytes()] == []


def session_folder() -> Path:
    """Return the folder in which the session's Ray writes its logs."""
    return Path(ray._private.worker._global_node.get_session_dir_path()) / "logs"


# --- the dashboard


@pytest.mark.slow
def test_the_dashboard_opens_the_journal_while_a_search_goes_on_and_does_not_disturb_it(
    tmp_path: Path,
) -> None:
    whole = run_sweep(OptunaSearcher(space(), tmp_path / "a"))
    journal = tmp_path / "study.journal"
    searcher = OptunaSearcher(space(), journal)
    configs = run_sweep(searcher, most=6)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = Path(sys.executable).with_name("optuna-dashboard")
    server = subprocess.Popen(
        [command, str(journal), "--host", "127.0.0.1", "--port", str(port)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip

    def read(path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
            return str(answer.read().decode())

    try:
        for _ in range(200):
            try:
                studies = read("/api/studies")
                break
            except OSError:
                time.sleep(0.2)
        assert "tfkd/ce" in studies and "tfkd/lsr" in studies
        configs += run_sweep(searcher, most=4)
        content = read("/api/studies/0?after=0")
        assert content.count('"intermediate_values"') >= 3
        configs += run_sweep(searcher)
        assert '"trials"' in read("/api/studies/1?after=0")
    finally:
        server.terminate()
        server.wait(timeout=20)
    assert configs == whole and OptunaSearcher(space(), journal).remaining() == 0
    assert build_space(space().tree).search == space().search
