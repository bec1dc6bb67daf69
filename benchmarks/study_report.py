"""What the study's cells say: tables around the prose of `study_findings.md`, from `reports/data/` alone."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

import study_judging
import study_pairs
from study_data import DATA, LAMBDA, LR, SCORES, Cell, Point, points, read_cells, short, table
from study_plan import PRETRAINED

from headscale.constants import ratio_text
from headscale.demo import FAILING, REFERENCE
from headscale.labels import DEGRADED_RELATIVE, DENSE_SHARE, FAIL_RELATIVE

REPORT = DATA.parent / "study.md"
FINDINGS = Path(__file__).parent / "study_findings.md"
HEAD = ("cell", "seeds", "loss at step 0 [ln N]", "loss at the end [ln N]", "active q/d [dims]", "cosine d-d",
        "MRR@10 test", "nDCG@10 dev", "nDCG@10 test", "ended")  # fmt: skip


def point_row(point: Point, name: str = "") -> tuple[object, ...]:
    """One line of a table of cells."""
    cosines = list(point.by_seed("cosine_document").values())
    dims = " / ".join(f"{point.mean(f'active_dims_{side}'):,.0f}" for side in ("query", "document"))
    return (
        name or point.first.name, len(point.cells), f"{point.mean('loss_start'):.3g}",
        point.spread("loss_end", ".2f"), dims, f"{statistics.fmean(cosines):.2f}" if cosines else "-",
        point.spread("mrr_test"), point.spread("ndcg_dev"), point.spread("ndcg_test"), point.words,
    )  # fmt: skip


def sensitivity(cells: Sequence[Cell], backbone: str) -> str:
    """A backbone over constants and head learning rates at the recipe's learning rate."""
    own = [c for c in cells if c.ordinary and c.row.backbone == backbone and not c.row.shift]
    found = points(c for c in own if c.row.mode == "untie")
    found.sort(key=lambda p: (-p.first.row.scale, p.first.row.head_lr_multiplier))
    rows = [point_row(p, "untouched (tied)") for p in points(c for c in own if c.row.mode == "none")]
    rows += [point_row(p, f"{ratio_text(p.first.row.scale)}, x{p.first.row.head_lr_multiplier:g}") for p in found]
    return table(("constant, head lr", *HEAD[1:]), rows)


def controls(cells: Sequence[Cell]) -> str:
    """Everything off the grid but other learning rates and lambdas: modes, shifts, temperatures, warmups."""
    found = [
        p
        for p in points(c for c in cells if (not c.ordinary and not c.row.shift))
        if (p.first.row.lr in (LR, 3e-5)) and "lambda" not in p.first.name
    ]
    return table(HEAD, [point_row(p) for p in sorted(found, key=lambda p: p.first.name)])


def shifts(cells: Sequence[Cell]) -> str:
    """Every cell whose bias was moved, and the untouched and best constants beside them."""
    found = points(c for c in cells if c.row.shift and c.row.lambda_query == LAMBDA)
    found.sort(key=lambda p: (p.first.row.backbone, p.first.row.lr, -p.first.row.scale, p.first.row.shift))
    return table(HEAD, [point_row(p) for p in found])


def learning_rates(cells: Sequence[Cell]) -> str:
    """The grid at the two other learning rates."""
    found = points(c for c in cells if c.row.lr in (1e-4, 1e-3) and c.row.temperature == 1 and not c.row.shift)
    found.sort(key=lambda p: (p.first.row.backbone, p.first.row.lr, -p.first.row.scale, p.first.row.head_lr_multiplier))
    return table(HEAD, [point_row(p) for p in found])


def others(cells: Sequence[Cell]) -> str:
    """The grids of the backbones that are not bundled."""
    parts = [
        f"{short(name)} (`examples/pretrain_bundled.py {arguments}`):\n\n{sensitivity(cells, name)}"
        for name, arguments in PRETRAINED.items()
        if any(c.row.backbone == name for c in cells)
    ]
    return "\n\n".join(parts)


def counts(cells: Iterable[Cell]) -> dict[str, str]:
    """Numbers of the heading."""
    found = list(cells)
    return {
        "CELLS": str(len(found)),
        "BACKBONES": str(len({c.row.backbone for c in found})),
        "SEEDS_3": str(sum(len(p.cells) >= 3 for p in points(found))),
        "POINTS": str(len(points(found))),
        "WITH_NDCG": str(sum(c.row.ndcg_test is not None for c in found)),
    }


def report(_: object = None) -> None:
    """Write `reports/study.md` and what is said of the verdict as JSON."""
    cells = read_cells()
    found = study_judging.judged(cells)
    SCORES.write_text(json.dumps(found, indent=1) + "\n")
    nested = found["nested"]
    parts = {
        **counts(cells),
        "SENSITIVITY_FAILING": sensitivity(cells, FAILING),
        "SENSITIVITY_REFERENCE": sensitivity(cells, REFERENCE),
        "OTHERS": others(cells),
        "TWO_BY_TWO": study_pairs.two_by_two(cells),
        "RANKS": study_pairs.rank_correlations(cells),
        "STEP_0": study_pairs.at_step_0(cells),
        "REGRETS": study_pairs.regrets(cells),
        "FRONTS": study_pairs.fronts(cells),
        "SHIFTS": shifts(cells),
        "CONTROLS": controls(cells),
        "LEARNING_RATES": learning_rates(cells),
        "VERDICT": study_judging.section(found),
        **{kind.upper(): study_judging.sentence(nested[kind]["together"]) for kind in study_judging.KINDS},
        **{
            f"ALONE_{kind.upper()}": study_judging.sentence(found["alone"]["nested"][kind]["together"])
            for kind in study_judging.KINDS
        },
        "AGREED": study_judging.sentence(nested["by_point"]["agreed"]),
        "TRANSFER": study_judging.sentence(found["transfer"]["together"]),
        "TRANSFER_FIXED": study_judging.sentence(found["transfer_fixed"]["together"]),
        "LABELS": f"below {FAIL_RELATIVE:.0%} of the best cell's MRR@10 a run failed, below {DEGRADED_RELATIVE:.0%} "
        f"it is degraded, and above {DENSE_SHARE:.1%} of the vocabulary per document it is dense",
    }  # fmt: skip
    text = FINDINGS.read_text()
    for name, part in parts.items():
        text = text.replace("{{" + name + "}}", part)
    REPORT.write_text(text)
    print(REPORT)


def judge(_: object = None) -> None:
    """Print how right the verdicts are and keep it as JSON."""
    found = study_judging.judged(read_cells())
    SCORES.write_text(json.dumps(found, indent=1) + "\n")
    print(study_judging.section(found))
