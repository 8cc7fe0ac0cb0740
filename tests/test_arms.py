"""Arms files: what is compared, with what settings, and what is wrong with a file."""

from pathlib import Path
from typing import Any

import pytest
from conftest import ARMS

from tfkd_ray.arms import Arms, build_arms, is_arms_file, load_arms, new_comparison, read_comparison, runs_of
from tfkd_ray.config import TrainConfig
from tfkd_ray.objectives import CrossEntropy
from tfkd_ray.schema import ConfigError

TREE: dict[str, Any] = {
    "title": "a try",
    "student": {"name": "mlp", "hidden": [8]},
    "epochs": 3,
    "optim": {"lr": 0.2, "batch_size": 64},
    "arms": [
        {"name": "ce", "objective": "ce", "published": 97.0},
        {"name": "self", "objective": "tfkd_self", "baseline": "ce", "optim": {"lr": 0.1}},
        {"name": "kd", "objective": "kd", "teacher": {"model": "cnn", "stop_epoch": 1}, "epochs": 4},
    ],
}


def with_arm(**arm: Any) -> dict[str, Any]:
    return {**TREE, "arms": [*TREE["arms"], arm]}


def test_an_arms_own_settings_go_before_the_shared_ones() -> None:
    ce, self_, kd = build_arms(TREE).arms
    assert (ce.config.optim.lr, self_.config.optim.lr, self_.config.optim.batch_size) == (0.2, 0.1, 64)
    assert (ce.config.epochs, kd.config.epochs) == (3, 4)
    assert ce.published == 97.0 and self_.baseline == "ce" and kd.config.student.name == "mlp"


def test_an_override_goes_before_both() -> None:
    arms = build_arms(TREE, overrides=["optim.lr=0.5", "epochs=9"]).arms
    assert {(a.config.optim.lr, a.config.epochs) for a in arms} == {(0.5, 9)}


def test_arms_read_back_as_they_were() -> None:
    compared = build_arms(TREE)
    assert Arms.model_validate(compared.model_dump(mode="json")) == compared


PROBLEMS: dict[str, tuple[dict[str, Any], str]] = {
    "no arms": ({"student": "mlp"}, "arms: needs a list of at least one arm"),
    "not settings": ({"arms": ["ce"]}, "arms.0: needs settings (name, objective, ...), got 'ce'"),
    "name twice": (with_arm(name="ce", objective="lsr"), "arms.ce: two arms have this name"),
    "the same arm": (with_arm(name="again", objective="ce"), "arms.again: the same configuration as ce"),
    "a name for no folder": (with_arm(name="A/b", objective="lsr"), "arms.3.name: String should match pattern"),
    "no such baseline": (with_arm(name="x", objective="lsr", baseline="cee"), "arms.x.baseline: no arm 'cee'; did you mean 'ce'?"),
    "other data": (with_arm(name="x", objective="ce", data={"name": "digits", "split_seed": 1}), "arms.x.data: all arms are compared on the same data"),
    "other workers": (with_arm(name="x", objective="lsr", workers=2), "arms.x.workers: one value for all arms"),
    "kd without teacher": (with_arm(name="x", objective="kd"), "arms.x.teacher.model: objective kd needs a teacher's network"),
    "a wrong setting": (with_arm(name="x", objective="ce", optm=1), "arms.x.optm: no such setting; did you mean 'optim'?"),
    "published 7105": (with_arm(name="x", objective="lsr", published=7105), "arms.3.published: Input should be less than or equal to 100"),
}  # fmt: skip


@pytest.mark.parametrize("tree, message", PROBLEMS.values(), ids=PROBLEMS)
def test_wrong_arms_are_refused_with_a_sentence(tree: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        build_arms(tree, "f.yaml")
    assert message in str(error.value) and str(error.value).startswith("f.yaml:")


def test_runs_share_seeds_and_train_on_validation_too() -> None:
    runs = runs_of(build_arms(TREE), [5, 6])
    assert [r.name for r in runs] == ["ce-s5", "self-s5", "kd-s5", "ce-s6", "self-s6", "kd-s6"]
    assert {r.config.data.val_fraction for r in runs} == {0.0}
    assert [r.config.seed for r in runs] == [5, 5, 5, 6, 6, 6]
    assert runs_of(build_arms(TREE), [5], hold_out=True)[0].config.data.val_fraction == 0.2


@pytest.mark.parametrize("per_seed, teachers", [(False, 3), (True, 4)])
def test_a_self_teacher_is_trained_for_each_seed_and_another_only_if_asked(per_seed: bool, teachers: int) -> None:
    runs = runs_of(build_arms(TREE), [5, 6], teacher_per_seed=per_seed)
    made = [t for r in runs if (t := r.config.teacher_run())]
    assert len({t.fingerprint() for t in made}) == teachers
    assert {t.data.val_fraction for t in made} == {0.0}
    self_run = next(r for r in runs if r.name == "self-s6").config.teacher_run()
    assert (
        self_run is not None
        and self_run.seed == 6
        and self_run.optim.lr == TrainConfig(objective=CrossEntropy()).optim.lr
    )


def test_a_teacher_judged_by_accuracy_needs_validation() -> None:
    arms = build_arms(with_arm(name="x", objective="kd", teacher={"model": "cnn", "stop_accuracy": 0.5}))
    with pytest.raises(ConfigError, match=r"arms.x.teacher.stop_accuracy: needs validation"):
        runs_of(arms, [1])


@pytest.mark.parametrize("path", ARMS, ids=lambda p: p.stem)
@pytest.mark.parametrize("preset", [None, "smoke"])
def test_every_shipped_arms_file_is_valid(path: Path, preset: str | None) -> None:
    compared = load_arms(path, preset=preset)
    assert compared.title and is_arms_file(path) and runs_of(compared, [1001, 1002])
    if preset:
        assert {a.config.epochs for a in compared.arms} == {2}
        assert {a.config.student.name for a in compared.arms} <= {"cnn", "mlp"}


def test_a_shipped_file_goes_by_its_name() -> None:
    assert load_arms("paper/table_1").title == load_arms("search_spaces/paper/table_1.yaml").title
    assert is_arms_file("digits_arms") and not is_arms_file("digits_tfkd")


def test_a_comparison_remembers_all_it_needs(tmp_path: Path) -> None:
    compared = build_arms(TREE)
    new_comparison(compared, [7, 8], tmp_path / "c", hold_out=True)
    again = read_comparison(tmp_path / "c")
    assert again.arms == compared and again.hold_out and not again.is_trained
    assert again.runs == runs_of(compared, [7, 8], hold_out=True)
    with pytest.raises(ConfigError, match="exists already"):
        new_comparison(compared, [7, 8], tmp_path / "c")
    with pytest.raises(ConfigError, match="not a comparison of arms"):
        read_comparison(tmp_path)
