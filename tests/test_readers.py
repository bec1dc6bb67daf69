"""Readers against hand-written rows, pyarrow and `datasets` themselves; every bad row is named."""

import gzip
import json
import pickle
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from headscale import readers
from headscale.errors import HeadscaleError, MemoryForecastError, NotFoundError, UnreadableError, UsageError
from headscale.readers import iterate_pairs
from headscale.texts import Pair, read_pairs, read_texts


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_pairs_from_tsv(tmp_path):
    path = write(tmp_path, "p.tsv", "\ufeffq1\td1\r\n\nq2\td2\tn1\tn2\n")
    assert read_pairs(path) == [Pair("q1", "d1"), Pair("q2", "d2", ("n1", "n2"))]


def test_line_separators_inside_a_text_do_not_split_it(tmp_path):
    path = write(tmp_path, "p.tsv", "q\u2028x\td\x0cy\n")
    assert read_pairs(path) == [Pair("q\u2028x", "d\x0cy")]


@pytest.mark.parametrize("name", ["p.jsonl", "p.txt"])
def test_pairs_from_json_lines_in_every_spelling(tmp_path, name):
    rows = [
        {"query": "q1", "document": "d1", "negatives": ["n1", "n2"], "id": 7},
        {"query": "q2", "positive": "d2", "negative": "n3"},
        {"anchor": "q3", "pos": ["d3"], "neg": []},
    ]
    path = write(tmp_path, name, "\n".join(map(json.dumps, rows)))
    assert read_pairs(path) == [Pair("q1", "d1", ("n1", "n2")), Pair("q2", "d2", ("n3",)), Pair("q3", "d3")]


def test_texts_from_lines_and_from_json(tmp_path):
    assert read_texts(write(tmp_path, "t.txt", "one \n\n two\n")) == ["one", "two"]
    assert read_texts(write(tmp_path, "t.jsonl", '{"text": "one"}\n{"text": "two", "id": 1}\n')) == ["one", "two"]


PAIR_HINT = "write `query<TAB>document[<TAB>negative...]`, or JSON objects with `query` and `document`"
TEXT_HINT = "every line needs a JSON object with a `text` string"


@pytest.mark.parametrize(
    ("reader", "name", "content", "message", "hint"),
    [
        (read_pairs, "p.tsv", "q\td\nalone\n", "row 2 has one column, not two or more", PAIR_HINT),
        (read_pairs, "p.tsv", "q\td\n\nq\t\tn\n", "row 3 has an empty column 2", PAIR_HINT),
        (read_pairs, "p.jsonl", '{"query": "q", "pos": "d"}\nq\td\n', "row 2 is not a JSON object", PAIR_HINT),
        (read_pairs, "p.jsonl", '{"query": "q"}', "row 1 has no text under `document`, only `query`", PAIR_HINT),
        (
            read_pairs,
            "p.jsonl",
            '{"query": " ", "pos": "d"}',
            "row 1 has no text under `query`, only `query`, `pos`",
            PAIR_HINT,
        ),
        (read_pairs, "p", '{"query": "q", "pos": "d", "neg": [1]}', "row 1 has negatives that are not text", PAIR_HINT),
        (read_texts, "t.jsonl", '{"text": "a"}\n["b"]', "row 2 is not a JSON object", TEXT_HINT),
        (read_texts, "t.jsonl", '{"body": "a"}', "row 1 has no text under `text`", TEXT_HINT),
    ],
)
def test_a_bad_row_is_named(tmp_path, reader, name, content, message, hint):
    path = write(tmp_path, name, content)
    with pytest.raises(UnreadableError) as caught:
        reader(path)
    assert (caught.value.message, caught.value.hint) == (f"`{path}` {message}", hint)
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("reader", [read_pairs, read_texts])
def test_a_file_that_is_no_text_is_refused(tmp_path, reader):
    with pytest.raises(NotFoundError) as missing:
        reader(tmp_path / "absent.tsv")
    assert missing.value.message == f"no such file: `{tmp_path / 'absent.tsv'}`"
    assert missing.value.hint == "check the path; it is taken relative to the current folder"
    for content in ("", "\n \n", "\ufeff"):
        path = write(tmp_path, "empty.tsv", content)
        with pytest.raises(UnreadableError) as empty:
            reader(path)
        assert (empty.value.message, empty.value.hint) == (f"`{path}` is empty", "write one text or one pair per line")
    path = write(tmp_path, "latin.tsv", "caf\xe9\tau lait".encode("latin-1"))
    with pytest.raises(UnreadableError) as latin:
        reader(path)
    assert latin.value.message == f"`{path}` row 1 is not UTF-8 text: byte 3 cannot be decoded"
    assert latin.value.hint == "convert it, for example with `iconv -t UTF-8`"
    refusal = (UnreadableError, r"is a folder, not a text file$")
    kind, message = refusal if reader is read_texts else (NotFoundError, r"lacks `corpus\.jsonl` and `queries\.jsonl`")
    with pytest.raises(kind, match=message):
        reader(tmp_path)


# --- large files ------------------------------------------------------------------------------------


def test_files_are_read_through_gzip_and_a_row_at_a_time(tmp_path):
    path = tmp_path / "triples.tsv.gz"
    path.write_bytes(gzip.compress(b"q1\tp1\tn1\nq2\tp2\tn2\nbad\n"))
    assert list(islice(iterate_pairs(path), 2)) == [Pair("q1", "p1", ("n1",)), Pair("q2", "p2", ("n2",))]
    with pytest.raises(UnreadableError, match=r"row 3 has one column"):
        read_pairs(path)
    assert read_texts(write(tmp_path, "t.txt.gz", gzip.compress(b"one\ntwo\n"))) == ["one", "two"]


def test_a_part_of_a_source_is_its_beginning(tmp_path):
    path = write(tmp_path, "p.tsv", "q1\td1\nq2\td2\nbad\n")
    assert read_pairs(f"{path}[:2]") == read_pairs(path, limit=2) == [Pair("q1", "d1"), Pair("q2", "d2")]
    with pytest.raises(UsageError, match="asks for no pair"):
        read_pairs(f"{path}[:0]")


def test_a_truncated_archive_says_after_which_row(tmp_path):
    noise = np.random.default_rng(0)
    rows = "".join(f"q{i}\t{noise.bytes(30).hex()}\n" for i in range(20_000))
    whole = gzip.compress(rows.encode())
    path = write(tmp_path, "p.tsv.gz", whole[: len(whole) // 2])
    with pytest.raises(UnreadableError, match=r"cannot be unpacked after row \d+: ") as caught:
        read_pairs(path)
    count = int(caught.value.message.split("row ")[1].split(":")[0])
    assert len(list(islice(iterate_pairs(path), count))) == count > 5_000


def test_what_does_not_fit_in_memory_is_refused_with_a_part_that_does(tmp_path, monkeypatch):
    memory = pytest.importorskip("headscale.memory")
    path = write(tmp_path, "p.tsv", "".join(f"q{i}\td{i}\n" for i in range(100)))
    monkeypatch.setattr(readers, "_CHECK_EVERY", 1000)
    monkeypatch.setattr(memory, "available_memory", lambda: 1500)
    with pytest.raises(MemoryForecastError, match="does not fit in memory: 2 rows are read") as caught:
        read_pairs(path)
    assert caught.value.hint == f"read a part of it: `{path}[:1]`"
    monkeypatch.setattr(memory, "available_memory", lambda: 2001)
    assert len(read_pairs(path)) == 100


# --- teachers ---------------------------------------------------------------------------------------


def test_scores_in_every_spelling(tmp_path):
    rows = [
        {"query": "q", "positive": "d", "negatives": ["n1", "n2"], "scores": [9.5, 1, -2]},
        {"query": "q", "positive": "d", "negative": "n", "label": [3.0, 1.0]},
        {"query": "q", "positive": "d", "negative": "n", "score": 2.5},  # a margin: positive less negative
        {"query": "q", "positive": "d", "negative_1": "n1", "negative_2": "n2", "score": [2.0, 3.0]},
    ]
    found = read_pairs(write(tmp_path, "p.jsonl", "\n".join(map(json.dumps, rows))))
    assert [pair.scores for pair in found] == [(9.5, 1.0, -2.0), (3.0, 1.0), (0.0, -2.5), (0.0, -2.0, -3.0)]
    assert found[3].negatives == ("n1", "n2")
    assert [pair.scores[0] - pair.scores[1] for pair in found] == [8.5, 2.0, 2.5, 2.0]


def test_every_positive_of_a_row_is_a_pair(tmp_path):
    row = {"query": "q", "positive_passages": [{"title": "T", "text": "one"}, {"text": "two"}], "negative_passages": []}
    assert read_pairs(write(tmp_path, "p.jsonl", json.dumps(row))) == [Pair("q", "T one"), Pair("q", "two")]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"scores": [1.0]}, "row 3 has 1 scores for 3 texts"),
        ({"scores": [1.0, 2.0, "high"]}, "row 3 has scores that are not finite numbers"),
        ({"scores": [1.0, 2.0, float("nan")]}, "row 3 has scores that are not finite numbers"),
        ({"scores": [1.0, 2.0, 3.0], "pos": ["d", "e"]}, "row 3 has 2 positives and one list of scores"),
    ],
)
def test_scores_that_do_not_fit_name_row_3(tmp_path, row, message):
    good = {"query": "q", "pos": "d", "negatives": ["n", "m"]}
    lines = [json.dumps(one) for one in (good, {**good, "scores": [3, 2, 1]}, {**good, **row})]
    path = write(tmp_path, "p.jsonl", "\n".join(lines))
    with pytest.raises(UnreadableError) as caught:
        read_pairs(path)
    assert caught.value.message == f"`{path}` {message}"


def test_a_teachers_rows_as_margin_mse_ships_them(tmp_path):
    path = write(tmp_path, "scores.tsv", "9.25\t-1\tq1\tp1\tn1\n3\t2.5\tq2\tp2\tn2\n")
    assert read_pairs(path) == [Pair("q1", "p1", ("n1",), (9.25, -1.0)), Pair("q2", "p2", ("n2",), (3.0, 2.5))]
    with pytest.raises(UnreadableError, match="row 3 is not two scores and three columns"):
        read_pairs(write(tmp_path, "bad.tsv", path.read_text() + "high\t1\tq\tp\tn\n"))


# --- ids --------------------------------------------------------------------------------------------


@pytest.fixture
def marco(tmp_path):
    """A folder as MS MARCO ships it: five passages, two files of queries."""
    (tmp_path / "collection.tsv").write_text("".join(f"{i}\tpassage {i}\n" for i in range(5)))
    write(tmp_path, "queries.train.tsv", "10\tquery ten\n11\tquery eleven\n")
    write(tmp_path, "queries.dev.tsv", "12\tquery twelve\n")
    return tmp_path


def test_triples_of_ids_are_joined_with_the_collection_beside_them(marco):
    rows = "10\t0\t3\n12\t4\t0\n"
    expected = [Pair("query ten", "passage 0", ("passage 3",)), Pair("query twelve", "passage 4", ("passage 0",))]
    assert read_pairs(write(marco, "qidpidtriples.tsv", rows)) == expected
    assert read_pairs(write(marco, "qidpidtriples.tsv.gz", gzip.compress(rows.encode()))) == expected
    (marco / "collection.tsv.gz").write_bytes(gzip.compress((marco / "collection.tsv").read_bytes()))
    (marco / "collection.tsv").unlink()
    assert read_pairs(marco / "qidpidtriples.tsv") == expected


def test_ids_are_joined_alike_in_several_passes(marco, monkeypatch):
    from headscale import byid

    draws = np.random.default_rng(1)
    rows = [(10 + int(draws.integers(3)), *map(int, draws.permutation(5)[:2])) for _ in range(50)]
    path = write(marco, "t.tsv", "".join("\t".join(map(str, row)) + "\n" for row in rows))
    whole = read_pairs(path)
    monkeypatch.setattr(byid, "_STEP", 7)
    assert read_pairs(path) == whole
    names = {10: "ten", 11: "eleven", 12: "twelve"}
    assert whole == [Pair(f"query {names[q]}", f"passage {p}", (f"passage {n}",)) for q, p, n in rows]


@pytest.mark.parametrize("suffix", [".pkl", ".pkl.gz"])
def test_hard_negatives_as_sentence_transformers_ships_them(marco, suffix):
    row = {"qid": 10, "pos": [0, 4], "neg": {"bm25": [1, 2], "dense": [3, 0]}}
    path = write(marco, "msmarco-hard-negatives.jsonl", json.dumps(row))
    one, two = read_pairs(path)
    assert one == Pair("query ten", "passage 0", ("passage 1", "passage 3", "passage 2"))  # of each system in turn
    assert two == Pair("query ten", "passage 4", ("passage 1", "passage 3", "passage 2", "passage 0"))
    scores = {10: {pid: np.float32(pid) / 2 if pid % 2 else pid / 2 for pid in range(5)}}
    content = pickle.dumps(scores)
    name = f"cross-encoder-ms-marco-MiniLM-L-6-v2-scores{suffix}"
    write(marco, name, gzip.compress(content) if suffix.endswith("gz") else content)
    assert [pair.scores for pair in read_pairs(path)] == [(0.0, 0.5, 1.5, 1.0), (2.0, 0.5, 1.5, 1.0, 0.0)]


def test_scores_inside_the_rows_of_ids(marco):
    row = {
        "qid": "10",
        "pos": [{"pid": 0, "ce-score": 7.5}],
        "neg": {"bm25": [{"pid": 1, "ce-score": -1.0}, {"pid": 2, "ce-score": 2.0}]},
    }
    path = write(marco, "v6.jsonl", json.dumps(row))
    assert read_pairs(path) == [Pair("query ten", "passage 0", ("passage 1", "passage 2"), (7.5, -1.0, 2.0))]
    path = write(marco, "nway.jsonl", "[10, [0, 7.5], [1, -1.0], [2, 2]]")
    assert read_pairs(path) == [Pair("query ten", "passage 0", ("passage 1", "passage 2"), (7.5, -1.0, 2.0))]
    path = write(marco, "ensemble.tsv", "7.5\t-1.0\t10\t0\t1\n")
    assert read_pairs(path) == [Pair("query ten", "passage 0", ("passage 1",), (7.5, -1.0))]


class Trap:
    def __reduce__(self):
        return (Path.touch, (Path("sprung"),))


def test_a_pickle_that_would_run_something_is_refused(marco, monkeypatch):
    monkeypatch.chdir(marco)
    path = write(marco, "hard.jsonl", json.dumps({"qid": 10, "pos": [0], "neg": {"bm25": [1]}}))
    write(marco, "cross-encoder-ms-marco-x-scores.pkl", pickle.dumps({10: {0: Trap()}}))
    with pytest.raises(UnreadableError, match="holds no teacher's scores: it holds `"):
        read_pairs(path)
    assert not (marco / "sprung").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("10\t0\t1\n10\t0\t2\n10\t0\n", "row 3 is not three ids"),
        ("10\t0\t1\n10\t0\t99\n", "row 2 names `99`, which has no text in `collection.tsv`"),
        ("99\t0\t1\n", "row 1 names `99`, which has no text in `queries.train.tsv`"),
        ('{"qid": 1, "pos": [1]}', "row 1 lacks `qid`, `pos` or `neg`"),
        ('{"qid": 10, "pos": [[]], "neg": {}}', "row 1 has `[]` for an id"),
        ('{"qid": 10, "pos": [1], "neg": [{"pid": 2, "ce-score": "high"}]}', "row 1 has `high` for a score"),
        ("[10]", "row 1 is not `[qid, [pid, score], [pid, score], ...]`"),
    ],
)
def test_bad_ids_are_named(marco, content, message):
    path = write(marco, "t.jsonl" if content[0] in "{[" else "t.tsv", content)
    with pytest.raises(UnreadableError) as caught:
        read_pairs(path)
    assert caught.value.message == f"`{path}` {message}"


def test_ids_without_their_texts_say_what_to_put_beside_them(tmp_path):
    path = write(tmp_path, "t.tsv", "1\t2\t3\n")
    with pytest.raises(NotFoundError, match=r"names its texts by id, and no `collection\.tsv` lies beside it"):
        read_pairs(path)


# --- collections to train on ------------------------------------------------------------------------

CORPUS = [{"_id": "a", "title": "A", "text": "one"}, {"_id": "b", "text": "two"}, {"_id": "c", "text": "three"}]
QUERIES = [{"_id": "q1", "text": "first"}, {"_id": "q2", "text": "second"}]
JUDGED = [("q1", "a", 2), ("q2", "c", 1), ("q1", "b", 0)]
EXPECTED = [Pair("first", "A one"), Pair("second", "three")]


def beir(folder, split="train"):
    (folder / "qrels").mkdir()
    write(folder, "corpus.jsonl", "\n".join(map(json.dumps, CORPUS)))
    write(folder, "queries.jsonl", "\n".join(map(json.dumps, QUERIES)))
    rows = "".join(f"{q}\t{d}\t{g}\n" for q, d, g in JUDGED)
    return write(folder / "qrels", f"{split}.tsv", "query-id\tcorpus-id\tscore\n" + rows)


def nano(folder, split="train"):
    """As the hub lays NanoBEIR out: three subsets, judgements without grades."""
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    qrels = [{"query-id": q, "corpus-id": d} for q, d, grade in JUDGED if grade]
    corpus = [{"_id": row["_id"], "text": f"{row.get('title', '')} {row['text']}".strip()} for row in CORPUS]
    for name, rows in (("corpus", corpus), ("queries", QUERIES), ("qrels", qrels)):
        (folder / name).mkdir()
        half = (1 + len(rows)) // 2
        schema = pyarrow.schema({key: pyarrow.string() for key in rows[0]})
        for i, part in enumerate((rows[:half], rows[half:])):
            file = folder / name / f"{split}-0000{i}-of-00002.parquet"
            parquet.write_table(pyarrow.Table.from_pylist(part, schema=schema), file)
    return folder


def test_a_beir_folder_gives_a_pair_for_every_relevant_judgement(tmp_path):
    beir(tmp_path)
    assert read_pairs(tmp_path) == EXPECTED
    assert read_pairs(tmp_path / "qrels" / "train.tsv") == EXPECTED


def test_a_split_without_judgements_is_named_with_those_there_are(tmp_path):
    path = beir(tmp_path, "dev")
    with pytest.raises(NotFoundError, match=r"lacks `qrels/train\.tsv`"):
        read_pairs(tmp_path)
    assert read_pairs(path) == EXPECTED
    path.write_text("q1\ta\t1\nq2\tnowhere\t1\n")
    with pytest.raises(UnreadableError, match=r"dev\.tsv` row 2 names `nowhere`, which has no text in .*corpus\.jsonl"):
        read_pairs(path)


def test_nanobeir_as_it_lies_on_the_hub(tmp_path):
    from headscale.collection import read_collection

    nano(tmp_path)
    assert read_pairs(tmp_path) == EXPECTED
    found = read_collection(tmp_path)  # asked for `test`, and there is one split alone
    assert (found.split, found.documents) == ("train", ("A one", "two", "three"))
    assert found.qrels == {"q1": {"a": 1}, "q2": {"c": 1}}


def test_several_splits_of_parquet_must_be_named(tmp_path):
    from headscale.collection import read_collection

    nano(tmp_path, "NanoMSMARCO")
    other = tmp_path / "corpus" / "NanoNQ-00000-of-00001.parquet"
    other.write_bytes((tmp_path / "corpus" / "NanoMSMARCO-00000-of-00002.parquet").read_bytes())
    assert len(read_collection(tmp_path, "NanoMSMARCO").documents) == 3
    with pytest.raises(NotFoundError, match="has no split `test`") as caught:
        read_collection(tmp_path)
    assert caught.value.hint == "pass `--split` with one of NanoMSMARCO, NanoNQ"
    other.write_bytes(b"PAR1 and nothing else")
    with pytest.raises(UnreadableError, match="is not a parquet file that can be read"):
        read_collection(tmp_path, "NanoNQ")


# --- the hub's library ------------------------------------------------------------------------------


@pytest.fixture
def dataset(tmp_path, monkeypatch):
    """A dataset of triplets as a folder of parquet, which `datasets` loads as it loads one of the hub."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = {"anchor": ["q1", "q2", "q3"], "positive": ["p1", "p2", "p3"], "negative": ["n1", "n2", "n3"],
            "score": [[2.0, 1.0]] * 3}  # fmt: skip
    folder = tmp_path / "triplets"
    datasets.Dataset.from_dict(rows).to_parquet(folder / "train.parquet")
    datasets.Dataset.from_dict({name: column[:1] for name, column in rows.items()}).to_parquet(folder / "test.parquet")
    return folder


def test_a_dataset_streams(dataset):
    expected = [Pair(f"q{i}", f"p{i}", (f"n{i}",), (2.0, 1.0)) for i in (1, 2, 3)]
    assert read_pairs(f"hf:{dataset}") == expected
    assert read_pairs(f"hf:{dataset}:test") == expected[:1]
    assert read_pairs(f"hf:{dataset}:default:train[:2]") == expected[:2]
    assert read_pairs(f"hf:{dataset}?query=positive&document=anchor")[0] == Pair("p1", "q1", ("n1",), (2.0, 1.0))
    copied = [file for file in (dataset.parent / "cache").rglob("*") if file.is_file() and file.suffix != ".lock"]
    assert copied == []


def test_a_collection_of_subsets_streams(tmp_path, monkeypatch):
    """As `hf:zeta-alpha-ai/NanoMSMARCO`: the card names the subsets."""
    from headscale.collection import read_collection

    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "nano"
    folder.mkdir()
    nano(folder)
    subsets = [f"- config_name: {name}\n  data_files:\n  - split: train\n    path: {name}/train-*" for name in
               ("corpus", "queries", "qrels")]  # fmt: skip
    (folder / "README.md").write_text("---\nconfigs:\n" + "\n".join(subsets) + "\n---\n")
    found, local = read_collection(f"hf:{folder}"), read_collection(folder)
    assert (found.qrels, found.documents, found.queries) == (local.qrels, local.documents, local.queries)
    with pytest.raises(NotFoundError, match=r"hf:.*nano:corpus:dev` cannot be read"):
        read_collection(f"hf:{folder}:dev")


@pytest.mark.parametrize(
    ("suffix", "kind", "message"),
    [
        (":nowhere:train", NotFoundError, "cannot be read: ValueError: "),
        (":default:dev", NotFoundError, "cannot be read: ValueError: "),
        (":a:b:c", UsageError, "does not name a dataset"),
        ("?text=anchor", UsageError, "names a column for `text`"),
        ("?query=nothing", UnreadableError, "row 1 has no text under `nothing`, only `anchor`, `positive`, `negative`"),
    ],
)
def test_a_dataset_that_cannot_be_read_is_a_sentence(dataset, suffix, kind, message):
    with pytest.raises(kind) as caught:
        read_pairs(f"hf:{dataset}{suffix}")
    assert message in caught.value.message
    assert "\n" not in caught.value.message
    assert not caught.value.message.endswith(".")
    assert caught.value.hint


def test_a_dataset_that_is_not_there_is_a_sentence_offline(monkeypatch):
    pytest.importorskip("datasets")
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(NotFoundError, match="the dataset `hf:no-one/nothing` cannot be read"):
        read_pairs("hf:no-one/nothing")


@pytest.mark.parametrize(("package", "source"), [("datasets", "hf:any/thing"), ("pyarrow", "p.parquet")])
def test_a_missing_extra_is_one_sentence(tmp_path, monkeypatch, package, source):
    from headscale import sources

    (tmp_path / "p.parquet").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sources, "find_spec", lambda name: None)
    with pytest.raises(HeadscaleError, match=f"reading this needs `{package}`, which is not installed") as caught:
        read_pairs(source)
    assert caught.value.hint == 'pip install "headscale[datasets]"'
