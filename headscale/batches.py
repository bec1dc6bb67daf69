"""Batches of pairs in an order that depends on the seed and the number of pairs alone."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from headscale.errors import UsageError


class TextPair(Protocol):
    """A query and a document that answers it.

    `negatives` (a sequence of hard negatives) and `scores` (the teacher's, the positive first) are read where
    the pair has them.
    """

    @property
    def query(self) -> str:
        """The query's text."""

    @property
    def document(self) -> str:
        """The text of the document that answers it."""


@dataclass(frozen=True)
class Batch:
    """The texts of one batch.

    Args:
        queries: B texts.
        documents: the B positives, then the hard negatives query by query: B (1 + n) texts.
        teacher: per query its teacher's scores, the positive first; None where the pairs have none.
    """

    queries: tuple[str, ...]
    documents: tuple[str, ...]
    teacher: tuple[tuple[float, ...], ...] | None

    @property
    def negatives(self) -> int:
        """Hard negatives per query."""
        return len(self.documents) // len(self.queries) - 1


def epoch_order(count: int, *, seed: int, epoch: int) -> list[int]:
    """A permutation of `range(count)` that is the same on every platform and version of Python."""
    source = random.Random(f"{seed}:{epoch}")
    keys = [source.random() for _ in range(count)]
    return sorted(range(count), key=keys.__getitem__)


def batches(pairs: Sequence[TextPair], *, batch_size: int, negatives: int = 0, seed: int = 0) -> Iterator[Batch]:
    """Batches without end, epoch after epoch; what does not fill a batch at an epoch's end is left out.

    Args:
        pairs: at least `batch_size` of them.
        batch_size: queries per batch.
        negatives: hard negatives taken from each pair, the first ones.
        seed: of the order.

    Raises:
        UsageError: too few pairs, or pairs with too few hard negatives.
    """
    _check(pairs, batch_size, negatives)
    epoch = 0
    while True:
        order = epoch_order(len(pairs), seed=seed, epoch=epoch)
        for start in range(0, len(order) - batch_size + 1, batch_size):
            yield _batch([pairs[i] for i in order[start : start + batch_size]], negatives)
        epoch += 1


def _check(pairs: Sequence[TextPair], batch_size: int, negatives: int) -> None:
    if len(pairs) < batch_size:
        raise UsageError(
            f"{len(pairs)} pairs do not fill a batch of {batch_size}",
            "give more pairs or a smaller batch size",
        )
    short = sum(len(_negatives(pair)) < negatives for pair in pairs)
    if short:
        raise UsageError(
            f"{short} of {len(pairs)} pairs have fewer than {negatives} hard negatives",
            "give pairs that have them, or ask for fewer",
        )


def _negatives(pair: TextPair) -> Sequence[str]:
    found: Sequence[str] = getattr(pair, "negatives", ())
    return found


def _batch(pairs: Sequence[TextPair], negatives: int) -> Batch:
    hard = [text for pair in pairs for text in _negatives(pair)[:negatives]]
    return Batch(
        queries=tuple(pair.query for pair in pairs),
        documents=(*(pair.document for pair in pairs), *hard),
        teacher=_teacher(pairs, negatives),
    )


def _teacher(pairs: Sequence[Any], negatives: int) -> tuple[tuple[float, ...], ...] | None:
    scores = [tuple(getattr(pair, "scores", None) or ())[: 1 + negatives] for pair in pairs]
    return tuple(scores) if all(len(row) == 1 + negatives for row in scores) and negatives else None
