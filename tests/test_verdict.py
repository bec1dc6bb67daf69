"""Verdicts: each rule alone on made-up steps, prefixes only, and the counting and fitting behind the thresholds."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import numpy as np
import pytest
from scipy.stats import binomtest

from headscale.labels import (
    DENSE_SHARE,
    FADING,
    FORECASTS,
    OTHERS,
    Score,
    best_of_groups,
    choose,
    fit,
    fit_split,
    label_of,
    score,
    splits_of,
    wilson,
)
from headscale.recipes import TrainingConfig
from headscale.records import StepRecord, SweepRow
from headscale.verdict import (
    FAILED,
    LOW_IS_BAD,
    ORIGINS,
    RULES,
    TRAINED,
    WORDS,
    Clock,
    Rules,
    Watch,
    judge_run,
    means,
    worst,
)

FULL = TrainingConfig(steps=100, batch_size=32, lr=3e-4)
VOCAB, N = 1000, 32
OWN = Rules(statistic="loss_over_ln_n", fails_from=4.0, trains_to=2.0, settle_share=0.5, dense_share=0.1,
            degraded_accuracy=0.3, fading_statistic="loss_over_ln_n", fading_fails_from=1.4,
            fading_trains_to=1.1)  # fmt: skip
DECIDED = Clock(FULL).steps_for(OWN.decide_share)


def step(number: int, **values: float | None) -> StepRecord:
    given = {
        "loss": 1.0, "loss_over_ln_n": 1.0, "batch_accuracy": 0.5, "cosine_document": 0.5, "cosine_query": 0.5,
        "score_sd": 1.0, "score_margin": 1.0, "active_dims_document": 50.0, "active_dims_query": 40.0,
        "head_norm": 10.0, "grad_norm": 1.0, "update_ratio": 0.01,
        "skipped": False, "non_finite": 0, "memory": 0, **values,
    }  # fmt: skip
    return StepRecord(**{f.name: given.get(f.name, 0.0) for f in fields(StepRecord)} | {"step": number})  # type: ignore[arg-type]


def run_of(count: int, **values: float | None) -> list[StepRecord]:
    return [step(i, **values) for i in range(count)]


def verdict_of(steps: list[StepRecord], rules: Rules = OWN, config: TrainingConfig = FULL):
    return judge_run(steps, config, candidates=N, vocab_size=VOCAB, rules=rules)


def test_every_threshold_has_an_origin():
    assert set(ORIGINS) == {f.name for f in fields(Rules)}
    assert all(ORIGINS.values())
    assert "preliminary" not in set(ORIGINS.values())


def test_the_words_are_the_closed_list():
    assert set(WORDS) == {"stable", "degraded", "diverged", "collapsed", "dense", "inconclusive"}
    assert FAILED | TRAINED | {"inconclusive"} == set(WORDS)
    assert RULES.statistic in FORECASTS
    assert RULES.fading_statistic in FADING
    assert {*FORECASTS, *OTHERS} >= LOW_IS_BAD


# --- the clock -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [0, 1, 7, 10, 55, 100])
def test_the_share_is_that_of_summed_learning_rates(steps):
    """Against the ratio written out: 10 steps of warmup from 0, then linear to 0."""
    factors = [i / 10 if i < 10 else (100 - i) / 90 for i in range(100)]
    assert Clock(FULL).share(steps) == pytest.approx(sum(factors[:steps]) / sum(factors), abs=1e-12)


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.999])
def test_steps_for_a_share_are_the_fewest(share):
    clock = Clock(FULL)
    count = clock.steps_for(share)
    assert clock.share(count) >= share > clock.share(count - 1)


# --- the rules -----------------------------------------------------------------------------------------------------


def test_before_the_deciding_share_nothing_but_failure_is_called():
    early = verdict_of(run_of(DECIDED - 1))
    assert (early.word, early.rule, early.certain) == ("inconclusive", "horizon", False)
    assert verdict_of(run_of(DECIDED)).word == "stable"


def test_the_share_is_of_the_full_run_not_of_the_trial():
    first = FULL.replace(steps=20, horizon=1000)
    assert verdict_of(run_of(20), config=first).word == "inconclusive"
    assert verdict_of(run_of(20), config=first.replace(compressed=True)).word == "stable"


COLLAPSED = {"loss_over_ln_n": 1.01, "batch_accuracy": 1 / 32, "cosine_document": 0.99}


def test_the_signature_of_collapse_is_certain_once_enough_was_seen():
    """Before: a head with a tiny constant starts at ln N as well, and trains."""
    assert verdict_of(run_of(DECIDED - 1, **COLLAPSED)).word == "inconclusive"
    found = verdict_of(run_of(DECIDED, **COLLAPSED))
    assert (found.word, found.rule, found.certain, found.step) == ("collapsed", "signature", True, DECIDED)
    assert "0.99" in found.evidence


@pytest.mark.parametrize(
    "healthy", [{"loss_over_ln_n": 0.9}, {"batch_accuracy": 0.2}, {"cosine_document": 0.6}, {"loss_over_ln_n": 1.2}]
)
def test_the_signature_needs_all_of_its_parts(healthy):
    assert verdict_of(run_of(DECIDED, **{**COLLAPSED, **healthy})).word == "stable"


@pytest.mark.parametrize("side", ["query", "document"])
def test_texts_that_are_empty_count_as_alike(side):
    nothing = {"loss_over_ln_n": 1.0, "batch_accuracy": 0.0, f"cosine_{side}": None}
    found = verdict_of(run_of(DECIDED, **nothing))
    assert (found.word, found.rule) == ("collapsed", "signature")
    assert "empty" in found.evidence


@pytest.mark.parametrize(("loss", "word"), [(1.0, "stable"), (1.2, "inconclusive"), (1.5, "collapsed")])
def test_queries_that_go_out_are_judged_by_a_loss_of_their_own(loss, word):
    found = verdict_of(run_of(DECIDED, loss_over_ln_n=loss, active_dims_query=9.0))
    assert (found.word, found.rule) == (word, "fading")
    assert verdict_of(run_of(DECIDED, loss_over_ln_n=loss, active_dims_query=90.0)).word == "stable"


def test_one_infinite_loss_is_not_yet_divergence_and_three_are():
    steps = run_of(20)
    steps[10] = replace(steps[10], loss=math.inf, loss_over_ln_n=math.inf)
    assert "diverged" not in {verdict_of(steps[:n]).word for n in (11, 12, 13)}
    steps[11], steps[12] = (replace(s, loss=math.nan, loss_over_ln_n=math.nan) for s in steps[11:13])
    found = verdict_of(steps[:13])
    assert (found.word, found.rule, found.certain) == ("diverged", "non-finite", True)


def test_weights_that_are_not_numbers_are_divergence_at_once():
    steps = run_of(4)
    steps[3] = replace(steps[3], head_norm=math.nan)
    assert verdict_of(steps).word == "diverged"


def test_a_loss_that_doubles_above_chance_diverges_and_a_falling_one_does_not():
    rising = [step(i, loss_over_ln_n=3.0 + 2 * i) for i in range(8)]
    falling = [step(i, loss_over_ln_n=100.0 - 10 * i) for i in range(8)]
    assert verdict_of(rising).word == "diverged"
    assert verdict_of(falling).word == "inconclusive"


def test_the_forecast_fails_trains_or_abstains():
    words = {loss: verdict_of([step(0, loss_over_ln_n=50.0), *run_of(DECIDED, loss_over_ln_n=loss)[1:]])
             for loss in (1.9, 2.1, 3.9, 4.1)}  # fmt: skip
    assert [v.word for v in words.values()] == ["stable", "inconclusive", "inconclusive", "collapsed"]
    assert words[4.1].certain
    assert words[4.1].threshold == 4.0
    assert words[1.9].undecided == ("degraded", "dense")


def test_where_low_is_bad_the_forecast_turns_around():
    rules = replace(OWN, statistic="batch_accuracy", fails_from=0.1, trains_to=0.2)
    words = [verdict_of(run_of(DECIDED, batch_accuracy=a), rules).word for a in (0.05, 0.15, 0.25)]
    assert words == ["collapsed", "inconclusive", "stable"]


def test_an_undefined_statistic_decides_nothing():
    rules = replace(OWN, statistic="cosine_document", fails_from=0.9, trains_to=0.9)
    assert verdict_of(run_of(20, cosine_document=None), rules).word == "inconclusive"
    unseen = verdict_of(run_of(20, update_ratio=None, loss_over_ln_n=9.0), replace(OWN, statistic="overload"))
    assert (unseen.word, unseen.rule) == ("inconclusive", "forecast")


def test_reach_is_what_the_head_would_move_over_the_full_run():
    """Steps of 1 % of the norm at the peak of the learning rate, in proportion before and after."""
    factors = [i / 10 if i < 10 else (100 - i) / 90 for i in range(100)]
    steps = [step(i, update_ratio=0.01 * f, score_sd=math.e**2, loss_over_ln_n=5.0) for i, f in enumerate(factors)]
    for count in (DECIDED, 50, 90):
        seen = means(steps[:count], FULL)
        assert seen["reach"] == pytest.approx(0.01 * sum(factors))
        assert seen["overload"] == pytest.approx(2 / (0.01 * sum(factors)))
    longer = FULL.replace(horizon=1000, warmup_steps=10)
    assert means(steps[:11], longer)["reach"] == pytest.approx(0.01 * longer.schedule().lr_sum())
    high = {"score_sd": 50.0, "loss_over_ln_n": 9.0}
    assert means(run_of(20, **{**high, "score_sd": 0.5}), FULL)["overload"] == 0.0  # nothing to bring down
    assert means(run_of(20, **{**high, "loss_over_ln_n": 3.9}), FULL)["overload"] == 0.0  # it is down
    cooled = FULL.replace(temperature=10.0)
    assert means(run_of(20, **{**high, "loss_over_ln_n": 0.9}), cooled)["overload"] > 0.0  # the scores are not


def test_the_loss_per_term_of_queries_without_terms_is_endless():
    assert means(run_of(20, active_dims_query=0.0), FULL)["loss_per_term"] == math.inf
    assert means(run_of(20, active_dims_query=8.0, loss_over_ln_n=2.0), FULL)["loss_per_term"] == 0.25
    rules = replace(OWN, fading_statistic="loss_per_term", fading_fails_from=0.16, fading_trains_to=0.14)
    words = [verdict_of(run_of(DECIDED, active_dims_query=d), rules).word for d in (4.0, 6.7, 8.0)]
    assert words == ["collapsed", "inconclusive", "stable"]


def test_sparsity_and_quality_are_judged_late_only():
    late = Clock(FULL).steps_for(OWN.settle_share)
    dense = {"active_dims_document": 0.2 * VOCAB}
    assert verdict_of(run_of(late - 1, **dense)).word == "stable"
    assert verdict_of(run_of(late, **dense)).word == "dense"
    assert verdict_of(run_of(late, batch_accuracy=0.1)).word == "degraded"
    slow_ramp = FULL.replace(ramp_ratio=0.9)
    assert verdict_of(run_of(late, **dense), config=slow_ramp).word == "stable"


def test_only_steps_so_far_count():
    """The verdict after n steps is the same whatever follows."""
    fine, bad = run_of(60), run_of(60, loss_over_ln_n=30.0, batch_accuracy=0.0)
    watch = Watch(FULL, candidates=N, vocab_size=VOCAB, rules=OWN)
    online = [watch(record) for record in [*fine[:30], *bad[30:]]]
    for n in (5, 20, 30):
        assert online[n - 1] == verdict_of(fine[:n])


def test_the_step_is_where_the_word_began_to_hold():
    found = verdict_of(run_of(DECIDED + 5))
    assert found.step == DECIDED
    assert found.lr_share == pytest.approx(Clock(FULL).share(DECIDED))


def test_a_certain_verdict_stays():
    steps = [*run_of(DECIDED, **COLLAPSED), *run_of(40)[DECIDED:]]
    assert verdict_of(steps) == verdict_of(steps[:DECIDED])


def test_means_are_over_the_last_steps():
    values = np.arange(40.0)
    seen = means([step(i, grad_norm=v, cosine_query=None) for i, v in enumerate(values)], FULL)
    assert seen["grad_norm"] == pytest.approx(values[-8:].mean())
    assert math.isnan(seen["cosine_query"])


def test_the_worst_seed_counts():
    good, bad = verdict_of(run_of(20)), verdict_of(run_of(20, loss_over_ln_n=9.0))
    assert worst([good, bad, good]).word == "collapsed"
    assert worst([good, verdict_of(run_of(2))]).word == "inconclusive"


# --- labels --------------------------------------------------------------------------------------------------------


def row(**values: object) -> SweepRow:
    given: dict[str, object] = {
        "backbone": "b", "revision": None, "scale": 1.0, "mode": "untie", "head_lr_multiplier": 1.0, "lr": 3e-4,
        "temperature": 1.0, "lambda_query": 0.0, "lambda_document": 0.0, "warmup_ratio": 0.1, "seed": 0,
        "status": "done", "key": "k", "loss_end": 0.5, "head_norm_end": 1.0, "mrr_test": 0.4,
        "active_dims_document": 10.0, "vocab_size": VOCAB, **values,
    }  # fmt: skip
    return SweepRow(**given)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({}, "stable"),
        ({"mrr_test": 0.31}, "degraded"),
        ({"mrr_test": 0.05, "loss_end": 1.0}, "collapsed"),
        ({"mrr_test": 0.05, "loss_end": 30.0}, "diverged"),
        ({"head_norm_end": None}, "diverged"),
        ({"loss_end": None}, "diverged"),
        ({"active_dims_document": 1.01 * DENSE_SHARE * VOCAB}, "dense"),
        ({"mrr_test": 0.05, "active_dims_document": 900.0}, "collapsed"),
    ],
)
def test_labels_come_from_the_end(values, word):
    assert label_of(row(**values), 0.4).word == word


def test_the_yardstick_is_the_best_mean_over_seeds_of_the_group():
    cells = [row(scale=s, seed=seed, mrr_test=m) for s, seed, m in
             [(1, 0, 0.1), (2, 0, 0.9), (2, 1, 0.1), (4, 0, 0.6), (4, 1, 0.6), (8, 0, 0.2)]]  # fmt: skip
    lone = row(lr=1e-5, mrr_test=0.01)
    other = row(backbone="c", mrr_test=0.3)
    best = best_of_groups([*cells, lone, other], fallback_lr=3e-4)
    assert best == {("b", 3e-4): pytest.approx(0.6), ("b", 1e-5): pytest.approx(0.6), ("c", 3e-4): 0.3}


# --- counting ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("k", "n"), [(0, 5), (5, 5), (37, 40), (1, 3)])
def test_wilson_against_scipy(k, n):
    expected = binomtest(k, n).proportion_ci(method="wilson")
    assert wilson(k, n) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_wilson_of_nothing_says_nothing():
    assert wilson(0, 0) == (0.0, 1.0)


def test_the_score_counts_abstention_as_coverage():
    pairs = [("collapsed", "diverged")] * 3 + [("collapsed", "stable")] + [("stable", "stable")] * 5
    pairs += [("dense", "stable"), ("stable", "inconclusive"), ("degraded", "collapsed")]
    found = score(pairs)
    assert isinstance(found, Score)
    assert found.coverage == pytest.approx(11 / 12)
    assert found.balanced_accuracy == pytest.approx((3 / 4 + 6 / 7) / 2)
    assert sum(count for _, _, count in found.confusion) == 12
    low, high = found.interval
    assert low < found.balanced_accuracy < high


def test_the_score_without_one_of_the_classes_is_undefined():
    assert math.isnan(score([("stable", "stable")]).balanced_accuracy)


# --- fitting -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("statistic", ["loss_over_ln_n", "batch_accuracy"])
def test_the_fitted_threshold_is_the_best_of_all(statistic, seed):
    """Against every possible threshold, tried one by one."""
    source = np.random.default_rng(seed)
    sign = -1 if statistic in LOW_IS_BAD else 1
    failing, training = (source.lognormal(sign * shift, 1.0, 12) for shift in (0.7, -0.7))
    found = fit_split(statistic, failing, training)

    def accuracy(threshold: float) -> float:
        return float((sign * failing > sign * threshold).mean() + (sign * training <= sign * threshold).mean()) / 2

    tried = np.linspace(0, 1.01 * max(failing.max(), training.max()), 4000)
    for threshold in (found.fails_from, found.trains_to):  # between them lies no cell
        assert accuracy(threshold) == pytest.approx(found.balanced_accuracy)
    assert found.balanced_accuracy >= max(accuracy(t) for t in tried) - 1e-9
    assert sign * found.trains_to < sign * found.fails_from


def test_fitting_keeps_the_statistic_and_ranks_the_others():
    source = np.random.default_rng(0)
    labels = ["collapsed"] * 10 + ["stable"] * 10
    prefixes = [
        {
            **{name: float(source.lognormal()) for name in (*FORECASTS, *OTHERS)},
            "active_dims_query": 99.0,
            "cosine_query": 0.9 if bad else 0.4,
        }
        for bad in [True] * 10 + [False] * 10
    ]
    rules = fit(replace(OWN, statistic="cosine_query"), prefixes, labels)
    splits = splits_of(rules, prefixes, labels)
    assert rules.statistic == "cosine_query"
    assert math.log(rules.fails_from / 0.4) == pytest.approx(0.75 * math.log(0.9 / 0.4))  # the middle half abstains
    assert math.log(rules.trains_to / 0.4) == pytest.approx(0.25 * math.log(0.9 / 0.4))
    assert (rules.fading_fails_from, rules.fading_trains_to) == (OWN.fading_fails_from, OWN.fading_trains_to)
    assert (splits[0].statistic, splits[0].balanced_accuracy) == ("cosine_query", 1.0)
    assert fit(OWN, prefixes, labels).statistic == OWN.statistic
    assert rules.decide_share == OWN.decide_share


def test_runs_whose_terms_go_out_are_fitted_apart():
    """One threshold on the loss would not do: what fails there trains here."""
    few, many = {"active_dims_query": 9.0}, {"active_dims_query": 900.0}
    other = dict.fromkeys((*FORECASTS, *OTHERS), 1.0)
    cells = [(few, 0.8, "stable"), (few, 1.6, "collapsed"), (many, 15.0, "degraded"), (many, 60.0, "collapsed")]
    prefixes = [{**other, **dims, "loss_over_ln_n": loss} for dims, loss, _ in cells]
    rules = fit(OWN, prefixes, [label for _, _, label in cells])
    assert 0.8 < rules.fading_trains_to < rules.fading_fails_from < 1.6
    assert rules.statistic == "loss_over_ln_n"
    assert 15.0 < rules.trains_to < rules.fails_from < 60.0


def test_the_statistic_is_chosen_by_what_it_foretells_of_points_left_out():
    """`overload` separates every point; `score_sd` all but two, and chance the rest."""
    source = np.random.default_rng(1)
    cells, groups = [], []
    for point in range(12):
        bad = point % 2 == 0
        for _ in range(2):
            seen = {name: float(source.lognormal()) for name in (*FORECASTS, *OTHERS)}
            seen |= {"active_dims_query": 99.0, "overload": 50.0 if bad else 5.0 + point / 10}
            seen["score_sd"] = 100.0 if bad != (point in (3, 4)) else 1.0
            cells.append((seen, "collapsed" if bad else "stable"))
            groups.append(point)
    chosen = choose(OWN, cells, groups)
    assert chosen.statistic == "overload"
    assert 6.2 < chosen.trains_to < chosen.fails_from < 50.0
    assert chosen.fading_statistic == FADING[0]  # nothing tells the two apart: the simpler one
