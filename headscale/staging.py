"""Directories that appear finished or not at all, and files copied inside the kernel where it can."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from headscale.errors import HeadscaleError, UnreadableError, UsageError

_BLOCK = 4 << 20
_HINT = "give a place with enough room that you may write to"


def check_empty(target: Path, option: str) -> None:
    """Refuse a place that is taken, before anything is computed for it.

    Args:
        target: where a folder is to be.
        option: that names it.

    Raises:
        UsageError: it is a file, or a folder that holds something.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UsageError(f"`{target}` holds something already", f"give `{option}` a folder that is empty or new")


@contextmanager
def created(path: Path) -> Iterator[BinaryIO]:
    """A new file for writing, on the disk for good when the block ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("xb", buffering=_BLOCK) as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def copy_range(old: BinaryIO, new: BinaryIO, start: int, count: int, name: str) -> None:
    """Copy bytes inside the kernel, which shares the blocks where the file system can; else through a buffer."""
    new.flush()
    done = 0
    with suppress(OSError, AttributeError):  # across file systems, or not offered: the loop below does it
        while done < count:
            moved = os.copy_file_range(old.fileno(), new.fileno(), count - done, start + done)
            if moved == 0:
                break
            done += moved
    new.seek(0, os.SEEK_END)
    while done < count:
        old.seek(start + done)
        block = old.read(min(_BLOCK, count - done))
        if not block:
            raise UnreadableError(f"`{name}` became shorter while it was copied", "let nothing write to it meanwhile")
        new.write(block)
        done += len(block)


@contextmanager
def staged(place: Path, nbytes: int) -> Iterator[Path]:
    """A directory beside the target that takes its place at the end, or vanishes with every trace on any error."""
    made: list[Path] = []
    stage: Path | None = None
    try:
        for parent in reversed(place.parents):
            if not parent.exists():
                parent.mkdir()
                made.append(parent)
        free = shutil.disk_usage(place.parent).free
        if nbytes > free:
            raise OSError(errno.ENOSPC, f"{nbytes} bytes are needed and {free} are free")
        stage = place.parent / f".{place.name}.{secrets.token_hex(4)}.tmp"
        stage.mkdir()
        yield stage
        _take_place(stage, place)
    except BaseException as error:
        if stage is not None:
            shutil.rmtree(stage, ignore_errors=True)
        for parent in reversed(made):
            with suppress(OSError):
                parent.rmdir()
        if isinstance(error, OSError):
            reason = str(error.strerror if error.errno != errno.ENOSPC else error.args[-1])
            raise HeadscaleError(f"`{place}` cannot be written: {reason}", _HINT) from error
        raise


def _take_place(stage: Path, place: Path) -> None:
    """Move the finished directory in; an older one steps aside first and comes back if that fails."""
    aside = stage.with_suffix(".old")
    replaced = place.is_dir() and any(place.iterdir())
    if replaced:
        place.rename(aside)
    try:
        stage.replace(place)
    except BaseException:
        if replaced:
            aside.rename(place)
        raise
    sync_folder(place.parent)
    if replaced:
        shutil.rmtree(aside, ignore_errors=True)


def sync_folder(path: Path) -> None:
    """Have the names in a directory on the disk for good."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
