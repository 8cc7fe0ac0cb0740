"""Runs of one small network with many settings, trained at once as one batched network.

All runs of a table have the same seed, so the same initial weights and the same images in every
step; only rates, weight decay and the loss differ. So N runs are one network with weights
[N, in, out], which takes far less time than N runs of the loop. Each run is the
loop's, up to rounding: `python benchmarks/curves.py several --check 9` compares some.

Shapes: N = runs, B = images of a batch, K = classes.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tfkd_ray.learn.config import TrainConfig
from tfkd_ray.learn.evaluate import metric_sums, metrics_from, predictions
from tfkd_ray.learn.loop import epoch_order, split_batches

METRICS = ("val_accuracy", "val_nll", "val_ece")


def train_together(
    configs: Sequence[TrainConfig], teachers: dict[str, torch.nn.Module], *, last: bool = False
) -> dict[str, Tensor]:
    """Return each metric after every epoch, [N, epochs]; NaN from where a run is not finite.

    Args:
        configs: of one seed, data set, student (an mlp with one hidden layer), batch size and
            schedule; SGD, without augmentation, dropout and EMA.
        teachers: network by the objective that needs it.
        last: measure after the last epoch only.
    """
    first = configs[0]
    train_set, val_set = first.data.load()
    assert val_set is not None, "a table is of validation metrics"
    everything = torch.arange(len(train_set))
    images = _normalised(first, train_set, everything)
    val_images = _normalised(first, val_set, torch.arange(len(val_set)))
    weights = [p.detach() for p in first.build_student().parameters()]
    assert len(weights) == 4, "one hidden layer"
    layers = [
        (w.t() if w.dim() == 2 else w[None]).repeat(len(configs), 1, 1).requires_grad_()
        for w in weights
    ]
    losses = _Losses(configs, teachers, images)
    rates = _column([c.optim.lr for c in configs])
    decay = _column([c.optim.weight_decay for c in configs])
    momentum = first.optim.momentum
    assert not first.optim.nesterov, "the plain one"
    moments = [torch.zeros_like(w) for w in layers]
    found = {name: torch.full((len(configs), first.epochs), torch.nan) for name in METRICS}
    for epoch in range(first.epochs):
        order = epoch_order(train_set, first.seed, epoch)
        batches = split_batches(order, first.optim.batch_size, 1)
        for step, batch in enumerate(batches):
            factor = first.schedule.factor(epoch + (step + 0.5) / len(batches), first.epochs)
            loss = losses(_forward(layers, images[batch]), batch)
            gradients = torch.autograd.grad(loss.sum(), layers)
            with torch.no_grad():
                for w, g, m in zip(layers, gradients, moments, strict=True):
                    m.mul_(momentum).add_(g + decay * w)
                    w -= rates * factor * m
        if last and epoch + 1 < first.epochs:
            continue
        with torch.no_grad():
            logits = _forward(layers, val_images)
        for n, of_run in enumerate(logits):
            if of_run.isfinite().all():
                told = metrics_from(metric_sums(of_run, val_set.labels))
                for name in METRICS:
                    found[name][n, epoch] = told[name]
    return found


def _normalised(config: TrainConfig, images: Any, which: Tensor) -> Tensor:
    """Return images as a network sees them, [N, features]."""
    mean, std = (torch.tensor(x).view(1, -1, 1, 1) for x in config.data.statistics())
    (pixels,) = images.read([which])
    return ((pixels.float() - mean) / std).flatten(1)


def _forward(layers: Sequence[Tensor], images: Tensor) -> Tensor:
    """Return the logits [N, B, K] of all runs."""
    first, bias, second, other = layers
    hidden = torch.relu(torch.einsum("bi,nio->nbo", images, first) + bias)
    return torch.bmm(hidden, second) + other


class _Losses:
    """The losses of all runs, [N], each the mean over its batch, up to constants.

    In the canonical form, (1 - alpha) CE + alpha T^2 KL with the soft labels of a teacher, a virtual
    teacher or, for lsr, of guessing (T = 1).
    """

    def __init__(
        self, configs: Sequence[TrainConfig], teachers: dict[str, torch.nn.Module], images: Tensor
    ) -> None:
        data, train_set = configs[0].data, configs[0].data.load()[0]
        objectives: list[Any] = [config.objective for config in configs]
        assert all(o.loss_scale == 1 for o in objectives), "the plain losses"
        self._alpha = _column([getattr(o, "alpha", 0.0) for o in objectives])
        self._t = _column([getattr(o, "temperature", 1.0) for o in objectives])
        labels = torch.nn.functional.one_hot(train_set.labels, data.num_classes).float()
        soft = []
        for n, objective in enumerate(objectives):
            if objective.name in teachers:
                soft.append(self._taught(teachers[objective.name], data, train_set, n))
            elif objective.name == "tfkd_reg":
                right = objective.correct_prob
                wrong = (1 - right) / (data.num_classes - 1)
                virtual = (labels * right + (1 - labels) * wrong).log()
                soft.append(torch.softmax(virtual / objective.temperature, dim=1))
            else:
                soft.append(torch.full_like(labels, 1 / data.num_classes))
        self._soft, self._hard = torch.stack(soft), labels

    def _taught(self, network: torch.nn.Module, data: Any, train_set: Any, n: int) -> Tensor:
        """Return the soft labels of a teacher at a run's temperature, rounded as in the bank."""
        logits = torch.cat([guess for guess, _ in predictions(network, train_set, data)])
        centred = (logits - logits.mean(dim=1, keepdim=True)).half().float()
        return torch.softmax(centred / self._t[n, 0, 0], dim=1)

    def __call__(self, logits: Tensor, batch: Tensor) -> Tensor:
        hard = -(self._hard[batch] * logits.log_softmax(dim=2)).sum(dim=2)
        softened = (logits / self._t).log_softmax(dim=2)
        soft = -(self._soft[:, batch] * softened).sum(dim=2)
        alpha, t = self._alpha[..., 0], self._t[..., 0]
        return ((1 - alpha) * hard + alpha * t**2 * soft).mean(dim=1)


def _column(values: Sequence[float]) -> Tensor:
    return torch.tensor(values).view(-1, 1, 1)
