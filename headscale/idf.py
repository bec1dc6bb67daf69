"""Inference-free queries: a table of weights by term stands for the model (arXiv 2411.04403)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from headscale.errors import NotFoundError, UnreadableError

Weights = np.ndarray[Any, np.dtype[np.float64]]

OF_COLLECTION = "the collection's IDF"
_BATCH = 1024  # texts tokenized at once
_HINT = "give a JSON object of weights by token, as OpenSearch's `idf.json`, or a saved SparseStaticEmbedding"


@dataclass(frozen=True)
class IdfQueries:
    """Encodes a query as the weights of the tokens in it, whatever their number and order.

    That is what sentence-transformers' SparseStaticEmbedding does.

    Args:
        tokenizer: the model's, from transformers.
        weights: (terms,), none below 0.
        origin: where they are from, in a few words.
    """

    tokenizer: Any
    weights: Weights
    origin: str

    def encode(self, texts: Sequence[str], max_length: int) -> Any:
        """Queries as a CSR matrix (queries, terms) in double precision."""
        from scipy.sparse import csr_array

        known = np.flatnonzero(self.weights > 0)
        rows = [np.intersect1d(ids, known) for ids in token_ids(self.tokenizer, texts, max_length)]
        terms = np.concatenate([*rows, np.empty(0, np.int64)]).astype(np.int32)
        starts = np.cumsum([0, *map(len, rows)])
        return csr_array((self.weights[terms], terms, starts), shape=(len(texts), len(self.weights)))


def token_ids(tokenizer: Any, texts: Iterable[str], max_length: int) -> Iterator[np.ndarray[Any, np.dtype[np.int64]]]:
    """The tokens of every text, without special ones and cut at `max_length`."""
    rest = iter(texts)
    while part := list(islice(rest, _BATCH)):
        found = tokenizer(part, add_special_tokens=False, truncation=True, max_length=max_length)["input_ids"]
        yield from (np.array(ids, dtype=np.int64) for ids in found)


def idf_of(tokenizer: Any, texts: Sequence[str], terms: int, *, max_length: int) -> IdfQueries:
    """The table of a collection: ln(1 + (N - n + 1/2) / (n + 1/2)) for a term in n of N texts, as Lucene's BM25.

    Special tokens weigh nothing; a term in no text weighs the most.

    Args:
        tokenizer: the model's.
        texts: of the collection.
        terms: of the vocabulary.
        max_length: tokens of a text that count.
    """
    counts = np.zeros(terms)
    for ids in token_ids(tokenizer, texts, max_length):
        counts[np.unique(ids[ids < terms])] += 1
    weights = np.log1p((len(texts) - counts + 0.5) / (counts + 0.5))
    weights[[i for i in tokenizer.all_special_ids if i < terms]] = 0.0
    return IdfQueries(tokenizer, weights, OF_COLLECTION)


def read_idf(path: Path, tokenizer: Any, terms: int) -> IdfQueries:
    """A table from OpenSearch's `idf.json` (`{token: weight}`), or from the file of a saved SparseStaticEmbedding.

    Args:
        path: `.json` or `.safetensors`.
        tokenizer: the model's; tokens that it does not know are left out.
        terms: of the vocabulary.

    Raises:
        NotFoundError: no such file.
        UnreadableError: it holds no such table.
    """
    if not path.is_file():
        raise NotFoundError(f"no such file: `{path}`", _HINT)
    found = _from_json(path, tokenizer, terms) if path.suffix == ".json" else _from_tensor(path, terms)
    if not np.isfinite(found).all() or (found < 0).any() or not (found > 0).any():
        raise UnreadableError(f"`{path}` has weights that are negative or not finite, or none above zero", _HINT)
    return IdfQueries(tokenizer, found, f"`{path}`")


def _from_json(path: Path, tokenizer: Any, terms: int) -> Weights:
    try:
        table = json.loads(path.read_bytes())
    except (ValueError, OSError, RecursionError):
        table = None
    if not isinstance(table, dict) or not all(isinstance(w, int | float) for w in table.values()):
        raise UnreadableError(f"`{path}` is not a JSON object of weights by token", _HINT)
    vocabulary = tokenizer.get_vocab()
    weights = np.zeros(terms)
    known = {vocabulary[token]: float(weight) for token, weight in table.items() if token in vocabulary}
    for identity, weight in known.items():
        if identity < terms:
            weights[identity] = weight
    if not known:
        raise UnreadableError(f"`{path}` names no token of this model's vocabulary", _HINT)
    return weights


def _from_tensor(path: Path, terms: int) -> Weights:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UnreadableError(f"`{path}` cannot be read: {error}", _HINT) from None
    if [tensor.ndim for tensor in tensors.values()] != [1]:
        raise UnreadableError(f"`{path}` does not hold one weight per term", _HINT)
    (found,) = tensors.values()
    weights = np.zeros(terms)
    weights[: len(found)] = found[:terms]
    return weights
