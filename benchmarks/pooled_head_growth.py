"""How the cost of the pooled head grows with length, vocabulary and batch: one figure, time and memory.

Example:
    python benchmarks/pooled_head_growth.py --figure growth.png --json growth.json
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import _harness as harness
import torch
from pooled_head import contenders, make

BASE = {"batch": 16, "seq": 128, "width": 128, "vocab": 30522}
SWEEPS = {
    "seq": [16, 32, 64, 128, 256],
    "vocab": [4096, 8192, 16384, 30522, 65536],
    "batch": [2, 4, 8, 16, 32],
}
LABELS = {"seq": "tokens of a text, L", "vocab": "vocabulary, V", "batch": "texts, B"}
NAMES = ("headscale", "sentence-transformers")
COLUMNS = ["axis", "value", "headscale ms", "sentence-transformers ms", "headscale MB", "sentence-transformers MB"]


def measured(axis: str, value: int, rounds: int, clock: Any) -> dict[str, Any]:
    """Time and peak memory beyond inputs and gradients of both contenders at one point."""
    shape = BASE | {axis: value}
    problem = make(",".join(map(str, shape.values())), 0.9, 0.0, torch.float32)
    calls = {name: call for name, call in contenders(problem, compiled=False).items() if name in NAMES}
    row: dict[str, Any] = {"axis": axis, "value": value, **shape}
    for name, timing in harness.interleaved(calls, rounds=rounds, clock=clock).items():
        row |= {f"{name} ms": 1e3 * timing.median, f"{name} range ms": [1e3 * timing.low, 1e3 * timing.high]}
        with harness.PeakMemory() as peak:
            calls[name]()
        row[f"{name} MB"] = (peak.bytes - problem.gradient_bytes) / 2**20
    return row


def draw(rows: list[dict[str, Any]], path: Path, clock: str) -> None:
    """Two rows of panels (time, memory), a column per axis, logarithmic."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter, NullLocator

    figure = Figure(figsize=(10, 5.5), layout="constrained")
    panels = figure.subplots(2, len(SWEEPS), sharey="row")
    for column, axis in enumerate(SWEEPS):
        points = [row for row in rows if row["axis"] == axis]
        for line, unit in enumerate(("ms", "MB")):
            panel = panels[line][column]
            for name, marker in zip(NAMES, "os", strict=True):
                panel.loglog(
                    [p["value"] for p in points], [p[f"{name} {unit}"] for p in points], marker=marker, label=name
                )
            values = [p["value"] for p in points]
            panel.set_xticks(values, [f"{value:,}" for value in values])
            panel.xaxis.set_minor_locator(NullLocator())
            panel.yaxis.set_major_formatter("{x:,g}")
            panel.yaxis.set_minor_formatter(NullFormatter())
            panel.grid(alpha=0.3)
        panels[1][column].set_xlabel(f"{LABELS[axis]}\n(elsewhere {BASE[axis]:,})")
    panels[0][0].set_ylabel(f"time, ms\n({clock})")
    panels[1][0].set_ylabel("peak memory, MB\n(beyond inputs and gradients)")
    lines, names = panels[0][0].get_legend_handles_labels()
    figure.legend(lines, names, loc="outside upper right", ncols=2)
    figure.suptitle(f"The pooled head, forward and backward, width {BASE['width']}, 90 % zeros", x=0.01, ha="left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cpu-time", action="store_true", help="one thread, CPU seconds: for a busy machine")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--figure", type=Path)
    options = parser.parse_args()
    clock = time.process_time if options.cpu_time else time.perf_counter
    label = "CPU, one thread" if options.cpu_time else "wall"
    if options.cpu_time:
        torch.set_num_threads(1)
    rows = [measured(axis, value, options.rounds, clock) for axis, values in SWEEPS.items() for value in values]
    print(harness.markdown(rows, COLUMNS))
    print("\n" + harness.machine_line())
    if options.json:
        harness.save_json(options.json, "pooled_head_growth", rows, clock=label)
    if options.figure:
        draw(rows, options.figure, label)


if __name__ == "__main__":
    main()
