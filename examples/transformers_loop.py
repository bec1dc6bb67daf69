"""Train a SPLADE encoder with transformers and torch alone, and headscale's pooled head in place of the logits.

    python examples/transformers_loop.py
    python examples/transformers_loop.py --backbone answerdotai/ModernBERT-base --reference bert-base-uncased \\
        --steps 5625 --lr 2e-5 --batch-size 16 --length 256 --device cuda

Everything a loop of your own needs from headscale is here: the constant (`calibrate`), the head found in the model
(`load_head`), the pooled head that never holds [batch, seq, vocab] (`splade_pool`), an optimizer group for the untied
head. On the bundled backbone 30 steps take about ten seconds on one CPU core.
"""
# quick

from __future__ import annotations

import argparse
import math
import random
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForMaskedLM, AutoTokenizer, get_linear_schedule_with_warmup

import headscale
from headscale.head import LoadedHead, load_head
from headscale.texts import builtin_pairs


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="bundled:tiny-modernbert")
    parser.add_argument("--reference", default="bundled:tiny-bert")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--length", type=int, default=32, help="tokens, of queries and documents alike")
    parser.add_argument("--lambda-query", type=float, default=3e-3)
    parser.add_argument("--lambda-document", type=float, default=1e-3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, help="where the model goes; by default a temporary folder")
    return parser.parse_args()


def encode(head: LoadedHead, tokenizer: Any, texts: list[str], length: int) -> Tensor:
    """SPLADE vectors (batch, vocab): the model up to the head, then head, max and log1p(relu(.)) in one."""
    batch = tokenizer(texts, padding=True, truncation=True, max_length=length, return_tensors="pt")
    batch = batch.to(head.weight.device)
    hidden = head.features(**batch)  # (batch, seq, width)
    return headscale.splade_pool(hidden, head.weight, head.bias, batch["attention_mask"], scale=head.head.factor)


def flops(vectors: Tensor) -> Tensor:
    """The FLOPS regularizer of arXiv 2004.05665."""
    return vectors.mean(0).square().sum()


def main() -> None:
    given = options()
    torch.manual_seed(0)
    output = given.output or Path(mkdtemp())

    # 1. The constant goes into the checkpoint, the head's learning rate into the optimizer.
    calibration = headscale.calibrate(
        given.backbone,
        reference=given.reference,
        encoding=headscale.Encoding(given.length, given.length),
        save=output / "calibrated",
        overwrite=True,
    )
    print(*calibration.advice, sep="\n")

    # 2. An ordinary masked language model, and where its head is.
    tokenizer = AutoTokenizer.from_pretrained(output / "calibrated")
    model = AutoModelForMaskedLM.from_pretrained(output / "calibrated").to(given.device).train()
    head = load_head(model)
    own = {id(parameter) for parameter in head.parameters}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in own]
    optimizer = torch.optim.AdamW(
        [{"params": rest}, {"params": head.parameters, "lr": given.lr * calibration.head_lr_multiplier}], lr=given.lr
    )
    schedule = get_linear_schedule_with_warmup(optimizer, given.steps // 10, given.steps)

    # 3. In-batch negatives, FLOPS with a quadratic ramp over a third of the steps, clipping.
    pairs = builtin_pairs("train", packages=("stdlib", "numpy"))
    draw = random.Random(0)
    for step in range(given.steps):
        batch = draw.sample(pairs, given.batch_size)
        queries = encode(head, tokenizer, [pair.query for pair in batch], given.length)
        documents = encode(head, tokenizer, [pair.document for pair in batch], given.length)
        ranking = torch.nn.functional.cross_entropy(
            queries @ documents.T, torch.arange(len(batch), device=queries.device)
        )
        ramp = min(1.0, 3 * step / given.steps) ** 2
        regularizer = given.lambda_query * flops(queries) + given.lambda_document * flops(documents)
        (ranking + ramp * regularizer).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 5 == 0 or step == given.steps - 1:
            active = (documents > 0).sum(1).float().mean()
            over = ranking / math.log(len(batch))
            print(f"step {step}\tloss {over:.3f} ln N\tactive dims per document {active:.0f}", flush=True)

    # 4. What comes out is a checkpoint as any other; what it ranks first for the last batch's queries:
    model.eval().save_pretrained(output / "trained")
    tokenizer.save_pretrained(output / "trained")
    with torch.no_grad():
        test = builtin_pairs("test", packages=("stdlib",))[:100]
        queries = encode(head, tokenizer, [pair.query for pair in test], given.length)
        documents = encode(head, tokenizer, [pair.document for pair in test], given.length)
    first = ((queries @ documents.T).argmax(1).cpu() == torch.arange(len(test))).float().mean()
    print(f"of {len(test)} held-out queries {first:.0%} rank their document first (chance {1 / len(test):.0%})")
    print(f"saved in {output / 'trained'}")


if __name__ == "__main__":
    main()
