"""A sweep: a `ray.tune.Tuner` made of space, teachers, search and stopping."""

import contextlib
import functools
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import ConcurrencyLimiter, Searcher
from ray.tune.stopper import CombinedStopper, FunctionStopper
from ray.tune.utils import flatten_dict
from sqlalchemy.exc import OperationalError

from tfkd_ray.learn import teachers
from tfkd_ray.learn.chance import guessing_on
from tfkd_ray.learn.checkpoint import BEFORE, LAST
from tfkd_ray.learn.config import DRIVER, TeacherRun, TrainConfig
from tfkd_ray.learn.dataset import forget_loaded, notes_on, seal_test_split
from tfkd_ray.run.callbacks import (
    Budget,
    Lock,
    Losses,
    NoNodeLeft,
    SoftLabels,
    failed_names,
    in_order,
    over_budget,
    spent_so_far,
    workers_of,
)
from tfkd_ray.run.connect import (
    check_room,
    connect,
    forget_lessons,
    give_larger_share,
    grows_for,
    keep_keys_at_home,
    raise_own_error,
    report_each_epoch,
    room_for,
    send_elsewhere,
    skip_snapshots,
)  # fmt: skip
from tfkd_ray.run.epochs import check_data_here
from tfkd_ray.run.group import GroupLost, TrialFailed, teacher_epochs
from tfkd_ray.run.journal import drop_stale_locks
from tfkd_ray.run.nodes import check_gpus, check_shared
from tfkd_ray.run.priors import prior_trials
from tfkd_ray.run.searcher import (
    OptunaSearcher,
    StudyStopping,
    copy_trials,
    outside_of,
    take_saved_journal,
)
from tfkd_ray.run.stops import Stops, drop_stop, end_stopped
from tfkd_ray.run.studies import close_storage, open_storage, whole_url, without_password
from tfkd_ray.run.trial import StudentTrial, resources_of
from tfkd_ray.settings import own_code
from tfkd_ray.settings.columns import to_stderr
from tfkd_ray.settings.errors import ConfigError, Say, Sentences, readable, some_of
from tfkd_ray.settings.files import DISK_ERRORS, check_writable, write_text
from tfkd_ray.settings.passwords import masked
from tfkd_ray.settings.schema import validated
from tfkd_ray.settings.yaml import Numbers, Tree, Values, dump_yaml, in_yaml
from tfkd_ray.show.listener import OwnCallback
from tfkd_ray.show.tensorboard import TensorBoard
from tfkd_ray.space.fitted import size_notes
from tfkd_ray.space.relate import not_comparable, not_superset
from tfkd_ray.space.search_config import Asha, Pausing, SearchConfig, more_samples
from tfkd_ray.space.space import Space, build_space, load_space, pinned, with_digests
from tfkd_ray.store.assignment import assigned
from tfkd_ray.store.ended import end_record, read_briefs
from tfkd_ray.store.experiment import (
    FULL_LENGTH,
    Record,
    check_no_links,
    gone_sentence,
    is_begun,
    read_experiment,
    read_records,
    study_and_space,
    trials_folder,
    write_experiment,
)
from tfkd_ray.store.storage import DEFAULT, Experiment, Storage, checked, to_continue

MANY_TRIALS = 16
"""Number of concurrent trials from which on their processes are started in parallel."""
MANY_EPOCHS = "1000"
"""Number of results in a message, more than any time for it allows."""
LOOK_S = 5
"""Interval of counting nodes, which may come and go."""
OnTeacher = Callable[[TeacherRun, Tree | None], None]
"""Called with a teacher's run before it is trained (with None) and after (with teacher.json)."""
OnTeacherEpoch = Callable[[TeacherRun, Numbers], None]
"""Called every other second while a teacher trains, with the metrics of its last epoch."""
STORAGE = DEFAULT
"""Default directory of experiments and teachers, below the current directory."""


def build_tuner(
    space: Space | Tree | Path | str,
    *,
    name: str | None = None,
    storage: Storage | Path | str = STORAGE,
    callbacks: Sequence[tune.Callback] = (),
    tune_config: tune.TuneConfig | None = None,
    run_config: tune.RunConfig | None = None,
    on_teacher: OnTeacher | None = None,
    on_teacher_epoch: OnTeacherEpoch | None = None,
    priors: Sequence[Path | str] = (),
    on_budget: Say | None = None,
    on_note: Say | None = None,
) -> tune.Tuner:
    """Return a `ray.tune.Tuner` that runs a space; its `.fit()` returns Ray's own `ResultGrid`.

    Connects to Ray if there is no connection, creates the experiment's directory, and trains
    missing teachers once, before it returns. Wrong input raises a ConfigError before anything is
    written.

    Args:
        space: a `Space`, the tree of one, or the path of a space file.
        name: name of the experiment, a new directory below `storage`. None: the file's name and the
            time.
        storage: directory that all nodes see, s3://BUCKET/PREFIX, gs://BUCKET/PREFIX, or an open
            storage (`storage.checked`); the experiments in it share teachers.
        callbacks: additional Tune callbacks, for example of MLflow or W&B.
        tune_config: Ray's own; its metric, scheduler, concurrency and time budget override the
            space's `search`. Settings without effect (searcher, number and names of trials) raise.
        run_config: Ray's own; its `name` and `storage_path` replace `name` and `storage`. Trials
            that its `stop` ends have full length. Settings without effect (checkpoints, file
            system, `fail_fast`) raise.
        on_teacher: called with a teacher's run before it is trained (with None) and after (with the
            content of teacher.json).
        on_teacher_epoch: called every other second while a teacher trains, with its run and the
            metrics of its last epoch; they are empty before the first.
        priors: directories of earlier experiments whose finished trials the sampler uses.
        on_budget: called with a sentence if a budget of the space's `search` ends the sweep.
        on_note: called with a sentence if object storage does not answer, and when it does again.
            None: standard error.
    """
    space, stem = _as_space(space)
    callbacks, priors = _callbacks(callbacks), _list_of_argument(priors, "priors", "directories")
    run_config = run_config or tune.RunConfig()
    tune_config = tune_config or tune.TuneConfig()
    if problems := list(_ray_config_problems(tune_config, run_config)):
        raise ConfigError(problems)
    space, tune_config = _overridden(space, tune_config)
    if run_config.name and name and run_config.name != name:
        raise ConfigError(
            f"name: {name!r}, and run_config.name is {run_config.name!r}; give one of them"
        )
    if (
        run_config.storage_path != tune.RunConfig().storage_path
    ):  # Ray's default, not set by the user
        if str(storage) not in (str(STORAGE), str(run_config.storage_path)):
            raise ConfigError(
                f"storage: {storage}, and run_config.storage_path is {run_config.storage_path}; give one of them"
            )
        storage = run_config.storage_path
    storage = checked(storage)
    name = run_config.name or name or f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    storage.check_new(name)
    experiment = storage.folder / name
    space.example.data.check()
    space = pinned(space)
    prior_trials(space, priors)
    url = space.search.storage and whole_url(space.search.storage)
    if url:
        space = _with_search(space, study=space.search.study or name)
        _check_free(url, str(space.search.study), begun=is_begun(experiment))
    space = without_password(space)
    prepare(space.example, storage, space.try_own_code())
    train_teachers(
        space.teacher_runs(), storage, on_teacher, on_note=on_note, on_epoch=on_teacher_epoch
    )
    experiment.mkdir(parents=True, exist_ok=True)
    lock = Lock(storage, name)
    (experiment / "study.journal").unlink(
        missing_ok=True
    )  # of a driver that was killed while creating this
    searcher = _searcher(space, experiment, storage, url, priors=priors)
    searcher.remaining()  # creates the studies, with the priors in them
    write_experiment(experiment, space.tree, [masked(word) for word in sys.argv])
    stops = Stops(Experiment(storage, name), on_note)
    return _tuner(
        space,
        experiment,
        lock,
        callbacks,
        tune_config,
        run_config,
        searcher,
        stops,
        on_budget,
        on_note,
    )


def _list_of_argument(given: Any, argument: str, what: str) -> list[Any]:
    """Return an argument as a list; raise a ConfigError for one thing in place of a list."""
    if isinstance(given, str | Path) or not isinstance(given, Iterable):
        raise ConfigError(f"needs a list of {what}, got {given!r}", argument)
    return list(given)


def _callbacks(given: Any) -> list[tune.Callback]:
    """Return Tune callbacks as a list; raise a ConfigError for anything else."""
    found = _list_of_argument(given, "callbacks", "ray.tune.Callback")
    for one in found:
        if isinstance(one, type):
            raise ConfigError(f"{one.__name__} is a class; give an object of it", "callbacks")
        if not isinstance(one, tune.Callback):
            raise ConfigError(f"{one!r} is no ray.tune.Callback", "callbacks")
    return found


def resume_tuner(
    experiment: Experiment | Path | str,
    *,
    add_trials: int = 0,
    callbacks: Sequence[tune.Callback] = (),
    on_teacher: OnTeacher | None = None,
    on_teacher_epoch: OnTeacherEpoch | None = None,
    retry_failed: bool = False,
    time_budget_s: float | None = None,
    gpu_hours: float | None = None,
    cpu_hours: float | None = None,
    max_failed_trials: int | None = None,
    priors: Sequence[Path | str] = (),
    space: Space | Tree | Path | str | None = None,
    study_storage: str | None = None,
    on_budget: Say | None = None,
    on_note: Say | None = None,
) -> tune.Tuner:
    """Return a Tuner that resumes an experiment: unfinished trials first, then new ones.

    Unfinished trials continue from their last checkpoint. Finished trials are in the study and are
    not run again; Ray's own snapshot is not read.

    Args:
        experiment: its directory, its URL on object storage, or an open storage
            (`storage.to_continue`).
        add_trials: number to add to `search.num_samples`.
        retry_failed: run the failed trials again, with their numbers and parameters, from their
            last checkpoints.
        time_budget_s: a new budget, which starts from zero; likewise `gpu_hours`, `cpu_hours` and
            `max_failed_trials`. None: continue the remaining budget.
        priors: more earlier experiments for the sampler.
        space: a wider or narrower space to continue in. Trials of the experiment that lie outside
            stay on record, and do not guide the search; some must lie inside.
        study_storage: the study storage's URL, if it has moved or TFKD_STORAGE lacks its password.
        on_budget: called with a sentence if a budget ends the sweep.
        on_note: as for `build_tuner`.
    """
    budgets = {
        "time_budget_s": time_budget_s,
        "gpu_hours": gpu_hours,
        "cpu_hours": cpu_hours,
        "max_failed_trials": max_failed_trials,
    }
    _check_budgets(budgets)
    callbacks, priors = _callbacks(callbacks), _list_of_argument(priors, "priors", "directories")
    found = to_continue(experiment)
    storage, experiment = found.storage, found.folder
    about = read_experiment(experiment)
    own_code.remember(about.get("directory"))
    check_writable(experiment, "an experiment directory of yours")
    with contextlib.ExitStack() as undone:
        lock = Lock(*found)
        undone.callback(lock.release)
        drop_stop(found)
        samples = about["space"]["search"]["num_samples"]
        about["space"]["search"]["num_samples"] = more_samples(samples, add_trials)
        if study_storage is not None:
            about["space"]["search"]["storage"] = study_storage
        old = build_space(about["space"], experiment / "experiment.yaml")
        say = on_note or to_stderr
        if take_saved_journal(experiment / "study.journal"):
            say(
                "study.journal was lost while the sweep ran: continuing with what the search saved then"
            )
        _check_own_study(old, experiment / "study.journal")
        url = old.search.storage and whole_url(old.search.storage)
        old = without_password(old)
        searcher = _searcher(old, experiment, storage, url)
        undone.callback(searcher.close)
        storage.drop_unknown(found.name, searcher.names())
        _check_no_links_in(experiment, searcher)
        _check_unchanged(old, searcher)
        there, gone = read_briefs(experiment)
        if gone:
            say(gone_sentence(gone))
        _check_all_there(searcher, experiment, there)
        new = old if space is None else _widened(old, _as_space(space)[0], add_trials, experiment)
        if new.search.study != old.search.study:
            _check_some_inside(searcher, new, experiment, say)
        earlier = prior_trials(new, priors)
        spent = spent_so_far(experiment, workers=workers_of(old.tree), records=there)
        spent["max_failed_trials"] = (
            0 if retry_failed else len(failed_names(there) - searcher.waiting_names())
        )
        new = _with_search(
            new, **{name: more + spent[name] for name, more in budgets.items() if more is not None}
        )
        over = over_budget(new.search.budgets, spent)
        if over:
            raise ConfigError(
                f"{over}; to resume, give a new budget, which counts from zero", experiment
            )
        prepare(new.example, storage, new.try_own_code(), begun=True)
        if new.search.study != old.search.study:
            wider = _searcher(new, experiment, storage, url)
            copy_trials(searcher, wider)
            searcher = wider
        elif new.search.finalists != old.search.finalists:
            searcher.close()
            searcher = _searcher(new, experiment, storage, url)
        searcher.add_priors(earlier)
        if retry_failed:
            searcher.retry_failed()
        if (
            add_trials
            or study_storage
            or space is not None
            or any(more is not None for more in budgets.values())
        ):
            about["space"] = new.tree
            write_text(experiment / "experiment.yaml", dump_yaml(about), durable=True)
        _end_outside(searcher, experiment)
        train_teachers(
            new.teacher_runs(), storage, on_teacher, on_note=on_note, on_epoch=on_teacher_epoch
        )
        ray_configs = tune.TuneConfig(), tune.RunConfig()
        end_stopped(found, searcher)
        stops = Stops(found, on_note)
        tuner = _tuner(
            new, experiment, lock, callbacks, *ray_configs, searcher, stops, on_budget, on_note
        )
        undone.pop_all()
    return tuner


def _check_budgets(budgets: Tree) -> None:
    for name, more in budgets.items():
        if more is not None and not more > 0:
            raise ConfigError(f"{name}: a budget is above 0, got {more}")


def _with_search(space: Space, **settings: Any) -> Space:
    """Return the space with other settings of its search."""
    try:
        search = validated(SearchConfig, {**space.search.tree, **settings})
    except ConfigError as error:
        raise ConfigError(f"search.{p}" for p in error.problems) from None
    return replace(space, search=search, tree={**space.tree, "search": search.tree})


def _searcher(
    space: Space, experiment: Path, storage: Storage, url: str | None, **more: Any
) -> OptunaSearcher:
    journal = experiment / "study.journal"
    if url is None:
        drop_stale_locks(journal)  # of a dead driver: this process holds the experiment
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    folder, place = trials_folder(experiment), {"home": own_code.here(), **storage.wire()}
    return OptunaSearcher(space, journal, folder=folder, place=place, storage=url, **more)


def _check_free(url: str, study: str, *, begun: bool) -> None:
    """Refuse a storage that cannot be reached, or that already has studies of this name.

    With `begun`, remove empty studies: a driver was killed while creating them.
    """
    storage = open_storage(url)
    found = optuna.study.get_all_study_summaries(storage=storage)
    names = [s.study_name for s in found if s.study_name.startswith(f"{study}/")]
    taken = [
        name
        for name in names
        if not begun or any(s.n_trials for s in found if s.study_name == name)
    ]
    for name in names if not taken else ():
        optuna.delete_study(study_name=name, storage=storage)
    close_storage(storage)
    if taken:
        raise ConfigError(
            f"search.study: {masked(url)} has studies called {study!r} already; choose another --name"
        )


def _check_own_study(space: Space, journal: Path) -> None:
    """Refuse cmaes with somebody else's journal, in which Optuna would read pickles."""
    if space.sampler.name == "cmaes" and journal.exists() and journal.stat().st_uid != os.getuid():
        message = (
            f"study.journal is another user's ({journal.stat().st_uid}), and cmaes keeps its state in it as a pickle, "
            "which can run code; if you trust the user who wrote it, copy the experiment and resume the copy"
        )
        raise ConfigError(message, journal.parent)


def _check_unchanged(space: Space, searcher: OptunaSearcher) -> None:
    """Refuse an experiment.yaml whose space differs from the space of its studies."""
    for tree in searcher.recorded():
        was = build_space(tree, searcher.journal)
        missing, more = not_superset(was, space), not_superset(space, was)
        how = "widened by hand; restore it, and resume with: tfkd resume --space FILE"
        if missing:
            how = "changed by hand, and no longer contains the existing trials; restore it"
        if missing or more:
            file = searcher.journal.with_name("experiment.yaml")
            raise ConfigError([f"its space was {how}", *(missing or more)], file)


def _check_no_links_in(experiment: Path, searcher: OptunaSearcher) -> None:
    """Raise if the folder of a trial that goes on contains a link, whatever ended.jsonl says of it."""
    known = searcher.known()
    for name in searcher.waiting_names() | {known[n] for n in searcher.paused()}:
        check_no_links(trials_folder(experiment) / name)
        check_no_links(experiment / "tb" / name)


def _check_all_there(searcher: OptunaSearcher, experiment: Path, there: Iterable[Record]) -> None:
    """Refuse studies that lack trials of this experiment: numbers would be used twice."""
    known = searcher.names()
    lost = [run.name for record in there for run in record.runs if run.name not in known]
    if lost:
        where = "study.journal" if searcher.storage is None else masked(searcher.storage)
        message = (
            f"{where} does not hold {some_of(lost)}, whose files are there; "
            "put back a copy of it, or remove their folders"
        )
        raise ConfigError(message, experiment)


def _check_some_inside(searcher: OptunaSearcher, space: Space, experiment: Path, say: Say) -> None:
    """Refuse a space that leaves out all trials; say how many a narrower one leaves out."""
    inside, outside = outside_of(searcher, space)
    if not outside:
        return
    many = len(inside) + len(outside)
    if not inside:
        why = Counter(difference for told in outside.values() for difference in told)
        raise ConfigError(
            [
                f"none of its {many} trials lies in the new space; begin a new experiment there: tfkd tune",
                *(difference for difference, _ in why.most_common(3)),
            ],
            experiment,
        )
    say(
        f"{len(outside)} of {many} trials lie outside the new space: they are kept but do not guide the search"
    )


def _end_outside(searcher: OptunaSearcher, experiment: Path) -> None:
    """Note the end of unfinished trials that the space leaves out: they are not resumed."""
    outside = set(searcher.outside().values())
    if not outside:
        return
    left_out = [record for record in read_records(experiment) if record.name in outside]
    for run in (run for record in left_out for run in record.runs):
        if run.status in ("running", "interrupted", "paused"):
            reason = "outside of the narrower space in which the sweep was resumed"
            ended = replace(run, status="stopped", reason=reason)
            end_record(ended, searcher.space.search.measured)
            for state in (LAST, BEFORE):
                (run.folder / state).unlink(missing_ok=True)


def _widened(old: Space, new: Space, add_trials: int, experiment: Path) -> Space:
    """Return a wider or narrower space with the old one's storage and new names for its studies."""
    if not new.example.data.digests:
        new = with_digests(new, old.example.data.digests)
    problems = not_comparable(old, new)
    if problems:
        message = "an experiment is resumed in its own space, or in a wider or narrower one"
        raise ConfigError([message, *problems], experiment)
    if new.search.storage not in (None, old.search.storage):
        raise ConfigError(
            "search.storage: an experiment's studies stay where they are; leave it out", experiment
        )
    late = [point for point in new.search.points if point not in old.search.points]
    if late:
        raise ConfigError(
            f"search.points: {in_yaml(late[0])} is new, but the first trials of this sweep have already begun; leave "
            "it out, or begin a new experiment: tfkd tune",
            experiment,
        )
    finalists = _kept_finalists(old.search, new.search, experiment)
    alike = {b.objective: b.parameters for b in old.branches} == {
        b.objective: b.parameters for b in new.branches
    }
    name, count = study_and_space(old.search.study)
    study = old.search.study if alike else f"{name}@{count + 1}"
    samples = more_samples(new.search.num_samples, add_trials)
    budgets = old.search.budgets | new.search.budgets
    return _with_search(
        new,
        storage=old.search.storage,
        study=study,
        num_samples=samples,
        finalists=finalists,
        **budgets,
    )


def _kept_finalists(old: SearchConfig, new: SearchConfig, experiment: Path) -> Tree | None:
    """Return the finalists of a sweep that is resumed: those of the new space, if it has any."""
    was, now = old.finalists, new.finalists
    if was is not None and now is not None and now.seeds < was.seeds:
        raise ConfigError(
            f"search.finalists.seeds: {now.seeds}, and finalists here get {was.seeds}, some of which may have run; "
            "leave it, or raise it",
            experiment,
        )
    kept = now or was
    return None if kept is None else kept.tree


def prepare(
    config: TrainConfig,
    storage: Storage,
    notes: Sequence[str] | None = None,
    *,
    begun: bool = False,
) -> None:
    """Check data and cluster before a directory is made: refuse what is missing or can never run.

    Data that an experiment has recorded are refused if they have changed since.

    Args:
        notes: those of `try_own_code`, if it was asked for more than this configuration.
        begun: whether the experiment has begun, so that its batch size is no longer refused.
    """
    config.data.check()
    if config.data.digests:
        config.data.pinned()
    for note in (*notes_on(config.data), *size_notes(config, begun=begun)):
        to_stderr(f"note: {note}")
    guessing_on(config.data)  # which the end of a sweep asks, when the data are gone
    forget_loaded()
    for note in config.try_own_code() if notes is None else notes:
        to_stderr(f"note: {note}")
    connect(workers=config.workers)
    forget_lessons()
    check_room(config)
    check_shared(storage)
    if config.gpus_per_worker:
        check_gpus()


class TeacherFailed(RuntimeError):
    """A teacher that a sweep needs could not be trained; the sweep has not started."""


def train_teachers(
    runs: Iterable[TeacherRun],
    storage: Storage,
    on_teacher: OnTeacher | None = None,
    on_failure: Callable[[TeacherRun, str], None] | None = None,
    on_note: Say | None = None,
    on_epoch: OnTeacherEpoch | None = None,
) -> None:
    """Train the missing teachers in parallel Ray tasks, as students are: each by as many workers.

    This process copies weights from elsewhere: it may be the only one that sees their file; a task
    with one worker's resources judges them. If a
    teacher fails, the others finish and are kept (`ray.cancel` of a task that just ended can end
    the driver, Ray 2.60); then TeacherFailed is raised, or `on_failure` called with the reason.
    `on_note` (default: standard error) gets a sentence if data have changed since a teacher was
    trained, or if a teacher is no better than guessing.
    """
    on_epoch = on_epoch or (lambda run, metrics: None)
    on_teacher = on_teacher or (lambda run, about: None)
    note = on_note or to_stderr
    runs, folder = list(runs), storage.folder
    for run in runs:
        _prepare(run, storage, note)
    tasks = []
    for run in runs:
        if not teachers.is_trained(run, folder):
            on_teacher(run, None)
            tasks.append((run, _begun_teacher(run, storage)))
    for run, task in tasks:
        try:
            while not ray.wait([task], timeout=storage.look_s)[0]:
                on_epoch(run, teachers.progress_of(run, storage))
            about = ray.get(task)
            teachers.fetch_teacher(run, storage, weights=False)
            on_teacher(run, about)
        except ray.exceptions.RayTaskError as error:
            reason = readable(
                f"teacher {teachers.teacher_name(run)}: {type(error.cause).__name__}: {error.cause}"
            )
            if on_failure is not None:
                on_failure(run, reason)
            elif isinstance(error.cause, ConfigError):
                raise error.cause from None
            else:
                raise TeacherFailed(reason) from None
    teachers.tell_doubts(runs, folder, note)


def _prepare(run: TeacherRun, storage: Storage, note: Say) -> None:
    """Take a teacher's weights from their file, if it has one; note that its data have changed."""
    folder = storage.folder
    teachers.fetch_teacher(run, storage, weights=False)
    is_there = teachers.is_trained(run, folder)
    if not is_there and (changed := teachers.of_other_data(run, folder)):
        note(changed)
    if run.weights is None:
        return
    if is_there:
        teachers.check_source(run, folder)
        return
    teachers.take_weights(run, folder)
    teachers.upload(run, storage)


def _begun_teacher(run: TeacherRun, storage: Storage) -> Any:
    """Return a task that trains a teacher with a worker's resources, or by a group of workers."""
    need = run.worker_resources if run.workers == 1 else {"CPU": 0.0, DRIVER: 0.01}
    task = ray.remote(_teacher_task).options(
        num_cpus=need.pop("CPU"),
        num_gpus=need.pop("GPU", 0),
        resources=need,
        max_retries=2,
        retry_exceptions=[GroupLost],
    )
    return task.remote(run, storage, own_code.here())


def _teacher_task(run: TeacherRun, storage: Storage, home: own_code.Place) -> Tree:
    seal_test_split()
    own_code.enter(home)
    forget_loaded()  # Ray's process may have trained a teacher on data that have changed since
    check_data_here(run)
    teachers.fetch_teacher(run, storage)
    on_saved = storage.on_saved(teachers.teacher_folder(run, storage.folder))
    tell = teachers.progress_teller(run, storage)
    in_group = functools.partial(teacher_epochs, run, storage) if run.workers > 1 else None
    try:
        about = teachers.train_teacher(run, storage.folder, tell, on_saved, in_group)
    except TrialFailed as error:  # which no other process can unpickle
        raise TeacherFailed(str(error)) from None
    teachers.upload(run, storage)
    return about


def _as_space(space: Space | Tree | Path | str) -> tuple[Space, str]:
    if isinstance(space, Space):
        return space, "sweep"
    if isinstance(space, dict):
        return build_space(space), "sweep"
    return load_space(Path(space)), Path(space).stem


def _ray_config_problems(tune_config: tune.TuneConfig, run_config: tune.RunConfig) -> Sentences:
    """Reject Ray settings that would be ignored because a space or a trial sets them."""
    usual, usual_run = tune.TuneConfig(), tune.RunConfig()
    if tune_config.search_alg is not None:
        yield (
            "tune_config.search_alg: build_tuner brings its own searcher; to use another, give StudentTrial to a Tuner "
            "of your own"
        )
    if tune_config.num_samples != usual.num_samples:
        yield (
            "tune_config.num_samples: the space says how many trials; set search.num_samples there"
        )
    if (tune_config.max_concurrent_trials or 0) < 0:
        yield (
            f"tune_config.max_concurrent_trials: 0 (no limit) or more, got {tune_config.max_concurrent_trials}"
        )
    for name in ("trial_name_creator", "trial_dirname_creator"):
        if getattr(tune_config, name) is not None:
            yield (
                f"tune_config.{name}: tfkd finds trials by the names that it gives them; leave it out"
            )
    if tune_config.chdir_to_trial_dir != usual.chdir_to_trial_dir:
        yield (
            "tune_config.chdir_to_trial_dir: Ray no longer supports it; set RAY_CHDIR_TO_TRIAL_DIR"
        )
    if (
        tune_config.metric is not None
        and getattr(tune_config.scheduler, "metric", None) is not None
    ):
        yield ("tune_config.metric: the scheduler has a metric of its own; give one of them")
    if run_config.checkpoint_config not in (None, tune.CheckpointConfig()):
        yield (
            "run_config.checkpoint_config: trials keep their own checkpoints; see checkpoint_every_s"
        )
    if run_config.failure_config is not None and run_config.failure_config.fail_fast:
        yield (
            "run_config.failure_config.fail_fast: a failed trial does not raise here; set search.max_failed_trials: 1 "
            "in the space"
        )
    if run_config.storage_filesystem != usual_run.storage_filesystem:
        yield (
            "run_config.storage_filesystem: an experiment goes to a directory, s3://BUCKET/PREFIX or "
            "gs://BUCKET/PREFIX; say which with storage_path"
        )


def _overridden(space: Space, tune_config: tune.TuneConfig) -> tuple[Space, tune.TuneConfig]:
    """Return (the space with a `TuneConfig`'s search settings, the rest of the `TuneConfig`)."""
    metric, mode, seconds = tune_config.metric, tune_config.mode, tune_config.time_budget_s
    search = space.search
    if tune_config.scheduler is not None and isinstance(space.stopping, Pausing):
        raise ConfigError(
            "tune_config.scheduler: the space's search.stopping is pausing, which is a scheduler of its own; leave one "
            "of them out (search.stopping: none)"
        )
    if tune_config.scheduler is not None and search.finalists is not None:
        raise ConfigError(
            "tune_config.scheduler: the space has search.finalists, whose runs with further seeds a scheduler of yours "
            "would stop; leave one of them out"
        )
    if metric is not None and metric not in search.metrics[:1]:
        if search.more_metrics:
            raise ConfigError(
                f"tune_config.metric: {metric}, and the space is searched for {', '.join(search.metrics)}"
            )
        try:
            space = _with_search(space, metric=metric)
        except ConfigError as error:
            raise ConfigError(
                f"tune_config.{problem.removeprefix('search.')}" for problem in error.problems
            ) from None
    if mode is not None and mode != space.search.mode:
        better = {"max": "the higher", "min": "the lower"}[space.search.mode]
        raise ConfigError(
            f"tune_config.mode: {space.search.metric} is better {better} it is; leave {mode!r} out"
        )
    if seconds is not None:
        space = _with_search(
            space, time_budget_s=getattr(seconds, "total_seconds", lambda: seconds)()
        )
        tune_config = replace(tune_config, time_budget_s=None)
    return space, tune_config


def _tuner(
    space: Space,
    experiment: Path,
    lock: Lock,
    callbacks: Sequence[tune.Callback],
    tune_config: tune.TuneConfig,
    run_config: tune.RunConfig,
    searcher: OptunaSearcher,
    stops: Stops,
    on_budget: Say | None,
    on_note: Say | None,
) -> tune.Tuner:
    trials = searcher.remaining()
    told = (
        getattr(tune_config.scheduler, "metric", None) is not None
    )  # Tune refuses to get it twice
    budget = Budget(experiment, space, searcher, on_budget=on_budget)
    stops.searcher = searcher
    losses = Losses(space.search.trial_timeout_s, config=space.example, on_note=on_note)
    tune_config = replace(
        tune_config,
        metric=None if told else tune_config.metric or space.search.metric,
        mode=None if told else tune_config.mode or space.search.mode,
        search_alg=searcher,
        scheduler=tune_config.scheduler or _scheduler(space, searcher),
        num_samples=-1 if _ends_itself(space) else max(1, trials),
        max_concurrent_trials=(
            space.search.max_concurrent
            if tune_config.max_concurrent_trials is None
            else tune_config.max_concurrent_trials or None  # 0 means no limit
        ),
    )
    users = [*callbacks, *(run_config.callbacks or [])]
    buffered = _may_bring_several(space, tune_config, run_config, users)
    banked = any(any(branch.example.banks) for branch in space.branches)
    callbacks = in_order(
        lock,
        TensorBoard(experiment / "tb", space, space.search.metric),
        losses,
        users,
        budget=budget,
        stops=stops,
        labels=SoftLabels(experiment) if banked else None,
        on_note=on_note,
    )
    verbose = _verbosity(run_config)
    stoppers = [FullLength(run_config.stop)] if run_config.stop is not None else []
    if space.search.budgets:
        stoppers.append(budget)
    run_config = replace(run_config, stop=CombinedStopper(*stoppers, stops))
    return assemble(
        space.example,
        experiment,
        tune_config,
        run_config,
        callbacks,
        max_failures=space.search.max_failures,
        buffered=buffered,
        verbose=verbose,
    )


def _ends_itself(space: Space) -> bool:
    """Return whether the searcher ends the sweep: Tune would count other runs than its trials."""
    search = space.search
    by_budget = search.num_samples is None
    return isinstance(space.stopping, Pausing) or by_budget or search.finalists is not None


def _may_bring_several(
    space: Space,
    tune_config: tune.TuneConfig,
    run_config: tune.RunConfig,
    users: Iterable[tune.Callback],
) -> bool:
    """Return True if a message of a trial may bring several epochs.

    Whoever looks at each epoch, or times it, gets it at once.
    """
    return (
        isinstance(tune_config.scheduler, _NoSnapshot)
        and run_config.stop is None
        and space.search.trial_timeout_s is None
        and only_ours(users)
    )


def only_ours(callbacks: Iterable[tune.Callback]) -> bool:
    """Return True if none of the callbacks is a user's own."""
    return all(isinstance(callback, OwnCallback) for callback in callbacks)


def _scheduler(space: Space, searcher: OptunaSearcher) -> TrialScheduler:
    stopping, epochs = space.stopping, space.epochs
    if isinstance(stopping, Asha):
        first = [*stopping.rungs(epochs), epochs][0]
        return SharingAsha(
            time_attr="epoch", max_t=epochs, grace_period=first, reduction_factor=stopping.factor
        )
    return _Stopping(searcher)


class _NoSnapshot:
    """Ray's snapshot of the sweep, at its end, is empty: nothing here reads it, and it grows."""

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        super().on_trial_add(tune_controller, trial)  # type: ignore[misc]
        skip_snapshots(tune_controller)


class _Stopping(_NoSnapshot, StudyStopping):
    """The stopping of a sweep that is resumed from its study."""


class _Sharing(_NoSnapshot):
    """A lost trial may get a larger share of a GPU, or another GPU."""

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        give_larger_share(trial)
        send_elsewhere(trial)
        report_each_epoch(trial)
        super().on_trial_error(tune_controller, trial)  # type: ignore[misc]


class SharingFifo(_Sharing, FIFOScheduler):  # type: ignore[misc]
    """Ray's FIFO scheduler for trials that may share a GPU."""


class SharingAsha(_Sharing, ASHAScheduler):  # type: ignore[misc]
    """Ray's ASHA for trials that may share a GPU."""


class FullLength(tune.Stopper):  # type: ignore[misc]
    """The user's `RunConfig.stop`: trials that it stops have full length, and record that."""

    def __init__(self, stop: Any) -> None:
        if isinstance(stop, Mapping):
            limits = dict(stop)
            stop = FunctionStopper(lambda trial_id, result: _reached(limits, result))
        self._stop = stop if isinstance(stop, tune.Stopper) else FunctionStopper(stop)

    def __call__(self, trial_id: str, result: Tree) -> bool:
        over = bool(self._stop(trial_id, result))
        if over and not result.get("failed"):
            result[FULL_LENGTH] = True
        return over

    def stop_all(self) -> bool:
        return bool(self._stop.stop_all())


def _reached(limits: Values, result: Values) -> bool:
    told = flatten_dict(result)
    return any(name in told and told[name] >= limit for name, limit in limits.items())


def assemble(
    config: TrainConfig,
    experiment: Path,
    tune_config: tune.TuneConfig,
    run_config: tune.RunConfig,
    callbacks: Sequence[tune.Callback],
    *,
    max_failures: int,
    buffered: bool,
    verbose: Any = 0,
) -> tune.Tuner:
    """Return a Tuner over `StudentTrial` in an experiment's directory.

    Args:
        config: sets the resources of each trial.
        tune_config: its searcher's proposals have a `trial` section (see `OptunaSearcher`).
        callbacks: all callbacks.
        max_failures: number of restarts of a trial that is lost in the same epoch (see `Losses`).
        buffered: a message of a trial may bring several epochs (see `StudentTrial`).
        verbose: Ray's own verbosity.
    """
    os.environ.update(_TUNE_SETTINGS)
    _default_message_times()
    os.environ.pop(_BUFFER, None)
    if buffered:
        os.environ[_BUFFER] = MANY_EPOCHS
    experiment = experiment.absolute()
    keep_keys_at_home()
    forget_lessons()
    at_once, searcher, room = (
        tune_config.max_concurrent_trials,
        tune_config.search_alg,
        max(1, room_for(config)),
    )
    more = MANY_TRIALS if (at_once or sys.maxsize) > room and grows_for(config, room + 1) else 0
    # Tune starts one process at a time, an hour for a thousand; start more at once if there is room
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(max(1, room // 8, more))
    if (
        config.workers > 1 or room >= MANY_TRIALS or more
    ):  # otherwise Tune would request more trials than there is room for
        searcher, at_once = Room(searcher, config, at_once or sys.maxsize, more), None
    return tune.Tuner(
        tune.with_resources(
            StudentTrial, lambda proposal: resources_of(config)
        ),  # called for each trial
        tune_config=replace(
            tune_config,
            search_alg=searcher,
            max_concurrent_trials=at_once,
            reuse_actors=True,
            trial_name_creator=_trial_name,
            trial_dirname_creator=_trial_name,
        ),
        run_config=replace(
            run_config,
            # Ray names its staging folder by this and the second: the whole path, to be unique
            name=str(trials_folder(experiment).relative_to(experiment.anchor)),
            storage_path=experiment.anchor,
            callbacks=[_OwnErrors(), *callbacks, _BufferOfThisSweep()],
            failure_config=(
                run_config.failure_config
                if run_config.failure_config not in (None, tune.FailureConfig())
                else tune.FailureConfig(max_failures=max_failures)
            ),
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            verbose=verbose,
        ),
    )


def _verbosity(run_config: tune.RunConfig) -> Any:
    """Return Ray's verbosity: silent, unless the user has set it."""
    said = getattr(run_config, "_verbose", None)  # as the user gave it; kept by Ray
    if said is not None:
        return said
    return 1 if run_config.progress_reporter is not None else 0


class Room(ConcurrencyLimiter):  # type: ignore[misc]
    """Starts as many trials as there is room for now, since nodes come and go.

    Args:
        most: maximum number of concurrent trials.
        more: number of trials that may wait for an autoscaler's nodes.
    """

    def __init__(self, searcher: Searcher, config: TrainConfig, most: int, more: int) -> None:
        super().__init__(searcher, max_concurrent=1)
        self._config, self._most, self._more, self._looked = config, most, more, -math.inf

    def suggest(self, trial_id: str) -> Tree | None:
        """Return a proposal, or None: not now."""
        if time.monotonic() - self._looked > LOOK_S:
            self._looked = time.monotonic()
            self.max_concurrent = min(self._most, max(1, room_for(self._config)) + self._more)
            self.searcher.set_max_concurrency(self.max_concurrent)
        found: Tree | None = super().suggest(trial_id)
        return found


_BUFFER = "TUNE_RESULT_BUFFER_LENGTH"
"""Environment variable of Tune: how many results of a trial one message may bring."""


class _BufferOfThisSweep(OwnCallback):
    """Removes Tune's setting of several epochs a message once Tune has read it.

    A Tuner of the user's own, later in this process, would find it.
    """

    def setup(self, *args: Any, **info: Any) -> None:
        os.environ.pop(_BUFFER, None)


class _OwnErrors(tune.Callback):  # type: ignore[misc]
    """Ends a sweep in which the driver's own code has raised, which Tune takes for a lost trial."""

    def on_trial_recover(self, *args: Any, **info: Any) -> None:
        raise_own_error()

    def on_trial_error(self, *args: Any, **info: Any) -> None:
        raise_own_error()


_TUNE_SETTINGS = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # ours write less, and to one place
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # one trial without its metric is one failed trial
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    # Write Ray's snapshot only at the end, and there an empty one (`_NoSnapshot`): 10,000 trials make
    # 195 MiB
    "TUNE_GLOBAL_CHECKPOINT_S": "inf",
}
_MESSAGE_TIMES = {
    # A tenth of a second for each trial that runs, so that the driver gets 10 messages a second
    "TUNE_RESULT_BUFFER_MIN_TIME_S": "1",
    "TUNE_RESULT_BUFFER_MAX_TIME_S": "10",
}
"""Environment variables of Tune: for how many seconds a trial collects epochs for one message."""


def _default_message_times() -> None:
    """Set the times of messages that the user has not set; raise a ConfigError if one is invalid."""
    for name, usual in _MESSAGE_TIMES.items():
        text = os.environ.setdefault(name, usual)
        try:
            valid = 0 <= float(text) < math.inf
        except ValueError:
            valid = False
        if not valid:
            raise ConfigError(
                f"environment variable {name}: needs a number of seconds, got {text!r}; unset it"
            )


def _trial_name(trial: Any) -> str:
    return assigned(trial).name


def no_node_left(error: BaseException | None) -> str | None:
    """Return the sentence about the last usable node if that is the cause of an error, or None."""
    while error is not None:
        if isinstance(error, NoNodeLeft):
            return str(error)
        error = error.__cause__ or error.__context__
    return None


def disk_trouble(error: BaseException | None) -> str | None:
    """Return a sentence about the full, read-only or lost disk that caused an error, or None."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:
            where = f"{error.filename}: " if error.filename else ""
            return f"{where}{error.strerror or error}"
        if isinstance(error, OperationalError):
            return f"search.storage: {str(error.orig).splitlines()[0]}"
        error = error.__cause__ or error.__context__
    return None
