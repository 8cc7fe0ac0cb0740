"""A line of a terminal that tells what is waited for, and for how long.

In a pipe or a file, lines tell now and then how far a teacher is.
"""

import time
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from tfkd_ray.settings.columns import on_one_line
from tfkd_ray.settings.yaml import Numbers
from tfkd_ray.show.status import duration

FRAMES = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"
"""What turns while nothing else moves."""
A_SECOND = 4
"""Drawings a second."""
LINE_S = 30.0
"""Seconds between two lines about a teacher where there is no terminal."""


class Waiting:
    """Shows one line, which is gone once it stops; what is printed meanwhile goes above it."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live: Live | None = None
        self._text = ""
        self._since = 0.0
        self._told = 0.0

    @property
    def is_seen(self) -> bool:
        """True if the line is shown: on a terminal that can move its cursor."""
        return self._console.is_terminal and not self._console.is_dumb_terminal

    def show(self, text: str) -> None:
        """Show another text; the time counts on, from the first one."""
        self._since = self._since if self._text else time.monotonic()
        self._text = on_one_line(text)
        if self._live is None and self.is_seen:
            self._live = Live(
                get_renderable=self.line,
                console=self._console,
                transient=True,
                redirect_stdout=False,
                refresh_per_second=A_SECOND,
            )
            self._live.start()

    def line(self) -> Text:
        """Return the line as it is now."""
        waited = time.monotonic() - self._since
        turning = FRAMES[int(waited * A_SECOND) % len(FRAMES)]
        start = "" if self._console.options.ascii_only else f"{turning} "
        return Text(f"{start}{self._text}  {duration(waited)}", no_wrap=True, overflow="ellipsis")

    def on_teacher_epoch(self, run: Any, metrics: Numbers) -> None:
        """Show how far a teacher is.

        Args:
            run: its `TeacherRun`.
            metrics: of its last epoch; empty before the first.
        """
        if not metrics:
            self.show(
                f"teacher {run.student.name}: its process starts and loads torch and the data"
            )
            return
        last = run.stop_epoch or run.epochs
        text = f"teacher {run.student.name}: epoch {metrics.get('epoch', 0):.0f} of {last}"
        if "val_accuracy" in metrics:
            text += f", val_accuracy {metrics['val_accuracy']:.4f}"
        self.show(text)
        if not self.is_seen and time.monotonic() - max(self._since, self._told) >= LINE_S:
            self._told = time.monotonic()
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def stop(self) -> None:
        """Take the line away."""
        if self._live is not None:
            self._live.stop()
            self._live = None
        self._text = ""
