"""A search space: the tree of `TrainConfig` with ranges in it, and how it is searched.

In YAML a bare value is fixed. `{low, high}`, with `log: true`, `step: s` or `log_complement: true` (log-uniform in
1 - x), or `{choices: [...]}`, is searched. `objective` may be a list: a conditional choice, each member with its own
parameters. What stands in the file is checked through `TrainConfig` itself, at both ends of every range.
"""

import copy
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

from pydantic import BeforeValidator, Field

from tfkd_ray.config import RUN_ONLY, Count, TeacherRun, TrainConfig
from tfkd_ray.objectives import Canonical
from tfkd_ray.schema import (
    ConfigError,
    Settings,
    did_you_mean,
    find_file,
    leaves,
    members,
    named,
    parse_yaml,
    read_yaml,
    settings_at,
    tag,
    validated,
)

Tree = dict[str, Any]
Path_ = tuple[str, ...]

# --- how a space is searched -----------------------------------------------------------------------------------


class Halving(Settings):
    """Successive halving: at each rung only the best 1 / `factor` of its objective's trials go on."""

    name: Literal["halving"] = "halving"
    factor: Annotated[int, Field(ge=2)] = 3
    min_epochs: Count | None = None
    """Epochs before the first rung. None: epochs / factor^2, so that the rungs are at 1/9, 1/3 and 1 of the epochs."""

    def rungs(self, epochs: int) -> list[int]:
        """Epochs after which a trial is judged, ascending; the last epoch is not among them."""
        rung = self.min_epochs or max(1, epochs // self.factor**2)
        return list(itertools.takewhile(lambda r: r < epochs, (rung * self.factor**k for k in itertools.count())))


class NoStopping(Settings):
    """Every trial runs its full length."""

    name: Literal["none"] = "none"

    def rungs(self, epochs: int) -> list[int]:
        """None."""
        return []


class SearchConfig(Settings):
    """How many trials, proposed and stopped by what."""

    num_samples: Count = 24
    """Trials, over all objectives."""
    split: bool = True
    """Give every objective equally many trials and a sampler of its own. false: the sampler chooses the objective."""
    baselines: bool = True
    """Add `ce` and `lsr` where a list of objectives lacks them, so that the baselines are tuned as hard as the rest."""
    sampler: Literal["tpe", "random"] = "tpe"
    stopping: Annotated[Halving | NoStopping, Field(discriminator="name"), BeforeValidator(named)] = Halving()
    metric: Literal["val_accuracy", "val_nll", "val_ece"] = "val_accuracy"
    """A trial's value: this metric after its last epoch, on validation. Accuracy is maximised, the others minimised."""
    max_concurrent: Count | None = None
    """Trials at a time. None: as many as the cluster has room for."""
    max_failures: Annotated[int, Field(ge=0)] = 3
    """Times that a trial whose process was lost goes on from its last checkpoint before it counts as failed."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of the proposals: proposal n is a function of this seed, n, and what the study holds."""

    @property
    def mode(self) -> Literal["max", "min"]:
        """Which way is better."""
        return "max" if self.metric == "val_accuracy" else "min"


# --- ranges ----------------------------------------------------------------------------------------------------


class Suggests(Protocol):
    """The part of `optuna.Trial` that a space needs."""

    def suggest_float(self, name: str, low: float, high: float, *, step: float | None, log: bool) -> float: ...
    def suggest_int(self, name: str, low: int, high: int, *, step: int, log: bool) -> int: ...
    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any: ...


@dataclass(frozen=True)
class Range:
    """All numbers from low to high, both ends included."""

    low: float
    high: float
    log: bool = False
    step: float | None = None
    log_complement: bool = False
    """Log-uniform in 1 - x: as many trials in 0.9 to 0.99 as in 0.99 to 0.999."""
    whole: bool = False
    """Whole numbers only."""

    def suggest(self, trial: Suggests, name: str) -> float:
        """A value in the range, asked of the sampler under `name`."""
        if self.whole:
            return trial.suggest_int(name, int(self.low), int(self.high), step=int(self.step or 1), log=self.log)
        if self.log_complement:
            low, high = 1 - self.high, 1 - self.low
            return 1 - trial.suggest_float(f"1 - {name}", low, high, step=None, log=True)
        return trial.suggest_float(name, self.low, self.high, step=self.step, log=self.log)

    @property
    def probes(self) -> list[Any]:
        """Values that are valid only if the whole range is."""
        return [int(self.low), int(self.high)] if self.whole else [self.low, self.high]

    def __str__(self) -> str:
        how = (
            "log" if self.log else "log in 1 - x" if self.log_complement else f"step {self.step:g}" if self.step else ""
        )
        return f"{self.low:g} to {self.high:g}" + (f" ({how})" if how else "")


@dataclass(frozen=True)
class Choices:
    """One of a list of values (numbers, text, settings)."""

    values: tuple[Any, ...]

    def suggest(self, trial: Suggests, name: str) -> Any:
        """One of the values; the sampler sees settings as their text."""
        plain = str | int | float | bool | None
        labels = [v if isinstance(v, plain) else json.dumps(v, sort_keys=True) for v in self.values]
        return copy.deepcopy(self.values[labels.index(trial.suggest_categorical(name, labels))])

    @property
    def probes(self) -> list[Any]:
        """Values that are valid only if all are."""
        return list(self.values)

    def __str__(self) -> str:
        return " | ".join(str(v) for v in self.values)


Domain = Range | Choices
MAX_CORNERS = 256
TAUGHT = {
    str(tag(m)) for m in members(TrainConfig.model_fields["objective"]) if issubclass(m, Canonical) and m.needs_teacher
} - {"tfkd_self"}
"""Objectives whose teacher has a network of its own."""
RANGE_KEYS = {"low", "high", "log", "step", "log_complement"}


def _domain(value: Any, path: Path_, *, whole: bool | None) -> Domain | None:
    """The range or the choices that a value in a space file stands for; None if it is a plain value.

    Args:
        whole: whether the setting is an integer; None: if low, high and step are.
    """
    if not isinstance(value, dict) or not {"low", "high", "choices"} & set(value):
        return None
    where = ".".join(path)
    if "choices" in value:
        if set(value) != {"choices"}:
            raise ConfigError(f"{where}: choices stand alone, got also {', '.join(sorted(set(value) - {'choices'}))}")
        values = value["choices"]
        if not isinstance(values, list) or not values:
            raise ConfigError(f"{where}.choices: needs a list of at least one value, got {values!r}")
        if any(values.index(v) != i for i, v in enumerate(values)):
            raise ConfigError(f"{where}.choices: a value is given twice in {values!r}")
        return Choices(tuple(values))
    unknown = [key for key in value if key not in RANGE_KEYS]
    if unknown:
        raise ConfigError(
            [f"{where}.{key}: no such key of a range; {did_you_mean(key, RANGE_KEYS)}" for key in unknown]
        )
    for key in ("low", "high"):
        if not isinstance(value.get(key), int | float) or isinstance(value.get(key), bool):
            raise ConfigError(f"{where}.{key}: a range needs a number here, got {value.get(key)!r}")
    for key in ("low", "high", "step"):
        if not _is_finite(value.get(key)):
            raise ConfigError(f"{where}.{key}: a finite number, got {str(value[key])[:40]}")
    for key in ("log", "log_complement"):
        if not isinstance(value.get(key, False), bool):
            raise ConfigError(f"{where}.{key}: true or false, got {value[key]!r}")
    low, high, step = value["low"], value["high"], value.get("step")
    log, complement = value.get("log", False), value.get("log_complement", False)
    if low > high:
        raise ConfigError(f"{where}: low must not be above high, got low {low:g} and high {high:g}; swap them")
    if low == high:
        raise ConfigError(f"{where}: low and high are both {low:g}; write the value itself to fix it")
    if log and low <= 0:
        raise ConfigError(f"{where}: a log range starts above 0, got low {low:g}; raise low, or leave out log")
    if complement and not 0 <= low < high < 1:
        raise ConfigError(f"{where}: log_complement needs 0 <= low < high < 1, got low {low:g} and high {high:g}")
    if step is not None and (not isinstance(step, int | float) or isinstance(step, bool) or step <= 0):
        raise ConfigError(f"{where}.step: a number above 0, got {step!r}")
    if (step is not None) + log + complement > 1:
        raise ConfigError(f"{where}: only one of log, step and log_complement")
    if whole is None:
        whole = all(isinstance(v, int) for v in (low, high, step if step is not None else 1))
    if whole and any(v is not None and v != int(v) for v in (low, high, step)):
        raise ConfigError(f"{where}: whole numbers only, got {Range(low, high, log, step, complement)}")
    return Range(low, high, log, step, complement, whole)


def _is_finite(value: Any) -> bool:
    """Whether a number, if it is one, is finite and of a size that a float can hold."""
    return not isinstance(value, int | float) or (abs(value) < 1e300 and not math.isnan(value))


# --- the space -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parameter:
    """One searched setting."""

    name: str
    """Dotted path; below `objective` the objective's name comes first: objective.kd.temperature."""
    path: Path_
    """Where it stands in the tree of a configuration with one objective."""
    domain: Domain


@dataclass(frozen=True)
class Branch:
    """The space of one objective: a tree with holes, and the parameters that fill them."""

    objective: str
    tree: Tree
    parameters: tuple[Parameter, ...]

    def config(self, values: dict[str, Any]) -> TrainConfig:
        """The configuration for these values, by parameter name."""
        tree = copy.deepcopy(self.tree)
        for parameter in self.parameters:
            _put(tree, parameter.path, values[parameter.name])
        return validated(TrainConfig, tree)


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
        values = {p.name: p.domain.suggest(trial, p.name) for p in branch.parameters}
        return values, branch.config(values)


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
        branch = self.branches[0]
        return branch.config({p.name: p.domain.probes[0] for p in branch.parameters})

    def single(self) -> TrainConfig:
        """The one configuration of a file without ranges; a ConfigError that says what to fix otherwise."""
        problems = [
            f"{p.name}: is searched ({p.domain}), and one run needs one value; fix it: {p.name}={p.domain.probes[0]}"
            for p in self.parameters
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
            for values in _every_choice(branch.parameters):
                run = branch.config(values).teacher_run()
                if run is not None:
                    runs.setdefault(run.fingerprint(), run)
        return list(runs.values())


def load_space(path: Path | str, overrides: Sequence[str] = ()) -> Space:
    """Read, override and check a space file; every problem in it is in one ConfigError.

    Args:
        path: of the file, or the name of one that ships with the package.
        overrides: `key.path=value` each, in YAML, as on the command line.
    """
    path = find_file(path, "search_spaces")
    tree = read_yaml(path)
    problems: list[str] = []
    for text in overrides:
        try:
            override(tree, text)
        except ConfigError as error:
            problems += [f"{p} (in {text!r})" for p in error.problems]
    if problems:
        raise ConfigError(problems, "command line")
    return build_space(tree, path)


def build_space(tree: Tree, source: str | Path | None = None) -> Space:
    """A space from its tree; `source` names it in errors."""
    tree = copy.deepcopy(tree)
    problems: list[str] = []
    notes: list[str] = []
    search = SearchConfig()
    given = tree.pop("search", None)
    if given is not None and not isinstance(given, dict):
        problems.append(f"search: needs settings below it (key: value), got {given!r}")
        given = None
    try:
        search = validated(SearchConfig, given or {})
    except ConfigError as error:
        problems += [f"search.{p}" for p in error.problems]
    branches: list[Branch] = []
    try:
        objectives = _objectives(tree.pop("objective", None), search, notes)
        names = [_name(o) for o in objectives]
        for name, objective in zip(names, objectives, strict=True):
            shared = dict(tree)
            if name == "tfkd_self" and TAUGHT & set(names) and isinstance(shared.get("teacher"), dict):
                # the network given is that of the others' teacher; a self teacher is the student's
                shared["teacher"] = {k: v for k, v in shared["teacher"].items() if k != "model"}
            try:
                branches.append(_branch({**shared, "objective": objective}))
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
    runs = [run for b in branches for v in _every_choice(b.parameters) if (run := b.config(v).teacher_run())]
    if weights := {str(run.weights) for run in runs if run.weights}:
        notes.append(
            f"teacher.weights: what {' and '.join(sorted(weights))} was trained on is not known here; if it has seen "
            "the validation images, its students look better than they are"
        )
    space = Space(tuple(branches), search, _resolved(branches, search), tuple(notes))
    if (space.parameters or len(branches) > 1) and not space.example.data.val_fraction:
        raise ConfigError("data.val_fraction: a sweep chooses on validation, so it must be above 0, got 0", source)
    if search.num_samples < len(branches) and search.split:
        message = f"search.num_samples: {len(branches)} objectives share it equally, got {search.num_samples}"
        raise ConfigError(message, source)
    return space


def _objectives(given: Any, search: SearchConfig, notes: list[str]) -> list[Any]:
    if given is None:
        raise ConfigError("objective: required, and not given; for example: objective: [ce, lsr, tfkd_reg]")
    if not isinstance(given, list):
        return [given]
    if not given:
        raise ConfigError("objective: an empty list; for example: objective: [ce, lsr, tfkd_reg]")
    names = [_name(o) for o in given]
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
    return tree.get("init") == "trained" or _name(tree.get("objective")) in {*TAUGHT, "tfkd_self"}


def _name(objective: Any) -> str | None:
    """The name of an objective in a file, if it has one."""
    settings = named(objective)
    name = settings.get("name") if isinstance(settings, dict) else None
    return name if isinstance(name, str) else None


def _ranges(value: Any, path: Path_) -> Iterator[str]:
    """Dotted paths of the ranges in a part of a space."""
    if isinstance(value, dict) and {"low", "high", "choices"} & set(value):
        yield ".".join(path)
    elif isinstance(value, dict):
        for key, below in value.items():
            yield from _ranges(below, (*path, str(key)))


def _branch(tree: Tree) -> Branch:
    tree = {**tree, "objective": named(tree["objective"])}
    if not isinstance(tree["objective"], dict):
        raise ConfigError(f"objective: needs a name or settings, got {tree['objective']!r}")
    objective = str(tree["objective"].get("name", "?"))
    problems: list[str] = []
    found: list[tuple[Path_, Domain]] = []

    def visit(value: Any, path: Path_) -> Any:
        """The tree without its ranges; a faulty one leaves the default, so that the rest can be checked, too."""
        if not isinstance(value, dict):
            return value
        below = {}
        for key, v in value.items():
            there = (*path, str(key))
            try:
                domain = _domain(v, _public(there, objective), whole=_is_whole(there, objective))
            except ConfigError as error:
                problems.extend(error.problems)
                continue
            if domain is None:
                below[key] = visit(v, there)
            else:
                found.append((there, domain))
                below[key] = None
        return below

    template: Tree = visit(tree, ())
    if not _needs_teacher(tree):  # its settings do nothing here, so they are not searched
        for path, domain in found:
            if path[0] == "teacher":
                _put(template, path, copy.deepcopy(domain.probes[0]))
        found = [(path, domain) for path, domain in found if path[0] != "teacher"]
    parameters = []
    for path, domain in found:
        name = ".".join(_public(path, objective))
        parameters.append(Parameter(name, path, domain))
        problems += _not_searchable(path, domain, name)
    for values in _corners(parameters):
        probe = copy.deepcopy(template)
        for parameter in parameters:
            _put(probe, parameter.path, copy.deepcopy(values[parameter.name]))
        try:
            config = validated(TrainConfig, probe)
            allowed = config.objective.searchable
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
    # by name: the order in which a sampler is asked is part of its answers, and must outlive the file's layout
    return Branch(objective, template, tuple(sorted(parameters, key=lambda p: p.name)))


def _not_searchable(path: Path_, domain: Domain, name: str) -> Iterator[str]:
    top = path[0]
    if top in RUN_ONLY or top in ("recipe", "data", "epochs", "seed", "batch_norm"):
        yield f"{name}: one value for the whole sweep; trials that differ in it cannot be compared"
    if path in (("objective",), ("objective", "name")):
        yield f"{name}: write a list instead: objective: [ce, lsr, ...]"
    elif path[-1] == "name":
        above = ".".join(path[:-1])
        yield f"{name}: search the whole setting instead: {above}: {{choices: [NAME, {{name: NAME, ...}}]}}"
    if top == "teacher" and isinstance(domain, Range):
        yield f"{name}: choices only (teachers are trained before the sweep, each once): {{choices: [...]}}"


def _is_whole(path: Path_, objective: str) -> bool | None:
    """Whether the setting at a path is an integer; None if it is not ours (an argument of a person's own function)."""
    *above, last = _public(path, objective)
    models = [TrainConfig]
    for part in above:
        below = [m for model in models if part in model.model_fields for m in members(model.model_fields[part])]
        models = below or [m for m in models if tag(m) == part]  # type: ignore[assignment]
    fields = [m.model_fields[last] for m in models if last in m.model_fields]
    if not fields:
        return None
    return any(int in types and float not in types for types in (set(leaves(f.annotation)) for f in fields))


def _public(path: Path_, objective: str) -> Path_:
    """The path as a person writes it: objective.kd.alpha for alpha of the kd in the list."""
    return (
        (path[0], objective, *path[1:]) if path[:1] == ("objective",) and path[1:] != ("name",) and path[1:] else path
    )


def _put(tree: Tree, path: Path_, value: Any) -> None:
    for part in path[:-1]:
        tree = tree[part]
    tree[path[-1]] = value


def _every_choice(parameters: Sequence[Parameter], end: int = 0) -> Iterator[dict[str, Any]]:
    """Values for every combination of choices, with all ranges at their low (0) or high (1) end."""
    options = [p.domain.probes if isinstance(p.domain, Choices) else [p.domain.probes[end]] for p in parameters]
    for combination in itertools.product(*options):
        yield {p.name: v for p, v in zip(parameters, combination, strict=True)}


def _corners(parameters: Sequence[Parameter]) -> Iterator[dict[str, Any]]:
    """Values to check a space with: every combination of choices (of many, the first), at both ends of the ranges."""
    for end in (0, 1):
        yield from itertools.islice(_every_choice(parameters, end), MAX_CORNERS)


def _resolved(branches: Sequence[Branch], search: SearchConfig) -> Tree:
    trees = []
    for branch in branches:
        tree = branch.config({p.name: p.domain.probes[0] for p in branch.parameters}).model_dump(mode="json")
        for parameter in branch.parameters:
            _put(tree, parameter.path, _as_tree(parameter.domain))
        trees.append(tree)
    objectives = [tree["objective"] for tree in trees]
    teachers = [tree["teacher"] for tree in trees if _needs_teacher(tree)] or [trees[0]["teacher"]]
    return {
        **trees[0],
        "teacher": next((t for t in teachers if t and t["model"]), teachers[0]),
        "objective": objectives if len(objectives) > 1 else objectives[0],
        "search": search.model_dump(mode="json"),
    }


def _as_tree(domain: Domain) -> Tree:
    if isinstance(domain, Choices):
        return {"choices": list(domain.values)}
    tree: Tree = {"low": domain.probes[0], "high": domain.probes[1]}
    tree |= {"log": True} if domain.log else {}
    tree |= {"step": domain.step} if domain.step else {}
    return tree | ({"log_complement": True} if domain.log_complement else {})


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
        below = here.get(part) if isinstance(here, dict) else None
        if below is None or isinstance(below, str):
            here[part] = {} if below is None else named(below)
        elif not isinstance(below, dict):
            raise ConfigError(f"{'.'.join(path[: depth + 1])}: is {below!r}, with nothing below it")
        here = here[part]
    here[path[-1]] = parse_yaml(value, key)


def _one_objective(tree: Tree, path: list[str]) -> tuple[Tree, list[str]]:
    """The settings of the objective that an override names, and what is left of the path."""
    given = tree.get("objective")
    listed = given if isinstance(given, list) else [given]
    settings = [named(o) for o in listed]
    names = [_name(o) for o in settings]
    if path[1] not in names:
        known = [str(n) for n in names if n]
        raise ConfigError(f"objective.{path[1]}: not among the file's objectives; {did_you_mean(path[1], known)}")
    tree["objective"] = settings if isinstance(given, list) else settings[0]
    return settings[names.index(path[1])], path[2:]
