"""Names of a vocabulary's terms that every index keeps apart and none splits."""

from __future__ import annotations

from typing import Any

SPACE = "\u2423"  # an open box, for white space inside a token
DOT = "\u2024"  # a one dot leader


def term_names(tokenizer: Any, terms: int, *, dots: bool = True, longest: int | None = None) -> list[str]:
    """One name for each term: its token where that will do.

    Two terms may share a token's text, a matrix may have more rows than the tokenizer has tokens, and a token may
    hold white space, at which the analyzers of pretokenized text split.

    Args:
        tokenizer: from transformers.
        terms: of the vocabulary.
        dots: whether names may hold a full stop; Elasticsearch's `rank_features` refuse it (elastic/elasticsearch
            issue 109118), since it separates the names of nested fields.
        longest: characters of a name; None: any number.

    Returns:
        names without white space, no two alike.
    """
    known = min(terms, len(tokenizer))
    tokens = [*tokenizer.convert_ids_to_tokens(range(known)), *([None] * (terms - known))]
    names, seen = [], set()
    for identity, token in enumerate(tokens):
        name = "".join(SPACE if character.isspace() else character for character in token or "")
        name = name if dots else name.replace(".", DOT)
        if not name or name in seen or (longest is not None and len(name) > longest):
            name = _numbered(name, identity, longest)
        while name in seen:
            name = _numbered(name + "#", identity, longest)
        seen.add(name)
        names.append(name)
    return names


def _numbered(name: str, identity: int, longest: int | None) -> str:
    """The name's beginning and the term's number."""
    number = f"#{identity}"
    return (name if longest is None else name[: longest - len(number)]) + number
