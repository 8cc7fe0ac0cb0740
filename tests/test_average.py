"""The average of the weights: its definition, and that it is the student wherever one is kept."""

from pathlib import Path
from typing import Any

import pytest
import torch
from test_loop import same
from test_optimizers import SMALL, config

from tfkd_ray.learn.average import Average, Ema
from tfkd_ray.learn.checkpoint import WEIGHTS, load_weights
from tfkd_ray.learn.evaluate import evaluate
from tfkd_ray.learn.loop import train, train_in
from tfkd_ray.settings.errors import ConfigError
from tfkd_ray.space.space import build_space
from tfkd_ray.verdict.scores import OF_AVERAGE, SCORES, of_student

CNN = {"student": {"name": "cnn", "widths": [4]}, "optim": {"batch_size": 40}}


def test_the_average_is_that_of_a_slow_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of parameters and batch statistics; whole numbers are copied."""
    run = config(**CNN, ema={"decay": 0.6})
    seen: list[dict[str, torch.Tensor]] = []
    plain = Average.update

    def noted(self: Average, update: int) -> None:
        assert update == len(seen) + 1
        seen.append({k: v.clone() for k, v in self._student.state_dict().items()})
        plain(self, update)

    monkeypatch.setattr(Average, "update", noted)
    state = list(train(run))[-1].state()
    expected = {k: v.double() for k, v in run.build_student().state_dict().items()}
    for n, weights in enumerate(seen, start=1):
        kept = min(0.6, (1 + n) / (10 + n))
        for name, value in weights.items():
            old = expected[name] if value.is_floating_point() else 0.0
            share = kept if value.is_floating_point() else 0.0
            expected[name] = share * old + (1 - share) * value.double()
    assert len(seen) == 8, "2 epochs of 160 images in batches of 40"
    for name, value in state["model"].items():
        assert torch.allclose(value.double(), expected[name], atol=1e-6), name
    assert same(state["trained"], seen[-1])


def test_training_is_the_same_with_an_average_beside_it() -> None:
    without, beside = (list(train(config(**CNN, ema=ema))) for ema in (None, {"decay": 0.9}))
    assert same(without[-1].state()["model"], beside[-1].state()["trained"])
    for a, b in zip(without, beside, strict=True):
        assert set(b.metrics) - set(a.metrics) == {*OF_AVERAGE}
        assert a.metrics["val_nll"] == b.metrics["val_nll"] != b.metrics["val_ema_nll"]


def test_a_decay_of_zero_is_no_average() -> None:
    last = list(train(config(**CNN, ema={"decay": 0})))[-1]
    assert same(last.state()["model"], last.state()["trained"])
    for key in OF_AVERAGE:
        assert last.metrics[key] == last.metrics[of_student(key)]


def test_the_averaged_weights_are_the_student_that_is_kept(tmp_path: Path) -> None:
    run = config(**CNN, ema={"decay": 0.9})
    last = list(train_in(tmp_path, run))[-1]
    student = run.build_student()
    student.load_state_dict(load_weights(tmp_path / WEIGHTS))
    val_set = run.data.load()[1]
    assert val_set is not None
    found = evaluate(student, run.data, val_set)
    for key in OF_AVERAGE:
        assert found[of_student(key)] == pytest.approx(last[key], abs=1e-6)
    assert found["val_nll"] != pytest.approx(last["val_nll"], abs=1e-3)


def test_a_teacher_has_no_average() -> None:
    run = config(objective="tfkd_self", ema={})
    assert run.ema == Ema() and run.teacher_runs()[0].ema is None


def test_early_updates_forget_the_first_weights() -> None:
    ema = Ema(decay=0.999)
    assert [ema.at(n) for n in (1, 90)] == [2 / 11, 0.91]
    assert ema.at(10**6) == 0.999


# --- in a space

SPACE: dict[str, Any] = {**SMALL, "optim": {"lr": {"low": 0.01, "high": 0.1}}}
DECAYS = {"decay": {"choices": [0, 0.9]}}


def test_a_search_with_averages_judges_by_them() -> None:
    space = build_space(SPACE | {"ema": DECAYS})
    assert space.search.metric == "val_ema_accuracy"
    assert any("search.metric: val_ema_accuracy, as the averaged" in note for note in space.notes)
    assert build_space(space.tree).search == space.search
    told = build_space(SPACE | {"ema": {}, "search": {"metric": "val_nll"}})
    assert told.search.metric == "val_nll"
    assert any("the student is their average: val_ema_nll" in note for note in told.notes)
    assert build_space(SPACE).search.metric == "val_accuracy"
    mixed = build_space(SPACE | {"ema": {"choices": [None, {"decay": 0.9}]}})
    assert mixed.search.metric == "val_accuracy"


@pytest.mark.parametrize("ema", [None, {"choices": [None, {"decay": 0.9}]}])
def test_a_metric_of_averages_needs_them_in_all_trials(ema: Any) -> None:
    with pytest.raises(
        ConfigError, match=r"search.metric: val_ema_nll is of averaged weights, and"
    ):
        build_space(SPACE | {"ema": ema, "search": {"metric": "val_ema_nll"}})


def test_every_metric_of_averages_has_the_row_of_its_twin() -> None:
    assert {"val_ema_accuracy", "val_ema_nll"} <= {*OF_AVERAGE}
    for key in OF_AVERAGE:
        row, twin = SCORES[key], SCORES[of_student(key)]
        assert (row.direction, row.unit, row.margin) == (twin.direction, twin.unit, twin.margin)
        assert row.guess(7) == twin.guess(7) and row.tag
        assert of_student(twin.key) == twin.key
