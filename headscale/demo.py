"""`demo`: the whole story on the bundled backbones, offline and on a CPU.

Inspect both, calibrate the failing one against the reference, train it untouched, with a constant alone and as
calibrated, beside the untouched reference, draw the loss curves, and say in one sentence what happened.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from headscale import bundled
from headscale.constants import ratio_text
from headscale.records import Calibration, Record, TrainingRun
from headscale.render import INSPECT_COLUMNS, Column, Voice, show, show_targets

if TYPE_CHECKING:
    from headscale.backbone import Backbone
    from headscale.recipes import TrainingConfig

PACKAGES = ("stdlib", "numpy", "pandas", "scipy")  # scanned in seconds; torch alone takes half a minute
STEPS = 100  # collapse and rescue both show within it at this learning rate (reports/study.md)
CANDIDATES = 500  # test pairs that are ranked at the end
QUERY_LENGTH, DOCUMENT_LENGTH = 16, 48
REFERENCE = f"{bundled.PREFIX}{bundled.REFERENCE}"
FAILING = f"{bundled.PREFIX}{bundled.FAILING}"
FIGURE = "loss.svg"


@dataclass(frozen=True)
class Arm(Record):
    """One way of starting the training, and its runs over seeds."""

    name: str
    backbone: str
    scale: float
    head_lr_multiplier: float
    shift: float
    runs: tuple[TrainingRun, ...]

    @property
    def loss(self) -> float:
        """Mean over seeds of the loss over ln N at the end."""
        return _mean([run.end.tail["loss_over_ln_n"] for run in self.runs])

    @property
    def active_dims(self) -> float:
        """Mean over seeds of the documents' active dims at the end."""
        return _mean([run.end.tail["active_dims_document"] for run in self.runs])

    @property
    def mrr(self) -> float:
        """Mean over seeds of MRR@10 on the test pairs."""
        return _mean([run.end.ranking.mrr_at_10 if run.end.ranking else None for run in self.runs])

    @property
    def spread(self) -> str:
        """MRR@10 as mean ± sd over seeds, without the sd where there is one."""
        import statistics

        values = [run.end.ranking.mrr_at_10 or 0.0 for run in self.runs if run.end.ranking]
        if len(values) < 2:
            return f"{self.mrr:.3f}"
        return f"{self.mrr:.3f} ± {statistics.stdev(values):.3f}"


ARM_COLUMNS = (
    Column("arm", lambda a: a.name),
    Column("shift", lambda a: a.shift),
    Column("scale [x]", lambda a: a.scale, as_text=ratio_text),
    Column("head lr [x]", lambda a: a.head_lr_multiplier),
    Column("loss at step 0 [ln N]", lambda a: _mean([run.steps[0].loss_over_ln_n for run in a.runs])),
    Column("loss at the end [ln N]", lambda a: a.loss),
    Column("active d [dims]", lambda a: a.active_dims),
    Column("MRR@10", lambda a: a.spread),
)


def demo_config(seed: int = 0) -> TrainingConfig:
    """The demo's recipe: a whole, very short training, so that warmup, ramp and decay all happen.

    In-batch negatives, FLOPS regularization with a quadratic ramp over a third of the steps and AdamW are the
    recipe of arXiv 2107.05720 and of sentence-transformers; batch, lengths and learning rate suit tiny backbones.
    """
    from headscale.recipes import TrainingConfig

    return TrainingConfig(
        steps=STEPS,
        batch_size=32,
        lr=3e-4,
        weight_decay=0.01,
        lambda_query=3e-3,
        lambda_document=1e-3,
        query_length=QUERY_LENGTH,
        document_length=DOCUMENT_LENGTH,
        seed=seed,
        device="cpu",
    )


def run_demo(output: Path, voice: Voice, *, seeds: int = 1, as_json: bool = False) -> int:
    """Run the demo and print it.

    Args:
        output: the folder for cells, figure and result.
        voice: what is said on stderr.
        seeds: trainings of each arm.
        as_json: print one JSON object instead of tables.

    Returns:
        The exit code: 0 where the calibrated arm ends below the untouched one, else 1.
    """
    from headscale import figures
    from headscale.api import Loading
    from headscale.render import write_document

    with _one_thread():
        calibration, scaled, backbones = _inspect_and_calibrate(Loading(tell=voice.note), voice, silent=as_json)
        arms = train_arms(_starts(calibration, scaled), backbones, output, voice, range(seeds))
    sentence = conclusion(arms)
    figure = figures.training_curves(
        [(arm.name, arm.runs) for arm in arms],
        title=f"{STEPS} SPLADE steps, batch 32, in-batch negatives, {seeds} seed{'s' * (seeds > 1)}",
        subtitle=f"{bundled.FAILING}, calibrated: {_what(arms[-1])}",
        reference=arms[0].name,
    )
    figures.save(figure, output / FIGURE)
    write_document("demo", [calibration, *arms], [], output / "demo.json")
    if as_json:
        write_document("demo", [calibration, *arms], [])
    else:
        print("\nTraining")
        show(arms, ARM_COLUMNS)
        print(f"\nThe loss curves are in {output / FIGURE}.\n{sentence}")
    return 0 if arms[-1].loss < arms[1].loss else 1


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """One thread inside: on models this small two are no faster, and sums then do not depend on how many there are."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _inspect_and_calibrate(
    loading: object, voice: Voice, *, silent: bool
) -> tuple[Calibration, Calibration, dict[str, Backbone]]:
    from headscale.api import Loading
    from headscale.calibration import Choice, choose
    from headscale.inspection import built_in_texts, measure
    from headscale.profiles import Reference, profile_of
    from headscale.render import inspect_rows

    assert isinstance(loading, Loading)
    texts = built_in_texts(pairs=64, query_length=QUERY_LENGTH, document_length=DOCUMENT_LENGTH, tell=loading.tell)
    found = {}
    for name in (REFERENCE, FAILING):
        with voice.progress(f"inspecting {name}") as bar:
            opened = replace(loading, on_batch=bar).open(name)
            found[name] = measure(opened, texts, is_reference=name == REFERENCE, on_batch=bar)
    profile = profile_of(found[REFERENCE].inspection, origin="bundled")
    reference = Reference(profile, "bundled")
    calibration = choose(found[FAILING], reference)
    scaled = choose(found[FAILING], reference, Choice(shift=False))
    if not silent:
        print("Inspection, untouched")
        show(inspect_rows([m.inspection for m in found.values()], profile), INSPECT_COLUMNS)
        print("\nCalibration")
        show_targets([calibration])
        for line in (calibration.disagreement, *calibration.advice):
            print(line)
    backbones = {name: m.backbone for name, m in found.items() if m.backbone is not None}
    return calibration, scaled, backbones


Start = tuple[str, str, Calibration | None]
"""The name of an arm, its backbone, and what is done to its head, if anything is."""


def _starts(calibration: Calibration, scaled: Calibration) -> tuple[Start, ...]:
    """The reference first, the untouched head second, the calibrated one last."""
    return (
        (f"{bundled.REFERENCE}, untouched", REFERENCE, None),
        (f"{bundled.FAILING}, untouched", FAILING, None),
        (f"{bundled.FAILING}, scaled only", FAILING, scaled),
        (f"{bundled.FAILING}, calibrated", FAILING, calibration),
    )


def train_arms(
    starts: Sequence[Start], backbones: dict[str, Backbone], output: Path, voice: Voice, seeds: Sequence[int]
) -> list[Arm]:
    """Train every arm over the same pairs and seeds; finished runs are reused."""
    from headscale.trials import Bench, TextSource, configuration_of, run_cell, shown_steps

    source = TextSource(packages=PACKAGES, candidates=CANDIDATES, rank_dev=False)
    bench = Bench(voice.note, backbones=dict(backbones))
    corpus = bench.corpus(source)
    arms = []
    for name, backbone, chosen in starts:
        given = {} if chosen is None else {"scale": chosen.scale or 1.0, "shift": chosen.shift}
        multiplier = 1.0 if chosen is None else chosen.head_lr_multiplier
        runs = []
        for seed in seeds:
            config = demo_config(seed)
            if chosen is not None:
                config = config.replace(mode="untie", head_lr_multiplier=multiplier, **given)
            configuration = configuration_of(backbone, config, source, corpus)
            with voice.progress(f"training {name}, seed {seed}") as bar:
                cell = run_cell(configuration, output, bench=bench, on_step=shown_steps(bar, config.steps))
            runs.append(cell.run)
        arms.append(Arm(name, backbone, given.get("scale", 1.0), multiplier, given.get("shift", 0.0), tuple(runs)))
    return arms


def conclusion(arms: Sequence[Arm]) -> str:
    """What happened, in one sentence with its numbers."""
    reference, untouched, *repaired = arms
    ranking = untouched.runs[0].end.ranking
    chance = ranking.chance_mrr_at_10 if ranking else None
    repairs = "; ".join(f"{_what(arm)} before training, at {_ended(arm)}" for arm in repaired)
    return (
        f"Untouched, {bundled.FAILING} ended at {_ended(untouched)}; {repairs}; the reference, untouched, at "
        f"{_ended(reference)}. Chance is a loss of 1.00 x ln 32 and MRR@10 {chance or 0.0:.3f}."
    )


def _what(arm: Arm) -> str:
    """What was done to the head, in words."""
    parts = [f"its logits shifted by {arm.shift:.4g}"] if arm.shift else []
    parts += [f"multiplied by {ratio_text(arm.scale)}"] if arm.scale != 1 or not parts else []
    return " and ".join(parts)


def _ended(arm: Arm) -> str:
    return f"a loss of {arm.loss:.2f} x ln 32 and MRR@10 {arm.spread}"


def _mean(values: Sequence[float | None]) -> float:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else float("nan")
