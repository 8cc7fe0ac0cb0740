"""A search space: the tree of `TrainConfig` with ranges in it, and how it is searched.

In YAML a bare value is fixed. `{low, high}`, with `log: true`, `step: s` or `log_complement: true` (log-uniform in
1 - x), or `{choices: [...]}`, is searched. `objective` may be a list: a conditional choice, each member with its own
parameters. Settings that are an item of choices may have ranges, too, which are asked for where the item is chosen.
What stands in the file is checked through `TrainConfig` itself, at both ends of every range.
"""

import copy
import dataclasses
import importlib.util
import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tfkd_ray.learn.config import RUN_ONLY, TeacherRun, TrainConfig
from tfkd_ray.learn.objectives import Canonical
from tfkd_ray.settings.errors import ConfigError, did_you_mean, dotted
from tfkd_ray.settings.passwords import masked
from tfkd_ray.settings.schema import members, name_alone, settings_at, tag, validated
from tfkd_ray.settings.yaml import find_file, parse_yaml, read_yaml
from tfkd_ray.space.ranges import (
    Choices,
    Domain,
    Path_,
    Range,
    Suggests,
    Tree,
    domain_of,
    first_found,
    holds_a_number,
    holds_whole_numbers,
    is_range,
    labels_of,
    name_of,
    range_meant,
)
from tfkd_ray.space.search_config import (
    Gp,
    Grid,
    Halving,
    Hyperband,
    Median,
    NoStopping,
    SearchConfig,
)

Within = tuple[str, Any]
"""An item of choices: (name of the parameter, its value)."""
MAX_CORNERS = 256
MAX_TEACHERS = 1000
MAX_GRID = 100_000
MAX_RUNGS = 10_000
MAX_STEPS = 1_000_000
OBJECTIVES = members(TrainConfig.model_fields["objective"])
TAUGHT = {str(tag(m)) for m in OBJECTIVES if issubclass(m, Canonical) and m.needs_teacher} - {
    "tfkd_self"
}
"""Objectives whose teacher has a network of its own."""


@dataclass(frozen=True)
class Parameter:
    """One searched setting."""

    name: str
    """Dotted path; below `objective` the objective's name comes next: objective.kd.temperature; below choices the name
    of the item, or its number: student.mlp.dropout, augment.2.flip."""
    path: Path_
    """Where it stands in the tree of a configuration with one objective."""
    domain: Domain
    within: Within | None = None
    """Where it is asked for: (name of a parameter that is a choice, the value it must have). None: always."""

    def is_asked(self, chosen: Mapping[str, Any]) -> bool:
        """Whether it is there beside these values of parameters that are."""
        if self.within is None:
            return True
        name, item = self.within
        return name in chosen and bool(chosen[name] == item)

    def put(self, tree: Tree, value: Any) -> None:
        """Fill its hole in a tree; settings with ranges of their own have theirs filled after it."""
        value = copy.deepcopy(value)
        if isinstance(self.domain, Choices) and self.domain.written:
            value = name_alone(value)
        _put(tree, self.path, value)


@dataclass(frozen=True)
class Branch:
    """The space of one objective: a tree with holes, and the parameters that fill them."""

    objective: str
    tree: Tree
    parameters: tuple[Parameter, ...]
    """Choices come before what is within them."""

    def asked(self, values: Mapping[str, Any]) -> Iterator[Parameter]:
        """The parameters that there are with these values; the values may be filled in on the way."""
        there: Tree = {}
        for p in self.parameters:
            if p.is_asked(there):
                yield p
                there[p.name] = values[p.name]

    def config(self, values: Mapping[str, Any]) -> TrainConfig:
        """The configuration for these values, by parameter name."""
        tree = copy.deepcopy(self.tree)
        for p in self.asked(values):
            p.put(tree, values[p.name])
        return validated(TrainConfig, tree)

    def around(self, parameter: Parameter) -> Tree:
        """Values of a configuration that has this parameter, the first of each."""
        values = _first(self.parameters)
        within = parameter.within
        while within is not None:
            values[within[0]] = within[1]
            within = next(p.within for p in self.parameters if p.name == within[0])
        return values

    @property
    def makes_teachers(self) -> list[Parameter]:
        """The parameters that a trial's teacher depends on; none where it needs no teacher."""
        if not _needs_teacher(self.tree):
            return []
        parts = {"teacher", "augment", "init"}
        if self.objective not in TAUGHT or self.tree.get("init") == "trained":
            parts.add("student")
        return [p for p in self.parameters if p.path[0] in parts]

    @property
    def example(self) -> TrainConfig:
        """A configuration of this branch."""
        return self.config(_first(self.parameters))


@dataclass(frozen=True)
class BranchGroup:
    """Branches that share one sampler. Of several, the sampler chooses."""

    name: str
    branches: tuple[Branch, ...]

    def propose(self, trial: Suggests) -> tuple[dict[str, Any], TrainConfig]:
        """(values by parameter name, the configuration they make), asked of the sampler."""
        names = [b.objective for b in self.branches]
        chosen = trial.suggest_categorical("objective", names) if len(names) > 1 else names[0]
        branch = self.branches[names.index(chosen)]
        values: Tree = {}
        for p in branch.asked(values):
            values[p.name] = p.domain.suggest(trial, p.name)
        return values, branch.config(values)

    def told(self, branch: Branch, values: Mapping[str, Any]) -> Tree:
        """The values of one of its branches as the sampler is asked for them."""
        told: Tree = {}
        if len(self.branches) > 1:
            told["objective"] = branch.objective
        for p in branch.asked(values):
            told |= p.domain.told(p.name, values[p.name])
        return told

    @property
    def conditional(self) -> bool:
        """Whether its trials differ in which parameters they have."""
        return len(self.branches) > 1 or any(p.within for p in self.branches[0].parameters)

    @property
    def grid(self) -> dict[str, list[Any]] | None:
        """All values of every parameter, as the sampler sees them; None where they cannot be counted."""
        if len(self.branches) > 1:
            return None
        grid = {}
        for p in self.branches[0].parameters:
            points = p.domain.points
            if points is None:
                return None
            grid[p.name] = points
        return grid

    @property
    def grid_size(self) -> int | None:
        """Combinations in the grid; counted, not listed."""
        return None if len(self.branches) > 1 or self.conditional else self.size

    @property
    def size(self) -> int | None:
        """How many different trials it can propose; None where they cannot be counted."""
        sizes = [_combinations(branch.parameters) for branch in self.branches]
        return None if None in sizes else sum(size for size in sizes if size is not None)


@dataclass(frozen=True)
class Space:
    """A validated search space."""

    branches: tuple[Branch, ...]
    search: SearchConfig
    tree: Tree
    """The whole file as it is understood: every default in it, ranges where they were. It reads back as this space."""
    notes: tuple[str, ...] = ()
    """What was added to what the file says, or is odd about it."""

    @property
    def groups(self) -> list[BranchGroup]:
        """What is sampled apart; trial n belongs to group n mod their number."""
        if self.search.split:
            return [BranchGroup(b.objective, (b,)) for b in self.branches]
        return [BranchGroup("all", self.branches)]

    @property
    def parameters(self) -> list[Parameter]:
        """All searched settings of all objectives, once each."""
        found: dict[str, Parameter] = {}
        for branch in self.branches:
            found |= {p.name: p for p in branch.parameters}
        return list(found.values())

    @property
    def epochs(self) -> int:
        """Full length of a trial."""
        return int(self.tree["epochs"])

    @property
    def example(self) -> TrainConfig:
        """One configuration of the space; all that says where a trial runs is the same in every other."""
        return self.branches[0].example

    def single(self) -> TrainConfig:
        """The one configuration of a file without ranges; a ConfigError that says what to fix otherwise."""
        problems = []
        if len(self.branches) > 1:
            names = ", ".join(b.objective for b in self.branches)
            problems.append(
                f"objective: is a choice of {names}, and one run needs one; fix it: objective={names[:2]}"
            )
        for p in self.parameters:
            if p.within is None:
                first = p.domain.probes[0]
                problems.append(
                    f"{p.name}: is searched ({p.domain}), and one run needs one value; fix it: {p.name}={first}"
                )
        if problems:
            raise ConfigError(problems)
        return self.branches[0].config({})

    def teacher_runs(self) -> list[TeacherRun]:
        """Every teacher that a trial of this space may need, once each."""
        runs: dict[str, TeacherRun] = {}
        for branch in self.branches:
            first = _first(branch.parameters)
            for values in _every_choice(branch.makes_teachers):
                run = branch.config({**first, **values}).teacher_run()
                if run is not None:
                    runs.setdefault(run.fingerprint(), run)
        return list(runs.values())


def load_space(path: Path | str, overrides: Sequence[str] = ()) -> Space:
    """Read, override and check a space file; every problem in it is in one ConfigError.

    Args:
        path: of the file, or the name of one that ships with the package.
        overrides: `key.path=value` each, in YAML, as on the command line.
    """
    if not isinstance(path, str | Path):
        raise ConfigError(
            f"path: the name of a file, got {path!r}; build_space makes a space of a tree"
        )
    if isinstance(overrides, str) or not all(isinstance(text, str) for text in overrides or ()):
        raise ConfigError(
            f"overrides: a list of texts, ['optim.lr=0.1'], got {masked(repr(overrides))}"
        )
    path = find_file(path, "search_spaces")
    tree = read_yaml(path)
    problems: list[str] = []
    for text in overrides or ():
        try:
            override(tree, text)
        except ConfigError as error:
            problems += [
                f"{p.replace(text, masked(text))} (in {masked(text)!r})" for p in error.problems
            ]
    if problems:
        raise ConfigError(problems, "command line")
    return build_space(tree, path)


def build_space(tree: Tree, source: str | Path | None = None) -> Space:
    """A space from its tree, `{"objective": ["ce", "kd"], "optim": {"lr": {"low": 0.01, "high": 1}}}`.

    Every problem in it is in one ConfigError, which names `source` as where it stands.
    """
    if not isinstance(tree, Mapping):
        raise ConfigError(f"a space is settings (key: value), got {masked(repr(tree))}", source)
    tree = dict(copy.deepcopy(tree))
    if "arms" in tree:
        raise ConfigError(
            "arms: this file lists arms, which are compared, not searched: tfkd confirm FILE",
            source,
        )
    notes: list[str] = []
    search, problems = _read_search(tree.pop("search", None))
    branches, more_problems = _read_branches(tree, search, notes)
    if problems or more_problems:
        raise ConfigError([*problems, *more_problems], source)
    space = Space(tuple(branches), search, tree)
    problems = first_found(TEACHER_RULES, space)
    if problems:
        raise ConfigError(problems, source)
    search = _sized(space)
    space = dataclasses.replace(space, search=search, tree=_resolved(branches, search))
    problems = first_found(SPACE_RULES, space)
    if problems:
        raise ConfigError(problems, source)
    for note_of in NOTES:
        notes += note_of(space)
    return dataclasses.replace(space, notes=tuple(dict.fromkeys(notes)))


def _read_search(given: Any) -> tuple[SearchConfig, list[str]]:
    """(how a space is searched, the defaults where that is wrong; what is wrong)."""
    problems = []
    if given is not None and not isinstance(given, dict):
        problems.append(f"search: needs settings below it (key: value), got {masked(repr(given))}")
        given = None
    try:
        return validated(SearchConfig, given or {}), problems
    except ConfigError as error:
        return SearchConfig(), problems + [f"search.{p}" for p in error.problems]


def _read_branches(
    tree: Tree, search: SearchConfig, notes: list[str]
) -> tuple[list[Branch], list[str]]:
    """(the branches that are right, what is wrong with the others); takes `objective` out of the tree."""
    branches, problems = [], []
    try:
        objectives = _objectives(tree.pop("objective", None), search, notes)
    except ConfigError as error:
        return [], error.problems
    names = {name_of(objective) for objective in objectives}
    for objective in objectives:
        shared = dict(tree)
        teacher = tree.get("teacher")
        if name_of(objective) == "tfkd_self" and TAUGHT & names and isinstance(teacher, dict):
            # the network given is that of the others' teacher; a self teacher is the student's
            shared["teacher"] = {k: v for k, v in teacher.items() if k != "model"}
        try:
            branches.append(_build_branch({**shared, "objective": objective}, notes))
        except ConfigError as error:
            problems += error.problems
    return branches, problems


def _sized(space: Space) -> SearchConfig:
    """How the space is searched, with the size of its grid for `num_samples` where that is left out."""
    search, size = space.search, _grid_size(space)
    if isinstance(search.sampler, Grid) and "num_samples" not in search.model_fields_set and size:
        return search.model_copy(update={"num_samples": size})
    return search


def _grid_size(space: Space) -> int:
    """Trials in the grids of all groups that have one."""
    return sum(group.grid_size or 0 for group in space.groups)


def _share(space: Space) -> int:
    """Trials of each group."""
    return space.search.num_samples // len(space.groups)


# --- notes: each a sentence on what is odd about a space


def _weights_are_unknown(space: Space) -> Iterator[str]:
    """A teacher's weights may have seen the validation images."""
    weights = {str(run.weights) for run in space.teacher_runs() if run.weights}
    if weights:
        yield (
            f"teacher.weights: what {' and '.join(sorted(weights))} was trained on is not known here; if it has seen "
            "the validation images, its students look better than they are"
        )


def _trials_are_the_same(space: Space) -> Iterator[str]:
    """Trials differ in nothing where nothing is searched."""
    share = _share(space)
    idle = [b.objective for b in space.branches if not b.parameters]
    if share < 2 or not idle or (len(idle) < len(space.branches) and not space.search.split):
        return
    whose, what = f"all {share} trials", "nothing is searched"
    if len(space.groups) > 1:
        whose = f"the {share} trials of {', '.join(idle)} each"
    if len(idle) < len(space.branches):
        what = f"nothing is searched for {', '.join(idle)}"
    yield (
        f"{what}: {whose} are one and the same run, seed included; write a range, or train it once with tfkd train, or "
        "over several seeds with tfkd confirm and a file of arms"
    )


def _trials_repeat_others(space: Space) -> Iterator[str]:
    """Trials repeat others where there are hardly more different ones than trials."""
    share = _share(space)
    few = {}
    for group in space.groups:
        size = group.size
        if any(b.parameters for b in group.branches) and size is not None and size < 2 * share:
            few[group.name] = size
    if share < 2 or not few or isinstance(space.search.sampler, Grid):
        return
    points = ", ".join(f"{size} different trials of {name}" for name, size in few.items())
    way = "write a range, or more choices, or lower search.num_samples"
    if all((group.grid_size or MAX_GRID + 1) <= MAX_GRID for group in space.groups):
        way = "search.sampler: grid, with num_samples left out, runs each once"
    yield f"there are only {points}: of {share} that are proposed, some are likely to repeat others; {way}"


NOTES = (_weights_are_unknown, _trials_are_the_same, _trials_repeat_others)


# --- rules of a space's teachers, whose tree is still that of the file


def _teacher_is_needed(space: Space) -> Iterator[str]:
    """A teacher is searched only where an objective has one."""
    if not any(_needs_teacher(branch.tree) for branch in space.branches):
        for name in _ranges(space.tree.get("teacher"), ("teacher",)):
            yield f"{name}: is searched, and no objective here needs a teacher; leave it out"


def _teachers_are_few(space: Space) -> Iterator[str]:
    """All teachers can be trained before the sweep."""
    for branch in space.branches:
        teachers = _teachers(branch)
        if teachers > MAX_TEACHERS:
            yield (
                f"teacher: for {branch.objective} there are {teachers} to train before the sweep, and {MAX_TEACHERS} "
                "are the most; give teacher and student fewer choices"
            )


def _teachers(branch: Branch) -> int:
    """Combinations of choices that a trial's teacher may depend on."""
    listed = []
    for p in branch.makes_teachers:
        if isinstance(p.domain, Range):  # teachers are trained with its low end alone
            p = dataclasses.replace(p, domain=Choices((p.domain.probes[0],)))
        listed.append(p)
    return _combinations(listed) or 1


TEACHER_RULES = (_teacher_is_needed, _teachers_are_few)


# --- rules of how a space is searched: each one sentence, which goes on after `search.`


def _sampler_is_installed(space: Space) -> Iterator[str]:
    """A sampler's package is here."""
    sampler = space.search.sampler
    if sampler.needs and importlib.util.find_spec(sampler.needs) is None:
        yield f"sampler: {sampler} needs the package {sampler.needs}, which is not here: pip install {sampler.needs}"


def _sampler_proposes_choices(space: Space) -> Iterator[str]:
    """Choices are searched by a sampler that can propose them."""
    sampler = space.search.sampler
    for p in space.parameters:
        if isinstance(p.domain, Choices) and not sampler.choices:
            yield f"sampler: {sampler} proposes numbers only, and {p.name} is a choice; use tpe, or fix {p.name}"


def _are_joined(space: Space) -> bool:
    """Whether the sampler chooses the objective."""
    return len(space.groups[0].branches) > 1


def _sampler_chooses_objectives(space: Space) -> Iterator[str]:
    """Objectives are chosen by a sampler that can."""
    sampler = space.search.sampler
    if _are_joined(space) and not sampler.together:
        yield f"sampler: {sampler} cannot choose among objectives; use tpe or random, or split: true"


def _sampler_chooses_items(space: Space) -> Iterator[str]:
    """Items with ranges of their own are chosen by a sampler that can."""
    sampler = space.search.sampler
    nested = sorted({p.within[0] for p in space.parameters if p.within})
    if nested and not sampler.together and not _are_joined(space):
        yield (
            f"sampler: {sampler} cannot choose among items of {' and '.join(nested)} with ranges of their own; use tpe "
            "or random"
        )


def _grid_is_run_once(space: Space) -> Iterator[str]:
    """A grid can be counted, is small enough, and has as many points as there are trials."""
    if not isinstance(space.search.sampler, Grid) or any(
        group.conditional for group in space.groups
    ):
        return
    given, size = space.search.num_samples, _grid_size(space)
    endless = [p for p in space.parameters if p.domain.size is None]
    for p in endless:
        yield f"sampler: grid needs choices or a step, and {p.name} is {p.domain}; write {{choices: [...]}}"
    if size > MAX_GRID:
        yield f"sampler: a grid of {size} trials is more than {MAX_GRID}; use qmc or random"
    elif not endless and given != size:
        yield f"num_samples: the grid has {size} points, each is one trial, got {given}; leave it out"


def _gp_can_list_values(space: Space) -> Iterator[str]:
    """Optuna's gp lists all values of each parameter."""
    for p in space.parameters:
        size = p.domain.size or 0
        if isinstance(space.search.sampler, Gp) and size > MAX_STEPS:
            yield f"sampler: gp cannot propose one of {size} values of {p.name}; raise its step, or use tpe"


def _sampler_has_several_metrics(space: Space) -> Iterator[str]:
    """Several metrics are for a sampler that has several."""
    search = space.search
    if search.more_metrics and not search.sampler.several:
        yield f"sampler: {search.sampler} has one metric only; use tpe or gp for {', '.join(search.metrics)}"


def _parameters_differ(space: Space) -> Iterator[str]:
    """The number of parameters is a metric where students differ."""
    searched = any(p.path[0] == "student" for p in space.parameters)
    if "parameters" in space.search.more_metrics and not searched:
        yield "more_metrics: parameters are the same in all trials where the student is fixed; search it, or leave them"


def _stopping_judges_by_one_metric(space: Space) -> Iterator[str]:
    """With several metrics no trial is stopped."""
    search, stopping = space.search, space.search.stopping
    if search.more_metrics and not isinstance(stopping, NoStopping):
        yield (
            f"stopping: {stopping.name} judges by one metric, and there are {len(search.metrics)}: a trial that is "
            "behind in one may be ahead in another; set stopping: none"
        )


def _generations_are_whole(space: Space) -> Iterator[str]:
    """A sampler that proposes generations has every trial's end."""
    sampler = space.search.sampler
    if sampler.full_length_only and not isinstance(space.search.stopping, NoStopping):
        yield f"stopping: a trial that is stopped early is missing from a generation of {sampler}; set stopping: none"


def _begins_too_late(space: Space) -> bool:
    """Whether a halving's `min_epochs` leave it no rung."""
    stopping, epochs = space.search.stopping, space.epochs
    if not isinstance(stopping, Halving) or not stopping.min_epochs:
        return False
    return epochs > 1 and not stopping.rungs(epochs)


def _halving_stops_trials(space: Space) -> Iterator[str]:
    """A halving has a rung."""
    stopping = space.search.stopping
    if isinstance(stopping, Halving) and _begins_too_late(space):
        yield (
            f"stopping: {stopping.name} would never stop a trial: min_epochs is {stopping.min_epochs} of "
            f"{space.epochs}, and none is stopped in the last ninth; lower it, or set stopping: none"
        )


def _brackets_have_trials(space: Space) -> Iterator[str]:
    """Each bracket of a hyperband has trials to compare."""
    stopping, epochs, share = space.search.stopping, space.epochs, _share(space)
    if not isinstance(stopping, Hyperband) or _begins_too_late(space):
        return
    n = len(stopping.brackets(epochs))
    if n < 2:
        yield f"stopping: hyperband has no rung in {epochs} epochs, so it would stop nothing; lower min_epochs"
    elif share < 2 * n:
        yield f"stopping: hyperband's {n} brackets need {2 * n} trials of each objective, got {share}; use halving"


def _median_has_few_rungs(space: Space) -> Iterator[str]:
    """A median judges a trial a limited number of times."""
    stopping = space.search.stopping
    if not isinstance(stopping, Median) or not stopping.min_epochs:
        return
    times = space.epochs // stopping.min_epochs
    if times > MAX_RUNGS:
        yield f"stopping: median would judge a trial {times} times; raise min_epochs"


def _median_begins(space: Space) -> Iterator[str]:
    """An objective has more trials than those that a median never stops."""
    stopping, share = space.search.stopping, _share(space)
    if isinstance(stopping, Median) and share <= stopping.startup:
        yield (
            f"stopping: median begins after {stopping.startup} full-length trials of an objective, and each has "
            f"{share}; lower startup, or use halving"
        )


def _gpu_hours_end(space: Space) -> Iterator[str]:
    """A budget of GPU hours is for trials on GPUs."""
    if space.search.gpu_hours is not None and not space.example.gpus_per_worker:
        yield "gpu_hours: trials here use no GPU, so it would never end; set gpus_per_worker, or use cpu_hours"


SEARCH_RULES = (
    _sampler_is_installed,
    _sampler_proposes_choices,
    _sampler_chooses_objectives,
    _sampler_chooses_items,
    _grid_is_run_once,
    _gp_can_list_values,
    _sampler_has_several_metrics,
    _parameters_differ,
    _stopping_judges_by_one_metric,
    _generations_are_whole,
    _halving_stops_trials,
    _brackets_have_trials,
    _median_has_few_rungs,
    _median_begins,
    _gpu_hours_end,
)
"""In the order in which their problems are told: all of them at once."""


# --- rules of a whole space


def _validation_is_kept(space: Space) -> Iterator[str]:
    """A sweep has validation images to choose by."""
    is_sweep = space.parameters or len(space.branches) > 1
    if is_sweep and not space.example.data.val_fraction:
        yield "data.val_fraction: a sweep chooses on validation, so it must be above 0, got 0"


def _objectives_have_trials(space: Space) -> Iterator[str]:
    """Every objective has a trial."""
    search, objectives = space.search, len(space.branches)
    if search.num_samples < objectives and search.split:
        yield f"search.num_samples: {objectives} objectives share it equally, got {search.num_samples}"


def _is_searched_as_it_can_be(space: Space) -> Iterator[str]:
    """A space and how it is searched go together."""
    for rule in SEARCH_RULES:
        for problem in rule(space):
            yield f"search.{problem}"


SPACE_RULES = (_validation_is_kept, _objectives_have_trials, _is_searched_as_it_can_be)
"""In the order in which they are looked at; the first that is broken is told."""


def pinned(space: Space) -> Space:
    """The same space on the data that are here, which it names by their digest; see `Dataset.pinned`."""
    return with_digest(space, space.example.data.pinned().digest)


def with_digest(space: Space, digest: str | None) -> Space:
    """The same space on data of this digest."""
    if space.example.data.digest == digest:
        return space
    data = {**space.tree["data"], "digest": digest}
    found = build_space({**space.tree, "data": data})
    return dataclasses.replace(
        found, notes=space.notes, search=space.search
    )  # a tree has no password


def _objectives(given: Any, search: SearchConfig, notes: list[str]) -> list[Any]:
    if given is None:
        raise ConfigError(
            "objective: required, and not given; for example: objective: [ce, lsr, tfkd_reg]"
        )
    if not isinstance(given, list):
        return [given]
    if not given:
        raise ConfigError("objective: an empty list; for example: objective: [ce, lsr, tfkd_reg]")
    names = [name_of(o) for o in given]
    twice = {n for n in names if n is not None and names.count(n) > 1}
    if twice:
        raise ConfigError(
            f"objective: {', '.join(sorted(twice))} is listed twice; widen one range instead"
        )
    added: list[Any] = []
    if search.baselines and len(given) > 1:
        if "ce" not in names:
            added.append({"name": "ce"})
        if "lsr" not in names:
            added.append({"name": "lsr", "alpha": {"low": 0.02, "high": 0.4, "log": True}})
    if added:
        notes.append(
            f"added {' and '.join(a['name'] for a in added)}: baselines are tuned as hard as the rest "
            "(search.baselines: false leaves them out)"
        )
    return given + added


def _needs_teacher(tree: Tree) -> bool:
    """Whether a run of this tree, with one objective, needs a trained network before it."""
    return tree.get("init") == "trained" or name_of(tree.get("objective")) in {*TAUGHT, "tfkd_self"}


def _ranges(value: Any, path: Path_) -> Iterator[str]:
    """Dotted paths of the ranges in a part of a space."""
    if is_range(value, path):
        yield dotted(path)
    elif isinstance(value, dict):
        for key, below in value.items():
            yield from _ranges(below, (*path, str(key)))


class _Ranges:
    """Takes the ranges out of the tree of one objective, and keeps them as parameters, and what is wrong with them."""

    def __init__(self, objective: str, notes: list[str]) -> None:
        self.found: list[Parameter] = []
        self.problems: list[str] = []
        self._objective, self._notes = objective, notes

    def taken_from(
        self, value: Any, path: Path_ = (), name: Path_ = (), within: Within | None = None
    ) -> Any:
        """The tree without its ranges; a faulty one leaves the default, so that the rest can be checked, too.

        Args:
            name: the path as a person writes it.
            within: the item of choices that this is a part of.
        """
        if not isinstance(value, dict):
            return value
        below = {}
        for key, given in value.items():
            there = (*path, str(key))
            called = (*name, str(key)) if within else public_path(there, self._objective)
            try:
                domain = self._domain(given, called)
            except ConfigError as error:
                self.problems += error.problems
                continue
            if domain is None:
                below[key] = self.taken_from(given, there, called, within)
            else:
                below[key] = None
                self._keep(Parameter(".".join(called), there, domain, within), called)
        return below

    def _domain(self, given: Any, called: Path_) -> Domain | None:
        domain = domain_of(given, called, self._notes, whole=holds_whole_numbers(called))
        if domain is None and isinstance(given, list | dict) and holds_a_number(called):
            raise ConfigError(range_meant(given, called))
        return domain

    def _keep(self, parameter: Parameter, called: Path_) -> None:
        """Keep a parameter, and those within its items."""
        self.found.append(parameter)
        domain = parameter.domain
        if isinstance(domain, Choices) and domain.written:
            for item, bare, label in zip(
                domain.written, domain.values, labels_of(domain.values), strict=True
            ):
                self.taken_from(item, parameter.path, (*called, label), (parameter.name, bare))


def _build_branch(tree: Tree, notes: list[str]) -> Branch:
    """The space of one objective; every problem in it is in one ConfigError."""
    tree = {**tree, "objective": name_alone(tree["objective"])}
    if not isinstance(tree["objective"], dict):
        raise ConfigError(f"objective: needs a name or settings, got {tree['objective']!r}")
    objective = str(tree["objective"].get("name", "?"))
    ranges = _Ranges(objective, notes)
    template: Tree = ranges.taken_from(tree)
    problems = ranges.problems + list(_names_differ(ranges.found))
    # by name: the order in which a sampler is asked is part of its answers, and must outlive the file's layout
    found = sorted(ranges.found, key=lambda p: p.name)
    branch = Branch(objective, template, tuple(found))
    if not _needs_teacher(tree):
        branch = _without_teacher(branch)
    for rule in BRANCH_RULES:
        problems += rule(branch)
    if problems:
        raise ConfigError(problems)
    template |= {"precision": _precision(branch)}
    return branch


def _without_teacher(branch: Branch) -> Branch:
    """The branch with the first value of each of its teacher's settings: they do nothing, so they are not searched."""
    idle = tuple(p for p in branch.parameters if p.path[0] == "teacher")
    first = _first(idle)
    for p in dataclasses.replace(branch, parameters=idle).asked(first):
        p.put(branch.tree, first[p.name])
    others = tuple(p for p in branch.parameters if p.path[0] != "teacher")
    return dataclasses.replace(branch, parameters=others)


def _precision(branch: Branch) -> str:
    """One for the sweep, also where students are searched: that of those that gain, as the others lose little."""
    first = _first(branch.parameters)
    choices = _every_choice([p for p in branch.parameters if p.path[0] == "student"])
    students = itertools.islice(choices, MAX_CORNERS)
    precisions = {branch.config({**first, **values}).precision for values in students}
    return "bf16" if "bf16" in precisions else "fp32"


# --- rules of a branch: each a sentence for what is wrong with it


def _names_differ(found: Sequence[Parameter]) -> Iterator[str]:
    """Each parameter has a name of its own."""
    count = Counter(p.name for p in found)
    for name, times in count.items():
        if times > 1:
            yield (
                f"{name}: two settings are searched under this name, as a key has a dot in it; give the key another "
                "name"
            )


ONE_A_SWEEP = {*RUN_ONLY, "recipe", "data", "epochs", "seed", "batch_norm", "precision", "compile"}


def _trials_can_be_compared(p: Parameter) -> Iterator[str]:
    """What makes trials different runs, and not better ones, is fixed."""
    top = p.path[0]
    if top in ONE_A_SWEEP:
        yield f"{p.name}: one value for the whole sweep; trials that differ in it cannot be compared"


def _names_are_fixed(p: Parameter) -> Iterator[str]:
    """Objectives are searched as a list, and other things as a whole."""
    if p.path in (("objective",), ("objective", "name")):
        yield f"{p.name}: write a list instead: objective: [ce, lsr, ...]"
    elif p.path[-1] == "name":
        above = ".".join(p.path[:-1])
        yield f"{p.name}: search the whole setting instead: {above}: {{choices: [NAME, {{name: NAME, ...}}]}}"


def _teachers_can_be_listed(p: Parameter) -> Iterator[str]:
    """A teacher has no ranges."""
    if p.path[0] == "teacher" and isinstance(p.domain, Range):
        yield f"{p.name}: choices only (teachers are trained before the sweep, each once): {{choices: [...]}}"


PARAMETER_RULES = (_trials_can_be_compared, _names_are_fixed, _teachers_can_be_listed)


def _parameters_are_searchable(branch: Branch) -> Iterator[str]:
    """Every parameter may be searched."""
    for p in branch.parameters:
        for rule in PARAMETER_RULES:
            yield from rule(p)


def _corners_are_valid(branch: Branch) -> Iterator[str]:
    """Configurations are valid at both ends of all ranges, and what is searched of their objective does something."""
    for values in _corners(branch.parameters):
        try:
            allowed = branch.config(values).objective.searchable
        except ConfigError as error:
            yield from error.problems
            continue
        for p in branch.parameters:
            if p.path[0] == "objective" and allowed is not None and p.path[-1] not in allowed:
                yield (
                    f"{p.name}: fixed only: whatever its value, this loss is a label smoothing times a constant; "
                    f"search {' and '.join(sorted(allowed))}"
                )


BRANCH_RULES = (_parameters_are_searchable, _corners_are_valid)
"""In the order in which their problems are told: all of them at once, after those of single ranges."""


def public_path(path: Path_, objective: str) -> Path_:
    """The path as a person writes it: objective.kd.alpha for alpha of the kd in the list."""
    top, below = path[:1], path[1:]
    if top != ("objective",) or below in ((), ("name",)):
        return path
    return (*top, objective, *below)


def _put(tree: Tree, path: Path_, value: Any) -> None:
    for part in path[:-1]:
        tree = tree[part]
    tree[path[-1]] = value


def _first(parameters: Sequence[Parameter]) -> Tree:
    """The first value of each parameter, by its name."""
    return {p.name: p.domain.probes[0] for p in parameters}


def _every_choice(parameters: Sequence[Parameter], end: int = 0) -> Iterator[Tree]:
    """Values for every combination of choices, with all ranges at their low (0) or high (1) end."""
    begun: list[tuple[int, Tree]] = [(0, {})]
    while begun:
        k, chosen = begun.pop()
        while k < len(parameters) and not parameters[k].is_asked(chosen):
            k += 1
        if k == len(parameters):
            yield chosen
            continue
        p = parameters[k]
        values = p.domain.probes if isinstance(p.domain, Choices) else [p.domain.probes[end]]
        begun += [(k + 1, {**chosen, p.name: value}) for value in reversed(values)]


def _combinations(parameters: Sequence[Parameter], within: Within | None = None) -> int | None:
    """How many combinations of values there are, within an item of choices; None where a range has no steps."""
    count = 1
    for p in (p for p in parameters if p.within == within):
        size = p.domain.size
        if isinstance(p.domain, Choices) and p.domain.written:
            sizes = [_combinations(parameters, (p.name, value)) for value in p.domain.values]
            size = None if None in sizes else sum(s for s in sizes if s is not None)
        if size is None:
            return None
        count *= size
    return count


def _corners(parameters: Sequence[Parameter]) -> Iterator[dict[str, Any]]:
    """Values to check a space with: every combination of choices (of many, the first), at both ends of the ranges."""
    for end in (0, 1):
        yield from itertools.islice(_every_choice(parameters, end), MAX_CORNERS)


def _resolved(branches: Sequence[Branch], search: SearchConfig) -> Tree:
    """The whole file as it is understood."""
    trees = [_with_ranges(branch) for branch in branches]
    objectives = [tree["objective"] for tree in trees]
    teachers = [tree["teacher"] for tree in trees if _needs_teacher(tree)] or [trees[0]["teacher"]]
    with_network = [t for t in teachers if t and ("choices" in t or t["model"])]
    return {
        **trees[0],
        "teacher": (with_network or teachers)[0],
        "objective": objectives if len(objectives) > 1 else objectives[0],
        "search": search.model_dump(mode="json"),
    }


def _with_ranges(branch: Branch) -> Tree:
    """The tree of a branch with every default in it, and ranges where they were."""
    tree = branch.example.model_dump(mode="json")
    for p in branch.parameters:
        if p.within is None:
            _put(tree, p.path, p.domain.tree)
    return tree


def override(tree: Tree, text: str) -> None:
    """Put one `key.path=value` of the command line into the tree of a configuration or of a space."""
    key, equals, value = text.partition("=")
    path = key.split(".")
    if not equals or not all(path):
        raise ConfigError(f"{text}: an override is key.path=value, for example optim.lr=0.1")
    if path[0] not in {"search", *TrainConfig.model_fields}:
        known = settings_at(TrainConfig, ()) | {"search"}
        raise ConfigError(f"{path[0]}: no such setting; {did_you_mean(path[0], known)}")
    here: Any = tree
    if path[0] == "objective" and len(path) > 2:
        here, path = _one_objective(tree, path)
    for depth in range(1, len(path)):
        here = _settings_in(here, path[:depth])
    here[path[-1]] = parse_yaml(value, key)


def _settings_in(here: Any, path: Sequence[str]) -> Any:
    """The settings at the end of a path, found in those above them, and made where there are none."""
    *above, part = path
    at: str | int = part
    if is_range(here, tuple(above)) and isinstance(here.get("choices"), list):
        here = here["choices"]
        labels = labels_of(here)  # what `check` calls the items
        if part not in labels:
            raise ConfigError(
                f"{dotted(path)}: no such item of {dotted(above)}; {did_you_mean(part, labels)}"
            )
        at = labels.index(part)
    below = here.get(at) if isinstance(here, dict) else here[at]
    if below is None:
        here[at] = {}
    elif isinstance(below, str):
        here[at] = name_alone(below)
    elif not isinstance(below, dict):
        raise ConfigError(f"{dotted(path)}: is {below!r}, with nothing below it")
    return here[at]


def _one_objective(tree: Tree, path: list[str]) -> tuple[Tree, list[str]]:
    """The settings of the objective that an override names, and what is left of the path."""
    given = tree.get("objective")
    listed = given if isinstance(given, list) else [given]
    settings = [name_alone(o) for o in listed]
    names = [name_of(o) for o in settings]
    if path[1] not in names:
        known = [str(n) for n in names if n]
        raise ConfigError(
            f"objective.{path[1]}: not among the file's objectives; {did_you_mean(path[1], known)}"
        )
    tree["objective"] = settings if isinstance(given, list) else settings[0]
    return settings[names.index(path[1])], path[2:]
