"""The first points of a file: which trial each is, and what is said of those that are none."""

from pathlib import Path
from typing import Any

import pytest

from tfkd_ray.run.searcher import OptunaSearcher
from tfkd_ray.settings.errors import ConfigError
from tfkd_ray.settings.yaml import dump_yaml
from tfkd_ray.space.arms import baseline_space
from tfkd_ray.space.relate import warm_points
from tfkd_ray.space.space import Space, build_space, load_space
from tfkd_ray.store.experiment import write_experiment

LSR = {"name": "lsr", "alpha": {"low": 0.02, "high": 0.4, "log": True}}
DEEP = {"choices": ["mlp", {"name": "mlp", "dropout": {"low": 0.1, "high": 0.5}}]}


def tree_of(points: Any, **search: Any) -> dict[str, Any]:
    return {
        "student": DEEP,
        "epochs": 9,
        "objective": ["ce", LSR],
        "optim": {
            "lr": {"low": 0.01, "high": 1, "log": True},
            "weight_decay": {"low": 1e-5, "high": 1e-2, "log": True},
        },
        "search": {"num_samples": 8, "points": points, **search},
    }


def space(points: Any, **search: Any) -> Space:
    return build_space(tree_of(points, **search))


def proposed(s: Space, journal: Path, count: int) -> list[dict[str, Any]]:
    """Return the first configurations of a search."""
    searcher = OptunaSearcher(s, journal)
    return [dict(searcher.suggest(f"id{k}")) for k in range(count)]  # type: ignore[arg-type]


def test_points_are_the_first_trials_of_their_objective_and_count_as_trials(tmp_path: Path) -> None:
    s = space(
        [
            {"objective": "lsr", "optim.lr": 0.3, "objective.lsr.alpha": 0.1},
            {"objective": {"name": "lsr", "alpha": 0.2}, "optim": {"lr": 0.05}},
            {"objective": "ce", "optim.lr": 0.02},
        ]
    )
    found = proposed(s, tmp_path / "journal", 8)
    lsr = [c for c in found if c["objective"]["name"] == "lsr"]
    ce = [c for c in found if c["objective"]["name"] == "ce"]
    assert (lsr[0]["optim"]["lr"], lsr[0]["objective"]["alpha"]) == (0.3, 0.1)
    assert (lsr[1]["optim"]["lr"], lsr[1]["objective"]["alpha"]) == (0.05, 0.2)
    assert ce[0]["optim"]["lr"] == 0.02
    assert lsr[0]["optim"]["weight_decay"] == 5e-4  # left open: the paper's
    assert (len(lsr), len(ce)) == (4, 4)
    assert OptunaSearcher(s, tmp_path / "journal").suggest("more") != "FINISHED"  # unfinished ones


def test_a_search_that_begins_again_goes_on_with_the_next_point(tmp_path: Path) -> None:
    points = [{"objective": "ce", "optim.lr": lr} for lr in (0.1, 0.2, 0.3)]
    s = space(points, num_samples=12)
    whole = proposed(s, tmp_path / "whole", 8)
    proposed(s, tmp_path / "cut", 3)
    again = OptunaSearcher(s, tmp_path / "cut")
    rest = [again.suggest(f"again{k}") for k in range(8)]
    assert [c["optim"] for c in whole] == [c["optim"] for c in rest]  # type: ignore[index]


def test_a_point_of_an_item_of_choices_names_the_item_and_its_settings() -> None:
    (first,) = warm_points(
        space([{"objective": "ce", "student": "mlp", "optim.lr": 0.1}], warm_start=False)
    )
    assert first.values["student"] == {"name": "mlp"} or first.values["student"] == "mlp"


def test_published_settings_come_after_the_points_of_the_file_and_none_is_tried_twice() -> None:
    def origins(points: list[dict[str, Any]]) -> list[str]:
        s = space(points, num_samples=40)
        return [p.origin for p in warm_points(s) if p.objective == "lsr"]

    published = origins([])
    assert published
    assert origins([{"objective": "lsr", "optim.lr": 0.3}]) == ["search.points.1", *published]
    first = next(p for p in warm_points(space([], num_samples=40)) if p.objective == "lsr")
    same = {"objective": "lsr", **first.values}
    assert origins([same]) == ["search.points.1", *published[1:]]


@pytest.mark.parametrize(
    "points, sentence",
    [
        ({"optim.lr": 0.1}, "search.points: a list of settings, [{optim.lr: 0.1}, ...], got {'optim.lr': 0.1}"),
        ([3], "search.points: number 1 needs settings (key: value), got 3"),
        ([{"objective": "ce"}, {}], "search.points: number 2 needs settings (key: value), got {}"),
        ([{"optim.lr": 0.1}], "search.points.1.objective: each point is a trial of one objective, and none is named; one of ce, lsr"),
        ([{"objective": "kd"}], "search.points.1.objective: kd is none of this file; known: ce, lsr"),
        ([{"objective": ["ce", "lsr"]}], "search.points.1.objective: [ce, lsr] is none of this file"),
        ([{"objective": "ce"}, {"objective": "ce", "optim.lr": 2}], "search.points.2.optim.lr: 2 is not in the space, 0.01 to 1 (log)"),
        ([{"objective": "ce", "optim": {"lrr": 0.1}}], "search.points.1.optim.lrr: is no searched setting of ce; did you mean 'optim.lr'?"),
        ([{"objective": "ce", "epochs": 9}], "search.points.1.epochs: is no searched setting of ce; known: optim.lr"),
        ([{"objective": "ce", "objective.lsr.alpha": 0.1}], "search.points.1.objective.lsr.alpha: is no searched setting of ce"),
        ([{"objective": {"name": "lsr", "alpha": 0.9}}], "search.points.1.objective.lsr.alpha: 0.9 is not in the space"),
        ([{"objective": "ce", "optim.lr": 0.1, "optim": {"lr": 0.2}}], "search.points.1.optim.lr: is given twice"),
        ([{"objective": "ce", "optim.lr": "fast"}], "search.points.1.optim.lr: fast is not in the space"),
        ([{"objective": "ce", "optim.lr": None}], "search.points.1.optim.lr: null is not in the space"),
        ([{"objective": "ce", "student": "cnn"}], "search.points.1.student: cnn is not in the space"),
        ([{"objective": "ce", "student": "mlp", "student.2.dropout": 0.2}], "search.points.1.student."),
        ([{"objective": "ce", "optim.lr": 0.1}, {"objective": "ce", "optim": {"lr": 0.1}}], "search.points.2: is the same trial as search.points.1; leave one out"),
        ([{"objective": "ce", "optim.lr": x / 100} for x in range(1, 6)], "search.points: 5 of ce, and its share is 4 trials; raise num_samples, or leave some out"),
    ],
)  # fmt: skip
def test_a_point_that_is_no_trial_of_the_space_is_a_sentence_with_its_place(
    points: Any, sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as error:
        space(points)
    assert any(p.startswith(sentence) for p in error.value.problems), str(error.value)
    file = tmp_path / "mine.yaml"
    file.write_text(dump_yaml(tree_of(points)))
    with pytest.raises(ConfigError, match=r"mine\.yaml"):
        load_space(file)


def test_a_grid_has_no_first_points() -> None:
    lr = {"choices": [0.1, 0.2]}
    tree = {"objective": "ce", "optim": {"lr": lr}, "search": {"sampler": "grid"}}
    tree["search"]["points"] = [{"optim.lr": 0.2}]  # type: ignore[index]
    with pytest.raises(ConfigError, match=r"search\.points: a grid is every combination once"):
        build_space(tree)


def test_baselines_that_are_tuned_later_have_no_points_of_other_objectives(tmp_path: Path) -> None:
    tree = tree_of([{"objective": "lsr", "optim.lr": 0.1}])
    write_experiment(tmp_path, build_space(tree).tree, ["tfkd"])
    assert baseline_space(tmp_path, ["ce"], 4).search.points == ()
