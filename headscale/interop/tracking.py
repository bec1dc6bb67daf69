"""Log the steps of a training to TensorBoard, Weights & Biases or trackio; nothing is imported unless it is asked for.

Every backend is one function that takes where and what the run is, and gives a `Backend`: how to log a step's
scalars, and how to end with the verdict.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from headscale.errors import HeadscaleError, UsageError
from headscale.records import StepRecord, TrialVerdict

if TYPE_CHECKING:
    from headscale.trials import OnStep

PROJECT = "headscale"
_SUFFIX = ".headscale"
Scalars = dict[str, float]


@dataclass(frozen=True)
class Backend:
    """What a tracker can do with a run.

    Args:
        log: one step's scalars, by step.
        end: the verdict as plain values, None where there is none; the run is over.
    """

    log: Callable[[int, Scalars], object]
    end: Callable[[dict[str, Any] | None], object]


def _tensorboard(folder: Path, name: str, configuration: dict[str, Any]) -> Backend:
    _import("tensorboard")
    place = folder / "tensorboard"
    for file in place.glob(f"events.out.tfevents.*{_SUFFIX}"):  # of an earlier run of the same cell
        file.unlink()
    writer = _import("torch.utils.tensorboard").SummaryWriter(str(place), filename_suffix=_SUFFIX)
    writer.add_text("configuration", _as_text({"name": name, **configuration}))

    def log(step: int, scalars: Scalars) -> None:
        for key, value in scalars.items():
            writer.add_scalar(key, value, step)

    def end(verdict: dict[str, Any] | None) -> None:
        if verdict is not None:
            writer.add_text("verdict", _as_text(verdict))
        writer.close()

    return Backend(log, end)


def _wandb(folder: Path, name: str, configuration: dict[str, Any]) -> Backend:
    module = _import("wandb")
    folder.mkdir(parents=True, exist_ok=True)  # else it would take a folder of its own choice
    run = module.init(project=PROJECT, name=name, dir=str(folder), config=configuration)

    def end(verdict: dict[str, Any] | None) -> None:
        if verdict is not None:
            run.summary["verdict"] = verdict
        run.finish()

    return Backend(lambda step, scalars: run.log(scalars, step=step), end)


def _trackio(folder: Path, name: str, configuration: dict[str, Any]) -> Backend:
    """As `_wandb`, whose calls it has; it keeps its runs in a folder of its own, and has no summary."""
    module = _import("trackio")
    module.init(project=PROJECT, name=name, config=configuration)

    def end(verdict: dict[str, Any] | None) -> None:
        if verdict is not None:
            module.log({f"verdict/{key}": value for key, value in verdict.items()})
        module.finish()

    return Backend(lambda step, scalars: module.log(scalars, step=step), end)


BACKENDS = {"tensorboard": _tensorboard, "wandb": _wandb, "trackio": _trackio}


def check_backend(name: str) -> str:
    """The name of a backend that can be used.

    Raises:
        UsageError: no such backend.
        HeadscaleError: it is not installed.
    """
    if name not in BACKENDS:
        raise UsageError(f"no tracker is called `{name}`", f"one of {', '.join(BACKENDS)}")
    _import(name)
    return name


class Tracking:
    """A run in a tracker: call it with every record, then close it with the verdict.

    It is opened with the first record, so that a run without steps leaves no trace.

    Args:
        backend: `tensorboard`, `wandb` or `trackio`.
        folder: of the run; TensorBoard and Weights & Biases keep their files there.
        name: of the run.
        configuration: what it was run with, as plain JSON values.

    Raises:
        UsageError: no such backend.
        HeadscaleError: it is not installed.
    """

    def __init__(self, backend: str, folder: Path, name: str, configuration: dict[str, Any]) -> None:
        self._open = BACKENDS[check_backend(backend)]
        self._arguments = (folder, name, configuration)
        self._run: Backend | None = None
        self.verdict: TrialVerdict | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(self.verdict)

    def __call__(self, record: StepRecord, verdict: TrialVerdict | None = None) -> None:
        """Log one step; a verdict that comes with it is what `with` closes with."""
        if self._run is None:
            self._run = self._open(*self._arguments)
        self.verdict = verdict or self.verdict
        self._run.log(record.step, scalars_of(record))

    def close(self, verdict: TrialVerdict | None) -> None:
        """End the run with its verdict; once is enough."""
        run, self._run = self._run, None
        if run is not None:
            run.end(None if verdict is None else verdict.to_dict())


def scalars_of(record: StepRecord) -> Scalars:
    """The numbers of a step under their names; those that are None or not finite are left out and counted."""
    values = {key: getattr(record, key) for key in record.__dataclass_fields__ if key != "step"}
    return {k: float(v) for k, v in values.items() if v is not None and math.isfinite(v)}


@contextmanager
def following(
    backend: str | None, folder: Path, configuration: dict[str, Any], then: OnStep | None = None
) -> Iterator[OnStep | None]:
    """What to call with every step of a cell, so that it is logged too; `then` alone without a backend.

    Args:
        backend: as for `Tracking`, or None.
        folder: of the cell; its name is that of the run.
        configuration: of the cell.
        then: called with every record and verdict in any case, unless it is None.
    """
    if backend is None:
        yield then
        return
    with Tracking(backend, folder, folder.name, configuration) as tracking:

        def both(record: StepRecord, verdict: TrialVerdict) -> None:
            tracking(record, verdict)
            if then is not None:
                then(record, verdict)

        yield both


def track_cell(backend: str, folder: Path) -> None:
    """Log a finished training from its cell.

    Args:
        backend: as for `Tracking`.
        folder: of the cell.

    Raises:
        NotFoundError: it is not there.
        UnreadableError: it is no result of a training.
    """
    from headscale.cells import read_cell
    from headscale.trials import read_trained

    trained = read_trained(folder)
    with Tracking(backend, folder, folder.name, read_cell(folder)["configuration"]) as tracking:
        for record in trained.run.steps:
            tracking(record, trained.verdict)


def _import(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        hint = "pip install trackio" if package == "trackio" else 'pip install "headscale[tracking]"'
        raise HeadscaleError(f"`{package}` cannot be imported: {error}", hint) from None


def _as_text(values: dict[str, Any]) -> str:
    """Indented, which TensorBoard shows as it stands."""
    return "    " + json.dumps(values, indent=2).replace("\n", "\n    ")
