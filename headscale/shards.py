"""Encoded documents kept on disk as they come, so that an interrupted evaluation goes on where it was."""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

Block = tuple[np.ndarray[Any, np.dtype[np.int64]], Any]  # positions, and a CSR matrix (texts, terms)

_NAME = re.compile(r"shard-(\d+)\.npz$")
_ROOM = 0.9  # share of the free disk that shards may fill


class Shards:
    """Blocks of encoded texts in a folder, one file each, whole or not there.

    Args:
        folder: of these texts and this encoder alone: what is in it is taken for theirs.
        order: the texts' positions in the order in which they are encoded.
        terms: of the vocabulary.
    """

    def __init__(self, folder: Path, order: list[int], terms: int) -> None:
        self.folder, self.order, self.terms = folder, order, terms
        self.complete = True  # false once the disk was too small for all of them
        self.done = 0
        for start, file in sorted(self._files().items()):
            block = self._read(file)
            if start != self.done or block is None or not self._matches(start, block):
                file.unlink()
                continue
            self.done += len(block[0])

    def kept(self) -> Iterator[Block]:
        """The blocks on disk, in their order."""
        for _, file in sorted(self._files().items()):
            block = self._read(file)
            assert block is not None
            yield block

    def keeping(self, blocks: Iterable[Block], on_kept: Callable[[int], None] | None = None) -> Iterator[Block]:
        """The blocks on disk, then those given (which go on from there), kept as they pass.

        Args:
            blocks: of the texts from `order[done]` on.
            on_kept: told how many texts each block from the disk has.
        """
        for block in self.kept():
            if on_kept:
                on_kept(len(block[0]))
            yield block
        for block in blocks:
            if self.complete:
                self._keep(block)
            yield block

    def forget(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _files(self) -> dict[int, Path]:
        found = ((_NAME.match(file.name), file) for file in self.folder.glob("shard-*.npz"))
        return {int(match[1]): file for match, file in found if match}

    def _matches(self, start: int, block: Block) -> bool:
        expected = self.order[start : start + len(block[0])]
        return bool(sorted(expected) == block[0].tolist())

    def _keep(self, block: Block) -> None:
        positions, vectors = block
        parts = {
            "positions": positions,
            "indptr": vectors.indptr,
            "indices": vectors.indices.astype(np.int32),
            "data": vectors.data.astype(np.float32),  # what the model put out: nothing is lost
        }
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            share = len(positions) / max(1, len(self.order) - self.done)
            if sum(part.nbytes for part in parts.values()) / share > _ROOM * shutil.disk_usage(self.folder).free:
                raise OSError("no room")
            self._write(self.folder / f"shard-{self.done:010d}.npz", parts)
        except OSError:  # a full disk costs the resuming, not the evaluation
            self.complete = False
            self.forget()
        self.done += len(positions)

    def _write(self, file: Path, parts: dict[str, Any]) -> None:
        temporary = file.with_name(f".{file.name}.{secrets.token_hex(4)}.tmp")
        try:
            with temporary.open("wb") as opened:
                np.savez(opened, **parts)
                opened.flush()
                os.fsync(opened.fileno())
            temporary.replace(file)
        finally:
            with suppress(OSError):
                temporary.unlink()

    def _read(self, file: Path) -> Block | None:
        """A block; None where the file is damaged (every part of it has a checksum)."""
        from scipy.sparse import csr_array

        try:
            with np.load(file) as parts:
                data, indices, indptr = parts["data"].astype(np.float64), parts["indices"], parts["indptr"]
                positions = parts["positions"]
                return positions, csr_array((data, indices, indptr), shape=(len(positions), self.terms))
        except (OSError, ValueError, KeyError, BadZipFile, EOFError):
            return None
