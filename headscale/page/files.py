"""A report on disk: the page, Markdown with figures beside it, or figures alone; and a page that is kept up to date."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from headscale.cells import CELL, STEPS, write_text
from headscale.errors import HeadscaleError, UsageError
from headscale.records import Record

if TYPE_CHECKING:
    from headscale.page.plates import Plate
    from headscale.results import Results

PAGES = (".html", ".htm", ".md")
REFRESH = 5  # seconds between two looks of a browser at a page that is being redrawn
PAUSE = 2.0  # seconds between two looks at the run folder


@dataclass(frozen=True)
class WrittenFile(Record):
    """A file that a report wrote."""

    path: str
    kind: str  # page or figure
    bytes: int
    figures: tuple[str, ...]  # keys of the figures in it
    absent: dict[str, str]  # figures that could not be drawn, with the reason


def write_page(
    results: Results, path: Path, drawn: Sequence[Plate], *, effectiveness: str | None = None, watched: bool = False
) -> list[WrittenFile]:
    """Write the page, as HTML or Markdown by suffix; the figures of Markdown go beside it as SVG.

    Args:
        results: what was read.
        path: of the page.
        drawn: its figures.
        effectiveness: the file with published figures that they were drawn with.
        watched: whether the page will be redrawn, so that a browser should look again.

    Raises:
        UsageError: another suffix.
    """
    from headscale.page.content import report_of
    from headscale.page.documents import as_html, as_markdown

    check_page(path)
    report = report_of(results, drawn, output=str(path), effectiveness=effectiveness)
    if path.suffix != ".md":
        write_text(path, as_html(report, refresh=REFRESH if watched else None))
        return [_written(path, "page", drawn)]
    beside = {plate.key: path.with_name(f"{path.stem}-{plate.key}.svg") for plate in drawn if plate.figure}
    figures = [_save(plate, beside[plate.key]) for plate in drawn if plate.figure]
    write_text(path, as_markdown(report, {key: quote(file.name) for key, file in beside.items()}))
    return [_written(path, "page", drawn), *figures]


def write_figures(drawn: Sequence[Plate], path: Path) -> list[WrittenFile]:
    """Write figures by suffix: one exactly there, several with their keys in the names.

    Raises:
        UsageError: another suffix.
        HeadscaleError: none of them could be drawn.
    """
    there = [plate for plate in drawn if plate.figure]
    if not there:
        raise HeadscaleError(
            "; ".join(f"figure {plate.number} cannot be drawn: {plate.absent}" for plate in drawn),
            "give results that hold its data",
        )
    several = len(drawn) > 1
    return [_save(p, path.with_name(f"{path.stem}-{p.key}{path.suffix}") if several else path) for p in there]


def check_page(path: Path) -> None:
    """Refuse a page of another suffix."""
    if path.suffix not in PAGES:
        raise UsageError(
            f"`{path}` ends in none of {', '.join(PAGES)}", hint=f"use `-o {path.with_suffix('.html')}`, or `--plot`"
        )


def _save(plate: Plate, file: Path) -> WrittenFile:
    from headscale.figures import save

    assert plate.figure is not None
    save(plate.figure, file)
    return _written(file, "figure", [plate])


def _written(file: Path, kind: str, plates: Sequence[Plate]) -> WrittenFile:
    there = tuple(plate.key for plate in plates if plate.figure)
    absent = {plate.key: plate.absent for plate in plates if not plate.figure}
    return WrittenFile(str(file), kind, file.stat().st_size, there, absent)


def chosen_keys(wanted: Sequence[str]) -> tuple[str, ...]:
    """Keys of the figures that numbers, keys or patterns ask for, in the order of the page; all without any.

    Raises:
        UsageError: something asked for is no figure; all such together.
    """
    from headscale.figures import FIGURES

    keys = {str(number): kind.key for number, kind in enumerate(FIGURES, start=1)}
    matched = {one: {key for n, key in keys.items() if one == n or fnmatchcase(key, one)} for one in wanted}
    unknown = [one for one, found in matched.items() if not found]
    if unknown:
        known = ", ".join(f"{number} ({key})" for number, key in keys.items())
        raise UsageError(f"no figure is called `{'`, `'.join(unknown)}`", f"one of {known}, or a pattern such as `c*`")
    every = set.union(*matched.values()) if matched else set(keys.values())
    return tuple(key for key in keys.values() if key in every)


# --- watching ------------------------------------------------------------------------------------------------------


def signature(paths: Sequence[Path]) -> tuple[Any, ...]:
    """What changes when a cell begins or ends below the paths; steps of a training that goes on do not count."""
    found: list[Any] = []
    for path in paths:
        files = [path] if path.is_file() else sorted(path.rglob(CELL))
        for file in files:
            try:
                stat = file.stat()
            except FileNotFoundError:  # replaced while we look
                continue
            found.append((str(file), stat.st_size, stat.st_mtime_ns))
        found.append(len(list(path.rglob(STEPS))) if path.is_dir() else 0)
    return tuple(found)


def keep_redrawing(
    paths: Sequence[Path], redraw: Callable[[bool], object], *, sleep: Callable[[float], object] = time.sleep
) -> None:
    """Redraw whenever a cell has begun or ended, until interrupted; then once more, as a page that stays.

    Args:
        paths: of the results.
        redraw: called with whether the page will be redrawn again.
        sleep: waits so many seconds.

    Raises:
        KeyboardInterrupt: the only way out.
    """
    seen = None
    try:
        while True:
            state = signature(paths)
            if state != seen:
                redraw(True)
                seen = state
            sleep(PAUSE)
    except KeyboardInterrupt:
        if seen is not None:
            redraw(False)
        raise
