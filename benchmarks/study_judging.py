"""Is the verdict right? Statistics chosen and thresholds fitted on one part of the cells, judged on another."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from study_data import LR, Cell, counted, points, short, table

from headscale.demo import FAILING, REFERENCE
from headscale.labels import (
    FADING,
    FORECASTS,
    Score,
    best_of_groups,
    choose,
    fit,
    fit_split,
    foretold,
    group_of,
    label_of,
    score,
    splits_of,
    wilson,
)
from headscale.trials import candidates_of
from headscale.verdict import RULES, Clock, Rules, judge_run, means

SHARE = 0.10
SHARES = (0.05, 0.10, 0.15, 0.20, 0.30, 0.50)
# Where a part has nothing to fit a threshold to, it must not fall back on one that was fitted to the other part: a
# mechanism of which a part shows no failure never fires.
NEVER = math.nan  # what no value is above or below
BLANK = replace(RULES, fails_from=NEVER, trains_to=NEVER, fading_fails_from=NEVER, fading_trains_to=NEVER,
                dense_share=0.1, degraded_accuracy=0.2)  # fmt: skip
Group = Callable[[Cell], object]
KINDS: dict[str, tuple[str, Group]] = {
    "by_point": ("each point of the grid, from all others", lambda c: c.name),
    "by_seed": ("each seed, from the others", lambda c: c.row.seed),
    "by_rate": ("each learning rate, from the others", lambda c: c.row.lr),
    "by_backbone": ("each backbone, from the others", lambda c: c.row.backbone),
}
_MEANS: dict[tuple[str, float], dict[str, float]] = {}


def prefix(cell: Cell, share: float) -> tuple[Any, ...]:
    """The steps that use a share of the summed learning rate."""
    return cell.steps[: Clock(cell.config).steps_for(share)]


def means_at(cell: Cell, share: float) -> dict[str, float]:
    """The means of a cell's last steps at a share of the summed learning rate."""
    key = (cell.row.key, share)
    if key not in _MEANS:
        _MEANS[key] = means(prefix(cell, share), cell.config)
    return _MEANS[key]


def fitted(cells: Sequence[Cell], share: float, *, choosing: bool, base: Rules = BLANK) -> Rules:
    """Rules fitted to cells at a share; the statistics chosen on them too, or those of the package."""
    rules = replace(base, decide_share=share)
    seen = [(means_at(c, share), c.label) for c in cells]
    if choosing:
        rules = choose(rules, seen, [c.name for c in cells])
    else:
        rules = fit(rules, [m for m, _ in seen], [label for _, label in seen])
    return _settled_rules(rules, cells)


def _settled_rules(rules: Rules, cells: Sequence[Cell]) -> Rules:
    late = [(c, means_at(c, rules.settle_share)) for c in cells if not c.failed]
    dims = {
        kind: [m["active_dims_document"] / (c.row.vocab_size or 1) for c, m in late if (c.label == "dense") == kind]
        for kind in (True, False)
    }
    wins = {word: [m["batch_accuracy"] for c, m in late if c.label == word] for word in ("degraded", "stable")}
    if dims[True] and dims[False]:
        rules = replace(rules, dense_share=fit_split("active_dims_document", dims[True], dims[False]).fails_from)
    if wins["degraded"] and wins["stable"]:
        split = fit_split("batch_accuracy", wins["degraded"], wins["stable"])
        rules = replace(rules, degraded_accuracy=split.fails_from)
    return rules


def verdict(cell: Cell, rules: Rules, share: float) -> str:
    """What the rules say from a share of the run."""
    return judge_run(
        prefix(cell, share), cell.config, candidates=candidates_of(cell.config), vocab_size=cell.row.vocab_size or 1,
        rules=rules,
    ).word  # fmt: skip


def held_out(cells: Sequence[Cell], group: Group, share: float, *, choosing: bool) -> dict[str, Any]:
    """Every group judged by rules that saw none of it; all together, and by group."""
    together: list[tuple[Cell, str]] = []
    folds: dict[str, Any] = {}
    for own in dict.fromkeys(group(c) for c in cells):
        known = [c for c in cells if group(c) != own]
        if not known:
            continue
        rules = fitted(known, share, choosing=choosing)
        judged = [(c, verdict(c, rules, share)) for c in cells if group(c) == own]
        together += judged
        folds[str(own)] = {
            "statistics": [rules.statistic, rules.fading_statistic],
            **_scored(score([(c.label, word) for c, word in judged])),
        }
    agreed = _agreed(cells)
    return {
        "together": _scored(score([(c.label, word) for c, word in together])),
        "agreed": _scored(score([(c.label, word) for c, word in together if c.name in agreed])),
        "wrong": [_wrong(c, word, share) for c, word in together if _is_wrong(c, word)],
        "statistics": counted(" and ".join(f["statistics"]) for f in folds.values()),
        "folds": folds if len(folds) < 12 else {},
    }


def transfer(cells: Sequence[Cell], share: float = SHARE, *, choosing: bool = True) -> dict[str, Any]:
    """Thresholds, and statistics if they are chosen, from the bundled backbones alone, judged on all others."""
    home = {REFERENCE, FAILING}
    rules = fitted([c for c in cells if c.row.backbone in home], share, choosing=choosing)
    judged = [(c, verdict(c, rules, share)) for c in cells if c.row.backbone not in home]
    return {
        "statistics": [rules.statistic, rules.fading_statistic],
        "together": _scored(score([(c.label, word) for c, word in judged])),
        "wrong": [_wrong(c, word, share) for c, word in judged if _is_wrong(c, word)],
    }


def _agreed(cells: Sequence[Cell]) -> set[str]:
    """Points whose seeds all failed or all trained."""
    return {p.first.name for p in points(cells) if len({c.failed for c in p.cells}) == 1}


def straddling(cells: Sequence[Cell]) -> list[str]:
    """Points of several seeds of which some failed and some trained."""
    several = [p for p in points(cells) if len(p.cells) > 1]
    split = [p for p in several if len({c.failed for c in p.cells}) == 2]
    return [f"{p.first.name}: " + ", ".join(f"{c.relative:.0%}" for c in p.cells) for p in split]


def _is_wrong(cell: Cell, word: str) -> bool:
    return word != "inconclusive" and (word in ("collapsed", "diverged")) != cell.failed


def _wrong(cell: Cell, word: str, share: float) -> str:
    seen = means_at(cell, share)
    return (
        f"{cell.name}, seed {cell.row.seed}: said {word} (overload {seen['overload']:.3g}, loss "
        f"{seen['loss_over_ln_n']:.3g} x ln N, {seen['active_dims_query']:,.0f} dims per query), ended {cell.label} "
        f"with {cell.relative:.0%} of the best cell's MRR@10"
    )


def _scored(found: Score) -> dict[str, Any]:
    accuracy = found.balanced_accuracy
    return {
        **found.to_dict(), "coverage": found.coverage if found.cells else None,
        "balanced_accuracy": accuracy if math.isfinite(accuracy) else None, "interval": found.interval,
    }  # fmt: skip


def judged(cells: Sequence[Cell]) -> dict[str, Any]:
    """Everything that is said of the verdict."""
    rules = fitted(cells, SHARE, choosing=False)
    alone = without_shifts(cells)
    seen = [means_at(c, SHARE) for c in cells]
    return {
        "cells": len(cells),
        "labels": dict(sorted(counted(c.label for c in cells).items())),
        "failing_by_backbone": counted(short(c.row.backbone) for c in cells if c.failed),
        "rules": _finite(rules.to_dict()),
        "splits": [vars(s) for s in splits_of(rules, seen, [c.label for c in cells])],
        "straddling": straddling(cells),
        "nested": {kind: held_out(cells, group, SHARE, choosing=True) for kind, (_, group) in KINDS.items()},
        "alone": {
            "cells": len(alone),
            "failing": sum(c.failed for c in alone),
            "nested": {kind: held_out(alone, group, SHARE, choosing=True) for kind, (_, group) in KINDS.items()},
            "by_share": {
                f"{s:.2f}": held_out(alone, KINDS["by_point"][1], s, choosing=False)["together"] for s in SHARES
            },
            "straddling": straddling(alone),
        },
        "statistics": {
            "all": _by_statistics(cells),
            "without shifts": _by_statistics(alone),
        },
        "transfer": transfer(cells),
        "transfer_fixed": transfer(cells, choosing=False),
        "by_share": {f"{s:.2f}": held_out(cells, KINDS["by_point"][1], s, choosing=False)["together"] for s in SHARES},
        "in_sample": _scored(score([(c.label, verdict(c, rules, SHARE)) for c in cells])),
        "settled": {f"{s:.2f}": settled(cells, s) for s in (0.3, 0.5, 0.75, 1.0)},
    }


def without_shifts(cells: Sequence[Cell]) -> list[Cell]:
    """The cells whose bias was not moved, labelled against the best of them."""
    own = [c for c in cells if not c.row.shift]
    best = best_of_groups([c.row for c in own], fallback_lr=LR)
    labels = [label_of(c.row, best[group_of(c.row)]) for c in own]
    return [replace(c, label=one.word, relative=one.relative) for c, one in zip(own, labels, strict=True)]


def _by_statistics(cells: Sequence[Cell]) -> dict[str, list[float | None]]:
    """Of every pair of statistics, fixed beforehand: accuracy on points, seeds and learning rates left out."""
    found = {}
    for pair in itertools.product(FORECASTS, FADING):
        base = replace(BLANK, statistic=pair[0], fading_statistic=pair[1])
        found[" and ".join(pair)] = [
            _left_out(cells, KINDS[kind][1], base) for kind in ("by_point", "by_seed", "by_rate")
        ]
    return found


def _left_out(cells: Sequence[Cell], group: Group, base: Rules) -> float | None:
    pairs = []
    for own in dict.fromkeys(group(c) for c in cells):
        known = [c for c in cells if group(c) != own]
        rules = fit(base, [means_at(c, SHARE) for c in known], [c.label for c in known])
        pairs += [(c.label, foretold(rules, means_at(c, SHARE))) for c in cells if group(c) == own]
    accuracy = score(pairs).balanced_accuracy
    return accuracy if math.isfinite(accuracy) else None


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


def settled(cells: Sequence[Cell], share: float) -> dict[str, Any]:
    """Every word from a share of the run, each seed by rules of the other seeds."""
    pairs = []
    for seed in sorted({c.row.seed for c in cells}):
        known = [c for c in cells if c.row.seed != seed]
        rules = fitted(known, SHARE, choosing=False, base=replace(BLANK, settle_share=share))
        pairs += [(c.label, verdict(c, rules, share)) for c in cells if c.row.seed == seed]
    right = sum(_same(a, b) for a, b in pairs)
    return {
        "cells": len(pairs), "right": right, "interval": wilson(right, len(pairs)),
        **{word: _one_word(pairs, word) for word in ("dense", "degraded")},
    }  # fmt: skip


def _same(label: str, word: str) -> bool:
    return label == word or {label, word} == {"collapsed", "diverged"}


def _one_word(pairs: Sequence[tuple[str, str]], word: str) -> list[int]:
    """Of a word: said rightly, of how many that ended so, of how many that were said to."""
    return [sum(a == b == word for a, b in pairs), sum(a == word for a, _ in pairs), sum(b == word for _, b in pairs)]


# --- as text -------------------------------------------------------------------------------------------------------


def sentence(own: dict[str, Any]) -> str:
    """Accuracy, interval, coverage and counts."""
    if own["balanced_accuracy"] is None:
        return f"undefined ({own['failing']} failing, {own['training']} training cells)"
    return (
        "{:.1%} ({:.1%} to {:.1%}; ".format(own["balanced_accuracy"], *own["interval"])
        + f"{own['cells']} cells, coverage {own['coverage']:.0%}; right are {own['failing_right']} of {own['failing']} "
        f"failing and {own['training_right']} of {own['training']} training ones)"
    )


def _row(title: str, own: dict[str, Any]) -> tuple[object, ...]:
    accuracy = own["balanced_accuracy"]
    return (
        title, own["cells"], "-" if own["coverage"] is None else f"{own['coverage']:.0%}",
        "-" if accuracy is None else f"{accuracy:.1%}", "{:.1%} to {:.1%}".format(*own["interval"]),
        f"{own['failing_right']}/{own['failing']}", f"{own['training_right']}/{own['training']}",
    )  # fmt: skip


HEAD = ("judged", "cells", "coverage", "balanced accuracy", "Wilson 95 %", "failing right", "training right")


def section(found: dict[str, Any]) -> str:
    """The part of the page on the verdict."""
    nested = found["nested"]
    rows = [_row(title, nested[kind]["together"]) for kind, (title, _) in KINDS.items()]
    rows.append(_row("all other backbones, from the bundled two", found["transfer"]["together"]))
    rows.append(_row("the same, with the package's statistics", found["transfer_fixed"]["together"]))
    rows.append(_row("each point whose seeds agree", nested["by_point"]["agreed"]))
    rows.append(_row("all, in sample", found["in_sample"]))
    chosen = "; ".join(f"{title}: {_counts(nested[kind]['statistics'])}" for kind, (title, _) in KINDS.items())
    folds = nested["by_backbone"]["folds"]
    wrong = _lines(nested["by_point"]["wrong"])
    foreign = _lines(nested["by_backbone"]["wrong"])
    return f"""{found["cells"]} cells; labels from the end: {_counts(found["labels"])}. Failing by backbone: \
{_counts(found["failing_by_backbone"])}.

From 10 % of the summed learning rate, the two statistics chosen and the thresholds fitted on the other cells each time:

{table(HEAD, rows)}

Chosen (times): {chosen}.

The same without the cells whose bias was moved ({found["alone"]["cells"]} cells, {
        found["alone"]["failing"]
    } failing), \
each labelled against the best of these:

{table(HEAD, [_row(title, found["alone"]["nested"][kind]["together"]) for kind, (title, _) in KINDS.items()])}

{table(("share (each point from all others)", *HEAD[1:]), [_row(s, o) for s, o in found["alone"]["by_share"].items()])}

Each pair of statistics, fixed beforehand: balanced accuracy on points / seeds / learning rates left out:

{_statistics_table(found["statistics"])}

Each backbone by the rules of the others:

{table(HEAD, [_row(short(name), own) for name, own in folds.items()])}

By share of the summed learning rate (each point, from all others; the package's statistics):

{table(("share", *HEAD[1:]), [_row(share, own) for share, own in found["by_share"].items()])}

Judged on each point from all others, at 10 %:

{table(("ended", "said", "cells"), nested["by_point"]["together"]["confusion"])}

Every statistic's best single threshold on cells that do not fade (in sample):

{
        table(
            ("statistic", "threshold", "balanced accuracy"),
            [(s["statistic"], f"{s['fails_from']:.4g}", f"{s['balanced_accuracy']:.1%}") for s in found["splits"]],
        )
    }

Every word, each seed by rules of the others (right / ended so / said so):

{_settled_table(found["settled"])}

Wrong, each point from all others:

{wrong}

Wrong, each backbone from the others:

{foreign}

Points of which some seeds failed and others trained, with what each reached of the best cell's MRR@10 (the line is at \
25 %):

{_lines(found["straddling"])}

Chosen and fitted on all cells: `{json.dumps(found["rules"])}`
"""


def _statistics_table(found: dict[str, dict[str, list[float | None]]]) -> str:
    def shown(values: Sequence[float | None]) -> str:
        return " / ".join("-" if v is None else f"{v:.1%}" for v in values)

    return table(("statistics", *found), [(n, *(shown(own[n]) for own in found.values())) for n in found["all"]])


def _settled_table(found: dict[str, Any]) -> str:
    rows = [
        (share, own["cells"], own["right"], "{:.0%} to {:.0%}".format(*own["interval"]),
         "/".join(map(str, own["dense"])), "/".join(map(str, own["degraded"])))
        for share, own in found.items()
    ]  # fmt: skip
    return table(("share of summed lr", "cells", "words right", "Wilson 95 %", "dense", "degraded"), rows)


def _counts(found: dict[str, int]) -> str:
    return ", ".join(f"{word} {count}" for word, count in found.items()) or "none"


def _lines(found: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in found) or "- none"
