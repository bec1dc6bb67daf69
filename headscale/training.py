"""Real SPLADE training of any masked LM, observed at every step."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from functools import partial
from itertools import islice
from typing import Any

from torch import nn

from headscale.batches import TextPair, batches
from headscale.device import seeded
from headscale.distributed import Team
from headscale.memory import check_memory, forecast_memory
from headscale.ranking import rank_metrics
from headscale.recipes import RECIPES, Recipe, TrainingConfig, recipe
from headscale.records import RankMetrics, RunEnd, StepRecord, TrainingRun
from headscale.trainer import Trainer

__all__ = ["RECIPES", "Recipe", "Trainer", "TrainingConfig", "recipe", "train"]

_STRIDE = 1_000_003  # between the seeds of two processes: far from the few that people take
OnStep = Callable[[StepRecord], object]


def train(
    model: nn.Module,
    tokenizer: Any,
    pairs: Sequence[TextPair],
    config: TrainingConfig,
    *,
    evaluation: Sequence[TextPair] = (),
    on_step: OnStep | None = None,
    inplace: bool = False,
    team: Team | None = None,
    tell: Callable[[str], object] | None = None,
) -> TrainingRun:
    """Train a masked LM as a SPLADE encoder for `config.steps` steps and record every one.

    The order of the pairs and dropout depend on the seed alone, so that arms with the same seed are paired.

    Args:
        model: a masked LM of transformers, in memory; it is left as it was unless `inplace`.
        tokenizer: the model's.
        pairs: queries and documents, `batch_size` of them at least.
        config: the run; `config.scale` is applied as `config.mode` says before the first step.
        evaluation: pairs whose documents are ranked for their queries once training is over.
        on_step: called with every record as it is made; the run stops where it returns True. Of several processes
            the first one alone calls it, and all do as it says.
        inplace: rescale and train `model` itself.
        team: the processes that share every batch (`headscale.distributed.join`), each of which makes this call;
            losses and gradients are those of one process with the whole batch.
        tell: told in a sentence when memory runs short and a batch is taken in smaller parts.

    Returns:
        the run; on Ctrl-C what there is of it, with the status "interrupted".

    Raises:
        UsageError: a configuration that does not suit the model, the pairs or the machine.
        MemoryForecastError: not even one text at a time fits, or a batch is forecast not to fit in the memory of a
            CPU; the hint then names a part of it that does.
    """
    started = time.perf_counter()
    team = team or Team()
    with team.agreed():
        team.check(config.batch_size)
        own = model if inplace else copy.deepcopy(model)
    trainer = Trainer(own, tokenizer, config, team=team, tell=tell)
    if trainer.choice.name == "cpu":
        with team.agreed():
            _check_memory(trainer, pairs)
    steps: list[StepRecord] = []
    # Every process draws dropout of its own; the order of the pairs is the same on all.
    with seeded(config.seed + _STRIDE * team.rank, trainer.choice.name), team.patient():
        status = _run(trainer, pairs, steps, on_step)
        ranked = evaluation and status != "interrupted"
        ranking = team.first_does(partial(_evaluated, trainer, evaluation)) if ranked else None
    return TrainingRun(
        config=config.to_dict(),
        status=status,
        steps=tuple(steps),
        end=end_of(config, steps, ranking),
        device=trainer.choice.name,
        device_reason=trainer.choice.reason,
        candidates=trainer.candidates,
        pairs=len(pairs),
        vocab_size=trainer.head.vocab_size,
        width=trainer.head.width,
        head_tied=trainer.head_tied,
        head_norm_start=trainer.head_norm_start,
        head_parameters=sum(p.numel() for p in trainer.head_parameters),
        encoder_parameters=sum(p.numel() for p in trainer.encoder_parameters),
        seconds=time.perf_counter() - started,
        processes=team.size,
        texts_at_once=trainer.texts_at_once,
    )


def _run(trainer: Trainer, pairs: Sequence[TextPair], steps: list[StepRecord], on_step: OnStep | None) -> str:
    """Fill `steps` and say how the run ended."""
    config = trainer.config
    stream = batches(pairs, batch_size=config.batch_size, negatives=config.negatives, seed=config.seed)
    try:
        for _ in range(config.steps):
            record = trainer.step(list(islice(stream, config.accumulation)))
            steps.append(record)
            if on_step is not None and trainer.team.first_does(partial(on_step, record)) is True:
                return "stopped"
            if math.isnan(record.head_norm):  # every later score would be NaN too
                return "non-finite"
    except KeyboardInterrupt:
        return "interrupted"
    return "finished"


def _check_memory(trainer: Trainer, pairs: Sequence[TextPair]) -> None:
    config = trainer.config
    if len(pairs) < config.batch_size:
        return  # refused with its own sentence when batches are asked for
    forecast = forecast_memory(
        trainer.encoder,
        (max((p.query for p in pairs), key=len), config.query_length),
        (max((p.document for p in pairs), key=len), config.document_length),
        [*trainer.head_parameters, *trainer.encoder_parameters],
        trainer.matrices,
    )
    team = trainer.team  # those of its processes that share this machine's memory
    queries = config.batch_size * team.local_size // team.size
    forecast = replace(forecast, fixed=forecast.fixed * team.local_size)
    check_memory(forecast, queries, queries * (1 + config.negatives), config.micro_batch)


def _evaluated(trainer: Trainer, pairs: Sequence[TextPair]) -> RankMetrics:
    config = trainer.config
    queries = trainer.encoder.encode([p.query for p in pairs], max_length=config.query_length)
    documents = trainer.encoder.encode([p.document for p in pairs], max_length=config.document_length)
    return rank_metrics(queries, documents)


def end_of(config: TrainingConfig, steps: Sequence[StepRecord], ranking: RankMetrics | None) -> RunEnd:
    """The end of a run in numbers: means over its last tenth, and the ranking if there is one."""
    schedule = config.schedule()
    total = schedule.lr_sum()
    tail = steps[-max(1, len(steps) // 10) :]
    numbers = [f.name for f in fields(StepRecord) if f.name not in ("step", "seconds", "memory")]
    return RunEnd(
        steps=len(steps),
        lr_sum=config.lr * schedule.lr_sum(len(steps)),
        lr_sum_share=schedule.lr_sum(len(steps)) / total if total else 1.0,  # as the verdict's clock
        non_finite_steps=sum(record.non_finite > 0 for record in steps),
        skipped_steps=sum(record.skipped for record in steps),
        tail_steps=len(tail),
        tail={name: _mean([getattr(record, name) for record in tail]) for name in numbers},
        ranking=ranking,
    )


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
