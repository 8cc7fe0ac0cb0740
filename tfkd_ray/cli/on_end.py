"""The command that `--on-end` runs once, after a sweep or a comparison has ended."""

import os
import subprocess
from pathlib import Path
from types import TracebackType

from tfkd_ray.cli.terminal import say_error, short_path
from tfkd_ray.settings.errors import INTERRUPTED, NOT_BETTER, OK, ConfigError

FINISHED, STOPPED, BROKEN = "finished", "stopped", "failed"
"""How a sweep or a comparison ended: complete; stopped, to be resumed; failed."""


class OnEnd:
    """Runs a shell command when its `with` block ends, once; wrong input ends nothing.

    The command gets TFKD_EXPERIMENT (the directory or URL) and TFKD_STATUS (`finished`, `stopped`,
    `failed`). What it prints goes to standard error. If it fails, that is a warning.
    """

    def __init__(self, command: str | None, experiment: Path) -> None:
        self._command, self._experiment = command, experiment
        self.status = BROKEN
        self.begun = False
        """True once something has run: until then, wrong input is no end."""

    def of_code(self, code: int) -> int:
        """Note how it ended, by its exit code; return the code."""
        self.status = {OK: FINISHED, NOT_BETTER: FINISHED, INTERRUPTED: STOPPED}.get(code, BROKEN)
        return code

    def run(self) -> None:
        """Run the command, if it has not run yet."""
        command, self._command = self._command, None
        if command is None:
            return
        place = short_path(self._experiment)
        told = place if "://" in place else str(self._experiment.absolute())
        env = {**os.environ, "TFKD_EXPERIMENT": told, "TFKD_STATUS": self.status}
        try:
            ended = subprocess.run(
                ["sh", "-c", command], env=env, stdin=subprocess.DEVNULL, stdout=2, check=False
            )
        except OSError as error:
            say_error(f"warning: the command of --on-end could not be started: {error.strerror}")
        except KeyboardInterrupt:
            say_error("warning: the command of --on-end was interrupted")
        else:
            if ended.returncode:
                code = f"exit code {ended.returncode}"
                say_error(
                    f"warning: the command of --on-end ended with {code}; {self._name} is complete"
                )

    @property
    def _name(self) -> str:
        return self._experiment.name

    def __enter__(self) -> "OnEnd":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if isinstance(error, ConfigError) and not self.begun:
            return
        if error is not None:
            self.status = STOPPED if isinstance(error, KeyboardInterrupt) else BROKEN
        self.run()
