"""BM25 by bm25s, ranked by the same rules as a model: what a sparse retriever has to beat."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import numpy as np

from headscale.collection import Collection
from headscale.effectiveness import require
from headscale.search import Batches, Rankings, Searched, Tally

K1, B = 1.2, 0.75  # the defaults of Lucene's BM25Similarity
NOTE = f"bm25s, Lucene's variant, k1 {K1}, b {B}, English stop words and stemmer"
_PACKAGES = ("bm25s", "Stemmer")


def require_bm25() -> None:
    """Say in one sentence that a package it needs is missing."""
    for package in _PACKAGES:
        require(package, "the BM25 row")


def search_bm25(collection: Collection, *, on_batch: Batches | None = None) -> Searched:
    """Rank a collection with BM25, by bm25s.

    Args:
        collection: what is searched.
        on_batch: called with (queries done, queries in all).
    """
    require_bm25()
    import bm25s

    queries, documents = _words(collection.queries), _words(collection.documents)
    index = bm25s.BM25(method="lucene", k1=K1, b=B)
    if any(documents):
        index.index(documents, show_progress=False)
    rankings, everywhere = Rankings(collection), np.arange(len(documents))
    for i, words in enumerate(queries):
        known = index.get_tokens_ids(words) if any(documents) else []
        if known:
            rankings.add(i, index.get_scores_from_ids(known)[None, :].astype(np.float64), everywhere)
        if on_batch:
            on_batch(i + 1, len(queries))
    numbers = {word: i for i, word in enumerate(dict.fromkeys(chain.from_iterable([*queries, *documents])))}
    return Searched(rankings.ranked(), _word_tally(queries, numbers), _word_tally(documents, numbers))


def _words(texts: Sequence[str]) -> list[list[str]]:
    import bm25s
    import Stemmer

    found: list[list[str]] = bm25s.tokenize(
        list(texts), stopwords="en", stemmer=Stemmer.Stemmer("english"), return_ids=False, show_progress=False
    )
    return found


def _word_tally(texts: Sequence[Sequence[str]], numbers: dict[str, int]) -> Tally:
    """How many distinct words texts have; their weights depend on the collection and are not counted."""
    from scipy.sparse import csr_array

    tally = Tally(len(numbers), weighted=False)
    distinct = [sorted({numbers[word] for word in text}) for text in texts]
    terms = np.array([term for text in distinct for term in text], dtype=np.int64)
    starts = np.cumsum([0, *map(len, distinct)])
    tally.add(csr_array((np.ones(len(terms)), terms, starts), shape=(len(texts), len(numbers))))
    return tally
