"""The page of a report: figures as data, drawn by plotly in HTML and by matplotlib as SVG."""

import base64
import hashlib
import html
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tfkd_ray.settings.files import json_tree, whole_file
from tfkd_ray.settings.yaml import Tree

PALE, DARK = "#C4C4C4", "#222222"


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
    height: int = 320
    """Height in pixels."""


@dataclass(frozen=True)
class Figure:
    """A title, a sentence and panels side by side; without panels the sentence says why."""

    key: str
    """Stem of its SVG file."""
    title: str
    sentence: str
    panels: Sequence[Panel] = ()
    wide: bool = False
    """True: its panels need more width."""


@dataclass(frozen=True)
class Section:
    """A heading with HTML and figures below it."""

    title: str
    parts: Sequence[str | Figure] = field(default_factory=list)


# --- words -----------------------------------------------------------------------------------------------------


def escaped(text: str) -> str:
    """Escape text for HTML and for plotly's labels, which are HTML."""
    return html.escape(text, quote=True)


# --- HTML ------------------------------------------------------------------------------------------------------

STYLE = """
:root { color: #1b1b1b; background: #fff; font: 16px/1.5 system-ui, sans-serif; }
body { max-width: 72rem; margin: 0 auto; padding: 1rem; }
h1 { margin: .5rem 0 0; font-size: 1.7rem; overflow-wrap: anywhere; }
h2 { margin: 2.2rem 0 .6rem; padding-bottom: .2rem; border-bottom: 1px solid #ccc; font-size: 1.3rem; }
h3 { margin: 1.4rem 0 .2rem; font-size: 1.05rem; }
h4 { margin: .4rem 0 0; font-size: .95rem; font-weight: 600; }
p { margin: .3rem 0 .6rem; max-width: 50rem; overflow-wrap: anywhere; }
.sub { color: #555; }
nav { margin: .8rem 0; font-size: .9rem; }
nav a { margin-right: 1rem; white-space: nowrap; }
.box { border-left: .5rem solid #888; background: #f4f4f4; padding: .6rem 1rem; margin: .6rem 0; }
.box.yes { border-color: #009e73; background: #eaf7f2; }
.box.no { border-color: #d55e00; background: #fdf1ea; }
.box strong { font-size: 1.2rem; }
.box li { overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; }
th, td { text-align: left; vertical-align: top; padding: .25rem .8rem .25rem 0; border-bottom: 1px solid #ddd;
  white-space: pre-line; }
th { font-weight: 600; vertical-align: bottom; }
.short { white-space: pre; }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 21rem), 1fr)); gap: 0 1.5rem; }
.panels.wider { grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); }
.panels.one { max-width: 46rem; grid-template-columns: 1fr; }
.panel { min-width: 0; }
pre { overflow-x: auto; font-size: .8rem; background: #f4f4f4; padding: .6rem; }
@media print {
  :root { font-size: 11px; }
  body { max-width: none; padding: 0; }
  nav, details { display: none; }
  .panels, .panels.wider { grid-template-columns: 1fr 1fr; }
  .panels.one { grid-template-columns: 1fr; }
  .panel, .box, tr, figure:has(.one) { break-inside: avoid; }
  h2, h3, h4, figcaption { break-after: avoid; }
  .wide { overflow: visible; }
}
@page { margin: 14mm; }
figure { margin: 0; }
"""

SCRIPT = """
const plots = [...document.querySelectorAll('.plot')];
const touch = matchMedia('(pointer: coarse)').matches;
for (const plot of plots) {
  const drawn = JSON.parse(plot.nextElementSibling.textContent);
  if (touch) drawn.layout.dragmode = false;
  Plotly.newPlot(plot, drawn.data, drawn.layout, {responsive: true, displayModeBar: false});
}
const fit = () => plots.forEach(plot => Plotly.relayout(plot, {width: plot.parentElement.clientWidth}));
matchMedia('print').addEventListener('change', fit);
addEventListener('beforeprint', fit);
addEventListener('afterprint', () => plots.forEach(plot => Plotly.relayout(plot, {width: null, autosize: true})));
document.documentElement.dataset.drawn = plots.length;
"""


def page_html(title: str, subtitle: str, sections: Sequence[Section]) -> str:
    """Return the whole file."""
    from plotly.offline import get_plotlyjs

    scripts = (
        [get_plotlyjs(), SCRIPT]
        if any(isinstance(p, Figure) and p.panels for s in sections for p in s.parts)
        else []
    )
    hashes = " ".join(map(_hash, scripts)) or "'none'"
    policy = (
        f"default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; script-src {hashes}"
    )
    links = " ".join(
        f'<a href="#s{i}">{escaped(section.title)}</a>' for i, section in enumerate(sections)
    )
    body = "".join(
        f'<section id="s{i}"><h2>{escaped(section.title)}</h2>{"".join(map(_part, section.parts))}</section>\n'
        for i, section in enumerate(sections)
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escaped(title)}</title>\n<style>{STYLE}</style></head>\n<body>\n"
        f'<h1>{escaped(title)}</h1>\n<p class="sub">{escaped(subtitle)}</p>\n<nav>{links}</nav>\n'
        "<noscript><p>The plots need JavaScript, from this file alone; all else does not.</p></noscript>\n"
        f"{body}{''.join(f'<script>{script}</script>' for script in scripts)}</body></html>\n"
    )


def _hash(script: str) -> str:
    """Return the hash of a script for the Content-Security-Policy."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _part(part: str | Figure) -> str:
    if isinstance(part, str):
        return part
    panels = "".join(
        f'<div class="panel"><h4>{escaped(panel.title)}</h4><div class="plot" style="height:{panel.height}px"></div>'
        f'<script type="application/json">{_inert_json(_plotly(panel))}</script></div>'
        for panel in part.panels
    )
    kind = "panels"
    if len(part.panels) == 1:
        kind = "panels one"
    elif part.wide:
        kind = "panels wider"
    figcaption = (
        f"<figcaption><h3>{escaped(part.title)}</h3><p>{escaped(part.sentence)}</p></figcaption>"
    )
    return f'<figure>{figcaption}<div class="{kind}">{panels}</div></figure>\n'


def box_html(kind: str, word: str, text: str, more: Sequence[str] = (), context: str = "") -> str:
    listed = "".join(f"<li>{escaped(sentence)}</li>" for sentence in more)
    return (
        f'<div class="box {kind}"><strong>{escaped(word)}</strong><p>{escaped(text)}</p>'
        f"{f'<ul>{listed}</ul>' if more else ''}{f'<p class=sub>{escaped(context)}</p>' if context else ''}</div>\n"
    )


def table_html(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    top = (
        f"<thead><tr>{''.join(f'<th>{escaped(h)}</th>' for h in head)}</tr></thead>"
        if any(head)
        else ""
    )
    body = "".join(f"<tr>{''.join(map(_cell_html, row))}</tr>\n" for row in rows)
    return f'<div class="wide"><table>{top}<tbody>{body}</tbody></table></div>\n'


def _cell_html(text: str) -> str:
    """Return a cell of a table; a cell of short lines does not wrap."""
    short = max(map(len, text.splitlines()), default=0) <= 28
    return f'<td class="short">{escaped(text)}</td>' if short else f"<td>{escaped(text)}</td>"


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
                "line": {"color": s.colour, "width": s.width},
                "marker": {"color": s.colour, "size": 7},
            }
            trace |= {"textfont": {"size": 10, "color": "#555"}} if s.kind == "text" else {}
            if s.text:
                trace["text" if s.kind == "text" else "hovertext"] = list(s.text)
            trace["hoverinfo"] = "x+y"
            if s.kind == "text":
                trace["hoverinfo"] = "skip"
            elif s.text:
                trace["hoverinfo"] = "text"
        data.append(trace)
    rules = [{"type": "line", "yref": "paper", "y0": 0, "y1": 1, "x0": x, "x1": x, "layer": "below",
              "line": {"color": "#999", "width": 1, "dash": "dash"}} for x, _ in panel.rules]  # fmt: skip
    notes = [{"x": x, "y": 1, "yref": "paper", "yanchor": "bottom", "text": escaped(label), "showarrow": False,
              "font": {"size": 10, "color": "#555"}} for x, label in panel.rules if label]  # fmt: skip
    named = any(s.name for s in panel.series)
    layout = {
        "autosize": True,
        "height": panel.height,
        "margin": {"l": 8, "r": 8, "t": 26, "b": 8},
        "font": {"family": "system-ui, sans-serif", "size": 12, "color": DARK},
        "plot_bgcolor": "#fff",
        "paper_bgcolor": "#fff",
        "hovermode": "closest",
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
        "linecolor": "#999",
    }
    if axis.ticks:
        made |= {"tickvals": [x for x, _ in axis.ticks], "showgrid": False}
        made["ticktext"] = [escaped(label).replace("&lt;br&gt;", "<br>") for _, label in axis.ticks]
    if axis.span is not None:
        made["range"] = [math.log10(end) for end in axis.span] if axis.log else list(axis.span)
    return made


# --- matplotlib ------------------------------------------------------------------------------------------------


def draw_svg(figure: Figure, folder: Path) -> Path:
    """Write the figure as an SVG file, its panels in rows of two or three."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure as Canvas

    columns = min(2 if figure.wide or len(figure.panels) in (2, 4) else 3, len(figure.panels))
    rows = math.ceil(len(figure.panels) / columns)
    height = max(panel.height for panel in figure.panels) / 90
    with rc_context(
        {"svg.hashsalt": "tfkd", "font.size": 8, "svg.fonttype": "none", "axes.spines.top": False}
    ):
        canvas = Canvas(figsize=(4.2 * columns, height * rows + 0.6), layout="constrained")
        canvas.suptitle(figure.title, parse_math=False)
        for number, panel in enumerate(figure.panels):
            _draw_panel(canvas.add_subplot(rows, columns, number + 1), canvas, panel)
        path = folder / f"{figure.key}.svg"
        with whole_file(path) as part:
            canvas.savefig(part, format="svg", metadata={"Date": None})
    return path


def _draw_panel(axes: Any, canvas: Any, panel: Panel) -> None:
    axes.set_title(panel.title, parse_math=False)
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
        axes.legend(
            fontsize=6, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3
        )


def _draw_series(axes: Any, s: Series) -> None:
    x, y = (np.array(values, dtype=float) for values in (s.x, s.y))
    how = {"color": s.colour, "alpha": s.opacity, "label": s.name or None}
    if s.kind == "bars":
        axes.barh(y, x, color=s.colour)
    elif s.kind == "text":
        for left, height, text in zip(x, y, s.text, strict=True):
            axes.text(left, height, text, ha="center", va="center", fontsize=6, parse_math=False)
    elif s.kind == "points":
        axes.plot(x, y, "o", markersize=3.5, **how)
    else:
        axes.plot(x, y, linewidth=0.6 * s.width, **how)


def _draw_axis(axes: Any, name: str, axis: Axis) -> None:
    getattr(axes, f"set_{name}label")(axis.label, parse_math=False)
    if axis.ticks:
        labels = [label.replace("<br>", "\n") for _, label in axis.ticks]
        getattr(axes, f"set_{name}ticks")([x for x, _ in axis.ticks], labels, parse_math=False)
        axes.minorticks_off()
    if axis.span is not None:
        getattr(axes, f"set_{name}lim")(axis.span)
