"""The searcher, driven as Tune drives it, but with trials that are formulas."""

import json
import math
import os
import pickle
import shutil
from collections.abc import Callable, Sequence
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from conftest import long_after
from optuna.trial import FrozenTrial, TrialState
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import ConcurrencyLimiter, Repeater, Searcher
from ray.tune.search.search_generator import SearchGenerator
from scipy.stats import qmc

from tfkd_ray.learn.config import TrainConfig
from tfkd_ray.run import tune
from tfkd_ray.run.journal import _Journal, open_journal, save_journal
from tfkd_ray.run.priors import prior_trials
from tfkd_ray.run.rungs import Rungs
from tfkd_ray.run.searcher import (
    OptunaSearcher,
    StudyStopping,
    copy_trials,
    take_saved_journal,
)
from tfkd_ray.run.tune import disk_trouble
from tfkd_ray.settings.errors import ConfigError
from tfkd_ray.settings.yaml import dump_yaml
from tfkd_ray.show.importance import importance
from tfkd_ray.show.status import status, status_lines
from tfkd_ray.space.relate import not_superset, warm_points
from tfkd_ray.space.space import Space, build_space
from tfkd_ray.store.experiment import (
    Record,
    gone_trials,
    read_experiment,
    write_experiment,
    write_record,
)
from tfkd_ray.store.storage import Storage

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
    """Return a learning curve: best at lr 0.1, better with more epochs."""
    lr = config["optim"]["lr"]
    return float(1 - abs(lr - 0.1) - 1 / (epoch + 1))


def run_trial(
    searcher: OptunaSearcher, trial_id: str, config: dict[str, Any], upto: int = EPOCHS
) -> dict[str, Any]:
    """Run epochs until the study stops the trial, with Tune's calls; return the last result."""
    result: dict[str, Any] = {}
    for epoch in range(1, min(upto, config["trial"]["epochs"]) + 1):
        result = {"epoch": epoch, "val_accuracy": value(config, epoch)}
        if searcher.report(trial_id, result):
            break
        searcher.on_trial_result(trial_id, result)
    return result


def run_sweep(
    searcher: OptunaSearcher, kill_at: int | None = None, most: int = 1000
) -> list[dict[str, Any]]:
    """Run one trial at a time; with `kill_at`, the driver dies during that trial."""
    configs = []
    for k in range(most):
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
    """Return all trials of all studies, by number."""
    storage = open_journal(journal)
    found = [
        t
        for s in optuna.study.get_all_study_names(storage)
        for t in optuna.load_study(study_name=s, storage=storage).trials
    ]
    return sorted(
        (t for t in found if "number" in t.user_attrs), key=lambda t: t.user_attrs["number"]
    )


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    return tmp_path / "study.journal"


def test_a_proposal_is_a_whole_configuration_with_its_number_and_name(journal: Path) -> None:
    config = OptunaSearcher(space(), journal, folder=Path("/x")).suggest("a")
    assert isinstance(config, dict)
    about = config["trial"]
    assert (about["number"], about["name"], about["directory"], about["epochs"]) == (
        0,
        "t0000-ce",
        "/x/t0000-ce",
        9,
    )
    assert about["parameters"] == {"optim.lr": config["optim"]["lr"]}
    assert (
        config["objective"] == {"name": "ce", "loss_scale": 1.0}
        and config["optim"]["momentum"] == 0.9
    )


def test_objectives_get_equally_many_trials_and_the_total_is_exact(journal: Path) -> None:
    configs = run_sweep(OptunaSearcher(space(), journal))
    assert [c["objective"]["name"] for c in configs] == ["ce", "lsr"] * 8
    assert [c["trial"]["number"] for c in configs] == list(range(16))


def test_states_are_true(journal: Path) -> None:
    searcher = OptunaSearcher(space(stopping="none"), journal)
    ends: list[Callable[[str, dict[str, Any]], None]] = [
        lambda i, c: searcher.on_trial_complete(i, run_trial(searcher, i, c)),
        lambda i, c: searcher.on_trial_complete(i, run_trial(searcher, i, c, upto=3)),
        lambda i, c: searcher.on_trial_complete(
            i, {"failed": "ArithmeticError: nan at epoch 2", "done": True}
        ),
        lambda i, c: searcher.on_trial_complete(i, None, error=True),
        lambda i, c: searcher.on_trial_complete(i, {"epoch": 9, "val_accuracy": float("nan")}),
        lambda i, c: searcher.on_trial_complete(i, {"epoch": 9}),
    ]
    for k, end in enumerate(ends):
        config = searcher.suggest(f"id{k}")
        assert isinstance(config, dict)
        end(f"id{k}", config)
        searcher.on_trial_complete(
            f"id{k}", {"epoch": 9, "val_accuracy": 0.1}
        )  # reporting it twice changes nothing
    found = trials(journal)
    assert [t.state for t in found] == [
        TrialState.COMPLETE,
        TrialState.PRUNED,
        *[TrialState.FAIL] * 4,
    ]
    assert found[0].value == value({"optim": {"lr": found[0].params["optim.lr"]}}, 9)
    assert sorted(found[1].intermediate_values) == [3]
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


@pytest.mark.slow
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
def test_the_metric_decides_which_way_is_better(
    journal: Path, metric: str, best: Callable[..., float]
) -> None:
    searcher = OptunaSearcher(space(metric=metric, stopping="none"), journal, study="s")
    for k in range(4):
        searcher.suggest(f"id{k}")
        searcher.on_trial_complete(f"id{k}", {"epoch": 9, metric: k / 10})
    study = optuna.load_study(study_name="s/ce", storage=open_journal(journal))
    assert study.best_value == best([0.0, 0.2])


# --- the study is the truth


@pytest.mark.slow
def test_the_sequence_of_proposals_is_a_function_of_the_study(tmp_path: Path) -> None:
    whole = run_sweep(OptunaSearcher(space(), tmp_path / "a"))
    for kill_at in (0, 5, 11):
        journal = tmp_path / f"b{kill_at}"
        before = run_sweep(OptunaSearcher(space(), journal), kill_at=kill_at)
        after = run_sweep(OptunaSearcher(space(), journal))
        assert before + after[1:] == whole
        assert (
            after[0] == before[-1]
        )  # the unfinished trial is handed out again: same number, same parameters
        assert [t.state for t in trials(journal)] == [t.state for t in trials(tmp_path / "a")]


def test_an_unfinished_trial_keeps_its_values_and_is_not_judged_twice(journal: Path) -> None:
    s = space(stopping="none", report="all")
    run_sweep(OptunaSearcher(s, journal), kill_at=7)
    searcher = OptunaSearcher(s, journal)
    config = searcher.suggest("again")
    assert isinstance(config, dict) and config["trial"]["number"] == 7
    for epoch in (1, 2):
        assert not searcher.report(
            "again", {"epoch": epoch, "val_accuracy": -99.0}
        )  # known: reported again after a resume
    values = trials(journal)[7].intermediate_values
    assert values == {e: pytest.approx(value(config, e)) for e in (1, 2)}


def test_a_trial_that_ends_while_it_is_paused_is_pruned_if_it_has_told_an_epoch(
    journal: Path,
) -> None:
    """Tune reports no last result of a trial that Ray's HyperBand has paused."""
    searcher = OptunaSearcher(space(stopping="none"), journal)
    for trial_id, epochs in (("a", 2), ("b", 0)):
        config = searcher.suggest(trial_id)
        assert isinstance(config, dict)
        run_trial(searcher, trial_id, config, upto=epochs)
        searcher.on_trial_complete(trial_id)
    told, untold = trials(journal)
    assert told.state == TrialState.PRUNED and list(told.intermediate_values) == [2]
    assert (untold.state, untold.user_attrs["reason"]) == (
        TrialState.FAIL,
        "ended without a result",
    )


@pytest.mark.parametrize("wrapped", ["limited", "repeated", "repeated and limited"])
def test_behind_rays_wrappers_a_restored_searcher_proposes_no_trial_twice(
    journal: Path, tmp_path: Path, wrapped: str
) -> None:
    def made() -> tuple[OptunaSearcher, SearchGenerator]:
        searcher = OptunaSearcher(space(stopping="none"), journal)
        outer: Searcher = searcher
        if "repeated" in wrapped:
            outer = Repeater(outer, repeat=2)
        if "limited" in wrapped:
            outer = ConcurrencyLimiter(outer, max_concurrent=3)
        return searcher, SearchGenerator(outer)

    first, generator = made()
    begun = [generator.searcher.suggest(name) for name in "abc"]
    generator.save_to_dir(str(tmp_path), "session")
    first.close()
    again, generator = made()
    generator.restore_from_dir(str(tmp_path))
    for name in "abc":
        result = {"epoch": EPOCHS, "val_accuracy": 0.5, "training_iteration": 1, "done": True}
        generator.searcher.on_trial_complete(name, result)
    more = [generator.searcher.suggest(name) for name in "def"]
    numbers = [config["trial"]["number"] for config in [*begun, *more]]
    expected = [0, 0, 1, 1, 2, 2] if "repeated" in wrapped else [0, 1, 2, 3, 4, 5]
    assert numbers == expected
    states = [trial.state for trial in trials(journal)]
    whole = 1 if "repeated" in wrapped else 3
    assert states[:whole] == [TrialState.COMPLETE] * whole
    assert set(states[whole:]) == {TrialState.RUNNING}
    again.close()


@pytest.mark.parametrize("epochs", [[-1, 0, 1], [-3, -2, -1], [0.0, 1.0, 2.0]])
def test_epochs_below_zero_or_with_a_point_end_no_sweep(journal: Path, epochs: list[float]) -> None:
    searcher = OptunaSearcher(space(stopping="none", report="all"), journal)
    searcher.suggest("a")
    for count, epoch in enumerate(epochs, start=1):
        result = {"epoch": epoch, "val_accuracy": 0.5, "training_iteration": count}
        assert not searcher.report("a", result)
        searcher.on_trial_result("a", result)
    searcher.on_trial_complete("a", {**result, "done": True})
    (trial,) = trials(journal)
    assert trial.state == TrialState.COMPLETE and trial.value == 0.5
    assert list(trial.intermediate_values) == [int(epoch) for epoch in epochs if epoch >= 0]


@pytest.mark.parametrize(
    "kind",
    [
        *(torch.tensor, lambda x: torch.tensor([x]), lambda x: np.array([[x]])),
        *(Decimal, Fraction, lambda x: torch.tensor(x, dtype=torch.bfloat16)),
    ],
    ids=["torch", "torch's one", "numpy's one", "Decimal", "Fraction", "bfloat16"],
)
def test_numbers_of_torch_and_python_are_numbers_as_metric_and_as_epoch(
    journal: Path, kind: Callable[[float], Any]
) -> None:
    searcher = OptunaSearcher(space(stopping="none", report="all"), journal)
    searcher.suggest("a")
    for epoch in range(1, EPOCHS + 1):
        result = {"epoch": kind(epoch), "val_accuracy": kind(0.5), "training_iteration": epoch}
        searcher.on_trial_result("a", result)
    searcher.on_trial_complete("a", result)
    (trial,) = trials(journal)
    assert (trial.state, trial.value) == (TrialState.COMPLETE, 0.5)
    assert list(trial.intermediate_values) == list(range(1, EPOCHS + 1))


class Eager:
    """A number as TensorFlow gives it: an array without `item`."""

    ndim, shape = 0, ()

    def __float__(self) -> float:
        return 0.5


class Table:
    """An array of one that is no number, such as a table of pandas."""

    ndim, shape = 2, (1, 1)

    def __repr__(self) -> str:
        return "a table"


@pytest.mark.parametrize(
    "value, reason",
    [
        (Eager(), None),
        (True, None),
        (torch.empty((), device="meta"), "val_accuracy is tensor(..., device='meta', size=())"),
        (Table(), "val_accuracy is a table"),
        (np.ma.masked, "val_accuracy is --"),
        (np.array([0.5, 0.5]), "val_accuracy is [0.5 0.5]"),
        (0.5 + 0j, "val_accuracy is (0.5+0j)"),
        ("0.5", "val_accuracy is the text '0.5'"),
    ],
    ids=["TensorFlow's", "bool", "meta", "table", "masked", "two", "complex", "text"],
)
def test_a_metric_that_is_no_number_fails_its_trial_with_the_reason_and_ends_no_sweep(
    journal: Path, value: Any, reason: str | None
) -> None:
    searcher = OptunaSearcher(space(stopping="none"), journal)
    searcher.suggest("a")
    for epoch in range(1, EPOCHS + 1):
        result = {"epoch": epoch, "val_accuracy": value, "training_iteration": epoch}
        searcher.on_trial_result("a", result)
    searcher.on_trial_complete("a", result)
    (trial,) = trials(journal)
    assert trial.state == (TrialState.FAIL if reason else TrialState.COMPLETE)
    assert trial.user_attrs.get("reason") == reason
    assert reason or trial.value == float(value)


@pytest.mark.parametrize("epoch", [math.nan, math.inf, "1", None, [1]], ids=str)
def test_an_epoch_that_is_no_number_counts_as_missing(journal: Path, epoch: Any) -> None:
    searcher = OptunaSearcher(space(), journal)
    stops = []
    for k, accuracy in enumerate([0.9, 0.9, 0.1]):
        searcher.suggest(f"id{k}")
        told = {"epoch": epoch, "training_iteration": 1, "val_accuracy": accuracy}
        stops.append(searcher.report(f"id{k}", told))
    assert stops == [False, False, True]


@pytest.mark.slow
@pytest.mark.parametrize("epoch", [2**31, 2**63, 1e300])
def test_an_epoch_that_a_database_cannot_hold_ends_no_sweep(tmp_path: Path, epoch: float) -> None:
    searcher = OptunaSearcher(
        space(stopping="none"), tmp_path / "j", storage=f"sqlite:///{tmp_path}/s.db"
    )
    searcher.suggest("a")
    result = {"epoch": epoch, "val_accuracy": 0.5, "training_iteration": 1}
    searcher.on_trial_result("a", result)
    searcher.on_trial_complete("a", {**result, "done": True})
    (trial,) = searcher.studies()[0].get_trials()
    assert (trial.state, trial.value) == (TrialState.COMPLETE, 0.5)
    searcher.close()


def test_a_driver_that_dies_before_it_acts_on_a_rung_judges_again(journal: Path) -> None:
    searcher = OptunaSearcher(space(), journal)
    for k, accuracy in enumerate([0.9, 0.9, 0.1]):
        searcher.suggest(f"id{k}")
        stop = searcher.report(f"id{k}", {"epoch": 1, "val_accuracy": accuracy})
    assert stop
    again = OptunaSearcher(space(), journal)
    configs = [again.suggest(f"new{k}") for k in range(3)]
    assert [c["trial"]["number"] for c in configs if isinstance(c, dict)] == [0, 1, 2]
    assert [again.report(f"new{k}", {"epoch": 1, "val_accuracy": 0.5}) for k in range(3)] == [
        False,
        False,
        True,
    ]


@pytest.mark.slow
def test_a_driver_that_dies_while_asking_asks_again_for_the_same(tmp_path: Path) -> None:
    whole = run_sweep(OptunaSearcher(space(), tmp_path / "a"))
    journal = tmp_path / "b"
    run_sweep(OptunaSearcher(space(), journal), kill_at=6)
    lines = journal.read_bytes().splitlines(keepends=True)
    numbered = [i for i, line in enumerate(lines) if b'"number"' in line]
    for cut in range(
        numbered[4] - 1, numbered[5]
    ):  # every line between two proposals, and half a line
        journal.write_bytes(b"".join(lines[:cut]) + lines[cut][:20])
        after = run_sweep(OptunaSearcher(space(), journal))
        assert after == whole[after[0]["trial"]["number"] :]


def test_trials_are_added_to_a_finished_search(journal: Path) -> None:
    first = run_sweep(OptunaSearcher(space(), journal))
    more = OptunaSearcher(space(num_samples=20), journal)
    assert more.remaining() == 4
    assert [c["trial"]["number"] for c in run_sweep(more)] == [16, 17, 18, 19]
    assert OptunaSearcher(space(), journal).remaining() <= 0 and len(first) == 16


LOST: dict[str, tuple[Callable[[Path], Any], str]] = {
    "deleted": (lambda j: j.unlink(), "was deleted"),
    "cut": (lambda j: os.truncate(j, 100), "was cut, or replaced by an older one,"),
    "emptied": (lambda j: j.write_bytes(b""), "was cut, or replaced by an older one,"),
    "an older copy": (
        lambda j: j.write_bytes(j.read_bytes()[:-400]),
        "was cut, or replaced by an older one,",
    ),
    "another's": (
        lambda j: j.write_bytes(b"#" + j.read_bytes() * 2),
        "was replaced by another one",
    ),
    "deleted, and begun anew by the next line": (
        lambda j: j.write_bytes(j.read_bytes().splitlines(keepends=True)[-1]),
        "was deleted",
    ),
    "a folder": (lambda j: (j.unlink(), j.mkdir()), "was replaced by what is no file"),
    "a FIFO": (lambda j: (j.unlink(), os.mkfifo(j)), "was replaced by what is no file"),
    "a link to nothing": (lambda j: (j.unlink(), j.symlink_to("nothing")), "was deleted"),
    "a link to itself": (lambda j: (j.unlink(), j.symlink_to(j)), "was made unreadable"),
}


@pytest.mark.parametrize("sampler, lost", [*(("tpe", name) for name in LOST), ("cmaes", "deleted")])
@pytest.mark.slow
def test_a_journal_that_is_lost_while_a_search_runs_is_noticed_and_goes_on_from_what_the_search_knew(
    tmp_path: Path, sampler: str, lost: str
) -> None:
    harm, what = LOST[lost]
    lr = {"optim": {"lr": {"low": 0.01, "high": 0.5, "log": True}}, "objective": "ce"}
    tree = {
        **lr,
        "student": "mlp",
        "epochs": 9,
        "search": {
            "num_samples": 8,
            "stopping": "none",
            "report": "all",
            "sampler": {"name": sampler, "startup": 3},
        },
    }
    whole = run_sweep(OptunaSearcher(build_space(tree), tmp_path / "whole.journal"))
    journal = tmp_path / "study.journal"
    searcher = OptunaSearcher(build_space(tree), journal)
    begun = run_sweep(searcher, kill_at=4)
    harm(journal)
    sentence = (
        r"was .* while the sweep ran; the state of the search is in study.journal.saved, and resume"
    )
    with pytest.raises(OSError, match=sentence) as raised:
        run_trial(searcher, "id4", begun[-1])
    assert (
        what in str(raised.value)
        and disk_trouble(raised.value) == f"{journal}: {raised.value.strerror}"
    )
    assert not [p.name for p in tmp_path.iterdir() if p.name.endswith(".part")]
    stands = os.path.lexists(journal)
    assert take_saved_journal(journal) and not take_saved_journal(journal)
    again = run_sweep(OptunaSearcher(build_space(tree), journal))
    assert [*begun[:4], *again] == whole
    assert [(t.state, t.params, t.values) for t in trials(journal)] == [
        (t.state, t.params, t.values) for t in trials(tmp_path / "whole.journal")
    ]
    assert os.path.lexists(tmp_path / "study.journal.replaced") == stands


@pytest.mark.parametrize("use", ["_write", "_unread"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_journal_that_is_deleted_at_the_moment_of_its_use_is_noticed_at_once(
    journal: Path, monkeypatch: pytest.MonkeyPatch, use: str, when: str
) -> None:
    searcher = OptunaSearcher(space(num_samples=6), journal)
    run_sweep(searcher, most=2)
    real = getattr(_Journal, use)

    def harmed(*given: Any, **more: Any) -> Any:
        if when == "before":
            journal.unlink()
        found = real(*given, **more)
        found = found if isinstance(found, int) else list(found)
        journal.unlink(missing_ok=True)
        return found

    monkeypatch.setattr(_Journal, use, harmed)
    with pytest.raises(
        OSError, match=r"was (deleted|cut.*) while the sweep ran; the state of the search is in"
    ):
        searcher.suggest("id2")
        searcher.close()
        searcher.remaining()
    monkeypatch.undo()
    assert take_saved_journal(journal) and len(trials(journal)) in (2, 3)


def test_a_journal_to_which_others_append_or_that_is_put_back_as_it_was_is_not_lost(
    journal: Path,
) -> None:
    searcher, dashboard = (OptunaSearcher(space(num_samples=6), journal) for _ in "ab")
    run_sweep(searcher, most=2)
    dashboard.studies()[0].set_user_attr("note", "seen")
    copy = journal.read_bytes()
    journal.unlink()
    journal.write_bytes(copy)
    run_sweep(searcher)
    assert len(trials(journal)) == 6 and not journal.with_name("study.journal.saved").exists()


def test_a_journal_whose_folder_is_gone_is_a_sentence(tmp_path: Path) -> None:
    searcher = OptunaSearcher(space(num_samples=6), tmp_path / "e" / "study.journal")
    run_sweep(searcher, most=2)
    shutil.rmtree(tmp_path / "e")
    (tmp_path / "e").write_text("")
    with pytest.raises(
        OSError,
        match=r"the state of the search could not be saved beside it \(its directory is gone",
    ):
        searcher.suggest("id2")


@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "link to a pipe"])
def test_a_journal_that_is_no_file_is_a_sentence_and_is_not_waited_for(
    kind: str, tmp_path: Path
) -> None:
    journal = tmp_path / "study.journal"
    if kind == "folder":
        journal.mkdir()
    elif kind == "device":
        journal.symlink_to("/dev/zero")
    else:
        os.mkfifo(tmp_path / "pipe" if "link" in kind else journal)
        if "link" in kind:
            journal.symlink_to("pipe")
    with pytest.raises(ConfigError, match="and only regular files are read"):
        open_journal(journal)


def test_a_trial_whose_folder_is_gone_is_told_by_status_in_any_study_also_one_that_was_saved(
    tmp_path: Path,
) -> None:
    tree = space(num_samples=6).tree
    write_experiment(tmp_path, tree, [])
    searcher = OptunaSearcher(space(num_samples=6), tmp_path / "study.journal")
    configs = run_sweep(searcher, kill_at=4)
    pending = searcher.suggest("pending")  # without reports, so it need not have a folder
    for config in configs:
        about = config["trial"]
        place = tmp_path / "trials" / about["name"]
        write_record(
            Record(
                place,
                about["number"],
                about["name"],
                config["objective"]["name"],
                "running",
                {},
                config,
            )
        )
    assert isinstance(pending, dict) and gone_trials(tmp_path) == [] == status(tmp_path)["gone"]
    for k in (0, 4):
        shutil.rmtree(tmp_path / "trials" / configs[k]["trial"]["name"])
    save_journal(searcher.optuna_storage(), tmp_path / "saved")
    for name in ("study.journal", "saved"):
        (tmp_path / name).replace(tmp_path / "study.journal")
        assert gone_trials(tmp_path) == ["t0000-ce", "t0004-ce"]
    said = " ".join(" ".join(status_lines(status(tmp_path))).split())
    assert "the study has t0000-ce, t0004-ce, and their folders are gone" in said


def test_a_searcher_is_pickled_without_anything_live(journal: Path, tmp_path: Path) -> None:
    searcher = OptunaSearcher(space(), journal)
    searcher.suggest("a")
    again = pickle.loads(pickle.dumps(searcher))
    assert again.remaining() == 16
    searcher.save(str(tmp_path / "state"))
    assert json.loads((tmp_path / "state").read_text()) == {
        "journal": str(journal),
        "trials": {"a": 0},
    }
    again.restore(str(tmp_path / "state"))
    config = again.suggest("b")
    assert isinstance(config, dict) and config["trial"]["number"] == 1  # Tune itself resumes a


def test_the_scheduler_asks_the_study(journal: Path) -> None:
    searcher = OptunaSearcher(space(), journal)
    scheduler = StudyStopping(searcher)

    class Trial:
        trial_id = "x"

    decisions = []
    for k, accuracy in enumerate([0.9, 0.9, 0.1, 0.95]):
        Trial.trial_id = f"id{k}"
        searcher.suggest(Trial.trial_id)
        decisions.append(
            scheduler.on_trial_result(None, Trial(), {"epoch": 1, "val_accuracy": accuracy})
        )  # type: ignore[arg-type]
    assert decisions == [
        TrialScheduler.CONTINUE,
        TrialScheduler.CONTINUE,
        TrialScheduler.STOP,
        TrialScheduler.CONTINUE,
    ]


# --- samplers and stopping rules by name


NUMBERS = {
    "lr": {"low": 0.01, "high": 1, "log": True},
    "weight_decay": {"low": 1e-5, "high": 1e-2, "log": True},
}


def plain(sampler: Any, **search: Any) -> Space:
    """Return a space without choices and stopping, for any sampler."""
    return build_space(
        {
            "student": "mlp",
            "epochs": 3,
            "objective": "lsr",
            "optim": NUMBERS,
            "search": {"num_samples": 9, "sampler": sampler, "stopping": "none", **search},
        }
    )


MODELS = [{"name": "tpe", "startup": 3}, {"name": "gp", "startup": 3}, {"name": "cmaes"}]
SAMPLERS = [
    MODELS[0], MODELS[2], {"name": "qmc"}, {"name": "random"}, {"name": "qmc", "kind": "halton"}, MODELS[1],
]  # fmt: skip
SAMPLERS_BUT_LONG = long_after(4, SAMPLERS)


@pytest.mark.parametrize("sampler", SAMPLERS_BUT_LONG, ids=lambda s: "-".join(map(str, s.values())))
@pytest.mark.slow
def test_a_killed_driver_changes_no_proposal_of_any_sampler(
    tmp_path: Path, sampler: dict[str, Any]
) -> None:
    whole = run_sweep(OptunaSearcher(plain(sampler), tmp_path / "a"))
    before = run_sweep(OptunaSearcher(plain(sampler), tmp_path / "b"), kill_at=7)
    assert (
        before + run_sweep(OptunaSearcher(plain(sampler), tmp_path / "b"))[1:] == whole
        and len(whole) == 9
    )


@pytest.mark.parametrize(
    "sampler", long_after(2, SAMPLERS), ids=lambda s: "-".join(map(str, s.values()))
)
@pytest.mark.slow
def test_a_proposal_that_a_crash_cut_off_is_made_again_by_any_sampler(
    tmp_path: Path, sampler: dict[str, Any]
) -> None:
    journal = tmp_path / "a"
    whole = run_sweep(OptunaSearcher(plain(sampler), journal))
    lines = journal.read_bytes().splitlines(keepends=True)
    numbered = [i for i, line in enumerate(lines) if b'"number"' in line]
    before = 4 if sampler["name"] == "gp" else 0  # of others, a proposal is one line
    for n in (3, 7):  # a random one, and one of the model
        for cut in range(numbered[n] - before, numbered[n] + 1):
            journal.write_bytes(b"".join(lines[:cut]) + lines[cut][:20])
            after = run_sweep(OptunaSearcher(plain(sampler), journal), most=1)
            assert after == [whole[n]] or (before and cut == numbered[n] - before)


@pytest.mark.parametrize("sampler", long_after(1, MODELS), ids=lambda s: s["name"])
@pytest.mark.slow
def test_a_model_finds_what_a_random_search_does_not(
    tmp_path: Path, sampler: dict[str, Any]
) -> None:
    def late(sampler: Any) -> float:
        configs = run_sweep(
            OptunaSearcher(
                plain(sampler, num_samples=30, warm_start=False), tmp_path / str(sampler)
            )
        )
        return float(np.mean([abs(np.log(c["optim"]["lr"] / 0.1)) for c in configs[18:]]))

    assert late(sampler) < 0.7 * late("random")


@pytest.mark.slow
def test_quasi_random_points_cover_the_space_more_evenly_than_random_ones(tmp_path: Path) -> None:
    def discrepancy(sampler: str) -> float:
        searcher = OptunaSearcher(
            plain(sampler, num_samples=64, warm_start=False), tmp_path / sampler
        )
        optim = [c["optim"] for k in range(64) if isinstance(c := searcher.suggest(f"id{k}"), dict)]
        points = [
            [np.log10(o["lr"]) / 2 + 1, np.log10(o["weight_decay"]) / 3 + 5 / 3] for o in optim
        ]
        return float(qmc.discrepancy(np.clip(points, 0, 1)))

    assert discrepancy("qmc") < 0.5 * discrepancy("random")


def grid(**search: Any) -> Space:
    return build_space(
        {
            "student": "mlp",
            "epochs": EPOCHS,
            "objective": ["ce", {"name": "lsr", "alpha": {"choices": [0.1, 0.2]}}],
            "optim": {
                "lr": {"low": 0.1, "high": 0.3, "step": 0.1},
                "nesterov": {"choices": [True, False]},
            },
            "search": {"sampler": "grid", **search},
        }
    )


@pytest.mark.parametrize("name", ["tpe", "gp"])
@pytest.mark.slow
def test_a_model_begins_with_quasi_random_points_also_after_a_kill(
    tmp_path: Path, name: str
) -> None:
    more = {"warm_start": False, "num_samples": 8}
    even = run_sweep(OptunaSearcher(space(sampler="qmc", **more), tmp_path / "even"))
    s = space(sampler={"name": name, "startup": 3}, **more)
    before = run_sweep(OptunaSearcher(s, tmp_path / name), kill_at=4)
    found = before + run_sweep(OptunaSearcher(s, tmp_path / name))[1:]
    assert found[:6] == even[:6] and found[6:] != even[6:]  # three of each objective
    together = run_sweep(
        OptunaSearcher(space(sampler="tpe", split=False, **more), tmp_path / "together")
    )
    assert [c["optim"] for c in together[:3]] != [c["optim"] for c in even[:3]]


@pytest.mark.slow
def test_a_grid_is_every_combination_once_also_after_a_kill(tmp_path: Path) -> None:
    def point(c: dict[str, Any]) -> tuple[Any, ...]:
        return (
            c["objective"]["name"],
            c["objective"].get("alpha"),
            round(c["optim"]["lr"], 9),
            c["optim"]["nesterov"],
        )

    whole = run_sweep(OptunaSearcher(grid(), tmp_path / "a"))
    assert (
        len(whole) == grid().search.num_samples == 6 + 12 and len({point(c) for c in whole}) == 18
    )
    assert [c["objective"]["name"] for c in whole] == ["ce", "lsr"] * 6 + ["lsr"] * 6
    for kill_at in (2, 14):
        journal = tmp_path / f"b{kill_at}"
        before = run_sweep(OptunaSearcher(grid(), journal), kill_at=kill_at)
        assert before + run_sweep(OptunaSearcher(grid(), journal))[1:] == whole


@pytest.mark.parametrize(
    "stopping", long_after(2, ["hyperband", {"name": "halving", "factor": 2}, "median", "asha"])
)
@pytest.mark.slow
def test_a_killed_driver_changes_no_judgment(tmp_path: Path, stopping: Any) -> None:
    search = {"stopping": stopping, "num_samples": 28}
    whole = run_sweep(OptunaSearcher(space(**search), tmp_path / "a"))
    states = [(t.state, t.last_step) for t in trials(tmp_path / "a")]
    stopped = [step for state, step in states if state == TrialState.PRUNED]
    assert bool(stopped) == (stopping != "asha")  # asha is Ray's: the study stops nothing
    for kill_at in (9, 20):
        journal = tmp_path / f"b{kill_at}"
        before = run_sweep(OptunaSearcher(space(**search), journal), kill_at=kill_at)
        assert before + run_sweep(OptunaSearcher(space(**search), journal))[1:] == whole
        assert [(t.state, t.last_step) for t in trials(journal)] == states


@pytest.mark.slow
def test_hyperband_judges_a_trial_among_those_of_its_own_bracket(journal: Path) -> None:
    run_sweep(OptunaSearcher(space(stopping="hyperband", num_samples=60), journal))
    found = trials(journal)
    steps = {b: {t.last_step for t in found if t.user_attrs["bracket"] == b} for b in (0, 1, 2)}
    assert steps == {0: {1, 3, 9}, 1: {3, 9}, 2: {9}}


@pytest.mark.slow
def test_median_stops_only_once_it_has_enough_to_compare_with(journal: Path) -> None:
    run_sweep(
        OptunaSearcher(space(stopping={"name": "median", "startup": 4}, num_samples=40), journal)
    )
    for objective in ("ce", "lsr"):
        states = [t.state for t in trials(journal) if t.user_attrs["name"].endswith(objective)]
        assert states[:4] == [TrialState.COMPLETE] * 4 and TrialState.PRUNED in states


# --- published settings


@pytest.mark.slow
def test_published_settings_are_tried_first_and_once_also_after_a_kill(tmp_path: Path) -> None:
    lsr = [p.values for p in warm_points(space()) if p.objective == "lsr"]
    assert [v["objective.lsr.alpha"] for v in lsr] == [0.1, 0.2]
    for kill_at in (None, 0, 1, 3):
        journal = tmp_path / str(kill_at)
        run_sweep(OptunaSearcher(space(), journal), kill_at=kill_at)
        run_sweep(OptunaSearcher(space(), journal))
        params = [t.params for t in trials(journal) if t.user_attrs["name"].endswith("lsr")]
        assert params[:2] == lsr and all(p not in lsr for p in params[2:]) and len(params) == 8


def test_a_published_setting_reaches_every_kind_of_parameter(journal: Path) -> None:
    s = build_space(
        {
            "student": "mlp",
            "objective": {
                "name": "tfkd_reg",
                "correct_prob": {"low": 0.9, "high": 0.995, "log_complement": True},
            },
            "optim": {
                "batch_size": {"low": 64, "high": 256, "log": True},
                "momentum": {"choices": [0.0, 0.9]},
            },
            "schedule": {"choices": ["step", {"name": "cosine", "final": 0.1}]},
            "search": {"num_samples": 8},
        }
    )
    first = OptunaSearcher(s, journal).suggest("a")
    assert isinstance(first, dict)
    assert first["objective"]["correct_prob"] == pytest.approx(0.99, abs=1e-12)
    assert (
        first["optim"]["batch_size"],
        first["optim"]["momentum"],
        first["schedule"]["name"],
    ) == (128, 0.9, "step")


# --- several metrics


def test_several_metrics_are_told_together_and_the_study_has_a_front(journal: Path) -> None:
    s = plain("tpe", metric=["val_accuracy", "val_ece"], num_samples=16)
    searcher = OptunaSearcher(s, journal)
    ends: dict[int, dict[str, Any]] = {}
    for k in range(16):
        config = searcher.suggest(f"id{k}")
        assert isinstance(config, dict)
        lr = config["optim"]["lr"]
        ends[k] = {"epoch": 3, "val_accuracy": -abs(np.log(lr)), "val_ece": lr}
        if k == 2:
            ends[k]["val_ece"] = float("nan")
        assert not searcher.report(f"id{k}", {**ends[k], "epoch": 1})
        searcher.on_trial_complete(
            f"id{k}", ends[k] if k != 4 else {"epoch": 2, "val_accuracy": 1.0, "val_ece": 0.1}
        )
    found = trials(journal)
    assert found[2].state == TrialState.FAIL and found[2].user_attrs["reason"] == "val_ece is nan"
    assert found[4].state == TrialState.PRUNED and found[0].values == [
        ends[0]["val_accuracy"],
        ends[0]["val_ece"],
    ]
    for study in searcher.studies():
        assert [d.name for d in study.directions] == ["MAXIMIZE", "MINIMIZE"] and study.best_trials


@pytest.mark.parametrize(
    "sampler", long_after(2, ["tpe", "random", {"name": "gp", "startup": 3}, "qmc"]), ids=str
)
@pytest.mark.slow
def test_several_metrics_and_a_kill(tmp_path: Path, sampler: Any) -> None:
    s = plain(sampler, metric=["val_accuracy", "val_nll"])

    def run(journal: Path, upto: int) -> list[Any]:
        searcher, configs = OptunaSearcher(s, journal), []
        for k in range(upto):
            config = searcher.suggest(f"id{k}")
            if isinstance(config, dict):
                configs.append(config)
                if k < upto - 1 or upto == 20:
                    v = value(config, 9)
                    searcher.on_trial_complete(
                        f"id{k}", {"epoch": 3, "val_accuracy": v, "val_nll": v}
                    )
        return configs

    whole = run(tmp_path / "a", 20)
    before = run(tmp_path / "b", 8)
    assert before + run(tmp_path / "b", 20)[1:] == whole and len(whole) == 9


# --- failed trials, once more


def test_failed_trials_run_again_with_their_numbers_and_parameters_and_the_total_is_exact(
    journal: Path,
) -> None:
    searcher = OptunaSearcher(space(), journal)
    configs = {}
    for k in range(16):
        configs[k] = searcher.suggest(f"id{k}")
        assert isinstance(configs[k], dict)
        if k in (3, 7):
            searcher.report(f"id{k}", {"epoch": 1, "val_accuracy": 0.99})
            searcher.on_trial_complete(f"id{k}", {"failed": "OSError: disk full", "done": True})
        else:
            searcher.on_trial_complete(f"id{k}", run_trial(searcher, f"id{k}", configs[k]))  # type: ignore[arg-type]
    plainly = OptunaSearcher(space(), journal)
    assert plainly.remaining() == 0  # without being asked, they are not run again
    assert plainly.retry_failed() == 2 and plainly.remaining() == 2 and plainly.waiting() == {3, 7}
    again = OptunaSearcher(space(), journal)  # the driver died: they remain to be done
    assert again.remaining() == 2
    for n in (3, 7):
        config = again.suggest(f"again{n}")
        assert config == configs[n]
        assert not again.report(
            f"again{n}", {"epoch": 1, "val_accuracy": 0.0}
        )  # known from the first attempt
        again.on_trial_complete(f"again{n}", {"epoch": 9, "val_accuracy": 0.9})
    assert again.suggest("x") == Searcher.FINISHED
    last = OptunaSearcher(space(), journal)
    assert last.remaining() == 0 and last.retry_failed() == 0
    attempts = [
        (t.user_attrs["number"], t.state.name, t.user_attrs.get("attempt"), t.intermediate_values)
        for t in trials(journal)
        if t.user_attrs["number"] in (3, 7)
    ]
    assert attempts == [
        (n, *rest)
        for n in (3, 7)
        for rest in (("FAIL", None, {1: 0.99}), ("COMPLETE", 2, {1: 0.99, 9: 0.9}))
    ]


def test_a_trial_that_was_tried_again_counts_once_at_a_rung(journal: Path) -> None:
    searcher = OptunaSearcher(space(num_samples=12), journal)
    for k, accuracy in enumerate([0.9, 0.8]):
        searcher.suggest(f"id{2 * k}")
        searcher.suggest(f"id{2 * k + 1}")
        searcher.report(f"id{2 * k}", {"epoch": 1, "val_accuracy": accuracy})
    searcher.on_trial_complete("id0", {"failed": "x"})
    searcher.retry_failed()
    searcher.suggest("other")  # whatever waits
    study = searcher.studies()[0]
    came = [t.intermediate_values[1] for t in study.trials if 1 in t.intermediate_values]
    assert sorted(came) == [0.8, 0.9, 0.9]
    rungs = Rungs([[1, 3]], 2, maximize=True)
    for trial in study.get_trials(deepcopy=False):
        rungs.take_all(0, trial.user_attrs["number"], trial.intermediate_values)
    # of two trials, the better continues; counted three times, 0.8 would still be behind
    numbers = {t.intermediate_values[1]: t.user_attrs["number"] for t in study.trials[:2]}
    assert {value: rungs.stops(0, n, 1) for value, n in numbers.items()} == {0.9: False, 0.8: True}
    three = [*came, 0.85, 0.7]
    assert len(three) // 2 == 2  # with the attempt counted twice, 0.85 would be third and stop
    rungs.take(0, 90, 1, 0.85)
    rungs.take(0, 91, 1, 0.7)
    assert not rungs.stops(0, 90, 1) and rungs.stops(0, 91, 1)


# --- earlier experiments


def finished(folder: Path, s: Space, values: list[float], *, status: str = "done") -> Path:
    """Write an experiment with random trials."""
    folder.mkdir()
    write_experiment(folder, s.tree, ["tfkd"])
    searcher = OptunaSearcher(s, folder / "study.journal")
    for k, value in enumerate(values):
        config = searcher.suggest(f"id{k}")
        assert isinstance(config, dict)
        about = config.pop("trial")
        searcher.on_trial_complete(f"id{k}", {"epoch": s.epochs, "val_accuracy": value})
        path = folder / "trials" / about["name"]
        write_record(
            Record(
                path,
                about["number"],
                about["name"],
                config["objective"]["name"],
                status,
                about["parameters"],
                config,
            )
        )
        (path / "metrics.jsonl").write_text(
            json.dumps({"epoch": s.epochs, "val_accuracy": value, "seconds": 1.0}) + "\n"
        )
    return folder


TOGETHER = pytest.mark.parametrize("split", [True, False], ids=["a study each", "one study"])


@TOGETHER
@pytest.mark.slow
def test_earlier_experiments_are_known_to_the_sampler_and_are_no_trials_of_this_one(
    tmp_path: Path, split: bool
) -> None:
    earlier = finished(
        tmp_path / "old",
        space(sampler="random", warm_start=False, num_samples=20),
        [k / 20 for k in range(20)],
    )
    cold = run_sweep(OptunaSearcher(space(split=split), tmp_path / "a"))
    journal = tmp_path / "b"
    searcher = OptunaSearcher(space(split=split), journal, priors=[earlier])
    warm = (
        run_sweep(searcher, kill_at=9)
        + run_sweep(OptunaSearcher(space(split=split), journal, priors=[earlier]))[1:]
    )
    assert [c["trial"]["number"] for c in warm] == list(range(16)) and warm != cold
    assert warm == run_sweep(OptunaSearcher(space(split=split), tmp_path / "c", priors=[earlier]))
    storage = open_journal(journal)
    found = [
        t
        for s in optuna.study.get_all_study_names(storage)
        for t in optuna.load_study(study_name=s, storage=storage).trials
    ]
    priors = [t for t in found if "prior" in t.user_attrs]
    assert len(priors) == 20 and len(found) == 36  # each once, though reported twice
    assert split or [t.params["objective"] for t in priors] == ["ce", "lsr"] * 10
    assert all(
        ("objective.lsr.alpha" in t.params) == ("-lsr" in t.user_attrs["prior"]) for t in priors
    )
    assert all(
        t.state == TrialState.COMPLETE
        and not t.intermediate_values
        and "number" not in t.user_attrs
        for t in priors
    )
    assert {t.user_attrs["prior"] for t in priors} == {
        f"old/t{n:04d}-{'ce' if n % 2 == 0 else 'lsr'}" for n in range(20)
    }
    assert OptunaSearcher(space(split=split), journal).remaining() == 0 and set(
        OptunaSearcher(space(split=split), journal).known()
    ) == set(range(16))


@TOGETHER
def test_a_rung_is_made_of_this_experiments_trials_alone(tmp_path: Path, split: bool) -> None:
    earlier = finished(tmp_path / "old", space(sampler="random"), [0.99] * 16)
    searcher = OptunaSearcher(space(split=split), tmp_path / "a", priors=[earlier])
    searcher.suggest("a")
    assert not searcher.report(
        "a", {"epoch": 1, "val_accuracy": 0.1}
    )  # it is the best that has come here


@pytest.mark.slow
def test_a_median_is_made_of_this_experiments_trials_alone(tmp_path: Path) -> None:
    earlier = finished(tmp_path / "old", space(sampler="random"), [0.99] * 16)
    stopping = {"name": "median", "startup": 3}
    searcher = OptunaSearcher(space(stopping=stopping), tmp_path / "a", priors=[earlier])
    stopped = []
    for k, accuracy in enumerate(
        [0.9, 0.9, 0.8, 0.8, 0.7, 0.7, 0.1, 0.1]
    ):  # each objective in turn
        searcher.suggest(f"id{k}")
        stopped.append(searcher.report(f"id{k}", {"epoch": 1, "val_accuracy": accuracy}))
        searcher.on_trial_complete(f"id{k}", {"epoch": 9, "val_accuracy": accuracy})
    assert stopped == [False] * 6 + [True] * 2


LARGER = {
    "optim": {"lr": {"low": 0.001, "high": 2, "log": True}, "momentum": {"choices": [0.0, 0.9]}}
}
SMALLER = {"optim": {"lr": 0.1}}


@pytest.mark.slow
@pytest.mark.parametrize(
    "change, usable",
    [(LARGER, "some"), (SMALLER, "all"), ({"seed": 5, "checkpoint_every_s": 1}, "all")],
    ids=["larger", "smaller", "seed"],
)
@TOGETHER
def test_an_earlier_space_may_be_larger_or_smaller(
    tmp_path: Path, change: dict[str, Any], usable: str, split: bool
) -> None:
    tree = {**space(sampler="random", num_samples=20, warm_start=False).tree, **change}
    tree["optim"] = {**space().tree["optim"], **change.get("optim", {})}
    earlier = finished(tmp_path / "old", build_space(tree), [k / 20 for k in range(20)])
    priors = prior_trials(space(split=split), [earlier])
    assert {p.group for p in priors} <= ({"ce", "lsr"} if split else {"all"})
    assert (0 < len(priors) < 20) if usable == "some" else len(priors) == 20
    for prior in priors:
        assert 0.01 <= prior.params["optim.lr"] <= 1 and "optim.momentum" not in prior.params


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"epochs": 5}, "epochs: 5 there, 9 here"),
        ({"student": "cnn"}, "student.name: 'cnn' there, 'mlp' here"),
        ({"data": {"name": "digits", "split_seed": 3}}, "data.split_seed: 3 there, 0 here"),
        ({"optim": {"lr": 5}}, "optim.lr: 5.0 there, 0.01 to 1 (log) here"),
        ({"objective": "tfkd_reg"}, "objective: tfkd_reg there, and not among ce, lsr"),
    ],
)  # fmt: skip
@TOGETHER
def test_an_experiment_without_overlap_is_refused_and_says_why(
    tmp_path: Path, change: dict[str, Any], sentence: str, split: bool
) -> None:
    old = build_space(
        {
            "student": "mlp",
            "epochs": EPOCHS,
            "objective": "ce",
            "search": {"num_samples": 2, "stopping": "none"},
            **change,
        }
    )
    earlier = finished(tmp_path / "old", old, [0.1, 0.2])
    with pytest.raises(ConfigError) as error:
        prior_trials(space(split=split), [earlier])
    assert (
        f"priors: of 2 full-length trials of {earlier} none lies within this space: {sentence}"
        in str(error.value)
    )


def test_what_makes_no_sense_as_an_earlier_experiment_is_refused(tmp_path: Path) -> None:
    stopped = finished(tmp_path / "old", space(), [0.5], status="stopped")
    with pytest.raises(
        ConfigError, match=r"of 0 full-length trials of .* it has no full-length trial"
    ):
        prior_trials(space(), [stopped])
    with pytest.raises(ConfigError, match="not an experiment"):
        prior_trials(space(), [tmp_path])
    with pytest.raises(
        ConfigError,
        match="earlier results would change nothing for the sampler random; use tpe or gp",
    ):
        prior_trials(space(sampler="random"), [stopped])
    assert prior_trials(space(sampler="random"), []) == []


# --- a wider space


@pytest.mark.slow
def test_an_experiment_goes_on_in_a_wider_space_with_all_its_trials(tmp_path: Path) -> None:
    journal = tmp_path / "study.journal"
    old = OptunaSearcher(space(), journal)
    before = run_sweep(old, kill_at=9)
    tree = {
        **space().tree,
        "optim": {
            "lr": {"low": 0.001, "high": 1, "log": True},
            "momentum": {"choices": [0.9, 0.0]},
        },
    }
    tree["objective"] = [*tree["objective"], "tfkd_reg"]
    tree["search"] = {**tree["search"], "num_samples": 30, "study": "tfkd@2"}
    wide = build_space(tree)
    assert not_superset(space(), wide) == []
    for _ in range(2):  # copied again after a crash, they are there once
        new = OptunaSearcher(wide, journal)
        copy_trials(OptunaSearcher(space(), journal), new)
    assert sorted(new.known()) == list(range(10)) and new.remaining() == 21
    was, copied = (
        {t.user_attrs["number"]: t for study in s.studies() for t in study.trials}
        for s in (old, new)
    )
    assert all(t.params["optim.momentum"] == 0.9 for t in copied.values())
    for n, trial in was.items():
        assert (copied[n].state, copied[n].intermediate_values) == (
            trial.state,
            trial.intermediate_values,
        )
        assert copied[n].params.items() >= trial.params.items()
    after = run_sweep(new)
    assert after[0]["optim"]["lr"] == before[-1]["optim"]["lr"] and after[0]["trial"]["number"] == 9
    assert [c["trial"]["number"] for c in after] == list(range(9, 30))
    count = [
        sum(name.endswith(o) for name in new.known().values()) for o in ("ce", "lsr", "tfkd_reg")
    ]
    assert count == [10, 10, 10]  # the objective that is new catches up


def reached(*args: Any, **more: Any) -> None:
    raise RuntimeError("all that a resume reads is fine")


EDITS = [
    ({"optim": {"lr": {"low": 0.1, "high": 1, "log": True}}}, "optim.lr: was 0.01 to 1 (log), and 0.1 to 1 (log) does not hold all of it; widen it"),
    ({"optim": {"lr": 0.1}}, "optim.lr: was searched (0.01 to 1 (log)), and is fixed now; leave it searched"),
    ({"epochs": 18}, "epochs: was 9, and is 18 now"),
    ({"seed": 3}, "seed: was 0, and is 3 now"),
    ({"objective": ["lsr", "tfkd_reg", {"name": "ce", "loss_scale": 2.0}]}, "objective.ce.loss_scale: was 1.0, and is 2.0 now"),
    ({"objective": [{"name": "lsr", "alpha": {"low": 0.02, "high": 0.4, "log": True}}]}, "objective: existing trials have ce, but the new space lacks it; add it"),
    ({"optim": {"lr": {"low": 0.001, "high": 1, "log": True}}}, "its space was widened by hand; restore it, and resume with: tfkd resume --space FILE"),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("change, sentence", EDITS, ids=[json.dumps(c)[:40] for c, _ in EDITS])
def test_an_experiment_file_that_was_changed_by_hand_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], sentence: str
) -> None:
    monkeypatch.setattr(tune, "prepare", reached)
    experiment = finished(tmp_path / "e", space(), [0.1, 0.2, 0.3])
    with pytest.raises(RuntimeError, match="is fine"):
        tune.resume_tuner(experiment, add_trials=4)
    path = experiment / "experiment.yaml"
    tree = read_experiment(experiment)
    edited = {
        **tree["space"],
        **change,
        "optim": {**tree["space"]["optim"], **change.get("optim", {})},
    }
    path.write_text(dump_yaml({**tree, "space": edited}))
    written = path.read_text()
    with pytest.raises(ConfigError) as error:
        tune.resume_tuner(experiment, add_trials=4)
    assert sentence in str(error.value) and str(path) in str(error.value)
    assert path.read_text() == written
    path.write_text(
        dump_yaml({**tree, "space": {**tree["space"], "cpus_per_worker": 2, "gpus_per_worker": 1}})
    )
    with pytest.raises(RuntimeError, match="is fine"):  # the user may change where trials run
        tune.resume_tuner(experiment)


@pytest.mark.parametrize("here", [True, False], ids=["bf16 in hardware", "without"])
def test_what_auto_became_is_in_the_experiment_and_is_what_a_resume_elsewhere_uses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, here: bool
) -> None:
    resumed: list[TrainConfig] = []

    def prepare(
        config: TrainConfig, storage: Storage, notes: Sequence[str] | None = None, **more: Any
    ) -> None:
        resumed.append(config)
        reached()

    monkeypatch.setattr(tune, "prepare", prepare)
    monkeypatch.setattr("tfkd_ray.learn.config._multiplies_bf16", lambda gpu: here)
    tree = {**space().tree, "student": "resnet18", "precision": "auto", "compile": "auto"}
    experiment = finished(tmp_path / "e", build_space(tree), [0.1, 0.2])
    about = read_experiment(experiment)["space"]
    assert (about["precision"], about["compile"]) == ("bf16" if here else "fp32", "off")
    monkeypatch.setattr(
        "tfkd_ray.learn.config._multiplies_bf16", lambda gpu: not here
    )  # another machine
    with pytest.raises(RuntimeError, match="is fine"):
        tune.resume_tuner(experiment, add_trials=2)
    (config,) = resumed
    assert (config.precision, config.compile) == (about["precision"], "off")


@pytest.mark.parametrize(
    "note", [7, "[1]", "{", '{"objective": 3}', "[" * 100_000], ids=lambda note: str(note)[:9]
)
def test_a_damaged_note_of_the_space_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, note: Any
) -> None:
    monkeypatch.setattr(tune, "prepare", reached)
    experiment = finished(tmp_path / "e", space(), [0.1, 0.2])
    study = optuna.load_study(
        study_name="tfkd/ce", storage=open_journal(experiment / "study.journal")
    )
    study.set_user_attr("space", note)
    with pytest.raises(ConfigError) as error:
        tune.resume_tuner(experiment, add_trials=1)
    assert error.value.source == str(experiment / "study.journal")


def test_an_experiment_of_a_release_that_noted_no_space_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune, "prepare", reached)
    shutil.copytree(
        Path(__file__).parent / "data/experiment-0.1.0", tmp_path / "old", symlinks=True
    )
    s = build_space(read_experiment(tmp_path / "old/sweep")["space"])
    assert OptunaSearcher(s, tmp_path / "old/sweep/study.journal").recorded() == []
    with pytest.raises(RuntimeError, match="is fine"):
        tune.resume_tuner(tmp_path / "old/sweep", add_trials=4)


# --- what mattered


@pytest.mark.parametrize("evaluator", ["pedanova", "fanova", "mdi"])
@pytest.mark.slow
def test_importance_is_told_for_each_objective_over_its_full_length_trials(
    tmp_path: Path, evaluator: str
) -> None:
    s = space(sampler="random", stopping="none", num_samples=40, warm_start=False)
    s = build_space({**s.tree, "objective": ["ce", "lsr"], "optim": NUMBERS})
    experiment = tmp_path / "e"
    experiment.mkdir()
    write_experiment(experiment, s.tree, ["tfkd"])
    searcher = OptunaSearcher(s, experiment / "study.journal")
    for k in range(40):
        config = searcher.suggest(f"id{k}")
        assert isinstance(config, dict)
        about, name = config.pop("trial"), config["objective"]["name"]
        decisive = "lr" if name == "ce" else "weight_decay"
        accuracy = np.log10(config["optim"][decisive]) / 5 + 1
        path = experiment / "trials" / about["name"]
        stopped = k % 10 == 0
        write_record(
            Record(
                path,
                k,
                about["name"],
                name,
                "stopped" if stopped else "done",
                about["parameters"],
                config,
            )
        )
        (path / "metrics.jsonl").write_text(
            json.dumps({"epoch": 9, "val_accuracy": -1e6 if stopped else accuracy}) + "\n"
        )
    shares = importance(experiment, evaluator=evaluator)
    assert max(shares["ce"], key=shares["ce"].__getitem__) == "optim.lr"
    assert max(shares["lsr"], key=shares["lsr"].__getitem__) == "optim.weight_decay"
    assert all(sum(of.values()) == pytest.approx(1) for of in shares.values())
    assert shares["ce"]["optim.lr"] > 0.8


def test_importance_of_too_few_trials_is_not_told(tmp_path: Path) -> None:
    assert importance(finished(tmp_path / "e", space(), [0.1, 0.2, 0.3])) == {"ce": {}, "lsr": {}}
    with pytest.raises(ConfigError, match="no such evaluator 'x'; known: pedanova, fanova, mdi"):
        importance(tmp_path / "e", evaluator="x")
