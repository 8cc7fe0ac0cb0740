"""A CUDA GPU gives the CPU's results (bank, bf16, resume, compile), and no step waits for it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import OBJECTIVES
from test_loop import float32_precisions

from tfkd_ray.learn.config import TrainConfig
from tfkd_ray.learn.loop import train
from tfkd_ray.learn.teachers import find_or_train
from tfkd_ray.settings.schema import validated

pytestmark = pytest.mark.gpu


def config(**changes: Any) -> TrainConfig:
    tree = {
        "objective": "ce",
        "student": {"name": "cnn", "widths": [16, 32]},
        "augment": {"crop_padding": 1, "flip": True, "rotation_degrees": 15},
        "epochs": 3,
        "gpus_per_worker": 1,
        "precision": "fp32",
        **changes,
    }
    return validated(TrainConfig, tree)


def taught(labels: str, **changes: Any) -> TrainConfig:
    teacher = {"model": {"name": "cnn", "widths": [32]}, "epochs": 2, "labels": labels}
    return config(
        objective={"name": "kd", "alpha": 0.7, "temperature": 3}, teacher=teacher, **changes
    )


def test_the_bank_is_a_teacher_in_every_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As test_soft_labels.py; tolerance for half-precision labels and unordered sums."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    online, banked = (
        list(train(c, teacher=find_or_train(c, tmp_path))) for c in map(taught, ("online", "bank"))
    )
    for a, b in zip(online, banked, strict=True):
        assert a.metrics["train_kd"] == pytest.approx(b.metrics["train_kd"], rel=5e-3)
        assert a.metrics["val_teacher_kl"] == pytest.approx(b.metrics["val_teacher_kl"], rel=5e-3)
    for name, weight in online[-1].state()["model"].items():
        assert (weight.float() - banked[-1].state()["model"][name].float()).abs().max() < 1e-2, name


@pytest.mark.parametrize("compiled", ["off", "on"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_students_learn_real_digits(precision: str, compiled: str) -> None:
    last = list(train(config(precision=precision, compile=compiled, epochs=9)))[-1]
    assert last.metrics["val_accuracy"] > 0.7
    assert all(v.dtype != torch.bfloat16 for v in last.state()["model"].values())


def test_a_resumed_run_is_one_that_was_never_stopped() -> None:
    """Equal to 1e-3 on one device: cuDNN sums gradients in an order that may vary between runs."""
    c = config(epochs=4)
    whole = list(train(c))
    run = train(c)
    half = [next(run), next(run)]
    state = half[-1].state()
    run.close()
    rest = list(train(c, state))
    assert [e.metrics["epoch"] for e in rest] == [3, 4]
    for name, weight in whole[-1].state()["model"].items():
        assert (weight.float() - rest[-1].state()["model"][name].float()).abs().max() < 1e-3, name
    assert rest[-1].metrics["val_nll"] == pytest.approx(whole[-1].metrics["val_nll"], abs=1e-3)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")  # a prototype, according to torch
@pytest.mark.parametrize("labels", ["bank", "online"])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda objective: objective.name)
def test_no_step_waits_for_the_device(
    objective: Any, labels: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the second step of an epoch to its last, a host that waits raises."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = None if objective.name == "tfkd_self" else {"name": "cnn", "widths": [32]}
    teacher = {"teacher": {"model": model, "epochs": 1, "labels": labels}}
    given = teacher if objective.needs_teacher else {}
    c = config(objective=objective.model_dump(), optim={"batch_size": 128}, **given)
    bank = find_or_train(c, tmp_path)
    images, _ = c.data.load()
    steps, done, step = len(images) // 128 + (len(images) % 128 >= 2), [0], torch.optim.SGD.step

    def counted(self: Any, *args: Any) -> Any:
        result = step(self, *args)
        done[0] += 1
        torch.cuda.set_sync_debug_mode("default" if done[0] % steps == 0 else "error")
        return result

    monkeypatch.setattr(torch.optim.SGD, "step", counted)
    try:
        epochs = list(train(c, teacher=bank))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(epochs) == 3 and done[0] == 3 * steps


def test_fp32_is_exact_and_bf16_lets_the_rest_be_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    step = torch.optim.SGD.step

    def looked(self: Any, *args: Any) -> Any:
        seen.extend(float32_precisions())
        return step(self, *args)

    monkeypatch.setattr(torch.optim.SGD, "step", looked)
    before = float32_precisions()
    for precision, word in (("fp32", "ieee"), ("bf16", "tf32")):
        seen.clear()
        list(train(config(precision=precision, epochs=1)))
        assert set(seen) == {word}
    assert float32_precisions() == before


def test_augmented_and_mixed_images_are_those_of_the_cpu() -> None:
    """Colours may be cut down from 1 less than a whole, pixels at a tie be the other one."""
    from tfkd_ray.learn.augment import Augment
    from tfkd_ray.learn.images import ImageSet

    augment = Augment(
        crop_padding=4, flip=True, rotation_degrees=15, trivial=True, erase=0.5, mixup=0.2, cutmix=1
    )
    g = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (256, 3, 32, 32), dtype=torch.uint8, generator=g)
    at = torch.arange(256)
    found = []
    for name in ("cpu", "cuda"):
        device = torch.device(name)
        images = ImageSet(pixels, at % 10, at, 256).on(device)
        view = augment.of_epoch(0, 1, images, (32, 32))
        assert view.mix is not None
        mix, index = view.mix.on(device), at.to(device)
        (read,), (drawn,) = images.read([index]), view.of_each([index], device)
        seen = augment.erased(augment(read, drawn).float(), drawn)
        found.append(mix(seen, seen[mix.partner]).cpu())
    unlike = (found[0] - found[1]).abs() > 1.01
    assert unlike.float().mean() < 0.01


@pytest.mark.parametrize("name", ["sgd", "adamw", "muon"])
def test_an_optimizer_updates_as_on_the_cpu(name: str) -> None:
    """Pieces, clipping and the average, too. Muon multiplies in bfloat16."""
    optim = {"name": name, "batch_size": 64, "accumulate": 3, "clip_norm": 1.0}
    tree = {"student": {"name": "mlp", "hidden": [32, 16]}, "optim": optim, "ema": {"decay": 0.9}}
    gpu, cpu = (list(train(config(**tree, gpus_per_worker=n)))[-1] for n in (1, 0))
    for key in ("train_loss", "val_nll", "val_ema_nll"):
        assert gpu.metrics[key] == pytest.approx(cpu.metrics[key], rel=0.02), key
