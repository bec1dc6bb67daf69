"""Effectiveness and verdict against the constant: figure 3."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from headscale.records import Calibration
from headscale.results import Results
from headscale.tables.trained import TRAINED_METRIC, TRAINED_METRICS, points_of, rows_of, summary

if TYPE_CHECKING:
    from pandas import DataFrame

_SENSITIVITY = ("kind", "recipe", "setting", "backbone", "reference", "arm", "scale", "shift", "seed", "metric",
                "value",
                "low", "high", "seeds", "verdict", "chance", "target", "chosen")  # fmt: skip


def sensitivity(results: Results, *, metric: str = TRAINED_METRIC) -> DataFrame:
    """Figure 3: effectiveness and verdict against the constant; `metric` is one of `TRAINED_METRICS`.

    Returns:
        Rows of three kinds: `seed`, one training with its own verdict; `point`, seeds together with the worst verdict;
        `target`, the constant that a target of `calibrate` gives, as it would be written, and whether it was chosen;
        of a calibration that shifts, the chosen one alone, since the others hold after the shift only.
    """
    import pandas as pd

    cells = summary(results)
    rows: list[dict[str, Any]] = [
        {**p, "kind": "point", "chance": p["chance_mrr"] if metric == "MRR@10" else math.nan}
        for p in points_of(cells, metric)
    ]
    for cell in rows_of(cells[cells["verdict"].notna()]):
        rows.append({**cell, "kind": "seed", "metric": metric, "value": cell[TRAINED_METRICS[metric]], "seeds": 1})
    drawn = {row["backbone"] for row in rows}
    for calibration in results.calibrations:
        if calibration.name in drawn:
            rows += _target_rows(calibration)
    return pd.DataFrame(rows, columns=list(_SENSITIVITY)).drop_duplicates(ignore_index=True)


def _target_rows(calibration: Calibration) -> list[dict[str, Any]]:
    found = []
    for target in calibration.targets:
        chosen = target.name == calibration.match
        scale = target.snapped if calibration.snapped and target.snapped is not None else target.scale
        scale = calibration.scale if chosen else scale
        if scale is not None and scale > 0 and (chosen or not calibration.shift):
            found.append({"kind": "target", "backbone": calibration.name, "scale": scale, "target": target.name,
                          "shift": calibration.shift,
                          "chosen": chosen})  # fmt: skip
    return found
