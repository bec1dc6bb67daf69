"""The tiny masked LMs that come with headscale: a reference that trains untouched, and one that does not.

Both were truly pretrained by `examples/pretrain_bundled.py`; their cards (`README.md`) say how well.
"""

from __future__ import annotations

from pathlib import Path

from headscale.errors import NotFoundError

PREFIX = "bundled:"
REFERENCE = "tiny-bert"
FAILING = "tiny-modernbert"


def names() -> tuple[str, ...]:
    """The bundled checkpoints, the reference first."""
    return (REFERENCE, FAILING)


def is_bundled(name: str) -> bool:
    """Whether a backbone is spelled like a bundled one: `bundled:NAME`."""
    return name.startswith(PREFIX)


def path(name: str) -> Path:
    """The checkpoint folder of a bundled model.

    Args:
        name: `tiny-bert` or `bundled:tiny-bert`, likewise for the others.

    Raises:
        NotFoundError: no bundled model has this name.
    """
    from importlib.resources import files

    short = name.removeprefix(PREFIX)
    if short not in names():
        spelled = ", ".join(f"`{PREFIX}{one}`" for one in names())
        raise NotFoundError(f"no bundled backbone is called `{short}`", f"choose from {spelled}")
    return Path(str(files("headscale.bundled") / short))
