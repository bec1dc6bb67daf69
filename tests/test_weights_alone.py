"""The constant from two heads' tensors: against numpy on the files, and the 1.2 GB of which it reads a few per cent."""

from __future__ import annotations

import json
import math
import shlex
import struct
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hub_server import HubServer, Repo
from safetensors.numpy import load_file
from test_cli_hub import headscale as run_headscale
from tiny_models import tiny_checkpoint, tiny_model, tiny_tokenizer

from headscale import Choice, calibrate, figures, inspect
from headscale.api import Loading, calibrate_in_run, find_reference, profile, write
from headscale.errors import UnsupportedHeadError, UsageError
from headscale.inspection import texts_of
from headscale.page.commands import calibrate_line
from headscale.page.story import calibrated_sentence
from headscale.profiles import Reference, from_dict, profile_of
from headscale.records import Calibration, Inspection, Target
from headscale.results import load
from headscale.tables import anatomy, sensitivity
from headscale.texts import Pair
from headscale.weights_alone import choose_by_weights

pytest.importorskip("torch")

PAIRS = [Pair(f"w{5 + i} w{40 + i}", f"w{40 + i} w{60 + i % 30} w{5 + i}") for i in range(32)]


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(tiny_checkpoint("modernbert", tmp_path_factory.mktemp("large"), hidden_size=64))


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(tiny_checkpoint("bert", tmp_path_factory.mktemp("reference"), seed=3, initializer_range=0.004))


def target(found: Calibration, name: str) -> Target:
    return next(one for one in found.targets if one.name == name)


def frobenius(directory: Path, *keys: str) -> float:
    tensors = load_file(directory / "model.safetensors")
    matrix = next(tensors[key] for key in keys if key in tensors)
    return float(np.sqrt(np.square(matrix.astype(np.float64)).sum()))


def own_norm(large: Path) -> float:
    return frobenius(large, "decoder.weight", "model.embeddings.tok_embeddings.weight")


def norm_of_reference(reference: Path) -> float:
    return frobenius(reference, "cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight")


# --- what is chosen ------------------------------------------------------------------------------------------------


def test_the_norm_decides_and_is_the_ratio_of_the_files_own(large: Path, reference: Path) -> None:
    found = calibrate(large, reference=reference, weights_only=True)
    ratio = norm_of_reference(reference) / own_norm(large)
    assert found.match == "norm"
    assert target(found, "norm").scale == pytest.approx(ratio, rel=1e-6)
    assert found.scale == 2.0 ** round(math.log2(ratio)) < 1
    assert found.verdict.word == "matched"
    assert found.verdict.value == pytest.approx(found.scale / ratio, rel=1e-6)
    assert "the outputs were not seen" in found.verdict.evidence
    assert any("reports/study.md" in one for one in found.warnings)
    exact = calibrate(large, reference=reference, weights_only=True, choice=Choice("norm", snap=False))
    assert (exact.scale, exact.match_reason) == (target(found, "norm").scale, "as asked")


def test_what_needs_outputs_is_empty(large: Path, reference: Path) -> None:
    found = calibrate(large, reference=reference, weights_only=True)
    assert (found.curve, found.texts, found.before, found.after) == (None, None, None, None)
    assert (found.lambda_advice.query, found.lambda_advice.document, found.shift) == (None, None, 0.0)
    for name in ("activation", "score", "loss"):
        assert (target(found, name).scale, target(found, name).note) == (None, "the outputs were not seen")
    assert all(one.loss_over_ln_n is None and one.score_sd is None for one in found.targets)
    json.dumps(found.to_dict(), allow_nan=False)
    assert from_dict(Calibration, json.loads(json.dumps(found.to_dict()))) == found


@pytest.mark.parametrize("norm", ["frobenius", "row_norm_mean", "effective_norm", "spectral_norm"])
def test_every_norm_is_the_one_that_a_whole_calibration_finds(norm: str, large: Path, reference: Path) -> None:
    choice = Choice("norm", norm)
    alone = calibrate(large, reference=reference, weights_only=True, choice=choice)
    whole = calibrate(large, reference=reference, pairs=PAIRS, choice=choice)
    assert alone.scale == whole.scale
    assert alone.head_lr_multiplier == whole.head_lr_multiplier
    assert [one.name for one in alone.targets if one.scale] == [
        one.name for one in whole.targets if one.scale and one.name not in ("activation", "score", "loss")
    ]
    assert target(alone, "norm").scale == pytest.approx(target(whole, "norm").scale, rel=1e-5)


@pytest.mark.parametrize(("match", "scale"), [("constant", 1 / 10), ("width", 2.0 ** round(-0.25 * math.log2(64)))])
def test_what_looks_at_no_tensor(match: str, scale: float, large: Path, reference: Path) -> None:
    found = calibrate(large, reference=reference, weights_only=True, choice=Choice(match, k=10.0))
    assert found.scale == pytest.approx(scale)
    assert found.verdict.word == "matched"
    assert "was given, not matched; the outputs were not seen" in found.verdict.evidence


def test_however_backbone_and_reference_are_given(large: Path, reference: Path) -> None:
    import torch

    by_path = calibrate(large, reference=reference, weights_only=True)
    model = tiny_model("modernbert", hidden_size=64)
    before = [p.detach().clone() for p in model.parameters()]
    in_memory = calibrate(model, tiny_tokenizer(), reference=reference, weights_only=True)
    assert in_memory.scale == by_path.scale
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    measured = profile(reference, pairs=PAIRS)
    assert measured.output is not None
    from_profile = calibrate(large, reference=measured, weights_only=True)
    assert from_profile.scale == by_path.scale
    assert target(from_profile, "activation").target == measured.output.document.mean_weight  # a goal, no solution
    bundled = calibrate("bundled:tiny-modernbert", reference="bundled:tiny-bert", weights_only=True)
    assert bundled.reference == "bundled:tiny-bert"
    assert bundled.verdict.word == "matched"


# --- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        (Choice("loss"), "`--match loss` needs the outputs"),
        (Choice("activation"), "`--match activation` needs the outputs"),
        (Choice("score", shift=True), "`--match score` needs the outputs; `--shift` needs the outputs"),
        (Choice("norm", shift=True), "`--shift` needs the outputs"),
    ],
)
def test_what_needs_outputs_is_refused(choice: Choice, words: str, large: Path, reference: Path) -> None:
    with pytest.raises(UsageError) as caught:
        calibrate(large, reference=reference, weights_only=True, choice=choice)
    assert caught.value.message == f"{words}: `--weights-only` reads the head's tensors alone"
    assert caught.value.hint == "leave out `--weights-only` or match norm, constant or width"


@pytest.mark.parametrize(("match", "kept"), [("auto", "norm"), ("constant", "constant")])
def test_saving_is_refused_and_the_way_to_it_keeps_the_constant(
    match: str, kept: str, large: Path, reference: Path, tmp_path: Path
) -> None:
    arguments: dict[str, Any] = {"reference": reference, "choice": Choice(match)}
    with pytest.raises(UsageError, match="`--save` needs the whole model") as caught:
        calibrate(large, weights_only=True, save=tmp_path / "out", **arguments)
    assert caught.value.hint == f"leave out `--weights-only` (`--match {kept}` keeps the constant)"
    assert not (tmp_path / "out").exists()
    alone = calibrate(large, weights_only=True, **arguments)
    assert f"`--match {kept} --save DIR` without `--weights-only`" in alone.advice[0]
    line = shlex.split(calibrate_line(alone, "out"))
    assert line[line.index("--match") + 1] == kept
    assert "--weights-only" not in line
    assert "--weights-only" in shlex.split(calibrate_line(alone))
    whole = calibrate(large, pairs=PAIRS, reference=reference, choice=Choice(kept))
    assert (whole.scale, whole.shift) == (alone.scale, alone.shift)


def test_a_chosen_constant_can_still_be_written_from_python(large: Path, reference: Path, tmp_path: Path) -> None:
    found = calibrate(large, reference=reference, weights_only=True)
    written = write(Loading().open(large), found, tmp_path / "out")
    assert written.proofs
    kept = json.loads((tmp_path / "out" / "headscale.json").read_text())
    assert (kept["scale"], kept["texts"], kept["before"], kept["after"]) == (found.scale, None, None, None)


def test_heads_that_no_constant_multiplies_and_norms_of_zero(large: Path, reference: Path) -> None:
    inspection = inspect(large, weights_only=True)
    other = Reference(profile_of(inspect(reference, weights_only=True)), "given")
    capped = replace(inspection, head=replace(inspection.head, softcap=30.0))
    with pytest.raises(UnsupportedHeadError, match="softcapped"):
        choose_by_weights(capped, other)
    nothing = replace(inspection, weights=replace(inspection.weights, frobenius=0.0))
    found = choose_by_weights(nothing, other)
    assert (found.scale, found.verdict.word, found.advice) == (None, "unmatched", ())
    assert found.verdict.evidence == "a norm of zero cannot be matched"


# --- what others make of it ----------------------------------------------------------------------------------------


def test_results_tables_and_page_take_it(large: Path, reference: Path, tmp_path: Path) -> None:
    loading, run = Loading(), tmp_path / "run"
    other = find_reference(str(reference), None, loading)
    alone = calibrate_in_run(str(large), None, run, reference=other, choice=Choice(), loading=loading)
    results = load([run])
    assert results.calibrations == (alone,)
    assert anatomy(results).empty
    assert sensitivity(results).empty
    assert calibrated_sentence(alone).endswith("by the target `norm`; its outputs were not seen.")
    with pytest.raises(UsageError, match="nothing to draw"):
        figures.curves_of_constants([alone])
    texts = texts_of(PAIRS, "given")
    whole = calibrate_in_run(str(large), texts, run, reference=other, choice=Choice("constant"), loading=loading)
    assert load([run]).calibrations == (alone, whole)  # the last counts where one is shown


def test_no_torch_is_imported(large: Path, reference: Path, tmp_path: Path) -> None:
    import os
    import subprocess

    code = (
        "import sys, headscale; headscale.calibrate(sys.argv[1], reference=sys.argv[2], weights_only=True);"
        "print([m for m in ('torch', 'transformers', 'scipy', 'pandas', 'matplotlib') if m in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "HEADSCALE_CACHE": str(tmp_path)}
    command = [sys.executable, "-c", code, str(large), str(reference)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert done.stdout == "[]\n"


# --- 1.2 GB on a hub -----------------------------------------------------------------------------------------------

VOCAB, WIDTH, INTERMEDIATE, LAYERS, SHARDS = 8192, 1024, 2624, 25, 5
Sharded = tuple[Path, float, Counter[str]]  # the directory, the norm of its head, the bytes of each shard that count
HEAD = {
    "decoder.bias": (VOCAB,),
    "head.dense.weight": (WIDTH, WIDTH),
    "head.norm.weight": (WIDTH,),
    "model.embeddings.tok_embeddings.weight": (VOCAB, WIDTH),
}


def layer(i: int) -> dict[str, tuple[int, ...]]:
    """The matrices of a layer as ModernBERT-large has them."""
    return {
        f"model.layers.{i}.attn.Wqkv.weight": (3 * WIDTH, WIDTH),
        f"model.layers.{i}.attn.Wo.weight": (WIDTH, WIDTH),
        f"model.layers.{i}.mlp.Wi.weight": (2 * INTERMEDIATE, WIDTH),
        f"model.layers.{i}.mlp.Wo.weight": (WIDTH, INTERMEDIATE),
    }


def write_shard(file: Path, shapes: dict[str, tuple[int, ...]], content: dict[str, np.ndarray]) -> int:
    """A safetensors file of zeros that take no space on disk, but for some tensors; returns its header's size."""
    entries, end, places = {}, 0, {}
    for name, shape in shapes.items():
        places[name], end = end, end + 4 * math.prod(shape)
        entries[name] = {"dtype": "F32", "shape": shape, "data_offsets": [places[name], end]}
    header = json.dumps({"__metadata__": {"format": "pt"}, **entries}).encode()
    header += b" " * (-len(header) % 8)
    with file.open("wb") as out:
        out.write(struct.pack("<Q", len(header)) + header)
        for name, values in content.items():
            out.seek(8 + len(header) + places[name])
            out.write(values.astype("<f4").tobytes())
        out.truncate(8 + len(header) + end)
    return 8 + len(header)


@pytest.fixture(scope="module", params=["tied", "untied"])
def sharded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Sharded:
    """A ModernBERT of 1.2 GB in five shards, its head's norm, and the bytes of each shard that count."""
    directory = tmp_path_factory.mktemp(request.param)
    shapes: list[dict[str, tuple[int, ...]]] = [{} for _ in range(SHARDS)]
    for i in range(LAYERS):
        shapes[i % SHARDS] |= layer(i)
    first, last = shapes[0], shapes[-1]
    matrix = "model.embeddings.tok_embeddings.weight" if request.param == "tied" else "decoder.weight"
    first["model.embeddings.tok_embeddings.weight"] = (VOCAB, WIDTH)
    last |= {n: HEAD[n] for n in ("head.dense.weight", "head.norm.weight", "decoder.bias")}
    if request.param == "untied":
        last["decoder.weight"] = (VOCAB, WIDTH)
    random = np.random.default_rng(0)
    values = {
        matrix: random.standard_normal((VOCAB, WIDTH), np.float32),
        "decoder.bias": random.standard_normal(VOCAB, np.float32),
        "head.norm.weight": np.ones(WIDTH, np.float32),
    }
    needed: Counter[str] = Counter()
    weight_map: dict[str, str] = {}
    for i, held in enumerate(shapes):
        name = f"model-{i + 1:05d}-of-{SHARDS:05d}.safetensors"
        weight_map |= dict.fromkeys(held, name)
        read = {n: v for n, v in values.items() if n in held}
        needed[name] = write_shard(directory / name, held, read) + sum(v.nbytes for v in read.values())
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {"model_type": "modernbert", "architectures": ["ModernBertForMaskedLM"], "vocab_size": VOCAB,
              "hidden_size": WIDTH, "tie_word_embeddings": request.param == "tied"}  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))
    tiny_tokenizer().save_pretrained(directory)
    return directory, float(np.linalg.norm(values[matrix].astype(np.float64))), needed


@pytest.fixture
def hub(sharded: Sharded, reference: Path) -> Iterator[HubServer]:
    with HubServer({"lab/sharded": Repo(sharded[0]), "lab/reference": Repo(reference)}) as server:
        yield server


def sent_weights(server: HubServer) -> Counter[str]:
    found = Counter({file: size for file, size in server.sent.items() if file.endswith(".safetensors")})
    server.sent.clear()
    return found


def test_of_a_sharded_checkpoint_on_the_hub_only_headers_and_the_head_are_fetched(
    hub: HubServer, sharded: Sharded, reference: Path, tmp_path: Path
) -> None:
    directory, norm, needed = sharded
    files = sorted(directory.glob("*.safetensors"))
    assert sum(file.stat().st_size for file in files) > 1.2e9
    assert sum(file.stat().st_blocks * 512 for file in files) < 50e6  # the rest are holes
    arguments = ("--weights-only", "--reference", "lab/reference", "--json")

    done = run_headscale(hub, tmp_path, "inspect", "lab/sharded", *arguments)
    assert done.returncode == 0, done.stderr
    inspection = from_dict(Inspection, json.loads(done.stdout)["results"][0])
    assert inspection.weights.frobenius == pytest.approx(norm, rel=1e-6)
    assert inspection.bytes_read == sum(needed.values())
    sent = sent_weights(hub)
    of_reference = sent.pop("model.safetensors")
    assert sent == needed
    assert of_reference < (reference / "model.safetensors").stat().st_size / 2

    done = run_headscale(hub, tmp_path, "calibrate", "lab/sharded", *arguments)
    assert done.returncode == 0, done.stderr
    found = from_dict(Calibration, json.loads(done.stdout)["results"][0])
    assert target(found, "norm").scale == pytest.approx(norm_of_reference(reference) / norm, rel=1e-6)
    assert found.revision == hub.repos["lab/sharded"].commit
    assert sent_weights(hub) == needed  # the reference's profile was kept
    assert "the outputs were not seen" in done.stderr
    assert not list((tmp_path / "hf").rglob("*.safetensors"))


def test_a_refusal_comes_before_anything_is_fetched(hub: HubServer, tmp_path: Path) -> None:
    done = run_headscale(hub, tmp_path, "calibrate", "lab/sharded", "--weights-only", "--save", "out")
    assert done.returncode == 2
    assert "error: `--save` needs the whole model" in done.stderr
    assert "hint: leave out `--weights-only` (`--match norm` keeps the constant)" in done.stderr
    assert not hub.requests
    assert not (tmp_path / "out").exists()
