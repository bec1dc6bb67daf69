"""Evaluation against oracles: measures in plain float64, dense products, the BM25 formula, every order of chance."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_collection import CRANFIELD, write
from tiny_models import VOCAB, tiny_checkpoint

torch = pytest.importorskip("torch")
ir_measures = pytest.importorskip("ir_measures")
pytest.importorskip("bm25s")

from headscale import evaluation, search  # noqa: E402
from headscale.bm25 import search_bm25  # noqa: E402
from headscale.cli import run  # noqa: E402
from headscale.collection import Collection, read_collection  # noqa: E402
from headscale.effectiveness import (  # noqa: E402
    DEPTH,
    MEASURES,
    Ranked,
    chance,
    estimate,
    estimates,
    expected_at_random,
    per_query,
    untied,
    write_run,
)
from headscale.errors import HeadscaleError, MemoryForecastError  # noqa: E402

CUTOFFS = [(name, kind.partition("@")[0], cutoff) for name, (kind, cutoff) in MEASURES.items()]


def collection(grades: list[dict[int, int]], documents: int, **changes: Any) -> Collection:
    """Made-up texts; ids are shuffled so that breaking ties by id would show."""
    source = np.random.default_rng(documents)
    names = [f"{n:05d}" for n in source.permutation(documents)]
    made = Collection(
        name="made up",
        split="test",
        document_ids=tuple(names),
        documents=tuple(f"text {i}" for i in range(documents)),
        query_ids=tuple(f"q{i}" for i in range(len(grades))),
        queries=tuple(f"query {i}" for i in range(len(grades))),
        relevant=tuple(grades),
        absent=tuple({} for _ in grades),
        own=(None,) * len(grades),
    )
    return replace(made, **changes)


def measure(kind: str, cutoff: int, order: list[int], grades: dict[int, int], absent: tuple[int, ...] = ()) -> float:
    """One measure of one ranking, from its definition."""
    found = [grades.get(document, 0) for document in order[:cutoff]]
    if kind == "R":
        return sum(grade > 0 for grade in found) / (len(grades) + len(absent))
    if kind == "RR":
        return next((1 / rank for rank, grade in enumerate(found, 1) if grade > 0), 0.0)
    ideal = sorted([*grades.values(), *absent], reverse=True)[:cutoff]
    return gain(found) / gain(ideal)


def gain(grades: list[int]) -> float:
    return math.fsum(grade / math.log2(rank + 1) for rank, grade in enumerate(grades, 1))


def ranked(made: Collection, scores: np.ndarray, *, depth: int = DEPTH, block: int = 7) -> list[Ranked]:
    rankings = search.Rankings(made, depth)
    for start in range(0, scores.shape[1], block):
        positions = np.arange(start, min(start + block, scores.shape[1]))
        rankings.add(0, scores[:, positions], positions)
    return rankings.ranked()


# --- measures and ties --------------------------------------------------------------------------------------------


def test_every_measure_is_the_worst_over_all_orders_of_ties() -> None:
    source = np.random.default_rng(0)
    for trial in range(12):
        sizes = source.permutation([4, 3, 2, 2, 1])  # 4! 3! 2! 2! orders
        scores = np.repeat(np.arange(5, 0, -1), sizes).astype(float)[source.permutation(12)]
        scores[source.integers(12)] = 0.0
        grades = {int(d): int(source.integers(1, 4)) for d in source.choice(12, 5, replace=False)}
        made = collection([grades], 12)
        values = per_query(made, ranked(made, scores[None, :]))
        assert set(values) == {"ndcg_at_10", "mrr_at_10"}
        groups = [[d for d in range(12) if scores[d] == s] for s in sorted({*scores} - {0.0}, reverse=True)]
        orders = [[*itertools.chain(*one)] for one in itertools.product(*map(itertools.permutations, groups))]
        for name, kind, cutoff in CUTOFFS[:2]:
            worst = min(measure(kind, cutoff, order, grades) for order in orders)
            assert values[name][0] == pytest.approx(worst, abs=1e-12), (trial, name)


def test_measures_of_large_rankings_with_ties() -> None:
    source = np.random.default_rng(1)
    grades = [{int(d): int(source.integers(1, 4)) for d in source.choice(1500, 60, replace=False)} for _ in range(8)]
    gone = tuple({"gone": 2} if i % 2 else {} for i in range(8))
    made = collection(grades, 1500, absent=gone)
    scores = source.integers(0, 40, (8, 1500)).astype(float)
    values = per_query(made, ranked(made, scores, block=211))
    for i, own in enumerate(grades):
        order = sorted(
            (d for d in range(1500) if scores[i, d]), key=lambda d, i=i: (-scores[i, d], grades[i].get(d, 0))
        )
        for name, kind, cutoff in CUTOFFS:
            expected = measure(kind, cutoff, order, own, tuple(gone[i].values()))
            assert values[name][i] == pytest.approx(expected, abs=1e-12), (i, name)


def test_rankings_do_not_depend_on_the_blocks_nor_on_what_is_tied_at_the_depth() -> None:
    source = np.random.default_rng(2)
    made = collection([{3: 1, 50: 2}, {9: 1}], 60)
    scores = source.integers(0, 3, (2, 60)).astype(float)
    whole = ranked(made, scores, depth=20, block=60)
    for block in (1, 4, 17):
        for one, other in zip(whole, ranked(made, scores, depth=20, block=block), strict=True):
            assert one.documents.tolist() == other.documents.tolist()
    flat = ranked(made, np.ones((2, 60)), depth=20)
    assert flat[0].documents.tolist() == [d for d in range(60) if d != 3][:20]  # others are as good
    assert flat[1].documents.tolist() == [d for d in range(60) if d != 9][:20]


def test_scores_that_are_no_numbers_count_against_us() -> None:
    made = collection([{0: 1, 5: 1, 7: 1}], 12)
    scores = np.arange(12, 0, -1.0)[None, :]
    scores[0, [0, 11]] = np.nan  # the first is relevant, the last is not
    scores[0, 5] = np.inf
    order = ranked(made, scores)[0].documents.tolist()
    assert order[:2] == [11, 5]
    assert 0 not in order


def test_what_shares_no_term_is_not_retrieved_and_a_query_is_not_its_own_answer() -> None:
    made = collection([{1: 1}, {2: 1}], 12, own=(4, None))
    scores = np.zeros((2, 12))
    scores[:, [1, 4]] = [[1.0, 9.0], [1.0, 9.0]]
    first, second = ranked(made, scores)
    assert first.documents.tolist() == [1]
    assert second.documents.tolist() == [4, 1]
    values = per_query(made, [first, second])
    assert values["mrr_at_10"].tolist() == [1.0, 0.0]


def test_a_model_that_says_the_same_of_everything_is_no_better_than_it_should_be() -> None:
    made = collection([{i: 1} for i in range(30)], 30)
    values = per_query(made, ranked(made, np.full((30, 30), 2.5)))
    assert values["mrr_at_10"].max() == 0.0
    assert chance(made)["mrr_at_10"].mean() > 0.0


def test_cut_offs_larger_than_the_collection_are_not_reported() -> None:
    for documents, names in ((9, 0), (10, 2), (99, 2), (100, 3), (999, 3), (1000, 4)):
        made = collection([{0: 1}], documents)
        assert len(per_query(made, ranked(made, np.ones((1, documents)), block=documents))) == names
        assert len(chance(made)) == names
    assert estimates({}) == dict.fromkeys(MEASURES)


def test_agrees_with_the_ranks_that_training_reports() -> None:
    from headscale.ranking import rank_metrics

    generator = torch.Generator().manual_seed(3)
    queries, documents = (torch.rand(40, 23, generator=generator).round(decimals=1) + 0.1 for _ in range(2))
    made = collection([{i: 1} for i in range(40)], 40)
    scores = queries.double() @ documents.double().T
    ours = per_query(made, ranked(made, scores.numpy()))["mrr_at_10"].mean()
    theirs = rank_metrics(queries.double(), documents.double()).mrr_at_10
    assert ours == pytest.approx(theirs, abs=1e-12)


# --- chance and intervals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grades", "absent", "candidates"), [([1], [], 1001), ([3, 1], [2], 110), ([2, 1, 1], [], 13), ([1], [1], 10)]
)
def test_chance_is_the_mean_over_all_orders(grades: list[int], absent: list[int], candidates: int) -> None:
    """Only the places of the relevant documents matter: all of them are tried."""
    totals, count = Counter[str](), 0
    for places in itertools.permutations(range(candidates), len(grades)):
        order = dict(zip(places, grades, strict=True))
        count += 1
        for name, kind, cutoff in CUTOFFS:
            if places and min(places) >= cutoff:
                continue
            totals[name] += measure(kind, cutoff, list(range(min(cutoff, candidates))), order, tuple(absent))
    expected = expected_at_random(grades, absent, candidates)
    for name, _, cutoff in CUTOFFS:
        if cutoff <= candidates:
            assert expected[name] == pytest.approx(totals[name] / count, rel=1e-9), name


def test_chance_agrees_with_training_where_one_document_is_relevant() -> None:
    from headscale.ranking import chance_mrr

    made = collection([{i: 1} for i in range(50)], 50)
    assert chance(made)["mrr_at_10"] == pytest.approx(np.full(50, chance_mrr(50)))
    own = replace(made, own=(49, *made.own[1:]))
    assert chance(own)["mrr_at_10"][0] == pytest.approx(chance_mrr(49))


def test_intervals_agree_with_scipy() -> None:
    """20,000 resamples each: an end's sampling error is 0.019 sd of the mean (density of the normal at 1.96), so
    that of a difference .027; four times that is allowed.
    """
    from scipy.stats import bootstrap

    values = np.random.default_rng(4).beta(0.4, 0.8, 60)
    found = estimate(values, resamples=20_000, seed=1)
    theirs = bootstrap(
        (values,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(9)
    ).confidence_interval
    allowed = 4 * 0.027 * values.std() / math.sqrt(60)
    assert found.value == pytest.approx(values.mean())
    assert found.query_sd == pytest.approx(values.std(ddof=1))
    assert found.low == pytest.approx(theirs.low, abs=allowed)
    assert found.high == pytest.approx(theirs.high, abs=allowed)


def test_intervals_are_seeded_paired_and_absent_below_two_queries() -> None:
    values = np.random.default_rng(5).random(30)
    assert estimate(values, seed=3) == estimate(values, seed=3)
    assert estimate(values, seed=3) != estimate(values, seed=4)
    other = estimate(values + 0.25, seed=3)  # the same queries are drawn, so the ends move with the mean
    assert other.low == pytest.approx(estimate(values, seed=3).low + 0.25)
    assert estimate(values[:1]).low is None
    assert estimate(values[:1]).query_sd is None


# --- TREC runs ----------------------------------------------------------------------------------------------------


def test_runs_parse_back_to_the_same_values(tmp_path: Path) -> None:
    source = np.random.default_rng(6)
    grades = [{int(d): int(source.integers(1, 3)) for d in source.choice(1200, 9, replace=False)} for _ in range(5)]
    made = collection(grades, 1200)
    scores = np.round(source.random((5, 1200)), 2)  # many ties
    scores[4] = 7.0
    rankings = ranked(made, scores, block=500)
    write_run(tmp_path / "new" / "model.trec", made, rankings, "a model")
    run_file = list(ir_measures.read_trec_run(str(tmp_path / "new" / "model.trec")))
    for name, values in per_query(made, rankings).items():
        kind = ir_measures.parse_measure(MEASURES[name][0])
        again = {m.query_id: m.value for m in ir_measures.iter_calc([kind], made.qrels, run_file)}
        assert [again[query] for query in made.query_ids] == values.tolist(), name
    first = (tmp_path / "new" / "model.trec").read_text().splitlines()[0].split(" ")
    assert first[:2] == ["q0", "Q0"]
    assert first[3] == "1"
    assert first[5] == "a-model"


def test_scores_are_parted_in_single_precision_and_hardly_moved() -> None:
    scores = np.array([np.inf, np.inf, 3.0, 3.0, 3.0, 3.0 - 1e-12, 1e-3, 1e-3, 0.0, 0.0])
    parted = untied(scores)
    assert all(a > b for a, b in itertools.pairwise(np.array(parted, dtype=np.float32)))
    assert parted[2:] == pytest.approx(scores[2:], rel=1e-6, abs=1e-40)


def test_a_run_that_cannot_be_finished_leaves_the_old_one(tmp_path: Path) -> None:
    made = collection([{0: 1}, {1: 1}], 12)
    rankings = ranked(made, np.ones((2, 12)))
    write_run(tmp_path / "model.trec", made, rankings, "old")
    before = (tmp_path / "model.trec").read_bytes()
    with pytest.raises(ValueError, match="zip"):
        write_run(tmp_path / "model.trec", made, rankings[:1], "new")
    assert (tmp_path / "model.trec").read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["model.trec"]
    with pytest.raises(HeadscaleError, match="cannot be written"):
        write_run(tmp_path / "model.trec" / "below", made, rankings, "new")


# --- search -------------------------------------------------------------------------------------------------------


@dataclass
class FakeHead:
    vocab_size: int


class FakeEncoder:
    """Representations by text; more than `fits` texts at once are too many."""

    def __init__(self, reps: dict[str, Any], fits: int = 10**6) -> None:
        self.reps, self.fits, self.batches = reps, fits, []
        self.head = FakeHead(len(next(iter(reps.values()))))

    def encode(self, texts: Any, *, max_length: int, batch_size: int) -> Any:
        if len(texts) > self.fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.batches.append(len(texts))
        return torch.stack([self.reps[text] for text in texts])


def sparse_reps(made: Collection, terms: int, share: float, seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    texts = [*made.queries, *made.documents]
    reps = torch.rand(len(texts), terms, generator=generator)
    reps = reps * (torch.rand(reps.shape, generator=generator) < share)
    return dict(zip(texts, reps, strict=True))


@pytest.mark.parametrize("share", [0.02, 0.1, 0.6])
def test_the_search_is_the_dense_product(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "_BLOCK_ENTRIES", 500)
    made = collection([{i: 1, i + 30: 2} for i in range(25)], 200)
    reps = sparse_reps(made, 97, share)
    found = search.search(FakeEncoder(reps), made, query_length=8, document_length=8, batch_size=16)
    dense = (torch.stack([reps[q] for q in made.queries]).double()) @ (
        torch.stack([reps[d] for d in made.documents]).double().T
    )
    for i, one in enumerate(found.rankings):
        expected = sorted((d for d in range(200) if dense[i, d] > 0), key=lambda d, i=i: -dense[i, d])
        assert one.documents.tolist() == expected
        assert one.scores == pytest.approx(dense[i, expected].numpy(), rel=1e-12)


@pytest.mark.parametrize("share", [0.01, 0.15, 0.17, 1.0])
def test_products_agree_on_both_sides_of_the_switch(share: float) -> None:
    from scipy.sparse import random_array

    source = np.random.default_rng(7)
    left, right = (random_array((n, 300), density=share, format="csr", rng=source) for n in (21, 34))
    expected = left.toarray() @ right.toarray().T
    assert search.products(left, right) == pytest.approx(expected, rel=1e-12, abs=1e-15)


def test_infinite_weights_meet_no_zeros() -> None:
    from scipy.sparse import csr_array

    left, right = csr_array([[1.0, 0.0], [1.0, 1.0]]), csr_array([[2.0, np.inf], [1.0, 1.0]])
    assert search.products(left, right).tolist() == [[2.0, 1.0], [np.inf, 2.0]]


def test_a_full_gpu_halves_the_batches_and_changes_nothing() -> None:
    made = collection([{i: 1} for i in range(10)], 50)
    reps = sparse_reps(made, 40, 0.3)
    steps: list[tuple[int, int]] = []
    whole = search.search(FakeEncoder(reps), made, query_length=8, document_length=8, batch_size=32)
    tight = FakeEncoder(reps, fits=5)
    parts = search.search(
        tight, made, query_length=8, document_length=8, batch_size=32, on_batch=lambda *step: steps.append(step)
    )
    assert max(tight.batches) <= 5
    assert steps[-1] == (60, 60)
    assert [a.documents.tolist() for a in parts.rankings] == [b.documents.tolist() for b in whole.rankings]
    with pytest.raises(MemoryForecastError, match="one text of 8 tokens"):
        search.search(FakeEncoder(reps, fits=0), made, query_length=8, document_length=8)


def test_queries_that_will_not_fit_are_refused_before_the_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    from headscale import memory

    made = collection([{i: 1} for i in range(10)], 50)
    encoder = FakeEncoder(sparse_reps(made, 40, 0.3))
    monkeypatch.setattr(memory, "available_memory", lambda: 1000)
    with pytest.raises(MemoryForecastError, match="10 queries"):
        search.search(encoder, made, query_length=8, document_length=8)
    assert sum(encoder.batches) == 10


def test_sparsity_agrees_with_what_training_reports() -> None:
    from headscale.objective import flops_cost
    from headscale.observation import side_statistics

    made = collection([{i: 1} for i in range(30)], 80)
    reps = sparse_reps(made, 60, 0.2)
    reps[made.documents[3]] = torch.zeros(60)
    found = search.search(FakeEncoder(reps), made, query_length=8, document_length=8, batch_size=7)
    sides = [torch.stack([reps[text] for text in texts]) for texts in (made.queries, made.documents)]
    for tally, side in zip((found.queries, found.documents), sides, strict=True):
        ours, theirs = tally.sparsity(), side_statistics(side)
        for name in ("active_dims", "empty", "max_weight", "flops_reg"):
            assert getattr(ours, name) == pytest.approx(theirs[name].item(), rel=1e-6), name
        assert ours.active_dims_p50 == np.percentile((side > 0).sum(1), 50)
        assert ours.non_finite == 0
    assert search.flops_cost(found.queries, found.documents) == pytest.approx(flops_cost(*sides).item(), rel=1e-6)


def test_weights_that_are_not_finite_are_counted_by_text() -> None:
    made = collection([{0: 1}, {1: 1}], 20)
    reps = sparse_reps(made, 40, 0.5)
    reps[made.documents[4]][[1, 2]] = float("nan")
    reps[made.documents[6]][3] = float("inf")
    found = search.search(FakeEncoder(reps), made, query_length=8, document_length=8)
    assert found.documents.sparsity().non_finite == 2
    assert found.queries.sparsity().non_finite == 0


def test_a_real_model_is_searched_by_its_own_representations(tmp_path: Path) -> None:
    from headscale.backbone import load_backbone
    from headscale.encoder import SpladeEncoder

    backbone = load_backbone(tiny_checkpoint("bert", tmp_path / "model"))
    made = words(40, 8)
    encoder = SpladeEncoder(backbone.loaded, backbone.tokenizer)
    found = search.search(encoder, made, query_length=16, document_length=16, batch_size=5)
    queries, documents = (encoder.encode(t, max_length=16).double() for t in (made.queries, made.documents))
    scores = (queries @ documents.T).numpy()
    for i, one in enumerate(found.rankings):
        assert one.scores == pytest.approx(scores[i, one.documents], rel=1e-5)  # batches pad differently
    assert found.documents.sparsity().active_dims == pytest.approx((documents > 0).sum(1).double().mean().item())


def words(documents: int, queries: int, seed: int = 0) -> Collection:
    """Texts over the tiny vocabulary; a query is a part of its document."""
    source = np.random.default_rng(seed)
    texts = [[f"w{n}" for n in source.integers(5, VOCAB, source.integers(4, 12))] for _ in range(documents)]
    made = collection([{i: 1} for i in range(queries)], documents)
    return replace(
        made,
        documents=tuple(map(" ".join, texts)),
        queries=tuple(" ".join(text[:3]) for text in texts[:queries]),
    )


# --- BM25 ---------------------------------------------------------------------------------------------------------


def test_bm25_is_its_formula() -> None:
    made = words(60, 20)
    made = replace(made, documents=(*made.documents[:-1], ""), queries=(*made.queries[:-2], "w5 w5 w9", "unheard of"))
    texts = [text.split() for text in made.documents]
    mean = sum(map(len, texts)) / 60
    seen = Counter(word for text in texts for word in set(text))
    found = search_bm25(made)
    for i, query in enumerate(made.queries):
        scores = {}
        for d, text in enumerate(texts):
            weights = [
                math.log(1 + (60 - seen[word] + 0.5) / (seen[word] + 0.5))
                * text.count(word)
                / (text.count(word) + 1.2 * (0.25 + 0.75 * len(text) / mean))
                for word in query.split()
                if word in text
            ]
            if weights:
                scores[d] = math.fsum(weights)
        one = found.rankings[i]
        assert set(one.documents.tolist()) == set(scores), query
        assert one.scores == pytest.approx([scores[d] for d in one.documents.tolist()], rel=1e-5)  # single precision
    distinct = [len(set(text)) for text in texts]
    assert found.documents.sparsity().active_dims == pytest.approx(sum(distinct) / 60)
    assert found.documents.sparsity().flops_reg is None
    pairs = sum(len(set(q.split()) & set(text)) for q in made.queries for text in texts)
    assert search.flops_cost(found.queries, found.documents) == pytest.approx(pairs / (20 * 60))


def test_bm25_without_any_word_retrieves_nothing() -> None:
    made = replace(words(12, 2), documents=("",) * 12)
    assert [len(one.documents) for one in search_bm25(made).rankings] == [0, 0]


# --- the verb -----------------------------------------------------------------------------------------------------


def test_the_record_survives_json(tmp_path: Path) -> None:
    from headscale.profiles import from_dict
    from headscale.records import Evaluation

    model = str(tiny_checkpoint("bert", tmp_path / "model"))
    found = evaluation.evaluate(
        model, collection=words(120, 12), setup=evaluation.Setup(16, 16, resamples=1000), runs=tmp_path / "runs"
    )
    assert [row.system for row in found.systems] == [model, "BM25", "chance"]
    assert from_dict(Evaluation, json.loads(json.dumps(found.to_dict()))) == found
    assert {file.name for file in (tmp_path / "runs").iterdir()} == {"model.trec", "bm25.trec"}
    own, bm25, random = found.systems
    assert own.recall_at_1000 is None
    assert bm25.ndcg_at_10.low <= bm25.ndcg_at_10.value <= bm25.ndcg_at_10.high
    assert bm25.mrr_at_10.value > 0.8  # a query is three words of its document
    assert random.recall_at_100.value == pytest.approx(100 / 120)
    assert random.recall_at_100.low is None
    assert (own.run, bm25.run, random.run) == ("model.trec", "bm25.trec", None)


def test_a_loaded_model_is_left_as_it_was(tmp_path: Path) -> None:
    from headscale.backbone import load_backbone

    backbone = load_backbone(tiny_checkpoint("bert", tmp_path / "model"))
    backbone.model.train()
    before = {name: value.clone() for name, value in backbone.model.state_dict().items()}
    setup = evaluation.Setup(16, 16, bm25=False, resamples=1000)
    found = evaluation.evaluate(backbone.model, backbone.tokenizer, collection=words(30, 4), setup=setup)
    assert len(found.systems) == 2
    assert backbone.model.training
    assert all(torch.equal(before[name], value) for name, value in backbone.model.state_dict().items())


def test_lengths_are_cut_to_what_the_model_takes(tmp_path: Path) -> None:
    from headscale.backbone import load_backbone

    for kind, limit in (("bert", 64), ("roberta", 64 - 2)):  # RoBERTa counts positions from its padding id on
        backbone = load_backbone(tiny_checkpoint(kind, tmp_path / kind))
        assert evaluation.longest(backbone) == limit
        made = replace(words(12, 2), documents=("w7 " * 200,) * 12)
        found = evaluation.evaluate(
            backbone.model, backbone.tokenizer, collection=made, setup=evaluation.Setup(bm25=False, resamples=1000)
        )
        assert (found.query_length, found.document_length) == (limit, limit)
        assert any(f"takes {limit} tokens" in warning for warning in found.warnings)


def test_bm25_that_will_not_fit_is_left_out_aloud(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from headscale import memory

    monkeypatch.setattr(evaluation, "_BM25_RATIO", 1e12)
    monkeypatch.setattr(memory, "available_memory", lambda: 2**40)
    model = tiny_checkpoint("bert", tmp_path / "model")
    found = evaluation.evaluate(model, collection=words(30, 4), setup=evaluation.Setup(16, 16, resamples=1000))
    assert [row.system for row in found.systems] == [str(model), "chance"]
    assert any(warning.startswith("no BM25 row") for warning in found.warnings)


# --- the command --------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A collection and a model in the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HEADSCALE_CACHE", str(tmp_path / "cache"))
    made = words(110, 10)
    corpus = [{"_id": i, "title": "", "text": t} for i, t in zip(made.document_ids, made.documents, strict=True)]
    queries = [{"_id": i, "text": t} for i, t in zip(made.query_ids, made.queries, strict=True)]
    rows = [f"{query}\t{document}\t{g}" for query, own in made.qrels.items() for document, g in own.items()]
    write(tmp_path / "data", corpus, [*queries, {"_id": "unjudged", "text": "w9"}], "\n".join(rows))
    tiny_checkpoint("bert", tmp_path / "model")
    return tmp_path


COMMAND = ["evaluate", "model", "--collection", "data", "--query-length", "16", "--document-length", "16"]


def test_the_command_prints_the_model_bm25_and_chance(folder: Path, capsys: Any) -> None:
    assert run([*COMMAND, "--device", "cpu", "-o", "out.json"]) == 0
    out, err = capsys.readouterr()
    head, *lines = [line.split("\t") for line in out.splitlines()]
    assert [line[0] for line in lines] == ["model", "BM25", "chance"]
    assert all(len(line) == len(head) for line in lines)
    table = [dict(zip(head, line, strict=True)) for line in lines]
    saved = json.loads((folder / "out.json").read_text())
    assert saved["schema"] == "headscale.evaluate/1"
    for row, system in zip(table, saved["results"][0]["systems"], strict=True):
        assert float(row["nDCG@10"]) == system["ndcg_at_10"]["value"]
        assert row["R@1000"] == ""
    assert float(table[2]["R@100"]) == pytest.approx(100 / 110)
    assert saved["results"][0]["collection"]["left_out"] == 1
    assert "1 queries have no relevant document" in err
    cell = next((folder / "headscale-runs").glob("evaluate-model-*"))
    assert {file.name for file in cell.iterdir()} == {"cell.json", "model.trec", "bm25.trec"}
    assert json.loads((cell / "cell.json").read_text())["kind"] == "evaluate"


def test_results_are_reused_aloud_and_forced(folder: Path, capsys: Any) -> None:
    assert run([*COMMAND, "--json"]) == 0
    first = json.loads(capsys.readouterr().out)
    cell = next((folder / "headscale-runs").glob("evaluate-*/cell.json"))
    stamp = cell.stat().st_mtime_ns
    assert run([*COMMAND, "--json"]) == 0
    out, err = capsys.readouterr()
    assert "reusing" in err
    assert json.loads(out)["results"] == first["results"]
    assert cell.stat().st_mtime_ns == stamp
    (cell.parent / "model.trec").unlink()  # a cell without its run is not finished
    assert run([*COMMAND, "-q"]) == 0
    assert (cell.parent / "model.trec").is_file()
    assert capsys.readouterr().err == ""
    stamp = cell.stat().st_mtime_ns
    run([*COMMAND, "--force", "-q"])
    assert cell.stat().st_mtime_ns > stamp
    with (folder / "data" / "queries.jsonl").open("a") as file:
        file.write("\n")  # nothing that is searched
    run(COMMAND)
    assert "reusing" in capsys.readouterr().err
    text = (folder / "data" / "corpus.jsonl").read_text()
    (folder / "data" / "corpus.jsonl").write_text(text.replace("w9 ", "w10 ", 1))
    run(COMMAND)
    assert "reusing" not in capsys.readouterr().err


ERRORS = [
    (["evaluate", "model", "--collection", "nowhere"], 3, "`nowhere` does not exist"),
    (["evaluate", "model", "--collection", "data", "--split", "dev"], 3, "lacks `qrels/dev.tsv`"),
    (["evaluate", "missing", "--collection", "data"], 3, "`missing`"),
    (["evaluate", "model", "--split", "dev"], 2, "`--split dev` needs `--collection DIR`"),
    (["evaluate", "model", "--collection", "data", "--resamples", "10"], 2, "--resamples"),
    (["evaluate", "model", "--collection", "data", "--device", "abacus"], 2, "`abacus`"),
]


@pytest.mark.parametrize(("command", "code", "expected"), ERRORS)
def test_errors_are_a_sentence_a_hint_and_a_code(
    folder: Path, capsys: Any, command: list[str], code: int, expected: str
) -> None:
    assert run(command) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert expected in err
    assert err.count("error: ") == 1
    assert err.count("\n\nhint: ") == 1
    assert "Traceback" not in err
    assert not list(folder.glob("headscale-runs/*/cell.json"))


def test_a_malformed_row_under_json_is_still_one_object(folder: Path, capsys: Any) -> None:
    with (folder / "data" / "corpus.jsonl").open("a") as file:
        file.write("{broken\n")
    assert run([*COMMAND, "--json"]) == 3
    error = json.loads(capsys.readouterr().out)["errors"][0]
    assert "row 111 is not a JSON object" in error["message"]


@pytest.mark.parametrize(("package", "options"), [("ir_measures", ["--no-bm25"]), ("bm25s", []), ("Stemmer", [])])
def test_a_missing_extra_is_said_before_anything_is_computed(
    folder: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, package: str, options: list[str]
) -> None:
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == package else found(name, *rest)
    )
    assert run([*COMMAND, *options]) == 3
    err = capsys.readouterr().err
    assert f"needs `{package}`, which is not installed" in err
    assert 'hint: pip install "headscale[eval]"' in err
    if package != "ir_measures":
        assert run([*COMMAND, "--no-bm25"]) == 0


def test_the_built_in_collection_is_the_default(folder: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made = words(30, 30)
    from headscale.texts import Pair

    pairs = [Pair(query, document) for query, document in zip(made.queries, made.documents, strict=True)]
    monkeypatch.setattr("headscale.texts.builtin_pairs", lambda split, **options: pairs)
    assert run(["evaluate", "model", "--query-length", "16", "--document-length", "16", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)["results"][0]
    assert result["collection"]["name"] == "built-in"
    assert result["collection"]["documents"] == 30


def test_its_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom headscale.cli import run\nassert run(['evaluate', '--help']) == 0\n"
        "heavy = {'torch', 'transformers', 'numpy', 'scipy', 'ir_measures', 'bm25s'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


# --- a real collection --------------------------------------------------------------------------------------------


@pytest.mark.skipif(not CRANFIELD.is_dir(), reason="the Cranfield collection is not here")
def test_cranfield_with_bm25_and_the_bundled_model(tmp_path: Path) -> None:
    """All of it with BM25, 200 abstracts and the queries they answer with the model."""
    whole = read_collection(CRANFIELD)
    bm25 = per_query(whole, search_bm25(whole).rankings)
    assert 0.351 < bm25["ndcg_at_10"].mean() < 0.419  # measured: .385, and these ends of its interval
    kept = [i for i, own in enumerate(whole.relevant) if any(d < 200 for d in own)][:30]
    part = replace(
        whole,
        document_ids=whole.document_ids[:200],
        documents=whole.documents[:200],
        query_ids=tuple(whole.query_ids[i] for i in kept),
        queries=tuple(whole.queries[i] for i in kept),
        relevant=tuple({d: g for d, g in whole.relevant[i].items() if d < 200} for i in kept),
        absent=({},) * len(kept),
        own=(None,) * len(kept),
    )
    found = evaluation.evaluate("bundled:tiny-bert", collection=part, setup=evaluation.Setup(32, 64))
    own, bm25_row, random = found.systems
    assert own.document.empty < 1
    assert bm25_row.ndcg_at_10.low > own.ndcg_at_10.value  # the bundled model was never trained to rank
    assert bm25_row.recall_at_100.value > random.recall_at_100.value
