"""From texts to SPLADE representations, through a loaded head."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from headscale.errors import UsageError
from headscale.pooling import splade_pool

if TYPE_CHECKING:
    from headscale.head import LoadedHead


POOLINGS = ("max", "sum")
ACTIVATIONS = ("relu", "log1p_relu")
_TILE = 1024  # terms whose logits of every position are held at once by the sum


def check_pooling(pooling: str, activation: str) -> None:
    """Refuse what SpladePooling does not know.

    Raises:
        UsageError: another pooling or activation.
    """
    for name, value, known in (("pooling", pooling, POOLINGS), ("activation", activation, ACTIVATIONS)):
        if value not in known:
            hint = f"`{known[0]}` is what most models use"
            raise UsageError(f"`--{name} {value}` is none of {', '.join(known)}", hint)


def sum_pool(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor, *, scale: float = 1.0, twice: bool = False
) -> Tensor:
    """Sum over positions of log1p(relu(scale x logit)), a tile of the vocabulary at a time.

    Args:
        hidden: (batch, seq, d) last hidden states.
        weight: (vocab, d) head projection.
        bias: (vocab,) head bias, or None.
        mask: (batch, seq), nonzero where a position counts.
        scale: multiplies the logits, the bias included.
        twice: log1p(log1p(relu)).

    Returns:
        (batch, vocab); differentiable.
    """
    parts = []
    for start in range(0, len(weight), _TILE):
        rows = slice(start, start + _TILE)
        logits = linear(hidden, weight[rows], None if bias is None else bias[rows])  # (batch, seq, tile)
        active = (scale * logits).relu().log1p()
        active = active.log1p() if twice else active
        parts.append(active.masked_fill(mask[:, :, None] == 0, 0.0).sum(1))
    return torch.cat(parts, dim=1)


class SpladeEncoder:
    """Tokenizes, runs the model up to the vocabulary product, and pools.

    Args:
        head: a model's head, as `load_head` gives it; `head.factor` is part of every logit.
        tokenizer: the model's, from transformers.
        scale: the constant multiplied onto the logits in forward; 1 where it is in the weights.
        scale_bias: whether that constant covers the vocabulary bias.
        shift: added to the logits before the scale in forward; 0 where it is in the weights.
        mask_special_tokens: leave the positions of special tokens out of the pooling.
        pooling: over positions, `max` (arXiv 2109.10086) or `sum` (arXiv 2107.05720).
        activation: `relu`, or `log1p_relu` for log1p(log1p(relu(x))) (arXiv 2504.14839); as sentence-transformers'
            SpladePooling names them.

    Raises:
        UsageError: another pooling or activation.
    """

    def __init__(
        self,
        head: LoadedHead,
        tokenizer: Any,
        *,
        scale: float = 1.0,
        scale_bias: bool = True,
        shift: float = 0.0,
        mask_special_tokens: bool = False,
        pooling: str = "max",
        activation: str = "relu",
    ) -> None:
        check_pooling(pooling, activation)
        self.head = head
        self.tokenizer = tokenizer
        self.scale = scale
        self.scale_bias = scale_bias
        self.shift = shift
        self.mask_special_tokens = mask_special_tokens
        self.pooling = pooling
        self.activation = activation
        self.accepted = frozenset(inspect.signature(head.model.forward).parameters)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.head.weight.device

    def tokenize(self, texts: Sequence[str], max_length: int) -> dict[str, Tensor]:
        """Token tensors of shape (batch, seq), padded to the longest text, and the mask the pooling uses."""
        batch = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=max_length, return_tensors="pt",
            return_attention_mask=True, return_special_tokens_mask=self.mask_special_tokens,
        )  # fmt: skip
        tokens = {name: value.to(self.device) for name, value in batch.items()}
        special = tokens.pop("special_tokens_mask", None)
        mask = tokens["attention_mask"]
        tokens["pooling_mask"] = mask if special is None else mask * (1 - special)
        return tokens

    def pool(self, tokens: dict[str, Tensor]) -> Tensor:
        """Representations (batch, vocab) of what `tokenize` gave, with their graph."""
        inputs = {name: value for name, value in tokens.items() if name in self.accepted}
        features = self.head.features(**inputs)  # (batch, seq, width)
        scale, factor, bias = self.scale, self.head.head.factor, self.head.bias
        if self.shift:
            added = self.shift / factor * (1.0 if self.scale_bias else scale)
            bias = self.head.weight.new_full((self.head.vocab_size,), added) if bias is None else bias + added
        if not self.scale_bias and scale != 1.0:  # scaling the features scales the product and spares the bias
            features, scale = features * scale, 1.0
        head = (features, self.head.weight, bias, tokens["pooling_mask"])
        if self.pooling == "sum":
            return sum_pool(*head, scale=scale * factor, twice=self.activation == "log1p_relu")
        reps = splade_pool(*head, scale=scale * factor)
        return reps.log1p() if self.activation == "log1p_relu" else reps  # it rises with the logit: the max is the same

    def __call__(self, texts: Sequence[str], max_length: int) -> Tensor:
        """Representations (batch, vocab) of texts, with their graph."""
        return self.pool(self.tokenize(texts, max_length))

    @torch.no_grad()
    def encode(self, texts: Sequence[str], *, max_length: int, batch_size: int = 64) -> Tensor:
        """Representations of any number of texts, in evaluation mode and without graph.

        Args:
            texts: n texts; they are batched by length and come back in their own order.
            max_length: tokens, special ones included.
            batch_size: texts at once.

        Returns:
            (n, vocab) float32 on the CPU.
        """
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        reps = torch.zeros(len(texts), self.head.vocab_size)
        model = self.head.model
        modes = {module: module.training for module in model.modules()}
        model.eval()
        try:
            for start in range(0, len(order), batch_size):
                rows = order[start : start + batch_size]
                reps[rows] = self([texts[i] for i in rows], max_length).float().cpu()
        finally:
            for module, mode in modes.items():
                module.training = mode
        return reps
