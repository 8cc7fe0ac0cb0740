"""Rewrites the outputs that README, docs and the notebook show, from runs: `make docs-outputs`.

Above a block of commands stands what of the last command's output it shows:

    <!-- shown: start..objective tfkd_reg: | best.. | end -->

`A..B` is from the line that begins with A to the next one that begins with B, `A..` to the end of
its paragraph, and `A` one line; `start` and `end` are the first and the last line. Without parts,
everything is shown. `...` stands for lines that are left out.

On such a page, commands in blocks of `sh` run, too, in order and in one folder. A block whose first
line is a comment with a file's name is that file.

`--check` compares instead, as a reader would: words and structure exactly, metrics within
`TOLERANCE`, signs exactly, and times, places and rates not at all.

Runs are exact: one trial at a time on one CPU, float32, and the instructions that every processor of
the last ten years has.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
SHOWN = "<!-- shown:"
BLOCK = re.compile(r"(?:<!-- shown: ?([^\n]*?) ?-->\n)?```(sh|console)\n(.*?)```", re.S)
FILE = re.compile(r"```(?:python|yaml)\n(# (\S+\.(?:py|yaml))\n.*?)```", re.S)
NOTEBOOK = ROOT / "examples/tune_digits.ipynb"
PICTURES = {"README.md": {"parallel.svg": ROOT / "docs/images/digits.svg"}}
"""Of a page, the figures of its newest experiment's report and where they are kept."""
SCREENS = {"README.md": ROOT / "docs/images/hparams.png"}
"""Of a page, where the parallel coordinates of its newest experiment are kept, as Chromium shows them."""
EXACT = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "MKL_CBWR": "AVX2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "COLUMNS": "80",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",
}
"""The environment of all runs."""
LIMIT_S = 3600
"""Longest time of one command."""
TOLERANCE = 0.02
"""Largest difference of a metric, as a fraction; of a percentage, times 100."""

MASKED = (
    r"\d+(?:\.\d+)? (?:h|min|s|ms)\b(?: \d+ (?:min|s)\b)*",  # times
    r"\d+(?::\d\d)+",
    r"\d{4}-\d\d-\d\d(?:[ T]\d\d:\d\d(?::\d\d)?)?",
    r"[\d.]+ [CG]PU-hours",
    r"[\d.,]+ (?:epochs|images|trials)(?:/s| a second)",  # rates
    r"(?:/[\w.-]+){2,}",  # places
    r"about [\d,]+ seeds",  # as uncertain as the lead that they would show
)
LIVE_COUNT = re.compile(r"\d+ of \d+ trials, \d+ running")
NUMBER = re.compile(r"([-+]?)(\d+(?:\.(\d+))?(?:e-?\d+)?)")


def pages() -> list[Path]:
    """Return the pages that show outputs, and the notebook."""
    every = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    return [*(page for page in every if SHOWN in page.read_text()), NOTEBOOK]


def commands_of(block: str) -> list[str]:
    """Return the commands of a block, without their comments."""
    lines = [line.partition("  #")[0].strip() for line in block.splitlines()]
    return [line for line in lines if line.startswith(("$ ", "tfkd ", "python "))]


def fresh_text(page: Path, folder: Path) -> str:
    """Return the text of a page with the outputs of its commands, run in a folder."""
    if page.suffix == ".ipynb":
        return fresh_notebook(page, folder)
    text = page.read_text()
    for code, name in FILE.findall(text):
        (folder / name).write_text(code)

    def rewritten(match: re.Match[str]) -> str:
        parts, language, block = match.groups()
        if parts is None and language == "console":  # shown only
            return match[0]
        output: list[str] = []
        for command in commands_of(block):
            if not command.startswith("tfkd tensorboard"):  # which serves until it is stopped
                output = output_of(command.removeprefix("$ "), folder)
        if parts is None:
            return match[0]
        shown = [line for line in block.splitlines() if line.startswith("$ ")]
        return match[0].replace(block, "\n".join([*shown, *chosen(output, parts), ""]))

    return BLOCK.sub(rewritten, text)


def fresh_notebook(page: Path, folder: Path) -> str:
    """Return a notebook with the outputs of its cells, without warnings of missing widgets."""
    import nbclient
    import nbformat

    print(page.name, file=sys.stderr, flush=True)
    book = nbformat.read(page, 4)
    where = {"metadata": {"path": str(folder)}}
    client = nbclient.NotebookClient(book, timeout=LIMIT_S, kernel_name="python3", resources=where)
    client.execute()
    for cell in book.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if not wants_widgets(output)]
    return str(nbformat.writes(book)) + "\n"


def wants_widgets(output: Mapping[str, Any]) -> bool:
    """Return whether an output only warns that Jupyter's widgets are missing, which nothing needs."""
    lines = str(output.get("text", "")).splitlines()
    return output.get("name") == "stderr" and all(
        "ipywidgets" in line or "tqdm" in line for line in lines
    )


def texts_of(notebook: str) -> list[str]:
    """Return the code of a notebook's cells, and what they print, line by line.

    Of a live view, which shows times, it is the count of trials.
    """
    lines = []
    for cell in json.loads(notebook)["cells"]:
        lines += "".join(cell["source"]).splitlines()
        for output in cell.get("outputs", []):
            shown = output.get("text") or output.get("data", {}).get("text/plain", [])
            text = "".join(shown)
            lines += LIVE_COUNT.findall(text)[:1] or text.splitlines()
    return lines


def output_of(command: str, folder: Path) -> list[str]:
    """Return the lines that a command prints, on both streams; end if it fails."""
    print(f"$ {command}", file=sys.stderr, flush=True)
    run = subprocess.run(
        command, shell=True, cwd=folder, text=True, timeout=LIMIT_S,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    if run.returncode:
        raise SystemExit(f"{command}: exit code {run.returncode}\n{run.stdout}")
    check_precision(folder)
    return run.stdout.rstrip().splitlines()


def check_precision(folder: Path) -> None:
    """End if a sweep ran in another precision than float32, which has other numbers elsewhere."""
    for record in folder.glob("tfkd_results/*/experiment.yaml"):
        if "precision: bf16" in record.read_text():
            raise SystemExit(f"{record}: ran in bf16; set precision: fp32 in its space")


def chosen(output: Sequence[str], parts: str) -> list[str]:
    """Return the lines of an output that a block shows, with `...` for the others."""
    lines: list[str] = []
    end = 0
    for part in parts.split(" | ") if parts else ["start..end"]:
        first, dots, last = part.partition("..")
        begin = place(output, first, end)
        if begin > end:
            lines.append("...")
        end = end_of(output, begin, last if dots else first)
        lines += output[begin:end]
    return lines if end >= len(output) else [*lines, "..."]


def end_of(output: Sequence[str], begin: int, last: str) -> int:
    """Return the number after the line that ends a part; without `last`, its paragraph ends it."""
    if last:
        return place(output, last, begin) + 1
    empty = (number for number in range(begin, len(output)) if not output[number].strip())
    return next(empty, len(output))


def place(output: Sequence[str], beginning: str, after: int) -> int:
    """Return the number of the first line from `after` on that begins so."""
    if beginning in ("start", "end"):
        return 0 if beginning == "start" else len(output) - 1
    for number in range(after, len(output)):
        if output[number].strip().startswith(beginning):
            return number
    raise SystemExit(f"no line begins with {beginning!r} in:\n" + "\n".join(output))


def differences(shown: str, fresh: str) -> Iterator[str]:
    """Yield the differences of a page from its fresh text that a reader would call wrong."""
    is_notebook = shown.startswith("{")
    old, new = (texts_of(t) if is_notebook else t.splitlines() for t in (shown, fresh))
    if len(old) != len(new):
        yield f"{len(old)} lines are shown, {len(new)} are printed"
    for a, b in zip(old, new, strict=False):
        if not alike(a, b):
            yield f"shown:   {a}\nprinted: {b}"


def alike(shown: str, printed: str) -> bool:
    """Return whether two lines say the same: see the module's docstring."""
    a, b = masked(shown), masked(printed)
    if NUMBER.sub("#", a) != NUMBER.sub("#", b):
        return False
    pairs = zip(NUMBER.finditer(a), NUMBER.finditer(b), strict=True)
    return all(close(x, y) for x, y in pairs)


def masked(line: str) -> str:
    """Return a line without times, places and rates, and with single blanks."""
    for pattern in MASKED:
        line = re.sub(pattern, "@", line)
    return " ".join(line.split())


def close(a: re.Match[str], b: re.Match[str]) -> bool:
    """Return whether two numbers are equal, or metrics that differ by no more than the tolerance."""
    digits = {len(a[3] or ""), len(b[3] or "")}
    tolerance = {4: TOLERANCE, 2: 100 * TOLERANCE}.get(max(digits), 0.0) if len(digits) == 1 else 0
    return a[1] == b[1] and abs(float(a[2]) - float(b[2])) <= tolerance


def run_pages(chosen_pages: Sequence[Path], *, check: bool) -> int:
    """Rewrite or check pages on a Ray of one CPU; return the exit code."""
    wrong = 0
    for page in chosen_pages:
        with tempfile.TemporaryDirectory() as folder:
            fresh = fresh_text(page, Path(folder))
            if not check:
                page.write_text(fresh)
                keep_pictures(page.name, Path(folder))
                continue
        for difference in differences(page.read_text(), fresh):
            print(f"{page.relative_to(ROOT)}:\n{difference}")
            wrong += 1
    return 1 if wrong else 0


def keep_pictures(page: str, folder: Path) -> None:
    """Draw the figures of a page's newest experiment, and keep those that the page shows."""
    kept = PICTURES.get(page, {})
    if kept:
        output_of("tfkd report --figures figures", folder)
    for name, target in kept.items():
        shutil.copy(folder / "figures" / name, target)
    if page in SCREENS:
        with tensorboard(folder) as url:
            take_picture(url, SCREENS[page])


@contextmanager
def tensorboard(folder: Path) -> Iterator[str]:
    """Serve the newest experiment below a folder; yield the address."""
    command = ["tfkd", "tensorboard", "@last", "--port", "0"]
    server = subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    try:
        yield server.stderr.readline().split()[1]
    finally:
        server.send_signal(signal.SIGINT)
        server.communicate()


def take_picture(url: str, target: Path) -> None:
    """Write a picture of HParams' parallel coordinates."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        page = chromium.new_page(viewport={"width": 1280, "height": 800})
        page.set_default_timeout(120_000)
        page.goto(f"{url}#hparams")
        page.locator("text=Parallel coordinates view").click()
        page.locator("tf-hparams-parallel-coords-plot svg .foreground path").first.wait_for(
            state="attached"
        )
        page.screenshot(path=target)
        chromium.close()


def start_ray() -> None:
    """Start a Ray of one CPU, which the commands join; with RAY_ADDRESS set, they join that one."""
    if "RAY_ADDRESS" in os.environ:
        return
    import ray

    from tfkd_ray.run.auth import own_token
    from tfkd_ray.run.connect import DRIVER

    own_token()
    ray.init(
        address="local", num_cpus=1, resources={DRIVER: 1000}, include_dashboard=False,
        log_to_driver=False, logging_level="ERROR", object_store_memory=150 * 2**20,
    )  # fmt: skip
    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address


def main() -> int:
    """Rewrite or check the pages that are named, or all."""
    parser = argparse.ArgumentParser(description="Rewrite the outputs in README and docs.")
    parser.add_argument("pages", nargs="*", type=Path, help="pages (default: all with outputs)")
    parser.add_argument("--check", action="store_true", help="compare, and change nothing")
    args = parser.parse_args()
    beside = str(Path(sys.executable).parent)
    os.environ |= EXACT | {"PATH": f"{beside}{os.pathsep}{os.environ['PATH']}"}
    named = [p.resolve() for p in args.pages] or pages()
    if named:
        start_ray()
    return run_pages(named, check=args.check)


if __name__ == "__main__":
    sys.exit(main())
