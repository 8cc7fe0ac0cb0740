"""Calibration: the gap between confidence and accuracy, over bins of confidence. No torch.

Validation (torch, batch by batch), the tables of a comparison and TensorBoard's captions all use
this one definition.

Shapes: N = images, K = classes, M = `BINS` confidence bins.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

BINS = 15
"""Equal-width confidence bins of the calibration error (Guo et al. 2017, arXiv:1706.04599)."""
EDGE = 1e-9
"""Confidences this little above the upper end of a bin belong to it: softmax rounds its last
digits."""


def bin_of(confidence: Any) -> Any:
    """Return the bin of each confidence: bin k holds k/M < confidence <= (k + 1)/M.

    The bins are whole numbers from 0, as floats.

    Args:
        confidence: float64, an array of numpy or a tensor.
    """
    return (-((EDGE - confidence * BINS) // 1) - 1).clip(0, BINS - 1)


def confidence_of(logits: NDArray[Any]) -> NDArray[np.float64]:
    """Return the largest probability of each image, float64 [N], for logits [N, K]."""
    logits = np.asarray(logits, dtype=np.float64)
    return np.asarray(1 / np.exp(logits - logits.max(axis=1, keepdims=True)).sum(axis=1))


def binned(logits: NDArray[Any], labels: NDArray[Any]) -> NDArray[np.float64]:
    """Return each bin's count, confidence and right answers, float64 [3, M].

    Args:
        logits: [N, K].
        labels: [N].
    """
    confidence = confidence_of(logits)
    bins = bin_of(confidence).astype(int)
    weights = (None, confidence, (logits.argmax(axis=1) == labels).astype(float))
    return np.stack([np.bincount(bins, w, BINS) for w in weights])


def calibration_error(count: float, confidence: Iterable[float], right: Iterable[float]) -> float:
    """Return the mean gap of confidence and accuracy, bins weighted by their images: a fraction.

    Args:
        count: images.
        confidence: of each bin, summed over its images: M numbers.
        right: right answers in each bin: M numbers.
    """
    return float(
        sum(abs(sure - hits) for sure, hits in zip(confidence, right, strict=True)) / count
    )
