"""The constant as a number: rounded to powers of two, and written as people write it."""

from __future__ import annotations

import math

PRECISION = 1e-6  # of a solved constant, in log2


def nearest_power_of_two(scale: float) -> float:
    """The power of two nearest in ratio; products with it are exact in every dtype."""
    return float(2.0 ** round(math.log2(scale)))


def power_of_two_below(scale: float) -> float:
    """The largest power of two that does not exceed the constant (to the solver's precision)."""
    return float(2.0 ** math.floor(math.log2(scale) + 2 * PRECISION))


def ratio_text(scale: float) -> str:
    """A constant as people write it: 1/64, or 0.37."""
    if 0 < scale < 1 and math.log2(scale).is_integer():
        return f"1/{round(1 / scale)}"
    return f"{scale:.4g}"
