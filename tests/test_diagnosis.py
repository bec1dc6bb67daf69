"""Every word a verdict can be, reached by outputs made for it, with the evidence it gives."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from headscale.diagnosis import (
    COSINE_CEILING,
    EMPTY_CEILING,
    LOSS_CEILING,
    SCORE_SD_FLOOR,
    VARIANT_SHARE,
    causes,
    judge,
)
from headscale.records import OutputStatistics, ScaleCurve, SideStatistics, VocabularyStatistics

SIDE = SideStatistics(
    texts=64,
    active_dims=120.0,
    active_dims_p5=80.0,
    active_dims_p50=120.0,
    active_dims_p95=160.0,
    empty=0.0,
    mean_weight=0.01,
    active_mean_weight=0.5,
    max_weight=2.0,
    l1=60.0,
    l2=7.0,
    flops_reg=3.0,
    mean_cosine=0.4,
    special_share=0.1,
    first_position_share=0.05,
    position_histogram=(0.1,) * 10,
)
HEALTHY = OutputStatistics(
    scale=1.0,
    shift=0.0,
    candidates=32,
    batches=2,
    query=SIDE,
    document=SIDE,
    score_mean=20.0,
    score_sd=4.0,
    score_max=40.0,
    score_margin=3.0,
    loss=0.8 * math.log(32),
    loss_over_ln_n=0.8,
    batch_accuracy=0.4,
    flops_cost=2.0,
    saturation=0.05,
    coverage=0.3,
    common_terms=(("the", 0.9),),
    fp16_headroom=1600.0,
    bf16_resolution=0.04,
    non_finite=0,
)


def curve(*cosines: float | None) -> ScaleCurve:
    others = [(0.0,) * len(cosines)] * 9
    return ScaleCurve((1.0,) * len(cosines), *others[:5], cosines, *others[5:])


def with_document(**changes: Any) -> OutputStatistics:
    return replace(HEALTHY, document=replace(SIDE, **changes))


def with_query(**changes: Any) -> OutputStatistics:
    return replace(HEALTHY, query=replace(SIDE, **changes))


def test_curve_is_built_with_its_cosines() -> None:
    assert curve(0.3, None).cosine == (0.3, None)


def test_weights_alone_are_unjudged() -> None:
    verdict = judge(None, None)
    assert (verdict.word, verdict.value, verdict.threshold) == ("unjudged", None, LOSS_CEILING)


@pytest.mark.parametrize(("is_reference", "word"), [(False, "ok"), (True, "reference")])
def test_healthy_outputs(is_reference: bool, word: str) -> None:
    verdict = judge(HEALTHY, curve(0.4), is_reference=is_reference)
    assert (verdict.word, verdict.statistic, verdict.value) == (word, "loss_over_ln_n", 0.8)
    assert verdict.band == (None, LOSS_CEILING)
    assert verdict.evidence == "the contrastive loss starts at 0.8 x ln 32"


CASES: dict[str, tuple[OutputStatistics, ScaleCurve | None, str, str, float, float]] = {
    # outputs, curve, word, statistic, value, threshold
    "loss": (replace(HEALTHY, loss_over_ln_n=10.3), curve(0.4), "too high", "loss_over_ln_n", 10.3, LOSS_CEILING),
    "flat": (replace(HEALTHY, score_sd=0.02), curve(0.4), "too low", "score_sd", 0.02, SCORE_SD_FLOOR),
    "empty documents": (with_document(empty=0.7), curve(0.4), "degenerate", "empty", 0.7, EMPTY_CEILING),
    "empty queries": (with_query(empty=0.9), curve(0.4), "degenerate", "empty", 0.9, EMPTY_CEILING),
    "alike at all constants": (HEALTHY, curve(0.9999, 0.995, None), "degenerate", "mean_cosine", 0.995, COSINE_CEILING),
    "alike, no curve": (with_document(mean_cosine=0.999), None, "degenerate", "mean_cosine", 0.999, COSINE_CEILING),
    "overflow": (replace(HEALTHY, non_finite=3), curve(0.4), "degenerate", "non_finite", 3.0, 0.0),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("is_reference", [False, True])
def test_what_is_wrong_is_said_with_its_number(case: str, is_reference: bool) -> None:
    output, over, word, statistic, value, threshold = CASES[case]
    verdict = judge(output, over, is_reference=is_reference)  # a reference is judged like any other
    assert (verdict.word, verdict.statistic, verdict.value, verdict.threshold) == (word, statistic, value, threshold)
    low, high = verdict.band
    inside = (low is None or value >= low) and (high is None or value <= high)
    assert not inside


EVIDENCE = {
    "loss": "the contrastive loss starts at 10.3 x ln 32, where chance is 1",
    "empty documents": "70% of the documents have no active term, which no positive factor changes",
    "empty queries": "90% of the queries have no active term, which no positive factor changes",
    "overflow": "3 of the pooled weights are not finite",
}


@pytest.mark.parametrize("case", CASES)
def test_evidence_is_one_plain_sentence(case: str) -> None:
    output, over, *_ = CASES[case]
    evidence = judge(output, over).evidence
    assert evidence == EVIDENCE.get(case, evidence)
    assert not evidence.endswith(".")
    assert evidence[0] == evidence[0].lower()


def test_one_constant_at_which_texts_differ_is_enough() -> None:
    assert judge(with_document(mean_cosine=0.9999), curve(0.9999, 0.98)).word == "ok"


def test_what_no_constant_repairs_comes_first() -> None:
    everything = replace(with_document(empty=0.8), loss_over_ln_n=50.0, score_sd=0.0)
    assert judge(everything, curve(1.0)).statistic == "empty"
    assert judge(replace(everything, document=SIDE), curve(1.0)).statistic == "mean_cosine"
    assert judge(replace(everything, document=SIDE), curve(0.4)).word == "too high"


@pytest.mark.parametrize(("loss", "word"), [(LOSS_CEILING, "ok"), (LOSS_CEILING * 1.001, "too high")])
def test_the_ceiling_itself_is_still_ok(loss: float, word: str) -> None:
    assert judge(replace(HEALTHY, loss_over_ln_n=loss), curve(0.4)).word == word


def words(variants: float) -> VocabularyStatistics:
    return VocabularyStatistics(30_000, 5, 0, True, 0.3, variants, variants, variants, variants)


@pytest.mark.parametrize(
    ("output", "variants", "expected"),
    [
        (HEALTHY, 0.0, []),
        (HEALTHY, VARIANT_SHARE, []),
        (HEALTHY, 0.31, ["vocabulary: 31% of the terms"]),
        (with_document(special_share=0.8), 0.0, ["sink: special tokens win 80% of the pooled mass"]),
        (replace(HEALTHY, loss_over_ln_n=9.0), 0.0, ["scale: the contrastive loss starts at 9 x ln 32"]),
        (replace(with_document(special_share=0.6), loss_over_ln_n=9.0), 0.5, ["scale:", "vocabulary:", "sink:"]),
    ],
)
def test_every_suspect_is_named(output: OutputStatistics, variants: float, expected: list[str]) -> None:
    found = causes(judge(output, curve(0.4)), output, words(variants))
    assert len(found) == len(expected)
    assert all(sentence.startswith(start) for sentence, start in zip(found, expected, strict=True))


def test_causes_of_weights_alone() -> None:
    assert causes(judge(None, None), None, None) == []
    assert causes(judge(None, None), None, words(0.4))[0].startswith("vocabulary")
