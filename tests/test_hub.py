"""The hub by byte range, against a server on loopback: what is fetched, what goes wrong, what is said."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hub_server import Faults, HubServer, Repo
from huggingface_hub import constants
from safetensors.numpy import save_file

from headscale import ranges
from headscale.checkpoint import Checkpoint, open_checkpoint
from headscale.errors import HeadscaleError, NotFoundError, UnreadableError
from headscale.hub import cached_snapshot, human_size, snapshot

ROOT = Path(__file__).parents[1]
Open = Callable[..., Checkpoint]


def tensors() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {
        "encoder.weight": random.standard_normal((6000, 256), np.float32),
        "head.bias": random.standard_normal(2000, np.float32),
        "head.weight": random.standard_normal((2000, 256), np.float32),
    }


def header_bytes(file: Path) -> int:
    return int(8 + struct.unpack("<Q", file.read_bytes()[:8])[0])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    save_file(tensors(), directory / "model.safetensors", {"format": "pt"})
    (directory / "config.json").write_text('{"model_type": "bert"}')
    (directory / "tokenizer.json").write_text("{}")
    (directory / "pytorch_model.bin").write_bytes(b"other format" * 10_000)
    (directory / "onnx").mkdir()
    (directory / "onnx/model.onnx").write_bytes(b"other format")
    (directory / "1_SpladePooling").mkdir()
    (directory / "1_SpladePooling/config.json").write_text('{"pooling_strategy": "max"}')
    return directory


@pytest.fixture
def hub(model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(ranges, "PAUSE", 0.002)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with HubServer({"owner/model": Repo(model), "model": Repo(model)}) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        yield server


@pytest.fixture
def opened(tmp_path: Path) -> Open:
    def open_it(name: str = "owner/model", **options: Any) -> Checkpoint:
        return open_checkpoint(name, **{"cache_dir": tmp_path / "cache", **options})

    return open_it


def weight_requests(server: HubServer) -> list[tuple[str, str]]:
    return [(path.split("/")[1], asked) for _, path, asked in server.requests if path.endswith(".safetensors")]


# ---- what is fetched ----------------------------------------------------------------------------------------------


def test_only_headers_and_the_tensors_asked_for_leave_the_server(hub: HubServer, opened: Open, model: Path) -> None:
    said: list[str] = []
    with opened(on_progress=said.append) as checkpoint:
        assert (checkpoint.origin, checkpoint.directory) == ("hub", None)
        assert checkpoint.revision == hub.repos["owner/model"].commit
        assert checkpoint.config == {"model_type": "bert"}
        header = header_bytes(model / "model.safetensors")
        assert checkpoint.bytes_read == hub.sent["model.safetensors"] == header
        np.testing.assert_array_equal(checkpoint.tensor("head.weight"), tensors()["head.weight"])
        np.testing.assert_array_equal(checkpoint.tensor("head.bias"), tensors()["head.bias"])
        assert checkpoint.bytes_read == hub.sent["model.safetensors"] == header + (2000 * 256 + 2000) * 4
    assert said[0].startswith("reading `owner/model` at ")
    assert said[1] == "fetching `head.weight` from `owner/model` (2.0 MB of 8.2 MB)"
    assert hub.sent["pytorch_model.bin"] == 0
    assert hub.leaked == []  # no authorization at the storage address, though the hub itself got it


def test_the_size_is_told_before_the_bytes_are_asked_for(hub: HubServer, opened: Open) -> None:
    sent: list[int] = []
    with opened(on_progress=lambda _: sent.append(hub.sent["model.safetensors"])) as checkpoint:
        before = hub.sent["model.safetensors"]
        checkpoint.tensor("head.weight")
    assert sent == [0, before]


def test_redirects_are_remembered_and_a_stale_signature_is_renewed(hub: HubServer, opened: Open) -> None:
    with opened() as checkpoint:
        checkpoint.tensor("head.bias")
        checkpoint.tensor("head.bias")
    assert [kind for kind, _ in weight_requests(hub)] == ["owner", "storage", "storage", "storage", "storage"]
    hub.requests.clear()
    hub.faults = Faults(expire_after=2)
    with opened() as checkpoint:
        np.testing.assert_array_equal(checkpoint.tensor("head.bias"), tensors()["head.bias"])
        np.testing.assert_array_equal(checkpoint.tensor("head.weight"), tensors()["head.weight"])
    assert [kind for kind, _ in weight_requests(hub)].count("owner") == 2


def test_files_on_the_hub_itself_and_renamed_repositories(hub: HubServer, opened: Open) -> None:
    hub.large = 1 << 40
    hub.renamed["old-name"] = "owner/model"
    for name in ("model", "owner/model", "old-name"):
        with opened(name) as checkpoint:
            np.testing.assert_array_equal(checkpoint.tensor("head.bias"), tensors()["head.bias"])
    assert not [path for _, path, _ in hub.requests if path.startswith("/storage")]


def test_sizes_are_asked_for_when_the_listing_has_none(hub: HubServer, opened: Open) -> None:
    hub.repos["owner/model"].sizes = False
    with opened() as checkpoint:
        np.testing.assert_array_equal(checkpoint.tensor("head.weight"), tensors()["head.weight"])


def test_blocks_that_nobody_asks_for_are_not_sent(hub: HubServer, opened: Open) -> None:
    hub.faults = Faults(seconds_per_chunk=0.01)
    with opened() as checkpoint:
        blocks = checkpoint.row_blocks("encoder.weight", max_bytes=64 << 10)
        next(blocks)
        blocks.close()
        assert checkpoint.bytes_read < 1 << 20
    assert hub.sent["model.safetensors"] < 6 << 20  # of 8.2 MB; what the sockets held is gone


def sparse_shards(directory: Path) -> int:
    """A sharded checkpoint of 300 MB whose backbone shard is a hole; returns the bytes of its headers."""
    shape = [300_000, 250]
    sizes, headers = {"1": 300_000_000, "2": 2000 * 256 * 4}, 0
    names = {"1": ("backbone.weight", shape), "2": ("head.weight", [2000, 256])}
    for number, (name, dims) in names.items():
        entry = {name: {"dtype": "F32", "shape": dims, "data_offsets": [0, sizes[number]]}}
        text = json.dumps(entry).encode()
        path = directory / f"model-0000{number}-of-00002.safetensors"
        path.write_bytes(len(text).to_bytes(8, "little") + text)
        headers += 8 + len(text)
        with path.open("ab") as file:
            if number == "2":
                file.write(tensors()["head.weight"].tobytes())
            file.truncate(8 + len(text) + sizes[number])
    files = {names[number][0]: f"model-0000{number}-of-00002.safetensors" for number in names}
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": files}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "config.json").write_text("{}")
    return headers


HUB_SCRIPT = """
import json, sys
import numpy
from headscale.checkpoint import open_checkpoint
from huggingface_hub import hf_hub_download, get_hf_file_metadata
before = next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmHWM"))
with open_checkpoint("owner/big", cache_dir=sys.argv[1]) as checkpoint:
    total = sum(float(numpy.vdot(block, block)) for _, block in checkpoint.row_blocks("head.weight"))
    read = checkpoint.bytes_read
after = next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmHWM"))
heavy = [name for name in ("torch", "transformers", "scipy") if name in sys.modules]
print(json.dumps({"total": total, "read": read, "heavy": heavy, "grown_mb": (after - before) / 1024}))
"""


def test_a_sharded_checkpoint_of_300_mb_costs_its_head(hub: HubServer, tmp_path: Path) -> None:
    (tmp_path / "big").mkdir()
    headers = sparse_shards(tmp_path / "big")
    hub.repos["owner/big"] = Repo(tmp_path / "big")
    done = subprocess.run(
        [sys.executable, "-c", HUB_SCRIPT, str(tmp_path / "cache")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "0", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    head = tensors()["head.weight"].astype(np.float64)
    assert result["total"] == pytest.approx(float((head**2).sum()), rel=1e-5)
    shards = {name: size for name, size in hub.sent.items() if name.endswith(".safetensors")}
    assert result["read"] == sum(shards.values()) == headers + 2000 * 256 * 4
    assert shards["model-00001-of-00002.safetensors"] < 200
    assert result["heavy"] == []
    assert result["grown_mb"] < 40, result
    assert done.stderr == ""  # no bar, no warning


# ---- what goes wrong ----------------------------------------------------------------------------------------------


def test_a_connection_that_breaks_is_resumed_where_it_stopped(hub: HubServer, opened: Open) -> None:
    with opened() as checkpoint:
        hub.faults = Faults(break_after=300_000, breaks=5)
        hub.requests.clear()
        hub.sent.clear()
        np.testing.assert_array_equal(checkpoint.tensor("head.weight"), tensors()["head.weight"])
    starts = [int(asked.removeprefix("bytes=").split("-")[0]) for _, asked in weight_requests(hub)]
    lost = 300_000 - np.diff(starts)  # what the HTTP library held when the line broke: one small chunk at most
    assert len(lost) == 5
    assert 0 <= lost.min() <= lost.max() < 16 << 10
    assert hub.sent["model.safetensors"] == 2000 * 256 * 4 + lost.sum()  # nothing else was sent twice


def test_a_line_that_keeps_breaking_ends_in_an_error(hub: HubServer, opened: Open) -> None:
    with opened() as checkpoint:
        hub.faults = Faults(break_after=1000, breaks=1000)
        hub.requests.clear()
        with pytest.raises(UnreadableError, match=r"broke 6 times in a row .* `model\.safetensors`") as caught:
            checkpoint.tensor("head.weight")
        assert "hf download owner/model" in caught.value.hint
        assert len(weight_requests(hub)) == ranges.MAX_BREAKS + 1


def test_breaks_are_forgiven_as_long_as_much_arrives_between_them(
    hub: HubServer, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranges, "PROGRESS_BYTES", 100_000)
    with opened() as checkpoint:
        hub.faults = Faults(break_after=200_000, breaks=1000)
        np.testing.assert_array_equal(checkpoint.tensor("head.weight"), tensors()["head.weight"])


def test_a_busy_server_is_asked_again_and_not_for_ever(hub: HubServer, opened: Open) -> None:
    with opened() as checkpoint:
        hub.faults = Faults(busy=3, expire_after=1)
        np.testing.assert_array_equal(checkpoint.tensor("head.bias"), tensors()["head.bias"])
        hub.faults = Faults(refuse=500, expire_after=1)
        with pytest.raises(UnreadableError, match="answered HTTP 500 6 times"):
            checkpoint.tensor("head.bias")


def test_a_silent_server_is_given_up(hub: HubServer, opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened() as checkpoint:
        monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.1)
        monkeypatch.setattr(ranges, "MAX_BREAKS", 1)
        hub.faults = Faults(seconds_per_chunk=1.0)
        with pytest.raises(UnreadableError, match="broke 2 times"):
            checkpoint.tensor("head.bias")


def test_a_server_that_ignores_ranges_never_sends_the_whole_file(hub: HubServer, opened: Open) -> None:
    hub.faults = Faults(ignore_range=True)
    with opened() as checkpoint:  # the header is at the start: reading stops behind it
        assert set(checkpoint.tensors) == set(tensors())
        with pytest.raises(UnreadableError, match="ignores byte ranges, and would send all 8200") as caught:
            checkpoint.tensor("head.weight")
    assert caught.value.hint == "download it whole first: `hf download owner/model`"
    assert hub.sent["model.safetensors"] < 6 << 20  # what the sockets held of 3 x 8.2 MB


def test_another_part_or_a_circle_or_another_size_is_noticed(hub: HubServer, opened: Open, tmp_path: Path) -> None:
    hub.faults = Faults(wrong_range=True)
    with pytest.raises(UnreadableError, match="another part"):
        opened()
    hub.faults = Faults(circle=True)
    with pytest.raises(UnreadableError, match="redirects in a circle"):
        opened()
    hub.faults = Faults()
    whole = (hub.repos["owner/model"].directory / "model.safetensors").read_bytes()
    for name, length in (("shorter", 1_000_000), ("stub", 4)):
        copy = tmp_path / name
        copy.mkdir()
        (copy / "config.json").write_text("{}")
        (copy / "model.safetensors").write_bytes(whole)
        hub.repos[f"owner/{name}"] = Repo(copy)
        with opened(f"owner/{name}") as checkpoint:
            (copy / "model.safetensors").write_bytes(whole[:length])
            with pytest.raises(UnreadableError, match="bytes long on the server"):
                checkpoint.tensor("head.weight")


@pytest.mark.parametrize("with_token", [True, False])
def test_a_gated_model_names_the_licence_and_the_login(hub: HubServer, opened: Open, with_token: bool) -> None:
    hub.faults = Faults(gated=True)
    with pytest.raises(NotFoundError, match="`owner/model` is gated") as caught:
        opened(token=None if with_token else False)
    assert f"{hub.endpoint}/owner/model" in caught.value.hint
    assert "hf auth login" in caught.value.hint


def test_a_private_model_opens_with_its_token_only(hub: HubServer, opened: Open) -> None:
    hub.repos["owner/model"].token = "hf_right"
    with pytest.raises(NotFoundError, match="no model `owner/model`, or it is private") as caught:
        opened()
    assert "hf auth login" in caught.value.hint
    with opened(token="hf_right") as checkpoint:
        np.testing.assert_array_equal(checkpoint.tensor("head.bias"), tensors()["head.bias"])
    assert hub.leaked == []


def test_what_is_missing_is_named(hub: HubServer, opened: Open, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no model `owner/nope`"):
        opened("owner/nope")
    with pytest.raises(NotFoundError, match="`owner/model` has no revision `v9`"):
        opened(revision="v9")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/config.json").write_text("{}")
    hub.repos["owner/empty"] = Repo(tmp_path / "empty")
    with pytest.raises(NotFoundError, match="the repository `owner/empty` holds no model weights"):
        opened("owner/empty")
    hub.faults = Faults(refuse=403)
    with pytest.raises(NotFoundError, match=r"refuses access to `owner/model` \(403\)") as caught:
        opened()
    assert "hf auth login" in caught.value.hint
    with pytest.raises(NotFoundError, match="neither an existing path nor a hub id"):
        opened("what is this?")


def test_a_login_page_is_not_taken_for_the_hub(hub: HubServer, opened: Open) -> None:
    hub.faults = Faults(not_a_hub=True)
    with pytest.raises(UnreadableError, match="does not answer as the hub does"):
        opened()


def test_offline_and_out_of_reach_say_so_at_once(opened: Open, monkeypatch: pytest.MonkeyPatch, hub: HubServer) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{unused.getsockname()[1]}")
    with pytest.raises(NotFoundError, match=r"cannot be reached \(Connect"):
        opened()
    with pytest.raises(NotFoundError, match="switched off") as caught:
        opened(offline=True)
    assert "hf download owner/model" in caught.value.hint
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for offline in (None, False):  # the environment's word is final: huggingface_hub itself refuses
        with pytest.raises(NotFoundError, match=r"switched off|cannot be reached"):
            opened(offline=offline)
    assert hub.requests == []


def test_a_damaged_header_on_the_hub_is_the_same_error_as_on_disk(hub: HubServer, opened: Open, tmp_path: Path) -> None:
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/config.json").write_text("{}")
    hub.repos["owner/bad"] = Repo(tmp_path / "bad")
    for content, words in ((b"\xff" * 100, "not a safetensors file"), (b"abc", "truncated"), (b"", "truncated")):
        (tmp_path / "bad/model.safetensors").write_bytes(content)
        with pytest.raises(UnreadableError, match=words):
            opened("owner/bad")


# ---- the cache and full copies ------------------------------------------------------------------------------------


def fill_cache(cache: Path, model: Path, commit: str, files: tuple[str, ...], reference: str = "main") -> Path:
    """The hub cache's layout: blobs, a snapshot of links, a reference."""
    folder = cache / "models--owner--model"
    for kind in ("blobs", f"snapshots/{commit}", "refs"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    for file in files:
        blob = folder / "blobs" / hashlib.sha256(file.encode()).hexdigest()
        blob.write_bytes((model / file).read_bytes())
        (folder / "snapshots" / commit / file).symlink_to(blob)
    (folder / "refs" / reference).write_text(commit)
    return folder / "snapshots" / commit


def test_the_cache_is_used_by_revision_and_without_the_hub_library(opened: Open, model: Path, tmp_path: Path) -> None:
    one, two = "1" * 40, "2" * 40
    files = ("config.json", "model.safetensors")
    snapshot_one = fill_cache(tmp_path / "cache", model, one, files)
    fill_cache(tmp_path / "cache", model, two, files, reference="v2")
    for revision, commit in ((None, one), ("main", one), ("v2", two), (two, two)):
        with opened(revision=revision) as checkpoint:
            assert (checkpoint.origin, checkpoint.revision) == ("cache", commit)
            np.testing.assert_array_equal(checkpoint.tensor("head.bias"), tensors()["head.bias"])
    assert opened().directory == snapshot_one
    with pytest.raises(NotFoundError, match="switched off"):
        opened(revision="v3")
    assert cached_snapshot("owner/model", revision="../../x", cache_dir=tmp_path / "cache") is None
    script = (
        "import sys; from headscale.checkpoint import open_checkpoint as o; o('owner/model', cache_dir=sys.argv[1])"
    )
    script += (
        "; print([m for m in ('torch', 'httpx2', 'requests', 'huggingface_hub.file_download') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "cache")],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.stdout.strip() == "[]"


def test_a_cache_without_all_weights_is_no_copy(hub: HubServer, opened: Open, model: Path, tmp_path: Path) -> None:
    commit = hub.repos["owner/model"].commit
    snapshot_folder = fill_cache(tmp_path / "cache", model, commit, ("config.json",))
    (snapshot_folder / "model.safetensors").symlink_to("../../blobs/gone")  # an interrupted download
    with pytest.raises(NotFoundError, match="not in the cache"):
        opened(offline=True)
    with opened() as checkpoint:
        assert checkpoint.origin == "hub"
        assert not [path for _, path, _ in hub.requests if path.endswith("config.json")]  # that one is cached


def test_small_files_come_through_the_cache_and_large_ones_are_announced(
    hub: HubServer, opened: Open, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    with opened(on_progress=said.append) as checkpoint:
        assert checkpoint.filenames() == ("config.json", "model.safetensors", "pytorch_model.bin", "tokenizer.json")
        assert checkpoint.has_file("1_SpladePooling/config.json")
        assert checkpoint.read_json("1_SpladePooling/config.json") == {"pooling_strategy": "max"}
        assert checkpoint.read_json("absent.json") is None
        said.clear()
        assert checkpoint.file("tokenizer.json").read_text() == "{}"
        assert said == []
        monkeypatch.setattr("headscale.hub._QUIET_BYTES", 1000)
        assert checkpoint.file("pytorch_model.bin").stat().st_size == 120_000
        assert said == ["downloading `pytorch_model.bin` of `owner/model` (120.0 kB) into the hub cache"]
        with pytest.raises(NotFoundError, match=r"no file `absent\.json`"):
            checkpoint.file("absent.json")


def test_a_bin_on_the_hub_is_downloaded_and_said(hub: HubServer, opened: Open, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/config.json").write_text("{}")
    weight = torch.arange(600_000.0).reshape(600, 1000)
    torch.save({"head.weight": weight}, tmp_path / "bin/pytorch_model.bin")
    hub.repos["owner/bin"] = Repo(tmp_path / "bin")
    said: list[str] = []
    with opened("owner/bin", on_progress=said.append) as checkpoint:
        assert checkpoint.origin == "hub"
        np.testing.assert_array_equal(checkpoint.tensor("head.weight"), weight.numpy())
    assert any("downloading `pytorch_model.bin` of `owner/bin` (2.4 MB)" in line for line in said)


def test_a_full_copy_has_one_format_of_the_weights_and_every_small_file(
    hub: HubServer, opened: Open, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    said: list[str] = []
    directory = snapshot("owner/model", cache_dir=tmp_path / "cache", on_progress=said.append)
    found = sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())
    assert found == ["1_SpladePooling/config.json", "config.json", "model.safetensors", "tokenizer.json"]
    assert said[-1] == "downloading 4 files of `owner/model` (8.2 MB in all, less what is cached)"
    assert hub.sent["pytorch_model.bin"] == hub.sent["model.onnx"] == 0
    assert capfd.readouterr() == ("", "")  # no bars
    with opened() as checkpoint:
        assert (checkpoint.origin, checkpoint.directory) == ("cache", directory)
    assert snapshot("owner/model", cache_dir=tmp_path / "cache", offline=True) == directory
    placed = snapshot("owner/model", cache_dir=tmp_path / "cache", target=tmp_path / "here")
    assert placed == tmp_path / "here"
    assert (placed / "model.safetensors").read_bytes() == (directory / "model.safetensors").read_bytes()
    with pytest.raises(NotFoundError, match="switched off"):
        snapshot("owner/other", cache_dir=tmp_path / "cache", offline=True)
    with pytest.raises(NotFoundError, match="no model `owner/other`"):
        snapshot("owner/other", cache_dir=tmp_path / "cache")


def test_the_hub_bars_are_as_they_were(hub: HubServer, opened: Open) -> None:
    from huggingface_hub.utils import are_progress_bars_disabled

    before = are_progress_bars_disabled()
    with opened():
        assert are_progress_bars_disabled() == before


def test_every_error_is_one_sentence_with_a_hint(hub: HubServer, opened: Open, tmp_path: Path) -> None:
    for number, faults in enumerate(
        (
            *({"gated": True}, {"refuse": 401}, {"refuse": 403}, {"refuse": 404}, {"refuse": 451}),
            *({"not_a_hub": True}, {"circle": True}, {"wrong_range": True}),
        )
    ):
        hub.faults = Faults(**faults)  # type: ignore[arg-type]
        with pytest.raises(HeadscaleError) as caught:
            opened(cache_dir=tmp_path / str(number))
        assert caught.value.hint, faults
        assert "\n" not in caught.value.message
        assert not caught.value.message.endswith(".")


def test_sizes_are_written_as_the_hub_does() -> None:
    sizes = [0, 999, 1000, 93_763_584, 2_200_000_000, 3 * 10**15]
    assert [human_size(size) for size in sizes] == ["0 B", "999 B", "1.0 kB", "93.8 MB", "2.2 GB", "3000.0 TB"]
