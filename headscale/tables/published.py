"""Effectiveness figures of anyone, from a CSV."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headscale.errors import NotFoundError, UnreadableError
from headscale.results import Results
from headscale.tables.trained import RESCALED, SEED_INTERVAL, UNTOUCHED, reference_names, t_interval

if TYPE_CHECKING:
    from pandas import DataFrame

_PUBLISHED = ("backbone", "metric", "value")


def read_published(path: str | Path) -> DataFrame:
    """Anyone's effectiveness figures: a CSV with the columns `backbone`, `metric`, `value`, and `scale` if need be.

    Several rows of one backbone and metric are seeds. `scale` is the constant that the head was multiplied by, 1
    without it.

    Raises:
        NotFoundError: no such file.
        UnreadableError: no CSV, columns that are missing, or bad rows; all of them with their numbers.
    """
    import csv

    import pandas as pd

    file = Path(path)
    if not file.is_file():
        raise NotFoundError(f"no file `{file}`", hint="give a CSV with the columns backbone, metric, value")
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            reader = csv.DictReader(lines)
            missing = [name for name in _PUBLISHED if name not in (reader.fieldnames or ())]
            rows = [] if missing else list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise UnreadableError(f"`{file}` is no CSV: {error}", hint="save it as UTF-8, comma separated") from error
    if missing:
        raise UnreadableError(
            f"`{file}` lacks the columns `{'`, `'.join(missing)}`", hint="its first line is `backbone,metric,value`"
        )
    wrong = [text for number, row in enumerate(rows, start=2) if (text := _wrong(number, row))]
    if wrong or not rows:
        said = "; ".join(wrong) if wrong else "it has no row"
        raise UnreadableError(f"`{file}` cannot be used: {said}", hint="every row is a name, a metric and a number")
    columns = {name: [row[name].strip() for row in rows] for name in ("backbone", "metric")}
    numbers = {"value": [float(r["value"]) for r in rows], "scale": [float(r.get("scale") or 1) for r in rows]}
    return pd.DataFrame({**columns, **numbers})


def _wrong(number: int, row: dict[str, Any]) -> str:
    """What is wrong with a row, or ""."""
    empty = [name for name in ("backbone", "metric") if not (row.get(name) or "").strip()]
    if empty:
        return f"row {number} has no {' and no '.join(empty)}"
    for name, text in (("value", row.get("value")), ("scale", row.get("scale") or "1")):
        try:
            good = math.isfinite(float(text or "")) and (name == "value" or float(text or "") > 0)
        except (TypeError, ValueError):
            good = False
        if not good:
            return f"row {number}: {name} `{text or ''}` is not a number{' above zero' * (name == 'scale')}"
    return ""


def published_rows(published: DataFrame | None, results: Results) -> list[dict[str, Any]]:
    """Rows of published figures under the names that the inspections have."""
    if published is None:
        return []
    names = {i.name: i.name for i in results.inspections}
    tails: dict[str, list[str]] = {}
    for name in names:
        tails.setdefault(name.rsplit("/", 1)[-1].lower(), []).append(name)
    references = reference_names(results)
    rows = []
    frame = published if "scale" in published else published.assign(scale=1.0)
    keys: Any
    for keys, group in frame.groupby(["backbone", "metric", "scale"], sort=False):
        given, metric, scale = str(keys[0]), str(keys[1]), float(keys[2])
        alike = tails.get(given.rsplit("/", 1)[-1].lower(), [])
        backbone = names.get(given) or (alike[0] if len(alike) == 1 else given)
        value, low, high, seeds = _free_interval(group["value"].tolist())
        rows.append({
            "source": "published", "recipe": "", "setting": "published figures", "backbone": backbone,
            "reference": backbone in references, "arm": UNTOUCHED if scale == 1 else RESCALED,
            "scale": float(scale), "shift": 0.0,
            "metric": metric, "value": value, "low": low, "high": high, "seeds": seeds, "trainings": seeds,
            "interval": SEED_INTERVAL if seeds > 1 else "", "verdict": "",
        })  # fmt: skip
    return rows


def _free_interval(values: Sequence[float]) -> tuple[float, float, float, int]:
    """`t_interval` of figures in any unit: papers write 45.2 for .452."""
    largest = max(1.0, *(abs(v) for v in values))
    mean, low, high, count = t_interval([v / largest for v in values])
    return mean * largest, low * largest, high * largest, count
