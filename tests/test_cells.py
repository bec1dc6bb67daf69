"""The run folder: whole files or none, names that depend on the inputs alone, and reuse only of what is the same."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
from tiny_models import tiny_checkpoint

from headscale import api, cells
from headscale.activations import Encoding
from headscale.api import Loading, inspect_in_run, inspected_names
from headscale.cells import CELL, cell_folder, cell_key, find_cells, finished, read_cell, write_cell, write_json
from headscale.environment import environment
from headscale.errors import HeadscaleError, NotFoundError, UnreadableError
from headscale.inspection import texts_of
from headscale.texts import Pair

CONFIGURATION = {"name": "some/model", "texts": {"pairs": 4}, "seed": 0, "none": None}


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


# --- writing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [{"a": math.nan}, {"a": math.inf}, {"a": object()}, {"a": {1, 2}}])
@pytest.mark.parametrize("before", [None, "old"])
def test_content_that_is_no_json_leaves_what_was_there(content: Any, before: str | None, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "x.json"
    if before:
        path.parent.mkdir()
        path.write_text(before)
    with pytest.raises((TypeError, ValueError)):
        write_json(path, content)
    assert files(tmp_path) == (["deep/x.json"] if before else [])
    assert not before or path.read_text() == before


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_a_write_that_breaks_off_leaves_no_part(moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "x.json"
    write_json(path, {"a": 1})
    with monkeypatch.context() as patch:
        patch.setattr(*((os, "fsync") if moment == "fsync" else (Path, "replace")), full)
        with pytest.raises(HeadscaleError, match="cannot be written: No space left on device"):
            write_json(path, {"a": 2})
    assert files(tmp_path) == ["x.json"]
    assert json.loads(path.read_text()) == {"a": 1}


def test_an_interruption_leaves_no_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_json(tmp_path / "x.json", {"a": 1})
    assert files(tmp_path) == []


def test_a_run_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("not a folder")
    with pytest.raises(HeadscaleError, match="cannot be written") as error:
        write_cell(tmp_path / "run" / "cell", "inspect", CONFIGURATION, {})
    assert error.value.exit_code == 3


# --- names and keys ------------------------------------------------------------------------------------------------


def test_a_key_depends_on_content_and_on_all_of_it() -> None:
    turned = dict(reversed(list(CONFIGURATION.items())))
    assert cell_key(CONFIGURATION) == cell_key(turned) == cell_key(json.loads(json.dumps(CONFIGURATION)))
    others = [{**CONFIGURATION, "seed": 1}, {**CONFIGURATION, "none": False}, {**CONFIGURATION, "texts": {"pairs": 5}}]
    keys = {cell_key(c) for c in (CONFIGURATION, *others)}
    assert len(keys) == 4
    assert all(len(key) == 12 and int(key, 16) >= 0 for key in keys)


def test_keys_stay_the_same_from_version_to_version() -> None:
    assert cell_key({"name": "a", "seed": 0}) == cell_key({"seed": 0, "name": "a"}) == "61855d307d4c"


@pytest.mark.parametrize(
    ("label", "name"),
    [
        ("bert-base-uncased", "inspect-bert-base-uncased-k"),
        ("answerdotai/ModernBERT-base", "inspect-answerdotai-ModernBERT-base-k"),
        ("../../etc/passwd", "inspect-etc-passwd-k"),
        ("/home/me/my model", "inspect-home-me-my-model-k"),
        ("bundled:tiny-bert", "inspect-bundled-tiny-bert-k"),
        ("模型", "inspect-unnamed-k"),
        ("...", "inspect-unnamed-k"),
        ("", "inspect-unnamed-k"),
    ],
)
def test_folders_are_readable_and_stay_inside(label: str, name: str) -> None:
    folder = cell_folder(Path("run"), "inspect", label, "k")
    assert folder == Path("run") / name
    assert len(cell_folder(Path("run"), "inspect", label * 99, "k").name) <= 60


# --- reading -------------------------------------------------------------------------------------------------------


def test_a_cell_through_its_file(tmp_path: Path) -> None:
    path = write_cell(tmp_path / "c", "inspect", CONFIGURATION, {"loss": 1.5})
    cell = read_cell(tmp_path / "c")
    assert cell == read_cell(path)
    assert cell == {
        "schema": "headscale.cell/1",
        "kind": "inspect",
        "configuration": CONFIGURATION,
        "key": cell_key(CONFIGURATION),
        "result": {"loss": 1.5},
        "status": "done",
        "env": environment(),
    }
    assert files(tmp_path) == ["c/cell.json"]


BAD = {
    "empty": b"",
    "half": b'{"schema": "headscale.cell/1", "ki',
    "not UTF-8": b'{"schema": "\xff"}',
    "a list": b"[]",
    "another schema": b'{"schema": "headscale.cell/2"}',
    "fields missing": b'{"schema": "headscale.cell/1", "kind": "inspect"}',
    "fields of another type": json.dumps(
        {"schema": cells.SCHEMA, "kind": 1, "configuration": [], "key": "", "result": {}, "status": "done"}
    ).encode(),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_no_cell_is_refused_and_never_reused(kind: str, tmp_path: Path) -> None:
    (tmp_path / CELL).write_bytes(BAD[kind])
    for read in (read_cell, lambda path: list(find_cells(path))):
        with pytest.raises(UnreadableError) as error:
            read(tmp_path)
        assert error.value.hint
    assert finished(tmp_path, CONFIGURATION) is None
    write_cell(tmp_path, "inspect", CONFIGURATION, {"loss": 1.0})  # running it again repairs it
    assert finished(tmp_path, CONFIGURATION) == {"loss": 1.0}


def test_what_is_not_there(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "no", tmp_path / "no" / CELL):
        with pytest.raises(NotFoundError, match="no result at"):
            read_cell(path)
    with pytest.raises(NotFoundError, match="no result at"):
        list(find_cells(tmp_path / "no"))
    assert list(find_cells(tmp_path)) == []
    assert finished(tmp_path, CONFIGURATION) is None


def test_only_the_same_and_finished_is_reused(tmp_path: Path) -> None:
    write_cell(tmp_path, "trial", CONFIGURATION, {"a": 1}, status="interrupted")
    assert finished(tmp_path, CONFIGURATION) is None
    write_cell(tmp_path, "trial", CONFIGURATION, {"a": 2})
    assert finished(tmp_path, CONFIGURATION) == {"a": 2}
    assert finished(tmp_path, {**CONFIGURATION, "seed": 1}) is None


def test_cells_are_found_from_every_level_in_order(tmp_path: Path) -> None:
    for kind, seed in (("trial", 1), ("inspect", 0), ("inspect", 2)):
        configuration = {"seed": seed}
        folder = cell_folder(tmp_path / "run", kind, str(seed), cell_key(configuration))
        write_cell(folder, kind, configuration, {"seed": seed})
    (tmp_path / "run" / "notes.txt").write_text("passed over")
    assert [c["result"]["seed"] for c in find_cells(tmp_path)] == [0, 2, 1]
    assert [c["result"]["seed"] for c in find_cells(tmp_path / "run", "trial")] == [1]
    one = next((tmp_path / "run").glob("trial-*"))
    for path in (one, one / CELL):
        assert [c["kind"] for c in find_cells(path)] == ["trial"]


# --- inspect through the run folder --------------------------------------------------------------------------------

TEXTS = texts_of([Pair(f"w{i}", f"w{i} w{i + 1}") for i in range(10, 14)], "given", Encoding(8, 16, 2))


class Counting:
    """Counts measurements and keeps what was told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.weights = self.outputs = 0
        self.told: list[str] = []
        self.loading = Loading(tell=self.told.append)
        weights, outputs = api.inspect_weights, api.measure_by_name

        def count_weights(*args: Any, **options: Any) -> Any:
            self.weights += 1
            return weights(*args, **options)

        def count_outputs(*args: Any, **options: Any) -> Any:
            self.outputs += 1
            return outputs(*args, **options)

        monkeypatch.setattr(api, "inspect_weights", count_weights)
        monkeypatch.setattr(api, "measure_by_name", count_outputs)


def test_a_finished_inspection_is_reused_until_something_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, run = tiny_checkpoint("bert", tmp_path / "model"), tmp_path / "run"
    counting = Counting(monkeypatch)
    first = inspect_in_run(str(model), TEXTS, run, loading=counting.loading)
    again = inspect_in_run(str(model), TEXTS, run, loading=counting.loading)
    assert counting.outputs == 1
    assert again == first
    (folder,) = run.iterdir()
    assert counting.told == [f"`{model}`: reusing `{folder}` (`--force` measures again)"]

    forced = inspect_in_run(str(model), TEXTS, run, force=True, loading=counting.loading)
    assert (counting.outputs, forced) == (2, first)
    assert list(run.iterdir()) == [folder]

    alone = inspect_in_run(str(model), None, run, loading=counting.loading)
    assert (counting.weights, alone.output, len(list(run.iterdir()))) == (1, None, 2)
    assert inspect_in_run(str(model), None, run, loading=counting.loading) == alone

    (model / "config.json").write_text((model / "config.json").read_text() + "\n")  # the files changed
    inspect_in_run(str(model), TEXTS, run, loading=counting.loading)
    assert (counting.outputs, len(list(run.iterdir()))) == (3, 3)
    monkeypatch.setattr(api, "__version__", "9.9.9")
    inspect_in_run(str(model), TEXTS, run, loading=counting.loading)
    assert counting.outputs == 4
    assert inspected_names(run) == [str(model)]


@pytest.mark.parametrize("damage", ["{", '{"schema": "headscale.cell/1"}', "result"])
def test_a_damaged_inspection_is_made_again(damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, run = tiny_checkpoint("bert", tmp_path / "model"), tmp_path / "run"
    counting = Counting(monkeypatch)
    first = inspect_in_run(str(model), None, run, loading=counting.loading)
    file = next(run.iterdir()) / CELL
    if damage == "result":  # a cell as it should be, but for what it holds
        cell = read_cell(file)
        del cell["result"]["weights"]["rms"]
        damage = json.dumps(cell)
    file.write_text(damage)
    assert inspect_in_run(str(model), None, run, loading=counting.loading) == first
    assert counting.weights == 2
    assert inspect_in_run(str(model), None, run, loading=counting.loading) == first
    assert counting.weights == 2


def test_a_backbone_that_cannot_be_read_leaves_no_cell(tmp_path: Path) -> None:
    model = tiny_checkpoint("bert", tmp_path / "model", "BertModel")
    with pytest.raises(HeadscaleError):
        inspect_in_run(str(model), None, tmp_path / "run", loading=Loading())
    assert not (tmp_path / "run").exists()


def test_references_and_weights_alone_are_no_backbones_to_go_on_with(tmp_path: Path) -> None:
    assert inspected_names(tmp_path / "none") == []
    model, run = str(tiny_checkpoint("bert", tmp_path / "model")), tmp_path / "run"
    inspect_in_run(model, None, run, loading=Loading())
    inspect_in_run(model, TEXTS, run, is_reference=True, loading=Loading())
    assert inspected_names(run) == []
