"""The page of a report: figures as data, drawn by plotly in HTML and by matplotlib as SVG and PDF.

A series names the trials of its points, so that the page's script (`page_script`) can show their
settings and mark a trial in all views. Colours are those of a light page; the script has those of a dark one.
"""

import base64
import hashlib
import html
import json
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tfkd_ray.settings.files import json_tree, whole_file
from tfkd_ray.settings.yaml import Tree
from tfkd_ray.show.page_script import DARK, PALE_LINE, PALE_TEXT, STYLE, script

VIRIDIS = ("#440154", "#3B528B", "#21918C", "#5EC962", "#FDE725")
"""Five colours from low to high."""


# --- what is drawn ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Axis:
    """One axis of a panel."""

    label: str
    log: bool = False
    ticks: tuple[tuple[float, str], ...] = ()
    """(position, label); empty: numbers."""
    span: tuple[float, float] | None = None
    """Visible part; None: everything."""


@dataclass(frozen=True)
class Series:
    """Points, lines, horizontal bars or text in a panel. None in `y` breaks a line."""

    kind: str
    x: Sequence[float | None]
    y: Sequence[float | None]
    name: str = ""
    """Name in the legend; empty: not in it."""
    colour: str = DARK
    text: Sequence[str] = ()
    """Text of each point: shown on hovering; of kind `text`, drawn."""
    width: float = 1.5
    opacity: float = 1.0
    trials: Sequence[int | None] = ()
    """Number of each point's trial; its settings are shown on hovering. Empty: points of no trial."""
    hollow: bool = False
    """True for circles instead of dots, and for dotted lines: trials below full length."""
    dash: str = "solid"
    """Kind of the lines that are not hollow, in plotly's words."""


@dataclass(frozen=True)
class Heat:
    """A table of numbers whose cells are coloured from the worst to the best."""

    across: Sequence[str]
    """Head of each column."""
    down: Sequence[str]
    """Head of each row."""
    values: Sequence[Sequence[float | None]]
    """By row; None: an empty cell."""
    texts: Sequence[Sequence[str]]
    """Text of each cell; a second line is small."""
    about: Sequence[Sequence[str]]
    """Text of each cell on hovering."""
    trials: Sequence[Sequence[Sequence[int]]]
    """Numbers of each cell's trials."""
    low_is_good: bool = False
    best: Collection[tuple[int, int]] = ()
    """Rows and columns of the cells that are best, whose text is bold."""
    unit: str = ""
    """Label of the scale of colours."""
    factor: float = 1.0
    """Factor from `values` to numbers in the unit."""


@dataclass(frozen=True)
class Panel:
    """One pair of axes."""

    title: str
    x: Axis
    y: Axis
    series: Sequence[Series]
    rules: Sequence[tuple[float, str]] = ()
    """Vertical dashed lines: position and label."""
    surface: (
        tuple[Sequence[float], Sequence[float], Sequence[Sequence[float | None]], str] | None
    ) = None
    """Filled contours: x, y, z by row, and the label of z."""
    heat: Heat | None = None
    """A table instead of points; the axes have its labels."""
    height: int = 320
    """Height in pixels."""


@dataclass(frozen=True)
class Figure:
    """A title, a sentence and panels side by side; without panels the sentence says why."""

    key: str
    """Stem of its files."""
    title: str
    sentence: str
    panels: Sequence[Panel] = ()
    wide: bool = False
    """True: its panels need more width."""
    lacking: str = ""
    """What cannot be told from so few trials; empty: nothing."""
    files: Mapping[str, str] = field(default_factory=dict)
    """Text files with its numbers, by name."""


@dataclass(frozen=True)
class Section:
    """A heading with HTML and figures below it."""

    title: str
    parts: Sequence[str | Figure] = field(default_factory=list)


# --- words -----------------------------------------------------------------------------------------------------


def escaped(text: str) -> str:
    """Escape text for HTML and for plotly's labels, which are HTML."""
    return html.escape(text, quote=True)


LONGEST_UNBROKEN = 24
"""Most letters of a word with hyphens, such as a date or an arm's name, that stays on one line."""


def prose(text: str) -> str:
    """Escape a text whose lines break between words, and not at the hyphens of short ones."""
    parts = []
    for part in re.split(r"(\s+)", text):
        unbroken = re.search(r"\w-\w", part) and len(part) <= LONGEST_UNBROKEN
        parts.append(f'<span class="whole">{escaped(part)}</span>' if unbroken else escaped(part))
    return "".join(parts)


# --- HTML ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Page:
    """What a report shows, before it is HTML."""

    title: str
    subtitle: str
    sections: Sequence[Section]
    trials: Mapping[int, tuple[str, str]] = field(default_factory=dict)
    """The name of each trial, and what hovering shows, by number."""


def page_html(page: Page, live: str = "") -> str:
    """Return the whole file.

    Args:
        live: state of a followed experiment. Its page asks where it came from for what has changed.
    """
    from plotly.offline import get_plotlyjs

    plotted = any(
        isinstance(part, Figure) and any(panel.heat is None for panel in part.panels)
        for section in page.sections
        for part in section.parts
    )
    scripts = [get_plotlyjs()] if plotted or live else []
    if plotted or page.trials or live:
        scripts.append(script(follow=bool(live)))
    marked = '<div id="marked" hidden></div>\n' if page.trials or live else ""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_policy(scripts, live)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escaped(page.title)}</title>\n<style>{STYLE}</style></head>\n<body>\n"
        "<noscript><p>The plots need JavaScript, from this file alone; all else does not.</p></noscript>\n"
        f"{main_html(page, live)}{marked}{''.join(f'<script>{text}</script>' for text in scripts)}"
        "</body></html>\n"
    )


def _policy(scripts: Sequence[str], live: str) -> str:
    """Return the page's Content-Security-Policy."""
    hashes = " ".join(map(_hash, scripts)) or "'none'"
    policy = (
        f"default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; script-src {hashes}"
    )
    return f"{policy}; connect-src 'self'" if live else policy


def main_html(page: Page, live: str = "") -> str:
    """Return the part of a page that changes while an experiment runs."""
    links = " ".join(
        f'<a href="#s{i}">{escaped(section.title)}</a>' for i, section in enumerate(page.sections)
    )
    body = "".join(
        f'<section id="s{i}"><h2>{escaped(section.title)}</h2>{"".join(map(_part, section.parts))}</section>\n'
        for i, section in enumerate(page.sections)
    )
    told = ""
    if page.trials:
        texts = {str(number): list(text) for number, text in page.trials.items()}
        told = f'<script type="application/json" id="trials">{_inert_json(texts)}</script>\n'
    kind = ' class="interrupted"' if " was interrupted; " in live else ""
    followed = f'<p id="live"{kind} role="status">{escaped(live)}</p>\n' if live else ""
    return (
        f'<main>\n<h1>{escaped(page.title)}</h1>\n<p class="sub">{prose(page.subtitle)}</p>\n'
        f"{followed}<nav>{links}</nav>\n{body}{told}</main>\n"
    )


def _hash(script: str) -> str:
    """Return the hash of a script for the Content-Security-Policy."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _part(part: str | Figure) -> str:
    if isinstance(part, str):
        return part
    panels = "".join(_panel_html(part.key, panel) for panel in part.panels)
    kind = "panels"
    if len(part.panels) == 1:
        kind = "panels one"
    elif part.wide:
        kind = "panels wider"
    figcaption = (
        f"<figcaption><h3>{escaped(part.title)}</h3><p>{escaped(part.sentence)}</p></figcaption>"
    )
    return f'<figure>{figcaption}<div class="{kind}">{panels}</div></figure>\n'


def _panel_html(figure: str, panel: Panel) -> str:
    title = f"<h4>{escaped(panel.title)}</h4>"
    if panel.heat is not None:
        return f'<div class="panel">{title}{_heat_html(panel, panel.heat)}</div>'
    return (
        f'<div class="panel">{title}<div class="plot" data-key="{escaped(f"{figure}: {panel.title}")}" '
        f'style="height:{panel.height}px"></div>'
        f'<script type="application/json">{_inert_json(_plotly(panel))}</script></div>'
    )


def _heat_html(panel: Panel, heat: Heat) -> str:
    """Return a table of coloured cells, which needs no script."""
    across, down = escaped(panel.x.label), escaped(panel.y.label)
    top = (
        f'<tr><th rowspan="2" scope="col">{down}</th><th colspan="{len(heat.across)}">{across}</th></tr>'
        f"<tr>{''.join(f'<th scope=col>{escaped(head)}</th>' for head in heat.across)}</tr>"
    )
    rows = []
    for i, head in enumerate(heat.down):
        cells = "".join(_heat_cell(heat, i, j) for j in range(len(heat.across)))
        rows.append(f'<tr><th scope="row">{escaped(head)}</th>{cells}</tr>')
    body = "\n".join(rows)
    return f'<div class="wide"><table class="heat"><thead>{top}</thead><tbody>{body}</tbody></table></div>'


def _heat_cell(heat: Heat, i: int, j: int) -> str:
    value = heat.values[i][j]
    if value is None:
        return "<td></td>"
    fill, ink = heat_colours(heat, value)
    first, *more = map(escaped, heat.texts[i][j].split("\n"))
    small = f"<br><small>{more[0]}</small>" if more else ""
    first = f"<strong>{first}</strong>" if (i, j) in heat.best else first
    trials = " ".join(map(str, dict.fromkeys(heat.trials[i][j])))
    return (
        f'<td style="background:{fill};color:{ink}" data-trials="{trials}" '
        f'title="{escaped(heat.about[i][j])}">{first}{small}</td>'
    )


def _heat_span(heat: Heat) -> tuple[float, float]:
    """Return the lowest and the highest value of a table."""
    found = [v for row in heat.values for v in row if v is not None]
    return min(found), max(found)


def heat_colours(heat: Heat, value: float) -> tuple[str, str]:
    """Return the colours of a cell and of its text."""
    low, high = _heat_span(heat)
    place = (value - low) / (high - low) if high > low else 0.5
    if heat.low_is_good:
        place = 1 - place
    at = place * (len(VIRIDIS) - 1)
    k = min(int(at), len(VIRIDIS) - 2)
    ends = [[int(colour[n : n + 2], 16) for n in (1, 3, 5)] for colour in VIRIDIS[k : k + 2]]
    mixed = [round(a + (b - a) * (at - k)) for a, b in zip(*ends, strict=True)]
    red, green, blue = mixed
    light = 0.299 * red + 0.587 * green + 0.114 * blue > 130
    return "#" + "".join(f"{part:02x}" for part in mixed), "#000" if light else "#fff"


def box_html(kind: str, word: str, text: str, more: Sequence[str] = (), context: str = "") -> str:
    html = f'<div class="box {kind}"><strong>{escaped(word)}</strong><p>{prose(text)}</p>'
    if more:
        html += "<ul>" + "".join(f"<li>{prose(sentence)}</li>" for sentence in more) + "</ul>"
    if context:
        html += f"<p class=sub>{prose(context)}</p>"
    return f"{html}</div>\n"


def table_html(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table; on a phone each of its rows is a block of lines, with the heads in them."""
    labelled = any(head)
    top = f"<thead><tr>{''.join(f'<th>{escaped(h)}</th>' for h in head)}</tr></thead>"
    body = "".join(
        f"<tr>{''.join(map(_cell_html, row, head if labelled else [''] * len(row)))}</tr>\n"
        for row in rows
    )
    start = f'<table class="rows">{top}' if labelled else "<table>"
    return f'<div class="wide">{start}<tbody>{body}</tbody></table></div>\n'


def _cell_html(text: str, head: str) -> str:
    """Return a cell of a table; a cell of short lines does not wrap."""
    short = max(map(len, text.splitlines()), default=0) <= 28
    kind = ' class="short"' if short else ""
    label = f' data-label="{escaped(head)}"' if head else ""
    return f"<td{kind}{label}>{escaped(text)}</td>"


def _inert_json(tree: Any) -> str:
    """Return JSON that cannot close the script element around it."""
    return json.dumps(
        json_tree(tree), ensure_ascii=True, separators=(",", ":"), allow_nan=False
    ).replace("<", "\\u003c")


# --- plotly ----------------------------------------------------------------------------------------------------


def _plotly(panel: Panel) -> Tree:
    """Return the arguments of `Plotly.newPlot`: data and layout."""
    data: list[Tree] = []
    if panel.surface is not None:
        x, y, z, label = panel.surface
        data.append({"type": "contour", "x": x, "y": y, "z": z, "colorscale": "Viridis", "hoverinfo": "skip",
                     "colorbar": {"title": {"text": escaped(label), "side": "right"}, "thickness": 12},
                     "contours": {"coloring": "heatmap"}, "line": {"width": 0.5}, "connectgaps": False})  # fmt: skip
    for s in panel.series:
        trace: Tree = {
            "x": s.x,
            "y": s.y,
            "name": escaped(s.name),
            "showlegend": bool(s.name),
        }
        if s.kind == "bars":
            trace |= {
                "type": "bar",
                "orientation": "h",
                "marker": {"color": s.colour},
                "hoverinfo": "x",
            }
        else:
            mode = {"points": "markers", "lines": "lines", "text": "text"}[s.kind]
            trace |= {"type": "scatter", "mode": mode, "opacity": s.opacity, "connectgaps": False}
            trace |= {
                "line": {
                    "color": s.colour,
                    "width": s.width,
                    "dash": "dot" if s.hollow else s.dash,
                },
                "marker": {
                    "color": s.colour,
                    "size": 7,
                    "symbol": "circle-open" if s.hollow else "circle",
                },
            }
            trace |= {"textfont": {"size": 10, "color": PALE_TEXT}} if s.kind == "text" else {}
            if s.trials:
                trace["customdata"] = list(s.trials)
            if s.text:
                trace["text" if s.kind == "text" else "hovertext"] = list(s.text)
            trace["hoverinfo"] = "x+y"
            if s.kind == "text" or s.colour == PALE_LINE:
                trace["hoverinfo"] = "skip"
            elif s.text or s.trials:
                trace["hoverinfo"] = "text"
        data.append(trace)
    rules = [{"type": "line", "yref": "paper", "y0": 0, "y1": 1, "x0": x, "x1": x, "layer": "below",
              "line": {"color": PALE_LINE, "width": 1, "dash": "dash"}} for x, _ in panel.rules]  # fmt: skip
    notes = [{"x": x, "y": 1, "yref": "paper", "yanchor": "bottom", "text": escaped(label), "showarrow": False,
              "font": {"size": 10, "color": PALE_TEXT}} for x, label in panel.rules if label]  # fmt: skip
    named = any(s.name for s in panel.series)
    layout = {
        "autosize": True,
        "uirevision": "kept",  # a redrawn plot keeps the reader's zoom
        "height": panel.height,
        "margin": {"l": 8, "r": 8, "t": 26, "b": 8},
        "font": {"family": "system-ui, sans-serif", "size": 12, "color": DARK},
        "plot_bgcolor": "rgba(0,0,0,0)",
        "paper_bgcolor": "rgba(0,0,0,0)",
        "hovermode": "closest",
        "hoverlabel": {"align": "left"},
        "showlegend": named,
        "legend": {
            "orientation": "h",
            "yref": "container",
            "y": 0,
            "yanchor": "bottom",
            "x": 0,
            "font": {"size": 11},
        },
        "shapes": rules,
        "annotations": notes,
        "xaxis": _plotly_axis(panel.x),
        "yaxis": _plotly_axis(panel.y),
    }
    return {"data": data, "layout": layout}


def _plotly_axis(axis: Axis) -> Tree:
    made: Tree = {
        "title": {"text": escaped(axis.label), "standoff": 6},
        "type": "log" if axis.log else "linear",
        "automargin": True,
        "zeroline": False,
        "gridcolor": "#e6e6e6",
        "nticks": 6,
        "exponentformat": "power",
        "linecolor": PALE_LINE,
    }
    if axis.ticks:
        made |= {"tickvals": [x for x, _ in axis.ticks], "showgrid": False}
        made["ticktext"] = [escaped(label).replace("&lt;br&gt;", "<br>") for _, label in axis.ticks]
    if axis.span is not None:
        made["range"] = [math.log10(end) for end in axis.span] if axis.log else list(axis.span)
    return made


# --- matplotlib ------------------------------------------------------------------------------------------------


def draw_files(figure: Figure, folder: Path) -> Iterator[Path]:
    """Write the figure as SVG and as PDF, its panels in rows of two or three; yield the files.

    They have no title of the whole figure, which is for the caption.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure as Canvas

    columns = min(2 if figure.wide or len(figure.panels) in (2, 4) else 3, len(figure.panels))
    rows = math.ceil(len(figure.panels) / columns)
    height = max(panel.height for panel in figure.panels) / 90
    with rc_context(
        {"svg.hashsalt": "tfkd", "font.size": 8, "svg.fonttype": "none", "pdf.fonttype": 42,
         "axes.spines.top": False, "axes.spines.right": False}
    ):  # fmt: skip
        canvas = Canvas(figsize=(4.2 * columns, height * rows + 0.6), layout="constrained")
        for number, panel in enumerate(figure.panels):
            _draw_panel(canvas.add_subplot(rows, columns, number + 1), canvas, panel)
        for kind, date in (("svg", "Date"), ("pdf", "CreationDate")):
            path = folder / f"{figure.key}.{kind}"
            with whole_file(path) as part:
                canvas.savefig(part, format=kind, metadata={date: None})
            canvas.set_layout_engine("none")  # it is laid out once
            yield path


def _draw_panel(axes: Any, canvas: Any, panel: Panel) -> None:
    axes.set_title(panel.title, parse_math=False)
    if panel.heat is not None:
        _draw_heat(axes, canvas, panel, panel.heat)
        return
    if panel.x.log:
        axes.set_xscale("log")
    if panel.y.log:
        axes.set_yscale("log")
    if panel.surface is not None:
        across, up, z, label = panel.surface
        grid = np.ma.masked_invalid(np.array(z, dtype=float))
        canvas.colorbar(axes.contourf(across, up, grid, levels=12), ax=axes, label=label)
    for series in panel.series:
        _draw_series(axes, series)
    for at, label in panel.rules:
        axes.axvline(at, color="#999999", linewidth=0.8, linestyle="--", zorder=0)
        axes.text(
            at, 1, label, transform=axes.get_xaxis_transform(), ha="center", va="bottom", fontsize=6
        )
    _draw_axis(axes, "x", panel.x)
    _draw_axis(axes, "y", panel.y)
    if any(s.name for s in panel.series):
        two_lines = any("<br>" in label for _, label in panel.x.ticks)
        place = (0.5, -0.21 if two_lines else -0.16)
        axes.legend(fontsize=6, frameon=False, loc="upper center", bbox_to_anchor=place, ncols=3)


_LINES = {"solid": "-", "dash": "--", "dot": ":", "dashdot": "-.", "longdash": (0, (8, 3))}
"""Plotly's kinds of lines in matplotlib."""


def _draw_series(axes: Any, s: Series) -> None:
    x, y = (np.array(values, dtype=float) for values in (s.x, s.y))
    how = {"color": s.colour, "alpha": s.opacity, "label": s.name or None}
    if s.kind == "bars":
        axes.barh(y, x, color=s.colour)
    elif s.kind == "text":
        for left, height, text in zip(x, y, s.text, strict=True):
            axes.text(left, height, text, ha="center", va="center", fontsize=6, parse_math=False)
    elif s.kind == "points":
        fill = "none" if s.hollow else s.colour
        axes.plot(x, y, "o", markersize=3.5, markerfacecolor=fill, **how)
    else:
        axes.plot(
            x, y, linewidth=0.6 * s.width, linestyle=":" if s.hollow else _LINES[s.dash], **how
        )


def _draw_heat(axes: Any, canvas: Any, panel: Panel, heat: Heat) -> None:
    """Draw the cells, the first row on top, each with its text, and the scale of their colours."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize
    from matplotlib.patches import Rectangle

    colours = VIRIDIS[::-1] if heat.low_is_good else VIRIDIS
    scale = LinearSegmentedColormap.from_list("values", colours)
    low, high = (heat.factor * end for end in _heat_span(heat))
    if high > low:
        canvas.colorbar(ScalarMappable(Normalize(low, high), scale), ax=axes, label=heat.unit)
    axes.spines[:].set_visible(False)
    for i, row in enumerate(heat.values):
        for j, value in enumerate(row):
            if value is None:
                continue
            fill, ink = heat_colours(heat, value)
            axes.add_patch(Rectangle((j - 0.5, i - 0.5), 1, 1, color=fill, linewidth=0))
            weight = "bold" if (i, j) in heat.best else "normal"
            how = {"color": ink, "ha": "center", "va": "center", "fontsize": 7, "weight": weight}
            axes.text(j, i, heat.texts[i][j], parse_math=False, **how)
    axes.set_xlim(-0.5, len(heat.across) - 0.5)
    axes.set_ylim(len(heat.down) - 0.5, -0.5)
    axes.set_xticks(range(len(heat.across)), heat.across, parse_math=False)
    axes.set_yticks(range(len(heat.down)), heat.down, parse_math=False)
    axes.set_xlabel(panel.x.label, parse_math=False)
    axes.set_ylabel(panel.y.label, parse_math=False)


def _draw_axis(axes: Any, name: str, axis: Axis) -> None:
    getattr(axes, f"set_{name}label")(axis.label, parse_math=False)
    if axis.ticks:
        labels = [label.replace("<br>", "\n") for _, label in axis.ticks]
        getattr(axes, f"set_{name}ticks")([x for x, _ in axis.ticks], labels, parse_math=False)
        axes.minorticks_off()
    if axis.span is not None:
        getattr(axes, f"set_{name}lim")(axis.span)
