"""TensorBoard (sweep, comparison, both), report and optuna-dashboard in a real browser.

Screenshots are left in test-artifacts/."""

import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_readers import make_sweep as make_records
from test_search import run_sweep
from test_search import space as two_objectives
from test_tensorboard import FakeTrial

from tfkd_ray.learn.checkpoint import save_weights
from tfkd_ray.run.confirm import LOGITS, outcome
from tfkd_ray.run.searcher import OptunaSearcher
from tfkd_ray.show.report import report
from tfkd_ray.show.tensorboard import TensorBoard
from tfkd_ray.space.arms import build_arms, new_comparison, read_comparison
from tfkd_ray.space.space import build_space
from tfkd_ray.store.experiment import Record, write_experiment, write_record

ARTIFACTS = Path(__file__).parent.parent / "test-artifacts"
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
COLUMNS = ["objective", "lr", "lsr.alpha", "tfkd_reg.alpha", "tfkd_reg.temperature", "weight_decay"]
ENDS = {3: "stopped", 5: "failed", 6: "running"}
"""Trials that did not run to their end."""


def make_sweep(experiment: Path) -> dict[str, float]:
    """Write the events of eight trials without Ray; return the last value of each."""
    space = build_space(SPACE)
    write_experiment(experiment, space.tree, ["tfkd", "tune", "browser.yaml"])
    callback = TensorBoard(experiment / "tb", space)
    callback.setup()
    g, values = np.random.default_rng(0), {}
    for number in range(8):
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
        page = browser.new_page(viewport={"width": 1500, "height": 1000})
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
    one, both = serve(sweep), serve(sweep, comparison)
    yield {
        "sweep": address(one, "t0007-lsr"),
        "both": address(both, "arms/tfkd_reg"),
        "values": values,
    }
    for server in (one, both):
        server.send_signal(signal.SIGINT)
        server.communicate(timeout=20)
    assert (one.returncode, both.returncode) == (0, 0)


def look(page: Any, url: str, tab: str) -> None:
    """Open a tab anew: TensorBoard does not follow a changed address by itself."""
    page.goto("about:blank")
    page.goto(f"{url}#{tab}")


def cells(page: Any) -> list[str]:
    """Return the cells of HParams' table by row, its head first."""
    page.wait_for_selector("vaadin-grid-cell-content:has-text('t0000')")
    return [text.strip() for text in page.locator("vaadin-grid-cell-content").all_inner_texts()]


pytestmark = pytest.mark.browser


def test_hparams_shows_every_searched_parameter_and_the_value(
    browser: Any, boards: dict[str, Any]
) -> None:
    look(browser, boards["sweep"], "hparams")
    found = cells(browser)
    assert found[:8] == [
        "Trial ID",
        "Show Metrics",
        *sorted(COLUMNS)[:5],
        "val_accuracy",
    ]  # five are selected at first
    for name, value in boards["values"].items():
        row = found[found.index(f"{name} (small sweep)") :]
        assert float(row[7]) == pytest.approx(value, abs=1e-5), row[:8]
    tick(browser, "weight_decay")
    browser.wait_for_selector("vaadin-grid-cell-content:has-text('weight_decay')")
    browser.screenshot(path=ARTIFACTS / "hparams-table.png")
    assert {*COLUMNS} <= set(cells(browser))


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
        shown = browser.locator("vaadin-grid-cell-content:visible:has-text('(small sweep)')")
        shown.first.wait_for()
        browser.screenshot(path=ARTIFACTS / f"hparams-{status.lower()}.png")
        assert shown.all_inner_texts() == [f"{only} (small sweep)"]
        for other in others:
            tick(browser, other)
        browser.wait_for_selector("text=Number of matching session groups: 8")


def test_parallel_coordinates_draws_the_trials_that_have_every_ticked_column(
    browser: Any, boards: dict[str, Any]
) -> None:
    look(browser, boards["sweep"], "hparams")
    cells(browser)
    for column in ("lsr.alpha", "tfkd_reg.alpha", "tfkd_reg.temperature", "epochs"):
        tick(browser, column)
    browser.locator("text=Parallel coordinates view").click()
    browser.locator("paper-radio-button:has-text('Logarithmic')").first.click()
    lines = "tf-hparams-parallel-coords-plot svg path[stroke]:not([stroke='currentColor'])"
    browser.locator(lines).nth(7).wait_for(state="attached")
    browser.screenshot(path=ARTIFACTS / "hparams-parallel.png")
    assert browser.locator(lines).count() == 8
    browser.locator("text=Scatter plot matrix view").click()
    browser.locator("tf-hparams-scatter-plot-matrix-plot svg circle").first.wait_for(
        state="attached"
    )


def test_time_series_lists_readable_runs_and_filters_them(
    browser: Any, boards: dict[str, Any]
) -> None:
    look(browser, boards["sweep"], "timeseries")
    runs = browser.locator("runs-data-table tb-data-table-content-row")
    runs.filter(has_text="t0007-lsr").wait_for()
    assert {*boards["values"]} <= {name.strip() for name in runs.all_inner_texts()}
    browser.locator("runs-data-table tb-filter-input input").press_sequentially("tfkd_reg")
    runs.filter(has_text="t0007-lsr").wait_for(state="detached")
    browser.locator("card-view svg path, card-view canvas").first.wait_for(state="attached")
    browser.locator("text=hp/value").first.wait_for()
    browser.screenshot(path=ARTIFACTS / "time-series.png")
    assert [name.strip() for name in runs.all_inner_texts()] == [
        n for n in boards["values"] if "tfkd_reg" in n
    ]


def test_custom_scalars_have_a_chart_for_each_objective(
    browser: Any, boards: dict[str, Any]
) -> None:
    look(browser, boards["sweep"], "custom_scalars")
    cards = browser.locator("tf-custom-scalar-multi-line-chart-card")
    cards.nth(3).locator("text=Matches").wait_for()
    wait_for_lines(browser, cards)
    browser.screenshot(path=ARTIFACTS / "custom-scalars.png")
    assert cards.filter(has_text="Matches (4)").count() == 2
    assert cards.filter(has_text="parts of the loss").filter(has_text="Matches (16)").count() == 1


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
    assert {"arm", "lr", "lsr.alpha", "objective"} <= set(found)
    assert {"t0000-tfkd_reg (small sweep)", "tfkd_reg (vergleich-ü)"} <= set(found)

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


def test_the_report_fits_a_phone_and_a_desk(browser: Any, tmp_path: Path) -> None:
    make_records(tmp_path / "sweep", 48)
    report(tmp_path / "sweep", tmp_path / "report.html")
    desk = browser.viewport_size
    for name, width in (("phone", 390), ("desk", desk["width"])):
        browser.set_viewport_size({"width": width, "height": desk["height"]})
        browser.goto((tmp_path / "report.html").as_uri())
        browser.locator("html[data-drawn]").wait_for()
        browser.screenshot(path=ARTIFACTS / f"report-{name}.png")
        assert (
            browser.evaluate("document.documentElement.scrollWidth") <= width
        )  # no horizontal scrolling
        wide = "[...document.querySelectorAll('.plot .main-svg')].map(p => p.getBoundingClientRect().right)"
        assert max(browser.evaluate(wide)) <= width
    browser.set_viewport_size(desk)


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
