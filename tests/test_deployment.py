"""What is deployed, against sentence-transformers' own modules, whole numbers by hand, and interrupted evaluations."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_evaluation import FakeEncoder, collection, sparse_reps
from tiny_models import VOCAB, tiny_checkpoint

torch = pytest.importorskip("torch")
pytest.importorskip("ir_measures")

from headscale import evaluation, search, shards  # noqa: E402
from headscale.api import Loading  # noqa: E402
from headscale.backbone import load_backbone  # noqa: E402
from headscale.cli import run  # noqa: E402
from headscale.deployment import declared  # noqa: E402
from headscale.encoder import SpladeEncoder  # noqa: E402
from headscale.errors import HeadscaleError, UnreadableError, UnsupportedHeadError  # noqa: E402
from headscale.evaluation import Setup, evaluate  # noqa: E402
from headscale.idf import idf_of, read_idf  # noqa: E402
from headscale.impacts import Rounded, Rounding, roundings  # noqa: E402

TEXTS = ["w5 w6 w7 w5", "w9", "w20 w21 w22 w23 w24 w25", "w5 w130"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    return Path(tiny_checkpoint("bert", tmp_path_factory.mktemp("model") / "bert"))


def routed(folder: Path, target: Path, pooling: str = "max", activation: str = "relu") -> Any:
    """A sentence-transformers model whose queries are a table, saved; and the model itself."""
    from sentence_transformers import SparseEncoder
    from sentence_transformers.sparse_encoder.modules import MLMTransformer, SparseStaticEmbedding, SpladePooling

    try:
        from sentence_transformers.base.modules import Router
    except ImportError:  # before 5.3 or so
        from sentence_transformers.models import Router
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    weights = torch.rand(len(tokenizer), generator=torch.Generator().manual_seed(0))
    queries = [SparseStaticEmbedding(tokenizer, weight=weights, frozen=True)]
    documents = [MLMTransformer(str(folder)), SpladePooling(pooling, activation)]
    router = Router.for_query_document(query_modules=queries, document_modules=documents)
    model = SparseEncoder(modules=[router], device="cpu", similarity_fn_name="dot")
    model.save_pretrained(str(target))
    return model


# --- pooling ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["relu", "log1p_relu"])
@pytest.mark.parametrize("pooling", ["max", "sum"])
def test_pooling_is_sentence_transformers_own(
    folder: Path, pooling: str, activation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sentence_transformers.sparse_encoder.modules import SpladePooling

    monkeypatch.setattr("headscale.encoder._TILE", 50)  # 131 terms: two whole tiles and a part
    opened = load_backbone(folder)
    encoder = SpladeEncoder(opened.loaded, opened.tokenizer, pooling=pooling, activation=activation)
    ours = encoder.encode(TEXTS, max_length=16)
    tokens = opened.tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = opened.model(**tokens).logits
    features = {"token_embeddings": logits, "attention_mask": tokens["attention_mask"]}
    theirs = SpladePooling(pooling, activation).eval()(features)["sentence_embedding"]
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    assert ((ours > 0) == (theirs > 0)).all()


def test_the_sum_has_the_gradient_of_its_formula(folder: Path) -> None:
    from headscale.encoder import sum_pool

    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 5, 4, dtype=torch.float64, generator=generator, requires_grad=True)
    weight = torch.randn(7, 4, dtype=torch.float64, generator=generator, requires_grad=True)
    bias = torch.randn(7, dtype=torch.float64, generator=generator, requires_grad=True)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]])
    for twice in (False, True):

        def whole(h: Any, w: Any, b: Any, twice: bool = twice) -> Any:
            active = torch.log1p(torch.relu(0.5 * (h @ w.T + b)))
            return ((torch.log1p(active) if twice else active) * mask[:, :, None]).sum(1)

        found, expected = sum_pool(hidden, weight, bias, mask, scale=0.5, twice=twice), whole(hidden, weight, bias)
        assert torch.allclose(found, expected, rtol=1e-12)
        draw = torch.randn(found.shape, dtype=torch.float64, generator=generator)
        for ours, theirs in zip(
            torch.autograd.grad(found, (hidden, weight, bias), draw),
            torch.autograd.grad(expected, (hidden, weight, bias), draw),
            strict=True,
        ):
            assert torch.allclose(ours, theirs, rtol=1e-10, atol=1e-12)


def test_a_constant_moves_the_support_of_neither_pooling(folder: Path) -> None:
    opened = load_backbone(folder)
    for pooling in ("max", "sum"):
        encoders = [SpladeEncoder(opened.loaded, opened.tokenizer, scale=a, pooling=pooling) for a in (1.0, 1 / 16)]
        whole, shrunk = (encoder.encode(TEXTS, max_length=16) for encoder in encoders)
        assert ((whole > 0) == (shrunk > 0)).all()
        exact = torch.log1p(torch.expm1(whole) / 16)
        error = (exact - shrunk).abs().max() / shrunk.max()
        # Of the max the representation under every constant follows exactly; of the sum it does not.
        assert error < 1e-5 if pooling == "max" else error > 1e-2, (pooling, error)


# --- inference-free queries -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("pooling", "activation"), [("max", "relu"), ("sum", "log1p_relu")])
def test_a_router_is_evaluated_as_it_encodes(folder: Path, tmp_path: Path, pooling: str, activation: str) -> None:
    model = routed(folder, tmp_path / "routed", pooling, activation)
    made = collection([{i: 1} for i in range(4)], 30)
    words = np.random.default_rng(3).integers(5, VOCAB, size=(34, 6))
    texts = [" ".join(f"w{w}" for w in row) for row in words]
    made = replace(made, queries=tuple(texts[:4]), documents=tuple(texts[4:]))
    found = evaluate(str(tmp_path / "routed"), collection=made, setup=Setup(16, 16, bm25=False, resamples=1000))
    assert (found.pooling, found.activation) == (pooling, activation)
    assert found.queries.endswith("model.safetensors`")
    queries = model.encode_query(texts[:4], convert_to_sparse_tensor=False).double().cpu()
    documents = model.encode_document(texts[4:], convert_to_sparse_tensor=False).double().cpu()
    scores = (queries @ documents.T).numpy()
    ranks = [int(np.argsort(-scores[i], kind="stable").tolist().index(i)) + 1 for i in range(4)]
    assert found.systems[0].mrr_at_10 is not None
    assert found.systems[0].mrr_at_10.value == pytest.approx(np.mean([1 / r if r <= 10 else 0 for r in ranks]))
    side = found.systems[0].query
    assert side is not None
    assert side.active_dims == pytest.approx(float((queries > 0).sum(1).double().mean()))


def test_an_idf_file_weighs_as_sentence_transformers_reads_it(folder: Path, tmp_path: Path) -> None:
    from sentence_transformers.sparse_encoder.modules import SparseStaticEmbedding

    tokenizer = load_backbone(folder).tokenizer
    file = tmp_path / "idf.json"
    file.write_text(json.dumps({"w5": 1.5, "w6": 2, "w130": 0.25, "w9": 0.0}))
    theirs = SparseStaticEmbedding.from_json(str(file), tokenizer)
    expected = theirs(theirs.preprocess(TEXTS))["sentence_embedding"].detach().numpy()
    ours = read_idf(file, tokenizer, VOCAB).encode(TEXTS, 16)
    assert ours.toarray() == pytest.approx(expected)
    assert ours.nnz == (expected > 0).sum() == 4


def test_the_table_of_a_collection_is_lucenes_formula(folder: Path) -> None:
    tokenizer = load_backbone(folder).tokenizer
    found = idf_of(tokenizer, TEXTS, VOCAB, max_length=16)
    for word, count in ((5, 2), (9, 1), (100, 0)):
        assert found.weights[word] == pytest.approx(math.log(1 + (4 - count + 0.5) / (count + 0.5)))
    assert not found.weights[:5].any()  # special tokens
    assert found.encode(["w5 w5 w5"], 16).data.tolist() == [found.weights[5]]  # presence, not frequency
    assert found.encode(["", "w9 w9"], 16).indptr.tolist() == [0, 0, 1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1]", "is not a JSON object of weights by token"),
        ('{"w5": "much"}', "is not a JSON object of weights by token"),
        ('{"nothing": 1.0}', "names no token of this model's vocabulary"),
        ('{"w5": -1.0}', "has weights that are negative or not finite"),
    ],
)
def test_a_table_that_is_none_is_refused(folder: Path, tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "idf.json").write_text(content)
    with pytest.raises(UnreadableError, match=message):
        read_idf(tmp_path / "idf.json", load_backbone(folder).tokenizer, VOCAB)


def test_what_a_checkpoint_says_is_read_or_refused(tmp_path: Path) -> None:
    folder = tiny_checkpoint("bert", tmp_path / "model")
    backbone = load_backbone(folder)
    assert declared(backbone) == declared(replace(backbone, directory=None))
    modules = [{"idx": 0, "path": "", "type": "x.MLMTransformer"}, {"idx": 1, "path": "1", "type": "x.SpladePooling"}]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1").mkdir()
    (folder / "1" / "config.json").write_text('{"pooling_strategy": "sum", "activation_function": "log1p_relu"}')
    assert (declared(backbone).pooling, declared(backbone).activation) == ("sum", "log1p_relu")
    (folder / "1" / "config.json").write_text('{"pooling_strategy": "mean"}')
    with pytest.raises(UnsupportedHeadError, match="pools by `mean` after `relu`"):
        declared(backbone)
    (folder / "router_config.json").write_text('{"types": {"q": "x.Dense"}, "structure": {"query": ["q"]}}')
    (folder / "modules.json").write_text('[{"path": "", "type": "x.Router"}]')
    with pytest.raises(UnsupportedHeadError, match="encodes queries by Dense, which evaluation does not know"):
        declared(backbone)


# --- whole numbers --------------------------------------------------------------------------------------------------


def test_rounding_by_hand() -> None:
    from scipy.sparse import csr_array

    weights = csr_array(np.array([[0.004, 2.0, 0.0], [0.0, 0.004, 0.0], [0.006, 0.0, 1.0]]))
    x100 = Rounded(Rounding().step(2.0))
    assert x100(weights).toarray().tolist() == [[0, 200, 0], [0, 0, 0], [1, 0, 100]]
    assert (x100.lost, x100.weights, x100.emptied, x100.largest, x100.share) == (2, 5, 1, 200, 0.4)
    assert weights.nnz == 5  # left as it was
    bits = Rounded(Rounding(2).step(2.0))
    assert bits(weights).toarray().tolist() == [[0, 3, 0], [0, 0, 0], [0, 0, 2]]
    assert [one.name for one in roundings("x100, 8,4,8")] == ["x100", "8", "4"]


def test_rankings_of_whole_numbers_are_their_dense_product(tmp_path: Path) -> None:
    made = collection([{i: 1} for i in range(20)], 150)
    reps = {text: rep * 3 for text, rep in sparse_reps(made, 83, 0.2).items()}
    options = {"query_length": 8, "document_length": 8, "batch_size": 16}
    found = search.search_rounded(
        FakeEncoder(reps), made, roundings=roundings("x100,8,3"), folder=tmp_path / "kept", **options
    )
    assert not (tmp_path / "kept").exists()
    (plain,) = search.search_rounded(FakeEncoder(reps), made, **options)
    queries, documents = (np.array([reps[t].double().numpy() for t in s]) for s in (made.queries, made.documents))
    steps = [(0.01, 0.01), *((queries.max() / n, documents.max() / n) for n in (255, 7))]
    for one, (query_step, document_step) in zip(found[1:], steps, strict=True):
        scores = np.rint(queries / query_step) @ np.rint(documents / document_step).T
        assert one.impacts is not None
        lost = ((documents > 0) & (np.rint(documents / document_step) == 0)).sum() / (documents > 0).sum()
        assert one.impacts.lost_document == pytest.approx(lost)
        for i, ranked in enumerate(one.rankings):
            assert ranked.scores.tolist() == sorted(scores[i][scores[i] > 0], reverse=True)
            assert scores[i][ranked.documents].tolist() == ranked.scores.tolist()
    assert found[0].impacts is None
    for ours, theirs in zip(found[0].rankings, plain.rankings, strict=True):
        assert ours.documents.tolist() == theirs.documents.tolist()
        assert ours.scores.tolist() == theirs.scores.tolist()


def test_the_constant_and_the_rounding_meet_in_a_word(folder: Path) -> None:
    made = collection([{i: 1} for i in range(6)], 12)
    made = replace(made, queries=("w5 w6",) * 6, documents=tuple(f"w{i} w{i + 1} w7" for i in range(8, 20)))
    words, shares = {}, {}
    for scale in (1.0, 2.0**-10):
        opened = load_backbone(folder)
        from headscale.rescaling import rescale_

        rescale_(opened.model, scale)
        found = evaluate(
            opened.model, opened.tokenizer, collection=made,
            setup=Setup(16, 16, bm25=False, resamples=1000, quantize=("x100", "8")),
        )  # fmt: skip
        impacts = [row.impacts for row in found.systems if row.impacts is not None]
        words[scale] = [one.word for one in impacts]
        shares[scale] = [one.lost_document for one in impacts]
        said = [w for w in found.warnings if w.startswith("x100: ")]
        assert bool(said) == (impacts[0].word != "kept")
    # The same vectors but for their size: what is absolute loses terms, what is relative hardly notices.
    assert shares[2.0**-10][0] > 0.5 > shares[1.0][0], shares
    assert abs(shares[2.0**-10][1] - shares[1.0][1]) < 0.1, shares
    assert words[2.0**-10][0] in ("thinned", "emptied")


# --- an interrupted evaluation ----------------------------------------------------------------------------------------


class Stopped(Exception):
    pass


class Stopping(FakeEncoder):
    """Stops, as if killed, once it has encoded so many batches."""

    def __init__(self, reps: Any, after: int) -> None:
        super().__init__(reps)
        self.after = after

    def encode(self, texts: Any, **options: Any) -> Any:
        if len(self.batches) == self.after:
            raise Stopped
        return super().encode(texts, **options)


@pytest.mark.parametrize("after", [0, 1, 3, 7, 10])
def test_what_was_encoded_before_is_not_encoded_again(
    tmp_path: Path, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "_BLOCK_DOCUMENTS", 20)
    made = collection([{i: 1} for i in range(10)], 100)
    reps = sparse_reps(made, 40, 0.3)
    options = {"query_length": 8, "document_length": 8, "batch_size": 10, "folder": tmp_path / "kept"}
    (whole,) = search.search_rounded(FakeEncoder(reps), made, **options)
    with pytest.raises(Stopped):
        search.search_rounded(Stopping(reps, after), made, **options)
    again = FakeEncoder(reps)
    (found,) = search.search_rounded(again, made, **options)
    blocks = max(0, after - 1) // 2  # the first batch is the queries'; two make a block
    assert sum(again.batches) == 10 + 100 - 20 * blocks
    for ours, theirs in zip(found.rankings, whole.rankings, strict=True):
        assert ours.documents.tolist() == theirs.documents.tolist()
        assert ours.scores.tolist() == theirs.scores.tolist()
    assert found.documents.sparsity() == whole.documents.sparsity()
    assert not (tmp_path / "kept").exists()


def test_damaged_and_foreign_shards_are_encoded_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "_BLOCK_DOCUMENTS", 20)
    made = collection([{i: 1} for i in range(10)], 100)
    reps = sparse_reps(made, 40, 0.3)
    options = {"query_length": 8, "document_length": 8, "batch_size": 10, "folder": tmp_path / "kept"}
    with pytest.raises(Stopped):
        search.search_rounded(Stopping(reps, 9), made, **options)
    files = sorted((tmp_path / "kept").glob("shard-*"))
    assert len(files) == 4
    files[2].write_bytes(files[2].read_bytes()[:-100])
    again = FakeEncoder(reps)
    search.search_rounded(again, made, **options)
    assert sum(again.batches) == 10 + 100 - 40  # the damaged one and what came after it


def test_a_disk_without_room_costs_the_resuming_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = collection([{i: 1} for i in range(10)], 100)
    reps = sparse_reps(made, 40, 0.3)
    options = {"query_length": 8, "document_length": 8, "folder": tmp_path / "kept"}
    monkeypatch.setattr(shards, "_ROOM", 0.0)
    (found,) = search.search_rounded(FakeEncoder(reps), made, **options)
    assert len(found.rankings) == 10
    with pytest.raises(HeadscaleError, match="the disk has no room"):
        search.search_rounded(FakeEncoder(reps), made, roundings=roundings("8"), **options)


def test_an_interrupted_evaluation_goes_on_in_its_cell(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "_BLOCK_DOCUMENTS", 8)
    made = collection([{i: 1} for i in range(4)], 40)
    setup = Setup(8, 8, batch_size=4, bm25=False, resamples=1000)
    seen: list[int] = []

    def stop(done: int, total: int) -> None:
        seen.append(done)
        if done > 24:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluation.evaluate_in_run(str(folder), made, tmp_path, setup=setup, loading=Loading(on_batch=stop))
    (kept,) = tmp_path.glob("evaluate-*/encoded")
    said: list[str] = []
    steps: list[int] = []
    loading = Loading(tell=said.append, on_batch=lambda done, total: steps.append(done))
    found = evaluation.evaluate_in_run(str(folder), made, tmp_path, setup=setup, loading=loading)
    assert any("going on with the documents encoded before" in sentence for sentence in said)
    assert steps[1] == 12  # the queries, then a block from the disk at once
    assert steps[-1] == 44
    assert not kept.exists()
    whole = evaluation.evaluate(str(folder), collection=made, setup=setup)
    assert replace(found.systems[0], run=None) == whole.systems[0]


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--queries", "bm25"], "`--queries bm25` is none of model, idf, idf:FILE"),
        (["--pooling", "mean"], "`--pooling mean` is none of max, sum"),
        (["--activation", "gelu"], "`--activation gelu` is none of relu, log1p_relu"),
        (["--quantize", "8,x10"], "`--quantize x10` is neither `x100` nor a number of bits up to 16"),
        (["--quantize", "17"], "`--quantize 17` is neither"),
    ],
)
def test_options_are_judged_before_anything_is_loaded(options: list[str], message: str, capsys: Any) -> None:
    assert run(["evaluate", "nowhere/at-all", *options]) == 2
    assert message in capsys.readouterr().err


# --- inspect --------------------------------------------------------------------------------------------------------


def test_inspect_measures_what_is_deployed(folder: Path, tmp_path: Path, capsys: Any) -> None:
    """Against sentence-transformers' own SpladePooling on the same texts."""
    from sentence_transformers.sparse_encoder.modules import SpladePooling

    words = np.random.default_rng(5).integers(5, VOCAB, size=(32, 6))
    rows = [[" ".join(f"w{w}" for w in row[:2]), " ".join(f"w{w}" for w in row)] for row in words]
    file = tmp_path / "pairs.tsv"
    file.write_text("".join("\t".join(row) + "\n" for row in rows))
    options = ["--pairs", str(file), "--pooling", "sum", "--activation", "log1p_relu", "--quantize", "x100,4"]
    common = ["inspect", str(folder), "--run", str(tmp_path / "runs"), "--reference", str(folder)]
    assert run([*common, *options, "--json"]) == 0
    out = capsys.readouterr()
    (found,) = json.loads(out.out)["results"]
    deployed = found["deployed"]
    assert (deployed["pooling"], deployed["activation"], deployed["queries"]) == ("sum", "log1p_relu", "model")
    assert "sum pooling: a constant keeps which terms are active" in out.err
    opened = load_backbone(folder)
    pooled = []
    for side in (0, 1):
        tokens = opened.tokenizer([row[side] for row in rows], padding=True, return_tensors="pt")
        with torch.no_grad():
            logits = opened.model(**tokens).logits
        features = {"token_embeddings": logits, "attention_mask": tokens["attention_mask"]}
        pooled.append(SpladePooling("sum", "log1p_relu").eval()(features)["sentence_embedding"].double())
    scores = pooled[0] @ pooled[1].T
    loss = torch.nn.functional.cross_entropy(scores, torch.arange(32))
    assert deployed["loss_over_ln_n"] == pytest.approx(float(loss) / math.log(32), rel=1e-4)
    assert deployed["score_sd"] == pytest.approx(float(scores.std()), rel=1e-4)
    assert deployed["active_dims_document"] == pytest.approx(float((pooled[1] > 0).sum(1).double().mean()))
    lost = [float(((pooled[1] > 0) & ((pooled[1] / s).round() == 0)).sum() / (pooled[1] > 0).sum())
            for s in (0.01, float(pooled[1].max()) / 15)]  # fmt: skip
    assert [one["lost_document"] for one in deployed["impacts"]] == pytest.approx(lost, abs=2e-3)
    assert run([*common, "--pairs", str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["results"][0]["deployed"] is None
    assert run([*common, "--weights-only", "--pooling", "sum"]) == 2
    assert "`--weights-only` runs no text" in capsys.readouterr().err
