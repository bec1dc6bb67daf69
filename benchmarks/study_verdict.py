r"""The study: full, very short trainings over constants, head learning rates, learning rates and seeds.

python examples/pretrain_bundled.py --only tiny-bert --set level=null z_loss=0 --work WORK --out DIR/plain-bert
python examples/pretrain_bundled.py --only tiny-modernbert --set level=5 z_loss=0.01 --work WORK \
    --out DIR/held-modernbert
python benchmarks/study_verdict.py run --workers 2 --backbones DIR   # resumable; rows and steps in reports/data/
python benchmarks/study_verdict.py judge                  # rules fitted on one part, judged on the other
python benchmarks/study_verdict.py report                 # reports/study.md from the rows
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import study_report  # noqa: E402
from study_data import DATA, ROWS, TARGETS, write_steps  # noqa: E402
from study_plan import PRETRAINED, stages  # noqa: E402

from headscale import cells  # noqa: E402
from headscale.activations import Encoding  # noqa: E402
from headscale.backbone import load_backbone  # noqa: E402
from headscale.calibration import Choice, choose  # noqa: E402
from headscale.demo import DOCUMENT_LENGTH, FAILING, QUERY_LENGTH, REFERENCE  # noqa: E402
from headscale.grid import LocalProcesses, row_of, sweep  # noqa: E402
from headscale.inspection import Measured, measure, texts_of  # noqa: E402
from headscale.profiles import Reference, profile_of  # noqa: E402
from headscale.trials import Bench, TextSource, configuration_of, folder_of, identity_of  # noqa: E402

CEILINGS = (1.0, 1.1, 1.25, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0)
CHOSEN = ("match", "match_reason", "scale", "shift", "head_lr_multiplier")
SOURCE = TextSource()
TEMPERED = 1 / 64  # the constant whose spread of scores the temperature control matches
NOT_KEPT = {"verdict": None, "verdict_step": None, "verdict_lr_share": None}  # of the rules before they were fitted


@dataclass(frozen=True)
class Places:
    """Where things are: cells, and the backbones that are not bundled; none of it decides a row."""

    runs: tuple[Path, ...]  # cells are made in the first and looked for in all
    backbones: Path

    def of(self, name: str) -> str:
        """What `load_backbone` takes for a name of the study."""
        found = sorted((self.backbones / name).glob("*/config.json")) if name in PRETRAINED else []
        return str(found[0].parent) if found else name

    @property
    def names(self) -> tuple[str, ...]:
        """The backbones at hand."""
        return (REFERENCE, FAILING, *(n for n in PRETRAINED if self.of(n) != n))

    @property
    def run(self) -> Path:
        """Where cells are made."""
        return self.runs[0]

    def home(self, configuration: dict[str, Any]) -> Path | None:
        """The run folder that holds a finished cell."""
        return next((r for r in self.runs if cells.finished(folder_of(configuration, r), configuration)), None)

    def identity(self, name: str) -> str:
        """A digest of what a name stands for, the same on every machine."""
        if name not in PRETRAINED:
            return str(identity_of(name))  # of a bundled one: a digest of its files
        total = hashlib.sha256()
        for file in sorted(f for f in Path(self.of(name)).iterdir() if f.suffix in (".json", ".safetensors")):
            total.update(file.name.encode() + b"\0" + file.read_bytes())
        return total.hexdigest()[:16]

    def name_of(self, configuration: dict[str, Any]) -> str:
        """The study's name for the backbone of a cell."""
        return {self.of(n): n for n in self.names}.get(configuration["backbone"], configuration["backbone"])


def targets(bench: Bench, places: Places, wanted: Iterable[str]) -> dict[str, Any]:
    """What every target of `calibrate` asks for, measured on the dev pairs at the study's lengths."""
    texts = texts_of(bench.corpus(SOURCE).dev[:128], "built-in", Encoding(QUERY_LENGTH, DOCUMENT_LENGTH, 32))
    measured = {name: measure(load_backbone(places.of(name)), texts, spectral=True) for name in {REFERENCE, *wanted}}
    profile = profile_of(measured[REFERENCE].inspection, origin="bundled")
    found: dict[str, Any] = {}
    against = Reference(profile, "bundled")
    for name in wanted:
        one = measured[name]
        chosen, alone = choose(one, against), choose(one, against, Choice(shift=False))
        output, curve = one.inspection.output, one.inspection.curve
        assert output is not None
        assert curve is not None
        found[name] = {
            "weights": one.inspection.weights.to_dict(),
            "calibration": {name: getattr(chosen, name) for name in CHOSEN},
            "targets": [t.to_dict() for t in alone.targets],  # as the curve, without a shift
            "ceilings": {str(c): _loss_target(one, against, c) for c in CEILINGS},
            "curve": curve.to_dict(),
            "output": output.to_dict(),
            "shift": choose(one, against, Choice(shift=True)).shift,
        }
    return found


def _loss_target(one: Measured, against: Reference, ceiling: float) -> dict[str, Any]:
    found = choose(one, against, Choice(match="loss", ceiling=ceiling, shift=False)).targets
    return next(t for t in found if t.name == "loss").to_dict()


def temperature_control(curve: dict[str, Any], scale: float) -> tuple[float, tuple[float, float]]:
    """The temperature and lambda factors that start the untouched head where the constant starts it."""
    one, other = curve["scale"].index(1.0), curve["scale"].index(scale)
    shares = [curve[f"flops_reg_{side}"][other] / curve[f"flops_reg_{side}"][one] for side in ("query", "document")]
    return curve["score_sd"][one] / curve["score_sd"][other], (shares[0], shares[1])


def plan(bench: Bench, places: Places) -> dict[str, list[dict[str, Any]]]:
    """The configurations of every stage, in order; none twice."""
    known = json.loads(TARGETS.read_text())
    found = known[FAILING]
    temperature, shares = temperature_control(found["curve"], TEMPERED)
    shifts = {name: known[name]["shift"] for name in places.names}
    identities = {name: places.identity(name) for name in places.names}
    corpus = bench.corpus(SOURCE)
    seen: set[str] = set()
    result: dict[str, list[dict[str, Any]]] = {}
    for stage, stage_cells in stages(temperature, shares, shifts).items():
        for backbone, training in stage_cells:
            if backbone not in identities:
                continue
            one = configuration_of(places.of(backbone), training, SOURCE, corpus)
            one["identity"] = identities[backbone]
            key = cells.cell_key(one)
            if key not in seen:
                seen.add(key)
                result.setdefault(stage, []).append(one)
    return result


def write_rows(planned: dict[str, list[dict[str, Any]]], places: Places) -> None:
    """Every finished cell as a row, with the stage it belongs to."""
    found = [(stage, one, places.home(one)) for stage, configurations in planned.items() for one in configurations]
    kept = [
        {
            "stage": stage,
            **row_of(one, home).to_dict(),
            **NOT_KEPT,
            "backbone": places.name_of(one),
            "scale_bias": one["training"]["scale_bias"],
        }
        for stage, one, home in found
        if home is not None
    ]
    if kept:
        with ROWS.open("w", newline="") as file:
            writer = csv.DictWriter(file, kept[0].keys(), delimiter="\t", lineterminator="\n")
            writer.writeheader()
            writer.writerows(kept)
    write_steps({cells.cell_key(one): folder_of(one, home) for _, one, home in found if home is not None})


def run_study(places: Places, workers: int, stop_after: float, only: Sequence[str]) -> None:
    """Run what is missing, in order; rows are written again after every ten cells."""
    bench, run = Bench(lambda sentence: print(sentence, file=sys.stderr)), places.run
    DATA.mkdir(parents=True, exist_ok=True)
    identities = {name: places.identity(name) for name in places.names}
    known = json.loads(TARGETS.read_text()) if TARGETS.is_file() else {"identities": {}}
    if new := [name for name, one in identities.items() if known["identities"].get(name) != one]:
        cells.write_json(TARGETS, {**known, **targets(bench, places, new), "identities": identities})
    planned = plan(bench, places)
    everything = [one for stage, ones in planned.items() for one in ones if not only or stage in only]
    todo = [one for one in everything if places.home(one) is None]
    print(f"{len(everything)} cells, {len(everything) - len(todo)} finished already", file=sys.stderr)
    written = len(ROWS.read_text().splitlines()) - 1 if ROWS.is_file() else 0
    if written > sum(places.home(one) is not None for ones in planned.values() for one in ones):
        sys.exit(f"`{ROWS}` holds {written} cells, more than `{run}`: move it away, or give the folder it came from")
    started = time.monotonic()
    for done, outcome in enumerate(sweep(todo, run, executor=LocalProcesses(workers, threads=1)), start=1):
        row = row_of(outcome.configuration, run)
        elapsed = time.monotonic() - started
        name = f"{places.name_of(outcome.configuration)} a={row.scale:.4g} {row.mode} x{row.head_lr_multiplier:g}"
        name += f" lr={row.lr:g} seed={row.seed}"
        end = f"loss {row.loss_start} -> {row.loss_end}, dims {row.active_dims_document}, nDCG {row.ndcg_test}"
        print(
            f"{done}/{len(todo)} {elapsed:.0f}s {name}: {row.status}, {end} {row.message}", file=sys.stderr, flush=True
        )
        if done % 10 == 0:
            write_rows(planned, places)
        if elapsed > stop_after:
            break
    write_rows(planned, places)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "rows", "judge", "report"))
    parser.add_argument("--run", type=Path, nargs="+", default=[HERE.parent / "headscale-runs" / "study"])
    parser.add_argument("--stages", nargs="*", default=[], help="of study_plan.py; all without")
    parser.add_argument("--backbones", type=Path, default=HERE.parent / "headscale-runs" / "backbones")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--stop-after", type=float, default=float("inf"), metavar="SECONDS")
    options = parser.parse_args()
    places = Places(tuple(options.run), options.backbones)
    if options.command == "run":
        run_study(places, options.workers, options.stop_after, options.stages)
    elif options.command == "rows":
        write_rows(plan(Bench(), places), places)
    else:
        getattr(study_report, options.command)(options.run)


if __name__ == "__main__":
    main()
