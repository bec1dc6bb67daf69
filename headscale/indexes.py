"""Encoded collections in the formats that search engines read.

Documents come longest first, as they were encoded; every file is complete or not there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from headscale import __version__
from headscale.errors import HeadscaleError, UsageError
from headscale.impacts import Rounded, Rounding, impacts_of
from headscale.records import Impacts, Record, Sparsity
from headscale.search import Tally, encode_documents, encode_queries, encoding_order
from headscale.shards import Shards
from headscale.staging import check_empty, created, staged
from headscale.terms import term_names

if TYPE_CHECKING:
    from headscale.collection import Collection
    from headscale.deployment import Deployment

FORMATS = ("jsonl", "anserini", "opensearch", "opensearch-ann", "seismic")
FIELD = "embedding"  # of an OpenSearch document
_LONGEST = {"seismic": 30}  # characters: pyseismic-lsr hands tokens over as NumPy's `U30`
_AS_TEXT = 3.5  # bytes of the files per byte of shards: measured 1.7 to 3.4, at 1 % and 90 % active terms

Vector = dict[str, float]
Rows = Iterator[tuple[str, str, Vector]]  # id, text, weights


@dataclass(frozen=True)
class Exported(Record):
    """An encoded collection on disk."""

    name: str  # of the model
    collection: str
    format: str
    directory: str
    files: dict[str, int]  # bytes of each
    documents: int
    queries: int
    empty: int  # documents without an active term, which no index finds
    query: Sparsity
    document: Sparsity
    impacts: Impacts | None  # where weights are whole numbers


def usual_rounding(kind: str) -> Rounding | None:
    """What a format takes when nothing is asked for: Anserini's impacts are whole numbers."""
    return Rounding() if kind == "anserini" else None


def export(
    plan: Deployment,
    name: str,
    collection: Collection,
    target: Path,
    *,
    kind: str = "jsonl",
    rounding: Rounding | None = None,
    index: str = "headscale",
    on_batch: Callable[[int, int], None] | None = None,
) -> Exported:
    """Encode a collection and write it for a search engine; an interrupted export goes on where it was.

    Args:
        plan: encoder, query side and lengths, from `headscale.deployment.deployment_of`.
        name: of the model.
        collection: documents and queries.
        target: a folder that is empty or new.
        kind: one of
            - `jsonl`: `documents.jsonl` and `queries.jsonl` of `{"id", "vector": {term: weight}}`;
            - `anserini`: `corpus/documents.jsonl` of `{"id", "contents", "vector": {term: impact}}` for
              `-collection JsonVectorCollection -impact -pretokenized`, and `topics.tsv` where a term stands as often
              as its impact, for `-topicReader TsvString` (castorini/anserini, docs/regressions, and castorini/pyserini,
              docs/experiments-spladev2.md);
            - `opensearch`: `documents.bulk.ndjson` for `_bulk`, the mapping with a `rank_features` field in
              `index.json`, and bodies of `neural_sparse` queries (docs.opensearch.org, "Neural sparse search using
              raw vectors"); `opensearch-ann` is the same for a `sparse_vector` field, whose keys are term numbers;
            - `seismic`: `documents.jsonl` and `queries.jsonl` of `{"id", "content", "vector"}` (TusKANNy/seismic).
        rounding: of the weights to whole numbers; None: as they are.
        index: the name of an OpenSearch index.
        on_batch: called with (texts encoded, texts in all).

    Raises:
        UsageError: an unknown format, or a folder that holds something.
        HeadscaleError: weights that are not finite, or no room on the disk.
    """
    check_target(kind, target)
    queries, shards, asked, told = _encoded(plan, name, collection, target, on_batch)
    terms = plan.encoder.head.vocab_size
    names = [str(i) for i in range(terms)] if kind == "opensearch-ann" else term_names(
        plan.encoder.tokenizer, terms, dots=not kind.startswith("opensearch"), longest=_LONGEST.get(kind)
    )  # fmt: skip
    rounded = None if rounding is None else [Rounded(rounding.step(side.largest)) for side in (asked, told)]
    wanted = _vectors(queries, None if rounded is None else rounded[0])
    blocks = ((where, _vectors(block, None if rounded is None else rounded[1])) for where, block in shards.kept())
    size = sum(file.stat().st_size for file in shards.folder.glob("*"))
    with staged(target, int(_AS_TEXT * size)) as stage:
        _write(
            stage, kind, index,
            _rows(names, [(np.arange(len(collection.queries)), wanted)], collection.query_ids, collection.queries),
            _rows(names, blocks, collection.document_ids, collection.documents),
        )  # fmt: skip
        files = {str(f.relative_to(stage)): f.stat().st_size for f in sorted(stage.rglob("*")) if f.is_file()}
    shards.forget()
    sparsity = told.sparsity()
    impacts = None if rounding is None or rounded is None else impacts_of(rounding, *rounded)
    return Exported(
        name, collection.name, kind, str(target), files, len(collection.documents), len(collection.queries),
        round(sparsity.empty * sparsity.texts), asked.sparsity(), sparsity, impacts,
    )  # fmt: skip


def check_target(kind: str, target: Path) -> None:
    """Refuse what cannot be written, before anything is loaded.

    Raises:
        UsageError: an unknown format, or a folder that holds something.
    """
    if kind not in FORMATS:
        raise UsageError(f"`--format {kind}` is none of {', '.join(FORMATS)}", "see `headscale encode --help`")
    check_empty(target, "-o")


def _encoded(
    plan: Deployment, name: str, collection: Collection, target: Path, on_batch: Callable[[int, int], None] | None
) -> tuple[Any, Shards, Tally, Tally]:
    """The queries, the documents on disk, and the statistics of both."""
    setup, encoder, documents = plan.setup, plan.encoder, collection.documents
    total, done = len(documents) + (len(collection.queries) if plan.queries is None else 0), 0

    def step(texts: int) -> None:
        nonlocal done
        done += texts
        if on_batch:
            on_batch(done, total)

    if plan.queries is None:
        queries = encode_queries(encoder, collection, setup.query_length, setup.batch_size, step)
    else:
        queries = plan.queries.encode(collection.queries, setup.query_length)
    terms = encoder.head.vocab_size
    asked, told = Tally(terms), Tally(terms)
    asked.add(queries)
    folder = target.parent / f".{target.name}.{_key(plan, name, collection)}.encoded"
    shards = Shards(folder, encoding_order(documents), terms)
    for _, block in encode_documents(
        encoder, documents, max_length=setup.document_length, batch_size=setup.batch_size, shards=shards, on_text=step
    ):
        told.add(block)
    for side, what in ((asked, "queries"), (told, "documents")):
        if count := side.sparsity().non_finite:
            shards.forget()
            raise HeadscaleError(f"{count} {what} have weights that are not finite", "inspect the model first")
    if not shards.complete:
        raise HeadscaleError("the disk has no room for the encoded documents", "make room, or write to another disk")
    return queries, shards, asked, told


def _key(plan: Deployment, name: str, collection: Collection) -> str:
    """What tells one encoding from another, for going on with it: the head's weights stand for the model's."""
    encoder = plan.encoder
    head = encoder.head.weight.detach().float().sum(1).cpu().numpy().tobytes()
    said = [name, collection.fingerprint, plan.setup.document_length, plan.setup.mask_special_tokens, encoder.pooling,
            encoder.activation, __version__, hashlib.sha256(head).hexdigest()]  # fmt: skip
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:12]


def _vectors(vectors: Any, rounded: Rounded | None) -> Any:
    return vectors if rounded is None else rounded(vectors)


def _rows(names: Sequence[str], blocks: Any, ids: Sequence[str], texts: Sequence[str]) -> Rows:
    for positions, vectors in blocks:
        for row, position in enumerate(positions):
            part = slice(vectors.indptr[row], vectors.indptr[row + 1])
            weights = {names[t]: _number(w) for t, w in zip(vectors.indices[part], vectors.data[part], strict=True)}
            yield ids[position], texts[position], weights


def _number(weight: float) -> float:
    """Nine digits, which single precision comes back from; a whole number as one."""
    return int(weight) if weight == int(weight) else float(f"{weight:.9g}")


# --- the formats ----------------------------------------------------------------------------------------------------


def _write(stage: Path, kind: str, index: str, queries: Rows, documents: Rows) -> None:
    if kind == "anserini":
        _lines(stage / "corpus" / "documents.jsonl", ({"id": i, "contents": t, "vector": v} for i, t, v in documents))
        topics = (f"{i}\t{' '.join(' '.join([term] * int(n)) for term, n in v.items())}\n" for i, _, v in queries)
        _text(stage / "topics.tsv", topics)
    elif kind.startswith("opensearch"):
        _json(stage / "index.json", _mapping(kind))
        _lines(stage / "documents.bulk.ndjson", _bulk(index, documents))
        _lines(stage / "queries.jsonl", ({"id": i, "query": _neural_sparse(v)} for i, _, v in queries))
    else:
        content = kind == "seismic"
        for name, rows in (("documents.jsonl", documents), ("queries.jsonl", queries)):
            _lines(stage / name, ({"id": i, **({"content": t} if content else {}), "vector": v} for i, t, v in rows))


def _bulk(index: str, documents: Rows) -> Iterator[dict[str, Any]]:
    for identity, text, vector in documents:
        yield {"index": {"_index": index, "_id": identity}}
        yield {"text": text, FIELD: vector}


def _mapping(kind: str) -> dict[str, Any]:
    field: dict[str, Any] = {"type": "rank_features"}
    settings: dict[str, Any] = {}
    if kind == "opensearch-ann":
        field, settings = {"type": "sparse_vector", "method": {"name": "seismic"}}, {"index": {"sparse": True}}
    return {"settings": settings, "mappings": {"properties": {FIELD: field, "text": {"type": "text"}}}}


def _neural_sparse(vector: Vector) -> dict[str, Any]:
    return {"neural_sparse": {FIELD: {"query_tokens": vector}}}


def _lines(path: Path, rows: Iterator[dict[str, Any]]) -> None:
    _text(path, (json.dumps(row, allow_nan=False) + "\n" for row in rows))


def _json(path: Path, content: dict[str, Any]) -> None:
    _text(path, [json.dumps(content, indent=1) + "\n"])


def _text(path: Path, lines: Any) -> None:
    with created(path) as file:
        for line in lines:
            file.write(line.encode("utf-8", "replace"))
