"""The verdict of a trial: what the steps so far say of the full run. All of its rules, and all their thresholds.

A run fails in one of two ways (reports/study.md). An *overloaded* head puts out scores so large and so much alike that
the run is over before its weights have moved far enough to bring them down; how far they will move is known early,
since AdamW's relative step hardly changes. A *fading* one starts sparse and too high, and its terms go out before the
loss is down; what counts is the loss that each of the few remaining terms has to work off.

A verdict looks at a prefix of the run only, as means over its last steps. Steps are counted by the share of the full
run's summed learning rate that they have used; before `decide_share` of it, all but an outright failure is
`inconclusive`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from headscale.diagnosis import LOSS_CEILING
from headscale.records import Record, StepRecord, TrialVerdict

if TYPE_CHECKING:
    from headscale.recipes import TrainingConfig

WORDS = ("stable", "inconclusive", "dense", "degraded", "collapsed", "diverged")
"""Every verdict of a trial, the best first."""
FAILED = frozenset({"collapsed", "diverged"})
TRAINED = frozenset({"stable", "dense", "degraded"})


@dataclass(frozen=True)
class Rules(Record):
    """The thresholds of every rule; `ORIGINS` says where each comes from.

    Args:
        window_share, window_least, window_most: the last steps that are averaged, as a share of those done, and
            its bounds in steps.
        decide_share: of the full run's summed learning rate; before it only outright failures are called.
        signature_loss: |loss / ln N - 1| is at most this in a collapse.
        signature_accuracy: batch accuracy is at most this many times chance in a collapse.
        signature_cosine: documents are at least this much alike in a collapse.
        grown_loss: loss / ln N at least this, and at least this many times that of the first step: diverging.
        loaded_from: loss / ln N, in units of the scores themselves, up to which nothing is overloaded.
        statistic: what tells a run that will train from one that will fail, once `decide_share` is over.
        fails_from, trains_to: its values from which on the run fails, and up to which it trains; what lies
            between is `inconclusive`. Where small values are the bad ones, `fails_from` is below `trains_to`.
        fading_dims: active dims of a query below which the fading rule decides instead.
        fading_statistic, fading_fails_from, fading_trains_to: the same where queries have so few terms.
        settle_share: of the summed learning rate; before it neither `dense` nor `degraded` is called.
        dense_share: active dims of a document over the vocabulary, from which on it is `dense`.
        degraded_accuracy: batch accuracy below which a run that trains is `degraded`.
    """

    window_share: float = 0.2
    window_least: int = 3
    window_most: int = 20
    decide_share: float = 0.10
    signature_loss: float = 0.05
    signature_accuracy: float = 2.0
    signature_cosine: float = 0.9
    grown_loss: float = 2.0
    loaded_from: float = LOSS_CEILING
    statistic: str = "overload"
    fails_from: float = 9.50
    trains_to: float = 7.57
    fading_dims: float = 30.0
    fading_statistic: str = "loss_per_term"
    fading_fails_from: float = 0.160
    fading_trains_to: float = 0.137
    settle_share: float = 0.5
    dense_share: float = 0.0815
    degraded_accuracy: float = 0.461


_FITTED = "fitted on all cells of the study by `benchmarks/study_verdict.py judge` (reports/study.md)"
ORIGINS: dict[str, str] = {
    "window_share": "convention: the last fifth of the steps so far",
    "window_least": "convention: three steps at least",
    "window_most": "convention: twenty steps at most",
    "decide_share": "the bar that the study holds the verdict to",
    "signature_loss": "collapsed runs settle at ln N to two digits",
    "signature_accuracy": "chance is 1 / N; twice it leaves room for a batch's noise",
    "signature_cosine": "failed runs end at .94 to .97, or empty (reports/study.md); alone it decides nothing",
    "grown_loss": "definition: worse than at the first step and than chance by this factor",
    "loaded_from": "the loss from which `inspect` calls a head too high (reports/study.md)",
    "statistic": "of five, the best or near it on cells that were not fitted to (reports/study.md)",
    "fails_from": _FITTED,
    "trains_to": _FITTED,
    "fading_dims": "a trained query has 30 to 50 active dims (sentence-transformers' guide to sparse encoders)",
    "fading_statistic": "of two, the best on cells that were not fitted to (reports/study.md)",
    "fading_fails_from": _FITTED,
    "fading_trains_to": _FITTED,
    "settle_share": "lambda has its final value there, and words were as often right as at the end (reports/study.md)",
    "dense_share": _FITTED,
    "degraded_accuracy": _FITTED,
}
"""Where each threshold comes from; those of the study move only with its cells."""

RULES = Rules()


def means(steps: Sequence[StepRecord], config: TrainingConfig, rules: Rules = RULES) -> dict[str, float]:
    """Means over the last steps of what the rules look at, of what is finite, and what they make of them.

    Args:
        steps: a prefix of a run.
        config: of the run.
        rules: how many steps count.

    Returns:
        by name, NaN for what was never observed. `reach` is how far the head's matrix would move over the full run,
        in its own norms, at the present relative step; `overload` is ln(sd of the scores) / reach, the factors of e
        that the scores are above 1 over the head's own lengths to bring them down, and 0 where temperature x loss is
        below `loaded_from` already; `loss_per_term` is loss / ln N over the active dims of a query.
    """
    count = min(max(rules.window_least, math.ceil(rules.window_share * len(steps))), rules.window_most)
    window = steps[-count:]
    found = {name: _mean([getattr(record, name) for record in window]) for name in STATISTICS}
    spread, terms, reach = found["score_sd"], found["active_dims_query"], _reach(window, config)
    return {
        **found,
        "margin_over_sd": found["score_margin"] / spread if spread else 0.0,
        "loss_per_term": found["loss_over_ln_n"] / terms if terms else math.inf,
        "reach": reach,
        "overload": _overload(config.temperature * found["loss_over_ln_n"], spread, reach, rules),
    }


def _overload(loss: float, spread: float, reach: float, rules: Rules) -> float:
    if loss <= rules.loaded_from:
        return 0.0
    return math.nan if math.isnan(spread) or not reach > 0 else math.log(max(1.0, spread)) / reach


def _reach(window: Sequence[StepRecord], config: TrainingConfig) -> float:
    """The sum of ||dW|| / ||W|| over the full run, from the mean of what each unit of the learning rate moves."""
    schedule = config.schedule()
    pairs = [(record.update_ratio, schedule.lr_factor(record.step)) for record in window]
    return _mean([ratio / factor for ratio, factor in pairs if ratio is not None and factor > 0]) * schedule.lr_sum()


STATISTICS = ("loss_over_ln_n", "batch_accuracy", "cosine_document", "cosine_query", "score_sd", "score_margin",
              "active_dims_query", "active_dims_document", "grad_norm", "saturation", "update_ratio")  # fmt: skip
LOW_IS_BAD = frozenset({"batch_accuracy", "margin_over_sd", "reach"})


def _mean(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None and math.isfinite(value)]
    return math.fsum(known) / len(known) if known else math.nan


def forecast_of(rules: Rules, seen: Mapping[str, float]) -> tuple[str, float, float]:
    """The statistic that decides for these means, from which value a run fails and up to which it trains."""
    if seen["active_dims_query"] < rules.fading_dims:
        return rules.fading_statistic, rules.fading_fails_from, rules.fading_trains_to
    return rules.statistic, rules.fails_from, rules.trains_to


@dataclass(frozen=True)
class Clock:
    """How far into the full run a number of steps is.

    Args:
        config: the run.
    """

    config: TrainingConfig

    def share(self, steps: int) -> float:
        """Of the full run's summed learning rate."""
        schedule = self.config.schedule()
        total = schedule.lr_sum()
        return schedule.lr_sum(steps) / total if total else 1.0

    def ramp_is_over(self, steps: int) -> bool:
        """Whether lambda has its final value."""
        return self.config.schedule().lambda_factor(steps) >= 1.0

    def steps_for(self, share: float) -> int:
        """The fewest steps that use this share."""
        schedule = self.config.schedule()
        goal = share * schedule.lr_sum()
        done = 0.0
        for step in range(schedule.total):
            done += schedule.lr_factor(step)
            if done >= goal:
                return step + 1
        return schedule.total


class Watch:
    """Judges a run while it goes on: call it with every record; `verdict` is what it says so far.

    Args:
        config: the run.
        candidates: N of the contrastive loss.
        vocab_size: terms of the vocabulary.
        rules: the thresholds.
    """

    def __init__(self, config: TrainingConfig, *, candidates: int, vocab_size: int, rules: Rules = RULES) -> None:
        self.clock = Clock(config)
        self.candidates = candidates
        self.vocab_size = vocab_size
        self.rules = rules
        self.steps: list[StepRecord] = []
        self.trains = False  # the forecast said so: from then on a failure has to show itself
        self.verdict = _inconclusive("nothing was seen yet", 0.0)

    def __call__(self, record: StepRecord) -> TrialVerdict:
        """The verdict with this record; one that is certain stays."""
        self.steps.append(record)
        if not self.verdict.certain:
            found = self._judge()
            same = found.word == self.verdict.word and len(self.steps) > 1
            before = self.verdict
            share = before.lr_share if same else self.clock.share(len(self.steps))
            self.verdict = replace(found, step=before.step if same else len(self.steps), lr_share=share)
        return self.verdict

    def _judge(self) -> TrialVerdict:
        seen = means(self.steps, self.clock.config, self.rules)
        share = self.clock.share(len(self.steps))
        outright = self._non_finite() or self._grown(seen)
        if outright is not None:
            return outright
        rules = self.rules
        if share < rules.decide_share:
            sentence = f"{share:.1%} of the full run's summed learning rate are used; {rules.decide_share:.0%} decide"
            return _inconclusive(sentence, share, rules.decide_share)
        return self._signature(seen) or self._forecast(seen, share)

    def _non_finite(self) -> TrialVerdict | None:
        last = self.steps[-self.rules.window_least :]
        bad = sum(not math.isfinite(record.loss) for record in last)
        weights = not math.isfinite(last[-1].head_norm)
        if not weights and bad < self.rules.window_least:
            return None
        sentence = "the head's weights are not finite" if weights else f"the loss of the last {bad} steps is not finite"
        return _certain("diverged", "non-finite", "loss", math.nan, None, sentence)

    def _grown(self, seen: dict[str, float]) -> TrialVerdict | None:
        if len(self.steps) < 2 * self.rules.window_least:
            return None
        loss, start = seen["loss_over_ln_n"], self.steps[0].loss_over_ln_n
        if not loss >= self.rules.grown_loss * max(1.0, start):
            return None
        sentence = f"the loss grew from {start:.3g} to {loss:.3g} x ln N"
        return _certain("diverged", "grown", "loss_over_ln_n", loss, self.rules.grown_loss * max(1.0, start), sentence)

    def _signature(self, seen: dict[str, float]) -> TrialVerdict | None:
        """ln N, chance, and vectors that are all alike or all empty: nothing is left to learn from."""
        rules, loss, accuracy = self.rules, seen["loss_over_ln_n"], seen["batch_accuracy"]
        cosines = seen["cosine_query"], seen["cosine_document"]
        empty = any(math.isnan(cosine) for cosine in cosines)  # fewer than two texts have an active term
        alike = empty or max(cosines) >= rules.signature_cosine
        limit = rules.signature_accuracy / self.candidates
        if not (abs(loss - 1) <= rules.signature_loss and accuracy <= limit and alike):
            return None
        how = "nearly all texts are empty" if empty else f"texts have cosine {max(cosines):.2f}"
        sentence = (
            f"the loss sits at {loss:.3f} x ln N, {accuracy:.1%} of the positives win their batch (chance is "
            f"{1 / self.candidates:.1%}) and {how}"
        )
        return _certain("collapsed", "signature", "batch_accuracy", accuracy, limit, sentence)

    def _forecast(self, seen: dict[str, float], share: float) -> TrialVerdict:
        rules = self.rules
        statistic, fails_from, trains_to = forecast_of(rules, seen)
        rule = "fading" if seen["active_dims_query"] < rules.fading_dims else "forecast"
        value = seen[statistic]
        sign = -1 if statistic in LOW_IS_BAD else 1
        told = f"{statistic} is {value:.3g} at {share:.0%} of the summed learning rate"
        if rule == "fading":
            told += f", with {seen['active_dims_query']:.0f} active dims per query"
        if math.isnan(value):
            return _inconclusive(f"{statistic} was not observed", value, trains_to, rule=rule, statistic=statistic)
        if self.trains or sign * value <= sign * trains_to:  # the thresholds are those of the time of the decision
            self.trains = True
            return self._trains(seen, share, _open("stable", rule, statistic, value, trains_to, told))
        if sign * value >= sign * fails_from:
            return _certain(
                "collapsed", rule, statistic, value, fails_from, f"{told}; from {fails_from:.3g} on runs fail"
            )
        sentence = f"{told}, between what trains ({trains_to:.3g}) and what fails ({fails_from:.3g})"
        return _inconclusive(sentence, value, trains_to, rule=rule, statistic=statistic)

    def _trains(self, seen: dict[str, float], share: float, stable: TrialVerdict) -> TrialVerdict:
        """`stable` as it was told, unless enough of the run is over to call it dense or degraded."""
        rules = self.rules
        if not (share >= rules.settle_share and self.clock.ramp_is_over(len(self.steps) - 1)):
            sentence = f"{stable.evidence}, as in runs that train; too early to judge sparsity and quality"
            return replace(stable, evidence=sentence, undecided=("degraded", "dense"))
        dims = seen["active_dims_document"] / self.vocab_size
        accuracy = seen["batch_accuracy"]
        if dims >= rules.dense_share:
            sentence = f"documents have {seen['active_dims_document']:,.0f} active dims, {dims:.1%} of the vocabulary"
            return _open("dense", "dense", "active_dims_document", dims, rules.dense_share, sentence)
        if accuracy <= rules.degraded_accuracy:
            sentence = f"{accuracy:.1%} of the positives win their batch at {share:.0%} of the summed learning rate"
            return _open("degraded", "degraded", "batch_accuracy", accuracy, rules.degraded_accuracy, sentence)
        sentence = (
            f"{stable.evidence}; {dims:.1%} of the vocabulary active per document; {accuracy:.1%} win their batch"
        )
        return replace(stable, rule="settled", evidence=sentence)


def judge_run(
    steps: Sequence[StepRecord], config: TrainingConfig, *, candidates: int, vocab_size: int, rules: Rules = RULES
) -> TrialVerdict:
    """The verdict after these steps, as a `Watch` that saw them one by one would give it.

    Args:
        steps: a prefix of a run, from its first step.
        config: of the run.
        candidates: N of the contrastive loss.
        vocab_size: terms of the vocabulary.
        rules: the thresholds.
    """
    watch = Watch(config, candidates=candidates, vocab_size=vocab_size, rules=rules)
    for record in steps:
        watch(record)
    return watch.verdict


def worst(verdicts: Sequence[TrialVerdict]) -> TrialVerdict:
    """The verdict that counts over seeds."""
    return max(verdicts, key=lambda verdict: WORDS.index(verdict.word))


def _certain(
    word: str, rule: str, statistic: str, value: float, threshold: float | None, sentence: str
) -> TrialVerdict:
    return TrialVerdict(word, rule, statistic, value, threshold, 0, 0.0, True, (), sentence)


def _open(word: str, rule: str, statistic: str, value: float, threshold: float, sentence: str) -> TrialVerdict:
    return TrialVerdict(word, rule, statistic, value, threshold, 0, 0.0, False, (), sentence)


def _inconclusive(
    sentence: str, value: float, threshold: float | None = None, *, rule: str = "horizon", statistic: str = "lr_share"
) -> TrialVerdict:
    others = tuple(word for word in WORDS if word != "inconclusive")
    return TrialVerdict("inconclusive", rule, statistic, value, threshold, 0, 0.0, False, others, sentence)
