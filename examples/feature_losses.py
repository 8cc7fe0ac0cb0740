"""Two losses on layers of student and teacher: FitNet's hint, and attention transfer.

`feature_losses.yaml` names the layers and searches the weights: `tfkd tune feature_losses.yaml`, in
this directory. A loss asks for layers by its parameters `student_features` and `teacher_features`:
mappings from the layer's name to its output [B, ...].

Shapes: B = batch, K = classes, C = channels of a map, H, W = its height and width.
"""

from collections.abc import Mapping
from typing import Annotated

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

Weight = Annotated[float, Field(ge=0)]
Maps = Mapping[str, Tensor]


class Hint(nn.Module):
    """FitNet's hint beside cross-entropy. (Romero et al. 2015, arXiv:1412.6550, Eq. 3.)

    The soft part is 1/2 |regressor(student's map) - teacher's map|^2 of an image. The regressor, a
    3x3 convolution from the student's channels to the teacher's, learns with the student. The paper
    trains the layers below the hint with it first, and then the whole network with KD; here both
    happen at once.
    """

    def __init__(
        self,
        student_shapes: Mapping[str, tuple[int, ...]],
        teacher_shapes: Mapping[str, tuple[int, ...]],
        weight: Weight = 0.001,
    ) -> None:
        super().__init__()
        (student,), (teacher,) = student_shapes.values(), teacher_shapes.values()
        self.regressor = nn.Conv2d(student[0], teacher[0], 3, padding=1)
        self.kd_weight = weight

    def terms(
        self, logits: Tensor, labels: Tensor, student_features: Maps, teacher_features: Maps
    ) -> tuple[Tensor, Tensor]:
        """Return (CE, the hint), each a mean over the batch."""
        (guided,), (hint,) = student_features.values(), teacher_features.values()
        distance = (self.regressor(guided) - hint).square().flatten(1).sum(dim=1) / 2
        return F.cross_entropy(logits, labels), distance.mean()


def attention(maps: Tensor) -> Tensor:
    """Return the spatial attention of maps [B, C, H, W], rows of length 1: [B, H * W]."""
    return F.normalize(maps.square().sum(dim=1).flatten(1), dim=1)


def attention_transfer(
    logits: Tensor,
    labels: Tensor,
    student_features: Maps,
    teacher_features: Maps,
    beta: Weight = 1000.0,
) -> Tensor:
    """CE, and the distance of attention maps. (Zagoruyko and Komodakis 2017, arXiv:1612.03928.)

    Eq. 2, beta / 2 times the sum over pairs of layers of the squared distance of their attention
    maps, where a map is the sum of squares over channels. As in the authors' code, the distance is
    the mean over pixels, not the sum; the code leaves out the 1/2.
    """
    pairs = zip(student_features.values(), teacher_features.values(), strict=True)
    losses = [(attention(mine) - attention(theirs)).square().mean() for mine, theirs in pairs]
    return F.cross_entropy(logits, labels) + beta / 2 * sum(losses)
