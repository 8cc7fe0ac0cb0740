"""Three losses of one's own: without a teacher, with one, and a class that tells its two parts.

`own_loss.yaml` searches their arguments: `tfkd tune own_loss.yaml`, in this directory.

Shapes: B = batch, K = classes. Every loss is a mean over the batch.
"""

from typing import Annotated

from pydantic import Field
from torch import Tensor
from torch.nn import functional as F


def focal(logits: Tensor, labels: Tensor, gamma: Annotated[float, Field(ge=0)] = 2.0) -> Tensor:
    """Focal loss: right and certain images count less. (Lin et al. 2017, arXiv:1708.02002.)"""
    log_p = F.log_softmax(logits, dim=1).gather(1, labels[:, None])[:, 0]
    return -((1 - log_p.exp()) ** gamma * log_p).mean()


def logit_matching(
    logits: Tensor, labels: Tensor, teacher: Tensor, weight: Annotated[float, Field(ge=0)] = 0.1
) -> Tensor:
    """CE, and the squared distance from the teacher's logits. (Ba and Caruana 2014.)"""
    return F.cross_entropy(logits, labels) + weight * (logits - teacher).square().mean()


class ReverseKD:
    """KD with the KL divergence the other way round: KL(student_T || teacher_T).

    As `terms` gives cross-entropy apart, `tfkd confirm` has the control `ce-scaled` for it.
    """

    def __init__(self, alpha: float = 0.9, temperature: float = 4.0) -> None:
        self.temperature = temperature
        self.ce_weight = 1 - alpha
        self.kd_weight = alpha * temperature**2

    def terms(self, logits: Tensor, labels: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Return (CE, the soft part without T^2)."""
        log_p = F.log_softmax(logits / self.temperature, dim=1)
        log_q = F.log_softmax(teacher / self.temperature, dim=1)
        soft = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
        return F.cross_entropy(logits, labels), soft
