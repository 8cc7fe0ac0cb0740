"""How long a device worked, without a wait for it."""

import time

import torch


class Stopwatch:
    """Measures the time from its start to `stop`, as the device sees it.

    A GPU works on while the host goes ahead, so the host's clock would show how long it takes to
    launch the work. Here the GPU notes both times itself (CUDA events). `seconds` reads them, so
    call it where the host has waited for the device anyway.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._times: list[float] = []
        self._events: list[torch.cuda.Event] = []
        self._note()

    def _note(self) -> None:
        if self._on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._events.append(event)
        else:
            self._times.append(time.perf_counter())

    def stop(self) -> None:
        """Note the end of the work."""
        self._note()

    def seconds(self) -> float:
        """Return the time between start and stop; the device must have come to the stop."""
        if self._on_gpu:
            start, end = self._events
            return float(start.elapsed_time(end)) / 1000
        start_s, end_s = self._times
        return end_s - start_s
