"""Rows of parquet files and of Hugging Face datasets, one at a time (extra `datasets`)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from headscale.errors import HeadscaleError, NotFoundError, UnreadableError, UsageError

HUB = "hf:"
_ROWS = 1024  # rows of a parquet file decoded at once
_SYNTAX = "write `hf:ID[:SUBSET][:SPLIT]`, and `?query=COLUMN&document=COLUMN` where the columns have other names"


def require(package: str) -> None:
    """Say in one sentence that a package of the extra `datasets` is missing."""
    if find_spec(package) is None:
        raise HeadscaleError(
            f"reading this needs `{package}`, which is not installed", 'pip install "headscale[datasets]"'
        )


# --- parquet ------------------------------------------------------------------------------------------------------


def parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a parquet file; a few hundred of them are in memory.

    Raises:
        HeadscaleError: pyarrow is missing.
        UnreadableError: it is no parquet file.
    """
    require("pyarrow")
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_ROWS):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise UnreadableError(
            f"`{path}` is not a parquet file that can be read: {_sentence(error)}", "download or copy it again"
        ) from None


def parquet_splits(folder: Path) -> dict[str, list[Path]]:
    """The parquet files of a subset's folder by split, as the hub names them: `SPLIT-00000-of-00002.parquet`."""
    splits: dict[str, list[Path]] = {}
    for file in sorted(folder.glob("*.parquet")):
        splits.setdefault(re.sub(r"-\d+(-of-\d+)?$", "", file.stem), []).append(file)
    return splits


# --- the hub ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HubSource:
    """A dataset on the Hugging Face hub, or a local folder that `datasets` can load.

    Args:
        identity: its id or path.
        subset: or configuration; None: the only one, or the default.
        split: None: `train`, or the only one.
        columns: the dataset's names of `query`, `document`, `negatives`, `scores`.
    """

    identity: str
    subset: str | None = None
    split: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """As the user wrote it, without the columns."""
        return ":".join([f"{HUB}{self.identity}", *(part for part in (self.subset, self.split) if part)])


def hub_source(text: str) -> HubSource:
    """Read `hf:ID[:SUBSET][:SPLIT][?query=COLUMN&...]`; a lone part that is a usual name of a split is a split.

    Raises:
        UsageError: it is written otherwise.
    """
    body, _, query = text.removeprefix(HUB).partition("?")
    identity, *rest = body.split(":")
    if not identity or len(rest) > 2 or not all(rest):
        raise UsageError(f"`{text}` does not name a dataset", _SYNTAX)
    columns = dict(parse_qsl(query))
    if len(rest) == 1 and rest[0] in ("train", "dev", "validation", "test"):
        rest = ["", *rest]
    subset, split = [part or None for part in (*rest, "", "")][:2]
    return HubSource(identity, subset, split, columns)


def hub_rows(source: HubSource) -> Iterator[dict[str, Any]]:
    """The rows of a dataset as they stream in; offline, those of the copy in the cache.

    Raises:
        HeadscaleError: `datasets` is missing.
        NotFoundError: no such dataset, subset or split, or it is out of reach.
    """
    require("datasets")
    rows = iter(_loaded(source))
    while True:
        try:
            row = next(rows, None)
        except Exception as error:  # whatever a connection, a file format or a dataset's own reader raises
            raise _unreachable(source, error) from error
        if row is None:
            return
        yield dict(row)


def _loaded(source: HubSource) -> Any:
    import datasets
    from huggingface_hub import constants

    streaming = Path(source.identity).is_dir() or not constants.HF_HUB_OFFLINE
    try:
        found = datasets.load_dataset(source.identity, source.subset, split=source.split, streaming=streaming)
    except Exception as error:  # as above
        raise _unreachable(source, error) from error
    if source.split is not None:
        return found
    splits = list(found)
    if "train" not in splits and len(splits) > 1:
        raise NotFoundError(f"`{source.label}` has no split `train`", f"name one: {', '.join(splits)}")
    return found["train" if "train" in splits else splits[0]]


def _unreachable(source: HubSource, error: Exception) -> HeadscaleError:
    return NotFoundError(
        f"the dataset `{source.label}` cannot be read: {_sentence(error)}",
        f"check its id, subset and split, and the connection; {_SYNTAX}",
    )


def _sentence(error: Exception) -> str:
    """The first line of a foreign message, without its full stop."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200].rstrip('. ')}" if lines else type(error).__name__
