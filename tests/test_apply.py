"""A written checkpoint does what the constant says, for every type that has an exact form, in every library."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from test_stored import CAUSAL, REFUSED, TYPES
from tiny_models import tiny_batch, tiny_checkpoint, tiny_model

from headscale.apply import EXACT, FILE, Change, save_rescaled
from headscale.backbone import load_backbone
from headscale.errors import HeadscaleError, NoHeadError, UnsupportedHeadError, UsageError

torch = pytest.importorskip("torch")

NO_NORM = {"neomme", "ultrabert", "ultravbert"}
SOFTCAPPED = {"gemma2"}


def digest(directory: Path) -> dict[str, str]:
    files = sorted(p for p in directory.rglob("*") if p.is_file())
    return {str(p.relative_to(directory)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def logits(directory: Path) -> Any:
    backbone = load_backbone(directory, tokenizer=False)
    with torch.no_grad():
        return backbone.model(**tiny_batch()).logits, backbone


@pytest.mark.parametrize("mode", ["untie", "fold"])
@pytest.mark.parametrize("model_type", TYPES)
def test_a_power_of_two_is_bitwise_exact(model_type: str, mode: str, tmp_path: Path) -> None:
    source = tiny_checkpoint(model_type, tmp_path / "source", CAUSAL.get(model_type))
    before = digest(source)
    backbone = load_backbone(source)
    if model_type in SOFTCAPPED or (mode == "fold" and model_type in NO_NORM):
        with pytest.raises(UnsupportedHeadError):
            save_rescaled(backbone, tmp_path / "target", Change(0.125, mode=mode))
        assert not (tmp_path / "target").exists()
        return
    written = save_rescaled(backbone, tmp_path / "target", Change(0.125, mode=mode))
    one_plus = backbone.head.norm_kind == "one_plus" and mode == "fold"  # a (1 + w) - 1 rounds
    assert all(proof.max_error <= EXACT for proof in written.proofs), written.proofs
    assert written.proofs[0].bitwise or one_plus
    assert written.proofs[0].support_identical
    assert not (mode == "fold" and written.added)  # the same keys
    expected, _ = logits(source)
    found, again = logits(tmp_path / "target")
    assert (found - 0.125 * expected).abs().max() <= EXACT * expected.abs().max() * 0.125
    assert again.head.tied_to == (None if mode == "untie" else backbone.head.tied_to)
    assert digest(source) == before


AUTODETECTED = [t for t in TYPES if t not in CAUSAL and t not in {"flaubert", "xlm"}]
NEEDS_AN_IMAGE_PROCESSOR = {"modernvbert", "neomme", "ultravbert"}


@pytest.mark.parametrize("model_type", AUTODETECTED)
def test_sparse_encoder_sees_the_constant(model_type: str, tmp_path: Path) -> None:
    pytest.importorskip("sentence_transformers")
    backbone = load_backbone(tiny_checkpoint(model_type, tmp_path / "source"))
    written = save_rescaled(backbone, tmp_path / "target", Change(0.25))
    if model_type in NEEDS_AN_IMAGE_PROCESSOR:
        assert "image processor" in written.warnings[0]
        return
    assert "SparseEncoder" in written.proofs[1].library
    assert all(p.max_error <= EXACT and p.support_identical for p in written.proofs), written.proofs


@pytest.mark.parametrize("model_type", ["bert", "modernbert", "gte", "luke", "mobilebert", "albert"])
@pytest.mark.parametrize("scale_bias", [True, False])
@pytest.mark.parametrize("shift", [0.0, -0.7])
def test_any_factor_policy_and_shift(model_type: str, scale_bias: bool, shift: float, tmp_path: Path) -> None:
    backbone = load_backbone(tiny_checkpoint(model_type, tmp_path / "source"))
    change = Change(1 / 11.3, scale_bias=scale_bias, shift=shift)
    written = save_rescaled(backbone, tmp_path / "target", change)
    before, _ = logits(tmp_path / "source")
    after, _ = logits(tmp_path / "target")
    bias = backbone.loaded.bias
    expected = (before + shift) / 11.3 if scale_bias else (before - bias + shift) / 11.3 + bias
    assert (after - expected).abs().max() <= EXACT * expected.abs().max()
    assert all(p.max_error <= EXACT for p in written.proofs)


@pytest.mark.parametrize("legacy", [True, False])
def test_deberta_folds_where_the_matrix_is_the_embedding(legacy: bool, tmp_path: Path) -> None:
    backbone = load_backbone(tiny_checkpoint("deberta-v2", tmp_path / "source", legacy=legacy))
    written = save_rescaled(backbone, tmp_path / "target", Change(0.5))
    assert written.mode == ("untie" if legacy else "fold")
    assert written.proofs[0].bitwise


def test_a_bias_that_only_transformers_4_adds_is_scaled_too(tmp_path: Path) -> None:
    backbone = load_backbone(tiny_checkpoint("reformer", tmp_path / "source"), tokenizer=False)
    before = load_file(tmp_path / "source" / "model.safetensors")["lm_head.bias"]
    assert np.abs(before).max() > 0.1
    for scale_bias, factor in ((True, 0.125), (False, 1.0)):
        target = tmp_path / str(scale_bias)
        save_rescaled(backbone, target, Change(0.125, scale_bias=scale_bias))
        np.testing.assert_array_equal(load_file(target / "model.safetensors")["lm_head.bias"], factor * before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [0.0625, 0.1])
def test_half_precision(dtype: Any, scale: float, tmp_path: Path) -> None:
    source = tmp_path / "source"
    tiny_model("bert").to(dtype).save_pretrained(source)
    backbone = load_backbone(source, tokenizer=False)
    written = save_rescaled(backbone, tmp_path / "target", Change(scale))
    tensors = _dtypes(tmp_path / "target")
    assert tensors["cls.predictions.transform.dense.weight"] == ("F16" if dtype is torch.float16 else "BF16")
    if scale == 0.1:
        assert tensors["cls.predictions.decoder.weight"] == "F32"
    assert written.proofs[0].max_error <= EXACT


def _dtypes(directory: Path) -> dict[str, str]:
    from headscale.checkpoint import open_checkpoint

    with open_checkpoint(directory) as checkpoint:
        return {name: info.dtype for name, info in checkpoint.tensors.items()}


def test_everything_else_is_copied_byte_for_byte(tmp_path: Path) -> None:
    source = tiny_checkpoint("bert", tmp_path / "source")
    (source / "notes.txt").write_text("kept")
    (source / "1_SpladePooling").mkdir()
    (source / "1_SpladePooling" / "config.json").write_text("{}")
    written = save_rescaled(load_backbone(source), tmp_path / "target", Change(0.5))
    before, after = digest(source), digest(tmp_path / "target")
    assert {k for k in before if after.get(k) != before[k]} == {"config.json", "model.safetensors"}
    assert set(after) - set(before) == {FILE}
    old, new = load_file(source / "model.safetensors"), load_file(tmp_path / "target" / "model.safetensors")
    assert {k for k in old if not np.array_equal(old[k], new[k])} == {"cls.predictions.bias"}
    assert set(written.added) == {"cls.predictions.decoder.weight", "cls.predictions.decoder.bias"}
    changed = {**json.loads((source / "config.json").read_text()), "tie_word_embeddings": False}
    assert json.loads((tmp_path / "target" / "config.json").read_text()) == changed


def test_metadata_says_what_was_written(tmp_path: Path) -> None:
    backbone = load_backbone(tiny_checkpoint("modernbert", tmp_path / "source"))
    save_rescaled(backbone, tmp_path / "target", Change(0.5), metadata={"scale": 0.5, "reference": "r"})
    content = json.loads((tmp_path / "target" / FILE).read_text())
    assert content["mode"] == "untie"
    assert content["reference"] == "r"
    assert content["proofs"][0]["max_error"] == 0.0
    assert content["edited"] == ["decoder.bias", "decoder.weight"]


@pytest.mark.parametrize("model_type", ["bert", "distilbert", "modernbert"])
def test_sharded_and_bin_sources(model_type: str, tmp_path: Path) -> None:
    model = tiny_model(model_type)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    model.config.save_pretrained(tmp_path / "bin")
    torch.save(model.state_dict(), tmp_path / "bin" / "pytorch_model.bin")
    for kind in ("sharded", "bin"):
        backbone = load_backbone(tmp_path / kind, tokenizer=False)
        for mode in ("untie", "fold"):
            written = save_rescaled(backbone, tmp_path / f"{kind}-{mode}", Change(0.25, mode=mode))
            assert written.proofs[0].bitwise


def test_a_checkpoint_that_fails_its_proof_never_appears(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import headscale.apply as apply

    backbone = load_backbone(tiny_checkpoint("bert", tmp_path / "source"), tokenizer=False)
    honest = apply._Editing._biases
    monkeypatch.setattr(apply._Editing, "_biases", lambda self: {k: v + 0.01 for k, v in honest(self).items()})
    with pytest.raises(HeadscaleError, match="was not written"):
        save_rescaled(backbone, tmp_path / "target", Change(0.5))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]


def test_never_over_its_input_nor_over_another_folder(tmp_path: Path) -> None:
    source = tiny_checkpoint("bert", tmp_path / "source")
    backbone = load_backbone(source, tokenizer=False)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("x")
    for target in (source, source / "inside", tmp_path / "full"):
        with pytest.raises(UsageError):
            save_rescaled(backbone, target, Change(0.5))
    assert (tmp_path / "full" / "thesis.tex").read_text() == "x"


@pytest.mark.parametrize("model_type", sorted(REFUSED))
def test_refused_types_are_refused_before_loading(model_type: str, tmp_path: Path) -> None:
    tiny_model(model_type).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedHeadError, match="cannot serve SPLADE"):
        load_backbone(tmp_path, tokenizer=False)


def test_a_random_head_is_refused(tmp_path: Path) -> None:
    tiny_model("bert", "BertModel").save_pretrained(tmp_path)
    with pytest.raises(NoHeadError, match="initialised at random"):
        load_backbone(tmp_path)


@pytest.mark.parametrize("model_type", ["bert", "modernbert", "xlm-roberta", "albert", "mobilebert", "distilbert"])
def test_the_advice_names_the_parameters_that_are_live_in_what_was_written(model_type: str, tmp_path: Path) -> None:
    import re

    from headscale.calibration import advice

    backbone = load_backbone(tiny_checkpoint(model_type, tmp_path / "source"))
    save_rescaled(backbone, tmp_path / "target", Change(0.125))
    again = load_backbone(tmp_path / "target", tokenizer=False)
    pattern = re.search(r'\{r"(.*)": ', advice(0.125, 4.0, backbone.head)[2]).group(1)
    matched = {id(p) for name, p in again.model.named_parameters() if re.search(pattern, f"0.model.{name}")}
    assert {id(p) for p in again.loaded.parameters} <= matched
    encoder = {id(p) for name, p in again.model.named_parameters() if "embedding" in name}
    assert not matched & encoder
