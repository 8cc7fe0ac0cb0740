"""docs/ is true: generated pages are current, sentences are the program's, examples run."""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import optuna
import pytest
from conftest import DATA_SETS, ROOT, Run
from optuna.trial import TrialState
from test_readers import make_sweep

from tfkd_ray.cli.main import main
from tfkd_ray.learn.loop import train
from tfkd_ray.learn.objectives import NAMES
from tfkd_ray.run.journal import open_journal
from tfkd_ray.settings.errors import ConfigError
from tfkd_ray.settings.yaml import parse_yaml
from tfkd_ray.show.status import best_of, front_of, ls, status
from tfkd_ray.space.space import build_space, load_space
from tfkd_ray.store.experiment import read_records
from tfkd_ray.verdict.scores import SCORES, SELECTABLE, scores

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / page).read_text(), re.S)


# --- generated


@pytest.mark.slow
def test_the_generated_pages_are_what_the_code_says_now() -> None:
    for path, text in runpy.run_path(str(DOCS / "api.py"))["pages"]().items():
        assert path.read_text() == text, f"{path.name} is out of date: python docs/api.py"


def test_the_reference_has_every_public_name_and_names_no_place_on_this_machine() -> None:
    import tfkd_ray

    text = (DOCS / "api.md").read_text()
    for name in tfkd_ray.__all__:
        assert f"## {name}\n" in text or f"In Python: `tfkd_ray.{name}`.\n" in text, name
    assert str(Path.home()) not in text and str(ROOT) not in text


# --- tables written by hand


def table(page: Path, head: str) -> list[list[str]]:
    """Return the cells of the rows below a table's head."""
    lines = page.read_text().partition(f"| {head} |\n")[2].partition("\n\n")[0].splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines[1:]]
    assert rows, f"{page.name}: no table with the head {head}"
    return rows


def names_in(rows: list[list[str]]) -> list[str]:
    return sorted(name for row in rows for name in re.findall(r"`([^`]+)`", row[0]))


def test_the_page_of_parts_names_every_objective_and_data_set_and_no_other() -> None:
    page = DOCS / "parts.md"
    assert names_in(table(page, "name | what it is")) == sorted(NAMES)
    assert names_in(table(page, "data set | format")) == sorted(DATA_SETS)


def test_the_pages_name_every_metric_and_its_better_direction() -> None:
    rows = table(DOCS / "search.md", "metric | what it is | better | when")
    assert names_in(rows) == sorted(SELECTABLE)
    for name, _, better, when in rows:
        row = SCORES[name.strip("`")]
        assert better == {"max": "higher", "min": "lower"}[row.direction], name
        assert when == {True: "always", False: "if asked for"}[row.usual], name
    text = (DOCS / "confirm.md").read_text().partition("(per seed: ")[2].partition(")")[0]
    found = text.replace("\n", " ").replace("agreement with the teacher", "agreement").split(", ")
    assert sorted(found) == sorted([*scores(np.eye(3), np.arange(3)), "agreement"])


# --- faults


def test_every_fault_of_the_page_has_a_test_that_is_there() -> None:
    rows = [line for line in (DOCS / "faults.md").read_text().splitlines() if line.startswith("| ")]
    named = [
        re.findall(r"`(test_\w+\.py)::(\w+)`", row)
        for row in rows
        if not row.startswith("| fault ")
    ]
    assert len(named) > 200 and all(named)
    for file, name in {pair for pairs in named for pair in pairs}:
        assert f"def {name}(" in (ROOT / "tests" / file).read_text(), f"{file}::{name}"


# --- search spaces


@pytest.mark.parametrize("text", blocks("space.md", "yaml"))
def test_the_spaces_of_the_page_are_valid_and_search_something_or_name_a_recipe(text: str) -> None:
    space = build_space(parse_yaml(text, "space.md"))
    assert space.parameters or "recipe" in text


MISTAKES = re.findall(
    r"^\| `(.+?)` \| ((?:[a-z_]+\.)*[a-z_]+: .+) \|$", (DOCS / "space.md").read_text(), re.M
)


def test_there_are_mistakes_in_the_table() -> None:
    section = (DOCS / "space.md").read_text().partition("## Common mistakes")[2]
    assert len(MISTAKES) == section.count("\n| `") > 10


@pytest.mark.parametrize("text, sentence", MISTAKES, ids=[text[:40] for text, _ in MISTAKES])
def test_a_common_mistake_is_answered_with_the_very_sentence_of_the_page(
    text: str, sentence: str
) -> None:
    tree = {"objective": "ce", **parse_yaml(text, "space.md")}
    with pytest.raises(ConfigError) as error:
        build_space(tree)
    assert str(error.value) == sentence


# --- your own


def write_own_modules(folder: Path) -> None:
    """Write the files of own.md."""
    for block in (*blocks("own.md", "python"), *blocks("own.md", "yaml")):
        first = block.partition("\n")[0]
        (folder / first.removeprefix("# ")).write_text(block)
    assert {p.name for p in folder.iterdir()} == {
        "hint.yaml", "hints.py", "kd.yaml", "loop.yaml", "loss.yaml", "make_photos.py", "my_data.py", "my_loop.py",
        "my_losses.py", "my_nets.py", "my_optimizers.py", "optimizer.yaml", "own.yaml", "photos.yaml", "timm.yaml",
    }  # fmt: skip


@pytest.mark.ray
@pytest.mark.docs
@pytest.mark.timeout(600)
def test_the_loss_of_the_page_is_swept_and_confirmed_as_it_stands_there(
    ray_cluster: str, tfkd: Run, tmp_path: Path
) -> None:
    write_own_modules(tmp_path)
    shown = [line.removeprefix("$ ") for line in blocks("own.md", "console")[0].splitlines()]
    assert [line.split()[1] for line in shown] == ["check", "explain", "tune", "confirm"]
    printed = []
    for command in shown:
        run = tfkd(*command.split()[1:], cwd=tmp_path, timeout=400)
        assert run.returncode == 0, f"{command}: {run.stdout} {run.stderr}"
        printed.append(run)
    assert "objective.margin_kd.args.temperature" in printed[0].stdout
    assert "no effect" not in printed[0].stdout and "dead" not in printed[0].stdout
    records = read_records(tmp_path / "tfkd_results/loss")
    assert [r.objective for r in records].count("margin_kd") == 6
    assert (tmp_path / "tfkd_results/verdict/confirm.json").is_file()


@pytest.mark.ray
@pytest.mark.docs
@pytest.mark.timeout(600)
def test_the_loop_of_the_page_is_swept_and_confirmed_as_it_stands_there(
    ray_cluster: str, tfkd: Run, tmp_path: Path
) -> None:
    write_own_modules(tmp_path)
    shown = [line.removeprefix("$ ") for line in blocks("own.md", "console")[2].splitlines()]
    assert [line.split()[1] for line in shown] == ["check", "tune", "confirm"]
    for command in shown:
        run = tfkd(*command.split()[1:], cwd=tmp_path, timeout=400)
        assert run.returncode == 0, f"{command}: {run.stdout} {run.stderr}"
    records = read_records(tmp_path / "tfkd_results/loop")
    assert all("loop.args.clip" in record.parameters for record in records)
    assert (tmp_path / "tfkd_results/loop-verdict/confirm.json").is_file()


def test_the_optimizer_of_the_page_trains_as_it_stands_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_own_modules(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    space = load_space(tmp_path / "optimizer.yaml", ["epochs=2"])
    assert not space.try_own_code()
    first, second = (e.metrics["train_loss"] for e in train(space.example))
    assert second < first


@pytest.mark.docs
@pytest.mark.timeout(240)
def test_the_modules_of_the_page_train_as_they_stand_there(tfkd: Run, tmp_path: Path) -> None:
    write_own_modules(tmp_path)
    _, hint, _, *others = blocks("own.md", "console")  # two are swept
    lines = [line for block in (hint, *others) for line in block.splitlines()]
    shown = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    assert len(shown) == 9
    printed = []
    for command in shown:
        program, *words = command.split()
        if program == "tfkd":
            run = tfkd(*words, cwd=tmp_path)
        else:
            run = subprocess.run(
                [sys.executable, *words], cwd=tmp_path, capture_output=True, text=True, timeout=60
            )
        assert run.returncode == 0, f"{command}: {run.stderr}"
        printed += run.stdout.splitlines()
    for line in lines:  # and prints the output shown, except for the last digits
        if not line.startswith("$ "):
            value, rest = line.split()[1], line.partition("after")[2]
            (found,) = (text.split()[1] for text in printed if text.endswith(rest))
            assert float(found) == pytest.approx(float(value), abs=0.02)


@pytest.mark.ray
@pytest.mark.docs
def test_the_two_lines_of_the_page_serve_a_trainable_of_ones_own_in_a_plain_tuner(
    ray_cluster: str, tmp_path: Path
) -> None:
    code, _ = blocks("search.md", "python")
    two = [line for line in code.splitlines() if "searcher" in line]
    assert len(two) == 2
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=110
    )
    assert run.returncode == 0, run.stderr
    assert re.search(r"^8 trials, best 0\.9\d+$", run.stdout, re.M), run.stdout
    study = optuna.load_study(
        study_name="tfkd/ce", storage=open_journal(tmp_path / "study.journal")
    )
    assert [t.user_attrs["number"] for t in study.trials] == list(range(8))
    ends = {state: [t for t in study.trials if t.state == state] for state in TrialState}
    assert all(ends[state] for state in (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL))
    assert not ends[TrialState.RUNNING] and not ends[TrialState.WAITING]
    for trial in ends[TrialState.COMPLETE]:
        assert list(trial.intermediate_values) == [1, 3, 9]  # its values at rungs, and the last
        assert trial.value == trial.intermediate_values[9]
    for trial in ends[TrialState.PRUNED]:  # stopped at a rung
        assert list(trial.intermediate_values) in ([1], [1, 3])
    for trial in ends[TrialState.FAIL]:
        assert trial.user_attrs["reason"].startswith("ArithmeticError: diverged in epoch 1")


@pytest.mark.ray
@pytest.mark.docs
def test_the_dictionary_of_the_page_is_searched_in_a_plain_tuner_as_it_stands_there(
    ray_cluster: str, tmp_path: Path
) -> None:
    _, code = blocks("search.md", "python")
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=110
    )
    assert run.returncode == 0, run.stderr
    assert re.search(r"^8 trials, best 0\.\d+ (hinge|log_loss)$", run.stdout, re.M), run.stdout
    study = optuna.load_study(
        study_name="tfkd/all", storage=open_journal(tmp_path / "study.journal")
    )
    assert {t.state for t in study.trials} == {TrialState.COMPLETE, TrialState.PRUNED}
    assert set(study.best_params) == {"model/eta0", "model/alpha", "model/loss"}
    assert len(list((tmp_path / "tb").glob("*/events.*"))) >= 8


def test_the_grid_of_the_page_is_a_table_of_t_and_alpha_of_full_length() -> None:
    (text,) = blocks("compare.md", "yaml")
    space = build_space(parse_yaml(text, "compare.md"))
    assert space.search.num_samples == 4 * 3 and not space.rungs


# --- what programs read


def test_the_page_names_every_key_that_programs_read(tmp_path: Path) -> None:
    section = (
        (DOCS / "compare.md")
        .read_text()
        .partition("## For other programs")[2]
        .partition("\n## ")[0]
    )
    make_sweep(tmp_path / "sweep", 8)
    found = status(tmp_path / "sweep")
    table, _, rest = section.partition("\n`best`: ")
    rows = [line for line in table.splitlines() if line.startswith("| `")]
    assert {key for row in rows for key in re.findall(r"`(\w+)`", row.split("|")[1])} == set(found)
    assert {*found["trials"], *found["best"], *found["epochs"], *found["failures"]} <= set(
        re.findall(r"`(\w+)`", table)
    )
    assert set(ls(tmp_path)[0]) <= set(
        re.findall(r"`(\w+)`", rest.partition("`ls`: ")[2].partition("`trials`: ")[0])
    )
    best, plan = best_of(tmp_path / "sweep")
    front = front_of([best], plan, 8)
    assert {*front, *front["best"][0]} <= set(
        re.findall(r"`(\w+)`", rest.partition("`ls`: ")[0])
    ) | {"best"}


# --- outputs


OUTPUTS = runpy.run_path(str(DOCS / "outputs.py"))


@pytest.mark.docs
@pytest.mark.timeout(900)
def test_every_output_that_is_shown_is_what_the_shipped_code_prints() -> None:
    elsewhere = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    command = [sys.executable, DOCS / "outputs.py", "--check"]
    run = subprocess.run(command, capture_output=True, text=True, env=elsewhere)
    assert run.returncode == 0, run.stdout + run.stderr


def test_an_output_is_shown_in_parts_and_dots_stand_for_the_rest() -> None:
    output = ["joining", "best: t1", "  lr 0.1", "", "used 3", "saved 4", "next:"]
    assert OUTPUTS["chosen"](output, "") == output
    assert OUTPUTS["chosen"](output, "best..lr | saved") == [
        "...", "best: t1", "  lr 0.1", "...", "saved 4", "...",
    ]  # fmt: skip
    assert OUTPUTS["chosen"](output, "start..best: | used..end") == [
        "joining", "best: t1", "...", "used 3", "saved 4", "next:",
    ]  # fmt: skip
    assert OUTPUTS["chosen"](output, "best.. | next") == [
        "...", "best: t1", "  lr 0.1", "...", "next:",
    ]  # fmt: skip
    with pytest.raises(SystemExit, match="no line begins with 'worst'"):
        OUTPUTS["chosen"](output, "worst")


@pytest.mark.parametrize(
    "shown, printed, same",
    [
        ("best: t0000-ce, val_accuracy 0.9930", "best: t0000-ce, val_accuracy 0.9790", True),
        ("best: t0000-ce, val_accuracy 0.9930", "best: t0000-ce, val_accuracy 0.9720", False),
        ("best: t0000-ce, val_accuracy 0.9930", "best: t0001-ce, val_accuracy 0.9930", False),
        ("  optim.lr   0.421455", "  optim.lr   0.421456", False),
        ("lsr  98.91 ± 0.40  10", "lsr   97.10 ± 0.60  10", True),
        ("lsr  98.91 ± 0.40  10", "lsr   97.10 ± 0.60  9", False),
        ("lead +0.40", "lead -0.40", False),
        ("8 trials, 27 s: 6 of full length", "8 trials, 140 s: 6 of full length", True),
        ("8 trials, 27 s: 6 of full length", "8 trials, 27 s: 5 of full length", False),
        ("used   420 epochs, 0.0046 CPU-hours", "used   420 epochs, 0.0101 CPU-hours", True),
        ("is not better than lsr", "is better than lsr", False),
    ],
)
def test_a_shown_line_is_compared_with_a_printed_one_as_a_reader_would(
    shown: str, printed: str, same: bool
) -> None:
    assert OUTPUTS["alike"](shown, printed) is same


def test_the_first_hour_shows_what_check_prints(capsys: pytest.CaptureFixture[str]) -> None:
    block, *_ = blocks("start.md", "console")
    command, *shown, dots = block.splitlines()
    assert main(command.split()[2:]) == 0 and dots == "..."
    assert capsys.readouterr().out.splitlines()[: len(shown)] == shown


# --- the site


def test_every_page_is_named_by_the_index_and_by_the_navigation() -> None:
    index = (DOCS / "index.md").read_text()
    navigation = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2]
    for page in PAGES:
        assert page.stem == "index" or f"]({page.name})" in index, page.name
        assert f"- {page.name}\n" in navigation, page.name


# --- links


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_the_links_of_the_docs_lead_somewhere(page: Path) -> None:
    for target, _, anchor in re.findall(r"\]\(([^)#:]*)(#([^)]+))?\)", page.read_text()):
        there = page.parent / target if target else page
        assert there.exists(), f"{page.name}: {target}"
        if anchor:
            titles = re.findall(r"^#+ (.*)$", there.read_text(), re.M)
            slugs = {re.sub(r"[^\w\- ]", "", title).lower().replace(" ", "-") for title in titles}
            assert anchor in slugs, f"{page.name}: {target}#{anchor}"


def test_no_page_names_a_place_that_only_we_have() -> None:
    for page in (*PAGES, DOCS / "api.py", ROOT / "examples/tune_digits.ipynb"):
        places = "|".join(f"/{name}" for name in ("work/", "root", "tmp", "home/"))
        assert not re.search(f"{places}|index-url", page.read_text()), page.name


# --- the notebook


def test_the_notebook_is_kept_with_its_outputs_and_without_errors() -> None:
    text = (ROOT / "examples/tune_digits.ipynb").read_text()
    cells = json.loads(text)["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    kinds = {output["output_type"] for cell in code for output in cell["outputs"]}
    assert all(cell["outputs"] for cell in code) and "error" not in kinds
    assert "image/svg+xml" in code[-1]["outputs"][-1]["data"]
    shown = OUTPUTS["texts_of"](text)
    assert shown.count("8 of 8 trials, 0 running") == 1  # one output, kept up to date
    assert any(line.startswith("8 trials, 0 errors; best: val_accuracy 0.") for line in shown)
