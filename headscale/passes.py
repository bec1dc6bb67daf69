"""A batch through the model at once, or in parts whose gradients are those of the whole batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from headscale.device import random_states, restore_random_states
from headscale.encoder import SpladeEncoder

Side = tuple[Sequence[str], int]  # texts, and their length in tokens
Tokens = dict[str, Tensor]


class Passes:
    """Representations of a batch, and the way back from their gradients.

    In parts (arXiv 2101.06983): a first pass without graph gives all representations, the loss over them their
    gradients, and a second pass, with the same dropout, carries these into the model part by part.

    Args:
        encoder: from texts to representations.
        autocast: the context of every pass.
        size: texts that go through the model at once; None: all.
    """

    def __init__(
        self, encoder: SpladeEncoder, autocast: Callable[[], AbstractContextManager[None]], size: int | None
    ) -> None:
        self.encoder = encoder
        self.autocast = autocast
        self.size = size
        self._parts: list[list[tuple[Tokens, list[Tensor]]]] = []  # per side: tokens and random states
        self._leaves: list[Tensor] = []

    def forward(self, sides: Sequence[Side]) -> list[Tensor]:
        """Representations (texts, vocab) of each side."""
        with self.autocast():
            if self.size is None:
                return [self.encoder(texts, length) for texts, length in sides]
            with torch.no_grad():
                self._parts = [list(self._split(side, self.size)) for side in sides]
                self._leaves = [torch.cat([self._first(part) for part in parts]) for parts in self._parts]
        return [leaf.requires_grad_() for leaf in self._leaves]

    def backward(self) -> None:
        """Carry the representations' gradients into the model; nothing is left to do without parts."""
        for leaf, parts in zip(self._leaves, self._parts, strict=True):
            assert leaf.grad is not None
            gradients = torch.split(leaf.grad, self.size or len(leaf))
            for (tokens, states), gradient in zip(parts, gradients, strict=True):
                torch.autograd.backward([self._again(tokens, states)], [gradient])
        self.forget()

    def forget(self) -> None:
        """Let go of what the way back would have needed."""
        self._parts, self._leaves = [], []

    def _split(self, side: Side, size: int) -> Iterator[tuple[Tokens, list[Tensor]]]:
        tokens = self.encoder.tokenize(*side)
        for start in range(0, len(side[0]), size):
            yield {name: value[start : start + size] for name, value in tokens.items()}, []

    def _first(self, part: tuple[Tokens, list[Tensor]]) -> Tensor:
        tokens, states = part
        states.extend(random_states(str(self.encoder.device)))
        return self.encoder.pool(tokens)

    def _again(self, tokens: Tokens, states: Sequence[Tensor]) -> Tensor:
        device = str(self.encoder.device)
        now = random_states(device)
        restore_random_states(device, states)
        with self.autocast():
            rep = self.encoder.pool(tokens)
        restore_random_states(device, now)
        return rep
