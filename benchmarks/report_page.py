"""Time and size of the report of 60 trials of 500 steps: the whole command in fresh processes, and its page.

The trials are one short real training of a bundled backbone, its log repeated with noise under 60 configurations.

Example:
    python benchmarks/report_page.py --json benchmarks/results/report_page.json
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import _harness as harness

from headscale import cells
from headscale.demo import CANDIDATES, FAILING, PACKAGES, REFERENCE, demo_config
from headscale.trials import Bench, TextSource, configuration_of, folder_of, run_cell

SECONDS, BYTES = 5.0, 1_000_000  # what the report is to stay under
STEPS = 500
SCALES = (None, *(2.0**-i for i in range(9)))  # None: untouched
SEEDS = range(3)
NOISY = ("loss_over_ln_n", "active_dims_document", "active_dims_query", "score_sd", "cosine_document", "grad_norm",
         "grad_norm_head", "grad_norm_encoder", "ranking_loss", "loss")  # fmt: skip


def real_training(folder: Path) -> Path:
    """One training of the demo, as its cell keeps it."""
    source = TextSource(packages=PACKAGES, candidates=CANDIDATES, rank_dev=False)
    bench = Bench()
    configuration = configuration_of(FAILING, demo_config(0), source, bench.corpus(source))
    run_cell(configuration, folder, bench=bench)
    return folder_of(configuration, folder)


def write_trials(real: Path, run: Path) -> int:
    """60 trials from a real one; returns how many bytes of logs there are."""
    cell = cells.read_cell(real)
    log = [json.loads(line) for line in (real / cells.STEPS).read_text().splitlines()]
    written = 0
    for backbone, scale, seed in itertools.product((REFERENCE, FAILING), SCALES, SEEDS):
        arm = {"scale": scale or 1.0, "mode": "none" if scale is None else "untie", "steps": STEPS, "seed": seed}
        training = {**cell["configuration"]["training"], **arm}
        configuration = {**cell["configuration"], "backbone": backbone, "training": training}
        folder = folder_of(configuration, run)
        folder.mkdir(parents=True)
        noise = random.Random(folder.name)
        lines = [json.dumps(_noisy(log[i % len(log)], i, noise)) for i in range(STEPS)]
        (folder / cells.STEPS).write_text("\n".join(lines) + "\n")
        written += (folder / cells.STEPS).stat().st_size
        trained = cell["result"]["run"]
        ranking = {**trained["end"]["ranking"], "mrr_at_10": noise.uniform(0.01, 0.3)}
        changed = {**trained, "config": training, "end": {**trained["end"], "steps": STEPS, "ranking": ranking}}
        cells.write_cell(folder, "trial", configuration, {**cell["result"], "backbone": backbone, "run": changed})
    return written


def _noisy(record: dict[str, Any], step: int, noise: random.Random) -> dict[str, Any]:
    moved = {name: record[name] * noise.uniform(0.9, 1.1) for name in NOISY if record.get(name) is not None}
    return {**record, **moved, "step": step}


def timed(run: Path, page: Path) -> tuple[float, float]:
    """Wall and CPU seconds of the whole command."""
    before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, "-m", "headscale", "report", str(run), "-o", str(page), "-q"], check=True,
                   stdout=subprocess.DEVNULL)  # fmt: skip
    wall = time.perf_counter() - begun
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--keep", type=Path, help="a folder for trials and page, to look at")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root = options.keep or Path(temporary)
        logged = write_trials(real_training(root / "real"), root / "runs")
        timed(root / "runs", root / "report.html")  # once untimed: bytecode and caches
        times = [timed(root / "runs", root / "report.html") for _ in range(options.rounds)]
        size = (root / "report.html").stat().st_size
    wall, cpu = ([pair[i] for pair in times] for i in (0, 1))
    row = {
        "trials": 2 * len(SCALES) * len(SEEDS), "steps": STEPS, "log MB": logged / 1e6,
        "wall s": statistics.median(wall), "wall range s": [min(wall), max(wall)],
        "CPU s": statistics.median(cpu), "CPU range s": [min(cpu), max(cpu)], "page kB": size / 1e3,
        "within": statistics.median(wall) < SECONDS and size < BYTES,
    }  # fmt: skip
    print(harness.markdown([row], ["trials", "steps", "log MB", "wall s", "CPU s", "page kB", "within"]))
    print("\n" + harness.machine_line())
    if options.json:
        harness.save_json(options.json, "report_page", [row], bars={"seconds": SECONDS, "bytes": BYTES})


if __name__ == "__main__":
    main()
