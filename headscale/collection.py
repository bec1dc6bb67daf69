"""Test collections: documents, queries and who answers whom, in the BEIR layout or from the built-in docstrings."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from headscale.errors import MemoryForecastError, NotFoundError, UnreadableError

BUILT_IN = "built-in"
LAYOUT = "a collection is a folder with `corpus.jsonl`, `queries.jsonl` and `qrels/SPLIT.tsv`, as BEIR ships them"

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

    pairs = builtin_pairs("test", progress=tell)
    count = range(len(pairs))
    return Collection(
        name=BUILT_IN,
        split="test",
        document_ids=tuple(f"d{i}" for i in count),
        documents=tuple(pair.document for pair in pairs),
        query_ids=tuple(f"q{i}" for i in count),
        queries=tuple(pair.query for pair in pairs),
        relevant=tuple({i: 1} for i in count),
        absent=tuple({} for _ in count),
        own=(None,) * len(pairs),
    )


def read_collection(folder: str | Path, split: str = "test") -> Collection:
    """Read a collection in the BEIR layout.

    `corpus.jsonl` holds `{"_id", "title", "text"}` (the title may be absent), `queries.jsonl` `{"_id", "text"}`,
    `qrels/SPLIT.tsv` the columns query-id, corpus-id and score, with or without a header; grades below 1 mean
    that the document is not relevant. Empty lines are skipped.

    Args:
        folder: where these files are.
        split: which file of `qrels`.

    Raises:
        NotFoundError: the folder or one of the files is missing.
        UnreadableError: a malformed row (the message says which), an id twice, judgements of an unknown query,
            or none at all.
        MemoryForecastError: the texts will not fit in memory.
    """
    root = Path(folder)
    corpus, queries, qrels = _files(root, split)
    _check_memory(corpus)
    documents = _texts(corpus, "document", empty_allowed=True)
    asked = _texts(queries, "query", empty_allowed=False)
    grades = _grades(qrels, asked)
    if not any(grades.values()):
        raise UnreadableError(
            f"`{qrels}` names no relevant document of any query", "give judgements with scores of 1 or more"
        )
    return _joined(str(folder), split, documents, asked, grades)


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


# --- the files ----------------------------------------------------------------------------------------------------


def _files(root: Path, split: str) -> tuple[Path, Path, Path]:
    if not root.is_dir():
        what = "is a file, not a folder" if root.is_file() else "does not exist"
        raise NotFoundError(f"the collection `{root}` {what}", LAYOUT)
    names = ("corpus.jsonl", "queries.jsonl", f"qrels/{split}.tsv")
    missing = [name for name in names if not (root / name).is_file()]
    if missing:
        spelled = " and ".join(f"`{name}`" for name in missing)
        raise NotFoundError(f"the collection `{root}` lacks {spelled}", _hint(root, missing, names[2]))
    return root / names[0], root / names[1], root / names[2]


def _hint(root: Path, missing: list[str], qrels: str) -> str:
    splits = sorted(file.stem for file in (root / "qrels").glob("*.tsv"))
    if missing == [qrels] and splits:
        return f"it has judgements called {', '.join(f'`{s}`' for s in splits)}: pass `--split {splits[0]}`"
    return LAYOUT


def _check_memory(corpus: Path) -> None:
    size = corpus.stat().st_size
    if size < _SMALL:
        return
    from headscale.memory import available_memory

    available = available_memory()
    if available is not None and size * _MEMORY_RATIO > available:
        raise MemoryForecastError(
            f"the texts of `{corpus}` need about {size * _MEMORY_RATIO / 2**30:.1f} GiB of memory,"
            f" and {available / 2**30:.1f} GiB are free",
            "evaluate on a machine with more memory, or on a part of the corpus",
        )


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines that are not empty, with their numbers from 1."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                text = _decoded(path, number, line)
                if text.strip():
                    yield number, text
    except OSError as error:
        raise UnreadableError(f"`{path}` cannot be read: {error.strerror}", "check its permissions") from None


def _decoded(path: Path, number: int, line: bytes) -> str:
    try:
        return line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError:
        raise UnreadableError(
            f"`{path}` row {number} is not UTF-8 text", "convert it, for example with `iconv -t UTF-8`"
        ) from None


def _texts(path: Path, kind: str, *, empty_allowed: bool) -> dict[str, str]:
    """Texts by id, in the order of the file."""
    texts: dict[str, str] = {}
    rows: dict[str, int] = {}
    for number, line in _lines(path):
        values = _object(path, number, line)
        identity = _identity(values.get("_id"), path, number)
        if identity in texts:
            raise UnreadableError(
                f"`{path}` row {number} repeats the id `{identity}` of row {rows[identity]}",
                f"give every {kind} an id of its own",
            )
        texts[identity] = _text(values, path, number, empty_allowed)
        rows[identity] = number
    if not texts:
        raise UnreadableError(f"`{path}` is empty", LAYOUT)
    return texts


def _object(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise UnreadableError(
            f"`{path}` row {number} is not a JSON object", "write one object with `_id` and `text` per line"
        )
    return values


def _identity(value: Any, path: Path, number: int) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not value:
        raise UnreadableError(f"`{path}` row {number} has no `_id`", "every row needs a string of its own under `_id`")
    if any(character.isspace() for character in value):
        raise UnreadableError(
            f"`{path}` row {number} has white space in its id `{value}`", "a TREC run has no room for it: replace it"
        )
    return value


def _text(values: dict[str, Any], path: Path, number: int, empty_allowed: bool) -> str:
    """Title and text, joined by a space as BEIR's own models read them."""
    title, text = values.get("title") or "", values.get("text")
    if not isinstance(title, str) or not isinstance(text, str):
        raise UnreadableError(f"`{path}` row {number} has no string under `text`", "every row needs a `text`")
    joined = f"{title.strip()} {text.strip()}".strip()
    if not joined and not empty_allowed:
        raise UnreadableError(f"`{path}` row {number} has an empty `text`", "remove the row or give it a text")
    return joined


def _grades(path: Path, queries: dict[str, str]) -> dict[str, dict[str, int]]:
    """Grades above 0 by query and document id."""
    seen: dict[tuple[str, str], tuple[int, int]] = {}
    header = True
    for number, line in _lines(path):
        fields = [field.strip() for field in line.split("\t")]
        if header and len(fields) == 3 and _integer(fields[2]) is None:
            header = False
            continue
        header = False
        query, document, grade = _judgement(fields, path, number)
        _check_judgement(path, number, query, queries, grade, seen.get((query, document)))
        seen.setdefault((query, document), (grade, number))
    grades: dict[str, dict[str, int]] = {}
    for (query, document), (grade, _) in seen.items():
        if grade > 0:
            grades.setdefault(query, {})[document] = grade
    return grades


def _judgement(fields: list[str], path: Path, number: int) -> tuple[str, str, int]:
    grade = _integer(fields[2]) if len(fields) == 3 else None
    if grade is None or not fields[0] or not fields[1]:
        raise UnreadableError(
            f"`{path}` row {number} is not a query id, a document id and a whole number, separated by tabs",
            "write `query-id<TAB>corpus-id<TAB>score`",
        )
    return fields[0], fields[1], grade


def _check_judgement(
    path: Path, number: int, query: str, queries: dict[str, str], grade: int, before: tuple[int, int] | None
) -> None:
    if query not in queries:
        raise UnreadableError(
            f"`{path}` row {number} judges the query `{query}`, which `queries.jsonl` does not have",
            "give the files of one collection",
        )
    if before is not None and before[0] != grade:
        raise UnreadableError(
            f"`{path}` row {number} contradicts row {before[1]}: {grade} is not {before[0]}",
            "keep one score for each pair of query and document",
        )


def _integer(text: str) -> int | None:
    try:
        return int(text)
    except ValueError:
        return None
