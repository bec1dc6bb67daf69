"""What a full run turned out to be, from its end alone; how well verdicts foresaw it; and rules fitted to that."""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist

from headscale.records import Record, SweepRow
from headscale.verdict import FAILED, LOW_IS_BAD, TRAINED, Rules, forecast_of

# A run that ends with less than a quarter of what the best cell of its group reaches did not train: collapsed runs
# of tiny backbones reach 1 to 5 % of it, slow ones about a third (measured).
FAIL_RELATIVE = 0.25
# Seeds of one cell differ by 5 to 18 % (sd, measured); a fifth below the best is more than that.
DEGRADED_RELATIVE = 0.8
# Ten times the share of a healthy document: 250 of 30,522 terms (sentence-transformers' guide to sparse encoders).
DENSE_SHARE = 10 * 250 / 30_522
# A loss at the end of twice that of knowing nothing is confident and wrong.
DIVERGED_LOSS = 2.0
GROUP_LEAST = 4  # cells that a group needs for its best one to be a yardstick


@dataclass(frozen=True)
class Label(Record):
    """What a full run turned out to be."""

    word: str  # stable, dense, degraded, collapsed or diverged
    relative: float  # MRR@10 over that of the best cell of the group


def group_of(row: SweepRow) -> tuple[str, float]:
    """Cells of one backbone and learning rate are compared with each other."""
    return (row.backbone, row.lr)


def best_of_groups(rows: Iterable[SweepRow], *, fallback_lr: float) -> dict[tuple[str, float], float]:
    """The best cell's MRR@10 on test pairs by group, a cell being the mean over its seeds.

    Args:
        rows: finished cells.
        fallback_lr: groups of fewer than `GROUP_LEAST` cells take the yardstick of this learning rate.
    """
    points: dict[tuple[str, float], dict[tuple[object, ...], list[float]]] = {}
    for row in rows:
        if row.mrr_test is not None:
            points.setdefault(group_of(row), {}).setdefault(point_of(row), []).append(row.mrr_test)
    best = {group: max(sum(v) / len(v) for v in cells.values()) for group, cells in points.items()}
    small = [group for group, cells in points.items() if len(cells) < GROUP_LEAST]
    return {**best, **{g: best.get((g[0], fallback_lr), best[g]) for g in small}}


def point_of(row: SweepRow) -> tuple[object, ...]:
    """Everything of a cell but its seed."""
    return (row.backbone, row.scale, row.mode, row.head_lr_multiplier, row.lr, row.temperature, row.lambda_query,
            row.lambda_document, row.warmup_ratio, row.shift)  # fmt: skip


def label_of(row: SweepRow, best: float) -> Label:
    """The label of a finished full run.

    Args:
        row: the cell; only what it says of the end is looked at.
        best: MRR@10 of the best cell of its group.
    """
    relative = (row.mrr_test or 0.0) / best if best > 0 else 0.0
    finite = row.loss_end is not None and math.isfinite(row.loss_end) and row.head_norm_end is not None
    if not finite:
        return Label("diverged", relative)
    assert row.loss_end is not None
    if relative < FAIL_RELATIVE:
        return Label("diverged" if row.loss_end > DIVERGED_LOSS else "collapsed", relative)
    if (row.active_dims_document or 0.0) > DENSE_SHARE * (row.vocab_size or math.inf):
        return Label("dense", relative)
    return Label("degraded" if relative < DEGRADED_RELATIVE else "stable", relative)


# --- how right the verdicts were -----------------------------------------------------------------------------------


def wilson(successes: int, trials: int, z: float = NormalDist().inv_cdf(0.975)) -> tuple[float, float]:
    """Wilson's score interval of a proportion, 95 % by default; (0, 1) of nothing."""
    if not trials:
        return 0.0, 1.0
    share = successes / trials
    centre = share + z * z / (2 * trials)
    spread = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


@dataclass(frozen=True)
class Score(Record):
    """Verdicts against labels: train or fail on the decided ones, abstention as coverage."""

    cells: int
    decided: int
    failing: int  # decided cells whose label is a failure
    failing_right: int
    training: int
    training_right: int
    confusion: tuple[tuple[str, str, int], ...]  # label, verdict, cells

    @property
    def coverage(self) -> float:
        """Share of the cells that were decided."""
        return self.decided / self.cells if self.cells else math.nan

    @property
    def balanced_accuracy(self) -> float:
        """Mean of the two recalls."""
        if not self.failing or not self.training:
            return math.nan
        return (self.failing_right / self.failing + self.training_right / self.training) / 2

    @property
    def interval(self) -> tuple[float, float]:
        """Of the balanced accuracy: the mean of the two recalls' Wilson bounds, which is on the wide side."""
        one = wilson(self.failing_right, self.failing)
        two = wilson(self.training_right, self.training)
        return (one[0] + two[0]) / 2, (one[1] + two[1]) / 2


def score(pairs: Sequence[tuple[str, str]]) -> Score:
    """How right verdicts were.

    Args:
        pairs: (label, verdict) of every cell.
    """
    decided = [(label, word) for label, word in pairs if word != "inconclusive"]
    failing = [word for label, word in decided if label in FAILED]
    training = [word for label, word in decided if label in TRAINED]
    counts = Counter(pairs)
    return Score(
        cells=len(pairs),
        decided=len(decided),
        failing=len(failing),
        failing_right=sum(word in FAILED for word in failing),
        training=len(training),
        training_right=sum(word in TRAINED for word in training),
        confusion=tuple((label, word, count) for (label, word), count in sorted(counts.items())),
    )


# --- fitting -------------------------------------------------------------------------------------------------------

FORECASTS = ("loss_over_ln_n", "score_sd", "margin_over_sd", "reach", "overload")
"""What may tell training from failing; all but `LOW_IS_BAD` are bad where they are large."""
FADING = ("loss_over_ln_n", "loss_per_term")
"""The same where few terms are left."""
OTHERS = ("batch_accuracy", "cosine_document", "cosine_query", "grad_norm")
"""Tried, and shown beside them."""
LEAST_COVERAGE = 0.9


@dataclass(frozen=True)
class Split:
    """A threshold pair on one statistic and how well it separates the cells it was fitted on."""

    statistic: str
    fails_from: float
    trains_to: float
    balanced_accuracy: float
    gap: float  # ln of the ratio of the two values at the threshold; their difference where one is not positive


def fit_split(statistic: str, failing: Sequence[float], training: Sequence[float]) -> Split:
    """The threshold on a statistic with the best balanced accuracy; the middle half of its gap abstains.

    Args:
        statistic: its name; `LOW_IS_BAD` says which side fails.
        failing: its values in cells that failed.
        training: its values in cells that trained.
    """
    sign = -1.0 if statistic in LOW_IS_BAD else 1.0
    bad, good = sorted(sign * v for v in failing), sorted(sign * v for v in training)
    values = sorted({*bad, *good})
    best = (-1.0, 0.0, values[0], values[0])
    for low, high in itertools.pairwise(values):
        caught, spared = len(bad) - bisect_left(bad, high), bisect_right(good, low)
        right = (caught / len(bad) + spared / len(good)) / 2
        best = max(best, (right, _distance(low, high), low, high))
    right, gap, low, high = best
    return Split(statistic, sign * _between(low, high, 0.75), sign * _between(low, high, 0.25), right, gap)


def _distance(low: float, high: float) -> float:
    return abs(math.log(high / low)) if low * high > 0 else high - low


def _between(low: float, high: float, share: float) -> float:
    """A part of the way from one to the other: by ratio where both have one sign."""
    if low * high > 0:
        return math.copysign(abs(low) ** (1 - share) * abs(high) ** share, low)
    return low + share * (high - low)


def fit(rules: Rules, prefixes: Sequence[Mapping[str, float]], labels: Sequence[str]) -> Rules:
    """Rules with both forecasts fitted to cells; the statistics are those of `rules`.

    Args:
        rules: what is not fitted; a forecast whose cells all ended alike keeps its thresholds.
        prefixes: of every cell, its means (`headscale.verdict.means`) at `rules.decide_share`.
        labels: of every cell.
    """
    fading, others = _by_terms(rules, prefixes, labels)
    split = _split(rules.fading_statistic, fading)
    if split is not None:
        rules = replace(rules, fading_fails_from=split.fails_from, fading_trains_to=split.trains_to)
    split = _split(rules.statistic, others)
    if split is not None:
        rules = replace(rules, fails_from=split.fails_from, trains_to=split.trains_to)
    return rules


def splits_of(rules: Rules, prefixes: Sequence[Mapping[str, float]], labels: Sequence[str]) -> tuple[Split, ...]:
    """Every statistic's best split of the cells that do not fade, the best first; arguments as for `fit`."""
    _, others = _by_terms(rules, prefixes, labels)
    splits = [s for s in (_split(name, others) for name in (*FORECASTS, *OTHERS)) if s is not None]
    return tuple(sorted(splits, key=lambda s: -s.balanced_accuracy))


Ended = tuple[Mapping[str, float], bool]  # means, and whether the run failed


def _by_terms(
    rules: Rules, prefixes: Sequence[Mapping[str, float]], labels: Sequence[str]
) -> tuple[list[Ended], list[Ended]]:
    """Cells whose queries have few terms, and the others."""
    known = list(zip(prefixes, (label in FAILED for label in labels), strict=True))
    fading = [(p, bad) for p, bad in known if p["active_dims_query"] < rules.fading_dims]
    return fading, [(p, bad) for p, bad in known if not p["active_dims_query"] < rules.fading_dims]


Known = tuple[Mapping[str, float], str]


def choose(rules: Rules, cells: Sequence[Known], groups: Sequence[object]) -> Rules:
    """Rules with the pair of statistics that foretells cells best which it was not fitted to, and fitted to all.

    Args:
        rules: what is neither chosen nor fitted.
        cells: means and label of every cell.
        groups: of every cell, such as its point of the grid; each group in turn is left out of the fit and foretold.
    """

    def right(statistics: tuple[str, str]) -> float:
        tried = replace(rules, statistic=statistics[0], fading_statistic=statistics[1])
        pairs = []
        for group in dict.fromkeys(groups):
            known = [cell for cell, own in zip(cells, groups, strict=True) if own != group]
            fitted = fit(tried, [m for m, _ in known], [label for _, label in known])
            left = [cell for cell, own in zip(cells, groups, strict=True) if own == group]
            pairs += [(label, foretold(fitted, seen)) for seen, label in left]
        found = score(pairs)
        missed = found.failing - found.failing_right, found.training - found.training_right
        kept = found.balanced_accuracy if min(found.failing, found.training) else -float(sum(missed))
        return kept if found.coverage >= LEAST_COVERAGE else kept - 1.0

    best = max(itertools.product(FORECASTS, FADING), key=right)  # of equals the first, which is the simplest
    chosen = replace(rules, statistic=best[0], fading_statistic=best[1])
    return fit(chosen, [m for m, _ in cells], [label for _, label in cells])


def foretold(rules: Rules, seen: Mapping[str, float]) -> str:
    """`collapsed`, `stable` or `inconclusive` by the two forecasts alone.

    Args:
        rules: the thresholds.
        seen: the means of a prefix.
    """
    statistic, fails_from, trains_to = forecast_of(rules, seen)
    sign = -1 if statistic in LOW_IS_BAD else 1
    if sign * seen[statistic] >= sign * fails_from:
        return "collapsed"
    return "inconclusive" if sign * seen[statistic] > sign * trains_to else "stable"


def _split(statistic: str, cells: Sequence[Ended]) -> Split | None:
    failing = [p[statistic] for p, bad in cells if bad and math.isfinite(p[statistic])]
    training = [p[statistic] for p, bad in cells if not bad and math.isfinite(p[statistic])]
    return fit_split(statistic, failing, training) if failing and training else None
