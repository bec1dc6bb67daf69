"""Figures show the data they are given, redraw the same, and refuse with one sentence."""

from __future__ import annotations

import re
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from headscale import figures
from headscale.errors import UsageError
from headscale.records import RunEnd, ScaleCurve, StepRecord, TrainingRun


def step(number: int, loss: float) -> StepRecord:
    values: dict[str, Any] = {f.name: 0.0 for f in fields(StepRecord)}
    return StepRecord(**{**values, "step": number, "loss_over_ln_n": loss, "skipped": False, "memory": 0})


def training(losses: list[float]) -> TrainingRun:
    end = RunEnd(len(losses), 1.0, 1.0, 0, 0, 1, {}, None)
    steps = tuple(step(i, loss) for i, loss in enumerate(losses))
    values: dict[str, Any] = {f.name: 0 for f in fields(TrainingRun)}
    return TrainingRun(**{**values, "config": {}, "status": "finished", "steps": steps, "end": end})


class WithCurve:
    """What `curves_of_constants` needs of an inspection."""

    def __init__(self, name: str, losses: tuple[float, ...]) -> None:
        self.name = name
        flat = tuple(0.0 for _ in losses)
        known = {f.name: flat for f in fields(ScaleCurve)}
        scales = tuple(2.0**i for i in range(-len(losses) // 2, len(losses) - len(losses) // 2))
        self.curve = ScaleCurve(**{**known, "scale": scales[: len(losses)], "loss_over_ln_n": losses})


def test_lines_hold_the_data_and_seeds_become_a_band() -> None:
    arms = [("reference", [training([3.0, 2.0, 0.5])]), ("failing", [training([9, 4, 1]), training([8, 6, 1])])]
    axes = figures.training_curves(arms, title="t", subtitle="s", reference="reference").axes[0]
    first, second = axes.get_lines()[:2]
    assert list(first.get_ydata()) == [3.0, 2.0, 0.5]
    assert first.get_color() == figures.REFERENCE_COLOUR
    assert list(second.get_ydata()) == [8.5, 5.0, 1.0]
    assert len(axes.collections) == 1
    assert axes.get_yscale() == "log"
    assert {"reference", "failing"} <= {t.get_text() for t in axes.texts}


def test_labels_of_lines_that_end_together_do_not_overlap(tmp_path: Path) -> None:
    arms = [(f"arm {i}", [training([2.0, 1.0 + i * 1e-4])]) for i in range(5)]
    figure = figures.training_curves(arms)
    figures.save(figure, tmp_path / "a.png")
    boxes = sorted((t.get_window_extent() for t in figure.axes[0].texts), key=lambda b: b.y0)
    assert all(low.y1 <= high.y0 + 1 for low, high in pairwise(boxes))


def test_non_finite_steps_leave_a_gap() -> None:
    figure = figures.training_curves([("a", [training([2.0, float("nan"), 1.0])])])
    assert len(figure.axes[0].get_lines()[0].get_ydata()) == 3


def test_the_same_records_draw_the_same_file(tmp_path: Path) -> None:
    for name in ("a", "b"):
        figures.save(figures.training_curves([("arm", [training([2.0, 1.0])])]), tmp_path / f"{name}.svg")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_svg_text_stays_text(tmp_path: Path) -> None:
    figures.save(figures.curves_of_constants([WithCurve("one-backbone", (9.0, 1.2, 1.0))]), tmp_path / "a.svg")  # type: ignore[list-item]
    assert re.search(r"<text[^>]*>\s*one-backbone", (tmp_path / "a.svg").read_text())


def test_nothing_to_draw_is_one_sentence() -> None:
    empty = WithCurve("x", (1.0,))
    empty.curve = None  # type: ignore[assignment]
    with pytest.raises(UsageError, match="nothing to draw"):
        figures.curves_of_constants([empty])  # type: ignore[list-item]


def test_unknown_suffixes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="ends in none of"):
        figures.save(figures.training_curves([("a", [training([1.0])])]), tmp_path / "a.gif")
    assert not list(tmp_path.iterdir())


def test_no_pyplot() -> None:
    import subprocess
    import sys

    code = (
        "import sys\nsys.path.insert(0, 'tests')\nfrom test_figures import training\nfrom headscale import figures\n"
        "figures.training_curves([('a', [training([1.0, 2.0])])])\nassert 'matplotlib.pyplot' not in sys.modules"
    )
    root = Path(__file__).parents[1]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root, timeout=60)
