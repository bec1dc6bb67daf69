"""The study's cells, ranked by what they decide: a part of them, from the front, answers the first questions."""

from __future__ import annotations

import itertools
from typing import Any

from headscale.demo import FAILING, REFERENCE, demo_config
from headscale.recipes import TrainingConfig

LR = 3e-4
UP = (16.0, 4.0)
Cell = tuple[str, TrainingConfig]


def grid(
    backbone: str,
    scales: tuple[float, ...],
    multipliers: tuple[float, ...] = (1.0, 4.0),
    lrs: tuple[float, ...] = (LR,),
    seeds: tuple[int, ...] = (0,),
    **changes: Any,
) -> list[Cell]:
    """Cells of one backbone; the constant is written untied unless said otherwise."""
    fixed = {"mode": "untie", **changes}
    return [
        (backbone, demo_config(seed).replace(lr=lr, scale=scale, head_lr_multiplier=multiplier, **fixed))
        for seed, lr, scale, multiplier in itertools.product(seeds, lrs, scales, multipliers)
    ]


def untouched(backbone: str, seeds: tuple[int, ...], **changes: Any) -> list[Cell]:
    """The head as it comes, tied."""
    return [(backbone, demo_config(seed).replace(**changes)) for seed in seeds]


def stages(temperature: float, lambda_share: tuple[float, float]) -> dict[str, list[Cell]]:
    """The cells by stage, in the order in which they are run.

    Args:
        temperature: at which the failing backbone's untouched scores spread as they do at its calibrated constant.
        lambda_share: what lambda is multiplied by (query, document), so that the regularizers start there too.
    """
    rest = (1, 2)
    one = (1.0,)
    tempered = {
        "temperature": temperature,
        "lambda_query": 3e-3 * lambda_share[0],
        "lambda_document": 1e-3 * lambda_share[1],
    }
    return {
        "sensitivity": [
            *untouched(REFERENCE, (0,)), *untouched(FAILING, (0,)),
            *grid(FAILING, (1 / 64, 1 / 16, 1 / 4, 1 / 256)), *grid(REFERENCE, UP, one),
            *grid(FAILING, (1 / 32, 1 / 128, 1 / 8)), *grid(REFERENCE, (1 / 4, 1 / 16), one),
        ],
        "seeds": [
            *untouched(REFERENCE, rest), *untouched(FAILING, rest),
            *grid(FAILING, (1 / 64, 1 / 16, 1 / 32), seeds=rest), *grid(REFERENCE, UP[:1], one, seeds=rest),
        ],
        "controls": [
            *untouched(FAILING, (0,), **tempered), *untouched(FAILING, (0,), lr=3e-5),
            *untouched(FAILING, (0,), warmup_ratio=0.5), *grid(FAILING, (1 / 64,), one, mode="fold"),
            *grid(FAILING, (1 / 64,), one, scale_bias=False), *grid(FAILING, one, (4.0, 64.0), **tempered),
        ],
        "selection": [
            *grid(FAILING, (1 / 8, 1 / 4), seeds=rest), *grid(REFERENCE, (4.0,), one, seeds=rest),
            *grid(REFERENCE, (1.0, 1 / 4)), *grid(FAILING, (1 / 128,), (4.0,), seeds=rest),
            *grid(REFERENCE, (2.0, 1 / 2)),
        ],
        "learning-rates": [
            *grid(FAILING, (1.0, 1 / 16, 1 / 64), one, lrs=(1e-4, 1e-3)),
            *grid(REFERENCE, (*UP, 1.0), one, lrs=(1e-4, 1e-3)), *grid(FAILING, (1 / 16,), (4.0,), lrs=(1e-4, 1e-3)),
        ],
        "wide": [
            *grid(FAILING, (1 / 2,), seeds=rest), *grid(REFERENCE, (16.0, 4.0), (4.0,)),
            *grid(REFERENCE, (1 / 4,), one, seeds=rest), *grid(FAILING, (1 / 128,), one, seeds=rest),
            *untouched(FAILING, rest, **tempered), *grid(FAILING, (1 / 4, 1 / 64), (4.0,), lrs=(1e-4, 1e-3)),
            *grid(FAILING, (1.0, 1 / 2, 1 / 512)), *grid(REFERENCE, (1 / 16,), (4.0,)),
            *grid(FAILING, (1 / 4,), one, lrs=(1e-4, 1e-3)),
            *untouched(FAILING, rest, warmup_ratio=0.5),
            *grid(FAILING, (1 / 64,), one, seeds=rest, mode="fold"),
            *grid(FAILING, (1 / 64,), one, seeds=rest, scale_bias=False),
        ],
        "more": [
            *grid(FAILING, (1.0, 1 / 16), lrs=(1e-4, 1e-3), seeds=rest),
            *grid(REFERENCE, (4.0, 16.0), one, lrs=(1e-4, 1e-3), seeds=rest),
            *grid(FAILING, (1.0,), seeds=rest), *grid(REFERENCE, (2.0, 1.0), seeds=rest),
            *grid(FAILING, (1 / 256, 1 / 512), seeds=rest),
            *grid(FAILING, (1 / 4, 1 / 64), lrs=(1e-4, 1e-3), seeds=rest),
            *grid(REFERENCE, (1.0, 1 / 4), one, lrs=(1e-4, 1e-3), seeds=(0, *rest)),
            *grid(REFERENCE, (1 / 64, 1 / 256), seeds=(0, *rest)),
        ],
    }  # fmt: skip
