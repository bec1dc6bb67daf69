"""What a tracker was given is what its own reader finds again."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from headscale.cells import read_cell
from headscale.cli import run
from headscale.errors import HeadscaleError, UsageError
from headscale.interop.tracking import Tracking, check_backend, following, scalars_of, track_cell
from headscale.records import StepRecord, TrialVerdict
from headscale.trials import read_trained

TRIAL = ["trial", "bundled:tiny-bert", "--scale", "none", "--steps", "3", "--compressed", "--batch-size", "4",
         "--query-length", "8", "--document-length", "12", "--candidates", "0", "--device", "cpu"]  # fmt: skip


@pytest.fixture
def texts(tmp_path: Path) -> list[str]:
    """Arguments for a training on ten made-up pairs."""
    file = tmp_path / "pairs.tsv"
    file.write_text("".join(f"query number {i}\tdocument number {i} of ten\n" for i in range(10)))
    return ["--pairs", str(file), "--run", str(tmp_path / "runs")]


def read_tensorboard(folder: Path) -> tuple[dict[str, list[tuple[int, float]]], dict[str, Any]]:
    """Scalars by name and texts by name, through TensorBoard's own reader."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    scalars = {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}
    texts = {
        name.removesuffix("/text_summary"): json.loads(make_ndarray(events.Tensors(name)[0].tensor_proto)[0])
        for name in events.Tags()["tensors"]
    }
    return scalars, texts


def only_cell(runs: Path) -> Path:
    (file,) = runs.glob("trial-*/cell.json")
    return file.parent


def test_trial_in_tensorboard(tmp_path: Path, texts: list[str]) -> None:
    assert run([*TRIAL, *texts, "--track", "tensorboard", "-q"]) in (0, 1)
    folder = only_cell(tmp_path / "runs")
    cell = read_trained(folder)
    scalars, found = read_tensorboard(folder)
    for name in ("loss_over_ln_n", "active_dims_document", "grad_norm", "lr"):
        assert [step for step, _ in scalars[name]] == [0, 1, 2]
        expected = [getattr(record, name) for record in cell.run.steps]
        assert [value for _, value in scalars[name]] == pytest.approx(expected, rel=1e-6)
    assert found["verdict"] == cell.verdict.to_dict()
    assert found["configuration"]["training"] == read_cell(folder)["configuration"]["training"]


def test_off_by_default(tmp_path: Path, texts: list[str]) -> None:
    assert run([*TRIAL, *texts, "-q"]) in (0, 1)
    assert {path.name for path in only_cell(tmp_path / "runs").iterdir()} == {"cell.json", "steps.jsonl"}


def test_sweep_and_the_same_again(tmp_path: Path, texts: list[str]) -> None:
    sweep = ["sweep", TRIAL[1], "--scales", "none", *TRIAL[4:], *texts, "--track", "tensorboard", "-q"]
    assert run(sweep) == 0
    assert run([*sweep, "--force"]) == 0
    folder = only_cell(tmp_path / "runs")
    scalars, _ = read_tensorboard(folder)
    assert len(scalars["loss"]) == 3  # of the second run alone


def test_unknown_tracker_is_said_before_anything_runs(tmp_path: Path, texts: list[str], capsys: Any) -> None:
    assert run([*TRIAL, *texts, "--track", "paper"]) == 2
    assert "no tracker is called `paper`" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, words in {
        "tensorboard": "headscale[tracking]",
        "wandb": "headscale[tracking]",
        "trackio": "trackio",
    }.items():
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
        with pytest.raises(HeadscaleError) as caught:
            check_backend(name)
        assert words in caught.value.hint
    with pytest.raises(UsageError):
        check_backend("mlflow")


def record(step: int, loss: float) -> StepRecord:
    numbers = dict.fromkeys((f for f in StepRecord.__dataclass_fields__), 1.0)
    return StepRecord(**{**numbers, "step": step, "loss": loss, "cosine_query": None, "skipped": False})  # type: ignore[arg-type]


def test_numbers_that_are_none_or_not_finite_are_left_out() -> None:
    found = scalars_of(record(3, math.inf))
    assert "loss" not in found
    assert "cosine_query" not in found
    assert "step" not in found
    assert found["skipped"] == 0.0
    assert found["grad_norm"] == 1.0


VERDICT = TrialVerdict("stable", "forecast", "loss_over_ln_n", 0.5, 1.0, 3, 0.1, False, (), "it trains")


def test_weights_and_biases_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    with following("wandb", tmp_path, {"seed": 7}) as step:
        assert step is not None
        for number in range(3):
            step(record(number, number / 2), VERDICT)
    wandb.teardown()  # its process has then written all it has
    rows, config, summary = read_wandb(tmp_path)
    assert [(row["_step"], row["loss"]) for row in rows] == [(0, 0.0), (1, 0.5), (2, 1.0)]
    assert config["seed"] == 7
    assert summary["verdict"]["word"] == "stable"


def read_wandb(folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any], dict[str, Any]]:
    """History, configuration and summary from an offline run's log, decoded by its own protocol."""
    from wandb.proto import wandb_internal_pb2

    (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    rows: list[dict[str, Any]] = []
    config: dict[str, Any] = {}
    summary: dict[str, Any] = {}

    def values(items: Any) -> dict[str, Any]:
        return {".".join([item.key] if item.key else item.nested_key): json.loads(item.value_json) for item in items}

    for data in leveldb_records(file.read_bytes()):
        message = wandb_internal_pb2.Record()
        message.ParseFromString(data)
        kind = message.WhichOneof("record_type")
        if kind == "history":
            rows.append(values(message.history.item))
        elif kind == "run":
            config |= values(message.run.config.update)
        elif kind == "summary":
            summary |= values(message.summary.update)
    return rows, config, summary


def leveldb_records(data: bytes) -> Iterator[bytes]:
    """Records of a log in LevelDB's format: blocks of 32 KiB, in them checksum, length, kind and a fragment."""
    at, whole = 7, b""  # after the file's own header
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last fragment
            yield whole
            whole = b""


def test_nothing_is_opened_without_a_step(tmp_path: Path) -> None:
    with Tracking("tensorboard", tmp_path, "run", {}):
        pass
    assert list(tmp_path.iterdir()) == []


def test_finished_cell_can_be_logged_later(tmp_path: Path, texts: list[str]) -> None:
    assert run([*TRIAL, *texts, "-q"]) in (0, 1)
    folder = only_cell(tmp_path / "runs")
    track_cell("tensorboard", folder)
    scalars, found = read_tensorboard(folder)
    assert len(scalars["loss"]) == 3
    assert found["verdict"] == read_trained(folder).verdict.to_dict()
