"""Cells: written as they happen, reused, interrupted readably, a pure function of their configuration; and arms."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_checkpoint

from headscale import cells, training
from headscale.cli import run
from headscale.errors import HeadscaleError, UsageError
from headscale.recipes import recipe
from headscale.records import SAMENESS_EXCLUDES
from headscale.steplog import read_steps
from headscale.training import TrainingConfig, train
from headscale.trials import (
    Bench,
    TextSource,
    arms_of,
    configuration_of,
    finished_cell,
    folder_of,
    planned,
    ranking_of,
    read_trained,
    run_cell,
)
from headscale.verdict import RULES, Clock

CONFIG = TrainingConfig(
    steps=4, batch_size=4, lr=1e-3, query_length=12, document_length=16, mode="untie", scale=0.5, device="cpu",
)  # fmt: skip
ROWS = [f"w{5 + i} w{40 + i}\tw{40 + i} w{60 + i % 30} w{5 + i} w{7 + i % 11}" for i in range(32)]


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("pairs.tsv").write_text("\n".join(ROWS) + "\n")
    Path("test.tsv").write_text("\n".join(ROWS[::2]) + "\n")


@pytest.fixture
def backbone(tmp_path: Path) -> str:
    return str(tiny_checkpoint("bert", tmp_path / "backbone"))


SOURCE = TextSource("pairs.tsv", "test.tsv", candidates=12)


def configured(backbone: str, config: TrainingConfig = CONFIG, **options: Any) -> dict[str, Any]:
    return configuration_of(backbone, config, SOURCE, SOURCE.read(), **options)


def stable_rows(folder: Path) -> list[dict[str, Any]]:
    rows = read_steps(folder / cells.STEPS)
    return [{k: v for k, v in row.items() if k not in SAMENESS_EXCLUDES} for row in rows]


# --- cells ---------------------------------------------------------------------------------------------------------


def test_a_cell_holds_what_training_gives(backbone: str) -> None:
    bench = Bench()
    configuration = configured(backbone)
    cell = run_cell(configuration, Path("runs"), bench=bench)
    corpus = SOURCE.read()
    loaded = bench.backbone(backbone)
    alone = train(loaded.model, loaded.tokenizer, corpus.train, CONFIG, evaluation=corpus.test)
    assert cell.run.end.ranking == alone.end.ranking
    assert cell.run.end.ranking is not None
    assert cell.run.end.ranking.queries == 12
    assert [s.loss for s in cell.run.steps] == [s.loss for s in alone.steps]
    assert stable_rows(folder_of(configuration, Path("runs")))[-1]["loss"] == alone.steps[-1].loss


@pytest.mark.parametrize("mode", ["untie", "fold", "logits"])
def test_every_mode_is_ranked_with_its_constant(backbone: str, mode: str) -> None:
    """Ranking a trained model afterwards gives what `train` gives, wherever the constant lives."""
    bench = Bench()
    loaded, pairs = bench.backbone(backbone), SOURCE.read().test
    config = CONFIG.replace(mode=mode, scale=0.125)
    import copy

    model = copy.deepcopy(loaded.model)
    done = train(model, loaded.tokenizer, SOURCE.read().train, config, evaluation=pairs, inplace=True)
    assert ranking_of(model, loaded.tokenizer, config, pairs) == done.end.ranking


def test_the_same_configuration_gives_the_same_log(backbone: str) -> None:
    configuration = configured(backbone)
    for run_folder in ("one", "two"):
        run_cell(configuration, Path(run_folder))
    one, two = (folder_of(configuration, Path(r)) for r in ("one", "two"))
    assert one.name == two.name
    assert stable_rows(one) == stable_rows(two)


def test_a_finished_cell_is_read_back_whole_and_not_run_again(backbone: str, monkeypatch: pytest.MonkeyPatch) -> None:
    configuration = configured(backbone)
    first = run_cell(configuration, Path("runs"))
    monkeypatch.setattr(training, "train", None)
    told: list[str] = []
    again = run_cell(configuration, Path("runs"), bench=Bench(told.append))
    assert again == first
    assert any("reusing" in sentence for sentence in told)


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"scale": 0.25}, {"lr": 2e-3}, {"head_lr_multiplier": 4.0}, {"temperature": 2.0}]
)
def test_whatever_decides_a_cell_changes_its_key(backbone: str, change: dict[str, Any]) -> None:
    one, other = configured(backbone), configured(backbone, CONFIG.replace(**change))
    assert cells.cell_key(one) != cells.cell_key(other)


def test_texts_that_changed_since_planning_are_refused(backbone: str) -> None:
    configuration = configured(backbone)
    Path("pairs.tsv").write_text("\n".join(ROWS[:20]) + "\n")
    with pytest.raises(HeadscaleError, match="not those that this cell was planned with"):
        run_cell(configuration, Path("runs"))


def test_interrupted_leaves_a_readable_cell_that_is_run_again(backbone: str, monkeypatch: pytest.MonkeyPatch) -> None:
    configuration = configured(backbone)

    def interrupt(record: Any, verdict: Any) -> None:
        if record.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_cell(configuration, Path("runs"), on_step=interrupt)
    folder = folder_of(configuration, Path("runs"))
    assert cells.read_cell(folder)["status"] == "interrupted"
    kept = read_trained(folder)
    assert kept.run.status == "interrupted"
    assert kept.run.end.ranking is None
    assert [s.step for s in kept.run.steps] == [0, 1, 2]
    assert finished_cell(folder, configuration) is None
    whole = run_cell(configuration, Path("runs"))
    assert len(whole.run.steps) == 4
    assert cells.read_cell(folder)["status"] == "done"


def test_an_error_keeps_nothing(backbone: str) -> None:
    configuration = configured(backbone, CONFIG.replace(batch_size=64))
    with pytest.raises(UsageError, match="do not fill a batch"):
        run_cell(configuration, Path("runs"))
    assert not (folder_of(configuration, Path("runs")) / cells.CELL).exists()


def test_a_run_that_is_certain_to_fail_stops_early_and_only_if_asked(backbone: str) -> None:
    dead = CONFIG.replace(steps=12, lr=1e-9, scale=1e-6)  # scores of zero: ln N, and every vector alike
    long = run_cell(configured(backbone, dead), Path("runs"))
    short = run_cell(configured(backbone, dead, stop_early=True), Path("runs"))
    assert len(long.run.steps) == 12
    assert long.verdict.certain == short.verdict.certain
    if short.verdict.certain:
        assert short.run.status == "stopped"
        assert len(short.run.steps) == short.verdict.step < 12


# --- plans and arms ------------------------------------------------------------------------------------------------


def test_a_trial_takes_as_many_steps_as_the_verdict_needs() -> None:
    plan = planned("st-mnrl", {"negatives": 0})
    full = recipe("st-mnrl")
    assert plan.horizon == full.steps
    assert Clock(plan).share(plan.steps) >= RULES.decide_share > Clock(plan).share(plan.steps - 1)


def test_arms_differ_in_the_head_alone() -> None:
    judged, control = arms_of(recipe("v-splade"), 1 / 16, mode="untie", head_lr_multiplier=4.0)
    assert (control.training.mode, control.training.scale) == ("none", 1.0)
    same = {"mode": "none", "scale": 1.0, "head_lr_multiplier": 1.0}
    assert replace(judged.training, **same) == control.training


def test_unknown_modes_and_recipes_are_refused() -> None:
    with pytest.raises(UsageError, match="none of untie, fold, logits"):
        arms_of(CONFIG, 0.5, mode="magic")
    with pytest.raises(UsageError, match="no recipe is called"):
        planned("magic", {})


# --- the command ---------------------------------------------------------------------------------------------------

OPTIONS = ["--pairs", "pairs.tsv", "--test-pairs", "test.tsv", "--batch-size", "4", "--query-length", "12",
           "--document-length", "16", "--lr", "1e-3", "--device", "cpu"]  # fmt: skip


def test_trial_prints_both_arms_and_leaves_with_the_judged_ones_code(capsys: Any, backbone: str) -> None:
    code = run(["trial", backbone, "--scale", "1/4", "--steps", "4", "--seeds", "2", *OPTIONS])
    out, err = capsys.readouterr()
    lines = [line.split("\t") for line in out.splitlines()]
    table = [dict(zip(lines[0], line, strict=True)) for line in lines[1:]]
    assert [row["arm"] for row in table] == ["given", "untouched"]
    assert [row["scale [x]"] for row in table] == ["0.25", "1.0"]
    assert lines[0][-1] == "verdict"
    assert "±" in table[0]["loss at the end [ln N]"]
    assert code == 1  # four of thousands of steps decide nothing
    assert table[0]["verdict"] == "inconclusive"
    assert "given, seed 0: 4/4, loss" in err
    assert "given: inconclusive: " in err


def test_trial_is_stable_where_its_rules_say_so(capsys: Any, backbone: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole compressed schedule, judged by a forecast that every run passes."""
    from headscale import trials, verdict

    easy = replace(RULES, statistic="loss_over_ln_n", fails_from=1e9, trains_to=1e9, signature_loss=0.0,
                   fading_dims=0.0, settle_share=2.0)  # fmt: skip
    monkeypatch.setattr(trials, "RULES", easy)
    monkeypatch.setattr(verdict, "RULES", easy)
    command = ["trial", backbone, "--scale", "0.25", "--steps", "8", "--compressed", "--no-control", *OPTIONS]
    assert run([*command, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["schema"] == "headscale.trial/1"
    assert [r["arm"] for r in document["results"]] == ["given"]
    assert document["results"][0]["verdict"]["word"] == "stable"
    assert document["results"][0]["cells"][0]["run"]["end"]["lr_sum_share"] == pytest.approx(1.0)


def test_trial_calibrates_by_itself(capsys: Any, backbone: str, tmp_path: Path) -> None:
    reference = str(tiny_checkpoint("bert", tmp_path / "reference", seed=5))
    run(["trial", backbone, "--reference", reference, "--steps", "2", *OPTIONS])
    out, err = capsys.readouterr()
    assert "the constant is " in err
    assert [line.split("\t")[1] for line in out.splitlines()[1:]] == ["calibrated", "untouched"]


def test_scale_none_judges_the_untouched_head(capsys: Any, backbone: str) -> None:
    run(["trial", backbone, "--scale", "none", "--steps", "2", *OPTIONS])
    assert [line.split("\t")[1] for line in capsys.readouterr().out.splitlines()[1:]] == ["untouched"]


USAGE = [
    (["--scale", "0"], "is not a number above zero"),
    (["--scale", "1/0"], "is not a number above zero"),
    (["--mode", "magic"], "none of untie, fold, logits"),
    (["--recipe", "magic"], "no recipe is called `magic`"),
    (["--precision", "fp4"], "`precision` must be one of"),
    (["--lr", "-1"], "`lr` must be positive"),
    (["--steps", "9", "--recipe", "naver-distil", "--negatives", "0"], "needs `negatives`"),
]


@pytest.mark.parametrize(("options", "expected"), USAGE)
def test_usage_errors_come_before_anything_is_loaded(capsys: Any, options: list[str], expected: str) -> None:
    assert run(["trial", "./nowhere", "--pairs", "missing.tsv", *options]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert expected in err
    assert "hint: " in err


def test_a_missing_file_is_exit_3(capsys: Any, backbone: str) -> None:
    assert run(["trial", backbone, "--scale", "1", "--pairs", "missing.tsv"]) == 3
    assert "no such file: `missing.tsv`" in capsys.readouterr().err


def test_ctrl_c_leaves_130_and_a_readable_cell(backbone: str) -> None:
    """A real process, a real signal, in the middle of a long run."""
    command = [sys.executable, "-m", "headscale", "trial", backbone, "--scale", "0.5", "--steps", "5000", *OPTIONS]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=_environment())
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and not any(_lines(p) > 3 for p in Path("headscale-runs").glob("*/steps.jsonl")):
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert out == ""
    assert "the same command goes on from there" in err
    (file,) = Path("headscale-runs").glob("trial-*/cell.json")
    assert cells.read_cell(file)["status"] == "interrupted"
    assert len(read_trained(file.parent).run.steps) > 3


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n")


def _environment() -> dict[str, str]:
    root = str(Path(training.__file__).parents[1])
    return {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}


def test_trial_names_its_device(capsys: Any, backbone: str) -> None:
    run(["trial", backbone, "--scale", "none", "--steps", "1", *OPTIONS])
    assert "device cpu: asked for" in capsys.readouterr().err
    assert torch.get_num_threads() >= 1
