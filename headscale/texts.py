"""Texts to measure and train on: the docstrings that every installation already has, and readers of files.

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
from headscale.errors import NotFoundError, UnreadableError, UsageError

Split = Literal["train", "dev", "test"]

DOCUMENT_CHARS = 1000  # the part of a body used as a pair's document, about 200 words


@dataclass(frozen=True)
class Pair:
    """A query, a document that answers it, and optionally documents that do not."""

    query: str
    document: str
    negatives: tuple[str, ...] = ()

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
    """16 hexadecimal digits that change with any text of a corpus, or with their order."""
    total = hashlib.sha256()
    for pair in pairs:
        fields = [pair] if isinstance(pair, str) else [pair.query, pair.document, *pair.negatives]
        total.update(json.dumps(fields).encode() + b"\n")
    return total.hexdigest()[:16]


# --- files of the user's own ----------------------------------------------------------------------


def read_pairs(path: str | Path) -> list[Pair]:
    """Pairs of a file: `query<TAB>document[<TAB>negative...]`, or one JSON object per line.

    JSON objects hold `query` (or `anchor`), `document` (or `positive` or `pos`), and optionally `negatives`
    (or `negative` or `neg`): a string or a list. The suffix decides (`.jsonl`, `.tsv`), else the first line.

    Args:
        path: a UTF-8 text file; empty lines are skipped.

    Raises:
        NotFoundError: no such file.
        UnreadableError: empty, not UTF-8 (the message says at which byte), or a bad row (it says which).
    """
    rows = _numbered_lines(Path(path))
    parse = _pair_from_json if _is_jsonl(Path(path), rows[0][1]) else _pair_from_tsv
    return [parse(Path(path), number, line) for number, line in rows]


def read_texts(path: str | Path) -> list[str]:
    """Texts of a file: one per line, or JSON objects with `text`, one per line.

    Arguments and errors are those of `read_pairs`.
    """
    rows = _numbered_lines(Path(path))
    if not _is_jsonl(Path(path), rows[0][1]):
        return [line.strip() for _, line in rows]
    hint = "every line needs a JSON object with a `text` string"
    return [_field(_object(Path(path), n, line, hint), ("text",), Path(path), n, hint) for n, line in rows]


def _numbered_lines(path: Path) -> list[tuple[int, str]]:
    """The lines that are not empty, with their numbers from 1."""
    if not path.exists():
        raise NotFoundError(f"no such file: `{path}`", "check the path; it is taken relative to the current folder")
    if path.is_dir():
        raise UnreadableError(f"`{path}` is a folder, not a text file", "give a file inside it")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UnreadableError(
            f"`{path}` is not UTF-8 text: byte {error.start} cannot be decoded",
            "convert it, for example with `iconv -t UTF-8`",
        ) from None
    except OSError as error:
        raise UnreadableError(f"`{path}` cannot be read: {error.strerror}", "check its permissions") from None
    rows = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not rows:
        raise UnreadableError(f"`{path}` is empty", "write one text or one pair per line")
    return rows


def _is_jsonl(path: Path, first: str) -> bool:
    if path.suffix.lower() in (".jsonl", ".ndjson"):
        return True
    return path.suffix.lower() != ".tsv" and first.lstrip().startswith("{")


_PAIR_HINT = "write `query<TAB>document[<TAB>negative...]`, or JSON objects with `query` and `document`"


def _pair_from_tsv(path: Path, number: int, line: str) -> Pair:
    fields = [field.strip() for field in line.rstrip("\r").split("\t")]
    if len(fields) < 2:
        raise UnreadableError(f"`{path}` row {number} has one column, not two or more", _PAIR_HINT)
    if not all(fields):
        empty = fields.index("") + 1
        raise UnreadableError(f"`{path}` row {number} has an empty column {empty}", _PAIR_HINT)
    return Pair(fields[0], fields[1], tuple(fields[2:]))


def _pair_from_json(path: Path, number: int, line: str) -> Pair:
    values = _object(path, number, line, _PAIR_HINT)
    query = _field(values, ("query", "anchor"), path, number, _PAIR_HINT)
    document = _field(values, ("document", "positive", "pos"), path, number, _PAIR_HINT)
    negatives: Any = next((values[key] for key in ("negatives", "negative", "neg") if key in values), [])
    negatives = [negatives] if isinstance(negatives, str) else negatives
    if not isinstance(negatives, list) or not all(isinstance(one, str) for one in negatives):
        raise UnreadableError(f"`{path}` row {number} has negatives that are not text", _PAIR_HINT)
    return Pair(query, document, tuple(negatives))


def _object(path: Path, number: int, line: str, hint: str) -> dict[str, Any]:
    try:
        values = json.loads(line)
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise UnreadableError(f"`{path}` row {number} is not a JSON object", hint)
    return values


def _field(values: dict[str, Any], names: tuple[str, ...], path: Path, number: int, hint: str) -> str:
    """The first of the named fields that is there; a list of one text counts as the text."""
    value = next((values[name] for name in names if name in values), None)
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if not isinstance(value, str) or not value.strip():
        raise UnreadableError(f"`{path}` row {number} has no text under `{names[0]}`", hint)
    return value.strip()
