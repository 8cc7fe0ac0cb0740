"""Searches replayed over real learning curves (benchmarks/curves-digits.npz), without Ray."""

import dataclasses
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
    module.studies_in_memory()
    module.table = module.load("digits")
    module.world = module.World(module.table)
    module.yardstick = importlib.import_module("yardstick")
    yield module
    sys.path.remove(str(ROOT / "benchmarks"))
    tfkd_ray.run.searcher.open_journal = before  # type: ignore[assignment]


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_replay_spends_what_it_says_and_stops_where_a_sweep_would(replays: Any) -> None:
    space = replays.search_of(replays.table, "random:none", 0, num_samples=10)
    full = list(replays.replay(space, replays.world, most=10**6))
    assert [spent for spent, _ in full] == [27 * (k + 1) for k in range(10)]
    halved = replays.search_of(replays.table, "random:halving", 0, num_samples=60)
    ends = list(replays.replay(halved, replays.world, most=10**6, at_once=2))
    assert 5 <= len(ends) < 40 and ends[-1][0] < 60 * 27 / 2


@pytest.mark.slow
def test_with_a_fifth_of_the_epochs_the_default_loses_less_than_random_search(
    replays: Any,
) -> None:
    default = f"{SearchConfig().sampler}:{SearchConfig().stopping.name}"
    table, world, epochs = replays.table, replays.world, 0.2 * 64 * 27
    lost: dict[str, float] = {}
    for pair in (default, "random:none"):
        trials = replays.yardstick.planned(table, pair, epochs)
        found = []
        for repeat in range(6):
            space, seen = replays.search_of(table, pair, repeat, num_samples=trials), list[Any]()
            replays.run_out(replays.replay(space, world, most=epochs, seen=seen))
            found.append(replays.yardstick.regret_of(world, space, seen, epochs).mean)
        lost[pair] = statistics.mean(found)
    assert lost[default] < 1.0, lost
    assert lost[default] < lost["random:none"], lost


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
    regret_of = replays.yardstick.regret_of
    early, late = (regret_of(replays.world, space, seen, most) for most in (60, len(seen)))
    assert late.whole == 5 > early.whole and late.mean < early.mean


def test_a_prediction_of_the_forest_is_scikit_learns(replays: Any) -> None:
    answer = replays.world._of["tfkd_reg"]
    places = np.random.default_rng(0).random((20, 5))
    found = np.array([answer.predicted(at) for at in places])
    assert np.allclose(found, answer.forest.predict(places), rtol=0, atol=1e-12)


def test_epochs_that_nobody_judges_change_no_replay(
    replays: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    space = replays.search_of(replays.table, "tpe:pausing", 1, num_samples=25)
    runs: list[list[Any]] = []
    for _ in range(2):
        runs.append([])
        replays.run_out(replays.replay(space, replays.world, most=130, at_once=3, seen=runs[-1]))
        monkeypatch.setattr(replays, "Halving", replays.NoStopping)  # now every epoch is told
    assert runs[0] == runs[1]


@pytest.mark.slow
def test_a_model_over_all_objectives_learns_from_the_others_and_one_alone_does_not(
    replays: Any,
) -> None:
    models = importlib.import_module("joint").MODELS
    space = replays.search_of(replays.table, "tpe:pausing", 1, num_samples=25, warm_start=False)

    class Elsewhere(replays.World):  # type: ignore[misc, name-defined]
        """The same curves, but of `lsr` they are reversed."""

        def __init__(self) -> None:
            self.__dict__.update(replays.world.__dict__)

        def curve(self, objective: str, parameters: Any, run: int = 0) -> np.ndarray:
            found: np.ndarray = replays.world.curve(objective, parameters, run)
            return 1 - found if objective == "lsr" else found

    def proposed(model: Any, world: Any) -> dict[str, Any]:
        seen: list[Any] = []
        replays.run_out(replays.replay(space, world, most=75, seen=seen, proposes=model))
        return {at.trial: at.about for at in seen if at.about["objective"] != "lsr"}

    for name, changes in (("own-gp", False), ("joint-gp", True)):
        usual, other = (proposed(models[name], w) for w in (replays.world, Elsewhere()))
        assert len(usual) == 20 and (usual != other) is changes, name


def test_a_published_setting_is_answered_by_its_own_runs_and_known_by_their_mean(
    replays: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replays, "TREES", 2)
    some, about = replays.table, {"optim.lr": 0.1, "optim.weight_decay": 5e-4}
    mine = np.full((3, 27), [[0.99], [0.97], [math.nan]])  # the last one diverged
    table = dataclasses.replace(
        some,
        objective=np.append(some.objective[:100], ["ce"] * 3),
        parameters=[*some.parameters[:100], about, about, about],
        seed=np.append(some.seed[:100], [0, 1, 2]),
        curves=np.vstack([some.curves[:100], mine]),
        published=3,
    )
    world = replays.World(table)
    for run in range(4):
        assert np.array_equal(world.curve("ce", about, run), mine[run % 3], equal_nan=True)
    assert abs(world.known("ce", about) - (0.99 + 0.97 + 0.1) / 3) < 1e-9
    assert world.best["ce"] == max(world._of["ce"].known.max(), world.known("ce", about))
    near = {**about, "optim.lr": 0.101}
    assert (
        world.known("ce", near)
        == world._of["ce"].predicted(np.array(replays.places(world._parameters["ce"], near)))[-1]
    )
    assert all(len(x) == len(curves) < 97 for _, x, curves in replays.runs(table))


def test_the_yardstick_repeats_until_it_knows_and_says_what_misses_the_criterion(
    replays: Any,
) -> None:
    yardstick = replays.yardstick
    assert str(yardstick.estimate([1.0, 2.0, 3.0])) == "2.00 ± 0.58 (-0.48 to 4.48)"
    noise = [0.0, 0.2] * (yardstick.LEAST // 2)
    usual = [yardstick.Regret(1.0, 1.0, 5, 100) for _ in noise]
    less = [yardstick.Regret(0.8 + e, 1.0 + e / 2, 5, 100) for e in noise]
    assert yardstick.is_enough([usual, less], 100)
    assert not yardstick.is_enough([usual[:4], less[:4]], 100)
    wide = [yardstick.Regret(0.8 + 9 * e, 1.0, 5, 100) for e in noise]
    assert not yardstick.is_enough([usual, wide], 100)
    assert yardstick.is_enough([usual, wide], yardstick.LEAST)
    today, candidate = yardstick.PAIRS

    def judged(those: Any) -> list[str]:
        shares = yardstick.SHARES
        by = {today: dict.fromkeys(shares, usual), candidate: dict.fromkeys(shares, those)}
        return list(yardstick.misses(by))

    assert judged(less) == []
    assert len(judged(wide)) == 1 and "mean at 0.2" in judged(wide)[0]
    worse = [yardstick.Regret(0.8, 1.15 + e, 5, 100) for e in noise]
    assert [text.partition(":")[0] for text in judged(worse)] == [
        f"winner at {share}" for share in ("0.2", "0.3", "0.5", "0.9")
    ]
