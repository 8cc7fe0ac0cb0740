"""Tables of trials as text, JSON or CSV, and the log of one trial."""

import csv
import io
import json
import math
import os
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.cells import cell_len

from tfkd_ray.settings.columns import fitted, in_columns, on_one_line, wrapped
from tfkd_ray.settings.errors import ConfigError, Sentences, did_you_mean, some_of
from tfkd_ray.settings.files import json_tree, opened, read_at_most
from tfkd_ray.settings.yaml import in_yaml
from tfkd_ray.show.status import (
    MOST_OF_A_TEXT,
    TEXTS,
    ExperimentPlan,
    Row,
    as_written,
    csv_cell,
    cut_short,
    epoch_of,
    first_line,
    inert,
    is_running,
    key_of,
    number_in,
    read_lasts,
    read_plan,
    record_of,
)
from tfkd_ray.store.experiment import (
    STATUSES,
    Record,
    damaged,
    read_metrics,
    trial_folders,
)
from tfkd_ray.verdict.scores import sign

MOST_TRACE_BYTES = 2**18
"""Most bytes that `logs` shows of a traceback, which usually has some thousands."""
FIRST = ("trial", "number", "objective", "status", "epoch")
OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    "<=": lambda a, b: a <= b,
    ">=": lambda a, b: a >= b,
    "!=": lambda a, b: a != b,
    "=": lambda a, b: a == b,
    "<": lambda a, b: a < b,
    ">": lambda a, b: a > b,
}


def trials_table(
    experiment: Path,
    *,
    sort: str = "number",
    filter: Sequence[str] = (),
    columns: str | None = None,
    limit: int | None = None,
    output: str = "table",
    others: Sequence[Path] = (),
    width: int | None = None,
) -> str:
    """Return the trials of an experiment, or of several, as text.

    A field is trial, number, objective, status, epoch, reason, a metric after the last epoch, or a searched parameter
    by its whole name or its end (`alpha` is that of each trial's own objective). A finalist has `further_seeds`, runs
    done, and of the sweep's metric the `mean` over them and its standard `error`.

    Args:
        sort: a field, ascending; `FIELD:desc` for descending. Trials without the field come last.
        filter: conditions `FIELD OP VALUE`, all of which must hold; OP is one of = != < <= > >=. A
            value is YAML: null, true and 1 are not text, "true" and "1" are. A trial without the
            field does not match.
        columns: fields, comma-separated. None: all for csv and json, a choice of them for a table.
        limit: maximum number of trials.
        output: `table`, `json` (a list of objects) or `csv`.
        others: more experiments; each trial then has the field `experiment`.
        width: most columns of a table without `columns`. None: each trial's settings are whole.
    """
    plan = read_plan(experiment)
    rows = [_row(record, plan.metric) for record in read_lasts(experiment)]
    if others:
        rows = _rows_of_several([experiment, *others], plan)
    fields = _fields(rows)
    known = _known(fields, plan.metric)
    problems: list[str] = []
    tests = [_test(text, known, rows, plan, problems) for text in filter]
    chosen = None if columns is None else [column.strip() for column in columns.split(",")]
    problems += _sort_problems(sort)
    key, _, order = sort.partition(":")
    if rows:
        problems += _unknown("--sort", [key], known) + _unknown("--columns", chosen or [], known)
    problems += _output_problems(output, limit)
    if problems:
        raise ConfigError(problems)
    passing = [row for row in rows if all(test(row) for test in tests if test)]
    found = _sorted(passing, key, order == "desc")[:limit]
    if output == "json":
        return _as_json(found, chosen)
    if output == "csv":
        return _as_csv(found, chosen or fields)
    if not chosen:
        return "\n".join(_usual(found, plan, width))
    cells = ["\t".join(_cell(row, field) for field in chosen) for row in found]
    return "\n".join(in_columns(["\t".join(chosen), *cells]))


def _rows_of_several(experiments: Sequence[Path], first: ExperimentPlan) -> list[Row]:
    """Return the trials of experiments that are ranked by one metric, in their order."""
    rows: list[Row] = []
    for experiment in experiments:
        plan = read_plan(experiment)
        if plan.metric != first.metric:
            raise ConfigError(
                f"has {plan.metric or 'a test split'} as its metric, and the first experiment "
                f"{first.metric or 'a test split'}: list them separately",
                experiment,
            )
        name = experiment.absolute().name
        rows += [
            {"experiment": name, **_row(record, plan.metric)} for record in read_lasts(experiment)
        ]
    return rows


def _fields(rows: Sequence[Row]) -> list[str]:
    """Return all fields of the rows, in the order of columns."""
    own = (key for row in rows for key in row if key != "reason")
    before = ["experiment"] if any("experiment" in row for row in rows) else []
    return list(dict.fromkeys([*before, *FIRST, *own, "reason"]))


def _known(fields: Sequence[str], metric: str | None) -> set[str]:
    """Return all names that a field may be called by."""
    names = set() if metric is None else {metric}
    for field in fields:
        parts = field.split(".")
        names.update(".".join(parts[k:]) for k in range(len(parts)))
    return names


def _sort_problems(sort: str) -> Sentences:
    key, _, order = sort.partition(":")
    if order not in ("", "desc", "asc"):
        yield f"--sort {sort}: {key}, or {key}:desc for descending order"


def _unknown(option: str, names: Sequence[str], known: set[str]) -> list[str]:
    return [
        f"{option}: no such field {name!r}; {did_you_mean(name, known)}"
        for name in names
        if name not in known
    ]


def _output_problems(output: str, limit: int | None) -> Sentences:
    formats = ("table", "json", "csv")
    if output not in formats:
        yield f"--output: no such format {output!r}; {did_you_mean(output, formats)}"
    if limit is not None and limit < 1:
        yield f"--limit: at least 1, got {limit}"


def _as_json(rows: Sequence[Row], chosen: Sequence[str] | None) -> str:
    shown = []
    for row in rows:
        fields = chosen or dict.fromkeys([*row, "reason"])
        shown.append({field: json_tree(_value(row, field)) for field in fields})
    return json.dumps(shown, indent=1, ensure_ascii=False, allow_nan=False)


def _as_csv(rows: Sequence[Row], fields: Sequence[str]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(map(inert, fields))
    writer.writerows([csv_cell(row, field) for field in fields] for row in rows)
    return text.getvalue().rstrip("\n")


def _row(record: Record, metric: str | None) -> Row:
    ends = {
        name.rpartition(".")[2] for name in record.parameters
    }  # `lr` is the searched value, not that of the last epoch
    return {
        "trial": record.name,
        "number": record.number,
        "objective": record.objective,
        "status": record.status,
        "epoch": epoch_of(record),
        **{k: v for k, v in record.last.items() if k != "epoch" and k not in ends},
        **record.parameters,
        **_of_further_seeds(record, metric or ""),
        **({"reason": record.reason} if record.reason is not None else {}),
    }


def _of_further_seeds(record: Record, metric: str) -> Row:
    """Return what a finalist has besides: runs done, and the metric's mean and error over them."""
    if not record.further:
        return {}
    found: Row = {"further_seeds": sum(run.status == "done" for run in record.further)}
    mean, error = record.means.get(metric), record.error(metric)
    found |= {} if mean is None else {"mean": mean}
    return found if error is None else found | {"error": error}


def _value(row: Row, field: str) -> Any:
    key = key_of(row, field)
    return None if key is None else row[key]


def _test(
    text: str, known: set[str], rows: Sequence[Row], plan: ExperimentPlan, problems: list[str]
) -> Callable[[Row], bool] | None:
    """Return whether a row passes a filter; errors of the filter are added to `problems`."""
    parts = re.fullmatch(r"\s*([^\s=!<>]+)\s*(<=|>=|!=|=|<|>)\s*(\S.*?)\s*", text)
    if parts is None:
        problems.append(
            f"--filter {text!r}: needs FIELD, one of = != < <= > >=, and a value: 'val_accuracy>0.9'"
        )
        return None
    field, operator, value = parts[1], parts[2], parts[3]
    if rows and field not in known:
        problems.append(f"--filter {text!r}: no such field {field!r}; {did_you_mean(field, known)}")
        return None
    wanted = value if field in TEXTS else as_written(value)
    options = {
        "status": STATUSES,
        "objective": tuple({**plan.rows, **{r["objective"]: 0 for r in rows}}),
    }.get(field)
    if options and plan.kind == "sweep" and value not in options:
        problems.append(f"--filter {text!r}: no such {field}; {did_you_mean(value, options)}")
        return None
    number = number_in(wanted)
    if number is None and operator not in ("=", "!="):
        problems.append(f"--filter {text!r}: {operator} needs a number, got {value!r}")
        return None

    def passes(row: Row) -> bool:
        key = key_of(row, field)
        if key is None:
            return False
        there = number_in(row[key])
        if number is not None and there is not None:
            if math.isnan(number) and operator in ("=", "!="):
                return math.isnan(there) == (operator == "=")
            return OPERATORS[operator](there, number)
        return operator in ("=", "!=") and OPERATORS[operator](in_yaml(row[key]), in_yaml(wanted))

    return passes


def _sorted(rows: list[Row], field: str, descending: bool) -> list[Row]:
    """Sort by a field: numbers before text, rows without it last, otherwise stable."""

    def usable(row: Row) -> bool:
        key = key_of(row, field)
        return key is not None and not (isinstance(row[key], float) and math.isnan(row[key]))

    def key(row: Row) -> tuple[bool, float, str]:
        value = _value(row, field)
        number = number_in(value)
        return (True, 0.0, in_yaml(value)) if number is None else (False, number, "")

    return sorted(filter(usable, rows), key=key, reverse=descending) + [
        r for r in rows if not usable(r)
    ]


def _cell(row: Row, field: str) -> str:
    """Return a value as a table shows it: YAML, short numbers; empty if the row lacks it."""
    key = key_of(row, field)
    if key is None:
        return ""
    value = row[key]
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, str) and len(value) > MOST_OF_A_TEXT:
        value = cut_short(value)
    return on_one_line(cut_short(str(value) if key in TEXTS else in_yaml(value)))


def _usual(rows: Sequence[Row], plan: ExperimentPlan, width: int | None) -> list[str]:
    metric = plan.metric or "train_loss"
    several = any("experiment" in row for row in rows)
    finalists = any("further_seeds" in row for row in rows)
    head = f"trial\tstatus\tepoch\t{metric}" + "\tfurther seeds" * finalists
    lines, settings = [f"experiment\t{head}" if several else head], ["settings"]
    for row in rows:
        value = f"{row[metric]:.4f}" if metric in row else ""
        own = [key for key in row if "." in key or (plan.kind == "comparison" and key == "seed")]
        parameters = " ".join(f"{k.split('.', 1)[-1]}={_cell(row, k)}" for k in own)
        failed = row["status"] == "failed" and row.get("reason")
        last = first_line(row["reason"]) if failed else parameters
        trial = on_one_line(cut_short(row["trial"]))
        before = f"{on_one_line(row['experiment'])}\t" if several else ""
        value += f"\t{_mean_cell(row)}" if finalists else ""
        lines.append(f"{before}{trial}\t{row['status']}\t{row['epoch']}\t{value}")
        settings.append(on_one_line(last))
    return _with_last_column(in_columns(lines, width), settings, width)


def _with_last_column(lines: Sequence[str], last: Sequence[str], width: int | None) -> list[str]:
    """Return lines with a last column, cut to a width; then a line says where all of it is."""
    size = max(map(cell_len, lines))
    whole = [
        f"{line}{' ' * (size - cell_len(line))}  {text}".rstrip()
        for line, text in zip(lines, last, strict=True)
    ]
    if width is None or max(map(cell_len, whole)) <= width:
        return whole
    return [*(fitted(line, width) for line in whole), *wrapped(_CUT, width)]


_CUT = "(lines are cut to the terminal's width; -o csv or a pipe shows all columns, --columns some)"


def _mean_cell(row: Row) -> str:
    """Return a finalist's mean over further seeds with its error; their number before there is one."""
    if "mean" not in row:
        return f"{row['further_seeds']} done" if "further_seeds" in row else ""
    return f"{row['mean']:.4f}" + (f" ± {row['error']:.4f}" if "error" in row else "")


# --- one trial's log -------------------------------------------------------------------------------------------


def logs(
    experiment: Path,
    trial: str,
    *,
    follow: bool = False,
    every_s: float = 0.5,
    width: int | None = None,
) -> Sentences:
    """Yield a trial's log by line: its epochs and how it ended, with the traceback if it failed.

    Args:
        trial: its name, a unique beginning of it (t0007), or its number; or an objective, or an arm:
            the logs of its trials, each below its name.
        follow: wait for more while the trial runs.
        width: most columns of an epoch's line, which has the values that fit. None: all values.
    """
    plan = read_plan(experiment)
    if trial in plan.rows:
        return _logs_of_row(experiment, trial, follow, width)
    folder = folder_of_trial(experiment, trial, list(plan.rows))
    return _log_lines(experiment, folder, follow, every_s, width)


def _logs_of_row(experiment: Path, row: str, follow: bool, width: int | None) -> Sentences:
    """Yield the logs of an objective's or an arm's trials, each below its name."""
    plan = read_plan(experiment)
    records = [record for record in read_lasts(experiment) if plan.row(record) == row]
    if follow:
        names = some_of([record.name for record in records]) or "none has begun"
        raise ConfigError(f"--follow: one trial at a time; {row} has {names}", experiment)
    if not records:
        yield f"no trial of {row} has begun"
    for number, record in enumerate(records):
        yield from ["", record.name] if number else [record.name]
        room = None if width is None else width - 2
        # each place takes the epochs of all trials: of one trial alone
        for line in _log_lines(experiment, record.folder, False, 0, room, placed=False):
            yield f"  {line}"


COMPARED = 2000
"""Most trials of a sweep whose epochs are read to say why one of them was stopped."""


def _place_at_the_end(experiment: Path, record: Record) -> str:
    """Return the place of a trial that was stopped early, among those that reached its last epoch."""
    plan = read_plan(experiment)
    metric, epoch = plan.metric, len(read_metrics(record.folder))
    briefs = read_lasts(experiment)
    if metric is None or not epoch or len(briefs) > COMPARED:
        return ""
    values: dict[str, float] = {}
    for other in briefs:
        metrics = read_metrics(other.folder) if plan.row(other) == plan.row(record) else []
        if len(metrics) >= epoch and metric in metrics[epoch - 1]:
            values[other.name] = sign(metric) * metrics[epoch - 1][metric]
    if record.name not in values:
        return ""
    place = 1 + sum(value > values[record.name] for value in values.values())
    return (
        f"early, after epoch {epoch}; its {metric} there is number {place} of the {len(values)} trials of "
        f"{plan.row(record)} that reached it"
    )


def folder_of_trial(experiment: Path, trial: str, others: Sequence[str] = ()) -> Path:
    """Return the folder of the trial that a user names: by name, its unique beginning, or number.

    `others` are further names that would do.
    """
    folders = {
        folder.name: folder
        for folder in trial_folders(experiment)
        if (folder / "trial.json").is_file()
    }
    if trial in folders:
        return folders[trial]
    wanted = f"t{int(trial):04d}-" if trial.isdecimal() else trial
    near = [folder for name, folder in folders.items() if trial and name.startswith(wanted)]
    runs = [folder for folder in near[1:] if folder.name.startswith(f"{near[0].name}-seed")]
    if len(near) == 1 + len(runs):  # with its runs with further seeds
        return near[0]
    if near:
        raise ConfigError(
            f"{trial!r} is the beginning of {len(near)} trials: {near[0].name}, {near[1].name}, ..."
        )
    known = [*folders, *others]
    raise ConfigError(
        f"no trial {trial!r}; " + (did_you_mean(trial, known) if folders else "none has begun"),
        experiment,
    )


_FIRST_VALUES = ("val_accuracy", "train_loss", "lr", "seconds", "val_nll")
"""Values of an epoch that a narrow terminal shows first, after the metric of the sweep."""


def _values_that_fit(names: Sequence[str], first: str | None, width: int | None) -> list[str]:
    """Return the values of an epoch that fit on a line, in their order.

    Args:
        first: the metric of the sweep.
        width: columns of the line. None: all fit.
    """
    if width is None:
        return list(names)
    preferred = dict.fromkeys([*([first] if first else []), *_FIRST_VALUES, *names])
    room, chosen = width - len("epoch 1000/1000"), []
    for name in preferred:
        size = len(name) + len("   -1.234e-05")
        if name in names and size <= room:
            room -= size
            chosen.append(name)
    return [name for name in names if name in chosen]


def _log_lines(
    experiment: Path,
    folder: Path,
    follow: bool,
    every_s: float,
    width: int | None,
    *,
    placed: bool = True,
) -> Sentences:
    shown, metric, left_out = 0, read_plan(experiment).metric, 0
    while True:
        record = record_of(
            folder
        )  # read the status first, so that all epochs written before the end are read
        alive = is_running(experiment)
        metrics = read_metrics(folder)
        total = record.config.get("epochs", "?") if record else "?"
        for line in metrics[shown:]:
            names = [name for name in line if name != "epoch"]
            fitting = _values_that_fit(names, metric, width)
            left_out = len(names) - len(fitting)
            values = "  ".join(f"{name} {line[name]:.4g}" for name in fitting)
            yield f"epoch {line.get('epoch', 0):.0f}/{total}  {values}"
        shown = max(shown, len(metrics))  # a file that is being replaced may be empty
        if not follow or record is None or record.status != "running" or not alive:
            break
        time.sleep(every_s)
    if left_out:
        yield f"({left_out} more values of each epoch do not fit; | cat shows them)"
    if record is not None:
        state = "interrupted" if record.status == "running" and not alive else record.status
        why = record.reason
        if placed and state == "stopped" and not why:
            why = _place_at_the_end(experiment, record)
        yield f"{state}: {why[:MOST_TRACE_BYTES]}" if why else state
        if record.reason is not None and len(record.reason) > MOST_TRACE_BYTES:
            yield f"(the first {MOST_TRACE_BYTES} characters of its reason; the rest is in {folder / 'trial.json'})"
        error = folder / "error.txt"
        if record.status == "failed" and os.path.lexists(error):
            with damaged(error), opened(error, follow=False) as file:
                trace = read_at_most(file, MOST_TRACE_BYTES + 1)
            yield from trace[:MOST_TRACE_BYTES].decode(errors="replace").splitlines()
            if len(trace) > MOST_TRACE_BYTES:
                yield f"(its first {MOST_TRACE_BYTES} bytes; the rest is in {error})"
