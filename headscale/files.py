"""The files of a checkpoint: which hold the weights, and how to read bytes of them from a local directory."""

from __future__ import annotations

import json
from collections.abc import Collection
from fnmatch import fnmatchcase as fnmatch
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from headscale.errors import UnreadableError

DOWNLOAD_AGAIN = "download or copy the file again; it does not match what was published"

# In the order in which transformers looks for them.
WEIGHT_LAYOUTS = (
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)

# Weights of the same model in another format, by the names that transformers, optimum and others give them, and
# training state: stale as soon as a tensor is edited.
_OTHER_FORMATS = (
    *("model*.safetensors", "model*.safetensors.index.json", "consolidated*", "*.gguf", "rust_model.ot"),
    *("pytorch_model*.bin", "pytorch_model*.bin.index.json", "tf_model*.h5*", "flax_model*.msgpack*"),
    *("*.onnx", "*.onnx_data", "openvino_model*", "*.tflite", "optimizer.pt", "optimizer.bin", ".git"),
)
_OTHER_FOLDERS = ("onnx", "openvino", "coreml", "original", ".git", ".cache", "__pycache__")


class ByteReader(Protocol):
    """Reads one byte range from front to back."""

    received: int

    def readinto(self, buffer: memoryview) -> None:
        """Fill the buffer with the next bytes, or raise `UnreadableError`."""

    def close(self) -> None:
        """Release the file or connection."""


class Files(Protocol):
    """The files of one checkpoint, wherever they are; names are relative to its root, with slashes."""

    @property
    def root(self) -> Path | None:
        """The local directory, None when remote."""

    def has(self, name: str) -> bool:
        """Whether the file exists."""

    def names(self, folder: str) -> tuple[str, ...]:
        """Names of the files directly in a folder, sorted."""

    def path(self, name: str) -> Path:
        """The file as a local path, fetched first if need be."""

    def size(self, name: str) -> int:
        """Size of the file in bytes."""

    def reader(self, name: str, start: int, end: int, what: str) -> ByteReader:
        """A reader of the bytes from `start` to `end`; `what` names them to the user, if not empty."""


class _FileReader:
    """Plain unbuffered reads: unlike a memory map they never grow the resident set."""

    def __init__(self, path: Path, label: str, start: int) -> None:
        try:
            self._file = path.open("rb", buffering=0)
        except OSError as error:
            raise UnreadableError(f"`{path}` cannot be opened: {error.strerror}", "check the permissions") from error
        self._label, self._start, self.received = label, start, 0
        self._file.seek(start)

    def readinto(self, buffer: memoryview) -> None:
        """Fill the buffer with the next bytes, or raise `UnreadableError`."""
        filled = 0
        while filled < len(buffer):
            count = self._file.readinto(buffer[filled:])
            if not count:
                end = self._start + self.received + filled
                raise UnreadableError(f"`{self._label}` is truncated: it ends at byte {end}", DOWNLOAD_AGAIN)
            filled += count
        self.received += filled

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class LocalFiles:
    """The files of a local directory."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def has(self, name: str) -> bool:
        """Whether the file exists."""
        return (self.root / name).is_file()

    def names(self, folder: str) -> tuple[str, ...]:
        """Names of the files directly in a folder, sorted."""
        return tuple(sorted(entry.name for entry in (self.root / folder).iterdir() if entry.is_file()))

    def path(self, name: str) -> Path:
        """The file as a local path."""
        return self.root / name

    def size(self, name: str) -> int:
        """Size of the file in bytes."""
        return (self.root / name).stat().st_size

    def reader(self, name: str, start: int, end: int, what: str) -> _FileReader:
        """A reader of plain bytes from `start` on."""
        return _FileReader(self.root / name, name, start)


def model_folder(files: Files) -> str:
    """The folder of the transformer inside a sentence-transformers checkpoint, empty for a plain one."""
    modules = load_json(files.path("modules.json"), "modules.json") if files.has("modules.json") else []
    for module in modules if isinstance(modules, list) else []:
        kind, folder = str(module.get("type", "")), str(module.get("path", ""))
        if kind.endswith("Router") and files.has(join_name(folder, "router_config.json")):
            folder = _routed(
                load_json(files.path(join_name(folder, "router_config.json")), "router_config.json"), folder
            )
        elif not kind.endswith("Transformer"):
            continue
        if files.has(join_name(folder, "config.json")):
            return folder
    return ""


def locate_weights(files: Files, folder: str) -> tuple[str, tuple[str, ...]] | None:
    """The shard index (empty for a single file) and the weight files of a model's folder, None when it has none."""
    names = files.names(folder)
    for single, index in WEIGHT_LAYOUTS:
        if single in names:
            return "", (single,)
        if index in names:
            return index, shard_names(load_json(files.path(join_name(folder, index)), index), index)
    return None


def left_out(name: str, folder: str, used: Collection[str]) -> bool:
    """Whether a full copy does without the file (named from the root): other formats, training state, caches.

    Args:
        name: the file, relative to the root.
        folder: the model's folder.
        used: the weight files and their index, relative to the root.
    """
    inside = PurePosixPath(name.removeprefix(f"{folder}/") if folder else name)
    if name in used:
        return False
    if any(parent in _OTHER_FOLDERS for parent in PurePosixPath(name).parts[:-1]):
        return True
    return len(inside.parts) == 1 and any(fnmatch(inside.name, pattern) for pattern in _OTHER_FORMATS)


def load_json(path: Path, label: str) -> Any:
    """Parse a JSON file, or say which one is broken."""
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UnreadableError(f"`{label}` is not valid JSON: {error}", DOWNLOAD_AGAIN) from error
    except OSError as error:
        raise UnreadableError(f"`{label}` cannot be read: {error.strerror}", "check the permissions") from error


def shard_names(index: Any, label: str) -> tuple[str, ...]:
    """The files that a shard index names, in order; a name that leaves the folder is refused."""
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise UnreadableError(f"`{label}` has no `weight_map`", DOWNLOAD_AGAIN)
    for shard in weight_map.values():
        if not isinstance(shard, str) or PurePosixPath(shard).is_absolute() or ".." in PurePosixPath(shard).parts:
            raise UnreadableError(f"`{label}` names a file outside the checkpoint: `{shard}`", DOWNLOAD_AGAIN)
    return tuple(sorted(set(weight_map.values())))


def join_name(folder: str, name: str) -> str:
    """A file's name relative to the root."""
    return f"{folder}/{name}" if folder else name


def _routed(config: Any, folder: str) -> str:
    """The document side's transformer of a router: that is the encoder with the head that is trained."""
    structure = config.get("structure", {})
    chain: list[str] = structure.get("document") or next(iter(structure.values()), [])
    kinds = config.get("types", {})
    return next((join_name(folder, key) for key in chain if str(kinds.get(key, key)).endswith("Transformer")), folder)
