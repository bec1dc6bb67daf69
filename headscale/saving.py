"""Keep a model that a trial has trained, as a checkpoint that loads elsewhere, and prove that it does."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headscale import __version__
from headscale.errors import HeadscaleError, UsageError
from headscale.staging import check_empty, staged

if TYPE_CHECKING:
    from headscale.recipes import TrainingConfig

# Single precision through a file and back is exact; what remains is the order of sums in another process's kernels.
_TOLERANCE = 1e-6
_TEXTS = ("what is measured here", "The norm of a head, and what it does to the scores of a sparse retriever.")


def check_savable(mode: str, target: Path) -> None:
    """Refuse, before anything is trained, what could not be kept.

    Raises:
        UsageError: the constant is not in the weights, or the folder holds something.
    """
    if mode == "logits":
        raise UsageError("`--mode logits` keeps the constant out of the weights", "save with `--mode untie` or `fold`")
    check_empty(target, "--save-model")


def save_trained(
    model: Any, tokenizer: Any, target: Path, config: TrainingConfig, *, texts: Sequence[str] = _TEXTS
) -> float:
    """Write a trained model and its tokenizer, whole or not at all, and load them again.

    Args:
        model: as training left it; its head may be tied or not.
        tokenizer: the model's.
        target: a folder that is empty or new.
        config: of the training, kept in `headscale.json`.
        texts: encoded by both models.

    Returns:
        The largest difference between the representations of the two, relative to the largest weight.

    Raises:
        HeadscaleError: it cannot be written, or what was written does not encode the same.
    """
    from headscale.backbone import load_backbone
    from headscale.encoder import SpladeEncoder
    from headscale.head import load_head

    nbytes = sum(p.numel() * p.element_size() for p in model.parameters())
    with staged(target, nbytes) as stage:
        model.save_pretrained(stage)
        tokenizer.save_pretrained(stage)
        kept = {"schema": "headscale.trained/1", "headscale": __version__, "scale": config.scale, "mode": config.mode}
        content = {**kept, "training": config.to_dict()}
        (stage / "headscale.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        again = load_backbone(stage)
        encoders = [SpladeEncoder(load_head(model), tokenizer), SpladeEncoder(again.loaded, again.tokenizer)]
        before, after = (encoder.encode(texts, max_length=config.document_length) for encoder in encoders)
        error = float((before - after).abs().max() / before.abs().max().clamp(min=1e-12))
        if not error <= _TOLERANCE:
            raise HeadscaleError(
                f"the saved model does not encode as the trained one: it differs by {error:.1e} of the largest weight",
                "train with `--mode fold`, which leaves the head tied, and report this",
            )
    return error
