"""The options that several commands share: one alias each, so that a flag means the same everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RUN_FOLDER = Path("headscale-runs")

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing but errors; the result is printed as ever.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Output = Annotated[Path | None, typer.Option("--output", "-o", metavar="FILE", help="Also write the JSON to FILE.")]
Run = Annotated[Path, typer.Option("--run", metavar="DIR", help="The run folder: finished results are kept there.")]
Force = Annotated[bool, typer.Option("--force", help="Measure again what the run folder already holds.")]
Ref = Annotated[
    str, typer.Option("--reference", metavar="NAME", help="An id, a directory or a profile to compare with.")
]
TextFile = Annotated[Path | None, typer.Option("--texts", metavar="FILE", help="Texts, one a line or JSONL.")]
PairFile = Annotated[
    str | None,
    typer.Option("--pairs", metavar="SOURCE", help="TSV, JSONL, parquet, a BEIR folder, hf:ID; or SOURCE[:N]."),
]
CollectionSource = Annotated[
    str | None,
    typer.Option("--collection", metavar="DIR", help="BEIR or NanoBEIR layout, or hf:ID; by default docstrings."),
]
CollectionSplit = Annotated[
    str | None,
    typer.Option("--split", help="Which judgements: DIR/qrels/SPLIT.tsv; by default test."),
]
Pooling = Annotated[
    str | None, typer.Option(metavar="HOW", help="Over positions, max or sum; by default the checkpoint's, else max.")
]
Activation = Annotated[
    str | None, typer.Option(metavar="HOW", help="relu or log1p_relu; by default the checkpoint's, else relu.")
]
Queries = Annotated[
    str | None,
    typer.Option(metavar="HOW", help="model, or inference-free: idf (of the collection) or idf:FILE (an idf.json)."),
]
Count = Annotated[int, typer.Option("--num-pairs", min=1, help="How many pairs to measure on.")]
QueryLength = Annotated[int, typer.Option(min=3, help="Tokens of a query, special ones included.")]
DocumentLength = Annotated[int, typer.Option(min=3, help="Tokens of a document, special ones included.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run a repository's own modelling code.")]
Device = Annotated[str, typer.Option(help="Where the model runs: cpu, cuda, mps.")]
Spectral = Annotated[bool, typer.Option("--spectral", help="Add singular values, spectral norm and stable rank.")]
WeightsOnly = Annotated[bool, typer.Option("--weights-only", help="Norms alone: reads the head, runs nothing.")]
Plot = Annotated[Path | None, typer.Option("--plot", metavar="FILE", help="Draw the result: .svg, .png or .pdf.")]

Recipe = Annotated[str, typer.Option(metavar="NAME", help="Of a full run: st-mnrl, naver-max, tevatron, v-splade...")]
Steps = Annotated[int | None, typer.Option(min=1, help="Steps to train; by default as many as the verdict needs.")]
Horizon = Annotated[int | None, typer.Option(min=1, help="Steps of the full run that these are the first of.")]
Compressed = Annotated[bool, typer.Option("--compressed", help="Fit warmup, decay and ramp into the steps instead.")]
LearningRate = Annotated[float | None, typer.Option("--lr", help="Peak learning rate; by default the recipe's.")]
Temperature = Annotated[float | None, typer.Option(help="Divides the scores; by default the recipe's.")]
LambdaQuery = Annotated[float | None, typer.Option(help="Weight of the queries' regularizer.")]
LambdaDocument = Annotated[float | None, typer.Option(help="Weight of the documents' regularizer.")]
BatchSize = Annotated[int | None, typer.Option(min=2, help="Queries per batch, each a negative of the others.")]
MicroBatch = Annotated[int | None, typer.Option(min=1, help="Texts that go through the model at once.")]
Negatives = Annotated[
    int | None, typer.Option(min=0, help="Hard negatives of each pair; by default the recipe's, where there are any.")
]
TrainQueryLength = Annotated[int | None, typer.Option("--query-length", min=3, help="Tokens of a query.")]
TrainDocumentLength = Annotated[int | None, typer.Option("--document-length", min=3, help="Tokens of a document.")]
Precision = Annotated[str, typer.Option(help="fp32, bf16 or fp16.")]
TrainDevice = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or mps.")]
TestPairs = Annotated[str | None, typer.Option("--test-pairs", metavar="SOURCE", help="Pairs to rank at the end.")]
Track = Annotated[
    str | None, typer.Option("--track", metavar="NAME", help="Also log steps to tensorboard, wandb or trackio.")
]
Candidates = Annotated[int, typer.Option(min=0, help="Pairs that are ranked at the end; 0: none.")]
