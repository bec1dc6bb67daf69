"""Run folders and documents for tests of what is shown, written as the program writes them, without any training."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

from headscale import cells
from headscale.demo import demo_config
from headscale.recipes import TrainingConfig
from headscale.records import (
    GradientNorms,
    Head,
    Inspection,
    LogitStatistics,
    OutputStatistics,
    RankMetrics,
    RunEnd,
    ScaleCurve,
    SideStatistics,
    StepRecord,
    TextSettings,
    TrainedCell,
    TrainingRun,
    VocabularyStatistics,
    WeightStatistics,
)
from headscale.trials import TextSource, folder_of
from headscale.verdict import Watch

VOCAB = 6144
PRINTS = {"train": "a" * 16, "dev": "b" * 16, "test": "c" * 16}
TEXTS = TextSettings("built-in", "d" * 16, 64, 16, 48, 32)


def step_record(step: int, config: TrainingConfig, *, bad: bool, noise: random.Random) -> StepRecord:
    """A step of a run that collapses (`bad`), or of one that trains."""
    share = step / max(1, config.steps - 1)
    loss = (200 * (1 - share) ** 8 + 1 if bad else 0.5 + 1.5 * (1 - share) ** 2) * noise.uniform(0.95, 1.05)
    dims = 200.0 if bad else 60.0 + 2000 * (1 - share) ** 4
    reg, lr = 4.0, config.lr * (1 - share)
    return StepRecord(
        step=step, lr=lr, head_lr=lr, lambda_query=3e-3, lambda_document=1e-3, loss=loss * math.log(32),
        ranking_loss=loss * math.log(32), reg_query=reg, reg_document=reg, weighted_reg_query=0.01,
        weighted_reg_document=0.01, regularizer_share=0.01, loss_over_ln_n=loss,
        batch_accuracy=0.03 if bad else 0.6, score_mean=10.0, score_sd=(50.0 if bad else 2.0) * noise.uniform(0.9, 1.1),
        score_margin=2.0, active_dims_query=dims / 2, active_dims_document=dims, empty_query=0.0, empty_document=0.0,
        mean_weight_query=0.01, mean_weight_document=0.02, max_weight_query=2.0, max_weight_document=2.0,
        flops_reg_query=reg, flops_reg_document=reg, flops_cost=1.0, cosine_query=0.3,
        cosine_document=0.95 if bad else 0.2, coverage=0.5, saturation=0.1, grad_norm=3.0, grad_norm_head=2.0,
        grad_norm_encoder=1.0, clip_factor=0.3, skipped=False, update_ratio=0.01, head_norm=80.0,
        head_norm_drift=1.0, loss_scale=None, memory=1 << 28, seconds=0.1, non_finite=0,
    )  # fmt: skip


def training_cell(
    run: Path, *, backbone: str = "bundled:tiny-modernbert", scale: float | None = None, seed: int = 0,
    steps: int = 30, bad: bool = False, multiplier: float = 1.0, config: TrainingConfig | None = None,
    texts: TextSource | None = None, stop_early: Any = None, mrr: float | None = None, unfinished: bool = False,
) -> Path:  # fmt: skip
    """Write the cell of a training; returns its folder."""
    config = config or demo_config(seed).replace(steps=steps)
    config = config.replace(seed=seed)
    if scale is not None:
        config = config.replace(scale=scale, mode="untie", head_lr_multiplier=multiplier)
    source = texts or TextSource()
    configuration = {
        "backbone": backbone, "revision": None, "identity": "e" * 16, "trust_remote_code": False,
        "training": config.to_dict(), "texts": {**source.to_dict(), "fingerprints": PRINTS},
        "stop_early": stop_early, "headscale": "0.1.0",
    }  # fmt: skip
    noise = random.Random(f"{backbone} {scale} {seed}")
    records = [step_record(i, config, bad=bad, noise=noise) for i in range(config.steps)]
    watch = Watch(config, candidates=32, vocab_size=VOCAB)
    for record in records:
        watch(record)
    folder = folder_of(configuration, run)
    folder.mkdir(parents=True)
    lines = [json.dumps(r.to_dict()) + "\n" for r in records[: len(records) // 2 if unfinished else None]]
    (folder / cells.STEPS).write_text("".join(lines))
    if not unfinished:
        trained = _trained(backbone, config, records, watch, mrr if mrr is not None else 0.02 if bad else 0.2)
        cells.write_cell(folder, "trial", configuration, trained.to_dict())
    return folder


def _trained(backbone: str, config: TrainingConfig, records: list[StepRecord], watch: Watch, mrr: float) -> TrainedCell:
    last = records[-1].to_dict()
    tail = {k: v for k, v in last.items() if isinstance(v, float | int | type(None)) and not isinstance(v, bool)}
    ranking = RankMetrics(500, 500, mrr, mrr / 2, 100.0, 0.006, 40.0, 90.0, 3.0, 0.2)
    end = RunEnd(len(records), 0.01, 1.0, 0, 0, 3, tail, ranking)
    run = TrainingRun(
        config.to_dict(), "finished", (), end, "cpu", "asked for", 32, 5000, VOCAB, 128, False, 80.0, 900_000, 800_000,
        10.0,
    )  # fmt: skip
    return TrainedCell(backbone, None, run, watch.verdict, ranking)


def grid_of_cells(run: Path, *, backbone: str = "bundled:tiny-modernbert", seeds: int = 2, steps: int = 30) -> None:
    """A reference that trains, and a backbone that collapses untouched and trains rescaled."""
    for seed in range(seeds):
        training_cell(run, backbone="bundled:tiny-bert", seed=seed, steps=steps, mrr=0.38 + 0.01 * seed)
        training_cell(run, backbone=backbone, seed=seed, steps=steps, bad=True, mrr=0.02 + 0.01 * seed)
        for scale in (1 / 64, 1 / 16, 1 / 4):
            training_cell(run, backbone=backbone, scale=scale, seed=seed, steps=steps, mrr=0.1 + scale, multiplier=4.0)


def inspection_of(name: str = "someone/backbone", *, loss: float = 308.0, norm: float = 83.0) -> Inspection:
    """An inspection in round numbers."""
    from headscale.diagnosis import judge

    side = SideStatistics(
        64, 100.0, 50.0, 100.0, 150.0, 0.0, 0.02, 1.0, 3.0, 90.0, 12.0, 4.0, 0.5, 0.02, 0.1, (0.1,) * 10
    )
    output = OutputStatistics(
        1.0, 0.0, 32, 2, side, side, 100.0, 50.0, 300.0, 5.0, loss * math.log(32), loss, 0.1, 10.0, 0.1, 0.5,
        (("the", 0.9),), 200.0, 0.01, 0,
    )  # fmt: skip
    scales = tuple(2.0**i for i in range(-10, 3))
    flat = tuple(1.0 for _ in scales)
    losses = tuple(max(0.9, loss * a) for a in scales)
    curve = ScaleCurve(scales, losses, flat, flat, flat, flat, tuple(0.4 for _ in scales), flat, flat, flat, flat)
    spread = tuple(norm / 90 * (0.5 + i / 10) for i in range(11))
    weights = WeightStatistics(
        norm, 0.1, norm / 80, 0.1, 0.3, 2.0, spread, 5, 0.5, 0, None, 0, 20.0, -1.0, -5.0, 5.0, 1.0, 1.0, norm * 1.2,
        norm / 3, 9.0, tuple(norm / (1 + i) for i in range(40)),
    )  # fmt: skip
    return Inspection(
        name, None, Head("bert", "BertForMaskedLM", VOCAB, 128, ("cls.decoder.weight",), None, None, None, False, None),
        weights, VocabularyStatistics(VOCAB, 5, 0, False, 0.0, 0.0, 0.0, 0.0, 0.0), TEXTS,
        LogitStatistics(-3.0, 2.0, tuple(float(q) for q in range(-5, 6)), 0.1, 0.5, 20.0, 1000), output, curve,
        GradientNorms(3.0, 2.0), judge(output, curve),
    )  # fmt: skip


def inspection_cell(run: Path, name: str = "someone/backbone", **numbers: float) -> Path:
    """Write the cell of an inspection; returns its folder."""
    configuration = {"name": name, "identity": None, "texts": TEXTS.to_dict(), "spectral": True, "reference": False}
    folder = cells.cell_folder(run, "inspect", name, cells.cell_key(configuration))
    cells.write_cell(folder, "inspect", configuration, inspection_of(name, **numbers).to_dict())
    return folder
