"""What good looks like, and how to apply the constant: the parts of the page that say what to do."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from headscale.constants import ratio_text
from headscale.page.commands import calibrate_line, line
from headscale.page.story import Arm, arms_of, best_arm

if TYPE_CHECKING:
    from headscale.records import Calibration
    from headscale.results import Results

# Of most masked LMs; a calibration knows the names of its own head.
USUAL_HEAD = r"decoder\.(weight|bias)$"
# sentence-transformers' MS MARCO example, where no training says otherwise.
USUAL_LR = 2e-5
_GUIDE = "sentence-transformers' guide to sparse encoders"
_STUDY = "measured on two tiny backbones (reports/study.md)"


@dataclass(frozen=True)
class Band:
    """Where a statistic is in a run that is well."""

    when: str
    statistic: str
    good: str
    source: str


@dataclass(frozen=True)
class Application:
    """How to use one constant.

    Args:
        backbone: whose.
        choice: the pair in words.
        command: that writes the checkpoint.
        directory: that it writes.
        sentence_transformers: lines of Python.
        transformers: lines of Python.
        advice: sentences on lambda and the head's learning rate.
    """

    backbone: str
    choice: str
    command: str
    directory: str
    sentence_transformers: str
    transformers: str
    advice: tuple[str, ...]


def bands() -> tuple[Band, ...]:
    """What good looks like, each line with its source; numbers are those that the verdicts use."""
    from headscale.diagnosis import COSINE_CEILING, EMPTY_CEILING, LOSS_CEILING, SCORE_SD_FLOOR
    from headscale.tables.logs import HEALTHY_DIMS
    from headscale.verdict import RULES

    before, after = "before training", "after training"
    return (
        Band(before, "contrastive loss [ln N]", f"at most {LOSS_CEILING:g}; chance is 1", _STUDY),
        Band(before, "score sd", f"at least {SCORE_SD_FLOOR:g}", "definition: below it the softmax is flat"),
        Band(before, "cosine of unrelated documents", f"below {COSINE_CEILING:g}", "sentence-transformers issue 3431"),
        Band(
            before, "texts without an active term", f"at most {EMPTY_CEILING:.0%}", "definition: no term, no gradient"
        ),
        Band(before, "mass won by special tokens", "at most 50 %", "definition: more than all other tokens together"),
        Band(before, "largest score", "below 65,504", "the largest number of fp16"),
        Band(after, "contrastive loss [ln N]", "well below 1; a run that sits at 1 has collapsed", _STUDY),
        Band(after, "positives that win their batch", f"more than {RULES.degraded_accuracy:.0%}", _STUDY),
        Band(after, "active dims of a query", "30 to 50", _GUIDE),
        Band(after, "active dims of a document", f"{HEALTHY_DIMS[0]} to {HEALTHY_DIMS[1]}", _GUIDE),
        Band(after, "share of the vocabulary active", f"below {RULES.dense_share:.1%} of a document's terms", _STUDY),
    )


def applications(results: Results) -> tuple[Application, ...]:
    """How to use each constant that was chosen or that trained best; none where nothing was rescaled."""
    arms = {name: best_arm([a for a in groups[0] if not a.untouched]) for name, groups in arms_of(results).items()}
    lr = next((float(t.training["lr"]) for t in results.trainings if t.training.get("lr")), USUAL_LR)
    changed = [one for one in results.calibrations if one.scale is not None and (one.scale != 1 or one.shift)]
    found = {one.name: _of_calibration(one, lr) for one in changed}
    for name, arm in arms.items():
        if arm is not None and name not in found and name not in results.references and _changes(arm.training):
            found[name] = _of_training(name, arm, results)
    return tuple(found.values())


def _changes(training: dict[str, Any]) -> bool:
    return bool(training["scale"] != 1 or training.get("shift"))


def _change(scale: float, shift: float) -> str:
    """What is done to the head, in words."""
    steps = [f"add {shift:.4g} to the vocabulary bias"] if shift else []
    steps += [f"multiply the head by {ratio_text(scale)}"] if scale != 1 or not shift else []
    return ", then ".join(steps)


def _of_calibration(one: Calibration, lr: float) -> Application:
    directory = one.written.directory if one.written is not None else _directory(one.name)
    pattern = re.search(r'learning_rate_mapping=\{r"(.+?)":', " ".join(one.advice))
    head = pattern[1] if pattern else USUAL_HEAD
    untied = one.written is None or one.written.mode == "untie"
    multiplier = one.head_lr_multiplier if untied else 1.0
    lambdas = one.lambda_advice
    advice = []
    if lambdas.query and lambdas.document:
        advice.append(
            f"Lambda no longer means what it did: multiply it by {lambdas.query:.3g} for queries and by "
            f"{lambdas.document:.3g} for documents to start from the same regularization."
        )
    choice = f"{_change(one.scale or 1.0, one.shift)}, found by the target `{one.match}`"
    return _application(one.name, choice, calibrate_line(one, directory), directory, multiplier, lr, head, advice)


def _of_training(name: str, arm: Arm, results: Results) -> Application:
    training: dict[str, Any] = arm.training
    scale, shift, mode = float(training["scale"]), float(training.get("shift", 0.0)), str(training["mode"])
    directory = _directory(name)
    reference = next((r for r in results.references if r != name), None)
    command = line(
        "headscale", "calibrate", name, reference=reference, match="constant", k=1 / scale,
        shift=bool(shift), mode=mode if mode in ("untie", "fold") else None,
        no_scale_bias=not training.get("scale_bias", True), save=directory,
    )  # fmt: skip
    choice = f"{_change(scale, shift)}, which ranked best of what was trained"
    advice = [
        "Lambda no longer means what it did at the untouched scale: take the one of this training "
        f"({training['lambda_query']:g} for queries, {training['lambda_document']:g} for documents) or what "
        "`calibrate` prints."
    ]
    if shift:
        advice.append("`calibrate --shift` measures the shift anew: on other texts it differs a little from this one.")
    multiplier = float(training.get("head_lr_multiplier", 1.0))
    return _application(name, choice, command, directory, multiplier, float(training["lr"]), USUAL_HEAD, advice)


def _application(
    name: str, choice: str, command: str, directory: str, multiplier: float, lr: float, head: str, advice: list[str]
) -> Application:
    rate = f"{lr:g}"
    if multiplier == 1:
        pair = f"{choice}; the head trains at the encoder's learning rate"
    else:
        pair = f"{choice}; train the untied head at {multiplier:g} times the encoder's learning rate"
        advice.append("The learning rate of the head cannot live in a checkpoint: it goes into the training script.")
    return Application(
        name, pair, command, directory, _sentence_transformers(directory, rate, multiplier, head),
        _transformers(directory, rate, multiplier, head), tuple(advice),
    )  # fmt: skip


def _sentence_transformers(directory: str, rate: str, multiplier: float, head: str) -> str:
    lines = [
        "from sentence_transformers import SparseEncoder, SparseEncoderTrainingArguments",
        "",
        f"model = SparseEncoder({directory!r})",
        "arguments = SparseEncoderTrainingArguments(",
        f"    output_dir={directory + '-splade'!r},",
        f"    learning_rate={rate},",
    ]
    if multiplier != 1:
        lines.append(f'    learning_rate_mapping={{r"{head}": {multiplier:g} * {rate}}},')
    return "\n".join([*lines, ")"])


def _transformers(directory: str, rate: str, multiplier: float, head: str) -> str:
    lines = [
        "from transformers import AutoModelForMaskedLM",
        f"model = AutoModelForMaskedLM.from_pretrained({directory!r})",
    ]
    if multiplier == 1:
        return "\n".join(["import torch", *lines, f"optimizer = torch.optim.AdamW(model.parameters(), lr={rate})"])
    lines = [
        "import re",
        "import torch",
        *lines,
        "head, encoder = [], []",
        "for name, parameter in model.named_parameters():",
        f'    (head if re.search(r"{head}", name) else encoder).append(parameter)',
        f'groups = [{{"params": encoder, "lr": {rate}}}, {{"params": head, "lr": {multiplier:g} * {rate}}}]',
        "optimizer = torch.optim.AdamW(groups)",
    ]
    return "\n".join(lines)


def _directory(name: str) -> str:
    """Where the checkpoint goes: the backbone's last name with what was done to it."""
    last = re.sub(r"[^A-Za-z0-9._-]+", "-", name.removeprefix("bundled:").rstrip("/").split("/")[-1]).strip("-.")
    return f"{last or 'backbone'}-calibrated"
