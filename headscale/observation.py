"""What one training step shows: numbers of its scores, representations, gradients and update.

Everything is computed from tensors the step has at hand, in a few passes over (batch, vocab), and read off
the device once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from headscale.objective import flops_cost, info_nce


@torch.no_grad()
def side_statistics(reps: Tensor) -> dict[str, Tensor]:
    """Statistics of one side's representations.

    Args:
        reps: (B, V), non-negative.

    Returns:
        scalars by name: `active_dims` (mean per text), `empty` (share of texts), `mean_weight`, `max_weight`,
        `flops_reg`, `mean_cosine` (undefined below two texts that are not empty).
    """
    mean = reps.mean(0)
    highest = reps.amax(1)
    return {
        "active_dims": (reps > 0).sum(1).float().mean(),
        "empty": (highest == 0).float().mean(),
        "mean_weight": mean.mean(),
        "max_weight": highest.max(),
        "flops_reg": mean.square().sum(),
        "mean_cosine": _mean_cosine(reps),
    }


def _mean_cosine(reps: Tensor) -> Tensor:
    """Mean cosine over pairs of different non-empty texts, from the norm of the sum of unit vectors."""
    norms = reps.norm(dim=1)
    filled = norms != 0
    units = torch.where(filled, 1 / norms, torch.zeros_like(norms)) @ reps  # (V,) sum of unit vectors
    count = filled.sum().float()
    result: Tensor = (units.square().sum() - count) / (count * (count - 1))
    return result


def cosine(reps: Tensor) -> float | None:
    """Mean cosine over pairs of different texts; None below two texts that are not empty.

    Args:
        reps: (B, V), non-negative.
    """
    defined = int((reps > 0).any(1).sum()) > 1
    return _mean_cosine(reps).item() if defined else None


@torch.no_grad()
def score_statistics(scores: Tensor, *, temperature: float = 1.0) -> dict[str, Tensor]:
    """Statistics of in-batch scores.

    Args:
        scores: (B, N) before the temperature, row i's positive in column i.
        temperature: of the contrastive loss.

    Returns:
        scalars by name: `batch_accuracy`, `score_mean`, `score_sd` (population), `score_margin`, `score_within_sd`
        (about each query's own mean), `score_common` (share of that variance that all queries have in common), and
        `loss_over_ln_n`, the contrastive loss over ln N.
    """
    scores = scores.float()
    candidates = scores.shape[1]
    positive = scores.diagonal()
    others = scores.sum(1) - positive
    beaten = (scores < positive[:, None]).sum(1) == candidates - 1  # a tie, as a NaN, is not beaten
    within = scores - scores.mean(1, keepdim=True)  # what the softmax sees
    variance = within.square().mean()
    common = within.mean(0).square().mean() / variance
    return {
        "batch_accuracy": beaten.float().mean(),
        "score_mean": scores.mean(),
        "score_sd": scores.std(correction=0),
        "score_margin": (positive - others / (candidates - 1)).mean(),
        "score_within_sd": variance.sqrt(),
        "score_common": torch.where(variance == 0, torch.ones_like(common), common),
        "loss_over_ln_n": info_nce(scores, temperature=temperature) / math.log(candidates),
    }


@torch.no_grad()
def batch_statistics(queries: Tensor, documents: Tensor) -> dict[str, Tensor]:
    """Both sides by name (`active_dims_query`, ...), and what needs both.

    Args:
        queries: (B, V).
        documents: (D, V), positives and hard negatives.

    Returns:
        also `flops_cost`, `coverage` and `saturation`, shares of terms active in any and in every text.
    """
    sides = {"query": side_statistics(queries), "document": side_statistics(documents)}
    named = {f"{key}_{side}": value for side, values in sides.items() for key, value in values.items()}
    lowest = torch.minimum(queries.amin(0), documents.amin(0))
    highest = torch.maximum(queries.amax(0), documents.amax(0))
    return {
        **named,
        "flops_cost": flops_cost(queries, documents),
        "coverage": (highest > 0).float().mean(),
        "saturation": (lowest > 0).float().mean(),
    }


def read_off(values: Mapping[str, Tensor]) -> dict[str, float]:
    """Scalars as Python floats, in one transfer from the device."""
    stacked = torch.stack([value.detach().float() for value in values.values()])
    return dict(zip(values, stacked.tolist(), strict=True))


def average(records: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Means over the batches of one step; maxima of what is a maximum."""
    if len(records) == 1:
        return dict(records[0])
    combined = {}
    for key in records[0]:
        values = [record[key] for record in records]
        combined[key] = max(values) if key.startswith("max_") else sum(values) / len(values)
    return combined


def total_norm(tensors: Iterable[Tensor]) -> Tensor:
    """Euclidean norm of all elements of all tensors; 0 of none."""
    parts = torch._foreach_norm(list(tensors))
    return torch.linalg.vector_norm(torch.stack(parts)) if parts else torch.zeros(())
