"""Saved results come back as the records that they were, whatever state their folder is in."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from headscale import __version__, cells, results
from headscale.errors import NotFoundError, UnreadableError
from headscale.records import CollectionSummary, Estimate, Evaluation, SystemResult
from headscale.render import write_document
from headscale.results import Results, load

GOLDEN = Path(__file__).parent / "golden" / "runs"


@pytest.fixture(scope="module")
def golden() -> Results:
    return load([GOLDEN])


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A copy of the golden run folder, to damage."""
    return Path(shutil.copytree(GOLDEN, tmp_path / "runs"))


def a_training(run: Path) -> Path:
    return min(run.glob("trial-*-untie-0.125-seed0-*"))


def evaluation(name: str = "one/model", value: float = 0.4) -> Evaluation:
    collection = CollectionSummary("docs", "test", "f", 100, 20, 20, 0, 0)
    system = SystemResult(
        name, "", Estimate(value, value - 0.1, value + 0.1, 0.3), None, None, None, None, None, None, 9
    )
    return Evaluation(name, None, collection, 32, 64, False, 2000, 0, (system,))


def test_every_kind_of_cell_is_found(golden: Results) -> None:
    assert sorted(i.name for i in golden.inspections) == ["bundled:tiny-bert", "bundled:tiny-modernbert"]
    assert [c.name for c in golden.calibrations] == ["bundled:tiny-modernbert"]
    assert len(golden.trainings) == len(list(GOLDEN.glob("trial-*")))
    assert {t.status for t in golden.trainings} == {"done"}
    assert golden.references == ("bundled:tiny-bert",)
    assert (golden.unreadable, golden.empty) == ((), False)


def test_records_are_those_that_were_written(golden: Results) -> None:
    for training in golden.trainings:
        assert training.folder is not None
        assert training.cell is not None
        content = json.loads((Path(training.folder) / cells.CELL).read_text())
        assert training.cell.to_dict() == {**content["result"], "run": training.cell.run.to_dict()}
        assert (training.key, training.configuration) == (content["key"], content["configuration"])


def test_steps_are_the_lines_of_the_log(golden: Results) -> None:
    training = golden.trainings[0]
    assert training.folder is not None
    lines = [json.loads(line) for line in (Path(training.folder) / cells.STEPS).read_text().splitlines()]
    found = training.steps()
    assert set(lines[0]) <= set(found)
    for name, values in found.items():
        expected = [math.nan if line.get(name) is None else float(line[name]) for line in lines]
        np.testing.assert_array_equal(values, expected)
    assert training.steps_done() == len(lines)


def test_thinned_steps_keep_the_last(golden: Results) -> None:
    training = golden.trainings[0]
    assert list(training.steps(["loss"], every=5)["step"]) == [0, 5, 10, 11]
    assert list(training.steps(["loss"], every=11)["step"]) == [0, 11]
    every, thinned = training.steps(["loss"])["loss"], training.steps(["loss"], every=5)["loss"]
    np.testing.assert_array_equal(thinned, every[[0, 5, 10, 11]])


def test_a_half_written_last_line_and_a_damaged_one_are_left_out(run: Path) -> None:
    folder = a_training(run)
    log = folder / cells.STEPS
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join([*lines[:3], '{"step": 3, "loss"\n', *lines[4:6], lines[6][:40]]))
    (training,) = load([folder]).trainings
    found = training.steps(["loss"])
    assert list(found["step"]) == [0, 1, 2, 4, 5]
    assert np.isfinite(found["loss"]).all()


def test_non_finite_numbers_become_nan(run: Path) -> None:
    folder = a_training(run)
    rows = [json.loads(line) for line in (folder / cells.STEPS).read_text().splitlines()]
    rows[4]["loss"] = None
    (folder / cells.STEPS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (training,) = load([folder]).trainings
    assert list(np.isnan(training.steps(["loss"])["loss"])) == [i == 4 for i in range(len(rows))]


def test_a_training_at_work_has_its_configuration_and_its_curve(run: Path) -> None:
    folder = a_training(run)
    whole = load([folder]).trainings[0]
    (folder / cells.CELL).unlink()
    (folder / cells.BEGUN).write_text(json.dumps(whole.configuration))
    (training,) = load([folder]).trainings
    assert (training.status, training.cell) == ("running", None)
    assert (training.configuration, training.key) == (whole.configuration, whole.key)
    np.testing.assert_array_equal(training.steps(["loss"])["loss"], whole.steps(["loss"])["loss"])


def test_a_log_without_anything_else_is_known_by_its_folder(run: Path) -> None:
    folder = a_training(run)
    (folder / cells.CELL).unlink()
    (training,) = load([folder]).trainings
    assert (training.status, training.key) == ("running", folder.name[-12:])
    assert training.training == {"scale": 0.125, "mode": "untie", "seed": 0}


def test_failed_and_interrupted_cells_stay_visible(run: Path) -> None:
    failed, interrupted = sorted(run.glob("trial-*seed0-*"))[:2]
    configuration = cells.read_cell(failed)["configuration"]
    cells.write_cell(failed, "trial", configuration, {"message": "out of memory", "hint": ""}, status="failed")
    cell = cells.read_cell(interrupted)
    cells.write_cell(interrupted, "trial", cell["configuration"], cell["result"], status="interrupted")
    found = {t.key: t for t in load([run]).trainings}
    assert (found[failed.name[-12:]].status, found[failed.name[-12:]].message) == ("failed", "out of memory")
    assert found[interrupted.name[-12:]].status == "interrupted"


def test_one_unreadable_cell_is_named_and_costs_no_other(run: Path, golden: Results) -> None:
    folder = a_training(run)
    (folder / cells.CELL).write_text("{")
    found = load([run])
    assert len(found.trainings) == len(golden.trainings) - 1
    ((path, sentence),) = found.unreadable
    assert path == str(folder)
    assert "is not JSON" in sentence


def test_a_cell_of_a_later_version_is_named(run: Path) -> None:
    folder = a_training(run)
    cell = cells.read_cell(folder)
    cell["result"]["verdict"]["mood"] = "fine"
    (folder / cells.CELL).write_text(json.dumps(cell))
    with pytest.raises(UnreadableError, match="TrialVerdict lacks or does not know mood"):
        load([folder / cells.CELL])


def test_a_cell_and_its_folder_and_its_parent_are_the_same(golden: Results) -> None:
    folder = a_training(GOLDEN)
    one = load([folder / cells.CELL])
    assert one.trainings == load([folder]).trainings
    assert one.trainings[0] in golden.trainings
    assert load([GOLDEN, folder, folder / cells.CELL]).trainings == golden.trainings


def test_documents_hold_the_same_records(golden: Results, tmp_path: Path) -> None:
    write_document("inspect", golden.inspections, [], tmp_path / "i.json")
    write_document("calibrate", golden.calibrations, [], tmp_path / "c.json")
    write_document("evaluate", [evaluation()], [], tmp_path / "e.json")
    found = load([tmp_path / "i.json", tmp_path / "c.json", tmp_path / "e.json"])
    assert (found.inspections, found.calibrations) == (golden.inspections, golden.calibrations)
    assert found.evaluations == (evaluation(),)
    assert {env["headscale"] for env in found.environments} == {__version__}
    assert load([GOLDEN, tmp_path / "i.json"]).inspections == golden.inspections


def test_a_trial_document_gives_trainings_and_repeats_no_cell(golden: Results, tmp_path: Path) -> None:
    from headscale.trials import Arm, result_of, training_of

    trained = [t for t in golden.trainings if t.training["scale"] == 0.125]
    arm = Arm("calibrated", training_of(trained[0].configuration))
    result = result_of("bundled:tiny-modernbert", arm, [t.cell for t in trained if t.cell])
    write_document("trial", [result], [], tmp_path / "t.json")
    alone = load([tmp_path / "t.json"]).trainings
    assert [t.cell for t in alone] == [t.cell for t in trained]
    assert all(len(t.steps()["step"]) == 0 for t in alone)
    assert load([GOLDEN, tmp_path / "t.json"]).trainings == golden.trainings


def test_a_sweep_document_gives_rows(golden: Results, tmp_path: Path) -> None:
    from headscale.grid import row_of_cell

    folders = [Path(t.folder) for t in golden.trainings if t.folder]
    rows = [row_of_cell(cells.read_cell(folder), folder) for folder in folders]
    write_document("sweep", [*rows, replace(rows[0], status="missing", key="0" * 12)], [], tmp_path / "s.json")
    found = load([tmp_path / "s.json"]).trainings
    assert [t.row for t in found] == rows
    assert [t.training["shift"] for t in found] == [row.shift for row in rows]
    assert load([GOLDEN, tmp_path / "s.json"]).trainings == golden.trainings


def test_bad_paths_are_named_together(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"no result at `nowhere`, `no/such\.json`") as error:
        load(["nowhere", GOLDEN, "no/such.json"])
    assert error.value.hint


def test_a_folder_without_results(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no result below"):
        load([tmp_path])
    assert load([tmp_path], allow_empty=True).empty


@pytest.mark.parametrize("text", ["not json", "[]", '{"schema": "headscale.profile/1"}', '{"results": 3}'])
def test_other_files_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UnreadableError):
        load([tmp_path / "x.json"])


def test_reading_imports_neither_torch_nor_pandas() -> None:
    import subprocess
    import sys

    code = (
        "import sys\nfrom headscale import results\nfound = results.load(sys.argv[1:])\nfound.trainings[0].steps()\n"
        "assert not {'torch', 'pandas', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(GOLDEN)], check=True, timeout=60)


def test_backbones_come_references_first(golden: Results) -> None:
    assert list(results.backbones(golden)) == ["bundled:tiny-bert", "bundled:tiny-modernbert"]
