"""Figure 3: how much the constant may miss, and where each target would put it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from headscale.errors import HeadscaleError
from headscale.figures.labels import settle, spread
from headscale.figures.points import chance, intervals_key, shapes_key
from headscale.figures.style import (
    COLOURS,
    FOREGROUND,
    MUTED,
    SHAPES,
    SMALL,
    TINY,
    extent,
    panels,
    shorten,
    styled,
    titles,
)
from headscale.verdict import FAILED, WORDS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame

MOST_PANELS = 6
_HATCH = {"degraded": "..", "collapsed": "////", "diverged": "\\\\\\\\"}


@styled()
def draw_sensitivity(
    data: DataFrame,
    ax: Axes | None = None,
    *,
    recipe: str | None = None,
    backbones: Sequence[str] = (),
    title: str = "",
    subtitle: str = "",
) -> Figure:
    """Effectiveness and verdict against the constant, a panel per backbone, the constants of each target marked.

    Small markers are seeds, each with the shape of its verdict; the line goes through their means, with intervals.
    Hatched: the constants around which the worst seed is degraded, collapsed or diverged.

    Args:
        data: from `headscale.tables.sensitivity`.
        ax: where to draw; None makes a figure.
        recipe: which rows; by default the first ones.
        backbones: whose panels; by default those with most constants, at most `MOST_PANELS`.
        title: by default the configuration.
        subtitle: by default what the marks mean.

    Raises:
        HeadscaleError: no backbone was trained with two constants.
    """
    trained = data[data["kind"] != "target"]
    if len(trained):
        wanted = trained["recipe"].iloc[0] if recipe is None else recipe
        trained = trained[trained["recipe"] == wanted]
    counts = trained.groupby("backbone", sort=False)["scale"].nunique()
    several = [str(n) for n in counts[counts > 1].sort_values(ascending=False, kind="stable").index]
    shown = [n for n in backbones if n in several] or several[:MOST_PANELS]
    if not shown:
        raise HeadscaleError(
            "sensitivity: no backbone was trained with more than one constant",
            hint="run `headscale sweep BACKBONE --scales 1/64,1/16,1/4,none`, and give its run folder",
        )
    columns = min(2, len(shown))
    rows = math.ceil(len(shown) / columns)
    figure, axes = panels(ax, rows, columns, size=(5.2 * columns if columns > 1 else 7.6, 3.7 * rows + 0.6))
    for panel in axes[len(shown) :]:
        panel.set_axis_off()
    for panel, name in zip(axes, shown, strict=False):
        _panel(panel, trained[trained["backbone"] == name], name)
    first = trained.iloc[0]
    left_out = f", {len(shown)} of {len(several)} backbones" if len(shown) < len(several) else ""
    own = ", ".join(t for t in (first["setting"], first["recipe"]) if t) + left_out
    points = trained[trained["kind"] == "point"]
    said = f"{intervals_key(points.assign(interval=_interval(points)))}; {shapes_key(trained)}"
    titles(figure, axes, title or own, subtitle or said)
    settle(figure)
    for panel, name in zip(axes, shown, strict=False):
        _targets(panel, data[(data["kind"] == "target") & (data["backbone"] == name)])
    return figure


def _interval(points: DataFrame) -> Any:
    from headscale.tables import SEED_INTERVAL

    return points["seeds"].map(lambda n: SEED_INTERVAL if n > 1 else "")


def _panel(ax: Axes, data: DataFrame, name: str) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    from headscale.constants import ratio_text

    reference = bool(data["reference"].iloc[0])
    colour = FOREGROUND if reference else COLOURS[1]
    ax.set_xscale("log", base=2)
    points = data[(data["kind"] == "point") & data["value"].notna()].sort_values("scale")
    line = points.sort_values("arm", kind="stable").drop_duplicates("scale").sort_values("scale")
    ax.plot(line["scale"], line["value"], color=colour, linewidth=1.3, alpha=0.7)
    held = points[points["low"].notna()]
    ax.errorbar(held["scale"], held["value"], yerr=[(held["value"] - held["low"]).clip(lower=0),
                (held["high"] - held["value"]).clip(lower=0)], fmt="none", ecolor=colour, elinewidth=0.9, capsize=2.5,
                alpha=0.8)  # fmt: skip
    seeds = data[(data["kind"] == "seed") & data["value"].notna()]
    for (verdict, arm), group in seeds.groupby(["verdict", "arm"], sort=False):
        face = "none" if arm == "untouched" else colour
        ax.plot(group["scale"], group["value"], marker=SHAPES.get(verdict, "o"), markersize=5.5, linestyle="none",
                markerfacecolor=face, markeredgecolor=colour, markeredgewidth=0.9, zorder=3)  # fmt: skip
    low, high = data["scale"].min() / 1.5, data["scale"].max() * 1.5
    ax.set_xlim(low, high)
    top = max(0.02, float(data[["value", "high"]].max().max())) * 1.18
    ax.set_ylim(-0.14 * top, top)
    _regions(ax, points, low, high)
    if data["chance"].notna().any():
        chance(ax, float(data["chance"].max()))
    exponents = math.log2(high / low)
    ax.xaxis.set_major_locator(LogLocator(base=2, numticks=8 if exponents > 8 else 12))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: ratio_text(v)))
    ax.set_xlabel("constant on the logits [x]")
    ax.set_ylabel(f"{data['metric'].iloc[0]} [share]")
    note = " (reference)" if reference else ""
    ax.set_title(f"{shorten(name, 40)}{note}", loc="left", fontsize=SMALL + 0.5, color=FOREGROUND)


def _regions(ax: Axes, points: DataFrame, low: float, high: float) -> None:
    """Hatch the constants with a bad worst verdict, half-way to their neighbours, and say the word."""
    worst = points.groupby("scale")["verdict"].agg(lambda words: max(words, key=lambda w: WORDS.index(w) if w else -1))
    scales = list(worst.index)
    edges = [low, *(math.sqrt(a * b) for a, b in itertools.pairwise(scales)), high]
    words = list(worst)
    start = 0
    for i in range(1, len(words) + 1):
        if i < len(words) and words[i] == words[start]:
            continue
        word = words[start]
        if word in FAILED or word == "degraded":
            ax.axvspan(edges[start], edges[i], facecolor="none", edgecolor=MUTED, hatch=_HATCH[word], linewidth=0,
                       alpha=0.45, zorder=0)  # fmt: skip
            ax.annotate(word, (math.sqrt(edges[start] * edges[i]), 1), xycoords=("data", "axes fraction"),
                        xytext=(0, -3), textcoords="offset points", ha="center", va="top", fontsize=TINY,
                        color=FOREGROUND, rotation=0 if i - start > 1 else 90)  # fmt: skip
        start = i


def _targets(ax: Axes, targets: DataFrame) -> None:
    """A triangle on the axis at the constant of each target, its name below the data, moved apart where they meet."""
    import numpy as np

    if targets.empty:
        return
    low, high = ax.get_xlim()
    names: dict[float, list[str]] = {}
    chosen: set[float] = set()
    for row in targets.to_dict("records"):
        at = float(np.clip(row["scale"], low, high))
        beyond = "" if at == row["scale"] else (" (further left)" if row["scale"] < low else " (further right)")
        names.setdefault(at, []).append(f"{row['target']}{beyond}")
        if row["chosen"]:
            chosen.add(at)
    figure: Any = ax.get_figure(root=True)
    bottom = ax.get_ylim()[0]
    for at in names:
        mark = at in chosen
        ax.plot(at, bottom, marker="^", markersize=9 if mark else 6, color=FOREGROUND if mark else MUTED,
                clip_on=False, linestyle="none", zorder=4)  # fmt: skip
        if mark:
            ax.axvline(at, color=FOREGROUND, linewidth=0.9, linestyle=(0, (1, 2)), zorder=0)
    _target_names(ax, figure, sorted(names.items()), chosen, bottom)


def _target_names(
    ax: Axes, figure: Any, names: Sequence[tuple[float, list[str]]], chosen: set[float], bottom: float
) -> None:
    """Names above the triangles, in two rows by turns, so that neighbours do not meet."""
    import numpy as np

    scale = figure.dpi / 72.0
    frame = ax.get_window_extent()
    for row in (0, 1):
        own = names[row::2]
        if not own:
            continue
        texts = [", ".join(words) + (" (chosen)" if at in chosen else "") for at, words in own]
        pixels = ax.transData.transform(np.array([(at, bottom) for at, _ in own]))[:, 0]
        widths = [extent(figure, text, TINY)[0] * scale for text in texts]
        places = spread(list(pixels), max(widths) + 4 * scale)
        for (at, _), text, pixel, place, width in zip(own, texts, pixels, places, widths, strict=True):
            inside = min(max(place, frame.x0 + width / 2 + 2), frame.x1 + 20 * scale - width / 2)
            ax.annotate(text, (at, bottom), ((inside - pixel) / scale, 8 + 9 * row), textcoords="offset points",
                        ha="center", va="bottom", fontsize=TINY, color=FOREGROUND,
                        fontweight="bold" if at in chosen else "normal", annotation_clip=False)  # fmt: skip
