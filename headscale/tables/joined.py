"""Effectiveness beside norms and sparsity, from trainings, evaluations and published figures: figures 1 and 2."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from headscale.records import Estimate, Evaluation
from headscale.results import Results
from headscale.tables.published import published_rows
from headscale.tables.trained import (
    RESCALED,
    SHIFTED,
    TRAINED_METRIC,
    UNTOUCHED,
    points_of,
    reference_names,
    summary,
)
from headscale.verdict import FAILED

if TYPE_CHECKING:
    from pandas import DataFrame

LEAST_BACKBONES = 5  # below it a rank correlation is not given: with four, even a perfect order has p = 0.08
METRICS = {
    "ndcg_at_10": "nDCG@10",
    "mrr_at_10": "MRR@10",
    "recall_at_100": "recall@100",
    "recall_at_1000": "recall@1000",
}
QUERY_INTERVAL = "95 % over queries"


def _evaluated(results: Results) -> list[dict[str, Any]]:
    """A row per evaluated model and metric, joined with the norms that are known."""
    written = {c.written.directory: c for c in results.calibrations if c.written is not None}
    references = reference_names(results)
    rows = []
    for evaluation in results.evaluations:
        made = written.get(evaluation.name)
        backbone, scale, shift = (made.name, made.scale or 1.0, made.shift) if made else (evaluation.name, 1.0, 0.0)
        arm = UNTOUCHED if not made else SHIFTED if shift and scale == 1.0 else RESCALED
        model = evaluation.systems[0]
        shared = {
            "source": "evaluation", "recipe": "", "setting": _collection(evaluation), "backbone": backbone,
            "reference": backbone in references, "arm": arm, "scale": scale, "shift": shift, "seeds": 1,
            "trainings": 1, "verdict": "", "interval": QUERY_INTERVAL, "flops_cost": _or_nan(model.flops_cost),
            "active_dims_query": model.query.active_dims if model.query else math.nan,
            "active_dims_document": model.document.active_dims if model.document else math.nan,
        }  # fmt: skip
        estimates: dict[str, Estimate | None] = {name: getattr(model, name) for name in METRICS}
        rows += [
            {**shared, "metric": METRICS[n], "value": e.value, "low": _or_nan(e.low), "high": _or_nan(e.high)}
            for n, e in estimates.items()
            if e is not None
        ]
    return rows


def _collection(evaluation: Evaluation) -> str:
    found = evaluation.collection
    return f"{found.name}, {found.queries:,} queries, {found.documents:,} documents"


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


# --- figure 1 ------------------------------------------------------------------------------------------------------

_EFFECTIVENESS = ("source", "recipe", "setting", "backbone", "reference", "arm", "scale", "shift", "norm_name",
                  "norm", "metric",
                  "value", "low", "high", "seeds", "trainings", "interval", "verdict", "own_point")  # fmt: skip


def norm_effectiveness(
    results: Results, published: DataFrame | None = None, *, norm: str = "frobenius", metric: str = TRAINED_METRIC
) -> DataFrame:
    """Figure 1: the MLM head's norm, the constant included, against effectiveness.

    Args:
        results: trainings with a ranking of their own, or inspections with evaluations or published figures.
        published: from `read_published`; its rows come first.
        norm: a norm of `WeightStatistics`; trainings themselves know the Frobenius norm alone.
        metric: of trainings, in `TRAINED_METRICS`; evaluations and published figures have theirs.

    Returns:
        A row per backbone, constant, recipe and metric; `own_point` marks the one row of a backbone, its untouched
        head, that the rank correlation takes.
    """
    import pandas as pd

    known = {i.name: float(_or_nan(getattr(i.weights, norm))) for i in results.inspections}
    rows = [*published_rows(published, results), *_evaluated(results), *points_of(summary(results), metric)]
    for row in rows:
        measured = known.get(row["backbone"], math.nan) * row["scale"]
        trained = row.get("norm", math.nan) if norm == "frobenius" else math.nan
        row.update(norm_name=norm, norm=measured if math.isfinite(measured) else trained)
    frame = pd.DataFrame(rows, columns=[c for c in _EFFECTIVENESS if c != "own_point"])
    own = frame.index[
        (frame["scale"] == 1.0) & (frame["arm"] != SHIFTED) & frame["value"].notna() & frame["norm"].notna()
    ]
    first = frame.loc[own].sort_values("arm", key=lambda a: a != UNTOUCHED, kind="stable")
    kept = first.drop_duplicates(["source", "recipe", "metric", "backbone"]).index
    return frame.assign(own_point=frame.index.isin(kept))


@dataclass(frozen=True)
class RankCorrelation:
    """Spearman's rank correlation with its 95 % interval: Fisher's z with the standard error of Bonett and Wright
    (2000), sqrt((1 + rho^2 / 2) / (n - 3)).
    """

    backbones: int
    rho: float
    low: float
    high: float


def rank_correlation(data: DataFrame) -> RankCorrelation | None:
    """Of norm and effectiveness over backbones, one point each; None below `LEAST_BACKBONES` or where all tie.

    Args:
        data: rows of `norm_effectiveness`, of one source, recipe and metric.
    """
    import numpy as np

    points = data[data["own_point"] & np.isfinite(data["norm"]) & np.isfinite(data["value"])]
    points = points.drop_duplicates("backbone")
    count = len(points)
    if count < LEAST_BACKBONES or points["norm"].nunique() < 2 or points["value"].nunique() < 2:
        return None
    rho = float(np.corrcoef(points["norm"].rank(), points["value"].rank())[0, 1])
    half = 1.959964 * math.sqrt((1 + rho * rho / 2) / (count - 3))
    z = math.atanh(max(-1 + 1e-12, min(1 - 1e-12, rho)))
    return RankCorrelation(count, rho, math.tanh(z - half), math.tanh(z + half))


# --- figure 2 ------------------------------------------------------------------------------------------------------

SPARSITY = ("active_dims_document", "active_dims_query", "flops_cost")
_TRADEOFF = ("source", "recipe", "setting", "backbone", "reference", "arm", "scale", "shift", "metric", "value",
             "low", "high",
             "seeds", "trainings", "interval", "verdict", *SPARSITY)  # fmt: skip


def tradeoff(results: Results, *, metric: str = TRAINED_METRIC) -> DataFrame:
    """Figure 2: effectiveness against sparsity, a row per backbone, constant, recipe and metric.

    `front_active_dims_document` and the like say which rows are on the Pareto front of their recipe and metric: no
    other is at least as effective and sparser. Runs that did not train are not on it, however sparse they are.
    `metric` is that of trainings, in `TRAINED_METRICS`.
    """
    import pandas as pd

    rows = [*_evaluated(results), *points_of(summary(results), metric)]
    frame = pd.DataFrame(rows, columns=list(_TRADEOFF))
    fronts = {f"front_{name}": pd.Series(False, index=frame.index) for name in SPARSITY}
    trained = frame[~frame["verdict"].isin(list(FAILED))]
    for _, group in trained.groupby(["source", "setting", "recipe", "metric"], sort=False):
        for name in SPARSITY:
            fronts[f"front_{name}"].loc[pareto(group, name)] = True
    return frame.assign(**fronts)


def pareto(points: DataFrame, sparsity: str) -> list[Any]:
    """Labels of the rows that no other beats: sparser or as sparse, and more effective."""
    finite = points[[sparsity, "value"]].dropna().sort_values([sparsity, "value"], ascending=[True, False])
    best, front = -math.inf, []
    for label, value in finite["value"].items():
        if value > best:
            best = value
            front.append(label)
    return front
