"""The command `report`: what it reads, where it writes, what it says, and that it computes nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from saved_results import grid_of_cells, inspection_cell, training_cell

from headscale.cli import run


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    grid_of_cells(tmp_path / "runs", seeds=1, steps=12)
    return Path("runs")


def files(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def test_the_page_goes_among_the_results_and_changes_none_of_them(runs: Path, capsys: Any) -> None:
    before = files(runs)
    assert run(["report", "runs", "--figure", "curves"]) == 0
    out, err = capsys.readouterr()
    assert out == "runs/report.html\n"
    assert "a report on runs" in err
    after = files(runs)
    assert after.pop("report.html").startswith(b"<!doctype html>")
    assert after == before


def test_without_a_result_the_default_folder_is_taken_and_said(tmp_path: Path, capsys: Any) -> None:
    training_cell(tmp_path / "headscale-runs", steps=12)
    assert run(["report", "--figure", "curves"]) == 0
    out, err = capsys.readouterr()
    assert out == "headscale-runs/report.html\n"
    assert "no result given: those in `headscale-runs`" in err


def test_nothing_to_read_is_an_error_with_a_hint(tmp_path: Path, capsys: Any) -> None:
    assert run(["report", "nowhere"]) == 3
    out, err = capsys.readouterr()
    assert out == ""
    assert "error: no result at `nowhere`\n\nhint: give a run folder" in err
    (tmp_path / "empty").mkdir()
    assert run(["report", "empty"]) == 3


def test_json_says_what_was_written(runs: Path, capsys: Any) -> None:
    assert run(["report", "runs", "-o", "page.html", "--plot", "one.svg", "--figure", "4", "--json"]) == 0
    out, _ = capsys.readouterr()
    document = json.loads(out)
    assert document["schema"] == "headscale.report/1"
    page, plot = document["results"]
    assert (page["path"], page["kind"], page["figures"]) == ("page.html", "page", ["curves"])
    assert (plot["path"], plot["kind"]) == ("one.svg", "figure")
    assert plot["bytes"] == Path("one.svg").stat().st_size


@pytest.mark.parametrize(("suffix", "start"), [("svg", b"<svg"), ("png", b"\x89PNG"), ("pdf", b"%PDF")])
def test_one_figure_is_exactly_that_file(runs: Path, suffix: str, start: bytes) -> None:
    assert run(["report", "runs", "--plot", f"out.{suffix}", "--figure", "curves", "-q"]) == 0
    assert start in Path(f"out.{suffix}").read_bytes()[:400]
    assert not list(Path().rglob("*.html"))


def test_a_pattern_writes_every_figure_that_it_matches(runs: Path, capsys: Any) -> None:
    assert run(["report", "runs", "--plot", "out.svg", "--figure", "[cs]*"]) == 0
    assert capsys.readouterr().out.split() == ["out-sensitivity.svg", "out-curves.svg"]


def test_all_unknown_figures_are_named_together(runs: Path, capsys: Any) -> None:
    assert run(["report", "runs", "--figure", "9", "--figure", "nothing", "--figure", "1"]) == 2
    err = capsys.readouterr().err
    assert "error: no figure is called `9`, `nothing`" in err
    assert "1 (norm)" in err


@pytest.mark.parametrize("options", [["-o", "page.pdf"], ["--plot", "x.gif"], ["--watch", "--json"]])
def test_what_cannot_be_written_is_refused_before_anything_is_read(options: list[str], capsys: Any) -> None:
    assert run(["report", "nowhere", *options]) == 2
    assert "hint: " in capsys.readouterr().err


def test_a_figure_without_its_data_is_an_error_alone_and_a_sentence_in_the_page(tmp_path: Path, capsys: Any) -> None:
    inspection_cell(tmp_path / "runs")
    assert run(["report", "runs", "--plot", "out.svg", "--figure", "curves"]) == 3
    assert "error: figure 4 cannot be drawn: " in capsys.readouterr().err
    assert not Path("out.svg").exists()
    assert run(["report", "runs"]) == 0
    assert "figure 4 (curves) is not drawn: " in capsys.readouterr().err
    assert "not drawn, since" in Path("runs/report.html").read_text()


def test_a_cell_that_cannot_be_read_is_said_and_the_rest_is_shown(runs: Path, capsys: Any) -> None:
    broken = next(runs.glob("trial-*untie*/cell.json"))
    broken.write_text("{")
    assert run(["report", "runs", "--figure", "curves"]) == 3
    out, err = capsys.readouterr()
    assert out == "runs/report.html\n"
    assert "error: `" in err
    assert "is not JSON" in err
    assert "cannot be read and are left out" in Path("runs/report.html").read_text()


def test_published_figures_are_joined_with_measured_norms(tmp_path: Path, capsys: Any) -> None:
    for i in range(6):
        inspection_cell(tmp_path / "runs", f"b{i}", norm=30.0 + 10 * i)
    rows = "".join(f"b{i},BEIR-13 nDCG@10,{0.5 - 0.05 * i}\n" for i in range(6))
    Path("paper.csv").write_text("backbone,metric,value\n" + rows)
    assert run(["report", "runs", "--effectiveness", "paper.csv", "--figure", "norm", "-o", "page.html"]) == 0
    page = Path("page.html").read_text()
    assert "BEIR-13 nDCG@10" in page
    assert "headscale report runs --effectiveness paper.csv --output page.html" in page


def test_the_same_results_give_the_same_page(runs: Path) -> None:
    assert run(["report", "runs", "-o", "page.html", "--figure", "curves", "-q"]) == 0
    first = Path("page.html").read_bytes()
    assert run(["report", "runs", "-o", "page.html", "--figure", "curves", "-q"]) == 0
    assert Path("page.html").read_bytes() == first


def test_neither_torch_nor_the_network_is_touched(runs: Path) -> None:
    script = (
        "import socket, sys\n"
        "def refuse(*a, **k): raise AssertionError('the network was touched')\n"
        "socket.socket.connect = refuse\n"
        "from headscale.cli import run\n"
        "code = run(['report', 'runs', '-q'])\n"
        "assert not {'torch', 'transformers', 'scipy.stats', 'matplotlib.pyplot'} & set(sys.modules), 'imported'\n"
        "sys.exit(code)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_watching_redraws_as_cells_finish_and_leaves_a_page_that_stays(runs: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "headscale", "report", "runs", "--watch", "--figure", "curves"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    page = runs / "report.html"

    def shows(text: str) -> bool:
        return page.is_file() and text in page.read_text()

    def wait_for(text: str) -> None:
        deadline = time.monotonic() + 120
        while not shows(text):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)

    try:
        wait_for('http-equiv="refresh"')
        assert not shows("1/128")
        training_cell(tmp_path / "runs", scale=1 / 128, steps=12)
        wait_for("1/128")
    finally:
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert out == ""
    assert "Traceback" not in err
    assert "interrupted: what was finished is in `runs/report.html`" in err
    assert not shows('http-equiv="refresh"')
    assert shows("1/128")
