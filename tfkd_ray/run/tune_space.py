"""Ray Tune's own search spaces, `{"lr": tune.loguniform(1e-4, 1), ...}`, for our searcher.

Each domain becomes the range or the choices that propose exactly its values. What has no such form
is refused: a sentence names the key and the way out.
"""

import math
import numbers
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from ray.tune.search.sample import (
    Categorical,
    Domain,
    Float,
    Function,
    Grid,
    Integer,
    LogUniform,
    Normal,
    Quantized,
    Uniform,
)

from tfkd_ray.settings.errors import ConfigError
from tfkd_ray.settings.yaml import Tree, Values
from tfkd_ray.space.plain import PlainSpace, plain_space, search_settings
from tfkd_ray.space.ranges import (
    CHOICES_RULES,
    RANGE_RULES,
    Choices,
    Path_,
    Range,
    refuse,
)
from tfkd_ray.space.search_config import Grid as GridSampler
from tfkd_ray.space.space import Parameter

_DATA_TYPES = (str, int, float, bool, type(None))
_PLACEHOLDERS = ("__fn_ph", "__ref_ph")
"""First items of the pairs that a Tuner puts into its `param_space` for functions and objects."""


def tune_space(
    given: Values,
    *,
    epochs: int,
    search: Values,
    constants: bool = True,
) -> PlainSpace:
    """Return the space of a dictionary with Tune's domains; raise one ConfigError for all problems.

    Args:
        epochs: results of a trial of full length.
        search: search settings, as below `search` in a file.
        constants: True if proposals hold what is not searched, too.
    """
    grid = isinstance(search_settings(search).sampler, GridSampler)
    found = _Domains(grid=grid, merged=not constants)
    template = found.taken_from(given)
    if found.problems:
        raise ConfigError(found.problems)
    if not found.parameters:
        raise ConfigError(
            "space: nothing in it is searched: it has no tune.uniform, tune.choice, ...; a tree with "
            "ranges as in a file becomes a space by build_space(tree)"
        )
    return plain_space(
        template, tuple(found.parameters), epochs=epochs, search=search, constants=constants
    )


class _Domains:
    """Collects the domains of a dictionary as parameters, and their problems."""

    def __init__(self, *, grid: bool, merged: bool) -> None:
        """Collect domains.

        Args:
            grid: the sampler tries every combination.
            merged: Tune merges proposals into its own copy of the dictionary.
        """
        self.parameters: list[Parameter] = []
        self.problems: list[str] = []
        self._grid, self._merged = grid, merged

    def taken_from(self, given: Values, above: Path_ = ()) -> Tree:
        """Return the dictionary with None for each domain, and its fixed values where they are."""
        tree = {}
        for key, value in given.items():
            path = (*above, key)
            try:
                tree[key] = self._taken(value, path)
            except ConfigError as error:
                self.problems += error.problems
        return tree

    def _taken(self, value: Any, path: Path_) -> Any:
        name = _named(path)
        domain = _as_domain(value)
        if isinstance(domain, Function) or _placeholder(value) == _PLACEHOLDERS[0]:
            raise ConfigError(
                f"{name}: tune.sample_from calls a function, and a sampler learns nothing of it; search what it "
                "depends on, and compute it in your trainable"
            )
        if domain is not None:
            found = self._translated(domain, name)
            if isinstance(found, Range | Choices):
                self._keep(Parameter(name, path, found))
                return None
            return found
        if isinstance(value, Mapping):
            if set(value) == {"eval"}:
                raise ConfigError(
                    f"{name}: Tune would evaluate {value!r}, and a sampler learns nothing of it; search what it "
                    "depends on, and compute it in your trainable"
                )
            return self.taken_from(value, path)
        for inside in _domains_in(value, path):
            self.problems.append(
                f"{inside}: a domain in a list is not searched here; give it a key of its own, and make the list in "
                "your trainable"
            )
        return value

    def _keep(self, parameter: Parameter) -> None:
        name = parameter.name
        if any(p.name == name for p in self.parameters):
            raise ConfigError(
                f"{name}: two settings are searched under this name, as a key has a slash in it; give the key another "
                "name"
            )
        self.parameters.append(parameter)

    def _translated(self, domain: Domain, name: str) -> Any:
        """Return a domain's range or choices, or the only value that it has."""
        if isinstance(domain, Categorical):
            return self._choices(domain, name)
        if isinstance(domain, Float | Integer):
            return _range(domain, name)
        raise ConfigError(
            f"{name}: a {type(domain).__name__} is no domain of Ray Tune's that is known here; write tune.uniform, "
            "tune.choice, ..."
        )

    def _choices(self, domain: Categorical, name: str) -> Choices:
        of_grid = isinstance(domain.get_sampler(), Grid)
        if of_grid and not self._grid:
            raise ConfigError(
                f"{name}: tune.grid_search tries every value; write tune.choice([...]), or set search={{'sampler': "
                "'grid'}, which tries every combination once"
            )
        # a grid_search is a dictionary itself, into which Tune would merge the chosen one
        if self._merged and of_grid and any(isinstance(v, Mapping) for v in domain.categories):
            raise ConfigError(
                f"{name}: Tune would merge a dictionary of tune.grid_search with the others; write "
                "tune.choice([...]), of which the sampler grid tries every value, too"
            )
        values = [v.item() if isinstance(v, np.generic) else v for v in domain.categories]
        for k, value in enumerate(values):
            inside = list(_domains_in(value, (*name.split("/"), str(k))))
            if inside or not _is_data(value):
                what = "has a domain in it" if inside else "is an object, or has one in it"
                raise ConfigError(
                    f"{name}: item {k} of tune.choice {what}, which no study can keep; write names (texts or numbers), "
                    "and look them up in your trainable"
                )
        refuse(name, CHOICES_RULES, {"choices": values})
        return Choices(tuple(values))


def _named(path: Path_) -> str:
    """Return the name of a setting as Ray's results show it: net/width."""
    return "/".join(map(str, path))


def _as_domain(value: Any) -> Domain | None:
    """Return a value as Tune's domain; None for a plain value."""
    if isinstance(value, Mapping) and set(value) == {"grid_search"}:
        given = value["grid_search"]
        return Categorical(given).grid() if isinstance(given, list | tuple) else None
    return value if isinstance(value, Domain) else None


def _domains_in(value: Any, path: Path_) -> Iterator[str]:
    """Yield the names of the domains in a value, however deep."""
    if _as_domain(value) is not None:
        yield _named(path)
    elif isinstance(value, Mapping):
        for key, below in value.items():
            yield from _domains_in(below, (*path, key))
    elif isinstance(value, list | tuple):
        for k, below in enumerate(value):
            yield from _domains_in(below, (*path, str(k)))


def _placeholder(value: Any) -> str | None:
    """Return the first item of a Tuner's placeholder; None for any other value."""
    if isinstance(value, tuple) and len(value) == len(_PLACEHOLDERS) and value[0] in _PLACEHOLDERS:
        return str(value[0])
    return None


def _is_data(value: Any) -> bool:
    """Return whether a value is text, numbers, or lists and dictionaries of them."""
    if _placeholder(value) is not None:
        return False
    if type(value) is dict:
        return all(isinstance(k, str) and _is_data(v) for k, v in value.items())
    if type(value) in (list, tuple):
        return all(map(_is_data, value))
    return type(value) in _DATA_TYPES


def _range(domain: Float | Integer, name: str) -> Range | int:
    """Return a domain's range; the value itself if an integer domain has only one."""
    sampler, q = domain.get_sampler(), None
    if isinstance(sampler, Quantized):
        sampler, q = sampler.get_sampler(), sampler.q
    if isinstance(sampler, Normal):
        low, high = (sampler.mean + k * sampler.sd for k in (-3, 3))
        raise ConfigError(
            f"{name}: tune.randn has no ends, and the samplers here need them; write tune.uniform({low:g}, {high:g}), "
            "three standard deviations to each side"
        )
    if not isinstance(sampler, Uniform | LogUniform):
        raise ConfigError(
            f"{name}: {sampler} is no way of sampling that is known here; write tune.uniform, tune.loguniform, ..."
        )
    for end in (domain.lower, domain.upper):
        if isinstance(end, bool) or not isinstance(end, numbers.Real) or not math.isfinite(end):
            raise ConfigError(f"{name}: the ends of a range are finite numbers, got {end!r}")
    log = isinstance(sampler, LogUniform)
    if isinstance(domain, Float):
        step = None if q is None else float(q)
        found = Range(float(domain.lower), float(domain.upper), log=log, step=step)
    else:
        whole = _whole_range(domain, q, name, log=log)
        if isinstance(whole, int):
            return whole
        found = whole
    refuse(name, RANGE_RULES, replace(found, step=None) if log else found)
    return found


def _whole_range(domain: Integer, q: Any, name: str, *, log: bool) -> Range | int:
    """Return the range of an integer domain; an upper end is exclusive, but for multiples of q."""
    step = int(q or 1)
    if step == 1:
        low, high = int(domain.lower), int(domain.upper) - 1
    else:
        low, high = (
            math.ceil(domain.lower / step) * step,
            math.floor(domain.upper / step) * step,
        )
    if low > high:
        ends = f"{domain.lower} to {domain.upper}"
        which = "which excludes the upper end" if step == 1 else f"in multiples of {step}"
        raise ConfigError(f"{name}: a range without a value: {ends}, {which}; raise its upper end")
    if low == high:
        return low
    return Range(low, high, log=log, step=None if step == 1 else step, whole=True)
