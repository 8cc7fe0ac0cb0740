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
