"""The terms of a backbone: read from its tokenizer files without torch, and how many are variants of another."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from headscale.errors import UnreadableError
from headscale.records import VocabularyStatistics

if TYPE_CHECKING:
    from headscale.checkpoint import Checkpoint

_UNUSED = re.compile(r"^[\[<](unused|extra_id_|madeupword)[_-]?\d+[\]>]$|^madeupword\d+$")
_WORD_START = "\u2581 "  # SentencePiece's mark; a byte-level token decodes to a leading space
_CONTINUATION = "##"
_BYTE_SPACE = "\u0120"  # what byte-level BPE writes for a space
# Special by convention where a bare `vocab.txt` says nothing (the defaults of BERT's tokenizer).
_BERT_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


@dataclass(frozen=True)
class Vocabulary:
    """The tokens by id, and which of them are not terms of text."""

    tokens: tuple[str, ...]
    special_ids: frozenset[int]
    unused_ids: frozenset[int]


def read_vocabulary(checkpoint: Checkpoint, rows: int) -> Vocabulary | None:
    """The vocabulary of a checkpoint, from whichever tokenizer file it has; None when it has none.

    Args:
        checkpoint: an open checkpoint.
        rows: rows of the head; ids past the tokenizer's last count as unused.

    Raises:
        UnreadableError: a tokenizer file is damaged.
    """
    try:
        found = _read(checkpoint)
        return None if found is None else _assemble(*found, rows)
    except (AttributeError, KeyError, MemoryError, TypeError, ValueError) as error:
        raise UnreadableError(
            f"the tokenizer files of `{checkpoint.name}` are not understood: {error}", hint="download them again"
        ) from error


def _read(checkpoint: Checkpoint) -> tuple[dict[str, int], set[int]] | None:
    settings = checkpoint.read_json("tokenizer_config.json") or {}
    content = checkpoint.read_json("tokenizer.json")
    table = _table(checkpoint, content)
    if not table:
        return None
    added = _added_tokens(checkpoint, content or {}, settings)
    for token, index, _ in added:
        table.setdefault(token, index)
    special = {index for _, index, is_special in added if is_special}
    named = _named(settings) | _named(checkpoint.read_json("special_tokens_map.json") or {})
    special |= {table[token] for token in named if token in table}
    return table, special or _special_by_convention(checkpoint, table)


def tokenizer_vocabulary(tokenizer: Any, rows: int) -> Vocabulary:
    """The vocabulary of a loaded tokenizer."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    marked = {index for index, token in added.items() if token.special}
    return _assemble(dict(tokenizer.get_vocab()), marked | set(tokenizer.all_special_ids), rows)


def _assemble(table: dict[str, int], special: set[int], rows: int) -> Vocabulary:
    tokens = [""] * max(rows, max(table.values()) + 1)
    for token, index in table.items():
        tokens[index] = token
    unused = {i for i, token in enumerate(tokens) if token == "" or _UNUSED.match(token)}
    return Vocabulary(tuple(tokens), frozenset(special & set(range(len(tokens)))) - unused, frozenset(unused))


def _table(checkpoint: Checkpoint, content: dict[str, Any] | None) -> dict[str, int]:
    """Ids by token, without what was added later; `content` is that of `tokenizer.json`."""
    if content is not None:
        vocabulary = (content.get("model") or {}).get("vocab") or {}
        if isinstance(vocabulary, list):  # a unigram model lists (piece, score)
            return {piece: i for i, (piece, *_) in enumerate(vocabulary)}
        return dict(vocabulary)
    if checkpoint.has_file("vocab.txt"):
        lines = checkpoint.file("vocab.txt").read_text(encoding="utf-8").split("\n")
        return {line: i for i, line in enumerate(lines) if line}
    return dict(checkpoint.read_json("vocab.json") or {})


def _added_tokens(
    checkpoint: Checkpoint, content: dict[str, Any], settings: dict[str, Any]
) -> list[tuple[str, int, bool]]:
    """(token, id, special) of what was added to the vocabulary, from wherever this generation of files keeps it."""
    entries = [(entry["id"], entry) for entry in content.get("added_tokens") or []]
    entries += (settings.get("added_tokens_decoder") or {}).items()
    found = [(e["content"], int(index), bool(e.get("special"))) for index, e in entries]
    return found + [(t, int(i), False) for t, i in (checkpoint.read_json("added_tokens.json") or {}).items()]


def _named(settings: dict[str, Any]) -> set[str]:
    """The tokens that a tokenizer's settings give a role (`cls_token` and the like)."""
    found = set()
    for key, value in settings.items():
        entries = value if key == "additional_special_tokens" else [value] if key.endswith("_token") else []
        found |= {entry.get("content") if isinstance(entry, dict) else entry for entry in entries or []}
    return {token for token in found if isinstance(token, str)}


def _special_by_convention(checkpoint: Checkpoint, table: dict[str, int]) -> set[int]:
    """What is special where no tokenizer file says it: BERT's five, and the ids that the configuration names."""
    roles = ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id", "mask_token_id")
    ids = {checkpoint.config.get(role) for role in roles} | {table.get(token) for token in _BERT_SPECIAL}
    return {i for i in ids if isinstance(i, int) and i >= 0}


# --- statistics ----------------------------------------------------------------------------------------------------


def vocabulary_statistics(vocabulary: Vocabulary) -> VocabularyStatistics:
    """How large and how redundant a vocabulary is.

    A term counts as a variant if some other term becomes the same string once case, the word-start or continuation
    mark, or punctuation around it is taken away. Shares are over the ordinary terms (special and unused apart).
    """
    left_out = vocabulary.special_ids | vocabulary.unused_ids
    ordinary = [t for i, t in enumerate(vocabulary.tokens) if i not in left_out]
    byte_level = _is_byte_level(ordinary)
    terms = [_surface(t) for t in ordinary] if byte_level else ordinary
    drop_mark = _drop_space if byte_level else _drop_mark
    punctuation = _punctuation_dropper(drop_mark)
    upper = sum(1 for t in terms if t != t.lower())
    return VocabularyStatistics(
        size=len(vocabulary.tokens),
        special=len(vocabulary.special_ids),
        unused=len(vocabulary.unused_ids),
        cased=upper > 0,
        uppercase_share=upper / max(1, len(terms)),
        case_variant_share=_collisions(terms, _fold_case),
        space_variant_share=_collisions(terms, drop_mark),
        punctuation_variant_share=_collisions(terms, punctuation),
        variant_share=_collisions(terms, lambda t: punctuation(drop_mark(_fold_case(t)))),
    )


def _collisions(terms: Sequence[str], normalise: Callable[[str], str]) -> float:
    """Share of the terms that at least one other term turns into; what is nothing but marks does not count."""
    forms = [normalise(t) for t in terms]
    counts = Counter(forms)
    return sum(1 for form in forms if form and counts[form] > 1) / max(1, len(forms))


def _fold_case(term: str) -> str:
    return term.casefold()


def _drop_space(term: str) -> str:
    return term.lstrip(_WORD_START) or term


def _drop_mark(term: str) -> str:
    return _drop_space(term.removeprefix(_CONTINUATION) or term)


def _punctuation_dropper(drop_mark: Callable[[str], str]) -> Callable[[str], str]:
    """Takes the punctuation around a term away and leaves its mark where it is."""

    def drop(term: str) -> str:
        bare = drop_mark(term)
        if bare.isalnum():  # most are: no character to look up
            return term
        kept = [i for i, character in enumerate(bare) if not _is_punctuation(character)]
        return term.removesuffix(bare) + bare[kept[0] : kept[-1] + 1] if kept else term

    return drop


@cache
def _is_punctuation(character: str) -> bool:
    """Punctuation, symbols and separators; the vowel signs of Indic scripts are neither these nor letters."""
    return unicodedata.category(character)[0] in "PSZC"


def _is_byte_level(terms: Sequence[str]) -> bool:
    """Whether spaces are written as byte-level BPE writes them, more often than as any other mark."""
    spaces = sum(t.startswith(_BYTE_SPACE) for t in terms)
    return spaces > sum(t.startswith((_CONTINUATION, "\u2581")) for t in terms)


@cache
def _byte_alphabet() -> dict[str, int]:
    """The printable stand-ins that byte-level BPE uses for the 256 bytes (the GPT-2 convention)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    table = {chr(b): b for b in printable}
    table.update({chr(256 + i): b for i, b in enumerate(others)})
    return table


def _surface(token: str) -> str:
    """A token as text: byte-level stand-ins decoded where every character is one, else the token itself."""
    alphabet = _byte_alphabet()
    if token.isascii() or not all(c in alphabet for c in token):
        return token
    try:
        return bytes(alphabet[c] for c in token).decode("utf-8")
    except UnicodeDecodeError:
        return token
