"""`headscale trial` as launchers start it: `pytest tests/processes/processes_checks.py`, a stage of its own in CI."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"]
TORCHRUN += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "-m", "--", "headscale"]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
ACCELERATE += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
ACCELERATE += ["-m", "headscale"]
PAIRS = "".join(f"what is number {i}\tnumber {i} comes after {i - 1} and before {i + 1}\n" for i in range(64))
OPTIONS = ["trial", "bundled:tiny-bert", "--pairs", "pairs.tsv", "--test-pairs", "pairs.tsv", "--candidates", "20",
           "--query-length", "12", "--document-length", "24", "--batch-size", "8", "--device", "cpu",
           "--scale", "1/2", "--lr", "1e-4", "--full-length", "--json"]  # fmt: skip


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in (("OMP_NUM_THREADS", "1"), ("HF_HUB_OFFLINE", "1")):
        monkeypatch.setenv(name, value)
    Path("pairs.tsv").write_text(PAIRS)


def call(command: list[str], *options: str) -> tuple[dict[str, Any], str]:
    done = subprocess.run([*command, *OPTIONS, *options], capture_output=True, text=True, timeout=240)
    return json.loads(done.stdout), done.stderr


def steps_of(run: str) -> dict[str, list[dict[str, Any]]]:
    """The log of every arm, by the name of its folder without the key."""
    found = {}
    for folder in Path(run).iterdir():
        assert sorted(p.name for p in folder.iterdir()) == ["cell.json", "steps.jsonl"]
        lines = (folder / "steps.jsonl").read_text().splitlines()
        found[folder.name.rpartition("-")[0]] = [json.loads(line) for line in lines]
    return found


@pytest.mark.parametrize("launcher", [TORCHRUN, ACCELERATE], ids=["torchrun", "accelerate"])
def test_two_processes_log_what_one_logs(launcher: list[str]) -> None:
    """Dropout is off in the bundled models, so that only rounding differs, which training then amplifies."""
    alone, _ = call([sys.executable, "-m", "headscale"], "--steps", "5", "--run", "one")
    shared, said = call(launcher, "--steps", "5", "--run", "two")
    assert said.count("headscale 0.1.0: a trial") == 1
    assert said.count("2 processes share every batch") == 1
    assert len(shared["results"]) == len(alone["results"]) == 2
    assert [r["cells"][0]["run"]["processes"] for r in shared["results"]] == [2, 2]
    one, two = steps_of("one"), steps_of("two")
    assert one.keys() == two.keys()
    for arm, rows in one.items():
        assert two[arm][0]["loss"] == pytest.approx(rows[0]["loss"], rel=1e-6)
        assert two[arm][0]["grad_norm"] == pytest.approx(rows[0]["grad_norm"], rel=1e-6)
        for row, other in zip(rows, two[arm], strict=True):
            assert other["loss"] == pytest.approx(row["loss"], rel=1e-3)


def test_an_error_is_said_once() -> None:
    document, said = call(TORCHRUN, "--steps", "3", "--batch-size", "7")
    assert said.count("error: a batch of 7 queries cannot be shared equally by 2 processes") == 1
    assert len(document["errors"]) == 1


def test_ctrl_c_keeps_what_there_is_and_the_same_command_goes_on() -> None:
    command = [*TORCHRUN, *OPTIONS, "--steps", "400", "--run", "runs"]
    with Path("said").open("w") as said:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=said)
        wait_for_steps(12)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) != 0
    assert Path("said").read_text().count("interrupted: what was finished is in") == 1
    (cell,) = Path("runs").glob("*/cell.json")
    kept = json.loads(cell.read_text())
    assert kept["status"] == "interrupted"
    steps = len((cell.parent / "steps.jsonl").read_text().splitlines())
    assert 12 <= steps == kept["result"]["run"]["end"]["steps"] < 400
    document, _ = call(TORCHRUN, "--steps", "4", "--run", "runs")
    assert [r["cells"][0]["run"]["status"] for r in document["results"]] == ["finished"] * 2


def wait_for_steps(count: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        logs = list(Path("runs").glob("*/steps.jsonl"))
        if logs and len(logs[0].read_text().splitlines()) >= count:
            return
        time.sleep(0.1)
    raise AssertionError(f"no {count} steps in time")
