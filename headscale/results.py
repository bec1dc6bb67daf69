"""Saved results read back: cells of run folders and `--json` documents, as records; nothing is computed anew."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headscale.cells import BEGUN, CELL, STEPS, cell_key, read_cell
from headscale.errors import HeadscaleError, NotFoundError, UnreadableError
from headscale.profiles import from_dict
from headscale.records import (
    Calibration,
    Evaluation,
    Inspection,
    Record,
    StepRecord,
    SweepRow,
    TrainedCell,
    TrialResult,
)

if TYPE_CHECKING:
    import numpy as np

DOCUMENTS = ("inspect", "calibrate", "trial", "sweep", "evaluate", "demo")
_FOLDER = re.compile(r"trial-(.+)-(untie|fold|logits|none)-([0-9.e+-]+)-seed(\d+)-([0-9a-f]{12})")
_HINT = "give a run folder, a cell's folder, its `cell.json`, or what `-o FILE` wrote"


@dataclass(frozen=True)
class Training(Record):
    """One training as it was saved, whatever its status.

    Args:
        configuration: of the cell; `training` holds the fields of `TrainingConfig`. Of a cell that left nothing but
            its log: what the folder's name says.
        key: of the cell, 12 hexadecimal digits.
        status: `done`, `running`, `interrupted` or `failed`.
        cell: its result without steps; None where it has none yet, or came from a sweep's table.
        row: its row, where it came from a sweep's table.
        folder: where its log is; None where it came from a document, which holds none.
        message: why it failed, or "".
    """

    configuration: dict[str, Any]
    key: str
    status: str
    cell: TrainedCell | None = None
    row: SweepRow | None = None
    folder: str | None = None
    message: str = ""

    @property
    def backbone(self) -> str:
        """The backbone's name."""
        return str(self.configuration["backbone"])

    @property
    def training(self) -> dict[str, Any]:
        """The training's configuration; fields of later versions may be missing."""
        found: dict[str, Any] = self.configuration["training"]
        return found

    def steps(self, names: Sequence[str] = (), *, every: int = 1) -> dict[str, np.ndarray]:
        """Columns of the log as float64, read now; None and lines that are not whole are left as NaN or out.

        Args:
            names: of fields of `StepRecord`; all its numbers by default. `step` is always there.
            every: read one line out of so many, and the last one.

        Returns:
            (lines,) arrays by name, in the order of the steps; empty arrays where there is no log.
        """
        import dataclasses

        import numpy as np

        wanted = ("step", *names) if names else tuple(f.name for f in dataclasses.fields(StepRecord))
        rows = _lines(Path(self.folder) / STEPS, every) if self.folder else []
        return {n: np.array([_number(r.get(n)) for r in rows], dtype=np.float64) for n in dict.fromkeys(wanted)}

    def steps_done(self) -> int:
        """Whole lines of the log, which is how far a run that goes on has come."""
        file = Path(self.folder) / STEPS if self.folder else None
        return file.read_bytes().count(b"\n") if file and file.is_file() else 0


@dataclass(frozen=True)
class Results(Record):
    """Everything that was found, in the order of its folders.

    Args:
        references: names of the backbones that the others are held against.
        unreadable: (path, sentence) of what is there and cannot be read.
        environments: versions and machines of what made them, each once; cells of early versions do not say.
        inputs: the paths as given.
    """

    inspections: tuple[Inspection, ...] = ()
    calibrations: tuple[Calibration, ...] = ()
    trainings: tuple[Training, ...] = ()
    evaluations: tuple[Evaluation, ...] = ()
    references: tuple[str, ...] = ()
    unreadable: tuple[tuple[str, str], ...] = ()
    environments: tuple[dict[str, Any], ...] = ()
    inputs: tuple[str, ...] = ()

    @property
    def empty(self) -> bool:
        """Whether nothing was found that could be shown."""
        return not (self.inspections or self.calibrations or self.trainings or self.evaluations)


def load(paths: Sequence[str | Path], *, allow_empty: bool = False) -> Results:
    """Read saved results.

    Args:
        paths: cell folders, parents of such, `cell.json` files, or documents that `-o FILE` wrote.
        allow_empty: take folders in which no cell has begun yet, for a page that waits for them.

    Raises:
        NotFoundError: paths that do not exist, or hold no result; all of them together.
        UnreadableError: files given by name that are no result.
    """
    found = _Found()
    missing = [str(p) for p in paths if not Path(p).exists()]
    if missing:
        raise NotFoundError(f"no result at `{'`, `'.join(missing)}`", hint=_HINT)
    for path in map(Path, paths):
        if path.is_file() and path.name != CELL:
            found.document(path)
        elif path.is_file():
            found.cell(path)
        else:
            found.folder(path, allow_empty)
    return found.results(tuple(str(p) for p in paths))


# --- the log of a training -----------------------------------------------------------------------------------------


def _lines(path: Path, every: int) -> list[dict[str, Any]]:
    """Every so many-th whole line of a log and the last; what is no JSON object is left out."""
    try:
        lines = path.read_bytes().split(b"\n")[:-1]  # what follows the last newline is unfinished
    except FileNotFoundError:
        return []
    taken = lines[::every]
    if lines and (len(lines) - 1) % every:
        taken.append(lines[-1])
    try:
        rows = json.loads(b"[" + b",".join(taken) + b"]")  # one call: half the time of one a line
    except ValueError:
        rows = [_object(line) for line in taken]
    return [row for row in rows if isinstance(row, dict) and "step" in row]


def _object(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else float("nan")


# --- finding and reading -------------------------------------------------------------------------------------------


@dataclass
class _Found:
    """What has been read so far."""

    inspections: dict[str, Inspection] = field(default_factory=dict)
    calibrations: dict[str, Calibration] = field(default_factory=dict)
    trainings: dict[str, Training] = field(default_factory=dict)
    evaluations: dict[str, Evaluation] = field(default_factory=dict)
    references: dict[str, None] = field(default_factory=dict)
    unreadable: dict[str, str] = field(default_factory=dict)
    environments: list[dict[str, Any]] = field(default_factory=list)

    def folder(self, path: Path, allow_empty: bool) -> None:
        folders = sorted({file.parent for name in (CELL, STEPS) for file in path.rglob(name)})
        if not folders and not allow_empty:
            raise NotFoundError(f"no result below `{path}`", hint=_HINT)
        for folder in folders:
            try:
                self.cell(folder / CELL)
            except HeadscaleError as error:
                self.unreadable[str(folder)] = error.message

    def _made_with(self, environment: Any) -> None:
        if isinstance(environment, dict) and environment not in self.environments:
            self.environments.append(environment)

    def cell(self, file: Path) -> None:
        if not file.is_file():
            self._begun(file.parent)
            return
        cell = read_cell(file)
        kind, configuration, result, key = (cell[n] for n in ("kind", "configuration", "result", "key"))
        self._made_with(cell.get("env"))
        if kind == "trial":
            self._training(cell, file.parent)
        elif kind == "inspect":
            self._inspection(_record(Inspection, result, file), key, bool(configuration.get("reference")))
        elif kind == "calibrate":
            self._calibration(_record(Calibration, result, file), key)
        elif kind == "evaluate":
            self.evaluations[key] = _record(Evaluation, result, file)
        else:
            raise UnreadableError(f"`{file}` holds a result of the unknown kind `{kind}`", hint=_HINT)

    def _begun(self, folder: Path) -> None:
        """A training that is still at work, or was killed: it has left its configuration and its log, or the log."""
        if (folder / BEGUN).is_file():
            configuration = _json(folder / BEGUN)
            if not isinstance(configuration.get("training"), dict) or "backbone" not in configuration:
                raise UnreadableError(f"`{folder / BEGUN}` is no configuration of a training", hint=_HINT)
            key = cell_key(configuration)
            self.trainings[key] = Training(configuration, key, "running", folder=str(folder))
            return
        parts = _FOLDER.fullmatch(folder.name)
        if parts is None:
            raise UnreadableError(f"`{folder}` holds a log and no `{CELL}`", hint="run the command again")
        backbone, mode, scale, seed, key = parts.groups()
        training = {"scale": float(scale), "mode": mode, "seed": int(seed)}
        configuration = {"backbone": backbone, "revision": None, "training": training}
        self.trainings[key] = Training(configuration, key, "running", folder=str(folder))

    def _training(self, cell: dict[str, Any], folder: Path) -> None:
        result, status = cell["result"], cell["status"]
        trained = _record(TrainedCell, result, folder / CELL) if "run" in result else None
        message = str(result.get("message", ""))
        self.trainings[cell["key"]] = Training(
            cell["configuration"], cell["key"], status, trained, folder=str(folder), message=message
        )

    def _inspection(self, inspection: Inspection, key: str, is_reference: bool = False) -> None:
        self.inspections[key] = inspection
        if is_reference or inspection.verdict.word == "reference":
            self.references[inspection.name] = None

    def _calibration(self, calibration: Calibration, key: str) -> None:
        self.calibrations[key] = calibration
        self.references[calibration.reference] = None

    def document(self, file: Path) -> None:
        content = _json(file)
        command = str(content.get("command"))
        if content.get("schema") != f"headscale.{command}/1" or command not in DOCUMENTS:
            raise UnreadableError(f"`{file}` is no result of headscale that can be shown", hint=_HINT)
        readers: dict[str, Callable[[dict[str, Any], Path], None]] = {
            "inspect": lambda r, f: self._inspection(_record(Inspection, r, f), cell_key(r)),
            "calibrate": lambda r, f: self._calibration(_record(Calibration, r, f), cell_key(r)),
            "evaluate": lambda r, f: self.evaluations.update({cell_key(r): _record(Evaluation, r, f)}),
            "trial": lambda r, f: self._arm(_record(TrialResult, r, f)),
            "sweep": lambda r, f: self._row(_record(SweepRow, r, f)),
            "demo": lambda r, f: self._calibration(_record(Calibration, r, f), cell_key(r)) if "match" in r else None,
        }
        for result in content["results"]:
            readers[command](result, file)
        self._made_with(content.get("env"))

    def _arm(self, arm: TrialResult) -> None:
        for cell in arm.cells:
            training = dict(cell.run.config)
            configuration = {"backbone": cell.backbone, "revision": cell.revision, "training": training}
            status = "done" if cell.run.status == "finished" else cell.run.status
            self._unless_there(Training(configuration, cell_key(configuration), status, cell))

    def _row(self, row: SweepRow) -> None:
        names = ("scale", "mode", "head_lr_multiplier", "lr", "temperature", "lambda_query", "lambda_document",
                 "warmup_ratio", "seed", "shift", "steps")  # fmt: skip
        training = {name: getattr(row, name) for name in names if getattr(row, name) is not None}
        configuration = {"backbone": row.backbone, "revision": row.revision, "training": training}
        if row.status != "missing" and row.key not in self.trainings:
            self.trainings[row.key] = Training(configuration, row.key, row.status, row=row, message=row.message)

    def _unless_there(self, training: Training) -> None:
        """Documents repeat what cells hold with their logs."""
        same = (training.backbone, training.training)
        if all((t.backbone, t.training) != same for t in self.trainings.values()):
            self.trainings[training.key] = training

    def results(self, inputs: tuple[str, ...]) -> Results:
        return Results(
            inspections=_distinct(self.inspections.values()),
            # those that saw no outputs first: where one per backbone is shown, the last counts
            calibrations=_distinct(sorted(self.calibrations.values(), key=lambda c: c.texts is not None)),
            trainings=tuple(self.trainings.values()),
            evaluations=_distinct(self.evaluations.values()),
            references=tuple(self.references),
            unreadable=tuple(self.unreadable.items()),
            environments=tuple(self.environments),
            inputs=inputs,
        )


def _distinct(records: Any) -> tuple[Any, ...]:
    """Each record once: a document and the cell behind it hold the same."""
    seen: dict[str, Any] = {}
    for record in records:
        bare = replace(record, written=None) if isinstance(record, Calibration) else record
        seen[json.dumps(bare.to_dict(), sort_keys=True)] = record
    return tuple(seen.values())


def _record(kind: type[Any], result: dict[str, Any], file: Path) -> Any:
    try:
        return from_dict(kind, result)
    except ValueError as error:
        raise UnreadableError(
            f"`{file}` lacks or misstates a field: {error}", hint="run the command that made it again"
        ) from error


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UnreadableError(f"`{file}` is not JSON: {error}", hint=_HINT) from error
    if not isinstance(content, dict) or not isinstance(content.get("results", []), list):
        raise UnreadableError(f"`{file}` is no result of headscale that can be shown", hint=_HINT)
    return content


def backbones(results: Results) -> Iterator[str]:
    """Names of the backbones, the references first, each once."""
    names = [t.backbone for t in results.trainings] + [i.name for i in results.inspections]
    names += [c.name for c in results.calibrations] + [e.name for e in results.evaluations]
    everyone = dict.fromkeys(names)
    yield from (n for n in results.references if n in everyone)
    yield from (n for n in everyone if n not in results.references)
