"""Figure 2: effectiveness against sparsity, with the Pareto front."""

from __future__ import annotations

from typing import TYPE_CHECKING

from headscale.errors import HeadscaleError, UsageError
from headscale.figures.labels import Label, settle
from headscale.figures.points import caption, choose, draw_points, intervals_key, label_points, log_axis, shapes_key
from headscale.figures.style import FOREGROUND, MUTED, panels, styled, titles
from headscale.tables import SPARSITY
from headscale.verdict import FAILED

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame

_AXES = {
    "active_dims_document": "active dims per document [dims]",
    "active_dims_query": "active dims per query [dims]",
    "flops_cost": "FLOPS [expected multiplications per query-document pair]",
}


_EDGE = 1.0  # dims, or multiplications


@styled()
def draw_tradeoff(
    data: DataFrame,
    ax: Axes | None = None,
    *,
    sparsity: str = "active_dims_document",
    recipe: str | None = None,
    metric: str | None = None,
    title: str = "",
    subtitle: str = "",
) -> Figure:
    """A point per backbone and constant: sparsity on a log axis, effectiveness with its interval, the Pareto front.

    Args:
        data: from `headscale.tables.tradeoff`.
        ax: where to draw; None makes a figure.
        sparsity: `active_dims_document`, `active_dims_query` or `flops_cost`.
        recipe, metric: which rows; by default the first ones.
        title: by default the configuration.
        subtitle: by default who is on the front.

    Raises:
        UsageError: another sparsity.
        HeadscaleError: no row has both a sparsity and an effectiveness.
    """
    import numpy as np

    if sparsity not in SPARSITY:
        raise UsageError(f"sparsity `{sparsity}` is none of {', '.join(SPARSITY)}", hint=f"use `{SPARSITY[0]}`")
    points = choose(data[data[sparsity] > 0], sparsity, recipe, metric)
    if points.empty:
        raise HeadscaleError(
            "effectiveness against sparsity: none of the results has both",
            hint="train with `headscale trial` or `headscale sweep`, or run `headscale evaluate MODEL`",
        )
    points, moved = _failed_at_the_edge(points, sparsity)
    figure, axes = panels(ax, 1, 1, size=(7.6, 5.0))
    (panel,) = axes
    front = points[points[f"front_{sparsity}"].astype(bool)].sort_values(sparsity)
    chosen = draw_points(panel, points, sparsity)
    panel.margins(x=0.08, y=0.08)
    log_axis(panel)
    panel.set_xlabel(_AXES[sparsity])
    first = points.iloc[0]
    panel.set_ylabel(f"{first['metric']} [share]")
    if len(front):
        right = panel.get_xlim()[1]
        x, y = [*front[sparsity], right], [*front["value"], front["value"].iloc[-1]]
        panel.plot(x, y, color=MUTED, linewidth=2.2, alpha=0.6, drawstyle="steps-post", zorder=0.5)
        panel.set_xlim(right=right)
    own = title or caption(points, data)
    said = (f"{len(front)} on the front of runs that trained", moved, intervals_key(points), shapes_key(points))
    titles(figure, axes, own, subtitle or "; ".join(text for text in said if text))
    settle(figure)
    name = [Label(x[-1], y[-1], "Pareto front", FOREGROUND)] if len(front) else []
    label_points(panel, points, sparsity, chosen, avoid=[np.column_stack([x, y])] if len(front) else [], first=name)
    return figure


def _failed_at_the_edge(points: DataFrame, sparsity: str) -> tuple[DataFrame, str]:
    """Failed runs that have lost nearly all terms at `_EDGE`, and a word about it: a log axis has no room for them."""
    beyond = points["verdict"].isin(list(FAILED)) & (points[sparsity] < _EDGE)
    if not beyond.any():
        return points, ""
    moved = points.assign(**{sparsity: points[sparsity].where(~beyond, _EDGE)})
    unit = "multiplication" if sparsity == "flops_cost" else "dim"
    return moved, f"{int(beyond.sum())} failed with less than {_EDGE:g} {unit}, drawn there"
