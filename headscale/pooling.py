"""The SPLADE head, max over positions of log1p(relu(h W^T + b)), without ever holding [batch, seq, vocab]."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from headscale.errors import UsageError
from headscale.kernels import tiled

Implementation = Literal["auto", "reference", "tiled"]

SMALL_LOGITS = 1 << 16  # measured: below this many logits the plain product is at least as fast


class MaxLogits(NamedTuple):
    """The largest logit of every (text, term), and where it is.

    Args:
        values: (batch, vocab) float32, float64 for float64 inputs; -inf where no position is allowed.
        positions: (batch, vocab) int16, int32 or int64; the smallest position attaining the maximum of the
            product, -1 where no position is allowed.
    """

    values: Tensor
    positions: Tensor


def max_logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    attention_mask: Tensor | None = None,
    *,
    implementation: Implementation = "auto",
) -> MaxLogits:
    """Max over the allowed positions of `hidden . weight + bias`, without gradient.

    Every constant's representation follows from it: log1p(relu(a * values)) for a > 0 on weight and bias.

    Args:
        hidden: (batch, seq, d) last hidden states.
        weight: (vocab, d) head projection.
        bias: (vocab,) head bias, or None.
        attention_mask: (batch, seq), nonzero where a position counts; None: every position counts.
        implementation: "auto", "reference" or "tiled"; see `choose_implementation`.

    Raises:
        UsageError: shapes do not fit each other.
    """
    with torch.no_grad():
        hidden, weight, bias, mask = _prepared(hidden, weight, bias, attention_mask)
        if _resolved(implementation, hidden, weight) == "reference":
            return _reference_max(hidden, weight, bias, mask)
        return _tiled_max_logits(hidden, weight, bias, mask)


def splade_pool(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    attention_mask: Tensor | None = None,
    *,
    scale: float = 1.0,
    implementation: Implementation = "auto",
) -> Tensor:
    """SPLADE representation log1p(relu(scale * max over positions of (hidden . weight + bias))).

    Differentiable once in hidden, weight and bias. Half-precision inputs are accumulated in float32; NaN
    and inf at allowed positions propagate, excluded positions never matter. Bitwise deterministic on CPU.

    Args:
        hidden: (batch, seq, d) last hidden states.
        weight: (vocab, d) head projection.
        bias: (vocab,) head bias, or None.
        attention_mask: (batch, seq), nonzero where a position counts; None: every position counts. A text
            without any is represented by zeros and gets no gradient.
        scale: positive factor on the logits, the same as multiplying weight and bias by it.
        implementation: "auto", "reference" or "tiled"; see `choose_implementation`.

    Returns:
        (batch, vocab) float32, float64 for float64 inputs.

    Raises:
        UsageError: shapes do not fit each other, or `scale` is not positive.
    """
    if not scale > 0:
        raise UsageError(f"`scale` must be positive, not {scale}", "a factor of 0 or less empties every text")
    hidden, weight, bias, mask = _prepared(hidden, weight, bias, attention_mask)
    if _resolved(implementation, hidden, weight) == "reference":
        return _reference_pool(hidden, weight, bias, mask, scale)
    return _tiled_pool(hidden, weight, bias, mask, scale)


def splade_pool_reference(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    attention_mask: Tensor | None = None,
    *,
    scale: float = 1.0,
) -> Tensor:
    """The same as `splade_pool` in plain operations that hold [batch, seq, vocab]: oracle and fallback."""
    return splade_pool(hidden, weight, bias, attention_mask, scale=scale, implementation="reference")


def choose_implementation(hidden: Tensor, weight: Tensor) -> Literal["reference", "tiled"]:
    """Name the implementation "auto" takes: "reference" for few logits, else "tiled".

    Args:
        hidden: (batch, seq, d).
        weight: (vocab, d).
    """
    logits = hidden.shape[0] * hidden.shape[1] * weight.shape[0]
    return "reference" if logits <= SMALL_LOGITS else "tiled"


class SpladeHead(nn.Module):
    """The pooled head as a module: `forward(hidden, attention_mask)` gives (batch, vocab).

    Args:
        weight: (vocab, d) projection; a parameter is kept as it is, so a tied weight stays tied.
        bias: (vocab,) or None.
        scale: positive factor on the logits.
        implementation: "auto", "reference" or "tiled".
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        scale: float = 1.0,
        implementation: Implementation = "auto",
    ) -> None:
        super().__init__()
        self.weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight)
        self.bias = bias if bias is None or isinstance(bias, nn.Parameter) else nn.Parameter(bias)
        self.scale = scale
        self.implementation: Implementation = implementation

    def forward(self, hidden: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """(batch, seq, d) and (batch, seq) to (batch, vocab)."""
        return splade_pool(
            hidden,
            self.weight,
            self.bias,
            attention_mask,
            scale=self.scale,
            implementation=self.implementation,
        )


def _prepared(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Check the shapes, and bring everything to one dtype (autocast's where it is on)."""
    if hidden.dim() != 3 or weight.dim() != 2 or hidden.shape[2] != weight.shape[1]:
        raise UsageError(
            f"`hidden` {tuple(hidden.shape)} and `weight` {tuple(weight.shape)} do not fit each other",
            "they must be (batch, seq, d) and (vocab, d)",
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise UsageError(f"`bias` {tuple(bias.shape)} does not fit `weight`", "it must be (vocab,)")
    if mask is not None and mask.shape != hidden.shape[:2]:
        raise UsageError(
            f"`attention_mask` {tuple(mask.shape)} does not fit `hidden`", "it must be (batch, seq)"
        )
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    if torch.is_autocast_enabled(hidden.device.type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(hidden.device.type)
    cast_bias = None if bias is None else bias.to(dtype)
    return hidden.to(dtype), weight.to(dtype), cast_bias, None if mask is None else mask.bool()


def _resolved(implementation: str, hidden: Tensor, weight: Tensor) -> str:
    if implementation == "auto":
        return choose_implementation(hidden, weight)
    if implementation not in ("reference", "tiled"):
        raise UsageError(
            f"`implementation` is not known: `{implementation}`", "one of auto, reference, tiled"
        )
    return implementation


def _reference_max(hidden: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None) -> MaxLogits:
    batch, seq, _ = hidden.shape
    if not seq:
        shape = (batch, len(weight))
        empty = hidden.new_full(shape, -torch.inf, dtype=tiled.accumulator(hidden.dtype))
        return MaxLogits(empty, torch.full(shape, -1, device=hidden.device))
    logits = linear(hidden, weight, bias).to(tiled.accumulator(hidden.dtype))  # (batch, seq, vocab)
    if mask is not None:
        logits = logits.masked_fill(~mask[:, :, None], -torch.inf)
    values, positions = logits.max(1)
    if mask is not None:
        positions = positions.masked_fill(~mask.any(1)[:, None], -1)
    return MaxLogits(values, positions)


@torch.autocast("cpu", enabled=False)
@torch.autocast("cuda", enabled=False)
def _reference_pool(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None, scale: float
) -> Tensor:
    values = _reference_max(hidden, weight, bias, mask).values
    return torch.log1p(torch.relu(scale * values))


def _tiled_max_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None) -> MaxLogits:
    packing = tiled.pack(hidden, mask)
    values, winners = tiled.tiled_max(packing, weight, bias, positions="all")
    assert winners is not None
    rows = winners.T.contiguous()  # (batch in packed order, vocab)
    if packing.source is not None:
        places = (packing.source % hidden.shape[1]).to(rows.dtype)
        flat = packing.starts[:, None] + rows
        empty = (packing.lengths == 0)[:, None]
        rows = places[flat.masked_fill(empty, 0)].masked_fill(empty, -1) if len(places) else rows.fill_(-1)
    if not hidden.shape[1]:
        rows.fill_(-1)
    return MaxLogits(_unpermuted(values.T, packing), _unpermuted(rows, packing))


def _unpermuted(by_column: Tensor, packing: tiled.Packing) -> Tensor:
    if packing.order is None:
        return by_column.contiguous()
    return by_column[packing.order.argsort()]


@torch.compiler.disable
def _tiled_pool(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None, scale: float
) -> Tensor:
    result: Tensor = _PooledHead.apply(hidden, weight, bias, mask, scale)  # type: ignore[no-untyped-call]
    return result


class _PooledHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None, scale: float
    ) -> Tensor:
        packing = tiled.pack(hidden, mask)
        needed = any(ctx.needs_input_grad[:2])
        values, winners = tiled.tiled_max(packing, weight, bias, positions="active" if needed else "none")
        if any(ctx.needs_input_grad[:3]):
            starts, source, order = packing.starts, packing.source, packing.order
            ctx.save_for_backward(hidden, weight, values, winners, starts, source, order)
            ctx.scale = scale
            ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        return torch.log1p(torch.relu(scale * _unpermuted(values.T, packing)))

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, values, winners, starts, source, order = ctx.saved_tensors
        if order is not None:
            grad = grad[order]
        slope = torch.where(values <= 0, 0.0, ctx.scale / (1 + ctx.scale * values))  # (vocab, batch)
        slope *= grad.T
        grad_hidden = grad_weight = grad_bias = None
        rows = None if winners is None else winners + starts
        if ctx.needs_input_grad[0]:
            packed = hidden.shape[0] * hidden.shape[1] if source is None else len(source)
            by_token = tiled.hidden_gradient(weight, rows, slope, packed)
            grad_hidden = _scattered(by_token, source, hidden)
        if ctx.needs_input_grad[1]:
            tokens = hidden.flatten(0, 1) if source is None else hidden.flatten(0, 1)[source]
            grad_weight = tiled.weight_gradient(tokens, rows, slope).to(ctx.dtypes[1])
        if ctx.needs_input_grad[2]:
            grad_bias = slope.sum(1).to(ctx.dtypes[2])
        return grad_hidden, grad_weight, grad_bias, None, None


def _scattered(by_token: Tensor, source: Tensor | None, hidden: Tensor) -> Tensor:
    if source is None:
        return by_token.to(hidden.dtype).view_as(hidden)
    full = torch.zeros(hidden.shape, dtype=hidden.dtype, device=hidden.device)
    full.flatten(0, 1)[source] = by_token.to(hidden.dtype)
    return full
