"""What a terminal of 80 or 120 columns shows: no verb has a line that it would break inside a word."""

import io
import sys
from argparse import Namespace
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console
from test_guide import PARSERS
from test_readers import make_sweep
from test_report import make_comparison

from tfkd_ray.cli.main import _shown_output, main
from tfkd_ray.cli.sweep import _print_summary
from tfkd_ray.settings.columns import folded, to_stderr
from tfkd_ray.show.live import Progress

COMMANDS = ("tfkd ", "ssh ", "pip ", "make ")
"""Lines that begin so are copied as a whole, and a terminal breaks them without a line end."""
WORDS = [
    "check digits_tfkd", "check digits_tfkd --all", "check digits_arms", "check paper/table_1",
    "plan digits_tfkd", "plan digits_arms", "explain digits_tfkd", "explain digits_arms",
    "spaces", "spaces --about", "init digits_tfkd", "init digits_tfkd -o there.yaml",
    "status sweep", "status arms", "trials sweep", "trials sweep --sort val_accuracy:desc --limit 5",
    "trials sweep sweep2", "best sweep", "logs sweep 1", "logs sweep tfkd_reg", "ls",
    "compare sweep sweep2", "report sweep", "teacher list", "teacher show none", "stop sweep",
    "train digits_tfkd", "export sweep", "resume arms --space x.yaml --add-trials 3",
    "confirm digits_arms --top-k 9 --baselines ce", "tune digits_tfkd optim.lrr=3 epochs=-1",
    "tensorboard gone", "cluster check ssh", "cluster check gone", "doctor --space gone", "",
    *(f"{verb} --help" for verb in PARSERS),
]  # fmt: skip


class Terminal(io.StringIO):
    """A stream that is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("work") / "tfkd_results"
    for name in ("sweep", "sweep2", "a-sweep-with-a-name-of-sixty-characters-in-all-as-some-have"):
        make_sweep(folder / name, 12)
    make_comparison(folder / "arms")
    return folder


@pytest.fixture(params=[80, 120])
def shown(
    request: pytest.FixtureRequest, storage: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[int, Terminal]:
    """Return a terminal's width, and the terminal."""
    monkeypatch.chdir(storage.parent)
    monkeypatch.setenv("COLUMNS", str(request.param))
    return request.param, Terminal()


def broken(text: str, width: int) -> list[str]:
    """Return the lines that a terminal breaks although they have a space where it could be done."""
    return [
        line
        for line in text.splitlines()
        if cell_len(line) > width
        and " " in line.strip()
        and not line.strip().removeprefix("$ ").startswith(COMMANDS)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("words", WORDS)
def test_no_verb_has_a_line_that_is_broken_in_a_word(
    shown: tuple[int, Terminal], words: str
) -> None:
    width, screen = shown
    with redirect_stdout(screen), redirect_stderr(screen), suppress(SystemExit):
        main(words.split())
    assert screen.getvalue()
    assert broken(screen.getvalue(), width) == []


def test_the_end_of_a_sweep_fits(shown: tuple[int, Terminal], storage: Path) -> None:
    from tfkd_ray.space.space import build_space
    from tfkd_ray.store.experiment import read_experiment

    width, screen = shown
    experiment = next(storage.glob("a-sweep-*"))
    space = build_space(read_experiment(experiment)["space"])
    with redirect_stdout(screen), redirect_stdout(_shown_output(Namespace(verb="tune"))):
        _print_summary(space, experiment, whole=True)
    assert "best: " in screen.getvalue() and broken(screen.getvalue(), width) == []


def test_notes_end_their_lines_at_spaces_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    text = "note: a fifth of each class is the test split, the same ones each time"
    lines = ["note: a fifth of each class is the test", "  split, the same ones each time"]
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setattr(sys, "stderr", shown := Terminal())
    to_stderr(text)
    Progress(tmp_path, Console(file=shown, force_terminal=True, width=40)).note(text)
    assert shown.getvalue().splitlines() == lines * 2


def test_a_folded_line_keeps_its_words_and_its_indent() -> None:
    text = (
        "  a sentence of some words and a/very/long/path/that/is/one/word ends\n  tfkd x y z w v u"
    )
    assert folded(text, 20).splitlines() == [
        "  a sentence of some",
        "    words and",
        "    a/very/long/path/that/is/one/word",
        "    ends",
        "  tfkd x y z w v u",
    ]
    said = "tfkd tune: a sentence of some words"
    assert folded(said, 20).splitlines() == ["tfkd tune: a", "  sentence of some", "  words"]
    assert folded(text, 100) == text and folded("", 10) == "" and folded("\n", 10) == "\n"


def test_a_pipe_gets_lines_as_they_are(
    storage: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(storage.parent)
    monkeypatch.setenv("COLUMNS", "40")
    assert main(["trials", "sweep"]) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) > 40
