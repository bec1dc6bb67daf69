"""One row of training data, whatever spelling its fields have, as pairs of a query and a document."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from headscale.errors import UnreadableError, UsageError
from headscale.texts import Pair

QUERY = ("query", "anchor", "question")
DOCUMENT = ("document", "positive", "pos", "positives", "positive_passages", "passage", "answer")
NEGATIVES = ("negatives", "negative", "neg", "hard_negatives", "negative_passages")
SCORES = ("scores", "teacher_scores", "score", "labels", "label")
HINT = "write `query<TAB>document[<TAB>negative...]`, or JSON objects with `query` and `document`"
SCORES_HINT = "write the teacher's scores as numbers: the positive's first, then one for each negative"


def pairs_of(values: Mapping[str, Any], where: str, columns: Mapping[str, str] | None = None) -> Iterator[Pair]:
    """The pairs of a row, one for each of its positives.

    Args:
        values: `query` and `document`, optionally `negatives` and `scores`, in the spellings that datasets in use
            have (`anchor`, `positive`, `neg`, `negative_1` and so on). A text is a string, or an object with `text`
            and perhaps `title`.
        where: names the row in messages.
        columns: the row's own names of `query`, `document`, `negatives` and `scores`.

    Raises:
        UnreadableError: a field is missing, or is not what it should be.
    """
    names = columns or {}
    query = _one(values, _spelled("query", names, QUERY), where)
    documents = _documents(values, _spelled("document", names, DOCUMENT), where)
    negatives = _negatives(values, _spelled("negatives", names, NEGATIVES), where)
    scores = _scores(values, _spelled("scores", names, SCORES), where, len(negatives))
    if scores and len(documents) > 1:
        raise UnreadableError(f"{where} has {len(documents)} positives and one list of scores", SCORES_HINT)
    for document in documents:
        yield Pair(query, document, negatives, scores)


def check_columns(columns: Mapping[str, str], label: str) -> None:
    """Refuse names of columns that stand for no field."""
    unknown = sorted(set(columns) - {"query", "document", "negatives", "scores"})
    if unknown:
        hint = "name those of `query`, `document`, `negatives` and `scores`"
        raise UsageError(f"`{label}` names a column for `{unknown[0]}`", hint)


def teacher_scores(found: Any, negatives: int, where: str) -> tuple[float, ...]:
    """A teacher's scores, the positive's first, in the teacher's own unit (only differences matter).

    Where there are as many numbers as negatives they are margins, positive less negative, as
    sentence-transformers' SparseMarginMSELoss takes them; the positive's score is then 0.

    Args:
        found: a number or a list of them.
        negatives: how many negatives the pair has.
        where: names the row in messages.
    """
    numbers = list(found) if isinstance(found, Sequence) and not isinstance(found, str) else [found]
    if not all(_is_number(one) for one in numbers):
        raise UnreadableError(f"{where} has scores that are not finite numbers", SCORES_HINT)
    if negatives and len(numbers) == negatives:
        return (0.0, *(0.0 - float(one) for one in numbers))
    if len(numbers) != 1 + negatives:
        raise UnreadableError(f"{where} has {len(numbers)} scores for {1 + negatives} texts", SCORES_HINT)
    return tuple(float(one) for one in numbers)


def has_scores(fields: list[str]) -> bool:
    """Whether a TSV row is a teacher's: two scores (at least one with a decimal point) before three texts or ids."""
    return len(fields) == 5 and any("." in one for one in fields[:2]) and all(map(_is_float, fields[:2]))


def scored_pair(fields: list[str], where: str) -> Pair:
    """The pair of a teacher's row: score of the positive, score of the negative, query, positive, negative.

    That is how the scores of arXiv 2010.02666 are shipped.
    """
    if len(fields) != 5 or not all(map(_is_float, fields[:2])):
        raise UnreadableError(f"{where} is not two scores and three columns like the first row", SCORES_HINT)
    if not all(fields):
        raise UnreadableError(f"{where} has an empty column {fields.index('') + 1}", HINT)
    positive, negative, query, document, other = fields
    return Pair(query, document, (other,), (float(positive), float(negative)))


def _is_float(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _spelled(field: str, columns: Mapping[str, str], usual: tuple[str, ...]) -> tuple[str, ...]:
    return (columns[field],) if field in columns else usual


def _found(values: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    return next((values[name] for name in names if values.get(name) is not None), None)


def _text(value: Any) -> str | None:
    """A text that is not empty, from a string or an object with `title` and `text`; None for anything else."""
    if isinstance(value, Mapping):
        value = f"{value.get('title') or ''} {value.get('text') or ''}"
    return value.strip() or None if isinstance(value, str) else None


def _one(values: Mapping[str, Any], names: tuple[str, ...], where: str) -> str:
    value = _found(values, names)
    if isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 1:
        value = value[0]
    text = _text(value)
    if text is None:
        raise UnreadableError(f"{where} has no text under `{names[0]}`{_instead(values)}", HINT)
    return text


def _documents(values: Mapping[str, Any], names: tuple[str, ...], where: str) -> list[str]:
    value = _found(values, names)
    several = isinstance(value, Sequence) and not isinstance(value, str)
    texts = [_text(one) for one in (value if several else [value])]
    if not texts or None in texts:
        raise UnreadableError(f"{where} has no text under `{names[0]}`{_instead(values)}", HINT)
    return [text for text in texts if text is not None]


def _instead(values: Mapping[str, Any]) -> str:
    """What a row has, for a message that says what it lacks."""
    names = [str(name) for name in list(values)[:6]]
    return f", only {', '.join(f'`{name}`' for name in names)}" if names else ""


def _negatives(values: Mapping[str, Any], names: tuple[str, ...], where: str) -> tuple[str, ...]:
    found = _found(values, names)
    if found is None:  # sentence-transformers numbers its columns: negative_1, negative_2 and so on
        found = [values[f"negative_{i}"] for i in range(1, 1 + len(values)) if f"negative_{i}" in values]
    several = isinstance(found, Sequence) and not isinstance(found, str)
    texts = [_text(one) for one in (found if several else [found])]
    if None in texts:
        raise UnreadableError(f"{where} has negatives that are not text", HINT)
    return tuple(text for text in texts if text is not None)


def _scores(values: Mapping[str, Any], names: tuple[str, ...], where: str, negatives: int) -> tuple[float, ...]:
    found = _found(values, names)
    if found is None or (not negatives and "scores" not in names):
        return ()
    return teacher_scores(found, negatives, where)
