"""Figures show the data they are given, redraw the same, and refuse with one sentence."""

from __future__ import annotations

import json
import re
from dataclasses import fields, replace
from functools import cache
from io import StringIO
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from made_results import GOLDEN, LONG, golden, many, ranked

from headscale import figures, tables
from headscale.errors import HeadscaleError, UsageError
from headscale.figures import FIGURES
from headscale.figures.labels import spread
from headscale.figures.style import COLOURS, FOREGROUND, MUTED, distinct, shorten
from headscale.records import RunEnd, ScaleCurve, StepRecord, TrainingRun
from headscale.results import Results


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


# --- figures of saved results --------------------------------------------------------------------------------------

KINDS = pytest.mark.parametrize("kind", FIGURES, ids=[kind.key for kind in FIGURES])


def texts(figure: Any) -> list[Any]:
    """Every text that a reader sees: titles, labels, ticks within the axes, annotations."""
    found = list(figure.texts)
    for ax in figure.axes:
        if not ax.axison:
            continue
        found += [*ax.texts, ax.title, ax._left_title, ax.xaxis.label, ax.yaxis.label]
        for axis, (low, high) in ((ax.xaxis, sorted(ax.get_xlim())), (ax.yaxis, sorted(ax.get_ylim()))):
            ticks = axis.get_major_ticks()
            found += [t.label1 for t in ticks if low <= t.get_loc() <= high and t.label1.get_visible()]
    return [t for t in found if t.get_text().strip() and t.get_visible()]


def overlapping(figure: Any) -> list[tuple[str, str]]:
    """Pairs of texts whose boxes share more than a pixel each way."""
    from matplotlib.text import Text

    figure.draw_without_rendering()
    boxes = [(t.get_text(), Text.get_window_extent(t)) for t in texts(figure)]  # an annotation's own holds its arrow
    return [
        (a, b)
        for (a, one), (b, two) in combinations(boxes, 2)
        if min(one.x1, two.x1) - max(one.x0, two.x0) > 1 and min(one.y1, two.y1) - max(one.y0, two.y0) > 1
    ]


@cache
def golden_figure(key: str) -> Any:
    (kind,) = (k for k in FIGURES if k.key == key)
    return kind.draw(kind.table(golden()))


@cache
def golden_svg(key: str, prefix: str = "") -> str:
    return figures.to_svg(golden_figure(key), prefix=prefix)


def broken(results: Results) -> Results:
    """The same with numbers that are not finite: rankings, norms."""
    trainings = [ranked(t, float("nan")) if i % 3 == 0 else t for i, t in enumerate(results.trainings)]
    trainings = [ranked(t, t.cell.run.end.ranking.mrr_at_10, active_dims_document=0.0) if i % 4 == 1 else t  # type: ignore[union-attr]
                 for i, t in enumerate(trainings)]  # fmt: skip
    weights = replace(results.inspections[0].weights, frobenius=float("inf"))
    inspections = (replace(results.inspections[0], weights=weights), *results.inspections[1:])
    return replace(results, trainings=tuple(trainings), inspections=inspections)


CASES: dict[str, Any] = {
    "golden": golden,
    "seven": lambda: many(7),
    "two hundred": lambda: many(200),
    "long names": lambda: many(5, LONG.format),
    "not finite": lambda: broken(golden()),
    "one seed": lambda: replace(golden(), trainings=tuple(t for t in golden().trainings if t.training["seed"] == 0)),
}


@KINDS
@pytest.mark.parametrize("case", CASES)
def test_nothing_overlaps_and_every_axis_has_a_unit(kind: figures.Kind, case: str) -> None:
    figure = kind.draw(kind.table(CASES[case]()))
    assert overlapping(figure) == []
    for ax in figure.axes:
        if not ax.axison:
            continue
        below = [a for a in figure.axes if a is not ax and a.get_shared_x_axes().joined(a, ax)]
        if ax.get_xlabel() or not below:
            assert re.search(r"\[.+\]", ax.get_xlabel()), ax.get_xlabel()
        assert re.search(r"\[.+\]", ax.get_ylabel()), ax.get_ylabel()


@KINDS
def test_a_single_point_is_drawn_or_said(kind: figures.Kind) -> None:
    one = replace(golden(), trainings=golden().trainings[:1], inspections=golden().inspections[:1], calibrations=())
    if kind.key == "sensitivity":  # one constant shows none
        with pytest.raises(HeadscaleError, match="more than one constant"):
            kind.draw(kind.table(one))
    else:
        assert overlapping(kind.draw(kind.table(one))) == []


@KINDS
def test_what_is_missing_is_one_sentence_with_a_command(kind: figures.Kind) -> None:
    with pytest.raises(HeadscaleError) as error:
        kind.draw(kind.table(Results()))
    assert "\n" not in error.value.message
    assert "headscale " in error.value.hint


@KINDS
def test_a_figure_of_the_golden_table_is_the_same_figure(kind: figures.Kind) -> None:
    kept = pd.read_csv(StringIO((GOLDEN / f"{kind.key}.csv").read_text()))
    words = kept.select_dtypes(exclude="number").columns
    kept[words] = kept[words].astype(object).where(kept[words].notna(), other=None)
    for name in {"recipe", "verdict", "interval"} & set(kept.columns):
        kept[name] = kept[name].fillna("")
    assert figures.to_svg(kind.draw(kept)) == golden_svg(kind.key)


def test_a_figure_is_the_same_in_another_process(tmp_path: Path) -> None:
    import hashlib
    import os
    import subprocess
    import sys

    code = (
        "import hashlib, sys\nsys.path.insert(0, 'tests')\nfrom made_results import golden\n"
        "from headscale.figures import FIGURES, to_svg\n"
        "for k in FIGURES: print(hashlib.sha256(to_svg(k.draw(k.table(golden()))).encode()).hexdigest())"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    found = subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1], timeout=120,
                           capture_output=True, text=True, env=environment)  # fmt: skip
    here = [hashlib.sha256(golden_svg(k.key).encode()).hexdigest() for k in FIGURES]
    assert found.stdout.split() == here


@KINDS
def test_figures_draw_into_axes_that_are_given(kind: figures.Kind) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(16, 7))
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    right.plot([0, 1], [0, 1])
    assert kind.draw(kind.table(golden()), left) is figure
    assert len(right.get_lines()) == 1
    svg = figures.to_svg(figure)
    assert len(svg) > 5000


@KINDS
def test_svgs_are_small_plain_and_without_a_date(kind: figures.Kind) -> None:
    from xml.etree import ElementTree

    svg = golden_svg(kind.key, kind.key)
    ElementTree.fromstring(svg)
    assert svg.startswith("<svg")
    assert len(svg) < 100_000
    assert not re.search(r"\d{4}-\d{2}-\d{2}|<metadata|<image", svg)
    ids = re.findall(r'id="([^"]+)"', svg)
    assert len(ids) == len(set(ids))
    assert all(name.startswith(f"{kind.key}-") for name in ids)
    assert set(re.findall(r'(?:href="|url\()#([^")]+)', svg)) <= set(ids)
    assert re.search(r"<text[^>]*>[^<]*seed", svg) or kind.key == "anatomy"


@KINDS
def test_colours_are_those_that_a_page_can_replace(kind: figures.Kind) -> None:
    svg = golden_svg(kind.key)
    used = {c.lower() for c in re.findall(r"#[0-9a-fA-F]{6}", re.sub(r'(?:href="|url\()#[^")]+', "", svg))}
    assert used <= {c.lower() for c in (FOREGROUND, MUTED, *COLOURS)}


def test_rounding_moves_nothing_by_more_than_a_twentieth_of_a_point() -> None:
    from headscale.figures.style import _shortened

    path = "M 12.3456 -7.8912 L 1000.05 0.04 z"
    numbers = [float(n) for n in re.findall(r"-?[\d.]+", path)]
    after = [float(n) for n in re.findall(r"-?[\d.]+", _shortened(path))]
    assert np.abs(np.array(numbers) - after).max() <= 0.0501


def test_points_hold_the_table() -> None:
    data = tables.norm_effectiveness(golden())
    (ax,) = figures.draw_norm_effectiveness(data).axes
    marked = [line for line in ax.get_lines() if line.get_marker() not in ("None", "_")]
    points = [zip(line.get_xdata(), line.get_ydata(), strict=True) for line in marked]
    drawn = {(round(float(x), 9), round(float(y), 9)) for pairs in points for x, y in pairs}
    assert {(round(r["norm"], 9), round(r["value"], 9)) for r in data.to_dict("records")} <= drawn


def test_figure_one_gives_the_correlation_from_five_backbones_on() -> None:
    def said(count: int) -> str:
        figure = figures.draw_norm_effectiveness(tables.norm_effectiveness(many(count)))
        return " ".join(t.get_text() for t in figure.texts)

    assert "no rank correlation: 4 untouched backbones, fewer than 5" in said(4)
    found = tables.rank_correlation(tables.norm_effectiveness(many(5)))
    assert found is not None
    assert f"Spearman's rho {found.rho:.2f}" in said(5)


def test_another_metric_recipe_or_sparsity_can_be_asked_for() -> None:
    data = tables.tradeoff(golden())
    assert "FLOPS" in figures.draw_tradeoff(data, sparsity="flops_cost").axes[0].get_xlabel()
    with pytest.raises(UsageError, match="`dims` is none of"):
        figures.draw_tradeoff(data, sparsity="dims")
    with pytest.raises(HeadscaleError):
        figures.draw_tradeoff(data, metric="BEIR")


def test_curves_of_a_run_that_goes_on() -> None:
    results = golden()
    running = tuple(replace(t, cell=None, status="running") for t in results.trainings)
    figure = figures.draw_curves(tables.curves(Results(trainings=running)))
    assert "no verdict yet" in " ".join(t.get_text() for t in figure.texts)
    assert overlapping(figure) == []


def test_curves_without_a_finite_number(tmp_path: Path) -> None:
    lines = [json.dumps({"step": i, "loss_over_ln_n": None, "active_dims_document": 0.0}) + "\n" for i in range(5)]
    (tmp_path / "steps.jsonl").write_text("".join(lines))
    dead = replace(golden().trainings[0], folder=str(tmp_path))
    figure = figures.draw_curves(tables.curves(Results(trainings=(dead,))))
    assert overlapping(figure) == []
    assert "<svg" in figures.to_svg(figure)


def test_published_figures_are_drawn_beside_the_inspected_norms() -> None:
    inspections = many(6).inspections
    values = [50 - 5 * np.log(i.weights.frobenius) for i in inspections]
    published = pd.DataFrame({"backbone": [i.name for i in inspections], "metric": "BEIR-13", "value": values})
    figure = figures.draw_norm_effectiveness(tables.norm_effectiveness(Results(inspections), published))
    said = " ".join(t.get_text() for t in figure.texts)
    assert "rho -1.00" in said
    assert figure.axes[0].get_ylabel() == "BEIR-13 [points]"
    assert {"backbone-000", "backbone-005"} <= {t.get_text().rsplit("/", 1)[-1] for t in figure.axes[0].texts}
    assert overlapping(figure) == []


@pytest.mark.parametrize(("low", "high"), [(35.0, 35.9), (2.1, 4.5), (0.3, 7.0), (1e-3, 2e4), (900, 1100)])
def test_a_log_axis_has_labels_however_short_or_long(low: float, high: float) -> None:
    from matplotlib.figure import Figure

    from headscale.figures.points import log_axis

    figure = Figure()
    ax = figure.subplots()
    ax.plot([low, high], [0, 1])
    log_axis(ax)
    figure.draw_without_rendering()
    left, right = ax.get_xlim()
    shown = [t.label1.get_text() for t in ax.xaxis.get_major_ticks() if left <= t.get_loc() <= right]
    assert 2 <= len(shown) <= 12
    assert len(set(shown)) == len(shown)


# --- names and places ----------------------------------------------------------------------------------------------


def test_short_names_stay_different() -> None:
    names = [LONG.format(i) for i in range(12)]
    short = distinct(names, 24)
    assert len(set(short.values())) == 12
    assert max(map(len, short.values())) <= 24
    assert distinct(names[::-1], 24) == short
    assert shorten("bundled:tiny-bert") == "tiny-bert"
    assert shorten("answerdotai/ModernBERT-base") == "answerdotai/ModernBERT-base"


def test_spread_is_the_nearest_in_the_least_squares() -> None:
    from scipy.optimize import minimize

    rng = np.random.default_rng(0)
    for _ in range(5):
        places = rng.uniform(0, 30, 6)
        found = np.array(spread(list(places), 4.0))
        order = np.argsort(places)
        rules = [{"type": "ineq", "fun": lambda v, i=i, j=j: v[j] - v[i] - 4.0} for i, j in pairwise(order)]
        best = minimize(lambda v, places=places: ((v - places) ** 2).sum(), places, constraints=rules, method="SLSQP")
        assert ((found - places) ** 2).sum() == pytest.approx(best.fun, abs=1e-4)
        assert np.diff(found[order]).min() >= 4.0 - 1e-9


# --- colours -------------------------------------------------------------------------------------------------------

# Machado, Oliveira and Fernandes (2009), severity 1, on linear RGB.
DEFICIENCIES = {
    "none": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}


def linear(colour: str) -> np.ndarray:
    values = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray) -> np.ndarray:
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    t = to_xyz @ rgb / to_xyz.sum(1)
    f = np.where(t > 216 / 24389, np.cbrt(t), (24389 / 27 * t + 16) / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("deficiency", DEFICIENCIES)
def test_the_colour_blind_tell_all_colours_apart(deficiency: str) -> None:
    seen = [lab(np.clip(DEFICIENCIES[deficiency] @ linear(c), 0, 1)) for c in (FOREGROUND, *COLOURS)]
    distances = [np.linalg.norm(a - b) for a, b in combinations(seen, 2)]
    assert min(distances) > 4 * 2.3  # 2.3 is a just noticeable difference (Mahy et al. 1994)


@pytest.mark.parametrize("colour", [*COLOURS[:3], MUTED])
@pytest.mark.parametrize("background", ["#ffffff", "#111111"])
def test_lines_stand_out_in_both_schemes(colour: str, background: str) -> None:
    weights = np.array([0.2126, 0.7152, 0.0722])
    bright, dark = sorted((weights @ linear(c) + 0.05 for c in (colour, background)), reverse=True)
    assert bright / dark >= 3.0  # WCAG 2.2, criterion 1.4.11
