"""How a SPLADE training is run: one configuration, checked as a whole, and the recipes people use."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from headscale.errors import UsageError
from headscale.records import Record

if TYPE_CHECKING:
    from headscale.objective import Schedule

Mode = Literal["untie", "fold", "logits", "none"]
Precision = Literal["fp32", "bf16", "fp16"]

_CHOICES = {
    "loss": ("infonce", "margin-mse", "kl"),
    "query_regularizer": ("flops", "l1", "none"),
    "document_regularizer": ("flops", "l1", "none"),
    "mode": ("untie", "fold", "logits", "none"),
    "precision": ("fp32", "bf16", "fp16"),
}
_POSITIVE = ("steps", "batch_size", "lr", "head_lr_multiplier", "accumulation", "temperature", "scale",
             "query_length", "document_length", "update_every")  # fmt: skip
_NOT_NEGATIVE = ("weight_decay", "lambda_query", "lambda_document", "negatives", "warmup_ratio", "ramp_ratio")


@dataclass(frozen=True)
class TrainingConfig(Record):
    """One SPLADE training; the defaults are sentence-transformers' MS MARCO example without a hard negative.

    Args:
        steps: optimizer steps that are run.
        horizon: optimizer steps of the full run whose first steps these are; None: `steps` are the full run.
        compressed: fit warmup, decay and ramp of the horizon into `steps` instead.
        batch_size: queries per batch, each a negative of the others.
        micro_batch: texts that go through the model at once; the gradients are those of the whole batch, its
            negatives included (arXiv 2101.06983). None: all.
        negatives: hard negatives taken from each pair.
        shared_negatives: whether they are candidates of every query of the batch or only of their own.
        accumulation: batches per optimizer step, each with its own in-batch negatives.
        loss: "infonce", "margin-mse" or "kl".
        temperature: divides the scores.
        query_regularizer, document_regularizer: "flops", "l1" or "none".
        flops_threshold: texts with at most this many active dims are left out of FLOPS (arXiv 2504.14839).
        lambda_query, lambda_document: weights of the regularizers once the ramp is over.
        ramp_steps, ramp_ratio: quadratic rise of lambda, in steps, or as a share of the horizon.
        lr: peak learning rate of AdamW.
        head_lr_multiplier: of the untied matrix and bias; an error where the head is tied.
        weight_decay: of matrices; of vectors too if `decay_vectors`.
        warmup_steps, warmup_ratio: linear rise of the learning rate, in steps, or as a share of the horizon.
        clip: largest norm of the gradient; None: no clipping.
        precision: "fp32", "bf16" (autocast) or "fp16" (autocast and a loss scaler).
        query_length, document_length: tokens, special ones included.
        mask_special_tokens: leave their positions out of the pooling.
        scale: the constant on the logits.
        mode: where it is written: "untie", "fold", "logits" (in forward), or "none" (as the model is).
        scale_bias: whether the vocabulary bias is scaled too.
        shift: added to the logits before the scale, in the bias.
        seed: of the order of the pairs and of dropout.
        device: "auto", or a device of torch.
        update_every: steps between two observations of `update_ratio`.
    """

    steps: int
    horizon: int | None = None
    compressed: bool = False
    batch_size: int = 16
    micro_batch: int | None = None
    negatives: int = 0
    shared_negatives: bool = True
    accumulation: int = 1
    loss: Literal["infonce", "margin-mse", "kl"] = "infonce"
    temperature: float = 1.0
    query_regularizer: Literal["flops", "l1", "none"] = "flops"
    document_regularizer: Literal["flops", "l1", "none"] = "flops"
    flops_threshold: int | None = None
    lambda_query: float = 5e-5
    lambda_document: float = 1e-3
    ramp_steps: int | None = None
    ramp_ratio: float = 1 / 3
    lr: float = 2e-5
    head_lr_multiplier: float = 1.0
    weight_decay: float = 0.0
    decay_vectors: bool = False
    warmup_steps: int | None = None
    warmup_ratio: float = 0.1
    clip: float | None = 1.0
    precision: Precision = "fp32"
    query_length: int = 256
    document_length: int = 256
    mask_special_tokens: bool = False
    scale: float = 1.0
    mode: Mode = "none"
    scale_bias: bool = True
    shift: float = 0.0
    seed: int = 0
    device: str = "auto"
    update_every: int = 1

    def __post_init__(self) -> None:
        problems = [*_range_problems(self), *_joint_problems(self)]
        if problems:
            raise UsageError("; ".join(problems), "see the documented ranges of `TrainingConfig`")

    def replace(self, **changes: Any) -> TrainingConfig:
        """A copy with some fields changed, checked again."""
        return dataclasses.replace(self, **changes)

    def schedule(self) -> Schedule:
        """Warmup, decay and ramp by optimizer step, over the horizon or the steps if compressed."""
        from headscale.objective import Schedule

        total = self.horizon or self.steps
        warmup = math.ceil(self.warmup_ratio * total) if self.warmup_steps is None else self.warmup_steps
        ramp = max(1, int(self.ramp_ratio * total)) if self.ramp_steps is None else self.ramp_steps
        full = Schedule(total, warmup, ramp)
        return full.fitted_into(self.steps) if self.compressed else full


def _range_problems(config: TrainingConfig) -> list[str]:
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    unknown = [
        f"`{name}` must be one of {', '.join(allowed)}, not `{values[name]}`"
        for name, allowed in _CHOICES.items()
        if values[name] not in allowed
    ]
    optional = [n for n in ("horizon", "micro_batch", "clip", "flops_threshold") if values[n] is not None]
    low = [f"`{n}` must be positive, not {values[n]}" for n in (*_POSITIVE, *optional) if not 0 < values[n] < math.inf]
    negative = [f"`{n}` must not be negative, not {values[n]}" for n in _NOT_NEGATIVE if not 0 <= values[n] < math.inf]
    return [*unknown, *low, *negative]


def _joint_problems(config: TrainingConfig) -> list[str]:
    problems = []
    if config.horizon is not None and config.horizon < config.steps:
        problems.append(f"`horizon` {config.horizon} is shorter than `steps` {config.steps}")
    if config.mode == "none" and config.scale != 1.0:
        problems.append(f"the mode `none` leaves the head as it is, so `scale` must be 1, not {config.scale}")
    if config.mode == "none" and config.shift != 0.0:
        problems.append(f"the mode `none` leaves the head as it is, so `shift` must be 0, not {config.shift}")
    if not math.isfinite(config.shift):
        problems.append(f"`shift` must be finite, not {config.shift}")
    if config.loss != "infonce" and config.negatives < 1:
        problems.append(f"the loss `{config.loss}` needs `negatives` of at least 1")
    if config.loss == "margin-mse" and config.temperature != 1.0:
        problems.append("the loss `margin-mse` has no temperature")
    if config.loss == "infonce" and config.batch_size + config.negatives < 2:
        problems.append("the loss `infonce` needs at least 2 candidates: a larger `batch_size` or `negatives`")
    return problems


@dataclass(frozen=True)
class Recipe:
    """A configuration people train with, run in full, and where it was read."""

    source: str
    config: TrainingConfig


_NAVER = TrainingConfig(
    steps=150_000, batch_size=128, negatives=1, shared_negatives=False, ramp_steps=50_000, weight_decay=0.01,
    decay_vectors=True, warmup_steps=6_000, clip=None, precision="fp16",
)  # fmt: skip

RECIPES: dict[str, Recipe] = {
    "st-mnrl": Recipe(
        "sentence-transformers, examples/sparse_encoder/training/ms_marco/train_splade_msmarco_mnrl.py"
        " (90,000 triplets, 1 epoch)",
        TrainingConfig(steps=5_625, negatives=1, precision="bf16"),
    ),
    "naver-max": Recipe(
        "naver/splade, conf/config_splade++_max.yaml and conf/train/config/splade.yaml",
        _NAVER.replace(lambda_query=3e-4, lambda_document=1e-4),
    ),
    "naver-distil": Recipe(
        "naver/splade, MarginMSE with lambdas 0.5 / 0.4; its ensemble variant has 0.1 / 0.08",
        _NAVER.replace(loss="margin-mse", lambda_query=0.5, lambda_document=0.4),
    ),
    "naver-efficient": Recipe(
        "naver/splade, conf/efficient_splade/config_V_large.yaml",
        _NAVER.replace(
            steps=250_000, loss="kl", query_regularizer="l1", lambda_query=5e-4, lambda_document=5e-4
        ),
    ),
    "tevatron": Recipe(
        "texttron/tevatron, examples/splade/README.md; its 3 epochs are those of about 400,000 queries here",
        TrainingConfig(
            steps=37_500, batch_size=32, negatives=7, lambda_query=0.01, lambda_document=0.01, ramp_steps=0,
            lr=5e-6, warmup_ratio=0.0, precision="fp16", query_length=128, document_length=128,
        ),
    ),
    "v-splade": Recipe(
        "v-splade's text recipe, logits times 768^-0.25; its 3 epochs are those of 502,939 queries here",
        TrainingConfig(
            steps=2_245, batch_size=672, negatives=2, lambda_query=0.0, lambda_document=0.01, ramp_steps=500,
            temperature=0.1, lr=5e-4, scale=768**-0.25, mode="logits", precision="bf16",
        ),
    ),
}  # fmt: skip
"""Recipes in use, by name. Inference-free ones are missing: their query side is a table, not the model."""


def recipe(name: str) -> TrainingConfig:
    """The configuration of that name, at its full length.

    Raises:
        UsageError: no recipe has that name.
    """
    if name not in RECIPES:
        raise UsageError(f"no recipe is called `{name}`", f"one of {', '.join(RECIPES)}")
    return RECIPES[name].config
