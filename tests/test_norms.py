"""Norms of the head against plain float64 NumPy, from disk and from memory, and what reading them costs."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_stored import CAUSAL, TYPES
from tiny_models import VOCAB, tiny_model

from headscale.checkpoint import open_checkpoint
from headscale.errors import UnreadableError
from headscale.head import load_head
from headscale.norms import loaded_weight_statistics, stored_weight_statistics, weight_statistics
from headscale.records import ROW_NORM_QUANTILES, WeightStatistics
from headscale.stored import read_head

torch = pytest.importorskip("torch")

ROOT = Path(__file__).parents[1]
SPECIAL, UNUSED = {0, 1, 2, 3, 4}, {VOCAB - 1, VOCAB - 2, 77}


def oracle(
    matrix: np.ndarray,
    bias: np.ndarray | None,
    gain: np.ndarray | None,
    special: set[int] = SPECIAL,
    unused: set[int] = UNUSED,
) -> dict[str, Any]:
    """Every field in float64, from the definitions."""
    matrix = matrix.astype(np.float64)
    rows = np.array([math.sqrt(math.fsum(row * row)) for row in matrix])
    singular = np.linalg.svd(matrix, compute_uv=False)
    quantiles = [float(np.quantile(rows, q / 100)) for q in ROW_NORM_QUANTILES]
    expected: dict[str, Any] = {
        "frobenius": float(np.linalg.norm(matrix)),
        "rms": math.sqrt(np.mean(matrix**2)),
        "row_norm_mean": rows.mean(),
        "row_norm_sd": math.sqrt(np.mean((rows - rows.mean()) ** 2)),
        "row_norm_min": rows.min(),
        "row_norm_max": rows.max(),
        "row_norm_quantiles": tuple(quantiles),
        "special_rows": len(special),
        "special_row_norm_mean": np.mean([rows[i] for i in special]) if special else None,
        "unused_rows": len(unused),
        "unused_row_norm_mean": np.mean([rows[i] for i in unused]) if unused else None,
        "zero_rows": int(np.sum(~matrix.any(axis=1))),
        "bias_norm": None,
        "bias_mean": None,
        "bias_min": None,
        "bias_max": None,
        "gain_mean": None,
        "gain_rms": None,
        "effective_norm": float(np.linalg.norm(matrix)),
        "spectral_norm": singular[0],
        "stable_rank": np.linalg.norm(matrix) ** 2 / singular[0] ** 2,
        "singular_values": tuple(singular),
    }
    if bias is not None:
        b = bias.astype(np.float64)
        expected |= {"bias_norm": np.linalg.norm(b), "bias_mean": b.mean(), "bias_min": b.min(), "bias_max": b.max()}
    if gain is not None:
        g = gain.astype(np.float64)
        effective = np.linalg.norm(matrix @ np.diag(g))
        expected |= {"gain_mean": g.mean(), "gain_rms": math.sqrt(np.mean(g**2)), "effective_norm": effective}
    return expected


def assert_close(found: WeightStatistics, expected: dict[str, Any], tolerance: float = 1e-6) -> None:
    values = asdict(found)
    assert set(values) == set(expected)
    for name, value in expected.items():
        got = values[name]
        if value is None:
            assert got is None, name
        elif name == "singular_values":  # the smallest come from a Gram matrix: exact against the largest
            np.testing.assert_allclose(got, value, rtol=tolerance, atol=tolerance * value[0], err_msg=name)
        else:
            np.testing.assert_allclose(got, value, rtol=tolerance, atol=1e-12, err_msg=name)


def parts(model: Any) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
    """Matrix, bias and gain as the model multiplies with them, found by other means than the statistics'."""
    loaded = load_head(model)
    values = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    blocks = [values[name].detach().double().numpy() for name in loaded.head.matrix]
    blocks = [b if b.shape[0] == VOCAB else b.T for b in blocks]
    bias = None if loaded.head.bias is None else values[loaded.head.bias].detach().double().numpy().ravel()
    gain = None
    if loaded.head.norm is not None:
        weight = values[f"{loaded.head.norm}.weight"].detach().double().numpy()
        gain = 1.0 + weight if loaded.head.norm_kind == "one_plus" else weight
    return np.concatenate(blocks, axis=1), bias, gain


def from_disk(directory: Path, **options: Any) -> WeightStatistics:
    with open_checkpoint(directory) as checkpoint:
        return stored_weight_statistics(checkpoint, read_head(checkpoint), **options)


ROWS = {"special_ids": SPECIAL, "unused_ids": UNUSED, "spectral": True}


@pytest.mark.parametrize("model_type", TYPES)
def test_disk_and_memory_agree_with_float64(model_type: str, tmp_path: Path) -> None:
    model = tiny_model(model_type, CAUSAL.get(model_type))
    model.save_pretrained(tmp_path)
    expected = oracle(*parts(model))
    disk, memory = from_disk(tmp_path, **ROWS), loaded_weight_statistics(load_head(model), **ROWS)
    assert_close(disk, expected)
    assert_close(memory, asdict(disk), 1e-12)


@pytest.mark.parametrize("legacy", [True, False])
def test_deberta_both_ways(legacy: bool, tmp_path: Path) -> None:
    model = tiny_model("deberta-v2", legacy=legacy)
    model.save_pretrained(tmp_path)
    assert_close(from_disk(tmp_path, **ROWS), oracle(*parts(model)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("model_type", ["bert", "modernbert", "mobilebert", "gemma"])
def test_half_precision_files_are_measured_from_their_stored_values(
    model_type: str, dtype: Any, tmp_path: Path
) -> None:
    model = tiny_model(model_type, CAUSAL.get(model_type)).to(dtype)
    model.save_pretrained(tmp_path)
    assert_close(from_disk(tmp_path, **ROWS), oracle(*parts(model.float())))


@pytest.mark.parametrize("kind", ["sharded", "bin"])
def test_other_files(kind: str, tmp_path: Path) -> None:
    model = tiny_model("bert")
    if kind == "sharded":
        model.save_pretrained(tmp_path, max_shard_size="20KB")
    else:
        model.config.save_pretrained(tmp_path)
        torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    assert_close(from_disk(tmp_path, **ROWS), oracle(*parts(model)))


# --- the arithmetic ------------------------------------------------------------------------------------------------


def in_blocks(matrix: np.ndarray, rows: int) -> Any:
    return ((start, matrix[start : start + rows]) for start in range(0, len(matrix), rows))


@pytest.mark.parametrize("rows", [1, 7, 64, 1000])
def test_the_size_of_a_block_does_not_matter(rows: int) -> None:
    generator = np.random.default_rng(0)
    matrix = generator.normal(0.0, 0.05, (503, 24)).astype(np.float32)
    matrix[17] = matrix[400] = 0.0
    bias, gain = generator.normal(size=503).astype(np.float32), generator.normal(size=24).astype(np.float32)
    found = weight_statistics(
        in_blocks(matrix, rows), bias=bias, gain=gain, special_ids={3}, unused_ids=set(), spectral=True
    )
    expected = oracle(matrix, bias, gain, {3}, set())
    assert expected["zero_rows"] == 2
    assert_close(found, expected)


@pytest.mark.parametrize("size", [1e-25, 1e25])
def test_values_whose_squares_float32_cannot_hold(size: float) -> None:
    matrix = (np.random.default_rng(1).normal(size=(40, 6)) * size).astype(np.float32)
    found = weight_statistics(in_blocks(matrix, 16), bias=None, gain=None)
    assert found.frobenius == pytest.approx(np.linalg.norm(matrix.astype(np.float64)), rel=1e-12)
    assert found.zero_rows == 0


def test_fewer_terms_than_columns() -> None:
    matrix = np.random.default_rng(2).normal(size=(3, 20)).astype(np.float32)
    found = weight_statistics(in_blocks(matrix, 2), bias=None, gain=None, spectral=True)
    assert found.singular_values is not None
    np.testing.assert_allclose(found.singular_values[:3], np.linalg.svd(matrix.astype(np.float64))[1], rtol=1e-6)
    assert max(found.singular_values[3:]) < 1e-6 * found.singular_values[0]
    assert found.stable_rank == pytest.approx((found.frobenius / found.spectral_norm) ** 2)


def test_rows_out_of_range_and_no_rows_apart() -> None:
    matrix = np.eye(5, dtype=np.float32)
    found = weight_statistics(in_blocks(matrix, 5), bias=None, gain=None, special_ids={-1, 2, 99}, unused_ids={5})
    assert (found.special_rows, found.special_row_norm_mean) == (1, 1.0)
    assert (found.unused_rows, found.unused_row_norm_mean) == (0, None)
    assert found.spectral_norm is None


def test_a_matrix_of_zeros() -> None:
    found = weight_statistics(in_blocks(np.zeros((4, 3), np.float32), 4), bias=None, gain=None, spectral=True)
    assert (found.frobenius, found.zero_rows, found.stable_rank) == (0.0, 4, 0.0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("part", ["matrix", "bias", "feeding norm"])
def test_what_is_not_finite_is_refused_by_name(part: str, value: float) -> None:
    matrix, bias, gain = np.ones((9, 4), np.float32), np.ones(9, np.float32), np.ones(4, np.float32)
    {"matrix": matrix[7], "bias": bias, "feeding norm": gain}[part][2] = value
    with pytest.raises(UnreadableError, match=f"the {part} of the MLM head of `x` holds values that are not finite"):
        weight_statistics(in_blocks(matrix, 2), bias=bias, gain=gain, name="x")


def test_no_rows_at_all() -> None:
    with pytest.raises(UnreadableError, match="no rows"):
        weight_statistics(iter(()), bias=None, gain=None)


def test_a_nan_on_disk_is_refused(tmp_path: Path) -> None:
    model = tiny_model("distilbert")
    with torch.no_grad():
        model.vocab_layer_norm.weight[3] = math.nan
    model.save_pretrained(tmp_path)
    with pytest.raises(UnreadableError, match="feeding norm"):
        from_disk(tmp_path)


# --- what it costs -------------------------------------------------------------------------------------------------

HEAD_ROWS, WIDTH, OTHER_MB = 30_000, 512, 240
_MEASURE = """
import json, sys
from headscale.inspection import inspect_weights
def status(key):  # not getrusage: its peak is inherited from the process that started this one
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))
inspect_weights(sys.argv[2])  # imports and buffers that any checkpoint needs
before = status("VmRSS:")
found = inspect_weights(sys.argv[1])
peak = status("VmHWM:")
heavy = [m for m in ("torch", "transformers", "pandas", "scipy", "matplotlib") if m in sys.modules]
print(json.dumps({"growth": (peak - before) * 1024, "read": found.bytes_read, "heavy": heavy,
                  "frobenius": found.weights.frobenius}))
"""


def large_checkpoint(directory: Path) -> tuple[int, float]:
    """A BERT of 300 MB whose head is 61 MB of it; returns (bytes of the head and all headers, its norm)."""
    prefix = "cls.predictions"
    head = {
        "bert.embeddings.word_embeddings.weight": (HEAD_ROWS, WIDTH),
        f"{prefix}.bias": (HEAD_ROWS,),
        f"{prefix}.transform.LayerNorm.weight": (WIDTH,),
    }
    others = {
        f"{prefix}.transform.LayerNorm.bias": (WIDTH,),
        f"{prefix}.transform.dense.weight": (WIDTH, WIDTH),
        **{f"bert.layer.{i}.weight": (1 << 20, 12) for i in range(OTHER_MB // 48)},
    }
    entries, position = {}, 0
    for name, shape in {**head, **others}.items():
        size = 4 * math.prod(shape)
        entries[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [position, position + size]}
        position += size
    header = json.dumps(entries).encode()
    rows = np.random.default_rng(0).normal(size=(100, WIDTH)).astype(np.float32)
    with (directory / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for _ in range(HEAD_ROWS // 100):
            file.write(rows.tobytes())
        file.write(np.ones(HEAD_ROWS + WIDTH, np.float32).tobytes())
        file.truncate(8 + len(header) + position)  # sparse zeros: nothing reads them
    (directory / "config.json").write_text(
        json.dumps({"model_type": "bert", "architectures": ["BertForMaskedLM"], "vocab_size": HEAD_ROWS})
    )
    head_bytes = sum(4 * math.prod(shape) for shape in head.values())
    return head_bytes + 8 + len(header), float(np.linalg.norm(rows.astype(np.float64)) * math.sqrt(HEAD_ROWS // 100))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc")
def test_a_large_file_costs_its_head_in_bytes_and_a_few_blocks_in_memory(tmp_path: Path) -> None:
    small, large = tmp_path / "small", tmp_path / "large"
    tiny_model("bert").save_pretrained(small)
    large.mkdir()
    allowed, norm = large_checkpoint(large)
    assert (large / "model.safetensors").stat().st_size > 300e6
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(large), str(small)],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    found = json.loads(done.stdout)
    assert found["heavy"] == []
    assert found["read"] <= allowed
    assert found["frobenius"] == pytest.approx(norm, rel=1e-6)
    # Measured: 6.5 MB, a 1 MB block with its copy in float64 and what they are read through. The head has 61 MB.
    assert 0 < found["growth"] < 13e6
