"""The constant at which a statistic has a value, and the shift at which a share of the terms is active."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

from headscale.activations import Observation, curve_of, curve_point, only_active
from headscale.constants import PRECISION, ratio_text
from headscale.errors import UsageError
from headscale.inspection import CURVE_SCALES
from headscale.records import Profile, ScaleCurve

if TYPE_CHECKING:
    from torch import Tensor

Shift = Callable[[float], float]  # from a constant to what is added to the logits before it

_FLAT = 1e-6  # relative: what float32 sums leave of a statistic that is the same everywhere


class Solver:
    """The statistics over constants of one observation, solved for a value; `shift` gives each constant's shift."""

    def __init__(self, seen: Observation, shift: Shift, *, scale_bias: bool = True) -> None:
        self.scale_bias = scale_bias
        self.shift = shift
        self.seen = only_active(seen, shift(1.0)) if scale_bias else seen
        self.vocab = seen.query.largest.shape[1]
        self.curve: ScaleCurve = curve_of([self.at(a) for a in CURVE_SCALES], CURVE_SCALES)

    def at(self, scale: float) -> dict[str, Any]:
        """All statistics of the curve at one constant."""
        return curve_point(self.seen, self.vocab, scale, self.scale_bias, self.shift(scale))

    def solve(self, statistic: str, value: float, *, largest: bool = False) -> tuple[float | None, str]:
        """The constant at which a statistic has a value, and what is odd about it.

        Args:
            statistic: a column of the curve.
            value: what it should be.
            largest: take the end of the range if the statistic is below the value there, as its largest solution.
        """
        if not math.isfinite(value) or value <= 0:
            return None, f"the reference's {statistic} is {value:.4g}, which no constant matches"
        column = getattr(self.curve, statistic)
        if not all(math.isfinite(v) for v in column):
            return None, f"{statistic} is not finite at some constants"
        above = [v > value for v in column]
        if largest and not above[-1]:
            limit = self.curve.scale[-1]
            return limit, f"{statistic} is still below {value:.4g} at {ratio_text(limit)}, the largest constant tried"
        crossings = [i for i in range(len(column) - 1) if above[i] != above[i + 1]]
        if not crossings:
            return None, self._out_of_range(statistic, value)
        place = crossings[-1]
        low, high = self.curve.scale[place], self.curve.scale[place + 1]
        note = "" if len(crossings) == 1 else f"{statistic} crosses it {len(crossings)} times; the largest is taken"
        return self._root(statistic, value, low, high), note

    def _out_of_range(self, statistic: str, value: float) -> str:
        column = getattr(self.curve, statistic)
        low, high = min(column), max(column)
        flat = high - low <= _FLAT * max(abs(high), abs(low))
        kind = "does not move with the constant" if flat else f"only runs from {low:.4g} to {high:.4g}"
        return f"{statistic} {kind}, so {value:.4g} is out of range"

    def _root(self, statistic: str, value: float, low: float, high: float) -> float:
        from scipy.optimize import brentq

        def excess(exponent: float) -> float:
            return float(self.at(2.0**exponent)[statistic]) - value

        ends = math.log2(low), math.log2(high)
        excesses = [excess(end) for end in ends]
        if excesses[0] * excesses[1] >= 0:  # an end is the solution, to within rounding
            return low if abs(excesses[0]) <= abs(excesses[1]) else high
        return float(2.0 ** brentq(excess, *ends, xtol=PRECISION))

    def lowest_loss(self) -> float:
        """The constant of the curve with the lowest loss."""
        losses = self.curve.loss_over_ln_n
        return self.curve.scale[losses.index(min(losses))]


# --- the shift -----------------------------------------------------------------------------------------------------


def shift_to_share(seen: Observation, profile: Profile, *, scale_bias: bool) -> Shift:
    """The shift at which documents have the reference's share of active dims, for each constant.

    Logits are shifted before the scale, so where the bias is scaled too one shift does for all constants; where it
    is kept, a term is active if a (m - b + shift) + b > 0, and the shift depends on a.

    Args:
        seen: what `headscale.activations.observe` kept.
        profile: of the reference, with its outputs.
        scale_bias: whether the bias is scaled with the matrix.

    Raises:
        UsageError: the reference's outputs are not known, or hold no active term.
    """
    if profile.output is None:
        raise UsageError(
            "`--shift` needs the reference's outputs, and only its weights are known",
            hint="give a reference that is on this machine, or a profile of it",
        )
    if not profile.output.document.active_dims > 0:
        raise UsageError(
            f"`--shift` cannot match `{profile.name}`, whose documents have no active terms",
            hint="take a reference that puts something out",
        )
    share = share_of(profile)
    largest, bias = seen.document.largest, seen.bias
    if scale_bias or bias is None:
        one = _shift_to(largest, share)
        return lambda _: one
    return cache(lambda scale: _shift_to(largest - bias + bias / scale, share))


def _shift_to(thresholds: Tensor, share: float) -> float:
    """The shift that leaves a share of the values above zero: midway between two of them, clear of rounding."""
    import numpy as np

    values = thresholds.numpy().reshape(-1)
    values = values[np.isfinite(values)]
    count = min(max(1, round(share * thresholds.numel())), len(values))
    if count == len(values):
        return float(4 * np.spacing(np.abs(values).max()) - values.min())
    place = len(values) - count  # of the smallest that stays active, in ascending order
    ordered = np.partition(values, (place - 1, place))
    return -(float(ordered[place - 1]) + float(ordered[place])) / 2


def share_of(profile: Profile) -> float:
    """The share of the vocabulary that is active in a document of a reference whose outputs are known."""
    assert profile.output is not None
    document = profile.output.document
    vocabulary = document.l1 / document.mean_weight if document.mean_weight > 0 else math.inf
    return document.active_dims / vocabulary
