"""Test collections: documents, queries and who answers whom, in the BEIR layout or from the built-in docstrings."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from headscale.beir import LAYOUT, Parts, Row, identifier, joined_text, judgement, parts_of
from headscale.errors import MemoryForecastError, UnreadableError, UsageError

if TYPE_CHECKING:
    from headscale.texts import Pair

BUILT_IN = "built-in"

# Bytes of memory per byte of `corpus.jsonl`, ids and tables included. Measured: 1.1 for texts of 1,100 bytes, 1.6
# for 330, 2.6 for 100, where what Python adds to every string and the table of ids weigh most.
_MEMORY_RATIO = 2.6
_SMALL = 256 * 2**20  # files that no machine at hand needs a forecast for

Relevant = dict[int, int]  # position of a document -> grade above 0


@dataclass(frozen=True)
class Collection:
    """Documents, and the queries for which relevant ones are known.

    Args:
        name: its folder, or `built-in`.
        split: which judgements.
        document_ids, documents: ids and texts (title and text joined).
        query_ids, queries: of the queries with at least one relevant document.
        relevant: per query its relevant documents that are in the collection, and their grades.
        absent: per query its relevant documents that are not, by id; they count as never found.
        own: per query the document that is the query itself, which is not ranked for it; else None.
        left_out: queries of the file without a relevant document.
    """

    name: str
    split: str
    document_ids: tuple[str, ...]
    documents: tuple[str, ...]
    query_ids: tuple[str, ...]
    queries: tuple[str, ...]
    relevant: tuple[Relevant, ...]
    absent: tuple[dict[str, int], ...]
    own: tuple[int | None, ...]
    left_out: int = 0

    @property
    def judgements(self) -> int:
        """Relevant pairs of a query and a document."""
        return sum(len(r) + len(a) for r, a in zip(self.relevant, self.absent, strict=True))

    @property
    def qrels(self) -> dict[str, dict[str, int]]:
        """Grades above 0 by the ids of query and document, those of absent documents included."""
        ids = self.document_ids
        rows = zip(self.query_ids, self.relevant, self.absent, strict=True)
        return {query: {**{ids[d]: g for d, g in here.items()}, **gone} for query, here, gone in rows}

    @cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that change with any text, id or judgement, or with their order."""
        total = hashlib.sha256()
        for part in (self.document_ids, self.documents, self.query_ids, self.queries):
            for text in part:
                total.update(f"{len(text)}:{text}".encode("utf-8", "surrogatepass"))
        total.update(json.dumps([list(self.qrels.items()), self.own]).encode())
        return total.hexdigest()[:16]


def builtin_collection(*, tell: Callable[[str], None] | None = None) -> Collection:
    """The docstring pairs of the test split: each summary asks for its own body among all bodies.

    No bundled model saw them in pretraining; which they are depends on the versions installed.

    Args:
        tell: called with a package's name before its sources are scanned.
    """
    from headscale.texts import builtin_pairs

    return collection_of(BUILT_IN, builtin_pairs("test", progress=tell))


def collection_of(name: str, pairs: Sequence[Pair]) -> Collection:
    """Pairs as a collection in which every query asks for its own document among all of theirs."""
    count = range(len(pairs))
    return Collection(
        name=name,
        split="test",
        document_ids=tuple(f"d{i}" for i in count),
        documents=tuple(pair.document for pair in pairs),
        query_ids=tuple(f"q{i}" for i in count),
        queries=tuple(pair.query for pair in pairs),
        relevant=tuple({i: 1} for i in count),
        absent=tuple({} for _ in count),
        own=(None,) * len(pairs),
    )


def read_collection(source: str | Path, split: str = "test") -> Collection:
    """Read a collection in the BEIR layout, or as NanoBEIR lies on the hub.

    `corpus.jsonl` holds `{"_id", "title", "text"}` (the title may be absent), `queries.jsonl` `{"_id", "text"}`,
    `qrels/SPLIT.tsv` the columns query-id, corpus-id and score, with or without a header; grades below 1 mean
    that the document is not relevant. Empty lines are skipped. Parquet files in folders `corpus`, `queries` and
    `qrels` hold the same columns (extra `datasets`); so do subsets of a dataset on the hub.

    Args:
        source: the folder, or `hf:ID`.
        split: of the judgements; parquet that has one split only is read whatever that is called.

    Raises:
        NotFoundError: the folder or one of the files is missing.
        UnreadableError: a malformed row (the message says which), an id twice, judgements of an unknown query,
            or none at all.
        MemoryForecastError: the texts will not fit in memory.
    """
    parts = parts_of(source, split)
    _check_memory(parts)
    documents = _texts(parts.corpus(), parts.labels[0], "document", empty_allowed=True)
    asked = _texts(parts.queries(), parts.labels[1], "query", empty_allowed=False)
    grades = _grades(parts, asked)
    if not any(grades.values()):
        raise UnreadableError(
            f"{parts.labels[2]} names no relevant document of any query", "give judgements with scores of 1 or more"
        )
    return _joined(str(source), parts.split, documents, asked, grades)


def chosen_collection(source: str | None, split: str | None) -> Collection | None:
    """The collection that options name; None where they name none, which is the built-in one.

    Raises:
        UsageError: a split of the built-in collection other than `test`.
    """
    if source is not None:
        return read_collection(source, split or "test")
    if split not in (None, "test"):
        raise UsageError(f"`--split {split}` needs `--collection DIR`", "the built-in collection has `test` alone")
    return None


def _joined(
    name: str, split: str, documents: dict[str, str], queries: dict[str, str], grades: dict[str, dict[str, int]]
) -> Collection:
    position = {document: i for i, document in enumerate(documents)}
    judged = [query for query in queries if grades.get(query)]
    texts = tuple(documents.values())
    return Collection(
        name=name,
        split=split,
        document_ids=tuple(documents),
        documents=texts,
        query_ids=tuple(judged),
        queries=tuple(queries[query] for query in judged),
        relevant=tuple({position[d]: g for d, g in grades[query].items() if d in position} for query in judged),
        absent=tuple({d: g for d, g in grades[query].items() if d not in position} for query in judged),
        own=tuple(_own(query, queries[query], grades[query], position, texts) for query in judged),
        left_out=len(queries) - len(judged),
    )


def _own(
    query: str, text: str, grades: dict[str, int], position: dict[str, int], documents: tuple[str, ...]
) -> int | None:
    """The document that is the query: same id and same text, as in ArguAna. An equal id alone may be chance."""
    found = position.get(query)
    if found is None or query in grades:
        return None
    return found if documents[found] == text or documents[found].endswith(f" {text}") else None


# --- the parts ----------------------------------------------------------------------------------------------------


def _check_memory(parts: Parts) -> None:
    if parts.nbytes < _SMALL:
        return
    from headscale.memory import available_memory

    available = available_memory()
    if available is not None and parts.nbytes * _MEMORY_RATIO > available:
        raise MemoryForecastError(
            f"the texts of {parts.labels[0]} need about {parts.nbytes * _MEMORY_RATIO / 2**30:.1f} GiB of memory,"
            f" and {available / 2**30:.1f} GiB are free",
            "evaluate on a machine with more memory, or on a part of the corpus",
        )


def _texts(rows: Iterator[Row], label: str, kind: str, *, empty_allowed: bool) -> dict[str, str]:
    """Texts by id, in their order."""
    texts: dict[str, str] = {}
    first: dict[str, str] = {}
    for where, values in rows:
        identity = identifier(values.get("_id"), where)
        if identity in texts:
            raise UnreadableError(
                f"{where} repeats the id `{identity}` of {first[identity].rpartition('` ')[2]}",
                f"give every {kind} an id of its own",
            )
        text = joined_text(values, where)
        if not text and not empty_allowed:
            raise UnreadableError(f"{where} has an empty `text`", "remove the row or give it a text")
        texts[identity], first[identity] = text, where
    if not texts:
        raise UnreadableError(f"{label} is empty", LAYOUT)
    return texts


def _grades(parts: Parts, queries: dict[str, str]) -> dict[str, dict[str, int]]:
    """Grades above 0 by query and document id."""
    seen: dict[tuple[str, str], tuple[int, str]] = {}
    for where, values in parts.qrels():
        query, document, grade = judgement(values, where)
        if query not in queries:
            raise UnreadableError(
                f"{where} judges the query `{query}`, which {parts.labels[1]} does not have",
                "give the files of one collection",
            )
        before = seen.setdefault((query, document), (grade, where))
        if before[0] != grade:
            raise UnreadableError(
                f"{where} contradicts {before[1].rpartition('` ')[2]}: {grade} is not {before[0]}",
                "keep one score for each pair of query and document",
            )
    grades: dict[str, dict[str, int]] = {}
    for (query, document), (grade, _) in seen.items():
        if grade > 0:
            grades.setdefault(query, {})[document] = grade
    return grades
