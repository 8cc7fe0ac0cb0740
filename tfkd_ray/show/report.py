"""The report on an experiment: one HTML file for screens, phones and paper.

A report is a list of `Section`s, each of HTML and `Figure`s. A figure is data alone; plotly.js
(from the plotly package, once, in the page) and matplotlib (`--figures`: SVG, PDF) both draw it. To add a figure,
write a function that returns one, and add it to `_figures`. A Content-Security-Policy forbids
the page all network access and foreign scripts; everything read from files is escaped.
"""

import math
import shlex
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from tfkd_ray.learn.config import TrainConfig
from tfkd_ray.learn.objectives import OwnObjective
from tfkd_ray.learn.own import only_reading
from tfkd_ray.settings import own_code
from tfkd_ray.settings.errors import ConfigError, Sentences, some_of
from tfkd_ray.settings.files import check_writable, kind_of, write_text
from tfkd_ray.settings.schema import validated
from tfkd_ray.settings.yaml import Tree, dump_yaml
from tfkd_ray.show.colours import objective_colour
from tfkd_ray.show.figures import (
    FEWEST,
    LUCK,
    MOST_BEST,
    Sweep,
    contours,
    curves,
    fidelity,
    importance_section,
    number_text,
    parallel,
    pareto_section,
    read_sweep,
    short_name,
    slices,
    trial_value,
    with_margin,
)
from tfkd_ray.show.heat_map import arm_grids, grid_figure, sweep_grids
from tfkd_ray.show.page import (
    Axis,
    Figure,
    Page,
    Panel,
    Section,
    Series,
    box_html,
    draw_files,
    escaped,
    page_html,
    prose,
    table_html,
)
from tfkd_ray.show.page_script import css_colour
from tfkd_ray.show.receipt import MIN_TRIALS, receipt, receipt_rows
from tfkd_ray.show.several import (
    NamedSweep,
    Rows,
    best_curves,
    best_rows,
    differing_rows,
    pair_rows,
    read_several,
)
from tfkd_ray.show.status import ExperimentPlan, cut_short, duration, read_lasts, read_plan, status
from tfkd_ray.space.baselines import doubted, doubts
from tfkd_ray.space.explain import EXPLAIN_TOLERANCE, amounts_to
from tfkd_ray.store.experiment import (
    Record,
    check_output,
    damaged,
    furthest,
    name_of_test,
    output_descriptor,
    read_judged,
    write_output,
)
from tfkd_ray.verdict.limits import is_feasible, limits_text, met_text
from tfkd_ray.verdict.scores import score_of

MAX_FAILURES = 50


# --- the report ------------------------------------------------------------------------------------------------


@only_reading()
def report(
    experiment: Path,
    out: Path,
    *,
    figures: Path | None = None,
    comparisons: Sequence[Path] = (),
    others: Sequence[Path] = (),
) -> list[Path]:
    """Write a report on a sweep or a comparison of arms; return its files, the page first.

    Args:
        experiment: its directory.
        out: the HTML file.
        figures: a directory for the same figures as SVG and PDF, and for heat maps also as CSV
            and LaTeX (`grid.csv`, `grid-OBJECTIVE.tex`).
        comparisons: directories of comparisons that confirm the sweep; their verdicts come first.
        others: directories of other sweeps, which the page shows side by side with it.
    """
    page = report_page(experiment, comparisons=comparisons, others=others)
    check_output(out, "-o report.html")
    places = [] if kind_of(out) or output_descriptor(out) is not None else [(out.parent, "-o FILE")]
    for folder, option in (*places, *([(figures, "--figures DIR")] if figures else [])):
        check_writable(folder.absolute(), option)
    written = [out] if write_output(out, page_html(page)) else []
    if figures is not None:
        for section in page.sections:
            for part in section.parts:
                if isinstance(part, Figure) and part.panels:
                    written += _write_figure(part, figures)
    return written


@only_reading()
def report_page(
    experiment: Path, *, comparisons: Sequence[Path] = (), others: Sequence[Path] = ()
) -> Page:
    """Return what the report on a sweep or a comparison shows; see `report`."""
    plan = read_plan(experiment)
    if others and comparisons:
        raise ConfigError(
            "--confirm: is for the report of one sweep, and several are given", experiment
        )
    for directory in comparisons:
        if read_plan(directory).kind != "comparison":
            raise ConfigError("not a comparison of arms: there is no confirm.yaml in it", directory)
    trials: dict[int, tuple[str, str]] = {}
    name = str(plan.about.get("compared", {}).get("title") or experiment.absolute().name)
    if others:
        several = read_several([experiment, *others])
        for one in several:
            trials |= _hovers(one.sweep, f"{one.name}: ")
        name = ", ".join(one.name for one in several)
        subtitle = (
            f"{len(several)} sweeps side by side; report of {time.strftime('%Y-%m-%d %H:%M')}"
        )
        sections = list(_sections_of_several(several))
    elif plan.kind == "comparison":
        subtitle, sections = _subtitle(experiment, plan), list(_comparison_sections(experiment))
    else:
        sweep = read_sweep(experiment, plan)
        subtitle, trials = _subtitle(experiment, plan), _hovers(sweep)
        sections = list(_sweep_sections(sweep, experiment, comparisons))
    return Page(name, subtitle, sections, trials)


def _hovers(sweep: Sweep, before: str = "") -> dict[int, tuple[str, str]]:
    """Return the name of each trial, and what hovering shows of it, by number."""
    return {r.number: (before + r.name, escaped(before) + sweep.hover(r)) for r in sweep.records}


def _sections_of_several(several: Sequence[NamedSweep]) -> Iterator[Section]:
    metric = score_of(several[0].sweep.metric).title
    text = (
        f"<p>The value is the {escaped(metric)} after the last epoch. The best of many trials looks better than it "
        "is, so this is not a verdict.</p>"
    )
    yield Section("Best of each", [text, _table_of(best_rows(several))])
    yield Section("All trials", [_trials_table(several)])
    differing, pairs = differing_rows(several), pair_rows(several)
    yield Section(
        "Settings that differ", [_table_of(differing) if differing[1:] else "<p>None.</p>"]
    )
    if pairs[1:]:
        text = "<p>Pairs are trials with the same objective, searched settings and seed.</p>"
        yield Section("Paired differences", [text, _table_of(pairs)])
    curved = best_curves(several)
    if curved.panels:
        yield Section("Training", [curved])


def _table_of(rows: Rows) -> str:
    return table_html(rows[0], rows[1:])


def _write_figure(figure: Figure, folder: Path) -> Iterator[Path]:
    """Write a figure as SVG and PDF, and the numbers of a heat map; yield the files."""
    yield from draw_files(figure, folder)
    for name, text in figure.files.items():
        write_text(folder / name, text)
        yield folder / name


def _subtitle(experiment: Path, plan: ExperimentPlan) -> str:
    s = status(experiment)
    what = "comparison of arms" if plan.kind == "comparison" else "sweep"
    counts = ", ".join(
        f"{s['trials'][key]:,} {word}"
        for key, word in (("done", "of full length"), ("stopped", "stopped early"), ("failed", "failed"),
                          ("running", "running"), ("interrupted", "interrupted"), ("paused", "paused"))
        if s["trials"][key]
    )  # fmt: skip
    made = f"{plan.created[:16].replace('T', ' ')}; report of {time.strftime('%Y-%m-%d %H:%M')}"
    kind = "runs" if plan.kind == "comparison" else "trials"
    ran = f"{kind} {_planned(plan)}" if plan.trials is None else f"{plan.trials:,} {kind} planned"
    name = f"{experiment.absolute().name}: " if plan.kind == "comparison" else ""
    return f"{name}{what}, {s['state']}; {ran}{', ' + counts if counts else ''}; begun {made}"


def _planned(plan: ExperimentPlan) -> str:
    return "until a budget is spent" if plan.trials is None else f"{plan.trials:,} planned"


def _sweep_sections(
    sweep: Sweep, experiment: Path, comparisons: Sequence[Path]
) -> Iterator[Section]:
    yield _verdict_section(sweep, comparisons)
    if sweep.records:
        title = "Trials, a sample" if sweep.everything else "All trials"
        yield Section(title, [_sample_text(sweep), _trials_table([NamedSweep("", sweep)])])
    yield Section("Best configurations", [_best_table(sweep)])
    if sweep.records:
        yield from _figures(sweep)
    yield Section("Receipt", [_receipt(sweep)])
    yield Section("Failures", [_failures(sweep)])
    for directory in comparisons:
        name = directory.absolute().name
        for section in _comparison_sections(directory, inside=True):
            parts = section.parts
            if len(comparisons) > 1:  # each has figures of the same names
                parts = [_renamed(part, name) for part in parts]
            yield Section(f"{name}: {section.title}", parts)
    yield Section("How to reproduce", list(_reproduce(sweep.plan, experiment)))


def _sample_text(sweep: Sweep) -> str:
    """Return a paragraph on which trials the page shows, if it does not show all."""
    if not sweep.everything:
        return ""
    return (
        f"<p>The page shows {len(sweep.records):,} of {len(sweep.all):,} trials, here and in all figures: the best "
        f"{MOST_BEST}, each objective's own, and others evenly by their numbers. The best configurations, the receipt "
        "and the failures are of all.</p>"
    )


def _renamed(part: str | Figure, name: str) -> str | Figure:
    """Return a figure whose files begin with a comparison's name."""
    if isinstance(part, str):
        return part
    files = {f"{name}-{file}": text for file, text in part.files.items()}
    return replace(part, key=f"{name}-{part.key}", files=files)


def _figures(sweep: Sweep) -> Iterator[Section]:
    """Yield the sections of figures, without empty ones; the last says what too few trials leave open."""
    together = [
        grid_figure(sweep_grids(sweep)),
        parallel(sweep),
        slices(sweep),
        contours(sweep),
    ]
    found = {
        "How settings relate to values": together,
        "Which settings matter": [importance_section(sweep)],
        "Training": [curves(sweep), pareto_section(sweep), fidelity(sweep)],
    }
    lacking = [f.lacking for figures in found.values() for f in figures if f.lacking]
    drawn = {title: [f for f in figures if f.panels] for title, figures in found.items()}
    for title, figures in drawn.items():
        parts: list[str | Figure] = list(figures)
        if title == "Training" and lacking:
            open_questions = escaped("; ".join(lacking))
            parts.append(
                f'<p class="sub">Too few trials to tell: {open_questions}. A figure needs {FEWEST} trials '
                f"that reached the same epoch. A judgment of the rungs needs {MIN_TRIALS} of full length.</p>"
            )
        if parts:
            yield Section(title, parts)


def _verdict_section(sweep: Sweep, comparisons: Sequence[Path]) -> Section:
    parts: list[str | Figure] = []
    for directory in comparisons:
        with damaged(directory / "confirm.json"):
            parts += _verdict_boxes(directory)
    if not parts:
        parts.append(box_html("open", "Not confirmed yet", _not_a_verdict(sweep)))
    return Section("Verdict", parts)


def _at_rung(sweep: Sweep, record: Record) -> str:
    value, epoch = record.last[sweep.metric], record.last["epoch"]
    return f"{score_of(sweep.metric).title} {value:.4f} at epoch {epoch:.0f}, where it paused"


def _not_a_verdict(sweep: Sweep) -> str:
    n = len(sweep.all)
    if not sweep.full:
        ahead = furthest(sweep.all, sweep.metric)
        there = (
            ""
            if ahead is None
            else f" Best of the highest rung: {ahead.name}, {_at_rung(sweep, ahead)}."
        )
        return f"No trial of full length yet ({n} trials), so there is no best one.{there}"
    first, *rest = sweep.ranked(sweep.all)
    value, again = first.judged[sweep.metric], sweep.metric in first.means
    alike = [r for r in rest if (sweep.metric in r.means) == again]
    ties = sum(r.judged[sweep.metric] == value for r in alike)
    shared = f" {ties + 1} trials share this value; the first one is named." if ties else ""
    if sweep.limits:
        shared += (
            f" Constraints: {limits_text(sweep.limits)}; it {met_text(sweep.limits, first.judged)}."
        )
        if not is_feasible(sweep.limits, first.judged):
            shared += " No trial of full length meets them; this is the best of the others."
    runs = any(record.status == "running" for record in sweep.all)  # its baselines may come yet
    if not runs and (found := doubts(sweep.records, sweep.metric, sweep.limits)):
        shared += f" Baselines {doubted(found)}; tfkd confirm tunes them first."
    return (
        f"Best: {first.name}, {score_of(sweep.metric).title} {trial_value(sweep, first)}.{shared} This is not a "
        f"verdict: it is the best of {n} on validation, and {LUCK}. Only new runs over several seeds, judged on the "
        "test split, show whether it is better than the baselines (tfkd confirm)."
    )


# --- tables ----------------------------------------------------------------------------------------------------

LONGEST_TABLE = 24
"""Most trials in a table that shows all its rows; a longer one scrolls."""
_ORDER = {"done": 0, "failed": 2}
"""Trials of full length first in the table, then those below it, then failed ones."""


def _trials_table(several: Sequence[NamedSweep]) -> str:
    """Return a table of all trials, best first, which the page sorts and filters."""
    sweep = several[0].sweep
    sign = -1 if sweep.plan.mode == "max" else 1
    columns: dict[str, list[str]] = {}
    rows = []
    for one in several:
        for head, names in _setting_columns(one.sweep).items():
            columns[head] = list(dict.fromkeys([*columns.get(head, []), *names]))
        ranks = {r.number: k for k, r in enumerate(one.sweep.ranked(one.sweep.records))}
        for record in one.sweep.records:
            epoch, value = one.sweep.shown(record)
            value = sign * value if math.isfinite(value) else math.inf
            full = record.status == "done"
            rank = ranks.get(record.number, math.inf) if len(several) == 1 else 0
            place = (_ORDER.get(record.status, 1), rank, 0 if full else -epoch, value)
            rows.append((place, record.number, one, record))
    first = ["trial", "experiment"] if len(several) > 1 else ["trial"]
    unit = f"value, {score_of(sweep.metric).unit}"
    heads = [*first, "objective", "status", "epochs", unit, *columns]
    body = "".join(
        _trial_row(one, record, heads, list(columns.values())) for *_, one, record in sorted(rows)
    )
    top = "".join(f'<th scope="col">{escaped(head)}</th>' for head in heads)
    further = (
        " With ±, it is the mean of further seeds, and its standard error."
        if any(record.further for one in several for record in one.sweep.records)
        else ""
    )
    short = len(rows) <= LONGEST_TABLE
    kind = "wide" if short else "wide tall"
    scrolls = "" if short else f" The table of {len(rows):,} trials scrolls."
    return (
        f"<p>The value is the {escaped(score_of(sweep.metric).title)} after a trial's last epoch. A trial that was "
        f"stopped early has a circle, and its value at its last rung.{further}{scrolls} Click on a trial here, "
        "or on a point or line below, to mark "
        "it in all views.</p>\n"
        '<div class="controls" hidden><input id="filter" type="search" aria-label="filter" '
        'placeholder="filter: words, or lr&lt;0.1 status=done">'
        '<select id="order" aria-label="order"><option value="">best first</option></select>'
        '<label><input id="only" type="checkbox" style="flex:none"> marked only</label>'
        '<output id="left"></output></div>\n'
        f'<div data-key="trials" class="{kind}"><table class="rows trials"><thead><tr>{top}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>\n"
    )


def _setting_columns(sweep: Sweep) -> dict[str, list[str]]:
    """Return the searched settings of all trials by full name, by the name of their column.

    The objectives' own settings of one name share a column; other settings have one each.
    """
    found: dict[str, list[str]] = {}
    for p in sweep.space.parameters:
        head = short_name(p.name)
        shared = all(name.startswith("objective.") for name in (p.name, *found.get(head, [])))
        found.setdefault(head if shared or head not in found else p.name, []).append(p.name)
    return found


def _trial_row(
    one: NamedSweep, record: Record, heads: Sequence[str], columns: Sequence[Sequence[str]]
) -> str:
    sweep = one.sweep
    epoch, value = sweep.shown(record)
    full = record.status == "done"
    kind = "dot full" if full else "dot"
    colour = css_colour(sweep.colour(record.objective))
    dot = f'<span class="{kind}" style="color:{colour}"></span>'
    number, shown = "", ""
    if math.isfinite(value):
        number = f"{value:.6g}"
        shown = f"{value:.2f}" if score_of(sweep.metric).unit == "%" else f"{value:.4f}"
        shown += f" at epoch {epoch}" if epoch < sweep.space.epochs else ""
        if (error := record.error(sweep.metric)) is not None:
            shown += f" ± {score_of(sweep.metric).number(error)}"
    epochs = f"{record.last.get('epoch', 0):.0f}"
    before = [one.name] if "experiment" in heads else []
    texts = [*before, record.objective, record.status, epochs, shown]
    exact = [*before, record.objective, record.status, epochs, number]
    for names in columns:
        here = [record.parameters[name] for name in names if name in record.parameters]
        texts.append(number_text(here[0]) if here else "")
        exact.append(str(here[0]) if here else "")
    cells = "".join(
        f'<td data-label="{escaped(head)}" data-value="{escaped(value)}">{escaped(text)}</td>'
        for head, value, text in zip(heads[1:], exact, texts, strict=True)
    )
    row_kind = "" if full else ' class="hollow"'
    first = f"<td>{dot}{escaped(record.name)}</td>"
    return f'<tr data-trials="{record.number}"{row_kind}>{first}{cells}</tr>\n'


def _best_table(sweep: Sweep) -> str:
    rows = []
    winners = sweep.ranked([f[0] for o in sweep.plan.rows if (f := sweep.ranked(sweep.full_of(o)))])
    for record in winners:
        gap = sweep.value(record.judged) - sweep.value(winners[0].judged)
        settings = "\n".join(
            f"{short_name(k)} = {number_text(v)}" for k, v in record.parameters.items()
        )
        part = " (baseline)" if record.objective in ("ce", "lsr") else ""
        n = len(sweep.of(record.objective, sweep.all))
        rows.append(
            [record.objective + part, record.name, trial_value(sweep, record), f"{gap:+.2f}" if gap else "0", str(n),
             settings, _equivalence(record)]
        )  # fmt: skip
        if sweep.limits:
            rows[-1].append(met_text(sweep.limits, record.judged))
    none = [o for o in sweep.plan.rows if not sweep.full_of(o)]
    text = f"<p>No trial of full length yet: {escaped(', '.join(none))}.</p>" if none else ""
    if not rows:
        return text or "<p>None.</p>"
    head = [
        "objective",
        "trial",
        sweep.axis().label,
        "from the best",
        "trials",
        "searched settings",
        "its loss",
    ]
    if sweep.limits:
        head.append(f"constraints: {limits_text(sweep.limits)}")
    start = (
        "<p>The best trial of each objective, by its value after the last epoch; trials that were stopped early cannot "
        "be best.</p>"
    )
    return start + table_html(head, rows) + text


def _equivalence(record: Record) -> str:
    """Return a sentence on the loss to which a trial's objective is equivalent."""
    if record.objective in ("ce", "lsr"):
        return "plain training" if record.objective == "ce" else "label smoothing itself"
    try:
        config = validated(TrainConfig, record.config, record.folder / "trial.json")
    except ConfigError as error:
        return f"cannot be read by this release: {error.problems[0]}"
    if isinstance(config.objective, OwnObjective):
        return (
            f"{config.objective.path}, your own code, which a report does not run: see tfkd explain"
        )
    amount = amounts_to(config.objective, config.data.num_classes)
    teacher = " (calculated with random teacher logits)" if config.objective.needs_teacher else ""
    lsr = f"alpha {amount.lsr.alpha:.3g}"
    if amount.residual < EXPLAIN_TOLERANCE:
        scale = f"{amount.lsr.loss_scale:.3g}"
        return f"this equals label smoothing {lsr} times {scale} within {amount.residual:.1g} of its gradient{teacher}"
    return (
        f"no label smoothing: even the most similar one, {lsr}, has a gradient that differs by "
        f"{100 * amount.residual:.0f} %{teacher}"
    )


def _receipt(sweep: Sweep) -> str:
    runs = [run for record in sweep.all for run in record.runs]
    seconds = sum(m.get("seconds", 0.0) for run in runs for m in run.metrics)
    count = Counter(r.status for r in sweep.all)
    trials = f"{_planned(sweep.plan)}, {len(sweep.all):,} begun, {count['stopped']:,} stopped early"
    rows = [["trials", trials], *map(list, receipt_rows(receipt(sweep.space, sweep.all)))]
    by_hand = [r.name for r in sweep.all if r.status == "stopped" and r.reason]
    if by_hand:
        rows.append(["stopped for another reason", some_of(by_hand, 10)])
    time = f"{duration(seconds)}, all {'runs' if len(runs) > len(sweep.all) else 'trials'} together"
    return table_html(["", ""], [*rows, ["time inside the training loop", time]])


def _failures(sweep: Sweep) -> str:
    failed = [r for r in sweep.all if r.status == "failed"]
    if not failed:
        return "<p>None.</p>"
    reasons: dict[str, list[str]] = {}
    for record in failed:
        why = cut_short((record.reason or "no reason is known").strip())
        reasons.setdefault(why, []).append(record.name)
    rows = [
        [str(len(names)), why, some_of(names, 10)]
        for why, names in sorted(reasons.items(), key=lambda i: -len(i[1]))
    ]
    more = len(rows) - MAX_FAILURES
    text = f"<p>and {more} other reasons</p>" if more > 0 else ""
    return table_html(["trials", "reason", "which"], rows[:MAX_FAILURES]) + text


def _reproduce(plan: ExperimentPlan, experiment: Path) -> Sentences:
    about = plan.about
    argv = [str(word) for word in about.get("command") or []]
    command = shlex.join([Path(argv[0]).name, *argv[1:]]) if argv else "not known"
    versions = ", ".join(
        f"{name} {version}" for name, version in (about.get("versions") or {}).items()
    )
    seeds = about.get("seeds")
    rows = [
        ["command", command],
        ["versions", versions],
        ["git commit", str(about.get("git_commit") or "none: it did not run in a repository")],
        [
            "seeds",
            ", ".join(f"{k} {v}" for k, v in seeds.items())
            if isinstance(seeds, dict)
            else str(seeds),
        ],
    ]
    if plan.kind == "sweep":
        where = shlex.quote(experiment.absolute().name)
        rows.append(
            ["the best trial again", f"tfkd best {where} > best.yaml && tfkd train best.yaml"]
        )
    yield table_html(["", ""], rows)
    tree = about.get("space") or about.get("compared") or {}
    yield f"<details><summary>All settings as tfkd read them</summary><pre>{escaped(dump_yaml(tree))}</pre></details>"


# --- a comparison of arms --------------------------------------------------------------------------------------


def _comparison_sections(directory: Path, *, inside: bool = False) -> list[Section]:
    with damaged(directory / "confirm.json"):
        return list(_sections_of_comparison(directory, inside=inside))


def _sections_of_comparison(directory: Path, *, inside: bool) -> Iterator[Section]:
    """Return a comparison's sections; `inside` a sweep's report, without the verdict."""
    from tfkd_ray.verdict.verdict import merged_notes

    plan, judged = read_plan(directory), read_judged(directory)
    if not inside:
        yield Section("Verdict", _verdict_boxes(directory))
    if judged is not None:
        notes = [
            *judged["notes"],
            *(note for found in judged["verdicts"] for note in found["notes"]),
        ]
        notes = merged_notes(notes, [arm["name"] for arm in judged["arms"]])
        listed = "".join(f"<li>{prose(note)}</li>" for note in notes)
        heat = grid_figure(arm_grids(judged), "grid-of-arms")
        drawn = [*([heat] if heat.panels else []), *_arm_figures(judged)]
        yield Section("Arms", [_arms_table(judged), *drawn, f"<ul>{listed}</ul>" if notes else ""])
        if judged["verdicts"]:
            yield Section(
                "Candidates against baselines", [*_lead_figures(judged), _leads_table(judged)]
            )
    failed = [r for r in read_lasts(directory) if r.status == "failed"]
    rows = [[r.name, cut_short((r.reason or "no reason is known").strip())] for r in failed]
    yield Section("Failures", [table_html(["run", "reason"], rows) if rows else "<p>None.</p>"])
    if not inside:
        yield Section("How to reproduce", list(_reproduce(plan, directory)))


def _verdict_boxes(directory: Path) -> list[str | Figure]:
    from tfkd_ray.verdict.verdict import sentences_beside

    judged = read_judged(directory)
    if judged is None:
        found = status(directory)
        s = found["trials"]
        text = (
            f"{s['done']} of {s['planned']} runs are trained. The test split has not been opened."
        )
        then = f"Resume it with: tfkd resume {shlex.quote(directory.name)}"
        if found["state"] == "running":
            then = "It is running, and opens the test split once all runs have ended."
        return [
            box_html(
                "open",
                "Not judged yet",
                f"{text} {then}",
            )
        ]
    boxes: list[str | Figure] = []
    where = f"test split of {name_of_test(judged['test'])}, trained on {judged['trained_on']}"
    if judged["preset"]:
        where += f"; preset {judged['preset']}: scaled down for a quick try, not comparable with published results"
    for found in judged["verdicts"]:
        kind = {"better": "yes", "not better": "no"}.get(found["verdict"], "open")
        searched = (
            f"; the best of {found['searched']:,} configurations, on validation"
            if found["searched"]
            else ""
        )
        text = f"{found['sentence']}."
        context = (
            f"{judged['title'] or directory.name}; student {found['student']}; {where}{searched}"
        )
        more = sentences_beside(found["sentence"], found["candidates"])
        boxes.append(box_html(kind, str(found["verdict"]).capitalize(), text, more, context))
    if not judged["verdicts"]:
        text = f"There are no candidates and baselines of the same student with two runs or more each ({where})."
        boxes.append(box_html("open", "No verdict", text))
    return boxes


def _arms_table(judged: Tree) -> str:
    from tfkd_ray.verdict.verdict import over_seeds

    printed = any(arm["published"] is not None for arm in judged["arms"])
    rows = []
    for arm in judged["arms"]:
        s = over_seeds(arm)
        row = [arm["name"], arm["role"], arm["student"], objective_text(arm["objective"]), str(s.n)]
        row.append(f"{s.mean:.2f}" if s.n else "")
        row.append(f"{s.sd:.2f}" if s.n > 1 else "")
        row.append(_interval_text(s.low, s.high))
        if printed:
            row += ["" if arm["published"] is None else f"{arm['published']:.2f}"]
        rows.append(row)
    head = [
        "arm",
        "role",
        "student",
        "objective",
        "runs",
        "test accuracy, %",
        "sd",
        "95 % over seeds",
    ]
    return table_html(head + (["published, %"] if printed else []), rows)


def _interval_text(low: float | None, high: float | None) -> str:
    finite = low is not None and high is not None and math.isfinite(low) and math.isfinite(high)
    return f"{low:.2f} to {high:.2f}" if finite else "-"


def objective_text(objective: Tree) -> str:
    """Return an arm's objective with its settings: kd: alpha 0.1, temperature 8."""
    name = str(own_code.shown_name(objective) or objective["name"])
    shown = objective["args"] if objective["name"] == "own" else objective
    rest = ", ".join(
        f"{k} {number_text(v)}"
        for k, v in shown.items()
        if k != "name" and (k, v) != ("loss_scale", 1.0)
    )
    return f"{name}: {rest}" if rest else name


def _bars_of(intervals: Sequence[tuple[float | None, float | None]], scale: float = 1.0) -> Series:
    """Return a bar for each interval that is finite, the first one lowest."""
    x: list[float | None] = []
    y: list[float | None] = []
    for row, (low, high) in enumerate(intervals):
        if low is not None and high is not None and math.isfinite(high - low):
            x += [scale * low, scale * high, None]
            y += [float(row), float(row), None]
    return Series("lines", x, y, width=3)


def _arm_colours(judged: Tree) -> dict[str, str]:
    """Return the colour of each arm: that of its objective."""
    named = {
        arm["name"]: str(own_code.shown_name(arm["objective"]) or arm["objective"]["name"])
        for arm in judged["arms"]
    }
    objectives = list(dict.fromkeys(named.values()))
    return {name: objective_colour(objective, objectives) for name, objective in named.items()}


def _arm_figures(judged: Tree) -> Iterator[Figure]:
    from tfkd_ray.verdict.verdict import over_seeds

    panels, colours = [], _arm_colours(judged)
    for student in dict.fromkeys(arm["student"] for arm in judged["arms"]):
        arms = [
            a
            for a in judged["arms"]
            if a["student"] == student and any("accuracy" in run for run in a["runs"])
        ]
        if not arms:
            continue
        all_x: list[float] = []
        dots = []
        for row, arm in enumerate(reversed(arms)):
            runs = [run for run in arm["runs"] if "accuracy" in run]
            x = [100 * run["accuracy"] for run in runs]
            all_x += x
            text = [
                f"{escaped(arm['name'])}, seed {run['seed']}: {100 * run['accuracy']:.2f} %"
                for run in runs
            ]
            dots.append(Series("points", x, [float(row)] * len(runs), "", colours[arm["name"]],
                               text, opacity=0.8))  # fmt: skip
        found = [over_seeds(arm) for arm in reversed(arms)]
        bars = _bars_of([(s.low, s.high) for s in found])
        ticks = tuple((float(i), arm["name"]) for i, arm in enumerate(reversed(arms)))
        series = [
            replace(bars, name="95 % of the mean"),
            *dots,
            Series("points", [s.mean for s in found], [i for i, _ in ticks], "mean"),
        ]
        rows = Axis("", ticks=ticks, span=(-0.6, len(arms) - 0.4))
        title, height = f"student {student}", 150 + 26 * len(arms)
        all_x += [v for v in bars.x if v is not None]
        panels.append(
            Panel(
                title,
                Axis("test accuracy, %", span=with_margin(all_x)),
                rows,
                series,
                height=height,
            )
        )
    if panels:
        sentence = (
            "Each coloured point is one run with its own seed. The other point is the mean, and the bar is its 95 % "
            "interval over seeds."
        )
        yield Figure("arms", "Test accuracy of the arms", sentence, panels)


def _described_leads(found: Tree) -> list[tuple[str, Tree]]:
    """Return the baselines with their leads over plain training; none of an earlier release."""
    return [(p["name"], p) for p in found.get("baseline_leads", ())]


def _lead_figures(judged: Tree) -> Iterator[Figure]:
    panels = []
    for found in judged["verdicts"]:
        scale = 100.0 if found["metric"]["percent"] else 1.0
        pairs = [(c["name"], p) for c in found["candidates"] for p in c["comparisons"]]
        pairs = [*pairs, *_described_leads(found)][::-1]
        bars = _bars_of([(p["low"], p["high"]) for _, p in pairs], scale)
        leads = [scale * p["lead"] for _, p in pairs]
        all_x = [0.0, *(x for x in bars.x if x is not None), *leads]
        ticks = tuple((float(i), f"{name} over {p['over']}") for i, (name, p) in enumerate(pairs))
        points = Series("points", leads, [i for i, _ in ticks], "mean lead")
        margin = found["metric"]["margin"]
        unit = "points" if found["metric"]["percent"] else "own unit"
        x = Axis(f"lead in {found['metric']['name']}, {unit}", span=with_margin(all_x))
        y = Axis("", ticks=ticks, span=(-0.6, len(pairs) - 0.4))
        bars = replace(bars, name="95 % over seeds")
        rules = [(0.0, ""), (scale * margin, f"{scale * margin:g}")]
        panels.append(
            Panel(
                f"student {found['student']}",
                x,
                y,
                [bars, points],
                rules,
                height=150 + 24 * len(pairs),
            )
        )
    if panels:
        sentence = (
            "The lead of each candidate over each baseline, paired by seed, with the 95 % interval of the mean. Right "
            "of 0 the candidate is ahead. The second line is the smallest lead worth having. Leads of baselines over "
            "plain training are described, not tested."
        )
        yield Figure("leads", "Leads over the baselines", sentence, panels)


def _leads_table(judged: Tree) -> str:
    from tfkd_ray.verdict.verdict import JudgedMetric

    rows = []
    for found in judged["verdicts"]:
        scale = 100.0 if found["metric"]["percent"] else 1.0

        def scaled(bound: float | None, scale: float = scale) -> float | None:
            return None if bound is None else scale * bound

        for candidate in found["candidates"]:
            for p in candidate["comparisons"]:
                images = _interval_text(*map(scaled, p["images"])) if p["images"] else "-"
                seen = "-"
                if p["smallest_seen"] is not None:
                    seen = JudgedMetric(**found["metric"]).smallest_seen_text(p["smallest_seen"])
                value = "< 0.001" if p["p"] < 0.001 else f"{p['p']:.3f}"
                rows.append([candidate["name"], p["over"], str(len(p["seeds"])), f"{scale * p['lead']:.2f}",
                             _interval_text(scaled(p["low"]), scaled(p["high"])), images, value, seen,
                             str(p["needed"] or "-"), candidate["verdict"]])  # fmt: skip
        for name, p in _described_leads(found):
            images = _interval_text(*map(scaled, p["images"])) if p["images"] else "-"
            rows.append([name, p["over"], str(len(p["seeds"])), f"{scale * p['lead']:.2f}",
                         _interval_text(scaled(p["low"]), scaled(p["high"])), images,
                         "-", "-", "-", "a baseline: described, not tested"])  # fmt: skip
    head = ["arm", "over", "seeds", "lead, points", "95 % over seeds", "95 % over images", "p",
            "smallest lead seen with probability 0.8", "seeds needed", "verdict on it"]  # fmt: skip
    return table_html(head, rows)
