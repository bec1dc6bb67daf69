"""Colours that stay legible in both schemes: contrast after WCAG 2.2, and a colour moved until it has enough of it."""

from __future__ import annotations

import colorsys

# The page's two backgrounds; figures are drawn on them without one of their own.
LIGHT, DARK = "#ffffff", "#15181e"
# WCAG 2.2, success criteria 1.4.3 (text) and 1.4.11 (lines and areas); text with room for a shaded band below it.
TEXT_CONTRAST, MARK_CONTRAST = 5.0, 3.0


def luminance(colour: str) -> float:
    """Relative luminance of `#rrggbb`, as WCAG 2.2 defines it: 0 is black, 1 white."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in _rgb(colour)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    """Contrast ratio of two colours, 1 to 21."""
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def legible(colour: str, background: str, least: float) -> str:
    """The colour, as little as needed lighter or darker, so that it stands out from the background.

    Args:
        colour: `#rrggbb`, chosen for a white background.
        background: `#rrggbb`.
        least: contrast ratio that it must have; a grey keeps the one it has against white where it is lower,
            so that a faint band stays faint.

    Returns:
        `#rrggbb` of the same hue and saturation.
    """
    hue, lightness, saturation = colorsys.rgb_to_hls(*_rgb(colour))
    grey = saturation < 0.05
    wanted = contrast(colour, LIGHT) if grey else least
    if grey and wanted > MARK_CONTRAST:
        wanted = max(wanted, least)
    if not grey and contrast(colour, background) >= least:
        return colour
    towards = 0.0 if luminance(background) > 0.5 else 1.0
    near, far = (background_lightness(background), towards) if grey else (lightness, towards)
    for _ in range(24):  # halving: the least change that is enough
        middle = (near + far) / 2
        if contrast(_hex(colorsys.hls_to_rgb(hue, middle, saturation)), background) >= wanted:
            far = middle
        else:
            near = middle
    return _hex(colorsys.hls_to_rgb(hue, far, saturation))


def background_lightness(background: str) -> float:
    """Lightness of a background in HLS."""
    return colorsys.rgb_to_hls(*_rgb(background))[1]


def _rgb(colour: str) -> tuple[float, float, float]:
    red, green, blue = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return red, green, blue


def _hex(rgb: tuple[float, float, float]) -> str:
    return "#" + "".join(f"{round(255 * min(1.0, max(0.0, c))):02x}" for c in rgb)
