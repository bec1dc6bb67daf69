"""The page's tables: the columns of the program's own tables, with a row for every saved result."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from headscale.constants import ratio_text
from headscale.records import SweepRow
from headscale.render import (
    CALIBRATE_COLUMNS,
    EVALUATE_COLUMNS,
    INSPECT_COLUMNS,
    SWEEP_COLUMNS,
    Cell,
    Column,
    InspectRow,
    short,
    system_rows,
    target_rows,
)

if TYPE_CHECKING:
    from headscale.results import Results, Training

GOOD = frozenset({"ok", "reference", "matched", "stable"})
BAD = frozenset({"too high", "too low", "degenerate", "diverged", "collapsed", "failed"})
_INPUTS = frozenset({"temperature", "lambda_query", "lambda_document", "warmup [share]", "shift"})
_NAMES = frozenset({"collection", "note"})


@dataclass(frozen=True)
class Entry:
    """One cell of a table: what is read, what is sorted by (None: nothing, always last), and how a verdict sounds."""

    text: str
    value: float | str | None
    tone: str = ""  # "good", "bad" or "open", of a verdict


@dataclass(frozen=True)
class Heading:
    """A column: its name, its unit or "", and whether it holds numbers."""

    name: str
    unit: str
    numeric: bool


@dataclass(frozen=True)
class Table:
    """A table of the page."""

    key: str
    caption: str
    headings: tuple[Heading, ...]
    rows: tuple[tuple[Entry, ...], ...]


def tables(results: Results) -> tuple[Table, ...]:
    """A table for every kind of result there is, the most telling first."""
    trainings = [training_row(one) for one in results.trainings]
    inspections = _inspect_rows(results)
    found = [
        _table("trainings", "Trainings, one row each", trainings, SWEEP_COLUMNS),
        _table("evaluations", "Retrieval on a collection", system_rows(results.evaluations), EVALUATE_COLUMNS),
        _table("calibrations", "Constants by target", target_rows(results.calibrations), CALIBRATE_COLUMNS),
        _table("inspections", "Backbones before training", inspections, INSPECT_COLUMNS),
    ]
    return tuple(table for table in found if table.rows)


def _inspect_rows(results: Results) -> list[InspectRow]:
    """The references first; ratios are to the first of them."""
    ordered = sorted(results.inspections, key=lambda one: one.name not in results.references)
    first = next((one for one in ordered if one.name in results.references), None)
    rows = [InspectRow.of_inspection(one, None) for one in ordered]
    return rows if first is None else [replace(row, reference=first.weights) for row in rows]


def training_row(one: Training) -> SweepRow:
    """A training as the row that `sweep` prints."""
    if one.row is not None:
        return one.row
    training = one.training
    names = ("scale", "mode", "head_lr_multiplier", "lr", "temperature", "lambda_query", "lambda_document",
             "warmup_ratio", "seed")  # fmt: skip
    row: dict[str, Any] = {name: training.get(name) for name in names} | {"shift": training.get("shift", 0.0)}
    return SweepRow(
        backbone=one.backbone,
        revision=one.configuration.get("revision"),
        **row,
        status=one.status,
        key=one.key,
        message=one.message,
        **_measured(one),
    )


def _measured(one: Training) -> dict[str, Any]:
    """The results of a finished training; of its log the first and the last line alone are read."""
    from headscale.grid import measured

    if one.cell is None:
        return {}
    ends = one.steps(("loss_over_ln_n", "head_norm"), every=1 << 30)
    return measured(one.cell, loss_start=_at(ends["loss_over_ln_n"], 0), head_norm_end=_at(ends["head_norm"], -1))


def _at(values: Any, place: int) -> float:
    return float(values[place]) if len(values) else math.nan


def _table(key: str, caption: str, rows: Sequence[Any], columns: Sequence[Column]) -> Table:
    kept = [column for column in columns if _worth(column, rows)]
    kept.sort(key=_place)
    headings = []
    for column in kept:
        name, _, unit = column.title.partition(" [")
        headings.append(Heading(name, unit.removesuffix("]"), _numeric(column.value, rows)))
    body = tuple(tuple(_entry(column, row) for column in kept) for row in rows)
    return Table(key, caption, tuple(headings), body)


def _worth(column: Column, rows: Sequence[Any]) -> bool:
    """Whether a column says something: what a terminal shows, and inputs in which rows differ."""
    values = {column.value(row) for row in rows}
    if values <= {None, ""} or (column.title == "status" and values == {"done"}):
        return False
    varying = column.title in (*_INPUTS, *_NAMES) and len(values) > 1
    return column.title == "backbone" or (varying if column.title in _INPUTS else column.on_terminal or varying)


def _place(column: Column) -> int:
    """Rarely varied inputs go behind the results, and words behind those."""
    return 2 if column.title in ("note", "status", "verdict") else int(column.title in _INPUTS)


def _numeric(value: Callable[[Any], Cell], rows: Sequence[Any]) -> bool:
    found = [value(row) for row in rows]
    return all(v is None or (isinstance(v, int | float) and not isinstance(v, bool)) or _ratio(v) for v in found)


def _ratio(value: Cell) -> bool:
    return isinstance(value, str) and value.endswith("x") and value[:-1].replace(".", "", 1).isdigit()


def _entry(column: Column, row: Any) -> Entry:
    value = column.value(row)
    text = ratio_text(value) if column.title == "scale [x]" and isinstance(value, float) else column.shown(row)
    if isinstance(value, str) and _ratio(value):
        return Entry(text, float(value[:-1]))
    if isinstance(value, float) and not math.isfinite(value):
        return Entry(text, None)
    if isinstance(value, bool):
        return Entry("yes" if value else "no", "yes" if value else "no")
    if column.title in ("verdict", "status") and isinstance(value, str):
        tone = "good" if value in GOOD else "bad" if value in BAD else "open"
        return Entry(value, value, tone if column.title == "verdict" or value == "failed" else "")
    return Entry(short(None) if value in (None, "") else text, None if value in (None, "") else value)
