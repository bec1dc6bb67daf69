"""The pooled head by vocabulary tiles: one reused scratch of logits instead of [batch, seq, vocab]."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

SCRATCH_BYTES = (
    16 << 20
)  # measured: fits the last-level cache, and tiles are still tall enough for the matmul
ROW_MULTIPLE = 16  # measured: MKL loses a quarter of its speed on odd token counts
DENSE_SHARE = 0.25  # share of active entries in a tile above which argmax reads the tile in place


class Segment(NamedTuple):
    """Consecutive texts of equal length in the packed tokens."""

    first: int  # column of the first text, in packed order
    count: int
    start: int  # packed token at which the first text begins
    length: int


class Packing(NamedTuple):
    """The allowed tokens of a batch, texts ordered by length, without the padding."""

    tokens: Tensor  # (packed, d), zero rows at the end up to a multiple of ROW_MULTIPLE
    source: Tensor | None  # (packed without the zero rows,) flat index into (batch * seq); None: the identity
    order: Tensor | None  # (batch,) text of each packed column; None: the identity
    starts: Tensor  # (batch,) first packed token of each column
    lengths: Tensor  # (batch,) allowed tokens of each column
    segments: list[Segment]
    count: int  # tokens without the zero rows


def pack(hidden: Tensor, mask: Tensor | None) -> Packing:
    """Drop the tokens the mask excludes, and put texts of equal length side by side.

    Args:
        hidden: (batch, seq, d).
        mask: (batch, seq) bool, or None for every token.
    """
    batch, seq, width = hidden.shape
    flat = hidden.reshape(batch * seq, width)
    if mask is None or bool(mask.all()):
        lengths = torch.full((batch,), seq, device=hidden.device)
        starts = torch.arange(batch, device=hidden.device) * seq
        segments = [Segment(0, batch, 0, seq)] if seq else []
        return Packing(_pad_rows(flat), None, None, starts, lengths, segments, batch * seq)
    lengths, order = mask.sum(1).sort(stable=True)
    starts = lengths.cumsum(0) - lengths
    text, position = mask[order].nonzero(as_tuple=True)
    source = order[text] * seq + position
    tokens = _pad_rows(flat.index_select(0, source))
    return Packing(tokens, source, order, starts, lengths, _segments(lengths), len(source))


def _pad_rows(rows: Tensor) -> Tensor:
    missing = -len(rows) % ROW_MULTIPLE
    return torch.cat([rows, rows.new_zeros(missing, rows.shape[1])]) if missing else rows.contiguous()


def _segments(lengths: Tensor) -> list[Segment]:
    segments, first, start = [], 0, 0
    values, counts = torch.unique_consecutive(lengths, return_counts=True)
    for length, count in zip(values.tolist(), counts.tolist(), strict=True):
        if length:
            segments.append(Segment(first, count, start, length))
        first, start = first + count, start + count * length
    return segments


def tile_height(packed: int, vocab: int, itemsize: int) -> int:
    """Terms per tile, such that the scratch stays within SCRATCH_BYTES."""
    return max(16, min(vocab, SCRATCH_BYTES // max(1, packed * itemsize) // 16 * 16))


def tiled_max(
    packing: Packing, weight: Tensor, bias: Tensor | None, *, positions: str
) -> tuple[Tensor, Tensor | None]:
    """Max over each text's tokens of token . weight + bias.

    Args:
        packing: the tokens.
        weight: (vocab, d).
        bias: (vocab,) or None.
        positions: "none", "active" (only where the maximum is not <= 0) or "all".

    Returns:
        (vocab, batch) float32 (float64 for float64) maxima in packed column order, -inf for an empty text;
        (vocab, batch) int16 or int32 index of the winner among the text's own tokens.
    """
    tokens, batch, vocab = packing.tokens, len(packing.lengths), len(weight)
    longest = max((s.length for s in packing.segments), default=0)
    values = tokens.new_full((vocab, batch), -torch.inf, dtype=accumulator(tokens.dtype))
    winners = None
    if positions != "none":
        index_dtype = torch.int16 if longest <= 32768 else torch.int32
        winners = torch.zeros((vocab, batch), dtype=index_dtype, device=tokens.device)
    if not packing.segments:
        return values, winners
    height = tile_height(len(tokens), vocab, tokens.element_size())
    scratch = tokens.new_empty(min(height, vocab), len(tokens))
    for low in range(0, vocab, height):
        high = min(low + height, vocab)
        logits = _tile_logits(scratch[: high - low], weight[low:high], tokens, bias, low)
        for segment in packing.segments:
            columns = slice(segment.first, segment.first + segment.count)
            block = _block(logits, segment)
            best = block.amax(2)
            after = best.to(values.dtype)
            if bias is not None and not _bias_inside(tokens.dtype):
                after = after + bias[low:high, None]
            values[low:high, columns] = after
            if winners is not None:
                wanted = None if positions == "all" else ~(after <= 0)  # NaN counts as wanted
                _winners_into(winners[low:high, columns], block, wanted)
    return values, winners


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype maxima and gradients are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _bias_inside(dtype: torch.dtype) -> bool:
    # In half precision the logit is rounded once, bias included; adding it after would round the
    # product alone, which is far off where product and bias cancel.
    return dtype in (torch.float16, torch.bfloat16)


def _tile_logits(out: Tensor, weight: Tensor, tokens: Tensor, bias: Tensor | None, low: int) -> Tensor:
    if bias is not None and _bias_inside(tokens.dtype):
        return torch.addmm(bias[low : low + len(weight), None], weight, tokens.T, out=out)
    return torch.mm(weight, tokens.T, out=out)


def _block(logits: Tensor, segment: Segment) -> Tensor:
    span = logits[:, segment.start : segment.start + segment.count * segment.length]
    return span.unflatten(1, (segment.count, segment.length))


def _winners_into(out: Tensor, block: Tensor, wanted: Tensor | None) -> None:
    if wanted is None or int(wanted.sum()) > DENSE_SHARE * wanted.numel():
        out.copy_(block.argmax(2))
        return
    term, column = wanted.nonzero(as_tuple=True)
    out[term, column] = block[term, column].argmax(1).to(out.dtype)


def weight_gradient(tokens: Tensor, rows: Tensor, grad: Tensor) -> Tensor:
    """Per term, the sum over texts of gradient times winning token.

    Args:
        tokens: (packed, d).
        rows: (vocab, batch) packed token that won.
        grad: (vocab, batch), zero where the term is inactive.

    Returns:
        (vocab, d) in the dtype of `grad`.
    """
    term, column = grad.ne(0).nonzero(as_tuple=True)
    ends = torch.bincount(term, minlength=len(grad)).cumsum(0)
    offsets = torch.cat([ends.new_zeros(1), ends[:-1]])
    return _bag_sums(tokens.to(grad.dtype), rows[term, column], offsets, grad[term, column])


def hidden_gradient(weight: Tensor, rows: Tensor, grad: Tensor, packed: int) -> Tensor:
    """Per packed token, the sum over the terms it won of gradient times the term's weight row.

    Args:
        weight: (vocab, d).
        rows: (vocab, batch) packed token that won.
        grad: (vocab, batch), zero where the term is inactive.
        packed: number of packed tokens.

    Returns:
        (packed, d) in the dtype of `grad`.
    """
    term, column = grad.ne(0).nonzero(as_tuple=True)
    winner, by_row = rows[term, column].sort(stable=True)
    ends = torch.bincount(winner, minlength=packed).cumsum(0)
    offsets = torch.cat([ends.new_zeros(1), ends[:-1]])
    return _bag_sums(weight.to(grad.dtype), term[by_row], offsets, grad[term, column][by_row])


def _bag_sums(table: Tensor, indices: Tensor, offsets: Tensor, factors: Tensor) -> Tensor:
    return embedding_bag(indices, table, offsets, mode="sum", per_sample_weights=factors)
