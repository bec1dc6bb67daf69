"""What trainings have in common: everything but backbone, constant and seed that decides them, in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any

from headscale.recipes import TrainingConfig
from headscale.results import Results, Training

_NOT_RECIPE = frozenset({"scale", "seed", "device", "micro_batch", "update_every"})
_OF_HEAD = frozenset({"mode", "head_lr_multiplier", "scale_bias", "shift"})
_SHOWN = ("steps", "horizon", "batch_size", "lr")
_SAID = {"head_lr_multiplier": "head lr", "batch_size": "batch"}
_DEFAULTS = {f.name: f.default for f in fields(TrainingConfig) if f.default is not MISSING}


@dataclass(frozen=True)
class Member:
    """A training in a recipe: everything but backbone, constant and seed that decides it, in words."""

    training: Training
    recipe: str
    setting: str


def members(results: Results) -> list[Member]:
    """Every training whose configuration is known, in each recipe that it belongs to.

    An untouched head has neither a mode nor a learning rate of its own: it belongs to every recipe that agrees in the
    rest, and so does one whose logits were shifted and nothing else, beside the constants written in the same mode.
    Recipes with most constants and backbones come first.
    """
    known = [t for t in results.trainings if "lr" in t.training]
    settings = [_settings(t) for t in known]
    names = set.intersection(*(set(s) for s in settings)) if settings else set()
    rest = sorted(n for n in names - _OF_HEAD if len({repr(s[n]) for s in settings}) > 1)
    usual = _usual(settings, [*rest, "scale_bias", "shift"])
    groups: dict[tuple[str, ...], dict[str, None]] = {}
    scaled = [s for t, s in zip(known, settings, strict=True) if not (is_untouched(t) or is_shifted_alone(t))]
    for own in scaled:
        groups.setdefault(_repr(own, rest), {})[_recipe(own, usual, head=True)] = None
    found = []
    for training, own in zip(known, settings, strict=True):
        mine = _recipe(own, usual, head=not is_untouched(training))
        beside = groups.get(_repr(own, rest), {}) if is_untouched(training) else {}
        if is_shifted_alone(training):
            beside = {text: None for text in groups.get(_repr(own, rest), {}) if text.startswith(f"{own['mode']}, ")}
        found += [Member(training, text, _setting(own)) for text in beside or {mine: None}]
    return _by_size(found)


def _usual(settings: Sequence[dict[str, Any]], names: Sequence[str]) -> dict[str, str]:
    """The most common value of each field, as its repr."""
    return {
        n: Counter(repr(s[n]) for s in settings).most_common(1)[0][0] for n in names if settings and n in settings[0]
    }


def _recipe(own: dict[str, Any], usual: dict[str, str], *, head: bool) -> str:
    """How the head is treated, and what else is unusual."""
    words = [_word(n, own[n]) for n in ("mode", "head_lr_multiplier") if head and n in own]
    unusual = (n for n in usual if repr(own[n]) != usual[n] and (head or n not in _OF_HEAD))
    return ", ".join([*words, *(_word(n, own[n]) for n in unusual)])


def _setting(own: dict[str, Any]) -> str:
    """The training in short, for a title."""
    shown = [n for n in _SHOWN if own.get(n) is not None and not (n == "horizon" and own.get("compressed"))]
    words = {n: _word(n, own[n]) for n in shown}
    if own.get("compressed"):
        words["steps"] += ", the whole schedule"
    elif "horizon" in words and "steps" in words:
        words["steps"] += f" of {words.pop('horizon')}"
    return ", ".join(words.values())


def _settings(training: Training) -> dict[str, Any]:
    values = training.training if training.row else {**_DEFAULTS, **training.training}
    return {n: v for n, v in values.items() if n not in _NOT_RECIPE}


def is_untouched(training: Training) -> bool:
    """Whether the head was left as the model has it."""
    return training.training.get("mode") == "none"


def is_shifted_alone(training: Training) -> bool:
    """Whether the level of the logits was moved, and neither the scale nor the head's learning rate."""
    own = training.training
    return bool(own.get("shift")) and own.get("scale") == 1.0 and own.get("head_lr_multiplier", 1.0) == 1.0


def _repr(values: dict[str, Any], names: Iterable[str]) -> tuple[str, ...]:
    return tuple(repr(values[n]) for n in names)


def _word(name: str, value: Any) -> str:
    """A field of a training as people say it: `head lr 4x`, `lr 0.0003`."""
    if name == "mode":
        return str(value)
    if name == "scale_bias":
        return "bias scaled" if value else "bias kept"
    said = _SAID.get(name, name.replace("_", " "))
    number = f"{value:.3g}" if isinstance(value, float) else str(value)
    if name == "horizon":
        return number
    if name == "steps":
        return f"{number} steps"
    return f"{said} {number}{'x' if name == 'head_lr_multiplier' else ''}"


def _by_size(found: list[Member]) -> list[Member]:
    points: dict[str, set[tuple[str, float]]] = {}
    for m in found:
        points.setdefault(m.recipe, set()).add((m.training.backbone, m.training.training["scale"]))
    count = {recipe: sum(m.recipe == recipe for m in found) for recipe in points}
    return sorted(found, key=lambda m: (-len(points[m.recipe]), -count[m.recipe], m.recipe))
