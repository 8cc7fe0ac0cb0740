"""A search space: the tree of `TrainConfig` with ranges in it, and its search settings.

In YAML a bare value is fixed. `{low, high}`, with `log: true`, `step: s` or `log_complement: true`
(log-uniform in 1 - x), or `{choices: [...]}`, is searched. `objective` may be a list: a conditional
choice whose items have their own parameters. Settings that are an item of choices may also have
ranges, which are searched only if the item is chosen. A file is checked through `TrainConfig`
itself, at both ends of every range.
"""

import copy
import importlib.util
import itertools
import shlex
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tfkd_ray.learn.config import (
    RUN_ONLY,
    WITHOUT_LABELS,
    TeacherRun,
    TrainConfig,
    number_teachers,
)
from tfkd_ray.learn.dataset import OF_UNLABELLED
from tfkd_ray.learn.objectives import Canonical, recorded
from tfkd_ray.learn.own import is_only_reading
from tfkd_ray.learn.own_loss import whole_numbers
from tfkd_ray.settings import own_code
from tfkd_ray.settings.errors import ConfigError, Sentences, did_you_mean, dotted, in_file, some_of
from tfkd_ray.settings.meant import no_such_setting
from tfkd_ray.settings.passwords import masked, shown_override
from tfkd_ray.settings.schema import members, name_alone, settings_at, tag, validated
from tfkd_ray.settings.yaml import Tree, Values, existing_space, in_yaml, parse_yaml, read_yaml
from tfkd_ray.space.blame import COMMAND_LINE, blamed
from tfkd_ray.space.points import own_points
from tfkd_ray.space.ranges import (
    RANGE_KEYS,
    Choices,
    Domain,
    Path_,
    Range,
    Suggests,
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
    TIME_BUDGETS,
    Asha,
    Gp,
    Grid,
    Halving,
    Hyperband,
    Median,
    NoStopping,
    Pausing,
    Sampler,
    SearchConfig,
    Stopping,
)
from tfkd_ray.verdict.limits import impossible
from tfkd_ray.verdict.scores import OF_AVERAGE, score_of

Within = tuple[str, Any]
"""An item of choices: (name of the parameter, its value)."""
TUNED_BASELINES: dict[str, Tree] = {
    "ce": {"name": "ce"},
    "lsr": {"name": "lsr", "alpha": {"low": 0.02, "high": 0.4, "log": True}},
}
"""Baselines that a space adds to its objectives, with the ranges in which they are tuned."""
OF_TEACHERS = ("teacher", "teachers")
"""Settings of a run's teachers."""
MAX_CORNERS = 256
MAX_TEACHERS = 1000
MAX_GRID = 100_000
MAX_RUNGS = 10_000
MAX_STEPS = 1_000_000
OBJECTIVES = members(TrainConfig.model_fields["objective"])
TAUGHT = {
    str(tag(m)) for m in OBJECTIVES if issubclass(m, Canonical) and m.needs_teacher is True
} - {"tfkd_self"}
"""Objectives whose teacher has its own network; of the user's own, the settings say it."""
NEVER_TAUGHT = {
    str(tag(m)) for m in OBJECTIVES if issubclass(m, Canonical) and m.needs_teacher is False
}
"""Objectives of this package that learn from labels alone, which may stand beside those with a teacher."""


@dataclass(frozen=True)
class Parameter:
    """One searched setting."""

    name: str
    """Dotted path. The objective's name follows `objective`: objective.kd.temperature. The name or
    number of an item follows choices: student.mlp.dropout, augment.2.flip."""
    path: Path_
    """Path in the tree of a configuration with one objective."""
    domain: Domain
    within: Within | None = None
    """Condition for searching it: (name of a choice parameter, its required value). None:
    always."""

    def is_asked(self, chosen: Values) -> bool:
        """Return whether it is searched, given the values of the other parameters."""
        if self.within is None:
            return True
        name, item = self.within
        return name in chosen and bool(chosen[name] == item)

    def put(self, tree: Tree, value: Any) -> None:
        """Put a value into its hole in a tree; holes within settings are filled afterwards."""
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
    """Parameters, choices before those within them."""

    def asked(self, values: Values) -> Iterator[Parameter]:
        """Yield the parameters that these values activate; the caller may add values on the way."""
        there: Tree = {}
        for p in self.parameters:
            if p.is_asked(there):
                yield p
                there[p.name] = values[p.name]

    def config(self, values: Values) -> TrainConfig:
        """Return the configuration for these values, by parameter name."""
        tree = copy.deepcopy(self.tree)
        for p in self.asked(values):
            p.put(tree, values[p.name])
        return validated(TrainConfig, tree)

    def around(self, parameter: Parameter) -> Tree:
        """Return the first values of a configuration that has this parameter."""
        values = _first(self.parameters)
        within = parameter.within
        while within is not None:
            values[within[0]] = within[1]
            within = next(p.within for p in self.parameters if p.name == within[0])
        return values

    @property
    def makes_teachers(self) -> list[Parameter]:
        """Return the parameters that a trial's teacher depends on; empty if it needs none."""
        if not self.needs_teacher:
            return []
        parts = {*OF_TEACHERS, "augment", "init"}
        if not _is_taught(self.tree["objective"]) or self._may_begin_trained:
            parts |= {"student", "freeze"}
        free = [p for p in self.parameters if _is_share(p) or p.path[-1] == "lr_decay"]
        return [p for p in self.parameters if p.path[0] in parts and p not in free]

    @property
    def needs_teacher(self) -> bool:
        """Return whether some trial needs a trained network before it starts."""
        return _needs_teacher(self.tree) or self._may_begin_trained

    @property
    def _may_begin_trained(self) -> bool:
        searched = [p.domain for p in self.parameters if p.path == ("init",)]
        items = [item for d in searched if isinstance(d, Choices) for item in d.values]
        return "trained" in (self.tree.get("init"), *items)

    @property
    def example(self) -> TrainConfig:
        """Return a configuration of this branch."""
        return self.config(_first(self.parameters))


@dataclass(frozen=True)
class BranchGroup:
    """Branches that share one sampler. If there are several, the sampler chooses one per trial."""

    name: str
    branches: tuple[Branch, ...]

    def propose(self, trial: Suggests) -> tuple[Tree, TrainConfig]:
        """Return (values by parameter name, their configuration), proposed by the sampler."""
        branch, values = self.values(trial)
        return values, branch.config(values)

    def values(self, trial: Suggests) -> tuple[Branch, Tree]:
        """Return (branch, values by parameter name), proposed by the sampler."""
        names = [b.objective for b in self.branches]
        chosen = trial.suggest_categorical("objective", names) if len(names) > 1 else names[0]
        branch = self.branches[names.index(chosen)]
        values: Tree = {}
        for p in branch.asked(values):
            values[p.name] = p.domain.suggest(trial, p.name)
        return branch, values

    def told(self, branch: Branch, values: Values) -> Tree:
        """Return the values of a branch in the form in which `suggest` asks for them."""
        told: Tree = {}
        if len(self.branches) > 1:
            told["objective"] = branch.objective
        for p in branch.asked(values):
            told |= p.domain.told(p.name, values[p.name])
        return told

    @property
    def conditional(self) -> bool:
        """Return whether its trials differ in their set of parameters."""
        return len(self.branches) > 1 or any(p.within for p in self.branches[0].parameters)

    @property
    def grid(self) -> dict[str, list[Any]] | None:
        """Return all values per parameter, as the sampler sees them; None if they are unlimited."""
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
        """Return the number of combinations in the grid, without listing them."""
        return None if len(self.branches) > 1 or self.conditional else self.size

    @property
    def size(self) -> int | None:
        """Return the number of different trials that it can propose; None if it is not finite."""
        sizes = [_combinations(branch.parameters) for branch in self.branches]
        return None if None in sizes else sum(size for size in sizes if size is not None)


@dataclass(frozen=True)
class Searched:
    """Parameters and search settings: all that a searcher needs to know of a space."""

    branches: tuple[Branch, ...]
    search: SearchConfig
    tree: Tree
    """What a study records of the space. Of a `Space`, the whole file with every default filled in
    and its ranges kept, which reads back as this space."""

    @property
    def groups(self) -> list[BranchGroup]:
        """Return the groups with separate samplers; trial n is in group n modulo their number."""
        if self.search.split:
            return [BranchGroup(b.objective, (b,)) for b in self.branches]
        return [BranchGroup("all", self.branches)]

    @property
    def parameters(self) -> list[Parameter]:
        """Return all searched settings of all objectives, once each."""
        found: dict[str, Parameter] = {}
        for branch in self.branches:
            found |= {p.name: p for p in branch.parameters}
        return list(found.values())

    @property
    def sampler(self) -> Sampler:
        """Return the settings of the sampler."""
        return self.search.sampler

    @property
    def stopping(self) -> Stopping:
        """Return the settings of early stopping."""
        return self.search.stopping

    @property
    def epochs(self) -> int:
        """Return the full length of a trial."""
        return int(self.tree["epochs"])

    @property
    def rungs(self) -> list[int]:
        """Return the epochs after which trials may be stopped."""
        return self.stopping.rungs(self.epochs)


@dataclass(frozen=True)
class Space(Searched):
    """A validated search space."""

    notes: tuple[str, ...] = ()
    """Notes on defaults that were added and on oddities of the file."""
    source: str | Path | None = field(default=None, compare=False)
    """File that it was read from, for errors; None if it was built in Python."""

    @property
    def example(self) -> TrainConfig:
        """Return one configuration; its run settings are those of every other one.

        It is one with unlabelled images, if there is any.
        """
        return _with_unlabelled(self.branches).example

    def try_own_code(self) -> list[str]:
        """Try the user's own code in each objective's first and last configuration; return notes.

        See `TrainConfig.try_own_code`. Errors name the space's file.
        """
        with in_file(self.source):
            return self._tried()

    def _tried(self) -> list[str]:
        notes = self.example.try_own_code()
        for branch in self.branches:
            for end in (0, -1):
                ends = {p.name: p.domain.probes[end] for p in branch.parameters}
                config = branch.config(ends)
                notes += config.try_objective()
                config.try_optimizer()
            for values in itertools.islice(_every_choice(_beginnings(branch)), MAX_CORNERS):
                config = branch.config({**_first(branch.parameters), **values})
                notes += config.try_beginning()
        return list(dict.fromkeys(notes))

    def single(self) -> TrainConfig:
        """Return the only configuration of a file without ranges; else raise a ConfigError."""
        several = len(self.branches) > 1
        asked = [p for p in self.branches[0].parameters if p.within is None]
        if several:  # those of all objectives, as `objective=` leaves the ranges of the others out
            asked = [p for p in asked if p.path[0] != "objective"]
        if not several and not asked:
            return self.branches[0].config({})
        names = [*(["objective"] if several else []), *(p.name for p in asked)]
        fixes = [
            *([f"objective={self.branches[0].objective}"] if several else []),
            *(f"{p.name}={in_yaml(p.domain.probes[0])}" for p in asked),
        ]
        problems = [
            f"{p.name}: is searched ({p.domain}), and one run needs one value; fix it: {fix}"
            for p, fix in zip(asked, fixes, strict=False)
            if len(names) == 1 and not several
        ]
        if not problems:
            found = some_of(names)
            problems = [f"{found}: are searched, and one run needs one value of each"]
            if len(fixes) <= 4:
                problems.append(f"fix them: {' '.join(map(shlex.quote, fixes))}")
        raise ConfigError(
            [
                *problems,
                "search them: tfkd tune FILE",
                "or train the best trial of a sweep: tfkd best EXPERIMENT > best.yaml && tfkd train best.yaml",
            ]
        )

    def teacher_runs(self) -> list[TeacherRun]:
        """Return every teacher that a trial of this space may need, once each."""
        runs: dict[str, TeacherRun] = {}
        for branch in self.branches:
            first = _first(branch.parameters)
            for values in _every_choice(branch.makes_teachers):
                for run in branch.config({**first, **values}).teacher_runs():
                    runs.setdefault(run.fingerprint(), run)
        return list(runs.values())


def load_space(path: Path | str, overrides: Sequence[str] = ()) -> Space:
    """Read, override and check a space file; raise one ConfigError with all its problems.

    Args:
        path: of the file, or the name of a packaged one.
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
    path = existing_space(path)
    tree = read_yaml(path)

    def build(words: Sequence[str]) -> Space:
        return build_space(_with_overrides(tree, words), path)

    try:
        return build(overrides or ())
    except ConfigError as error:
        if error.source == COMMAND_LINE:
            raise
        raise blamed(error, path, overrides or (), build) from None


def _with_overrides(tree: Tree, overrides: Sequence[str]) -> Tree:
    """Return a file's tree with the settings of the command line."""
    tree = copy.deepcopy(tree)
    problems: list[str] = []
    for text in overrides:
        try:
            override(tree, text)
        except ConfigError as error:
            problems += [
                f"{p.replace(text, shown_override(text))} (in {shown_override(text)!r})"
                for p in error.problems
            ]
    if problems:
        raise ConfigError(problems, COMMAND_LINE)
    return tree


def build_space(tree: Tree, source: str | Path | None = None) -> Space:
    """Return a space from its tree, `{"objective": ["ce", "kd"], "optim": {"lr": 0.1}}`.

    A range is a dict, such as `{"low": 0.01, "high": 1}`. All problems are raised in one
    ConfigError that names `source` as their file.
    """
    if not isinstance(tree, Mapping):
        raise ConfigError(f"a space is settings (key: value), got {masked(repr(tree))}", source)
    tree = dict(copy.deepcopy(tree))
    number_teachers(tree)
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
    search = _judged_by_average(space, _sized(space), notes)
    space = replace(space, search=search, tree=_resolved(branches, search))
    problems = first_found(SPACE_RULES, space)
    if problems:
        raise ConfigError(problems, source)
    for note_of in NOTES:
        notes += note_of(space)
    return replace(space, notes=tuple(dict.fromkeys(notes)), source=source)


def _read_search(given: Any) -> tuple[SearchConfig, list[str]]:
    """Return (search settings, or the defaults if they are invalid; the problems)."""
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
    """Return (the valid branches, the problems of the others); take `objective` out of the tree."""
    branches, problems = [], []
    try:
        objectives = _objectives(tree.pop("objective", None), search, notes)
    except ConfigError as error:
        return [], error.problems
    taught = any(map(_is_taught, objectives))
    learns = any(name_of(objective) in WITHOUT_LABELS for objective in objectives)
    for objective in objectives:
        shared = dict(tree)
        if learns and name_of(objective) in NEVER_TAUGHT:  # such as a baseline beside kd
            shared = without_unlabelled(shared)
        teacher = tree.get("teacher")
        if name_of(objective) == "tfkd_self" and taught and isinstance(teacher, dict):
            # the given network is the other objectives' teacher; a self teacher is the student's
            shared["teacher"] = {k: v for k, v in teacher.items() if k != "model"}
        if name_of(objective) == "tfkd_self" and taught:
            shared.pop("teachers", None)
        try:
            branches.append(_build_branch({**shared, "objective": objective}, notes))
        except ConfigError as error:
            problems += error.problems
    return branches, problems


def without_unlabelled(tree: Tree) -> Tree:
    """Return the tree of a configuration without the settings of unlabelled images."""
    data = tree.get("data")
    if not isinstance(data, Mapping):
        return tree
    return {**tree, "data": {k: v for k, v in data.items() if k not in OF_UNLABELLED}}


def _with_unlabelled(branches: Sequence[Branch]) -> Branch:
    """Return a branch whose trials see unlabelled images; the first one if there is none."""
    for branch in branches:
        data = branch.tree.get("data")
        if isinstance(data, Mapping) and data.get("unlabelled") is not None:
            return branch
    return branches[0]


def _sized(space: Space) -> SearchConfig:
    """Return the search settings with the defaults of a grid, or of several metrics.

    A grid has its size, and no early stopping; several metrics have no early stopping.
    """
    search = space.search
    defaults = defaults_of_grid(space, search.model_fields_set)
    if search.more_metrics and "stopping" not in search.model_fields_set:
        defaults["stopping"] = NoStopping()
    return search.model_copy(update=defaults)


def defaults_of_grid(space: Searched, given: Collection[str]) -> Tree:
    """Return the defaults of a grid's search settings, except of those that are given.

    Each combination is one trial of full length: a table of a grid needs all of its values.
    """
    if not isinstance(space.sampler, Grid):
        return {}
    size = _grid_size(space)
    defaults: Tree = {"stopping": NoStopping()} | ({"num_samples": size} if size else {})
    return {name: value for name, value in defaults.items() if name not in given}


def _averages(branch: Branch) -> bool:
    """Return whether all trials of a branch have averaged weights."""
    chosen = [p for p in branch.parameters if p.path == ("ema",)]
    if chosen:
        return None not in chosen[0].domain.probes
    return branch.example.ema is not None


def _judged_by_average(space: Space, search: SearchConfig, notes: list[str]) -> SearchConfig:
    """Return the search settings with the metric of the averaged weights as the default with `ema`.

    At rungs it ranks trials more like their final averaged weights than the weights in training do
    (tau 0.70 and 0.63 at the first, 0.84 and 0.75 at the second: benchmarks/RESULTS.md).
    """
    if not all(map(_averages, space.branches)):
        return search
    average = OF_AVERAGE[0]
    if "metric" not in search.model_fields_set:
        notes.append(f"search.metric: {average}, as the averaged weights (ema) are the student")
        return search.model_copy(update={"metric": average})
    for metric in search.metrics:
        if twin := next((key for key in OF_AVERAGE if score_of(key).kept_as == metric), None):
            notes.append(
                f"search.metric: {metric} is of the weights in training, and with ema the student is their average: "
                f"{twin}"
            )
    return search


def _grid_size(space: Searched) -> int:
    """Return the number of trials in the grids of all groups that have one."""
    return sum(group.grid_size or 0 for group in space.groups)


def share_of(space: Searched) -> int:
    """Return the number of trials per group."""
    return space.search.most_trials // len(space.groups)


# --- notes: each a sentence on an oddity of a space


def _weights_are_unknown(space: Space) -> Sentences:
    """Yield a note if a teacher's weights may have seen the validation images."""
    weights = {str(run.weights) for run in space.teacher_runs() if run.weights}
    if weights:
        yield (
            f"teacher.weights: what {' and '.join(sorted(weights))} was trained on is unknown; if validation images "
            "were among them, its students look better than they are"
        )


def _beginnings_are_unknown(space: Space) -> Sentences:
    """Yield a note if a student's weights may have seen the validation images."""
    found: dict[str, None] = {}
    for branch in space.branches:
        first = _first(branch.parameters)
        for values in itertools.islice(_every_choice(_beginnings(branch)), MAX_CORNERS):
            weights = branch.config({**first, **values}).initial_weights
            found |= {} if weights is None else {weights: None}
    if found:
        yield (
            f"init.weights: what {' and '.join(found)} was trained on is unknown; if validation images were among "
            "them, students look better than they are"
        )


def _beginnings(branch: Branch) -> list[Parameter]:
    """Return the parameters on which the beginning of a student depends."""
    parts = ("student", "init", "freeze")
    return [p for p in branch.parameters if p.path[0] in parts]


def _trials_are_the_same(space: Space) -> Sentences:
    """Yield a note if nothing is searched, so that all trials are equal."""
    share = share_of(space)
    idle = [b.objective for b in space.branches if not b.parameters]
    if share < 2 or not idle or (len(idle) < len(space.branches) and not space.search.split):
        return
    many = "" if space.search.num_samples is None else f"{share} "
    whose, what = f"all {many}trials", "nothing is searched"
    if len(space.groups) > 1:
        whose = f"the {many}trials of {', '.join(idle)} each"
    if len(idle) < len(space.branches):
        what = f"nothing is searched for {', '.join(idle)}"
    yield (
        f"{what}: {whose} are the same run, including the seed; write a range, or train it once with tfkd train, or "
        "over several seeds with tfkd confirm and a file of arms"
    )


def _trials_repeat_others(space: Space) -> Sentences:
    """Yield a note if trials must repeat, because there are hardly more different ones."""
    share = share_of(space)
    few = {}
    for group in space.groups:
        size = group.size
        if any(b.parameters for b in group.branches) and size is not None and size < 2 * share:
            few[group.name] = size
    if share < 2 or not few or isinstance(space.sampler, Grid):
        return
    points = ", ".join(f"{size} different trials of {name}" for name, size in few.items())
    way = "write a range, or more choices, or lower search.num_samples"
    if all((group.grid_size or MAX_GRID + 1) <= MAX_GRID for group in space.groups):
        way = "search.sampler: grid, with num_samples left out, runs each once"
    many = "those" if space.search.num_samples is None else share
    yield f"there are only {points}: of {many} proposals, some are likely to repeat others; {way}"


def _pieces_change_a_loss(space: Space) -> Sentences:
    """Yield a note if a loss that compares the images of a batch sees pieces of it."""
    for branch in space.branches:
        first = _first(branch.parameters)
        updates = [p for p in branch.parameters if p.path[0] == "optim"]
        for values in itertools.islice(_every_choice(updates, end=1), MAX_CORNERS):
            config = branch.config({**first, **values})
            if config.objective.compares_images and config.optim.accumulate > 1:
                yield (
                    f"optim.accumulate: {branch.objective} compares the images of a batch with each other; with "
                    "accumulate it compares only those of a piece, so the loss differs"
                )
                break


NOTES = (
    _pieces_change_a_loss,
    _weights_are_unknown,
    _beginnings_are_unknown,
    _trials_are_the_same,
    _trials_repeat_others,
)


# --- rules of a space's teachers, on the tree of the file


def _teacher_is_needed(space: Space) -> Sentences:
    """Reject a searched teacher without an objective that needs one."""
    if not any(branch.needs_teacher for branch in space.branches):
        for part in OF_TEACHERS:
            for name in _ranges(space.tree.get(part), (part,)):
                yield f"{name}: is searched, and no objective here needs a teacher; leave it out"


def _teachers_are_few(space: Space) -> Sentences:
    """Reject more teachers than can be trained before the sweep."""
    for branch in space.branches:
        teachers = _teachers(branch)
        if teachers > MAX_TEACHERS:
            yield (
                f"teacher: for {branch.objective} there are {teachers} to train before the sweep, and {MAX_TEACHERS} "
                "are the most; give teacher and student fewer choices"
            )


def _teachers(branch: Branch) -> int:
    """Return the number of combinations of choices that a trial's teacher may depend on."""
    listed = []
    for p in branch.makes_teachers:
        if isinstance(p.domain, Range):  # teachers are trained with the low end only
            p = replace(p, domain=Choices((p.domain.probes[0],)))
        listed.append(p)
    return _combinations(listed) or 1


TEACHER_RULES = (_teacher_is_needed, _teachers_are_few)


# --- rules of search settings: each yields a sentence that continues `search.`


def _sampler_is_installed(space: Searched) -> Sentences:
    """Reject a sampler whose package is not installed."""
    sampler = space.sampler
    if sampler.needs and importlib.util.find_spec(sampler.needs) is None:
        yield f"sampler: {sampler} needs the package {sampler.needs}, which is not here: pip install {sampler.needs}"


def _sampler_proposes_choices(space: Searched) -> Sentences:
    """Reject choices with a sampler that cannot propose them."""
    sampler = space.sampler
    for p in space.parameters:
        if isinstance(p.domain, Choices) and not sampler.choices:
            yield f"sampler: {sampler} proposes numbers only, and {p.name} is a choice; use tpe, or fix {p.name}"


def _are_joined(space: Searched) -> bool:
    """Return whether the sampler chooses the objective."""
    return len(space.groups[0].branches) > 1


def _sampler_chooses_objectives(space: Searched) -> Sentences:
    """Reject several objectives with a sampler that cannot choose among them."""
    sampler = space.sampler
    if _are_joined(space) and not sampler.together:
        yield f"sampler: {sampler} cannot choose among objectives; use tpe or random, or split: true"


def _sampler_chooses_items(space: Searched) -> Sentences:
    """Reject items with their own ranges for a sampler that cannot choose among them."""
    sampler = space.sampler
    nested = sorted({p.within[0] for p in space.parameters if p.within})
    if nested and not sampler.together and not _are_joined(space):
        yield (
            f"sampler: {sampler} cannot choose among items of {' and '.join(nested)} with ranges of their own; use tpe "
            "or random"
        )


def _grid_is_run_once(space: Searched) -> Sentences:
    """Reject a grid that cannot be listed, is too large, or differs from `num_samples`."""
    if not isinstance(space.sampler, Grid) or any(group.conditional for group in space.groups):
        return
    given, size = space.search.num_samples, _grid_size(space)
    endless = [p for p in space.parameters if p.domain.size is None]
    for p in endless:
        yield f"sampler: grid needs choices or a step, and {p.name} is {p.domain}; write {{choices: [...]}}"
    if size > MAX_GRID:
        yield f"sampler: a grid of {size} trials is more than {MAX_GRID}; use qmc or random"
    elif not endless and given != size:
        yield f"num_samples: the grid has {size} points, each is one trial, got {in_yaml(given)}; leave it out"


def _gp_can_list_values(space: Searched) -> Sentences:
    """Reject parameters with too many values for Optuna's gp, which lists them."""
    for p in space.parameters:
        size = p.domain.size or 0
        if isinstance(space.sampler, Gp) and size > MAX_STEPS:
            yield f"sampler: gp cannot propose one of {size} values of {p.name}; raise its step, or use tpe"


def _sampler_has_several_metrics(space: Searched) -> Sentences:
    """Reject several metrics with a sampler that can optimise only one."""
    search = space.search
    if search.more_metrics and not search.sampler.several:
        yield f"sampler: {search.sampler} has one metric only; use tpe or gp for {', '.join(search.metrics)}"


def _parameters_differ(space: Searched) -> Sentences:
    """Reject the number of parameters as a metric or constraint if all students have the same."""
    search, searched = space.search, any(p.path[0] == "student" for p in space.parameters)
    for name, names in (
        ("more_metrics", search.more_metrics),
        ("constraints", search.constraints),
    ):
        if "parameters" in names and not searched:
            yield (
                f"{name}: the number of parameters is the same in all trials, because the student is fixed; search the "
                "student, or leave parameters out"
            )


def _constraints_can_be_met(space: Searched) -> Sentences:
    """Reject constraints that no trial meets, or that the sampler cannot learn."""
    sampler, search = space.sampler, space.search
    if search.constraints and not sampler.constrained:
        yield f"constraints: {sampler} does not learn which trials meet them; use tpe or gp"
    yield from impossible(search.limits)


def _averages_are_there(space: Space) -> Sentences:
    """Reject a metric of averaged weights where trials have none."""
    of_average = [metric for metric in space.search.measured if metric in OF_AVERAGE]
    if of_average and not all(map(_averages, space.branches)):
        yield (
            f"search.metric: {of_average[0]} is of averaged weights, and not all trials have ema; set it, such as ema: "
            "{decay: 0.999} (decay: 0 is no average)"
        )


def _stopping_judges_by_one_metric(space: Searched) -> Sentences:
    """Reject early stopping by one metric where there are several."""
    search, stopping = space.search, space.stopping
    by_fronts = type(stopping) is Halving
    if search.more_metrics and not (by_fronts or isinstance(stopping, NoStopping)):
        yield (
            f"stopping: {stopping.name} judges by one metric, and there are {len(search.metrics)}; set stopping: "
            "halving, or none"
        )


def _generations_are_whole(space: Searched) -> Sentences:
    """Reject early stopping with a sampler that needs full-length trials."""
    sampler = space.sampler
    if sampler.full_length_only and not isinstance(space.stopping, NoStopping):
        yield f"stopping: a trial that is stopped early is missing from a generation of {sampler}; set stopping: none"


def _begins_too_late(space: Searched) -> bool:
    """Return whether a halving's `min_epochs` leave no rung."""
    stopping, epochs = space.stopping, space.epochs
    if not isinstance(stopping, Halving) or not stopping.min_epochs:
        return False
    return epochs > 1 and not stopping.rungs(epochs)


def _halving_stops_trials(space: Searched) -> Sentences:
    """Reject a halving without rungs."""
    stopping = space.stopping
    if isinstance(stopping, Halving) and _begins_too_late(space):
        yield (
            f"stopping: {stopping.name} would never stop a trial: min_epochs is {stopping.min_epochs} of "
            f"{space.epochs}, and none is stopped in the last ninth; lower it, or set stopping: none"
        )


def _paused_trials_resume(space: Searched) -> Sentences:
    """Reject pausing for trainables of a user's own, whose checkpoints are not known here."""
    if isinstance(space.stopping, Pausing) and not isinstance(space, Space):
        yield (
            "stopping: pausing needs trials of this package, which resume from their checkpoints; use halving for a "
            "trainable of your own"
        )
    elif isinstance(space.stopping, Pausing) and space.search.num_samples is None:
        yield (
            "stopping: pausing needs num_samples, because all trials begin before the first goes on; set it, or use "
            "halving"
        )


def _brackets_have_trials(space: Searched) -> Sentences:
    """Reject a hyperband with too few trials per bracket."""
    stopping, epochs, share = space.stopping, space.epochs, share_of(space)
    if not isinstance(stopping, Hyperband) or _begins_too_late(space):
        return
    n = len(stopping.brackets(epochs))
    if n < 2:
        yield f"stopping: hyperband has no rung in {epochs} epochs, so it would stop nothing; lower min_epochs"
    elif share < 2 * n:
        yield f"stopping: hyperband's {n} brackets need {2 * n} trials of each objective, got {share}; use halving"


def _median_has_few_rungs(space: Searched) -> Sentences:
    """Reject a median that judges a trial too often."""
    stopping = space.stopping
    if not isinstance(stopping, Median) or not stopping.min_epochs:
        return
    times = space.epochs // stopping.min_epochs
    if times > MAX_RUNGS:
        yield f"stopping: median would judge a trial {times} times; raise min_epochs"


def _median_begins(space: Searched) -> Sentences:
    """Reject a median that begins only after an objective's last trial."""
    stopping, share = space.stopping, share_of(space)
    if isinstance(stopping, Median) and share <= stopping.startup:
        yield (
            f"stopping: median begins after {stopping.startup} full-length trials of an objective, and each has "
            f"{share}; lower startup, or use halving"
        )


def _gpu_hours_end(space: Searched) -> Sentences:
    """Reject a budget of GPU hours for trials without GPUs."""
    if space.search.gpu_hours is None or not isinstance(space, Space):
        return
    if not space.example.gpus_per_worker:
        yield "gpu_hours: trials here use no GPU, so the sweep would never end; set gpus_per_worker, or use cpu_hours"


def _endless_search_has_a_budget(space: Searched) -> Sentences:
    """Reject a search that neither a number of trials nor a budget of time ends."""
    search = space.search
    if search.num_samples is None and not set(TIME_BUDGETS) & search.budgets.keys():
        yield (
            "num_samples: null means until a budget is spent, and no budget is set; set time_budget_s, gpu_hours or "
            "cpu_hours, or a number of trials"
        )


def _finalists_are_known(space: Searched) -> Sentences:
    """Reject finalists that never come to be, or whose means order nothing."""
    search, finalists = space.search, space.search.finalists
    if finalists is None:
        return
    share = share_of(space)
    if search.num_samples is None:
        yield (
            "finalists: with num_samples: null, trials are added until the budget is spent, so the best are known too "
            "late; set num_samples"
        )
    elif finalists.k > share:
        yield (
            f"finalists.k: {finalists.k}, and an objective gets {share} trials; lower k, or raise num_samples"
        )
    if search.more_metrics:
        yield (
            f"finalists: finalists are ranked by one metric, and there are {len(search.metrics)}; leave finalists out, "
            "or name one metric"
        )
    if isinstance(space.stopping, Asha):
        yield (
            "finalists: asha, which is Ray's own, would stop runs with further seeds at its rungs; use halving"
        )


SEARCH_RULES = (
    _sampler_is_installed,
    _sampler_proposes_choices,
    _sampler_chooses_objectives,
    _sampler_chooses_items,
    _grid_is_run_once,
    _gp_can_list_values,
    _sampler_has_several_metrics,
    _parameters_differ,
    _constraints_can_be_met,
    _stopping_judges_by_one_metric,
    _generations_are_whole,
    _halving_stops_trials,
    _paused_trials_resume,
    _brackets_have_trials,
    _median_has_few_rungs,
    _median_begins,
    _gpu_hours_end,
    _endless_search_has_a_budget,
    _finalists_are_known,
)
"""Rules in the order in which their problems are reported, all of them at once."""


# --- rules of a whole space


def _validation_is_kept(space: Space) -> Sentences:
    """Reject a sweep without validation images."""
    is_sweep = space.parameters or len(space.branches) > 1
    if is_sweep and not space.example.data.val_fraction:
        yield "data.val_fraction: a sweep chooses on validation, so it must be above 0, got 0"


def _objectives_have_trials(space: Space) -> Sentences:
    """Reject fewer trials than objectives."""
    search, objectives = space.search, len(space.branches)
    if search.most_trials < objectives and search.split:
        yield f"search.num_samples: {objectives} objectives share it equally, got {search.num_samples}"


def _points_can_be_tried(space: Space) -> Sentences:
    """Reject first points outside of the space, and more of them than trials."""
    found, problems = own_points(space.branches, space.search.points)
    yield from problems
    if space.search.points and isinstance(space.sampler, Grid):
        yield "search.points: a grid is every combination once; leave them out, or choose a sampler"
    share = share_of(space)
    for group in space.groups:
        names = {branch.objective for branch in group.branches}
        count = sum(point.objective in names for point in found)
        if count > share:
            yield (
                f"search.points: {count} of {' and '.join(sorted(names))}, and its share is {share} trials; raise "
                "num_samples, or leave some out"
            )


def _is_searched_as_it_can_be(space: Space) -> Sentences:
    """Reject search settings that do not fit the space."""
    for rule in SEARCH_RULES:
        for problem in rule(space):
            yield f"search.{problem}"


SPACE_RULES = (
    _averages_are_there,
    _validation_is_kept,
    _objectives_have_trials,
    _is_searched_as_it_can_be,
    _points_can_be_tried,
)
"""Rules in the order in which they are checked; only the first broken one is reported."""


def pinned(space: Space) -> Space:
    """Return the same space with the local data's digests recorded; see `Dataset.pinned`."""
    return with_digests(space, space.example.data.pinned().digests)


def with_digests(space: Space, digests: Mapping[str, str]) -> Space:
    """Return the same space on data with these digests."""
    if space.example.data.digests == digests:
        return space
    data = {**space.tree["data"], **digests}
    found = build_space({**space.tree, "data": data}, space.source)
    # a tree has no password
    return replace(found, notes=space.notes, search=space.search)


def _objectives(given: Any, search: SearchConfig, notes: list[str]) -> list[Any]:
    if given is None:
        raise ConfigError(
            "objective: required, and not given; for example: objective: [ce, lsr, tfkd_reg]"
        )
    if not isinstance(given, list):
        return [recorded(given)]
    if not given:
        raise ConfigError("objective: an empty list; for example: objective: [ce, lsr, tfkd_reg]")
    given = [recorded(objective) for objective in given]
    names = [own_code.shown_name(o) for o in given]
    twice = {n for n in names if n is not None and names.count(n) > 1}
    if twice:
        own = any(own_code.shown_name(o) in twice and name_of(o) == "own" for o in given)
        way = ", or give one function another name" if own else ""
        raise ConfigError(
            f"objective: {', '.join(sorted(twice))} is listed twice; widen one range instead{way}"
        )
    wanted = TUNED_BASELINES if search.baselines and len(given) > 1 else {}
    added = [copy.deepcopy(tree) for name, tree in wanted.items() if name not in names]
    if added:
        notes.append(
            f"added {' and '.join(a['name'] for a in added)}, so that the baselines are tuned as hard as the rest "
            "(search.baselines: false leaves them out)"
        )
    return [*given, *added]


def _needs_teacher(tree: Tree) -> bool:
    """Return whether a run of this tree, with one objective, first needs a trained network."""
    objective = tree.get("objective")
    self_taught = name_of(objective) == "tfkd_self"
    init = tree.get("init")
    listed = init.get("choices") if isinstance(init, dict) else None
    inits = [init, *listed] if isinstance(listed, list) else [init]
    return "trained" in inits or self_taught or _is_taught(objective)


def _is_taught(objective: Any) -> bool:
    """Return whether an objective of a tree needs a teacher with its own network."""
    if name_of(objective) == "own":
        return bool(objective.get("taught"))
    return name_of(objective) in TAUGHT


def _ranges(value: Any, path: Path_) -> Iterator[str]:
    """Yield the dotted paths of the ranges in a part of a space."""
    if is_range(value, path):
        yield dotted(path)
    elif isinstance(value, dict):
        for key, below in value.items():
            yield from _ranges(below, (*path, str(key)))


def _ranges_in_lists(value: Any, path: Path_) -> Sentences:
    """Yield a note for each part of a list that looks like a range, and is none there."""
    parts = dict(enumerate(value)) if isinstance(value, list) else value
    if not isinstance(parts, dict):
        return
    if set(parts) == {"choices"} or {"low", "high"} <= set(parts) <= RANGE_KEYS:
        yield (
            f"{dotted(path)}: {in_yaml(value)} in a list is a value like any other and is not searched; give it a key "
            "of its own, or search whole lists: {choices: [[...], [...]]}"
        )
        return
    for key, below in parts.items():
        yield from _ranges_in_lists(below, (*path, str(key)))


class _Ranges:
    """Collects the ranges of one objective's tree as parameters, and their problems."""

    def __init__(self, objective: str, notes: list[str], whole: Mapping[str, bool] | None) -> None:
        """Collect ranges.

        Args:
            whole: for annotated arguments of an own objective, whether they are whole numbers;
                others are real ones, if they have no step. None: the numbers of a range decide.
        """
        self.found: list[Parameter] = []
        self.problems: list[str] = []
        self._objective, self._notes, self._whole = objective, notes, whole

    def taken_from(
        self, value: Any, path: Path_ = (), name: Path_ = (), within: Within | None = None
    ) -> Any:
        """Return the tree without its ranges; an invalid range leaves the default, to check on.

        Args:
            name: the path as a user writes it.
            within: the item of choices that contains this part.
        """
        if not isinstance(value, dict):
            self._notes += _ranges_in_lists(value, name)
            return value
        below = {}
        for key, given in value.items():
            there = (*path, str(key))
            called = (*name, str(key)) if within else public_path(there, self._objective)
            try:
                domain = self._domain(given, called, there)
            except ConfigError as error:
                self.problems += error.problems
                continue
            if domain is None:
                below[key] = self.taken_from(given, there, called, within)
            else:
                below[key] = None
                self._keep(Parameter(".".join(called), there, domain, within), called)
        return below

    def _domain(self, given: Any, called: Path_, there: Path_) -> Domain | None:
        whole = holds_whole_numbers(called)
        of_own = there[:-1] == ("objective", "args")
        if of_own and self._whole is not None and isinstance(given, dict):
            whole = self._whole.get(there[-1], None if "step" in given else False)
        of_loop = there[:-1] in (("loop", "args"), ("optim", "args"))
        if of_loop and isinstance(given, dict):  # real numbers, unless their step is a whole one
            whole = None if "step" in given else False
        domain = domain_of(given, called, self._notes, whole=whole)
        if (of_own or of_loop) and isinstance(domain, Range):
            domain = domain.spelled
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
    """Return the space of one objective; raise one ConfigError with all its problems."""
    tree = {**tree, "objective": own_code.spelled_out(tree["objective"])}
    if not isinstance(tree["objective"], dict):
        raise ConfigError(f"objective: needs a name or settings, got {tree['objective']!r}")
    objective = own_code.shown_name(tree["objective"]) or str(tree["objective"].get("name", "?"))
    ranges = _Ranges(objective, notes, _whole_arguments(tree["objective"]))
    template: Tree = ranges.taken_from(tree)
    problems = ranges.problems + list(_names_differ(ranges.found))
    # by name: the sampler's answers depend on the order, which must not depend on the file's layout
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


def _whole_arguments(objective: Tree) -> dict[str, bool] | None:
    """Return which arguments of an own objective are whole numbers, if its code may be loaded."""
    path = objective.get("path")
    if objective.get("name") != "own" or not isinstance(path, str) or is_only_reading():
        return None
    return whole_numbers(path)


def _without_teacher(branch: Branch) -> Branch:
    """Return the branch with the first values of its teacher's settings, which have no effect."""
    idle = tuple(p for p in branch.parameters if p.path[0] in OF_TEACHERS)
    first = _first(idle)
    for p in replace(branch, parameters=idle).asked(first):
        p.put(branch.tree, first[p.name])
    others = tuple(p for p in branch.parameters if p.path[0] not in OF_TEACHERS)
    return replace(branch, parameters=others)


def _precision(branch: Branch) -> str:
    """Return one precision for the whole sweep: that of the students which gain by it."""
    first = _first(branch.parameters)
    choices = _every_choice([p for p in branch.parameters if p.path[0] == "student"])
    students = itertools.islice(choices, MAX_CORNERS)
    precisions = {branch.config({**first, **values}).precision for values in students}
    return "bf16" if "bf16" in precisions else "fp32"


# --- rules of a branch: each yields a sentence on a problem


def _names_differ(found: Sequence[Parameter]) -> Sentences:
    """Reject two parameters of the same name."""
    count = Counter(p.name for p in found)
    for name, times in count.items():
        if times > 1:
            yield (
                f"{name}: two settings are searched under this name, as a key has a dot in it; give the key another "
                "name"
            )


ONE_A_SWEEP = {*RUN_ONLY, "recipe", "data", "epochs", "seed", "batch_norm", "precision", "compile"}


def _trials_can_be_compared(p: Parameter) -> Sentences:
    """Reject a searched setting that makes trials different runs, but not better ones."""
    top = p.path[0]
    if top in ONE_A_SWEEP and p.path != ("data", "unlabelled_ratio"):
        way_out = "one sweep for each value, then `tfkd compare A B`"
        if top == "seed":
            way_out = "further seeds of the best trials are `search.finalists`; arms over seeds, `tfkd confirm`"
        yield (
            f"{p.name}: must have one value for the whole sweep, because trials that differ in it cannot be compared; "
            f"{way_out}"
        )


def _names_are_fixed(p: Parameter) -> Sentences:
    """Reject a search of a `name` alone: objectives are a list, others are searched whole."""
    if p.path in (("objective",), ("objective", "name")):
        yield f"{p.name}: write a list instead: objective: [ce, lsr, ...]"
    elif p.path[-1] == "name":
        above = ".".join(p.path[:-1])
        yield f"{p.name}: search the whole setting instead: {above}: {{choices: [NAME, {{name: NAME, ...}}]}}"


def _teachers_can_be_listed(branch: Branch) -> Sentences:
    """Reject a range on which a teacher depends: it must have choices."""
    for p in branch.makes_teachers:
        if isinstance(p.domain, Range) and (p.path[0] in OF_TEACHERS or _moves_teachers(branch, p)):
            yield (
                f"{p.name}: choices only (teachers are trained before the sweep, each once): "
                "{choices: [...]}"
            )


def _moves_teachers(branch: Branch, p: Parameter) -> bool:
    """Return whether the teachers at both ends of a range differ."""
    around = branch.around(p)
    try:
        configs = [branch.config({**around, p.name: end}) for end in p.domain.probes]
    except ConfigError:  # another rule tells what is wrong
        return False
    made = [[run.fingerprint() for run in config.teacher_runs()] for config in configs]
    return any(runs != made[0] for runs in made)


def _is_share(p: Parameter) -> bool:
    """Return whether a parameter weighs one of several teachers, which does not change it."""
    return p.path[0] == "teachers" and p.path[2:] == ("share",)


def _loops_are_fixed(p: Parameter) -> Sentences:
    """Reject a search over loops: it would compare programs, not settings."""
    top, *below = p.path
    if top == "loop" and below[:1] != ["args"]:
        yield f"{p.name}: one loop for the whole sweep; search its arguments, below loop.args"


PARAMETER_RULES = (
    _trials_can_be_compared,
    _names_are_fixed,
    _loops_are_fixed,
)


def _parameters_are_searchable(branch: Branch) -> Sentences:
    """Reject parameters that may not be searched."""
    for p in branch.parameters:
        for rule in PARAMETER_RULES:
            yield from rule(p)


def _corners_are_valid(branch: Branch) -> Sentences:
    """Reject a branch with an invalid configuration at an end of a range, or an inert setting."""
    for values in _corners(branch.parameters):
        try:
            allowed = branch.config(values).objective.searchable
        except ConfigError as error:
            yield from error.problems
            continue
        for p in branch.parameters:
            if p.path[0] == "objective" and allowed is not None and p.path[-1] not in allowed:
                yield (
                    f"{p.name}: can only be fixed: for every value, this loss is a label smoothing times a constant; "
                    f"search {' and '.join(sorted(allowed))}"
                )


def _choices_differ(branch: Branch) -> Sentences:
    """Reject two choices that are the same settings, written in two ways."""
    for p in branch.parameters:
        if isinstance(p.domain, Choices):
            written = p.domain.written
            plain = [value for value in p.domain.values if not written or value in written]
            yield from _same_settings(branch, p, plain[:MAX_CORNERS])


def _same_settings(branch: Branch, p: Parameter, values: Sequence[Any]) -> Sentences:
    around, before = branch.around(p), Tree()
    for value in values:
        try:
            settings = branch.config({**around, p.name: value}).model_dump_json()
        except ConfigError:  # another rule tells what is wrong
            continue
        if settings in before:
            twins = f"{in_yaml(before[settings])} and {in_yaml(value)}"
            yield f"{p.name}.choices: {twins} are the same settings; leave one out"
        before[settings] = value


BRANCH_RULES = (
    _parameters_are_searchable,
    _teachers_can_be_listed,
    _corners_are_valid,
    _choices_differ,
)
"""Rules in the order in which their problems are reported, all at once, after those of single
ranges."""


def public_path(path: Path_, objective: str) -> Path_:
    """Return the path as a user writes it: objective.kd.alpha for alpha of the kd in the list."""
    top, below = path[:1], path[1:]
    if top != ("objective",) or below in ((), ("name",)):
        return path
    return (*top, objective, *below)


def _put(tree: Tree, path: Path_, value: Any) -> None:
    for part in path[:-1]:
        tree = tree[part]
    tree[path[-1]] = value


def _first(parameters: Sequence[Parameter]) -> Tree:
    """Return the first value of each parameter, by name."""
    return {p.name: p.domain.probes[0] for p in parameters}


def _every_choice(parameters: Sequence[Parameter], end: int = 0) -> Iterator[Tree]:
    """Yield values for every combination of choices, with all ranges at low (0) or high (1)."""
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
    """Return the number of combinations within an item of choices; None without steps."""
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


def _corners(parameters: Sequence[Parameter]) -> Iterator[Tree]:
    """Yield values to check a space with: every combination of choices, at both ends of ranges.

    Beyond a maximum number of combinations, only the first ones.
    """
    for end in (0, 1):
        yield from itertools.islice(_every_choice(parameters, end), MAX_CORNERS)


def _resolved(branches: Sequence[Branch], search: SearchConfig) -> Tree:
    """Return the whole file with every default filled in."""
    trees = [_with_ranges(branch) for branch in branches]
    objectives = [tree["objective"] for tree in trees]
    teachers = [tree["teacher"] for tree in trees if _needs_teacher(tree)] or [trees[0]["teacher"]]
    with_network = [t for t in teachers if t and ("choices" in t or t["model"])]
    several = [tree["teachers"] for tree in trees if _needs_teacher(tree) and "teachers" in tree]
    return {
        **trees[0],
        "data": trees[branches.index(_with_unlabelled(branches))]["data"],
        "teacher": (with_network or teachers)[0],
        **({"teachers": several[0]} if several else {}),
        "objective": objectives if len(objectives) > 1 else objectives[0],
        "search": search.tree,
    }


def _with_ranges(branch: Branch) -> Tree:
    """Return the tree of a branch with every default filled in and its ranges kept."""
    tree = branch.example.tree
    for p in branch.parameters:
        if p.within is None:
            _put(tree, p.path, p.domain.tree)
    return tree


def override(tree: Tree, text: str) -> None:
    """Set one `key.path=value` of the command line in the tree of a configuration or a space."""
    number_teachers(tree)
    key, equals, value = text.partition("=")
    path = key.split(".")
    if path[0] == "teacher" and path[1:] and path[1].isdecimal():  # one of a list
        path[0] = "teachers"
    if not equals or not all(path):
        what = "an override is key.path=value in one word, without blanks around =; such as optim.lr=0.1"
        raise ConfigError(f"{text}: {what}")
    if path[0] not in {"search", *TrainConfig.model_fields}:
        known = settings_at(TrainConfig, ()) | {"search"}
        raise ConfigError(no_such_setting(path[:1], known))
    here: Any = tree
    if path[0] == "objective" and len(path) > 2:
        here, path = _one_objective(tree, path)
    for depth in range(1, len(path)):
        here = _settings_in(here, path[:depth])
    here[path[-1]] = parse_yaml(value, key)


def _settings_in(here: Any, path: Sequence[str]) -> Any:
    """Return the settings at the end of a path, created if missing."""
    *above, part = path
    at: str | int = part
    if is_range(here, tuple(above)) and isinstance(here.get("choices"), list):
        here = here["choices"]
        labels = labels_of(here)  # the labels that `check` gives the items
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
    """Return the settings of the objective that an override names, and the rest of the path."""
    given = tree.get("objective")
    listed = given if isinstance(given, list) else [given]
    settings = [own_code.spelled_out(o) for o in listed]
    names = [own_code.shown_name(o) for o in settings]
    if path[1] not in names:
        known = [str(n) for n in names if n]
        raise ConfigError(
            f"objective.{path[1]}: not among the file's objectives; {did_you_mean(path[1], known)}"
        )
    tree["objective"] = settings if isinstance(given, list) else settings[0]
    return settings[names.index(path[1])], path[2:]
