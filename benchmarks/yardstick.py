"""The yardstick of searches: how far below the best are the settings that a search finds?

    python benchmarks/yardstick.py run TABLE [--at-once 8] [--pairs tpe:halving,tpe:pausing]   (again: goes on)
    python benchmarks/yardstick.py show [--figure FILE.svg]          tables and verdict of all that was run

Searches are replayed over a table of learning curves (benchmarks/curves.py, benchmarks/search.py).

What is measured, with budgets of 10, 20, 30, 50 and 90 % of the epochs of a random search (64 trials of
full length), with one trial and with 8 trials at a time:

* Each search has the largest `num_samples` that `tfkd plan` puts within the budget, its other settings
  are defaults, and it is cut where the budget is spent.
* Of each objective, the setting is chosen that has the best value among the trials with most epochs; an
  objective without a trial of full length counts with its choice at its highest rung.
* Regret: points by which the chosen setting lies below the best that is known of its objective. Both are
  without the noise of a run: by the forest of the table, and for published settings by the mean of
  their three seeds. Reported are the mean over the objectives, and the winner: of all choices, the one
  with most epochs and then the best value, against the best of all objectives.
* Differences to the first search are of the same seed, and of the same runs of published settings.
  Repeats 0, 1, 2, ... are added until both differences have a standard error of at most 0.1 point: at
  least 16, at most 100. Intervals are 95 % by Student's t, and hold for this table and its forest:
  they say nothing about other data. `python benchmarks/search.py TABLE --surrogate` says how far the
  forest errs.

The criterion for a new default, against today's (`tpe`, `halving`), fixed before the third table
(omniglot) had a curve. On all three tables, with one trial and with 8 at a time:

1. with 20 % of the epochs, the difference of the mean over objectives is below 0, with its interval;
2. with 20, 30, 50 and 90 %, the upper end of the winner's interval is at most 0.2 points; that with 10 %
   is only reported.

The one candidate is `tpe`, `pausing`, with its defaults (factor 3, first rung after a ninth of the epochs).
The third table is evaluated once.
"""

import argparse
import itertools
import json
import math
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from curves import SPACES, Table, load
from joint import MODELS
from scipy.stats import t as student_t
from search import TRIALS, Seen, World, replay, run_out, search_of, studies_in_memory

from tfkd_ray.run.searcher import OptunaSearcher
from tfkd_ray.show.receipt import expected_epochs
from tfkd_ray.space.space import Space

SHARES = (0.2, 0.3, 0.1, 0.5, 0.9)
"""Budgets, as shares of the random search's epochs."""
PAIRS = ("tpe:halving", "tpe:pausing")
"""Today's default, and the candidate."""
AT_ONCE = (1, 8)
ERROR = 0.1
"""Points of standard error of a paired difference that are small enough."""
LEAST, MOST = 16, 100
"""Repeats."""
WORSE = 0.2
"""Points by which the winner may be worse."""
MEAN, WINNER = 0, 1


class Regret(NamedTuple):
    """Points below the best that is known, with a budget."""

    mean: float
    """Over objectives."""
    winner: float
    """Of the best choice over all objectives."""
    whole: int
    """Objectives that have a full-length trial."""
    spent: int
    """Epochs that were spent."""


Regrets = dict[str, dict[float, list[Regret]]]
"""Regrets by pair and budget, one for each repeat."""


def regret_of(world: World, space: Space, seen: Sequence[Seen], most: float) -> Regret:
    """Return what is lost by the choices after `most` epochs."""
    levels = [*space.rungs, space.epochs]
    best: dict[str, tuple[int, float, dict[str, Any]]] = {}
    for at in seen:
        if at.spent > most:
            break
        name = at.about["objective"]
        if at.epoch in levels and not math.isnan(at.value):
            found = (at.epoch, at.value, at.about["parameters"])
            best[name] = max(best.get(name, found), found, key=lambda f: f[:2])
    names = [branch.objective for branch in space.branches]
    ends = {name: world.known(name, best[name][2]) for name in names if name in best}
    lost = [world.best[name] - ends.get(name, 0.0) for name in names]
    winner = max(best, key=lambda name: best[name][:2])
    return Regret(
        100 * statistics.mean(lost),
        100 * (max(world.best.values()) - ends[winner]),
        sum(best[name][0] == space.epochs for name in best),
        sum(at.spent <= most for at in seen),
    )


def planned(table: Table, pair: str, epochs: float) -> int:
    """Return the trials of the largest search that `tfkd plan` puts within a number of epochs."""
    space = search_of(table, pair, 0)
    each = len(space.branches)
    for trials in itertools.count(1):
        if each * expected_epochs(space, trials + 1) > epochs:
            return each * trials
    raise AssertionError("no search is too large")


# --- running --------------------------------------------------------------------------------------


def measure(
    table: Table,
    pairs: Sequence[str],
    at_once: int,
    path: Path,
    *,
    most: int = MOST,
    shares: Sequence[float] = SHARES,
) -> None:
    """Add repeats to a file of regrets until they are enough: first the least number of each budget."""
    world = World(table)
    whole = TRIALS * world.epochs
    usual = {pair: pair for pair in pairs}
    for kind, pair in itertools.product(MODELS, pairs):
        if pair.startswith(f"{kind}:"):
            usual[pair] = pair.replace(kind, "tpe", 1)
    sizes = {(p, share): planned(table, usual[p], share * whole) for p in pairs for share in shares}
    found = read(path)
    for upto, share in itertools.product((min(LEAST, most), most), shares):
        here = [found.setdefault(pair, {}).setdefault(share, []) for pair in pairs]
        while not is_enough(here, upto):
            for pair in pairs:
                repeat = len(found[pair][share])
                space = search_of(table, usual[pair], repeat, num_samples=sizes[pair, share])
                seen: list[Seen] = []
                proposes = MODELS.get(pair.partition(":")[0], OptunaSearcher)
                most_epochs = share * whole
                steps = replay(
                    space, world, most=most_epochs, at_once=at_once, seen=seen, proposes=proposes
                )
                run_out(steps)
                found[pair][share].append(regret_of(world, space, seen, most_epochs))
            path.write_text(json.dumps(found))


def is_enough(found: Sequence[Sequence[Regret]], most: int) -> bool:
    """Return True if the differences of all searches to the first one are known well enough."""
    first, n = found[0], len(found[0])
    if n < LEAST or n >= most:
        return n >= most
    errors = [
        statistics.stdev(differences(here, first, part)) / math.sqrt(n)
        for here in found[1:]
        for part in (MEAN, WINNER)
    ]
    return max(errors) <= ERROR


def differences(here: Sequence[Regret], first: Sequence[Regret], part: int) -> list[float]:
    """Return what each repeat of a search loses more than the same one of the first search."""
    return [one[part] - other[part] for one, other in zip(here, first, strict=True)]


def read(path: Path) -> Regrets:
    """Return the regrets of a file; none if there is no file."""
    if not path.exists():
        return {}
    tree = json.loads(path.read_text())
    return {
        pair: {float(share): [Regret(*one) for one in those] for share, those in by.items()}
        for pair, by in tree.items()
    }


# --- what it says ---------------------------------------------------------------------------------


class Estimate(NamedTuple):
    """A mean over repeats, its standard error, and its 95 % interval (Student's t)."""

    mean: float
    error: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.2f} ± {self.error:.2f} ({self.low:.2f} to {self.high:.2f})"


def estimate(values: Sequence[float]) -> Estimate:
    """Return the mean of values with its error."""
    mean, error = statistics.mean(values), statistics.stdev(values) / math.sqrt(len(values))
    most = float(student_t.ppf(0.975, len(values) - 1)) * error
    return Estimate(mean, error, mean - most, mean + most)


def shown(found: Regrets) -> Iterator[str]:
    """Yield a table of regrets, with differences to the first search."""
    yield "| of the epochs | search | n | mean over objectives | difference | winner | difference | whole | epochs |"
    yield "|---|---|---|---|---|---|---|---|---|"
    usual = next(iter(found.values()))
    for share, pair in itertools.product(sorted(usual), found):
        here, first = found[pair][share], usual[share]
        row = [f"{share:g}", pair, str(len(here))]
        for part in (MEAN, WINNER):
            lost = estimate([one[part] for one in here])
            row.append(f"{lost.mean:.2f} ± {lost.error:.2f}")
            row.append("" if first is here else str(estimate(differences(here, first, part))))
        row.append(f"{statistics.mean(one.whole for one in here):.1f}")
        row.append(f"{statistics.mean(one.spent for one in here):.0f}")
        yield "| " + " | ".join(row) + " |"


def misses(found: Regrets) -> Iterator[str]:
    """Yield what of the criterion the candidate does not meet; see the top of this file."""
    today, candidate = (found[pair] for pair in PAIRS)
    at = {
        (share, part): estimate(differences(candidate[share], today[share], part))
        for share in SHARES
        for part in (MEAN, WINNER)
    }
    if at[0.2, MEAN].high >= 0:
        yield f"mean at 0.2: {at[0.2, MEAN]}"
    for share in (0.2, 0.3, 0.5, 0.9):
        if at[share, WINNER].high > WORSE:
            yield f"winner at {share:g}: {at[share, WINNER]}"


def draw(measured: dict[tuple[str, int], Regrets], path: Path) -> None:
    """Draw the regrets of all searches by their budget, with standard errors."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(name for name, _ in measured))
    figure = Figure((3.2 * len(names), 5.4), layout="constrained")
    axes = figure.subplots(2, len(names), sharex=True, squeeze=False)
    colours, styles = dict(zip(PAIRS, ("#555555", "#0072B2"), strict=True)), {1: "-", 8: "--"}
    for (name, at_once), found in measured.items():
        for part, pair in itertools.product((MEAN, WINNER), PAIRS):
            shares = sorted(found[pair])
            points = [estimate([one[part] for one in found[pair][share]]) for share in shares]
            axes[part][names.index(name)].errorbar(
                shares, [p.mean for p in points], yerr=[p.error for p in points],
                color=colours[pair], linestyle=styles[at_once], marker=".", capsize=2,
                label=f"{pair.replace(':', ', ')}, {at_once} at a time",
            )  # fmt: skip
    for part, k in itertools.product((MEAN, WINNER), range(len(names))):
        here = axes[part][k]
        here.set(yscale="log", title=names[k] if part == MEAN else "")
        here.grid(color="#DDDDDD", linewidth=0.6, which="both")
    axes[MEAN][0].set_ylabel("points lost, mean over objectives")
    axes[WINNER][0].set_ylabel("points lost, winner")
    axes[WINNER][len(names) // 2].set_xlabel("epochs, of those of a random search of 64 trials")
    axes[MEAN][0].legend(fontsize=7)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["run", "show"])
    parser.add_argument("table", nargs="?", choices=list(SPACES))
    parser.add_argument("--at-once", type=int, default=1, help="trials at a time")
    parser.add_argument("--pairs", default=",".join(PAIRS))
    parser.add_argument("--shares", default=",".join(map(str, SHARES)), help="budgets")
    parser.add_argument("--most", type=int, default=MOST, help="repeats")
    parser.add_argument(
        "--work", type=Path, default=Path(tempfile.gettempdir()) / "tfkd-yardstick", metavar="DIR"
    )
    parser.add_argument("--figure", type=Path)
    args = parser.parse_args()
    if args.what == "run":
        studies_in_memory()
        args.work.mkdir(parents=True, exist_ok=True)
        path = args.work / f"{args.table}-{args.at_once}.json"
        shares = [float(share) for share in args.shares.split(",")]
        measure(
            load(args.table),
            args.pairs.split(","),
            args.at_once,
            path,
            most=args.most,
            shares=shares,
        )
        return
    measured = {}
    for name, at_once in itertools.product(SPACES, AT_ONCE):
        if found := read(args.work / f"{name}-{at_once}.json"):
            measured[name, at_once] = found
            print(f"\n{name}, {at_once} at a time:\n\n" + "\n".join(shown(found)))
            missed = "; ".join(misses(found)) if set(PAIRS) <= set(found) else "not judged"
            print(f"\nNot met: {missed or 'nothing'}")
    if args.figure:
        draw(measured, args.figure)


if __name__ == "__main__":
    main()
