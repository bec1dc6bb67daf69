"""Results of any number of backbones, made from the golden ones: other names, norms, rankings and curves."""

from __future__ import annotations

import math
import random
import zlib
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from headscale.records import Inspection, RankMetrics
from headscale.results import Results, Training, load

GOLDEN = Path(__file__).parent / "golden"
LONG = "some-organisation/an-extremely-long-name-that-goes-on-for-ever-and-says-nothing-v{}-uncased-whole-word-masking"


@cache
def golden() -> Results:
    """The golden run folder."""
    return load([GOLDEN / "runs"])


def ranked(training: Training, mrr: float | None, **changes: Any) -> Training:
    """A training with another MRR@10 on its test pairs, and other fields of that ranking."""
    assert training.cell is not None
    end = training.cell.run.end
    assert isinstance(end.ranking, RankMetrics)
    ranking = replace(end.ranking, mrr_at_10=mrr, **changes)
    cell = replace(training.cell, run=replace(training.cell.run, end=replace(end, ranking=ranking)))
    return replace(training, cell=cell)


def renamed(training: Training, backbone: str) -> Training:
    """The same training of another backbone."""
    assert training.cell is not None
    configuration = {**training.configuration, "backbone": backbone}
    key = f"{zlib.crc32(f'{training.key} {backbone}'.encode()):012x}"
    return replace(training, configuration=configuration, key=key, cell=replace(training.cell, backbone=backbone))


def scaled_norms(inspection: Inspection, name: str, factor: float) -> Inspection:
    """An inspection of another backbone whose head is larger."""
    weights = inspection.weights
    quantiles = tuple(q * factor for q in weights.row_norm_quantiles)
    values = tuple(v * factor for v in weights.singular_values or ())
    weights = replace(
        weights, frobenius=weights.frobenius * factor, row_norm_quantiles=quantiles, singular_values=values
    )
    return replace(inspection, name=name, weights=weights)


def many(count: int, name: Callable[[int], str] = "organisation/backbone-{:03d}".format, *, seed: int = 0) -> Results:
    """Backbones of all norms, each trained at three constants with two seeds; the larger the norm, the worse."""
    rng = random.Random(seed)
    failing = [t for t in golden().trainings if t.backbone == "bundled:tiny-modernbert"]
    inspections, trainings = [], []
    for i in range(count):
        factor = math.exp(rng.gauss(0, 0.8))
        inspections.append(scaled_norms(golden().inspections[i % 2], name(i), factor))
        for one in failing:
            mrr = min(1.0, max(0.0, 0.4 - 0.1 * math.log(factor) + rng.gauss(0, 0.04)))
            dims = 300 * math.exp(rng.gauss(0, 1))
            trainings.append(renamed(ranked(one, mrr, active_dims_document=dims), name(i)))
    return Results(tuple(inspections), (), tuple(trainings), references=(name(0),))
