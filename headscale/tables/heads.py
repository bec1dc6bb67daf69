"""What heads are made of and put out: figure 5."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from headscale.records import ROW_NORM_QUANTILES, Inspection, SideStatistics
from headscale.results import Results
from headscale.tables.trained import reference_names

if TYPE_CHECKING:
    from pandas import DataFrame

_ANATOMY = ("part", "backbone", "reference", "scale", "place", "value")


def anatomy(results: Results) -> DataFrame:
    """Figure 5: what the heads are made of, and what the constant does to what they put out.

    Returns:
        Rows of four parts: `row_norm` (place: percent of the rows), `logit` (percent of single logits), `weight`
        (percent of the documents' pooled weights above zero), `singular_value` (place: its rank, from 1). `scale` is 1
        before the constant and the constant after it; row norms and singular values are those before.
    """
    import pandas as pd

    references = reference_names(results)
    rows: list[dict[str, Any]] = []
    for found in _one_each(results.inspections):
        shared = {"backbone": found.name, "reference": found.name in references}
        rows += _quantile_rows(shared, "row_norm", 1.0, found.weights.row_norm_quantiles)
        values = found.weights.singular_values or ()
        places = sorted({*range(min(10, len(values))), *_spread(len(values), 60)})
        rows += [{**shared, "part": "singular_value", "scale": 1.0, "place": i + 1, "value": values[i]} for i in places]
    scales = {c.name: c for c in results.calibrations if c.scale is not None}
    for found in _one_each(results.inspections):
        shared = {"backbone": found.name, "reference": found.name in references}
        after = scales.get(found.name)
        if found.logits is not None:
            for a in dict.fromkeys((1.0, (after.scale if after else None) or 1.0)):
                rows += _quantile_rows(shared, "logit", a, [a * q for q in found.logits.quantiles])
        if found.output is not None:
            rows += _weight_rows(shared, 1.0, found.output.document)
    for name, calibration in scales.items():
        shared = {"backbone": name, "reference": name in references}
        if calibration.before and name not in {i.name for i in results.inspections if i.output is not None}:
            rows += _weight_rows(shared, 1.0, calibration.before.document)
        if calibration.after is not None and calibration.scale != 1.0:
            rows += _weight_rows(shared, float(calibration.scale or 1.0), calibration.after.document)
    return pd.DataFrame(rows, columns=list(_ANATOMY))


def _one_each(inspections: Sequence[Inspection]) -> list[Inspection]:
    """The inspection of each backbone that knows most: outputs, then singular values."""
    found: dict[str, Inspection] = {}
    for one in inspections:
        kept = found.get(one.name)
        known = (one.output is not None, one.weights.singular_values is not None)
        if kept is None or known > (kept.output is not None, kept.weights.singular_values is not None):
            found[one.name] = one
    return list(found.values())


def _spread(count: int, wanted: int) -> set[int]:
    """About so many places of a long list, evenly spaced, the ends included."""
    return {round(i * (count - 1) / (wanted - 1)) for i in range(wanted)} if count else set()


def _quantile_rows(shared: dict[str, Any], part: str, scale: float, values: Sequence[float]) -> list[dict[str, Any]]:
    return [
        {**shared, "part": part, "scale": scale, "place": place, "value": value}
        for place, value in zip(ROW_NORM_QUANTILES, values, strict=False)
    ]


def _weight_rows(shared: dict[str, Any], scale: float, side: SideStatistics) -> list[dict[str, Any]]:
    return _quantile_rows(shared, "weight", scale, getattr(side, "weight_quantiles", ()))
