"""Backbones that must not be loaded, one sentence each, and settings that come back as they were."""

from __future__ import annotations

import copy
import json
import os
import pickle
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
from test_head import traces
from test_stored import REFUSED, TYPES
from tiny_models import tiny_batch, tiny_checkpoint, tiny_model, tiny_tokenizer

import headscale.backbone as backbone_module
from headscale.api import Loading, inspect_in_run
from headscale.backbone import first_line, handed_over, load_backbone, quiet
from headscale.errors import HeadscaleError, NoHeadError, NotFoundError, UnreadableError, UnsupportedHeadError
from headscale.inspection import inspect_weights

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("bert", tmp_path_factory.mktemp("whole") / "bert")


@pytest.fixture
def model(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


def refused(directory: Path, kind: type[HeadscaleError], words: str) -> HeadscaleError:
    """Loading, and inspecting into a run folder, is refused with a sentence and a hint, and nothing is written."""
    before = sorted(directory.parent.rglob("*"))
    with pytest.raises(kind, match=words) as error:
        load_backbone(directory)
    with pytest.raises(kind, match=words):
        inspect_in_run(str(directory), None, directory.parent / "run", loading=Loading())
    assert sorted(directory.parent.rglob("*")) == before
    assert_one_sentence(error.value)
    return error.value


def assert_one_sentence(error: HeadscaleError) -> None:
    assert error.exit_code == 3
    assert error.hint
    assert "\n" not in error.message
    assert not error.message.endswith(".")


def test_a_backbone_is_the_model_transformers_loads(whole: Path) -> None:
    found = load_backbone(whole)
    expected = transformers.AutoModelForMaskedLM.from_pretrained(whole).eval()
    with torch.no_grad():
        assert torch.equal(found.model(**tiny_batch()).logits, expected(**tiny_batch()).logits)
    assert (found.name, found.directory, found.revision, found.warnings) == (str(whole), whole, None, [])
    assert not found.model.training
    assert found.tokenizer("w5 w6")["input_ids"] == [0, 5, 6, 2]
    assert found.head == found.loaded.head


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_loaded_as_fp32(dtype: Any, tmp_path: Path) -> None:
    tiny_model("modernbert").to(dtype).save_pretrained(tmp_path)
    found = load_backbone(tmp_path, tokenizer=False)
    assert {p.dtype for p in found.model.parameters()} == {torch.float32}
    assert found.tokenizer is None


# --- damaged files -------------------------------------------------------------------------------------------------


def truncated(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def garbled(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[8:40] = b"\xff" * 32
    file.write_bytes(content)


def emptied(file: Path) -> None:
    file.write_bytes(b"")


def huge_header(file: Path) -> None:
    file.write_bytes((1 << 60).to_bytes(8, "little") + file.read_bytes()[8:])


def pointer(file: Path) -> None:
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (truncated, "is truncated"),
        (garbled, "garbled safetensors header"),
        (emptied, "is truncated"),
        (huge_header, "is not a safetensors file"),
        (pointer, "git-lfs pointer"),
    ],
)
def test_damaged_weights(damage: Any, words: str, model: Path) -> None:
    damage(model / "model.safetensors")
    refused(model, UnreadableError, words)


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe"])
def test_a_damaged_configuration(content: bytes, model: Path) -> None:
    (model / "config.json").write_bytes(content)
    refused(model, UnreadableError, "config.json")


def test_a_configuration_that_does_not_fit_its_weights(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "hidden_size": 36}))
    with pytest.raises(UnreadableError, match="transformers cannot load") as error:
        load_backbone(model)
    assert_one_sentence(error.value)


def test_layers_that_are_not_in_the_file_are_told(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    (warning,) = load_backbone(model).warnings
    assert warning.startswith("8 tensors of the encoder are not in the checkpoint, among them `bert.encoder.layer.2.")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(value: float, tmp_path: Path) -> None:
    broken = tiny_model("bert")
    with torch.no_grad():
        broken.cls.predictions.bias[7] = value
    broken.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    refused(tmp_path / "model", UnreadableError, r"finite|not numbers")


# --- pickles that run code -----------------------------------------------------------------------------------------


class Payload:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("form", ["zip", "plain pickle", "mixed with tensors"])
def test_a_malicious_pickle_is_refused_and_does_nothing(form: str, model: Path, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    (model / "model.safetensors").unlink()
    file = model / "pytorch_model.bin"
    if form == "zip":
        torch.save({"cls.predictions.bias": Payload(mark)}, file)
    elif form == "plain pickle":
        file.write_bytes(pickle.dumps(Payload(mark)))
    else:
        torch.save({**tiny_model("bert").state_dict(), "extra": Payload(mark)}, file)
    error = refused(model, UnreadableError, "pytorch_model.bin")
    assert not mark.exists()
    assert "weights_only" not in error.message  # no word of it being switched off
    with pytest.raises(UnreadableError):
        inspect_weights(model)
    assert not mark.exists()
    Payload(mark).__reduce__()[0](str(mark))  # it would have
    assert mark.exists()


def test_a_truncated_pickle(model: Path) -> None:
    (model / "model.safetensors").unlink()
    torch.save(tiny_model("bert").state_dict(), model / "pytorch_model.bin")
    truncated(model / "pytorch_model.bin")
    assert not zipfile.is_zipfile(model / "pytorch_model.bin")
    refused(model, UnreadableError, "pytorch_model.bin")


def test_a_safetensors_file_comes_before_a_pickle(model: Path, tmp_path: Path) -> None:
    torch.save({"x": Payload(tmp_path / "ran")}, model / "pytorch_model.bin")
    assert load_backbone(model).head.vocab_size == 131
    assert not (tmp_path / "ran").exists()


# --- tokenizers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["bert", "roberta", "modernbert", "deberta-v2", "camembert", "electra"])
def test_a_missing_tokenizer_is_never_made_up(model_type: str, tmp_path: Path) -> None:
    """transformers 5 hands out an empty one of the type's class, to which every word is unknown."""
    tiny_model(model_type).save_pretrained(tmp_path)
    with pytest.raises(HeadscaleError, match="no tokenizer can be loaded") as error:
        load_backbone(tmp_path)
    assert "--weights-only" in error.value.hint
    assert_one_sentence(error.value)
    assert load_backbone(tmp_path, tokenizer=False).tokenizer is None
    assert inspect_weights(tmp_path).vocabulary is None


def test_a_damaged_tokenizer(model: Path) -> None:
    (model / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(HeadscaleError):
        load_backbone(model)


@pytest.mark.parametrize("place", ["root", "subfolder"])
def test_a_sentence_transformers_folder_keeps_them_in_either_place(place: str, whole: Path, tmp_path: Path) -> None:
    inner = tmp_path / "0_MLMTransformer"
    shutil.copytree(whole, inner)
    modules = [{"idx": 0, "name": "0", "path": "0_MLMTransformer", "type": "sentence_transformers.models.Transformer"}]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    if place == "root":
        for file in inner.glob("*token*"):
            file.rename(tmp_path / file.name)
    found = load_backbone(tmp_path)
    assert found.directory == inner
    assert found.tokenizer("w5 w6")["input_ids"] == [0, 5, 6, 2]


# --- code that comes along -----------------------------------------------------------------------------------------

REMOTE = """
import pathlib
MARK.mkdir()
from transformers import BertConfig, BertForMaskedLM
class MyConfig(BertConfig):
    model_type = "my-bert"
class MyModel(BertForMaskedLM):
    config_class = MyConfig
"""


@pytest.fixture
def remote(model: Path, tmp_path: Path) -> Path:
    code = REMOTE.replace("MARK", f"pathlib.Path({str(tmp_path / 'ran')!r})").replace(
        ".mkdir()", ".mkdir(exist_ok=True)"
    )
    (model / "modeling_my.py").write_text(code)
    config = json.loads((model / "config.json").read_text())
    mapping = {"AutoConfig": "modeling_my.MyConfig", "AutoModelForMaskedLM": "modeling_my.MyModel"}
    (model / "config.json").write_text(json.dumps({**config, "model_type": "my-bert", "auto_map": mapping}))
    return model


def test_code_of_a_repository_is_not_run_unasked(remote: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedHeadError, match="brings its own modelling code") as error:
        load_backbone(remote)
    assert "--trust-remote-code" in error.value.hint
    assert_one_sentence(error.value)
    assert not (tmp_path / "ran").exists()


def test_and_is_run_when_asked(remote: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    found = load_backbone(remote, trust_remote_code=True)
    assert (tmp_path / "ran").exists()
    assert found.head.architecture == "MyModel"
    assert found.stored is None
    assert found.head.matrix == ("cls.predictions.decoder.weight",)


def test_a_type_that_nobody_knows(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "model_type": "made-up"}))
    with pytest.raises(HeadscaleError, match=r"made-up|cannot load") as error:
        load_backbone(model)
    assert_one_sentence(error.value)


# --- heads that are not there --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model_type", "class_name"),
    [
        ("bert", "BertModel"),
        ("bert", "BertForSequenceClassification"),
        ("modernbert", "ModernBertModel"),
        ("xlm-roberta", "XLMRobertaModel"),
        ("electra", "ElectraForPreTraining"),
        ("distilbert", "DistilBertModel"),
    ],
)
def test_a_checkpoint_without_a_head(model_type: str, class_name: str, tmp_path: Path) -> None:
    tiny_checkpoint(model_type, tmp_path / "model", class_name)
    refused(tmp_path / "model", NoHeadError, "no trained MLM head")


def test_a_layout_of_its_own_is_watched_and_a_random_head_still_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backbone_module, "layout_for", lambda config: None)
    tiny_checkpoint("bert", tmp_path / "whole")
    tiny_checkpoint("bert", tmp_path / "base", "BertModel")
    found = load_backbone(tmp_path / "whole")
    assert found.stored is None
    assert found.head.bias == "cls.predictions.bias"
    with pytest.raises(NoHeadError, match="would be initialised at random"):
        load_backbone(tmp_path / "base")


@pytest.mark.parametrize("model_type", sorted(REFUSED))
def test_what_cannot_serve_is_refused_in_memory_too(model_type: str) -> None:
    with pytest.raises(UnsupportedHeadError, match="cannot serve SPLADE") as error:
        handed_over(tiny_model(model_type), tiny_tokenizer())
    assert_one_sentence(error.value)


@pytest.mark.parametrize("model_type", [t for t in TYPES if t in ("bert", "modernbert", "gte", "luke", "xlm")])
def test_nothing_is_made_up_for_a_whole_checkpoint(model_type: str, tmp_path: Path) -> None:
    assert load_backbone(tiny_checkpoint(model_type, tmp_path)).warnings == []


def test_what_is_not_there(tmp_path: Path) -> None:
    for name in (tmp_path / "no", str(tmp_path / "no")):
        with pytest.raises(NotFoundError) as error:
            load_backbone(name)
        assert_one_sentence(error.value)
    (tmp_path / "empty").mkdir()
    with pytest.raises(HeadscaleError) as error:
        load_backbone(tmp_path / "empty")
    assert_one_sentence(error.value)


# --- in memory -----------------------------------------------------------------------------------------------------


def test_a_model_handed_over_is_left_as_it_was() -> None:
    model = tiny_model("bert").train()
    state, before = copy.deepcopy(model.state_dict()), traces(model)
    found = handed_over(model, tiny_tokenizer())
    assert traces(model) == before
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert (found.name, found.directory, found.stored) == ("BertForMaskedLM", None, None)
    assert found.model is model
    assert handed_over(model, None, "mine").name == "mine"


# --- quiet ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bars", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_settings_of_transformers_come_back(bars: bool, fails: bool) -> None:
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    try:
        logging.set_verbosity_info()
        (logging.enable_progress_bar if bars else logging.disable_progress_bar)()
        try:
            with quiet():
                assert logging.get_verbosity() == logging.ERROR
                assert not logging.is_progress_bar_enabled()
                if fails:
                    raise ValueError("inside")
        except ValueError:
            assert fails
        assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (logging.INFO, bars)
    finally:
        logging.set_verbosity(before[0])
        (logging.enable_progress_bar if before[1] else logging.disable_progress_bar)()


def test_loading_says_nothing(whole: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load_backbone(whole)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("one\ntwo"), "one"),
        (ValueError("  a sentence.  "), "a sentence"),
        (ValueError(""), "ValueError"),
        (KeyError("key"), "'key'"),
        (ValueError("x" * 500), "x" * 200),
        (None, "NoneType"),
    ],
)
def test_what_a_library_said_in_one_line(error: Exception | None, line: str) -> None:
    assert first_line(error) == line
