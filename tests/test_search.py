"""The searcher, driven as Tune drives it, but with trials that are formulas."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher

from tfkd_ray.search import OptunaSearcher, StudyStopping, open_journal
from tfkd_ray.space import Space, build_space

EPOCHS = 9


def space(**search: Any) -> Space:
    return build_space(
        {
            "student": "mlp",
            "epochs": EPOCHS,
            "objective": ["ce", {"name": "lsr", "alpha": {"low": 0.02, "high": 0.4, "log": True}}],
            "optim": {"lr": {"low": 0.01, "high": 1, "log": True}},
            "search": {"num_samples": 16, **search},
        }
    )


def value(config: dict[str, Any], epoch: int) -> float:
    """A learning curve: best at lr 0.1, better with more epochs."""
    lr = config["optim"]["lr"]
    return float(1 - abs(lr - 0.1) - 1 / (epoch + 1))


def run_trial(searcher: OptunaSearcher, trial_id: str, config: dict[str, Any], upto: int = EPOCHS) -> dict[str, Any]:
    """Epochs until the study says stop; what Tune would call, in Tune's order. Returns the last result."""
    result: dict[str, Any] = {}
    for epoch in range(1, upto + 1):
        result = {"epoch": epoch, "val_accuracy": value(config, epoch)}
        if searcher.report(trial_id, result):
            break
        searcher.on_trial_result(trial_id, result)
    return result


def run_sweep(searcher: OptunaSearcher, kill_at: int | None = None) -> list[dict[str, Any]]:
    """One trial at a time; with `kill_at`, the driver dies in the middle of that trial."""
    configs = []
    for k in range(1000):
        config = searcher.suggest(f"id{k}")
        if config == Searcher.FINISHED:
            break
        assert isinstance(config, dict)
        configs.append(config)
        if config["trial"]["number"] == kill_at:
            run_trial(searcher, f"id{k}", config, upto=2)
            break
        searcher.on_trial_complete(f"id{k}", run_trial(searcher, f"id{k}", config))
    return configs


def trials(journal: Path) -> list[FrozenTrial]:
    """All trials of all studies, by our number."""
    storage = open_journal(journal)
    found = [
        t
        for s in optuna.study.get_all_study_names(storage)
        for t in optuna.load_study(study_name=s, storage=storage).trials
    ]
    return sorted(found, key=lambda t: t.user_attrs["number"])


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    return tmp_path / "study.journal"


def test_a_proposal_is_a_whole_configuration_with_its_number_and_name(journal: Path) -> None:
    config = OptunaSearcher(space(), journal, place={"directory": "/x/{name}"}).suggest("a")
    assert isinstance(config, dict)
    about = config["trial"]
    assert (about["number"], about["name"], about["directory"], about["epochs"]) == (0, "t0000-ce", "/x/t0000-ce", 9)
    assert about["parameters"] == {"optim.lr": config["optim"]["lr"]}
    assert config["objective"] == {"name": "ce", "loss_scale": 1.0} and config["optim"]["momentum"] == 0.9


def test_objectives_get_equally_many_trials_and_the_total_is_exact(journal: Path) -> None:
    configs = run_sweep(OptunaSearcher(space(), journal))
    assert [c["objective"]["name"] for c in configs] == ["ce", "lsr"] * 8
    assert [c["trial"]["number"] for c in configs] == list(range(16))


def test_states_are_true(journal: Path) -> None:
    searcher = OptunaSearcher(space(stopping="none"), journal)
    ends: list[Callable[[str, dict[str, Any]], None]] = [
        lambda i, c: searcher.on_trial_complete(i, run_trial(searcher, i, c)),
        lambda i, c: searcher.on_trial_complete(i, run_trial(searcher, i, c, upto=3)),
        lambda i, c: searcher.on_trial_complete(i, {"failed": "ArithmeticError: nan at epoch 2", "done": True}),
        lambda i, c: searcher.on_trial_complete(i, None, error=True),
        lambda i, c: searcher.on_trial_complete(i, {"epoch": 9, "val_accuracy": float("nan")}),
        lambda i, c: searcher.on_trial_complete(i, {"epoch": 9}),
    ]
    for k, end in enumerate(ends):
        config = searcher.suggest(f"id{k}")
        assert isinstance(config, dict)
        end(f"id{k}", config)
        searcher.on_trial_complete(f"id{k}", {"epoch": 9, "val_accuracy": 0.1})  # telling it twice changes nothing
    found = trials(journal)
    assert [t.state for t in found] == [TrialState.COMPLETE, TrialState.PRUNED, *[TrialState.FAIL] * 4]
    assert found[0].value == value({"optim": {"lr": found[0].params["optim.lr"]}}, 9)
    assert sorted(found[1].intermediate_values) == [1, 2, 3]
    assert [t.user_attrs.get("reason") for t in found[2:]] == [
        "ArithmeticError: nan at epoch 2",
        "its process was lost",
        "val_accuracy is nan",
        "val_accuracy is None",
    ]


def test_values_that_are_no_numbers_never_reach_the_sampler(journal: Path) -> None:
    searcher = OptunaSearcher(space(), journal)
    searcher.suggest("a")
    for epoch, bad in enumerate([float("nan"), float("inf"), None, "high"], start=1):
        assert not searcher.report("a", {"epoch": epoch, "val_accuracy": bad})
    assert trials(journal)[0].intermediate_values == {}


def test_halving_stops_the_worse_two_thirds_of_its_own_objective(journal: Path) -> None:
    run_sweep(OptunaSearcher(space(num_samples=40), journal))
    found = trials(journal)
    for objective in ("ce", "lsr"):
        group = [t for t in found if t.user_attrs["name"].endswith(objective)]
        full = [t for t in group if t.state == TrialState.COMPLETE]
        stopped = [max(t.intermediate_values) for t in group if t.state == TrialState.PRUNED]
        assert 1 <= len(full) <= 12 and set(stopped) <= {1, 3}
        assert len(full) + len(stopped) == 20


@pytest.mark.parametrize("metric, best", [("val_accuracy", max), ("val_nll", min)])
def test_the_metric_decides_which_way_is_better(journal: Path, metric: str, best: Callable[..., float]) -> None:
    searcher = OptunaSearcher(space(metric=metric, stopping="none"), journal, study="s")
    for k in range(4):
        searcher.suggest(f"id{k}")
        searcher.on_trial_complete(f"id{k}", {"epoch": 9, metric: k / 10})
    study = optuna.load_study(study_name="s/ce", storage=open_journal(journal))
    assert study.best_value == best([0.0, 0.2])


# --- the study is the truth


def test_the_sequence_of_proposals_is_a_function_of_the_study(tmp_path: Path) -> None:
    whole = run_sweep(OptunaSearcher(space(), tmp_path / "a"))
    for kill_at in (0, 5, 11):
        journal = tmp_path / f"b{kill_at}"
        before = run_sweep(OptunaSearcher(space(), journal), kill_at=kill_at)
        after = run_sweep(OptunaSearcher(space(), journal))
        assert before + after[1:] == whole
        assert after[0] == before[-1]  # the unfinished trial is handed out again: same number, same parameters
        assert [t.state for t in trials(journal)] == [t.state for t in trials(tmp_path / "a")]


def test_an_unfinished_trial_keeps_its_values_and_is_not_judged_twice(journal: Path) -> None:
    run_sweep(OptunaSearcher(space(stopping="none"), journal), kill_at=7)
    searcher = OptunaSearcher(space(stopping="none"), journal)
    config = searcher.suggest("again")
    assert isinstance(config, dict) and config["trial"]["number"] == 7
    for epoch in (1, 2):
        assert not searcher.report("again", {"epoch": epoch, "val_accuracy": -99.0})  # known: said again after a resume
    values = trials(journal)[7].intermediate_values
    assert values == {e: pytest.approx(value(config, e)) for e in (1, 2)}


def test_a_driver_that_dies_before_it_acts_on_a_rung_judges_again(journal: Path) -> None:
    searcher = OptunaSearcher(space(), journal)
    for k, accuracy in enumerate([0.9, 0.9, 0.1]):
        searcher.suggest(f"id{k}")
        stop = searcher.report(f"id{k}", {"epoch": 1, "val_accuracy": accuracy})
    assert stop
    again = OptunaSearcher(space(), journal)
    configs = [again.suggest(f"new{k}") for k in range(3)]
    assert [c["trial"]["number"] for c in configs if isinstance(c, dict)] == [0, 1, 2]
    assert [again.report(f"new{k}", {"epoch": 1, "val_accuracy": 0.5}) for k in range(3)] == [False, False, True]


def test_a_driver_that_dies_while_asking_asks_again_for_the_same(tmp_path: Path) -> None:
    whole = run_sweep(OptunaSearcher(space(), tmp_path / "a"))
    journal = tmp_path / "b"
    run_sweep(OptunaSearcher(space(), journal), kill_at=6)
    lines = journal.read_bytes().splitlines(keepends=True)
    numbered = [i for i, line in enumerate(lines) if b'"number"' in line]
    for cut in range(numbered[4] - 1, numbered[5]):  # every line between two proposals, and half a line
        journal.write_bytes(b"".join(lines[:cut]) + lines[cut][:20])
        after = run_sweep(OptunaSearcher(space(), journal))
        assert after == whole[after[0]["trial"]["number"] :]


def test_trials_are_added_to_a_finished_search(journal: Path) -> None:
    first = run_sweep(OptunaSearcher(space(), journal))
    more = OptunaSearcher(space(num_samples=20), journal)
    assert more.remaining() == 4
    assert [c["trial"]["number"] for c in run_sweep(more)] == [16, 17, 18, 19]
    assert OptunaSearcher(space(), journal).remaining() <= 0 and len(first) == 16


def test_a_searcher_is_pickled_without_anything_live(journal: Path, tmp_path: Path) -> None:
    searcher = OptunaSearcher(space(), journal)
    searcher.suggest("a")
    again = pickle.loads(pickle.dumps(searcher))
    assert again.remaining() == 16
    searcher.save(str(tmp_path / "state"))
    assert json.loads((tmp_path / "state").read_text()) == {"journal": str(journal)}
    again.restore(str(tmp_path / "state"))
    assert isinstance(again.suggest("b"), dict)


def test_the_scheduler_asks_the_study(journal: Path) -> None:
    searcher = OptunaSearcher(space(), journal)
    scheduler = StudyStopping(searcher)

    class Trial:
        trial_id = "x"

    decisions = []
    for k, accuracy in enumerate([0.9, 0.9, 0.1, 0.95]):
        Trial.trial_id = f"id{k}"
        searcher.suggest(Trial.trial_id)
        decisions.append(scheduler.on_trial_result(None, Trial(), {"epoch": 1, "val_accuracy": accuracy}))  # type: ignore[arg-type]
    assert decisions == [TrialScheduler.CONTINUE, TrialScheduler.CONTINUE, TrialScheduler.STOP, TrialScheduler.CONTINUE]
