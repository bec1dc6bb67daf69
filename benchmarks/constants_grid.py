"""Fifty constants from one forward pass, against that pass alone: the statistics `calibrate` chooses a constant by.

"pass" runs the texts through the same model and pools them once, as a trainer would; "grid" is all of `observe` and
`scale_curve` at fifty constants. "statistics" is what the grid needs beyond the pass.

Example:
    python benchmarks/constants_grid.py --threads 2 --json benchmarks/results/constants_grid.json
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import _harness as harness
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer
from trial_step import make_pairs, write_backbone

from headscale.activations import DEFAULT_ENCODING, Encoding, observe, only_active, scale_curve
from headscale.encoder import SpladeEncoder
from headscale.head import LoadedHead, load_head

GRID = tuple(2.0 ** (i / 2) for i in range(-36, 14))
BACKBONES = {"base": (768, 12), "small": (256, 6)}  # width and layers
COLUMNS = (
    "backbone",
    "pairs",
    "active terms",
    "threads",
    "pass s",
    "grid s",
    "spread s",
    "statistics s",
    "grid / pass",
)


def silenced(head: LoadedHead, pairs: list[Any], tokenizer: Any, share: float) -> None:
    """Lower the bias so that about this share of (text, term) entries stays active, as in a trained model."""
    seen = observe(head, tokenizer, pairs[: DEFAULT_ENCODING.batch_size])
    values = torch.cat([seen.query.largest, seen.document.largest]).flatten()
    cut = float(values.sort().values[int((1 - share) * (len(values) - 1))])
    with torch.no_grad():
        assert head.bias is not None
        head.bias.sub_(cut)


def one_pass(head: LoadedHead, tokenizer: Any, pairs: list[Any], encoding: Encoding) -> None:
    encoder = SpladeEncoder(head, tokenizer)
    for start in range(0, len(pairs), encoding.batch_size):
        part = pairs[start : start + encoding.batch_size]
        with torch.no_grad():
            encoder([p.query for p in part], encoding.query_length)
            encoder([p.document for p in part], encoding.document_length)


def row_of(backbone: str, share: float, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    width, layers = BACKBONES[backbone]
    write_backbone(folder, 0.1, width=width, layers=layers)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    head = load_head(AutoModelForMaskedLM.from_pretrained(folder).eval())
    pairs = make_pairs("256/256", options.pairs)
    if share < 1:
        silenced(head, pairs, tokenizer, share)
    seen = observe(head, tokenizer, pairs)
    calls: dict[str, Callable[[], object]] = {
        "pass": lambda: one_pass(head, tokenizer, pairs, DEFAULT_ENCODING),
        "grid": lambda: scale_curve(observe(head, tokenizer, pairs), GRID),
        "statistics": lambda: scale_curve(seen, GRID),
    }
    clock = time.process_time if options.cpu_time else time.perf_counter
    times = harness.interleaved(calls, rounds=options.rounds, clock=clock)
    kept = only_active(seen, 0.0).query.largest.shape[1] / head.vocab_size
    row: dict[str, Any] = {"backbone": f"{backbone}: {layers} layers of width {width}", "pairs": len(pairs)}
    row |= {"active terms": kept, "threads": torch.get_num_threads()}
    row |= {f"{name} s": timing.median for name, timing in times.items()}
    row["spread s"] = f"{times['grid'].low:.2f}-{times['grid'].high:.2f}"
    return row | {"grid / pass": times["grid"].over(times["pass"]), "times": [t.to_dict() for t in times.values()]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", action="append", choices=BACKBONES, help="may be repeated")
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--share", type=float, action="append", help="active entries, 1 by default; may be repeated")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cpu-time", action="store_true", help="CPU seconds: for a busy machine")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as name:
        asked = product(options.backbone or ["base"], options.share or [1.0])
        rows = [row_of(backbone, share, options, Path(name)) for backbone, share in asked]
    print(f"{harness.markdown(rows, COLUMNS)}\n\n{harness.machine_line()}")
    if options.json:
        clock = f"{'CPU' if options.cpu_time else 'wall'} seconds, {options.threads} threads"
        harness.save_json(options.json, "constants_grid", rows, clock=clock, constants=len(GRID))


if __name__ == "__main__":
    main()
