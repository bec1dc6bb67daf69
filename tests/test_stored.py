"""The head on disk against the head of the loaded model, for every type and every way a file may be written."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import masked_lm_types, tiny_model

from headscale.checkpoint import open_checkpoint
from headscale.errors import NoHeadError, UnreadableError, UnsupportedHeadError
from headscale.head import find_head, load_head
from headscale.stored import StoredHead, read_head

torch = pytest.importorskip("torch")

CAUSAL = {
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "modernbert-decoder": "ModernBertDecoderForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
REFUSED = {"bart", "mbart", "mvp", "esm", "esmc", "perceiver"}
TYPES = sorted((set(masked_lm_types()) | set(CAUSAL)) - REFUSED)


def save(model: Any, directory: Path, **options: Any) -> Path:
    model.save_pretrained(directory, **options)
    return directory


def stored(directory: Path) -> tuple[StoredHead, dict[str, np.ndarray]]:
    with open_checkpoint(directory) as checkpoint:
        found = read_head(checkpoint)
        values = {name: checkpoint.tensor(key) for name, key in found.keys.items()}
    return found, values


def assert_same_head(found: StoredHead, values: dict[str, np.ndarray], model: Any) -> None:
    loaded = load_head(model)
    assert replace(found.head, architecture="") == replace(loaded.head, architecture="")
    blocks = [values[name] for name in found.head.matrix]
    blocks = [b if b.shape[0] == found.head.vocab_size else b.T for b in blocks]
    np.testing.assert_array_equal(np.concatenate(blocks, axis=1), loaded.weight.detach().numpy())
    if found.head.bias is not None:
        np.testing.assert_array_equal(values[found.head.bias], loaded.bias.detach().numpy())


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("model_type", TYPES)
def test_disk_says_what_the_loaded_model_says(model_type: str, tie: bool, tmp_path: Path) -> None:
    model = tiny_model(model_type, CAUSAL.get(model_type), tie_word_embeddings=tie)
    found, values = stored(save(model, tmp_path))
    assert_same_head(found, values, model)
    assert not found.warnings


@pytest.mark.parametrize("model_type", ["deberta", "deberta-v2"])
def test_deberta_with_its_own_head(model_type: str, tmp_path: Path) -> None:
    model = tiny_model(model_type, legacy=False)
    found, values = stored(save(model, tmp_path))
    assert_same_head(found, values, model)
    assert found.head.tied_to in found.head.matrix


@pytest.mark.parametrize("model_type", sorted(REFUSED))
def test_what_cannot_serve_splade_gets_its_reason(model_type: str, tmp_path: Path) -> None:
    save(tiny_model(model_type), tmp_path)
    with open_checkpoint(tmp_path) as checkpoint, pytest.raises(UnsupportedHeadError) as error:
        read_head(checkpoint)
    expected = {"esm": "amino acids", "esmc": "amino acids", "perceiver": "bytes"}.get(model_type, "encoder-decoder")
    assert expected in error.value.message


@pytest.mark.parametrize("model_type", ["bert", "xlm-roberta", "modernbert", "distilbert"])
def test_sharded(model_type: str, tmp_path: Path) -> None:
    model = tiny_model(model_type)
    found, values = stored(save(model, tmp_path, max_shard_size="20KB"))
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert_same_head(found, values, model)


@pytest.mark.parametrize("model_type", ["bert", "roberta", "albert", "electra"])
def test_bin(model_type: str, tmp_path: Path) -> None:
    model = tiny_model(model_type)
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    found, values = stored(tmp_path)
    assert_same_head(found, values, model)


def rewritten(directory: Path, rename: Any) -> None:
    from safetensors.numpy import load_file, save_file

    tensors = load_file(directory / "model.safetensors")
    save_file({rename(k): v for k, v in tensors.items()}, directory / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("model_type", ["bert", "roberta", "distilbert", "electra"])
def test_without_the_backbone_prefix(model_type: str, tmp_path: Path) -> None:
    model = tiny_model(model_type)
    save(model, tmp_path)
    rewritten(tmp_path, lambda k: k.removeprefix(f"{model.base_model_prefix}."))
    found, values = stored(tmp_path)
    assert_same_head(found, values, model)


@pytest.mark.parametrize("model_type", ["bert", "nystromformer"])
def test_gamma_and_beta(model_type: str, tmp_path: Path) -> None:
    model = tiny_model(model_type)
    save(model, tmp_path)
    rewritten(tmp_path, lambda k: k.replace("LayerNorm.weight", "LayerNorm.gamma").replace("Norm.bias", "Norm.beta"))
    found, values = stored(tmp_path)
    assert_same_head(found, values, model)
    assert found.keys["cls.predictions.transform.LayerNorm.bias"].endswith("beta")


def test_the_tie_flag_may_be_absent(tmp_path: Path) -> None:
    model = tiny_model("bert")
    save(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config.pop("tie_word_embeddings", None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    found, _ = stored(tmp_path)
    assert found.head.tied_to == "bert.embeddings.word_embeddings.weight"


def test_an_untied_file_of_transformers_4_loses_its_bias(tmp_path: Path) -> None:
    model = tiny_model("bert", tie_word_embeddings=False)
    save(model, tmp_path)
    from safetensors.numpy import load_file, save_file

    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["cls.predictions.decoder.bias"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    found, values = stored(tmp_path)
    assert found.head.bias == "cls.predictions.decoder.bias"
    assert found.head.bias not in values
    assert "transformers 5 loads a bias of zeros" in found.warnings[0]


@pytest.mark.parametrize(
    ("model_type", "base"),
    [
        ("bert", "BertModel"),
        ("modernbert", "ModernBertModel"),
        ("eurobert", "EuroBertModel"),
        ("xlm-roberta", "XLMRobertaModel"),
    ],
)
def test_a_base_model_has_no_head(model_type: str, base: str, tmp_path: Path) -> None:
    save(tiny_model(model_type, base), tmp_path)
    with open_checkpoint(tmp_path) as checkpoint, pytest.raises(NoHeadError, match="no trained MLM head") as error:
        read_head(checkpoint)
    assert base in error.value.message
    assert error.value.hint


def test_deberta_under_other_keys_is_told_what_to_do(tmp_path: Path) -> None:
    save(tiny_model("deberta-v2", legacy=False), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["legacy"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with open_checkpoint(tmp_path) as checkpoint, pytest.raises(NoHeadError, match="lm_predictions") as error:
        read_head(checkpoint)
    assert '"legacy": false' in error.value.hint


def test_a_discriminator_is_named(tmp_path: Path) -> None:
    save(tiny_model("electra", "ElectraForPreTraining"), tmp_path)
    with open_checkpoint(tmp_path) as checkpoint, pytest.raises(NoHeadError, match="discriminator"):
        read_head(checkpoint)


def test_unknown_and_missing_model_types(tmp_path: Path) -> None:
    save(tiny_model("bert"), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for model_type, expected in (("made-up", UnsupportedHeadError), (None, UnreadableError)):
        (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": model_type}))
        with open_checkpoint(tmp_path) as checkpoint, pytest.raises(expected):
            read_head(checkpoint)


def test_finding_the_head_leaves_the_model_as_it_was() -> None:
    model = tiny_model("bert").train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    hooks = sum(len(m._forward_hooks) for m in model.modules())
    state = torch.random.get_rng_state()
    find_head(model)
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert sum(len(m._forward_hooks) for m in model.modules()) == hooks
    assert torch.equal(torch.random.get_rng_state(), state)
