"""Search spaces: searched values, refused values, and reading back."""

import copy
import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from conftest import ROOT, SHIPPED

from tfkd_ray.learn.config import TrainConfig
from tfkd_ray.learn.objectives import PUBLISHED
from tfkd_ray.run.searcher import OptunaSearcher
from tfkd_ray.settings.errors import ConfigError
from tfkd_ray.settings.passwords import masked
from tfkd_ray.settings.schema import members, tag, validated
from tfkd_ray.settings.yaml import dump_yaml, parse_yaml
from tfkd_ray.space.ranges import Choices, Range
from tfkd_ray.space.relate import not_superset, warm_points
from tfkd_ray.space.search_config import Halving, Hyperband, Median, SearchConfig
from tfkd_ray.space.space import Space, build_space, load_space
from tfkd_ray.store.experiment import pareto


def space(**tree: Any) -> Space:
    return build_space({"objective": "lsr", "student": "mlp", **tree}, "mine.yaml")


def propose(space: Space, n: int = 1) -> list[tuple[dict[str, Any], TrainConfig]]:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    return [group.propose(study.ask()) for _ in range(n) for group in space.groups]


DIGITS = ROOT / "search_spaces/digits_tfkd.yaml"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_shipped_spaces_are_valid_and_read_back_the_same(path: Path) -> None:
    shipped = load_space(path)
    again = build_space(parse_yaml(dump_yaml(shipped.tree), "again"))
    assert again.tree == shipped.tree
    assert [b.parameters for b in again.branches] == [b.parameters for b in shipped.branches]
    for values, config in propose(shipped, 3):
        assert all(p in values for p in values) and config.epochs == shipped.epochs


SGD_OF_PATIENT = {
    "the student's": {"objective": "ce", "optim": {"name": "sgd", "lr": {"low": 0.01, "high": 0.1}}},
    "a teacher's": {
        "objective": "kd",
        "teacher": {"model": "cnn", "optim": {"name": "sgd", "lr": 0.1}},
        "optim": {"lr": {"low": 0.001, "high": 0.01}},
    },
    "one of several teachers'": {
        "objective": "kd",
        "teacher": [{"model": "cnn", "optim": {"name": "sgd", "lr": 0.1}}, {"model": "cnn", "seed": 1}],
        "optim": {"lr": {"low": 0.001, "high": 0.01}},
    },
}  # fmt: skip


@pytest.mark.parametrize("tree", SGD_OF_PATIENT.values(), ids=SGD_OF_PATIENT)
def test_another_optimizer_than_the_recipes_is_read_back_as_what_it_is(
    tree: dict[str, Any],
) -> None:
    first = build_space({"recipe": "patient", **tree})
    again = build_space(parse_yaml(dump_yaml(first.tree), "again"))
    assert again.tree == first.tree
    for config in (branch.example for branch in first.branches):
        assert validated(TrainConfig, config.tree) == config


def test_a_range_proposes_values_within_it_and_of_its_kind() -> None:
    s = space(
        optim={
            "lr": {"low": 1e-3, "high": 1, "log": True},
            "batch_size": {"low": 16, "high": 64, "step": 16},
        }
    )
    configs = [config for _, config in propose(s, 50)]
    assert all(1e-3 <= c.optim.lr <= 1 for c in configs)
    assert {c.optim.batch_size for c in configs} == {16, 32, 48, 64}
    assert sum(c.optim.lr < 0.0316 for c in configs) == pytest.approx(25, abs=10)


def test_log_complement_is_log_uniform_in_1_minus_x() -> None:
    s = space(
        objective={
            "name": "tfkd_reg",
            "correct_prob": {"low": 0.9, "high": 0.999, "log_complement": True},
        }
    )
    values = [c.objective.correct_prob for _, c in propose(s, 60)]  # type: ignore[union-attr]
    assert min(values) >= 0.9 and max(values) <= 0.999
    assert sum(v > 0.99 for v in values) == pytest.approx(30, abs=12)


def test_objectives_are_conditional_and_split_equally() -> None:
    s = space(
        objective=[
            {"name": "kd", "temperature": {"low": 1, "high": 9}},
            {"name": "tfkd_reg", "alpha": {"choices": [0.1, 0.5]}},
        ],
        teacher={"model": "mlp"},
    )
    assert [g.name for g in s.groups] == ["kd", "tfkd_reg", "ce", "lsr"]
    assert "added ce and lsr" in s.notes[0]
    assert [set(values) for values, _ in propose(s)] == [
        {"objective.kd.temperature"},
        {"objective.tfkd_reg.alpha"},
        set(),
        {"objective.lsr.alpha"},
    ]
    alone = space(
        objective=["kd", "tfkd_reg"], teacher={"model": "mlp"}, search={"baselines": False}
    )
    assert [g.name for g in alone.groups] == ["kd", "tfkd_reg"]


def test_without_a_split_the_sampler_chooses_the_objective() -> None:
    s = space(
        objective=["ce", {"name": "lsr", "alpha": {"low": 0.1, "high": 0.2}}],
        search={"split": False},
    )
    assert len(s.groups) == 1
    assert {config.objective.name for _, config in propose(s, 20)} == {"ce", "lsr"}


def test_choices_may_be_whole_settings() -> None:
    s = space(
        student={"choices": ["mlp", {"widths": [4], "name": "cnn"}]},
        schedule={"choices": ["step", "cosine"]},
    )
    assert {c.student.name for _, c in propose(s, 20)} == {"mlp", "cnn"}
    again = build_space(parse_yaml(dump_yaml(s.tree), "again"))
    study = optuna.create_study()  # what was proposed before is known after reading back
    s.groups[0].propose(study.ask())
    again.groups[0].propose(study.ask())


def test_kd_and_a_self_teacher_go_together() -> None:
    s = space(
        objective=["kd", "tfkd_self"],
        teacher={"model": "cnn", "epochs": 3},
        search={"baselines": False},
    )
    assert sorted(run.student.name for run in s.teacher_runs()) == ["cnn", "mlp"]
    again = build_space(parse_yaml(dump_yaml(s.tree), "again"))
    assert again.tree == s.tree and again.teacher_runs() == s.teacher_runs()


def test_every_teacher_that_may_be_needed_is_known_before() -> None:
    s = space(
        objective="kd",
        teacher={"model": {"choices": ["mlp", "cnn"]}, "epochs": {"choices": [1, 5]}},
    )
    assert sorted((run.student.name, run.epochs) for run in s.teacher_runs()) == [
        ("cnn", 1), ("cnn", 5), ("mlp", 1), ("mlp", 5),
    ]  # fmt: skip
    assert space(objective="ce").teacher_runs() == []


@pytest.mark.parametrize(
    "tree, sentence",
    [
        ({"optim": {"lr": {"low": 2, "high": 1}}}, "optim.lr: low must not be above high, got low 2 and high 1; swap them"),
        ({"optim": {"lr": {"low": 1, "high": 1}}}, "optim.lr: low and high are both 1; write the value itself"),
        ({"optim": {"lr": {"low": 0, "high": 1, "log": True}}}, "optim.lr: a log range starts above 0, got low 0"),
        ({"optim": {"lr": {"low": 1}}}, "optim.lr.high: a range needs a number here, got None"),
        ({"optim": {"lr": {"low": "a", "high": 1}}}, "optim.lr.low: a range needs a number here, got 'a'"),
        ({"optim": {"lr": {"low": 1, "high": 2, "logg": True}}}, "optim.lr.logg: no such key of a range; did you mean 'log'?"),
        ({"optim": {"lr": {"low": 1, "high": 2, "log": True, "step": 1}}}, "optim.lr: only one of log, step"),
        ({"optim": {"lr": {"low": 1, "high": 2, "step": 0}}}, "optim.lr.step: a number above 0, got 0"),
        ({"optim": {"lr": {"low": 1, "high": 2, "log_complement": True}}}, "optim.lr: log_complement needs 0 <= low < high < 1"),
        ({"optim": {"lr": {"from": 1, "to": 5, "log": True}}}, "optim.lr: needs a number or a range, got {from: 1, to: 5, log: true}; a range is written {low: 1, high: 5, log: true}"),
        ({"optim": {"lr": {"values": [1, 2]}}}, "optim.lr: needs a number or a range, got {values: [1, 2]}; a range is written {low: ..., high: ...}, or {choices: [...]}"),
        ({"optim": {"lr": {"low": 1, "max": 2}}}, "optim.lr.max: no such key of a range; it is called 'high'"),
        ({"objective": {"name": "lsr", "alpha": [0.4, 0.1]}}, "objective.lsr.alpha: a list is no range, got [0.4, 0.1]; write for all between {low: 0.1, high: 0.4}, for one of them {choices: [0.4, 0.1]}"),
        ({"optim": {"batch_size": [8, 16, 32]}}, "optim.batch_size: a list is no range, got [8, 16, 32]; write for one of them {choices: [8, 16, 32]}"),
        ({"teacher": {"epochs": [1, 2]}, "objective": "tfkd_self"}, "teacher.epochs: a list is no range"),
        ({"optim": {"lr": {"choices": []}}}, "optim.lr.choices: needs a list of at least one value, got []"),
        ({"optim": {"lr": {"choices": [1, 1]}}}, "optim.lr.choices: a value is given twice"),
        ({"optim": {"lr": {"choices": [1], "low": 1}}}, "optim.lr: choices stand alone, got also low"),
        ({"optim": {"lr": {"choices": [float("nan"), 1]}}}, "optim.lr.choices: nan equals no value, not even itself"),
        ({"student": {"choices": ["mlp", {"name": "mlp", "dropout": float("nan")}]}}, "student.choices: nan equals no value"),
        ({"student": {"choices": ['{"name": "mlp"}', {"name": "mlp"}]}}, "student.choices: a text and the settings that it stands for"),
        ({"optim": {"lr": {"choices": [0.1, -1]}}}, "optim.lr: should be greater than 0, got -1"),
        ({"optim": {"lrr": {"low": 1, "high": 2}}}, "optim.lrr: no such setting; did you mean 'lr'?"),
        ({"optim": {"batch_size": {"low": 1.5, "high": 3}}}, "optim.batch_size: whole numbers only, got 1.5 to 3"),
        ({"objective": {"name": "lsr", "alpha": {"low": 0, "high": 1.5}}}, "objective.lsr.alpha: should be at most 1, got 1.5"),
        ({"objective": [{"name": "kd", "temprature": 1}, "ce"], "teacher": {"model": "mlp"}}, "objective.kd.temprature: no such setting; did you mean 'temperature'?"),
        ({"objective": ["ce", "ce"]}, "objective: ce is listed twice"),
        ({"objective": []}, "objective: an empty list"),
        ({"objective": None}, "objective: required, and not given"),
        ({"objective": ["ce", 3]}, "objective: needs a name or settings, got 3"),
        ({"objective": {"name": {"choices": ["ce", "lsr"]}}}, "objective.name: write a list instead"),
        ({"objective": {"choices": ["ce", "lsr"]}}, "objective: write a list instead"),
        ({"schedule": {"name": {"choices": ["cosine", "step"]}}}, "schedule.name: search the whole setting instead: schedule: {choices:"),
        ({"objective": [{"name": ["ce"]}, "lsr"]}, "objective: no such name "),
        ({"optim": {"lr": {"low": 1, "high": float("inf")}}}, "optim.lr.high: a finite number, got inf"),
        ({"optim": {"lr": {"low": 1, "high": 2, "step": float("nan")}}}, "optim.lr.step: a finite number, got nan"),
        ({"optim": {"batch_size": {"low": 10, "high": 10**400}}}, "optim.batch_size.high: a finite number, got 1000"),
        ({"optim": {"nesterov": {"choices": [False, True]}, "momentum": {"choices": [0.0, 0.9]}}}, "optim: nesterov needs a momentum above 0"),
        ({"student": {"name": "cnn", "widths": [1, 1, 1, 1, 1]}}, "student.widths: 5 stages halve a 8x8 image to nothing"),
        ({"epochs": {"low": 1, "high": 9}}, "epochs: must have one value for the whole sweep"),
        ({"workers": {"choices": [1, 2]}}, "workers: must have one value for the whole sweep"),
        ({"seed": {"choices": [1, 2]}}, "seed: must have one value for the whole sweep"),
        ({"teacher": {"optim": {"lr": {"low": 0.1, "high": 0.2}}}, "objective": "tfkd_self"}, "teacher.optim.lr: choices only"),
        ({"objective": {"name": "tfkd_reg_code", "temperature": {"low": 1, "high": 9}}}, "objective.tfkd_reg_code.temperature: can only be fixed"),
        ({"search": {"num_samples": 0}}, "search.num_samples: should be at least 1, got 0"),
        ({"search": {"nm_samples": 3}}, "search.nm_samples: no such setting; did you mean 'num_samples'?"),
        ({"search": 3}, "search: needs settings below it (key: value), got 3"),
        ({"objective": ["ce", "lsr"], "search": {"num_samples": 1}}, "search.num_samples: 2 objectives share it equally, got 1"),
    ],
)  # fmt: skip
def test_a_wrong_space_gets_a_sentence(tree: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as error:
        space(**tree)
    assert any(p.startswith(sentence) for p in error.value.problems), str(error.value)


@pytest.mark.parametrize(
    "changes, note",
    [
        ({"search": {"num_samples": 6}}, "nothing is searched: all 6 trials are the same run, including the seed"),
        ({"objective": ["ce", "lsr"], "search": {"num_samples": 6}}, "nothing is searched: the 3 trials of ce, lsr each are"),
        ({"objective": ["ce", {"name": "lsr", "alpha": {"low": 0.1, "high": 0.2}}]}, "nothing is searched for ce: the 12 trials of ce each"),
        ({"search": {"num_samples": 1}}, None),
        ({"optim": {"lr": {"low": 0.1, "high": 0.2}}}, None),
    ],
)  # fmt: skip
def test_equal_trials_are_noted(changes: dict[str, Any], note: str | None) -> None:
    notes = space(**changes).notes
    assert notes == () if note is None else notes[-1].startswith(note), notes


@pytest.mark.parametrize(
    "changes",
    [
        {"student": {"choices": ["mlp", {"name": "mlp"}]}},
        {"student": {"choices": ["mlp", "cnn", {"name": "mlp", "hidden": [64]}]}},
        {"student": {"choices": ["mlp", {"name": "mlp", "dropout": 0}, {"name": "cnn", "widths": {"choices": [[8], [16]]}}]}},
        {"schedule": {"choices": ["cosine", {"name": "cosine", "final": 0}]}},
        {"optim": {"lr": {"choices": [0.1, "0.1"]}}},
        {"objective": "kd", "teacher": {"model": {"choices": ["cnn", {"name": "cnn"}]}}},
    ],
    ids=str,
)  # fmt: skip
def test_choices_that_are_the_same_settings_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"choices: .* are the same settings; leave one out"):
        space(**changes)


def test_choices_that_differ_inside_of_a_range_are_taken() -> None:
    item = {"name": "mlp", "dropout": {"low": 0, "high": 0.5}}
    assert len(space(student={"choices": ["mlp", item]}).parameters) == 2


def test_a_range_in_a_list_is_said_not_to_be_searched() -> None:
    args = {"widths": [{"low": 8, "high": 64}, 32], "more": [{"x": {"choices": [1, 2]}}]}
    found = own(args | {"bins": [{"low": 0, "high": 1, "name": "first"}]})
    told = [note for note in found.notes if "is not searched" in note]
    assert [note.partition(":")[0] for note in told] == [
        "student.args.widths.0",
        "student.args.more.0.x",
    ]


def test_all_problems_of_a_space_are_named_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        space(
            optim={"lr": {"low": 2, "high": 1}, "momentum": 2},
            objective=[
                {"name": "kd", "temprature": 1},
                {"name": "lsr", "alpha": {"low": 0, "high": 3}},
            ],
            search={"num_samples": 0},
        )
    text = str(error.value)
    for part in ("num_samples", "optim.lr: low", "optim.momentum", "kd.temprature", "lsr.alpha"):
        assert part in text
    assert len(error.value.problems) == 5


OVERRIDES = [
    ("optim.lr=1e-4", lambda s: s.tree["optim"]["lr"], 1e-4),
    ("objective=ce", lambda s: [b.objective for b in s.branches], ["ce"]),
    ("objective.tfkd_reg.temperature=4", lambda s: s.tree["objective"][0]["temperature"], 4.0),
    ("student=mlp", lambda s: s.tree["student"]["name"], "mlp"),
    ("student.widths=[8]", lambda s: s.tree["student"]["widths"], [8]),
    ("search.num_samples=8", lambda s: s.search.num_samples, 8),
    ("teacher.epochs={choices: [1, 2]}", lambda s: len(s.teacher_runs()), 2),
    (
        "schedule.final=0.1",
        lambda s: s.tree["schedule"],
        {"name": "cosine", "warmup_epochs": 1.0, "final": 0.1},
    ),
]


@pytest.mark.parametrize("text, read, value", OVERRIDES, ids=[o[0] for o in OVERRIDES])
def test_overrides_go_through_the_same_tree(text: str, read: Any, value: Any) -> None:
    assert read(load_space("digits_tfkd", [text])) == value


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("optim.lr", "an override is key.path=value"),
        ("optm.lr=1", "optm: no such setting; did you mean 'optim'?"),
        ("optim.lrr=1", "optim.lrr: no such setting; did you mean 'lr'?"),
        ("epochs.x=1", "epochs: is 54, with nothing below it"),
        ("objective.kd.alpha=1", "objective.kd: not among the file's objectives"),
        (
            "objective.tfkd_reg.alpha.high=2",
            "objective.tfkd_reg.alpha: should be at most 1, got 2",
        ),
        ("optim.lr=[", "not YAML"),
        (
            "objective.tfkd_reg.alpha=1.5",
            "objective.tfkd_reg.alpha: should be at most 1, got 1.5",
        ),
    ],
)
def test_a_wrong_override_gets_a_sentence(text: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_space("digits_tfkd", [text])
    assert any(sentence in p for p in error.value.problems), str(error.value)


def test_one_run_needs_one_value_everywhere() -> None:
    shipped = "digits_tfkd"
    with pytest.raises(ConfigError) as error:
        load_space(shipped).single()
    needed, fixes, *_ = error.value.problems
    assert needed.startswith("objective, optim.lr, optim.weight_decay: are searched")
    assert fixes == "fix them: objective=tfkd_reg optim.lr=0.01 optim.weight_decay=1e-05"
    with pytest.raises(ConfigError, match=r"optim\.lr: is searched .* fix it: optim\.lr=0\.01"):
        load_space(shipped, ["objective=ce", "optim.weight_decay=0"]).single()
    one = load_space(shipped, ["objective=ce", "optim.lr=0.1", "optim.weight_decay=0"]).single()
    assert one.optim.lr == 0.1 and one.objective.name == "ce"


def test_rungs_are_at_a_ninth_and_a_third() -> None:
    assert Halving().rungs(54) == [6, 18]
    assert Halving().rungs(9) == [1, 3] and Halving(min_epochs=8).rungs(9) == [8]
    assert Halving(min_epochs=5, factor=2).rungs(20) == [5, 10]
    assert Halving().rungs(1) == []


def test_a_rung_that_would_save_next_to_nothing_is_left_out() -> None:
    for epochs in range(1, 400):
        for stopping in (
            Halving(),
            Halving(factor=2),
            Halving(factor=4, min_epochs=3),
            Hyperband(),
        ):
            rungs = stopping.rungs(epochs)
            assert all(epochs - rung >= epochs / 9 for rung in rungs)
            assert (
                epochs < 9 or len(rungs) >= 2 or stopping.min_epochs
            )  # and nothing else is left out
    assert Halving().rungs(100) == [11, 33] and Halving().rungs(200) == [22, 66]  # not 99, not 198


def test_ranges_and_choices_say_what_they_are() -> None:
    assert str(Range(1, 2, log=True)) == "1 to 2 (log)"
    assert str(Range(0.9, 0.99, log_complement=True)) == "0.9 to 0.99 (log in 1 - x)"
    assert str(Choices((1, "a"))) == "1 | a"


@pytest.mark.slow
def test_mutated_trees_are_refused_with_sentences_and_never_crash() -> None:
    """A first fuzz test: replace random values of a shipped space by unusual ones."""
    rng = random.Random(0)
    odd = [
        None,
        [],
        {},
        "",
        "x",
        -1,
        0,
        1e400,
        [None],
        {"low": 1},
        {"choices": [[]]},
        True,
        {"name": 3},
        [["ce"]],
    ]
    shipped = parse_yaml(DIGITS.read_text(), "f")
    for _ in range(300):
        tree = copy.deepcopy(shipped)
        where: Any = tree
        while True:
            key = rng.choice(list(where) if isinstance(where, dict) else list(range(len(where))))
            if not isinstance(where[key], dict | list) or not where[key] or rng.random() < 0.3:
                break
            where = where[key]
        where[key] = rng.choice(odd)
        try:
            build_space(tree, "f")
        except ConfigError as error:
            assert all(": " in p for p in error.problems)


# --- how it is searched: what goes together


CHOICE = {"optim": {"lr": {"choices": [0.1, 0.2]}}}
RANGE = {"optim": {"lr": {"low": 0.01, "high": 0.5, "log": True}}}
PROBES: dict[str, dict[str, Any]] = {
    "ranges": RANGE,
    "choices": CHOICE,
    "`split: false`": {**CHOICE, "objective": ["ce", "lsr"], "search": {"split": False}},
    "several metrics": {**CHOICE, "search": {"metric": ["val_accuracy", "val_ece"]}},
    "early stopping": {**CHOICE, "search": {"stopping": "halving"}},
}


def allowed(sampler: str, probe: dict[str, Any]) -> bool:
    """Return True if the pair is accepted; the sampler gets its other requirements."""
    tree = {"objective": "ce", "student": "mlp", "epochs": 9, **probe}
    if sampler == "cmaes" and probe is not RANGE and probe is not CHOICE:
        tree |= RANGE
    search = {"baselines": False, "sampler": sampler, "stopping": "none", **probe.get("search", {})}
    try:
        build_space({**tree, "search": search})
    except ConfigError as error:
        assert all(p.startswith("search.") for p in error.problems), str(error)
        return False
    return True


def pairs() -> str:
    """Return the table of docs/search.md, from the code."""
    lines = [
        f"| sampler | {' | '.join(PROBES)} | earlier experiments | constraints |",
        "|---" * (len(PROBES) + 3) + "|",
    ]
    for kind in members(SearchConfig.model_fields["sampler"]):
        cells = ["yes" if allowed(str(tag(kind)), probe) else "no" for probe in PROBES.values()]
        for learns in (kind.priors, kind.constrained):  # type: ignore[attr-defined]
            cells.append("yes" if learns else "no")
        lines.append(f"| `{tag(kind)}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def test_the_table_of_what_goes_together_is_that_of_the_code() -> None:
    text = (ROOT / "docs/search.md").read_text()
    assert pairs() in text, pairs()
    for name in (tag(m) for m in members(SearchConfig.model_fields["stopping"])):
        assert f"| `{name}` |" in text


ONE_LR = {"lr": {"low": 0.01, "high": 0.5, "log": True}}


@pytest.mark.parametrize(
    "tree, sentence",
    [
        ({"optim": {"lr": {"choices": [1, 2]}}, "search": {"sampler": "cmaes", "stopping": "none"}}, "search.sampler: cmaes proposes numbers only, and optim.lr is a choice"),
        ({"optim": ONE_LR, "search": {"sampler": "cmaes"}}, "search.stopping: a trial that is stopped early is missing from a generation of cmaes; set stopping: none"),
        ({"optim": ONE_LR, "search": {"sampler": "cmaes", "stopping": "none", "metric": ["val_accuracy", "val_ece"]}}, "search.sampler: cmaes has one metric only"),
        ({"optim": ONE_LR, "search": {"sampler": "grid"}}, "search.sampler: grid needs choices or a step, and optim.lr is 0.01 to 0.5 (log)"),
        ({"optim": {"lr": {"choices": [1, 2]}}, "search": {"sampler": "grid", "num_samples": 3}}, "search.num_samples: the grid has 2 points, each is one trial, got 3; leave it out"),
        ({"optim": {"batch_size": {"low": 1, "high": 200_000}}, "search": {"sampler": "grid"}}, "search.sampler: a grid of 200000 trials is more than 100000"),
        ({"objective": ["ce", "lsr"], "search": {"sampler": "gp", "split": False}}, "search.sampler: gp cannot choose among objectives; use tpe or random"),
        ({"optim": ONE_LR, "search": {"metric": ["val_accuracy", "val_nll"], "stopping": "median"}}, "search.stopping: median judges by one metric, and there are 2"),
        ({"optim": ONE_LR, "search": {"metric": ["val_nll", "val_nll"]}}, "search.metric: a list of different metrics, got val_nll, val_nll"),
        ({"optim": ONE_LR, "search": {"metric": []}}, "search.metric: "),
        ({"optim": ONE_LR, "search": {"metric": ["val_acc"]}}, "search.metric: no such name 'val_acc'; did you mean 'val_accuracy'?"),
        ({"epochs": 1, "optim": ONE_LR, "search": {"stopping": "hyperband"}}, "search.stopping: hyperband has no rung in 1 epochs"),
        ({"epochs": 9, "optim": ONE_LR, "search": {"stopping": {"name": "halving", "min_epochs": 9}}}, "search.stopping: halving would never stop a trial: min_epochs is 9 of 9"),
        ({"optim": ONE_LR, "search": {"metric": ["val_accuracy", "parameters"], "stopping": "none"}}, "search.more_metrics: the number of parameters is the same in all trials, because the student is fixed"),
        ({"optim": ONE_LR, "search": {"metric": ["parameters", "val_accuracy"]}}, "search.metric: no such name 'parameters'"),
        ({"epochs": 9, "optim": ONE_LR, "search": {"stopping": "hyperband", "num_samples": 5}}, "search.stopping: hyperband's 3 brackets need 6 trials of each objective, got 5"),
        ({"optim": ONE_LR, "search": {"stopping": "median", "num_samples": 5}}, "search.stopping: median begins after 5 full-length trials of an objective, and each has 5"),
        ({"optim": ONE_LR, "search": {"gpu_hours": 1}}, "search.gpu_hours: trials here use no GPU"),
        ({"search": {"time_budget_s": 0}}, "search.time_budget_s: should be greater than 0, got 0"),
        ({"search": {"cpu_hours": -1}}, "search.cpu_hours: should be greater than 0, got -1"),
        ({"search": {"max_failed_trials": 0}}, "search.max_failed_trials: should be at least 1, got 0"),
        ({"search": {"sampler": "tpee"}}, "search.sampler: no such name 'tpee'; did you mean 'tpe'?"),
        ({"search": {"sampler": {"name": "tpe", "startupp": 3}}}, "search.sampler.tpe.startupp: no such setting; did you mean 'startup'?"),
        ({"search": {"stopping": "asa"}}, "search.stopping: no such name 'asa'; did you mean 'asha'?"),
        ({"search": {"storage": "sqlite://"}}, "search.storage: a database in memory ends with the process"),
        ({"search": {"storage": "study.db"}}, "search.storage: a URL: sqlite:///FILE, or postgresql://USER@HOST/DATABASE"),
    ],
)  # fmt: skip
def test_a_wrong_search_gets_a_sentence(tree: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as error:
        space(**tree)
    assert any(p.startswith(sentence) for p in error.value.problems), str(error.value)


def test_a_sampler_whose_package_is_missing_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tfkd_ray.space.space.importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"cmaes needs the package cmaes, which is not here: pip install cmaes"
    ):
        space(optim=ONE_LR, search={"sampler": "cmaes", "stopping": "none"})


def test_a_grid_is_not_halved_unless_the_file_says_so() -> None:
    given = {"optim": {"lr": {"choices": [0.1, 0.2, 0.4]}}, "objective": ["ce", "tfkd_reg"]}
    search = {"sampler": "grid", "baselines": False}
    grid = space(**given, search=search)
    assert grid.stopping.name == "none" and grid.rungs == []
    assert build_space(grid.tree).stopping == grid.stopping  # as resume reads it
    halved = space(**given, search={**search, "stopping": "halving"})
    assert halved.stopping.name == "halving" and halved.rungs
    assert build_space(halved.tree).stopping == halved.stopping
    other = space(**given, search={"sampler": "random", "baselines": False})
    assert other.stopping.name == "halving"


def test_a_grid_says_how_many_trials_it_is_and_reads_back() -> None:
    s = space(
        optim={"lr": {"choices": [1, 2, 3]}, "momentum": {"low": 0, "high": 0.9, "step": 0.3}},
        search={"sampler": "grid"},
    )
    assert s.search.num_samples == 12
    assert build_space(parse_yaml(dump_yaml(s.tree), "again")).tree == s.tree


def test_hyperband_deals_its_trials_out_evenly() -> None:
    h = Hyperband()
    assert h.brackets(9) == [[1, 3], [3], []]
    dealt = [h.bracket(9, k) for k in range(34)]
    assert [dealt.count(b) for b in range(3)] == [18, 10, 6]  # 9 : 5 : 3, as of Optuna
    assert sorted(set(dealt[:4])) == [0, 1, 2]


def test_median_judges_after_every_ninth() -> None:
    assert Median().rungs(54) == [6, 12, 18, 24, 30, 36, 42, 48]
    assert Median(min_epochs=4).rungs(9) == [4, 8] and Median().rungs(1) == []


# --- published settings


def test_a_search_begins_with_the_published_settings_that_lie_in_the_space() -> None:
    s = space(
        objective=[
            {
                "name": "kd",
                "alpha": {"low": 0.5, "high": 0.99},
                "temperature": {"low": 1, "high": 30, "log": True},
            },
            {
                "name": "tfkd_reg",
                "correct_prob": {"low": 0.95, "high": 0.999, "log_complement": True},
            },
            {
                "name": "tfkd_self",
                "loss_scale": {"low": 0.01, "high": 1, "log": True},
                "temperature": 6,
                "alpha": 0.9048,
            },
        ],
        teacher={"model": "cnn"},
        optim={
            "lr": {"low": 0.01, "high": 0.4, "log": True},
            "weight_decay": {"low": 1e-3, "high": 1e-1, "log": True},
        },
        search={"num_samples": 100, "baselines": False},
    )
    points = warm_points(s)
    assert [(p.objective, p.values.get("objective.kd.alpha")) for p in points] == [
        ("kd", 0.9), ("kd", 0.9), ("kd", 0.95), ("kd", 0.5), ("tfkd_reg", None), ("tfkd_self", None),
    ]  # fmt: skip
    assert points[0].origin == "CRD and mdistiller"
    assert (
        points[0].values["optim.lr"] == 0.1
    )  # the paper's; its weight decay is outside, so the middle
    assert points[0].values["optim.weight_decay"] == pytest.approx(1e-2)
    assert points[4].values["objective.tfkd_reg.correct_prob"] == 0.99
    assert points[5].values["objective.tfkd_self.loss_scale"] == 0.525
    for point in points:  # and each is a configuration
        branch = next(b for b in s.branches if b.objective == point.objective)
        branch.config(point.values)


def test_published_settings_are_one_each_or_a_quarter_and_can_be_left_out() -> None:
    kd = {"name": "kd", "alpha": {"low": 0, "high": 1}, "temperature": {"low": 1, "high": 30}}
    for samples, count in ((40, 6), (16, 4), (8, 2), (3, 1)):
        s = space(objective=kd, teacher={"model": "mlp"}, search={"num_samples": samples})
        assert len(warm_points(s)) == count
    assert (
        warm_points(space(objective=kd, teacher={"model": "mlp"}, search={"warm_start": False}))
        == []
    )
    assert warm_points(space(optim={"lr": {"choices": [1, 2]}}, search={"sampler": "grid"})) == []
    both = space(
        objective=[kd, "ce"], teacher={"model": "mlp"}, search={"split": False, "baselines": False}
    )
    assert [p.objective for p in warm_points(both)] == ["kd", "ce", "kd", "kd", "kd", "kd"]


def test_every_published_setting_is_valid_and_says_where_it_is_from() -> None:
    for setting in PUBLISHED:
        assert setting.origin and build_space(
            {"objective": setting.objective.model_dump(), "teacher": {"model": "mlp"}}
        )


def test_the_middle_of_a_range_is_on_its_scale_and_in_it() -> None:
    for domain, middle in [
        (Range(1, 100, log=True), 10),
        (Range(0.9, 0.999, log_complement=True), 0.99),
        (Range(0, 1), 0.5),
        (Range(0, 0.9, step=0.3), 0.6),
        (Range(1, 4, whole=True), 2),
        (Choices(("a", "b", "c")), "b"),
    ]:
        assert (
            domain.middle == pytest.approx(middle)
            if not isinstance(middle, str)
            else domain.middle == middle
        )
        assert domain.contains(domain.middle)
    assert (
        Range(0, 0.9, step=0.3).points == pytest.approx([0, 0.3, 0.6, 0.9])
        and Range(0, 1).points is None
    )
    assert not Range(0, 0.9, step=0.3).contains(0.4) and not Range(0, 1).contains(True)


# --- counted, not listed

NET = f"{__name__}:network"


def network(shape: tuple[int, int, int], num_classes: int, **args: Any) -> torch.nn.Module:
    """A user's network, which accepts arguments of any name."""
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(math.prod(shape), num_classes))


def own(args: dict[str, Any], **more: Any) -> Space:
    student = {"name": "own", "path": NET, "args": args}
    return build_space({"objective": {"name": "ce"}, "student": student, "epochs": 9, **more})


SCALES = [
    Range(1, 20),
    Range(1, 20, log=True),
    Range(0.9, 0.999, log_complement=True),
    Range(1, 21, step=5),
]


@pytest.mark.parametrize("domain", SCALES, ids=str)
def test_a_place_in_a_range_is_undone_by_the_value_there(domain: Range) -> None:
    assert domain.place(domain.low) == 0 and domain.place(domain.high) == 1
    assert (domain.at(0), domain.at(1)) == pytest.approx((domain.low, domain.high))
    for place in (0.1, 0.3, 0.9):
        assert domain.place(domain.at(place)) == pytest.approx(place, abs=1e-9)
    assert domain.distance(domain.at(0.9), domain.at(0.2)) == pytest.approx(0.7)
    assert domain.at(0.5) == pytest.approx(domain.middle)


def test_a_range_has_equal_ratios_on_a_log_scale_and_shows_the_complement() -> None:
    assert Range(1, 100, log=True).at(0.5) == pytest.approx(10)
    complement = Range(0.9, 0.999, log_complement=True)
    assert complement.at(0.5) == pytest.approx(0.99)
    assert complement.span == pytest.approx((0.001, 0.1)) and complement.label("x") == "1 - x"
    assert complement.shown(complement.shown(0.95)) == pytest.approx(0.95)
    assert Choices((3, 1, 2)).place(1) == 0.5 and Choices((3, 1, 2)).distance(1, 2) == 1


@pytest.mark.parametrize(
    "given, size",
    [
        ({"low": 0, "high": 2**63 - 1}, 2**63),
        ({"low": 0.0, "high": 1.0, "step": 1e-9}, 10**9 + 1),
        ({"low": -(10**18), "high": 10**18, "step": 2}, 10**18 + 1),
        ({"low": 0.1, "high": 0.7, "step": 0.1}, 7),
        ({"low": 1, "high": 10**30}, 10**30),
    ],
)
def test_a_range_is_counted_by_arithmetic(given: dict[str, Any], size: int) -> None:
    (group,) = own({"x": given, "y": {"choices": [1, 2, 3]}}).groups
    assert group.grid_size == group.size == 3 * size
    if size > 100_000:
        with pytest.raises(ConfigError, match=f"a grid of {3 * size} trials is more than 100000"):
            own({"x": given, "y": {"choices": [1, 2, 3]}}, search={"sampler": "grid"})
        with pytest.raises(
            ConfigError, match=f"gp cannot propose one of {size} values of student.args.x"
        ):
            own({"x": given}, search={"sampler": "gp"})


@pytest.mark.parametrize("sampler", ["tpe", "random", "qmc"])
def test_what_is_proposed_of_a_huge_range_is_inside_and_is_what_the_study_keeps(
    sampler: str, tmp_path: Path
) -> None:
    s = own(
        {"x": {"low": 1, "high": 2**62 + 1, "step": 2}},
        search={"sampler": sampler, "num_samples": 8},
    )
    searcher = OptunaSearcher(s, tmp_path / "journal")
    (p,) = s.parameters
    for k in range(8):
        config = searcher.suggest(f"id{k}")
        assert isinstance(config, dict)
        value = config["student"]["args"]["x"]
        kept = searcher.studies()[0].get_trials()[k].params
        again = p.domain.suggest(optuna.trial.FixedTrial(kept), p.name)
        assert p.domain.contains(value) and value % 2 == 1 and again == value
        searcher.on_trial_complete(f"id{k}", {"epoch": 9, "val_accuracy": 0.5 + k / 100})


@pytest.mark.slow
def test_teachers_are_those_of_what_they_depend_on() -> None:
    """A million combinations of settings that teachers ignore: two teachers."""
    many = {"choices": list(range(1, 101))}
    optim = {"lr": many, "weight_decay": many, "batch_size": many}
    students = {"choices": ["mlp", {"name": "mlp", "hidden": [8]}]}
    s = build_space({"objective": "tfkd_self", "student": students, "optim": optim, "epochs": 9})
    assert len(s.teacher_runs()) == 2
    taught = {
        "objective": "kd",
        "student": students,
        "teacher": {"model": "mlp"},
        "optim": optim,
        "epochs": 9,
    }
    assert len(build_space(taught).teacher_runs()) == 1
    endless = {"choices": list(range(1, 1002))}
    with pytest.raises(
        ConfigError, match="teacher: for kd there are 1001 to train before the sweep"
    ):
        build_space(
            {"objective": "kd", "teacher": {"model": "mlp", "epochs": endless}, "epochs": 9}
        )


@pytest.mark.long
@pytest.mark.slow
def test_a_long_list_of_choices_is_compared_once() -> None:
    values = [{"width": k} for k in range(20_000)]
    assert own({"x": {"choices": values}}).groups[0].size == 20_000
    with pytest.raises(ConfigError, match="a value is given twice"):
        own({"x": {"choices": [*values, {"width": 3}]}})


@pytest.mark.parametrize(
    "given, high",
    [
        ({"low": 0.1, "high": 0.9, "step": 0.3}, 0.7),
        ({"low": 1, "high": 10, "step": 4}, 9),
        ({"low": 0.1, "high": 0.9, "step": 0.2}, 0.9),
    ],
)
def test_a_range_ends_where_its_steps_end(given: dict[str, Any], high: float) -> None:
    s = own({"x": given})
    (p,) = s.parameters
    assert (
        isinstance(p.domain, Range)
        and p.domain.high == high
        and p.domain.points[-1] == pytest.approx(high)
    )  # type: ignore[index]
    assert any("end at" in note for note in s.notes) == (high != given["high"])
    assert (
        s.tree["student"]["args"]["x"]["high"] == high
        and build_space(s.tree).parameters == s.parameters
    )
    p.domain.suggest(
        optuna.create_study().ask(), p.name
    )  # without Optuna's warning, which is an error here


def test_ends_that_are_whole_numbers_do_not_round_the_steps_between_them() -> None:
    s = space(objective={"name": "lsr", "alpha": {"low": 0, "high": 1, "step": 0.3}})
    assert {round(config.objective.alpha, 6) for _, config in propose(s, 40)} == {
        0.0,
        0.3,
        0.6,
        0.9,
    }  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "given, sentence",
    [
        (
            {"low": 0.1, "high": 0.9, "step": 2},
            "step: 2 is larger than the range, 0.1 to 0.9, and only 0.1 would be",
        ),
        ({"low": 1, "high": 3, "step": 3}, "step: 3 is larger than the range, 1 to 3"),
        ({"low": 0.0, "high": 1e9, "step": 1e-9}, "step: 1e-09 is lost in a float beside 1e.09"),
    ],
)
def test_a_step_that_does_nothing_is_refused(given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=rf"student.args.x.{sentence}"):
        own({"x": given})


# --- names


@pytest.mark.parametrize(
    "args",
    [
        {"a.b": {"low": 0.0, "high": 1.0}, "a": {"b": {"low": 5.0, "high": 9.0}}},
        {"a.b": {"choices": [1, 2]}, "a": {"b": {"low": 5.0, "high": 9.0}}},
        {"a": {"b.c": {"low": 0.0, "high": 1.0}}, "a.b": {"c": {"low": 0.0, "high": 1.0}}},
    ],
)
def test_two_settings_of_one_name_are_refused(args: dict[str, Any]) -> None:
    with pytest.raises(
        ConfigError, match="two settings are searched under this name, as a key has a dot in it"
    ):
        own(args)
    assert (
        len(
            own(
                {"a.b": {"low": 0.0, "high": 1.0}, "a": {"c": {"low": 5.0, "high": 9.0}}}
            ).parameters
        )
        == 2
    )


def test_arguments_of_ones_own_may_be_called_low_high_and_choices() -> None:
    fixed = own({"low": 0.1, "high": 2, "choices": [1, 2]})
    assert fixed.parameters == [] and fixed.example.student.model_dump()["args"]["high"] == 2
    s = own({"low": {"low": 0.1, "high": 2.0}, "choices": {"choices": ["a", "b"]}})
    assert [p.name for p in s.parameters] == ["student.args.choices", "student.args.low"]
    assert build_space(s.tree).tree == s.tree
    items = [{"name": "own", "path": NET, "args": {"low": 1, "high": {"low": 2, "high": 9}}}, "mlp"]
    nested = build_space({"objective": "ce", "student": {"choices": items}, "epochs": 9})
    assert [p.name for p in nested.parameters] == ["student", "student.own.args.high"]
    assert build_space(
        {"objective": "ce", "resources": {"low": 1, "high": 2}}
    ).example.resources == {
        "low": 1,
        "high": 2,
    }


def test_few_points_are_noted_with_what_runs_each_once() -> None:
    three = {"optim": {"lr": {"choices": [0.1, 0.2, 0.3]}}, "objective": "ce", "epochs": 9}
    (note,) = build_space({**three, "search": {"num_samples": 4}}).notes
    assert "only 3 different trials of ce: of 4 proposals, some are likely to repeat others" in note
    assert "search.sampler: grid" in note
    build_space({**three, "search": {"sampler": "grid"}})
    assert build_space({**three, "search": {"num_samples": 1, "warm_start": False}}).notes == ()
    listed = build_space({**three, "objective": ["ce", "lsr"], "search": {"num_samples": 8}}).notes
    assert [n for n in listed if "likely to repeat" in n]
    wide = {**three, "optim": {"lr": {"low": 0.1, "high": 1.0}}}
    assert build_space({**wide, "search": {"num_samples": 100}}).notes == ()


@pytest.mark.parametrize("tree", [None, [1], "digits_tfkd", 3, {1: 2}, {"objective": object()}])
def test_a_space_of_anything_else_is_a_sentence(tree: Any) -> None:
    with pytest.raises(ConfigError):
        build_space(tree)


@pytest.mark.parametrize(
    "given", [(None,), (3,), ("digits_tfkd", "optim.lr=1"), ("digits_tfkd", [3])]
)
def test_a_file_named_by_anything_else_is_a_sentence(given: Any) -> None:
    with pytest.raises(ConfigError):
        load_space(*given)


# --- fronts


@dataclass(frozen=True)
class Trial:
    number: int
    last: dict[str, float]
    status: str = "done"

    @property
    def judged(self) -> dict[str, float]:
        return self.last


def test_a_front_is_what_no_other_trial_beats() -> None:
    def trial(number: int, accuracy: float, ece: float, status: str = "done") -> Trial:
        return Trial(number, {"val_accuracy": accuracy, "val_ece": ece}, status)

    trials = [
        trial(0, 0.9, 0.2),
        trial(1, 0.8, 0.1),
        trial(2, 0.8, 0.2),  # beaten by both
        trial(3, 0.9, 0.2),  # as good as 0
        trial(4, 0.99, 0.0, "stopped"),
        trial(5, float("nan"), 0.0),
        trial(6, 0.7, 0.1),
    ]
    metrics = ["val_accuracy", "val_ece"]
    assert [t.number for t in pareto(trials, metrics)] == [0, 3, 1]
    assert [t.number for t in pareto(trials, metrics[:1])] == [0, 3] and pareto([], metrics) == []
    rng = random.Random(0)
    many = [trial(k, rng.random(), rng.random()) for k in range(60)]
    slow = {
        t.number for t in many
        if not any(o.last["val_accuracy"] >= t.last["val_accuracy"] and o.last["val_ece"] <= t.last["val_ece"] and o is not t for o in many)
    }  # fmt: skip
    assert {t.number for t in pareto(many, metrics)} == slow


def test_a_list_of_metrics_leads_with_its_first_and_reads_back() -> None:
    s = space(optim=ONE_LR, search={"metric": ["val_ece", "val_accuracy"], "stopping": "none"})
    assert (
        s.search.metric == "val_ece"
        and s.search.mode == "min"
        and s.search.metrics == ("val_ece", "val_accuracy")
    )
    assert build_space(parse_yaml(dump_yaml(s.tree), "again")).search == s.search


# --- other spaces


WIDE: dict[str, Any] = {
    "optim": {"lr": {"low": 0.01, "high": 0.5, "log": True}, "momentum": {"choices": [0.0, 0.9]}}
}


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({}, None),
        ({"optim": {**WIDE["optim"], "lr": {"low": 0.001, "high": 0.5, "log": True}}}, None),
        ({"optim": {**WIDE["optim"], "momentum": {"choices": [0.5, 0.9, 0.0]}}}, None),
        ({"optim": {**WIDE["optim"], "weight_decay": {"low": 1e-5, "high": 1e-2}}}, None),
        ({"objective": ["lsr", "ce"], "search": {"baselines": False}}, None),
        ({"workers": 2, "checkpoint_every_s": 3}, None),
        ({"optim": {**WIDE["optim"], "lr": {"low": 0.02, "high": 0.5, "log": True}}}, "optim.lr: was 0.01 to 0.5 (log), and 0.02 to 0.5 (log) does not hold all of it"),
        ({"optim": {**WIDE["optim"], "lr": {"low": 0.01, "high": 0.5}}}, "optim.lr: was 0.01 to 0.5 (log), and 0.01 to 0.5 does not"),
        ({"optim": {**WIDE["optim"], "momentum": {"choices": [0.5, 0.9]}}}, "optim.momentum: was 0.0 | 0.9"),
        ({"optim": {"lr": WIDE["optim"]["lr"]}}, "optim.momentum: was searched (0.0 | 0.9), and is fixed now"),
        ({"optim": {**WIDE["optim"], "weight_decay": {"low": 1e-3, "high": 1e-2}}}, "optim.weight_decay: was fixed at 0.0005"),
        ({"epochs": 5}, "epochs: was 27, and is 5 now"),
        ({"objective": {"name": "lsr", "alpha": 0.2}}, "objective.lsr.alpha: was 0.1, and is 0.2 now"),
        ({"objective": "ce"}, "objective: existing trials have lsr, but the new space lacks it"),
        ({"search": {"metric": "val_nll"}}, "search.metric: was val_accuracy"),
        ({"seed": 1}, "seed: was 0, and is 1 now"),
    ],
)  # fmt: skip
def test_a_wider_space_holds_every_trial_of_a_narrower_one(
    change: dict[str, Any], sentence: str | None
) -> None:
    problems = not_superset(space(**WIDE), space(**{**WIDE, **change}))
    assert (
        (problems == []) if sentence is None else any(p.startswith(sentence) for p in problems)
    ), problems


@pytest.mark.parametrize(
    "url, shown",
    [
        ("postgresql://me:secret@host/db", "postgresql://me:***@host/db"),
        ("postgresql://me:se/cr:et@host:5432/db?x=1", "postgresql://me:***@host:5432/db?x=1"),
        (
            "postgresql://host/db?user=me&password=secret&x=1",
            "postgresql://host/db?user=me&password=***&x=1",
        ),
        (
            "search.storage=postgresql://a@b:secret@host/db",
            "search.storage=postgresql://a@b:***@host/db",
        ),
        ("postgresql://me@host:5432/db", "postgresql://me@host:5432/db"),
        ("sqlite:////a/b.db", "sqlite:////a/b.db"),
    ],
)
def test_no_password_is_shown(url: str, shown: str) -> None:
    assert masked(url) == shown and masked(shown) == shown


def test_the_password_of_a_storage_is_in_no_tree_and_in_no_repr() -> None:
    s = space(search={"storage": "postgresql://me:secret@host/db"})
    assert s.search.storage == "postgresql://me:secret@host/db"
    assert (
        "secret" not in repr(s) + dump_yaml(s.tree)
        and s.tree["search"]["storage"] == "postgresql://me:***@host/db"
    )
    with pytest.raises(ConfigError) as error:
        load_space(
            "digits_tfkd",
            [
                "search.storage.x=postgresql://me:secret@host/db",
                "search.storage={postgresql://me:secret@host/db",
            ],
        )
    assert "secret" not in str(error.value)


def test_a_sqlite_file_is_found_from_anywhere(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert (
        space(search={"storage": "sqlite:///s.db"}).search.storage == f"sqlite:///{tmp_path}/s.db"
    )


@pytest.mark.parametrize(
    "students, precision",
    [
        (("mlp", "resnet18"), "bf16"),
        (("resnet18", "mlp"), "bf16"),
        (("mlp", "shufflenet_v2_x1_0"), "fp32"),
    ],
)
def test_one_precision_for_a_sweep_that_searches_the_student(
    monkeypatch: pytest.MonkeyPatch, students: tuple[str, ...], precision: str
) -> None:
    """bf16 if one student gains from it: ResNet-18 more than doubles, the smallest lose a fifth."""
    monkeypatch.setattr("tfkd_ray.learn.config._multiplies_bf16", lambda gpu: True)
    space = build_space({"objective": ["ce", "lsr"], "student": {"choices": list(students)}})
    found = {
        branch.config({"student": student}).precision
        for branch in space.branches
        for student in students
    }
    assert found == {precision} and space.tree["precision"] == precision
    many = {
        "choices": [k / 100 for k in range(1, 20)]
    }  # more combinations of them than are looked at
    objective = [
        "ce",
        {"name": "tfkd_reg", "alpha": many, "temperature": {"choices": list(range(2, 20))}},
    ]
    space = build_space({"objective": objective, "student": {"choices": list(students)}})
    assert {branch.example.precision for branch in space.branches} == {precision}
    with pytest.raises(ConfigError, match="precision: must have one value for the whole sweep"):
        build_space({"objective": "ce", "precision": {"choices": ["fp32", "bf16"]}})


def test_items_of_the_same_name_are_told_apart_by_their_settings() -> None:
    items = ["mlp", {"name": "cnn", "widths": [8]}, {"name": "cnn", "widths": [16]}]
    space = build_space({"objective": "ce", "epochs": 2, "student": {"choices": items}})
    assert [p.name for p in space.parameters] == ["student"] and len(
        space.parameters[0].domain.probes
    ) == 3
