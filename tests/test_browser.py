"""TensorBoard (sweep, comparison, both), report and optuna-dashboard in a real browser.

Screenshots are left in test-artifacts/."""

import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_readers import make_sweep as make_records
from test_report import make_grid
from test_search import run_sweep
from test_search import space as two_objectives
from test_tensorboard import FakeTrial

from tfkd_ray.learn.checkpoint import save_weights
from tfkd_ray.run.confirm import LOGITS, outcome
from tfkd_ray.run.searcher import OptunaSearcher
from tfkd_ray.show import follow
from tfkd_ray.show.follow import server_of
from tfkd_ray.show.python import followed_report
from tfkd_ray.show.report import report
from tfkd_ray.show.tensorboard import TensorBoard
from tfkd_ray.space.arms import build_arms, new_comparison, read_comparison
from tfkd_ray.space.space import build_space
from tfkd_ray.store.experiment import Record, read_records, write_experiment, write_record

ARTIFACTS = Path(__file__).parent.parent / "test-artifacts"
PHONE, DESK = 390, 1280
EPOCHS = 9
SPACE = {
    "objective": [
        {
            "name": "tfkd_reg",
            "alpha": {"low": 0.1, "high": 0.9},
            "temperature": {"low": 2, "high": 40, "log": True},
        },
        {"name": "lsr", "alpha": {"low": 0.02, "high": 0.4, "log": True}},
    ],
    "optim": {
        "lr": {"low": 0.01, "high": 1.0, "log": True},
        "weight_decay": {"low": 1e-5, "high": 1e-3, "log": True},
    },
    "epochs": EPOCHS,
    "search": {"baselines": False, "num_samples": 8},
}
COLUMNS = ["alpha", "lr", "objective", "temperature", "weight_decay"]
ENDS = {3: "stopped", 5: "failed", 6: "running"}
"""Trials that did not run to their end."""


def make_sweep(experiment: Path, trials: int = 8, seed: int = 0) -> dict[str, float]:
    """Write the events of some trials without Ray; return the last value of each."""
    space = build_space(SPACE)
    write_experiment(experiment, space.tree, ["tfkd", "tune", "browser.yaml"])
    callback = TensorBoard(experiment / "tb", space)
    callback.setup()
    g, values = np.random.default_rng(seed), {}
    for number in range(trials):
        branch = space.branches[number % 2]
        parameters = {
            p.name: float(np.exp(g.uniform(np.log(p.domain.low), np.log(p.domain.high))))
            for p in branch.parameters
        }
        name, end = f"t{number:04d}-{branch.objective}", ENDS.get(number, "done")
        about = {"number": number, "name": name, "parameters": parameters, "epochs": EPOCHS,
                 "directory": str(experiment / "trials" / name)}  # fmt: skip
        trial = FakeTrial(
            name, {**branch.config(parameters).model_dump(mode="json"), "trial": about}
        )
        callback.on_trial_start(0, [], trial)
        peak, last = (
            g.uniform(0.8, 0.95),
            {"done": EPOCHS, "stopped": 3, "failed": 2, "running": 5}[end],
        )
        for epoch in range(1, last + 1):
            accuracy = float(peak * (1 - np.exp(-epoch / 2)))
            trial.last_result = {
                "epoch": epoch, "val_accuracy": accuracy, "val_nll": 1 - accuracy, "val_ece": 0.05,
                "train_loss": 2 / epoch, "train_ce": 1.5 / epoch, "train_kd": 0.5 / epoch, "lr": 0.1,
                "train_kd_ratio": 0.3, "images_per_s": 900.0,
            }  # fmt: skip
            callback.on_trial_result(0, [], trial, trial.last_result)
        values[name] = trial.last_result["val_accuracy"]
        if end == "failed":
            trial.last_result["failed"] = "ArithmeticError: train_loss is nan"
        if end != "running":
            callback.on_trial_complete(0, [], trial)
    return values


def make_comparison(directory: Path) -> None:
    """Write a judged comparison of three arms with four seeds, with made-up logits."""
    arms = [{"name": name, "objective": name} for name in ("ce", "lsr", "tfkd_reg")]
    new_comparison(
        build_arms({"title": "Three arms", "arms": arms, "student": "mlp"}),
        range(1001, 1005),
        directory,
    )
    callback = TensorBoard(directory / "tb")
    g, labels = np.random.default_rng(0), np.arange(500) % 10
    for number, run in enumerate(read_comparison(directory).runs):
        folder, parameters = directory / "trials" / run.name, {"arm": run.arm, "seed": run.seed}
        config = run.config.model_dump(mode="json")
        about = {"number": number, "name": run.name, "arm": run.arm, "parameters": parameters, "epochs": 1,
                 "directory": str(folder)}  # fmt: skip
        trial = FakeTrial(run.name, {**config, "trial": about})
        callback.on_trial_start(0, [], trial)
        trial.last_result = {"epoch": 1, "train_loss": 0.5}
        callback.on_trial_result(0, [], trial, trial.last_result)
        callback.on_trial_complete(0, [], trial)
        write_record(
            Record(
                folder, number, run.name, config["objective"]["name"], "done", parameters, config
            )
        )
        right = g.random(500) < (0.94 if run.arm == "tfkd_reg" else 0.88) - 0.01 * labels
        logits = g.uniform(1, 8, (500, 1)) * np.eye(10)[np.where(right, labels, (labels + 1) % 10)]
        arrays = {
            "logits": torch.tensor(logits, dtype=torch.float32),
            "labels": torch.tensor(labels),
        }
        save_weights(folder / LOGITS, arrays, {"run": run.name})
    outcome(directory)


def serve(*experiments: Path) -> subprocess.Popen[str]:
    """Run `tfkd tensorboard` on these directories."""
    command = [
        sys.executable,
        "-m",
        "tfkd_ray",
        "tensorboard",
        *map(str, experiments),
        "--port",
        "0",
    ]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def address(server: subprocess.Popen[str], run: str, timeout_s: float = 30) -> str:
    """Return a server's address once it shows a run."""
    assert server.stderr is not None
    line = server.stderr.readline()
    assert line.startswith("TensorBoard: http://127.0.0.1:"), line + server.stderr.read()
    url = line.split()[1]
    until = time.monotonic() + timeout_s
    while run not in urllib.request.urlopen(f"{url}data/runs", timeout=10).read().decode():
        assert time.monotonic() < until, f"{url} does not show {run}"
        time.sleep(0.2)
    return url


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    chromium = (
        shutil.which("chromium")
        or shutil.which("chromium-browser")
        or shutil.which("google-chrome")
    )
    assert chromium, (
        "these tests look at TensorBoard in a real browser, and there is none: apt-get install chromium"
    )
    ARTIFACTS.mkdir(exist_ok=True)
    with sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-quic", "--disable-background-networking"]
        browser = playwright.chromium.launch(executable_path=chromium, args=flags)
        page = browser.new_page(viewport={"width": DESK, "height": 800})
        page.set_default_timeout(30_000)
        yield page
        browser.close()


@pytest.fixture(scope="module")
def boards(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """Yield addresses of TensorBoard on a sweep, on it and a comparison, and the sweep's values."""
    storage = tmp_path_factory.mktemp("storage")
    sweep, comparison = storage / "small sweep", storage / "vergleich-ü"
    values = make_sweep(sweep)
    make_comparison(comparison)
    large = [storage / "first-of-two", storage / "second-of-two"]
    for number, experiment in enumerate(large):
        make_sweep(experiment, trials=24, seed=number)
    one, both, two = serve(sweep), serve(sweep, comparison), serve(*large)
    yield {
        "sweep": address(one, "t0007-lsr"),
        "sweeps": address(two, "second-of-two/t0023-lsr"),
        "both": address(both, "arms/tfkd_reg"),
        "values": values,
    }
    for server in (one, both, two):
        server.send_signal(signal.SIGINT)
        server.communicate(timeout=60)
    assert (one.returncode, both.returncode, two.returncode) == (0, 0, 0)


def look(page: Any, url: str, tab: str) -> None:
    """Open a tab anew: TensorBoard does not follow a changed address by itself."""
    page.goto("about:blank")
    page.goto(f"{url}#{tab}")


def cells(page: Any) -> list[str]:
    """Return the cells of HParams' table by row, its head first, as they lie on the screen."""
    page.wait_for_selector("vaadin-grid-cell-content:has-text('t0000')")
    places = page.locator("vaadin-grid-cell-content").evaluate_all(PLACES)
    return [text.strip() for _, _, text in sorted(places)]


PLACES = """all => all.map(e => [e.getBoundingClientRect(), e.innerText]).filter(([b]) => b.width > 0)
  .map(([b, text]) => [Math.round((b.y + b.height / 2) / 8), b.x, text])"""
"""Where the cells are that are drawn, with their texts."""


pytestmark = pytest.mark.browser


def test_hparams_shows_settings_value_and_status_of_every_trial(
    browser: Any, boards: dict[str, Any]
) -> None:
    look(browser, boards["sweep"], "hparams")
    last = f"{list(boards['values'].values())[-1]:.5f}"
    browser.locator(f"vaadin-grid-cell-content:has-text('{last}')").first.wait_for()
    found = cells(browser)
    browser.screenshot(path=ARTIFACTS / "hparams-table.png")
    head = ["Trial ID", "Status", "Show Metrics", *COLUMNS, "val_accuracy"]
    assert found[: len(head)] == head
    ends = {"stopped": "stopped, 3/9", "failed": "failed, 2/9", "running": "running"}
    for number, (name, value) in enumerate(boards["values"].items()):
        row = found[found.index(name) :][: len(head)]
        assert row[1] == ends.get(ENDS.get(number, ""), "done, 9/9")
        assert float(row[-1]) == pytest.approx(value, abs=1e-5)
        if "lsr" in name:
            assert float(row[head.index("temperature")]) == 1
        assert all(row[3:]), row
    table = browser.locator("vaadin-grid-cell-content")
    for text in (*head, "t0001-lsr", "stopped, 3/9"):
        box = table.filter(has_text=re.compile(f"^\\s*{re.escape(text)}\\s*$")).first.bounding_box()
        assert box["x"] + box["width"] <= DESK + 1, f"{text} is not visible: {box}"
    assert browser.evaluate(CUT_NAMES) == []


CUT_NAMES = """(() => {
  const all = root => [...root.querySelectorAll('*')].flatMap(
    e => [e, ...(e.shadowRoot ? all(e.shadowRoot) : [])]);
  return all(document).filter(e => e.tagName === 'DIV' && /^\\s*(\\S+\\/)?t0\\d\\d\\d-/.test(e.textContent)
    && e.children.length === 0 && e.clientWidth > 0 && e.scrollWidth > e.clientWidth + 1).map(e => e.textContent);
})()"""
"""Names of trials of which a part is not drawn."""


def test_hparams_tells_failed_and_running_trials_from_others(
    browser: Any, boards: dict[str, Any]
) -> None:
    look(browser, boards["sweep"], "hparams")
    cells(browser)
    for status, only in (("Failure", "t0005-lsr"), ("Unknown", "t0006-tfkd_reg")):
        others = [s for s in ("Unknown", "Success", "Failure", "Running") if s != status]
        for other in others:
            tick(browser, other)
        browser.wait_for_selector("text=Number of matching session groups: 1")
        shown = browser.locator("vaadin-grid-cell-content:visible:has-text('t000')")
        shown.first.wait_for()
        assert shown.all_inner_texts() == [only]
        for other in others:
            tick(browser, other)
        browser.wait_for_selector("text=Number of matching session groups: 8")


LINES = "tf-hparams-parallel-coords-plot svg .foreground path"


def test_parallel_coordinates_open_with_a_line_for_every_trial(
    browser: Any, boards: dict[str, Any]
) -> None:
    for board, trials in (("sweep", 8), ("sweeps", 48)):
        look(browser, boards[board], "hparams")
        cells(browser)
        browser.locator("text=Parallel coordinates view").click()
        browser.locator(LINES).nth(trials - 1).wait_for(state="attached")
        browser.screenshot(path=ARTIFACTS / f"hparams-parallel-{board}.png")
        drawn = browser.locator(LINES).evaluate_all(
            "paths => paths.map(p => [p.getTotalLength(), getComputedStyle(p).stroke])"
        )
        assert len(drawn) == trials
        assert all(length > 400 and colour != "none" for length, colour in drawn)
        words = browser.locator("tf-hparams-parallel-coords-plot svg text").all_text_contents()
        assert {*COLUMNS, "val_accuracy"} <= {*words}
    browser.locator("text=Scatter plot matrix view").click()
    browser.locator("tf-hparams-scatter-plot-matrix-plot svg circle").first.wait_for(
        state="attached"
    )


def run_colours(page: Any) -> dict[str, str]:
    """Return the colour of each run that Time Series lists in its visible rows."""
    rows = page.locator("runs-data-table tb-data-table-content-row")
    found = rows.evaluate_all(
        """rows => rows.map(row => [row.innerText.trim(),
          getComputedStyle(row.querySelector('.run-color-swatch')).backgroundColor])"""
    )
    return dict(found)


def test_time_series_opens_with_the_value_and_runs_in_their_objectives_colours(
    browser: Any, boards: dict[str, Any]
) -> None:
    look(browser, boards["sweep"], "timeseries")
    runs = browser.locator("runs-data-table tb-data-table-content-row")
    runs.filter(has_text="t0007-lsr").wait_for()
    browser.locator("metrics-pinned-view card-view").first.wait_for()
    browser.wait_for_timeout(1000)
    browser.screenshot(path=ARTIFACTS / "time-series.png")
    pinned = browser.locator("metrics-pinned-view card-view").first.inner_text()
    assert "".join(pinned.split()).startswith("val/acc")
    colours = run_colours(browser)
    assert {*boards["values"]} <= {*colours} and "." not in colours
    of = {objective: {c for run, c in colours.items() if run.endswith(f"-{objective}")}
          for objective in ("tfkd_reg", "lsr")}  # fmt: skip
    assert len(of["tfkd_reg"]) == len(of["lsr"]) == 1 and of["tfkd_reg"] != of["lsr"]
    browser.locator("runs-data-table tb-filter-input input").press_sequentially("tfkd_reg")
    runs.filter(has_text="t0007-lsr").wait_for(state="detached")
    assert [name.strip() for name in runs.all_inner_texts()] == [
        n for n in boards["values"] if "tfkd_reg" in n
    ]


def test_several_sweeps_have_their_boxes_ticked_and_their_curves_drawn(
    browser: Any, boards: dict[str, Any]
) -> None:
    look(browser, boards["sweeps"], "scalars")
    boxes = browser.locator("tf-runs-selector paper-checkbox")
    boxes.nth(47).wait_for(state="attached")
    browser.locator("tf-line-chart-data-loader path.line").nth(40).wait_for(state="attached")
    browser.screenshot(path=ARTIFACTS / "two-sweeps-scalars.png")
    assert set(boxes.evaluate_all("boxes => boxes.map(box => box.checked)")) == {True}
    look(browser, boards["sweeps"], "hparams")
    cells(browser)
    browser.screenshot(path=ARTIFACTS / "two-sweeps-hparams.png")
    assert browser.evaluate(CUT_NAMES) == []


def test_text_says_how_a_trial_differs_and_how_to_run_it_again(
    browser: Any, boards: dict[str, Any]
) -> None:
    look(browser, boards["sweep"], "text")
    browser.locator("tf-markdown-view:has-text('tfkd tune browser.yaml') table").first.wait_for()
    change = browser.locator("tf-markdown-view:has-text('plain training')").first
    change.wait_for()
    browser.screenshot(path=ARTIFACTS / "text.png")
    assert "objective.temperature" in change.locator("table").inner_text()
    browser.locator("tf-text-dashboard input").first.fill("t0005")  # runs
    browser.locator("tf-markdown-view:has-text('after 2 of 9 epochs: failed')").first.wait_for()
    again = browser.locator(
        "tf-markdown-view:has-text('tfkd train t0005-lsr.yaml') pre"
    ).first.inner_text()
    assert "name: lsr" in again


def test_images_show_the_virtual_teacher_beside_label_smoothing(
    browser: Any, boards: dict[str, Any]
) -> None:
    look(browser, boards["sweep"], "images")
    wait_for_images(browser, 6)
    browser.screenshot(path=ARTIFACTS / "images-sweep.png")


def test_a_sweep_and_a_comparison_stand_side_by_side(browser: Any, boards: dict[str, Any]) -> None:
    look(browser, boards["both"], "hparams")
    found = cells(browser)
    browser.screenshot(path=ARTIFACTS / "side-by-side-hparams.png")
    # columns that either lacks are not ticked: a comparison has no alpha, a sweep no arm
    assert found[:6] == ["Trial ID", "Status", "Show Metrics", "objective", "val_accuracy", "test metric"]  # fmt: skip
    assert {"small sweep/t0000-tfkd_reg", "tfkd_reg (vergleich-ü)"} <= set(found)

    look(browser, boards["both"], "custom_scalars")
    margins = browser.locator("tf-custom-scalar-margin-chart-card")
    margins.locator("text=Matches (3)").wait_for()
    margins.scroll_into_view_if_needed()
    wait_for_lines(browser, margins)
    browser.screenshot(path=ARTIFACTS / "side-by-side-margins.png")

    look(browser, boards["both"], "images")
    wait_for_images(browser, 5)
    browser.screenshot(path=ARTIFACTS / "images-comparison.png")
    images = browser.locator("tf-image-loader")
    assert images.filter(has_text="tag: test/reliability").count() == 3
    assert images.filter(has_text="tag: test/per_class").count() == 2


def tick(page: Any, label: str) -> None:
    """Select or deselect an entry in HParams' left column."""
    page.locator(f"tf-hparams-query-pane paper-checkbox:text-is('{label}')").click()


def wait_for_lines(page: Any, cards: Any) -> None:
    """Wait until the first chart has drawn lines."""
    cards.first.locator("path.line").first.wait_for(state="attached")


def wait_for_images(page: Any, number: int) -> None:
    """Wait until so many images are loaded."""
    page.wait_for_function(
        """number => {
          const all = node => [...node.querySelectorAll('*')].flatMap(n => [n, ...(n.shadowRoot ? all(n.shadowRoot) : [])]);
          return all(document).filter(n => n.tagName === 'IMG' && n.complete && n.naturalWidth === 360).length >= number;
        }""",
        arg=number,
    )


CUT = """[...document.querySelectorAll('body *')].filter(element => {
  const hidden = element.closest('.controls[hidden], #marked[hidden], noscript, script, details:not([open])');
  const box = element.getBoundingClientRect();
  return !hidden && box.width > 0 && !element.closest('svg') && box.right > innerWidth + 1;
}).map(element => element.outerHTML.slice(0, 80))"""
"""Elements of which a part lies beyond the right end of the page."""


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return reports on a halved sweep of four objectives and on a grid of T and alpha."""
    folder = tmp_path_factory.mktemp("reports")
    make_records(folder / "sweep", 24)
    make_grid(folder / "grid")
    for name in ("sweep", "grid"):
        report(folder / name, folder / f"{name}.html")
    return {name: folder / f"{name}.html" for name in ("sweep", "grid")}


@pytest.fixture
def opened(browser: Any, reports: dict[str, Path]) -> Iterator[Any]:
    """Yield a function that opens a report in a page of its own; errors in the page fail the test."""
    contexts, errors = [], []

    def open_report(name: str, width: int = DESK, scheme: str = "light") -> Any:
        how = {"viewport": {"width": width, "height": 900}, "color_scheme": scheme}
        contexts.append(browser.context.browser.new_context(**how))
        page = contexts[-1].new_page()
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text))
        page.goto(reports[name].as_uri())
        page.locator("html[data-drawn]").wait_for()
        return page

    yield open_report
    for context in contexts:
        context.close()
    assert errors == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [PHONE, DESK])
@pytest.mark.parametrize("name", ["sweep", "grid"])
def test_nothing_of_a_report_is_cut(opened: Any, name: str, width: int, scheme: str) -> None:
    page = opened(name, width, scheme)
    page.screenshot(path=ARTIFACTS / f"report-{name}-{width}-{scheme}.png", full_page=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(CUT) == []
    clipped = page.evaluate("""[...document.querySelectorAll('.plot text')].filter(text => {
      const [box, plot] = [text.getBoundingClientRect(), text.closest('.plot').getBoundingClientRect()];
      return box.width > 0 && (box.right > plot.right + 1 || box.left < plot.left - 1);
    }).map(text => text.textContent)""")
    assert clipped == []


def test_a_report_is_dark_where_the_reader_wants_it_and_follows_a_change(opened: Any) -> None:
    page = opened("sweep", scheme="dark")
    ink = "getComputedStyle(document.body).color"
    axis = "getComputedStyle(document.querySelector('.plot .xtitle')).fill"
    dot = "getComputedStyle(document.querySelector('.dot')).color"
    dark = [page.evaluate(code) for code in (ink, axis, dot)]
    page.emulate_media(color_scheme="light")
    until(page, f"{axis} === 'rgb(34, 34, 34)'")
    light = [page.evaluate(code) for code in (ink, axis, dot)]
    assert dark[:2] == ["rgb(228, 228, 228)", "rgb(232, 232, 232)"]
    assert light[:2] == ["rgb(27, 27, 27)", "rgb(34, 34, 34)"]
    assert page.evaluate("getComputedStyle(document.documentElement).backgroundColor") == (
        "rgb(255, 255, 255)"
    )


def until(page: Any, code: str) -> None:
    """Wait until JavaScript is true; the page's policy forbids Playwright's own way."""
    end = time.monotonic() + 20
    while not page.evaluate(code):
        assert time.monotonic() < end, code
        time.sleep(0.05)


def numbers(page: Any) -> list[int]:
    """Return the trials that the table shows, in its order."""
    shown = "[...document.querySelectorAll('tr[data-trials]')].filter(row => !row.hidden)"
    return list(map(int, page.evaluate(f"{shown}.map(row => row.dataset.trials)")))


def test_the_table_of_trials_is_sorted_and_filtered(opened: Any, reports: dict[str, Path]) -> None:
    page = opened("sweep")
    records = {r.number: r for r in read_records(reports["sweep"].with_suffix(""))}
    lr = {n: r.parameters["optim.lr"] for n, r in records.items()}
    assert sorted(numbers(page)) == sorted(records)
    page.locator("table.trials th button", has_text=re.compile("^lr$")).click()
    assert numbers(page) == sorted(lr, key=lr.__getitem__)
    page.locator("table.trials th button", has_text=re.compile("^lr$")).click()
    assert numbers(page) == sorted(lr, key=lr.__getitem__, reverse=True)
    page.fill("#filter", "lr<0.1 objective=lsr")
    expected = {n for n, r in records.items() if r.objective == "lsr" and lr[n] < 0.1}
    assert set(numbers(page)) == expected and 0 < len(expected) < 6
    assert page.inner_text("#left") == f"{len(expected)} of 24 trials"
    page.fill("#filter", "tfkd_reg stopped")
    expected = {n for n, r in records.items() if (r.objective, r.status) == ("tfkd_reg", "stopped")}
    assert set(numbers(page)) == expected
    page.fill("#filter", "")
    page.select_option("#order", label="trial, descending")
    assert numbers(page) == sorted(records, reverse=True)


MARKS = """[...document.querySelectorAll('.plot')].filter(p => p.places.has(TRIAL))
  .map(plot => plot.marks.querySelectorAll('path').length)"""


def test_a_trial_that_is_chosen_in_one_view_is_marked_in_all(opened: Any) -> None:
    page = opened("sweep")
    row = page.locator("tr[data-trials]").first
    trial, name = row.get_attribute("data-trials"), row.locator("td").first.inner_text()
    marks = MARKS.replace("TRIAL", f"'{trial}'")
    row.hover()
    found = page.evaluate(marks)
    assert len(found) > 5 and set(found) == {1}
    page.mouse.move(0, 0)
    assert set(page.evaluate(marks)) == {0}
    row.click()
    page.mouse.move(0, 0)
    assert set(page.evaluate(marks)) == {1} and name in page.inner_text("#marked")
    page.check("#only")
    assert numbers(page) == [int(trial)]
    page.uncheck("#only")
    page.click("#marked button")
    page.mouse.move(0, 0)
    assert set(page.evaluate(marks)) == {0} and not page.is_visible("#marked")


def test_points_and_boxes_of_points_choose_their_trials(opened: Any) -> None:
    page = opened("sweep")
    slices = page.locator("figure", has=page.locator("h3", has_text="Slices"))
    plot = slices.locator(".plot").last
    plot.scroll_into_view_if_needed()
    point = plot.locator(".points path").first.bounding_box()
    x, y = point["x"] + point["width"] / 2, point["y"] + point["height"] / 2
    page.mouse.move(x, y)
    plot.locator(".hoverlayer text").first.wait_for()
    hover = plot.locator(".hoverlayer").text_content()
    assert re.search(r"t00\d\d-\w+: .*after epoch \d+", hover) and "optim.lr" in hover
    page.mouse.click(x, y)
    until(page, "document.documentElement.dataset.chosen")
    (chosen,) = page.evaluate("document.documentElement.dataset.chosen").split()
    page.mouse.move(0, 0)
    assert set(page.evaluate(MARKS.replace("TRIAL", f"'{chosen}'"))) == {1}
    assert page.locator("tr.chosen").get_attribute("data-trials") == chosen
    area = plot.locator(".nsewdrag").bounding_box()
    page.mouse.move(area["x"] + 2, area["y"] + 2)
    page.mouse.down()
    page.mouse.move(area["x"] + area["width"] - 2, area["y"] + area["height"] - 2, steps=4)
    page.mouse.up()
    until(page, "document.querySelectorAll('tr.chosen').length === 24")
    page.wait_for_timeout(500)  # the box is taken away, and the marks stay
    assert page.locator("tr.chosen").count() == 24
    page.mouse.dblclick(area["x"] + 5, area["y"] + 5)
    until(page, "document.querySelectorAll('tr.chosen').length === 0")


def test_a_cell_of_a_heat_map_chooses_its_trial(opened: Any) -> None:
    page = opened("grid", PHONE)
    cell = page.locator("table.heat td", has_text="95.00")
    cell.click()
    assert page.locator("tr.chosen").get_attribute("data-trials") == "7"
    assert page.locator("table.heat td.chosen").inner_text() == "95.00"


@pytest.fixture
def followed(browser: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Yield a page that follows a sweep of 12 trials, of which the other 12 come later, and a function for that."""
    monkeypatch.setattr(follow, "RENEW_S", 0.2)
    monkeypatch.setattr(follow, "SHARE", 1.0)
    experiment, later = tmp_path / "e", tmp_path / "later"
    make_records(experiment, 24)
    later.mkdir()
    alive = {"now": True}
    for module in ("tfkd_ray.show.status", "tfkd_ray.show.follow"):
        monkeypatch.setattr(f"{module}.is_running", lambda experiment: alive["now"])
    for folder in sorted((experiment / "trials").iterdir())[12:]:
        folder.rename(later / folder.name)

    def go_on() -> None:
        for folder in later.iterdir():
            folder.rename(experiment / "trials" / folder.name)
            (experiment / "trials" / folder.name / "metrics.jsonl").touch()
        alive["now"] = False

    errors: list[str] = []
    context = browser.context.browser.new_context(viewport={"width": DESK, "height": 900})
    page = context.new_page()
    page.on("pageerror", lambda error: errors.append(str(error)))
    with server_of(followed_report(experiment), 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        page.goto(f"http://127.0.0.1:{server.server_address[1]}/")
        page.locator("html[data-drawn]").wait_for()
        yield page, go_on, server
        context.close()
        server.shutdown()
        thread.join()
    assert errors == []


def test_a_followed_report_is_renewed_in_place(followed: Any) -> None:
    page, go_on, _ = followed
    until(page, "document.getElementById('live').textContent.includes('(as of ')")
    assert page.inner_text("#live").startswith("Live: the sweep runs")
    page.fill("#filter", "tfkd_reg")
    page.locator("table.trials th button", has_text=re.compile("^lr$")).click()
    before = numbers(page)
    page.locator("tr[data-trials]:not([hidden])").first.click()
    (chosen,) = page.evaluate("document.documentElement.dataset.chosen").split()
    page.evaluate("""() => {
      window.plot = [...document.querySelectorAll('.plot')].find(p => p.dataset.key.startsWith('slices'));
      window.table = document.querySelector('.wide:has(.trials)');
      Plotly.relayout(plot, {'yaxis.range[0]': 90, 'yaxis.range[1]': 94});
      document.querySelector('details').open = true;
      [...document.querySelectorAll('h2')].find(h => h.textContent === 'Training').scrollIntoView();
    }""")
    place = "[...document.querySelectorAll('h2')].find(h => h.textContent === 'Training').getBoundingClientRect().top"
    at = page.evaluate(place)
    assert abs(at) < 5
    page.focus("#filter", timeout=5000)
    page.evaluate(
        "[...document.querySelectorAll('h2')].find(h => h.textContent === 'Training').scrollIntoView()"
    )
    go_on()
    until(page, "document.getElementById('left').textContent.endsWith('of 24 trials')")
    page.screenshot(path=ARTIFACTS / "report-followed.png")
    assert abs(page.evaluate(place) - at) < 5
    assert page.input_value("#filter") == "tfkd_reg" and len(numbers(page)) > len(before)
    assert page.evaluate("document.activeElement.id") == "filter"
    lr = page.evaluate("""[...document.querySelectorAll('tr[data-trials]:not([hidden])')].map(row =>
      Number(row.cells[keys.indexOf('lr')].dataset.value))""")
    assert lr == sorted(lr)
    assert page.locator("tr.chosen").get_attribute("data-trials") == chosen
    assert page.evaluate("plot.isConnected && table.isConnected")
    assert page.evaluate("plot.layout.yaxis.range") == [90, 94]
    assert page.evaluate("document.querySelector('details').open")
    marks = page.evaluate(MARKS.replace("TRIAL", f"'{chosen}'"))
    assert len(marks) > 5 and set(marks) == {1}
    assert "The sweep has ended: this is its final report" in page.inner_text("#live")


def test_a_followed_report_says_that_nobody_answers_and_goes_on(followed: Any) -> None:
    page, _, server = followed
    until(page, "document.getElementById('live').textContent.includes('(as of ')")
    answer = server.RequestHandlerClass.do_GET
    server.RequestHandlerClass.do_GET = lambda self: setattr(self, "close_connection", True)
    try:
        until(page, "document.getElementById('live').classList.contains('lost')")
        assert "tfkd report has not answered since" in page.inner_text("#live")
    finally:
        server.RequestHandlerClass.do_GET = answer
    until(page, "!document.getElementById('live').classList.contains('lost')")


RUNNING = """
student: {name: mlp, hidden: [16]}
data: digits
objective: [ce, {name: lsr, alpha: {low: 0.02, high: 0.4}}]
optim: {lr: {low: 0.01, high: 0.5, log: true}}
epochs: 9
search: {num_samples: 16, max_concurrent: 1}
"""


@pytest.mark.ray
def test_a_report_follows_a_running_sweep_to_its_end(browser: Any, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(RUNNING)
    tfkd = [sys.executable, "-m", "tfkd_ray"]
    log = (tmp_path / "log").open("w")
    how = {"cwd": tmp_path, "text": True}
    sweep = subprocess.Popen([*tfkd, "tune", "mine.yaml", "--name", "e"], stdout=log, stderr=log, **how)  # fmt: skip
    try:
        first = tmp_path / "tfkd_results" / "e" / "trials"
        end = time.monotonic() + 300
        while not list(first.glob("*/metrics.jsonl")):
            assert sweep.poll() is None and time.monotonic() < end, Path(log.name).read_text()
            time.sleep(0.2)
        served = subprocess.Popen([*tfkd, "report", "e", "--follow", "--port", "0"], stderr=subprocess.PIPE, **how)  # fmt: skip
        assert served.stderr is not None
        line = served.stderr.readline()
        assert line.startswith("report: http://127.0.0.1:"), line + served.stderr.read()
        page = browser.context.browser.new_context(viewport={"width": DESK, "height": 900}).new_page()  # fmt: skip
        page.set_default_timeout(120_000)
        page.goto(line.split()[1])
        page.locator("html[data-drawn]").wait_for()
        started = int(page.inner_text("#left").split()[2]) if page.query_selector("#left") else 0
        page.screenshot(path=ARTIFACTS / "report-running.png", full_page=True)
        end = time.monotonic() + 300
        while "The sweep has ended" not in page.inner_text("#live"):
            assert time.monotonic() < end, page.inner_text("#live")
            time.sleep(0.5)
        assert started < 16 and page.inner_text("#left") == "16 of 16 trials"
        page.screenshot(path=ARTIFACTS / "report-ended.png", full_page=True)
        page.context.close()
        served.send_signal(signal.SIGINT)
        served.communicate(timeout=30)
        assert served.returncode == 0
    finally:
        sweep.terminate()
        sweep.wait(60)
        log.close()


def test_optuna_dashboard_shows_the_studies_of_a_sweep(browser: Any, tmp_path: Path) -> None:
    run_sweep(OptunaSearcher(two_objectives(), tmp_path / "study.journal"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        Path(sys.executable).with_name("optuna-dashboard"),
        tmp_path / "study.journal",
        "--port",
        str(port),
    ]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            until = time.monotonic() + 60
            while True:
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/api/studies", timeout=10)
                    break
                except OSError:
                    assert time.monotonic() < until, "optuna-dashboard does not answer"
                    time.sleep(0.2)
            browser.goto(f"http://127.0.0.1:{port}/dashboard")
            browser.locator("text=tfkd/lsr").first.wait_for()
            browser.locator("text=tfkd/ce").first.click()
            browser.locator(".js-plotly-plot .main-svg").first.wait_for(state="attached")
            browser.locator(".js-plotly-plot .points path").first.wait_for(state="attached")
            browser.screenshot(path=ARTIFACTS / "optuna-dashboard.png")
        finally:
            server.terminate()
