"""Local checkpoints: values against torch and the safetensors library, damage of every kind, memory and imports."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import tarfile
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from headscale.checkpoint import Checkpoint, open_checkpoint
from headscale.errors import HeadscaleError, NotFoundError, UnreadableError, UsageError

ROOT = Path(__file__).parents[1]


def some_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "bert.embeddings.word_embeddings.weight": normal(301, 17),
        "bert.embeddings.position_ids": torch.arange(12),
        "half": normal(40, 6).half(),
        "brain": normal(33, 5).bfloat16(),
        "double": normal(3, 4).double(),
        "vector": normal(70),
        "scalar": torch.tensor(3.25),
        "cube": normal(4, 3, 2),
        "empty": torch.zeros(0, 5),
    }


def expected(tensor: torch.Tensor) -> np.ndarray:
    return tensor.to(torch.float64 if tensor.dtype == torch.float64 else torch.float32).numpy()


def save(directory: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config or {"model_type": "bert"}))
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def save_shards(directory: Path, tensors: dict[str, torch.Tensor], suffix: str = "safetensors") -> Path:
    """Two shards and their index, as transformers lays them out."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text('{"model_type": "bert"}')
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    names, weight_map = list(tensors), {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"{stem}-0000{number}-of-00002.{suffix}"
        chosen = {name: tensors[name] for name in part}
        weight_map |= dict.fromkeys(part, file)
        if suffix == "safetensors":
            save_file(chosen, directory / file, metadata={"format": "pt"})
        else:
            torch.save(chosen, directory / file)
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    return directory


def assert_same_values(checkpoint: Checkpoint, tensors: dict[str, torch.Tensor]) -> None:
    assert set(checkpoint.tensors) == set(tensors)
    for name, tensor in tensors.items():
        assert checkpoint.tensors[name].shape == tuple(tensor.shape)
        if tensor.is_floating_point():
            got = checkpoint.tensor(name)
            assert got.dtype == expected(tensor).dtype
            assert got.shape == tuple(tensor.shape)
            np.testing.assert_array_equal(got, expected(tensor), err_msg=name)


@pytest.mark.parametrize("layout", ["single", "shards", "bin", "old bin", "bin shards"])
def test_every_layout_gives_the_values_that_torch_saved(tmp_path: Path, layout: str) -> None:
    tensors = some_tensors()
    if layout == "single":
        save(tmp_path, tensors)
    elif layout in ("shards", "bin shards"):
        save_shards(tmp_path, tensors, "safetensors" if layout == "shards" else "bin")
    else:
        (tmp_path / "config.json").write_text('{"model_type": "bert"}')
        torch.save(tensors, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=layout == "bin")
    with open_checkpoint(tmp_path) as checkpoint:
        assert (checkpoint.origin, checkpoint.revision, checkpoint.directory) == ("local", None, tmp_path)
        assert checkpoint.config == {"model_type": "bert"}
        assert_same_values(checkpoint, tensors)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_half_precision_bit_pattern_is_exact(tmp_path: Path, dtype: torch.dtype) -> None:
    patterns = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype).reshape(256, 256)
    save(tmp_path, {"all": patterns})
    with open_checkpoint(tmp_path) as checkpoint:
        got = checkpoint.tensor("all")
    want = patterns.float().numpy()
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
    finite = ~np.isnan(want)
    np.testing.assert_array_equal(got.view(np.uint32)[finite], want.view(np.uint32)[finite])  # signed zeros too


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("max_bytes", [1, 17 * 4 * 10, 4 << 20])
def test_blocks_are_bounded_in_order_and_independent(tmp_path: Path, kind: str, max_bytes: int) -> None:
    tensors = some_tensors()
    save(tmp_path, tensors)
    if kind == "bin":
        (tmp_path / "model.safetensors").unlink()
        torch.save(tensors, tmp_path / "pytorch_model.bin")
    name = "bert.embeddings.word_embeddings.weight"
    with open_checkpoint(tmp_path) as checkpoint:
        blocks = list(checkpoint.row_blocks(name, max_bytes=max_bytes))
        cube = [(first, block.copy()) for first, block in checkpoint.row_blocks("cube", max_bytes=1)]
        vector = list(checkpoint.row_blocks("vector", max_bytes=1))
        scalar = list(checkpoint.row_blocks("scalar"))
    assert [first for first, _ in blocks] == list(np.cumsum([0, *(len(block) for _, block in blocks)])[:-1])
    assert all(block.nbytes <= max(max_bytes, 17 * 4) for _, block in blocks)
    np.testing.assert_array_equal(np.concatenate([block for _, block in blocks]), tensors[name].numpy())
    blocks[0][1][:] = 0  # a block is the caller's own: the file and later reads do not change
    with open_checkpoint(tmp_path) as checkpoint:
        np.testing.assert_array_equal(checkpoint.tensor(name), tensors[name].numpy())
    assert [(first, block.shape) for first, block in cube] == [(row, (1, 3, 2)) for row in range(4)]
    assert [block.shape for _, block in vector] == [(1, 70)]
    assert [block.shape for _, block in scalar] == [(1, 1)]


def test_only_the_header_and_the_tensors_asked_for_are_read(tmp_path: Path) -> None:
    tensors = some_tensors()
    save_shards(tmp_path, tensors)
    headers = 0
    for shard in tmp_path.glob("*.safetensors"):
        headers += 8 + struct.unpack("<Q", shard.read_bytes()[:8])[0]
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.bytes_read == headers
        checkpoint.tensor("half")
        checkpoint.tensor("vector")
        assert checkpoint.bytes_read == headers + 40 * 6 * 2 + 70 * 4
        for name, info in checkpoint.tensors.items():  # the ranges are absolute: the file alone confirms them
            raw = (tmp_path / info.file).read_bytes()[info.start : info.end]
            assert raw == bytes(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy()), name


def test_raw_blocks_are_the_stored_bytes_of_any_dtype(tmp_path: Path) -> None:
    tensors = some_tensors() | {"strided": torch.arange(12.0).reshape(3, 4).T, "flags": torch.tensor([True, False])}
    for directory in (tmp_path / "a", tmp_path / "b"):
        directory.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "a/model.safetensors")
    torch.save(tensors, tmp_path / "b/pytorch_model.bin")
    for directory in (tmp_path / "a", tmp_path / "b"):
        with open_checkpoint(directory) as checkpoint:
            for name, tensor in tensors.items():
                raw = b"".join(bytes(block) for block in checkpoint.raw_blocks(name, max_bytes=64))
                assert raw == bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy()), name


def test_quantised_and_integer_tensors_are_listed_but_not_read_as_floats(tmp_path: Path) -> None:
    tensors = {"q": torch.ones(2, 2).to(torch.float8_e4m3fn), "i": torch.ones(2, 2, dtype=torch.int8)}
    save(tmp_path, tensors)
    with open_checkpoint(tmp_path) as checkpoint:
        for name, dtype in (("q", "F8_E4M3"), ("i", "I8")):
            with pytest.raises(UnreadableError, match=f"`{name}` .*{dtype}") as caught:
                checkpoint.tensor(name)
            assert "dequantise" in caught.value.hint
    with open_checkpoint(tmp_path) as checkpoint, pytest.raises(NotFoundError, match="no tensor `nope`"):
        checkpoint.tensor("nope")


# ---- damage -------------------------------------------------------------------------------------------------------


def raw_file(header: Any, data: bytes = b"\0" * 16) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(start: int, end: int, shape: list[Any] | None = None, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape or [(end - start) // 4], "data_offsets": [start, end]}


DAMAGED = {
    "no header": (b"abc", "truncated"),
    "empty": (b"", "truncated"),
    "header longer than the file": ((1000).to_bytes(8, "little") + b"{}", "truncated"),
    "absurd header length": (b"\xff" * 16, "not a safetensors file"),
    "git-lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git-lfs pointer"),
    "not JSON": (raw_file(b"{not json}  "), "garbled"),
    "not UTF-8": (raw_file(b'{"\xff\xfe": 1}'), "garbled"),
    "deep JSON": (raw_file(b"[" * 100_000), "garbled"),
    "a list": (raw_file([1]), "garbled"),
    "an entry that is no object": (raw_file({"a": 3}), "garbled"),
    "no dtype": (raw_file({"a": {"shape": [4], "data_offsets": [0, 16]}}), "garbled"),
    "a negative shape": (raw_file({"a": entry(0, 16, [-2, -2])}), "impossible"),
    "a fractional offset": (raw_file({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0.0, 16]}}), "impossible"),
    "a reversed range": (raw_file({"a": entry(16, 0, [4])}), "impossible"),
    "a size that is not the shape's": (raw_file({"a": entry(0, 16, [5])}), "cannot take 16 bytes"),
    "overlap": (raw_file({"a": entry(0, 12), "b": entry(8, 16)}), "`b` overlaps"),
    "gap": (raw_file({"a": entry(0, 4), "b": entry(8, 16)}), "`b` leaves a gap"),
    "data cut off": (raw_file({"a": entry(0, 16)}, b"\0" * 15), "truncated"),
    "range far outside": (raw_file({"a": entry(0, 4 << 40)}), "truncated"),
    "bytes left over": (raw_file({"a": entry(0, 16)}, b"\0" * 17), "1 bytes follow"),
    "a key twice": (raw_file(b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},"a":3}'), "garbled"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_file_is_one_sentence_and_a_hint(tmp_path: Path, case: str) -> None:
    content, words = DAMAGED[case]
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(UnreadableError, match=words) as caught:
        open_checkpoint(tmp_path)
    assert "`model.safetensors`" in caught.value.message
    assert caught.value.hint
    with pytest.raises(Exception):  # noqa: B017, PT011 - the library's own verdict, whatever its class
        safe_open(tmp_path / "model.safetensors", "np").__enter__()


def test_a_file_cut_anywhere_is_called_truncated(tmp_path: Path) -> None:
    whole = (save(tmp_path / "whole", some_tensors()) / "model.safetensors").read_bytes()
    for length in (*range(0, 64, 7), *range(64, len(whole), 997), len(whole) - 1):
        (tmp_path / "model.safetensors").write_bytes(whole[:length])
        with pytest.raises(UnreadableError, match="truncated"):
            open_checkpoint(tmp_path)


def test_what_the_library_refuses_is_refused_and_what_is_accepted_reads_the_same(tmp_path: Path) -> None:
    """Random edits of a header: never more trusting than the safetensors library, and never another value."""
    whole = bytearray(
        (save(tmp_path / "w", {"a": torch.ones(3, 2), "b": torch.ones(4)}) / "model.safetensors").read_bytes()
    )
    header = struct.unpack("<Q", whole[:8])[0]
    random, accepted = np.random.default_rng(0), 0
    for _ in range(1500):
        bad = bytearray(whole)
        for _ in range(random.integers(1, 3)):
            bad[8 + random.integers(header)] = random.choice(list(b'0123456789[]{},:"FB16abc '))
        path = tmp_path / "model.safetensors"
        path.write_bytes(bad)
        try:
            with open_checkpoint(tmp_path) as checkpoint:
                values = {
                    name: (checkpoint.tensors[name].dtype, checkpoint.tensors[name].shape)
                    for name in checkpoint.tensors
                }
        except UnreadableError:
            continue
        accepted += 1
        with safe_open(path, "np") as library:
            slices = {name: library.get_slice(name) for name in library.keys()}  # noqa: SIM118
            assert values == {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
    assert accepted >= 50  # 69 with this seed (renamed tensors and the like): the comparison did take place


def test_a_file_that_shrinks_while_it_is_read_is_noticed(tmp_path: Path) -> None:
    save(tmp_path, {"a": torch.ones(1000, 100)})
    with open_checkpoint(tmp_path) as checkpoint:
        os.truncate(tmp_path / "model.safetensors", 5000)
        with pytest.raises(UnreadableError, match="truncated"):
            checkpoint.tensor("a")


class Payload:
    """Runs a command when it is unpickled carelessly."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_malicious_pickle_is_refused_and_nothing_runs(tmp_path: Path, zipped: bool) -> None:
    marker = tmp_path / "executed"
    content = {"weight": torch.ones(2), "payload": Payload(marker)}
    torch.save(content, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UnreadableError, match=r"more than plain tensors.*system") as caught:
        open_checkpoint(tmp_path)
    assert "safetensors" in caught.value.hint
    assert not marker.exists()
    torch.load(tmp_path / "pytorch_model.bin", weights_only=False)
    assert marker.exists()  # the payload was live


def damaged_bins(tmp_path: Path) -> dict[str, bytes]:
    good = tmp_path / "good.bin"
    torch.save({"a": torch.ones(100, 100)}, good)
    whole = good.read_bytes()
    torch.save([1, 2], good)
    listed = good.read_bytes()
    with tarfile.open(good, "w") as archive:
        archive.add(__file__, "pickle")
    return {
        "empty": b"",
        "cut": whole[: len(whole) // 2],
        "cut at the end": whole[:-30],
        "garbage": b"garbage" * 100,
        "zip of nothing": b"PK\x03\x04" + b"\0" * 100,
        "a list": listed,
        "legacy tar": good.read_bytes(),
        "git-lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    }


@pytest.mark.parametrize(
    "case", ["empty", "cut", "cut at the end", "garbage", "zip of nothing", "a list", "legacy tar", "git-lfs pointer"]
)
def test_a_damaged_bin_is_one_sentence_and_a_hint(tmp_path: Path, case: str) -> None:
    content = damaged_bins(tmp_path)[case]
    (tmp_path / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(UnreadableError, match=r"`pytorch_model\.bin`") as caught:
        open_checkpoint(tmp_path)
    assert caught.value.hint
    assert "\n" not in caught.value.message


def test_damaged_indices_and_configurations(tmp_path: Path) -> None:
    def fresh(name: str) -> tuple[Path, dict[str, Any]]:
        directory = save_shards(tmp_path / name, some_tensors())
        return directory, json.loads((directory / "model.safetensors.index.json").read_text())

    directory, index = fresh("missing")
    (directory / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(NotFoundError, match="lacks 1 of 2 weight files, among them `model-00002"):
        open_checkpoint(directory)

    shard = "model-00001-of-00002.safetensors"
    for case, added, words in (
        ("escape", {"half": "../secret.safetensors"}, "outside the checkpoint"),
        ("absolute", {"half": "/etc/passwd"}, "outside the checkpoint"),
        ("number", {"half": 3}, "outside the checkpoint"),
        ("promise", {"ghost": shard}, "promises `ghost`"),
        ("mapless", None, "no `weight_map`"),
    ):
        directory, index = fresh(case)
        index["weight_map"] = None if added is None else index["weight_map"] | added
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(UnreadableError, match=words):
            open_checkpoint(directory)

    for case, text in (("cut", b'{"a": '), ("binary", b"\xff\xfe\x00"), ("list", b"[1]")):
        directory = save(tmp_path / f"config {case}", some_tensors())
        (directory / "config.json").write_bytes(text)
        with pytest.raises(UnreadableError, match=r"`config\.json`"):
            open_checkpoint(directory)


# ---- names and folders --------------------------------------------------------------------------------------------


def test_paths_that_do_not_exist_are_told_as_paths(tmp_path: Path) -> None:
    save(tmp_path / "my-model", some_tensors())
    for name in (tmp_path / "my-modle", f"{tmp_path}/my-modle", "./nope", "nope.safetensors", "a/b/c", "nope/"):
        with pytest.raises(NotFoundError, match="no file or directory"):
            open_checkpoint(name)
    with pytest.raises(NotFoundError) as caught:
        open_checkpoint(f"{tmp_path}/my-modle")
    assert caught.value.hint == f"did you mean `{tmp_path}/my-model`?"


def test_a_directory_without_weights_says_what_it_holds(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="holds no model weights"):
        open_checkpoint(tmp_path)
    (tmp_path / "tf_model.h5").touch()
    with pytest.raises(NotFoundError, match=r"only `tf_model.h5`"):
        open_checkpoint(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(NotFoundError, match="only an adapter"):
        open_checkpoint(tmp_path)


def test_a_weights_file_can_be_named_itself(tmp_path: Path) -> None:
    save(tmp_path, some_tensors())
    (tmp_path / "model.safetensors").rename(tmp_path / "other.safetensors")
    with open_checkpoint(tmp_path / "other.safetensors") as checkpoint:
        assert checkpoint.config["model_type"] == "bert"
        assert_same_values(checkpoint, some_tensors())
    with pytest.raises(UsageError, match="not a weights file"):
        open_checkpoint(tmp_path / "config.json")


def test_safetensors_are_preferred_and_tilde_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    save(tmp_path / "m", some_tensors())
    (tmp_path / "m/pytorch_model.bin").write_bytes(b"garbage")
    with open_checkpoint("~/m") as checkpoint:
        assert checkpoint.weight_files == ("model.safetensors",)
        assert checkpoint.is_safetensors


@pytest.mark.parametrize(
    ("folder", "modules"),
    [
        ("", [("", "sentence_transformers.models.Transformer"), ("1_Pooling", "sentence_transformers.models.Pooling")]),
        ("0_MLMTransformer", [("0_MLMTransformer", "sentence_transformers.sparse_encoder.models.MLMTransformer")]),
        ("0_Transformer", [("0_Transformer", "sentence_transformers.base.modules.transformer.Transformer")]),
        ("document_0_MLMTransformer", [("", "sentence_transformers.models.Router")]),
    ],
)
def test_the_transformer_of_a_sentence_transformers_folder_is_found(
    tmp_path: Path, folder: str, modules: list[tuple[str, str]]
) -> None:
    save(tmp_path / folder, some_tensors())
    listed = [{"idx": n, "name": str(n), "path": path, "type": kind} for n, (path, kind) in enumerate(modules)]
    (tmp_path / "modules.json").write_text(json.dumps(listed))
    router = {
        "types": {"query_0_SparseStaticEmbedding": "x.SparseStaticEmbedding", folder: "x.MLMTransformer"},
        "structure": {"query": ["query_0_SparseStaticEmbedding"], "document": [folder, "document_1_SpladePooling"]},
    }
    if folder.startswith("document"):
        (tmp_path / "router_config.json").write_text(json.dumps(router))
    (tmp_path / "README.md").write_text("hello")
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.subfolder == folder
        assert checkpoint.directory == tmp_path / folder
        assert checkpoint.root == tmp_path
        assert checkpoint.has_file("config.json")
        assert checkpoint.has_file("README.md")  # from the root where the model's folder has none
        assert not checkpoint.has_file("nope.json")
        assert checkpoint.read_json("nope.json") is None
        assert set(checkpoint.filenames()) >= {"config.json", "model.safetensors"}
        assert checkpoint.file("README.md").read_text() == "hello"
        assert_same_values(checkpoint, some_tensors())


def test_bundled_names_go_to_the_bundled_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "tiny", some_tensors())
    module = types.ModuleType("headscale.bundled")
    module.path = lambda name: tmp_path / name  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "headscale.bundled", module)
    import headscale

    monkeypatch.setattr(headscale, "bundled", module, raising=False)
    with open_checkpoint("bundled:tiny") as checkpoint:
        assert checkpoint.name == "bundled:tiny"
        assert checkpoint.origin == "local"
        assert_same_values(checkpoint, some_tensors())


def test_an_unreadable_directory_entry_is_an_error_of_ours(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(HeadscaleError):
        open_checkpoint(tmp_path)


# ---- cost ---------------------------------------------------------------------------------------------------------


def sparse_checkpoint(directory: Path, head_rows: int, total: int, width: int = 256) -> int:
    """A checkpoint of `total` bytes whose backbone is a hole in the file; returns the header's length."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text('{"model_type": "bert"}')
    head = head_rows * width * 4
    rows = (total - head) // (width * 4)
    header = {
        "bert.encoder.weight": entry(0, rows * width * 4, [rows, width]),
        "cls.predictions.decoder.weight": entry(rows * width * 4, rows * width * 4 + head, [head_rows, width]),
    }
    start = raw_file(header, b"")
    with (directory / "model.safetensors").open("wb") as file:
        file.write(start)
        file.truncate(len(start) + rows * width * 4)
        file.seek(0, os.SEEK_END)
        block = np.ones((1000, width), np.float32).tobytes()
        for first in range(0, head_rows, 1000):
            file.write(block[: min(1000, head_rows - first) * width * 4])
    return len(start)


NORM_SCRIPT = """
import json, sys
import numpy
before = next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmHWM"))
from headscale.checkpoint import open_checkpoint
with open_checkpoint(sys.argv[1]) as checkpoint:
    total = 0.0
    for _, block in checkpoint.row_blocks("cls.predictions.decoder.weight"):
        total += float(numpy.vdot(block, block))
    read = checkpoint.bytes_read
after = next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmHWM"))
heavy = [name for name in ("torch", "transformers", "huggingface_hub", "safetensors", "scipy") if name in sys.modules]
print(json.dumps({"total": total, "grown_mb": (after - before) / 1024, "read": read, "heavy": heavy}))
"""


def run_script(script: str, *arguments: str, **environment: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


def test_a_large_checkpoint_needs_neither_torch_nor_memory(tmp_path: Path) -> None:
    """600 MB with a head of 100 MB: at most 30 MB above numpy's own."""
    header = sparse_checkpoint(tmp_path, head_rows=100_000, total=600_000_000)
    result = run_script(NORM_SCRIPT, str(tmp_path))
    assert result["heavy"] == []
    assert result["total"] == 100_000 * 256
    assert result["read"] == header + 100_000 * 256 * 4
    assert result["grown_mb"] < 30, result
