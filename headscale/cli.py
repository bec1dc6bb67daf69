"""The command line: parse, call, render, and nothing else. Each command imports what it needs when it runs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headscale import __version__
from headscale.errors import HeadscaleError, UsageError
from headscale.render import Voice, judged

if TYPE_CHECKING:
    from headscale.api import Loading
    from headscale.inspection import Texts
    from headscale.records import Profile

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Measure and calibrate the MLM-head scale of a backbone before training a SPLADE retriever on it.",
)
_state: dict[str, Any] = {"debug": False, "saved": None, "command": None}

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
PairFile = Annotated[Path | None, typer.Option("--pairs", metavar="FILE", help="Query-document pairs, TSV or JSONL.")]
Count = Annotated[int, typer.Option("--num-pairs", min=1, help="How many pairs to measure on.")]
QueryLength = Annotated[int, typer.Option(min=3, help="Tokens of a query, special ones included.")]
DocumentLength = Annotated[int, typer.Option(min=3, help="Tokens of a document, special ones included.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run a repository's own modelling code.")]
Device = Annotated[str, typer.Option(help="Where the model runs: cpu, cuda, mps.")]
Spectral = Annotated[bool, typer.Option("--spectral", help="Add singular values, spectral norm and stable rank.")]
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
Negatives = Annotated[int, typer.Option(min=0, help="Hard negatives taken from each pair.")]
TrainQueryLength = Annotated[int | None, typer.Option("--query-length", min=3, help="Tokens of a query.")]
TrainDocumentLength = Annotated[int | None, typer.Option("--document-length", min=3, help="Tokens of a document.")]
Precision = Annotated[str, typer.Option(help="fp32, bf16 or fp16.")]
TrainDevice = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or mps.")]
TestPairs = Annotated[Path | None, typer.Option("--test-pairs", metavar="FILE", help="Pairs to rank at the end.")]
Candidates = Annotated[int, typer.Option(min=0, help="Pairs that are ranked at the end; 0: none.")]

_RUN = Path("headscale-runs")


def main() -> None:
    """Run the program and leave with its exit code."""
    sys.exit(run())


def run(arguments: list[str] | None = None) -> int:
    """Run the program on arguments; returns the exit code (0, 1, 2, 3 or 130)."""
    arguments = sys.argv[1:] if arguments is None else arguments
    _state.update(debug=False, saved=None, command=arguments[0] if "--json" in arguments else None)
    try:
        code = app(args=arguments, standalone_mode=False)
    except typer.BadParameter as error:
        return _fail(UsageError(error.format_message().rstrip(".").replace("'", "`"), "see `headscale --help`"))
    except typer.Abort:
        return _interrupted()
    except KeyboardInterrupt:
        return _interrupted()
    except HeadscaleError as error:
        return _fail(error)
    except BrokenPipeError:  # `| head`: nothing to say, nobody to say it to
        with suppress(OSError):
            sys.stdout.close()
        return 0
    except Exception as error:
        return _unexpected(error)
    if code == 130:
        return _interrupted()
    return int(code or 0)


def _fail(error: HeadscaleError) -> int:
    if _state["debug"]:
        raise error
    voice = Voice(errors=[])
    voice.error(error)
    if _state["command"]:  # `--json` prints one object whatever happens
        from headscale.render import write_document

        write_document(_state["command"], [], voice.errors or [])
    return error.exit_code


def _unexpected(error: Exception) -> int:
    usage = getattr(error, "format_message", None)
    if usage is not None and hasattr(error, "exit_code"):  # typer's own usage errors
        message = str(usage()).rstrip(".")
        return _fail(UsageError(message[:1].lower() + message[1:], "see `headscale --help`"))
    if _state["debug"]:
        raise error
    kind = type(error).__name__
    return _fail(
        HeadscaleError(f"something unforeseen went wrong: {kind}: {error}", "run it again with `--debug` and report it")
    )


def _interrupted() -> int:
    saved = _state["saved"]
    where = f"what was finished is in `{saved}`; the same command goes on from there" if saved else "nothing was kept"
    print(f"\ninterrupted: {where}", file=sys.stderr)
    return 130


def _show_version(value: bool) -> None:
    if value:
        print(f"headscale {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    pass


@app.command()
def inspect(
    backbones: Annotated[list[str], typer.Argument(metavar="BACKBONE...", help="Hub ids or directories.")],
    reference: Ref = "bert-base-uncased",
    weights_only: Annotated[
        bool, typer.Option("--weights-only", help="Norms alone: reads the head, runs nothing.")
    ] = False,
    spectral: Spectral = False,
    texts: TextFile = None,
    pairs: PairFile = None,
    num_pairs: Count = 128,
    query_length: QueryLength = 32,
    document_length: DocumentLength = 128,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    device: Device = "cpu",
    check: Annotated[bool, typer.Option("--check", help="Leave with 1 unless every verdict is ok.")] = False,
    plot: Plot = None,
    output: Output = None,
    run_folder: Run = _RUN,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Measure MLM-head norms and output statistics against a reference."""
    voice = _begin(f"inspecting {', '.join(backbones)}", quiet, debug, run_folder)
    from headscale.api import find_reference, inspect_in_run
    from headscale.render import INSPECT_COLUMNS, inspect_rows, show, write_document

    chosen = None if weights_only else _read_texts(texts, pairs, num_pairs, query_length, document_length, voice)
    loading = _loading(voice, revision, trust_remote_code, device, spectral)
    with voice.progress(f"reference {reference}") as bar:
        profile = _reference(lambda: find_reference(reference, chosen, _watched(loading, bar)).profile, voice)
    found = []
    for name in backbones:
        with voice.progress(name) as bar:
            inspection = _try(
                lambda name=name, bar=bar: inspect_in_run(  # type: ignore[misc]
                    name,
                    chosen,
                    run_folder,
                    force=force,
                    is_reference=name == reference,
                    loading=_watched(loading, bar),
                ),
                voice,
                name,
            )
        if inspection is not None:
            found.append(inspection)
    for inspection in found:
        _explain(inspection, voice)
    if as_json:
        write_document("inspect", found, voice.errors or [])
    elif found:
        show(inspect_rows(found, profile), INSPECT_COLUMNS)
    if output is not None:
        write_document("inspect", found, voice.errors or [], output)
    if plot is not None and found:
        _draw(plot, "curves_of_constants", found)
    bad = check and any(i.verdict.word not in ("ok", "reference") for i in found)
    raise typer.Exit(3 if voice.errors else int(bad))


@app.command()
def calibrate(
    backbones: Annotated[
        list[str] | None,
        typer.Argument(metavar="[BACKBONE...]", help="By default those inspected before, else the bundled ones."),
    ] = None,
    reference: Ref = "bert-base-uncased",
    match: Annotated[
        str, typer.Option(help="auto, norm, activation, score, loss, constant or width.", metavar="TARGET")
    ] = "auto",
    norm: Annotated[str, typer.Option(help="Which norm `norm` matches.", metavar="NORM")] = "frobenius",
    activation: Annotated[str, typer.Option(help="What `activation` matches.", metavar="STATISTIC")] = "mean_weight",
    score: Annotated[str, typer.Option(help="What `score` matches.", metavar="STATISTIC")] = "score_sd",
    k: Annotated[float, typer.Option("--k", help="The constant is 1/K with `--match constant`.")] = 16.0,
    ceiling: Annotated[float, typer.Option(help="c of `loss`: the largest a with L(a) <= c ln N.")] = 1.25,
    snap: Annotated[bool, typer.Option("--snap/--no-snap", help="Round the constant to a power of two.")] = True,
    scale_bias: Annotated[bool, typer.Option("--scale-bias/--no-scale-bias", help="Scale the bias too.")] = True,
    shift: Annotated[
        bool, typer.Option("--shift", help="Also move the bias to the reference's share of active dims.")
    ] = False,
    head_lr_multiplier: Annotated[
        float, typer.Option(min=0.0, help="Of the head's learning rate; stored as advice.")
    ] = 1.0,
    save: Annotated[Path | None, typer.Option(metavar="DIR", help="Write the drop-in checkpoint, proven.")] = None,
    mode: Annotated[str, typer.Option(help="untie, fold or auto.", metavar="MODE")] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a checkpoint that is at DIR.")] = False,
    texts: TextFile = None,
    pairs: PairFile = None,
    num_pairs: Count = 128,
    query_length: QueryLength = 32,
    document_length: DocumentLength = 128,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    device: Device = "cpu",
    plot: Plot = None,
    output: Output = None,
    run_folder: Run = _RUN,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Pick the rescale constant that matches a reference, and write the drop-in checkpoint."""
    voice = _begin("calibrating", quiet, debug, run_folder)
    from headscale.api import calibrate_in_run, find_reference
    from headscale.calibration import Choice
    from headscale.render import show_targets, write_document
    from headscale.rescaling import MODES

    if mode not in MODES or mode == "logits":
        raise UsageError(f"`--mode {mode}` is none of untie, fold, auto", "see `headscale calibrate --help`")
    choice = Choice(match, norm, activation, score, k, ceiling, snap, scale_bias, shift, head_lr_multiplier)
    names = backbones or _default_backbones(run_folder, reference, voice)
    chosen = _read_texts(texts, pairs, num_pairs, query_length, document_length, voice)
    loading = _loading(voice, revision, trust_remote_code, device, norm == "spectral_norm")
    with voice.progress(f"reference {reference}") as bar:
        found_reference = find_reference(reference, chosen, _watched(loading, bar))
    found = []
    for name in names:
        target = None if save is None else (save if len(names) == 1 else save / name.replace("/", "--"))
        with voice.progress(name) as bar:
            calibration = _try(
                lambda name=name, target=target, bar=bar: calibrate_in_run(  # type: ignore[misc]
                    name,
                    chosen,
                    run_folder,
                    reference=found_reference,
                    choice=choice,
                    save=target,
                    mode=mode,
                    overwrite=overwrite,
                    loading=_watched(loading, bar),
                ),
                voice,
                name,
            )
        if calibration is not None:
            found.append(calibration)
    if as_json:
        write_document("calibrate", found, voice.errors or [])
    elif found:
        show_targets(found)
    if output is not None:
        write_document("calibrate", found, voice.errors or [], output)
    for calibration in found:
        _advise(calibration, voice)
    if plot is not None and found:
        _draw(plot, "curves_of_constants", found)
    unmatched = any(c.verdict.word != "matched" for c in found)
    raise typer.Exit(3 if voice.errors else int(unmatched))


@app.command()
def profile(
    backbone: Annotated[str, typer.Argument(metavar="BACKBONE", help="A hub id or a directory.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The profile, a small JSON file.")],
    texts: TextFile = None,
    pairs: PairFile = None,
    num_pairs: Count = 128,
    query_length: QueryLength = 32,
    document_length: DocumentLength = 128,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    device: Device = "cpu",
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Keep a reference's statistics as a small file, usable as `--reference`."""
    voice = _begin(f"measuring {backbone}", quiet, debug, None)
    if output.suffix != ".json":
        raise UsageError(f"`{output}` does not end in `.json`", hint=f"use `-o {output.with_suffix('.json')}`")
    from headscale.api import measure_by_name
    from headscale.profiles import profile_of, write_profile

    chosen = _read_texts(texts, pairs, num_pairs, query_length, document_length, voice)
    loading = _loading(voice, revision, trust_remote_code, device, True)
    with voice.progress(backbone) as bar:
        inspection = measure_by_name(backbone, chosen, _watched(loading, bar), is_reference=True)
    write_profile(profile_of(inspection), output)
    print(output)


@app.command()
def trial(
    backbone: Annotated[str, typer.Argument(metavar="BACKBONE", help="A hub id, a directory or bundled:NAME.")],
    scale: Annotated[str, typer.Option(metavar="SCALE", help="auto, none, or a constant: 0.0625 or 1/16.")] = "auto",
    reference: Ref = "bert-base-uncased",
    mode: Annotated[str, typer.Option(help="untie, fold or logits.", metavar="MODE")] = "untie",
    seeds: Annotated[int, typer.Option(min=1, help="Trainings of each arm, paired.")] = 1,
    control: Annotated[bool, typer.Option("--control/--no-control", help="Also train the untouched head.")] = True,
    full_length: Annotated[bool, typer.Option("--full-length", help="Go on when the verdict is certain.")] = False,
    recipe: Recipe = "st-mnrl",
    steps: Steps = None,
    horizon: Horizon = None,
    compressed: Compressed = False,
    lr: LearningRate = None,
    head_lr_multiplier: Annotated[
        float | None, typer.Option(help="Of the untied head's learning rate; by default the calibrated one.")
    ] = None,
    temperature: Temperature = None,
    lambda_query: LambdaQuery = None,
    lambda_document: LambdaDocument = None,
    batch_size: BatchSize = None,
    micro_batch: MicroBatch = None,
    negatives: Negatives = 0,
    query_length: TrainQueryLength = None,
    document_length: TrainDocumentLength = None,
    precision: Precision = "fp32",
    device: TrainDevice = "auto",
    pairs: PairFile = None,
    test_pairs: TestPairs = None,
    candidates: Candidates = 500,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    output: Output = None,
    run_folder: Run = _RUN,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Train the first steps of a full run, calibrated and untouched side by side, and say whether it would train."""
    voice = _begin(f"a trial of {backbone}", quiet, debug, run_folder)
    from headscale.render import TRIAL_COLUMNS, show, write_document
    from headscale.trial import (
        Bench,
        TextSource,
        arms_of,
        calibrated,
        configuration_of,
        lean,
        planned,
        result_of,
        run_cell,
        shown_steps,
    )

    changes = _changes(locals())
    source = TextSource(_name(pairs), _name(test_pairs), candidates=candidates)
    training = planned(recipe, changes, steps=steps, horizon=horizon, compressed=compressed)
    given = None if scale in ("auto", "none") else _constant(scale, "--scale")
    arms_of(training, given or 1.0, mode=mode)  # refuses what cannot be taken before anything is loaded
    bench = Bench(voice.note)
    bench.backbone(backbone, revision, trust_remote_code=trust_remote_code)
    corpus = bench.corpus(source)
    multiplier = head_lr_multiplier
    if scale == "auto":
        with voice.progress(f"calibrating {backbone}"):
            found = calibrated(backbone, bench, corpus, training, reference)
        given, multiplier = found.scale, multiplier or found.head_lr_multiplier
        voice.note(f"the constant is {given:g}, by {found.match}: {found.match_reason}")
    arms = arms_of(
        training, given, mode=mode, head_lr_multiplier=multiplier or 1.0,
        name="calibrated" if scale == "auto" else "given", control=control,
    )  # fmt: skip
    _announce(training, voice)
    cells: dict[str, list[Any]] = {arm.name: [] for arm in arms}
    for seed in range(seeds):
        for arm in arms:
            configuration = configuration_of(
                backbone, arm.training.replace(seed=seed), source, corpus, revision=revision,
                trust_remote_code=trust_remote_code, stop_early=not full_length,
            )  # fmt: skip
            with voice.progress(f"{arm.name}, seed {seed}") as bar:
                watch = shown_steps(bar, training.steps)
                cells[arm.name].append(run_cell(configuration, run_folder, bench=bench, on_step=watch, force=force))
    results = [result_of(backbone, arm, cells[arm.name]) for arm in arms]
    for result in results:
        _judged(result, voice)
    if as_json:
        write_document("trial", [lean(r) for r in results], voice.errors or [])
    else:
        show(results, TRIAL_COLUMNS)
    if output is not None:
        write_document("trial", [lean(r) for r in results], voice.errors or [], output)
    raise typer.Exit(int(results[0].verdict.word != "stable"))


@app.command()
def sweep(
    backbones: Annotated[list[str], typer.Argument(metavar="BACKBONE...", help="Hub ids, directories, bundled:NAME.")],
    scales: Annotated[str, typer.Option(metavar="LIST", help="Constants: auto, none, 1/16, 0.25.")] = "auto,none",
    reference: Ref = "bert-base-uncased",
    modes: Annotated[str, typer.Option(metavar="LIST", help="Of untie, fold, logits.")] = "untie",
    head_lr_multipliers: Annotated[str, typer.Option(metavar="LIST", help="Of the untied head.")] = "1",
    lrs: Annotated[str, typer.Option(metavar="LIST", help="Learning rates; by default the recipe's.")] = "",
    seeds: Annotated[int, typer.Option(min=1, help="Seeds of every cell: 0 to N-1.")] = 1,
    workers: Annotated[int, typer.Option(min=0, help="Processes; 0: this one.")] = 0,
    threads: Annotated[int, typer.Option(min=1, help="Threads of each process.")] = 1,
    recipe: Recipe = "st-mnrl",
    steps: Steps = None,
    horizon: Horizon = None,
    compressed: Compressed = False,
    temperature: Temperature = None,
    lambda_query: LambdaQuery = None,
    lambda_document: LambdaDocument = None,
    batch_size: BatchSize = None,
    micro_batch: MicroBatch = None,
    negatives: Negatives = 0,
    query_length: TrainQueryLength = None,
    document_length: TrainDocumentLength = None,
    precision: Precision = "fp32",
    device: TrainDevice = "auto",
    pairs: PairFile = None,
    test_pairs: TestPairs = None,
    candidates: Candidates = 500,
    trust_remote_code: Trust = False,
    output: Output = None,
    run_folder: Run = _RUN,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Train backbones x constants x modes x learning rates x seeds as independent, resumable cells."""
    voice = _begin(f"a sweep over {', '.join(backbones)}", quiet, debug, run_folder)
    from headscale import grid
    from headscale.render import SWEEP_COLUMNS, show, write_document
    from headscale.trial import Bench, TextSource, calibrated, configuration_of, planned

    changes = _changes(locals())
    source = TextSource(_name(pairs), _name(test_pairs), candidates=candidates)
    training = planned(recipe, changes, steps=steps, horizon=horizon, compressed=compressed)
    axes = grid.Axes(
        scales=(), modes=_listed(modes, "--modes"), seeds=tuple(range(seeds)),
        head_lr_multipliers=tuple(_constant(m, "--head-lr-multipliers") for m in _listed(head_lr_multipliers)),
        lrs=tuple(_constant(value, "--lrs") for value in _listed(lrs)),
    )  # fmt: skip
    axes.check()
    wanted = [s if s in ("auto", "none") else _constant(s, "--scales") for s in _listed(scales, "--scales")]
    bench = Bench(voice.note)
    corpus = bench.corpus(source)
    plan: list[dict[str, Any]] = []
    for name in backbones:

        def scaled(name: str = name) -> tuple[float | None, ...]:
            auto = calibrated(name, bench, corpus, training, reference).scale if "auto" in wanted else None
            values = {"auto": auto, "none": None}
            return tuple(values[w] if isinstance(w, str) else w for w in wanted)

        def planned_cells(name: str = name) -> list[dict[str, Any]]:
            own = axes.with_scales(scaled(name)).trainings(training)
            return [configuration_of(name, one, source, corpus, trust_remote_code=trust_remote_code) for one in own]

        plan += _try(planned_cells, voice, name) or []
    executor = grid.LocalProcesses(workers, threads) if workers else grid.InProcess(bench)
    todo = len(plan) if force else len(grid.pending(plan, run_folder))
    voice.note(f"{len(plan)} cells, {len(plan) - todo} of them finished already (`{run_folder}`)")
    failures = 0
    with voice.progress("sweep") as bar:
        for done, outcome in enumerate(grid.sweep(plan, run_folder, executor=executor, force=force), start=1):
            if outcome.status != "done":
                failures += 1
                voice.error(HeadscaleError(outcome.message, outcome.hint), outcome.configuration["backbone"])
            bar(done, todo, f"{failures} failed" if failures else "")
    rows = [grid.row_of(one, run_folder) for one in plan]
    if as_json:
        write_document("sweep", rows, voice.errors or [])
    elif rows:
        show(rows, SWEEP_COLUMNS)
    if output is not None:
        write_document("sweep", rows, voice.errors or [], output)
    raise typer.Exit(1 if failures else 3 if voice.errors else 0)


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A hub id, a directory or bundled:NAME.")],
    collection: Annotated[
        Path | None, typer.Option("--collection", metavar="DIR", help="In BEIR layout; by default built-in docstrings.")
    ] = None,
    split: Annotated[str, typer.Option(help="Which judgements: DIR/qrels/SPLIT.tsv.")] = "test",
    query_length: QueryLength = 256,
    document_length: DocumentLength = 256,
    mask_special_tokens: Annotated[
        bool, typer.Option("--mask-special-tokens", help="Leave special tokens out of the pooling.")
    ] = False,
    bm25: Annotated[bool, typer.Option("--bm25/--no-bm25", help="Add a row for BM25.")] = True,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts encoded at once.")] = 32,
    resamples: Annotated[int, typer.Option(min=1000, help="Of the queries, for the intervals.")] = 2000,
    seed: Annotated[int, typer.Option(min=0, help="Of the resampling.")] = 0,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    device: TrainDevice = "auto",
    output: Output = None,
    run_folder: Run = _RUN,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Measure retrieval effectiveness and sparsity on a collection, beside BM25 and chance."""
    voice = _begin(f"evaluating {model}", quiet, debug, run_folder)
    if collection is None and split != "test":
        raise UsageError(f"`--split {split}` needs `--collection DIR`", "the built-in collection has `test` alone")
    from headscale.collection import read_collection
    from headscale.evaluation import Setup, built_in, evaluate_in_run, require_packages
    from headscale.render import EVALUATE_COLUMNS, show, system_rows, write_document

    setup = Setup(query_length, document_length, batch_size, mask_special_tokens, bm25, resamples, seed)
    require_packages(setup)
    chosen = None if collection is None else read_collection(collection, split)
    from headscale.device import choose_device

    place = choose_device(device)
    loading = _loading(voice, revision, trust_remote_code, place.name, False)
    chosen = chosen or built_in(loading)
    voice.note(f"{len(chosen.queries)} queries, {len(chosen.documents)} documents ({chosen.name}) on {place.reason}")
    with voice.progress(f"encoding with {model}") as bar:
        found = evaluate_in_run(model, chosen, run_folder, setup=setup, force=force, loading=_watched(loading, bar))
    for warning in found.warnings:
        voice.warn(f"{model}: {warning}")
    if as_json:
        write_document("evaluate", [found], voice.errors or [])
    else:
        show(system_rows([found]), EVALUATE_COLUMNS)
    if output is not None:
        write_document("evaluate", [found], voice.errors or [], output)


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Where figure and results go.")] = Path(
        "headscale-demo"
    ),
    seeds: Annotated[int, typer.Option(min=1, max=10, help="Trainings of each arm, paired.")] = 1,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Show the whole story on the bundled backbones: offline, on a CPU, in minutes."""
    voice = _begin("the demo: inspect, calibrate and train the two bundled backbones", quiet, debug, output)
    from headscale.demo import run_demo

    raise typer.Exit(run_demo(output, voice, seeds=seeds, as_json=as_json))


@app.command()
def env(as_json: Json = False) -> None:
    """Print versions, device, cache and threads, for bug reports."""
    from headscale.environment import describe
    from headscale.render import full

    found = describe()
    if as_json:
        from headscale.render import write_document

        write_document("env", [found], [])
        return
    for name, value in found.items():
        print(f"{name}\t{full(value)}")


# --- what the commands share ---------------------------------------------------------------------------------------


def _begin(sentence: str, quiet: bool, debug: bool, saved: Path | None) -> Voice:
    """The first line, at once: what follows imports for seconds."""
    _state.update(debug=debug, saved=saved)
    voice = Voice(quiet=quiet, errors=[])
    voice.note(f"headscale {__version__}: {sentence}")
    return voice


def _loading(voice: Voice, revision: str | None, trust: bool, device: str, spectral: bool) -> Loading:
    from headscale.api import Loading

    return Loading(revision=revision, trust_remote_code=trust, device=device, spectral=spectral, tell=voice.note)


def _watched(loading: Loading, bar: Callable[[int, int], None]) -> Loading:
    from dataclasses import replace

    return replace(loading, on_batch=bar)


def _read_texts(
    texts: Path | None, pairs: Path | None, count: int, query_length: int, document_length: int, voice: Voice
) -> Texts:
    from headscale.activations import CANDIDATES, Encoding
    from headscale.inspection import built_in_texts, halves, texts_of
    from headscale.texts import read_pairs, read_texts

    if texts is not None and pairs is not None:
        raise UsageError("`--texts` and `--pairs` exclude each other", hint="give the one that holds your data")
    encoding = Encoding(query_length, document_length, CANDIDATES)
    if pairs is not None:
        return texts_of(read_pairs(pairs)[:count], str(pairs), encoding)
    if texts is not None:
        voice.note("plain texts: the first third of each asks for the rest of it")
        return texts_of(halves(read_texts(texts)[:count]), str(texts), encoding)
    return built_in_texts(
        pairs=count,
        query_length=query_length,
        document_length=document_length,
        tell=lambda name: voice.note(f"reading docstrings of {name}"),
    )


def _try(compute: Callable[[], Any], voice: Voice, subject: str) -> Any:
    """A result, or None with the error said: the other backbones still count."""
    try:
        return compute()
    except UsageError:
        raise
    except HeadscaleError as error:
        if _state["debug"]:
            raise
        voice.error(error, subject)
        return None


def _reference(find: Callable[[], Profile], voice: Voice) -> Profile | None:
    """The reference for a comparison; without one, the backbones are still measured."""
    try:
        return find()
    except UsageError:
        raise
    except HeadscaleError as error:
        voice.error(error, "reference")
        return None


def _explain(inspection: Any, voice: Voice) -> None:
    from headscale.diagnosis import causes

    voice.note(f"{inspection.name}: {judged(inspection.verdict)}")
    for cause in causes(inspection.verdict, inspection.output, inspection.vocabulary):
        voice.note(f"  {cause}")
    for warning in inspection.warnings:
        voice.warn(f"{inspection.name}: {warning}")


def _advise(calibration: Any, voice: Voice) -> None:
    voice.note(f"{calibration.name}: {judged(calibration.verdict)}")
    voice.note(f"  {calibration.match}: {calibration.match_reason}")
    lines = [calibration.disagreement, *calibration.advice]
    advice = calibration.lambda_advice
    if advice.query and advice.document:
        lines.append(f"multiply lambda by {advice.query:.3g} (queries) and {advice.document:.3g} (documents)")
    for line in lines:
        if line:
            voice.note(f"  {line}")
    if calibration.written is not None:
        for proof in calibration.written.proofs:
            voice.note(f"  proven with {proof.library}: largest error {proof.max_error:.1e} of the largest logit")
        voice.note(f"  saved to {calibration.written.directory} ({calibration.written.mode})")
    for warning in (*calibration.warnings, *(calibration.written.warnings if calibration.written else ())):
        voice.warn(f"{calibration.name}: {warning}")


def _default_backbones(run_folder: Path, reference: str, voice: Voice) -> list[str]:
    from headscale import bundled
    from headscale.api import inspected_names

    names = [n for n in inspected_names(run_folder) if n != reference]
    if names:
        voice.note(f"no backbone given: those inspected in `{run_folder}`: {', '.join(names)}")
        return names
    names = [f"{bundled.PREFIX}{n}" for n in bundled.names() if f"{bundled.PREFIX}{n}" != reference]
    voice.note(f"no backbone given, and none inspected yet: the bundled ones: {', '.join(names)}")
    return names


def _changes(options: dict[str, Any]) -> dict[str, Any]:
    """The fields of a recipe that options set."""
    names = ("lr", "temperature", "lambda_query", "lambda_document", "batch_size", "micro_batch", "negatives",
             "query_length", "document_length", "precision", "device")  # fmt: skip
    return {name: options[name] for name in names if options.get(name) is not None}


def _name(file: Path | None) -> str | None:
    return None if file is None else str(file)


def _listed(text: str, option: str = "") -> tuple[str, ...]:
    """The parts of a comma-separated option; one that must not be empty is named."""
    parts = tuple(part.strip() for part in text.split(",") if part.strip())
    if option and not parts:
        raise UsageError(f"`{option}` is empty", "give values separated by commas")
    return parts


def _constant(text: str, option: str) -> float:
    """A number above zero, also written as a fraction: 1/16."""
    import math
    from fractions import Fraction

    try:
        value = float(Fraction(text)) if "/" in text else float(text)
    except (ValueError, ZeroDivisionError):
        value = math.nan
    if not 0 < value < math.inf:
        raise UsageError(f"`{option} {text}` is not a number above zero", "write it as 0.0625 or 1/16")
    return value


def _announce(training: Any, voice: Voice) -> None:
    from headscale.device import choose_device
    from headscale.verdict import Clock

    choice = choose_device(training.device, precision=training.precision)
    share = Clock(training).share(training.steps)
    kind = "a whole schedule in" if training.compressed else f"of {training.horizon:,} steps, the first"
    voice.note(f"{kind} {training.steps:,}: {share:.0%} of the summed learning rate")
    voice.note(f"device {choice.name}: {choice.reason}")


def _judged(result: Any, voice: Voice) -> None:
    verdict = result.verdict
    when = f"decided after {verdict.step} steps, {verdict.lr_share:.0%} of the summed learning rate"
    limit = "" if verdict.threshold is None else f", threshold {verdict.threshold:.3g}"
    voice.note(f"{result.arm}: {verdict.word}: {verdict.evidence} (rule `{verdict.rule}`{limit}; {when})")


def _draw(path: Path, figure: str, found: list[Any]) -> None:
    from headscale import figures

    figures.save(getattr(figures, figure)(found), path)
