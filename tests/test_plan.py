"""Plans: the expected time of a sweep, and its upper limit."""

import dataclasses
import random
import re
import time
from types import SimpleNamespace
from typing import Any

import pytest

import tfkd_ray.show.plan as plan_module
from tfkd_ray.learn.config import TeacherRun
from tfkd_ray.learn.models import Cnn, Mlp
from tfkd_ray.show.plan import GPU_CONTEXT, lines, plan, plan_comparison, resident_bytes, slots_here
from tfkd_ray.show.receipt import EXACT, _passing
from tfkd_ray.space.arms import Arms, build_arms, seeds_from
from tfkd_ray.space.search_config import Hyperband
from tfkd_ray.space.space import build_space, load_space


def test_a_plan_counts_trials_epochs_and_teachers() -> None:
    found = plan(load_space("digits_tfkd"))
    assert [(p.objective, p.trials, p.most) for p in found.parts] == [
        (o, 6, 324) for o in ("tfkd_reg", "tfkd_self", "lsr", "ce")
    ]
    assert [epoch for epoch, _ in found.parts[0].reaching] == [
        6,
        18,
        54,
    ] and found.teacher_epochs == 54
    assert found.seconds is None and any("--probe" in line for line in lines(found))
    uneven = plan(
        build_space(
            {
                "objective": ["ce", "lsr"],
                "epochs": 4,
                "search": {"num_samples": 7, "stopping": "none"},
            }
        )
    )
    assert [(p.trials, p.epochs, p.most) for p in uneven.parts] == [(4, 16, 16), (3, 12, 12)]


def test_what_is_expected_is_what_halving_does_with_values_that_say_nothing() -> None:
    space = build_space(
        {
            "objective": "ce",
            "epochs": 27,
            "optim": {"lr": {"low": 0.1, "high": 1}},
            "search": {"num_samples": 30},
        }
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


@pytest.mark.parametrize(
    "network", [Mlp(hidden=(5, 3)), Mlp(hidden=()), Cnn(widths=(4, 6)), Cnn(widths=(3,))]
)
def test_weights_that_are_counted_are_those_that_are_built(network: Mlp | Cnn) -> None:
    built = network.build((3, 8, 9), 7).state_dict().values()
    assert network.weights((3, 8, 9), 7) == sum(values.numel() for values in built)


def test_a_probe_gives_hours_and_money() -> None:
    found = plan(load_space("digits_tfkd", ["student={name: mlp, hidden: [8]}"]), probe=True)
    assert found.seconds is not None and 0 < found.seconds < 600
    text = list(lines(found, slots=2))
    assert max(map(len, text)) <= 80 and sum("an epoch of" in line for line in text) == 4
    gpu = plan(load_space("digits_tfkd", ["gpus_per_worker=1", "workers=2"]))
    assert gpu.gpus == 2


@pytest.mark.slow
def test_a_probe_of_kd_asks_the_teacher_once_for_each_view_and_not_in_every_trial(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """ResNet-18 teaches a tiny student: an epoch of a trial costs as much as plain training."""
    tree = {
        "student": {"name": "mlp", "hidden": [8]}, "objective": ["ce", {"name": "kd", "alpha": 0.5}], "epochs": 3,
        "teacher": {"model": "resnet18", "labels": "bank", "optim": {"batch_size": 16}}, "optim": {"batch_size": 16},
        "search": {"num_samples": 4, "stopping": "none", "baselines": False}, "data": {"name": "digits", "subset": 200},
    }  # fmt: skip
    views: list[str] = []
    timed = plan_module._view_seconds

    def counted(run: TeacherRun) -> float:
        views.append(run.student.name)
        return timed(run)

    monkeypatch.setattr(plan_module, "_view_seconds", counted)
    found = plan(build_space(tree), probe=True)
    ce, kd = (part.epoch_s for part in found.parts)
    assert ce and kd and kd < 5 * ce and views == ["resnet18"]
    assert found.teacher_s is not None and found.teacher_s > 20 * kd


def arms(**changes: Any) -> Arms:
    """A comparison of plain training, and of kd from a larger teacher, on 4 and 6 epochs."""
    tree = {
        "data": {"name": "digits", "subset": 200},
        "student": {"name": "mlp", "hidden": [8]},
        "epochs": 4,
        "arms": [
            {"name": "ce", "objective": "ce"},
            {
                "name": "kd",
                "objective": "kd",
                "epochs": 6,
                "teacher": {
                    "model": {"name": "mlp", "hidden": [16]},
                    "epochs": 5,
                    "labels": "bank",
                },
            },
        ],
    }
    return build_arms(tree | changes)


def test_a_plan_of_arms_counts_their_runs_and_the_teachers_of_all_seeds() -> None:
    found = plan_comparison(arms(), seeds_from(3))
    assert [(p.objective, p.trials, p.most) for p in found.parts] == [("ce", 3, 12), ("kd", 3, 18)]
    assert found.teacher_epochs == 5 and found.epochs == 30 and found.seconds is None
    each = plan_comparison(arms(), seeds_from(3), teacher_per_seed=True)
    assert each.teacher_epochs == 15 and each.disk > found.disk
    text = list(lines(each))
    assert text[:3] == [
        "arm  runs  epochs each  epochs",
        "ce      3            4      12",
        "kd      3            6      18",
    ]
    assert "30 epochs in all, in 6 runs" in text
    assert "teachers, if not trained yet: 15 epochs, once" in text
    assert "hours: unknown; --probe measures a few steps of each arm on this machine" in text


@pytest.mark.parametrize(
    ("per_seed", "augment", "teachers", "views"),
    [(False, {}, 1, 1), (True, {}, 3, 3), (False, {"flip": True}, 1, 18), (True, {"flip": True}, 3, 18)],
)  # fmt: skip
def test_a_probe_of_arms_asks_each_kind_of_teacher_once_and_counts_every_view(
    per_seed: bool, augment: dict[str, Any], teachers: int, views: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """An epoch of a run takes 1 s here, one of a teacher 100 s, and a view 10,000 s."""
    monkeypatch.setattr(
        plan_module, "_epoch_seconds", lambda run: 100.0 if isinstance(run, TeacherRun) else 1.0
    )
    asked = []

    def view_seconds(run: TeacherRun) -> float:
        asked.append(run)
        return 10_000.0

    monkeypatch.setattr(plan_module, "_view_seconds", view_seconds)
    found = plan_comparison(
        arms(augment=augment), seeds_from(3), teacher_per_seed=per_seed, probe=True
    )
    assert found.seconds == 3 * (4 + 6) + 100 * 5 * teachers + 10_000 * views and len(asked) == 1
    assert any("with one run at a time" in line for line in lines(found))


def test_without_augmentation_a_plan_counts_one_view_of_the_images(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(plan_module, "_epoch_seconds", lambda run: 0.0)
    monkeypatch.setattr(plan_module, "_view_seconds", lambda run: 1.0)
    tree = {
        "objective": "kd", "epochs": 9, "data": {"name": "digits", "subset": 200},
        "teacher": {"model": {"name": "mlp", "hidden": [16]}, "labels": "bank"},
        "search": {"num_samples": 2, "baselines": False},
    }  # fmt: skip
    for augment, views in (({}, 1), ({"crop_padding": 1}, 9)):
        assert plan(build_space({**tree, "augment": augment}), probe=True).teacher_s == views


def test_what_lies_on_the_device_is_images_and_soft_labels() -> None:
    tree = {"student": "mlp", "objective": "ce", "data": {"name": "digits", "subset": 200}}
    images = sum(len(part) for part in build_space(tree).example.data.load() if part)
    assert resident_bytes(build_space(tree).example) == images * 64
    taught = {
        "objective": {"name": "kd", "alpha": 0.5},
        "teacher": {"model": "resnet18", "labels": "bank"},
    }
    assert resident_bytes(build_space(tree | taught).example) == images * (64 + 2 * 10)


@pytest.mark.parametrize("labels, of_teacher", [("online", 0), ("bank", 7)])
def test_the_share_of_a_gpu_has_room_for_the_trial_that_fills_the_cache_of_soft_labels(
    labels: str, of_teacher: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That trial has the teacher beside the student; with online labels the probed step has both."""
    gib, peak = 2**30, [5]
    monkeypatch.setattr(plan_module, "_epoch_seconds", lambda run: 1.0)

    def labelling(run: TeacherRun) -> float:
        peak[0] = max(peak[0], 7)
        return 1.0

    monkeypatch.setattr(plan_module, "_view_seconds", labelling)
    gpu = {
        "is_available": lambda: True,
        "current_device": lambda: 0,
        "get_device_properties": lambda device: SimpleNamespace(total_memory=100 * gib),
        "max_memory_reserved": lambda: peak[0] * gib,
        "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda: peak.__setitem__(0, 0),
    }
    for name, answer in gpu.items():
        monkeypatch.setattr(f"torch.cuda.{name}", answer)
    tree = {
        "student": "mlp", "objective": "kd", "epochs": 2, "data": {"name": "digits", "subset": 200},
        "teacher": {"model": "resnet18", "labels": labels}, "gpus_per_worker": 0.5,
        "search": {"num_samples": 2, "stopping": "none", "baselines": False},
    }  # fmt: skip
    space = build_space(tree)
    taken = (5 + of_teacher) * gib + GPU_CONTEXT + resident_bytes(space.example)
    (part,) = plan(space, probe=True).parts
    assert part.share == pytest.approx(taken / (95 * gib))


def test_trials_at_a_time_are_those_that_the_machine_has_cpus_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)

    def slots(**changes: Any) -> int:
        search = {"num_samples": 20, **changes.pop("search", {})}
        return slots_here(
            build_space({"objective": "ce", "student": "mlp", "search": search, **changes})
        )

    assert (
        slots() == 8
        and slots(cpus_per_worker=3) == 2
        and slots(workers=2) == 4
        and slots(workers=16) == 1
    )
    assert slots(search={"max_concurrent": 5}) == 5 and slots(search={"num_samples": 6}) == 6
    assert (
        slots(gpus_per_worker=1) == 2
        and slots(gpus_per_worker=0.5) == 4
        and slots(gpus_per_worker=0.1) == 8
    )


def test_hours_become_gpu_hours_and_money() -> None:
    """Two workers with a GPU each: 2 h are 4 GPU-hours, however many trials run at once."""
    tree = {"objective": "ce", "epochs": 4, "workers": 2, "gpus_per_worker": 1}
    found = plan(build_space({**tree, "search": {"num_samples": 9, "stopping": "none"}}))
    (part,) = found.parts
    assert (part.epochs, found.gpus, found.seconds) == (36, 2, None)
    assert not [
        line for line in lines(found, gpu_hour_price=2) if "money" in line
    ]  # hours are unknown
    known = dataclasses.replace(
        found, parts=(dataclasses.replace(part, epoch_s=200.0),), teacher_s=0.0
    )
    assert known.seconds == 7200
    for slots in (1, 4):
        text = list(lines(known, slots=slots, gpu_hour_price=2))
        assert "GPU-hours: 4.00, 8.00 in money, if the GPUs are as fast as this machine" in text
        each = "2 h 00 min" if slots == 1 else "30 min 00 s"
        assert f"training: 2 h 00 min with one trial at a time, {each} with {slots}" in text
    assert not [line for line in lines(known) if "money" in line]
    assert not [
        line
        for line in lines(dataclasses.replace(known, gpus=0), gpu_hour_price=2)
        if "GPU" in line
    ]


def test_disk_is_that_of_trials_and_teachers_and_the_bank_has_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A multilayer perceptron 64-32-10 has 2,410 weights of 4 bytes; a trial keeps five copies."""
    size = 4 * (64 * 32 + 32 + 32 * 10 + 10)
    mlp = {"name": "mlp", "hidden": [32]}
    tree = {"student": mlp, "epochs": 4, "search": {"num_samples": 6, "stopping": "none"}}
    alone = plan(build_space({**tree, "objective": "ce"}))
    assert (alone.disk, alone.bank) == (5 * 6 * size, 0)
    assert "disk: at most 0.3 MiB of weights and checkpoints" in list(lines(alone))
    two = {"optim": {"choices": ["sgd", "adamw"]}, "ema": {"decay": {"choices": [0, 0.9]}}}
    many = plan(build_space({**tree, "objective": "ce", **two}))
    assert many.disk == 9 * 6 * size, "weights; twice weights, average, and two moments"
    teacher = {"model": {"choices": [mlp, {**mlp, "dropout": 0.5}]}, "labels": "bank"}
    taught = {**tree, "objective": "kd", "teacher": teacher}
    found = plan(build_space(taught))
    assert found.disk == 5 * 6 * size + 2 * size
    monkeypatch.setenv("TFKD_BANK_GB", "3")
    text = list(lines(plan(build_space(taught))))
    assert "soft labels: the limit of each node's cache is 2.8 GiB (TFKD_BANK_GB)" in text
    assert plan(build_space({**taught, "teacher": {**teacher, "labels": "online"}})).bank == 0


@pytest.mark.gpu
def test_a_probe_proposes_how_many_trials_share_a_gpu() -> None:
    space = build_space({"objective": "ce", "student": "mlp", "gpus_per_worker": 1})
    found = plan(space, probe=True)
    (line,) = (line for line in lines(found) if line.startswith("GPU memory"))
    share = max(part.share or 0 for part in found.parts)
    fit = re.search(r"; (\d+) fit on one: gpus_per_worker=([0-9.]+)$", line)
    assert 0 < share <= 1 and fit is not None and int(fit[1]) == max(1, int(1 / share))
    assert 0 < int(fit[1]) * float(fit[2]) <= 1


def test_the_packing_is_that_of_the_largest_trial() -> None:
    found = plan(build_space({"objective": ["ce", "lsr"], "student": "mlp"}))
    parts = [
        dataclasses.replace(p, epoch_s=1.0, share=s)
        for p, s in zip(found.parts, (0.2, 0.3), strict=True)
    ]
    text = list(lines(dataclasses.replace(found, parts=tuple(parts), teacher_s=0.0)))
    assert "GPU memory: a trial takes 30% of a GPU; 3 fit on one: gpus_per_worker=0.333" in text


def test_a_plan_of_a_thousand_million_trials_is_arithmetic() -> None:
    for stopping in ("halving", "pausing", "hyperband", "median", "none"):
        started = time.monotonic()
        found = plan(
            load_space(
                "digits_tfkd", ["search.num_samples=1000000000", f"search.stopping={stopping}"]
            )
        )
        assert time.monotonic() - started < 5 and sum(p.trials for p in found.parts) == 10**9
        assert 0 < found.epochs <= sum(p.most for p in found.parts)


@pytest.mark.parametrize("factor", [2, 3, 7, 100, 20_000])
@pytest.mark.parametrize("trials", [EXACT + 1, 60_007])
def test_what_passes_a_rung_is_the_sum_however_it_is_counted(factor: int, trials: int) -> None:
    slow = sum(max(1, i // factor) / i for i in range(1, trials + 1))
    assert _passing(trials, factor) == pytest.approx(slow, abs=0.01)


@pytest.mark.parametrize("trials", [0, 1, 10, 77])
def test_hyperband_deals_in_rounds(trials: int) -> None:
    h = Hyperband()
    one_by_one = [h.bracket(54, k) for k in range(trials)]
    assert h.dealt(54, trials) == {b: one_by_one.count(b) for b in range(len(h.brackets(54)))}
