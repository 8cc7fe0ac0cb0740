"""Plans: what a sweep is expected to take, and what it never exceeds."""

import dataclasses
import random
import re

import pytest

from tfkd_ray.plan import lines, plan
from tfkd_ray.space import build_space, load_space


def test_a_plan_counts_trials_epochs_and_teachers() -> None:
    found = plan(load_space("digits_tfkd"))
    assert [(p.objective, p.trials, p.most) for p in found.parts] == [
        (o, 6, 324) for o in ("tfkd_reg", "tfkd_self", "lsr", "ce")
    ]
    assert [epoch for epoch, _ in found.parts[0].reaching] == [6, 18, 54] and found.teacher_epochs == 54
    assert found.seconds is None and any("--probe" in line for line in lines(found))
    uneven = plan(
        build_space({"objective": ["ce", "lsr"], "epochs": 4, "search": {"num_samples": 7, "stopping": "none"}})
    )
    assert [(p.trials, p.epochs, p.most) for p in uneven.parts] == [(4, 16, 16), (3, 12, 12)]


def test_what_is_expected_is_what_halving_does_with_values_that_say_nothing() -> None:
    space = build_space(
        {"objective": "ce", "epochs": 27, "optim": {"lr": {"low": 0.1, "high": 1}}, "search": {"num_samples": 30}}
    )
    (part,) = plan(space).parts
    rng, epochs = random.Random(0), []
    for _ in range(2000):
        spent, came = 0, {3: list[float](), 9: list[float]()}
        for _ in range(30):
            for rung, until in ((3, 9), (9, 27)):
                spent += rung if rung == 3 else 0
                came[rung].append(value := rng.random())
                if value < sorted(came[rung], reverse=True)[max(1, len(came[rung]) // 3) - 1]:
                    break
                spent += until - rung
        epochs.append(spent)
    assert part.epochs == pytest.approx(sum(epochs) / len(epochs), rel=0.05)


def test_a_probe_gives_hours_and_money() -> None:
    found = plan(load_space("digits_tfkd", ["student={name: mlp, hidden: [8]}"]), probe=True)
    assert found.seconds is not None and 0 < found.seconds < 600
    text = list(lines(found, slots=2))
    assert max(map(len, text)) <= 80 and sum("an epoch of" in line for line in text) == 4
    gpu = plan(load_space("digits_tfkd", ["gpus_per_worker=1", "workers=2"]))
    assert gpu.gpus == 2


def test_hours_become_gpu_hours_and_money() -> None:
    """Two workers with a GPU each: 2 h of training are 4 GPU-hours, whatever number of trials runs at a time."""
    tree = {"objective": "ce", "epochs": 4, "workers": 2, "gpus_per_worker": 1}
    found = plan(build_space({**tree, "search": {"num_samples": 9, "stopping": "none"}}))
    (part,) = found.parts
    assert (part.epochs, found.gpus, found.seconds) == (36, 2, None)
    assert not [line for line in lines(found, gpu_hour_price=2) if "money" in line]  # hours are not known
    known = dataclasses.replace(found, parts=(dataclasses.replace(part, epoch_s=200.0),), teacher_s=0.0)
    assert known.seconds == 7200
    for slots in (1, 4):
        text = list(lines(known, slots=slots, gpu_hour_price=2))
        assert "GPU-hours: 4.00, 8.00 in money, if the GPUs are as fast as this machine" in text
        each = "2 h 00 min" if slots == 1 else "30 min 00 s"
        assert f"training: 2 h 00 min with one trial at a time, {each} with {slots}" in text
    assert not [line for line in lines(known) if "money" in line]
    assert not [line for line in lines(dataclasses.replace(known, gpus=0), gpu_hour_price=2) if "GPU" in line]


def test_disk_is_that_of_trials_and_teachers_and_the_bank_has_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A multilayer perceptron 64-32-10 has 2,410 weights of 4 bytes; what a trial keeps are five of it."""
    size = 4 * (64 * 32 + 32 + 32 * 10 + 10)
    mlp = {"name": "mlp", "hidden": [32]}
    tree = {"student": mlp, "epochs": 4, "search": {"num_samples": 6, "stopping": "none"}}
    alone = plan(build_space({**tree, "objective": "ce"}))
    assert (alone.disk, alone.bank) == (5 * 6 * size, 0)
    assert "disk: at most 0.3 MiB of weights and checkpoints" in list(lines(alone))
    teacher = {"model": {"choices": [mlp, {**mlp, "dropout": 0.5}]}, "labels": "bank"}
    taught = {**tree, "objective": "kd", "teacher": teacher}
    found = plan(build_space(taught))
    assert found.disk == 5 * 6 * size + 2 * size
    monkeypatch.setenv("TFKD_BANK_GB", "3")
    text = list(lines(plan(build_space(taught))))
    assert "soft labels: at most 2.8 GiB in each node's cache (TFKD_BANK_GB)" in text
    assert plan(build_space({**taught, "teacher": {**teacher, "labels": "online"}})).bank == 0


@pytest.mark.gpu
def test_a_probe_proposes_how_many_trials_share_a_gpu() -> None:
    space = build_space({"objective": "ce", "student": "mlp", "gpus_per_worker": 1})
    (line,) = (line for line in lines(plan(space, probe=True)) if line.startswith("GPU memory"))
    assert re.search(r"; [0-9]+ fit on it: gpus_per_worker=0", line)


def test_the_packing_is_that_of_the_largest_trial() -> None:
    found = plan(build_space({"objective": ["ce", "lsr"], "student": "mlp"}))
    parts = [dataclasses.replace(p, epoch_s=1.0, share=s) for p, s in zip(found.parts, (0.2, 0.3), strict=True)]
    text = list(lines(dataclasses.replace(found, parts=tuple(parts), teacher_s=0.0)))
    assert "GPU memory: a trial takes 30% of one; 3 fit on it: gpus_per_worker=0.333" in text
