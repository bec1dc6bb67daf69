"""`evaluate`: a model on a collection, with BM25 and chance beside it, and the runs in the TREC format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headscale import __version__, cells
from headscale.api import Loading, identity
from headscale.collection import Collection, builtin_collection
from headscale.effectiveness import (
    MEASURES,
    RESAMPLES,
    Floats,
    Ranked,
    chance,
    estimates,
    per_query,
    require,
    write_run,
)
from headscale.errors import UnsupportedHeadError
from headscale.profiles import from_dict
from headscale.records import CollectionSummary, Estimate, Evaluation, SystemResult

if TYPE_CHECKING:
    from headscale.backbone import Backbone
    from headscale.search import Searched

KIND = "evaluate"
BM25, CHANCE = "BM25", "chance"
MODEL_RUN, BM25_RUN = "model.trec", "bm25.trec"

# Memory that BM25 takes per character of the collection: words, postings and their weights. Measured: 4.1 to 4.2.
_BM25_RATIO = 4.5


@dataclass(frozen=True)
class Setup:
    """How a collection is searched and measured.

    Args:
        query_length, document_length: in tokens, special ones included; less where the model takes less. The
            default is that of the recipes of sentence-transformers and naver.
        batch_size: texts encoded at once; changes nothing but rounding.
        mask_special_tokens: leave their positions out of the pooling, for models trained so.
        bm25: add a row for BM25.
        resamples: of the queries, for the intervals.
        seed: of the resampling.
    """

    query_length: int = 256
    document_length: int = 256
    batch_size: int = 32
    mask_special_tokens: bool = False
    bm25: bool = True
    resamples: int = RESAMPLES
    seed: int = 0


def evaluate(
    model: Any,
    tokenizer: Any = None,
    *,
    collection: Collection | None = None,
    setup: Setup | None = None,
    runs: str | Path | None = None,
    loading: Loading | None = None,
) -> Evaluation:
    """Rank a collection with a model, exactly, and measure how well and how sparsely it does.

    Args:
        model: a hub id, a directory, `bundled:NAME`, or a loaded model (then with its tokenizer).
        tokenizer: of a loaded model.
        collection: from `headscale.collection.read_collection`; the built-in docstrings of the test split by default.
        setup: lengths, batches, resampling.
        runs: a folder for the rankings in the TREC format.
        loading: how models are opened.

    Returns:
        the model, BM25 and chance, each with nDCG@10, MRR@10 and recall, with 95 % intervals over queries.

    Raises:
        HeadscaleError: the model, or a package that this needs, is missing, or memory is.
    """
    from headscale.backbone import handed_over

    loading, setup = loading or Loading(), setup or Setup()
    require_packages(setup)
    chosen = collection or built_in(loading)
    by_name = isinstance(model, str | Path)
    backbone = loading.open(model) if by_name else handed_over(model, tokenizer)
    evaluation, rankings = _evaluated(backbone, chosen, setup, loading)
    return evaluation if runs is None else _saved(evaluation, rankings, chosen, Path(runs))


def evaluate_in_run(
    name: str, collection: Collection, run: Path, *, setup: Setup, force: bool = False, loading: Loading
) -> Evaluation:
    """`evaluate` through the run folder: reuse a finished cell of the same inputs, else compute and keep it."""
    configuration = {
        "name": name,
        "identity": identity(name, loading.revision),
        "collection": [collection.name, collection.split, collection.fingerprint],
        "setup": {key: value for key, value in asdict(setup).items() if key != "batch_size"},
        "headscale": __version__,
    }
    folder = cells.cell_folder(run, KIND, name, cells.cell_key(configuration))
    kept = None if force else _kept(folder, configuration)
    if kept is not None:
        loading.say(f"`{name}`: reusing `{folder}` (`--force` evaluates again)")
        return kept
    require_packages(setup)
    evaluation, rankings = _evaluated(loading.open(name), collection, setup, loading)
    evaluation = _saved(evaluation, rankings, collection, folder)
    cells.write_cell(folder, KIND, configuration, evaluation.to_dict())
    loading.say(f"`{name}`: the rankings are in `{folder}`")
    return evaluation


def built_in(loading: Loading) -> Collection:
    """The built-in collection; what is read is told."""
    return builtin_collection(tell=lambda name: loading.say(f"reading docstrings of {name}"))


def require_packages(setup: Setup) -> None:
    """Say that packages of the extra `eval` are missing before anything is computed."""
    require("ir_measures", "evaluation")
    if setup.bm25:
        from headscale.bm25 import require_bm25

        require_bm25()


def summary(collection: Collection) -> CollectionSummary:
    """A collection in numbers."""
    return CollectionSummary(
        name=collection.name,
        split=collection.split,
        fingerprint=collection.fingerprint,
        documents=len(collection.documents),
        queries=len(collection.queries),
        judgements=collection.judgements,
        absent=sum(map(len, collection.absent)),
        left_out=collection.left_out,
    )


# --- the rows -----------------------------------------------------------------------------------------------------


def _evaluated(
    backbone: Backbone, collection: Collection, setup: Setup, loading: Loading
) -> tuple[Evaluation, dict[str, list[Ranked]]]:
    """The record, and the rankings by the name of their file."""
    from headscale.encoder import SpladeEncoder
    from headscale.search import search

    check_pooling(backbone)
    setup, warnings = _fitting(backbone, setup)
    warnings += [*backbone.warnings, *_remarks(collection)]
    rows, rankings = [], {}
    if setup.bm25 and (row := _bm25(collection, setup, warnings)):
        rows, rankings = [row[0]], {BM25_RUN: row[1]}
    encoder = SpladeEncoder(backbone.loaded, backbone.tokenizer, mask_special_tokens=setup.mask_special_tokens)
    found = search(
        encoder, collection, query_length=setup.query_length, document_length=setup.document_length,
        batch_size=setup.batch_size, on_batch=loading.on_batch,
    )  # fmt: skip
    note = f"max-pooled, queries of {setup.query_length} and documents of {setup.document_length} tokens"
    own = _row(backbone.name, note, per_query(collection, found.rankings), setup, found)
    for side, kind in ((own.query, "queries"), (own.document, "documents")):
        if side is not None and side.non_finite:
            warnings.append(f"{side.non_finite} of {side.texts} {kind} have weights that are not finite")
    evaluation = Evaluation(
        name=backbone.name,
        revision=backbone.revision,
        collection=summary(collection),
        query_length=setup.query_length,
        document_length=setup.document_length,
        mask_special_tokens=setup.mask_special_tokens,
        resamples=setup.resamples,
        seed=setup.seed,
        systems=(own, *rows, _chance(collection)),
        warnings=tuple(warnings),
    )
    return evaluation, {MODEL_RUN: found.rankings, **rankings}


def _row(system: str, note: str, values: Mapping[str, Floats], setup: Setup, found: Searched) -> SystemResult:
    return _system(system, note, estimates(values, resamples=setup.resamples, seed=setup.seed), found)


def _system(system: str, note: str, metrics: Mapping[str, Estimate | None], found: Searched | None) -> SystemResult:
    from headscale.search import flops_cost

    return SystemResult(
        system=system,
        note=note,
        ndcg_at_10=metrics["ndcg_at_10"],
        mrr_at_10=metrics["mrr_at_10"],
        recall_at_100=metrics["recall_at_100"],
        recall_at_1000=metrics["recall_at_1000"],
        query=found.queries.sparsity() if found else None,
        document=found.documents.sparsity() if found else None,
        flops_cost=flops_cost(found.queries, found.documents) if found else None,
        retrieved=sum(len(one.documents) for one in found.rankings) / len(found.rankings) if found else None,
    )


def _bm25(collection: Collection, setup: Setup, warnings: list[str]) -> tuple[SystemResult, list[Ranked]] | None:
    from headscale.bm25 import NOTE, search_bm25
    from headscale.memory import available_memory

    needed, available = _BM25_RATIO * sum(map(len, collection.documents)), available_memory()
    if available is not None and needed > available:
        warnings.append(
            f"no BM25 row: it needs about {needed / 2**30:.1f} GiB, and {available / 2**30:.1f} GiB are free"
        )
        return None
    found = search_bm25(collection)
    return _row(BM25, NOTE, per_query(collection, found.rankings), setup, found), found.rankings


def _chance(collection: Collection) -> SystemResult:
    """Expectations need no interval: they are exact."""
    values = chance(collection)
    expected = {
        name: Estimate(float(values[name].mean()), None, None, None) if name in values else None for name in MEASURES
    }
    return _system(CHANCE, "expected for a random order", expected, None)


# --- a model that evaluation can speak for ------------------------------------------------------------------------


def check_pooling(backbone: Backbone) -> None:
    """Refuse a sparse encoder whose own modules would pool otherwise than evaluation does.

    Raises:
        UnsupportedHeadError: it routes queries and documents apart, or does not pool by max over log1p(relu).
    """
    found = _modules(backbone.directory)
    if found is None:
        return
    root, modules = found
    kinds = {str(module.get("type", "")).rpartition(".")[2]: str(module.get("path", "")) for module in modules}
    if "Router" in kinds:
        raise UnsupportedHeadError(
            f"`{backbone.name}` encodes queries and documents by different routes, and evaluation knows one",
            "evaluate it with sentence-transformers' SparseInformationRetrievalEvaluator",
        )
    if "SpladePooling" not in kinds:
        return
    from headscale.files import load_json

    file = root / kinds["SpladePooling"] / "config.json"
    config = load_json(file, str(file)) if file.is_file() else {}
    settings = [config.get("pooling_strategy", "max"), config.get("activation_function", "relu")]
    if settings != ["max", "relu"]:
        raise UnsupportedHeadError(
            f"`{backbone.name}` pools by `{settings[0]}` after `{settings[1]}`, and evaluation by `max` after `relu`",
            "evaluate it with sentence-transformers' SparseInformationRetrievalEvaluator",
        )


def _modules(directory: Path | None) -> tuple[Path, list[dict[str, Any]]] | None:
    """The root and the modules of the sentence-transformers checkpoint that a model's folder belongs to."""
    from headscale.files import LocalFiles, load_json, model_folder

    if directory is None:
        return None
    for root in (directory, *directory.parents[:2]):
        if (root / "modules.json").is_file() and root / model_folder(LocalFiles(root)) == directory:
            return root, load_json(root / "modules.json", str(root / "modules.json"))
    return None


def longest(backbone: Backbone) -> int | None:
    """Tokens that the model has positions for; None where nothing says so."""
    limits = [int(backbone.tokenizer.model_max_length), getattr(backbone.model.config, "max_position_embeddings", None)]
    for name, module in backbone.model.named_modules():
        if name.endswith("position_embeddings") and hasattr(module, "num_embeddings"):
            padding = getattr(module, "padding_idx", None)  # RoBERTa counts positions from there
            limits.append(module.num_embeddings - (0 if padding is None else padding + 1))
    known = [limit for limit in limits if isinstance(limit, int) and 0 < limit < 10**9]
    return min(known, default=None)


def _fitting(backbone: Backbone, setup: Setup) -> tuple[Setup, list[str]]:
    limit = longest(backbone)
    if limit is None or max(setup.query_length, setup.document_length) <= limit:
        return setup, []
    query, document = min(setup.query_length, limit), min(setup.document_length, limit)
    fitting = replace(setup, query_length=query, document_length=document)
    return fitting, [f"`{backbone.name}` takes {limit} tokens: longer texts are cut there"]


def _remarks(collection: Collection) -> list[str]:
    """What a reader of the numbers should know of the collection."""
    absent, own = sum(map(len, collection.absent)), sum(one is not None for one in collection.own)
    said = {
        f"{absent} relevant documents are not in the collection: they count as never found": absent,
        f"{own} queries are documents of the collection themselves, which are not ranked for them": own,
        f"{collection.left_out} queries have no relevant document: they are left out": collection.left_out,
    }
    return [sentence for sentence, count in said.items() if count]


# --- what is kept -------------------------------------------------------------------------------------------------


def _saved(
    evaluation: Evaluation, rankings: Mapping[str, list[Ranked]], collection: Collection, folder: Path
) -> Evaluation:
    """Write the runs, and name their files in the record."""
    model, *others = evaluation.systems
    saved = [replace(model, run=MODEL_RUN)]
    saved += [replace(other, run=BM25_RUN) if other.system == BM25 else other for other in others]
    for system in saved:
        if system.run:
            write_run(folder / system.run, collection, rankings[system.run], system.system)
    return replace(evaluation, systems=tuple(saved))


def _kept(folder: Path, configuration: dict[str, Any]) -> Evaluation | None:
    """The evaluation of a finished cell whose runs are all there."""
    result = cells.finished(folder, configuration)
    try:
        found = None if result is None else from_dict(Evaluation, result)
    except ValueError:
        return None
    if found is None or not all((folder / system.run).is_file() for system in found.systems if system.run):
        return None
    return found
