"""Norms of the head of a 600 MB checkpoint: `headscale inspect --weights-only` against loading the model, processes.

Example:
    python benchmarks/inspect_weights.py --json benchmarks/results/inspect_weights.json
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import _harness as harness

# ModernBERT-base: 50,368 terms of width 768, 22 layers; random weights. A process of its own, so that this one
# stays small: a child's peak counts what its parent held when it was started.
WRITE = """
import sys, torch
from transformers import ModernBertConfig, ModernBertForMaskedLM
torch.manual_seed(0)
ModernBertForMaskedLM(ModernBertConfig()).save_pretrained(sys.argv[1])
"""
PEER = """
import sys
from transformers import AutoModelForMaskedLM
weight = AutoModelForMaskedLM.from_pretrained(sys.argv[1]).get_output_embeddings().weight.detach()
rows = weight.norm(dim=1)
print(float(weight.norm()), float(rows.mean()), float(rows.std()), float(rows.min()), float(rows.max()))
"""
NAMES = ("headscale", "headscale --spectral", "AutoModelForMaskedLM")
COLUMNS = ("process", "s", "spread s", "CPU s", "peak MB", "peer time / ours", "peer CPU / ours", "peak / peer's")


def commands(checkpoint: Path, folder: Path) -> dict[str, list[str]]:
    ours = [sys.executable, "-m", "headscale", "inspect", str(checkpoint), "--weights-only", "--json", "--quiet"]
    ours += ["--force", "--run", str(folder / "runs"), "--reference", "bundled:tiny-bert"]
    found = (ours, [*ours, "--spectral"], [sys.executable, "-W", "ignore", "-c", PEER, str(checkpoint)])
    return dict(zip(NAMES, found, strict=True))


def rows_of(taken: dict[str, list[harness.Process]]) -> list[dict[str, Any]]:
    wall = {name: harness.Timing(name, tuple(p.seconds for p in runs)) for name, runs in taken.items()}
    cpu = {name: harness.Timing(name, tuple(p.cpu_seconds for p in runs)) for name, runs in taken.items()}
    peaks = {name: max(p.peak_bytes for p in runs) for name, runs in taken.items()}
    peer = NAMES[-1]
    return [
        {
            "process": name,
            "s": wall[name].median,
            "spread s": f"{wall[name].low:.2f}-{wall[name].high:.2f}",
            "CPU s": cpu[name].median,
            "peak MB": peaks[name] / 2**20,
            "peer time / ours": wall[peer].over(wall[name]),
            "peer CPU / ours": cpu[peer].over(cpu[name]),
            "peak / peer's": peaks[name] / peaks[peer],
            "times": [wall[name].to_dict()],
        }
        for name in NAMES
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        subprocess.run([sys.executable, "-c", WRITE, str(folder / "model")], check=True, capture_output=True)
        size = sum(file.stat().st_size for file in (folder / "model").iterdir())
        taken = harness.interleaved_processes(commands(folder / "model", folder), rounds=options.rounds)
    rows = rows_of(taken)
    print(f"checkpoint of {size / 1e6:.0f} MB\n\n{harness.markdown(rows, COLUMNS)}\n\n{harness.machine_line()}")
    if options.json:
        harness.save_json(options.json, "inspect_weights", rows, clock="wall, whole process", checkpoint_bytes=size)


if __name__ == "__main__":
    main()
