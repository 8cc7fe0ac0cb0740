"""Random command lines: a sentence and an exit code, no traceback, and nothing starts."""

import contextlib
import ctypes
import fcntl
import os
import pty
import random
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from conftest import long_after
from rich.cells import cell_len
from test_damage import RELEASE
from test_fuzz import COUNT, SEED
from test_live import run as finished
from test_live import view as live_view

from tfkd_ray.cli.main import main

VERBS = ["tune", "resume", "check", "plan", "explain", "train", "confirm", "export", "teacher", "best", "trials", "status",
         "logs", "ls", "compare", "report", "tensorboard", "doctor", "stop", "spaces", "init", "completion"]  # fmt: skip
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

    class Started(subprocess.Popen):  # type: ignore[type-arg]
        __init__ = started  # type: ignore[assignment]

    import ray

    monkeypatch.setattr(ray, "init", started)
    monkeypatch.setattr(subprocess, "Popen", Started)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.yaml").write_text("objective: {name: kd, alpha: [}\n")
    for number in range(COUNT * 40 // 500):
        rng = random.Random(f"{SEED}/{verb}/{number}")
        argv = [verb, *(rng.choice(WORDS) for _ in range(rng.randrange(5)))]
        if verb in ("tune", "train") and "digits_tfkd" in argv:
            continue  # it might be valid
        is_answered(argv, capfd)


@pytest.mark.slow
def test_words_that_are_no_verb_are_answered(capfd: pytest.CaptureFixture[str]) -> None:
    rng = random.Random(f"{SEED}/verbs")
    for _ in range(COUNT * 60 // 500):
        verb = rng.choice(VERBS)
        at = rng.randrange(len(verb))
        word = rng.choice(
            [verb[:at] + verb[at + 1 :], verb.upper(), verb[::-1], verb + "s", *WORDS]
        )
        argv = [word, *(rng.choice(WORDS) for _ in range(rng.randrange(3)))]
        if word in VERBS or {"--help", "-h"} & set(argv):
            continue
        with pytest.raises(SystemExit) as end:
            main(argv)
        out, err = capfd.readouterr()
        assert (
            end.value.code == 2 and out == "" and "Traceback" not in err and "usage: tfkd" in err
        ), argv


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
        printed = [] if do == "check" else ["--print"]  # nothing may start
        argv = ["cluster", do, *printed, *(rng.choice(words) for _ in range(rng.randrange(5)))]
        is_answered(argv, capfd)


READING = [
    ["--help"],
    ["tune", "--help"],
    ["check", "digits_tfkd"],
    ["ls"],
    ["status", "nowhere"],
    ["nothing"],
    [],
]


@pytest.mark.slow
@pytest.mark.parametrize(
    "surroundings",
    long_after(1, [{"COLUMNS": "0", "HOME": "/proc/nowhere"},
     {"COLUMNS": "20", "NO_COLOR": "1", "TERM": "dumb", "HOME": None, "XDG_CACHE_HOME": None}, {"COLUMNS": "wide", "LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0"}]),
    ids=["no width, HOME cannot be written", "narrow, no color, no HOME", "no number of columns, ASCII"],
)  # fmt: skip
def test_commands_do_not_depend_on_their_surroundings(
    surroundings: dict[str, str | None], tmp_path: Path
) -> None:
    env = {**os.environ, **{k: v for k, v in surroundings.items() if v is not None}}
    for name in [k for k, v in surroundings.items() if v is None]:
        env.pop(name, None)
    for argv in READING:
        command = [sys.executable, "-m", "tfkd_ray", *argv]
        done = subprocess.run(command, capture_output=True, cwd=tmp_path, env=env, timeout=60)
        assert done.returncode in (0, 2), (argv, done.stderr)
        assert b"Traceback" not in done.stdout + done.stderr, done.stderr.decode(errors="replace")


@pytest.mark.slow
@pytest.mark.parametrize("argv", long_after(1, [["check", "digits_tfkd"], ["check", "--help"]]))
@pytest.mark.parametrize("unbuffered", long_after(1, ["", "1"]))
def test_output_that_cannot_be_written_is_no_crash(
    argv: list[str], unbuffered: str, tmp_path: Path
) -> None:
    """Standard output is a pipe without a reader, a full disk, or closed."""
    (tmp_path / "tfkd_results").mkdir()
    command = [sys.executable, "-m", "tfkd_ray", *argv]
    env = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as pipe, Path("/dev/full").open("w") as full:
        for output, code in ((pipe, 0), (full, 1)):
            done = subprocess.run(
                command, stdout=output, stderr=subprocess.PIPE, cwd=tmp_path, timeout=60, env=env
            )
            assert b"Traceback" not in done.stderr and b"Exception" not in done.stderr
            if output is full and unbuffered and "--help" in argv:
                continue  # argparse drops the error of an unbuffered stream
            assert done.returncode == code, done.stderr.decode()
            assert (b"No space left on device" in done.stderr) == (output is full)
    shut = subprocess.run(
        ["sh", "-c", '"$@" >&-', "sh", *command], capture_output=True, cwd=tmp_path, timeout=60
    )
    assert shut.returncode == 0 and b"Traceback" not in shut.stderr, shut.stderr.decode()


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    long_after(
        1, [b"\xff\xfe.yaml", b"a\nb.yaml", b"\xc3\x28", "größe 試.yaml".encode(), b"-\xff"]
    ),
)
@pytest.mark.parametrize("verb", long_after(1, ["check", "report"]))
def test_a_path_in_any_encoding_is_answered(
    verb: str, name: bytes, tmp_path: Path, warm: list[str]
) -> None:
    """File names are bytes; this name is a file, a directory, or missing."""
    words = [os.fsencode(word) for word in (*warm, "-m", "tfkd_ray", verb)]
    command = [*words, b"./" + name]
    for make in (None, os.mkdir):
        if make is not None:
            make(os.fsencode(tmp_path) + b"/" + name)
        done = subprocess.run(command, capture_output=True, cwd=tmp_path, timeout=60)
        assert done.returncode == 2 and b"Traceback" not in done.stderr and done.stderr.strip(), (
            done.stderr
        )


@pytest.mark.slow
@pytest.mark.parametrize("shut", long_after(1, ["<&-", ">&- 2>&-", "2>&-", "<&- >&- 2>&-"]))
def test_closed_standard_streams_are_no_failure(shut: str, tmp_path: Path) -> None:
    for argv, code in ((["check", "digits_tfkd"], 0), (["status", "nowhere"], 2)):
        command = [sys.executable, "-m", "tfkd_ray", *argv]
        done = subprocess.run(
            ["sh", "-c", f'"$@" {shut}', "sh", *command],
            capture_output=True,
            cwd=tmp_path,
            timeout=60,
        )
        assert done.returncode == code and b"Traceback" not in done.stderr, done.stderr.decode()


# --- a home that cannot be written, and terminals ------------------------------------------------------------------

TRAINED = "student: {name: mlp, hidden: [8]}\nobjective: ce\nepochs: 1\n"


def as_modes_say() -> None:
    """Make file modes apply to root, too."""
    bounding_set_drop, may_ignore_modes = (
        24,
        1,
    )  # PR_CAPBSET_DROP, CAP_DAC_OVERRIDE; the next program inherits the rest
    if (
        os.getuid() == 0
        and ctypes.CDLL(None, use_errno=True).prctl(bounding_set_drop, may_ignore_modes, 0, 0, 0)
        != 0
    ):
        os._exit(99)


@pytest.mark.slow
@pytest.mark.parametrize("kind", long_after(0, ["nowhere", "read-only"]))
def test_commands_do_without_a_home_that_they_can_write(kind: str, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    here = tmp_path / "here"
    here.mkdir()
    (here / "one.yaml").write_text(TRAINED)
    home.chmod(0o555)
    env = {k: v for k, v in os.environ.items() if not k.startswith(("XDG_", "RAY_"))}
    env["HOME"] = str(home) if kind == "read-only" else "/proc/nowhere"

    def run(*argv: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(argv, capture_output=True, text=True, cwd=here, env=env, timeout=100, preexec_fn=as_modes_say)  # fmt: skip

    assert run("sh", "-c", "mkdir $HOME/x").returncode not in (0, 99), "it can be written after all"
    for argv, codes in (
        (["train", "one.yaml"], (0,)),
        (["check", "digits_tfkd"], (0,)),
        (["tune", "--help"], (0,)),
        (["doctor"], (0, 1)),  # 1: it has found a problem, as expected
    ):
        done = run(sys.executable, "-m", "tfkd_ray", *argv)
        assert done.returncode in codes and "Traceback" not in done.stdout + done.stderr, (
            argv,
            done.stdout,
            done.stderr,
        )
        assert done.stdout.strip(), argv
    assert not list(home.iterdir())


def on_a_terminal(command: list[str], folder: Path, **env: str) -> str:
    """Return a command's output on a terminal of 80 x 24; it must end well or with a sentence."""
    pid, fd = pty.fork()
    if pid == 0:
        os.chdir(folder)
        surroundings = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "COLUMNS")}
        os.execve(command[0], command, {**surroundings, "TERM": "xterm", **env})
    fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    written = b""
    with contextlib.suppress(OSError):  # the other end is closed
        while piece := os.read(fd, 65536):
            written += piece
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    os.close(fd)
    text = written.decode(errors="replace")
    assert code in (0, 2) and "Traceback" not in text, text
    return text


COLOUR = re.compile(r"\x1b\[(?:\d+;)*(?:3[0-8]|4[0-8]|9[0-7]|10[0-7])(?:;\d+)*m")
LIVE_VIEW = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_live import SPACE, run
from tfkd_ray.store.experiment import write_experiment
from tfkd_ray.show.live import Progress
from tfkd_ray.space.space import build_space
write_experiment(Path("e"), build_space(SPACE).tree, ["tfkd"])
progress = Progress("e")
progress.setup()
run(progress, "t0000-ce", 9, 0.5)
run(progress, "t0001-lsr", 3, None, failed="out of memory")
progress._draw(force=True)
"""


@pytest.mark.long
def test_no_color_is_respected_on_a_terminal(tmp_path: Path, warm: list[str]) -> None:
    (tmp_path / "view.py").write_text(LIVE_VIEW)
    view = [*warm, str(tmp_path / "view.py"), str(Path(__file__).parent)]
    for name in ("coloured", "plain"):
        (tmp_path / name).mkdir()
    assert COLOUR.search(on_a_terminal(view, tmp_path / "coloured")), (
        "a failure is red, or this test shows nothing"
    )
    assert not COLOUR.search(on_a_terminal(view, tmp_path / "plain", NO_COLOR="1"))
    for argv in (
        ["--help"],
        ["check", "digits_tfkd"],
        ["status", "-f", str(RELEASE / "sweep")],
        ["nothing"],
    ):
        text = on_a_terminal([sys.executable, "-m", "tfkd_ray", *argv], tmp_path, NO_COLOR="1")
        assert text.strip() and not COLOUR.search(text), argv


TABLES = [["status", "sweep"], ["best", "sweep"], ["ls", "--storage", "."], ["teacher", "list", "--storage", "."],
          ["check", "digits_tfkd"], ["explain", "digits_tfkd"], ["plan", "digits_tfkd"]]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("argv", TABLES, ids=" ".join)
def test_tables_fit_80_columns_also_where_the_terminal_says_20(
    argv: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Tables ignore COLUMNS, since they also go to files and pipes; the live view uses it."""
    monkeypatch.chdir(RELEASE)
    monkeypatch.setenv("COLUMNS", "20")
    assert main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines and max(cell_len(line) for line in lines) <= 80, max(lines, key=len)


@pytest.mark.parametrize("width", [20, 1, 80])
def test_the_live_view_fits_the_terminal(width: int, tmp_path: Path) -> None:
    progress, _ = live_view(tmp_path / "e")
    finished(progress, "t0000-ce", 9, 0.5)
    finished(progress, "t0001-lsr", 3, None, "out of memory, on a node with a long name")
    assert max(cell_len(line) for line in progress.lines(width, 24)) <= width
