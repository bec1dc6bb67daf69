"""The page of benchmarks: ratios within rounds, and bars that hold or do not."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import table

    yield table
    for name in ("table", "_harness"):
        sys.modules.pop(name, None)


def result(ours: list[float], peer: list[float], **more: Any) -> dict[str, Any]:
    times = [{"name": "headscale", "seconds": ours}, {"name": "sentence-transformers", "seconds": peer}]
    row = {"lengths": "short", "threads": 2, "memory": 0.3, "times": times}
    return {
        "schema": "headscale.benchmark.trial_step/1", "machine": {"cores": 2}, "clock": "wall seconds", "rows": [row],
        **more,
    }  # fmt: skip


def test_a_bar_is_held_by_the_median_of_the_ratios_within_a_round(table: Any) -> None:
    rows = {r["bar"]: r for r in table.bar_rows({"one": result([1.0, 2.0, 1.0], [3.0, 3.0, 4.0])})}
    speed = rows["trial step: SparseEncoderTrainer's time / ours"]
    assert (speed["measured"], speed["holds"], speed["at"]) == ("3 (1.5-4)", "yes", "short; 2")
    assert rows["trial step: our peak / SparseEncoderTrainer's"]["holds"] == "yes"
    assert rows["`headscale --help`, s"]["measured"] == "not measured"
    assert "SparseEncoderTrainer's time without / with the drop-in" in rows  # its contender did not run
    slow = {r["bar"]: r for r in table.bar_rows({"one": result([2.0], [3.0])})}
    assert slow["trial step: SparseEncoderTrainer's time / ours"]["holds"] == "no"


def test_every_kept_result_is_on_the_page(table: Any) -> None:
    results = table.read_results(BENCHMARKS / "results")
    page = table.report(results)
    for name, one in results.items():
        assert f"### {name}\n" in page
        assert one["machine"]["date"] in page
        json.dumps(one, allow_nan=False)
