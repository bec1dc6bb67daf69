"""Tidy tables of saved results: what each figure shows, as pure functions from results to data frames."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headscale.errors import NotFoundError, UnreadableError
from headscale.recipes import TrainingConfig
from headscale.records import ROW_NORM_QUANTILES, Calibration, Estimate, Evaluation, Inspection, SideStatistics
from headscale.results import Results, Training, backbones
from headscale.verdict import FAILED, WORDS

if TYPE_CHECKING:
    from pandas import DataFrame

LEAST_BACKBONES = 5  # below it a rank correlation is not given: with four, even a perfect order has p = 0.08
DRAWN_STEPS = 120  # about as many points of a curve as a panel has room for; each is a real step, none is averaged
HEALTHY_DIMS, HEALTHY_VOCABULARY = (150, 250), 30_522  # per document, sentence-transformers' guide to sparse encoders
METRICS = {
    "ndcg_at_10": "nDCG@10",
    "mrr_at_10": "MRR@10",
    "recall_at_100": "recall@100",
    "recall_at_1000": "recall@1000",
}
# Of the test pairs that a trial or a sweep ranks at its end, and their columns of `summary`.
TRAINED_METRICS = {"MRR@10": "mrr_test", "nDCG@10": "ndcg_test"}
TRAINED_METRIC = "MRR@10"
CURVES = ("loss_over_ln_n", "active_dims_document", "score_sd", "cosine_document", "grad_norm_head",
          "grad_norm_encoder")  # fmt: skip
SEED_INTERVAL, QUERY_INTERVAL = "95 % t over seeds", "95 % over queries"
UNTOUCHED, RESCALED = "untouched", "rescaled"


# --- recipes: what cells have in common ----------------------------------------------------------------------------

_NOT_RECIPE = frozenset({"scale", "seed", "device", "micro_batch", "update_every"})
_OF_HEAD = frozenset({"mode", "head_lr_multiplier", "scale_bias", "shift"})
_SHOWN = ("steps", "horizon", "batch_size", "lr")
_SAID = {"head_lr_multiplier": "head lr", "batch_size": "batch"}
_DEFAULTS = {f.name: f.default for f in fields(TrainingConfig) if f.default is not MISSING}


@dataclass(frozen=True)
class Member:
    """A training in a recipe: everything but backbone, constant and seed that decides it, in words."""

    training: Training
    recipe: str
    setting: str


def members(results: Results) -> list[Member]:
    """Every training whose configuration is known, in each recipe that it belongs to.

    An untouched head has neither a mode nor a learning rate of its own: it belongs to every recipe that agrees in the
    rest. Recipes with most constants and backbones come first.
    """
    known = [t for t in results.trainings if "lr" in t.training]
    settings = [_settings(t) for t in known]
    names = set.intersection(*(set(s) for s in settings)) if settings else set()
    rest = sorted(n for n in names - _OF_HEAD if len({repr(s[n]) for s in settings}) > 1)
    usual = _usual(settings, [*rest, "scale_bias", "shift"])
    groups: dict[tuple[str, ...], dict[str, None]] = {}
    scaled = [s for t, s in zip(known, settings, strict=True) if not _untouched(t)]
    for own in scaled:
        groups.setdefault(_repr(own, rest), {})[_recipe(own, usual, head=True)] = None
    found = []
    for training, own in zip(known, settings, strict=True):
        mine = _recipe(own, usual, head=not _untouched(training))
        texts = groups.get(_repr(own, rest), {mine: None}) if _untouched(training) else {mine: None}
        found += [Member(training, text, _setting(own)) for text in texts]
    return _by_size(found)


def _usual(settings: Sequence[dict[str, Any]], names: Sequence[str]) -> dict[str, str]:
    """The most common value of each field, as its repr."""
    return {
        n: Counter(repr(s[n]) for s in settings).most_common(1)[0][0] for n in names if settings and n in settings[0]
    }


def _recipe(own: dict[str, Any], usual: dict[str, str], *, head: bool) -> str:
    """How the head is treated, and what else is unusual."""
    words = [_word(n, own[n]) for n in ("mode", "head_lr_multiplier") if head and n in own]
    unusual = (n for n in usual if repr(own[n]) != usual[n] and (head or n not in _OF_HEAD))
    return ", ".join([*words, *(_word(n, own[n]) for n in unusual)])


def _setting(own: dict[str, Any]) -> str:
    """The training in short, for a title."""
    shown = [n for n in _SHOWN if own.get(n) is not None and not (n == "horizon" and own.get("compressed"))]
    words = {n: _word(n, own[n]) for n in shown}
    if own.get("compressed"):
        words["steps"] += ", the whole schedule"
    elif "horizon" in words and "steps" in words:
        words["steps"] += f" of {words.pop('horizon')}"
    return ", ".join(words.values())


def _settings(training: Training) -> dict[str, Any]:
    values = training.training if training.row else {**_DEFAULTS, **training.training}
    return {n: v for n, v in values.items() if n not in _NOT_RECIPE}


def _untouched(training: Training) -> bool:
    return training.training.get("mode") == "none"


def _repr(values: dict[str, Any], names: Iterable[str]) -> tuple[str, ...]:
    return tuple(repr(values[n]) for n in names)


def _word(name: str, value: Any) -> str:
    """A field of a training as people say it: `head lr 4x`, `lr 0.0003`."""
    if name == "mode":
        return str(value)
    if name == "scale_bias":
        return "bias scaled" if value else "bias kept"
    said = {"head_lr_multiplier": "head lr", "batch_size": "batch"}.get(name, name.replace("_", " "))
    number = f"{value:.3g}" if isinstance(value, float) else str(value)
    if name == "horizon":
        return number
    if name == "steps":
        return f"{number} steps"
    return f"{said} {number}{'x' if name == 'head_lr_multiplier' else ''}"


def _by_size(found: list[Member]) -> list[Member]:
    points: dict[str, set[tuple[str, float]]] = {}
    for m in found:
        points.setdefault(m.recipe, set()).add((m.training.backbone, m.training.training["scale"]))
    count = {recipe: sum(m.recipe == recipe for m in found) for recipe in points}
    return sorted(found, key=lambda m: (-len(points[m.recipe]), -count[m.recipe], m.recipe))


# --- one row a training --------------------------------------------------------------------------------------------

_CELL_COLUMNS = ("recipe", "setting", "backbone", "reference", "scale", "arm", "mode", "head_lr_multiplier", "seed",
                 "status", "key", "norm", "mrr_dev", "mrr_test", "ndcg_test", "chance_mrr", "active_dims_query",
                 "active_dims_document", "flops_cost", "verdict", "verdict_step", "verdict_lr_share", "loss_end",
                 "message")  # fmt: skip


def summary(results: Results) -> DataFrame:
    """A row per training and recipe: configuration, verdict, effectiveness, sparsity; None where there is none yet.

    `norm` is the head's Frobenius norm at the start, the constant included wherever it is written.
    """
    import pandas as pd

    references = reference_names(results)
    rows = [_cell_row(m, m.training.backbone in references) for m in members(results)]
    return pd.DataFrame(rows, columns=list(_CELL_COLUMNS))


def _cell_row(member: Member, reference: bool) -> dict[str, Any]:
    training, own = member.training, member.training.training
    return {
        "recipe": member.recipe,
        "setting": member.setting,
        "backbone": training.backbone,
        "reference": reference,
        "scale": float(own["scale"]),
        "arm": UNTOUCHED if _untouched(training) else RESCALED,
        "mode": own.get("mode"),
        "head_lr_multiplier": own.get("head_lr_multiplier"),
        "seed": own.get("seed"),
        "status": training.status,
        "key": training.key,
        "message": training.message,
        **(_of_cell(training) if training.cell else _of_row(training) if training.row else {}),
    }


def _of_cell(training: Training) -> dict[str, Any]:
    assert training.cell is not None
    cell, end = training.cell, training.cell.run.end
    ranking = end.ranking
    elsewhere = training.training.get("mode") in ("fold", "logits")  # the matrix itself is then as it was
    return {
        "norm": cell.run.head_norm_start * (training.training["scale"] if elsewhere else 1.0),
        "mrr_dev": None if cell.dev is None else cell.dev.mrr_at_10,
        "mrr_test": None if ranking is None else ranking.mrr_at_10,
        "ndcg_test": None if ranking is None else ranking.ndcg_at_10,
        "chance_mrr": None if ranking is None else ranking.chance_mrr_at_10,
        "active_dims_query": end.tail.get("active_dims_query") if ranking is None else ranking.active_dims_query,
        "active_dims_document": end.tail.get("active_dims_document")
        if ranking is None
        else ranking.active_dims_document,
        "flops_cost": None if ranking is None else ranking.flops_cost,
        "verdict": cell.verdict.word,
        "verdict_step": cell.verdict.step,
        "verdict_lr_share": cell.verdict.lr_share,
        "loss_end": end.tail.get("loss_over_ln_n"),
    }


def _of_row(training: Training) -> dict[str, Any]:
    assert training.row is not None
    row = training.row
    elsewhere = row.mode in ("fold", "logits")
    norm = None if row.head_norm_start is None else row.head_norm_start * (row.scale if elsewhere else 1.0)
    names = ("mrr_dev", "mrr_test", "ndcg_test", "chance_mrr", "active_dims_query", "active_dims_document",
             "flops_cost", "verdict", "verdict_step", "verdict_lr_share", "loss_end")  # fmt: skip
    return {"norm": norm, **{n: getattr(row, n) for n in names}}


def reference_names(results: Results) -> frozenset[str]:
    """The backbones that the others are held against: those of the results, else the default or the bundled one."""
    from headscale import bundled
    from headscale.profiles import DEFAULT_REFERENCE

    here = set(backbones(results))
    named = frozenset(results.references) & here
    spare = {DEFAULT_REFERENCE, f"{bundled.PREFIX}{bundled.REFERENCE}"}
    return named or frozenset(spare & here)


# --- seeds ---------------------------------------------------------------------------------------------------------


def t_interval(values: Sequence[float]) -> tuple[float, float, float, int]:
    """Mean, 95 % t interval cut to 0..1, and how many values are finite; NaN where they do not exist."""
    import numpy as np

    finite = np.array([v for v in values if v is not None and math.isfinite(v)])
    if len(finite) < 2:
        return (float(finite[0]) if len(finite) else math.nan), math.nan, math.nan, len(finite)
    from scipy.special import stdtrit  # scipy.stats takes two seconds to import

    mean, half = finite.mean(), stdtrit(len(finite) - 1, 0.975) * finite.std(ddof=1) / math.sqrt(len(finite))
    return float(mean), float(max(0.0, mean - half)), float(min(1.0, mean + half)), len(finite)


def worst_word(words: Iterable[str | None]) -> str:
    """The worst verdict of some; "" of none."""
    known = [w for w in words if w in WORDS]
    return max(known, key=WORDS.index) if known else ""


def _points(cells: DataFrame, metric: str) -> list[dict[str, Any]]:
    """Seeds taken together: a row per recipe, backbone, arm and constant, in the order of the cells."""
    found = []
    keys = ["recipe", "backbone", "arm", "scale"]
    for (recipe, backbone, arm, scale), group in cells.groupby(keys, sort=False):
        value, low, high, seeds = t_interval(group[TRAINED_METRICS[metric]].tolist())
        means = {n: _mean(group[n]) for n in ("norm", "active_dims_query", "active_dims_document", "flops_cost",
                                              "chance_mrr")}  # fmt: skip
        found.append({
            "source": "training", "recipe": recipe, "setting": group["setting"].iloc[0], "backbone": backbone,
            "reference": bool(group["reference"].iloc[0]), "arm": arm, "scale": scale, "metric": metric,
            "value": value, "low": low, "high": high, "seeds": seeds, "trainings": len(group),
            "interval": SEED_INTERVAL if seeds > 1 else "", "verdict": worst_word(group["verdict"]), **means,
        })  # fmt: skip
    return found


def _mean(values: Any) -> float:
    import numpy as np

    finite = [float(v) for v in values if v is not None and np.isfinite(v)]
    return sum(finite) / len(finite) if finite else math.nan


# --- evaluations ---------------------------------------------------------------------------------------------------


def _evaluated(results: Results) -> list[dict[str, Any]]:
    """A row per evaluated model and metric, joined with the norms that are known."""
    written = {c.written.directory: c for c in results.calibrations if c.written is not None}
    references = reference_names(results)
    rows = []
    for evaluation in results.evaluations:
        made = written.get(evaluation.name)
        backbone, scale = (made.name, made.scale or 1.0) if made else (evaluation.name, 1.0)
        model = evaluation.systems[0]
        shared = {
            "source": "evaluation", "recipe": "", "setting": _collection(evaluation), "backbone": backbone,
            "reference": backbone in references, "arm": RESCALED if made else UNTOUCHED, "scale": scale, "seeds": 1,
            "trainings": 1, "verdict": "", "interval": QUERY_INTERVAL, "flops_cost": _or_nan(model.flops_cost),
            "active_dims_query": model.query.active_dims if model.query else math.nan,
            "active_dims_document": model.document.active_dims if model.document else math.nan,
        }  # fmt: skip
        estimates: dict[str, Estimate | None] = {name: getattr(model, name) for name in METRICS}
        rows += [
            {**shared, "metric": METRICS[n], "value": e.value, "low": _or_nan(e.low), "high": _or_nan(e.high)}
            for n, e in estimates.items()
            if e is not None
        ]
    return rows


def _collection(evaluation: Evaluation) -> str:
    found = evaluation.collection
    return f"{found.name}, {found.queries:,} queries, {found.documents:,} documents"


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


# --- published figures ---------------------------------------------------------------------------------------------

_PUBLISHED = ("backbone", "metric", "value")


def read_published(path: str | Path) -> DataFrame:
    """Anyone's effectiveness figures: a CSV with the columns `backbone`, `metric`, `value`, and `scale` if need be.

    Several rows of one backbone and metric are seeds. `scale` is the constant that the head was multiplied by, 1
    without it.

    Raises:
        NotFoundError: no such file.
        UnreadableError: no CSV, columns that are missing, or bad rows; all of them with their numbers.
    """
    import csv

    import pandas as pd

    file = Path(path)
    if not file.is_file():
        raise NotFoundError(f"no file `{file}`", hint="give a CSV with the columns backbone, metric, value")
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            reader = csv.DictReader(lines)
            missing = [name for name in _PUBLISHED if name not in (reader.fieldnames or ())]
            rows = [] if missing else list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise UnreadableError(f"`{file}` is no CSV: {error}", hint="save it as UTF-8, comma separated") from error
    if missing:
        raise UnreadableError(
            f"`{file}` lacks the columns `{'`, `'.join(missing)}`", hint="its first line is `backbone,metric,value`"
        )
    wrong = [text for number, row in enumerate(rows, start=2) if (text := _wrong(number, row))]
    if wrong or not rows:
        said = "; ".join(wrong) if wrong else "it has no row"
        raise UnreadableError(f"`{file}` cannot be used: {said}", hint="every row is a name, a metric and a number")
    columns = {name: [row[name].strip() for row in rows] for name in ("backbone", "metric")}
    numbers = {"value": [float(r["value"]) for r in rows], "scale": [float(r.get("scale") or 1) for r in rows]}
    return pd.DataFrame({**columns, **numbers})


def _wrong(number: int, row: dict[str, Any]) -> str:
    """What is wrong with a row, or ""."""
    empty = [name for name in ("backbone", "metric") if not (row.get(name) or "").strip()]
    if empty:
        return f"row {number} has no {' and no '.join(empty)}"
    for name, text in (("value", row.get("value")), ("scale", row.get("scale") or "1")):
        try:
            good = math.isfinite(float(text or "")) and (name == "value" or float(text or "") > 0)
        except (TypeError, ValueError):
            good = False
        if not good:
            return f"row {number}: {name} `{text or ''}` is not a number{' above zero' * (name == 'scale')}"
    return ""


def _published(published: DataFrame | None, results: Results) -> list[dict[str, Any]]:
    """Rows of published figures under the names that the inspections have."""
    if published is None:
        return []
    names = {i.name: i.name for i in results.inspections}
    tails: dict[str, list[str]] = {}
    for name in names:
        tails.setdefault(name.rsplit("/", 1)[-1].lower(), []).append(name)
    references = reference_names(results)
    rows = []
    frame = published if "scale" in published else published.assign(scale=1.0)
    keys: Any
    for keys, group in frame.groupby(["backbone", "metric", "scale"], sort=False):
        given, metric, scale = str(keys[0]), str(keys[1]), float(keys[2])
        alike = tails.get(given.rsplit("/", 1)[-1].lower(), [])
        backbone = names.get(given) or (alike[0] if len(alike) == 1 else given)
        value, low, high, seeds = _free_interval(group["value"].tolist())
        rows.append({
            "source": "published", "recipe": "", "setting": "published figures", "backbone": backbone,
            "reference": backbone in references, "arm": UNTOUCHED if scale == 1 else RESCALED, "scale": float(scale),
            "metric": metric, "value": value, "low": low, "high": high, "seeds": seeds, "trainings": seeds,
            "interval": SEED_INTERVAL if seeds > 1 else "", "verdict": "",
        })  # fmt: skip
    return rows


def _free_interval(values: Sequence[float]) -> tuple[float, float, float, int]:
    """`t_interval` of figures in any unit: papers write 45.2 for .452."""
    largest = max(1.0, *(abs(v) for v in values))
    mean, low, high, count = t_interval([v / largest for v in values])
    return mean * largest, low * largest, high * largest, count


def rows_of(frame: DataFrame) -> list[dict[str, Any]]:
    """The rows of a table by column name."""
    found: Any = frame.to_dict("records")
    return list(found)


# --- figure 1 ------------------------------------------------------------------------------------------------------

_EFFECTIVENESS = ("source", "recipe", "setting", "backbone", "reference", "arm", "scale", "norm_name", "norm", "metric",
                  "value", "low", "high", "seeds", "trainings", "interval", "verdict", "own_point")  # fmt: skip


def norm_effectiveness(
    results: Results, published: DataFrame | None = None, *, norm: str = "frobenius", metric: str = TRAINED_METRIC
) -> DataFrame:
    """Figure 1: the MLM head's norm, the constant included, against effectiveness.

    Args:
        results: trainings with a ranking of their own, or inspections with evaluations or published figures.
        published: from `read_published`; its rows come first.
        norm: a norm of `WeightStatistics`; trainings themselves know the Frobenius norm alone.
        metric: of trainings, in `TRAINED_METRICS`; evaluations and published figures have theirs.

    Returns:
        A row per backbone, constant, recipe and metric; `own_point` marks the one row of a backbone, its untouched
        head, that the rank correlation takes.
    """
    import pandas as pd

    known = {i.name: float(_or_nan(getattr(i.weights, norm))) for i in results.inspections}
    rows = [*_published(published, results), *_evaluated(results), *_points(summary(results), metric)]
    for row in rows:
        measured = known.get(row["backbone"], math.nan) * row["scale"]
        trained = row.get("norm", math.nan) if norm == "frobenius" else math.nan
        row.update(norm_name=norm, norm=measured if math.isfinite(measured) else trained)
    frame = pd.DataFrame(rows, columns=[c for c in _EFFECTIVENESS if c != "own_point"])
    own = frame.index[(frame["scale"] == 1.0) & frame["value"].notna() & frame["norm"].notna()]
    first = frame.loc[own].sort_values("arm", key=lambda a: a != UNTOUCHED, kind="stable")
    kept = first.drop_duplicates(["source", "recipe", "metric", "backbone"]).index
    return frame.assign(own_point=frame.index.isin(kept))


@dataclass(frozen=True)
class RankCorrelation:
    """Spearman's rank correlation with its 95 % interval: Fisher's z with the standard error of Bonett and Wright
    (2000), sqrt((1 + rho^2 / 2) / (n - 3)).
    """

    backbones: int
    rho: float
    low: float
    high: float


def rank_correlation(data: DataFrame) -> RankCorrelation | None:
    """Of norm and effectiveness over backbones, one point each; None below `LEAST_BACKBONES` or where all tie.

    Args:
        data: rows of `norm_effectiveness`, of one source, recipe and metric.
    """
    import numpy as np

    points = data[data["own_point"] & np.isfinite(data["norm"]) & np.isfinite(data["value"])]
    points = points.drop_duplicates("backbone")
    count = len(points)
    if count < LEAST_BACKBONES or points["norm"].nunique() < 2 or points["value"].nunique() < 2:
        return None
    rho = float(np.corrcoef(points["norm"].rank(), points["value"].rank())[0, 1])
    half = 1.959964 * math.sqrt((1 + rho * rho / 2) / (count - 3))
    z = math.atanh(max(-1 + 1e-12, min(1 - 1e-12, rho)))
    return RankCorrelation(count, rho, math.tanh(z - half), math.tanh(z + half))


# --- figure 2 ------------------------------------------------------------------------------------------------------

SPARSITY = ("active_dims_document", "active_dims_query", "flops_cost")
_TRADEOFF = ("source", "recipe", "setting", "backbone", "reference", "arm", "scale", "metric", "value", "low", "high",
             "seeds", "trainings", "interval", "verdict", *SPARSITY)  # fmt: skip


def tradeoff(results: Results, *, metric: str = TRAINED_METRIC) -> DataFrame:
    """Figure 2: effectiveness against sparsity, a row per backbone, constant, recipe and metric.

    `front_active_dims_document` and the like say which rows are on the Pareto front of their recipe and metric: no
    other is at least as effective and sparser. Runs that did not train are not on it, however sparse they are.
    `metric` is that of trainings, in `TRAINED_METRICS`.
    """
    import pandas as pd

    rows = [*_evaluated(results), *_points(summary(results), metric)]
    frame = pd.DataFrame(rows, columns=list(_TRADEOFF))
    fronts = {f"front_{name}": pd.Series(False, index=frame.index) for name in SPARSITY}
    trained = frame[~frame["verdict"].isin(list(FAILED))]
    for _, group in trained.groupby(["source", "setting", "recipe", "metric"], sort=False):
        for name in SPARSITY:
            fronts[f"front_{name}"].loc[pareto(group, name)] = True
    return frame.assign(**fronts)


def pareto(points: DataFrame, sparsity: str) -> list[Any]:
    """Labels of the rows that no other beats: sparser or as sparse, and more effective."""
    finite = points[[sparsity, "value"]].dropna().sort_values([sparsity, "value"], ascending=[True, False])
    best, front = -math.inf, []
    for label, value in finite["value"].items():
        if value > best:
            best = value
            front.append(label)
    return front


# --- figure 3 ------------------------------------------------------------------------------------------------------

_SENSITIVITY = ("kind", "recipe", "setting", "backbone", "reference", "arm", "scale", "seed", "metric", "value", "low",
                "high", "seeds", "verdict", "chance", "target", "chosen")  # fmt: skip


def sensitivity(results: Results, *, metric: str = TRAINED_METRIC) -> DataFrame:
    """Figure 3: effectiveness and verdict against the constant; `metric` is one of `TRAINED_METRICS`.

    Returns:
        Rows of three kinds: `seed`, one training with its own verdict; `point`, seeds together with the worst verdict;
        `target`, the constant that a target of `calibrate` gives, as it would be written, and whether it was chosen.
    """
    import pandas as pd

    cells = summary(results)
    rows: list[dict[str, Any]] = [
        {**p, "kind": "point", "chance": p["chance_mrr"] if metric == "MRR@10" else math.nan}
        for p in _points(cells, metric)
    ]
    for cell in rows_of(cells[cells["verdict"].notna()]):
        rows.append({**cell, "kind": "seed", "metric": metric, "value": cell[TRAINED_METRICS[metric]], "seeds": 1})
    drawn = {row["backbone"] for row in rows}
    for calibration in results.calibrations:
        if calibration.name in drawn:
            rows += _target_rows(calibration)
    return pd.DataFrame(rows, columns=list(_SENSITIVITY)).drop_duplicates(ignore_index=True)


def _target_rows(calibration: Calibration) -> list[dict[str, Any]]:
    found = []
    for target in calibration.targets:
        scale = target.snapped if calibration.snapped and target.snapped is not None else target.scale
        if scale is not None and scale > 0:
            chosen = target.name == calibration.match
            found.append({"kind": "target", "backbone": calibration.name, "scale": scale, "target": target.name,
                          "chosen": chosen})  # fmt: skip
    return found


# --- figure 4 ------------------------------------------------------------------------------------------------------

_CURVES = ("kind", "recipe", "setting", "backbone", "reference", "arm", "scale", "statistic", "step", "value", "low",
           "high", "seeds", "every", "verdict")  # fmt: skip


def curves(results: Results, *, backbone: str | None = None, recipe: str | None = None) -> DataFrame:
    """Figure 4: how both arms of a backbone trained, and the reference's untouched head beside them.

    The rescaled arm is the constant that a calibration chose; without one, that of the best ranking of the dev pairs,
    else of the test pairs. Long runs are thinned: every so many-th step is kept as it is (`every`), and the last.

    Args:
        results: trainings with their logs.
        backbone: whose arms; by default the first that has two and is no reference.
        recipe: of `summary`; by default the first of that backbone.

    Returns:
        Rows of three kinds: `step`, the median over seeds of a statistic with the smallest and largest as low and
        high; `verdict`, the step at which a seed's verdict was reached; `band`, from low to high what to expect of a
        statistic, `verdict` being its name.
    """
    import pandas as pd

    cells = summary(results)
    cells = cells[cells["key"].isin([t.key for t in results.trainings if t.folder])]
    logs = {t.key: t for t in results.trainings}
    rows: list[dict[str, Any]] = []
    for arm in _arms(results, cells, backbone, recipe):
        rows += _curve_rows(arm, [logs[key] for key in arm["key"]])
    if rows:
        rows += _bands([logs[key] for key in cells["key"] if logs[key].cell])
    return pd.DataFrame(rows, columns=list(_CURVES))


def _bands(trainings: Sequence[Training]) -> list[dict[str, Any]]:
    """What to expect: 150 to 250 of 30,522 terms a document after training (sentence-transformers' guide)."""
    sizes = {t.cell.run.vocab_size for t in trainings if t.cell}
    if len(sizes) != 1:
        return []
    (size,) = sizes
    low, high = HEALTHY_DIMS[0] * size / HEALTHY_VOCABULARY, HEALTHY_DIMS[1] * size / HEALTHY_VOCABULARY
    return [{"kind": "band", "statistic": "active_dims_document", "low": low, "high": high,
             "verdict": "healthy after a full training"}]  # fmt: skip


def _arms(results: Results, cells: DataFrame, backbone: str | None, recipe: str | None) -> list[DataFrame]:
    """The cells of each arm to draw: reference, untouched, rescaled."""
    name = backbone or _most_telling(cells)
    own = cells[cells["backbone"] == name]
    recipe = recipe if recipe is not None or own.empty else str(own["recipe"].iloc[0])
    own = own[own["recipe"] == recipe]
    rescaled = own[own["arm"] == RESCALED]
    arms = [own[own["arm"] == UNTOUCHED], rescaled[rescaled["scale"] == _chosen(results, name, rescaled)]]
    if arms[0].empty:  # a sweep may hold the untouched head as the constant 1
        arms[0] = rescaled[rescaled["scale"] == 1.0]
    if own["reference"].any():
        return [arm for arm in arms if len(arm)]
    beside = cells[cells["reference"] & (cells["recipe"] == recipe) & (cells["arm"] == UNTOUCHED)]
    first = beside[beside["backbone"] == beside["backbone"].iloc[0]] if len(beside) else beside
    return [arm for arm in (first, *arms) if len(arm)]


def _most_telling(cells: DataFrame) -> str:
    """The first backbone with both arms that is no reference; else one with both; else the first."""
    arms = cells.groupby("backbone", sort=False)["arm"].nunique()
    both = [name for name in arms.index if arms[name] > 1]
    others = [name for name in both if not cells.loc[cells["backbone"] == name, "reference"].any()]
    found = [*others, *both, *arms.index]
    return str(found[0]) if found else ""


def _chosen(results: Results, backbone: str, rescaled: DataFrame) -> float:
    """The constant to show: a calibration's where it was trained, else the best ranking's, else the last."""
    scales = set(rescaled["scale"])
    for calibration in results.calibrations:
        if calibration.name == backbone and calibration.scale in scales:
            return float(calibration.scale or 1.0)
    for column in ("mrr_dev", "mrr_test"):
        means = rescaled.groupby("scale")[column].apply(_mean).dropna()
        if len(means):
            best: Any = means.idxmax()
            return float(best)
    return float(rescaled["scale"].iloc[-1]) if len(rescaled) else math.nan


def _curve_rows(arm: DataFrame, trainings: Sequence[Training]) -> list[dict[str, Any]]:
    import warnings

    import numpy as np

    planned = [int(t.training.get("steps") or 0) for t in trainings]
    every = max(1, math.ceil(max(planned, default=0) / DRAWN_STEPS))
    read = [log for t in trainings if len((log := t.steps(CURVES, every=every))["step"])]
    shared = {name: arm[name].iloc[0] for name in ("recipe", "setting", "backbone", "reference", "arm", "scale")}
    rows = []
    steps = np.unique(np.concatenate([log["step"] for log in read])) if read else np.array([])
    for statistic in CURVES if read else ():
        values = np.full((len(read), len(steps)), np.nan)  # (seeds, steps)
        for i, log in enumerate(read):
            values[i, np.searchsorted(steps, log["step"])] = log[statistic]
        values[~np.isfinite(values)] = np.nan
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # a step without a finite value in any seed stays NaN
            columns = (np.nanmedian(values, axis=0), np.nanmin(values, axis=0), np.nanmax(values, axis=0))
        counts = np.isfinite(values).sum(0)
        rows += [
            {**shared, "kind": "step", "statistic": statistic, "step": int(step), "value": middle, "low": low,
             "high": high, "seeds": int(n), "every": every}
            for step, middle, low, high, n in zip(steps, *columns, counts, strict=True)
        ]  # fmt: skip
    for cell in rows_of(arm[arm["verdict"].notna()]):
        rows.append({**shared, "kind": "verdict", "step": int(cell["verdict_step"]), "verdict": cell["verdict"],
                     "seeds": 1, "every": every})  # fmt: skip
    return rows


# --- figure 5 ------------------------------------------------------------------------------------------------------

_ANATOMY = ("part", "backbone", "reference", "scale", "place", "value")


def anatomy(results: Results) -> DataFrame:
    """Figure 5: what the heads are made of, and what the constant does to what they put out.

    Returns:
        Rows of four parts: `row_norm` (place: percent of the rows), `logit` (percent of single logits), `weight`
        (percent of the documents' pooled weights above zero), `singular_value` (place: its rank, from 1). `scale` is 1
        before the constant and the constant after it; row norms and singular values are those before.
    """
    import pandas as pd

    references = reference_names(results)
    rows: list[dict[str, Any]] = []
    for found in _one_each(results.inspections):
        shared = {"backbone": found.name, "reference": found.name in references}
        rows += _quantile_rows(shared, "row_norm", 1.0, found.weights.row_norm_quantiles)
        values = found.weights.singular_values or ()
        places = sorted({*range(min(10, len(values))), *_spread(len(values), 60)})
        rows += [{**shared, "part": "singular_value", "scale": 1.0, "place": i + 1, "value": values[i]} for i in places]
    scales = {c.name: c for c in results.calibrations if c.scale is not None}
    for found in _one_each(results.inspections):
        shared = {"backbone": found.name, "reference": found.name in references}
        after = scales.get(found.name)
        if found.logits is not None:
            for a in dict.fromkeys((1.0, (after.scale if after else None) or 1.0)):
                rows += _quantile_rows(shared, "logit", a, [a * q for q in found.logits.quantiles])
        if found.output is not None:
            rows += _weight_rows(shared, 1.0, found.output.document)
    for name, calibration in scales.items():
        shared = {"backbone": name, "reference": name in references}
        if name not in {i.name for i in results.inspections if i.output is not None}:
            rows += _weight_rows(shared, 1.0, calibration.before.document)
        if calibration.after is not None and calibration.scale != 1.0:
            rows += _weight_rows(shared, float(calibration.scale or 1.0), calibration.after.document)
    return pd.DataFrame(rows, columns=list(_ANATOMY))


def _one_each(inspections: Sequence[Inspection]) -> list[Inspection]:
    """The inspection of each backbone that knows most: outputs, then singular values."""
    found: dict[str, Inspection] = {}
    for one in inspections:
        kept = found.get(one.name)
        known = (one.output is not None, one.weights.singular_values is not None)
        if kept is None or known > (kept.output is not None, kept.weights.singular_values is not None):
            found[one.name] = one
    return list(found.values())


def _spread(count: int, wanted: int) -> set[int]:
    """About so many places of a long list, evenly spaced, the ends included."""
    return {round(i * (count - 1) / (wanted - 1)) for i in range(wanted)} if count else set()


def _quantile_rows(shared: dict[str, Any], part: str, scale: float, values: Sequence[float]) -> list[dict[str, Any]]:
    return [
        {**shared, "part": part, "scale": scale, "place": place, "value": value}
        for place, value in zip(ROW_NORM_QUANTILES, values, strict=False)
    ]


def _weight_rows(shared: dict[str, Any], scale: float, side: SideStatistics) -> list[dict[str, Any]]:
    return _quantile_rows(shared, "weight", scale, getattr(side, "weight_quantiles", ()))
