"""Sweeps on a cluster, as far as it goes without one; `cluster/cluster_checks.py` has the rest."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from headscale.cli import run
from headscale.cluster import RayCluster
from headscale.errors import UsageError
from headscale.grid import sweep


def test_ray_is_imported_where_a_cluster_is_asked_for_and_not_before() -> None:
    script = "import sys, headscale.cluster, headscale.grid; sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


def test_without_ray_its_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match="needs Ray") as caught:
        list(RayCluster("auto")([{}], tmp_path))
    assert caught.value.hint == "pip install 'headscale[ray]'"
    monkeypatch.chdir(tmp_path)
    assert run(["sweep", "bundled:tiny-bert", "--ray", "auto"]) == 2  # before anything is read or loaded
    assert "a sweep on a cluster needs Ray\n\nhint: pip install 'headscale[ray]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "expected"),
    [(["--ray", "auto", "--workers", "2"], "`--ray` and `--workers` exclude each other"),
     (["--gpus-per-cell", "1"], "`--gpus-per-cell` is for Ray")],
)  # fmt: skip
def test_options_that_do_not_go_together(capsys: Any, options: list[str], expected: str) -> None:
    assert run(["sweep", "bundled:tiny-bert", *options]) == 2
    assert expected in capsys.readouterr().err


def test_a_sweep_cannot_be_started_several_times_over(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "localhost")):
        monkeypatch.setenv(name, value)
    assert run(["sweep", "bundled:tiny-bert"]) == 2
    assert "processes of `torchrun`" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "1")  # the first process says it, and leaves with the exit code
    assert run(["sweep", "bundled:tiny-bert"]) == 0
    assert capsys.readouterr() == ("", "")


def test_nothing_to_do_needs_no_cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert list(sweep([], tmp_path, executor=RayCluster("auto"))) == []
