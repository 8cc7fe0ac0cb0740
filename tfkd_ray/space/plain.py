"""The space of a user's own trainable: their own dictionary, in which some values are searched.

`run.tune_space` makes it of Ray Tune's domains (`tune.uniform` and the like). Nothing here knows
what the settings mean: a trainable gets the dictionary as its user wrote it.
"""

import ast
import copy
import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from tfkd_ray.learn.optimizers import Count
from tfkd_ray.settings.errors import ConfigError, did_you_mean
from tfkd_ray.settings.schema import validated
from tfkd_ray.settings.yaml import Tree, Values
from tfkd_ray.space.ranges import Choices, Path_, Range
from tfkd_ray.space.search_config import ENDLESS, SearchConfig
from tfkd_ray.space.space import (
    SEARCH_RULES,
    Branch,
    Parameter,
    Searched,
    defaults_of_grid,
)

GROUP = "all"
"""Name of the only group; its study is called STUDY/all."""
SETTINGS = ("num_samples", "sampler", "stopping", "report", "storage", "study", "seed")
"""Search settings that mean something without `build_tuner`."""
_ELSEWHERE = {
    "metric": "the argument `metric`, or TuneConfig(metric=...), names it",
    "time_budget_s": "set TuneConfig(time_budget_s=...)",
    "max_concurrent": "set TuneConfig(max_concurrent_trials=...)",
    "points": "pass OptunaSearcher(..., points_to_evaluate=[...])",
    "max_failures": "set RunConfig(failure_config=...)",
}


class PlainSearch(SearchConfig):
    """Search settings of a plain dictionary: its metric is whatever the trainable reports."""

    num_samples: Count = ENDLESS
    """Number of trials; by default Tune decides when to ask for no more."""
    metric: str = ""
    """Name of the metric; empty until a Tuner says it."""
    direction: Literal["max", "min"] = "max"

    @property
    def mode(self) -> Literal["max", "min"]:
        """Return the direction in which the metric is better."""
        return self.direction

    @property
    def modes(self) -> tuple[Literal["max", "min"], ...]:
        """Return the direction of the only metric."""
        return (self.direction,)


@dataclass(frozen=True)
class PlainSpace(Searched):
    """A validated space of a plain dictionary.

    Its `tree` is what a study records: epochs, and the searched settings by name.
    """

    search: PlainSearch
    constants: bool = True
    """True if a proposal also holds the settings that are not searched; a Tuner with a
    `param_space` adds them itself."""

    @property
    def branch(self) -> Branch:
        """Return its only branch."""
        return self.branches[0]

    def judged_by(self, metric: str, mode: str | None) -> "PlainSpace":
        """Return the same space with a metric; raise a ConfigError if its direction is missing."""
        if mode not in ("max", "min"):
            raise ConfigError(
                f"mode: 'max' or 'min', as {metric} is better, got {mode!r}; OptunaSearcher(..., "
                f"metric={metric!r}, mode='min'), or the same two in TuneConfig"
            )
        told = {"metric": metric, "direction": mode}
        return dataclasses.replace(self, search=self.search.model_copy(update=told))

    def filled(self, values: Values) -> Tree:
        """Return the user's dictionary with these values, by parameter name."""
        tree = _dicts_of(self.branch.tree) if self.constants else {}
        for p in self.branch.parameters:
            here = tree
            for part in p.path[:-1]:
                here = here.setdefault(part, {})
            here[p.path[-1]] = copy.deepcopy(values[p.name])
        return tree

    def values_in(self, config: Values) -> Tree:
        """Return the searched values of a trial's dictionary, by parameter name."""
        found = {}
        for p in self.branch.parameters:
            value: Any = config
            for part in p.path:
                value = value.get(part) if isinstance(value, Mapping) else None
            found[p.name] = value
        return found

    @property
    def parameters_text(self) -> str:
        """Return the parameters as Python's literals, which `parameters_from` reads."""
        listed = []
        for p in self.branch.parameters:
            domain = p.domain
            told = list(domain.values) if isinstance(domain, Choices) else vars(domain)
            listed.append((p.name, p.path, told))
        return repr(listed)

    def point(self, given: Values) -> Tree:
        """Return a point's values by parameter name.

        It may name them `net/width`, or be a dictionary like the space's, constants included.
        """
        paths = {p.path for p in self.branch.parameters}
        return {
            "/".join(map(str, path)): value
            for path, value in _parts_of_point(given, paths)
            if path in paths or not self._is_constant(path)
        }

    def _is_constant(self, path: Path_) -> bool:
        value: Any = self.branch.tree
        for part in path:
            if not isinstance(value, Mapping) or part not in value:
                return False
            value = value[part]
        return True


def plain_space(
    template: Tree,
    parameters: tuple[Parameter, ...],
    *,
    epochs: int,
    search: Values,
    constants: bool,
) -> PlainSpace:
    """Return the space of a dictionary with holes; raise a ConfigError with all its problems."""
    settings = search_settings(search)
    record = {"epochs": epochs, "parameters": {p.name: p.domain.tree for p in parameters}}
    branch = Branch(GROUP, template, tuple(sorted(parameters, key=lambda p: p.name)))
    space = PlainSpace((branch,), settings, record, constants)
    given = {*search, "stopping"}  # who passes `StudyStopping` to a Tuner asks for early stopping
    if defaults := defaults_of_grid(space, given):
        settings = settings.model_copy(update=defaults)
        space = dataclasses.replace(space, search=settings)
    problems = [f"search.{problem}" for rule in SEARCH_RULES for problem in rule(space)]
    if problems:
        raise ConfigError(problems)
    return space


def parameters_from(text: str) -> tuple[Parameter, ...]:
    """Return the parameters of a text that `parameters_text` has made; it runs no code."""
    found = []
    for name, path, told in ast.literal_eval(text):
        domain = Choices(tuple(told)) if isinstance(told, list) else Range(**told)
        found.append(Parameter(name, path, domain))
    return tuple(found)


def search_settings(given: Values) -> PlainSearch:
    """Return the search settings of a plain dictionary; raise a ConfigError for all others."""
    problems = []
    for name in given:
        if name not in SETTINGS:
            way = _ELSEWHERE.get(name) or did_you_mean(str(name), SETTINGS)
            problems.append(f"search.{name}: no setting of a search in a Tuner of your own; {way}")
    if problems:
        raise ConfigError(problems)
    try:
        return validated(PlainSearch, dict(given))
    except ConfigError as error:
        raise ConfigError(f"search.{problem}" for problem in error.problems) from None


def _dicts_of(tree: Tree) -> Tree:
    """Return a copy of the dictionaries of a tree, with the same values in them."""
    return {k: _dicts_of(v) if isinstance(v, dict) else v for k, v in tree.items()}


def _parts_of_point(
    given: Values, paths: set[Path_], above: Path_ = ()
) -> Iterator[tuple[Path_, Any]]:
    """Yield (path, value) of a point; a value at one of `paths` is whole, whatever it is."""
    for key, value in given.items():
        path = (*above, *(key.split("/") if isinstance(key, str) else (key,)))
        if path not in paths and isinstance(value, Mapping) and value:
            yield from _parts_of_point(value, paths, path)
        else:
            yield path, value
