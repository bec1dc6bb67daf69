"""Figure 1: the norm of the MLM head against effectiveness."""

from __future__ import annotations

from typing import TYPE_CHECKING

from headscale.errors import HeadscaleError
from headscale.figures.labels import settle
from headscale.figures.points import caption, choose, draw_points, intervals_key, label_points, log_axis, shapes_key
from headscale.figures.style import panels, styled, titles
from headscale.tables import LEAST_BACKBONES, rank_correlation

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame

NORMS = {
    "frobenius": "||W||",
    "rms": "RMS of W",
    "row_norm_mean": "mean row norm of W",
    "effective_norm": "||W diag(gain)||",
    "spectral_norm": "spectral norm of W",
}


@styled()
def draw_norm_effectiveness(
    data: DataFrame,
    ax: Axes | None = None,
    *,
    recipe: str | None = None,
    metric: str | None = None,
    title: str = "",
    subtitle: str = "",
) -> Figure:
    """A point per backbone and constant: the norm on a log axis, effectiveness with its interval, the reference black.

    The rank correlation is over backbones only, one point each, their untouched heads; none below five backbones.

    Args:
        data: from `headscale.tables.norm_effectiveness`.
        ax: where to draw; None makes a figure.
        recipe, metric: which rows; by default the first ones.
        title: by default the configuration.
        subtitle: by default the rank correlation.

    Raises:
        HeadscaleError: no row has both a norm and an effectiveness.
    """
    points = choose(data, "norm", recipe, metric)
    if points.empty:
        raise HeadscaleError(*_missing(data))
    figure, axes = panels(ax, 1, 1, size=(7.6, 5.0))
    (panel,) = axes
    chosen = draw_points(panel, points, "norm")
    panel.margins(x=0.08, y=0.08)
    log_axis(panel)
    first = points.iloc[0]
    panel.set_xlabel(
        f"{NORMS.get(first['norm_name'], first['norm_name'])} of the MLM head, constant included [L2 norm]"
    )
    panel.set_ylabel(f"{first['metric']} [{'share' if points['value'].max() <= 1 else 'points'}]")
    own = title or caption(points, data)
    said = subtitle or "; ".join(t for t in (_correlation(points), intervals_key(points), shapes_key(points)) if t)
    titles(figure, axes, own, said)
    settle(figure)
    label_points(panel, points, "norm", chosen)
    return figure


def _correlation(points: DataFrame) -> str:
    found = rank_correlation(points)
    if found is not None:
        return (
            f"Spearman's rho {found.rho:.2f}, 95 % interval {found.low:.2f} to {found.high:.2f} "
            f"(Fisher z), {found.backbones} untouched backbones"
        )
    count = int(points.loc[points["own_point"], "backbone"].nunique())
    if count < LEAST_BACKBONES:
        return f"no rank correlation: {count} untouched backbone{'s' * (count != 1)}, fewer than {LEAST_BACKBONES}"
    return "no rank correlation: all ranks tie"


def _missing(data: DataFrame) -> tuple[str, str]:
    """Which half is missing, and what makes it."""
    if not data["value"].notna().any():
        return (
            "norm against effectiveness: none of the results says how effective a backbone is",
            "train with `headscale sweep`, run `headscale evaluate`, or give `--effectiveness CSV`",
        )
    return (
        "norm against effectiveness: no backbone with an effectiveness was inspected",
        "run `headscale inspect BACKBONE --weights-only` for each, and give its run folder too",
    )
