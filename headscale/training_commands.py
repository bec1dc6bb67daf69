"""The commands that train and evaluate: `trial`, `sweep`, `evaluate`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from headscale.environment import launched_processes
from headscale.errors import HeadscaleError, UsageError
from headscale.options import (
    RUN_FOLDER,
    Activation,
    BatchSize,
    Candidates,
    CollectionSource,
    CollectionSplit,
    Compressed,
    Debug,
    DocumentLength,
    Force,
    Horizon,
    Json,
    LambdaDocument,
    LambdaQuery,
    LearningRate,
    MicroBatch,
    Negatives,
    Output,
    PairFile,
    Pooling,
    Precision,
    Queries,
    QueryLength,
    Quiet,
    Recipe,
    Ref,
    Revision,
    Run,
    Steps,
    Temperature,
    TestPairs,
    Track,
    TrainDevice,
    TrainDocumentLength,
    TrainQueryLength,
    Trust,
)
from headscale.render import Voice
from headscale.shell import app, attempt, begin, loading_with, state, watched


@app.command()
def trial(
    backbone: Annotated[str, typer.Argument(metavar="BACKBONE", help="A hub id, a directory or bundled:NAME.")],
    scale: Annotated[str, typer.Option(metavar="SCALE", help="auto, none, or a constant: 0.0625 or 1/16.")] = "auto",
    reference: Ref = "bert-base-uncased",
    mode: Annotated[str, typer.Option(help="untie, fold or logits.", metavar="MODE")] = "untie",
    shift: Annotated[
        float | None, typer.Option(help="Added to the logits before the scale; by default the calibrated one.")
    ] = None,
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
    negatives: Negatives = None,
    query_length: TrainQueryLength = None,
    document_length: TrainDocumentLength = None,
    precision: Precision = "fp32",
    device: TrainDevice = "auto",
    pairs: PairFile = None,
    test_pairs: TestPairs = None,
    candidates: Candidates = 500,
    save_model: Annotated[
        Path | None, typer.Option("--save-model", metavar="DIR", help="Keep the judged arm's model of seed 0.")
    ] = None,
    track: Track = None,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    output: Output = None,
    run_folder: Run = RUN_FOLDER,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Train the first steps, give a verdict.

    Calibrated and untouched head side by side, as the first steps of a full run: would it train?
    """
    voice = begin(f"a trial of {backbone}", quiet, debug, run_folder)
    from headscale.api import Loading
    from headscale.arms import Plan, run_trial
    from headscale.distributed import launched
    from headscale.interop.tracking import check_backend
    from headscale.render import TRIAL_COLUMNS, show, write_document
    from headscale.trials import Bench, TextSource, lean, negatives_of, planned

    source = TextSource(pairs, test_pairs, candidates=candidates)
    training = planned(recipe, _changes(locals()), steps=steps, horizon=horizon, compressed=compressed)
    plan = Plan(
        training, scale=_scale(scale), mode=mode, shift=shift,
        head_lr_multiplier=head_lr_multiplier, reference=reference, seeds=seeds, control=control,
        stop_early=not full_length,
    )  # fmt: skip
    if track is not None:
        check_backend(track)
    # Up to here nothing is loaded: what cannot be taken has been refused.
    training = training.replace(negatives=negatives_of(recipe, negatives, source))
    keeping = None if save_model is None else _keeping(save_model, mode if scale != "none" else "none", voice)
    loading = Loading(revision=revision, trust_remote_code=trust_remote_code)
    with launched(device) as team, _said_once(team):
        _announce(training, voice, team.size)
        results = run_trial(
            backbone, replace(plan, training=training), source, run_folder,
            bench=Bench(voice.note, team=team, track=track), loading=loading,
            watch=lambda arm, seed: _steps_shown(voice, f"{arm}, seed {seed}", training.steps),
            on_trained=keeping, force=force,
        )  # fmt: skip
    if not team.is_first:  # the first one's exit code counts; a launcher would end it where another left with one
        raise typer.Exit(0)
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
    scales: Annotated[
        str, typer.Option(metavar="LIST", help="Constants: auto (without a shift), none, 1/16, 0.25.")
    ] = "auto,none",
    shifts: Annotated[
        str, typer.Option(metavar="LIST", help="Added to the logits first: numbers, or auto, the calibrated one.")
    ] = "0",
    reference: Ref = "bert-base-uncased",
    modes: Annotated[str, typer.Option(metavar="LIST", help="Of untie, fold, logits.")] = "untie",
    head_lr_multipliers: Annotated[str, typer.Option(metavar="LIST", help="Of the untied head.")] = "1",
    lrs: Annotated[str, typer.Option(metavar="LIST", help="Learning rates; by default the recipe's.")] = "",
    seeds: Annotated[int, typer.Option(min=1, help="Seeds of every cell: 0 to N-1.")] = 1,
    workers: Annotated[int, typer.Option(min=0, help="Processes; 0: this one.")] = 0,
    threads: Annotated[int, typer.Option(min=1, help="Threads of each cell.")] = 1,
    ray: Annotated[
        str | None, typer.Option("--ray", metavar="ADDRESS", help="Of a Ray cluster; auto, or local for this machine.")
    ] = None,
    gpus_per_cell: Annotated[float, typer.Option(min=0, help="That Ray sets aside for each cell; 0.5 shares one.")] = 0,
    recipe: Recipe = "st-mnrl",
    steps: Steps = None,
    horizon: Horizon = None,
    compressed: Compressed = False,
    temperature: Temperature = None,
    lambda_query: LambdaQuery = None,
    lambda_document: LambdaDocument = None,
    batch_size: BatchSize = None,
    micro_batch: MicroBatch = None,
    negatives: Negatives = None,
    query_length: TrainQueryLength = None,
    document_length: TrainDocumentLength = None,
    precision: Precision = "fp32",
    device: TrainDevice = "auto",
    pairs: PairFile = None,
    test_pairs: TestPairs = None,
    candidates: Candidates = 500,
    track: Track = None,
    trust_remote_code: Trust = False,
    output: Output = None,
    run_folder: Run = RUN_FOLDER,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Train a grid of cells, resumable.

    Backbones x constants x shifts x modes x learning rates x seeds, each an independent cell.
    """
    if launched_processes() > 1:
        raise UsageError(
            "a sweep spreads its cells itself, and cannot share them with processes of `torchrun`",
            "start it alone, with `--workers N`",
        )
    voice = begin(f"a sweep over {', '.join(backbones)}", quiet, debug, run_folder)
    from headscale import grid
    from headscale.cluster import RayCluster, require_ray
    from headscale.interop.tracking import check_backend, track_cell
    from headscale.live import Logs
    from headscale.render import SWEEP_COLUMNS, show, write_document
    from headscale.trials import Bench, TextSource, calibrated, configuration_of, folder_of, negatives_of, planned

    source = TextSource(pairs, test_pairs, candidates=candidates)
    changes = _changes(locals())
    training = planned(recipe, changes, steps=steps, horizon=horizon, compressed=compressed)
    axes = grid.Axes(
        scales=(), modes=_listed(modes, "--modes"), seeds=tuple(range(seeds)),
        head_lr_multipliers=tuple(_constant(m, "--head-lr-multipliers") for m in _listed(head_lr_multipliers)),
        lrs=tuple(_constant(value, "--lrs") for value in _listed(lrs)),
    )  # fmt: skip
    axes.check()
    if track is not None:
        check_backend(track)
    if ray is not None:
        if workers:
            raise UsageError("`--ray` and `--workers` exclude each other", "the cluster decides how many cells run")
        require_ray()
    elif gpus_per_cell:
        raise UsageError("`--gpus-per-cell` is for Ray, which sets GPUs aside", "add `--ray ADDRESS`")
    training = training.replace(negatives=negatives_of(recipe, negatives, source))
    wanted = [s if s in ("auto", "none") else _constant(s, "--scales") for s in _listed(scales, "--scales")]
    moved = [s if s == "auto" else _number(s, "--shifts") for s in _listed(shifts, "--shifts")]
    bench = Bench(voice.note)
    corpus = bench.corpus(source)
    plan: list[dict[str, Any]] = []
    for name in backbones:

        def chosen(shift: bool | None, name: str = name) -> Any:
            with voice.progress(f"calibrating {name}") as bar:
                return calibrated(name, bench, corpus, training, reference, bar, shift=shift)

        def starts(chosen: Callable[[bool | None], Any] = chosen) -> tuple[tuple[float | None, ...], tuple[float, ...]]:
            auto = {"auto": chosen(False).scale if "auto" in wanted else None, "none": None}
            shift = chosen(None).shift if "auto" in moved else 0.0
            scaled = tuple(auto[w] if isinstance(w, str) else w for w in wanted)
            return scaled, tuple(shift if isinstance(m, str) else m for m in moved)

        def planned_cells(name: str = name, starts: Callable[[], Any] = starts) -> list[dict[str, Any]]:
            own = axes.with_starts(*starts()).trainings(training)
            return [configuration_of(name, one, source, corpus, trust_remote_code=trust_remote_code) for one in own]

        plan += attempt(planned_cells, voice, name) or []
    pending = plan if force else grid.pending(plan, run_folder)
    todo = len(pending)
    voice.note(f"{len(plan)} cells, {len(plan) - todo} of them finished already (`{run_folder}`)")
    executor: grid.Executor = grid.LocalProcesses(workers, threads) if workers else grid.InProcess(bench)
    if ray is not None:
        executor = RayCluster(ray, threads, gpus_per_cell, bench=bench, tell=voice.note)
    failures = 0
    with voice.progress("sweep", follow=Logs([grid.log_of(one, run_folder) for one in pending])) as bar:
        bar(0, todo)
        for done, outcome in enumerate(grid.sweep(plan, run_folder, executor=executor, force=force), start=1):
            if outcome.status != "done":
                failures += 1
                voice.error(HeadscaleError(outcome.message, outcome.hint), outcome.configuration["backbone"])
            elif track is not None:
                track_cell(track, folder_of(outcome.configuration, run_folder))
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
    collection: CollectionSource = None,
    split: CollectionSplit = None,
    query_length: QueryLength = 256,
    document_length: DocumentLength = 256,
    mask_special_tokens: Annotated[
        bool, typer.Option("--mask-special-tokens", help="Leave special tokens out of the pooling.")
    ] = False,
    pooling: Pooling = None,
    activation: Activation = None,
    queries: Queries = None,
    quantize: Annotated[
        str, typer.Option(metavar="LIST", help="A row more for each rounding of the weights: x100, or bits: 8,4.")
    ] = "",
    bm25: Annotated[bool, typer.Option("--bm25/--no-bm25", help="Add a row for BM25.")] = True,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts encoded at once.")] = 32,
    resamples: Annotated[int, typer.Option(min=1000, help="Of the queries, for the intervals.")] = 2000,
    seed: Annotated[int, typer.Option(min=0, help="Of the resampling.")] = 0,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    device: TrainDevice = "auto",
    output: Output = None,
    run_folder: Run = RUN_FOLDER,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Measure effectiveness and sparsity.

    On a collection in BEIR layout or the built-in one, beside BM25 and chance.
    """
    voice = begin(f"evaluating {model}", quiet, debug, run_folder)
    from headscale.collection import chosen_collection
    from headscale.deployment import check_options
    from headscale.evaluation import Setup, built_in, evaluate_in_run, require_packages
    from headscale.impacts import roundings
    from headscale.render import EVALUATE_COLUMNS, show, system_rows, write_document

    setup = Setup(
        query_length, document_length, batch_size, mask_special_tokens, bm25, resamples, seed,
        pooling, activation, queries, tuple(one.name for one in roundings(quantize)),
    )  # fmt: skip
    check_options(pooling, activation, queries)
    require_packages(setup)
    chosen = chosen_collection(collection, split)
    from headscale.device import choose_device

    place = choose_device(device)
    loading = loading_with(voice, revision, trust_remote_code, place.name, False)
    chosen = chosen or built_in(loading)
    voice.note(f"{len(chosen.queries)} queries, {len(chosen.documents)} documents ({chosen.name}) on {place.reason}")
    with voice.progress(f"encoding with {model}") as bar:
        found = evaluate_in_run(model, chosen, run_folder, setup=setup, force=force, loading=watched(loading, bar))
    for warning in found.warnings:
        voice.warn(f"{model}: {warning}")
    if as_json:
        write_document("evaluate", [found], voice.errors or [])
    else:
        show(system_rows([found]), EVALUATE_COLUMNS)
    if output is not None:
        write_document("evaluate", [found], voice.errors or [], output)


def _changes(options: dict[str, Any]) -> dict[str, Any]:
    """The fields of a recipe that options set."""
    names = ("lr", "temperature", "lambda_query", "lambda_document", "batch_size", "micro_batch", "negatives",
             "query_length", "document_length", "precision", "device")  # fmt: skip
    return {name: options[name] for name in names if options.get(name) is not None}


def _listed(text: str, option: str = "") -> tuple[str, ...]:
    """The parts of a comma-separated option; one that must not be empty is named."""
    parts = tuple(part.strip() for part in text.split(",") if part.strip())
    if option and not parts:
        raise UsageError(f"`{option}` is empty", "give values separated by commas")
    return parts


def _scale(text: str) -> float | Literal["auto"] | None:
    if text == "auto":
        return "auto"
    return None if text == "none" else _constant(text, "--scale")


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


def _keeping(target: Path, mode: str, voice: Voice) -> Callable[[Any, Any, Any], None]:
    """What is done with the model that `--save-model` asks for."""
    from headscale.saving import check_savable, save_trained

    check_savable(mode, target)

    def keep(model: Any, tokenizer: Any, training: Any) -> None:
        error = save_trained(model, tokenizer, target, training)
        voice.note(f"the trained model is in `{target}`; loaded again, it differs by {error:.1e} of the largest weight")

    return keep


@contextmanager
def _said_once(team: Any) -> Iterator[None]:
    """Leave an error that all processes have to the first one."""
    try:
        yield
    except (HeadscaleError, KeyboardInterrupt) as error:
        if not team.leaves_to_first(error):
            raise
        state["silent"] = True
        raise


@contextmanager
def _steps_shown(voice: Voice, title: str, steps: int) -> Iterator[Any]:
    from headscale.trials import shown_steps

    with voice.progress(title) as bar:
        yield shown_steps(bar, steps)


def _number(text: str, option: str) -> float:
    """Any finite number."""
    import math

    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UsageError(f"`{option} {text}` is not a number", "write it as -2.5, or auto")
    return value


def _announce(training: Any, voice: Voice, processes: int) -> None:
    from headscale.device import choose_device
    from headscale.verdict import Clock

    choice = choose_device(training.device, precision=training.precision)
    share = Clock(training).share(training.steps)
    kind = "a whole schedule in" if training.compressed else f"of {training.horizon:,} steps, the first"
    voice.note(f"{kind} {training.steps:,}: {share:.0%} of the summed learning rate")
    voice.note(f"device {choice.name}: {choice.reason}")
    if processes > 1:
        voice.note(f"{processes} processes share every batch; the loss is that of the whole batch")


def _judged(result: Any, voice: Voice) -> None:
    verdict = result.verdict
    when = f"decided after {verdict.step} steps, {verdict.lr_share:.0%} of the summed learning rate"
    limit = "" if verdict.threshold is None else f", threshold {verdict.threshold:.3g}"
    voice.note(f"{result.arm}: {verdict.word}: {verdict.evidence} (rule `{verdict.rule}`{limit}; {when})")
