"""An experiment's directory: its files, read and written without Ray, torch or unpickling.

    experiment.yaml                the resolved space, versions, git commit, seeds, command line
    study.journal                  Optuna's journal: proposals, values at rungs, ends
    spent.json                     seconds of all drivers, and of all trials, for budgets
    ended.jsonl                    a line for each trial that has ended or paused; see ended.py
    stop/                          what `tfkd stop` asks of the driver: a file a trial, or `sweep`
    trials/t0007-tfkd_reg/         one folder a trial
        trial.json                 number, objective, searched parameters, configuration, status, reason
                                   (trials/t0007-tfkd_reg-seed1/: a run of trial 7 with a further seed)
        metrics.jsonl              one line an epoch
        student.safetensors        weights after the last epoch (full-length trials)
        last.ckpt, before.ckpt     run state to resume from, and the one before; removed at the end
    tb/t0007-tfkd_reg/             TensorBoard events
    trials/*.pkl, *.json           Ray Tune's own files; nothing here reads them

`teachers/` lies beside the experiments, which share them.
"""

import contextlib
import decimal
import errno
import importlib.metadata
import json
import math
import numbers
import os
import platform
import re
import select
import shlex
import statistics
import subprocess
import time
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

from tfkd_ray import __version__
from tfkd_ray.settings import own_code
from tfkd_ray.settings.errors import ConfigError, some_of
from tfkd_ray.settings.files import (
    DISK_ERRORS,
    PART,
    check_writable,
    descriptor_of,
    kind_of,
    legible,
    opened,
    read_at_most,
    write_text,
)
from tfkd_ray.settings.yaml import Numbers, Tree, Values, dump_yaml, read_yaml
from tfkd_ray.verdict import scores
from tfkd_ray.verdict.limits import NO_LIMITS, Limits, as_limits, feasible_first, is_feasible

STATUSES = ("running", "done", "stopped", "failed", "interrupted", "paused")
MOST_JSON_BYTES = 2**26
"""Most bytes of a JSON file, far more than any of ours has."""
LONGEST_LINE = 2**24
"""Most bytes of a line of Optuna's journal, which has a few hundred."""
MOST_EPOCHS = 10**7
BASELINES = ("ce", "lsr")
"""Objectives that every sweep has beside what it searches, to compare with."""
VERSION = 1
"""Version of this layout. Increase it when a reader must know the difference."""


FULL_LENGTH = "full_length"
"""Key of a trial's last result: the user's own `RunConfig.stop` ended the trial, so it counts as of
full length."""


STOPPED_BY = "stopped_by"
"""Key of a trial's last result: why it was stopped, if not by early stopping."""
STOPS, WHOLE_SWEEP = "stop", "sweep"
"""Folder of an experiment with what `tfkd stop` asks of its driver; the request to stop everything.
Each other file there is called as the trial to stop."""


def as_number(value: Any) -> float | None:
    """Return a number, or an array of just one, as a float; None for anything else."""
    if hasattr(value, "ndim"):
        try:
            read = getattr(value, "item", None) or value.__float__  # TensorFlow's have no `item`
            # of a masked array; a table's `mask` is a method
            hidden = bool(getattr(getattr(value, "mask", None), "all", bool)())
            value = read() if math.prod(value.shape) == 1 and not hidden else None
        except Exception:  # of any library: on no device, of unknown shape, a table
            return None
    try:
        return float(value) if isinstance(value, numbers.Real | decimal.Decimal) else None
    except (OverflowError, ValueError):  # a whole number too large, Decimal's signalling NaN
        return None


def trials_folder(experiment: Path) -> Path:
    """Return the folder of the trials' folders, which is Ray Tune's experiment directory."""
    return experiment / "trials"


def stop_requests(experiment: Path) -> set[str]:
    """Return what is asked of an experiment's driver: names of trials, or `WHOLE_SWEEP`."""
    folder = experiment / STOPS
    if folder.is_symlink():
        return set()
    try:
        with os.scandir(folder) as entries:
            found = {entry.name for entry in entries if entry.is_file(follow_symlinks=False)}
    except OSError:  # nothing was asked
        return set()
    return {name for name in found if not name.endswith(PART)}


def study_and_space(study: str | None) -> tuple[str, int]:
    """Return the name with which a sweep's studies began, and the number of their space.

    A sweep that goes on in another space, its second, has studies called NAME@2.
    """
    parts = re.fullmatch(r"(.+)@(\d+)", study or "")
    return (study or "tfkd", 1) if parts is None else (parts[1], int(parts[2]))


@dataclass(frozen=True)
class Record:
    """A trial, as read from its files."""

    folder: Path
    number: int
    name: str
    objective: str
    status: str
    """One of running, done, stopped (early), failed, interrupted, paused (may go on)."""
    parameters: Tree
    config: Tree
    reason: str | None = None
    lost: int = 0
    """Times that its process was lost and the trial resumed; not a failure of its own."""
    seed_of: str | None = None
    """The trial of which this is a run with a further seed (`search.finalists`). None: a trial."""
    seeds: int = 0
    """Number of further seeds that the trial gets, in their runs."""
    metrics: list[Numbers] = field(default_factory=list)
    """Metrics of each epoch."""
    further: tuple["Record", ...] = ()
    """Its runs with further seeds, by seed."""

    @property
    def last(self) -> Numbers:
        """Metrics of the last epoch; empty before the first."""
        return self.metrics[-1] if self.metrics else {}

    @property
    def means(self) -> Numbers:
        """Means of the last metrics over its further seeds; empty until all of these have ended.

        A metric that is NaN or missing in one of them has no mean, and a run that failed leaves the
        trial without any.
        """
        return means_of(self.further) if self.further else {}

    @property
    def judged(self) -> Numbers:
        """Metrics that judge the trial: those of its last epoch, or their means over further seeds."""
        return {**self.last, **self.means} if self.further else self.last

    def error(self, metric: str) -> float | None:
        """Return the standard error of a mean over further seeds; None without two of them."""
        if len(self.further) < 2 or metric not in self.means:
            return None
        values = [run.last[metric] for run in self.further]
        return statistics.stdev(values) / math.sqrt(len(values))

    def with_runs(self, further: tuple["Record", ...]) -> "Record":
        """Return the trial with its runs with further seeds."""
        return replace(self, further=further)

    @property
    def runs(self) -> tuple["Record", ...]:
        """The trial, and its runs with further seeds."""
        return (self, *self.further)


class _SeedRun(Protocol):
    """The part of a run with a further seed that a mean needs."""

    @property
    def status(self) -> str: ...
    @property
    def last(self) -> Numbers: ...
    @property
    def seeds(self) -> int: ...


def means_of(further: Sequence[_SeedRun]) -> Numbers:
    """Return the means of the last metrics over runs with further seeds, by seed (`Record.means`)."""
    done = [run.last for run in further if run.status == "done"]
    if not done or len(done) < max(len(further), further[-1].seeds):
        return {}
    values = {name: [last.get(name, math.nan) for last in done] for name in done[0]}
    means = {name: statistics.fmean(found) for name, found in values.items()}
    return {name: mean for name, mean in means.items() if math.isfinite(mean)}


def with_further(records: Iterable[Record]) -> list[Record]:
    """Return the trials alone, each with its runs with further seeds in it."""
    trials, further = list[Record](), dict[str, list[Record]]()
    for record in records:
        if record.seed_of is None:
            trials.append(record)
        else:
            further.setdefault(record.seed_of, []).append(record)
    found = []
    for trial in trials:
        runs = sorted(further.get(trial.name, []), key=lambda run: int(run.config["seed"]))
        found.append(trial.with_runs(tuple(runs)) if runs else trial)
    return found


def write_experiment(experiment: Path, tree: Values, argv: list[str]) -> None:
    """Write experiment.yaml: everything needed to describe the run and to repeat it."""
    seeds = {
        "trials": tree["seed"],
        "proposals": tree["search"]["seed"],
        "split": tree["data"]["split_seed"],
    }
    write_text(
        experiment / "experiment.yaml",
        dump_yaml({**about_now(argv, tree), "seeds": seeds, "space": dict(tree)}),
        durable=True,
    )


def about_now(argv: list[str], tree: Values) -> Tree:
    """Return what runs here and now: layout, time, command, versions, git commit.

    With the user's own code, also the directory.
    """
    directory = {"directory": own_code.here()["directory"]} if own_code.is_needed(tree) else {}
    return {
        **directory,
        "layout": VERSION,
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": argv,
        "versions": {
            "python": platform.python_version(),
            "tfkd_ray": __version__,  # a job may bring the package, which is not installed then
            **{p: importlib.metadata.version(p) for p in ("ray", "torch", "optuna")},
        },
        "git_commit": _git_commit(),
    }


def read_experiment(experiment: Path) -> Tree:
    """Read experiment.yaml; raise a ConfigError if the directory is no experiment."""
    if not os.path.lexists(experiment / "experiment.yaml"):
        message = "not an experiment: there is no experiment.yaml in it"
        if os.path.lexists(experiment / "confirm.yaml"):
            message = "is a comparison of arms, not a sweep; its verdict is in `tfkd report` and `tfkd status`"
        raise ConfigError(message, experiment)
    about = read_yaml(experiment / "experiment.yaml", follow=False)
    if about.get("layout") != VERSION:
        message = (
            f"layout {about.get('layout')!r}, and this release reads layout {VERSION}; "
            "use the release that wrote it"
        )
        raise ConfigError(message, experiment / "experiment.yaml")
    if not isinstance(about.get("space"), dict) or not isinstance(
        about["space"].get("search"), dict
    ):
        raise ConfigError(
            "has no 'space:' with a 'search:' in it; it was changed by hand or truncated",
            experiment,
        )
    return about


def selection_metric(experiment: Path) -> str:
    """Return the metric by which a sweep chooses its best trial."""
    about = read_experiment(experiment)
    with damaged(experiment / "experiment.yaml"):
        return scores.score_of(about["space"]["search"]["metric"]).key


def selection_limits(experiment: Path) -> Limits:
    """Return the constraints that a sweep's best trial should meet."""
    about = read_experiment(experiment)
    with damaged(experiment / "experiment.yaml"):
        return as_limits(about["space"]["search"].get("constraints"))


def read_records(experiment: Path) -> list[Record]:
    """Read all trials, by number; a line that is still being written is left out.

    Runs with further seeds are in the `further` of their trials.
    """
    return with_further(
        read_record(folder)
        for folder in trial_folders(experiment)
        if (folder / "trial.json").exists()
    )


def trial_folders(experiment: Path) -> list[Path]:
    """Return the folders of all trials, by name, without links: their trials count elsewhere."""
    above = trials_folder(experiment)
    if above.is_symlink():
        raise ConfigError(
            f"is a link to {above.readlink()}; replace the link by the folder itself", above
        )
    try:
        with os.scandir(above) as entries:
            return sorted(
                Path(entry.path) for entry in entries if entry.is_dir(follow_symlinks=False)
            )
    except FileNotFoundError:  # no trial has started yet
        return []
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", above) from None


_CREATED, _STATE, _EPOCH, _NOTE = (b'{"op_code":%d,' % code for code in (4, 6, 7, 8))
"""First bytes of the lines of Optuna's journal that create a trial, end it, report an epoch, set an
attribute."""


def gone_trials(experiment: Path) -> list[str]:
    """Return the trials with epochs or an end in study.journal whose folders are gone."""
    journal = experiment / "study.journal"
    names: list[str | None] = []
    told: set[int] = set()
    if kind_of(journal, follow=False) or not journal.exists():  # readers query no database
        return []
    with damaged(journal), opened(journal, follow=False) as file:
        while line := file.readline(LONGEST_LINE):
            if not line.endswith(b"\n"):  # still being written, or damaged
                break
            noted = line.startswith(_NOTE) and b'"user_attr":{"name":' in line
            if not (noted or line.startswith((_CREATED, _STATE, _EPOCH))):
                continue
            with contextlib.suppress(
                ValueError, KeyError, TypeError, IndexError
            ):  # reported when the journal is opened
                about = parse_json(line)
                if line.startswith(_CREATED):
                    given = about.get("user_attrs") or {}
                    names.append(given.get("name") if "number" in given else None)
                    if about.get("intermediate_values") or about.get("state") in _ENDED:
                        told.add(len(names) - 1)
                elif noted:
                    names[about["trial_id"]] = str(about["user_attr"]["name"])
                elif line.startswith(_EPOCH) or about["state"] in _ENDED:
                    told.add(about["trial_id"])
    known = {names[k] for k in told if k < len(names)} - {None}
    return sorted(
        str(n) for n in known if not (trials_folder(experiment) / str(n) / "trial.json").is_file()
    )


_ENDED = (1, 2, 3)
"""Optuna's codes of final states: complete, pruned, failed."""


def gone_sentence(names: Sequence[str]) -> str:
    """Return the sentence about trials whose folders are gone."""
    what = "its folder is" if len(names) == 1 else "their folders are"
    gone = f"the study has {some_of(names)}, and {what} gone"
    return f"{gone}: their results are in the study alone; put the folders back"


def read_record(folder: Path) -> Record:
    """Read one trial; raise a ConfigError if one of its files is damaged."""
    return as_record(folder, read_metrics(folder))


def as_record(folder: Path, metrics: list[Numbers]) -> Record:
    """Return the trial of a trial.json's content, with these metrics."""
    path = folder / "trial.json"
    try:
        about = parse_json(read_text(path))
        record = Record(folder=folder, metrics=metrics, **about)
        kinds = {"number": int, "name": str, "objective": str, "parameters": dict, "config": dict}
        for name, kind in kinds.items():
            if not isinstance(about[name], kind):
                raise ValueError(f"{name} is {about[name]!r}")
        if record.status not in STATUSES or not isinstance(record.reason, str | None):
            raise ValueError(f"status is {record.status!r}, reason {record.reason!r}")
        if record.seed_of is not None:
            _check_further(record)
    except (ValueError, TypeError) as error:
        message = f"truncated, or not written by this release ({error}); move its folder away to see the others"
        raise ConfigError(message, path) from None
    except OSError as error:
        if isinstance(error, FileNotFoundError | NotADirectoryError) or error.errno in DISK_ERRORS:
            raise
        raise ConfigError(
            f"cannot be read: {error.strerror}; move its folder away to see the others", path
        ) from None
    return record


def _check_further(record: Record) -> None:
    """Raise a ValueError if a run with a further seed does not say which."""
    told = {"seed_of": record.seed_of, "seeds": record.seeds, "seed": record.config.get("seed")}
    kinds = {"seed_of": str, "seeds": int, "seed": int}
    for name, value in told.items():
        if not isinstance(value, kinds[name]):
            raise ValueError(f"{name} is {value!r}")


def write_record(record: Record) -> None:
    """Write trial.json atomically."""
    left_out = {"folder", "metrics", "further"}
    if record.seed_of is None:
        left_out |= {"seed_of", "seeds"}
    about = {k: v for k, v in record.__dict__.items() if k not in left_out}
    write_text(record.folder / "trial.json", json.dumps(about, indent=1) + "\n", durable=True)


def read_metrics(folder: Path) -> list[Numbers]:
    """Read the complete lines of metrics.jsonl."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return []
    with damaged(path):
        text = read_text(path)
        return [as_metrics(line) for line in text.split("\n")[:-1]]


def as_metrics(line: str | bytes) -> Numbers:
    """Parse a line of metrics.jsonl; raise a ValueError if it is none."""
    found = parse_json(line)
    if not isinstance(found, dict) or not all(is_json_number(value) for value in found.values()):
        raise ValueError(f"no metrics of an epoch: {str(found)[:80]}")
    epoch = found.get("epoch", 0)
    if not 0 <= epoch <= MOST_EPOCHS:
        raise ValueError(f"epoch is {epoch}")
    return found


def is_json_number(value: Any) -> bool:
    """Return whether a value is a JSON number, or NaN or infinity as diverging trials report."""
    return isinstance(value, float) or (
        isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63
    )


def read_teachers(storage: Path) -> list[Tree]:
    """Read teacher.json of every finished teacher under a storage directory, by name."""
    return [
        read_teacher(path.parent) for path in sorted((storage / "teachers").glob("*/teacher.json"))
    ]


def read_teacher(folder: Path) -> Tree:
    """Read a teacher's teacher.json; raise a ConfigError if it is damaged."""
    path = folder / "teacher.json"
    with damaged(path):
        about: Tree = parse_json(read_text(path))
        as_metrics(json.dumps(about["metrics"]))
        if (
            not all(isinstance(about[name], str) for name in ("name", "sha256"))
            or "name" not in about["config"]["data"]
        ):
            raise ValueError("its name, its checksum or its data are not there")
    return about


_OF_CONFIRM = ("title", "arms", "verdicts", "notes", "test", "trained_on", "opened", "preset")


def read_judged(directory: Path) -> Tree | None:
    """Read confirm.json; None if the test split was not opened yet."""
    path = directory / "confirm.json"
    if not os.path.lexists(path):
        return None
    with damaged(path):
        judged: Tree = parse_json(read_text(path))
        missing = set(_OF_CONFIRM) - judged.keys()
    if missing:
        raise ConfigError(
            f"lacks {', '.join(sorted(missing))}; write it again: tfkd resume {shlex.quote(str(directory))}",
            path,
        )
    return judged


def name_of_test(test: str) -> str:
    """Return the name of the data set of a test split, by its id as in confirm.json."""
    return str(parse_json(test)["name"]) if test.startswith("{") else test


DRIVER_ENDED = "closed"
"""Key in spent.json: the driver has ended its sweep, and was not killed before that."""


def read_spent(experiment: Path) -> Numbers:
    """Read spent.json: `seconds` that drivers ran, and `trial_seconds`; both 0 without it.

    `left_s` is the driver's estimate of the time left, if it had one. `DRIVER_ENDED` is there if the last
    driver came to its end, whether or not all trials did.
    """
    path = experiment / "spent.json"
    if not path.exists():
        return {"seconds": 0.0, "trial_seconds": 0.0}
    with damaged(path):
        counted = parse_json(read_text(path))
        found = {name: float(counted[name]) for name in ("seconds", "trial_seconds")}
        found |= {
            name: float(counted[name]) for name in ("left_s", DRIVER_ENDED) if name in counted
        }
        if not all(0 <= value < math.inf for value in found.values()):
            raise ValueError(f"{found}")
    return found


def parse_json(text: str | bytes) -> Any:
    """Parse a JSON text; any problem raises a ValueError."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_text(path: Path) -> str:
    """Read a text file of an experiment; raise a ValueError if it is larger than any of ours."""
    with opened(path, follow=False) as file:
        content = read_at_most(file, MOST_JSON_BYTES + 1)
    if len(content) > MOST_JSON_BYTES:
        raise ValueError(f"larger than any such file: more than {MOST_JSON_BYTES} bytes")
    return content.decode()


@contextlib.contextmanager
def damaged(path: Path) -> Iterator[None]:
    """Turn errors of reading a damaged file into a ConfigError."""
    try:
        yield
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, ArithmeticError) as error:
        what = f"no {error} in it" if isinstance(error, KeyError) else str(error)
        raise ConfigError(f"was changed by hand or truncated: {what}", path) from None
    except OSError as error:
        if isinstance(error, FileNotFoundError) or error.errno in DISK_ERRORS:
            raise
        raise ConfigError(f"cannot be read: {error.strerror}", error.filename or path) from None


def append_line(path: Path, line: str, *, durable: bool = False) -> None:
    """Append a line to a file, which is created if needed; raise an OSError if the path is a link.

    If a full disk cut the line before it, that one stays a line of its own.
    """
    handle = os.open(
        path,
        os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK,
        0o666,
    )
    with os.fdopen(handle, "wb") as file:
        size = os.fstat(handle).st_size
        cut = size > 0 and os.pread(handle, 1, size - 1) != b"\n"
        file.write(b"\n" * cut + line.encode() + b"\n")
        file.flush()
        if durable:
            os.fsync(file.fileno())


def check_no_links(experiment: Path, finished: Collection[str] = ()) -> None:
    """Raise if an experiment contains a link, a pipe or a device: a write there would go elsewhere.

    Two links are ours: result.json, to the metrics.jsonl beside it, and Optuna's lock, which is
    never opened.

    Args:
        finished: names of trials into whose folders nothing will be written, so their content is
            not looked at.
    """
    found = sorted(
        f"{path.relative_to(experiment)}: is {kind_of(path, follow=False)}"
        for path in _no_plain_files(experiment, finished)
        if not _is_our_link(path)
    )
    if found:
        rest = [f"and {len(found) - 9} more"] if len(found) > 9 else []
        way_out = (
            "an experiment has only plain files and folders, because what is written to anything else ends up "
            "elsewhere; replace it by the file itself"
        )
        raise ConfigError([*found[:9], *rest, way_out], experiment)


def _no_plain_files(experiment: Path, finished: Collection[str]) -> Iterator[Path]:
    """Yield what is neither a file nor a directory; of 200,000 folders, looked at in a second."""
    of_trials = (str(trials_folder(experiment)), str(experiment / "tb"))
    folders = [str(experiment)]
    while folders:
        where = folders.pop()
        with contextlib.suppress(OSError), os.scandir(where) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    if where not in of_trials or entry.name not in finished:
                        folders.append(entry.path)
                elif not entry.is_file(follow_symlinks=False):
                    yield Path(entry.path)


def _is_our_link(path: Path) -> bool:
    """Return whether a path is Optuna's lock, or a result.json that links to its metrics.jsonl."""
    if path.name.startswith("study.journal.lock"):
        return True
    is_result = path.name == "result.json" and path.is_symlink()
    return is_result and str(path.readlink()) == "metrics.jsonl"


def output_descriptor(path: Path) -> int | None:
    """Return the descriptor that an output's path names: of /dev/stdout, /dev/fd/63 or `-`."""
    return 1 if str(path) == "-" else descriptor_of(path)


def check_output(path: Path, option: str) -> None:
    """Raise if the path is a link, a directory or a device, which may not be replaced.

    See `write_output`.
    """
    if output_descriptor(path) is not None:
        return
    kind = kind_of(path, follow=False)
    if kind == "a link":
        raise ConfigError(f"is a link to {path.readlink()}; name the file itself: {option}", path)
    if kind == "a directory":
        raise ConfigError(f"is a directory; name a file: {option}", path)
    if kind is not None and kind != "a named pipe" and str(path.absolute()) != os.devnull:
        raise ConfigError(f"is {kind}, not a file; name a file, or /dev/stdout: {option}", path)


def write_output(path: Path, text: str) -> bool:
    """Write a text to a path that a user named; return whether it became a file there.

    Streams get the text directly: /dev/stdout or `-`, a shell's /dev/fd/63, a named pipe with a
    reader, /dev/null.
    """
    number = output_descriptor(path)
    if number is None and kind_of(path) is None:
        write_text(path, text)
        return True
    try:
        # without a reader, opening a pipe is an error instead of a wait
        handle = (
            os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
            if number is None
            else os.dup(number)
        )
    except OSError as error:
        why = "no process reads from it" if error.errno == errno.ENXIO else error.strerror
        raise ConfigError(f"cannot be written to: {why}", path) from None
    with os.fdopen(handle, "wb", buffering=0) as file:
        if number is None:
            os.set_blocking(handle, True)
        left = memoryview(text.encode(errors="backslashreplace"))
        try:
            while left:
                written = file.write(left)
                if written is None:  # the pipe is full, and does not block
                    select.select((), (file,), ())
                left = left[written or 0 :]
        except OSError as error:
            if error.errno != errno.EBADF:
                raise
            raise ConfigError("cannot be written to: it is open for reading only", path) from None
    return False


def check_new(experiment: Path) -> None:
    """Raise if an experiment of this name exists, or cannot be created there."""
    check_name(experiment.name)
    if experiment.is_symlink():
        raise ConfigError(
            f"is a link to {experiment.readlink()}; choose another name: --name NAME", experiment
        )
    if experiment.exists() and not is_begun(experiment):
        message = f"experiment {experiment.name!r} exists already; choose another name, or resume it: tfkd resume"
        raise ConfigError(f"{message} {shlex.quote(str(experiment))}", experiment.parent)
    check_writable(experiment.parent, "--storage DIR")


RESERVED = {"teachers", "test_openings.jsonl", "experiment.yaml", "confirm.yaml"}
"""Names in a storage directory that are reserved: of what experiments share, and of files by which
a directory is known as an experiment."""
_LOOK_ALIKES = str.maketrans(
    "\u0430\u0435\u043e\u0440\u0441\u0442\u0443\u0445\u0455\u0456\u0458\u04bb\u0433\u043d\u0501\u0261\u0131"
    "\u03b1\u03b5\u03b9\u03bd\u03bf\u03c1\u03c4\u03c5\u03c7\u03f2",
    "aeopctyxsijhrhdgiaeivoptuxc",
)
"""Cyrillic and Greek letters that look like Latin ones."""


def _as_it_looks(name: str) -> str:
    """Return a name as people and some file systems take it: whatever its case, width or accents."""
    plain = unicodedata.normalize("NFKD", name.casefold()).casefold()
    seen = (c for c in plain if not unicodedata.category(c).startswith("M"))
    return "".join(seen).translate(_LOOK_ALIKES).rstrip(". ")


def check_name(name: str) -> None:
    """Raise if this is no valid name for an experiment."""
    given = f"--name {legible(name)!r}" if not name.isprintable() else f"--name {name}"
    if _as_it_looks(name) in RESERVED:
        raise ConfigError(
            f"{given}: is, or looks like, a name that tfkd uses in a storage directory; choose another name"
        )
    looks = unicodedata.normalize("NFKC", name)
    if (
        not name
        or looks.startswith((".", "-", "~", "\u2212"))
        or name.endswith(".")
        or name != name.strip()
        or not name.isprintable()
        or set("/\\") & set(looks)
    ):
        rule = (
            "a plain name without slashes, control characters, blanks at its ends, '.', '-' or '~' at its beginning, "
            "or '.' at its end"
        )
        raise ConfigError(f"{given}: {rule}; choose the place with --storage")
    if name.casefold().endswith(PART) or len(name.encode(errors="replace")) > LONGEST_NAME:
        raise ConfigError(
            f"{given}: at most {LONGEST_NAME} bytes, and not '{PART}' at its end; choose another name"
        )


LONGEST_NAME = 200
"""Most bytes of an experiment's name: file systems allow 255, and names derived from it are longer
(NAME-confirm)."""
_BEGINNING = {"driver.lock", "driver.txt", "study.journal", "study.journal.lock"}


def is_begun(experiment: Path) -> bool:
    """Return whether a driver was killed in this directory before it wrote experiment.yaml."""
    names = {p.name for p in experiment.iterdir()} if experiment.is_dir() else set()
    names = {name for name in names if not name.endswith(PART)}
    return "driver.lock" in names and names <= _BEGINNING


class _Judged(Protocol):
    """The part of a `Record` that ranking needs."""

    @property
    def status(self) -> str: ...
    @property
    def last(self) -> Numbers: ...
    @property
    def judged(self) -> Numbers: ...
    @property
    def means(self) -> Numbers: ...
    @property
    def number(self) -> int: ...


_J = TypeVar("_J", bound=_Judged)


def ranked_trials(records: Iterable[_J], metric: str, limits: Limits = NO_LIMITS) -> list[_J]:
    """Return full-length trials, best first by a metric; of equals the first one first.

    Trials whose value is NaN are left out. Those that meet the limits come before the others. Among
    either, those with a mean over further seeds come first: the value of one run, selected among
    many, looks better than it is.
    """
    full = sorted((r for r in records if r.status == "done"), key=lambda r: r.number)
    ranked = scores.ranked(full, metric, lambda r: r.judged.get(metric, math.nan))
    if any(metric in r.means for r in full):
        ranked.sort(key=lambda r: metric not in r.means)
    return feasible_first(ranked, limits, lambda r: r.judged)


def best(records: Iterable[_J], metric: str, limits: Limits = NO_LIMITS) -> _J | None:
    """Return the first of `ranked_trials`; None if no trial of full length has a value."""
    return next(iter(ranked_trials(records, metric, limits)), None)


def furthest(records: Iterable[_J], metric: str) -> _J | None:
    """Return the best of the trials that have paused at the highest rung; None if none has."""
    paused = sorted((r for r in records if r.status == "paused" and r.last), key=lambda r: r.number)
    most = max((r.last["epoch"] for r in paused), default=0)
    there = [r for r in paused if r.last["epoch"] == most]
    return next(iter(scores.ranked(there, metric, lambda r: r.last.get(metric, math.nan))), None)


def pareto(records: Iterable[_J], metrics: Sequence[str], limits: Limits = NO_LIMITS) -> list[_J]:
    """Return the full-length trials that no other beats, of those that meet the limits if any does.

    A trial beats another if it is at least as good in every metric and better in one.

    The best in the first metric comes first. Equal trials are all included, in their order.
    """

    def values(record: _J) -> tuple[float, ...]:
        return tuple(scores.sign(m) * record.judged.get(m, math.nan) for m in metrics)

    full = [(values(r), r) for r in records if r.status == "done"]
    full = [(v, r) for v, r in full if all(math.isfinite(x) for x in v)]
    full = [(v, r) for v, r in full if is_feasible(limits, r.judged)] or full
    front = [
        (v, r)
        for v, r in full
        if not any(w != v and all(b >= a for a, b in zip(v, w, strict=True)) for w, _ in full)
    ]
    return [
        r
        for _, r in sorted(front, key=lambda entry: (tuple(-x for x in entry[0]), entry[1].number))
    ]


def _git_commit() -> str | None:
    """Return the commit of the repository here, or None; with '+' if files differ from it."""
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=True
        )
        changes = subprocess.run(
            ["git", "status", "--porcelain"], capture_output=True, text=True, timeout=5, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return commit.stdout.strip() + ("+" if changes.stdout.strip() else "")
