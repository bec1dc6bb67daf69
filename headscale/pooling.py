"""The SPLADE head, max over positions of log1p(relu(h W^T + b)), without ever holding [batch, seq, vocab].

On its own, in any trainer: `vectors = splade_pool(hidden, weight, bias, attention_mask)`, differentiable, where
`hidden` is the input of the vocabulary product (`headscale.head.load_head(model).features(**tokens)` finds it);
`SpladeHead` is the same as a module, `max_logits` the maxima and positions without gradient. `torch.compile` may
surround any of them. `choose_implementation` names what runs; the `implementation` argument decides it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear, pad

from headscale.errors import UsageError
from headscale.kernels import screened, tiled

Implementation = Literal["auto", "reference", "tiled", "screened", "triton"]

MaxOverTokens = Callable[[tiled.Packing, Tensor, Tensor | None], tuple[Tensor, Tensor]]

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
        implementation: "auto", "reference", "tiled", "screened" or "triton"; see `choose_implementation`.

    Raises:
        UsageError: shapes do not fit each other.
    """
    with torch.no_grad():
        mask = _checked_mask(hidden, weight, bias, attention_mask)
        chosen = _resolved(implementation, hidden, weight)
        if chosen == "reference":
            return _reference_max(hidden, weight, bias, mask)
        return _packed_max(hidden, weight, bias, mask, "tiled" if chosen == "screened" else chosen)


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
        implementation: "auto", "reference", "tiled", "screened" or "triton"; see `choose_implementation`.

    Returns:
        (batch, vocab) float32, float64 for float64 inputs.

    Raises:
        UsageError: shapes do not fit each other, or `scale` is not positive.
    """
    if not scale > 0:
        raise UsageError(f"`scale` must be positive, not {scale}", "a factor of 0 or less empties every text")
    mask = _checked_mask(hidden, weight, bias, attention_mask)
    chosen = _resolved(implementation, hidden, weight)
    if chosen == "reference":
        return _reference_pool(hidden, weight, bias, mask, scale)
    pooled: Tensor = _packed_pool(hidden, weight, bias, mask, scale, chosen)
    return pooled


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


def choose_implementation(hidden: Tensor, weight: Tensor) -> Literal["reference", "tiled", "screened", "triton"]:
    """Name the implementation "auto" takes.

    "reference" for few logits; else "triton" on a GPU with bfloat16 products, in half or single precision, where
    Triton is installed; else "screened" in float32 on a CPU with bfloat16 products, from the size on at which it
    pays; else "tiled".

    "screened" is as exact as "tiled": a bfloat16 pass rules out terms that certainly stay inactive, the others
    are computed in float32. It takes "tiled" itself where that rules out too few (`possible_share`), and for
    `max_logits`, which wants the inactive ones too.

    Args:
        hidden: (batch, seq, d).
        weight: (vocab, d).
    """
    logits = hidden.shape[0] * hidden.shape[1] * weight.shape[0]
    if logits <= SMALL_LOGITS:
        return "reference"
    dtype = tiled.compute_dtype(hidden, weight)
    if hidden.is_cuda and dtype != torch.float64 and find_spec("triton") and _is_recent(hidden.device):
        return "triton"
    exact_on_cpu = hidden.device.type == "cpu" and dtype == torch.float32
    return "screened" if exact_on_cpu and screened.worthwhile(hidden, weight) and screened.available() else "tiled"


def _is_recent(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)  # bfloat16 products, and a maximum that keeps NaN


@torch.no_grad()
def possible_share(
    hidden: Tensor, weight: Tensor, bias: Tensor | None = None, attention_mask: Tensor | None = None
) -> float:
    """Share of (text, term) entries that "screened" cannot rule out by its bfloat16 pass, at 256 probed terms.

    Above `headscale.kernels.screened.MAX_SHARE` it takes "tiled". Arguments as for `splade_pool`.

    Raises:
        UsageError: shapes do not fit each other, or the inputs or the processor do not allow "screened".
    """
    mask = _checked_mask(hidden, weight, bias, attention_mask)
    _resolved("screened", hidden, weight)
    return screened.possible_share(tiled.pack(hidden, mask, torch.float32), weight, bias)


class SpladeHead(nn.Module):
    """The pooled head as a module: `forward(hidden, attention_mask)` gives (batch, vocab).

    Args:
        weight: (vocab, d) projection; a parameter is kept as it is, so a tied weight stays tied.
        bias: (vocab,) or None.
        scale: positive factor on the logits.
        implementation: "auto", "reference", "tiled", "screened" or "triton".
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


def _checked_mask(hidden: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """The mask as booleans, once the shapes are seen to fit."""
    if hidden.dim() != 3 or weight.dim() != 2 or hidden.shape[2] != weight.shape[1]:
        raise UsageError(
            f"`hidden` {tuple(hidden.shape)} and `weight` {tuple(weight.shape)} do not fit each other",
            "they must be (batch, seq, d) and (vocab, d)",
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise UsageError(f"`bias` {tuple(bias.shape)} does not fit `weight`", "it must be (vocab,)")
    if mask is not None and mask.shape != hidden.shape[:2]:
        shape = tuple(mask.shape)
        raise UsageError(f"`attention_mask` {shape} does not fit `hidden`", "it must be (batch, seq)")
    return None if mask is None else mask.bool()


def _resolved(implementation: str, hidden: Tensor, weight: Tensor) -> str:
    if implementation == "auto":
        return choose_implementation(hidden, weight)
    if implementation not in get_args(Implementation):
        known = f"one of {', '.join(get_args(Implementation))}"
        raise UsageError(f"`implementation` is not known: `{implementation}`", known)
    if implementation == "triton":
        _check_triton(hidden, weight)
    if implementation == "screened":
        _check_screened(hidden, weight)
    return implementation


def _check_screened(hidden: Tensor, weight: Tensor) -> None:
    if hidden.device.type != "cpu" or not screened.available():
        raise UsageError("`screened` needs a CPU with bfloat16 products", "leave `implementation` out")
    if tiled.compute_dtype(hidden, weight) != torch.float32:
        raise UsageError("`screened` computes in float32 only", "use `tiled`")


def _check_triton(hidden: Tensor, weight: Tensor) -> None:
    here = hidden.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
    if not here or not find_spec("triton"):
        raise UsageError("`triton` needs a CUDA device and the `triton` package", "leave `implementation` out")
    if tiled.compute_dtype(hidden, weight) == torch.float64:
        raise UsageError("`triton` does not compute in float64", "use `tiled`")


def _kernels(implementation: str) -> tuple[MaxOverTokens, tiled.BagSums]:
    if implementation != "triton":
        return screened.screened_max if implementation == "screened" else tiled.tiled_max, tiled.bag_sums
    from headscale.kernels import triton_head

    return triton_head.fused_max, triton_head.bag_sums


def _reference_max(hidden: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None) -> MaxLogits:
    dtype = tiled.compute_dtype(hidden, weight)
    if not hidden.shape[1]:  # one excluded position instead of none, so that the maximum exists
        hidden = pad(hidden, (0, 0, 0, 1))
        mask = torch.zeros(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
    with torch.autocast(hidden.device.type, enabled=False):
        logits = linear(hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    logits = logits.to(tiled.accumulator(dtype))  # (batch, seq, vocab)
    if mask is not None:
        logits = logits.masked_fill(~mask[:, :, None], -torch.inf)
    values, positions = logits.max(1)
    if mask is not None:
        positions = positions.masked_fill(~mask.any(1)[:, None], -1)
    return MaxLogits(values, positions)


def _reference_pool(hidden: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None, scale: float) -> Tensor:
    return torch.log1p(torch.relu(scale * _reference_max(hidden, weight, bias, mask).values))


def _packed_max(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None, implementation: str
) -> MaxLogits:
    packing = tiled.pack(hidden, mask, tiled.compute_dtype(hidden, weight))
    with torch.autocast(hidden.device.type, enabled=False):
        values, winners = _kernels(implementation)[0](packing, weight, bias)
    empty = (packing.lengths == 0)[:, None]
    if packing.source is not None and len(packing.source):
        places = (packing.source % hidden.shape[1]).to(winners.dtype)
        winners = places[(packing.starts[:, None] + winners).masked_fill(empty, 0)]
    winners = winners.masked_fill(empty, -1)
    return MaxLogits(_unpacked(values, packing), _unpacked(winners, packing))


def _unpacked(by_place: Tensor, packing: tiled.Packing) -> Tensor:
    return by_place if packing.order is None else by_place[packing.order.argsort()]


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _packed_pool(*arguments: Any) -> Tensor:
    result: Tensor = _PooledHead.apply(*arguments)  # type: ignore[no-untyped-call]
    return result


class _PooledHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        mask: Tensor | None,
        scale: float,
        implementation: str,
    ) -> Tensor:
        packing = tiled.pack(hidden, mask, tiled.compute_dtype(hidden, weight))
        max_over_tokens, ctx.bag_sums = _kernels(implementation)
        with torch.autocast(hidden.device.type, enabled=False):
            values, winners = max_over_tokens(packing, weight, bias)
        if any(ctx.needs_input_grad[:3]):
            ctx.save_for_backward(hidden, weight, mask, values, winners)
            ctx.scale, ctx.convert = scale, implementation != "triton"
            ctx.bias_dtype = None if bias is None else bias.dtype
        return _unpacked(values, packing).mul(scale).relu_().log1p_()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, mask, values, winners = ctx.saved_tensors
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        packing = tiled.pack(hidden, mask, values.dtype if ctx.convert else hidden.dtype)
        slope = _slope(values, ctx.scale, grad if packing.order is None else grad[packing.order])
        by_token, grad_weight = tiled.gradients(
            packing,
            weight,
            winners,
            slope,
            need_hidden=need_hidden,
            need_weight=need_weight,
            bag_sums=ctx.bag_sums,
            convert=ctx.convert,
        )
        grad_hidden = None if by_token is None else _scattered(by_token, packing.source, hidden)
        grad_bias = slope.sum(0).to(ctx.bias_dtype) if need_bias else None
        return grad_hidden, grad_weight, grad_bias, None, None, None


def _slope(values: Tensor, scale: float, grad: Tensor) -> Tensor:
    """Gradient of the maxima: 0 where the term is inactive, NaN where the maximum is."""
    slope = values.mul(scale).add_(1).reciprocal_().mul_(scale)  # in place: fresh pages cost more than the sums
    return slope.mul_(grad).masked_fill_(values <= 0, 0)


def _scattered(by_token: Tensor, source: Tensor | None, hidden: Tensor) -> Tensor:
    """Packed rows back at their places in (batch, seq, d), zeros elsewhere."""
    if source is None:
        return by_token[: hidden.shape[0] * hidden.shape[1]].to(hidden.dtype).view(hidden.shape)
    full = torch.zeros(hidden.shape, dtype=hidden.dtype, device=hidden.device)
    full.view(-1, hidden.shape[2])[source] = by_token[: len(source)].to(hidden.dtype)
    return full
