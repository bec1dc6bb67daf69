"""Which pair of constant and head learning rate is best, and which rule of step 0 finds it."""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.stats import spearmanr
from study_data import LAMBDA, LR, TARGETS, Cell, Point, loss_text, points, relative_loss, short, table

from headscale.constants import nearest_power_of_two, ratio_text
from headscale.demo import REFERENCE

MULTIPLIER = 4.0  # of the head's learning rate where the constant shrinks the head
CANDIDATES = 32


def measured() -> dict[str, Any]:
    """What was measured of every backbone before training."""
    return {name: one for name, one in json.loads(TARGETS.read_text()).items() if name != "identities"}


def crossing(curve: dict[str, Any], statistic: str, goal: float) -> float | None:
    """The largest constant of a curve at which a statistic is at the goal, between points by powers."""
    scales, values = np.log2(curve["scale"]), np.log(np.maximum(curve[statistic], 1e-12)) - math.log(goal)
    above = np.flatnonzero((values[:-1] <= 0) != (values[1:] <= 0))
    if not len(above):
        return None
    i = int(above[-1])
    share = values[i] / (values[i] - values[i + 1])
    return float(2 ** (scales[i] + share * (scales[i + 1] - scales[i])))


Start = tuple[float | None, float, float]  # constant, head learning rate, shift


def rules_of(one: dict[str, Any], goals: dict[str, Any]) -> dict[str, Start]:
    """What every rule asks for, from what was measured before training; no constant above 1.

    Args:
        one: of the backbone.
        goals: of the reference.
    """
    curve = one["curve"]
    chosen = one["calibration"]
    found: dict[str, Start] = {
        "`calibrate`": (chosen["scale"], chosen["head_lr_multiplier"], round(chosen["shift"], 3)),
    }
    asked = {t["name"]: t for t in one["targets"]}
    for name in ("norm", "activation", "score"):
        found[name] = _pair(asked[name]["snapped"])
    for ceiling, target in one["ceilings"].items():
        found[f"loss, c = {float(ceiling):g}"] = _pair(target["snapped"])
    reference = goals["output"]["score_margin"]
    found["margin of the reference"] = _pair(_snapped(crossing(curve, "score_margin", reference)))
    for times in (2.0, 2.5, 3.0):
        goal = times * math.log(CANDIDATES)
        found[f"margin = {times:g} ln N"] = _pair(_snapped(crossing(curve, "score_margin", goal)))
    found["k = 16, head lr x1"] = (1 / 16, 1.0, 0.0)
    found["k = 16, head lr x4"] = (1 / 16, MULTIPLIER, 0.0)
    found["width, head lr x1"] = (asked["width"]["snapped"], 1.0, 0.0)
    found["width, head lr x4"] = (asked["width"]["snapped"], MULTIPLIER, 0.0)
    found["untouched"] = (1.0, 1.0, 0.0)
    return found


def _snapped(scale: float | None) -> float | None:
    return None if scale is None else nearest_power_of_two(scale)


def _pair(scale: float | None) -> Start:
    if scale is None or scale >= 1:
        return (scale if scale is None else 1.0), 1.0, 0.0
    return scale, MULTIPLIER, 0.0


def competing(cells: Sequence[Cell], backbone: str) -> dict[Start, Point]:
    """The points of the grid of a backbone; the untouched head is (1, 1, 0)."""
    own = [c for c in cells if c.ordinary and c.row.backbone == backbone]
    found: dict[Start, Point] = {}
    for point in points(own):
        row = point.first.row
        key = (row.scale, row.head_lr_multiplier, round(row.shift, 3))
        if key not in found or row.mode == "none":  # untied and left alone is the same start
            found[key] = point
    return {key: point for key, point in found.items() if point.by_seed("ndcg_test")}


def best_of(found: dict[Start, Point]) -> Point:
    """The best on dev pairs among the points with the most seeds."""
    most = max(len(p.by_seed("ndcg_dev")) for p in found.values())
    return max((p for p in found.values() if len(p.by_seed("ndcg_dev")) == most), key=lambda p: p.mean("ndcg_dev"))


def start_text(start: Start) -> str:
    """`1/8 x4`, or with its shift."""
    scale, multiplier, shift = start
    shown = "none" if scale is None else f"{ratio_text(scale)} x{multiplier:g}"
    return f"{shown}, shift {shift:.3g}" if shift else shown


def regrets(cells: Sequence[Cell]) -> str:
    """What every rule loses against the best pair of each backbone."""
    known = measured()
    grids = {name: competing(cells, name) for name in known}
    grids = {name: grid for name, grid in grids.items() if grid}
    bests = {name: best_of(grid) for name, grid in grids.items()}
    goals = known[REFERENCE]
    names = list(rules_of(goals, goals))
    rows = []
    for rule in names:
        row: list[str] = [rule]
        for name, grid in grids.items():
            pair = rules_of(known[name], goals)[rule]
            row.append(f"{start_text(pair)}: {loss_text(grid.get(pair), bests[name])}")
        rows.append(row)
    lines = [
        f"- {short(name)}: best on dev {best.first.name} ({len(best.by_seed('ndcg_dev'))} seeds; nDCG@10 on test "
        f"{best.spread('ndcg_test')}; {len(grids[name])} pairs tried)"
        for name, best in bests.items()
    ]
    return "\n".join(lines) + "\n\n" + table(("rule", *(short(n) for n in grids)), rows)


def at_step_0(cells: Sequence[Cell]) -> str:
    """What was measured before training beside what came of it, for every pair that was run."""
    known = measured()
    rows = []
    for name, one in known.items():
        grid = competing(cells, name)
        best = best_of(grid) if grid else None
        for (scale, multiplier, shift), point in sorted(
            grid.items(), key=lambda item: (-(item[0][0] or 0), item[0][1])
        ):
            if shift or scale is None:
                continue  # the curve is that of the bias as it is
            place = int(np.argmin(np.abs(np.log2(one["curve"]["scale"]) - math.log2(scale))))
            values = [
                one["curve"][s][place]
                for s in ("loss_over_ln_n", "score_margin", "score_sd", "cosine", "active_mean_weight")
            ]
            step = LR * multiplier / (scale * one["weights"]["rms"])
            assert best is not None
            rows.append((
                short(name), start_text((scale, multiplier, 0.0)), *(f"{v:.3g}" for v in values), f"{step:.3f}",
                point.spread("ndcg_test"), f"{1 - relative_loss(point, best)[0]:.0%}", point.words,
            ))  # fmt: skip
    return table(
        ("backbone", "pair", "loss [ln N]", "margin", "score sd", "cosine d-d", "mean active weight",
         "head step lr / RMS(aW)", "nDCG@10 test", "of the best", "ended"), rows,
    )  # fmt: skip


def two_by_two(cells: Sequence[Cell]) -> str:
    """Every backbone untouched: norm, output, and how it ended."""
    known = measured()
    rows = []
    for name, one in known.items():
        point = competing(cells, name).get((1.0, 1.0, 0.0))
        if point is None:
            continue
        output = one["output"]
        rows.append((
            short(name), f"{one['weights']['frobenius']:.1f}", f"{output['loss_over_ln_n']:.3g}",
            f"{output['score_margin']:.3g}", f"{output['document']['mean_cosine']:.2f}",
            f"{output['query']['active_dims']:,.0f} / {output['document']['active_dims']:,.0f}",
            point.spread("ndcg_test"), point.words, *_gain(cells, name, point),
        ))  # fmt: skip
    return table(
        ("backbone, untouched", "Frobenius norm", "loss at step 0 [ln N]", "margin at step 0", "cosine d-d",
         "active q/d at step 0", "nDCG@10 test", "ended", "of its best pair"), rows,
    )  # fmt: skip


def _gain(cells: Sequence[Cell], name: str, point: Point) -> tuple[str]:
    best = best_of_any(competing(cells, name))
    return (f"{point.mean('ndcg_test') / best.mean('ndcg_test'):.0%} ({best.first.name.partition(', ')[2]})",)


def best_of_any(found: dict[Start, Point]) -> Point:
    """The best on dev pairs, however many seeds it has."""
    return max(found.values(), key=lambda p: p.mean("ndcg_dev"))


def rank_correlations(cells: Sequence[Cell]) -> str:
    """Spearman's rho over backbones, one point each: what of step 0 orders the share of its best that each reaches."""
    known = measured()
    grids = {name: competing(cells, name) for name in known}
    grids = {name: g for name, g in grids.items() if (1.0, 1.0, 0.0) in g and len(g) > 1}
    reached = [g[(1.0, 1.0, 0.0)].mean("ndcg_test") / best_of_any(g).mean("ndcg_test") for g in grids.values()]
    if len(reached) < 4:
        return f"{len(reached)} backbones: too few to rank."
    columns = {
        "Frobenius norm": [known[n]["weights"]["frobenius"] for n in grids],
        "loss at step 0": [known[n]["output"]["loss_over_ln_n"] for n in grids],
        "margin at step 0": [known[n]["output"]["score_margin"] for n in grids],
        "cosine d-d at step 0": [known[n]["output"]["document"]["mean_cosine"] for n in grids],
    }
    rows = []
    for name, values in columns.items():
        rho = spearmanr(values, reached).statistic
        orders = [abs(spearmanr(values, order).statistic) for order in itertools.permutations(reached)]
        share = statistics.fmean(o >= abs(rho) - 1e-9 for o in orders)
        rows.append((name, len(reached), f"{rho:.2f}", f"{share:.2f}"))
    return table(("of the untouched backbone", "backbones", "Spearman's rho with the share reached", "p (exact)"), rows)


# --- matched sparsity ----------------------------------------------------------------------------------------------


def fronts(cells: Sequence[Cell], dims: Sequence[float] = (50.0, 100.0, 200.0, 400.0)) -> str:
    """nDCG@10 at given active dims per document, between the lambdas that were run (linear in ln dims)."""
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        row = cell.row
        usual = row.lr == LR and row.temperature == 1 and row.warmup_ratio == 0.1
        if usual and cell.scale_bias and row.mode in ("untie", "none") and row.ndcg_test is not None and row.seed == 0:
            groups.setdefault(cell.name.partition(", lambda")[0], []).append(cell)
    rows = []
    for name, group in groups.items():
        if len({c.row.lambda_query for c in group}) < 3:
            continue
        ordered = sorted(group, key=lambda c: c.row.active_dims_document or 0)
        known = [(math.log(max(1.0, c.row.active_dims_document or 0)), c.row.ndcg_test or 0.0) for c in ordered]
        values = []
        for wanted in dims:
            x = math.log(wanted)
            inside = known[0][0] <= x <= known[-1][0]
            values.append(f"{np.interp(x, *zip(*known, strict=True)):.3f}" if inside else "-")
        made = "; ".join(
            f"x{c.row.lambda_query / LAMBDA:.3g}: {c.row.active_dims_document:,.0f} dims {c.row.ndcg_test:.3f}"
            for c in sorted(ordered, key=lambda c: c.row.lambda_query)
        )
        rows.append((name, *values, made))
    if not rows:
        return "Not run."
    return table(("pair", *(f"at {d:,.0f} dims" for d in dims), "lambda: dims, nDCG@10 (seed 0)"), rows)
