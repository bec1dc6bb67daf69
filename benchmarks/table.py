"""Write `reports/benchmarks.md` from the results kept in `benchmarks/results`: every bar, then every number.

Example:
    python benchmarks/table.py -o reports/benchmarks.md
"""

from __future__ import annotations

import argparse
import json
import operator
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _harness as harness

RESULTS = Path(__file__).parent / "results"
FIRST, SECOND = "16,128,768,30522", "8,256,256,30522"
HEAD = """# Benchmarks

Written by `benchmarks/table.py` from the results in `benchmarks/results/`; `benchmarks/README.md` says how each is
measured and how to read it. Contenders are interleaved in one run; a ratio is the median of the ratios within a
round, with the range over the rounds in brackets. Memory is the peak of a process of its own, measured once.

## Every bar
"""
TESTED = """
Held by tests, on fresh inputs each: gradients against the float64 closed form at the returned position, repeats that
are equal bit by bit (`tests/test_pooling.py`), and that `headscale --help` imports no torch (`tests/test_cli.py`).
"""

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Measured:
    """A number with its range over the rounds, if it has one."""

    value: float
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        spread = "" if self.low is None or self.high is None else f" ({_number(self.low)}-{_number(self.high)})"
        return _number(self.value) + spread


@dataclass(frozen=True)
class Bar:
    """One promise.

    Args:
        what: in words.
        schema: which results it is about.
        wanted: "<= 1.25" or ">= 3.5".
        where: whether a row of them is meant.
        measure: the number, from the row and all rows of its result.
        label: the columns that say which row it is.
    """

    what: str
    schema: str
    wanted: str
    where: Callable[[Row], bool]
    measure: Callable[[Row, Sequence[Row]], Measured | None]
    label: tuple[str, ...] = ()

    def holds(self, found: Measured) -> bool:
        """Whether the median is on the right side."""
        sign, limit = self.wanted.split()
        return bool({"<=": operator.le, ">=": operator.ge}[sign](found.value, float(limit)))


def within_rounds(over: str, under: str) -> Callable[[Row, Sequence[Row]], Measured | None]:
    """One contender's seconds over another's, round by round; contenders of other rows are looked up by name."""

    def measure(row: Row, rows: Sequence[Row]) -> Measured | None:
        known = {t["name"]: t["seconds"] for r in (*rows, row) for t in r.get("times", ())}
        if over not in known or under not in known:
            return None
        ratios = [a / b for a, b in zip(known[over], known[under], strict=True)]
        return Measured(statistics.median(ratios), min(ratios), max(ratios))

    return measure


def seconds(name: str) -> Callable[[Row, Sequence[Row]], Measured | None]:
    """A contender's own seconds."""

    def measure(row: Row, _rows: Sequence[Row]) -> Measured | None:
        found = next((t for t in row["times"] if t["name"] == name), None)
        return found and Measured(found["median"], found["low"], found["high"])

    return measure


def column(name: str) -> Callable[[Row, Sequence[Row]], Measured | None]:
    """A column of the row as it is."""
    return lambda row, _rows: None if row.get(name) is None else Measured(row[name])


def share_of(name: str, peer: str) -> Callable[[Row, Sequence[Row]], Measured | None]:
    """One column over another."""
    return lambda row, _rows: Measured(row[name] / row[peer]) if row.get(name) and row.get(peer) else None


def _row(**wanted: Any) -> Callable[[Row], bool]:
    return lambda row: all(row.get(key.replace("_", " ")) == value for key, value in wanted.items())


def _head(zeros: float, shape: str = FIRST) -> Callable[[Row], bool]:
    return _row(shape=shape, zeros=zeros, padding=0.0, dtype="float32")


_PEER, _WHERE = "sentence-transformers", ("shape", "zeros")
_STEP, _INSPECT = ("lengths", "threads"), "inspect_weights"
BARS = [
    Bar("head, forward + backward / matmul, dense", "pooled_head", "<= 1.25", _head(0.0),
        within_rounds("headscale", "matmul"), _WHERE),
    Bar("head, forward + backward / matmul, 99 % zero", "pooled_head", "<= 1.05", _head(0.99),
        within_rounds("headscale", "matmul"), _WHERE),
    Bar("the same with bf16 hardware, exact", "pooled_head", "<= 0.75", _head(0.99),
        within_rounds("headscale", "matmul"), (*_WHERE, "implementation")),
    Bar("sentence-transformers' head / ours, dense", "pooled_head", ">= 3.5", _head(0.0),
        within_rounds(_PEER, "headscale"), _WHERE),
    Bar("sentence-transformers' head / ours, 99 % zero", "pooled_head", ">= 4", _head(0.99),
        within_rounds(_PEER, "headscale"), _WHERE),
    Bar("the same, narrow and long", "pooled_head", ">= 5", lambda row: row["shape"] == SECOND and not row["padding"],
        within_rounds(_PEER, "headscale"), _WHERE),
    Bar("sentence-transformers' memory / ours", "pooled_head", ">= 12",
        _row(shape=FIRST, padding=0.0, dtype="float32"),
        column("s-t MB / MB"), _WHERE),
    Bar("whole process at a vocabulary of 250,002, GB", "pooled_head", "<= 8", _row(shape="16,128,768,250002"),
        column("whole process GB"), ("shape",)),
    Bar("trial step: SparseEncoderTrainer's time / ours", "trial_step", ">= 2", _row(),
        within_rounds(_PEER, "headscale"), _STEP),
    Bar("trial step: our peak / SparseEncoderTrainer's", "trial_step", "<= 0.5", _row(), column("memory"), _STEP),
    Bar("SparseEncoderTrainer's time without / with the drop-in", "trial_step", ">= 1", _row(),
        within_rounds(_PEER, "drop-in"), _STEP),
    Bar("SparseEncoderTrainer's peak with / without the drop-in", "trial_step", "<= 1", _row(),
        share_of("drop-in MB", f"{_PEER} MB"), _STEP),
    Bar("50 constants / one forward pass", "constants_grid", "<= 1.1",
        lambda row: row["backbone"].startswith("base"),
        within_rounds("grid", "pass"),
        ("backbone", "active terms", "threads")),
    Bar("norms from disk: loading the model's time / ours", _INSPECT, ">= 12", _row(process="headscale"),
        within_rounds("AutoModelForMaskedLM", "headscale"), ("process",)),
    Bar("norms from disk: our peak / loading the model's", _INSPECT, "<= 0.125", _row(process="headscale"),
        column("peak / peer's"), ("process",)),
    Bar("with singular values: loading the model's time / ours", _INSPECT, ">= 6",
        _row(process="headscale --spectral"), within_rounds("AutoModelForMaskedLM", "headscale --spectral"),
        ("process",)),
    Bar("`headscale --help`, s", "help", "<= 0.5", _row(process="headscale --help"), seconds("headscale --help"),
        ("process",)),
]  # fmt: skip


def read_results(folder: Path) -> dict[str, dict[str, Any]]:
    """Every result by the name of its file."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def bar_rows(results: Mapping[str, Mapping[str, Any]]) -> Iterator[dict[str, str]]:
    """One row for every bar and every result it was measured in; bars without any say so."""
    for bar in BARS:
        found = [
            {
                "bar": bar.what,
                "wanted": bar.wanted.replace("<=", "at most").replace(">=", "at least"),
                "measured": str(number),
                "holds": "yes" if bar.holds(number) else "no",
                "at": "; ".join(_text(row.get(name)) for name in bar.label),
                "clock": str(result.get("clock", "wall")).partition(",")[0],
                "result": name,
            }
            for name, result in results.items()
            if result["schema"].split(".")[-1].partition("/")[0] == bar.schema
            for row in _all_rows(result)
            if bar.where(row) and (number := bar.measure(row, result["rows"])) is not None
        ]
        yield from found or [{"bar": bar.what, "wanted": bar.wanted, "measured": "not measured"}]


def _all_rows(result: Mapping[str, Any]) -> list[Row]:
    return [*result["rows"], *([result["large_vocabulary"]] if "large_vocabulary" in result else [])]


def report(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The page."""
    columns = ("bar", "wanted", "measured", "holds", "at", "clock", "result")
    parts = [HEAD, harness.markdown(list(bar_rows(results)), columns), TESTED, "## Every result"]
    for name, result in results.items():
        parts += [f"\n### {name}\n", _provenance(result) + "\n", _details(result["rows"])]
    return "\n".join(parts) + "\n"


def _provenance(result: Mapping[str, Any]) -> str:
    machine = dict(result["machine"])
    machine.pop("system", None)
    known = [f"{key} {value}" for key, value in machine.items() if value is not None]
    command = result.get("command")
    own = [f"{k} {_text(v)}" for k, v in result.items() if k not in ("schema", "machine", "rows", "command")]
    own = [text for text in own if "{" not in text]
    return "; ".join([*([f"`{command}`"] if command else []), *own, *known])


def _details(rows: Sequence[Row]) -> str:
    keys = dict.fromkeys(key for row in rows for key, value in row.items() if not isinstance(value, list | dict))
    return harness.markdown(rows, list(keys))


def _text(value: Any) -> str:
    return _number(value) if isinstance(value, float) else str(value)


def _number(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    page = report(read_results(options.results))
    if options.output:
        options.output.write_text(page)
    else:
        print(page)


if __name__ == "__main__":
    main()
