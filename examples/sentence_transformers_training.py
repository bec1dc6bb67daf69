"""Calibrate a backbone, then train it as a SPLADE encoder with sentence-transformers, watched by headscale.

    python examples/sentence_transformers_training.py                # the bundled failing backbone, calibrated
    python examples/sentence_transformers_training.py --untouched    # as it is: the callback stops it (exit 10)
    python examples/sentence_transformers_training.py --backbone answerdotai/ModernBERT-base \\
        --reference bert-base-uncased --steps 5625 --lr 2e-5 --batch-size 16 --length 256

Needs the extra `st`. On the bundled backbone 100 steps take about a minute on one CPU core. The run is kept in
`headscale-runs`, where `headscale report` finds it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from tempfile import mkdtemp

from datasets import Dataset
from sentence_transformers import SparseEncoder, SparseEncoderTrainer, SparseEncoderTrainingArguments
from sentence_transformers.sparse_encoder.evaluation import SparseInformationRetrievalEvaluator
from sentence_transformers.sparse_encoder.losses import SparseMultipleNegativesRankingLoss, SpladeLoss

import headscale
from headscale.interop.callback import HeadscaleCallback
from headscale.texts import builtin_pairs

PACKAGES = ("stdlib", "numpy", "pandas", "scipy")  # whose docstrings are the texts
STOPPED = 10  # exit code of a run that the callback has ended
HEAD = r"(decoder\.weight|decoder\.bias|predictions\.bias)$"  # the untied head of BERT, ModernBERT and their likes


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="bundled:tiny-modernbert")
    parser.add_argument("--reference", default="bundled:tiny-bert")
    parser.add_argument("--untouched", action="store_true", help="train the backbone as it is")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--length", type=int, default=48, help="tokens, of queries and documents alike")
    parser.add_argument("--lambda-query", type=float, default=3e-3)
    parser.add_argument("--lambda-document", type=float, default=1e-3)
    parser.add_argument("--scale-lambda", action="store_true", help="multiply both by calibrate's advice")
    parser.add_argument("--run", type=Path, default=Path("headscale-runs"))
    parser.add_argument("--track", choices=("tensorboard", "wandb", "trackio"))
    parser.add_argument("--output", type=Path, help="where the model goes; by default a temporary folder")
    return parser.parse_args()


def main() -> None:
    given = options()
    output = given.output or Path(mkdtemp())

    # 1. The constant, and the head's learning rate that goes with it, at the lengths of the training.
    calibration = headscale.calibrate(
        given.backbone,
        reference=given.reference,
        encoding=headscale.Encoding(given.length, given.length),
        save=None if given.untouched else output / "calibrated",
        overwrite=True,
    )
    print(*calibration.advice, sep="\n")

    # 2. The model: a calibrated directory is an ordinary checkpoint of a masked language model.
    if given.untouched:
        model = SparseEncoder(str(backbone_path(given.backbone)), device="cpu")
    else:
        model = SparseEncoder(str(output / "calibrated"), device="cpu")
    model.max_seq_length = given.length

    # 3. The data: one column of queries, one of the documents that answer them.
    train = builtin_pairs("train", packages=PACKAGES)
    pairs = Dataset.from_dict({"query": [p.query for p in train], "document": [p.document for p in train]})

    # 4. The loss. After a rescale lambda means something else: see docs/lambda.md for when to take the advice.
    advice = calibration.lambda_advice
    factors = (advice.query or 1.0, advice.document or 1.0) if given.scale_lambda else (1.0, 1.0)
    loss = SpladeLoss(
        model,
        SparseMultipleNegativesRankingLoss(model),
        document_regularizer_weight=given.lambda_document * factors[1],
        query_regularizer_weight=given.lambda_query * factors[0],
    )

    # 5. The run, with its own learning rate for the untied head, watched at every step.
    multiplier = 1.0 if given.untouched else calibration.head_lr_multiplier
    head_lr = {HEAD: multiplier * given.lr} if multiplier != 1 else {}
    arguments = SparseEncoderTrainingArguments(
        output_dir=str(output / "trainer"),
        max_steps=given.steps,
        per_device_train_batch_size=given.batch_size,
        learning_rate=given.lr,
        learning_rate_mapping=head_lr,
        weight_decay=0.01,
        warmup_steps=given.steps // 10,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        dataloader_drop_last=True,
    )
    watch = HeadscaleCallback(
        loss,
        run=given.run,
        name=f"{given.backbone}, {'untouched' if given.untouched else 'calibrated'}",
        stop_on={"collapsed", "diverged"},
        on_step=tell,
        track=given.track,
    )
    with watch:
        SparseEncoderTrainer(model, arguments, pairs, loss=loss, callbacks=[watch]).train()
    assert watch.verdict is not None
    print(f"after {len(watch.steps)} of {given.steps} steps: {watch.verdict.word}: {watch.verdict.evidence}")
    print(f"kept in {watch.folder}")

    # 6. What came of it, on held-out pairs, with their own evaluator.
    if len(watch.steps) < given.steps:
        print("stopped: such a run is not worth its remaining steps")
        sys.exit(STOPPED)
    test = builtin_pairs("test", packages=PACKAGES)[:500]
    evaluator = SparseInformationRetrievalEvaluator(
        queries={str(i): pair.query for i, pair in enumerate(test)},
        corpus={str(i): pair.document for i, pair in enumerate(test)},
        relevant_docs={str(i): {str(i)} for i in range(len(test))},
        mrr_at_k=[10], ndcg_at_k=[10], accuracy_at_k=[1], precision_recall_at_k=[10], map_at_k=[10],
    )  # fmt: skip
    found = evaluator(model)
    for name in ("dot_mrr@10", "query_active_dims", "corpus_active_dims"):
        print(f"{name}\t{found[name]:.4g}")
    model.save_pretrained(str(output / "trained"))
    trained = headscale.inspect(str(output / "trained"), weights_only=True)
    print(f"saved in {output / 'trained'}; its head has norm {trained.weights.frobenius:.4g}")


def backbone_path(name: str) -> str | Path:
    """A bundled backbone's directory; any other name is one that sentence-transformers knows."""
    from headscale import bundled

    return bundled.path(name) if bundled.is_bundled(name) else name


def tell(record, verdict) -> None:
    if record.step % 10 == 0:
        print(
            f"step {record.step}: loss {record.loss_over_ln_n:.3g} ln N, {record.active_dims_query:.0f} / "
            f"{record.active_dims_document:.0f} active dims, score sd {record.score_sd:.3g}, {verdict.word}",
            flush=True,
        )


if __name__ == "__main__":
    main()
