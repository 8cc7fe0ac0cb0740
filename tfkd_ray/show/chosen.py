"""The student to export: found in a sweep, a trial, a run or a comparison, with its verdicts."""

import shlex
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tfkd_ray.learn.checkpoint import WEIGHTS
from tfkd_ray.learn.config import TrainConfig
from tfkd_ray.settings import own_code
from tfkd_ray.settings.errors import ConfigError, did_you_mean
from tfkd_ray.settings.schema import validated
from tfkd_ray.settings.yaml import Numbers, Tree, read_yaml
from tfkd_ray.show.status import value_text
from tfkd_ray.space.arms import read_comparison
from tfkd_ray.store.experiment import (
    Record,
    best,
    damaged,
    name_of_test,
    read_experiment,
    read_judged,
    read_metrics,
    read_record,
    read_records,
    selection_limits,
    selection_metric,
    trials_folder,
)
from tfkd_ray.verdict.limits import limits_text, met_text
from tfkd_ray.verdict.scores import Score, ranked, score_of
from tfkd_ray.verdict.verdict import JudgedMetric

OPSET = 20
"""Version of ONNX operators: that of ONNX 1.15, and torch's default."""
GRAPH, ONNX, SUMS = "student.pt2", "student.onnx", "SHA256SUMS"


@dataclass(frozen=True)
class Chosen:
    """The student to export, and what its files say about it."""

    name: str
    folder: Path
    """The directory of its weights."""
    storage: Path
    """The directory of `teachers/`, and of comparisons."""
    config: TrainConfig
    metrics: Numbers
    """Metrics of its last epoch."""
    selection: list[str]
    """Paragraphs on the choice."""
    verdict: list[str]
    """Verdicts of comparisons on it: the lines of the card's section."""
    made: Tree = field(default_factory=dict)
    """Command, versions, git commit and seeds, as recorded when it was trained; empty if they were
    not."""


# --- which student ---------------------------------------------------------------------------------------------


def choose(source: Path, arm: str | None = None, seed: int | None = None) -> Chosen:
    """Return the student that `source` names (see `export`); a ConfigError if there is none."""
    if not source.is_dir():
        what = (
            "is a file; name the folder it is in"
            if source.exists()
            else f"no such folder (searched from {Path.cwd()})"
        )
        raise ConfigError(what, source)
    if (source / "confirm.yaml").is_file():
        with damaged(source / "confirm.json"):
            return _of_comparison(source, arm, seed)
    if arm is not None or seed is not None:
        given = "--arm" if arm is not None else "--seed"
        raise ConfigError(
            f"{given}: picks a run of a comparison, and there is no confirm.yaml here; leave it out",
            source,
        )
    if (source / "experiment.yaml").is_file():
        records = read_records(source)
        winner = best(records, selection_metric(source), selection_limits(source))
        if winner is None:
            raise ConfigError(
                f"no trial of full length yet ({len(records)} trials), so none has weights; resume with: tfkd resume "
                f"{shlex.quote(str(source))}",
                source,
            )
        return _chosen_of_trial(winner, source)
    if (source / "trial.json").is_file():
        record, above = read_record(source), source.parent.parent
        if (above / "confirm.yaml").is_file():
            with damaged(above / "confirm.json"):
                return _of_comparison(
                    above, record.parameters.get("arm"), record.parameters.get("seed")
                )
        return _chosen_of_trial(record, above)
    if (source / "config.yaml").is_file():
        return _of_run(source)
    raise ConfigError(
        "has no student: an experiment has experiment.yaml, a comparison confirm.yaml, a trial trial.json, and the "
        "output of tfkd train config.yaml",
        source,
    )


def _chosen_of_trial(record: Record, experiment: Path) -> Chosen:
    """Return a trial of a sweep."""
    path = record.folder / "trial.json"
    if record.status != "done":
        reason = f": {record.reason.splitlines()[0]}" if record.reason else ""
        raise ConfigError(
            f"{record.status}{reason}; only a trial of full length has weights to export", path
        )
    about = read_experiment(experiment)
    own_code.remember(about.get("directory"))
    config = validated(TrainConfig, record.config, path)
    metric = selection_metric(experiment)
    records = read_records(experiment)
    limits = selection_limits(experiment)
    winner = best(records, metric, limits)
    value = f"{metric} {record.last[metric]:.4f}"
    if limits:
        value += f" ({limits_text(limits)}: it {met_text(limits, record.judged)})"
    further = ""
    if metric in record.means:
        further = (
            f" The same settings with further seeds give {metric} {value_text(record, metric)}, by which the trial is "
            "ranked. That mean is over other runs; these weights are of the selected run."
        )
    if winner is not None and winner.name == record.name:
        full = sum(r.status == "done" for r in records)
        text = (
            f"The best of {len(records)} trials of the sweep `{experiment.name}` on validation ({full} of full "
            f"length): {value} after its last epoch. It was selected by this number, so the number is biased: the best "
            f"of many trials looks better than it is.{further}"
        )
    else:
        ahead = (
            f"; its best trial is `{winner.name}` with {value_text(winner, metric)}"
            if winner
            else ""
        )
        text = (
            f"Trial `{record.name}` of the sweep `{experiment.name}` ({len(records)} trials), picked by hand: {value} "
            f"on validation after its last epoch{ahead}.{further}"
        )
    return Chosen(
        name=f"{experiment.name}/{record.name}",
        folder=record.folder,
        storage=experiment.parent,
        config=config,
        metrics=record.last,
        selection=[text],
        verdict=_found_verdicts(experiment.parent, config),
        made={key: about[key] for key in MADE if key in about},
    )


def _of_run(folder: Path) -> Chosen:
    """Return a run of `tfkd train`."""
    config = validated(TrainConfig, read_yaml(folder / "config.yaml"), folder / "config.yaml")
    metrics = read_metrics(folder)
    if not (folder / WEIGHTS).is_file():
        done = f"{metrics[-1]['epoch']:.0f}" if metrics else "none"
        raise ConfigError(
            f"not finished: {done} of {config.epochs} epochs done, and it has no {WEIGHTS}; run the same tfkd train "
            "command again to resume it",
            folder,
        )
    return Chosen(
        name=folder.name,
        folder=folder,
        storage=folder.parent,
        config=config,
        metrics=metrics[-1] if metrics else {},
        selection=["A single run. It is unknown whether it was chosen from several runs."],
        verdict=_found_verdicts(folder.parent, config),
    )


def _of_comparison(directory: Path, arm: str | None, seed: int | None) -> Chosen:
    """Return a run of a comparison."""
    compared, result = read_comparison(directory), read_judged(directory)
    if result is None:
        raise ConfigError(
            "not finished: it has no confirm.json, so it is not judged yet; resume it with: tfkd resume "
            f"{shlex.quote(str(directory))}",
            directory,
        )
    arms = {found["name"]: found for found in result["arms"]}
    if arm is not None and arm not in arms:
        raise ConfigError(f"--arm: no arm {arm!r}; {did_you_mean(arm, arms)}", directory)
    metric = score_of(compared.arms.metric)
    name = arm if arm is not None else _best_arm(result, metric)
    runs = {run["seed"]: run for run in arms[name]["runs"]} if name is not None else {}
    number = _seed_of(name, runs, seed, directory)
    run = next((r for r in compared.runs_on_data if (r.arm, r.seed) == (name, number)), None)
    if name is None or run is None:
        raise ConfigError(
            f"confirm.json has a run of {name} with seed {number}, confirm.yaml has none", directory
        )
    folder = trials_folder(directory) / run.name
    about = read_yaml(directory / "confirm.yaml")
    return Chosen(
        name=f"{directory.name}/{run.name}",
        folder=folder,
        storage=directory.parent,
        config=run.config,
        metrics=(read_metrics(folder) or [{}])[-1],
        selection=_arm_selection(
            result, metric, directory, name, run.seed, by_hand=(arm is not None, seed is not None)
        ),
        verdict=_verdict_text(result, directory, name),
        made={key: about[key] for key in MADE if key in about},
    )


def _seed_of(name: str | None, runs: dict[int, Tree], seed: int | None, directory: Path) -> int:
    """Return the seed of the run to take: the given one, or the first that was fully trained."""
    done = [s for s, run in runs.items() if run["status"] == "done"]
    if not done:
        raise ConfigError(
            f"{name or 'no arm'}: no run was trained to the end; see {trials_folder(directory)}",
            directory,
        )
    if seed is None or seed in done:
        return done[0] if seed is None else seed
    why = "no such seed"
    if seed in runs:
        why = f"{runs[seed]['status']}: {runs[seed].get('reason', '')}"
    raise ConfigError(
        f"--seed: {name} with {seed}: {why}; trained to the end: {listed(done)}", directory
    )


def _chosen_values(arm: Tree, metric: Score) -> list[float]:
    """Return the values on the test split by seed, as the comparison measured them."""
    return [run[metric.name] for run in arm["runs"] if metric.name in run]


def _best_arm(result: Tree, metric: Score) -> str | None:
    """Return the best arm of a comparison.

    That is the candidate that is better than every baseline. Of several, or if none is, the one
    with the best mean on the test split wins; 'cannot tell' is no advantage, as an arm with few
    seeds and a poor mean gets it easily. Without candidates any arm counts.
    """
    words = {c["name"]: c["verdict"] for found in result["verdicts"] for c in found["candidates"]}
    judged = [arm for arm in result["arms"] if _chosen_values(arm, metric)]
    best_first = (
        ranked(judged, metric.key, lambda arm: statistics.fmean(_chosen_values(arm, metric)))
        or judged
    )

    def place(arm: Tree) -> tuple[bool, bool]:
        return arm["role"] == "candidate", words.get(arm["name"]) == "better"

    return max(best_first, key=place)["name"] if best_first else None


def _arm_selection(
    result: Tree,
    metric: Score,
    directory: Path,
    name: str,
    seed: int,
    *,
    by_hand: tuple[bool, bool],
) -> list[str]:
    arms = {arm["name"]: arm for arm in result["arms"]}
    candidates = sum(arm["role"] == "candidate" for arm in result["arms"])
    if by_hand[0]:
        chosen = f"Arm `{name}` of the comparison `{directory.name}`, picked by hand"
    elif not candidates:
        chosen = f"Arm `{name}`: the best mean of the comparison `{directory.name}`, which has no candidates"
    else:
        chosen = (
            f"Arm `{name}`: the first of the {candidates} candidates of the comparison `{directory.name}`, ordered by "
            "verdict (better than every baseline, or not), then by mean"
        )
        if candidates > 1:
            chosen += (
                "; it was chosen by the test split, so its mean looks slightly better than it is"
            )
    which = (
        "picked by hand" if by_hand[1] else "the first that was trained to the end, not the best"
    )
    values = _chosen_values(arms[name], metric)
    own = next(run for run in arms[name]["runs"] if run["seed"] == seed)
    texts = [f"{chosen}. Seed {seed}: {which}. Trained on {result['trained_on']}."]
    if values and metric.name in own:
        spread = ""
        if len(values) > 1:
            spread = f" ± {metric.number(statistics.stdev(values))} (standard deviation)"
        texts.append(
            f"Test {metric.label} of this run: {metric.show(own[metric.name])}. Expect the mean over all {len(values)} "
            f"seeds: {metric.show(statistics.fmean(values))}{spread}."
        )
    return texts


# --- what a comparison says ------------------------------------------------------------------------------------

NOT_CONFIRMED = (
    "**Not confirmed.** No comparison of this configuration with its baselines over several seeds was found, so it is "
    "unknown whether distillation helped. `tfkd confirm` runs such a comparison."
)
MADE = ("created", "command", "versions", "git_commit", "seeds")


def _found_verdicts(storage: Path, config: TrainConfig) -> list[str]:
    """Return the verdicts of the comparisons beside an experiment on a configuration."""
    lines, unread, wanted = list[str](), list[str](), _recipe_print(config)
    for path in sorted(storage.glob("*/confirm.json")):
        directory = path.parent
        try:
            compared, result = read_comparison(directory), read_judged(directory)
        except ConfigError as error:
            unread += [
                "",
                f"The comparison `{directory.name}` could not be read: {error.problems[0]}",
            ]
            continue
        for arm in compared.arms.arms:
            if result is not None and _recipe_print(arm.config) == wanted:
                lines += ["", *_verdict_text(result, directory, arm.name)]
                lines += [
                    "",
                    "That verdict is about the configuration, retrained with other seeds. These weights themselves "
                    "were not judged on the test split.",
                ]
    return [*(lines[1:] or [NOT_CONFIRMED]), *unread]


def _recipe_print(config: TrainConfig) -> str:
    """Return a configuration's fingerprint without seeds, and whether validation is held out."""
    teacher = config.teacher and config.teacher.model_copy(update={"seed": 0})
    teachers = {name: t.model_copy(update={"seed": 0}) for name, t in config.teachers.items()}
    data = config.data.model_copy(update={"val_fraction": 0.0})
    changes = {"seed": 0, "data": data, "teacher": teacher, "teachers": teachers}
    return config.model_copy(update=changes).fingerprint()


def _verdict_text(result: Tree, directory: Path, arm: str) -> list[str]:
    """Return the verdict on an arm: a sentence, its comparisons with intervals, notes."""
    opened = result["opened"][0]["when"][:10] if result["opened"] else "an unknown day"
    split = f"test split of {name_of_test(result['test'])}, trained on {result['trained_on']}"
    where = f"Comparison `{directory.name}`, {split}"
    lines = [f"{where}; first opened on {opened}."]
    if result["preset"]:
        lines.append(
            f"Preset {result['preset']}: scaled down for a quick try; its numbers say nothing about full runs."
        )
    judged = [
        (found, c) for found in result["verdicts"] for c in found["candidates"] if c["name"] == arm
    ]
    if not judged:
        role = next(a["role"] for a in result["arms"] if a["name"] == arm)
        lines += [
            "",
            f"No verdict on `{arm}`: it is a {role} there, or has too few seeds.",
        ]
        lines += [f"Of the others: {found['sentence']}." for found in result["verdicts"]]
    for found, candidate in judged:
        metric = JudgedMetric(**found["metric"])
        lines += ["", f"**{candidate['sentence']}.**", ""]
        lines += [
            f"| lead in {metric.name} over | lead | 95 % over seeds | 95 % over test images | n | p |"
        ]
        lines += ["|---|---:|---:|---:|---:|---:|"]
        for c in candidate["comparisons"]:
            images = "-" if c["images"] is None else metric.interval(*c["images"])
            lines.append(
                f"| {c['over']} | {metric.show(c['lead'])}{metric.unit} | {metric.interval(c['low'], c['high'])} | "
                f"{images} | {len(c['seeds'])} | {'< 0.001' if c['p'] < 0.001 else format(c['p'], '.3f')} |"
            )
        if found["searched"]:
            lines += [
                "",
                f"The candidates are the best of {found['searched']:,} configurations, on validation.",
            ]
        lines += [line for note in found["notes"] for line in ("", f"Note: {note}.")]
    others = tuple(f"{a['name']}: " for a in result["arms"] if a["name"] != arm)
    return lines + [
        line
        for note in result["notes"]
        if not note.startswith(others)
        for line in ("", f"Note: {note}.")
    ]


def listed(values: Sequence[Any]) -> str:
    return ", ".join(f"{v:.6g}" if isinstance(v, float) else str(v) for v in values)
