"""Several sweeps side by side: in lines, as one table of trials, and as one page."""

import csv
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from test_readers import change, line, make_sweep
from test_report import make_comparison, make_grid, without_plotly

from tfkd_ray.cli.main import main
from tfkd_ray.settings.errors import ConfigError
from tfkd_ray.show.report import report
from tfkd_ray.show.several import best_rows, differing_rows, pair_rows, read_several
from tfkd_ray.show.trials import trials_table
from tfkd_ray.store.experiment import read_records


@pytest.fixture(scope="module")
def sweeps(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Return two sweeps of 18 and 36 epochs, and one like the first, whose values are 1 to 3 points higher."""
    folder = tmp_path_factory.mktemp("storage")
    paths = [folder / name for name in ("short", "long", "higher")]
    make_sweep(paths[0], 40, objective=["ce", "lsr"])
    make_sweep(paths[1], 24, epochs=36, objective=["ce", "lsr"])
    make_sweep(paths[2], 40, objective=["ce", "lsr"])
    for record in read_records(paths[2]):
        lead = 0.01 + 0.02 * (record.number // 2 % 2)
        lines = [line(e + 1, m["val_accuracy"] + lead) for e, m in enumerate(record.metrics)]
        (record.folder / "metrics.jsonl").write_text("".join(lines))
    return paths


@pytest.mark.slow
def test_the_best_of_each_objective_and_sweep_is_named_best_first(sweeps: list[Path]) -> None:
    several = read_several(sweeps)
    _, *rows = best_rows(several)
    assert [row[0] for row in rows] == ["ce"] * 3 + ["lsr"] * 3
    values = [[float(row[3]) for row in rows if row[0] == name] for name in ("ce", "lsr")]
    assert all(found == sorted(found, reverse=True) for found in values)
    assert {row[1]: row[6] for row in rows} == {"short": "18", "long": "36", "higher": "18"}
    for row in rows:
        records = read_records(next(path for path in sweeps if path.name == row[1]))
        mine = [
            r.last["val_accuracy"] for r in records if (r.objective, r.status) == (row[0], "done")
        ]
        assert float(row[3]) == pytest.approx(100 * max(mine), abs=0.005)


def test_only_settings_that_differ_are_named(sweeps: list[Path]) -> None:
    assert differing_rows(read_several(sweeps)) == [
        ["setting", "short", "long", "higher"],
        ["epochs", "18", "36", "18"],
        ["search.num_samples", "40", "24", "40"],
    ]
    assert differing_rows(read_several([sweeps[0], sweeps[2]])) == [["setting", "short", "higher"]]


def test_pairs_are_trials_of_equal_settings_and_seed(sweeps: list[Path]) -> None:
    rows = {row[0]: row for row in pair_rows(read_several([sweeps[0], sweeps[2]]))[1:]}
    for objective in ("ce", "lsr"):
        full = [
            {r.name: r.last["val_accuracy"] for r in read_records(path) if (r.objective, r.status) == (objective, "done")}
            for path in (sweeps[0], sweeps[2])
        ]  # fmt: skip
        differences = np.array([100 * (full[1][name] - full[0][name]) for name in full[0]])
        assert int(rows[objective][2]) == len(differences) >= 3
        assert float(rows[objective][3]) == pytest.approx(differences.mean(), abs=0.01)
        if differences.std() > 1e-9:
            low, high = stats.t.interval(
                0.95, len(differences) - 1, differences.mean(), stats.sem(differences)
            )
            shown = re.fullmatch(r"(\S+) to (\S+)", rows[objective][4])
            assert shown and float(shown[1]) == pytest.approx(low, abs=0.01)
            assert float(shown[2]) == pytest.approx(high, abs=0.01)


def test_trials_of_other_seeds_are_no_pairs(tmp_path: Path) -> None:
    for name in ("a", "b"):
        make_sweep(tmp_path / name, 8, objective=["ce"], search={"stopping": "none"})
    several = [tmp_path / "a", tmp_path / "b"]
    found = int(pair_rows(read_several(several))[1][2])
    path = next(
        folder for r in read_records(tmp_path / "b") if r.status == "done" for folder in [r.folder]
    )
    config = json.loads((path / "trial.json").read_text())["config"]
    change(tmp_path / "b", int(path.name[1:5]), config={**config, "seed": 7})
    assert int(pair_rows(read_several(several))[1][2]) == found - 1 > 0


def test_one_table_lists_the_trials_of_several_experiments(sweeps: list[Path]) -> None:
    first, *others = sweeps
    rows = json.loads(trials_table(first, others=others, output="json"))
    count = Counter(row["experiment"] for row in rows)
    assert count == {path.name: len(read_records(path)) for path in sweeps}
    assert len(rows) == 104
    text = trials_table(first, others=others, filter=["experiment=long"], output="csv")
    assert {row["experiment"] for row in csv.DictReader(text.splitlines())} == {"long"}
    assert trials_table(first, others=others).startswith("experiment")
    assert not trials_table(first).startswith("experiment")


@pytest.mark.slow
def test_a_page_of_several_sweeps_has_all_their_trials(sweeps: list[Path], tmp_path: Path) -> None:
    written = report(sweeps[0], tmp_path / "r.html", others=sweeps[1:], figures=tmp_path / "f")
    assert [path.name for path in written] == ["r.html", "best-curves.svg", "best-curves.pdf"]
    page = without_plotly(tmp_path / "r.html")
    numbers = re.findall(r'<tr data-trials="(\d+)"', page)
    assert sorted(map(int, numbers)) == list(range(104))
    assert "<h1>short, long, higher</h1>" in page and "Paired differences" in page
    assert '"long: t0003-lsr"' in page


@pytest.mark.slow
def test_what_cannot_be_shown_side_by_side_is_refused(sweeps: list[Path], tmp_path: Path) -> None:
    comparison = make_comparison(tmp_path / "arms")
    with pytest.raises(
        ConfigError, match="a comparison of arms; only sweeps are shown side by side"
    ):
        read_several([sweeps[0], comparison])
    make_sweep(tmp_path / "nll", 4, search={"metric": "val_nll"})
    for read in (
        lambda: read_several([sweeps[0], tmp_path / "nll"]),
        lambda: trials_table(sweeps[0], others=[tmp_path / "nll"]),
    ):
        with pytest.raises(ConfigError, match="val_nll"):
            read()
    with pytest.raises(ConfigError, match="--confirm: is for the report of one sweep"):
        report(sweeps[0], tmp_path / "r.html", others=sweeps[1:], comparisons=[comparison])
    assert not (tmp_path / "r.html").exists()


def test_two_sweeps_of_one_name_are_told_apart(tmp_path: Path) -> None:
    paths = [make_grid(tmp_path / folder / "grid") for folder in ("a", "b")]
    assert [one.name for one in read_several(paths)] == ["grid", "grid-2"]


def test_compare_keeps_to_80_columns(
    sweeps: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(sweeps[0].parent)
    assert main(["compare", "short", "long", "higher"]) == 0
    out = capsys.readouterr().out
    assert "settings that differ:" in out and "This is not a verdict" in out
    assert max(map(len, out.splitlines())) <= 80 and "…" not in out
