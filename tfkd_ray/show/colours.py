"""The colours of objectives, the same in all figures, reports and live views. Imports nothing heavy."""

from collections.abc import Sequence

OBJECTIVE_COLOURS = {
    "ce": "#7F7F7F",
    "lsr": "#E69F00",
    "tfkd_reg": "#0072B2",
    "tfkd_self": "#009E73",
    "kd": "#D55E00",
    "tfkd_reg_code": "#6A4FB3",
    "dkd": "#CC79A7",
    "dist": "#56B4E9",
    "kd_standardised": "#8A6D3B",
}
"""Colour of each objective, the same in all figures and reports."""
OWN_COLOURS = ("#44AA99", "#882255", "#999933", "#DDCC77")
"""Colours of the user's own objectives, in their order."""


def objective_colour(objective: str, objectives: Sequence[str]) -> str:
    """Return the colour of an objective; of the user's own ones, by their order among all."""
    if objective in OBJECTIVE_COLOURS:
        return OBJECTIVE_COLOURS[objective]
    own = [name for name in objectives if name not in OBJECTIVE_COLOURS]
    return OWN_COLOURS[own.index(objective) % len(OWN_COLOURS)]
