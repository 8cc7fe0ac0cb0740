"""A space beside what it is not made of: published settings, another space, a configuration of another sweep."""

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tfkd_ray.config import RUN_ONLY, OptimConfig, TrainConfig
from tfkd_ray.data import Dataset
from tfkd_ray.objectives import PUBLISHED
from tfkd_ray.ranges import Choices, Path_, Tree
from tfkd_ray.schema import ConfigError, tag
from tfkd_ray.search_config import Grid
from tfkd_ray.space import Branch, Group, Parameter, Space, public_path


@dataclass(frozen=True)
class WarmPoint:
    """A published setting as it lies in a space."""

    objective: str
    values: Tree
    """By parameter name."""
    origin: str


def warm_points(space: Space) -> list[WarmPoint]:
    """What the sweep tries first, each group's in the order in which it tries them.

    A setting is left out where a value of its objective is outside of the space or fixed otherwise. What it does not
    speak of is as in the paper (the defaults of `OptimConfig`) if that is inside, else in the middle of its range.
    """
    return [point for group in space.groups for point in group_points(space, group)]


def group_points(space: Space, group: Group) -> list[WarmPoint]:
    """The first of `warm_points` of one group: objectives in turn, at most a quarter of the group's trials."""
    if not space.search.warm_start or isinstance(space.search.sampler, Grid):
        return []
    found = [list(_published(branch)) for branch in group.branches]
    in_turn = [point for row in itertools.zip_longest(*found) for point in row if point is not None]
    return in_turn[: space.search.num_samples // len(space.groups) // 4]


def _published(branch: Branch) -> Iterator[WarmPoint]:
    seen: list[Tree] = []
    for setting in PUBLISHED:
        if tag(type(setting.objective)) != branch.objective:
            continue
        values: Tree = {}
        for p in branch.asked(values):
            if p.path[0] == "objective":
                values[p.name] = getattr(setting.objective, p.path[1])
            else:
                usual = PAPER.get(p.path)
                values[p.name] = usual if usual is not None and p.domain.contains(usual) else p.domain.middle
        if values in seen or not all(p.domain.contains(values[p.name]) for p in branch.asked(values)):
            continue
        try:
            config = branch.config(values)
        except ConfigError:  # its parts are allowed, but not together
            continue
        if config.objective == setting.objective:
            seen.append(values)
            yield WarmPoint(branch.objective, values, setting.origin)


PAPER: dict[Path_, Any] = {("optim", name): value for name, value in OptimConfig().model_dump().items()}
"""The paper's recipe, which is also our default."""


def not_superset(old: Space, new: Space) -> list[str]:
    """Why the trials of one space would not all be trials of another: a sentence each; empty if they would."""
    problems = [
        f"objective: {b.objective} is in the trials that are there, and not in the new space; add it"
        for b in old.branches
        if b.objective not in {n.objective for n in new.branches}
    ]
    if old.search.split != new.search.split:
        problems.append("search.split: cannot change while a sweep goes on")
    if old.search.metrics != new.search.metrics:
        problems.append(f"search.metric: was {', '.join(old.search.metrics)}, and trials were judged by it")
    for was in old.branches:
        for now in (b for b in new.branches if b.objective == was.objective):
            problems += _narrower(was, now)
    return list(dict.fromkeys(problems))


def _narrower(was: Branch, now: Branch) -> Iterator[str]:
    """Where one branch's space is no part of another's."""
    before, after = ({_place(p): p for p in b.parameters} for b in (was, now))
    example = was.example.model_dump(mode="json")
    for place, p in before.items():
        if place not in after:
            yield f"{p.name}: was searched ({p.domain}), and is fixed now; leave it searched"
        elif not after[place].domain.includes(p.domain):
            yield f"{p.name}: was {p.domain}, and {after[place].domain} does not hold all of it; widen it"
    for place, p in after.items():
        choices = next((q.domain for q in before.values() if p.within and q.name == p.within[0]), None)
        if place in before or (p.within and not (choices and choices.contains(p.within[1]))):
            continue
        there = was.config(was.around(p)) if p.within else was.example
        value = value_at(there.model_dump(mode="json"), p.path)
        if not p.domain.contains(value):
            yield f"{p.name}: was fixed at {value!r}, which {p.domain} does not hold"
    searched = {p.path for p in (*before.values(), *after.values())}
    for path, a, b in _differences(example, now.example.model_dump(mode="json")):
        if not any(path[: len(s)] == s for s in searched):
            yield f"{'.'.join(public_path(path, was.objective))}: was {a!r}, and is {b!r} now"


def _place(p: Parameter) -> tuple[Path_, str]:
    """What makes a parameter the same in another space, where items of choices may be counted otherwise."""
    return p.path, json.dumps(p.within[1] if p.within else None, sort_keys=True)


DIGEST = ("data", "digest")


def _differences(a: Tree, b: Tree) -> Iterator[tuple[Path_, Any, Any]]:
    """Where two configurations differ in what makes their numbers; of two unlike kinds of a thing only the names."""
    left, right = dict(_leaves(a)), dict(_leaves(b))
    if None in (left.get(DIGEST), right.get(DIGEST)):  # one began before data had digests, or has not begun
        left[DIGEST] = right[DIGEST] = None
    paths = [p for p in sorted({*left, *right}) if left.get(p) != right.get(p)]
    kinds = {p[:-1] for p in paths if p[-1] == "name"}
    for path in paths:
        if path[-1] != "name" and any(path[:n] in kinds for n in range(1, len(path))):
            continue
        if path[0] not in {"recipe", *RUN_ONLY} and not (path[0] == "data" and path[-1] in Dataset.places):
            yield path, left.get(path), right.get(path)


def _leaves(tree: Any, path: Path_ = ()) -> Iterator[tuple[Path_, Any]]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _leaves(value, (*path, str(key)))
    else:
        yield path, tree


def value_at(tree: Any, path: Path_) -> Any:
    """What stands at a path of a tree; None where it ends before."""
    for part in path:
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree


def placed(space: Space, config: TrainConfig) -> tuple[Group, Tree] | list[str]:
    """(group, values by parameter name) of a configuration of another space in this one, or what is different.

    The seed, and where a run runs, may differ.
    """
    tree = config.model_dump(mode="json")
    for group in space.groups:
        for branch in group.branches:
            if branch.objective == config.objective.name:
                found = _values_of(branch, tree)
                return found if isinstance(found, list) else (group, found)
    return [f"objective: {config.objective.name} there, and not among {', '.join(b.objective for b in space.branches)}"]


def _values_of(branch: Branch, tree: Tree) -> Tree | list[str]:
    values: Tree = {}
    different = []
    for p in branch.asked(values):
        value = value_at(tree, p.path)
        if isinstance(p.domain, Choices):  # in a file, a choice may be a name or a part of its settings
            same = [c for c in p.domain.values if _is_item(branch, values, p, c, tree)]
            fits, value = bool(same), same[0] if same else value
        else:
            fits = p.domain.contains(value)
        if not fits:
            different.append(f"{p.name}: {value!r} there, {p.domain} here")
        values[p.name] = value
    if different:
        return different
    try:
        here = branch.config(values).model_dump(mode="json")
    except ConfigError as error:
        return error.problems
    for path, a, b in _differences(tree, here):
        if path != ("seed",):
            different.append(f"{'.'.join(public_path(path, branch.objective))}: {a!r} there, {b!r} here")
    return different or values


def _is_item(branch: Branch, values: Tree, choices: Parameter, item: Any, tree: Tree) -> bool:
    """Whether a configuration has this item of choices: what is fixed of it is alike, what is searched is inside."""
    inside = [p for p in branch.parameters if p.within == (choices.name, item)]
    if not all(isinstance(p.domain, Choices) or p.domain.contains(value_at(tree, p.path)) for p in inside):
        return False
    others = branch.around(choices) | values | {choices.name: item}
    here = value_at(branch.config(others).model_dump(mode="json"), choices.path)
    depth = len(choices.path)
    loose = [p.path[depth:] for p in inside]
    there = value_at(tree, choices.path)
    if not isinstance(here, dict) or not isinstance(there, dict):
        return bool(here == there)
    left, right = dict(_leaves(here)), dict(_leaves(there))
    return all(
        left.get(path) == right.get(path)
        for path in {*left, *right}
        if not any(path[: len(part)] == part for part in loose)
    )
