"""Search spaces: what is searched, what is refused, and that a space reads back as itself."""

import random
from pathlib import Path
from typing import Any

import optuna
import pytest
from conftest import ROOT, SHIPPED

from tfkd_ray.config import TrainConfig
from tfkd_ray.schema import ConfigError, dump_yaml, parse_yaml
from tfkd_ray.space import Choices, Halving, Range, Space, build_space, load_space


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


def test_a_range_proposes_values_within_it_and_of_its_kind() -> None:
    s = space(optim={"lr": {"low": 1e-3, "high": 1, "log": True}, "batch_size": {"low": 16, "high": 64, "step": 16}})
    configs = [config for _, config in propose(s, 50)]
    assert all(1e-3 <= c.optim.lr <= 1 for c in configs)
    assert {c.optim.batch_size for c in configs} == {16, 32, 48, 64}
    assert sum(c.optim.lr < 0.0316 for c in configs) == pytest.approx(25, abs=10)


def test_log_complement_is_log_uniform_in_1_minus_x() -> None:
    s = space(objective={"name": "tfkd_reg", "correct_prob": {"low": 0.9, "high": 0.999, "log_complement": True}})
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
    alone = space(objective=["kd", "tfkd_reg"], teacher={"model": "mlp"}, search={"baselines": False})
    assert [g.name for g in alone.groups] == ["kd", "tfkd_reg"]


def test_without_a_split_the_sampler_chooses_the_objective() -> None:
    s = space(objective=["ce", {"name": "lsr", "alpha": {"low": 0.1, "high": 0.2}}], search={"split": False})
    assert len(s.groups) == 1
    assert {config.objective.name for _, config in propose(s, 20)} == {"ce", "lsr"}


def test_choices_may_be_whole_settings() -> None:
    s = space(student={"choices": ["mlp", {"widths": [4], "name": "cnn"}]}, schedule={"choices": ["step", "cosine"]})
    assert {c.student.name for _, c in propose(s, 20)} == {"mlp", "cnn"}
    again = build_space(parse_yaml(dump_yaml(s.tree), "again"))
    study = optuna.create_study()  # what was proposed before is known after reading back
    s.groups[0].propose(study.ask())
    again.groups[0].propose(study.ask())


def test_kd_and_a_self_teacher_go_together() -> None:
    s = space(objective=["kd", "tfkd_self"], teacher={"model": "cnn", "epochs": 3}, search={"baselines": False})
    assert sorted(run.student.name for run in s.teacher_runs()) == ["cnn", "mlp"]
    again = build_space(parse_yaml(dump_yaml(s.tree), "again"))
    assert again.tree == s.tree and again.teacher_runs() == s.teacher_runs()


def test_every_teacher_that_may_be_needed_is_known_before() -> None:
    s = space(objective="kd", teacher={"model": {"choices": ["mlp", "cnn"]}, "epochs": {"choices": [1, 5]}})
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
        ({"optim": {"lr": {"choices": []}}}, "optim.lr.choices: needs a list of at least one value, got []"),
        ({"optim": {"lr": {"choices": [1, 1]}}}, "optim.lr.choices: a value is given twice"),
        ({"optim": {"lr": {"choices": [1], "low": 1}}}, "optim.lr: choices stand alone, got also low"),
        ({"optim": {"lr": {"choices": [0.1, -1]}}}, "optim.lr: Input should be greater than 0, got -1"),
        ({"optim": {"lrr": {"low": 1, "high": 2}}}, "optim.lrr: no such setting; did you mean 'lr'?"),
        ({"optim": {"batch_size": {"low": 1.5, "high": 3}}}, "optim.batch_size: whole numbers only, got 1.5 to 3"),
        ({"objective": {"name": "lsr", "alpha": {"low": 0, "high": 1.5}}}, "objective.lsr.alpha: Input should be less than or equal to 1, got 1.5"),
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
        ({"epochs": {"low": 1, "high": 9}}, "epochs: one value for the whole sweep"),
        ({"workers": {"choices": [1, 2]}}, "workers: one value for the whole sweep"),
        ({"seed": {"choices": [1, 2]}}, "seed: one value for the whole sweep"),
        ({"teacher": {"optim": {"lr": {"low": 0.1, "high": 0.2}}}, "objective": "tfkd_self"}, "teacher.optim.lr: choices only"),
        ({"objective": {"name": "tfkd_reg_code", "temperature": {"low": 1, "high": 9}}}, "objective.tfkd_reg_code.temperature: fixed only"),
        ({"search": {"num_samples": 0}}, "search.num_samples: Input should be greater than or equal to 1, got 0"),
        ({"search": {"nm_samples": 3}}, "search.nm_samples: no such setting; did you mean 'num_samples'?"),
        ({"search": 3}, "search: needs settings below it (key: value), got 3"),
        ({"objective": ["ce", "lsr"], "search": {"num_samples": 1}}, "search.num_samples: 2 objectives share it equally, got 1"),
    ],
)  # fmt: skip
def test_a_wrong_space_gets_a_sentence(tree: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as error:
        space(**tree)
    assert any(p.startswith(sentence) for p in error.value.problems), str(error.value)


def test_all_problems_of_a_space_are_named_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        space(
            optim={"lr": {"low": 2, "high": 1}, "momentum": 2},
            objective=[{"name": "kd", "temprature": 1}, {"name": "lsr", "alpha": {"low": 0, "high": 3}}],
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
    ("schedule.final=0.1", lambda s: s.tree["schedule"], {"name": "cosine", "warmup_epochs": 1.0, "final": 0.1}),
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
        ("objective.tfkd_reg.alpha.high=2", "objective.tfkd_reg.alpha: Input should be less than or equal to 1, got 2"),
        ("optim.lr=[", "not YAML"),
        ("objective.tfkd_reg.alpha=1.5", "objective.tfkd_reg.alpha: Input should be less than or equal to 1, got 1.5"),
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
    assert any("fix it: optim.lr=0.01" in p for p in error.value.problems)
    assert any("fix it: objective=" in p for p in error.value.problems)
    one = load_space(shipped, ["objective=ce", "optim.lr=0.1", "optim.weight_decay=0"]).single()
    assert one.optim.lr == 0.1 and one.objective.name == "ce"


def test_rungs_are_at_a_ninth_and_a_third() -> None:
    assert Halving().rungs(54) == [6, 18]
    assert Halving().rungs(200) == [22, 66, 198]
    assert Halving(min_epochs=5, factor=2).rungs(20) == [5, 10]
    assert Halving().rungs(1) == []


def test_ranges_and_choices_say_what_they_are() -> None:
    assert str(Range(1, 2, log=True)) == "1 to 2 (log)"
    assert str(Range(0.9, 0.99, log_complement=True)) == "0.9 to 0.99 (log in 1 - x)"
    assert str(Choices((1, "a"))) == "1 | a"


def test_mutated_trees_are_refused_with_sentences_and_never_crash() -> None:
    """A first fuzz: replace random values of a shipped space by odd ones."""
    rng = random.Random(0)
    odd = [None, [], {}, "", "x", -1, 0, 1e400, [None], {"low": 1}, {"choices": [[]]}, True, {"name": 3}, [["ce"]]]
    for _ in range(300):
        tree = parse_yaml(DIGITS.read_text(), "f")
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
