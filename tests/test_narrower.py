"""A sweep that goes on in a narrower space: trials outside stay on record, and guide nothing."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState
from tensorboard.plugins.hparams import metadata, plugin_data_pb2
from test_search import EPOCHS, finished, run_sweep
from test_tensorboard import read
from test_tune import TREE

from tfkd_ray.run import tune
from tfkd_ray.run.journal import open_journal
from tfkd_ray.run.searcher import OUTSIDE, OptunaSearcher, copy_trials, outside_of
from tfkd_ray.run.tune import build_tuner, resume_tuner
from tfkd_ray.settings.errors import ConfigError
from tfkd_ray.settings.yaml import Tree
from tfkd_ray.show.importance import importance
from tfkd_ray.show.report import report
from tfkd_ray.show.status import status
from tfkd_ray.show.tensorboard import TensorBoard
from tfkd_ray.space.arms import arms_of
from tfkd_ray.space.relate import lies_in, not_comparable, not_superset
from tfkd_ray.space.space import Space, build_space
from tfkd_ray.store.experiment import (
    read_experiment,
    read_record,
    read_records,
    write_experiment,
    write_record,
)

WIDE = {"low": 0.01, "high": 1.0, "log": True}
NARROW = {"low": 0.05, "high": 0.3, "log": True}


def space(
    lr: Any = WIDE,
    nesterov: Any = None,
    study: str | None = None,
    split: bool = True,
    **search: Any,
) -> Space:
    alpha = {"low": 0.02, "high": 0.4, "log": True}
    return build_space(
        {
            "student": "mlp",
            "epochs": EPOCHS,
            "objective": ["ce", {"name": "lsr", "alpha": alpha}],
            "optim": {"lr": lr, "nesterov": nesterov or {"choices": [False, True]}},
            "search": {"num_samples": 16, "warm_start": False, "split": split, "study": study, **search},
        }
    )  # fmt: skip


def studies_in(journal: Path, prefix: str) -> dict[str, list[Any]]:
    storage = open_journal(journal)
    names = [n for n in optuna.study.get_all_study_names(storage) if n.startswith(f"{prefix}/")]
    return {
        n.partition("/")[2]: optuna.load_study(study_name=n, storage=storage).trials for n in names
    }


@pytest.mark.slow
@pytest.mark.parametrize("split", [True, False], ids=["a study each", "one study"])
def test_trials_outside_of_a_narrower_space_stay_on_record_and_guide_nothing(
    tmp_path: Path, split: bool
) -> None:
    journal = tmp_path / "study.journal"
    old = OptunaSearcher(space(split=split), journal)
    before = run_sweep(old, kill_at=9)
    narrow = space(NARROW, study="tfkd@2", split=split, num_samples=30)
    for _ in range(2):  # copied again after a crash, they are there once
        new = OptunaSearcher(narrow, journal)
        copy_trials(OptunaSearcher(space(split=split), journal), new)
    rates = {c["trial"]["number"]: c["optim"]["lr"] for c in before}
    outside = {n for n, lr in rates.items() if not 0.05 <= lr <= 0.3}
    assert 0 < len(outside) < 10 and set(new.outside()) == outside
    assert sorted(new.known()) == list(range(10))
    found = studies_in(journal, "tfkd@2")
    assert {t.user_attrs["number"] for t in found.pop(OUTSIDE)} == outside
    inside = [t for trials in found.values() for t in trials]
    assert {t.user_attrs["number"] for t in inside} == set(range(10)) - outside
    assert all(0.05 <= t.params["optim.lr"] <= 0.3 for t in inside)
    assert new.remaining() == (20 if 9 in outside else 21)
    after = run_sweep(new)
    assert [c["trial"]["number"] for c in after][-20:] == list(range(10, 30))
    assert all(0.05 <= c["optim"]["lr"] <= 0.3 for c in after[-20:])
    if split:  # those outside count for their objective
        assert [sum(n.endswith(o) for n in new.known().values()) for o in ("ce", "lsr")] == [15, 15]


def test_an_unfinished_trial_outside_has_ended_with_what_it_came_to(tmp_path: Path) -> None:
    journal = tmp_path / "study.journal"
    every = {"stopping": "none", "report": "all"}
    run_sweep(OptunaSearcher(space(**every), journal), kill_at=5)
    lr = studies_in(journal, "tfkd")["lsr"][-1].params["optim.lr"]
    there = {"low": lr / 50, "high": lr * 0.99} if lr > 0.1 else {"low": lr * 1.01, "high": 1.0}
    new = OptunaSearcher(space({**there, "log": True}, study="tfkd@2", **every), journal)
    copy_trials(OptunaSearcher(space(**every), journal), new)
    (cut,) = (t for t in studies_in(journal, "tfkd@2")[OUTSIDE] if t.user_attrs["number"] == 5)
    assert cut.state == TrialState.PRUNED and list(cut.intermediate_values) == [1, 2]
    assert new.waiting() == set()


def test_a_sweep_that_is_widened_again_has_all_trials_inside_again(tmp_path: Path) -> None:
    journal = tmp_path / "study.journal"
    first = OptunaSearcher(space(), journal)
    run_sweep(first, most=8)
    was = {t.user_attrs["number"]: t for s in first.studies() for t in s.trials}
    fixed = space(NARROW, nesterov=False, study="tfkd@2")
    copy_trials(first, OptunaSearcher(fixed, journal))
    again = OptunaSearcher(space(study="tfkd@3"), journal)
    copy_trials(OptunaSearcher(fixed, journal), again)
    now = {t.user_attrs["number"]: t for s in again.studies() for t in s.trials}
    assert again.outside() == {} and now.keys() == was.keys()
    for n, trial in was.items():
        assert (now[n].state, now[n].params) == (trial.state, trial.params)
        assert trial.state != TrialState.COMPLETE or now[n].values == trial.values
        assert now[n].user_attrs == trial.user_attrs
        assert now[n].intermediate_values == trial.intermediate_values


@pytest.mark.slow
def test_an_objective_may_be_left_out_and_its_trials_stay_on_record(tmp_path: Path) -> None:
    e = finished(tmp_path / "e", space(), [k / 20 for k in range(16)])
    journal = e / "study.journal"
    tree: Tree = {**space().tree, "objective": [space().tree["objective"][1], "tfkd_reg"]}
    search = {**tree["search"], "study": "tfkd@2", "num_samples": 24, "baselines": False}
    left = build_space({**tree, "search": search})
    assert not_comparable(space(), left) == []
    (problem,) = not_superset(space(), left)
    assert problem == "objective: existing trials have ce, but the new space lacks it; add it"
    new = OptunaSearcher(left, journal)
    copy_trials(OptunaSearcher(space(), journal), new)
    assert len(new.outside()) == 8 and {n[6:] for n in new.outside().values()} == {"ce"}
    found = [c["objective"]["name"] for c in run_sweep(new)]
    assert found == ["tfkd_reg"] * 8  # it catches up with lsr
    write_experiment(e, left.tree, ["tfkd"])
    rows = status(e)["rows"]
    assert rows["ce"]["done"] == 8 and rows["lsr"]["done"] == 8
    report(e, tmp_path / "e.html")
    back = build_space({**tree, "objective": ["ce", *tree["objective"]], "search": {**search, "study": "tfkd@3"}})  # fmt: skip
    again = OptunaSearcher(back, journal)
    copy_trials(OptunaSearcher(left, journal), again)
    assert again.outside() == {} and len(again.known()) == 24


def test_ranges_may_become_narrower_or_fixed_and_nothing_else_changes() -> None:
    assert not_comparable(space(), space(NARROW, nesterov=False)) == []
    assert not_superset(space(), space(NARROW)) != []
    changed = build_space({**space().tree, "epochs": 18})
    assert not_comparable(space(), changed) == ["epochs: was 9, and is 18 now"]
    assert not_comparable(space(0.1), space(NARROW)) == []
    (problem,) = not_comparable(space(0.5), space(NARROW))
    assert problem.startswith("optim.lr: was fixed at 0.5, which 0.05 to 0.3 (log) does not hold")


def reached(*args: Any, **more: Any) -> None:
    raise RuntimeError("all that a resume reads is fine")


def resumed(experiment: Path, new: Space, said: list[str]) -> None:
    """Resume up to the point where trials would start."""
    with pytest.raises(RuntimeError, match="is fine"):
        resume_tuner(experiment, space=new, on_note=said.append)


@pytest.mark.slow
def test_a_narrower_space_that_leaves_out_all_trials_is_refused_and_nothing_is_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune, "prepare", reached)
    lr = {"low": 0.01, "high": 0.02, "log": True}
    e = finished(tmp_path / "e", space(lr), [k / 16 for k in range(16)])
    before = (e / "experiment.yaml").read_bytes()
    said: list[str] = []
    for none in (space(NARROW), space(0.5), space({"low": 0.02001, "high": 5.0, "log": True})):
        with pytest.raises(ConfigError) as error:
            resume_tuner(e, space=none, on_note=said.append)
        assert "none of its 16 trials lies in the new space" in str(error.value)
        assert "optim.lr: 0.0" in str(error.value) and said == []
    assert (e / "experiment.yaml").read_bytes() == before
    assert studies_in(e / "study.journal", "tfkd@2") == {}
    resumed(e, space({"low": 0.015, "high": 0.02, "log": True}), said)
    assert len(said) == 1 and said[0].endswith(
        "of 16 trials lie outside the new space: they are kept but do not guide the search"
    )
    begun = tmp_path / "begun"
    begun.mkdir()
    write_experiment(begun, space().tree, ["tfkd"])
    resumed(begun, space(0.5), said)  # nothing is left out where nothing has begun
    assert len(said) == 1


def narrowed(tmp_path: Path) -> Path:
    """Return an experiment that went on in a narrower space, where learning rates were fixed."""
    objective: Tree = {"objective": ["ce", "tfkd_reg"]}
    wide = build_space({**space(nesterov=False).tree, **objective})
    e = finished(tmp_path / "e", wide, [k / 20 for k in range(16)])
    narrow = build_space(
        {
            **space(NARROW, study="tfkd@2", num_samples=20).tree,
            **objective,
        }
    )
    shutil.copy(e / "study.journal", tmp_path / "kept")
    copy_trials(
        OptunaSearcher(wide, e / "study.journal"), OptunaSearcher(narrow, e / "study.journal")
    )
    write_experiment(e, narrow.tree, ["tfkd"])
    return e


def test_files_of_an_unfinished_trial_outside_say_why_it_ended(tmp_path: Path) -> None:
    e = narrowed(tmp_path)
    searcher = OptunaSearcher(
        build_space(read_experiment(e)["space"]), e / "study.journal", folder=e / "trials"
    )
    first, second, *_ = searcher.outside().values()
    for name in (first, second):
        record = read_record(e / "trials" / name)
        write_record(dataclasses.replace(record, status="interrupted"))
        (record.folder / "last.ckpt").write_text("")
    for _ in range(2):
        tune._end_outside(searcher, e)
        ended = [read_record(e / "trials" / name) for name in (first, second)]
        why = "outside of the narrower space in which the sweep was resumed"
        assert [(r.status, r.reason) for r in ended] == [("stopped", why)] * 2
        assert not list(e.glob("trials/*/last.ckpt"))
    assert len(status(e)["stopped"]) == 2


@pytest.mark.slow
def test_readers_show_an_experiment_with_trials_outside_of_its_space(tmp_path: Path) -> None:
    e = narrowed(tmp_path)
    s = build_space(json.loads(json.dumps(space(NARROW).tree)))
    rates = [r.parameters["optim.lr"] for r in read_records(e)]
    assert min(rates) < 0.05 and max(rates) > 0.3
    found = status(e)
    assert found["trials"]["done"] == 16 and found["best"]["value"] == 0.75 and found["gone"] == []
    report(e, tmp_path / "e.html")
    assert set(importance(e)) == {"ce", "lsr", "tfkd_reg"}  # of those inside
    assert arms_of(e, top_k=8, rivals=()).arms
    branch = s.branches[0]
    assert lies_in(branch, {"optim.lr": 0.1, "optim.nesterov": True})
    assert not lies_in(branch, {"optim.lr": 0.5, "optim.nesterov": True})
    assert not lies_in(branch, {"optim.lr": 0.1})  # was fixed then


@pytest.mark.slow
def test_readers_show_a_sweep_that_went_on_with_one_more_setting(tmp_path: Path) -> None:
    tree: Tree = {**space(nesterov=False).tree, "objective": "tfkd_reg"}
    e = finished(tmp_path / "e", build_space(tree), [k / 20 for k in range(16)])
    more = {**tree["optim"], "weight_decay": {"low": 1e-5, "high": 1e-2, "log": True}}
    wider = build_space({**tree, "optim": more, "search": {**tree["search"], "study": "tfkd@2"}})
    write_experiment(e, wider.tree, ["tfkd"])
    assert importance(e) == {"tfkd_reg": {}}  # no trial has the setting yet
    report(e, tmp_path / "e.html")
    assert len(arms_of(e, top_k=2, rivals=()).arms) == 2


@pytest.mark.slow
def test_columns_of_tensorboard_hold_the_values_of_trials_outside(tmp_path: Path) -> None:
    e = narrowed(tmp_path)
    narrow = OptunaSearcher(
        build_space({**space(NARROW, study="tfkd@2").tree}), tmp_path / "other"
    ).space
    board = TensorBoard(e / "tb", narrow, "val_accuracy")  # type: ignore[arg-type]
    board.setup()
    data = read(e / "tb").SummaryMetadata("about", metadata.EXPERIMENT_TAG).plugin_data.content
    infos = plugin_data_pb2.HParamsPluginData.FromString(data).experiment.hparam_infos
    columns = {info.name: info for info in infos}
    rates = [r.parameters["optim.lr"] for r in read_records(e)]
    interval = columns["lr"].domain_interval
    assert interval.min_value == min(rates) and interval.max_value == max(rates)


@pytest.mark.ray
@pytest.mark.slow
def test_a_sweep_goes_on_in_a_narrower_space(ray_cluster: str, tmp_path: Path) -> None:
    tree = {**TREE, "search": {"num_samples": 6, "stopping": "none", "sampler": "qmc"}}
    build_tuner(tree, name="e", storage=tmp_path).fit()
    before = {r.name: (r.metrics, r.parameters["optim.lr"]) for r in read_records(tmp_path / "e")}
    middle = sorted(lr for _, lr in before.values())[2]
    lr = {"low": middle, "high": 0.5, "log": True}
    search = {**tree["search"], "num_samples": 9}  # type: ignore[dict-item]
    said: list[str] = []
    resume_tuner(
        tmp_path / "e", space={**tree, "optim": {"lr": lr}, "search": search}, on_note=said.append
    ).fit()
    assert said == [
        "2 of 6 trials lie outside the new space: they are kept but do not guide the search"
    ]
    after = read_records(tmp_path / "e")
    assert [r.number for r in after] == list(range(9))
    assert {r.name: (r.metrics, r.parameters["optim.lr"]) for r in after[:6]} == before
    assert all(r.parameters["optim.lr"] >= middle for r in after[6:])
    assert len(resume_tuner(tmp_path / "e", add_trials=1).fit()) == 1
    inside, outside = outside_of(
        OptunaSearcher(
            build_space({**tree, "optim": {"lr": lr}, "search": {**search, "study": "tfkd@2"}}),
            tmp_path / "e" / "study.journal",
        ),
        build_space(tree),
    )
    assert (len(inside), outside) == (10, {})
