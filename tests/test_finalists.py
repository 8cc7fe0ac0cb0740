"""Further seeds for finalists: who gets them, what they count for, and that a kill changes nothing."""

import io
import json
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray import tune
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher
from rich.console import Console

from tfkd_ray.cli.main import main
from tfkd_ray.run.callbacks import failed_names, spent_so_far
from tfkd_ray.run.priors import prior_trials
from tfkd_ray.run.searcher import OptunaSearcher, StudyStopping, copy_trials
from tfkd_ray.run.tune import build_tuner, resume_tuner
from tfkd_ray.settings.errors import ConfigError
from tfkd_ray.settings.yaml import dump_yaml
from tfkd_ray.show import tensorboard
from tfkd_ray.show.chosen import choose
from tfkd_ray.show.figures import read_sweep, trial_value
from tfkd_ray.show.live import Progress
from tfkd_ray.show.plan import lines, plan
from tfkd_ray.show.receipt import receipt, receipt_rows
from tfkd_ray.show.report import report
from tfkd_ray.show.status import best_lines, front_of, read_lasts, read_plan, status, status_lines
from tfkd_ray.show.trials import folder_of_trial, trials_table
from tfkd_ray.space.arms import arms_of
from tfkd_ray.space.finalists import Candidate, finalists
from tfkd_ray.space.space import Space, build_space
from tfkd_ray.store.experiment import (
    Record,
    best,
    gone_trials,
    pareto,
    ranked_trials,
    read_record,
    read_records,
    write_experiment,
    write_record,
)

EPOCHS = 9
TREE: dict[str, Any] = {
    "student": {"name": "mlp", "hidden": [8]},
    "data": {"name": "digits"},
    "epochs": EPOCHS,
    "objective": ["ce", {"name": "tfkd_reg", "alpha": {"low": 0.1, "high": 0.9}}],
    "optim": {"lr": {"low": 0.01, "high": 1, "log": True}},
}


def space(**search: Any) -> Space:
    usual = {"num_samples": 12, "baselines": False, "finalists": {"k": 2, "seeds": 3}}
    search = {**usual, **search}
    return build_space({**TREE, "search": search})


# --- who gets them


def test_the_best_of_each_objective_are_finalists_those_that_meet_constraints_first() -> None:
    found = [
        Candidate(0, "ce", 0.9, True),
        Candidate(1, "ce", 0.95, False),
        Candidate(2, "ce", 0.9, True),
        Candidate(3, "tfkd_reg", 0.5, True),
        Candidate(4, "ce", 0.8, True),
    ]
    assert finalists(found, 2, maximize=True) == [0, 2, 3]
    assert finalists(found, 2, maximize=False) == [3, 4, 0]
    assert finalists(found, 4, maximize=True) == [0, 2, 4, 3, 1]
    assert finalists([], 3, maximize=True) == []


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "k above the trials": ({"finalists": {"k": 7}}, "finalists.k: 7, and an objective gets 6 trials"),
    "no seeds": ({"finalists": {"seeds": 0}}, "finalists.seeds: should be at least 1, got 0"),
    "no finalists": ({"finalists": {"k": 0}}, "finalists.k: should be at least 1, got 0"),
    "a word that is not there": ({"finalists": {"seed": 3}}, "finalists.seed: .*did you mean 'seeds'"),
    "several metrics": (
        {"metric": ["val_accuracy", "val_ece"], "stopping": "none"},
        "finalists: finalists are ranked by one metric, and there are 2",
    ),
    "until a budget is spent": (
        {"num_samples": None, "time_budget_s": 60},
        "finalists: with num_samples: null, .* set num_samples",
    ),
    "Ray's own scheduler": ({"stopping": "asha"}, "finalists: asha, .* would stop runs"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_finalists_that_cannot_be_are_refused_with_a_way_out(case: str) -> None:
    search, words = REFUSED[case]
    with pytest.raises(ConfigError, match=words):
        space(**search)


def test_finalists_need_trials_of_this_package_and_no_scheduler_of_a_users_own(
    tmp_path: Path,
) -> None:
    with pytest.raises(ConfigError, match=r"search\.finalists: no setting of a search in a Tuner"):
        OptunaSearcher(
            {"x": tune.uniform(0, 1)}, tmp_path / "j", epochs=9, search={"finalists": {"k": 1}}
        )
    with pytest.raises(ConfigError, match="whose runs with further seeds a scheduler of yours"):
        build_tuner(
            space(), storage=tmp_path, tune_config=tune.TuneConfig(scheduler=FIFOScheduler())
        )
    assert not list(tmp_path.iterdir())


# --- with studies

Value = Callable[[Mapping[str, Any], int], float]


def by_lr(config: Mapping[str, Any], epoch: int) -> float:
    """Return a value that depends on the learning rate, and a little on the seed."""
    noise = ((config["seed"] * 7 + config["trial"]["number"] * 3) % 11) / 1000
    return float(1 - abs(config["optim"]["lr"] - 0.1) - 1 / (epoch + 1) + noise)


class Driver:
    """Runs trials of a searcher with Tune's calls, `slots` at a time.

    Args:
        fails: names of trials that fail after an epoch.
        in_further: dies in the second epoch of the first run with a further seed.
    """

    class Killed(Exception):
        pass

    def __init__(
        self,
        journal: Path,
        at: Space,
        *,
        slots: int = 1,
        fails: tuple[str, ...] = (),
        in_further: bool = False,
    ) -> None:
        self.searcher = OptunaSearcher(at, journal)
        self.stopping = StudyStopping(self.searcher)
        self.stopping.on_trial_add(None, None)
        self.slots, self.fails, self.in_further = slots, fails, in_further
        self.calls, self.dies_at, self.asked = 0, -1, 0
        self.live: dict[str, tuple[dict[str, Any], int]] = {}
        self.paused: dict[str, tuple[dict[str, Any], int]] = {}
        self.begun: list[dict[str, Any]] = []

    def call(self, function: Callable[..., Any], *given: Any) -> Any:
        self.calls += 1
        if self.calls == self.dies_at:
            raise self.Killed
        return function(*given)

    def run(self, dies_at: int = -1) -> "Driver":
        self.dies_at, is_open = dies_at, True
        while is_open or self.live:
            while is_open and len(self.live) < self.slots:
                if name := self.call(self.searcher.promoted):
                    self.live[name] = self.paused.pop(name)
                    continue
                config = self.call(self.searcher.suggest, f"id{self.asked}")
                if not isinstance(config, dict):
                    is_open = config != Searcher.FINISHED
                    assert self.live or not is_open, "the search waits, and nothing runs"
                    break
                self.begun.append(config)
                self.live[f"id{self.asked}"] = config, 0
                self.asked += 1
            for name in list(self.live):
                self.epoch(name)
        return self

    def epoch(self, name: str) -> None:
        config, before = self.live[name]
        epoch = before + 1
        self.live[name] = config, epoch
        if self.in_further and "seed_of" in config["trial"] and epoch == 2:
            raise self.Killed
        result = {"epoch": epoch, "val_accuracy": by_lr(config, epoch)}
        if config["trial"]["name"] in self.fails:
            self.call(self.searcher.on_trial_complete, name, {"failed": "broke", "done": True})
            del self.live[name]
            return
        told = self.call(
            self.stopping.on_trial_result, None, SimpleNamespace(trial_id=name), result
        )
        self.call(self.searcher.on_trial_result, name, result)
        if told == TrialScheduler.PAUSE:
            self.call(self.searcher.pause, name)
            self.paused[name] = self.live.pop(name)
        elif told == TrialScheduler.STOP or epoch == EPOCHS:
            done = {"done": True} if epoch == EPOCHS else {}
            self.call(self.searcher.on_trial_complete, name, {**result, **done})
            del self.live[name]

    @property
    def further(self) -> list[dict[str, Any]]:
        """Configurations of the runs with further seeds, as they began."""
        return [config for config in self.begun if "seed_of" in config["trial"]]


def ends(searcher: OptunaSearcher) -> dict[str, tuple[str, tuple[float, ...] | None]]:
    """Return (state, values) of the last attempt of each trial and run, by name."""
    studies = [*searcher.studies(), searcher.optuna_further()]
    trials = [trial for study in studies for trial in study.trials]
    return {t.user_attrs["name"]: (t.state.name, t.values and tuple(t.values)) for t in trials}


STOPPINGS = ("none", "halving", "pausing", "hyperband", {"name": "median", "startup": 2})


@pytest.mark.slow
@pytest.mark.parametrize("stopping", STOPPINGS, ids=str)
def test_the_best_two_of_each_objective_get_three_seeds_of_full_length_and_change_no_proposal(
    tmp_path: Path, stopping: Any
) -> None:
    plain = space(stopping=stopping, num_samples=16, finalists=None)
    before = Driver(tmp_path / "plain", plain).run()
    driver = Driver(tmp_path / "journal", space(stopping=stopping, num_samples=16)).run()
    asked = [config for config in driver.begun if "seed_of" not in config["trial"]]
    assert asked == before.begun, "the search itself is as without finalists"
    ended = ends(driver.searcher)
    values: dict[str, dict[str, float]] = {"ce": {}, "tfkd_reg": {}}
    for config in asked:
        state, value = ended[config["trial"]["name"]]
        if state == "COMPLETE" and value:
            values[config["objective"]["name"]][config["trial"]["name"]] = value[0]
    chosen = {n for of in values.values() for n in sorted(of, key=lambda n: -of[n])[:2]}
    assert chosen == {config["trial"]["seed_of"] for config in driver.further}
    base = {config["trial"]["name"]: config for config in asked}
    for config in driver.further:
        about = config["trial"]
        first = base[about["seed_of"]]
        same = {k: v for k, v in config.items() if k not in ("seed", "trial")}
        assert same == {k: v for k, v in first.items() if k not in ("seed", "trial")}
        assert about["parameters"] == first["trial"]["parameters"] and about["seeds"] == 3
        assert about["name"] == f"{about['seed_of']}-seed{config['seed']}"
        assert ended[about["name"]] == ("COMPLETE", (by_lr(config, EPOCHS),))
    seeds = Counter((c["trial"]["seed_of"], c["seed"]) for c in driver.further)
    assert seeds == {(name, seed): 1 for name in chosen for seed in (1, 2, 3)}
    numbered = [t.user_attrs["number"] for s in driver.searcher.studies() for t in s.trials]
    assert set(numbered) == set(range(16)), "no further seed is in a sampler's study"


def test_where_the_search_chooses_objectives_each_of_them_has_finalists(tmp_path: Path) -> None:
    driver = Driver(tmp_path / "j", space(split=False, stopping="none", sampler="random")).run()
    found = Counter(c["trial"]["seed_of"].partition("-")[2] for c in driver.further)
    assert found == {"ce": 6, "tfkd_reg": 6}


@pytest.mark.parametrize("stopping", ["halving", "pausing"])
def test_with_many_slots_no_seed_runs_before_all_trials_of_its_objective_have_ended(
    tmp_path: Path, stopping: str
) -> None:
    driver = Driver(tmp_path / "journal", space(stopping=stopping, num_samples=16), slots=5)
    original = driver.call

    def call(function: Callable[..., Any], *given: Any) -> Any:
        config = original(function, *given)
        if function == driver.searcher.suggest and isinstance(config, dict):
            about, objective = config["trial"], config["objective"]["name"]
            if "seed_of" in about:
                busy = [c for c, _ in driver.live.values() if "seed_of" not in c["trial"]]
                assert all(c["objective"]["name"] != objective for c in busy)
        return config

    driver.call = call  # type: ignore[method-assign]
    driver.run()
    assert len(driver.further) >= 6


@pytest.mark.slow
@pytest.mark.parametrize("stopping", ["halving", "pausing"])
def test_a_driver_that_dies_at_any_moment_changes_no_finalist_and_no_value(
    tmp_path: Path, stopping: str
) -> None:
    at = space(stopping=stopping, num_samples=6, finalists={"k": 1, "seeds": 2}, sampler="random")
    whole = Driver(tmp_path / "whole", at).run()
    expected, calls = ends(whole.searcher), whole.calls
    for k in range(2, calls + 1, 23):
        journal = tmp_path / f"killed at {k}"
        with pytest.raises(Driver.Killed):
            Driver(journal, at).run(dies_at=k)
        assert ends(Driver(journal, at).run().searcher) == expected, k


def test_a_journal_cut_after_any_line_of_the_further_seeds_goes_on_to_the_same_end(
    tmp_path: Path,
) -> None:
    at = space(num_samples=4, finalists={"k": 1, "seeds": 2}, sampler="random", stopping="none")
    whole = Driver(tmp_path / "whole", at).run()
    expected = ends(whole.searcher)
    whole.searcher.close()
    written = (tmp_path / "whole").read_bytes().splitlines(keepends=True)
    first = next(k for k, line in enumerate(written) if b"-seed1" in line)
    for k in range(first - 1, len(written), 9):
        journal = tmp_path / f"cut at {k}"
        journal.write_bytes(b"".join(written[:k]))
        assert ends(Driver(journal, at).run().searcher) == expected, k


@pytest.mark.slow
def test_more_trials_bring_new_finalists_and_leave_those_that_there_are(tmp_path: Path) -> None:
    first = Driver(tmp_path / "j", space(stopping="none", num_samples=4)).run()
    before = ends(first.searcher)
    again = Driver(tmp_path / "j", space(stopping="none", num_samples=24)).run()
    after = ends(again.searcher)
    assert {name: after[name] for name in before} == before
    runs = [name for name in after if "-seed" in name]
    assert again.further and len(runs) == len(first.further) + len(again.further)
    assert {c["trial"]["name"] for c in again.further}.isdisjoint(before)


def test_a_seed_that_fails_is_no_trial_that_fails_and_is_retried_when_asked(tmp_path: Path) -> None:
    at = space(stopping="none", num_samples=4, finalists={"k": 1, "seeds": 2})
    names = [c["trial"]["name"] for c in Driver(tmp_path / "plain", at).run().further]
    broken = Driver(tmp_path / "j", at, fails=(names[0],)).run()
    assert ends(broken.searcher)[names[0]][0] == "FAIL"
    assert len(broken.further) == 4, "the others run"
    assert Driver(tmp_path / "j", at).run().begun == [], "not without being asked"
    retried = Driver(tmp_path / "j", at)
    assert retried.searcher.retry_failed() == 1
    assert retried.searcher.waiting_names() == {names[0]}
    retried.run()
    assert [c["trial"]["name"] for c in retried.begun] == [names[0]]
    assert ends(retried.searcher)[names[0]][0] == "COMPLETE"


def test_a_seed_that_is_stopped_while_no_driver_runs_is_not_proposed_again(tmp_path: Path) -> None:
    at = space(stopping="none", num_samples=4, finalists={"k": 1, "seeds": 2})
    driver = Driver(tmp_path / "j", at, in_further=True)
    with pytest.raises(Driver.Killed):
        driver.run()
    name = driver.further[0]["trial"]["name"]
    left = OptunaSearcher(at, tmp_path / "j")
    assert left.waiting_names() == {name} and name in left.names()
    left.end_early(0, {}, name=name)
    left.close()
    resumed = Driver(tmp_path / "j", at).run()
    assert len(resumed.further) == 3
    assert ends(resumed.searcher)[name][0] == "PRUNED"


def test_a_saved_and_restored_searcher_goes_on_with_the_seeds_that_tune_runs(
    tmp_path: Path,
) -> None:
    at = space(stopping="none", num_samples=2, finalists={"k": 1, "seeds": 2})
    driver = Driver(tmp_path / "j", at, slots=9)
    while not driver.further:
        name = f"id{driver.asked}"
        config = driver.searcher.suggest(name)
        if isinstance(config, dict):
            driver.begun.append(config)
            driver.live[name] = config, 0
            driver.asked += 1
        elif driver.live:
            for live in list(driver.live):
                driver.epoch(live)
    (name,) = driver.live
    driver.searcher.save(str(tmp_path / "saved"))
    restored = OptunaSearcher(at, tmp_path / "j")
    restored.restore(str(tmp_path / "saved"))
    other = restored.suggest("other")
    assert isinstance(other, dict) and other["trial"]["name"] != config["trial"]["name"]
    for epoch in range(1, EPOCHS + 1):
        restored.on_trial_result(name, {"epoch": epoch, "val_accuracy": 0.5})
    restored.on_trial_complete(name, {"epoch": EPOCHS, "val_accuracy": 0.5, "done": True})
    assert ends(restored)[config["trial"]["name"]] == ("COMPLETE", (0.5,))


def test_another_space_keeps_the_further_seeds_and_ends_those_outside(tmp_path: Path) -> None:
    at = space(stopping="none", num_samples=6, finalists={"k": 1, "seeds": 2})
    driver = Driver(tmp_path / "j", at, in_further=True)
    with pytest.raises(Driver.Killed):
        driver.run()
    (name,) = OptunaSearcher(at, tmp_path / "j").waiting_names()
    assert name == driver.further[0]["trial"]["name"]
    lr = driver.further[0]["optim"]["lr"]
    trees = {
        "wider": {"low": 0.001, "high": 1, "log": True},
        "narrower": {"low": lr * 1.01, "high": 1, "log": True},
    }
    for kind, optim in trees.items():
        new = OptunaSearcher(
            build_space({**at.tree, "optim": {**at.tree["optim"], "lr": optim}}),
            tmp_path / kind,
            study="tfkd@2",
        )
        copy_trials(OptunaSearcher(at, tmp_path / "j"), new)
        assert name in new.names()
        assert new.waiting_names() == ({name} if kind == "wider" else set())


# --- on disk


def experiment_of(
    folder: Path, own: Mapping[str, float], further: Mapping[str, list[float]], **search: Any
) -> Path:
    """Write a sweep that has ended, without Ray: values of trials by name, and of their seeds."""
    search = {"num_samples": 4, "stopping": "none", "finalists": {"k": 1, "seeds": 3}, **search}
    at = space(**search)
    write_experiment(folder, at.tree, ["tfkd", "tune"])
    searcher = OptunaSearcher(at, folder / "unused.journal", folder=folder / "trials")
    for k in range(4):
        config = searcher.suggest(str(k))
        assert isinstance(config, dict), f"{config=}"
        about = config.pop("trial")
        name, objective = about["name"], config["objective"]["name"]
        trial = Record(Path(), k, name, objective, "done", about["parameters"], config)
        write(folder, trial, own[name])
        for seed, value in enumerate(further.get(name, []), start=1):
            more = {"name": f"{name}-seed{seed}", "config": {**config, "seed": seed}}
            write(folder, replace(trial, **more, seed_of=name, seeds=3), value)
    searcher.close()
    (folder / "unused.journal").unlink()
    return folder


def write(experiment: Path, record: Record, value: float) -> None:
    """Write a run of full length with this value after its last epoch."""
    record = replace(record, folder=experiment / "trials" / record.name)
    record.folder.mkdir(parents=True, exist_ok=True)
    epochs = [
        {"epoch": e, "val_accuracy": value - (EPOCHS - e) / 100, "val_ece": 0.1, "seconds": 2.0}
        for e in range(1, EPOCHS + 1)
    ]
    text = "".join(json.dumps(epoch) + "\n" for epoch in epochs)
    (record.folder / "metrics.jsonl").write_text(text)
    write_record(record)


OWN = {"t0000-ce": 0.90, "t0001-tfkd_reg": 0.95, "t0002-ce": 0.93, "t0003-tfkd_reg": 0.94}
FURTHER = {"t0001-tfkd_reg": [0.90, 0.92, 0.91], "t0002-ce": [0.92, 0.93, 0.94]}


@pytest.fixture
def experiment(tmp_path: Path) -> Path:
    return experiment_of(tmp_path / "s" / "e", OWN, FURTHER)


def test_the_mean_of_the_further_seeds_alone_ranks_finalists_before_all_others(
    experiment: Path,
) -> None:
    records = read_records(experiment)
    assert [r.name for r in records] == list(OWN)
    ranked = ranked_trials(records, "val_accuracy")
    assert [r.name for r in ranked] == ["t0002-ce", "t0001-tfkd_reg", "t0003-tfkd_reg", "t0000-ce"]
    first = ranked[0]
    assert first.judged["val_accuracy"] == pytest.approx(0.93)
    assert first.error("val_accuracy") == pytest.approx(0.01 / 3**0.5)
    assert first.last["val_accuracy"] == 0.93 and first.judged["epoch"] == EPOCHS
    reg = best([r for r in records if r.objective == "tfkd_reg"], "val_accuracy")
    assert reg is not None and reg.judged["val_accuracy"] == pytest.approx(0.91)
    assert ranked[2].error("val_accuracy") is None and ranked[2].judged == ranked[2].last


@pytest.mark.parametrize("how", ["failed", "running", "NaN", "not begun"])
def test_a_finalist_without_all_of_its_seeds_counts_by_its_own_run_behind_the_others(
    experiment: Path, how: str
) -> None:
    folder = experiment / "trials" / "t0002-ce-seed3"
    run = read_record(folder)
    if how == "NaN":
        write(experiment, run, float("nan"))
    elif how == "not begun":
        shutil.rmtree(folder)
    else:
        write_record(replace(run, status=how))
    ranked = ranked_trials(read_records(experiment), "val_accuracy")
    names = ["t0001-tfkd_reg", "t0003-tfkd_reg", "t0002-ce", "t0000-ce"]
    assert [r.name for r in ranked] == names
    found = next(r for r in ranked if r.name == "t0002-ce")
    assert found.judged["val_accuracy"] == 0.93 and found.error("val_accuracy") is None


def test_constraints_are_those_of_the_means_and_come_first(experiment: Path) -> None:
    limits = {"val_accuracy": {"low": None, "high": 0.925}}
    ranked = ranked_trials(read_records(experiment), "val_accuracy", limits)
    assert [r.name for r in ranked][:2] == ["t0001-tfkd_reg", "t0000-ce"], (
        "0.91 on average, and 0.90"
    )


def test_status_counts_further_seeds_apart_and_a_sweep_ends_with_them(experiment: Path) -> None:
    found = status(experiment)
    assert found["state"] == "finished" and found["trials"]["done"] == 4
    assert found["best"]["trial"] == "t0002-ce" and found["best"]["seeds"] == 3
    assert found["best"]["value"] == pytest.approx(0.93)
    assert found["best"]["error"] == pytest.approx(0.0058, abs=1e-4)
    assert found["further"]["planned"] == found["further"]["done"] == 6
    assert found["further"]["epochs"] == {"done": 6 * EPOCHS, "planned": 6 * EPOCHS}
    text = "\n".join(status_lines(found))
    assert "further seeds of finalists: 6 of 6 done" in text
    assert "t0002-ce, val_accuracy 0.9300 ± 0.0058 (mean of 3 further seeds)" in text
    run = read_record(experiment / "trials" / "t0001-tfkd_reg-seed3")
    write_record(replace(run, status="running"))
    found = status(experiment)
    assert found["state"] == "interrupted" and found["further"]["interrupted"] == 1
    assert "5 of 6 done, 1 interrupted" in "\n".join(status_lines(found))


def test_best_trials_and_the_report_show_the_mean_with_its_error(
    experiment: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = read_plan(experiment)
    records = read_lasts(experiment)
    winner = best(records, "val_accuracy")
    assert winner is not None
    (line, *_) = best_lines(front_of([winner], plan, len(records)), experiment)
    value = "val_accuracy 0.9300 ± 0.0058 (mean of 3 further seeds)"
    assert line == f"t0002-ce of e: {value}, the best of 4 on validation"
    table = trials_table(experiment).splitlines()
    assert len(table) == 5 and "further seeds" in table[0] and "0.9100 ± 0.0058" in table[2]
    rows = json.loads(trials_table(experiment, output="json", sort="mean:desc"))
    assert [row["trial"] for row in rows][:2] == ["t0002-ce", "t0001-tfkd_reg"]
    assert rows[0]["further_seeds"] == 3 and "mean" not in rows[2]
    sweep = read_sweep(experiment, plan)
    assert "(mean of 3 further seeds)" in trial_value(sweep, sweep.ranked(sweep.full)[0])
    page = report(experiment, experiment / "r.html")[0].read_text()
    assert 'Best: <span class="whole">t0002-ce,</span>' in page and "93.00 ± 0.58" in page
    assert "With ±, it is the mean of further seeds" in page
    (first,) = pareto(sweep.full, ["val_accuracy", "val_ece"])
    assert first.name == "t0003-tfkd_reg", "0.94; the mean of t0001 is 0.91, and 0.95 one run's"
    assert main(["logs", str(experiment), "t0002-ce-seed2"]) == 0
    assert "0.93" in capsys.readouterr().out


def test_export_confirm_and_priors_take_the_finalists_ranking(experiment: Path) -> None:
    chosen = choose(experiment)
    assert chosen.name == "e/t0002-ce" and chosen.config.seed == 0
    assert "further seeds give val_accuracy 0.9300 ± 0.0058" in chosen.selection[0]
    arms = [(arm.name, arm.role) for arm in arms_of(experiment, rivals=["ce"]).arms]
    assert arms == [
        ("t0001-tfkd_reg", "candidate"),
        ("t0003-tfkd_reg", "candidate"),
        ("t0002-ce", "baseline"),
    ]
    priors = {p.origin: p.values for p in prior_trials(space(finalists=None), [experiment])}
    assert len(priors) == 4 and priors["e/t0001-tfkd_reg"] == [pytest.approx(0.91)]


def test_the_live_view_ranks_by_the_means_and_counts_further_seeds_apart(
    experiment: Path,
) -> None:
    view = Progress(experiment, Console(file=io.StringIO(), width=100))
    view.setup()
    shown = " ".join(" ".join(view.lines(100, 40)).split())
    assert "e: 4 of 4 trials, 0 running" in shown
    assert "best: t0002-ce, val_accuracy 0.9300 (mean of 3 further seeds)" in shown
    assert "further seeds of finalists: 6 of 6 done" in shown
    assert "best so far, of single runs" in shown
    about = {"number": 1, "name": "t0001-tfkd_reg-seed4", "epochs": EPOCHS, "parameters": {}}
    about |= {"seed_of": "t0001-tfkd_reg", "seeds": 4}
    trial = SimpleNamespace(config={"trial": about, "objective": {"name": "tfkd_reg"}})
    view.on_start(trial, {})
    shown = " ".join(" ".join(view.lines(100, 40)).split())
    assert "t0001-tfkd_reg-seed4 0/9" in shown
    assert "e: 4 of 4 trials, 0 running, 1 further seed running" in shown


def test_the_receipt_and_budgets_count_further_seeds(experiment: Path) -> None:
    at = build_space(read_plan(experiment).about["space"])
    rows = dict(receipt_rows(receipt(at, read_records(experiment))))
    assert rows["used"].startswith("36 epochs")
    assert rows["used for further seeds"] == "54 epochs, 0.03 CPU-hours"
    page = report(experiment, experiment / "r.html")[0].read_text()
    assert "54 epochs, 0.03 CPU-hours" in page and "3:00, all runs together" in page
    spent = spent_so_far(experiment, workers={"gpus": 0, "cpus": 1})
    assert spent["cpu_hours"] == pytest.approx(10 * EPOCHS * 2 / 3600)
    run = read_record(experiment / "trials" / "t0001-tfkd_reg-seed3")
    write_record(replace(run, status="failed", reason="broke"))
    assert failed_names(read_records(experiment)) == {"t0001-tfkd_reg-seed3"}
    assert status(experiment)["failures"] == [{"trial": "t0001-tfkd_reg-seed3", "reason": "broke"}]


def test_a_trial_is_named_by_its_number_also_if_it_has_further_seeds(experiment: Path) -> None:
    for words in ("1", "t0001", "t0001-tfkd_reg"):
        assert folder_of_trial(experiment, words).name == "t0001-tfkd_reg"
    assert folder_of_trial(experiment, "t0001-tfkd_reg-seed2").name == "t0001-tfkd_reg-seed2"
    with pytest.raises(ConfigError, match="beginning of"):
        folder_of_trial(experiment, "t000")


def test_a_trials_file_without_further_seeds_is_as_before_and_a_damaged_one_is_named(
    experiment: Path,
) -> None:
    plain = json.loads((experiment / "trials" / "t0000-ce" / "trial.json").read_text())
    assert not {"seed_of", "seeds", "further"} & set(plain)
    path = experiment / "trials" / "t0001-tfkd_reg-seed3" / "trial.json"
    about = json.loads(path.read_text())
    path.write_text(json.dumps({**about, "seeds": "three"}))
    with pytest.raises(ConfigError, match="seeds is 'three'"):
        read_records(experiment)


def test_further_seeds_whose_folders_are_gone_are_told(tmp_path: Path) -> None:
    at = space(num_samples=2, stopping="none", finalists={"k": 1, "seeds": 1})
    driver = Driver(tmp_path / "study.journal", at).run()
    driver.searcher.close()
    assert gone_trials(tmp_path) == sorted(c["trial"]["name"] for c in driver.begun)


def test_a_plan_says_what_further_seeds_cost() -> None:
    text = "\n".join(lines(plan(space(stopping="none"))))
    assert "then 3 further seeds of the best 2 of each objective: at most 12 runs, 108" in text
    assert "(100 % more)" in text
    assert "further seed" not in "\n".join(lines(plan(space(finalists=None))))
    assert plan(space(num_samples=64, stopping="none", finalists={})).further == 18


def test_tensorboard_has_a_session_group_of_a_finalists_further_seeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups, original = list[str](), tensorboard._session_start

    def seen(values: Any, group: str, *rest: Any) -> Any:
        groups.append(group)
        return original(values, group, *rest)

    monkeypatch.setattr(tensorboard, "_session_start", seen)
    callback = tensorboard.TensorBoard(tmp_path / "e" / "tb", space())
    callback.setup()
    further = {"seed_of": "t0007-ce", "seeds": 3}
    for name, more in (
        ("t0007-ce", {}),
        ("t0007-ce-seed1", further),
        ("t0007-ce-seed2", further),
    ):
        about = {"number": 7, "name": name, "epochs": 9, "parameters": {}, **more}
        trial = SimpleNamespace(trial_id=name, evaluated_params={}, last_result={})
        trial.config = {"trial": about, "objective": {"name": "ce"}}
        callback.on_trial_start(0, [], trial)
    assert groups == ["", *["t0007-ce, further seeds (e)"] * 2]


def test_the_settings_are_written_and_read(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        dump_yaml({**TREE, "search": {"finalists": {}, "num_samples": 12, "baselines": False}})
    )
    assert main(["check", str(path)]) == 0
    at = build_space({**TREE, "search": {"finalists": {}, "num_samples": 12, "baselines": False}})
    assert at.tree["search"]["finalists"] == {"k": 3, "seeds": 3}
    assert build_space(at.tree).search == at.search


# --- on Ray


def without_times(record: Record) -> list[dict[str, float]]:
    times = ("seconds", "images_per_s")
    return [{k: v for k, v in epoch.items() if k not in times} for epoch in record.metrics]


class Stop(tune.Stopper):  # type: ignore[misc]
    """Ends a sweep in the first epoch of a run with a further seed."""

    over = False

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        self.over = self.over or "seed_of" in result["config"]["trial"]
        return False

    def stop_all(self) -> bool:
        return self.over


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_a_sweep_interrupted_in_its_further_seeds_ends_as_a_whole_one(
    ray_cluster: str, tmp_path: Path
) -> None:
    search = {
        "num_samples": 4, "stopping": "none", "sampler": "random", "max_concurrent": 1,
        "finalists": {"k": 1, "seeds": 2},
    }  # fmt: skip
    tree = {**TREE, "epochs": 2, "checkpoint_every_s": 1000, "search": search}
    grid = build_tuner(tree, name="whole", storage=tmp_path).fit()
    whole = read_records(tmp_path / "whole")
    assert len(grid) == 4 + 3 * 2 and grid.num_errors == 0 and len(whole) == 4
    build_tuner(tree, name="e", storage=tmp_path, run_config=tune.RunConfig(stop=Stop())).fit()
    found = status(tmp_path / "e")
    assert found["state"] == "interrupted" and found["trials"]["done"] == 4
    assert found["further"]["started"] == found["further"]["interrupted"] == 1
    resume_tuner(tmp_path / "e").fit()
    records = read_records(tmp_path / "e")
    assert status(tmp_path / "e")["state"] == "finished"
    for one, other in zip(records, whole, strict=True):
        assert [run.name for run in one.runs] == [run.name for run in other.runs]
        assert list(map(without_times, one.runs)) == list(map(without_times, other.runs))
        assert all(run.status == "done" for run in one.runs)
    winner = best(records, "val_accuracy")
    assert winner is not None and len(winner.further) == 2
    assert {run.config["seed"] for run in winner.runs} == {0, 1, 2}
    assert winner.further[0].metrics != winner.metrics
