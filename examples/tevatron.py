"""Export a calibrated checkpoint for Tevatron, open it with their lines, and print the command that trains it.

    python examples/tevatron.py
    python examples/tevatron.py --backbone answerdotai/ModernBERT-base --reference bert-base-uncased --output calibrated

What they read, in https://github.com/texttron/tevatron:
- `src/tevatron/retriever/modeling/encoder.py`: `SpladeModel.build` is `AutoModelForMaskedLM.from_pretrained`, and the
  scores are divided by `--temperature`.
- `src/tevatron/retriever/modeling/splade.py`: `max(log(1 + relu(logits)) * mask)` over the positions, for queries and
  passages alike; special tokens take part.
- `examples/splade/train_splade.py`: FLOPS with `--q_flops_loss_factor` and `--p_flops_loss_factor` from the first step
  on, without a ramp; under DDP both are multiplied by the number of processes. (The trainer in
  `src/tevatron/retriever/splade_trainer.py` has a ramp, and is for decoders.)
- The optimizer is the transformers Trainer's: one learning rate for all parameters.
"""
# quick

from __future__ import annotations

import math

import torch
from exporting import check, expected_vectors, export, lambdas, options, texts, tokenized
from transformers import AutoModelForMaskedLM, AutoTokenizer

COMMAND = """
python examples/splade/train_splade.py \\
  --model_name_or_path {directory} \\
  --tokenizer_name {directory} \\
  --output_dir model_splade --dataset_name Tevatron/msmarco-passage --do_train \\
  --per_device_train_batch_size 8 --train_group_size 8 --learning_rate 5e-6 --num_train_epochs 3 \\
  --q_flops_loss_factor {query:.3g} --p_flops_loss_factor {passage:.3g}

{note}.
On several GPUs divide both factors by their number, to keep the weight of one. Leave --temperature at 1: the constant
has taken its place."""

HEAD_LEARNING_RATE = """
The untied head trains better with {multiplier:g} times the encoder's learning rate. The Trainer has no option for that:

    class Trainer(SpladeTrainer):
        def create_optimizer(self, *given):
            named = list(self.model.named_parameters())
            head = [p for n, p in named if n.endswith(("decoder.weight", "decoder.bias"))]
            rest = [p for n, p in named if not n.endswith(("decoder.weight", "decoder.bias"))]
            groups = [{{"params": rest}}, {{"params": head, "lr": {multiplier:g} * self.args.learning_rate}}]
            self.optimizer = torch.optim.AdamW(groups, lr=self.args.learning_rate, weight_decay=self.args.weight_decay)
            return self.optimizer

Without it the run trains with the constant alone."""


class SpladeModel(torch.nn.Module):
    """Their `SpladeModel` in its parts: `build`, `encode_query`, `compute_similarity`."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.encoder = AutoModelForMaskedLM.from_pretrained(name)

    def encode_query(self, query: dict[str, torch.Tensor]) -> torch.Tensor:
        logits = self.encoder(**query, return_dict=True).logits
        weights = torch.log(1 + torch.relu(logits)) * query["attention_mask"].unsqueeze(-1)
        return torch.max(weights, dim=1)[0]


def main() -> None:
    given = options(__doc__ or "")
    calibration, directory = export(given)
    queries, passages = texts()

    tokenizer = AutoTokenizer.from_pretrained(str(directory))
    tokenizer.padding_side = "right"
    model = SpladeModel(str(directory)).eval()
    with torch.no_grad():
        found = [model.encode_query(tokenized(tokenizer, side)) for side in (queries, passages)]
    for what, vectors, side in zip(("queries", "passages"), found, (queries, passages), strict=True):
        check(what, vectors, expected_vectors(calibration, side))
    scores = found[0] @ found[1].T
    loss = torch.nn.functional.cross_entropy(scores, torch.arange(len(scores)))
    chance = math.log(len(scores))
    print(f"their loss over {len(scores)} passages before training: {loss:.3g} (chance {chance:.3g})")

    query, passage, note = lambdas(calibration, 0.01, 0.01)  # of their examples/splade/README.md
    print(COMMAND.format(directory=directory, query=query, passage=passage, note=note))
    if calibration.head_lr_multiplier != 1:
        print(HEAD_LEARNING_RATE.format(multiplier=calibration.head_lr_multiplier))


if __name__ == "__main__":
    main()
