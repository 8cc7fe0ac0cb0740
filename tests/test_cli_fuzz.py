"""Commands as nobody would type them: a sentence and an exit code, no traceback, and nothing starts."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tfkd_ray.cli import main

SEED = int(os.environ.get("TFKD_FUZZ_SEED", "0"))
VERBS = ["tune", "resume", "check", "plan", "explain", "train", "confirm", "export", "teacher", "best", "trials", "status",
         "logs", "ls", "report", "tensorboard"]  # fmt: skip
WORDS = [
    "bad.yaml", "empty", "nowhere", ".", "/", "~", "-", "--", "--help", "-x", "--seeds", "--num-samples", "--name", "--storage",
    "--limit", "--sort", "--filter", "--columns", "-o", "--json", "--top-k", "--port", "--preset", "smoke", "train", "list", "show",
    "0", "-1", "1e400", "9" * 400, "nan", "", " ", "a=b", "optim.lr=", "=", "objective=[", "optim.lr={low: 0", "x" * 5000, "\udcff.yaml",
    "ü ö", "a\nb", "%s%n", "${HOME}", "../..", "table", "csv", "epoch>3", "val_accuracy>", "digits_tfkd", "optim.lr=x",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("verb", VERBS)
def test_any_words_after_a_verb_are_answered(
    verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def started(*args: object, **kwargs: object) -> None:
        raise AssertionError("something was started")

    import ray

    monkeypatch.setattr(ray, "init", started)
    monkeypatch.setattr(subprocess, "Popen", started)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.yaml").write_text("objective: {name: kd, alpha: [}\n")
    for number in range(40):
        rng = random.Random(f"{SEED}/{verb}/{number}")
        argv = [verb, *(rng.choice(WORDS) for _ in range(rng.randrange(5)))]
        if verb in ("tune", "train") and "digits_tfkd" in argv:
            continue  # it might be a right command
        try:
            code = main(argv)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        except BaseException as error:
            error.add_note(f"TFKD_FUZZ_SEED={SEED}: tfkd {argv!r}")
            raise
        out, err = capfd.readouterr()
        assert code in (0, 1, 2), argv
        assert "Traceback" not in out + err, argv
        assert code == 0 or err.strip(), argv


READING = [["--help"], ["tune", "--help"], ["check", "digits_tfkd"], ["ls"], ["status", "nowhere"], ["nothing"], []]


@pytest.mark.slow
@pytest.mark.parametrize(
    "surroundings",
    [{"COLUMNS": "20"}, {"NO_COLOR": "1", "TERM": "dumb"}, {"HOME": "/proc/nowhere"}, {"HOME": None, "XDG_CACHE_HOME": None}, {"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0"}],
    ids=["narrow", "no color", "HOME cannot be written", "no HOME", "ASCII"],
)  # fmt: skip
def test_commands_do_not_depend_on_their_surroundings(surroundings: dict[str, str | None], tmp_path: Path) -> None:
    env = {**os.environ, **{k: v for k, v in surroundings.items() if v is not None}}
    for name in [k for k, v in surroundings.items() if v is None]:
        env.pop(name, None)
    for argv in READING:
        command = [sys.executable, "-m", "tfkd_ray", *argv]
        done = subprocess.run(command, capture_output=True, cwd=tmp_path, env=env, timeout=60)
        assert done.returncode in (0, 2), (argv, done.stderr)
        assert b"Traceback" not in done.stdout + done.stderr, done.stderr.decode(errors="replace")


@pytest.mark.slow
@pytest.mark.parametrize("argv", [["--help"], ["check", "digits_tfkd"], ["ls"]])
def test_a_reader_who_leaves_is_no_failure(argv: list[str], tmp_path: Path) -> None:
    """Standard output is a pipe that nobody reads any more, or is closed."""
    command = [sys.executable, "-m", "tfkd_ray", *argv]
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as pipe:
        done = subprocess.run(command, stdout=pipe, stderr=subprocess.PIPE, cwd=tmp_path, timeout=60)
    assert b"Traceback" not in done.stderr and b"Exception" not in done.stderr, done.stderr.decode()
    shut = subprocess.run(["sh", "-c", '"$@" >&-', "sh", *command], stderr=subprocess.PIPE, cwd=tmp_path, timeout=60)
    assert b"Traceback" not in shut.stderr, shut.stderr.decode()
