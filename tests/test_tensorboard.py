"""Event files as TensorBoard itself reads them, its HParams backend included."""

from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer
from tensorboard.plugins.hparams import metadata, plugin_data_pb2

from tfkd_ray.space import Space, build_space
from tfkd_ray.tensorboard import TensorBoard, short_names


class FakeTrial:
    """What the callback reads of a Tune trial."""

    def __init__(self, name: str, config: dict[str, Any]) -> None:
        self.trial_id, self.config, self.last_result = name, config, dict[str, Any]()
        self.evaluated_params = dict[str, Any]()


@pytest.fixture
def space() -> Space:
    return build_space(
        {
            "objective": ["ce", {"name": "lsr", "alpha": {"low": 0.1, "high": 0.4}}],
            "optim": {"lr": {"low": 0.1, "high": 1.0, "log": True}},
            "student": {"choices": ["mlp", "cnn"]},
        }
    )


def trial(tmp_path: Path, number: int, objective: str, **parameters: Any) -> FakeTrial:
    name = f"t{number:04d}-{objective}"
    about = {"name": name, "parameters": parameters, "directory": str(tmp_path / name)}
    return FakeTrial(name, {"trial": about, "objective": {"name": objective}})


def run(
    callback: TensorBoard, t: FakeTrial, accuracies: list[float], failed: str | None = None, first: int = 1
) -> None:
    callback.on_trial_start(0, [], t)
    for epoch, accuracy in enumerate(accuracies, start=first):
        t.last_result = {
            "epoch": epoch,
            "train_loss": 1 / epoch,
            "val_accuracy": accuracy,
            "done": False,
            "time_s": 1.0,
        }
        callback.on_trial_result(0, [], t, t.last_result)
    t.last_result |= {"failed": failed} if failed else {}
    callback.on_trial_complete(0, [], t)


def read(folder: Path) -> EventMultiplexer:
    events = EventMultiplexer().AddRunsFromDirectory(str(folder))
    return events.Reload()


def test_runs_have_readable_names_and_few_stable_tags(tmp_path: Path, space: Space) -> None:
    callback = TensorBoard(tmp_path, space)
    callback.setup()
    run(
        callback,
        trial(tmp_path, 7, "lsr", **{"optim.lr": 0.2, "objective.lsr.alpha": 0.3, "student": "mlp"}),
        [0.5, 0.6],
    )
    events = read(tmp_path)
    assert set(events.Runs()) == {".", "t0007-lsr"}
    assert set(events.Runs()["t0007-lsr"]["scalars"]) == {"train/loss", "val/acc", "hp/value"}
    scalars = events.Scalars("t0007-lsr", "hp/value")
    assert [(s.step, round(s.value, 6)) for s in scalars] == [(1, 0.5), (2, 0.6)]


def test_every_searched_parameter_is_a_typed_column(tmp_path: Path, space: Space) -> None:
    callback = TensorBoard(tmp_path, space)
    callback.setup()
    callback.setup()  # a resumed sweep adds no second summary
    data = read(tmp_path).SummaryMetadata(".", metadata.EXPERIMENT_TAG).plugin_data.content
    experiment = plugin_data_pb2.HParamsPluginData.FromString(data).experiment
    columns = {h.name: h for h in experiment.hparam_infos}
    assert set(columns) == {"objective", "lr", "lsr.alpha", "student"}
    assert (columns["lr"].domain_interval.min_value, columns["lr"].domain_interval.max_value) == (0.1, 1.0)
    assert [v.string_value for v in columns["objective"].domain_discrete.values] == ["ce", "lsr"]
    assert all(h.differs for h in columns.values())
    assert next(m.name.tag for m in experiment.metric_infos) == "hp/value"
    assert len(list(tmp_path.glob("events.*"))) == 1


@pytest.mark.parametrize("failed, status", [(None, "STATUS_SUCCESS"), ("ArithmeticError: nan", "STATUS_FAILURE")])
def test_a_trial_says_its_values_at_once_and_its_true_status_at_the_end(
    tmp_path: Path, space: Space, failed: str | None, status: str
) -> None:
    callback = TensorBoard(tmp_path, space)
    t = trial(tmp_path, 0, "ce", **{"optim.lr": 0.2, "student": "mlp"})
    callback.on_trial_start(0, [], t)
    data = read(tmp_path).SummaryMetadata("t0000-ce", metadata.SESSION_START_INFO_TAG).plugin_data.content
    start = plugin_data_pb2.HParamsPluginData.FromString(data).session_start_info
    assert start.hparams["lr"].number_value == 0.2 and start.hparams["objective"].string_value == "ce"
    run(callback, t, [0.5], failed)
    data = read(tmp_path).SummaryMetadata("t0000-ce", metadata.SESSION_END_INFO_TAG).plugin_data.content
    assert plugin_data_pb2.HParamsPluginData.FromString(data).session_end_info.status == getattr(
        __import__("tensorboard.plugins.hparams.api_pb2", fromlist=["x"]), status
    )


def test_a_resumed_trial_writes_no_epoch_twice(tmp_path: Path, space: Space) -> None:
    t = trial(tmp_path, 0, "ce", **{"optim.lr": 0.2})
    run(TensorBoard(tmp_path / "tb", space), t, [0.1, 0.2, 0.3])
    (tmp_path / "t0000-ce").mkdir()
    (tmp_path / "t0000-ce" / "metrics.jsonl").write_text('{"epoch": 1}\n{"epoch": 2}\n')  # the third was lost
    run(TensorBoard(tmp_path / "tb", space), t, [0.1, 0.2, 0.35, 0.4])
    scalars = read(tmp_path / "tb").Scalars("t0000-ce", "val/acc")
    assert [(s.step, round(s.value, 6)) for s in scalars] == [(1, 0.1), (2, 0.2), (3, 0.35), (4, 0.4)]


def test_short_names_are_short_only_where_that_is_clear(space: Space) -> None:
    assert short_names(space.parameters)["optim.lr"] == "lr"
    twice = build_space({"objective": "ce", "optim": {"lr": {"low": 0.1, "high": 1}}})
    assert short_names([*twice.parameters, *space.parameters])["student"] == "student"


def test_a_trial_fills_the_columns_that_the_experiment_names(tmp_path: Path) -> None:
    tree = {"objective": "kd", "teacher": {"optim": {"lr": {"choices": [0.1, 0.2]}}, "model": "mlp"}}
    both = build_space({**tree, "optim": {"lr": {"low": 0.1, "high": 1.0}}})
    callback = TensorBoard(tmp_path, both)
    callback.setup()
    callback.on_trial_start(0, [], trial(tmp_path, 0, "kd", **{"optim.lr": 0.3, "teacher.optim.lr": 0.2}))
    events = read(tmp_path)
    data = [
        plugin_data_pb2.HParamsPluginData.FromString(events.SummaryMetadata(run, tag).plugin_data.content)
        for run, tag in ((".", metadata.EXPERIMENT_TAG), ("t0000-kd", metadata.SESSION_START_INFO_TAG))
    ]
    columns = {h.name for h in data[0].experiment.hparam_infos}
    assert set(data[1].session_start_info.hparams) - {"objective"} == columns == {"lr", "optim.lr"}
