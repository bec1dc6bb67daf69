"""Texts to measure and train on: the docstrings that every installation already has, and what the user brings.

The built-in corpus is (summary line, start of the body) pairs of docstrings in the packages headscale
depends on, read from the user's own installation: sources are scanned as text, nothing is imported.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from headscale.docstrings import PACKAGES, Row, digest, package_rows
from headscale.errors import UsageError

Split = Literal["train", "dev", "test"]

DOCUMENT_CHARS = 1000  # the part of a body used as a pair's document, about 200 words


@dataclass(frozen=True)
class Pair:
    """A query, a document that answers it, and optionally documents that do not.

    Args:
        query: the query's text.
        document: the text of a document that answers it.
        negatives: texts of documents that do not, the hardest or best trusted first.
        scores: a teacher's, of the document and of every negative in their order, in the teacher's own unit (raw
            logits of a cross-encoder, as a rule); empty without a teacher.
    """

    query: str
    document: str
    negatives: tuple[str, ...] = ()
    scores: tuple[float, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The pair as plain values."""
        return asdict(self)


# --- grouping and splitting -----------------------------------------------------------------------


def group_ids(keys: Sequence[Sequence[str]]) -> list[int]:
    """Group numbers such that texts sharing a key, directly or through others, share a number.

    Args:
        keys: per text, its keys.

    Returns:
        per text, the index of the first text of its group.
    """
    parent = list(range(len(keys)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    owner: dict[str, int] = {}
    for i, own in enumerate(keys):
        for key in own:
            a, b = root(owner.setdefault(key, i)), root(i)
            parent[max(a, b)] = min(a, b)
    return [root(i) for i in range(len(keys))]


def split_of(member: str) -> Split:
    """The split of a group: 80 / 10 / 10 by its smallest member's digest (hexadecimal)."""
    share = int(member[:8], 16) / 16**8
    return "train" if share < 0.8 else "dev" if share < 0.9 else "test"


def _assign(rows: Sequence[Row]) -> list[Split]:
    """The split of every row; rows of one group always land together."""
    groups = group_ids([row[2] for row in rows])
    smallest: dict[int, str] = {}
    for group, row in zip(groups, rows, strict=True):
        member = digest("".join(row[2]))
        smallest[group] = min(smallest.get(group, member), member)
    return [split_of(smallest[group]) for group in groups]


# --- the built-in corpus --------------------------------------------------------------------------


def builtin_pairs(
    split: Split = "train",
    *,
    packages: Sequence[str] | None = None,
    cache: bool = True,
    progress: Callable[[str], None] | None = None,
) -> list[Pair]:
    """(summary, start of the body) pairs of installed docstrings; no query and no document occurs twice.

    Groups of near-duplicates are formed before the split, and what the bundled models were pretrained on is
    left out of `dev` and `test`, whichever versions are installed and whichever packages are asked for.

    Args:
        split: `train`, `dev` or `test` (80 / 10 / 10 of the groups).
        packages: a part of `PACKAGES`; all of them by default.
        cache: keep the scanned docstrings under `cache_dir()`.
        progress: called with a package's name before its sources are scanned.

    Returns:
        the pairs, in an order that depends on the installed versions alone.

    Raises:
        UsageError: an unknown split or package.
    """
    seen: set[str] = set()
    pairs = []
    for summary, body, keys in _rows(split, packages, cache, progress):
        if seen.isdisjoint(keys):
            pairs.append(Pair(summary, _cut(body, DOCUMENT_CHARS)))
        seen.update(keys)
    return pairs


def builtin_texts(
    split: Split = "train",
    *,
    packages: Sequence[str] | None = None,
    cache: bool = True,
    progress: Callable[[str], None] | None = None,
) -> list[str]:
    """Whole docstrings of the same groups as `builtin_pairs`, for language modelling; no body occurs twice.

    Arguments and errors are those of `builtin_pairs`.
    """
    seen: set[str] = set()
    texts = []
    for summary, body, keys in _rows(split, packages, cache, progress):
        if keys[1] not in seen:
            texts.append(f"{summary} {body}")
        seen.add(keys[1])
    return texts


def builtin_keys(split: Split = "train", *, cache: bool = True) -> list[str]:
    """Sorted keys (8 hexadecimal digits) of a split's summaries and opening words: what else counts as seen."""
    return sorted({key[:8] for row in _rows(split, None, cache, None) for key in (row[2][0], row[2][2])})


def _rows(
    split: Split, packages: Sequence[str] | None, cache: bool, progress: Callable[[str], None] | None
) -> list[Row]:
    if split not in ("train", "dev", "test"):
        raise UsageError(f"unknown split `{split}`", "use `train`, `dev` or `test`")
    names = PACKAGES if packages is None else tuple(packages)
    unknown = [name for name in names if name not in PACKAGES]
    if unknown:
        raise UsageError(f"unknown package `{unknown[0]}`", f"choose from {', '.join(PACKAGES)}")
    rows = [row for name in PACKAGES if name in names for row in package_rows(name, cache, progress)]
    chosen = [row for row, own in zip(rows, _assign(rows), strict=True) if own == split]
    if split == "train":
        return chosen
    known = _pretrained_keys()
    return [row for row in chosen if known.isdisjoint(key[:8] for key in row[2])]


def _pretrained_keys() -> frozenset[str]:
    """`builtin_keys` of everything the bundled models saw in pretraining."""
    listed = Path(__file__).parent / "bundled" / "pretraining-keys.bin"
    if not listed.is_file():
        return frozenset()
    data = listed.read_bytes()
    return frozenset(data[i : i + 4].hex() for i in range(0, len(data), 4))


def _cut(text: str, limit: int) -> str:
    """At most `limit` characters, ending at a word's end."""
    return text if len(text) <= limit else text[: limit + 1].rpartition(" ")[0]


def corpus_fingerprint(pairs: Iterable[Pair | str]) -> str:
    """16 hexadecimal digits that change with any text or score of a corpus, or with their order."""
    total = hashlib.sha256()
    for pair in pairs:
        fields = [pair] if isinstance(pair, str) else [pair.query, pair.document, *pair.negatives, *pair.scores]
        total.update(json.dumps(fields).encode() + b"\n")
    return total.hexdigest()[:16]


# --- files of the user's own ----------------------------------------------------------------------


def read_pairs(source: str | Path, *, limit: int | None = None) -> list[Pair]:
    """Pairs from wherever they are; `headscale.readers.iterate_pairs` says from where, and what it raises.

    Args:
        source: a file, a folder in BEIR or NanoBEIR layout, or `hf:ID[:SUBSET][:SPLIT]`; `SOURCE[:N]` is its first N.
        limit: of the pairs read; what follows is not looked at.

    Raises:
        MemoryForecastError: they will not fit in memory.
    """
    from headscale.readers import collected_pairs

    return collected_pairs(source, limit)


def read_texts(path: str | Path, *, limit: int | None = None) -> list[str]:
    """Texts of a file (`.gz` too): one per line, or JSON objects with `text`, one per line.

    Args:
        path: a UTF-8 text file; empty lines are skipped.
        limit: of the texts read; what follows is not looked at.

    Raises:
        NotFoundError: no such file.
        UnreadableError: empty, not UTF-8, or a bad row (the message says which).
    """
    from headscale.readers import collected_texts

    return collected_texts(path, limit)
