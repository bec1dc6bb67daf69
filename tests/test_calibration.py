"""The chosen constant against its own definition in float64, against rescaled models, and where there is none."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from test_activations import by_hand, calmed, some_pairs
from test_stored import CAUSAL
from tiny_models import VOCAB, tiny_model, tiny_tokenizer

from headscale.activations import Encoding, Observation, observe, output_statistics
from headscale.backbone import handed_over
from headscale.calibration import (
    ACTIVATIONS,
    HEAD_LR_MULTIPLIER,
    MATCHES,
    NORMS,
    SCORES,
    SHARE_FACTOR,
    Choice,
    advice,
    choose,
)
from headscale.constants import nearest_power_of_two, power_of_two_below, ratio_text
from headscale.diagnosis import LOSS_CEILING
from headscale.errors import UnsupportedHeadError, UsageError
from headscale.head import load_head
from headscale.inspection import CURVE_SCALES, Measured, measure, texts_of
from headscale.profiles import Reference, profile_of
from headscale.records import Calibration, Profile, Target
from headscale.rescaling import rescale_
from headscale.solving import Solver
from headscale.texts import Pair

torch = pytest.importorskip("torch")

BATCH = 8
ENCODING = Encoding(query_length=9, document_length=24, batch_size=BATCH)
PAIRS = [Pair(p.query + " w9", f"{p.query} w9 {p.document}") for p in some_pairs(16, seed=11)]  # documents that answer
TEXTS = texts_of(PAIRS, "given", ENCODING)


def measured(model: Any, name: str = "tiny") -> Measured:
    return measure(handed_over(model, tiny_tokenizer(), name), TEXTS, spectral=True)


@pytest.fixture(scope="module")
def large() -> Measured:
    """A backbone whose outputs are far too large."""
    model = tiny_model("modernbert")
    rescale_(model, 40.0, mode="untie")
    return measured(model, "large")


@pytest.fixture(scope="module")
def other() -> Profile:
    """An unrelated reference of small outputs."""
    model = calmed(tiny_model("bert", seed=5), 1.5)
    rescale_(model, 0.2, mode="untie")
    return profile_of(measured(model, "other").inspection)


def reference(profile: Profile) -> Reference:
    return Reference(profile, "given")


def target(found: Calibration, name: str) -> Target:
    return next(t for t in found.targets if t.name == name)


# --- the definitions, in float64 -----------------------------------------------------------------------------------


def oracle(seen: Observation, scale: float, *, scale_bias: bool = True, shift: float = 0.0) -> dict[str, float]:
    """Every statistic that a target can match, from the largest logits alone."""
    bias = np.zeros(seen.query.largest.shape[1]) if seen.bias is None else seen.bias.double().numpy()
    sides = []
    for side in (seen.query, seen.document):
        m = side.largest.double().numpy()
        logits = scale * (m + shift) if scale_bias else scale * (m - bias + shift) + bias
        sides.append(np.log1p(np.maximum(logits, 0.0)))
    queries, documents = sides
    batch = seen.batch_size
    scores = [queries[i : i + batch] @ documents[i : i + batch].T for i in range(0, len(queries), batch)]
    losses = [np.mean([np.log(np.exp(r - r[i]).sum()) for i, r in enumerate(s)]) for s in scores]
    margins = [np.mean([r[i] - np.delete(r, i).mean() for i, r in enumerate(s)]) for s in scores]
    return {
        "mean_weight": documents.mean(),
        "l1": documents.sum(1).mean(),
        "active_mean_weight": documents[documents > 0].mean() if documents.any() else 0.0,
        "score_mean": float(np.mean([s.mean() for s in scores])),
        "score_sd": float(np.mean([s.std() for s in scores])),
        "score_margin": float(np.mean(margins)),
        "loss_over_ln_n": float(np.mean(losses)) / math.log(batch),
    }


@pytest.mark.parametrize("statistic", [*ACTIVATIONS, *SCORES, "loss_over_ln_n"])
@pytest.mark.parametrize("scale_bias", [True, False])
def test_the_solution_has_the_value_it_is_solved_for(
    statistic: str, scale_bias: bool, large: Measured, other: Profile
) -> None:
    kind = {**dict.fromkeys(ACTIVATIONS, "activation"), **dict.fromkeys(SCORES, "score")}.get(statistic, "loss")
    options = {} if kind == "loss" else {kind: statistic}
    choice = Choice(match=kind, snap=False, scale_bias=scale_bias, **options)
    found = choose(large, reference(other), choice)
    row = target(found, kind)
    if scale_bias:
        assert found.scale is not None
    if found.scale is None:
        assert "out of range" in row.note  # the bias alone puts out more than that
        return
    assert found.scale == row.scale
    values = oracle(large.seen, found.scale, scale_bias=scale_bias)
    rounding = 1e-6 * values["score_mean"] if statistic in SCORES else 0.0  # differences of scores in float32
    assert values[statistic] == pytest.approx(row.target, rel=1e-5, abs=rounding)
    assert found.verdict.word == "matched"
    assert found.verdict.value == pytest.approx(1.0, abs=1e-5 + rounding / row.target)


@pytest.mark.parametrize("norm", NORMS)
def test_a_norm_is_matched_by_the_ratio(norm: str, large: Measured, other: Profile) -> None:
    found = choose(large, reference(other), Choice(match="norm", norm=norm, snap=False))
    assert target(found, "norm").statistic == norm
    own, goal = getattr(large.inspection.weights, norm), getattr(other.weights, norm)
    assert found.scale * own == pytest.approx(goal, rel=1e-12)
    names = {t.name for t in found.targets}
    assert {f"norm:{n}" for n in NORMS if n != norm} <= names


@pytest.mark.parametrize("scale", [0.04, 0.3, 3.7])
def test_a_rescaled_self_is_found_by_every_target(scale: float) -> None:
    model = calmed(tiny_model("bert"), 1.5)
    twin = copy.deepcopy(model)
    rescale_(twin, scale, mode="untie")
    profile = profile_of(measured(twin, "twin").inspection)
    for activation in ACTIVATIONS:
        for score in SCORES:
            found = choose(measured(model), reference(profile), Choice(activation=activation, score=score, snap=False))
            for name in ("norm", "norm:spectral_norm", "norm:effective_norm", "activation", "score"):
                assert target(found, name).scale == pytest.approx(scale, rel=2e-5), name
            break


def test_the_ceiling_is_the_last_constant_below_it(large: Measured, other: Profile) -> None:
    for ceiling in (1.05, 1.25, 3.0):
        found = choose(large, reference(other), Choice(match="loss", ceiling=ceiling, snap=False))
        beyond = [oracle(large.seen, found.scale * f)["loss_over_ln_n"] for f in np.geomspace(1.001, 2.0**6, 200)]
        assert min(beyond) > ceiling
        assert oracle(large.seen, found.scale * 0.999)["loss_over_ln_n"] <= ceiling


def test_the_table_says_what_each_constant_leads_to(large: Measured, other: Profile) -> None:
    for snap in (True, False):
        found = choose(large, reference(other), Choice(snap=snap, shift=False))
        assert {t.name.partition(":")[0] for t in found.targets} == set(MATCHES)
        for row in found.targets:
            written = row.snapped if snap and row.name != "constant" else row.scale
            expected = oracle(large.seen, written)
            assert row.loss_over_ln_n == pytest.approx(expected["loss_over_ln_n"], rel=1e-5)
            assert row.active_mean_weight == pytest.approx(expected["active_mean_weight"], rel=1e-5)
            assert row.score_sd == pytest.approx(expected["score_sd"], rel=1e-4)
        assert found.curve.scale == CURVE_SCALES
        losses = dict(zip(CURVE_SCALES, found.curve.loss_over_ln_n, strict=True))
        lowest = ratio_text(min(losses, key=losses.__getitem__))
        assert target(found, "loss").note.endswith(f"the loss is lowest at {lowest}")


def test_only_one_forward_pass(large: Measured, other: Profile, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("ran the model again")

    monkeypatch.setattr(type(large.backbone.model), "forward", never)
    assert choose(large, reference(other), Choice(shift=True)).scale is not None


# --- rounding ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [*np.geomspace(1e-4, 64, 57).tolist(), 0.5, 2.0**-0.5, 1.0])
def test_powers_of_two(scale: float) -> None:
    powers = [2.0**e for e in range(-20, 10)]
    distance = abs(math.log2(nearest_power_of_two(scale)) - math.log2(scale))
    assert nearest_power_of_two(scale) in powers
    assert distance == pytest.approx(min(abs(math.log2(p / scale)) for p in powers), abs=1e-12)
    assert power_of_two_below(scale) == max(p for p in powers if p <= scale)


def test_a_solution_at_a_power_of_two_is_not_rounded_away() -> None:
    for exponent in (-5, 0, 3):
        assert power_of_two_below(2.0**exponent * (1 - 1e-7)) == 2.0**exponent
        assert power_of_two_below(2.0**exponent * (1 - 1e-5)) == 2.0 ** (exponent - 1)


def test_what_is_rounded_and_how(large: Measured, other: Profile) -> None:
    found = choose(large, reference(other), Choice(k=11.3, shift=False))
    for row in found.targets:
        rule = power_of_two_below if row.name == "loss" else nearest_power_of_two
        assert row.snapped == rule(row.scale)
    assert oracle(large.seen, target(found, "loss").snapped)["loss_over_ln_n"] <= LOSS_CEILING


@pytest.mark.parametrize("snap", [True, False])
def test_a_given_constant_is_kept_as_given(snap: bool, large: Measured, other: Profile) -> None:
    found = choose(large, reference(other), Choice(match="constant", k=11.3, snap=snap))
    assert found.scale == 1 / 11.3
    assert not found.snapped
    assert found.verdict.word == "matched"
    assert found.verdict.evidence == "0.0885 was given, not matched"
    assert found.advice[0].startswith("multiply the MLM head by 0.0885 before training")


def test_width(large: Measured, other: Profile) -> None:
    found = choose(large, reference(other), Choice(match="width"))
    assert target(found, "width").scale == pytest.approx(32**-0.25, rel=1e-12)
    assert found.scale == 0.5  # 0.42 rounded


@pytest.mark.parametrize(
    ("scale", "text"), [(1 / 64, "1/64"), (1.0, "1"), (0.5, "1/2"), (4.0, "4"), (0.37, "0.37"), (1 / 3, "0.3333")]
)
def test_constants_as_people_write_them(scale: float, text: str) -> None:
    assert ratio_text(scale) == text


# --- where there is no constant, or more than one ------------------------------------------------------------------


def solver(seen: Observation, *, scale_bias: bool = True) -> Solver:
    return Solver(seen, lambda _: 0.0, scale_bias=scale_bias)


def two_ways() -> Observation:
    """A kept bias under which one term wakes as the constant grows while two fall asleep."""
    rows = [[40.0, 0.5, 0.5], [40.0, 0.4, 0.6]]
    return replace(by_hand(rows, rows), bias=torch.tensor([-0.5, 4.0, 4.0]))


def test_a_statistic_that_turns_is_solved_at_the_largest_constant_and_says_so() -> None:
    seen = two_ways()
    grid = np.geomspace(CURVE_SCALES[0], CURVE_SCALES[-1], 4000)
    values = np.array([oracle(seen, a, scale_bias=False)["l1"] for a in grid])
    middle = 0.5 * (values.min() + min(values[0], values[-1]))
    scale, note = solver(seen, scale_bias=False).solve("l1", middle)
    crossings = grid[:-1][np.sign(values[:-1] - middle) != np.sign(values[1:] - middle)]
    assert len(crossings) == 2
    assert note == "l1 crosses it 2 times; the largest is taken"
    assert scale == pytest.approx(crossings[-1], rel=2 * (grid[1] / grid[0] - 1))
    assert oracle(seen, scale, scale_bias=False)["l1"] == pytest.approx(middle, rel=1e-5)


def test_a_loss_that_dips_below_its_ceiling_and_rises_again() -> None:
    """One strong term decides while scores are small, three weak ones once logarithms have levelled them."""
    seen = by_hand([[10.0, 1.0, 1.0, 1.0], [-1.0, 3.0, 3.0, 3.0]], [[10.0, -1.0, -1.0, -1.0], [-1.0, 3.0, 3.0, 3.0]])
    losses = [oracle(seen, a)["loss_over_ln_n"] for a in CURVE_SCALES]
    assert min(losses) < 0.2
    assert losses[-1] > 10
    for ceiling, crossings in ((0.9, 2), (1.25, 1)):
        scale, note = solver(seen).solve("loss_over_ln_n", ceiling, largest=True)
        assert oracle(seen, scale)["loss_over_ln_n"] == pytest.approx(ceiling, rel=1e-5)
        assert oracle(seen, 1.01 * scale)["loss_over_ln_n"] > ceiling
        assert ("crosses it 2 times; the largest is taken" in note) == (crossings == 2)


def test_a_loss_that_never_reaches_the_ceiling_takes_the_end_of_the_range() -> None:
    same = by_hand([[1.0, 2.0]] * 2, [[2.0, 1.0]] * 2)  # all scores equal: the loss is ln N at every constant
    scale, note = solver(same).solve("loss_over_ln_n", 1.25, largest=True)
    assert scale == CURVE_SCALES[-1]
    assert note == "loss_over_ln_n is still below 1.25 at 64, the largest constant tried"


def test_a_value_at_a_point_of_the_curve() -> None:
    seen = by_hand([[1.0, 2.0], [0.5, 0.1]], [[2.0, 1.0], [0.2, 3.0]])
    one = solver(seen)
    for scale in CURVE_SCALES[::7]:
        value = one.at(scale)["l1"]
        assert one.solve("l1", value)[0] == pytest.approx(scale, rel=2e-5)
    assert one.solve("l1", one.at(CURVE_SCALES[-1])["l1"] * 1.0001)[0] is None


@pytest.mark.parametrize(
    ("statistic", "value", "words"),
    [
        ("mean_weight", 1e3, "mean_weight only runs from"),
        ("mean_weight", 0.0, "the reference's mean_weight is 0, which no constant matches"),
        ("score_margin", -1.0, "the reference's score_margin is -1, which no constant matches"),
        ("score_sd", math.nan, "the reference's score_sd is nan, which no constant matches"),
        ("l1", math.inf, "the reference's l1 is inf, which no constant matches"),
    ],
)
def test_values_out_of_reach_are_said(statistic: str, value: float, words: str, large: Measured) -> None:
    scale, note = solver(large.seen).solve(statistic, value)
    assert scale is None
    assert note.startswith(words)


def test_a_backbone_that_puts_nothing_out(other: Profile) -> None:
    found = choose(measured(calmed(tiny_model("bert"), 1e4)), reference(other), Choice(match="activation"))
    assert found.scale is None
    assert found.after is None
    assert found.verdict.word == "unmatched"
    assert "does not move with the constant" in found.verdict.evidence
    assert (found.lambda_advice.query, found.lambda_advice.document) == (None, None)
    assert found.advice == ()


def test_a_statistic_that_is_not_finite() -> None:
    seen = by_hand([[math.inf, 1.0], [1.0, 1.0]], [[1.0, 1.0], [2.0, 1.0]])
    assert solver(seen).solve("loss_over_ln_n", 1.25, largest=True) == (
        None,
        "loss_over_ln_n is not finite at some constants",
    )


def test_a_reference_known_by_its_weights_alone(large: Measured, other: Profile) -> None:
    found = choose(large, reference(replace(other, output=None, texts=None)))
    for name in ("activation", "score"):
        row = target(found, name)
        assert (row.target, row.scale, row.note) == (None, None, "only the weights of the reference are known")
    assert target(found, "norm").scale is not None
    assert found.scale is not None
    assert found.warnings == large.inspection.warnings


@pytest.mark.parametrize("whose", ["the reference", "this backbone"])
def test_a_spectral_norm_that_was_not_measured(whose: str, large: Measured, other: Profile) -> None:
    if whose == "the reference":
        other = replace(other, weights=replace(other.weights, spectral_norm=None))
    else:
        weights = replace(large.inspection.weights, spectral_norm=None)
        large = replace(large, inspection=replace(large.inspection, weights=weights))
    asked = choose(large, reference(other), Choice(match="norm", norm="spectral_norm"))
    assert (asked.scale, asked.verdict.word) == (None, "unmatched")
    assert asked.verdict.evidence == f"the spectral_norm of {whose} was not measured: `--spectral` adds it"
    automatic = choose(large, reference(other), Choice(norm="spectral_norm", shift=False))
    assert (automatic.match, automatic.match_reason) == ("loss", "norm cannot be reached, so loss decides")


def test_a_norm_of_zero(large: Measured, other: Profile) -> None:
    nothing = replace(other, weights=replace(other.weights, frobenius=0.0))
    found = choose(large, reference(nothing), Choice(match="norm"))
    assert found.verdict.evidence == "a norm of zero cannot be matched"


def test_a_softcapped_head_is_refused_with_its_reason(other: Profile) -> None:
    capped = measured(tiny_model("gemma2", CAUSAL["gemma2"]))
    with pytest.raises(UnsupportedHeadError, match="softcapped at 30"):
        choose(capped, reference(other))


# --- which target decides ------------------------------------------------------------------------------------------


def with_norm(profile: Profile, frobenius: float) -> Reference:
    return reference(replace(profile, weights=replace(profile.weights, frobenius=frobenius)))


def test_auto_takes_the_norm_where_it_agrees_and_the_loss_where_not(large: Measured, other: Profile) -> None:
    weights = replace(other, output=None)  # the loss is then the only output statistic
    loss = target(choose(large, reference(weights)), "loss").scale
    own = large.inspection.weights.frobenius
    for factor in (0.51, 1.0, 1.99):
        found = choose(large, with_norm(weights, own * loss * factor))
        assert found.match == "norm"
        assert f"within a factor of {max(factor, 1 / factor):.2g}" in found.match_reason
        assert found.scale == nearest_power_of_two(loss * factor)
    for factor in (0.49, 2.01, 50.0):
        found = choose(large, with_norm(weights, own * loss * factor))
        assert found.match == "loss"
        assert f"off from the outputs by up to a factor of {max(factor, 1 / factor):.3g}" in found.match_reason
        assert found.scale == power_of_two_below(loss)


def test_auto_holds_the_norm_against_every_output(large: Measured, other: Profile) -> None:
    """A norm that agrees with the loss alone is no agreement where scores ask for something else."""
    alone = Choice(shift=False)
    known = choose(large, reference(other), alone)
    loss, score = target(known, "loss").scale, target(known, "score").scale
    assert max(loss / score, score / loss) > 2.5
    assert choose(large, with_norm(other, large.inspection.weights.frobenius * loss), alone).match == "loss"


def test_auto_where_one_or_both_cannot_be_reached(large: Measured, other: Profile) -> None:
    assert choose(large, with_norm(other, 0.0), Choice(shift=False)).match == "loss"
    low = choose(large, reference(other), Choice(ceiling=0.5, shift=False))  # below any loss
    assert (low.match, low.match_reason) == ("norm", "loss cannot be reached, so norm decides")
    neither = choose(large, with_norm(other, 0.0), Choice(ceiling=0.5, shift=False))
    assert (neither.scale, neither.match_reason) == (None, "neither norm nor loss can be reached")


def test_auto_does_not_follow_a_loss_that_bounds_nothing(other: Profile) -> None:
    """Outputs that are the same for every text have a loss of ln N at any constant: 64 would be no advice."""
    silent = measured(calmed(tiny_model("bert"), 1e4))
    found = choose(silent, reference(other))
    assert target(found, "loss").scale == CURVE_SCALES[-1]
    assert (found.match, found.scale) == ("loss", 1.0)
    assert "left as it is" in found.match_reason


def test_disagreement_is_put_into_words(large: Measured, other: Profile) -> None:
    found = choose(large, with_norm(other, 100 * large.inspection.weights.frobenius))
    scales = {n: target(found, n).scale for n in ("norm", "activation", "score", "loss")}
    low, high = min(scales, key=scales.__getitem__), max(scales, key=scales.__getitem__)
    assert high == "norm"
    assert found.disagreement == (
        f"the targets disagree by a factor of {scales[high] / scales[low]:.3g}: `{low}` asks for "
        f"{ratio_text(scales[low])} and `norm` for 100; equal norms do not mean equal outputs"
    )


def test_no_word_where_they_agree() -> None:
    model = calmed(tiny_model("bert"), 1.5)
    again = measured(model)
    loss = target(choose(again, reference(profile_of(again.inspection)), Choice(ceiling=1.25)), "loss").scale
    rescale_(model, loss, mode="untie")
    small = measured(model)
    found = choose(small, reference(profile_of(small.inspection)), Choice(ceiling=1.25))
    assert found.disagreement == ""
    assert (found.match, found.scale, found.verdict.word) == ("norm", 1.0, "matched")


# --- the shift -----------------------------------------------------------------------------------------------------


def active(model: Any) -> int:
    seen = observe(load_head(model), tiny_tokenizer(), TEXTS.pairs, ENCODING)
    return int((seen.document.largest > 0).sum())


@pytest.mark.parametrize("scale_bias", [True, False])
@pytest.mark.parametrize("match", ["loss", "activation", "constant"])
@pytest.mark.parametrize("level", [-3.0, 0.0, 3.0])
def test_a_shift_meets_the_share_of_active_dims(match: str, scale_bias: bool, level: float, other: Profile) -> None:
    model = calmed(tiny_model("modernbert"), level)
    found = choose(measured(model), reference(other), Choice(match=match, scale_bias=scale_bias, shift=True))
    if found.scale is None:
        assert match == "activation"
        return
    share = other.output.document.active_dims / VOCAB
    goal = share * VOCAB * len(TEXTS.pairs)
    assert found.after.document.active_dims * len(TEXTS.pairs) == pytest.approx(goal, abs=1.0)
    assert found.after.shift == found.shift
    changed = copy.deepcopy(model)  # and it is what a model with this bias does
    bias = load_head(changed).bias
    with torch.no_grad():
        if scale_bias:
            bias.add_(found.shift)
            rescale_(changed, found.scale, mode="untie")
        else:
            rescale_(changed, found.scale, mode="untie", scale_bias=False)
            load_head(changed).bias.add_(found.scale * found.shift)
    assert active(changed) == pytest.approx(goal, abs=1.0)


def test_targets_are_solved_with_their_shift(large: Measured, other: Profile) -> None:
    for scale_bias in (True, False):
        choice = Choice(match="score", snap=False, shift=True, scale_bias=scale_bias)
        found = choose(large, reference(other), choice)
        values = oracle(large.seen, found.scale, scale_bias=scale_bias, shift=found.shift)
        assert values["score_sd"] == pytest.approx(other.output.score_sd, rel=1e-5, abs=1e-6 * values["score_mean"])


@pytest.mark.parametrize("share", [1e-9, 1.0])
def test_shares_at_the_ends(share: float, large: Measured, other: Profile) -> None:
    document = replace(other.output.document, active_dims=share * VOCAB)
    document = replace(document, mean_weight=document.l1 / VOCAB)
    extreme = replace(other, output=replace(other.output, document=document))
    found = choose(large, reference(extreme), Choice(match="constant", shift=True))
    count = found.after.document.active_dims * len(TEXTS.pairs)
    assert count == pytest.approx(1 if share < 1 else VOCAB * len(TEXTS.pairs), abs=1e-3)
    assert math.isfinite(found.shift)


def test_a_reference_that_gives_no_share(large: Measured, other: Profile) -> None:
    with pytest.raises(UsageError, match="needs the reference's outputs"):
        choose(large, reference(replace(other, output=None)), Choice(shift=True))
    silent = replace(other.output, document=replace(other.output.document, active_dims=0.0, mean_weight=0.0))
    with pytest.raises(UsageError, match="have no active terms"):
        choose(large, reference(replace(other, output=silent)), Choice(shift=True))


def test_auto_shifts_where_far_more_terms_are_active_than_in_the_reference(large: Measured, other: Profile) -> None:
    """With a head that has a bias, and for the target `auto` alone; then the loss decides on what is left to do."""
    dims = large.inspection.output.document.active_dims
    share = other.output.document.active_dims / (other.output.document.l1 / other.output.document.mean_weight)
    assert dims / large.inspection.head.vocab_size > SHARE_FACTOR * share
    found = choose(large, reference(other))
    assert found.shift == choose(large, reference(other), Choice(shift=True)).shift < 0
    assert found.after.document.active_dims == pytest.approx(share * large.inspection.head.vocab_size, abs=1.0)
    assert (found.match, found.lambda_advice.query) == ("loss", None)
    assert "shift" in found.match_reason
    assert found.scale <= 1.0
    assert found.advice[0].startswith(f"add {found.shift:.4g} to the vocabulary bias")
    assert choose(large, reference(other), Choice(match="constant")).shift == 0.0
    assert choose(large, reference(other), Choice(shift=False)).shift == 0.0
    head = replace(large.inspection.head, bias=None)
    assert choose(replace(large, inspection=replace(large.inspection, head=head)), reference(other)).shift == 0.0
    assert choose(large, reference(replace(other, output=None))).shift == 0.0
    own = reference(profile_of(large.inspection))
    assert choose(large, own).shift == 0.0


def test_advice_without_a_constant_speaks_of_the_shift_alone(large: Measured) -> None:
    head = large.inspection.head
    assert advice(1.0, 1.0, head, shift=-7.0)[0].startswith("add -7 to the vocabulary bias before training")
    assert advice(0.5, 4.0, head, shift=-7.0)[0].startswith("add -7 to the vocabulary bias, then multiply the MLM head")


# --- what goes with the constant -----------------------------------------------------------------------------------


@pytest.mark.parametrize("scale_bias", [True, False])
def test_lambda_advice_is_the_ratio_that_a_rescaled_model_has(
    scale_bias: bool, large: Measured, other: Profile
) -> None:
    found = choose(large, reference(other), Choice(match="constant", scale_bias=scale_bias))
    seen = large.seen
    bias = seen.bias.double().numpy()
    ratios = []
    for side in (seen.query, seen.document):
        m = side.largest.double().numpy()
        moved = m / 16 if scale_bias else (m - bias) / 16 + bias
        before, after = (float(np.square(np.log1p(np.maximum(x, 0.0)).mean(0)).sum()) for x in (m, moved))
        ratios.append(before / after if after else None)
    for got, expected in zip((found.lambda_advice.query, found.lambda_advice.document), ratios, strict=True):
        assert got == (None if expected is None else pytest.approx(expected, rel=1e-5))


@pytest.mark.parametrize("scale_bias", [True, False])
def test_after_is_what_the_written_model_will_show(scale_bias: bool, large: Measured, other: Profile) -> None:
    found = choose(large, reference(other), Choice(scale_bias=scale_bias))
    changed = copy.deepcopy(large.backbone.model)
    rescale_(changed, found.scale, mode="untie", scale_bias=scale_bias, shift=found.shift)
    seen = observe(load_head(changed), tiny_tokenizer(), TEXTS.pairs, ENCODING)
    tokens = tiny_tokenizer().convert_ids_to_tokens
    again = output_statistics(seen, token=tokens)
    assert found.before == large.inspection.output
    assert found.after.loss_over_ln_n == pytest.approx(again.loss_over_ln_n, rel=1e-4)
    assert found.after.document.l2 == pytest.approx(again.document.l2, rel=1e-4)
    assert [share for _, share in found.after.common_terms] == [share for _, share in again.common_terms]
    assert {term for term, _ in found.after.common_terms} <= set(tiny_tokenizer().get_vocab())


def test_advice_names_the_parameters_and_their_rate(large: Measured) -> None:
    head = large.inspection.head
    assert advice(1 / 16, 1.0, head)[1] == "train the head at the encoder's learning rate"
    lines = advice(1 / 16, 4.0, head)
    assert lines[1] == "train the untied head at 4 x the encoder's learning rate LR"
    import re

    pattern = re.search(r'r"(.+?)"', lines[2]).group(1)
    names = [n for n, _ in large.backbone.model.named_parameters(remove_duplicate=False)]
    assert {n for n in names if re.search(pattern, n)} == {*head.matrix, head.bias}
    assert pattern in lines[3]


def test_other_texts_are_warned_about(large: Measured, other: Profile) -> None:
    elsewhere = replace(other, texts=replace(other.texts, document_length=512))
    assert choose(large, reference(other)).warnings == ()
    assert "measured on other texts or lengths" in choose(large, reference(elsewhere)).warnings[0]


# --- asking --------------------------------------------------------------------------------------------------------


def test_everything_wrong_is_said_at_once() -> None:
    with pytest.raises(UsageError) as error:
        Choice("nrom", "l3", "dims", "auc", k=0.0, ceiling=math.nan, head_lr_multiplier=-1.0)
    for word in ("match nrom", "norm l3", "activation dims", "score auc", "k 0.0", "ceiling nan", "head-lr-multiplier"):
        assert f"`--{word}" in error.value.message
    assert error.value.exit_code == 2


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize("name", ["k", "ceiling", "head_lr_multiplier"])
def test_numbers_that_no_constant_comes_from(name: str, value: float) -> None:
    with pytest.raises(UsageError, match="is not a number above zero"):
        Choice(**{name: value})


def test_a_healthy_head_is_left_as_it_is() -> None:
    """Whatever the norms say: a loss within its ceiling is no reason to scale up, nor to change the head's step."""
    small = measured(calmed(tiny_model("bert"), 0.2))
    goal = replace(small.inspection.weights, frobenius=100 * small.inspection.weights.frobenius)
    found = choose(small, reference(replace(profile_of(small.inspection), weights=goal)))
    assert target(found, "loss").scale > 1
    assert (found.match, found.scale, found.head_lr_multiplier) == ("loss", 1.0, 1.0)
    assert "left as it is" in found.match_reason


def test_a_shrunk_head_comes_with_its_learning_rate() -> None:
    large = measured(tiny_model("bert"))
    own = reference(profile_of(large.inspection))
    assert choose(large, own, Choice("constant", k=16)).head_lr_multiplier == HEAD_LR_MULTIPLIER
    assert choose(large, own, Choice("constant", k=0.5)).head_lr_multiplier == 1.0
    assert choose(large, own, Choice("constant", k=16, head_lr_multiplier=2.5)).head_lr_multiplier == 2.5
