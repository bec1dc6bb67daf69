"""Collections in the BEIR layout: what is read, what is refused, and what is said about it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from headscale import collection as module
from headscale.collection import Collection, builtin_collection, read_collection
from headscale.errors import HeadscaleError, MemoryForecastError, NotFoundError, UnreadableError
from headscale.texts import Pair

CRANFIELD = Path(__file__).parents[2] / "shared" / "data" / "cranfield"
CORPUS = [
    {"_id": "a", "title": "Wings", "text": "lift over wings"},
    {"_id": "b", "text": "drag"},
    {"_id": "c", "title": "", "text": ""},
    {"_id": 4, "title": None, "text": " spaced "},
]
QUERIES = [
    {"_id": "q1", "text": "lift"},
    {"_id": "q2", "text": "drag", "metadata": {"x": 1}},
    {"_id": "q3", "text": "?"},
]
QRELS = "query-id\tcorpus-id\tscore\nq1\ta\t2\nq1\tb\t0\nq2\tb\t1\nq2\tgone\t3\nq3\ta\t-1\n"


def write(folder: Path, corpus: Any = CORPUS, queries: Any = QUERIES, qrels: str = QRELS, split: str = "test") -> Path:
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    for name, rows in (("corpus", corpus), ("queries", queries)):
        text = rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    (folder / "qrels" / f"{split}.tsv").write_text(qrels, encoding="utf-8")
    return folder


def test_reads_texts_grades_and_what_is_missing(tmp_path: Path) -> None:
    found = read_collection(write(tmp_path))
    assert found.document_ids == ("a", "b", "c", "4")
    assert found.documents == ("Wings lift over wings", "drag", "", "spaced")
    assert found.query_ids == ("q1", "q2")
    assert found.queries == ("lift", "drag")
    assert found.relevant == ({0: 2}, {1: 1})
    assert found.absent == ({}, {"gone": 3})
    assert found.qrels == {"q1": {"a": 2}, "q2": {"b": 1, "gone": 3}}
    assert (found.judgements, found.left_out, found.own) == (3, 1, (None, None))
    assert (found.name, found.split) == (str(tmp_path), "test")


def test_header_blank_lines_and_byte_order_mark_are_no_rows(tmp_path: Path) -> None:
    plain = read_collection(write(tmp_path / "plain"))
    corpus = "\ufeff" + "\n\n".join(json.dumps(row) for row in CORPUS)
    qrels = QRELS.partition("\n")[2].replace("\n", "\r\n\r\n")
    odd = read_collection(write(tmp_path / "odd", corpus=corpus, qrels=qrels))
    assert odd.fingerprint == plain.fingerprint
    assert odd.qrels == plain.qrels


def test_a_query_that_is_a_document_is_not_ranked_for_itself(tmp_path: Path) -> None:
    corpus = [
        {"_id": "same", "title": "Debate", "text": "schools should close"},
        {"_id": "1", "text": "an unrelated text"},
        {"_id": "judged", "text": "the answer itself"},
    ]
    queries = [
        {"_id": "same", "text": "schools should close"},
        {"_id": "1", "text": "what is lift"},  # the same id by chance
        {"_id": "judged", "text": "the answer itself"},  # judged relevant for itself: stays
    ]
    found = read_collection(write(tmp_path, corpus, queries, "same\t1\t1\n1\tsame\t1\njudged\tjudged\t1\n"))
    assert found.own == (0, None, None)


@pytest.mark.parametrize("change", ["text", "id", "query", "grade", "order"])
def test_the_fingerprint_changes_with_everything_that_is_searched_or_judged(tmp_path: Path, change: str) -> None:
    corpus, queries, qrels = [dict(row) for row in CORPUS], [dict(row) for row in QUERIES], QRELS
    if change == "text":
        corpus[1]["text"] = "drags"
    elif change == "id":
        corpus[2]["_id"] = "d"
    elif change == "query":
        queries[0]["text"] = "lifts"
    elif change == "grade":
        qrels = qrels.replace("q1\ta\t2", "q1\ta\t1")
    else:
        corpus.reverse()
    first = read_collection(write(tmp_path / "first")).fingerprint
    assert read_collection(write(tmp_path / "again")).fingerprint == first
    assert read_collection(write(tmp_path / "second", corpus, queries, qrels)).fingerprint != first


LINES = [json.dumps(row) for row in CORPUS]
BAD = [
    ({"corpus": "\n".join([*LINES, "{broken"])}, "corpus.jsonl` row 5 is not a JSON object"),
    ({"corpus": "\n".join([*LINES, "[1]"])}, "row 5 is not a JSON object"),
    ({"corpus": "\n".join([LINES[0], "", '{"text": "x"}'])}, "row 3 has no `_id`"),
    ({"corpus": "\n".join([*LINES, '{"_id": true, "text": "x"}'])}, "row 5 has no `_id`"),
    ({"corpus": "\n".join([*LINES, '{"_id": "x y", "text": "x"}'])}, "row 5 has white space in its id `x y`"),
    ({"corpus": "\n".join([*LINES, '{"_id": "x"}'])}, "row 5 has no string under `text`"),
    ({"corpus": "\n".join([*LINES, '{"_id": "x", "text": 7}'])}, "row 5 has no string under `text`"),
    ({"corpus": "\n".join([*LINES, LINES[1]])}, "row 5 repeats the id `b` of row 2"),
    ({"corpus": "\n\n"}, "corpus.jsonl` is empty"),
    ({"queries": '{"_id": "q1", "text": " "}'}, "queries.jsonl` row 1 has an empty `text`"),
    ({"queries": '{"_id": "q1", "text": "a"}\n{"_id": "q1", "text": "b"}'}, "row 2 repeats the id `q1` of row 1"),
    ({"qrels": "q1\ta\n"}, "test.tsv` row 1 is not a query id, a document id and a whole number"),
    ({"qrels": QRELS + "q1\tb\tmuch\n"}, "row 7 is not a query id"),
    ({"qrels": QRELS + "q1 0 b 1\n"}, "row 7 is not a query id"),
    ({"qrels": QRELS + "q1\t\t1\n"}, "row 7 is not a query id"),
    ({"qrels": QRELS + "q9\ta\t1\n"}, "queries.jsonl` does not have"),
    ({"qrels": QRELS + "q1\ta\t1\n"}, "row 7 contradicts row 2: 1 is not 2"),
    ({"qrels": "q1\ta\t0\n"}, "names no relevant document of any query"),
    ({"qrels": ""}, "names no relevant document of any query"),
]


@pytest.mark.parametrize(("parts", "expected"), BAD)
def test_a_bad_file_is_one_sentence_with_its_row(tmp_path: Path, parts: dict[str, str], expected: str) -> None:
    with pytest.raises(UnreadableError) as caught:
        read_collection(write(tmp_path, **parts))
    assert expected in caught.value.message
    assert "\n" not in caught.value.message
    assert not caught.value.message.endswith(".")
    assert caught.value.hint


def test_what_is_not_utf8_is_named_by_row(tmp_path: Path) -> None:
    write(tmp_path)
    with (tmp_path / "corpus.jsonl").open("ab") as file:
        file.write(b'{"_id": "x", "text": "caf\xe9"}\n')
    with pytest.raises(UnreadableError, match="row 5 is not UTF-8"):
        read_collection(tmp_path)


def test_a_repeated_judgement_that_agrees_is_one(tmp_path: Path) -> None:
    assert read_collection(write(tmp_path, qrels=QRELS + "q1\ta\t2\n")).judgements == 3


def test_missing_parts_are_named_together(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="does not exist"):
        read_collection(tmp_path / "nowhere")
    (tmp_path / "file").write_text("x")
    with pytest.raises(NotFoundError, match="is a file, not a folder"):
        read_collection(tmp_path / "file")
    (tmp_path / "queries.jsonl").write_text("")
    with pytest.raises(NotFoundError, match=r"lacks `corpus\.jsonl` and `qrels/test\.tsv`"):
        read_collection(tmp_path)


def test_a_missing_split_names_those_there_are(tmp_path: Path) -> None:
    write(tmp_path, split="dev")
    with pytest.raises(NotFoundError) as caught:
        read_collection(tmp_path)
    assert "`qrels/test.tsv`" in caught.value.message
    assert caught.value.hint == "it has judgements called `dev`: pass `--split dev`"
    assert read_collection(tmp_path, "dev").split == "dev"


def test_texts_that_will_not_fit_are_refused_before_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = pytest.importorskip("headscale.memory")
    write(tmp_path)
    monkeypatch.setattr(module, "_SMALL", 0)
    monkeypatch.setattr(memory, "available_memory", lambda: 100)
    with pytest.raises(MemoryForecastError, match="GiB are free"):
        read_collection(tmp_path)
    monkeypatch.setattr(memory, "available_memory", lambda: 2**30)
    assert len(read_collection(tmp_path).documents) == 4


def test_the_built_in_collection_asks_each_summary_for_its_own_body(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = [Pair(f"query {i}", f"document {i}") for i in range(5)]
    asked: list[Any] = []
    monkeypatch.setattr("headscale.texts.builtin_pairs", lambda split, **options: asked.append(split) or pairs)
    found = builtin_collection()
    assert asked == ["test"]
    assert found.queries == tuple(pair.query for pair in pairs)
    for i, (query, document) in enumerate(zip(found.query_ids, found.document_ids, strict=True)):
        assert found.qrels[query] == {document: 1}
        assert found.documents[i] == pairs[i].document


def test_every_refusal_is_ours(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "corpus.jsonl").unlink()
    (tmp_path / "corpus.jsonl").mkdir()
    with pytest.raises(HeadscaleError):
        read_collection(tmp_path)


@pytest.mark.skipif(not CRANFIELD.is_dir(), reason="the Cranfield collection is not here")
def test_cranfield() -> None:
    found: Collection = read_collection(CRANFIELD)
    assert (len(found.documents), len(found.queries)) == (1400, 225)
    positive = [
        line for line in (CRANFIELD / "qrels" / "test.tsv").read_text().splitlines()[1:] if int(line.split()[2])
    ]
    assert found.judgements == len({tuple(line.split()[:2]) for line in positive})
    assert not any(found.absent)
    assert found.own == (None,) * 225  # queries and documents are both numbered from 1
