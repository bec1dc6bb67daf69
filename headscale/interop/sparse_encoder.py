"""A loaded SparseEncoder of sentence-transformers whose vectors come from the pooled head.

sentence-transformers lets the transformer put out [batch, seq, vocab] logits, which its `SpladePooling` then reduces.
Here the transformer stops before that product and the pooling does both at once. The modules stay what they are,
with their classes, parameters and configuration: only their `forward` is replaced, on the instances.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.nn.utils.rnn import pad_sequence

from headscale.errors import UnsupportedHeadError, UsageError
from headscale.head import LoadedHead, load_head
from headscale.pooling import Implementation, splade_pool

Encoder = TypeVar("Encoder", bound=nn.Module)

_FEATURES = "headscale_features"  # between the two modules: (batch, seq, width)


def use_pooled_head(encoder: Encoder, *, implementation: Implementation = "auto") -> Encoder:
    """Make a loaded SparseEncoder compute its vectors and gradients without [batch, seq, vocab] logits, in place.

    Encoding, training with `SparseEncoderTrainer` and saving go on as before; a saved encoder is an ordinary one,
    since nothing of this is saved. Vectors agree to 1e-6 of the largest in float32. Max pooling with either
    activation function takes the pooled head, whatever the `chunk_size`; sum pooling, and inputs that are not text,
    take the original way. Where autocast is on, vectors are float32.

    Args:
        encoder: a `SparseEncoder` with a transformer followed by `SpladePooling`, on its own or in the routes of a
            `Router`. Adapters and compilation come before this call or not at all.
        implementation: of the pooled head; see `headscale.pooling.choose_implementation`.

    Returns:
        The same encoder.

    Raises:
        UsageError: nothing in the encoder is a transformer followed by `SpladePooling`, or a transformer feeds
            something else as well.
        UnsupportedHeadError: the logits are not linear in what feeds them.

    Example:
        >>> from sentence_transformers import SparseEncoder
        >>> from headscale.interop.sparse_encoder import use_pooled_head
        >>> encoder = use_pooled_head(SparseEncoder("bert-base-uncased"))  # doctest: +SKIP
    """
    pairs = _pairs(encoder)
    heads = {transformer: _head(transformer) for transformer, _ in pairs}  # all of them, before any is changed
    for transformer, pooling in pairs:
        transformer.forward = _UntilProduct(transformer, heads[transformer])
        pooling.forward = _ProductAndPooling(pooling, implementation)
    return encoder


def use_own_head(encoder: Encoder) -> Encoder:
    """Undo `use_pooled_head`, in place: every module runs its class's `forward` again."""
    for module in encoder.modules():
        if isinstance(module.__dict__.get("forward"), _UntilProduct | _ProductAndPooling):
            del module.forward
    return encoder


class _UntilProduct:
    """A transformer's `forward` up to the vocabulary product; an object, so that copies of the encoder own theirs."""

    def __init__(self, transformer: Any, head: LoadedHead) -> None:
        self.transformer, self.head = transformer, head

    def __call__(self, features: dict[str, Any], **named: Any) -> dict[str, Any]:
        def whole() -> Any:
            return type(self.transformer).forward(self.transformer, features, **named)

        if not _is_text(features) or getattr(self.head.model.config, "output_hidden_states", False):
            found: dict[str, Any] = whole()
            return found
        features[_FEATURES] = self.head, self.head.features_of(whole)
        return features


class _ProductAndPooling:
    """A pooling's `forward` from what feeds the vocabulary product, or from logits where it is given logits."""

    def __init__(self, pooling: Any, implementation: Implementation) -> None:
        self.pooling = pooling
        self.implementation: Implementation = implementation

    def __call__(self, features: dict[str, Any]) -> dict[str, Any]:
        if _FEATURES not in features:
            return self._original(features)
        head, hidden = features.pop(_FEATURES)
        if self.pooling.pooling_strategy != "max":
            features["token_embeddings"] = linear(hidden, head.weight, head.bias) * head.head.factor
            return self._original(features)
        features["sentence_embedding"] = self._max(head, hidden, features)
        if self.pooling.embedding_dimension is None:
            self.pooling.embedding_dimension = head.vocab_size
        return features

    def _original(self, features: dict[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = type(self.pooling).forward(self.pooling, features)
        return found

    def _max(self, head: LoadedHead, hidden: Tensor, features: dict[str, Any]) -> Tensor:
        if "cu_seq_lens_q" in features:  # texts one after the other, without padding
            hidden, mask = _padded(hidden, features["cu_seq_lens_q"])
        else:
            mask = features["attention_mask"]
        vectors = splade_pool(
            hidden, head.weight, head.bias, mask, scale=head.head.factor, implementation=self.implementation
        )
        if self.pooling.activation_function == "log1p_relu":  # monotone, so it commutes with the maximum
            vectors = vectors.log1p()
        return vectors.to(head.weight.dtype)


def _is_text(features: dict[str, Any]) -> bool:
    return bool(features.get("modality", "text") == "text")


def _padded(hidden: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    """Texts of a flat (1, tokens, width) side by side, (batch, seq, width), and their mask."""
    lengths = starts.diff()
    texts = pad_sequence(list(torch.split(hidden[0], lengths.tolist())), batch_first=True)
    places = lengths.new_ones(texts.shape[:2]).cumsum(1)
    return texts, places <= lengths[:, None]


def _head(transformer: Any) -> LoadedHead:
    model = getattr(transformer, "auto_model", None)
    if not isinstance(model, nn.Module):
        raise UsageError(
            "the encoder's transformer holds no torch model, so its head cannot be pooled here",
            "load the encoder with the backend `torch`",
        )
    head = load_head(model)
    if head.head.softcap is not None or not head.head.factor > 0:
        raise UnsupportedHeadError(
            f"the logits of `{head.head.architecture}` are not a positive constant times its vocabulary product",
            hint="leave this encoder as it is",
        )
    return head


def _pairs(encoder: nn.Module) -> list[tuple[Any, Any]]:
    """Every transformer with the `SpladePooling` behind it, each pair once."""
    found = {(id(one), id(other)): (one, other) for one, other in _neighbours(encoder) if _is_splade_pooling(other)}
    if not found:
        raise UsageError(
            f"nothing in this `{type(encoder).__name__}` is a transformer followed by `SpladePooling`",
            "give a SparseEncoder of a masked language model",
        )
    transformers = {one for one, _ in found.values()}
    if any(one in transformers and not _is_splade_pooling(other) for one, other in _neighbours(encoder)):
        raise UsageError(
            "a transformer of this encoder feeds something else than `SpladePooling` as well",
            "give that route a transformer of its own",
        )
    return list(found.values())


def _neighbours(encoder: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Modules that follow each other, in the encoder itself and in its routes."""
    for sequence in encoder.modules():
        if isinstance(sequence, nn.Sequential):
            yield from pairwise(sequence.children())


def _is_splade_pooling(module: nn.Module) -> bool:
    """By the class's name: its home moved between versions."""
    return any(kind.__name__ == "SpladePooling" for kind in type(module).__mro__)
