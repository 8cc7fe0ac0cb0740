"""Searches replayed over real learning curves (benchmarks/curves-digits.npz), without Ray."""

import importlib
import math
import statistics
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from conftest import ROOT

import tfkd_ray.run.searcher
from tfkd_ray.space.search_config import SearchConfig


@pytest.fixture(scope="module")
def replays() -> Iterator[Any]:
    """Yield benchmarks/search.py with its table and the surrogate; its studies are in memory."""
    before = tfkd_ray.run.searcher.open_journal
    sys.path.insert(0, str(ROOT / "benchmarks"))
    module: Any = importlib.import_module("search")
    module._in_memory()
    module.table = module.load("digits")
    module.world = module.World(module.table)
    yield module
    sys.path.remove(str(ROOT / "benchmarks"))
    tfkd_ray.run.searcher.open_journal = before  # type: ignore[assignment]


def test_a_table_is_small_and_holds_whole_curves(replays: Any) -> None:
    assert (ROOT / "benchmarks" / "curves-digits.npz").stat().st_size < 2e6
    table = replays.table
    assert table.curves.shape == (len(table.seed), table.space.epochs) and len(table.seed) > 1000
    assert (
        set(table.seed) == {0, 1, 2}
        and np.nanmin(table.curves) >= 0
        and np.nanmax(table.curves) <= 1
    )
    for branch in table.space.branches:
        some = [
            p
            for p, o in zip(table.parameters, table.objective, strict=True)
            if o == branch.objective
        ]
        assert all(set(p) == {q.name for q in branch.parameters} for p in some) and len(some) > 200
        assert all(q.domain.contains(p[q.name]) for p in some for q in branch.parameters)


def test_a_measured_run_is_answered_by_one_much_like_it(replays: Any) -> None:
    table = replays.table
    errors = [
        abs(
            replays.world.curve(str(table.objective[i]), table.parameters[i])[-1]
            - table.curves[i, -1]
        )
        for i in range(0, len(table.seed), 7)
        if table.seed[i] == 0
    ]
    assert statistics.median(errors) < 0.01


def test_a_replay_spends_what_it_says_and_stops_where_a_sweep_would(replays: Any) -> None:
    space = replays.search_of(replays.table, "random:none", 0, num_samples=10)
    full = list(replays.replay(space, replays.world, most=10**6))
    assert [spent for spent, _ in full] == [27 * (k + 1) for k in range(10)]
    halved = replays.search_of(replays.table, "random:halving", 0, num_samples=60)
    ends = list(replays.replay(halved, replays.world, most=10**6, at_once=2))
    assert 5 <= len(ends) < 40 and ends[-1][0] < 60 * 27 / 2


@pytest.mark.slow
def test_the_default_matches_a_random_search_of_64_trials_in_a_quarter_of_its_epochs(
    replays: Any,
) -> None:
    default = f"{SearchConfig().sampler}:{SearchConfig().stopping.name}"
    table, world = replays.table, replays.world
    goals = [replays.goal_of(table, world, r) for r in range(10)]
    spent = [replays.spent_until(table, world, default, r, goal) for r, goal in enumerate(goals)]
    assert statistics.median(spent) <= 0.25 and sum(map(math.isfinite, spent)) >= 9, spent


def test_a_replay_pauses_and_promotes_as_a_sweep_and_its_regret_falls(replays: Any) -> None:
    space = replays.search_of(replays.table, "random:pausing", 0, num_samples=40)
    seen: list[Any] = []
    ends = list(replays.replay(space, replays.world, most=10**6, at_once=3, seen=seen))
    assert [at.spent for at in seen] == list(range(1, len(seen) + 1))
    epochs: dict[str, list[int]] = {}
    for at in seen:
        epochs.setdefault(at.trial, []).append(at.epoch)
    assert all(found == list(range(1, len(found) + 1)) for found in epochs.values())
    assert len(epochs) == 40 and {len(found) for found in epochs.values()} <= {3, 9, 27}
    assert 5 <= len(ends) == sum(len(found) == 27 for found in epochs.values()) < 12
    early, late = (replays.regret_of(replays.world, space, seen, most) for most in (60, len(seen)))
    assert late.whole == 5 > early.whole and late.mean < early.mean
    assert replays.estimate([1.0, 2.0, 3.0]) == "2.00 ± 0.58 (-0.48 to 4.48)"
