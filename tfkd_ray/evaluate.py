"""Metrics of a classifier: top-1, top-5, NLL and calibration error, from sums that add over batches and workers.

Shapes: B = batch, K = classes, M = `BINS` confidence bins.
"""

import torch
from torch import Tensor

BINS = 15
"""Equal-width confidence bins of the calibration error (Guo et al. 2017, arXiv:1706.04599)."""


def metric_sums(logits: Tensor, labels: Tensor) -> Tensor:
    """What a batch adds to the metrics: float64 [4 + 3 * M], logits [B, K], labels [B].

    Count, correct in the first 1, correct in the first 5, NLL; then of each bin its count, confidence and correct ones.
    """
    log_p = torch.log_softmax(logits.double(), dim=1)
    top = log_p.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
    confidence = log_p.max(dim=1).values.exp()
    bins = (confidence * BINS).ceil().long().sub(1).clamp(0, BINS - 1)
    first = top[:, 0].double()
    table = torch.zeros(3, BINS, dtype=torch.float64, device=logits.device)
    table.index_add_(1, bins, torch.stack([torch.ones_like(first), confidence, first]))
    nll = -log_p.gather(1, labels[:, None]).sum()
    heads = torch.stack([nll.new_tensor(float(len(labels))), first.sum(), top.any(dim=1).double().sum(), nll])
    return torch.cat([heads, table.flatten()])


def metrics_from(sums: Tensor) -> dict[str, float]:
    """Metrics of all images whose `metric_sums` were added up.

    `val_accuracy` and `val_top5` (the first 5 guesses) are fractions; `val_nll` is in nats an image; `val_ece` is the
    mean gap between confidence and accuracy over the bins, weighted by their counts, a fraction.
    """
    count, first, fifth, nll, *rest = sums.tolist()
    confidence, correct = rest[BINS : 2 * BINS], rest[2 * BINS :]
    gap = sum(abs(conf - hits) for conf, hits in zip(confidence, correct, strict=True))
    return {
        "val_accuracy": first / count,
        "val_top5": fifth / count,
        "val_nll": nll / count,
        "val_ece": gap / count,
    }
