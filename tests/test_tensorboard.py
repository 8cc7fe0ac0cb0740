"""Event files as TensorBoard itself reads them, including its HParams backend."""

import io
import re
import signal
import socket
import statistics
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest
import torch
from conftest import Run, long_after
from PIL import Image
from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer
from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2

from tfkd_ray.cli.show import _HOW_TO_COMPARE
from tfkd_ray.learn.objectives import Canonical, LabelSmoothing, TfkdReg, TfkdRegCode
from tfkd_ray.learn.own import only_reading
from tfkd_ray.settings.yaml import parse_yaml
from tfkd_ray.show.board import (
    BY_OBJECTIVE,
    CHANGES,
    _status,
    _with_status,
    adapted_assets,
    opening,
)
from tfkd_ray.show.tensorboard import (
    OUTCOME_TAG,
    TensorBoard,
    _column,
    _hparam_columns,
    _joined_column,
    _kind,
    _session_start,
    column_names,
    label_probability,
    short_names,
    side_by_side,
)
from tfkd_ray.space.ranges import Choices
from tfkd_ray.space.space import Space, build_space
from tfkd_ray.store.experiment import write_experiment


class FakeTrial:
    """The attributes of a Tune trial that the callback reads."""

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
    about = {
        "number": number,
        "name": name,
        "epochs": 9,
        "parameters": parameters,
        "directory": str(tmp_path / name),
    }
    return FakeTrial(name, {"trial": about, "objective": {"name": objective}})


def run(
    callback: TensorBoard,
    t: FakeTrial,
    accuracies: list[float],
    failed: str | None = None,
    first: int = 1,
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
        trial(
            tmp_path, 7, "lsr", **{"optim.lr": 0.2, "objective.lsr.alpha": 0.3, "student": "mlp"}
        ),
        [0.5, 0.6],
    )
    events = read(tmp_path)
    assert set(events.Runs()) == {"about", "t0007-lsr"}
    assert set(events.Runs()["t0007-lsr"]["scalars"]) == {"train/loss", "val/acc"}
    scalars = events.Scalars("t0007-lsr", "val/acc")
    assert [(s.step, round(s.value, 6)) for s in scalars] == [(1, 0.5), (2, 0.6)]


def test_every_searched_parameter_is_a_typed_column(tmp_path: Path, space: Space) -> None:
    callback = TensorBoard(tmp_path, space)
    callback.setup()
    callback.setup()  # a resumed sweep adds no second summary
    data = read(tmp_path).SummaryMetadata("about", metadata.EXPERIMENT_TAG).plugin_data.content
    experiment = plugin_data_pb2.HParamsPluginData.FromString(data).experiment
    columns = {h.name: h for h in experiment.hparam_infos}
    assert set(columns) == {"objective", "lr", "alpha", "student"}
    assert (columns["lr"].domain_interval.min_value, columns["lr"].domain_interval.max_value) == (
        0.1,
        1.0,
    )
    assert [v.string_value for v in columns["objective"].domain_discrete.values] == ["ce", "lsr"]
    assert all(h.differs for h in columns.values())
    assert next(m.name.tag for m in experiment.metric_infos) == "val/acc"
    assert len(list(tmp_path.glob("**/events.*"))) == 1


@pytest.mark.parametrize(
    "choices, kind",
    [
        ([None, 5.0, "auto"], "DATA_TYPE_STRING"), ([None, "null"], "DATA_TYPE_STRING"), ([None, 1], "DATA_TYPE_STRING"),
        ([True, "true"], "DATA_TYPE_STRING"), ([True, 2], "DATA_TYPE_STRING"), ([True, False], "DATA_TYPE_BOOL"),
        ([1, 2.5], "DATA_TYPE_FLOAT64"), (["a", "b"], "DATA_TYPE_STRING"),
    ],
)  # fmt: skip
def test_a_trials_values_are_among_those_its_column_declares(
    tmp_path: Path, choices: list[Any], kind: str
) -> None:
    """Otherwise a filter of HParams hides the run."""
    column, kinds = _column("x", Choices(tuple(choices))), {"x": _kind(choices)}
    assert api_pb2.DataType.Name(column.type) == kind
    declared = [v.SerializeToString() for v in column.domain_discrete.values]
    assert len(set(declared)) == len(choices), "each is another value"
    for value, same in zip(choices, declared, strict=True):
        content = (
            _session_start({"x": value}, "g", {"x": "x"}, kinds)
            .value[0]
            .metadata.plugin_data.content
        )
        told = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams["x"]
        assert told.SerializeToString() == same


def test_a_sweeps_callback_tells_values_as_its_columns_do(tmp_path: Path) -> None:
    teacher = {"model": "mlp", "stop_epoch": {"choices": [None, 5]}}
    space = build_space({"objective": "kd", "student": "mlp", "teacher": teacher, "epochs": 9})
    callback = TensorBoard(tmp_path, space)
    callback.setup()
    run(callback, trial(tmp_path, 0, "kd", **{"teacher.stop_epoch": 5}), [0.5])
    run(callback, trial(tmp_path, 1, "kd", **{"teacher.stop_epoch": None}), [0.5])
    events = read(tmp_path)
    data = events.SummaryMetadata("about", metadata.EXPERIMENT_TAG).plugin_data.content
    (column,) = plugin_data_pb2.HParamsPluginData.FromString(data).experiment.hparam_infos
    told = [
        plugin_data_pb2.HParamsPluginData.FromString(
            events.SummaryMetadata(name, metadata.SESSION_START_INFO_TAG).plugin_data.content
        ).session_start_info.hparams[column.name].string_value
        for name in ("t0000-kd", "t0001-kd")
    ]  # fmt: skip
    assert [v.string_value for v in column.domain_discrete.values] == ["null", "5"] and told == [
        "5",
        "null",
    ]


@pytest.mark.parametrize(
    "failed, status", [(None, "STATUS_SUCCESS"), ("ArithmeticError: nan", "STATUS_FAILURE")]
)
def test_a_trial_says_its_values_at_once_and_its_true_status_at_the_end(
    tmp_path: Path, space: Space, failed: str | None, status: str
) -> None:
    callback = TensorBoard(tmp_path, space)
    t = trial(tmp_path, 0, "ce", **{"optim.lr": 0.2, "student": "mlp"})
    callback.on_trial_start(0, [], t)
    data = (
        read(tmp_path)
        .SummaryMetadata("t0000-ce", metadata.SESSION_START_INFO_TAG)
        .plugin_data.content
    )
    start = plugin_data_pb2.HParamsPluginData.FromString(data).session_start_info
    assert (
        start.hparams["lr"].number_value == 0.2 and start.hparams["objective"].string_value == "ce"
    )
    run(callback, t, [0.5], failed)
    data = (
        read(tmp_path)
        .SummaryMetadata("t0000-ce", metadata.SESSION_END_INFO_TAG)
        .plugin_data.content
    )
    assert plugin_data_pb2.HParamsPluginData.FromString(data).session_end_info.status == getattr(
        __import__("tensorboard.plugins.hparams.api_pb2", fromlist=["x"]), status
    )


def test_a_resumed_trial_writes_no_epoch_twice(tmp_path: Path, space: Space) -> None:
    t = trial(tmp_path, 0, "ce", **{"optim.lr": 0.2})
    run(TensorBoard(tmp_path / "tb", space), t, [0.1, 0.2, 0.3])
    (tmp_path / "t0000-ce").mkdir()
    (tmp_path / "t0000-ce" / "metrics.jsonl").write_text(
        '{"epoch": 1}\n{"epoch": 2}\n'
    )  # the third was lost
    run(TensorBoard(tmp_path / "tb", space), t, [0.1, 0.2, 0.35, 0.4])
    scalars = read(tmp_path / "tb").Scalars("t0000-ce", "val/acc")
    assert [(s.step, round(s.value, 6)) for s in scalars] == [
        (1, 0.1),
        (2, 0.2),
        (3, 0.35),
        (4, 0.4),
    ]


def test_short_names_are_short_only_where_that_is_clear(space: Space) -> None:
    assert short_names(space.parameters)["optim.lr"] == "lr"
    twice = build_space({"objective": "ce", "optim": {"lr": {"low": 0.1, "high": 1}}})
    assert short_names([*twice.parameters, *space.parameters])["student"] == "student"


OBJECTIVES = [
    "ce",
    {"name": "lsr", "alpha": {"low": 0.02, "high": 0.4, "log": True}},
    {"name": "tfkd_reg", "alpha": 0.3, "temperature": {"low": 2, "high": 20}, "correct_prob": {"low": 0.9, "high": 0.99}},
]  # fmt: skip


def test_objectives_share_columns_that_every_trial_fills(tmp_path: Path) -> None:
    space = build_space({"objective": OBJECTIVES, "student": "mlp"})
    assert set(column_names(space.parameters).values()) == {"alpha", "temperature", "correct_prob"}
    found = {c.name: c for c in _hparam_columns(space)}
    assert {name for name, c in found.items() if c.differs} == {"objective", "alpha", "temperature"}
    ends = {
        name: (c.domain_interval.min_value, c.domain_interval.max_value)
        for name, c in found.items()
        if name != "objective"
    }
    assert ends == {"alpha": (0, 0.4), "temperature": (1, 20), "correct_prob": (0.9, 0.99)}
    callback = TensorBoard(tmp_path, space)
    callback.setup()
    values = {"lsr": {"alpha": 0.1}, "tfkd_reg": {"temperature": 3.0, "correct_prob": 0.95}}
    told = {}
    for number, branch in enumerate(space.branches):
        own = values.get(branch.objective, {})
        t = trial(
            tmp_path,
            number,
            branch.objective,
            **{f"objective.{branch.objective}.{key}": value for key, value in own.items()},
        )
        config = branch.config(t.config["trial"]["parameters"]).model_dump(mode="json")
        t.config = {**config, "trial": t.config["trial"]}
        run(callback, t, [0.5])
        start = read(tmp_path).SummaryMetadata(str(t.trial_id), metadata.SESSION_START_INFO_TAG)
        data = plugin_data_pb2.HParamsPluginData.FromString(start.plugin_data.content)
        told[branch.objective] = {
            name: value.number_value
            for name, value in data.session_start_info.hparams.items()
            if name != "objective"
        }
    assert told == {
        "ce": {"alpha": 0, "temperature": 1},
        "lsr": {"alpha": 0.1, "temperature": 1},
        "tfkd_reg": {"alpha": 0.3, "temperature": 3, "correct_prob": 0.95},
    }


def test_a_setting_that_is_text_in_one_objective_is_no_shared_column() -> None:
    own = {"name": "own", "path": "anything:loss", "args": {"width": {"choices": ["a", "b"]}}}
    other = {**own, "path": "anything:other", "args": {"width": {"low": 1, "high": 2}}}
    with only_reading():
        space = build_space({"objective": [own, other], "search": {"baselines": False}})
    names = column_names(space.parameters)
    assert len(set(names.values())) == len(names) == 2


def test_a_trial_fills_the_columns_that_the_experiment_names(tmp_path: Path) -> None:
    tree = {
        "objective": "kd",
        "teacher": {"optim": {"lr": {"choices": [0.1, 0.2]}}, "model": "mlp"},
    }
    both = build_space({**tree, "optim": {"lr": {"low": 0.1, "high": 1.0}}})
    callback = TensorBoard(tmp_path, both)
    callback.setup()
    callback.on_trial_start(
        0, [], trial(tmp_path, 0, "kd", **{"optim.lr": 0.3, "teacher.optim.lr": 0.2})
    )
    events = read(tmp_path)
    data = [
        plugin_data_pb2.HParamsPluginData.FromString(
            events.SummaryMetadata(run, tag).plugin_data.content
        )
        for run, tag in (
            ("about", metadata.EXPERIMENT_TAG),
            ("t0000-kd", metadata.SESSION_START_INFO_TAG),
        )
    ]
    columns = {h.name for h in data[0].experiment.hparam_infos}
    assert set(data[1].session_start_info.hparams) - {"objective"} == columns == {"lr", "optim.lr"}


def content(events: EventMultiplexer, run: str, tag: str) -> bytes:
    """Return text, or a layout, as written."""
    (event,) = events.Tensors(run, tag)
    return bytes(event.tensor_proto.string_val[0])


def test_a_trial_that_fails_and_is_tried_again_has_the_status_of_its_last_try(
    tmp_path: Path, space: Space
) -> None:
    t = trial(tmp_path, 0, "ce", **{"optim.lr": 0.2})
    t.config["trial"]["epochs"] = 2
    callback = TensorBoard(tmp_path / "tb", space)
    for failed, status in (("ArithmeticError: nan", 2), (None, 1)):
        t.last_result = {}
        run(callback, t, [0.1, 0.2], failed)
        events = read(tmp_path / "tb")
        data = events.SummaryMetadata("t0000-ce", metadata.SESSION_END_INFO_TAG).plugin_data.content
        assert plugin_data_pb2.HParamsPluginData.FromString(data).session_end_info.status == status
    assert content(events, "t0000-ce", "trial/outcome") == b"after 2 of 2 epochs: done"
    assert len(events.Tensors("t0000-ce", "trial/config")) == 1  # once, though it was started twice


@pytest.mark.parametrize(
    "last, failed, says, status",
    [(9, None, "after 9 of 9 epochs: done", "done, 9/9"), (3, None, "after 3 of 9 epochs: stopped early", "stopped, 3/9"),
     (3, "ArithmeticError: nan", "after 3 of 9 epochs: failed: ArithmeticError: nan", "failed, 3/9")],
    ids=["done", "stopped", "failed"],
)  # fmt: skip
def test_how_a_trial_ended_is_told_in_words_and_epochs(
    tmp_path: Path, space: Space, last: int, failed: str | None, says: str, status: str
) -> None:
    t = trial(tmp_path, 0, "ce", **{"optim.lr": 0.2})
    run(TensorBoard(tmp_path, space), t, [0.5] * last, failed)
    events = read(tmp_path)
    assert content(events, "t0000-ce", "trial/outcome").decode() == says
    tags = {
        tag: events.SummaryMetadata("t0000-ce", tag).plugin_data.content
        for tag in (OUTCOME_TAG, metadata.SESSION_START_INFO_TAG, metadata.SESSION_END_INFO_TAG)
    }
    assert _status(tags) == status
    start = _with_status(tags, status, [])[metadata.SESSION_START_INFO_TAG]
    hparams = plugin_data_pb2.HParamsPluginData.FromString(start).session_start_info.hparams
    assert hparams["status"].string_value == status and hparams["lr"].number_value == 0.2
    earlier = {tag: tags[tag] for tag in tags if tag != OUTCOME_TAG}
    assert _status(earlier) == ("failed" if failed else "done"), "events of an earlier release"
    assert _status({}) == "running"


def test_a_text_says_what_is_searched_and_in_which_column(tmp_path: Path, space: Space) -> None:
    write_experiment(tmp_path, space.tree, ["tfkd", "tune", "my space.yaml"])
    callback = TensorBoard(tmp_path / "tb", space)
    callback.setup()
    events = read(tmp_path / "tb")
    text = content(events, "about", "experiment").decode()
    assert "    tfkd tune 'my space.yaml'" in text and "Git commit" in text
    assert "| objective.lsr.alpha | alpha | 0.1 to 0.4 | lsr |" in text
    assert "| student | student | mlp or cnn | ce, lsr |" in text.replace("  ", " ")
    assert "Objectives share the columns alpha." in text and "alpha = 0" in text


def test_a_trial_says_how_it_differs_and_its_configuration_reads_back(
    tmp_path: Path, space: Space
) -> None:
    callback = TensorBoard(tmp_path, space)
    values = {"optim.lr": 0.2, "student": "mlp", "objective.lsr.alpha": 0.3}
    config = space.branches[1].config(values).model_dump(mode="json")
    t = trial(tmp_path, 1, "lsr", **values)
    t.config = {**config, "trial": t.config["trial"]}
    callback.on_trial_start(0, [], t)
    events = read(tmp_path)
    change = content(events, "t0001-lsr", "trial/change").decode().splitlines()
    assert {
        "| objective.name | ce | lsr |",
        "| objective.alpha |  | 0.3 |",
        "| optim.lr | 0.1 | 0.2 |",
    } <= {*change}
    again = content(events, "t0001-lsr", "trial/config").decode()
    assert "`tfkd train t0001-lsr.yaml`" in again
    assert parse_yaml(again.split("```yaml\n")[1].removesuffix("```"), Path("x.yaml")) == config


@pytest.mark.parametrize("K", [2, 10, 1000])
@pytest.mark.parametrize(
    "objective", [TfkdReg(temperature=3), TfkdRegCode(temperature=3)], ids=lambda o: o.name
)  # fmt: skip
def test_the_target_in_the_figure_is_where_the_soft_part_is_zero(
    objective: Canonical, K: int
) -> None:
    label = label_probability(objective, K)
    assert label is not None
    target = torch.full((1, K), (1 - label) / (K - 1), dtype=torch.float64)
    target[0, 0] = label
    T = 3.0 if isinstance(objective, TfkdReg) else 1.0  # whether the student is softened, too
    kd = objective.terms(T * target.log(), torch.tensor([0])).kd
    assert kd is not None and kd.abs() < 1e-12


def test_the_target_of_label_smoothing_is_torchs() -> None:
    logits = torch.zeros(1, 5, dtype=torch.float64, requires_grad=True)
    torch.nn.functional.cross_entropy(logits, torch.tensor([0]), label_smoothing=0.3).backward()
    assert logits.grad is not None
    assert label_probability(LabelSmoothing(alpha=0.3), 5) == pytest.approx(
        1 / 5 - logits.grad[0, 0].item()
    )


def test_figures_are_small_images(tmp_path: Path, space: Space) -> None:
    run(TensorBoard(tmp_path, space), trial(tmp_path, 0, "lsr"), [0.5])
    run(TensorBoard(tmp_path, space), trial(tmp_path, 1, "ce"), [0.5])
    events = read(tmp_path)
    (image,) = events.Images("t0000-lsr", "trial/soft_targets")
    png = image.encoded_image_string
    assert Image.open(io.BytesIO(png)).size == (image.width, image.height) and len(png) < 10_000
    assert not events.Runs()["t0001-ce"]["images"]  # hard labels only


@pytest.mark.slow
def test_a_report_costs_less_than_two_milliseconds(tmp_path: Path, space: Space) -> None:
    callback, t = TensorBoard(tmp_path, space), trial(tmp_path, 0, "lsr")
    callback.on_trial_start(0, [], t)
    result = {"train_loss": 1.0, "train_ce": 1.0, "train_kd": 1.0, "val_accuracy": 0.5, "val_top5": 0.9, "val_nll": 1.0,
              "val_ece": 0.1, "train_kd_ratio": 0.1, "lr": 0.1, "images_per_s": 1.0}  # fmt: skip
    seconds = []
    for epoch in range(1, 1001):
        began = time.perf_counter()
        callback.on_trial_result(0, [], t, {**result, "epoch": epoch})
        seconds.append(time.perf_counter() - began)
    callback.on_trial_complete(0, [], t)
    assert statistics.median(seconds) < 2e-3
    assert len(read(tmp_path).Scalars("t0000-lsr", "val/acc")) == 1000


# --- tfkd tensorboard


def test_several_experiments_stand_side_by_side_with_the_columns_of_all(
    tmp_path: Path, space: Space
) -> None:
    other = build_space(
        {
            "objective": "kd",
            "teacher": {"model": "mlp"},
            "optim": {"lr": {"low": 0.01, "high": 0.1, "log": True}},
        }
    )
    experiments = {"a b": tmp_path / "a b", "ü": tmp_path / "ü"}
    for (name, folder), its in zip(experiments.items(), (space, other), strict=True):
        write_experiment(folder, its.tree, ["tfkd"])
        callback = TensorBoard(folder / "tb", its)
        callback.setup()
        run(callback, trial(folder, 0, "ce" if name == "a b" else "kd", **{"optim.lr": 0.1}), [0.5])
    board = tmp_path / "board"
    board.mkdir()
    side_by_side(board, experiments)
    run(TensorBoard(tmp_path / "ü" / "tb", other), trial(tmp_path, 1, "kd"), [0.5])
    side_by_side(board, experiments)  # a trial is new
    assert len(list(board.glob("about/events.*"))) == 1
    events = read(board)
    assert set(events.Runs()) == {"about", "a b/t0000-ce", "ü/t0000-kd", "ü/t0001-kd"}
    data = events.SummaryMetadata("about", metadata.EXPERIMENT_TAG).plugin_data.content
    columns = {
        h.name: h
        for h in plugin_data_pb2.HParamsPluginData.FromString(data).experiment.hparam_infos
    }
    assert set(columns) == {"objective", "lr", "alpha", "student"}
    assert not columns["lr"].HasField("domain_interval")  # two ranges
    groups = {
        plugin_data_pb2.HParamsPluginData.FromString(
            events.SummaryMetadata(name, metadata.SESSION_START_INFO_TAG).plugin_data.content
        ).session_start_info.group_name
        for name in ("a b/t0000-ce", "ü/t0000-kd")
    }
    assert groups == {""}, "each trial is a group, and has the name of its run"
    text = content(events, "about", "experiment").decode()
    assert "**a b**" in text and "**ü**" in text


@pytest.mark.parametrize(
    "others", [{"choices": [0.1, "auto"]}, {"choices": ["auto", "b"]}, {"choices": [True, False]}]
)
@pytest.mark.parametrize("ours", [{"choices": [0.1, 0.2]}, {"low": 0.1, "high": 0.9}])
def test_a_column_that_is_text_in_one_experiment_and_numbers_in_another_hides_no_run(
    ours: Any, others: Any
) -> None:
    columns = []
    for given in (ours, others):
        student = {"name": "own", "path": "anything:net", "args": {"width": given}}
        with only_reading():
            columns += _hparam_columns(build_space({"objective": "ce", "student": student}))
    for first, second in (columns, columns[::-1]):
        common = _joined_column(first, second)
        values = [*common.domain_discrete.values]
        if "choices" not in ours:
            assert common.type == api_pb2.DATA_TYPE_UNSET and not values
            continue
        assert common.type == api_pb2.DATA_TYPE_STRING
        for column in columns:
            assert all(value in values for value in column.domain_discrete.values)
        third = _column(common.name, Choices(("auto", "c")))
        assert len(_joined_column(common, third).domain_discrete.values) > len(
            third.domain_discrete.values
        )


def test_every_change_of_tensorboards_pages_has_its_place() -> None:
    pages, missing = adapted_assets()
    assert missing == 0, f"this TensorBoard is not the one that is adapted: {missing} of {CHANGES}"
    with zipfile.ZipFile(io.BytesIO(pages)) as ours:
        script = ours.read("index.js").decode()
    assert '_sessionGroupHParam(item, "status")' in script and 'width="10em" resizable' in script


def test_it_opens_with_runs_in_the_colours_of_their_objectives() -> None:
    answers: list[Any] = []

    def theirs(environ: dict[str, Any], start: Any) -> list[bytes]:
        return [b"theirs"]

    app = opening(theirs, "val/acc")
    assert list(app({"PATH_INFO": "/"}, lambda *answer: answers.append(answer))) == []
    ((status, [(name, place)]),) = answers
    assert (status, name) == ("302 Found", "Location")
    asked = parse_qs(urlsplit(place).query)
    assert (
        asked["runColorGroup"] == [f"regex:{BY_OBJECTIVE}"] and "val/acc" in asked["pinnedCards"][0]
    )
    for environ in ({"PATH_INFO": "/", "QUERY_STRING": "x=1"}, {"PATH_INFO": "/data/runs"}):
        assert list(app(environ, None)) == [b"theirs"]  # type: ignore[arg-type]
    found = {
        run: m.group(1)
        for run in ("t0001-tfkd_reg", "A/t0012-ce", "arms/reg-x", "reg-x-s1001", "A/arms/ce")
        if (m := re.search(BY_OBJECTIVE, run))
    }
    assert found == {
        "t0001-tfkd_reg": "tfkd_reg", "A/t0012-ce": "ce", "arms/reg-x": "reg-x", "reg-x-s1001": "reg-x", "A/arms/ce": "ce",
    }  # fmt: skip


def test_the_five_steps_fit_a_terminal() -> None:
    assert max(map(len, _HOW_TO_COMPARE.splitlines())) <= 80
    assert [line[0] for line in _HOW_TO_COMPARE.splitlines() if line[1:3] == ". "] == list("12345")


def test_a_port_that_is_taken_is_named_with_the_next_free_one(
    tmp_path: Path, space: Space, tfkd: Run
) -> None:
    write_experiment(tmp_path / "e", space.tree, ["tfkd"])
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = tfkd("tensorboard", "e", "--port", str(port))
    assert done.returncode == 2 and f"{port} cannot be used (Address already in use)" in done.stderr
    assert "the next free one: --port " in done.stderr and "Traceback" not in done.stderr
    done = tfkd("tensorboard", "e", "--port", "70000")
    assert done.returncode == 2 and "ports end at 65535" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "number", long_after(0, [signal.SIGINT, signal.SIGTERM]), ids=lambda s: s.name
)
def test_ctrl_c_ends_it_cleanly(tmp_path: Path, space: Space, number: int) -> None:
    for name in "ef":
        write_experiment(tmp_path / name, space.tree, ["tfkd"])
    command = [sys.executable, "-m", "tfkd_ray", "tensorboard", "e", "f", "--port", "0"]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        assert server.stderr.readline().startswith("TensorBoard: http://127.0.0.1:")
        server.send_signal(number)
        said = server.stderr.read()
    assert (server.returncode, said.strip()) == (0, _HOW_TO_COMPARE)


# --- in a Tuner of one's own


@pytest.mark.ray
@pytest.mark.slow
def test_it_works_in_any_tuner_with_any_trainable(ray_cluster: str, tmp_path: Path) -> None:
    from ray import tune

    def trainable(config: dict[str, Any]) -> None:
        for step in (1, 2):
            tune.report({"loss": config["lr"] / step})
        if config["lr"] > 0.15:
            raise ValueError("too large")

    tuner = tune.Tuner(
        trainable,
        param_space={"lr": tune.grid_search([0.1, 0.2]), "objective": "mse", "layers": [3, 4]},
        run_config=tune.RunConfig(
            name="own",
            storage_path=str(tmp_path),
            verbose=0,
            callbacks=[TensorBoard(tmp_path / "tb", metric="loss")],
        ),
    )
    assert tuner.fit().num_errors == 1
    events = read(tmp_path / "tb")
    found = {}
    for name in events.Runs():
        start, end = (
            plugin_data_pb2.HParamsPluginData.FromString(
                events.SummaryMetadata(name, tag).plugin_data.content
            )
            for tag in (metadata.SESSION_START_INFO_TAG, metadata.SESSION_END_INFO_TAG)
        )
        scalars = events.Scalars(name, "hp/value")
        lr = start.session_start_info.hparams["lr"].number_value
        found[lr] = (
            [s.step for s in scalars],
            round(scalars[-1].value, 6),
            end.session_end_info.status,
        )
    assert found == {0.1: ([1, 2], 0.05, 1), 0.2: ([1, 2], 0.1, 2)}


class PlainTrial(FakeTrial):
    """A trial that another searcher proposed."""

    def __str__(self) -> str:
        return self.trial_id


@pytest.mark.parametrize("key", [3, "name", None, {"name": "x"}, {"directory": "/x"}, [1]])
def test_a_users_own_key_that_is_called_trial_is_theirs(tmp_path: Path, key: Any) -> None:
    t = PlainTrial("mine", {"trial": key, "objective": np.zeros(2), "lr": 0.1})
    run(TensorBoard(tmp_path), t, [0.5, 0.6])
    assert [s.value for s in read(tmp_path).Scalars("mine", "val/acc")] == pytest.approx([0.5, 0.6])


def test_step_zero_and_metrics_of_ones_own_are_written_and_what_is_rays_is_not(
    tmp_path: Path,
) -> None:
    callback, t = TensorBoard(tmp_path, metric="loss"), PlainTrial("mine", {"lr": np.float32(0.5)})
    t.evaluated_params = {"lr": np.float32(0.5)}
    callback.on_trial_start(0, [], t)
    rays = {
        "pid": 3,
        "timestamp": 9,
        "time_total_s": 1.0,
        "done": False,
        "config": {"lr": 1},
        "iterations_since_restore": 1,
    }
    for epoch in range(3):
        told = {
            "loss": np.float32(1.5),
            "deep": {"er": np.array(2.0)},
            "words": "x",
            "lr": np.int64(4),
        }
        callback.on_trial_result(
            0, [], t, {**rays, **told, "epoch": np.int64(epoch), "training_iteration": epoch + 1}
        )
    callback.on_trial_complete(0, [], t)
    events = read(tmp_path)
    assert set(events.Runs()["mine"]["scalars"]) == {
        "loss",
        "deep/er",
        "opt/lr",
        "hp/value",
    }
    for tag, value in {"loss": 1.5, "deep/er": 2.0, "opt/lr": 4.0, "hp/value": 1.5}.items():
        assert [(s.step, s.value) for s in events.Scalars("mine", tag)] == [
            (0, value),
            (1, value),
            (2, value),
        ]
    about = events.SummaryMetadata("mine", metadata.SESSION_START_INFO_TAG).plugin_data.content
    start = plugin_data_pb2.HParamsPluginData.FromString(about).session_start_info
    assert start.hparams["lr"].number_value == 0.5


@pytest.mark.parametrize("again", [1, 3])
def test_a_result_before_its_start_is_kept_and_a_plain_trial_goes_on_where_its_results_do(
    tmp_path: Path, again: int
) -> None:
    callback, t = TensorBoard(tmp_path, metric="loss"), PlainTrial("mine", {})
    for step in (1, 2, 3):
        callback.on_trial_result(0, [], t, {"loss": step, "training_iteration": step})
    callback.on_trial_start(
        0, [], t
    )  # its process was lost; it resumes from a checkpoint, or starts again
    for step in range(again, 5):
        callback.on_trial_result(0, [], t, {"loss": 10 * step, "training_iteration": step})
    callback.on_trial_complete(0, [], t)
    found = [(s.step, s.value) for s in read(tmp_path).Scalars("mine", "loss")]
    assert found == [*((s, s) for s in range(1, again)), *((s, 10 * s) for s in range(again, 5))]
