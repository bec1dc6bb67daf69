"""One call of `SparseEncoderTrainer.train()` under observation: the hooks, the numbers of a step, what is kept."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from headscale import __version__, cells
from headscale.device import peak_memory
from headscale.errors import UsageError
from headscale.head import LoadedHead, load_head
from headscale.interop.schedule import TheirSchedule, config_of, learning_rates, start_of, temperature_of
from headscale.interop.tracking import Tracking
from headscale.observation import average, batch_statistics, read_off, score_statistics, total_norm
from headscale.records import StepRecord, TrainedCell, TrainingRun, TrialVerdict
from headscale.steplog import StepLog
from headscale.training import end_of
from headscale.trials import KIND
from headscale.verdict import Watch

if TYPE_CHECKING:
    from headscale.interop.callback import HeadscaleCallback

_SEAM = "compute_loss_from_embeddings"


class Watching:
    """Everything a callback holds between the beginning and the end of a training.

    Args:
        callback: with its options.
        model: the trainer's.
        args, state, optimizer, scheduler: as the trainer gives them to its callbacks.
    """

    def __init__(
        self, callback: HeadscaleCallback, model: nn.Module, args: Any, state: Any, optimizer: Any, scheduler: Any
    ) -> None:
        self.callback, self.args, self.optimizer = callback, args, optimizer
        self.loss: Any = callback.loss
        self.head = masked_lm_head(model)
        network: Any = self.head.model
        own = {id(p) for p in self.head.parameters}
        trained = [p for p in model.parameters() if p.requires_grad]
        self.sides = {
            "head": [p for p in trained if id(p) in own],
            "encoder": [p for p in trained if id(p) not in own],
        }
        self.matrices = [p.detach() for p in self.sides["head"] if p.dim() == 2]
        self.head_norm_start = total_norm(self.matrices).item()
        self.temperature = temperature_of(self.loss)
        factors = learning_rates(scheduler, state.max_steps)
        self.schedule = TheirSchedule.of(factors, first=state.global_step, every=callback.every)
        peaks = self._rates("initial_lr")
        self.config = config_of(
            args, self.schedule, steps=state.max_steps, loss=self.loss, lambdas=callback.full_lambdas,
            head_lr_multiplier=peaks["head"] / peaks["encoder"] if all(peaks.values()) else 1.0,
            length=getattr(model, "max_seq_length", None) or network.config.max_position_embeddings,
            start=start_of(network.name_or_path),
        )  # fmt: skip
        self.watch: Watch | None = None
        self._sizes = {"query": 0, "document": 0}
        self.status, self.started = "finished", time.perf_counter()
        self.observing = False
        self._norms: dict[int, Tensor] = {}
        self._batches: list[dict[str, float]] = []
        self._batch: dict[str, Any] = {}
        self._queries: Tensor | None = None
        self._update: dict[str, Any] = {}
        self._before: list[Tensor] = []
        self._undo: list[Callable[[], object]] = []
        self.configuration = self._configuration()
        self.folder = self._folder(state)
        self._log = None if self.folder is None else StepLog(self.folder / cells.STEPS).__enter__()
        self._tracking = self._tracker()
        self._hook()

    # --- hooks -----------------------------------------------------------------------------------------------------

    def _hook(self) -> None:
        regularizers = {
            id(r): r for r in (self.loss.document_regularizer, getattr(self.loss, "query_regularizer", None))
        }
        self._wrap(self.loss.loss, self._on_ranking)
        for regularizer in regularizers.values():
            if regularizer is not None:
                self._wrap(regularizer, self._on_regularizer)
        parameters: list[Any] = [*self.sides["head"], *self.sides["encoder"]]
        for parameter in parameters:
            self._undo.append(parameter.register_post_accumulate_grad_hook(self._on_gradient).remove)

    def _wrap(self, module: nn.Module, then: Callable[[Any, Any], None]) -> None:
        """Let `then` see what the module's loss was computed from, and its value."""
        whole = getattr(module, _SEAM)
        held = vars(module).get(_SEAM)

        def watched(embeddings: Any, *rest: Any, **named: Any) -> Any:
            value = whole(embeddings, *rest, **named)
            if self.observing and torch.is_grad_enabled():  # an evaluation in between has no gradients
                with torch.no_grad():
                    then(embeddings, value)
            return value

        def restore() -> None:
            vars(module).pop(_SEAM, None)
            if held is not None:
                vars(module)[_SEAM] = held

        vars(module)[_SEAM] = watched
        self._undo.append(restore)

    def _on_ranking(self, embeddings: Sequence[Tensor], value: Any) -> None:
        """A batch has reached the ranking loss; its regularizers follow."""
        ranking: Tensor = torch.stack(list(value.values())).sum() if isinstance(value, dict) else value
        queries, documents = embeddings[0].detach(), torch.cat([e.detach() for e in embeddings[1:]])
        self._queries, self._sizes = embeddings[0], {"query": len(queries), "document": len(documents)}
        self._batch = {
            "ranking_loss": ranking.detach(),
            # the positives are the first documents, so they are on the diagonal
            **score_statistics(queries @ documents.T, temperature=self.temperature),
            **batch_statistics(queries, documents),
        }
        if self.loss.query_regularizer_weight is None:  # then their loss does not ask for it
            self._batch["reg_query"] = torch.zeros_like(ranking)

    def _on_regularizer(self, embeddings: Tensor, value: Tensor) -> None:
        """One regularizer of the batch; with the last of them the batch is complete."""
        self._batch["reg_query" if embeddings is self._queries else "reg_document"] = value.detach()
        if {"reg_query", "reg_document"} <= self._batch.keys():
            self._batches.append(self._complete(read_off(self._batch)))
            self._batch, self._queries = {}, None

    def _complete(self, values: dict[str, float]) -> dict[str, float]:
        query, document = self._lambdas()
        weighted_query, weighted_document = query * values["reg_query"], document * values["reg_document"]
        return {
            **values,
            "weighted_reg_query": weighted_query,
            "weighted_reg_document": weighted_document,
            "loss": values["ranking_loss"] + weighted_query + weighted_document,
        }

    def _on_gradient(self, parameter: Tensor) -> None:
        """After the last backward pass of a step this is the norm of the whole gradient, not yet clipped."""
        if self.observing and parameter.grad is not None:
            self._norms[id(parameter)] = torch.linalg.vector_norm(parameter.grad.detach().float())

    # --- a step ----------------------------------------------------------------------------------------------------

    def begin(self, step: int) -> None:
        """A step of the trainer begins."""
        self.observing = step % self.callback.every == 0
        self.step, self.begun = step, time.perf_counter()
        self._norms.clear()
        self._batches.clear()

    def before_update(self) -> None:
        """Keep what the update changes, and what it uses."""
        if self.observing:
            rates, lambdas = self._rates("lr"), self._lambdas()
            self._update = {
                "lr": rates["encoder"], "head_lr": rates["head"],
                "lambda_query": lambdas[0], "lambda_document": lambdas[1], **self._gradients(),
            }  # fmt: skip
            self._before = [matrix.clone() for matrix in self.matrices]

    def after_update(self) -> None:
        """Say how far the head has moved."""
        if self.observing:
            change, before = total_norm(torch._foreach_sub(self._before, self.matrices)), total_norm(self._before)
            self._update |= read_off({"head_norm": total_norm(self.matrices), "update_ratio": change / before})
            self._update["skipped"] = bool(getattr(self.optimizer, "step_was_skipped", False))
            self._before = []

    def finish(self) -> tuple[StepRecord, TrialVerdict]:
        """The record of the step and the verdict with it; log and tracker have them too."""
        record = self._record()
        full = self.callback.full_lambdas[1]
        self.schedule.lambdas.append(record.lambda_document / full if full else 1.0)
        if self.watch is None:
            self.watch = Watch(
                self.config, candidates=self._sizes["document"], vocab_size=self.head.vocab_size,
                rules=self.callback.rules,
            )  # fmt: skip
        found = self.watch(record)
        verdict = replace(found, step=self.schedule.steps_done(found.step))
        for listener in (self._log, self._tracking):
            if listener is not None:
                listener(record)
        return record, verdict

    def _record(self) -> StepRecord:
        values: dict[str, Any] = {**average(self._batches), **self._update}
        weighted = values["weighted_reg_query"] + values["weighted_reg_document"]
        values["regularizer_share"] = weighted / values["loss"] if values["loss"] else math.nan
        values["head_norm_drift"] = values["head_norm"] / self.head_norm_start
        for side, size in self._sizes.items():
            cosine = values.pop(f"mean_cosine_{side}")
            filled = round((1 - values[f"empty_{side}"]) * size)
            values[f"cosine_{side}"] = cosine if filled > 1 else None  # of fewer it is no number at all
        return StepRecord(
            step=self.step, **values, memory=peak_memory(str(self.head.weight.device)),
            seconds=time.perf_counter() - self.begun,
            non_finite=sum(isinstance(v, float) and not math.isfinite(v) for v in values.values()),
        )  # fmt: skip

    def _lambdas(self) -> tuple[float, float]:
        return self.loss.query_regularizer_weight or 0.0, self.loss.document_regularizer_weight or 0.0

    def _rates(self, name: str) -> dict[str, float]:
        """`lr` or `initial_lr` of each side's optimizer group; 0 for one that is not trained."""
        rates = {
            id(p): float(group.get(name, group["lr"])) for group in self.optimizer.param_groups for p in group["params"]
        }
        return {side: next((rates[id(p)] for p in own if id(p) in rates), 0.0) for side, own in self.sides.items()}

    def _gradients(self) -> dict[str, float | None]:
        scaler = getattr(self.optimizer, "scaler", None)  # of accelerate, under fp16
        scale = None if scaler is None else float(scaler.get_scale())
        norms = {
            side: math.hypot(*(self._norms[id(p)].item() for p in own if id(p) in self._norms)) / (scale or 1.0)
            for side, own in self.sides.items()
        }
        total, limit = math.hypot(*norms.values()), self.config.clip
        factor = 1.0 if limit is None else min(1.0, limit / (total + 1e-6))  # as torch clips
        return {
            "grad_norm": total, "grad_norm_head": norms["head"], "grad_norm_encoder": norms["encoder"],
            "clip_factor": factor, "loss_scale": scale,
        }  # fmt: skip

    # --- what is kept ----------------------------------------------------------------------------------------------

    def _configuration(self) -> dict[str, Any]:
        """What the cell says it was run with, under the keys of a trial's."""
        return {
            "backbone": self.callback.name,
            "revision": None,
            "identity": _digest(self.sides["head"]),  # one name may start with a constant, a shift or neither
            "trust_remote_code": False,
            "training": self.config.to_dict(),
            "texts": {
                "pairs": "of the trainer", "test_pairs": None, "packages": [], "candidates": 0, "rank_dev": False,
                "fingerprints": {},
            },
            "stop_early": self.callback.rules.to_dict() if self.callback.stop_on else None,
            "headscale": __version__,
            "trainer": f"sentence-transformers {version('sentence-transformers')}",
        }  # fmt: skip

    def _folder(self, state: Any) -> Path | None:
        if self.callback.run is None or not state.is_world_process_zero:
            return None
        label = f"{self.callback.name}-seed{self.config.seed}"
        folder = cells.cell_folder(self.callback.run, KIND, label, cells.cell_key(self.configuration))
        (folder / cells.CELL).unlink(missing_ok=True)  # of an earlier run of the same configuration
        cells.write_json(folder / cells.BEGUN, self.configuration)
        return folder

    def _tracker(self) -> Tracking | None:
        if self.callback.track is None or self.args.process_index != 0:
            return None
        folder = self.folder or Path(self.args.output_dir)
        return Tracking(self.callback.track, folder, self.callback.name, self.configuration)

    def close(self, steps: Sequence[StepRecord], verdict: TrialVerdict | None, status: str) -> None:
        """Take every hook away, close what is open, and keep the cell.

        Args:
            steps: the records.
            verdict: what they say; None where there are none, and then there is no cell either.
            status: of the cell: `done` or `interrupted`.
        """
        for undo in reversed(self._undo):
            undo()
        if self._log is not None:
            self._log.__exit__(None, None, None)
        if self._tracking is not None:
            self._tracking.close(verdict)
        if self.folder is not None:
            (self.folder / cells.BEGUN).unlink(missing_ok=True)
        if self.folder is not None and verdict is not None:
            if status != "done":
                self.status = status
            cell = TrainedCell(self.callback.name, None, self._run(steps), verdict, None)
            cells.write_cell(self.folder, KIND, self.configuration, cell.to_dict(), status=status)

    def _run(self, steps: Sequence[StepRecord]) -> TrainingRun:
        return TrainingRun(
            config=self.config.to_dict(), status=self.status, steps=(), end=end_of(self.config, steps, None),
            device=str(self.head.weight.device), device_reason="of the trainer", candidates=self._sizes["document"],
            pairs=0, vocab_size=self.head.vocab_size, width=self.head.width,
            head_tied=self.head.head.tied_to is not None, head_norm_start=self.head_norm_start,
            head_parameters=sum(p.numel() for p in self.sides["head"]),
            encoder_parameters=sum(p.numel() for p in self.sides["encoder"]),
            seconds=time.perf_counter() - self.started,
        )  # fmt: skip


def _digest(tensors: Sequence[Tensor]) -> str:
    """16 hexadecimal digits that change with any number of the tensors."""
    total = hashlib.sha256()
    for tensor in tensors:
        total.update(tensor.detach().float().cpu().numpy().tobytes())
    return total.hexdigest()[:16]


def masked_lm_head(model: nn.Module) -> LoadedHead:
    """The MLM head inside a `SparseEncoder`, whatever wraps it.

    Raises:
        UsageError: it holds no transformers model.
        HeadscaleError: that model has no MLM head.
    """
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            return load_head(module)
    raise UsageError("the trainer's model holds no transformers model", "give it a `SparseEncoder` with an MLM head")
