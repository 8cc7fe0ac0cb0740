"""A space compared with published settings, another space, or another sweep's configuration."""

import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from tfkd_ray.learn.config import RUN_ONLY, TrainConfig
from tfkd_ray.learn.dataset import Dataset
from tfkd_ray.learn.objectives import PUBLISHED, Canonical
from tfkd_ray.learn.optimizers import WHOLE
from tfkd_ray.settings.errors import ConfigError, Sentences
from tfkd_ray.settings.schema import tag
from tfkd_ray.settings.yaml import Tree, Values, leaves_of, value_at
from tfkd_ray.space.points import completed, own_points
from tfkd_ray.space.ranges import Choices, Path_, Range
from tfkd_ray.space.search_config import Grid
from tfkd_ray.space.space import Branch, BranchGroup, Parameter, Space, public_path, share_of
from tfkd_ray.store.experiment import as_number
from tfkd_ray.verdict.limits import limits_text


def is_number(value: Any) -> TypeGuard[float]:
    """Return whether a value is a finite number."""
    number = as_number(value)
    return number is not None and math.isfinite(number)


def branch_of(group: BranchGroup, objective: str) -> Any:
    """Return the branch of a group with this objective."""
    return next(b for b in group.branches if b.objective == objective)


def as_asked(group: BranchGroup, objective: str, values: Values) -> tuple[Tree, Tree]:
    """Return (parameters, distributions) of a study's trial with these values."""
    import optuna  # imported here: commands that only read a space do without

    fixed = optuna.trial.FixedTrial(group.told(branch_of(group, objective), values))
    group.values(fixed)
    return fixed.params, fixed.distributions


@dataclass(frozen=True)
class WarmPoint:
    """A first trial of a search: a point of its file, or a published setting mapped into its space."""

    objective: str
    values: Tree
    """Values by parameter name."""
    origin: str


def warm_points(space: Space) -> list[WarmPoint]:
    """Return the first trials of a sweep, each group's in their order.

    The points of the file come first (see `points`), then published settings. Of these, one is
    skipped if a value of its objective lies outside of the space or differs from a fixed one.
    Parameters that it does not mention take the paper's value (the defaults of `OptimConfig`) if
    that lies inside, else the middle of their range.
    """
    points = []
    for group in space.groups:
        points += group_points(space, group)
    return points


def group_points(space: Space, group: BranchGroup) -> list[WarmPoint]:
    """Return a group's `warm_points`.

    Published settings: objectives in turn, one for each objective, and at most a quarter of the
    trials if that is more.
    """
    named, _ = own_points(space.branches, space.search.points)
    here = {branch.objective for branch in group.branches}
    own = [WarmPoint(p.objective, p.values, p.origin) for p in named if p.objective in here]
    if not space.search.warm_start or isinstance(space.sampler, Grid):
        return own
    in_turn: list[WarmPoint] = []
    for row in itertools.zip_longest(*map(_published, group.branches)):
        in_turn += [point for point in row if point is not None]
    share, known = share_of(space), [(p.objective, p.values) for p in own]
    most = max(len(group.branches), share // 4)
    new = [p for p in in_turn[:most] if (p.objective, p.values) not in known]
    return [*own, *new][:share]


def _published(branch: Branch) -> Iterator[WarmPoint]:
    """Yield the published settings of a branch's objective that lie in its space, each once."""
    seen: list[Tree] = []
    for setting in PUBLISHED:
        if tag(type(setting.objective)) != branch.objective:
            continue
        values = _values_for(branch, setting.objective)
        asked = list(branch.asked(values))
        inside = all(p.domain.contains(values[p.name]) for p in asked)
        if values in seen or not inside:
            continue
        try:
            config = branch.config(values)
        except ConfigError:  # each part is allowed, but not the combination
            continue
        if config.objective == setting.objective:
            seen.append(values)
            yield WarmPoint(branch.objective, values, setting.origin)


def _values_for(branch: Branch, objective: Canonical) -> Tree:
    """Return values for a branch's parameters: the objective's, else the paper's or the middle."""
    own = [p for p in branch.parameters if p.path[0] == "objective"]
    return completed(branch, {p.name: getattr(objective, p.path[1]) for p in own})


def not_superset(old: Space, new: Space) -> list[str]:
    """Return a sentence for each reason why `new` does not contain every trial of `old`."""
    names = [branch.objective for branch in new.branches]
    missing = [
        f"objective: existing trials have {was.objective}, but the new space lacks it; add it"
        for was in old.branches
        if was.objective not in names
    ]
    return missing + _differing(old, new, SAME_BRANCH_RULES)


def not_comparable(old: Space, new: Space) -> list[str]:
    """Return a sentence for each reason why no trial of `old` can be compared with those of `new`.

    Ranges may be narrower, searched settings fixed, and objectives left out.
    """
    return _differing(old, new, SAME_TRIALS_RULES)


def _differing(
    old: Space, new: Space, rules: Sequence[Callable[[Branch, Branch], Sentences]]
) -> list[str]:
    problems = []
    branches = {branch.objective: branch for branch in new.branches}
    if old.search.split != new.search.split:
        problems.append("search.split: cannot change when a sweep is resumed")
    if old.search.metrics != new.search.metrics:
        problems.append(
            f"search.metric: was {', '.join(old.search.metrics)}, and trials were judged by it"
        )
    if old.search.limits != new.search.limits:
        problems.append(
            f"search.constraints: were {limits_text(old.search.limits) or 'none'}, and trials were judged by them"
        )
    for was in old.branches:
        if was.objective in branches:
            for rule in rules:
                problems += rule(was, branches[was.objective])
    return list(dict.fromkeys(problems))


# --- rules of two branches: the second must contain the trials of the first


def _ranges_are_as_wide(was: Branch, now: Branch) -> Sentences:
    """Reject a searched setting that became fixed or narrower."""
    after = _by_place(now)
    for place, p in _by_place(was).items():
        if place not in after:
            yield f"{p.name}: was searched ({p.domain}), and is fixed now; leave it searched"
        elif not after[place].domain.includes(p.domain):
            yield f"{p.name}: was {p.domain}, and {after[place].domain} does not hold all of it; widen it"


def _new_ranges_hold_old_values(was: Branch, now: Branch) -> Sentences:
    """Reject a new range that lacks the value that was fixed."""
    before = _by_place(was)
    for place, p in _by_place(now).items():
        if place in before or not _was_there(was, p):
            continue
        there = was.config(was.around(p)) if p.within else was.example
        value = value_at(there.model_dump(mode="json", context=WHOLE), p.path)
        if not p.domain.contains(value):
            yield f"{p.name}: was fixed at {value!r}, which {p.domain} does not hold"


def _was_there(was: Branch, p: Parameter) -> bool:
    """Return whether a branch has the item of choices that a parameter is within, if any."""
    if p.within is None:
        return True
    name, item = p.within
    domains = [q.domain for q in was.parameters if q.name == name]
    return bool(domains) and domains[0].contains(item)


def _fixed_values_are_the_same(was: Branch, now: Branch) -> Sentences:
    """Reject a fixed value that changed."""
    searched = {p.path for p in (*was.parameters, *now.parameters)}
    examples = [branch.example.model_dump(mode="json", context=WHOLE) for branch in (was, now)]
    for path, a, b in _differences(*examples):
        if not _is_below(path, searched):
            name = ".".join(public_path(path, was.objective))
            yield f"{name}: was {a!r}, and is {b!r} now"


SAME_TRIALS_RULES = (_new_ranges_hold_old_values, _fixed_values_are_the_same)
SAME_BRANCH_RULES = (_ranges_are_as_wide, *SAME_TRIALS_RULES)
"""Rules in the order in which their problems are reported, all of them at once."""


def _by_place(branch: Branch) -> dict[tuple[Path_, str], Parameter]:
    return {_place_of(p): p for p in branch.parameters}


def _is_below(path: Path_, above: Iterable[Path_]) -> bool:
    """Return whether a path begins with one of others."""
    return any(path[: len(start)] == start for start in above)


def _place_of(p: Parameter) -> tuple[Path_, str]:
    """Return the key of a parameter that is the same in spaces with other numbers of items."""
    item = None
    if p.within is not None:
        _, item = p.within
    return p.path, json.dumps(item, sort_keys=True)


DIGESTS = (("data", "digest"), ("data", "unlabelled_digest"))


def _differences(a: Tree, b: Tree) -> Iterator[tuple[Path_, Any, Any]]:
    """Yield (path, a, b) for each differing setting that affects numbers.

    For two different kinds of a thing, only their names.
    """
    left = dict(leaves_of(a))
    right = dict(leaves_of(b))
    for digest in DIGESTS:
        if None in (left.get(digest), right.get(digest)):
            left[digest] = right[digest] = None  # one began before there were any, or has not begun
    paths = [p for p in sorted({*left, *right}) if left.get(p) != right.get(p)]
    kinds = {p[:-1] for p in paths if p[-1] == "name"}
    for path in paths:
        top, last = path[0], path[-1]
        if last != "name" and _is_below(path[:-1], kinds):
            continue
        only_where = top in {"recipe", *RUN_ONLY} or (top == "data" and last in Dataset.places)
        if not only_where:
            yield path, left.get(path), right.get(path)


def lies_in(branch: Branch, parameters: Values) -> bool:
    """Return whether a trial's parameters, of this space or an earlier one, lie in a branch's ranges."""
    there: Tree = {}
    for p in branch.parameters:
        if not p.is_asked(there):
            continue
        if p.name not in parameters or not p.domain.contains(parameters[p.name]):
            return False
        there[p.name] = parameters[p.name]
    return True


def placed(space: Space, config: TrainConfig) -> tuple[BranchGroup, Tree] | list[str]:
    """Return (group, values by parameter name) of a configuration in this space.

    The configuration is another space's; its seed and run settings (`RUN_ONLY`) may differ. If it
    does not lie in this space, return the differences instead.
    """
    tree = config.model_dump(mode="json", context=WHOLE)
    name = config.objective.called
    for group in space.groups:
        for branch in group.branches:
            if branch.objective == name:
                found = _values_of(branch, tree)
                return found if isinstance(found, list) else (group, found)
    known = ", ".join(b.objective for b in space.branches)
    return [f"objective: {name} there, and not among {known}"]


def _values_of(branch: Branch, tree: Tree) -> Tree | list[str]:
    """Return the values of a branch's parameters in a configuration, or the differences."""
    values: Tree = {}
    different = []
    for p in branch.asked(values):
        value = value_at(tree, p.path)
        fits = p.domain.contains(value)
        # in a file, a choice may be a name or some of its settings
        if isinstance(p.domain, Choices):
            same = [c for c in p.domain.values if _is_item(branch, values, p, c, tree)]
            fits = bool(same)
            value = same[0] if same else value
        if not fits:
            different.append(f"{p.name}: {value!r} there, {p.domain} here")
        values[p.name] = value
    if different:
        return different
    try:
        here = branch.config(values).model_dump(mode="json", context=WHOLE)
    except ConfigError as error:
        return error.problems
    for path, a, b in _differences(tree, here):
        if path != ("seed",):
            name = ".".join(public_path(path, branch.objective))
            different.append(f"{name}: {a!r} there, {b!r} here")
    return different or values


def _is_item(branch: Branch, values: Tree, choices: Parameter, item: Any, tree: Tree) -> bool:
    """Return whether a configuration has this item: equal fixed values, searched ones in range."""
    inside = [p for p in branch.parameters if p.within == (choices.name, item)]
    for p in inside:
        if isinstance(p.domain, Range) and not p.domain.contains(value_at(tree, p.path)):
            return False
    others = branch.around(choices) | values | {choices.name: item}
    here = value_at(branch.config(others).model_dump(mode="json", context=WHOLE), choices.path)
    there = value_at(tree, choices.path)
    if not isinstance(here, dict) or not isinstance(there, dict):
        return bool(here == there)
    depth = len(choices.path)
    loose = [p.path[depth:] for p in inside]
    left = dict(leaves_of(here))
    right = dict(leaves_of(there))
    differ = [path for path in {*left, *right} if left.get(path) != right.get(path)]
    return all(_is_below(path, loose) for path in differ)
