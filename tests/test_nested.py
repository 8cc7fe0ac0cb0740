"""Choices whose items have their own ranges: proposed, refused, recorded, resumed, reused."""

import json
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState
from test_search import finished, run_sweep

from tfkd_ray.run.priors import prior_trials
from tfkd_ray.run.searcher import OptunaSearcher, copy_trials
from tfkd_ray.run.tune import build_tuner
from tfkd_ray.settings.errors import ConfigError
from tfkd_ray.settings.yaml import dump_yaml, parse_yaml
from tfkd_ray.show.importance import importance
from tfkd_ray.show.report import report
from tfkd_ray.space.relate import not_superset, placed, warm_points
from tfkd_ray.space.space import Space, build_space, load_space

DROPOUT = {"low": 0.1, "high": 0.5}
STUDENT = {
    "choices": [
        {"name": "mlp", "dropout": DROPOUT},
        {"name": "cnn", "widths": {"choices": [[4], [8]]}},
    ]
}
SCHEDULE = {"choices": ["step", {"name": "cosine", "warmup_epochs": {"low": 0, "high": 2}}]}


def space(student: Any = STUDENT, schedule: Any = SCHEDULE, **tree: Any) -> Space:
    search = {"num_samples": 24, "sampler": "random", "stopping": "none", **tree.pop("search", {})}
    lr = {"low": 0.01, "high": 1, "log": True}
    return build_space({
        "student": student, "schedule": schedule, "objective": "ce", "epochs": 9, "optim": {"lr": lr},
        "search": search, **tree,
    })  # fmt: skip


@pytest.mark.slow
def test_what_an_item_has_is_asked_for_where_it_is_chosen(tmp_path: Path) -> None:
    s = space()
    assert [p.name for p in s.parameters] == [
        "optim.lr", "schedule", "schedule.cosine.warmup_epochs", "student", "student.cnn.widths", "student.mlp.dropout",
    ]  # fmt: skip
    configs = run_sweep(OptunaSearcher(s, tmp_path / "a"))
    seen = set()
    for config in configs:
        values, student, schedule = (
            config["trial"]["parameters"],
            config["student"],
            config["schedule"],
        )
        seen.add((student["name"], schedule["name"]))
        assert values["student"] == student["name"] and values["schedule"] == schedule["name"]
        assert ("student.mlp.dropout" in values) == (student["name"] == "mlp")
        assert ("student.cnn.widths" in values) == (student["name"] == "cnn")
        if student["name"] == "mlp":
            assert 0.1 <= student["dropout"] == values["student.mlp.dropout"] <= 0.5
        else:
            assert student["widths"] in ([4], [8])
        assert ("schedule.cosine.warmup_epochs" in values) == (schedule["name"] == "cosine")
    assert len(seen) == 4
    assert all(0 <= c["schedule"].get("warmup_epochs", 0) <= 2 for c in configs)


def test_it_reads_back_as_itself() -> None:
    s = space()
    again = build_space(parse_yaml(dump_yaml(s.tree), "again"))
    assert again.tree == s.tree and again.parameters == s.parameters and not not_superset(s, again)


@pytest.mark.slow
def test_an_item_of_an_item_and_items_that_have_no_name(tmp_path: Path) -> None:
    inner = {
        "choices": [
            {"name": "mlp"},
            {"name": "mlp", "dropout": DROPOUT, "hidden": {"choices": [[8], [16]]}},
        ]
    }
    s = space(
        student="mlp",
        schedule="step",
        augment={"choices": [{"flip": True}, {"crop_padding": {"low": 1, "high": 3}}]},
    )
    assert [p.name for p in s.parameters] == ["augment", "augment.2.crop_padding", "optim.lr"]
    found = {c["augment"]["crop_padding"] for c in run_sweep(OptunaSearcher(s, tmp_path / "a"))}
    assert found == {0, 1, 2, 3}
    same = space(student=inner, schedule="step")
    assert [p.name for p in same.parameters] == [
        "optim.lr",
        "student",
        "student.2.dropout",
        "student.2.hidden",
    ]
    configs = run_sweep(OptunaSearcher(same, tmp_path / "b"))
    assert {(c["student"]["dropout"] > 0, tuple(c["student"]["hidden"])) for c in configs} == {
        (False, (64,)), (True, (8,)), (True, (16,)),
    }  # fmt: skip


@pytest.mark.slow
def test_one_level_further_down(tmp_path: Path) -> None:
    teacher = {
        "choices": [
            {"model": "mlp", "epochs": 1},
            {"model": {"choices": ["cnn", {"name": "cnn", "widths": {"choices": [[4], [8]]}}]}},
        ]
    }
    s = build_space(
        {
            "student": "mlp",
            "objective": "kd",
            "epochs": 3,
            "teacher": teacher,
            "search": {"num_samples": 30},
        }
    )
    names = [p.name for p in s.parameters]
    assert names == ["teacher", "teacher.2.model", "teacher.2.model.2.widths"]
    made = {
        (run.epochs, json.dumps(run.student.model_dump(mode="json").get("widths")))
        for run in s.teacher_runs()
    }
    assert made == {(1, "null"), (3, "[16, 32]"), (3, "[4]"), (3, "[8]")}
    configs = run_sweep(OptunaSearcher(s, tmp_path / "a"))
    depth = {sum(n.startswith("teacher") for n in c["trial"]["parameters"]) for c in configs}
    assert depth == {1, 2, 3}


@pytest.mark.parametrize(
    "tree, sentence",
    [
        ({"optim": {"lr": {"choices": [{"low": 0.1, "high": 1}, 0.1]}}}, "optim.lr.choices: its item 1 is a range; items are values, or settings with ranges in them"),
        ({"student": {"choices": [{"name": "mlp", "dropout": DROPOUT}, {"name": "mlp", "dropout": {"low": 0.5, "high": 0.6}}]}}, "student.choices: its items 1 and 2 differ in ranges only; widen one's"),
        ({"student": {"choices": ["cnn", {"name": "mlp", "dropout": {"low": 0.5, "high": 1.5}}]}}, "dropout"),
        ({"student": {"choices": ["cnn", {"name": "mlp", "dropout": {"min": 0.5, "high": 0.6}}]}}, "student.mlp.dropout.min: no such key of a range; it is called 'low'"),
        ({"student": {"choices": ["cnn", {"name": "mlp", "dropout": {"low": 0.6, "high": 0.5}}]}}, "student.mlp.dropout: low must not be above high"),
        ({"student": {"choices": ["cnn", {"name": "mlp", "droput": {"low": 0.1, "high": 0.5}}]}}, "droput"),
        ({"augment": {"choices": [{"flip": True}, {"crop_padding": {"low": 0.5, "high": 2}}]}}, "augment.2.crop_padding: whole numbers only"),
        ({"objective": "kd", "teacher": {"choices": [{"model": "cnn"}, {"model": "mlp", "epochs": {"low": 1, "high": 3}}]}}, "teacher.2.epochs: choices only"),
        *[({"search": {"sampler": sampler}}, f"search.sampler: {sampler} cannot choose among items of schedule and student with ranges of their own; use tpe or random") for sampler in ("gp", "qmc", "grid")],
    ],
    ids=["a range", "twice", "its high end", "another's word", "swapped", "misspelt", "whole", "a teacher's", "gp", "qmc", "grid"],
)  # fmt: skip
def test_what_is_wrong_is_a_sentence(tree: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as error:
        space(**tree)
    assert any(sentence in p for p in error.value.problems), error.value.problems
    assert not any("Traceback" in p or "None" in p for p in error.value.problems)


def test_an_override_finds_an_item_by_what_it_is_called(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    tree = {
        "objective": "ce",
        "student": STUDENT,
        "augment": {"choices": [{"flip": True}, {"crop_padding": 1}]},
    }
    file.write_text(dump_yaml(tree))
    fixed = load_space(
        file, ["student.mlp.dropout=0.2", "augment.2.crop_padding={low: 1, high: 3}"]
    )
    assert [p.name for p in fixed.parameters] == [
        "augment",
        "augment.2.crop_padding",
        "student",
        "student.cnn.widths",
    ]
    plain = load_space(file, ["student={choices: [mlp, cnn]}", "student.mlp.hidden=[8]"])
    assert plain.parameters[-1].domain.probes == [{"name": "mlp", "hidden": [8]}, "cnn"]
    with pytest.raises(
        ConfigError, match=r"student.mpl: no such item of student; did you mean 'mlp'"
    ):
        load_space(file, ["student.mpl.dropout=0.2"])


@pytest.mark.parametrize("name", ["tpe", "random"])
@pytest.mark.parametrize("split", [True, False], ids=["a study each", "one study"])
@pytest.mark.slow
def test_a_killed_driver_changes_no_proposal(tmp_path: Path, name: str, split: bool) -> None:
    sampler = {"name": "tpe", "startup": 3} if name == "tpe" else "random"
    s = space(
        objective=["ce", "lsr"], search={"sampler": sampler, "split": split, "num_samples": 20}
    )
    whole = run_sweep(OptunaSearcher(s, tmp_path / "a"))
    before = run_sweep(OptunaSearcher(s, tmp_path / "b"), kill_at=13)
    assert before + run_sweep(OptunaSearcher(s, tmp_path / "b"))[1:] == whole and len(whole) == 20


@pytest.mark.slow
def test_a_model_learns_what_only_some_trials_have(tmp_path: Path) -> None:
    """The best is an mlp with little dropout; random search puts a quarter of its trials there."""
    s = space(schedule="step", search={"sampler": {"name": "tpe", "startup": 8}, "num_samples": 48})
    searcher = OptunaSearcher(s, tmp_path / "a")
    near = []
    for k in range(48):
        config = searcher.suggest(f"id{k}")
        assert isinstance(config, dict)
        dropout = config["student"].get("dropout")
        near.append(dropout is not None and dropout < 0.3)
        accuracy = 0.2 if dropout is None else 0.9 - dropout
        searcher.on_trial_complete(f"id{k}", {"epoch": 9, "val_accuracy": accuracy})
    assert sum(near[24:]) >= 12


@pytest.mark.slow
def test_a_wider_space_holds_the_trials_of_a_narrower_one(tmp_path: Path) -> None:
    narrow, journal = space(precision="fp32"), tmp_path / "study.journal"
    before = run_sweep(OptunaSearcher(narrow, journal), kill_at=20)
    wider = {"choices": ["resnet18", *reversed(STUDENT["choices"])]}
    wider = json.loads(json.dumps(wider).replace("0.5", "0.6"))
    wide = space(
        student=wider,
        schedule=SCHEDULE,
        precision="fp32",
        search={"study": "tfkd@2", "num_samples": 30},
    )
    assert not_superset(narrow, wide) == []
    new = OptunaSearcher(wide, journal)
    copy_trials(OptunaSearcher(narrow, journal), new)
    after = run_sweep(new)
    assert after[0]["student"] == before[-1]["student"] and after[0]["trial"]["number"] == 20
    assert [c["trial"]["number"] for c in after] == list(range(20, 30))
    problems = not_superset(wide, narrow)
    assert any("student: was resnet18 | cnn | mlp" in p for p in problems)
    assert any(
        p.startswith("student.mlp.dropout: was 0.1 to 0.6, and 0.1 to 0.5 does not hold")
        for p in problems
    )
    fixed = {"choices": ["mlp", STUDENT["choices"][1]]}
    assert (
        "student.mlp.dropout: was searched (0.1 to 0.5), and is fixed now; leave it searched"
        in not_superset(narrow, space(student=fixed, precision="fp32"))
    )
    assert "student.mlp.dropout: was fixed at 0.0, which 0.1 to 0.5 does not hold" in not_superset(
        space(student=fixed, precision="fp32"), narrow
    )


@pytest.mark.slow
def test_earlier_trials_find_their_place(tmp_path: Path) -> None:
    old = space(
        student={
            "choices": ["mlp", {"name": "mlp", "dropout": 0.25}, {"name": "cnn", "widths": [8]}]
        }
    )
    earlier = finished(tmp_path / "old", old, [k / 24 for k in range(24)])
    s = space(search={"sampler": {"name": "tpe", "startup": 3}})
    priors = prior_trials(s, [earlier])
    assert {p.params["student"] for p in priors} == {"mlp", "cnn"} and 0 < len(priors) < 24
    for prior in priors:
        assert prior.params.get("student.mlp.dropout", 0.25) == 0.25  # not 0, which lies outside
        assert ("student.cnn.widths" in prior.params) == (prior.params["student"] == "cnn")
    outside = old.branches[0].config({"student": "mlp", "schedule": "step", "optim.lr": 0.1})
    assert placed(space(), outside) == [
        "student: " + repr(outside.student.model_dump(mode="json")) + " there, mlp | cnn here"
    ]
    nested = finished(tmp_path / "nested", space(), [k / 24 for k in range(24)])
    assert len(prior_trials(s, [nested])) == 24
    warm = run_sweep(OptunaSearcher(s, tmp_path / "a", priors=[nested]))
    assert len(warm) == 24


def test_published_settings_take_the_middle_of_what_an_item_has(tmp_path: Path) -> None:
    s = space(
        objective={
            "name": "tfkd_reg",
            "alpha": {"low": 0.01, "high": 0.99},
            "temperature": {"low": 1, "high": 40},
        }
    )
    points = warm_points(s)
    assert points and all(
        p.values["student"] == "mlp" and p.values["student.mlp.dropout"] == 0.3 for p in points
    )
    first = run_sweep(OptunaSearcher(s, tmp_path / "a"), most=1)[0]["trial"]["parameters"]
    assert first == points[0].values


@pytest.mark.slow
def test_importance_is_of_what_every_trial_has(tmp_path: Path) -> None:
    done = finished(tmp_path / "e", space(), [k / 24 for k in range(24)])
    for evaluator in ("pedanova", "fanova", "mdi"):
        assert set(importance(done, evaluator=evaluator)["ce"]) == {
            "optim.lr",
            "schedule",
            "student",
        }


def test_a_whole_sweep(tmp_path: Path, ray_cluster: str) -> None:
    file = tmp_path / "nested.yaml"
    file.write_text(
        "objective: ce\nepochs: 3\n"
        "student: {choices: [{name: mlp, dropout: {low: 0.0, high: 0.5}}, {name: cnn, widths: [4]}]}\n"
        "search: {num_samples: 8, sampler: random}\n"
    )
    s = load_space(file)
    assert [p.name for p in s.parameters] == ["student", "student.mlp.dropout"]
    build_tuner(file, name="nested", storage=tmp_path).fit()
    storage = optuna.storages.JournalStorage(
        optuna.storages.journal.JournalFileBackend(str(tmp_path / "nested/study.journal"))
    )
    (study,) = optuna.study.get_all_study_names(storage)
    done = optuna.load_study(study_name=study, storage=storage).get_trials()
    assert len(done) == 8 and {t.state for t in done} <= {TrialState.COMPLETE, TrialState.PRUNED}
    assert {len(t.params) for t in done} == {1, 2}
    report(tmp_path / "nested", tmp_path / "report.html")
    assert "mlp.dropout" in (tmp_path / "report.html").read_text()
