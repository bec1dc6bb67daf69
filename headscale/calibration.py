"""`calibrate`: choose the constant from one forward pass, by every target side by side.

A target names a statistic and the value it should have at the constant. All of them are functions of the largest
logits that `observe` kept, so none needs another forward pass.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from headscale.activations import Observation, curve_point, only_active, output_statistics, scale_curve
from headscale.diagnosis import LOSS_CEILING
from headscale.errors import UsageError
from headscale.inspection import CURVE_SCALES, Measured
from headscale.records import (
    Calibration,
    Head,
    LambdaAdvice,
    Profile,
    ScaleCurve,
    Target,
    Verdict,
    WeightStatistics,
)

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
_ROOT_TOLERANCE = 1e-6  # in log2 of the constant


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
        shift: also move the bias so that the reference's share of active dims is met.
        head_lr_multiplier: of the head's learning rate, carried with the constant.
    """

    match: str = "auto"
    norm: str = "frobenius"
    activation: str = "mean_weight"
    score: str = "score_sd"
    k: float = PAPER_K
    ceiling: float = LOSS_CEILING
    snap: bool = True
    scale_bias: bool = True
    shift: bool = False
    head_lr_multiplier: float = 1.0

    def __post_init__(self) -> None:
        options = {"match": ("auto", *MATCHES), "norm": NORMS, "activation": ACTIVATIONS, "score": SCORES}
        wrong = [
            f"`--{name} {getattr(self, name)}` is none of {', '.join(known)}"
            for name, known in options.items()
            if getattr(self, name) not in known
        ]
        wrong += [f"`--{n} {getattr(self, n)}` is not above zero" for n in ("k", "ceiling") if not getattr(self, n) > 0]
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
    """
    choice = choice or Choice()
    assert measured.seen is not None
    seen, profile = measured.seen, reference.profile
    inspection = measured.inspection
    assert inspection.texts is not None
    assert inspection.output is not None
    shift = _shift(seen, profile) if choice.shift else 0.0
    solver = _Solver(seen, choice, shift)
    targets = _targets(solver, inspection.weights, inspection.head.width, profile, choice)
    match, reason, disagreement = _pick(targets, choice)
    chosen = next(t for t in targets if t.name == match)
    scale = chosen.snapped if choice.snap and match != "constant" else chosen.scale
    after = None
    if scale is not None:
        after = output_statistics(seen, scale, scale_bias=choice.scale_bias, shift=shift)
        after = replace(after, common_terms=inspection.output.common_terms)
    return Calibration(
        name=inspection.name,
        revision=inspection.revision,
        reference=profile.name,
        reference_origin=reference.origin,
        match=match,
        match_reason=reason,
        scale=scale,
        head_lr_multiplier=choice.head_lr_multiplier,
        scale_bias=choice.scale_bias,
        shift=shift,
        snapped=choice.snap and match != "constant",
        targets=tuple(targets),
        disagreement=disagreement,
        curve=solver.curve,
        texts=inspection.texts,
        before=inspection.output,
        after=after,
        lambda_advice=_lambda_advice(solver, scale),
        verdict=_verdict(chosen, scale, solver, choice),
        advice=() if scale is None else tuple(advice(scale, choice.head_lr_multiplier, inspection.head)),
        warnings=(*inspection.warnings, *_text_warning(inspection.texts, profile)),
    )


# --- solving -------------------------------------------------------------------------------------------------------


class _Solver:
    """The statistics over constants of one observation, solved for a value."""

    def __init__(self, seen: Observation, choice: Choice, shift: float) -> None:
        self.choice = choice
        self.shift = shift
        self.seen = only_active(seen, shift) if choice.scale_bias else seen
        self.vocab = seen.query.largest.shape[1]
        self.curve: ScaleCurve = scale_curve(seen, CURVE_SCALES, scale_bias=choice.scale_bias, shift=shift)

    def at(self, scale: float) -> dict[str, Any]:
        """All statistics of the curve at one constant."""
        return curve_point(self.seen, self.vocab, scale, self.choice.scale_bias, self.shift)

    def solve(self, statistic: str, value: float, *, largest: bool = False) -> tuple[float | None, str]:
        """The constant at which a statistic has a value, and what is odd about it.

        Args:
            statistic: a column of the curve.
            value: what it should be.
            largest: take the largest solution, and the end of the range if the statistic stays below the value.
        """
        if not math.isfinite(value) or value <= 0:
            return None, f"the reference's {statistic} is {value:.4g}, which no constant matches"
        column = getattr(self.curve, statistic)
        above = [v > value for v in column]
        crossings = [i for i in range(len(column) - 1) if above[i] != above[i + 1]]
        if not crossings:
            return self._without_crossing(statistic, value, largest, all(above))
        place = crossings[-1]
        low, high = self.curve.scale[place], self.curve.scale[place + 1]
        note = "" if len(crossings) == 1 else f"{statistic} crosses it {len(crossings)} times; the largest is taken"
        return self._root(statistic, value, low, high), note

    def _without_crossing(self, statistic: str, value: float, largest: bool, above: bool) -> tuple[float | None, str]:
        column = getattr(self.curve, statistic)
        if largest and not above:
            return self.curve.scale[-1], f"{statistic} stays below {value:.4g} over the whole range"
        spread = f"{min(column):.4g} to {max(column):.4g}"
        flat = max(column) - min(column) <= 1e-9 * max(abs(max(column)), 1e-30)
        kind = "does not move with the constant" if flat else f"only runs from {spread}"
        return None, f"{statistic} {kind}, so {value:.4g} is out of range"

    def _root(self, statistic: str, value: float, low: float, high: float) -> float:
        from scipy.optimize import brentq

        found: float = brentq(
            lambda exponent: self.at(2.0**exponent)[statistic] - value,
            math.log2(low),
            math.log2(high),
            xtol=_ROOT_TOLERANCE,
        )
        return float(2.0**found)

    def lowest_loss(self) -> float:
        """The constant of the curve with the lowest loss."""
        losses = self.curve.loss_over_ln_n
        return self.curve.scale[losses.index(min(losses))]


def nearest_power_of_two(scale: float) -> float:
    """The power of two nearest in ratio."""
    return float(2.0 ** round(math.log2(scale)))


def power_of_two_below(scale: float) -> float:
    """The largest power of two that does not exceed the constant (to the solver's precision)."""
    return float(2.0 ** math.floor(math.log2(scale) + 2 * _ROOT_TOLERANCE))


# --- the targets ---------------------------------------------------------------------------------------------------


def _targets(solver: _Solver, weights: WeightStatistics, width: int, profile: Profile, choice: Choice) -> list[Target]:
    found = [
        _norm_target(solver, weights, profile, name, "norm" if name == choice.norm else f"norm:{name}")
        for name in dict.fromkeys((choice.norm, *NORMS))
        if getattr(weights, name) is not None and getattr(profile.weights, name) is not None
    ]
    found.append(_output_target(solver, profile, "activation", choice.activation))
    found.append(_output_target(solver, profile, "score", choice.score))
    found.append(_loss_target(solver, choice.ceiling))
    exact = _complete(solver, Target("constant", "k", choice.k, 1 / choice.k, None, None, None, None, ""))
    found.append(replace(exact, snapped=nearest_power_of_two(1 / choice.k)))
    constant = float(width**WIDTH_EXPONENT)
    note = "depends on the width alone"
    found.append(_snapped(solver, Target("width", "width", float(width), constant, None, None, None, None, note)))
    return found


def _norm_target(solver: _Solver, weights: WeightStatistics, profile: Profile, statistic: str, name: str) -> Target:
    goal = getattr(profile.weights, statistic)
    own = getattr(weights, statistic)
    scale = goal / own if own > 0 and goal > 0 else None
    note = "" if scale else "a norm of zero cannot be matched"
    return _snapped(solver, Target(name, statistic, goal, scale, None, None, None, None, note))


def _output_target(solver: _Solver, profile: Profile, name: str, statistic: str) -> Target:
    goal = _reference_value(profile, statistic)
    if goal is None:
        note = "only the weights of the reference are known"
        return Target(name, statistic, None, None, None, None, None, None, note)
    scale, note = solver.solve(statistic, goal)
    return _snapped(solver, Target(name, statistic, goal, scale, None, None, None, None, note))


def _reference_value(profile: Profile, statistic: str) -> float | None:
    if profile.output is None:
        return None
    holder = profile.output if statistic in SCORES else profile.output.document
    return float(getattr(holder, statistic))


def _loss_target(solver: _Solver, ceiling: float) -> Target:
    scale, note = solver.solve("loss_over_ln_n", ceiling, largest=True)
    lowest = f"the loss is lowest at {ratio_text(solver.lowest_loss())}"
    target = Target("loss", "loss_over_ln_n", ceiling, scale, None, None, None, None, f"{note}; {lowest}".strip("; "))
    return _complete(solver, replace(target, snapped=None if scale is None else power_of_two_below(scale)))


def _snapped(solver: _Solver, target: Target) -> Target:
    snapped = None if target.scale is None else nearest_power_of_two(target.scale)
    return _complete(solver, replace(target, snapped=snapped))


def _complete(solver: _Solver, target: Target) -> Target:
    """Add what the constant that would be written leads to."""
    scale = target.snapped if solver.choice.snap and target.name != "constant" else target.scale
    if scale is None:
        return target
    point = solver.at(scale)
    return replace(
        target,
        loss_over_ln_n=point["loss_over_ln_n"],
        active_mean_weight=point["active_mean_weight"],
        score_sd=point["score_sd"],
    )


def _pick(targets: Sequence[Target], choice: Choice) -> tuple[str, str, str]:
    """The target to use, why, and how far the targets disagree, in words."""
    by_name = {t.name: t for t in targets}
    disagreement = _disagreement(by_name)
    if choice.match != "auto":
        return choice.match, "as asked", disagreement
    norm, loss = by_name["norm"].scale, by_name["loss"].scale
    if norm is None or loss is None:
        usable = "loss" if loss is not None else "norm"
        return usable, f"the other of norm and loss cannot be reached, so {usable} decides", disagreement
    factor = max(norm / loss, loss / norm)
    if factor <= AGREEMENT_FACTOR:
        return "norm", f"the norm agrees with the outputs within a factor of {factor:.2g}", disagreement
    return "loss", f"the norm is off from the outputs by a factor of {factor:.3g}, so the loss decides", disagreement


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


def _verdict(chosen: Target, scale: float | None, solver: _Solver, choice: Choice) -> Verdict:
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


def _ratio_to_target(chosen: Target, scale: float, solver: _Solver, choice: Choice) -> float:
    if chosen.scale is None or chosen.target is None:
        return math.inf
    if chosen.statistic in NORMS or chosen.name in ("constant", "width"):
        return scale / chosen.scale
    return float(solver.at(scale)[chosen.statistic]) / chosen.target


# --- what goes with the constant -----------------------------------------------------------------------------------


def _lambda_advice(solver: _Solver, scale: float | None) -> LambdaAdvice:
    if scale is None:
        return LambdaAdvice(None, None)
    before, after = solver.at(1.0), solver.at(scale)
    return LambdaAdvice(*(_over(before[f"flops_reg_{side}"], after[f"flops_reg_{side}"]) for side in _SIDES))


_SIDES = ("query", "document")


def _over(a: float, b: float) -> float | None:
    return a / b if b > 0 else None


def _shift(seen: Observation, profile: Profile) -> float:
    """The shift of all logits at which documents have the reference's share of active dims, before the scale."""
    if profile.output is None:
        raise UsageError(
            "`--shift` needs the reference's outputs, and only its weights are known",
            hint="give a reference that is on this machine, or a profile of it",
        )
    share = profile.output.document.active_dims / _vocabulary_of(profile)
    ordered = seen.document.largest.flatten().sort(descending=True).values
    index = min(len(ordered) - 1, round(share * len(ordered)))
    return -float(ordered[index])


def _vocabulary_of(profile: Profile) -> float:
    assert profile.output is not None
    document = profile.output.document
    return document.l1 / document.mean_weight if document.mean_weight > 0 else math.inf


def _text_warning(texts: Any, profile: Profile) -> list[str]:
    if profile.texts is None or profile.texts == texts:
        return []
    return [f"the profile of `{profile.name}` was measured on other texts or lengths; its outputs compare roughly"]


def advice(scale: float, head_lr_multiplier: float, head: Head) -> list[str]:
    """How to use the pair (constant, head learning rate): lines for a person to read."""
    lines = [f"multiply the MLM head by {ratio_text(scale)} before training; `--save DIR` writes that checkpoint"]
    if head_lr_multiplier == 1.0:
        return [*lines, "train the untied head at the encoder's learning rate"]
    names = "|".join(n.replace(".", r"\.") for n in (*head.matrix, *([head.bias] if head.bias else [])))
    return [
        *lines,
        f"train the untied head at {head_lr_multiplier:g} x the encoder's learning rate LR",
        f'in sentence-transformers: `learning_rate_mapping={{r"({names})$": {head_lr_multiplier:g} * LR}}` in the '
        "training arguments",
        f"in a plain loop: an optimizer group of its own for the parameters matching `({names})$`",
    ]


def ratio_text(scale: float) -> str:
    """A constant as people write it: 1/64, or 0.37."""
    if scale > 0 and math.log2(scale).is_integer() and scale < 1:
        return f"1/{round(1 / scale)}"
    return f"{scale:.4g}"
