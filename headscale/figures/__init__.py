"""Figures as pure functions of saved results; nothing is measured here and no global plotting state is kept.

A new figure is one module here, one table in `headscale.tables`, and one entry of `FIGURES`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from headscale import tables
from headscale.figures.anatomy import draw_anatomy
from headscale.figures.constants import curves_of_constants
from headscale.figures.curves import draw_curves, training_curves
from headscale.figures.effectiveness import draw_norm_effectiveness
from headscale.figures.sensitivity import draw_sensitivity
from headscale.figures.style import COLOURS, FOREGROUND, MUTED, REFERENCE_COLOUR, save, to_svg
from headscale.figures.tradeoff import draw_tradeoff

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

__all__ = [
    "COLOURS",
    "FIGURES",
    "FOREGROUND",
    "MUTED",
    "REFERENCE_COLOUR",
    "Kind",
    "curves_of_constants",
    "draw_anatomy",
    "draw_curves",
    "draw_norm_effectiveness",
    "draw_sensitivity",
    "draw_tradeoff",
    "save",
    "to_svg",
    "training_curves",
]


class Kind(NamedTuple):
    """A figure: its key, its title, the table of results that it shows, and what draws the table."""

    key: str
    title: str
    table: Callable[..., DataFrame]
    draw: Callable[..., Figure]


FIGURES: tuple[Kind, ...] = (
    Kind("norm", "MLM-head norm against effectiveness", tables.norm_effectiveness, draw_norm_effectiveness),
    Kind("tradeoff", "Effectiveness against sparsity", tables.tradeoff, draw_tradeoff),
    Kind("sensitivity", "Effectiveness and verdict against the constant", tables.sensitivity, draw_sensitivity),
    Kind("curves", "Training curves of both arms", tables.curves, draw_curves),
    Kind("anatomy", "Head anatomy", tables.anatomy, draw_anatomy),
)
"""Every figure of saved results, in the order of a report."""
