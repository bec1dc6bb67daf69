"""The steps of both arms: figure 4."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from headscale.results import Results, Training
from headscale.tables.trained import RESCALED, SHIFTED, UNTOUCHED, mean_of, rows_of, summary
from headscale.verdict import FAILED

if TYPE_CHECKING:
    from pandas import DataFrame

DRAWN_STEPS = 120  # about as many points of a curve as a panel has room for; each is a real step, none is averaged
HEALTHY_DIMS, HEALTHY_VOCABULARY = (150, 250), 30_522  # per document, sentence-transformers' guide to sparse encoders
CURVES = ("loss_over_ln_n", "active_dims_document", "score_sd", "cosine_document", "grad_norm_head",
          "grad_norm_encoder")  # fmt: skip

_CURVES = ("kind", "recipe", "setting", "backbone", "reference", "arm", "scale", "shift", "statistic", "step",
           "value", "low",
           "high", "seeds", "every", "verdict")  # fmt: skip


def curves(results: Results, *, backbone: str | None = None, recipe: str | None = None) -> DataFrame:
    """Figure 4: how both arms of a backbone trained, and the reference's untouched head beside them.

    The rescaled arm is the constant that a calibration chose; without one, that of the best ranking of the dev pairs,
    else of the test pairs; the shifted one likewise. Long runs are thinned: every so many-th step is kept as it is
    (`every`), and the last.

    Args:
        results: trainings with their logs.
        backbone: whose arms; by default the first that has two and is no reference.
        recipe: of `summary`; by default the first of that backbone.

    Returns:
        Rows of three kinds: `step`, the median over seeds of a statistic with the smallest and largest as low and
        high; `verdict`, the step at which a seed's verdict was reached; `band`, from low to high what to expect of a
        statistic, `verdict` being its name.
    """
    import pandas as pd

    cells = summary(results)
    cells = cells[cells["key"].isin([t.key for t in results.trainings if t.folder])]
    logs = {t.key: t for t in results.trainings}
    rows: list[dict[str, Any]] = []
    for arm in _arms(results, cells, backbone, recipe):
        rows += _curve_rows(arm, [logs[key] for key in arm["key"]])
    if rows:
        rows += _bands([logs[key] for key in cells["key"] if logs[key].cell])
    return pd.DataFrame(rows, columns=list(_CURVES))


def _bands(trainings: Sequence[Training]) -> list[dict[str, Any]]:
    """What to expect: 150 to 250 of 30,522 terms a document after training (sentence-transformers' guide)."""
    sizes = {t.cell.run.vocab_size for t in trainings if t.cell}
    if len(sizes) != 1:
        return []
    (size,) = sizes
    low, high = HEALTHY_DIMS[0] * size / HEALTHY_VOCABULARY, HEALTHY_DIMS[1] * size / HEALTHY_VOCABULARY
    return [{"kind": "band", "statistic": "active_dims_document", "low": low, "high": high,
             "verdict": "healthy after a full training"}]  # fmt: skip


def _arms(results: Results, cells: DataFrame, backbone: str | None, recipe: str | None) -> list[DataFrame]:
    """The cells of each arm to draw: reference, untouched, rescaled."""
    name = backbone or _most_telling(cells)
    own = cells[cells["backbone"] == name]
    recipe = recipe if recipe is not None or own.empty else str(own["recipe"].iloc[0])
    own = own[own["recipe"] == recipe]
    rescaled = own[own["arm"] == RESCALED]
    shifted = own[own["arm"] == SHIFTED]
    arms = [own[own["arm"] == UNTOUCHED], rescaled[rescaled["scale"] == _chosen(results, name, rescaled, "scale")],
            shifted[shifted["shift"] == _chosen(results, name, shifted, "shift")]]  # fmt: skip
    if arms[0].empty:  # a sweep may hold the untouched head as the constant 1
        arms[0] = rescaled[rescaled["scale"] == 1.0]
    if own["reference"].any():
        return [arm for arm in arms if len(arm)]
    beside = cells[cells["reference"] & (cells["recipe"] == recipe) & (cells["arm"] == UNTOUCHED)]
    first = beside[beside["backbone"] == beside["backbone"].iloc[0]] if len(beside) else beside
    return [arm for arm in (first, *arms) if len(arm)]


def _most_telling(cells: DataFrame) -> str:
    """The first backbone with both arms, no reference, that fails untouched; else without the one or the other."""
    arms = cells.groupby("backbone", sort=False)["arm"].nunique()
    both = [name for name in arms.index if arms[name] > 1]
    others = [name for name in both if not cells.loc[cells["backbone"] == name, "reference"].any()]
    failing = set(cells.loc[(cells["arm"] == UNTOUCHED) & cells["verdict"].isin(list(FAILED)), "backbone"])
    found = [*(name for name in others if name in failing), *others, *both, *arms.index]
    return str(found[0]) if found else ""


def _chosen(results: Results, backbone: str, cells: DataFrame, name: str) -> float:
    """The `scale` or `shift` to show: a calibration's where it was trained, else the best ranking's, else the last."""
    values = set(cells[name])
    for calibration in results.calibrations:
        if calibration.name == backbone and getattr(calibration, name) in values:
            return float(getattr(calibration, name))
    for column in ("mrr_dev", "mrr_test"):
        means = cells.groupby(name)[column].apply(mean_of).dropna()
        if len(means):
            best: Any = means.idxmax()
            return float(best)
    return float(cells[name].iloc[-1]) if len(cells) else math.nan


def _curve_rows(arm: DataFrame, trainings: Sequence[Training]) -> list[dict[str, Any]]:
    import warnings

    import numpy as np

    planned = [int(t.training.get("steps") or 0) for t in trainings]
    every = max(1, math.ceil(max(planned, default=0) / DRAWN_STEPS))
    read = [log for t in trainings if len((log := t.steps(CURVES, every=every))["step"])]
    shared = {name: arm[name].iloc[0] for name in ("recipe", "setting", "backbone", "reference", "arm", "scale",
                                              "shift")}  # fmt: skip
    rows = []
    steps = np.unique(np.concatenate([log["step"] for log in read])) if read else np.array([])
    for statistic in CURVES if read else ():
        values = np.full((len(read), len(steps)), np.nan)  # (seeds, steps)
        for i, log in enumerate(read):
            values[i, np.searchsorted(steps, log["step"])] = log[statistic]
        values[~np.isfinite(values)] = np.nan
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # a step without a finite value in any seed stays NaN
            columns = (np.nanmedian(values, axis=0), np.nanmin(values, axis=0), np.nanmax(values, axis=0))
        counts = np.isfinite(values).sum(0)
        rows += [
            {**shared, "kind": "step", "statistic": statistic, "step": int(step), "value": middle, "low": low,
             "high": high, "seeds": int(n), "every": every}
            for step, middle, low, high, n in zip(steps, *columns, counts, strict=True)
        ]  # fmt: skip
    for cell in rows_of(arm[arm["verdict"].notna()]):
        rows.append({**shared, "kind": "verdict", "step": int(cell["verdict_step"]), "verdict": cell["verdict"],
                     "seeds": 1, "every": every})  # fmt: skip
    return rows
