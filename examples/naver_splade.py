"""Export a calibrated checkpoint for naver/splade, open it with their lines, and print the configuration it needs.

    python examples/naver_splade.py
    python examples/naver_splade.py --backbone bert-base-uncased --reference bert-base-uncased --output calibrated

What they read, in https://github.com/naver/splade:
- `splade/models/transformer_rep.py`: `AutoModelForMaskedLM` and `AutoTokenizer` from `init_dict.model_type_or_dir`,
  then `max(log(1 + relu(logits)) * mask)` over the positions; nothing there multiplies a logit, so constant and
  shift have to be in the weights.
- `setup.py`: transformers 4.18.0, which knows no safetensors and no ModernBERT. A BERT-like backbone is read from
  `pytorch_model.bin`, which this script writes too; for a ModernBERT raise their pin to 4.48 or later.
- `splade/train.py` and `optim/bert_optim.py`: AdamW with one learning rate for all parameters.
"""
# quick

from __future__ import annotations

import torch
from exporting import check, expected_vectors, export, lambdas, options, texts, tokenized
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM, AutoTokenizer

CONFIG = """
# conf/train/model/calibrated.yaml
# @package _global_

init_dict:
  model_type_or_dir: {directory}
  model_type_or_dir_q: null
  freeze_d_model: 0
  agg: max
  fp16: true
config:
  tokenizer_type: {directory}

# in conf/config_splade++_max.yaml: `- train/model: calibrated`, and
config:
  regularizer:
    FLOPS:
      lambda_q: {query:.3g}
      lambda_d: {document:.3g}
      T: 50000

{note}."""

HEAD_LEARNING_RATE = """
Their optimizer has one learning rate, and the untied head trains better with {multiplier:g} times the encoder's: where
`optim/bert_optim.py` builds AdamW, give it

    head = [p for n, p in model.named_parameters() if n.endswith(("decoder.weight", "decoder.bias"))]
    rest = [p for n, p in model.named_parameters() if not n.endswith(("decoder.weight", "decoder.bias"))]
    AdamW([{{"params": rest}}, {{"params": head, "lr": {multiplier:g} * lr}}], lr=lr, weight_decay=weight_decay)

Without that edit it trains with the constant alone."""


def splade_max(logits: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """`Splade.encode` with `agg: max`."""
    return torch.max(torch.log(1 + torch.relu(logits)) * attention_mask.unsqueeze(-1), dim=1).values


def main() -> None:
    given = options(__doc__ or "")
    calibration, directory = export(given)
    torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")

    # Their `TransformerRep`, on what their pinned transformers and a later one read.
    tokenizer = AutoTokenizer.from_pretrained(directory)
    documents = texts()[1]
    tokens = tokenized(tokenizer, documents)
    expected = expected_vectors(calibration, documents)
    for safetensors in (True, False):
        model = AutoModelForMaskedLM.from_pretrained(directory, use_safetensors=safetensors).eval()
        with torch.no_grad():
            found = splade_max(model(**tokens)["logits"], tokens["attention_mask"])
        check("model.safetensors" if safetensors else "pytorch_model.bin", found, expected)

    query, document, note = lambdas(calibration, 3e-4, 1e-4)  # of their config_splade++_max.yaml
    print(CONFIG.format(directory=directory, query=query, document=document, note=note))
    if calibration.head_lr_multiplier != 1:
        print(HEAD_LEARNING_RATE.format(multiplier=calibration.head_lr_multiplier))


if __name__ == "__main__":
    main()
