"""Networks that fail in the third epoch, each in its own way, for test_faults.py.

`student: {name: own, path: tests.faulty:network, args: {fault: hang}}`. A network's state counts
the images that it has seen, so a trial resumed from a checkpoint fails in the same epoch again.
"""

import os
import sys
import time
from typing import Any

import torch
from torch import Tensor, nn

import tfkd_ray.learn.loop


class Silent(Exception):
    """An exception that can neither be printed nor pickled."""

    def __str__(self) -> str:
        raise RuntimeError("no text")

    def __reduce__(self) -> Any:
        raise RuntimeError("no pickle")


class Faulty(nn.Linear):
    """Linear layer with a fault after `images` training images."""

    def __init__(self, inputs: int, classes: int, fault: str, images: int) -> None:
        super().__init__(inputs, classes)
        self.fault, self.images = fault, images
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Any) -> Any:
        logits = super().forward(x.flatten(1))
        if self.training:
            assert isinstance(self.seen, Tensor)
            self.seen += len(x)
            if self.seen > self.images:
                logits = logits * self.fail()
                return (
                    logits.masked_fill(torch.eye(logits.shape[1])[0] > 0, -torch.inf)
                    if self.fault == "inf"
                    else logits
                )
        return logits

    def fail(self) -> float:
        """Trigger the fault; return the factor of the following logits."""
        if self.fault == "nan":
            return torch.nan
        if self.fault == "exception":
            raise ValueError("as it was told to")
        if self.fault == "silent":
            raise Silent
        if self.fault == "memory":
            torch.empty(2**50)
        if self.fault == "no memory in Python":
            raise MemoryError
        if self.fault == "exit":
            sys.exit(1)
        if self.fault == "crash":
            os._exit(1)
        if self.fault == "hang":
            time.sleep(10**6)
        if self.fault == "clock":
            time.time = lambda: 0.0
        if self.fault in ("unpicklable", "no metric"):
            whole = tfkd_ray.learn.loop.metrics_from

            def once(sums: Tensor) -> Any:
                tfkd_ray.learn.loop.metrics_from = whole
                return (
                    {**whole(sums), "val_nll": 1.0, "val_ece": lambda: 0}
                    if self.fault == "unpicklable"
                    else {}
                )

            if whole.__name__ != "once":
                tfkd_ray.learn.loop.metrics_from = once
        return 1.0


def network(
    shape: tuple[int, int, int], num_classes: int, fault: str, images: int = 2400
) -> nn.Module:
    """Return a network with a fault; an epoch of digits has 1,151 images."""
    channels, height, width = shape
    return Faulty(channels * height * width, num_classes, fault, images)
