"""The 50 largest logits of an image, and what the others share: soft labels for many classes.

A row keeps the `KEPT` largest logits, less the row's maximum, in half precision; their classes; and
the mean and the variance of the other K - 50 logits. At a temperature T, each of the others becomes
T * log E[exp(z / T)] of a normal z with this mean and variance, cut off at the smallest kept logit,
so that together they have about the probability that they had. Which of the others are likelier
than the rest is lost. How much of a KD term that is grows with T; see `share_lost`.

Shapes: N = images, K = classes, W = `COLUMNS`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

KEPT = 50
"""Logits of an image that are kept."""
COLUMNS = 2 * KEPT + 4
"""Numbers of 2 bytes in a row: logits, classes, and mean and variance of 4 bytes each."""
MOST_CLASSES = 2**15
"""Classes whose numbers fit in 2 bytes."""
MOST_LOST = 0.01
"""Share of the KD term that may be lost."""


def packed(logits: Tensor) -> Tensor:
    """Return what is kept of logits [N, K], as int16 [N, W]."""
    import torch

    logits = logits.float()
    logits = logits - logits.amax(dim=1, keepdim=True)
    top, classes = logits.topk(KEPT, dim=1)
    others = logits.scatter(1, classes, 0).sum(dim=1, keepdim=True)
    mean = others / (logits.shape[1] - KEPT)
    spread = (logits - mean).square().scatter(1, classes, 0).sum(dim=1, keepdim=True)
    about = torch.cat([mean, spread / (logits.shape[1] - KEPT)], dim=1)
    parts = top.half().view(torch.int16), classes.short(), about.view(torch.int16)
    return torch.cat(parts, dim=1)


def unpacked(rows: Tensor, num_classes: int, temperature: float) -> Tensor:
    """Return logits, float32 [N, K], of `packed` rows; T sets those that were not kept."""
    import torch

    top, classes, about = rows.split([KEPT, KEPT, 4], dim=1)
    kept = top.contiguous().view(torch.float16).float()
    mean, variance = about.contiguous().view(torch.float32).unbind(1)
    other = _alike(mean, variance, kept[:, -1], temperature)
    logits = other[:, None].repeat(1, num_classes)
    return logits.scatter_(1, classes.long(), kept)


def _alike(mean: Tensor, variance: Tensor, top: Tensor, temperature: float) -> Tensor:
    """Return T * log E[exp(z / T)], [N], of z normal with this mean and variance, below `top`."""
    import torch

    deviation = variance.sqrt().clamp(min=1e-6)
    room, shift = (top - mean) / deviation, deviation / temperature
    cut: Tensor = torch.special.log_ndtr(room - shift) - torch.special.log_ndtr(room)
    return (mean + variance / (2 * temperature) + temperature * cut).minimum(top)


def share_lost(logits: Tensor, temperature: float) -> float:
    """Return the share of the KD term that is lost of a teacher's logits [N, K].

    It is KL(full || kept) / KL(full || uniform), means over images at T: the KD term is that of a
    student which knows nothing yet.
    """
    import torch
    from torch.nn import functional as F

    kept = unpacked(packed(logits), logits.shape[1], temperature)
    full, guess = (F.log_softmax(z.double() / temperature, dim=1) for z in (logits, kept))
    even = torch.zeros_like(full).log_softmax(dim=1)
    lost, whole = (F.kl_div(q, full, reduction="batchmean", log_target=True) for q in (guess, even))
    return float(lost / whole)
