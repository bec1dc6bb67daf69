"""From rankings to effectiveness: the measures with their intervals, what chance would give, and TREC run files."""

from __future__ import annotations

import math
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from headscale.errors import HeadscaleError
from headscale.records import Estimate

if TYPE_CHECKING:
    from headscale.collection import Collection

Floats = np.ndarray[Any, np.dtype[np.float64]]

MEASURES = {
    "ndcg_at_10": ("nDCG@10", 10),
    "mrr_at_10": ("RR@10", 10),
    "recall_at_100": ("R@100", 100),
    "recall_at_1000": ("R@1000", 1000),
}
"""Our name of every measure, that of ir_measures, and its cut-off. Gains of nDCG are the grades, as in trec_eval."""

DEPTH = max(cutoff for _, cutoff in MEASURES.values())
RESAMPLES = 2000
_CONFIDENCE = (2.5, 97.5)  # percentiles
_PART = 256  # queries given to ir_measures at once: it holds a table of ids, about 100 kB each
T = TypeVar("T")


@dataclass(frozen=True)
class Ranked:
    """One query's documents, best first.

    Args:
        documents: positions in the collection.
        scores: never increasing.
    """

    documents: np.ndarray[Any, np.dtype[np.int64]]
    scores: Floats


def require(package: str, purpose: str) -> None:
    """Say in one sentence that a package of the extra is missing, before anything is computed."""
    from importlib.util import find_spec

    if find_spec(package) is None:
        raise HeadscaleError(f"{purpose} needs `{package}`, which is not installed", 'pip install "headscale[eval]"')


# --- measures -----------------------------------------------------------------------------------------------------


def measurable(documents: int) -> list[str]:
    """The measures whose cut-off is not larger than the collection."""
    return [name for name, (_, cutoff) in MEASURES.items() if cutoff <= documents]


def per_query(collection: Collection, rankings: Sequence[Ranked]) -> dict[str, Floats]:
    """Every measure of every query, by ir_measures.

    Args:
        collection: what was searched.
        rankings: of its queries, in their order; ties are broken in the order given, whatever the ids.

    Returns:
        arrays of shape (queries,) by name, for the measures that are not cut off beyond the collection.
    """
    require("ir_measures", "evaluation")
    import ir_measures

    names = measurable(len(collection.documents))
    if not names:
        return {}
    measures = {ir_measures.parse_measure(MEASURES[name][0]): name for name in names}
    row = {query: i for i, query in enumerate(collection.query_ids)}
    values = {name: np.zeros(len(row)) for name in names}
    qrels = collection.qrels
    for part in batched(_scored(collection, rankings), _PART):
        run = {query: dict(scored) for query, scored in part}
        for metric in ir_measures.iter_calc(list(measures), {query: qrels[query] for query in run}, run):
            values[measures[metric.measure]][row[metric.query_id]] = metric.value
    return values


def batched(rows: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of `size` rows, the last one shorter."""
    rest = iter(rows)
    while part := list(islice(rest, size)):
        yield part


def estimate(values: Floats, *, resamples: int = RESAMPLES, seed: int = 0) -> Estimate:
    """The mean over queries with a percentile bootstrap interval (95 %) and the spread between queries.

    Equal seeds and numbers of queries draw the same queries, so intervals of two systems are paired.

    Args:
        values: (queries,).
        resamples: of the queries, with replacement.
        seed: of the draws.
    """
    count = len(values)
    mean = math.fsum(values) / count
    if count < 2:
        return Estimate(mean, None, None, None)
    draws = np.random.default_rng(seed)
    share = np.full(count, 1 / count)
    means = [draws.multinomial(count, share) @ values / count for _ in range(resamples)]
    low, high = np.percentile(means, _CONFIDENCE)
    return Estimate(mean, float(low), float(high), float(np.std(values, ddof=1)))


def estimates(values: Mapping[str, Floats], *, resamples: int = RESAMPLES, seed: int = 0) -> dict[str, Estimate | None]:
    """An estimate for every measure; None for those that are not in `values`."""
    return {
        name: estimate(values[name], resamples=resamples, seed=seed) if name in values else None for name in MEASURES
    }


# --- chance -------------------------------------------------------------------------------------------------------


def chance(collection: Collection) -> dict[str, Floats]:
    """What every measure is expected to be for a random order of all documents, per query, in closed form."""
    names = measurable(len(collection.documents))
    values: dict[str, Floats] = {name: np.zeros(len(collection.queries)) for name in names}
    for i, (here, gone, own) in enumerate(
        zip(collection.relevant, collection.absent, collection.own, strict=True),
    ):
        candidates = len(collection.documents) - (own is not None)
        expected = expected_at_random(list(here.values()), list(gone.values()), candidates)
        for name in names:
            values[name][i] = expected[name]
    return values


def expected_at_random(grades: Sequence[int], absent: Sequence[int], candidates: int) -> dict[str, float]:
    """Expectations of all measures over the random orders of one query's candidates.

    Args:
        grades: of the relevant documents among the candidates.
        absent: of the relevant documents that cannot be found.
        candidates: documents that are ranked.
    """
    expected: dict[str, float] = {}
    for name, (kind, cutoff) in MEASURES.items():
        depth = min(cutoff, candidates)
        if kind.startswith("R@"):
            expected[name] = depth / candidates * len(grades) / (len(grades) + len(absent))
        elif kind.startswith("RR@"):
            expected[name] = _first_relevant(len(grades), candidates, depth)
        else:
            ideal = _gain(sorted([*grades, *absent], reverse=True)[:cutoff])
            expected[name] = _gain([sum(grades) / candidates] * depth) / ideal
    return expected


def _gain(grades: Sequence[float]) -> float:
    return math.fsum(grade / math.log2(rank + 1) for rank, grade in enumerate(grades, 1))


def _first_relevant(relevant: int, candidates: int, depth: int) -> float:
    """Expected reciprocal rank: the first relevant one is at rank r with the hypergeometric probability of a wait."""
    none_before, total = 1.0, 0.0
    for rank in range(1, depth + 1):
        left = candidates - rank + 1
        total += none_before * relevant / left / rank
        none_before *= (left - relevant) / left
    return total


# --- TREC runs ----------------------------------------------------------------------------------------------------


def _scored(collection: Collection, rankings: Sequence[Ranked]) -> Iterator[tuple[str, list[tuple[str, float]]]]:
    """Per query, ids and scores as every reader of a run will rank them."""
    for query, ranked in zip(collection.query_ids, rankings, strict=True):
        ids = (collection.document_ids[d] for d in ranked.documents)
        yield query, list(zip(ids, untied(ranked.scores), strict=True))


def untied(scores: Floats) -> list[float]:
    """Scores made strictly decreasing in single precision, each moved by as little as that takes.

    trec_eval reads scores in single precision and breaks ties by document id, which may be for us: the order we
    have chosen must be in the scores.

    Args:
        scores: never increasing.
    """
    found: list[float] = []
    lowest = np.float32(np.inf)
    for score in np.minimum(scores, np.finfo(np.float32).max).astype(np.float32):
        lowest = score if score < lowest else np.nextafter(lowest, np.float32(-np.inf))
        found.append(float(lowest))
    return found


def write_run(path: Path, collection: Collection, rankings: Sequence[Ranked], tag: str) -> None:
    """Write rankings as a TREC run (`query Q0 document rank score tag`), whole or not at all.

    Args:
        path: replaced if it is there.
        collection: what was searched.
        rankings: of its queries, in their order.
        tag: the system's name; white space becomes `-`.
    """
    label = "-".join(tag.split()) or "run"
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            for query, scored in _scored(collection, rankings):
                file.writelines(
                    f"{query} Q0 {document} {rank} {score!r} {label}\n"
                    for rank, (document, score) in enumerate(scored, 1)
                )
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise HeadscaleError(
            f"`{path}` cannot be written: {error.strerror or error}", "check the path, its permissions and the disk"
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink()
