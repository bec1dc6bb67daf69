"""The study's cells, ranked by what they decide: a part of them, from the front, answers the first questions."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from headscale.demo import FAILING, REFERENCE, demo_config
from headscale.recipes import TrainingConfig

LR = 3e-4
BERT, MODERN = "plain-bert", "held-modernbert"
PRETRAINED = {
    BERT: "--only tiny-bert --set level=null z_loss=0",
    MODERN: "--only tiny-modernbert --set level=5 z_loss=0.01",
    "wide-bert": "--only tiny-bert --set level=null z_loss=0 width=192 layers=4 vocabulary=8192 lr=1.5e-3"
    " weight_decay=0.01 mask=0.15 steps=2500",
    "wide-modernbert": "--only tiny-modernbert --set width=192 layers=4 vocabulary=8192 lr=2e-3 weight_decay=0.01"
    " steps=2000",
    "loud-bert": "--only tiny-bert --set level=8 z_loss=0.01 seed=1 steps=2500",
    "decayed-modernbert": "--only tiny-modernbert --set weight_decay=0.1 seed=1 lr=1e-3 mask=0.15 steps=2500",
}
"""Backbones that are not bundled, by the arguments of `examples/pretrain_bundled.py` that make them. The first two are
the bundled ones with their treatment of the log-normaliser exchanged: two architectures by two treatments."""
OTHERS = tuple(PRETRAINED)[2:]
SEEDS = (0, 1, 2)
Cell = tuple[str, TrainingConfig]


def grid(
    backbone: str,
    pairs: Sequence[tuple[float, float]],
    lrs: tuple[float, ...] = (LR,),
    seeds: tuple[int, ...] = SEEDS,
    **changes: Any,
) -> list[Cell]:
    """Cells of one backbone at pairs of constant and head learning rate; untied unless said otherwise."""
    fixed = {"mode": "untie", **changes}
    return [
        (backbone, demo_config(seed).replace(lr=lr, scale=scale, head_lr_multiplier=multiplier, **fixed))
        for lr, (scale, multiplier), seed in itertools.product(lrs, pairs, seeds)
    ]


def at(scales: Sequence[float], multipliers: Sequence[float] = (1.0,)) -> list[tuple[float, float]]:
    """Every pair of both."""
    return list(itertools.product(scales, multipliers))


def untouched(backbone: str, seeds: tuple[int, ...] = SEEDS, **changes: Any) -> list[Cell]:
    """The head as it comes, tied."""
    return [(backbone, demo_config(seed).replace(**changes)) for seed in seeds]


def sparser(cells: Sequence[Cell], factor: float) -> list[Cell]:
    """The same cells with both lambdas multiplied."""
    return [
        (name, c.replace(lambda_query=factor * c.lambda_query, lambda_document=factor * c.lambda_document))
        for name, c in cells
    ]


def stages(temperature: float, lambda_share: tuple[float, float], shifts: dict[str, float]) -> dict[str, list[Cell]]:
    """The cells by stage, in the order in which they are run.

    Args:
        temperature: at which the failing backbone's untouched scores spread as they do at its calibrated constant.
        lambda_share: what lambda is multiplied by (query, document), so that the regularizers start there too.
        shifts: of every backbone, what `calibrate --shift` would add so that documents have the reference's dims.
    """
    tempered: dict[str, Any] = {
        "temperature": temperature,
        "lambda_query": 3e-3 * lambda_share[0],
        "lambda_document": 1e-3 * lambda_share[1],
    }
    fronts = [
        *grid(FAILING, [(1 / 8, 4.0), (1 / 16, 1.0)], seeds=(0,)), *untouched(REFERENCE, (0,)),
        *grid(FAILING, at((1.0,)), seeds=(0,), shift=shifts[FAILING]),
    ]  # fmt: skip
    few, rest = (0, 1), (1, 2)
    return {
        # What the recommended pair loses against the best one, k = 16 and the width rule: nDCG@10, paired.
        "decisive": [
            *untouched(REFERENCE), *untouched(BERT, (0,)), *untouched(MODERN, (0,)),
            *grid(FAILING, [(1 / 8, 4.0), (1 / 16, 4.0), (1 / 16, 1.0), (1 / 4, 4.0), (1 / 32, 4.0)]),
            *grid(REFERENCE, [(1 / 2, 1.0), (1 / 16, 1.0)], seeds=(0,)), *untouched(FAILING),
            *grid(REFERENCE, [(1 / 4, 4.0), (1 / 2, 4.0), (1 / 2, 1.0), (1 / 16, 1.0), (1.0, 4.0)]),
        ],
        # Does failure follow the architecture, the norm, or the output scale? On backbones that nothing was chosen on.
        "two-by-two": [
            *untouched(BERT), *untouched(MODERN),
            *grid(BERT, at((1 / 8, 1 / 32, 1 / 2), (4.0,)), seeds=(0,)),
            *grid(MODERN, at((1.0, 1 / 4, 1 / 16), (4.0,)), seeds=(0,)),
            *grid(BERT, at((1 / 2, 1 / 8, 1 / 32)), seeds=(0,)), *grid(MODERN, at((4.0, 1.0, 1 / 4)), seeds=(0,)),
        ],
        # Where it fails: what the verdict has to tell, with the seeds that say how sharp the boundary is.
        "failing": [
            *grid(REFERENCE, [(4.0, 1.0), (16.0, 1.0)]), *grid(FAILING, [(1 / 2, 1.0), (1 / 2, 4.0)]),
            *grid(FAILING, [(1.0, 1.0), (1.0, 4.0), (1 / 4, 1.0)], seeds=(0,)),
            *grid(REFERENCE, [(2.0, 1.0), (4.0, 4.0), (16.0, 4.0)], seeds=(0,)),
        ],
        # Another bias: moving all logits alike, which no masked LM's own loss would notice.
        "shift": [
            *grid(FAILING, at((1.0,)), shift=shifts[FAILING]), *grid(REFERENCE, at((4.0,)), shift=-2.0),
            *grid(FAILING, [(1.0, 4.0), (1 / 8, 4.0), (1 / 2, 4.0)], seeds=(0,), shift=shifts[FAILING]),
            *grid(BERT, at((1.0,)), shift=shifts.get(BERT, 0.0)),
            *grid(MODERN, at((1.0,)), shift=shifts.get(MODERN, 0.0)),
            *(c for part in (0.5, 0.75, 1.25) for c in
              grid(FAILING, at((1.0,)), seeds=(0,), shift=part * shifts[FAILING])),
            *grid(FAILING, at((1 / 8,), (4.0,)), seeds=rest, shift=shifts[FAILING]),
            *grid(FAILING, at((1.0,)), (1e-4, 1e-3), seeds=(0,), shift=shifts[FAILING]),
            *grid(FAILING, at((1.0,)), seeds=(0,), mode="fold", shift=shifts[FAILING]),
            *grid(FAILING, at((1 / 2, 1 / 4)), seeds=(0,), shift=shifts[FAILING]),
        ],
        # Effectiveness at the same sparsity: lambda moved up and down, for the pairs that compete.
        "fronts": [
            *sparser(fronts, 4.0), *sparser(fronts, 1 / 2), *sparser(fronts, 16.0), *sparser(fronts, 1 / 8),
        ],
        # More backbones, of another size: does what was found on four hold?
        "others": [
            *(c for name in OTHERS for c in untouched(name, (0,))),
            *(c for name in OTHERS for c in grid(name, at((1.0,)), seeds=(0,), shift=shifts.get(name, 0.0))),
            *(c for name in OTHERS for c in grid(name, at((1 / 8,), (4.0,)), seeds=(0,))),
            *(c for name in OTHERS for c in grid(name, at((1 / 16,)), seeds=(0,))),
            *(c for name in OTHERS for c in untouched(name, rest)),
            *(c for name in OTHERS for c in grid(name, at((1.0,)), seeds=rest, shift=shifts.get(name, 0.0))),
            *(c for name in OTHERS for c in grid(name, at((1 / 4, 1 / 32), (4.0,)), seeds=(0,))),
        ],
        "held-out": [
            *grid(BERT, at((1 / 4, 1 / 16, 1.0), (4.0,)), seeds=(0,)),
            *grid(MODERN, at((4.0, 1 / 2, 1 / 8), (4.0,)), seeds=(0,)),
            *grid(BERT, at((1 / 4, 1 / 2, 1 / 8, 1 / 32), (4.0,)), seeds=rest),
            *grid(MODERN, at((1.0, 1 / 4, 1 / 16), (4.0,)), seeds=rest),
            *grid(BERT, at((4.0, 16.0)), seeds=few), *grid(MODERN, at((4.0, 16.0)), seeds=few),
            *grid(BERT, at((1 / 64,)), seeds=(0,)), *grid(MODERN, at((1 / 16,)), seeds=(0,)),
        ],
        # How a constant can be written, over seeds.
        "modes": [
            *grid(FAILING, at((1 / 8,)), mode="fold"), *grid(FAILING, at((1 / 8,)), mode="logits"),
            *grid(FAILING, at((1 / 8,))), *grid(FAILING, at((1 / 8,), (4.0,)), scale_bias=False),
        ],
        # The rivals: temperature, a lower learning rate, a longer warmup.
        "rivals": [
            *untouched(FAILING, **tempered), *untouched(FAILING, lr=3e-5), *untouched(FAILING, warmup_ratio=0.5),
            *grid(FAILING, at((1.0,), (4.0, 64.0)), seeds=(0,), **tempered),
        ],
        # Two more learning rates.
        "learning-rates": [
            *grid(FAILING, at((1.0, 1 / 16, 1 / 64)), (1e-4, 1e-3), seeds=(0,)),
            *grid(FAILING, at((1 / 4, 1 / 16, 1 / 64), (4.0,)), (1e-4, 1e-3), seeds=(0,)),
            *grid(REFERENCE, at((16.0, 4.0, 1.0)), (1e-4, 1e-3), seeds=(0,)),
        ],
        # The rest of the curve from 1/512 to 16.
        "sensitivity": [
            *grid(FAILING, at((1 / 64,), (1.0, 4.0))), *grid(FAILING, at((1 / 32,))),
            *grid(REFERENCE, at((1 / 4, 1.0))),
            *grid(FAILING, at((1 / 128, 1 / 256, 1 / 512), (1.0, 4.0)), seeds=(0,)),
            *grid(REFERENCE, [(2.0, 4.0), (1 / 16, 4.0)], seeds=(0,)),
            *grid(FAILING, at((1.0, 1 / 4)), seeds=rest), *grid(REFERENCE, at((2.0,), (1.0, 4.0)), seeds=rest),
        ],
        "more": [
            *grid(FAILING, at((1.0, 1 / 16)), (1e-4, 1e-3), seeds=rest),
            *grid(REFERENCE, at((4.0, 1.0)), (1e-4, 1e-3), seeds=rest),
            *grid(FAILING, at((1.0, 1 / 128), (4.0,)), seeds=rest), *grid(REFERENCE, [(4.0, 4.0)], seeds=rest),
            *grid(REFERENCE, at((1 / 64, 1 / 256), (1.0, 4.0)), seeds=(0,)),
            *grid(FAILING, at((1 / 64,)), mode="fold"), *grid(FAILING, at((1 / 64,)), scale_bias=False),
        ],
    }  # fmt: skip
