"""The study: full, very short trainings over constants, head learning rates, learning rates and seeds.

python benchmarks/study_verdict.py run --workers 2        # resumable; cells in headscale-runs/, rows in reports/data/
python benchmarks/study_verdict.py judge                  # rules fitted on one part, judged on the other
python benchmarks/study_verdict.py report                 # reports/study.md from the rows
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import study_report  # noqa: E402
from study_plan import stages  # noqa: E402

from headscale import cells  # noqa: E402
from headscale.activations import Encoding  # noqa: E402
from headscale.backbone import load_backbone  # noqa: E402
from headscale.calibration import Choice, choose  # noqa: E402
from headscale.demo import DOCUMENT_LENGTH, FAILING, QUERY_LENGTH, REFERENCE  # noqa: E402
from headscale.grid import LocalProcesses, pending, row_of, sweep  # noqa: E402
from headscale.inspection import measure, texts_of  # noqa: E402
from headscale.profiles import Reference, profile_of  # noqa: E402
from headscale.trials import Bench, TextSource, configuration_of, folder_of, identity_of  # noqa: E402

DATA = HERE.parent / "reports" / "data"
ROWS = DATA / "study.tsv"
TARGETS = DATA / "study-targets.json"
CEILINGS = (1.0, 1.1, 1.25, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0)
SOURCE = TextSource()
NOT_KEPT = {"verdict": None, "verdict_step": None, "verdict_lr_share": None}  # of the rules before they were fitted


def targets(bench: Bench) -> dict[str, Any]:
    """What every target of `calibrate` asks for, measured on the dev pairs at the study's lengths."""
    texts = texts_of(bench.corpus(SOURCE).dev[:128], "built-in", Encoding(QUERY_LENGTH, DOCUMENT_LENGTH, 32))
    measured = {name: measure(load_backbone(name), texts, spectral=True) for name in (REFERENCE, FAILING)}
    profile = profile_of(measured[REFERENCE].inspection, origin="bundled")
    found: dict[str, Any] = {}
    for name, one in measured.items():
        chosen = choose(one, Reference(profile, "bundled"))
        ceilings = {
            str(c): next(
                t
                for t in choose(one, Reference(profile, "bundled"), Choice(match="loss", ceiling=c)).targets
                if t.name == "loss"
            ).to_dict()
            for c in CEILINGS
        }
        output, curve = one.inspection.output, one.inspection.curve
        assert output is not None
        assert curve is not None
        found[name] = {
            "weights": one.inspection.weights.to_dict(),
            "calibration": {"match": chosen.match, "reason": chosen.match_reason, "scale": chosen.scale},
            "targets": [t.to_dict() for t in chosen.targets],
            "ceilings": ceilings,
            "curve": curve.to_dict(),
            "active_dims": [output.query.active_dims, output.document.active_dims],
        }
    return found


def temperature_control(curve: dict[str, Any], scale: float) -> tuple[float, tuple[float, float]]:
    """The temperature and lambda factors that start the untouched head where the constant starts it."""
    one, other = curve["scale"].index(1.0), curve["scale"].index(scale)
    shares = [curve[f"flops_reg_{side}"][other] / curve[f"flops_reg_{side}"][one] for side in ("query", "document")]
    return curve["score_sd"][one] / curve["score_sd"][other], (shares[0], shares[1])


def plan(bench: Bench) -> dict[str, list[dict[str, Any]]]:
    """The configurations of every stage, in order; none twice."""
    found = json.loads(TARGETS.read_text())[FAILING]
    temperature, shares = temperature_control(found["curve"], found["calibration"]["scale"])
    corpus = bench.corpus(SOURCE)
    seen: set[str] = set()
    result: dict[str, list[dict[str, Any]]] = {}
    for stage, stage_cells in stages(temperature, shares).items():
        for backbone, training in stage_cells:
            one = configuration_of(backbone, training, SOURCE, corpus)
            key = cells.cell_key(one)
            if key not in seen:
                seen.add(key)
                result.setdefault(stage, []).append(one)
    return result


def write_rows(planned: dict[str, list[dict[str, Any]]], run: Path) -> None:
    """Every finished cell as a row, with the stage it belongs to."""
    rows = [
        {"stage": stage, **row_of(one, run).to_dict(), **NOT_KEPT, "scale_bias": one["training"]["scale_bias"]}
        for stage, configurations in planned.items()
        for one in configurations
    ]
    kept = [row for row in rows if row["status"] in ("done", "failed")]
    if kept:
        with ROWS.open("w", newline="") as file:
            writer = csv.DictWriter(file, kept[0].keys(), delimiter="\t", lineterminator="\n")
            writer.writeheader()
            writer.writerows(kept)
    folders = {
        cells.cell_key(one): folder_of(one, run)
        for stage in planned.values()
        for one in stage
        if cells.finished(folder_of(one, run), one) is not None
    }
    study_report.write_steps(folders)


def run_study(run: Path, workers: int, stop_after: float) -> None:
    """Run what is missing, in order; rows are written again after every ten cells."""
    bench = Bench(lambda sentence: print(sentence, file=sys.stderr))
    DATA.mkdir(parents=True, exist_ok=True)
    identities = {name: identity_of(name) for name in (REFERENCE, FAILING)}
    if not TARGETS.is_file() or json.loads(TARGETS.read_text())["identities"] != identities:
        cells.write_json(TARGETS, {**targets(bench), "identities": identities})
    planned = plan(bench)
    everything = [one for stage in planned.values() for one in stage]
    todo = pending(everything, run)
    print(f"{len(everything)} cells, {len(everything) - len(todo)} finished already", file=sys.stderr)
    written = len(ROWS.read_text().splitlines()) - 1 if ROWS.is_file() else 0
    if written > len(everything) - len(todo):
        sys.exit(f"`{ROWS}` holds {written} cells, more than `{run}`: move it away, or give the folder it came from")
    started = time.monotonic()
    for done, outcome in enumerate(sweep(todo, run, executor=LocalProcesses(workers, threads=1)), start=1):
        row = row_of(outcome.configuration, run)
        elapsed = time.monotonic() - started
        name = f"{row.backbone} a={row.scale:.4g} {row.mode} x{row.head_lr_multiplier:g} lr={row.lr:g} seed={row.seed}"
        end = f"loss {row.loss_start} -> {row.loss_end}, dims {row.active_dims_document}, MRR {row.mrr_test}"
        print(
            f"{done}/{len(todo)} {elapsed:.0f}s {name}: {row.status}, {end} {row.message}", file=sys.stderr, flush=True
        )
        if done % 10 == 0:
            write_rows(planned, run)
        if elapsed > stop_after:
            break
    write_rows(planned, run)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "rows", "judge", "report"))
    parser.add_argument("--run", type=Path, default=HERE.parent / "headscale-runs" / "study")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--stop-after", type=float, default=float("inf"), metavar="SECONDS")
    options = parser.parse_args()
    if options.command == "run":
        run_study(options.run, options.workers, options.stop_after)
    elif options.command == "rows":
        write_rows(plan(Bench()), options.run)
    else:
        getattr(study_report, options.command)(options.run)


if __name__ == "__main__":
    main()
