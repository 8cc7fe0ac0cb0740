"""Messages, names and paths as the terminal shows them, and ending on Ctrl-C."""

import contextlib
import itertools
import os
import shlex
import signal
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from tfkd_ray.learn.config import TeacherRun, TrainConfig
    from tfkd_ray.space.space import Space
    from tfkd_ray.store.storage import Storage
from tfkd_ray.settings.columns import to_stderr
from tfkd_ray.settings.errors import INTERRUPTED, ConfigError
from tfkd_ray.settings.passwords import shown_override

BUDGET_OPTIONS = (
    ("--time-budget", "time_budget_s", "SECONDS", "seconds"),
    ("--gpu-hours", "gpu_hours", "HOURS", "GPU-hours of its trials"),
    ("--cpu-hours", "cpu_hours", "HOURS", "CPU-hours of its trials"),
    ("--max-failures", "max_failed_trials", "N", "failed trials"),
)
BUDGETS = tuple(name for _, name, _, _ in BUDGET_OPTIONS)
"""Names of the budgets in `search`; each option sets one."""
DEFAULT_STORAGE = Path("tfkd_results")
DEFAULT_TOP_K = 3
DEFAULT_SEEDS = (None, 5)
"""No first look, and 5 seeds of each arm."""
DEFAULT_BASELINES = "ce,lsr,scaled,published"


def let_end() -> None:
    """Exit at once on the next Ctrl-C or SIGTERM, as the first one is still being handled.

    Ray takes a moment to end its processes.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: leave())


def leave() -> NoReturn:
    """Exit at once and kill all processes that we have started, such as those of our own Ray."""
    if end := getattr(
        sys.modules.get("tfkd_ray.run.connect"), "end_children", None
    ):  # do not import in the middle of another import
        end()
    if sys.stderr.isatty():
        os.write(2, b"\x1b[?25h")  # a live view hides the cursor
    os._exit(INTERRUPTED)


def say_error(text: str) -> None:
    from tfkd_ray.settings.files import legible

    try:
        to_stderr(legible(_as_given(text)))
    except OSError:  # nobody can read it, as on a full disk: the exit code still tells
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


def _as_given(text: str) -> str:
    """Return the text with URLs in place of their mirrors.

    It imports nothing, as error messages pass through it.
    """
    storage = sys.modules.get("tfkd_ray.store.storage")
    return storage.as_given(text) if storage is not None else text


def place_or_url(text: str) -> "Path | str":
    """Return a directory as a Path, or a URL unchanged."""
    return text if "://" in text else Path(text)


NEWEST = "@last"
"""Word for the newest experiment in the default storage."""


def experiment_place(text: str) -> "Path | str":
    """Return the place of an experiment: a directory or a URL, a name in ./tfkd_results, or @last.

    A directory that is no experiment, such as a folder of images, does not hide one of its name.
    """
    if text == NEWEST and not os.path.lexists(text):
        return newest_experiment()
    if not text or "://" in text or ".." in Path(text).parts:
        return place_or_url(text)
    here, named = Path(text), DEFAULT_STORAGE / text
    if os.path.lexists(here) and (_is_experiment(here) or not _is_experiment(named)):
        return here
    return named if os.path.lexists(named) else here


def _is_experiment(place: Path) -> bool:
    return any(os.path.lexists(place / file) for file in ("experiment.yaml", "confirm.yaml"))


def sweep_or_arms(text: str) -> str:
    """Return what `tfkd confirm` names: a path, a URL, a shipped arms file, or an experiment's name."""
    from tfkd_ray.settings.yaml import find_file

    if "://" in text or find_file(text, "search_spaces").is_file():
        return text
    return str(experiment_place(text))


def newest_experiment() -> Path:
    """Return the experiment in ./tfkd_results that was begun last."""
    begun = _begun_here()
    if not begun:
        raise ConfigError(
            f"no experiment is named, and ./{DEFAULT_STORAGE} has none{_teacher_in_training(DEFAULT_STORAGE)}; name "
            "its directory or URL"
        )
    return max(begun, key=lambda folder: begun[folder])


def _begun_here() -> dict[Path, float]:
    """Return when each experiment in ./tfkd_results was begun."""
    return {
        file.parent: file.stat().st_mtime
        for name in ("experiment.yaml", "confirm.yaml")
        for file in DEFAULT_STORAGE.glob(f"*/{name}")
    }


def check_names(args: Namespace) -> None:
    """Raise a ConfigError for what a verb names and is not there: files, experiments, settings.

    It is quick, as it imports none of the classes of settings; what it does not see, they tell.
    """
    elsewhere = getattr(args, "cluster", None) or "://" in (getattr(args, "address", None) or "")
    if args.verb == "cluster":
        _check_cluster_file(args.file)
    elif args.verb == "confirm":
        if not elsewhere:
            _check_sweep_or_arms(args.file)
    elif hasattr(args, "overrides"):
        if args.verb == "tune" and not elsewhere:
            _check_unused_name(args)
        _check_settings(args.file, args.overrides)
    if elsewhere:
        return
    given = [getattr(args, name, None) for name in ("experiment", "source")]
    several = [getattr(args, name, []) for name in ("experiments", "others", "prior")]
    for place in [*given, *itertools.chain(*several)]:
        if isinstance(place, Path):
            _check_experiment(place)


def _check_unused_name(args: Namespace) -> None:
    """Raise a ConfigError for a name that an experiment here has."""
    from tfkd_ray.store.experiment import check_name, check_new

    name, storage = getattr(args, "name", None), getattr(args, "storage", None)
    if name is None or not isinstance(storage, Path):
        return
    check_name(name)
    if storage.is_dir():
        check_new(storage.absolute() / name)


def _check_cluster_file(file: str) -> None:
    from tfkd_ray.settings.yaml import find_file, is_missing, missing_file

    found = [find_file(file, "clusters", suffix=suffix) for suffix in (".yaml", ".sh")]
    if all(map(is_missing, found)):
        raise missing_file(found[0], "clusters")


def _check_sweep_or_arms(file: str) -> None:
    from tfkd_ray.settings.yaml import find_file, is_missing, missing_file

    if "://" not in file and is_missing(found := find_file(file, "search_spaces")):
        training = _teacher_in_training(DEFAULT_STORAGE)
        raise missing_file(found, "search_spaces", _experiments_here(), training)


def _check_settings(file: str, overrides: Sequence[str]) -> None:
    from tfkd_ray.settings.meant import wrong_names, wrong_words
    from tfkd_ray.settings.yaml import existing_space, read_yaml

    path = existing_space(file)
    if not path.is_file():
        return
    tree = read_yaml(path)
    words = [shown_override(text) for text in overrides]
    if problems := list(wrong_words(tree, words)):
        raise ConfigError(problems, "command line")
    if "arms" not in tree and (problems := list(wrong_names(tree))):
        raise ConfigError(problems, path)


def _check_experiment(place: Path) -> None:
    from tfkd_ray.settings.errors import near_to
    from tfkd_ray.settings.yaml import is_missing

    if is_missing(place):
        here = _experiments_here()
        near = near_to(place.name, here)
        meant = "." if near is None else f"; did you mean {near!r}?"
        listed = " `tfkd ls` lists experiments" if here else ""
        why = f"no such directory (searched from {Path.cwd()}){_teacher_in_training(place.parent)}"
        raise ConfigError(f"{why}{meant}{listed}".rstrip("."), place)


TOLD_S = 3600
"""Age of a teacher's last epoch up to which it is assumed to be in training."""


def _teacher_in_training(storage: Path) -> str:
    """Return a part of a sentence about the teacher that trains there; sweeps begin after theirs."""
    from tfkd_ray.show.status import duration
    from tfkd_ray.store.experiment import parse_json, read_text

    told: dict[Path, float] = {}
    for folder in (storage, DEFAULT_STORAGE):
        # `learn.teachers.PROGRESS`, whose module imports torch
        for path in folder.glob("teachers/*/progress.json"):
            with contextlib.suppress(OSError):  # its training has just ended
                told[path] = path.stat().st_mtime
    if not told:
        return ""
    path = max(told, key=lambda path: told[path])
    age_s = time.time() - told[path]
    try:
        epoch = int(parse_json(read_text(path))["epoch"])
    except (ConfigError, OSError, ValueError, TypeError, KeyError):
        return ""
    if age_s > TOLD_S:
        return ""
    return (
        f"; teacher {path.parent.name} is being trained (epoch {epoch} ended {duration(age_s)} ago); a sweep's "
        "directory is created after its teachers are trained"
    )


def _experiments_here() -> list[str]:
    """Return the names of the experiments in ./tfkd_results."""
    return sorted(folder.name for folder in _begun_here())


def load_file(args: Namespace) -> "Space":
    """Return the space of a verb's file and overrides; errors name options as they were given."""
    from tfkd_ray.space.space import load_space

    try:
        return load_space(args.file, args.overrides)
    except ConfigError as error:
        problems = error.problems
        for text, option in getattr(args, "spelled", {}).items():
            problems = [p.replace(repr(text), repr(option)) for p in problems]
        raise ConfigError(problems, error.source) from None


def have_data(config: "TrainConfig", args: Namespace) -> None:
    """Raise a ConfigError if the data are missing; with --download, download them first."""

    if args.download:
        try:
            config.data.check()
        except ConfigError:
            say_error(f"downloading {config.data.name}")
            config.data.download()
    config.data.check()


def new_name(args: Namespace, storage: "Storage", stem: str) -> str:
    """Return the name of a new experiment: `--name`, or the stem and the time."""
    from tfkd_ray.store.experiment import check_name

    name: str = args.name if args.name is not None else f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    check_name(name)
    storage.check_new(name)
    return name


def how_made(run: "TeacherRun") -> str:
    """Return a phrase on how a teacher is made."""
    if run.weights is not None:
        return f"loading {run.student.name} from {run.weights}"
    stop = f", stopped after {run.stop_epoch}" if run.stop_epoch else ""
    stop += f", stopped at val_accuracy {run.stop_accuracy:g}" if run.stop_accuracy else ""
    return f"training {run.student.name} with {run.objective.name} for {run.epochs} epochs{stop}"


def shell_word(path: Path) -> str:
    """Return a path as one quoted word of a shell command in this directory."""
    return shlex.quote(short_path(path))


def resume_command(experiment: Path) -> str:
    """Return the command that resumes an experiment, on the Ray cluster on which it was begun."""
    from tfkd_ray.settings.yaml import read_yaml

    begun: list[str] = []
    for name in ("experiment.yaml", "confirm.yaml"):
        with contextlib.suppress(ConfigError, OSError, TypeError):
            begun = [str(word) for word in read_yaml(experiment / name).get("command", [])]
    words = ["tfkd resume", shell_word(experiment)]
    for word, value in itertools.pairwise([*begun, ""]):
        option, equals, given = word.partition("=")
        if option == "--address":
            words += ["--address", shlex.quote(given if equals else value)]
    return " ".join(words)


def short_path(path: Path) -> str:
    """Return a path as short as it can be named from here."""
    if (url := _as_given(str(path))) != str(path):
        return url
    with contextlib.suppress(ValueError):
        return str(path.relative_to(Path.cwd()))
    return str(path)


def same_run(config: "TrainConfig", out: Path) -> "TrainConfig":
    """Return the run with the digest of its data.

    Raises a ConfigError if the directory holds another run, or one on other data.
    """
    from tfkd_ray.learn.config import TrainConfig
    from tfkd_ray.settings.schema import validated
    from tfkd_ray.settings.yaml import read_yaml

    path = out / "config.yaml"
    if path.exists():
        there = validated(TrainConfig, read_yaml(path), path)
        config = config.with_digests(there.data.digests)
        if there.fingerprint() != config.fingerprint():
            raise ConfigError(
                "has another run (see its config.yaml); choose another directory: --out DIR", out
            )
    return config.pinned()
