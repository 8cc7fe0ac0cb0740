"""Readers of experiments: finished, running, killed, empty, damaged or large ones."""

import csv
import io
import json
import math
import os
import random
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import long_after
from filelock import FileLock
from rich.cells import cell_len

from tfkd_ray.cli.main import main
from tfkd_ray.run.callbacks import Lock
from tfkd_ray.settings.errors import ConfigError
from tfkd_ray.settings.files import legible, write_text
from tfkd_ray.show import status as readers
from tfkd_ray.show.status import follow_status, ls, ls_lines, read_lasts, status, status_lines
from tfkd_ray.show.trials import logs, trials_table
from tfkd_ray.space.ranges import Range
from tfkd_ray.space.space import Space, build_space
from tfkd_ray.store.experiment import Record, best, read_records, write_experiment, write_record
from tfkd_ray.store.storage import experiment_of

TREE: dict[str, Any] = {
    "student": {"name": "mlp", "hidden": [8]},
    "objective": [
        {
            "name": "tfkd_reg",
            "alpha": {"low": 0.05, "high": 0.95},
            "temperature": {"low": 1.5, "high": 20, "log": True},
            "correct_prob": {"low": 0.9, "high": 0.999, "log_complement": True},
        },
        {
            "name": "kd_standardised",
            "alpha": {"low": 0.05, "high": 0.95},
            "temperature": {"low": 1.5, "high": 6},
        },
        {"name": "lsr", "alpha": {"low": 0.02, "high": 0.4, "log": True}},
        "ce",
    ],
    "optim": {"lr": {"low": 0.01, "high": 0.5, "log": True}, "batch_size": {"choices": [32, 64]}},
}


def make_sweep(experiment: Path, trials: int = 24, epochs: int = 18, **changes: Any) -> Space:
    """Write an experiment with made-up values: trials stop at the rungs, every 40th fails."""
    search = {"num_samples": trials, **changes.pop("search", {})}
    space = build_space(
        {**TREE, "epochs": epochs, "teacher": {"model": "mlp"}, "search": search, **changes}
    )
    write_experiment(
        experiment,
        space.tree,
        ["/somewhere/bin/tfkd", "tune", "mine.yaml", "--name", experiment.name],
    )
    (experiment / "driver.txt").write_text("process 999999 on nowhere\n")
    rungs, g = space.search.stopping.rungs(epochs), random.Random(0)
    lr = next(p for p in space.parameters if p.name == "optim.lr")
    assert isinstance(lr.domain, Range)
    for n in range(trials):
        branch = space.branches[n % len(space.branches)]
        values = {}
        for p in branch.parameters:
            d, u = p.domain, g.random()
            if not isinstance(d, Range):
                values[p.name] = g.choice(d.values)
            elif d.log:
                values[p.name] = d.low * (d.high / d.low) ** u
            elif d.log_complement:
                values[p.name] = 1 - (1 - d.low) * ((1 - d.high) / (1 - d.low)) ** u
            else:
                values[p.name] = d.low + (d.high - d.low) * u
        top = 0.95 - 0.06 * math.log10(values["optim.lr"] / 0.1) ** 2 + g.gauss(0, 0.004)
        top -= 0.02 * abs(values.get(f"objective.{branch.objective}.alpha", 0.9) - 0.4)
        end = epochs if g.random() < 0.3 else g.choice(rungs or [epochs])
        name = f"t{n:04d}-{branch.objective}"
        record = Record(experiment / "trials" / name, n, name, branch.objective,
                        "failed" if n % 40 == 39 else "done" if end == epochs else "stopped", values,
                        branch.config(values).model_dump(mode="json"), "Diverged: train_loss is nan" if n % 40 == 39 else None)  # fmt: skip
        write_record(record)
        lines = [
            line(e, top * (1 - math.exp(-6 * e / epochs)) + g.gauss(0, 0.002))
            for e in range(1, end + 1)
        ]
        (record.folder / "metrics.jsonl").write_text("".join(lines))
        (record.folder / "result.json").symlink_to("metrics.jsonl")
        if record.status == "failed":
            (record.folder / "error.txt").write_text(
                "Traceback (most recent call last):\n  ...\nDiverged: train_loss is nan\n"
            )
    return space


def line(epoch: int, accuracy: float) -> str:
    """Return one line of a metrics.jsonl."""
    metrics = {"epoch": epoch, "train_loss": 2.3 / epoch, "train_ce": 2.3 / epoch, "val_accuracy": accuracy, "val_top5": 1.0,
               "val_nll": 3 - 2.9 * accuracy, "val_ece": 0.02, "lr": 0.1, "seconds": 0.25, "images_per_s": 5000.0}  # fmt: skip
    return json.dumps(metrics) + "\n"


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a finished sweep with a user's name: 48 trials of 18 epochs, 1 of them failed."""
    experiment = tmp_path_factory.mktemp("storage") / "größe 2 試"
    make_sweep(experiment, 48)
    return experiment


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """Return a sweep of 4 trials that a test may change."""
    make_sweep(tmp_path / "small", 4)
    return tmp_path / "small"


def hold(experiment: Path, held: Any) -> None:
    """Hold an experiment's lock in a process of its own, as a driver does."""
    lock = Lock(*experiment_of(experiment))
    held.set()
    time.sleep(60)
    lock.release()


@pytest.fixture
def driver(small: Path, forkserver: Any) -> Iterator[Any]:
    """Yield a process that holds the lock of `small`, as a driver does."""
    held = forkserver.Event()
    process = forkserver.Process(target=hold, args=(small, held))
    process.start()
    assert held.wait(60)
    yield process
    process.kill()
    process.join()


def change(experiment: Path, number: int, **changes: Any) -> Path:
    """Rewrite a trial.json and return the trial's folder."""
    path = next(experiment.glob(f"trials/t{number:04d}-*/trial.json"))
    write_text(path, json.dumps(json.loads(path.read_text()) | changes))
    return path.parent


# --- status


SIGNS = tuple("=+-@\uff1d\uff20\u2212\u207b")  # with which a formula begins
LONG = {"escape": "\x1b", "private use": "\ue000", "kinds": "\ue000\x1b\u200b\x9b", "lines": "\n", "accents": "a\u0301"}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("text", long_after(2, LONG.values()), ids=LONG)
def test_a_text_of_millions_of_odd_characters_is_shown_in_seconds_and_cut_where_people_read(
    small: Path, text: str
) -> None:
    reason = "begin" + 3_000_000 // len(text) * text + "end"
    folder = change(small, 0, status="failed", reason=reason)
    begin = time.process_time()
    lines = [
        *status_lines(status(small)),
        *trials_table(small).splitlines(),
        *trials_table(small, columns="trial,reason").splitlines(),
    ]
    assert max(map(len, lines)) < 20_000 and any("begin" in line for line in lines)
    said = list(logs(small, folder.name))
    assert max(map(len, said)) < 300_000 and str(folder / "trial.json") in said[-1]
    wholly = trials_table(small, columns="reason", output="csv")
    assert len(wholly) > 2_900_000 and "end" in wholly[-1000:]
    assert time.process_time() - begin < 30, "was 10 s for each million"


def test_what_is_made_legible_fast_is_what_each_character_says() -> None:
    odd = "".join(map(chr, range(0x3000)))
    for text in (odd, odd[:300], "\x1b[1m\n", "plain", "\U000e0001\ud800ü\u2028"):
        assert legible(text) == "".join(map(legible, text))


def test_readers_import_neither_torch_nor_ray_nor_optuna_and_write_nothing(sweep: Path) -> None:
    before = {p: p.lstat().st_mtime_ns for p in sweep.rglob("*")}
    code = (
        "import sys; from pathlib import Path; from tfkd_ray.show import status as r, trials as t; e = Path(sys.argv[1])\n"
        "r.status_lines(r.status(e)); t.trials_table(e); r.ls_lines(r.ls(e.parent)); list(t.logs(e, '3')); r.best_of(e)\n"
        "assert not {'torch', 'ray', 'optuna', 'scipy'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(sweep)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {p: p.lstat().st_mtime_ns for p in sweep.rglob("*")} == before


def test_status_says_what_the_files_say(sweep: Path) -> None:
    records, found = read_records(sweep), status(sweep)
    json.dumps(found, allow_nan=False)
    assert (
        found["name"] == "größe 2 試" and found["state"] == "finished" and found["kind"] == "sweep"
    )
    for name in ("done", "stopped", "failed"):
        count = sum(r.status == name for r in records)
        assert found["trials"][name] == count == sum(row[name] for row in found["rows"].values())
    winner = best(records, "val_accuracy")
    assert winner is not None and found["best"]["trial"] == winner.name
    assert found["best"]["value"] == winner.last["val_accuracy"]
    for name in ("ce", "lsr"):
        rival = best([r for r in records if r.objective == name], "val_accuracy")
        assert rival is not None and found["baselines"][name]["trial"] == rival.name
    assert found["epochs"] == {"done": sum(len(r.metrics) for r in records), "planned": 48 * 18}
    assert found["failures"] == [{"trial": "t0039-ce", "reason": "Diverged: train_loss is nan"}]
    assert found["rate"] is None and found["left_s"] is None


def test_status_is_at_most_80_columns_wide(sweep: Path) -> None:
    found = status(sweep)
    found["failures"] = [{"trial": "t", "reason": "試" * 90 + "\x1b[31m"}]
    for line_ in status_lines(found):
        assert cell_len(line_) <= 80 and line_.isprintable()
    assert any("not a verdict" in line_ for line_ in status_lines(found))


def test_the_last_line_is_the_last_whole_one_however_long(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert readers.last_line(path) == {}
    long = json.dumps({"epoch": 2, "x" * 3 * readers.LOG_TAIL: 1})
    for text, epoch in (("", None), ('{"epo', None), ('{"epoch": 1}\n', 1), ('{"epoch": 1}\n{"epo', 1),
                        (f'{{"epoch": 1}}\n{long}\n{{"ep', 2), (f"{long}\n", 2)):  # fmt: skip
        path.write_text(text)
        assert readers.last_line(path).get("epoch") == epoch, text[:40]


@pytest.mark.slow
def test_a_sweep_runs_while_its_driver_holds_the_lock_and_is_interrupted_once_that_is_killed(
    small: Path, driver: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = change(small, 1, status="running")
    (folder / "metrics.jsonl").write_text(line(1, 0.5) + line(2, 0.6) + '{"epoch": 3, "val_ac')
    found = status(small)
    assert (
        found["state"] == "running"
        and found["trials"]["running"] == 1
        and found["epochs"]["done"] > 2
    )
    assert found["rate"] is None or found["rate"] > 0
    driver.kill()
    driver.join()
    found = status(small)
    assert (
        found["state"] == "interrupted"
        and found["trials"]["running"] == 0
        and found["trials"]["interrupted"] == 1
    )
    assert main(["status", str(small)]) == 0
    assert f"resume with:\n  tfkd resume {small}" in capsys.readouterr().out
    assert "interrupted" in trials_table(small, filter=["number=1"])


def test_reading_never_holds_the_lock_that_a_driver_wants(small: Path) -> None:
    lock = FileLock(small / "driver.lock", blocking=False)
    (small / "driver.txt").write_text(f"process {os.getpid()} on {socket.gethostname()}\n")
    over = threading.Event()

    def read() -> None:
        while not over.is_set():
            status(small)

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(300):  # a Timeout here would be the reader's fault
        lock.acquire()
        lock.release()
    over.set()
    reader.join()


def test_a_process_that_no_longer_holds_the_lock_is_no_driver(small: Path) -> None:
    change(small, 1, status="running")
    (small / "driver.lock").touch()
    (small / "driver.txt").write_text(f"process {os.getpid()} on {socket.gethostname()}\n")
    assert status(small)["state"] == "interrupted"


def test_on_another_host_files_that_change_are_the_sign_of_life(small: Path) -> None:
    change(small, 1, status="running")
    assert status(small)["state"] == "running"
    old = time.time() - 2 * readers.QUIET_S
    for path in [small / "driver.txt", *small.glob("trials/*/metrics.jsonl")]:
        os.utime(path, (old, old))
    assert status(small)["state"] == "interrupted"


def test_the_time_left_is_what_ended_trials_took(small: Path) -> None:
    now = time.time()
    os.utime(small / "driver.txt", (now - 100, now - 100))
    for number, (state, epochs) in enumerate([("done", 18), ("stopped", 6), ("running", 4)]):
        folder = change(small, number, status=state)
        (folder / "metrics.jsonl").write_text("".join(line(e, 0.5) for e in range(1, epochs + 1)))
        os.utime(folder / "result.json", (now - 100, now - 100), follow_symlinks=False)
    gone = next(small.glob("trials/t0003-*"))
    (gone / "trial.json").unlink()
    found = status(small)
    assert found["rate"] == pytest.approx(28 / 100, rel=0.1)
    left = (18 - 4) + 18  # each is the first one of its objective, which passes every rung
    assert found["left_s"] == pytest.approx(left / found["rate"], rel=1e-6)
    counted = {"seconds": 100.0, "trial_seconds": 100.0, "left_s": 7000.0}
    (small / "spent.json").write_text(json.dumps(counted))
    assert status(small)["left_s"] == pytest.approx(7000, abs=60), "as the driver's view says"
    os.utime(small / "spent.json", (now - 200, now - 200))
    assert status(small)["left_s"] < 1000, "an earlier session's is none of this one"


def test_epochs_of_an_earlier_session_do_not_count_as_speed(small: Path) -> None:
    now = time.time()
    os.utime(small / "driver.txt", (now - 1, now - 1))
    for folder in small.glob("trials/*"):
        for path in (folder / "metrics.jsonl", folder / "result.json"):
            os.utime(path, (now - 999, now - 999), follow_symlinks=False)
    folder = change(small, 1, status="running")
    (folder / "metrics.jsonl").write_text(
        "".join(line(e, 0.5) for e in range(1, 18))
    )  # 0.25 s each
    assert status(small)["rate"] == pytest.approx(4, rel=0.3)


@pytest.mark.slow
def test_following_ends_with_the_sweep(small: Path, driver: Any) -> None:
    change(small, 1, status="running")
    states = []
    for found in follow_status(small, every_s=0.01):
        states.append(found["state"])
        if len(states) == 3:
            driver.kill()
            driver.join()
    assert states == ["running"] * 3 + ["interrupted"]


def test_an_experiment_without_trials_is_no_error(tmp_path: Path) -> None:
    make_sweep(tmp_path / "e", 4)
    for path in sorted((tmp_path / "e" / "trials").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    for _ in range(2):
        found = status(tmp_path / "e")
        assert (
            found["best"] is None
            and found["trials"]["started"] == 0
            and found["trials"]["planned"] == 4
        )
        assert any("no trial of full length" in line_ for line_ in status_lines(found))
        assert trials_table(tmp_path / "e", sort="val_accuracy", output="json") == "[]"
        if (tmp_path / "e" / "trials").exists():
            (tmp_path / "e" / "trials").rmdir()


def test_only_failures_and_values_that_are_no_numbers_are_never_best(small: Path) -> None:
    for number in range(4):
        folder = change(small, number, status="failed" if number else "done", reason=None)
        (folder / "metrics.jsonl").write_text(line(18, math.nan))
    found = status(small)
    assert found["best"] is None and found["trials"]["failed"] == 3
    assert found["failures"][0]["reason"] == "no reason is known"
    rows = json.loads(trials_table(small, output="json"))
    assert {row["val_accuracy"] for row in rows} == {None}
    with pytest.raises(ConfigError, match="no trial of full length yet"):
        readers.best_of(small)


BROKEN = {
    "not there": (lambda e: None, "gone", r"no such directory"),
    "a directory of experiments": (lambda e: None, "..", r"a directory of experiments; name one of them: small"),
    "not an experiment": (lambda e: None, "trials", r"not an experiment: there is no experiment.yaml in it"),
    "older layout": (lambda e: (e / "experiment.yaml").write_text("layout: 0\n"), "", r"layout 0, and this release reads layout 1"),
    "cut": (lambda e: (e / "experiment.yaml").write_text("layout: 1\nspace: {search: {}}\n"), "", r"changed by hand or truncated"),
    "cut comparison": (lambda e: (e / "confirm.yaml").write_text("layout: 1\n"), "", r"confirm.yaml:\n.*changed by hand or truncated"),
    "trial of another release": (lambda e: change(e, 2, colour="red"), "", r"t0002-lsr.trial.json:\n.*truncated, or not written by this release"),
    "cut trial": (lambda e: next(e.glob("trials/t0002*/trial.json")).write_text('{"number'), "", r"truncated, or not written by this release"),
    "metrics that are none": (lambda e: next(e.glob("trials/t0002*/metrics.jsonl")).write_bytes(b"\0\0\0\n"), "", r"or truncated"),
}  # fmt: skip


@pytest.mark.parametrize("break_it, where, message", BROKEN.values(), ids=BROKEN)
def test_what_cannot_be_read_is_one_sentence(
    small: Path, break_it: Any, where: str, message: str
) -> None:
    break_it(small)
    for read in (status, trials_table):
        with pytest.raises(ConfigError, match=message):
            read(small / where)


@pytest.mark.slow
def test_status_of_a_thousand_trials_takes_less_than_a_second(tmp_path: Path) -> None:
    make_sweep(tmp_path / "large", 1000, 100, search={"stopping": "none"})
    taken = []
    for _ in range(3):
        start = time.process_time()
        found = status(tmp_path / "large")
        taken.append(time.process_time() - start)
    assert found["trials"]["started"] == 1000 and found["epochs"]["done"] > 50_000
    assert min(taken) < 1, taken


# --- trials

FILTERS: dict[str, Any] = {
    "objective=lsr": lambda r: r.objective == "lsr",
    "objective!=lsr": lambda r: r.objective != "lsr",
    "status=done": lambda r: r.status == "done",
    "val_accuracy>0.9": lambda r: r.last["val_accuracy"] > 0.9,
    "epoch <= 6": lambda r: r.last["epoch"] <= 6,
    "optim.lr<0.1": lambda r: r.parameters["optim.lr"] < 0.1,
    "lr<0.1": lambda r: r.parameters["optim.lr"] < 0.1,
    "alpha>=0.3": lambda r: r.parameters.get(f"objective.{r.objective}.alpha", -1) >= 0.3,
    "objective.lsr.alpha>0": lambda r: r.objective == "lsr",
    "batch_size=32": lambda r: r.parameters["optim.batch_size"] == 32,
    "trial=t0003-ce": lambda r: r.number == 3,
    "number=3": lambda r: r.number == 3,
}


@pytest.mark.parametrize("text", FILTERS)
def test_a_filter_keeps_the_trials_it_says(sweep: Path, text: str) -> None:
    kept = [row["number"] for row in json.loads(trials_table(sweep, filter=[text], output="json"))]
    wanted = [r.number for r in read_lasts(sweep) if FILTERS[text](r)]
    assert kept == wanted and 0 < len(kept) < 48


@pytest.fixture
def mixed(small: Path) -> Path:
    """Return four trials with null, true, 1 and similar texts as choices of two parameters."""
    values = [(None, "=1+1"), (True, "null"), (1, "true"), ("true", "1")]
    for record, (a, b) in zip(read_records(small), values, strict=True):
        write_record(replace(record, parameters={"x.a": a, "x.b": b}, reason=None))
    return small


@pytest.mark.parametrize(
    "text, numbers",
    [
        ("a=null", [0]), ("a=~", [0]), ("a!=null", [1, 2, 3]), ("a=true", [1]), ("a=1", [2]), ("a=1.0", [2]),
        ('a="true"', [3]), ('a="1"', []), ("a>0", [2]), ("b=null", []), ('b="null"', [1]), ('b="true"', [2]),
        ("b=true", []), ("b=1", []), ('b="1"', [3]), ("b==1+1", [0]), ("a=True", [1]), ("objective=ce", [3]),
    ],
)  # fmt: skip
def test_null_true_one_and_their_texts_are_told_apart_by_filters(
    mixed: Path, text: str, numbers: list[int]
) -> None:
    rows = json.loads(trials_table(mixed, filter=[text], output="json"))
    assert [row["number"] for row in rows] == numbers


def test_a_value_that_is_no_number_is_found_by_its_name(small: Path) -> None:
    for record, value in zip(
        read_records(small), (math.nan, math.inf, -math.inf, 1.0), strict=True
    ):
        write_record(replace(record, parameters={"x.a": value}))
    wanted = {"a=nan": [0], "a=.nan": [0], "a!=nan": [1, 2, 3], "a=inf": [1], "a=-inf": [2], "a<nan": [], "a!=1": [0, 1, 2]}  # fmt: skip
    for text, numbers in wanted.items():
        rows = json.loads(trials_table(small, filter=[text], output="json"))
        assert [row["number"] for row in rows] == numbers, text


def test_null_true_one_and_their_texts_are_told_apart_in_tables(mixed: Path) -> None:
    table = [line.split() for line in trials_table(mixed, columns="a,b").splitlines()[1:]]
    assert table == [["null", "=1+1"], ["true", '"null"'], ["1", '"true"'], ['"true"', '"1"']]
    rows = list(csv.reader(io.StringIO(trials_table(mixed, columns="a,b", output="csv"))))
    assert rows == [
        ["a", "b"],
        ["null", "'=1+1"],
        ["true", '"null"'],
        ["1", '"true"'],
        ['"true"', '"1"'],
    ]
    assert "a=null b==1+1" in trials_table(mixed), "YAML's word, not Python's and no empty cell"


@pytest.mark.parametrize(
    "text",
    [
        "=1+1",
        "+1+1",
        "-1+1",
        "@SUM(1)",
        " =1",
        "\t=1",
        "\n=1",
        "\r=1",
        "=cmd|' /C calc'!A0",
        "\uff1d1+1",
        "\uff20SUM(1)",
        "\u2212" + "1+1",
        "\u00a0=1",
        "a;=1+1",
        "a; \uff1d1",
        "a\t+1",
        "a\n=1",
        "a\r@SUM(1)",
        "\u207b1",
    ],
)
def test_no_cell_of_csv_is_run_by_a_spreadsheet(small: Path, text: str) -> None:
    for record in read_records(small):
        write_record(
            replace(record, status="failed", reason=text, parameters={text: text, "lr": -0.5})
        )
    whole = trials_table(small, output="csv")
    header, *rows = csv.reader(io.StringIO(whole, newline=""))
    [marked] = [name for name in header if name.replace("'", "") == legible(text).replace("'", "")]
    for row in rows:
        cells = dict(zip(header, row, strict=True))
        assert cells["reason"] == marked and cells["lr"] == "-0.5", "a number stays one"
    begun_elsewhere = re.split(
        r"[;\t\n\r]", whole.replace(",-0.5", "")
    )  # as by a German spreadsheet
    assert not [c for c in begun_elsewhere if c.lstrip()[:1] in SIGNS and c.strip()]
    for row in rows:
        cells = dict(zip(header, row, strict=True))
        assert not [
            c for name, c in cells.items() if name != "lr" and c.lstrip()[:1] in tuple("=+-@") and c
        ]


def test_filters_are_anded(sweep: Path) -> None:
    rows = json.loads(
        trials_table(
            sweep, filter=["objective=kd_standardised", "val_accuracy>0.9", "lr<0.2"], output="json"
        )
    )
    assert rows and all(
        r["objective"] == "kd_standardised" and r["val_accuracy"] > 0.9 and r["optim.lr"] < 0.2
        for r in rows
    )


def test_sorting_puts_trials_without_the_field_last(sweep: Path) -> None:
    for sort, reverse in (("alpha", False), ("alpha:desc", True)):
        rows = json.loads(trials_table(sweep, sort=sort, columns="trial,alpha", output="json"))
        values = [row["alpha"] for row in rows]
        there = [v for v in values if v is not None]
        assert (
            len(values) == 48
            and there == sorted(there, reverse=reverse)
            and values[len(there) :] == [None] * 12
        )


def test_csv_json_and_table_say_the_same(sweep: Path) -> None:
    options: dict[str, Any] = {
        "sort": "val_accuracy:desc",
        "columns": "trial,val_accuracy,optim.lr",
        "limit": 3,
    }
    rows = json.loads(trials_table(sweep, output="json", **options))
    lines = trials_table(sweep, output="csv", **options).splitlines()
    assert lines == [
        "trial,val_accuracy,optim.lr",
        *(f"{r['trial']},{r['val_accuracy']},{r['optim.lr']}" for r in rows),
    ]
    table = trials_table(sweep, **options).splitlines()
    assert [line_.split()[0] for line_ in table] == ["trial", *(r["trial"] for r in rows)]
    assert len(trials_table(sweep, output="csv").splitlines()) == 49


@pytest.mark.parametrize("width", [60, 80, 120])
def test_tables_and_logs_fit_a_terminal_and_are_whole_in_a_pipe(sweep: Path, width: int) -> None:
    whole, cut = trials_table(sweep), trials_table(sweep, width=width)
    assert max(map(len, cut.splitlines())) <= width < max(map(len, whole.splitlines()))
    assert whole.splitlines()[0].endswith("  settings") and "lsr.alpha=" in whole
    told = "(lines are cut to the terminal's width; -o csv or a pipe shows all columns, --columns some)"
    assert " ".join(cut.split()).endswith(told) and told not in whole
    epochs = [text for text in logs(sweep, "38", width=width) if text.startswith("epoch")]
    assert epochs and max(map(len, epochs)) <= width
    assert all("val_accuracy" in text for text in epochs)


def test_a_column_is_named_as_the_table_prints_it(sweep: Path) -> None:
    rows = json.loads(trials_table(sweep, columns="kd_standardised.alpha", output="json"))
    values = json.loads(trials_table(sweep, columns="alpha,objective", output="json"))
    kinds = [row["alpha"] if row["objective"] == "kd_standardised" else None for row in values]
    assert [row["kd_standardised.alpha"] for row in rows] == kinds and any(kinds)


QUESTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "filter without a value": ({"filter": ["objective"]}, "--filter 'objective': needs FIELD, one of = != < <= > >=, and a value"),
    "filter by what is not there": ({"filter": ["val_acuracy>0.9"]}, "no such field 'val_acuracy'; did you mean 'val_accuracy'?"),
    "status that is none": ({"filter": ["status=finished"]}, "no such status; known: done, failed, interrupted, paused, running, stopped"),
    "objective that is none": ({"filter": ["objective=kd_standard"]}, "no such objective; did you mean 'kd_standardised'?"),
    "text with <": ({"filter": ["lr<low"]}, "--filter 'lr<low': < needs a number, got 'low'"),
    "sort": ({"sort": "accuracy"}, "--sort: no such field 'accuracy'; did you mean 'val_accuracy'?"),
    "order": ({"sort": "lr:down"}, "--sort lr:down: lr, or lr:desc"),
    "columns": ({"columns": "trial,lrr"}, "--columns: no such field 'lrr'; did you mean 'lr'?"),
    "output": ({"output": "jsn"}, "--output: no such format 'jsn'; did you mean 'json'?"),
    "limit": ({"limit": 0}, "--limit: at least 1, got 0"),
}  # fmt: skip


@pytest.mark.parametrize("options, message", QUESTIONS.values(), ids=QUESTIONS)
def test_a_question_that_makes_no_sense_is_answered_with_a_way_out(
    sweep: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as error:
        trials_table(sweep, **options)
    assert message in str(error.value)


# --- logs and ls


def test_logs_are_the_epochs_and_how_it_ended(sweep: Path) -> None:
    for trial in ("t0039-ce", "t0039", "39"):
        lines = list(logs(sweep, trial))
        record = next(r for r in read_records(sweep) if r.number == 39)
        assert lines[0].startswith("epoch 1/18  train_loss 2.3  ") and len(record.metrics) == sum(
            "epoch " in x for x in lines
        )
        assert lines[-4:] == ["failed: Diverged: train_loss is nan", "Traceback (most recent call last):", "  ...", "Diverged: train_loss is nan"]  # fmt: skip
    records = read_records(sweep)
    early = next(r for r in records if r.status == "stopped" and r.reason is None)
    epoch = len(early.metrics)
    there = [r for r in records if r.objective == early.objective and len(r.metrics) >= epoch]
    values = sorted((r.metrics[epoch - 1]["val_accuracy"] for r in there), reverse=True)
    place = 1 + values.index(early.metrics[-1]["val_accuracy"])
    assert list(logs(sweep, early.name))[-1] == (
        f"stopped: early, after epoch {epoch}; its val_accuracy there is number {place} of the {len(there)} trials of "
        f"{early.objective} that reached it"
    )
    with pytest.raises(ConfigError, match="no trial 't0039-cf'; did you mean 't0039-ce'"):
        logs(sweep, "t0039-cf")
    with pytest.raises(ConfigError, match="'t003' is the beginning of 10 trials"):
        logs(sweep, "t003")


@pytest.mark.slow
def test_following_a_log_shows_whole_lines_until_the_trial_ends(small: Path, driver: Any) -> None:
    folder = change(small, 2, status="running")
    path = folder / "metrics.jsonl"
    path.write_text(line(1, 0.5) + line(2, 0.6)[:20])

    def write() -> None:
        time.sleep(0.2)
        path.write_text(line(1, 0.5) + line(2, 0.6) + line(3, 0.7))
        change(small, 2, status="done")

    writer = threading.Thread(target=write)
    writer.start()
    lines = list(logs(small, "2", follow=True, every_s=0.02))
    writer.join()
    assert [x.split()[1] for x in lines[:-1]] == ["1/18", "2/18", "3/18"] and lines[-1] == "done"


def test_ls_lists_what_is_there_and_says_what_cannot_be_read(small: Path) -> None:
    storage = small.parent
    (storage / "broken").mkdir()
    (storage / "broken" / "experiment.yaml").write_text("layout: 7\n")
    (storage / "teachers").mkdir()
    found = {entry["name"]: entry for entry in ls(storage)}
    assert set(found) == {"small", "broken"}
    assert (
        found["small"]["state"] == "finished"
        and found["small"]["trials"] == found["small"]["ended"] == 4
    )
    assert found["broken"]["state"] == "unreadable" and "layout 7" in found["broken"]["why"]
    json.dumps(list(found.values()), allow_nan=False)
    assert all(cell_len(line_) <= 80 for line_ in ls_lines(ls(storage)))
    assert ls_lines(ls(small)) == ["no experiments here"]
    with pytest.raises(ConfigError, match="no such directory"):
        ls(storage / "gone")


def test_a_comparison_of_arms_is_read_like_a_sweep(tmp_path: Path) -> None:
    from tfkd_ray.space.arms import build_arms, new_comparison

    arms = [{"name": "plain", "objective": "ce"}, {"name": "smooth", "objective": "lsr"}]
    compared = build_arms({"arms": arms, "epochs": 3, "student": "mlp"})
    new_comparison(compared, [1001, 1002], tmp_path / "c")
    folder = tmp_path / "c" / "trials" / "smooth-s1001"
    write_record(Record(folder, 1, folder.name, "lsr", "done", {"arm": "smooth", "seed": 1001}, {}))
    (folder / "metrics.jsonl").write_text('{"epoch": 3, "train_loss": 0.5}\n')
    found = status(tmp_path / "c")
    assert (
        found["kind"] == "comparison"
        and found["metric"] is None
        and found["state"] == "interrupted"
    )
    assert found["trials"]["planned"] == 4 and found["epochs"] == {"done": 3, "planned": 12}
    assert found["rows"]["smooth"]["done"] == 1 and found["rows"]["plain"]["done"] == 0
    assert "smooth-s1001" in trials_table(tmp_path / "c") and status_lines(found)
    with pytest.raises(ConfigError, match="a comparison of arms has no best trial"):
        readers.best_of(tmp_path / "c")
