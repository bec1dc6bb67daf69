"""A SparseEncoder on the pooled head: the same vectors, gradients, trainings and files as on its own way."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_corpus import tiny_pairs, tiny_tokenizer
from tiny_models import VOCAB, tiny_model

from headscale.errors import UsageError
from headscale.interop.sparse_encoder import use_own_head, use_pooled_head

st = pytest.importorskip("sentence_transformers")

TEXTS = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9 w10 w11 w12", "w1 w1 w90"]


def folder_of(model_type: str, folder: Path, **options: Any) -> str:
    tiny_model(model_type, **options).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return folder_of("bert", tmp_path_factory.mktemp("bert"), hidden_dropout_prob=0.2)


def encoder_of(folder: str, **pooling: Any) -> Any:
    encoder = st.SparseEncoder(folder, device="cpu")
    for name, value in pooling.items():
        setattr(encoder[1], name, value)
    return encoder


def vectors(encoder: Any, texts: list[str] = TEXTS) -> torch.Tensor:
    found: torch.Tensor = encoder.encode(texts, convert_to_sparse_tensor=False, batch_size=3)
    return found


def assert_close(one: torch.Tensor, other: torch.Tensor, share: float = 1e-6) -> None:
    difference = float((one.float() - other.float()).abs().max() / other.abs().max())
    assert difference <= share, f"differ by {difference} of the largest"
    assert one.dtype == other.dtype


def logits_seen(encoder: Any) -> list[torch.Size]:
    """Shapes of the logits that the MLM head computes from now on."""
    seen: list[torch.Size] = []
    decoder = encoder[0].auto_model.get_output_embeddings()
    decoder.register_forward_hook(lambda _module, _inputs, output: seen.append(output.shape))
    return seen


# --- vectors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["bert", "modernbert", "mobilebert", "distilbert", "xlm-roberta"])
def test_vectors_are_those_of_the_original(model_type: str, tmp_path: Path) -> None:
    encoder = encoder_of(folder_of(model_type, tmp_path))
    expected = vectors(encoder)
    assert 0.05 < float((expected > 0).float().mean()) < 0.95
    assert_close(vectors(use_pooled_head(encoder)), expected)


@pytest.mark.parametrize("implementation", ["auto", "tiled"])
@pytest.mark.parametrize(
    "pooling",
    [
        {"activation_function": "log1p_relu"},
        {"pooling_strategy": "sum"},
        {"pooling_strategy": "sum", "activation_function": "log1p_relu", "chunk_size": 2},
        {"chunk_size": 2},
    ],
)
def test_every_setting_of_the_pooling_is_heeded(folder: str, pooling: dict[str, Any], implementation: Any) -> None:
    expected = vectors(encoder_of(folder, **pooling))
    assert not torch.equal(expected, vectors(encoder_of(folder))) or "chunk_size" in pooling
    assert_close(vectors(use_pooled_head(encoder_of(folder, **pooling), implementation=implementation)), expected)


def test_settings_changed_later_are_heeded_too(folder: str) -> None:
    encoder = use_pooled_head(encoder_of(folder))
    encoder[1].pooling_strategy = "sum"
    assert_close(vectors(encoder), vectors(encoder_of(folder, pooling_strategy="sum")))


def test_no_logits_are_computed(folder: str) -> None:
    encoder = encoder_of(folder)
    seen = logits_seen(encoder)
    vectors(encoder)
    assert [shape[2] for shape in seen] == [VOCAB, VOCAB]
    seen.clear()
    use_pooled_head(encoder)
    seen.clear()  # finding the head looks at a few
    vectors(encoder)
    encoder.train()
    encoder(encoder.preprocess(TEXTS))["sentence_embedding"].sum().backward()
    assert seen == []


def test_half_precision_keeps_its_dtype(folder: str) -> None:
    encoder = encoder_of(folder).bfloat16()
    expected = vectors(encoder)
    found = vectors(use_pooled_head(encoder))
    assert found.dtype == expected.dtype == torch.bfloat16
    assert_close(found, expected, 2**-7)


def test_texts_without_padding_between_them(folder: str) -> None:
    """What flash attention's unpadded inputs look like to the pooling."""
    encoder = encoder_of(folder)
    hidden = torch.randn(1, 9, 32, generator=torch.Generator().manual_seed(0))
    starts = torch.tensor([0, 4, 5, 9], dtype=torch.int32)
    model = encoder[0].auto_model
    logits = torch.nn.functional.linear(hidden, model.cls.predictions.decoder.weight, model.cls.predictions.bias)
    expected = encoder[1]({"token_embeddings": logits.detach(), "cu_seq_lens_q": starts})["sentence_embedding"]
    use_pooled_head(encoder)
    head = encoder[0].forward.head
    found = encoder[1]({"headscale_features": (head, hidden), "cu_seq_lens_q": starts})["sentence_embedding"]
    assert_close(found.detach(), expected)


def test_hidden_states_that_are_asked_for_are_given(folder: str) -> None:
    encoder = encoder_of(folder)
    encoder[0].auto_model.config.output_hidden_states = True
    use_pooled_head(encoder)
    features = encoder(encoder.preprocess(TEXTS))
    assert len(features["all_layer_embeddings"]) == 3
    assert_close(features["sentence_embedding"].detach(), vectors(encoder_of(folder)))


# --- training ----------------------------------------------------------------------------------------------


def splade_loss(encoder: Any) -> Any:
    from sentence_transformers.sparse_encoder import losses

    ranking = losses.SparseMultipleNegativesRankingLoss(encoder)
    return losses.SpladeLoss(encoder, ranking, document_regularizer_weight=1e-3, query_regularizer_weight=5e-5)


def gradients(encoder: Any) -> dict[str, torch.Tensor]:
    encoder.train()
    columns = [TEXTS, TEXTS[::-1]]
    torch.manual_seed(3)
    sum(splade_loss(encoder)([encoder.preprocess(c) for c in columns]).values()).backward()
    return {name: p.grad for name, p in encoder.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("pooling", [{}, {"activation_function": "log1p_relu"}, {"pooling_strategy": "sum"}])
def test_gradients_are_those_of_the_original_dropout_included(folder: str, pooling: dict[str, Any]) -> None:
    expected = gradients(encoder_of(folder, **pooling))
    found = gradients(use_pooled_head(encoder_of(folder, **pooling)))
    assert found.keys() == expected.keys()
    whole = float(torch.stack([g.norm() for g in expected.values()]).norm())
    for name, gradient in expected.items():
        assert float((found[name] - gradient).norm()) <= 1e-5 * max(float(gradient.norm()), 1e-2 * whole), name


def trained(encoder: Any, out: Path, loss: Any = splade_loss) -> tuple[dict[str, torch.Tensor], list[float]]:
    from datasets import Dataset

    pairs = tiny_pairs(24)
    rows = Dataset.from_dict({"query": [p.query for p in pairs], "document": [p.document for p in pairs]})
    arguments = st.SparseEncoderTrainingArguments(
        str(out), max_steps=4, per_device_train_batch_size=6, learning_rate=1e-3, warmup_steps=0, use_cpu=True, seed=1,
        save_strategy="no", report_to="none", disable_tqdm=True, logging_steps=1,
    )  # fmt: skip
    trainer = st.SparseEncoderTrainer(encoder, arguments, rows, loss=loss(encoder))
    trainer.train()
    return encoder.state_dict(), [log["loss"] for log in trainer.state.log_history if "loss" in log]


def cached_loss(encoder: Any) -> Any:
    from sentence_transformers.sparse_encoder import losses

    ranking = losses.SparseMultipleNegativesRankingLoss(encoder)
    return losses.CachedSpladeLoss(encoder, ranking, 1e-3, 5e-5, mini_batch_size=2)


@pytest.mark.parametrize("loss", [splade_loss, cached_loss])
def test_a_training_goes_the_same_way_and_its_result_is_an_ordinary_encoder(
    folder: str, tmp_path: Path, loss: Any
) -> None:
    plain, pooled = encoder_of(folder), use_pooled_head(encoder_of(folder))
    start = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    (expected, losses), (found, ours) = trained(plain, tmp_path / "a", loss), trained(pooled, tmp_path / "b", loss)
    assert ours == pytest.approx(losses, rel=1e-4)
    for name, tensor in expected.items():
        moved = float((tensor - start[name]).float().norm())
        assert float((found[name] - tensor).float().norm()) <= 1e-2 * moved, name  # AdamW divides near-zero gradients
    plain.save_pretrained(str(tmp_path / "plain"))
    pooled.save_pretrained(str(tmp_path / "pooled"))
    assert files(tmp_path / "plain") == files(tmp_path / "pooled")
    for name in ("modules.json", "1_SpladePooling/config.json", "sentence_bert_config.json"):
        one, other = (json.loads((tmp_path / kind / name).read_text()) for kind in ("plain", "pooled"))
        assert one == other, name
    reloaded = st.SparseEncoder(str(tmp_path / "pooled"), device="cpu")
    assert "forward" not in vars(reloaded[0]) | vars(reloaded[1])
    assert_close(vectors(reloaded), vectors(pooled))


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


# --- the encoder as an object ------------------------------------------------------------------------------


def test_it_can_be_undone_and_done_again(folder: str) -> None:
    encoder = encoder_of(folder)
    expected = vectors(encoder)
    assert use_pooled_head(encoder) is encoder
    use_pooled_head(encoder)
    assert_close(vectors(encoder), expected)
    assert use_own_head(encoder) is encoder
    seen = logits_seen(encoder)
    assert torch.equal(vectors(encoder), expected)
    assert len(seen) == 2
    assert "forward" not in vars(encoder[0]) | vars(encoder[1])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda encoder: pickle.loads(pickle.dumps(encoder))])
def test_a_copy_has_a_head_of_its_own(folder: str, copied: Any) -> None:
    encoder = use_pooled_head(encoder_of(folder))
    before = vectors(encoder)
    other = copied(encoder)
    with torch.no_grad():
        other[0].auto_model.cls.predictions.decoder.weight.mul_(0.5)
        other[0].auto_model.cls.predictions.bias.add_(0.1)
    assert torch.equal(vectors(encoder), before)
    assert not torch.equal(vectors(other), before)
    assert_close(vectors(other), vectors(use_own_head(other)))


def test_parameters_modes_and_names_stay(folder: str) -> None:
    plain, pooled = encoder_of(folder), use_pooled_head(encoder_of(folder))
    assert list(plain.state_dict()) == list(pooled.state_dict())
    assert [type(module) for module in plain.modules()] == [type(module) for module in pooled.modules()]
    for encoder in (plain, pooled):
        vectors(encoder)  # the first vectors tell sentence-transformers their size
    assert pooled.get_embedding_dimension() == plain.get_embedding_dimension() == VOCAB
    assert not pooled.train(False).training
    assert repr(plain) == repr(pooled)


def test_a_route_of_a_router_is_pooled(folder: str) -> None:
    from sentence_transformers.base.modules import Router
    from sentence_transformers.sparse_encoder.modules import SparseStaticEmbedding

    def asymmetric() -> Any:
        parts = list(encoder_of(folder))
        static = SparseStaticEmbedding(parts[0].tokenizer, weight=torch.rand(VOCAB, generator=torch.manual_seed(0)))
        return st.SparseEncoder(modules=[Router.for_query_document([static], parts)], device="cpu")

    plain, pooled = asymmetric(), use_pooled_head(asymmetric())
    for side in ("encode_query", "encode_document"):
        expected, found = (getattr(one, side)(TEXTS, convert_to_sparse_tensor=False) for one in (plain, pooled))
        assert_close(found, expected)
    assert sum("forward" in vars(module) for module in pooled.modules()) == 2


def test_what_cannot_be_pooled_is_refused_and_left_alone(folder: str) -> None:
    encoder = encoder_of(folder)
    for parts in ([encoder[0]], [encoder[1]], []):
        with pytest.raises(UsageError, match="followed by `SpladePooling`"):
            use_pooled_head(torch.nn.Sequential(*parts))
    shared = torch.nn.Sequential(torch.nn.Sequential(encoder[0], torch.nn.Identity()), encoder)
    with pytest.raises(UsageError, match="feeds something else"):
        use_pooled_head(shared)
    other = torch.nn.Sequential(torch.nn.Identity(), encoder[1])
    with pytest.raises(UsageError, match="no torch model"):
        use_pooled_head(other)
    assert "forward" not in vars(encoder[0]) | vars(encoder[1])
