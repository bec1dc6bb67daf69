"""Where labels go so that none covers another, a point or an edge; in pixels, after the layout is settled."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from headscale.figures.style import MUTED, SMALL, extent

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_GAP = 2.0  # pixels between a label and anything else
# Directions in the order of preference, as (horizontal, vertical) with 0 in the middle, and how far away.
_SIDES = ((1, 1), (1, -1), (-1, 1), (-1, -1), (1, 0), (-1, 0), (0, 1), (0, -1))
_DISTANCES = (8.0, 15.0, 24.0, 36.0)  # points; from the second on a line leads to the point


@dataclass(frozen=True)
class Label:
    """A text for a point in data coordinates."""

    x: float
    y: float
    text: str
    colour: str


def settle(figure: Figure) -> None:
    """Run the layout once and keep what it found, so that pixels can be counted."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")


def place(ax: Axes, labels: Sequence[Label], *, avoid: Sequence[np.ndarray] = (), size: float = SMALL) -> int:
    """Put labels beside their points, the first ones first; returns how many found no room and were left out.

    Args:
        ax: of a settled figure.
        labels: with finite coordinates.
        avoid: (points, 2) lines in data coordinates that no label may cover.
        size: of the text, in points.
    """
    import numpy as np

    figure: Figure = ax.get_figure(root=True)  # type: ignore[assignment]
    scale = figure.dpi / 72.0
    points = ax.transData.transform(np.array([(label.x, label.y) for label in labels], dtype=float).reshape(-1, 2))
    along = np.concatenate([np.empty((0, 2)), *(_sampled(ax.transData.transform(line), 6.0 * scale) for line in avoid)])
    half, thin = 4.0 * scale, 1.0 * scale  # a marker, a line
    taken = np.column_stack([points - half, points + half])  # (boxes, 4): left, bottom, right, top
    lines = np.column_stack([along - thin, along + thin])
    frame = ax.get_window_extent()
    inside = np.array([frame.x0, frame.y0, frame.x1 + 40 * scale, frame.y1])
    left_out = 0
    for label, point in zip(labels, points, strict=False):
        width, height = extent(figure, label.text, size)
        size_of = (width * scale, height * scale)
        found = _room(point, size_of, np.vstack([taken, lines]), inside, scale)
        found = found or _room(point, size_of, taken, inside, scale)  # better on a line than not there
        if found is None:
            left_out += 1
            continue
        box, far = found
        taken = np.vstack([taken, box])
        middle = ((box[0] + box[2]) / 2 - point[0], (box[1] + box[3]) / 2 - point[1])
        ax.annotate(
            label.text, (label.x, label.y), (middle[0] / scale, middle[1] / scale), textcoords="offset points",
            color=label.colour, fontsize=size, ha="center", va="center", annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": MUTED, "lw": 0.5, "shrinkA": 0, "shrinkB": 3} if far else None,
        )  # fmt: skip
    return left_out


def _sampled(line: np.ndarray, apart: float) -> np.ndarray:
    """Points along a line, at most so far apart."""
    import numpy as np

    parts = [line[:1]]
    for start, end in itertools.pairwise(line):
        count = max(1, int(np.ceil(np.hypot(*(end - start)) / apart))) if np.isfinite([start, end]).all() else 1
        parts.append(start + (end - start) * np.linspace(0, 1, count + 1)[1:, None])
    return np.concatenate(parts)


def _room(
    point: np.ndarray, extent: tuple[float, float], taken: np.ndarray, inside: np.ndarray, scale: float
) -> tuple[np.ndarray, bool] | None:
    """The first box beside a point that is free, and whether it is far from it."""
    import numpy as np

    width, height = extent
    for distance in _DISTANCES:
        for across, up in _SIDES:
            away = distance * scale
            x = point[0] + across * (away + width / 2)
            y = point[1] + up * ((away if not across else away * 0.6) + height / 2)
            box = np.array([x - width / 2 - _GAP, y - height / 2 - _GAP, x + width / 2 + _GAP, y + height / 2 + _GAP])
            if (box[:2] < inside[:2]).any() or (box[2:] > inside[2:]).any():
                continue
            over = (taken[:, 0] < box[2]) & (taken[:, 2] > box[0]) & (taken[:, 1] < box[3]) & (taken[:, 3] > box[1])
            if not over.any():
                return box, distance > _DISTANCES[0]
    return None


def label_ends(ax: Axes, ends: Sequence[Label], *, size: float = SMALL) -> None:
    """Names at the right of their lines, pushed apart where lines end close together.

    Args:
        ax: of a settled figure.
        ends: the last point of each line.
        size: of the text, in points.
    """
    import numpy as np

    if not ends:
        return
    pixels = ax.transData.transform(np.array([(e.x, e.y) for e in ends], dtype=float))
    scale = ax.figure.dpi / 72.0
    places = spread(list(pixels[:, 1]), size * 1.35 * scale)
    for end, (_, y), place_at in zip(ends, pixels, places, strict=True):
        ax.annotate(
            end.text, (end.x, end.y), (4, (place_at - y) / scale),
            textcoords="offset points", color=end.colour, fontsize=size, va="center", annotation_clip=False,
        )  # fmt: skip


def spread(places: Sequence[float], apart: float) -> list[float]:
    """The nearest places, in the least squares, that keep the order and are so far apart."""
    order = sorted(range(len(places)), key=lambda i: places[i])
    blocks: list[list[float]] = []  # [sum of wanted starts, count]: pool adjacent violators
    for rank, i in enumerate(order):
        blocks.append([places[i] - rank * apart, 1.0])
        while len(blocks) > 1 and blocks[-2][0] / blocks[-2][1] > blocks[-1][0] / blocks[-1][1]:
            total, count = blocks.pop()
            blocks[-1][0] += total
            blocks[-1][1] += count
    starts = [total / count for total, count in blocks for _ in range(int(count))]
    found = [0.0] * len(places)
    for rank, i in enumerate(order):
        found[i] = starts[rank] + rank * apart
    return found
