"""The study's decisive cells again on a GPU, in bf16 and fp16, held against the CPU's: one run of at most ten minutes.

python benchmarks/study_gpu.py --json reports/study-gpu.json
python benchmarks/study_gpu.py --device cpu --precisions fp32 --seeds 1 --limit 2 --steps 4     # every path, here

Prints a row per cell: steps per second, peak memory, nDCG@10 and verdict, beside what reports/data/ has of the same
cell on a CPU in fp32. Cells that would begin after `--budget` seconds are left out, and counted.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import _harness as harness  # noqa: E402
from study_data import TARGETS, Cell, read_cells  # noqa: E402

from headscale.demo import FAILING, REFERENCE, demo_config  # noqa: E402
from headscale.recipes import TrainingConfig  # noqa: E402
from headscale.trials import Bench, TextSource, configuration_of, run_cell  # noqa: E402
from headscale.verdict import judge_run  # noqa: E402

COLUMNS = ("backbone", "start", "seed", "precision", "steps/s", "MB", "nDCG@10", "nDCG@10 CPU", "verdict",
           "verdict CPU", "ended CPU")  # fmt: skip
NUMBERS = ("scale", "shift", "head_lr_multiplier", "lr", "seed", "lambda_document", "temperature", "warmup_ratio")


def starts() -> list[tuple[str, str, dict[str, Any]]]:
    """(backbone, name, what is done to the head): what trains, what fails, what repairs it, on both backbones."""
    shift = json.loads(TARGETS.read_text())[FAILING]["shift"]
    untied: dict[str, Any] = {"mode": "untie"}
    return [
        (REFERENCE, "untouched", {}),
        (FAILING, "untouched", {}),
        (FAILING, f"shift {shift:.3g}", untied | {"scale": 1.0, "shift": shift}),
        (FAILING, "x 1/8, head lr x4", untied | {"scale": 1 / 8, "head_lr_multiplier": 4.0}),
        (FAILING, "x 1/16", untied | {"scale": 1 / 16}),
        (REFERENCE, "x 4", untied | {"scale": 4.0}),
        (FAILING, "x 1/2", untied | {"scale": 1 / 2}),
    ]


def on_cpu(known: list[Cell], backbone: str, config: TrainingConfig) -> Cell | None:
    """The study's cell of the same configuration; None where it was not run there."""
    for cell in known:
        same = all(abs(getattr(cell.row, n) - getattr(config, n)) < 1e-9 for n in NUMBERS)
        if same and cell.scale_bias and (cell.row.backbone, cell.row.mode) == (backbone, config.mode):
            return cell
    return None


def verdict_of(cell: Cell) -> str:
    """What the rules say of a cell of the study, from the steps that are kept of it."""
    vocabulary = cell.row.vocab_size or 0
    return judge_run(cell.steps, cell.config, candidates=cell.config.batch_size, vocab_size=vocabulary).word


def measured(
    bench: Bench, run: Path, known: list[Cell], backbone: str, name: str, config: TrainingConfig
) -> dict[str, Any]:
    """One cell trained and ranked, as a row."""
    source = TextSource()
    done = run_cell(configuration_of(backbone, config, source, bench.corpus(source)), run, bench=bench, force=True)
    cpu, ranking, steps = on_cpu(known, backbone, config), done.run.end.ranking, done.run.steps
    return {
        "backbone": backbone, "start": name, "seed": config.seed, "precision": config.precision,
        "steps/s": len(steps) / sum(step.seconds for step in steps), "MB": max(s.memory for s in steps) / 1e6,
        "nDCG@10": ranking.ndcg_at_10 if ranking else None, "nDCG@10 CPU": cpu.row.ndcg_test if cpu else None,
        "verdict": done.verdict.word, "verdict CPU": verdict_of(cpu) if cpu else "-",
        "ended CPU": cpu.label if cpu else "-",
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--precisions", default="bf16,fp16")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, help="fewer than the study's 100, to go through every path")
    parser.add_argument("--limit", type=int, help="cells at most")
    parser.add_argument("--budget", type=float, default=540.0, help="seconds")
    parser.add_argument("--run", type=Path, default=Path("headscale-runs") / "study-gpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    bench, begun = Bench(lambda sentence: print(sentence, file=sys.stderr)), time.monotonic()
    changes = {"device": options.device, **({"steps": options.steps} if options.steps else {})}
    planned = [
        (backbone, name, demo_config(seed).replace(precision=precision, **head, **changes))
        for seed in range(options.seeds)
        for precision in options.precisions.split(",")
        for backbone, name, head in starts()
    ][: options.limit]
    rows: list[dict[str, Any]] = []
    known = read_cells()
    for backbone, name, config in planned:
        if time.monotonic() - begun > options.budget:
            break
        rows.append(measured(bench, options.run, known, backbone, name, config))
        print(f"{len(rows)}/{len(planned)} {backbone} {name}: {rows[-1]['verdict']}", file=sys.stderr, flush=True)
    print(harness.markdown(rows, COLUMNS))
    print(f"\n{len(planned) - len(rows)} cells left out for want of time\n{harness.machine_line()}")
    if options.json:
        harness.save_json(options.json, "study_gpu", rows)


if __name__ == "__main__":
    main()
