"""How long a device worked, without a wait for it."""

import time
from typing import Any

import torch


class Stopwatch:
    """Measures the time from its start to `stop`, as the device sees it.

    A GPU works on while the host goes ahead, so the host's clock would show how long it takes to
    launch the work. Here the GPU notes both times itself (CUDA events). `seconds` reads them, so
    call it where the host has waited for the device anyway.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._times: list[Any] = [self._now()]

    def _now(self) -> Any:
        """Return the host's time in seconds, or an event that the GPU comes to."""
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def stop(self) -> None:
        """Note the end of the work."""
        self._times.append(self._now())

    def seconds(self) -> float:
        """Return the time between start and stop; the device must have come to the stop."""
        start, end = self._times
        if self._on_gpu:
            return float(start.elapsed_time(end)) / 1000
        return float(end - start)
