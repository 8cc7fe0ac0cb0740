"""The command line from a user's view: bad input in process, real work in real processes."""

import argparse
import json
import os
import pty
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, Run, long_after
from test_clusters import given, verbs
from test_readers import change, make_sweep
from test_report import make_grid

from tfkd_ray.cli.main import _parser, main
from tfkd_ray.cli.sweep import _print_summary
from tfkd_ray.cli.terminal import experiment_place, shell_word, sweep_or_arms
from tfkd_ray.launch.verbs import PLACES
from tfkd_ray.run.tune import build_tuner, resume_tuner
from tfkd_ray.settings.yaml import dump_yaml, parse_yaml
from tfkd_ray.show.status import is_running
from tfkd_ray.space.space import build_space, load_space
from tfkd_ray.store.experiment import pareto, read_records

SOFT = """
from torch import nn

def network(shape, num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes), nn.Softmax(1))
"""
SPACE = """
student: {name: mlp, hidden: [8]}
epochs: 3
objective: ce
optim: {lr: {low: 0.01, high: 0.5, log: true}}
search: {num_samples: 2}
"""


def noted(tfkd: Run, tmp_path: Path, *words: str) -> None:
    """Assert that a verb prints the note on a network that ends in softmax, and succeeds."""
    (tmp_path / "soft.py").write_text(SOFT)
    shared = {"student": "soft:network", "epochs": 1, "data": {"name": "digits", "subset": 200}}
    space = {
        **shared,
        "objective": "ce",
        "optim": {"lr": {"low": 0.01, "high": 0.1}},
        "search": {"num_samples": 1},
    }
    (tmp_path / "space.yaml").write_text(dump_yaml(space))
    (tmp_path / "run.yaml").write_text(dump_yaml({**shared, "objective": "ce"}))
    arms = [{"name": name, "objective": name} for name in ("ce", "lsr")]
    (tmp_path / "arms.yaml").write_text(dump_yaml({**shared, "title": "two", "arms": arms}))
    done = tfkd(*words)
    assert done.returncode == 0, done.stderr
    said = " ".join((done.stdout + done.stderr).split())
    assert re.search(
        "note: (arm ce: )?model soft:network: returns probabilities .* It seems to end in softmax",
        said,
    )


@pytest.mark.parametrize(
    "words",
    long_after(2, [("check", "space.yaml"), ("train", "run.yaml"), ("check", "arms.yaml")]),
    ids=" ".join,
)
def test_a_note_on_a_network_is_printed(words: tuple[str, ...], tfkd: Run, tmp_path: Path) -> None:
    noted(tfkd, tmp_path, *words)


@pytest.mark.ray
@pytest.mark.parametrize(
    "words",
    long_after(1, [("tune", "space.yaml"), ("confirm", "arms.yaml", "--seeds", "2")]),
    ids=" ".join,
)
def test_a_note_on_a_network_is_printed_before_trials_run(
    words: tuple[str, ...], ray_cluster: str, tfkd: Run, tmp_path: Path
) -> None:
    noted(tfkd, tmp_path, *words)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(SPACE)
    return tmp_path


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Run a command that must end with exit code 2, one message on stderr and nothing on stdout."""
    try:
        code = main(argv)
    except SystemExit as exit_:
        code = int(exit_.code or 0)
    out, err = capsys.readouterr()
    assert code == 2 and out == "" and "Traceback" not in err
    return err


BAD_FILES = {
    "missing": (None, "no such file"),
    "empty": ("", "is empty"),
    "tab": ("objective:\n\tname: ce\n", "line 2, column 1: a tab, but YAML indents with spaces only"),
    "not yaml": ("objective: [ce", "not YAML"),
    "list": ("- ce\n", "must be settings (key: value), got a list"),
    "misspelt key": ("objective: ce\noptimm: {lr: 1}\n", "optimm: no such setting; did you mean 'optim'?"),
    "alpha 1.5": ("objective: {name: kd, alpha: 1.5}\n", "objective.kd.alpha: should be at most 1, got 1.5"),
    "temperature 0": ("objective: {name: tfkd_reg, temperature: 0}\n", "objective.tfkd_reg.temperature: should be greater than 0, got 0"),
    "correct_prob 1": ("objective: {name: tfkd_reg, correct_prob: 1.0}\n", "objective.tfkd_reg.correct_prob: should be less than 1, got 1.0"),
    "correct_prob below 1/K": ("objective: {name: tfkd_reg, correct_prob: 0.05}\n", "objective.tfkd_reg.correct_prob: must be at least 1/K = 0.1"),
    "low > high": ("objective: ce\noptim: {lr: {low: 2, high: 1}}\n", "optim.lr: low must not be above high, got low 2 and high 1"),
    "log from 0": ("objective: ce\noptim: {lr: {low: 0, high: 1, log: true}}\n", "optim.lr: a log range starts above 0, got low 0"),
    "unknown objective": ("objective: cee\n", "objective: no such name 'cee'; did you mean 'ce'?"),
    "unknown model": ("objective: ce\nstudent: resnet\n", "student: no such name 'resnet'; did you mean 'resnet50'?"),
    "unknown data": ("objective: ce\ndata: fashion\n", "data: no such name 'fashion'; did you mean 'fashion_mnist'?"),
    "twice": ("objective: ce\nobjective: kd\n", "key 'objective' is given twice"),
}  # fmt: skip


@pytest.mark.parametrize("verb", ["check", "tune", "train"])
@pytest.mark.parametrize("text, message", BAD_FILES.values(), ids=BAD_FILES)
def test_a_bad_file_gets_one_message_and_exit_code_2(
    here: Path, capsys: pytest.CaptureFixture[str], verb: str, text: str | None, message: str
) -> None:
    if text is not None:
        (here / "bad.yaml").write_text(text)
    err = refused(capsys, verb, "bad.yaml")
    assert "bad.yaml" in err and message in err
    assert {p.name for p in here.iterdir()} <= {"bad.yaml", "mine.yaml"}


def test_a_directory_is_no_file(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "dir").mkdir()
    assert "is a directory, not a file" in refused(capsys, "tune", "dir")


@pytest.mark.parametrize(
    "argv, message",
    [
        (["tune"], "the following arguments are required: FILE"),
        (["tun", "mine.yaml"], "no such verb: 'tun'; did you mean 'tune'?"),
        (["check", "mine.yaml", "optm.lr=1"], "optm: no such setting; did you mean 'optim'?"),
        (["check", "mine.yaml", "epochs"], "an override is key.path=value"),
        (["check", "mine.yaml", "--x"], "unrecognized arguments: --x"),
        (["status", "mine.yaml", "more"], "unrecognized arguments: more"),
        (["tune", "mine.yaml", "--name", "a/b"], "--name a/b: a plain name without slashes"),
        (
            ["tune", "mine.yaml", "data={name: mnist, root: /nowhere}"],
            "data mnist: not found: train-images-idx3-ubyte",
        ),
        (
            ["train", "mine.yaml", "optim.lr=1", "data={name: cifar10, root: /nowhere}"],
            "data cifar10: not found: cifar-10-python.tar.gz",
        ),
        (["tune", "mine.yaml", "--storage", "mine.yaml"], "mine.yaml cannot be written to"),
        (
            ["train", "mine.yaml"],
            "optim.lr: is searched (0.01 to 0.5 (log)), and one run needs one value; fix it: optim.lr=0.01",
        ),
        (["train", "mine.yaml", "optim.lr=1", "--out", "/proc/x"], "/proc cannot be written to"),
        (["resume", "."], "not an experiment: there is no experiment.yaml in it"),
        (["resume", ".", "--add-trials", "-3"], "--add-trials: a whole number, got '-3'"),
        (["best", "nowhere"], "nowhere: no such directory"),
        (["trials", "."], "not an experiment"),
        (["tensorboard", "."], "not an experiment"),
    ],
)
def test_a_wrong_command_gets_one_message_and_exit_code_2(
    here: Path, capsys: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    assert message in " ".join(refused(capsys, *argv).split())
    assert {p.name for p in here.iterdir()} == {"mine.yaml"}


def test_check_says_what_is_searched_fixed_and_conditional(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = "search.finalists={k: 3, seeds: 2}"
    assert main(["check", "digits_tfkd", "search.num_samples=40", more]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert (
        "then 2 further seeds of the best 3 of each objective: the best trial is chosen by their"
        in " ".join(out.split())
    )
    assert "40 trials, 10 for each of 4 objectives, 54 epochs each" in out
    assert "stopped by halving after [6, 18] epochs" in out
    assert re.search(
        r"objective tfkd_reg:\n(.*\n)*  objective.tfkd_reg.temperature +1.5 to 20 \(log\)", out
    )
    assert re.search(r"searched for every objective:\n  optim.lr +0.01 to 0.5 \(log\)", out)
    assert "teacher, once before the trials: training cnn with ce for 54 epochs" in out
    assert re.search(r"fixed:\n(.*\n)*  optim.batch_size +64", out) and "optim.momentum" not in out
    assert "25 more as in recipe plain of digits, or default (--all lists them)" in out
    assert main(["check", "digits_tfkd", "--all"]) == 0
    whole = capsys.readouterr().out
    assert re.search(r"fixed:\n(.*\n)*  optim.momentum +0.9", whole)
    assert max(len(line) for line in whole.splitlines()) <= 80
    assert len(out.splitlines()) < 32 and max(len(line) for line in out.splitlines()) <= 80


def test_check_says_what_is_done_with_a_grid(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = make_grid(tmp_path / "e") / "experiment.yaml"
    tree = parse_yaml(grid.read_text(), "grid")["space"]
    for stopping, said in (
        ("none", "every combination is one trial; it runs its full length"),
        ("halving", "every combination is one trial; it may be stopped early by search.stopping"),
    ):
        tree["search"]["stopping"] = stopping
        (tmp_path / "grid.yaml").write_text(dump_yaml(tree))
        assert main(["check", str(tmp_path / "grid.yaml")]) == 0
        assert said in " ".join(capsys.readouterr().out.split())


def test_a_finished_grid_is_not_told_to_add_trials(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_grid(tmp_path / "grid")
    make_sweep(tmp_path / "sweep", 8)
    for name, asked in (("grid", False), ("sweep", True)):
        tree = parse_yaml((tmp_path / name / "experiment.yaml").read_text(), name)["space"]
        assert _print_summary(build_space(tree), tmp_path / name, whole=True) == 0
        out = capsys.readouterr().out
        assert "tfkd report" in out and ("--add-trials" in out) == asked


@pytest.mark.slow
def test_check_keeps_to_80_columns_and_breaks_no_word(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for space in ("cifar100_defective_kd", "digits_optimizers", "imagenet_kd"):
        assert main(["check", space]) == 0
        for line in capsys.readouterr().out.splitlines():
            words = line.split()
            assert len(line) <= 80 or max(map(len, words)) > 60, line  # an address stays whole


def test_best_of_several_metrics_is_every_trial_that_no_other_beats(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_sweep(here / "e", 4, search={"metric": ["val_accuracy", "val_ece"], "stopping": "none"})
    for number, (accuracy, ece) in enumerate([(0.9, 0.2), (0.95, 0.3), (0.8, 0.1), (0.85, 0.25)]):
        folder = change(here / "e", number, status="done")
        last = {"epoch": 18, "val_accuracy": accuracy, "val_ece": ece}
        (folder / "metrics.jsonl").write_text(json.dumps(last) + "\n")
    assert main(["best", "e"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[:6] == [
        "# e: of 4 trials, 3 that no other beats on validation in all of",
        "# trial                  val_accuracy  val_ece",
        "# t0001-kd_standardised        0.9500   0.3000",
        "# t0000-tfkd_reg               0.9000   0.2000",
        "# t0002-lsr                    0.8000   0.1000",
        "# below: t0001-kd_standardised, the best in val_accuracy",
    ]
    (here / "best.yaml").write_text(out)
    assert load_space("best.yaml").single().objective.name == "kd_standardised"
    assert main(["best", "e", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["metrics"] == ["val_accuracy", "val_ece"] and found["trials"] == 4
    assert [entry["trial"][:5] for entry in found["best"]] == ["t0001", "t0000", "t0002"]
    assert found["best"][2]["values"] == {"val_accuracy": 0.8, "val_ece": 0.1}
    assert set(found["best"][0]) == {
        "trial",
        "objective",
        "values",
        "parameters",
        "config",
        "errors",
        "seeds",
        "feasible",
        "limited",
    }
    for trial in (here / "e" / "trials").iterdir():
        (trial / "metrics.jsonl").write_text('{"epoch": 18, "val_accuracy": 0.5}\n')
    assert "no trial of full length has a value of val_accuracy and of val_ece" in refused(
        capsys, "best", "e"
    )


def test_teachers_that_differ_in_their_seeds_are_announced_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tfkd_ray.cli.fit import teacher_lines
    from tfkd_ray.learn.config import TrainConfig

    runs = [TrainConfig.model_validate({"objective": "tfkd_self", "epochs": e, "teacher": {"seed": s}}).teacher_run()
            for e, s in ((9, 1), (9, 2), (3, 1), (9, 2))]  # fmt: skip
    told = teacher_lines([run for run in runs if run], tmp_path)
    for run in runs[:3]:
        assert run is not None
        told(run, None)
    assert runs[0] is not None
    told(runs[0], {"name": "mlp-1", "metrics": {"val_accuracy": 0.5}})
    assert capsys.readouterr().err.splitlines() == [
        "teacher: training mlp with ce for 9 epochs (2 seeds)",
        "teacher: training mlp with ce for 3 epochs",
        "teacher: mlp-1, val_accuracy 0.5000, kept for later",
    ]


def test_check_notes_that_nothing_is_searched(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", "mine.yaml", "optim.lr=0.1"]) == 0
    out = capsys.readouterr().out
    assert "note: nothing is searched: all 2 trials are the same run, including the seed" in out
    assert max(map(len, out.splitlines())) <= 80


@pytest.mark.slow
def test_train_trains_saves_and_goes_on(tfkd_inside: Run, here: Path) -> None:
    command = ["train", "mine.yaml", "optim.lr=0.1", "--out", "out"]
    first = tfkd_inside(*command, cwd=here)
    assert (
        first.returncode == 0
        and "val_accuracy 0." in first.stdout
        and "epoch 3: train_loss" in first.stderr
    )
    assert {"config.yaml", "metrics.jsonl", "student.safetensors"} <= {
        p.name for p in (here / "out").iterdir()
    }
    again = tfkd_inside(*command, cwd=here)
    assert again.returncode == 0 and again.stdout == first.stdout


def test_train_refuses_the_directory_of_another_run(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "mine.yaml", "optim.lr=0.1", "--out", "out"]) == 0
    before = {p.name: p.read_bytes() for p in (here / "out").iterdir()}
    capsys.readouterr()
    assert "has another run" in refused(
        capsys, "train", "mine.yaml", "optim.lr=0.2", "--out", "out"
    )
    assert {p.name: p.read_bytes() for p in (here / "out").iterdir()} == before


@pytest.mark.fault
@pytest.mark.slow
def test_ctrl_c_in_train_saves_at_the_end_of_the_epoch(tfkd: Run, here: Path) -> None:
    command = ["train", "mine.yaml", "optim.lr=0.1", "epochs=300", "--out", "out"]
    with subprocess.Popen(
        [sys.executable, "-m", "tfkd_ray", *command], cwd=here, stderr=subprocess.PIPE, text=True
    ) as run:  # fmt: skip
        assert run.stderr is not None
        for line in run.stderr:
            if line.startswith("epoch 20:"):
                break
        run.send_signal(signal.SIGINT)
        err = run.stderr.read()
    assert run.returncode == 130 and "to resume the run, repeat the command with --out out" in err
    told = len((here / "out" / "metrics.jsonl").read_text().splitlines())
    assert 20 <= told < 300
    again = tfkd(*command[:4], "epochs=300", "--out", "out", cwd=here)
    assert (
        again.returncode == 0
        and len((here / "out" / "metrics.jsonl").read_text().splitlines()) == 300
    )


@pytest.mark.slow
def test_a_run_that_diverges_fails_with_a_sentence(tfkd_inside: Run, here: Path) -> None:
    run = tfkd_inside("train", "mine.yaml", "optim.lr=1e20", cwd=here)
    assert (
        run.returncode == 1
        and "failed: train_loss is" in run.stderr
        and "Traceback" not in run.stderr
    )


@pytest.mark.slow
def test_a_closed_pipe_is_no_failure(here: Path) -> None:
    run = subprocess.run(
        ["bash", "-o", "pipefail", "-c", f"{sys.executable} -m tfkd_ray check digits_tfkd | head -1"],
        capture_output=True, text=True, cwd=here,
    )  # fmt: skip
    assert run.returncode == 0 and run.stderr == ""


# --- sweeps


@pytest.mark.ray
def test_an_experiment_name_that_exists_and_too_many_workers_are_refused(
    ray_cluster: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "tfkd_results" / "a").mkdir(parents=True)
    assert "experiment 'a' exists already" in refused(capsys, "tune", "mine.yaml", "--name", "a")
    assert "a trial needs 3 x 1 CPU, each on one node, and the cluster has room for 2" in refused(
        capsys, "tune", "mine.yaml", "workers=3"
    )
    assert [p.name for p in (here / "tfkd_results").iterdir()] == ["a"]


def test_a_path_in_a_command_that_is_shown_is_one_word_of_it(tmp_path: Path) -> None:
    path = tmp_path / "st {x} %d" / "a 'b' $c"
    assert shlex.split(shell_word(path)) == [str(path)] and shell_word(tmp_path / "plain") == str(
        tmp_path / "plain"
    )


@pytest.mark.ray
@pytest.mark.long  # CI runs this sweep with the outputs of README, and compares what it prints
def test_the_main_job_on_real_digits(ray_cluster: str, tfkd: Run, here: Path) -> None:
    """The sweep of the README as it stands there, piped: 24 trials, six for each objective, within 90 s."""
    start = time.monotonic()
    run = tfkd("tune", "digits_tfkd", "--name", "main", cwd=here)
    assert run.returncode == 0, run.stderr
    assert time.monotonic() - start < 90
    records = read_records(here / "tfkd_results" / "main")
    assert [r.objective for r in records] == ["tfkd_reg", "tfkd_self", "lsr", "ce"] * 6
    assert {r.status for r in records} == {"done", "stopped"}
    for objective in ("tfkd_reg", "tfkd_self", "lsr", "ce"):
        full = [r for r in records if r.objective == objective and r.status == "done"]
        assert full and all(len(r.metrics) == 54 and r.last["val_accuracy"] > 0.9 for r in full)
    assert re.search(r"^best: t\d{4}-\w+, val_accuracy 0\.9\d+$", run.stdout, re.M)
    assert "This is not a verdict: it is the best of 24 on validation" in run.stdout
    assert "written to tfkd_results/main" in run.stdout
    assert run.stdout.count("\n  tfkd ") == 5
    assert "\x1b" not in run.stderr and run.stderr.count("started") == 24
    assert max(len(line) for line in run.stdout.splitlines()) <= 80
    best = tfkd("best", "tfkd_results/main", cwd=here)
    (here / "best.yaml").write_text(best.stdout)
    assert best.returncode == 0 and tfkd("check", "best.yaml", cwd=here).returncode == 0
    listed = tfkd("trials", "tfkd_results/main", cwd=here)
    assert listed.returncode == 0 and len(listed.stdout.splitlines()) == 25


class Terminal:
    """`tfkd` on a real terminal of 80 x 24."""

    def __init__(self, *argv: str, cwd: Path) -> None:
        self.text = ""
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.chdir(cwd)
            env = {**os.environ, "COLUMNS": "80", "LINES": "24", "TERM": "xterm"}
            os.execve(sys.executable, [sys.executable, "-m", "tfkd_ray", *argv], env)

    def read_until(self, pattern: str, timeout_s: float = 60) -> None:
        until = time.monotonic() + timeout_s
        while not re.search(pattern, self.text) and time.monotonic() < until:
            try:
                self.text += os.read(self.fd, 65536).decode(errors="replace")
            except OSError:  # the other end is closed
                break
        assert re.search(pattern, self.text), self.text[-2000:]

    def press_ctrl_c(self) -> None:
        os.write(self.fd, b"\x03")

    def exit_code(self) -> int:
        while True:
            try:
                if not os.read(self.fd, 65536):
                    break
            except OSError:
                break
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


LONG = ["epochs=200", "search.num_samples=2", "search.stopping=none"]


@pytest.mark.slow
@pytest.mark.fault
@pytest.mark.ray
def test_ctrl_c_saves_and_resume_ends_with_the_exact_total(
    ray_cluster: str, tfkd_inside: Run, here: Path, epoch_by_epoch: None
) -> None:
    terminal = Terminal("tune", "mine.yaml", "--name", "c", *LONG, cwd=here)
    terminal.read_until(r"t0000-ce +[1-9]\d*/200")  # the live table shows it running
    terminal.press_ctrl_c()
    terminal.read_until(r"tfkd resume tfkd_results/c\s")
    assert terminal.exit_code() == 130
    records = read_records(here / "tfkd_results" / "c")
    stopped = [r for r in records if r.status == "interrupted"]
    assert any(r.metrics for r in stopped)  # the other may not have reached its first epoch
    assert all((r.folder / "last.ckpt").exists() for r in stopped if r.metrics)
    resumed = tfkd_inside("resume", "tfkd_results/c", cwd=here)
    assert resumed.returncode == 0, resumed.stderr
    after = read_records(here / "tfkd_results" / "c")
    assert [(r.number, r.status, len(r.metrics)) for r in after] == [
        (n, "done", 200) for n in range(2)
    ]
    for record in stopped:  # it resumed: the earlier epochs are the same to the microsecond
        again = next(r for r in after if r.number == record.number)
        assert again.metrics[: len(record.metrics)] == record.metrics


WRITES = """
import os, signal, sys
from tfkd_ray.cli.fit import _ctrl_c

class Progress:
    def note(self, text):
        print(text, file=sys.stderr, flush=True)

signal.signal(signal.SIGUSR1, lambda number, frame: None)
with _ctrl_c(Progress()):
    print("ready", flush=True)
    sys.stderr.write("x" * 300_000)
"""


@pytest.mark.slow
def test_ctrl_c_while_a_line_is_being_written_is_told_after_it(tmp_path: Path) -> None:
    """The terminal is slow: the write blocks, and the signal comes in its middle."""
    env = os.environ | {"PYTHONUNBUFFERED": ""}
    with subprocess.Popen(
        [sys.executable, "-c", WRITES], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env
    ) as child:
        assert child.stdout is not None and child.stdout.readline() == b"ready\n"
        time.sleep(0.5)
        child.send_signal(signal.SIGINT)
        time.sleep(0.5)
        _, said = child.communicate(timeout=60)
    assert child.returncode == 0 and said.startswith(b"x" * 300_000), said[-300:]
    assert b"stopping: trials save their state" in said and b"Traceback" not in said


@pytest.mark.slow
@pytest.mark.fault
@pytest.mark.ray
def test_ctrl_c_twice_stops_at_once(ray_cluster: str, here: Path, epoch_by_epoch: None) -> None:
    terminal = Terminal("tune", "mine.yaml", "--name", "d", *LONG, cwd=here)
    terminal.read_until(r"t0000-ce +[1-9]\d*/200")
    terminal.press_ctrl_c()
    terminal.read_until("Ctrl-C again")
    start = time.monotonic()
    terminal.press_ctrl_c()
    assert terminal.exit_code() == 130 and time.monotonic() - start < 2


@pytest.mark.slow
@pytest.mark.fault
@pytest.mark.ray
def test_ctrl_c_while_ray_starts_ends_cleanly(here: Path) -> None:
    env = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    command = [sys.executable, "-m", "tfkd_ray", "tune", "mine.yaml"]
    with subprocess.Popen(
        command, cwd=here, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
    ) as driver:
        assert driver.stderr is not None and driver.stdout is not None
        assert driver.stderr.readline() == "starting Ray\n"
        time.sleep(2)
        driver.send_signal(signal.SIGINT)
        err, out = driver.stderr.read(), driver.stdout.read()
    assert driver.returncode == 130, err
    assert "interrupted" in err and "Traceback" not in err and out == ""


def outcome(experiment: Path) -> list[tuple[Any, ...]]:
    """Return the results of a sweep's trials, without their times."""
    return [
        (r.number, r.status, r.parameters, [{k: v for k, v in m.items() if k not in ("seconds", "images_per_s")} for m in r.metrics])
        for r in read_records(experiment)
    ]  # fmt: skip


@pytest.mark.ray
def test_a_driver_killed_with_9_loses_nothing(
    ray_cluster: str, tfkd_inside: Run, warm: list[str], here: Path
) -> None:
    """With one trial at a time, the resumed sweep equals an undisturbed one, bit by bit."""
    settings = [
        "epochs=60",
        "checkpoint_every_s=0",
        "search.num_samples=4",
        "search.max_concurrent=1",
    ]
    build_tuner(load_space("mine.yaml", settings), name="whole", storage="tfkd_results").fit()
    command = [*warm, "-m", "tfkd_ray", "tune", "mine.yaml", "--name", "killed", *settings]
    with subprocess.Popen(
        command, cwd=here, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    ) as driver:
        assert driver.stderr is not None
        for line in driver.stderr:
            if line.startswith("t0001-ce: started"):
                break
        while not any(
            r.number == 1 and r.metrics for r in read_records(here / "tfkd_results" / "killed")
        ):
            time.sleep(0.01)
        driver.send_signal(signal.SIGKILL)
    killed = here / "tfkd_results" / "killed"
    while is_running(killed):  # the server of tests/warm.py kills what it forked a moment later
        time.sleep(0.01)
    assert any(r.status == "running" for r in read_records(killed))
    resumed = tfkd_inside("resume", "tfkd_results/killed", cwd=here)
    assert resumed.returncode == 0, resumed.stderr
    assert outcome(here / "tfkd_results" / "killed") == outcome(here / "tfkd_results" / "whole")


@pytest.mark.ray
@pytest.mark.fault
@pytest.mark.slow
@pytest.mark.parametrize(
    "search",
    [
        {"storage": "sqlite:///HERE/NAME.db", "stopping": "hyperband", "num_samples": 8},
        {"metric": ["val_accuracy", "val_ece"], "stopping": "none", "num_samples": 5},
    ],
    ids=["SQLite, Hyperband, published settings, an earlier experiment", "several metrics"],
)
def test_a_driver_killed_with_9_loses_nothing_of_what_else_there_is(
    ray_cluster: str, here: Path, search: dict[str, Any]
) -> None:
    lsr = {"name": "lsr", "alpha": {"low": 0.02, "high": 0.4, "log": True}}
    tree: dict[str, Any] = {
        **parse_yaml(SPACE, "space"),
        "objective": lsr,
        "epochs": 45,
        "checkpoint_every_s": 0,
    }
    prior = []
    if "storage" in search:
        build_tuner(
            {**tree, "search": {"num_samples": 2, "warm_start": False, "seed": 9}},
            name="old",
            storage=here,
        ).fit()
        prior = [here / "old"]

    def written(name: str) -> str:
        storage = (
            {"storage": search["storage"].replace("HERE", str(here)).replace("NAME", name)}
            if prior
            else {}
        )
        more = {"max_concurrent": 1, "sampler": {"name": "tpe", "startup": 3}}
        (here / f"{name}.yaml").write_text(
            dump_yaml({**tree, "search": {**search, **storage, **more}})
        )
        return f"{name}.yaml"

    build_tuner(written("whole"), name="whole", storage=here, priors=prior).fit()
    options = [
        "--name",
        "killed",
        "--storage",
        ".",
        *(word for p in prior for word in ("--prior", str(p))),
    ]
    command = [sys.executable, "-m", "tfkd_ray", "tune", written("killed"), *options]
    with subprocess.Popen(
        command, cwd=here, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    ) as driver:
        assert driver.stderr is not None
        said = ""
        for line in driver.stderr:
            said += line
            if line.startswith("t0003-lsr: started"):
                time.sleep(0.15)
                break
        driver.send_signal(signal.SIGKILL)
    before = {
        r.name: r.metrics for r in read_records(here / "killed") if r.status in ("done", "stopped")
    }
    assert 3 <= len(before) < search["num_samples"], said
    resume_tuner(here / "killed").fit()
    assert (
        outcome(here / "killed") == outcome(here / "whole")
        and len(outcome(here / "whole")) == search["num_samples"]
    )
    after = {r.name: r.metrics for r in read_records(here / "killed")}
    assert all(
        after[name] == metrics for name, metrics in before.items()
    )  # with its seconds: nothing ran again
    first = [r.parameters["objective.lsr.alpha"] for r in read_records(here / "whole")[:2]]
    assert first[:1] == [0.1] and (first[1] == 0.2 or search["num_samples"] < 8)


@pytest.mark.ray
def test_parameters_are_minimised_beside_accuracy_and_a_sweep_goes_on_in_a_wider_space(
    ray_cluster: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Check the front in `tune`, `best` and the report, then `tfkd resume --space`."""
    search = "search: {num_samples: 4, stopping: none, metric: [val_accuracy, parameters]}"
    student = "student: {choices: [{name: mlp, hidden: [4]}, {name: mlp, hidden: [32]}]}"
    text = SPACE.replace("student: {name: mlp, hidden: [8]}", student).replace(
        "search: {num_samples: 2}", search
    )
    (here / "mine.yaml").write_text(text)
    assert main(["tune", "mine.yaml", "--name", "front"]) == 0
    records = read_records(here / "tfkd_results" / "front")
    assert {r.last["parameters"] for r in records} == {
        64 * 4 + 4 + 4 * 10 + 10,
        64 * 32 + 32 + 32 * 10 + 10,
    }
    front = [r.name for r in pareto(records, ["val_accuracy", "parameters"])]
    out = capsys.readouterr().out
    assert 2 <= len(front) < 4
    assert "none is better in all of val_accuracy, parameters than:\n" in out
    assert f"used                     {sum(len(r.metrics) for r in records)} epochs, " in out
    assert main(["best", "tfkd_results/front"]) == 0
    best = capsys.readouterr().out
    assert re.findall(r"^# (t\S+) +0\.\d+ +\d+$", best, re.M) == front
    assert (
        main(["report", "tfkd_results/front"]) == 0 and capsys.readouterr().out == "report.html\n"
    )
    page = (here / "report.html").read_text()
    assert (
        "Validation accuracy against parameters of the student" in page
        and f"The Pareto front of 2 metrics: {', '.join(front)}" in page
    )
    (here / "wider.yaml").write_text(
        text.replace("low: 0.01", "low: 0.001").replace("num_samples: 4", "num_samples: 5")
    )
    (here / "other.yaml").write_text(text.replace("epochs: 3", "epochs: 4"))
    assert "epochs: was 3, and is 4 now" in refused(
        capsys, "resume", "tfkd_results/front", "--space", "other.yaml"
    )
    assert "no such file" in refused(
        capsys, "resume", "tfkd_results/front", "--space", "missing.yaml"
    )
    assert main(["resume", "tfkd_results/front", "--space", "wider.yaml", "--add-trials", "1"]) == 0
    assert "6 trials, " in capsys.readouterr().out
    after = read_records(here / "tfkd_results" / "front")
    assert [r.metrics for r in after[:4]] == [r.metrics for r in records] and len(after) == 6


# --- what is shipped


@pytest.mark.slow
def test_the_wheel_brings_the_search_spaces(tmp_path: Path) -> None:
    build = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        str(tmp_path),
        str(ROOT),
    ]
    subprocess.run(build, check=True, capture_output=True)
    site = tmp_path / "site"
    subprocess.run(
        [sys.executable, "-m", "zipfile", "-e", str(next(tmp_path.glob("*.whl"))), str(site)],
        check=True,
    )
    assert (site / "tfkd_ray" / "py.typed").exists()
    env = {**os.environ, "PYTHONPATH": str(site)}
    code = "import tfkd_ray; assert 'site/tfkd_ray' in tfkd_ray.__file__; from tfkd_ray.cli.main import main; main(['check', 'digits_tfkd'])"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert run.returncode == 0 and "24 trials" in run.stdout, run.stderr


# --- arms, teachers, explain, readers


def test_check_warns_of_a_setting_that_does_nothing(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "dead.yaml").write_text(
        "data: {name: cifar100, root: /nowhere}\nstudent: resnet18\nepochs: 9\n"
        "objective: {name: tfkd_reg, temperature: {low: 30, high: 40}, alpha: 0.01}\n"
    )
    assert main(["check", "dead.yaml"]) == 0
    out = capsys.readouterr().out
    assert (
        "warning: objective.tfkd_reg.temperature: dead: over its range the logit gradient moves by"
        in " ".join(out.split())
    )
    assert "note: on this machine data cifar100: not found" in out


@pytest.mark.slow
def test_check_and_explain_read_arms_files_too(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", "paper/table_9"]) == 0
    out = capsys.readouterr().out
    assert "24 arms:\n  mv2 (baseline): ce\n" in out and not out.startswith("\n")
    assert max(map(len, out.splitlines())) <= 80 and "; teacher, training " in " ".join(out.split())
    assert main(["explain", "paper/table_9"]) == 0
    out = capsys.readouterr().out
    assert (
        "equals lsr alpha 0.1596 with loss_scale 0.0595 (to 0.00 %)" in out
        and max(map(len, out.splitlines())) <= 80
    )
    assert main(["explain", "digits_tfkd"]) == 0
    assert "correct_prob  0.9 to 0.999 (log in 1 - x)" in capsys.readouterr().out


def test_plan_of_an_arms_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "digits_arms", "--seeds", "3..20", "--slots", "2"]) == 0
    out = capsys.readouterr().out
    assert "6600 epochs in all, in 220 runs" in out and max(map(len, out.splitlines())) <= 80
    assert "this is the limit of 20 seeds" in out


@pytest.mark.slow
@pytest.mark.parametrize(
    "argv, message",
    [
        (["confirm", "digits_arms", "--seeds", "1"], "with one run of each arm, a difference cannot be told from chance"),
        (["confirm", "digits_arms", "--top-k", "2"], "--top-k: is for sweeps; an arms file lists what is compared"),
        (["confirm", "digits_arms", "--baselines", "ce"], "--baselines: is for sweeps; an arms file lists"),
        (["confirm", ".", "--storage", "/x"], "--storage: settings and presets are for arms files"),
        (["confirm", ".", "epochs=2"], "settings: settings and presets are for arms files"),
        (["confirm", ".", "--preset", "smoke"], "--preset: settings and presets are for arms files"),
        (["check", "digits_arms", "--all"], "--all: is for search spaces"),
        (["plan", "mine.yaml", "--slots", "0"], "--slots: at least 1, got 0"),
        (["plan", "mine.yaml", "--seeds", "3"], "--seeds: is for an arms file, not for a search space"),
        (["plan", "mine.yaml", "--train-only"], "--train-only: is for an arms file, not for a search space"),
        (["plan", "digits_arms", "--seeds", "2..9"], "the first look needs 3 seeds or more"),
        (["plan", "digits_arms", "--seeds", "1000000000"], "at most 1000 seeds of each arm"),
        (["confirm", "digits_arms", "--seeds", "3..1001"], "at most 1000 seeds of each arm"),
        (["confirm", "mine.yaml"], "mine.yaml: is a search space without arms to compare; sweep it with `tfkd tune`"),
        (["confirm", "digits_arms", "epochs=x"], "arms.ce.epochs: should be a whole number"),
        (["confirm", "digits_arms", "--preset", "tiny"], "invalid choice: 'tiny'"),
        (["confirm", "paper/table_1", "data.root=/nowhere"], "data cifar100: not found: cifar-100-python.tar.gz"),
        (["train", "mine.yaml", "optim.lr=1", "data=imagenet", "student=resnet18", "--download"], "data imagenet: not for download; register at"),
        (["teacher", "train", "mine.yaml"], "none of its objectives needs a teacher"),
        (["teacher", "show", "cnn-1"], "no teacher 'cnn-1'; there is none"),
        (["export", "."], "has no student"),
        (["report", "."], "no experiment.yaml in it"),
        (["status", "nowhere"], "no such directory"),
        (["logs", ".", "t0000"], "no experiment.yaml in it"),
        (["check", "mine.yaml", "student=nets:small"], "there is no module 'nets'"),
        (["check", "mine.yaml", "student=timm:resnet1818"], "did you mean 'resnet18'"),
    ],
)  # fmt: skip
def test_more_wrong_commands(
    here: Path, capsys: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    err = " ".join(refused(capsys, *argv).split())
    assert message in err, err
    assert {p.name for p in here.iterdir()} == {"mine.yaml"}


RESUME = next(sub for words, sub in verbs(_parser()) if words == ("resume",))


@pytest.mark.parametrize(
    "option",
    [a for a in RESUME._actions if a.option_strings and a.dest not in (*PLACES, "help")],
    ids=lambda a: a.dest,
)
def test_a_comparison_goes_on_with_what_its_resume_is_asked_for_or_refuses_it(
    here: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    option: argparse.Action,
) -> None:
    (here / "c").mkdir()
    (here / "c/confirm.yaml").touch()
    gone_on: list[Path] = []
    monkeypatch.setattr(
        "tfkd_ray.cli.sweep.compare_arms",
        lambda directory, address, end: gone_on.append(directory) or 0,
    )
    code = main(["resume", "c", *given(option)])
    if option.dest in ("retry_failed", "on_end"):  # it always retries
        assert code == 0 and gone_on
    else:
        assert code == 2 and not gone_on
        assert (
            f"{option.option_strings[-1]}: is for sweeps; a comparison has fixed arms"
            in capsys.readouterr().err
        )


@pytest.mark.ray
def test_teachers_are_trained_listed_and_shown(
    ray_cluster: str, tfkd_inside: Run, tmp_path: Path
) -> None:
    (tmp_path / "kd.yaml").write_text(
        "student: {name: mlp, hidden: [4]}\nepochs: 2\nobjective: kd\n"
        "teacher: {model: {name: mlp, hidden: [8]}, stop_epoch: {choices: [1, 2]}}\noptim: {lr: {low: 0.1, high: 0.2}}\n"
    )
    made = tfkd_inside("teacher", "train", "kd.yaml")
    assert made.returncode == 0, made.stderr
    assert made.stderr.count("teacher: training mlp with ce for 2 epochs, stopped after") == 2
    folders = made.stdout.split()
    assert len(folders) == 2 and all(
        (tmp_path / f / "student.safetensors").exists() for f in folders
    )
    listed = tfkd_inside("teacher", "list").stdout.splitlines()
    assert [line.split()[1:3] for line in sorted(listed[1:], key=lambda x: x.split()[2])] == [
        ["digits", "1"],
        ["digits", "2"],
    ]
    shown = tfkd_inside("teacher", "show", Path(folders[0]).name)
    assert shown.returncode == 0 and "sha256:" in shown.stdout and "stop_epoch: 1" in shown.stdout
    assert "training" not in tfkd_inside("teacher", "train", "kd.yaml").stderr  # they are there


@pytest.mark.ray
def test_what_a_sweep_left_is_read_reported_and_exported(
    ray_cluster: str, tfkd_inside: Run, here: Path
) -> None:
    assert tfkd_inside("tune", "mine.yaml", "--name", "ä b", cwd=here).returncode == 0
    place = "tfkd_results/ä b"
    for argv, shown in (
        (["status", place], "finished, 2 of 2 trials"),
        (["trials", place, "--sort", "val_accuracy:desc", "-o", "csv"], "t0001-ce"),
        (["logs", place, "t0000"], "epoch 3/3"),
        (["ls"], "ä b"),
        (["best", place], "the best of 2 on validation"),
        (["report", place, "-o", "r.html"], "r.html"),
        (["export", place, "-o", "out"], "student.pt2: logits differ by at most"),
    ):
        run = tfkd_inside(*argv, cwd=here)
        assert run.returncode == 0 and shown in run.stdout, f"{argv}: {run.stdout} {run.stderr}"
    assert "<html" in (here / "r.html").read_text()[:200] and (here / "out/README.md").exists()


@pytest.mark.parametrize(
    "argv",
    long_after(2, [("check", "digits_tfkd"), ("tune", "digits_tfkd"), ("ls",), ("status", "x")]),
    ids=" ".join,
)
@pytest.mark.slow
def test_a_working_directory_that_is_gone_is_a_sentence(
    tmp_path: Path, argv: tuple[str, ...]
) -> None:
    (tmp_path / "gone").mkdir()
    command = [sys.executable, "-m", "tfkd_ray", *argv]
    gone = ["sh", "-c", 'rmdir ../gone; exec "$@"', "sh", *command]
    run = subprocess.run(gone, cwd=tmp_path / "gone", capture_output=True, text=True, timeout=110)
    assert "Traceback" not in run.stderr and run.returncode in (0, 1, 2), run.stderr


def test_the_exit_code_is_the_documented_one_where_nobody_can_read_the_sentence(
    tmp_path: Path,
) -> None:
    words = [sys.executable, "-m", "tfkd_ray", "status", "nothing-here"]
    with Path("/dev/full").open("w") as full:
        assert subprocess.run(words, cwd=tmp_path, stderr=full, timeout=110).returncode == 2
    closed = ["sh", "-c", 'exec "$@" 2>&-', "sh", *words]
    assert subprocess.run(closed, cwd=tmp_path, timeout=110).returncode == 2


# --- names of experiments


def begun(folder: Path, ago_s: float) -> None:
    """Make a finished sweep of four trials that was begun some seconds ago."""
    make_sweep(folder, 4)
    when = time.time() - ago_s
    os.utime(folder / "experiment.yaml", (when, when))


@pytest.mark.slow
def test_an_experiment_is_named_without_its_directory_and_the_newest_by_no_name(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begun(here / "tfkd_results/newer", 10)
    begun(here / "tfkd_results/older", 100)
    for words, name in [
        (["status", "older"], "older"),
        (["status", "tfkd_results/older"], "older"),
        (["status", "@last"], "newer"),
        (["status"], "newer"),
        (["trials", "older"], "t0000-tfkd_reg"),
        (["best", "@last"], "newer"),
    ]:
        code = main(words)
        said = capsys.readouterr()
        assert code == 0 or words[0] == "best", said.err
        assert name in said.out + said.err, words
        newest = "experiment: tfkd_results/newer (the newest)\n"
        assert said.err.startswith(newest) == (words == ["status"])
    assert main(["logs", "0"]) == 0
    assert "(the newest)" in capsys.readouterr().err


def test_a_directory_comes_before_a_name_and_a_shipped_arms_file_before_an_experiment(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun(here / "tfkd_results/e", 10)
    begun(here / "e", 100)
    begun(here / "tfkd_results/digits_arms", 50)
    assert experiment_place("e") == Path("e")
    assert experiment_place("digits_arms") == Path("tfkd_results/digits_arms")
    assert experiment_place("e/trials") == Path("e/trials")
    assert experiment_place("digits_arms/trials") == Path("tfkd_results/digits_arms/trials")
    assert experiment_place("s3://b/e") == "s3://b/e"
    assert experiment_place("") == Path() and experiment_place("../e") == Path("../e")
    begun(here / "tfkd_results/photos", 60)
    for folder in (
        "photos/cat",
        "notes",
    ):  # images that the sweep `photos` learns, and no experiment
        (here / folder).mkdir(parents=True)
    assert experiment_place("photos") == Path("tfkd_results/photos")
    assert sweep_or_arms("photos") == "tfkd_results/photos"
    assert experiment_place("notes") == Path("notes") and sweep_or_arms("notes") == "notes"
    assert sweep_or_arms("digits_arms") == "digits_arms"
    assert sweep_or_arms("@last") == "tfkd_results/e"


def test_without_an_experiment_a_verb_says_that_there_is_none(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sentence = "no experiment is named, and ./tfkd_results has none; name its directory or URL"
    for words in (["status"], ["best", "@last"], ["confirm", "@last"]):
        assert main(words) == 2
        said = capsys.readouterr()
        assert said.out == "" and said.err == f"tfkd {words[0]}: {sentence}\n"
