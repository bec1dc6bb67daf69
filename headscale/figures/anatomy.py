"""Figure 5: what the heads are made of, and what the constant does to what they put out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from headscale.constants import ratio_text
from headscale.errors import HeadscaleError
from headscale.figures.labels import Label, label_ends, place, settle
from headscale.figures.points import legible, log_axis
from headscale.figures.style import (
    COLOURS,
    FOREGROUND,
    MUTED,
    REFERENCE_COLOUR,
    SMALL,
    TINY,
    colours,
    distinct,
    panels,
    styled,
    titles,
)

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame

    Named = tuple[list[Label], list[np.ndarray]]

MOST_ROWS = 24  # strips of row norms
MOST_LINES = 4  # backbones whose curves are drawn
_LABELLED = (5, 7, 6, 4, 8)  # of the quantiles, where the names of lines go by turns
_MISSING = {
    "logit": "no logits: run\n`headscale inspect` with texts",
    "weight": "no pooled weights: run\n`headscale inspect` or `calibrate`\nwith texts, `--force` for old cells",
    "singular_value": "no singular values: run\n`headscale inspect --spectral`",
}


@styled()
def draw_anatomy(data: DataFrame, ax: Axes | None = None, *, title: str = "", subtitle: str = "") -> Figure:
    """Row norms of each head; logits and pooled weights before and after the constant; singular values.

    Args:
        data: from `headscale.tables.anatomy`.
        ax: where to draw; None makes a figure.
        title: by default which heads.
        subtitle: by default what the lines mean.

    Raises:
        HeadscaleError: nothing was inspected.
    """
    if data.empty:
        raise HeadscaleError(
            "head anatomy: none of the results is an inspection",
            hint="run `headscale inspect BACKBONE --spectral`, and give its run folder",
        )
    names = list(dict.fromkeys(data["backbone"]))
    references = list(dict.fromkeys(data.loc[data["reference"].astype(bool), "backbone"]))
    drawn = _drawn(data, names, references)
    chosen = colours(names, references)
    figure, axes = panels(ax, 2, 2, size=(9.4, 7.4))
    rows, logits, weights, spectrum = axes
    shown = _row_norms(rows, data[data["part"] == "row_norm"], names, references, chosen)
    named = {
        logits: _distributions(logits, data, "logit", drawn, chosen, "logits of single positions [logit]"),
        weights: _distributions(weights, data, "weight", drawn, chosen, "pooled document weights above zero [weight]"),
    }
    ends = _spectrum(spectrum, data, drawn, chosen)
    heads = f"{len(names)} MLM head{'s' * (len(names) > 1)}"
    parts = ["solid: before the constant; dashed: after it", "row norms: median, middle half, 1 to 99 %"]
    if shown < len(names):
        parts.append(f"{shown} of {len(names)} heads drawn, evenly spaced by median row norm")
    if len(drawn) < len(names):
        parts.append(f"curves of {len(drawn)}")
    titles(figure, axes, title or f"Anatomy of {heads}", subtitle or "; ".join(parts))
    settle(figure)
    for panel, (labels, lines) in named.items():
        place(panel, labels, avoid=lines, size=TINY)
    label_ends(spectrum, ends)
    return figure


def _drawn(data: DataFrame, names: list[str], references: list[str]) -> list[str]:
    """The backbones whose curves are drawn: references and those with a constant first."""
    scaled = set(data.loc[data["scale"] != 1.0, "backbone"])
    order = sorted(names, key=lambda n: (n not in references, n not in scaled))
    return order[:MOST_LINES]


def _row_norms(ax: Axes, data: DataFrame, names: list[str], references: list[str], chosen: dict[str, str]) -> int:
    """A strip a head, sorted by median, references black; returns how many."""
    import numpy as np

    table = data.pivot_table(index="backbone", columns="place", values="value", aggfunc="first")
    table = table.loc[table[50].sort_values(kind="stable").index]
    if len(table) > MOST_ROWS:
        kept = set(np.linspace(0, len(table) - 1, MOST_ROWS).round().astype(int))
        table = table[[i in kept or n in references for i, n in enumerate(table.index)]]
    short = distinct([str(n) for n in table.index], 22)
    for i, (name, row) in enumerate(table.iterrows()):
        colour = REFERENCE_COLOUR if name in references else chosen[str(name)] if len(table) <= 6 else COLOURS[1]
        ax.plot(row[[1, 99]], [i, i], color=colour, linewidth=1.0)
        ax.plot(row[[25, 75]], [i, i], color=colour, linewidth=4.5, solid_capstyle="butt")
        ax.plot(row[50], i, marker="|", color=MUTED if name in references else FOREGROUND, markersize=9)
    ax.set_yticks(range(len(table)), [short[str(n)] for n in table.index], fontsize=SMALL if len(table) < 12 else 6.5)
    ax.set_ylim(-0.7, len(table) - 0.3)
    log_axis(ax)
    ax.set_xlabel("norm of the matrix's rows [L2 norm]")
    ax.set_ylabel("backbone [name]")
    return len(table)


def _distributions(ax: Axes, data: DataFrame, part: str, drawn: list[str], chosen: dict[str, str], label: str) -> Named:
    """Cumulative distributions from quantiles, before and after; returns their names, to be placed."""
    own = data[(data["part"] == part) & data["backbone"].isin(drawn) & data["value"].notna()]
    ax.set_xlabel(label)
    ax.set_ylabel("share below [%]")
    if own.empty:
        _nothing(ax, part)
        return [], []
    ax.set_ylim(0, 103)
    if part == "logit":
        ax.axvline(0, color=MUTED, linewidth=0.9, linestyle=":", zorder=0)
    short = distinct(drawn, 22)
    labels, lines = [], []
    keys: Any
    for i, (keys, group) in enumerate(own.groupby(["backbone", "scale"], sort=False)):
        name, scale = keys
        line = group.sort_values("place")[["value", "place"]].to_numpy(float)
        ax.plot(*line.T, color=chosen[name], linewidth=1.5, linestyle="-" if scale == 1.0 else (0, (4, 2)))
        at = line[_LABELLED[i % len(_LABELLED)] % len(line)]
        text = short[name] if scale == 1.0 else f"{short[name]} x {ratio_text(scale)}"
        labels.append(Label(float(at[0]), float(at[1]), text, legible(chosen[name])))
        lines.append(line)
    return labels, lines


def _spectrum(ax: Axes, data: DataFrame, drawn: list[str], chosen: dict[str, str]) -> list[Label]:
    own = data[(data["part"] == "singular_value") & data["backbone"].isin(drawn) & (data["value"] > 0)]
    ax.set_xlabel("rank of the singular value [1 = largest]")
    ax.set_ylabel("singular value of W [L2 norm]")
    if own.empty:
        _nothing(ax, "singular_value")
        return []
    short, ends = distinct(drawn, 18), []
    for name, line in own.groupby("backbone", sort=False):
        ax.plot(line["place"], line["value"], color=chosen[str(name)], linewidth=1.5)
        first = line.iloc[-1]
        ends.append(Label(float(first["place"]), float(first["value"]), short[str(name)], legible(chosen[str(name)])))
    ax.set_xlim(0.9, own["place"].max() * 6)  # room for the names
    log_axis(ax)
    log_axis(ax, "y")
    return ends


def _nothing(ax: Axes, part: str) -> None:
    """A panel without data says which command makes them."""
    ax.set_xticks([])
    ax.set_yticks([])
    ax.annotate(_MISSING[part], (0.5, 0.5), xycoords="axes fraction", ha="center", va="center", color=MUTED)
