"""The three parts of a test collection: documents, queries, judgements, in the layouts that BEIR and NanoBEIR have.

A BEIR folder has `corpus.jsonl`, `queries.jsonl` and `qrels/SPLIT.tsv`; as the hub lays it out (NanoBEIR), there are
folders `corpus`, `queries` and `qrels` of parquet files; `hf:ID` has subsets of these names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from headscale.errors import NotFoundError, UnreadableError
from headscale.lines import json_object, numbered_lines
from headscale.sources import HUB, hub_rows, hub_source, parquet_rows, parquet_splits
from headscale.texts import Pair

LAYOUT = "a collection is a folder with `corpus.jsonl`, `queries.jsonl` and `qrels/SPLIT.tsv`, as BEIR ships them"
_NAMES = ("corpus", "queries", "qrels")
_ROW = "write one object with `_id` and `text` per line"

Row = tuple[str, dict[str, Any]]  # which row, in words, and its values


@dataclass(frozen=True)
class Parts:
    """A collection's rows, each part from its beginning whenever it is called.

    Args:
        name: as the user gave it.
        split: of the judgements.
        labels: of corpus, queries and judgements, for messages.
        corpus, queries, qrels: their rows.
        nbytes: of the corpus's files; 0 where that is not known.
    """

    name: str
    split: str
    labels: tuple[str, str, str]
    corpus: Callable[[], Iterator[Row]]
    queries: Callable[[], Iterator[Row]]
    qrels: Callable[[], Iterator[Row]]
    nbytes: int = 0


def parts_of(source: str | Path, split: str) -> Parts:
    """Where the parts of a collection are.

    Args:
        source: a folder, or `hf:ID`.
        split: of the judgements; parquet and the hub: the only one there is, if it is not among several.

    Raises:
        NotFoundError: the folder or one of its parts is missing.
    """
    if str(source).startswith(HUB):
        return _hub(str(source), split)
    root = Path(source)
    if not root.is_dir():
        what = "is a file, not a folder" if root.is_file() else "does not exist"
        raise NotFoundError(f"the collection `{root}` {what}", LAYOUT)
    return _parquet(root, split) if any((root / "corpus").glob("*.parquet")) else _jsonl(root, split)


def identifier(value: Any, where: str, name: str = "_id") -> str:
    """A row's id: a string without white space, or a whole number.

    Raises:
        UnreadableError: it is neither.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not value:
        raise UnreadableError(f"{where} has no `{name}`", f"every row needs a string of its own under `{name}`")
    if any(character.isspace() for character in value):
        raise UnreadableError(
            f"{where} has white space in its id `{value}`", "a TREC run has no room for it: replace it"
        )
    return value


def joined_text(values: dict[str, Any], where: str) -> str:
    """Title and text, joined by a space as BEIR's own models read them."""
    title, text = values.get("title") or "", values.get("text")
    if not isinstance(title, str) or not isinstance(text, str):
        raise UnreadableError(f"{where} has no string under `text`", "every row needs a `text`")
    return f"{title.strip()} {text.strip()}".strip()


def judgement(values: dict[str, Any], where: str) -> tuple[str, str, int]:
    """The ids of a query and a document, and a grade: 1 where rows have none, as NanoBEIR's."""
    grade = values.get("score", 1)
    if isinstance(grade, float) and grade.is_integer():
        grade = int(grade)
    query, document = values.get("query-id"), values.get("corpus-id")
    if not isinstance(grade, int) or query in (None, "") or document in (None, ""):
        raise UnreadableError(
            f"{where} is not a query id, a document id and a whole number, separated by tabs",
            "write `query-id<TAB>corpus-id<TAB>score`",
        )
    return str(query), str(document), grade


# --- pairs to train on ----------------------------------------------------------------------------------------------


def is_judgements(path: Path) -> bool:
    """Whether a file holds the judgements of a BEIR folder."""
    return path.suffix == ".tsv" and path.parent.name == "qrels" and (path.parent.parent / "corpus.jsonl").is_file()


def judged_pairs(source: str | Path, split: str) -> Iterator[Pair]:
    """A pair for every relevant judgement, in their order; only judged texts are in memory.

    Args:
        source: a folder, or `hf:ID`.
        split: of the judgements.

    Raises:
        NotFoundError: something is missing.
        UnreadableError: a bad row, or a judgement of a text that is not there.
    """
    parts = parts_of(source, split)
    rows = [(where, *judgement(values, where)) for where, values in parts.qrels()]
    rows = [row for row in rows if row[3] > 0]
    if not rows:
        raise UnreadableError(
            f"{parts.labels[2]} names no relevant document", "give judgements with scores of 1 or more"
        )
    queries = _wanted(parts.queries(), {row[1] for row in rows})
    documents = _wanted(parts.corpus(), {row[2] for row in rows})
    for where, query, document, _ in rows:
        for identity, texts, label in ((query, queries, parts.labels[1]), (document, documents, parts.labels[0])):
            if not texts.get(identity):
                raise UnreadableError(
                    f"{where} names `{identity}`, which has no text in {label}", "give the files of one collection"
                )
        yield Pair(queries[query], documents[document])


def _wanted(rows: Iterator[Row], wanted: set[str]) -> dict[str, str]:
    texts: dict[str, str] = {}
    for where, values in rows:
        identity = identifier(values.get("_id"), where)
        if identity in wanted:
            texts[identity] = joined_text(values, where)
            if len(texts) == len(wanted):
                break
    return texts


# --- folders of JSON lines ------------------------------------------------------------------------------------------


def _jsonl(root: Path, split: str) -> Parts:
    names = ("corpus.jsonl", "queries.jsonl", f"qrels/{split}.tsv")
    missing = [name for name in names if not (root / name).is_file()]
    if missing:
        spelled = " and ".join(f"`{name}`" for name in missing)
        raise NotFoundError(f"the collection `{root}` lacks {spelled}", _hint(root, missing, names[2]))
    corpus, queries, qrels = (root / name for name in names)
    return Parts(
        str(root), split, (f"`{corpus}`", f"`{queries}`", f"`{qrels}`"),
        lambda: _objects(corpus), lambda: _objects(queries), lambda: _judged(qrels), corpus.stat().st_size,
    )  # fmt: skip


def _hint(root: Path, missing: list[str], qrels: str) -> str:
    splits = sorted(file.stem for file in (root / "qrels").glob("*.tsv"))
    if missing == [qrels] and splits:
        return f"it has judgements called {', '.join(f'`{s}`' for s in splits)}: pass `--split {splits[0]}`"
    return LAYOUT


def _objects(path: Path) -> Iterator[Row]:
    for number, line in numbered_lines(path):
        where = f"`{path}` row {number}"
        yield where, json_object(line, where, _ROW)


def _judged(path: Path) -> Iterator[Row]:
    """The rows of a file of judgements, with or without a header; what is no judgement has no ids."""
    header = True
    for number, line in numbered_lines(path):
        fields = [field.strip() for field in line.split("\t")]
        grade = _integer(fields[2]) if len(fields) == 3 else None
        if not (header and len(fields) == 3 and grade is None):
            values = {"query-id": fields[0], "corpus-id": fields[1], "score": grade} if len(fields) == 3 else {}
            yield f"`{path}` row {number}", values
        header = False


def _integer(text: str) -> int | None:
    try:
        return int(text)
    except ValueError:
        return None


# --- parquet and the hub --------------------------------------------------------------------------------------------


def _parquet(root: Path, split: str) -> Parts:
    folders = {name: parquet_splits(root / name) for name in _NAMES}
    missing = [f"`{name}/*.parquet`" for name, splits in folders.items() if not splits]
    if missing:
        raise NotFoundError(f"the collection `{root}` lacks {' and '.join(missing)}", LAYOUT)
    chosen = {name: _chosen(splits, split, f"`{root / name}`") for name, splits in folders.items()}
    corpus, queries, qrels = (folders[name][chosen[name]] for name in _NAMES)
    return Parts(
        str(root), chosen["qrels"], (f"`{root / 'corpus'}`", f"`{root / 'queries'}`", f"`{root / 'qrels'}`"),
        lambda: _tables(corpus), lambda: _tables(queries), lambda: _tables(qrels),
        sum(file.stat().st_size for file in corpus),
    )  # fmt: skip


def _chosen(splits: dict[str, list[Path]], split: str, where: str) -> str:
    """The split that is asked for, or the only one: NanoBEIR calls its own `train`, BEIR's corpus is `corpus`."""
    if split in splits:
        return split
    if len(splits) > 1:
        raise NotFoundError(
            f"{where} has no split `{split}`", f"pass `--split` with one of {', '.join(sorted(splits))}"
        )
    return next(iter(splits))


def _tables(files: list[Path]) -> Iterator[Row]:
    return chain.from_iterable(
        ((f"`{file}` row {number}", values) for number, values in enumerate(parquet_rows(file), 1)) for file in files
    )


def _hub(source: str, split: str) -> Parts:
    found = hub_source(source)
    labels = tuple(f"`{HUB}{found.identity}:{name}`" for name in _NAMES)

    def rows(name: str) -> Iterator[Row]:
        chosen = found.split or found.subset  # what follows the id is a split: the subsets are the three parts
        text = ":".join([f"{HUB}{found.identity}", name, *([chosen] if chosen else [])])
        for number, values in enumerate(hub_rows(hub_source(text)), 1):
            yield f"`{text}` row {number}", values

    return Parts(
        source, found.split or found.subset or split, labels,  # type: ignore[arg-type]
        lambda: rows("corpus"), lambda: rows("queries"), lambda: rows("qrels"),
    )  # fmt: skip
