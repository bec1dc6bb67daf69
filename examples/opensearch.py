"""Export a calibrated document encoder for OpenSearch's inference-free trainer, with the IDF table of its queries.

    python examples/opensearch.py
    python examples/opensearch.py --backbone bert-base-uncased --reference bert-base-uncased --output calibrated

What they read, in https://github.com/zhichao-aws/opensearch-sparse-model-tuning-sample:
- `scripts/model/sparse_encoders.py`: documents are `log(1 + relu(max of logits))` of an `AutoModelForMaskedLM`, padding
  left out by -inf; queries are the IDF of the tokens in them, special tokens zeroed, and no model at all. So the
  constant scales one side of the score only. Both sides have to be of one length: the table is built with
  `tokenizer.vocab_size`, the documents with the width of the head, and a ModernBERT's head is padded beyond its
  tokenizer's vocabulary. This script says so where they differ.
- `get_idf.py`: ln(1 + (N - n + .5) / (n + .5)) from a corpus, by token, without special tokens.
- `scripts/train/trainer.py`: FLOPS of the documents with `flops_d_lambda`, a quadratic ramp over `flops_d_T` steps.
- `train_ir.py`: AdamW with a learning rate of its own for the IDF table alone.
"""
# quick

from __future__ import annotations

import json
import math
import sys

import torch
from exporting import check, expected_vectors, export, lambdas, options, texts, tokenized
from transformers import AutoModelForMaskedLM, AutoTokenizer

from headscale.diagnosis import LOSS_CEILING
from headscale.idf import idf_of
from headscale.texts import builtin_pairs

CONFIG = """
# config.yaml
inf_free: true
model_name_or_path: {directory}
tokenizer_name: {directory}
idf_path: {directory}/idf.json
use_in_batch_negatives: true
loss_types: [infonce]
flops_d_lambda: {document:.3g}
flops_d_T: 40000
learning_rate: 0.00002

{note}; queries have no regularizer."""

HEAD_LEARNING_RATE = """
The untied head trains better with {multiplier:g} times the encoder's learning rate; in `train_ir.py` give AdamW

    head = [p for n, p in model.named_parameters() if n.endswith(("decoder.weight", "decoder.bias"))]
    rest = [p for n, p in model.named_parameters() if not n.endswith(("decoder.weight", "decoder.bias"))]
    AdamW([{{"params": rest}}, {{"params": head, "lr": {multiplier:g} * lr}}], lr=lr, weight_decay=weight_decay)

Without that edit it trains with the constant alone."""


class SparseModel(torch.nn.Module):
    """Their `SparseModel`: `_encode` for documents, `_encode_inf_free` for queries."""

    def __init__(self, name: str, idf: dict[str, float]) -> None:
        super().__init__()
        self.backbone = AutoModelForMaskedLM.from_pretrained(name)
        self.tokenizer = AutoTokenizer.from_pretrained(name)
        self.special = [self.tokenizer.vocab[token] for token in self.tokenizer.special_tokens_map.values()]
        vocabulary = self.tokenizer.get_vocab()
        self.idf = torch.ones(self.tokenizer.vocab_size)
        for token, weight in idf.items():
            self.idf[vocabulary[token]] = weight

    def encode(self, **tokens: torch.Tensor) -> torch.Tensor:
        logits = self.backbone(**tokens)[0]
        logits = logits.masked_fill(tokens["attention_mask"].unsqueeze(-1) == 0, float("-inf"))
        return torch.log(1 + torch.nn.functional.elu(logits.max(dim=1).values, alpha=0.0))

    def encode_inference_free(self, input_ids: torch.Tensor) -> torch.Tensor:
        found = torch.zeros(len(input_ids), self.tokenizer.vocab_size)
        found[torch.arange(len(input_ids)).unsqueeze(-1), input_ids] = 1
        found[:, self.special] = 0
        return found * torch.relu(self.idf)


def write_idf(directory, terms: int) -> dict[str, float]:
    """As their `get_idf.py`: the tokens that the texts have, by name."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    corpus = [pair.document for pair in builtin_pairs("train", packages=("stdlib",))]
    weights = idf_of(tokenizer, corpus, terms, max_length=512).weights
    cut = tokenizer(corpus, add_special_tokens=False, truncation=True, max_length=512)
    seen = {i for ids in cut["input_ids"] for i in ids}
    table = {tokenizer.convert_ids_to_tokens(i): float(weights[i]) for i in sorted(seen) if weights[i] > 0}
    (directory / "idf.json").write_text(json.dumps(table, ensure_ascii=False), encoding="utf-8")
    return table


def main() -> None:
    given = options(__doc__ or "")
    calibration, directory = export(given)
    queries, documents = texts(32)

    terms = json.loads((directory / "config.json").read_text())["vocab_size"]
    table = write_idf(directory, terms)
    model = SparseModel(str(directory), table).eval()
    if terms != model.tokenizer.vocab_size:
        sys.exit(
            f"the head has {terms} columns and `tokenizer.vocab_size` is {model.tokenizer.vocab_size}: their queries "
            f"and documents would not meet; build `idf_vector` and `out` in `SparseModel` with {terms}"
        )
    with torch.no_grad():
        found = model.encode(**tokenized(model.tokenizer, documents))
        query = model.encode_inference_free(tokenized(model.tokenizer, queries)["input_ids"])
    check("documents", found, expected_vectors(calibration, documents))

    # The queries do not move with the constant, so the loss moves less than with two encoders.
    print("\nloss before training, over ln 32:\n  documents\tIDF queries\tthe model's own")
    labels = torch.arange(len(queries))
    losses = []
    for untouched in (True, False):
        vectors = expected_vectors(calibration, documents, untouched=untouched)
        sides = (query, expected_vectors(calibration, queries, untouched=untouched))
        losses += [torch.nn.functional.cross_entropy(q @ vectors.T, labels) / math.log(len(queries)) for q in sides]
        print(f"  {'untouched' if untouched else 'calibrated'}\t{losses[-2]:.3g}\t{losses[-1]:.3g}")
    if losses[0] <= LOSS_CEILING:
        print(f"  with IDF queries it starts below {LOSS_CEILING:g} x ln 32 untouched: try it as it is, too")

    _, document, note = lambdas(calibration, 0.0, 0.05)  # of their configs/config_infonce.yaml
    print(CONFIG.format(directory=directory, document=document, note=note))
    if calibration.head_lr_multiplier != 1:
        print(HEAD_LEARNING_RATE.format(multiplier=calibration.head_lr_multiplier))


if __name__ == "__main__":
    main()
