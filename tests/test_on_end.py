"""`--on-end`: when the command runs, what it is told, and what is never shown of it."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Run
from test_readers import make_sweep
from test_tune import TREE

from tfkd_ray.cli import compare, sweep
from tfkd_ray.cli.main import main, without_secret_words
from tfkd_ray.cli.on_end import OnEnd
from tfkd_ray.settings.errors import ConfigError
from tfkd_ray.settings.yaml import dump_yaml
from tfkd_ray.space.arms import build_arms, new_comparison
from tfkd_ray.store.storage import experiment_of

NOTE = 'echo "$TFKD_STATUS $TFKD_EXPERIMENT" >> notes'


@pytest.fixture
def ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let sweeps end at once, in a way that a test chooses; an experiment `e` is there."""
    make_sweep(tmp_path / "e", 8, search={"num_samples": 9})
    (tmp_path / "e" / "driver.txt").unlink()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sweep, "join_ray", lambda *args: None)

    def how(ended: bool | None = True, error: BaseException | None = None, **about: Any) -> None:
        def fit(progress: Any, build: Any, experiment: Path, end: OnEnd) -> bool | None:
            progress.begun = True
            for name, value in about.items():
                setattr(progress, name, value)
            if error is not None:
                raise error
            return ended

        monkeypatch.setattr(sweep, "fit_tuner", fit)

    return how


BUDGET = "search.time_budget_s: limit reached (61 of 60 s)"


@pytest.mark.parametrize(
    "how, status, code",
    [
        ({}, "finished", 0),
        ({"ended": False}, "stopped", 130),
        ({"ended_by": BUDGET}, "stopped", 0),
        ({"ended": None}, "failed", 1),
        ({"error": KeyboardInterrupt()}, "stopped", 130),
        ({"error": ConfigError("was taken over by process 1 on b")}, "failed", 2),
    ],
)
def test_the_command_runs_once_and_is_told_how_it_ended(
    ends: Callable[..., None], tmp_path: Path, how: dict[str, Any], status: str, code: int
) -> None:
    ends(**how)
    assert main(["resume", "e", "--on-end", NOTE]) == code
    assert (tmp_path / "notes").read_text() == f"{status} {tmp_path / 'e'}\n"


def test_a_sweep_that_has_ended_is_answered_without_ray(
    ends: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sweep, "join_ray", lambda *args: pytest.fail("Ray starts"))
    make_sweep(tmp_path / "over", 8)
    spent = tmp_path / "over" / "spent.json"
    for counted in ({}, {"closed": 1.0}):
        spent.write_text(json.dumps({"seconds": 9.0, "trial_seconds": 8.0, **counted}))
        if not counted:  # its driver was killed after the last trial
            with pytest.raises(pytest.fail.Exception, match="Ray starts"):
                main(["resume", "over"])
    assert main(["resume", "over", "--on-end", NOTE]) == 0
    told = capsys.readouterr().out
    assert told.startswith("nothing to do: all 8 trials of over have ended\n8 trials, ")
    assert "\nbest: t00" in told
    assert "  tfkd resume over --add-trials 8\n" in told
    assert (tmp_path / "notes").read_text() == f"finished {tmp_path / 'over'}\n"
    with pytest.raises(pytest.fail.Exception, match="Ray starts"):
        main(["resume", "over", "--add-trials", "1"])
    there = experiment_of(tmp_path / "over")
    monkeypatch.setattr("tfkd_ray.store.storage.to_continue", lambda place: there)
    with pytest.raises(pytest.fail.Exception, match="Ray starts"):  # it may lack files
        main(["resume", "s3://bucket/over"])


def test_ctrl_c_while_a_teacher_trains_says_what_is_kept_and_how_to_go_on(
    ends: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    ends(error=KeyboardInterrupt())
    monkeypatch.setattr(sweep, "let_end", lambda: None)
    words = ["tune", "digits_tfkd", "optim.lr={low: 0.1, high: 0.2}", "--name", "first"]
    assert main(words) == 130
    told = " ".join(capsys.readouterr().err.split())
    assert "so there is nothing to resume. Trained teachers are kept, and a teacher in" in told
    assert told.endswith("tfkd tune digits_tfkd 'optim.lr={low: 0.1, high: 0.2}' --name first")
    assert main(words[:2]) == 130
    assert re.search(
        r"tfkd tune digits_tfkd --name digits_tfkd-\d+-\d+\s$", capsys.readouterr().err
    )


def test_an_error_of_ours_runs_the_command_too(ends: Callable[..., None], tmp_path: Path) -> None:
    ends(error=RuntimeError("a bug"))
    with pytest.raises(RuntimeError, match="a bug"):
        main(["resume", "e", "--on-end", NOTE])
    assert (tmp_path / "notes").read_text().startswith("failed ")


def test_wrong_input_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.yaml").write_text("objective: cee\n")
    assert main(["tune", "bad.yaml", "--on-end", NOTE]) == 2
    assert main(["resume", "nowhere", "--on-end", NOTE]) == 2
    assert main(["confirm", "bad.yaml", "--on-end", NOTE]) == 2
    assert not (tmp_path / "notes").exists()


def test_a_command_that_fails_is_a_warning_that_does_not_show_it(
    ends: Callable[..., None], capfd: pytest.CaptureFixture[str]
) -> None:
    ends()
    assert main(["resume", "e", "--on-end", "echo told; exit 3 # token=s3cret"]) == 0
    out, err = capfd.readouterr()
    assert "warning: the command of --on-end ended with exit code 3; e is complete" in err
    assert "told" in err and "told" not in out  # results alone go to standard output
    assert main(["resume", "e", "--on-end", "no-such-program-s3cret 2>/dev/null"]) == 0
    assert "ended with exit code 127" in capfd.readouterr().err
    assert "s3cret" not in out + err


def test_a_comparison_tells_the_command_that_it_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arms = [{"name": "ce", "objective": "ce"}, {"name": "ls", "objective": "lsr", "baseline": "ce"}]
    tree = {"title": "a", "student": {"name": "mlp", "hidden": [8]}, "epochs": 1, "arms": arms}
    new_comparison(build_arms(tree), [1, 2], tmp_path / "c")
    monkeypatch.setattr(compare, "join_ray", lambda *args: None)
    for ended, status, code in ((None, "failed", 1), (False, "stopped", 130)):
        monkeypatch.setattr(compare, "fit_tuner", lambda *args, ended=ended: ended)
        assert main(["resume", "c", "--on-end", NOTE]) == code
        assert (tmp_path / "notes").read_text() == f"{status} {tmp_path / 'c'}\n"
        (tmp_path / "notes").unlink()


def test_a_command_is_not_sent_with_a_job(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s.yaml").write_text(dump_yaml(TREE))
    words = ["tune", "s.yaml", "--address", "http://127.0.0.1:1", "--on-end", "curl s3cret"]
    assert main(words) == 2
    err = capsys.readouterr().err
    assert "--on-end: a job ends on the cluster" in err and "s3cret" not in err


@pytest.mark.parametrize(
    "words, shown",
    [
        (["tune", "f", "--on-end", "curl t"], ["tune", "f", "--on-end", "***"]),
        (["resume", "e", "--on-end=curl t"], ["resume", "e", "--on-end=***"]),
        (["confirm", "e", "--on", "curl t"], ["confirm", "e", "--on", "***"]),
        (["export", "e", "--on", "x"], ["export", "e", "--on", "x"]),
        (["export", "e", "--onnx"], ["export", "e", "--onnx"]),
        (["tune", "f", "--on-end"], ["tune", "f", "--on-end"]),
        (["tune", "--study-storage", "mysql://u:pw@h/d"], ["tune", "--study-storage", "mysql://u:***@h/d"]),
    ],
)  # fmt: skip
def test_words_that_are_shown_hide_the_command_and_passwords(
    words: list[str], shown: list[str]
) -> None:
    assert without_secret_words(words) == shown


def test_the_process_is_listed_without_the_command(tmp_path: Path) -> None:
    """Ray lists the words of a driver, `ps` shows them to everyone, experiment.yaml keeps them."""
    see = "import sys, os, tfkd_ray.cli.main as m; w = m._given_words(); print(w, sys.argv[1:], open('/proc/self/cmdline').read())"
    (tmp_path / "see.py").write_text(see)
    run = subprocess.run(
        [sys.executable, str(tmp_path / "see.py"), "tune", "f", "--on-end", "curl s3cret"],
        capture_output=True,
        text=True,
        env=dict(os.environ),
        check=True,
    )
    words, _, rest = run.stdout.partition("]")
    assert "'curl s3cret'" in words and "s3cret" not in rest and "***" in rest


@pytest.mark.long
@pytest.mark.ray
@pytest.mark.slow
def test_a_sweep_runs_the_command_at_its_end_and_its_files_do_not_tell_it(
    ray_cluster: str, tfkd: Run, tmp_path: Path
) -> None:
    (tmp_path / "s.yaml").write_text(dump_yaml({**TREE, "search": {"num_samples": 1}}))
    words = ["tune", "s.yaml", "--name", "e", "--storage", ".", "--on-end", f"{NOTE} # s3cret"]
    run = tfkd(*words)
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "notes").read_text() == f"finished {tmp_path / 'e'}\n"
    assert "--on-end" in (tmp_path / "e" / "experiment.yaml").read_text()
    files = [path for path in (tmp_path / "e").rglob("*") if path.is_file()]
    assert [path for path in files if b"s3cret" in path.read_bytes()] == []
    assert "s3cret" not in run.stdout + run.stderr
