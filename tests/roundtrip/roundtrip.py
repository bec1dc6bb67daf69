"""Write calibrated checkpoints with one transformers and check them with another.

    python tests/roundtrip/roundtrip.py write DIR     # in the environment of one transformers
    python tests/roundtrip/roundtrip.py check DIR     # in that of the other

Both ends need headscale and nothing of the other's environment. `write` saves a tiny model of every model type that
headscale can edit and that its transformers has, the calibrated checkpoints made of it, and the source's logits.
`check` reloads everything and prints one line a source; it exits 1 when a checkpoint does not do what it says.

A checkpoint passes when its logits are the constant times the source's (within `EXACT` of the largest; bitwise for a
power of two), before and after its ties are bound again and after it is saved and loaded once more; when no key is
missing or unexpected that was not so in the source; when disk and memory agree on where its head is; and when this
transformers' headscale writes the same bytes. Where the two libraries load the *source* differently, which says
nothing about what was written, its logits as the writer loaded it are as good, and the bytes are not compared.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tiny_models import masked_lm_types, tiny_batch, tiny_model

from headscale.apply import EXACT, Change, save_rescaled
from headscale.backbone import Backbone, load_backbone, quiet
from headscale.checkpoint import open_checkpoint
from headscale.errors import HeadscaleError, NoHeadError, UnsupportedHeadError
from headscale.head import accepted, load_head
from headscale.layouts import LAYOUTS
from headscale.stored import read_head

VERSION = f"transformers {transformers.__version__}"
CHANGES = tuple(
    Change(scale, mode=mode, scale_bias=scale_bias)
    for mode in ("untie", "fold")
    for scale in (0.125, 0.1)
    for scale_bias in (True, False)
)
UNTIED: dict[str, Any] = {"tie_word_embeddings": False}
# DeBERTa's own head needs the flag off: bound, transformers 4 puts the embedding in the place of the transform.
FURTHER: dict[str, dict[str, dict[str, Any]]] = {
    "deberta": {"own head": {"legacy": False, **UNTIED}},
    "deberta-v2": {"own head": {"legacy": False, **UNTIED}},
    "modernbert": {"no bias": {"decoder_bias": False}},
}


def class_names() -> dict[str, str]:
    """The class that has the MLM (or LM) head, for every type that headscale edits and this transformers has."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

    known = {**CAUSAL, **masked_lm_types()}
    return {t: known[t] for t, layout in sorted(LAYOUTS.items()) if t in known and not layout.refusal}


def variants(model_type: str) -> dict[str, dict[str, Any]]:
    """Names of the sources of one type, with what each overrides in the configuration."""
    return {"as is": {}, "untied": UNTIED, **FURTHER.get(model_type, {})}


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**accepted(model, tiny_batch())).logits


# --- writing -------------------------------------------------------------------------------------------------------


def write(root: Path) -> None:
    sources = []
    for model_type, class_name in class_names().items():
        for variant, overrides in variants(model_type).items():
            folder = root / model_type / variant.replace(" ", "-")
            sources.append({"type": model_type, "variant": variant, "folder": str(folder.relative_to(root))})
            with quiet():
                tiny_model(model_type, class_name, **overrides).save_pretrained(folder / "source")
            sources[-1].update(write_targets(folder))
    (root / "manifest.json").write_text(json.dumps({"written_with": VERSION, "sources": sources}, indent=1))
    targets = sum(len(s.get("targets", ())) for s in sources)
    print(f"{VERSION}: {len(sources)} sources, {targets} calibrated checkpoints")


def write_targets(folder: Path) -> dict[str, Any]:
    """Every calibrated checkpoint of one source, and its logits; what headscale refuses is said instead."""
    try:
        backbone = load_backbone(folder / "source", tokenizer=False)
    except HeadscaleError as error:
        return {"skipped": error.message}
    promise = promise_of(backbone.model)
    np.savez(folder / "logits.npz", logits=promise.logits.numpy(), bias=promise.bias.numpy())
    targets, refused = [], {}
    for number, change in enumerate(CHANGES):
        if folder.name != "as-is" and change.is_power_of_two != change.scale_bias:
            continue  # two of the four constants are enough for the rarer sources
        try:
            save_rescaled(backbone, folder / str(number), change)
        except UnsupportedHeadError as error:
            refused[change.mode] = error.message
            continue
        targets.append(number)
    return {"targets": targets, "refused": refused, "one_plus": backbone.head.norm_kind == "one_plus"}


# --- checking ------------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """What became of one source: the largest error of its targets in each mode, and what is wrong or odd."""

    title: str
    errors: dict[str, float] = field(default_factory=dict)
    faults: dict[str, list[str]] = field(default_factory=dict)  # what is wrong -> with which constants
    notes: list[str] = field(default_factory=list)
    checked: dict[str, bool] = field(default_factory=dict)  # mode -> all exact


@dataclass(frozen=True)
class Promise:
    """What the logits of a source were, and the bias in them: what a constant is a constant of."""

    logits: torch.Tensor
    bias: torch.Tensor

    def times(self, change: Change) -> torch.Tensor:
        if change.scale_bias:
            return change.scale * self.logits
        return change.scale * (self.logits - self.bias) + self.bias


@dataclass(frozen=True)
class Loaded:
    """A model with what its loading said."""

    model: Any
    promise: Promise
    missing: frozenset[str]
    unexpected: frozenset[str]


def promise_of(model: Any) -> Promise:
    head = load_head(model)
    bias = torch.zeros(1) if head.bias is None else head.bias.detach() * head.head.factor
    return Promise(logits_of(model), bias)


def load(directory: Path) -> Loaded:
    config = json.loads((directory / "config.json").read_text())
    causal = any(name.endswith("ForCausalLM") for name in config["architectures"])
    auto = transformers.AutoModelForCausalLM if causal else transformers.AutoModelForMaskedLM
    with quiet():
        model, info = auto.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    missing, unexpected = frozenset(info["missing_keys"]), frozenset(info["unexpected_keys"])
    return Loaded(model, promise_of(model.eval()), missing, unexpected)


def check_source(root: Path, entry: dict[str, Any]) -> Outcome:
    outcome = Outcome(f"{entry['type']}, {entry['variant']}")
    folder = root / entry["folder"]
    if "skipped" in entry:
        outcome.notes.append(f"not written: {entry['skipped']}")
        return outcome
    outcome.notes += sorted({f"refused: {why}" for why in entry["refused"].values()})
    if not entry["targets"]:
        return outcome
    source = load(folder / "source")
    kept = np.load(folder / "logits.npz")
    written = Promise(torch.from_numpy(kept["logits"]), torch.from_numpy(kept["bias"]).float())
    promises, drift = [source.promise], distance(source.promise.logits, written.logits)
    if drift > EXACT:
        outcome.notes.append(f"the source itself loads differently here, by {drift:.1e}")
        promises.append(written)
    headless = no_head(folder / "source")
    if headless:
        outcome.notes.append("the source itself has no head here, nor has what was folded into it")
    backbone = load_backbone(folder / "source", tokenizer=False) if drift <= EXACT else None
    for number in entry["targets"]:
        if headless and no_head(folder / str(number)):
            continue
        case = Case(folder / str(number), CHANGES[number], source, promises, entry["one_plus"])
        faults = [*case.faults(outcome), *(rewritten(backbone, case) if backbone is not None else ())]
        outcome.checked[case.change.mode] = outcome.checked.get(case.change.mode, True) and not faults
        for fault in faults:
            outcome.faults.setdefault(fault, []).append(label(case.change))
    return outcome


def no_head(directory: Path) -> bool:
    """Whether this transformers would initialise the head at random."""
    with open_checkpoint(directory) as checkpoint:
        try:
            read_head(checkpoint)
        except NoHeadError:
            return True
    return False


def label(change: Change) -> str:
    return f"{change.mode} x {change.scale:g}" + ("" if change.scale_bias else ", bias kept")


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@dataclass(frozen=True)
class Case:
    """One calibrated checkpoint under this transformers."""

    directory: Path
    change: Change
    source: Loaded
    promises: list[Promise]  # that of the source as loaded here, and where it differs, as its writer loaded it
    one_plus: bool

    def faults(self, outcome: Outcome) -> Iterator[str]:
        target = load(self.directory)
        found = target.promise.logits
        errors = [distance(found, promise.times(self.change)) for promise in self.promises]
        outcome.errors[self.change.mode] = max(min(errors), outcome.errors.get(self.change.mode, 0.0))
        if not min(errors) <= EXACT:
            yield f"off by {min(errors):.1e} of the largest logit"
        elif errors[0] <= EXACT and self.bitwise and not torch.equal(found, self.promises[0].times(self.change)):
            yield "not bitwise"
        if target.missing - self.source.missing:
            yield f"missing {sorted(target.missing - self.source.missing)}"
        if target.unexpected - self.source.unexpected:
            yield f"unexpected {sorted(target.unexpected - self.source.unexpected)}"
        yield from self.lasting(target)

    @property
    def bitwise(self) -> bool:
        """A power of two is exact, but not in a gain of one plus the weight, nor in the sum with a bias as it was."""
        folded = self.change.mode == "fold" and self.one_plus
        return self.change.is_power_of_two and self.change.scale_bias and not folded

    def lasting(self, target: Loaded) -> Iterator[str]:
        """The constant is still there after ties are bound again, and after another round through a file."""
        target.model.tie_weights()
        if not torch.equal(logits_of(target.model), target.promise.logits):
            yield "lost when ties are bound again"
        with quiet(), scratch() as folder:
            target.model.save_pretrained(folder)
            if not torch.equal(load(folder).promise.logits, target.promise.logits):
                yield "lost when saved and loaded again"
        with open_checkpoint(self.directory) as checkpoint:
            stored = read_head(checkpoint).head
        if replace(stored, architecture="") != replace(load_head(target.model).head, architecture=""):
            yield "disk and memory disagree on its head"


def rewritten(backbone: Backbone, case: Case) -> Iterator[str]:
    """Whether this environment's headscale makes the very same files of the source."""
    with scratch() as folder:
        try:
            save_rescaled(backbone, folder / "again", case.change)
        except HeadscaleError as error:
            yield f"headscale here: {error.message}"
            return
        differing = {
            n
            for n in ("config.json", "model.safetensors")
            if digest(folder / "again" / n) != digest(case.directory / n)
        }
        if differing:
            yield f"headscale here writes another {' and '.join(sorted(differing))}"


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp())
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def check(root: Path) -> int:
    manifest = json.loads((root / "manifest.json").read_text())
    available = class_names()
    absent = sorted({s["type"] for s in manifest["sources"]} - set(available))
    outcomes = [check_source(root, s) for s in manifest["sources"] if s["type"] in available]
    print(f"written with {manifest['written_with']}, checked with {VERSION}; largest error over the constants")
    print(f"{'source':30s} {'untie':>9s} {'fold':>9s}")
    for outcome in outcomes:
        shown = [f"{outcome.errors[m]:9.1e}" if m in outcome.errors else f"{'-':>9s}" for m in ("untie", "fold")]
        wrong = [f"FAULT {fault} ({', '.join(labels)})" for fault, labels in outcome.faults.items()]
        print(f"{outcome.title:30s} {' '.join(shown)}  {'; '.join(wrong + outcome.notes)}".rstrip())
    for mode in ("untie", "fold"):
        verdicts = [o.checked[mode] for o in outcomes if mode in o.checked]
        print(f"{mode}: exact in {sum(verdicts)} of {len(verdicts)} sources")
    types = {s["type"] for s in manifest["sources"]} - set(absent)
    print(f"{len(types)} model types; not in {VERSION}: {', '.join(absent) or 'none'}")
    failing = [o.title for o in outcomes if o.faults]
    if failing:
        print(f"FAILED: {'; '.join(failing)}")
    return 1 if failing or not outcomes else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("verb", choices=("write", "check"))
    parser.add_argument("directory", type=Path)
    given = parser.parse_args()
    if given.verb == "check":
        return check(given.directory)
    write(given.directory)
    return 0


if __name__ == "__main__":
    sys.exit(main())
