"""The command that shows saved results: `report`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from headscale.errors import UsageError
from headscale.options import RUN_FOLDER, Debug, Json, Quiet
from headscale.render import Voice
from headscale.shell import app, begin

if TYPE_CHECKING:
    from headscale.page.files import WrittenFile
    from headscale.results import Results

PAGE = "report.html"


@app.command()
def report(
    results: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[RESULT...]", help="Run folders, cells or JSON documents; by default ./headscale-runs."
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help=f"The page, .html or .md; by default {PAGE} among them."),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="Figures alone: .svg, .png or .pdf.")
    ] = None,
    figure: Annotated[
        list[str] | None, typer.Option("--figure", metavar="N", help="Which: numbers, names or patterns; all unasked.")
    ] = None,
    effectiveness: Annotated[
        Path | None,
        typer.Option("--effectiveness", metavar="CSV", help="Published figures: backbone, metric, value."),
    ] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Redraw the page as cells finish, until interrupted.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Draw figures and one page.

    From saved results, as one self-contained HTML file or as Markdown; nothing is computed anew.
    """
    paths = list(results or [RUN_FOLDER])
    page = output if output is not None or plot is not None else _among(paths[0])
    voice = begin(f"a report on {', '.join(map(str, paths))}", quiet, debug, page or plot)
    if not results:
        voice.note(f"no result given: those in `{RUN_FOLDER}`")
    from headscale.page.files import check_page, chosen_keys, keep_redrawing

    if watch and as_json:
        raise UsageError("`--watch` and `--json` exclude each other", hint="leave one of them out")
    if page is not None:
        check_page(page)
    if plot is not None:
        _check_plot(plot)
    keys = chosen_keys(figure or [])
    job = _Job(paths, page, plot, keys, effectiveness, voice)
    if watch:
        voice.note("redrawing as cells begin and end; interrupt to stop")
        keep_redrawing(paths, job.redraw)
    written = job.draw()
    if as_json:
        from headscale.render import write_document

        write_document("report", written, voice.errors or [])
    else:
        for file in written:
            print(file.path)
    raise typer.Exit(3 if voice.errors else 0)


class _Job:
    """What is drawn, once or again and again."""

    def __init__(
        self, paths: list[Path], page: Path | None, plot: Path | None, keys: tuple[str, ...], csv: Path | None,
        voice: Voice,
    ) -> None:  # fmt: skip
        self.paths, self.page, self.plot, self.keys, self.csv, self.voice = paths, page, plot, keys, csv, voice

    def redraw(self, again: bool) -> None:
        """Draw while cells come in; `again`: not for the last time."""
        if any(not path.exists() for path in self.paths):
            self.voice.note(f"waiting for `{'`, `'.join(str(p) for p in self.paths if not p.exists())}`")
            return
        from headscale.results import load

        results = load(self.paths, allow_empty=True)
        self.write(results, watched=again, silent=True)
        done = sum(one.status == "done" for one in results.trainings)
        trainings = f"{done} of {len(results.trainings)} trainings finished"
        self.voice.note(f"redrawn `{self.page or self.plot}`: {trainings}")

    def draw(self) -> list[WrittenFile]:
        """Draw once."""
        from headscale.errors import UnreadableError
        from headscale.results import load

        results = load(self.paths)
        for path, reason in results.unreadable:
            self.voice.error(UnreadableError(reason), path)
        return self.write(results, watched=False, silent=False)

    def write(self, results: Results, *, watched: bool, silent: bool) -> list[WrittenFile]:
        """Write page and figures."""
        from headscale.page.files import write_figures, write_page
        from headscale.page.plates import plates
        from headscale.tables import read_published

        published = None if self.csv is None else read_published(self.csv)
        voice = Voice(quiet=True) if silent else self.voice
        drawn = []
        with voice.progress("figures") as bar:
            for plate in plates(results, self.keys, published=published):
                drawn.append(plate)
                bar(len(drawn), len(self.keys))
        for plate in drawn:
            if plate.absent:
                voice.note(f"figure {plate.number} ({plate.key}) is not drawn: {plate.absent}")
        written: list[WrittenFile] = []
        if self.page is not None:
            csv = None if self.csv is None else str(self.csv)
            written += write_page(results, self.page, drawn, effectiveness=csv, watched=watched)
        if self.plot is not None and not (silent and all(plate.absent for plate in drawn)):
            written += write_figures(drawn, self.plot)
        return written


def _among(path: Path) -> Path:
    """Where the page goes unasked: into the run folder."""
    return (path.parent if path.is_file() else path) / PAGE


def _check_plot(path: Path) -> None:
    from headscale.figures.style import SUFFIXES

    if path.suffix not in SUFFIXES:
        raise UsageError(f"`{path}` ends in none of {', '.join(SUFFIXES)}", hint=f"use `{path.with_suffix('.svg')}`")
