"""Sequential comparisons: levels of looks, who is settled when, and what the test split shows."""

import functools
import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from tfkd_ray.cli.main import main
from tfkd_ray.learn import loop
from tfkd_ray.learn.checkpoint import WEIGHTS
from tfkd_ray.run import confirm
from tfkd_ray.run.confirm import LOGITS, OPENINGS, ends_at_look, judge_on_test
from tfkd_ray.settings.errors import ConfigError
from tfkd_ray.space.arms import build_arms, new_comparison, read_comparison
from tfkd_ray.store.experiment import Record, trials_folder, write_record
from tfkd_ray.verdict import sequential
from tfkd_ray.verdict.decision import ALPHA, decide, leads_of
from tfkd_ray.verdict.seed_plan import SeedPlan
from tfkd_ray.verdict.sequential import nominal_levels, settle
from tfkd_ray.verdict.verdict import JudgedArm, judge

ROOT = Path(__file__).parent.parent
PLAN = SeedPlan(3, 20)
MARGIN = 0.002


def leads(
    rng: np.random.Generator,
    simulations: int,
    k: int,
    m: int,
    gain: float = 0.0,
    sd: float = 0.0038,
) -> np.ndarray[Any, Any]:
    """Return paired leads [S, k, m, 20] of arms with normal seeds."""
    arms = (
        rng.standard_normal((simulations, k, 1, 20)),
        rng.standard_normal((simulations, 1, m, 20)),
    )
    return (arms[0] - arms[1]) * sd / 2**0.5 + gain


def test_one_look_has_the_whole_level() -> None:
    for level in (0.05, 0.01):
        assert nominal_levels(level, SeedPlan(7, 7)) == pytest.approx([level], rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("level", [0.05, 0.05 / 3])
def test_all_looks_together_have_the_level_and_spend_it_as_stated(level: float) -> None:
    rng = np.random.default_rng(0)
    walk = rng.standard_normal((400_000, 20)).cumsum(axis=1)
    z = walk / np.sqrt(np.arange(1, 21))
    boundary = stats.norm.isf(np.array(nominal_levels(level, PLAN)) / 2)
    crossed = z[:, 2:] > boundary
    for look in (5, 10, 17):
        share = crossed[:, : look + 1].any(axis=1).mean()
        expected = level / 2 * ((look + 3) / 20) ** 4
        assert share == pytest.approx(expected, abs=4 * (expected / 400_000) ** 0.5 + 1e-6)


def test_levels_grow_with_the_level_so_that_the_procedure_is_closed() -> None:
    tables = [nominal_levels(ALPHA / r, PLAN) for r in (3, 2, 1)]
    assert (np.diff(tables, axis=0) > 0).all()


@pytest.mark.long
@pytest.mark.slow
def test_what_is_settled_stays_settled_and_depends_on_the_leads_so_far_alone() -> None:
    whole = leads(np.random.default_rng(1), 300, 2, 2, 0.003)
    before = None
    for n in PLAN.looks:
        now = settle(whole[..., :n], PLAN, MARGIN)
        done = now.better | now.hopeless | now.ruled_out
        assert (now.seeds[~done] == n).all()
        if before is not None:
            old = before.better | before.hopeless | before.ruled_out
            for name in ("better", "hopeless", "ruled_out", "seeds"):
                assert (getattr(now, name)[old] == getattr(before, name)[old]).all()
        before = now
    changed = whole.copy()
    changed[..., 10:] += 1
    early = settle(whole, PLAN, MARGIN).seeds <= 10
    assert early.any()
    again = settle(changed, PLAN, MARGIN)
    assert (again.better[early] == settle(whole, PLAN, MARGIN).better[early]).all()


@pytest.mark.slow
def test_better_means_that_every_baseline_was_beaten_at_a_look_of_the_corrected_level() -> None:
    """A slow loop: step-down over candidates, each tested at ALPHA over those not yet better."""
    found = leads(np.random.default_rng(2), 40, 3, 2, 0.0035)
    settled = settle(found, PLAN, MARGIN)
    tests = [stats.ttest_1samp(found[..., :n], 0, axis=-1) for n in PLAN.looks]
    p = np.stack([np.where(t.statistic > 0, t.pvalue, 1) for t in tests])
    levels = {left: nominal_levels(ALPHA / left, PLAN) for left in (1, 2, 3)}
    for number in range(len(found)):
        stopped = settled.hopeless[number] | settled.ruled_out[number]
        last = np.where(stopped, settled.seeds[number], 20)
        better = [False] * 3
        for n in PLAN.looks:
            changed = True
            while changed and not all(better):
                level = levels[3 - sum(better)]
                beaten = [
                    i
                    for i in range(3)
                    if not better[i]
                    and n <= last[i]
                    and all(_beaten(p[:, number, i, j], n, level) for j in range(2))
                ]
                changed = bool(beaten)
                for i in beaten:
                    better[i] = True
        assert better == settled.better[number].tolist()


def _beaten(p: np.ndarray[Any, Any], until: int, level: tuple[float, ...]) -> bool:
    """Return whether a look until now found the lead of one pair."""
    return any(p[n - PLAN.first] <= level[n - PLAN.first] for n in range(PLAN.first, until + 1))


@functools.cache
def simulations() -> Any:
    spec = importlib.util.spec_from_file_location("verdicts", ROOT / "benchmarks/verdict.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules["verdicts"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("k", "m"), [(1, 1), pytest.param(3, 1, marks=pytest.mark.long)])
@pytest.mark.slow
def test_false_discoveries_are_rare_intervals_cover_and_seeds_are_saved(k: int, m: int) -> None:
    module, count = simulations(), 2000
    rates = module.sequential(count, module.points([0.0] * k, [0.0] * m), k, seed=5)
    assert rates.family_wise <= 0.05 + 2 * (0.05 * 0.95 / count) ** 0.5
    assert rates.coverage >= 0.95 - 2 * (0.05 * 0.95 / count) ** 0.5
    assert rates.seeds < 0.75
    rates = module.sequential(count, module.points([0.4] * k, [0.0] * m), k, seed=6)
    assert rates.found > rates.found_fixed - 0.03 and rates.found_fixed > 0.9
    assert rates.seeds < 0.85


@pytest.mark.slow
def test_a_failed_run_is_left_out_of_its_pairs() -> None:
    whole = leads(np.random.default_rng(3), 40, 1, 1, 0.004)
    holes = whole.copy()
    holes[..., 4] = np.nan
    first = settle(holes[..., :12], PLAN, MARGIN)
    assert first.better.any()
    for row, better, seeds in zip(
        holes[:, 0, 0], first.better[:, 0], first.seeds[:, 0], strict=True
    ):
        if better:
            seen = row[:seeds][np.isfinite(row[:seeds])]
            level = nominal_levels(ALPHA, PLAN)[int(seeds) - 3]
            assert stats.ttest_1samp(seen, 0).pvalue <= level
    nothing = np.full((1, 1, 5), np.nan)
    assert not settle(nothing, PLAN, MARGIN).better.any()


def test_a_fixed_comparison_and_the_last_look_differ_by_the_level_alone() -> None:
    whole = leads(np.random.default_rng(4), 500, 1, 1, 0.003)
    plan = SeedPlan(20, 20)
    settled = settle(whole, plan, MARGIN)
    fixed = decide(leads_of(whole), MARGIN)
    assert (settled.better == fixed.better).all()
    p = leads_of(whole).p[settled.better]  # a single look changes no p; those below 1e-6 are cut
    np.testing.assert_allclose(settled.p_each[settled.better], np.maximum(p, 1e-6), rtol=1e-4)


def arm(name: str, values: np.ndarray[Any, Any]) -> JudgedArm:
    return JudgedArm(name, tuple(range(len(values))), values)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("gain", "n", "verdict", "sentence"),
    [
        (
            0.02,
            6,
            "better",
            "new is better than every baseline: its lead over ce, the closest call, is",
        ),
        (-0.02, 9, "not better", "new is not better than ce: it is worse, by"),
        (0.0, 11, "not better", "as far as 20 seeds could show: its lead is"),
        (0.004, 6, "cannot tell", "cannot tell with 20 seeds whether new is better than ce"),
    ],
)
def test_the_sentence_says_the_looks(gain: float, n: int, verdict: str, sentence: str) -> None:
    rng = np.random.default_rng(7)
    baseline = 0.9 + 0.003 * rng.standard_normal(n)
    difference = 0.003 * rng.standard_normal(n)
    new = baseline + difference - difference.mean() + gain
    found = judge([arm("new", new)], [arm("ce", baseline)], plan=PLAN, seeds=range(n))
    assert found.verdict == verdict
    assert sentence in found.candidates[0].sentence
    assert "over all looks" in found.candidates[0].sentence
    assert f"n = {n}" in found.candidates[0].sentence


ARMS = {
    "data": {"name": "digits", "subset": 200},
    "epochs": 2,
    "student": "mlp",
    "arms": [
        {"name": "ce", "objective": "ce"},
        {"name": "faster", "objective": "ce", "optim": {"lr": 0.12}, "role": "candidate"},
    ],
}


@pytest.fixture
def comparison(tmp_path: Path) -> Path:
    """Return a sequential comparison of 3 to 5 seeds, none of them trained."""
    directory = tmp_path / "results/sequence"
    new_comparison(build_arms(ARMS), [1, 2, 3, 4, 5], directory, first_look=3)
    return directory


def train_until(directory: Path, seeds: int) -> None:
    """Train the runs of the first seeds as trials do, without Ray."""
    for number, run in enumerate(read_comparison(directory).runs_on_data[: 2 * seeds]):
        folder = trials_folder(directory) / run.name
        if (folder / WEIGHTS).exists():
            continue
        list(loop.train_in(folder, run.config))
        record = Record(
            folder=folder,
            number=number,
            name=run.name,
            objective=run.config.objective.called,
            status="done",
            parameters={"arm": run.arm, "seed": run.seed},
            config=run.config.model_dump(mode="json"),
        )
        write_record(record)


@pytest.fixture
def _never_hopeless(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequential, "FUTILE_FROM", 1.0)


@pytest.mark.usefixtures("_never_hopeless")
@pytest.mark.slow
def test_no_test_figure_is_written_before_the_sequence_has_ended(comparison: Path) -> None:
    known: dict[str, Any] = {}
    for seeds in (3, 4):
        train_until(comparison, seeds)
        before = {p: p.read_bytes() for p in comparison.rglob("*") if p.is_file()}
        assert not ends_at_look(comparison, seeds, known)
        after = {p: p.read_bytes() for p in comparison.rglob("*") if p.is_file()}
        changed = {p.name for p in after if before.get(p) != after[p]}
        assert not changed - {"driver.lock", "driver.txt"}
    lines = (comparison.parent / OPENINGS).read_text().splitlines()
    assert [json.loads(line)["look"] for line in lines] == [1, 2]
    assert not {"accuracy", "nll"} & {key for line in lines for key in json.loads(line)}
    assert len(known) == 8
    train_until(comparison, 5)
    assert ends_at_look(comparison, 5, {})
    assert len((comparison.parent / OPENINGS).read_text().splitlines()) == 3
    assert read_comparison(comparison).ended
    assert read_comparison(comparison).plan == SeedPlan(3, 5)
    result = judge_on_test(comparison)
    assert len((comparison.parent / OPENINGS).read_text().splitlines()) == 3
    assert (
        "one opening of the test split, in 3 looks, from 3 to 5 of at most 5" in result["notes"][0]
    )
    assert all(len(one["runs"]) == 5 for one in result["arms"])
    for run in read_comparison(comparison).runs:
        assert (trials_folder(comparison) / run.name / LOGITS).is_file()


@pytest.mark.slow
def test_a_sequence_that_is_settled_early_ends_there(
    comparison: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_until(comparison, 3)
    monkeypatch.setattr(confirm, "_all_settled", lambda *args: True)
    assert ends_at_look(comparison, 3, {})
    monkeypatch.undo()
    assert read_comparison(comparison).seeds == [1, 2, 3]
    result = judge_on_test(comparison)
    assert result["verdicts"][0]["arms"][0]["n"] == 3


@pytest.mark.slow
@pytest.mark.usefixtures("_never_hopeless")
def test_a_look_that_was_killed_is_noted_once_and_repeated(comparison: Path) -> None:
    train_until(comparison, 3)
    for _ in range(2):
        assert not ends_at_look(comparison, 3, {})
    assert len((comparison.parent / OPENINGS).read_text().splitlines()) == 1


@pytest.mark.parametrize(
    ("arm_name", "reason", "ends"),
    [
        ("faster", "OSError: a disk", False),
        ("ce", "OSError: a disk", False),
        ("ce", "Diverged: train_loss is nan", True),
    ],
)
def test_failed_runs_are_not_settled_and_a_diverged_baseline_ends_it(
    comparison: Path, arm_name: str, reason: str, ends: bool
) -> None:
    train_until(comparison, 3)
    for run in read_comparison(comparison).runs[:6]:
        if run.arm == arm_name and run.seed > 1:
            path = trials_folder(comparison) / run.name / "trial.json"
            record = json.loads(path.read_text())
            path.write_text(json.dumps(record | {"status": "failed", "reason": reason}))
    assert ends_at_look(comparison, 3, {}) == ends


def test_a_test_split_that_changed_between_looks_is_refused(
    comparison: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_until(comparison, 3)
    ends_at_look(comparison, 3, {})
    monkeypatch.setattr(confirm, "digest_of", lambda images: "0" * 32)
    with pytest.raises(ConfigError, match="the test split of digits has changed since this compar"):
        ends_at_look(comparison, 4, {})


@pytest.mark.parametrize(
    ("seeds", "sentence"),
    [
        ("2..5", "--seeds 2..5:\n  the first look needs 3 seeds or more"),
        ("5..3", "the limit, 3, is below the first look, 5"),
        ("1", "with one run of each arm"),
    ],
)
def test_wrong_numbers_of_seeds_get_a_sentence(
    seeds: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["confirm", "digits_arms", "--seeds", seeds]) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.usefixtures("_never_hopeless")
def test_seeds_are_added_until_the_verdict_is_settled(
    ray_cluster: str, tfkd_inside: Any, tmp_path: Path
) -> None:
    (tmp_path / "arms.yaml").write_text(json.dumps(ARMS | {"epochs": 1}))
    done = tfkd_inside("confirm", "arms.yaml", "--seeds", "3..4", "--name", "seq")
    assert done.returncode == 0, done.stderr
    assert "look at 3 seeds: not settled" in done.stderr
    assert "in 2 looks, from 3 to 4 of at most 4 seeds" in " ".join(done.stdout.split())
    assert os.environ["RAY_ADDRESS"] == ray_cluster
