"""One model in training: a step, and everything that is observed about it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from headscale.batches import Batch
from headscale.device import (
    DeviceChoice,
    choose_device,
    peak_memory,
    random_states,
    reset_peak_memory,
    restore_random_states,
)
from headscale.distributed import Team
from headscale.encoder import SpladeEncoder
from headscale.errors import MemoryForecastError, UsageError
from headscale.head import LoadedHead, load_head
from headscale.memory import is_out_of_memory
from headscale.objective import Ranking, ranking_loss, regularize
from headscale.observation import average, batch_statistics, read_off, score_statistics, total_norm
from headscale.passes import Passes
from headscale.recipes import TrainingConfig
from headscale.records import StepRecord
from headscale.rescaling import rescale_


class Trainer:
    """One model in training, a step at a time; `train` is the loop around it.

    Args:
        model: a masked LM; it is moved, brought to fp32, rescaled and trained in place.
        tokenizer: the model's.
        config: the run.
        team: the processes that share every batch; this one alone by default.
        tell: told in a sentence where a batch is taken in smaller parts because memory ran short.

    Raises:
        UsageError: a head learning rate for a head that is tied, a device that is not there, or a batch that the
            processes cannot share equally.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        config: TrainingConfig,
        *,
        team: Team | None = None,
        tell: Callable[[str], object] | None = None,
    ) -> None:
        self.config = config
        self.team = team or Team()
        self.team.check(config.batch_size)
        self.tell = tell
        self.choice: DeviceChoice = choose_device(self.team.device(config.device), precision=config.precision)
        self.model = model.float().to(self.choice.name).train()
        self.head = _rescaled_head(self.model, config)
        self.head_tied = self.head.head.tied_to is not None
        if self.head_tied and config.head_lr_multiplier != 1.0:
            raise UsageError(
                "a head learning rate needs an untied head: this one shares its matrix with the embedding",
                "use the mode `untie`",
            )
        in_forward = config.mode == "logits"
        self.encoder = SpladeEncoder(
            self.head, tokenizer, scale=config.scale if in_forward else 1.0, scale_bias=config.scale_bias,
            shift=config.shift if in_forward else 0.0, mask_special_tokens=config.mask_special_tokens,
        )  # fmt: skip
        self.team.start_alike(self.model)
        self.passes = Passes(self.encoder, self._autocast, config.micro_batch)
        self.texts_at_once: int | None = None  # where memory has forced fewer than configured
        self.schedule = config.schedule()
        self.steps_done = 0
        self._collect_parameters()
        self.optimizer = torch.optim.AdamW(self._groups(), lr=config.lr, fused=True)
        self.scaler = torch.amp.GradScaler(self._device_type, enabled=config.precision == "fp16")
        self.head_norm_start = total_norm(self.matrices).item()
        reset_peak_memory(self.choice.name)

    @property
    def candidates(self) -> int:
        """N of the in-batch contrastive loss."""
        hard = self.config.negatives * (self.config.batch_size if self.config.shared_negatives else 1)
        return self.config.batch_size + hard

    @property
    def _device_type(self) -> str:
        return self.choice.name.partition(":")[0]

    def _collect_parameters(self) -> None:
        own = {id(p) for p in self.head.parameters}
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.head_parameters: list[Tensor] = [p for p in trained if id(p) in own]
        self.encoder_parameters: list[Tensor] = [p for p in trained if id(p) not in own]
        self.matrices: list[Tensor] = [p.detach() for p in self.head_parameters if p.dim() == 2]

    def _groups(self) -> list[dict[str, Any]]:
        """Encoder and head, each with and without weight decay; `multiplier` is of the learning rate."""
        config = self.config
        groups = []
        for side, multiplier in (("encoder", 1.0), ("head", config.head_lr_multiplier)):
            parameters = self.head_parameters if side == "head" else self.encoder_parameters
            for decayed in (True, False):
                chosen = [p for p in parameters if (p.dim() > 1 or config.decay_vectors) is decayed]
                decay = config.weight_decay if decayed else 0.0
                groups.append({"params": chosen, "weight_decay": decay, "multiplier": multiplier})
        return [group for group in groups if group["params"]]

    def step(self, step_batches: Sequence[Batch]) -> StepRecord:
        """One optimizer step over one or several batches, each with its own in-batch negatives.

        Where memory runs short, the step is repeated with half as many texts at once, and so are those after it.

        Raises:
            MemoryForecastError: not even one text at a time fits.
        """
        started = time.perf_counter()
        lambdas = self._lambdas()
        states = random_states(self.choice.name)
        while (observed := self._gradients(step_batches, lambdas)) is None:
            self._halve(step_batches[0])
            restore_random_states(self.choice.name, states)
        self.team.sum_gradients([*self.head_parameters, *self.encoder_parameters])
        values = {**average(observed), **self._update()}
        record = self._record(values, lambdas, time.perf_counter() - started)
        self.steps_done += 1
        return record

    def _gradients(self, step_batches: Sequence[Batch], lambdas: tuple[float, float]) -> list[dict[str, float]] | None:
        """The gradients of all batches, and what each showed; None where memory ran short."""
        try:
            return [self._backward(batch, lambdas, 1 / len(step_batches)) for batch in step_batches]
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        return None  # out of the handler: the traceback keeps the batch's tensors alive

    def _lambdas(self) -> tuple[float, float]:
        factor = self.schedule.lambda_factor(self.steps_done)
        return self.config.lambda_query * factor, self.config.lambda_document * factor

    def _backward(self, batch: Batch, lambdas: tuple[float, float], share: float) -> dict[str, float]:
        """Add one batch's gradients, and say what it showed."""
        own = self.team.share(batch)
        sides = [(own.queries, self.config.query_length), (own.documents, self.config.document_length)]
        reps = self.team.gather(lambda: self.passes.forward(sides), batch.negatives)
        with self.team.agreed():
            with self._autocast():
                ranking, parts = self._objective(reps, batch, lambdas)
            loss = ranking.loss + parts["weighted_reg_query"] + parts["weighted_reg_document"]
            torch.autograd.backward([self.scaler.scale(loss * share)])
            self.passes.backward()
            return self._observed(reps, ranking, {"loss": loss, **parts})

    def _objective(
        self, reps: Sequence[Tensor], batch: Batch, lambdas: tuple[float, float]
    ) -> tuple[Ranking, dict[str, Tensor]]:
        config = self.config
        queries, documents = reps
        size = len(queries)
        negatives = documents[size:].view(size, batch.negatives, -1) if batch.negatives else None
        teacher = None if batch.teacher is None else torch.tensor(batch.teacher, device=queries.device)
        ranking = ranking_loss(
            config.loss, queries, documents[:size], negatives, teacher=teacher,
            temperature=config.temperature, shared_negatives=config.shared_negatives,
        )  # fmt: skip
        reg_query = regularize(config.query_regularizer, queries, threshold=config.flops_threshold)
        reg_document = regularize(config.document_regularizer, documents, threshold=config.flops_threshold)
        parts = {
            "ranking_loss": ranking.loss,
            "reg_query": reg_query,
            "reg_document": reg_document,
            "weighted_reg_query": lambdas[0] * reg_query,
            "weighted_reg_document": lambdas[1] * reg_document,
        }
        return ranking, parts

    def _observed(self, reps: Sequence[Tensor], ranking: Ranking, losses: dict[str, Tensor]) -> dict[str, float]:
        return read_off(
            {
                **losses,
                **score_statistics(ranking.scores, temperature=self.config.temperature),
                **batch_statistics(reps[0].detach(), reps[1].detach()),
            }
        )

    def _autocast(self) -> AbstractContextManager[None]:
        dtype = torch.float16 if self.config.precision == "fp16" else torch.bfloat16
        return torch.autocast(self._device_type, dtype=dtype, enabled=self.config.precision != "fp32")

    def _update(self) -> dict[str, Any]:
        """Clip, step, and say how large the gradients and the update were."""
        factor = self.schedule.lr_factor(self.steps_done)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr * group["multiplier"] * factor
        self.scaler.unscale_(self.optimizer)
        norms = self._clipped()
        observed = self.steps_done % self.config.update_every == 0
        before = [matrix.clone() for matrix in self.matrices] if observed else None
        loss_scale = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return {
            **norms,
            **self._moved(before),
            "loss_scale": loss_scale if self.scaler.is_enabled() else None,
            "skipped": self.scaler.get_scale() < loss_scale,
        }

    def _clipped(self) -> dict[str, float]:
        sides = (self.head_parameters, self.encoder_parameters)
        gradients = [[p.grad for p in side if p.grad is not None] for side in sides]
        head, encoder = (total_norm(side) for side in gradients)
        total = torch.hypot(head, encoder)
        factor = torch.ones_like(total)
        if self.config.clip is not None:  # as torch.nn.utils.clip_grad_norm_
            factor = (self.config.clip / (total + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_([*gradients[0], *gradients[1]], factor)
        names = ("grad_norm", "grad_norm_head", "grad_norm_encoder", "clip_factor")
        return read_off(dict(zip(names, (total, head, encoder, factor), strict=True)))

    def _moved(self, before: list[Tensor] | None) -> dict[str, float | None]:
        norm = total_norm(self.matrices)
        if before is None:
            return {"head_norm": norm.item(), "update_ratio": None}
        start = total_norm(before)
        change = total_norm(torch._foreach_sub(before, self.matrices))
        return {**read_off({"head_norm": norm, "update_ratio": change / start})}

    def _record(self, values: dict[str, Any], lambdas: tuple[float, float], seconds: float) -> StepRecord:
        lr = self.config.lr * self.schedule.lr_factor(self.steps_done)
        regularizer = values["weighted_reg_query"] + values["weighted_reg_document"]
        values = {
            **self._defined_cosines(values),
            "lr": lr,
            "head_lr": lr * self.config.head_lr_multiplier,
            "lambda_query": lambdas[0],
            "lambda_document": lambdas[1],
            "regularizer_share": regularizer / values["loss"] if values["loss"] else math.nan,
            "head_norm_drift": values["head_norm"] / self.head_norm_start,
        }
        return StepRecord(
            step=self.steps_done, **values, memory=peak_memory(self.choice.name), seconds=seconds,
            non_finite=sum(isinstance(v, float) and not math.isfinite(v) for v in values.values()),
        )  # fmt: skip

    def _defined_cosines(self, values: dict[str, Any]) -> dict[str, Any]:
        """None for the cosine of fewer than two texts that are not empty, which is no number at all."""
        texts = {"query": self.config.batch_size, "document": self.config.batch_size * (1 + self.config.negatives)}
        for side, size in texts.items():
            filled = round((1 - values[f"empty_{side}"]) * size)
            cosine = values.pop(f"mean_cosine_{side}")
            values[f"cosine_{side}"] = cosine if filled > 1 else None
        return values

    def _halve(self, batch: Batch) -> None:
        """Take half as many texts at once from now on; the mathematics stays (gradient caching, arXiv 2101.06983)."""
        self.passes.forget()
        self._forget_gradients()
        size = self.passes.size or -(-len(batch.documents) // self.team.size)
        if size == 1:
            raise MemoryForecastError(
                f"a batch of {len(batch.queries)} queries and {len(batch.documents)} documents does not fit in the"
                f" memory of `{self.choice.name}`, not even one text at a time",
                "use shorter texts, a smaller batch or model, or another device",
            )
        self.texts_at_once = self.passes.size = size // 2
        if self.tell is not None:
            self.tell(f"memory ran short: taking {size // 2} texts at a time from here on; the gradients are the same")

    def _forget_gradients(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        if self._device_type == "cuda":
            torch.cuda.empty_cache()


def _rescaled_head(model: nn.Module, config: TrainingConfig) -> LoadedHead:
    if config.mode in ("untie", "fold"):
        rescaled = rescale_(model, config.scale, mode=config.mode, scale_bias=config.scale_bias, shift=config.shift)
        return LoadedHead(model, rescaled)
    return load_head(model)
