"""One training on several processes: each takes its share of every batch, and all see the whole batch's loss.

Representations are gathered, so that every process computes the loss of the whole batch (in-batch negatives and FLOPS
included) and takes the gradient of its own share; the sum over the processes is the gradient of one process with the
whole batch. What fails, is interrupted or runs short of memory on one process does so on all: nobody waits for a
process that has gone another way.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from headscale.batches import Batch
from headscale.environment import launched_processes
from headscale.errors import HeadscaleError, UsageError
from headscale.memory import is_out_of_memory

T = TypeVar("T")

_FINE, _SHORT, _FAILED, _INTERRUPTED = range(4)  # the worst of all processes' words is everyone's


@dataclass
class Team:
    """The processes of a training; `Team()` is one alone, for which nothing below costs anything.

    Args:
        rank: of this process; the first, 0, is the one that writes.
        size: processes in all.
        local_rank: of this process on its machine.
        local_size: processes on this machine.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    _control: Any = None  # a group on the CPU for words, beside the one for tensors
    _signalled: bool = field(default=False, init=False)
    _agreed_on: BaseException | None = field(default=None, init=False, repr=False)

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    def device(self, requested: str) -> str:
        """The device of this process: the GPU of its place on the machine."""
        if self.size == 1:
            return requested
        if requested == "auto":
            requested = "cuda" if torch.cuda.is_available() else "cpu"
        if requested not in ("cuda", "cpu"):
            raise UsageError(
                f"{self.size} processes cannot share the device `{requested}`", "use `auto`, `cuda` or `cpu`"
            )
        return f"cuda:{self.local_rank}" if requested == "cuda" else requested

    def leaves_to_first(self, error: BaseException) -> bool:
        """Whether the first process raises it too, and says it; an interruption is always everyone's."""
        return not self.is_first and (error is self._agreed_on or isinstance(error, KeyboardInterrupt))

    # --- the batch ---------------------------------------------------------------------------------------------

    def check(self, batch_size: int) -> None:
        """Refuse a batch that cannot be shared equally."""
        if batch_size % self.size:
            raise UsageError(
                f"a batch of {batch_size} queries cannot be shared equally by {self.size} processes",
                f"take a batch size that is a multiple of {self.size}",
            )

    def share(self, batch: Batch) -> Batch:
        """This process's queries of a batch with their documents; the teacher's scores stay whole."""
        if self.size == 1:
            return batch
        count, hard = len(batch.queries) // self.size, batch.negatives
        start = self.rank * count
        first = len(batch.queries) + start * hard
        documents = (
            *batch.documents[start : start + count],
            *batch.documents[first : first + count * hard],
        )
        return Batch(batch.queries[start : start + count], documents, batch.teacher)

    def gather(self, forward: Callable[[], Sequence[Tensor]], negatives: int) -> list[Tensor]:
        """Representations of the whole batch, in its order, with the graph of this process's own share.

        Args:
            forward: gives those of this process's queries (b, V) and documents (b (1 + negatives), V).
            negatives: hard negatives per query.
        """
        with self.agreed():
            own = forward()
            room = [rep.new_empty(self.size, *rep.shape) for rep in own] if self.size > 1 else []
        if self.size == 1:
            return list(own)
        queries, documents = (_gathered(rep, place, self) for rep, place in zip(own, room, strict=True))
        count = len(own[0])
        with self.agreed():
            positives, hard = documents[:, :count].flatten(0, 1), documents[:, count:].flatten(0, 1)
            whole = torch.cat([positives, hard]) if negatives else positives
        return [queries.flatten(0, 1), whole]

    def sum_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Add up the gradients of all processes in place."""
        if self.size == 1:
            return
        import torch.distributed as dist

        known = torch.tensor([p.grad is not None for p in parameters], dtype=torch.uint8)
        with _connected():
            dist.all_reduce(known, dist.ReduceOp.MAX, group=self._control)
        with self.agreed():  # a share may leave out what the whole batch reaches
            for parameter, found in zip(parameters, known.tolist(), strict=True):
                if found and parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
        with _connected():
            for work in [dist.all_reduce(p.grad, async_op=True) for p in parameters if p.grad is not None]:
                work.wait()

    def start_alike(self, model: nn.Module) -> None:
        """Give every process the first one's weights."""
        if self.size == 1:
            return
        import torch.distributed as dist

        with _connected(), torch.no_grad():
            for tensor in {id(t): t for t in (*model.parameters(), *model.buffers())}.values():
                dist.broadcast(tensor.detach(), 0)

    # --- agreement ---------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def agreed(self) -> Iterator[None]:
        """What is raised inside on one process is raised on all, at the end of the block.

        Raises:
            KeyboardInterrupt: one was interrupted.
            torch.OutOfMemoryError: one ran short of memory.
            HeadscaleError: another one failed; its own error is raised as it is.
        """
        if self.size == 1:
            yield
            return
        error: BaseException | None = None
        try:
            yield
        except BaseException as caught:
            error = caught
        try:
            self._settle(error)
        except BaseException as settled:
            self._agreed_on = settled if isinstance(settled, HeadscaleError) else None
            raise
        finally:
            error = None  # its traceback holds the batch's tensors

    def first_does(self, work: Callable[[], T]) -> T:
        """What the first process gets from `work`, on every process; so is what it raises."""
        if self.size == 1:
            return work()
        import torch.distributed as dist

        box: list[Any] = [None]
        with self.agreed():
            if self.is_first:
                box = [work()]
        with _connected():
            dist.broadcast_object_list(box, 0, group=self._control)
        result: T = box[0]
        return result

    @contextlib.contextmanager
    def patient(self) -> Iterator[None]:
        """Inside, Ctrl-C waits for the next point where all processes agree; a second one does not."""
        if self.size == 1 or threading.current_thread() is not threading.main_thread():
            yield
            return
        self._signalled = False

        def note(number: int, frame: Any) -> None:
            signal.signal(signal.SIGINT, before)
            self._signalled = True

        before = signal.signal(signal.SIGINT, note)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _settle(self, error: BaseException | None) -> None:
        if self._signalled and error is None:
            error = KeyboardInterrupt()
            self._signalled = False
        word = self._worst(_word_of(error))
        if word == _FINE:
            return
        if word == _FAILED:
            self._raise_failure(error)
        if error is not None and _word_of(error) == word:
            raise error
        if word == _INTERRUPTED:
            raise KeyboardInterrupt
        raise torch.OutOfMemoryError("another process of this training ran out of memory")

    def _worst(self, word: int) -> int:
        import torch.distributed as dist

        words = torch.tensor([word])
        with _connected():
            dist.all_reduce(words, dist.ReduceOp.MAX, group=self._control)
        return int(words)

    def _raise_failure(self, error: BaseException | None) -> None:
        """This process's own error, or the first other one's as far as it can be sent."""
        import torch.distributed as dist

        own = None if error is None or _word_of(error) != _FAILED else _sendable(error, self.rank)
        all_errors: list[Any] = [None] * self.size
        with _connected():
            dist.all_gather_object(all_errors, own, group=self._control)
        if own is not None and error is not None:
            raise error
        kind, message, hint = next(one for one in all_errors if one is not None)
        raise kind(message, hint)


class _Gather(torch.autograd.Function):
    """All processes' tensors; back comes this process's part, for every process has computed the whole loss."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, room: Tensor, team: Team) -> Tensor:
        import torch.distributed as dist

        ctx.rank = team.rank
        ctx.mark_dirty(room)
        with _connected():
            dist.all_gather(list(room.unbind()), own.contiguous())
        return room

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0][ctx.rank], None, None


def _gathered(own: Tensor, room: Tensor, team: Team) -> Tensor:
    whole: Tensor = _Gather.apply(own, room, team)  # type: ignore[no-untyped-call]
    return whole


def _word_of(error: BaseException | None) -> int:
    if error is None:
        return _FINE
    if isinstance(error, KeyboardInterrupt):
        return _INTERRUPTED
    return _SHORT if is_out_of_memory(error) else _FAILED


def _sendable(error: BaseException, rank: int) -> tuple[type[HeadscaleError], str, str]:
    if isinstance(error, HeadscaleError):
        return type(error), error.message, error.hint
    return HeadscaleError, f"process {rank} failed: {type(error).__name__}: {error}", "its own message says more"


@contextlib.contextmanager
def _connected() -> Iterator[None]:
    """A broken connection as a sentence."""
    try:
        yield
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        raise HeadscaleError(
            "another process of this training ended before it was done",
            "its own message says why; a smaller `--micro-batch`, if memory was short",
        ) from error


# --- starting --------------------------------------------------------------------------------------------------


def join() -> Team:
    """The team of a process group that is initialised, by `torchrun` scripts, accelerate or `launched`.

    Raises:
        UsageError: `torch.distributed` is not initialised.
    """
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        raise UsageError(
            "there is no process group to join", "call `torch.distributed.init_process_group` or run under `torchrun`"
        )
    local_rank = int(os.environ.get("LOCAL_RANK", dist.get_rank()))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))
    # Words travel on the CPU also where tensors travel between GPUs.
    control = dist.group.WORLD if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")
    return Team(dist.get_rank(), dist.get_world_size(), local_rank, local_size, control)


@contextlib.contextmanager
def launched(device: str = "auto") -> Iterator[Team]:
    """The team that `torchrun` or `accelerate launch` has started this process in; one alone without them.

    Args:
        device: of the training: "cpu" talks over gloo, GPUs over nccl.

    Raises:
        HeadscaleError: fewer GPUs than processes on this machine.
    """
    if launched_processes() == 1:
        yield Team()
        return
    import torch.distributed as dist

    backend = "nccl" if device != "cpu" and torch.cuda.is_available() else "gloo"
    if backend == "nccl":
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        if local_rank >= torch.cuda.device_count():
            raise HeadscaleError(
                f"there is no GPU for process {local_rank} of this machine",
                f"start {torch.cuda.device_count()} processes a machine, or use `--device cpu`",
            )
        torch.cuda.set_device(local_rank)
    with _connected():
        dist.init_process_group(backend)
    try:
        yield join()
    finally:
        dist.destroy_process_group()
