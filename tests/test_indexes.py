"""Exported collections, read back: by Seismic itself, and as Anserini's and OpenSearch's own rules read them."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_evaluation import collection
from tiny_models import VOCAB, tiny_checkpoint

torch = pytest.importorskip("torch")

from headscale import indexes, search  # noqa: E402
from headscale.backbone import load_backbone  # noqa: E402
from headscale.cli import run  # noqa: E402
from headscale.deployment import Deployment, deployment_of  # noqa: E402
from headscale.errors import HeadscaleError, UsageError  # noqa: E402
from headscale.evaluation import Setup  # noqa: E402
from headscale.impacts import Rounding  # noqa: E402
from headscale.indexes import export  # noqa: E402
from headscale.terms import term_names  # noqa: E402

SETUP = Setup(16, 16, batch_size=8)


@pytest.fixture(scope="module")
def made() -> Any:
    """Forty documents of made-up words, some with what JSON and tables must escape."""
    words = np.random.default_rng(3).integers(5, VOCAB, size=(50, 6))
    texts = [" ".join(f"w{w}" for w in row) for row in words]
    texts[12] += ' "quoted"\ttab\nline \u2028 \N{GRINNING FACE}'
    found = collection([{i: 1} for i in range(10)], 40)
    return replace(found, queries=tuple(texts[:10]), documents=tuple(texts[10:]))


@pytest.fixture(scope="module")
def plan(made: Any, tmp_path_factory: Any) -> Deployment:
    folder = tiny_checkpoint("bert", tmp_path_factory.mktemp("model") / "bert")
    return deployment_of(load_backbone(folder), made, SETUP)


def dense(plan: Deployment, texts: Any) -> Any:
    """The model's own representations, in the batches that the export makes: others round otherwise."""
    order = search.encoding_order(texts)
    parts = [order[i : i + 8] for i in range(0, len(order), 8)]
    values = np.zeros((len(texts), VOCAB))
    for part in parts:
        values[part] = plan.encoder.encode([texts[i] for i in part], max_length=16).double().numpy()
    return values


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def matrix(found: list[dict[str, Any]], ids: Any, names: list[str]) -> Any:
    column = {name: i for i, name in enumerate(names)}
    place = {identity: i for i, identity in enumerate(ids)}
    values = np.zeros((len(ids), len(names)))
    for row in found:
        for term, weight in row["vector"].items():
            values[place[row["id"]], column[term]] = weight
    return values


def test_json_lines_are_the_representations(plan: Deployment, made: Any, tmp_path: Path) -> None:
    found = export(plan, "model", made, tmp_path / "out")
    names = term_names(plan.encoder.tokenizer, VOCAB)
    for file, ids, texts in (
        ("documents.jsonl", made.document_ids, made.documents),
        ("queries.jsonl", made.query_ids, made.queries),
    ):
        read = matrix(rows(tmp_path / "out" / file), ids, names)
        assert np.array_equal(read.astype(np.float32), dense(plan, texts).astype(np.float32))
    assert found.files == {f: (tmp_path / "out" / f).stat().st_size for f in ("documents.jsonl", "queries.jsonl")}
    assert sorted(one.name for one in tmp_path.iterdir()) == ["out"]  # nothing beside it is left


def test_anserinis_files_hold_impacts(plan: Deployment, made: Any, tmp_path: Path) -> None:
    found = export(plan, "model", made, tmp_path / "out", kind="anserini", rounding=Rounding())
    names = term_names(plan.encoder.tokenizer, VOCAB)
    documents = rows(tmp_path / "out" / "corpus" / "documents.jsonl")
    assert {frozenset(row) for row in documents} == {frozenset(("id", "contents", "vector"))}
    assert all(type(weight) is int and weight > 0 for row in documents for weight in row["vector"].values())
    expected = np.rint(100 * dense(plan, made.documents))
    assert np.array_equal(matrix(documents, made.document_ids, names), expected)
    topics = [line.split("\t") for line in (tmp_path / "out" / "topics.tsv").read_text().splitlines()]
    asked = [{"id": identity, "vector": Counter(terms.split())} for identity, terms in topics]  # as Lucene counts them
    assert np.array_equal(matrix(asked, made.query_ids, names), np.rint(100 * dense(plan, made.queries)))
    assert found.impacts is not None
    assert found.impacts.largest == max(expected.max(), np.rint(100 * dense(plan, made.queries)).max())


@pytest.mark.parametrize("kind", ["opensearch", "opensearch-ann"])
def test_opensearchs_bulk_request_and_queries(plan: Deployment, made: Any, tmp_path: Path, kind: str) -> None:
    export(plan, "model", made, tmp_path / "out", kind=kind, index="mine")
    lines = rows(tmp_path / "out" / "documents.bulk.ndjson")
    actions, sources = lines[::2], lines[1::2]
    assert [set(one) for one in actions] == [{"index"}] * 40
    assert {one["index"]["_index"] for one in actions} == {"mine"}
    ids = [one["index"]["_id"] for one in actions]
    names = [str(i) for i in range(VOCAB)]
    if kind == "opensearch":
        names = term_names(plan.encoder.tokenizer, VOCAB, dots=False)
    found = [{"id": i, "vector": source["embedding"]} for i, source in zip(ids, sources, strict=True)]
    assert np.allclose(matrix(found, made.document_ids, names), dense(plan, made.documents), rtol=1e-7)
    assert {i: source["text"] for i, source in zip(ids, sources, strict=True)} == dict(
        zip(made.document_ids, made.documents, strict=True)
    )
    queries = rows(tmp_path / "out" / "queries.jsonl")
    asked = [{"id": q["id"], "vector": q["query"]["neural_sparse"]["embedding"]["query_tokens"]} for q in queries]
    assert np.allclose(matrix(asked, made.query_ids, names), dense(plan, made.queries), rtol=1e-7)
    mapping = json.loads((tmp_path / "out" / "index.json").read_text())
    field = mapping["mappings"]["properties"]["embedding"]["type"]
    assert field == ("rank_features" if kind == "opensearch" else "sparse_vector")


# --- Seismic ----------------------------------------------------------------------------------------------------------


def seismic_recall(folder: Path, exact: list[Any], ids: Any, heap_factor: float = 0.7) -> float:
    """Share of the exact ten best that Seismic finds in the exported files, queries cut as its guide has it."""
    seismic = pytest.importorskip("seismic")
    index = seismic.SeismicIndex.build(str(folder / "documents.jsonl"), num_threads=1)
    assert index.len == len(rows(folder / "documents.jsonl"))
    kind = seismic.get_seismic_string()
    found = []
    for row, best in zip(rows(folder / "queries.jsonl"), exact, strict=True):
        terms = np.array(list(row["vector"]), dtype=kind)
        weights = np.array(list(row["vector"].values()), dtype=np.float32)
        hits = index.search(
            query_id=row["id"], query_components=terms, query_values=weights, k=10, query_cut=len(terms),
            heap_factor=heap_factor,
        )  # fmt: skip
        wanted = {ids[d] for d in best.documents[:10]}
        found.append(len(wanted & {hit[2] for hit in hits}) / len(wanted))
    return float(np.mean(found))


def test_seismic_finds_what_exact_search_finds(tmp_path: Path) -> None:
    """On real text and a trained masked LM: the built-in docstrings of two packages with the bundled BERT."""
    from headscale import bundled
    from headscale.collection import Collection
    from headscale.texts import builtin_pairs

    pairs = builtin_pairs("test", packages=("stdlib", "numpy"))[:300]
    count = range(len(pairs))
    real = Collection(
        name="docstrings", split="test", document_ids=tuple(f"d{i}" for i in count),
        documents=tuple(pair.document for pair in pairs), query_ids=tuple(f"q{i}" for i in count),
        queries=tuple(pair.query for pair in pairs), relevant=tuple({i: 1} for i in count),
        absent=tuple({} for _ in pairs), own=(None,) * len(pairs),
    )  # fmt: skip
    plan = deployment_of(load_backbone(bundled.path("bundled:tiny-bert")), real, Setup(32, 48))
    exact = search.search(plan.encoder, real, query_length=32, document_length=48, batch_size=32)
    export(plan, "model", real, tmp_path / "out", kind="seismic")
    recall = seismic_recall(tmp_path / "out", exact.rankings, real.document_ids)
    assert recall >= 0.95, recall  # what the project asks of it


# --- names of terms ---------------------------------------------------------------------------------------------------


class Tokens:
    def __init__(self, tokens: list[str]) -> None:
        self.tokens = tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def convert_ids_to_tokens(self, ids: Any) -> list[str]:
        return [self.tokens[i] for i in ids]


def test_no_two_terms_share_a_name_and_none_is_split() -> None:
    tokens = ["a", "a", "  ", "\t\t", "", "x.y", "x\u2024y", "a#1", "\u00a0", '"', "z" * 40, "z" * 41]
    for dots, longest in ((True, None), (False, None), (False, 30)):
        names = term_names(Tokens(tokens), 15, dots=dots, longest=longest)  # more rows than tokens
        assert len(set(names)) == len(names) == 15
        assert all(name and name.split() == [name] for name in names)
        assert dots or not any("." in name for name in names)
        assert longest is None or max(map(len, names)) <= longest
    assert names[0] == "a"
    assert term_names(Tokens(["the", "##ing", "\u0120cat"]), 3) == ["the", "##ing", "\u0120cat"]


# --- what can go wrong ------------------------------------------------------------------------------------------------


def test_an_interrupted_export_goes_on_and_leaves_nothing_half(
    plan: Deployment, made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "_BLOCK_DOCUMENTS", 8)

    def stop(done: int, total: int) -> None:
        if done > 34:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(plan, "model", made, tmp_path / "out", on_batch=stop)
    assert not (tmp_path / "out").exists()
    steps: list[int] = []
    export(plan, "model", made, tmp_path / "out", on_batch=lambda done, total: steps.append(done))
    assert steps[2] == 18  # ten queries in two batches, and eight documents from the disk at once
    export(plan, "model", made, tmp_path / "whole")
    for file in ("documents.jsonl", "queries.jsonl"):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def test_a_failed_write_leaves_no_folder(
    plan: Deployment, made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(indexes, "_text", full)
    with pytest.raises(HeadscaleError, match="cannot be written"):
        export(plan, "model", made, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_that_are_not_finite_are_not_exported(plan: Deployment, made: Any, tmp_path: Path) -> None:
    weight = plan.encoder.head.weight
    with torch.no_grad():
        kept = weight[7].clone()
        weight[7] = float("nan")
        try:
            with pytest.raises(HeadscaleError, match="queries have weights that are not finite"):
                export(plan, "model", made, tmp_path / "out")
        finally:
            weight[7] = kept
    assert list(tmp_path.iterdir()) == []


def test_a_target_is_judged_first(tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(UsageError, match="`--format lucene` is none of"):
        indexes.check_target("lucene", tmp_path / "out")
    (tmp_path / "file").touch()
    assert run(["encode", "nowhere/at-all", "-o", str(tmp_path)]) == 2
    assert "holds something already" in capsys.readouterr().err
    assert run(["encode", "nowhere/at-all", "-o", str(tmp_path / "new"), "--quantize", "8,4"]) == 2
    assert "asks for 2 roundings of one set of files" in capsys.readouterr().err


def test_the_command(tmp_path: Path, capsys: Any) -> None:
    from test_collection import write

    model = tiny_checkpoint("bert", tmp_path / "model")
    write(tmp_path / "collection")
    common = [str(model), "--collection", str(tmp_path / "collection"), "--device", "cpu"]
    assert run(["encode", *common, "-o", str(tmp_path / "out"), "--format", "anserini", "--queries", "idf"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "file\tsize [bytes]"
    assert [line.split("\t")[0] for line in shown[1:]] == [
        str(tmp_path / "out" / "corpus" / "documents.jsonl"),
        str(tmp_path / "out" / "topics.tsv"),
    ]
    assert run(["encode", *common, "-o", str(tmp_path / "json"), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["schema"] == "headscale.encode/1"
    assert document["results"][0]["documents"] == 4
