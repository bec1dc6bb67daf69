"""What the exports to other trainers share: calibrate and write a checkpoint, and hold what they load against it.

`expected_vectors` never reads the exported files: it shifts and multiplies the logits of the original. So a match says
that the checkpoint, opened by another project's own lines, gives the vectors that the calibration promises.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from torch import Tensor

import headscale
from headscale.records import Calibration
from headscale.texts import builtin_pairs

TOLERANCE = 1e-5  # of the largest weight, in fp32: the bar that headscale holds its own checkpoints to
LENGTH = 48  # tokens


def options(description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="bundled:tiny-modernbert")
    parser.add_argument("--reference", default="bundled:tiny-bert")
    parser.add_argument("--output", type=Path, help="where the checkpoint goes; by default a temporary folder")
    return parser.parse_args()


def export(given: argparse.Namespace) -> tuple[Calibration, Path]:
    """Calibrate and write a drop-in checkpoint: transformers' files, the constant in the head's weights."""
    directory = given.output or Path(mkdtemp()) / "calibrated"
    calibration = headscale.calibrate(
        given.backbone,
        reference=given.reference,
        encoding=headscale.Encoding(LENGTH, LENGTH),
        save=directory,
        overwrite=True,
    )
    if calibration.written is None:
        sys.exit(f"no constant: {calibration.verdict.evidence}")
    print(*calibration.advice, sep="\n")
    print(f"written to {directory}, in the weights alone ({calibration.written.mode})\n")
    return calibration, directory


def lambdas(calibration: Calibration, query: float, document: float) -> tuple[float, float, str]:
    """A recipe's two lambdas times the advice, and what to say of them."""
    advice = calibration.lambda_advice
    if advice.query is None or advice.document is None:
        return query, document, "lambda as the recipe has it for the reference"
    note = (
        f"lambda times {advice.query:.3g} and {advice.document:.3g}, so that the regularizer starts where it did "
        f"untouched; that is the upper end, the recipe's {query:g} and {document:g} the lower one: docs/lambda.md"
    )
    return query * advice.query, document * advice.document, note


def texts(count: int = 8) -> tuple[list[str], list[str]]:
    """Queries and documents of different lengths, so that the batches have padding."""
    pairs = builtin_pairs("test", packages=("stdlib",))[:count]
    return [pair.query for pair in pairs], [pair.document for pair in pairs]


@torch.no_grad()
def expected_vectors(calibration: Calibration, batch: list[str], *, untouched: bool = False) -> Tensor:
    """log1p(relu(scale x (logit + shift))) of the original's largest logits, text by text: nothing of theirs."""
    from headscale.backbone import load_backbone

    original = load_backbone(calibration.name)
    rows = []
    for text in batch:
        tokens = original.tokenizer(text, truncation=True, max_length=LENGTH, return_tensors="pt")
        rows.append(original.model(**tokens).logits[0].amax(0))
    largest = torch.stack(rows)
    return torch.log1p(torch.relu(largest if untouched else calibration.scale * (largest + calibration.shift)))


def tokenized(tokenizer: Any, batch: list[str], **more: Any) -> dict[str, Tensor]:
    return tokenizer(batch, padding=True, truncation=True, max_length=LENGTH, return_tensors="pt", **more)


def check(what: str, found: Tensor, expected: Tensor) -> None:
    """Say how far two sets of vectors are apart; leave with 1 if it is too far."""
    error = ((found - expected).abs().max() / expected.abs().max()).item()
    print(f"{what}: largest difference {error:.1e} of the largest weight")
    if not error <= TOLERANCE:
        sys.exit(f"that is more than {TOLERANCE:.0e}: the checkpoint does not do there what it does here")
