"""Time the views of 1,000 trials of 100 epochs: `python benchmarks/looking.py [TRIALS [EPOCHS]]`.

Generates the files of a sweep, TensorBoard events included, without training or Ray, and views it:
status, report, live view, and TensorBoard in headless Chromium until HParams has drawn its table.
Prints one figure per line.
"""

import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from test_browser import address, cells, look, serve, tick
from test_readers import make_sweep
from test_tensorboard import FakeTrial

from tfkd_ray.show.live import Progress
from tfkd_ray.show.report import report
from tfkd_ray.show.status import status
from tfkd_ray.show.tensorboard import TensorBoard
from tfkd_ray.store.experiment import read_records


@contextmanager
def timed(what: str) -> Iterator[None]:
    """Print the time of a block."""
    start = time.perf_counter()
    yield
    print(f"{what}: {time.perf_counter() - start:.2f} s", flush=True)


def write_events(experiment: Path, space: object) -> None:
    """Write the events of every trial with the sweep's callback, and print the time."""
    callback = TensorBoard(experiment / "tb", space)  # type: ignore[arg-type]
    callback.setup()
    reports, whole = [], []
    for record in read_records(experiment):
        began = time.perf_counter()
        epochs = record.config["epochs"]
        about = {"number": record.number, "name": record.name, "parameters": record.parameters, "epochs": epochs,
                 "directory": str(experiment.parent / "new" / record.name)}  # fmt: skip  # as if it began now
        trial = FakeTrial(record.name, {**record.config, "trial": about})
        callback.on_trial_start(0, [], trial)
        for metrics in record.metrics:
            trial.last_result = dict(metrics)
            start = time.perf_counter()
            callback.on_trial_result(0, [], trial, trial.last_result)
            reports.append(time.perf_counter() - start)
        if record.status == "failed":
            trial.last_result["failed"] = record.reason
        callback.on_trial_complete(0, [], trial)
        whole.append(time.perf_counter() - began)
    print(
        f"a report to TensorBoard, median of {len(reports):,}: {1000 * statistics.median(reports):.2f} ms"
    )
    print(
        f"a trial in TensorBoard, all its reports included, median: {1000 * statistics.median(whole):.0f} ms"
    )
    size = sum(p.stat().st_size for p in (experiment / "tb").rglob("*") if p.is_file())
    print(f"events: {size / 2**20:.0f} MiB")


def look_at_hparams(experiment: Path, trials: int) -> None:
    """Time TensorBoard in a browser until it shows its table, then one of failed trials."""
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    last = max(r.name for r in read_records(experiment))
    with timed("TensorBoard from its start until it lists the last trial"):
        server = serve(experiment)
        url = address(server, last, timeout_s=300)
    try:
        with sync_playwright() as playwright:
            page = playwright.chromium.launch(
                executable_path=chromium, args=["--no-sandbox"]
            ).new_page()
            page.set_default_timeout(120_000)
            steps: dict[str, Callable[[], object]] = {
                "HParams opened, until its table is drawn": lambda: (
                    look(page, url, "hparams"),
                    cells(page),
                ),
                "HParams, only successful trials": lambda: (
                    tick(page, "Failure"),
                    page.wait_for_selector(f"text=/matching session groups: (?!{trials}$)/"),
                ),
                "HParams, parallel coordinates drawn": lambda: (
                    page.locator("text=Parallel coordinates view").click(),
                    page.wait_for_selector(
                        "tf-hparams-parallel-coords-plot svg path", state="attached"
                    ),
                ),
            }
            for what, step in steps.items():
                with timed(what):
                    step()
    finally:
        server.terminate()
        server.wait(timeout=30)


def main(trials: int = 1000, epochs: int = 100) -> None:
    """Generate the sweep and time every view."""
    with tempfile.TemporaryDirectory() as folder:
        experiment = Path(folder) / "large"
        space = make_sweep(
            experiment, trials, epochs, search={"stopping": "none"}
        )  # every trial in full
        write_events(experiment, space)
        with timed("status"):
            status(experiment)
        page = Path(folder) / "report.html"
        with timed("report"):
            report(experiment, page)
        print(f"report: {page.stat().st_size / 1e6:.1f} MB")
        progress = Progress(experiment)
        progress.setup()
        times = []
        for _ in range(20):
            start = time.perf_counter()
            progress.lines(80, 24)
            times.append(time.perf_counter() - start)
        print(f"live view drawn, median of 20: {1000 * statistics.median(times):.1f} ms")
        look_at_hparams(experiment, trials)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
