"""A reference's statistics as a small file, and how a reference is found when only its name is given."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
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
        return from_dict(Profile, content.get("profile"))
    except ValueError as error:
        raise UnreadableError(f"`{file}` lacks or misstates a field: {error}", hint=hint) from error


def from_dict(kind: type[R], values: Any) -> R:
    """A record from what its `to_dict()` gave.

    Raises:
        ValueError: an unknown key, a missing field, or a value of another type.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{kind.__name__} is {type(values).__name__}, not an object")
    hints = get_type_hints(kind)
    known = fields(kind)  # type: ignore[arg-type]
    needed = {f.name for f in known if f.default is MISSING and f.default_factory is MISSING}
    wrong = sorted(needed - set(values)) + sorted(set(values) - {f.name for f in known})
    if wrong:
        raise ValueError(f"{kind.__name__} lacks or does not know {', '.join(wrong)}")
    return kind(**{name: _value(hints[name], value, name) for name, value in values.items()})


def _value(hint: Any, value: Any, name: str) -> Any:
    if get_origin(hint) is UnionType:
        if value is None:
            return None
        hint = next(h for h in get_args(hint) if h is not NoneType)
    if is_dataclass(hint) and isinstance(hint, type):
        return from_dict(hint, value)
    if get_origin(hint) is tuple:
        return _tuple(get_args(hint), value, name)
    if hint is float:
        return _number(value, name)
    expected = get_origin(hint) or hint
    mistaken = isinstance(value, bool) and expected is not bool  # True is an int to Python
    if isinstance(expected, type) and (mistaken or not isinstance(value, expected)):
        raise ValueError(f"{name} is {value!r}, not of type {expected.__name__}")
    return value


def _tuple(inner: tuple[Any, ...], value: Any, name: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise ValueError(f"{name} is {value!r}, not a list")
    if len(inner) == 2 and inner[1] is Ellipsis:
        return tuple(_value(inner[0], v, name) for v in value)
    return tuple(_value(h, v, name) for h, v in zip(inner, value, strict=True))


def _number(value: Any, name: str) -> float:
    if value is None:
        return math.nan  # a non-finite number was written as null
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} is {value!r}, not a number")
    return float(value)


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
    weights_only = texts is None or not _is_here(name)
    key = (cache or _cache_folder()) / f"{_key(name, texts)}.json"
    found = _kept(key)
    if found is None or (found.profile.output is None and not weights_only):
        try:
            found = _measured(name, key, weights_only, measure)
        except NotFoundError as error:
            if name != DEFAULT_REFERENCE:
                raise
            if tell:
                tell(f"`{name}` is out of reach ({error.message}): the bundled BERT is the reference instead")
            return _spare(texts, measure=measure, cache=cache)
    if texts is not None and found.profile.output is None and tell:
        tell(f"only the head of `{name}` was read: targets that need its outputs are left out")
    return found


def _kept(key: Path) -> Reference | None:
    """The cached profile; None where there is none, or one of another version."""
    try:
        return Reference(read_profile(key), "cached profile")
    except (NotFoundError, UnreadableError):
        return None


def _measured(name: str, key: Path, weights_only: bool, measure: Callable[[str, bool], Inspection]) -> Reference:
    profile = profile_of(measure(name, weights_only))
    with contextlib.suppress(HeadscaleError):  # a cache that cannot be written only costs time
        write_profile(profile, key)
    return Reference(profile, "its weights alone" if weights_only else "measured")


def _spare(texts: TextSettings | None, *, measure: Callable[[str, bool], Inspection], cache: Path | None) -> Reference:
    """The bundled BERT in place of the default reference."""
    from headscale import bundled

    found = resolve_reference(f"{bundled.PREFIX}{bundled.REFERENCE}", texts, measure=measure, cache=cache)
    return Reference(replace(found.profile, origin="bundled"), f"bundled, as {DEFAULT_REFERENCE} is not here")


def _is_here(name: str) -> bool:
    """Whether the whole checkpoint is on this machine already."""
    return name.startswith("bundled:") or Path(name).expanduser().exists() or _cached_commit(name) is not None


def _cached_commit(name: str) -> str | None:
    """The commit of a hub id that is in the hub cache with all its weights."""
    from headscale.hub import cached_snapshot

    try:
        found = cached_snapshot(name)
    except HeadscaleError:
        return None
    return None if found is None else found[1]


def _cache_folder() -> Path:
    from headscale.docstrings import cache_dir

    return cache_dir() / "profiles"


def _key(name: str, texts: TextSettings | None) -> str:
    """Changes with the texts, the version, and what the name stands for: files may change under it, or a commit."""
    from headscale import bundled

    path = bundled.path(name) if bundled.is_bundled(name) else Path(name).expanduser()
    identity: list[Any] = [name, None if texts is None else texts.to_dict(), __version__]
    if path.exists():
        below = [path, *path.glob("*"), *path.glob("*/*")]  # a sentence-transformers folder has the model a level down
        stamps = sorted((str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in below if f.is_file())
        identity += [str(path.resolve()), stamps]
    else:
        identity.append(_cached_commit(name))
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:24]
