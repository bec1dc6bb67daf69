"""The commands that make saved results again, from what their cells were computed from.

A training's command is only given where the program, asked that way, would plan exactly this training; a cell that no
command describes is run again from its own `cell.json`.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headscale.constants import ratio_text
from headscale.errors import HeadscaleError
from headscale.recipes import RECIPES, TrainingConfig
from headscale.trials import TextSource, planned, source_of, training_of

if TYPE_CHECKING:
    from headscale.records import Calibration, Evaluation, Target, TextSettings
    from headscale.results import Results

Configuration = dict[str, Any]

# Options of `trial` and `sweep` that change a recipe, with the value they have unasked (None: the recipe's).
_OPTIONS: dict[str, Any] = {
    "lr": None, "temperature": None, "lambda_query": None, "lambda_document": None, "batch_size": None,
    "micro_batch": None, "negatives": 0, "query_length": None, "document_length": None, "precision": "fp32",
    "device": "auto",
}  # fmt: skip
_ARM: dict[str, Any] = {"scale": 1.0, "mode": "none", "head_lr_multiplier": 1.0, "shift": 0.0}
_AGAIN = """python - <<'END'
import json, pathlib
from headscale.trials import run_cell
for cell in sorted(pathlib.Path({run!r}).rglob("trial-*/cell.json")):
    configuration = json.loads(cell.read_text())["configuration"]
    if "trainer" not in configuration:
        run_cell(configuration, pathlib.Path("headscale-again"))
END"""


def commands_for(results: Results, run: Path) -> tuple[str, ...]:
    """Every command that is needed to make these results again, in the order of the work.

    Args:
        results: what was read.
        run: where it lies, for trainings that only their own cells describe.
    """
    return (
        *_inspections(results),
        *(calibrate_line(one) for one in results.calibrations),
        *_trainings([one.configuration for one in results.trainings], run),
        *(evaluate_line(one) for one in results.evaluations),
    )


def line(*words: str, **options: Any) -> str:
    """A command line; an option that is None or False is left out, True is a flag, all else is quoted."""
    parts = [shlex.quote(word) for word in words]
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        if value is True:
            parts.append(flag)
        elif value is not None and value is not False:
            parts += [flag, shlex.quote(repr(value).removesuffix(".0") if isinstance(value, float) else str(value))]
    return " ".join(parts)


# --- measuring -----------------------------------------------------------------------------------------------------


def text_options(texts: TextSettings | None) -> dict[str, Any]:
    """The options that ask for these texts; None: for the weights alone."""
    if texts is None:
        return {"weights_only": True}
    return {
        "pairs": None if texts.source == "built-in" else texts.source,
        "num_pairs": None if texts.pairs == 128 else texts.pairs,
        "query_length": None if texts.query_length == 32 else texts.query_length,
        "document_length": None if texts.document_length == 128 else texts.document_length,
    }


def _inspections(results: Results) -> list[str]:
    """One command for all backbones that were measured alike, held against the reference among them."""
    groups: dict[str, list[str]] = {}
    reference = next((one.name for one in results.inspections if one.verdict.word == "reference"), None)
    for one in results.inspections:
        options = line(
            reference=reference, revision=_revision(one.revision, one.name), **text_options(one.texts),
            spectral=one.weights.singular_values is not None,
        )  # fmt: skip
        groups.setdefault(options, []).append(one.name)
    return [f"{line('headscale', 'inspect', *dict.fromkeys(names))} {options}" for options, names in groups.items()]


def calibrate_line(one: Calibration, save: str | None = None) -> str:
    """The command of a calibration, writing the checkpoint to `save` if that is given.

    From the weights alone nothing is written: the whole backbone is then loaded, and the same target asked for.
    """
    from headscale.calibration import HEAD_LR_MULTIPLIER, PAPER_K

    by_name = {target.name: target for target in one.targets}
    statistics = {name: by_name[name].statistic for name in ("norm", "activation", "score") if name in by_name}
    usual = {"norm": "frobenius", "activation": "mean_weight", "score": "score_sd"}
    k = by_name["constant"].target if "constant" in by_name else None
    usual_multiplier = HEAD_LR_MULTIPLIER if one.scale is not None and one.scale < 1 else 1.0
    options: dict[str, Any] = {
        "reference": one.reference,
        "match": one.match if one.match_reason == "as asked" or (one.texts is None and save) else None,
        **{name: value for name, value in statistics.items() if value != usual[name]},
        "k": None if k == PAPER_K else k,
        "ceiling": _ceiling(by_name),
        "no_snap": not one.snapped and one.match != "constant",
        "no_scale_bias": not one.scale_bias,
        "shift": one.shift != 0,
        # unasked, `auto` shifts what is too dense, where it sees that
        "no_shift": one.shift == 0 and one.match_reason != "as asked" and one.texts is not None,
        "head_lr_multiplier": None if one.head_lr_multiplier == usual_multiplier else one.head_lr_multiplier,
        "revision": _revision(one.revision, one.name),
        **({} if one.texts is None and save else text_options(one.texts)),
        "save": save,
    }
    return line("headscale", "calibrate", one.name, **options)


def _ceiling(targets: dict[str, Target]) -> float | None:
    from headscale.diagnosis import LOSS_CEILING

    given = targets["loss"].target if "loss" in targets else None
    return None if given == LOSS_CEILING else given


def _revision(revision: str | None, name: str) -> str | None:
    """A commit belongs to a hub id alone."""
    return None if name.startswith("bundled:") or Path(name).exists() else revision


def evaluate_line(one: Evaluation) -> str:
    """The command of an evaluation."""
    from headscale.collection import BUILT_IN
    from headscale.evaluation import BM25, Setup

    usual = Setup()
    own = one.collection.name == BUILT_IN
    options: dict[str, Any] = {
        "collection": None if own else one.collection.name,
        "split": None if one.collection.split == "test" else one.collection.split,
        **{n: getattr(one, n) for n in ("query_length", "document_length") if getattr(one, n) != getattr(usual, n)},
        "mask_special_tokens": one.mask_special_tokens,
        "pooling": None if one.pooling == "max" else one.pooling,
        "activation": None if one.activation == "relu" else one.activation,
        "queries": _queries(one),
        "quantize": ",".join(s.impacts.rounding for s in one.systems if s.impacts is not None) or None,
        "no_bm25": all(system.system != BM25 for system in one.systems),
        **{n: getattr(one, n) for n in ("resamples", "seed") if getattr(one, n) != getattr(usual, n)},
        "revision": _revision(one.revision, one.name),
    }
    return line("headscale", "evaluate", one.name, **options)


def _queries(one: Evaluation) -> str | None:
    """How to ask for the table that stood for the model on the query side, if one did."""
    from headscale.idf import OF_COLLECTION

    if one.queries == "model":
        return None
    return "idf" if one.queries == OF_COLLECTION else f"idf:{one.queries.strip('`')}"


# --- training ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Asked:
    """What several trainings share: what a user would type for all of them."""

    options: tuple[tuple[str, Any], ...]
    early: bool  # whether they end once the verdict is certain, as those of `trial` do unasked
    base: TrainingConfig  # the training without what an arm and a seed change


def _trainings(found: Sequence[Configuration], run: Path) -> list[str]:
    demo = [one for one in found if "texts" in one and _is_demo(one)]
    lines = [line("headscale", "demo", seeds=max(_seeds(demo)) + 1)] if demo else []
    groups: dict[_Asked, dict[str, list[TrainingConfig]]] = {}
    left = False
    for one in found:
        # A document's rows do not say what was trained on, and another trainer's run is not ours to ask for.
        if one in demo or "texts" not in one or "trainer" in one:
            continue
        asked = _asked(one)
        if asked is None:
            left = True
        else:
            groups.setdefault(asked, {}).setdefault(one["backbone"], []).append(training_of(one))
    for asked, backbones in groups.items():
        lines += _asking(asked, backbones)
    return [*lines, _AGAIN.format(run=str(run))] if left else lines


def _seeds(found: Iterable[Configuration]) -> list[int]:
    return [one["training"]["seed"] for one in found]


def _is_demo(one: Configuration) -> bool:
    from headscale.demo import CANDIDATES, FAILING, PACKAGES, REFERENCE, demo_config

    training = training_of(one)
    base = demo_config(training.seed).replace(**{name: getattr(training, name, value) for name, value in _ARM.items()})
    texts = TextSource(packages=PACKAGES, candidates=CANDIDATES, rank_dev=False)
    return one["backbone"] in (REFERENCE, FAILING) and training == base and source_of(one) == texts


def _asked(one: Configuration) -> _Asked | None:
    """How to ask for a training; None where no command plans it."""
    training, source = training_of(one), source_of(one)
    if source != TextSource(source.pairs, source.test_pairs, candidates=source.candidates) or training.horizon is None:
        return None
    base = training.replace(seed=0, **_ARM)
    plans: list[dict[str, Any]] = [found for name in RECIPES if (found := _by_recipe(name, base)) is not None]
    if not plans:
        return None
    options = {
        **sorted(plans, key=len)[0], "pairs": source.pairs, "test_pairs": source.test_pairs,
        "candidates": None if source.candidates == TextSource().candidates else source.candidates,
        "revision": one["revision"], "trust_remote_code": one["trust_remote_code"],
    }  # fmt: skip
    return _Asked(tuple(options.items()), one["stop_early"] is not None, base)


def _by_recipe(name: str, base: TrainingConfig) -> dict[str, Any] | None:
    """Options that plan the training from a recipe; None where there are none."""
    own = RECIPES[name].config
    changes = {
        option: getattr(base, option)
        for option, unasked in _OPTIONS.items()
        if getattr(base, option) != (getattr(own, option) if unasked is None else unasked)
    }
    always = {option: unasked for option, unasked in _OPTIONS.items() if unasked is not None}
    length = {"steps": base.steps, "horizon": base.horizon}
    try:
        plan = planned(name, {**always, **changes}, **length, compressed=base.compressed)
    except HeadscaleError:
        return None
    if plan.replace(**_ARM) != base:
        return None
    if own.steps == base.horizon:
        length.pop("horizon")
    return {"recipe": None if name == "st-mnrl" else name, **length, "compressed": base.compressed, **changes}


def _asking(asked: _Asked, backbones: dict[str, list[TrainingConfig]]) -> list[str]:
    """The commands for all trainings that are asked for alike: one sweep where they are a whole grid, else trials."""
    grids: dict[frozenset[TrainingConfig], list[str]] = {}
    for name, trainings in backbones.items():
        grids.setdefault(frozenset(trainings), []).append(name)
    lines = []
    for members, names in grids.items():
        swept = None if asked.early or dict(asked.options)["revision"] else _sweep(members, asked, names)
        lines += [swept] if swept else [command for name in names for command in _trials(members, asked, name)]
    return lines


def _sweep(members: frozenset[TrainingConfig], asked: _Asked, names: Sequence[str]) -> str | None:
    from headscale.grid import Axes

    ordered = sorted(members, key=lambda t: (t.mode == "none", t.scale, t.mode, t.head_lr_multiplier, t.seed))
    scaled = [t for t in ordered if t.mode != "none"]
    scales = tuple(dict.fromkeys(None if t.mode == "none" else t.scale for t in ordered))
    modes = tuple(dict.fromkeys(t.mode for t in scaled)) or ("untie",)
    multipliers = tuple(dict.fromkeys(t.head_lr_multiplier for t in scaled)) or (1.0,)
    seeds = tuple(range(1 + max(t.seed for t in ordered)))
    axes = Axes(scales, modes, multipliers, seeds=seeds)
    if frozenset(axes.trainings(asked.base)) != members:
        return None
    listed = ",".join("none" if scale is None else _exact(scale) for scale in scales)
    others = {"lrs" if name == "lr" else name: value for name, value in asked.options}
    options = {
        "scales": listed,
        "modes": None if modes == ("untie",) else ",".join(modes),
        "head_lr_multipliers": None if multipliers == (1.0,) else ",".join(f"{m:g}" for m in multipliers),
        "seeds": None if len(seeds) == 1 else len(seeds),
    }
    return line("headscale", "sweep", *names, **options, **others)


def _trials(members: frozenset[TrainingConfig], asked: _Asked, name: str) -> list[str]:
    arms: dict[TrainingConfig, list[int]] = {}
    for training in sorted(members, key=lambda t: (t.scale, t.seed)):
        arms.setdefault(training.replace(seed=0), []).append(training.seed)
    untouched = next((arm for arm in arms if arm.mode == "none"), None)
    lines: list[str] = []
    for arm, seeds in arms.items():
        if arm is untouched and len(arms) > 1:
            continue
        own: dict[str, Any] = {"scale": "none"}
        if arm.mode != "none":
            own = {"scale": _exact(arm.scale), "mode": None if arm.mode == "untie" else arm.mode}
            own |= {"head_lr_multiplier": arm.head_lr_multiplier if arm.head_lr_multiplier != 1 else None}
            own |= {"shift": arm.shift or None}
            own |= {"no_control": untouched is None or bool(lines)}
        own |= {"seeds": 1 + max(seeds) if max(seeds) else None, "full_length": not asked.early}
        lines.append(line("headscale", "trial", name, **own, **dict(asked.options)))
    return lines


def _exact(scale: float) -> str:
    """A constant as an option takes it, every digit of it."""
    text = ratio_text(scale)
    return text if "/" in text else repr(scale)
