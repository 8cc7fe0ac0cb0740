"""Samplers and stopping rules, replayed over learning curves: epochs to match random search.

    python benchmarks/search.py fashion [--repeats 20] [--pairs tpe:halving,random:none] [--figure FILE.svg]
    python benchmarks/search.py fashion --surrogate          how well the table answers for what was not measured
    python benchmarks/search.py digits --warnings            how often a sweep warns of its early stopping

A replay is a sweep by this package's searcher and stopping rule, without Ray, which looks epochs up
instead of training. In repeat r, the goal is the best value of a random search with 64 full-length
trials (seed 1000 + r); the result is the number of epochs that another search (seed r) spends until
one of its full-length trials is as good, at most twice the epochs of that random search.

A configuration that was not measured gets a measured run (seed 0, same objective) by predictive
mean matching: a forest's out-of-fold curves select the 5 most similar runs, of which the one with
the nearest settings is used. So every curve is real, with its noise.
"""

import argparse
import json
import math
import statistics
import time
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import optuna
from curves import SEEDS, SPACES, Table, load
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher
from scipy.stats import spearmanr
from sklearn.base import clone
from sklearn.ensemble import ExtraTreesRegressor
from sklearn.model_selection import KFold

import tfkd_ray.run.searcher
from tfkd_ray.run.searcher import OptunaSearcher, StudyStopping
from tfkd_ray.show.receipt import fidelity_warnings, rank_correlations
from tfkd_ray.space.search_config import Halving, NoStopping
from tfkd_ray.space.space import Parameter, Space, build_space
from tfkd_ray.store.experiment import Record

TRIALS = 64
PAIRS = [f"{sampler}:{stopping}" for sampler in ("tpe", "random", "qmc", "gp")
         for stopping in ("none", "median", "hyperband", "halving")] + ["cmaes:none"]  # fmt: skip
TREES, FOLDS, DONORS = 60, 5, 5


class Surrogate:
    """Predicts curves for one objective from measured runs; see the top of this file."""

    def __init__(self, x: np.ndarray, curves: np.ndarray, guess: float) -> None:
        self._x, self._curves, self._chance = x, curves, guess
        y = np.nan_to_num(curves, nan=guess)  # a diverged run guesses
        self.forest = ExtraTreesRegressor(TREES, min_samples_leaf=2, random_state=0).fit(x, y)
        self.known: np.ndarray = self.forest.predict(x)[:, -1]
        self._guess = np.empty_like(y)
        for fit, held in KFold(FOLDS, shuffle=True, random_state=0).split(x):
            self._guess[held] = clone(self.forest).fit(x[fit], y[fit]).predict(x[held])
        self._trees = _Trees(self.forest)

    def __call__(self, at: np.ndarray) -> np.ndarray:
        """Return the curve of a configuration."""
        alike = ((self._guess - self.predicted(at)) ** 2).sum(axis=1).argsort()[:DONORS]
        curve: np.ndarray = self._curves[alike[((self._x[alike] - at) ** 2).sum(axis=1).argmin()]]
        return curve

    def predicted(self, at: np.ndarray) -> np.ndarray:
        """Return the forest's curve of one configuration."""
        return self._trees.predict(at)

    def drawn(self, rng: np.random.Generator) -> np.ndarray:
        """Return the curve of a random run."""
        curve: np.ndarray = self._curves[rng.integers(len(self._curves))]
        return np.nan_to_num(curve, nan=self._chance)


class _Trees:
    """The trees of a forest in one table, which one configuration passes through all at once."""

    def __init__(self, forest: ExtraTreesRegressor) -> None:
        trees = [one.tree_ for one in forest.estimators_]
        sizes = [tree.node_count for tree in trees]
        self._roots = np.cumsum([0, *sizes[:-1]])
        self._feature = np.concatenate([tree.feature for tree in trees])
        self._threshold = np.concatenate([tree.threshold for tree in trees])
        self._values = np.concatenate([tree.value[:, :, 0] for tree in trees])
        offsets = np.repeat(self._roots, sizes)
        sides = [(tree.children_left, tree.children_right) for tree in trees]
        self._left = np.concatenate([left for left, _ in sides]) + offsets
        self._right = np.concatenate([right for _, right in sides]) + offsets

    def predict(self, at: np.ndarray) -> np.ndarray:
        """Return the forest's curve of one configuration."""
        x, nodes = at.astype(np.float32), self._roots
        while (inner := self._feature[nodes] >= 0).any():
            goes_left = x[self._feature[nodes]] <= self._threshold[nodes]
            below = np.where(goes_left, self._left[nodes], self._right[nodes])
            nodes = np.where(inner, below, nodes)
        found: np.ndarray = self._values[nodes].mean(axis=0)
        return found


class World:
    """Learning curves for every configuration of a table's space.

    A published setting has a curve for each of its seeds, and is known by their mean.
    """

    def __init__(self, table: Table) -> None:
        self.epochs = table.space.epochs
        self._parameters = {b.objective: b.parameters for b in table.space.branches}
        self._of = {name: Surrogate(x, curves, table.guess) for name, x, curves in runs(table)}
        self._retrained: dict[tuple[str, tuple[float, ...]], np.ndarray] = {}
        for i in range(len(table.seed) - table.published, len(table.seed)):
            key = self._key(str(table.objective[i]), table.parameters[i])
            before = self._retrained.get(key, np.empty((0, self.epochs)))
            self._retrained[key] = np.vstack([before, table.curves[i]])
        self._chance = table.guess
        self.best = {name: float(of.known.max()) for name, of in self._of.items()}
        """The best final value that is known of each objective."""
        for name, at in self._retrained:
            self.best[name] = max(self.best[name], self._mean(name, at))

    def _key(self, objective: str, parameters: dict[str, Any]) -> tuple[str, tuple[float, ...]]:
        """Return where a configuration lies, to six digits."""
        found = places(self._parameters[objective], parameters)
        return objective, tuple(round(place, 6) for place in found)

    def _mean(self, objective: str, at: tuple[float, ...]) -> float:
        ends = self._retrained[objective, at][:, -1]
        return float(np.nan_to_num(ends, nan=self._chance).mean())

    def known(self, objective: str, parameters: dict[str, Any]) -> float:
        """Return a configuration's final value without the noise of a run."""
        key = self._key(objective, parameters)
        if key in self._retrained:
            return self._mean(*key)
        at = np.array(places(self._parameters[objective], parameters))
        return float(self._of[objective].predicted(at)[-1])

    def curve(self, objective: str, parameters: dict[str, Any], run: int = 0) -> np.ndarray:
        """Return validation accuracies after every epoch; NaN from where training diverges.

        Args:
            run: number of the run, where a configuration has several.
        """
        retrained = self._retrained.get(self._key(objective, parameters))
        if retrained is not None:
            found: np.ndarray = retrained[run % len(retrained)]
            return found
        return self._of[objective](np.array(places(self._parameters[objective], parameters)))


class Unsafe(World):
    """Learning curves with misleading values before the last epoch."""

    def __init__(self, table: Table, how: str) -> None:
        super().__init__(table)
        self._how = how

    def curve(self, objective: str, parameters: dict[str, Any], run: int = 0) -> np.ndarray:
        """Return validation accuracies after every epoch."""
        end = super().curve(objective, parameters, run)
        if self._how == "of other runs":
            early = self._of[objective].drawn(
                np.random.default_rng(zlib.crc32(repr(parameters).encode()))
            )
        elif self._how == "reversed":
            early = 1 - end
        else:  # "late bloomers": the best at the end start 20 points behind
            own = [p for p in self._parameters[objective] if p.name.startswith("objective.")][:1]
            early = end - 0.2 * sum(places(own, parameters))
        return np.concatenate([early[:-1], end[-1:]])


def runs(table: Table) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Yield each objective's quasi-random runs of seed 0: (name, places, curves)."""
    for branch in table.space.branches:
        mine = [
            i
            for i in range(len(table.seed) - table.published)
            if table.objective[i] == branch.objective and table.seed[i] == 0
        ]
        x = np.array([places(branch.parameters, table.parameters[i]) for i in mine])
        yield branch.objective, x, table.curves[mine]


def places(parameters: Sequence[Parameter], values: dict[str, Any]) -> list[float]:
    """Return the positions of values in their ranges, on each range's scale, from 0 to 1."""

    return [
        place_in(p, next(iter(p.domain.told(p.name, values[p.name]).values()))) for p in parameters
    ]


def place_in(p: Parameter, told: float) -> float:
    """Return the position in its range of a value, given as Optuna is told it."""
    ends = [next(iter(p.domain.told(p.name, v).values())) for v in p.domain.probes]
    if p.domain.log or p.domain.log_complement:
        told, ends = math.log(told), [math.log(v) for v in ends]
    return (told - min(ends)) / (max(ends) - min(ends))


def surrogate(table: Table) -> Iterator[str]:
    """Yield errors for held-out runs: of predictions, the nearest run, the forest, and seeds."""
    epochs = [*Halving().rungs(table.space.epochs), table.space.epochs]

    def row(name: str, guess: np.ndarray, truth: np.ndarray) -> str:
        columns = [(guess[:, e - 1], truth[:, e - 1]) for e in epochs]
        errors = [
            f"{100 * np.median(abs(a - b)):.2f} ({spearmanr(a, b).statistic:.2f})"
            for a, b in columns
        ]
        return f"| {name} | " + " | ".join(errors) + " |"

    yield (
        "| median absolute error, points (rank correlation) | "
        + " | ".join(f"epoch {e}" for e in epochs)
        + " |"
    )
    yield "|---" * (len(epochs) + 1) + "|"
    found: dict[str, list[np.ndarray]] = {
        "measured": [],
        "the nearest run": [],
        "the forest": [],
        "matched": [],
    }
    lines = []
    for name, x, curves in runs(table):
        y = np.nan_to_num(curves, nan=table.guess)
        for fit, held in KFold(FOLDS, shuffle=True, random_state=1).split(x):
            answer = Surrogate(x[fit], curves[fit], table.guess)
            found["measured"].append(y[held])
            found["the nearest run"].append(
                y[fit][((x[held][:, None] - x[fit][None]) ** 2).sum(axis=2).argmin(axis=1)]
            )
            found["the forest"].append(answer.forest.predict(x[held]))
            found["matched"].append(
                np.nan_to_num(np.array([answer(at) for at in x[held]]), nan=table.guess)
            )
        ranks = ", ".join(
            f"{e}: {spearmanr(y[:, e - 1], y[:, -1]).statistic:.2f}" for e in epochs[:-1]
        )
        lost = f"{np.isnan(curves[:, -1]).sum()} diverged"
        lines.append(
            f"{name}: {len(y)} runs, {lost}, best {y[:, -1].max():.4f}, rank correlation with the end {ranks}"
        )
    truth, *guesses = (np.concatenate(parts) for parts in found.values())
    yield from (
        row(name, guess, truth) for name, guess in zip(list(found)[1:], guesses, strict=True)
    )
    again = [
        (i, j) for i in range(len(table.seed) - 2) for j in (i + 1, i + 2)
        if not table.seed[i] and table.seed[j] and table.parameters[i] == table.parameters[j]
    ]  # fmt: skip
    first, other = (
        np.nan_to_num(table.curves[[pair[k] for pair in again]], nan=table.guess) for k in (0, 1)
    )
    yield row(f"the same run with another seed (n {len(again)})", other, first)
    yield from lines
    yield from surface_errors(table)


def surface_errors(table: Table) -> Iterator[str]:
    """Yield the forest's error, without a run's noise, where settings with several seeds are held out.

    It is the root mean square over the better half of an objective's settings, of which searches choose.
    """
    several = [
        i
        for i in range(len(table.seed) - table.published)
        if table.seed[i : i + len(SEEDS)].tolist() == list(SEEDS)
    ]
    branches = {branch.objective: branch for branch in table.space.branches}
    for name, x, curves in runs(table):
        y = np.nan_to_num(curves[:, -1], nan=table.guess)
        errors, means, noise = [], [], []
        for i in several:
            if table.objective[i] != name:
                continue
            at = places(branches[name].parameters, table.parameters[i])
            others = ~np.isclose(x, at).all(axis=1)
            forest = ExtraTreesRegressor(TREES, min_samples_leaf=2, random_state=0)
            ends = np.nan_to_num(table.curves[i : i + len(SEEDS), -1], nan=table.guess)
            errors.append(forest.fit(x[others], y[others]).predict([at])[0] - ends.mean())
            means.append(ends.mean())
            noise.append(ends.var(ddof=1))
        good = np.array(means) >= np.median(means)
        wrong, spread = np.array(errors)[good], np.array(noise)[good].mean()
        error = 100 * math.sqrt(max(0.0, np.square(wrong).mean() - spread / len(SEEDS)))
        yield (
            f"{name}: the forest errs by {error:.2f} points, on average {100 * wrong.mean():+.2f} "
            f"(n {good.sum()}); a run by {100 * math.sqrt(spread):.2f}"
        )


class Seen(NamedTuple):
    """An epoch of a replay."""

    spent: int
    """Epochs spent so far, over all trials."""
    trial: str
    about: dict[str, Any]
    epoch: int
    value: float


def replay(
    space: Space,
    world: World,
    *,
    most: float,
    goal: float = math.inf,
    at_once: int = 1,
    proposes: type[OptunaSearcher] = OptunaSearcher,
    ended: list[Record] | None = None,
    seen: list[Seen] | None = None,
) -> Iterator[tuple[int, float]]:
    """Yield (epochs spent, value) of a sweep's full-length trials, to `most` epochs or the goal.

    Args:
        ended: receives all trials that end.
        seen: receives all epochs.

    Run 0, 1 or 2 of a published setting counts, by the search's seed.
    """
    searcher = proposes(space, Path("in memory"))
    stopping = StudyStopping(searcher)
    searcher.judges = True
    live: dict[str, tuple[dict[str, Any], np.ndarray, int]] = {}
    paused: dict[str, tuple[dict[str, Any], np.ndarray, int]] = {}
    judged = {*space.rungs, space.epochs}
    all_count = not isinstance(space.stopping, Halving | NoStopping)
    spent, asked, open_ = 0, 0, True
    while spent < most and (open_ or live):
        while open_ and len(live) < at_once:
            if searcher.pauses and (promoted := searcher.promoted()):
                live[promoted] = paused.pop(promoted)
                continue
            proposal = searcher.suggest(f"id{asked}")
            if proposal == Searcher.FINISHED:
                open_ = False
            if not isinstance(proposal, dict):
                assert live or not open_, "a search waits, and nothing runs"
                break
            about = {
                "objective": proposal["objective"]["name"],
                "parameters": proposal["trial"]["parameters"],
            }
            live[f"id{asked}"] = (about, world.curve(**about, run=space.search.seed), 0)
            asked += 1
        for trial_id, (about, curve, before) in list(live.items()):
            spent += 1
            epoch, value = before + 1, float(curve[before])
            live[trial_id] = (about, curve, epoch)
            if seen is not None:
                seen.append(Seen(spent, trial_id, about, epoch, value))
            result: dict[str, Any] = {"epoch": epoch, space.search.metric: value}
            if math.isnan(value):
                result = {"failed": "Diverged", "done": True}
                stop = True
            elif epoch not in judged and not all_count:
                continue  # no rule and no sampler asks for it
            else:
                told = stopping.on_trial_result(None, SimpleNamespace(trial_id=trial_id), result)
                stop = told == TrialScheduler.STOP
                searcher.on_trial_result(trial_id, result)
                if told == TrialScheduler.PAUSE:
                    searcher.pause(trial_id)
                    paused[trial_id] = live.pop(trial_id)
            if stop or epoch == space.epochs:
                searcher.on_trial_complete(trial_id, result)
                del live[trial_id]
                full = epoch == space.epochs and not stop
                if ended is not None:
                    status = "done" if full else "stopped"
                    metrics = [
                        {"epoch": k + 1, space.search.metric: float(v)}
                        for k, v in enumerate(curve[:epoch])
                    ]
                    ended.append(
                        Record(
                            Path(),
                            len(ended),
                            "",
                            status=status,
                            config={},
                            metrics=metrics,
                            **about,
                        )
                    )
                if full:
                    yield spent, value
                    if value >= goal:
                        return


def run_out(steps: Iterator[Any]) -> None:
    """Run a replay to its end."""
    for _ in steps:
        pass


def search_of(table: Table, pair: str, seed: int, **more: Any) -> Space:
    """Return the table's space with a sampler, a stopping rule and otherwise default settings."""
    sampler, stopping, *rest = pair.split(":")
    for word in rest:
        key, _, value = word.partition("=")
        if key in ("factor", "min_epochs"):
            more["stopping"] = {"name": stopping, **more.get("stopping", {}), key: int(value)}
        elif key in ("startup", "candidates", "multivariate"):
            more["sampler"] = {"name": sampler, **more.get("sampler", {}), key: json.loads(value)}
        else:
            more[key] = json.loads(value)
    search = {
        "num_samples": 5 * TRIALS,
        "seed": seed,
        "sampler": sampler,
        "stopping": stopping,
        **more,
    }
    return build_space({**table.about["space"], "search": search})


def goal_of(table: Table, world: World, repeat: int) -> float:
    """Return the best value of a random search of 64 full-length trials."""
    space = search_of(table, "random:none", 1000 + repeat, num_samples=TRIALS, warm_start=False)
    return max(value for _, value in replay(space, world, most=TRIALS * world.epochs))


def spent_until(
    table: Table, world: World, pair: str, repeat: int, goal: float, at_once: int = 1
) -> float:
    """Return the epochs until a search is as good, relative to random search; infinite if never."""
    whole = TRIALS * world.epochs
    for spent, value in replay(
        search_of(table, pair, repeat), world, most=2 * whole, goal=goal, at_once=at_once
    ):
        if value >= goal:
            return spent / whole
    return math.inf


def warnings(table: Table, repeats: int, trials: int) -> Iterator[str]:
    """Yield the number of objectives that sweeps warn of, by safe or unsafe early stopping."""
    yield f"| {repeats} sweeps of {trials} trials | objectives with 8 full-length trials | warned of | share |"
    yield "|---|---|---|---|"
    misleading = {
        f"before the end {how}": Unsafe(table, how)
        for how in ("of other runs", "reversed", "late bloomers")
    }
    for name, world in {"as measured": World(table), **misleading}.items():
        judged = warned = 0
        for repeat in range(repeats):
            space = search_of(table, "tpe:halving", repeat, num_samples=trials)
            records: list[Record] = []
            for _ in replay(space, world, most=math.inf, ended=records):
                pass
            judged += len({ranking.objective for ranking in rank_correlations(space, records)})
            warned += len(fidelity_warnings(space, records))
        yield f"| {name} | {judged} | {warned} | {warned / max(1, judged):.2f} |"


def studies_in_memory() -> None:
    """Keep studies in this process: nothing is written, so a replay takes a second."""
    tfkd_ray.run.searcher.open_journal = lambda path: optuna.storages.InMemoryStorage()
    optuna.logging.set_verbosity(optuna.logging.WARNING)


def quartile(values: list[float], k: int) -> str:
    """Return the k-th quartile of values, some of which are infinite."""
    found = (
        sorted(values)[max(0, math.ceil(len(values) * k / 4) - 1)]
        if k != 2
        else statistics.median(values)
    )
    return "> 2" if math.isinf(found) else f"{found:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("table", choices=list(SPACES))
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--pairs", default=",".join(PAIRS))
    parser.add_argument("--at-once", type=int, default=1, help="trials at a time")
    parser.add_argument("--surrogate", action="store_true")
    parser.add_argument("--warnings", action="store_true")
    parser.add_argument(
        "--trials", type=int, default=240, help="with --warnings: trials of a sweep"
    )
    parser.add_argument("--figure", type=Path)
    args = parser.parse_args()
    studies_in_memory()
    table = load(args.table)
    if args.surrogate:
        print("\n".join(surrogate(table)))
        return
    if args.warnings:
        print("\n".join(warnings(table, args.repeats, args.trials)))
        return
    world = World(table)
    goals = [goal_of(table, world, repeat) for repeat in range(args.repeats)]
    print(
        f"{args.table}: best of a random search {min(goals):.4f} to {max(goals):.4f}, {args.repeats} repeats"
    )
    print(
        "| sampler | stopping | epochs to match, of the random search's: median | quartiles | matched | s a replay |"
    )
    print("|---|---|---|---|---|---|")
    found: dict[str, list[float]] = {}
    for pair in args.pairs.split(","):
        began = time.perf_counter()
        found[pair] = [
            spent_until(table, world, pair, r, goal, args.at_once) for r, goal in enumerate(goals)
        ]
        sampler, _, rest = pair.partition(":")
        matched = sum(math.isfinite(v) for v in found[pair])
        spread = f"{quartile(found[pair], 1)} to {quartile(found[pair], 3)}"
        seconds = (time.perf_counter() - began) / args.repeats
        row = [
            sampler,
            rest,
            quartile(found[pair], 2),
            spread,
            f"{matched} of {args.repeats}",
            f"{seconds:.1f}",
        ]
        print("| " + " | ".join(row) + " |", flush=True)
    if args.figure:
        draw(found, args.figure, f"{args.table}: {args.repeats} repeats")


def draw(found: dict[str, list[float]], path: Path, title: str) -> None:
    """Draw how many repeats were matched by each number of epochs."""
    from matplotlib.figure import Figure

    figure = Figure((7.5, 4.5), layout="constrained")
    axes = figure.subplots()
    styles = {"none": ":", "median": "-.", "hyperband": "--", "halving": "-"}
    colours = {
        "tpe": "#0072B2",
        "random": "#555555",
        "qmc": "#E69F00",
        "gp": "#009E73",
        "cmaes": "#CC79A7",
    }
    for pair, values in found.items():
        sampler, stopping = pair.split(":")[:2]
        x = [0, *sorted(v for v in values if math.isfinite(v))]
        y = [100 * k / len(values) for k in range(len(x))]
        style = {
            "color": colours[sampler],
            "linestyle": styles[stopping],
            "label": pair.replace(":", ", "),
        }
        axes.step([*x, 2], [*y, y[-1]], where="post", **style)
    axes.set(
        xlabel="epochs spent, of those of a random search of 64 full-length trials", xlim=(0, 2)
    )
    axes.set(ylabel="repeats that match its best, %", ylim=(0, 100), title=title)
    axes.axvline(0.25, color="#AAAAAA", linewidth=0.8)
    axes.legend(fontsize=7, ncols=2)
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
