"""The run of another trainer as the verdict reads it: its configuration, and its schedule as a clock."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, Self

from headscale.files import load_json
from headscale.objective import Schedule
from headscale.recipes import TrainingConfig

_LOSSES = {"SparseMarginMSELoss": "margin-mse", "SparseDistillKLDivLoss": "kl"}  # all others are contrastive


@dataclass(frozen=True)
class TheirSchedule(Schedule):
    """Learning-rate factors as the trainer's own scheduler has them; lambda as it was seen.

    Its steps are observations, so that a run that is looked at every n steps keeps its clock.

    Args:
        factors: of the learning rate, at every observed step of the whole run.
        sums: of the factors of all steps before each observation, those not observed included, and of the whole run.
        first: the trainer's step that is observed first; above 0 where a run is resumed.
        every: the trainer's steps between two observations.
        lambdas: over their final value, at the observations so far.
    """

    factors: tuple[float, ...] = ()
    sums: tuple[float, ...] = ()
    first: int = 0
    every: int = 1
    lambdas: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, factors: Sequence[float], *, first: int = 0, every: int = 1) -> Self:
        """From the factors of every step of the run, of which `first` are done already."""
        first = -(-first // every) * every  # the next step that is observed
        observed = range(first, len(factors), every)
        sums = [0.0, *accumulate(factors)]
        return cls(
            total=max(1, len(observed)), warmup=0, ramp=0, factors=tuple(factors[step] for step in observed),
            sums=(*(sums[step] for step in observed), sums[-1]), first=first, every=every,
        )  # fmt: skip

    def lr_factor(self, step: int) -> float:
        """At an observation."""
        return self.factors[step] if step < len(self.factors) else 0.0

    def lambda_factor(self, step: int) -> float:
        """At an observation; of what is yet to come, as it was last seen."""
        return self.lambdas[min(step, len(self.lambdas) - 1)] if self.lambdas else 0.0

    def lr_sum(self, steps: int | None = None) -> float:
        """Of all the trainer's steps before the observation of this number."""
        return self.sums[-1 if steps is None else min(steps, len(self.sums) - 1)]

    def steps_done(self, observations: int) -> int:
        """Steps of the trainer that are done after so many observations."""
        return self.first + (observations - 1) * self.every + 1 if observations else 0


class TheirConfig(TrainingConfig):
    """A run of another trainer in our words, with the schedule it really has; `to_dict()` is that of its parent."""

    def schedule(self) -> TheirSchedule:
        """The trainer's own."""
        found: TheirSchedule = self.__dict__["their_schedule"]
        return found


def learning_rates(scheduler: Any, steps: int) -> list[float]:
    """Factors of the learning rate at every step; 1 where the scheduler cannot say before it gets there.

    Args:
        scheduler: the trainer's, accelerate's wrapper included.
        steps: of the whole run.
    """
    inner = getattr(scheduler, "scheduler", scheduler)
    factors = getattr(inner, "lr_lambdas", None)  # torch's LambdaLR, which all of transformers' plain schedules are
    return [float(factors[0](step)) if factors else 1.0 for step in range(steps)]


def config_of(
    args: Any,
    schedule: TheirSchedule,
    *,
    steps: int,
    loss: Any,
    lambdas: tuple[float | None, float | None],
    head_lr_multiplier: float,
    length: int,
    start: Mapping[str, Any],
) -> TheirConfig:
    """The trainer's arguments as a `TrainingConfig`.

    Args:
        args: `SparseEncoderTrainingArguments`.
        schedule: the trainer's own.
        steps: of the whole run.
        loss: the `SpladeLoss`.
        lambdas: its weights of the queries' and documents' regularizers, once their ramp is over.
        head_lr_multiplier: of the head's optimizer group over the encoder's.
        length: tokens to which the model cuts texts.
        start: what was done to the head before, from `start_of`.
    """
    kind = _LOSSES.get(type(loss.loss).__name__, "infonce")
    config = TheirConfig(
        steps=steps, batch_size=args.train_batch_size, accumulation=args.gradient_accumulation_steps,
        negatives=int(kind != "infonce"), loss=kind,  # type: ignore[arg-type]
        temperature=temperature_of(loss), lambda_query=lambdas[0] or 0.0,
        lambda_document=lambdas[1] or 0.0, lr=args.learning_rate or 1.0,
        head_lr_multiplier=head_lr_multiplier, weight_decay=args.weight_decay,
        warmup_steps=args.get_warmup_steps(steps), clip=args.max_grad_norm or None,
        precision="fp16" if args.fp16 else "bf16" if args.bf16 else "fp32",
        query_length=length, document_length=length, seed=args.seed, device=str(args.device), **start,
    )  # fmt: skip
    config.__dict__["their_schedule"] = schedule
    return config


def start_of(checkpoint: str) -> dict[str, Any]:
    """What `headscale.json` says was done to a checkpoint's head, as fields of `TrainingConfig`; else nothing.

    Args:
        checkpoint: what the model was loaded from; "" where nothing says so.
    """
    file = Path(checkpoint, "headscale.json")
    said = load_json(file, str(file)) if checkpoint and file.is_file() else None
    if not isinstance(said, dict) or said.get("schema") != "headscale.checkpoint/1":
        return {}
    return {
        "scale": said["scale"], "shift": said.get("shift", 0.0), "mode": said["mode"],
        "scale_bias": said.get("bias_policy") != "keep",
    }  # fmt: skip


def temperature_of(loss: Any) -> float:
    """What divides the scores: the inverse of the ranking loss's `scale`, 1 where it has none."""
    return 1 / (getattr(loss.loss, "scale", 0.0) or 1.0)
