"""How long `headscale --help` takes, the whole process, and what it imports that it should not.

Example:
    python benchmarks/help.py --json benchmarks/results/help.json
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

import _harness as harness

HEAVY = ("torch", "transformers", "pandas", "scipy", "matplotlib", "numpy")
LOADED = f"""
import sys
from headscale.cli import run
run(["--help"])
print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)
"""
COLUMNS = ("process", "s", "spread s", "CPU s", "peak MB", "heavy imports")


def row_of(name: str, runs: list[harness.Process], **more: Any) -> dict[str, Any]:
    wall = harness.Timing(name, tuple(p.seconds for p in runs))
    cpu = harness.Timing(name, tuple(p.cpu_seconds for p in runs))
    found = {"process": name, "s": wall.median, "spread s": f"{wall.low:.2f}-{wall.high:.2f}", "CPU s": cpu.median}
    return found | {"peak MB": max(p.peak_bytes for p in runs) / 2**20, **more, "times": [wall.to_dict()]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    commands = {
        "headscale --help": [str(Path(sys.executable).with_name("headscale")), "--help"],
        "python -c pass": [sys.executable, "-c", "pass"],
    }
    taken = harness.interleaved_processes(commands, rounds=options.rounds)
    loaded = subprocess.run([sys.executable, "-c", LOADED], check=True, capture_output=True, text=True)
    heavy = loaded.stderr.strip().splitlines()[-1]
    extra = {True: {"heavy imports": heavy}, False: {}}
    rows = [row_of(name, runs, **extra["--help" in name]) for name, runs in taken.items()]
    print(f"{harness.markdown(rows, COLUMNS)}\n\n{harness.machine_line()}")
    if options.json:
        harness.save_json(options.json, "help", rows, clock="wall, whole process")


if __name__ == "__main__":
    main()
