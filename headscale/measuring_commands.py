"""The commands that measure and choose: `inspect`, `calibrate`, `profile`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headscale.errors import UsageError
from headscale.options import (
    RUN_FOLDER,
    Activation,
    Count,
    Debug,
    Device,
    DocumentLength,
    Force,
    Json,
    Output,
    PairFile,
    Plot,
    Pooling,
    Queries,
    QueryLength,
    Quiet,
    Ref,
    Revision,
    Run,
    Spectral,
    TextFile,
    Trust,
    WeightsOnly,
)
from headscale.render import Voice, judged
from headscale.shell import app, attempt, begin, loading_with, reference_or_none, texts_from_options, watched

if TYPE_CHECKING:
    from headscale.evaluation import Setup
    from headscale.records import Inspection


@app.command()
def inspect(
    backbones: Annotated[list[str], typer.Argument(metavar="BACKBONE...", help="Hub ids or directories.")],
    reference: Ref = "bert-base-uncased",
    weights_only: WeightsOnly = False,
    spectral: Spectral = False,
    texts: TextFile = None,
    pairs: PairFile = None,
    num_pairs: Count = 128,
    query_length: QueryLength = 32,
    document_length: DocumentLength = 128,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    device: Device = "cpu",
    pooling: Pooling = None,
    activation: Activation = None,
    queries: Queries = None,
    quantize: Annotated[
        str, typer.Option(metavar="LIST", help="Also what rounding the weights takes: x100, or bits: 8,4.")
    ] = "",
    check: Annotated[bool, typer.Option("--check", help="Leave with 1 unless every verdict is ok.")] = False,
    plot: Plot = None,
    output: Output = None,
    run_folder: Run = RUN_FOLDER,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Measure MLM-head norms and outputs.

    Statistics of the weights and of the pooled outputs, against a reference, with a verdict.
    """
    voice = begin(f"inspecting {', '.join(backbones)}", quiet, debug, run_folder)
    deployed = _deployment(pooling, activation, queries, quantize, weights_only)
    from headscale.api import find_reference, inspect_in_run
    from headscale.render import INSPECT_COLUMNS, inspect_rows, show, write_document

    chosen = None if weights_only else texts_from_options(texts, pairs, num_pairs, query_length, document_length, voice)
    loading = loading_with(voice, revision, trust_remote_code, device, spectral)
    with voice.progress(f"reference {reference}") as bar:
        profile = reference_or_none(lambda: find_reference(reference, chosen, watched(loading, bar)).profile, voice)
    found = []
    for name in backbones:
        with voice.progress(name) as bar:
            inspection = attempt(
                lambda name=name, bar=bar: inspect_in_run(  # type: ignore[misc]
                    name,
                    chosen,
                    run_folder,
                    force=force,
                    is_reference=name == reference,
                    loading=watched(loading, bar),
                ),
                voice,
                name,
            )
        if inspection is not None and deployed is not None:
            inspection = attempt(
                lambda name=name, one=inspection: _with_deployment(one, loading.open(name), chosen, deployed),  # type: ignore[misc]
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
    ceiling: Annotated[float, typer.Option(help="c of `loss`: the largest a with L(a) <= c ln N.")] = 4.0,
    snap: Annotated[bool, typer.Option("--snap/--no-snap", help="Round the constant to a power of two.")] = True,
    scale_bias: Annotated[bool, typer.Option("--scale-bias/--no-scale-bias", help="Scale the bias too.")] = True,
    shift: Annotated[
        bool | None,
        typer.Option(
            "--shift/--no-shift",
            help="Move the bias to the reference's share of active dims; by default where it is twice that.",
        ),
    ] = None,
    head_lr_multiplier: Annotated[
        float | None, typer.Option(help="Of the head's learning rate, stored as advice; 4 where the head shrinks.")
    ] = None,
    save: Annotated[Path | None, typer.Option(metavar="DIR", help="Write the drop-in checkpoint, proven.")] = None,
    mode: Annotated[str, typer.Option(help="untie, fold or auto.", metavar="MODE")] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a checkpoint that is at DIR.")] = False,
    weights_only: WeightsOnly = False,
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
    run_folder: Run = RUN_FOLDER,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Choose the constant, write the checkpoint.

    Every way of matching the reference side by side; `--save DIR` writes the drop-in checkpoint and proves it.
    """
    voice = begin("calibrating", quiet, debug, run_folder)
    from headscale.api import calibrate_in_run, find_reference
    from headscale.calibration import Choice
    from headscale.render import show_targets, write_document
    from headscale.rescaling import MODES
    from headscale.weights_alone import check_choice

    if mode not in MODES or mode == "logits":
        raise UsageError(f"`--mode {mode}` is none of untie, fold, auto", "see `headscale calibrate --help`")
    choice = Choice(match, norm, activation, score, k, ceiling, snap, scale_bias, shift, head_lr_multiplier)
    if weights_only:
        check_choice(choice, saving=save is not None)
    names = backbones or _default_backbones(run_folder, reference, voice)
    chosen = None if weights_only else texts_from_options(texts, pairs, num_pairs, query_length, document_length, voice)
    loading = loading_with(voice, revision, trust_remote_code, device, norm == "spectral_norm")
    with voice.progress(f"reference {reference}") as bar:
        found_reference = find_reference(reference, chosen, watched(loading, bar))
    found = []
    for name in names:
        target = None if save is None else (save if len(names) == 1 else save / name.replace("/", "--"))
        with voice.progress(name) as bar:
            calibration = attempt(
                lambda name=name, target=target, bar=bar: calibrate_in_run(  # type: ignore[misc]
                    name,
                    chosen,
                    run_folder,
                    reference=found_reference,
                    choice=choice,
                    save=target,
                    mode=mode,
                    overwrite=overwrite,
                    loading=watched(loading, bar),
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
    """Keep a reference's statistics as a file.

    The file can be given as `--reference`.
    """
    voice = begin(f"measuring {backbone}", quiet, debug, None)
    if output.suffix != ".json":
        raise UsageError(f"`{output}` does not end in `.json`", hint=f"use `-o {output.with_suffix('.json')}`")
    from headscale.api import measure_by_name
    from headscale.profiles import profile_of, write_profile

    chosen = texts_from_options(texts, pairs, num_pairs, query_length, document_length, voice)
    loading = loading_with(voice, revision, trust_remote_code, device, True)
    with voice.progress(backbone) as bar:
        inspection = measure_by_name(backbone, chosen, watched(loading, bar), is_reference=True)
    write_profile(profile_of(inspection), output)
    print(output)


def _deployment(
    pooling: str | None, activation: str | None, queries: str | None, quantize: str, weights_only: bool
) -> Setup | None:
    """How the backbones are going to be deployed; None where no option says so."""
    if not (pooling or activation or queries or quantize):
        return None
    from headscale.deployment import check_options
    from headscale.evaluation import Setup
    from headscale.impacts import roundings

    check_options(pooling, activation, queries)
    names = tuple(one.name for one in roundings(quantize))
    if weights_only:
        raise UsageError("`--weights-only` runs no text, so it knows nothing of pooling", "leave one of them out")
    return Setup(pooling=pooling, activation=activation, queries=queries, quantize=names)


def _with_deployment(inspection: Inspection, backbone: Any, texts: Any, setup: Setup) -> Inspection:
    from dataclasses import replace

    from headscale.deployed import measure_deployed

    return replace(inspection, deployed=measure_deployed(backbone, texts, setup))


def _explain_deployment(inspection: Inspection, voice: Voice) -> None:
    found = inspection.deployed
    if found is None:
        return
    from headscale.deployment import remarks  # it imports torch, which looking at weights does without

    voice.note(
        f"  deployed with {found.pooling} pooling, {found.activation}, queries by {found.queries}:"
        f" loss {found.loss_over_ln_n:.3g} ln N, score sd {found.score_sd:.3g},"
        f" {found.active_dims_query:.0f}/{found.active_dims_document:.0f} dims"
    )
    for one in found.impacts:
        voice.note(f"  {one.rounding}: {one.word}, {one.lost_document:.2%} of the documents' weights lost")
    for remark in remarks(found.pooling, found.queries != "model", found.impacts):
        voice.note(f"  {remark}")


def _explain(inspection: Any, voice: Voice) -> None:
    from headscale.diagnosis import causes

    voice.note(f"{inspection.name}: {judged(inspection.verdict)}")
    for cause in causes(inspection.verdict, inspection.output, inspection.vocabulary):
        voice.note(f"  {cause}")
    _explain_deployment(inspection, voice)
    for warning in inspection.warnings:
        voice.warn(f"{inspection.name}: {warning}")


def _advise(calibration: Any, voice: Voice) -> None:
    voice.note(f"{calibration.name}: {judged(calibration.verdict)}")
    voice.note(f"  {calibration.match}: {calibration.match_reason}")
    lines = [calibration.disagreement, *calibration.advice]
    if calibration.scale is not None and calibration.scale < 1:
        lines.append(
            "stored as impacts, pooled by sum, or with inference-free queries? `headscale inspect DIR --quantize x100"
            " --pooling sum --queries idf` says what the constant does there"
        )
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


def _draw(path: Path, figure: str, found: list[Any]) -> None:
    from headscale import figures

    figures.save(getattr(figures, figure)(found), path)
