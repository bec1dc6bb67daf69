"""The frozen records that every result travels in: plain numbers, strings and tuples, and nothing that computes."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any


def plain(value: Any) -> Any:
    """The value as JSON can hold it: records become dicts, tuples lists, non-finite numbers None."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


class Record:
    """Base of all records: `to_dict()` gives plain JSON values under the names of the fields."""

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values; non-finite numbers become None."""
        result: dict[str, Any] = plain(self)
        return result


# --- the head --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Head(Record):
    """Where the MLM head is. Names are those of the model's tensors and modules, not of a file.

    `logits = factor * (features @ matrix.T + bias)`, then `softcap * tanh(. / softcap)` where there is one.
    """

    model_type: str
    architecture: str
    vocab_size: int
    width: int  # columns of the matrix
    matrix: tuple[str, ...]  # one name, or the blocks that are joined along the width
    bias: str | None  # the live one
    norm: str | None  # the affine norm that feeds the product, if one does
    norm_kind: str | None  # "affine", or "one_plus" where the gain is 1 + weight
    norm_in_backbone: bool  # the norm is the encoder's last one: folding there scales its output too
    tied_to: str | None  # the input embedding's name where the matrix is the same tensor
    factor: float = 1.0
    softcap: float | None = None


# --- training: one step, the ranking at the end, the whole run -------------------------------------------


@dataclass(frozen=True)
class StepRecord(Record):
    """What one optimizer step showed, before its update unless said otherwise; floats are neither rounded nor
    replaced. None: not observed on this step, or undefined (a cosine needs two texts that are not empty).
    """

    step: int  # optimizer steps done before this one
    lr: float  # of the encoder, as used by this step
    head_lr: float  # of the untied head; the encoder's where the head is tied
    lambda_query: float  # as used by this step
    lambda_document: float
    # the loss and its parts
    loss: float  # ranking_loss + weighted_reg_query + weighted_reg_document
    ranking_loss: float
    reg_query: float  # the configured regularizer, unweighted
    reg_document: float
    weighted_reg_query: float  # lambda_query * reg_query
    weighted_reg_document: float
    regularizer_share: float  # weighted regularizers over the loss
    loss_over_ln_n: float  # in-batch contrastive loss at the temperature, over ln N; 1 is chance
    # scores, in batch, before the temperature
    batch_accuracy: float  # share of queries whose positive beats every other candidate; ties count against
    score_mean: float
    score_sd: float
    score_margin: float  # mean positive score less mean score of the other candidates
    # representations; documents are positives and hard negatives together
    active_dims_query: float  # mean number per text
    active_dims_document: float
    empty_query: float  # share of texts
    empty_document: float
    mean_weight_query: float  # over all terms and texts
    mean_weight_document: float
    max_weight_query: float
    max_weight_document: float
    flops_reg_query: float  # sum over terms of (mean activation)^2
    flops_reg_document: float
    flops_cost: float  # sum over terms of p_q p_d, expected multiplications per pair
    cosine_query: float | None  # mean over pairs of different texts
    cosine_document: float | None
    coverage: float  # share of terms active in any text of the batch
    saturation: float  # share of terms active in every text of the batch
    # gradients and the update
    grad_norm: float  # before clipping, after unscaling
    grad_norm_head: float
    grad_norm_encoder: float
    clip_factor: float  # what the gradients were multiplied by
    skipped: bool  # the fp16 scaler found a non-finite gradient and left the weights alone
    update_ratio: float | None  # ||dW|| / ||W|| of the head's matrix, this step
    head_norm: float  # Frobenius, after the step
    head_norm_drift: float  # head_norm over that at the start of training
    loss_scale: float | None  # of the fp16 scaler
    # the machine
    memory: int  # peak bytes: of the device, or resident on a CPU
    seconds: float
    non_finite: int  # how many of the numbers above are not finite
    # None in logs of 0.1.0 and before
    score_within_sd: float | None = None  # of one query's scores about their mean, pooled over the queries
    score_common: float | None = None  # share of that variance that is the same for every query; 1: none is its own


@dataclass(frozen=True)
class RankMetrics(Record):
    """Each query's own document among all documents; ties are broken against us (worst rank)."""

    queries: int
    candidates: int
    mrr_at_10: float | None  # None where there are fewer than 10 candidates
    recall_at_1: float
    mean_rank: float
    chance_mrr_at_10: float | None  # of a random order
    active_dims_query: float
    active_dims_document: float
    flops_cost: float
    cosine_document: float | None
    ndcg_at_10: float | None = None  # 1 / log2(1 + rank) of the one relevant document; None as MRR@10


@dataclass(frozen=True)
class RunEnd(Record):
    """The end of a run in numbers, for labels that are given from the end alone."""

    steps: int
    lr_sum: float  # of the steps that were run
    lr_sum_share: float  # of the whole horizon's
    non_finite_steps: int  # steps with a number that is not finite
    skipped_steps: int
    tail_steps: int  # the last tenth of the run, at least one step
    tail: dict[str, float | None]  # mean of every number of the step records over these
    ranking: RankMetrics | None


@dataclass(frozen=True)
class TrainingRun(Record):
    """One training: its configuration, every step, and how it ended."""

    config: dict[str, Any]
    status: str  # "finished", "stopped" (by the caller), "non-finite" (weights are NaN) or "interrupted"
    steps: tuple[StepRecord, ...]
    end: RunEnd
    device: str
    device_reason: str
    candidates: int  # N of the contrastive loss
    pairs: int
    vocab_size: int
    width: int
    head_tied: bool
    head_norm_start: float  # after the constant was applied
    head_parameters: int
    encoder_parameters: int  # without those of the head
    seconds: float
    processes: int = 1  # that shared every batch
    texts_at_once: int | None = None  # where memory ran short of what was configured; the gradients are the same


SAMENESS_EXCLUDES = frozenset({"memory", "seconds", "device_reason", "texts_at_once"})
"""Fields of these records that may differ between two runs of the same seed on the same device."""


# --- weights ------------------------------------------------------------------------------------------------------

ROW_NORM_QUANTILES = (0, 1, 5, 10, 25, 50, 75, 90, 95, 99, 100)


@dataclass(frozen=True)
class WeightStatistics(Record):
    """Norms of the MLM head, computed in float64 from the stored values. Norms are L2 throughout."""

    frobenius: float  # of the whole matrix
    rms: float  # frobenius / sqrt(rows x width)
    row_norm_mean: float
    row_norm_sd: float
    row_norm_min: float
    row_norm_max: float
    row_norm_quantiles: tuple[float, ...]  # at ROW_NORM_QUANTILES percent
    special_rows: int
    special_row_norm_mean: float | None
    unused_rows: int  # `[unused..]` entries and rows beyond the tokenizer's last id
    unused_row_norm_mean: float | None
    zero_rows: int
    bias_norm: float | None
    bias_mean: float | None
    bias_min: float | None
    bias_max: float | None
    gain_mean: float | None  # of the feeding norm
    gain_rms: float | None
    effective_norm: float  # Frobenius norm of matrix x diag(gain); the plain one where no norm feeds it
    spectral_norm: float | None = None
    stable_rank: float | None = None  # frobenius^2 / spectral_norm^2
    singular_values: tuple[float, ...] | None = None  # descending


@dataclass(frozen=True)
class VocabularyStatistics(Record):
    """What kind of vocabulary the terms come from; the rival explanation of arXiv 2607.00004."""

    size: int
    special: int
    unused: int
    cased: bool
    uppercase_share: float  # terms with an upper-case letter
    case_variant_share: float  # terms that equal another term but for case
    space_variant_share: float  # terms that equal another term but for the word-start or continuation mark
    punctuation_variant_share: float  # terms that equal another term but for punctuation around it
    variant_share: float  # terms that equal another term but for any of these


# --- outputs ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SideStatistics(Record):
    """The pooled representations of all queries, or of all documents."""

    texts: int
    active_dims: float  # mean number of terms above zero per text
    active_dims_p5: float
    active_dims_p50: float
    active_dims_p95: float
    empty: float  # share of texts without any active term
    mean_weight: float  # over all terms and texts
    active_mean_weight: float  # over the active ones
    max_weight: float
    l1: float  # mean over texts of the sum of weights
    l2: float  # mean over texts of the Euclidean norm
    flops_reg: float  # sum over terms of (mean activation)^2
    mean_cosine: float | None  # over pairs of different texts; None where fewer than two are not empty
    special_share: float  # of the pooled mass, won by special tokens
    first_position_share: float  # of the pooled mass, won by the first position
    position_histogram: tuple[float, ...]  # share of the pooled mass by tenth of the text, special tokens included
    weight_quantiles: tuple[float, ...] = ()  # of those above zero, at ROW_NORM_QUANTILES percent; () in old cells


@dataclass(frozen=True)
class OutputStatistics(Record):
    """What a backbone's pooled head puts out at one constant, before any training."""

    scale: float
    shift: float  # added to the bias before the scale
    candidates: int  # N: queries and documents per batch
    batches: int
    query: SideStatistics
    document: SideStatistics
    score_mean: float  # in batch, as unnormalized dot products
    score_sd: float
    score_max: float
    score_margin: float  # mean positive score less the mean of the others
    loss: float  # contrastive loss over N candidates, temperature 1
    loss_over_ln_n: float
    batch_accuracy: float
    flops_cost: float  # expected multiplications per query-document pair
    saturation: float  # share of the terms active in any document that are active in at least 90 % of them
    coverage: float  # share of the vocabulary active in any document
    common_terms: tuple[tuple[str, float], ...]  # the most widely shared terms and their share of documents
    fp16_headroom: float  # 65,504 over the largest score
    bf16_resolution: float  # spacing of bf16 numbers at the mean score, over the scores' sd
    non_finite: int
    # None in profiles of 0.1.0 and before
    score_within_sd: float | None = None  # as in `StepRecord`
    score_common: float | None = None


@dataclass(frozen=True)
class LogitStatistics(Record):
    """Raw logits of single positions at constant 1, over a sample of tokens and all terms."""

    mean: float
    sd: float
    quantiles: tuple[float, ...]  # at ROW_NORM_QUANTILES percent
    above_zero: float  # share
    hidden_cosine: float  # mean cosine between the features of different tokens: anisotropy
    hidden_norm: float  # mean Euclidean norm of a token's features
    tokens: int


@dataclass(frozen=True)
class GradientNorms(Record):
    """Gradient norms of the contrastive loss of one batch, at step 0 and constant 1."""

    head: float
    encoder: float


@dataclass(frozen=True)
class ScaleCurve(Record):
    """How the output statistics move with the constant; all points from one forward pass."""

    scale: tuple[float, ...]
    loss_over_ln_n: tuple[float, ...]
    mean_weight: tuple[float, ...]  # of documents, as the following
    l1: tuple[float, ...]
    active_mean_weight: tuple[float, ...]
    active_dims: tuple[float, ...]
    cosine: tuple[float | None, ...]  # between different documents
    score_sd: tuple[float, ...]
    score_margin: tuple[float, ...]
    flops_reg_query: tuple[float, ...]
    flops_reg_document: tuple[float, ...]


@dataclass(frozen=True)
class TextSettings(Record):
    """Which texts were measured and how they were cut; statistics compare only where these agree."""

    source: str  # "built-in" or the file's name
    fingerprint: str
    pairs: int
    query_length: int
    document_length: int
    batch_size: int


# --- what was written ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Proof(Record):
    """A written checkpoint held against the original: both loaded, both run on the same tokens."""

    library: str  # and its version
    max_error: float  # max |logits - expected| / max |expected|
    bitwise: bool
    support_identical: bool | None  # of the logits above zero; None where the policy moves it on purpose


@dataclass(frozen=True)
class Written(Record):
    """What `calibrate --save` did."""

    directory: str
    mode: str
    mode_reason: str
    scale: float
    scale_bias: bool
    shift: float
    edited: tuple[str, ...]
    added: tuple[str, ...]
    copied: tuple[str, ...]
    left_out: tuple[str, ...]
    converted: tuple[str, ...]
    config: dict[str, Any]
    proofs: tuple[Proof, ...]
    warnings: tuple[str, ...]


# --- judging and calibrating ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict(Record):
    """A word from a closed list with what it rests on: inspect, calibrate and trial each have their own list."""

    word: str
    statistic: str  # the name of what was compared
    value: float | None
    threshold: float | None
    band: tuple[float | None, float | None]  # where `ok` would lie
    evidence: str  # one sentence


@dataclass(frozen=True)
class Impacts(Record):
    """What rounding to whole numbers does to the weights of a collection; shares are of the weights above zero."""

    rounding: str  # `x100`, or a number of bits
    word: str  # `kept`: no weight became 0; `thinned`: some did; `emptied`: a text lost its last one
    step_query: float  # weights below half of it become 0
    step_document: float
    largest: int  # impact
    lost_query: float
    lost_document: float
    emptied: int  # texts that had an active term and have none left


@dataclass(frozen=True)
class Deployed(Record):
    """What a backbone puts out with another pooling, another query side, or whole numbers."""

    pooling: str  # over positions: `max` or `sum`
    activation: str  # inside log1p: `relu` or `log1p_relu`
    queries: str  # `model`, or where the IDF table that stands for it is from
    active_dims_query: float  # mean
    active_dims_document: float
    active_weight_query: float  # mean over active terms
    active_weight_document: float
    score_mean: float  # of in-batch scores
    score_sd: float
    loss_over_ln_n: float
    impacts: tuple[Impacts, ...] = ()


@dataclass(frozen=True)
class Inspection(Record):
    """Everything `inspect` knows of one backbone; outputs are None with weights only."""

    name: str
    revision: str | None
    head: Head
    weights: WeightStatistics
    vocabulary: VocabularyStatistics | None
    texts: TextSettings | None
    logits: LogitStatistics | None
    output: OutputStatistics | None
    curve: ScaleCurve | None
    gradients: GradientNorms | None
    verdict: Verdict
    warnings: tuple[str, ...] = ()
    bytes_read: int | None = None  # of headers and tensors, where they were read from a checkpoint
    deployed: Deployed | None = None  # where another pooling, query side or rounding was asked for


@dataclass(frozen=True)
class Target(Record):
    """One way of choosing the constant: what it matches, what that gives, and what it leads to."""

    name: str  # norm, activation, score, loss, constant, width
    statistic: str
    target: float | None  # the value to reach; None where there is nothing to match
    scale: float | None  # None where no constant reaches it
    snapped: float | None  # the nearest power of two (for loss, the one below)
    loss_over_ln_n: float | None  # at the constant that would be written
    active_mean_weight: float | None
    score_sd: float | None
    note: str


@dataclass(frozen=True)
class LambdaAdvice(Record):
    """By what to multiply lambda so that the regularizer starts where it did: flops_reg(1) / flops_reg(a)."""

    query: float | None
    document: float | None


@dataclass(frozen=True)
class Calibration(Record):
    """The constant chosen for one backbone, everything it was chosen from, and what goes with it."""

    name: str
    revision: str | None
    reference: str
    reference_origin: str
    match: str  # the target that was used
    match_reason: str
    scale: float | None
    head_lr_multiplier: float
    scale_bias: bool
    shift: float
    snapped: bool
    targets: tuple[Target, ...]
    disagreement: str  # in words, or ""
    curve: ScaleCurve | None  # None where the outputs were not seen, as the next three
    texts: TextSettings | None
    before: OutputStatistics | None
    after: OutputStatistics | None
    lambda_advice: LambdaAdvice
    verdict: Verdict
    advice: tuple[str, ...]
    written: Written | None = None
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Profile(Record):
    """A reference's statistics, small enough to keep: outputs are None where only its weights were within reach."""

    name: str
    revision: str | None
    origin: str  # "measured", "weights only", "bundled"
    weights: WeightStatistics
    output: OutputStatistics | None
    texts: TextSettings | None
    version: str  # of headscale


# --- trials -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrialVerdict(Record):
    """What the steps so far say of the full run; from them alone, never from later ones."""

    word: str  # stable, degraded, diverged, collapsed, dense or inconclusive
    rule: str  # the name of the rule that decided
    statistic: str  # what it looked at, a mean over the last steps
    value: float | None
    threshold: float | None
    step: int  # steps done when this word was reached and from which it held
    lr_share: float  # of the full run's summed learning rate, seen by then
    certain: bool  # nothing that follows would change it
    undecided: tuple[str, ...]  # words that later steps may still bring
    evidence: str  # one sentence


@dataclass(frozen=True)
class TrainedCell(Record):
    """One training of a trial, a sweep or the demo, as its cell keeps it."""

    backbone: str
    revision: str | None
    run: TrainingRun  # on disk its steps are in the log beside the cell, not in it
    verdict: TrialVerdict
    dev: RankMetrics | None  # for choosing; the run's own ranking, on test pairs, is for scoring


@dataclass(frozen=True)
class TrialResult(Record):
    """One arm of a trial over its seeds."""

    backbone: str
    arm: str  # calibrated, given or untouched
    scale: float
    mode: str
    head_lr_multiplier: float
    cells: tuple[TrainedCell, ...]
    verdict: TrialVerdict  # of its worst seed


@dataclass(frozen=True)
class SweepRow(Record):
    """One cell of a sweep as a tidy row; None where the cell has no such number."""

    backbone: str
    revision: str | None
    scale: float
    mode: str
    head_lr_multiplier: float
    lr: float
    temperature: float
    lambda_query: float
    lambda_document: float
    warmup_ratio: float
    seed: int
    status: str  # done, failed, interrupted or missing
    key: str
    steps: int | None = None
    lr_sum: float | None = None
    loss_start: float | None = None  # over ln N, first step
    loss_end: float | None = None  # over ln N, as the following: means over the last tenth
    batch_accuracy: float | None = None
    active_dims_query: float | None = None
    active_dims_document: float | None = None
    cosine_document: float | None = None
    grad_norm: float | None = None
    head_norm_start: float | None = None
    head_norm_end: float | None = None
    non_finite_steps: int | None = None
    mrr_dev: float | None = None  # MRR@10
    mrr_test: float | None = None
    chance_mrr: float | None = None
    flops_cost: float | None = None  # of the ranked test pairs
    vocab_size: int | None = None
    verdict: str | None = None
    verdict_step: int | None = None
    verdict_lr_share: float | None = None
    message: str = ""
    shift: float = 0.0
    ndcg_dev: float | None = None  # nDCG@10
    ndcg_test: float | None = None


# --- evaluation ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CollectionSummary(Record):
    """What was searched, and what it was judged by."""

    name: str
    split: str
    fingerprint: str
    documents: int
    queries: int  # those with a relevant document
    judgements: int  # relevant pairs, those of absent documents included
    absent: int  # relevant pairs whose document the collection does not have: never found
    left_out: int  # queries without a relevant document


@dataclass(frozen=True)
class Estimate(Record):
    """A mean over queries with its spread; interval and sd are None for an expectation and below two queries."""

    value: float
    low: float | None  # 95 % percentile interval, queries resampled with replacement
    high: float | None
    query_sd: float | None  # between queries, n - 1 in the denominator


@dataclass(frozen=True)
class Sparsity(Record):
    """The sparse vectors of all queries, or of all documents."""

    texts: int
    active_dims: float  # mean number of terms other than zero per text
    active_dims_p5: float
    active_dims_p50: float
    active_dims_p95: float
    empty: float  # share of texts without any active term
    max_weight: float | None  # None where the vectors have no weights of their own
    flops_reg: float | None  # sum over terms of (mean activation)^2
    non_finite: int  # texts with a weight that is not finite


@dataclass(frozen=True)
class SystemResult(Record):
    """How well one system ranks a collection, ties broken against it, and how sparse it is.

    A metric is None where the collection has fewer documents than its cut-off.
    """

    system: str  # the model's name, "BM25" or "chance"
    note: str  # how it was set up
    ndcg_at_10: Estimate | None
    mrr_at_10: Estimate | None
    recall_at_100: Estimate | None
    recall_at_1000: Estimate | None
    query: Sparsity | None
    document: Sparsity | None
    flops_cost: float | None  # expected multiplications per query-document pair
    retrieved: float | None  # mean number of documents that share a term with the query, at most the run's depth
    run: str | None = None  # the file with its ranking, in the TREC format
    impacts: Impacts | None = None  # of rounded weights


@dataclass(frozen=True)
class Evaluation(Record):
    """A model on a collection, with what it has to beat beside it."""

    name: str
    revision: str | None
    collection: CollectionSummary
    query_length: int  # in tokens, as used
    document_length: int
    mask_special_tokens: bool
    resamples: int
    seed: int
    systems: tuple[SystemResult, ...]  # the model first
    warnings: tuple[str, ...] = ()
    pooling: str = "max"  # over positions, or `sum`
    activation: str = "relu"  # inside log1p, or `log1p_relu`
    queries: str = "model"  # or where the IDF table that stands for it is from
