"""The terms of a backbone: read from its tokenizer files without torch, and how many are variants of another."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from headscale.records import VocabularyStatistics

if TYPE_CHECKING:
    from headscale.checkpoint import Checkpoint

_UNUSED = re.compile(r"^[\[<](unused|extra_id_|madeupword)[_-]?\d+[\]>]$|^madeupword\d+$")
_WORD_START = ("\u2581", " ")  # SentencePiece's mark; a byte-level token decodes to a leading space
_CONTINUATION = "##"


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
    """
    table, special = _from_files(checkpoint)
    special |= _special_in_config(checkpoint.config)
    if not table:
        return None
    return _assemble(table, special, rows)


def tokenizer_vocabulary(tokenizer: Any, rows: int) -> Vocabulary:
    """The vocabulary of a loaded tokenizer."""
    return _assemble(dict(tokenizer.get_vocab()), set(tokenizer.all_special_ids), rows)


def _assemble(table: dict[str, int], special: set[int], rows: int) -> Vocabulary:
    tokens = [""] * max(rows, max(table.values()) + 1)
    for token, index in table.items():
        tokens[index] = token
    unused = {i for i, token in enumerate(tokens) if token == "" or _UNUSED.match(token)}
    inside = frozenset(i for i in special if 0 <= i < len(tokens))
    return Vocabulary(tuple(tokens), inside, frozenset(unused) - inside)


def _from_files(checkpoint: Checkpoint) -> tuple[dict[str, int], set[int]]:
    special: set[int] = set()
    settings = checkpoint.read_json("tokenizer_config.json") or {}
    for index, entry in (settings.get("added_tokens_decoder") or {}).items():
        if entry.get("special"):
            special.add(int(index))
    if checkpoint.has_file("tokenizer.json"):
        return _from_tokenizer_json(checkpoint.read_json("tokenizer.json") or {}, special)
    if checkpoint.has_file("vocab.txt"):
        lines = checkpoint.file("vocab.txt").read_text(encoding="utf-8").split("\n")
        table = {line.rstrip("\r"): i for i, line in enumerate(lines) if line}
    else:
        table = checkpoint.read_json("vocab.json") or {}
    named = [v if isinstance(v, str) else "" for k, v in settings.items() if k.endswith("_token")]
    return table, special | {table[token] for token in named if token in table}


def _from_tokenizer_json(content: dict[str, Any], special: set[int]) -> tuple[dict[str, int], set[int]]:
    vocabulary = content.get("model", {}).get("vocab") or {}
    if isinstance(vocabulary, list):  # a unigram model lists (piece, score)
        vocabulary = {piece: i for i, (piece, _) in enumerate(vocabulary)}
    table = dict(vocabulary)
    for entry in content.get("added_tokens") or []:
        table[entry["content"]] = entry["id"]
        if entry.get("special"):
            special.add(entry["id"])
    return table, special


def _special_in_config(config: dict[str, Any]) -> set[int]:
    keys = ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id", "mask_token_id")
    return {config[k] for k in keys if isinstance(config.get(k), int) and config[k] >= 0}


# --- statistics ----------------------------------------------------------------------------------------------------


def vocabulary_statistics(vocabulary: Vocabulary) -> VocabularyStatistics:
    """How large and how redundant a vocabulary is.

    A term counts as a variant if some other term becomes the same string once case, the word-start or continuation
    mark, or punctuation around it is taken away. Shares are over the ordinary terms (special and unused apart).
    """
    left_out = vocabulary.special_ids | vocabulary.unused_ids
    terms = [_surface(t) for i, t in enumerate(vocabulary.tokens) if i not in left_out]
    everything = _compose(_fold_case, _drop_mark, _drop_punctuation)
    upper = _share(t for t in terms if t != t.lower()) if terms else 0.0
    return VocabularyStatistics(
        size=len(vocabulary.tokens),
        special=len(vocabulary.special_ids),
        unused=len(vocabulary.unused_ids),
        cased=any(t != t.lower() for t in terms),
        uppercase_share=upper / max(1, len(terms)),
        case_variant_share=_collisions(terms, _fold_case),
        space_variant_share=_collisions(terms, _drop_mark),
        punctuation_variant_share=_collisions(terms, _drop_punctuation),
        variant_share=_collisions(terms, everything),
    )


def _share(found: Any) -> float:
    return float(sum(1 for _ in found))


def _collisions(terms: Sequence[str], normalise: Callable[[str], str]) -> float:
    """Share of the terms that at least one other term turns into; what is nothing but marks does not count."""
    forms = [normalise(t) for t in terms]
    counts = Counter(forms)
    return sum(1 for form in forms if form and counts[form] > 1) / max(1, len(forms))


def _compose(*steps: Callable[[str], str]) -> Callable[[str], str]:
    def all_steps(term: str) -> str:
        for step in steps:
            term = step(term)
        return term

    return all_steps


def _fold_case(term: str) -> str:
    return term.casefold()


def _drop_mark(term: str) -> str:
    term = term.removeprefix(_CONTINUATION) if len(term) > len(_CONTINUATION) else term
    return term.lstrip("".join(_WORD_START)) if term.strip("".join(_WORD_START)) else term


def _drop_punctuation(term: str) -> str:
    mark = term[: len(term) - len(_drop_mark(term))]
    bare = re.sub(r"^[^\w]+|[^\w]+$", "", term[len(mark) :])
    return mark + bare if bare else term


@lru_cache(maxsize=1)
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
