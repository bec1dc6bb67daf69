"""The verbs as a library: the same answer however a backbone is given, nothing disturbed, and checkpoints that hold."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_apply import digest
from test_head import traces
from tiny_models import tiny_batch, tiny_checkpoint, tiny_model, tiny_tokenizer

import headscale
from headscale.activations import Encoding
from headscale.api import Loading, calibrate_in_run, find_reference, identity
from headscale.calibration import Choice
from headscale.cells import find_cells
from headscale.errors import HeadscaleError, NotFoundError, UnsupportedHeadError, UsageError
from headscale.inspection import halves, texts_of
from headscale.profiles import from_dict, read_profile, write_profile
from headscale.records import Calibration, Inspection
from headscale.rescaling import rescale_
from headscale.texts import Pair

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

ROOT = Path(__file__).parents[1]
PAIRS = [Pair(f"w{5 + i} w{40 + i}", f"w{40 + i} w{60 + i % 30} w{5 + i} w{7 + i % 11}") for i in range(9)]
GIVEN: dict[str, Any] = {"pairs": PAIRS, "encoding": Encoding(8, 16, 4)}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADSCALE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backbone whose outputs are too large for its reference."""
    directory = tmp_path_factory.mktemp("large") / "modernbert"
    model = tiny_model("modernbert")
    rescale_(model, 30.0, mode="fold")
    model.save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("bert", tmp_path_factory.mktemp("reference") / "bert")


def loaded(directory: Path) -> tuple[Any, Any]:
    model = transformers.AutoModelForMaskedLM.from_pretrained(directory)
    return model, transformers.AutoTokenizer.from_pretrained(directory)


def in_hub_cache(directory: Path, cache: Path, repo: str = "someone/model", commit: str = "c" * 40) -> str:
    """Put a checkpoint where huggingface_hub keeps what it has downloaded."""
    home = cache / f"models--{repo.replace('/', '--')}"
    shutil.copytree(directory, home / "snapshots" / commit)
    (home / "refs").mkdir(exist_ok=True)
    (home / "refs" / "main").write_text(commit)
    return repo


# --- however a backbone is given -----------------------------------------------------------------------------------


def test_the_same_answer_by_name_path_id_and_in_memory(large: Path, tmp_path: Path) -> None:
    by_path = headscale.inspect(large, **GIVEN)
    by_name = headscale.inspect(str(large), **GIVEN)
    by_id = headscale.inspect(in_hub_cache(large, tmp_path / "hub"), **GIVEN)
    in_memory = headscale.inspect(*loaded(large), **GIVEN)
    assert by_name == by_path
    assert (by_id.name, by_id.revision) == ("someone/model", "c" * 40)
    assert replace(by_id, name=by_path.name, revision=None) == by_path
    assert in_memory.name == str(large)  # what transformers keeps as its origin
    assert in_memory == by_path
    assert by_path.output.batches == 2
    assert by_path.texts.to_dict() == texts_of(PAIRS, "given", GIVEN["encoding"]).settings.to_dict()


def test_weights_alone_by_path_and_in_memory(large: Path) -> None:
    disk = headscale.inspect(large, weights_only=True)
    memory = headscale.inspect(*loaded(large), weights_only=True)
    for found in (disk, memory):
        assert (found.verdict.word, found.output, found.logits, found.gradients) == ("unjudged", None, None, None)
    assert disk.head == memory.head
    assert disk.vocabulary == memory.vocabulary
    for name, value in disk.weights.to_dict().items():
        if value is not None:
            np.testing.assert_allclose(memory.weights.to_dict()[name], value, rtol=1e-12, err_msg=name)
    assert (disk.bytes_read > 0, memory.bytes_read) == (True, None)
    without = headscale.inspect(loaded(large)[0], weights_only=True)
    assert without.vocabulary is None
    assert without.weights.frobenius == memory.weights.frobenius


def test_spectral_is_asked_for(large: Path) -> None:
    assert headscale.inspect(large, weights_only=True).weights.spectral_norm is None
    found = headscale.inspect(large, weights_only=True, loading=Loading(spectral=True)).weights
    matrix = loaded(large)[0].decoder.weight.detach().double().numpy()
    assert found.spectral_norm == pytest.approx(np.linalg.svd(matrix)[1][0], rel=1e-6)


def test_texts_need_a_tokenizer(large: Path) -> None:
    with pytest.raises(UsageError, match="has no tokenizer to run texts with"):
        headscale.inspect(loaded(large)[0], **GIVEN)


def test_too_few_pairs(large: Path) -> None:
    with pytest.raises(UsageError, match="9 pairs are fewer than one batch of 32"):
        headscale.inspect(large, pairs=PAIRS)
    with pytest.raises(UsageError, match="0 pairs"):
        headscale.calibrate(large, reference=large, pairs=[])


def test_what_is_found_is_plain_json(large: Path, reference: Path) -> None:
    inspection = headscale.inspect(large, **GIVEN)
    calibration = headscale.calibrate(large, reference=reference, **GIVEN)
    for record, kind in ((inspection, Inspection), (calibration, Calibration)):
        text = json.dumps(record.to_dict(), allow_nan=False)
        assert from_dict(kind, json.loads(text)) == record


# --- nothing is disturbed ------------------------------------------------------------------------------------------


@pytest.fixture
def untouched(large: Path) -> Iterator[tuple[Any, Any]]:
    """A model and its tokenizer; checks afterwards that both are as they were, to the bit."""
    model, tokenizer = loaded(large)
    model.train()
    next(model.parameters()).requires_grad_(False)
    state, before = copy.deepcopy(model.state_dict()), traces(model)
    text = tokenizer.backend_tokenizer.to_str()
    yield model, tokenizer
    assert traces(model) == before
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert tokenizer.backend_tokenizer.to_str() == text
    assert (tokenizer.padding_side, tokenizer.pad_token) == ("right", "<pad>")


def test_inspect_leaves_a_model_as_it_was(untouched: tuple[Any, Any]) -> None:
    headscale.inspect(*untouched, **GIVEN)
    headscale.inspect(*untouched, weights_only=True)


def test_calibrate_leaves_a_model_as_it_was(untouched: tuple[Any, Any], reference: Path) -> None:
    headscale.calibrate(*untouched, reference=reference, choice=Choice(shift=True), **GIVEN)


def test_so_does_a_failure(untouched: tuple[Any, Any]) -> None:
    with pytest.raises(HeadscaleError):
        headscale.inspect(*untouched, pairs=[Pair("w5", "w6 " * 90)] * 4, encoding=Encoding(8, 80, 4))


def test_nothing_is_printed(large: Path, reference: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    headscale.inspect(large, **GIVEN)
    headscale.inspect(large, weights_only=True)
    headscale.calibrate(large, reference=reference, save=tmp_path / "saved", **GIVEN)
    out, err = capfd.readouterr()
    assert out == ""
    assert "headscale" not in err


# --- calibrate -----------------------------------------------------------------------------------------------------


def test_however_a_reference_is_given(large: Path, reference: Path, tmp_path: Path) -> None:
    profile = headscale.profile(reference, **GIVEN)
    write_profile(profile, tmp_path / "reference.json")
    found = [
        headscale.calibrate(large, reference=given, **GIVEN)
        for given in (reference, str(reference), profile, tmp_path / "reference.json")
    ]
    assert len({f.scale for f in found}) == 1
    assert all(f.targets == found[0].targets for f in found)
    origins = [f.reference_origin for f in found]
    assert origins == ["measured", "cached profile", "given", f"profile `{tmp_path / 'reference.json'}`"]
    assert profile.weights.spectral_norm is not None


def test_the_spectral_norm_is_measured_when_it_is_to_be_matched(large: Path, reference: Path) -> None:
    found = headscale.calibrate(large, reference=reference, choice=Choice("norm", norm="spectral_norm"), **GIVEN)
    assert found.scale is not None
    assert found.targets[0].statistic == "spectral_norm"


@pytest.mark.parametrize("mode", ["auto", "untie", "fold"])
def test_what_is_saved_does_what_it_says(mode: str, large: Path, reference: Path, tmp_path: Path) -> None:
    before = digest(large)
    options = {"choice": Choice("activation"), "save": tmp_path / "out" / "saved", "mode": mode}
    found = headscale.calibrate(large, reference=reference, **options, **GIVEN)
    assert found.scale == 1 / 32
    assert found.written.mode == ("untie" if mode == "auto" else mode)
    assert all(proof.max_error <= 1e-5 for proof in found.written.proofs)
    assert len(found.written.proofs) >= 1
    assert digest(large) == before
    with torch.no_grad():
        old = loaded(large)[0].eval()(**tiny_batch()).logits
        new = loaded(tmp_path / "out" / "saved")[0].eval()(**tiny_batch()).logits
    assert torch.equal(new, found.scale * old)  # a power of two is exact
    again = headscale.inspect(tmp_path / "out" / "saved", **GIVEN)
    assert again.output.loss_over_ln_n == pytest.approx(found.after.loss_over_ln_n, rel=1e-4)
    assert again.output.document.active_dims == found.before.document.active_dims
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["saved"]


def test_what_goes_with_the_constant_lies_beside_it(large: Path, reference: Path, tmp_path: Path) -> None:
    choice = Choice(head_lr_multiplier=4.0, scale_bias=False, shift=True, snap=False)
    found = headscale.calibrate(large, reference=reference, choice=choice, save=tmp_path / "saved", **GIVEN)
    document = json.loads((tmp_path / "saved" / "headscale.json").read_text())
    assert document["schema"] == "headscale.checkpoint/1"
    assert document["source"] == {"name": str(large), "revision": None}
    assert (document["scale"], document["shift"]) == (found.scale, found.shift)
    assert (document["bias_policy"], document["mode"], document["match"]) == ("keep", "untie", found.match)
    assert (document["head_lr_multiplier"], document["advice"]) == (4.0, list(found.advice))
    assert document["reference"] == {"name": str(reference), "origin": "measured"}
    assert document["before"] == found.before.to_dict()
    assert document["after"] == found.after.to_dict()
    assert document["proofs"] == [p.to_dict() for p in found.written.proofs]
    assert document["env"]["packages"]["transformers"] == transformers.__version__
    assert document["texts"]["fingerprint"] == found.texts.fingerprint
    bias = loaded(large)[0].decoder.bias
    with torch.no_grad():
        old = loaded(large)[0].eval()(**tiny_batch()).logits
        new = loaded(tmp_path / "saved")[0].eval()(**tiny_batch()).logits
        expected = found.scale * (old - bias + found.shift) + bias
    assert float((new - expected).abs().max() / expected.abs().max()) < 1e-5


def test_a_shift_alone_needs_no_untied_copy(large: Path, reference: Path, tmp_path: Path) -> None:
    choice = Choice(shift=True)
    found = headscale.calibrate(large, reference=reference, choice=choice, save=tmp_path / "saved", **GIVEN)
    assert (found.scale, found.head_lr_multiplier, found.written.mode) == (1.0, 1.0, "fold")
    assert found.shift != 0
    old, new = (loaded(place)[0] for place in (large, tmp_path / "saved"))
    with torch.no_grad():
        moved = new.eval()(**tiny_batch()).logits - old.eval()(**tiny_batch()).logits
    assert torch.allclose(moved, torch.full_like(moved, found.shift), atol=1e-4)
    assert {k for k, _ in new.named_parameters()} == {k for k, _ in old.named_parameters()}


def test_nothing_is_written_where_no_constant_is_found(large: Path, reference: Path, tmp_path: Path) -> None:
    profile = headscale.profile(reference, **GIVEN)
    heavy = replace(profile.output, document=replace(profile.output.document, mean_weight=1e6))
    found = headscale.calibrate(
        large,
        reference=replace(profile, output=heavy),
        choice=Choice("activation"),
        save=tmp_path / "saved",
        **GIVEN,
    )
    assert (found.scale, found.written, found.verdict.word) == (None, None, "unmatched")
    assert not (tmp_path / "saved").exists()


def test_nor_over_the_input_nor_from_memory_nor_over_something_else(
    large: Path, reference: Path, tmp_path: Path
) -> None:
    before = digest(large)
    with pytest.raises(UsageError):
        headscale.calibrate(large, reference=reference, save=large, **GIVEN)
    with pytest.raises(UnsupportedHeadError, match="handed over in memory"):
        headscale.calibrate(*loaded(large), reference=reference, save=tmp_path / "saved", **GIVEN)
    headscale.calibrate(large, reference=reference, save=tmp_path / "saved", **GIVEN)
    kept = digest(tmp_path / "saved")
    with pytest.raises(UsageError):
        headscale.calibrate(large, reference=reference, save=tmp_path / "saved", **GIVEN)
    assert digest(tmp_path / "saved") == kept
    choice = Choice("constant", k=4.0)
    options = {"save": tmp_path / "saved", "overwrite": True, "choice": choice}
    assert headscale.calibrate(large, reference=reference, **options, **GIVEN).scale == 0.25
    assert json.loads((tmp_path / "saved" / "headscale.json").read_text())["scale"] == 0.25
    assert digest(large) == before


def test_an_id_is_saved_from_the_cache(large: Path, reference: Path, tmp_path: Path) -> None:
    name = in_hub_cache(large, tmp_path / "hub")
    found = headscale.calibrate(name, reference=reference, save=tmp_path / "saved", **GIVEN)
    assert found.revision == "c" * 40
    assert found.written.proofs[0].bitwise
    source = json.loads((tmp_path / "saved" / "headscale.json").read_text())["source"]
    assert source == {"name": name, "revision": "c" * 40}


def test_a_reference_that_is_not_here(large: Path) -> None:
    with pytest.raises(NotFoundError):
        headscale.calibrate(large, reference="someone/else", **GIVEN)


def test_references_are_measured_on_the_same_texts(reference: Path) -> None:
    texts = texts_of(PAIRS, "given", GIVEN["encoding"])
    found = find_reference(str(reference), texts, Loading())
    assert found.profile.texts == texts.settings
    assert found.profile.weights.spectral_norm is not None
    alone = find_reference(str(reference), None, Loading())
    assert (alone.profile.output, alone.profile.origin) == (None, "weights only")
    assert alone.profile.weights.spectral_norm == pytest.approx(found.profile.weights.spectral_norm, rel=1e-6)


def test_profile_is_what_a_file_of_it_holds(reference: Path, tmp_path: Path) -> None:
    profile = headscale.profile(reference, **GIVEN)
    write_profile(profile, tmp_path / "p.json")
    assert read_profile(tmp_path / "p.json") == profile
    assert (tmp_path / "p.json").stat().st_size < 20_000


def test_calibrate_in_a_run_folder_keeps_its_cell(large: Path, reference: Path, tmp_path: Path) -> None:
    texts = texts_of(PAIRS, "given", GIVEN["encoding"])
    options: dict[str, Any] = {
        "reference": find_reference(str(reference), texts, Loading()),
        "choice": Choice(),
        "loading": Loading(),
    }
    found = calibrate_in_run(str(large), texts, tmp_path / "run", save=tmp_path / "saved", **options)
    (cell,) = find_cells(tmp_path / "run", "calibrate")
    assert from_dict(Calibration, cell["result"]) == found
    assert found.written is not None
    calibrate_in_run(str(large), texts, tmp_path / "run", **{**options, "choice": Choice(snap=False)})
    assert len(list(find_cells(tmp_path / "run"))) == 2


# --- small things --------------------------------------------------------------------------------------------------


def test_identity_changes_with_what_a_name_stands_for(large: Path, tmp_path: Path) -> None:
    name = in_hub_cache(large, tmp_path / "hub")
    assert identity(name) == "c" * 40
    in_hub_cache(large, tmp_path / "hub", commit="d" * 40)
    assert identity(name) == "d" * 40
    assert identity(name, "c" * 40) == "c" * 40
    copied = Path(shutil.copytree(large, tmp_path / "copied"))
    first = identity(str(copied))
    (copied / "config.json").write_text((copied / "config.json").read_text() + " ")
    assert identity(str(copied)) != first
    json.dumps(first)


def test_plain_texts_become_pairs() -> None:
    assert halves(["a b c d e f", "one", "a b"]) == [Pair("a b", "c d e f"), Pair("one", "one"), Pair("a", "b")]
    assert halves([""]) == [Pair("", "")]


def test_what_is_fetched_is_told_and_progress_counted(large: Path) -> None:
    seen: list[tuple[int, int]] = []
    headscale.inspect(large, loading=Loading(on_batch=lambda i, n: seen.append((i, n))), **GIVEN)
    assert seen == [(1, 2), (2, 2)]


def test_the_verbs_are_there_and_nothing_else_is_made_up() -> None:
    for name in headscale.__all__:
        assert getattr(headscale, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'reinspect'"):
        _ = headscale.reinspect


def test_looking_at_weights_through_the_package_imports_no_torch(large: Path) -> None:
    code = (
        "import sys, headscale; headscale.inspect(sys.argv[1], weights_only=True);"
        "print([m for m in ('torch', 'transformers', 'scipy', 'pandas', 'matplotlib') if m in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code, str(large)], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout == "[]\n"
