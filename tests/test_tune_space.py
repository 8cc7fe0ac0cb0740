"""Ray Tune's own search spaces: a plain dictionary with `tune.uniform` and the like in it."""

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from conftest import long_after
from optuna.trial import FrozenTrial, TrialState
from ray import cloudpickle, tune
from ray.tune.search import Repeater
from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer
from tensorboard.plugins.hparams import metadata, plugin_data_pb2

from tfkd_ray.run.journal import open_journal
from tfkd_ray.run.searcher import OptunaSearcher, StudyStopping
from tfkd_ray.run.tune_space import tune_space
from tfkd_ray.settings.errors import ConfigError
from tfkd_ray.show.tensorboard import TensorBoard
from tfkd_ray.space.plain import PlainSpace
from tfkd_ray.space.space import build_space

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # Ray's processes cannot import it
EPOCHS = 9
JUDGED = {"metric": "loss", "mode": "min", "epochs": EPOCHS}
PLAIN = {"stopping": "none", "sampler": "random"}


def proposals(
    given: Mapping[str, Any], journal: Path, n: int = 30, **search: Any
) -> Iterator[dict[str, Any]]:
    """Yield proposals of a searcher in turn; each trial is told to have ended."""
    searcher = OptunaSearcher(given, journal, **JUDGED, search={**PLAIN, **search})
    for k in range(n):
        config = searcher.suggest(f"id{k}")
        if config == "FINISHED":
            return
        assert isinstance(config, dict)
        yield config
        result = {"training_iteration": EPOCHS, "loss": 1.0, "done": True}
        searcher.on_trial_complete(f"id{k}", result)


def space(given: Mapping[str, Any], **search: Any) -> PlainSpace:
    return tune_space(given, epochs=EPOCHS, search=search)


# --- each domain proposes its values, and no others


def in_steps(low: float, high: float, q: float) -> Any:
    return lambda v: low <= v <= high and math.isclose(v / q, round(v / q), abs_tol=1e-9)


DOMAINS = {
    "uniform": (tune.uniform(-1, 2), float, lambda v: -1 <= v <= 2),
    "loguniform": (tune.loguniform(1e-4, 1), float, lambda v: 1e-4 <= v <= 1),
    "quniform": (tune.quniform(0.2, 1, 0.1), float, in_steps(0.2, 1, 0.1)),
    "qloguniform": (tune.qloguniform(0.5, 32, 0.5), float, in_steps(0.5, 32, 0.5)),
    "randint": (tune.randint(2, 5), int, lambda v: v in (2, 3, 4)),
    "qrandint": (tune.qrandint(3, 17, 4), int, lambda v: v in (4, 8, 12, 16)),
    "qrandint by 1": (tune.qrandint(2, 5, 1), int, lambda v: v in (2, 3, 4)),
    "lograndint": (tune.lograndint(1, 9), int, lambda v: 1 <= v <= 8),
    "qlograndint": (tune.qlograndint(8, 64, 8), int, in_steps(8, 64, 8)),
    "one integer": (tune.randint(3, 4), int, lambda v: v == 3),
    "numpy's ends": (tune.randint(np.int64(2), np.int32(4)), int, lambda v: v in (2, 3)),
    "choice of names": (tune.choice(["a", "b"]), str, lambda v: v in "ab"),
    "choice of lists": (tune.choice([[8], [8, 8]]), list, lambda v: v in ([8], [8, 8])),
    "choice of tuples": (tune.choice([(1, 2), (3,)]), tuple, lambda v: v in ((1, 2), (3,))),
    "choice of settings": (tune.choice([{"a": 1}, {"b": [2]}]), dict, lambda v: len(v) == 1),
    "choice of bools": (tune.choice([True, False]), bool, lambda v: v in (True, False)),
}


@pytest.mark.parametrize("name", DOMAINS)
@pytest.mark.slow
def test_each_domain_of_tune_proposes_its_own_values_and_no_others(
    tmp_path: Path, name: str
) -> None:
    domain, kind, inside = DOMAINS[name]
    given = {"x": domain, "other": tune.uniform(0, 1)}
    found = [config["x"] for config in proposals(given, tmp_path / "journal")]
    assert len(found) == 30 and {type(v) for v in found} == {kind}
    assert all(map(inside, found)), found
    sampled = {json.dumps(domain.sample()) for _ in range(300)}
    if len(sampled) <= 4:  # every value of a small domain, as Tune's own sampling finds it
        assert {json.dumps(v) for v in found} == sampled


@pytest.mark.parametrize("name", ["loguniform", "qloguniform", "lograndint", "qlograndint"])
@pytest.mark.slow
def test_a_domain_on_a_log_scale_is_searched_on_it(tmp_path: Path, name: str) -> None:
    domain, _, _ = DOMAINS[name]
    found = [config["x"] for config in proposals({"x": domain}, tmp_path / "journal", 60)]
    half = math.sqrt(domain.lower * domain.upper)
    assert 15 <= sum(v < half for v in found) <= 45


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["tpe", "gp", "qmc", "random", "cmaes"])
def test_every_sampler_searches_a_plain_dictionary(tmp_path: Path, sampler: str) -> None:
    given = {"x": tune.quniform(0, 1, 0.125), "deep": {"y": tune.loguniform(1e-3, 1)}}
    found = [c["x"] for c in proposals(given, tmp_path / "journal", 12, sampler=sampler)]
    assert len(set(found)) > 2


def test_a_trainable_gets_its_own_dictionary_with_its_constants_and_nothing_else(
    tmp_path: Path,
) -> None:
    marker = object()
    given = {
        "lr": tune.uniform(0, 1),
        "net": {"width": tune.choice([8, 16]), "act": "relu", "deep": {"p": tune.uniform(0, 1)}},
        "data": marker,
        7: {"odd": tune.randint(0, 3)},
        "empty": {},
    }
    first, second = list(proposals(given, tmp_path / "journal", 2))
    assert first.keys() == given.keys() and first["net"].keys() == given["net"].keys()
    assert first["data"] is marker and first["net"]["act"] == "relu" and first["empty"] == {}
    assert first["net"]["width"] in (8, 16) and first[7]["odd"] in (0, 1, 2)
    first["net"]["deep"]["p"] = "a trainable may change its own"
    assert second["net"]["deep"]["p"] != first["net"]["deep"]["p"]
    assert isinstance(given["net"]["width"], tune.search.sample.Categorical)  # and not the user's


def test_a_grid_runs_every_combination_once(tmp_path: Path) -> None:
    given = {"a": tune.grid_search([1, 2, 3]), "b": {"c": tune.choice("xy")}, "d": 4}
    found = list(proposals(given, tmp_path / "journal", sampler="grid"))
    assert sorted((c["a"], c["b"]["c"], c["d"]) for c in found) == [
        (a, c, 4) for a in (1, 2, 3) for c in "xy"
    ]


def test_proposals_are_a_function_of_the_study_alone(tmp_path: Path) -> None:
    given = {"x": tune.uniform(0, 1), "n": tune.randint(1, 9)}
    whole = list(proposals(given, tmp_path / "whole", 14, sampler="tpe"))
    list(proposals(given, tmp_path / "parts", 6, sampler="tpe"))
    rest = list(proposals(given, tmp_path / "parts", 8, sampler="tpe"))
    assert rest == whole[6:]


# --- what cannot be translated


REFUSED = {
    "sample_from": (
        {"x": tune.sample_from(lambda config: 1)},
        "x: tune.sample_from calls a function",
    ),
    "randn": ({"net": {"x": tune.randn(1, 0.5)}}, "net/x: tune.randn has no ends"),
    "qrandn": ({"x": tune.qrandn(1, 0.5, 0.1)}, "write tune.uniform(-0.5, 2.5)"),
    "grid_search": (
        {"x": tune.grid_search([1, 2])},
        "x: tune.grid_search tries every value; write tune.choice",
    ),
    "eval": ({"x": {"eval": "1 + 1"}}, "x: Tune would evaluate"),
    "in a list": ({"x": [1, tune.uniform(0, 1)]}, "x/1: a domain in a list is not searched"),
    "in a choice": ({"x": tune.choice([1, {"y": tune.uniform(0, 1)}])}, "x: item 1 of tune.choice"),
    "an object": ({"x": tune.choice([print, len])}, "x: item 0 of tune.choice is an object"),
    "equal choices": ({"x": tune.choice([1, 1.0])}, "x.choices: a value is given twice"),
    "no choice": ({"x": tune.choice([])}, "x.choices: needs a list of at least one value"),
    "nan": ({"x": tune.choice([1.0, math.nan])}, "x.choices: nan equals no value"),
    "no width": ({"x": tune.uniform(1, 1)}, "x: low and high are both 1"),
    "swapped": ({"x": tune.uniform(2, 1)}, "x: low must not be above high"),
    "no integer": ({"x": tune.randint(3, 3)}, "x: a range without a value: 3 to 3, which excludes"),
    "no multiple": ({"x": tune.qrandint(5, 7, 4)}, "x: a range without a value: 5 to 7, in multip"),
    "no end": (
        {"x": tune.search.sample.Float(0, None)},
        "x: the ends of a range are finite numbers, got inf",
    ),
    "slashes": (
        {"a/b": tune.uniform(0, 1), "a": {"b": tune.uniform(0, 1)}},
        "a/b: two settings are searched under this name",
    ),
    "nothing": ({"x": 1}, "space: nothing in it is searched"),
    "our form": (
        {"objective": "ce", "optim": {"lr": {"low": 0, "high": 1}}},
        "becomes a space by build_space(tree)",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_translated_is_a_sentence_with_the_key_and_the_way_out(name: str) -> None:
    given, sentence = REFUSED[name]
    with pytest.raises(ConfigError) as error:
        space(given)
    assert sentence in str(error.value)


def test_dictionaries_in_a_grid_search_that_tune_would_merge_are_refused() -> None:
    items = [{"w": 1}, {"v": 2}]
    with pytest.raises(
        ConfigError, match=r"net: Tune would merge a dictionary of tune\.grid_search"
    ):
        tune_space(
            {"net": tune.grid_search(items)},
            epochs=EPOCHS,
            search={"sampler": "grid"},
            constants=False,
        )
    for given in (tune.grid_search(items), tune.choice(items)):
        found = tune_space({"net": given}, epochs=EPOCHS, search={"sampler": "grid"})
        assert found.search.num_samples == 2


def test_all_problems_of_a_dictionary_are_told_at_once() -> None:
    wrong = {"a": tune.randn(), "b": {"c": tune.sample_from(lambda: 1)}, "d": tune.uniform(0, 1)}
    with pytest.raises(ConfigError) as error:
        space(wrong)
    assert [p.split(":")[0] for p in error.value.problems] == ["a", "b/c"]


@pytest.mark.parametrize(
    "search, sentence",
    [
        (
            {"smapler": "gp"},
            "search.smapler: no setting of a search in a Tuner of your own; did you",
        ),
        (
            {"metric": "loss"},
            "search.metric: no setting of a search in a Tuner of your own; the arg",
        ),
        ({"time_budget_s": 9}, "TuneConfig(time_budget_s=...)"),
        ({"gpu_hours": 9}, "search.gpu_hours: no setting"),
        ({"num_samples": 0}, "search.num_samples"),
        ({"sampler": "grid"}, "search.sampler: grid needs choices or a step, and x is 0 to 1"),
        ({"sampler": "cmaes"}, "search.stopping: a trial that is stopped early is missing"),
        ({"stopping": {"name": "halving", "min_epochs": 9}}, "would never stop a trial"),
    ],
)
def test_search_settings_that_mean_nothing_here_are_refused(
    search: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ConfigError) as error:
        space({"x": tune.uniform(0, 1)}, **search)
    assert sentence in str(error.value)


@pytest.mark.parametrize(
    "more, sentence",
    [
        ({"epochs": None}, "epochs: how many results a trial of full length reports"),
        ({"epochs": 0}, "epochs: how many"),
        ({"mode": None}, "mode: 'max' or 'min', as loss is better, got None"),
        ({"mode": "best"}, "got 'best'"),
        ({"priors": ["x"]}, "priors: only for spaces of this package"),
        ({"folder": Path("x")}, "folder: only for spaces of this package"),
    ],
)
def test_arguments_that_a_dictionary_needs_or_cannot_have_are_told(
    tmp_path: Path, more: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ConfigError) as error:
        OptunaSearcher({"x": tune.uniform(0, 1)}, tmp_path / "journal", **{**JUDGED, **more})
    assert sentence in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_arguments_of_a_dictionary_are_refused_beside_a_space(tmp_path: Path) -> None:
    ours = build_space({"objective": "ce", "optim": {"lr": {"low": 0.1, "high": 0.9}}})
    with pytest.raises(ConfigError, match=r"(?s)metric: the space says it already.*epochs: the"):
        OptunaSearcher(ours, tmp_path / "journal", metric="loss", epochs=9)
    with pytest.raises(ConfigError, match="space: needs a Mapping, got a int"):
        OptunaSearcher(3, tmp_path / "journal", epochs=9)  # type: ignore[arg-type]


def test_without_a_metric_nothing_is_written(tmp_path: Path) -> None:
    searcher = OptunaSearcher({"x": tune.uniform(0, 1)}, tmp_path / "journal", epochs=9)
    with pytest.raises(ConfigError, match="metric: none is named"):
        searcher.suggest("a")
    with pytest.raises(ConfigError, match="space: none yet"):
        OptunaSearcher(None, tmp_path / "journal", **JUDGED).suggest("a")
    assert list(tmp_path.iterdir()) == []


def test_a_journal_of_another_space_is_refused_and_stays_as_it_is(tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    list(proposals({"x": tune.uniform(0, 1)}, journal, 2))
    before = journal.read_bytes()
    with pytest.raises(ConfigError, match="its study 'tfkd' searches another space"):
        list(proposals({"x": tune.uniform(0, 2)}, journal, 2))
    assert journal.read_bytes() == before
    list(proposals({"x": tune.uniform(0, 2)}, journal, 2, study="another"))


def test_a_password_of_a_storage_is_in_nothing_that_ray_saves(tmp_path: Path) -> None:
    url = "postgresql://me:s3cret@127.0.0.1/db"
    for given in ({"x": tune.uniform(0, 1)}, None):
        searcher = OptunaSearcher(given, tmp_path / "j", **JUDGED, search={"storage": url})
        assert searcher.storage == url and b"s3cret" not in cloudpickle.dumps(searcher)


def test_a_searcher_of_an_earlier_release_that_ray_has_saved_still_reads(tmp_path: Path) -> None:
    ours = build_space({"objective": "ce", "optim": {"lr": {"low": 0.1, "high": 0.9}}})
    searcher = OptunaSearcher(ours, tmp_path / "journal")
    state = {k: v for k, v in searcher.__getstate__().items() if k not in ("_space", "_plain")}
    again = OptunaSearcher.__new__(OptunaSearcher)
    again.__setstate__({**state, "space": ours})
    assert isinstance(again.suggest("a"), dict)


# --- points


def test_points_are_named_as_in_results_or_nested_like_the_dictionary(tmp_path: Path) -> None:
    given = {"lr": tune.uniform(0, 1), "net": {"w": tune.choice([8, [16]]), "act": "relu"}}
    points = [
        {"lr": 0.5, "net/w": [16]},
        {"lr": 0.25, "net": {"w": 8, "act": "relu"}},
        {"net/w": 8},
    ]
    searcher = OptunaSearcher(
        given, tmp_path / "journal", **JUDGED, search=PLAIN, points_to_evaluate=points
    )
    found = [searcher.suggest(f"{k}") for k in range(3)]
    assert all(isinstance(config, dict) for config in found)
    values = [(c["lr"], c["net"]["w"]) for c in found if isinstance(c, dict)]
    assert values[:2] == [(0.5, [16]), (0.25, 8)] and values[2][1] == 8
    searcher.add_evaluated_point({"lr": 0.1, "net": {"w": 8, "act": "relu"}}, 0.3)
    (study,) = searcher.studies()
    assert study.best_value == 0.3
    for wrong, sentence in [
        ({"lr": 2.0}, "a point: lr: 2.0, and the space has 0 to 1"),
        ({"net": {"v": 8}}, "a point: net/v: no such parameter; did you mean 'net/w'?"),
    ]:
        with pytest.raises(ConfigError) as error:
            searcher.add_evaluated_point(wrong, 0.5)
        assert sentence in str(error.value)


# --- in a Tuner


def loss_of(config: Mapping[str, Any], epoch: int) -> float:
    return abs(float(np.log10(config["lr"])) + 2) + config["net"]["p"] + 1 / epoch


def training(config: dict[str, Any]) -> None:
    assert set(config) == {"lr", "net", "fixed"}, config
    assert set(config["net"]) == {"w", "p", "act"}, config
    for epoch in range(1, EPOCHS + 1):
        tune.report({"loss": loss_of(config, epoch), "mine": config["fixed"]["k"]})


THEIRS = {
    "lr": tune.loguniform(1e-4, 1),
    "net": {"w": tune.choice([[8], [8, 8]]), "p": tune.quniform(0, 0.5, 0.1), "act": "relu"},
    "fixed": {"k": 3},
}


def study_trials(journal: Path) -> list[FrozenTrial]:
    storage = open_journal(journal)
    (name,) = optuna.study.get_all_study_names(storage)
    return list(optuna.load_study(study_name=name, storage=storage).trials)


@pytest.mark.ray
@pytest.mark.parametrize("by", long_after(1, ["searcher", "param_space"]))
def test_a_users_tuner_searches_its_own_dictionary_and_stops_trials(
    ray_cluster: str, tmp_path: Path, by: str
) -> None:
    journal, told = tmp_path / "journal", {"metric": "loss", "mode": "min"}
    given = THEIRS if by == "searcher" else None
    more = {} if by == "param_space" else told
    searcher = OptunaSearcher(given, journal, epochs=EPOCHS, **more)
    board = TensorBoard(tmp_path / "tb", searcher.space if by == "searcher" else None, "loss")
    grid = tune.Tuner(
        tune.with_resources(training, {"CPU": 1}),
        param_space=THEIRS if by == "param_space" else None,
        tune_config=tune.TuneConfig(
            search_alg=searcher,
            scheduler=StudyStopping(searcher),
            num_samples=8,
            max_concurrent_trials=1,
            **(told if by == "param_space" else {}),
        ),
        run_config=tune.RunConfig(
            name="plain", storage_path=str(tmp_path), verbose=0, callbacks=[board]
        ),
    ).fit()
    assert len(grid) == 8 and not grid.errors
    best = grid.get_best_result("loss", "min")
    assert best.config is not None and best.config["net"]["act"] == "relu"
    found = study_trials(journal)
    assert [t.user_attrs["number"] for t in found] == list(range(8))
    states = {t.state for t in found}
    assert states == {TrialState.COMPLETE, TrialState.PRUNED}
    done = [t for t in found if t.state == TrialState.COMPLETE]
    assert min(t.value for t in done) == best.metrics["loss"]
    assert set(found[0].params) == {"lr", "net/w", "net/p"}
    events = EventMultiplexer().AddRunsFromDirectory(str(tmp_path / "tb")).Reload()
    runs = [run for run in events.Runs() if run != "about"]
    assert len(runs) == 8
    shown = hparams_of(events, runs[0])
    assert set(shown) == {"lr", "net/w", "net/p"}
    assert next(e.value for e in events.Scalars(runs[0], "hp/value")) > 0
    if by == "searcher":
        columns = events.SummaryMetadata("about", metadata.EXPERIMENT_TAG).plugin_data.content
        infos = plugin_data_pb2.HParamsPluginData.FromString(columns).experiment.hparam_infos
        assert [info.name for info in infos] == ["lr", "net/p", "net/w"]


def hparams_of(events: EventMultiplexer, run: str) -> dict[str, Any]:
    content = events.SummaryMetadata(run, metadata.SESSION_START_INFO_TAG).plugin_data.content
    return dict(plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams)


@pytest.mark.ray
def test_functions_and_another_metric_of_a_users_tuner_are_refused(
    ray_cluster: str, tmp_path: Path
) -> None:
    def fit(given: dict[str, Any], searcher: OptunaSearcher, **told: Any) -> None:
        how = tune.TuneConfig(search_alg=searcher, num_samples=1, **told)
        where = tune.RunConfig(name="plain", storage_path=str(tmp_path), verbose=0)
        tune.Tuner(training, param_space=given, tune_config=how, run_config=where).fit()

    journal = tmp_path / "journal"
    late = OptunaSearcher(None, journal, epochs=EPOCHS)
    with pytest.raises(ConfigError, match=r"a: tune\.sample_from calls a function"):
        fit({"a": tune.sample_from(lambda c: 1), "b": tune.uniform(0, 1)}, late, metric="loss")
    with pytest.raises(ConfigError, match=r"a: item 0 of tune\.choice is an object"):
        fit({"a": tune.choice([print, len])}, late, metric="loss", mode="min")
    with pytest.raises(ConfigError, match=r"TuneConfig: metric=.acc.*give OptunaSearcher this met"):
        fit(THEIRS, OptunaSearcher(None, journal, **JUDGED), metric="acc", mode="min")
    with pytest.raises(ValueError, match="already instantiated with a search space"):
        fit(THEIRS, OptunaSearcher(THEIRS, journal, **JUDGED))


@pytest.mark.ray
def test_a_repeater_repeats_the_proposals_of_a_plain_dictionary(
    ray_cluster: str, tmp_path: Path
) -> None:
    def once(config: dict[str, Any]) -> None:
        tune.report({"loss": config["x"] + config.get("__trial_index__", 0)})

    searcher = OptunaSearcher(
        {"x": tune.uniform(0, 1)}, tmp_path / "j", metric="loss", mode="min", epochs=1, search=PLAIN
    )
    how = tune.TuneConfig(search_alg=Repeater(searcher, repeat=2), num_samples=4)
    where = tune.RunConfig(name="plain", storage_path=str(tmp_path), verbose=0)
    tune.Tuner(tune.with_resources(once, {"CPU": 1}), tune_config=how, run_config=where).fit()
    found = study_trials(tmp_path / "j")
    assert [t.state for t in found] == [TrialState.COMPLETE] * 2
    assert all(t.value == pytest.approx(t.params["x"] + 0.5) for t in found)


RESTORED = """
import os, sys, time
from pathlib import Path
import ray
from ray import tune
from tfkd_ray import OptunaSearcher, StudyStopping

def trainable(config):
    name = f"{os.environ['HERE']}/{config['net']['x']!r}-{tune.get_context().get_trial_id()}-{os.getpid()}"
    Path(name).touch()
    for epoch in range(1, 10):
        time.sleep(float(os.environ["PAUSE"]))
        tune.report({"loss": config["net"]["x"] * config["scale"]})

ray.init(log_to_driver=False, logging_level="ERROR", runtime_env={"env_vars": {k: os.environ[k] for k in ("HERE", "PAUSE")}})
trainable = tune.with_resources(trainable, {"CPU": 1})
if sys.argv[1] == "begin":
    space = {"net": {"x": tune.uniform(0, 1)}, "scale": 2}
    ours = space if os.environ["BY"] == "searcher" else None
    searcher = OptunaSearcher(ours, Path("study.journal"), epochs=9, search={"stopping": "none"})
    how = tune.TuneConfig(search_alg=searcher, scheduler=StudyStopping(searcher), num_samples=5, metric="loss", mode="min")
    where = tune.RunConfig(name="e", storage_path=os.getcwd(), verbose=0)
    tune.Tuner(trainable, param_space=None if ours else space, tune_config=how, run_config=where).fit()
else:
    os.chdir("elsewhere")
    grid = tune.Tuner.restore(sys.argv[1], trainable=trainable).fit()
    print(len(grid), "trials")
"""


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


@pytest.mark.fault
@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("by", ["param_space", "searcher"])
def test_a_users_tuner_restored_after_a_kill_runs_each_trial_of_its_dictionary_to_its_end(
    ray_cluster: str, tmp_path: Path, by: str
) -> None:
    (tmp_path / "script.py").write_text(RESTORED)
    begun = tmp_path / "begun"
    begun.mkdir()
    (tmp_path / "elsewhere").mkdir()
    env = {**os.environ, "HERE": str(begun), "PAUSE": "0.5", "TUNE_GLOBAL_CHECKPOINT_S": "0.1"}
    env["BY"] = by
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
    before = {path.name for path in begun.iterdir()}
    again = [sys.executable, "script.py", str(tmp_path / "e")]
    env["PAUSE"] = "0"
    run = subprocess.run(again, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=110)
    assert run.returncode == 0, run.stderr
    found = study_trials(tmp_path / "study.journal")
    assert [(t.user_attrs["number"], t.state) for t in found] == [
        (n, TrialState.COMPLETE) for n in range(5)
    ]
    assert all(t.value == 2 * t.params["net/x"] for t in found)
    new = {path.name for path in begun.iterdir()} - before
    assert {name.split("-")[0] for name in new} == {repr(t.params["net/x"]) for t in found}
