"""Commands as nobody would type them: a sentence and an exit code, no traceback, and nothing starts."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from test_fuzz import COUNT, SEED

from tfkd_ray.cli import main

VERBS = ["tune", "resume", "check", "plan", "explain", "train", "confirm", "export", "teacher", "best", "trials", "status",
         "logs", "ls", "report", "tensorboard"]  # fmt: skip
WORDS = [
    "bad.yaml", "empty", "nowhere", ".", "/", "~", "-", "--", "--help", "-x", "--seeds", "--num-samples", "--name", "--storage",
    "--limit", "--sort", "--filter", "--columns", "-o", "--json", "--top-k", "--port", "--preset", "smoke", "train", "list", "show",
    "0", "-1", "1e400", "9" * 400, "nan", "", " ", "a=b", "optim.lr=", "=", "objective=[", "optim.lr={low: 0", "x" * 5000, "\udcff.yaml",
    "ü ö", "a\nb", "%s%n", "${HOME}", "../..", "table", "csv", "epoch>3", "val_accuracy>", "digits_tfkd", "optim.lr=x",
]  # fmt: skip


def is_answered(argv: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    """Assert that a command ends with an exit code and a sentence, and no traceback."""
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
    for number in range(COUNT * 40 // 500):
        rng = random.Random(f"{SEED}/{verb}/{number}")
        argv = [verb, *(rng.choice(WORDS) for _ in range(rng.randrange(5)))]
        if verb in ("tune", "train") and "digits_tfkd" in argv:
            continue  # it might be a right command
        is_answered(argv, capfd)


@pytest.mark.slow
def test_words_that_are_no_verb_are_answered(capfd: pytest.CaptureFixture[str]) -> None:
    rng = random.Random(f"{SEED}/verbs")
    for _ in range(COUNT * 60 // 500):
        verb = rng.choice(VERBS)
        at = rng.randrange(len(verb))
        word = rng.choice([verb[:at] + verb[at + 1 :], verb.upper(), verb[::-1], verb + "s", *WORDS])
        argv = [word, *(rng.choice(WORDS) for _ in range(rng.randrange(3)))]
        if word in VERBS or {"--help", "-h"} & set(argv):
            continue
        with pytest.raises(SystemExit) as end:
            main(argv)
        out, err = capfd.readouterr()
        assert end.value.code == 2 and out == "" and "Traceback" not in err and "usage: tfkd" in err, argv


@pytest.mark.slow
@pytest.mark.parametrize("do", ["check", "up", "status", "submit", "logs", "down"])
def test_any_words_after_a_verb_of_clusters_are_answered(
    do: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.yaml").write_text("provider: {type: local, head_ip: [}\n")
    (tmp_path / "odd.yaml").write_text("provider: {type: [], head_ip: {}}\nauth: 7\n")
    (tmp_path / "bad.sh").write_text("#SBATCH\n")
    words = [
        *WORDS,
        "odd.yaml",
        "bad.sh",
        "--space",
        "--print",
        "--detach",
        "onprem",
        "aws-gpu",
        "slurm",
        "kuberay-job",
    ]
    for number in range(COUNT * 30 // 500):
        rng = random.Random(f"{SEED}/cluster {do}/{number}")
        printed = [] if do == "check" else ["--print"]  # nothing is to be started
        argv = ["cluster", do, *printed, *(rng.choice(words) for _ in range(rng.randrange(5)))]
        is_answered(argv, capfd)


READING = [["--help"], ["tune", "--help"], ["check", "digits_tfkd"], ["ls"], ["status", "nowhere"], ["nothing"], []]


@pytest.mark.slow
@pytest.mark.parametrize(
    "surroundings",
    [{"COLUMNS": "20"}, {"COLUMNS": "0"}, {"COLUMNS": "wide"}, {"NO_COLOR": "1", "TERM": "dumb"}, {"HOME": "/proc/nowhere"}, {"HOME": None, "XDG_CACHE_HOME": None}, {"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0"}],
    ids=["narrow", "no width", "no number of columns", "no color", "HOME cannot be written", "no HOME", "ASCII"],
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


@pytest.mark.slow
@pytest.mark.parametrize("name", [b"\xff\xfe.yaml", b"\xc3\x28", "größe 試.yaml".encode(), b"a\nb.yaml", b"-\xff"])
@pytest.mark.parametrize("verb", ["check", "report"])
def test_a_path_in_any_encoding_is_answered(verb: str, name: bytes, tmp_path: Path) -> None:
    """Names of files are bytes; there is a file of this name, a directory, or nothing."""
    command = [os.fsencode(sys.executable), b"-m", b"tfkd_ray", verb.encode(), b"./" + name]
    for make in (None, os.mkdir):
        if make is not None:
            make(os.fsencode(tmp_path) + b"/" + name)
        done = subprocess.run(command, capture_output=True, cwd=tmp_path, timeout=60)
        assert done.returncode == 2 and b"Traceback" not in done.stderr and done.stderr.strip(), done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("shut", ["<&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_closed_standard_streams_are_no_failure(shut: str, tmp_path: Path) -> None:
    for argv, code in ((["check", "digits_tfkd"], 0), (["status", "nowhere"], 2)):
        command = [sys.executable, "-m", "tfkd_ray", *argv]
        done = subprocess.run(
            ["sh", "-c", f'"$@" {shut}', "sh", *command], capture_output=True, cwd=tmp_path, timeout=60
        )
        assert done.returncode == code and b"Traceback" not in done.stderr, done.stderr.decode()
