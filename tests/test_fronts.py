"""Early stopping with several metrics: ranks by fronts, and exact after a kill."""

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher

from tfkd_ray.run.searcher import OptunaSearcher, StudyStopping
from tfkd_ray.settings.errors import ConfigError
from tfkd_ray.show.receipt import fidelity_warnings
from tfkd_ray.space.fronts import by_fronts, goes_on
from tfkd_ray.space.space import Space, build_space


def fronts_of(values: np.ndarray) -> list[set[int]]:
    """Return the fronts by their definition, one pair after another."""
    left, found = set(range(len(values))), list[set[int]]()
    while left:
        front = {
            i
            for i in left
            if not any(
                all(values[j] >= values[i]) and any(values[j] > values[i]) for j in left - {i}
            )
        }
        found.append(front)
        left -= front
    return found


@pytest.mark.parametrize("metrics", [1, 2, 3])
def test_no_trial_of_a_later_front_comes_before_one_of_an_earlier(metrics: int) -> None:
    rng = np.random.default_rng(metrics)
    for n in (1, 2, 7, 30):
        values = rng.integers(0, 6, (n, metrics)).astype(float)
        order = by_fronts(values)
        assert sorted(order) == list(range(n))
        places = {trial: place for place, trial in enumerate(order)}
        first = 0
        for front in fronts_of(values):
            assert {places[trial] for trial in front} == set(range(first, first + len(front)))
            first += len(front)


def test_with_one_metric_it_is_the_order_of_its_values() -> None:
    values = np.array([[0.3], [0.9], [0.1], [0.9], [0.5]])
    assert by_fronts(values) == [1, 3, 4, 0, 2]


def test_the_first_of_a_front_is_a_compromise_and_the_next_are_its_ends() -> None:
    front = np.array([[0.0, 1.0], [0.5, 0.6], [0.55, 0.55], [1.0, 0.0]])
    assert by_fronts(front)[0] in (1, 2) and set(by_fronts(front)[1:3]) == {0, 3}
    assert by_fronts(front * [1, 1000]) == by_fronts(front), "whatever their units"


def test_a_trial_without_a_value_comes_last_and_does_not_go_on_beside_others() -> None:
    values = np.array([[np.nan, 1.0], [0.1, 0.1], [0.2, np.inf]])
    assert by_fronts(values) == [1, 0, 2]
    assert not goes_on(values, 3) and goes_on(values[:2], 3) and goes_on(values[:1], 3)


def test_the_best_third_goes_on_by_the_trials_that_came_so_far() -> None:
    rng = np.random.default_rng(0)
    values = rng.random((90, 2))
    passed = [n for n in range(1, 91) if goes_on(values[:n], 3)]
    assert 25 < len(passed) < 50, "a third, and some more as the first ones are judged by few"
    for n in range(1, 91, 7):
        place = by_fronts(values[:n]).index(n - 1)
        assert (n in passed) == (place < max(1, n // 3))
    beaten = np.array([[0.5, 0.5]] * 3 + [[0.4, 0.4]])
    assert not goes_on(beaten, 3)


# --- with studies

EPOCHS = 9


def space(**search: Any) -> Space:
    return build_space(
        {
            "student": {"name": "mlp", "hidden": [8]},
            "data": {"name": "digits"},
            "epochs": EPOCHS,
            "objective": "ce",
            "optim": {"lr": {"low": 0.01, "high": 1, "log": True}},
            "search": {
                "num_samples": 12,
                "metric": ["val_accuracy", "val_ece"],
                "sampler": "random",
                "stopping": "halving",
                **search,
            },
        }
    )


class Killed(Exception):
    pass


class Driver:
    """Runs trials one after another with Tune's calls; dies before the k-th."""

    def __init__(self, journal: Path, at: Space, dies_at: int = -1) -> None:
        self.searcher = OptunaSearcher(at, journal)
        self.stopping = StudyStopping(self.searcher)
        self.stopping.on_trial_add(None, None)
        self.calls, self.dies_at = 0, dies_at
        self.epochs: dict[int, int] = {}

    def call(self, function: Any, *given: Any) -> Any:
        self.calls += 1
        if self.calls == self.dies_at:
            raise Killed
        return function(*given)

    def run(self) -> "Driver":
        while True:
            config = self.call(self.searcher.suggest, "a")
            if config == Searcher.FINISHED:
                return self
            number, noise = config["trial"]["number"], random.Random(config["trial"]["number"])
            for epoch in range(1, EPOCHS + 1):
                self.epochs[number] = epoch
                result = {"epoch": epoch, "val_accuracy": noise.random(), "val_ece": noise.random()}
                trial = SimpleNamespace(trial_id="a")
                told = self.call(self.stopping.on_trial_result, None, trial, result)
                self.call(self.searcher.on_trial_result, "a", result)
                if told == TrialScheduler.STOP:
                    break
            done = {"done": True} if epoch == EPOCHS else {}
            self.call(self.searcher.on_trial_complete, "a", {**result, **done})


def ends(searcher: OptunaSearcher) -> dict[int, Any]:
    (study,) = searcher.studies()
    return {t.user_attrs["number"]: (t.state.name, t.values, t.user_attrs) for t in study.trials}


def test_halving_stops_trials_that_are_behind_in_all_metrics(tmp_path: Path) -> None:
    driver = Driver(tmp_path / "j", space()).run()
    found = ends(driver.searcher)
    stopped = [n for n, (state, _, _) in found.items() if state == "PRUNED"]
    assert 4 <= len(stopped) < 12 and {driver.epochs[n] for n in stopped} <= {1, 3}
    came = [about["at epoch 1"]["values"] for _, _, about in found.values()]
    for n, (_, _, about) in found.items():
        ranks = np.array(came[: n + 1]) * [1, -1]
        assert about["at epoch 1"]["goes_on"] == goes_on(ranks, 3)
    assert all(values for state, values, _ in found.values() if state == "COMPLETE")


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_a_driver_that_dies_at_any_moment_changes_no_decision(tmp_path: Path, sampler: str) -> None:
    at = space(num_samples=6, sampler=sampler)
    whole = Driver(tmp_path / "whole", at).run()
    expected = ends(whole.searcher)
    for k in range(2, whole.calls + 1, 7):
        with pytest.raises(Killed):
            Driver(tmp_path / f"{k}", at, dies_at=k).run()
        assert ends(Driver(tmp_path / f"{k}", at).run().searcher) == expected, k


@pytest.mark.parametrize("stopping", ["pausing", "hyperband", "median", "asha"])
def test_other_rules_judge_by_one_metric_and_say_so(stopping: str) -> None:
    with pytest.raises(ConfigError, match=f"{stopping} judges by one metric.*halving, or none"):
        space(stopping=stopping, num_samples=60)


def test_several_metrics_stop_nothing_unless_it_is_asked_for() -> None:
    tree = space().tree
    found = build_space({**tree, "search": {"metric": ["val_accuracy", "val_ece"]}})
    assert found.stopping.name == "none" and build_space(found.tree).stopping.name == "none"
    assert space().stopping.name == "halving"


def test_a_receipt_does_not_judge_rungs_of_several_metrics_by_one() -> None:
    assert fidelity_warnings(space(), []) == []
