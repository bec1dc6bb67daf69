import json
import subprocess
import sys
from pathlib import Path

import pytest

from headscale import bundled
from headscale.errors import NotFoundError
from headscale.texts import builtin_texts

LIMIT = 8_000_000  # bytes in the package, all bundled models together


@pytest.fixture(scope="module")
def dev_texts():
    """A handful of held-out docstrings: `stdlib` alone is quick to scan."""
    return builtin_texts("dev", packages=["stdlib"])[:64]


@pytest.fixture(scope="module", params=bundled.names())
def loaded(request):
    import torch
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    folder = bundled.path(request.param)
    model, info = AutoModelForMaskedLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"], info["missing_keys"]
    assert not info["unexpected_keys"], info["unexpected_keys"]
    assert model.dtype == torch.float32, "the config must ask for full precision"
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def masked(tokenizer, texts, *, seed=0, rate=0.15):
    """(inputs with [MASK] at random words, chosen positions, labels)."""
    import torch

    inputs = tokenizer(texts, truncation=True, max_length=64, padding=True, return_tensors="pt")
    ids = inputs["input_ids"]
    draw = torch.rand(ids.shape, generator=torch.Generator().manual_seed(seed))
    chosen = (draw < rate) & ~torch.isin(ids, torch.tensor(tokenizer.all_special_ids))
    return {**inputs, "input_ids": ids.masked_fill(chosen, tokenizer.mask_token_id)}, chosen, ids[chosen]


def test_names_and_paths():
    assert bundled.names() == (bundled.REFERENCE, bundled.FAILING) == ("tiny-bert", "tiny-modernbert")
    assert bundled.path("bundled:tiny-bert") == bundled.path("tiny-bert")
    assert bundled.is_bundled("bundled:tiny-bert")
    assert not bundled.is_bundled("tiny-bert")
    with pytest.raises(NotFoundError) as caught:
        bundled.path("bundled:tiny-roberta")
    assert caught.value.message == "no bundled backbone is called `tiny-roberta`"
    assert caught.value.hint == "choose from `bundled:tiny-bert`, `bundled:tiny-modernbert`"


def test_finding_them_imports_no_torch():
    code = "import sys; from headscale import bundled; bundled.path('tiny-bert'); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_they_fit_in_the_package():
    files = [file for file in Path(bundled.__file__).parent.rglob("*") if file.is_file() and file.suffix != ".pyc"]
    assert sum(file.stat().st_size for file in files) <= LIMIT


@pytest.mark.parametrize("name", bundled.names())
def test_the_weights_are_half_precision_and_finite(name):
    import numpy as np
    from safetensors.numpy import load_file

    tensors = load_file(bundled.path(name) / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {np.dtype("float16")}
    assert all(np.isfinite(tensor).all() for tensor in tensors.values())
    assert json.loads((bundled.path(name) / "config.json").read_text(encoding="utf-8"))["tie_word_embeddings"] is True


def test_they_know_more_than_token_frequencies(loaded, dev_texts):
    """Masked-token loss and accuracy beat the unigram model, fitted on the training split of the same package."""
    import torch

    model, tokenizer = loaded
    inputs, chosen, labels = masked(tokenizer, dev_texts)
    with torch.no_grad():
        logits = model(**inputs).logits[chosen]
    loss = torch.nn.functional.cross_entropy(logits, labels).item()
    accuracy = (logits.argmax(-1) == labels).float().mean().item()
    read = tokenizer(builtin_texts("train", packages=["stdlib"])[:1000], add_special_tokens=False)["input_ids"]
    counts = torch.bincount(torch.tensor([token for ids in read for token in ids]), minlength=len(tokenizer)) + 1.0
    unigram = -(counts / counts.sum()).log()[labels].mean().item()
    most_common = (labels == counts.argmax()).float().mean().item()
    assert len(labels) > 300
    assert loss < unigram, (loss, unigram)
    assert accuracy > most_common, (accuracy, most_common)


def test_padding_changes_nothing(loaded):
    import torch

    model, tokenizer = loaded
    texts = ["Compute the arithmetic mean.", "Return a new array with the given shape and type, filled with zeros."]
    with torch.no_grad():
        alone = model(**tokenizer(texts[:1], return_tensors="pt")).logits
        beside = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits[:1, : alone.shape[1]]
    assert (alone - beside).abs().max() <= 1e-5 * alone.abs().max()


@pytest.mark.parametrize("name", bundled.names())
def test_sentence_transformers_builds_splade_on_them(name):
    module = pytest.importorskip("sentence_transformers")
    encoder = module.SparseEncoder(str(bundled.path(name)), device="cpu")
    assert [type(part).__name__ for part in encoder][1:] == ["SpladePooling"]
    assert type(encoder[0].auto_model).__name__.endswith("ForMaskedLM")
    embedding = encoder.encode(["Return the mean of an array."], convert_to_sparse_tensor=False)
    assert embedding.shape == (1, 6144)
    assert (embedding > 0).any()


@pytest.mark.parametrize("name", bundled.names())
def test_the_card_states_what_it_must(name):
    card = (bundled.path(name) / "README.md").read_text(encoding="utf-8")
    for heading in ("masked-token accuracy, dev", "unigram baseline", "fingerprint", "recipe", "seed", "license"):
        assert heading in card, heading
    assert f"examples/pretrain_bundled.py --only {name}" in card
