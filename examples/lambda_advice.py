"""Check the advice for lambda after a rescale by a run: docs/lambda.md has the derivation, and what came out.

    python examples/lambda_advice.py                          # tiny-bert and 1/4, which trains with and without it
    python examples/lambda_advice.py --backbone bundled:tiny-modernbert --scale 1/32

Trains four arms from the same seed: untouched; scaled with lambda as it was; with lambda times the advice, so that the
weighted regularizer starts where it did; and with lambda so that its share of the loss starts where it did. Leaves
with 1 if the second of these promises is off by more than the tolerance on the first batch of the training, whose
texts the advice has not seen.
"""

from __future__ import annotations

import argparse
import sys
from fractions import Fraction

import headscale
from headscale.backbone import load_backbone
from headscale.calibration import Choice
from headscale.demo import demo_config
from headscale.texts import builtin_pairs
from headscale.training import TrainingConfig, train

PACKAGES = ("stdlib", "numpy", "pandas", "scipy")
TOLERANCE = 0.05  # a batch of 32 against the advice's own texts: at most 0.9 % on the bundled backbones, seed 0


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="bundled:tiny-bert")
    parser.add_argument("--scale", type=Fraction, default=Fraction(1, 4))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--head-lr-multiplier", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    given = options()
    scale = float(given.scale)
    base = demo_config(given.seed).replace(steps=given.steps)  # batch 32, 16 and 48 tokens, lr 3e-4, lambda 3e-3 / 1e-3

    # 1. What calibrate says, from built-in pairs that the training does not have.
    found = headscale.calibrate(
        given.backbone,
        reference="bundled:tiny-bert",
        choice=Choice(match="constant", k=1 / scale, snap=False),
        encoding=headscale.Encoding(base.query_length, base.document_length),
    )
    assert found.after is not None
    factors = {"query": found.lambda_advice.query, "document": found.lambda_advice.document}
    loss = found.after.loss / found.before.loss  # how much smaller the contrastive loss starts
    print(f"{given.backbone} x {given.scale}: lambda x {factors['query']:.4g} (query), x {factors['document']:.4g}")
    print(f"a^-2 would be {scale**-2:.4g}; the contrastive loss starts {loss:.3g} times as high\n")

    # 2. The arms.
    scaled = {"scale": scale, "mode": "untie", "head_lr_multiplier": given.head_lr_multiplier}
    arms = {
        "untouched": base,
        "scaled, lambda": base.replace(**scaled),
        "scaled, lambda x advice": with_lambdas(base.replace(**scaled), factors, 1.0),
        "scaled, same share": with_lambdas(base.replace(**scaled), factors, loss),
    }
    pairs = builtin_pairs("train", packages=PACKAGES)
    test = builtin_pairs("test", packages=PACKAGES)[:500]
    backbone = load_backbone(given.backbone)
    start: dict[str, list[float]] = {}
    print("arm\tweighted reg. at step 0\tits share\tshare at the end\tactive q\tactive d\tMRR@10")
    for name, config in arms.items():
        run = train(backbone.model, backbone.tokenizer, pairs, config, evaluation=test)
        first, tail = run.steps[0], run.end.tail
        # Lambda ramps up from 0; what is compared is the weight it has once the ramp is over.
        start[name] = [config.lambda_query * first.reg_query, config.lambda_document * first.reg_document]
        share = sum(start[name]) / (first.ranking_loss + sum(start[name]))
        print(
            f"{name}\t{sum(start[name]):.4g}\t{share:.3f}\t{tail['regularizer_share']:.3f}\t"
            f"{tail['active_dims_query']:.0f}\t{tail['active_dims_document']:.0f}\t{run.end.ranking.mrr_at_10:.3f}",
            flush=True,
        )

    # 3. The promise.
    pairs_of = zip(start["scaled, lambda x advice"], start["untouched"], strict=True)
    errors = [advised / untouched - 1 for advised, untouched in pairs_of]
    print(f"\nwith the advice the regularizers of the first batch are {errors[0]:+.1%} and {errors[1]:+.1%} off")
    if max(map(abs, errors)) > TOLERANCE:
        sys.exit(f"that is more than {TOLERANCE:.0%}")


def with_lambdas(config: TrainingConfig, factors: dict[str, float], times: float) -> TrainingConfig:
    return config.replace(
        lambda_query=config.lambda_query * factors["query"] * times,
        lambda_document=config.lambda_document * factors["document"] * times,
    )


if __name__ == "__main__":
    main()
