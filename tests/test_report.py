"""Reports: one file, no network, the verdict first, and every plot drawn in a browser."""

import importlib.util
import json
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from test_readers import change, line, make_sweep

from tfkd_ray.settings.errors import ConfigError
from tfkd_ray.show import figures
from tfkd_ray.show.report import report
from tfkd_ray.show.status import read_plan
from tfkd_ray.space.arms import build_arms, new_comparison, read_comparison
from tfkd_ray.space.ranges import Range
from tfkd_ray.store.experiment import Record, read_records, write_record

EVIL = "</script><script>document.title='pwned'</script><img src=http://example.invalid/x onerror=\"document.title='pwned'\">"


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a finished sweep of 160 trials in which the learning rate matters most."""
    experiment = tmp_path_factory.mktemp("storage") / "größe <2>"
    make_sweep(experiment, 160)
    return experiment


@pytest.fixture(scope="module")
def page(sweep: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the report on it, without plotly.js."""
    out = tmp_path_factory.mktemp("out") / "report.html"
    assert report(sweep, out) == [out]
    return without_plotly(out)


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_comparison(tmp_path_factory.mktemp("storage") / "arms")


def make_comparison(directory: Path, **about: Any) -> Path:
    """Write a judged comparison with made-up logits: reg beats ce and lsr by 4 points or so."""
    from tfkd_ray.learn.checkpoint import save_weights
    from tfkd_ray.run.confirm import LOGITS, outcome

    arms = [{"name": "plain", "objective": "ce"}, {"name": "smooth", "objective": "lsr"},
            {"name": "reg", "objective": "tfkd_reg"}]  # fmt: skip
    new_comparison(
        build_arms({"title": "Three arms", "arms": arms, "student": "mlp", **about}),
        range(1001, 1006),
        directory,
    )
    g, labels = np.random.default_rng(0), np.arange(500) % 10
    for number, run in enumerate(read_comparison(directory).runs):
        folder = directory / "trials" / run.name
        objective = run.config.objective.name
        write_record(
            Record(
                folder, number, run.name, objective, "done", {"arm": run.arm, "seed": run.seed}, {}
            )
        )
        right = g.random(500) < (0.94 if run.arm == "reg" else 0.88)
        logits = 5.0 * np.eye(10)[np.where(right, labels, (labels + 1) % 10)]
        save_weights(
            folder / LOGITS,
            {"logits": torch.tensor(logits), "labels": torch.tensor(labels)},
            {"run": run.name},
        )
    outcome(directory)
    return directory


def without_plotly(out: Path) -> str:
    """Return a report without plotly.js, the only foreign script."""
    return "".join(
        part
        for part in re.split(r"(?s)(<script>.*?</script>)", out.read_text())
        if len(part) < 4_000_000
    )


def in_browser(out: Path) -> str:
    """Return the page after its scripts have run in headless Chromium."""
    chromium = (
        shutil.which("chromium")
        or shutil.which("chromium-browser")
        or shutil.which("google-chrome")
    )
    assert chromium, (
        "this test looks at a report in a real browser, and there is none: apt-get install chromium"
    )
    command = [chromium, "--headless", "--no-sandbox", "--disable-quic", "--disable-background-networking",
               f"--user-data-dir={out.parent / 'profile'}", "--virtual-time-budget=10000", "--dump-dom", out.as_uri()]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=True).stdout


# --- the page


def test_the_page_reads_nothing_from_elsewhere(page: str) -> None:
    assert not re.findall(
        r"""(?i)(?:src|href)\s*=\s*["']?(?!#)[^"'>\s]+|@import|url\(|<link|<iframe|<object""", page
    )
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]+)"', page)
    assert policy and policy[1].startswith("default-src 'none'") and "http" not in policy[1]
    assert "unsafe-inline" not in policy[1].partition("script-src")[2]


def test_what_is_not_confirmed_is_called_so_first(page: str) -> None:
    box = page.index("Not confirmed yet")
    assert box < page.index("<h2>Best configurations") and page.count('class="box') == 1
    assert "This is not a verdict: it is the best of 160 on validation" in page


def test_every_figure_has_a_title_a_sentence_and_labelled_axes_with_units(page: str) -> None:
    captions = re.findall(r"<figcaption><h3>(.+?)</h3><p>(.+?)</p>", page)
    assert len(captions) == 7 and all(text.endswith(".") for _, text in captions)
    for tree in map(
        json.loads, re.findall(r'<script type="application/json">(.+?)</script>', page)
    ):
        assert tree["layout"]["xaxis"]["title"]["text"] and tree["data"]
        assert tree["layout"]["yaxis"]["title"]["text"] or tree["layout"]["yaxis"]["ticktext"]


def test_the_receipt_adds_up(sweep: Path, page: str) -> None:
    records = read_records(sweep)
    planned, used = 160 * 18, sum(len(r.metrics) for r in records)
    saved = sum(18 - len(r.metrics) for r in records if r.status == "stopped")
    for what, epochs in (
        ("planned, none stopped", planned),
        ("used", used),
        ("saved by early stopping", saved),
    ):
        assert re.search(rf">{what}</td><td[^>]*>{epochs:,} epochs, \S+ CPU-hours", page), what
    assert planned == used + saved + sum(
        18 - len(r.metrics) for r in records if r.status == "failed"
    )


def test_importance_finds_the_setting_that_was_made_to_matter(sweep: Path) -> None:
    found = figures.importance_section(figures.read_sweep(sweep, read_plan(sweep)))
    assert len(found.panels) == 4
    for panel in found.panels:
        assert panel.y.ticks[-1][1] == "lr"  # bars are drawn from the bottom
        assert sum(x for x in panel.series[0].x if x is not None) == pytest.approx(100)


def test_of_few_trials_nothing_is_concluded(tmp_path: Path) -> None:
    make_sweep(tmp_path / "few", 8)
    report(tmp_path / "few", tmp_path / "r.html")
    text = without_plotly(tmp_path / "r.html")
    assert text.count("Fewer than 8 trials of full length, too few to tell:") == 3


def test_there_is_no_contour_between_choices(tmp_path: Path) -> None:
    objective = {
        "name": "kd",
        "temperature": {"choices": [2.0, 4.0, 8.0]},
        "alpha": {"low": 0.1, "high": 0.9},
    }
    make_sweep(
        tmp_path / "e", 12, objective=[objective], search={"baselines": False, "stopping": "none"}
    )
    report(tmp_path / "e", tmp_path / "r.html")
    assert "Temperature against alpha" in without_plotly(tmp_path / "r.html")


def test_an_axis_shows_a_range_on_its_own_scale() -> None:
    from tfkd_ray.space.space import Parameter

    scales = {
        "x": Range(1, 20),
        "y": Range(1, 20, log=True),
        "z": Range(0.9, 0.999, log_complement=True),
    }
    shown = {}
    for name, domain in scales.items():
        p = Parameter(name, (name,), domain)
        axis = figures._axis(p)
        shown[axis.label] = axis.log
        for value in (domain.low, domain.at(0.3), domain.high):
            assert axis.span[0] < figures._at(p, value) < axis.span[1]
            assert figures._axis_place(p, value) == domain.place(value)
    assert shown == {"x": False, "y (log scale)": True, "1 - z (log scale)": True}


def test_the_rank_correlation_is_one_where_a_rung_ranks_as_the_end_does(tmp_path: Path) -> None:
    make_sweep(tmp_path / "e", 10, objective=["ce"])
    for number in range(10):
        folder = change(tmp_path / "e", number, status="done")
        values = [0.5 + number / 100, 0.6 + (9 - number) / 100] + [0.7 + number**2 / 1000] * 16
        (folder / "metrics.jsonl").write_text("".join(line(e + 1, v) for e, v in enumerate(values)))
    found = figures.fidelity(figures.read_sweep(tmp_path / "e", read_plan(tmp_path / "e")))
    assert [p.title for p in found.panels] == ["rung at 2 epochs", "rung at 6 epochs"]
    assert [p.series[0].name for p in found.panels] == ["ce: -1.00 (n = 10)", "ce: 1.00 (n = 10)"]


def test_a_winner_that_is_label_smoothing_is_called_so(tmp_path: Path) -> None:
    code = {"name": "tfkd_reg_code", "alpha": {"low": 0.05, "high": 0.3}}
    make_sweep(tmp_path / "e", 16, objective=[code, "ce"])
    report(tmp_path / "e", tmp_path / "r.html")
    assert re.search(
        r"this equals label smoothing alpha 0\.\d+ times \S+ within \S+ of its",
        without_plotly(tmp_path / "r.html"),
    )


def test_what_files_say_is_shown_and_never_run(tmp_path: Path) -> None:
    make_sweep(tmp_path / "e", 8)
    for number in (0, 1):
        change(tmp_path / "e", number, status="failed", reason=EVIL)
    change(tmp_path / "e", 3, status="done", name=EVIL)
    report(tmp_path / "e", tmp_path / "r.html")
    text = without_plotly(tmp_path / "r.html")
    assert (
        "<img" not in text
        and text.count("<script>") == 1
        and "&lt;/script&gt;&lt;script&gt;" in text
    )


ODD: dict[str, dict[str, Any]] = {
    "one objective, no rungs": {"objective": "ce", "search": {"stopping": "none"}},
    "nothing searched": {"objective": ["ce", "lsr"], "optim": {"lr": 0.1}},
    "NLL": {"search": {"metric": "val_nll"}},
    "one sampler": {"search": {"split": False}},
}


@pytest.mark.parametrize("changes", ODD.values(), ids=ODD)
@pytest.mark.slow
def test_every_kind_of_sweep_has_a_report(tmp_path: Path, changes: dict[str, Any]) -> None:
    make_sweep(tmp_path / "e", 24, **changes) if "optim" not in changes else plain(
        tmp_path / "e", changes
    )
    report(tmp_path / "e", tmp_path / "r.html", figures=tmp_path / "figures")
    assert "Not confirmed yet" in without_plotly(tmp_path / "r.html")


def plain(experiment: Path, changes: dict[str, Any]) -> None:
    """Write a sweep of lsr and ce without a searched setting."""
    from tfkd_ray.space.space import build_space
    from tfkd_ray.store.experiment import write_experiment

    space = build_space({**changes, "student": "mlp", "epochs": 2, "search": {"num_samples": 2}})
    write_experiment(experiment, space.tree, [])
    for n, branch in enumerate(space.branches):
        name = f"t{n:04d}-{branch.objective}"
        config = branch.config({}).model_dump(mode="json")
        write_record(
            Record(experiment / "trials" / name, n, name, branch.objective, "done", {}, config)
        )
        (experiment / "trials" / name / "metrics.jsonl").write_text(line(1, 0.5) + line(2, 0.6))


@pytest.mark.parametrize("left", ["nothing", "failures", "a running trial"])
def test_an_experiment_with_nothing_to_judge_has_a_report(tmp_path: Path, left: str) -> None:
    make_sweep(tmp_path / "e", 4)
    for number in range(4):
        folder = change(
            tmp_path / "e",
            number,
            status="failed" if left == "failures" else "running",
            reason=None,
        )
        if left == "nothing":
            shutil.rmtree(folder)
        elif left == "failures":
            (folder / "metrics.jsonl").unlink()
        else:
            (folder / "metrics.jsonl").write_text(line(1, 0.5) + '{"epoch": 2, "val')
    report(tmp_path / "e", tmp_path / "r.html")
    assert "No trial of full length yet" in without_plotly(tmp_path / "r.html")


def test_wrong_input_is_refused_before_anything_is_written(
    sweep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"is a directory; name a file: -o report.html"):
        report(sweep, tmp_path)
    with pytest.raises(ConfigError, match=r"not a comparison of arms"):
        report(sweep, tmp_path / "r.html", comparisons=[sweep])
    with pytest.raises(ConfigError, match=r"no such directory"):
        report(sweep.parent / "gone", tmp_path / "r.html")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"--figures: SVG files are drawn by matplotlib, which is not installed"
    ):
        report(sweep, tmp_path / "r.html", figures=tmp_path / "figures")
    assert not list(tmp_path.iterdir())


# --- comparisons


@pytest.mark.slow
def test_a_confirmed_sweep_begins_with_the_verdict(
    sweep: Path, comparison: Path, tmp_path: Path
) -> None:
    report(sweep, tmp_path / "r.html", comparisons=[comparison])
    text = without_plotly(tmp_path / "r.html")
    sentence = json.loads((comparison / "confirm.json").read_text())["verdicts"][0]["sentence"]
    assert sentence.startswith("reg is better than every baseline")
    assert (
        text.index(sentence) < text.index("<h2>Best configurations")
        and "Not confirmed yet" not in text
    )
    assert 'class="box yes"' in text and "arms: Candidates against baselines" in text


@pytest.mark.slow
def test_a_comparison_has_a_report_of_its_own(comparison: Path, tmp_path: Path) -> None:
    written = report(comparison, tmp_path / "r.html", figures=tmp_path / "figures")
    text = without_plotly(tmp_path / "r.html")
    assert "<h1>Three arms</h1>" in text and text.index("<strong>Better") < text.index("<h2>Arms")
    assert {p.name for p in written[1:]} == {"arms.svg", "leads.svg"}
    judged = json.loads((comparison / "confirm.json").read_text())
    for arm in judged["arms"]:
        mean = np.mean([100 * run["accuracy"] for run in arm["runs"]])
        assert f'<td class="short">{mean:.2f}</td>' in text


def test_a_comparison_that_is_not_judged_says_so(comparison: Path, tmp_path: Path) -> None:
    shutil.copytree(comparison, tmp_path / "c")
    (tmp_path / "c" / "confirm.json").unlink()
    report(tmp_path / "c", tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text()
    assert (
        "Not judged yet" in text
        and "15 of 15 runs are trained, and the test split is still shut" in text
    )
    (tmp_path / "c" / "confirm.json").write_text('{"title": ')
    with pytest.raises(ConfigError, match=r"confirm.json:\n.*changed by hand, or cut"):
        report(tmp_path / "c", tmp_path / "r.html")


# --- figures and the browser


@pytest.mark.slow
def test_figures_are_also_written_as_svg(sweep: Path, tmp_path: Path) -> None:
    written = report(sweep, tmp_path / "r.html", figures=tmp_path / "figures")
    names = {"parallel", "slices", "contour", "importance", "curves", "pareto", "fidelity"}
    assert {p.stem for p in written[1:]} == names and all(p.suffix == ".svg" for p in written[1:])
    for path in written[1:]:
        assert ElementTree.parse(path).getroot().tag.endswith("svg")


@pytest.mark.browser
def test_a_browser_draws_every_plot_and_runs_nothing_else(
    sweep: Path, comparison: Path, tmp_path: Path
) -> None:
    shutil.copytree(sweep, tmp_path / "e", symlinks=True)
    change(tmp_path / "e", 0, status="failed", reason=EVIL)
    change(tmp_path / "e", 5, status="done", name=EVIL)
    report(tmp_path / "e", tmp_path / "r.html", comparisons=[comparison])
    dom = in_browser(tmp_path / "r.html")
    plots = dom.count('<script type="application/json">')
    assert plots > 15 and f'data-drawn="{plots}"' in dom
    assert (
        len(re.findall(r'<div class="plot[^"]*js-plotly-plot', dom)) == plots
        and dom.count('class="main-svg"') >= plots
    )
    assert "<title>e</title>" in dom and "<title>pwned" not in dom


@pytest.mark.browser
def test_a_thousand_trials_of_a_hundred_epochs_fit(tmp_path: Path) -> None:
    make_sweep(tmp_path / "large", 1000, 100)
    start = time.process_time()
    report(tmp_path / "large", tmp_path / "r.html")
    seconds = time.process_time() - start
    assert (tmp_path / "r.html").stat().st_size < 15e6 and seconds < 20
    assert "Of 1,000 trials 200 or fewer are drawn" in without_plotly(tmp_path / "r.html")
    assert 'data-drawn="' in in_browser(tmp_path / "r.html")
