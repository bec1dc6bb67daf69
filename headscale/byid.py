"""Training pairs that name their texts by id, joined with the collection and the queries that lie beside them."""

from __future__ import annotations

import gzip
import json
import math
import pickle
import zlib
from collections.abc import Iterator, Mapping
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from headscale.errors import NotFoundError, UnreadableError
from headscale.lines import json_object, numbered_lines
from headscale.rows import SCORES_HINT, has_scores, scored_pair
from headscale.texts import Pair

KEPT_NEGATIVES = 32  # of the hundreds that are mined for a query; the recipes in use take 7 at most
_STEP = 100_000  # rows whose texts are looked up in one pass over the collection
_COLLECTIONS = ("collection.tsv", "collection.tsv.gz")
_HINT = "put MS MARCO's `collection.tsv` and `queries.train.tsv` beside it, or give triples of texts"
_TRIPLE = "write `query-id<TAB>positive-id<TAB>negative-id`, or the ids of msmarco-hard-negatives as JSON"
_SCORES = "cross-encoder-ms-marco-*-scores.pkl*"


class Ids(NamedTuple):
    """One row: the ids of its texts, and the teacher's scores if it has them."""

    where: str
    query: str
    document: str
    negatives: tuple[str, ...]
    scores: tuple[float, ...] = ()


def uses_ids(first: str, is_json: bool) -> bool:
    """Whether the first row names texts by id rather than holding them."""
    if is_json:
        return ('"qid"' in first and '"pos"' in first) or first.lstrip().startswith("[")
    fields = first.strip().split("\t")
    if has_scores(fields):
        fields = fields[2:]
    return len(fields) == 3 and all(field.strip().isdigit() for field in fields)


def pairs_of_ids(path: Path, rows: Iterator[tuple[int, str]], is_json: bool) -> Iterator[Pair]:
    """Pairs of a file of ids; a hundred thousand rows at a time, with the texts of these alone in memory.

    Args:
        path: MS MARCO's `qidpidtriples*.tsv`, a teacher's `score score qid pid pid`, sentence-transformers'
            msmarco-hard-negatives (JSON with `qid`, `pos`, `neg` by system; scores from their pickle beside it), or
            `[qid, [pid, score], ...]` as ColBERT ships its teacher's.
        rows: its lines, numbered.
        is_json: whether they are JSON.

    Raises:
        NotFoundError: no collection or no queries beside it.
        UnreadableError: a bad row, or an id that is not in the collection.
    """
    collection, queries = _beside(path)
    teacher = _teacher(path) if is_json else {}
    found = chain.from_iterable(_from_json(line, f"`{path}` row {n}", teacher) for n, line in rows) if is_json else (
        _from_tsv(line, f"`{path}` row {n}") for n, line in rows
    )  # fmt: skip
    while part := [row for _, row in zip(range(_STEP), found, strict=False)]:
        texts = _texts(collection, {pid for row in part for pid in (row.document, *row.negatives)})
        asked: dict[str, str] = {}
        for file in queries:
            asked.update(_texts(file, {row.query for row in part} - set(asked)))
        for row in part:
            documents = [_known(texts, pid, row.where, collection.name) for pid in (row.document, *row.negatives)]
            query = _known(asked, row.query, row.where, queries[0].name)
            yield Pair(query, documents[0], tuple(documents[1:]), row.scores)


def _beside(path: Path) -> tuple[Path, list[Path]]:
    collection = next((path.parent / name for name in _COLLECTIONS if (path.parent / name).is_file()), None)
    queries = sorted(path.parent.glob("queries*.tsv")) + sorted(path.parent.glob("queries*.tsv.gz"))
    if collection is None or not queries:
        lacking = "`collection.tsv`" if collection is None else "`queries.train.tsv`"
        raise NotFoundError(f"`{path}` names its texts by id, and no {lacking} lies beside it", _HINT)
    return collection, sorted(queries, key=lambda file: "train" not in file.name)


def _texts(path: Path, wanted: set[str]) -> dict[str, str]:
    """The wanted texts of `id<TAB>text` rows."""
    texts: dict[str, str] = {}
    for number, line in numbered_lines(path) if wanted else ():
        identity, tab, text = line.partition("\t")
        if not tab:
            raise UnreadableError(f"`{path}` row {number} has one column, not an id and a text", _HINT)
        if identity.strip() in wanted:
            texts[identity.strip()] = text.strip()
            if len(texts) == len(wanted):
                break
    return texts


def _known(texts: Mapping[str, str], identity: str, where: str, file: str) -> str:
    text = texts.get(identity)
    if not text:
        raise UnreadableError(
            f"{where} names `{identity}`, which has no text in `{file}`", "give files that belong together"
        )
    return text


# --- rows -----------------------------------------------------------------------------------------------------------


def _from_tsv(line: str, where: str) -> Ids:
    fields = [field.strip() for field in line.split("\t")]
    if has_scores(fields):
        pair = scored_pair(fields, where)
        return Ids(where, pair.query, pair.document, pair.negatives, pair.scores)
    if len(fields) != 3 or not all(field.isdigit() for field in fields):
        raise UnreadableError(f"{where} is not three ids", _TRIPLE)
    return Ids(where, fields[0], fields[1], (fields[2],))


def _from_json(line: str, where: str, teacher: Mapping[Any, Any]) -> Iterator[Ids]:
    if line.lstrip().startswith("["):
        yield _from_list(line, where)
        return
    values = json_object(line, where, _TRIPLE)
    query, positives, mined = values.get("qid"), values.get("pos"), values.get("neg")
    if query is None or not isinstance(positives, list) or not isinstance(mined, dict | list):
        raise UnreadableError(f"{where} lacks `qid`, `pos` or `neg`", _TRIPLE)
    systems = list(mined.values()) if isinstance(mined, dict) else [mined]
    if not all(isinstance(system, list) for system in systems):
        raise UnreadableError(f"{where} has negatives that are not lists of ids", _TRIPLE)
    # The best of every system first, then the second best of each: whoever takes a few has some of all.
    ranked = [one for row in zip_longest(*systems) for one in row if one is not None]
    hard = dict(_scored_id(one, where) for one in ranked)
    for one in positives:
        document, score = _scored_id(one, where)
        kept = {pid: value for pid, value in hard.items() if pid != document}
        pids = tuple(kept)[:KEPT_NEGATIVES]
        known = teacher.get(query, teacher.get(str(query), {}))
        scores = [_score_of(known, pid, own, where) for pid, own in [(document, score), *((p, kept[p]) for p in pids)]]
        complete = tuple(value for value in scores if value is not None)
        yield Ids(where, str(query), document, pids, complete if len(complete) == len(scores) else ())


def _scored_id(value: Any, where: str) -> tuple[str, float | None]:
    """An id, alone or in an object with the teacher's `ce-score`."""
    score = None
    if isinstance(value, dict):
        value, score = value.get("pid"), value.get("ce-score")
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise UnreadableError(f"{where} has `{value}` for an id", _TRIPLE)
    return str(value), None if score is None else _number(score, where)


def _number(value: Any, where: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise UnreadableError(f"{where} has `{value}` for a score", SCORES_HINT)
    return number


def _score_of(known: Mapping[Any, Any], identity: str, own: float | None, where: str) -> float | None:
    if own is not None:
        return own
    found = known.get(identity, known.get(int(identity)) if identity.isdigit() else None)
    return None if found is None else _number(found, where)


def _from_list(line: str, where: str) -> Ids:
    """`[qid, [pid, score], [pid, score], ...]`, the positive first."""
    try:
        query, *rest = json.loads(line)
        pids, scores = zip(*[(str(pid), float(score)) for pid, score in rest], strict=True)
    except (ValueError, TypeError):
        raise UnreadableError(f"{where} is not `[qid, [pid, score], [pid, score], ...]`", _TRIPLE) from None
    return Ids(where, str(query), pids[0], tuple(pids[1:]), tuple(scores))


# --- the teacher's pickle -------------------------------------------------------------------------------------------


class _Numbers(pickle.Unpickler):
    """Unpickles dictionaries of numbers and nothing else: a pickle can otherwise run any program."""

    _ALLOWED = frozenset(
        {("numpy", "dtype"), ("numpy.core.multiarray", "scalar"), ("numpy._core.multiarray", "scalar")}
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._ALLOWED:
            raise pickle.UnpicklingError(f"it holds `{module}.{name}`, not numbers alone")
        return super().find_class(module, name)


def _teacher(path: Path) -> Mapping[Any, Any]:
    """Scores by query and passage id (`{qid: {pid: score}}`) from the pickle beside it; empty without one."""
    file = next(iter(sorted(path.parent.glob(_SCORES))), None)
    if file is None:
        return {}
    try:
        with gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb") as opened:
            found = _Numbers(opened).load()
    except (pickle.UnpicklingError, EOFError, OSError, zlib.error, AttributeError, ValueError) as error:
        raise UnreadableError(
            f"`{file}` holds no teacher's scores: {error}", "download it again, or remove it"
        ) from None
    if not isinstance(found, dict) or not all(isinstance(row, dict) for row in found.values()):
        raise UnreadableError(f"`{file}` holds no scores by query and passage", "download it again, or remove it")
    return found
