"""The head of a loaded model: its own logits are rebuilt from what was found, and nothing is disturbed by looking."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from test_stored import CAUSAL, TYPES
from tiny_models import VOCAB, tiny_batch, tiny_model

from headscale.errors import NoHeadError, UnsupportedHeadError
from headscale.head import LoadedHead, accepted, find_head, load_head

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

CASES = [*((t, {}) for t in TYPES), ("deberta", {"legacy": False}), ("deberta-v2", {"legacy": False})]
SOFTCAPPED = {"gemma2"}
NO_NORM = {"neomme", "ultrabert", "ultravbert"}


def built(case: tuple[str, dict[str, Any]], **overrides: Any) -> Any:
    model_type, options = case
    return tiny_model(model_type, CAUSAL.get(model_type), **{**options, **overrides})


def run(model: Any) -> Any:
    with torch.no_grad():
        return model(**accepted(model, tiny_batch())).logits


def rebuilt(loaded: LoadedHead, features: Any) -> Any:
    """Logits in float64 from the parts that were found."""
    logits = features.double() @ loaded.weight.double().T
    if loaded.bias is not None:
        logits = logits + loaded.bias.double()
    logits = loaded.head.factor * logits
    cap = loaded.head.softcap
    return logits if cap is None else cap * torch.tanh(logits / cap)


def relative(found: Any, expected: Any) -> float:
    return float(((found - expected).abs().max() / expected.abs().max()).detach())


def names(cases: list[tuple[str, dict[str, Any]]]) -> list[str]:
    return ["-".join([t, *(f"{k}={v}" for k, v in o.items())]) for t, o in cases]


@pytest.mark.parametrize("case", CASES, ids=names(CASES))
def test_the_parts_rebuild_the_logits_of_every_type(case: tuple[str, dict[str, Any]]) -> None:
    model = built(case)
    loaded = load_head(model)
    with torch.no_grad():
        features = loaded.features(**tiny_batch())
    assert features.shape == (3, 16, loaded.width)
    assert loaded.weight.shape == (VOCAB, loaded.width)
    assert relative(rebuilt(loaded, features), run(model)) < 1e-5
    head = loaded.head
    assert head.factor == 1.0
    assert head.softcap == (30.0 if case[0] in SOFTCAPPED else None)
    assert (head.norm is None) == (case[0] in NO_NORM)


@pytest.mark.parametrize("case", CASES, ids=names(CASES))
def test_the_bias_found_is_the_one_that_acts(case: tuple[str, dict[str, Any]]) -> None:
    model = built(case)
    loaded = load_head(model)
    before = run(model)
    if loaded.bias is None:
        with torch.no_grad():  # whatever has the size of one (Reformer keeps a bias that nothing adds) is idle
            for tensor in (t for t in model.parameters() if t.numel() == VOCAB):
                tensor.add_(1.0)
        assert torch.equal(run(model), before)
        return
    change = torch.linspace(-1.0, 1.0, VOCAB)
    with torch.no_grad():
        loaded.bias.add_(change)
    assert relative(run(model), before + change) < 1e-5


@pytest.mark.parametrize("case", CASES, ids=names(CASES))
def test_the_norm_found_feeds_the_product(case: tuple[str, dict[str, Any]]) -> None:
    model = built(case)
    loaded = load_head(model)
    if loaded.head.norm is None:
        return
    with torch.no_grad():
        before = loaded.features(**tiny_batch())
        norm = model.get_submodule(loaded.head.norm)
        one_plus = loaded.head.norm_kind == "one_plus"
        norm.weight.copy_(3.0 * norm.weight + 2.0 if one_plus else 3.0 * norm.weight)
        if getattr(norm, "bias", None) is not None:
            norm.bias.mul_(3.0)
        assert relative(loaded.features(**tiny_batch()), 3.0 * before) < 1e-5


@pytest.mark.parametrize("model_type", ["bert", "xlm-roberta", "modernbert", "mobilebert", "electra", "llama"])
@pytest.mark.parametrize("tie", [True, False])
def test_what_is_tied_is_what_moves_together(model_type: str, tie: bool) -> None:
    model = tiny_model(model_type, CAUSAL.get(model_type), tie_word_embeddings=tie)
    loaded = load_head(model)
    assert (loaded.head.tied_to is not None) == tie
    embedding = model.get_input_embeddings().weight
    with torch.no_grad():
        dict(model.named_parameters(remove_duplicate=False))[loaded.head.matrix[0]][7, 0] = 123.0
    assert (float(embedding[7, 0].detach()) == 123.0) == tie


def test_features_keep_the_graph_of_the_model_itself() -> None:
    model = tiny_model("bert")
    loaded = load_head(model)
    probe = torch.randn(3, 16, VOCAB, generator=torch.Generator().manual_seed(3))
    parameters = [p for n, p in model.named_parameters() if n != loaded.head.bias]
    logits = loaded.features(**tiny_batch()) @ loaded.weight.T
    through_features = torch.autograd.grad((logits * probe).sum(), parameters, allow_unused=True)
    through_model = torch.autograd.grad((model(**tiny_batch()).logits * probe).sum(), parameters, allow_unused=True)
    for found, expected in zip(through_features, through_model, strict=True):
        assert (found is None) == (expected is None)
        if expected is not None:
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_a_layer_as_wide_as_the_vocabulary_is_not_the_head() -> None:
    model = tiny_model("bert", intermediate_size=VOCAB)
    loaded = load_head(model)
    with torch.no_grad():
        features = loaded.features(**tiny_batch())
    assert loaded.head.matrix == ("cls.predictions.decoder.weight",)
    assert relative(rebuilt(loaded, features), run(model)) < 1e-5


def test_tensors_the_model_does_not_take_are_left_out() -> None:
    model = tiny_model("distilbert")
    batch = tiny_batch()
    with torch.no_grad():
        plain = load_head(model).features(**batch)
        assert torch.equal(load_head(model).features(**batch, token_type_ids=torch.zeros(3, 16).long()), plain)


# --- logits that are more, or less, than a product -----------------------------------------------------------------


def with_logits(change: Any, model_type: str = "bert") -> Any:
    """A model whose logits are a function of the product."""
    model = tiny_model(model_type)
    original = type(model)

    class Changed(original):  # type: ignore[misc, valid-type]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.logits = change(output.logits)
            return output

    model.__class__ = Changed
    return model


@pytest.mark.parametrize("factor", [0.0625, 0.37, 8.0])
def test_a_factor_in_forward_is_found(factor: float) -> None:
    model = with_logits(lambda x: factor * x)
    loaded = load_head(model)
    assert loaded.head.factor == pytest.approx(factor, rel=1e-5)
    assert loaded.head.norm == "cls.predictions.transform.LayerNorm"
    assert loaded.head.bias == "cls.predictions.bias"
    with torch.no_grad():
        assert relative(rebuilt(loaded, loaded.features(**tiny_batch())), run(model)) < 1e-5


@pytest.mark.parametrize(
    "change", [lambda x: x**3, lambda x: x.relu(), lambda x: x + 1.0, lambda x: x - x.mean(-1, True)]
)
def test_logits_that_are_not_linear_are_refused(change: Any) -> None:
    with pytest.raises(UnsupportedHeadError, match="no factor can be found"):
        find_head(with_logits(change))


def test_a_softcap_is_named_and_its_head_still_found() -> None:
    model = tiny_model("gemma2", CAUSAL["gemma2"], final_logit_softcapping=2.5)
    head = find_head(model)
    assert (head.softcap, head.norm, head.norm_kind) == (2.5, "model.norm", "one_plus")
    assert float(run(model).abs().max()) <= 2.5


def test_models_without_the_product() -> None:
    with pytest.raises(NoHeadError, match="`BertModel` puts out no logits"):
        find_head(tiny_model("bert", "BertModel"))
    with pytest.raises(UnsupportedHeadError, match="without a product of 131 columns"):
        find_head(tiny_model("bert", "BertForSequenceClassification"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("model_type", ["bert", "modernbert"])
def test_other_dtypes(model_type: str, dtype: Any) -> None:
    model = tiny_model(model_type)
    expected = find_head(model)
    assert find_head(model.to(dtype)) == expected


# --- looking leaves no trace ---------------------------------------------------------------------------------------


def traces(model: Any) -> dict[str, Any]:
    return {
        "modes": {n: m.training for n, m in model.named_modules()},
        "hooks": {n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()},
        "trained": {n: p.requires_grad for n, p in model.named_parameters()},
        "gradients": {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()},
        "places": {n: p.data_ptr() for n, p in model.named_parameters()},
        "config": model.config.to_dict(),
        "random": torch.random.get_rng_state().tolist(),
    }


@pytest.mark.parametrize("case", CASES, ids=names(CASES))
def test_a_model_is_left_as_it_was(case: tuple[str, dict[str, Any]]) -> None:
    model = built(case).train()
    first = next(iter(model.children()))
    first.eval()  # a mixture of modes, as when layers are frozen
    for parameter in first.parameters():
        parameter.requires_grad_(False)
    state = copy.deepcopy(model.state_dict())
    before = traces(model)
    loaded = load_head(model)
    with torch.no_grad():
        loaded.features(**tiny_batch())
    torch.random.set_rng_state(torch.tensor(before["random"], dtype=torch.uint8))  # `features` runs the model as it is
    find_head(model)
    assert traces(model) == before
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_a_failed_look_leaves_no_trace_either() -> None:
    model = with_logits(lambda x: x**3).train()
    state, before = copy.deepcopy(model.state_dict()), traces(model)
    with pytest.raises(UnsupportedHeadError):
        find_head(model)
    assert traces(model) == before
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
