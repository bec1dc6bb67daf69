"""Exact search with sparse vectors: encode in blocks, score by sparse products, keep the best of every query.

Document vectors are scored block by block and dropped, so memory holds the queries, one block and the rankings,
whatever the size of the collection. The order of documents is total (score, then ties against us, then position),
so the rankings do not depend on the blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from headscale.collection import Collection
from headscale.effectiveness import DEPTH, Ranked
from headscale.errors import HeadscaleError, MemoryForecastError
from headscale.impacts import Rounded, Rounding, impacts_of
from headscale.records import Impacts, Sparsity
from headscale.shards import Shards

if TYPE_CHECKING:
    from headscale.encoder import SpladeEncoder

Batches = Callable[[int, int], None]
Positions = np.ndarray[Any, np.dtype[np.int64]]
Array = np.ndarray[Any, Any]

_BLOCK_ENTRIES = 2**21  # weights of a block of documents, 24 MB
_BLOCK_DOCUMENTS = 4096
_SCORES = 2**22  # scores held at once, 32 MB
# Above this product of the shares of active terms the dense product is faster. Measured on 2 cores with vocabularies
# of 6,144 and 30,522 terms: at 1/100 the sparse one takes 0.2 to 0.5 of the time, at 1/25 1.2 to 1.7, at 1/4 6 to 14.
_DENSE_SHARE = 1 / 40
_DENSE_ENTRIES = 2**23  # of documents written out at once, 64 MB
_ENTRY_BYTES = 12  # a weight in double precision and its term's number
_KEPT_BYTES = 40  # a document kept in a ranking, with what merging takes


# --- how sparse ---------------------------------------------------------------------------------------------------


@dataclass
class Tally:
    """Statistics of sparse vectors that pass by in blocks.

    Args:
        terms: the size of the vocabulary.
    """

    terms: int
    weighted: bool = True
    _active: list[Array] = field(default_factory=list)
    _count: Array = field(init=False)
    _sum: Array = field(init=False)
    _max: float = 0.0
    _non_finite: int = 0

    def __post_init__(self) -> None:
        self._count, self._sum = np.zeros(self.terms), np.zeros(self.terms)

    def add(self, vectors: Any) -> None:
        """Count a block, a CSR matrix (texts, terms)."""
        self._active.append(np.diff(vectors.indptr))
        self._count += np.bincount(vectors.indices, minlength=self.terms)
        self._sum += np.bincount(vectors.indices, weights=vectors.data, minlength=self.terms)
        if vectors.nnz:
            self._max = float(np.maximum(self._max, vectors.data.max()))
            rows = np.repeat(np.arange(vectors.shape[0]), self._active[-1])
            self._non_finite += len(np.unique(rows[~np.isfinite(vectors.data)]))

    @property
    def texts(self) -> int:
        """Texts counted so far."""
        return sum(map(len, self._active))

    @property
    def largest(self) -> float:
        """The largest weight; 0 without any."""
        return self._max

    @property
    def activation(self) -> Array:
        """Share of the texts in which each term is active, (terms,)."""
        return self._count / max(1, self.texts)

    def sparsity(self) -> Sparsity:
        """The statistics of everything counted."""
        active = np.concatenate(self._active)
        low, middle, high = np.percentile(active, (5, 50, 95))
        return Sparsity(
            texts=len(active),
            active_dims=float(active.mean()),
            active_dims_p5=float(low),
            active_dims_p50=float(middle),
            active_dims_p95=float(high),
            empty=float((active == 0).mean()),
            max_weight=self._max if self.weighted else None,
            flops_reg=math.fsum(np.square(self._sum / len(active))) if self.weighted else None,
            non_finite=self._non_finite,
        )


def flops_cost(queries: Tally, documents: Tally) -> float:
    """Expected multiplications per pair of a query and a document: sum over terms of p_q p_d (arXiv 2004.05665)."""
    return math.fsum(queries.activation * documents.activation)


# --- encoding -----------------------------------------------------------------------------------------------------


def encode(
    encoder: SpladeEncoder,
    texts: Sequence[str],
    *,
    max_length: int,
    batch_size: int,
    on_text: Callable[[int], None] | None = None,
    start: int = 0,
) -> Iterator[tuple[Positions, Any]]:
    """Representations batch by batch, the longest texts first; on a GPU that is full, batches are halved.

    Args:
        encoder: from texts to representations.
        texts: in any order.
        max_length: tokens, special ones included.
        batch_size: texts at once.
        on_text: called with the number of texts a batch had.
        start: texts of that order that are encoded already.

    Yields:
        positions in `texts`, (n,), and a CSR matrix (n, terms) in double precision; every text once.

    Raises:
        MemoryForecastError: not even one text fits on the GPU.
    """
    order = encoding_order(texts)
    while start < len(order):
        part = order[start : start + batch_size]
        reps = _encoded(encoder, [texts[i] for i in part], max_length)
        if reps is None:
            batch_size = _halved(min(batch_size, len(part)), max_length)
            continue
        yield np.array(part), reps
        start += len(part)
        if on_text:
            on_text(len(part))


def encoding_order(texts: Sequence[str]) -> list[int]:
    """Positions of the texts, the longest first: what does not fit is then known at once."""
    return sorted(range(len(texts)), key=lambda i: -len(texts[i]))


def _encoded(encoder: SpladeEncoder, texts: Sequence[str], max_length: int) -> Any:
    import torch

    try:
        reps = encoder.encode(texts, max_length=max_length, batch_size=len(texts)).numpy()
    except torch.OutOfMemoryError:
        return None
    return _sparse(reps)


def _halved(batch_size: int, max_length: int) -> int:
    import torch

    if batch_size == 1:
        raise MemoryForecastError(
            f"one text of {max_length} tokens does not fit on the GPU", "use shorter texts, or `--device cpu`"
        )
    torch.cuda.empty_cache()
    return batch_size // 2


def _sparse(reps: Array) -> Any:
    from scipy.sparse import csr_array

    rows, terms = np.nonzero(reps)  # NaN counts as active, so that it is seen
    starts = np.searchsorted(rows, np.arange(len(reps) + 1))
    return csr_array((reps[rows, terms].astype(np.float64), terms.astype(np.int32), starts), shape=reps.shape)


def encode_documents(
    encoder: SpladeEncoder,
    texts: Sequence[str],
    *,
    max_length: int,
    batch_size: int,
    shards: Shards | None = None,
    on_text: Callable[[int], None] | None = None,
) -> Iterator[tuple[Positions, Any]]:
    """Representations in blocks that are worth a product, those on disk first and then what is missing.

    Arguments are those of `encode`; `shards` keeps the blocks as they pass.
    """
    start = 0 if shards is None else shards.done
    encoded = encode(encoder, texts, max_length=max_length, batch_size=batch_size, on_text=on_text, start=start)
    return _blocks(encoded) if shards is None else shards.keeping(_blocks(encoded), on_text)


def _blocks(encoded: Iterable[tuple[Positions, Any]]) -> Iterator[tuple[Positions, Any]]:
    """Batches joined to blocks that are worth a product, their positions ascending."""
    held: list[tuple[Positions, Any]] = []
    for part in encoded:
        held.append(part)
        full = sum(reps.nnz for _, reps in held) >= _BLOCK_ENTRIES
        if full or sum(len(positions) for positions, _ in held) >= _BLOCK_DOCUMENTS:
            yield _in_order(held)
            held = []
    if held:
        yield _in_order(held)


def _in_order(parts: Sequence[tuple[Positions, Any]]) -> tuple[Positions, Any]:
    from scipy.sparse import vstack

    positions = np.concatenate([where for where, _ in parts])
    order = np.argsort(positions)
    return positions[order], vstack([reps for _, reps in parts], format="csr")[order]


# --- ranking ------------------------------------------------------------------------------------------------------


class Rankings:
    """The best documents of every query so far; of equal scores the less relevant document is the better one.

    A document that shares no term with the query is not retrieved. A score that is not a number counts against
    us: it is the best there is for a document that is not relevant, and the worst for one that is.

    Args:
        collection: its judgements break the ties.
        depth: documents kept per query.
    """

    def __init__(self, collection: Collection, depth: int = DEPTH) -> None:
        count = len(collection.queries)
        self.depth = depth
        self._relevant = [
            (query, document, grade)
            for query, here in enumerate(collection.relevant)
            for document, grade in here.items()
        ]
        self._starts = np.cumsum([0, *map(len, collection.relevant)])
        self._own = [(query, document, 1) for query, document in enumerate(collection.own) if document is not None]
        self._kept = [(np.empty(0), np.empty(0, np.int64), np.empty(0, np.int64)) for _ in range(count)]
        self._threshold = np.zeros(count)

    def add(self, first: int, scores: Array, documents: Positions) -> None:
        """Let documents compete.

        Args:
            first: the query of the first row.
            scores: (queries, documents), non-negative.
            documents: their positions in the collection, ascending, (documents,).
        """
        last = first + len(scores)
        grades = _table(self._relevant[self._starts[first] : self._starts[last]], first, scores.shape, documents)
        own = _table([row for row in self._own if first <= row[0] < last], first, scores.shape, documents)
        scores = np.where(np.isnan(scores), np.where(grades > 0, -np.inf, np.inf), scores)
        wanted = (scores > 0) & (scores >= self._threshold[first:last, None]) & (own == 0)
        for row in np.flatnonzero(wanted.any(1)):
            chosen = np.flatnonzero(wanted[row])
            self._merge(first + int(row), scores[row, chosen], grades[row, chosen], documents[chosen])

    def _merge(self, query: int, scores: Array, grades: Array, documents: Positions) -> None:
        kept = self._kept[query]
        joined = [np.concatenate(pair) for pair in zip(kept, (scores, grades, documents), strict=True)]
        order = np.lexsort((joined[2], joined[1], -joined[0]))[: self.depth]
        self._kept[query] = (joined[0][order], joined[1][order], joined[2][order])
        if len(order) == self.depth:
            self._threshold[query] = self._kept[query][0][-1]

    def ranked(self) -> list[Ranked]:
        """The rankings, query by query."""
        return [Ranked(documents, scores) for scores, _, documents in self._kept]


def _table(entries: Sequence[tuple[int, int, int]], first: int, shape: Sequence[int], documents: Positions) -> Array:
    """The values of (query, document, value) entries in a block of queries and documents, 0 elsewhere."""
    table = np.zeros(shape, dtype=np.int64)
    if entries:
        queries, wanted, values = np.array(entries).T
        columns = np.minimum(np.searchsorted(documents, wanted), len(documents) - 1)
        here = documents[columns] == wanted
        table[queries[here] - first, columns[here]] = values[here]
    return table


def products(queries: Any, documents: Any) -> Array:
    """Dot products (queries, documents) of CSR matrices (queries, terms) and (documents, terms)."""
    share = math.prod(side.nnz / max(1, side.shape[0] * side.shape[1]) for side in (queries, documents))
    finite = np.isfinite(queries.data).all() and np.isfinite(documents.data).all()
    if share <= _DENSE_SHARE or not finite:  # written out, infinity would meet zeros
        sparse: Array = (queries @ documents.T).toarray()
        return sparse
    left, step = queries.toarray(), max(1, _DENSE_ENTRIES // documents.shape[1])
    starts = range(0, documents.shape[0], step)
    return np.concatenate([left @ documents[i : i + step].toarray().T for i in starts], axis=1)


# --- a model -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Searched:
    """Rankings of a collection's queries, with the sparsity of what made them."""

    rankings: list[Ranked]
    queries: Tally
    documents: Tally
    impacts: Impacts | None = None


class QueryEncoder(Protocol):
    """What can stand for the model on the query side."""

    def encode(self, texts: Sequence[str], max_length: int) -> Any:
        """A CSR matrix (texts, terms) in double precision."""


def search(
    encoder: SpladeEncoder,
    collection: Collection,
    *,
    query_length: int,
    document_length: int,
    batch_size: int = 64,
    on_batch: Batches | None = None,
) -> Searched:
    """Rank a collection with a model: every document is scored, none is left out by an index.

    Args:
        encoder: of queries and documents.
        collection: what is searched.
        query_length, document_length: in tokens, special ones included.
        batch_size: texts encoded at once.
        on_batch: called with (texts encoded, texts in all).

    Raises:
        MemoryForecastError: the queries' representations and rankings would not fit in memory.
    """
    (found,) = search_rounded(
        encoder, collection, query_length=query_length, document_length=document_length, batch_size=batch_size,
        on_batch=on_batch,
    )  # fmt: skip
    return found


def search_rounded(
    encoder: SpladeEncoder,
    collection: Collection,
    *,
    query_length: int,
    document_length: int,
    batch_size: int = 64,
    query_encoder: QueryEncoder | None = None,
    roundings: Sequence[Rounding] = (),
    folder: Path | None = None,
    on_batch: Batches | None = None,
) -> list[Searched]:
    """`search` with the weights as they are, then with every rounding of them; documents are encoded once.

    Args:
        encoder: of documents, and of queries unless there is another.
        collection: what is searched.
        query_length, document_length: in tokens, special ones included.
        batch_size: texts encoded at once.
        query_encoder: of queries, in the model's place.
        roundings: of the weights.
        folder: where encoded documents are kept until the end, and taken from if an earlier attempt left some; it
            must be this encoder's and this collection's alone. Roundings need one.
        on_batch: called with (texts encoded, texts in all).

    Raises:
        MemoryForecastError: the queries' representations and rankings would not fit in memory.
        HeadscaleError: the disk has no room for what the roundings need.
    """
    documents, done = collection.documents, 0
    total = len(documents) + (len(collection.queries) if query_encoder is None else 0)

    def step(texts: int) -> None:
        nonlocal done
        done += texts
        if on_batch:
            on_batch(done, total)

    terms = encoder.head.vocab_size
    if query_encoder is None:
        queries = encode_queries(encoder, collection, query_length, batch_size, step)
    else:
        queries = query_encoder.encode(collection.queries, query_length)
    shards = None if folder is None else Shards(folder, encoding_order(documents), terms)
    blocks = encode_documents(
        encoder, documents, max_length=document_length, batch_size=batch_size, shards=shards, on_text=step
    )
    found = [rank(queries, blocks, collection, terms)]
    if roundings:
        if shards is None or not shards.complete:
            raise HeadscaleError(
                "the disk has no room for the encoded documents", "round fewer documents, or make room"
            )
        found += [_rounded(one, queries, shards, collection, found[0], terms) for one in roundings]
    if shards is not None:
        shards.forget()
    return found


def rank(queries: Any, blocks: Iterable[tuple[Positions, Any]], collection: Collection, terms: int) -> Searched:
    """Rank documents that come in blocks.

    Args:
        queries: CSR matrix (queries, terms).
        blocks: positions of documents, ascending, and their vectors, a CSR matrix (documents, terms).
        collection: its judgements break the ties.
        terms: of the vocabulary.
    """
    rankings, asked, tally = Rankings(collection), Tally(terms), Tally(terms)
    asked.add(queries)
    for positions, block in blocks:
        tally.add(block)
        size = max(1, min(256, _SCORES // len(positions)))
        for first in range(0, queries.shape[0], size):
            rankings.add(first, products(queries[first : first + size], block), positions)
    return Searched(rankings.ranked(), asked, tally)


def _rounded(
    rounding: Rounding, queries: Any, shards: Shards, collection: Collection, exact: Searched, terms: int
) -> Searched:
    asked, told = (Rounded(rounding.step(side.largest)) for side in (exact.queries, exact.documents))
    blocks = ((positions, told(block)) for positions, block in shards.kept())
    found = rank(asked(queries), blocks, collection, terms)
    return replace(found, impacts=impacts_of(rounding, asked, told))


def encode_queries(
    encoder: SpladeEncoder, collection: Collection, length: int, batch_size: int, on_text: Callable[[int], None]
) -> Any:
    """All queries in their own order as one matrix (queries, terms)."""
    parts: list[tuple[Positions, Any]] = []
    encoded = encode(encoder, collection.queries, max_length=length, batch_size=batch_size, on_text=on_text)
    for positions, reps in encoded:
        if not parts:
            check_memory(collection, reps.nnz / len(positions))
        parts.append((positions, reps))
    return _in_order(parts)[1]


def check_memory(collection: Collection, active_dims: float) -> None:
    """Refuse queries whose representations and rankings would not fit in what is free now.

    Args:
        collection: its queries are counted.
        active_dims: of a query.
    """
    from headscale.memory import available_memory

    queries, available = len(collection.queries), available_memory()
    depth = min(DEPTH, len(collection.documents))
    needed = int(queries * (2 * active_dims * _ENTRY_BYTES + depth * _KEPT_BYTES))
    if available is not None and needed > available:
        raise MemoryForecastError(
            f"{queries} queries of {active_dims:.0f} active dims need about {needed / 2**30:.1f} GiB,"
            f" and {available / 2**30:.1f} GiB are free",
            "evaluate fewer queries, or a sparser model",
        )
