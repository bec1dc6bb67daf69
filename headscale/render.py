"""How records look on a terminal, as TSV and as JSON, and everything that goes to stderr beside them."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from headscale.constants import ratio_text
from headscale.errors import HeadscaleError
from headscale.records import (
    Calibration,
    Evaluation,
    Inspection,
    OutputStatistics,
    Profile,
    SystemResult,
    Target,
    TrainedCell,
    TrialResult,
    Verdict,
    WeightStatistics,
    plain,
)

if TYPE_CHECKING:
    from headscale.live import Curve, Logs, Point

Cell = float | int | str | bool | None


class Progress(Protocol):
    """What a long job calls as it goes on."""

    def __call__(self, done: int, total: int, text: str = "", point: Point | None = None) -> None:
        """So much of so much is done; `text` is what there is to see right now, `point` a step of a curve."""


@dataclass(frozen=True)
class Column:
    """One column: a title with its unit, a value, and whether (and how) a terminal shows it."""

    title: str
    value: Callable[[Any], Cell]
    on_terminal: bool = True
    as_text: Callable[[float], str] | None = None  # for a terminal, instead of four digits

    def shown(self, row: Any) -> str:
        """The value as a terminal table shows it."""
        value = self.value(row)
        return self.as_text(value) if self.as_text and isinstance(value, int | float) else short(value)


@dataclass
class Voice:
    """What is said on stderr; stdout holds the result alone.

    Args:
        quiet: say errors only.
        errors: what went wrong so far, as `--json` will show it.
    """

    quiet: bool = False
    errors: list[dict[str, str]] | None = None
    past: list[Curve] = field(default_factory=list, repr=False)  # what was trained so far, shown beside what goes on

    def note(self, sentence: str) -> None:
        """A line of progress or advice."""
        if not self.quiet:
            print(sentence, file=sys.stderr, flush=True)

    def warn(self, sentence: str) -> None:
        """Something the user should know that stops nothing."""
        self.note(f"warning: {sentence}")

    def error(self, error: HeadscaleError, subject: str = "") -> None:
        """One sentence, an empty line, a hint; kept for `--json` too."""
        if self.errors is not None:
            self.errors.append({"subject": subject, "message": error.message, "hint": error.hint})
        print(f"error: {error.message}", file=sys.stderr)
        if error.hint:
            print(f"\nhint: {error.hint}", file=sys.stderr)
        sys.stderr.flush()

    @contextmanager
    def progress(self, title: str, follow: Logs | None = None) -> Iterator[Progress]:
        """A bar on a terminal, a line every tenth elsewhere, both with the time left; yields a `Progress`.

        Args:
            title: of what is done.
            follow: runs of other processes, whose curves a terminal shows.
        """
        if self.quiet:
            yield lambda done, total, text="", point=None: None
        elif sys.stderr.isatty():
            from headscale.live import watched

            with watched(title, self.past, follow) as step:
                yield step
        else:
            yield _tenths(title, self)


def _tenths(title: str, voice: Voice) -> Progress:
    said = -1
    started = time.monotonic()

    def step(done: int, total: int, text: str = "", point: Point | None = None) -> None:
        nonlocal said
        tenth = 10 * done // max(1, total)
        if tenth > said:
            said = tenth
            left = (time.monotonic() - started) * (total - done) / max(1, done)
            parts = [f"{done}/{total}", text, f"about {left:.0f} s left" if 0 < done < total else ""]
            voice.note(f"{title}: {', '.join(part for part in parts if part)}")

    return step


# --- numbers and tables --------------------------------------------------------------------------------------------


def short(value: Cell) -> str:
    """A value as a terminal table shows it: four significant digits, `-` for nothing."""
    if value is None:
        return "-"
    if isinstance(value, bool | str):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if not math.isfinite(value):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


def full(value: Cell) -> str:
    """A value as TSV holds it: every digit, nothing cut; empty for nothing."""
    if value is None:
        return ""
    text = repr(value) if isinstance(value, float) else str(value)
    return " ".join(text.split())


def show(rows: Sequence[Any], columns: Sequence[Column], stream: TextIO | None = None) -> None:
    """A table on a terminal, TSV elsewhere."""
    out = stream or sys.stdout
    if not out.isatty():
        print("\t".join(c.title for c in columns), file=out)
        for row in rows:
            print("\t".join(full(c.value(row)) for c in columns), file=out)
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    kept = [c for c in columns if c.on_terminal]
    for column in kept:
        numeric = all(not isinstance(column.value(r), str) or column.as_text for r in rows)
        title = Text(column.title.replace(" [", "\n["))  # as text: Rich would read a unit as markup
        table.add_column(title, justify="right" if numeric else "left", no_wrap=not numeric, overflow="fold")
    for row in rows:
        table.add_row(*(Text(c.shown(row)) for c in kept))
    Console(file=out).print(table)


def write_document(
    command: str,
    results: Sequence[Any],
    errors: Sequence[dict[str, str]],
    path: Path | None = None,
) -> None:
    """The one JSON object of a command, to a file or to stdout."""
    from headscale import __version__
    from headscale.environment import environment

    document = {
        "schema": f"headscale.{command}/1",
        "headscale": __version__,
        "command": command,
        "env": environment(),
        "results": [plain(r) for r in results],
        "errors": list(errors),
    }
    if path is None:
        print(json.dumps(document, indent=1, allow_nan=False))
    else:
        from headscale.cells import write_json

        write_json(path, document)


# --- inspect -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class InspectRow:
    """One line of `inspect`: a backbone, or the reference it is compared with."""

    name: str
    shape: str
    weights: WeightStatistics
    output: OutputStatistics | None
    cased: bool | None
    verdict: str
    reference: WeightStatistics | None

    @classmethod
    def of_inspection(cls, found: Inspection, reference: Profile | None) -> InspectRow:
        """The line of an inspected backbone."""
        head, vocabulary = found.head, found.vocabulary
        cased = None if vocabulary is None else vocabulary.cased
        shape = f"{head.vocab_size}x{head.width}"
        other = None if reference is None else reference.weights
        return cls(found.name, shape, found.weights, found.output, cased, found.verdict.word, other)

    @classmethod
    def of_profile(cls, profile: Profile) -> InspectRow:
        """The line of a reference."""
        return cls(profile.name, "", profile.weights, profile.output, None, "reference", profile.weights)

    def ratio(self) -> str | None:
        """The Frobenius norm over the reference's."""
        return None if self.reference is None else f"{self.weights.frobenius / self.reference.frobenius:.3g}x"


def _weight(name: str) -> Callable[[InspectRow], Cell]:
    return lambda row: getattr(row.weights, name)


def _output(name: str) -> Callable[[InspectRow], Cell]:
    return lambda row: None if row.output is None else getattr(row.output, name)


def _side(side: str, name: str) -> Callable[[InspectRow], Cell]:
    return lambda row: None if row.output is None else getattr(getattr(row.output, side), name)


INSPECT_COLUMNS = (
    Column("backbone", lambda r: r.name),
    Column("head [terms x width]", lambda r: r.shape, on_terminal=False),
    Column("||W|| [L2]", _weight("frobenius")),
    Column("ratio", lambda r: r.ratio()),
    Column("row norm [L2]", _weight("row_norm_mean"), on_terminal=False),
    Column("effective norm [L2]", _weight("effective_norm"), on_terminal=False),
    Column("spectral norm [L2]", _weight("spectral_norm"), on_terminal=False),
    Column("bias norm [L2]", _weight("bias_norm"), on_terminal=False),
    Column("active q [dims]", _side("query", "active_dims")),
    Column("active d [dims]", _side("document", "active_dims")),
    Column("empty d [share]", _side("document", "empty"), on_terminal=False),
    Column("weight [mean]", _side("document", "mean_weight"), on_terminal=False),
    Column("active weight [mean]", _side("document", "active_mean_weight")),
    Column("score sd", _output("score_sd")),
    Column("margin", _output("score_margin"), on_terminal=False),
    Column("cosine d-d", _side("document", "mean_cosine")),
    Column("special [share]", _side("document", "special_share"), on_terminal=False),
    Column("loss [ln N]", _output("loss_over_ln_n")),
    Column("fp16 headroom [x]", _output("fp16_headroom"), on_terminal=False),
    Column("bf16 spacing [score sd]", _output("bf16_resolution"), on_terminal=False),
    Column("cased", lambda r: r.cased, on_terminal=False),
    Column("verdict", lambda r: r.verdict),
)


def judged(verdict: Verdict) -> str:
    """A verdict in one line: the word, its evidence, and value, threshold and band."""
    low, high = verdict.band
    band = f"{'' if low is None else f'{low:g} to '}{'any' if high is None else f'{high:g}'}"
    if low is None and high is not None:
        band = f"at most {high:g}"
    numbers = f"{verdict.statistic} {short(verdict.value)}, threshold {short(verdict.threshold)}, ok {band}"
    return f"{verdict.word}: {verdict.evidence} ({numbers})"


def inspect_rows(found: Sequence[Inspection], reference: Profile | None) -> list[InspectRow]:
    """The reference first, then the backbones in the order given; the reference is not repeated."""
    rows = [] if reference is None else [InspectRow.of_profile(reference)]
    others = [f for f in found if reference is None or f.name != reference.name]
    return rows + [InspectRow.of_inspection(f, reference) for f in others]


# --- calibrate -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TargetRow:
    """One line of `calibrate`: a target of one backbone."""

    calibration: Calibration
    target: Target

    @property
    def chosen(self) -> bool:
        """Whether this is the target that was used."""
        return self.target.name == self.calibration.match

    @property
    def scale(self) -> float | None:
        """The constant that would be written for this target."""
        if self.chosen:
            return self.calibration.scale
        return self.target.scale if self.target.name == "constant" else self.target.snapped


def target_rows(found: Sequence[Calibration]) -> list[TargetRow]:
    """Every target of every backbone."""
    return [TargetRow(calibration, target) for calibration in found for target in calibration.targets]


def _target(name: str) -> Callable[[TargetRow], Cell]:
    return lambda row: getattr(row.target, name)


def show_targets(found: Sequence[Calibration]) -> None:
    """The targets of every backbone: on a terminal a table each, elsewhere one TSV."""
    if not sys.stdout.isatty():
        show(target_rows(found), CALIBRATE_COLUMNS)
        return
    for calibration in found:
        shifted = f", {short(calibration.shift)} added to the bias first" if calibration.shift else ""
        print(f"{calibration.name}, against {calibration.reference}{shifted}")
        show(target_rows([calibration]), CALIBRATE_COLUMNS)


CALIBRATE_COLUMNS = (
    Column("backbone", lambda r: r.calibration.name, on_terminal=False),
    Column("reference", lambda r: r.calibration.reference, on_terminal=False),
    Column("target", _target("name")),
    Column("statistic", _target("statistic"), on_terminal=False),
    Column("goal", _target("target")),
    Column("shift", lambda r: r.calibration.shift, on_terminal=False),
    Column("solution [x]", _target("scale")),
    Column("scale [x]", lambda r: r.scale, as_text=ratio_text),
    Column("head lr [x]", lambda r: r.calibration.head_lr_multiplier if r.chosen else None),
    Column("loss [ln N]", _target("loss_over_ln_n")),
    Column("active weight [mean]", _target("active_mean_weight"), on_terminal=False),
    Column("score sd", _target("score_sd")),
    Column("note", _target("note"), on_terminal=False),
    Column("verdict", lambda r: r.calibration.verdict.word if r.chosen else None),
)


# --- trial and sweep -----------------------------------------------------------------------------------------------


def _seeds(of: Callable[[TrainedCell], float | None]) -> Callable[[TrialResult], Cell]:
    """The value over seeds: itself with one, mean ± sd with several."""

    def shown(row: TrialResult) -> Cell:
        import statistics

        values = [v for v in (of(cell) for cell in row.cells) if v is not None and math.isfinite(v)]
        if len(values) < 2:
            return values[0] if values else None
        return f"{statistics.fmean(values):.4g} ± {statistics.stdev(values):.2g}"

    return shown


def _tail(name: str) -> Callable[[TrainedCell], float | None]:
    return lambda cell: cell.run.end.tail.get(name)


def _first(name: str) -> Callable[[TrainedCell], float | None]:
    return lambda cell: getattr(cell.run.steps[0], name) if cell.run.steps else None


def _ranking(cell: TrainedCell) -> float | None:
    ranking = cell.run.end.ranking
    return None if ranking is None else ranking.mrr_at_10


TRIAL_COLUMNS = (
    Column("backbone", lambda r: r.backbone, on_terminal=False),
    Column("arm", lambda r: r.arm),
    Column("scale [x]", lambda r: r.scale),
    Column("mode", lambda r: r.mode, on_terminal=False),
    Column("head lr [x]", lambda r: r.head_lr_multiplier),
    Column("shift", lambda r: r.cells[0].run.config.get("shift", 0.0) if r.cells else None, on_terminal=False),
    Column("seeds", lambda r: len(r.cells)),
    Column("steps", _seeds(lambda c: c.run.end.steps)),
    Column("summed lr [share]", _seeds(lambda c: c.run.end.lr_sum_share), on_terminal=False),
    Column("loss at step 0 [ln N]", _seeds(_first("loss_over_ln_n"))),
    Column("loss at the end [ln N]", _seeds(_tail("loss_over_ln_n"))),
    Column("batch accuracy", _seeds(_tail("batch_accuracy")), on_terminal=False),
    Column("active q [dims]", _seeds(_tail("active_dims_query")), on_terminal=False),
    Column("active d [dims]", _seeds(_tail("active_dims_document"))),
    Column("score sd", _seeds(_tail("score_sd")), on_terminal=False),
    Column("cosine d-d", _seeds(_tail("cosine_document"))),
    Column("MRR@10", _seeds(_ranking)),
    Column("decided [step]", lambda r: r.verdict.step, on_terminal=False),
    Column("verdict", lambda r: r.verdict.word),
)


def _row(name: str, *, on_terminal: bool = True, title: str = "") -> Column:
    return Column(title or name, lambda r: getattr(r, name), on_terminal)


SWEEP_COLUMNS = (
    _row("backbone"),
    _row("scale", title="scale [x]"),
    _row("mode"),
    _row("head_lr_multiplier", title="head lr [x]"),
    _row("lr"),
    _row("seed"),
    _row("temperature", on_terminal=False),
    _row("lambda_query", on_terminal=False),
    _row("lambda_document", on_terminal=False),
    _row("warmup_ratio", title="warmup [share]", on_terminal=False),
    _row("shift", on_terminal=False),
    _row("steps", on_terminal=False),
    _row("lr_sum", title="summed lr", on_terminal=False),
    _row("loss_start", title="loss at step 0 [ln N]"),
    _row("loss_end", title="loss at the end [ln N]"),
    _row("batch_accuracy", title="batch accuracy", on_terminal=False),
    _row("active_dims_query", title="active q [dims]", on_terminal=False),
    _row("active_dims_document", title="active d [dims]"),
    _row("cosine_document", title="cosine d-d", on_terminal=False),
    _row("grad_norm", title="gradient [L2]", on_terminal=False),
    _row("head_norm_start", title="||W|| at the start [L2]", on_terminal=False),
    _row("head_norm_end", title="||W|| at the end [L2]", on_terminal=False),
    _row("non_finite_steps", title="non-finite [steps]", on_terminal=False),
    _row("mrr_dev", title="MRR@10 dev"),
    _row("mrr_test", title="MRR@10 test"),
    _row("chance_mrr", title="MRR@10 chance", on_terminal=False),
    _row("flops_cost", title="FLOPS [per pair]", on_terminal=False),
    _row("vocab_size", title="vocabulary [terms]", on_terminal=False),
    _row("verdict_step", title="decided [step]", on_terminal=False),
    _row("verdict_lr_share", title="decided [share of summed lr]", on_terminal=False),
    _row("key", on_terminal=False),
    _row("message", on_terminal=False),
    _row("status"),
    _row("verdict"),
)


# --- evaluate ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SystemRow:
    """One line of `evaluate`: the model, BM25 or chance on one collection."""

    evaluation: Evaluation
    result: SystemResult


def system_rows(found: Sequence[Evaluation]) -> list[SystemRow]:
    """Every system of every evaluation, the model first."""
    return [SystemRow(evaluation, result) for evaluation in found for result in evaluation.systems]


def _metric(name: str, part: str = "value") -> Callable[[SystemRow], Cell]:
    def value(row: SystemRow) -> Cell:
        estimate = getattr(row.result, name)
        return None if estimate is None else getattr(estimate, part)

    return value


def _measure(name: str, title: str, *, interval: bool) -> tuple[Column, ...]:
    return (
        Column(title, _metric(name)),
        Column(f"{title} low [95 %]", _metric(name, "low"), interval),
        Column(f"{title} high [95 %]", _metric(name, "high"), interval),
        Column(f"{title} sd [queries]", _metric(name, "query_sd"), on_terminal=False),
    )


def _sparsity(side: str, name: str) -> Callable[[SystemRow], Cell]:
    def value(row: SystemRow) -> Cell:
        found = getattr(row.result, side)
        return None if found is None else getattr(found, name)

    return value


EVALUATE_COLUMNS = (
    Column("system", lambda r: r.result.system),
    Column("collection", lambda r: r.evaluation.collection.name, on_terminal=False),
    Column("split", lambda r: r.evaluation.collection.split, on_terminal=False),
    Column("queries", lambda r: r.evaluation.collection.queries, on_terminal=False),
    Column("documents", lambda r: r.evaluation.collection.documents, on_terminal=False),
    *_measure("ndcg_at_10", "nDCG@10", interval=True),
    *_measure("mrr_at_10", "MRR@10", interval=False),
    *_measure("recall_at_100", "R@100", interval=False),
    *_measure("recall_at_1000", "R@1000", interval=False),
    Column("retrieved [docs]", lambda r: r.result.retrieved, on_terminal=False),
    Column("active q [dims]", _sparsity("query", "active_dims")),
    Column("active d [dims]", _sparsity("document", "active_dims")),
    Column("empty q [share]", _sparsity("query", "empty"), on_terminal=False),
    Column("empty d [share]", _sparsity("document", "empty"), on_terminal=False),
    Column("FLOPS reg q", _sparsity("query", "flops_reg"), on_terminal=False),
    Column("FLOPS reg d", _sparsity("document", "flops_reg"), on_terminal=False),
    Column("FLOPS [per pair]", lambda r: r.result.flops_cost),
    Column("run", lambda r: r.result.run, on_terminal=False),
    Column("set-up", lambda r: r.result.note, on_terminal=False),
)
