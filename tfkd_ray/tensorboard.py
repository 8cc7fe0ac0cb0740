"""TensorBoard events of a sweep: a Tune callback, usable in any `ray.tune.Tuner`.

One events file a trial in `<folder>/<trial name>/`, a step an epoch, few and stable tags. HParams: one experiment
summary at the root, so that every searched parameter is a column; each trial says its values when it starts and its
true status when it ends. Written with TensorBoard's own writer: neither torch nor TensorFlow is needed.
"""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ray.tune import Callback
from tensorboard.compat.proto import event_pb2, summary_pb2, tensor_pb2, types_pb2
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.custom_scalar import metadata as custom_scalar_metadata
from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from tfkd_ray.experiment import read_metrics
from tfkd_ray.space import Choices, Parameter, Space

TAGS = {
    "train_loss": "train/loss",
    "train_ce": "train/loss_ce",
    "train_kd": "train/loss_kd",
    "val_accuracy": "val/acc",
    "val_top5": "val/top5",
    "val_nll": "val/loss",
    "val_ece": "val/ece",
    "val_agreement": "kd/agreement",
    "val_teacher_kl": "kd/kl",
    "train_kd_ratio": "kd/grad_ratio",
    "lr": "opt/lr",
    "images_per_s": "sys/img_per_s",
}
"""Our metrics and the tags they go by; losses are in nats, accuracies fractions. kd/grad_ratio: how much larger the
soft part's gradient by the logits is than that of CE."""
VALUE = "hp/value"
"""The trial's value by the selection rule: HParams' metric."""


class TensorBoard(Callback):  # type: ignore[misc]
    """Writes the events of all trials of one sweep.

    Args:
        folder: where the runs go; point `tensorboard --logdir` at it.
        space: names the columns of HParams. Without it they are the union of what the trials say.
        metric: what `hp/value` is.
    """

    def __init__(self, folder: Path | str, space: Space | None = None, metric: str = "val_accuracy") -> None:
        self._folder, self._space, self._metric = Path(folder), space, metric
        self._columns = short_names(space.parameters) if space is not None else {}
        self._writers: dict[str, tuple[EventFileWriter, int]] = {}

    def setup(self, **info: Any) -> None:
        if self._space is not None and not list(self._folder.glob("events.*")):
            writer = EventFileWriter(str(self._folder))
            _add(writer, 0, _experiment(self._space))
            writer.close()

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._close(trial)
        about = trial.config.get("trial", {})
        metrics = read_metrics(Path(about["directory"])) if "directory" in about else []
        seen = int(metrics[-1]["epoch"]) if metrics else 0
        writer = EventFileWriter(str(self._folder / about.get("name", str(trial))))
        # whatever an earlier session wrote past `seen` is void
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        writer.add_event(event_pb2.Event(wall_time=time.time(), step=seen + 1, session_log=start))
        values = about.get("parameters", trial.evaluated_params)
        objective = trial.config.get("objective")
        name = objective.get("name") if isinstance(objective, Mapping) else objective
        _add(
            writer,
            0,
            # the seeds of an arm are one session group
            _session_start(
                {"objective": name, **values} if name else values,
                about.get("arm") or about.get("name", ""),
                self._columns,
            ),
        )
        writer.flush()
        self._writers[trial.trial_id] = (writer, seen)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        writer, seen = self._writers[trial.trial_id]
        epoch = int(result.get("epoch", result.get("training_iteration", 0)))
        if epoch <= seen:
            return
        values = {tag: result[key] for key, tag in TAGS.items() if isinstance(result.get(key), int | float)}
        if isinstance(result.get(self._metric), int | float):
            values[VALUE] = result[self._metric]
        if values:
            _add(writer, epoch, summary_pb2.Summary(
                value=[summary_pb2.Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
            ))  # fmt: skip
        writer.flush()
        self._writers[trial.trial_id] = (writer, epoch)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._end(trial, failed=bool((trial.last_result or {}).get("failed")))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._end(trial, failed=True)

    def on_experiment_end(self, trials: list[Any], **info: Any) -> None:
        for trial in trials:
            self._close(trial)

    def _end(self, trial: Any, *, failed: bool) -> None:
        if trial.trial_id in self._writers:
            writer, epoch = self._writers[trial.trial_id]
            _add(writer, epoch, _session_end(failed))
        self._close(trial)

    def _close(self, trial: Any) -> None:
        writer, _ = self._writers.pop(trial.trial_id, (None, 0))
        if writer is not None:
            writer.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_writers": {}}


def write_comparison(folder: Path, arms: Mapping[str, Mapping[str, Sequence[Any]]]) -> None:
    """Events that show a finished comparison: test accuracies as HParams' values, and a margin chart of the arms.

    The chart, under Custom Scalars, shows mean and 95 % interval of each run `arms/NAME` after 2, 3, ... n seeds.

    Args:
        folder: where the runs' events are.
        arms: by arm's name: `runs` their names, `values` their test accuracies, and for each number of seeds from 2 on
            `mean`, `low` and `high`.
    """
    for old in (*folder.glob("events.*"), *folder.glob("*/events.*.test"), *folder.glob("arms/*/events.*")):
        old.unlink()
    columns = [
        api_pb2.HParamInfo(name=name, type=api_pb2.DATA_TYPE_STRING, differs=True) for name in ("objective", "arm")
    ]
    columns.append(api_pb2.HParamInfo(name="seed", type=api_pb2.DATA_TYPE_FLOAT64, differs=True))
    metric = api_pb2.MetricInfo(name=api_pb2.MetricName(tag=VALUE), display_name="test accuracy")
    about = api_pb2.Experiment(hparam_infos=columns, metric_infos=[metric], time_created_secs=time.time())
    band = layout_pb2.MarginChartContent.Series(value="test_acc/mean", lower="test_acc/low", upper="test_acc/high")
    chart = layout_pb2.Chart(
        title="mean and 95 % over seeds, by their number (tick the runs arms/...)",
        margin=layout_pb2.MarginChartContent(series=[band]),
    )
    layout = layout_pb2.Layout(category=[layout_pb2.Category(title="test accuracy", chart=[chart])])
    root = EventFileWriter(str(folder))
    _add(root, 0, _summary(metadata.EXPERIMENT_TAG, plugin_data_pb2.HParamsPluginData(experiment=about)))
    _add(root, 0, _layout(layout))
    root.close()
    for name, arm in arms.items():
        writer = EventFileWriter(str(folder / "arms" / name))
        for kind in ("mean", "low", "high"):
            for seeds, value in enumerate(arm[kind], start=2):
                _add(writer, seeds, _scalar(f"test_acc/{kind}", value))
        writer.close()
        for run, value in zip(arm["runs"], arm["values"], strict=True):
            writer = EventFileWriter(str(folder / str(run)), filename_suffix=".test")
            _add(writer, 0, _scalar(VALUE, value))
            writer.close()


def _layout(layout: layout_pb2.Layout) -> summary_pb2.Summary:
    # TensorBoard's own function for it needs TensorFlow
    plugin = summary_pb2.SummaryMetadata.PluginData(plugin_name=custom_scalar_metadata.PLUGIN_NAME)
    tensor = tensor_pb2.TensorProto(dtype=types_pb2.DT_STRING, string_val=[layout.SerializeToString()])
    value = summary_pb2.Summary.Value(
        tag=custom_scalar_metadata.CONFIG_SUMMARY_TAG,
        metadata=summary_pb2.SummaryMetadata(plugin_data=plugin),
        tensor=tensor,
    )
    return summary_pb2.Summary(value=[value])


def _scalar(tag: str, value: float) -> summary_pb2.Summary:
    return summary_pb2.Summary(value=[summary_pb2.Summary.Value(tag=tag, simple_value=value)])


def short_names(parameters: Sequence[Parameter]) -> dict[str, str]:
    """Column names: optim.lr is lr, objective.kd.alpha is kd.alpha, and the whole path where that is not unique."""
    tails = {p.name: p.name.split(".", 1)[-1] for p in parameters}
    return {name: tail if list(tails.values()).count(tail) == 1 else name for name, tail in tails.items()}


def _experiment(space: Space) -> summary_pb2.Summary:
    names = short_names(space.parameters)
    columns = []
    if len(space.branches) > 1:
        options = [b.objective for b in space.branches]
        columns.append(_column("objective", Choices(tuple(options))))
    columns += [_column(names[p.name], p.domain) for p in space.parameters]
    experiment = api_pb2.Experiment(
        hparam_infos=columns,
        metric_infos=[
            api_pb2.MetricInfo(name=api_pb2.MetricName(tag=VALUE), display_name=space.search.metric),
            api_pb2.MetricInfo(name=api_pb2.MetricName(tag="val/loss"), display_name="val NLL"),
        ],
        time_created_secs=time.time(),
    )
    data = plugin_data_pb2.HParamsPluginData(experiment=experiment)
    return _summary(metadata.EXPERIMENT_TAG, data)


def _column(name: str, domain: Any) -> api_pb2.HParamInfo:
    info = api_pb2.HParamInfo(name=name, differs=True)
    if isinstance(domain, Choices):
        text = any(not isinstance(v, int | float) for v in domain.values)
        info.type = api_pb2.DATA_TYPE_STRING if text else api_pb2.DATA_TYPE_FLOAT64
        for value in domain.values:
            info.domain_discrete.values.add(
                **{"string_value" if text else "number_value": str(value) if text else value}
            )
    else:
        info.type = api_pb2.DATA_TYPE_FLOAT64
        info.domain_interval.min_value, info.domain_interval.max_value = domain.low, domain.high
    return info


def _session_start(values: Mapping[str, Any], name: str, columns: Mapping[str, str]) -> summary_pb2.Summary:
    info = plugin_data_pb2.SessionStartInfo(group_name=name, start_time_secs=time.time())
    for key, value in values.items():
        short = columns.get(key, key)
        if isinstance(value, bool):
            info.hparams[short].bool_value = value
        elif isinstance(value, int | float):
            info.hparams[short].number_value = value
        else:
            info.hparams[short].string_value = str(value)
    return _summary(metadata.SESSION_START_INFO_TAG, plugin_data_pb2.HParamsPluginData(session_start_info=info))


def _session_end(failed: bool) -> summary_pb2.Summary:
    status = api_pb2.STATUS_FAILURE if failed else api_pb2.STATUS_SUCCESS
    info = plugin_data_pb2.SessionEndInfo(status=status, end_time_secs=time.time())
    return _summary(metadata.SESSION_END_INFO_TAG, plugin_data_pb2.HParamsPluginData(session_end_info=info))


def _summary(tag: str, data: plugin_data_pb2.HParamsPluginData) -> summary_pb2.Summary:
    data.version = metadata.PLUGIN_DATA_VERSION
    about = summary_pb2.SummaryMetadata(
        plugin_data=summary_pb2.SummaryMetadata.PluginData(
            plugin_name=metadata.PLUGIN_NAME, content=data.SerializeToString()
        )
    )
    return summary_pb2.Summary(value=[summary_pb2.Summary.Value(tag=tag, metadata=about, tensor=metadata.NULL_TENSOR)])


def _add(writer: EventFileWriter, step: int, summary: summary_pb2.Summary) -> None:
    writer.add_event(event_pb2.Event(wall_time=time.time(), step=step, summary=summary))
