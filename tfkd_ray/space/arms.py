"""Arms: named, fixed configurations that are compared over several seeds, and the file of them.

A file has settings shared by all arms, as in a search space, and `arms`: each with a `name`, its
own settings and its published accuracy. An arm's settings override the shared ones.
"""

import copy
import os
import sys
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints

from tfkd_ray.learn.config import (
    RUN_ONLY,
    WITHOUT_LABELS,
    TeacherConfig,
    TrainConfig,
    filled,
    number_teachers,
)
from tfkd_ray.learn.dataset import Dataset
from tfkd_ray.learn.objectives import PUBLISHED, OwnObjective
from tfkd_ray.learn.optimizers import OwnOptimizer
from tfkd_ray.learn.own_loop import OwnLoop
from tfkd_ray.settings import own_code
from tfkd_ray.settings.errors import ConfigError, Sentences, did_you_mean, dotted
from tfkd_ray.settings.files import write_text
from tfkd_ray.settings.passwords import masked
from tfkd_ray.settings.schema import Settings, name_alone, validated
from tfkd_ray.settings.yaml import Tree, Values, dump_yaml, existing_space, read_yaml
from tfkd_ray.space.baselines import FEWEST_TRIALS, doubted, doubts
from tfkd_ray.space.blame import blamed
from tfkd_ray.space.ranges import Domain, name_of
from tfkd_ray.space.space import (
    NEVER_TAUGHT,
    TUNED_BASELINES,
    Space,
    build_space,
    override,
    without_unlabelled,
)
from tfkd_ray.store.experiment import (
    BASELINES,
    Record,
    about_now,
    check_new,
    damaged,
    ranked_trials,
    read_experiment,
    read_records,
    selection_limits,
    selection_metric,
)
from tfkd_ray.verdict import scores
from tfkd_ray.verdict.limits import is_feasible, limits_text, met_text
from tfkd_ray.verdict.scores import Selectable
from tfkd_ray.verdict.seed_plan import SeedPlan

FIRST_SEED = 1001
"""First seed for arms; it is far from the seeds of sweeps."""
TEACHER_SEEDS = 1_000_000
"""Offset of a teacher's seed from its student's, so that a self teacher is a different run."""
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=48)]
Percent = Annotated[float, Field(ge=0, le=100)]


class Released(Settings):
    """A setting as the Tf-KD authors released it; `objectives.from_released` makes it canonical."""

    alpha: float
    temperature: float
    multiplier: float = 1.0


class Arm(Settings):
    """One arm: its configuration and its published result."""

    name: Name
    config: TrainConfig
    published: Percent | None = None
    """Published test accuracy, in per cent."""
    published_std: Percent | None = None
    published_n: Annotated[int, Field(ge=1)] | None = None
    baseline: str | None = None
    """Name of the arm with which this one is compared."""
    released: Released | None = None
    """Released setting that the objective was converted from; for information only."""
    role: Literal["candidate", "baseline", "reference"] | None = None
    """A candidate is judged against the baselines with the same student; a reference is only shown.
    None: plain training and label smoothing are baselines, all others candidates."""

    @property
    def part(self) -> str:
        """Return its role, explicit or default."""
        return self.role or (
            "baseline" if self.config.objective.name in ("ce", "lsr") else "candidate"
        )


class Arms(Settings):
    """Arms that are compared with each other on the same data, with the same run settings."""

    arms: Annotated[tuple[Arm, ...], Field(min_length=1)]
    title: str = ""
    source: str = ""
    """Source of the published numbers."""
    note: str = ""
    preset: Literal["smoke"] | None = None
    """smoke: a scaled-down comparison, as a quick try; its numbers are not comparable with
    published ones."""
    searched: Annotated[int, Field(ge=1)] | None = None
    """Number of configurations of the search that selected the candidates."""
    experiment: str | None = None
    """Name of the sweep that the candidates come from, in the same storage."""
    metric: Selectable = "val_accuracy"
    """Test metric that the verdict uses."""

    @property
    def example(self) -> TrainConfig:
        """Return a configuration with the data and the run settings that all arms share.

        It is one with unlabelled images, if there is any.
        """
        configs = [arm.config for arm in self.arms]
        return next((c for c in configs if c.data.unlabelled is not None), configs[0])

    def named(self, name: str) -> Arm:
        """Return the arm of that name."""
        return next(arm for arm in self.arms if arm.name == name)


@dataclass(frozen=True)
class Run:
    """One arm with one seed."""

    arm: str
    seed: int
    config: TrainConfig

    @property
    def name(self) -> str:
        """Return the name of its folder."""
        return f"{self.arm}-s{self.seed}"


def is_arms_file(path: Path | str) -> bool:
    """Return whether a file, or the packaged one of that name, lists arms and is not a space."""
    return "arms" in read_yaml(existing_space(path))


def load_arms(
    path: Path | str, overrides: Sequence[str] = (), *, preset: str | None = None
) -> Arms:
    """Read and check an arms file; raise one ConfigError with all its problems.

    Args:
        path: of the file, or the name of a packaged one (paper/table_1).
        overrides: `key.path=value` each, applied to every arm.
        preset: `smoke` scales every arm down: see `Arms.preset`.
    """
    path = existing_space(path)
    tree = read_yaml(path)
    try:
        return build_arms(tree, path, overrides, preset=preset)
    except ConfigError as error:
        raise blamed(
            error, path, overrides, lambda words: build_arms(tree, path, words, preset=preset)
        ) from None


def build_arms(
    tree: Values,
    source: str | Path | None = None,
    overrides: Sequence[str] = (),
    *,
    preset: str | None = None,
) -> Arms:
    """Return arms from their tree; raise a ConfigError that names `source` as their file."""
    shared = {k: v for k, v in tree.items() if k not in Arms.model_fields}
    given = tree.get("arms")
    if not isinstance(given, list) or not given:
        message = "arms: needs a list of at least one arm, each with a name and an objective"
        if given is None and "objective" in tree:
            message = (
                "is a search space without arms to compare; sweep it with `tfkd tune`, then compare its best trials "
                "with `tfkd confirm EXPERIMENT`"
            )
        raise ConfigError(message, source)
    arms: list[Tree] = []
    problems: list[str] = []
    for number, arm in enumerate(given):
        try:
            arms.append(_arm(number, arm, shared, overrides, preset))
        except ConfigError as error:
            problems += error.problems
    if preset not in (None, "smoke"):
        problems.append(f"--preset: no such preset {preset!r}; known: smoke")
    if problems:
        raise ConfigError(problems, source)
    about = {k: tree[k] for k in ("title", "source", "note", "searched", "metric") if k in tree}
    if overrides:
        about["note"] = (
            f"{about.get('note', '')} Changed from the file: {' '.join(overrides)}.".strip()
        )
    compared = validated(Arms, {**about, "arms": arms, "preset": preset}, source)
    problems = list(_arm_problems(compared))
    if _says_unlabelled(dict(shared)) and compared.example.data.unlabelled is None:
        learn = ", ".join(sorted(WITHOUT_LABELS))
        problems.append(
            f"data.unlabelled: no arm learns from images without labels; leave it out, or compare one of {learn}"
        )
    if problems:
        raise ConfigError(problems, source)
    return compared


def _arm(
    number: int,
    given: Any,
    shared: Values,
    overrides: Sequence[str],
    preset: str | None,
) -> Tree:
    """Return one arm of a file: its own settings, and its configuration with the shared ones."""
    if not isinstance(given, dict):
        raise ConfigError(f"arms.{number}: needs settings (name, objective, ...), got {given!r}")
    own = {k: v for k, v in given.items() if k in Arm.model_fields and k != "config"}
    config = {k: copy.deepcopy(v) for k, v in given.items() if k not in own}
    config = filled(config, copy.deepcopy(dict(shared)))
    number_teachers(config)
    try:
        for text in overrides:
            override(config, text)
        if preset == "smoke":
            config = _smoke(config)
        if name_of(config.get("objective")) in NEVER_TAUGHT and not _says_unlabelled(given):
            config = without_unlabelled(config)
        return {**own, "config": validated(TrainConfig, config)}
    except ConfigError as error:
        where = dotted(["arms", own.get("name", number)])
        raise ConfigError(f"{where}.{p}" for p in error.problems) from None


def _says_unlabelled(given: Tree) -> bool:
    """Return whether an arm's own settings, not the shared ones, have unlabelled images."""
    data = given.get("data")
    return isinstance(data, Mapping) and data.get("unlabelled") is not None


def _arm_problems(compared: Arms) -> Sentences:
    names = [arm.name for arm in compared.arms]
    folders = [name.lower() for name in names]  # some file systems do not know case
    first = compared.example
    made: dict[str, str] = {}
    runs = runs_of(compared, [FIRST_SEED], hold_out=True)
    twins = {run.arm: run.config.fingerprint() for run in runs}
    for arm in compared.arms:
        if folders.count(arm.name.lower()) > 1 and arm is compared.named(arm.name):
            yield f"arms.{arm.name}: two arms have this name"
        if arm.baseline is not None and arm.baseline not in names:
            yield f"arms.{arm.name}.baseline: no arm {arm.baseline!r}; {did_you_mean(arm.baseline, names)}"
        twin = made.setdefault(twins[arm.name], arm.name)
        if twin != arm.name:
            yield f"arms.{arm.name}: the same configuration as {twin}; leave one out, or change it"
        if arm.config.data.labelled != first.data.labelled:
            yield f"arms.{arm.name}.data: all arms are compared on the same data, those of {names[0]}"
        if arm.config.data.unlabelled not in (None, first.data.unlabelled):
            yield (
                f"arms.{arm.name}.data.unlabelled: all arms that have unlabelled images have the same ones, "
                f"{first.data.unlabelled}, got {arm.config.data.unlabelled}"
            )
        for key in sorted(RUN_ONLY):
            if getattr(arm.config, key) != getattr(first, key):
                yield f"arms.{arm.name}.{key}: one value for all arms; say it at the top of the file"


def seeds_from(count: int, taken: int | None = None) -> list[int]:
    """Return so many seeds of a comparison, without the seed that a sweep has taken."""
    return [seed for seed in range(FIRST_SEED, FIRST_SEED + count + 1) if seed != taken][:count]


def runs_of(
    compared: Arms, seeds: Sequence[int], *, teacher_per_seed: bool = False, hold_out: bool = False
) -> list[Run]:
    """Return the runs of all arms, seed by seed, so that an interrupted comparison has whole seeds.

    A self teacher is trained for each seed; a teacher with another network is shared by the seeds,
    unless `teacher_per_seed`. Training uses train and validation; with `hold_out` only train.
    """
    runs = []
    for seed in seeds:
        for arm in compared.arms:
            config = arm.config
            changes: Tree = {"seed": seed}
            if not hold_out:
                changes["data"] = config.data.model_copy(update={"val_fraction": 0.0})
            if config.needs_teacher:
                changes |= _teachers_of_seed(config, seed, teacher_per_seed=teacher_per_seed)
            tree = config.model_copy(update=changes).tree
            try:
                runs.append(Run(arm.name, seed, validated(TrainConfig, tree)))
            except ConfigError as error:
                raise ConfigError([f"arms.{arm.name}.{p}" for p in error.problems]) from None
    return runs


def _teachers_of_seed(config: TrainConfig, seed: int, *, teacher_per_seed: bool) -> Tree:
    """Return the settings of the teachers that a seed does not share with others, changed."""
    if config.teachers:
        several = dict(config.teachers)
        for k, (name, one) in enumerate(config.teachers.items(), start=1):
            if teacher_per_seed or one.model == config.student:
                several[name] = one.model_copy(update={"seed": k * TEACHER_SEEDS + seed})
        return {"teachers": several}
    own_teacher = config.teacher is not None and config.teacher.model not in (None, config.student)
    if own_teacher and not teacher_per_seed:
        return {}
    run = config.teacher_run()
    assert run is not None, f"{config=}"
    teacher = config.teacher or TeacherConfig(optim=run.optim, schedule=run.schedule)
    return {"teacher": teacher.model_copy(update={"seed": TEACHER_SEEDS + seed})}


# --- arms of a sweep ------------------------------------------------------------------------------

RIVALS = (*BASELINES, "scaled", "published")
"""Kinds of baselines for the best of a sweep: see `arms_of`."""
NEAR = 0.05
"""Configurations are near-copies if they differ by less than this share of every range."""


def rivals_of(text: str) -> list[str]:
    """Return some of RIVALS from a comma-separated list."""
    words = text.split(",")
    if wrong := [word for word in words if word not in RIVALS]:
        raise ConfigError(
            [f"no such baseline {word!r}; {did_you_mean(word, RIVALS)}" for word in wrong],
            "--baselines",
        )
    if not {*words} - {"published"}:
        raise ConfigError(
            "`published` is shown but not judged; also name a baseline to beat: ce, lsr or scaled",
            "--baselines",
        )
    return words


def untuned(experiment: Path) -> dict[str, int]:
    """Return the baselines to tune before a verdict, and how many trials each of them needs.

    These are baselines with fewer trials than the winner's objective, without one of full length,
    and those that are hardly tuned. A baseline whose settings are all fixed is not one of them.
    """
    winner = _candidates(experiment, 1)[0]
    records = read_records(experiment)
    ended: dict[str, list[str]] = {}
    for record in records:
        ended.setdefault(record.objective, []).append(record.status)
    trials = len(ended[winner.objective])
    metric, limits = selection_metric(experiment), selection_limits(experiment)
    in_name_only = {doubt.baseline for doubt in doubts(records, metric, limits)}
    lacking = {}
    for name in BASELINES:
        of_it = ended.get(name, [])
        lacks = name in in_name_only or len(of_it) < trials or "done" not in of_it
        if lacks and baseline_space(experiment, [name], 1).parameters:
            lacking[name] = max(trials, FEWEST_TRIALS)
    return lacking


def baseline_space(experiment: Path, names: Iterable[str], trials: int) -> Space:
    """Return the sweep's space with these baselines as its objectives, and so many trials of each."""
    tree = copy.deepcopy(read_experiment(experiment)["space"])
    objectives = [TUNED_BASELINES[name] for name in names]
    tree = without_unlabelled(tree)
    tree["objective"] = objectives if len(objectives) > 1 else objectives[0]
    tree["teacher"] = None
    if _holds_trained(tree.get("init")):  # a baseline has no teacher
        tree["init"] = "random"
    tree.pop("teachers", None)
    own = (
        "time_budget_s",
        "gpu_hours",
        "cpu_hours",
        "max_failed_trials",
        "storage",
        "study",
        "points",
    )
    tree["search"] = {k: v for k, v in tree["search"].items() if k not in own}
    if name_of(tree["search"].get("sampler")) == "grid":  # which is over the sweep's settings
        del tree["search"]["sampler"]
    number = trials * len(objectives)
    tree["search"] |= {"num_samples": number, "split": True, "baselines": False}
    return build_space(tree, experiment / "experiment.yaml")


def _holds_trained(init: Any) -> bool:
    """Return whether a student of this part of a space may begin as a trained copy."""
    listed = init.get("choices") if isinstance(init, dict) else None
    return "trained" in (listed if isinstance(listed, list) else [init])


def arms_of(
    experiment: Path,
    *,
    top_k: int = 3,
    rivals: Sequence[str] = RIVALS,
    baselines: Path | None = None,
) -> Arms:
    """Return the best configurations of a sweep as candidates, with the arms that they must beat.

    Candidates are the `top_k` best full-length trials by the sweep's own rule, without near-copies.
    Baselines are the best `ce` and `lsr` (also from `baselines`, a sweep of those alone, if the
    sweep itself lacks them), and the winner with plain training as its objective, scaled to the
    winner's CE weight. The reference is the published setting. `rivals` may omit some; `better`
    then covers only the rest.
    """
    winners = _candidates(experiment, top_k)
    first, metric = winners[0], selection_metric(experiment)
    limits = selection_limits(experiment)
    arms: list[Tree] = []
    for winner in winners:
        arms.append({"name": winner.name, "config": winner.config, "role": "candidate"})
    there = [experiment] if baselines is None else [experiment, baselines]
    fixed = []
    for name in [b for b in BASELINES if b in rivals]:
        found = [record for where in there for record in _full(where) if record.objective == name]
        found = ranked_trials(found, metric, limits)
        rival = (
            (found[0].name, found[0].config) if found else (name, _fixed_baseline(experiment, name))
        )
        arms.append({"name": rival[0], "config": rival[1], "role": "baseline"})
        if not found or not found[0].parameters.keys() - {"objective"}:
            fixed.append(name)
    arms, notes = _with_code_of_now(arms)
    if fixed:
        notes.append(
            f"This space fixes every setting of {' and of '.join(fixed)}, so that was not tuned: a lead over it may "
            "come from a better learning rate."
        )
    records = [record for where in there for record in read_records(where)]
    found_doubts = [d for d in doubts(records, metric, limits) if d.baseline in rivals]
    if found_doubts:
        notes.append(f"Baselines {doubted(found_doubts)}.")
    if limits and not is_feasible(limits, first.judged):
        notes.append(
            f"No trial of the sweep meets its constraints ({limits_text(limits)}): {first.name} "
            f"{met_text(limits, first.judged)}."
        )
    best_run = validated(TrainConfig, arms[0]["config"])
    weight = best_run.ce_share
    if weight is None and "scaled" in rivals:
        notes.append(
            f"{first.objective} does not return CE as a separate part, so its weight of CE is unknown, and there is no "
            "baseline ce-scaled."
        )
        if isinstance(best_run.objective, OwnObjective):
            notes.append("A class with terms and ce_weight has one.")
    if weight is not None and weight > 0 and "scaled" in rivals:
        teacher = first.config["teacher"] if first.config.get("init") == "trained" else None
        scaled = {
            **first.config,
            "objective": {"name": "ce", "loss_scale": weight},
            "teacher": teacher,
        }
        scaled.pop("teachers", None)
        scaled = without_unlabelled(scaled)
        arms.append({"name": "ce-scaled", "config": scaled, "role": "baseline"})
    setting = next((p.objective for p in PUBLISHED if p.objective.name == first.objective), None)  # type: ignore[attr-defined]
    if setting is not None and "published" in rivals:
        published = {**first.config, "objective": setting.tree}
        arms.append(
            {"name": f"{first.objective}-published", "config": published, "role": "reference"}
        )
    distinct: dict[str, Tree] = {}
    for arm in arms:
        whole = validated(Arms, {"arms": [arm]})
        (run,) = runs_of(whole, [FIRST_SEED], hold_out=True)
        distinct.setdefault(run.config.fingerprint(), arm)
    return validated(
        Arms,
        {
            "title": f"{experiment.name}: the best {len(winners)} against "
            + ("baselines" if fixed else "tuned baselines"),
            "arms": list(distinct.values()),
            "note": " ".join(notes),
            "searched": len(read_records(experiment)),
            "metric": scores.of_student(metric),
            "experiment": experiment.name,
        },
        experiment,
    )


def _fixed_baseline(experiment: Path, baseline: str) -> Tree:
    """Return the configuration of a baseline whose settings are all fixed, so that nothing is tuned."""
    space = baseline_space(experiment, [baseline], 1)
    if space.parameters:
        raise ConfigError(
            f"no full-length trial of the baseline {baseline}; tune it first", experiment
        )
    return space.branches[0].config({}).tree


def _with_code_of_now(arms: list[Tree]) -> tuple[list[Tree], list[str]]:
    """Return arms with the present code of the user's own, and a note on what has changed."""
    found, notes = [], []
    for arm in arms:
        config = validated(TrainConfig, arm["config"])
        for key, own in (
            ("loop", config.loop),
            ("optim", config.optim),
            ("objective", config.objective),
        ):
            if not isinstance(own, OwnLoop | OwnOptimizer | OwnObjective):
                continue
            if (changed := own.changed()) is not None:
                notes.append(_tuned_for_old_code(changed))
                arm = {**arm, "config": {**arm["config"], key: own.as_it_is_now().tree}}
        found.append(arm)
    return found, list(dict.fromkeys(notes))


def _tuned_for_old_code(changed: str) -> str:
    return f"Since the sweep {changed}: the settings were tuned for the old code, and the new code is trained here."


def _full(experiment: Path) -> list[Record]:
    """Return the full-length trials, best first."""
    metric, limits = selection_metric(experiment), selection_limits(experiment)
    return ranked_trials(read_records(experiment), metric, limits)


def _candidates(experiment: Path, top_k: int) -> list[Record]:
    about = read_experiment(experiment)
    records = _full(experiment)
    if not records:
        raise ConfigError("no trial of full length, so there is nothing to confirm", experiment)
    others = [r for r in records if r.objective not in BASELINES]
    if not others:
        raise ConfigError(
            "only baselines were searched (ce, lsr), so there is nothing to confirm", experiment
        )
    domains = {p.name: p.domain for p in build_space(about["space"]).parameters}
    chosen: list[Record] = []
    for record in others:
        if not any(_near(record, better, domains) for better in chosen):
            chosen.append(record)
        if len(chosen) == top_k:
            break
    return chosen


def _near(a: Record, b: Record, domains: Mapping[str, Domain]) -> bool:
    if a.objective != b.objective or a.parameters.keys() != b.parameters.keys():
        return False
    distances = []
    for name, value in a.parameters.items():
        if name in domains:
            distances.append(domains[name].distance(value, b.parameters[name]))
        else:  # of a space in which the sweep went before
            distances.append(float(value != b.parameters[name]))
    return all(distance < NEAR for distance in distances)


def comparisons_of(experiment: Path) -> list[Path]:
    """Return the finished comparisons in the storage that confirmed a sweep's best."""
    found = [p.parent for p in experiment.parent.glob("*/confirm.json")]
    return sorted(p for p in found if _compared(p).get("experiment") == experiment.name)


def _compared(directory: Path) -> Tree:
    path = directory / "confirm.yaml"
    with damaged(path):
        compared: Tree = read_yaml(path)["compared"]
        compared.get  # noqa: B018
    return compared


# --- a comparison's directory ---------------------------------------------------------------------


def new_comparison(
    compared: Arms,
    seeds: Sequence[int],
    directory: Path,
    *,
    teacher_per_seed: bool = False,
    hold_out: bool = False,
    strict: bool = False,
    first_look: int | None = None,
) -> None:
    """Create a comparison's directory; for wrong input, raise a ConfigError and write nothing.

    Args:
        first_look: seeds before the first look of a sequential comparison, which takes all seeds at
            most. None: the number of seeds is fixed.
    """
    from tfkd_ray.learn.loop import LOOP_VERSION

    check_new(directory)
    digests = compared.example.data.pinned().digests
    runs_of(compared, seeds, teacher_per_seed=teacher_per_seed, hold_out=hold_out)
    about = {
        **about_now([masked(word) for word in sys.argv], compared.tree),
        "id": uuid.uuid4().hex,
        "loop_version": LOOP_VERSION,
        "fail_if_not_better": strict,
        **digests,
        "seeds": list(seeds),
        **({} if first_look is None else {"first_look": first_look, "most_seeds": len(seeds)}),
        "teacher_per_seed": teacher_per_seed,
        "hold_out": hold_out,
        "compared": compared.tree,
    }
    partial = directory.with_name(f".{directory.name}.{about['id']}")
    write_text(partial / "confirm.yaml", dump_yaml(about))
    partial.rename(directory)


@dataclass(frozen=True)
class Comparison:
    """A comparison, as read from its directory."""

    arms: Arms
    runs: list[Run]
    hold_out: bool
    """True if validation was left out of training."""
    id: str
    """Identity of this comparison, independent of its name."""
    strict: bool
    """True if the comparison fails when no candidate is better."""
    made_with: tuple[str, int]
    """(torch version, loop version) of its runs."""

    is_trained: bool
    """True if every run has finished."""

    digests: Mapping[str, str] = field(default_factory=dict)
    """Digests of its runs' data; none if it began before data had digests."""
    plan: SeedPlan | None = None
    """Looks of a sequential comparison; None if the number of seeds is fixed."""
    ended: bool = True
    """False if a sequential comparison may still take more looks."""

    @property
    def seeds(self) -> list[int]:
        """Return the seeds of all arms, in order; of a sequential comparison, at most these."""
        return list(dict.fromkeys(run.seed for run in self.runs))

    @property
    def data(self) -> Dataset:
        """Return the data set of all runs."""
        return self.runs[0].config.data

    @property
    def runs_on_data(self) -> list[Run]:
        """Return its runs, with the recorded digests of their data."""
        return [replace(run, config=run.config.with_digests(self.digests)) for run in self.runs]


def read_comparison(directory: Path) -> Comparison:
    """Return the comparison in a directory; raise a ConfigError if there is none."""
    path = directory / "confirm.yaml"
    if not os.path.lexists(path):
        raise ConfigError("not a comparison of arms: there is no confirm.yaml in it", directory)
    about = read_yaml(path, follow=False)
    own_code.remember(about.get("directory"))
    with damaged(path):
        arms = validated(Arms, about["compared"], path)
        options = {key: bool(about[key]) for key in ("teacher_per_seed", "hold_out")}
        runs = runs_of(arms, [int(seed) for seed in about["seeds"]], **options)
        made_with = (str(about["versions"]["torch"]), int(about["loop_version"]))
        names: list[str] = [name for name in ("digest", "unlabelled_digest") if name in about]
        digests = {name: str(about[name]) for name in names}
        id, strict = str(about["id"]), bool(about["fail_if_not_better"])
        plan = None
        if "first_look" in about:
            plan = SeedPlan(int(about["first_look"]), int(about["most_seeds"]))
        ended = plan is None or bool(about.get("ended"))
    done = {record.name for record in read_records(directory) if record.status == "done"}
    is_trained = done >= {run.name for run in runs}
    held = options["hold_out"]
    return Comparison(arms, runs, held, id, strict, made_with, is_trained, digests, plan, ended)


def end_comparison(directory: Path, seeds: int) -> None:
    """Record that a sequential comparison took its last look at this number of seeds."""
    about = read_yaml(directory / "confirm.yaml", follow=False)
    about |= {"seeds": about["seeds"][:seeds], "ended": True}
    write_text(directory / "confirm.yaml", dump_yaml(about))


# --- presets --------------------------------------------------------------------------------------

_BY_SIZE = [
    "cnn5", "shufflenet_v2_x1_0", "mobilenet_v2", "googlenet", "densenet121", "resnet18", "resnet34", "resnet50",
    "resnext29", "resnet101", "resnext101_32x8d",
]  # fmt: skip
"""The paper's networks, roughly by size; in the preset each has a different width, so that they
stay distinct."""


def _smoke(tree: Tree) -> Tree:
    """Return a scaled-down configuration for one process.

    It has two epochs, about a thousand images, and networks of one convolution.
    """
    data = name_alone(tree.get("data", "digits"))
    if isinstance(data, dict):
        data = {**data, "subset": 1000}
    small = {**tree, "epochs": 2, "data": data}
    small |= {
        "workers": 1,
        "gpus_per_worker": 0,
        "accelerator_type": None,
        "resources": {},
        "batch_norm": "local",
        "student": _small_network(tree.get("student", "mlp")),
    }
    if isinstance(tree.get("teacher"), dict):
        small["teacher"] = _small_teacher(tree["teacher"])
    if isinstance(tree.get("teachers"), dict):
        small["teachers"] = {k: _small_teacher(v) for k, v in tree["teachers"].items()}
    return small


def _small_teacher(given: Any) -> Any:
    """Return a teacher's settings, trained here for two epochs at most."""
    if not isinstance(given, dict):
        return given
    left_out = ("epochs", "weights", "stop_accuracy")
    teacher = {k: v for k, v in given.items() if k not in left_out}
    if teacher.get("model"):
        teacher["model"] = _small_network(teacher["model"])
    if teacher.get("stop_epoch"):
        teacher["stop_epoch"] = 1
    return teacher


def _small_network(network: Any) -> Any:
    name = name_of(network)
    if name in (None, "mlp", "cnn"):
        return network
    size = _BY_SIZE.index(name) if name in _BY_SIZE else len(_BY_SIZE)
    return {"name": "cnn", "widths": [8 + size]}
