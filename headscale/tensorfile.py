"""The safetensors format: a header checked before anything is believed, and exact decoding in numpy."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from headscale.errors import UnreadableError
from headscale.files import DOWNLOAD_AGAIN

# The bound of the safetensors library itself; a longer header is garbage or an attack.
MAX_HEADER_BYTES = 100_000_000
# Bits per element of the safetensors dtypes (the format's own list, safetensors 0.8).
DTYPE_BITS = {
    **dict.fromkeys(("BOOL", "I8", "U8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **{"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6},
}
STORED = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}


@dataclass(frozen=True)
class TensorInfo:
    """One stored tensor: its dtype (safetensors spelling), shape, and absolute byte range within `file`.

    `file` is relative to the checkpoint's directory. In a `.bin` file the range is 0 to the tensor's size,
    for storages may be shared and strided there.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        """Stored size in bytes."""
        return self.end - self.start

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    """A parsed safetensors header, in file order, with the file's own metadata."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str] | None
    data_start: int


def header_length(raw: bytes, label: str, size: int) -> int:
    """The length of a safetensors header, from the first eight bytes, checked against the file's size."""
    if len(raw) < 8:
        raise UnreadableError(f"`{label}` is truncated: {size} bytes hold no header", DOWNLOAD_AGAIN)
    if raw == b"version ":
        raise UnreadableError(f"`{label}` is a git-lfs pointer, not the file itself", "run `git lfs pull`")
    length = int.from_bytes(raw, "little")
    if length > MAX_HEADER_BYTES:
        raise UnreadableError(
            f"`{label}` is not a safetensors file: its header would be {length} bytes", DOWNLOAD_AGAIN
        )
    if 8 + length > size:
        raise UnreadableError(
            f"`{label}` is truncated: the header alone needs {8 + length} bytes and the file has {size}",
            DOWNLOAD_AGAIN,
        )
    return length


def parse_header(raw: bytes, label: str, size: int) -> Header:
    """Parse and check a safetensors header: ranges inside the file, gapless, as long as the shapes say."""
    try:
        entries = json.loads(raw, object_pairs_hook=_unique)
        if not isinstance(entries, dict):
            raise ValueError("not an object")
        metadata = entries.pop("__metadata__", None)
        if metadata is not None and not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("its metadata is not plain text")
        data_start = 8 + len(raw)
        tensors = {name: _tensor_info(name, entry, label, data_start) for name, entry in entries.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UnreadableError(f"`{label}` has a garbled safetensors header: {error}", DOWNLOAD_AGAIN) from error
    _check_ranges(tensors.values(), label, data_start, size)
    return Header(tensors, metadata, data_start)


def decode(raw: np.ndarray, dtype: str) -> np.ndarray:
    """Stored bytes as float32 (float64 stays float64); bfloat16 is the upper half of a float32, so exact."""
    stored = raw.view(STORED[dtype])
    if dtype == "BF16":
        wide = stored.astype(np.uint32)
        wide <<= 16
        return wide.view(np.float32)
    return stored.astype(np.float32) if dtype == "F16" else stored


def encode(values: np.ndarray, dtype: str, label: str) -> np.ndarray:
    """Values as they are stored; bfloat16 rounds to nearest even, and uint16 values are taken as bfloat16 already.

    Raises:
        UnreadableError: a finite value does not fit the type.
    """
    if dtype == "BF16" and values.dtype == np.uint16:
        return np.ascontiguousarray(values, STORED[dtype])
    with np.errstate(over="ignore"):
        stored = _to_bfloat16(values) if dtype == "BF16" else np.ascontiguousarray(values, STORED[dtype])
    narrowed = stored.dtype.itemsize < values.dtype.itemsize
    if narrowed and np.isfinite(values).all() and not np.isfinite(decode(_raw(stored), dtype)).all():
        raise UnreadableError(f"`{label}` holds values too large for {dtype}", "store it as F32")
    return stored


def encode_header(
    listed: Iterable[TensorInfo], ordered: Iterable[TensorInfo], metadata: dict[str, str] | None
) -> bytes:
    """The start of a safetensors file: `listed` is the order of the entries, `ordered` that of the data."""
    places, position = {}, 0
    for info in ordered:
        places[info.name] = [position, position + info.nbytes]
        position += info.nbytes
    entries: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    for info in listed:
        entries[info.name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": places[info.name]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def read_header(path: Path, label: str) -> tuple[Header, bytes]:
    """The checked header of a safetensors file, and the file's bytes up to its data."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        text = file.read(header_length(start, label, size))
    return parse_header(text, label, size), start + text


def _raw(stored: np.ndarray) -> np.ndarray:
    return stored.reshape(-1).view(np.uint8)


def _to_bfloat16(values: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(values, "<f4").view("<u4")
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    rounded[np.isnan(values)] = 0x7FC0  # rounding could carry a NaN over into infinity
    return rounded.astype(STORED["BF16"])


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key appears twice")
    return found


def _tensor_info(name: str, entry: dict[str, Any], label: str, data_start: int) -> TensorInfo:
    shape, (start, end), dtype = entry["shape"], entry["data_offsets"], entry["dtype"]
    if not all(type(number) is int and number >= 0 for number in (*shape, start, end)) or end < start:
        raise ValueError(f"`{name}` has an impossible shape or range")
    if dtype not in DTYPE_BITS:
        raise ValueError(f"`{name}` has the unknown type `{dtype}`")
    info = TensorInfo(name, dtype, tuple(shape), label, data_start + start, data_start + end)
    if info.elements * DTYPE_BITS[dtype] != 8 * info.nbytes:
        raise ValueError(f"`{name}` of shape {list(shape)} and type {dtype} cannot take {info.nbytes} bytes")
    return info


def _check_ranges(tensors: Any, label: str, data_start: int, size: int) -> None:
    position = data_start
    for info in sorted(tensors, key=lambda info: (info.start, info.end)):
        if info.start != position:
            fault = "overlaps" if info.start < position else "leaves a gap after"
            raise UnreadableError(f"`{label}` is corrupt: `{info.name}` {fault} the tensor before it", DOWNLOAD_AGAIN)
        position = info.end
    if position > size:
        raise UnreadableError(
            f"`{label}` is truncated: its header promises {position} bytes and the file has {size}",
            DOWNLOAD_AGAIN,
        )
    if position < size:
        raise UnreadableError(
            f"`{label}` is corrupt: {size - position} bytes follow the last tensor of its header",
            DOWNLOAD_AGAIN,
        )
