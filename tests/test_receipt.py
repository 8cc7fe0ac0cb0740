"""A sweep's actual costs beside the planned ones, and the reliability of its rungs."""

import random
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tfkd_ray.show.receipt import (
    expected_epochs,
    fidelity_warnings,
    rank_correlations,
    reaching,
    receipt,
    receipt_lines,
    receipt_rows,
)  # fmt: skip
from tfkd_ray.space.space import Space, build_space
from tfkd_ray.store.experiment import Record

KD = {"name": "kd", "temperature": {"low": 1, "high": 20, "log": True}, "alpha": 0.5}


def space(**tree: Any) -> Space:
    search = {"num_samples": 20, "baselines": False, **tree.pop("search", {})}
    return build_space(
        {"student": "mlp", "epochs": 9, "objective": "ce", "optim": {"lr": {"low": 0.01, "high": 1}}, **tree, "search": search}
    )  # fmt: skip


def record(
    number: int, values: list[float], status: str = "done", objective: str = "ce", **parameters: Any
) -> Record:
    metrics = [{"epoch": k + 1, "val_accuracy": v, "seconds": 2.0} for k, v in enumerate(values)]
    return Record(
        Path("x"),
        number,
        f"t{number:04d}-{objective}",
        objective,
        status,
        parameters,
        {},
        metrics=metrics,
    )


def test_a_receipt_adds_up_and_counts_hours_at_the_measured_speed() -> None:
    records = [record(0, [0.5] * 9), record(1, [0.4], "stopped"), record(2, [0.4] * 3, "stopped"), record(3, [], "failed")]  # fmt: skip
    found = receipt(space(workers=2, cpus_per_worker=3), records)
    assert (found.most, found.used, found.saved, found.unit) == (180, 13, 14, "CPU-hours")
    assert found.expected == expected_epochs(space(), 20) and 20 < found.expected < 180
    for name, epochs in (("most", 180), ("used", 13), ("saved", 14), ("expected", found.expected)):
        assert found.hours[name] == pytest.approx(epochs * 2 * 6 / 3600)
    assert receipt(space(gpus_per_worker=1, workers=2), records).hours["used"] == pytest.approx(
        13 * 2 * 2 / 3600
    )
    assert receipt_rows(receipt(space(gpus_per_worker=1), records))[2] == (
        "used",
        "13 epochs, 0.0072 GPU-hours",
    )
    empty = receipt(space(), [])
    assert empty.used == 0 and set(empty.hours.values()) == {0.0}


def test_hyperband_is_planned_by_bracket() -> None:
    s = space(search={"stopping": "hyperband", "num_samples": 60})
    came = dict(reaching(s, 60))
    sizes = [sum(s.search.stopping.bracket(9, k) == b for k in range(60)) for b in range(3)]  # type: ignore[union-attr]
    assert came[1] == 60 and came[9] >= sizes[2]  # the last bracket stops none

    def passed(n: float, seed: int) -> int:
        rng, came = random.Random(seed), list[float]()
        count = 0
        for _ in range(round(n)):
            came.append(value := rng.random())
            count += value >= sorted(came, reverse=True)[max(1, len(came) // 3) - 1]
        return count

    third = [
        sizes[2] + passed(sizes[1], s) + passed(passed(sizes[0], s), s + 1000) for s in range(500)
    ]
    assert came[9] == pytest.approx(sum(third) / 500, rel=0.05)


@pytest.mark.parametrize(
    "final, warns",
    [
        (lambda early, t: early, False),
        (lambda early, t: early + 0.5 * t, True),  # the strongest softening is behind at first
        (lambda early, t: 1 - early, True),
    ],
    ids=["the rung ranks as the end does", "late bloomers at high T", "the other way round"],
)
def test_early_stopping_that_was_not_safe_is_said_and_what_to_set(
    final: Callable[[float, float], float], warns: bool
) -> None:
    s = space(objective=KD, epochs=27, teacher={"model": "mlp"})
    rng = random.Random(0)
    records = []
    for k in range(12):
        t = rng.uniform(1, 20)
        early = rng.random()
        values = [early] * 5 + [final(early, t)] * 22
        parameters = {"objective.kd.temperature": t, "optim.lr": rng.random()}
        records.append(record(k, values, objective="kd", **parameters))
    records.append(record(12, [0.9] * 3, "stopped", objective="kd"))
    found = fidelity_warnings(s, records)
    assert len(found) == warns
    if warns:
        assert found[0].startswith(
            "stopping kd after 3 epochs may not have been safe: over the 12 trials of full length"
        )
        assert found[0].endswith("set search.stopping.min_epochs: 9, or stopping: none")
        assert (
            "trials with high objective.kd.temperature gain ranks after that epoch" in found[0]
        ) == (final(0, 1) == 0.5)
        assert max(map(len, receipt_lines(s, records))) <= 80
        assert fidelity_warnings(s, records[:7]) == []  # too few to decide


@pytest.mark.slow
def test_a_correlation_over_survivors_is_corrected_for_their_selection() -> None:
    """Values with a correlation of 0.8; only the best sixth at the rung have a final value: 0.4."""
    found = []
    for seed in range(60):
        rng, records = random.Random(seed), []
        for k in range(90):
            early = rng.gauss(0, 1)
            records.append(record(k, [early] * 3 + [0.8 * early + 0.6 * rng.gauss(0, 1)] * 6))
        best = sorted(records, key=lambda r: -r.metrics[0]["val_accuracy"])[:15]
        stopped = [
            record(r.number, [r.metrics[0]["val_accuracy"]] * 3, "stopped")
            for r in records
            if r not in best
        ]
        s = space(search={"stopping": {"name": "halving", "min_epochs": 3}})
        found.append(next(rank_correlations(s, best + stopped)))
        assert (found[-1].rung, found[-1].n, found[-1].judged) == (3, 15, 90)
    assert 0.3 < statistics.mean(f.rank for f in found) < 0.5
    assert 0.65 < statistics.mean(f.corrected for f in found) < 0.85
    assert sum(f.most > 0.8 for f in found) >= 0.85 * len(
        found
    )  # 95 % of intervals, and their own spread


def test_a_sweep_without_rungs_and_one_without_spread_get_no_warning() -> None:
    same = [record(k, [0.5] * 9) for k in range(10)]
    assert (
        fidelity_warnings(space(search={"stopping": "none"}), same)
        == fidelity_warnings(space(), same)
        == []
    )
