"""Watch sentence-transformers' `SparseEncoderTrainer`: our observations and verdict at every step of their run.

The numbers are read where their losses take them: from the embeddings that enter `compute_loss_from_embeddings`, and
from what it and the regularizers return. `SpladeLoss` and `CachedSpladeLoss` share that seam, and what the trainer
itself logs is rounded to four decimals, with NaN replaced by a running mean. Nothing is fed back: the weights are
bitwise those of a run without the callback.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from torch import nn
from transformers import TrainerCallback

from headscale.errors import UsageError
from headscale.interop.tracking import check_backend
from headscale.interop.watching import Watching
from headscale.records import StepRecord, TrialVerdict
from headscale.verdict import RULES, WORDS, Rules

if TYPE_CHECKING:
    from headscale.trials import OnStep


class HeadscaleCallback(TrainerCallback):  # type: ignore[misc]  # transformers has no stubs
    """Streams a `StepRecord` and the verdict of every step, and stops a run that has failed.

    Observed is what this process trains on: under several processes its own part of the batch, of which only the
    main one's is kept. Use it as a context manager where training may end with an error: the hooks are then taken
    away, and the cell is kept as interrupted.

    Args:
        loss: the `SpladeLoss` (or `CachedSpladeLoss`) that the trainer gets, built and not yet trained with.
        run: the run folder; a cell like a trial's is kept there, which `headscale report` reads. None: nothing is.
        name: of the model, in the cell.
        stop_on: verdicts on which the run ends once they are certain, such as `collapsed` and `diverged`.
        every: steps between two observations.
        rules: the thresholds of the verdict.
        on_step: called with every record and the verdict so far.
        track: also log to `tensorboard`, `wandb` or `trackio`.

    Attributes:
        steps: the records so far.
        verdict: what they say of the whole run; its steps are the trainer's.
        folder: of the cell, once training has begun.

    Raises:
        UsageError: a loss without regularizers, an unknown verdict or tracker; as training begins, a model without
            a transformers model in it, or `stop_on` under several processes.
        HeadscaleError: as training begins, a model without an MLM head.

    Example:
        >>> loss = SpladeLoss(model, SparseMultipleNegativesRankingLoss(model), 1e-3, 5e-5)  # doctest: +SKIP
        >>> watch = HeadscaleCallback(loss, run="headscale-runs", stop_on={"collapsed", "diverged"})  # doctest: +SKIP
        >>> SparseEncoderTrainer(model, args, data, loss=loss, callbacks=[watch]).train()  # doctest: +SKIP
    """

    def __init__(
        self,
        loss: nn.Module,
        *,
        run: str | Path | None = None,
        name: str = "sparse-encoder",
        stop_on: Iterable[str] = (),
        every: int = 1,
        rules: Rules = RULES,
        on_step: OnStep | None = None,
        track: str | None = None,
    ) -> None:
        self.loss: Any = _checked_loss(loss)
        self.full_lambdas: tuple[float | None, float | None] = (  # before their ramp has begun
            self.loss.query_regularizer_weight,
            self.loss.document_regularizer_weight,
        )
        self.stop_on = _checked_words(stop_on)
        if every < 1:
            raise UsageError(f"`every` must be at least 1, not {every}", "1 observes every step")
        self.track = None if track is None else check_backend(track)
        self.run = None if run is None else Path(run)
        self.name, self.every, self.rules, self.on_step = name, every, rules, on_step
        self.steps: list[StepRecord] = []
        self.verdict: TrialVerdict | None = None
        self.folder: Path | None = None
        self._watching: Watching | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end("interrupted")  # where training has ended by itself there is nothing left to do

    def _end(self, status: str) -> None:
        if self._watching is not None:
            watching, self._watching = self._watching, None
            watching.close(self.steps, self.verdict, status)

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Find the head, take the run's own schedule, put the hooks in place."""
        self._end("interrupted")
        if self.stop_on and args.world_size > 1:
            raise UsageError(
                f"`stop_on` is for a run of one process, and this one has {args.world_size}",
                "leave it out and read the verdict from the log",
            )
        self.steps, self.verdict = [], None
        self._watching = Watching(self, given["model"], args, state, given["optimizer"], given["lr_scheduler"])
        self.folder = self._watching.folder

    def on_step_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Start the clock of a step."""
        if self._watching is not None:
            self._watching.begin(state.global_step)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """The gradients are whole, and clipped."""
        if self._watching is not None:
            self._watching.before_update()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """The weights have moved."""
        if self._watching is not None:
            self._watching.after_update()

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Judge, write, and stop where asked to."""
        if self._watching is None or not self._watching.observing:
            return
        record, self.verdict = self._watching.finish()
        self.steps.append(record)
        if self.on_step is not None:
            self.on_step(record, self.verdict)
        if self.verdict.certain and self.verdict.word in self.stop_on:
            self._watching.status = "stopped"
            control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Keep the cell and take the hooks away."""
        self._end("done")


def _checked_words(words: Iterable[str]) -> frozenset[str]:
    chosen = frozenset([words] if isinstance(words, str) else words)
    unknown = sorted(chosen - set(WORDS))
    if unknown:
        raise UsageError(f"no verdict is called `{'`, `'.join(unknown)}`", f"of {', '.join(WORDS)}")
    return chosen


def _checked_loss(loss: Any) -> Any:
    inner = getattr(loss, "loss", None)
    if not hasattr(inner, "compute_loss_from_embeddings") or not hasattr(loss, "document_regularizer"):
        raise UsageError(
            f"`{type(loss).__name__}` is no ranking loss with regularizers beside it",
            "give the `SpladeLoss` or `CachedSpladeLoss` that the trainer gets",
        )
    return loss
