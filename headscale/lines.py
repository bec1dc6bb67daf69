"""Lines of text files, numbered and decoded one at a time, compressed or not."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from headscale.errors import NotFoundError, UnreadableError


def numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines that are not empty, with their numbers from 1; only one of them is in memory.

    Args:
        path: a UTF-8 text file, through gzip if its name ends in `.gz`.

    Raises:
        NotFoundError: no such file.
        UnreadableError: a folder, not UTF-8 (the message says at which byte), truncated, or not readable.
    """
    if not path.exists():
        raise NotFoundError(f"no such file: `{path}`", "check the path; it is taken relative to the current folder")
    if path.is_dir():
        raise UnreadableError(f"`{path}` is a folder, not a text file", "give a file inside it")
    number = 0
    try:
        with _opened(path) as file:
            offset = 0
            for number, line in enumerate(file, 1):
                text = _decoded(path, number, line, offset)
                offset += len(line)
                if text.strip():
                    yield number, text
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UnreadableError(
            f"`{path}` cannot be unpacked after row {number}: {error}", "download or copy it again"
        ) from None
    except OSError as error:
        raise UnreadableError(f"`{path}` cannot be read: {error.strerror}", "check its permissions") from None


def format_suffix(path: Path) -> str:
    """The suffix that tells a file's format, in lower case: `.tsv` of `triples.tsv.gz`."""
    return (path.with_suffix("") if path.suffix.lower() == ".gz" else path).suffix.lower()


def json_object(line: str, where: str, hint: str) -> dict[str, Any]:
    """The object that a line holds, or one sentence that says it holds none."""
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise UnreadableError(f"{where} is not a JSON object", hint)
    return values


def _opened(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path, "rb")) if path.suffix.lower() == ".gz" else path.open("rb")


def _decoded(path: Path, number: int, line: bytes, offset: int) -> str:
    try:
        return line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise UnreadableError(
            f"`{path}` row {number} is not UTF-8 text: byte {offset + error.start} cannot be decoded",
            "convert it, for example with `iconv -t UTF-8`",
        ) from None
