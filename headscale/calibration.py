"""`calibrate`: choose the constant from one forward pass, by every target side by side.

A target names a statistic and the value it should have at the constant. All of them are functions of the largest
logits that `observe` kept, so none needs another forward pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from headscale.activations import output_statistics
from headscale.constants import nearest_power_of_two, power_of_two_below, ratio_text
from headscale.diagnosis import LOSS_CEILING
from headscale.errors import UsageError
from headscale.inspection import Measured
from headscale.records import (
    Calibration,
    Head,
    LambdaAdvice,
    OutputStatistics,
    Profile,
    Target,
    Verdict,
    WeightStatistics,
)
from headscale.rescaling import resolve_mode
from headscale.solving import Shift, Solver, share_of, shift_to_share

if TYPE_CHECKING:
    from headscale.profiles import Reference

MATCHES = ("norm", "activation", "score", "loss", "constant", "width")
NORMS = ("frobenius", "row_norm_mean", "rms", "effective_norm", "spectral_norm")
ACTIVATIONS = ("mean_weight", "l1", "active_mean_weight")
SCORES = ("score_sd", "score_margin")
PAPER_K = 16.0  # arXiv 2606.18811
WIDTH_EXPONENT = -0.25  # what scaling-retriever and v-splade multiply logits by: hidden_size ** -0.25
# Rounding to a power of two moves the constant by at most sqrt(2); scores are quadratic in it, so by at most 2.
MATCH_FACTOR = 2.0
# Norm matching is trusted while it agrees with the outputs within this factor.
AGREEMENT_FACTOR = 2.0
# A masked LM's own loss does not see a constant added to all logits, so nothing pins their level; where it drifted up,
# far more terms are active than in the reference, and moving the bias back beat every constant on four backbones with 8
# to 64 times as many, and did no harm on one with 2.2 times (reports/study.md).
SHARE_FACTOR = 2.0
# Better than 1 at every constant from 1/4 to 1/256 of the failing bundled backbone, and two to four times sparser
# (reports/study.md: tiny backbones, lr 3e-4, the only value tried beside 1).
HEAD_LR_MULTIPLIER = 4.0


@dataclass(frozen=True)
class Choice:
    """How the constant is to be chosen; the defaults are those of the command line.

    Args:
        match: one of `MATCHES`, or `auto`.
        norm: which norm `norm` matches.
        activation: which statistic of the documents `activation` matches.
        score: which statistic of the in-batch scores `score` matches.
        k: the constant's inverse for `constant`.
        ceiling: c of `loss`, the largest a with L(a) <= c ln N.
        snap: round to a power of two, exact in every dtype.
        scale_bias: scale the bias with the matrix.
        shift: also move the bias so that the reference's share of active dims is met; None: for the target `auto`,
            where documents have more than `SHARE_FACTOR` times that share and the head has a bias.
        head_lr_multiplier: of the untied head's learning rate, carried with the constant; None: `HEAD_LR_MULTIPLIER`
            where the constant shrinks the head, else 1.
    """

    match: str = "auto"
    norm: str = "frobenius"
    activation: str = "mean_weight"
    score: str = "score_sd"
    k: float = PAPER_K
    ceiling: float = LOSS_CEILING
    snap: bool = True
    scale_bias: bool = True
    shift: bool | None = None
    head_lr_multiplier: float | None = None

    def __post_init__(self) -> None:
        options = {"match": ("auto", *MATCHES), "norm": NORMS, "activation": ACTIVATIONS, "score": SCORES}
        wrong = [
            f"`--{name} {getattr(self, name)}` is none of {', '.join(known)}"
            for name, known in options.items()
            if getattr(self, name) not in known
        ]
        numbers = {name: getattr(self, name) for name in ("k", "ceiling", "head_lr_multiplier")}
        numbers = {name: value for name, value in numbers.items() if value is not None}
        wrong += [
            f"`--{name.replace('_', '-')} {value}` is not a number above zero"
            for name, value in numbers.items()
            if not 0 < value < math.inf
        ]
        if wrong:
            raise UsageError("; ".join(wrong), hint="see `headscale calibrate --help`")


def choose(measured: Measured, reference: Reference, choice: Choice | None = None) -> Calibration:
    """Choose the constant for a measured backbone.

    Args:
        measured: from `headscale.inspection.measure`.
        reference: the profile to match, and where it came from.
        choice: which target, and how.

    Returns:
        The chosen constant and every target beside it; `scale` is None where the target cannot be reached.

    Raises:
        UnsupportedHeadError: no constant in the weights multiplies the logits.
        UsageError: a shift is asked for that the reference cannot give.
    """
    choice = choice or Choice()
    assert measured.seen is not None
    seen, profile = measured.seen, reference.profile
    inspection = measured.inspection
    assert inspection.texts is not None
    assert inspection.output is not None
    resolve_mode(inspection.head, "auto")  # refuses what no constant in the weights multiplies
    shifts = _too_dense(measured, profile) and choice.match == "auto" if choice.shift is None else choice.shift
    shifting: Shift = shift_to_share(seen, profile, scale_bias=choice.scale_bias) if shifts else lambda _: 0.0
    solver = Solver(seen, shifting, scale_bias=choice.scale_bias)
    targets = _targets(solver, inspection.weights, inspection.head.width, profile, choice)
    match, reason, disagreement = _pick(targets, choice, solver.curve.scale[-1], shifted=shifts)
    chosen = next(t for t in targets if t.name == match)
    scale = written_scale(chosen, choice.snap)
    if scale is not None and scale > 1 and choice.match == "auto" and match == "loss":
        scale = 1.0
        reason = reason if shifts else "the loss is within its ceiling untouched, so the head is left as it is"
    multiplier = multiplier_of(choice, scale)
    shift = 0.0 if scale is None else solver.shift(scale)
    after = None
    if scale is not None:
        after = output_statistics(seen, scale, scale_bias=choice.scale_bias, shift=shift, token=_token_names(measured))
    return Calibration(
        name=inspection.name,
        revision=inspection.revision,
        reference=profile.name,
        reference_origin=reference.origin,
        match=match,
        match_reason=reason,
        scale=scale,
        head_lr_multiplier=multiplier,
        scale_bias=choice.scale_bias,
        shift=shift,
        snapped=choice.snap and match != "constant",
        targets=tuple(targets),
        disagreement=disagreement,
        curve=solver.curve,
        texts=inspection.texts,
        before=inspection.output,
        after=after,
        lambda_advice=_lambda_advice(inspection.output, None if shift else after),  # shifted: as for the reference
        verdict=_verdict(chosen, scale, solver, choice),
        advice=() if scale is None else tuple(advice(scale, multiplier, inspection.head, shift=shift)),
        warnings=(*inspection.warnings, *_text_warning(inspection.texts, profile)),
    )


def _too_dense(measured: Measured, profile: Profile) -> bool:
    """Whether documents have far more active terms than the reference's, and a shift could change that."""
    own = measured.inspection.output
    if own is None or profile.output is None or measured.inspection.head.bias is None:
        return False
    share = share_of(profile)
    return 0 < SHARE_FACTOR * share < own.document.active_dims / measured.inspection.head.vocab_size


def multiplier_of(choice: Choice, scale: float | None) -> float:
    """Of the head's learning rate: as asked, or what goes with a head that shrinks."""
    if choice.head_lr_multiplier is not None:
        return choice.head_lr_multiplier
    return HEAD_LR_MULTIPLIER if scale is not None and scale < 1 else 1.0


def _token_names(measured: Measured) -> Callable[[int], str]:
    from headscale.vocabulary import tokenizer_vocabulary

    if measured.backbone is None or measured.backbone.tokenizer is None:
        return str
    tokens = tokenizer_vocabulary(measured.backbone.tokenizer, measured.inspection.head.vocab_size).tokens
    return tokens.__getitem__


# --- the targets ---------------------------------------------------------------------------------------------------


def _targets(solver: Solver, weights: WeightStatistics, width: int, profile: Profile, choice: Choice) -> list[Target]:
    found = norm_targets(weights, profile, choice)
    found.append(_output_target(solver, profile, "activation", choice.activation))
    found.append(_output_target(solver, profile, "score", choice.score))
    found.append(_loss_target(solver, choice.ceiling))
    found += fixed_targets(width, choice)
    return [_completed(target, solver, choice.snap) for target in found]


def norm_targets(weights: WeightStatistics, profile: Profile, choice: Choice) -> list[Target]:
    """The norm that was asked for, then every other that both sides know."""
    others = [
        _norm_target(weights, profile, name, f"norm:{name}")
        for name in NORMS
        if name != choice.norm and getattr(weights, name) is not None and getattr(profile.weights, name) is not None
    ]
    return [_norm_target(weights, profile, choice.norm, "norm"), *others]


def fixed_targets(width: int, choice: Choice) -> list[Target]:
    """The targets that look at no tensor: a given constant, and the one that the width asks for."""
    by_width = float(width**WIDTH_EXPONENT)
    return [
        new_target("constant", "k", choice.k, 1 / choice.k),
        new_target("width", "width", float(width), by_width, "depends on the width alone"),
    ]


def new_target(name: str, statistic: str, goal: float | None, scale: float | None, note: str = "") -> Target:
    """A target with its nearest power of two, before it is known what the constant leads to."""
    snapped = None if scale is None else nearest_power_of_two(scale)
    return Target(name, statistic, goal, scale, snapped, None, None, None, note)


def _norm_target(weights: WeightStatistics, profile: Profile, statistic: str, name: str) -> Target:
    goal, own = getattr(profile.weights, statistic), getattr(weights, statistic)
    if goal is None or own is None:
        whose = "the reference" if goal is None else "this backbone"
        return new_target(
            name, statistic, goal, None, f"the {statistic} of {whose} was not measured: `--spectral` adds it"
        )
    if not (0 < own < math.inf and 0 < goal < math.inf):
        return new_target(name, statistic, goal, None, "a norm of zero cannot be matched")
    return new_target(name, statistic, goal, goal / own)


def _output_target(solver: Solver, profile: Profile, name: str, statistic: str) -> Target:
    goal = reference_value(profile, statistic)
    if goal is None:
        return new_target(name, statistic, None, None, "only the weights of the reference are known")
    scale, note = solver.solve(statistic, goal)
    return new_target(name, statistic, goal, scale, note)


def reference_value(profile: Profile, statistic: str) -> float | None:
    """A statistic of the reference's outputs; None where only its weights are known."""
    if profile.output is None:
        return None
    holder = profile.output if statistic in SCORES else profile.output.document
    return float(getattr(holder, statistic))


def _loss_target(solver: Solver, ceiling: float) -> Target:
    scale, note = solver.solve("loss_over_ln_n", ceiling, largest=True)
    lowest = f"the loss is lowest at {ratio_text(solver.lowest_loss())}"
    target = new_target("loss", "loss_over_ln_n", ceiling, scale, f"{note}; {lowest}".strip("; "))
    return replace(target, snapped=None if scale is None else power_of_two_below(scale))


def _completed(target: Target, solver: Solver, snap: bool) -> Target:
    """The target with what the constant that would be written leads to."""
    scale = written_scale(target, snap)
    if scale is None:
        return target
    point = solver.at(scale)
    return replace(
        target,
        loss_over_ln_n=point["loss_over_ln_n"],
        active_mean_weight=point["active_mean_weight"],
        score_sd=point["score_sd"],
    )


def written_scale(target: Target, snap: bool) -> float | None:
    """The constant that goes into the weights: a power of two unless it was given or is to be kept."""
    return target.snapped if snap and target.name != "constant" else target.scale


def _pick(targets: Sequence[Target], choice: Choice, limit: float, *, shifted: bool) -> tuple[str, str, str]:
    """The target to use, why, and how far the targets disagree, in words; `limit` is the largest constant tried."""
    by_name = {t.name: t for t in targets}
    disagreement = _disagreement(by_name)
    if choice.match != "auto":
        return choice.match, "as asked", disagreement
    norm, loss = by_name["norm"].scale, by_name["loss"].scale
    if shifted and loss is not None:
        reason = "the shift meets the reference's active dims, which no norm sees, so the loss decides"
        return "loss", reason, disagreement
    outputs = [by_name[name].scale for name in ("activation", "score", "loss")]
    bounds = [scale for scale in outputs if scale is not None and scale != limit]  # at the limit it binds nothing
    if norm is None and loss is None:
        return "norm", "neither norm nor loss can be reached", disagreement
    if norm is None or loss is None:
        usable, other = ("loss", "norm") if loss is not None else ("norm", "loss")
        return usable, f"{other} cannot be reached, so {usable} decides", disagreement
    factor = max((max(norm / scale, scale / norm) for scale in bounds), default=math.inf)
    if factor <= AGREEMENT_FACTOR:
        return "norm", f"the norm agrees with the outputs within a factor of {factor:.2g}", disagreement
    if not bounds:
        return "loss", "no output sets a bound, so the loss decides", disagreement
    return (
        "loss",
        f"the norm is off from the outputs by up to a factor of {factor:.3g}, so the loss decides",
        disagreement,
    )


def _disagreement(by_name: dict[str, Target]) -> str:
    """A sentence when measured targets differ by more than the agreement factor."""
    measured = {n: by_name[n].scale for n in ("norm", "activation", "score", "loss") if n in by_name}
    known = {name: scale for name, scale in measured.items() if scale}
    if len(known) < 2:
        return ""
    low, high = min(known, key=lambda n: known[n] or 0.0), max(known, key=lambda n: known[n] or 0.0)
    factor = (known[high] or 0.0) / (known[low] or 1.0)
    if factor <= AGREEMENT_FACTOR:
        return ""
    return (
        f"the targets disagree by a factor of {factor:.3g}: `{low}` asks for {ratio_text(known[low] or 0.0)} and "
        f"`{high}` for {ratio_text(known[high] or 0.0)}; equal norms do not mean equal outputs"
    )


def _verdict(chosen: Target, scale: float | None, solver: Solver, choice: Choice) -> Verdict:
    """`matched` where the written constant keeps the statistic within what a rounded constant can move it."""
    band = (1 / MATCH_FACTOR, MATCH_FACTOR)
    if scale is None:
        return Verdict("unmatched", chosen.statistic, None, chosen.target, band, chosen.note)
    ratio = _ratio_to_target(chosen, scale, solver, choice)
    good = ratio <= MATCH_FACTOR if chosen.name == "loss" else band[0] <= ratio <= band[1]
    sentence = f"{chosen.statistic} is {ratio:.3g} times its target at {ratio_text(scale)}"
    if chosen.name in ("constant", "width"):
        sentence = f"{ratio_text(scale)} was given, not matched"
    return Verdict("matched" if good else "unmatched", chosen.statistic, ratio, 1.0, band, sentence)


def _ratio_to_target(chosen: Target, scale: float, solver: Solver, choice: Choice) -> float:
    if chosen.scale is None or chosen.target is None:
        return math.inf
    if chosen.statistic in NORMS or chosen.name in ("constant", "width"):
        return scale / chosen.scale
    return float(solver.at(scale)[chosen.statistic]) / chosen.target


# --- what goes with the constant -----------------------------------------------------------------------------------


def _lambda_advice(before: OutputStatistics, after: OutputStatistics | None) -> LambdaAdvice:
    if after is None:
        return LambdaAdvice(None, None)
    return LambdaAdvice(
        query=_over(before.query.flops_reg, after.query.flops_reg),
        document=_over(before.document.flops_reg, after.document.flops_reg),
    )


def _over(a: float, b: float) -> float | None:
    return a / b if b > 0 and a > 0 else None


def _text_warning(texts: Any, profile: Profile) -> list[str]:
    if profile.texts is None or profile.texts == texts:
        return []
    return [f"the profile of `{profile.name}` was measured on other texts or lengths; its outputs compare roughly"]


def advice(
    scale: float, head_lr_multiplier: float, head: Head, *, shift: float = 0.0, saving: str = "`--save DIR`"
) -> list[str]:
    """How to use the constant, the head's learning rate and the shift: lines for a person to read."""
    steps = [f"add {shift:.4g} to the vocabulary bias"] if shift else []
    steps += [f"multiply the MLM head by {ratio_text(scale)}"] if scale != 1 or not shift else []
    lines = [f"{', then '.join(steps)} before training; {saving} writes that checkpoint"]
    if head_lr_multiplier == 1.0:
        return [*lines, "train the head at the encoder's learning rate"]
    # Untied, a bias with two names is live under the one that goes with the matrix.
    biases = () if head.bias is None else (head.bias, f"{head.matrix[0].removesuffix('.weight')}.bias")
    names = "|".join(name.replace(".", r"\.") for name in dict.fromkeys((*head.matrix, *biases)))
    return [
        *lines,
        f"train the untied head at {head_lr_multiplier:g} x the encoder's learning rate LR",
        f'in sentence-transformers: `learning_rate_mapping={{r"({names})$": {head_lr_multiplier:g} * LR}}` in the '
        "training arguments",
        f"in a plain loop: an optimizer group of its own for the parameters matching `({names})$`",
    ]
