"""Arms: named, fixed configurations that are compared over several seeds, and the file that lists them.

A file has the settings that all arms share, as in a search space, and `arms`: each with a `name`, its own settings, and
what a paper printed for it. An arm's settings go before the shared ones.
"""

import copy
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints

from tfkd_ray.config import RUN_ONLY, TeacherConfig, TrainConfig, filled
from tfkd_ray.data import Dataset
from tfkd_ray.experiment import about_now, check_new, read_records, write_text
from tfkd_ray.schema import ConfigError, Settings, did_you_mean, dump_yaml, find_file, named, read_yaml, validated
from tfkd_ray.space import override

FIRST_SEED = 1001
"""Of the seeds that arms are trained with; far from those that sweeps are run with."""
Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_.-]*$", max_length=48)]
Percent = Annotated[float, Field(ge=0, le=100)]


class Released(Settings):
    """A setting as the Tf-KD authors released it; `objectives.from_released` makes it canonical."""

    alpha: float
    temperature: float
    multiplier: float = 1.0


class Arm(Settings):
    """One arm: its configuration, and what was published for it."""

    name: Name
    config: TrainConfig
    published: Percent | None = None
    """Test accuracy in per cent, as printed."""
    published_std: Percent | None = None
    published_n: Annotated[int, Field(ge=1)] | None = None
    baseline: str | None = None
    """The arm whose difference from this one is of interest."""
    released: Released | None = None
    """Where the objective was converted from; changes nothing."""
    role: Literal["candidate", "baseline", "reference"] | None = None
    """A candidate is judged against the baselines with the same student; a reference is only shown. None: plain
    training and label smoothing are baselines, all else candidates."""

    @property
    def part(self) -> str:
        """Its role, given or implied."""
        return self.role or ("baseline" if self.config.objective.name in ("ce", "lsr") else "candidate")


class Arms(Settings):
    """Arms that are compared with each other: on the same data, run in the same way."""

    arms: Annotated[tuple[Arm, ...], Field(min_length=1)]
    title: str = ""
    source: str = ""
    """Where the published numbers are from."""
    note: str = ""
    preset: Literal["smoke"] | None = None
    """smoke: scaled down, to see it run; its numbers cannot be compared with anything published."""
    searched: Annotated[int, Field(ge=1)] | None = None
    """Configurations that the candidates are the best of."""

    @property
    def example(self) -> TrainConfig:
        """A configuration that says where every arm runs, and on which data."""
        return self.arms[0].config

    def named(self, name: str) -> Arm:
        """The arm of that name."""
        return next(arm for arm in self.arms if arm.name == name)


@dataclass(frozen=True)
class Run:
    """One arm with one seed."""

    arm: str
    seed: int
    config: TrainConfig

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.arm}-s{self.seed}"


def is_arms_file(path: Path | str) -> bool:
    """Whether a file, or the one of that name that ships with the package, lists arms; else it is a space."""
    return "arms" in read_yaml(find_file(path, "search_spaces"))


def load_arms(path: Path | str, overrides: Sequence[str] = (), *, preset: str | None = None) -> Arms:
    """Read and check an arms file; every problem in it is in one ConfigError.

    Args:
        path: of the file, or the name of one that ships with the package (paper/table_1).
        overrides: `key.path=value` each, put into every arm.
        preset: `smoke` scales every arm down: see `Arms.preset`.
    """
    path = find_file(path, "search_spaces")
    return build_arms(read_yaml(path), path, overrides, preset=preset)


def build_arms(
    tree: Mapping[str, Any],
    source: str | Path | None = None,
    overrides: Sequence[str] = (),
    *,
    preset: str | None = None,
) -> Arms:
    """Arms from their tree; `source` names it in errors."""
    shared = {k: v for k, v in tree.items() if k not in Arms.model_fields}
    given = tree.get("arms")
    if not isinstance(given, list) or not given:
        raise ConfigError("arms: needs a list of at least one arm, each with a name and an objective", source)
    arms: list[dict[str, Any]] = []
    problems: list[str] = []
    for number, arm in enumerate(given):
        if not isinstance(arm, dict):
            problems.append(f"arms.{number}: needs settings (name, objective, ...), got {arm!r}")
            continue
        own = {k: v for k, v in arm.items() if k in Arm.model_fields and k != "config"}
        config = filled({k: copy.deepcopy(v) for k, v in arm.items() if k not in own}, copy.deepcopy(shared))
        where = f"arms.{own.get('name', number)}"
        try:
            for text in overrides:
                override(config, text)
            config = _smoke(config) if preset == "smoke" else config
            arms.append({**own, "config": validated(TrainConfig, config)})
        except ConfigError as error:
            problems += [f"{where}.{p}" for p in error.problems]
    if preset not in (None, "smoke"):
        problems.append(f"--preset: no such preset {preset!r}; known: smoke")
    if problems:
        raise ConfigError(problems, source)
    about = {k: tree[k] for k in ("title", "source", "note", "searched") if k in tree}
    compared = validated(Arms, {**about, "arms": arms, "preset": preset}, source)
    problems = list(_problems(compared))
    if problems:
        raise ConfigError(problems, source)
    return compared


def _problems(compared: Arms) -> Iterator[str]:
    names = [arm.name for arm in compared.arms]
    first = compared.example
    made: dict[str, str] = {}
    for arm in compared.arms:
        if names.count(arm.name) > 1 and arm is compared.named(arm.name):
            yield f"arms.{arm.name}: two arms have this name"
        if arm.baseline is not None and arm.baseline not in names:
            yield f"arms.{arm.name}.baseline: no arm {arm.baseline!r}; {did_you_mean(arm.baseline, names)}"
        twin = made.setdefault(arm.config.fingerprint(), arm.name)
        if twin != arm.name:
            yield f"arms.{arm.name}: the same configuration as {twin}; leave one out, or change it"
        if arm.config.data != first.data:
            yield f"arms.{arm.name}.data: all arms are compared on the same data, those of {names[0]}"
        for key in sorted(RUN_ONLY):
            if getattr(arm.config, key) != getattr(first, key):
                yield f"arms.{arm.name}.{key}: one value for all arms; say it at the top of the file"


def runs_of(
    compared: Arms, seeds: Sequence[int], *, teacher_per_seed: bool = False, hold_out: bool = False
) -> list[Run]:
    """Every arm with every seed, seed by seed, so that an interrupted comparison has whole seeds.

    A self teacher is trained for each seed; one of another network is shared by the seeds, unless `teacher_per_seed`.
    Training is on train and validation; with `hold_out` on train only.
    """
    runs = []
    for seed in seeds:
        for arm in compared.arms:
            config = arm.config
            changes: dict[str, Any] = {"seed": seed}
            if not hold_out:
                changes["data"] = config.data.model_copy(update={"val_fraction": 0.0})
            own_teacher = config.teacher is not None and config.teacher.model not in (None, config.student)
            if config.needs_teacher and (teacher_per_seed or not own_teacher):
                run = config.teacher_run()
                assert run is not None, f"{config=}"
                teacher = config.teacher or TeacherConfig(optim=run.optim, schedule=run.schedule)
                changes["teacher"] = teacher.model_copy(update={"seed": seed})
            tree = config.model_copy(update=changes).model_dump(mode="json")
            try:
                runs.append(Run(arm.name, seed, validated(TrainConfig, tree)))
            except ConfigError as error:
                raise ConfigError([f"arms.{arm.name}.{p}" for p in error.problems]) from None
    return runs


# --- a comparison's directory ----------------------------------------------------------------------------------


def new_comparison(
    compared: Arms, seeds: Sequence[int], directory: Path, *, teacher_per_seed: bool = False, hold_out: bool = False
) -> None:
    """Make a comparison's directory; wrong input is a ConfigError, raised before anything is written."""
    check_new(directory)
    runs_of(compared, seeds, teacher_per_seed=teacher_per_seed, hold_out=hold_out)
    about = {
        **about_now(sys.argv),
        "seeds": list(seeds),
        "teacher_per_seed": teacher_per_seed,
        "hold_out": hold_out,
        "compared": compared.model_dump(mode="json"),
    }
    directory.mkdir(parents=True)
    write_text(directory / "confirm.yaml", dump_yaml(about))


@dataclass(frozen=True)
class Comparison:
    """A comparison as its directory tells it."""

    arms: Arms
    runs: list[Run]
    hold_out: bool
    """Whether validation was left out of training."""

    is_trained: bool
    """Whether every run has come to its end."""

    @property
    def data(self) -> Dataset:
        """What all runs are trained and judged on."""
        return self.runs[0].config.data


def read_comparison(directory: Path) -> Comparison:
    """The comparison in a directory, or a ConfigError if there is none."""
    path = directory / "confirm.yaml"
    if not path.is_file():
        raise ConfigError("not a comparison of arms: there is no confirm.yaml in it", directory)
    about = read_yaml(path)
    arms = validated(Arms, about["compared"], path)
    options = {key: about[key] for key in ("teacher_per_seed", "hold_out")}
    runs = runs_of(arms, about["seeds"], **options)
    done = {record.name for record in read_records(directory) if record.status == "done"}
    return Comparison(arms, runs, about["hold_out"], is_trained=done >= {run.name for run in runs})


# --- presets ---------------------------------------------------------------------------------------------------

_BY_SIZE = [
    "cnn5", "shufflenet_v2_x1_0", "mobilenet_v2", "googlenet", "densenet121", "resnet18", "resnet34", "resnet50",
    "resnext29", "resnet101", "resnext101_32x8d",
]  # fmt: skip
"""The paper's networks, roughly by size; each has a width of its own in the preset, so that they stay different."""


def _smoke(tree: dict[str, Any]) -> dict[str, Any]:
    """A configuration scaled down: two epochs, about a thousand images, networks of one convolution, one process."""
    data = named(tree.get("data", "digits"))
    small = {**tree, "epochs": 2, "data": {**data, "subset": 1000} if isinstance(data, dict) else data}
    small |= {"workers": 1, "gpus_per_worker": 0, "student": _small_network(tree.get("student", "mlp"))}
    if isinstance(tree.get("teacher"), dict):
        teacher = {k: v for k, v in tree["teacher"].items() if k not in ("epochs", "weights")}
        small["teacher"] = teacher | ({"model": _small_network(teacher["model"])} if teacher.get("model") else {})
        small["teacher"] |= {"stop_epoch": 1} if teacher.get("stop_epoch") else {}
    return small


def _small_network(network: Any) -> Any:
    given = named(network)
    name = given.get("name") if isinstance(given, dict) else None
    if name in (None, "mlp", "cnn"):
        return network
    return {"name": "cnn", "widths": [8 + (_BY_SIZE.index(name) if name in _BY_SIZE else len(_BY_SIZE))]}
