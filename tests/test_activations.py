"""Statistics of the pooled outputs against float64 NumPy on all logits, and against models that really are rescaled."""

from __future__ import annotations

import copy
import math
import random
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
from test_head import traces, with_logits
from test_stored import CAUSAL
from tiny_models import VOCAB, tiny_model, tiny_tokenizer

from headscale.activations import (
    FP16_MAX,
    Encoding,
    Observation,
    Side,
    gradient_norms,
    observe,
    only_active,
    output_statistics,
    representation,
    scale_curve,
    tokenize,
)
from headscale.errors import HeadscaleError, UnreadableError, UsageError
from headscale.head import load_head
from headscale.records import ROW_NORM_QUANTILES, LogitStatistics, OutputStatistics
from headscale.rescaling import rescale_
from headscale.texts import Pair

torch = pytest.importorskip("torch")

ENCODING = Encoding(query_length=9, document_length=24, batch_size=4)
TOKENIZER = tiny_tokenizer()


def some_pairs(count: int = 8, seed: int = 0) -> list[Pair]:
    """Pairs of random words and lengths: some empty, some that are cut."""
    source = random.Random(seed)

    def text(longest: int) -> str:
        return " ".join(f"w{source.randrange(5, VOCAB)}" for _ in range(source.randrange(0, longest)))

    return [Pair(text(14), text(40)) for _ in range(count)]


PAIRS = some_pairs()


def calmed(model: Any, level: float = 1.0) -> Any:
    """The same model with fewer logits above zero, as a pretrained one has."""
    loaded = load_head(model)
    with torch.no_grad():
        if loaded.bias is not None:
            loaded.bias.sub_(level)
    return model


def model_of(kind: str) -> Any:
    if kind == "factor":
        return with_logits(lambda x: 0.25 * x)
    if kind == "deberta-own-head":
        return calmed(tiny_model("deberta-v2", legacy=False))
    if kind == "gemma2":
        return tiny_model(kind, CAUSAL[kind], final_logit_softcapping=3.0)
    return calmed(tiny_model(kind, CAUSAL.get(kind)))


KINDS = ["bert", "modernbert", "mobilebert", "deberta-own-head", "llama", "gemma2", "factor"]

# --- the oracle: float64, all logits at once, and nothing of the package -------------------------------------------


def texts_of(pairs: list[Pair], side: str) -> list[str]:
    return [getattr(pair, side) for pair in pairs]


def all_logits(model: Any, texts: list[str], length: int) -> list[np.ndarray]:
    """(tokens, vocab) float64 logits of each text, run alone and unpadded; and what is special about each token."""
    double = copy.deepcopy(model).double().eval()
    found = []
    for text in texts:
        ids = TOKENIZER(text, truncation=True, max_length=length)["input_ids"]
        with torch.no_grad():
            found.append(double(input_ids=torch.tensor([ids])).logits[0].numpy())
    return found


def reps_of(logits: list[np.ndarray], scale: float) -> np.ndarray:
    return np.stack([np.log1p(np.maximum(scale * one.max(0), 0.0)) for one in logits])


def mean_pairwise_cosine(reps: np.ndarray) -> float | None:
    filled = [r / np.linalg.norm(r) for r in reps if np.linalg.norm(r) > 0]
    values = [a @ b for i, a in enumerate(filled) for j, b in enumerate(filled) if i != j]
    return float(np.mean(values)) if values else None


def side_oracle(logits: list[np.ndarray], scale: float) -> dict[str, Any]:
    reps = reps_of(logits, scale)
    dims = (reps > 0).sum(1)
    total = reps.sum()
    special = first = 0.0
    histogram = np.zeros(10)
    for rep, one in zip(reps, logits, strict=True):
        for term in np.flatnonzero(rep):
            place = int(one[:, term].argmax())
            special += rep[term] * (place in (0, len(one) - 1))  # <s> and </s>
            first += rep[term] * (place == 0)
            histogram[10 * place // len(one)] += rep[term]
    return {
        "texts": len(reps),
        "active_dims": dims.mean(),
        "active_dims_p5": np.percentile(dims, 5),
        "active_dims_p50": np.percentile(dims, 50),
        "active_dims_p95": np.percentile(dims, 95),
        "empty": (dims == 0).mean(),
        "mean_weight": reps.mean(),
        "active_mean_weight": reps[reps > 0].mean() if total else 0.0,
        "max_weight": reps.max(),
        "l1": reps.sum(1).mean(),
        "l2": np.linalg.norm(reps, axis=1).mean(),
        "flops_reg": (reps.mean(0) ** 2).sum(),
        "mean_cosine": mean_pairwise_cosine(reps),
        "special_share": special / (total or 1.0),
        "first_position_share": first / (total or 1.0),
        "position_histogram": tuple(histogram / (total or 1.0)),
        "weight_quantiles": weights_above_zero(reps),
    }


def weights_above_zero(reps: np.ndarray) -> tuple[float, ...]:
    active = reps[reps > 0]
    return tuple(np.quantile(active, q / 100, method="nearest") for q in ROW_NORM_QUANTILES) if len(active) else ()


def score_oracle(queries: np.ndarray, documents: np.ndarray, batch: int) -> dict[str, float]:
    found = []
    for start in range(0, len(queries), batch):
        scores = queries[start : start + batch] @ documents[start : start + batch].T
        right = np.diag(scores)
        wrong = np.array([np.delete(row, i).mean() for i, row in enumerate(scores)])
        loss = np.mean([np.log(np.exp(row - row[i]).sum()) for i, row in enumerate(scores)])
        best = [all(row[i] > other for j, other in enumerate(row) if j != i) for i, row in enumerate(scores)]
        found.append(
            {
                "score_mean": scores.mean(),
                "score_sd": scores.std(),
                "score_margin": (right - wrong).mean(),
                "score_within_sd": math.sqrt(scores.var(axis=1).mean()),
                "score_common": (scores - scores.mean(1, keepdims=True)).mean(0).var() / scores.var(axis=1).mean(),
                "loss": loss,
                "loss_over_ln_n": loss / math.log(batch),
                "batch_accuracy": np.mean(best),
                "score_max": scores.max(),
            }
        )
    mean = {key: float(np.mean([f[key] for f in found])) for key in found[0]}
    return {**mean, "score_max": max(f["score_max"] for f in found)}


def output_oracle(queries: list[np.ndarray], documents: list[np.ndarray], scale: float, batch: int) -> dict[str, Any]:
    q, d = reps_of(queries, scale), reps_of(documents, scale)
    scores = score_oracle(q, d, batch)
    share = (d > 0).mean(0)
    spacing = scores["score_mean"] * 2.0**-7
    top = sorted(range(len(share)), key=lambda i: (-share[i], i))[:10]
    return {
        "scale": scale,
        "shift": 0.0,
        "candidates": batch,
        "batches": len(q) // batch,
        "query": side_oracle(queries, scale),
        "document": side_oracle(documents, scale),
        **scores,
        "flops_cost": sum((q[:, v] > 0).mean() * (d[:, v] > 0).mean() for v in range(q.shape[1])),
        "saturation": (share >= 0.9).sum() / max(1, (share > 0).sum()),
        "coverage": (share > 0).mean(),
        "common_terms": tuple((f"t{i}", share[i]) for i in top if share[i] > 0),
        "fp16_headroom": FP16_MAX / scores["score_max"],
        "bf16_resolution": spacing / scores["score_sd"],
        "non_finite": 0,
    }


def assert_same(found: Any, expected: Any, name: str = "", tolerance: float = 2e-5) -> None:
    if isinstance(expected, dict):
        assert set(found) == set(expected), name
        for key in expected:
            assert_same(found[key], expected[key], f"{name}.{key}", tolerance)
    elif isinstance(expected, tuple | list) and expected and isinstance(expected[0], tuple):
        assert [t for t, _ in found] == [t for t, _ in expected], name
        assert_same([s for _, s in found], [s for _, s in expected], name, tolerance)
    elif expected is None or isinstance(expected, str):
        assert found == expected, name
    else:
        np.testing.assert_allclose(found, expected, rtol=tolerance, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_every_statistic_against_all_logits_in_float64(kind: str) -> None:
    model = model_of(kind)
    seen = observe(load_head(model), TOKENIZER, PAIRS, ENCODING)
    queries = all_logits(model, texts_of(PAIRS, "query"), ENCODING.query_length)
    documents = all_logits(model, texts_of(PAIRS, "document"), ENCODING.document_length)
    for scale in (1.0, 0.11, 4.0):
        expected = output_oracle(queries, documents, scale, ENCODING.batch_size)
        assert_same(asdict(output_statistics(seen, scale, token=lambda i: f"t{i}")), expected)
    assert 0 < expected["document"]["active_dims"] < VOCAB
    assert 0 < expected["document"]["special_share"] < 1


def test_logits_of_single_positions() -> None:
    model = model_of("factor")
    pairs = some_pairs(8, seed=3)
    encoding = Encoding(8, 12, 4)  # few enough tokens that none is left out of the sample
    found = observe(load_head(model), TOKENIZER, pairs, encoding).logits
    parts = [("query", 8), ("document", 12)]
    logits = np.concatenate([one for side, n in parts for one in all_logits(model, texts_of(pairs, side), n)])
    features = hidden(model, [(texts_of(pairs, side), n) for side, n in parts])
    units = features / np.linalg.norm(features, axis=1, keepdims=True)
    cosines = [a @ b for i, a in enumerate(units) for j, b in enumerate(units) if i != j]
    expected = {
        "mean": logits.mean(),
        "sd": logits.std(),
        "quantiles": [np.quantile(logits, q / 100, method="nearest") for q in ROW_NORM_QUANTILES],
        "above_zero": (logits > 0).mean(),
        "hidden_cosine": np.mean(cosines),
        "hidden_norm": np.linalg.norm(features, axis=1).mean(),
        "tokens": len(logits),
    }
    assert_same(asdict(found), expected)
    assert isinstance(found, LogitStatistics)


def hidden(model: Any, sides: list[tuple[list[str], int]]) -> np.ndarray:
    """(tokens, width) what the head's norm puts out, by a hook of our own."""
    seen: list[Any] = []
    handle = model.cls.predictions.transform.LayerNorm.register_forward_hook(lambda _m, _i, out: seen.append(out[0]))
    with torch.no_grad():
        for texts, length in sides:
            for text in texts:
                model(input_ids=torch.tensor([TOKENIZER(text, truncation=True, max_length=length)["input_ids"]]))
    handle.remove()
    return torch.cat(seen).double().numpy()


def test_a_sample_is_spread_over_all_batches() -> None:
    pairs = some_pairs(40, seed=5)
    found = observe(load_head(model_of("bert")), TOKENIZER, pairs, Encoding(9, 24, 4)).logits
    assert 200 <= found.tokens <= 2 * 256


# --- every constant from one pass ----------------------------------------------------------------------------------


def shifted(model: Any, shift: float) -> Any:
    with torch.no_grad():
        load_head(model).bias.add_(shift)
    return model


@pytest.mark.parametrize("shift", [0.0, -0.6, 0.4])
@pytest.mark.parametrize("scale_bias", [True, False])
@pytest.mark.parametrize("kind", ["bert", "modernbert", "mobilebert"])
def test_one_pass_says_what_rescaled_models_put_out(kind: str, scale_bias: bool, shift: float) -> None:
    model = model_of(kind)
    seen = observe(load_head(model), TOKENIZER, PAIRS, ENCODING)
    scales = (0.06, 1.0, 3.0)
    curve = scale_curve(seen, scales, scale_bias=scale_bias, shift=shift)
    for i, scale in enumerate(scales):
        if scale_bias:  # a (m + shift)
            changed = shifted(copy.deepcopy(model), shift)
            rescale_(changed, scale, mode="untie")
        else:  # a (m - b + shift) + b
            changed = copy.deepcopy(model)
            rescale_(changed, scale, mode="untie", scale_bias=False)
            shifted(changed, scale * shift)
        again = output_statistics(observe(load_head(changed), TOKENIZER, PAIRS, ENCODING))
        predicted = output_statistics(seen, scale, scale_bias=scale_bias, shift=shift)
        same = replace(predicted, scale=1.0, shift=0.0, common_terms=again.common_terms)
        assert_same(asdict(same), asdict(again), tolerance=2e-4)
        assert_same({k: v[i] for k, v in asdict(curve).items()}, {"scale": scale, **on_the_curve(predicted)})


def on_the_curve(output: OutputStatistics) -> dict[str, Any]:
    document = output.document
    return {
        "loss_over_ln_n": output.loss_over_ln_n,
        "mean_weight": document.mean_weight,
        "l1": document.l1,
        "active_mean_weight": document.active_mean_weight,
        "active_dims": document.active_dims,
        "cosine": document.mean_cosine,
        "score_sd": output.score_sd,
        "score_margin": output.score_margin,
        "flops_reg_query": output.query.flops_reg,
        "flops_reg_document": document.flops_reg,
    }


def test_a_kept_bias_counts_as_the_factor_makes_it() -> None:
    """Where forward multiplies the logits, so it does the bias: scaling the matrix alone spares factor x bias."""
    model = with_logits(lambda x: 0.25 * x)
    seen = observe(load_head(model), TOKENIZER, PAIRS, ENCODING)
    changed = copy.deepcopy(model)
    rescale_(changed, 0.1, mode="untie", scale_bias=False)
    again = output_statistics(observe(load_head(changed), TOKENIZER, PAIRS, ENCODING))
    predicted = output_statistics(seen, 0.1, scale_bias=False)
    assert_same(asdict(replace(predicted, scale=1.0, common_terms=again.common_terms)), asdict(again), tolerance=2e-4)


@pytest.mark.parametrize("shift", [0.0, -2.0, 0.5])
def test_leaving_out_sleeping_terms_changes_nothing(shift: float) -> None:
    model = calmed(model_of("bert"), 4.0)
    seen = observe(load_head(model), TOKENIZER, PAIRS, ENCODING)
    narrow = only_active(seen, shift)
    awake = ((seen.query.largest + shift > 0).any(0) | (seen.document.largest + shift > 0).any(0)).sum()
    if shift < 0.5:
        assert narrow.query.largest.shape[1] == awake < VOCAB // 2
    scales = (0.01, 1.0, 16.0)
    whole = [output_statistics(seen, a, shift=shift) for a in scales]
    curve = asdict(scale_curve(seen, scales, shift=shift))
    for i, output in enumerate(whole):
        assert_same({k: v[i] for k, v in curve.items()}, {"scale": scales[i], **on_the_curve(output)}, tolerance=1e-6)


def test_a_positive_factor_wakes_nothing() -> None:
    seen = observe(load_head(model_of("bert")), TOKENIZER, PAIRS, ENCODING)
    curve = scale_curve(seen, (1e-6, 1.0, 1e4))
    assert len(set(curve.active_dims)) == 1


# --- by hand -------------------------------------------------------------------------------------------------------


def by_hand(queries: list[list[float]], documents: list[list[float]], batch: int = 2) -> Observation:
    """An observation of given largest logits, each won by the text's first of three positions, which is special."""

    def side(rows: list[list[float]]) -> Side:
        largest = torch.tensor(rows)
        special = torch.tensor([[True, False, False]] * len(rows))
        zeros = torch.zeros_like(largest, dtype=torch.int16)
        return Side(largest, zeros, special, torch.full((len(rows),), 3))

    empty = LogitStatistics(0.0, 1.0, (), 0.0, 0.0, 1.0, 1)
    return Observation(side(queries), side(documents), None, empty, batch)


def test_all_logits_negative() -> None:
    output = output_statistics(by_hand([[-1.0, -2.0]] * 2, [[-3.0, -0.5]] * 2))
    for side in (output.query, output.document):
        assert (side.empty, side.active_dims, side.active_mean_weight, side.max_weight) == (1.0, 0.0, 0.0, 0.0)
        assert side.mean_cosine is None
        assert side.position_histogram == (0.0,) * 10
    assert output.loss == pytest.approx(math.log(2))
    assert (output.common_terms, output.coverage, output.saturation, output.flops_cost) == ((), 0.0, 0.0, 0.0)
    assert (output.fp16_headroom, output.bf16_resolution) == (math.inf, math.inf)
    curve = scale_curve(by_hand([[-1.0, -2.0]] * 2, [[-3.0, -0.5]] * 2), (0.5, 2.0))
    assert curve.l1 == (0.0, 0.0)
    assert curve.cosine == (None, None)
    assert curve.loss_over_ln_n == pytest.approx((1.0, 1.0))


def test_one_active_term() -> None:
    e = math.e - 1.0  # log1p gives exactly 1
    output = output_statistics(by_hand([[e, -1.0], [-1.0, -1.0]], [[e, -1.0], [-1.0, -1.0]]), token="ab".__getitem__)
    assert output.document.empty == 0.5
    assert output.document.active_dims == 0.5
    assert output.document.active_mean_weight == pytest.approx(1.0)
    assert output.document.mean_weight == pytest.approx(0.25)
    assert output.document.mean_cosine is None  # one text that is not empty has nobody to be compared with
    assert output.document.special_share == output.document.first_position_share == pytest.approx(1.0)
    assert output.common_terms == (("a", 0.5),)
    assert output.flops_cost == pytest.approx(0.25)
    assert output.score_max == pytest.approx(1.0)
    loss = (math.log(math.e + 1.0) - 1.0 + math.log(2.0)) / 2.0
    assert output.loss == pytest.approx(loss)
    assert output.batch_accuracy == 0.5  # a tie counts against


def test_overflow_is_counted_and_forecast() -> None:
    output = output_statistics(by_hand([[math.inf, 1.0], [1.0, 1.0]], [[1e30, 1.0], [1.0, 1.0]]))
    assert output.non_finite == 1
    big = 1e38
    output = output_statistics(by_hand([[big] * 9] * 2, [[big] * 9] * 2))
    score = 9 * math.log1p(big) ** 2
    assert output.fp16_headroom == pytest.approx(FP16_MAX / score, rel=1e-5)
    assert output.score_sd < 1e-6 * score  # all the same, but for rounding
    assert output.bf16_resolution > 1e4
    assert output.saturation == 1.0


def test_a_text_without_tokens_is_empty_at_any_policy() -> None:
    largest = torch.tensor([[-math.inf, -math.inf], [1.0, -1.0]])
    bias = torch.tensor([3.0, -3.0])
    assert torch.equal(representation(largest, 0.5)[0], torch.zeros(2))
    assert torch.equal(representation(largest, 0.5, shift=2.0, kept_bias=bias)[0], torch.zeros(2))
    kept = representation(largest, 0.5, shift=2.0, kept_bias=bias)[1]
    torch.testing.assert_close(kept, torch.log1p(torch.tensor([0.5 * (1 - 3 + 2) + 3, 0.0])))


# --- what the numbers must not depend on ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bert", "modernbert", "llama"])
def test_neither_padding_nor_order_matters(kind: str) -> None:
    loaded = load_head(model_of(kind))
    base = observe(loaded, TOKENIZER, PAIRS, ENCODING)
    order = [3, 1, 0, 2, 6, 7, 5, 4]  # within the batches
    other = observe(loaded, TOKENIZER, [PAIRS[i] for i in order], ENCODING)
    torch.testing.assert_close(other.document.largest, base.document.largest[order], rtol=1e-4, atol=1e-4)
    found, expected = (output_statistics(o, token=str) for o in (other, base))
    assert_same(asdict(replace(found, common_terms=())), asdict(replace(expected, common_terms=())), tolerance=1e-4)
    alone = observe(loaded, TOKENIZER, [PAIRS[0], PAIRS[0]], Encoding(9, 24, 2))  # nothing is padded here
    torch.testing.assert_close(alone.query.largest[0], base.query.largest[0], rtol=1e-4, atol=1e-4)


def test_an_incomplete_batch_is_left_out() -> None:
    loaded = load_head(model_of("bert"))
    short, exact = (observe(loaded, TOKENIZER, PAIRS[:n], ENCODING) for n in (7, 4))
    assert torch.equal(short.query.largest, exact.query.largest)
    assert (short.logits, output_statistics(short).batches) == (exact.logits, 1)


def test_progress_is_told() -> None:
    told: list[tuple[int, int]] = []
    observe(load_head(model_of("bert")), TOKENIZER, PAIRS, ENCODING, on_batch=lambda i, n: told.append((i, n)))
    assert told == [(1, 2), (2, 2)]


# --- tokenizers ----------------------------------------------------------------------------------------------------


def plain_tokenizer(**options: Any) -> Any:
    """One that adds no special tokens: an empty text has no tokens at all."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<unk>": 0, "<pad>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, VOCAB)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>", **options)


def test_left_padding_and_no_padding_token_are_borrowed_for_a_moment() -> None:
    model = model_of("llama")
    tokenizer = plain_tokenizer(padding_side="left")
    assert tokenizer.pad_token is None
    state = tokenizer.backend_tokenizer.to_str()
    seen = observe(load_head(model), tokenizer, PAIRS, ENCODING)
    assert (tokenizer.pad_token, tokenizer.padding_side) == (None, "left")
    assert tokenizer.backend_tokenizer.to_str() == state
    right = plain_tokenizer(pad_token="<pad>")
    expected = observe(load_head(model), right, PAIRS, ENCODING)
    assert torch.equal(seen.document.largest, expected.document.largest)
    assert torch.equal(seen.document.positions, expected.document.positions)


@pytest.mark.parametrize("truncated", [True, False])
def test_a_tokenizer_keeps_its_own_truncation_and_padding(truncated: bool) -> None:
    tokenizer = tiny_tokenizer()
    if truncated:
        tokenizer.backend_tokenizer.enable_truncation(max_length=7, stride=2)
        tokenizer.backend_tokenizer.enable_padding(length=11)
    state = tokenizer.backend_tokenizer.to_str()
    batch, special = tokenize(tokenizer, ["w5 w6 w7 w8 w9", "w5"], 6, "cpu")
    assert batch["input_ids"].shape == (2, 6)
    assert special.tolist() == [[True, False, False, False, False, True], [True, False, True, False, False, False]]
    assert tokenizer.backend_tokenizer.to_str() == state


def test_empty_texts_among_others_without_special_tokens() -> None:
    model = model_of("bert")
    pairs = [Pair("", "w9 w8"), Pair("w7", ""), Pair("", "w30"), Pair("w5 w6", "w40 w41 w42")]
    seen = observe(load_head(model), plain_tokenizer(pad_token="<pad>"), pairs, Encoding(9, 24, 2))
    assert torch.isneginf(seen.query.largest[[0, 2]]).all()
    assert torch.isneginf(seen.document.largest[1]).all()
    output = output_statistics(seen)
    assert (output.query.empty, output.document.empty, output.non_finite) == (0.5, 0.25, 0)
    assert math.isfinite(output.loss)
    assert sum(output.document.position_histogram) == pytest.approx(1.0)


def test_a_batch_of_empty_texts_without_special_tokens() -> None:
    tokenizer, loaded = plain_tokenizer(pad_token="<pad>"), load_head(model_of("bert"))
    seen = observe(loaded, tokenizer, [Pair("", "w9"), Pair("", "w10")], Encoding(9, 24, 2))
    assert output_statistics(seen).query.empty == 1.0
    with pytest.raises(UnreadableError, match="no tokens at all"):
        observe(loaded, tokenizer, [Pair("", "")] * 2, Encoding(9, 24, 2))
    assert gradient_norms(loaded, tokenizer, [Pair("", "w9"), Pair("", "w10")], Encoding(9, 24, 2)).head == 0.0


@pytest.mark.parametrize("kind", ["modernbert", "distilbert"])
def test_tensors_that_the_model_does_not_take(kind: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    loaded = load_head(model_of(kind))
    found, expected = (observe(loaded, t, PAIRS, ENCODING) for t in (tokenizer, TOKENIZER))
    assert torch.equal(found.document.largest, expected.document.largest)


def test_texts_longer_than_the_model_takes() -> None:
    loaded = load_head(tiny_model("bert"))  # 64 positions
    pairs = [Pair("w5", "w6 " * 90)] * 2
    tokenizer = tiny_tokenizer()
    with pytest.raises(HeadscaleError, match="texts of 80 tokens are longer than the 64") as error:
        observe(loaded, tokenizer, pairs, Encoding(9, 80, 2))
    assert "--document-length" in error.value.hint
    tokenizer.model_max_length = 10**30  # what a tokenizer says that does not know
    with pytest.raises(HeadscaleError, match="cannot take these tokens") as error:
        observe(loaded, tokenizer, pairs, Encoding(9, 80, 2))
    assert error.value.exit_code == 3


def test_a_tokenizer_of_another_model() -> None:
    with pytest.raises(HeadscaleError, match="cannot take these tokens") as error:
        observe(load_head(tiny_model("bert", vocab_size=50)), TOKENIZER, PAIRS, ENCODING)
    assert "tokenizer belongs to the model" in error.value.hint


@pytest.mark.parametrize(("pairs", "batch", "message"), [(3, 4, "fewer than one batch of 4"), (8, 1, "a batch of 1")])
def test_batches_that_cannot_be(pairs: int, batch: int, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        observe(load_head(model_of("bert")), TOKENIZER, PAIRS[:pairs], Encoding(9, 24, batch))


# --- gradients -----------------------------------------------------------------------------------------------------


def plain_loss(model: Any, pairs: list[Pair], encoding: Encoding) -> Any:
    """The contrastive loss of the first batch through all logits."""
    sides = []
    for side, length in (("query", encoding.query_length), ("document", encoding.document_length)):
        texts = texts_of(pairs[: encoding.batch_size], side)
        batch = TOKENIZER(texts, truncation=True, max_length=length, padding=True, return_tensors="pt")
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        hidden_away = logits.masked_fill(batch["attention_mask"][:, :, None] == 0, -torch.inf)
        sides.append(torch.log1p(torch.relu(hidden_away.amax(1))))
    scores = sides[0] @ sides[1].T
    return -torch.log_softmax(scores, dim=1).diagonal().mean()


@pytest.mark.parametrize("kind", ["bert", "modernbert", "mobilebert", "llama", "gemma2", "factor"])
def test_gradient_norms_against_autograd_on_an_untied_copy(kind: str) -> None:
    model = model_of(kind)
    found = gradient_norms(load_head(model), TOKENIZER, PAIRS, ENCODING)
    double = copy.deepcopy(model).double().eval()
    if kind == "gemma2":  # softcapped, so that nothing rescales it
        double.lm_head.weight = torch.nn.Parameter(double.lm_head.weight.detach().clone())
    else:
        rescale_(double, 1.0, mode="untie")
    head = load_head(double).head
    assert head.tied_to is None
    plain_loss(double, PAIRS, ENCODING).backward()
    own = {*head.matrix, head.bias}
    squares = {n: float(p.grad.square().sum()) for n, p in double.named_parameters() if p.grad is not None}
    expected_head = math.sqrt(sum(v for n, v in squares.items() if n in own))
    expected_encoder = math.sqrt(sum(v for n, v in squares.items() if n not in own))
    assert found.head == pytest.approx(expected_head, rel=1e-4)
    assert found.encoder == pytest.approx(expected_encoder, rel=1e-4)
    assert expected_encoder > 0


# --- nothing is disturbed ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bert", "modernbert", "factor"])
def test_a_model_and_its_tokenizer_are_left_as_they_were(kind: str) -> None:
    model = model_of(kind).train()
    tokenizer = tiny_tokenizer()
    first = next(model.parameters())
    first.requires_grad_(False)
    other = next(p for p in model.parameters() if p.requires_grad)
    other.grad = torch.ones_like(other)
    state = copy.deepcopy(model.state_dict())
    text, before = tokenizer.backend_tokenizer.to_str(), traces(model)
    loaded = load_head(model)
    observe(loaded, tokenizer, PAIRS, ENCODING)
    gradient_norms(loaded, tokenizer, PAIRS, ENCODING)
    after = traces(model)
    gradients = (before.pop("gradients"), after.pop("gradients"))
    assert after == before
    for name, gradient in gradients[0].items():
        assert (gradient is None) == (gradients[1][name] is None)
        assert gradient is None or torch.equal(gradient, gradients[1][name])
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert tokenizer.backend_tokenizer.to_str() == text


def test_dropout_does_not_reach_the_measurement() -> None:
    model = model_of("bert")
    loaded = load_head(model)
    quiet = observe(loaded, TOKENIZER, PAIRS, ENCODING), gradient_norms(loaded, TOKENIZER, PAIRS, ENCODING)
    model.train()
    noisy = observe(loaded, TOKENIZER, PAIRS, ENCODING), gradient_norms(loaded, TOKENIZER, PAIRS, ENCODING)
    assert torch.equal(quiet[0].document.largest, noisy[0].document.largest)
    assert quiet[1] == noisy[1]


def test_a_model_of_nans_is_refused() -> None:
    model = model_of("bert")
    loaded = load_head(model)
    with torch.no_grad():
        loaded.weight[9] = math.nan
    with pytest.raises(UnreadableError, match=r"puts out \d+ logits that are not numbers"):
        observe(loaded, TOKENIZER, [Pair("w8", "w7")] * 2, Encoding(9, 24, 2))
    with pytest.raises(UnreadableError):
        load_head(model)


@pytest.mark.parametrize("side", ["query", "document"])
def test_nans_of_one_side_are_refused(side: str) -> None:
    model = tiny_model("bert", tie_word_embeddings=False)
    loaded = load_head(model)
    with torch.no_grad():
        model.get_input_embeddings().weight[77] = math.nan
    pair = Pair("w77", "w5") if side == "query" else Pair("w5", "w77")
    with pytest.raises(UnreadableError, match="logits that are not numbers"):
        observe(loaded, TOKENIZER, [pair] * 2, Encoding(9, 24, 2))
    fine = observe(loaded, TOKENIZER, [Pair("w5", "w6")] * 2, Encoding(9, 24, 2))
    assert output_statistics(fine).non_finite == 0
