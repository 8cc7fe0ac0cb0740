"""Arms files: the arms, their settings, and the errors in a file."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import ARMS

from tfkd_ray.cli.sweep import _print_best
from tfkd_ray.learn.config import TrainConfig
from tfkd_ray.learn.objectives import CrossEntropy, TfkdReg
from tfkd_ray.settings.errors import ConfigError
from tfkd_ray.show.report import report
from tfkd_ray.space.arms import (
    Arms,
    arms_of,
    baseline_space,
    build_arms,
    is_arms_file,
    load_arms,
    new_comparison,
    read_comparison,
    rivals_of,
    runs_of,
    untuned,
)
from tfkd_ray.space.baselines import FEWEST_TRIALS, doubts
from tfkd_ray.space.space import build_space
from tfkd_ray.store.experiment import (
    Record,
    best,
    read_experiment,
    read_records,
    write_experiment,
    write_record,
)

TREE: dict[str, Any] = {
    "title": "a try",
    "student": {"name": "mlp", "hidden": [8]},
    "epochs": 3,
    "optim": {"lr": 0.2, "batch_size": 64},
    "arms": [
        {"name": "ce", "objective": "ce", "published": 97.0},
        {"name": "self", "objective": "tfkd_self", "baseline": "ce", "optim": {"lr": 0.1}},
        {
            "name": "kd",
            "objective": "kd",
            "teacher": {"model": "cnn", "stop_epoch": 1},
            "epochs": 4,
        },
    ],
}


def with_arm(**arm: Any) -> dict[str, Any]:
    return {**TREE, "arms": [*TREE["arms"], arm]}


def test_an_arms_own_settings_go_before_the_shared_ones() -> None:
    ce, self_, kd = build_arms(TREE).arms
    assert (ce.config.optim.lr, self_.config.optim.lr, self_.config.optim.batch_size) == (
        0.2,
        0.1,
        64,
    )
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
    "the same but for a seed": (with_arm(name="again", objective="tfkd_self", optim={"lr": 0.1}, teacher={"seed": 5}), "arms.again: the same configuration as self"),
    "a name for no folder": (with_arm(name="A/b", objective="lsr"), "arms.3.name: String should match pattern"),
    "no such baseline": (with_arm(name="x", objective="lsr", baseline="cee"), "arms.x.baseline: no arm 'cee'; did you mean 'ce'?"),
    "other data": (with_arm(name="x", objective="ce", data={"name": "digits", "split_seed": 1}), "arms.x.data: all arms are compared on the same data"),
    "other workers": (with_arm(name="x", objective="lsr", workers=2), "arms.x.workers: one value for all arms"),
    "kd without teacher": (with_arm(name="x", objective="kd"), "arms.x.teacher.model: objective kd needs a teacher's network"),
    "a wrong setting below": (with_arm(name="x", objective="ce", released={"alpha": 0.9, "temprature": 20}), "no such setting; did you mean 'temperature'?"),
    "a wrong setting": (with_arm(name="x", objective="ce", optm=1), "arms.x.optm: no such setting; did you mean 'optim'?"),
    "published 7105": (with_arm(name="x", objective="lsr", published=7105), "arms.3.published: should be at most 100"),
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
def test_a_self_teacher_is_trained_for_each_seed_and_another_only_if_asked(
    per_seed: bool, teachers: int
) -> None:
    runs = runs_of(build_arms(TREE), [5, 6], teacher_per_seed=per_seed)
    made = [t for r in runs if (t := r.config.teacher_run())]
    assert len({t.fingerprint() for t in made}) == teachers
    assert {t.data.val_fraction for t in made} == {0.0}
    self_run = next(r for r in runs if r.name == "self-s6").config.teacher_run()
    assert (
        self_run is not None
        and self_run.seed == 1_000_006  # not the student run again
        and self_run.optim.lr == TrainConfig(objective=CrossEntropy()).optim.lr
    )


def test_a_teacher_judged_by_accuracy_needs_validation() -> None:
    arms = build_arms(
        with_arm(name="x", objective="kd", teacher={"model": "cnn", "stop_accuracy": 0.5})
    )
    with pytest.raises(
        ConfigError, match=r"arms.x.teacher.stop_accuracy: needs a validation split"
    ):
        runs_of(arms, [1])


@pytest.mark.slow
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


# --- the arms of a sweep


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    return written_sweep(tmp_path)


def written_sweep(tmp_path: Path, metric: str = "val_accuracy", **more: Any) -> Path:
    """Return a sweep over tfkd_reg, ce and lsr, two trials each; the tfkd_reg ones are similar."""
    space = build_space(
        {
            "student": "mlp",
            "epochs": 2,
            "optim": {"lr": {"low": 0.01, "high": 1.0, "log": True}},
            "objective": [
                {"name": "tfkd_reg", "alpha": {"low": 0.1, "high": 0.9}},
                "ce",
                {"name": "lsr", "alpha": 0.2},
            ],
            "search": {"num_samples": 9, "stopping": "none"},
            **more,
        }
    )
    write_experiment(tmp_path / "s", space.tree, [])
    values = {"tfkd_reg": [(0.5, 0.1, 0.90), (0.51, 0.105, 0.95), (0.9, 0.1, 0.8)], "ce": [(None, 0.1, 0.7), (None, 0.5, 0.99), (None, 0.3, 0.2)], "lsr": [(None, 0.1, 0.6)] * 3}  # fmt: skip
    number = 0
    for branch in space.branches:
        for alpha, lr, value in values[branch.objective]:
            parameters = {"optim.lr": lr} | ({"objective.tfkd_reg.alpha": alpha} if alpha else {})
            config = branch.config(parameters).model_dump(mode="json")
            name = f"t{number:04}-{branch.objective}"
            write_record(
                Record(
                    tmp_path / "s/trials" / name,
                    number,
                    name,
                    branch.objective,
                    "done",
                    parameters,
                    config,
                )
            )
            (tmp_path / "s/trials" / name / "metrics.jsonl").write_text(
                json.dumps({"epoch": 2, metric: value}) + "\n"
            )
            number += 1
    return tmp_path / "s"


@pytest.mark.slow
def test_the_arms_of_a_sweep_are_its_best_and_what_they_must_beat(sweep: Path) -> None:
    compared = arms_of(sweep, top_k=3)
    assert [(a.name, a.part) for a in compared.arms] == [
        ("t0001-tfkd_reg", "candidate"),
        ("t0002-tfkd_reg", "candidate"),  # t0000 is almost t0001
        ("t0004-ce", "baseline"),
        ("t0006-lsr", "baseline"),
        ("ce-scaled", "baseline"),
        ("tfkd_reg-published", "reference"),
    ]
    assert compared.searched == 9 and compared.experiment == "s"
    scaled, published = (compared.named(n).config for n in ("ce-scaled", "tfkd_reg-published"))
    assert (
        scaled.objective.loss_scale == pytest.approx(0.49)
        and scaled.optim.lr == published.optim.lr == 0.105
    )
    assert [a.name for a in arms_of(sweep, top_k=1).arms][0:2] == ["t0001-tfkd_reg", "t0004-ce"]


def test_of_an_objective_without_parts_there_is_no_scaled_ce_and_the_note_says_why(
    sweep: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TfkdReg, "has_parts", False)
    compared = arms_of(sweep, top_k=1)
    assert "ce-scaled" not in {arm.name for arm in compared.arms}
    assert compared.note.endswith(
        "tfkd_reg does not return CE as a separate part, so its weight of CE is unknown, and there is no baseline ce-scaled."
    )


def test_a_sweep_that_judged_averaged_weights_is_confirmed_on_test_by_the_student_that_is_kept(
    tmp_path: Path,
) -> None:
    compared = arms_of(written_sweep(tmp_path, "val_ema_accuracy", ema={"decay": 0.9}))
    assert compared.metric == "val_accuracy" and compared.arms[0].name == "t0001-tfkd_reg"
    assert all(arm.config.ema is not None for arm in compared.arms)
    with pytest.raises(ConfigError, match=r"metric: no such name 'val_ema_accuracy'"):
        build_arms({**TREE, "metric": "val_ema_accuracy"})


def test_a_baseline_with_fewer_trials_than_the_winner_is_to_be_tuned(
    sweep: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tfkd_ray.space.baselines.FEWEST_TRIALS", 2)
    monkeypatch.setattr("tfkd_ray.space.arms.FEWEST_TRIALS", 2)
    monkeypatch.setattr("tfkd_ray.space.baselines.FAR_BEHIND", 1000)
    assert untuned(sweep) == {}
    shutil.rmtree(sweep / "trials/t0007-lsr")
    assert untuned(sweep) == {"lsr": 3}
    space = baseline_space(sweep, ["lsr"], 3)
    assert [b.objective for b in space.branches] == ["lsr"] and space.search.num_samples == 3
    assert {p.name for p in space.parameters} == {"optim.lr", "objective.lsr.alpha"}
    both = baseline_space(sweep, ["ce", "lsr"], 3)
    assert [g.name for g in both.groups] == ["ce", "lsr"] and both.search.num_samples == 6


def test_a_hardly_tuned_baseline_is_to_be_tuned_and_named_by_the_verdict(sweep: Path) -> None:
    """Here `ce` has too few trials, and `lsr`, of which nothing but lr is searched, is far behind."""
    assert untuned(sweep) == {"ce": FEWEST_TRIALS, "lsr": FEWEST_TRIALS}
    few = "ce (3 trials) and lsr (3 trials, 39.00 points behind ce)"
    assert arms_of(sweep, top_k=1).note == f"Baselines hardly tuned: {few}."
    assert arms_of(sweep, top_k=1, rivals=rivals_of("ce")).note.endswith(
        "hardly tuned: ce (3 trials)."
    )


def test_tune_and_the_report_name_a_baseline_in_name_only(
    sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = read_records(sweep)
    space = build_space(read_experiment(sweep)["space"])
    winner = best(records, "val_accuracy")
    assert winner is not None
    _print_best(space, records, winner)
    few = "ce (3 trials) and lsr (3 trials, 39.00 points behind ce)"
    said = f"baselines hardly tuned: {few}; tfkd confirm tunes them first"
    assert said in " ".join(capsys.readouterr().out.split())
    report(sweep, tmp_path / "r.html")
    assert said[1:] in (tmp_path / "r.html").read_text()


def test_baselines_of_a_grid_are_tuned_by_a_sampler_and_one_without_ranges_is_an_arm_as_it_is(
    tmp_path: Path,
) -> None:
    grid = {"sampler": "grid", "baselines": False}
    kd = {"name": "kd", "temperature": {"choices": [1, 4]}, "alpha": {"choices": [0.1, 0.9]}}
    space = build_space({"objective": kd, "teacher": "mlp", "epochs": 2, "search": grid})
    write_experiment(tmp_path / "g", space.tree, [])
    folder = tmp_path / "g/trials/t0000-kd"
    values = {"objective.kd.temperature": 1, "objective.kd.alpha": 0.1}
    config = space.branches[0].config(values).model_dump(mode="json")
    write_record(Record(folder, 0, "t0000-kd", "kd", "done", values, config))
    (folder / "metrics.jsonl").write_text('{"epoch": 2, "val_accuracy": 0.9}\n')
    assert untuned(tmp_path / "g") == {"lsr": FEWEST_TRIALS}
    tuned = baseline_space(tmp_path / "g", ["lsr"], FEWEST_TRIALS)
    assert tuned.search.num_samples == FEWEST_TRIALS and tuned.sampler.name == "tpe"
    with pytest.raises(
        ConfigError, match="no full-length trial of the baseline lsr; tune it first"
    ):
        arms_of(tmp_path / "g")
    compared = arms_of(tmp_path / "g", rivals=rivals_of("ce"))
    assert [arm.name for arm in compared.arms] == ["t0000-kd", "ce"]
    assert compared.named("ce").config.objective.name == "ce"
    assert compared.title == "g: the best 1 against baselines"
    assert compared.note.startswith("This space fixes every setting of ce, so that was not tuned")


def trials(objective: str, values: list[float], status: str = "done") -> list[Record]:
    return [
        Record(
            Path(),
            k,
            f"t{k}",
            objective,
            status,
            {"optim.lr": 0.1},
            {},
            metrics=[{"epoch": 2, "val_accuracy": value, "val_nll": 1 - value}],
        )
        for k, value in enumerate(values)
    ]


def test_a_baseline_is_doubted_for_few_trials_or_a_long_way_behind_plain_training() -> None:
    six = [0.9] * FEWEST_TRIALS
    reg, ce = trials("tfkd_reg", [0.9]), trials("ce", six)
    assert not doubts([*reg, *ce, *trials("lsr", six)], "val_accuracy")
    assert not doubts([*reg, *ce], "val_accuracy"), "a missing baseline is no doubtful one"
    assert not doubts(trials("ce", [0.9]), "val_accuracy"), "nothing is compared with it"
    (few,) = doubts([*reg, *trials("ce", six[1:]), *trials("ce", [0.9], "failed")], "val_accuracy")
    assert str(few) == "ce (5 trials)" and few.few
    near = trials("lsr", [0.885] * FEWEST_TRIALS)
    assert not doubts([*reg, *ce, *near], "val_accuracy")
    (far,) = doubts([*reg, *ce, *trials("lsr", [0.8] * FEWEST_TRIALS)], "val_accuracy")
    assert str(far) == "lsr (10.00 points behind ce)" and not far.few
    (far,) = doubts([*reg, *ce, *trials("lsr", [0.8] * FEWEST_TRIALS)], "val_nll")
    assert str(far) == "lsr (0.1000 nats an image behind ce)"
    fixed = trials("ce", [0.9])
    fixed[0].parameters.clear()
    assert not doubts([*reg, *fixed], "val_accuracy"), "more trials would be the same"


def test_a_sweep_with_nothing_to_confirm_is_refused(sweep: Path) -> None:
    for folder in (sweep / "trials").glob("*tfkd_reg"):
        shutil.rmtree(folder)
    with pytest.raises(ConfigError, match="only baselines were searched"):
        arms_of(sweep)
    shutil.rmtree(sweep / "trials")
    with pytest.raises(
        ConfigError, match="no trial of full length, so there is nothing to confirm"
    ):
        arms_of(sweep)


def test_baselines_can_be_chosen(sweep: Path) -> None:
    assert [a.name for a in arms_of(sweep, top_k=1, rivals=rivals_of("lsr")).arms] == [
        "t0001-tfkd_reg",
        "t0006-lsr",
    ]
    with pytest.raises(ConfigError, match="no such baseline 'lrs'; did you mean 'lsr'"):
        rivals_of("ce,lrs")
    with pytest.raises(ConfigError, match="name a baseline to beat"):
        rivals_of("published")
