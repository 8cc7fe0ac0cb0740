"""One model over all objectives: a prototype, to be replayed beside separate samplers.

    python benchmarks/yardstick.py run digits --pairs tpe:pausing,own-gp:pausing,joint-gp:pausing --work DIR

A Gaussian process over the settings of all objectives. The covariance of two trials is

    k_shared(a, b) * (SHARE + (1 - SHARE) * [same objective] * k_own(a, b)),

so what one objective learns of the learning rate and the weight decay counts SHARE for the others. With
`own-gp` SHARE is 0: the same model, for each objective alone. After `STARTUP` first trials of an
objective, its next one is the point of a fixed random pool with the highest expected improvement.
"""

import functools
import warnings
from typing import Any, ClassVar

import numpy as np
import optuna
from optuna import samplers
from scipy.linalg import cho_factor, cho_solve
from scipy.stats import norm
from search import place_in

from tfkd_ray.run.searcher import OptunaSearcher
from tfkd_ray.space.space import Branch

STARTUP, POOL = 3, 400
NOISE = 0.1
"""Variance of a trial's noise, where values have variance 1."""
LENGTHS = (0.2, 0.4, 0.8)
"""Length scales, of which the likelihood chooses, where a range has length 1."""
FAILED = -2.0
"""Standardised value of a trial without a value at the first rung."""


class Own(OptunaSearcher):
    """Proposes by a Gaussian process for each objective alone."""

    share: ClassVar[float] = 0.0

    def _sampler(self, n: int, g: int, k: int) -> samplers.BaseSampler:
        branches = [group.branches[0] for group in self.space.groups]
        x, of, y = self._trials_so_far(branches)
        if k < STARTUP or not (of == g).any():
            return super()._sampler(n, g, k)
        point = self._best_of_pool(branches[g], g, x, of, y)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return samplers.PartialFixedSampler(point, samplers.RandomSampler(seed=n))

    def _best_of_pool(
        self, branch: Branch, g: int, x: np.ndarray, of: np.ndarray, y: np.ndarray
    ) -> dict[str, Any]:
        """Return the parameters of group g with the highest expected improvement."""
        pool = _pool(branch)
        at = np.array([_place(branch, params) for params in pool])
        tried = x[of == g]
        again = (at[:, None] == tried[None, :, : at.shape[1]]).all(axis=2).any(axis=1)
        here = np.full((len(at), x.shape[1]), 0.5)
        here[:, : at.shape[1]] = at
        mean, error = self._posterior(x, of, y, np.vstack([tried, here]), g)
        best = mean[: len(tried)].max()
        mean, error = mean[len(tried) :], error[len(tried) :]
        z = (mean - best) / error
        gain = error * (z * norm.cdf(z) + norm.pdf(z))
        gain[again] = -1.0
        return pool[int(gain.argmax())]

    def _trials_so_far(self, branches: list[Branch]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return places, groups and standardised values of all trials that have reached a rung."""
        places, groups, values = [], [], []
        for g, study in enumerate(self.studies()):
            trials = {
                t.user_attrs["number"]: t
                for t in study.get_trials(deepcopy=False)
                if "number" in t.user_attrs and t.state != optuna.trial.TrialState.RUNNING
            }
            reached = [dict(sorted(t.intermediate_values.items())) for t in trials.values()]
            for trial, value in zip(trials.values(), _standardised(reached), strict=True):
                place = _place(branches[g], trial.params)
                places.append([*place, *[0.5] * (8 - len(place))])
                groups.append(g)
                values.append(value)
        return np.array(places), np.array(groups), np.array(values)

    def _posterior(
        self, x: np.ndarray, of: np.ndarray, y: np.ndarray, at: np.ndarray, g: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return mean and standard deviation at some places of group g."""
        found: list[tuple[float, Any, float]] = []
        for length in LENGTHS:
            k = self._covariance(x, of, x, of, length) + NOISE * np.eye(len(x))
            factor = cho_factor(k, lower=True)
            logs = np.log(np.diag(factor[0])).sum()
            found.append((float(-0.5 * y @ cho_solve(factor, y) - logs), factor, length))
        _, factor, length = max(found, key=lambda one: one[0])
        across = self._covariance(at, np.full(len(at), g), x, of, length)
        mean = across @ cho_solve(factor, y)
        known = (across * cho_solve(factor, across.T).T).sum(axis=1)
        return mean, np.sqrt(np.maximum(1.0 - known, 1e-9))

    def _covariance(
        self, a: np.ndarray, of_a: np.ndarray, b: np.ndarray, of_b: np.ndarray, length: float
    ) -> np.ndarray:
        shared = _matern(a[:, :2], b[:, :2], length)
        own = _matern(a[:, 2:], b[:, 2:], length) * (of_a[:, None] == of_b[None])
        return shared * (self.share + (1 - self.share) * own)


class Joint(Own):
    """Proposes by one Gaussian process over all objectives."""

    share: ClassVar[float] = 0.6


MODELS: dict[str, type[OptunaSearcher]] = {"own-gp": Own, "joint-gp": Joint}


def _matern(a: np.ndarray, b: np.ndarray, length: float) -> np.ndarray:
    """Return Matern's covariance (5/2) of places, [A, B]."""
    square = np.square(a[:, None] - b[None]).sum(axis=2)
    r = np.sqrt(5 * square) / length
    found: np.ndarray = (1 + r + r**2 / 3) * np.exp(-r)
    return found


def _standardised(reached: list[dict[int, float]]) -> list[float]:
    """Return each trial's value at its highest rung, on the scale of all trials at the first rung.

    Trials of a higher rung were promoted, so there they keep the mean and the spread that they had at
    the rung before.
    """
    levels = sorted({rung for values in reached for rung in values})
    found = [FAILED] * len(reached)
    for level in levels:
        here = [i for i, values in enumerate(reached) if level in values]
        values = np.array([reached[i][level] for i in here])
        before = np.array([found[i] for i in here])
        centre, spread = (0.0, 1.0) if level == levels[0] else (before.mean(), before.std())
        scaled = (values - values.mean()) / max(float(values.std()), 1e-3)
        for i, value in zip(here, centre + spread * scaled, strict=True):
            found[i] = float(value)
    return found


def _place(branch: Branch, params: dict[str, Any]) -> list[float]:
    """Return the places of a study's parameters; shared settings come first."""
    ordered = sorted(branch.parameters, key=lambda p: p.path[0] == "objective")
    return [
        place_in(p, params[next(iter(p.domain.told(p.name, p.domain.probes[0])))]) for p in ordered
    ]


@functools.cache
def _pool_of(objective: str) -> list[dict[str, Any]]:
    return []


def _pool(branch: Branch) -> list[dict[str, Any]]:
    """Return random parameters of a branch, the same in every replay."""
    pool = _pool_of(branch.objective)
    if not pool:
        study = optuna.create_study(sampler=samplers.RandomSampler(seed=0))
        for _ in range(POOL):
            trial = study.ask()
            for p in branch.parameters:
                p.domain.suggest(trial, p.name)
            pool.append(dict(trial.params))
    return pool
