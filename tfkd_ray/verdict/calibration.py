"""Calibration: how far confidence is from accuracy, over bins of confidence. The one place that says how. No torch.

Validation (torch, batch by batch), the tables of a comparison and TensorBoard's captions all count with it.

Shapes: N = images, K = classes, M = `BINS` confidence bins.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

BINS = 15
"""Equal-width confidence bins of the calibration error (Guo et al. 2017, arXiv:1706.04599)."""
EDGE = 1e-9
"""A confidence this little above the upper end of a bin belongs to it: softmax rounds in its last digits."""


def bin_of(confidence: Any) -> Any:
    """The bin of each confidence, whole numbers from 0 as floats: bin k holds k/M < confidence <= (k + 1)/M.

    Args:
        confidence: float64, an array of numpy or a tensor.
    """
    return (-((EDGE - confidence * BINS) // 1) - 1).clip(0, BINS - 1)


def confidence_of(logits: NDArray[Any]) -> NDArray[np.float64]:
    """The largest probability of each image, float64 [N]; logits [N, K]."""
    logits = np.asarray(logits, dtype=np.float64)
    return np.asarray(1 / np.exp(logits - logits.max(axis=1, keepdims=True)).sum(axis=1))


def binned(logits: NDArray[Any], labels: NDArray[Any]) -> NDArray[np.float64]:
    """Of each bin its count, confidence and right answers, float64 [3, M]; logits [N, K], labels [N]."""
    confidence = confidence_of(logits)
    bins = bin_of(confidence).astype(int)
    weights = (None, confidence, (logits.argmax(axis=1) == labels).astype(float))
    return np.stack([np.bincount(bins, w, BINS) for w in weights])


def calibration_error(count: float, confidence: Iterable[float], right: Iterable[float]) -> float:
    """The mean gap between confidence and accuracy over the bins, weighted by their images: a fraction.

    Args:
        count: images.
        confidence: of each bin, summed over its images: M numbers.
        right: right answers in each bin: M numbers.
    """
    return float(
        sum(abs(sure - hits) for sure, hits in zip(confidence, right, strict=True)) / count
    )
