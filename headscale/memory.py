"""What a training step will need, before the first one: a kernel that kills leaves no sentence behind."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from headscale.encoder import SpladeEncoder
from headscale.errors import MemoryForecastError

# What a step holds beyond what is counted: gradients in flight and the allocator's slack, as a share of what is
# saved for the way back, and the pooling's tiles. Measured: the forecast is 0.89 to 1.07 of the growth of
# the resident set for BERT and ModernBERT of width 128 to 256, 2 to 6 layers, vocabularies of 6,000 and 30,000.
_OVERHEAD = 1.25
_SCRATCH = 20 * 2**20


@dataclass(frozen=True)
class MemoryForecast:
    """Bytes a training step needs beyond the model's own weights.

    Args:
        fixed: gradients, AdamW's two moments, and two copies of the matrix for observing its update.
        per_query, per_document: saved for the way back by one text of the longest kind.
        per_rep: a representation and its gradient.
    """

    fixed: int
    per_query: int
    per_document: int
    per_rep: int

    def needed(self, queries: int, documents: int, micro_batch: int | None = None) -> int:
        """Bytes of a step with that many texts, all at once or in parts."""
        saved = (queries + documents) * self.per_rep
        if micro_batch is None:
            saved += queries * self.per_query + documents * self.per_document
        else:
            saved += micro_batch * max(self.per_query, self.per_document)
        return self.fixed + _SCRATCH + int(_OVERHEAD * saved)

    def largest_part(self, queries: int, documents: int, available: int) -> int:
        """Texts that fit at once; 0 where not even one does."""
        room = (available - self.needed(queries, documents, 0)) / _OVERHEAD
        return max(0, int(room / max(self.per_query, self.per_document)))


def forecast_memory(
    encoder: SpladeEncoder,
    query: tuple[str, int],
    document: tuple[str, int],
    parameters: Iterable[Tensor],
    matrices: Iterable[Tensor],
) -> MemoryForecast:
    """Forecast from one forward pass of one query and one document, counting what autograd keeps.

    Args:
        encoder: the one that will train.
        query, document: a long text of each kind, and its length in tokens.
        parameters: what is trained.
        matrices: the head's, whose update is observed.
    """
    size = sum(p.numel() * p.element_size() for p in parameters)
    observed = sum(m.numel() * m.element_size() for m in matrices)
    with torch.random.fork_rng(devices=[]):  # it is the CPU that needs a forecast
        saved = [_saved_by(encoder, text, length) for text, length in (query, document)]
    width = 2 * encoder.head.vocab_size * encoder.head.weight.element_size()
    return MemoryForecast(3 * size + 2 * observed, saved[0], saved[1], width)


def _saved_by(encoder: SpladeEncoder, text: str, length: int) -> int:
    """Bytes of distinct storage that the way back needs, parameters not counted."""
    own = {p.untyped_storage().data_ptr() for p in encoder.head.model.parameters()}
    kept: dict[int, int] = {}
    alive: list[Tensor] = []  # so that no address is counted for two tensors

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        encoder([text], length)
    return sum(kept.values())


def check_memory(forecast: MemoryForecast, queries: int, documents: int, micro_batch: int | None) -> None:
    """Refuse a step that would not fit in what is free now.

    Raises:
        MemoryForecastError: with the largest part of a batch that would fit.
    """
    available = available_memory()
    needed = forecast.needed(queries, documents, micro_batch)
    if available is None or needed <= available:
        return
    part = forecast.largest_part(queries, documents, available)
    hint = f"take {part} texts at a time (`micro_batch` {part}): the gradients are the same"
    if part < 1 or part >= (micro_batch or documents):
        hint = "use a smaller model or shorter texts: what the optimizer holds alone leaves no room"
    raise MemoryForecastError(
        f"a step of {queries} queries and {documents} documents needs about {needed / 2**30:.1f} GiB,"
        f" and {available / 2**30:.1f} GiB are free",
        hint,
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator had no room: CUDA's, which has a class of its own, MPS's, the CPU's, or Python's."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    words = ("DefaultCPUAllocator: can't allocate memory", "DefaultCPUAllocator: not enough memory",
             "MPS backend out of memory")  # fmt: skip
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def available_memory() -> int | None:
    """Bytes that can be taken without swapping, the container's limit included; None where it is not known."""
    known = [value for value in (_system_available(), _container_available()) if value is not None]
    return min(known, default=None)


def _system_available() -> int | None:
    for line in _lines(Path("/proc/meminfo")):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _container_available() -> int | None:
    """Limit less use of the control group (version 2)."""
    root = Path("/sys/fs/cgroup")
    limit, used = _lines(root / "memory.max"), _lines(root / "memory.current")
    if not limit or not used or not limit[0].isdigit():
        return None
    reclaimable = sum(
        int(line.split()[1]) for line in _lines(root / "memory.stat") if line.startswith("inactive_file ")
    )
    return max(0, int(limit[0]) - int(used[0]) + reclaimable)


def _lines(path: Path) -> Sequence[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
