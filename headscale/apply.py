"""Write a constant into a checkpoint on disk, and prove it by reloading what was written.

Only the head's tensors are edited, at file level; everything else is copied byte for byte. The new directory takes
its place after the proof, so a checkpoint that does not do what it says never appears.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from headscale.backbone import Backbone, first_line, load_backbone, quiet
from headscale.errors import HeadscaleError, UnreadableError, UnsupportedHeadError
from headscale.layouts import Layout, layout_for
from headscale.records import Head, Proof, Written
from headscale.rescaling import folded_gain, resolve_mode, tied_names
from headscale.rewrite import LazyTensor, write_edited
from headscale.stored import key_of

if TYPE_CHECKING:
    from torch import Tensor

    from headscale.checkpoint import Checkpoint

EXACT = 1e-5  # of the largest logit, in fp32: the bar for a written checkpoint
FILE = "headscale.json"
_TEXTS = (
    "what does the head of a masked language model cost",
    "A retriever scores a query and a document by the terms that both of them activate.",
)


@dataclass(frozen=True)
class Change:
    """A constant and everything that says how it is written.

    logits' = scale x (logits + shift) where the bias is scaled; where it is kept, scale x (logits - b + shift) + b.
    """

    scale: float
    mode: str = "auto"
    scale_bias: bool = True
    shift: float = 0.0

    @property
    def bias_scale(self) -> float:
        """What the bias is multiplied by."""
        return self.scale if self.scale_bias else 1.0

    @property
    def is_power_of_two(self) -> bool:
        """Whether the product is exact in every dtype (short of underflow)."""
        return bool(np.frexp(self.scale)[0] == 0.5)


def save_rescaled(
    backbone: Backbone,
    target: str | Path,
    change: Change,
    *,
    metadata: Mapping[str, Any] | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
) -> Written:
    """Write a drop-in checkpoint whose logits are the constant times the original's, and prove it.

    Args:
        backbone: the original, loaded from a directory (`load_backbone`); its files are only read.
        target: the new directory.
        change: the constant and how to write it.
        metadata: further content of `headscale.json`.
        dtype: store the edited tensors as `F32`, `F16` or `BF16`; by default as they were, or as F32 where the
            source is half precision and the product is not exact in it.
        overwrite: replace a checkpoint that is at the target.

    Returns:
        What was edited, added and copied, and the proofs.

    Raises:
        UnsupportedHeadError: no exact form exists, or there is no bias to shift.
        HeadscaleError: the target cannot be written, or the reloaded logits differ by more than `EXACT`.
    """
    from headscale.checkpoint import open_checkpoint

    if backbone.directory is None:
        raise UnsupportedHeadError(
            f"`{backbone.name}` was handed over in memory, so there are no files to edit",
            hint="give the directory or the id that it was loaded from",
        )
    mode, reason = resolve_mode(backbone.head, change.mode)
    proofs: list[Proof] = []
    with open_checkpoint(backbone.directory) as checkpoint:
        editing = _Editing(checkpoint, backbone, change, mode)
        tensors, config = editing.tensors(), editing.config()
        dtypes = editing.dtypes(tensors, dtype)
        content = {"mode": mode, **(metadata or {})}

        def prove(stage: Path) -> None:
            proofs.extend(prove_rescaled(backbone, stage / checkpoint.subfolder, change))
            _check_proofs(proofs, str(target), half=_is_half(dtypes, editing))
            document = {**content, "proofs": [p.to_dict() for p in proofs], "edited": sorted(tensors)}
            (stage / FILE).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")

        done = write_edited(
            checkpoint, target, tensors=tensors, dtypes=dtypes, config=config, overwrite=overwrite, on_staged=prove
        )
    return Written(
        directory=done["directory"],
        mode=mode,
        mode_reason=reason,
        scale=change.scale,
        scale_bias=change.scale_bias,
        shift=change.shift,
        edited=_names(done["edited"]),
        added=_names(done["added"]),
        copied=tuple(done["copied"]),
        left_out=tuple(done["left_out"]),
        converted=tuple(str(c) for c in done["converted"]),
        config=config,
        proofs=tuple(proofs),
        warnings=(*backbone.warnings, *_architecture_warning(checkpoint)),
    )


def _names(by_file: Mapping[str, list[str]]) -> tuple[str, ...]:
    return tuple(sorted(name for names in by_file.values() for name in names))


def _architecture_warning(checkpoint: Checkpoint) -> list[str]:
    names = checkpoint.config.get("architectures") or []
    if any(name.endswith("ForMaskedLM") for name in names):
        return []
    shown = ", ".join(f"`{n}`" for n in names) or "none"
    return [
        f"no entry of `architectures` ends in `ForMaskedLM` ({shown}): `SparseEncoder` would silently build something "
        "other than SPLADE from this directory; give it `MLMTransformer` and `SpladePooling` by hand"
    ]


# --- the edits -----------------------------------------------------------------------------------------------------


class _Editing:
    """Which tensors of which keys change, and into what."""

    def __init__(self, checkpoint: Checkpoint, backbone: Backbone, change: Change, mode: str) -> None:
        self.checkpoint = checkpoint
        self.change = change
        self.mode = mode
        self.head: Head = backbone.head
        bias = backbone.loaded.bias
        self.loaded_bias = None if bias is None else bias.detach().float().cpu().numpy()
        layout = layout_for(checkpoint.config)
        self.layout: Layout = layout if layout is not None else _watched_layout(backbone)
        self.keys = dict(backbone.stored.keys) if backbone.stored else self._exact_keys()
        dormant = {name: key_of(name, checkpoint.tensors, self.layout) for name in self.layout.dormant}
        self.keys.update({name: key for name, key in dormant.items() if key is not None})
        if change.shift and self.head.bias is None:
            raise UnsupportedHeadError(
                f"`{self.head.model_type}` has no bias in its head to shift", hint="calibrate it without `--shift`"
            )

    def tensors(self) -> dict[str, np.ndarray | LazyTensor]:
        """New values by key."""
        return {**(self._untied() if self.mode == "untie" else self._folded()), **self._biases()}

    def config(self) -> dict[str, Any]:
        """Keys to set in `config.json`."""
        if self.mode != "untie" or not self._tie_flag():
            return {}
        changed: dict[str, Any] = {"tie_word_embeddings": False}
        text = self.checkpoint.config.get("text_config")
        if isinstance(text, dict) and "tie_word_embeddings" in text:
            changed["text_config"] = {**text, "tie_word_embeddings": False}
        return changed

    def dtypes(self, tensors: Mapping[str, Any], asked: str | None) -> dict[str, str]:
        """The stored dtype of each edited tensor."""
        return {key: asked or self._dtype(self._origin(key)) for key in tensors}

    def stored_dtype(self) -> str:
        """The dtype of the matrix in the source."""
        return self.checkpoint.tensors[self.keys[self.head.matrix[0]]].dtype

    def _dtype(self, key: str) -> str:
        known = self.checkpoint.tensors.get(key)
        own = known.dtype if known is not None else self.stored_dtype()
        if own in ("F32", "F64"):
            return own
        exact = self.change.is_power_of_two and not self.change.shift and self.head.norm_kind != "one_plus"
        return own if exact and not (known is not None and own == "F16" and self._underflows(key)) else "F32"

    def _underflows(self, key: str) -> bool:
        """Whether the product leaves the normal numbers of fp16, where a power of two is no longer exact."""
        smallest = float(np.finfo(np.float16).tiny)
        for _, block in self.checkpoint.row_blocks(key):
            sizes = np.abs(block[block != 0]) * self.change.scale
            if sizes.size and (sizes.min() < smallest or sizes.max() > float(np.finfo(np.float16).max)):
                return True
        return False

    def _origin(self, key: str) -> str:
        """The key whose values a new key gets."""
        for name, source in (*zip(self.head.matrix, self.head.matrix, strict=True), *self.layout.entangled):
            if self._own_key(name) == key:
                return self.keys.get(source, key)
        held = [self.keys[n] for n in self.layout.biases if n in self.keys]
        return held[0] if held and key not in self.checkpoint.tensors else key

    def _tie_flag(self) -> bool:
        return bool(self.checkpoint.config.get("tie_word_embeddings", self.layout.ties))

    def _own_key(self, name: str) -> str:
        """The key that a tensor of its own has, or will have, in the spelling of this checkpoint."""
        found = key_of(name, self.checkpoint.tensors, self.layout)
        if found is not None:
            return found
        for new, old in self.layout.renames:
            if name.startswith(new):
                return old + name.removeprefix(new)
        return name

    def _untied(self) -> dict[str, np.ndarray | LazyTensor]:
        edits: dict[str, np.ndarray | LazyTensor] = {}
        for name in self.head.matrix:
            edits[self._own_key(name)] = self._times(self.keys[name], self.change.scale)
        if self._tie_flag():
            for name, source in self.layout.entangled:
                key = key_of(source, self.checkpoint.tensors, self.layout)
                if key is not None and key_of(name, self.checkpoint.tensors, self.layout) is None:
                    edits[self._own_key(name)] = self._times(key, 1.0)
        return edits

    def _folded(self) -> dict[str, np.ndarray | LazyTensor]:
        norm = self.head.norm
        weight = self.checkpoint.tensor(self.keys[f"{norm}.weight"])
        scale = weight.dtype.type(self.change.scale)
        edits = {self.keys[f"{norm}.weight"]: folded_gain(weight, scale, self.head.norm_kind).astype(weight.dtype)}
        bias = self.keys.get(f"{norm}.bias")
        return {**edits, **({bias: self.checkpoint.tensor(bias) * scale} if bias else {})}

    def _biases(self) -> dict[str, np.ndarray]:
        """Every name of the bias its own, equal tensor when untying; those in the file otherwise."""
        names = self.layout.biases if self.head.bias is not None else self.layout.dormant
        held = {name: self.keys[name] for name in names if name in self.keys}
        live = next((key for key in held.values() if self._is_loaded(key)), None)
        sources: dict[str, str | None] = {self._own_key(n): key for n, key in held.items()}
        if self.mode == "untie" and live:
            sources = dict.fromkeys(sources, live)
        elif self.mode == "fold":
            sources = {own: key for own, key in sources.items() if own in self.checkpoint.tensors}
        if self.change.shift and self.head.bias and self.head.bias not in held:  # loaded as zeros
            sources[self._own_key(self.head.bias)] = None
        return {key: self._shifted(source) for key, source in sources.items()}

    def _is_loaded(self, key: str) -> bool:
        """Whether this is the bias that the model has in memory, where a file holds two that differ."""
        return self.loaded_bias is not None and np.array_equal(self.checkpoint.tensor(key), self.loaded_bias)

    def _shifted(self, key: str | None) -> np.ndarray:
        old = self.checkpoint.tensor(key) if key else np.zeros(self.head.vocab_size, np.float32)
        kind = old.dtype.type
        added = self.change.scale * self.change.shift / self.head.factor  # logits are factor x (features W + bias)
        return np.asarray(old * kind(self.change.bias_scale) + kind(added))

    def _times(self, key: str, factor: float) -> LazyTensor:
        def blocks() -> Iterator[np.ndarray]:
            for _, rows in self.checkpoint.row_blocks(key):
                yield rows * rows.dtype.type(factor)

        return LazyTensor(self.checkpoint.tensors[key].shape, blocks)

    def _exact_keys(self) -> dict[str, str]:
        names = [*self.layout.matrix, *self.layout.biases, self.layout.embedding, f"{self.layout.norm}.weight"]
        names.append(f"{self.layout.norm}.bias")
        keys = {n: n for n in names if n and n in self.checkpoint.tensors}
        first = self.layout.matrix[0]
        if first not in keys and self.layout.embedding in keys:
            keys[first] = str(self.layout.embedding)
        biases = [n for n in self.layout.biases if n in keys]
        keys.update({n: keys[biases[0]] for n in self.layout.biases if biases and n not in keys})
        if first not in keys:
            raise UnreadableError(
                f"`{self.checkpoint.name}` stores `{first}` under a name that is not known",
                hint="save the model with this transformers first, then calibrate that directory",
            )
        return keys


def _watched_layout(backbone: Backbone) -> Layout:
    """A layout for a model type without a row of its own, from the head that was seen working."""
    head = backbone.head
    bound = tied_names(backbone.model)
    parameters = dict(backbone.model.named_parameters(remove_duplicate=False))
    biases = [n for n, p in parameters.items() if head.bias and p is parameters.get(head.bias)]
    head_names = {*head.matrix, *biases}
    return Layout(
        matrix=head.matrix,
        embedding=head.tied_to,
        biases=tuple(sorted(biases, key=lambda n: n != head.bias)) or ((head.bias,) if head.bias else ()),
        norm=head.norm,
        base=backbone.model.base_model_prefix,
        ties=bool(getattr(backbone.model.config, "tie_word_embeddings", True)),
        entangled=tuple((name, source) for name, source in bound.items() if name not in head_names),
    )


# --- the proof -----------------------------------------------------------------------------------------------------


def prove_rescaled(backbone: Backbone, directory: Path, change: Change) -> list[Proof]:
    """Reload a written checkpoint and compare its logits with what the constant promises.

    Args:
        backbone: the original in memory.
        directory: the checkpoint that was written.
        change: what was written.

    Returns:
        One proof for transformers, and one for sentence-transformers where it is installed and would build the
        SPLADE pair from the directory.
    """
    import torch
    import transformers

    from headscale.head import probe_batch, undisturbed

    again = load_backbone(directory, device=str(backbone.loaded.weight.device), tokenizer=False)
    batch = probe_batch(backbone.model)
    with torch.no_grad(), undisturbed(backbone.model):
        before = backbone.model(**batch).logits
        after = again.model(**batch).logits
    expected = _expected(backbone, before, change)
    proofs = [_compare(f"transformers {transformers.__version__}", after, expected, before, change)]
    installed = importlib.util.find_spec("sentence_transformers") is not None
    if installed and backbone.tokenizer is not None and _autodetected(directory):
        proofs += _prove_with_sparse_encoder(backbone, directory, change)
    return proofs


def _expected(backbone: Backbone, logits: Tensor, change: Change) -> Tensor:
    if change.scale_bias or backbone.loaded.bias is None:
        return change.scale * (logits + change.shift)
    bias = backbone.loaded.bias.detach() * backbone.head.factor
    return change.scale * (logits - bias + change.shift) + bias


def _compare(library: str, found: Tensor, expected: Tensor, before: Tensor, change: Change) -> Proof:
    same_support = bool(((found > 0) == (before > 0)).all())
    return Proof(
        library=library,
        max_error=float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30)),
        bitwise=bool((found == expected).all()),
        support_identical=same_support if change.scale_bias and not change.shift else None,
    )


def _autodetected(directory: Path) -> bool:
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    return any(name.endswith("ForMaskedLM") for name in config.get("architectures") or [])


def _prove_with_sparse_encoder(backbone: Backbone, directory: Path, change: Change) -> list[Proof]:
    import sentence_transformers
    import torch

    from headscale.activations import tokenize
    from headscale.head import accepted, undisturbed

    try:
        with quiet():
            encoder = sentence_transformers.SparseEncoder(str(directory), device=str(backbone.loaded.weight.device))
    except Exception as error:  # it cannot load the original either, for want of an image processor, say
        backbone.warnings.append(f"not proven in sentence-transformers, which cannot load it: {first_line(error)}")
        return []
    # One text at a time: some types (funnel, fnet) put out other numbers beside padding.
    encoded = [
        encoder.encode([t], convert_to_sparse_tensor=False, show_progress_bar=False, batch_size=1) for t in _TEXTS
    ]
    found = torch.cat(encoded).float().cpu()
    rows = []
    with torch.no_grad(), undisturbed(backbone.model):
        for text in _TEXTS:
            batch, _ = tokenize(backbone.tokenizer, [text], 128, backbone.loaded.weight.device)
            logits = _expected(backbone, backbone.model(**accepted(backbone.model, batch)).logits, change)
            rows.append(torch.log1p(torch.relu(logits.amax(1)))[0].float().cpu())
    expected = torch.stack(rows)
    version = sentence_transformers.__version__
    return [_compare(f"sentence-transformers {version} SparseEncoder", found, expected, expected, change)]


def _is_half(dtypes: Mapping[str, str], editing: _Editing) -> bool:
    return any(d in ("F16", "BF16") for d in dtypes.values()) and not editing.change.is_power_of_two


def _check_proofs(proofs: list[Proof], target: str, *, half: bool) -> None:
    """A half-precision store that was asked for rounds; anything else must meet the bar."""
    wrong = [p for p in proofs if not p.max_error <= EXACT]
    if wrong and not half:
        raise HeadscaleError(
            f"`{target}` was not written: reloaded with {wrong[0].library} its logits are off by "
            f"{wrong[0].max_error:.1e} of the largest",
            hint="please report the model type; `--mode fold` or `--mode untie` may do where the other does not",
        )
