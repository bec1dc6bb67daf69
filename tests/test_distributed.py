"""Two real processes over gloo: the loss, gradients and weights of one process with the whole batch, and agreement."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_worker import EXACT, VARIANTS, gradients, trained

from headscale.distributed import Team, join, launched
from headscale.errors import UsageError
from headscale.records import SAMENESS_EXCLUDES


@pytest.fixture(scope="module")
def pair(tmp_path_factory: Any) -> list[dict[str, Any]]:
    """What both processes found; both are started once."""
    folder = tmp_path_factory.mktemp("two")
    script = Path(__file__).with_name("distributed_worker.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, str(script)]
    started = [
        subprocess.Popen(
            [*command, str(rank), str(folder / "store"), str(folder)], env=environment, stderr=subprocess.PIPE
        )
        for rank in (0, 1)
    ]
    said = [process.communicate(timeout=300)[1].decode() for process in started]
    assert started[0].returncode == 0, said
    assert started[1].returncode == -9, said  # the last scenario kills it
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, 1)]


def difference(one: list[Any], other: list[Any]) -> float:
    """Norm of the difference of all tensors over the norm of the first ones."""
    assert [a is None for a in one] == [b is None for b in other]
    both = [(a.double(), b.double()) for a, b in zip(one, other, strict=True) if a is not None]
    apart = sum(float((a - b).square().sum()) for a, b in both)
    return float((apart / sum(float(a.square().sum()) for a, _ in both)) ** 0.5)


def assert_same_step(alone: dict[str, Any], first: dict[str, Any], second: dict[str, Any], tolerance: float) -> None:
    assert first["observed"] == second["observed"]
    assert all(torch.equal(a, b) for a, b in zip(first["gradients"], second["gradients"], strict=True) if a is not None)
    for one, two in zip(alone["observed"], first["observed"], strict=True):
        assert one.keys() == two.keys()
        for key, value in one.items():  # a difference of scores has their rounding, not its own
            absolute = tolerance * one["score_sd"] if "margin" in key else 0
            assert two[key] == pytest.approx(value, rel=tolerance, abs=absolute), key
    apart = difference(alone["gradients"], first["gradients"])
    assert apart < tolerance, apart


@pytest.mark.parametrize("name", EXACT)
def test_loss_and_gradients_are_those_of_one_process_with_the_whole_batch(pair: Any, name: str) -> None:
    """In float64, where only a mistake could be as large as 1e-6 (the numbers of a record are float32)."""
    alone = gradients(None, double=True, **VARIANTS[name])
    assert_same_step(alone, *(found[f"double {name}"] for found in pair), 2e-7)


@pytest.mark.parametrize(("name", "tolerance"), [("pairs", 1e-6), ("negatives", 1e-6), ("half", 2e-2)])
def test_so_they_are_in_the_precisions_people_train_in(pair: Any, name: str, tolerance: float) -> None:
    """In bf16 the activations themselves are rounded, at 2^-8, for matrices of another shape."""
    assert_same_step(gradients(None, **VARIANTS[name]), *(found[f"gradients {name}"] for found in pair), tolerance)


@pytest.mark.parametrize("name", ["pairs", "negatives", "parts"])
def test_after_some_steps_the_weights_are_those_of_one_process(pair: Any, name: str) -> None:
    alone = trained(None, **VARIANTS[name])
    first, second = (found[f"trained {name}"] for found in pair)
    for key, tensor in first["weights"].items():
        assert torch.equal(tensor, second["weights"][key]), key
    moved = difference(list(alone["weights"].values()), list(first["weights"].values()))
    assert moved < 1e-5, moved  # AdamW divides by the gradient's size, so that its smallest entries' rounding shows
    assert first["run"]["processes"] == 2
    for one, two in zip(alone["run"]["steps"], first["run"]["steps"], strict=True):
        for key in ("loss", "grad_norm", "active_dims_document", "score_sd", "cosine_query"):
            assert two[key] == pytest.approx(one[key], rel=1e-4), key
    assert first["run"]["end"]["ranking"]["mrr_at_10"] == pytest.approx(alone["run"]["end"]["ranking"]["mrr_at_10"])


def test_one_process_short_of_memory_halves_on_both(pair: Any) -> None:
    first, second = (found["short_of_memory"]["run"] for found in pair)
    assert first["texts_at_once"] == second["texts_at_once"] == 2
    whole = pair[0]["trained pairs"]["run"]
    for one, two in zip(whole["steps"], first["steps"], strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)


def test_an_error_on_one_process_is_an_error_on_both(pair: Any) -> None:
    first, second = (found["failing"] for found in pair)
    assert first.startswith("HeadscaleError: process 1 failed: ")
    assert not second.startswith("HeadscaleError")
    assert second != "nothing"


def test_the_first_process_stops_both(pair: Any) -> None:
    assert [found["stopping"] for found in pair] == [["stopped", 2, [0, 1]], ["stopped", 2, []]]


def test_ctrl_c_on_one_process_interrupts_both_at_the_same_step(pair: Any) -> None:
    assert [found["interrupted"] for found in pair] == [["interrupted", 2]] * 2


def test_both_start_from_the_first_ones_weights(pair: Any) -> None:
    first, second = (found["other_weights"]["weights"] for found in pair)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(first[name], tensor) for name, tensor in pair[0]["trained pairs"]["weights"].items())


def test_processes_drop_other_units_and_keep_the_same_weights(pair: Any) -> None:
    first, second = (found["dropping"] for found in pair)
    assert not torch.equal(first["first"], second["first"])
    assert all(torch.equal(first["weights"][name], second["weights"][name]) for name in first["weights"])


def test_a_batch_that_cannot_be_shared_equally_is_refused(pair: Any) -> None:
    for found in pair:
        assert found["uneven"].startswith("UsageError: a batch of 7 queries cannot be shared equally by 2 processes")


def test_a_process_that_is_killed_ends_the_other_with_a_sentence(pair: Any) -> None:
    assert pair[0]["dying"].startswith("HeadscaleError: another process of this training ended")


def test_alone_there_is_nobody_to_wait_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with launched() as team:
        assert team == Team()
    with pytest.raises(UsageError, match="no process group"):
        join()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert Team(1, 4, 1, 2).device("auto") == Team(3, 4, 1, 2).device("cuda") == "cuda:1"
    with pytest.raises(UsageError, match="cannot share the device `cuda:0`"):
        Team(1, 2).device("cuda:0")


def test_what_may_differ_is_named() -> None:
    assert "texts_at_once" in SAMENESS_EXCLUDES
