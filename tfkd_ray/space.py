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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tfkd_ray.config import RUN_ONLY, TeacherRun, TrainConfig
from tfkd_ray.objectives import Canonical
from tfkd_ray.passwords import masked
from tfkd_ray.ranges import (
    Choices,
    Domain,
    Path_,
    Range,
    Suggests,
    Tree,
    as_tree,
    domain_of,
    is_number,
    is_range,
    is_whole,
    labels_of,
    name_of,
    range_meant,
)
from tfkd_ray.schema import (
    ConfigError,
    did_you_mean,
    dotted,
    find_file,
    members,
    named,
    parse_yaml,
    read_yaml,
    settings_at,
    tag,
    validated,
)
from tfkd_ray.search_config import Gp, Grid, Halving, Hyperband, Median, NoStopping, SearchConfig

MAX_CORNERS = 256
TAUGHT = {
    str(tag(m)) for m in members(TrainConfig.model_fields["objective"]) if issubclass(m, Canonical) and m.needs_teacher
} - {"tfkd_self"}
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
    within: tuple[str, Any] | None = None
    """Where it is asked for: (name of a parameter that is a choice, the value it must have). None: always."""

    def is_asked(self, chosen: Mapping[str, Any]) -> bool:
        """Whether it is there beside these values of parameters that are."""
        return self.within is None or (self.within[0] in chosen and chosen[self.within[0]] == self.within[1])

    def put(self, tree: Tree, value: Any) -> None:
        """Fill its hole in a tree; settings with ranges of their own have theirs filled after it."""
        value = copy.deepcopy(value)
        _put(tree, self.path, named(value) if isinstance(self.domain, Choices) and self.domain.written else value)


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
        values = {p.name: p.domain.probes[0] for p in self.parameters}
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
        return self.config({p.name: p.domain.probes[0] for p in self.parameters})


@dataclass(frozen=True)
class Group:
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
        chosen = {"objective": branch.objective} if len(self.branches) > 1 else {}
        return chosen | {k: v for p in branch.asked(values) for k, v in p.domain.told(p.name, values[p.name]).items()}

    @property
    def conditional(self) -> bool:
        """Whether its trials differ in which parameters they have."""
        return len(self.branches) > 1 or any(p.within for p in self.branches[0].parameters)

    @property
    def grid(self) -> dict[str, list[Any]] | None:
        """All values of every parameter, as the sampler sees them; None where they cannot be counted."""
        if len(self.branches) > 1:
            return None
        points = {p.name: p.domain.points for p in self.branches[0].parameters}
        return None if None in points.values() else {k: v for k, v in points.items() if v is not None}

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
    def groups(self) -> list[Group]:
        """What is sampled apart; trial n belongs to group n mod their number."""
        if self.search.split:
            return [Group(b.objective, (b,)) for b in self.branches]
        return [Group("all", self.branches)]

    @property
    def parameters(self) -> list[Parameter]:
        """All searched settings of all objectives, once each."""
        return list({p.name: p for b in self.branches for p in b.parameters}.values())

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
        problems = [
            f"{p.name}: is searched ({p.domain}), and one run needs one value; fix it: {p.name}={p.domain.probes[0]}"
            for p in self.parameters
            if p.within is None
        ]
        if len(self.branches) > 1:
            names = ", ".join(b.objective for b in self.branches)
            problems.insert(
                0, f"objective: is a choice of {names}, and one run needs one; fix it: objective={names[:2]}"
            )
        if problems:
            raise ConfigError(problems)
        return self.branches[0].config({})

    def teacher_runs(self) -> list[TeacherRun]:
        """Every teacher that a trial of this space may need, once each."""
        runs: dict[str, TeacherRun] = {}
        for branch in self.branches:
            first = {p.name: p.domain.probes[0] for p in branch.parameters}
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
        raise ConfigError(f"path: the name of a file, got {path!r}; build_space makes a space of a tree")
    if isinstance(overrides, str) or not all(isinstance(text, str) for text in overrides or ()):
        raise ConfigError(f"overrides: a list of texts, ['optim.lr=0.1'], got {masked(repr(overrides))}")
    path = find_file(path, "search_spaces")
    tree = read_yaml(path)
    problems: list[str] = []
    for text in overrides or ():
        try:
            override(tree, text)
        except ConfigError as error:
            problems += [f"{p.replace(text, masked(text))} (in {masked(text)!r})" for p in error.problems]
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
        raise ConfigError("arms: this file lists arms, which are compared, not searched: tfkd confirm FILE", source)
    problems: list[str] = []
    notes: list[str] = []
    search = SearchConfig()
    given = tree.pop("search", None)
    if given is not None and not isinstance(given, dict):
        problems.append(f"search: needs settings below it (key: value), got {masked(repr(given))}")
        given = None
    try:
        search = validated(SearchConfig, given or {})
    except ConfigError as error:
        problems += [f"search.{p}" for p in error.problems]
    branches: list[Branch] = []
    try:
        objectives = _objectives(tree.pop("objective", None), search, notes)
        names = [name_of(o) for o in objectives]
        for name, objective in zip(names, objectives, strict=True):
            shared = dict(tree)
            if name == "tfkd_self" and TAUGHT & set(names) and isinstance(shared.get("teacher"), dict):
                # the network given is that of the others' teacher; a self teacher is the student's
                shared["teacher"] = {k: v for k, v in shared["teacher"].items() if k != "model"}
            try:
                branches.append(_branch({**shared, "objective": objective}, notes))
            except ConfigError as error:
                problems += error.problems
    except ConfigError as error:
        problems += error.problems
    if problems:
        raise ConfigError(problems, source)
    unused = _ranges(tree.get("teacher"), ("teacher",)) if not any(_needs_teacher(b.tree) for b in branches) else ()
    problems = [f"{name}: is searched, and no objective here needs a teacher; leave it out" for name in unused]
    if problems:
        raise ConfigError(problems, source)
    problems = [
        f"teacher: for {b.objective} there are {_teachers(b)} to train before the sweep, and {MAX_TEACHERS} are the "
        "most; give teacher and student fewer choices"
        for b in branches
        if _teachers(b) > MAX_TEACHERS
    ]
    if problems:
        raise ConfigError(problems, source)
    space = Space(tuple(branches), search, {})
    if weights := {str(run.weights) for run in space.teacher_runs() if run.weights}:
        notes.append(
            f"teacher.weights: what {' and '.join(sorted(weights))} was trained on is not known here; if it has seen "
            "the validation images, its students look better than they are"
        )
    given_samples = "num_samples" in search.model_fields_set
    space = dataclasses.replace(space, notes=tuple(dict.fromkeys(notes)))
    size = sum(group.grid_size or 0 for group in space.groups)
    if isinstance(search.sampler, Grid) and not given_samples and size:
        search = search.model_copy(update={"num_samples": size})
    space = dataclasses.replace(space, search=search, tree=_resolved(branches, search))
    if (space.parameters or len(branches) > 1) and not space.example.data.val_fraction:
        raise ConfigError("data.val_fraction: a sweep chooses on validation, so it must be above 0, got 0", source)
    if search.num_samples < len(branches) and search.split:
        message = f"search.num_samples: {len(branches)} objectives share it equally, got {search.num_samples}"
        raise ConfigError(message, source)
    problems = [f"search.{p}" for p in _search_problems(space, size)]
    if problems:
        raise ConfigError(problems, source)
    return dataclasses.replace(space, notes=(*space.notes, *_idle(space), *_few_points(space)))


def _idle(space: Space) -> Iterator[str]:
    """That trials differ in nothing, where they do."""
    share = space.search.num_samples // len(space.groups)
    idle = [b.objective for b in space.branches if not b.parameters]
    if share < 2 or not idle or (len(idle) < len(space.branches) and not space.search.split):
        return
    whose = f"the {share} trials of {', '.join(idle)} each" if len(space.groups) > 1 else f"all {share} trials"
    what = "nothing is searched" if len(idle) == len(space.branches) else f"nothing is searched for {', '.join(idle)}"
    yield (
        f"{what}: {whose} are one and the same run, seed included; write a range, or train it once with tfkd train, or "
        "over several seeds with tfkd confirm and a file of arms"
    )


def _teachers(branch: Branch) -> int:
    """Combinations of choices that a trial's teacher may depend on."""
    return _combinations([dataclasses.replace(p, domain=_one_of(p.domain)) for p in branch.makes_teachers]) or 1


def _one_of(domain: Domain) -> Domain:
    """Choices as they are, and a range as its low end alone, with which teachers are trained."""
    return domain if isinstance(domain, Choices) else Choices((domain.probes[0],))


def _few_points(space: Space) -> Iterator[str]:
    """That trials repeat others, where there are hardly more of them than different ones."""
    share = space.search.num_samples // len(space.groups)
    sizes = {g.name: g.size for g in space.groups if any(b.parameters for b in g.branches)}
    few = {name: size for name, size in sizes.items() if size is not None and size < 2 * share}
    if share < 2 or not few or isinstance(space.search.sampler, Grid):
        return
    points = ", ".join(f"{size} different trials of {name}" for name, size in few.items())
    gridded = all((group.grid_size or MAX_GRID + 1) <= MAX_GRID for group in space.groups)
    way = "write a range, or more choices, or lower search.num_samples"
    if gridded:
        way = "search.sampler: grid, with num_samples left out, runs each once"
    yield f"there are only {points}: of {share} that are proposed, some are likely to repeat others; {way}"


MAX_TEACHERS = 1000
MAX_GRID = 100_000
MAX_RUNGS = 10_000
MAX_STEPS = 1_000_000


def _search_problems(space: Space, grid_size: int) -> Iterator[str]:
    """What does not go together in how a space is searched."""
    search, sampler, stopping, epochs = space.search, space.search.sampler, space.search.stopping, space.epochs
    share = search.num_samples // len(space.groups)
    if sampler.needs and importlib.util.find_spec(sampler.needs) is None:
        yield f"sampler: {sampler} needs the package {sampler.needs}, which is not here: pip install {sampler.needs}"
    if not sampler.choices:
        for p in (p for p in space.parameters if isinstance(p.domain, Choices)):
            yield f"sampler: {sampler} proposes numbers only, and {p.name} is a choice; use tpe, or fix {p.name}"
    if not sampler.together and not search.split and len(space.branches) > 1:
        yield f"sampler: {sampler} cannot choose among objectives; use tpe or random, or split: true"
    elif not sampler.together and (nested := sorted({p.within[0] for p in space.parameters if p.within})):
        yield (
            f"sampler: {sampler} cannot choose among items of {' and '.join(nested)} with ranges of their own; use tpe "
            "or random"
        )
    elif isinstance(sampler, Grid):
        endless = [p for p in space.parameters if p.domain.size is None]
        for p in endless:
            yield f"sampler: grid needs choices or a step, and {p.name} is {p.domain}; write {{choices: [...]}}"
        if grid_size > MAX_GRID:
            yield f"sampler: a grid of {grid_size} trials is more than {MAX_GRID}; use qmc or random"
        elif not endless and search.num_samples != grid_size:
            given = search.num_samples
            yield f"num_samples: the grid has {grid_size} points, each is one trial, got {given}; leave it out"
    if isinstance(sampler, Gp):  # Optuna lists all values of each
        for p in (p for p in space.parameters if (p.domain.size or 0) > MAX_STEPS):
            yield f"sampler: gp cannot propose one of {p.domain.size} values of {p.name}; raise its step, or use tpe"
    if search.more_metrics and not sampler.several:
        yield f"sampler: {sampler} has one metric only; use tpe or gp for {', '.join(search.metrics)}"
    if "parameters" in search.more_metrics and not any(p.path[0] == "student" for p in space.parameters):
        yield "more_metrics: parameters are the same in all trials where the student is fixed; search it, or leave them"
    if search.more_metrics and not isinstance(stopping, NoStopping):
        yield (
            f"stopping: {stopping.name} judges by one metric, and there are {len(search.metrics)}: a trial that is "
            "behind in one may be ahead in another; set stopping: none"
        )
    if sampler.full_length_only and not isinstance(stopping, NoStopping):
        yield f"stopping: a trial that is stopped early is missing from a generation of {sampler}; set stopping: none"
    if isinstance(stopping, Halving) and stopping.min_epochs and epochs > 1 and not stopping.rungs(epochs):
        yield (
            f"stopping: {stopping.name} would never stop a trial: min_epochs is {stopping.min_epochs} of {epochs}, and "
            "none is stopped in the last ninth; lower it, or set stopping: none"
        )
    elif isinstance(stopping, Hyperband):
        n = len(stopping.brackets(epochs))
        if n < 2:
            yield f"stopping: hyperband has no rung in {epochs} epochs, so it would stop nothing; lower min_epochs"
        elif share < 2 * n:
            yield f"stopping: hyperband's {n} brackets need {2 * n} trials of each objective, got {share}; use halving"
    if isinstance(stopping, Median) and epochs // (stopping.min_epochs or epochs) > MAX_RUNGS:
        yield f"stopping: median would judge a trial {epochs // (stopping.min_epochs or 1)} times; raise min_epochs"
    if isinstance(stopping, Median) and share <= stopping.startup:
        yield (
            f"stopping: median begins after {stopping.startup} full-length trials of an objective, and each has "
            f"{share}; lower startup, or use halving"
        )
    if search.gpu_hours is not None and not space.example.gpus_per_worker:
        yield "gpu_hours: trials here use no GPU, so it would never end; set gpus_per_worker, or use cpu_hours"


def pinned(space: Space) -> Space:
    """The same space on the data that are here, which it names by their digest; see `Dataset.pinned`."""
    return with_digest(space, space.example.data.pinned().digest)


def with_digest(space: Space, digest: str | None) -> Space:
    """The same space on data of this digest."""
    if space.example.data.digest == digest:
        return space
    found = build_space({**space.tree, "data": {**space.tree["data"], "digest": digest}})
    return dataclasses.replace(found, notes=space.notes, search=space.search)  # a tree has no password


def _objectives(given: Any, search: SearchConfig, notes: list[str]) -> list[Any]:
    if given is None:
        raise ConfigError("objective: required, and not given; for example: objective: [ce, lsr, tfkd_reg]")
    if not isinstance(given, list):
        return [given]
    if not given:
        raise ConfigError("objective: an empty list; for example: objective: [ce, lsr, tfkd_reg]")
    names = [name_of(o) for o in given]
    twice = {n for n in names if n is not None and names.count(n) > 1}
    if twice:
        raise ConfigError(f"objective: {', '.join(sorted(twice))} is listed twice; widen one range instead")
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


def _branch(tree: Tree, notes: list[str]) -> Branch:
    tree = {**tree, "objective": named(tree["objective"])}
    if not isinstance(tree["objective"], dict):
        raise ConfigError(f"objective: needs a name or settings, got {tree['objective']!r}")
    objective = str(tree["objective"].get("name", "?"))
    problems: list[str] = []
    found: list[Parameter] = []

    def visit(value: Any, path: Path_, name: Path_, within: tuple[str, Any] | None = None) -> Any:
        """The tree without its ranges; a faulty one leaves the default, so that the rest can be checked, too.

        Args:
            name: the path as a person writes it.
            within: the item of choices that this is a part of.
        """
        if not isinstance(value, dict):
            return value
        below = {}
        for key, v in value.items():
            there = (*path, str(key))
            called = (*name, str(key)) if within else public_path(there, objective)
            try:
                domain = domain_of(v, called, notes, whole=is_whole(called))
                if domain is None and isinstance(v, list | dict) and is_number(called):
                    raise ConfigError(range_meant(v, called))
            except ConfigError as error:
                problems.extend(error.problems)
                continue
            if domain is None:
                below[key] = visit(v, there, called, within)
                continue
            parameter = Parameter(".".join(called), there, domain, within)
            found.append(parameter)
            below[key] = None
            if isinstance(domain, Choices) and domain.written:
                for item, bare, label in zip(domain.written, domain.values, labels_of(domain.values), strict=True):
                    visit(item, there, (*called, label), (parameter.name, bare))
        return below

    template: Tree = visit(tree, (), ())
    names = [p.name for p in found]
    problems += [
        f"{name}: two settings are searched under this name, as a key has a dot in it; give the key another name"
        for name in dict.fromkeys(names)
        if names.count(name) > 1
    ]
    # by name: the order in which a sampler is asked is part of its answers, and must outlive the file's layout
    parameters = tuple(sorted(found, key=lambda p: p.name))
    if not _needs_teacher(tree):  # its settings do nothing here, so they are not searched
        idle = Branch(objective, template, tuple(p for p in parameters if p.path[0] == "teacher"))
        first = {p.name: p.domain.probes[0] for p in idle.parameters}
        for p in idle.asked(first):
            p.put(template, first[p.name])
        parameters = tuple(p for p in parameters if p.path[0] != "teacher")
    for p in parameters:
        problems += _not_searchable(p.path, p.domain, p.name)
    branch = Branch(objective, template, parameters)
    for values in _corners(parameters):
        try:
            allowed = branch.config(values).objective.searchable
            for p in parameters:
                if p.path[0] == "objective" and allowed is not None and p.path[-1] not in allowed:
                    problems.append(
                        f"{p.name}: fixed only: whatever its value, this loss is a label smoothing times a constant; "
                        f"search {' and '.join(sorted(allowed))}"
                    )
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    # one for the sweep, also where students are searched: that of those that gain, as the others lose little
    first = {p.name: p.domain.probes[0] for p in parameters}
    students = itertools.islice(_every_choice([p for p in parameters if p.path[0] == "student"]), MAX_CORNERS)
    precisions = {branch.config({**first, **values}).precision for values in students}
    template |= {"precision": "bf16" if "bf16" in precisions else "fp32"}
    return branch


def _not_searchable(path: Path_, domain: Domain, name: str) -> Iterator[str]:
    top = path[0]
    if top in RUN_ONLY or top in ("recipe", "data", "epochs", "seed", "batch_norm", "precision", "compile"):
        yield f"{name}: one value for the whole sweep; trials that differ in it cannot be compared"
    if path in (("objective",), ("objective", "name")):
        yield f"{name}: write a list instead: objective: [ce, lsr, ...]"
    elif path[-1] == "name":
        above = ".".join(path[:-1])
        yield f"{name}: search the whole setting instead: {above}: {{choices: [NAME, {{name: NAME, ...}}]}}"
    if top == "teacher" and isinstance(domain, Range):
        yield f"{name}: choices only (teachers are trained before the sweep, each once): {{choices: [...]}}"


def public_path(path: Path_, objective: str) -> Path_:
    """The path as a person writes it: objective.kd.alpha for alpha of the kd in the list."""
    return (
        (path[0], objective, *path[1:]) if path[:1] == ("objective",) and path[1:] != ("name",) and path[1:] else path
    )


def _put(tree: Tree, path: Path_, value: Any) -> None:
    for part in path[:-1]:
        tree = tree[part]
    tree[path[-1]] = value


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


def _combinations(parameters: Sequence[Parameter], within: tuple[str, Any] | None = None) -> int | None:
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
    trees = []
    for branch in branches:
        tree = branch.config({p.name: p.domain.probes[0] for p in branch.parameters}).model_dump(mode="json")
        for parameter in branch.parameters:
            if parameter.within is None:
                _put(tree, parameter.path, as_tree(parameter.domain))
        trees.append(tree)
    objectives = [tree["objective"] for tree in trees]
    teachers = [tree["teacher"] for tree in trees if _needs_teacher(tree)] or [trees[0]["teacher"]]
    return {
        **trees[0],
        "teacher": next((t for t in teachers if t and ("choices" in t or t["model"])), teachers[0]),
        "objective": objectives if len(objectives) > 1 else objectives[0],
        "search": search.model_dump(mode="json"),
    }


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
    for depth, part in enumerate(path[:-1]):
        at: str | int = part
        if is_range(here, tuple(path[:depth])) and isinstance(
            here.get("choices"), list
        ):  # an item, by what `check` calls it
            labels = labels_of(here["choices"])
            if part not in labels:
                where = dotted(path[: depth + 1])
                raise ConfigError(f"{where}: no such item of {dotted(path[:depth])}; {did_you_mean(part, labels)}")
            here, at = here["choices"], labels.index(part)
        below = here.get(at) if isinstance(here, dict) else here[at]
        if below is None or isinstance(below, str):
            here[at] = {} if below is None else named(below)
        elif not isinstance(below, dict):
            raise ConfigError(f"{dotted(path[: depth + 1])}: is {below!r}, with nothing below it")
        here = here[at]
    here[path[-1]] = parse_yaml(value, key)


def _one_objective(tree: Tree, path: list[str]) -> tuple[Tree, list[str]]:
    """The settings of the objective that an override names, and what is left of the path."""
    given = tree.get("objective")
    listed = given if isinstance(given, list) else [given]
    settings = [named(o) for o in listed]
    names = [name_of(o) for o in settings]
    if path[1] not in names:
        known = [str(n) for n in names if n]
        raise ConfigError(f"objective.{path[1]}: not among the file's objectives; {did_you_mean(path[1], known)}")
    tree["objective"] = settings if isinstance(given, list) else settings[0]
    return settings[names.index(path[1])], path[2:]
