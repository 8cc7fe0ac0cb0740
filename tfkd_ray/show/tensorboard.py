"""TensorBoard events of a sweep: a Tune callback, usable in any `ray.tune.Tuner`.

Each trial has one events file in `<folder>/<trial name>/`, with one step an epoch and few, stable
tags. HParams: one experiment summary at the root makes every searched parameter a column. Each
trial writes its values when it starts. It writes its status when it ends, in a separate file,
because TensorBoard keeps the first status that it reads; until then it shows `Unknown`.

Shapes: N = images, K = classes.
"""

import copy
import io
import math
import shlex
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from pydantic import TypeAdapter
from ray.tune.result import AUTO_RESULT_KEYS, DEBUG_METRICS, DONE, SHOULD_CHECKPOINT
from ray.tune.search.repeater import TRIAL_INDEX
from ray.tune.utils import flatten_dict
from safetensors.numpy import load_file
from tensorboard.compat.proto import event_pb2, tensor_pb2, types_pb2
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.custom_scalar import metadata as custom_scalar_metadata
from tensorboard.plugins.hparams import api_pb2, metadata
from tensorboard.plugins.hparams.api_pb2 import HParamInfo
from tensorboard.plugins.hparams.plugin_data_pb2 import (
    HParamsPluginData,
    SessionEndInfo,
    SessionStartInfo,
)
from tensorboard.plugins.text import metadata as text_metadata

from tfkd_ray.learn.config import RUN_ONLY, TrainConfig
from tfkd_ray.learn.objectives import Canonical, LabelSmoothing, Objective, TfkdReg, TfkdRegCode
from tfkd_ray.learn.own import only_reading
from tfkd_ray.settings import own_code
from tfkd_ray.settings.yaml import Tree, Values, dump_yaml, in_yaml, leaves_of
from tfkd_ray.show.events import EventFileWriter
from tfkd_ray.show.listener import OwnCallback
from tfkd_ray.show.status import read_lasts
from tfkd_ray.space.arms import Arm, read_comparison
from tfkd_ray.space.plain import PlainSpace
from tfkd_ray.space.ranges import Choices, Domain
from tfkd_ray.space.space import (
    Branch,
    Parameter,
    Searched,
    Space,
    build_space,
    without_unlabelled,
)
from tfkd_ray.store.assignment import SECTION, Assignment
from tfkd_ray.store.experiment import FULL_LENGTH, as_number, read_experiment, trials_folder
from tfkd_ray.verdict.calibration import BINS, binned, calibration_error
from tfkd_ray.verdict.scores import SCORES, score_of

TAGS = {
    **{row.key: row.tag for row in SCORES.values() if row.tag is not None},
    "train_ce": "train/loss_ce",
    "train_kd": "train/loss_kd",
    "train_kd_unlabelled": "train/loss_kd_unlabelled",
    "val_teacher_kl": "kd/kl",
    "train_kd_ratio": "kd/grad_ratio",
    "lr": "opt/lr",
}
"""TensorBoard tags of metrics and of other numbers of an epoch; losses are in nats, accuracies
fractions. kd/grad_ratio: how much larger the soft part's gradient by the logits is than that of CE.
model/parameters exists if the search is about it."""
VALUE = "hp/value"
"""The metric of HParams, where it has no tag of its own: a metric of the user's, and the test
metric of a comparison."""
ABOUT = "about"
"""The run with the texts of an experiment and the columns of HParams."""
OUTCOME_TAG = "_hparams_/outcome"
"""How a trial ended, in the form of its hyperparameters; see `board`."""
STATUS = "status"
"""Name of the outcome in `OUTCOME_TAG`: done, stopped, or failed, and after which epoch."""
NEUTRAL = {"alpha": 0.0, "temperature": 1.0}
"""Values, in a column that objectives share, of an objective without that setting: no soft part,
and no softening."""


class TensorBoard(OwnCallback):
    """Writes the events of all trials of one sweep.

    Args:
        folder: where the runs go; point `tensorboard --logdir` at it.
        space: names the columns of HParams; of an `OptunaSearcher`, its `space`. Without it they
            are the union of the trials' parameters.
        metric: the value of a trial; its tag is `hp/value` if it has none of its own. None: the
            metric of a plain dictionary's space, or val_accuracy.
    """

    def __init__(
        self,
        folder: Path | str,
        space: Space | PlainSpace | None = None,
        metric: str | None = None,
    ) -> None:
        super().__init__()
        if metric is None:
            metric = space.search.metric if isinstance(space, PlainSpace) else "val_accuracy"
        self._folder, self._space, self._metric = Path(folder), space, metric
        self._columns, self._kinds = dict[str, str](), dict[str, str]()
        self._common: frozenset[str] = frozenset()
        if isinstance(space, Space):
            self._columns = column_names(space.parameters)
            self._common = common_settings(space.parameters)
        elif space is not None:
            self._columns = short_names(space.parameters)
        if space is not None:
            self._kinds = _kinds(space.parameters, self._columns)
        searched = space.search.metrics if space is not None else ()
        self._tags = {
            key: tag for key, tag in TAGS.items() if key != "parameters" or key in searched
        }
        self._writers: dict[str, tuple[EventFileWriter, int]] = {}
        self._void: set[str] = set()
        self._owners: dict[str, str] = {}

    def on_begin(self) -> None:
        if self._space is None:
            return
        # the space of a resumed sweep may be wider; earlier releases wrote it at the root
        for old in (*self._folder.glob("events.*.space"), *self._folder.glob(f"{ABOUT}/events.*")):
            old.unlink()
        metrics, texts = {tag_of(self._metric): self._metric or "value"}, []
        if isinstance(self._space, Space):
            metrics = _metrics(self._space)
            about = _about_experiment(self._space, self._columns, self._folder.parent)
            texts = [_text_summary("experiment", about)]
        columns = _experiment(_columns_of(self._space, self._folder.parent), metrics)
        _write(self._folder / ABOUT, *texts, columns, suffix=".space")

    def on_start(self, trial: Any, last: Values) -> None:
        self._close(trial)
        assignment = Assignment.find(trial.config)
        seen = int(last["epoch"]) if last else -1
        name = str(trial) if assignment is None else assignment.name
        if (
            self._owners.setdefault(name, trial.trial_id) != trial.trial_id
        ):  # a `Repeater` runs it again
            name = f"{name}-{trial.trial_id}"
        folder = self._folder / name
        is_new = not list(folder.glob("events.*"))
        for old in folder.glob("events.*.end"):  # the trial is retried
            old.unlink()
        writer = EventFileWriter(str(folder))
        if is_new or (assignment is not None and assignment.directory is not None):
            _void_from(writer, seen + 1)
        else:  # only its first result shows where it continues
            self._void.add(trial.trial_id)
        values, group = dict(trial.evaluated_params), ""
        if assignment is not None:
            values = {**self._shared_values(trial), **assignment.parameters}
            # the seeds of an arm, and the further seeds of a trial, are one session group
            shared = assignment.arm
            if assignment.seed_of is not None:
                shared = f"{assignment.seed_of}, further seeds"
            if shared is not None:  # all experiments in TensorBoard share the names of groups
                group = f"{shared} ({self._folder.absolute().parent.name})"
        elif isinstance(self._space, PlainSpace):
            values = self._space.values_in(trial.config)
        objective = self._objective(trial)
        values = values if objective is None else {"objective": objective, **values}
        _add(writer, 0, _session_start(values, group, self._columns, self._kinds))
        if assignment is not None and is_new:
            config = {k: v for k, v in trial.config.items() if k not in (SECTION, TRIAL_INDEX)}
            _add_texts(writer, assignment, config)
        self._writers[trial.trial_id] = (writer, seen)

    def on_epoch(self, trial: Any, epoch: int, metrics: Values) -> None:
        if trial.trial_id not in self._writers:
            self.on_start(trial, {"epoch": epoch - 1})
        writer, _ = self._writers[trial.trial_id]
        if trial.trial_id in self._void:
            self._void.remove(trial.trial_id)
            _void_from(writer, max(epoch, 1))
        told = {
            key: number
            for key, value in metrics.items()
            if (number := as_number(value)) is not None
        }
        values = {tag: told[key] for key, tag in self._tags.items() if key in told}
        assignment = Assignment.find(trial.config)
        if (
            assignment is None or assignment.directory is None
        ):  # a user's own trainable, with its own metrics
            own = {
                key: as_number(value)
                for key, value in flatten_dict(dict(metrics)).items()
                if self._is_own(key)
            }
            values |= {key: number for key, number in own.items() if number is not None}
        if self._metric in told:
            values[tag_of(self._metric)] = told[self._metric]
        if values:
            points = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
            _add(writer, epoch, Summary(value=points))
        self._writers[trial.trial_id] = (writer, epoch)

    def on_pause(self, trial: Any) -> None:
        """Close the events of a trial that pauses: each open one has a thread and a file."""
        self._close(trial)

    def on_end(self, trial: Any) -> None:
        self._write_end(trial, (trial.last_result or {}).get("failed"))

    def on_failed(self, trial: Any) -> None:
        self._write_end(trial, "its process was lost, or raised an error")

    def on_close(self, trials: Sequence[Any]) -> None:
        for trial in trials:
            self._close(trial)

    def _write_end(self, trial: Any, failed: str | None) -> None:
        if trial.trial_id in self._writers:
            writer, epoch = self._writers[trial.trial_id]
            assignment = Assignment.find(trial.config)
            full = epoch if assignment is None else assignment.epochs
            stopped = epoch < full and not (trial.last_result or {}).get(FULL_LENGTH)
            how, status = ("stopped early", "stopped") if stopped else ("done", "done")
            if failed:
                how, status = f"failed: {failed}", "failed"
            words = _text_summary("trial/outcome", f"after {epoch} of {full} epochs: {how}")
            ended = _session_end(bool(failed)), _outcome(f"{status}, {epoch}/{full}")
            _write(writer.get_logdir(), *ended, words, step=epoch, suffix=".end")
        self._close(trial)

    def _close(self, trial: Any) -> None:
        writer, _ = self._writers.pop(trial.trial_id, (None, 0))
        if writer is not None:
            writer.close()

    def _shared_values(self, trial: Any) -> Tree:
        """Return a trial's values, by column, of settings that it does not search itself."""
        objective = trial.config.get("objective")
        given = objective if isinstance(objective, dict) else {}
        found = {}
        for setting in self._common:
            value = given.get(setting, NEUTRAL.get(setting))
            if value is not None:
                found[setting] = value
        return found

    def _objective(self, trial: Any) -> str | None:
        """Return the name of a trial's objective; a plain dictionary has none."""
        if isinstance(self._space, PlainSpace):
            return None
        return own_code.shown_name(trial.config.get("objective"))

    def _is_own(self, key: str) -> bool:
        """Return whether a result's flattened key is a metric of the user's own."""
        return (
            key not in _RAYS_OWN
            and key not in self._tags
            and key != "epoch"
            and not key.startswith("config/")
        )

    def __getstate__(self) -> Tree:
        return {**super().__getstate__(), "_writers": {}, "_void": set(), "_owners": {}}


def _void_from(writer: EventFileWriter, step: int) -> None:
    """Discard what earlier files of a run contain from this step on."""
    start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    writer.add_event(event_pb2.Event(wall_time=time.time(), step=step, session_log=start))


_RAYS_OWN = {
    *AUTO_RESULT_KEYS, *DEBUG_METRICS, DONE, SHOULD_CHECKPOINT, "checkpoint_dir_name", "iterations_since_restore",
}  # fmt: skip


def write_comparison(folder: Path, arms: Mapping[str, Mapping[str, Sequence[Any]]]) -> None:
    """Write a finished comparison: test accuracies for HParams, a margin chart of arms, figures.

    The chart, under Custom Scalars, shows mean and 95 % interval of each run `arms/NAME` after 2,
    3, ... n seeds. Each has a reliability diagram, and the change of every class against plain
    training.

    Args:
        folder: `tb` of the comparison's directory, where the runs' events are.
        arms: by arm's name: `runs` their names, `values` their metric on test, and for each number
            of seeds from 2 on `mean`, `low` and `high`.
    """
    for old in (
        *folder.glob("events.*"),
        *folder.glob(f"{ABOUT}/events.*"),
        *folder.glob("*/events.*.test"),
        *folder.glob("arms/*/events.*"),
    ):
        old.unlink()
    whole = read_comparison(folder.parent).arms
    label = f"test {score_of(whole.metric).label}" + (
        f" (preset {whole.preset}: scaled down)" if whole.preset else ""
    )
    _write(folder / ABOUT, _experiment(_ARM_COLUMNS, {VALUE: label}), _layout([_MARGINS]))
    compared = {arm.name: arm for arm in whole.arms}
    per_class: Tree = {}
    figures = {}
    for name, arm in arms.items():
        if arm["runs"]:
            # logits [N, K] and labels [N] of each run; see confirm.py
            files = [
                trials_folder(folder.parent) / str(run) / "test.safetensors" for run in arm["runs"]
            ]
            per_class[name], bins, ece = _judged_runs(files)
            figures[name] = _reliability(bins, ece)
    for name, arm in arms.items():
        writer = EventFileWriter(str(folder / "arms" / name))
        _add_targets(
            writer, compared[name].config.objective, compared[name].config.data.num_classes
        )
        if name in figures:
            _add(writer, 0, _image("test/reliability", figures[name]))
        plain = _plain_value(compared[name], compared.values())
        if name in per_class and plain in per_class:
            _add(
                writer,
                0,
                _image("test/per_class", _per_class(per_class[name] - per_class[plain], plain)),
            )
        for kind in ("mean", "low", "high"):
            for seeds, value in enumerate(arm[kind], start=2):
                _add(writer, seeds, _scalar(f"test_acc/{kind}", value))
        writer.close()
        for run, value in zip(arm["runs"], arm["values"], strict=True):
            _write(folder / str(run), _scalar(VALUE, value), suffix=".test")


@only_reading()
def side_by_side(folder: Path, experiments: Mapping[str, Path]) -> None:
    """Fill a folder that shows several experiments: links to their runs, and one summary.

    TensorBoard takes the columns of HParams from one summary only. Further calls link new runs.
    """
    for name, experiment in experiments.items():
        (folder / name).mkdir(exist_ok=True)
        for run in (experiment / "tb").glob("*/"):
            if run.name != ABOUT and not (folder / name / run.name).is_symlink():
                (folder / name / run.name).symlink_to(run.absolute())
    if list(folder.glob(f"{ABOUT}/events.*")):
        return
    columns: dict[str, HParamInfo] = {}
    experiments_with = Counter[str]()
    metrics, texts, layout = dict[str, str](), list[str](), list[Summary]()
    for name, experiment in experiments.items():
        if (experiment / "confirm.yaml").is_file():
            found, layout = copy.deepcopy(_ARM_COLUMNS), [_layout([_MARGINS])]
            metrics.setdefault(VALUE, "test metric")
        else:
            space = build_space(read_experiment(experiment)["space"], experiment)
            found = _columns_of(space, experiment)
            metrics |= _metrics(space)
            texts.append(_about_experiment(space, column_names(space.parameters), experiment, name))
        for column in found:
            columns[column.name] = _joined_column(columns.get(column.name, column), column)
            experiments_with[column.name] += 1
    for name, column in columns.items():  # every trial has an objective, also of a single one
        if experiments_with[name] < len(experiments) and name != "objective":
            column.differs = False
    words = [_text_summary("experiment", "\n\n".join(texts))] if texts else []
    _write(folder / ABOUT, *words, _experiment(columns.values(), metrics), *layout)


def _joined_column(one: HParamInfo, other: HParamInfo) -> HParamInfo:
    """Return a column for the sessions of two experiments.

    Where one has numbers and the other text, a filter by text or range ends in an error; a list of
    the values of both does not. Without such a list, the column has no type, and so no filter.
    """
    if one == other:
        return one
    differs = one.differs and other.differs
    common = HParamInfo(name=one.name, type=one.type, differs=differs)
    lists = (one.domain_discrete.values, other.domain_discrete.values)
    values = [value for listed in lists for value in listed]
    if one.type != other.type or len({value.WhichOneof("kind") for value in values}) > 1:
        common.type = api_pb2.DATA_TYPE_STRING if all(lists) else api_pb2.DATA_TYPE_UNSET
    if all(lists):
        for k, value in enumerate(values):
            if value not in values[:k]:
                common.domain_discrete.values.add().CopyFrom(value)
    return common


# --- words -----------------------------------------------------------------------------------------------------


def _about_experiment(
    space: Space, columns: Mapping[str, str], experiment: Path, name: str | None = None
) -> str:
    """Return what is searched and by what command, in Markdown; `name`: that it is shown by."""
    search = space.search
    many = "" if search.num_samples is None else f"{search.num_samples} "
    lines = [
        f"**{name or experiment.name}**: {many}trials of {space.epochs} epochs, proposed by {search.sampler}, "
        f"stopped by {search.stopping.name}. Value of a trial (`{tag_of(search.metric)}`): {search.metric} after its "
        "last epoch, on validation."
    ]
    if (experiment / "experiment.yaml").is_file():
        about = read_experiment(experiment)
        lines += [
            "",
            f"Git commit {about['git_commit'] or 'unknown'}, begun {about['created']}:",
            "",
        ]
        lines += [f"    {shlex.join(about['command'])}"]
    lines += ["", "| searched | column | range | objectives |", "|---|---|---|---|"]
    for p in space.parameters:
        where = ", ".join(b.objective for b in space.branches if p in b.parameters)
        lines.append(
            f"| {p.name} | {columns[p.name]} | {str(p.domain).replace('|', 'or')} | {where} |"
        )
    lines += ["", *_about_columns(space)]
    return "\n".join(lines)


def _about_columns(space: Space) -> list[str]:
    """Return sentences on columns that objectives share, and on those that not all trials have."""
    shared = [name for name in sorted(common_settings(space.parameters)) if name in NEUTRAL]
    neutral = [f"{name} = {NEUTRAL[name]:g}" for name in shared]
    sentences = []
    if len(space.branches) > 1 and neutral:
        sentences.append(
            f"Objectives share the columns {', '.join(shared)}. A trial whose objective does not search one has its "
            f"fixed value there, or, without such a setting, {' and '.join(neutral)}."
        )
    if partial := [c.name for c in _hparam_columns(space) if not c.differs]:
        sentences.append(
            f"Not every trial has: {', '.join(partial)}. HParams shows such a column once it is ticked, and parallel "
            "coordinates then draw only the trials that have it."
        )
    return sentences


def _plain_training(config: Values) -> TrainConfig:
    """Return the baseline of a trial: cross-entropy with the defaults, same data, same student."""
    same = {k: config[k] for k in ("recipe", "data", "student") if k in config}
    return TrainConfig.model_validate({**without_unlabelled(same), "objective": "ce"})


def _change(plain: TrainConfig, config: Values) -> str:
    """Return the differences of a configuration from plain training, in Markdown."""
    theirs, ours = (
        {".".join(path): value for path, value in leaves_of(tree)} for tree in (plain.tree, config)
    )
    paths = [
        p
        for p in dict.fromkeys([*ours, *theirs])
        if p not in RUN_ONLY and ours.get(p) != theirs.get(p)
    ]

    def cell(tree: Values, path: str) -> str:
        if path not in tree:
            return ""
        value = tree[path]
        return f"{value:.6g}" if isinstance(value, float) else in_yaml(value)

    rows = [f"| {p} | {cell(theirs, p)} | {cell(ours, p)} |" for p in paths]
    return "\n".join(["| setting | plain training | here |", "|---|---|---|", *rows])


def _again(name: str, config: Values) -> str:
    return f"Save this as `{name}.yaml`, then: `tfkd train {name}.yaml`\n\n```yaml\n{dump_yaml(config)}```"


# --- figures ---------------------------------------------------------------------------------------------------

_BLUE, _GREY, _RED = "#1f77b4", "#999999", "#d62728"
_MOST = 20
"""Classes that are drawn one by one beside the label, if all others are equal."""


def label_probability(objective: Canonical, num_classes: int) -> float | None:
    """Return the label's probability in a target that is not learnt; the others share the rest.

    None if the target is the label alone, or comes from a trained teacher.
    """
    K = num_classes
    if isinstance(objective, LabelSmoothing):
        return 1 - objective.alpha + objective.alpha / K
    if not isinstance(objective, TfkdReg | TfkdRegCode):
        return None
    label, other = objective.correct_prob, (1 - objective.correct_prob) / (K - 1)
    gap = math.log(label / other) if isinstance(objective, TfkdReg) else label - other
    return 1 / (1 + (K - 1) * math.exp(-gap / objective.temperature))


def _add_texts(writer: EventFileWriter, assignment: Assignment, config: Values) -> None:
    """Write how a trial differs from plain training, its configuration, and its targets."""
    plain = _plain_training(config)
    _add(writer, 0, _text_summary("trial/change", _change(plain, config)))
    _add(writer, 0, _text_summary("trial/config", _again(assignment.name, config)))
    if assignment.arm is None:  # seeds of an arm would repeat it
        _add_targets(writer, config["objective"], plain.data.num_classes)


def _add_targets(writer: EventFileWriter, tree: Any, num_classes: int) -> None:
    """Write a figure, as in the paper, of soft targets beside those of usual label smoothing."""
    objective, usual = TypeAdapter(Objective).validate_python(tree), LabelSmoothing()
    label, theirs = (label_probability(o, num_classes) for o in (objective, usual))
    if label is None or theirs is None:
        return
    if isinstance(objective, TfkdReg | TfkdRegCode):
        what = f"virtual teacher, T = {objective.temperature:.3g}, a = {objective.correct_prob:.3g}"
    else:
        what = "label smoothing of this trial"
    shown = min(num_classes, 1 + _MOST)
    mine, beside = ([p, *[(1 - p) / (num_classes - 1)] * (shown - 1)] for p in (label, theirs))
    left_out = f" ({num_classes - shown} not shown)" if shown < num_classes else ""
    caption = f"label {label:.3f}, others {mine[1]:.2g}{left_out}"
    labels = ["label", *[""] * (shown - 1)]
    figure = _bars(
        what,
        mine,
        (0, 1),
        labels,
        f"{caption}; grey: label smoothing {usual.alpha:g}",
        beside=beside,
    )
    _add(writer, 0, _image("trial/soft_targets", figure))


def _reliability(bins: Any, ece: float) -> Image.Image:
    """Draw accuracy by confidence; `bins` [3, bins] sums images, confidences and right answers."""
    count, confidence, right = bins
    accuracy, sure = (
        np.divide(x, count, out=np.zeros(BINS), where=count > 0) for x in (right, confidence)
    )
    labels = [f"{(i + 1) / BINS:.1f}" if i % 3 == 2 else "" for i in range(BINS)]
    return _bars(
        "accuracy by confidence",
        accuracy,
        (0, 1),
        labels,
        f"grey: calibrated; ECE {ece:.4f}",
        beside=sure,
    )


def _per_class(change: Any, plain: str) -> Image.Image:
    """Draw differences in accuracy [K], largest first, in points."""
    order = np.argsort(-change)
    labels = [str(k) if len(change) <= _MOST else "" for k in order]
    high = max(1.0, float(abs(100 * change).max()))
    caption = f"by class; {(change > 0).sum()} up, {(change < 0).sum()} down, mean {100 * change.mean():+.2f}"
    return _bars(
        f"test accuracy minus that of {plain}, points",
        100 * change[order],
        (-high, high),
        labels,
        caption,
    )


def _judged_runs(files: Sequence[Path]) -> tuple[Any, Any, float]:
    """Return accuracy of each class [K], mean over runs; sums of each bin; mean calibration error.

    See `binned`.
    """
    accuracies, bins, errors = [], np.zeros((3, BINS)), []
    for file in files:
        arrays = load_file(file)
        logits, labels = arrays["logits"], arrays["labels"]
        right = logits.argmax(axis=1) == labels
        of_run = binned(logits, labels)
        bins += of_run
        errors.append(calibration_error(len(labels), *of_run[1:]))
        seen = np.bincount(labels, minlength=logits.shape[1])
        accuracies.append(np.bincount(labels, right, logits.shape[1]) / np.maximum(seen, 1))
    return np.mean(accuracies, axis=0), bins, float(np.mean(errors))


def _plain_value(arm: Arm, arms: Any) -> str | None:
    """Return the arm to compare classes with: the named one, or plain training."""
    if arm.baseline or arm.config.objective.name == "ce":
        return arm.baseline
    same = [
        a
        for a in arms
        if a.config.objective.name == "ce" and a.config.student == arm.config.student
    ]
    return same[0].name if same else None


def _bars(
    title: str,
    values: Any,
    ends: tuple[float, float],
    labels: Sequence[str],
    caption: str,
    beside: Any = None,
) -> Image.Image:
    """Draw a bar chart; `beside` has the heights of second, grey bars."""
    width, height, left, top, bottom = (
        360,
        250,
        46,
        30,
        48,
    )  # about the size shown; TensorBoard scales images coarsely
    image = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(13)
    low, high = ends

    def y(value: float) -> float:
        return top + (high - value) / (high - low) * (height - top - bottom)

    def bar(x: float, wide: float, value: float, colour: str) -> None:
        draw.rectangle([x, min(y(value), y(0)), x + wide, max(y(value), y(0))], colour)

    draw.text((8, 8), title, "black", font)
    for tick in np.linspace(low, high, 5):
        draw.line([(left, y(tick)), (width - 8, y(tick))], "#dddddd")
        draw.text((left - 6, y(tick)), f"{tick:.3g}", "black", font, anchor="rm")
    step = (width - left - 8) / len(values)
    for i, value in enumerate(values):
        x = left + i * step
        bar(
            x + 0.1 * step,
            0.8 * step if beside is None else 0.4 * step,
            value,
            _BLUE if value >= 0 else _RED,
        )
        if beside is not None:
            bar(x + 0.5 * step, 0.4 * step, beside[i], _GREY)
        draw.text((x + step / 2, height - bottom + 6), labels[i], "black", font, anchor="mt")
    draw.line([(left, y(0)), (width - 8, y(0))], "black")
    draw.text((8, height - 22), caption, "black", font)
    return image


# --- summaries -------------------------------------------------------------------------------------------------


_ARM_COLUMNS = [
    HParamInfo(name="objective", type=api_pb2.DATA_TYPE_STRING, differs=True),
    HParamInfo(name="arm", type=api_pb2.DATA_TYPE_STRING, differs=True),
]
_MARGINS = layout_pb2.Category(
    title="test accuracy",
    chart=[
        layout_pb2.Chart(
            title="mean and 95 % over seeds, by their number (tick the runs arms/...)",
            margin=layout_pb2.MarginChartContent(
                series=[layout_pb2.MarginChartContent.Series(
                    value="test_acc/mean", lower="test_acc/low", upper="test_acc/high"
                )]
            ),
        )
    ],
)  # fmt: skip


def _summary(tag: str, **content: Any) -> Summary:
    return Summary(value=[Summary.Value(tag=tag, **content)])


def _layout(categories: Sequence[layout_pb2.Category]) -> Summary:
    # TensorBoard's own function for it needs TensorFlow
    plugin = SummaryMetadata.PluginData(plugin_name=custom_scalar_metadata.PLUGIN_NAME)
    content = layout_pb2.Layout(category=categories).SerializeToString()
    return _size_of(
        custom_scalar_metadata.CONFIG_SUMMARY_TAG,
        SummaryMetadata(plugin_data=plugin),
        content,
    )


def _text_summary(tag: str, markdown: str) -> Summary:
    return _size_of(
        tag,
        text_metadata.create_summary_metadata("", ""),
        markdown.encode(errors="backslashreplace"),
    )


def _size_of(tag: str, about: SummaryMetadata, content: bytes) -> Summary:
    tensor = tensor_pb2.TensorProto(dtype=types_pb2.DT_STRING, string_val=[content])
    return _summary(tag, metadata=about, tensor=tensor)


def _image(tag: str, image: Image.Image) -> Summary:
    png = io.BytesIO()
    image.save(png, "png")
    content = Summary.Image(
        width=image.width, height=image.height, colorspace=3, encoded_image_string=png.getvalue()
    )
    return _summary(tag, image=content)


def _scalar(tag: str, value: float) -> Summary:
    return _summary(tag, simple_value=value)


def tag_of(metric: str | None) -> str:
    """Return the tag whose last point is a trial's value by this metric."""
    return VALUE if metric is None else TAGS.get(metric, VALUE)


def short_names(parameters: Sequence[Parameter]) -> dict[str, str]:
    """Return each parameter's column name: lr for optim.lr, or the whole path if not unique."""
    tails = {p.name: p.name.split(".", 1)[-1] for p in parameters}
    return {
        name: tail if list(tails.values()).count(tail) == 1 else name
        for name, tail in tails.items()
    }


def _settings_of_objectives(parameters: Sequence[Parameter]) -> dict[str, str]:
    """Return the setting of each parameter of an objective: alpha for objective.kd.alpha."""
    parts = {p.name: p.name.split(".", 2) for p in parameters}
    return {n: found[2] for n, found in parts.items() if found[0] == "objective" and len(found) > 2}


def common_settings(parameters: Sequence[Parameter]) -> frozenset[str]:
    """Return the settings, of one type, that objectives show in one column each."""
    settings = _settings_of_objectives(parameters)
    kinds: dict[str, set[str]] = {}
    for p in parameters:
        if p.name in settings:
            kinds.setdefault(settings[p.name], set()).add(_type_of_column(p.domain))
    others = {p.name.split(".", 1)[-1] for p in parameters if p.name not in settings}
    return frozenset(s for s, found in kinds.items() if len(found) == 1 and s not in others)


def column_names(parameters: Sequence[Parameter]) -> dict[str, str]:
    """Return each parameter's column name, as `short_names`; objectives share theirs: alpha."""
    common, settings = common_settings(parameters), _settings_of_objectives(parameters)
    shared = {name: setting for name, setting in settings.items() if setting in common}
    return short_names(parameters) | shared


def _type_of_column(domain: Domain) -> str:
    return _kind(domain.values) if isinstance(domain, Choices) else "number_value"


def _kinds(parameters: Sequence[Parameter], columns: Mapping[str, str]) -> dict[str, str]:
    """Return the HParams type of each parameter that has choices, also by its column's name."""
    listed = [p for p in parameters if isinstance(p.domain, Choices)]
    kinds: dict[str, str] = {}
    for p in listed:
        kind = _type_of_column(p.domain)
        kinds |= {p.name: kind, columns[p.name]: kind}
    return kinds


def _experiment(columns: Iterable[HParamInfo], metrics: Mapping[str, str]) -> Summary:
    infos = [
        api_pb2.MetricInfo(name=api_pb2.MetricName(tag=t), display_name=name)
        for t, name in metrics.items()
    ]
    experiment = api_pb2.Experiment(
        hparam_infos=columns, metric_infos=infos, time_created_secs=time.time()
    )
    return _hparam_summary(metadata.EXPERIMENT_TAG, experiment=experiment)


def _metrics(space: Space) -> dict[str, str]:
    """Return the HParams metrics of a sweep, by tag."""
    return {tag_of(metric): metric for metric in (space.search.metric, *space.search.metrics)}


def _columns_of(space: Searched, experiment: Path) -> list[HParamInfo]:
    """Return the columns of an experiment, with the values of all its trials.

    A sweep that went on in a narrower space has trials outside of it.
    """
    if "@" not in (space.search.study or ""):
        return _hparam_columns(space)
    records = read_lasts(experiment, alive=True)
    earlier = [{"objective": record.objective, **record.parameters} for record in records]
    return _hparam_columns(space, earlier)


def _holding(domain: Domain, values: Iterable[Any]) -> Domain:
    """Return a range or list that holds these values, too."""
    if isinstance(domain, Choices):
        more = [value for value in values if value not in domain.values]
        return Choices((*domain.values, *(v for k, v in enumerate(more) if v not in more[:k])))
    numbers = [as_number(value) for value in values]
    found = [number for number in numbers if number is not None]
    return replace(domain, low=min([domain.low, *found]), high=max([domain.high, *found]))


def _hparam_columns(space: Searched, trials: Sequence[Values] = ()) -> list[HParamInfo]:
    """Return the columns of a space; each holds the values of these trials, too.

    A column `differs`, and so is ticked at first, if every trial has it.
    """
    if not isinstance(space, Space):
        names = short_names(space.parameters)
        common: frozenset[str] = frozenset()
    else:
        names, common = column_names(space.parameters), common_settings(space.parameters)
    objectives = [b.objective for b in space.branches]
    seen = [values["objective"] for values in trials if "objective" in values]
    kinds = _holding(Choices(tuple(objectives)), seen)
    columns = [_column("objective", kinds)] if len(objectives) > 1 else []
    found: dict[str, Domain] = {}
    for p in space.parameters:
        domain = _holding(p.domain, [values[p.name] for values in trials if p.name in values])
        name = names[p.name]
        found[name] = _joined_domain(found[name], domain) if name in found else domain
    for name, domain in found.items():
        has, filled = _who_has(name, names, common, space.branches)
        column = _column(name, _holding(domain, filled))
        column.differs = has
        columns.append(column)
    return columns


def _joined_domain(one: Domain, other: Domain) -> Domain:
    """Return a range or list that holds the values of two, both of one type."""
    if isinstance(one, Choices) and not isinstance(other, Choices):
        one, other = other, one
    values = other.values if isinstance(other, Choices) else (other.low, other.high)
    return _holding(one, values)


def _who_has(
    column: str, names: Mapping[str, str], common: frozenset[str], branches: Sequence[Branch]
) -> tuple[bool, list[Any]]:
    """Return whether every trial has a value in a column, and the values of those that fix it."""
    filled: list[Any] = []
    for branch in branches:
        searched = [p for p in branch.parameters if names[p.name] == column]
        if any(p.within is None for p in searched):
            continue
        value = None
        if column in common:
            fixed = branch.example.objective.model_dump()
            value = fixed.get(column, NEUTRAL.get(column))
        if value is None:
            return False, filled
        filled.append(value)
    return True, filled


def _column(name: str, domain: Any) -> HParamInfo:
    info = HParamInfo(name=name, differs=True)
    if isinstance(domain, Choices):
        kind = _kind(domain.values)
        info.type = _TYPES[kind]
        for value in domain.values:
            info.domain_discrete.values.add(**{kind: _hparam(value, kind)})
    else:
        info.type = api_pb2.DATA_TYPE_FLOAT64
        info.domain_interval.min_value, info.domain_interval.max_value = domain.low, domain.high
    return info


_TYPES = {
    "bool_value": api_pb2.DATA_TYPE_BOOL,
    "number_value": api_pb2.DATA_TYPE_FLOAT64,
    "string_value": api_pb2.DATA_TYPE_STRING,
}


def _kind(values: Iterable[Any]) -> str:
    """Return the HParams type of a column with these values; mixed types become text."""
    found = set()
    for value in values:
        if isinstance(value, bool):
            found.add("bool_value")
        else:
            found.add("number_value" if isinstance(value, int | float) else "string_value")
    return found.pop() if len(found) == 1 else "string_value"


def _hparam(value: Any, kind: str) -> Any:
    """Return a value for a column of that type; text is YAML, in which null and "null" differ."""
    return in_yaml(value) if kind == "string_value" else value


def _session_start(
    values: Values,
    name: str,
    columns: Mapping[str, str],
    kinds: Mapping[str, str] | None = None,
) -> Summary:
    """Return the HParams summary of a trial's start.

    Args:
        kinds: types of the declared columns, by parameter; see `_kind`.
    """
    info = SessionStartInfo(group_name=name, start_time_secs=time.time())
    for key, value in values.items():
        short = columns.get(key, key)
        if isinstance(value, np.generic):
            value = value.item()
        kind = (kinds or {}).get(key) or _kind([value])
        setattr(info.hparams[short], kind, _hparam(value, kind))
    return _hparam_summary(metadata.SESSION_START_INFO_TAG, session_start_info=info)


def _outcome(status: str) -> Summary:
    """Return how a trial ended, as a summary that TensorBoard itself does not read."""
    info = SessionStartInfo()
    info.hparams[STATUS].string_value = status
    return _hparam_summary(OUTCOME_TAG, session_start_info=info)


def _session_end(failed: bool) -> Summary:
    status = api_pb2.STATUS_FAILURE if failed else api_pb2.STATUS_SUCCESS
    info = SessionEndInfo(status=status, end_time_secs=time.time())
    return _hparam_summary(metadata.SESSION_END_INFO_TAG, session_end_info=info)


def _hparam_summary(tag: str, **info: Any) -> Summary:
    data = HParamsPluginData(version=metadata.PLUGIN_DATA_VERSION, **info)
    about = SummaryMetadata(
        plugin_data=SummaryMetadata.PluginData(
            plugin_name=metadata.PLUGIN_NAME, content=data.SerializeToString()
        )
    )
    return _summary(tag, metadata=about, tensor=metadata.NULL_TENSOR)


def _add(writer: EventFileWriter, step: int, summary: Summary) -> None:
    writer.add_event(event_pb2.Event(wall_time=time.time(), step=step, summary=summary))


def _write(folder: Path | str, *summaries: Summary, step: int = 0, suffix: str = "") -> None:
    """Write a whole file of events."""
    writer = EventFileWriter(str(folder), filename_suffix=suffix)
    for summary in summaries:
        _add(writer, step, summary)
    writer.close()
