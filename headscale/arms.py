"""The arms of a trial side by side: the head that is judged and the untouched control, over the same seeds."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from headscale.errors import UsageError
from headscale.profiles import DEFAULT_REFERENCE
from headscale.records import Calibration, TrialResult
from headscale.trials import (
    Arm,
    Bench,
    Corpus,
    OnStep,
    OnTrained,
    TextSource,
    arms_of,
    calibrated,
    configuration_of,
    result_of,
    run_cell,
    team_of,
)

if TYPE_CHECKING:
    from headscale.api import Loading
    from headscale.recipes import TrainingConfig

Watcher = Callable[[str, int], AbstractContextManager[OnStep | None]]
"""Given an arm's name and a seed: what is told of every step of that training, inside a `with`."""


@dataclass(frozen=True)
class Plan:
    """What a trial trains.

    Args:
        training: the first steps of a recipe's full run (`headscale.trials.planned`); its own constant, mode and
            seed are put aside.
        scale: the constant of the judged arm; "auto": the one that `calibrate` chooses; None: untouched alone.
        mode: where it is written, `untie`, `fold` or `logits`.
        shift: added to the judged arm's logits before the scale; None: the calibrated one, or 0 for a constant that is
            given.
        head_lr_multiplier: of the judged arm's head; None: the calibrated one, or 1 for a constant that is given.
        reference: what "auto" matches.
        seeds: trainings of each arm, 0 to seeds - 1, paired.
        control: train the untouched head too.
        stop_early: end a training once its verdict is certain.

    Raises:
        UsageError: another mode, or no seed.
    """

    training: TrainingConfig
    scale: float | Literal["auto"] | None = "auto"
    mode: str = "untie"
    shift: float | None = None
    head_lr_multiplier: float | None = None
    reference: str = DEFAULT_REFERENCE
    seeds: int = 1
    control: bool = True
    stop_early: bool = True

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise UsageError(f"`seeds` must be positive, not {self.seeds}", "give how many trainings each arm has")
        self.arms(None)  # refuses a mode that does not exist

    def arms(self, found: Calibration | None) -> tuple[Arm, ...]:
        """The judged arm and its control, with the constant of a calibration where the plan has none."""
        scale, multiplier, shift = self.scale, self.head_lr_multiplier, self.shift
        if scale == "auto":
            scale = 1.0 if found is None else found.scale
            multiplier = multiplier or (None if found is None else found.head_lr_multiplier)
            shift = found.shift if shift is None and found is not None else shift
        return arms_of(
            self.training, scale, mode=self.mode, head_lr_multiplier=multiplier or 1.0, shift=shift or 0.0,
            name="calibrated" if self.scale == "auto" else "given", control=self.control,
        )  # fmt: skip


def run_trial(
    name: str,
    plan: Plan,
    source: TextSource,
    run: Path,
    *,
    bench: Bench,
    loading: Loading | None = None,
    watch: Watcher | None = None,
    on_trained: OnTrained | None = None,
    identity: Any = None,
    force: bool = False,
) -> tuple[TrialResult, ...]:
    """Train every arm with every seed, each a cell of the run folder; finished ones are read from there.

    Args:
        name: of the backbone, on the bench or to be loaded onto it.
        plan: what is trained.
        source: of the texts, on the bench or to be read onto it.
        run: the run folder.
        bench: what is in memory, and the team of processes.
        loading: the revision of a hub id, and whether its own code may run.
        watch: what is told of every step.
        on_trained: called with model, tokenizer and training of the judged arm's first seed once it is trained.
        identity: of a model that only the bench has; by default what the name stands for.
        force: train finished cells again.

    Returns:
        a result per arm, the judged one first.

    Raises:
        HeadscaleError: a training cannot be run.
        KeyboardInterrupt: the running cell is kept as interrupted.
    """
    team = team_of(bench)
    revision, trust = (None, False) if loading is None else (loading.revision, loading.trust_remote_code)
    with team.agreed():
        team.check(plan.training.batch_size)
        bench.backbone(name, revision, trust_remote_code=trust)
    corpus = _corpus_of_all(source, bench)
    found = None
    if plan.scale == "auto":
        if bench.tell is not None:
            bench.tell(f"calibrating {name} on the trial's texts")
        found = team.first_does(lambda: calibrated(name, bench, corpus, plan.training, plan.reference))
        if bench.tell is not None:
            shifted = f" after a shift by {found.shift:.4g}" if found.shift else ""
            bench.tell(f"the constant is {found.scale:g}{shifted}, by {found.match}: {found.match_reason}")
    arms = plan.arms(found)
    trained: dict[str, list[Any]] = {arm.name: [] for arm in arms}
    for seed in range(plan.seeds):
        for arm in arms:
            describe = partial(
                configuration_of, name, arm.training.replace(seed=seed), source, corpus, revision=revision,
                trust_remote_code=trust, stop_early=plan.stop_early, identity=identity,
            )  # fmt: skip
            configuration = team.first_does(describe)
            if team.size > 1:  # dropout is drawn by each process, so that another number of them is another training
                configuration["processes"] = team.size
            keep = on_trained if seed == 0 and arm is arms[0] else None
            with (watch or _unwatched)(arm.name, seed) as on_step:
                cell = run_cell(configuration, run, bench=bench, on_step=on_step, on_trained=keep, force=force)
            trained[arm.name].append(cell)
    return tuple(result_of(name, arm, trained[arm.name]) for arm in arms)


def fingerprint_of(model: Any) -> str:
    """16 hexadecimal digits that change with any weight of a model in memory."""
    total = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        total.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\0".encode())
        total.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return total.hexdigest()[:16]


def _corpus_of_all(source: TextSource, bench: Bench) -> Corpus:
    """The texts on every process, which must have found the same; the first reads them first and fills the cache."""
    team = team_of(bench)
    expected = team.first_does(lambda: bench.corpus(source).fingerprints())
    with team.agreed():
        corpus = bench.corpus(source)
        if corpus.fingerprints() != expected:
            raise UsageError(
                f"process {team.rank} reads other texts than the first one",
                "give `--pairs` that are the same on every machine",
            )
    return corpus


def _unwatched(_arm: str, _seed: int) -> AbstractContextManager[OnStep | None]:
    return contextlib.nullcontext()
