"""Shared parts of the verbs that train: join Ray, run a Tuner, handle Ctrl-C and disk errors."""

import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tfkd_ray.learn.config import TeacherRun
    from tfkd_ray.run.tune import OnTeacher
    from tfkd_ray.settings.yaml import Tree
    from tfkd_ray.show.waiting import Waiting
from tfkd_ray.cli.on_end import OnEnd
from tfkd_ray.cli.terminal import how_made, leave, resume_command, say_error
from tfkd_ray.settings.errors import FAILED, INTERRUPTED


def join_ray(address: str | None, workers: int) -> None:
    """Connect to Ray without its log output."""
    if "ray" in sys.modules and sys.modules["ray"].is_initialized():
        return
    what = "starting Ray"
    if address or os.environ.get("RAY_ADDRESS"):
        what = "joining the Ray cluster"
    import logging

    with waiting() as line:
        line.show(what)
        if not line.is_seen:
            say_error(what)
        from tfkd_ray.run.connect import ctrl_c_waits

        _connect(address, workers, ctrl_c_waits())
    for noisy in ("ray", "ray.tune", "ray.train"):  # our table reports it
        logging.getLogger(noisy).setLevel(logging.CRITICAL)


def _connect(address: str | None, workers: int, interrupts: AbstractContextManager[None]) -> None:
    with interrupts:
        import tfkd_ray.run.tune  # noqa: F401  # everything that a sweep imports: takes seconds
        from tfkd_ray.run.connect import connect

        connect(address, workers=workers)


@contextmanager
def waiting() -> Iterator["Waiting"]:
    """Return a line that shows on a terminal, inside the block, that something takes its time."""
    from rich.console import Console

    from tfkd_ray.show.waiting import Waiting

    shown = Waiting(Console(file=sys.stderr))
    try:
        yield shown
    finally:
        shown.stop()


def teacher_line(run: "TeacherRun", about: "Tree | None") -> None:
    if about is not None:
        accuracy = about["metrics"].get("val_accuracy")
        judged = "" if accuracy is None else f", val_accuracy {accuracy:.4f}"
        say_error(f"teacher: {about['name']}{judged}, kept for later")
    else:
        say_error(f"teacher: {how_made(run)}")


def teacher_lines(runs: Iterable["TeacherRun"], storage: Path) -> "OnTeacher":
    """Return a `teacher_line` for many teachers; those that differ by seed alone are one line."""
    from tfkd_ray.learn.teachers import is_trained

    def but_for_seed(run: "TeacherRun") -> str:
        return run.model_copy(update={"seed": 0}).fingerprint()

    missing = {run.fingerprint(): but_for_seed(run) for run in runs if not is_trained(run, storage)}
    counts = Counter(missing.values())

    def say(run: "TeacherRun", about: "Tree | None") -> None:
        if about is not None:
            teacher_line(run, about)
        elif number := counts.pop(but_for_seed(run), 0):
            say_error(f"teacher: {how_made(run)}" + (f" ({number} seeds)" if number > 1 else ""))

    return say


def progress_view(experiment: Path) -> Any:
    from tfkd_ray.show.live import Progress

    return Progress(experiment)


def fit_tuner(
    progress: Any, build: Callable[[Any], Any], experiment: Path, end: OnEnd | None = None
) -> bool | None:
    """Build a Tuner and run it; return whether it ran to its end.

    None if something prevented it, after an error message.
    """
    with head_needed(experiment, progress, end):
        return _fit_tuner(progress, build, experiment)


@contextmanager
def head_needed(
    experiment: Path | None = None, progress: Any = None, end: OnEnd | None = None
) -> Iterator[None]:
    """End this command with a sentence if the head of its Ray cluster dies in this block."""
    from tfkd_ray.run.connect import head_watched

    def gone(what: str) -> None:
        if progress is not None:
            progress.stop()
        again = "run the same command again; trained teachers are kept"
        heads = ("experiment.yaml", "confirm.yaml")
        if experiment is not None and any((experiment / name).is_file() for name in heads):
            again = f"resume with:\n  {resume_command(experiment)}"
        say_error(f"stopped: {what}; once a cluster runs again, {again}")
        if end is not None:
            end.run()
        os._exit(FAILED)  # threads that wait for Ray would wait until Ray kills this process

    with head_watched(gone):
        yield


def _fit_tuner(progress: Any, build: Callable[[Any], Any], experiment: Path) -> bool | None:
    from tfkd_ray.run.tune import TeacherFailed, disk_trouble, no_node_left

    try:
        tuner = build(progress)
    except TeacherFailed as error:
        progress.stop()
        say_error(f"tfkd: {error}")
        return None
    except BaseException:
        progress.stop()
        raise

    def heard(args: threading.ExceptHookArgs) -> None:
        """Skip disk errors of writer threads: the main thread raises them again."""
        if disk_trouble(args.exc_value) is None:
            threading.__excepthook__(args)

    threading.excepthook = heard
    try:
        with _ctrl_c(progress) as interrupted:
            tuner.fit()
    except Exception as error:
        trouble = disk_trouble(error) or no_node_left(error)
        if trouble is None:
            raise
        progress.stop()
        say_error(
            f"stopped: {trouble}; once that is fixed, resume with:\n  {resume_command(experiment)}"
        )
        return None
    finally:
        threading.excepthook = threading.__excepthook__
        progress.stop()
    return not interrupted and not progress.stopped_by


@contextmanager
def _ctrl_c(progress: Any) -> Iterator[list[bool]]:
    """Handle Ctrl-C and SIGTERM: the first ends Tune and trials save, the second exits at once.

    Yields a list that is not empty once interrupted.
    """
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # our handler passes it on
    interrupted: list[bool] = []
    told: list[threading.Thread] = []

    def say_last() -> None:
        progress.stop()
        say_error("stopped at once; tfkd resume repeats what was not saved")

    def handler(number: int, frame: Any) -> None:
        if interrupted or not callable(signal.getsignal(signal.SIGUSR1)):
            _beside(say_last).join(1)
            leave()
        interrupted.append(True)
        words = "stopping: trials save their state (Ctrl-C again: at once)"
        told.append(_beside(progress.note, words))
        signal.raise_signal(signal.SIGUSR1)  # Tune's signal to end

    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interrupted
    finally:
        for number, old in before.items():
            signal.signal(number, old)
        for thread in told:
            thread.join(1)


def _beside(say: Callable[..., None], *words: str) -> threading.Thread:
    """Say something from a signal's handler: in a thread, which waits for a line being written.

    In the main thread, Python refuses to write while the same thread is writing.
    """
    thread = threading.Thread(target=say, args=words, daemon=True)
    thread.start()
    return thread


def told_of_interrupt(experiment: Path, how: str | None = None) -> int:
    say_error(f"{how or 'interrupted'}; resume with:\n  {resume_command(experiment)}")
    return INTERRUPTED
