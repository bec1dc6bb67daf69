"""The study's run folder as `headscale report` should show it, then its page and the README's figures.

python benchmarks/study_page.py --run RUN [RUN ...] --backbones DIR

Backbones are named as in the study, and every cell's verdict is given again by the rules that were fitted on all of
them (so here the verdicts are in sample; reports/study.md has those that are not). Nothing is trained.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

from study_plan import PRETRAINED  # noqa: E402

from headscale import cells  # noqa: E402
from headscale.cli import run as headscale  # noqa: E402
from headscale.demo import DOCUMENT_LENGTH, FAILING, QUERY_LENGTH, REFERENCE  # noqa: E402
from headscale.trials import candidates_of, read_trained, training_of  # noqa: E402
from headscale.verdict import Watch  # noqa: E402

REPORTS = HERE.parent / "reports"


def renamed(cell: dict[str, Any], backbones: Path) -> dict[str, Any]:
    """A cell with the study's names in the place of directories."""
    text = json.dumps(cell)
    for name in PRETRAINED:
        for folder in (backbones / name).glob("tiny-*"):
            text = text.replace(str(folder), name)
    found: dict[str, Any] = json.loads(text)
    return found


def judged(folder: Path, cell: dict[str, Any]) -> dict[str, Any]:
    """A cell with the verdict of today's rules on its steps."""
    trained, config = read_trained(folder), training_of(cell["configuration"])
    watch = Watch(config, candidates=candidates_of(config), vocab_size=trained.run.vocab_size)
    for step in trained.run.steps:
        watch(step)
    return {**cell, "result": {**cell["result"], "verdict": watch.verdict.to_dict()}}


def gather(runs: list[Path], backbones: Path, target: Path) -> None:
    """Copy every finished training."""
    for run in runs:
        for file in sorted(run.glob("trial-*/cell.json")):
            cell = cells.read_cell(file.parent)
            if cell["status"] != "done":
                continue
            folder = target / file.parent.name.rsplit("-", 1)[-1]
            folder.mkdir(parents=True)
            cells.write_json(folder / cells.CELL, renamed(judged(file.parent, cell), backbones))
            shutil.copy(file.parent / cells.STEPS, folder / cells.STEPS)


def measure(names: list[str]) -> None:
    """Inspect every backbone; calibrate it without a shift, for the targets of figure 3, and as by default."""
    lengths = ["--query-length", str(QUERY_LENGTH), "--document-length", str(DOCUMENT_LENGTH), "-q"]
    headscale(["inspect", *names, "--reference", REFERENCE, "--spectral", *lengths, "-o", "inspected.json"])
    for shift in (["--no-shift"], []):
        headscale(["calibrate", *names, "--reference", REFERENCE, *shift, *lengths])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, nargs="+", required=True)
    parser.add_argument("--backbones", type=Path, required=True)
    options = parser.parse_args()
    runs, backbones = [run.resolve() for run in options.run], options.backbones.resolve()

    with tempfile.TemporaryDirectory() as place:
        os.chdir(place)  # so that backbones and results go by short names
        gather(runs, backbones, Path("headscale-runs"))
        for name in PRETRAINED:
            for folder in (backbones / name).glob("tiny-*"):
                Path(name).symlink_to(folder)
        measure([REFERENCE, FAILING, *(name for name in PRETRAINED if Path(name).exists())])
        headscale(["report", "headscale-runs", "-o", "study.html"])
        headscale(["report", "headscale-runs", "--plot", "study.svg", "--figure", "norm", "--figure", "curves"])
        for made in Path().glob("study*.*"):
            shutil.copy(made, REPORTS / made.name)


if __name__ == "__main__":
    main()
