"""The verbs `train` and `teacher`, which train one network."""

import contextlib
import shlex
import signal
import time
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tfkd_ray.learn.config import TrainConfig
from tfkd_ray.cli.fit import head_needed, join_ray, teacher_line, waiting
from tfkd_ray.cli.terminal import have_data, load_file, same_run, say_error, short_path
from tfkd_ray.settings.errors import FAILED, INTERRUPTED, OK, ConfigError, did_you_mean, in_file

# --- teachers --------------------------------------------------------------------------------------------------


def teacher_verb(args: Namespace) -> int:
    from tfkd_ray.settings.columns import in_columns, on_one_line
    from tfkd_ray.settings.yaml import dump_yaml
    from tfkd_ray.store.experiment import read_teachers
    from tfkd_ray.store.storage import storage_at

    storage = storage_at(args.storage)
    storage.check()
    storage.fetch("teachers")
    found = {about["name"]: about for about in read_teachers(storage.folder)}
    if args.do == "list":
        table = ["teacher\tdata\tepochs\tval_accuracy"]
        for name, about in found.items():
            accuracy = about["metrics"].get("val_accuracy")
            shown = "" if accuracy is None else f"{accuracy:.4f}"
            data = about["config"]["data"]["name"]
            table.append(f"{on_one_line(name)}\t{on_one_line(data)}\t{_epochs_of(about)}\t{shown}")
        print(*in_columns(table), sep="\n")
        return OK
    if args.name not in found:
        hint = did_you_mean(args.name, found) if found else "there is none"
        raise ConfigError(f"no teacher {args.name!r}; {hint}", storage.folder / "teachers")
    print(dump_yaml(found[args.name]), end="")
    return OK


def _epochs_of(about: dict[str, Any]) -> str:
    return "given" if about["config"].get("weights") else f"{about['metrics']['epoch']:.0f}"


def teacher_train_verb(args: Namespace) -> int:
    from tfkd_ray.launch.as_job import teacher_as_job
    from tfkd_ray.space.arms import is_arms_file, load_arms

    if is_arms_file(args.file):
        arms = load_arms(args.file, args.overrides).arms
        runs = [run for arm in arms for run in arm.config.teacher_runs()]
    else:
        runs = load_file(args).teacher_runs()
    if not runs:
        raise ConfigError("none of its objectives needs a teacher", args.file)
    runs = list({run.fingerprint(): run for run in runs}.values())
    if (code := teacher_as_job(args, runs[0])) is not None:
        return code
    have_data(runs[0], args)
    join_ray(args.address, 1)
    from tfkd_ray.run.tune import TeacherFailed, prepare, train_teachers
    from tfkd_ray.store.storage import checked

    storage = checked(args.storage)
    runs = [run.pinned() for run in runs]
    try:
        for run in runs:
            prepare(run, storage)
        with head_needed(), waiting() as wait:
            show = wait.on_teacher_epoch
            train_teachers(runs, storage, teacher_line, on_epoch=show)
    except TeacherFailed as error:
        say_error(f"tfkd: {error}")
        return FAILED
    from tfkd_ray.learn.teachers import teacher_folder

    for run in runs:
        print(short_path(teacher_folder(run, storage.folder)))
    return OK


# --- the other verbs -------------------------------------------------------------------------------------------


def train_verb(args: Namespace) -> int:

    if isinstance(args.storage, str):
        raise ConfigError(
            "tfkd train writes to this machine's disk: name a directory, or leave it out",
            "--storage",
        )
    space = load_file(args)
    try:
        config = space.single()
    except ConfigError as error:
        mine = f"tfkd tune {shlex.quote(args.file)}"
        raise ConfigError([p.replace("tfkd tune FILE", mine) for p in error.problems]) from None
    from tfkd_ray.learn.chance import chance_note
    from tfkd_ray.learn.dataset import notes_on
    from tfkd_ray.settings.files import check_writable, expanded
    from tfkd_ray.space.fitted import size_notes

    name = f"{Path(args.file).stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    out = expanded(args.out or args.storage / name).absolute()

    check_writable(out, "--out DIR")
    have_data(config, args)
    with in_file(args.file):
        notes = config.try_own_code()
    for note in notes:
        say_error(f"note: {note}")
    config = same_run(config, out)
    for note in (*notes_on(config.data), *size_notes(config)):
        say_error(f"note: {note}")
    pressed: list[int] = []

    def after_the_epoch(number: int, frame: Any) -> None:
        """Stop at the end of the epoch on the first Ctrl-C, at once on the second.

        The state can only be saved at the end of an epoch.
        """
        pressed.append(number)
        signal.signal(number, signal.default_int_handler)

    try:
        epochs = _epochs(config, out, expanded(args.storage).absolute())
        for metrics in epochs:
            shown = {
                k: metrics[k]
                for k in ("train_loss", "val_accuracy", "val_nll", "val_ema_accuracy", "lr")
                if k in metrics
            }
            say_error(
                f"epoch {metrics['epoch']:.0f}: "
                + ", ".join(f"{k} {v:.4g}" for k, v in shown.items())
            )
            if not pressed:
                signal.signal(signal.SIGINT, after_the_epoch)
            elif metrics["epoch"] < config.epochs:
                epochs.close()
                say_error(
                    f"interrupted; to resume the run, repeat the command with --out {short_path(out)}"
                )
                return INTERRUPTED
    except (ArithmeticError, RuntimeError) as error:
        say_error(f"tfkd train: failed: {error}")
        return FAILED
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # the averaged weights are the student
    names = ("val_ema_accuracy", "val_accuracy", "train_loss")
    name = next(name for name in names if name in metrics)
    print(f"{name} {metrics[name]:.4f} after {metrics['epoch']:.0f} epochs, in {short_path(out)}")
    if guessed := chance_note(config.data, metrics.get("val_accuracy")):
        say_error(f"note: {guessed}")
    return OK


def _epochs(config: "TrainConfig", out: Path, storage: Path) -> Any:
    """Yield the epochs of one run and append each to metrics.jsonl.

    It trains in this process, or on Ray Train with several workers.
    """
    import json

    from tfkd_ray.learn.teachers import find_or_train
    from tfkd_ray.settings.files import write_text
    from tfkd_ray.settings.yaml import dump_yaml

    if config.workers > 1:
        join_ray(None, config.workers)
        from tfkd_ray.run.connect import check_room

        check_room(config)
    teacher = find_or_train(config, storage, say_error)
    write_text(out / "config.yaml", dump_yaml(config.tree))
    if config.workers > 1:
        from tfkd_ray.run.group import WorkerGroup
        from tfkd_ray.store.assignment import Assignment
        from tfkd_ray.store.storage import Directory

        assignment = Assignment(out.name, config.epochs, directory=out, storage=Directory(storage))
        group = WorkerGroup(config, out / "group", say_error)
        source: Any = group.epochs(config.tree, assignment)
    else:
        from tfkd_ray.learn.loop import train_in

        source = train_in(out, config, teacher=teacher, say=say_error)
    lines: list[str] = []
    head = head_needed() if config.workers > 1 else contextlib.nullcontext()
    try:
        with head:
            for metrics in source:
                lines.append(json.dumps(metrics) + "\n")
                write_text(out / "metrics.jsonl", "".join(lines))
                yield metrics
    finally:
        source.close()
        if config.workers > 1:
            group.close()
