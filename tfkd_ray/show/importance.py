"""Importance of searched settings, computed by Optuna."""

import warnings
from pathlib import Path
from typing import Any

import optuna

from tfkd_ray.settings.errors import ConfigError
from tfkd_ray.space.relate import as_asked, is_number, lies_in
from tfkd_ray.space.space import BranchGroup, build_space
from tfkd_ray.store.experiment import read_experiment, read_records

# --- what mattered ---------------------------------------------------------------------------------------------

EVALUATORS = ("pedanova", "fanova", "mdi")
ENOUGH = 4
"""Fewest full-length trials of an objective for which importance is shown."""


def importance(
    experiment: Path | str, *, evaluator: str = "pedanova"
) -> dict[str, dict[str, float]]:
    """Return the share of the metric that each setting explains, by objective and parameter.

    Shares of an objective sum to 1 and are computed from its full-length trials. An objective with
    fewer than 4 of these, or with nothing searched, has none; nor has a setting that only some
    trials have. Of several metrics the first counts. `evaluator` is one of Optuna's: pedanova,
    fanova, mdi.
    """
    if evaluator not in EVALUATORS:
        raise ConfigError(
            f"evaluator: no such evaluator {evaluator!r}; known: {', '.join(EVALUATORS)}"
        )
    experiment = Path(experiment)
    space = build_space(read_experiment(experiment)["space"], experiment / "experiment.yaml")
    metric = space.search.metric
    records = [
        r for r in read_records(experiment) if r.status == "done" and is_number(r.last.get(metric))
    ]
    found: dict[str, dict[str, float]] = {}
    for branch in space.branches:
        mine = [r for r in records if r.objective == branch.objective]
        mine = [r for r in mine if lies_in(branch, r.parameters)]
        found[branch.objective] = {}
        if len(mine) < ENOUGH or all(p.within for p in branch.parameters):
            continue
        direction = "maximize" if space.search.mode == "max" else "minimize"
        study = optuna.create_study(direction=direction)
        group = BranchGroup(branch.objective, (branch,))
        for r in mine:
            params, distributions = as_asked(group, branch.objective, r.parameters)
            study.add_trial(
                optuna.trial.create_trial(
                    value=r.last[metric], params=params, distributions=distributions
                )
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            everywhere = set.intersection(
                *(set(t.params) for t in study.get_trials(deepcopy=False))
            )
            shares = optuna.importance.get_param_importances(
                study, evaluator=_evaluator(evaluator), params=sorted(everywhere)
            )
        found[branch.objective] = {
            name.removeprefix("1 - "): float(share) for name, share in shares.items()
        }
    return found


def _evaluator(name: str) -> Any:
    if name == "pedanova":
        return optuna.importance.PedAnovaImportanceEvaluator()
    if name == "fanova":
        return optuna.importance.FanovaImportanceEvaluator(seed=0)
    return optuna.importance.MeanDecreaseImpurityImportanceEvaluator(seed=0)
