"""Sweeps: which cells a grid has, that they resume, fail alone, and give the same rows wherever they run."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from tiny_models import tiny_checkpoint

from headscale import cells
from headscale.cli import run
from headscale.errors import UsageError
from headscale.grid import Axes, InProcess, LocalProcesses, pending, row_of, sweep
from headscale.training import TrainingConfig
from headscale.trials import TextSource, configuration_of, folder_of

CONFIG = TrainingConfig(
    steps=3, batch_size=4, lr=1e-3, query_length=12, document_length=16, mode="untie", scale=0.5, device="cpu",
)  # fmt: skip
ROWS = [f"w{5 + i} w{40 + i}\tw{40 + i} w{60 + i % 30} w{5 + i} w{7 + i % 11}" for i in range(32)]
RUNS = Path("runs")


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("pairs.tsv").write_text("\n".join(ROWS) + "\n")


@pytest.fixture
def backbone(tmp_path: Path) -> str:
    return str(tiny_checkpoint("bert", tmp_path / "backbone"))


SOURCE = TextSource("pairs.tsv", "pairs.tsv", candidates=12)


def configured(backbone: str, **changes: Any) -> dict[str, Any]:
    return configuration_of(backbone, CONFIG.replace(**changes), SOURCE, SOURCE.read())


# --- the grid ------------------------------------------------------------------------------------------------------


def test_the_grid_is_the_product_without_duplicates() -> None:
    axes = Axes((None, 0.5, 0.25), ("untie", "fold"), (1.0, 4.0), (1e-3, 1e-4), (0, 1))
    found = axes.trainings(CONFIG)
    points = {(c.lr, c.scale, c.mode, c.head_lr_multiplier, c.seed) for c in found}
    heads = {(1.0, "none", 1.0)} | {(s, "untie", m) for s in (0.5, 0.25) for m in (1.0, 4.0)}
    heads |= {(s, "fold", 1.0) for s in (0.5, 0.25)}
    assert points == {(lr, *head, seed) for lr in (1e-3, 1e-4) for head in heads for seed in (0, 1)}
    assert len(found) == len(points) == 28


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(UsageError, match="none of untie, fold, logits"):
        Axes((1.0,), ("magic",)).check()


def test_a_shift_goes_with_every_constant_and_with_no_untouched_head() -> None:
    found = Axes((None, 1.0, 0.5), seeds=(0, 1), shifts=(0.0, -2.0)).trainings(CONFIG)
    heads = [(t.mode, t.scale, t.shift) for t in found if t.seed == 0]
    assert sorted(heads) == [("none", 1.0, 0.0), ("untie", 0.5, -2.0), ("untie", 0.5, 0.0), ("untie", 1.0, -2.0),
                             ("untie", 1.0, 0.0)]  # fmt: skip
    assert len(found) == 2 * len(heads)


# --- running -------------------------------------------------------------------------------------------------------


def test_a_failed_cell_is_kept_as_such_and_the_others_go_on(backbone: str) -> None:
    plan = [configured(backbone, seed=0), configured(backbone, batch_size=64), configured(backbone, seed=1)]
    outcomes = list(sweep(plan, RUNS))
    assert [o.status for o in outcomes] == ["done", "failed", "done"]
    assert "do not fill a batch" in outcomes[1].message
    kept = cells.read_cell(folder_of(plan[1], RUNS))
    assert kept["status"] == "failed"
    assert kept["result"]["message"] == outcomes[1].message
    rows = [row_of(one, RUNS) for one in plan]
    assert [r.status for r in rows] == ["done", "failed", "done"]
    assert rows[1].mrr_test is None
    assert rows[0].mrr_test is not None


def test_an_unforeseen_error_is_one_cell_too(backbone: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import headscale.training as training

    honest = training.train

    def breaks(*args: Any, **kwargs: Any) -> Any:
        if args[3].seed == 0:
            raise RuntimeError("boom")
        return honest(*args, **kwargs)

    monkeypatch.setattr(training, "train", breaks)
    outcomes = list(sweep([configured(backbone, seed=0), configured(backbone, seed=1)], RUNS))
    assert [(o.status, o.message) for o in outcomes] == [("failed", "RuntimeError: boom"), ("done", "")]


def test_a_sweep_goes_on_where_it_was_left(backbone: str) -> None:
    plan = [configured(backbone, seed=seed) for seed in range(3)]
    iterator = sweep(plan, RUNS)
    next(iterator)
    iterator.close()  # type: ignore[attr-defined]
    first = folder_of(plan[0], RUNS) / cells.CELL
    stamp = first.stat().st_mtime_ns
    assert pending(plan, RUNS) == plan[1:]
    assert len(list(sweep(plan, RUNS))) == 2
    assert first.stat().st_mtime_ns == stamp
    assert pending(plan, RUNS) == []
    assert list(sweep(plan, RUNS)) == []
    assert len(list(sweep(plan, RUNS, force=True))) == 3


def test_failed_cells_are_tried_again(backbone: str) -> None:
    plan = [configured(backbone, batch_size=64)]
    list(sweep(plan, RUNS))
    assert pending(plan, RUNS) == plan


def _die_on_the_second_seed() -> None:
    """In a worker: a cell of seed 1 ends the process, as the kernel does when memory is short."""
    import signal

    import headscale.grid as grid

    honest = grid.run_cell

    def deadly(configuration: Any, *args: Any, **kwargs: Any) -> Any:
        if configuration["training"]["seed"] == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return honest(configuration, *args, **kwargs)

    grid.run_cell = deadly


def test_processes_give_the_rows_of_one_process_and_survive_a_killed_worker(backbone: str) -> None:
    plan = [configured(backbone, seed=seed) for seed in range(4)]
    list(sweep(plan, Path("alone"), executor=InProcess()))
    executor = LocalProcesses(2, 1, prepare=_die_on_the_second_seed)
    outcomes = {o.configuration["training"]["seed"]: o for o in sweep(plan, RUNS, executor=executor)}
    assert {seed: o.status for seed, o in outcomes.items()} == {0: "done", 1: "failed", 2: "done", 3: "done"}
    assert "signal 9" in outcomes[1].message
    alone, together = ([row_of(one, where) for one in plan] for where in (Path("alone"), RUNS))
    assert [together[i] for i in (0, 2, 3)] == [alone[i] for i in (0, 2, 3)]


def test_a_cell_that_was_never_run_is_a_missing_row(backbone: str) -> None:
    assert row_of(configured(backbone), RUNS).status == "missing"


# --- the command ---------------------------------------------------------------------------------------------------

OPTIONS = ["--pairs", "pairs.tsv", "--test-pairs", "pairs.tsv", "--batch-size", "4", "--query-length", "12",
           "--document-length", "16", "--steps", "2", "--device", "cpu"]  # fmt: skip


def test_sweep_prints_a_row_a_cell_and_resumes(capsys: Any, backbone: str) -> None:
    command = ["sweep", backbone, "--scales", "none,1/4", "--lrs", "1e-3,1e-4", "--seeds", "2", *OPTIONS]
    assert run(command) == 0
    out, err = capsys.readouterr()
    lines = [line.split("\t") for line in out.splitlines()]
    assert len(lines) == 1 + 8
    assert {line[1] for line in lines[1:]} == {"1.0", "0.25"}
    assert "8 cells, 0 of them finished already" in err
    assert run(command) == 0
    again, err = capsys.readouterr()
    assert again == out
    assert "8 cells, 8 of them finished already" in err


def test_sweep_leaves_1_where_a_cell_failed(capsys: Any, backbone: str) -> None:
    command = ["sweep", backbone, "--scales", "1/4", "--batch-size", "64"]
    assert run([*command, *[o for o in OPTIONS if o not in ("--batch-size", "4")], "--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert document["results"][0]["status"] == "failed"
    assert "do not fill a batch" in document["errors"][0]["message"]


def test_sweep_of_a_missing_backbone_is_exit_3_and_the_others_stand(capsys: Any, backbone: str) -> None:
    assert run(["sweep", "./missing", backbone, "--scales", "1/4", *OPTIONS]) == 3
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 2
    assert "`./missing`" in err


@pytest.mark.parametrize(
    ("options", "expected"),
    [(["--scales", ","], "`--scales` is empty"), (["--scales", "1,x"], "not a number"), (["--modes", "magic"], "magic"),
     (["--lrs", "0"], "not a number above zero")],
)  # fmt: skip
def test_usage_errors(capsys: Any, backbone: str, options: list[str], expected: str) -> None:
    assert run(["sweep", backbone, *options, *OPTIONS]) == 2
    assert expected in capsys.readouterr().err
