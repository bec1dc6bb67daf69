"""The pooled head on a GPU: maximum and position in the matmul's epilogue, gradients without atomics.

Checked in Triton's interpreter; block sizes are a plain choice, not tuned on a device.
"""
# mypy: ignore-errors
# (the kernels are Triton's language inside Python's syntax, and Triton is absent where there is no GPU)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from headscale.kernels.tiled import Packing, accumulator, position_dtype

BLOCK_TERMS = 128
BLOCK_TOKENS = 128
BLOCK_WIDTH = {2: 64, 4: 32}  # by bytes per element: both fill two 128-byte cache lines
BLOCK_ENTRIES = 32


@triton.jit
def _max_kernel(
    tokens, weight, bias, starts, lengths, values, winners,
    vocab, width, token_stride, weight_stride, column_stride,
    has_bias: tl.constexpr, block_terms: tl.constexpr, block_tokens: tl.constexpr, block_width: tl.constexpr,
):  # fmt: skip
    # Texts vary fastest, so that the programs sharing a tile of the weight run together.
    text = tl.program_id(0)
    terms = tl.program_id(1).to(tl.int64) * block_terms + tl.arange(0, block_terms)
    columns = tl.arange(0, block_width)
    start = tl.load(starts + text)
    length = tl.load(lengths + text)
    best = tl.full([block_terms], float("-inf"), tl.float32)
    where = tl.zeros([block_terms], tl.int32)
    poisoned = tl.zeros([block_terms], tl.int32)
    shift = tl.zeros([block_terms], tl.float32)
    if has_bias:
        shift = tl.load(bias + terms, mask=terms < vocab, other=0.0).to(tl.float32)
    for first in range(0, length, block_tokens):
        place = first + tl.arange(0, block_tokens)
        rows = (start + place).to(tl.int64)
        logits = tl.zeros([block_terms, block_tokens], tl.float32)
        for low in range(0, width, block_width):
            at = low + columns
            w = tl.load(
                weight + terms[:, None] * weight_stride + at[None, :] * column_stride,
                mask=(terms < vocab)[:, None] & (at < width)[None, :],
                other=0.0,
            )
            h = tl.load(
                tokens + rows[None, :] * token_stride + at[:, None],
                mask=(place < length)[None, :] & (at < width)[:, None],
                other=0.0,
            )
            logits = tl.dot(w, h, logits, input_precision="ieee")
        logits += shift[:, None]
        allowed = (place < length)[None, :]
        nan = logits != logits  # maxima on a GPU ignore NaN: carry it beside them, at its first position
        key = tl.where(nan, float("inf"), logits)
        key = tl.where(allowed, key, float("-inf"))
        block_best, block_where = tl.max(key, 1, return_indices=True)
        better = block_best > best
        best = tl.where(better, block_best, best)
        where = tl.where(better, first + block_where, where)
        poisoned = tl.maximum(poisoned, tl.max((nan & allowed).to(tl.int32), 1))
    best = tl.where(poisoned > 0, float("nan"), best)
    out = text.to(tl.int64) * vocab + terms
    tl.store(values + out, best, mask=terms < vocab)
    tl.store(winners + out, where.to(winners.dtype.element_ty), mask=terms < vocab)


@triton.jit
def _bag_kernel(
    table, indices, offsets, factors, out, width, table_stride,
    block_entries: tl.constexpr, block_width: tl.constexpr,
):  # fmt: skip
    bag = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * block_width + tl.arange(0, block_width)
    begin = tl.load(offsets + bag)
    end = tl.load(offsets + bag + 1)
    total = tl.zeros([block_width], tl.float32)
    for first in range(begin, end, block_entries):
        entry = first + tl.arange(0, block_entries)
        factor = tl.load(factors + entry, mask=entry < end, other=0.0)
        row = tl.load(indices + entry, mask=entry < end, other=0).to(tl.int64)
        rows = tl.load(
            table + row[:, None] * table_stride + columns[None, :],
            mask=(entry < end)[:, None] & (columns < width)[None, :],
            other=0.0,
        )
        total += tl.sum(rows.to(tl.float32) * factor[:, None], 0)
    tl.store(out + bag * width + columns, total, mask=columns < width)


def fused_max(packing: Packing, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """The same contract as `tiled.tiled_max`, for float32, float16 and bfloat16, in one kernel."""
    tokens = packing.tokens
    texts, (vocab, width) = len(packing.lengths), weight.shape
    longest = max((segment.length for segment in packing.segments), default=0)
    values = torch.empty((texts, vocab), dtype=accumulator(tokens.dtype), device=tokens.device)
    winners = torch.empty_like(values, dtype=position_dtype(packing))
    weight = weight.to(tokens.dtype)
    if texts and vocab:
        block_tokens = min(BLOCK_TOKENS, max(16, triton.next_power_of_2(longest)))
        _max_kernel[(texts, triton.cdiv(vocab, BLOCK_TERMS))](
            tokens, weight, bias, packing.starts, packing.lengths, values, winners,
            vocab, width, tokens.stride(0), weight.stride(0), weight.stride(1),
            has_bias=bias is not None, block_terms=BLOCK_TERMS, block_tokens=block_tokens,
            block_width=BLOCK_WIDTH[tokens.element_size()], num_warps=8,
        )  # fmt: skip
    return values, winners


def bag_sums(table: Tensor, indices: Tensor, offsets: Tensor, factors: Tensor) -> Tensor:
    """Per bag, the float32 sum of factor times table row, in the order of the indices.

    Args:
        table: (rows, d), rows contiguous.
        indices: (entries,) row of the table.
        offsets: (bags + 1,) first entry of each bag, and the end.
        factors: (entries,) float32.

    Returns:
        (bags, d) float32.
    """
    bags, width = len(offsets) - 1, table.shape[1]
    out = torch.empty((bags, width), dtype=torch.float32, device=table.device)
    block_width = min(256, triton.next_power_of_2(width))
    if bags:
        _bag_kernel[(bags, triton.cdiv(width, block_width))](
            table, indices, offsets, factors, out, width, table.stride(0),
            block_entries=BLOCK_ENTRIES, block_width=block_width,
        )  # fmt: skip
    return out
