"""Readers of training pairs: triples as MS MARCO ships them, JSON lines, BEIR and NanoBEIR folders, the hub.

Everything is read a row at a time; what names texts by id keeps only the texts that are asked for. A bad row is named
by its file and number.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeVar

from headscale.errors import MemoryForecastError, UnreadableError, UsageError
from headscale.lines import format_suffix, json_object, numbered_lines
from headscale.rows import HINT, check_columns, has_scores, pairs_of, scored_pair
from headscale.sources import HUB, hub_rows, hub_source, parquet_rows
from headscale.texts import Pair

# Bytes of memory of a pair in a list: for each character, and for the objects around them. Measured for ASCII texts of
# 10 to 1,000 characters with up to 7 negatives: the sum is 0.97 to 1.1 of what they take.
_CHARACTER, _OBJECTS = 1.1, 500
_CHECK_EVERY = 2**28  # bytes between two looks at what is free
_TEXT_HINT = "every line needs a JSON object with a `text` string"
_SLICE = re.compile(r"(?P<source>.+)\[:(?P<count>\d[\d_]*)\]$")
T = TypeVar("T")


def iterate_pairs(source: str | Path) -> Iterator[Pair]:
    """Training pairs from wherever they are, one at a time.

    Args:
        source: one of
            - a TSV file: `query<TAB>document[<TAB>negative...]`, with a teacher's scores
              `score<TAB>score<TAB>query<TAB>positive<TAB>negative` (arXiv 2010.02666), or either with ids instead of
              texts (MS MARCO's `qidpidtriples`) where `collection.tsv` and `queries*.tsv` lie beside it;
            - JSON lines, as `headscale.rows.pairs_of` reads them, or with ids (`qid`, `pos`, `neg` of
              sentence-transformers' msmarco-hard-negatives);
            - a parquet file with the same columns;
            - a folder in BEIR or NanoBEIR layout, whose judgements of the split `train` give the pairs; or the file
              of judgements of another split, `FOLDER/qrels/dev.tsv`;
            - `hf:ID[:SUBSET][:SPLIT]`, which streams (extra `datasets`).

            A text file may end in `.gz`. `SOURCE[:N]` is the first N pairs.

    Raises:
        NotFoundError: it is not there.
        UnreadableError: it is empty, or a row is bad (the message says which, and what was found).
        UsageError: a source that is written wrongly.
    """
    text, count = _sliced(str(source))
    return islice(_pairs(text), count)


def collected_pairs(source: str | Path, limit: int | None = None) -> list[Pair]:
    """`iterate_pairs` as a list, no longer than `limit`; refused once it would not fit in memory."""
    pairs = iterate_pairs(source)
    return _collected(islice(pairs, limit), str(source), lambda p: sum(map(len, (p.query, p.document, *p.negatives))))


def collected_texts(path: str | Path, limit: int | None = None) -> list[str]:
    """The texts of a file, one a line or JSON objects with `text`."""
    file = Path(path)
    rows = _not_empty(numbered_lines(file), file)
    first, rows = _peeked(rows)
    plain = not _is_json(file, first[1])
    texts = (line.strip() if plain else _text(line, f"`{file}` row {number}") for number, line in rows)
    return _collected(islice(texts, limit), str(path), len)


def _text(line: str, where: str) -> str:
    text = json_object(line, where, _TEXT_HINT).get("text")
    if not isinstance(text, str) or not text.strip():
        raise UnreadableError(f"{where} has no text under `text`", _TEXT_HINT)
    return text.strip()


def _sliced(source: str) -> tuple[str, int | None]:
    found = _SLICE.match(source)
    if found is None or Path(source).exists():
        return source, None
    count = int(found["count"])
    if not count:
        raise UsageError(f"`{source}` asks for no pair", "give a number above zero")
    return found["source"], count


def _collected(items: Iterable[T], label: str, size: Callable[[T], int]) -> list[T]:
    kept: list[T] = []
    held, checked = 0, 0
    for item in items:
        kept.append(item)
        held += int(_CHARACTER * size(item)) + _OBJECTS
        if held - checked > _CHECK_EVERY:
            checked = held
            _check_memory(label, len(kept))
    return kept


def _check_memory(label: str, count: int) -> None:
    """Refuse to read on where less than one more stretch of it would fit."""
    from headscale.memory import available_memory

    available = available_memory()
    if available is not None and available < 2 * _CHECK_EVERY:
        raise MemoryForecastError(
            f"`{label}` does not fit in memory: {count:,} rows are read, and {available / 2**30:.1f} GiB are left",
            f"read a part of it: `{label}[:{count // 2}]`",
        )


def _pairs(source: str) -> Iterator[Pair]:
    from headscale.beir import is_judgements, judged_pairs

    if source.startswith(HUB):
        return _hub_pairs(source)
    path = Path(source)
    if path.is_dir():
        return judged_pairs(path, "train")
    if is_judgements(path):
        return judged_pairs(path.parent.parent, path.stem)
    if path.suffix.lower() == ".parquet" and path.is_file():
        return _table_pairs(parquet_rows(path), f"`{path}`", {})
    return _file_pairs(path)


def _hub_pairs(source: str) -> Iterator[Pair]:
    found = hub_source(source)
    check_columns(found.columns, source)
    return _table_pairs(hub_rows(found), f"`{found.label}`", found.columns)


def _table_pairs(rows: Iterator[dict[str, Any]], label: str, columns: Any) -> Iterator[Pair]:
    number = 0
    for number, values in enumerate(rows, 1):
        yield from pairs_of(values, f"{label} row {number}", columns)
    if not number:
        raise UnreadableError(f"{label} is empty", "give a split that has rows")


def _file_pairs(path: Path) -> Iterator[Pair]:
    from headscale.byid import pairs_of_ids, uses_ids

    first, rows = _peeked(_not_empty(numbered_lines(path), path))
    lines_of_json = _is_json(path, first[1])
    if uses_ids(first[1], lines_of_json):
        return pairs_of_ids(path, rows, lines_of_json)
    return _json_pairs(path, rows) if lines_of_json else _tsv_pairs(path, first[1], rows)


def _peeked(rows: Iterator[T]) -> tuple[T, Iterator[T]]:
    first = next(rows)
    return first, chain([first], rows)


def _not_empty(rows: Iterator[tuple[int, str]], path: Path) -> Iterator[tuple[int, str]]:
    first = next(rows, None)
    if first is None:
        raise UnreadableError(f"`{path}` is empty", "write one text or one pair per line")
    return chain([first], rows)


def _is_json(path: Path, first: str) -> bool:
    suffix = format_suffix(path)
    return suffix in (".jsonl", ".ndjson", ".json") or (suffix != ".tsv" and first.lstrip().startswith("{"))


def _json_pairs(path: Path, rows: Iterator[tuple[int, str]]) -> Iterator[Pair]:
    for number, line in rows:
        where = f"`{path}` row {number}"
        yield from pairs_of(json_object(line, where, HINT), where)


def _tsv_pairs(path: Path, first: str, rows: Iterator[tuple[int, str]]) -> Iterator[Pair]:
    scored = has_scores(first.split("\t"))
    for number, line in rows:
        where = f"`{path}` row {number}"
        fields = [field.strip() for field in line.split("\t")]
        yield scored_pair(fields, where) if scored else _plain_pair(fields, where)


def _plain_pair(fields: list[str], where: str) -> Pair:
    if len(fields) < 2:
        raise UnreadableError(f"{where} has one column, not two or more", HINT)
    if not all(fields):
        raise UnreadableError(f"{where} has an empty column {fields.index('') + 1}", HINT)
    return Pair(fields[0], fields[1], tuple(fields[2:]))
