"""`evaluate`: a model on a collection, with BM25 and chance beside it, and the runs in the TREC format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
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
from headscale.profiles import from_dict
from headscale.records import CollectionSummary, Estimate, Evaluation, SystemResult

if TYPE_CHECKING:
    from headscale.backbone import Backbone
    from headscale.deployment import Deployment
    from headscale.search import Searched

KIND = "evaluate"
BM25, CHANCE = "BM25", "chance"
MODEL_RUN, BM25_RUN = "model.trec", "bm25.trec"
SHARDS = "encoded"  # of documents, in the cell's folder until it is finished

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
        pooling: over positions, `max` or `sum`; None: as the checkpoint says, else `max`.
        activation: inside log1p, `relu` or `log1p_relu`; None likewise.
        queries: `model`, `idf` (a table made from the collection) or `idf:FILE`; None: as the checkpoint says, else
            `model`.
        quantize: a row more for each of these roundings of the weights: `x100`, or a number of bits.
    """

    query_length: int = 256
    document_length: int = 256
    batch_size: int = 32
    mask_special_tokens: bool = False
    bm25: bool = True
    resamples: int = RESAMPLES
    seed: int = 0
    pooling: str | None = None
    activation: str | None = None
    queries: str | None = None
    quantize: tuple[str, ...] = ()


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
    with TemporaryDirectory() as folder:
        kept = Path(folder) / SHARDS if setup.quantize else None
        evaluation, rankings = _evaluated(backbone, chosen, setup, loading, kept)
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
        "table": _table_identity(setup),
        "headscale": __version__,
    }
    folder = cells.cell_folder(run, KIND, name, cells.cell_key(configuration))
    kept = None if force else _kept(folder, configuration)
    if kept is not None:
        loading.say(f"`{name}`: reusing `{folder}` (`--force` evaluates again)")
        return kept
    require_packages(setup)
    evaluation, rankings = _evaluated(loading.open(name), collection, setup, loading, folder / SHARDS)
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
    backbone: Backbone, collection: Collection, setup: Setup, loading: Loading, folder: Path | None = None
) -> tuple[Evaluation, dict[str, list[Ranked]]]:
    """The record, and the rankings by the name of their file."""
    from headscale.deployment import deployment_of, interactions
    from headscale.search import search_rounded

    setup, cut = fitting(backbone, setup)
    plan = deployment_of(backbone, collection, setup)
    warnings = [*cut, *backbone.warnings, *_remarks(collection)]
    bm25 = _bm25(collection, setup, warnings) if setup.bm25 else None
    if folder is not None and folder.is_dir():
        loading.say(f"`{backbone.name}`: going on with the documents encoded before")
    found = search_rounded(
        plan.encoder, collection, query_length=setup.query_length, document_length=setup.document_length,
        batch_size=setup.batch_size, query_encoder=plan.queries, roundings=plan.roundings, folder=folder,
        on_batch=loading.on_batch,
    )  # fmt: skip
    rows = [_model_row(backbone.name, plan, one, collection) for one in found]
    warnings += _non_finite(rows[0])
    warnings += interactions(plan, [row.impacts for row in rows])
    evaluation = Evaluation(
        name=backbone.name,
        revision=backbone.revision,
        collection=summary(collection),
        query_length=setup.query_length,
        document_length=setup.document_length,
        mask_special_tokens=setup.mask_special_tokens,
        resamples=setup.resamples,
        seed=setup.seed,
        systems=(*rows, *([bm25[0]] if bm25 else []), _chance(collection)),
        warnings=tuple(warnings),
        pooling=plan.encoder.pooling,
        activation=plan.encoder.activation,
        queries="model" if plan.queries is None else plan.queries.origin,
    )
    rankings = {run_name(row): one.rankings for row, one in zip(rows, found, strict=True)}
    return evaluation, {**rankings, **({BM25_RUN: bm25[1]} if bm25 else {})}


def _table_identity(setup: Setup) -> Any:
    """Size and time of the file that holds the query weights."""
    file = Path((setup.queries or "").removeprefix("idf:"))
    return [file.stat().st_size, file.stat().st_mtime_ns] if setup.queries and file.is_file() else None


def _model_row(name: str, plan: Deployment, found: Searched, collection: Collection) -> SystemResult:
    setup, encoder = plan.setup, plan.encoder
    activation = "" if encoder.activation == "relu" else f" {encoder.activation},"
    asked = f"queries of {setup.query_length}" if plan.queries is None else f"queries by {plan.queries.origin}"
    note = f"{encoder.pooling}-pooled,{activation} {asked} and documents of {setup.document_length} tokens"
    values = per_query(collection, found.rankings)
    if found.impacts is None:
        return _row(name, note, values, setup, found)
    rounding = next(one for one in plan.roundings if one.name == found.impacts.rounding)
    label = f"{name} ({rounding.name if rounding.bits is None else f'{rounding.bits} bit'})"
    return replace(_row(label, f"{note}, {rounding.note}", values, setup, found), impacts=found.impacts)


def run_name(row: SystemResult) -> str:
    """The file of a model's ranking in the TREC format."""
    return MODEL_RUN if row.impacts is None else f"model-{row.impacts.rounding}.trec"


def _non_finite(row: SystemResult) -> list[str]:
    return [
        f"{side.non_finite} of {side.texts} {kind} have weights that are not finite"
        for side, kind in ((row.query, "queries"), (row.document, "documents"))
        if side is not None and side.non_finite
    ]


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


# --- what a reader should know ------------------------------------------------------------------------------------


def longest(backbone: Backbone) -> int | None:
    """Tokens that the model has positions for; None where nothing says so."""
    limits = [int(backbone.tokenizer.model_max_length), getattr(backbone.model.config, "max_position_embeddings", None)]
    for name, module in backbone.model.named_modules():
        if name.endswith("position_embeddings") and hasattr(module, "num_embeddings"):
            padding = getattr(module, "padding_idx", None)  # RoBERTa counts positions from there
            limits.append(module.num_embeddings - (0 if padding is None else padding + 1))
    known = [limit for limit in limits if isinstance(limit, int) and 0 < limit < 10**9]
    return min(known, default=None)


def fitting(backbone: Backbone, setup: Setup) -> tuple[Setup, list[str]]:
    """Lengths that the model takes, and what to say where they are not those asked for."""
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
    files = {BM25: BM25_RUN, CHANCE: None}
    saved = [replace(one, run=files.get(one.system, run_name(one))) for one in evaluation.systems]
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
