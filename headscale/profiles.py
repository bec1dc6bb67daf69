"""A reference's statistics as a small file, and how a reference is found when only its name is given."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from headscale import __version__
from headscale.errors import HeadscaleError, NotFoundError, UnreadableError
from headscale.records import Inspection, Profile, TextSettings

SCHEMA = "headscale.profile/1"
DEFAULT_REFERENCE = "bert-base-uncased"
R = TypeVar("R")


def profile_of(inspection: Inspection, *, origin: str | None = None) -> Profile:
    """The profile of an inspected backbone."""
    return Profile(
        name=inspection.name,
        revision=inspection.revision,
        origin=origin or ("measured" if inspection.output is not None else "weights only"),
        weights=inspection.weights,
        output=inspection.output,
        texts=inspection.texts,
        version=__version__,
    )


def write_profile(profile: Profile, path: str | Path) -> None:
    """Write a profile, atomically."""
    from headscale.cells import write_json

    write_json(Path(path), {"schema": SCHEMA, "profile": profile.to_dict()})


def read_profile(path: str | Path) -> Profile:
    """Read a profile.

    Raises:
        NotFoundError: no such file.
        UnreadableError: not a profile of this version.
    """
    file = Path(path)
    if not file.is_file():
        raise NotFoundError(f"no profile `{file}`", hint=f"make one: `headscale profile BACKBONE -o {file}`")
    hint = f"make it again: `headscale profile BACKBONE -o {file}`"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UnreadableError(f"`{file}` is not a profile: {error}", hint=hint) from error
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        raise UnreadableError(f"`{file}` is not a profile of schema `{SCHEMA}`", hint=hint)
    try:
        return from_dict(Profile, content["profile"])
    except (KeyError, TypeError, ValueError) as error:
        raise UnreadableError(f"`{file}` lacks or misstates a field: {error}", hint=hint) from error


def from_dict(kind: type[R], values: dict[str, Any]) -> R:
    """A record from what its `to_dict()` gave; unknown keys and missing fields are errors."""
    hints = get_type_hints(kind)
    names = {f.name for f in fields(kind)}  # type: ignore[arg-type]
    unknown = set(values) - names
    if unknown:
        raise KeyError(", ".join(sorted(unknown)))
    return kind(**{name: _value(hints[name], value) for name, value in values.items()})


def _value(hint: Any, value: Any) -> Any:
    if get_origin(hint) is UnionType:
        if value is None:
            return None
        hint = next(h for h in get_args(hint) if h is not NoneType)
    if is_dataclass(hint) and isinstance(hint, type):
        return from_dict(hint, value)
    if get_origin(hint) is tuple:
        inner = get_args(hint)
        if len(inner) == 2 and inner[1] is Ellipsis:
            return tuple(_value(inner[0], v) for v in value)
        return tuple(_value(h, v) for h, v in zip(inner, value, strict=True))
    if hint is float and value is None:
        return float("nan")  # a non-finite number was written as null
    return value


@dataclass(frozen=True)
class Reference:
    """A profile and how it was come by, in words."""

    profile: Profile
    origin: str


def resolve_reference(
    name: str,
    texts: TextSettings | None,
    *,
    measure: Callable[[str, bool], Inspection],
    cache: Path | None = None,
    tell: Callable[[str], None] | None = None,
) -> Reference:
    """Find the statistics of a reference: a profile file, the cache, the model itself, its weights, the bundled BERT.

    Args:
        name: a profile file, a directory, a hub id or `bundled:NAME`.
        texts: the settings of the measurement that it will be compared with; None for weights alone.
        measure: `(name, weights_only) -> Inspection`.
        cache: where profiles are kept; by default beside the text cache.
        tell: told in a sentence when the reference is not the one asked for.

    Raises:
        HeadscaleError: the reference was named by the user and cannot be had.
    """
    if name.endswith(".json") and not Path(name).is_dir():
        return Reference(read_profile(name), f"profile `{name}`")
    folder = cache or _cache_folder()
    key = folder / f"{_key(name, texts)}.json"
    if key.is_file():
        try:
            return Reference(read_profile(key), "cached profile")
        except UnreadableError:
            key.unlink(missing_ok=True)  # of another version: measured again
    return _measured(name, key, texts, measure, tell)


def _measured(
    name: str,
    key: Path,
    texts: TextSettings | None,
    measure: Callable[[str, bool], Inspection],
    tell: Callable[[str], None] | None,
) -> Reference:
    from headscale import bundled

    weights_only = texts is None or not _is_here(name)
    try:
        inspection = measure(name, weights_only)
    except HeadscaleError as error:
        if name != DEFAULT_REFERENCE or not isinstance(error, NotFoundError):
            raise
        spare = f"{bundled.PREFIX}{bundled.REFERENCE}"
        if tell:
            tell(f"`{name}` is out of reach ({error.message}): the bundled BERT is the reference instead")
        return Reference(profile_of(measure(spare, texts is None), origin="bundled"), f"bundled, as {name} is not here")
    profile = profile_of(inspection)
    write_profile(profile, key)
    if weights_only and texts is not None and tell:
        tell(f"only the head of `{name}` was fetched: targets that need its outputs are left out")
    return Reference(profile, "measured" if not weights_only else "its weights, by byte range")


def _is_here(name: str) -> bool:
    """Whether the whole checkpoint is on this machine already."""
    if name.startswith("bundled:") or Path(name).expanduser().exists():
        return True
    from headscale.hub import cached_snapshot

    try:
        return cached_snapshot(name) is not None
    except HeadscaleError:
        return False


def _cache_folder() -> Path:
    from headscale.docstrings import cache_dir

    return cache_dir() / "profiles"


def _key(name: str, texts: TextSettings | None) -> str:
    """Changes with the texts, the version, and the files of a directory, which may change under its name."""
    from headscale import bundled

    path = bundled.path(name) if bundled.is_bundled(name) else Path(name).expanduser()
    identity: list[Any] = [name, None if texts is None else texts.to_dict(), __version__]
    if path.is_dir():
        stamps = sorted((f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in path.iterdir() if f.is_file())
        identity += [str(path.resolve()), stamps]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:24]
