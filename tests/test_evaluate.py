"""Metrics against slow definitions, and that they add up over batches."""

import math

import pytest
import torch
from torch import Tensor

from tfkd_ray.evaluate import BINS, metric_sums, metrics_from


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.randn(200, 10, generator=g, dtype=torch.float64) * 2, torch.randint(10, (200,), generator=g)


def test_metrics_are_their_definitions(batch: tuple[Tensor, Tensor]) -> None:
    logits, labels = batch
    p = logits.softmax(1)
    hits, hits5, nll = 0, 0, 0.0
    bins: list[list[tuple[float, float]]] = [[] for _ in range(BINS)]
    for row, c in zip(p.tolist(), labels.tolist(), strict=True):
        order = sorted(range(10), key=lambda k: -row[k])
        hits, hits5, nll = hits + (order[0] == c), hits5 + (c in order[:5]), nll - math.log(row[c])
        bins[min(math.ceil(max(row) * BINS) - 1, BINS - 1)].append((max(row), float(order[0] == c)))
    ece = sum(abs(sum(conf for conf, _ in b) - sum(hit for _, hit in b)) for b in bins) / 200
    assert metrics_from(metric_sums(logits, labels)) == pytest.approx(
        {"val_accuracy": hits / 200, "val_top5": hits5 / 200, "val_nll": nll / 200, "val_ece": ece}
    )


def test_sums_of_parts_are_the_sum_of_all(batch: tuple[Tensor, Tensor]) -> None:
    logits, labels = batch
    parts = sum(metric_sums(z, y) for z, y in zip(logits.split(7), labels.split(7), strict=True))
    assert isinstance(parts, Tensor)
    assert torch.allclose(parts, metric_sums(logits, labels), atol=1e-10)


def test_perfect_confident_answers_are_calibrated() -> None:
    labels = torch.arange(10)
    metrics = metrics_from(metric_sums(torch.eye(10) * 100, labels))
    assert metrics["val_accuracy"] == metrics["val_top5"] == 1
    assert metrics["val_ece"] == pytest.approx(0, abs=1e-9) and metrics["val_nll"] == pytest.approx(0, abs=1e-9)


def test_two_classes_have_all_of_their_five_guesses() -> None:
    assert metrics_from(metric_sums(torch.randn(4, 2), torch.zeros(4, dtype=torch.long)))["val_top5"] == 1
