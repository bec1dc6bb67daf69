"""Figure 4: how the arms trained, step by step."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from headscale.errors import HeadscaleError
from headscale.figures.labels import Label, label_ends, settle
from headscale.figures.points import legible, log_axis, start_text
from headscale.figures.style import (
    COLOURS,
    FOREGROUND,
    LINES,
    MUTED,
    REFERENCE_COLOUR,
    SHAPES,
    SMALL,
    TINY,
    distinct,
    panels,
    styled,
    titles,
)
from headscale.records import TrainingRun
from headscale.tables import rows_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame

_PANELS = {
    "loss_over_ln_n": "contrastive loss [ln N]",
    "active_dims_document": "active dims per document [dims]",
    "score_sd": "score sd, in batch [score]",
    "cosine_document": "mean cosine d-d [1]",
    "grad_norm_head": "gradient of the head [L2 norm]",
    "grad_norm_encoder": "gradient of the encoder [L2 norm]",
}
_LINEAR = frozenset({"cosine_document"})


@styled()
def draw_curves(data: DataFrame, ax: Axes | None = None, *, title: str = "", subtitle: str = "") -> Figure:
    """Loss, active dims, score scale, cosine and gradient norms of each arm, one panel each.

    A line is the median over seeds, its band reaches from the smallest to the largest; a marker shows the step at
    which a seed's verdict was reached, its shape the word.

    Args:
        data: from `headscale.tables.curves`.
        ax: where to draw; None makes a figure.
        title: by default the configuration.
        subtitle: by default the verdicts.

    Raises:
        HeadscaleError: no training left a log.
    """
    steps = data[data["kind"] == "step"]
    if steps.empty:
        raise HeadscaleError(
            "no training curves: none of the results holds the log of a training",
            hint="train with `headscale trial BACKBONE`, and give its run folder",
        )
    figure, axes = panels(ax, 3, 2, size=(9.0, 8.2), sharex=True)
    arms = _arms(steps)
    for panel, (statistic, label) in zip(axes, _PANELS.items(), strict=True):
        _panel(panel, data, arms, statistic, label)
    for panel in axes[-2:]:
        panel.set_xlabel("optimizer step [steps]")
        panel.set_xticks([t for t in panel.get_xticks() if 0 <= t <= 1.02 * steps["step"].max()])
    titles(figure, axes, title or _title(steps), subtitle or _subtitle(data, arms))
    settle(figure)
    for panel, statistic in zip(axes, _PANELS, strict=True):
        label_ends(panel, _ends(steps, arms, statistic))
    return figure


def _arms(steps: DataFrame) -> list[dict[str, Any]]:
    """How each arm is drawn, in the order of the table."""
    found: list[dict[str, Any]] = []
    others = 0
    key: Any
    for key, group in steps.groupby(["backbone", "arm", "scale"], sort=False):
        backbone, arm, scale = key
        reference = bool(group["reference"].iloc[0]) and arm == "untouched"
        own = {"scale": scale, "shift": float(group["shift"].iloc[0]), "arm": arm}
        name = "reference" if reference else start_text(own) or arm
        found.append({
            "key": key, "label": name, "backbone": backbone,
            "colour": REFERENCE_COLOUR if reference else COLOURS[others % len(COLOURS)],
            "line": LINES[len(found) % len(LINES)],
        })  # fmt: skip
        others += not reference
    return found


def _of(data: DataFrame, arm: dict[str, Any]) -> DataFrame:
    backbone, kind, scale = arm["key"]
    found: DataFrame = data[(data["backbone"] == backbone) & (data["arm"] == kind) & (data["scale"] == scale)]
    return found


def _panel(ax: Axes, data: DataFrame, arms: list[dict[str, Any]], statistic: str, label: str) -> None:
    import numpy as np

    logarithmic = statistic not in _LINEAR
    last = max(1.0, float(data["step"].max()))
    for arm in arms:
        own = _of(data, arm)
        line = own[(own["kind"] == "step") & (own["statistic"] == statistic)]
        values = line[["value", "low", "high"]].astype(float)
        values = values.where((values > 0) | (not logarithmic))  # a zero has no place on a log axis
        x = line["step"].to_numpy(float)
        ax.plot(x, values["value"], color=arm["colour"], linewidth=1.5, linestyle=arm["line"])
        if (line["seeds"] > 1).any():
            ax.fill_between(x, values["low"], values["high"], color=arm["colour"], alpha=0.18, linewidth=0)
        for verdict in rows_of(own[own["kind"] == "verdict"].drop_duplicates(["step", "verdict"])):
            at = np.searchsorted(x, min(verdict["step"], x[-1])) if len(x) else 0
            if len(x) and np.isfinite(values["value"].iloc[at]):
                ax.plot(
                    x[at], values["value"].iloc[at], marker=SHAPES[verdict["verdict"]], color=arm["colour"],
                    markersize=7.5, markeredgewidth=0, linestyle="none", zorder=5,
                )  # fmt: skip
    if logarithmic:
        log_axis(ax, "y")
    if statistic == "loss_over_ln_n":
        ax.plot([0, last], [1, 1], color=MUTED, linewidth=0.9, linestyle=":", zorder=0)  # chance
    for band in rows_of(data[(data["kind"] == "band") & (data["statistic"] == statistic)]):
        ax.axhspan(band["low"], band["high"], color=MUTED, alpha=0.18, linewidth=0)
        ax.annotate(band["verdict"], (0.4, band["high"]), xycoords=("axes fraction", "data"), xytext=(0, 2),
                    textcoords="offset points", fontsize=TINY, color=MUTED)  # fmt: skip
    ax.set_ylabel(label, fontsize=SMALL)
    ax.set_xlim(-0.01 * last, last * 1.23)  # room for the names


def _ends(steps: DataFrame, arms: list[dict[str, Any]], statistic: str) -> list[Label]:
    found = []
    for arm in arms:
        line = _of(steps, arm)
        line = line[(line["statistic"] == statistic) & line["value"].notna()]
        if statistic not in _LINEAR:
            line = line[line["value"] > 0]
        if len(line):
            last = line.iloc[-1]
            found.append(Label(float(last["step"]), float(last["value"]), arm["label"], legible(arm["colour"])))
    if statistic == "loss_over_ln_n" and found:
        found.append(Label(max(end.x for end in found), 1.0, "chance", MUTED))
    return found


def _title(steps: DataFrame) -> str:
    names = distinct(list(dict.fromkeys(steps["backbone"])), 40)
    first = steps.iloc[-1]
    parts = [" and ".join(names.values()), first["setting"], first["recipe"]]
    return ": ".join(p for p in (parts[0], ", ".join(p for p in parts[1:] if p)) if p)


def _subtitle(data: DataFrame, arms: list[dict[str, Any]]) -> str:
    """What became of each arm, and how the curves were thinned."""
    said = []
    for arm in arms:
        own = _of(data, arm)
        verdicts = own[own["kind"] == "verdict"]
        words = [f"{word} ({_range(group['step'])})" for word, group in verdicts.groupby("verdict", sort=False)]
        said.append(f"{arm['label']}: {', '.join(words) or 'no verdict yet'}")
    seeds, every = int(data["seeds"].max()), int(data["every"].max())
    thinned = f"; every {every}th step drawn" if every > 1 else ""
    return f"{'; '.join(said)}. {seeds} seed{'s: median, smallest and largest' if seeds > 1 else ''}{thinned}"


def _range(steps: Any) -> str:
    low, high = int(steps.min()), int(steps.max())
    return f"step {low}" if low == high else f"steps {low}-{high}"


# --- of records in memory ------------------------------------------------------------------------------------------


@styled()
def training_curves(
    runs: Sequence[tuple[str, Sequence[TrainingRun]]],
    *,
    title: str = "",
    subtitle: str = "",
    reference: str = "",
) -> Figure:
    """Contrastive loss over ln N against the step: a line per arm, seeds as a band around their median.

    Args:
        runs: (name of the arm, its runs over seeds); all of one length.
        title: the configuration.
        subtitle: what happened.
        reference: the arm drawn in black.
    """
    import numpy as np

    figure, (ax,) = panels(None, 1, 1, size=(7.0, 4.2))
    colours = itertools.cycle(COLOURS)
    ends = []
    for name, seeds in runs:
        length = min(len(run.steps) for run in seeds)
        values = np.array([[step.loss_over_ln_n for step in run.steps[:length]] for run in seeds])  # (seeds, steps)
        steps, middle = np.arange(length), np.ma.median(np.ma.masked_invalid(values), axis=0).filled(np.nan)  # type: ignore[no-untyped-call]
        colour = REFERENCE_COLOUR if name == reference else next(colours)
        ax.plot(steps, middle, color=colour, linewidth=1.6)
        if len(seeds) > 1:
            low, high = np.ma.masked_invalid(values).min(0), np.ma.masked_invalid(values).max(0)
            ax.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0)
        finite = [v for v in middle if math.isfinite(v)]
        ends.append(Label(length - 1, finite[-1] if finite else 1.0, name, colour))
    ax.axhline(1.0, color=MUTED, linewidth=0.8, linestyle="--")
    ax.set_yscale("log")
    ax.set_xlim(0, max(1.0, *(e.x for e in ends)))
    ax.set_xlabel("optimizer step [steps]")
    ax.set_ylabel("contrastive loss [ln N] (dashed: chance)", color=FOREGROUND)
    titles(figure, [ax], title, subtitle)
    settle(figure)
    label_ends(ax, ends)
    return figure
