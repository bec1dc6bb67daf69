"""Training curves on a terminal while they grow: what the figures will show, beside the bar with the time left.

Everything goes to stderr. Runs that went before stay beside the one that goes on; runs of other processes are read
from their logs.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.text import Text

    from headscale.records import StepRecord

Point = Mapping[str, float | None]

QUANTITIES = {"loss_over_ln_n": "loss [ln N]", "active_dims_document": "active d [dims]", "score_sd": "score sd"}
"""What is drawn, by its name in the step records, all on a logarithmic axis."""
LABEL, LEAST, MOST, HEIGHT = 18, 24, 60, 2  # columns and lines of a terminal
_DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))  # of a braille character, by column, from the top
_COLOURS = ("default", "cyan", "magenta")
_LOOK = 1.0  # seconds between two looks at logs of other processes


def point_of(record: StepRecord) -> dict[str, float]:
    """What is drawn of one step."""
    return {name: getattr(record, name) for name in QUANTITIES}


@dataclass
class Curve:
    """One run so far.

    Args:
        name: what it is called.
        total: its steps.
        values: of every quantity, a number a step; NaN where there is none.
        word: its verdict so far, or "".
    """

    name: str
    total: int = 1
    values: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in QUANTITIES})
    word: str = ""

    def add(self, point: Point) -> None:
        """Append a step."""
        for name, values in self.values.items():
            value = point.get(name)
            values.append(math.nan if value is None else float(value))

    @property
    def steps(self) -> int:
        """How many there are."""
        return len(self.values["loss_over_ln_n"])


def braille(
    values: Sequence[float], total: int, *, width: int, height: int, low: float, high: float
) -> tuple[str, ...]:
    """A curve in braille characters, two columns and four rows of dots each, on a logarithmic axis.

    Args:
        values: a number a step; those that are not positive and finite are left out.
        total: steps that the width stands for.
        width, height: in characters.
        low, high: of the axis, positive.

    Returns:
        `height` lines of `width` characters, the first one on top.
    """
    bottom, span = math.log(low), max(math.log(high) - math.log(low), 1e-9)
    columns: dict[int, list[float]] = {}
    for step, value in enumerate(values[:total]):
        if math.isfinite(value) and value > 0:
            columns.setdefault(step * 2 * width // max(1, total), []).append(math.log(value))
    cells = [[0] * width for _ in range(height)]
    before: int | None = None
    for x, logs in sorted(columns.items()):
        share = (sum(logs) / len(logs) - bottom) / span
        y = min(4 * height - 1, max(0, round((1 - share) * (4 * height - 1))))
        reached = (
            range(min(y, before + (before < y)), max(y, before - (before > y)) + 1) if before is not None else (y,)
        )
        for row in reached:
            cells[row // 4][x // 2] |= _DOTS[x % 2][row % 4]
        before = y
    return tuple("".join(chr(0x2800 + bits) for bits in line) for line in cells)


def panel(curves: Sequence[Curve], width: int) -> RenderableType:
    """The curves side by side, a line of graphs for each quantity, all of a line on one axis.

    Args:
        curves: the last ones are shown, as many as have room.
        width: of the terminal.
    """
    from rich.table import Table
    from rich.text import Text

    from headscale.render import short

    shown = list(curves)[-max(1, (width - LABEL) // (LEAST + 2)) :]
    own = min(MOST, (width - LABEL) // len(shown) - 2)
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(width=LABEL)
    for _ in shown:
        grid.add_column(width=own)
    styles = [_COLOURS[i % len(_COLOURS)] for i in range(len(shown))]
    grid.add_row("", *(_line(c.name, f"bold {style}") for c, style in zip(shown, styles, strict=True)))
    for name, title in QUANTITIES.items():
        known = [v for c in shown for v in c.values[name] if math.isfinite(v) and v > 0]
        if known:
            axis = (min(known), max(known))
            graphs = [_graph(c.values[name], c.total, own, axis, s) for c, s in zip(shown, styles, strict=True)]
            grid.add_row(Text(f"{title}\n{short(axis[0])} to {short(axis[1])}"), *graphs)
    grid.add_row("", *(_line(f"{c.steps:,} of {c.total:,} steps{c.word and ', '}{c.word}", "dim") for c in shown))
    return grid


def _line(text: str, style: str) -> Text:
    from rich.text import Text

    return Text(text, style=style, overflow="ellipsis", no_wrap=True)


def _graph(values: Sequence[float], total: int, width: int, axis: tuple[float, float], style: str) -> Text:
    """A curve with its last value at its right."""
    from rich.text import Text

    from headscale.render import short

    last = f" {short(values[-1])}" if values else ""
    lines = braille(values, total, width=max(4, width - 9), height=HEIGHT, low=axis[0], high=axis[1])
    return Text("\n".join([*lines[:-1], f"{lines[-1]}{last}"]), style=style, no_wrap=True)


class Logs:
    """Runs of other processes, read from the logs they write.

    Args:
        runs: (name, folder, steps) of each that may begin.
    """

    def __init__(self, runs: Sequence[tuple[str, Path, int]]) -> None:
        self.runs = list(runs)
        self.looked = -math.inf
        self._curves: dict[Path, Curve] = {}
        self._places: dict[Path, int] = {}

    def curves(self) -> list[Curve]:
        """Those that go on, with what was added since the last look."""
        if time.monotonic() - self.looked >= _LOOK:
            self.looked = time.monotonic()
            for name, folder, total in self.runs:
                self._read(name, folder, total)
        return list(self._curves.values())

    def share(self) -> float:
        """How many runs' worth of steps those that go on have done."""
        return sum(min(1.0, curve.steps / max(1, curve.total)) for curve in self._curves.values())

    def _read(self, name: str, folder: Path, total: int) -> None:
        from headscale.cells import CELL, STEPS

        log = folder / STEPS
        if (folder / CELL).is_file() or not log.is_file():
            self._curves.pop(folder, None)
            self._places.pop(folder, None)
            return
        place = self._places.get(folder, 0)
        if log.stat().st_size < place:  # begun anew
            place = 0
            self._curves.pop(folder, None)
        curve = self._curves.setdefault(folder, Curve(name, total))
        with log.open("rb") as file:
            file.seek(place)
            added = file.read()
        whole = added[: added.rfind(b"\n") + 1]
        self._places[folder] = place + len(whole)
        for line in whole.splitlines():
            try:
                curve.add(json.loads(line))
            except (ValueError, AttributeError, TypeError):
                continue


@contextmanager
def watched(
    title: str, past: list[Curve], follow: Logs | None = None, console: Console | None = None
) -> Iterator[Callable[..., None]]:
    """A bar with the time left, and below it the curves of what trains; yields a `Progress` that also takes points.

    Args:
        title: of what is done.
        past: curves of what went before; that of this one is added to them.
        follow: logs of runs that go on elsewhere.
        console: by default one on stderr.
    """
    from rich.console import Console, Group
    from rich.live import Live
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    console = console or Console(stderr=True)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=console, speed_estimate_period=600)  # a step or a cell may take minutes
    task = bar.add_task(title, total=None)
    curve = Curve(title)
    drawable = console.encoding.startswith("utf")

    def screen() -> RenderableType:
        going = follow.curves() if follow else []
        if follow:
            bar.update(task, completed=progress["done"] + follow.share())
        curves = going or [*past, curve] if (going or curve.steps) else []
        if not curves or not drawable:
            return bar.get_renderable()
        return Group(bar.get_renderable(), panel(curves, console.width))

    progress: dict[str, Any] = {"done": 0}

    def step(done: int, total: int, text: str = "", point: Point | None = None) -> None:
        progress["done"] = done
        if point is not None:
            curve.total, curve.word = total, text.rpartition(", ")[2]
            curve.add(point)
        described = title if point is not None and drawable else f"{title} {text}".rstrip()
        bar.update(task, completed=done, total=total, description=described)

    # Left alone, Rich sends stdout to stderr as well while something is live.
    with Live(get_renderable=screen, console=console, redirect_stdout=False, transient=True, refresh_per_second=4):
        yield step
    if curve.steps:
        past.append(curve)
