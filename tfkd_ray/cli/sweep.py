"""The verbs `tune` and `resume`."""

import dataclasses
import json
import os
import shlex
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tfkd_ray.settings.own_code import remember
from tfkd_ray.settings.passwords import masked

if TYPE_CHECKING:
    from tfkd_ray.space.space import Space
    from tfkd_ray.store.experiment import Record
    from tfkd_ray.store.storage import Experiment
from tfkd_ray.cli.compare import compare_arms
from tfkd_ray.cli.fit import fit_tuner, join_ray, progress_view, teacher_line, told_of_interrupt
from tfkd_ray.cli.on_end import STOPPED, OnEnd
from tfkd_ray.cli.show import print_notes
from tfkd_ray.cli.terminal import (
    BUDGET_OPTIONS,
    BUDGETS,
    have_data,
    let_end,
    load_file,
    new_name,
    resume_command,
    say_error,
    shell_word,
    short_path,
)
from tfkd_ray.settings.columns import wrapped
from tfkd_ray.settings.errors import FAILED, INTERRUPTED, OK, ConfigError

# --- tune and resume -------------------------------------------------------------------------------------------


def tune_verb(args: Namespace) -> int:
    options = {"num_samples": args.num_samples, **{name: getattr(args, name) for name in BUDGETS}}
    given = {name: value for name, value in options.items() if value is not None}
    names = {
        "num_samples": "--num-samples",
        **{name: option for option, name, *_ in BUDGET_OPTIONS},
    }
    args.spelled = {f"search.{k}={value}": f"{names[k]} {value}" for k, value in given.items()}
    args.overrides += args.spelled
    args.overrides += (
        [f"search.storage={json.dumps(args.study_storage)}"] if args.study_storage else []
    )
    space = load_file(args)
    from tfkd_ray.launch.as_job import tune_as_job
    from tfkd_ray.space.search_config import ENVIRONMENT

    if (code := tune_as_job(args, space)) is not None:
        return code
    if (url := space.search.storage) and masked(url) != url:
        os.environ[ENVIRONMENT] = url  # files omit the password
    from tfkd_ray.store.storage import checked, experiment_of

    storage = checked(args.storage)
    priors = [experiment_of(prior).folder for prior in args.prior]
    name = new_name(args, storage, Path(args.file).stem)
    have_data(space.example, args)
    join_ray(args.address, space.example.workers)
    from tfkd_ray.run.tune import build_tuner

    for line in print_notes(space):
        say_error(line)

    def build(progress: Any) -> Any:
        return build_tuner(
            space,
            name=name,
            storage=storage,
            callbacks=[progress],
            on_teacher=teacher_line,
            on_teacher_epoch=progress.on_teacher_epoch,
            priors=priors,
            on_budget=progress.end,
            on_note=progress.note,
        )

    try:
        return _sweep(
            space, OnEnd(args.on_end, storage.folder / name), storage.folder / name, build
        )
    except KeyboardInterrupt:
        if not space.teacher_runs():
            raise
        let_end()
        say_error(_kept_teachers(args, name))
        return INTERRUPTED


def _kept_teachers(args: Namespace, name: str) -> str:
    """Return what is kept of a sweep that was interrupted while its teachers trained."""
    words = [shlex.quote(masked(word)) for word in args.words]
    words += [] if args.name is not None else ["--name", shlex.quote(name)]
    return (
        "tfkd tune: interrupted before a trial ran, so there is nothing to resume. Trained teachers are kept, and a "
        "teacher in training up to its last checkpoint. To continue:\n"
        "  tfkd " + " ".join(words)
    )


def resume_verb(args: Namespace) -> int:
    from tfkd_ray.launch.as_job import resume_as_job
    from tfkd_ray.space.search_config import more_samples
    from tfkd_ray.space.space import build_space, load_space
    from tfkd_ray.store.experiment import read_experiment
    from tfkd_ray.store.storage import is_url, to_continue

    if (code := resume_as_job(args)) is not None:
        return code
    found = to_continue(args.experiment)
    experiment = found.folder
    if (experiment / "confirm.yaml").is_file():
        return _resume_comparison(found, args)
    about = read_experiment(experiment)
    if told := remember(about.get("directory")):
        say_error(told)
    samples = about["space"]["search"]["num_samples"]
    about["space"]["search"]["num_samples"] = more_samples(samples, args.add_trials)
    space = build_space(about["space"], experiment / "experiment.yaml")
    wider = load_space(args.space) if args.space else None
    if wider is not None:
        samples = more_samples(wider.search.num_samples, args.add_trials)
        space = dataclasses.replace(
            wider, search=wider.search.model_copy(update={"num_samples": samples})
        )
    changes = (args.space, args.add_trials, args.retry_failed, *(getattr(args, n) for n in BUDGETS))
    # in a bucket, files of an experiment that has ended may be missing
    if not (any(changes) or is_url(args.experiment)) and (over := _is_over(experiment)):
        with OnEnd(args.on_end, experiment) as end:
            print(over)
            return end.of_code(_print_summary(space, experiment, whole=True))
    join_ray(args.address, space.example.workers)
    from tfkd_ray.run.tune import resume_tuner

    return _sweep(
        space,
        OnEnd(args.on_end, experiment),
        experiment,
        lambda progress: resume_tuner(
            found,
            add_trials=args.add_trials,
            callbacks=[progress],
            on_teacher=teacher_line,
            on_teacher_epoch=progress.on_teacher_epoch,
            retry_failed=args.retry_failed,
            space=wider,
            study_storage=args.study_storage,
            on_budget=progress.end,
            on_note=progress.note,
            **{name: getattr(args, name) for name in BUDGETS},
        ),
    )


def _resume_comparison(found: "Experiment", args: Namespace) -> int:
    """Resume a comparison; raise a ConfigError for options that only a sweep has."""
    budgets = {option: getattr(args, name) for option, name, _, _ in BUDGET_OPTIONS}
    given = {
        "--add-trials": args.add_trials or None,
        "--space": args.space,
        "--study-storage": args.study_storage,
        **budgets,
    }
    if wrong := [option for option, value in given.items() if value is not None]:
        problems = [
            f"{option}: is for sweeps; a comparison has fixed arms and a fixed number of runs"
            for option in wrong
        ]
        raise ConfigError(problems, found.folder)
    with OnEnd(args.on_end, found.folder) as end:
        return end.of_code(compare_arms(found, args.address, end))


def _is_over(experiment: Path) -> str:
    """Return a sentence if all trials of a sweep, and its driver, have ended and none is missing."""
    from tfkd_ray.show.status import status
    from tfkd_ray.store.experiment import DRIVER_ENDED, read_spent

    found = status(experiment)
    planned = found["trials"]["planned"]
    if found["state"] != "finished" or planned is None or found["gone"]:
        return ""
    if DRIVER_ENDED not in read_spent(experiment):
        return ""
    return f"nothing to do: all {planned:,} trials of {short_path(experiment)} have ended"


def _sweep(space: "Space", end: OnEnd, experiment: Path, build: Callable[[Any], Any]) -> int:
    """Run a Tuner and print the results; then run the command of `--on-end`."""
    progress = progress_view(experiment)
    with end:
        try:
            code = end.of_code(_fit_and_print(space, progress, experiment, build, end))
        finally:
            end.begun = progress.begun
        if progress.ended_by and space.search.num_samples is not None and code == OK:
            end.status = STOPPED
        return code


def _fit_and_print(
    space: "Space", progress: Any, experiment: Path, build: Callable[[Any], Any], end: OnEnd
) -> int:
    """Run a Tuner with our table and Ctrl-C handling, then print the results."""
    try:
        ended = fit_tuner(progress, build, experiment, end)
        if ended is None:
            return FAILED
        endless = space.search.num_samples is None  # its budget is its end
        whole = ended and (endless or not progress.ended_by)
        code = _print_summary(space, experiment, whole=whole)
    except KeyboardInterrupt:
        if not (experiment / "experiment.yaml").is_file():
            raise
        let_end()
        return told_of_interrupt(experiment)
    if progress.ended_by:
        (more,) = (
            f"{option} {unit}"
            for option, name, unit, _ in BUDGET_OPTIONS
            if f".{name}: " in progress.ended_by
        )
        how = "ended" if endless else "ended early"
        print(f"{how}: {progress.ended_by}; resume with:\n  {resume_command(experiment)} {more}")
    return code if ended else told_of_interrupt(experiment, progress.stopped_by)


def _print_summary(space: "Space", experiment: Path, *, whole: bool) -> int:
    """Print the best trial beside the best baseline; after a full sweep also the next step."""
    from tfkd_ray.show.receipt import receipt_lines
    from tfkd_ray.store.ended import read_briefs
    from tfkd_ray.store.experiment import best, furthest

    records, gone = read_briefs(experiment)
    count = Counter(record.status for record in records)
    _print_counts(records, count, experiment, gone)
    winner = best(records, space.search.metric, space.search.limits)
    if winner is None:
        begun = (
            "no trial of full length yet" if records else "no trial had begun when the sweep ended"
        )
        print(f"{begun}, so there is no best one")
        if ahead := furthest(records, space.search.metric):
            print(
                f"best of the highest rung: {ahead.name}, {space.search.metric} "
                f"{ahead.last[space.search.metric]:.4f} at epoch {ahead.last['epoch']:.0f} of {space.epochs}"
            )
        return FAILED if count["failed"] and not count["interrupted"] + count["paused"] else OK
    _print_best(space, records, winner)
    print("\n" + "\n".join(receipt_lines(space, records)))
    print(f"\nThis is not a verdict: it is the best of {len(records)} on validation, and the best")
    if space.search.metric in winner.means:
        print("of a few finalists still looks slightly better than it is (selection bias).")
    else:
        print("of many trials looks better than it is (selection bias).")
    print(f"\nwritten to {short_path(experiment)}")
    if whole:
        _print_next(space, experiment)
    return OK


def _print_next(space: "Space", experiment: Path) -> None:
    """Print the commands for a sweep that has ended."""
    from tfkd_ray.space.search_config import Grid

    where = shell_word(experiment)
    print("next:")
    print(f"  tfkd confirm {where}")
    print(f"  tfkd report {where}")
    print(f"  tfkd tensorboard {where}")
    print(f"  tfkd best {where} > best.yaml && tfkd train best.yaml")
    is_grid = isinstance(space.sampler, Grid)  # which has no more combinations
    if space.search.num_samples is not None and not is_grid:
        print(f"  tfkd resume {where} --add-trials {space.search.num_samples}")


def _print_counts(
    records: Sequence["Record"], count: Counter[str], experiment: Path, gone: Sequence[str]
) -> None:
    """Print how the trials ended."""
    from tfkd_ray.show.status import further_counts, spent
    from tfkd_ray.store.experiment import gone_sentence

    cut = "".join(f", {count[s]} {s}" for s in ("interrupted", "paused") if count[s])
    otherwise = sum(r.status == "stopped" and r.reason is not None for r in records)
    print(
        f"{len(records)} trials, {spent(experiment)['seconds']:.0f} s: {count['done']} of full length, "
        f"{count['stopped'] - otherwise} stopped early, {count['failed']} failed{cut}"
    )
    if otherwise:
        print(f"  and {otherwise} stopped by tfkd stop or a budget")
    runs = [run for record in records for run in record.further]
    if runs:
        print(f"  and {further_counts(Counter(run.status for run in runs))} with further seeds")
    if lost := sum(record.lost for record in [*records, *runs]):
        print(f"  {lost} times a process was lost and its trial resumed; these are not failures")
    if gone:
        print(*wrapped(gone_sentence(gone), first="  "), sep="\n")
    failed = [record for record in [*records, *runs] if record.status == "failed"]
    for record in failed[:3]:
        reason = (record.reason or "?").splitlines()[0]
        print(f"  {record.name} failed: {reason}\n    see {short_path(record.folder)}")


def _print_limits(limits: str, *, met: bool) -> None:
    """Print whether the best trial meets the constraints."""
    text = f"it meets the constraints: {limits}"
    if not met:
        text = f"no trial of full length meets the constraints: {limits}; this is the best of the others"
    print(*wrapped(text, first="  "), sep="\n")


def _print_best(space: "Space", records: Sequence["Record"], winner: "Record") -> None:
    """Print the best trial, the best of each baseline, and those that tie or trade off with it."""
    from tfkd_ray.learn.chance import chance_note
    from tfkd_ray.settings.yaml import in_yaml
    from tfkd_ray.show.status import value_text
    from tfkd_ray.space.baselines import doubted, doubts
    from tfkd_ray.store.ended import in_full
    from tfkd_ray.store.experiment import best
    from tfkd_ray.verdict.limits import is_feasible, limits_text

    metric, limits = space.search.metric, space.search.limits
    print(f"\nbest: {winner.name}, {metric} {value_text(winner, metric)}")
    if limits:
        _print_limits(limits_text(limits), met=is_feasible(limits, winner.judged))
    for key, value in in_full(winner).parameters.items():
        shown = f"{value:.6g}" if isinstance(value, float) else in_yaml(value)
        print(f"  {key:<34} {shown}")
    for name in ("ce", "lsr"):
        rival = best([r for r in records if r.objective == name], metric, limits)
        if rival is not None and rival is not winner:
            print(f"best {name}: {rival.name}, {metric} {value_text(rival, metric)}")
    if found := doubts(records, metric, limits):
        text = f"baselines {doubted(found)}; tfkd confirm tunes them first"
        print(*wrapped(text, first="  "), sep="\n")
    again = metric in winner.means
    alike = [r for r in records if r.status == "done" and (metric in r.means) == again]
    ties = sum(r.judged.get(metric) == winner.judged[metric] for r in alike)
    if ties > 1:
        print(f"{ties} trials share this value; the first one is named")
    if guessed := chance_note(space.example.data, winner.last.get("val_accuracy")):
        print(*wrapped(f"note: {guessed}"), sep="\n")
    if space.search.more_metrics:
        _print_front(space, records)


def _print_front(space: "Space", records: Sequence["Record"]) -> None:
    """Print the trials of which none is better in all metrics."""
    from tfkd_ray.store.experiment import pareto

    metrics = space.search.metrics
    print(f"\nnone is better in all of {', '.join(metrics)} than:")
    for record in pareto(records, metrics, space.search.limits):
        values = ", ".join(f"{metric} {record.last[metric]:.6g}" for metric in metrics)
        print(f"  {record.name:<24} {values}")
