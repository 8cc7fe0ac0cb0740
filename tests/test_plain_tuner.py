"""Searcher, stopping rule and TensorBoard in a plain `ray.tune.Tuner`, with trials as formulas."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from conftest import long_after
from optuna.trial import FrozenTrial, TrialState
from ray import cloudpickle, tune
from ray.tune.schedulers import ASHAScheduler, HyperBandScheduler
from ray.tune.search import Repeater
from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer

from tfkd_ray.run.journal import open_journal
from tfkd_ray.run.searcher import OptunaSearcher, StudyStopping
from tfkd_ray.settings.errors import ConfigError
from tfkd_ray.show.tensorboard import TensorBoard
from tfkd_ray.space.space import Space, build_space

pytestmark = pytest.mark.ray
cloudpickle.register_pickle_by_value(sys.modules[__name__])  # Ray's processes cannot import it

EPOCHS = 9


def space(num_samples: int, **search: Any) -> Space:
    tree = {
        "objective": "ce",
        "student": "mlp",
        "epochs": EPOCHS,
        "optim": {"lr": {"low": 0.1, "high": 0.9}},
    }
    return build_space({**tree, "search": {"num_samples": num_samples, "sampler": "qmc", **search}})


def fit(
    trainable: Callable[[dict[str, Any]], Any],
    searcher: Any,
    tmp_path: Path,
    *,
    scheduler: Any = None,
    **more: Any,
) -> tune.ResultGrid:
    run = more.pop("run", {})
    how = tune.TuneConfig(
        search_alg=searcher, scheduler=scheduler, num_samples=-1, reuse_actors=True, **more
    )
    where = tune.RunConfig(name="plain", storage_path=str(tmp_path), verbose=0, **run)
    return tune.Tuner(
        tune.with_resources(trainable, {"CPU": 1}), tune_config=how, run_config=where
    ).fit()


def trials(searcher: OptunaSearcher) -> list[FrozenTrial]:
    """Return trials by number; those without one come last."""
    found = [t for study in searcher.studies() for t in study.get_trials(deepcopy=False)]
    return sorted(found, key=lambda t: t.user_attrs.get("number", 1000))


def states(searcher: OptunaSearcher) -> list[str]:
    return [t.state.name for t in trials(searcher)]


# --- what a trainable may report


KINDS = [np.float32, np.float16, np.float64, np.int64, np.array, lambda x: np.array(x, "float32")]


def test_numbers_of_numpy_are_numbers_as_metric_and_as_epoch(
    ray_cluster: str, tmp_path: Path
) -> None:
    kinds = KINDS

    def trainable(config: dict[str, Any]) -> None:
        kind = kinds[config["trial"]["number"]]
        for epoch in range(1, EPOCHS + 1):
            tune.report({"epoch": kind(epoch), "val_accuracy": kind(1.0)})

    s = space(len(KINDS), stopping="none", report="all")
    searcher = OptunaSearcher(s, tmp_path / "journal")
    fit(trainable, searcher, tmp_path, scheduler=StudyStopping(searcher))
    assert [(t.state.name, t.value) for t in trials(searcher)] == [("COMPLETE", 1.0)] * len(KINDS)
    assert all(list(t.intermediate_values) == list(range(1, EPOCHS + 1)) for t in trials(searcher))


@pytest.mark.parametrize("every", long_after(1, [2, 1, 4]))
def test_the_first_report_at_or_past_a_rung_counts(
    ray_cluster: str, tmp_path: Path, every: int
) -> None:
    def trainable(config: dict[str, Any]) -> None:
        for epoch in range(every, EPOCHS + 1, every):
            tune.report({"epoch": epoch, "val_accuracy": 1 - config["trial"]["number"] / 10})

    searcher = OptunaSearcher(space(4), tmp_path / "journal")
    fit(trainable, searcher, tmp_path, scheduler=StudyStopping(searcher), max_concurrent_trials=1)
    assert states(searcher) == ["COMPLETE", "PRUNED", "PRUNED", "PRUNED"]
    assert [list(t.intermediate_values) for t in trials(searcher)[1:]] == [[every]] * 3


def test_epochs_may_be_counted_from_zero_or_not_at_all_and_a_trial_may_end_early(
    ray_cluster: str, tmp_path: Path
) -> None:
    def trainable(config: dict[str, Any]) -> None:
        number = config["trial"]["number"]
        first, last = [(0, EPOCHS - 1), (1, EPOCHS), (1, 5), (1, EPOCHS + 3)][number]
        for epoch in range(first, last + 1):
            tune.report({"val_accuracy": 0.5, **({} if number == 1 else {"epoch": epoch})})

    for rule in ("study", "fifo"):
        searcher = OptunaSearcher(space(4, stopping="none", report="all"), tmp_path / rule)
        scheduler = StudyStopping(searcher) if rule == "study" else None
        fit(trainable, searcher, tmp_path / f"at-{rule}", scheduler=scheduler)
        assert states(searcher) == ["COMPLETE"] * 4
        assert [len(t.intermediate_values) for t in trials(searcher)] == [
            EPOCHS,
            EPOCHS,
            5,
            EPOCHS + 3,
        ]


class Zero(tune.Trainable):  # type: ignore[misc]
    """Counts its epochs from 0, and ends by itself with `done`."""

    def setup(self, config: dict[str, Any]) -> None:
        self.epoch = -1

    def step(self) -> dict[str, Any]:
        self.epoch += 1
        return {"epoch": self.epoch, "val_accuracy": 0.5, "done": self.epoch == EPOCHS - 1}

    def reset_config(self, config: dict[str, Any]) -> bool:
        self.epoch = -1
        return True

    def save_checkpoint(self, folder: str) -> None:
        (Path(folder) / "epoch").write_text(str(self.epoch))

    def load_checkpoint(self, folder: str) -> None:
        self.epoch = int((Path(folder) / "epoch").read_text())


@pytest.mark.parametrize("scheduler", long_after(1, ["study", None, "asha"]))
def test_a_class_that_counts_from_zero_is_complete(
    ray_cluster: str, tmp_path: Path, scheduler: str | None
) -> None:
    searcher = OptunaSearcher(space(2, stopping="none"), tmp_path / "journal")
    asha = ASHAScheduler(metric="val_accuracy", mode="max", time_attr="epoch", max_t=EPOCHS)
    fit(
        Zero,
        searcher,
        tmp_path,
        scheduler={"asha": asha, "study": StudyStopping(searcher)}.get(scheduler or ""),
    )
    assert states(searcher) == ["COMPLETE", "COMPLETE"]


# --- how a trial ended


@pytest.mark.parametrize("rule", long_after(2, ["study", "fifo", "asha"]))
def test_an_exception_is_recorded_with_its_reason_whatever_the_scheduler(
    ray_cluster: str, tmp_path: Path, rule: str
) -> None:
    def trainable(config: dict[str, Any]) -> None:
        tune.report({"epoch": 1, "val_accuracy": 0.5})
        if config["trial"]["number"] == 0:
            raise ArithmeticError("diverged")
        if config["trial"]["number"] == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        tune.report({"epoch": EPOCHS, "val_accuracy": 0.5})

    searcher = OptunaSearcher(space(3, stopping="none"), tmp_path / "journal")
    asha = ASHAScheduler(metric="val_accuracy", mode="max", time_attr="epoch", max_t=EPOCHS)
    scheduler = {"study": StudyStopping(searcher), "asha": asha, "fifo": None}[rule]
    fit(trainable, searcher, tmp_path, scheduler=scheduler)
    found = [(t.state.name, t.user_attrs.get("reason")) for t in trials(searcher)]
    lost = ("FAIL", "its process was lost")
    assert found == [("FAIL", "ArithmeticError: diverged"), lost, ("COMPLETE", None)]


@pytest.mark.parametrize(
    "stop",
    long_after(
        1, [{"epoch": 4}, {"val_accuracy": 0.4}, lambda trial_id, result: result["epoch"] == 4]
    ),
)
def test_a_trial_that_the_users_own_rule_ends_is_complete(
    ray_cluster: str, tmp_path: Path, stop: Any
) -> None:
    def trainable(config: dict[str, Any]) -> None:
        for epoch in range(1, EPOCHS + 1):
            tune.report({"epoch": epoch, "val_accuracy": epoch / 10})

    searcher = OptunaSearcher(space(2, stopping="none"), tmp_path / "journal")
    fit(trainable, searcher, tmp_path, scheduler=StudyStopping(searcher), run={"stop": stop})
    assert [(t.state.name, t.value) for t in trials(searcher)] == [("COMPLETE", 0.4)] * 2


def test_a_paused_trial_that_rays_hyperband_ends_is_pruned_and_not_failed(
    ray_cluster: str, tmp_path: Path
) -> None:
    searcher = OptunaSearcher(space(4, stopping="none"), tmp_path / "journal")
    band = HyperBandScheduler(
        metric="val_accuracy", mode="max", time_attr="training_iteration", max_t=EPOCHS
    )
    fit(Zero, searcher, tmp_path, scheduler=band)
    assert set(states(searcher)) <= {"COMPLETE", "PRUNED"}


# --- what a Tuner is told


@pytest.mark.parametrize("study", [True, False])
@pytest.mark.parametrize(
    "told",
    long_after(
        1, [{"metric": "val_nll", "mode": "min"}, {"metric": "val_accuracy", "mode": "min"}]
    ),
)
def test_another_metric_than_the_spaces_is_refused(
    ray_cluster: str, tmp_path: Path, study: bool, told: dict[str, str]
) -> None:
    def trainable(config: dict[str, Any]) -> None:
        tune.report({"epoch": EPOCHS, "val_accuracy": 0.5, "val_nll": 0.5})

    searcher = OptunaSearcher(space(1), tmp_path / "journal")
    with pytest.raises(
        ConfigError, match=r"TuneConfig: .*, and the space is searched for val_accuracy \(max\)"
    ):
        fit(
            trainable,
            searcher,
            tmp_path,
            scheduler=StudyStopping(searcher) if study else None,
            **told,
        )
    fit(trainable, searcher, tmp_path, metric="val_accuracy", mode="max")
    assert states(searcher) == ["COMPLETE"]


# --- after a kill


RESTORED = """
import os, sys, time
from pathlib import Path
import ray
from ray import tune
from tfkd_ray import OptunaSearcher, StudyStopping
from tfkd_ray.space.space import build_space

def trainable(config):
    Path("begun").mkdir(exist_ok=True)
    name = f"{os.environ['HERE']}/{config['trial']['number']}-{tune.get_context().get_trial_id()}-{os.getpid()}"
    Path(name).touch()
    for epoch in range(1, 10):
        time.sleep(float(os.environ["PAUSE"]))
        tune.report({"epoch": epoch, "val_accuracy": 0.5})

ray.init(log_to_driver=False, logging_level="ERROR", runtime_env={"env_vars": {k: os.environ[k] for k in ("HERE", "PAUSE")}})
trainable = tune.with_resources(trainable, {"CPU": 1})
if sys.argv[1] == "begin":
    tree = {"objective": "ce", "student": "mlp", "epochs": 9, "optim": {"lr": {"low": 0.1, "high": 0.9}}}
    space = build_space({**tree, "search": {"num_samples": 5, "sampler": "qmc", "stopping": "none"}})
    searcher = OptunaSearcher(space, Path("study.journal"))
    how = tune.TuneConfig(search_alg=searcher, scheduler=StudyStopping(searcher), num_samples=-1)
    tune.Tuner(trainable, tune_config=how, run_config=tune.RunConfig(name="e", storage_path=os.getcwd(), verbose=0)).fit()
else:
    os.chdir("elsewhere")
    grid = tune.Tuner.restore(sys.argv[1], trainable=trainable).fit()
    print(len(grid), "trials")
"""


@pytest.mark.fault
@pytest.mark.slow
def test_restored_after_a_kill_each_trial_is_run_to_its_end_once(
    ray_cluster: str, tmp_path: Path
) -> None:
    (tmp_path / "script.py").write_text(RESTORED)
    (tmp_path / "begun").mkdir()
    (tmp_path / "elsewhere").mkdir()
    env = {
        **os.environ,
        "HERE": str(tmp_path / "begun"),
        "PAUSE": "0.5",
        "TUNE_GLOBAL_CHECKPOINT_S": "0.1",
    }
    with (tmp_path / "said").open("w") as said:
        driver = subprocess.Popen(
            [sys.executable, "script.py", "begin"], cwd=tmp_path, env=env, stderr=said
        )
        until = time.monotonic() + 90
        while not snapshot_has_running_trials(tmp_path / "e"):
            assert driver.poll() is None and time.monotonic() < until, (
                tmp_path / "said"
            ).read_text()
            time.sleep(0.1)
        driver.kill()
        driver.wait()
    begun = {p.name for p in (tmp_path / "begun").iterdir()}
    again = [sys.executable, "script.py", str(tmp_path / "e")]
    run = subprocess.run(
        again, cwd=tmp_path, env={**env, "PAUSE": "0"}, capture_output=True, text=True, timeout=110
    )
    assert run.returncode == 0, run.stderr
    storage = open_journal(tmp_path / "study.journal")
    (name,) = optuna.study.get_all_study_names(storage)
    found = optuna.load_study(study_name=name, storage=storage).trials
    assert [(t.user_attrs["number"], t.state) for t in found] == [
        (n, TrialState.COMPLETE) for n in range(5)
    ]
    new = {p.name for p in (tmp_path / "begun").iterdir()} - begun
    assert len(new) == 5 and {name.split("-")[0] for name in new} == set("01234")


def snapshot_has_running_trials(experiment: Path) -> bool:
    """Return True if Ray's own snapshot has two trials, both running."""
    try:
        states = [json.loads(p.read_text()) for p in experiment.glob("experiment_state-*.json")]
        saved = [
            json.loads(p.read_text())["trials"] for p in experiment.glob("searcher-state-*.pkl")
        ]
        known = [len(state["trial_data"]) for state in states]
    except (ValueError, KeyError):
        return False
    return any(count >= 2 for count in known) and any(len(ids) >= 2 for ids in saved)


# --- Ray's other ways to a searcher


def value(config: dict[str, Any]) -> float:
    return 1 - abs(float(config["optim"]["lr"]) - 0.5)


def formula(config: dict[str, Any]) -> None:
    index = config.get("__trial_index__", 0)
    if index == 2:
        raise ArithmeticError("diverged")
    tune.report({"epoch": EPOCHS, "val_accuracy": value(config) + 0.1 * index})


def test_a_repeater_repeats_a_proposal_and_the_study_is_told_the_mean(
    ray_cluster: str, tmp_path: Path
) -> None:
    searcher = OptunaSearcher(space(2, stopping="none"), tmp_path / "journal")
    repeated = Repeater(searcher, repeat=3)
    callback = TensorBoard(tmp_path / "tb")
    how = tune.TuneConfig(search_alg=repeated, num_samples=6)
    where = tune.RunConfig(
        name="plain", storage_path=str(tmp_path), verbose=0, callbacks=[callback]
    )
    assert (
        len(
            tune.Tuner(
                tune.with_resources(formula, {"CPU": 1}), tune_config=how, run_config=where
            ).fit()
        )
        == 6
    )
    found = trials(searcher)
    assert [t.state.name for t in found] == ["COMPLETE"] * 2
    for t in found:  # of those that did not fail
        assert t.value == pytest.approx(value({"optim": {"lr": t.params["optim.lr"]}}) + 0.05)
    runs = EventMultiplexer().AddRunsFromDirectory(str(tmp_path / "tb")).Reload().Runs()
    assert len(runs) == 6 and {"t0000-ce", "t0001-ce"} <= set(runs)


def test_points_are_evaluated_first_and_those_that_were_evaluated_are_known(
    ray_cluster: str, tmp_path: Path
) -> None:
    points = [{"optim.lr": 0.5}, {"optim.lr": 0.7, "objective": "ce"}]
    plain = space(3, stopping="none", sampler="random")
    searcher = OptunaSearcher(plain, tmp_path / "journal", points_to_evaluate=points)
    for _ in range(2):
        searcher.add_evaluated_point({"optim.lr": 0.2}, 0.7)
    searcher.add_evaluated_point(
        {"optim.lr": 0.3}, 0.2, pruned=True, intermediate_values=[0.1, 0.2]
    )
    searcher.add_evaluated_point({"optim.lr": 0.4}, None, error=True)
    grid = fit(formula, searcher, tmp_path, scheduler=StudyStopping(searcher))
    found = trials(searcher)
    assert [round(t.params["optim.lr"], 6) for t in found[:2]] == [0.5, 0.7]
    assert [t.state.name for t in found] == ["COMPLETE"] * 4 + ["PRUNED", "FAIL"]
    assert found[3].value == 0.7 and found[4].intermediate_values == {1: 0.1, 2: 0.2}
    other = OptunaSearcher(plain, tmp_path / "other")
    other.add_evaluated_trials(grid._experiment_analysis, "val_accuracy")
    assert sorted(t.value for t in trials(other)) == sorted(t.value for t in found[:3])


@pytest.mark.parametrize(
    "point, sentence",
    [
        ({"optim.lr": 0.99}, "optim.lr: 0.99, and the space has "),
        ({"optim.rl": 0.5}, "optim.rl: no such parameter; did you mean 'optim.lr'?"),
        ({"objective": "kd"}, "objective: 'kd' is not among ce"),
    ],
)
def test_a_point_outside_of_the_space_is_refused(
    tmp_path: Path, point: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ConfigError) as error:
        OptunaSearcher(space(2), tmp_path / "journal", points_to_evaluate=[point])
    assert sentence in str(error.value)
    with pytest.raises(ConfigError) as error:
        OptunaSearcher(space(2), tmp_path / "journal").add_evaluated_point(point, 0.5)
    assert sentence in str(error.value)


def test_more_points_than_trials_points_of_a_grid_and_points_without_a_value_are_refused(
    tmp_path: Path,
) -> None:
    with pytest.raises(ConfigError, match="points_to_evaluate: 2 of ce, which gets 1 trials"):
        OptunaSearcher(
            space(1),
            tmp_path / "journal",
            points_to_evaluate=[{"optim.lr": 0.2}, {"optim.lr": 0.3}],
        )
    grid = {"objective": "ce", "student": "mlp", "optim": {"lr": {"choices": [0.1, 0.2]}}}
    with pytest.raises(ConfigError, match="points_to_evaluate: a grid is every combination once"):
        OptunaSearcher(
            build_space({**grid, "search": {"sampler": "grid", "num_samples": 2}}),
            tmp_path / "journal",
            points_to_evaluate=[{"optim.lr": 0.2}],
        )
    searcher = OptunaSearcher(space(1), tmp_path / "journal")
    for wrong in (None, float("nan"), "0.5"):
        with pytest.raises(ConfigError, match="add_evaluated_point: a number"):
            searcher.add_evaluated_point({"optim.lr": 0.2}, wrong)
    with pytest.raises(ConfigError, match=r"optim\.lr is searched, and the point lacks it"):
        searcher.add_evaluated_point({}, 0.5)
