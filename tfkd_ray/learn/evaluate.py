"""Metrics of a classifier on validation.

Top-1, top-5, NLL and calibration error come from sums that add up over batches and workers.
Optional ones (`scores.SCORES`) need the logits of all images at once.

Shapes: B = batch, N = images, K = classes, M = `BINS` confidence bins.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from tfkd_ray.learn.dataset import Dataset
from tfkd_ray.learn.images import Images
from tfkd_ray.settings.yaml import Numbers
from tfkd_ray.verdict.calibration import BINS, bin_of, calibration_error
from tfkd_ray.verdict.scores import Score, score_of

EVAL_PIXELS = {"cpu": 2**18, "cuda": 2**24}
"""Pixels per evaluation batch: 256 images of 32x32, or 5 of 224x224, and 64 times as many on a GPU."""


@contextlib.contextmanager
def tf32(device: torch.device, on: bool) -> Iterator[None]:
    """Allow or forbid TF32 (10 bits) in CUDA's float32 within this context; nothing on the CPU.

    torch's default is TF32 in convolutions only. Where a process has used this API of torch, the
    older one raises errors, so it is not even read.
    """
    if device.type != "cuda":
        yield
        return
    backends: Any = torch.backends  # torch declares some of these as modules
    parts = backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn
    before = [part.fp32_precision for part in parts]
    try:
        for part in parts:
            part.fp32_precision = "tf32" if on else "ieee"
        yield
    finally:
        for part, precision in zip(parts, before, strict=True):
            part.fp32_precision = precision


def images_at_once(data: Dataset, device: torch.device) -> int:
    """Return the number of images in an evaluation batch on a device."""
    return max(1, EVAL_PIXELS[device.type] // math.prod(data.shape[1:]))


def predictions(
    network: nn.Module,
    images: Images,
    data: Dataset,
    *,
    rank: int = 0,
    workers: int = 1,
    bf16: bool = False,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (logits [B, K], labels [B]) of a worker's share of the images, on the labels' device.

    Logits are float32; with `bf16` the network computes in bfloat16.
    """
    device = images.labels.device
    mean, std = (torch.tensor(x, device=device).view(1, -1, 1, 1) for x in data.statistics())
    batch = images_at_once(data, device)
    shares, read = (
        list(torch.arange(len(images), device=where)[rank::workers].split(batch))
        for where in (device, images.read_from)
    )
    network.eval()
    for mine, pixels in zip(shares, images.read(read), strict=True):
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            logits = network((pixels.to(device).float() - mean) / std)
        yield logits.float(), images.labels[mine]


def evaluate(network: nn.Module, data: Dataset, images: Images) -> Numbers:
    """Return the metrics of a network on a set of images; see `metrics_from`."""
    sums = [metric_sums(*batch) for batch in predictions(network, images, data)]
    return metrics_from(sum(sums[1:], start=sums[0]))


def metric_sums(logits: Tensor, labels: Tensor, teacher: Tensor | None = None) -> Tensor:
    """Return the sums of a batch for the metrics, float64 [4 + 3 * M].

    From logits [B, K] and labels [B] come count, top-1 correct, top-5 correct and NLL, then the
    counts, confidences and correct images of the bins. With the teacher's logits [B, K] come two
    more: images with the same top-1 class, and KL(teacher || student) in nats.
    """
    log_p = torch.log_softmax(logits.double(), dim=1)
    top = log_p.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
    best, guess = log_p.max(dim=1)  # first class on ties, which topk does not promise
    confidence, first = best.exp(), (guess == labels).double()
    bins = bin_of(confidence).long().clamp(min=0)  # NaN goes to the first bin
    table = torch.zeros(3, BINS, dtype=torch.float64, device=logits.device)
    table.index_add_(1, bins, torch.stack([torch.ones_like(first), confidence, first]))
    nll = -log_p.gather(1, labels[:, None]).sum()
    count = nll.new_full((), len(labels))
    heads = torch.stack([count, first.sum(), top.any(dim=1).double().sum(), nll])
    sums = torch.cat([heads, table.flatten()])
    if teacher is None:
        return sums
    log_q = torch.log_softmax(teacher.double(), dim=1)
    same = (logits.argmax(dim=1) == teacher.argmax(dim=1)).double().sum()
    return torch.cat(
        [sums, torch.stack([same, F.kl_div(log_p, log_q, reduction="sum", log_target=True)])]
    )


def metrics_from(sums: Tensor) -> Numbers:
    """Return the metrics of all images from the sum of their `metric_sums`.

    `val_accuracy` and `val_top5` are fractions; `val_nll` is in nats per image; `val_ece` is the
    mean gap between confidence and accuracy over the bins, weighted by their counts, a fraction.
    With a teacher: `val_agreement`, the fraction of images with the same top-1 class, and
    `val_teacher_kl`, in nats per image.
    """
    count, first, fifth, nll, *rest = sums.tolist()
    confidence, correct, of_teacher = (
        rest[BINS : 2 * BINS],
        rest[2 * BINS : 3 * BINS],
        rest[3 * BINS :],
    )
    beside = dict(
        zip(("val_agreement", "val_teacher_kl"), (v / count for v in of_teacher), strict=False)
    )
    return {
        "val_accuracy": first / count,
        "val_top5": fifth / count,
        "val_nll": nll / count,
        "val_ece": calibration_error(count, confidence, correct),
        **beside,
    }


def asked_beside(metrics: Sequence[str]) -> list[Score]:
    """Return the metrics that need the logits of all images; raise ValueError for unknown names."""
    rows = [score_of(name) for name in metrics]
    return [row for row in rows if row.of is not None and not row.usual]


def metrics_at_once(
    rows: Sequence[Score],
    batches: Sequence[Tensor],
    labels: Tensor,
    num_classes: int,
    *,
    rank: int,
    workers: int,
) -> Numbers:
    """Return metrics that are not sums over batches; every worker must call it, and gets the same.

    Args:
        batches: logits [B, K] of this worker's share: images `rank`, `rank + workers`, ... of the
            split.
        labels: of all images of the split, [N].
    """
    shares = labels.new_zeros(workers, -(-len(labels) // workers), num_classes, dtype=torch.float32)
    if batches:
        mine = torch.cat(list(batches))
        shares[rank, : len(mine)] = mine
    if workers > 1:
        dist.all_gather(list(shares.unbind()), shares[rank].clone())
    logits = shares.transpose(0, 1).flatten(0, 1)[: len(labels)].cpu().numpy()
    truth = labels.cpu().numpy()
    return {row.key: row.of(logits, truth) for row in rows if row.of is not None}
