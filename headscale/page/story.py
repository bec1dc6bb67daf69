"""What the saved results say, in sentences: the page's first lines."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from headscale.constants import ratio_text
from headscale.verdict import FAILED, WORDS

if TYPE_CHECKING:
    from headscale.records import Calibration, Inspection
    from headscale.results import Results, Training

_ARM = ("scale", "mode", "head_lr_multiplier", "shift")
MOST_SENTENCES = 6  # of single backbones; the table has them all


@dataclass(frozen=True)
class Arm:
    """Trainings that differ in their seed alone, all of them finished."""

    training: dict[str, Any]
    members: tuple[Training, ...]

    @property
    def untouched(self) -> bool:
        """Whether the head was left as it came."""
        return bool(self.training.get("mode") == "none")

    @property
    def name(self) -> str:
        """What was done to the head, in words."""
        if self.untouched:
            return "untouched"
        learning = self.training.get("head_lr_multiplier", 1.0)
        extra = f" with {learning:g} times the learning rate on the head" if learning != 1 else ""
        shift, scale = self.training.get("shift") or 0.0, self.training["scale"]
        parts = [f"its bias shifted by {shift:.3g}"] if shift else []
        parts += [f"multiplied by {ratio_text(scale)}"] if scale != 1 or not shift else []
        return f"{' and '.join(parts)} before training{extra}"

    @property
    def words(self) -> list[str]:
        """The verdict of every seed."""
        return [word for member in self.members if (word := word_of(member))]

    def mean(self, split: str) -> float | None:
        """Mean over seeds of MRR@10 on the `dev` or `test` pairs."""
        values = [value for member in self.members if (value := mrr_of(member, split)) is not None]
        return statistics.fmean(values) if values else None


def word_of(training: Training) -> str | None:
    """The verdict of a training that has one."""
    if training.cell is not None:
        return training.cell.verdict.word
    return None if training.row is None else training.row.verdict


def mrr_of(training: Training, split: str) -> float | None:
    """MRR@10 of a training on the `dev` or `test` pairs."""
    if training.row is not None:
        return training.row.mrr_dev if split == "dev" else training.row.mrr_test
    if training.cell is None:
        return None
    found = training.cell.dev if split == "dev" else training.cell.run.end.ranking
    return None if found is None else found.mrr_at_10


def arms_of(results: Results) -> dict[str, list[list[Arm]]]:
    """By backbone, the groups of finished arms that differ in nothing but the head, the largest group first."""
    found: dict[str, dict[tuple[Any, ...], dict[tuple[Any, ...], list[Training]]]] = {}
    for one in results.trainings:
        if one.status == "done":
            arm = tuple(one.training.get(name) for name in _ARM)
            base = tuple(sorted((k, str(v)) for k, v in one.training.items() if k not in (*_ARM, "seed")))
            found.setdefault(one.backbone, {}).setdefault(base, {}).setdefault(arm, []).append(one)
    return {
        backbone: sorted(
            ([Arm(members[0].training, tuple(members)) for members in arms.values()] for arms in bases.values()),
            key=lambda group: (not any(arm.untouched for arm in group), -sum(len(arm.members) for arm in group)),
        )
        for backbone, bases in found.items()
    }


def best_arm(arms: Iterable[Arm]) -> Arm | None:
    """The arm that ranks the development pairs best, the test pairs where there are no others."""
    known = [(score, arm) for arm in arms if (score := _chosen_by(arm)) is not None and math.isfinite(score)]
    return max(known, key=lambda pair: pair[0])[1] if known else None


def _chosen_by(arm: Arm) -> float | None:
    dev = arm.mean("dev")
    return arm.mean("test") if dev is None else dev


def verdict_sentence(results: Results) -> str:
    """The one sentence that the page opens with."""
    if results.empty:
        return "No result is finished yet."
    for told in (_of_trainings, _of_calibrations, _of_inspections, _of_evaluations):
        sentence = told(results)
        if sentence:
            return sentence
    return f"{_count(len(results.trainings), 'training')}, and none has finished."


def _of_trainings(results: Results) -> str:
    """What the constant did: of the backbone that has both arms, or of how many of several."""
    pairs = {name: _pair(groups[0]) for name, groups in arms_of(results).items() if name not in results.references}
    both = {name: pair for name, pair in pairs.items() if pair[0] and pair[1]}
    if len(both) == 1:
        return _trained_sentence(*next(iter(both.items())), note="")
    if both:
        failed = sum(any(word in FAILED for word in pair[0].words) for pair in both.values() if pair[0])
        trained = sum(set(pair[1].words) == {"stable"} for pair in both.values() if pair[1])
        return (
            f"Untouched, {failed} of {len(both)} backbones fail to train; with the start that ranks best, {trained} "
            f"of {len(both)} are stable in every seed."
        )
    judged = [word for one in results.trainings if one.status == "done" and (word := word_of(one))]
    sentences = trained_sentences(results)
    if len(sentences) == 1:
        return sentences[0]
    backbones = len({one.backbone for one in results.trainings if one.status == "done"})
    told = f"Of {_count(len(judged), 'training')} of {_count(backbones, 'backbone')}, {_tally(judged, WORDS)}."
    return told if judged else ""


def _of_calibrations(results: Results) -> str:
    matched = [one for one in results.calibrations if one.scale is not None]
    if len(results.calibrations) == 1:
        return calibrated_sentence(results.calibrations[0])
    count = _count(len(results.calibrations), "backbone")
    return f"A constant was found for {len(matched)} of {count}." if results.calibrations else ""


def _of_inspections(results: Results) -> str:
    others = [one for one in results.inspections if one.verdict.word != "reference"] or list(results.inspections)
    if len(others) == 1:
        return inspected_sentence(others[0])
    order = ("too high", "too low", "degenerate", "ok", "reference", "unjudged")
    tally = _tally([one.verdict.word for one in others], order)
    return f"Of {_count(len(others), 'backbone')}, {tally}." if others else ""


def _of_evaluations(results: Results) -> str:
    return " ".join(evaluated_sentences(results))


def further_sentences(results: Results) -> list[str]:
    """A sentence for each backbone and step of the work, but for the one that the page opens with."""
    found = [*trained_sentences(results), *(calibrated_sentence(one) for one in results.calibrations)]
    found += [inspected_sentence(one) for one in results.inspections]
    found += evaluated_sentences(results)
    opening = verdict_sentence(results)
    rest = [sentence for sentence in dict.fromkeys(found) if not sentence.startswith(opening)]
    left = len(rest) - MOST_SENTENCES
    return [*rest[:MOST_SENTENCES], f"The table has {left} more."] if left > 0 else rest


def trained_sentences(results: Results) -> list[str]:
    """For each backbone: what became of the untouched head, and of the best of the others."""
    sentences = []
    for backbone, groups in arms_of(results).items():
        scaled = sum(not arm.untouched for arm in groups[0])
        note = f" That start ranks best of {scaled} tried." if scaled > 1 else ""
        sentences.append(_trained_sentence(backbone, _pair(groups[0]), note=note))
    return [sentence for sentence in sentences if sentence]


def _pair(arms: Sequence[Arm]) -> tuple[Arm | None, Arm | None]:
    """The untouched arm, and the best of the others."""
    return next((arm for arm in arms if arm.untouched), None), best_arm([arm for arm in arms if not arm.untouched])


def _trained_sentence(backbone: str, pair: tuple[Arm | None, Arm | None], *, note: str) -> str:
    parts = [_became(arm) for arm in pair if arm is not None]
    return f"{_short(backbone)}: {'; '.join(parts)}.{note if pair[1] else ''}" if parts else ""


def _became(arm: Arm) -> str:
    words, score = arm.words, arm.mean("test")
    told = f"{arm.name}, {_tally(words, WORDS, of=len(words)) if words else 'without a verdict'}"
    return told + (f" (MRR@10 {score:.3f})" if score is not None else "")


def calibrated_sentence(one: Calibration) -> str:
    """What was chosen for a backbone, and what it does to the first step."""
    name = _short(one.name)
    if one.scale is None:
        return f"No constant is within reach for {name}: {one.verdict.evidence}."
    if one.before is None:
        how = "needs no constant" if one.scale == 1 else f"is to be multiplied by {ratio_text(one.scale)}"
        return f"{name} {how}, by the target `{one.match}`; its outputs were not seen."
    before = one.before.loss_over_ln_n
    after = None if one.after is None else one.after.loss_over_ln_n
    moved = "" if after is None else f": the loss at step 0 goes from {before:.3g} to {after:.3g} x ln N"
    if one.scale == 1 and not one.shift:
        return f"{name} needs no constant: the loss at step 0 is {before:.3g} x ln N."
    parts = [f"shifted by {one.shift:.3g}"] if one.shift else []
    parts += [f"multiplied by {ratio_text(one.scale)}"] if one.scale != 1 or not parts else []
    return f"{name}: its logits are to be {' and '.join(parts)}, by the target `{one.match}`{moved}."


def inspected_sentence(one: Inspection) -> str:
    """The verdict on a backbone with its evidence."""
    word = {"reference": "is the reference", "unjudged": "is not judged"}.get(
        one.verdict.word, f"is {one.verdict.word}"
    )
    return f"{_short(one.name)} {word}: {one.verdict.evidence}."


def evaluated_sentences(results: Results) -> list[str]:
    """How well each evaluated model ranks its collection, beside BM25."""
    sentences = []
    for one in results.evaluations:
        scores = {system.system: system.ndcg_at_10 for system in one.systems}
        told = [f"{_short(name)} {value.value:.3f}" for name, value in scores.items() if value is not None]
        if told:
            sentences.append(f"nDCG@10 on {one.collection.name}: {', '.join(told)}.")
    return sentences


def _tally(words: Sequence[str], order: Sequence[str], *, of: int | None = None) -> str:
    """How many of each word, in the order of their list: `3 stable, 2 collapsed`."""
    counts = Counter(words)
    known = [word for word in order if counts[word]]
    if of is not None:
        return ", ".join(f"{word} in {counts[word]} of {of}" if of > 1 else word for word in known)
    parts = [f"{counts[word]} {'is' if counts[word] == 1 else 'are'} {word}" for word in known]
    return ", ".join(parts)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _short(name: str) -> str:
    return name.removeprefix("bundled:")
