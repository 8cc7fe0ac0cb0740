"""Verbs of `tfkd` that run as a job on a cluster."""

import tempfile
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tfkd_ray.launch.check import check
from tfkd_ray.launch.clusterfile import load_cluster
from tfkd_ray.launch.commands import slurm_submit
from tfkd_ray.launch.jobs import WORKING, check_ray_version, check_submitted_from, stage_apart
from tfkd_ray.launch.verbs import (
    SENT,
    StepFailed,
    check_places,
    is_arms,
    is_job,
    job_words,
    reached,
    run,
    run_job,
)
from tfkd_ray.settings.columns import to_stderr as say
from tfkd_ray.settings.errors import OK, ConfigError
from tfkd_ray.settings.files import expanded
from tfkd_ray.settings.passwords import shown
from tfkd_ray.settings.yaml import find_file
from tfkd_ray.store.experiment import check_name
from tfkd_ray.store.storage import is_url, storage_at


def check_options(args: Namespace) -> None:
    """Refuse contradictory options, unknown kinds of address and, in a job, other versions."""
    if args.cluster and args.address:
        raise ConfigError(
            "--cluster and --address: one of them says where the sweep runs; give one"
        )
    if args.detach and not is_job(args):
        raise ConfigError(
            "--detach: needs --cluster FILE or --address http://...: a sweep on this machine ends with this command"
        )
    if is_job(args) and getattr(args, "on_end", None):
        raise ConfigError(
            "--on-end: a job ends on the cluster, and everyone there can see its command; run yours after this one, "
            "which follows the job: tfkd ... ; COMMAND"
        )
    address = args.address or ""
    if "://" in address and not is_job(args):
        got = shown(address)
        raise ConfigError(
            f"--address: auto, HOST:PORT or http://HOST:PORT (which submits a job), got {got!r}"
        )
    check_submitted_from()


def sweep_as_job(
    words: Sequence[str], args: Namespace, *, file: Path | None = None, shape: Any = None
) -> int:
    """Run `tfkd WORDS` as a job; the word SENT stands for a file that is sent with it."""
    try:
        if args.cluster is None:
            address = args.address.rstrip("/")
            check_ray_version(address)
            return _send(address, address, words, file, args.detach)
        cluster = load_cluster(args.cluster)
        check(cluster, shape)
        if cluster.kind == "slurm":
            run(
                slurm_submit(cluster, ["tfkd", *(str(file) if w == SENT else w for w in words)]),
                what="submitting",
            )
            return OK
        with reached(cluster) as address:
            return _send(args.cluster, address, words, file, args.detach)
    except StepFailed as error:
        say(f"tfkd {args.verb}: {error}")
        return error.ends


def _send(where: str, address: str, words: Sequence[str], file: Path | None, detach: bool) -> int:
    with tempfile.TemporaryDirectory(prefix="tfkd-job-") as folder:
        sent = stage_apart(Path.cwd(), Path(folder), file)
        command = [
            "python",
            "-m",
            "tfkd_ray",
            *(str(sent) if word == SENT else word for word in words),
        ]
        return run_job(
            where, address, Path(folder), command, name=words[0], detach=detach, working=WORKING
        )


def tune_as_job(args: Namespace, space: Any) -> int | None:
    """Run `tfkd tune` as a job on a cluster; return None if it runs here."""
    check_options(args)
    if not is_job(args):
        return None
    check_places(args.prior, "--prior")
    file = find_file(args.file, "search_spaces")
    name = args.name if args.name is not None else f"{file.stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    check_name(name)
    storage = _storage_of(args)
    words = [
        *job_words(args, sent="file", storage=storage),
        *([] if args.name is not None else ["--name", name]),
    ]
    say(
        f"experiment: {storage or '$TFKD_RESULTS'}/{name}, on the cluster; tfkd status, report and resume take "
        + ("that URL" if "://" in (storage or "") else "that path where it is mounted")
    )
    return sweep_as_job(words, args, file=file, shape=space.example)


def resume_as_job(args: Namespace) -> int | None:
    """Run `tfkd resume` as a job on a cluster; return None if it runs here."""
    check_options(args)
    if not is_job(args):
        return None
    check_places([args.experiment], "resume")
    file = find_file(args.space, "search_spaces") if args.space else None
    return sweep_as_job(job_words(args, sent="space"), args, file=file)


def confirm_as_job(args: Namespace) -> int | None:
    """Run `tfkd confirm` as a job on a cluster; return None if it runs here."""
    check_options(args)
    if not is_job(args):
        return None
    if not is_arms(args):
        if "://" not in args.file and not Path(args.file).is_absolute():
            raise ConfigError(
                f"an absolute path that the cluster can reach, got {args.file}", "confirm"
            )
        return sweep_as_job(job_words(args), args)
    from tfkd_ray.space.arms import load_arms

    shape = load_arms(args.file, args.overrides, preset=args.preset).example
    file, storage = find_file(args.file, "search_spaces"), _storage_of(args)
    return sweep_as_job(job_words(args, sent="file", storage=storage), args, file=file, shape=shape)


def teacher_as_job(args: Namespace, shape: Any) -> int | None:
    """Run `tfkd teacher train` as a job on a cluster; return None if it runs here."""
    check_options(args)
    if not is_job(args):
        return None
    words = job_words(args, sent="file", storage=_storage_of(args))
    return sweep_as_job(words, args, file=find_file(args.file, "search_spaces"), shape=shape)


def doctor_as_job(args: Namespace, shape: Any) -> int | None:
    """Run `tfkd doctor` as a job on a cluster; return None if it runs here."""
    args.detach = False
    check_options(args)
    if not is_job(args):
        return None
    words = job_words(
        args, sent="space", storage=_storage_of(args) if args.cluster or args.storage else None
    )
    return sweep_as_job(
        words,
        args,
        file=find_file(args.space, "search_spaces") if args.space else None,
        shape=shape,
    )


def _storage_of(args: Namespace) -> str | None:
    """Return the cluster's storage: `--storage`, or the file's; None: Slurm's script sets it."""
    if args.storage not in (None, Path("tfkd_results")):  # the defaults
        if isinstance(args.storage, str):
            return str(storage_at(args.storage))
        if not args.storage.is_absolute():
            raise ConfigError(
                f"--storage: an absolute path that all nodes of the cluster can reach, got {args.storage}"
            )
        return str(args.storage)
    if args.cluster is None:
        raise ConfigError(
            "--storage: required with --address http://...: a directory that all nodes of the cluster can reach"
        )
    file = load_cluster(args.cluster)
    if file.kind == "slurm":
        return None
    check(file)
    assert file.storage is not None, f"{args.cluster=}"
    return str(expanded(file.storage)) if file.here and not is_url(file.storage) else file.storage
