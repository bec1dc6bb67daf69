"""Tidy tables of saved results: what each figure shows, as pure functions from results to data frames."""

from headscale.tables.constants import sensitivity
from headscale.tables.heads import anatomy
from headscale.tables.joined import (
    LEAST_BACKBONES,
    SPARSITY,
    RankCorrelation,
    norm_effectiveness,
    pareto,
    rank_correlation,
    tradeoff,
)
from headscale.tables.logs import curves
from headscale.tables.published import read_published
from headscale.tables.recipes import Member, members
from headscale.tables.trained import (
    SEED_INTERVAL,
    TRAINED_METRICS,
    reference_names,
    rows_of,
    summary,
    t_interval,
    worst_word,
)

__all__ = [
    "LEAST_BACKBONES",
    "SEED_INTERVAL",
    "SPARSITY",
    "TRAINED_METRICS",
    "Member",
    "RankCorrelation",
    "anatomy",
    "curves",
    "members",
    "norm_effectiveness",
    "pareto",
    "rank_correlation",
    "read_published",
    "reference_names",
    "rows_of",
    "sensitivity",
    "summary",
    "t_interval",
    "tradeoff",
    "worst_word",
]
