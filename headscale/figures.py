"""Figures as pure functions of saved records; nothing is computed here and no global plotting state is touched."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headscale.errors import UsageError
from headscale.records import Calibration, Inspection, ScaleCurve, TrainingRun

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, distinguishable to the colour-blind; the reference is always black.
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
REFERENCE_COLOUR = "#000000"
_BAND = "#DDDDDD"
_SUFFIXES = (".svg", ".png", ".pdf")


def save(figure: Figure, path: str | Path) -> None:
    """Write a figure as SVG (text stays text), PNG or PDF, by suffix.

    Raises:
        UsageError: another suffix.
    """
    file = Path(path)
    if file.suffix not in _SUFFIXES:
        raise UsageError(f"`{file}` ends in none of {', '.join(_SUFFIXES)}", hint=f"use `{file.with_suffix('.svg')}`")
    file.parent.mkdir(parents=True, exist_ok=True)
    from matplotlib import rc_context

    settings: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "headscale", "savefig.bbox": "tight"}
    with rc_context(settings):
        figure.savefig(file, dpi=150, metadata={"Date": None} if file.suffix == ".svg" else None)


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


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

    figure, axes = _figure(7.0, 4.2)
    colours = iter(COLOURS)
    ends = []
    for name, seeds in runs:
        length = min(len(run.steps) for run in seeds)
        values = np.array([[step.loss_over_ln_n for step in run.steps[:length]] for run in seeds])  # (seeds, steps)
        steps, middle = np.arange(length), np.ma.median(np.ma.masked_invalid(values), axis=0).filled(np.nan)  # type: ignore[no-untyped-call]
        colour = REFERENCE_COLOUR if name == reference else next(colours)
        axes.plot(steps, middle, color=colour, linewidth=1.6)
        if len(seeds) > 1:
            low, high = np.ma.masked_invalid(values).min(0), np.ma.masked_invalid(values).max(0)
            axes.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0)
        ends.append((float(middle[-1]), name, colour, length))
    axes.axhline(1.0, color="#777777", linewidth=0.8, linestyle="--")
    axes.set_yscale("log")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("contrastive loss / ln N (dashed: chance)")
    _label_ends(axes, ends)
    _titles(figure, axes, title, subtitle)
    return figure


def _label_ends(axes: Axes, ends: list[tuple[float, str, str, int]]) -> None:
    """Names at the right of their lines, pushed apart where lines end close together."""
    import math

    low, high = (math.log10(v) for v in axes.get_ylim())
    apart = 0.065 * (high - low)  # a text line of this figure, as a share of the axis
    place = -math.inf
    for value, name, colour, length in sorted(ends):
        place = max(math.log10(value), place + apart)
        axes.annotate(
            name, (length - 1, value), (length * 1.02, 10**place), color=colour, fontsize=9, va="center",
            annotation_clip=False,
        )  # fmt: skip
    axes.set_xlim(0, max(1, max(e[3] for e in ends) - 1))


def curves_of_constants(found: Sequence[Inspection | Calibration], *, title: str = "") -> Figure:
    """Loss at step 0 over ln N against the constant, the healthy band shaded, the chosen constants marked.

    Args:
        found: inspections with texts, or calibrations; those without a curve are left out.
        title: of the figure.
    """
    from headscale.diagnosis import LOSS_CEILING

    figure, axes = _figure(7.0, 4.2)
    curves: list[tuple[Any, ScaleCurve]] = [(f, f.curve) for f in found if f.curve is not None]
    if not curves:
        raise UsageError("nothing to draw: no result holds a curve over constants", hint="inspect with texts first")
    axes.axhspan(0.5, LOSS_CEILING, color=_BAND, linewidth=0)
    axes.annotate(
        f"healthy start (at most {LOSS_CEILING:g})", (0.01, LOSS_CEILING), xycoords=("axes fraction", "data"),
        textcoords="offset points", xytext=(0, 3), fontsize=8, color="#555555",
    )  # fmt: skip
    for (record, curve), colour in zip(curves, _cycled(len(curves)), strict=True):
        axes.plot(curve.scale, curve.loss_over_ln_n, color=colour, linewidth=1.6)
        axes.annotate(
            record.name, (curve.scale[-1], curve.loss_over_ln_n[-1]), (4, 0), textcoords="offset points",
            color=colour, fontsize=9, va="center", annotation_clip=False,
        )  # fmt: skip
        if isinstance(record, Calibration) and record.scale is not None:
            axes.axvline(record.scale, color=colour, linewidth=0.9, linestyle=":")
            axes.annotate(
                f"{record.match}: {record.scale:.4g}", (record.scale, axes.get_ylim()[1]), (3, -10),
                textcoords="offset points", fontsize=8, color=colour,
            )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("constant on the logits")
    axes.set_ylabel("contrastive loss at step 0 / ln N")
    _titles(figure, axes, title or "What the constant does before training", "")
    return figure


def _cycled(count: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(count)]


def _titles(figure: Figure, axes: Axes, title: str, subtitle: str) -> None:
    if title:
        axes.set_title(title, loc="left", fontsize=11, pad=18 if subtitle else 6)
    if subtitle:
        axes.annotate(
            subtitle, (0, 1), (0, 5), xycoords="axes fraction", textcoords="offset points", fontsize=9, color="#444444"
        )
    axes.spines[["top", "right"]].set_visible(False)
