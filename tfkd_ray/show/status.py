"""The present state of experiments, for `tfkd status`, `best`, `trials`, `logs` and `ls`.

A reader may be another process, user or machine than the sweep, so nothing here writes or locks.
Only the last line of each metrics.jsonl is read, so 1,000 trials take a fraction of a second. An
experiment is a sweep (experiment.yaml) or a comparison of arms (confirm.yaml). To show more, add
a key to `status` and a line to `status_lines`. Needs neither torch, Ray nor Optuna.
"""

import json
import math
import os
import re
import socket
import stat
import statistics
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import chain, takewhile
from pathlib import Path
from typing import Any

from tfkd_ray.settings import own_code
from tfkd_ray.settings.columns import fitted, in_columns, on_one_line, wrapped
from tfkd_ray.settings.errors import ConfigError, Sentences, did_you_mean, some_of
from tfkd_ray.settings.files import DISK_ERRORS, legible, opened
from tfkd_ray.settings.yaml import Numbers, Tree, in_yaml, parse_yaml, read_yaml
from tfkd_ray.show.pace import Begun, HalvingRule, epochs_left
from tfkd_ray.space.finalists import Candidate, finalists
from tfkd_ray.space.pausing import halving_rungs
from tfkd_ray.store.ended import (
    ENDED,
    Briefs,
    are_many,
    in_full,
    read_briefs,
    without_collector,
)
from tfkd_ray.store.experiment import (
    BASELINES,
    STATUSES,
    VERSION,
    Record,
    as_metrics,
    as_record,
    best,
    damaged,
    furthest,
    gone_sentence,
    gone_trials,
    parse_json,
    ranked_trials,
    read_experiment,
    read_metrics,
    read_spent,
    read_text,
    stop_requests,
    study_and_space,
    trial_folders,
    with_further,
)
from tfkd_ray.verdict import scores
from tfkd_ray.verdict.limits import (
    NO_LIMITS,
    Limits,
    as_limits,
    is_feasible,
    limits_text,
    met_text,
)

QUIET_S = 600.0
"""Seconds without a changed file after which a sweep on another host counts as ended."""
HELD_S = 90.0
"""The same on object storage, where a driver refreshes its claim every 10 s."""
LOG_TAIL = 8192
"""Bytes at the end of a metrics.jsonl in which the last line is searched first."""
LONGEST_LOG = 2**22
"""Most bytes of a line, which usually has some hundreds; the start of longer ones is not
searched."""
TERMINAL_WIDTH = 80


# --- what a directory holds ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ExperimentPlan:
    """The plan of an experiment: what it was meant to run."""

    kind: str
    """`sweep`, or `comparison` of arms."""
    created: str
    rows: dict[str, int]
    """Epochs of a trial of full length, by objective; by arm in a comparison."""
    trials: int | None
    """Number of trials. None: a budget alone ends the sweep."""
    metric: str | None
    """Metric whose last epoch gives a trial's value. None: a comparison, which is judged on the
    test split."""
    about: Tree
    """Content of the whole file."""

    @property
    def metrics(self) -> list[str]:
        """Metrics that the sweep optimises, the leading one first."""
        more = self.about["space"]["search"].get("more_metrics", []) if self.kind == "sweep" else []
        return [self.metric, *more] if self.metric else []

    @property
    def limits(self) -> Limits:
        """Constraints that the best trial should meet."""
        if self.kind != "sweep":
            return NO_LIMITS
        return as_limits(self.about["space"]["search"].get("constraints"))

    @property
    def finalists(self) -> Mapping[str, int] | None:
        """`k` trials of each objective that get `seeds` further seeds; None if none does."""
        if self.kind != "sweep":
            return None
        found: dict[str, int] | None = self.about["space"]["search"].get("finalists")
        return found

    @property
    def mode(self) -> str:
        """Direction of the metric."""
        return scores.score_of(self.metric or "train_loss").direction

    @property
    def epochs(self) -> int | None:
        """Epochs of all trials if each ran its full length; rows share the trials equally.

        None if the number of trials is not known.
        """
        if self.trials is None:
            return None
        return round(self.trials * statistics.fmean(self.rows.values()))

    def not_begun(self, begun: Iterable[str]) -> list[tuple[str, int]]:
        """Return (row, full length) of each trial still to begin.

        Args:
            begun: row of each that has begun.
        """
        return [] if self.trials is None else left_by_row(self.rows, self.trials, begun)

    @property
    def rule(self) -> HalvingRule | None:
        """The halving that stops its trials; None if there is another rule, or none."""
        if self.kind != "sweep":
            return None
        return halving_rule(self.about["space"]["search"], max(self.rows.values(), default=0))

    def row(self, record: Record) -> str:
        """Return the row of a trial."""
        return (
            str(record.parameters.get("arm", record.objective))
            if self.kind == "comparison"
            else record.objective
        )


def left_by_row(
    rows: Mapping[str, int], trials: int, begun: Iterable[str]
) -> list[tuple[str, int]]:
    """Return (row, full length) of each trial still to begin, the rows in turn.

    Rows share the trials equally; the first ones have one more if they are not divisible.

    Args:
        rows: full length of each row.
        trials: number of trials in all.
        begun: row of each that has begun.
    """
    counts, short = Counter(begun), list[tuple[int, str]]()
    for k, row in enumerate(rows):
        share = trials // len(rows) + (k < trials % len(rows))
        short += [(n, row) for n in range(counts[row], share)]
    most = max(0, trials - counts.total())  # fewer if a row has more than its share
    places = {row: k for k, row in enumerate(rows)}
    short.sort(key=lambda place: (place[0], places[place[1]]))
    return [(row, rows[row]) for _, row in short[:most]]


def halving_rule(search: Tree, epochs: int) -> HalvingRule | None:
    """Return the rule of `search.stopping` if it is a halving whose expectation is known."""
    stopping = search.get("stopping")
    if not isinstance(stopping, dict) or stopping.get("name") not in HALVINGS:
        return None
    factor, first = int(stopping.get("factor", 3)), stopping.get("min_epochs")
    rungs = halving_rungs(epochs, factor, first)
    return HalvingRule(tuple(rungs), factor, pauses=stopping["name"] == "pausing")


HALVINGS = ("halving", "asha", "pausing")


def read_plan(experiment: Path) -> ExperimentPlan:
    """Read the plan of an experiment.

    Raises a ConfigError if the directory is no experiment, or has another layout.
    """
    path = experiment / "confirm.yaml"
    if os.path.lexists(path):
        with damaged(path):
            return _plan_of_comparison(read_yaml(path, follow=False), path)
    path = experiment / "experiment.yaml"
    if not os.path.lexists(path):
        raise ConfigError(_no_experiment(experiment), experiment)
    about = read_experiment(experiment)
    with damaged(path):
        space, search = about["space"], about["space"]["search"]
        given = space["objective"] if isinstance(space["objective"], list) else [space["objective"]]
        rows = {str(own_code.shown_name(o) or o["name"]): int(space["epochs"]) for o in given}
        metric = scores.score_of(str(search["metric"])).key
        samples = search["num_samples"]
        trials = None if samples is None else int(samples)
        as_limits(search.get("constraints"))  # raises here, where damage is told
        if (told := search.get("finalists")) is not None:
            int(told["k"]), int(told["seeds"])
        return ExperimentPlan("sweep", str(about["created"]), rows, trials, metric, about)


def _plan_of_comparison(about: Tree, path: Path) -> ExperimentPlan:
    if about.get("layout") != VERSION:
        raise ConfigError(
            f"layout {about.get('layout')!r}, and this release reads layout {VERSION}", path
        )
    arms = {str(arm["name"]): int(arm["config"]["epochs"]) for arm in about["compared"]["arms"]}
    runs = len(arms) * len(about["seeds"])
    return ExperimentPlan("comparison", str(about["created"]), arms, runs, None, about)


def _no_experiment(directory: Path) -> str:
    if not directory.is_dir():
        near = (
            [p.name for p in directory.parent.iterdir() if p.is_dir()]
            if directory.parent.is_dir()
            else []
        )
        return "no such directory" + (f"; {did_you_mean(directory.name, near)}" if near else "")
    inside = [p.name for p, why in _experiments_in(directory) if not why]
    if inside:
        return f"not an experiment but a directory of experiments; name one of them: {', '.join(inside[:9])}"
    return "not an experiment: there is no experiment.yaml in it, and no confirm.yaml"


def read_lasts(experiment: Path, alive: bool | None = None) -> list[Record]:
    """Read all trials by number, each with the metrics of its last epoch only.

    A trial that a killed driver left as 'running' becomes 'interrupted'. Runs with further seeds
    are in the `further` of their trials.

    Args:
        alive: whether a driver runs the experiment now, if that is known; see `is_running`.
    """
    if alive is None:
        alive = is_running(experiment)
    records = []
    for folder in trial_folders(experiment):
        record = record_of(folder)
        if record is not None:
            dead = record.status == "running" and not alive
            records.append(replace(record, status="interrupted") if dead else record)
    return sorted(with_further(records), key=lambda r: r.number)


def read_all(experiment: Path, alive: bool | None = None) -> Briefs:
    """Read all trials by number, each with one line of metrics, in brief if there are many.

    Args:
        alive: as of `read_lasts`.
    """
    if alive is None:
        alive = is_running(experiment)
    if not are_many(experiment):
        return Briefs(read_lasts(experiment, alive), gone_trials(experiment))
    return read_briefs(experiment, alive=alive)


def record_of(folder: Path) -> Record | None:
    """Read a trial and its last epoch; None if it has no trial.json yet."""
    path = folder / "metrics.jsonl"
    try:
        last = last_line(path)
        return as_record(folder, [last] if last else [])
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        if error.errno in DISK_ERRORS:
            raise
        raise ConfigError(f"cannot be read: {error.strerror}", error.filename or path) from None
    except ValueError as error:
        raise ConfigError(f"was changed by hand or truncated: {error}", path) from None


def last_line(path: Path) -> Numbers:
    """Read the last complete line of a metrics.jsonl; empty if there is none."""
    try:
        file = opened(path, follow=False)
    except FileNotFoundError:
        return {}
    with file:
        size = file.seek(0, os.SEEK_END)
        back = LOG_TAIL
        while True:
            file.seek(max(0, size - back))
            tail = file.read(min(back, size))
            end = tail.rfind(b"\n")
            start = tail.rfind(b"\n", 0, max(end, 0))
            if start >= 0 or back >= size:
                break
            if back > LONGEST_LOG:
                raise ValueError(f"its last line is longer than {LONGEST_LOG} bytes")
            back *= 8
    return as_metrics(tail[start + 1 : end]) if end >= 0 else {}


# --- who runs it -----------------------------------------------------------------------------------------------


def is_running(experiment: Path) -> bool:
    """Return whether a driver runs the experiment now, without touching its lock.

    On this host: if the process in driver.txt has driver.lock open (or is alive, if that is not
    visible). On another host: if a file of the experiment changed within `QUIET_S`.
    """
    driver = driver_of(experiment)
    if driver is None:
        return False
    process, host = driver
    held = experiment / "driver.json"
    if held.exists():  # fetched from object storage, where the driver refreshes it
        with damaged(held):
            ended = parse_json(read_text(held))["ended"]
        return not ended and time.time() - _changed(held) < HELD_S
    if host == socket.gethostname():
        return _holds(process, experiment / "driver.lock")
    return time.time() - changed_last(experiment) < QUIET_S


def driver_of(experiment: Path) -> tuple[int, str] | None:
    """Return (process, host) of the driver that ran the experiment last."""
    with suppress(OSError, ValueError):
        found = re.fullmatch(r"process (\d{1,18}) on (.+)\n", read_text(experiment / "driver.txt"))
        return (int(found[1]), found[2]) if found else None
    return None


def _holds(process: int, lock: Path) -> bool:
    try:
        held = lock.stat()
        links = list(Path(f"/proc/{process}/fd").iterdir())
    except PermissionError:  # the process belongs to another user
        return True
    except FileNotFoundError:
        return not Path("/proc/self").exists() and _alive(process)
    for link in links:
        with suppress(OSError):
            if os.path.samestat(link.stat(), held):
                return True
    return False


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except PermissionError:
        return True
    except OSError:
        return False
    return True


def changed_last(experiment: Path) -> float:
    """Return when a sweep's files changed last, in seconds since 1970."""
    names = ["driver.txt", "study.journal", "confirm.json"]
    if are_many(experiment):  # every second, the driver writes what is spent
        return max(_changed(experiment / name) for name in (*names, "spent.json", ENDED))
    metrics = [folder / "metrics.jsonl" for folder in trial_folders(experiment)]
    return max(_changed(path) for path in [*(experiment / name for name in names), *metrics])


def _changed(path: Path) -> float:
    with suppress(OSError):
        return path.lstat().st_mtime
    return 0.0


# --- status ----------------------------------------------------------------------------------------------------


@without_collector()
def status(experiment: Path) -> Tree:
    """Return an experiment's status as JSON types (`tfkd status --json`). Keys are only ever added:

    name, kind (sweep, comparison), preset, created
    state         running; finished: all trials ended, and of a comparison the test split was judged; interrupted
    metric, mode  of a trial's value; metric is null in a comparison
    trials        planned (null: until a budget is spent), started, and the number running, done (full length),
                  stopped (early), failed, interrupted, paused (may go on)
    rows          the same by objective, or by arm, with best: {trial, objective, value}, or null
    constraints   of a sweep: in words; empty without any
    best          trial, objective, value, how many trials share the value, and whether it meets the constraints
                  (`feasible`); null before a trial is of full length. A finalist's value is the mean over its
                  further seeds: their number is `seeds` (else 0), `error` the mean's standard error (else null)
    further       runs of finalists with further seeds: planned (at most, until all trials have ended), started, the
                  number in each state, and epochs: done, planned; null without search.finalists
    ahead         before one is of full length, and trials pause: trial, objective, value, epoch of the best at the
                  highest rung; else null
    baselines     the best of ce and of lsr, if they are searched
    verdict       of a comparison: its sentences, one for each student; empty before it is judged
    epochs        done, planned (all trials of full length; null: until a budget is spent)
    elapsed_s     from its creation until now, or until its last change, pauses included
    ran_s         seconds that drivers ran its trials, all sessions together, without pauses; null in a comparison
    rate          epochs_per_s of all trials together in this session; null if not running
    left_s        estimate of the driver, as its live view shows it; if it has none, of a comparison for example: at
                  each epoch the same share is stopped as so far, at `rate`; null if not running
    failures      the last three: trial, reason (first line)
    stopped       trials that were stopped for another reason than early stopping: trial, reason
    stopping      what `tfkd stop` has asked of the driver that runs: names of trials, or `sweep`
    gone          names of the study's trials whose folders are gone
    """
    plan = read_plan(experiment)
    alive = is_running(experiment)
    records, gone = read_all(experiment, alive)
    counts = Counter(r.status for r in records)
    over = counts["done"] + counts["stopped"] + counts["failed"]
    verdict = _verdict_of(experiment)
    further = _further_seeds(records, plan)
    runs = [run for record in records for run in record.runs]
    if plan.trials is None:
        finished = not alive and _is_spent(plan, experiment)
    else:
        finished = over >= plan.trials and (plan.kind == "sweep" or verdict is not None)
        finished = finished and (further is None or _further_ended(further))
    done_epochs = sum(epoch_of(r) for r in records)
    now = time.time()
    state = "interrupted"
    if finished:
        state = "finished"
    elif alive:
        state = "running"
    rate = _rate(experiment, runs, now) if state == "running" else None
    (rows, best), sweep = _status_rows(records, plan), plan.kind == "sweep"
    since = _changed(experiment / "driver.txt") if alive else math.inf
    return {
        "name": _shown_name(experiment),
        "preset": plan.about.get("compared", {}).get("preset"),
        "kind": plan.kind,
        "created": plan.created,
        "state": state,
        "metric": plan.metric,
        "mode": plan.mode if plan.metric else None,
        "trials": {
            "planned": plan.trials,
            "started": len(records),
            **{s: counts[s] for s in STATUSES},
        },
        "rows": rows,
        "constraints": limits_text(plan.limits),
        "best": best,
        "ahead": _ahead(records, plan),
        "further": further,
        "baselines": {name: rows[name]["best"] for name in BASELINES if sweep and name in rows},
        "verdict": verdict or [],
        "epochs": {"done": done_epochs, "planned": plan.epochs},
        "elapsed_s": _elapsed(
            plan.created, now if state == "running" else changed_last(experiment)
        ),
        "ran_s": spent(experiment, since=since)["seconds"] if sweep else None,
        "rate": rate,
        "left_s": _seconds_left(experiment, plan, records, further, rate),
        "failures": _last_failures(runs),
        "stopped": [
            {"trial": r.name, "reason": first_line(r.reason)}
            for r in runs
            if r.status == "stopped" and r.reason
        ],
        "stopping": sorted(stop_requests(experiment)) if state == "running" else [],
        "gone": gone if sweep else [],
    }


def _further_seeds(records: Sequence[Record], plan: ExperimentPlan) -> Tree | None:
    """Return how many runs with further seeds the finalists have, in each state, and of how many."""
    if plan.finalists is None or plan.metric is None or plan.trials is None:
        return None
    k, seeds = plan.finalists["k"], plan.finalists["seeds"]
    length = max(plan.rows.values(), default=0)
    runs = [run for record in records for run in record.further]
    over = sum(record.status in ("done", "stopped", "failed") for record in records)
    planned = k * seeds * len(plan.rows)
    if over >= plan.trials:  # then the finalists are known
        begun = {record.number: len(record.further) for record in records if record.further}
        chosen = finalists_of(records, k, plan.metric, plan.limits)
        if study_and_space(plan.about["space"]["search"].get("study"))[1] > 1:
            chosen = []  # the sweep went on in another space, and some trials may lie outside
        planned = sum(max(seeds, begun.get(n, 0)) for n in {*chosen, *begun})
    counts = Counter(run.status for run in runs)
    epochs = {"done": sum(map(epoch_of, runs)), "planned": planned * length}
    return {
        "planned": planned,
        "started": len(runs),
        **{s: counts[s] for s in STATUSES},
        "epochs": epochs,
    }


def _further_ended(further: Tree) -> bool:
    ended = sum(further[s] for s in ("done", "stopped", "failed"))
    return bool(ended >= further["planned"])


def finalists_of(records: Sequence[Record], k: int, metric: str, limits: Limits) -> list[int]:
    """Return the numbers of the finalists, as the search chooses them: by their own last epoch."""
    found = []
    for r in records:
        value = r.last.get(metric, math.nan)
        if r.status == "done" and math.isfinite(value):
            found.append(Candidate(r.number, r.objective, value, is_feasible(limits, r.last)))
    return finalists(found, k, maximize=scores.score_of(metric).direction == "max")


def _is_spent(plan: ExperimentPlan, experiment: Path) -> bool:
    """Return whether a budget of time of a sweep is spent, as far as its drivers have counted."""
    space, counted = plan.about["space"], read_spent(experiment)
    hours = counted["trial_seconds"] / 3600 * space["workers"]
    used = {
        "time_budget_s": counted["seconds"],
        "gpu_hours": hours * space["gpus_per_worker"],
        "cpu_hours": hours * space["cpus_per_worker"],
    }
    limits = {name: space["search"].get(name) for name in used}
    return any(limit is not None and used[name] >= limit for name, limit in limits.items())


def _last_failures(records: Sequence[Record]) -> list[dict[str, str]]:
    failed = [record for record in records if record.status == "failed"]
    failed.sort(key=lambda record: _changed(record.folder / "trial.json"))
    return [{"trial": r.name, "reason": first_line(r.reason)} for r in failed[-3:]]


def _status_rows(
    records: Sequence[Record], plan: ExperimentPlan
) -> tuple[dict[str, Tree], Tree | None]:
    """Return the number of trials in each state and the best one, by objective or arm; the best of all."""
    members: dict[str, list[Record]] = {name: [] for name in plan.rows}
    for record in records:
        members.setdefault(plan.row(record), []).append(record)
    rows: dict[str, Tree] = {}
    rankings = []
    for name, own in members.items():
        counts = Counter(record.status for record in own)
        ranked = ranked_trials(own, plan.metric, plan.limits) if plan.metric else []
        rows[name] = {**{s: counts[s] for s in STATUSES}, "best": _best_trial([ranked], plan)}
        rankings.append(ranked)
    return rows, _best_trial(rankings, plan)


def follow_status(experiment: Path, every_s: float = 1.0) -> Iterator[Tree]:
    """Yield the status now and every `every_s` seconds until the experiment stops running."""
    while True:
        found = status(experiment)
        yield found
        if found["state"] != "running":
            return
        time.sleep(every_s)


def best_of(experiment: Path) -> tuple[Record, ExperimentPlan]:
    """Return a sweep's best full-length trial, and the plan; a ConfigError if it has none."""
    plan = read_plan(experiment)
    if plan.metric is None:
        raise ConfigError(
            "a comparison of arms has no best trial; its verdict is in confirm.json", experiment
        )
    records, _ = read_all(experiment)
    winner = best(records, plan.metric, plan.limits)
    if winner is None:
        raise ConfigError(f"no trial of full length yet ({len(records)} trials)", experiment)
    return in_full(winner), plan


def front_of(front: Sequence[Record], plan: ExperimentPlan, trials: int) -> Tree:
    """Return the best of a sweep as JSON types (`tfkd best --json`). Keys are only ever added:

    metrics   metrics by which trials are judged; the first one leads
    trials    number of trials begun
    best      trial, objective, values by metric, parameters, config: of the best trial; with
              several metrics, of each trial that no other beats in all of them, the best in the
              first metric first; `feasible`: whether it meets the constraints. A finalist's values
              are means over its further seeds: `seeds` their number, `errors` the standard errors
    constraints   of the space, in words; empty without any
    """
    return {
        "metrics": plan.metrics,
        "constraints": limits_text(plan.limits),
        "trials": trials,
        "best": [
            {
                "trial": r.name,
                "objective": r.objective,
                "values": {m: r.judged[m] for m in plan.metrics},
                "errors": {m: r.error(m) for m in plan.metrics},
                "seeds": len(r.further) if plan.metric in r.means else 0,
                "parameters": r.parameters,
                "config": r.config,
                "feasible": is_feasible(plan.limits, r.judged),
                "limited": met_text(plan.limits, r.judged),
            }
            for r in front
        ],
    }


def best_lines(found: Tree, experiment: Path) -> list[str]:
    """Return the result of `front_of` as lines; with several metrics as a table."""
    metrics, best = found["metrics"], found["best"]
    limited = []
    if found["constraints"]:
        limited.append(f"constraints: {found['constraints']}; it {best[0]['limited']}")
        if not best[0]["feasible"]:
            limited.append("no trial of full length meets them; this is the best of the others")
    if len(metrics) == 1:
        value, seeds = f"{metrics[0]} {best[0]['values'][metrics[0]]:.4f}", best[0]["seeds"]
        value += error_text(best[0]["errors"][metrics[0]], seeds)
        return [
            f"{best[0]['trial']} of {_shown_name(experiment)}: {value}, the best of {found['trials']} on validation",
            *limited,
        ]
    title = (
        f"{_shown_name(experiment)}: of {found['trials']} trials, {len(best)} that no other beats "
    )
    rows = ["\t".join(["trial", *metrics])]
    for entry in best:
        values = (_front_value(entry["values"][metric]) for metric in metrics)
        rows.append("\t".join([on_one_line(entry["trial"]), *values]))
    lines = [f"{title}on validation in all of", *in_columns(rows, TERMINAL_WIDTH - 2)]
    return [*lines, f"below: {best[0]['trial']}, the best in {metrics[0]}", *limited]


def error_text(error: float | None, seeds: int) -> str:
    """Return what follows a finalist's value: its error, and over how many seeds it is the mean."""
    if not seeds:
        return ""
    spread = "" if error is None else f" ± {error:.4f}"
    return f"{spread} (mean of {counted(seeds, 'further seed')})"


def counted(number: int, what: str) -> str:
    """Return a number of things: 1 further seed, 3 further seeds."""
    return f"{number:,} {what}" + ("" if number == 1 else "s")


def value_text(record: Record, metric: str) -> str:
    """Return the value that judges a trial; a finalist's with its error and its seeds."""
    seeds = len(record.further) if metric in record.means else 0
    return f"{record.judged[metric]:.4f}{error_text(record.error(metric), seeds)}"


def _front_value(value: float) -> str:
    return f"{value:.0f}" if value > 1 and value == round(value) else f"{value:.4f}"


def _shown_name(experiment: Path) -> str:
    return experiment.absolute().name


def epoch_of(record: Record) -> int:
    return int(record.last.get("epoch", 0))


MOST_OF_A_TEXT = 2000
"""Most characters of one text that a line for people shows; JSON and CSV have all of it."""


def first_line(reason: str | None) -> str:
    begin = cut_short((reason or "").strip())
    return next(iter(begin.splitlines()), "no reason is known")


def cut_short(text: str) -> str:
    """Return a text of at most `MOST_OF_A_TEXT` characters; one that is longer ends in …"""
    return text if len(text) <= MOST_OF_A_TEXT else text[:MOST_OF_A_TEXT] + "…"


def _best_trial(rankings: Sequence[Sequence[Record]], plan: ExperimentPlan) -> Tree | None:
    """Return the best of all trials, and how many share its value.

    Args:
        rankings: the ranked trials of each row.
    """
    firsts = [ranked[0] for ranked in rankings if ranked]
    metric, limits = plan.metric, plan.limits
    winner = best(firsts, metric, limits) if metric else None
    if metric is None or winner is None:
        return None

    def place(record: Record) -> tuple[bool, bool, float]:
        judged = record.judged
        return is_feasible(limits, judged), metric in record.means, judged[metric]

    shared = [takewhile(lambda r: place(r) == place(winner), ranked) for ranked in rankings]
    return {
        "trial": winner.name,
        "objective": winner.objective,
        "value": winner.judged[metric],
        "shared_by": sum(1 for _ in chain.from_iterable(shared)),
        "feasible": is_feasible(limits, winner.judged),
        "seeds": len(winner.further) if metric in winner.means else 0,
        "error": winner.error(metric),
    }


def _verdict_of(experiment: Path) -> list[str] | None:
    """Return the sentences of a comparison's verdicts; None if it is not judged."""
    path = experiment / "confirm.json"
    try:
        with damaged(path):
            judged = parse_json(read_text(path))
            return [f"{found['student']}: {found['sentence']}" for found in judged["verdicts"]]
    except FileNotFoundError:
        return None


def _elapsed(created: str, until: float) -> float | None:
    with suppress(ValueError):
        return max(0.0, until - datetime.fromisoformat(created).timestamp())
    return None


def _rate(experiment: Path, records: Sequence[Record], now: float) -> float | None:
    """Return epochs a second of all trials together.

    Counted since the driver started, or since this session's first trial did if that was later.
    """
    start = _changed(experiment / "driver.txt")
    active = [r for r in records if r.last and _reported(r) >= start]
    if not active:
        return None
    began = {r.name: _began(r) for r in active}
    since = max(start, min(began.values()))
    epochs = 0
    for record in active:
        if began[record.name] >= start:
            epochs += epoch_of(record)
            continue
        seconds = 0.0  # resumed trial: count only the epochs that fit into this session
        for metrics in reversed(read_metrics(record.folder)):
            seconds += metrics.get("seconds", 0.0)
            if seconds > now - since:
                break
            epochs += 1
    return epochs / (now - since) if epochs and now > since else None


def _reported(record: Record) -> float:
    """Return when a trial reported last, in seconds since 1970."""
    return record.last.get("ended") or _changed(record.folder / "metrics.jsonl")


def _began(record: Record) -> float:
    """Return when a trial began, in seconds since 1970."""
    # the link is created when the trial first starts
    return record.last.get("began") or _changed(record.folder / "result.json")


def _ahead(records: Sequence[Record], plan: ExperimentPlan) -> Tree | None:
    """Return the best trial of the highest rung, if trials pause there and none has full length."""
    found = furthest(records, plan.metric) if plan.metric else None
    if found is None or any(r.status == "done" for r in records):
        return None
    return {
        "trial": found.name,
        "objective": found.objective,
        "value": found.last[plan.metric or ""],
        "epoch": epoch_of(found),
    }


def _seconds_left(
    experiment: Path,
    plan: ExperimentPlan,
    records: Sequence[Record],
    further: Tree | None,
    rate: float | None,
) -> float | None:
    """Return the driver's estimate, as its live view shows it; without one, that by the rate."""
    if not rate or plan.trials is None:
        return None
    written = _changed(experiment / "spent.json")
    told = read_spent(experiment).get("left_s")
    if told is not None and written >= _changed(experiment / "driver.txt"):
        return max(LEAST_LEFT_S, told - (time.time() - written))
    begun = [
        Begun(plan.row(r), epoch_of(r), int(r.config.get("epochs", 0)), r.status) for r in records
    ]
    new = plan.not_begun(b.row for b in begun)
    left = epochs_left(begun, new, plan.rule)
    if further is not None:
        left += max(0, further["epochs"]["planned"] - further["epochs"]["done"])
    return max(LEAST_LEFT_S, left / rate)


LEAST_LEFT_S = 1.0
"""Least seconds left that are told while an experiment runs."""


def spent(experiment: Path, running: int = 0, *, since: float = math.inf) -> Numbers:
    """Return what budgets count: `seconds` of a sweep's drivers, `trial_seconds` of its trials.

    Args:
        running: number of trials that run now.
        since: start of the driver that runs now, in seconds since 1970. inf: none does.
    """
    counted = read_spent(experiment)
    more = max(0.0, time.time() - max(_changed(experiment / "spent.json"), since))
    return {
        "seconds": counted["seconds"] + more,
        "trial_seconds": counted["trial_seconds"] + running * more,
    }


def status_lines(found: Tree, width: int = TERMINAL_WIDTH) -> list[str]:
    """Return a status as lines of at most `width` columns."""
    trials, epochs = found["trials"], found["epochs"]
    over = sum(trials[s] for s in ("done", "stopped", "failed"))
    tail = f": {found['state']}, {over:,}{_out_of(trials['planned'])} trials, "
    tail += f"{epochs['done']:,}{_out_of(epochs['planned'])} epochs"
    lines = [fitted(found["name"], max(8, width - len(tail))) + tail, ""]
    if found["preset"]:
        lines.insert(
            1, f"PRESET {found['preset']}: scaled down, not comparable with published results"
        )
    lines += [*in_columns(_table_rows(found), width), ""]
    if found["further"]:
        lines += [further_line(found["further"])]
    for line in _best_trial_lines(found):
        lines += wrapped(line, width)
    for sentence in found["verdict"]:
        lines += wrapped(f"verdict, {sentence}", width)
    times = _time_parts(found)
    lines += [", ".join(times)] if times else []
    lines += [f"failed: {f['trial']}: {f['reason']}" for f in found["failures"]]
    lines += [f"stopped: {f['trial']}: {f['reason']}" for f in found["stopped"][-3:]]
    if more := len(found["stopped"]) - 3:
        lines += [f"and {more} more for such a reason"] if more > 0 else []
    if found["stopping"]:
        lines.append(f"asked by tfkd stop to stop: {some_of(found['stopping'])}")
    if found["gone"]:
        lines += wrapped(gone_sentence(found["gone"]), width)
    return [fitted(line.rstrip(), width) for line in lines]


def further_line(further: Tree) -> str:
    """Return a sentence on the runs with further seeds: 4 of 9 done, 2 running."""
    told = [f"{further['done']:,} of {further['planned']:,} done"]
    told += [f"{further[state]:,} {state}" for state in _NOT_DONE if further[state]]
    return f"further seeds of finalists: {', '.join(told)}"


_NOT_DONE = ("running", "interrupted", "failed", "stopped")


def further_counts(count: Mapping[str, int]) -> str:
    """Return how runs with further seeds have ended: 9 runs, 1 failed."""
    total = counted(sum(count.values()), "run")
    return ", ".join([total, *(f"{count[s]:,} {s}" for s in _NOT_DONE if count.get(s))])


def _out_of(planned: int | None) -> str:
    return "" if planned is None else f" of {planned:,}"


def _table_rows(found: Tree) -> Sentences:
    heading = f"best {found['metric']}" if found["metric"] else ""
    paused = bool(found["trials"]["paused"])
    going = "interrupted" if found["state"] == "interrupted" else "running"
    yield f"\t{going}" + "\tpaused" * paused + f"\tfull\tstopped\tfailed\t{heading}"
    for name, row in found["rows"].items():
        best = f"{row['best']['value']:.4f} {row['best']['trial']}" if row["best"] else ""
        running = row["running"]
        if found["state"] != "running":
            running += row["interrupted"]
        counts = f"{running}" + f"\t{row['paused']}" * paused
        counts += f"\t{row['done']}\t{row['stopped']}\t{row['failed']}"
        yield f"{on_one_line(name)}\t{counts}\t{on_one_line(best)}"


def _best_trial_lines(found: Tree) -> Sentences:
    best, metric = found["best"], found["metric"]
    if best:
        ties = f", shared by {best['shared_by']} trials" if best["shared_by"] > 1 else ""
        error = error_text(best["error"], best["seeds"])
        yield f"best so far: {best['trial']}, {metric} {best['value']:.4f}{error}{ties}"
        if found["constraints"]:
            meets = "meets" if best["feasible"] else "no trial meets"
            yield from wrapped(f"{meets} the constraints: {found['constraints']}")
        for name, rival in found["baselines"].items():
            if rival is not None and rival["trial"] != best["trial"]:
                error = error_text(rival["error"], rival["seeds"])
                yield f"best {name}: {rival['trial']}, {metric} {rival['value']:.4f}{error}"
        ended = found["trials"]["started"] - found["trials"]["running"]
        ended -= found["trials"]["interrupted"]
        yield f"best of {ended:,} on validation: not a verdict"
    elif metric:
        yield "no trial of full length yet, so there is no best one"
        if ahead := found["ahead"]:
            yield (
                f"best of the highest rung: {ahead['trial']}, {metric} {ahead['value']:.4f} at epoch {ahead['epoch']}"
            )


def _time_parts(found: Tree) -> list[str]:
    shown = "ran" if found["ran_s"] else "elapsed"
    parts = []
    if found[f"{shown}_s"] is not None:
        parts.append(f"{shown} {duration(found[f'{shown}_s'])}")
    if found["rate"]:
        parts.append(f"{found['rate']:.2g} epochs/s")
    if found["left_s"] is not None:
        parts.append(f"about {duration(found['left_s'])} left")
    return parts


def duration(seconds: float) -> str:
    """Return a duration as 0:34, 12:05, 3:07:00."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"


# --- trials ----------------------------------------------------------------------------------------------------

Row = Tree


def key_of(row: Row, field: str) -> str | None:
    """Return the key of a row that matches a field's name or its end; None if the row lacks it.

    A key whose value is null matches.
    """
    return field if field in row else next((key for key in row if key.endswith(f".{field}")), None)


TEXTS = ("experiment", "trial", "objective", "status", "reason", "arm")
"""Fields that are always text."""


def as_written(text: str) -> Any:
    """Parse a filter's value as YAML; what is not YAML is text."""
    if text.lstrip("+-").lower() in ("nan", "inf", "infinity"):  # spellings of Python and of tables
        return float(text)
    try:
        value = parse_yaml(text, "--filter")
    except ConfigError:
        return text
    return value if isinstance(value, bool | int | float | str | list | dict | None) else text


def number_in(value: Any) -> float | None:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def csv_cell(row: Row, field: str) -> str:
    key = key_of(row, field)
    if key is None:
        return ""
    value = row[key]
    if number_in(value) is not None:
        return json.dumps(value)
    return inert(value if key in TEXTS else in_yaml(value))


_SIGNS = (
    "=+@|%\uff1d\ufe66\u207c\u208c\uff0b\ufe62\u207a\u208a\ufb29\uff20\ufe6b\uff5c\uff05\ufe6a"
    "\uff0d\ufe63\u2212\u207b\u208b-"
)
"""Characters with which a spreadsheet's formula may begin, also full-width, raised or lowered."""
# A spreadsheet of some languages begins a cell after ; or a tab, and a row at each line of a text.
_FORMULA = re.compile(rf"^(?=[\t\r\n])|(?:^|(?<=[;\t\r\n]))(?=[^\S\t\r\n]*[{_SIGNS}])")


def inert(text: str) -> str:
    """Return text that a spreadsheet does not run: an apostrophe stands before each formula."""
    return legible(_FORMULA.sub("'", text))  # `legible` escapes \r, which would end the row


# --- all experiments -------------------------------------------------------------------------------------------


def ls(storage: Path) -> list[Tree]:
    """Return the experiments in a storage directory, oldest first (`tfkd ls --json`).

    Keys: name, kind, created, state, planned and ended trials, best and metric (null in a
    comparison and before a trial is of full length). One that cannot be read has the state
    `unreadable` and the reason.
    """
    if not storage.is_dir():
        raise ConfigError(
            "no such directory; name the directory of the experiments: --storage DIR", storage
        )
    found = []
    for experiment, why in _experiments_in(storage):
        entry: Tree = dict.fromkeys(
            ("kind", "preset", "created", "trials", "ended", "best", "metric", "why")
        )
        try:
            if why:
                raise ConfigError(why)
            with damaged(experiment):
                s = status(experiment)
            ended = sum(s["trials"][k] for k in ("done", "stopped", "failed"))
            entry |= {
                key: s[key] for key in ("kind", "preset", "created", "state", "best", "metric")
            }
            entry |= {"trials": s["trials"]["planned"], "ended": ended}
        except (ConfigError, OSError) as error:
            words = error.problems if isinstance(error, ConfigError) else [str(error)]
            entry |= {"state": "unreadable", "why": "; ".join(words)}
        found.append({"name": experiment.name, **entry})
    return sorted(found, key=lambda e: (e["created"] or "", e["name"]))


HEADS = ("experiment.yaml", "confirm.yaml")
"""Files that mark a directory as an experiment."""


def _experiments_in(storage: Path) -> Iterator[tuple[Path, str]]:
    """Return (directory, error) of all experiments and of unclear directories.

    The error is None if the experiment can be read.
    """
    try:
        inside = sorted(p for p in storage.iterdir() if not p.name.startswith("."))
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", storage) from None
    for path in inside:
        try:
            if stat.S_ISDIR(path.stat().st_mode) and any(p.name in HEADS for p in path.iterdir()):
                yield path, ""
        except FileNotFoundError:  # a link to a missing target, or removed meanwhile
            continue
        except OSError as error:
            yield path, f"cannot be read: {error.strerror}"


def ls_lines(found: Sequence[Tree], width: int = TERMINAL_WIDTH) -> list[str]:
    """Return the experiments as lines of at most `width` columns."""
    if not found:
        return ["no experiments here"]
    rows = ["experiment\tcreated\tstate\tended\tbest"]
    for entry in found:
        created = fitted((entry["created"] or "")[:16].replace("T", " "), 16)
        ended = "" if entry["ended"] is None else str(entry["ended"])
        if entry["trials"] is not None:
            ended += f"/{entry['trials']}"
        best = f"{entry['best']['value']:.4f} {entry['best']['objective']}" if entry["best"] else ""
        arms = f"(of arms, preset {entry['preset']})" if entry["preset"] else "(of arms)"
        best = on_one_line(best) or (arms if entry["kind"] == "comparison" else "")
        rows.append(f"{on_one_line(entry['name'])}\t{created}\t{entry['state']}\t{ended}\t{best}")
    head, *below = in_columns(rows, width)
    lines = [head]
    for entry, line in zip(found, below, strict=True):
        lines.append(line)
        if entry["why"]:  # in full, on lines of their own
            why = on_one_line(entry["why"])
            lines += wrapped(why, width, first="  ")
    return [fitted(line.rstrip(), width) for line in lines]
