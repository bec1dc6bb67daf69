"""The run folder: one folder a cell, written whole and at once, read back by every later command."""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from headscale.errors import HeadscaleError, NotFoundError, UnreadableError

CELL = "cell.json"
STEPS = "steps.jsonl"
BEGUN = "begun.json"  # the configuration of a cell that is still at work: there is no `cell.json` yet
SCHEMA = "headscale.cell/1"
_FIELDS = {"kind": str, "configuration": dict, "key": str, "result": dict, "status": str}


def write_json(path: Path, content: Any) -> None:
    """Write JSON so that a reader sees the old file or the whole new one, never a part."""
    write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text so that a reader sees the old file or the whole new one, never a part."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _replace(path, text)
    except OSError as error:
        raise HeadscaleError(
            f"`{path}` cannot be written: {error.strerror or error}",
            hint="check the path, its permissions and the disk",
        ) from error


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def cell_key(configuration: dict[str, Any]) -> str:
    """12 hexadecimal digits that change with anything in a cell's configuration."""
    canonical = json.dumps(configuration, sort_keys=True, allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]


def cell_folder(run: Path, kind: str, label: str, key: str) -> Path:
    """The deterministic folder of a cell: kind, a readable label, the key."""
    readable = re.sub(r"[^A-Za-z0-9._-]+", "-", label).strip("-.")[-48:] or "unnamed"
    return run / f"{kind}-{readable}-{key}"


def write_cell(
    folder: Path, kind: str, configuration: dict[str, Any], result: dict[str, Any], *, status: str = "done"
) -> Path:
    """Write a cell's `cell.json`, with the versions and the machine that made it beside it; returns its path.

    Args:
        folder: from `cell_folder`.
        kind: `inspect`, `calibrate`, `trial`, `evaluate`.
        configuration: every input that decides the result; its hash is the key.
        result: plain JSON values (a record's `to_dict()`).
        status: `done`, or what kept it from that.
    """
    from headscale.environment import environment

    content = {
        "schema": SCHEMA,
        "kind": kind,
        "configuration": configuration,
        "key": cell_key(configuration),
        "result": result,
        "status": status,
        "env": environment(),
    }
    write_json(folder / CELL, content)
    return folder / CELL


def read_cell(path: Path) -> dict[str, Any]:
    """A cell from its folder or its `cell.json`.

    Raises:
        NotFoundError: there is none.
        UnreadableError: it is not a cell.
    """
    file = path / CELL if path.is_dir() else path
    if not file.is_file():
        raise NotFoundError(f"no result at `{path}`", hint=f"give a folder that holds `{CELL}`, or a parent of such")
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UnreadableError(f"`{file}` is not JSON: {error}", hint="run the command that made it again") from error
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        raise UnreadableError(f"`{file}` is not a result of schema `{SCHEMA}`", hint="give a `cell.json` of headscale")
    wrong = [name for name, kind in _FIELDS.items() if not isinstance(content.get(name), kind)]
    if wrong:
        raise UnreadableError(
            f"`{file}` lacks or misstates `{'`, `'.join(wrong)}`", hint="run the command that made it again"
        )
    return content


def finished(folder: Path, configuration: dict[str, Any]) -> dict[str, Any] | None:
    """The result of a cell that was computed from the same configuration; None where none can be read."""
    try:
        cell = read_cell(folder)
    except (NotFoundError, UnreadableError):
        return None
    same = cell["key"] == cell_key(configuration) and cell["status"] == "done"
    return cell["result"] if same else None


def find_cells(path: Path, kind: str | None = None) -> Iterator[dict[str, Any]]:
    """Every cell at or below a path, in the order of its folders.

    Args:
        path: a `cell.json`, its folder, or a parent of such.
        kind: of the cells wanted; all by default.

    Raises:
        NotFoundError: the path does not exist.
        UnreadableError: a `cell.json` is not a cell.
    """
    if not path.exists():
        raise NotFoundError(f"no result at `{path}`", hint=f"give a folder that holds `{CELL}`, or a parent of such")
    for file in [path] if path.is_file() else sorted(path.rglob(CELL)):
        cell = read_cell(file)
        if kind is None or cell["kind"] == kind:
            yield cell
