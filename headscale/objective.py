"""What SPLADE training minimises: ranking losses, sparsity regularizers, and the schedules of both weights.

Nothing is rescaled, rounded or replaced where it is not finite: a diverging run is what is being measured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax, mse_loss, softmax

from headscale.errors import UsageError

Loss = Literal["infonce", "margin-mse", "kl"]
Regularizer = Literal["flops", "l1", "none"]


# --- ranking ---------------------------------------------------------------------------------------


def candidate_scores(
    queries: Tensor, documents: Tensor, negatives: Tensor | None = None, *, shared: bool = True
) -> Tensor:
    """Dot products of every query with its candidates; the positive of query i is in column i.

    Args:
        queries: (B, V).
        documents: (B, V), the positive of each query.
        negatives: (B, n, V) hard negatives of each query, or None.
        shared: hard negatives are candidates of every query (sentence-transformers), giving N = B (1 + n);
            otherwise of their own query only (naver's in-batch NLL), giving N = B + n.

    Returns:
        (B, N) scores.
    """
    in_batch = queries @ documents.T
    if negatives is None or not negatives.shape[1]:
        return in_batch
    if shared:
        return torch.cat([in_batch, queries @ negatives.flatten(0, 1).T], dim=1)
    return torch.cat([in_batch, _own(queries, negatives)], dim=1)


def own_scores(queries: Tensor, documents: Tensor, negatives: Tensor) -> Tensor:
    """Scores of each query with its own positive and hard negatives only.

    Args:
        queries: (B, V).
        documents: (B, V).
        negatives: (B, n, V).

    Returns:
        (B, 1 + n), the positive first.
    """
    return _own(queries, torch.cat([documents[:, None], negatives], dim=1))


def _own(queries: Tensor, candidates: Tensor) -> Tensor:
    return torch.bmm(candidates, queries[:, :, None])[:, :, 0]  # (B, k, V) x (B, V, 1)


def info_nce(scores: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Mean over queries of -log softmax(scores / temperature) at the positive, row i's being column i.

    Args:
        scores: (B, N) with N >= B.
        temperature: divides the scores; sentence-transformers' `scale` is its inverse.
    """
    labels = torch.arange(scores.shape[0], device=scores.device)
    return cross_entropy(scores / temperature, labels)


def margin_mse(scores: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of positive-negative margins, student against teacher (arXiv 2010.02666).

    Args:
        scores: (B, 1 + n) student scores, the positive first.
        teacher: (B, 1 + n) teacher scores in the same order.
    """
    return mse_loss(scores[:, :1] - scores[:, 1:], teacher[:, :1] - teacher[:, 1:])


def kl_distillation(scores: Tensor, teacher: Tensor, *, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student) of the softmaxes over each query's own candidates, times temperature squared.

    The square keeps the gradient's size as the temperature changes; at 1 it is naver's `DistilKLLoss`
    (arXiv 2010.11386).

    Args:
        scores: (B, 1 + n) student scores.
        teacher: (B, 1 + n) teacher scores in the same order.
        temperature: divides both.
    """
    student = log_softmax(scores / temperature, dim=1)
    return kl_div(student, softmax(teacher / temperature, dim=1), reduction="batchmean") * temperature**2


@dataclass(frozen=True)
class Ranking:
    """A ranking loss and the score matrix it is observed by.

    Args:
        loss: scalar with its graph.
        scores: (B, N) scores before the temperature, positives on the diagonal, detached.
    """

    loss: Tensor
    scores: Tensor


def ranking_loss(
    loss: Loss,
    queries: Tensor,
    documents: Tensor,
    negatives: Tensor | None = None,
    *,
    teacher: Tensor | None = None,
    temperature: float = 1.0,
    shared_negatives: bool = True,
) -> Ranking:
    """One of the ranking losses on a batch of representations.

    Args:
        loss: "infonce", "margin-mse" or "kl".
        queries: (B, V).
        documents: (B, V).
        negatives: (B, n, V) or None.
        teacher: (B, 1 + n) teacher scores; needed by the distillation losses.
        temperature: of the softmax ("infonce", "kl").
        shared_negatives: see `candidate_scores`.

    Raises:
        UsageError: a distillation loss without hard negatives and teacher scores.
    """
    if loss == "infonce":
        scores = candidate_scores(queries, documents, negatives, shared=shared_negatives)
        return Ranking(info_nce(scores, temperature=temperature), scores.detach())
    if negatives is None or teacher is None or not negatives.shape[1]:
        raise UsageError(
            f"the loss `{loss}` needs hard negatives and teacher scores for every pair",
            "give pairs that have both, or use the loss `infonce`",
        )
    own = own_scores(queries, documents, negatives)
    teacher = teacher.to(own)
    value = margin_mse(own, teacher) if loss == "margin-mse" else kl_distillation(own, teacher, temperature=temperature)
    with torch.no_grad():
        scores = candidate_scores(queries, documents, negatives, shared=shared_negatives)
    return Ranking(value, scores)


# --- regularizers ----------------------------------------------------------------------------------


def flops_reg(reps: Tensor, *, threshold: int | None = None) -> Tensor:
    """Sum over terms of (mean activation)^2 (arXiv 2004.05665).

    Args:
        reps: (B, V), non-negative.
        threshold: texts with at most this many active dims count as zeros (the L0 mask of arXiv 2504.14839).

    Returns:
        scalar; not the expected cost of a query, for which see `flops_cost`.
    """
    if threshold is not None:
        crowded = (reps > 0).sum(1, keepdim=True) > threshold
        reps = reps * crowded.to(reps.dtype)
    return reps.mean(0).square().sum()


def l1_reg(reps: Tensor) -> Tensor:
    """Mean over texts of the sum of activations.

    Args:
        reps: (B, V), non-negative.
    """
    return reps.sum(1).mean()


def flops_cost(queries: Tensor, documents: Tensor) -> Tensor:
    """Expected multiplications per query-document pair: sum over terms of p_q(term) p_d(term).

    Args:
        queries: (B, V) activations; p is the share of texts in which a term is active.
        documents: (D, V).
    """
    active = [(reps > 0).to(torch.float32).mean(0) for reps in (queries, documents)]
    return (active[0] * active[1]).sum()


def regularize(kind: Regularizer, reps: Tensor, *, threshold: int | None = None) -> Tensor:
    """The regularizer of that name, unweighted."""
    if kind == "flops":
        return flops_reg(reps, threshold=threshold)
    if kind == "l1":
        return l1_reg(reps)
    return reps.new_zeros(())


# --- schedules -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Schedule:
    """Learning-rate and lambda factors by optimizer step, counted from 0 as transformers' schedulers do.

    Args:
        total: steps until the learning rate has decayed to 0.
        warmup: steps of linear rise from 0.
        ramp: steps over which lambda rises quadratically (arXiv 2004.05665); 0 is constant.
    """

    total: int
    warmup: int
    ramp: int

    def lr_factor(self, step: int) -> float:
        """Linear warmup, then linear decay: transformers' `get_linear_schedule_with_warmup`."""
        if step < self.warmup:
            return step / max(1, self.warmup)
        return max(0.0, (self.total - step) / max(1, self.total - self.warmup))

    def lambda_factor(self, step: int) -> float:
        """min(1, step / ramp)^2: sentence-transformers' quadratic scheduler."""
        if self.ramp <= 0:
            return 1.0
        return min(1.0, step / self.ramp) ** 2

    def lr_sum(self, steps: int | None = None) -> float:
        """Sum of the learning-rate factors of the first `steps` steps (default: all), a clock for runs."""
        return math.fsum(self.lr_factor(step) for step in range(self.total if steps is None else steps))

    def fitted_into(self, steps: int) -> Schedule:
        """The same shape compressed into `steps`, every part in proportion."""
        share = steps / self.total
        return Schedule(steps, round(self.warmup * share), round(self.ramp * share))
