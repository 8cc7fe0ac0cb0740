"""Pausing halving: the rule alone, and with studies; no deadlock, no trial lost, exact after a kill."""

import math
import os
import random
import signal
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from conftest import long_after
from ray import tune
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from tfkd_ray.learn.checkpoint import LAST
from tfkd_ray.learn.config import TrainConfig
from tfkd_ray.learn.loop import train
from tfkd_ray.run.searcher import OptunaSearcher, StudyStopping, copy_trials
from tfkd_ray.run.stops import Stops
from tfkd_ray.run.studies import Seen
from tfkd_ray.run.tune import build_tuner, resume_tuner
from tfkd_ray.settings.errors import ConfigError
from tfkd_ray.show.plan import lines, plan
from tfkd_ray.show.receipt import expected_epochs
from tfkd_ray.show.status import status, status_lines
from tfkd_ray.space.pausing import Action, Entrant, Ladder, next_action
from tfkd_ray.space.space import Space, build_space
from tfkd_ray.store.experiment import Record, read_experiment, read_records
from tfkd_ray.store.storage import Directory, Experiment

RUNGS = [3, 9]
EPOCHS = 27


class Sweep:
    """A sweep of trials that are numbers, by the rule alone.

    Args:
        of: value of (trial, epoch); None: the trial fails there.
        groups: trial n is in group n modulo this.
    """

    def __init__(
        self,
        of: Callable[[int, int], float | None],
        trials: int,
        *,
        groups: int = 1,
        slots: int = 1,
        factor: int = 3,
    ) -> None:
        self.of, self.trials, self.slots, self.factor = of, trials, slots, factor
        self.groups: list[dict[int, Entrant]] = [{} for _ in range(groups)]
        self.live: dict[int, int] = {}
        self.epochs: Counter[int] = Counter()
        self.promoted: list[tuple[int, int]] = []

    def action(self) -> Action:
        """Return what the rule says now."""
        begun = sum(map(len, self.groups))
        return next_action(
            [group.values() for group in self.groups],
            RUNGS,
            self.factor,
            maximize=True,
            to_start=self.trials - begun,
        )

    def run(self, order: random.Random | None = None) -> "Sweep":
        """Run to the end; with `order`, trials report in a random order."""
        while True:
            while len(self.live) < self.slots and (action := self.action()).what in (
                "start",
                "promote",
            ):
                self._begin(action)
            if not self.live:
                assert self.action().what == "end", "the rule waits, and nothing runs"
                return self
            live = list(self.live)
            self._epoch(order.choice(live) if order else live[0])

    def _begin(self, action: Action) -> None:
        if action.what == "promote":
            n, before = action.number, self.groups[action.number % len(self.groups)]
            assert before[n].state == "paused" and before[n].rung == action.rung
            before[n] = replace(before[n], state="running")
            self.promoted.append((n, action.rung))
            self.live[n] = action.rung
        else:
            n = sum(map(len, self.groups))
            self.groups[n % len(self.groups)][n] = Entrant(n, "running")
            self.live[n] = 0

    def _epoch(self, n: int) -> None:
        group, epoch = self.groups[n % len(self.groups)], self.live[n] + 1
        self.live[n], value = epoch, self.of(n, epoch)
        self.epochs[n] += 1
        if value is None:
            group[n] = replace(group[n], state="over")
        elif epoch == EPOCHS:
            group[n] = replace(group[n], state="whole")
        elif epoch in RUNGS:
            values = {**group[n].values, epoch: value}
            group[n] = replace(group[n], state="paused", values=values, rung=epoch)
        if group[n].state != "running":
            del self.live[n]

    def whole(self) -> list[int]:
        """Return the trials of full length."""
        return [n for group in self.groups for n, e in group.items() if e.state == "whole"]


def drawn(seed: int, *, ties: bool = False, fails: float = 0.0, nan: float = 0.0) -> Any:
    """Return values of trials: random ones, equal for all epochs of a trial or not."""

    def of(n: int, epoch: int) -> float | None:
        g = random.Random(f"{seed} {n} {epoch}")
        if g.random() < fails:
            return None
        if g.random() < nan:
            return math.nan
        return float(g.randrange(3)) if ties else g.random()

    return of


@pytest.mark.slow
def test_200_paused_trials_on_2_slots_never_wait_for_each_other() -> None:
    for seed in range(5):
        sweep = Sweep(drawn(seed), 200, groups=4, slots=2).run(random.Random(seed))
        assert sum(map(len, sweep.groups)) == 200 and not sweep.live
        assert {n % 4 for n in sweep.whole()} == {0, 1, 2, 3}
    together = Sweep(drawn(0), 200, slots=2)  # all pause before anything is promoted
    together.groups[0] = {n: Entrant(n, "paused", {3: float(n)}, 3) for n in range(200)}
    together.run()
    assert {n for n, rung in together.promoted if rung == 3} == set(range(134, 200))


@pytest.mark.parametrize("seed", range(30))
def test_whatever_trials_do_a_sweep_ends_and_the_best_third_of_each_rung_has_gone_on(
    seed: int,
) -> None:
    g = random.Random(seed)
    of = drawn(seed, ties=seed % 3 == 0, fails=g.choice([0, 0.02]), nan=g.choice([0, 0.1]))
    factor, groups = g.choice([2, 3, 4]), g.choice([1, 2, 5])
    trials, slots = g.randrange(1, 40), g.choice([1, 2, 8])
    sweep = Sweep(of, trials, groups=groups, slots=slots, factor=factor).run(g)
    assert max(sweep.epochs.values()) <= EPOCHS, "no epoch is trained twice"
    for group in sweep.groups:
        for rung in RUNGS:
            came = [e for e in group.values() if rung in e.values]
            best = sorted(
                (e for e in came if not math.isnan(e.values[rung])),
                key=lambda e: (-e.values[rung], e.number),
            )[: len(came) // factor]
            assert all(e.state != "paused" or e.rung > rung for e in best)
        waits = [e for e in group.values() if e.state == "paused"]
        hopeful = [e for e in waits if not math.isnan(e.values[e.rung])]
        assert any(e.state == "whole" for e in group.values()) or not hopeful


def test_every_objective_ends_with_a_full_length_trial_however_few_trials_it_has() -> None:
    for trials in range(1, 12):
        sweep = Sweep(drawn(trials), trials, groups=min(trials, 3)).run()
        assert {n % min(trials, 3) for n in sweep.whole()} == set(range(min(trials, 3)))


def test_equal_values_go_on_by_number_and_no_more_than_a_third() -> None:
    for maximize in (True, False):
        ladder = Ladder(1, RUNGS, 3, maximize=maximize)
        for n in range(8):
            ladder.put(0, Entrant(n, "paused", {3: 0.5}, 3))
        assert list(ladder.promotable(0, 3)) == [0, 1]


def test_the_metric_decides_which_way_is_better() -> None:
    group = [Entrant(n, "paused", {3: float(n)}, 3) for n in range(3)]
    for maximize, best in ((True, 2), (False, 0)):
        found = next_action([group], RUNGS, 3, maximize=maximize, to_start=0)
        assert found == Action("promote", best, 3)


def test_a_trial_without_a_value_at_a_rung_never_goes_on_and_counts_there() -> None:
    group = [Entrant(n, "paused", {3: math.nan}, 3) for n in range(5)]
    assert next_action([group], RUNGS, 3, maximize=True, to_start=0) == Action("end")
    group.append(Entrant(5, "paused", {3: 0.0}, 3))
    assert next_action([group], RUNGS, 3, maximize=True, to_start=0) == Action("promote", 5, 3)


def test_where_the_promoted_trial_fails_the_next_best_goes_on() -> None:
    def of(n: int, epoch: int) -> float | None:
        return None if n >= 4 and epoch > 3 else float(n)

    sweep = Sweep(of, 6).run()
    assert sweep.whole() and set(sweep.whole()) <= {0, 1, 2, 3}


def slow_next_action(groups: list[list[Entrant]], maximize: bool) -> Action:
    """Return what the rule says by its definition, looking through all trials at all rungs."""
    sign = -1 if maximize else 1

    def came(group: list[Entrant], rung: int) -> list[Entrant]:
        there = [e for e in group if rung in e.values]
        return sorted(
            there,
            key=lambda e: (math.isnan(e.values[rung]), sign * e.values[rung], e.number),
        )

    def waits(e: Entrant, rung: int) -> bool:
        return e.state == "paused" and e.rung == rung and not math.isnan(e.values[rung])

    for rung in RUNGS:
        for group in groups:
            best = came(group, rung)
            for e in best[: len(best) // 3]:
                if waits(e, rung):
                    return Action("promote", e.number, rung)
    for group in groups:
        if not {"running", "whole"} & {e.state for e in group}:
            for rung in reversed(RUNGS):
                for e in came(group, rung):
                    if waits(e, rung):
                        return Action("promote", e.number, rung)
    running = any(e.state == "running" for group in groups for e in group)
    return Action("wait" if running else "end")


@pytest.mark.parametrize("maximize", [True, False])
def test_the_rule_that_follows_each_change_says_what_its_definition_says(maximize: bool) -> None:
    draw = random.Random(7)
    ladder = Ladder(2, RUNGS, 3, maximize=maximize)
    known: dict[int, Entrant] = {}
    states: list[Any] = ["running", "paused", "paused", "paused", "whole", "over"]
    for _ in range(400):
        n, reached = draw.randrange(30), draw.randrange(len(RUNGS) + 1)
        of = {rung: draw.choice([0.1, 0.2, draw.random(), math.nan]) for rung in RUNGS[:reached]}
        rung = RUNGS[reached - 1] if reached else 0
        known[n] = Entrant(n, draw.choice(states) if reached else "running", of, rung)
        ladder.put(n % 2, known[n])
        groups = [[e for m, e in sorted(known.items()) if m % 2 == g] for g in (0, 1)]
        assert ladder.next_action(0) == slow_next_action(groups, maximize)
        assert ladder.next_action(3) == Action("start")


def test_objectives_are_judged_among_themselves() -> None:
    good = [Entrant(n, "paused", {3: 0.9}, 3) for n in range(3)]
    poor = [Entrant(n, "paused", {3: 0.1}, 3) for n in range(3, 6)]
    found = [next_action([good], RUNGS, 3, maximize=True, to_start=0)]
    found.append(next_action([poor], RUNGS, 3, maximize=True, to_start=0))
    assert found == [Action("promote", 0, 3), Action("promote", 3, 3)]


# --- with studies


def space(**search: Any) -> Space:
    return build_space(
        {
            "student": {"name": "mlp", "hidden": [8]},
            "data": {"name": "digits"},
            "epochs": 9,
            "objective": ["ce", {"name": "lsr", "alpha": {"low": 0.02, "high": 0.4, "log": True}}],
            "optim": {"lr": {"low": 0.01, "high": 1, "log": True}},
            "search": {"num_samples": 16, "stopping": "pausing", **search},
        }
    )


class Driver:
    """Runs trials of a searcher one after another, with Tune's calls, and remembers checkpoints.

    Args:
        dies: raises `Killed` before the k-th call, for every k in turn.
    """

    class Killed(Exception):
        pass

    def __init__(self, journal: Path, at: Space, done: Counter[tuple[int, int]]) -> None:
        self.searcher = OptunaSearcher(at, journal)
        self.stopping = StudyStopping(self.searcher)
        self.stopping.on_trial_add(None, None)
        self.done, self.calls, self.dies_at = done, 0, -1
        self.paused: dict[str, dict[str, Any]] = {}

    def call(self, function: Callable[..., Any], *given: Any) -> Any:
        self.calls += 1
        if self.calls == self.dies_at:
            raise self.Killed
        return function(*given)

    def run(self, dies_at: int = -1) -> list[tuple[int, str]]:
        """Run to the end; return (number, how it went) in order."""
        self.dies_at, events, asked = dies_at, list[tuple[int, str]](), 0
        while True:
            name = self.call(self.searcher.promoted)
            if name:
                config = self.paused.pop(name)
            else:
                name = f"id{asked}"
                config = self.call(self.searcher.suggest, name)
                if config == Searcher.FINISHED:
                    return events
                assert isinstance(config, dict), "one trial at a time, and the search waits"
            asked += 1
            events.append((config["trial"]["number"], self.trial(name, config)))

    def trial(self, name: str, config: dict[str, Any]) -> str:
        about, lr, result = config["trial"], config["optim"]["lr"], dict[str, Any]()
        for epoch in range(1, about["epochs"] + 1):
            self.done[about["number"], epoch] += 1
            result = {"epoch": epoch, "val_accuracy": 1 - abs(lr - 0.1) - 1 / (epoch + 1)}
            told = self.call(self.stopping.on_trial_result, None, _Tuned(name), result)
            self.call(self.searcher.on_trial_result, name, result)
            if told == TrialScheduler.PAUSE:
                self.call(self.searcher.pause, name)
                self.paused[name] = config
                return f"paused at {epoch}"
        self.call(self.searcher.on_trial_complete, name, {**result, "done": True})
        return "whole"


class _Tuned:
    def __init__(self, trial_id: str) -> None:
        self.trial_id = trial_id


def ends(searcher: OptunaSearcher) -> dict[int, tuple[str, float, float]]:
    """Return (state, learning rate, last epoch) of each trial, by number: of its last attempt."""
    found = {}
    for study in searcher.studies():
        for t in study.trials:
            lr = t.params["optim.lr"]
            found[t.user_attrs["number"]] = (t.state.name, lr, t.last_step or 0)
    return found


def test_a_search_pauses_promotes_and_ends_with_every_objective_of_full_length(
    tmp_path: Path,
) -> None:
    driver = Driver(tmp_path / "journal", space(), Counter())
    events = driver.run()
    found = ends(driver.searcher)
    assert len(found) == 16 and {state for state, _, _ in found.values()} == {"PRUNED", "COMPLETE"}
    whole = [n for n, (state, _, _) in found.items() if state == "COMPLETE"]
    assert {n % 2 for n in whole} == {0, 1} and len(whole) < 6
    assert Counter(n for n, _ in events).most_common(1)[0][1] <= 3, "paused twice at most"
    assert driver.searcher.paused() == set() and driver.searcher.next_action().what == "end"


@pytest.mark.slow
@pytest.mark.parametrize("sampler", long_after(1, ["tpe", "random"]))
def test_a_driver_that_dies_at_any_moment_changes_no_trial(tmp_path: Path, sampler: str) -> None:
    at = space(num_samples=10, sampler=sampler)
    whole = Driver(tmp_path / "whole", at, Counter())
    whole.run()
    expected, calls = ends(whole.searcher), whole.calls
    for k in range(1, calls + 1, 5):  # a killed driver's calls are every fifth one
        journal, done = tmp_path / f"killed at {k}", Counter[tuple[int, int]]()
        with pytest.raises(Driver.Killed):
            Driver(journal, at, done).run(dies_at=k)
        resumed = Driver(journal, at, done)
        resumed.run()
        assert ends(resumed.searcher) == expected, k


@pytest.mark.slow
@pytest.mark.long
def test_what_a_search_remembers_of_its_rungs_is_what_its_study_holds(tmp_path: Path) -> None:
    driver = Driver(tmp_path / "journal", space(), Counter())
    checked = 0
    original = driver.call

    def call(function: Callable[..., Any], *given: Any) -> Any:
        nonlocal checked
        found = original(function, *given)
        if driver.calls % 9 == 0:
            checked += 1
            fresh = OptunaSearcher(space(), tmp_path / "journal")
            fresh.waiting()  # reads the study
            kept, read = (
                {
                    n: (searcher._ladder.entrant(g, n).state, searcher._ladder.entrant(g, n).values)
                    for g in (0, 1)
                    for n in searcher._ladder.numbers(g)
                }
                for searcher in (driver.searcher, fresh)
            )
            assert kept == read
        return found

    driver.call = call  # type: ignore[method-assign]
    driver.run()
    assert checked > 5


def test_more_trials_of_an_ended_search_leave_its_paused_trials_as_they_are(
    tmp_path: Path,
) -> None:
    first = Driver(tmp_path / "journal", space(num_samples=12), Counter())
    first.run()
    before = ends(first.searcher)
    second = Driver(tmp_path / "journal", space(num_samples=18), Counter())
    second.run()
    after = ends(second.searcher)
    assert len(after) == 18 and {n: after[n] for n in before} == before


def test_a_paused_trial_that_is_given_up_never_goes_on_also_after_a_kill(tmp_path: Path) -> None:
    at = space(num_samples=3, baselines=False, split=False)
    driver = Driver(tmp_path / "journal", at, Counter())
    rates = {}
    for n, name in enumerate(("a", "b")):
        config = driver.searcher.suggest(name)
        assert isinstance(config, dict) and driver.trial(name, config) == "paused at 1"
        rates[n] = abs(config["optim"]["lr"] - 0.1)
    best = min(rates, key=lambda n: rates[n])
    driver.searcher.end_early(best, {})
    resumed = Driver(tmp_path / "journal", at, Counter())
    resumed.run()
    states = {n: state for n, (state, _, _) in ends(resumed.searcher).items()}
    assert states[best] == "PRUNED" and list(states.values()).count("COMPLETE") == 1


def test_tfkd_stop_gives_up_a_paused_trial_once_the_study_has_it(tmp_path: Path) -> None:
    found, given_up = set[int](), list[set[int]]()
    stops = Stops(Experiment(Directory(tmp_path), "e"))
    stops.searcher = cast(Any, SimpleNamespace(paused=lambda: found, give_up=given_up.append))
    about = {"name": "t0007-ce", "number": 7, "epochs": 9, "parameters": {}}
    trial = SimpleNamespace(trial_id="a", config={"trial": about})
    stops._asked = {"t0007-ce"}
    stops.on_start(trial, {})
    stops.on_step()
    stops.on_pause(trial)
    stops.on_step()
    assert given_up == []
    found.add(7)
    stops.on_step()
    stops.on_step()
    assert given_up == [{7}]


def test_concurrent_trials_are_those_that_run_not_those_that_are_paused(tmp_path: Path) -> None:
    driver = Driver(tmp_path / "journal", space(), Counter())
    searcher = driver.searcher
    assert searcher.set_max_concurrency(1)
    config = searcher.suggest("a")
    assert isinstance(config, dict) and searcher.suggest("b") is None
    assert driver.trial("a", config) == "paused at 1"
    assert isinstance(searcher.suggest("b"), dict)
    assert not OptunaSearcher(space(stopping="halving"), tmp_path / "j").set_max_concurrency(1)


def test_a_sampler_sees_a_trial_once_however_often_it_went_on(tmp_path: Path) -> None:
    driver = Driver(tmp_path / "journal", space(), Counter())
    driver.run()
    for study in driver.searcher.studies():
        seen = Seen(study.directions)
        for trial in study.trials:
            seen.take(trial)
        numbers = [t.user_attrs["number"] for t in seen.trials()]
        all_numbers = [t.user_attrs["number"] for t in study.trials]
        assert len(numbers) == len(set(numbers)) == len(set(all_numbers)) < len(all_numbers)
        assert any(t.state.name == "COMPLETE" for t in seen.trials())


def test_pausing_is_refused_where_trials_cannot_be_resumed_or_there_are_several_metrics(
    tmp_path: Path,
) -> None:
    with pytest.raises(ConfigError, match="pausing judges by one metric"):
        space(metric=["val_accuracy", "val_ece"])
    with pytest.raises(ConfigError, match="pausing needs num_samples"):
        space(num_samples=None, time_budget_s=60)
    with pytest.raises(ConfigError, match="pausing needs trials of this package"):
        OptunaSearcher(
            {"x": tune.uniform(0, 1)}, tmp_path / "j", epochs=9, search={"stopping": "pausing"}
        )
    with pytest.raises(ConfigError, match="pausing, which is a scheduler of its own"):
        build_tuner(
            space(), storage=tmp_path, tune_config=tune.TuneConfig(scheduler=FIFOScheduler())
        )
    assert not list(tmp_path.iterdir())


def test_with_another_scheduler_nothing_pauses(tmp_path: Path) -> None:
    searcher = OptunaSearcher(space(), tmp_path / "journal")
    assert isinstance(searcher.suggest("a"), dict)
    for epoch in range(1, 10):
        searcher.on_trial_result("a", {"epoch": epoch, "val_accuracy": 0.5})
    searcher.on_trial_complete("a", {"epoch": 9, "val_accuracy": 0.5, "done": True})
    (trial,) = searcher.studies()[0].trials
    assert trial.state.name == "COMPLETE" and list(trial.intermediate_values) == [1, 3, 9]


def test_a_saved_and_restored_searcher_knows_which_of_rays_trials_are_paused(
    tmp_path: Path,
) -> None:
    driver = Driver(
        tmp_path / "journal", space(num_samples=2, baselines=False, split=False), Counter()
    )
    for name in ("a", "b"):
        assert driver.trial(name, driver.searcher.suggest(name)) == "paused at 1"  # type: ignore[arg-type]
    driver.searcher.save(str(tmp_path / "saved"))
    restored = OptunaSearcher(driver.searcher.space, tmp_path / "journal")  # type: ignore[arg-type]
    restored.restore(str(tmp_path / "saved"))
    assert restored.suggest("c") is None, "the scheduler promotes what Ray knows"
    assert restored.promoted() in ("a", "b")


@pytest.mark.slow
def test_a_wider_space_keeps_what_is_paused_and_what_is_over(tmp_path: Path) -> None:
    first = Driver(tmp_path / "journal", space(num_samples=12), Counter())
    first.run()
    wider = OptunaSearcher(space(num_samples=12), tmp_path / "wider", study="tfkd@2")
    copy_trials(first.searcher, wider)
    assert wider.paused() == set() and wider.next_action().what == "end"
    half = Driver(tmp_path / "half", space(num_samples=12), Counter())
    with pytest.raises(Driver.Killed):
        half.run(dies_at=30)
    paused = OptunaSearcher(space(num_samples=12), tmp_path / "half")
    paused.waiting()
    wider = OptunaSearcher(space(num_samples=12), tmp_path / "wider of it", study="tfkd@2")
    copy_trials(paused, wider)
    wider.waiting()
    assert wider.paused() == paused.paused() != set()


def test_a_plan_says_from_where_to_where_and_a_sweep_takes_what_it_says() -> None:
    found = plan(space(num_samples=24))
    assert [(p.trials, p.least, p.most) for p in found.parts] == [(12, 12 + 2 * 4 + 6, 108)] * 2
    span = "in all from 52 epochs (one trial at a time, none failed) to 216; without"
    assert any(span in line for line in lines(found))
    whole = build_space({**TREE, "epochs": EPOCHS, "search": {"stopping": "pausing"}})
    for trials in (1, 2, 3, 10, 60):
        for slots in (1, 2, 8):
            sweep = Sweep(drawn(trials), trials, slots=slots).run(random.Random(0))
            trained, expected = sum(sweep.epochs.values()), expected_epochs(whole, trials)
            assert trained == expected if slots == 1 else expected <= trained <= trials * EPOCHS


def test_all_trials_begin_before_the_first_goes_on_and_then_the_best_third_alone_does() -> None:
    sweep = Sweep(drawn(0), 60).run()
    values = {n: drawn(0)(n, 3) for n in range(60)}
    best = sorted(values, key=lambda n: -values[n])[:20]
    assert [n for n, rung in sweep.promoted[:20]] == best
    assert [rung for _, rung in sweep.promoted] == [3] * 20 + [9] * 6


# --- on Ray

TREE: dict[str, Any] = {
    "student": {"name": "mlp", "hidden": [8]},
    "epochs": 9,
    "checkpoint_every_s": 1000,
    "objective": "ce",
    "optim": {"lr": {"low": 0.01, "high": 0.5, "log": True}},
    "search": {"num_samples": 9, "stopping": "pausing", "sampler": "random", "max_concurrent": 2},
}


class Watch(tune.Callback):  # type: ignore[misc]
    """Counts starts of trials, and the most that ran or were paused at a time.

    Args:
        harm: called once with the checkpoint of each trial that has paused.
    """

    def __init__(self, harm: Callable[[Path], Any]) -> None:
        self.harm, self.harmed = harm, set[Path]()
        self.starts: Counter[int] = Counter()
        self.most = {"RUNNING": 0, "PAUSED": 0}
        self.results: Counter[tuple[int, int]] = Counter()

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.starts[trial.config["trial"]["number"]] += 1

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        for what in self.most:
            now = sum(t.status == what for t in trials)
            self.most[what] = max(self.most[what], now)
        for trial in trials:
            path = Path(trial.config["trial"]["directory"]) / LAST
            if trial.status == "PAUSED" and path not in self.harmed:
                self.harmed.add(path)
                self.harm(path)


def metrics_of(records: list[Record]) -> dict[int, list[dict[str, float]]]:
    """Return the metrics of trials by number, without times."""
    times = ("seconds", "images_per_s")
    return {
        r.number: [{k: v for k, v in m.items() if k not in times} for m in r.metrics]
        for r in records
    }


def whole_run(config: dict[str, Any]) -> list[dict[str, float]]:
    """Return the metrics of a configuration that was never paused."""
    times = ("seconds", "images_per_s")
    epochs = train(TrainConfig.model_validate(config))
    return [{k: v for k, v in e.metrics.items() if k not in times} for e in epochs]


HARM: dict[str, Callable[[Path], Any]] = {
    "kept": lambda path: path.exists() or pytest.fail("a paused trial has no checkpoint"),
    "gone": Path.unlink,
    "damaged": lambda path: path.write_bytes(b"no checkpoint"),
}


@pytest.mark.ray
@pytest.mark.parametrize("checkpoint", long_after(2, HARM))
def test_a_paused_trial_goes_on_bit_by_bit_also_without_its_checkpoint_and_all_end(
    ray_cluster: str, tmp_path: Path, checkpoint: str
) -> None:
    watch, notes = Watch(HARM[checkpoint]), list[str]()
    tuner = build_tuner(TREE, name="e", storage=tmp_path, callbacks=[watch], on_note=notes.append)
    grid = tuner.fit()
    records = read_records(tmp_path / "e")
    assert len(grid) == 9 and grid.num_errors == 0, "one trial of Ray's for each"
    assert Counter(r.status for r in records) == {
        "stopped": 9 - len(done(records)),
        "done": len(done(records)),
    }
    assert done(records) and max(watch.starts.values()) >= 2
    assert watch.most["PAUSED"] >= 2 and watch.most["RUNNING"] <= 2
    for record in records:
        expected = whole_run(record.config)
        assert metrics_of([record])[record.number] == expected[: len(record.metrics)]
        assert len(record.metrics) in (1, 3, 9)
        left = {p.name for p in record.folder.iterdir()}
        kept = {"trial.json", "metrics.jsonl", "result.json"}
        assert left == kept | ({"student.safetensors"} if record.status == "done" else set())
    again = [name for name in (r.name for r in records) if watch.starts[int(name[1:5])] > 1]
    said = {
        note.partition(":")[0] for note in notes if "is missing or damaged; it trains again" in note
    }
    assert said == (set() if checkpoint == "kept" else set(again))


def done(records: list[Record]) -> list[Record]:
    return [r for r in records if r.status == "done"]


@pytest.mark.ray
def test_a_sweep_that_ends_with_all_paused_names_the_best_of_the_highest_rung_and_goes_on(
    ray_cluster: str, tmp_path: Path
) -> None:
    search = {**TREE["search"], "max_concurrent": 1}
    whole = build_tuner({**TREE, "search": search}, name="whole", storage=tmp_path)
    whole.fit()
    expected = metrics_of(read_records(tmp_path / "whole"))

    class Stop(tune.Callback):  # type: ignore[misc]
        """Ends the sweep when three trials have begun, and none runs."""

        def __init__(self) -> None:
            self.over = False

        def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
            self.over = len(trials) >= 3 and all(t.status != "RUNNING" for t in trials)

    class Over(tune.Stopper):  # type: ignore[misc]
        def __init__(self, of: Stop) -> None:
            self.of = of

        def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
            return False

        def stop_all(self) -> bool:
            return self.of.over

    stop = Stop()
    build_tuner(
        {**TREE, "search": search},
        name="e",
        storage=tmp_path,
        callbacks=[stop],
        run_config=tune.RunConfig(stop=Over(stop)),
    ).fit()
    experiment = tmp_path / "e"
    paused = [r for r in read_records(experiment) if r.status == "paused"]
    assert paused and not done(read_records(experiment))
    best = max(paused, key=lambda r: (r.last["epoch"], r.last["val_accuracy"]))
    found = status(experiment)
    assert found["state"] == "interrupted" and found["trials"]["paused"] == len(paused)
    assert found["ahead"]["trial"] == best.name
    said = f"best of the highest rung: {best.name}, val_accuracy {best.last['val_accuracy']:.4f}"
    assert any(line.startswith(said) for line in status_lines(found))
    assert all((record.folder / LAST).exists() for record in paused)
    resume_tuner(experiment).fit()
    records = read_records(experiment)
    assert metrics_of(records) == expected
    assert {r.status for r in records} == {"done", "stopped"}
    assert not list(experiment.glob("trials/*/*.ckpt"))


class Killer(tune.Callback):  # type: ignore[misc]
    """Kills a trial's process when it has reported the rung at which it pauses, once each."""

    def __init__(self) -> None:
        self.killed, self.lost = set[str](), 0

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        if result.get("epoch") in (1, 3) and trial.trial_id not in self.killed:
            self.killed.add(trial.trial_id)
            os.kill(result["pid"], signal.SIGKILL)

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.lost += 1


@pytest.mark.ray
def test_a_trial_whose_process_is_lost_while_it_pauses_pauses_again(
    ray_cluster: str, tmp_path: Path
) -> None:
    killer = Killer()
    search = {**TREE["search"], "num_samples": 4}
    grid = build_tuner(
        {**TREE, "search": search}, name="e", storage=tmp_path, callbacks=[killer]
    ).fit()
    records = read_records(tmp_path / "e")
    assert len(grid) == 4 and grid.num_errors == 0 and killer.lost == 4
    assert {r.status for r in records} == {"done", "stopped"}
    for record in records:
        expected = whole_run(record.config)
        assert metrics_of([record])[record.number] == expected[: len(record.metrics)]


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(300)
def test_trials_of_several_workers_pause_and_go_on(ray_cluster: str, tmp_path: Path) -> None:
    def swept(stopping: str) -> list[Record]:
        search = {**TREE["search"], "stopping": stopping, "num_samples": 8, "max_concurrent": 1}
        tree = {**TREE, "workers": 2, "search": search}
        build_tuner(tree, name=stopping, storage=tmp_path).fit()
        return read_records(tmp_path / stopping)

    whole, records = metrics_of(swept("none")), swept("pausing")
    assert done(records) and len(done(records)) < 5
    for record in records:
        epochs = metrics_of([record])[record.number]
        assert epochs == whole[record.number][: len(epochs)]
    study = OptunaSearcher(
        build_space(read_experiment(tmp_path / "pausing")["space"]),
        tmp_path / "pausing" / "study.journal",
    )
    attempts = [t.user_attrs["number"] for s in study.studies() for t in s.trials]
    assert len(attempts) > len(set(attempts)), "one of them paused and went on"
