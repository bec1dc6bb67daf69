"""Statistics of the pooled head's outputs, for every constant from one forward pass.

log1p(relu(.)) is monotone, so the representation at constant a is log1p(relu(a m)) where m is the largest logit of
a term over the text: `observe` keeps m, and everything else here is a pure function of what it kept.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from headscale.errors import HeadscaleError, UnreadableError, UsageError
from headscale.records import (
    ROW_NORM_QUANTILES,
    GradientNorms,
    LogitStatistics,
    OutputStatistics,
    ScaleCurve,
    SideStatistics,
)

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from headscale.head import LoadedHead
    from headscale.texts import Pair

QUERY_LENGTH, DOCUMENT_LENGTH = 32, 128
CANDIDATES = 32  # N of the loss at step 0, fixed so that losses compare across backbones
FP16_MAX = 65_504.0
_BF16_SPACING = 2.0**-7  # distance of neighbouring bf16 numbers, relative to the lower end of their binade
_COMMON_TERMS = 10
_WIDELY_SHARED = 0.9
_SAMPLED_TOKENS = 256  # rows of raw logits for the logit statistics: 256 x V numbers pin the quantiles to ~1 %
_HISTOGRAM_BINS = 10


@dataclass(frozen=True)
class Side:
    """What one side's texts kept from the forward pass.

    Attributes:
        largest: (texts, vocab) float32, the largest logit of each term over the text; -inf for a text without tokens.
        positions: (texts, vocab) integer, where it was.
        special: (texts, length) bool, which positions hold special tokens (padding is never a position).
        lengths: (texts,) positions that are not padding.
    """

    largest: Tensor
    positions: Tensor
    special: Tensor
    lengths: Tensor


@dataclass(frozen=True)
class Observation:
    """One forward pass over query-document pairs, enough for every constant."""

    query: Side
    document: Side
    bias: Tensor | None  # (vocab,) as part of the logits, needed only where it is kept while the matrix is scaled
    logits: LogitStatistics
    batch_size: int


@dataclass(frozen=True)
class Encoding:
    """How texts are cut and batched for a measurement, in tokens and texts."""

    query_length: int = QUERY_LENGTH
    document_length: int = DOCUMENT_LENGTH
    batch_size: int = CANDIDATES


DEFAULT_ENCODING = Encoding()


def observe(
    loaded: LoadedHead,
    tokenizer: Any,
    pairs: Sequence[Pair],
    encoding: Encoding = DEFAULT_ENCODING,
    *,
    on_batch: Callable[[int, int], None] | None = None,
) -> Observation:
    """Run a model once over query-document pairs and keep each term's largest logit; the model stays as it was.

    Args:
        loaded: the head of a model in memory.
        tokenizer: the model's tokenizer.
        pairs: at least one full batch of pairs; an incomplete last batch is left out.
        encoding: lengths in tokens, special ones included, and N, the in-batch candidates of the loss.
        on_batch: called with (batches done, batches in all).

    Raises:
        UsageError: fewer pairs than one batch, or a batch without in-batch negatives.
        HeadscaleError: the texts do not fit the model.
        UnreadableError: the texts hold no tokens, or the model puts out NaN.
    """
    import torch

    from headscale.head import undisturbed

    batches = _batches(len(pairs), encoding.batch_size)
    pairs = pairs[: batches * encoding.batch_size]
    sides: dict[str, list[Side]] = {"query": [], "document": []}
    sampled: list[Tensor] = []
    with undisturbed(loaded.model), torch.no_grad():
        for i in range(batches):
            part = pairs[i * encoding.batch_size : (i + 1) * encoding.batch_size]
            for name, texts, length in _sides(part, encoding):
                side, features = _pooled(loaded, tokenizer, texts, length)
                sides[name].append(side)
                sampled.append(_sample(features, _SAMPLED_TOKENS // (2 * batches) + 1))
            if on_batch:
                on_batch(i + 1, batches)
        features = torch.cat(sampled)
        if not len(features):
            raise UnreadableError("the texts hold no tokens at all", hint="give texts with words in them")
        logits = _logit_statistics(loaded, features)
    bias = None if loaded.bias is None else loaded.bias.detach().float().cpu() * loaded.head.factor
    query, document = (_joined(sides[name]) for name in ("query", "document"))
    _check_finite(loaded, query, document)
    return Observation(query, document, bias, logits, encoding.batch_size)


def _batches(pairs: int, batch_size: int) -> int:
    """How many full batches there are; the loss needs one, and a second text in it."""
    if batch_size < 2:
        raise UsageError(
            f"a batch of {batch_size} has no other document to tell the right one from",
            hint="take a batch of 2 or more",
        )
    if pairs < batch_size:
        raise UsageError(
            f"{pairs} pairs are fewer than one batch of {batch_size}",
            hint=f"give at least {batch_size} pairs, or a smaller batch",
        )
    return pairs // batch_size


def _sides(part: Sequence[Pair], encoding: Encoding) -> Iterator[tuple[str, list[str], int]]:
    yield "query", [p.query for p in part], encoding.query_length
    yield "document", [p.document for p in part], encoding.document_length


def tokenize(tokenizer: Any, texts: Sequence[str], length: int, device: Any) -> tuple[dict[str, Tensor], Tensor]:
    """Token batch for a model, and which positions are special tokens, (batch, seq) bool; padding is not one.

    Padding is on the right, where it belongs for texts that are encoded; the tokenizer stays as it was.
    """
    import torch

    with _borrowed(tokenizer):
        batch = tokenizer(
            list(texts),
            truncation=True,
            max_length=length,
            padding=True,
            return_tensors="pt",
            return_attention_mask=True,
            return_special_tokens_mask=True,
        )
    if not batch["input_ids"].shape[1]:  # nothing but empty texts, and no special tokens: one masked position
        batch = {k: torch.zeros(len(texts), 1, dtype=torch.long) for k in batch}
    special = batch.pop("special_tokens_mask").bool() & batch["attention_mask"].bool()
    return {k: v.to(device) for k, v in batch.items()}, special


@contextlib.contextmanager
def _borrowed(tokenizer: Any) -> Iterator[None]:
    """Right padding with some token inside; padding, truncation and tokens as before on leaving."""
    side, nameless = tokenizer.padding_side, tokenizer.pad_token is None
    backend = getattr(tokenizer, "backend_tokenizer", None)
    padding, truncation = (backend.padding, backend.truncation) if backend is not None else (None, None)
    tokenizer.padding_side = "right"
    if nameless:  # causal models often have none; the mask hides what it is
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    try:
        yield
    finally:
        tokenizer.padding_side = side
        if nameless:
            tokenizer.pad_token = None
        if backend is not None:
            backend.enable_padding(**padding) if padding else backend.no_padding()
            backend.enable_truncation(**truncation) if truncation else backend.no_truncation()


def _features(loaded: LoadedHead, batch: dict[str, Tensor], tokenizer: Any) -> Tensor:
    """The features of a token batch; what does not fit the model is said in words."""
    width, limit = batch["input_ids"].shape[1], getattr(tokenizer, "model_max_length", None)
    if limit and width > limit:
        raise HeadscaleError(
            f"texts of {width} tokens are longer than the {limit} that `{loaded.head.architecture}` takes",
            hint=f"measure with a `--document-length` of at most {limit}",
        )
    try:
        return loaded.features(**batch)
    except (IndexError, RuntimeError) as error:
        positions = getattr(loaded.model.config, "max_position_embeddings", None)
        if isinstance(error, RuntimeError) and not (positions and width > positions):
            raise  # not of the texts: out of memory, say
        raise HeadscaleError(
            f"`{loaded.head.architecture}` cannot take these tokens: {error}",
            hint="shorten the texts with `--document-length`, or check that the tokenizer belongs to the model",
        ) from error


def _pooled(loaded: LoadedHead, tokenizer: Any, texts: Sequence[str], length: int) -> tuple[Side, Tensor]:
    import torch

    from headscale.pooling import max_logits

    batch, special = tokenize(tokenizer, texts, length, loaded.weight.device)
    features = _features(loaded, batch, tokenizer)
    mask = batch["attention_mask"].bool()
    found = max_logits(features, loaded.weight, loaded.bias, mask)
    largest = _capped(found.values.float() * loaded.head.factor, loaded.head.softcap)
    lengths = mask.sum(1).cpu()
    return Side(largest.cpu(), found.positions.to(torch.int16).cpu(), special, lengths), features[mask]


def _capped(logits: Tensor, softcap: float | None) -> Tensor:
    """The logits under a softcap, which is monotone: the largest stays the largest."""
    return logits if softcap is None else softcap * (logits / softcap).tanh()


def _sample(features: Tensor, count: int) -> Tensor:
    """Evenly spaced rows, so that the sample is a pure function of the batch."""
    import torch

    return features[torch.linspace(0, len(features) - 1, min(count, len(features))).long()].detach()


def _joined(parts: Sequence[Side]) -> Side:
    import torch
    from torch.nn.functional import pad

    longest = max(p.special.shape[1] for p in parts)
    return Side(
        torch.cat([p.largest for p in parts]),
        torch.cat([p.positions for p in parts]),
        torch.cat([pad(p.special, (0, longest - p.special.shape[1])) for p in parts]),
        torch.cat([p.lengths for p in parts]),
    )


def _check_finite(loaded: LoadedHead, *sides: Side) -> None:
    bad = sum(int(side.largest.isnan().sum()) for side in sides)
    if bad:
        raise UnreadableError(
            f"`{loaded.head.architecture}` puts out {bad} logits that are not numbers",
            hint="the checkpoint is damaged or diverged in training: use an earlier one",
        )


def _logit_statistics(loaded: LoadedHead, features: Tensor) -> LogitStatistics:
    import numpy as np

    logits = features.float() @ loaded.weight.float().T
    if loaded.bias is not None:
        logits = logits + loaded.bias.float()
    logits = _capped(logits * loaded.head.factor, loaded.head.softcap)
    units = features.float().cpu().double()
    norms = units.norm(dim=1)
    units = units / norms[:, None].clamp_min(1e-12)
    count = len(units)
    cosine = (units.sum(0).square().sum() - count) / (count * (count - 1)) if count > 1 else math.nan
    values = logits.cpu().numpy().reshape(-1)
    mean, sd, above = values.mean(dtype=np.float64), values.std(dtype=np.float64), (values > 0).mean()
    return LogitStatistics(
        mean=float(mean),
        sd=float(sd),
        quantiles=_quantiles(values),
        above_zero=float(above),
        hidden_cosine=float(cosine),
        hidden_norm=float(norms.mean()),
        tokens=count,
    )


def _quantiles(values: np.ndarray) -> tuple[float, ...]:
    """The values nearest to `ROW_NORM_QUANTILES` percent; reorders them, () of none."""
    import numpy as np

    if not len(values):
        return ()
    places = np.round(np.array(ROW_NORM_QUANTILES) / 100 * (len(values) - 1)).astype(int)
    values.partition(places)  # in place: a sort would take three times the memory
    return tuple(float(values[i]) for i in places)


# --- at one constant -----------------------------------------------------------------------------------------------


def representation(largest: Tensor, scale: float, *, shift: float = 0.0, kept_bias: Tensor | None = None) -> Tensor:
    """log1p(relu(a (m + shift))), or with the bias kept log1p(relu(a (m - b) + b)).

    Args:
        largest: (texts, vocab) the largest logits m at constant 1.
        scale: the constant a.
        shift: added to the logits before the scale.
        kept_bias: (vocab,) the bias b where the policy is to keep it.
    """
    if kept_bias is not None:
        logits = scale * (largest - kept_bias + shift) + kept_bias
    else:
        logits = scale * (largest + shift) if shift else scale * largest
    return logits.relu_().log1p_()  # in place: of fifty constants, fresh pages cost more than the logarithms


def output_statistics(
    seen: Observation,
    scale: float = 1.0,
    *,
    scale_bias: bool = True,
    shift: float = 0.0,
    token: Callable[[int], str] = str,
) -> OutputStatistics:
    """Everything the pooled head shows at one constant.

    Args:
        seen: what `observe` kept.
        scale: the constant on the logits.
        scale_bias: whether the bias is scaled with the matrix.
        shift: added to the bias before the scale.
        token: the string of a vocabulary id, for the most common terms.
    """
    kept = None if scale_bias else seen.bias
    queries = representation(seen.query.largest, scale, shift=shift, kept_bias=kept)
    documents = representation(seen.document.largest, scale, shift=shift, kept_bias=kept)
    scores = _score_statistics(queries, documents, seen.batch_size)
    share = (documents > 0).float().mean(0)  # (vocab,) share of documents in which a term is active
    top = share.argsort(descending=True, stable=True)[:_COMMON_TERMS].tolist()
    active = max(1, int((share > 0).sum()))
    spacing = abs(scores["score_mean"]) * _BF16_SPACING
    return OutputStatistics(
        scale=scale,
        shift=shift,
        candidates=seen.batch_size,
        batches=len(queries) // seen.batch_size,
        query=_side_statistics(queries, seen.query),
        document=_side_statistics(documents, seen.document),
        flops_cost=float(((queries > 0).float().mean(0) * share).sum()),
        saturation=int((share >= _WIDELY_SHARED).sum()) / active,
        coverage=float((share > 0).float().mean()),
        common_terms=tuple((token(i), float(share[i])) for i in top if share[i] > 0),
        fp16_headroom=FP16_MAX / scores["score_max"] if scores["score_max"] > 0 else math.inf,
        bf16_resolution=spacing / scores["score_sd"] if scores["score_sd"] > 0 else math.inf,
        non_finite=int((~queries.isfinite()).sum()) + int((~documents.isfinite()).sum()),
        **scores,
    )


def _score_statistics(queries: Tensor, documents: Tensor, batch_size: int) -> dict[str, float]:
    """Means over batches of in-batch scores; the largest score over all."""
    from headscale.observation import score_statistics

    found: list[dict[str, float]] = []
    for start in range(0, len(queries), batch_size):
        scores = queries[start : start + batch_size] @ documents[start : start + batch_size].T
        values = {k: float(v) for k, v in score_statistics(scores).items()}
        found.append({**values, "score_max": float(scores.max())})
    mean = {key: sum(f[key] for f in found) / len(found) for key in found[0]}
    mean["score_max"] = max(f["score_max"] for f in found)
    mean["loss"] = mean["loss_over_ln_n"] * math.log(batch_size)
    return mean


def _side_statistics(reps: Tensor, side: Side) -> SideStatistics:
    from headscale.observation import cosine

    dims = (reps > 0).sum(1).float()
    quantiles = dims.quantile(reps.new_tensor([0.05, 0.5, 0.95])).tolist()
    total = float(reps.sum())
    return SideStatistics(
        texts=len(reps),
        active_dims=float(dims.mean()),
        active_dims_p5=quantiles[0],
        active_dims_p50=quantiles[1],
        active_dims_p95=quantiles[2],
        empty=float((dims == 0).float().mean()),
        mean_weight=total / reps.numel(),
        active_mean_weight=total / max(1.0, float(dims.sum())),
        max_weight=float(reps.max()),
        l1=total / len(reps),
        l2=float(reps.norm(dim=1).mean()),
        flops_reg=float(reps.mean(0).square().sum()),
        mean_cosine=cosine(reps),
        weight_quantiles=_quantiles(reps[reps > 0].numpy()),
        **_winners(reps, side, total),
    )


def _winners(reps: Tensor, side: Side, total: float) -> dict[str, Any]:
    """Who wins the max: the pooled mass by position, and the share of it that special tokens take."""
    import torch

    mass = torch.zeros(side.special.shape)  # (texts, length)
    positions = side.positions.long().clamp_min(0)
    mass.scatter_add_(1, positions, reps)
    whole = total or 1.0
    tenth = (torch.arange(mass.shape[1])[None] * _HISTOGRAM_BINS) // side.lengths[:, None].clamp_min(1)
    histogram = torch.zeros(_HISTOGRAM_BINS)
    histogram.scatter_add_(0, tenth.clamp_max(_HISTOGRAM_BINS - 1).flatten(), mass.flatten())
    return {
        "special_share": float(mass[side.special].sum()) / whole,
        "first_position_share": float(mass[:, 0].sum()) / whole,
        "position_histogram": tuple((histogram / whole).tolist()),
    }


# --- over all constants --------------------------------------------------------------------------------------------


def scale_curve(
    seen: Observation, scales: Sequence[float], *, scale_bias: bool = True, shift: float = 0.0
) -> ScaleCurve:
    """The statistics that targets are made of, at each constant; no further forward pass.

    Args:
        seen: what `observe` kept.
        scales: the constants, in order.
        scale_bias: whether the bias is scaled with the matrix.
        shift: added to the bias before the scale.
    """
    narrowed = only_active(seen, shift) if scale_bias else seen
    vocab = seen.query.largest.shape[1]
    return curve_of([curve_point(narrowed, vocab, a, scale_bias, shift) for a in scales], scales)


def curve_of(points: Sequence[dict[str, Any]], scales: Sequence[float]) -> ScaleCurve:
    """The points of `curve_point`, one for each constant, by column."""
    columns = {key: tuple(point[key] for point in points) for key in points[0]}
    return ScaleCurve(scale=tuple(float(a) for a in scales), **columns)


def only_active(seen: Observation, shift: float) -> Observation:
    """The same observation without the terms that are active in no text: a positive factor never wakes one."""
    awake = (seen.query.largest.amax(0) + shift > 0) | (seen.document.largest.amax(0) + shift > 0)
    if awake.float().mean() > 0.5:  # the copy would cost more than it saves
        return seen
    query = replace(seen.query, largest=seen.query.largest[:, awake])
    document = replace(seen.document, largest=seen.document.largest[:, awake])
    return replace(seen, query=query, document=document, bias=None)


def curve_point(seen: Observation, vocab: int, scale: float, scale_bias: bool, shift: float) -> dict[str, Any]:
    """One point of `scale_curve`; `vocab` is the full vocabulary where `seen` holds the active terms only."""
    from headscale.observation import cosine

    kept = None if scale_bias else seen.bias
    queries = representation(seen.query.largest, scale, shift=shift, kept_bias=kept)
    documents = representation(seen.document.largest, scale, shift=shift, kept_bias=kept)
    scores = _score_statistics(queries, documents, seen.batch_size)
    total, active = float(documents.sum()), float((documents > 0).sum())
    return {
        "loss_over_ln_n": scores["loss_over_ln_n"],
        "mean_weight": total / (len(documents) * vocab),
        "l1": total / len(documents),
        "active_mean_weight": total / max(1.0, active),
        "active_dims": active / len(documents),
        "cosine": cosine(documents),
        "score_sd": scores["score_sd"],
        "score_margin": scores["score_margin"],
        "flops_reg_query": float(queries.mean(0).square().sum()),
        "flops_reg_document": float(documents.mean(0).square().sum()),
    }


# --- gradients -----------------------------------------------------------------------------------------------------


def gradient_norms(
    loaded: LoadedHead,
    tokenizer: Any,
    pairs: Sequence[Pair],
    encoding: Encoding = DEFAULT_ENCODING,
) -> GradientNorms:
    """Gradient norms of head and encoder for the contrastive loss of the first batch, in evaluation mode.

    The head's is taken on copies of its matrix and bias, so that a tied embedding's own gradient counts with the
    encoder's; nothing is accumulated in the model.
    """
    import torch

    from headscale.head import undisturbed
    from headscale.objective import info_nce
    from headscale.pooling import splade_pool

    part = pairs[: encoding.batch_size]
    weight = loaded.weight.detach().clone().requires_grad_()
    bias = None if loaded.bias is None else loaded.bias.detach().clone().requires_grad_()
    own = [t for t in (weight, bias) if t is not None]
    with undisturbed(loaded.model), trainable(loaded.model), torch.enable_grad():
        reps = []
        for _, texts, length in _sides(part, encoding):
            batch, _ = tokenize(tokenizer, texts, length, weight.device)
            features, mask = _features(loaded, batch, tokenizer), batch["attention_mask"].bool()
            rep = splade_pool(features, weight, bias, mask, scale=loaded.head.factor)
            cap = loaded.head.softcap
            reps.append(rep if cap is None else _capped(rep.expm1(), cap).log1p())
        loss = info_nce(reps[0] @ reps[1].T)
        encoder: list[Tensor] = [p for p in loaded.model.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(loss, own + encoder, allow_unused=True)
    head, rest = gradients[: len(own)], gradients[len(own) :]
    return GradientNorms(head=_norm(head), encoder=_norm(rest))


def _norm(gradients: Sequence[Tensor | None]) -> float:
    import torch

    return math.hypot(*(float(torch.linalg.vector_norm(g.float())) for g in gradients if g is not None))


class trainable:
    """Every floating parameter requires a gradient inside, and what it required before on leaving."""

    def __init__(self, model: Any) -> None:
        self.before = {p: p.requires_grad for p in model.parameters()}

    def __enter__(self) -> None:
        for parameter in self.before:
            parameter.requires_grad_(parameter.is_floating_point())

    def __exit__(self, *_: object) -> None:
        for parameter, required in self.before.items():
            parameter.requires_grad_(required)
