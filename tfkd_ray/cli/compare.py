"""The verb `confirm`: train arms over seeds, then judge them on the test split."""

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tfkd_ray.settings.own_code import remember

if TYPE_CHECKING:
    from tfkd_ray.space.arms import Comparison
    from tfkd_ray.store.storage import Experiment
from tfkd_ray.cli.fit import fit_tuner, join_ray, progress_view, teacher_lines, told_of_interrupt
from tfkd_ray.cli.on_end import OnEnd
from tfkd_ray.cli.terminal import (
    DEFAULT_BASELINES,
    DEFAULT_STORAGE,
    DEFAULT_TOP_K,
    have_data,
    new_name,
    place_or_url,
    say_error,
    shell_word,
    short_path,
)
from tfkd_ray.settings.errors import FAILED, NOT_BETTER, OK, ConfigError

SEED_LIMIT = 1000
"""Most seeds of an arm."""


# --- confirm ---------------------------------------------------------------------------------------------------


def confirm_verb(args: Namespace) -> int:
    from tfkd_ray.launch.as_job import confirm_as_job
    from tfkd_ray.launch.verbs import is_arms
    from tfkd_ray.store.experiment import read_experiment
    from tfkd_ray.store.storage import Experiment, checked, to_continue

    if args.top_k < 1:
        raise ConfigError("at least the best one is compared", f"--top-k {args.top_k}")
    first_look, most = args.seeds
    check_seeds(first_look, most)
    if is_arms(args):
        usual = {
            "--top-k": args.top_k == DEFAULT_TOP_K,
            "--baselines": args.baselines == DEFAULT_BASELINES,
        }
        problems = [
            f"{option}: is for sweeps; an arms file lists what is compared"
            for option, ok in usual.items()
            if not ok
        ]
    else:
        usual = {
            "settings": not args.overrides,
            "--preset": not args.preset,
            "--storage": args.storage == DEFAULT_STORAGE,
        }
        why = "settings and presets are for arms files; the arms of a sweep use the settings that it trained"
        problems = [f"{option}: {why}" for option, ok in usual.items() if not ok]
    if problems:
        raise ConfigError(problems, args.file)
    if (code := confirm_as_job(args)) is not None:
        return code
    found = to_continue(place_or_url(args.file))
    sweep = found if found.folder.is_dir() else None
    if sweep is not None:
        if told := remember(read_experiment(sweep.folder).get("directory")):
            say_error(told)
        storage = sweep.storage  # which has its teachers
        name = new_name(args, storage, f"{sweep.name}-confirm")
    else:
        storage = checked(args.storage)
        name = new_name(args, storage, Path(args.file).stem)
    with OnEnd(args.on_end, storage.folder / name) as end:
        return end.of_code(_confirm(args, Experiment(storage, name), sweep, end))


def _confirm(
    args: Namespace, comparison: "Experiment", sweep: "Experiment | None", end: OnEnd
) -> int:
    """Begin a comparison, of a sweep's best trials or of a file's arms, and run it."""
    from tfkd_ray.space.arms import arms_of, load_arms, new_comparison, rivals_of, seeds_from
    from tfkd_ray.store.experiment import read_experiment

    first_look, most = args.seeds
    storage, name = comparison
    if sweep is not None:
        _check_ended(sweep)
        rivals = rivals_of(args.baselines)
        tuned = _tuned_baselines(sweep, rivals, args, end)
        compared = arms_of(sweep.folder, top_k=args.top_k, rivals=rivals, baselines=tuned)
        if compared.note:
            say_error(f"note: {compared.note}")
    else:
        compared = load_arms(args.file, args.overrides, preset=args.preset)
    have_data(compared.example, args)
    compared.example.data.examine()
    join_ray(args.address, compared.example.workers)
    from tfkd_ray.run.tune import prepare

    prepare(compared.example, storage)
    taken = read_experiment(sweep.folder)["space"]["seed"] if sweep is not None else None
    seeds = seeds_from(most, taken)
    options = {
        "teacher_per_seed": args.teacher_per_seed,
        "hold_out": args.train_only,
        "first_look": first_look,
    }
    storage.check_new(name)  # before tuning baselines, which takes a while
    new_comparison(
        compared, seeds, storage.folder / name, strict=args.fail_if_not_better, **options
    )
    return compare_arms(comparison, args.address, end)


def _check_ended(sweep: "Experiment") -> None:
    """Raise a ConfigError if a driver runs the sweep: its best trials are not known yet."""
    from tfkd_ray.show.status import is_running, status

    if not is_running(sweep.folder):
        return
    trials, name = status(sweep.folder)["trials"], shell_word(sweep.folder)
    ended = sum(trials[state] for state in ("done", "stopped", "failed"))
    planned = "" if trials["planned"] is None else f" of {trials['planned']:,}"
    raise ConfigError(
        f"is still running, {ended:,}{planned} trials have ended; wait for its end (tfkd status {name} --follow), or "
        f"end it (tfkd stop {name}), then confirm it",
        sweep.folder,
    )


def check_seeds(first_look: int | None, most: int) -> None:
    """Raise a ConfigError for numbers of seeds that can tell nothing, or have no end."""
    if most > SEED_LIMIT:
        message = f"at most {SEED_LIMIT} seeds of each arm, got {most}"
        raise ConfigError(message, "--seeds")
    if first_look is None:
        if most < 2:
            message = (
                "with one run of each arm, a difference cannot be told from chance; use at least 2 seeds, better 5 or "
                "more"
            )
            raise ConfigError(message, f"--seeds {most}")
        return
    option = f"--seeds {first_look}..{most}"
    if first_look < 3:
        message = f"the first look needs 3 seeds or more to measure a spread, got {first_look}; try 3..{max(most, 20)}"
        raise ConfigError(message, option)
    if most < first_look:
        message = f"the limit, {most}, is below the first look, {first_look}; write FIRST..LIMIT, such as 3..20"
        raise ConfigError(message, option)


def _tuned_baselines(
    sweep: "Experiment", rivals: Sequence[str], args: Namespace, end: OnEnd
) -> Path | None:
    """Tune the baselines that got too few trials, or are far below plain training; return that sweep.

    None if no baseline needs it.
    """
    from tfkd_ray.space.arms import baseline_space, untuned
    from tfkd_ray.store.experiment import read_experiment, read_records
    from tfkd_ray.store.storage import to_resume

    storage, experiment, name = sweep.storage, sweep.folder, f"{sweep.name}-baselines"
    storage.fetch(name, to_resume)
    lacking = {name: n for name, n in untuned(experiment).items() if name in rivals}
    if not lacking:
        return None
    tuned = storage.folder / name
    if not (tuned / "experiment.yaml").is_file():
        space = baseline_space(experiment, lacking, max(lacking.values()))
        names = " and ".join(lacking)
        say_error(
            f"baselines: {names} had fewer trials than the winner's objective, or are hardly tuned; tuning them first, "
            f"in {short_path(tuned)}"
        )
        have_data(space.example, args)
        space.example.data.examine()
        join_ray(args.address, space.example.workers)
        from tfkd_ray.run.tune import build_tuner

        def build(shown: Any) -> Any:
            return build_tuner(
                space, name=name, storage=storage, callbacks=[shown], on_note=shown.note
            )

        end.begun = True
        fit_tuner(progress_view(tuned), build, tuned, end)
    ended = [r.objective for r in read_records(tuned) if r.status in ("done", "stopped", "failed")]
    if short := {
        name: n - ended.count(name) for name, n in lacking.items() if ended.count(name) < n
    }:
        missing = ", ".join(f"{n} trials of {name}" for name, n in short.items())
        more = sum(short.values()) - (
            read_experiment(tuned)["space"]["search"]["num_samples"] - len(ended)
        )
        extra = f" --add-trials {more}" if more > 0 else ""
        raise ConfigError(
            f"lacks {missing}; tune them first: tfkd resume {shell_word(tuned)}{extra}", tuned
        )
    return tuned


def compare_arms(comparison: "Experiment", address: str | None, end: OnEnd) -> int:
    """Run the missing runs of a comparison, then open the test split and print the table."""
    from tfkd_ray.space.arms import read_comparison
    from tfkd_ray.store.experiment import WHOLE_SWEEP

    directory = comparison.folder
    compared = read_comparison(directory)
    comparison.storage.withdraw(comparison.name, WHOLE_SWEEP)  # of an earlier session
    end.begun = True
    if not compared.ended:
        code = _train_until_settled(compared, comparison, address, end)
        if code is not None:
            return code
        compared = read_comparison(directory)
    elif not compared.is_trained:
        join_ray(address, compared.runs[0].config.workers)
        ended = _fit_arms(compared, comparison, end)
        if not ended:
            return FAILED if ended is None else told_of_interrupt(directory)
    from tfkd_ray.run.confirm import judge_on_test, outcome_table

    said: list[str] = []

    def opened(run: str) -> None:
        if not said:
            say_error("opening the test split")
        said.append(run)

    try:
        result = judge_on_test(comparison, opened)
    except KeyboardInterrupt:
        return told_of_interrupt(directory)
    print(*outcome_table(result), sep="\n")
    print(f"\nwritten to {short_path(directory)}/confirm.json")
    print(f"next:\n  tfkd report {shell_word(directory)}")
    if compared.strict and not all(found["verdict"] == "better" for found in result["verdicts"]):
        return NOT_BETTER
    return (
        OK
        if all(run["status"] == "done" for arm in result["arms"] for run in arm["runs"])
        else FAILED
    )


def _train_until_settled(
    compared: "Comparison", comparison: "Experiment", address: str | None, end: OnEnd
) -> int | None:
    """Add seeds to a sequential comparison until it ends; return an exit code if it cannot go on."""
    from tfkd_ray.run.confirm import ends_at_look
    from tfkd_ray.store.experiment import read_records

    assert compared.plan is not None, comparison
    known: dict[str, Any] = {}
    for seeds in compared.plan.looks:
        runs = compared.runs[: seeds * len(compared.arms.arms)]
        over = {r.name for r in read_records(comparison.folder) if r.status in ("done", "failed")}
        if not over >= {run.name for run in runs}:
            join_ray(address, compared.runs[0].config.workers)
            ended = _fit_arms(compared, comparison, end, seeds)
            if not ended:
                return FAILED if ended is None else told_of_interrupt(comparison.folder)
        try:
            ends = ends_at_look(comparison, seeds, known)
        except KeyboardInterrupt:
            return told_of_interrupt(comparison.folder)
        if ends:
            break
        say_error(f"look at {seeds} seeds: not settled; training one more seed of each arm")
    return None


def _fit_arms(
    compared: "Comparison", comparison: "Experiment", end: OnEnd, seeds: int | None = None
) -> bool | None:
    """Train the missing runs of a comparison, of the first seeds or of all; see `fit_tuner`."""
    from tfkd_ray.run.confirm import comparison_tuner

    progress = progress_view(comparison.folder)
    runs = compared.runs_on_data
    if seeds is not None:
        runs = runs[: seeds * len(compared.arms.arms)]
    teachers = [made for run in runs for made in run.config.teacher_runs()]
    told = teacher_lines(teachers, comparison.storage.folder)
    return fit_tuner(
        progress,
        lambda shown: comparison_tuner(
            comparison,
            callbacks=[shown],
            on_teacher=told,
            on_teacher_epoch=shown.on_teacher_epoch,
            on_note=shown.note,
            seeds=seeds,
        ),
        comparison.folder,
        end,
    )
