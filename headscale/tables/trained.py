"""Trainings as rows, and their seeds taken together."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from headscale.results import Results, Training, backbones
from headscale.tables.recipes import Member, is_shifted_alone, is_untouched, members
from headscale.verdict import WORDS

if TYPE_CHECKING:
    from pandas import DataFrame

# Of the test pairs that a trial or a sweep ranks at its end, and their columns of `summary`.
TRAINED_METRICS = {"MRR@10": "mrr_test", "nDCG@10": "ndcg_test"}
TRAINED_METRIC = "MRR@10"
SEED_INTERVAL = "95 % t over seeds"
UNTOUCHED, SHIFTED, RESCALED = "untouched", "shifted", "rescaled"

_CELL_COLUMNS = ("recipe", "setting", "backbone", "reference", "scale", "shift", "arm", "mode",
                 "head_lr_multiplier", "seed",
                 "status", "key", "norm", "mrr_dev", "mrr_test", "ndcg_test", "chance_mrr", "active_dims_query",
                 "active_dims_document", "flops_cost", "verdict", "verdict_step", "verdict_lr_share", "loss_end",
                 "message")  # fmt: skip


def summary(results: Results) -> DataFrame:
    """A row per training and recipe: configuration, verdict, effectiveness, sparsity; None where there is none yet.

    `norm` is the head's Frobenius norm at the start, the constant included wherever it is written.
    """
    import pandas as pd

    references = reference_names(results)
    rows = [_cell_row(m, m.training.backbone in references) for m in members(results)]
    return pd.DataFrame(rows, columns=list(_CELL_COLUMNS))


def _cell_row(member: Member, reference: bool) -> dict[str, Any]:
    training, own = member.training, member.training.training
    return {
        "recipe": member.recipe,
        "setting": member.setting,
        "backbone": training.backbone,
        "reference": reference,
        "scale": float(own["scale"]),
        "shift": float(own.get("shift") or 0.0),
        "arm": UNTOUCHED if is_untouched(training) else SHIFTED if is_shifted_alone(training) else RESCALED,
        "mode": own.get("mode"),
        "head_lr_multiplier": own.get("head_lr_multiplier"),
        "seed": own.get("seed"),
        "status": training.status,
        "key": training.key,
        "message": training.message,
        **(_of_cell(training) if training.cell else _of_row(training) if training.row else {}),
    }


def _of_cell(training: Training) -> dict[str, Any]:
    assert training.cell is not None
    cell, end = training.cell, training.cell.run.end
    ranking = end.ranking
    elsewhere = training.training.get("mode") in ("fold", "logits")  # the matrix itself is then as it was
    return {
        "norm": cell.run.head_norm_start * (training.training["scale"] if elsewhere else 1.0),
        "mrr_dev": None if cell.dev is None else cell.dev.mrr_at_10,
        "mrr_test": None if ranking is None else ranking.mrr_at_10,
        "ndcg_test": None if ranking is None else ranking.ndcg_at_10,
        "chance_mrr": None if ranking is None else ranking.chance_mrr_at_10,
        "active_dims_query": end.tail.get("active_dims_query") if ranking is None else ranking.active_dims_query,
        "active_dims_document": end.tail.get("active_dims_document")
        if ranking is None
        else ranking.active_dims_document,
        "flops_cost": None if ranking is None else ranking.flops_cost,
        "verdict": cell.verdict.word,
        "verdict_step": cell.verdict.step,
        "verdict_lr_share": cell.verdict.lr_share,
        "loss_end": end.tail.get("loss_over_ln_n"),
    }


def _of_row(training: Training) -> dict[str, Any]:
    assert training.row is not None
    row = training.row
    elsewhere = row.mode in ("fold", "logits")
    norm = None if row.head_norm_start is None else row.head_norm_start * (row.scale if elsewhere else 1.0)
    names = ("mrr_dev", "mrr_test", "ndcg_test", "chance_mrr", "active_dims_query", "active_dims_document",
             "flops_cost", "verdict", "verdict_step", "verdict_lr_share", "loss_end")  # fmt: skip
    return {"norm": norm, **{n: getattr(row, n) for n in names}}


def reference_names(results: Results) -> frozenset[str]:
    """The backbones that the others are held against: those of the results, else the default or the bundled one."""
    from headscale import bundled
    from headscale.profiles import DEFAULT_REFERENCE

    here = set(backbones(results))
    named = frozenset(results.references) & here
    spare = {DEFAULT_REFERENCE, f"{bundled.PREFIX}{bundled.REFERENCE}"}
    return named or frozenset(spare & here)


def rows_of(frame: DataFrame) -> list[dict[str, Any]]:
    """The rows of a table by column name."""
    found: Any = frame.to_dict("records")
    return list(found)


# --- seeds ---------------------------------------------------------------------------------------------------------


def t_interval(values: Sequence[float]) -> tuple[float, float, float, int]:
    """Mean, 95 % t interval cut to 0..1, and how many values are finite; NaN where they do not exist."""
    import numpy as np

    finite = np.array([v for v in values if v is not None and math.isfinite(v)])
    if len(finite) < 2:
        return (float(finite[0]) if len(finite) else math.nan), math.nan, math.nan, len(finite)
    from scipy.special import stdtrit  # scipy.stats takes two seconds to import

    mean, half = finite.mean(), stdtrit(len(finite) - 1, 0.975) * finite.std(ddof=1) / math.sqrt(len(finite))
    return float(mean), float(max(0.0, mean - half)), float(min(1.0, mean + half)), len(finite)


def worst_word(words: Iterable[str | None]) -> str:
    """The worst verdict of some; "" of none."""
    known = [w for w in words if w in WORDS]
    return max(known, key=WORDS.index) if known else ""


def points_of(cells: DataFrame, metric: str) -> list[dict[str, Any]]:
    """Seeds taken together: a row per recipe, backbone, arm, constant and shift, in the order of the cells."""
    found = []
    keys = ["recipe", "backbone", "arm", "scale", "shift"]
    for (recipe, backbone, arm, scale, shift), group in cells.groupby(keys, sort=False):
        value, low, high, seeds = t_interval(group[TRAINED_METRICS[metric]].tolist())
        means = {n: mean_of(group[n]) for n in ("norm", "active_dims_query", "active_dims_document", "flops_cost",
                                              "chance_mrr")}  # fmt: skip
        found.append({
            "source": "training", "recipe": recipe, "setting": group["setting"].iloc[0], "backbone": backbone,
            "reference": bool(group["reference"].iloc[0]), "arm": arm, "scale": scale, "shift": shift,
            "metric": metric,
            "value": value, "low": low, "high": high, "seeds": seeds, "trainings": len(group),
            "interval": SEED_INTERVAL if seeds > 1 else "", "verdict": worst_word(group["verdict"]), **means,
        })  # fmt: skip
    return found


def mean_of(values: Any) -> float:
    """Mean of the finite values; NaN of none."""
    import numpy as np

    finite = [float(v) for v in values if v is not None and np.isfinite(v)]
    return sum(finite) / len(finite) if finite else math.nan
