"""The demo on the real bundled backbones: what it must show, and that it goes on where it stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from headscale import cells, demo
from headscale.cli import run


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_the_story_is_true(capsys: Any) -> None:
    """One seed of the real thing: the reference and the repaired arms learn, the untouched one does not."""
    assert run(["demo", "--json", "-q"]) == 0
    document = json.loads(capsys.readouterr().out)
    calibration, reference, untouched, scaled, calibrated = document["results"]
    assert calibration["shift"] < 0
    mrr = {arm["name"]: [r["end"]["ranking"]["mrr_at_10"] for r in arm["runs"]] for arm in document["results"][1:]}
    chance = untouched["runs"][0]["end"]["ranking"]["chance_mrr_at_10"]
    assert untouched["runs"][0]["steps"][0]["loss_over_ln_n"] > 10
    assert scaled["scale"] < 1
    assert scaled["shift"] == 0
    assert max(mrr[untouched["name"]]) < min(mrr[scaled["name"]]) / 3
    assert min(mrr[calibrated["name"]]) > min(mrr[scaled["name"]])
    assert min(mrr[reference["name"]]) > 10 * chance
    assert min(mrr[calibrated["name"]]) > 10 * chance
    assert "<svg" in Path("headscale-demo/loss.svg").read_text()[:500]
    assert len(list(cells.find_cells(Path("headscale-demo"), "trial"))) == 4


def test_finished_arms_are_reused(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "STEPS", 4)
    monkeypatch.setattr(demo, "CANDIDATES", 40)
    run(["demo", "-q", "--json", "-o", "here"])
    first = json.loads(capsys.readouterr().out)
    stamps = {p: p.stat().st_mtime_ns for p in Path("here").rglob("cell.json")}
    run(["demo", "--json", "-o", "here"])
    again = capsys.readouterr()
    assert "reusing" in again.err
    assert json.loads(again.out)["results"] == first["results"]
    assert {p: p.stat().st_mtime_ns for p in Path("here").rglob("cell.json")} == stamps


def test_interrupted_training_goes_on_with_the_finished_arms(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import headscale.training as training

    monkeypatch.setattr(demo, "STEPS", 4)
    monkeypatch.setattr(demo, "CANDIDATES", 40)
    honest, calls = training.train, []

    def second_is_interrupted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return honest(*args, **kwargs)

    monkeypatch.setattr(training, "train", second_is_interrupted)
    assert run(["demo", "-q", "-o", "here"]) == 130
    assert "the same command goes on from there" in capsys.readouterr().err
    done = [c for c in cells.find_cells(Path("here"), "trial") if c["status"] == "done"]
    assert len(done) == 1
    assert run(["demo", "-q", "-o", "here"]) in (0, 1)
    assert len(calls) == 5
