"""Tables are those of the golden cells, and every number in them agrees with an oracle."""

from __future__ import annotations

import itertools
import json
import math
import os
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from made_results import GOLDEN, golden, many, ranked, renamed
from scipy import stats
from test_results import evaluation

from headscale import tables
from headscale.errors import NotFoundError, UnreadableError
from headscale.figures import FIGURES
from headscale.records import ROW_NORM_QUANTILES
from headscale.results import Results

NAMES = tuple(kind.key for kind in FIGURES)


def read(path: Path) -> pd.DataFrame:
    return pd.read_csv(path, keep_default_na=True)


def as_read(frame: pd.DataFrame) -> pd.DataFrame:
    return pd.read_csv(StringIO(frame.to_csv(index=False)))


# --- golden --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*FIGURES, None], ids=[*NAMES, "summary"])
def test_golden_tables(kind: object) -> None:
    name, table = (kind.key, kind.table) if kind else ("summary", tables.summary)  # type: ignore[attr-defined]
    found, path = table(golden()), GOLDEN / f"{name}.csv"
    if os.environ.get("HEADSCALE_GOLDEN") == "write":
        path.write_text(found.to_csv(index=False))
    assert len(found)
    pd.testing.assert_frame_equal(as_read(found), read(path), rtol=1e-9)


def test_golden_folder_is_small() -> None:
    assert sum(f.stat().st_size for f in GOLDEN.rglob("*") if f.is_file()) < 400_000


@pytest.mark.parametrize("kind", FIGURES, ids=NAMES)
def test_nothing_gives_an_empty_table_with_its_columns(kind: object) -> None:
    found = kind.table(Results())  # type: ignore[attr-defined]
    assert found.empty
    assert set(kind.table(golden()).columns) == set(found.columns)  # type: ignore[attr-defined]


# --- seeds ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", [[0.4, 0.42, 0.39], [0.1, 0.3], [0.5] * 4, [0.2, 0.25, 0.21, 0.22, 0.3]])
def test_t_intervals(values: list[float]) -> None:
    mean, low, high, count = tables.t_interval(values)
    if len(set(values)) == 1:
        assert (low, high) == (values[0], values[0])
    else:
        expected = stats.t.interval(0.95, len(values) - 1, np.mean(values), stats.sem(values))
        assert (low, high) == pytest.approx((max(0, expected[0]), min(1, expected[1])), rel=1e-12)
    assert (mean, count) == (pytest.approx(np.mean(values)), len(values))


@pytest.mark.parametrize("values", [[], [math.nan], [0.3], [0.3, math.nan], [math.inf, 0.3]])
def test_no_interval_of_fewer_than_two_finite_values(values: list[float]) -> None:
    mean, low, high, count = tables.t_interval(values)
    assert math.isnan(low)
    assert math.isnan(high)
    assert count == sum(math.isfinite(v) for v in values)
    assert mean == 0.3 or (count == 0 and math.isnan(mean))


def test_missing_seeds_narrow_nothing_down() -> None:
    results = golden()
    lost = replace(results, trainings=results.trainings[1:])
    before, after = (tables.sensitivity(r).query("kind == 'point'").set_index("scale") for r in (results, lost))
    training = results.trainings[0]
    own = after[after["backbone"] == training.backbone].loc[training.training["scale"]]
    assert (own["seeds"], math.isnan(own["low"])) == (1, True)
    assert len(before) == len(after)


def test_seeds_without_a_finite_ranking_are_counted_apart() -> None:
    results = golden()
    broken = [ranked(t, math.nan) if t.training["seed"] == 1 else t for t in results.trainings]
    frame = tables.norm_effectiveness(replace(results, trainings=tuple(broken)))
    assert set(zip(frame["seeds"], frame["trainings"], strict=True)) == {(1, 2)}
    assert frame["value"].notna().all()


# --- recipes -------------------------------------------------------------------------------------------------------


def other_recipe(**changes: object) -> Results:
    """The golden trainings, and those of the failing backbone once more with another configuration."""
    results = golden()
    more = []
    for training in results.trainings:
        untouched = training.training["mode"] == "none"
        kept = {k: v for k, v in changes.items() if not (untouched and k in ("mode", "head_lr_multiplier"))}
        if kept:
            configuration = {**training.configuration, "training": {**training.training, **kept}}
            more.append(replace(training, configuration=configuration, key=f"x{training.key[1:]}"))
    return replace(results, trainings=(*results.trainings, *more))


def test_an_untouched_head_belongs_to_every_recipe_of_the_head() -> None:
    cells = tables.summary(other_recipe(head_lr_multiplier=1.0))
    assert set(cells["recipe"]) == {"untie, head lr 4x", "untie, head lr 1x"}
    for _, group in cells.groupby("recipe"):
        assert (group["arm"] == "untouched").sum() == 4
        assert (group["arm"] == "rescaled").sum() == 4


def test_another_learning_rate_is_another_recipe_for_all() -> None:
    cells = tables.summary(other_recipe(lr=1e-4))
    assert set(cells["recipe"]) == {"untie, head lr 4x", "untie, head lr 4x, lr 0.0001"}
    assert set(cells.groupby("recipe").size()) == {8}
    settings = dict(zip(cells["recipe"], cells["setting"], strict=True))
    assert "lr 0.0003" in settings["untie, head lr 4x"]
    assert "lr 0.0001" in settings["untie, head lr 4x, lr 0.0001"]


def test_what_does_not_decide_a_training_makes_no_recipe() -> None:
    cells = tables.summary(other_recipe(device="cuda", micro_batch=4, update_every=9))
    assert set(cells["recipe"]) == {"untie, head lr 4x"}


def test_a_constant_that_is_not_in_the_matrix_counts_in_the_norm() -> None:
    cells = tables.summary(other_recipe(mode="fold")).query("arm == 'rescaled'").set_index(["mode", "scale"])
    for scale in (1 / 64, 1 / 8):
        untied, folded = (float(cells.loc[(m, scale), "norm"].iloc[0]) for m in ("untie", "fold"))
        assert folded == pytest.approx(untied * scale)  # the golden cell's matrix is scaled already


def test_running_cells_have_rows_without_results() -> None:
    results = golden()
    running = replace(results.trainings[0], cell=None, status="running")
    cells = tables.summary(replace(results, trainings=(running, *results.trainings[1:]))).set_index("key")
    assert cells.loc[running.key, "status"] == "running"
    assert pd.isna(cells.loc[running.key, "mrr_test"])


# --- figure 1 ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [5, 8, 40])
def test_rank_correlation_against_scipy(count: int) -> None:
    data = tables.norm_effectiveness(many(count))
    found = tables.rank_correlation(data)
    assert found is not None
    own = data[data["own_point"]]
    assert own["backbone"].is_unique
    assert set(own["scale"]) == {1.0}
    rho = stats.spearmanr(own["norm"], own["value"]).statistic
    error = math.sqrt((1 + rho**2 / 2) / (count - 3))  # Bonett and Wright (2000), equation 4
    low, high = np.tanh(np.arctanh(rho) + error * stats.norm.ppf([0.025, 0.975]))
    assert (found.rho, found.low, found.high) == pytest.approx((rho, low, high), abs=1e-6)
    assert found.backbones == count


def test_no_rank_correlation_below_five_backbones_or_of_ties() -> None:
    assert tables.rank_correlation(tables.norm_effectiveness(many(4))) is None
    data = tables.norm_effectiveness(many(6))
    assert tables.rank_correlation(data.assign(value=0.5)) is None
    perfect = data.assign(value=data["norm"])
    found = tables.rank_correlation(perfect)
    assert found is not None
    assert found.rho == pytest.approx(1.0)
    assert found.low < found.high <= 1.0


def test_norms_come_from_the_inspection_and_the_constant() -> None:
    frame = tables.norm_effectiveness(golden())
    weights = {i.name: i.weights for i in golden().inspections}
    for row in frame.to_dict("records"):
        assert row["norm"] == pytest.approx(weights[row["backbone"]].frobenius * row["scale"], rel=1e-6)
    bare = tables.norm_effectiveness(replace(golden(), inspections=(), calibrations=()))
    np.testing.assert_allclose(bare["norm"], frame["norm"], rtol=1e-5)  # theirs are float32 sums
    other = tables.norm_effectiveness(golden(), norm="row_norm_mean")
    for row in other.to_dict("records"):
        assert row["norm"] == pytest.approx(weights[row["backbone"]].row_norm_mean * row["scale"])


def test_evaluations_are_joined_by_name_and_by_what_was_written() -> None:
    results = golden()
    (calibration,) = results.calibrations
    from headscale.records import Written

    written = Written("out/calibrated", "untie", "", 1 / 32, True, 0.0, (), (), (), (), (), {}, (), ())
    evaluations = (evaluation("bundled:tiny-modernbert", 0.1), evaluation("out/calibrated", 0.5))
    found = replace(results, calibrations=(replace(calibration, written=written),), evaluations=evaluations)
    frame = tables.norm_effectiveness(found).query("source == 'evaluation'").set_index("scale")
    norm = results.inspections[1].weights.frobenius
    assert dict(frame["norm"]) == pytest.approx({1.0: norm, calibration.scale: norm * calibration.scale})
    assert set(frame["backbone"]) == {"bundled:tiny-modernbert"}
    assert list(frame["metric"]) == ["nDCG@10"] * 2
    assert (frame.loc[1.0, "low"], frame.loc[1.0, "high"]) == pytest.approx((0.0, 0.2))
    assert list(frame["own_point"]) == [True, False]


# --- published figures ---------------------------------------------------------------------------------------------


def csv(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "published.csv"
    file.write_text(text, encoding="utf-8")
    return file


def test_published_figures(tmp_path: Path) -> None:
    text = "backbone,metric,value,note\nTiny-BERT,BEIR,45.2,x\nTiny-BERT,BEIR,45.8,\nother,BEIR,30,\n"
    published = tables.read_published(csv(tmp_path, text))
    inspections = tuple(replace(i, name=i.name.replace("bundled:", "org/")) for i in golden().inspections)
    frame = tables.norm_effectiveness(Results(inspections, references=("org/tiny-bert",)), published)
    own = frame.set_index("backbone").loc["org/tiny-bert"]
    expected = stats.t.interval(0.95, 1, 45.5, stats.sem([45.2, 45.8]))
    assert (own["value"], own["seeds"], own["reference"]) == (pytest.approx(45.5), 2, True)
    assert (own["low"], own["high"]) == pytest.approx((expected[0], min(expected[1], 45.8)))
    assert own["norm"] == golden().inspections[0].weights.frobenius
    assert math.isnan(frame.set_index("backbone").loc["other", "norm"])


def test_published_constants(tmp_path: Path) -> None:
    published = tables.read_published(csv(tmp_path, "backbone,metric,value,scale\na,m,1,0.0625\na,m,2,\n"))
    assert list(published["scale"]) == [0.0625, 1.0]


def test_all_bad_rows_are_reported_with_their_numbers(tmp_path: Path) -> None:
    text = "backbone,metric,value\na,m,1\n,m,2\nb,m,high\nc,,3\nd,m,nan\ne,m\n"
    with pytest.raises(UnreadableError) as error:
        tables.read_published(csv(tmp_path, text))
    said = error.value.message
    assert "row 2" not in said
    for part in ("row 3 has no backbone", "row 4: value `high`", "row 5 has no metric", "row 6: value `nan`", "row 7:"):
        assert part in said


@pytest.mark.parametrize(
    ("text", "said"),
    [("a,b\n1,2\n", "lacks the columns `backbone`, `metric`, `value`"), ("backbone,metric,value\n", "it has no row")],
)
def test_no_such_table(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(UnreadableError, match=said):
        tables.read_published(csv(tmp_path, text))
    with pytest.raises(NotFoundError):
        tables.read_published(tmp_path / "none.csv")


# --- figure 2 ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("table", [tables.norm_effectiveness, tables.tradeoff, tables.sensitivity])
def test_trainings_can_be_shown_by_ndcg(table: Any) -> None:
    data = table(golden(), metric="nDCG@10")
    data = data[data["metric"].notna()]
    assert set(data["metric"]) == {"nDCG@10"}
    own = data[(data["backbone"] == "bundled:tiny-modernbert") & (data["scale"] == 0.125)]
    seeds = [t.cell.run.end.ranking.ndcg_at_10 for t in golden().trainings  # type: ignore[union-attr]
             if t.cell and t.training["scale"] == 0.125]  # fmt: skip
    assert own["value"].iloc[0] == pytest.approx(np.mean(seeds))
    assert len(set(seeds)) == 2


def beaten(point: tuple[float, float], others: list[tuple[float, float]]) -> bool:
    return any(o[0] <= point[0] and o[1] >= point[1] and o != point for o in others)


@pytest.mark.parametrize("seed", range(5))
def test_the_pareto_front_against_every_pair(seed: int) -> None:
    rng = np.random.default_rng(seed)
    points = pd.DataFrame({"dims": rng.integers(1, 12, 40), "value": rng.integers(0, 12, 40) / 12})
    pairs = [(float(a), float(b)) for a, b in points.to_numpy()]
    front = tables.pareto(points, "dims")
    expected = {p for p in pairs if not beaten(p, pairs)}
    assert {pairs[i] for i in front} == expected
    assert len(front) == len(expected)  # of equal points one


def test_failed_runs_are_not_on_the_front() -> None:
    data = tables.tradeoff(golden())
    failed = data["verdict"] == "collapsed"
    assert failed.any()
    assert not data.loc[failed, [f"front_{n}" for n in tables.SPARSITY]].any(axis=None)
    assert data.loc[~failed, "front_active_dims_document"].any()


# --- figure 3 ------------------------------------------------------------------------------------------------------


def test_sensitivity_has_every_seed_every_point_and_every_target() -> None:
    data = tables.sensitivity(golden())
    kinds = data.groupby("kind").size()
    (calibration,) = golden().calibrations
    reached = [t for t in calibration.targets if t.scale is not None]
    assert (kinds["seed"], kinds["point"], kinds["target"]) == (8, 4, len(reached))
    (chosen,) = data[data["chosen"].eq(True)].to_dict("records")
    assert (chosen["target"], chosen["scale"]) == (calibration.match, calibration.scale)


@pytest.mark.parametrize(
    ("words", "worst"),
    [
        (["stable", "collapsed"], "collapsed"),
        (["dense", None], "dense"),
        ([], ""),
        (["diverged", "collapsed"], "diverged"),
    ],
)
def test_the_worst_word(words: list[str | None], worst: str) -> None:
    assert tables.worst_word(words) == worst


# --- figure 4 ------------------------------------------------------------------------------------------------------


def test_curves_are_medians_over_seeds() -> None:
    data = tables.curves(golden()).query("kind == 'step'")
    arms = data.groupby(["backbone", "arm", "scale"]).ngroups
    assert arms == 3  # reference, untouched, and the constant with the best ranking of the dev pairs
    for keys in data[["backbone", "scale"]].drop_duplicates().to_dict("records"):
        own = data[(data["backbone"] == keys["backbone"]) & (data["scale"] == keys["scale"])]
        logs = [t.steps() for t in golden().trainings
                if t.backbone == keys["backbone"] and t.training["scale"] == keys["scale"]]  # fmt: skip
        for statistic, line in own.groupby("statistic"):
            values = np.array([log[str(statistic)] for log in logs])
            for column, oracle in (("value", np.median), ("low", np.min), ("high", np.max)):
                np.testing.assert_allclose(line[column], oracle(values, axis=0), rtol=1e-12)


def test_the_rescaled_arm_is_the_one_that_ranks_dev_pairs_best() -> None:
    cells = tables.summary(golden()).query("arm == 'rescaled'")
    best = cells.groupby("scale")["mrr_dev"].mean().idxmax()
    data = tables.curves(golden()).query("kind == 'step' and arm == 'rescaled'")
    assert set(data["scale"]) == {best}
    calibration = replace(golden().calibrations[0], scale=1 / 64)
    chosen = tables.curves(replace(golden(), calibrations=(calibration,))).query("kind == 'step' and arm == 'rescaled'")
    assert set(chosen["scale"]) == {1 / 64}


def test_long_runs_are_thinned_to_real_steps(tmp_path: Path) -> None:
    training = golden().trainings[0]
    log = (Path(str(training.folder)) / "steps.jsonl").read_text().splitlines()
    rows = [{**json.loads(log[i % len(log)]), "step": i} for i in range(500)]
    (tmp_path / "steps.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    configuration = {**training.configuration, "training": {**training.training, "steps": 500}}
    long = replace(training, folder=str(tmp_path), configuration=configuration)
    data = tables.curves(Results(trainings=(long,))).query("statistic == 'loss_over_ln_n'")
    assert set(data["every"]) == {5}
    assert list(data["step"]) == [*range(0, 500, 5), 499]
    np.testing.assert_array_equal(data["value"], [rows[int(i)]["loss_over_ln_n"] for i in data["step"]])


def test_seeds_that_stopped_early_end_early(tmp_path: Path) -> None:
    one, two = (t for t in golden().trainings if t.training["scale"] == 0.125)
    lines = (Path(str(two.folder)) / "steps.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "steps.jsonl").write_text("".join(lines[:5]))
    data = tables.curves(Results(trainings=(one, replace(two, folder=str(tmp_path)))))
    line = data.query("statistic == 'loss_over_ln_n' and kind == 'step'")
    assert list(line["seeds"]) == [2] * 5 + [1] * 7


# --- figure 5 ------------------------------------------------------------------------------------------------------


def test_anatomy_is_what_the_records_hold() -> None:
    data = tables.anatomy(golden())
    (calibration,) = golden().calibrations
    for inspection, (part, scale) in itertools.product(golden().inspections, [("row_norm", 1.0), ("logit", 1.0)]):
        own = data[(data["backbone"] == inspection.name) & (data["part"] == part) & (data["scale"] == scale)]
        expected = inspection.weights.row_norm_quantiles if part == "row_norm" else inspection.logits.quantiles  # type: ignore[union-attr]
        assert list(own["place"]) == list(ROW_NORM_QUANTILES)
        assert tuple(own["value"]) == expected
    after = data[(data["scale"] != 1.0) & (data["backbone"] == calibration.name)].groupby("part")["value"].agg(tuple)
    logits = golden().inspections[1].logits
    assert calibration.after is not None
    assert logits is not None
    assert after["weight"] == calibration.after.document.weight_quantiles
    assert after["logit"] == tuple(calibration.scale * q for q in logits.quantiles)
    # the largest pooled weight is that of the largest logit of any position, which the sample of tokens may miss
    assert after["weight"][-1] == pytest.approx(calibration.after.document.max_weight)


def test_singular_values_are_thinned_and_keep_their_ranks() -> None:
    data = tables.anatomy(golden()).query("part == 'singular_value'")
    for inspection in golden().inspections:
        own = data[data["backbone"] == inspection.name]
        values = inspection.weights.singular_values
        assert values is not None
        assert own["place"].iloc[[0, -1]].tolist() == [1, len(values)]
        assert list(own["value"]) == [values[int(p) - 1] for p in own["place"]]


# --- which backbone is the reference -------------------------------------------------------------------------------


def test_the_bundled_reference_is_known_without_an_inspection() -> None:
    bare = Results(trainings=golden().trainings)
    assert tables.reference_names(bare) == {"bundled:tiny-bert"}
    assert not tables.reference_names(Results(trainings=(renamed(golden().trainings[0], "x/y"),)))
