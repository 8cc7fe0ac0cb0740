"""The first points of a search: those that a file names in `search.points`, and what they leave open.

A point is a part of a configuration of one objective: `{objective: kd, optim.lr: 0.05}`, or nested,
`{objective: {name: kd, temperature: 4}, optim: {lr: 0.05}}`. Its names are those that `tfkd check`
lists.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from tfkd_ray.learn.config import TrainConfig
from tfkd_ray.learn.optimizers import OptimConfig
from tfkd_ray.settings import own_code
from tfkd_ray.settings.errors import ConfigError, did_you_mean, some_of
from tfkd_ray.settings.schema import name_alone
from tfkd_ray.settings.yaml import Tree, Values, in_yaml
from tfkd_ray.space.ranges import Choices, Domain, Path_, name_of


class _Searchable(Protocol):
    """The part of a `Branch` that a point needs."""

    @property
    def objective(self) -> str: ...
    @property
    def tree(self) -> Tree: ...
    @property
    def parameters(self) -> Sequence[Any]: ...
    def asked(self, values: Values) -> Iterator[Any]: ...
    def config(self, values: Values) -> TrainConfig: ...


@dataclass(frozen=True)
class OwnPoint:
    """A point of a file, completed to a whole trial of one objective."""

    objective: str
    values: Tree
    """Values by parameter name."""
    origin: str
    """`search.points.2`: its place in the file, counted from 1."""


PAPER_VALUES: dict[Path_, Any] = {("optim", k): v for k, v in OptimConfig().model_dump().items()}
"""The paper's recipe, which is also our default."""


def completed(branch: _Searchable, given: Values) -> Tree:
    """Return values for a branch's parameters: given ones, else the paper's or the middle."""
    values: Tree = {}
    for p in branch.asked(values):
        usual = PAPER_VALUES.get(p.path) if _is_sgd(branch, values) else None
        if p.name in given:
            values[p.name] = given[p.name]
        elif usual is not None and p.domain.contains(usual):
            values[p.name] = usual
        else:
            values[p.name] = p.domain.middle
    return values


def _is_sgd(branch: _Searchable, values: Values) -> bool:
    """Return whether a configuration with these values has the optimizer of the paper."""
    given = values.get("optim", branch.tree.get("optim"))
    return name_of(given) in (None, "sgd")


def own_points(
    branches: Sequence[_Searchable], points: Sequence[Values]
) -> tuple[list[OwnPoint], list[str]]:
    """Return (the points that are valid, a sentence on each problem of the others)."""
    found: list[OwnPoint] = []
    problems: list[str] = []
    for number, point in enumerate(points, start=1):
        origin = f"search.points.{number}"
        try:
            branch, values = _placed_point(branches, point)
        except ConfigError as error:
            problems += [f"{origin}.{problem}" for problem in error.problems]
            continue
        twins = [p for p in found if (p.objective, p.values) == (branch.objective, values)]
        if twins:
            problems.append(f"{origin}: is the same trial as {twins[0].origin}; leave one out")
        else:
            found.append(OwnPoint(branch.objective, values, origin))
    return found, problems


def _placed_point(branches: Sequence[_Searchable], point: Values) -> tuple[_Searchable, Tree]:
    """Return (branch, values of its parameters) of a point; raise a ConfigError otherwise."""
    branch = _branch_named(branches, point.get("objective"))
    given, problems = _values_by_name(branch, point)
    if problems:
        raise ConfigError(problems)
    values = completed(branch, given)
    for name in given:
        if name not in values:
            problems.append(
                f"{name}: is searched only with another item of choices; name that item too, or leave this out"
            )
    try:
        branch.config(values)
    except ConfigError as error:
        problems += error.problems
    if problems:
        raise ConfigError(problems)
    return branch, values


def _branch_named(branches: Sequence[_Searchable], objective: Any) -> _Searchable:
    """Return the branch of the objective that a point names."""
    known = [branch.objective for branch in branches]
    if objective is None:
        if len(branches) > 1:
            raise ConfigError(
                f"objective: each point is a trial of one objective, and none is named; one of {some_of(known)}"
            )
        return branches[0]
    name = objective if objective in known else own_code.shown_name(objective)
    if name not in known:
        raise ConfigError(
            f"objective: {in_yaml(objective)} is none of this file; {did_you_mean(str(name), known)}"
        )
    return branches[known.index(name)]


def _values_by_name(branch: _Searchable, point: Values) -> tuple[Tree, list[str]]:
    """Return (the values that a point names, by parameter name; a sentence on each problem)."""
    domains = {p.name: p.domain for p in branch.parameters}
    given: Tree = {}
    problems = []
    for name, value in _named_in(point, branch.objective, set(domains)):
        if name not in domains:
            problems.append(f"{name}: {_no_parameter(branch, name, domains)}")
            continue
        item = _as_listed(domains[name], value)
        if not domains[name].contains(item):
            problems.append(f"{name}: {in_yaml(value)} is not in the space, {domains[name]}")
        elif name in given:
            problems.append(f"{name}: is given twice; leave one out")
        given[name] = item
    return given, problems


def _named_in(
    given: Values, objective: str, names: set[str], above: Path_ = ()
) -> Iterator[tuple[str, Any]]:
    """Yield (parameter name, value) of a point, nested or not; `objective` names no value."""
    for key, value in given.items():
        path = (*above, str(key))
        if path == ("objective",):
            below = value if isinstance(value, Mapping) else {}
            inside = {k: v for k, v in below.items() if k not in ("name", "path")}
            yield from _named_in(inside, objective, names, (*path, objective))
        elif ".".join(path) not in names and isinstance(value, Mapping) and value:
            yield from _named_in(value, objective, names, path)
        else:
            yield ".".join(path), value


def _no_parameter(branch: _Searchable, name: str, names: Values) -> str:
    """Return the end of a sentence on a name that is no parameter of a branch."""
    if not names:
        return f"nothing is searched for {branch.objective}; leave it out"
    return f"is no searched setting of {branch.objective}; {did_you_mean(name, names)}"


def _as_listed(domain: Domain, value: Any) -> Any:
    """Return an item of choices as the space lists it, `mlp` or `{name: mlp}`."""
    if isinstance(domain, Choices) and value not in domain.values:
        same = [item for item in domain.values if name_alone(item) == name_alone(value)]
        return same[0] if same else value
    return value
