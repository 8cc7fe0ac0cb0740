"""Several teachers: their logits become those of one, here and nowhere else.

Shapes: B = images, K = classes.
"""

import math
from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from tfkd_ray.learn.soft_labels import Bank

Teacher = nn.Module | Bank
"""A network that runs in every step, or the bank of its soft labels."""
Teachers = Teacher | Sequence[Teacher] | None
"""What a run learns from: one teacher, several in the order of `TrainConfig.teacher_runs`, none."""


def each_of(teachers: Teachers) -> list[Teacher]:
    """Return all teachers."""
    if teachers is None:
        return []
    return list(teachers) if isinstance(teachers, list | tuple) else [teachers]  # type: ignore[list-item]


def banks_in(teachers: Teachers) -> list[Bank]:
    """Return the teachers that are banks."""
    return [teacher for teacher in each_of(teachers) if isinstance(teacher, Bank)]


def combined(logits: Sequence[Tensor], shares: Sequence[float], temperature: float) -> Tensor:
    """Return T * log(sum_i share_i * softmax(z_i / T)), [B, K], of the logits z_i of each teacher.

    Softened by the same T, they are the weighted mean of the teachers' softened probabilities.

    Args:
        shares: weights of the teachers; their sum is 1.
        temperature: T.
    """
    weighed = [
        F.log_softmax(z / temperature, dim=1) + math.log(share)
        for z, share in zip(logits, shares, strict=True)
    ]
    total = weighed[0]
    for other in weighed[1:]:
        total = total.logaddexp(other)
    return temperature * total
