"""Weights as the whole numbers that inverted indexes store, and what rounding takes from them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from headscale.errors import UsageError
from headscale.records import Impacts

FACTOR = 100.0  # Anserini's and Pyserini's for SPLADE: round(weight x 100), docs/experiments-spladev2.md
_BITS = range(1, 17)


@dataclass(frozen=True)
class Rounding:
    """How weights become whole numbers.

    Args:
        bits: 2^bits - 1 steps up to the largest weight of the collection (of the queries, for theirs); None: weights
            times 100, whatever the largest is.
    """

    bits: int | None = None

    @property
    def name(self) -> str:
        """As it is asked for: `x100` or a number of bits."""
        return "x100" if self.bits is None else str(self.bits)

    @property
    def note(self) -> str:
        """In words."""
        return "weights x 100, rounded" if self.bits is None else f"weights rounded to {self.bits} bits of the largest"

    def step(self, largest: float) -> float:
        """The weight that becomes 1."""
        if self.bits is None:
            return 1 / FACTOR
        return (largest if 0 < largest < math.inf else 1.0) / float(2**self.bits - 1)


def roundings(text: str) -> tuple[Rounding, ...]:
    """Roundings from a list: `x100,8,4`.

    Raises:
        UsageError: something else is in it.
    """
    found = []
    for part in (part.strip() for part in text.split(",") if part.strip()):
        if part != "x100" and not (part.isdigit() and int(part) in _BITS):
            raise UsageError(
                f"`--quantize {part}` is neither `x100` nor a number of bits up to 16", "for example x100,8,4"
            )
        found.append(Rounding(None if part == "x100" else int(part)))
    return tuple(dict.fromkeys(found))


def one_rounding(text: str) -> Rounding | None:
    """A single rounding; None for an empty text.

    Raises:
        UsageError: something else, or several.
    """
    found = roundings(text)
    if len(found) > 1:
        raise UsageError(f"`--quantize {text}` asks for {len(found)} roundings of one set of files", "choose one")
    return found[0] if found else None


@dataclass
class Rounded:
    """Rounds one side's vectors block by block, and counts what is lost.

    Args:
        step: the weight that becomes 1.
    """

    step: float
    weights: int = 0
    lost: int = 0
    emptied: int = 0
    largest: int = field(default=0)

    def __call__(self, vectors: Any) -> Any:
        """The impacts of a CSR matrix of weights, zeros left out; weights that are not finite stay what they are."""
        from scipy.sparse import csr_array

        data = np.rint(vectors.data / self.step)
        result = csr_array((data, vectors.indices, vectors.indptr), shape=vectors.shape, copy=True)
        result.eliminate_zeros()
        before, after = np.diff(vectors.indptr), np.diff(result.indptr)
        self.weights += int(before.sum())
        self.lost += int(before.sum() - after.sum())
        self.emptied += int(((before > 0) & (after == 0)).sum())
        finite = data[np.isfinite(data)]
        self.largest = max(self.largest, int(finite.max()) if len(finite) else 0)
        return result

    @property
    def share(self) -> float:
        """Of the weights above zero that became 0."""
        return self.lost / self.weights if self.weights else 0.0


def impacts_of(rounding: Rounding, queries: Rounded, documents: Rounded) -> Impacts:
    """What a rounding did to both sides."""
    emptied = queries.emptied + documents.emptied
    word = "emptied" if emptied else "thinned" if queries.lost + documents.lost else "kept"
    return Impacts(
        rounding=rounding.name,
        word=word,
        step_query=queries.step,
        step_document=documents.step,
        largest=max(queries.largest, documents.largest),
        lost_query=queries.share,
        lost_document=documents.share,
        emptied=emptied,
    )
