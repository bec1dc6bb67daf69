"""`calibrate` without running a text: the constant from the tensors of two heads, and what that leaves open."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from headscale.calibration import (
    MATCH_FACTOR,
    Choice,
    advice,
    fixed_targets,
    multiplier_of,
    new_target,
    norm_targets,
    reference_value,
    written_scale,
)
from headscale.constants import ratio_text
from headscale.errors import UsageError
from headscale.records import Calibration, Inspection, LambdaAdvice, Profile, Target, Verdict
from headscale.rescaling import resolve_mode

if TYPE_CHECKING:
    from headscale.profiles import Reference

WEIGHT_MATCHES = ("auto", "norm", "constant", "width")
_UNSEEN = "the outputs were not seen"
# Over six backbones success went with the loss at step 0 (rho -.99), not with the norm (-.43; reports/study.md).
_WARNING = (
    f"{_UNSEEN}, and the norm alone told badly which backbones fail (reports/study.md): calibrate without "
    "`--weights-only` before training with this constant"
)


def check_choice(choice: Choice | None, *, saving: bool = False) -> None:
    """Refuse what the weights alone cannot give.

    Raises:
        UsageError: a target or a shift that needs outputs, or a checkpoint, whose proof needs the whole model.
    """
    choice = choice or Choice()
    wrong = []
    if choice.match not in WEIGHT_MATCHES:
        wrong.append(f"`--match {choice.match}` needs the outputs")
    if choice.shift:
        wrong.append("`--shift` needs the outputs")
    if saving:
        wrong.append("`--save` needs the whole model, to write and prove the checkpoint")
    if wrong:
        sentence = f"{'; '.join(wrong)}: `--weights-only` reads the head's tensors alone"
        raise UsageError(sentence, hint=f"leave out `--weights-only` {_instead(choice, saving)}")


def _instead(choice: Choice, saving: bool) -> str:
    if saving and choice.match in WEIGHT_MATCHES and not choice.shift:
        return f"(`--match {_match(choice)}` keeps the constant)"
    return f"or match {', '.join(WEIGHT_MATCHES[1:-1])} or {WEIGHT_MATCHES[-1]}"


def _match(choice: Choice) -> str:
    return "norm" if choice.match == "auto" else choice.match


def choose_by_weights(inspection: Inspection, reference: Reference, choice: Choice | None = None) -> Calibration:
    """Choose the constant from the weights of a backbone and those of the reference.

    Args:
        inspection: of the backbone; its outputs are not looked at.
        reference: the profile to match, and where it came from.
        choice: which target, and how; `auto` is the norm here.

    Returns:
        The constant with every target beside it. What outputs would tell (loss, activation, score, the curve, advice
        on lambda) is empty; `scale` is None where the norm cannot be matched.

    Raises:
        UsageError: a target or a shift that needs outputs.
        UnsupportedHeadError: no constant in the weights multiplies the logits.
    """
    choice = choice or Choice()
    check_choice(choice)
    resolve_mode(inspection.head, "auto")  # refuses what no constant in the weights multiplies
    targets = _targets(inspection, reference.profile, choice)
    match = _match(choice)
    chosen = next(target for target in targets if target.name == match)
    scale = written_scale(chosen, choice.snap)
    multiplier = multiplier_of(choice, scale)
    saving = f"`--match {match} --save DIR` without `--weights-only`"
    return Calibration(
        name=inspection.name,
        revision=inspection.revision,
        reference=reference.profile.name,
        reference_origin=reference.origin,
        match=match,
        match_reason="as asked" if choice.match != "auto" else "the norm decides, as the weights alone were read",
        scale=scale,
        head_lr_multiplier=multiplier,
        scale_bias=choice.scale_bias,
        shift=0.0,
        snapped=choice.snap and match != "constant",
        targets=tuple(targets),
        disagreement="",
        curve=None,
        texts=None,
        before=None,
        after=None,
        lambda_advice=LambdaAdvice(None, None),
        verdict=_verdict(chosen, scale),
        advice=() if scale is None else tuple(advice(scale, multiplier, inspection.head, saving=saving)),
        warnings=(*inspection.warnings, _WARNING),
    )


def _targets(inspection: Inspection, profile: Profile, choice: Choice) -> Sequence[Target]:
    """The same rows as with texts; those of outputs have their goal and no solution."""
    return [
        *norm_targets(inspection.weights, profile, choice),
        new_target("activation", choice.activation, reference_value(profile, choice.activation), None, _UNSEEN),
        new_target("score", choice.score, reference_value(profile, choice.score), None, _UNSEEN),
        new_target("loss", "loss_over_ln_n", choice.ceiling, None, _UNSEEN),
        *fixed_targets(inspection.head.width, choice),
    ]


def _verdict(chosen: Target, scale: float | None) -> Verdict:
    """`matched` where rounding keeps the statistic of the weights near its target, and in words that this is all."""
    band = (1 / MATCH_FACTOR, MATCH_FACTOR)
    if scale is None or chosen.scale is None:
        return Verdict("unmatched", chosen.statistic, None, chosen.target, band, chosen.note)
    ratio = scale / chosen.scale
    sentence = f"{chosen.statistic} is {ratio:.3g} times its target at {ratio_text(scale)}"
    if chosen.name != "norm":
        sentence = f"{ratio_text(scale)} was given, not matched"
    word = "matched" if band[0] <= ratio <= band[1] else "unmatched"
    return Verdict(word, chosen.statistic, ratio, 1.0, band, f"{sentence}; {_UNSEEN}")
