"""The command that encodes a collection for a search engine: `encode`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from headscale.options import (
    Activation,
    CollectionSource,
    CollectionSplit,
    Debug,
    DocumentLength,
    Json,
    Pooling,
    Queries,
    QueryLength,
    Quiet,
    Revision,
    TrainDevice,
    Trust,
)
from headscale.shell import app, begin, loading_with


@app.command()
def encode(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A hub id, a directory or bundled:NAME.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Where the files go: empty or new.")],
    kind: Annotated[
        str, typer.Option("--format", metavar="NAME", help="jsonl, anserini, opensearch, opensearch-ann or seismic.")
    ] = "jsonl",
    collection: CollectionSource = None,
    split: CollectionSplit = None,
    quantize: Annotated[
        str, typer.Option(metavar="HOW", help="Whole numbers: x100 (as anserini has it anyway), or bits: 8.")
    ] = "",
    index: Annotated[str, typer.Option(metavar="NAME", help="Of the OpenSearch index.")] = "headscale",
    query_length: QueryLength = 256,
    document_length: DocumentLength = 256,
    mask_special_tokens: Annotated[
        bool, typer.Option("--mask-special-tokens", help="Leave special tokens out of the pooling.")
    ] = False,
    pooling: Pooling = None,
    activation: Activation = None,
    queries: Queries = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts encoded at once.")] = 32,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    device: TrainDevice = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Encode a collection for a search engine.

    Documents and queries as sparse vectors, for Seismic, Anserini, Pyserini and OpenSearch, or as plain JSON lines.
    """
    voice = begin(f"encoding with {model}", quiet, debug, output.parent)
    from headscale.collection import chosen_collection
    from headscale.deployment import check_options, deployment_of
    from headscale.device import choose_device
    from headscale.evaluation import Setup, built_in, fitting
    from headscale.impacts import one_rounding
    from headscale.indexes import check_target, export, usual_rounding
    from headscale.render import Column, show, write_document

    check_target(kind, output)
    check_options(pooling, activation, queries)
    rounding = one_rounding(quantize) or usual_rounding(kind)
    chosen = chosen_collection(collection, split)
    place = choose_device(device)
    loading = loading_with(voice, revision, trust_remote_code, place.name, False)
    chosen = chosen or built_in(loading)
    setup = Setup(
        query_length, document_length, batch_size, mask_special_tokens, pooling=pooling, activation=activation,
        queries=queries,
    )  # fmt: skip
    backbone = loading.open(model)
    setup, warnings = fitting(backbone, setup)
    voice.note(f"{len(chosen.queries)} queries, {len(chosen.documents)} documents ({chosen.name}) on {place.reason}")
    with voice.progress(f"encoding with {model}") as bar:
        plan = deployment_of(backbone, chosen, setup)
        found = export(plan, model, chosen, output, kind=kind, rounding=rounding, index=index, on_batch=bar)
    if found.empty:
        warnings.append(f"{found.empty} documents have no active term: no index finds them")
    if found.impacts is not None and found.impacts.word != "kept":
        lost = found.impacts
        warnings.append(
            f"{lost.word}: rounding took {lost.lost_document:.1%} of the documents' weights and"
            f" {lost.lost_query:.1%} of the queries'"
        )
    for warning in warnings:
        voice.warn(f"{model}: {warning}")
    if as_json:
        write_document("encode", [found], voice.errors or [])
        return
    columns = (
        Column("file", lambda file: str(output / file)),
        Column("size [bytes]", lambda file: found.files[file]),
    )
    show(list(found.files), columns)
