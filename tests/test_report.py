"""Reports: one file, no network, the verdict first, and every plot drawn in a browser."""

import csv
import json
import re
import shutil
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from conftest import long_after
from test_readers import change, line, make_sweep

from tfkd_ray.learn.objectives import NAMES
from tfkd_ray.settings.errors import ConfigError
from tfkd_ray.show import colours as palette
from tfkd_ray.show import figures, heat_map
from tfkd_ray.show.page import Page, main_html, prose
from tfkd_ray.show.report import report, report_page
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


GRID_T, GRID_ALPHA = (1.0, 2.0, 4.0, 8.0), (0.1, 0.5, 0.9)


def make_grid(experiment: Path, **search: Any) -> Path:
    """Write a finished grid of kd over T and alpha; T = 4 with alpha = 0.5 is the best."""
    from tfkd_ray.space.space import build_space
    from tfkd_ray.store.experiment import write_experiment

    kd = {
        "name": "kd",
        "temperature": {"choices": list(GRID_T)},
        "alpha": {"choices": list(GRID_ALPHA)},
    }
    search = {"sampler": "grid", "baselines": False, **search}
    tree = {"objective": kd, "student": "mlp", "teacher": {"model": "mlp"}, "epochs": 9}
    space = build_space({**tree, "search": search})
    write_experiment(experiment, space.tree, ["tfkd", "tune", "grid.yaml"])
    for n, (t, alpha) in enumerate((t, alpha) for t in GRID_T for alpha in GRID_ALPHA):
        values = {"objective.kd.temperature": t, "objective.kd.alpha": alpha}
        config = space.branches[0].config(values).model_dump(mode="json")
        name = f"t{n:04d}-kd"
        end = 3 if space.rungs and n % 2 else 9
        status = "done" if end == 9 else "stopped"
        write_record(Record(experiment / "trials" / name, n, name, "kd", status, values, config))
        top = grid_value(t, alpha)
        lines = [line(e, top - (9 - e) / 100) for e in range(1, end + 1)]
        (experiment / "trials" / name / "metrics.jsonl").write_text("".join(lines))
    return experiment


def grid_value(t: float, alpha: float) -> float:
    return 0.95 - abs(t - 4) / 100 - abs(alpha - 0.5) / 10


# --- the page


@pytest.mark.slow
def test_the_page_reads_nothing_from_elsewhere(page: str) -> None:
    assert not re.findall(
        r"""(?i)(?:src|href)\s*=\s*["']?(?!#)[^"'>\s]+|@import|url\(|<link|<iframe|<object""", page
    )
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]+)"', page)
    assert policy and policy[1].startswith("default-src 'none'") and "http" not in policy[1]
    assert "unsafe-inline" not in policy[1].partition("script-src")[2]


@pytest.mark.slow
def test_what_is_not_confirmed_is_called_so_first(page: str) -> None:
    box = page.index("Not confirmed yet")
    assert box < page.index("<h2>Best configurations") and page.count('class="box') == 1
    assert "This is not a verdict: it is the best of 160 on validation" in page


@pytest.mark.slow
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


@pytest.mark.slow
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
    assert text.count("Too few trials to tell") == 1 and "importance of the settings of" in text


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
    text = without_plotly(tmp_path / "r.html")
    assert "Temperature against alpha" not in text and "<h3>Slices" in text


@pytest.mark.slow
def test_a_grid_of_temperature_and_alpha_is_a_heat_map_with_its_numbers(tmp_path: Path) -> None:
    experiment = make_grid(tmp_path / "e")
    written = report(experiment, tmp_path / "r.html", figures=tmp_path / "f")
    assert {"grid.svg", "grid.pdf", "grid.csv", "grid-kd.tex"} <= {path.name for path in written}
    page = without_plotly(tmp_path / "r.html")
    cells = re.findall(r'<td style="[^"]*" data-trials="(\d+)" title="[^"]*">(.*?)</td>', page)
    rows = list(csv.DictReader((tmp_path / "f" / "grid.csv").read_text().splitlines()))
    expected = [grid_value(t, alpha) for t in GRID_T for alpha in GRID_ALPHA]
    shown = [f"{100 * value:.2f}" for value in expected]
    assert [re.sub("<.*?>", "", text) for _, text in cells] == shown
    assert [text for _, text in cells if "<" in text] == ["<strong>95.00</strong>"]
    assert [int(number) for number, _ in cells] == list(range(len(expected)))
    assert [float(row["mean"]) for row in rows] == pytest.approx([100 * v for v in expected])
    assert [(float(row["down_value"]), float(row["across_value"])) for row in rows] == [
        (t, alpha) for t in GRID_T for alpha in GRID_ALPHA
    ]
    table = (tmp_path / "f" / "grid-kd.tex").read_text()
    assert r"4 & 91.00 & \textbf{95.00} & 91.00 \\" in table and table.count(r"\textbf") == 1
    assert "Fewer than" not in page and "Too few trials to tell" not in page


@pytest.mark.slow
def test_a_combination_that_was_stopped_shows_its_rung_in_brackets_and_is_never_the_best(
    tmp_path: Path,
) -> None:
    experiment = make_grid(tmp_path / "e", stopping="halving")
    report(experiment, tmp_path / "r.html")
    (found,) = heat_map.sweep_grids(figures.read_sweep(experiment, read_plan(experiment)))
    table = heat_map.as_latex(found)
    assert r"4 & 91.00 & (89.00) & 91.00 \\" in table  # after 3 of 9 epochs; it would end at 95
    assert r"2 & (83.00) & \textbf{93.00} & (83.00) \\" in table
    page = without_plotly(tmp_path / "r.html")
    assert "(89.00)<br><small>epoch 3</small>" in page and "Values in brackets" in page


def test_arms_over_temperature_and_alpha_are_a_heat_map_of_means_over_seeds() -> None:
    values = {
        (t, a): [0.9 + t / 100, 0.9 + t / 100 + a / 100] for t in (2.0, 4.0) for a in (0.1, 0.9)
    }
    arms = [
        {"name": f"kd_{t:g}_{a:g}", "student": "mlp", "objective": {"name": "kd", "temperature": t, "alpha": a},
         "runs": [{"seed": s, "accuracy": v} for s, v in enumerate(found)]}
        for (t, a), found in values.items()
    ]  # fmt: skip
    plain = {"name": "ce", "student": "mlp", "objective": {"name": "ce"}, "runs": []}
    (found,) = heat_map.arm_grids({"arms": [plain, *arms]})
    for place, (t, a) in {(0, 0): (2.0, 0.1), (1, 1): (4.0, 0.9)}.items():
        assert found.cells[place].mean == pytest.approx(np.mean(values[t, a]))
        assert found.cells[place].sd == pytest.approx(np.std(values[t, a], ddof=1))
    assert r"4 & $94.05 \pm 0.07$ & $\mathbf{94.45 \pm 0.64}$ \\" in heat_map.as_latex(found)
    assert (
        "the mean ± standard deviation over its seeds (n = 2)"
        in heat_map.grid_figure([found]).sentence
    )
    assert len(list(heat_map.arm_grids({"arms": arms[:3]}))) == 1
    assert not list(heat_map.arm_grids({"arms": [arms[0], arms[3]]})), "two of four are no grid"


def test_a_grid_with_further_seeds_has_their_means_and_those_come_before_single_runs(
    tmp_path: Path,
) -> None:
    experiment = make_grid(tmp_path / "e")
    sweep = figures.read_sweep(experiment, read_plan(experiment))
    records = list(sweep.records)
    for n, values in ((0, (0.70, 0.74)), (1, (0.71, 0.73)), (2, (0.60, 0.61))):
        runs = (
            replace(records[n], name=f"{records[n].name}-seed{k}", metrics=[{"epoch": 9, "val_accuracy": v}])
            for k, v in enumerate(values)
        )  # fmt: skip
        records[n] = records[n].with_runs(tuple(runs))
    (found,) = heat_map.sweep_grids(replace(sweep, records=records))
    assert found.cells[0, 0].mean == pytest.approx(records[0].judged["val_accuracy"])
    assert found.best == {(0, 0), (0, 1)}, "equal means, before all single runs"
    row = r"1 & $\mathbf{72.00 \pm 2.83}$ & $\mathbf{72.00 \pm 1.41}$ & $60.50 \pm 0.71$ \\"
    assert row in heat_map.as_latex(found)
    line = next(csv.DictReader(heat_map.as_csv([found]).splitlines()))
    assert [line[key] for key in ("unit", "mean", "sd", "n")] == ["%", "72.00", "2.83", "2"]
    assert line["runs"] == "t0000-kd-seed0; t0000-kd-seed1"
    drawn = heat_map.grid_figure([found])
    assert drawn.panels[0].heat is not None and drawn.panels[0].heat.best == found.best
    assert "Cells without ± are single runs" in drawn.sentence


def test_few_values_of_a_setting_are_all_written_beside_its_axis_and_a_short_table_shows_all_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = make_grid(tmp_path / "e")
    sweep = figures.read_sweep(experiment, read_plan(experiment))
    (panel,) = figures.parallel(sweep).panels
    between = [s for s in panel.series if s.kind == "text"][-1]
    written = dict(zip(between.text, between.y, strict=True))
    assert written == pytest.approx({"2": 1 / 3, "4": 2 / 3, "0.5": 0.5})

    def table() -> str:
        return str(report_page(experiment).sections[1].parts[1])

    assert '"wide tall"' not in table()
    monkeypatch.setattr("tfkd_ray.show.report.LONGEST_TABLE", 11)
    assert '"wide tall"' in table() and "The table of 12 trials scrolls." in table()


def test_no_line_ends_inside_a_date_or_a_short_name() -> None:
    text = prose("on 2026-12-01 by <T1-a0.5>")
    assert text == (
        'on <span class="whole">2026-12-01</span> by <span class="whole">&lt;T1-a0.5&gt;</span>'
    )
    long = "a-" * 13
    assert prose("-0.5") == "-0.5" and prose(long) == long, "it would not fit on a phone"


def test_only_an_interrupted_experiment_has_a_warning_colour() -> None:
    for text, warned in (
        ("The sweep was interrupted; after tfkd resume x this page follows it again", True),
        ("The sweep has ended: this is its final report", False),
    ):
        html = main_html(Page("x", "", []), text)
        assert ('<p id="live" class="interrupted"' in html) is warned


def test_a_negative_number_is_no_formula_in_a_table_of_a_grid() -> None:
    cell = heat_map.Cell([heat_map.CellValue("=a", 0, "", 0.5, None)], 1)
    names, values = ("x", "y"), ["-1", "=1", "-1e-05"]
    grid = heat_map.HeatMap("kd", "val_accuracy", "accuracy", names, values, ["-0.5"],
                            {(i, 0): cell for i in range(3)})  # fmt: skip
    rows = list(csv.DictReader(heat_map.as_csv([grid]).splitlines()))
    assert [row["down_value"] for row in rows] == ["-1", "'=1", "-1e-05"]
    assert {(row["across_value"], row["unit"], row["runs"]) for row in rows} == {
        ("-0.5", "%", "'=a")
    }


def test_a_cell_has_the_best_of_other_settings_and_says_so(tmp_path: Path) -> None:
    experiment = make_grid(tmp_path / "e")
    sweep = figures.read_sweep(experiment, read_plan(experiment))
    first, second, *rest = sweep.records
    both = [
        replace(first, parameters={**first.parameters, "optim.lr": 0.1}),
        replace(second, parameters={**first.parameters, "optim.lr": 0.2}),
    ]
    (found,) = heat_map.sweep_grids(replace(sweep, records=[*both, *rest]))
    assert found.cells[0, 0].runs[0].name == second.name and found.cells[0, 0].tried == 2
    assert (0, 1) not in found.cells and r"1 & 92.00 & -- & " in heat_map.as_latex(found)
    assert "has the best of them" in heat_map.grid_figure([found]).sentence


def test_latex_gets_no_command_from_a_file() -> None:
    found = heat_map.HeatMap(
        "a_b", "val_accuracy", "x", ("my_arg", "y%"), ["\\input{z}"], ["#1", "~^"], {}
    )
    text = heat_map.as_latex(found)
    assert r"\textbackslash{}input\{z\} & -- & -- \\" in text
    assert r"my\_arg & \#1 & \textasciitilde{}\textasciicircum{}" in text


@pytest.mark.slow
def test_stopped_trials_are_drawn_hollow_at_the_value_of_their_last_rung(tmp_path: Path) -> None:
    make_sweep(tmp_path / "e", 24)
    sweep = figures.read_sweep(tmp_path / "e", read_plan(tmp_path / "e"))
    stopped = {r.number: sweep.value(r.last) for r in sweep.records if r.status == "stopped"}
    assert len(stopped) > 8
    (lr,) = (p for p in figures.slices(sweep).panels if p.title == "optim.lr")
    drawn = {n: y for s in lr.series if s.hollow for n, y in zip(s.trials, s.y, strict=True)}
    assert drawn == pytest.approx(stopped)
    lines = [s for p in figures.parallel(sweep).panels for s in p.series if s.hollow]
    assert {n for s in lines for n in s.trials if n is not None} == set(stopped)
    points = [s for p in figures.contours(sweep).panels for s in p.series if s.hollow]
    with_both = [r.number for r in sweep.records if len(r.parameters) > 3 and r.number in stopped]
    assert sorted(n for s in points for n in s.trials if n is not None) == with_both
    titles = [p.title for p in figures.importance_section(sweep).panels]
    assert len(titles) == 4 and all("6 trials at epoch 2" in title for title in titles)


@pytest.mark.parametrize("status", ["running", "interrupted", "paused"])
def test_a_trial_between_rungs_is_drawn_at_the_last_one(tmp_path: Path, status: str) -> None:
    make_sweep(tmp_path / "e", 4)
    for number, end in ((0, 1), (1, 5)):
        folder = change(tmp_path / "e", number, status=status, reason=None)
        values = [0.1 * (e + 1) for e in range(end)]
        (folder / "metrics.jsonl").write_text("".join(line(e + 1, v) for e, v in enumerate(values)))
    sweep = figures.read_sweep(tmp_path / "e", read_plan(tmp_path / "e"))
    young, older = sweep.records[:2]
    assert np.isnan(sweep.shown(young)[1]) and sweep.shown(older) == (2, pytest.approx(20.0))


@pytest.mark.slow
def test_trials_of_an_earlier_space_are_in_the_table_and_in_no_model(tmp_path: Path) -> None:
    make_sweep(tmp_path / "e", 24)
    lacking, outside = "objective.tfkd_reg.temperature", {"objective.tfkd_reg.alpha": 3.0}
    for number in (0, 4):
        path = next(tmp_path.glob(f"e/trials/t{number:04d}-*/trial.json"))
        values = json.loads(path.read_text())["parameters"]
        some = {k: v for k, v in values.items() if k != lacking} if number else values | outside
        change(tmp_path / "e", number, parameters=some)
    change(tmp_path / "e", 1, objective="left_out")
    report(tmp_path / "e", tmp_path / "r.html")
    text = without_plotly(tmp_path / "r.html")
    assert text.count("<tr data-trials=") == 24 and "tfkd_reg, 4 trials" not in text
    sweep = figures.read_sweep(tmp_path / "e", read_plan(tmp_path / "e"))
    assert {r.number for r, _ in sweep.judged("tfkd_reg")[1]} == {8, 12, 16, 20}


def test_the_table_has_all_trials_best_first(sweep: Path, page: str) -> None:
    rows = re.findall(r'<tr data-trials="(\d+)"[^>]*>', page)
    records = read_records(sweep)
    assert sorted(map(int, rows)) == [r.number for r in records]
    assert page.index("<h2>All trials") < page.index("<h2>Best configurations")
    ranked = figures.read_sweep(sweep, read_plan(sweep)).ranked(records)
    assert list(map(int, rows[: len(ranked)])) == [r.number for r in ranked]


def test_the_colour_of_an_objective_depends_on_nothing_else() -> None:
    known = list(palette.OBJECTIVE_COLOURS)
    assert set(known) == NAMES - {"own"}
    own = ["margin", "focal"]
    for others in (known, known[::-1], [*own, *known]):
        colours = {name: palette.objective_colour(name, others) for name in others}
        assert len(set(colours.values())) == len(others)
        assert all(colours[name] == palette.OBJECTIVE_COLOURS[name] for name in known)


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


@pytest.mark.parametrize("changes", long_after(2, ODD.values()), ids=ODD)
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


@pytest.mark.slow
def test_wrong_input_is_refused_before_anything_is_written(sweep: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is a directory; name a file: -o report.html"):
        report(sweep, tmp_path)
    with pytest.raises(ConfigError, match=r"not a comparison of arms"):
        report(sweep, tmp_path / "r.html", comparisons=[sweep])
    with pytest.raises(ConfigError, match=r"no such directory"):
        report(sweep.parent / "gone", tmp_path / "r.html")
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
    assert {p.name for p in written[1:]} == {
        f"{name}.{kind}" for name in ("arms", "leads") for kind in ("svg", "pdf")
    }
    judged = json.loads((comparison / "confirm.json").read_text())
    for arm in judged["arms"]:
        mean = np.mean([100 * run["accuracy"] for run in arm["runs"]])
        assert f'<td class="short" data-label="test accuracy, %">{mean:.2f}</td>' in text


@pytest.mark.slow
def test_a_comparison_that_is_not_judged_says_so(comparison: Path, tmp_path: Path) -> None:
    shutil.copytree(comparison, tmp_path / "c")
    (tmp_path / "c" / "confirm.json").unlink()
    report(tmp_path / "c", tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text()
    assert (
        "Not judged yet" in text
        and "15 of 15 runs are trained. The test split has not been opened" in text
    )
    (tmp_path / "c" / "confirm.json").write_text('{"title": ')
    with pytest.raises(ConfigError, match=r"confirm.json:\n.*changed by hand or truncated"):
        report(tmp_path / "c", tmp_path / "r.html")


def test_no_curve_leaves_its_plot_at_the_top(tmp_path: Path) -> None:
    make_sweep(tmp_path / "e", 12)
    folder = min((tmp_path / "e/trials").iterdir())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines[1]["val_accuracy"] = 0.999  # a peak that its end has not
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    found = figures.curves(figures.read_sweep(tmp_path / "e", read_plan(tmp_path / "e")))
    drawn = [y for p in found.panels for s in p.series for y in s.y if y is not None]
    assert max(drawn) == pytest.approx(99.9)
    assert all(p.y.span is not None and p.y.span[1] > 99.9 for p in found.panels)
    assert "The axis begins where trials differ" in found.sentence


# --- figures and the browser


@pytest.mark.slow
def test_figures_are_also_written_as_svg(sweep: Path, tmp_path: Path) -> None:
    written = report(sweep, tmp_path / "r.html", figures=tmp_path / "figures")
    names = {"parallel", "slices", "contour", "importance", "curves", "pareto", "fidelity"}
    assert {p.stem for p in written[1:]} == names
    assert {p.suffix for p in written[1:]} == {".svg", ".pdf"}
    for path in (path for path in written if path.suffix == ".svg"):
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
