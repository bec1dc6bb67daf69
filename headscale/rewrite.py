"""Write an edited copy of a checkpoint: what needs no change is copied byte for byte, and the copy appears at once."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import numpy as np

from headscale.checkpoint import Checkpoint
from headscale.errors import NotFoundError, UnreadableError, UsageError
from headscale.files import join_name, left_out
from headscale.staging import copy_range, created, staged, sync_folder
from headscale.tensorfile import DTYPE_BITS, STORED, Header, TensorInfo, encode, encode_header, read_header

_BLOCK = 4 << 20
_NATURAL = {"float32": "F32", "float16": "F16", "float64": "F64"}


@dataclass(frozen=True)
class LazyTensor:
    """A tensor made block by block while it is written, for one too large to hold.

    Args:
        shape: of the whole tensor.
        blocks: makes a fresh iterator of consecutive rows, as `Checkpoint.row_blocks` yields them without the index.
    """

    shape: tuple[int, ...]
    blocks: Callable[[], Iterable[np.ndarray]]


@dataclass(frozen=True)
class _Piece:
    """One tensor of the file to be written: from a byte range of the old file, or from blocks of bytes."""

    info: TensorInfo
    blocks: Callable[[], Iterable[Any]] | None = None


@dataclass
class _Plan:
    """What the new directory will hold, before anything is written."""

    copies: dict[str, Path] = field(default_factory=dict)
    folders: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    shards: dict[str, tuple[bytes, list[_Piece], Path | None]] = field(default_factory=dict)
    texts: dict[str, bytes] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes that the new directory will take."""
        tensors = sum(
            len(head) + sum(piece.info.nbytes for piece in pieces) for head, pieces, _ in self.shards.values()
        )
        return tensors + sum(path.stat().st_size for path in self.copies.values()) + sum(map(len, self.texts.values()))


def write_edited(
    source: Checkpoint,
    target: str | Path,
    *,
    tensors: Mapping[str, np.ndarray | LazyTensor],
    dtypes: Mapping[str, str] | None = None,
    config: Mapping[str, Any] | None = None,
    extra_files: Mapping[str, str | bytes] | None = None,
    remove: Collection[str] = (),
    overwrite: bool = False,
    on_staged: Callable[[Path], None] | None = None,
) -> dict[str, Any]:
    """Write a copy of a local checkpoint with some tensors replaced, added or removed; the source is only read.

    Args:
        source: a checkpoint on disk (its `directory` is not None).
        target: the new directory; it must not exist, or be empty, unless `overwrite`.
        tensors: new values by name; float32, float16, float64, or uint16 that holds bfloat16.
        dtypes: stored dtype by name where it is not the array's own: `F32`, `F16`, `BF16` or `F64`.
        config: keys to set in `config.json`.
        extra_files: further files by name, relative to the checkpoint's root.
        remove: names of tensors to leave out.
        overwrite: replace a checkpoint that is there already.
        on_staged: called with the finished directory before it takes its place; raising leaves nothing behind.

    Returns:
        What was done: `directory`, `copied`, `edited`, `added`, `removed`, `converted`, `shared`, `left_out`,
        `config`, `extra_files`, `nbytes`. A `.bin` source becomes safetensors; tensors that shared memory there
        (`shared`) are written once for each name.

    Raises:
        UsageError: the target is the source, inside it, around it, or not empty.
        HeadscaleError: it cannot be written, or there is no room; nothing is left behind then.
    """
    place = Path(target).expanduser().resolve()
    root = _check_places(source, place, overwrite)
    edits = {name: _edit(source, name, value, dict(dtypes or {})) for name, value in tensors.items()}
    plan, report = _plan(source, root, edits, set(remove))
    report["config"] = _plan_config(source, plan, dict(config or {}))
    report["extra_files"] = _plan_extra(plan, dict(extra_files or {}))
    report |= {"directory": str(place), "copied": sorted(plan.copies), "left_out": plan.left, "nbytes": plan.nbytes}
    with staged(place, plan.nbytes) as stage:
        _write(plan, stage)
        if on_staged is not None:
            on_staged(stage)
    return report


def _check_places(source: Checkpoint, place: Path, overwrite: bool) -> Path:
    if source.root is None:
        raise NotFoundError(f"`{source.name}` is not on this disk", f"run `hf download {source.name}` first")
    root = source.root.resolve()
    if place == root or root in place.parents or place in root.parents:
        raise UsageError(f"`{place}` is, holds or lies in the checkpoint it is made from", "give another directory")
    if place.exists() and not place.is_dir():
        raise UsageError(f"`{place}` is a file", "give a directory")
    entries = {entry.name for entry in place.iterdir()} if place.is_dir() else set()
    if entries and not overwrite:
        raise UsageError(f"`{place}` is not empty", "give another directory, or allow it to be overwritten")
    if entries and not entries & {"config.json", "modules.json"}:
        raise UsageError(f"`{place}` holds something other than a checkpoint", "give another directory")
    return root


def _edit(source: Checkpoint, name: str, value: np.ndarray | LazyTensor, dtypes: dict[str, str]) -> _Piece:
    known = source.tensors.get(name)
    shape = tuple(value.shape)
    if known is not None and known.shape != shape:
        raise ValueError(f"{name}: shape {shape} does not replace {known.shape}")
    own = "F32" if isinstance(value, LazyTensor) else _NATURAL.get(value.dtype.name, "")
    dtype = dtypes.get(name, own)
    if dtype not in STORED:
        raise ValueError(f"{name}: cannot store it as {dtype or 'its own type'}")
    size = math.prod(shape) * DTYPE_BITS[dtype] // 8

    def blocks() -> Iterator[np.ndarray]:
        rows = value.blocks() if isinstance(value, LazyTensor) else _row_blocks(value)
        return (encode(block, dtype, name) for block in rows)

    return _Piece(TensorInfo(name, dtype, shape, "", 0, size), blocks)


def _row_blocks(value: np.ndarray) -> Iterator[np.ndarray]:
    rows = value.reshape(1, -1) if value.ndim < 2 else value
    step = max(1, _BLOCK // max(1, rows[:1].nbytes))
    return (rows[first : first + step] for first in range(0, len(rows), step))


def _plan(source: Checkpoint, root: Path, edits: dict[str, _Piece], remove: set[str]) -> tuple[_Plan, dict[str, Any]]:
    unknown = remove - set(source.tensors)
    if unknown:
        raise ValueError(f"cannot remove what is not there: {sorted(unknown)}")
    plan = _Plan()
    renamed = {file: _safe_name(file) for file in source.weight_files}
    homes = {name: source.tensors[name].file if name in source.tensors else _home(name, source) for name in edits}
    report: dict[str, Any] = {"edited": {}, "added": {}, "removed": sorted(remove), "shared": []}
    for file in source.weight_files:
        mine = {name: piece for name, piece in edits.items() if homes[name] == file}
        gone = {name for name in remove if source.tensors[name].file == file}
        where = join_name(source.subfolder, renamed[file])
        if mine or gone or renamed[file] != file:
            plan.shards[where] = _plan_shard(source, file, mine, gone)
            _note(report, where, source, mine)
        else:
            plan.copies[where] = root / where
    _plan_index(source, plan, edits, remove, {name: renamed[homes[name]] for name in homes}, renamed)
    report["converted"] = {old: new for old, new in renamed.items() if old != new}
    report["shared"] = source.shared_names()
    _walk(source, root, plan)
    return plan, report


def _note(report: dict[str, Any], where: str, source: Checkpoint, mine: Mapping[str, _Piece]) -> None:
    for kind, names in (
        ("edited", sorted(name for name in mine if name in source.tensors)),
        ("added", sorted(name for name in mine if name not in source.tensors)),
    ):
        if names:
            report[kind][where] = names


def _plan_shard(
    source: Checkpoint, file: str, edits: Mapping[str, _Piece], gone: Collection[str]
) -> tuple[bytes, list[_Piece], Path | None]:
    if not source.is_safetensors:
        kept = [_from_torch(source, info) for info in source.tensors.values() if info.file == file]
        header, raw, path = Header({}, {"format": "pt"}, 0), b"", None
    else:
        assert source.directory is not None
        path = source.directory / file
        header, raw = read_header(path, file)
        kept = [_Piece(info) for info in header.tensors.values()]
    pieces = [edits.get(piece.info.name, piece) for piece in kept if piece.info.name not in gone]
    known = {piece.info.name for piece in kept}
    pieces += [piece for name, piece in edits.items() if name not in known]
    if [_kind(piece.info) for piece in pieces] == [_kind(info) for info in header.tensors.values()]:
        return raw, sorted(pieces, key=lambda piece: header.tensors[piece.info.name].start), path
    ordered = _data_order(pieces, header)
    head = encode_header([piece.info for piece in pieces], [piece.info for piece in ordered], header.metadata)
    return head, ordered, path


def _kind(info: TensorInfo) -> tuple[str, str, tuple[int, ...]]:
    return info.name, info.dtype, info.shape


def _data_order(pieces: list[_Piece], header: Header) -> list[_Piece]:
    """The old order with what is new at the end, unless a tensor would lie at an offset torch cannot view."""

    def old_place(piece: _Piece) -> float:
        return header.tensors[piece.info.name].start if piece.info.name in header.tensors else math.inf

    ordered, position = sorted(pieces, key=old_place), 0
    for piece in ordered:
        if position * 8 % DTYPE_BITS[piece.info.dtype]:
            return sorted(ordered, key=lambda piece: -DTYPE_BITS[piece.info.dtype])
        position += piece.info.nbytes
    return ordered


def _from_torch(source: Checkpoint, info: TensorInfo) -> _Piece:
    if info.dtype not in DTYPE_BITS:
        raise UnreadableError(
            f"`{info.name}` is stored as {info.dtype}, which safetensors cannot hold", "dequantise it"
        )
    return _Piece(info, lambda: source.raw_blocks(info.name, max_bytes=_BLOCK))


def _safe_name(file: str) -> str:
    if file.endswith(".safetensors"):
        return file
    stem = PurePosixPath(file).with_suffix(".safetensors").as_posix()
    return stem.replace("pytorch_model", "model")


def _home(name: str, source: Checkpoint) -> str:
    """The file of the tensor that shares the longest dotted prefix, the last such; without any, the last file."""
    parts, best, home = name.split("."), 0, source.weight_files[-1]
    for other, info in source.tensors.items():
        pairs = zip(parts, other.split("."), strict=False)
        shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        if shared and shared >= best:
            best, home = shared, info.file
    return home


def _plan_index(
    source: Checkpoint,
    plan: _Plan,
    edits: Mapping[str, _Piece],
    remove: Collection[str],
    homes: Mapping[str, str],
    renamed: Mapping[str, str],
) -> None:
    if not source.index_file:
        return
    index = source.read_json(source.index_file) or {}
    sizes = {name: info.nbytes for name, info in source.tensors.items() if name not in remove}
    sizes |= {name: piece.info.nbytes for name, piece in edits.items()}
    old_map: dict[str, str] = index["weight_map"]
    weight_map = {name: renamed[file] for name, file in old_map.items() if name not in remove} | dict(homes)
    old_total = sum(info.nbytes for info in source.tensors.values())
    name = join_name(source.subfolder, source.index_file)
    if weight_map == old_map and sum(sizes.values()) == old_total:
        plan.copies[name] = Path(source.root or "") / name
        return
    metadata = {**index.get("metadata", {}), "total_size": sum(sizes.values())}
    if "total_parameters" in metadata:
        old = sum(source.tensors[name].elements for name in remove)
        new = sum(piece.info.elements for key, piece in edits.items() if key not in source.tensors)
        metadata["total_parameters"] += new - old
    name = name.replace("pytorch_model.bin.index", "model.safetensors.index")
    plan.texts[name] = _json({**index, "metadata": metadata, "weight_map": weight_map})


def _walk(source: Checkpoint, root: Path, plan: _Plan) -> None:
    """Sort every other file of the source into copied and left out."""
    used = {join_name(source.subfolder, name) for name in (source.index_file, *source.weight_files) if name}
    seen: set[Path] = set()
    for folder, folders, names in os.walk(root, followlinks=True):
        here = Path(folder)
        inside = here.relative_to(root)
        if here.resolve() in seen:
            folders.clear()
            continue
        seen.add(here.resolve())
        for name in sorted(folders):
            if left_out((inside / name / "any").as_posix(), source.subfolder, ()):
                folders.remove(name)
                plan.left.append(f"{(inside / name).as_posix()}/")
        plan.folders.append(inside.as_posix())
        for name in sorted(names):
            _sort_file(source, plan, here / name, (inside / name).as_posix(), used)


def _sort_file(source: Checkpoint, plan: _Plan, path: Path, name: str, used: set[str]) -> None:
    if name in used or name in plan.shards:
        return
    if path.is_symlink() and not path.exists():
        raise UnreadableError(f"`{path}` is a link to nothing", "download the checkpoint again")
    if not path.is_file() or left_out(name, source.subfolder, used):
        plan.left.append(name)
        return
    plan.copies[name] = path


def _plan_config(source: Checkpoint, plan: _Plan, config: dict[str, Any]) -> dict[str, Any]:
    changed = {key: value for key, value in config.items() if key not in source.config or source.config[key] != value}
    if changed:
        name = join_name(source.subfolder, "config.json")
        plan.copies.pop(name, None)
        plan.texts[name] = _json({**source.config, **changed})
    return changed


def _plan_extra(plan: _Plan, extra: dict[str, str | bytes]) -> list[str]:
    for name, content in extra.items():
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or name in plan.shards:
            raise ValueError(f"{name} is no name for an extra file")
        plan.copies.pop(name, None)
        plan.texts[name] = content.encode() if isinstance(content, str) else content
    return sorted(extra)


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _write(plan: _Plan, stage: Path) -> None:
    for folder in plan.folders:
        (stage / folder).mkdir(parents=True, exist_ok=True)
    for name, path in plan.copies.items():
        with path.open("rb") as old, created(stage / name) as new:
            copy_range(old, new, 0, path.stat().st_size, name)
    for name, content in plan.texts.items():
        with created(stage / name) as new:
            new.write(content)
    for name, (head, pieces, old_path) in plan.shards.items():
        with created(stage / name) as new:
            new.write(head)
            _write_pieces(pieces, old_path, new, name)
            assert new.tell() == len(head) + sum(piece.info.nbytes for piece in pieces), name
    for folder in plan.folders:
        sync_folder(stage / folder)


def _write_pieces(pieces: list[_Piece], old_path: Path | None, new: BinaryIO, name: str) -> None:
    with (old_path or Path(os.devnull)).open("rb") as old:
        for piece in pieces:
            if piece.blocks is None:
                copy_range(old, new, piece.info.start, piece.info.nbytes, name)
                continue
            for block in piece.blocks():
                new.write(block)
