"""The figures of a report: drawn where the results hold their data, else with the sentence that says what is amiss."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from headscale.errors import HeadscaleError

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

    from headscale.results import Results


@dataclass(frozen=True)
class Plate:
    """One figure.

    Args:
        number: from 1.
        key: its short name, also of its files.
        title: its name.
        figure: as drawn; None where data are missing.
        absent: why, in a sentence; "" where it is drawn.
    """

    number: int
    key: str
    title: str
    figure: Figure | None
    absent: str = ""

    @property
    def reason(self) -> str:
        """Why it is not drawn, without the figure's name that errors begin with."""
        return self.absent.partition(": ")[2] or self.absent


def plates(results: Results, keys: Sequence[str], *, published: DataFrame | None = None) -> Iterator[Plate]:
    """Figures in their order, each drawn when it is asked for.

    Args:
        results: what was read.
        keys: of the figures wanted.
        published: effectiveness figures of others (`headscale.tables.read_published`).
    """
    from headscale.figures import FIGURES

    for number, (key, title, table, draw) in enumerate(FIGURES, start=1):
        if key not in keys:
            continue
        try:
            yield Plate(number, key, title, _drawn(table, draw, results, published))
        except HeadscaleError as error:
            yield Plate(number, key, title, None, error.message)


def _drawn(table: Any, draw: Any, results: Results, published: DataFrame | None) -> Figure:
    import inspect

    more = {"published": published} if "published" in inspect.signature(table).parameters else {}
    figure: Figure = draw(table(results, **more))
    return figure
