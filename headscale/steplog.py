"""Step records on disk: one line of JSON each, written as the step happens."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from headscale.errors import NotFoundError, UnreadableError
from headscale.records import StepRecord


class StepLog:
    """A file that takes one record per line; use it as a context manager and as the `on_step` of `train`.

    A file of that name is replaced: a run always starts at its first step.

    Args:
        path: the file, by convention `steps.jsonl` in the folder of the run.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._file: IO[str] | None = None

    def __enter__(self) -> StepLog:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("w", encoding="utf-8")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
        self._file = None

    def __call__(self, record: StepRecord) -> None:
        """Append one line and hand it to the operating system."""
        assert self._file is not None, "a StepLog is used inside its `with`"
        self._file.write(json.dumps(record.to_dict(), allow_nan=False) + "\n")
        self._file.flush()


def read_steps(path: str | Path) -> list[dict[str, Any]]:
    """The records of a log as they stand there; a last line cut short by a crash is left out.

    Non-finite numbers are None in the file; `non_finite` says how many there were.

    Raises:
        NotFoundError: no such file.
        UnreadableError: a line that is no step record, other than an unfinished last one.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        raise NotFoundError(f"there is no `{path}`", "give the folder of a run") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UnreadableError(f"`{path}` cannot be read: {error}") from None
    names = {f.name for f in dataclasses.fields(StepRecord) if f.default is dataclasses.MISSING}
    records = []
    for number, line in enumerate(lines[:-1], start=1):  # what follows the last newline is unfinished
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict) or not names <= record.keys():
            raise UnreadableError(f"line {number} of `{path}` is no step record", "was the file edited?")
        records.append(record)
    return records
