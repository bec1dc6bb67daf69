"""One training as a cell: a pure function of its configuration, written as it happens; and the arms of a trial."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headscale import __version__, cells
from headscale.errors import HeadscaleError, UsageError
from headscale.interop.tracking import following
from headscale.profiles import from_dict
from headscale.recipes import TrainingConfig, recipe
from headscale.records import Record, StepRecord, TrainedCell, TrialResult, TrialVerdict
from headscale.verdict import RULES, Clock, Rules, Watch, worst

if TYPE_CHECKING:
    from headscale.backbone import Backbone
    from headscale.distributed import Team
    from headscale.records import Calibration, RankMetrics
    from headscale.render import Progress
    from headscale.texts import Pair

KIND = "trial"
PACKAGES = ("stdlib", "numpy", "pandas", "scipy")  # scanned in seconds; torch alone takes half a minute
SCALED_MODES = ("untie", "fold", "logits")
CANDIDATES = 500  # pairs that are ranked at the end, of each split

OnStep = Callable[[StepRecord, TrialVerdict], object]
OnTrained = Callable[[Any, Any, TrainingConfig], object]


# --- texts -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Corpus:
    """The pairs of a training, and those that are ranked at its end; each may be empty but the first."""

    train: Sequence[Pair]
    dev: Sequence[Pair] = ()
    test: Sequence[Pair] = ()

    def fingerprints(self) -> dict[str, str | None]:
        """Of every split; None where it is empty."""
        from headscale.texts import corpus_fingerprint

        splits = {"train": self.train, "dev": self.dev, "test": self.test}
        return {name: corpus_fingerprint(pairs) if pairs else None for name, pairs in splits.items()}


@dataclass(frozen=True)
class TextSource(Record):
    """Where a cell's texts are, so that another process can read them.

    Args:
        pairs: a source of training pairs, as `headscale.texts.read_pairs` takes it; None: the built-in docstrings.
        test_pairs: a source of pairs that are ranked at the end; built-in test and dev pairs without one, if `pairs`
            is None too.
        packages: of the built-in docstrings.
        candidates: pairs of each split that are ranked at the end; 0: none.
        rank_dev: rank the built-in dev pairs too, for choosing between cells.
    """

    pairs: str | None = None
    test_pairs: str | None = None
    packages: tuple[str, ...] = PACKAGES
    candidates: int = CANDIDATES
    rank_dev: bool = True

    def read(self, tell: Callable[[str], None] | None = None) -> Corpus:
        """The pairs; raises what the readers of `headscale.texts` raise."""
        from headscale.texts import builtin_pairs, read_pairs

        test = read_pairs(self.test_pairs, limit=self.candidates) if self.test_pairs else []
        if self.pairs is not None:
            return Corpus(read_pairs(self.pairs), (), test)
        train = builtin_pairs("train", packages=self.packages, progress=tell)
        if not self.candidates or test:
            return Corpus(train, (), test)
        dev = builtin_pairs("dev", packages=self.packages)[: self.candidates] if self.rank_dev else []
        return Corpus(train, dev, builtin_pairs("test", packages=self.packages)[: self.candidates])


# --- a cell --------------------------------------------------------------------------------------------------------


@dataclass
class Bench:
    """What the cells of one process share: the backbone loaded last, and the texts.

    Args:
        tell: told in a sentence what is loaded or reused.
        team: the processes that share every batch, each with a bench of its own; the first one alone writes.
        track: a tracker that gets the steps too: `tensorboard`, `wandb` or `trackio`.
    """

    tell: Callable[[str], None] | None = None
    team: Team | None = None
    track: str | None = None
    backbones: dict[str, Backbone] = field(default_factory=dict)
    corpora: dict[TextSource, Corpus] = field(default_factory=dict)

    def backbone(self, name: str, revision: str | None = None, *, trust_remote_code: bool = False) -> Backbone:
        """The backbone of that name; only the last one that was not put there stays in memory."""
        if name not in self.backbones:
            from headscale.backbone import load_backbone

            self.backbones.clear()
            self.backbones[name] = load_backbone(
                name, revision=revision, trust_remote_code=trust_remote_code, on_progress=self.tell
            )
        return self.backbones[name]

    def corpus(self, source: TextSource) -> Corpus:
        """The texts of a source, read once."""
        if source not in self.corpora:
            self.corpora[source] = source.read(self.tell)
        return self.corpora[source]


def configuration_of(
    backbone: str,
    training: TrainingConfig,
    texts: TextSource,
    corpus: Corpus,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    stop_early: bool = False,
    identity: Any = None,
) -> dict[str, Any]:
    """Everything that decides a cell, as plain JSON values.

    Args:
        backbone: a hub id, a directory or `bundled:NAME`; what it stands for right now becomes part of the cell.
        training: the run.
        texts: where the pairs are.
        corpus: what is read from there.
        revision: branch, tag or commit of a hub id.
        trust_remote_code: run a repository's own modelling code.
        stop_early: end the run once its verdict is certain; the rules are then part of what decides it.
        identity: of a backbone that is in memory only; by default what its name stands for.
    """
    return {
        "backbone": backbone,
        "revision": revision,
        "identity": identity_of(backbone, revision) if identity is None else identity,
        "trust_remote_code": trust_remote_code,
        "training": training.to_dict(),
        "texts": {**texts.to_dict(), "fingerprints": corpus.fingerprints()},
        "stop_early": RULES.to_dict() if stop_early else None,
        "headscale": __version__,
    }


def identity_of(backbone: str, revision: str | None = None) -> Any:
    """What a name stands for right now: a bundled one's digest, which is the same on every machine; else `identity`."""
    from headscale import bundled
    from headscale.api import identity

    if not bundled.is_bundled(backbone):
        return identity(backbone, revision)
    files = sorted(f for f in bundled.path(backbone).iterdir() if f.suffix in (".json", ".safetensors"))
    total = hashlib.sha256()
    for file in files:
        total.update(file.name.encode() + b"\0" + file.read_bytes())
    return total.hexdigest()[:16]


def training_of(configuration: dict[str, Any]) -> TrainingConfig:
    """The training of a cell."""
    return TrainingConfig(**configuration["training"])


def source_of(configuration: dict[str, Any]) -> TextSource:
    """Where the texts of a cell are."""
    texts = {name: value for name, value in configuration["texts"].items() if name != "fingerprints"}
    return TextSource(**{**texts, "packages": tuple(texts["packages"])})


def folder_of(configuration: dict[str, Any], run: Path) -> Path:
    """The folder of a cell: its backbone, its point of the grid, its key."""
    training = training_of(configuration)
    label = f"{configuration['backbone']}-{training.mode}-{training.scale:.4g}-seed{training.seed}"
    return cells.cell_folder(run, KIND, label, cells.cell_key(configuration))


def run_cell(
    configuration: dict[str, Any],
    run: Path,
    *,
    bench: Bench | None = None,
    on_step: OnStep | None = None,
    on_trained: OnTrained | None = None,
    force: bool = False,
) -> TrainedCell:
    """The training that a configuration describes: from its folder if it is finished there, else run and kept.

    Args:
        configuration: from `configuration_of`.
        run: the run folder.
        bench: backbones and texts that are in memory already.
        on_step: called with every step's record and the verdict so far.
        on_trained: called with model, tokenizer and training at the end; a finished cell is then run again.
        force: run it again.

    Raises:
        KeyboardInterrupt: the cell is then kept with the status `interrupted`.
        HeadscaleError: it cannot be run; nothing is kept.
    """
    bench = bench or Bench()
    folder = folder_of(configuration, run)
    team = team_of(bench)
    kept = None if force or on_trained else team.first_does(partial(finished_cell, folder, configuration))
    if kept is not None:
        if bench.tell is not None:
            bench.tell(f"reusing `{folder}`")
        return kept
    if team.is_first:
        (folder / cells.CELL).unlink(missing_ok=True)  # of an interrupted or failed attempt
    try:
        with following(bench.track if team.is_first else None, folder, configuration, on_step) as watch:
            cell, model, interrupted = _train_cell(configuration, folder, bench, watch)
    finally:
        if team.is_first:
            (folder / cells.BEGUN).unlink(missing_ok=True)
    lean = replace(cell, run=replace(cell.run, steps=()))
    status = "interrupted" if interrupted else "done"
    team.first_does(lambda: cells.write_cell(folder, KIND, configuration, lean.to_dict(), status=status))
    if interrupted:
        raise KeyboardInterrupt
    if on_trained is not None:
        backbone = bench.backbone(configuration["backbone"], configuration["revision"])
        team.first_does(partial(on_trained, model, backbone.tokenizer, training_of(configuration)))
    return cell


def team_of(bench: Bench) -> Team:
    """The bench's team, or this process alone."""
    from headscale.distributed import Team

    return bench.team or Team()


def _train_cell(
    configuration: dict[str, Any], folder: Path, bench: Bench, on_step: OnStep | None
) -> tuple[TrainedCell, Any, bool]:
    """The cell, the model as training left it, and whether it was interrupted."""
    import copy

    from headscale import training as training_module  # looked up late, so that a test can put another in its place
    from headscale.steplog import StepLog

    config = training_of(configuration)
    backbone = bench.backbone(
        configuration["backbone"], configuration["revision"], trust_remote_code=configuration["trust_remote_code"]
    )
    corpus = _checked_corpus(configuration, bench)
    stop = Rules(**configuration["stop_early"]) if configuration["stop_early"] else None
    vocab = backbone.loaded.vocab_size
    watch = Watch(config, candidates=candidates_of(config), vocab_size=vocab, rules=stop or RULES)
    model = copy.deepcopy(backbone.model)
    team = team_of(bench)
    with contextlib.ExitStack() as stack:
        with team.agreed():
            if team.is_first:
                cells.write_json(folder / cells.BEGUN, configuration)
            log = stack.enter_context(StepLog(folder / cells.STEPS)) if team.is_first else None

        def observe(record: StepRecord) -> bool:
            assert log is not None  # the first process alone is asked
            log(record)
            verdict = watch(record)
            if on_step is not None:
                on_step(record, verdict)
            return stop is not None and verdict.certain

        run = training_module.train(
            model, backbone.tokenizer, corpus.train, config, on_step=observe, inplace=True, team=bench.team,
            tell=bench.tell,
        )  # fmt: skip
    rank = partial(ranking_of, model, backbone.tokenizer, config)
    rankings = None if run.status == "interrupted" else _rankings(corpus, rank, team)
    dev, test = rankings or (None, None)
    run = replace(run, end=replace(run.end, ranking=test))
    verdict = team.first_does(lambda: watch.verdict)
    return TrainedCell(backbone.name, backbone.revision, run, verdict, dev), model, rankings is None


def _rankings(
    corpus: Corpus, rank: Callable[[Sequence[Pair]], RankMetrics | None], team: Team
) -> tuple[RankMetrics | None, RankMetrics | None] | None:
    """Of the dev and the test pairs; None where they were interrupted."""
    try:
        dev, test = (team.first_does(partial(rank, pool)) for pool in (corpus.dev, corpus.test))
    except KeyboardInterrupt:
        return None
    return dev, test


def _checked_corpus(configuration: dict[str, Any], bench: Bench) -> Corpus:
    corpus = bench.corpus(source_of(configuration))
    if corpus.fingerprints() != configuration["texts"]["fingerprints"]:
        raise HeadscaleError(
            "the texts are not those that this cell was planned with", "plan it again: run the same command"
        )
    return corpus


def candidates_of(config: TrainingConfig) -> int:
    """N of the in-batch contrastive loss."""
    hard = config.negatives * (config.batch_size if config.shared_negatives else 1)
    return config.batch_size + hard


def ranking_of(model: Any, tokenizer: Any, config: TrainingConfig, pairs: Sequence[Pair]) -> RankMetrics | None:
    """How a trained model ranks pairs; None without any.

    Args:
        model: as training left it.
        tokenizer: the model's.
        config: the training; the mode `logits` keeps its constant in forward.
        pairs: each query's document is ranked among all of theirs.
    """
    if not pairs:
        return None
    from headscale.encoder import SpladeEncoder
    from headscale.head import load_head
    from headscale.ranking import rank_metrics

    scale, shift = (config.scale, config.shift) if config.mode == "logits" else (1.0, 0.0)
    encoder = SpladeEncoder(
        load_head(model), tokenizer, scale=scale, scale_bias=config.scale_bias, shift=shift,
        mask_special_tokens=config.mask_special_tokens,
    )  # fmt: skip
    queries = encoder.encode([p.query for p in pairs], max_length=config.query_length)
    documents = encoder.encode([p.document for p in pairs], max_length=config.document_length)
    return rank_metrics(queries, documents)


def finished_cell(folder: Path, configuration: dict[str, Any]) -> TrainedCell | None:
    """A cell that was finished from the same configuration, with its steps; None where there is none."""
    if not (folder / cells.STEPS).is_file():
        return None
    result = cells.finished(folder, configuration)
    return None if result is None else _restored(result, folder)


def read_trained(folder: Path) -> TrainedCell:
    """A cell with its steps from its folder, whatever its status.

    Raises:
        NotFoundError: it is not there.
        UnreadableError: it is no result of a training.
    """
    from headscale.errors import UnreadableError

    cell = cells.read_cell(folder)
    if cell["kind"] != KIND or "run" not in cell["result"]:
        raise UnreadableError(f"`{folder}` holds no training", "give the folder of a trial")
    return _restored(cell["result"], folder)


def _restored(result: dict[str, Any], folder: Path) -> TrainedCell:
    from headscale.steplog import read_steps

    cell = from_dict(TrainedCell, result)
    steps = tuple(from_dict(StepRecord, row) for row in read_steps(folder / cells.STEPS))
    return replace(cell, run=replace(cell.run, steps=steps))


# --- the arms ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arm:
    """One way to start a training.

    Args:
        name: `calibrated`, `given` or `untouched`.
        training: its run, but for the seed.
    """

    name: str
    training: TrainingConfig


def planned(
    name: str,
    changes: dict[str, Any],
    *,
    steps: int | None = None,
    horizon: int | None = None,
    compressed: bool = False,
) -> TrainingConfig:
    """The training of a trial: the first steps of a recipe's full run.

    Args:
        name: of a recipe.
        changes: fields of it to change.
        steps: of the trial; by default as many as the verdict needs.
        horizon: steps of the full run; by default the recipe's.
        compressed: fit the whole schedule into `steps` instead.

    Raises:
        UsageError: no such recipe, or values it cannot take.
    """
    full = recipe(name).replace(**changes)
    if horizon is not None:
        full = full.replace(steps=horizon)
    length = Clock(full).steps_for(RULES.decide_share) if steps is None else steps
    return full.replace(steps=length, horizon=max(full.steps, length), compressed=compressed)


def negatives_of(name: str, given: int | None, source: TextSource) -> int:
    """How many hard negatives a trial takes: those asked for, else the recipe's, as far as the pairs have them.

    Args:
        name: of the recipe.
        given: what was asked for.
        source: of the pairs, whose first one is looked at.

    Raises:
        UsageError: the recipe distils a teacher, and the pairs have no scores.
    """
    from headscale.readers import iterate_pairs

    wanted = recipe(name)
    first = None if source.pairs is None else next(iterate_pairs(source.pairs))
    if wanted.loss != "infonce" and (first is None or not first.scores):
        where = "the built-in pairs have" if first is None else f"`{source.pairs}` has"
        raise UsageError(
            f"the recipe `{name}` distils a teacher's scores, and {where} none",
            "give `--pairs` with `negatives` and `scores`, or a contrastive recipe: `--recipe st-mnrl`",
        )
    if given is not None:
        return given
    return 0 if first is None else min(wanted.negatives, len(first.negatives))


def arms_of(
    training: TrainingConfig,
    scale: float | None,
    *,
    mode: str = "untie",
    head_lr_multiplier: float = 1.0,
    shift: float = 0.0,
    name: str = "calibrated",
    control: bool = True,
) -> tuple[Arm, ...]:
    """The arm that is judged, and the untouched control after it: one recipe, differing in the head alone.

    Args:
        training: the recipe; its own constant and mode are put aside.
        scale: the constant, or None for the untouched arm alone.
        mode: `untie`, `fold` or `logits`.
        head_lr_multiplier: of the judged arm's head.
        shift: added to the judged arm's logits before the scale.
        name: of the judged arm.
        control: whether the untouched arm is run too.

    Raises:
        UsageError: another mode.
    """
    if mode not in SCALED_MODES:
        raise UsageError(f"`--mode {mode}` is none of {', '.join(SCALED_MODES)}", "see `headscale trial --help`")
    untouched = Arm("untouched", training.replace(scale=1.0, mode="none", head_lr_multiplier=1.0, shift=0.0))
    if scale is None:
        return (untouched,)
    head = {"scale": scale, "mode": mode, "head_lr_multiplier": head_lr_multiplier, "shift": shift}
    judged = Arm(name, training.replace(**head))
    return (judged, untouched) if control else (judged,)


def calibrated(
    name: str,
    bench: Bench,
    corpus: Corpus,
    training: TrainingConfig,
    reference: str,
    on_batch: Callable[[int, int], None] | None = None,
    *,
    shift: bool | None = None,
) -> Calibration:
    """What `calibrate` would choose, on texts cut as the training cuts them.

    Args:
        name: of the backbone.
        bench: where it is or will be in memory.
        corpus: of the training; its dev pairs are measured, or the first of its training pairs without any.
        training: gives the lengths.
        reference: the backbone or profile to match.
        on_batch: called with (batches done, batches in all).
        shift: whether the bias may be moved too, as in `Choice`.

    Raises:
        HeadscaleError: no constant is within reach.
    """
    from headscale.activations import CANDIDATES as BATCH
    from headscale.activations import Encoding
    from headscale.api import Loading, find_reference
    from headscale.calibration import Choice, choose
    from headscale.inspection import BUILT_IN_PAIRS, measure, texts_of

    pairs = (corpus.dev or corpus.train)[:BUILT_IN_PAIRS]
    texts = texts_of(pairs, "trial", Encoding(training.query_length, training.document_length, BATCH))
    found = find_reference(reference, texts, Loading(tell=bench.tell, on_batch=on_batch))
    calibration = choose(measure(bench.backbone(name), texts, on_batch=on_batch), found, Choice(shift=shift))
    if calibration.scale is None:
        raise HeadscaleError(
            f"no constant is within reach for `{name}`: {calibration.verdict.evidence}",
            "give one: `--scale 0.0625`, or `--scale none` for the untouched head",
        )
    return calibration


def result_of(backbone: str, arm: Arm, trained: Sequence[TrainedCell]) -> TrialResult:
    """An arm over its seeds; its verdict is the worst seed's."""
    return TrialResult(
        backbone=backbone,
        arm=arm.name,
        scale=arm.training.scale,
        mode=arm.training.mode,
        head_lr_multiplier=arm.training.head_lr_multiplier,
        cells=tuple(trained),
        verdict=worst([cell.verdict for cell in trained]),
    )


def lean(result: TrialResult) -> TrialResult:
    """The result without its step records, which stay in the logs."""
    return replace(result, cells=tuple(replace(cell, run=replace(cell.run, steps=())) for cell in result.cells))


def shown_steps(progress: Progress, steps: int) -> OnStep:
    """What a progress display shows of a run while it goes on."""
    from headscale.live import point_of

    def show(record: StepRecord, verdict: TrialVerdict) -> None:
        text = (
            f"loss {record.loss_over_ln_n:.2f} ln N, {record.active_dims_query:.0f}/{record.active_dims_document:.0f} "
            f"dims, score sd {record.score_sd:.3g}, {verdict.word}"
        )
        progress(record.step + 1, steps, text, point_of(record))

    return show
