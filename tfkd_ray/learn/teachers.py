"""Teachers: artifacts that are named by a fingerprint, trained once, and verified when loaded.

A teacher lives in `<storage>/teachers/<network>-<fingerprint>/`: `student.safetensors` (the name of
every trained network's weights) and `teacher.json`, which records its making and its metrics on
validation.
"""

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from torch import nn

from tfkd_ray.learn.chance import guessing
from tfkd_ray.learn.checkpoint import LAST, WEIGHTS, load_weights, save_weights
from tfkd_ray.learn.config import TeacherRun, TrainConfig
from tfkd_ray.learn.evaluate import evaluate, predictions
from tfkd_ray.learn.images import Images
from tfkd_ray.learn.loop import LOOP_VERSION, device_of, train_in
from tfkd_ray.learn.soft_labels import Bank, Elsewhere
from tfkd_ray.learn.teacher_input import input_of, input_shape, show, untrained
from tfkd_ray.learn.weights import load_outside
from tfkd_ray.settings.columns import to_stderr
from tfkd_ray.settings.errors import ConfigError, Say, check_kind, some_of
from tfkd_ray.settings.files import expanded, json_tree, sha256_of, write_text, write_whole
from tfkd_ray.settings.yaml import Numbers, Tree
from tfkd_ray.store.experiment import as_metrics, read_teacher, read_teachers, read_text
from tfkd_ray.store.storage import Storage, everything, light

MOST_SHOWN = 6
"""Most exchanged classes that are named."""
PROGRESS = "progress.json"
"""File in a teacher's folder, while it trains, with the metrics of its last epoch."""


def teacher_name(config: TeacherRun) -> str:
    """Return the name of the teacher that `config` makes: network and fingerprint.

    `config` is one of `TrainConfig.teacher_runs`. If it has no data digest, that of the local data is
    used.
    """
    # without local data, it has the name from before data had digests
    with contextlib.suppress(ConfigError):
        config = config.pinned()
    return _plain_name(config)


def _plain_name(config: TeacherRun) -> str:
    return f"{config.student.name}-{config.fingerprint(LOOP_VERSION)}"


def teacher_folder(config: TeacherRun, storage: Path) -> Path:
    """Return the folder of that teacher, trained or not."""
    return storage / "teachers" / teacher_name(config)


def is_trained(config: TeacherRun, storage: Path) -> bool:
    """Return whether that teacher is completely trained."""
    return (teacher_folder(config, storage) / "teacher.json").exists()


def train_teacher(
    config: TeacherRun,
    storage: Path,
    on_epoch: Callable[[Numbers], None] | None = None,
    on_saved: Callable[[bool], None] | None = None,
    epochs: Callable[[], Iterator[Numbers]] | None = None,
) -> Tree:
    """Train the teacher, or take it from its file, unless it exists; return `teacher.json`.

    One process at a time trains a teacher, and others wait for it; if the process is killed, the
    next one resumes from its checkpoint.

    Args:
        epochs: trains it in its folder elsewhere, and yields its metrics. None: this process does.
    """
    folder = teacher_folder(config, storage)
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        if not is_trained(config, storage):
            if config.weights is not None:
                metrics = _taken(config, folder)
            elif epochs is not None:
                metrics = _last_of(config, epochs(), on_epoch)
            else:
                metrics = _last_of(config, train_in(folder, config, on_saved=on_saved), on_epoch)
            about = {
                "name": teacher_name(config),
                "loop_version": LOOP_VERSION,
                "torch": torch.__version__,
                "metrics": metrics,
                "sha256": sha256_of(folder / WEIGHTS),
                "config": config.tree,
                "input": input_of(config),
            }
            if config.weights is not None:
                about["source_sha256"] = _taken_from(folder)["source_sha256"]
            if (doubt := _doubt(config, folder, metrics)) is not None:
                about["doubt"] = doubt
            write_whole(folder / "teacher.json", json.dumps(about, indent=1).encode())
            for state in folder.glob("*.ckpt*"):
                state.unlink()
            (folder / PROGRESS).unlink(missing_ok=True)
    check_source(config, storage)
    return describe(config, storage)


def check_source(config: TeacherRun, storage: Path) -> None:
    """Raise if the file from which a teacher was taken has changed since."""
    about, source = describe(config, storage), _source_sha256(config)
    if source is not None and about.get("source_sha256") != source:
        raise ConfigError(
            f"teacher.weights: {config.weights}: has changed since it was loaded as teacher {about['name']}; give the "
            f"new file another name, or delete {teacher_folder(config, storage)}"
        )


def of_other_data(config: TeacherRun, storage: Path) -> str | None:
    """Return a sentence if the same teacher exists for other data, else None."""
    here = config.data.digest
    for about in read_teachers(storage):
        was = about["config"]["data"].get("digest")
        like = config.data.model_copy(update={"digest": was})
        if was not in (None, here) and about["name"] == teacher_name(
            config.model_copy(update={"data": like})
        ):
            return (
                f"data {config.data.name}: its images or labels have changed since teacher {about['name']} was made "
                f"(digest {here}, then {was}): the teacher and its soft labels are computed again"
            )
    return None


def _last_of(
    config: TeacherRun, epochs: Iterator[Numbers], on_epoch: Callable[[Numbers], None] | None
) -> Numbers:
    """Return the metrics of the last of a teacher's epochs."""
    metrics: Numbers = {}
    for metrics in epochs:
        if on_epoch:
            on_epoch(metrics)
    if config.stop_accuracy is not None and metrics["val_accuracy"] < config.stop_accuracy:
        raise ConfigError(
            f"teacher.stop_accuracy: {config.stop_accuracy:g} was not reached in {config.epochs} epochs, only "
            f"{metrics['val_accuracy']:g} after the last; lower it, or train the teacher longer"
        )
    return metrics


def take_weights(config: TeacherRun, storage: Path) -> None:
    """Copy a teacher's external weights to its folder, for `train_teacher` to judge, on any node."""
    folder = teacher_folder(config, storage)
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        if not is_trained(config, storage):
            _take(config, folder)


def _take(config: TeacherRun, folder: Path) -> None:
    assert config.weights is not None, f"{config.weights=}"
    data = config.data
    shape = input_shape(config, input_of(config))
    weights = load_outside(config.weights, config.student, shape, data.num_classes, data)
    about = {"from": config.weights, "source_sha256": json.dumps(_source_sha256(config))}
    save_weights(folder / WEIGHTS, weights, about)


def _taken_from(folder: Path) -> Tree:
    """Return the origin of weights that `take_weights` copied; empty without any."""
    with contextlib.suppress(OSError, SafetensorError), safe_open(folder / WEIGHTS, "pt") as file:
        about: Tree = dict(file.metadata() or {})
        if "source_sha256" in about:
            return {**about, "source_sha256": json.loads(about["source_sha256"])}
    return {}


def _taken(config: TeacherRun, folder: Path) -> Numbers:
    """Copy external weights, unless they are here; return their metrics on validation.

    These are empty without validation.
    """
    taken, here = _taken_from(folder), _source_sha256(config)
    if not taken or here not in (None, taken["source_sha256"]):
        _take(config, folder)
    val_set = config.data.load()[1]
    if val_set is None:
        return {}
    module, val_set = _placed(config, folder, val_set)
    return evaluate(module, config.data, val_set)


def _placed(config: TeacherRun, folder: Path, images: Images) -> tuple[nn.Module, Images]:
    """Return a teacher with the weights in its folder, and images, where its run computes.

    That is the CPU if a group of workers trained it: this process then has no GPU.
    """
    module = untrained(config)
    device = torch.device("cpu") if config.workers > 1 else device_of(config)
    module.load_state_dict(load_weights(folder / WEIGHTS, network=module))
    return module.to(device), images.on(device)


def _doubt(config: TeacherRun, folder: Path, metrics: Numbers) -> str | None:
    """Return a sentence on a teacher no better than guessing, or with exchanged classes, else None.

    It names the likely cause. Only weights from elsewhere can have classes in another order.
    """
    val_set = config.data.load()[1]
    if val_set is None or "val_accuracy" not in metrics:
        return None
    n, K, accuracy = len(val_set), config.data.num_classes, metrics["val_accuracy"]
    usual, highest = guessing(val_set.labels, K)
    guesses = accuracy <= highest
    if not guesses and config.weights is None:
        return None
    module, val_set = _placed(config, folder, val_set)
    met = torch.zeros(K, K, dtype=torch.long)  # images by prediction and label
    for logits, labels in predictions(module, val_set, config.data):
        pairs = logits.argmax(dim=1) * K + labels
        met += torch.bincount(pairs, minlength=K * K).view(K, K).cpu()
    if not guesses:
        return _exchanged(teacher_name(config), met)
    renamed, answers = int(met.max(dim=1).values.sum()) / n, met.sum(dim=1)
    if renamed > max(0.5, 2 * accuracy, usual + 0.1):
        cause = (
            "its classes are in another order than the data's: with its classes renamed, it would classify "
            f"{renamed:.1%} correctly. Put the rows of its last layer into the order of the data's classes"
        )
    elif int(answers.max()) > 0.9 * n:
        cause = (
            f"it assigns class {int(answers.argmax())} to {int(answers.max()) / n:.0%} of the images: it is untrained, "
            "it diverged, or it was trained on images with another normalisation"
        )
    elif config.weights is not None:
        cause = "its weights are for another task, or it was trained on images with another normalisation"
    else:
        cause = "it was trained for too few epochs (teacher.epochs) or with too large a learning rate (teacher.optim)"
    return (
        f"WARNING: teacher {teacher_name(config)} classifies {accuracy:.1%} of the validation split correctly; "
        f"guessing would reach {usual:.1%}. Students would learn from wrong answers. Likely cause: {cause}"
    )


def _exchanged(name: str, met: torch.Tensor) -> str | None:
    """Return a sentence on a teacher that takes some classes for one another, else None.

    Args:
        met: int64 [K, K], images by prediction and label.
    """
    most, meant = met.max(dim=1)
    right = met.diagonal()
    clearly = most - right > 2 * (most + right).sqrt()  # two standard errors of the difference
    moved = (clearly & (2 * most > met.sum(dim=1))).nonzero()[:, 0]
    if not len(moved) or not meant[moved].sort().values.equal(moved):
        return None
    shown = some_of([f"{k} is {int(meant[k])}" for k in moved.tolist()], MOST_SHOWN)
    return (
        f"WARNING: teacher {name} has {len(moved)} classes in another order than the data ({shown}). Students would "
        "learn from wrong answers. Put the rows of its last layer into the order of the data's classes"
    )


def tell_doubts(runs: Iterable[TeacherRun], storage: Path, say: Say | None = None) -> None:
    """Report trained teachers that are no better than guessing. None: to standard error."""
    for run in runs:
        if is_trained(run, storage) and (doubt := describe(run, storage).get("doubt")):
            (say or to_stderr)(doubt)


def _source_sha256(config: TeacherRun) -> str | None:
    """Return the SHA-256 of the weights' source file, or None if there is none any more."""
    path = expanded(config.weights) if config.weights else None
    return sha256_of(path) if path and path.is_file() else None


def describe(config: TeacherRun, storage: Path) -> Tree:
    """Return the content of a trained teacher's `teacher.json`."""
    return read_teacher(_teacher_place(config, storage))


def _teacher_place(config: TeacherRun, storage: Path) -> Path:
    """Return its folder, or that of the same teacher from before data had digests."""
    folder, before = teacher_folder(config, storage), storage / "teachers" / _plain_name(config)
    return (
        before if not is_trained(config, storage) and (before / "teacher.json").exists() else folder
    )


def is_here(config: TeacherRun, storage: Path) -> bool:
    """Return whether `describe` finds that teacher, in a present or an older format."""
    return (_teacher_place(config, storage) / "teacher.json").exists()


def known_of(config: TeacherRun, storage: Path) -> Tree | None:
    """Return a teacher's `teacher.json`, also of an earlier loop version, or None."""
    if is_here(config, storage):
        return describe(config, storage)
    for about in read_teachers(storage):
        if (
            about["name"]
            == f"{config.student.name}-{config.fingerprint(about.get('loop_version', 1))}"
        ):
            return about
    return None


def fetch_teacher(config: TeacherRun, storage: Storage, *, weights: bool = True) -> None:
    """Fetch a teacher's files from a bucket, with its weights or those of a half-trained one."""
    want = everything if weights else light
    storage.fetch(f"teachers/{teacher_name(config)}", want, patiently=True)


def upload(config: TeacherRun, storage: Storage) -> None:
    """Upload a trained teacher to a bucket."""
    folder = teacher_folder(config, storage.folder)
    sent = (folder / WEIGHTS, folder / "teacher.json", folder / LAST, folder / PROGRESS)
    storage.send(*sent, patiently=True)


def progress_teller(config: TeacherRun, storage: Storage) -> Callable[[Numbers], None]:
    """Return the function that tells each epoch of a teacher to `progress_of`, on any node."""
    path, told = teacher_folder(config, storage.folder) / PROGRESS, -math.inf

    def tell(metrics: Numbers) -> None:
        nonlocal told
        write_text(path, json.dumps(json_tree(metrics)))
        if time.monotonic() - told >= storage.look_s:
            told = time.monotonic()
            with contextlib.suppress(OSError):  # the next epoch follows
                storage.send(path)

    return tell


def progress_of(config: TeacherRun, storage: Storage) -> Numbers:
    """Return the metrics of a training teacher's last epoch; empty if none is known."""
    path = teacher_folder(config, storage.folder) / PROGRESS
    with contextlib.suppress(ConfigError, OSError, ValueError):
        return as_metrics(read_text(storage.bring(path)))
    return {}


def load_teacher(config: TeacherRun, storage: Path) -> nn.Module:
    """Return a trained teacher in eval mode; raise if its file's checksum does not match."""
    place = _teacher_place(config, storage)
    if not (place / "teacher.json").exists():
        raise FileNotFoundError(
            f"teacher {teacher_name(config)} is not under {storage / 'teachers'}: it was trained before the sweep "
            "started, so either the folder was emptied since, or this node does not reach the driver's storage"
        )
    about, data = describe(config, storage), config.data
    outside = about.get("input") if config.weights is not None else None
    module = config.build_student(input_shape(config, outside) if outside else data.shape)
    module.load_state_dict(load_weights(place / WEIGHTS, about["sha256"], network=module))
    if outside:
        show(module, data, outside)
    return module.eval()


def bank_of(
    config: TrainConfig, storage: Path, elsewhere: Elsewhere | None = None
) -> Bank | tuple[Bank, ...] | None:
    """Return the soft labels of a student's teacher, loaded on first use; None if it needs none.

    Of several teachers, those of each, in the order of `config.teacher_runs()`.
    """
    banks = tuple(_bank(config, run, storage, elsewhere) for run in config.teacher_runs())
    if len(banks) > 1:
        return banks
    return banks[0] if banks else None


def _bank(config: TrainConfig, run: TeacherRun, storage: Path, elsewhere: Elsewhere | None) -> Bank:
    """Return the soft labels of one teacher of a student."""
    if not is_here(run, storage):
        load_teacher(run, storage)  # raises what is wrong
    about = describe(run, storage)
    of = {
        "teacher": about["sha256"],
        "network": run.student.content(),  # one file of external weights may serve several networks
        "data": config.data.labelled.pinned().identity(),
        "precision": config.precision,
        "loop": LOOP_VERSION,
    }
    if run.weights is not None:
        of["input"] = about.get("input")
    return Bank(lambda: load_teacher(run, storage), of, elsewhere=elsewhere)


def find_or_train(
    config: TrainConfig, storage: Path | str, say: Say | None = None
) -> Bank | tuple[Bank, ...] | None:
    """Return the teacher that a configuration needs, trained first if missing.

    None if it needs none; of several teachers, a tuple. The teacher belongs to the local data,
    identified by their digest; see `TrainConfig.pinned`. A teacher that is no better than guessing
    is reported through `say`, by default on standard error.
    """
    check_kind(config, TrainConfig, "config")
    if not config.needs_teacher:
        return None
    config = config.pinned()
    runs = config.teacher_runs()
    for run in runs:
        train_teacher(run, Path(storage))
    tell_doubts(runs, Path(storage), say)
    return bank_of(config, Path(storage))
