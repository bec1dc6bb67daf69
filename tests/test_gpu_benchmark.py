"""The GPU benchmark's dry run: every path of it on the CPU, with the tiled head and with Triton's interpreter."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "gpu.py"


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("gpu_benchmark", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def dry_run(path: Path, *arguments: str, **env: str) -> dict[str, Any]:
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--tiny", "--rounds", "2", "--json", str(path)]
    run = subprocess.run(
        [*command, *arguments], env=os.environ | env, capture_output=True, text=True, check=False, cwd=path.parent
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.startswith("| shape | zeros | contender |")
    body: dict[str, Any] = json.loads(path.read_text())
    return body


def test_dry_run_with_the_tiled_head(tmp_path: Path) -> None:
    body = dry_run(tmp_path / "gpu.json")
    assert body["machine"].keys() >= {"date", "torch", "triton", "device"}
    names = ["headscale", "matmul", "eager", "compiled", "compiled matmul + max"]
    assert [row["contender"] for row in body["rows"]] == names * 4
    for row in body["rows"]:
        assert "stopped" not in row, row
        assert row["/ matmul"] > 0
        if row["contender"] != "matmul":
            assert row["bitwise"] is True
            assert row["error"] < 2**-5  # every contender computes the same thing, in bfloat16
            assert len(row["both each ms"]) == 2


def test_dry_run_in_tritons_interpreter(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    body = dry_run(tmp_path / "gpu.json", "--dtype", "float16", "--shape", "2,9,32,131", "--tune", TRITON_INTERPRET="1")
    blocks = [row for row in body["rows"] if row["contender"].startswith("blocks")]
    assert len(blocks) >= 3
    assert all(row["forward ms"] > 0 for row in blocks)
    ours = [row for row in body["rows"] if row["contender"] == "headscale"]
    assert len(ours) == 2
    assert all(row["error"] < 1e-5 and row["gradient error"] < 1e-3 for row in ours)


def test_what_stops_one_contender_stops_no_other(script: Any) -> None:
    options = script.argparse.Namespace(dtype="bfloat16", device="cpu", rounds=1)
    problem = script.make("2,5,8,20", 0.0, options, 0)

    def greedy(_: object) -> torch.Tensor:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 4.00 GiB")

    pools = {"greedy": greedy, "eager": lambda p: script._plain(*p[:3])}
    rows = [script.examined(name, pool, problem, "cpu") for name, pool in pools.items()]
    script.add_times(rows, pools, problem, options)
    assert rows[0] == {"contender": "greedy", "stopped": "out of memory"}
    assert rows[1]["forward ms"] > 0


@pytest.mark.parametrize(
    ("change", "fine"),
    [
        ({}, True),
        ({"bitwise": False}, False),
        ({"error": 0.1}, False),
        ({"gradient error": 0.01}, False),
        ({"short of the maximum": 0.5}, False),
        ({"stopped": "out of memory"}, False),
        ({"stopped": "left out: no time left"}, True),
    ],
)
def test_a_wrong_result_fails_the_run(script: Any, change: dict[str, Any], fine: bool) -> None:
    row = {"error": 1e-4, "slack": 1e-3, "short of the maximum": 1e-4, "largest": 4.0, "bitwise": True}
    assert script.good(row | {"gradient error": 1e-3} | change) is fine
