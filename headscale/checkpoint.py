"""Checkpoints as they lie on disk, in the hub cache or on the hub: headers, and tensors by block of rows."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from headscale.errors import NotFoundError, UnreadableError, UsageError
from headscale.files import (
    DOWNLOAD_AGAIN,
    ByteReader,
    Files,
    LocalFiles,
    join_name,
    load_json,
    locate_weights,
    model_folder,
)
from headscale.tensorfile import DTYPE_BITS, STORED, TensorInfo, decode, header_length, parse_header

__all__ = ["Checkpoint", "TensorInfo", "looks_like_path", "open_checkpoint"]

_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
_PATH_SUFFIXES = (*_WEIGHT_SUFFIXES, ".json", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".zip", ".tar")


class Checkpoint:
    """A read-only view of one checkpoint: its configuration, its tensors' headers, and their values by block.

    Attributes:
        name: the checkpoint as the user gave it.
        revision: the resolved commit for hub ids, else None.
        origin: `local`, `cache` or `hub`.
        root: the directory that was opened, None when remote only.
        directory: the model's own folder (a sentence-transformers folder may keep it one level down).
        subfolder: that folder relative to the root, empty when they are the same.
        config: the parsed `config.json`, empty when there is none.
        tensors: every stored tensor by name.
        metadata: the first file's `__metadata__`.
        weight_files: the files that hold the tensors, relative to `directory`.
        index_file: the shard index, if any.
        bytes_read: bytes of headers and tensors read so far (configuration files are not counted).
    """

    def __init__(
        self,
        name: str,
        files: Files,
        *,
        origin: str,
        subfolder: str = "",
        revision: str | None = None,
        only: str = "",
    ) -> None:
        self.name, self.origin, self.revision, self.subfolder = name, origin, revision, subfolder
        self.bytes_read = 0
        self._files = files
        self._states: dict[str, dict[str, Any]] = {}
        self.root = files.root
        self.directory = None if files.root is None else files.root / subfolder
        self.config: dict[str, Any] = self._json_in(self.subfolder, "config.json") or {}
        self.index_file, self.weight_files = ("", (only,)) if only else self._locate_weights()
        self.metadata: dict[str, str] | None = None
        self.tensors: Mapping[str, TensorInfo] = self._read_headers()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Forget what is held open; the view is not usable afterwards."""
        self._states.clear()

    @property
    def is_safetensors(self) -> bool:
        """Whether the tensors can be read without torch."""
        return self.weight_files[0].endswith(".safetensors")

    def filenames(self) -> tuple[str, ...]:
        """Names of the files directly in the model's folder."""
        return self._files.names(self.subfolder)

    def has_file(self, filename: str) -> bool:
        """Whether the model's folder, or the root, has the file."""
        return any(self._files.has(name) for name in self._candidates(filename))

    def file(self, filename: str) -> Path:
        """The file as a local path, fetched into the hub cache first if it is remote."""
        for name in self._candidates(filename):
            if self._files.has(name):
                return self._files.path(name)
        raise NotFoundError(f"`{self.name}` has no file `{filename}`", "check the name, or download it again")

    def read_json(self, filename: str) -> dict[str, Any] | None:
        """A JSON object from the model's folder or else from the root; None when there is no such file."""
        found = self._json_in(self.subfolder, filename)
        return self._json_in("", filename) if found is None and self.subfolder else found

    def row_blocks(self, name: str, *, max_bytes: int = 4 << 20) -> Iterator[tuple[int, np.ndarray]]:
        """A tensor as (first row, rows) blocks; a scalar or a vector is one row.

        Args:
            name: a key of `tensors`.
            max_bytes: bound on a block once decoded; one row is the least.

        Returns:
            Blocks [rows, ...] of float32, or of float64 where that is stored.

        Raises:
            UnreadableError: the file ends early, or the dtype is not a floating point one.
        """
        info = self._info(name)
        rows, row_shape = (1, (info.elements,)) if len(info.shape) < 2 else (info.shape[0], info.shape[1:])
        width = math.prod(row_shape)
        step = max(1, max_bytes // max(1, width * (8 if info.dtype == "F64" else 4)))
        if not self.is_safetensors:
            yield from self._torch_blocks(info, rows, row_shape, step)
            return
        where = self._at_root(info.file)
        with closing(self._files.reader(where, info.start, info.end, f"`{name}`")) as reader:
            for first in range(0, rows, step):
                raw = np.empty(min(step, rows - first) * width * DTYPE_BITS[info.dtype] // 8, np.uint8)
                self._fill(reader, raw.data)
                yield first, decode(raw, info.dtype).reshape(-1, *row_shape)

    def tensor(self, name: str) -> np.ndarray:
        """A whole tensor as float32 (float64 where that is stored), for small ones."""
        info = self._info(name)
        whole = np.empty(info.shape, np.float64 if info.dtype == "F64" else np.float32)
        rows = whole.reshape(1, -1) if len(info.shape) < 2 else whole
        for first, block in self.row_blocks(name):
            rows[first : first + len(block)] = block
        return whole

    def raw_blocks(self, name: str, *, max_bytes: int = 4 << 20) -> Iterator[bytes | memoryview]:
        """A tensor's stored bytes in order, of any dtype, in blocks of at most `max_bytes`."""
        info = self.tensors[name]
        if not self.is_safetensors:
            from headscale.torchfile import raw_blocks

            yield from raw_blocks(self._state(info.file)[name], max_bytes)
            return
        with closing(self._files.reader(self._at_root(info.file), info.start, info.end, f"`{name}`")) as reader:
            for first in range(0, info.nbytes, max_bytes):
                block = memoryview(bytearray(min(max_bytes, info.nbytes - first)))
                self._fill(reader, block)
                yield block

    def shared_names(self) -> list[list[str]]:
        """Groups of names that are one tensor in a `.bin` file (tied weights); safetensors never shares."""
        if self.is_safetensors:
            return []
        from headscale.torchfile import shared_storages

        return [group for file in self.weight_files for group in shared_storages(self._state(file))]

    def _info(self, name: str) -> TensorInfo:
        if name not in self.tensors:
            raise NotFoundError(f"`{self.name}` has no tensor `{name}`", "check the name against the file's own keys")
        info = self.tensors[name]
        if info.dtype not in STORED:
            raise UnreadableError(
                f"`{name}` of `{self.name}` is stored as {info.dtype}, not a plain float type",
                "give the checkpoint in float32, float16 or bfloat16; dequantise a quantised one first",
            )
        return info

    def _fill(self, reader: ByteReader, buffer: memoryview) -> None:
        before = reader.received
        reader.readinto(buffer)
        self.bytes_read += reader.received - before

    def _at_root(self, filename: str) -> str:
        return join_name(self.subfolder, filename)

    def _candidates(self, filename: str) -> tuple[str, ...]:
        return (self._at_root(filename), filename) if self.subfolder else (filename,)

    def _json_in(self, folder: str, filename: str) -> dict[str, Any] | None:
        name = join_name(folder, filename)
        if not self._files.has(name):
            return None
        found = load_json(self._files.path(name), name)
        if not isinstance(found, dict):
            raise UnreadableError(f"`{name}` of `{self.name}` is not a JSON object", DOWNLOAD_AGAIN)
        return found

    def _locate_weights(self) -> tuple[str, tuple[str, ...]]:
        found = locate_weights(self._files, self.subfolder)
        if found is None:
            raise _no_weights(self.name, self.filenames(), self.origin)
        missing = [shard for shard in found[1] if not self._files.has(self._at_root(shard))]
        if missing:
            raise NotFoundError(
                f"`{self.name}` lacks {len(missing)} of {len(found[1])} weight files, among them `{missing[0]}`",
                "download the checkpoint again",
            )
        return found

    def _read_headers(self) -> dict[str, TensorInfo]:
        tensors: dict[str, TensorInfo] = {}
        for shard in self.weight_files:
            for key, info in (self._header(shard) if self.is_safetensors else self._torch_header(shard)).items():
                tensors.setdefault(key, info)
        weight_map = (self._json_in(self.subfolder, self.index_file) or {})["weight_map"] if self.index_file else {}
        absent = [key for key in weight_map if key not in tensors]
        if absent:
            raise UnreadableError(
                f"`{self.index_file}` promises `{absent[0]}`, which `{weight_map[absent[0]]}` does not hold",
                DOWNLOAD_AGAIN,
            )
        return tensors

    def _header(self, shard: str) -> dict[str, TensorInfo]:
        name = self._at_root(shard)
        size = self._files.size(name)
        length = header_length(self._bytes(name, 0, min(8, size)), shard, size)
        header = parse_header(self._bytes(name, 8, 8 + length), shard, size)
        self.metadata = self.metadata or header.metadata
        return header.tensors

    def _bytes(self, name: str, start: int, end: int) -> bytes:
        buffer = bytearray(end - start)
        with closing(self._files.reader(name, start, end, "")) as reader:
            self._fill(reader, memoryview(buffer))
        return bytes(buffer)

    def _state(self, shard: str) -> dict[str, Any]:
        from headscale.torchfile import load

        if shard not in self._states:
            self._states[shard] = load(self._files.path(self._at_root(shard)), shard)
        return self._states[shard]

    def _torch_header(self, shard: str) -> dict[str, TensorInfo]:
        from headscale.torchfile import describe

        described = describe(self._state(shard))
        return {key: TensorInfo(key, dtype, shape, shard, 0, size) for key, (dtype, shape, size) in described.items()}

    def _torch_blocks(
        self, info: TensorInfo, rows: int, row_shape: tuple[int, ...], step: int
    ) -> Iterator[tuple[int, np.ndarray]]:
        from headscale.torchfile import float_rows

        tensor = self._state(info.file)[info.name].reshape(rows, *row_shape)
        for first in range(0, rows, step):
            block = float_rows(tensor[first : first + step])
            self.bytes_read += block.size * tensor.element_size()
            yield first, block


def open_checkpoint(
    name: str | Path,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    offline: bool | None = None,
    token: str | bool | None = None,
    on_progress: Callable[[str], None] | None = None,
) -> Checkpoint:
    """Open a checkpoint by path, `bundled:NAME`, or hub id: from the cache, else by byte range from the hub.

    Args:
        name: a directory, a weights file, `bundled:NAME`, or a hub id.
        revision: branch, tag or commit; hub ids only.
        cache_dir: the hub cache, by default where huggingface_hub keeps it.
        offline: never reach out; by default as the environment says.
        token: as huggingface_hub takes it.
        on_progress: told in words what will be fetched, and its size, before that starts.

    Raises:
        NotFoundError: no such path, id, revision or weights; gated; or out of reach.
        UnreadableError: a header, an index or a configuration that cannot be trusted.
    """
    text = str(name)
    path = Path(text).expanduser()
    if text.startswith("bundled:"):
        from headscale import bundled

        return _open_local(text, Path(bundled.path(text.removeprefix("bundled:"))), "local", None)
    if text and path.exists():
        return _open_local(text, path, "local", None)
    if isinstance(name, Path) or looks_like_path(text):
        raise _no_such_path(text, path)
    from headscale import hub

    cached = hub.cached_snapshot(text, revision=revision, cache_dir=cache_dir)
    if cached is not None:
        return _open_local(text, cached[0], "cache", cached[1])
    files = hub.HubFiles(
        text, revision=revision, cache_dir=cache_dir, offline=offline, token=token, on_progress=on_progress
    )
    return Checkpoint(text, files, origin="hub", subfolder=model_folder(files), revision=files.commit)


def looks_like_path(text: str) -> bool:
    """Whether a name that does not exist was meant as a path rather than as a hub id."""
    return (
        not text
        or text.startswith((".", "/", "~"))
        or text.endswith(("/", *_PATH_SUFFIXES))
        or "\\" in text
        or text.count("/") > 1
    )


def _open_local(name: str, path: Path, origin: str, revision: str | None) -> Checkpoint:
    if path.is_file():
        if not path.name.endswith(_WEIGHT_SUFFIXES):
            raise UsageError(f"`{name}` is not a weights file", "give the directory that holds `config.json`")
        return Checkpoint(name, LocalFiles(path.parent), origin=origin, only=path.name)
    files = LocalFiles(path)
    return Checkpoint(name, files, origin=origin, subfolder=model_folder(files), revision=revision)


def _no_such_path(text: str, path: Path) -> NotFoundError:
    siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, siblings, n=1)
    hint = (
        f"did you mean `{path.parent / close[0]}`?" if close else "check the path; a hub id has no leading dot or slash"
    )
    return NotFoundError(f"no file or directory `{text}`", hint)


def _no_weights(name: str, names: tuple[str, ...], origin: str) -> NotFoundError:
    if "adapter_config.json" in names:
        return NotFoundError(f"`{name}` holds only an adapter", "merge it into its base model and save that first")
    other = [entry for entry in names if entry.endswith((".h5", ".msgpack", ".gguf", ".onnx", ".ot", ".safetensors"))]
    if other:
        return NotFoundError(
            f"`{name}` has no `model.safetensors` or `pytorch_model.bin`, only `{other[0]}`",
            "convert it with `from_pretrained` and `save_pretrained` first",
        )
    where = "repository" if origin == "hub" else "directory"
    return NotFoundError(f"the {where} `{name}` holds no model weights", "give a folder with `model.safetensors`")
