"""Statistics of the head's weights, block by block, so that memory does not grow with the checkpoint."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np

from headscale.errors import UnreadableError
from headscale.records import ROW_NORM_QUANTILES, WeightStatistics

if TYPE_CHECKING:
    from headscale.checkpoint import Checkpoint
    from headscale.head import LoadedHead
    from headscale.stored import StoredHead

Blocks = Iterable[tuple[int, np.ndarray]]
_BLOCK_BYTES = 1 << 20  # of float32; measured: 4 MB are no faster, and take 34 MB in float64 instead of 7
_GRAM_ROWS = 1024  # rows of a Gram matrix's product: measured, 341 take half as long again


def stored_weight_statistics(
    checkpoint: Checkpoint,
    stored: StoredHead,
    *,
    special_ids: Collection[int] = (),
    unused_ids: Collection[int] = (),
    spectral: bool = False,
) -> WeightStatistics:
    """Norms of a head on disk; only the head's tensors are read.

    Args:
        checkpoint: the open checkpoint.
        stored: where its head is (`headscale.stored.read_head`).
        special_ids: rows of special tokens, reported apart.
        unused_ids: rows that no text can produce, reported apart.
        spectral: add singular values, spectral norm and stable rank.

    Raises:
        UnreadableError: a value is not finite.
    """
    head = stored.head
    bias = _vector(checkpoint, stored, head.bias, head.vocab_size)
    gain = _vector(checkpoint, stored, f"{head.norm}.weight" if head.norm else None, head.width)
    if gain is not None and head.norm_kind == "one_plus":
        gain = 1.0 + gain
    return weight_statistics(
        _ahead(_stored_blocks(checkpoint, stored)),
        bias=bias,
        gain=gain,
        special_ids=special_ids,
        unused_ids=unused_ids,
        spectral=spectral,
        name=checkpoint.name,
    )


def loaded_weight_statistics(
    loaded: LoadedHead,
    *,
    special_ids: Collection[int] = (),
    unused_ids: Collection[int] = (),
    spectral: bool = False,
) -> WeightStatistics:
    """Norms of a head in memory; arguments as for `stored_weight_statistics`."""
    head = loaded.head
    gain = None
    if head.norm is not None:
        gain = _numpy(loaded.model.get_submodule(head.norm).weight)
        gain = 1.0 + gain if head.norm_kind == "one_plus" else gain
    bias = None if loaded.bias is None else _numpy(loaded.bias)
    return weight_statistics(
        _loaded_blocks(loaded),
        bias=bias,
        gain=gain,
        special_ids=special_ids,
        unused_ids=unused_ids,
        spectral=spectral,
        name=head.architecture,
    )


def weight_statistics(
    blocks: Blocks,
    *,
    bias: np.ndarray | None,
    gain: np.ndarray | None,
    special_ids: Collection[int] = (),
    unused_ids: Collection[int] = (),
    spectral: bool = False,
    name: str = "the head",
) -> WeightStatistics:
    """Norms of a matrix given as (first row, rows) blocks in order.

    Args:
        blocks: float32 or float64 rows, each (rows, width).
        bias: (vocab,) or None.
        gain: (width,) the gain of the norm that feeds the matrix, or None.
        special_ids: rows reported apart.
        unused_ids: rows reported apart.
        spectral: add singular values, from the Gram matrix: products of blocks, in float32 where a block has a
            thousand rows, summed in float64. Measured on (50,368, 768): the largest is right to 1e-8, one of a
            thousandth of it to 2e-4.
        name: what to call the head in an error.

    Raises:
        UnreadableError: a value is not finite, or there is no row.
    """
    row_squares, column_squares, gram = _accumulate(blocks, spectral)
    _check_finite(name, row_squares, bias, gain)
    rows, width = len(row_squares), len(column_squares)
    norms = np.sqrt(row_squares)
    total = float(row_squares.sum())
    weighted = total if gain is None else float((np.square(gain, dtype=np.float64) * column_squares).sum())
    special, unused = _rows(norms, special_ids), _rows(norms, unused_ids)
    quantiles = np.interp(np.array(ROW_NORM_QUANTILES) / 100 * (rows - 1), np.arange(rows), np.sort(norms))
    return WeightStatistics(
        frobenius=total**0.5,
        rms=(total / (rows * width)) ** 0.5,
        row_norm_mean=float(norms.mean()),
        row_norm_sd=float(norms.std()),
        row_norm_min=float(norms.min()),
        row_norm_max=float(norms.max()),
        row_norm_quantiles=tuple(float(q) for q in quantiles),
        special_rows=len(special),
        special_row_norm_mean=_mean(special),
        unused_rows=len(unused),
        unused_row_norm_mean=_mean(unused),
        zero_rows=int((norms == 0).sum()),
        bias_norm=None if bias is None else float(np.sqrt(np.square(bias, dtype=np.float64).sum())),
        bias_mean=None if bias is None else float(bias.mean(dtype=np.float64)),
        bias_min=None if bias is None else float(bias.min()),
        bias_max=None if bias is None else float(bias.max()),
        gain_mean=None if gain is None else float(gain.mean(dtype=np.float64)),
        gain_rms=None if gain is None else float(np.sqrt(np.square(gain, dtype=np.float64).mean())),
        effective_norm=weighted**0.5,
        **_spectrum(gram, total),
    )


def _accumulate(blocks: Blocks, spectral: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    row_squares: list[np.ndarray] = []
    column_squares: Any = 0.0
    gram = _Gram() if spectral else None
    for _, block in blocks:
        if gram is not None:
            gram.add(block)
        wide = block.astype(np.float64)  # squares of float32 overflow at 2e19, and lose small values
        np.square(wide, out=wide)
        row_squares.append(wide.sum(axis=1))
        column_squares = column_squares + wide.sum(axis=0)
    if not row_squares:
        raise UnreadableError("the head's matrix has no rows", hint="download the checkpoint again")
    return np.concatenate(row_squares), column_squares, None if gram is None else gram.result()


class _Gram:
    """The Gram matrix of rows that come in blocks."""

    def __init__(self) -> None:
        self.waiting: list[np.ndarray] = []
        self.total: np.ndarray | None = None

    def add(self, block: np.ndarray) -> None:
        self.waiting.append(block)
        if sum(map(len, self.waiting)) >= _GRAM_ROWS:
            self._multiply()

    def result(self) -> np.ndarray | None:
        if self.waiting:
            self._multiply()
        return self.total

    def _multiply(self) -> None:
        rows = np.concatenate(self.waiting)
        self.waiting = []
        if len(rows) < _GRAM_ROWS or rows.dtype == np.float64:
            product = _product(rows.astype(np.float64))
        else:  # a power of two is exact, and keeps float32 from overflow
            size = np.exp2(np.clip(np.ceil(np.log2(max(rows.max(), -rows.min(), 1e-30))), -126.0, 126.0))
            product = _product(rows * np.float32(1 / size)).astype(np.float64) * float(size) ** 2
        self.total = product if self.total is None else self.total + product


def _product(rows: np.ndarray) -> np.ndarray:
    product: np.ndarray = rows.T @ rows
    return product


def _spectrum(gram: np.ndarray | None, total: float) -> dict[str, Any]:
    if gram is None:
        return {}
    values = np.sqrt(np.clip(np.linalg.eigvalsh(gram)[::-1], 0.0, None))
    largest = float(values[0])
    return {
        "spectral_norm": largest,
        "stable_rank": total / largest**2 if largest > 0 else 0.0,
        "singular_values": tuple(float(v) for v in values),
    }


def _check_finite(name: str, row_squares: np.ndarray, bias: np.ndarray | None, gain: np.ndarray | None) -> None:
    parts = {"matrix": row_squares, "bias": bias, "feeding norm": gain}
    bad = [part for part, values in parts.items() if values is not None and not np.isfinite(values).all()]
    if bad:
        raise UnreadableError(
            f"the {' and the '.join(bad)} of the MLM head of `{name}` holds values that are not finite",
            hint="the checkpoint is damaged or diverged in training: use an earlier one",
        )


def _rows(norms: np.ndarray, ids: Collection[int]) -> np.ndarray:
    inside = [i for i in sorted(ids) if 0 <= i < len(norms)]
    return norms[inside]


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None


def _vector(checkpoint: Checkpoint, stored: StoredHead, name: str | None, size: int) -> np.ndarray | None:
    """A bias or gain of the head; what the checkpoint lacks is loaded as zeros."""
    if name is None:
        return None
    key = stored.keys.get(name)
    return np.zeros(size, np.float32) if key is None else checkpoint.tensor(key).reshape(-1)


def _stored_blocks(checkpoint: Checkpoint, stored: StoredHead) -> Iterator[tuple[int, np.ndarray]]:
    first, *rest = (stored.keys[name] for name in stored.head.matrix)
    extra = [checkpoint.tensor(key).T for key in rest]
    for start, rows in checkpoint.row_blocks(first, max_bytes=_BLOCK_BYTES):
        yield start, np.concatenate([rows, *(e[start : start + len(rows)] for e in extra)], axis=1) if extra else rows


def _ahead(blocks: Iterator[tuple[int, np.ndarray]]) -> Iterator[tuple[int, np.ndarray]]:
    """The same blocks, the next one read while this one is summed."""
    with ThreadPoolExecutor(1) as reader:
        coming = reader.submit(next, blocks, None)
        while (block := coming.result()) is not None:
            coming = reader.submit(next, blocks, None)
            yield block


def _loaded_blocks(loaded: LoadedHead) -> Iterator[tuple[int, np.ndarray]]:
    weight = loaded.weight.detach()
    step = max(1, _BLOCK_BYTES // (4 * weight.shape[1]))
    for start in range(0, weight.shape[0], step):
        yield start, _numpy(weight[start : start + step])


def _numpy(tensor: Any) -> np.ndarray:
    values: np.ndarray = tensor.detach().float().cpu().numpy()
    return values
