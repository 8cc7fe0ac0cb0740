"""Metrics against slow definitions, and their sums over batches."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from torch import Tensor

from tfkd_ray.learn import evaluate
from tfkd_ray.learn.config import TrainConfig
from tfkd_ray.learn.evaluate import images_at_once, metric_sums, metrics_from, predictions
from tfkd_ray.settings.schema import validated
from tfkd_ray.show.tensorboard import _judged_runs
from tfkd_ray.verdict.calibration import BINS, bin_of
from tfkd_ray.verdict.scores import accuracy, ece


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.randn(200, 10, generator=g, dtype=torch.float64) * 2, torch.randint(
        10, (200,), generator=g
    )


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
    assert metrics["val_ece"] == pytest.approx(0, abs=1e-9) and metrics["val_nll"] == pytest.approx(
        0, abs=1e-9
    )


def test_two_classes_have_all_of_their_five_guesses() -> None:
    assert (
        metrics_from(metric_sums(torch.randn(4, 2), torch.zeros(4, dtype=torch.long)))["val_top5"]
        == 1
    )


@pytest.mark.parametrize("case", ["random", "equal logits", "on the edges", "certain"])
def test_validation_tables_and_captions_say_the_same_calibration_error(
    case: str, tmp_path: Path
) -> None:
    """Confidences on the edges 6/15 and 9/15, which softmax returns with rounding errors."""
    g = torch.Generator().manual_seed(1)
    labels = torch.randint(10, (300,), generator=g)
    logits = {
        "random": torch.randn(300, 10, generator=g) * 3,
        "equal logits": torch.zeros(300, 10),
        "on the edges": torch.tensor([[0.6, 0.4] + [0.0] * 8, [0.4, 0.3, 0.3] + [0.0] * 7]).log()[
            labels % 2
        ],
        "certain": 1e3 * torch.eye(10)[labels],
    }[case].clamp(min=-1e6)
    found = metrics_from(metric_sums(logits, labels))
    runs = []
    for name, images in (("whole", slice(None)), ("first", slice(0, 100))):
        save_file(
            {"logits": logits[images].numpy(), "labels": labels[images].numpy()}, tmp_path / name
        )
        runs.append(ece(logits[images].numpy(), labels[images].numpy()))
    assert found["val_ece"] == pytest.approx(runs[0], abs=1e-12)
    assert found["val_accuracy"] == pytest.approx(
        accuracy(logits.numpy(), labels.numpy()), abs=1e-12
    )
    assert _judged_runs([tmp_path / "whole"])[2] == pytest.approx(runs[0], abs=1e-12)
    assert _judged_runs([tmp_path / "whole", tmp_path / "first"])[2] == pytest.approx(
        sum(runs) / 2, abs=1e-12
    )


@pytest.mark.parametrize("k", range(1, BINS + 1))
def test_a_bin_holds_its_upper_end_in_torch_and_numpy_alike(k: int) -> None:
    around = [k / BINS, math.nextafter(k / BINS, 0), min(math.nextafter(k / BINS, 1), 1.0)]
    assert bin_of(np.array(around)).tolist() == [k - 1] * 3
    assert bin_of(torch.tensor(around, dtype=torch.float64)).tolist() == [k - 1] * 3
    assert bin_of(np.array([min(k / BINS + 1e-3, 1.0)])).tolist() == [min(k, BINS - 1)]


def test_validation_is_in_batches_by_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """5 images of 224 at a time would leave a GPU idle; whatever the batch, the answers are the same."""
    large: Any = SimpleNamespace(shape=(3, 224, 224))
    assert images_at_once(large, torch.device("cpu")) == 5
    assert images_at_once(large, torch.device("cuda", 0)) == 334
    config = validated(TrainConfig, {"student": "mlp", "objective": "ce", "data": "digits"})
    data, (_, images) = config.data, config.data.load()
    assert images is not None
    network = config.build_student().double()
    at_once = [guess for guess, _ in predictions(_InDouble(network), images, data)]
    monkeypatch.setitem(evaluate.EVAL_PIXELS, "cpu", 7 * 64)
    in_sevens = [guess for guess, _ in predictions(_InDouble(network), images, data)]
    assert {len(guess) for guess in in_sevens[:-1]} == {7} and len(at_once) < len(in_sevens)
    assert torch.cat(at_once).allclose(torch.cat(in_sevens), atol=1e-6)


class _InDouble(torch.nn.Module):
    """A network that computes in float64, so that the batch's size does not show in its rounding."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(images.double())
        return logits
