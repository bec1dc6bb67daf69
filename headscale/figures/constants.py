"""What the constant does before any training: the curve that `calibrate` chooses from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from headscale.errors import UsageError
from headscale.figures.labels import Label, label_ends, settle
from headscale.figures.style import COLOURS, MUTED, SMALL, TINY, panels, shorten, styled, titles
from headscale.records import Calibration, Inspection, ScaleCurve

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@styled()
def curves_of_constants(found: Sequence[Inspection | Calibration], *, title: str = "") -> Figure:
    """Loss at step 0 over ln N against the constant, the healthy band shaded, the chosen constants marked.

    Args:
        found: inspections with texts, or calibrations; those without a curve are left out.
        title: of the figure.
    """
    from headscale.diagnosis import LOSS_CEILING

    curves: list[tuple[Any, ScaleCurve]] = [(f, f.curve) for f in found if f.curve is not None]
    if not curves:
        raise UsageError("nothing to draw: no result holds a curve over constants", hint="inspect with texts first")
    figure, (ax,) = panels(None, 1, 1, size=(7.0, 4.2))
    ax.axhspan(0.5, LOSS_CEILING, color=MUTED, alpha=0.2, linewidth=0)
    ax.annotate(
        f"healthy start (at most {LOSS_CEILING:g})", (0.01, LOSS_CEILING), xycoords=("axes fraction", "data"),
        textcoords="offset points", xytext=(0, 3), fontsize=TINY, color=MUTED,
    )  # fmt: skip
    ends = []
    for i, (record, curve) in enumerate(curves):
        colour = COLOURS[i % len(COLOURS)]
        ax.plot(curve.scale, curve.loss_over_ln_n, color=colour, linewidth=1.6)
        ends.append(Label(curve.scale[-1], curve.loss_over_ln_n[-1], shorten(record.name), colour))
        if isinstance(record, Calibration) and record.scale is not None:
            ax.axvline(record.scale, color=colour, linewidth=0.9, linestyle=":")
            ax.annotate(
                f"{record.match}: {record.scale:.4g}", (record.scale, 1), (3, -10 - 11 * i),
                xycoords=("data", "axes fraction"), textcoords="offset points", fontsize=SMALL, color=colour,
            )  # fmt: skip
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xlabel("constant on the logits [x]")
    ax.set_ylabel("contrastive loss at step 0 [ln N]")
    ax.set_xlim(right=max(e.x for e in ends))
    titles(figure, [ax], title or "What the constant does before training", "")
    settle(figure)
    label_ends(ax, ends)
    return figure
