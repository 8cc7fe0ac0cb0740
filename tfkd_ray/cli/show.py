"""The reading verbs: doctor, check, plan, explain, status, trials, report, export, ..."""

import contextlib
import functools
import io
import os
import signal
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tfkd_ray.learn.config import TrainConfig
    from tfkd_ray.settings.yaml import Tree
    from tfkd_ray.show.plan import SweepPlan
    from tfkd_ray.space.arms import Arm
    from tfkd_ray.space.space import Parameter, Space
    from tfkd_ray.store.experiment import Record
from tfkd_ray.cli.fit import join_ray
from tfkd_ray.cli.terminal import (
    DEFAULT_SEEDS,
    DEFAULT_STORAGE,
    how_made,
    load_file,
    resume_command,
    say_error,
    short_path,
)
from tfkd_ray.settings.columns import terminal_width, wrapped
from tfkd_ray.settings.errors import FAILED, INTERRUPTED, OK, ConfigError, Sentences, in_file


def doctor_verb(args: Namespace) -> int:
    from tfkd_ray.launch.as_job import doctor_as_job
    from tfkd_ray.space.space import load_space

    shape = load_space(args.space).example if args.space else None
    if (code := doctor_as_job(args, shape)) is not None:
        return code
    connected = bool(args.address or os.environ.get("RAY_ADDRESS"))
    if connected:
        join_ray(args.address, 1)
    from tfkd_ray.launch.doctor import doctor
    from tfkd_ray.store.storage import absolute, storage_at

    place = args.storage or (None if connected else DEFAULT_STORAGE)
    if isinstance(place, Path):
        place = absolute(place)
    storage = None if place is None else storage_at(place)
    found = doctor(storage, shape, reap=args.reap, connected=connected)
    print("\n".join(one.line() for one in found))
    return FAILED if any(one.level == "problem" for one in found) else OK


# --- check -----------------------------------------------------------------------------------------------------


def check_verb(args: Namespace) -> int:
    from tfkd_ray.show.plan import ratios_of, unlabelled_ratio
    from tfkd_ray.space.arms import is_arms_file, load_arms
    from tfkd_ray.space.explain import warnings_of
    from tfkd_ray.space.fitted import size_notes

    notes: list[str] = []
    ratios: list[float] = []
    if is_arms_file(args.file):
        if args.all:
            raise ConfigError(
                "--all: is for search spaces; an arms file has a configuration for each arm",
                args.file,
            )
        compared = load_arms(args.file, args.overrides)
        example = compared.example
        if compared.title:
            print(*wrapped(compared.title), sep="\n")
        print(f"{len(compared.arms)} arms:")
        for arm in compared.arms:
            print(*wrapped(_arm_text(arm), first="  ", rest="    "), sep="\n")
            with in_file(args.file):
                notes += arm.config.try_own_code()
            ratios.append(unlabelled_ratio(arm.config))
    else:
        space = load_file(args)
        notes += space.try_own_code()
        example = space.example
        ratios += [ratio for branch in space.branches for ratio in ratios_of(branch)]
        print("\n".join([*_describe(space), *_fixed(space, whole=args.all), *print_notes(space)]))
        for warning in warnings_of(space):
            print(*wrapped(f"warning: {warning}"), sep="\n")
    for note in dict.fromkeys(notes):
        print(*wrapped(f"note: {note}"), sep="\n")
    try:
        example.data.check()
        for line in _about_data(example, ratios):
            print(*wrapped(line), sep="\n")
    except ConfigError as error:  # a file may be checked on a machine without its data
        print(*wrapped(f"note: on this machine {error}"), sep="\n")
        return OK
    if example.data.streams:  # else the images would be loaded
        for note in size_notes(example):
            print(*wrapped(f"note: {note}"), sep="\n")
    return OK


def _arm_text(arm: "Arm") -> str:
    """Return an arm's name, role, objective with its settings, and teachers."""
    from tfkd_ray.show.report import objective_text

    text = f"{arm.name} ({arm.part}): {objective_text(arm.config.objective.tree)}"
    made = dict.fromkeys(how_made(run) for run in arm.config.teacher_runs())
    return "; teacher, ".join([text, *made])


def _about_data(example: "TrainConfig", ratios: Sequence[float]) -> Sentences:
    """Yield how many unlabelled images there are, and notes on the data.

    Args:
        ratios: for each labelled image of a step, in all of the file; 0 where there are none.
    """
    from tfkd_ray.learn.dataset import notes_on

    if example.data.unlabelled is not None:
        yield _of_unlabelled(example, ratios)
    yield from (f"note: {note}" for note in notes_on(example.data))


def _of_unlabelled(example: "TrainConfig", ratios: Sequence[float]) -> str:
    """Return how many unlabelled images there are; see `_about_data`."""
    from tfkd_ray.learn.unlabelled import number_beside

    data = example.data
    count, size = len(data.load_unlabelled()), example.optim.batch_size
    numbers = sorted({number_beside(size, ratio) for ratio in ratios if ratio})
    each = " to ".join(map(str, dict.fromkeys((numbers[0], numbers[-1]))))
    return f"unlabelled images: {count} ({data.unlabelled}), {each} beside {size} labelled ones in a step"


def plan_verb(args: Namespace) -> int:
    try:
        return _plan(args)
    except ProbeFailed as error:
        say_error(f"tfkd plan: {error}")
        return FAILED


def _plan(args: Namespace) -> int:
    from tfkd_ray.show.plan import lines, plan, slots_here
    from tfkd_ray.space.arms import is_arms_file

    if args.slots == 0:
        raise ConfigError("--slots: at least 1, got 0")
    if is_arms_file(args.file):
        return _plan_comparison(args)
    given = {
        "--seeds": args.seeds,
        "--train-only": args.train_only,
        "--teacher-per-seed": args.teacher_per_seed,
    }
    if ignored := [option for option, value in given.items() if value]:
        problems = [f"{option}: is for an arms file, not for a search space" for option in ignored]
        raise ConfigError(problems, args.file)
    space = load_file(args)
    found = _maybe_probed(space.example, functools.partial(plan, space), probe=args.probe)
    slots = args.slots or slots_here(space)
    print("\n".join(lines(found, slots=slots, gpu_hour_price=args.gpu_hour_price)))
    return OK


def _plan_comparison(args: Namespace) -> int:
    from tfkd_ray.cli.compare import check_seeds
    from tfkd_ray.show.plan import lines, plan_comparison, run_slots_here
    from tfkd_ray.space.arms import load_arms, seeds_from

    first_look, most = args.seeds or DEFAULT_SEEDS
    check_seeds(first_look, most)
    compared = load_arms(args.file, args.overrides)
    make = functools.partial(
        plan_comparison,
        compared,
        seeds_from(most),
        teacher_per_seed=args.teacher_per_seed,
        hold_out=args.train_only,
    )
    found = _maybe_probed(compared.example, make, probe=args.probe)
    slots = args.slots or run_slots_here(compared.example, sum(p.trials for p in found.parts))
    print("\n".join(lines(found, slots=slots, gpu_hour_price=args.gpu_hour_price)))
    if first_look is not None:
        print(f"this is the limit of {most} seeds; it ends earlier once every verdict is settled")
    return OK


class ProbeFailed(Exception):
    """The training that `plan --probe` measures failed: no GPU that torch can use, no memory."""


def _maybe_probed(
    example: "TrainConfig", make: Callable[..., "SweepPlan"], *, probe: bool
) -> "SweepPlan":
    """Return a plan; probe on a GPU that Ray lends, as trials may run on this machine now."""
    if not probe:
        return make()
    example.data.check()
    probed = functools.partial(make, probe=True)
    try:
        if not example.gpus_per_worker:
            return probed()
        from tfkd_ray.run.lent import with_a_gpu

        return with_a_gpu(min(1.0, example.gpus_per_worker), probed)
    except (ArithmeticError, RuntimeError) as error:
        raise ProbeFailed(f"--probe: {error}") from None


def explain_verb(args: Namespace) -> int:
    from tfkd_ray.space.arms import is_arms_file, load_arms
    from tfkd_ray.space.explain import arm_line, explained

    if is_arms_file(args.file):
        for arm in load_arms(args.file, args.overrides).arms:
            print(*arm_line(arm.name, arm.config), sep="\n")
    else:
        print(*explained(load_file(args)), sep="\n")
    return OK


def _describe(space: "Space") -> Sentences:
    """Yield what is searched, for all objectives and for each, line by line."""
    from tfkd_ray.show.status import counted
    from tfkd_ray.space.relate import warm_points
    from tfkd_ray.verdict.limits import limits_text

    shared = [p for p in space.parameters if all(p in b.parameters for b in space.branches)]
    search, rungs = space.search, space.rungs
    yield f"{_number_of_trials(space)}, {space.epochs} epochs each"
    yield f"proposed by {search.sampler}, stopped by {search.stopping.name}" + (
        f" after {rungs} epochs" if rungs else ""
    )
    yield from _grid_lines(space)
    yield from wrapped(
        f"value of a trial: {search.metric} after its last epoch, on validation ({search.mode}imised)"
    )
    if search.constraints:
        yield from wrapped(f"constraints on the best trial: {limits_text(search.limits)}")
    yield from (f"ends after {value:g} {name}" for name, value in search.budgets.items())
    if search.finalists is not None:
        again = counted(search.finalists.seeds, "further seed")
        each = "" if len(space.branches) == 1 else " of each objective"
        best = f"the best {search.finalists.k}{each}"
        yield from wrapped(f"then {again} of {best}: the best trial is chosen by their mean")
    for point in warm_points(space):
        yield from wrapped(f"tried first: {point.objective}: {point.origin}")
    if shared:
        yield "searched for every objective:"
        yield from _parameter_lines(shared)
    for branch in space.branches:
        own = [p for p in branch.parameters if p not in shared]
        yield f"objective {branch.objective}:" + (
            "" if own else " no settings of its own are searched"
        )
        yield from _parameter_lines(own)
    for run in space.teacher_runs():
        yield from wrapped(f"teacher, once before the trials: {how_made(run)}")


def _number_of_trials(space: "Space") -> str:
    search, objectives = space.search, len(space.branches)
    if search.num_samples is None:
        return "trials until a budget is spent"
    if not search.split or objectives == 1:
        return f"{search.num_samples} trials"
    share = search.num_samples // objectives
    return f"{search.num_samples} trials, {share} for each of {objectives} objectives"


def _grid_lines(space: "Space") -> Sentences:
    """Yield what is done with each combination of a grid; nothing for other samplers."""
    from tfkd_ray.space.search_config import Grid

    if not isinstance(space.sampler, Grid):
        return
    done = "runs its full length, because search.stopping is unset or none"
    if space.rungs:
        done = "may be stopped early by search.stopping; set it to none for a full table"
    yield from wrapped(f"every combination is one trial; it {done}")


def _parameter_lines(parameters: "list[Parameter]") -> Sentences:
    """Yield each parameter's name and range, on lines of 80 columns."""
    for parameter in parameters:
        yield from wrapped(f"  {parameter.name:<34} {parameter.domain}", rest=" " * 37)


def print_notes(space: "Space") -> Sentences:
    for note in space.notes:
        yield from wrapped(f"note: {note}")


def _fixed(space: "Space", *, whole: bool) -> Sentences:
    """Yield fixed settings: networks, and those unlike recipe and defaults; `whole`: all."""
    from tfkd_ray.learn.config import TrainConfig
    from tfkd_ray.settings.yaml import in_yaml, leaves_of

    data, recipe = space.example.data, space.example.recipe
    bare = {
        "objective": "ce",
        "data": data.labelled,
        "recipe": recipe,
        "precision": space.tree["precision"],
        "cpus_per_worker": space.example.cpus_per_worker,  # which readers of image files need
    }
    usual = dict(leaves_of(TrainConfig.model_validate(bare).tree))
    usual["cpus_per_worker",] = TrainConfig.model_fields["cpus_per_worker"].default
    own = {"name", *data.model_dump(exclude_defaults=True)}
    searched = {p.path for p in space.parameters}
    count = 0
    yield "fixed:"
    for path, value in leaves_of(space.tree, searched):
        if path[0] in ("search", "objective", "teacher", "teachers") or path in searched:
            continue
        differs = (
            path[1] in own
            if path[0] == "data"
            else path[0] == "student" or usual.get(path) != value
        )
        count += not differs
        if differs or whole:
            yield f"  {'.'.join(path):<34} {in_yaml(value)}"
    if count and not whole:
        named = recipe or next(iter(data.recipes))
        yield f"  {count} more as in recipe {named} of {data.name}, or default (--all lists them)"


# --- export ----------------------------------------------------------------------------------------------------


def export_verb(args: Namespace) -> int:
    from tfkd_ray.show.export import ExportFailed, export
    from tfkd_ray.show.python import place_of_student

    source = place_of_student(args.source)
    out = args.out or Path(f"{source.absolute().name}-export")
    try:
        made = export(
            source, out, arm=args.arm, seed=args.seed, onnx=args.onnx, licence=args.licence
        )
    except ExportFailed as error:
        say_error(f"tfkd export: {error}")
        return FAILED
    for name, found in made["differences"].items():
        print(
            f"{name}: logits differ by at most {found['largest']:.2g} (the largest logit is {found['scale']:.3g}) on "
            f"{made['images']} images of {made['split']}"
        )
    for name, why in made["problems"].items():
        say_error(f"{name}: not written: {why}")
    print(f"{made['name']} is in {short_path(Path(made['folder']))}")
    return FAILED if made["problems"] else OK


def best_verb(args: Namespace) -> int:
    import json

    from tfkd_ray.settings.yaml import dump_yaml
    from tfkd_ray.show.status import best_lines, best_of, front_of, read_all
    from tfkd_ray.store.storage import experiment_of

    experiment = experiment_of(args.experiment).folder
    winner, plan = best_of(experiment)
    front, records = [winner], read_all(experiment).records
    if len(plan.metrics) > 1:
        from tfkd_ray.store.ended import in_full
        from tfkd_ray.store.experiment import pareto

        front = list(map(in_full, pareto(records, plan.metrics, plan.limits)))
        if not front:
            raise ConfigError(
                f"no trial of full length has a value of {' and of '.join(plan.metrics)}",
                experiment,
            )
    found = front_of(front, plan, len(records))
    if args.json:
        print(json.dumps(found, indent=1))
        return OK
    for line in best_lines(found, experiment):
        print(*wrapped(line, first="# ", rest="#   "), sep="\n")
    config = front[0].config
    if not args.all:
        config = _shortened_config(front[0])
        print("# settings at their defaults are left out (--all shows them)")
    print(dump_yaml(config), end="")
    return OK


def _shortened_config(record: "Record") -> "Tree":
    """Return a trial's configuration without defaults; the whole of one that this release refuses."""
    from tfkd_ray.learn.shortened import without_defaults

    try:
        return without_defaults(record.config, record.parameters)
    except ConfigError:
        return record.config


def trials_verb(args: Namespace) -> int:
    from tfkd_ray.show.trials import trials_table
    from tfkd_ray.store.storage import experiment_of

    print(
        trials_table(
            experiment_of(args.experiment).folder,
            sort=args.sort,
            filter=args.filter,
            columns=args.columns,
            limit=args.limit,
            output=args.output,
            others=[experiment_of(place).folder for place in args.others],
            width=terminal_width(sys.stdout),
        )
    )
    return OK


def status_verb(args: Namespace) -> int:
    import json

    from tfkd_ray.show.status import follow_status, status, status_lines
    from tfkd_ray.store.storage import experiment_of, kept_up_to_date

    shown, experiment = "", experiment_of(args.experiment).folder
    try:
        with kept_up_to_date([args.experiment] if args.follow else []):
            for found in follow_status(experiment) if args.follow else [status(experiment)]:
                lines = [json.dumps(found, indent=1)] if args.json else status_lines(found)
                if found["state"] == "interrupted" and not args.json:
                    lines += ["resume with:", f"  {resume_command(experiment)}"]
                text = "\n".join(lines)
                if text != shown:
                    if args.follow and sys.stdout.isatty() and sys.__stdout__ is not None:
                        print(
                            "\x1b[H\x1b[2J", end="", file=sys.__stdout__
                        )  # past `Legible`, which would escape it
                    print(text, flush=True)
                shown = text
    except KeyboardInterrupt:
        return INTERRUPTED
    return OK


def logs_verb(args: Namespace) -> int:
    from tfkd_ray.show.trials import logs
    from tfkd_ray.store.storage import experiment_of, kept_up_to_date

    experiment = experiment_of(args.experiment).folder
    try:
        with kept_up_to_date([args.experiment] if args.follow else []):
            width = terminal_width(sys.stdout)
            for line in logs(experiment, args.trial, follow=args.follow, width=width):
                print(line, flush=True)
    except KeyboardInterrupt:
        return INTERRUPTED
    return OK


def ls_verb(args: Namespace) -> int:
    import json

    from tfkd_ray.show.status import ls, ls_lines
    from tfkd_ray.store.storage import storage_at

    storage = storage_at(args.storage)
    storage.fetch_experiments()
    found = ls(storage.folder)
    print(json.dumps(found, indent=1) if args.json else "\n".join(ls_lines(found)))
    return OK


def report_verb(args: Namespace) -> int:
    from tfkd_ray.show.python import write_report

    if args.follow:
        return _follow_report(args)
    if args.port is not None:
        raise ConfigError("applies only to a served page: add --follow", "--port")
    for path in write_report(
        args.experiment,
        args.out or Path("report.html"),
        figures=args.figures,
        comparisons=args.confirm,
        others=args.others,
    ):
        print(path)
    return OK


REPORT_PORT = 8500
"""Port of a followed report; TensorBoard's usual one is 6006, and that of Ray's dashboard 8265."""


def _follow_report(args: Namespace) -> int:
    """Serve the report of an experiment on this machine until Ctrl-C."""
    from tfkd_ray.show.follow import HERE_ALONE, server_of
    from tfkd_ray.show.python import followed_report
    from tfkd_ray.store.storage import kept_up_to_date

    written = {"--out": args.out, "--figures": args.figures}
    if given := [option for option, value in written.items() if value is not None]:
        problems = [
            f"{option}: a followed report is served, not written; leave one of them out"
            for option in given
        ]
        raise ConfigError(problems, "--follow")
    port = REPORT_PORT if args.port is None else args.port
    _check_port(port)
    places = [args.experiment, *args.others, *(args.confirm or [])]
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt):
        followed = followed_report(args.experiment, comparisons=args.confirm, others=args.others)
        with kept_up_to_date(places), server_of(followed, port) as server:
            port = server.server_address[1]
            say_error(
                f"report: http://{HERE_ALONE}:{port}/ (Ctrl-C ends it)\n"
                "from another machine, where HOST is the name of this one:\n"
                f"  ssh -N -L {port}:{HERE_ALONE}:{port} HOST\n"
                "then open the same address there"
            )
            server.serve_forever()
    return OK


def compare_verb(args: Namespace) -> int:
    from tfkd_ray.show.several import read_several, side_by_side_lines
    from tfkd_ray.store.storage import experiment_of

    several = read_several([experiment_of(p).folder for p in (args.experiment, *args.others)])
    print(*side_by_side_lines(several), sep="\n")
    return OK


_HOW_TO_COMPARE = """\
1. Time Series: the value is pinned, and runs are coloured by objective; filter
   the runs, by tfkd_reg for example.
2. HParams, Table: objectives share alpha and temperature (0 and 1 where one
   has none); sort by the value; tick further columns at the left.
3. HParams, Parallel Coordinates and Scatter Plot Matrix: log scale for lr;
   drag along the value's axis to keep the best, and read which T and alpha are
   left. Trials that lack a ticked column are not drawn.
4. Text: how a trial differs from plain training, and how to run it again.
5. Custom Scalars, of a comparison: the intervals of its arms.
A trial that was interrupted has the status running."""


def tensorboard_verb(args: Namespace) -> int:
    import tempfile

    from tfkd_ray.show.board import board_of
    from tfkd_ray.store.experiment import read_experiment
    from tfkd_ray.store.storage import experiment_of, kept_up_to_date, with_events

    given = [experiment_of(place, with_events).folder for place in args.experiments]
    for experiment in given:
        if not (experiment / "confirm.yaml").is_file():
            read_experiment(experiment)
    _check_port(args.port)
    # later ones of the same name get a number
    experiments: dict[str, Path] = {}
    for path in dict.fromkeys(path.resolve() for path in given):
        experiments[
            path.name if path.name not in experiments else f"{path.name}-{len(experiments) + 1}"
        ] = path
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with (
        contextlib.suppress(KeyboardInterrupt),
        tempfile.TemporaryDirectory(prefix="tfkd-tensorboard-") as folder,
        kept_up_to_date(args.experiments, with_events),
    ):
        several = len(experiments) > 1

        def link() -> None:
            if several:
                from tfkd_ray.show.tensorboard import side_by_side

                side_by_side(Path(folder), experiments)

        link()
        logdir = folder if several else str(next(iter(experiments.values())) / "tb")
        board, missing = board_of(logdir, args.port, _pinned_tag(experiments.values()))
        if missing:
            say_error(
                "note: this TensorBoard's pages differ from those of 2.21, so tfkd does not adapt them"
            )
        with contextlib.redirect_stderr(io.StringIO()):  # TensorBoard's advice on its flags
            url = board.launch()
        say_error(f"TensorBoard: {url} (Ctrl-C ends it)\n{_HOW_TO_COMPARE}")
        while True:
            time.sleep(2)
            link()
    return OK


def _pinned_tag(experiments: Iterable[Path]) -> str:
    """Return the tag of the value of the first sweep; of comparisons alone, the training loss."""
    from tfkd_ray.show.tensorboard import TAGS, tag_of
    from tfkd_ray.store.experiment import selection_metric

    for experiment in experiments:
        if not (experiment / "confirm.yaml").is_file():
            return tag_of(selection_metric(experiment))
    return TAGS["train_loss"]


def _check_port(port: int) -> None:
    """Raise a ConfigError that names the next free port if this one cannot be used."""
    import socket

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
        raise ConfigError(
            f"{port} cannot be used ({why}); the next free one: --port {free}", "--port"
        )
