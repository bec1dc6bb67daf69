"""How well representations rank: each query's own document among all of them, ties broken against us."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from headscale.objective import flops_cost
from headscale.observation import cosine, side_statistics
from headscale.records import RankMetrics

CUTOFF = 10


def worst_ranks(queries: Tensor, documents: Tensor, *, block: int = 256) -> Tensor:
    """Rank of document i for query i, counted from 1; equal and non-finite scores count as better ones.

    Args:
        queries: (n, V).
        documents: (m, V) with m >= n; the first n belong to the queries.
        block: queries scored at once.

    Returns:
        (n,) int64.
    """
    ranks = []
    for start in range(0, len(queries), block):
        scores = queries[start : start + block] @ documents.T  # (block, m)
        own = scores.diagonal(start)[: len(scores), None]
        ranks.append(scores.shape[1] - (scores < own).sum(1))
    return torch.cat(ranks)


def chance_mrr(candidates: int, cutoff: int = CUTOFF) -> float:
    """Expected reciprocal rank, cut off, of one relevant document in a random order."""
    return math.fsum(1 / rank for rank in range(1, min(cutoff, candidates) + 1)) / candidates


@torch.no_grad()
def rank_metrics(queries: Tensor, documents: Tensor) -> RankMetrics:
    """MRR@10 and nDCG@10, and the sparsity they cost, over a pool of candidates.

    Args:
        queries: (n, V) representations.
        documents: (m, V) with m >= n; document i answers query i, the others are distractors.

    Returns:
        the metrics; those at 10 are None where there are fewer candidates.
    """
    ranks = worst_ranks(queries, documents).double()
    reciprocal = torch.where(ranks <= CUTOFF, 1 / ranks, torch.zeros_like(ranks))
    gain = torch.where(ranks <= CUTOFF, 1 / torch.log2(1 + ranks), torch.zeros_like(ranks))
    pool = len(documents)
    enough = pool >= CUTOFF
    return RankMetrics(
        queries=len(queries),
        candidates=pool,
        mrr_at_10=reciprocal.mean().item() if enough else None,
        recall_at_1=(ranks == 1).double().mean().item(),
        mean_rank=ranks.mean().item(),
        chance_mrr_at_10=chance_mrr(pool) if enough else None,
        active_dims_query=side_statistics(queries)["active_dims"].item(),
        active_dims_document=side_statistics(documents)["active_dims"].item(),
        flops_cost=flops_cost(queries, documents).item(),
        cosine_document=cosine(documents),
        ndcg_at_10=gain.mean().item() if enough else None,
    )
