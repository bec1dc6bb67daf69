"""What all figures share: colours, shapes, panels, titles, and how a figure becomes a file."""

from __future__ import annotations

import contextlib
import io
import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headscale.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FOREGROUND = "#111111"
"""Of all text and axes and of the reference; a page replaces it by `currentColor`."""
MUTED = "#808080"
"""Of everything in the background; 3.9:1 against white and 4.8:1 against #111, and may be replaced too."""
REFERENCE_COLOUR = FOREGROUND
# Okabe and Ito's palette (https://jfly.uni-koeln.de/color/), distinguishable to the colour-blind; those first that
# are legible on white and on near-black.
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
SHAPES = {"stable": "o", "inconclusive": "D", "dense": "s", "degraded": "^", "collapsed": "X", "diverged": "v", "": "o"}
"""The marker of each verdict of a trial, so that no colour is needed to tell them apart."""
LINES = ("-", (0, (6, 2)), (0, (2, 1.5)), (0, (6, 2, 1.5, 2)))
SUFFIXES = (".svg", ".png", ".pdf")
SMALL, TINY = 8.5, 7.5  # points

_SETTINGS: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "headscale",
    "font.family": ["DejaVu Sans"],  # comes with matplotlib: the same extents on every machine
    "font.size": 9,
    "mathtext.default": "regular",
    "text.color": FOREGROUND,
    "axes.edgecolor": FOREGROUND,
    "axes.labelcolor": FOREGROUND,
    "axes.titlecolor": FOREGROUND,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "xtick.color": FOREGROUND,
    "ytick.color": FOREGROUND,
    "axes.unicode_minus": True,
}


@contextlib.contextmanager
def styled() -> Iterator[None]:
    """The settings of all figures inside; matplotlib's as before on leaving. Also a decorator."""
    from matplotlib import rc_context

    settings: Any = _SETTINGS
    with rc_context(settings):
        yield


# --- files ---------------------------------------------------------------------------------------------------------


def save(figure: Figure, path: str | Path) -> None:
    """Write a figure as SVG (text stays text), PNG or PDF, by suffix, on white.

    Raises:
        UsageError: another suffix.
    """
    file = Path(path)
    if file.suffix not in SUFFIXES:
        raise UsageError(f"`{file}` ends in none of {', '.join(SUFFIXES)}", hint=f"use `{file.with_suffix('.svg')}`")
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".svg":
        file.write_text(to_svg(figure, facecolor="white"), encoding="utf-8")
        return
    metadata = {"CreationDate": None} if file.suffix == ".pdf" else None
    with styled():
        figure.savefig(file, dpi=150, bbox_inches="tight", facecolor="white", metadata=metadata)


def to_svg(figure: Figure, *, prefix: str = "", facecolor: str = "none") -> str:
    """A figure as SVG text: the same figure gives the same bytes.

    Coordinates are rounded to a tenth of a point, which no eye sees and which halves the size; groups that only carry
    matplotlib's names are kept without them.

    Args:
        figure: any of this package's.
        prefix: put before every id, so that several figures can stand in one page.
        facecolor: of the background; none by default, so that a page's own shows.
    """
    out = io.StringIO()
    with styled():
        figure.savefig(out, format="svg", bbox_inches="tight", facecolor=facecolor, metadata=_NO_METADATA)
    return _compact(out.getvalue(), prefix)


_NO_METADATA: dict[str, Any] = dict.fromkeys(("Date", "Creator", "Format", "Type"))
_NUMBER = re.compile(r"-?\d+\.\d{2,}(?:e-?\d+)?")


def _compact(text: str, prefix: str) -> str:
    text = text[text.index("<svg") :]
    text = re.sub(r"<!--.*?-->\s*", "", text, flags=re.DOTALL)
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*">', "<g>", text)
    text = re.sub(r'( d| points)="([^"]*)"', _rounded_path, text)
    text = re.sub(r' (x|y|width|height|transform)="([^"]*)"', _rounded, text)
    text = re.sub(r"\n\s*", "\n", text)
    if prefix:
        text = re.sub(r'id="([^"]+)"', rf'id="{prefix}-\1"', text)
        text = re.sub(r'(href="|url\()#', rf"\1#{prefix}-", text)
    return text


def _rounded_path(match: re.Match[str]) -> str:
    return f'{match[1]}="{_shortened(match[2])}"'.replace("\n", "")


def _rounded(match: re.Match[str]) -> str:
    return f' {match[1]}="{_shortened(match[2])}"'


def _shortened(text: str) -> str:
    return _NUMBER.sub(lambda m: f"{round(float(m[0]), 1) + 0.0:g}", text)


# --- panels and titles ---------------------------------------------------------------------------------------------


def panels(
    ax: Axes | None, rows: int, columns: int, *, size: tuple[float, float], sharex: bool = False
) -> tuple[Figure, list[Axes]]:
    """A grid of axes, row by row: of a new figure, or inside axes that are given.

    Args:
        ax: where to draw; None makes a figure.
        rows, columns: of the grid.
        size: of a new figure, in inches.
        sharex: whether all panels have one x axis.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if ax is None:
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        grid = figure.subplots(rows, columns, squeeze=False, sharex=sharex)
        return figure, list(grid.flat)
    figure = ax.get_figure(root=True)  # type: ignore[assignment]
    if rows * columns == 1:
        return figure, [ax]
    ax.set_axis_off()
    found: list[Axes] = []
    for i in range(rows * columns):
        row, column = divmod(i, columns)
        width, height = 1 / columns, 1 / rows
        place = (column * width + 0.2 * width, 1 - (row + 1) * height + 0.2 * height, 0.75 * width, 0.65 * height)
        found.append(ax.inset_axes(place, sharex=found[0] if sharex and found else None))
    return figure, found


def titles(figure: Figure, axes: Sequence[Axes], title: str, subtitle: str) -> None:
    """Title and subtitle at the left above all panels, wrapped to the figure's width; the panels make room."""
    engine = figure.get_layout_engine()
    if engine is None or len(figure.axes) != len(axes):  # in a figure of somebody else's
        axes[0].set_title(title, loc="left", fontsize=10, wrap=True)
        return
    width = figure.get_figwidth() * 72 * 0.98
    lines = [(line, 11.0) for line in wrapped(figure, title, 11.0, width)]
    lines += [(line, SMALL) for line in wrapped(figure, subtitle, SMALL, width)]
    height, top = figure.get_figheight() * 72, 0.0
    for line, size in lines:
        top += 1.4 * size
        figure.text(0.01, 1 - (top - 0.3 * size) / height, line, fontsize=size, color=FOREGROUND)
    engine.set(rect=(0, 0, 1, 1 - (top + 5) / height))  # type: ignore[call-arg]


def wrapped(figure: Figure, text: str, size: float, width: float) -> list[str]:
    """The lines of a text that fit a width, both in points; long words are cut, U+00A0 holds two together."""
    lines: list[str] = []
    for word in (shorten(word, 70) for word in text.split(" ")):
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and extent(figure, longer, size)[0] <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def extent(figure: Figure, text: str, size: float) -> tuple[float, float]:
    """Width and height of a line of text, in points."""
    from matplotlib.font_manager import FontProperties

    canvas: Any = figure.canvas
    font = FontProperties(family=["DejaVu Sans"], size=size)
    width, height, _ = canvas.get_renderer().get_text_width_height_descent(text, font, ismath=False)
    return width * 72 / figure.dpi, height * 72 / figure.dpi


def shorten(name: str, most: int = 28) -> str:
    """A name cut in its middle; `bundled:` and the owner of a long hub id go first."""
    name = name.removeprefix("bundled:")
    if len(name) > most:
        name = name.rsplit("/", 1)[-1] or name
    if len(name) <= most:
        return name
    head = (most - 1) // 2
    return f"{name[:head]}…{name[-(most - 1 - head) :]}"


def distinct(names: Sequence[str], most: int = 28) -> dict[str, str]:
    """Short names that are still different from each other: of those that would be alike, the part that differs."""
    short = {name: shorten(name, most) for name in names}
    alike: dict[str, list[str]] = {}
    for name, text in short.items():
        alike.setdefault(text, []).append(name)
    for group in alike.values():
        if len(group) > 1:
            short.update(_differing(group, most))
    return short


def _differing(names: Sequence[str], most: int) -> dict[str, str]:
    """Names without most of what they have in common; numbered in their order where that is not enough."""
    names = sorted(names)
    begins = _common(names)
    ends = _common([name[begins:][::-1] for name in names])
    context = max(0, most - 2 - max(len(name) - begins - ends for name in names)) // 2
    found = {}
    for name in names:
        start, stop = max(0, begins - context), len(name) - max(0, ends - context)
        found[name] = f"{'…' * (start > 0)}{name[start:stop]}{'…' * (stop < len(name))}"
    if max(map(len, found.values())) > most or len(set(found.values())) < len(names):
        return {name: f"{shorten(name, most - 5)} ({i})" for i, name in enumerate(names, 1)}
    return found


def _common(names: Sequence[str]) -> int:
    """With how many characters all of the names begin."""
    return sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, zip(*names, strict=False)))


def colours(names: Sequence[str], references: Sequence[str]) -> dict[str, str]:
    """A colour for each name: the references' is the foreground, the others go round the palette."""
    others = [name for name in names if name not in references]
    found = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(others)}
    return {name: found.get(name, REFERENCE_COLOUR) for name in names}
