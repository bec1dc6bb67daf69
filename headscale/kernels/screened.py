"""The pooled head where most terms are inactive: a bfloat16 product rules them out, with a certified bound.

What the bound cannot rule out is computed in float32, so the result is that of `tiled` at a lower price on
processors with bfloat16 products.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import linear

from headscale.kernels import tiled

# Measured at (16, 128, 768, 30522), float32 product 1: a share of .015 takes .62, .14 takes .83 to .95, and the
# probe that finds a share of 1 adds .01. Fewer or narrower tokens do not pay for rounding and measuring the weight:
# (8, 32, 768, 30522) takes 1.1 to 1.2, (32, 48, 128, 8192) takes .96.
PROBE_TERMS = 256
MAX_SHARE = 0.1  # of (text, term) entries not ruled out
MIN_TOKENS, MIN_LENGTH, MIN_WIDTH, MIN_VOCAB = 1024, 64, 256, 8192
CHUNK_TERMS = 2048  # rounded, or computed in float32, together: the weight's rows stay in the cache

ROUNDOFF = 2.0**-23  # twice float32's: of a product's accumulation, in any order
RESULT_ROUNDOFF = 2.0**-7  # twice bfloat16's: of what the product returns
# Squares and products below 2**-126 may be taken as 0: what norms miss by it, and the product of denormals.
UNDERFLOW = 2.0**-62


def screened_max(packing: tiled.Packing, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """`tiled.tiled_max` for float32, with -inf at position 0 instead of maxima certified not to be positive.

    A probe of some terms comes first; where it rules out too few, this is `tiled.tiled_max`.
    """
    screen = _Screen(packing)
    if not packing.segments or screen.share(weight, bias) > MAX_SHARE:
        return tiled.tiled_max(packing, weight, bias)
    texts, vocab = len(packing.lengths), len(weight)
    possible = torch.zeros((texts, vocab), dtype=torch.bool)
    for terms in tiled.tiles(vocab, screen.tokens, at_most=CHUNK_TERMS):
        possible[:, terms] = screen.possible(weight[terms], None if bias is None else bias[terms])
    return _exact(packing, weight, bias, possible)


def available() -> bool:
    """Whether this processor multiplies in bfloat16 and accumulates in float32, through oneDNN."""
    return bool(torch.backends.mkldnn.enabled) and tiled.cpu_has_bf16()


def worthwhile(hidden: Tensor, weight: Tensor) -> bool:
    """Whether (batch, seq, d) tokens and a (vocab, d) weight are of a size at which screening pays when sparse."""
    (batch, seq, width), vocab = hidden.shape, len(weight)
    tokens = batch * seq
    return tokens >= MIN_TOKENS and seq >= MIN_LENGTH and width >= MIN_WIDTH and vocab >= MIN_VOCAB


def possible_share(packing: tiled.Packing, weight: Tensor, bias: Tensor | None) -> float:
    """Share of the probed (text, term) entries that the bound cannot rule out; above `MAX_SHARE`: no screening."""
    return _Screen(packing).share(weight, bias)


class _Screen:
    """Tokens in bfloat16, and per text the largest norms of a token and of what its rounding lost."""

    def __init__(self, packing: tiled.Packing) -> None:
        self.segments = packing.segments
        self.tokens = packing.tokens.bfloat16()
        norm, lost = _norms(packing.tokens, self.tokens)
        shape = (len(packing.lengths), 1)
        self.norm, self.lost = norm.new_zeros(shape), norm.new_zeros(shape)
        for rows, block in self._by_segment(norm[:, None]):
            self.norm[rows] = block.amax(1)
        for rows, block in self._by_segment(lost[:, None]):
            self.lost[rows] = block.amax(1)

    def share(self, weight: Tensor, bias: Tensor | None) -> float:
        """Share of entries not ruled out, at terms spread evenly over the vocabulary."""
        terms = torch.arange(0, len(weight), max(1, len(weight) // PROBE_TERMS))
        possible = self.possible(weight[terms], None if bias is None else bias[terms])
        return float(possible.float().mean())

    def possible(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """(texts, terms): False where no token's float32 logit, bias included, can be positive.

        With hb, wb the rounded operands: |h.w - hb.wb| <= |h - hb| |w| + |hb| |w - wb|, norms by
        Cauchy-Schwarz on the actual rounding; either product's accumulation adds at most d u |h| |w|.
        """
        weight = weight.float()
        short = weight.bfloat16()
        norm, lost = _norms(weight, short)
        accumulation = 2 * weight.shape[1] * ROUNDOFF
        per_term = lost + accumulation * (norm + lost)
        products = linear(self.tokens, short)  # (tokens, terms), rounded to bfloat16
        ceiling = self.lost * norm + (self.norm + self.lost) * per_term
        for rows, block in self._by_segment(products):
            best = tiled.max_over_tokens(block)[0].float()
            ceiling[rows] += best + RESULT_ROUNDOFF * best.abs()
        shift = torch.zeros(1) if bias is None else bias.float()
        ruled_out = ceiling + accumulation * shift.abs() <= -shift
        return ruled_out.logical_not_()  # so, not by `>`, since NaN rules nothing out

    def _by_segment(self, by_token: Tensor) -> list[tuple[slice, Tensor]]:
        return [
            (slice(column, column + texts), by_token[start : start + texts * length].view(texts, length, -1))
            for column, texts, start, length in self.segments
        ]


def _norms(exact: Tensor, short: Tensor) -> tuple[Tensor, Tensor]:
    """Upper bounds of the norms of rows and of what rounding took from them."""
    width = exact.shape[1]
    up, floor = 1 + width * ROUNDOFF, math.sqrt(width) * UNDERFLOW
    lost = torch.sub(exact, short)  # exact in float32
    norm, gone = (torch.linalg.vector_norm(rows, dim=1).mul_(up).add_(floor) for rows in (exact, lost))
    return norm, gone


def _exact(packing: tiled.Packing, weight: Tensor, bias: Tensor | None, possible: Tensor) -> tuple[Tensor, Tensor]:
    """Float32 maxima of the possible entries, text by text."""
    values = packing.tokens.new_full(possible.shape, -torch.inf)
    winners = torch.zeros(possible.shape, dtype=tiled.position_dtype(packing))
    for column, texts, start, length in packing.segments:
        for text in range(texts):
            own = packing.tokens[start + text * length :][:length]
            found = possible[column + text].nonzero()[:, 0]
            for terms in torch.split(found, CHUNK_TERMS) if len(found) else ():
                logits = tiled.product(own, weight[terms], None if bias is None else bias[terms])
                best, where = tiled.max_over_tokens(logits[None])
                values[column + text, terms] = best[0]
                winners[column + text, terms] = where[0].to(winners.dtype)
    return values, winners
