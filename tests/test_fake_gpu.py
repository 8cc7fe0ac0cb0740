"""Whole epochs on a GPU that has no numbers: no step waits for it, and none mixes its tensors with the CPU's."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import OBJECTIVES, long_after
from fake_cuda import fake_cuda
from test_folder import write_folder
from torch import Tensor

from tfkd_ray.learn import loop
from tfkd_ray.learn.config import TrainConfig
from tfkd_ray.learn.loop import train
from tfkd_ray.learn.soft_labels import Bank
from tfkd_ray.learn.teacher_input import untrained
from tfkd_ray.settings.schema import validated

STEPS = 3
VIEWS = {"crop_padding": 1, "flip": True, "rotation_degrees": 15}


@pytest.fixture(autouse=True)
def _no_autograd(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace what asks autograd for gradients or a network for numbers: it has none here."""

    def norms(objective: Any, terms: Any, logits: Tensor) -> tuple[int, Tensor] | None:
        return None if terms.kd is None else (len(logits), logits.new_zeros(2))

    monkeypatch.setattr(loop, "gradient_norms", norms)


def run(data: str, root: Path, **changes: Any) -> TrainConfig:
    tree: dict[str, Any] = {
        "student": {"name": "cnn", "widths": [4]},
        "augment": VIEWS,
        "epochs": 2,
        "gpus_per_worker": 1,
        "data": {"name": "digits", "subset": 60, "val_fraction": 0.25},
        "optim": {"batch_size": 15},
    }
    if data == "folder":
        write_folder(root / "images", train=13)
        tree["data"] = {"name": "image_folder", "root": str(root / "images"), "num_classes": 2}
        tree["data"] |= {"image_size": 16, "val_fraction": 0.25}
        tree |= {"optim": {"batch_size": 6}, "augment": {**VIEWS, "resized_crop": True}}
    return validated(TrainConfig, {**tree, **changes})


def teachers(config: TrainConfig, folder: Path) -> Any:
    """Return untrained teachers, behind their banks."""
    return [
        Bank(lambda run=run: untrained(run), {"of": run.fingerprint()}, folder)
        for run in config.teacher_runs()
    ]


def assert_only_epochs_wait(config: TrainConfig, folder: Path) -> None:
    """Train; from the first step of an epoch on, nothing waits but one copy of its sums.

    After the steps of the first epoch, the bank is filled with the labels of validation images.
    """
    config.data.load()
    with fake_cuda() as done:
        epochs = train(config, teacher=teachers(config, folder) or None)
        for number, _ in enumerate(epochs):
            first, steps = done.index("backward"), done.count("backward")
            assert done[first : first + steps] == ["backward"] * steps
            rest = done[first + steps :]
            assert rest == ["copy to the host"] * (1 if number or not config.banked else len(rest))
            assert steps >= STEPS and number < config.epochs
            done.clear()
        assert number == config.epochs - 1


KD = {"name": "kd", "alpha": 0.7, "temperature": 3}


def marks_of(name: str) -> list[pytest.MarkDecorator]:
    """Return `long` for an objective that trains, and uses the bank, as another one does."""
    return [] if name in ("ce", "kd", "dkd", "tfkd_self") else [pytest.mark.long]


CASES = [
    *(
        pytest.param({"name": o.name}, "bank", "fp32", "memory", marks=marks_of(o.name))
        for o in OBJECTIVES
    ),
    *(
        pytest.param({"name": o.name}, "online", "bf16", "folder", marks=marks_of(o.name))
        for o in OBJECTIVES
    ),
    pytest.param(KD, "bank", "fp32", "folder", marks=pytest.mark.long),
    (KD, "online", "fp32", "memory"),
    *((KD, labels, "bf16", data) for labels, data in (("bank", "folder"), ("online", "memory"))),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    "objective, labels, precision, data",
    CASES,
    ids=lambda x: x["name"] if isinstance(x, dict) else x,
)
def test_no_objective_waits_for_the_device(
    objective: dict[str, Any], labels: str, precision: str, data: str, tmp_path: Path
) -> None:
    taught = {"teacher": {"labels": labels}}
    if objective["name"] not in ("tfkd_self",):
        taught["teacher"] |= {"model": {"name": "cnn", "widths": [4]}}  # type: ignore[dict-item]
    needs = next(o for o in OBJECTIVES if o.name == objective["name"]).needs_teacher
    c = run(data, tmp_path, objective=objective, precision=precision, **(taught if needs else {}))
    assert_only_epochs_wait(c, tmp_path)


def test_the_next_view_of_the_bank_is_read_while_an_epoch_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[dict[str, Any], int]] = []

    def read_ahead(bank: Bank, view: dict[str, Any], count: int, *_: Any, top: bool) -> None:
        asked.append((view, count))

    monkeypatch.setattr(Bank, "read_ahead", read_ahead)
    teacher = {"model": {"name": "cnn", "widths": [4]}, "labels": "bank"}
    c = run("memory", tmp_path, objective=KD, teacher=teacher)
    assert_only_epochs_wait(c, tmp_path)
    images = len(c.data.load()[0])
    assert asked == [(c.augment.key(c.seed, 1), images)]  # of two epochs: the second one's


INGREDIENTS = {
    "mixed": {"augment": {**VIEWS, "mixup": 0.2, "cutmix": 1, "erase": 0.5, "flip": "alternating"}},
    "trivial": {"augment": {**VIEWS, "trivial": True, "mixup": 0.2}},
    "rand": {"augment": {**VIEWS, "rand": {"ops": 2, "magnitude": 9}}},
    "average": {"ema": {"decay": 0.9}},
    "pieces": {"optim": {"batch_size": 15, "accumulate": 2, "clip_norm": 1}},
    "adamw": {"optim": {"name": "adamw", "batch_size": 15}},
    "two teachers": {
        "teacher": [
            {"model": {"name": "cnn", "widths": [4]}},
            {"model": {"name": "mlp", "hidden": [4]}, "labels": "online"},
        ]
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("settings", long_after(3, INGREDIENTS.values()), ids=INGREDIENTS)
def test_no_ingredient_of_a_recipe_waits_for_the_device(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    """The draws of operations on colours, which `memory` cannot have, are in `folder`."""
    teacher = {"model": {"name": "cnn", "widths": [4]}}
    colours = {"trivial", "rand"} & settings.get("augment", {}).keys()
    data = "folder" if colours else "memory"
    c = run(data, tmp_path, **{"objective": KD, "teacher": teacher, **settings})
    assert_only_epochs_wait(c, tmp_path)


def test_a_value_that_is_asked_of_the_device_is_an_error_here() -> None:
    """The stand-in would catch a wait, a mask, and tensors of two devices."""
    with fake_cuda():
        x = torch.zeros(3, device="cuda")
        for waits in (lambda: float(x.sum()), lambda: x[x > 0], lambda: x + torch.zeros(3)):
            with pytest.raises(Exception, match=r"fake|dynamic|device|nonzero|_local_scalar_dense"):
                waits()
