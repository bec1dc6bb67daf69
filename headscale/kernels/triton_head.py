"""The pooled head on a GPU: maximum and position in the matmul's epilogue, gradients without atomics.

Compiled for several GPUs and checked in Triton's interpreter; block sizes follow from registers and shared memory as
the compiler reports them, and are not tuned on a device (`benchmarks/gpu.py --tune` tries others).
"""
# mypy: ignore-errors
# (the kernels are Triton's language inside Python's syntax, and Triton is absent where there is no GPU)

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from headscale.kernels.tiled import Packing, accumulator, position_dtype


class Blocks(NamedTuple):
    """What one program of the maximum works on."""

    terms: int
    tokens: int
    width: int  # 128 bytes of a row: a line of the cache
    warps: int
    stages: int


# By bytes per element. Two programs then fit a Hopper multiprocessor (255 registers for 128 threads, 96 KB of shared
# memory), so that one multiplies while the other takes its maximum; 64 KB on the GPUs before it.
BLOCKS = {2: Blocks(128, 128, 64, 4, 3), 4: Blocks(128, 64, 32, 4, 3)}
BLOCK_ENTRIES = 32
LAST = tl.constexpr(2**31 - 1)


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _max_kernel(
    tokens, weight, bias, starts, lengths, values, winners,
    vocab, width, token_stride, weight_stride, column_stride,
    has_bias: tl.constexpr, even_width: tl.constexpr,
    block_terms: tl.constexpr, block_tokens: tl.constexpr, block_width: tl.constexpr,
):  # fmt: skip
    # Texts vary fastest, so that the programs sharing a tile of the weight run together.
    text = tl.program_id(0)
    terms = tl.program_id(1) * block_terms + tl.arange(0, block_terms)
    columns = tl.arange(0, block_width)
    start = tl.load(starts + text)
    length = tl.load(lengths + text).to(tl.int32)
    best = tl.full([block_terms], float("-inf"), tl.float32)
    where = tl.zeros([block_terms], tl.int32)
    # Rows past the end are the last one again, so that no load and no maximum needs a mask. Offsets need 64 bits.
    weight_rows = weight + tl.minimum(terms, vocab - 1).to(tl.int64)[:, None] * weight_stride
    for first in range(0, length, block_tokens):
        place = first + tl.arange(0, block_tokens)
        rows = start + tl.minimum(place, length - 1)
        token_rows = tokens + rows.to(tl.int64)[None, :] * token_stride
        logits = tl.zeros([block_terms, block_tokens], tl.float32)
        for low in range(0, width, block_width):
            at = low + columns
            if even_width:
                w = tl.load(weight_rows + at[None, :] * column_stride)
                h = tl.load(token_rows + at[:, None])
            else:
                w = tl.load(weight_rows + at[None, :] * column_stride, mask=(at < width)[None, :], other=0.0)
                h = tl.load(token_rows + at[:, None], mask=(at < width)[:, None], other=0.0)
            logits = tl.dot(w, h, logits, input_precision="ieee")
        block_best = tl.reduce(logits, 1, _larger)
        block_where = tl.min(tl.where(logits == block_best[:, None], place[None, :], LAST), 1)
        poisoned = block_best != block_best
        if tl.max(poisoned.to(tl.int32), 0) > 0:
            first_nan = tl.min(tl.where(logits != logits, place[None, :], LAST), 1)
            block_where = tl.where(poisoned, first_nan, block_where)
        better = (block_best > best) | (poisoned & (best == best))
        best = tl.where(better, block_best, best)
        where = tl.where(better, tl.minimum(block_where, length - 1), where)
    if has_bias:  # it commutes with the maximum in float32
        best += tl.load(bias + terms, mask=terms < vocab, other=0.0).to(tl.float32)
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
    values = torch.empty((texts, vocab), dtype=accumulator(tokens.dtype), device=tokens.device)
    winners = torch.empty_like(values, dtype=position_dtype(packing))
    weight = weight.to(tokens.dtype)
    longest = max((segment.length for segment in packing.segments), default=0)
    blocks = BLOCKS[tokens.element_size()]
    if texts and vocab:
        with torch.cuda.device_of(tokens):  # Triton launches on the current device
            _max_kernel[(texts, triton.cdiv(vocab, blocks.terms))](
                tokens, weight, None if bias is None else bias.contiguous(), packing.starts, packing.lengths,
                values, winners, vocab, width, tokens.stride(0), weight.stride(0), weight.stride(1),
                has_bias=bias is not None, even_width=width % blocks.width == 0, block_terms=blocks.terms,
                block_tokens=min(blocks.tokens, max(16, triton.next_power_of_2(longest))),
                block_width=blocks.width, num_warps=blocks.warps, num_stages=blocks.stages,
            )  # fmt: skip
    return values, winners


def bag_sums(table: Tensor, indices: Tensor, offsets: Tensor, factors: Tensor) -> Tensor:
    """Per bag, the float32 sum of factor times table row, in the order of the indices.

    Args:
        table: (rows, d) of any dtype.
        indices: (entries,) row of the table.
        offsets: (bags + 1,) first entry of each bag, and the end.
        factors: (entries,) float32.

    Returns:
        (bags, d) float32.
    """
    bags, width = len(offsets) - 1, table.shape[1]
    out = torch.empty((bags, width), dtype=torch.float32, device=table.device)
    block_width = min(256, triton.next_power_of_2(width))
    table = table if table.stride(1) == 1 else table.contiguous()
    if bags:
        with torch.cuda.device_of(table):
            _bag_kernel[(bags, triton.cdiv(width, block_width))](
                table, indices.contiguous(), offsets, factors.contiguous(), out, width, table.stride(0),
                block_entries=BLOCK_ENTRIES, block_width=block_width,
            )  # fmt: skip
    return out
