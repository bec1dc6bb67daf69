"""Points of backbones and constants: what figures 1 and 2 share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from headscale.constants import ratio_text
from headscale.figures.labels import Label, place
from headscale.figures.style import COLOURS, FOREGROUND, MUTED, SHAPES, TINY, colours, distinct
from headscale.tables import rows_of
from headscale.verdict import WORDS

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from pandas import DataFrame

MANY = 12  # backbones beyond which colours and lines tell nobody apart any more
GLYPHS = {"stable": "●", "inconclusive": "◆", "dense": "■", "degraded": "▲", "collapsed": "✖", "diverged": "▼"}


def choose(data: DataFrame, x: str, recipe: str | None, metric: str | None) -> DataFrame:
    """The rows of one source, setting, recipe and metric with finite numbers: those asked for, else the first."""
    import numpy as np

    finite = data[np.isfinite(data[x].astype(float)) & np.isfinite(data["value"].astype(float))]
    for name, wanted in (("recipe", recipe), ("metric", metric)):
        if wanted is not None:
            finite = finite[finite[name] == wanted]
    if finite.empty:
        return finite
    first = finite.iloc[0]
    same = np.logical_and.reduce([finite[n] == first[n] for n in ("source", "setting", "recipe", "metric")])
    return finite[same]


def draw_points(ax: Axes, data: DataFrame, x: str) -> dict[str, str]:
    """Markers with intervals, and a line through the constants of each backbone; returns the colours.

    Beyond `MANY` backbones all but the references have one colour, no line and no interval, and rescaled heads are
    faint.
    """
    names = list(dict.fromkeys(data["backbone"]))
    references = set(data.loc[data["reference"].astype(bool), "backbone"])
    if len(names) > MANY:
        others = data[~data["backbone"].isin(references)]
        for arm, group in others.groupby("arm"):
            _markers(ax, group, x, COLOURS[1], 4.5, alpha=1.0 if arm == "untouched" else 0.3)
        _markers(ax, data[data["backbone"].isin(references)], x, FOREGROUND, 7.0)
        return {n: FOREGROUND if n in references else COLOURS[1] for n in names}
    chosen = colours(names, list(references))
    for name in sorted(names, key=lambda n: n in references):
        own = data[data["backbone"] == name].sort_values("scale")
        line = own[own["arm"] != "shifted"].drop_duplicates("scale")
        if len(line) > 1:
            ax.plot(line[x], line["value"], color=chosen[name], linewidth=0.9, alpha=0.5, zorder=1)
        held = own[own["low"].notna()]
        if len(held):
            errors = [(held["value"] - held["low"]).clip(lower=0), (held["high"] - held["value"]).clip(lower=0)]
            ax.errorbar(held[x], held["value"], yerr=errors, fmt="none", color=chosen[name], elinewidth=0.9,
                        capsize=2, alpha=0.8, zorder=2)  # fmt: skip
        _markers(ax, own, x, chosen[name], 6.0)
    return chosen


def _markers(ax: Axes, own: DataFrame, x: str, colour: str, size: float, alpha: float = 1.0) -> None:
    for verdict, group in own.groupby("verdict", sort=False):
        ax.plot(group[x], group["value"], marker=SHAPES.get(str(verdict), "o"), markersize=size, color=colour,
                markeredgewidth=0, linestyle="none", alpha=alpha, zorder=3)  # fmt: skip


def label_points(
    ax: Axes,
    data: DataFrame,
    x: str,
    chosen: dict[str, str],
    *,
    avoid: Sequence[np.ndarray] = (),
    first: Sequence[Label] = (),
) -> int:
    """Names at one point of each backbone, constants at the others, references first; returns how many did not fit.

    Args:
        ax: of a settled figure.
        data: what was drawn.
        x: the column on the x axis.
        chosen: colours, from `draw_points`.
        avoid: further lines that no label may cover.
        first: further labels, placed before all others.
    """
    import numpy as np
    import pandas as pd

    short = distinct(list(chosen))
    named = data.assign(_own=(data["scale"] == 1.0) & (data["arm"] == "untouched"))
    named = named.sort_values(["reference", "_own", "value"], ascending=[False, False, False], kind="stable")
    names = named.drop_duplicates("backbone")
    rest = named.drop(names.index).sort_values("scale")
    if len(names) > MANY:  # the references, and those that do best and worst
        names, rest = pd.concat([names[names["reference"]], names.head(4), names.tail(3)]), rest.head(0)
        names = names.drop_duplicates("backbone")
        avoid = [*avoid, *data[[x, "value"]].to_numpy(float)[:, None]]
    labels = [*first, *(_label(row, x, short[row["backbone"]], chosen) for row in rows_of(names))]
    labels += [_label(row, x, "", chosen) for row in rows_of(rest)]
    lines: list[np.ndarray] = []
    if len(chosen) <= MANY:
        lines += [np.array([(r[x], r["low"]), (r[x], r["high"])]) for r in rows_of(data[data["low"].notna()])]
        ordered = data[data["arm"] != "shifted"].sort_values("scale").drop_duplicates(["backbone", "scale"])
        lines += [own[[x, "value"]].to_numpy(float) for _, own in ordered.groupby("backbone")]
    return place(ax, labels, avoid=[*avoid, *lines])


def _label(row: dict[str, Any], x: str, name: str, chosen: dict[str, str]) -> Label:
    text = " ".join(part for part in (name, start_text(row, named=bool(name))) if part) or "untouched"
    return Label(float(row[x]), float(row["value"]), text, legible(chosen[row["backbone"]]))


def start_text(row: dict[str, Any], *, named: bool = False) -> str:
    """What was done to the head, in short: `shift -7.04`, `x 1/4`; nothing where a name says enough."""
    parts = [f"shift {row['shift']:.3g}"] if row["shift"] else []
    if row["scale"] != 1.0 or not (parts or named or row["arm"] == "untouched"):
        parts.append(f"x {ratio_text(row['scale'])}")
    return ", ".join(parts)


def legible(colour: str) -> str:
    """The colour of a text: those of the palette that are too light for one become the foreground."""
    return FOREGROUND if colour in COLOURS[3:] else colour


def caption(points: DataFrame, data: DataFrame) -> str:
    """The title of points: how many there are, and what they come from."""
    backbones, first = points["backbone"].nunique(), points.iloc[0]
    counts = f"{backbones} backbone{'s' * (backbones > 1)}, {len(points)} point{'s' * (len(points) > 1)}"
    return f"{counts}: {setting_of(first, data)}"


def setting_of(first: Any, data: DataFrame) -> str:
    """Setting and recipe of a row, and how many recipes there are beside it."""
    others = data.loc[data["recipe"].notna() & (data["recipe"] != ""), "recipe"].nunique() - 1
    beside = f"{others} other recipe{'s' * (others > 1)} not drawn" if others > 0 else ""
    return ", ".join(text for text in (first["setting"], first["recipe"], beside) if text)


def shapes_key(data: DataFrame) -> str:
    """Which shape is which verdict, of those that occur, the best first."""
    here = set(data["verdict"].dropna())
    return " ".join(f"{GLYPHS[word]}\u00a0{word}" for word in WORDS if word in here)


def intervals_key(data: DataFrame) -> str:
    """What the bars are, and how many seeds there were."""
    if data["backbone"].nunique() > MANY:
        return f"more than {MANY} backbones: no intervals, rescaled heads faint"
    kinds = [k for k in dict.fromkeys(data["interval"].dropna()) if k]
    if not kinds:
        return "one seed each: no interval"
    fewest, most = int(data["seeds"].min()), int(data["seeds"].max())
    seeds = f" ({fewest}-{most})" if fewest != most else f" ({most})"
    return f"bars: {' or '.join(k + (seeds if k.endswith('seeds') else '') for k in kinds)}"


def log_axis(ax: Axes, which: str = "x") -> None:
    """A log axis whose ticks are plain numbers, few enough to read and at least two however short it is."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    axis = ax.xaxis if which == "x" else ax.yaxis
    (ax.set_xscale if which == "x" else ax.set_yscale)("log")
    low, high = sorted(axis.get_view_interval())
    span = high / max(low, 1e-300)
    if span < 10:  # too short for a power of ten and its half
        axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    else:
        axis.set_major_locator(LogLocator(subs=(1.0,) if span > 300 else (1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.0f}" if v >= 1000 else f"{v:g}"))
    axis.set_minor_locator(NullLocator())  # minor ticks take half the time of a figure and tell nothing


def chance(ax: Axes, value: float, where: str = "chance") -> None:
    """A dotted line at what a random order reaches."""
    ax.axhline(value, color=MUTED, linewidth=0.9, linestyle=":", zorder=0)
    ax.annotate(where, (1.0, value), xycoords=("axes fraction", "data"), xytext=(3, 0), va="center",
                textcoords="offset points", fontsize=TINY, color=MUTED)  # fmt: skip
