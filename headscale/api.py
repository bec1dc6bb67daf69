"""The public verbs: what each command does, from arguments to a record, with nothing parsed and nothing printed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headscale import __version__, cells
from headscale.activations import DEFAULT_ENCODING, Encoding
from headscale.inspection import (
    Batches,
    Measured,
    Texts,
    built_in_texts,
    inspect_weights,
    measure,
    measure_weights,
    texts_of,
)
from headscale.profiles import DEFAULT_REFERENCE, Reference, from_dict, profile_of, resolve_reference
from headscale.records import Calibration, Inspection, Profile, TrialResult, Written

if TYPE_CHECKING:
    from headscale.apply import Change
    from headscale.arms import Plan
    from headscale.backbone import Backbone
    from headscale.calibration import Choice
    from headscale.distributed import Team
    from headscale.texts import Pair
    from headscale.trials import Bench, OnStep, TextSource

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Loading:
    """How backbones are opened.

    Args:
        revision: branch, tag or commit of a hub id.
        trust_remote_code: run a repository's own modelling code.
        device: where models go.
        spectral: add singular values to the norms.
        tell: told in a sentence what is fetched, reused or replaced.
        on_batch: called with (batches done, batches in all).
    """

    revision: str | None = None
    trust_remote_code: bool = False
    device: str = "cpu"
    spectral: bool = False
    tell: Tell | None = None
    on_batch: Batches | None = None

    def open(self, name: str | Path) -> Backbone:
        """Load a backbone."""
        from headscale.backbone import load_backbone

        return load_backbone(
            name,
            revision=self.revision,
            trust_remote_code=self.trust_remote_code,
            device=self.device,
            on_progress=self.tell,
        )

    def say(self, sentence: str) -> None:
        """Tell, if someone listens."""
        if self.tell:
            self.tell(sentence)


def inspect(
    backbone: Any,
    tokenizer: Any = None,
    *,
    pairs: Sequence[Pair] | None = None,
    encoding: Encoding = DEFAULT_ENCODING,
    weights_only: bool = False,
    loading: Loading | None = None,
) -> Inspection:
    """Measure the MLM head of a backbone and what it puts out.

    Args:
        backbone: a hub id, a directory, `bundled:NAME`, or a loaded model (then with its tokenizer).
        tokenizer: of a loaded model.
        pairs: query-document pairs; the built-in docstrings by default.
        encoding: lengths in tokens, and documents per batch.
        weights_only: read the head's tensors only; no text, and the verdict stays `unjudged`.
        loading: how the backbone is opened.

    Returns:
        The inspection; `to_dict()` gives plain JSON values.

    Raises:
        HeadscaleError: the backbone cannot be read, has no trained head, or cannot serve SPLADE.

    Example:
        >>> import headscale
        >>> headscale.inspect("bundled:tiny-bert", weights_only=True).verdict.word
        'unjudged'
    """
    loading = loading or Loading()
    if weights_only and isinstance(backbone, str | Path):
        return inspect_weights(backbone, revision=loading.revision, spectral=loading.spectral, tell=loading.tell)
    opened = _opened(backbone, tokenizer, loading)
    if weights_only:
        return measure_weights(opened, spectral=loading.spectral)
    return _measured(opened, _texts(pairs, encoding, loading), loading).inspection


def calibrate(
    backbone: Any,
    tokenizer: Any = None,
    *,
    reference: str | Path | Profile = DEFAULT_REFERENCE,
    choice: Choice | None = None,
    pairs: Sequence[Pair] | None = None,
    encoding: Encoding = DEFAULT_ENCODING,
    weights_only: bool = False,
    save: str | Path | None = None,
    mode: str = "auto",
    overwrite: bool = False,
    loading: Loading | None = None,
) -> Calibration:
    """Choose the constant that puts a backbone's outputs where a reference's are, and write it if asked.

    Args:
        backbone: a hub id, a directory, `bundled:NAME`, or a loaded model (then with its tokenizer).
        tokenizer: of a loaded model.
        reference: a hub id, a directory, `bundled:NAME`, a profile file or a profile.
        choice: which target, and how (`headscale.calibration.Choice`).
        pairs: query-document pairs; the built-in docstrings by default.
        encoding: lengths in tokens, and documents per batch.
        weights_only: read the heads' tensors only; what needs outputs stays empty, and nothing can be saved.
        save: write the drop-in checkpoint there.
        mode: `untie`, `fold` or `auto`.
        overwrite: replace a checkpoint that is at `save`.
        loading: how backbones are opened.

    Returns:
        The constant with every target beside it; `scale` is None where the target is out of reach.

    Raises:
        HeadscaleError: a backbone cannot be read, the checkpoint cannot be written, or the weights alone do not give
            what was asked for.

    Example:
        >>> import headscale
        >>> found = headscale.calibrate("bundled:tiny-modernbert", reference="bundled:tiny-bert")
        >>> found.shift < 0
        True
    """
    from headscale.calibration import choose
    from headscale.weights_alone import check_choice, choose_by_weights

    loading = loading or Loading()
    if choice is not None and choice.norm == "spectral_norm":
        loading = replace(loading, spectral=True)
    if weights_only:
        check_choice(choice, saving=save is not None)
        inspection = inspect(backbone, tokenizer, weights_only=True, loading=loading)
        return choose_by_weights(inspection, _reference(reference, None, loading), choice)
    texts = _texts(pairs, encoding, loading)
    measured = _measured(_opened(backbone, tokenizer, loading), texts, loading)
    calibration = choose(measured, _reference(reference, texts, loading), choice)
    if save is None or calibration.scale is None:
        return calibration
    assert measured.backbone is not None
    return replace(calibration, written=write(measured.backbone, calibration, save, mode, overwrite=overwrite))


def trial(
    backbone: Any,
    tokenizer: Any = None,
    *,
    plan: Plan | str = "st-mnrl",
    pairs: Sequence[Pair] | str | Path | None = None,
    test_pairs: Sequence[Pair] | str | Path | None = None,
    run: str | Path | None = None,
    on_step: OnStep | None = None,
    force: bool = False,
    loading: Loading | None = None,
    team: Team | None = None,
) -> tuple[TrialResult, ...]:
    """Train the first SPLADE steps of a full run, calibrated and untouched side by side, and judge them.

    Args:
        backbone: a hub id, a directory, `bundled:NAME`, or a loaded model (then with its tokenizer), which is left
            as it was.
        tokenizer: of a loaded model.
        plan: what is trained (`headscale.Plan`), or a recipe's name: its first steps, as far as the verdict needs.
        pairs: training pairs, or where they are; the built-in docstrings by default.
        test_pairs: pairs that are ranked at the end, or where they are; built-in ones by default beside built-in
            training pairs.
        run: the run folder, where finished trainings are read from and kept; by default nothing is kept.
        on_step: called with every step's record and the verdict so far.
        force: train what the run folder holds already.
        loading: how the backbone is opened; the device of the training is the plan's.
        team: processes that share every batch and all make this call (`headscale.distributed.join`).

    Returns:
        a result per arm, the judged one first, each with its trainings and the verdict of the worst seed.

    Raises:
        HeadscaleError: the backbone or the texts cannot be read, or a training cannot be run.
        KeyboardInterrupt: on Ctrl-C; what was finished is in `run`.

    Example:
        >>> import headscale
        >>> training = headscale.planned("st-mnrl", {"negatives": 0, "lr": 3e-4}, steps=20)
        >>> plan = headscale.Plan(training, scale=1 / 16)
        >>> judged, control = headscale.trial("bundled:tiny-modernbert", plan=plan)  # doctest: +SKIP
        >>> judged.verdict.word  # doctest: +SKIP
        'inconclusive'
    """
    import tempfile

    from headscale.arms import fingerprint_of, run_trial
    from headscale.trials import Bench

    loading = loading or Loading()
    bench = Bench(loading.tell, team=team)
    name, identity = backbone, None
    if not isinstance(backbone, str | Path):
        opened = _opened(backbone, tokenizer, loading)
        name, identity = opened.name, fingerprint_of(opened.model)
        bench.backbones[name] = opened
    source = _source(pairs, test_pairs, bench)
    plan = _plan(plan, source, bench) if isinstance(plan, str) else plan
    with tempfile.TemporaryDirectory() as nowhere:
        return run_trial(
            str(name), plan, source, Path(run or nowhere), bench=bench, loading=loading,
            watch=lambda _arm, _seed: nullcontext(on_step), identity=identity, force=force,
        )  # fmt: skip


def _source(pairs: Any, test_pairs: Any, bench: Bench) -> TextSource:
    """Where the texts of a trial are; those that are given as such are put on the bench."""
    from headscale.texts import read_pairs
    from headscale.trials import Corpus, TextSource

    def name_of(value: Any) -> str | None:
        return "given" if _are_pairs(value) else None if value is None else str(value)

    source = TextSource(name_of(pairs), name_of(test_pairs))
    if "given" in (source.pairs, source.test_pairs):
        train = pairs if _are_pairs(pairs) else TextSource(source.pairs, candidates=0).read(bench.tell).train
        test = test_pairs if _are_pairs(test_pairs) or test_pairs is None else read_pairs(test_pairs)
        bench.corpora[source] = Corpus(train, (), test or ())
    return source


def _are_pairs(value: Any) -> bool:
    return value is not None and not isinstance(value, str | Path)


def _plan(recipe: str, source: TextSource, bench: Bench) -> Plan:
    """The first steps of a recipe, with as many of its hard negatives as every pair has."""
    from headscale.arms import Plan
    from headscale.recipes import recipe as find
    from headscale.trials import planned, team_of

    def fewest() -> int:
        return min(len(getattr(pair, "negatives", ())) for pair in bench.corpus(source).train)

    wanted = find(recipe).negatives
    return Plan(planned(recipe, {"negatives": min(wanted, team_of(bench).first_does(fewest))}))


def write(
    backbone: Backbone, calibration: Calibration, target: str | Path, mode: str = "auto", *, overwrite: bool = False
) -> Written:
    """Write a calibrated checkpoint with `headscale.json` beside it, and prove it.

    Args:
        backbone: the original, loaded from disk.
        calibration: what was chosen; its scale is not None.
        target: the new directory.
        mode: `untie`, `fold` or `auto`.
        overwrite: replace a checkpoint that is there.
    """
    from headscale.apply import Change, save_rescaled
    from headscale.rescaling import can_fold

    assert calibration.scale is not None
    if mode == "auto" and calibration.scale == calibration.head_lr_multiplier == 1 and can_fold(backbone.head):
        mode = "fold"  # a shift alone: no projection of the head's own is needed
    change = Change(calibration.scale, mode, calibration.scale_bias, calibration.shift)
    return save_rescaled(backbone, target, change, metadata=_metadata(calibration, change), overwrite=overwrite)


def calibrate_in_run(
    name: str,
    texts: Texts | None,
    run: Path,
    *,
    reference: Reference,
    choice: Choice,
    save: Path | None = None,
    mode: str = "auto",
    overwrite: bool = False,
    loading: Loading,
) -> Calibration:
    """`calibrate` for one backbone by name, kept in the run folder; the checkpoint is written when asked for.

    Without texts the constant is chosen by the weights alone, and nothing can be written.
    """
    from headscale.calibration import choose
    from headscale.weights_alone import check_choice, choose_by_weights

    if texts is None:
        check_choice(choice, saving=save is not None)
        inspection = inspect_weights(name, revision=loading.revision, spectral=loading.spectral, tell=loading.tell)
        calibration = choose_by_weights(inspection, reference, choice)
    else:
        measured = _measured(loading.open(name), texts, loading)
        calibration = choose(measured, reference, choice)
        if save is not None and calibration.scale is not None:
            assert measured.backbone is not None
            loading.say(f"writing `{save}`, then loading it to hold its logits against those of `{name}`")
            written = write(measured.backbone, calibration, save, mode, overwrite=overwrite)
            calibration = replace(calibration, written=written)
    configuration = {
        "name": name,
        "identity": identity(name, loading.revision),
        "texts": None if texts is None else texts.settings.to_dict(),
        "reference": [reference.profile.name, reference.profile.revision],
        "choice": asdict(choice),
        "headscale": __version__,
    }
    folder = cells.cell_folder(run, "calibrate", name, cells.cell_key(configuration))
    cells.write_cell(folder, "calibrate", configuration, calibration.to_dict())
    return calibration


def measure_by_name(name: str, texts: Texts, loading: Loading, *, is_reference: bool = False) -> Inspection:
    """Load a backbone and measure it on the texts."""
    return measure(
        loading.open(name), texts, spectral=loading.spectral, is_reference=is_reference, on_batch=loading.on_batch
    ).inspection


def profile(
    name: str | Path,
    *,
    pairs: Sequence[Pair] | None = None,
    encoding: Encoding = DEFAULT_ENCODING,
    loading: Loading | None = None,
) -> Profile:
    """The statistics of a reference, small enough to keep and to give as `reference`; arguments as for `inspect`."""
    loading = replace(loading or Loading(), spectral=True)  # any norm may be asked of a reference
    return profile_of(inspect(name, pairs=pairs, encoding=encoding, loading=loading))


def find_reference(name: str, texts: Texts | None, loading: Loading) -> Reference:
    """A reference by name, measured on the same texts where the whole model is within reach."""

    def by_name(one: str, weights_only: bool) -> Inspection:
        if weights_only or texts is None:
            return inspect_weights(one, spectral=True, tell=loading.tell)
        return measure_by_name(one, texts, replace(loading, revision=None, spectral=True), is_reference=True)

    settings = None if texts is None else texts.settings
    return resolve_reference(name, settings, measure=by_name, tell=loading.tell)


def _reference(given: str | Path | Profile, texts: Texts | None, loading: Loading) -> Reference:
    return Reference(given, "given") if isinstance(given, Profile) else find_reference(str(given), texts, loading)


def inspect_in_run(
    name: str, texts: Texts | None, run: Path, *, force: bool = False, is_reference: bool = False, loading: Loading
) -> Inspection:
    """`inspect` through the run folder: reuse a finished cell of the same inputs, else compute and keep it."""
    configuration = {
        "name": name,
        "identity": identity(name, loading.revision),
        "texts": None if texts is None else texts.settings.to_dict(),
        "spectral": loading.spectral,
        "reference": is_reference,
        "headscale": __version__,
    }
    folder = cells.cell_folder(run, "inspect", name, cells.cell_key(configuration))
    kept = None if force else _kept(cells.finished(folder, configuration))
    if kept is not None:
        loading.say(f"`{name}`: reusing `{folder}` (`--force` measures again)")
        return kept
    if texts is None:
        inspection = inspect_weights(name, revision=loading.revision, spectral=loading.spectral, tell=loading.tell)
    else:
        inspection = measure_by_name(name, texts, loading, is_reference=is_reference)
    cells.write_cell(folder, "inspect", configuration, inspection.to_dict())
    return inspection


def _kept(result: dict[str, Any] | None) -> Inspection | None:
    """A finished inspection as a record; None where there is none, or one that is not whole."""
    try:
        return from_dict(Inspection, result)
    except ValueError:
        return None


def identity(name: str, revision: str | None = None) -> Any:
    """What a name stands for right now: a commit of a hub id, or the sizes and times of a directory's files."""
    from headscale.checkpoint import looks_like_path, open_checkpoint

    if not (name.startswith("bundled:") or Path(name).expanduser().exists() or looks_like_path(name)):
        from headscale.hub import commit_of

        return commit_of(name, revision=revision)
    with open_checkpoint(name) as checkpoint:
        directory = checkpoint.directory
    assert directory is not None  # it is on this machine
    files = sorted(f for f in directory.iterdir() if f.is_file())
    return [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files]


def inspected_names(run: Path) -> list[str]:
    """Backbones inspected with texts in a run folder, other than references, in the order of their folders."""
    if not run.is_dir():
        return []
    found = [cell["configuration"] for cell in cells.find_cells(run, "inspect")]
    return list(dict.fromkeys(c["name"] for c in found if c["texts"] is not None and not c["reference"]))


def _texts(pairs: Sequence[Pair] | None, encoding: Encoding, loading: Loading) -> Texts:
    if pairs is not None:
        return texts_of(pairs, "given", encoding)
    return built_in_texts(
        query_length=encoding.query_length,
        document_length=encoding.document_length,
        batch_size=encoding.batch_size,
        tell=loading.tell,
    )


def _opened(backbone: Any, tokenizer: Any, loading: Loading) -> Backbone:
    from headscale.backbone import handed_over

    return loading.open(backbone) if isinstance(backbone, str | Path) else handed_over(backbone, tokenizer)


def _measured(backbone: Backbone, texts: Texts, loading: Loading) -> Measured:
    return measure(backbone, texts, spectral=loading.spectral, on_batch=loading.on_batch)


def _metadata(calibration: Calibration, change: Change) -> dict[str, Any]:
    """The content of `headscale.json` but for what the writer adds."""
    from headscale.environment import environment

    return {
        "schema": "headscale.checkpoint/1",
        "headscale": __version__,
        "source": {"name": calibration.name, "revision": calibration.revision},
        "scale": change.scale,
        "head_lr_multiplier": calibration.head_lr_multiplier,
        "bias_policy": "scale" if change.scale_bias else "keep",
        "shift": change.shift,
        "match": calibration.match,
        "reference": {"name": calibration.reference, "origin": calibration.reference_origin},
        "targets": [t.to_dict() for t in calibration.targets],
        "lambda_advice": calibration.lambda_advice.to_dict(),
        "advice": list(calibration.advice),
        "texts": None if calibration.texts is None else calibration.texts.to_dict(),
        "before": None if calibration.before is None else calibration.before.to_dict(),
        "after": None if calibration.after is None else calibration.after.to_dict(),
        "env": environment(),
    }
