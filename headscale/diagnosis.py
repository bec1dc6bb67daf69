"""The verdict of `inspect`: whether a backbone's outputs are on a scale that contrastive training can start from."""

from __future__ import annotations

from headscale.records import OutputStatistics, ScaleCurve, Verdict, VocabularyStatistics

# In units of ln N. The study supports 2 to 4 (reports/study.md: tiny backbones, lr 3e-4): the reference trains
# untouched from 2.2 and collapses when its head is scaled up to 7.1 (both as measured here, at its lengths). The upper
# end, since at the default lengths the reference starts at 2.9.
LOSS_CEILING = 4.0
# Input independence: the untrained RoBERTa-likes that never trained had 0.99 and 1.0000, one that did 0.81
# (sentence-transformers issue 3431).
COSINE_CEILING = 0.99
# Softmax of scores with this sd is uniform to within about 10 %: the loss can hardly tell documents apart.
SCORE_SD_FLOOR = 0.1
# Half the texts without an active term: the typical text gets no gradient.
EMPTY_CEILING = 0.5
# One term in ten a variant of another is where the vocabulary is named as a second suspect; it decides nothing.
VARIANT_SHARE = 0.1

_BAND = (None, LOSS_CEILING)


def judge(output: OutputStatistics | None, curve: ScaleCurve | None, *, is_reference: bool = False) -> Verdict:
    """Judge the untouched outputs of a backbone.

    Args:
        output: its statistics at constant 1, or None with weights only.
        curve: the same over constants, for what no constant repairs.
        is_reference: whether this is the backbone that others are compared with.

    Returns:
        `reference`, `ok`, `too high`, `too low`, `degenerate` or `unjudged`, with value, threshold and band.
    """
    if output is None:
        return Verdict(
            "unjudged", "loss_over_ln_n", None, LOSS_CEILING, _BAND, "the weights alone do not tell the output scale"
        )
    found = _degenerate(output, curve) or _too_high(output) or _too_low(output)
    if found is not None:
        return found
    word = "reference" if is_reference else "ok"
    loss = output.loss_over_ln_n
    sentence = f"the contrastive loss starts at {loss:.3g} x ln {output.candidates}"
    return Verdict(word, "loss_over_ln_n", loss, LOSS_CEILING, _BAND, sentence)


def _degenerate(output: OutputStatistics, curve: ScaleCurve | None) -> Verdict | None:
    sides = {"queries": output.query, "documents": output.document}
    if output.non_finite:
        sentence = f"{output.non_finite} of the pooled weights are not finite"
        return Verdict("degenerate", "non_finite", float(output.non_finite), 0.0, (None, 0.0), sentence)
    worst = max(sides, key=lambda name: sides[name].empty)
    empty = sides[worst].empty
    if empty > EMPTY_CEILING:
        sentence = f"{empty:.0%} of the {worst} have no active term, which no positive factor changes"
        return Verdict("degenerate", "empty", empty, EMPTY_CEILING, (None, EMPTY_CEILING), sentence)
    cosines = [c for c in (curve.cosine if curve else (output.document.mean_cosine,)) if c is not None]
    if cosines and min(cosines) >= COSINE_CEILING:
        sentence = (
            f"unrelated documents have cosine {min(cosines):.4f} at the best of all constants: the output does not "
            "depend on the input, and no positive factor repairs that (a shift of the bias might)"
        )
        return Verdict("degenerate", "mean_cosine", min(cosines), COSINE_CEILING, (None, COSINE_CEILING), sentence)
    return None


def _too_high(output: OutputStatistics) -> Verdict | None:
    loss = output.loss_over_ln_n
    if loss <= LOSS_CEILING:
        return None
    sentence = f"the contrastive loss starts at {loss:.3g} x ln {output.candidates}, where chance is 1"
    return Verdict("too high", "loss_over_ln_n", loss, LOSS_CEILING, _BAND, sentence)


def _too_low(output: OutputStatistics) -> Verdict | None:
    if output.score_sd >= SCORE_SD_FLOOR:
        return None
    sentence = f"scores differ by {output.score_sd:.2g} (sd): the softmax over them is flat"
    return Verdict("too low", "score_sd", output.score_sd, SCORE_SD_FLOOR, (SCORE_SD_FLOOR, None), sentence)


def causes(verdict: Verdict, output: OutputStatistics | None, vocabulary: VocabularyStatistics | None) -> list[str]:
    """Which explanations the measurements support, in sentences; scale is never the only suspect.

    The rival is the vocabulary (arXiv 2607.00004); a third is an attention sink that wins the max.
    """
    found = []
    if verdict.word == "too high":
        found.append(f"scale: {verdict.evidence}; a shift of the bias or a smaller constant lowers it")
    if vocabulary is not None and vocabulary.variant_share > VARIANT_SHARE:
        found.append(
            f"vocabulary: {vocabulary.variant_share:.0%} of the terms are variants of another by case, space or "
            "punctuation, which no constant merges"
        )
    if output is not None and output.document.special_share > 0.5:
        found.append(
            f"sink: special tokens win {output.document.special_share:.0%} of the pooled mass; mask them in training"
        )
    return found
