"""One process of two, for `test_distributed.py`: runs scenarios by name and keeps what each gave."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tiny_corpus import Example, tiny_pairs, tiny_tokenizer
from tiny_models import tiny_model

import headscale.encoder
from headscale.batches import Batch, batches
from headscale.distributed import Team, join
from headscale.trainer import Trainer
from headscale.training import TrainingConfig, train

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
CONFIG = TrainingConfig(
    steps=4, batch_size=8, lr=1e-4, warmup_ratio=0.0, ramp_steps=0, query_length=12, document_length=16, mode="untie",
    scale=0.125, lambda_query=1e-2, lambda_document=1e-2, device="cpu",
)  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "pairs": {},
    "negatives": {"negatives": 2, "query_regularizer": "l1"},
    "own negatives": {"negatives": 1, "shared_negatives": False, "flops_threshold": 20},
    "distilled": {"negatives": 2, "loss": "margin-mse"},
    "kl": {"negatives": 2, "loss": "kl"},
    "parts": {"negatives": 1, "micro_batch": 3},
    "accumulated": {"negatives": 1, "accumulation": 2, "clip": None},
    "half": {"precision": "bf16"},
}
EXACT = [name for name in VARIANTS if name != "half"]
PAIRS = tiny_pairs(40, negatives=2)


def gradients(team: Team | None, *, double: bool = False, **changes: Any) -> dict[str, Any]:
    """Loss and gradients of one step, before any clipping or update."""
    config = CONFIG.replace(**changes)
    model = tiny_model("bert", **NO_DROPOUT)
    if double:
        model.float = model.double
    trainer = Trainer(model, tiny_tokenizer(), config, team=team)
    stream = batches(PAIRS, batch_size=config.batch_size, negatives=config.negatives)
    parts = [next(stream) for _ in range(config.accumulation)]
    observed = trainer._gradients(parts, (1e-2, 1e-2))
    assert observed is not None
    parameters = [*trainer.head_parameters, *trainer.encoder_parameters]
    trainer.team.sum_gradients(parameters)
    return {"observed": observed, "gradients": [None if p.grad is None else p.grad.clone() for p in parameters]}


def trained(team: Team | None, *, ranked: bool = True, **changes: Any) -> dict[str, Any]:
    model = tiny_model("bert", **NO_DROPOUT)
    pool = PAIRS if ranked else ()
    run = train(model, tiny_tokenizer(), PAIRS, CONFIG.replace(**changes), inplace=True, team=team, evaluation=pool)
    return {"run": run.to_dict(), "weights": model.state_dict()}


def short_of_memory(team: Team) -> dict[str, Any]:
    """The second process alone has no room for more than three texts."""
    pool = headscale.encoder.splade_pool

    def small(hidden: Any, *args: Any, **kwargs: Any) -> Any:
        if team.rank == 1 and len(hidden) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return pool(hidden, *args, **kwargs)

    headscale.encoder.splade_pool = small  # type: ignore[assignment]
    try:
        return trained(team, ranked=False)
    finally:
        headscale.encoder.splade_pool = pool


def failing(team: Team) -> str:
    """The second process alone meets an error in the middle of its third step."""
    share = team.share

    def broken(batch: Batch) -> Batch:
        broken.calls += 1  # type: ignore[attr-defined]
        return share(batch) if team.rank == 0 or broken.calls < 3 else Batch((None,) * 4, (None,) * 4, None)  # type: ignore

    broken.calls = 0  # type: ignore[attr-defined]
    team.share = broken  # type: ignore[method-assign]
    try:
        trained(team)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        del team.share
    return "nothing"


def stopping(team: Team) -> list[Any]:
    """The first process says stop; the other's own callback is never asked."""
    asked = []

    def stop(record: Any) -> bool:
        asked.append(record.step)
        return team.rank == 1 or record.step == 1

    run = train(tiny_model("bert"), tiny_tokenizer(), PAIRS, CONFIG, team=team, on_step=stop)
    return [run.status, len(run.steps), asked]


def interrupted(team: Team) -> list[Any]:
    """Ctrl-C reaches the second process alone."""
    share = team.share

    def press(batch: Batch) -> Batch:
        press.calls += 1  # type: ignore[attr-defined]
        if team.rank == 1 and press.calls == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return share(batch)

    press.calls = 0  # type: ignore[attr-defined]
    team.share = press  # type: ignore[method-assign]
    try:
        run = train(tiny_model("bert"), tiny_tokenizer(), PAIRS, CONFIG, team=team)
    finally:
        del team.share
    return [run.status, len(run.steps)]


def other_weights(team: Team) -> dict[str, Any]:
    """Processes that loaded other weights start from the first one's."""
    model = tiny_model("bert", seed=team.rank, **NO_DROPOUT)
    train(model, tiny_tokenizer(), PAIRS, CONFIG, inplace=True, team=team)
    return {"weights": model.state_dict()}


def dropping(team: Team) -> dict[str, Any]:
    """With dropout the processes stay together, and differ in what they drop."""
    model = tiny_model("bert", hidden_dropout_prob=0.5)
    same = [Example(PAIRS[0].query, PAIRS[0].document)] * 8
    seen: list[torch.Tensor] = []
    pool = headscale.encoder.splade_pool

    def noted(*args: Any, **kwargs: Any) -> Any:
        seen.append(pool(*args, **kwargs))
        return seen[-1]

    headscale.encoder.splade_pool = noted  # type: ignore[assignment]
    try:
        train(model, tiny_tokenizer(), same, CONFIG.replace(steps=2), inplace=True, team=team)
    finally:
        headscale.encoder.splade_pool = pool
    return {"weights": model.state_dict(), "first": seen[2].detach()}  # after the two texts of the forecast


def uneven(team: Team) -> str:
    try:
        train(tiny_model("bert"), tiny_tokenizer(), PAIRS, CONFIG.replace(batch_size=7), team=team)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def dying(team: Team) -> str:
    """The second process is killed without a word; must come last."""

    def die(batch: Batch) -> Batch:
        os.kill(os.getpid(), signal.SIGKILL)
        return batch

    if team.rank == 1:
        team.share = die  # type: ignore[method-assign]
    try:
        trained(team)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def main(rank: int, store: str, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    team = join()
    found: dict[str, Any] = {
        f"gradients {name}": gradients(team, **VARIANTS[name]) for name in ("pairs", "negatives", "half")
    }
    found |= {f"double {name}": gradients(team, double=True, **VARIANTS[name]) for name in EXACT}
    found |= {f"trained {name}": trained(team, **VARIANTS[name]) for name in ("pairs", "negatives", "parts")}
    scenarios = (short_of_memory, failing, stopping, interrupted, other_weights, dropping, uneven)
    for scenario in scenarios:
        found[scenario.__name__] = scenario(team)
    torch.save(found, folder / f"{rank}.pt")
    found["dying"] = dying(team)
    torch.save(found, folder / f"{rank}.pt")


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
