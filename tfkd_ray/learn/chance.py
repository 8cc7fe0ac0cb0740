"""Accuracy of guessing, with which a result is compared.

Shapes: N = images, K = classes.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from tfkd_ray.learn.dataset import Dataset


def guessing(labels: Tensor, num_classes: int) -> tuple[float, float]:
    """Return the accuracy of guessing on labels [N], and the highest that guessing explains.

    It is 1 / K, or the share of the commonest class. To 1 / K belong two standard errors.
    """
    n, K = len(labels), num_classes
    commonest = int(labels.bincount(minlength=K).max()) / n
    return max(1 / K, commonest), max(1 / K + 2 * math.sqrt((1 - 1 / K) / K / n), commonest)


def guessing_on(data: Dataset) -> tuple[int, float, float] | None:
    """Return the number of validation images and `guessing` on them; None without validation.

    It loads the data when it is first asked, and keeps the numbers.
    """
    return _guessing_on(data.model_copy(update={"digest": None, "unlabelled_digest": None}))


@functools.lru_cache(maxsize=8)
def _guessing_on(data: Dataset) -> tuple[int, float, float] | None:
    val_set = data.load()[1]
    if val_set is None:
        return None
    return len(val_set), *guessing(val_set.labels, data.num_classes)


def chance_note(data: Dataset, accuracy: float | None) -> str | None:
    """Return a sentence if an accuracy on validation is no better than guessing, else None."""
    if accuracy is None or (known := guessing_on(data)) is None:
        return None
    n, usual, highest = known
    if accuracy > highest:
        return None
    return (
        f"val_accuracy {accuracy:.4f} is no better than guessing, which classifies {usual:.1%} of the {n} validation "
        "images correctly: nothing was learned. Train for more epochs, with another optim.lr or a smaller "
        "optim.batch_size, or look at the images and their labels"
    )
