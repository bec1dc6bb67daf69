"""Pickled torch checkpoints (`.bin`), read as tensors only: nothing in the file is ever executed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from headscale.errors import UnreadableError

if TYPE_CHECKING:
    import torch

_HINT = "use a safetensors file, or save it again with a current torch from a source that you trust"
_NAMES = {
    **{"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "complex64": "C64"},
    **{"int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL"},
    **{"uint64": "U64", "uint32": "U32", "uint16": "U16"},
    **{"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float8_e8m0fnu": "F8_E8M0"},
}


def load(path: Path, label: str) -> dict[str, torch.Tensor]:
    """The tensors of a pickled checkpoint by name, memory-mapped where the format allows it.

    Raises:
        UnreadableError: damaged, holding more than tensors, or of a kind that torch cannot read safely.
    """
    import torch

    _check_complete(path, label)
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except MemoryError:
        raise
    except Exception as error:  # torch raises a dozen kinds here; all mean that the file cannot be trusted
        raise UnreadableError(_reason(label, error), _HINT) from error
    tensors = {key: value for key, value in _items(found) if isinstance(value, torch.Tensor)}
    if not tensors:
        raise UnreadableError(f"`{label}` holds no tensors by name", _HINT)
    return tensors


def describe(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[str, tuple[int, ...], int]]:
    """Dtype (safetensors spelling), shape and size in bytes of every tensor."""
    return {
        name: (dtype_name(tensor), tuple(tensor.shape), tensor.numel() * tensor.element_size())
        for name, tensor in tensors.items()
    }


def dtype_name(tensor: torch.Tensor) -> str:
    """The safetensors name of a tensor's dtype; an unusual one keeps torch's."""
    plain = str(tensor.dtype).removeprefix("torch.")
    if tensor.is_quantized or str(tensor.layout) != "torch.strided":
        return f"{plain} ({tensor.layout})" if not tensor.is_quantized else plain
    return _NAMES.get(plain, plain)


def float_rows(rows: torch.Tensor) -> np.ndarray:
    """Rows of a floating point tensor as an array of their own, float32 unless stored as float64."""
    import torch

    kept = rows.dtype if rows.dtype == torch.float64 else torch.float32
    return np.array(rows.detach().to(kept).numpy())


def raw_blocks(tensor: torch.Tensor, max_bytes: int) -> Iterator[memoryview]:
    """A tensor's bytes in row-major order, whatever its strides and dtype, in blocks of about `max_bytes`."""
    import torch

    rows = tensor.detach().reshape(1, -1) if tensor.dim() < 2 else tensor.detach()
    width = math.prod(rows.shape[1:]) * rows.element_size()
    step = max(1, max_bytes // max(1, width))
    for first in range(0, rows.shape[0] if width else 0, step):
        block = rows[first : first + step].contiguous().reshape(-1).view(torch.uint8)
        yield block.numpy().data


def shared_storages(tensors: dict[str, torch.Tensor]) -> list[list[str]]:
    """Groups of names whose tensors lie in one storage (tied weights), in file order."""
    groups: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        if tensor.numel():
            groups.setdefault(tensor.untyped_storage().data_ptr(), []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def _items(found: Any) -> Any:
    return found.items() if isinstance(found, dict) else ()


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _check_complete(path: Path, label: str) -> None:
    try:
        if path.stat().st_size == 0:
            raise UnreadableError(f"`{label}` is empty", "download the file again")
        with path.open("rb") as file:
            start = file.read(64)
    except OSError as error:
        raise UnreadableError(f"`{label}` cannot be read: {error.strerror}", "check the permissions") from error
    if start.startswith(b"version https://git-lfs"):
        raise UnreadableError(f"`{label}` is a git-lfs pointer, not the file itself", "run `git lfs pull`")


def _reason(label: str, error: Exception) -> str:
    text = str(error)
    if "weights_only" in text.lower() or "unsupported" in text.lower():
        culprit = next((word for word in ("GLOBAL ", "global ") if word in text), "")
        named = text.split(culprit, 1)[1].split()[0] if culprit else ""
        what = f" (it asks for `{named}`)" if named and "." in named else ""
        return f"`{label}` holds more than plain tensors{what}, so it is not loaded"
    return f"`{label}` is damaged, or is no torch checkpoint: {type(error).__name__}"
