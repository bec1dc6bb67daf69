"""The pooled head by vocabulary tiles: one small tile of logits at a time instead of [batch, seq, vocab]."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, linear

# Measured on 2 cores with AVX-512 at (16, 128, 768, 30522): flat from 4 to 16 MB, a fifth slower from 32 MB on,
# where the tile leaves the last-level cache. A GPU wants tiles that fill it.
TILE_BYTES = {"cpu": 8 << 20, "cuda": 256 << 20}
ROW_MULTIPLE = 16  # measured: MKL loses a quarter of its speed on token counts that are no multiple of 16
# Weight rows whose gradients are summed together; measured on the CPU: flat from 6 to 12 MB, a half slower from
# 90 MB on, where they leave the cache.
CHUNK_BYTES = {"cpu": 12 << 20, "cuda": 64 << 20}
CHUNK_TERMS = {"cpu": 4096, "cuda": 1 << 18}
DENSE_SHARE = 0.5  # of a chunk: above it, summing zeros too is cheaper than listing the active entries

BagSums = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class Segment(NamedTuple):
    """Consecutive texts of equal length in the packed tokens."""

    column: int  # packed place of the first text
    texts: int
    start: int  # packed token at which the first text begins
    length: int


class Packing(NamedTuple):
    """The allowed tokens of a batch, texts ordered by length, without the padding."""

    tokens: Tensor  # (packed, d); zero rows at the end up to a multiple of ROW_MULTIPLE
    source: Tensor | None  # (allowed tokens,) flat index into (batch * seq); None: all of them, in order
    order: Tensor | None  # (batch,) text at each packed place; None: the identity
    starts: Tensor  # (batch,) first packed token of each packed text
    lengths: Tensor  # (batch,) allowed tokens of each packed text
    segments: list[Segment]


def pack(hidden: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Packing:
    """Drop the tokens the mask excludes, and put texts of equal length side by side.

    Args:
        hidden: (batch, seq, d).
        mask: (batch, seq) bool, or None for every token.
        dtype: what the tokens are converted to.
    """
    batch, seq, width = hidden.shape
    flat = hidden.reshape(batch * seq, width)
    if mask is None or bool(mask.all()):
        lengths = torch.full((batch,), seq, device=hidden.device)
        segments = [Segment(0, batch, 0, seq)] if batch and seq else []
        return Packing(_padded(flat.to(dtype)), None, None, lengths.cumsum(0) - seq, lengths, segments)
    lengths, order = mask.sum(1).sort(stable=True)
    text, position = mask[order].nonzero(as_tuple=True)
    source = order[text] * seq + position
    tokens = _padded(flat.index_select(0, source).to(dtype))
    return Packing(tokens, source, order, lengths.cumsum(0) - lengths, lengths, _segments(lengths))


def _padded(rows: Tensor) -> Tensor:
    missing = -len(rows) % ROW_MULTIPLE
    return torch.cat([rows, rows.new_zeros(missing, rows.shape[1])]) if missing else rows.contiguous()


def _segments(lengths: Tensor) -> list[Segment]:
    segments, column, start = [], 0, 0
    runs = torch.unique_consecutive(lengths, return_counts=True)
    for length, texts in zip(runs[0].tolist(), runs[1].tolist(), strict=True):
        if length:
            segments.append(Segment(column, texts, start, length))
        column, start = column + texts, start + texts * length
    return segments


def compute_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype of the product: the inputs' or autocast's, float32 where half precision has no fast product.

    The result of a half-precision product is rounded once, bias included; products in float32 are exact to
    float32 whatever the inputs.
    """
    device = hidden.device.type
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    half = dtype in (torch.float16, torch.bfloat16)
    if half and device == "cpu" and not (dtype == torch.bfloat16 and cpu_has_bf16()):
        return torch.float32  # measured: a CPU product in float16 takes 15 times as long as in float32
    return dtype


def cpu_has_bf16() -> bool:
    """Whether the processor has bfloat16 products."""
    tests = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(bool(getattr(torch.cpu, name, bool)()) for name in tests)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype maxima and gradients are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def tiled_max(packing: Packing, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Max over each text's tokens of token . weight + bias.

    Args:
        packing: the tokens, in the dtype of the product.
        weight: (vocab, d), any dtype and strides.
        bias: (vocab,) or None.

    Returns:
        Both (batch, vocab), texts in packed order: the maxima in float32 (float64 for float64), -inf for an
        empty text; the index of the winner among the text's own tokens, int16 or int32.
    """
    tokens, shape = packing.tokens, (len(packing.lengths), len(weight))
    values = tokens.new_full(shape, -torch.inf, dtype=accumulator(tokens.dtype))
    winners = tokens.new_zeros(shape, dtype=position_dtype(packing))
    for terms in tiles(len(weight), tokens) if packing.segments else ():
        logits = product(tokens, weight[terms], None if bias is None else bias[terms])
        for column, texts, start, length in packing.segments:
            block = logits[start : start + texts * length].view(texts, length, -1)
            best, where = max_over_tokens(block)
            values[column : column + texts, terms] = best
            winners[column : column + texts, terms] = where
        del logits, block  # before the next tile is allocated
    return values, winners


def position_dtype(packing: Packing) -> torch.dtype:
    """The smallest integers that name every place in the longest text."""
    longest = max((segment.length for segment in packing.segments), default=0)
    return torch.int16 if longest <= 1 << 15 else torch.int32


def tiles(vocab: int, tokens: Tensor, *, at_most: int = 1 << 30) -> Iterator[slice]:
    """Slices of the vocabulary whose logits of all tokens fit the tile's budget."""
    budget = TILE_BYTES.get(tokens.device.type, TILE_BYTES["cuda"])
    height = min(at_most, max(64, budget // (len(tokens) * tokens.element_size()) // 64 * 64))
    return (slice(low, min(low + height, vocab)) for low in range(0, vocab, height))


def product(tokens: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(tokens, terms): tokens . weight + bias, in the dtype of the tokens."""
    weight = weight.to(tokens.dtype).contiguous()
    bias = None if bias is None else bias.to(tokens.dtype)
    if _prefers_onednn(tokens):
        out: Tensor = torch.ops.mkldnn._linear_pointwise(tokens, weight, bias, "none", [], "")
        return out
    return linear(tokens, weight, bias)


def _prefers_onednn(tokens: Tensor) -> bool:
    # measured: on an AMD processor with AVX-512 oneDNN's float32 product takes 0.45 of the time of MKL's, which
    # linear calls (MKL keeps its own AVX-512 code to Intel's processors); in bfloat16 linear calls oneDNN, but
    # copies the bias into the result beforehand
    if tokens.device.type != "cpu" or not torch.backends.mkldnn.enabled or tokens.dtype == torch.float64:
        return False
    has_op = hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return has_op and torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def max_over_tokens(block: Tensor) -> tuple[Tensor, Tensor]:
    """Max and first position over dim 1 of (texts, length, terms)."""
    if block.device.type != "cpu":
        best, where = block.max(1)
        return best, where
    # Pooling a channels-last image is the one CPU operation that vectorises maximum *and* position over the
    # contiguous terms; measured: 10 times as fast as argmax over contiguous tokens, 25 times max over dim 1.
    image = block[:, :, None].permute(0, 3, 1, 2)  # (texts, terms, length, 1)
    best, where = torch.ops.aten.max_pool2d_with_indices(image, (block.shape[1], 1))
    return best[:, :, 0, 0], where[:, :, 0, 0]


def bag_sums(table: Tensor, indices: Tensor, offsets: Tensor, factors: Tensor) -> Tensor:
    """Per bag, the sum of factor times table row; the order is fixed, so the bits are too.

    Args:
        table: (rows, d).
        indices: (entries,) row of the table.
        offsets: (bags + 1,) first entry of each bag, and the end.
        factors: (entries,).

    Returns:
        (bags, d).
    """
    indices = indices.to(offsets.dtype)
    return embedding_bag(indices, table, offsets, mode="sum", per_sample_weights=factors, include_last_offset=True)


def gradients(
    packing: Packing,
    weight: Tensor,
    winners: Tensor,
    slope: Tensor,
    *,
    need_hidden: bool,
    need_weight: bool,
    bag_sums: BagSums = bag_sums,
    convert: bool = True,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the packed tokens and of the weight: sums over the active (text, term) entries alone.

    Args:
        packing: the tokens, in the dtype of `slope` unless `convert` is off.
        weight: (vocab, d), any dtype and strides.
        winners: (batch, vocab) index of the winner among the text's own tokens, in packed order.
        slope: (batch, vocab) gradient of the maxima, 0 where inactive, in packed order.
        need_hidden: whether the first is wanted.
        need_weight: whether the second is wanted.
        bag_sums: `bag_sums` of this module, or the GPU's.
        convert: whether `bag_sums` wants its table in the dtype of `slope`.

    Returns:
        (packed, d) in the dtype of `slope`, or None; (vocab, d) in the dtype of `weight`, or None.
    """
    starts = packing.starts.to(torch.int32)[:, None]
    active = slope.any(0).nonzero().squeeze(1)
    every_term = len(active) == len(weight)
    by_token = torch.zeros_like(packing.tokens, dtype=slope.dtype) if need_hidden else None
    by_term = (weight.new_empty if every_term else weight.new_zeros)(weight.shape) if need_weight else None
    rows: Tensor | None = None
    for chunk in _chunks(active, weight.shape[1] * slope.element_size(), every_term):
        entries = _Entries(winners[:, chunk] + starts, slope[:, chunk], bag_sums)
        if by_token is not None:
            rows = _rows(weight[chunk], slope.dtype if convert else weight.dtype, rows)
            by_token += entries.summed_by_token(rows, len(by_token))
        if by_term is not None and isinstance(chunk, slice):
            by_term[chunk].copy_(entries.summed_by_term(packing.tokens))
        elif by_term is not None:
            by_term[chunk] = entries.summed_by_term(packing.tokens).to(weight.dtype)
    return by_token, by_term


def _rows(weight: Tensor, dtype: torch.dtype, scratch: Tensor | None) -> Tensor:
    """The rows as they are, or converted into the scratch of the chunk before: fresh pages cost a third more."""
    if weight.dtype == dtype:
        return weight.contiguous()
    if scratch is None or len(scratch) < len(weight):
        return weight.to(dtype).contiguous()
    return scratch[: len(weight)].copy_(weight)


def _chunks(active: Tensor, row_bytes: int, every_term: bool) -> Iterator[slice | Tensor]:
    device = "cpu" if active.device.type == "cpu" else "cuda"
    size = max(64, min(CHUNK_TERMS[device], CHUNK_BYTES[device] // row_bytes))
    for low in range(0, len(active), size):
        yield slice(low, low + size) if every_term else active[low : low + size]


class _Entries:
    """The (text, term) entries of some terms: which token won, with what gradient."""

    def __init__(self, rows: Tensor, slope: Tensor, bag_sums: BagSums) -> None:
        self.rows, self.slope, self.bag_sums = rows, slope, bag_sums
        self.dense = int(torch.count_nonzero(slope)) > DENSE_SHARE * slope.numel()

    def summed_by_term(self, tokens: Tensor) -> Tensor:
        """(terms, d): per term, the sum over texts of slope times winning token."""
        rows, slope = self.rows.T, self.slope.T
        if self.dense:
            offsets = torch.arange(len(rows) + 1, device=rows.device) * rows.shape[1]
            return self.bag_sums(tokens, rows.reshape(-1), offsets, slope.reshape(-1))
        entry = slope.ne(0)
        return self.bag_sums(tokens, rows[entry], _offsets(entry.sum(1)), slope[entry])

    def summed_by_token(self, weight: Tensor, tokens: int) -> Tensor:
        """(tokens, d): per token, the sum over the terms it won of slope times weight row."""
        if self.dense:
            rows, slope = self.rows.reshape(-1), self.slope.reshape(-1)
            by_row, place = rows.sort(stable=True)
            terms = place % self.rows.shape[1]
        else:
            text, term = self.slope.nonzero(as_tuple=True)
            slope = self.slope[text, term]
            by_row, place = self.rows[text, term].sort(stable=True)
            terms = term[place]
        counts = torch.bincount(by_row, minlength=tokens)
        return self.bag_sums(weight, terms, _offsets(counts), slope[place])


def _offsets(counts: Tensor) -> Tensor:
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])
