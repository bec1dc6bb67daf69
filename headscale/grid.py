"""The sweep: backbones x constants x learning rates x seeds as independent cells, resumed cell by cell.

A cell is a pure function of its configuration, so where it runs does not matter: an executor takes configurations and
yields outcomes as they finish. Here is the local one; its workers are processes of their own, so that one that is
killed costs one cell.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Protocol

from headscale import cells
from headscale.constants import ratio_text
from headscale.errors import HeadscaleError, UsageError
from headscale.recipes import TrainingConfig
from headscale.records import SweepRow, TrainedCell
from headscale.trials import KIND, SCALED_MODES, Bench, folder_of, run_cell

Configuration = dict[str, Any]


@dataclass(frozen=True)
class Outcome:
    """How one cell ended.

    Args:
        configuration: the cell.
        status: `done` or `failed`.
        message: what went wrong, or "".
        hint: what to do about it, or "".
    """

    configuration: Configuration
    status: str
    message: str = ""
    hint: str = ""


class Executor(Protocol):
    """What runs cells somewhere and yields their outcomes as they finish, each kept in `run` by then."""

    def __call__(self, configurations: Sequence[Configuration], run: Path) -> Iterator[Outcome]:
        """Run the cells; when closed or interrupted, end what is running."""


# --- the grid ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Axes:
    """The axes of a grid around one recipe; every combination is a cell, in this order, seeds innermost.

    Args:
        scales: constants; None is the untouched head, as it comes.
        modes: where a constant is written.
        head_lr_multipliers: of the head's learning rate, for constants that are written untied.
        lrs: learning rates; empty: the recipe's.
        seeds: of every cell.
        shifts: added to the logits before each constant; an untouched head has none.
    """

    scales: tuple[float | None, ...]
    modes: tuple[str, ...] = ("untie",)
    head_lr_multipliers: tuple[float, ...] = (1.0,)
    lrs: tuple[float, ...] = ()
    seeds: tuple[int, ...] = (0,)
    shifts: tuple[float, ...] = (0.0,)

    def check(self) -> None:
        """Refuse a mode that does not exist."""
        unknown = [mode for mode in self.modes if mode not in SCALED_MODES]
        if unknown:
            raise UsageError(
                f"`--modes {unknown[0]}` is none of {', '.join(SCALED_MODES)}", "see `headscale sweep --help`"
            )

    def with_starts(self, scales: tuple[float | None, ...], shifts: tuple[float, ...] = (0.0,)) -> Axes:
        """The same grid over other constants and shifts."""
        return replace(self, scales=scales, shifts=shifts)

    def trainings(self, recipe: TrainingConfig) -> list[TrainingConfig]:
        """The training of every cell, none twice."""
        heads = itertools.product(self.scales, self.shifts, self.modes, self.head_lr_multipliers)
        points = itertools.product(self.lrs or (recipe.lr,), heads, self.seeds)
        found: dict[TrainingConfig, None] = {}
        for lr, (scale, shift, mode, multiplier), seed in points:
            base = recipe.replace(lr=lr, seed=seed)
            if scale is None:
                found[base.replace(scale=1.0, mode="none", head_lr_multiplier=1.0)] = None
            else:
                own = multiplier if mode == "untie" else 1.0
                found[base.replace(scale=scale, mode=mode, head_lr_multiplier=own, shift=shift)] = None
        return list(found)


def pending(configurations: Sequence[Configuration], run: Path) -> list[Configuration]:
    """The cells that are not finished in a run folder."""
    return [one for one in configurations if cells.finished(folder_of(one, run), one) is None]


def log_of(configuration: Configuration, run: Path) -> tuple[str, Path, int]:
    """What a cell is called, the folder with its log, and how many steps it takes: what a display can follow."""
    training = configuration["training"]
    head = "untouched" if training["mode"] == "none" else ratio_text(training["scale"])
    name = configuration["backbone"].removeprefix("bundled:")
    return f"{name}, {head}, seed {training['seed']}", folder_of(configuration, run), int(training["steps"])


def sweep(
    configurations: Sequence[Configuration], run: Path, *, executor: Executor | None = None, force: bool = False
) -> Iterator[Outcome]:
    """Run every cell that is not finished; yields outcomes as they come.

    Args:
        configurations: the cells, in the order they should start.
        run: the run folder.
        executor: where they run; this process by default.
        force: run finished ones again.
    """
    todo = list(configurations) if force else pending(configurations, run)
    if force:
        for one in todo:
            (folder_of(one, run) / cells.CELL).unlink(missing_ok=True)
    yield from (executor or InProcess())(todo, run)


def attempt(configuration: Configuration, run: Path, bench: Bench) -> Outcome:
    """Run one cell; where it fails, keep it as failed with the reason and go on."""
    try:
        run_cell(configuration, run, bench=bench)
    except HeadscaleError as error:
        return failed(configuration, run, error.message, error.hint)
    except Exception as error:
        return failed(configuration, run, f"{type(error).__name__}: {error}", "run it alone with `headscale trial`")
    return Outcome(configuration, "done")


def failed(configuration: Configuration, run: Path, message: str, hint: str = "") -> Outcome:
    """Keep a cell as failed."""
    result = {"message": message, "hint": hint}
    cells.write_cell(folder_of(configuration, run), KIND, configuration, result, status="failed")
    return Outcome(configuration, "failed", message, hint)


# --- executors -----------------------------------------------------------------------------------------------------


@dataclass
class InProcess:
    """Cells one after the other in this process.

    Args:
        bench: backbones and texts in memory.
    """

    bench: Bench = field(default_factory=Bench)

    def __call__(self, configurations: Sequence[Configuration], run: Path) -> Iterator[Outcome]:
        """Run the cells."""
        for one in configurations:
            yield attempt(one, run, self.bench)


@dataclass
class _Worker:
    process: BaseProcess
    connection: Connection
    cell: Configuration


@dataclass
class LocalProcesses:
    """Cells in processes of their own; one that dies costs its cell, which is kept as failed.

    Args:
        workers: cells at once.
        threads: of torch in each.
        prepare: called in every new process, for tests.
    """

    workers: int = 2
    threads: int = 1
    prepare: Callable[[], object] | None = None

    def __call__(self, configurations: Sequence[Configuration], run: Path) -> Iterator[Outcome]:
        """Run the cells; whatever ends the iteration ends the processes."""
        queue = list(configurations)
        busy: list[_Worker] = []
        try:
            while queue or busy:
                while queue and len(busy) < self.workers:
                    busy.append(self._start(queue.pop(0), run))
                ready = wait([worker.connection for worker in busy])
                for worker in [w for w in busy if w.connection in ready]:
                    outcome = self._collect(worker, run)
                    if outcome.status != "killed" and queue:  # the same process, warm, takes the next one
                        worker.cell = queue.pop(0)
                        worker.connection.send(worker.cell)
                    else:
                        busy.remove(worker)
                        _end(worker)
                    yield (
                        outcome
                        if outcome.status != "killed"
                        else failed(outcome.configuration, run, outcome.message, outcome.hint)
                    )
        finally:
            for worker in busy:
                worker.process.terminate()
                _end(worker)

    def _start(self, cell: Configuration, run: Path) -> _Worker:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs, run, self.threads, self.prepare), daemon=True)
        process.start()
        theirs.close()
        ours.send(cell)
        return _Worker(process, ours, cell)

    def _collect(self, worker: _Worker, run: Path) -> Outcome:
        try:
            status, message, hint = worker.connection.recv()
        except (EOFError, ConnectionError):
            worker.process.join()
            code = worker.process.exitcode or 0
            how = f"signal {-code}" if code < 0 else f"exit code {code}"
            return Outcome(
                worker.cell, "killed", f"its process ended with {how} before the cell did",
                "a smaller batch or fewer workers, if memory was short",
            )  # fmt: skip
        return Outcome(worker.cell, status, message, hint)


def _end(worker: _Worker) -> None:
    with contextlib.suppress(OSError):
        worker.connection.close()  # the worker's `recv` ends, and it with it
    worker.process.join()


def _work(connection: Connection, run: Path, threads: int, prepare: Callable[[], object] | None) -> None:
    """The loop of a worker: a cell in, its outcome out, until the other end is closed."""
    if prepare is not None:
        prepare()
    import torch

    torch.set_num_threads(threads)
    bench = Bench()
    with contextlib.suppress(EOFError, OSError, KeyboardInterrupt):
        while True:
            outcome = attempt(connection.recv(), run, bench)
            connection.send((outcome.status, outcome.message, outcome.hint))


# --- rows ----------------------------------------------------------------------------------------------------------


def row_of(configuration: Configuration, run: Path) -> SweepRow:
    """A cell as a tidy row, from its folder; `missing` where nothing was kept."""
    folder = folder_of(configuration, run)
    if not (folder / cells.CELL).is_file():
        return _row(configuration, "missing", None, "")
    return row_of_cell(cells.read_cell(folder), folder)


def row_of_cell(cell: dict[str, Any], folder: Path) -> SweepRow:
    """A tidy row from the content of a `cell.json` and the folder with its log."""
    from headscale.trials import read_trained

    if cell["status"] == "failed":
        return _row(cell["configuration"], "failed", None, cell["result"].get("message", ""))
    return _row(cell["configuration"], cell["status"], read_trained(folder), "")


def _row(configuration: Configuration, status: str, trained: TrainedCell | None, message: str) -> SweepRow:
    training = configuration["training"]
    names = ("scale", "mode", "head_lr_multiplier", "lr", "temperature", "lambda_query", "lambda_document",
             "warmup_ratio", "seed", "shift")  # fmt: skip
    return SweepRow(
        backbone=configuration["backbone"],
        revision=configuration["revision"] if trained is None else trained.revision,
        **{name: training[name] for name in names if name in training},
        status=status,
        key=cells.cell_key(configuration),
        message=message,
        **(_measured(trained) if trained is not None and trained.run.steps else {}),
    )


def _measured(trained: TrainedCell) -> dict[str, Any]:
    first, last = trained.run.steps[0], trained.run.steps[-1]
    return measured(trained, loss_start=first.loss_over_ln_n, head_norm_end=last.head_norm)


_TAIL = ("batch_accuracy", "active_dims_query", "active_dims_document", "cosine_document", "grad_norm")


def measured(trained: TrainedCell, *, loss_start: float, head_norm_end: float) -> dict[str, Any]:
    """The fields of a `SweepRow` that a finished training gives.

    Args:
        trained: the cell; its steps are not looked at.
        loss_start: of its first step, over ln N.
        head_norm_end: of its last step.
    """
    run, end, verdict = trained.run, trained.run.end, trained.verdict
    ranking = end.ranking
    return {
        "steps": end.steps,
        "lr_sum": end.lr_sum,
        "loss_start": _finite(loss_start),
        "loss_end": end.tail.get("loss_over_ln_n"),
        **{name: end.tail.get(name) for name in _TAIL},
        "head_norm_start": run.head_norm_start,
        "head_norm_end": _finite(head_norm_end),
        "non_finite_steps": end.non_finite_steps,
        "mrr_dev": None if trained.dev is None else trained.dev.mrr_at_10,
        "mrr_test": None if ranking is None else ranking.mrr_at_10,
        "ndcg_dev": None if trained.dev is None else trained.dev.ndcg_at_10,
        "ndcg_test": None if ranking is None else ranking.ndcg_at_10,
        "chance_mrr": None if ranking is None else ranking.chance_mrr_at_10,
        "flops_cost": None if ranking is None else ranking.flops_cost,
        "vocab_size": run.vocab_size,
        "verdict": verdict.word,
        "verdict_step": verdict.step,
        "verdict_lr_share": verdict.lr_share,
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
