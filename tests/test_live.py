"""The live view, with synthetic events; in a notebook, with a sweep."""

import io
import json
import re
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console, Group
from test_readers import change, make_sweep

from tfkd_ray.learn.config import TeacherRun
from tfkd_ray.learn.models import Mlp
from tfkd_ray.learn.objectives import CrossEntropy
from tfkd_ray.show import live
from tfkd_ray.show.live import Progress
from tfkd_ray.show.pace import TRUST, Begun, HalvingRule, Pace, epochs_left
from tfkd_ray.show.running_arms import baselines_by_arm
from tfkd_ray.show.waiting import Waiting
from tfkd_ray.space.arms import build_arms, new_comparison
from tfkd_ray.space.space import build_space
from tfkd_ray.store.experiment import write_experiment

EPOCHS = 9
SPACE: dict[str, Any] = {
    "student": "mlp",
    "objective": ["ce", {"name": "lsr", "alpha": {"low": 0.1, "high": 0.4}}],
    "epochs": EPOCHS,
    "search": {"num_samples": 4},
}


class FakeTrial:
    """The attributes of a Tune trial that the view reads."""

    def __init__(self, name: str, **about: Any) -> None:
        self.trial_id = name
        about = {
            "number": 0,
            "name": name,
            "epochs": EPOCHS,
            "parameters": {f"objective.{name[6:]}.alpha": 0.123},
            **about,
        }
        self.config = {"trial": about, "objective": {"name": name.split("-")[1]}}
        self.last_result = dict[str, Any]()


def view(
    experiment: Path, *, terminal: bool = False, **search: Any
) -> tuple[Progress, io.StringIO]:
    out = io.StringIO()
    if not experiment.exists():
        space = build_space({**SPACE, "search": {**SPACE["search"], **search}})
        write_experiment(experiment, space.tree, ["tfkd"])
    progress = Progress(experiment, Console(file=out, force_terminal=terminal, width=80, height=24))
    progress.setup()
    return progress, out


def start(progress: Progress, name: str, **about: Any) -> FakeTrial:
    trial = FakeTrial(name, **about)
    progress.on_trial_start(0, [], trial)
    return trial


def tell(progress: Progress, trial: FakeTrial, epoch: int, value: float) -> None:
    result = {
        "epoch": epoch,
        "val_accuracy": value,
        "train_loss": 1 - value,
        "seconds": 2.0,
        "images_per_s": 750.0,
    }
    progress.on_trial_result(0, [], trial, result)


def run(
    progress: Progress, name: str, epoch: int, value: float | None, failed: str | None = None
) -> None:
    trial = start(progress, name)
    if value is not None:
        tell(progress, trial, epoch, value)
    trial.last_result = {"failed": failed} if failed else {}
    progress.on_trial_complete(0, [], trial)


class Clock:
    """A clock that the test advances."""

    now = 1_000_000.0

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("time", "monotonic"):
            monkeypatch.setattr(live.time, name, lambda: self.now)


def test_piped_it_says_one_line_an_event(tmp_path: Path) -> None:
    progress, out = view(tmp_path / "e")
    run(progress, "t0000-ce", 9, 0.9)
    run(progress, "t0001-lsr", 1, 0.5)
    gloo = "RuntimeError: [/pytorch/third_party/gloo/x.cc:81] [enforce fail] timed out"
    run(progress, "t0002-ce", 0, None, failed=f"{gloo}\nmore")
    assert out.getvalue().splitlines() == [
        "t0000-ce: started",
        "t0000-ce: done, val_accuracy 0.9000",
        "t0001-lsr: started",
        "t0001-lsr: stopped early at epoch 1, val_accuracy 0.5000",
        "t0002-ce: started",
        f"t0002-ce: failed: {gloo}",
    ]


def test_a_paused_trial_is_counted_and_its_going_on_is_said(tmp_path: Path) -> None:
    progress, out = view(tmp_path / "e", stopping="pausing")
    for name in ("t0000-ce", "t0001-ce"):
        trial = start(progress, name, directory=str(tmp_path / "e" / "trials" / name))
        tell(progress, trial, 1, 0.5)
        progress.on_trial_save(0, [], trial)
    progress.on_trial_start(0, [], trial)
    lines = progress.lines(80, 24)
    assert "0 of 4 trials, 1 running, 1 paused, 0:00" in lines[0]
    assert any(line.split() == ["paused", "there", "1", "0"] for line in lines)
    trial.last_result = {"epoch": 1}
    progress.on_trial_save(0, [], trial)
    progress.on_trial_complete(0, [], trial)
    assert progress.lines(80, 24)[0].startswith("e: 1 of 4 trials, 0 running, 1 paused, 0:00")
    assert out.getvalue().splitlines()[2:] == [
        "t0001-ce: started",
        "t0001-ce: paused at epoch 1, val_accuracy 0.5000",
        "t0001-ce: goes on",
        "t0001-ce: paused at epoch 1, val_accuracy 0.5000",
    ]


def test_it_says_how_it_stands_to_the_second_and_the_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    budgets = {"time_budget_s": 3600, "cpu_hours": 2, "max_failed_trials": 3}
    progress, _ = view(tmp_path / "sweep", num_samples=8, **budgets)
    spent = tmp_path / "sweep" / "spent.json"
    assert not [
        line for line in progress.lines(80, 24) if "left" in line or "/min" in line
    ]  # no data, no claim
    first = start(progress, "t0000-ce")
    for epoch in range(1, EPOCHS + 1):
        clock.now += 2
        tell(progress, first, epoch, epoch / 10)
    progress.on_trial_complete(0, [], first)
    run(progress, "t0001-lsr", EPOCHS, 0.875)
    run(progress, "t0002-ce", 1, 0.4)
    run(progress, "t0003-lsr", 0, None, failed="Diverged: train_loss is nan")
    second = start(progress, "t0004-ce")
    clock.now += 2
    tell(progress, second, 3, 0.6)
    spent.write_text(json.dumps({"seconds": 20.0, "trial_seconds": 1800.0}))
    # An epoch takes 2 s, and one trial runs at a time: it has 6 epochs left. The fourth trial of ce at
    # epoch 1 passes in 1 of 4 cases, the third at epoch 3 in 1.4 of 3: 1 + 2/4 + 8.4/12 epochs. Of lsr,
    # the second and third pass epoch 1 in 1 of 2 and 1 of 3 cases, and one of them epoch 3 in 1.4 of 2.
    # 15 epochs in all, a little more as more passed so far; the drawn sweeps take 27 s.
    assert progress.lines(80, 24) == [
        "sweep: 4 of 8 trials, 1 running, 0:20, about 0:27 left",
        f"{'━' * 43}{'─' * 31}  59 %",
        "36 epochs/min, 750 images/s, time 0:20 of 1:00:00, 0.50 of 2 CPU-hours",
        "1 of 3 failures",
        "",
        "       full  stopped  failed  running  best val_accuracy    vs ce",
        "● ce      1        1       0        1             0.9000",
        "● lsr     1        0       1        0             0.8750  -0.0250",
        "",
        "━━━━━━━━━━──────────────────── t0004-ce  3/9  0.6000",
        "",
        "best so far ▄▄▄▄ 0.9000",
        "best: t0000-ce, val_accuracy 0.9000: alpha 0.123",
        "rung at epoch   1  3  9",
        "  reached it    4  3  2",
        "  were stopped  1  0",
        "failed: t0003-lsr: Diverged: train_loss is nan",
    ]
    progress._search = progress._search.model_copy(update={"time_budget_s": 40.0})
    assert progress.lines(80, 24)[0].endswith("0:20 left of the time budget")


def test_epochs_left_are_those_of_trials_stopped_as_often_as_so_far() -> None:
    def left(begun: list[tuple[int, int, str]], new: int) -> float:
        return epochs_left([Begun("ce", *b) for b in begun], [("ce", 9)] * new)

    assert left([], 2) == 18
    done, at_one, at_three = (9, 9, "done"), (1, 9, "stopped"), (3, 9, "stopped")
    assert left([done], 1) == 9
    assert left([done, at_one], 1) == 1 + 8 / 2
    assert left([done, at_one, at_one, at_three], 1) == 1 + (2 + 6 / 2) / 2
    running = (2, 9, "running")  # past epoch 1, so it counts there; it may stop at epoch 3
    assert left([done, at_one, at_three, running], 0) == 1 + 6 / 2
    assert left([(1, 9, "stopped")], 1) == 1  # no trial continued
    assert left([(1, 9, "failed"), (4, 9, "interrupted")], 0) == 5


def test_of_a_halving_the_epochs_left_are_those_that_its_rule_expects() -> None:
    rule = HalvingRule((1, 3), 3)
    new = [("ce", 9)] * 3
    # of 3 trials 1 + 1/2 + 1/3 pass epoch 1, about 2, of which 1 + 1.4/2 pass epoch 3
    passing = 1 + 1 / 2 + 1 / 3
    assert epochs_left([], new, rule) == pytest.approx(3 + passing * (2 + 1.7 / 2 * 6))
    there = [Begun("ce", 1, 9, "stopped")] * 5
    # the sixth passes in 2 of 6 cases, in fewer as none of five passed where 2.28 were expected, and
    # is then the first at epoch 3; another objective is apart
    expected = 1 + 1 / 2 + 1 / 3 + 1 / 4 + 1 / 5
    share = 2 / 6 * (0 + TRUST) / (expected + TRUST)
    assert epochs_left(there, new[:1], rule) == pytest.approx(1 + share * 8)
    assert epochs_left(there, [("lsr", 9)], rule) == 9
    assert epochs_left([*there, Begun("ce", 2, 9, "running")], [], rule) == pytest.approx(7)


def test_of_a_halving_that_pauses_the_epochs_left_are_known() -> None:
    rule = HalvingRule((1, 3), 3, pauses=True)
    assert epochs_left([], [("ce", 9)] * 9, rule) == 9 + 3 * 2 + 6
    paused = [Begun("ce", 1, 9, "paused")] * 9
    assert epochs_left(paused, [], rule) == 3 * 2 + 6
    assert epochs_left([Begun("ce", 9, 9, "done")] * 3, [], rule) == 0


def test_the_time_left_counts_places_and_what_a_trial_of_its_objective_takes() -> None:
    pace, begun = Pace(), {}
    new = [("ce", 4), ("kd", 4), ("ce", 4)]
    assert pace.seconds_left(begun, new, None, 0.0) is None
    for name, row in (("a", "ce"), ("b", "kd")):
        pace.started(name, row, 0.0)
        begun[name] = Begun(row, 1, 4, "running")
    pace.epoch("a", 1.0, 30.0)  # of which 29 s are the start of a process: it is not repeated
    pace.epoch("b", 3.0, 30.0)
    # ce and kd run for 3 and 9 s more; then ce takes 4 s, until 7, and kd 12 s, until 19; ce until 13
    assert pace.seconds_left(begun, new, None, 30.0) == 19
    assert pace.seconds_left(begun, new, None, 30.5) == 18.5
    pace.ended("a")
    begun["a"] = Begun("ce", 4, 4, "done")
    pace.started("c", "ce", 34.0)
    pace.epoch("c", 1.0, 37.0)  # 2 s between two trials
    begun["c"] = Begun("ce", 1, 4, "running")
    assert pace.seconds_left(begun, new[:1], None, 37.0) == 2 + 2 + 4  # after b


def test_a_process_that_starts_slowly_has_its_whole_run_left() -> None:
    pace = Pace()
    pace.started("a", "ce", 0.0)
    for now in (1.0, 2.0):
        pace.epoch("a", 1.0, now)
    pace.ended("a")
    begun = {"a": Begun("ce", 2, 2, "done"), "b": Begun("ce", 0, 2, "running")}
    pace.started("b", "ce", 3.0)
    assert pace.seconds_left(begun, [], None, 60.0) == 2


def test_epochs_that_come_in_one_message_share_its_time() -> None:
    pace = Pace()
    pace.started("a", "ce", 0.0)
    pace.epoch("a", 0.02, 5.0)
    for end in (6.0, 7.0):  # a message each second, of 50 epochs and of 200
        for _ in range(50 if end == 6 else 200):
            pace.epoch("a", 0.004, end)
    begun = {"a": Begun("ce", 251, 751, "running")}
    assert pace.seconds_left(begun, [], None, 7.0) == pytest.approx(500 * 2.02 / 251)


def test_arms_of_an_own_network_with_arguments_are_compared_with_their_baseline() -> None:
    own = {"name": "own", "path": "test_models:odd", "args": {"kind": "auxiliary"}}
    tree = {"student": own, "data": "digits", "epochs": 2}
    tree["arms"] = [{"name": name, "objective": name} for name in ("ce", "lsr")]
    tree["arms"].append({"name": "other", "objective": "lsr", "student": {"name": "mlp"}})
    arms = [
        SimpleNamespace(name=arm.name, config=arm.config, part=part, baseline=None)
        for arm, part in zip(build_arms(tree).arms, ("baseline", "", ""), strict=True)
    ]
    assert baselines_by_arm(SimpleNamespace(arms=arms)) == {"lsr": "ce"}


def test_a_bar_and_a_sparkline_have_the_width_that_they_are_given() -> None:
    assert live.bar(0.5, 8) == ("━━━━", "────")
    assert live.bar(1.2, 8, ascii_only=True) == ("########", "")
    assert live.bar(-1, 4, ascii_only=True) == ("", "----")
    assert live.sparkline([0.1, 0.2, 0.3], 10) == "▁▅█"
    assert live.sparkline([5.0], 10) == "▄"
    assert live.sparkline(list(range(100)), 10)[-1] == "█"
    assert len(live.sparkline(list(range(100)), 10)) == 10


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
@pytest.mark.parametrize("no_colour", [False, True])
def test_colours_are_those_of_the_report_and_nothing_is_said_by_them_alone(
    tmp_path: Path, encoding: str, no_colour: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("COLORTERM", "truecolor")
    monkeypatch.setenv("TERM", "xterm-256color")
    if no_colour:
        monkeypatch.setenv("NO_COLOR", "1")
    raw = io.BytesIO()
    view(tmp_path / "e")[0].stop()
    out = io.TextIOWrapper(raw, encoding=encoding)
    console = Console(file=out, force_terminal=True, width=80, height=24)
    progress = Progress(tmp_path / "e", console)
    progress.setup()
    run(progress, "t0000-ce", 9, 0.9)
    run(progress, "t0001-lsr", 1, None, failed="ValueError: x")
    tell(progress, start(progress, "t0002-lsr"), 3, 0.5)
    progress.on_experiment_end([])
    out.flush()
    shown = raw.getvalue().decode(encoding)
    assert "t0002-lsr" in shown and "failed: t0001-lsr" in shown
    coloured = "38;2;230;159;0" in shown  # lsr's, #E69F00
    assert coloured != no_colour
    assert bool(re.search(r"\x1b\[[0-9;]*3[1-8]", shown)) != no_colour
    assert ("━" in shown) == (encoding == "utf-8") and ("###" in shown) == (encoding == "ascii")


def test_the_last_screen_stays(tmp_path: Path) -> None:
    progress, out = view(tmp_path / "e", terminal=True)
    run(progress, "t0000-ce", 9, 0.9)
    progress.on_experiment_end([])
    last = out.getvalue()[out.getvalue().rindex("e: 1 of 4 trials") :]
    assert "best: t0000-ce, val_accuracy 0.9000" in last
    after = last[last.index("best: t0000-ce") :]
    assert "\x1b[2K" not in after and "\x1b[1A" not in after  # nothing takes it away again


def test_before_the_first_epoch_it_says_what_is_waited_for(tmp_path: Path) -> None:
    progress, _ = view(tmp_path / "e", terminal=True)
    waits = "no epoch has ended yet"
    assert waits in progress.lines(80, 24)[-1]
    trial = start(progress, "t0000-ce")
    assert waits in progress.lines(80, 24)[-1]
    tell(progress, trial, 1, 0.5)
    assert waits not in "".join(progress.lines(80, 24))
    progress.stop()


@pytest.mark.parametrize("width", [80, 120])
def test_running_trials_have_a_bar_each_and_their_settings_where_there_is_room(
    tmp_path: Path, width: int
) -> None:
    progress, _ = view(tmp_path / "e")
    for n in range(3):
        tell(progress, start(progress, f"t{n:04d}-lsr"), n + 1, 0.5 + n / 10)
    lines = [line for line in progress.lines(width, 24) if "-lsr" in line and "━" in line]
    bars = [(line.count("━"), line.count("─")) for line in lines]
    assert [round(EPOCHS * full / (full + empty)) for full, empty in bars] == [1, 2, 3]
    assert all(("alpha 0.123" in line) == (width == 120) for line in lines)
    assert max(map(len, lines)) <= width


@pytest.mark.parametrize("terminal", [True, False])
def test_while_a_teacher_trains_a_terminal_shows_its_epoch(terminal: bool) -> None:
    out = io.StringIO()
    wait = Waiting(Console(file=out, force_terminal=terminal, width=80))
    teacher = TeacherRun(objective=CrossEntropy(), student=Mlp(hidden=(8,)), epochs=54)
    wait.on_teacher_epoch(teacher, {})
    assert "its process starts" in wait.line().plain
    wait.on_teacher_epoch(teacher, {"epoch": 12.0, "val_accuracy": 0.9712})
    shown = wait.line().plain[2:]
    assert shown.startswith("teacher mlp: epoch 12 of 54, val_accuracy 0.9712  0:")
    wait.stop()
    assert ("epoch 12 of 54" in out.getvalue()) == terminal
    assert out.getvalue().endswith("\x1b[2K") or not terminal  # the line is gone
    assert out.getvalue() == "" or terminal


def test_in_a_file_a_line_every_half_minute_tells_how_far_a_teacher_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, now = io.StringIO(), [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    wait = Waiting(Console(file=out, force_terminal=False, width=80))
    teacher = TeacherRun(objective=CrossEntropy(), student=Mlp(hidden=(8,)), epochs=54)
    wait.on_teacher_epoch(teacher, {})
    for epoch in range(1, 41):
        now[0] += 2
        wait.on_teacher_epoch(teacher, {"epoch": float(epoch), "val_accuracy": 0.9712})
    assert out.getvalue().splitlines() == [
        f"teacher mlp: epoch {epoch} of 54, val_accuracy 0.9712" for epoch in (15, 30)
    ]


def test_what_earlier_sessions_did_counts_and_a_retried_trial_counts_once(tmp_path: Path) -> None:
    make_sweep(tmp_path / "e", 48)
    change(tmp_path / "e", 7, status="interrupted")
    progress, _ = view(tmp_path / "e")
    assert progress.lines(80, 24)[0].startswith("e: 47 of 48 trials, 0 running, 0:00")
    start(progress, "t0039-ce")  # the one that failed
    assert progress.lines(80, 24)[0].startswith("e: 46 of 48 trials, 1 running, 0:00")


@pytest.mark.slow
@pytest.mark.parametrize("width, height", [(20, 8), (80, 24), (200, 50)])
@pytest.mark.parametrize("rungs", ["halving", "many"])
def test_on_a_terminal_it_is_one_screen(
    tmp_path: Path, width: int, height: int, rungs: str
) -> None:
    stopping = {"stopping": {"name": "median", "min_epochs": 1}} if rungs == "many" else {}
    make_sweep(tmp_path / "größe 試", 80, 100, search=stopping)
    progress, _ = view(tmp_path / "größe 試", terminal=True)
    for n in range(5):
        run(progress, f"t{n:04d}-lsr", 0, None, failed="ValueError: " + "x" * 300)
    for n in range(10, 40):
        tell(progress, start(progress, f"t{n:04d}-kd_standardised", epochs=100), 17, 0.8)
    lines = progress.lines(width, height)
    screen = io.StringIO()
    Console(file=screen, width=width).print(Group(*progress.screen(width, height)))
    progress.stop()
    shown = screen.getvalue().splitlines()
    assert len(shown) < height and max(map(len, shown)) <= width
    if width >= 80:
        assert (
            "failed: t0004-lsr: ValueError" in screen.getvalue()
            and "rung at epoch" in screen.getvalue()
        )
        assert "t0010-kd_standardised  17/100  0.8000" in screen.getvalue()
        assert "more running trials" in screen.getvalue()
        assert len(lines) < height


@pytest.mark.slow
def test_of_223_arms_those_that_run_are_shown_and_the_rest_counted(tmp_path: Path) -> None:
    arms = [
        {"name": f"arm-{n}", "objective": "ce", "optim": {"lr": (n + 1) / 300}} for n in range(223)
    ]
    compared = build_arms({"title": "Many", "arms": arms, "student": "mlp", "epochs": EPOCHS})
    new_comparison(compared, [1001, 1002], tmp_path / "c")
    progress, out = view(tmp_path / "c")
    assert len(progress.lines(80, 24)) <= 23
    for n in (0, 1, 2):
        run_arm = start(progress, f"arm-{n}-s1001", arm=f"arm-{n}", parameters={"seed": 1001})
        tell(progress, run_arm, EPOCHS, 0.5)
        progress.on_trial_complete(0, [], run_arm)
    for n in (100, 222):
        tell(progress, start(progress, f"arm-{n}-s1001", arm=f"arm-{n}"), 4, 0.5)
    lines = progress.lines(80, 24)
    rows = {line.split()[1] for line in lines if line.startswith("● arm-")}
    assert {"arm-0", "arm-2", "arm-100", "arm-222"} <= rows and len(lines) <= 23
    assert lines[0].startswith("c: 3 of 446 trials, 2 running")
    assert f"and {223 - len(rows)} more, of which 0 have begun" in lines
    assert any(line.endswith("arm-222-s1001  4/9") for line in lines)
    assert any(line.endswith("train_ce  vs arm-0") for line in lines)
    assert lines[-1].startswith("not a verdict: cross-entropy") and "test_accuracy" not in str(
        lines
    )
    assert "rung" not in "".join(lines) and "arm-0-s1001: done" in out.getvalue()


@pytest.mark.parametrize("hold_out", [True, False], ids=["validation", "all"])
def test_arms_that_run_show_paired_differences_of_what_is_known_before_the_test_split(
    tmp_path: Path, hold_out: bool
) -> None:
    arms = [
        {"name": "reg", "objective": "tfkd_reg"},
        {"name": "plain", "objective": "ce"},
        {"name": "smoothed", "objective": "lsr"},
    ]
    compared = build_arms({"title": "Few", "arms": arms, "student": "mlp", "epochs": EPOCHS})
    new_comparison(compared, [1001, 1002, 1003], tmp_path / "c", hold_out=hold_out)
    progress, _ = view(tmp_path / "c")
    known = {"reg": (0.6, 0.5, 0.9), "plain": (0.4, 0.6), "smoothed": (0.3,)}
    metric = "val_accuracy" if hold_out else "train_ce"
    for arm, values in known.items():
        for seed, value in zip((1001, 1002, 1003), values, strict=False):
            trial = start(progress, f"{arm}-s{seed}", arm=arm, parameters={"seed": seed})
            result = {"epoch": EPOCHS, metric: value, "seconds": 2.0, "test_accuracy": 0.1234}
            progress.on_trial_result(0, [], trial, result)
            if value != 0.9:  # which runs still
                progress.on_trial_complete(0, [], trial)
    lines = progress.lines(80, 24)
    table = [line.split() for line in lines if line.startswith("● ") or "vs plain" in line]
    assert table == [
        ["done", "running", metric, "vs", "plain"],
        ["●", "reg", "2", "1", *["0.5500", "±", "0.0707", "+0.0500", "±", "0.2121", "(2)"]],
        ["●", "plain", "2", "0", *["0.5000", "±", "0.1414"]],
        ["●", "smoothed", "1", "0", "0.3000", "-0.1000", "(1)"],
    ]
    assert "0.1234" not in "".join(lines)


NOTEBOOK = """
from pathlib import Path
from tfkd_ray import Progress, build_tuner
space = {"student": {"name": "mlp", "hidden": [4]}, "objective": "ce", "epochs": 3,
         "optim": {"lr": {"low": 0.01, "high": 0.5}}, "search": {"num_samples": 4}}
grid = build_tuner(space, name="sweep", storage="here", callbacks=[Progress("here/sweep")]).fit()
"""


@pytest.mark.long
@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of Jupyter's own packages
def test_in_a_notebook_it_is_one_output_of_the_cell_that_fits(
    ray_cluster: str, tmp_path: Path
) -> None:
    import nbclient
    import nbformat.v4

    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(NOTEBOOK)])
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(book, timeout=100, kernel_name="python3", resources=resources).execute()
    outputs = [o for o in book.cells[0].outputs if o.output_type == "display_data"]
    ours = [
        o["data"] for o in outputs if o["data"].get("text/html")
    ]  # Ray's reporter leaves an empty one
    assert len(ours) == 1, outputs
    assert ours[0]["text/plain"].startswith("sweep: 4 of 4 trials, 0 running")
    assert ours[0]["text/html"].startswith("<pre>sweep: 4 of 4 trials")
    assert not [
        o for o in book.cells[0].outputs if o.output_type == "stream" and "started" in o["text"]
    ]
