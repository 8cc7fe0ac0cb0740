"""The command line: `tfkd VERB ...`. Every verb imports what it needs when it runs.

Results go to standard output, progress and errors to standard error. Exit codes: 0 done, 1 failed, 2 wrong input,
7 not better (confirm), 130 interrupted.
"""

import atexit
import contextlib
import io
import json
import os
import signal
import sys
import threading
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tfkd_ray import __version__
from tfkd_ray.cli.compare import confirm_verb
from tfkd_ray.cli.guide import (
    GIVEN,
    SHELLS,
    Parser,
    check_verb_words,
    overview,
    refuse_rest,
    verbs_of,
)
from tfkd_ray.cli.show import (
    best_verb,
    check_verb,
    compare_verb,
    doctor_verb,
    explain_verb,
    export_verb,
    logs_verb,
    ls_verb,
    plan_verb,
    report_verb,
    status_verb,
    tensorboard_verb,
    trials_verb,
)
from tfkd_ray.cli.start import completion_verb, init_verb, spaces_verb
from tfkd_ray.cli.stop import stop_verb
from tfkd_ray.cli.sweep import resume_verb, tune_verb
from tfkd_ray.cli.terminal import (
    BUDGET_OPTIONS,
    DEFAULT_BASELINES,
    DEFAULT_SEEDS,
    DEFAULT_STORAGE,
    DEFAULT_TOP_K,
    check_names,
    experiment_place,
    let_end,
    newest_experiment,
    place_or_url,
    say_error,
    sweep_or_arms,
)
from tfkd_ray.cli.train import teacher_train_verb, teacher_verb, train_verb
from tfkd_ray.settings.errors import FAILED, INTERRUPTED, OK, WRONG_INPUT, ConfigError, Unreachable
from tfkd_ray.settings.own_code import enter_job
from tfkd_ray.settings.passwords import HIDDEN, masked

EXPERIMENT = "name in ./tfkd_results, directory or URL of the experiment; @last: the newest"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code."""
    _prepare_process()
    argv, command = _command_of(_given_words() if argv is None else list(argv))
    try:
        from tfkd_ray.settings.files import Legible

        with contextlib.redirect_stderr(Legible(sys.stderr)):
            args = _parsed_args(argv)
    except ModuleNotFoundError as error:
        return _not_installed(argv[0] if argv else "", error)
    except SystemExit as end:  # `--help`, or a wrong option
        return _ended_by_parser(end)
    except ConfigError as error:
        say_error(f"tfkd {argv[0]}: {error}")
        return WRONG_INPUT

    args.command = command
    try:
        check_names(args)
        with contextlib.redirect_stdout(_shown_output(args)), _without_reset_at_exit():
            code: int = args.run(args)
        sys.stdout.flush()
        if code == INTERRUPTED:
            let_end()
        return code
    except ConfigError as error:
        say_error(f"tfkd {args.verb}: {error}")
        return FAILED if isinstance(error, Unreachable) else WRONG_INPUT
    except KeyboardInterrupt:
        let_end()
        nothing = (
            " before a trial ran, so there is nothing to resume" if args.verb == "tune" else ""
        )
        say_error(f"tfkd {args.verb}: interrupted{nothing}")
        return INTERRUPTED
    except ModuleNotFoundError as error:
        return _not_installed(args.verb, error)
    except BrokenPipeError:
        return _no_reader()
    except OSError as error:
        sentence = _file_trouble(error)
        if sentence is None:
            raise
        say_error(f"tfkd {args.verb}: {sentence}")
        _drop_what_cannot_be_written()
        return FAILED


def _shown_output(args: Namespace) -> Any:
    """Return standard output, escaped; on a terminal, long lines for people end at a space."""
    from tfkd_ray.settings.columns import folded, terminal_width
    from tfkd_ray.settings.files import Legible

    for_programs = getattr(args, "json", False) or getattr(args, "output", "table") != "table"
    width = terminal_width(sys.stdout)
    if width is None or for_programs or args.verb in ("best", "completion", "report"):
        return Legible(sys.stdout)
    return Legible(sys.stdout, lambda text: folded(text, width))


@contextlib.contextmanager
def _without_reset_at_exit() -> Iterator[None]:
    """Keep colorama, which Ray imports, from writing an escape to our output at exit."""
    try:
        yield
    finally:
        if colorama := sys.modules.get("colorama.initialise"):
            atexit.unregister(colorama.reset_all)


def _prepare_process() -> None:
    """Make the output streams safe to write to, and SIGTERM the same as Ctrl-C; enter the job."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the parent process
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115
        if isinstance(stream := getattr(sys, name), io.TextIOWrapper):
            # in names that are not UTF-8, or not in the terminal's encoding
            stream.reconfigure(errors="backslashreplace")
    enter_job()
    if (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    ):
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # at any moment


def _ended_by_parser(end: SystemExit) -> int:
    """Raise the end of the parser again, after its output is written; else return an exit code."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        return _no_reader()
    except OSError as error:
        say_error(f"tfkd: {_file_trouble(error) or error}")
        _drop_what_cannot_be_written()
        return FAILED
    raise end


def _no_reader() -> int:
    """Return the exit code where the reader of our output closed it: no failure of ours."""
    _drop_what_cannot_be_written()
    return OK


def _drop_what_cannot_be_written() -> None:
    """Send the rest of our output nowhere if it fails; else Python fails again as it ends."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _file_trouble(error: OSError) -> str | None:
    """Return what is wrong with a file or the disk; None if the error names neither."""
    from tfkd_ray.settings.files import DISK_ERRORS

    if _directory_is_gone():
        return "the working directory no longer exists; cd to another one"
    if error.filename is None and error.errno not in DISK_ERRORS:
        return None
    name = str(error.filename or "the disk")
    if len(name) >= 300:
        name = f"{name[:200]}..."
    return f"{name}: {error.strerror}"


def _directory_is_gone() -> bool:
    """Return whether the working directory was deleted; `Path().exists()` may still be true."""
    try:
        Path.cwd()
    except FileNotFoundError:
        return True
    return False


def _not_installed(verb: str, error: ModuleNotFoundError) -> int:
    """Report that this Python, perhaps the one of a cluster's head, lacks a package."""
    say_error(
        f"tfkd {verb}: {sys.executable} has no {error.name!r}, which tfkd needs; install tfkd in that environment (on "
        "a cluster, jobs run with the `python` of the environment that Ray was started from)"
    )
    return FAILED


def _parsed_args(argv: list[str]) -> Namespace:
    """Parse the arguments; also keep them as `words`, with a parser, for jobs that forward them."""
    parser = _parser()
    if argv[:1] == ["help"]:
        argv = [*argv[1:], "--help"]
    if not argv:
        say_error(overview(verbs_of(parser)))
        raise SystemExit(WRONG_INPUT)
    verb = check_verb_words(parser, argv)
    args, rest = parser.parse_known_args(argv)
    vars(args).pop(GIVEN, None)
    # argparse takes all positional arguments in one place; overrides may stand between and after
    # options
    if any(word.startswith("-") or not hasattr(args, "overrides") for word in rest):
        refuse_rest(parser, verb, rest, argv)
    if rest:
        args.overrides += rest
    _check_blanks(getattr(args, "overrides", []))
    args.words, args.parsed = argv, _parsed_args
    if getattr(args, "experiment", "") is None:
        args.experiment = newest_experiment()
        say_error(f"experiment: {args.experiment} (the newest)")
    if args.verb == "confirm":
        args.file = sweep_or_arms(args.file)
    return args


def _check_blanks(overrides: list[str]) -> None:
    """Raise a ConfigError that names the setting which blanks around = have cut into words."""
    for n, word in enumerate(overrides):
        after = overrides[n + 1 : n + 2] if word.endswith("=") else []
        if word.startswith("=") or any("=" not in value for value in after):
            before = overrides[max(0, n - 1) : n] if word.startswith("=") else []
            parts = [*before, word, *after]
            raise ConfigError(
                f"{' '.join(parts)}: the shell splits words at blanks; write {''.join(parts)}",
                "command line",
            )


_WORDS = "TFKD_WORDS"
"""Environment variable with the words, passwords included, of a process that was re-executed."""


def _given_words() -> list[str]:
    """Return the words of the command line; re-execute with passwords moved to the environment.

    Ray lists a driver's command line, and `ps` shows everyone's.
    """
    given = os.environ.pop(_WORDS, None)
    if given is not None:
        return [str(word) for word in json.loads(given)]
    words = sys.argv[1:]
    shown = without_secret_words(words)
    if shown != words:
        os.environ[_WORDS] = json.dumps(words)
        start = sys.orig_argv[1 : len(sys.orig_argv) - len(words)]
        os.execv(sys.executable, [sys.executable, *start, *shown])
    return words


def without_secret_words(words: Sequence[str]) -> list[str]:
    """Return the words with *** for passwords, and for the command of `--on-end`."""
    shown = [masked(word) for word in words]
    if words[:1] and words[0] in ("tune", "resume", "confirm"):
        for place, word in enumerate(words[1:], start=1):
            option, equals, _ = word.partition("=")
            if len(option) < 3 or not "--on-end".startswith(option):  # argparse takes --on, too
                continue
            if equals:
                shown[place] = f"{option}={HIDDEN}"
            elif place + 1 < len(words):
                shown[place + 1] = HIDDEN
    return shown


def _command_of(argv: list[str]) -> tuple[list[str], list[str]]:
    """Split off the command after `--` in `tfkd cluster submit FILE -- COMMAND`."""
    cut = argv.index("--") if argv[:2] == ["cluster", "submit"] and "--" in argv else len(argv)
    return argv[:cut], argv[cut + 1 :]


def _parser() -> ArgumentParser:
    parser = Parser(prog="tfkd")
    parser.add_argument("--version", action="version", version=f"tfkd {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, run: Callable[[Namespace], int], text: str) -> ArgumentParser:
        sub = verbs.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        return sub

    def file_and_overrides(sub: ArgumentParser, what: str) -> None:
        sub.add_argument("file", help=f"{what}, or the name of one that ships with tfkd")
        sub.add_argument(
            "overrides",
            nargs="*",
            metavar="key.path=value",
            help="settings that override the file's",
        )

    def download(sub: ArgumentParser) -> None:
        _flag(sub, "--download", "download the data set first if it is missing")

    def storage(sub: ArgumentParser) -> None:
        sub.add_argument("--storage", type=place_or_url, default=DEFAULT_STORAGE, metavar="DIR",
                         help="storage of experiments and teachers: a directory, s3://BUCKET/PREFIX or "
                         "gs://BUCKET/PREFIX (default: ./tfkd_results)")  # fmt: skip

    sub = verb("tune", tune_verb, "Run a sweep.")
    file_and_overrides(sub, "a search space")
    download(sub)
    storage(sub)
    sub.add_argument(
        "--name", help="name of the experiment (default: the file's name and the time)"
    )
    _elsewhere(sub)
    _on_end(sub)

    _budgets(sub)
    sub.add_argument(
        "--num-samples", type=_count, metavar="N", help="number of trials, over all objectives"
    )
    sub.add_argument("--prior", type=experiment_place, action="append", default=[], metavar="DIR",
                     help="earlier experiment; the sampler learns from its trials within this space")  # fmt: skip
    sub.add_argument(
        "--study-storage",
        metavar="URL",
        help="URL of the study's Optuna storage (default: a journal in the experiment)",
    )

    sub = verb(
        "resume",
        resume_verb,
        "Resume an interrupted sweep or comparison, or add trials to a sweep.",
    )
    sub.add_argument("experiment", type=experiment_place, help=EXPERIMENT)
    sub.add_argument("--add-trials", type=_count, default=0, metavar="N", help="run N more trials")
    sub.add_argument(
        "--space",
        metavar="FILE",
        help="wider or narrower space to continue in; trials outside it are kept but do not guide the search",
    )
    _flag(sub, "--retry-failed", "retry the failed trials (a comparison always retries them)")
    _budgets(sub)
    sub.add_argument(
        "--study-storage",
        metavar="URL",
        help="URL of the study's Optuna storage, if TFKD_STORAGE does not hold it",
    )
    _elsewhere(sub)
    _on_end(sub)

    sub = verb(
        "stop",
        stop_verb,
        "Stop a running sweep, or single trials of it, from any terminal or machine. tfkd resume continues the sweep.",
    )
    sub.add_argument("experiment", type=experiment_place, help=EXPERIMENT)
    sub.add_argument(
        "trials",
        nargs="*",
        metavar="TRIAL",
        help="trials to end for good: names, their unique beginnings, or numbers (default: stop the whole sweep)",
    )

    sub = verb("spaces", spaces_verb, "List the search spaces and arms files that ship with tfkd.")
    _flag(sub, "--about", "also show the question that each one asks")

    sub = verb(
        "init",
        init_verb,
        "Copy a shipped search space to change it, and fit it to a folder of images.",
    )
    sub.add_argument("name", help="name of a shipped one; tfkd spaces lists them")
    sub.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="folder of images with one folder per class: DIR/CLASS/ (tfkd splits it), or DIR/train/CLASS/ and "
        "DIR/val/CLASS/; sets classes, size, recipe, epochs and batch size for it",
    )
    sub.add_argument(
        "-o", "--out", type=Path, metavar="FILE", help="the copy (default: ./NAME.yaml)"
    )

    sub = verb(
        "completion",
        lambda args: completion_verb(args, parser),
        "Print the completion script of a shell.",
    )
    sub.add_argument("shell", choices=SHELLS, help="the shell that it is for")

    sub = verb(
        "check",
        check_verb,
        "Show what a search space or an arms file runs, and find its mistakes. Starts nothing.",
    )
    file_and_overrides(sub, "a search space or an arms file")
    _flag(sub, "--all", "list every fixed setting, including those at their defaults")

    sub = verb(
        "plan",
        plan_verb,
        "Estimate what a sweep or a comparison of arms costs: trials, epochs, hours, money, disk. "
        "Starts nothing.",
    )
    file_and_overrides(sub, "a search space, an arms file")
    _of_a_comparison(sub, None)
    _flag(
        sub, "--probe", "train each objective for a few steps on this machine to estimate the hours"
    )
    sub.add_argument(
        "--slots",
        type=_count,
        metavar="N",
        help="concurrent trials (default: as many as fit on this machine)",
    )
    sub.add_argument(
        "--gpu-hour-price", type=float, metavar="X", help="price of one GPU for an hour"
    )

    sub = verb(
        "explain",
        explain_verb,
        "Show the loss of each objective in a file, and which searched settings have an effect.",
    )
    file_and_overrides(sub, "a search space, an arms file or a configuration")

    sub = verb("train", train_verb, "Train one configuration: a file without ranges.")
    file_and_overrides(sub, "a configuration file")
    download(sub)
    storage(sub)
    sub.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="directory of the student; a second run with the same DIR resumes the first",
    )

    sub = verb("confirm", confirm_verb, "Judge the best trials of a sweep, or the arms of a file: train them and "
               "tuned baselines with several seeds, and compare them on the test split.")  # fmt: skip
    file_and_overrides(sub, "a sweep (its name, directory or URL), an arms file")
    sub.add_argument(
        "--top-k",
        type=_count,
        default=DEFAULT_TOP_K,
        metavar="K",
        help="confirm the K best trials of a sweep (default: 3)",
    )
    sub.add_argument("--baselines", default=DEFAULT_BASELINES, metavar="LIST",
                     help="baselines of a sweep's best trials (default: ce,lsr,scaled,published)")  # fmt: skip
    _flag(sub, "--fail-if-not-better", "exit with code 7 unless an arm is better")
    download(sub)
    storage(sub)
    _of_a_comparison(sub, DEFAULT_SEEDS)
    sub.add_argument("--preset", choices=["smoke"], help="smoke: shrink the arms for a quick try")
    sub.add_argument(
        "--name", help="name of the comparison (default: the file's name and the time)"
    )
    _elsewhere(sub)
    _on_end(sub)

    sub = verb(
        "export",
        export_verb,
        "Export a student as a folder: weights, graphs, model card.",
    )
    sub.add_argument(
        "source",
        type=experiment_place,
        help="a sweep, a trial's folder, the output of tfkd train, or a comparison",
    )
    sub.add_argument(
        "--arm", help="arm of a comparison (default: the best by verdict, then by mean)"
    )
    sub.add_argument(
        "--seed",
        type=_count,
        help="seed of a comparison (default: the first fully trained one)",
    )
    sub.add_argument(
        "-o", "--out", type=Path, metavar="DIR", help="new directory (default: ./NAME-export)"
    )
    _flag(sub, "--onnx", "also write ONNX (pip install 'tfkd_ray[onnx]')")
    sub.add_argument("--licence", metavar="NAME", help="licence of the weights, such as apache-2.0")

    sub = verb("teacher", teacher_verb, "Train, list or show teachers.")
    actions = sub.add_subparsers(dest="do", required=True, metavar="train|list|show")
    for do, text in (("train", "Train the teachers that a file needs."), ("list", "List the trained teachers."),
                     ("show", "Show how a teacher was made, and its metrics.")):  # fmt: skip
        action = actions.add_parser(do, help=text, description=text)
        storage(action)
        if do == "train":
            action.set_defaults(run=teacher_train_verb)
            download(action)
            file_and_overrides(action, "a search space, an arms file or a configuration")
            _elsewhere(action)
        elif do == "show":
            action.add_argument("name", help="name of the teacher")

    def experiment(sub: ArgumentParser, *, follow: bool = False) -> None:
        sub.add_argument("experiment", type=experiment_place, nargs="?",
                         help=f"{EXPERIMENT} (default: @last)")  # fmt: skip
        if follow:
            sub.add_argument("-f", "--follow", action="store_true", help="follow it until it ends")

    sub = verb(
        "best",
        best_verb,
        "Print the configuration of the best trial, as a file for `tfkd train`. For a sweep with several metrics, "
        "also list the Pareto front: the trials that no other trial beats in all metrics.",
    )
    experiment(sub)
    _flag(sub, "--all", "print every setting, including those at their defaults")
    _flag(sub, "--json", "print JSON, for programs")

    def others(sub: ArgumentParser, nargs: str = "*") -> None:
        sub.add_argument("others", type=experiment_place, nargs=nargs, metavar="EXPERIMENT",
                         help="more experiments, shown side by side with the first")  # fmt: skip

    sub = verb("trials", trials_verb, "List the trials of an experiment, or of several.")
    experiment(sub)
    others(sub)
    sub.add_argument(
        "--sort", default="number", metavar="FIELD[:desc]", help="sort by a metric or a parameter"
    )
    sub.add_argument("--filter", action="append", default=[], metavar="EXPR",
                     help="condition, such as status=done or val_accuracy>0.9; if repeated, all must hold")  # fmt: skip
    sub.add_argument("--columns", metavar="A,B", help="columns to show, in this order")
    sub.add_argument("--limit", type=_count, metavar="N", help="show only the first N")
    sub.add_argument(
        "-o",
        "--output",
        choices=["table", "json", "csv"],
        default="table",
        help="form of the list (default: table); json and csv have all columns",
    )

    sub = verb("status", status_verb, "Show the progress of an experiment, also while it runs.")
    experiment(sub, follow=True)
    _flag(sub, "--json", "print JSON, for programs")

    sub = verb("logs", logs_verb, "Print the log of a trial, one line per epoch.")
    experiment(sub, follow=True)
    sub.add_argument(
        "trial",
        help="a trial's name, the beginning of its name, or its number; or an objective, for all its trials",
    )

    sub = verb("ls", ls_verb, "List experiments and comparisons.")
    storage(sub)
    _flag(sub, "--json", "print JSON, for programs")

    sub = verb(
        "compare",
        compare_verb,
        "Show sweeps side by side: the best trial of each, settings that differ, pairs of equal trials.",
    )
    sub.add_argument("experiment", type=experiment_place, help=EXPERIMENT)
    others(sub, "+")

    sub = verb(
        "report",
        report_verb,
        "Write a report on an experiment or a comparison, or on several sweeps, as one HTML page.",
    )
    experiment(sub)
    others(sub)
    sub.add_argument("-f", "--follow", action="store_true",
                     help="serve the page on 127.0.0.1 instead, and keep it up to date while a sweep runs")  # fmt: skip
    sub.add_argument("--port", type=_count, metavar="N",
                     help="port of the served page (default: 8500; 0: any free port)")  # fmt: skip
    sub.add_argument(
        "-o",
        "--out",
        type=Path,
        metavar="FILE",
        help="output file (default: report.html; - or /dev/stdout: standard output)",
    )
    sub.add_argument("--figures", type=Path, metavar="DIR",
                     help="also write the figures as SVG and PDF, and heat maps as CSV and LaTeX")  # fmt: skip
    sub.add_argument("--confirm", type=experiment_place, action="append", metavar="DIR",
                     help="comparison whose verdict to show (default: all comparisons of this sweep)")  # fmt: skip

    sub = verb(
        "tensorboard",
        tensorboard_verb,
        "Compare the trials of experiments in TensorBoard, on this machine only.",
    )
    sub.add_argument("experiments", type=experiment_place, nargs="+", metavar="EXPERIMENT",
                     help="names, directories or URLs, shown side by side")  # fmt: skip
    sub.add_argument(
        "--port", type=_count, default=6006, help="port (default: 6006; 0: any free port)"
    )

    sub = verb(
        "doctor",
        doctor_verb,
        "Find problems that make a sweep slow, unsafe or stuck, on this machine and on a cluster's nodes.",
    )
    sub.add_argument("--address", help="Ray cluster to check: auto, HOST:PORT or http://HOST:PORT (default: "
                     "RAY_ADDRESS, or this machine alone)")  # fmt: skip
    sub.add_argument("--cluster", metavar="FILE", help="file of the running cluster to check")
    sub.add_argument(
        "--storage",
        type=place_or_url,
        metavar="DIR",
        help="storage of experiments, which all nodes must reach (default: the cluster file's; without one, "
        "./tfkd_results)",
    )
    sub.add_argument("--space", metavar="FILE", help="search space whose trials must fit")
    _flag(sub, "--reap", "remove placement groups of ended jobs")

    _cluster_parser(
        verb("cluster", _cluster, "Check, start, watch and stop clusters; see docs/clusters.md.")
    )
    return parser


def _flag(sub: ArgumentParser, option: str, text: str) -> None:
    sub.add_argument(option, action="store_true", help=text)


def _elsewhere(sub: ArgumentParser) -> None:
    """Add the options that say where a sweep runs."""
    sub.add_argument("--address", help="Ray cluster to run on: auto, HOST:PORT, or http://HOST:PORT to run as a job "
                     "(default: RAY_ADDRESS, or a new cluster here)")  # fmt: skip
    sub.add_argument(
        "--cluster", metavar="FILE", help="file of a running cluster, to run on as a job"
    )
    _flag(sub, "--detach", "do not follow the job")


def _on_end(sub: ArgumentParser) -> None:
    sub.add_argument(
        "--on-end",
        metavar="COMMAND",
        help="shell command to run at the end, with TFKD_EXPERIMENT and TFKD_STATUS (finished, stopped or failed) in "
        "its environment",
    )


def _cluster_parser(sub: ArgumentParser) -> None:
    actions = sub.add_subparsers(
        dest="do", required=True, metavar="check|up|status|submit|logs|down"
    )
    for do, text in (
        ("check", "Check a cluster file. Starts nothing."),
        ("up", "Start the cluster. Leaves a running one unchanged."),
        ("status", "Show the cluster's jobs and its running nodes, which cost money."),
        ("submit", "Run a command on the cluster, as a job."),
        ("logs", "Follow a job."),
        ("down", "Stop the cluster, and wait until its nodes are gone."),
    ):
        action = actions.add_parser(do, help=text, description=text)
        action.add_argument("file", help="a cluster file, or the name of one that ships with tfkd")
        if do == "check":
            action.add_argument(
                "--space", metavar="FILE", help="search space whose trials must fit on it"
            )
            continue
        _flag(action, "--print", "print the commands instead of running them")
        if do == "submit":
            _flag(action, "--detach", "do not follow the job")
            action.usage = "%(prog)s [--print] [--detach] FILE -- COMMAND"
        elif do == "logs":
            action.add_argument("job", nargs="?", help="job to follow (default: the newest)")


def _cluster(args: Namespace) -> int:
    from tfkd_ray.launch.verbs import cluster

    return cluster(args)


def _budgets(sub: ArgumentParser) -> None:
    """Add the options that end a sweep, each named after its setting in `search`."""
    for option, name, unit, text in BUDGET_OPTIONS:
        sub.add_argument(option, dest=name, metavar=unit, type=int if unit == "N" else float,
                         help=f"end the sweep after this many {text}; tfkd resume continues it")  # fmt: skip


def _of_a_comparison(sub: ArgumentParser, seeds: tuple[int | None, int] | None) -> None:
    """Add the options that say which runs a comparison has."""
    sub.add_argument(
        "--seeds",
        type=_seeds,
        default=seeds,
        metavar="N|FIRST..LIMIT",
        help="seeds per arm (default: 5; 5 detect a gain of about a point, 10 of half a point). FIRST..LIMIT, such as "
        "3..20: add seeds until every verdict is settled",
    )
    _flag(sub, "--train-only", "train on the train split alone (default: on train and validation)")
    _flag(sub, "--teacher-per-seed", "train a teacher for each seed (default: for tfkd_self alone)")


def _seeds(text: str) -> tuple[int | None, int]:
    """Return (None, N), or (first look, limit) of a sequential comparison."""
    first, dots, limit = text.partition("..")
    if not dots:
        return None, _count(text)
    return _count(first), _count(limit)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) > 10**9:
        raise ArgumentTypeError(f"a whole number, got {text!r}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
