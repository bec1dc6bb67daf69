"""The study's cells as they are kept in `reports/data/`: read, labelled, and gathered over seeds."""

from __future__ import annotations

import csv
import gzip
import io
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, get_type_hints

from scipy.stats import t as student

from headscale.constants import ratio_text
from headscale.demo import demo_config
from headscale.labels import best_of_groups, group_of, label_of
from headscale.recipes import TrainingConfig
from headscale.records import StepRecord, SweepRow
from headscale.verdict import FAILED, STATISTICS

DATA = Path(__file__).resolve().parent.parent / "reports" / "data"
ROWS, STEPS, TARGETS, SCORES = (
    DATA / name for name in ("study.tsv", "study-steps.tsv.gz", "study-targets.json", "study-verdicts.json")
)
LR = 3e-4
LAMBDA = 3e-3  # of queries, at which all but the cells of the fronts were run
KEPT = ("loss", "head_norm", *STATISTICS, "score_within_sd", "score_common")  # of every step


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
        """What decides the clock."""
        row = self.row
        return demo_config(row.seed).replace(lr=row.lr, warmup_ratio=row.warmup_ratio, temperature=row.temperature)

    @property
    def failed(self) -> bool:
        """Whether its end is that of a failure."""
        return self.label in FAILED

    @property
    def ordinary(self) -> bool:
        """Of the recipe as it is: no control, no other learning rate, no other lambda; a shift is part of the grid."""
        row = self.row
        usual = row.temperature == 1 and row.warmup_ratio == 0.1 and row.lambda_query == LAMBDA and row.lr == LR
        return usual and self.scale_bias and row.mode in ("untie", "none")

    @property
    def name(self) -> str:
        """Everything of it but the seed."""
        row = self.row
        parts = [short(row.backbone), "untouched" if row.mode == "none" else f"a = {ratio_text(row.scale)}"]
        parts += [f"head lr x{row.head_lr_multiplier:g}"] if row.head_lr_multiplier != 1 else []
        parts += [row.mode] if row.mode not in ("none", "untie") else []
        parts += ["W only"] if not self.scale_bias else []
        parts += [f"shift {row.shift:.3g}"] if row.shift else []
        parts += [f"lr {row.lr:g}"] if row.lr != LR else []
        parts += [f"temperature {row.temperature:.4g}"] if row.temperature != 1 else []
        if row.temperature == 1 and row.lambda_query != LAMBDA:
            parts.append(f"lambda x{row.lambda_query / LAMBDA:.4g}")
        parts += [f"warmup {row.warmup_ratio:.0%}"] if row.warmup_ratio != 0.1 else []
        return ", ".join(parts)


def short(backbone: str) -> str:
    """A backbone's name without where it comes from."""
    return backbone.removeprefix("bundled:")


def write_steps(folders: dict[str, Path]) -> None:
    """Keep what the rules look at of every step, to five digits, so that judging needs no run folder."""
    from headscale.steplog import read_steps

    text = io.StringIO()
    writer = csv.writer(text, delimiter="\t", lineterminator="\n")
    writer.writerow(("key", "step", *KEPT))
    for key, folder in sorted(folders.items()):
        for record in read_steps(folder / "steps.jsonl"):
            writer.writerow((key, record["step"], *(_digits(record.get(name)) for name in KEPT)))
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
            row = SweepRow(**{name: _value(line[name], str(hints[name])) for name in hints if name in line})
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


# --- over seeds ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """One cell over its seeds."""

    cells: tuple[Cell, ...]

    @property
    def first(self) -> Cell:
        """Any of them, for what they have in common."""
        return self.cells[0]

    def by_seed(self, name: str) -> dict[int, float]:
        """A column of the rows, where it is known."""
        return {c.row.seed: getattr(c.row, name) for c in self.cells if getattr(c.row, name) is not None}

    def mean(self, name: str) -> float:
        """Over the seeds that have it; NaN of none."""
        values = self.by_seed(name).values()
        return statistics.fmean(values) if values else math.nan

    def spread(self, name: str, form: str = ".3f") -> str:
        """Mean ± sd, and of how many seeds where not all have it."""
        values = list(self.by_seed(name).values())
        if not values:
            return "-"
        shown = format(statistics.fmean(values), form)
        shown = shown if len(values) < 2 else f"{shown} ± {format(statistics.stdev(values), form)}"
        return shown if len(values) == len(self.cells) else f"{shown} ({len(values)})"

    @property
    def words(self) -> str:
        """The labels and how often each."""
        counts = counted(c.label for c in self.cells)
        return ", ".join(f"{word} {n}x" if n > 1 else word for word, n in counts.items())


def counted(words: Iterable[str]) -> dict[str, int]:
    """How often each."""
    found: dict[str, int] = defaultdict(int)
    for word in words:
        found[word] += 1
    return dict(found)


def points(cells: Iterable[Cell]) -> list[Point]:
    """Cells gathered over seeds."""
    groups: dict[str, list[Cell]] = defaultdict(list)
    for cell in cells:
        groups[cell.name].append(cell)
    return [Point(tuple(sorted(group, key=lambda c: c.row.seed))) for group in groups.values()]


def relative_loss(point: Point, best: Point, name: str = "ndcg_test") -> tuple[float, tuple[float, float] | None, int]:
    """1 - score over the best cell's: of the means over common seeds, with a paired t interval, 95 %."""
    own, other = point.by_seed(name), best.by_seed(name)
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


def loss_text(point: Point | None, best: Point, name: str = "ndcg_test") -> str:
    """The relative loss with its interval and seeds."""
    if point is None:
        return "not run"
    mean, interval, seeds = relative_loss(point, best, name)
    if not seeds:
        return "not run"
    if interval is None:
        return f"{mean:.1%} (1 seed)"
    return f"{mean:.1%} ({interval[0]:.1%} to {interval[1]:.1%}; {seeds} seeds)"


def table(titles: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    return "\n".join([*lines, *("| " + " | ".join(str(v) for v in row) + " |" for row in rows)])
