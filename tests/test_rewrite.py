"""Edited copies: only what was asked for changes, the source never does, and nothing half-made is left behind."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from headscale import rewrite, staging
from headscale.checkpoint import open_checkpoint
from headscale.errors import HeadscaleError, NotFoundError, UnreadableError, UsageError
from headscale.rewrite import LazyTensor, write_edited
from headscale.tensorfile import decode, encode

ROOT = Path(__file__).parents[1]
HEAD = "cls.predictions.decoder.weight"


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "bert.embeddings.word_embeddings.weight": torch.randn(50, 8, generator=generator),
        "bert.pooler.dense.weight": torch.randn(8, 8, generator=generator).half(),
        HEAD: torch.randn(50, 8, generator=generator),
        "cls.predictions.bias": torch.randn(50, generator=generator),
        "odd": torch.randn(3, generator=generator).half(),
        "steps": torch.tensor([7]),
    }


def save(directory: Path, content: dict[str, torch.Tensor] | None = None) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    save_file(content or tensors(), directory / "model.safetensors", metadata={"format": "pt", "note": "kept"})
    (directory / "config.json").write_text('{"model_type":"bert", "tie_word_embeddings":true}')
    (directory / "tokenizer.json").write_text('{"version": "1.0"}')
    (directory / "README.md").write_bytes("# Größe\r\n".encode())
    (directory / "1_SpladePooling").mkdir(exist_ok=True)
    (directory / "1_SpladePooling/config.json").write_text("{}")
    (directory / "2_Normalize").mkdir(exist_ok=True)
    return directory


def save_shards(directory: Path, suffix: str = "safetensors") -> Path:
    save(directory)
    (directory / "model.safetensors").unlink()
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    content, weight_map = tensors(), {}
    for number, chosen in enumerate((list(content)[:2], list(content)[2:]), start=1):
        file = f"{stem}-0000{number}-of-00002.{suffix}"
        weight_map |= dict.fromkeys(chosen, file)
        part = {name: content[name] for name in chosen}
        save_file(part, directory / file, {"format": "pt"}) if suffix == "safetensors" else torch.save(
            part, directory / file
        )
    total = sum(tensor.numel() * tensor.element_size() for tensor in content.values())
    parameters = sum(tensor.numel() for tensor in content.values())
    index = {"metadata": {"total_size": total, "total_parameters": parameters}, "weight_map": weight_map}
    (directory / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    return directory


def hashes(directory: Path) -> dict[str, str]:
    files = (path for path in sorted(directory.rglob("*")) if path.is_file())
    return {path.relative_to(directory).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def new_head() -> np.ndarray:
    return np.random.default_rng(1).standard_normal((50, 8), np.float32)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return save(tmp_path / "source")


def test_an_edit_changes_its_own_bytes_and_nothing_else(source: Path, tmp_path: Path) -> None:
    before = hashes(source)
    for path in (*source.rglob("*"), source):
        path.chmod(0o555 if path.is_dir() else 0o444)
    with open_checkpoint(source) as checkpoint:
        span = checkpoint.tensors[HEAD]
        report = write_edited(checkpoint, tmp_path / "target", tensors={HEAD: new_head()})
    after = hashes(tmp_path / "target")
    assert hashes(source) == before
    assert set(after) == set(before)
    assert [name for name in before if after[name] != before[name]] == ["model.safetensors"]
    old, new = ((place / "model.safetensors").read_bytes() for place in (source, tmp_path / "target"))
    assert new[: span.start] + new[span.end :] == old[: span.start] + old[span.end :]
    assert new[span.start : span.end] == new_head().tobytes()
    assert (tmp_path / "target/2_Normalize").is_dir()  # an empty module's folder is part of the model
    assert report["edited"] == {"model.safetensors": [HEAD]}
    assert report["copied"] == sorted(set(before) - {"model.safetensors"})
    assert (report["added"], report["removed"], report["converted"], report["left_out"]) == ({}, [], {}, [])
    (tmp_path / "target/README.md").write_text("the copy is the user's own, writable")


def test_tensors_are_added_removed_and_widened_where_the_library_can_load_them(source: Path, tmp_path: Path) -> None:
    added = np.arange(6, dtype=np.float32).reshape(2, 3)
    with open_checkpoint(source) as checkpoint:
        report = write_edited(
            checkpoint,
            tmp_path / "target",
            tensors={"cls.predictions.decoder.bias": added, "bert.pooler.dense.weight": np.ones((8, 8), np.float32)},
            remove=["steps"],
            config={"tie_word_embeddings": False, "scale": 0.5, "model_type": "bert"},
            extra_files={"headscale.json": "{}", "notes/é.txt": b"\x00\xff"},
        )
    got = load_file(tmp_path / "target/model.safetensors")
    want = tensors() | {"cls.predictions.decoder.bias": torch.from_numpy(added)}
    want["bert.pooler.dense.weight"] = torch.ones(8, 8)
    del want["steps"]
    assert set(got) == set(want)
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype
        assert torch.equal(got[name], tensor), name
    with safe_open(tmp_path / "target/model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "note": "kept"}
    names = [[*_header(place)] for place in (source, tmp_path / "target")]
    assert names[1] == [name for name in names[0] if name != "steps"] + ["cls.predictions.decoder.bias"]
    text = (tmp_path / "target/config.json").read_text()
    assert list(json.loads(text).items()) == [("model_type", "bert"), ("tie_word_embeddings", False), ("scale", 0.5)]
    assert report["config"] == {"tie_word_embeddings": False, "scale": 0.5}
    assert report["added"] == {"model.safetensors": ["cls.predictions.decoder.bias"]}
    assert report["extra_files"] == ["headscale.json", "notes/é.txt"]
    assert (tmp_path / "target/notes/é.txt").read_bytes() == b"\x00\xff"


def _header(place: Path) -> dict[str, Any]:
    raw = (place / "model.safetensors").read_bytes()
    return dict(json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")]))


@pytest.mark.parametrize("odd", [1, 3, 5])
def test_every_tensor_stays_where_torch_can_view_it(tmp_path: Path, odd: int) -> None:
    """Half tensors of odd length, then new float ones: unaligned data is legal in the format and unloadable."""
    source = save(tmp_path / "source", {f"half.{n}": torch.ones(odd).half() for n in range(3)})
    with open_checkpoint(source) as checkpoint:
        edits = {"half.1": np.full(odd, 2, np.float32), "wide": np.full(3, 3, np.float64), "f": np.ones(1, np.float32)}
        write_edited(checkpoint, tmp_path / "target", tensors=edits)
    got = load_file(tmp_path / "target/model.safetensors")
    for name, value in edits.items():
        assert torch.equal(got[name], torch.from_numpy(value))
    assert torch.equal(got["half.2"], torch.ones(odd).half())


def test_dtypes_are_chosen_by_name_and_half_precision_rounds_as_torch_does(source: Path, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(400, generator=generator) * torch.logspace(-38, 38, 400)
    bits = torch.tensor([0x3F808000, 0x3F818000, 0x7F7FFFFF, 0x00000001, 0x80000000 - (1 << 32)], dtype=torch.int64)
    halfway = bits.to(torch.int32).view(torch.float32)[torch.tensor([0, 1, 3, 4])]
    special = torch.cat([values, halfway, torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0])])
    as_bits = special.bfloat16().view(torch.int16).numpy().view(np.uint16)
    with open_checkpoint(source) as checkpoint:
        write_edited(
            checkpoint,
            tmp_path / "target",
            tensors={"b": special.numpy(), "u": as_bits, "h": values.numpy()[150:215]},
            dtypes={"b": "BF16", "u": "BF16", "h": "F16"},
        )
    got = load_file(tmp_path / "target/model.safetensors")
    want = special.bfloat16()
    for name in ("b", "u"):
        assert torch.equal(got[name].isnan(), want.isnan())
        assert torch.equal(got[name].view(torch.int16)[~want.isnan()], want.view(torch.int16)[~want.isnan()])
    assert torch.equal(got["h"], values[150:215].half())
    with pytest.raises(UnreadableError, match="`x` holds values too large for F16"):
        encode(np.float32([1e6]), "F16", "x")
    with pytest.raises(UnreadableError, match="too large for BF16"):
        encode(np.float32([3.4028235e38]), "BF16", "x")
    assert np.isinf(decode(encode(np.float32([np.inf]), "F16", "x").view(np.uint8), "F16")).all()
    with open_checkpoint(source) as checkpoint, pytest.raises(ValueError, match="cannot store"):
        write_edited(checkpoint, tmp_path / "other", tensors={"u": as_bits})
    with open_checkpoint(source) as checkpoint, pytest.raises(ValueError, match="does not replace"):
        write_edited(checkpoint, tmp_path / "other", tensors={HEAD: np.ones((2, 2), np.float32)})
    with open_checkpoint(source) as checkpoint, pytest.raises(ValueError, match="not there"):
        write_edited(checkpoint, tmp_path / "other", tensors={}, remove=["nope"])
    assert not (tmp_path / "other").exists()


def test_of_a_sharded_checkpoint_only_the_shard_concerned_is_rewritten(tmp_path: Path) -> None:
    source = save_shards(tmp_path / "source")
    before = hashes(source)
    index = json.loads((source / "model.safetensors.index.json").read_text())
    first, second = sorted(set(index["weight_map"].values()))
    with open_checkpoint(source) as checkpoint:
        write_edited(checkpoint, tmp_path / "same", tensors={HEAD: new_head()})
        report = write_edited(
            checkpoint,
            tmp_path / "grown",
            tensors={"cls.predictions.decoder.bias": np.ones(50, np.float32), "unrelated": np.ones(2, np.float32)},
            remove=["steps"],
        )
    same, grown = hashes(tmp_path / "same"), hashes(tmp_path / "grown")
    assert [name for name in before if same[name] != before[name]] == [second]
    assert sorted(name for name in before if grown[name] != before[name]) == [second, "model.safetensors.index.json"]
    assert report["added"] == {second: ["cls.predictions.decoder.bias", "unrelated"]}
    new_index = json.loads((tmp_path / "grown/model.safetensors.index.json").read_text())
    held = {name: file for file in (first, second) for name in load_file(tmp_path / "grown" / file)}
    assert new_index["weight_map"] == held
    sizes = [load_file(tmp_path / "grown" / file) for file in (first, second)]
    assert new_index["metadata"] == {
        "total_size": sum(t.numel() * t.element_size() for part in sizes for t in part.values()),
        "total_parameters": sum(t.numel() for part in sizes for t in part.values()),
    }
    with open_checkpoint(source) as checkpoint:  # a relative in the first shard draws a new tensor there
        report = write_edited(checkpoint, tmp_path / "b", tensors={"bert.pooler.dense.bias": np.ones(8, np.float32)})
    assert report["added"] == {first: ["bert.pooler.dense.bias"]}


@pytest.mark.parametrize("sharded", [False, True])
def test_a_bin_becomes_safetensors_with_the_same_names_and_values(tmp_path: Path, sharded: bool) -> None:
    source = save_shards(tmp_path / "source", "bin") if sharded else save(tmp_path / "source")
    content = tensors()
    if not sharded:
        (source / "model.safetensors").unlink()
        content["tied"] = content[HEAD]
        content["strided"] = torch.arange(12.0).reshape(3, 4).T
        content["brain"] = torch.randn(5).bfloat16()
        content["flag"] = torch.tensor(True)
        torch.save(content, source / "pytorch_model.bin")
    before = hashes(source)
    with open_checkpoint(source) as checkpoint:
        report = write_edited(checkpoint, tmp_path / "target", tensors={HEAD: new_head()})
    assert hashes(source) == before
    assert not list((tmp_path / "target").glob("*.bin*"))
    got: dict[str, torch.Tensor] = {}
    for file in sorted((tmp_path / "target").glob("*.safetensors")):
        got |= load_file(file)
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
    assert set(got) == set(content)
    for name, tensor in content.items():
        want = torch.from_numpy(new_head()) if name == HEAD else tensor
        assert got[name].dtype == want.dtype
        assert torch.equal(got[name], want), name
    if sharded:
        with open_checkpoint(tmp_path / "target") as again:
            assert again.index_file == "model.safetensors.index.json"
        assert report["converted"]["pytorch_model-00001-of-00002.bin"] == "model-00001-of-00002.safetensors"
    else:
        assert report["converted"] == {"pytorch_model.bin": "model.safetensors"}
        assert report["shared"] == [[HEAD, "tied"]]


def test_stale_formats_and_caches_are_left_out_and_named(source: Path, tmp_path: Path) -> None:
    stale = ("pytorch_model.bin", "tf_model.h5", "flax_model.msgpack", "model.fp16.safetensors", "optimizer.pt")
    stale_folders = ("onnx/model.onnx", "openvino/openvino_model.bin", ".git/HEAD", ".cache/huggingface/x.metadata")
    kept = (
        "training_args.bin",
        "2_Dense/pytorch_model.bin",
        "3_Dense/model.safetensors",
        "code/model.py",
        ".gitattributes",
    )
    for name in (*stale, *stale_folders, *kept):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name)
    with open_checkpoint(source) as checkpoint:
        report = write_edited(checkpoint, tmp_path / "target", tensors={HEAD: new_head()})
    found = hashes(tmp_path / "target")
    assert set(kept) <= set(found)
    assert not set(found) & {*stale, *stale_folders}
    assert not (tmp_path / "target/.git").exists()
    assert sorted(report["left_out"]) == sorted([*stale, ".cache/", ".git/", "onnx/", "openvino/"])


def test_a_nested_transformer_is_edited_where_it_lies(tmp_path: Path) -> None:
    root = tmp_path / "source"
    save(root / "0_MLMTransformer")
    (root / "modules.json").write_text(json.dumps([{"path": "0_MLMTransformer", "type": "x.MLMTransformer"}]))
    (root / "1_SpladePooling").mkdir()
    (root / "1_SpladePooling/config.json").write_text("{}")
    before = hashes(root)
    with open_checkpoint(root) as checkpoint:
        report = write_edited(
            checkpoint, tmp_path / "target", tensors={HEAD: new_head()}, config={"a": 1}, extra_files={"h.json": "1"}
        )
    after = hashes(tmp_path / "target")
    changed = sorted(name for name in before if before[name] != after[name])
    assert changed == ["0_MLMTransformer/config.json", "0_MLMTransformer/model.safetensors"]
    assert set(after) - set(before) == {"h.json"}
    assert report["edited"] == {"0_MLMTransformer/model.safetensors": [HEAD]}


def test_a_snapshot_of_links_becomes_real_files(source: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for path in source.iterdir():
        (snapshot / path.name).symlink_to(path)
    (snapshot / "circle").symlink_to(snapshot)
    with open_checkpoint(snapshot) as checkpoint:
        write_edited(checkpoint, tmp_path / "target", tensors={HEAD: new_head()})
    assert not [path for path in (tmp_path / "target").rglob("*") if path.is_symlink()]
    assert set(hashes(tmp_path / "target")) == set(hashes(source))
    (snapshot / "vocab.txt").symlink_to(tmp_path / "gone")
    with open_checkpoint(snapshot) as checkpoint, pytest.raises(UnreadableError, match="link to nothing"):
        write_edited(checkpoint, tmp_path / "other", tensors={HEAD: new_head()})


def test_sockets_and_pipes_are_left_out(source: Path, tmp_path: Path) -> None:
    os.mkfifo(source / "pipe")
    with open_checkpoint(source) as checkpoint:
        report = write_edited(checkpoint, tmp_path / "target", tensors={HEAD: new_head()})
    assert report["left_out"] == ["pipe"]


# ---- where it may go, and what is left after a failure --------------------------------------------------------------


def entries(directory: Path) -> list[str]:
    return sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*"))


def test_places_that_would_destroy_something_are_refused(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full/precious.txt").touch()
    (tmp_path / "link").symlink_to(source)
    before = entries(tmp_path)
    cases = [
        (source, False, "is made from"),
        (source / "inside/deep", False, "is made from"),
        (tmp_path, True, "is made from"),
        (tmp_path / "link", True, "is made from"),
        (tmp_path / "source/../source", True, "is made from"),
        (tmp_path / "file", True, "is a file"),
        (tmp_path / "full", False, "not empty"),
        (tmp_path / "full", True, "something other than a checkpoint"),
    ]
    for target, overwrite, words in cases:
        with open_checkpoint(source) as checkpoint, pytest.raises(UsageError, match=words) as caught:
            write_edited(checkpoint, target, tensors={HEAD: new_head()}, overwrite=overwrite)
        assert caught.value.hint
    assert entries(tmp_path) == before
    with open_checkpoint(source) as checkpoint:
        for name in ("/etc/x", "../x", "model.safetensors"):
            with pytest.raises(ValueError, match="no name for an extra file"):
                write_edited(checkpoint, tmp_path / "t", tensors={HEAD: new_head()}, extra_files={name: ""})
    assert entries(tmp_path) == before


def test_an_empty_or_earlier_target_is_replaced_as_a_whole(source: Path, tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    with open_checkpoint(source) as checkpoint:
        write_edited(checkpoint, tmp_path / "target", tensors={HEAD: new_head()})
        (tmp_path / "target/old.txt").touch()
        write_edited(checkpoint, tmp_path / "target", tensors={HEAD: 2 * new_head()}, overwrite=True)
    assert not (tmp_path / "target/old.txt").exists()
    assert torch.equal(load_file(tmp_path / "target/model.safetensors")[HEAD], 2 * torch.from_numpy(new_head()))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "target"]


def failing(error: BaseException) -> LazyTensor:
    def blocks() -> Iterator[np.ndarray]:
        yield new_head()[:25]
        raise error

    return LazyTensor((50, 8), blocks)


@pytest.mark.parametrize(
    ("error", "seen"),
    [
        (KeyboardInterrupt(), KeyboardInterrupt),
        (RuntimeError("bug"), RuntimeError),
        (OSError(errno.ENOSPC, "No space left on device"), HeadscaleError),
        (OSError(errno.EIO, "Input/output error"), HeadscaleError),
    ],
)
def test_an_error_half_way_leaves_nothing(source: Path, tmp_path: Path, error: BaseException, seen: type) -> None:
    before = entries(tmp_path)
    with open_checkpoint(source) as checkpoint, pytest.raises(seen):
        write_edited(checkpoint, tmp_path / "new/deep/target", tensors={HEAD: failing(error)})
    assert entries(tmp_path) == before


def test_an_error_half_way_keeps_what_was_there(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_checkpoint(source) as checkpoint:
        write_edited(checkpoint, tmp_path / "target", tensors={HEAD: new_head()})
        before = hashes(tmp_path)
        with pytest.raises(RuntimeError):
            write_edited(checkpoint, tmp_path / "target", tensors={HEAD: failing(RuntimeError())}, overwrite=True)
        assert hashes(tmp_path) == before

        def no_replace(self: Path, target: Path) -> None:
            raise PermissionError(errno.EACCES, "Permission denied")

        monkeypatch.setattr(Path, "replace", no_replace)
        with pytest.raises(HeadscaleError, match="cannot be written: Permission denied"):
            write_edited(checkpoint, tmp_path / "target", tensors={HEAD: new_head()}, overwrite=True)
    assert hashes(tmp_path) == before


def test_the_staged_directory_can_be_judged_before_it_appears(source: Path, tmp_path: Path) -> None:
    def judge(stage: Path) -> None:
        assert torch.equal(load_file(stage / "model.safetensors")[HEAD], torch.from_numpy(new_head()))
        assert not (tmp_path / "target").exists()
        raise UnreadableError("no")

    with open_checkpoint(source) as checkpoint, pytest.raises(UnreadableError, match="no"):
        write_edited(checkpoint, tmp_path / "target", tensors={HEAD: new_head()}, on_staged=judge)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_too_little_room_is_said_before_anything_is_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda _: usage._replace(free=100))
    monkeypatch.setattr(rewrite, "_write", lambda *_: pytest.fail("wrote"))
    with (
        open_checkpoint(source) as checkpoint,
        pytest.raises(HeadscaleError, match="bytes are needed and 100") as caught,
    ):
        write_edited(checkpoint, tmp_path / "a/b", tensors={HEAD: new_head()})
    assert caught.value.hint
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_kill_leaves_no_target(source: Path, tmp_path: Path) -> None:
    script = """
import sys, time
import numpy
from headscale.checkpoint import open_checkpoint
from headscale.rewrite import LazyTensor, write_edited
def blocks():
    yield numpy.zeros((25, 8), numpy.float32)
    print("half", flush=True)
    time.sleep(60)
with open_checkpoint(sys.argv[1]) as c:
    write_edited(c, sys.argv[2], tensors={sys.argv[3]: LazyTensor((50, 8), blocks)})
"""
    arguments = [sys.executable, "-c", script, str(source), str(tmp_path / "target"), HEAD]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, env=environment) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"half\n"
        child.send_signal(signal.SIGKILL)
        child.wait(10)
    assert not (tmp_path / "target").exists()


def test_a_copy_without_kernel_help_is_the_same(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> int:
        raise OSError(errno.EXDEV, "cross-device")

    with open_checkpoint(source) as checkpoint:
        write_edited(checkpoint, tmp_path / "a", tensors={HEAD: new_head()})
        monkeypatch.setattr(os, "copy_file_range", refuse)
        write_edited(checkpoint, tmp_path / "b", tensors={HEAD: new_head()})
        monkeypatch.setattr(os, "copy_file_range", lambda *_: 0)
        write_edited(checkpoint, tmp_path / "c", tensors={HEAD: new_head()})
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b") == hashes(tmp_path / "c")


def test_a_checkpoint_that_is_not_here_cannot_be_copied(source: Path, tmp_path: Path) -> None:
    with open_checkpoint(source) as checkpoint:
        checkpoint.root = None
        with pytest.raises(NotFoundError, match="not on this disk"):
            write_edited(checkpoint, tmp_path / "target", tensors={})


def test_memory_does_not_grow_with_the_checkpoint(tmp_path: Path) -> None:
    """300 MB copied and a further 100 MB made block by block, within 40 MB (ten blocks of 4 MB)."""
    source = save(tmp_path / "source")
    rows = 300_000
    header = {
        "backbone": {"dtype": "F32", "shape": [rows, 250], "data_offsets": [0, rows * 1000]},
        HEAD: {"dtype": "F32", "shape": [100_000, 250], "data_offsets": [rows * 1000, rows * 1000 + 100_000_000]},
    }
    text = json.dumps(header).encode()
    with (source / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + 400_000_000)
    script = """
import sys
import numpy
from headscale.checkpoint import open_checkpoint
from headscale.rewrite import LazyTensor, write_edited
before = next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmHWM"))
with open_checkpoint(sys.argv[1]) as c:
    halved = LazyTensor((100_000, 250), lambda: (rows * 0.5 for _, rows in c.row_blocks(sys.argv[3])))
    write_edited(c, sys.argv[2], tensors={sys.argv[3]: halved})
after = next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmHWM"))
print((after - before) / 1024, "torch" in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(source), str(tmp_path / "target"), HEAD],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    grown, torch_imported = done.stdout.split()
    assert float(grown) < 40
    assert torch_imported == "False"
    assert (tmp_path / "target/model.safetensors").stat().st_size == 8 + len(text) + 400_000_000


def test_transformers_loads_what_was_written(tmp_path: Path) -> None:
    """An untied copy with the head halved: the logits of the reloaded model are half the source's, bit for bit."""
    from transformers import AutoModelForMaskedLM, BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = BertForMaskedLM(BertConfig(vocab_size=60, **shape)).eval()
    model.cls.predictions.bias.data.normal_()
    model.save_pretrained(tmp_path / "source")
    ids = torch.arange(20).reshape(2, 10)
    with open_checkpoint(tmp_path / "source") as checkpoint:
        matrix = checkpoint.tensor("bert.embeddings.word_embeddings.weight") * np.float32(0.5)
        bias = checkpoint.tensor("cls.predictions.bias") * np.float32(0.5)
        write_edited(
            checkpoint,
            tmp_path / "target",
            tensors={HEAD: matrix, "cls.predictions.bias": bias, "cls.predictions.decoder.bias": bias},
            config={"tie_word_embeddings": False},
        )
    again, info = AutoModelForMaskedLM.from_pretrained(tmp_path / "target", output_loading_info=True)
    assert not info["missing_keys"]
    with torch.no_grad():
        assert torch.equal(again.eval()(ids).logits, 0.5 * model(ids).logits)
