"""Results of earlier experiments for the sampler of a new one."""

import collections
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tfkd_ray.learn.config import TrainConfig
from tfkd_ray.settings.errors import ConfigError
from tfkd_ray.settings.schema import validated
from tfkd_ray.settings.yaml import Numbers
from tfkd_ray.space.relate import as_asked, is_number, placed
from tfkd_ray.space.space import Space
from tfkd_ray.store.experiment import Record, read_experiment, read_records

# --- earlier experiments --------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Prior:
    """A finished trial of an earlier experiment, converted to a trial of this space."""

    group: str
    params: dict[str, Any]
    distributions: dict[str, Any]
    values: list[float]
    origin: str
    """EXPERIMENT/TRIAL, where the result comes from."""
    metrics: Numbers
    """Metrics of its last epoch."""


def prior_trials(space: Space, experiments: Sequence[Path | str]) -> list[Prior]:
    """Return full-length trials of earlier experiments that fit this space and its training.

    The old space may have been larger or smaller: only each trial's own configuration counts, and
    only its seed and its resources may differ. An experiment without such a trial raises a
    ConfigError that lists the differences.
    """
    if not experiments:
        return []
    sampler, metrics = space.sampler, space.search.measured
    if not sampler.priors:
        raise ConfigError(
            f"priors: earlier results would change nothing for the sampler {sampler}; use tpe or gp"
        )
    found: list[Prior] = []
    problems = []
    for experiment in (Path(e) for e in experiments):
        read_experiment(experiment)
        differences: collections.Counter[str] = collections.Counter()
        before = len(found)
        full = [r for r in read_records(experiment) if r.status == "done"]
        for record in full:
            prior = _prior(space, record, metrics, f"{experiment.name}/{record.name}")
            if isinstance(prior, Prior):
                found.append(prior)
            else:
                differences.update(prior)
        if len(found) == before:
            why = (
                "; ".join(d for d, _ in differences.most_common(5)) or "it has no full-length trial"
            )
            problems.append(
                f"priors: of {len(full)} full-length trials of {experiment} none lies within this space: {why}"
            )
    if problems:
        raise ConfigError(problems)
    return found


def _prior(space: Space, record: Record, metrics: Sequence[str], origin: str) -> Prior | list[str]:
    try:
        config = validated(TrainConfig, record.config)
    except ConfigError as error:
        return error.problems
    place = placed(space, config)
    if isinstance(place, list):
        return place
    values = [record.judged.get(metric) for metric in space.search.metrics]
    if (
        not all(is_number(record.judged.get(metric)) for metric in metrics)
        or record.last["epoch"] != config.epochs
    ):
        return [f"{' or '.join(metrics)}: not measured there, or not a number"]
    group, parameters = place
    params, distributions = as_asked(group, config.objective.called, parameters)
    found = [float(v) for v in values if v is not None]
    return Prior(group.name, params, distributions, found, origin, record.judged)
