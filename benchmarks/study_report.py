"""What the study's cells say: rules fitted and judged, tables, and `reports/study.md`; from `reports/data/` alone."""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, get_type_hints

from scipy.stats import t as student

from headscale.constants import ratio_text
from headscale.demo import FAILING, REFERENCE, demo_config
from headscale.labels import (
    DEGRADED_RELATIVE,
    DENSE_SHARE,
    FAIL_RELATIVE,
    Score,
    Split,
    best_of_groups,
    fit,
    fit_split,
    group_of,
    label_of,
    score,
    wilson,
)
from headscale.recipes import TrainingConfig
from headscale.records import StepRecord, SweepRow
from headscale.trials import candidates_of
from headscale.verdict import FAILED, RULES, STATISTICS, Clock, Rules, judge_run, means

DATA = Path(__file__).resolve().parent.parent / "reports" / "data"
REPORT = DATA.parent / "study.md"
ROWS, STEPS, TARGETS, SCORES = (
    DATA / name for name in ("study.tsv", "study-steps.tsv.gz", "study-targets.json", "study-verdicts.json")
)
LR = 3e-4
SHARES = (0.05, 0.10, 0.15, 0.20, 0.30, 0.50, 0.75, 1.0)
# Where a part has nothing to fit a threshold to, it must not fall back on one that was fitted to the other part.
BLANK = replace(RULES, fails_from=2.0, trains_to=2.0, fading_fails_from=2.0, fading_trains_to=2.0, dense_share=0.1,
                degraded_accuracy=0.2)  # fmt: skip
KEPT = ("loss", "head_norm", *STATISTICS)  # what the rules look at


# --- the data ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """A finished cell: its row, its steps, and what it turned out to be."""

    row: SweepRow
    scale_bias: bool
    stage: str
    steps: tuple[StepRecord, ...] = ()
    label: str = ""
    relative: float = math.nan

    @property
    def config(self) -> TrainingConfig:
        return demo_config(self.row.seed).replace(lr=self.row.lr, warmup_ratio=self.row.warmup_ratio)

    @property
    def plain(self) -> bool:
        """Of the grid over constants and head learning rates: no control."""
        row = self.row
        return row.mode == "untie" and row.temperature == 1 and self.scale_bias and row.lr == LR


def write_steps(folders: dict[str, Path]) -> None:
    """Keep what the rules look at of every step, to five digits, so that judging needs no run folder."""
    from headscale.steplog import read_steps

    text = io.StringIO()
    writer = csv.writer(text, delimiter="\t", lineterminator="\n")
    writer.writerow(("key", "step", *KEPT))
    for key, folder in sorted(folders.items()):
        for record in read_steps(folder / "steps.jsonl"):
            writer.writerow((key, record["step"], *(_digits(record[name]) for name in KEPT)))
    STEPS.write_bytes(gzip.compress(text.getvalue().encode(), mtime=0))


def _digits(value: float | None) -> str:
    return "" if value is None else f"{value:.5g}"


def _read_steps() -> dict[str, tuple[StepRecord, ...]]:
    found: dict[str, list[StepRecord]] = defaultdict(list)
    with gzip.open(STEPS, "rt") as file:
        for line in csv.DictReader(file, delimiter="\t"):
            values: dict[str, Any] = {f.name: 0.0 for f in fields(StepRecord)}
            values.update({name: float(line[name]) if line[name] else None for name in KEPT})
            found[line["key"]].append(StepRecord(**{**values, "step": int(line["step"])}))
    return {key: tuple(steps) for key, steps in found.items()}


def read_cells() -> list[Cell]:
    """Every finished cell with its label."""
    hints = get_type_hints(SweepRow)
    steps = _read_steps()
    found = []
    with ROWS.open(newline="") as file:
        for line in csv.DictReader(file, delimiter="\t"):
            values = {name: _value(line[name], str(hints[name])) for name in hints}
            row = SweepRow(**values)
            if row.status == "done":
                found.append(Cell(row, line["scale_bias"] == "True", line["stage"], steps.get(row.key, ())))
    best = best_of_groups([c.row for c in found], fallback_lr=LR)
    labelled = [(c, label_of(c.row, best[group_of(c.row)])) for c in found]
    return [replace(c, label=label.word, relative=label.relative) for c, label in labelled]


def _value(text: str, hint: str) -> Any:
    if text == "" and "None" in hint:
        return None
    if "int" in hint and "float" not in hint and "str" not in hint:
        return int(text)
    return float(text) if "float" in hint else text


# --- the verdict ---------------------------------------------------------------------------------------------------


def prefix(cell: Cell, share: float) -> tuple[StepRecord, ...]:
    """The steps that use a share of the summed learning rate."""
    return cell.steps[: Clock(cell.config).steps_for(share)]


_MEANS: dict[tuple[str, float], dict[str, float]] = {}


def means_at(cell: Cell, share: float) -> dict[str, float]:
    """The means of a cell's last steps at a share of the summed learning rate."""
    key = (cell.row.key, share)
    if key not in _MEANS:
        _MEANS[key] = means(prefix(cell, share))
    return _MEANS[key]


def fitted(rules: Rules, cells: Sequence[Cell], share: float) -> tuple[Rules, tuple[Split, ...]]:
    """The forecast fitted at a share, and what tells dense and degraded runs, at `settle_share`."""
    rules = replace(rules, decide_share=share)
    rules, splits = fit(rules, [means_at(c, share) for c in cells], [c.label for c in cells])
    late = [(c, means_at(c, rules.settle_share)) for c in cells if c.label not in FAILED]
    dims = {
        kind: [m["active_dims_document"] / (c.row.vocab_size or 1) for c, m in late if (c.label == "dense") == kind]
        for kind in (True, False)
    }
    wins = {
        kind: [m["batch_accuracy"] for c, m in late if c.label == word]
        for kind, word in ((True, "degraded"), (False, "stable"))
    }
    if dims[True] and dims[False]:
        rules = replace(rules, dense_share=fit_split("active_dims_document", dims[True], dims[False]).fails_from)
    if wins[True] and wins[False]:
        rules = replace(rules, degraded_accuracy=fit_split("batch_accuracy", wins[True], wins[False]).fails_from)
    return rules, splits


def verdict(cell: Cell, rules: Rules, share: float) -> str:
    return judge_run(
        prefix(cell, share), cell.config, candidates=candidates_of(cell.config), vocab_size=cell.row.vocab_size or 1,
        rules=rules,
    ).word  # fmt: skip


Part = Callable[[Cell], bool]


def held_out(cells: Sequence[Cell], folds: Sequence[tuple[str, Part, Part]], share: float, at: float) -> dict[str, Any]:
    """Rules fitted on one part and judged on another, fold by fold, and all judged cells together."""
    pairs: list[tuple[str, str]] = []
    parts = {}
    for name, fit_on, judge_on in folds:
        known, unseen = [c for c in cells if fit_on(c)], [c for c in cells if judge_on(c)]
        if not unseen or not known:
            continue
        rules, _ = fitted(BLANK, known, share)
        own = [(c.label, verdict(c, rules, at)) for c in unseen]
        pairs += own
        parts[name] = {"fitted_on": len(known), "rules": rules.to_dict(), **_scored(score(own))}
    return {"together": _scored(score(pairs)), "folds": parts}


def _without_folds(found: dict[str, Any]) -> dict[str, Any]:
    return {"together": found["together"]}


def _scored(found: Score) -> dict[str, Any]:
    return {
        **found.to_dict(), "coverage": found.coverage, "coverage_interval": wilson(found.decided, found.cells),
        "balanced_accuracy": _or_none(found.balanced_accuracy), "interval": found.interval,
    }  # fmt: skip


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


BY_BACKBONE: tuple[tuple[str, Part, Part], ...] = (
    (
        "fitted on ModernBERT, judged on BERT",
        lambda c: c.row.backbone == FAILING,
        lambda c: c.row.backbone == REFERENCE,
    ),
    (
        "fitted on BERT, judged on ModernBERT",
        lambda c: c.row.backbone == REFERENCE,
        lambda c: c.row.backbone == FAILING,
    ),
)
BY_SEED: tuple[tuple[str, Part, Part], ...] = (
    ("fitted on seed 0, judged on seeds 1 and 2", lambda c: c.row.seed == 0, lambda c: c.row.seed > 0),
)
BY_RATE: tuple[tuple[str, Part, Part], ...] = (
    ("fitted at lr 3e-4, judged at 1e-4 and 1e-3", lambda c: c.row.lr == LR, lambda c: c.row.lr != LR),
)
ALL: tuple[tuple[str, Part, Part], ...] = (("fitted and judged on all", lambda c: True, lambda c: True),)


def by_point(cells: Sequence[Cell]) -> tuple[tuple[str, Part, Part], ...]:
    """Every point of the grid judged by rules that saw none of its seeds."""

    def fold(name: str) -> tuple[str, Part, Part]:
        return name, lambda c: describe(c) != name, lambda c: describe(c) == name

    return tuple(fold(name) for name in dict.fromkeys(describe(c) for c in cells))


def judged(cells: Sequence[Cell]) -> dict[str, Any]:
    """Everything that is said of the verdict."""
    rules, splits = fitted(BLANK, cells, 0.10)
    return {
        "cells": len(cells),
        "labels": dict(sorted(_counts(c.label for c in cells).items())),
        "rules": rules.to_dict(),
        "splits": [vars(s) for s in splits],
        "by_backbone": {f"{s:.2f}": held_out(cells, BY_BACKBONE, s, s) for s in SHARES},
        "by_seed": {f"{s:.2f}": held_out(cells, BY_SEED, s, s) for s in SHARES},
        "by_rate": {f"{s:.2f}": held_out(cells, BY_RATE, s, s) for s in SHARES},
        "by_point": {f"{s:.2f}": _without_folds(held_out(cells, by_point(cells), s, s)) for s in SHARES[:6]},
        "in_sample": {f"{s:.2f}": held_out(cells, ALL, s, s) for s in SHARES},
        "settled": {f"{s:.2f}": _settled(cells, s) for s in SHARES if s >= 0.3},
        "wrong": _wrong(cells, rules),
    }


def _counts(words: Iterable[str]) -> dict[str, int]:
    found: dict[str, int] = defaultdict(int)
    for word in words:
        found[word] += 1
    return found


def _settled(cells: Sequence[Cell], share: float) -> dict[str, Any]:
    """Every word, from a share of the run: rules fitted on seed 0 for the train-or-fail forecast and both others."""
    known, unseen = [c for c in cells if c.row.seed == 0], [c for c in cells if c.row.seed > 0]
    rules, _ = fitted(replace(BLANK, settle_share=share), known, 0.10)
    pairs = [(c.label, verdict(c, rules, share)) for c in unseen]
    right = sum(a == b for a, b in pairs)
    return {
        "cells": len(pairs),
        "right": right,
        "interval": wilson(right, len(pairs)),
        "confusion": score(pairs).confusion,
    }


def _wrong(cells: Sequence[Cell], rules: Rules) -> list[str]:
    found = []
    for cell in cells:
        word = verdict(cell, rules, 0.10)
        if word != "inconclusive" and (word in FAILED) != (cell.label in FAILED):
            seen = means_at(cell, 0.10)
            found.append(
                f"{describe(cell)}, seed {cell.row.seed}: said {word} (loss {seen['loss_over_ln_n']:.3g} "
                f"x ln N, {seen['active_dims_query']:,.0f} active dims per query), ended "
                f"{cell.label} with {cell.relative:.0%} of the best cell's MRR@10"
            )
    return found


def describe(cell: Cell) -> str:
    row = cell.row
    parts = [
        row.backbone.removeprefix("bundled:"),
        "untouched" if row.mode == "none" else f"a = {ratio_text(row.scale)}",
    ]
    parts += [f"head lr x{row.head_lr_multiplier:g}"] if row.head_lr_multiplier != 1 else []
    parts += [row.mode] if row.mode not in ("none", "untie") else []
    parts += ["W only"] if not cell.scale_bias else []
    parts += [f"lr {row.lr:g}"] if row.lr != LR else []
    parts += [f"temperature {row.temperature:.4g}"] if row.temperature != 1 else []
    parts += [f"warmup {row.warmup_ratio:.0%}"] if row.warmup_ratio != 0.1 else []
    return ", ".join(parts)


def judge(_: Path | None = None) -> None:
    """Print how right the verdicts are and keep it as JSON."""
    cells = read_cells()
    found = judged(cells)
    SCORES.write_text(json.dumps(found, indent=1) + "\n")
    print(verdict_section(found))


# --- points --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """One cell over its seeds."""

    cells: tuple[Cell, ...]

    @property
    def first(self) -> Cell:
        return self.cells[0]

    def mean(self, name: str) -> float:
        return statistics.fmean(self.by_seed(name).values())

    def spread(self, name: str, form: str = ".3f") -> str:
        values = list(self.by_seed(name).values())
        if not values:
            return "-"
        shown = format(statistics.fmean(values), form)
        return shown if len(values) < 2 else f"{shown} ± {format(statistics.stdev(values), form)}"

    def by_seed(self, name: str) -> dict[int, float]:
        return {c.row.seed: getattr(c.row, name) for c in self.cells if getattr(c.row, name) is not None}

    @property
    def words(self) -> str:
        return ", ".join(f"{word} {n}x" if n > 1 else word for word, n in _counts(c.label for c in self.cells).items())


def points(cells: Iterable[Cell]) -> list[Point]:
    groups: dict[str, list[Cell]] = defaultdict(list)
    for cell in cells:
        groups[describe(cell)].append(cell)
    return [Point(tuple(sorted(group, key=lambda c: c.row.seed))) for group in groups.values()]


def relative_loss(point: Point, best: Point) -> tuple[float, tuple[float, float] | None, int]:
    """1 - MRR@10 over the best cell's on test pairs: of the means over common seeds, with a paired t interval."""
    own, other = point.by_seed("mrr_test"), best.by_seed("mrr_test")
    common = sorted(own.keys() & other.keys())
    if not common:
        return math.nan, None, 0
    scale = statistics.fmean(other[s] for s in common)
    losses = [(other[s] - own[s]) / scale for s in common]
    mean = statistics.fmean(losses)
    if len(losses) < 2:
        return mean, None, 1
    half = float(student.ppf(0.975, len(losses) - 1)) * statistics.stdev(losses) / math.sqrt(len(losses))
    return mean, (mean - half, mean + half), len(losses)


def chosen_on_dev(found: Sequence[Point]) -> Point:
    """The best on dev pairs among the cells with the most seeds."""
    most = max(len(p.cells) for p in found)
    return max((p for p in found if len(p.cells) == most), key=lambda p: p.mean("mrr_dev"))


# --- the report ----------------------------------------------------------------------------------------------------


def table(titles: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    return "\n".join([*lines, *("| " + " | ".join(str(v) for v in row) + " |" for row in rows)])


HEAD = ("cell", "seeds", "loss at step 0 [ln N]", "loss at the end [ln N]", "active q/d [dims]", "cosine d-d",
        "MRR@10 dev", "MRR@10 test", "ended")  # fmt: skip


def point_row(point: Point, name: str | None = None) -> tuple[object, ...]:
    dims = f"{point.mean('active_dims_query'):,.0f} / {point.mean('active_dims_document'):,.0f}"
    cosines = point.by_seed("cosine_document")
    return (
        name or describe(point.first), len(point.cells), f"{point.mean('loss_start'):.3g}",
        point.spread("loss_end", ".2f"), dims, f"{statistics.fmean(cosines.values()):.2f}" if cosines else "-",
        point.spread("mrr_dev"), point.spread("mrr_test"), point.words,
    )  # fmt: skip


def sensitivity(cells: Sequence[Cell], backbone: str) -> str:
    found = points(c for c in cells if c.plain and c.row.backbone == backbone)
    found.sort(key=lambda p: (-p.first.row.scale, p.first.row.head_lr_multiplier))
    alone = points(c for c in cells if c.row.backbone == backbone and c.row.mode == "none" and c.row.lr == LR
                   and c.row.temperature == 1 and c.row.warmup_ratio == 0.1)  # fmt: skip
    names = [f"{ratio_text(p.first.row.scale)}, x{p.first.row.head_lr_multiplier:g}" for p in found]
    rows = [point_row(p, "untouched (tied)") for p in alone]
    rows += [point_row(p, name) for p, name in zip(found, names, strict=True)]
    return table(("constant, head lr", *HEAD[1:]), rows)


def controls(cells: Sequence[Cell]) -> str:
    found = points(c for c in cells if not c.plain and not (c.row.mode == "none" and _ordinary(c)))
    found = [p for p in found if p.first.row.lr == LR or p.first.row.lr < 1e-4]
    return table(HEAD, [point_row(p) for p in found])


def _ordinary(cell: Cell) -> bool:
    return cell.row.lr == LR and cell.row.temperature == 1 and cell.row.warmup_ratio == 0.1


def learning_rates(cells: Sequence[Cell]) -> str:
    found = points(c for c in cells if c.row.lr in (1e-4, 1e-3) and c.row.temperature == 1)
    found.sort(key=lambda p: (p.first.row.backbone, p.first.row.lr, -p.first.row.scale, p.first.row.head_lr_multiplier))
    return table(HEAD, [point_row(p) for p in found])


def regrets(cells: Sequence[Cell], backbone: str) -> str:
    """Of every target at head lr x1 and x4, against the cell that was best on dev pairs."""
    found = points(c for c in cells if c.plain and c.row.backbone == backbone)
    alone = points(c for c in cells if c.row.backbone == backbone and c.row.mode == "none" and _ordinary(c))
    best = chosen_on_dev([*found, *alone])
    at = {(p.first.row.scale, p.first.row.head_lr_multiplier): p for p in found}
    if alone and len(alone[0].cells) > len(at[(1.0, 1.0)].cells):
        at[(1.0, 1.0)] = alone[0]  # tied and untied differ by less than seeds do
    known = json.loads(TARGETS.read_text())[backbone]
    asked = {t["name"]: t["scale"] if t["name"] == "constant" else t["snapped"] for t in known["targets"]
             if ":" not in t["name"]}  # fmt: skip
    asked = {**{("loss, c = 1.25" if n == "loss" else "k = 16" if n == "constant" else n): s for n, s in asked.items()}}
    asked.update({f"loss, c = {c}": t["snapped"] for c, t in known["ceilings"].items() if c != "1.25"})
    rows = []
    for name, scale in asked.items():
        pair = [at.get((scale, multiplier)) for multiplier in (1.0, 4.0)]
        rows.append((name, "-" if scale is None else ratio_text(scale), *(_regret(p, best) for p in pair)))
    title = f"best on dev: {describe(best.first)} ({len(best.cells)} seeds; test {best.spread('mrr_test')})"
    return f"{title}\n\n" + table(("target", "constant", "loss at head lr x1", "loss at head lr x4"), rows)


def _regret(point: Point | None, best: Point) -> str:
    if point is None:
        return "not run"
    mean, interval, seeds = relative_loss(point, best)
    if interval is None:
        return f"{mean:.0%} (1 seed)"
    return f"{mean:.0%} ({interval[0]:.0%} to {interval[1]:.0%}; {seeds} seeds)"


KINDS = {
    "by_point": "each point, fitted on all others",
    "by_seed": "seeds 1 and 2, fitted on seed 0",
    "by_rate": "lr 1e-4 and 1e-3, fitted at 3e-4",
    "by_backbone": "one backbone, fitted on the other",
    "in_sample": "all, in sample",
}


def verdict_section(found: dict[str, Any]) -> str:
    rows = []
    for kind, title in KINDS.items():
        for share, one in found[kind].items():
            own = one["together"]
            if not own["cells"]:
                continue
            accuracy = own["balanced_accuracy"]
            rows.append((
                title, share, own["cells"], f"{own['coverage']:.0%}", "-" if accuracy is None else f"{accuracy:.1%}",
                "{:.1%} to {:.1%}".format(*own["interval"]), f"{own['failing_right']}/{own['failing']}",
                f"{own['training_right']}/{own['training']}",
            ))  # fmt: skip
    scores = table(
        ("judged on", "share of summed lr", "cells", "coverage", "balanced accuracy", "Wilson 95 %", "failing right",
         "training right"), rows,
    )  # fmt: skip
    tables = []
    for kind, title in KINDS.items():
        confusion = found[kind]["0.10"]["together"]["confusion"]
        if confusion and kind != "in_sample":
            name = f"Judged on {title}, at 10 % of the summed learning rate:"
            tables.append(f"{name}\n\n" + table(("ended", "said", "cells"), confusion))
    splits = table(
        ("statistic", "threshold", "balanced accuracy", "gap at the threshold [ln]"),
        [
            (s["statistic"], f"{s['fails_from']:.4g}", f"{s['balanced_accuracy']:.1%}", f"{s['gap']:.2f}")
            for s in found["splits"]
        ],
    )
    settled = table(
        ("share of summed lr", "cells", "words right", "Wilson 95 %"),
        [
            (s, one["cells"], one["right"], "{:.0%} to {:.0%}".format(*one["interval"]))
            for s, one in found["settled"].items()
        ],
    )
    wrong = "\n".join(f"- {line}" for line in found["wrong"]) or "- none"
    labels = ", ".join(f"{word} {count}" for word, count in found["labels"].items())
    return f"""{found["cells"]} cells; labels from the end: {labels}.

{scores}

{chr(10).join(f"{chr(10)}{t}" for t in tables)}

Every statistic's best single threshold at 10 % of the summed learning rate, all cells (in sample):

{splits}

Every word (`stable`, `dense`, `degraded` told apart too; rules of seed 0, judged on seeds 1 and 2):

{settled}

Wrong at 10 % with the rules fitted on all cells:

{wrong}

Fitted on all cells: `{json.dumps(found["rules"])}`
"""


def report(_: Path | None = None) -> None:
    """Write `reports/study.md` around the prose in `study_findings.md`."""
    cells = read_cells()
    found = judged(cells)
    SCORES.write_text(json.dumps(found, indent=1) + "\n")
    findings = (Path(__file__).parent / "study_findings.md").read_text()
    known = json.loads(TARGETS.read_text())
    norms = {n: known[n]["weights"]["frobenius"] for n in (REFERENCE, FAILING)}
    parts = {
        "CELLS": str(len(cells)),
        "NORMS": f"{norms[REFERENCE]:.1f} (tiny-bert) and {norms[FAILING]:.1f} (tiny-modernbert)",
        "SENSITIVITY_FAILING": sensitivity(cells, FAILING),
        "SENSITIVITY_REFERENCE": sensitivity(cells, REFERENCE),
        "REGRET_FAILING": regrets(cells, FAILING),
        "REGRET_REFERENCE": regrets(cells, REFERENCE),
        "CONTROLS": controls(cells),
        "LEARNING_RATES": learning_rates(cells),
        "VERDICT": verdict_section(found),
        "LABELS": f"below {FAIL_RELATIVE:.0%} of the best cell's MRR@10 a run failed, below {DEGRADED_RELATIVE:.0%} "
        f"it is degraded, and above {DENSE_SHARE:.1%} of the vocabulary per document it is dense",
    }  # fmt: skip
    for kind in KINDS:
        own = found[kind]["0.10"]["together"]
        parts[kind.upper()] = (
            "{:.1%} ({:.1%} to {:.1%}; ".format(own["balanced_accuracy"], *own["interval"])
            + f"{own['cells']} cells, coverage {own['coverage']:.0%}; right are {own['failing_right']} of "
            f"{own['failing']} failing and {own['training_right']} of {own['training']} training ones)"
        )
    for name, text in parts.items():
        findings = findings.replace("{{" + name + "}}", text)
    REPORT.write_text(findings)
    print(REPORT)
