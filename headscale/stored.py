"""Where the MLM head is in a checkpoint on disk, from its header and configuration alone; no torch.

The answer is that of the loaded model: the same names, the same tie, the same live bias. Checkpoints may leave out
the backbone's prefix, spell a norm's parameters `gamma` and `beta`, or use the file names of an older library.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from headscale.errors import NoHeadError, UnreadableError, UnsupportedHeadError
from headscale.layouts import ENCODER_DECODER, Layout, is_transformers_4, layout_for
from headscale.records import Head, Record

if TYPE_CHECKING:
    from headscale.checkpoint import Checkpoint

_LM_CLASSES = ("ForMaskedLM", "ForCausalLM", "LMHeadModel", "ForPreTraining", "ForConditionalGeneration")
_OLD_SPELLING = {"weight": "gamma", "bias": "beta"}


@dataclass(frozen=True)
class StoredHead(Record):
    """A head on disk: where it is, under which keys of the files, and what is odd about them."""

    head: Head
    keys: Mapping[str, str]  # name in the loaded model -> key in the checkpoint, for what the checkpoint holds
    warnings: tuple[str, ...] = ()


def refusal(config: Mapping[str, Any]) -> str:
    """Why a configuration cannot serve SPLADE, in one sentence, or an empty string."""
    layout = layout_for(dict(config))
    if layout is not None and layout.refusal:
        return layout.refusal
    if config.get("is_encoder_decoder"):
        return ENCODER_DECODER
    return ""


def read_head(checkpoint: Checkpoint) -> StoredHead:
    """Locate the head of a checkpoint and check that it was really saved.

    Args:
        checkpoint: an open checkpoint; only headers are read, and rows where two copies must be compared.

    Raises:
        UnsupportedHeadError: the model type is not known on disk, or cannot serve SPLADE.
        NoHeadError: head tensors are missing, so that loading would initialise them at random.
    """
    config = checkpoint.config
    layout = layout_for(config)
    if layout is None:
        raise _unknown(checkpoint)
    reason = refusal(config)
    if reason:
        raise UnsupportedHeadError(
            f"`{checkpoint.name}` cannot serve SPLADE: {reason}", hint="give a masked language model of text"
        )
    return _Reading(checkpoint, layout).result()


def _unknown(checkpoint: Checkpoint) -> UnreadableError | UnsupportedHeadError:
    model_type = checkpoint.config.get("model_type")
    if not model_type:
        return UnreadableError(
            f"`{checkpoint.name}` has no `config.json` that names a `model_type`",
            hint="give the directory that holds the model's own configuration",
        )
    return UnsupportedHeadError(
        f"the layout of model type `{model_type}` on disk is not known",
        hint="inspect it without `--weights-only`: the head of a loaded model is found by watching it work",
    )


def key_of(name: str, keys: Iterable[str], layout: Layout) -> str | None:
    """The key that holds a tensor of the loaded model, or None.

    Args:
        name: the tensor's name in the loaded model.
        keys: the keys of the checkpoint.
        layout: the row of the model type.
    """
    present = keys if isinstance(keys, Mapping | set | frozenset) else set(keys)
    return next((k for k in _spellings(name, layout) if k in present), None)


def _spellings(name: str, layout: Layout) -> list[str]:
    names = [name]
    names += [old + name.removeprefix(new) for new, old in layout.renames if name.startswith(new)]
    prefix = f"{layout.base}."
    names += [n.removeprefix(p) for n in list(names) for p in _prefixes(prefix, layout) if n.startswith(p)]
    for n in list(names):
        stem, _, leaf = n.rpartition(".")
        if stem.endswith("LayerNorm") and leaf in _OLD_SPELLING:
            names.append(f"{stem}.{_OLD_SPELLING[leaf]}")
    return names


def _prefixes(prefix: str, layout: Layout) -> list[str]:
    return [prefix, *(old for new, old in layout.renames if new == prefix)]


class _Reading:
    """One checkpoint being read: what its keys say, step by step."""

    def __init__(self, checkpoint: Checkpoint, layout: Layout) -> None:
        self.checkpoint = checkpoint
        self.layout = layout
        self.keys: dict[str, str] = {}
        self.warnings: list[str] = []

    def find(self, name: str | None) -> str | None:
        if name is None:
            return None
        key = key_of(name, self.checkpoint.tensors, self.layout)
        if key is not None:
            self.keys[name] = key
        return key

    def result(self) -> StoredHead:
        layout = self.layout
        flag = _tie_flag(self.checkpoint.config, layout)
        tied = self._matrix(flag)
        bias = self._bias(flag)
        self._require_trained()
        rows, width = self._shape()
        norm = layout.norm
        if norm is not None:
            self.find(f"{norm}.bias")
        head = Head(
            model_type=str(self.checkpoint.config["model_type"]),
            architecture=_architecture(self.checkpoint.config),
            vocab_size=rows,
            width=width,
            matrix=layout.matrix,
            bias=bias,
            norm=norm,
            norm_kind=None if norm is None else ("one_plus" if layout.one_plus else "affine"),
            norm_in_backbone=layout.norm_in_backbone,
            tied_to=layout.embedding if tied else None,
            softcap=_text(self.checkpoint.config).get("final_logit_softcapping"),
        )
        return StoredHead(head, dict(self.keys), tuple(self.warnings))

    def _matrix(self, flag: bool) -> bool:
        """Resolve the matrix's keys; returns whether it is the input embedding."""
        layout = self.layout
        own = [self.find(name) for name in layout.matrix]
        if layout.embedding in layout.matrix:
            return True
        embedding = self.find(layout.embedding) if flag else None
        if embedding is None:
            return flag and layout.embedding is not None
        if own[0] is None:
            self.keys[layout.matrix[0]] = embedding
            return True
        if self._equal(own[0], embedding):
            return True
        self.warnings.append(
            f"`{own[0]}` and `{embedding}` differ although the configuration ties them: transformers 5 keeps both, "
            "transformers 4 silently replaces the first by the second"
        )
        if is_transformers_4():
            self.keys[layout.matrix[0]] = embedding
        return is_transformers_4()

    def _bias(self, flag: bool) -> str | None:
        """The live bias: tied names are one tensor under the first name, untied the last name is live.

        In transformers 4 they are one tensor either way, and of two that differ it keeps one or the other.
        """
        names = self.layout.biases
        if not names or not _bias_on(self.checkpoint.config, self.layout):
            return None
        found = {name: self.find(name) for name in names}
        held = [key for key in found.values() if key is not None]
        same = len(held) < 2 or self._equal(held[0], held[1])
        if is_transformers_4() and not same:
            self.warnings.append(f"`{held[0]}` and `{held[1]}` differ: transformers 4 replaces one by the other")
            return names[0]
        if same and (flag or is_transformers_4()):
            if held:
                self.keys.update(dict.fromkeys(names, held[0]))
            else:
                self.warnings.append(f"no bias in the file (`{names[0]}`): it is loaded as zeros")
            return names[0]
        if found[names[-1]] is None:
            self.warnings.append(
                f"`{names[-1]}` is missing from this untied checkpoint (transformers 4 saves it so): transformers 5 "
                "loads a bias of zeros"
            )
        return names[-1]

    def _require_trained(self) -> None:
        layout = self.layout
        needed = list(layout.matrix)
        needed += [f"{layout.dense}.weight"] if layout.dense else []
        needed += [f"{layout.norm}.weight"] if layout.norm else []
        missing = [name for name in needed if name not in self.keys and self.find(name) is None]
        if missing:
            raise _no_head(self.checkpoint, missing)
        own = [n for n in self.keys if not n.startswith(f"{layout.base}.") and self.keys[n] != self._embedding_key()]
        if not own and not _architecture(self.checkpoint.config).endswith(_LM_CLASSES):
            raise _no_head(self.checkpoint, list(layout.matrix))

    def _embedding_key(self) -> str | None:
        return self.keys.get(self.layout.embedding) if self.layout.embedding else None

    def _shape(self) -> tuple[int, int]:
        shapes = [self.checkpoint.tensors[self.keys[name]].shape for name in self.layout.matrix]
        if any(len(shape) != 2 for shape in shapes):
            raise UnreadableError(f"`{self.layout.matrix[0]}` of `{self.checkpoint.name}` is not a matrix")
        rows = shapes[0][0]
        return rows, shapes[0][1] + sum(shape[0] for shape in shapes[1:])

    def _equal(self, a: str, b: str) -> bool:
        infos = self.checkpoint.tensors
        if a == b or infos[a].shape != infos[b].shape:
            return a == b
        pairs = zip(self.checkpoint.row_blocks(a), self.checkpoint.row_blocks(b), strict=True)
        return all(np.array_equal(x, y, equal_nan=True) for (_, x), (_, y) in pairs)


def _text(config: Mapping[str, Any]) -> Mapping[str, Any]:
    text = config.get("text_config")
    return text if isinstance(text, dict) else config


def _tie_flag(config: Mapping[str, Any], layout: Layout) -> bool:
    return bool(config.get("tie_word_embeddings", layout.ties))


def _bias_on(config: Mapping[str, Any], layout: Layout) -> bool:
    if not layout.bias_flag:
        return True
    value: Any = config
    for part in layout.bias_flag.split("."):
        value = value.get(part, {}) if isinstance(value, dict) else {}
    return value is not False


def _architecture(config: Mapping[str, Any]) -> str:
    return str((config.get("architectures") or [""])[0])


def _no_head(checkpoint: Checkpoint, missing: list[str]) -> NoHeadError:
    keys = list(checkpoint.tensors)
    names = ", ".join(f"`{name}`" for name in missing)
    if any(k.startswith("lm_predictions.") for k in keys) and checkpoint.config.get("legacy") is not False:
        return NoHeadError(
            f"the head of `{checkpoint.name}` is stored as `lm_predictions.*`, which its configuration does not load: "
            f"{names} would be initialised at random",
            hint='set `"legacy": false` in its `config.json`, then run this again',
        )
    kind = _headless_kind(keys, _architecture(checkpoint.config))
    return NoHeadError(
        f"`{checkpoint.name}` carries no trained MLM head{kind}: {names} would be initialised at random",
        hint="give the checkpoint of the masked language model it was made from",
    )


def _headless_kind(keys: list[str], architecture: str) -> str:
    if any(k.startswith("discriminator_predictions.") for k in keys):
        return " (it is a discriminator; its generator has one)"
    if any(k.startswith(("classifier.", "qa_outputs.")) for k in keys):
        return f" (it is a fine-tuned `{architecture}`)"
    return f" (it is a `{architecture}`)" if architecture and not architecture.endswith(_LM_CLASSES) else ""
