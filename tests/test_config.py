"""The configuration tree: schedules, fingerprints, teachers' runs."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from test_data import pickled, write_cifar
from torch.utils.flop_counter import FlopCounterMode

from tfkd_ray.learn import config as config_module
from tfkd_ray.learn.config import (
    RUN_ONLY,
    Constant,
    Cosine,
    Step,
    TeacherConfig,
    TrainConfig,
)
from tfkd_ray.learn.data import Digits
from tfkd_ray.learn.loop import train
from tfkd_ray.learn.models import Cnn, Mlp
from tfkd_ray.learn.objectives import CrossEntropy, KnowledgeDistillation, TfkdSelf
from tfkd_ray.learn.official import Cifar10, Mnist
from tfkd_ray.learn.optimizers import OptimConfig
from tfkd_ray.learn.teachers import find_or_train
from tfkd_ray.settings.errors import ConfigError
from tfkd_ray.settings.schema import validated


def test_the_papers_step_schedule() -> None:
    step = Step(warmup_epochs=1)
    factors = {e: step.factor(e, 200) for e in (0.5, 1, 59.9, 60, 120, 160, 199)}
    assert factors == pytest.approx(
        {0.5: 0.5, 1: 1, 59.9: 1, 60: 0.2, 120: 0.04, 160: 0.008, 199: 0.008}
    )


@pytest.mark.parametrize("epochs", [3, 27, 200])
def test_cosine_spans_the_whole_run(epochs: int) -> None:
    cosine = Cosine(warmup_epochs=1)
    assert cosine.factor(1, epochs) == pytest.approx(1)
    assert cosine.factor(epochs, epochs) == pytest.approx(0, abs=1e-12)
    assert cosine.factor((epochs + 1) / 2, epochs) == pytest.approx(0.5)
    assert Cosine(final=0.1).factor(epochs, epochs) == pytest.approx(0.1)


def test_warm_up_takes_at_most_half_of_a_short_run() -> None:
    assert Constant(warmup_epochs=5).factor(0.5, 2) == pytest.approx(0.5)
    assert Constant(warmup_epochs=5).factor(1, 2) == 1


def test_cosine_is_smooth_where_warm_up_ends() -> None:
    cosine = Cosine(warmup_epochs=2)
    assert math.isclose(cosine.factor(2 - 1e-9, 30), cosine.factor(2 + 1e-9, 30), abs_tol=1e-6)


def test_the_fingerprint_names_what_makes_the_numbers() -> None:
    base = TrainConfig(objective=CrossEntropy())
    changed = base.model_copy(update={"seed": 1}).fingerprint()
    moved = base.model_copy(
        update={"workers": 2, "cpus_per_worker": 3, "checkpoint_every_s": 0.0}
    ).fingerprint()
    assert moved == base.fingerprint() != changed
    here, there = (
        base.model_copy(update={"data": Mnist(root=Path(root))}) for root in ("/a", "/b")
    )
    assert here.fingerprint() == there.fingerprint() != base.fingerprint()
    assert base.fingerprint(1) != base.fingerprint(2)
    assert set(TrainConfig.model_fields) > RUN_ONLY


def test_a_self_teacher_is_the_student_under_the_teachers_recipe() -> None:
    config = TrainConfig(
        objective=TfkdSelf(), student=Cnn(), teacher=TeacherConfig(epochs=3), seed=7
    )
    run = config.teacher_run()
    assert run is not None
    assert (run.student, run.epochs, run.seed, run.objective) == (
        Cnn(),
        3,
        1_000_000,
        CrossEntropy(),
    )
    assert run.teacher_run() is None


def test_every_trial_of_a_sweep_has_the_same_teacher_whatever_its_own_hyperparameters() -> None:
    a = TrainConfig(objective=KnowledgeDistillation(alpha=0.1), teacher=TeacherConfig(model=Mlp()))
    b = TrainConfig(
        objective=KnowledgeDistillation(alpha=0.9), teacher=TeacherConfig(model=Mlp()), seed=3
    )
    assert a.teacher_run() == b.teacher_run()


# --- recipes


def test_a_recipe_fills_what_a_configuration_does_not_say() -> None:
    paper = TrainConfig(objective="ce", data="cifar100")  # type: ignore[arg-type]
    assert (paper.epochs, paper.schedule.name, paper.optim.nesterov) == (200, "step", False)
    assert (paper.augment.crop_padding, paper.augment.flip, paper.augment.rotation_degrees) == (
        4,
        True,
        15.0,
    )
    own = validated(
        TrainConfig,
        {
            "objective": "ce",
            "data": "cifar100",
            "epochs": 30,
            "optim": {"lr": 0.3},
            "schedule": "cosine",
        },
    )
    assert (own.epochs, own.optim.lr, own.optim.weight_decay, own.schedule.name) == (
        30,
        0.3,
        5e-4,
        "cosine",
    )
    modern = validated(TrainConfig, {"objective": "ce", "data": "cifar100", "recipe": "modern"})
    assert (
        modern.optim.nesterov
        and modern.schedule.name == "cosine"
        and not modern.augment.rotation_degrees
    )
    assert validated(TrainConfig, {"objective": "ce"}).epochs == 27  # digits have no own recipe


@pytest.mark.parametrize(
    "data, epochs, lr, milestones, gamma",
    [
        ("cifar10", 200, 0.1, (60, 120, 160), 0.2),
        ("tiny_imagenet", 200, 0.1, (60, 120, 160), 0.1),
        ("imagenet", 90, 0.2, (30, 60, 80), 0.1),
    ],
)
def test_the_papers_recipes(
    data: str, epochs: int, lr: float, milestones: tuple[int, ...], gamma: float
) -> None:
    config = validated(TrainConfig, {"objective": "ce", "data": data, "student": "resnet18"})
    assert (config.epochs, config.optim.lr) == (epochs, lr) and isinstance(config.schedule, Step)
    assert [round(m * epochs) for m in config.schedule.milestones] == list(
        milestones
    ) and config.schedule.gamma == gamma
    first, *_, last = (config.schedule.factor(e + 0.5, epochs) for e in range(epochs))
    assert last == pytest.approx(gamma**3) and first == (1.0 if data == "imagenet" else 0.5)


def test_a_teacher_follows_the_recipe_unless_it_says_otherwise() -> None:
    tree = {"objective": "tfkd_self", "data": "cifar100", "optim": {"lr": 0.4}}
    run = validated(TrainConfig, tree).teacher_run()
    assert (
        run is not None
        and run.schedule.name == "step"
        and run.optim.lr == 0.1
        and run.epochs == 200
    )
    run = validated(
        TrainConfig, {**tree, "teacher": {"schedule": "cosine", "epochs": 9}}
    ).teacher_run()
    assert (
        run is not None
        and run.schedule.name == "cosine"
        and run.epochs == 9
        and run.optim.lr == 0.1
    )


def test_a_resolved_configuration_reads_back_as_itself_and_has_the_same_name() -> None:
    for tree in (
        {"objective": "tfkd_self", "data": "cifar100"},
        {"objective": "ce", "data": "cifar100", "recipe": "modern"},
    ):
        config = validated(TrainConfig, tree)
        again = validated(TrainConfig, config.model_dump(mode="json"))
        assert again == config and again.fingerprint() == config.fingerprint()


STORED: list[tuple[dict[str, Any], str]] = [
    ({"objective": "ce"}, "392dfe5197feffd9"),
    ({"objective": "lsr", "epochs": 3}, "601938fef4e11da4"),
    ({"objective": {"name": "tfkd_reg", "alpha": 0.3}}, "345e216369c30c3e"),
    ({"objective": "tfkd_self", "data": "cifar100"}, "7e227c978a776186"),
    ({"objective": "tfkd_self", "data": "cifar100", "student": "resnet18"}, "c591ad9eb360d999"),
    (
        {"objective": "ce", "data": "cifar10", "recipe": "modern", "student": "mobilenet_v2"},
        "362fae3058f9e83f",
    ),
    ({"objective": "kd", "teacher": {"model": "cnn"}, "data": "mnist"}, "7987e9acf5fad039"),
    (
        {"objective": "kd", "teacher": {"model": "cnn", "stop_epoch": 2}, "data": "fashion_mnist"},
        "625864349413d002",
    ),
    (
        {"objective": "kd", "teacher": {"model": "resnet18", "labels": "bank"}, "data": "kmnist"},
        "be1a2786338ab86c",
    ),
    (
        {"objective": "kd", "teacher": {"model": "cnn", "weights": "/w.safetensors"}},
        "db8bb34d115ae443",
    ),
    (
        {
            "objective": "kd",
            "teacher": {"model": {"name": "cnn", "widths": [8]}, "weights": "/w.pt"},
            "seed": 4,
        },
        "9ec513754fe3d04d",
    ),
    (
        {"objective": "kd_standardised", "teacher": {"model": "cnn", "stop_accuracy": 0.5}},
        "e0d7e956db868fc1",
    ),
    (
        {"objective": "dist", "teacher": {"model": "mlp", "objective": "lsr"}, "student": "cnn"},
        "a6ed3b6598c59429",
    ),
    ({"objective": "ce", "init": "trained"}, "e03fa879a1aa04cc"),
    ({"objective": "ce", "data": {"name": "emnist", "variant": "letters"}}, "4a772a8f5802f777"),
    (
        {"objective": "ce", "data": {"name": "image_folder", "root": "/images", "num_classes": 3}},
        "2038bc2a6e7b06d8",
    ),
    ({"objective": "ce", "data": "imagenet", "student": "resnet50"}, "e372028fb2f0745e"),
    (
        {"objective": "ce", "data": "tiny_imagenet", "recipe": "paper", "student": "densenet121"},
        "2b1168eb89ff631e",
    ),
    (
        {
            "objective": "ce",
            "data": {"name": "own", "path": "m:f", "shape": [3, 8, 8], "num_classes": 4},
        },
        "e3c632e8ab5a730d",
    ),
    (
        {
            "objective": "ce",
            "schedule": "step",
            "optim": {"nesterov": True},
            "data": {"name": "digits", "subset": 100},
            "workers": 2,
        },
        "4404deca7cd63fec",
    ),
]
"""Configurations, with the names of their runs, teachers and soft labels in all releases."""


@pytest.mark.parametrize("tree, name", STORED, ids=range(20))
def test_what_is_stored_keeps_its_name(tree: dict[str, Any], name: str) -> None:
    """A new setting has a neutral default and is in its class's `later`: see `Settings.content`."""
    assert validated(TrainConfig, {"precision": "fp32", **tree}).fingerprint() == name


def test_a_setting_that_came_later_counts_once_it_is_set() -> None:
    data = Digits()
    assert data.content() == {
        "name": "digits",
        "val_fraction": 0.2,
        "subset": None,
        "split_seed": 0,
    }
    assert data.model_copy(update={"digest": "0" * 32}).content()["digest"] == "0" * 32
    shown = {"mean": [1.0], "std": [2.0]}
    taken = {"objective": "kd", "teacher": {"model": "cnn", "weights": "/w.pt"}}
    names = {
        validated(TrainConfig, {**taken, "teacher": {**taken["teacher"], **more}}).fingerprint()  # type: ignore[dict-item]
        for more in ({}, {"input": None}, {"input": shown}, {"input": {**shown, "size": 16}})
    }
    assert len(names) == 3


def test_the_fingerprint_follows_the_teacher_and_not_the_place() -> None:
    tree = {"objective": "kd", "teacher": {"model": "cnn"}, "data": "mnist"}
    base = validated(TrainConfig, tree).fingerprint()
    assert (
        validated(TrainConfig, {**tree, "teacher": {"model": "cnn", "seed": 1}}).fingerprint()
        != base
    )
    assert (
        validated(
            TrainConfig, {**tree, "data": {"name": "mnist", "root": "/elsewhere"}}
        ).fingerprint()
        == base
    )
    assert (
        validated(TrainConfig, {**tree, "objective": "ce"}).fingerprint()
        == validated(TrainConfig, {"objective": "ce", "data": "mnist"}).fingerprint()
    )


@pytest.mark.parametrize(
    "tree, sentence",
    [
        ({"recipe": "papers", "data": "cifar10"}, "recipe: cifar10 has no recipe 'papers'; did you mean 'paper'?"),
        ({"recipe": "paper"}, "recipe: digits has no recipe 'paper'; known: modern, patient, plain"),
        ({"augment": {"resized_crop": True}}, "augment.resized_crop: for data sets of image files; digits is in memory"),
        ({"objective": "tfkd_self", "epochs": 5, "teacher": {"stop_epoch": 6}}, "teacher.stop_epoch: must be at most teacher.epochs, 5, got 6"),
        ({"init": "trained", "teacher": {"model": "cnn"}}, "init: 'trained' starts from a trained copy of the student"),
        ({"objective": "kd", "teacher": {"model": "cnn"}, "init": "trained"}, "init: 'trained' starts from a trained copy of the student"),
    ],
)  # fmt: skip
def test_wrong_recipes_and_teachers_get_a_sentence(tree: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as error:
        validated(TrainConfig, {"objective": "ce", **tree})
    assert sentence in str(error.value)


@pytest.mark.parametrize("hardware", [True, False])
def test_the_precision_is_decided_when_the_configuration_is_read(
    hardware: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config_module, "_multiplies_bf16", lambda gpu: hardware)

    def decided(**tree: Any) -> TrainConfig:
        return validated(TrainConfig, {"objective": "tfkd_self", **tree})

    tiny, large = decided(student="mlp"), decided(student="resnet18")
    assert (tiny.precision, tiny.compile) == ("fp32", "off")
    assert large.precision == ("bf16" if hardware else "fp32")
    assert (
        decided(student="shufflenet_v2_x1_0").precision == "fp32"
    )  # slower in bf16: benchmarks/RESULTS.md
    taught = large.teacher_run()
    assert taught is not None and taught.precision == large.precision
    asked = decided(student="resnet18", precision="bf16" if not hardware else "fp32")
    assert asked.precision != large.precision and asked.fingerprint() != large.fingerprint()
    assert validated(TrainConfig, large.model_dump(mode="json")) == large


@pytest.mark.parametrize("has", ["amx_bf16", "avx512_bf16"])
def test_avx512_without_amx_is_no_reason_for_bf16(
    has: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ResNet-18 took 1.4 times as long there: benchmarks/RESULTS.md."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {has: True})
    decided = validated(TrainConfig, {"objective": "ce", "student": "resnet18"})
    assert decided.precision == ("bf16" if has == "amx_bf16" else "fp32")


def test_what_counts_as_tiny_is_counted() -> None:
    """Compare with torch's own counter."""
    for network in (Mlp(hidden=(64, 32)), Cnn(widths=(4, 8, 6))):
        module = network.build((3, 28, 28), 10).eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            module(torch.zeros(1, 3, 28, 28))
        last = 2 * list(module.modules())[-1].in_features * 10  # type: ignore[operator]
        assert network.operations((3, 28, 28)) == counter.get_total_flops() - last


@pytest.mark.parametrize(
    "make, sentence",
    [
        (lambda: TrainConfig(), "objective: required, and not given"),
        (lambda: TrainConfig(objective="kdd"), "objective: no such name 'kdd'; did you mean 'kd'?"),
        (
            lambda: TrainConfig(objective="ce", student={"name": "mlp", "hiden": 3}),
            "student.mlp.hiden: no such setting",
        ),
        (lambda: OptimConfig(lr=-1), "lr: should be greater than 0, got -1"),
        (lambda: next(train({"objective": "ce"})), "config: needs a TrainConfig, got a dict"),
        (lambda: find_or_train(None, "x"), "config: needs a TrainConfig, got a NoneType"),
    ],
)
def test_a_wrong_argument_in_python_is_a_config_error(make: Any, sentence: str) -> None:
    with pytest.raises(ConfigError) as error:
        make()
    assert sentence in str(error.value)


def test_every_problem_of_a_call_is_in_one_error() -> None:
    with pytest.raises(ConfigError) as error:
        TrainConfig(objective="kdd", epochs=0)  # type: ignore[arg-type]
    assert len(error.value.problems) == 2


# --- recipes of later papers


SLOW_TO_FILL = {"epochs": 2, "schedule": {"warmup_epochs": 0.5}, "optim": {"batch_size": 32}}


@pytest.mark.parametrize(
    ("data", "recipe"),
    [
        ("cifar100", "patient"),
        ("cifar100", "deit"),
        ("cifar100", "fast"),
        ("tiny_imagenet", "patient"),
        ("tiny_imagenet", "deit"),
        ("imagenet", "patient"),
        ("imagenet", "deit"),
        ("fashion_mnist", "patient"),
        ("omniglot", "patient"),
        ("digits", "patient"),
    ],
)
def test_a_recipe_by_name_is_whole_and_settings_override_it(data: str, recipe: str) -> None:
    tree = {"objective": "ce", "data": data, "recipe": recipe}
    config = validated(TrainConfig, tree)
    expected = {"patient": (1000, "adamw"), "deit": (300, "adamw"), "fast": (10, "sgd")}[recipe]
    assert (config.epochs, config.optim.name) == expected
    assert (config.augment.mixup > 0) == (recipe != "fast")
    assert config.augment.flip in {
        "omniglot": [False],
        "digits": [False],
    }.get(data, [True, "alternating"])
    less = validated(TrainConfig, {**tree, "epochs": 3, "augment": {"mixup": 0}})
    assert (less.epochs, less.augment.mixup, less.optim) == (3, 0, config.optim)
    other = validated(TrainConfig, {**tree, "optim": {"name": "muon"}})
    assert other.optim.name == "muon" and other.optim.batch_size == config.optim.batch_size


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["patient", "deit", "fast"])
def test_a_recipe_by_name_trains(recipe: str, tmp_path: Path) -> None:
    write_cifar(tmp_path, Cifar10, pickled(Cifar10), archive=False)
    tree = {
        "objective": {"name": "kd", "alpha": 1.0, "temperature": 1.0},
        "data": {"name": "cifar10", "root": tmp_path},
        "recipe": recipe,
        "student": {"name": "cnn", "widths": [4, 8]},
        "teacher": {"model": {"name": "cnn", "widths": [8, 8]}},
        **SLOW_TO_FILL,
    }
    config = validated(TrainConfig, tree)
    teacher = config.teacher_run()
    assert teacher is not None and teacher.optim.name == config.optim.name
    network = teacher.build_student()
    metrics = [epoch.metrics for epoch in train(config, teacher=network)]
    assert all(math.isfinite(m["train_kd"]) for m in metrics) and len(metrics) == 2
