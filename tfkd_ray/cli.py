"""The command line: `tfkd VERB ...`. Every verb imports what it needs when it runs.

Results go to standard output, progress and errors to standard error. Exit codes: 0 done, 1 failed, 2 wrong input,
7 not better (confirm), 130 interrupted.
"""

import argparse
import contextlib
import dataclasses
import io
import json
import os
import shlex
import signal
import sys
import textwrap
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from tfkd_ray import __version__
from tfkd_ray.own_code import enter_job, remember
from tfkd_ray.passwords import masked

if TYPE_CHECKING:
    from tfkd_ray.arms import Comparison
    from tfkd_ray.config import TeacherRun, TrainConfig
    from tfkd_ray.space import Space
    from tfkd_ray.storage import Experiment, Storage

OK, FAILED, WRONG_INPUT, NOT_BETTER, INTERRUPTED = 0, 1, 2, 7, 130
_STORAGE = Path("tfkd_results")
_TOP_K = 3
_BASELINES = "ce,lsr,scaled,published"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by who started us
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115
        if isinstance(stream := getattr(sys, name), io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # of names that are no UTF-8, or not of the terminal's
    enter_job()
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C, at any moment
    argv, command = _command_of(_words() if argv is None else list(argv))
    try:
        from tfkd_ray.files import Legible

        with contextlib.redirect_stderr(Legible(sys.stderr)):
            args = _parsed(argv)
        from tfkd_ray.schema import ConfigError, Unreachable  # `--help` needs no YAML
    except ModuleNotFoundError as error:
        return _not_installed(argv[0] if argv else "", error)

    args.command = command
    try:
        with contextlib.redirect_stdout(Legible(sys.stdout)):
            code: int = args.run(args)
        sys.stdout.flush()
        if code == INTERRUPTED:
            _let_end()
        return code
    except ConfigError as error:
        _say(f"tfkd {args.verb}: {error}")
        return FAILED if isinstance(error, Unreachable) else WRONG_INPUT
    except KeyboardInterrupt:
        _let_end()
        nothing = " before a trial ran, so there is nothing to resume" if args.verb == "tune" else ""
        _say(f"tfkd {args.verb}: interrupted{nothing}")
        return INTERRUPTED
    except ModuleNotFoundError as error:
        return _not_installed(args.verb, error)
    except BrokenPipeError:  # the reader of our output left: not our failure
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except OSError as error:
        from tfkd_ray.files import DISK_ERRORS

        if _directory_is_gone():
            _say(f"tfkd {args.verb}: the directory that this was called from is gone; cd to one that is there")
            return FAILED
        if error.filename is None and error.errno not in DISK_ERRORS:
            raise
        name = str(error.filename or "the disk")
        _say(f"tfkd {args.verb}: {name if len(name) < 300 else name[:200] + '...'}: {error.strerror}")
        return FAILED


def _directory_is_gone() -> bool:
    """Whether the working directory was deleted; `Path().exists()` may still say that it is there."""
    try:
        Path.cwd()
    except FileNotFoundError:
        return True
    return False


def _let_end() -> None:
    """What comes of Ctrl-C or SIGTERM is under way, and takes a moment (Ray ends its processes); another: at once."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: _leave())


def _leave() -> NoReturn:
    """End at once, and all processes that we have started, such as those of a Ray of our own."""
    if end := getattr(sys.modules.get("tfkd_ray.cluster"), "end_children", None):  # no import amid another
        end()
    os._exit(INTERRUPTED)


def _not_installed(verb: str, error: ModuleNotFoundError) -> int:
    """Say that this Python lacks a package, as that of a cluster's head may, which runs jobs."""
    _say(f"tfkd {verb}: {sys.executable} has no {error.name!r}, which tfkd needs; install tfkd there (on a cluster: "
         "in the environment that Ray was started from, whose `python` runs jobs)")  # fmt: skip
    return FAILED


def _parsed(argv: list[str]) -> argparse.Namespace:
    """The arguments; for jobs, which forward them, also as the `words` that they are and with a way to parse others."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    # argparse takes positional arguments in one run only; overrides may stand between and after options
    if any(word.startswith("-") or not hasattr(args, "overrides") for word in rest):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides += rest
    args.words, args.parsed = argv, _parsed
    return args


_WORDS = "TFKD_WORDS"
"""Variable in which a process that begins anew is given its words, with the passwords in them."""


def _words() -> list[str]:
    """The words of the command line. Where one holds a password, begin anew without it, the words in the environment.

    Ray lists the command of a driver, and `ps` any.
    """
    given = os.environ.pop(_WORDS, None)
    if given is not None:
        return [str(word) for word in json.loads(given)]
    words = sys.argv[1:]
    if any(masked(word) != word for word in words):
        os.environ[_WORDS] = json.dumps(words)
        os.execv(sys.executable, [sys.executable, *(masked(word) for word in sys.orig_argv[1:])])
    return words


def _command_of(argv: list[str]) -> tuple[list[str], list[str]]:
    """Arguments, and the command that follows `--` in `tfkd cluster submit FILE -- COMMAND`."""
    cut = argv.index("--") if argv[:2] == ["cluster", "submit"] and "--" in argv else len(argv)
    return argv[:cut], argv[cut + 1 :]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Say what is wrong with the command line, without the passwords in it."""
        super().error(masked(message))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="tfkd",
        description="Search the hyperparameters of knowledge distillation and teacher-free KD on Ray.",
        epilog="Exit codes: 0 done, 1 failed, 2 wrong input, 7 not better, 130 interrupted.",
    )
    parser.add_argument("--version", action="version", version=f"tfkd {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        return sub

    def file_and_overrides(sub: argparse.ArgumentParser, what: str) -> None:
        sub.add_argument("file", help=f"{what}, or the name of one that ships with tfkd")
        sub.add_argument("overrides", nargs="*", metavar="key.path=value", help="settings that replace the file's")

    def download(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--download", action="store_true", help="fetch the data set first, if it is not there")

    def storage(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--storage", type=_place, default=_STORAGE, metavar="DIR",
                         help="where experiments and teachers go: a directory, s3://BUCKET/PREFIX or "
                         "gs://BUCKET/PREFIX (default: ./tfkd_results)")  # fmt: skip

    sub = verb("tune", _tune, "Run a sweep.")
    file_and_overrides(sub, "a search-space file")
    download(sub)
    storage(sub)
    sub.add_argument("--name", help="of the experiment (default: the file's name and the time)")
    _elsewhere(sub)

    _budgets(sub)
    sub.add_argument("--num-samples", type=_count, metavar="N", help="trials, over all objectives")
    sub.add_argument("--prior", type=_place, action="append", default=[], metavar="DIR",
                     help="learn from an earlier experiment's trials, where they lie in this space")  # fmt: skip
    sub.add_argument("--study-storage", metavar="URL", help="of Optuna's study (default: a journal in the experiment)")

    sub = verb("resume", _resume, "Go on with a sweep that was interrupted, or add trials to it.")
    sub.add_argument("experiment", type=_place, help="its directory, or URL")
    sub.add_argument("--add-trials", type=_count, default=0, metavar="N", help="run N more")
    sub.add_argument("--space", metavar="FILE", help="go on in a wider space, which holds every trial of this one")
    sub.add_argument(
        "--retry-failed", action="store_true", help="run the failed trials again (a comparison's always do)"
    )
    _budgets(sub)
    sub.add_argument("--study-storage", metavar="URL", help="of Optuna's study, where it is not in TFKD_STORAGE")
    _elsewhere(sub)

    sub = verb("check", _check, "Check a search-space or arms file and say what it does; starts nothing.")
    file_and_overrides(sub, "a search-space or arms file")
    sub.add_argument("--all", action="store_true", help="list every fixed setting, also those that are as usual")

    sub = verb("plan", _plan, "Say what a sweep will take: trials, epochs, hours, money, disk; starts nothing.")
    file_and_overrides(sub, "a search-space file")
    sub.add_argument("--probe", action="store_true", help="train a few steps of each objective here, for the hours")
    sub.add_argument("--slots", type=_count, metavar="N", help="trials at a time (default: those of this machine)")
    sub.add_argument("--gpu-hour-price", type=float, metavar="X", help="of one GPU")

    sub = verb("explain", _explain, "Say what each objective of a file amounts to, and which searched settings matter.")
    file_and_overrides(sub, "a search space, an arms file or a configuration")

    sub = verb("train", _train, "Train one configuration: a file without ranges.")
    file_and_overrides(sub, "a configuration file")
    download(sub)
    storage(sub)
    sub.add_argument("--out", type=Path, metavar="DIR", help="where the student goes; the same DIR again goes on there")

    sub = verb("confirm", _confirm, "Does it help? Train the best of a sweep, or the arms of a file, over several "
               "seeds, and judge them against tuned baselines on the test split.")  # fmt: skip
    file_and_overrides(sub, "a sweep's directory or URL, or an arms file")
    sub.add_argument("--top-k", type=_count, default=_TOP_K, metavar="K", help="of a sweep: its K best (default: 3)")
    sub.add_argument("--baselines", default=_BASELINES, metavar="LIST",
                     help="of a sweep: what its best must beat (default: ce,lsr,scaled,published)")  # fmt: skip
    sub.add_argument("--fail-if-not-better", action="store_true", help="end with exit code 7 unless an arm is better")
    download(sub)
    storage(sub)
    sub.add_argument(
        "--seeds",
        type=_count,
        default=5,
        metavar="N",
        help="runs of each arm (default: 5, which shows gains of about a point; 10 show half a point)",
    )
    sub.add_argument("--preset", choices=["smoke"], help="smoke: scaled down, to see it run")
    sub.add_argument("--train-only", action="store_true", help="leave validation out of training")
    sub.add_argument("--teacher-per-seed", action="store_true", help="train a teacher for each seed, also for kd")
    sub.add_argument("--name", help="of the comparison (default: the file's name and the time)")
    _elsewhere(sub)

    sub = verb("export", _export, "Write a student as a folder to give away: weights, graphs, model card.")
    sub.add_argument("source", type=_place, help="a sweep, a trial's folder, what tfkd train made, or a comparison")
    sub.add_argument("--arm", help="of a comparison (default: the first by verdict, then by mean)")
    sub.add_argument("--seed", type=_count, help="of a comparison (default: the first that was trained to the end)")
    sub.add_argument("-o", "--out", type=Path, metavar="DIR", help="a new directory (default: ./NAME-export)")
    sub.add_argument("--onnx", action="store_true", help="also as ONNX (pip install 'tfkd_ray[onnx]')")
    sub.add_argument("--licence", metavar="NAME", help="of the weights, e.g. apache-2.0")

    sub = verb("teacher", _teacher, "Train, list or show teachers.")
    actions = sub.add_subparsers(dest="do", required=True, metavar="train|list|show")
    for do, text in (("train", "Train the teachers that a file needs."), ("list", "List the teachers that are there."),
                     ("show", "Show how a teacher was made, and how good it is.")):  # fmt: skip
        action = actions.add_parser(do, help=text, description=text)
        storage(action)
        if do == "train":
            action.set_defaults(run=_teacher_train)
            download(action)
            file_and_overrides(action, "a search space, an arms file or a configuration")
            _elsewhere(action)
        elif do == "show":
            action.add_argument("name", help="of the teacher")

    def experiment(sub: argparse.ArgumentParser, *, follow: bool = False) -> None:
        sub.add_argument("experiment", type=_place, help="its directory, or URL")
        if follow:
            sub.add_argument("-f", "--follow", action="store_true", help="go on as long as it runs")

    sub = verb("best", _best, "Print the configuration of the best trial, as a file for `tfkd train`; of a sweep with "
               "several metrics, the trials that no other beats.")  # fmt: skip
    experiment(sub)
    sub.add_argument("--json", action="store_true", help="for programs")

    sub = verb("trials", _trials, "List the trials of an experiment.")
    experiment(sub)
    sub.add_argument("--sort", default="number", metavar="FIELD[:desc]", help="by a metric or a parameter")
    sub.add_argument("--filter", action="append", default=[], metavar="EXPR",
                     help="such as status=done, objective=kd, val_accuracy>0.9; several must all hold")  # fmt: skip
    sub.add_argument("--columns", metavar="A,B", help="which, in this order")
    sub.add_argument("--limit", type=_count, metavar="N", help="only the first N")
    sub.add_argument("-o", "--output", choices=["table", "json", "csv"], default="table")

    sub = verb("status", _status, "How far an experiment is, also while it runs.")
    experiment(sub, follow=True)
    sub.add_argument("--json", action="store_true", help="for programs")

    sub = verb("logs", _logs, "What a trial said, epoch by epoch.")
    experiment(sub, follow=True)
    sub.add_argument("trial", help="its name, the beginning of it, or its number")

    sub = verb("ls", _ls, "List experiments and comparisons.")
    storage(sub)
    sub.add_argument("--json", action="store_true", help="for programs")

    sub = verb("report", _report, "Write an experiment, or a comparison, as one HTML page.")
    experiment(sub)
    sub.add_argument(
        "-o", "--out", type=Path, default=Path("report.html"), metavar="FILE", help="(default: report.html)"
    )
    sub.add_argument("--figures", type=Path, metavar="DIR", help="the figures as SVG, too")
    sub.add_argument("--confirm", type=_place, action="append", metavar="DIR",
                     help="a comparison to report with it (default: all of this sweep's)")  # fmt: skip

    sub = verb("tensorboard", _tensorboard, "Compare the trials of experiments in TensorBoard, on this machine only.")
    sub.add_argument("experiments", type=_place, nargs="+", metavar="EXPERIMENT",
                     help="directories, or URLs, shown side by side")  # fmt: skip
    sub.add_argument("--port", type=_count, default=6006, help="(default: 6006; 0: any that is free)")

    sub = verb(
        "doctor", _doctor, "Look for what would make a sweep slow, unsafe or stuck: here, and on a cluster's nodes."
    )
    sub.add_argument("--address", help="of the Ray cluster to look at: auto, HOST:PORT or http://HOST:PORT (default: "
                     "RAY_ADDRESS, or this machine alone)")  # fmt: skip
    sub.add_argument("--cluster", metavar="FILE", help="of the cluster, that is up, to look at")
    sub.add_argument("--storage", type=_place, metavar="DIR", help="where experiments go, which all nodes must see "
                     "(default: what the cluster file says; on this machine ./tfkd_results)")  # fmt: skip
    sub.add_argument("--space", metavar="FILE", help="a search space whose trials must find room")
    sub.add_argument("--reap", action="store_true", help="remove placement groups of jobs that have ended")

    _cluster_parser(verb("cluster", _cluster, "Check, start, watch and end clusters; see docs/clusters.md."))
    return parser


def _elsewhere(sub: argparse.ArgumentParser) -> None:
    """Options that say where a sweep runs."""
    sub.add_argument("--address", help="of a Ray cluster to run on: auto, HOST:PORT, or http://HOST:PORT, where it "
                     "runs as a job (default: RAY_ADDRESS, or start one here)")  # fmt: skip
    sub.add_argument("--cluster", metavar="FILE", help="of a cluster that is up, to run on as a job")
    sub.add_argument("--detach", action="store_true", help="do not follow the job")


def _cluster_parser(sub: argparse.ArgumentParser) -> None:
    actions = sub.add_subparsers(dest="do", required=True, metavar="check|up|status|submit|logs|down")
    for do, text in (
        ("check", "Say what is wrong with a cluster file; starts nothing."),
        ("up", "Start the cluster; if it is up, leave it as it is."),
        ("status", "Say which of its nodes run, and so cost money, and which jobs."),
        ("submit", "Run a command on the cluster, as a job."),
        ("logs", "Follow a job."),
        ("down", "End the cluster, and see that it has ended."),
    ):
        action = actions.add_parser(do, help=text, description=text)
        action.add_argument("file", help="a cluster file, or the name of one that ships with tfkd")
        if do == "check":
            action.add_argument("--space", metavar="FILE", help="a search space whose trials must find room on it")
            continue
        action.add_argument("--print", action="store_true", help="print the commands instead of running them")
        if do == "submit":
            action.add_argument("--detach", action="store_true", help="do not follow it")
            action.usage = "%(prog)s [--print] [--detach] FILE -- COMMAND"
        elif do == "logs":
            action.add_argument("job", nargs="?", help="which (default: the newest)")


def _doctor(args: argparse.Namespace) -> int:
    from tfkd_ray.cluster_verbs import doctor_as_job
    from tfkd_ray.space import load_space

    shape = load_space(args.space).example if args.space else None
    if (code := doctor_as_job(args, shape)) is not None:
        return code
    connected = bool(args.address or os.environ.get("RAY_ADDRESS"))
    if connected:
        _join(args.address, 1)
    from tfkd_ray.doctor import doctor
    from tfkd_ray.storage import absolute, storage_at

    place = args.storage or (None if connected else _STORAGE)
    if isinstance(place, Path):
        place = absolute(place)
    storage = None if place is None else storage_at(place)
    found = doctor(storage, shape, reap=args.reap, connected=connected)
    print("\n".join(one.line() for one in found))
    return FAILED if any(one.level == "problem" for one in found) else OK


def _cluster(args: argparse.Namespace) -> int:
    from tfkd_ray.cluster_verbs import cluster

    return cluster(args)


def _budgets(sub: argparse.ArgumentParser) -> None:
    """Options that end a sweep; each goes by the name of its setting in `search`."""
    for option, name, unit, text in _BUDGETS:
        sub.add_argument(option, dest=name, metavar=unit, type=int if unit == "N" else float,
                         help=f"end the sweep, to be resumed, after so many {text}")  # fmt: skip


_BUDGETS = (
    ("--time-budget", "time_budget_s", "SECONDS", "seconds"),
    ("--gpu-hours", "gpu_hours", "HOURS", "GPU-hours of its trials"),
    ("--cpu-hours", "cpu_hours", "HOURS", "CPU-hours of its trials"),
    ("--max-failures", "max_failed_trials", "N", "failed trials"),
)
BUDGETS = tuple(name for _, name, _, _ in _BUDGETS)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) > 10**9:
        raise argparse.ArgumentTypeError(f"a whole number, got {text!r}")
    return int(text)


def _say(text: str) -> None:
    from tfkd_ray.files import legible

    print(legible(_as_given(text)), file=sys.stderr, flush=True)


def _as_given(text: str) -> str:
    """The text with URLs in place of their mirrors; imports nothing, as errors are said this way, too."""
    storage = sys.modules.get("tfkd_ray.storage")
    return storage.as_given(text) if storage is not None else text


def _place(text: str) -> "Path | str":
    """A directory, or a URL as it is."""
    return text if "://" in text else Path(text)


def _load(args: argparse.Namespace) -> "Space":
    from tfkd_ray.space import load_space

    return load_space(args.file, args.overrides)


def _have_data(config: "TrainConfig", args: argparse.Namespace) -> None:
    """Raise a ConfigError if the data are not here; with --download, fetch them first."""
    from tfkd_ray.schema import ConfigError

    if args.download:
        try:
            config.data.check()
        except ConfigError:
            _say(f"downloading {config.data.name}")
            config.data.download()
    config.data.check()


# --- check -----------------------------------------------------------------------------------------------------


def _check(args: argparse.Namespace) -> int:
    from tfkd_ray.arms import is_arms_file, load_arms
    from tfkd_ray.explain import warnings_of
    from tfkd_ray.schema import ConfigError

    if is_arms_file(args.file):
        if args.all:
            raise ConfigError("--all: is for search spaces; an arms file has a configuration for each arm", args.file)
        compared = load_arms(args.file, args.overrides)
        example = compared.example
        listed = f"{len(compared.arms)} arms: {', '.join(arm.name for arm in compared.arms)}"
        print(compared.title)
        print(textwrap.fill(listed, 80, subsequent_indent="  ", break_on_hyphens=False))
    else:
        space = _load(args)
        example = space.example
        print("\n".join([*_describe(space), *_fixed(space, whole=args.all), *_notes(space)]))
        for warning in warnings_of(space):
            print(f"warning: {warning}")
    for note in example.try_networks():
        print(f"note: {note}")
    try:
        example.data.check()
    except ConfigError as error:  # a file may be checked where its data are not
        print(f"note: on this machine {error}")
    return OK


def _plan(args: argparse.Namespace) -> int:
    from tfkd_ray.plan import lines, plan, slots_here
    from tfkd_ray.schema import ConfigError

    if args.slots == 0:
        raise ConfigError("--slots: at least 1, got 0")
    space = _load(args)
    if args.probe:
        space.example.data.check()
    found, slots = plan(space, probe=args.probe), args.slots or slots_here(space)
    print("\n".join(lines(found, slots=slots, gpu_hour_price=args.gpu_hour_price)))
    return OK


def _explain(args: argparse.Namespace) -> int:
    from tfkd_ray.arms import is_arms_file, load_arms
    from tfkd_ray.explain import arm_line, report

    if is_arms_file(args.file):
        for arm in load_arms(args.file, args.overrides).arms:
            print("\n".join(arm_line(arm.name, arm.config)))
    else:
        print("\n".join(report(_load(args))))
    return OK


def _describe(space: "Space") -> Iterator[str]:
    """What is searched, conditional and fixed, line by line."""
    from tfkd_ray.relate import warm_points

    shared = [p for p in space.parameters if all(p in b.parameters for b in space.branches)]
    search, epochs = space.search, space.epochs
    rungs = search.stopping.rungs(epochs)
    share = search.num_samples // len(space.branches)
    per = f"{share} for each of {len(space.branches)} objectives" if search.split and len(space.branches) > 1 else ""
    yield f"{search.num_samples} trials{f', {per}' if per else ''}, {epochs} epochs each"
    yield f"proposed by {search.sampler}, stopped by {search.stopping.name}" + (
        f" after {rungs} epochs" if rungs else ""
    )
    yield f"value of a trial: {search.metric} after its last epoch, on validation ({search.mode}imised)"
    yield from (f"ends after {value:g} {name}" for name, value in search.budgets.items())
    for point in warm_points(space):
        yield from textwrap.wrap(f"tried first: {point.objective}: {point.origin}", 80, subsequent_indent="  ")
    if shared:
        yield "searched for every objective:"
        yield from (f"  {p.name:<34} {p.domain}" for p in shared)
    for branch in space.branches:
        own = [p for p in branch.parameters if p not in shared]
        yield f"objective {branch.objective}:" + ("" if own else " nothing of its own")
        yield from (f"  {p.name:<34} {p.domain}" for p in own)
    yield from (f"teacher, once before the trials: {_made(run)}" for run in space.teacher_runs())


def _notes(space: "Space") -> Iterator[str]:
    for note in space.notes:
        yield from textwrap.wrap(f"note: {note}", 80, subsequent_indent="  ", break_on_hyphens=False)


def _fixed(space: "Space", *, whole: bool) -> Iterator[str]:
    """What is fixed: the networks, and what differs from the recipe and the defaults; or everything."""
    from tfkd_ray.config import TrainConfig
    from tfkd_ray.schema import in_yaml

    data, recipe = space.example.data, space.example.recipe
    bare = {"objective": "ce", "data": data, "recipe": recipe, "precision": space.tree["precision"]}
    usual = dict(_leaves(TrainConfig.model_validate(bare).model_dump(mode="json")))
    own = {"name", *data.model_dump(exclude_defaults=True)}
    searched = {p.path for p in space.parameters}
    count = 0
    yield "fixed:"
    for path, value in _leaves(space.tree, searched):
        if path[0] in ("search", "objective", "teacher") or path in searched:
            continue
        differs = path[1] in own if path[0] == "data" else path[0] == "student" or usual.get(path) != value
        count += not differs
        if differs or whole:
            yield f"  {'.'.join(path):<34} {in_yaml(value)}"
    if count and not whole:
        named = recipe or next(iter(data.recipes))
        yield f"  {count} more are as in the recipe {named} of {data.name}, or as usual (--all lists them)"


def _leaves(
    tree: Any, whole: Collection[tuple[str, ...]] = (), path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(path, value) of what has nothing below it; what stands at a path of `whole` is one."""
    if isinstance(tree, dict) and path not in whole:
        for key, value in tree.items():
            yield from _leaves(value, whole, (*path, key))
    else:
        yield path, tree


# --- tune and resume -------------------------------------------------------------------------------------------


def _tune(args: argparse.Namespace) -> int:
    options = {"num_samples": args.num_samples, **{name: getattr(args, name) for name in BUDGETS}}
    args.overrides += [f"search.{name}={value}" for name, value in options.items() if value is not None]
    args.overrides += [f"search.storage={json.dumps(args.study_storage)}"] if args.study_storage else []
    space = _load(args)
    from tfkd_ray.cluster_verbs import tune_as_job
    from tfkd_ray.search_config import ENVIRONMENT

    if (code := tune_as_job(args, space)) is not None:
        return code
    if (url := space.search.storage) and masked(url) != url:
        os.environ[ENVIRONMENT] = url  # from where what is written without its password takes it
    from tfkd_ray.storage import checked, opened

    storage = checked(args.storage)
    priors = [opened(prior).folder for prior in args.prior]
    name = _new_name(args, storage, Path(args.file).stem)
    _have_data(space.example, args)
    _join(args.address, space.example.workers)
    from tfkd_ray.tune import build_tuner

    for line in _notes(space):
        _say(line)
    return _sweep(
        space,
        storage.folder / name,
        lambda progress: build_tuner(
            space,
            name=name,
            storage=storage,
            callbacks=[progress],
            on_teacher=_teacher_line,
            priors=priors,
            on_budget=progress.end,
            on_note=progress.note,
        ),
    )


def _new_name(args: argparse.Namespace, storage: "Storage", stem: str) -> str:
    """Name of a new experiment: `--name`, or the stem and the time."""
    from tfkd_ray.experiment import check_name

    name: str = args.name if args.name is not None else f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    check_name(name)
    storage.check_new(name)
    return name


def _resume(args: argparse.Namespace) -> int:
    from tfkd_ray.cluster_verbs import resume_as_job
    from tfkd_ray.experiment import read_experiment
    from tfkd_ray.schema import ConfigError
    from tfkd_ray.space import build_space, load_space
    from tfkd_ray.storage import to_continue

    if (code := resume_as_job(args)) is not None:
        return code
    found = to_continue(args.experiment)
    experiment = found.folder
    if (experiment / "confirm.yaml").is_file():
        budgets = {option: getattr(args, name) for option, name, _, _ in _BUDGETS}
        given = {
            "--add-trials": args.add_trials or None,
            "--space": args.space,
            "--study-storage": args.study_storage,
            **budgets,
        }
        if wrong := [option for option, value in given.items() if value is not None]:
            problems = [
                f"{option}: is for sweeps; a comparison has its arms and a fixed number of runs" for option in wrong
            ]
            raise ConfigError(problems, experiment)
        return _compare(found, args.address)
    about = read_experiment(experiment)
    if told := remember(about.get("directory")):
        _say(told)
    about["space"]["search"]["num_samples"] += args.add_trials
    space = build_space(about["space"], experiment / "experiment.yaml")
    wider = load_space(args.space) if args.space else None
    if wider is not None:
        samples = wider.search.num_samples + args.add_trials
        space = dataclasses.replace(wider, search=wider.search.model_copy(update={"num_samples": samples}))
    _join(args.address, space.example.workers)
    from tfkd_ray.tune import resume_tuner

    return _sweep(
        space,
        experiment,
        lambda progress: resume_tuner(
            found,
            add_trials=args.add_trials,
            callbacks=[progress],
            on_teacher=_teacher_line,
            retry_failed=args.retry_failed,
            space=wider,
            study_storage=args.study_storage,
            on_budget=progress.end,
            on_note=progress.note,
            **{name: getattr(args, name) for name in BUDGETS},
        ),
    )


def _join(address: str | None, workers: int) -> None:
    """Connect to Ray, quietly."""
    if "ray" in sys.modules and sys.modules["ray"].is_initialized():
        return
    _say("starting Ray" if not (address or os.environ.get("RAY_ADDRESS")) else "joining the Ray cluster")
    import logging

    from tfkd_ray.experiment import ctrl_c_waits

    with ctrl_c_waits():
        import tfkd_ray.tune  # noqa: F401  # all that a sweep needs: seconds
        from tfkd_ray.cluster import connect

        connect(address, workers=workers)
    for noisy in ("ray", "ray.tune", "ray.train"):  # our table says it
        logging.getLogger(noisy).setLevel(logging.CRITICAL)


def _teacher_line(run: "TeacherRun", about: dict[str, Any] | None) -> None:
    if about is not None:
        accuracy = about["metrics"].get("val_accuracy")
        judged = "" if accuracy is None else f", val_accuracy {accuracy:.4f}"
        _say(f"teacher: {about['name']}{judged}, kept for later")
    else:
        _say(f"teacher: {_made(run)}")


def _teacher_lines(
    runs: Iterable["TeacherRun"], storage: Path
) -> Callable[["TeacherRun", dict[str, Any] | None], None]:
    """The same for many teachers: those that are made alike, but for the seed, are announced once."""
    from tfkd_ray.teachers import is_trained

    missing = {run.fingerprint(): _made(run) for run in runs if not is_trained(run, storage)}
    counts = Counter(missing.values())

    def say(run: "TeacherRun", about: dict[str, Any] | None) -> None:
        if about is not None:
            _teacher_line(run, about)
        elif number := counts.pop(_made(run), 0):
            _say(f"teacher: {_made(run)}" + (f" ({number} seeds)" if number > 1 else ""))

    return say


def _made(run: "TeacherRun") -> str:
    """How a teacher is made."""
    if run.weights is not None:
        return f"taking {run.student.name} from {run.weights}"
    stop = f", stopped after {run.stop_epoch}" if run.stop_epoch else ""
    stop += f", stopped at val_accuracy {run.stop_accuracy:g}" if run.stop_accuracy else ""
    return f"training {run.student.name} with {run.objective.name} for {run.epochs} epochs{stop}"


def _sweep(space: "Space", experiment: Path, build: Callable[[Any], Any]) -> int:
    """Run a Tuner under our table and our Ctrl-C, then print what came out."""
    progress = _progress(experiment)
    try:
        ended = _fit(progress, build, experiment)
        if ended is None:
            return FAILED
        code = _summary(space, experiment, whole=ended and not progress.ended_by)
    except KeyboardInterrupt:
        if not (experiment / "experiment.yaml").is_file():
            raise
        _let_end()
        return _interrupted(experiment)
    if progress.ended_by:
        (more,) = (f"{option} {unit}" for option, name, unit, _ in _BUDGETS if f".{name}: " in progress.ended_by)
        print(f"ended early: {progress.ended_by}; go on with:\n  tfkd resume {_word(experiment)} {more}")
    return code if ended else _interrupted(experiment)


def _progress(experiment: Path) -> Any:
    from tfkd_ray.live import Progress

    return Progress(experiment)


def _fit(progress: Any, build: Callable[[Any], Any], experiment: Path) -> bool | None:
    """Build a Tuner and run it: whether it came to its end; None, and a sentence, if something was in its way."""
    from tfkd_ray.cluster import head_watched
    from tfkd_ray.tune import TeacherFailed, disk_trouble, no_node_left

    try:
        tuner = build(progress)
    except TeacherFailed as error:
        _say(f"tfkd: {error}")
        return None

    def heard(args: threading.ExceptHookArgs) -> None:
        """What a thread that writes says of the disk is told again by who waits for it."""
        if disk_trouble(args.exc_value) is None:
            threading.__excepthook__(args)

    def gone(what: str) -> None:
        progress.stop()
        _say(f"stopped: {what}; when a cluster is there again, go on with:\n  tfkd resume {_word(experiment)}")
        os._exit(FAILED)  # whatever waits for Ray would wait until Ray ends this process

    threading.excepthook = heard
    try:
        with head_watched(gone), _ctrl_c(progress) as interrupted:
            tuner.fit()
    except Exception as error:
        trouble = disk_trouble(error) or no_node_left(error)
        if trouble is None:
            raise
        progress.stop()
        _say(f"stopped: {trouble}; when that is mended, go on with:\n  tfkd resume {_word(experiment)}")
        return None
    finally:
        threading.excepthook = threading.__excepthook__
        progress.stop()
    return not interrupted


@contextlib.contextmanager
def _ctrl_c(progress: Any) -> Iterator[list[bool]]:
    """Ctrl-C or SIGTERM once: Tune ends, trials save; the list is then not empty. Twice: out at once."""
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # ours passes it on
    interrupted: list[bool] = []

    def handler(number: int, frame: Any) -> None:
        if interrupted or not callable(signal.getsignal(signal.SIGUSR1)):
            progress.stop()
            _say("stopped at once; what was not saved is repeated when you resume")
            _leave()
        interrupted.append(True)
        progress.note("stopping: trials save their state (Ctrl-C again: at once)")
        signal.raise_signal(signal.SIGUSR1)  # which Tune takes as the wish to end

    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interrupted
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _interrupted(experiment: Path) -> int:
    _say(f"interrupted; go on with:\n  tfkd resume {_word(experiment)}")
    return INTERRUPTED


def _summary(space: "Space", experiment: Path, *, whole: bool) -> int:
    """Print what came out: the best trial beside the best of the baselines, and, of a whole sweep, what to do next."""
    from tfkd_ray.experiment import best, gone_sentence, gone_trials, pareto, read_records
    from tfkd_ray.readers import spent
    from tfkd_ray.receipt import receipt_lines
    from tfkd_ray.schema import in_yaml

    metric = space.search.metric
    records = read_records(experiment)
    count = {s: sum(r.status == s for r in records) for s in ("done", "stopped", "failed", "interrupted", "running")}
    winner, seconds = best(records, metric), spent(experiment)["seconds"]
    print(
        f"{len(records)} trials, {seconds:.0f} s: {count['done']} of full length, {count['stopped']} stopped early, "
        f"{count['failed']} failed" + (f", {count['interrupted']} interrupted" if count["interrupted"] else "")
    )
    if lost := sum(r.lost for r in records):
        print(f"  {lost} times a process was lost, and its trial went on; that is no failure")
    if gone := gone_trials(experiment):
        print(textwrap.fill(gone_sentence(gone), 80, initial_indent="  ", subsequent_indent="  "))
    for record in [r for r in records if r.status == "failed"][:3]:
        print(f"  {record.name} failed: {(record.reason or '?').splitlines()[0]}\n    see {_short(record.folder)}")
    if winner is None:
        begun = "no trial of full length yet" if records else "no trial had begun when the sweep ended"
        print(f"{begun}, so there is no best one")
        return FAILED if count["failed"] and not count["interrupted"] else OK
    print(f"\nbest: {winner.name}, {metric} {winner.last[metric]:.4f}")
    for key, value in winner.parameters.items():
        print(f"  {key:<34} {value:.6g}" if isinstance(value, float) else f"  {key:<34} {in_yaml(value)}")
    for name in ("ce", "lsr"):
        rival = best([r for r in records if r.objective == name], metric)
        if rival is not None and rival is not winner:
            print(f"best {name}: {rival.name}, {metric} {rival.last[metric]:.4f}")
    ties = sum(r.status == "done" and r.last.get(metric) == winner.last[metric] for r in records)
    if ties > 1:
        print(f"{ties} trials share this value; the first of them is named")
    if space.search.more_metrics:
        print(f"\nnone is better in all of {', '.join(space.search.metrics)} than:")
        for r in pareto(records, space.search.metrics):
            print(f"  {r.name:<24} " + ", ".join(f"{m} {r.last[m]:.6g}" for m in space.search.metrics))
    print("\n" + "\n".join(receipt_lines(space, records)))
    print(f"\nThis is not a verdict: it is the best of {len(records)} on validation, and of many")
    print("trials the luckiest is always ahead of its true value.")
    where = _word(experiment)
    print(f"\nwritten to {_short(experiment)}")
    if not whole:
        return OK
    print("next:")
    print(f"  tfkd confirm {where}")
    print(f"  tfkd report {where}")
    print(f"  tfkd tensorboard {where}")
    print(f"  tfkd best {where} > best.yaml && tfkd train best.yaml")
    print(f"  tfkd resume {where} --add-trials {space.search.num_samples}")
    return OK


def _word(path: Path) -> str:
    """A path as one word of a command that is typed here."""
    return shlex.quote(_short(path))


def _short(path: Path) -> str:
    """A path as one would name it here."""
    if (url := _as_given(str(path))) != str(path):
        return url
    with contextlib.suppress(ValueError):
        return str(path.relative_to(Path.cwd()))
    return str(path)


# --- confirm ---------------------------------------------------------------------------------------------------


def _confirm(args: argparse.Namespace) -> int:
    from tfkd_ray.arms import FIRST_SEED, arms_of, load_arms, new_comparison, rivals_of
    from tfkd_ray.cluster_verbs import confirm_as_job, is_arms
    from tfkd_ray.experiment import read_experiment
    from tfkd_ray.schema import ConfigError
    from tfkd_ray.storage import Experiment, checked, to_continue

    if args.top_k < 1:
        raise ConfigError("at least the best one is compared", f"--top-k {args.top_k}")
    if args.seeds < 2:
        message = "one run of each arm cannot tell a difference from luck; at least 2, and 5 or more to tell much"
        raise ConfigError(message, f"--seeds {args.seeds}")
    if is_arms(args):
        usual = {"--top-k": args.top_k == _TOP_K, "--baselines": args.baselines == _BASELINES}
        problems = [
            f"{option}: is for sweeps; an arms file says what is compared" for option, ok in usual.items() if not ok
        ]
    else:
        usual = {"settings": not args.overrides, "--preset": not args.preset, "--storage": args.storage == _STORAGE}
        why = "settings and presets are for arms files; the arms of a sweep are as it trained them, beside it"
        problems = [f"{option}: {why}" for option, ok in usual.items() if not ok]
    if problems:
        raise ConfigError(problems, args.file)
    if (code := confirm_as_job(args)) is not None:
        return code
    sweep = to_continue(_place(args.file))
    given = sweep.folder
    if given.is_dir():
        if told := remember(read_experiment(given).get("directory")):
            _say(told)
        storage = sweep.storage  # where its teachers are
        name = _new_name(args, storage, f"{sweep.name}-confirm")
        rivals = rivals_of(args.baselines)
        tuned = _tuned_baselines(sweep, rivals, args)
        compared = arms_of(given, top_k=args.top_k, rivals=rivals, baselines=tuned)
    else:
        compared = load_arms(args.file, args.overrides, preset=args.preset)
        storage = checked(args.storage)
        name = _new_name(args, storage, Path(args.file).stem)
    _have_data(compared.example, args)
    compared.example.data.examine()
    _join(args.address, compared.example.workers)
    from tfkd_ray.tune import prepare

    prepare(compared.example, storage)
    taken = read_experiment(given)["space"]["seed"] if compared.experiment else None
    seeds = [seed for seed in range(FIRST_SEED, FIRST_SEED + args.seeds + 1) if seed != taken][: args.seeds]
    options = {"teacher_per_seed": args.teacher_per_seed, "hold_out": args.train_only}
    storage.check_new(name)  # tuning baselines takes a while
    new_comparison(compared, seeds, storage.folder / name, strict=args.fail_if_not_better, **options)
    return _compare(Experiment(storage, name), args.address)


def _tuned_baselines(sweep: "Experiment", rivals: Sequence[str], args: argparse.Namespace) -> Path | None:
    """Tune the baselines that a sweep did not tune as hard as its winner; the sweep that did, or None if none lacks."""
    from tfkd_ray.arms import baseline_space, untuned
    from tfkd_ray.experiment import read_experiment, read_records
    from tfkd_ray.schema import ConfigError
    from tfkd_ray.storage import to_resume

    storage, experiment, name = sweep.storage, sweep.folder, f"{sweep.name}-baselines"
    storage.fetch(name, to_resume)
    lacking = {name: n for name, n in untuned(experiment).items() if name in rivals}
    if not lacking:
        return None
    tuned = storage.folder / name
    if not (tuned / "experiment.yaml").is_file():
        space = baseline_space(experiment, lacking)
        _say(f"baselines: {' and '.join(lacking)} had fewer trials than the winner's objective; tuning them first, in "
             f"{_short(tuned)}")  # fmt: skip
        _have_data(space.example, args)
        space.example.data.examine()
        _join(args.address, space.example.workers)
        from tfkd_ray.tune import build_tuner

        def build(shown: Any) -> Any:
            return build_tuner(space, name=name, storage=storage, callbacks=[shown], on_note=shown.note)

        _fit(_progress(tuned), build, tuned)
    ended = [r.objective for r in read_records(tuned) if r.status in ("done", "stopped", "failed")]
    if short := {name: n - ended.count(name) for name, n in lacking.items() if ended.count(name) < n}:
        missing = ", ".join(f"{n} trials of {name}" for name, n in short.items())
        more = sum(short.values()) - (read_experiment(tuned)["space"]["search"]["num_samples"] - len(ended))
        extra = f" --add-trials {more}" if more > 0 else ""
        raise ConfigError(f"lacks {missing}; tune them first: tfkd resume {_word(tuned)}{extra}", tuned)
    return tuned


def _compare(comparison: "Experiment", address: str | None) -> int:
    """Run what a comparison still lacks, then open the test split and print the table."""
    from tfkd_ray.arms import read_comparison

    directory = comparison.folder
    compared = read_comparison(directory)
    if not compared.is_trained:
        _join(address, compared.runs[0].config.workers)
        ended = _fit_arms(compared, comparison)
        if not ended:
            return FAILED if ended is None else _interrupted(directory)
    from tfkd_ray.confirm import judge_on_test, table

    said: list[str] = []

    def opened(run: str) -> None:
        if not said:
            _say("opening the test split")
        said.append(run)

    try:
        result = judge_on_test(comparison, opened)
    except KeyboardInterrupt:
        return _interrupted(directory)
    print("\n".join(table(result)))
    print(f"\nwritten to {_short(directory)}/confirm.json")
    if compared.strict and not all(found["verdict"] == "better" for found in result["verdicts"]):
        return NOT_BETTER
    return OK if all(run["status"] == "done" for arm in result["arms"] for run in arm["runs"]) else FAILED


def _fit_arms(compared: "Comparison", comparison: "Experiment") -> bool | None:
    """Train the runs that a comparison lacks; see `_fit`."""
    from tfkd_ray.confirm import comparison_tuner

    progress = _progress(comparison.folder)
    teachers = [teacher for run in compared.runs_on_data if (teacher := run.config.teacher_run())]
    told = _teacher_lines(teachers, comparison.storage.folder)
    return _fit(
        progress,
        lambda shown: comparison_tuner(comparison, callbacks=[shown], on_teacher=told, on_note=shown.note),
        comparison.folder,
    )


# --- export ----------------------------------------------------------------------------------------------------


def _export(args: argparse.Namespace) -> int:
    from tfkd_ray.export import ExportFailed, export

    source = _to_export(args.source)
    out = args.out or Path(f"{source.absolute().name}-export")
    try:
        made = export(source, out, arm=args.arm, seed=args.seed, onnx=args.onnx, licence=args.licence)
    except ExportFailed as error:
        _say(f"tfkd export: {error}")
        return FAILED
    for name, found in made["differences"].items():
        print(
            f"{name}: logits differ by at most {found['largest']:.2g} (the largest is {found['scale']:.3g}) on "
            f"{made['images']} images of {made['split']}"
        )
    for name, why in made["problems"].items():
        _say(f"{name}: not written: {why}")
    print(f"{made['name']} is in {_short(Path(made['folder']))}")
    return FAILED if made["problems"] else OK


def _to_export(place: "Path | str") -> Path:
    """What is exported, on this machine: of a sweep's URL the best trial's weights, else all below the URL."""
    if isinstance(place, Path):
        return place
    from tfkd_ray.readers import best_of
    from tfkd_ray.storage import all_but_run_states, opened, storage_at

    url, _, trial = str(storage_at(place)).partition("/trials/")
    found = opened(url)
    found.storage.fetch_comparisons()
    if trial:
        source = folder = found.folder / "trials" / trial
    elif (found.folder / "confirm.yaml").is_file():
        return opened(url, all_but_run_states).folder
    else:
        source, folder = found.folder, best_of(found.folder)[0].folder
    found.storage.bring(folder / "student.safetensors")
    return source


# --- teachers --------------------------------------------------------------------------------------------------


def _teacher(args: argparse.Namespace) -> int:
    from tfkd_ray.experiment import read_teachers
    from tfkd_ray.schema import ConfigError, did_you_mean, dump_yaml
    from tfkd_ray.storage import storage_at

    storage = storage_at(args.storage)
    storage.check()
    storage.fetch("teachers")
    found = {about["name"]: about for about in read_teachers(storage.folder)}
    if args.do == "list":
        print(f"{'teacher':<36} {'data':<14} {'epochs':>6} {'val_accuracy':>12}")
        for name, about in found.items():
            accuracy = about["metrics"].get("val_accuracy")
            shown = "" if accuracy is None else f"{accuracy:.4f}"
            print(f"{name:<36} {about['config']['data']['name']:<14} {_epochs_of(about):>6} {shown:>12}")
        return OK
    if args.name not in found:
        hint = did_you_mean(args.name, found) if found else "there is none"
        raise ConfigError(f"no teacher {args.name!r}; {hint}", storage.folder / "teachers")
    print(dump_yaml(found[args.name]), end="")
    return OK


def _epochs_of(about: dict[str, Any]) -> str:
    return "given" if about["config"].get("weights") else f"{about['metrics']['epoch']:.0f}"


def _teacher_train(args: argparse.Namespace) -> int:
    from tfkd_ray.arms import is_arms_file, load_arms
    from tfkd_ray.cluster_verbs import teacher_as_job
    from tfkd_ray.schema import ConfigError

    if is_arms_file(args.file):
        arms = load_arms(args.file, args.overrides).arms
        runs = [run for arm in arms if (run := arm.config.teacher_run())]
    else:
        runs = _load(args).teacher_runs()
    if not runs:
        raise ConfigError("none of its objectives needs a teacher", args.file)
    runs = list({run.fingerprint(): run for run in runs}.values())
    if (code := teacher_as_job(args, runs[0])) is not None:
        return code
    _have_data(runs[0], args)
    _join(args.address, 1)
    from tfkd_ray.storage import checked
    from tfkd_ray.tune import TeacherFailed, prepare, train_teachers

    storage = checked(args.storage)
    runs = [run.pinned() for run in runs]
    try:
        for run in runs:
            prepare(run, storage)
        train_teachers(runs, storage, _teacher_line)
    except TeacherFailed as error:
        _say(f"tfkd: {error}")
        return FAILED
    from tfkd_ray.teachers import teacher_folder

    for run in runs:
        print(_short(teacher_folder(run, storage.folder)))
    return OK


# --- the other verbs -------------------------------------------------------------------------------------------


def _train(args: argparse.Namespace) -> int:
    from tfkd_ray.schema import ConfigError

    if isinstance(args.storage, str):
        raise ConfigError("one run is made on this machine's disk: name a directory, or leave it out", "--storage")
    space = _load(args)
    config = space.single()
    out = (
        (args.out or args.storage / f"{Path(args.file).stem}-{time.strftime('%Y%m%d-%H%M%S')}").expanduser().absolute()
    )
    from tfkd_ray.experiment import check_writable

    check_writable(out, "--out DIR")
    _have_data(config, args)
    for note in config.try_networks():
        _say(f"note: {note}")
    config = _same_run(config, out)
    pressed: list[int] = []

    def after_the_epoch(number: int, frame: Any) -> None:
        """Ctrl-C once: at the end of the epoch, where the state can be saved. Twice: at once."""
        pressed.append(number)
        signal.signal(number, signal.default_int_handler)

    try:
        epochs = _epochs(config, out, args.storage.expanduser().absolute())
        for metrics in epochs:
            shown = {k: metrics[k] for k in ("train_loss", "val_accuracy", "val_nll", "lr") if k in metrics}
            _say(f"epoch {metrics['epoch']:.0f}: " + ", ".join(f"{k} {v:.4g}" for k, v in shown.items()))
            if not pressed:
                signal.signal(signal.SIGINT, after_the_epoch)
            elif metrics["epoch"] < config.epochs:
                epochs.close()
                _say(f"interrupted; the same command with --out {_short(out)} goes on where it was")
                return INTERRUPTED
    except (ArithmeticError, RuntimeError) as error:
        _say(f"tfkd train: failed: {error}")
        return FAILED
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    name = "val_accuracy" if "val_accuracy" in metrics else "train_loss"
    print(f"{name} {metrics[name]:.4f} after {metrics['epoch']:.0f} epochs, in {_short(out)}")
    return OK


def _same_run(config: "TrainConfig", out: Path) -> "TrainConfig":
    """The run with the digest of its data; a ConfigError where a directory holds another run, or one on other data."""
    from tfkd_ray.config import TrainConfig
    from tfkd_ray.schema import ConfigError, read_yaml, validated

    path = out / "config.yaml"
    if path.exists():
        there = validated(TrainConfig, read_yaml(path), path)
        config = config.with_digest(there.data.digest)
        if there.fingerprint() != config.fingerprint():
            raise ConfigError("holds another run (see its config.yaml); choose another directory: --out DIR", out)
    return config.pinned()


def _epochs(config: "TrainConfig", out: Path, storage: Path) -> Any:
    """The epochs of one run, each also a line of metrics.jsonl: here, or on Ray Train if it has several workers."""
    import json

    from tfkd_ray.experiment import write_text
    from tfkd_ray.schema import dump_yaml
    from tfkd_ray.teachers import find_or_train

    if config.workers > 1:
        _join(None, config.workers)
        from tfkd_ray.cluster import check_room

        check_room(config)
    teacher = find_or_train(config, storage, _say)
    write_text(out / "config.yaml", dump_yaml(config.model_dump(mode="json")))
    if config.workers > 1:
        from tfkd_ray.assignment import Assignment
        from tfkd_ray.storage import Directory
        from tfkd_ray.trial import Group

        assignment = Assignment(out.name, config.epochs, directory=out, storage=Directory(storage))
        group = Group(config, out / "group", _say)
        source: Any = group.epochs(config.model_dump(mode="json"), assignment)
    else:
        from tfkd_ray.loop import train_in

        source = train_in(out, config, teacher=teacher, say=_say)
    lines: list[str] = []
    try:
        for metrics in source:
            lines.append(json.dumps(metrics) + "\n")
            write_text(out / "metrics.jsonl", "".join(lines))
            yield metrics
    finally:
        source.close()
        if config.workers > 1:
            group.close()


def _best(args: argparse.Namespace) -> int:
    import json

    from tfkd_ray.readers import best_lines, best_of, front_of, read_lasts
    from tfkd_ray.schema import ConfigError, dump_yaml
    from tfkd_ray.storage import opened

    experiment = opened(args.experiment).folder
    winner, plan = best_of(experiment)
    front, records = [winner], read_lasts(experiment)
    if len(plan.metrics) > 1:
        from tfkd_ray.experiment import pareto

        front = pareto(records, plan.metrics)
        if not front:
            raise ConfigError(f"no trial of full length has a value of {' and of '.join(plan.metrics)}", experiment)
    found = front_of(front, plan, len(records))
    if args.json:
        print(json.dumps(found, indent=1))
        return OK
    print("\n".join(f"# {line}" for line in best_lines(found, experiment)))
    print(dump_yaml(front[0].config), end="")
    return OK


def _trials(args: argparse.Namespace) -> int:
    from tfkd_ray.readers import trials_table
    from tfkd_ray.storage import opened

    print(
        trials_table(
            opened(args.experiment).folder,
            sort=args.sort,
            filter=args.filter,
            columns=args.columns,
            limit=args.limit,
            output=args.output,
        )
    )
    return OK


def _status(args: argparse.Namespace) -> int:
    import json

    from tfkd_ray.readers import follow_status, status, status_lines
    from tfkd_ray.storage import kept_up_to_date, opened

    shown, experiment = "", opened(args.experiment).folder
    try:
        with kept_up_to_date([args.experiment] if args.follow else []):
            for found in follow_status(experiment) if args.follow else [status(experiment)]:
                text = json.dumps(found, indent=1) if args.json else "\n".join(status_lines(found))
                if text != shown:
                    if args.follow and sys.stdout.isatty() and sys.__stdout__ is not None:
                        print("\x1b[H\x1b[2J", end="", file=sys.__stdout__)  # which text may not say
                    print(text, flush=True)
                shown = text
    except KeyboardInterrupt:
        return INTERRUPTED
    return OK


def _logs(args: argparse.Namespace) -> int:
    from tfkd_ray.readers import logs
    from tfkd_ray.storage import kept_up_to_date, opened

    experiment = opened(args.experiment).folder
    try:
        with kept_up_to_date([args.experiment] if args.follow else []):
            for line in logs(experiment, args.trial, follow=args.follow):
                print(line, flush=True)
    except KeyboardInterrupt:
        return INTERRUPTED
    return OK


def _ls(args: argparse.Namespace) -> int:
    import json

    from tfkd_ray.readers import ls, ls_lines
    from tfkd_ray.storage import storage_at

    storage = storage_at(args.storage)
    storage.fetch_experiments()
    found = ls(storage.folder)
    print(json.dumps(found, indent=1) if args.json else "\n".join(ls_lines(found)))
    return OK


def _report(args: argparse.Namespace) -> int:
    from tfkd_ray.arms import comparisons_of
    from tfkd_ray.report import report
    from tfkd_ray.storage import absolute, opened

    sweep = opened(args.experiment)
    sweep.storage.fetch_comparisons()
    experiment = absolute(sweep.folder)
    found = [opened(place).folder for place in args.confirm or ()] or comparisons_of(experiment)
    for path in report(experiment, args.out, figures=args.figures, comparisons=found):
        print(path)
    return OK


_HOW_TO_COMPARE = """\
1. Time Series: filter the runs (tfkd_reg), pin hp/value, set smoothing to 0.
2. HParams, Table: tick the columns you want (5 are ticked), sort by the value.
3. HParams, Parallel Coordinates and Scatter Plot Matrix: untick columns that
   some trials lack, else those trials are not drawn; log scale for lr; drag
   along the value's axis to keep the best, and read which T and alpha are left.
4. Custom Scalars: the value by objective, and the intervals of confirmed arms.
5. Text: how a trial differs from plain training, and how to run it again.
A trial that runs, or was interrupted, has the status Unknown."""


def _tensorboard(args: argparse.Namespace) -> int:
    import tempfile

    from tensorboard import program

    from tfkd_ray.experiment import read_experiment
    from tfkd_ray.storage import kept_up_to_date, opened, with_events

    given = [opened(place, with_events).folder for place in args.experiments]
    for experiment in given:
        if not (experiment / "confirm.yaml").is_file():
            read_experiment(experiment)
    _check_port(args.port)
    # of two with the same name, the later ones get numbers
    experiments: dict[str, Path] = {}
    for path in dict.fromkeys(path.resolve() for path in given):
        experiments[path.name if path.name not in experiments else f"{path.name}-{len(experiments) + 1}"] = path
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with (
        contextlib.suppress(KeyboardInterrupt),
        tempfile.TemporaryDirectory(prefix="tfkd-tensorboard-") as folder,
        kept_up_to_date(args.experiments, with_events),
    ):
        several = len(experiments) > 1

        def link() -> None:
            if several:
                from tfkd_ray.tensorboard import side_by_side

                side_by_side(Path(folder), experiments)

        link()
        board = program.TensorBoard()
        logdir = folder if several else str(next(iter(experiments.values())) / "tb")
        # of a run's files, all are read; no epoch is left out
        board.configure(argv=["tensorboard", "--logdir", logdir, "--host", "127.0.0.1", "--port", str(args.port),
                              "--reload_multifile", "true", "--samples_per_plugin", "scalars=5000"])  # fmt: skip
        with contextlib.redirect_stderr(io.StringIO()):  # its advice on its flags
            url = board.launch()
        _say(f"TensorBoard: {url} (Ctrl-C ends it)\n{_HOW_TO_COMPARE}")
        while True:
            time.sleep(2)
            link()
    return OK


def _check_port(port: int) -> None:
    """Raise a ConfigError that names the next free port, if this one cannot be used."""
    import socket

    from tfkd_ray.schema import ConfigError

    def problem(port: int) -> str | None:
        try:
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(("127.0.0.1", port))
        except OSError as error:
            return str(error.strerror)
        return None

    if port > 65535:
        raise ConfigError(f"ports end at 65535, got {port}", "--port")
    if why := problem(port):
        free = next((p for p in range(max(port, 1023) + 1, 65536) if not problem(p)), 0)
        raise ConfigError(f"{port} cannot be used ({why}); the next free one: --port {free}", "--port")


if __name__ == "__main__":
    sys.exit(main())
