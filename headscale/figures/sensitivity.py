"""Figure 3: how much the constant may miss, and where each target would put it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from headscale.errors import HeadscaleError
from headscale.figures.labels import settle
from headscale.figures.points import chance, intervals_key, setting_of, shapes_key
from headscale.figures.style import (
    COLOURS,
    FOREGROUND,
    MUTED,
    SHAPES,
    SMALL,
    TINY,
    distinct,
    extent,
    panels,
    styled,
    titles,
)
from headscale.tables import rows_of, worst_word
from headscale.verdict import FAILED

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame

MOST_PANELS = 6
_FAR = 64.0  # a target's constant further than this from any that was trained is left out
_BOLD = 1.14  # how much wider DejaVu Sans is in bold, measured on the names of the targets
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
    references = set(trained.loc[trained["reference"].astype(bool), "backbone"])
    several.sort(key=lambda name: name not in references)
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
    names = distinct(shown, 44)
    for panel, name in zip(axes, shown, strict=False):
        targets = data[(data["kind"] == "target") & (data["backbone"] == name)]
        _panel(panel, trained[trained["backbone"] == name], names[name], list(targets["scale"]))
    first = trained.iloc[0]
    own = setting_of(first, data) + (f"; {len(shown)} of {len(several)} backbones" * (len(shown) < len(several)))
    points = trained[(trained["kind"] == "point") & trained["backbone"].isin(shown)]
    said = f"{intervals_key(points.assign(interval=_interval(points)))}; {shapes_key(trained)}"
    said += "; hollow: untouched" if (trained["arm"] == "untouched").any() else ""
    said += "; diamonds: shifted only" if (trained["arm"] == "shifted").any() else ""
    titles(figure, axes, title or own, subtitle or said)
    settle(figure)
    for panel, name in zip(axes, shown, strict=False):
        _targets(panel, data[(data["kind"] == "target") & (data["backbone"] == name)])
    return figure


def _interval(points: DataFrame) -> Any:
    from headscale.tables import SEED_INTERVAL

    return points["seeds"].map(lambda n: SEED_INTERVAL if n > 1 else "")


def _panel(ax: Axes, data: DataFrame, name: str, targets: Sequence[float]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    from headscale.constants import ratio_text

    reference = bool(data["reference"].iloc[0])
    colour = FOREGROUND if reference else COLOURS[1]
    ax.set_xscale("log", base=2)
    points = data[(data["kind"] == "point") & data["value"].notna()].sort_values("scale")
    shifted = points[points["arm"] == "shifted"]
    points = points[points["arm"] != "shifted"]
    line = points.sort_values("arm", kind="stable").drop_duplicates("scale").sort_values("scale")
    ax.plot(line["scale"], line["value"], color=colour, linewidth=1.3, alpha=0.7)
    held = points[points["low"].notna()]
    ax.errorbar(held["scale"], held["value"], yerr=[(held["value"] - held["low"]).clip(lower=0),
                (held["high"] - held["value"]).clip(lower=0)], fmt="none", color=colour, elinewidth=0.9, capsize=2.5,
                alpha=0.8)  # fmt: skip
    seeds = data[(data["kind"] == "seed") & data["value"].notna() & (data["arm"] != "shifted")]
    keys: Any
    for keys, group in seeds.groupby(["verdict", "arm"], sort=False):
        verdict, arm = keys
        face = "none" if arm == "untouched" else colour
        ax.plot(group["scale"], group["value"], marker=SHAPES.get(verdict, "o"), markersize=5.5, linestyle="none",
                markerfacecolor=face, markeredgecolor=colour, markeredgewidth=0.9, zorder=3)  # fmt: skip
    _shifted(ax, shifted)
    low, high = data["scale"].min(), data["scale"].max()
    near = [a for a in targets if low / _FAR <= a <= high * _FAR]
    low, high = min([low, *near]) / 1.5, max([high, *near]) * 1.5
    ax.set_xlim(low, high)
    top = max(0.02, float(data[["value", "high"]].max().max())) * 1.45  # room for the words above
    ax.set_ylim(-0.03 * top, top)
    ax.set_yticks([t for t in ax.get_yticks() if 0 <= t <= 1])
    _regions(ax, points, seeds, low, high)
    if data["chance"].notna().any():
        chance(ax, float(data["chance"].max()))
    exponents = math.log2(high / low)
    ax.xaxis.set_major_locator(LogLocator(base=2, numticks=8 if exponents > 8 else 12))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: ratio_text(v)))
    ax.set_xlabel("constant on the logits [x]")
    ax.set_ylabel(f"{data['metric'].iloc[0]} [share]")
    note = " (reference)" if reference else ""
    ax.set_title(f"{name}{note}", loc="left", fontsize=SMALL + 0.5, color=FOREGROUND)


def _shifted(ax: Axes, points: DataFrame) -> None:
    """Heads whose level was moved and nothing else: a diamond each, the best of them named."""
    ax.plot(points["scale"], points["value"], marker="D", markersize=6, linestyle="none", color=COLOURS[0], zorder=4)
    if len(points):
        best = max(rows_of(points), key=lambda row: float(row["value"]))
        at = (best["scale"], best["value"])
        ax.annotate(f"shift {best['shift']:.3g}", at, xytext=(-7, 0), ha="right", va="center", fontsize=TINY,
                    textcoords="offset points", color=COLOURS[0])  # fmt: skip


def _regions(ax: Axes, points: DataFrame, seeds: DataFrame, low: float, high: float) -> None:
    """Hatch the constants with a bad worst verdict, half-way to their neighbours, and say how many seeds it is of."""
    worst = points.groupby("scale")["verdict"].agg(worst_word)
    scales = [float(a) for a in worst.index]
    edges = [low, *(math.sqrt(a * b) for a, b in itertools.pairwise(scales)), high]
    for word, group in itertools.groupby(range(len(scales)), key=lambda i: worst.iloc[i]):
        own = list(group)
        if word not in FAILED and word != "degraded":
            continue
        left, right = edges[own[0]], edges[own[-1] + 1]
        ax.axvspan(left, right, facecolor="none", edgecolor=MUTED, hatch=_HATCH[word], linewidth=0, alpha=0.45,
                   zorder=0)  # fmt: skip
        here = seeds.loc[seeds["scale"].isin([scales[i] for i in own]), "verdict"]
        count = int((here == word).sum())
        text = word if count == len(here) else f"{count} of {len(here)} {word}"
        wide = math.log(right / left) > 0.22 * math.log(high / low)
        ax.annotate(text, (math.sqrt(left * right), 1), xycoords=("data", "axes fraction"), xytext=(0, -3),
                    textcoords="offset points", ha="center", va="top", fontsize=TINY, color=FOREGROUND,
                    rotation=0 if wide else 90)  # fmt: skip


def _target_names(targets: DataFrame) -> dict[float, str]:
    """What to call each constant: the targets that give it; of the variants of one, those that differ from it."""
    found: dict[float, str] = {}
    for scale, group in targets.groupby("scale"):
        names = list(dict.fromkeys(group["target"]))
        plain = [n for n in names if ":" not in n]
        variants = [n.split(":", 1)[1] for n in names if ":" in n and n.split(":", 1)[0] not in plain]
        chosen = [n for n in plain if group.loc[group["target"] == n, "chosen"].any()]
        moved = sorted({float(s) for s in group.loc[group["chosen"].astype(bool), "shift"] if s})
        how = f"chosen, shift {moved[0]:.3g}" if moved else "chosen"
        words = [*(f"{n} ({how})" for n in chosen), *(n for n in plain if n not in chosen), *variants]
        found[float(str(scale))] = ", ".join(words)
    return found


def _targets(ax: Axes, targets: DataFrame) -> None:
    """A triangle on the axis at the constant of each target, its name above it, in as many lanes as it takes."""
    low, high = ax.get_xlim()
    names = {a: text for a, text in _target_names(targets).items() if low <= a <= high}
    if not names:
        return
    chosen = set(targets.loc[targets["chosen"].astype(bool), "scale"])
    figure: Any = ax.get_figure(root=True)
    frame, scale = ax.get_window_extent(), figure.dpi / 72.0
    lanes: list[float] = []  # where the last text of each lane ends, in pixels
    placed = []
    for at, text in sorted(names.items()):
        pixel = float(ax.transData.transform((at, 0.0))[0])
        width = extent(figure, text, TINY)[0] * scale * (_BOLD if at in chosen else 1.0)
        left = min(max(pixel - width / 2, frame.x0 + 2), frame.x1 + 30 * scale - width)
        lane = next((i for i, end in enumerate(lanes) if end + 5 * scale < left), len(lanes))
        lanes[lane : lane + 1] = [left + width]
        placed.append((at, text, (left + width / 2 - pixel) / scale, lane))
    zone = 12 + 10 * len(lanes)
    bottom, top = min(0.0, ax.get_ylim()[0]), ax.get_ylim()[1]
    bottom = -top * zone / (frame.height / scale - zone)
    ax.set_ylim(bottom, top)
    for at, text, shift, lane in placed:
        mark = at in chosen
        ax.plot(at, bottom, marker="^", markersize=9 if mark else 6, color=FOREGROUND if mark else MUTED,
                clip_on=False, linestyle="none", zorder=4)  # fmt: skip
        ax.annotate(text, (at, bottom), (shift, 6 + 10 * lane), textcoords="offset points", ha="center", va="bottom",
                    fontsize=TINY, color=FOREGROUND, fontweight="bold" if mark else "normal",
                    annotation_clip=False)  # fmt: skip
        if mark:
            ax.axvline(at, color=FOREGROUND, linewidth=0.9, linestyle=(0, (1, 2)), zorder=0)
