"""Sweeps on a real Ray cluster: `pytest tests/cluster/cluster_checks.py`, a stage of its own in CI.

Head and workers are processes of their own on the loopback. The workers stand in another folder than the driver, so
that relative paths mean nothing to them: texts, backbones and results travel.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# This cluster's own secret, before Ray is imported, which reads it once: whatever this machine has belongs to others.
os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32), RAY_USAGE_STATS_ENABLED="0")
sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny_models import tiny_checkpoint

from headscale import cells, cluster
from headscale.cluster import RayCluster
from headscale.errors import HeadscaleError
from headscale.grid import LocalProcesses, pending, row_of, sweep
from headscale.records import SAMENESS_EXCLUDES
from headscale.steplog import read_steps
from headscale.training import TrainingConfig
from headscale.trials import TextSource, configuration_of, folder_of

ray = pytest.importorskip("ray")

ROWS = [f"w{5 + i} w{40 + i}\tw{40 + i} w{60 + i % 30} w{5 + i} w{7 + i % 11}" for i in range(32)]
SOURCE = TextSource("pairs.tsv", "pairs.tsv", candidates=12)
CONFIG = TrainingConfig(
    steps=60, batch_size=8, lr=1e-3, query_length=12, document_length=16, mode="untie", scale=0.5, device="cpu",
)  # fmt: skip
RAY = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]
RUNNING = "ray::run_on_worker"  # what Ray calls a process while it runs a cell


# --- the cluster ---------------------------------------------------------------------------------------------------


class Nodes:
    """Head and worker nodes, each started as a user starts them."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="hs"))  # sockets have short names
        self.port = free_port()
        self.address = f"127.0.0.1:{self.port}"
        self.processes: list[subprocess.Popen[bytes]] = []
        head = ["--head", "--port", str(self.port), "--num-cpus", "0", "--include-dashboard", "false"]
        self.start([*head, "--temp-dir", str(self.folder / "r")])

    def start(self, options: list[str]) -> subprocess.Popen[bytes]:
        """One node, up: two that start at once on one machine may take each other's ports."""
        common = ["--node-ip-address", "127.0.0.1", "--object-store-memory", "100000000"]
        log = self.folder / f"{len(self.processes)}.log"
        with log.open("wb") as file:
            process = subprocess.Popen([*RAY, *options, *common], cwd=self.folder, stdout=file, stderr=file)
        self.processes.append(process)
        wait_until(lambda: b"Ray runtime started" in log.read_bytes() or process.poll() is not None)
        assert process.poll() is None, log.read_text()
        return process

    def worker(self) -> subprocess.Popen[bytes]:
        return self.start(["--address", self.address, "--num-cpus", "2", "--num-gpus", "1"])

    def wait_for(self, count: int) -> None:
        """Until so many nodes that run cells are there."""
        wait_until(lambda: sum(n["Alive"] and n["Resources"].get("CPU", 0) > 0 for n in ray.nodes()) == count)

    def stop(self) -> None:
        for process in reversed(self.processes):
            for pid in [*descendants(process.pid), process.pid]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


def free_port() -> int:
    import socket

    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def wait_until(condition: Callable[[], Any], seconds: float = 180) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.05)
    raise AssertionError("waited in vain")


def descendants(pid: int) -> list[int]:
    """Children, theirs, and so on, of a process of this test, deepest last."""
    parents: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            stat = (folder / "stat").read_text().rpartition(")")[2].split()
            parents.setdefault(int(stat[1]), []).append(int(folder.name))
    found = [pid]
    for one in found:
        found.extend(parents.get(one, []))
    return found[1:]


def running_cells(nodes: Nodes) -> list[int]:
    """Processes of the cluster that are running a cell right now."""
    found = []
    for pid in [d for process in nodes.processes for d in descendants(process.pid)]:
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(RUNNING.encode()):
                found.append(pid)
    return found


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    started = Nodes()
    try:
        started.worker()
        started.worker()
        yield started
    finally:
        started.stop()


@pytest.fixture
def joined(nodes: Nodes) -> Iterator[Nodes]:
    """The same connection for several sweeps: they use its worker processes again."""
    if not ray.is_initialized():
        ray.init(address=nodes.address, log_to_driver=False, logging_level="ERROR")
    nodes.wait_for(2)
    return nodes


@pytest.fixture(autouse=True, scope="module")
def own_folder(tmp_path_factory: Any) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("driver"))
    Path("pairs.tsv").write_text("\n".join(ROWS) + "\n")
    tiny_checkpoint("bert", "backbone")
    yield
    ray.shutdown()
    os.chdir(before)


def planned(count: int = 6, **changes: Any) -> list[dict[str, Any]]:
    corpus = SOURCE.read()
    seeds = [CONFIG.replace(seed=seed, **changes) for seed in range(count)]
    return [configuration_of("backbone", training, SOURCE, corpus) for training in seeds]


@pytest.fixture(scope="module")
def undisturbed() -> Path:
    """The same cells in processes of this machine."""
    assert [o.status for o in sweep(planned(), Path("local"), executor=LocalProcesses(2))] == ["done"] * 6
    return Path("local")


def assert_same(plan: list[dict[str, Any]], run: Path, reference: Path) -> None:
    """Every cell once, whole, with the rows and logs of the reference."""
    for one in plan:
        assert row_of(one, run) == row_of(one, reference)
        logs = [read_steps(folder_of(one, where) / cells.STEPS) for where in (run, reference)]
        assert [{k: v for k, v in row.items() if k not in SAMENESS_EXCLUDES} for row in logs[0]] == [
            {k: v for k, v in row.items() if k not in SAMENESS_EXCLUDES} for row in logs[1]
        ]
    assert sorted(f.name for f in run.iterdir()) == sorted(folder_of(one, run).name for one in plan)
    assert all(sorted(f.name for f in d.iterdir()) == ["cell.json", "steps.jsonl"] for d in run.iterdir())


def executor(nodes: Nodes, **options: Any) -> RayCluster:
    return RayCluster(nodes.address, **options)


# --- the checks ----------------------------------------------------------------------------------------------------


def test_two_workers_give_the_rows_of_local_processes(joined: Nodes, undisturbed: Path) -> None:
    plan = planned()
    outcomes = list(sweep(plan, Path("cluster"), executor=executor(joined)))
    assert sorted(o.configuration["training"]["seed"] for o in outcomes) == list(range(6))
    assert {o.status for o in outcomes} == {"done"}
    assert_same(plan, Path("cluster"), undisturbed)
    assert list(sweep(plan, Path("cluster"), executor=executor(joined))) == []


@pytest.mark.parametrize("round_", range(5))
def test_a_worker_killed_at_a_random_moment_costs_nothing(joined: Nodes, undisturbed: Path, round_: int) -> None:
    source, plan, killed = random.Random(round_), planned(), []
    over = threading.Event()

    def kill() -> None:
        for _ in range(2):
            victims = wait_until(lambda: over.is_set() or running_cells(joined))
            if over.wait(source.uniform(0, 1)) or not isinstance(victims, list):
                return
            for victim in running_cells(joined)[:1]:
                os.kill(victim, signal.SIGKILL)
                killed.append(victim)

    killer = threading.Thread(target=kill)
    killer.start()
    run = Path(f"killed{round_}")
    outcomes = list(sweep(plan, run, executor=executor(joined)))
    over.set()
    killer.join()
    print(f"round {round_}: {len(killed)} workers killed")
    assert killed
    assert sorted(o.configuration["training"]["seed"] for o in outcomes) == list(range(6))
    assert {o.status for o in outcomes} == {"done"}
    assert_same(plan, run, undisturbed)


def test_a_node_that_dies_costs_nothing(joined: Nodes, undisturbed: Path) -> None:
    plan, doomed = planned(), joined.processes[-1]

    def kill() -> None:
        wait_until(lambda: set(running_cells(joined)) & set(descendants(doomed.pid)))
        for pid in [doomed.pid, *descendants(doomed.pid)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    outcomes = list(sweep(plan, Path("node"), executor=executor(joined)))
    killer.join()
    assert doomed.wait() == -signal.SIGKILL
    assert {o.status for o in outcomes} == {"done"}
    assert len(outcomes) == 6
    assert_same(plan, Path("node"), undisturbed)
    joined.worker()
    joined.wait_for(2)


def test_a_cell_that_dies_each_time_fails_after_so_many_tries(joined: Nodes) -> None:
    (one,) = planned(1, steps=100_000)
    over = threading.Event()

    def kill() -> None:
        while not over.wait(0.1):
            for victim in running_cells(joined):
                os.kill(victim, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    (outcome,) = sweep([one], Path("dying"), executor=executor(joined, retries=1))
    over.set()
    killer.join()
    assert outcome.status == "failed"
    assert "died more often than it is tried again" in outcome.message
    assert cells.read_cell(folder_of(one, Path("dying")))["status"] == "failed"


def test_a_users_error_is_not_tried_again_and_the_others_go_on(joined: Nodes) -> None:
    plan = [*planned(1), *planned(1, batch_size=64), *planned(1, scale=0.25)]
    outcomes = {
        o.configuration["training"]["batch_size"]: o for o in sweep(plan, Path("bad"), executor=executor(joined))
    }
    assert outcomes[64].status == "failed"
    assert "32 pairs do not fill a batch of 64" in outcomes[64].message
    assert outcomes[8].status == "done"
    assert pending(plan, Path("bad")) == [plan[1]]


def test_gpus_are_set_aside_for_each_cell(joined: Nodes) -> None:
    """Four CPUs and two (claimed) GPUs: never more cells at once than GPUs."""
    over, most = threading.Event(), [0]

    def watch() -> None:
        while not over.wait(0.02):
            most.append(len(running_cells(joined)))

    watcher = threading.Thread(target=watch)
    watcher.start()
    outcomes = list(sweep(planned(), Path("gpus"), executor=executor(joined, gpus=1)))
    over.set()
    watcher.join()
    assert {o.status for o in outcomes} == {"done"}
    assert 1 <= max(most) <= 2


def test_another_version_on_the_workers_is_refused(joined: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "__version__", "9.9")
    with pytest.raises(HeadscaleError, match=r"workers have headscale 0\.1\.0, and this is 9\.9"):
        list(sweep(planned(1), Path("other"), executor=executor(joined)))
    assert not Path("other").exists()


# --- the command ---------------------------------------------------------------------------------------------------


def command(nodes: Nodes, *options: str) -> list[str]:
    return [sys.executable, "-m", "headscale", "sweep", "backbone", "--pairs", "pairs.tsv", "--batch-size", "8",
            "--test-pairs", "pairs.tsv", "--candidates", "12", "--query-length", "12", "--document-length", "16",
            "--device", "cpu", "--scales", "1/2,1/4", "--steps", "20", *options]  # fmt: skip


def test_the_command_prints_the_rows_of_local_processes(nodes: Nodes) -> None:
    found = []
    for options in (["--ray", nodes.address, "--run", "there"], ["--workers", "2", "--run", "here"]):
        done = subprocess.run([*command(nodes), *options], capture_output=True, text=True, check=True)
        found.append(done.stdout)
    assert found[0] == found[1]
    assert len(found[0].splitlines()) == 3


def test_ctrl_c_keeps_what_is_finished_and_the_same_command_goes_on(nodes: Nodes) -> None:
    """Asked for more GPUs than a node has, cells wait, which is said; Ctrl-C leaves at once."""
    options = ["--ray", nodes.address, "--run", "left", "--seeds", "2"]
    first = subprocess.run([*command(nodes, "--scales", "1/2"), *options], capture_output=True, text=True)
    assert first.returncode == 0, first.stderr
    waiting = [*command(nodes), *options, "--gpus-per-cell", "2"]
    with Path("said").open("w") as said:
        process = subprocess.Popen(waiting, stdout=subprocess.DEVNULL, stderr=said)
        wait_until(lambda: "no node of the cluster has 1 CPUs and 2 GPUs" in Path("said").read_text())
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130
    assert "interrupted" in Path("said").read_text()
    assert len(list(Path("left").glob("*/cell.json"))) == 2
    again = subprocess.run([*command(nodes, "--json"), *options], capture_output=True, text=True)
    assert "4 cells, 2 of them finished already" in again.stderr
    assert [row["status"] for row in json.loads(again.stdout)["results"]] == ["done"] * 4


def test_no_cluster_at_the_address_is_a_sentence() -> None:
    ray.shutdown()
    with pytest.raises(HeadscaleError, match=r"no Ray cluster can be joined at `127\.0\.0\.1:1`"):
        list(sweep(planned(1), Path("none"), executor=RayCluster("127.0.0.1:1")))


def test_local_needs_no_cluster(undisturbed: Path) -> None:
    plan = planned(2)
    reference = Path("two")
    for one in plan:
        shutil.copytree(folder_of(one, undisturbed), folder_of(one, reference))
    assert {o.status for o in sweep(plan, Path("own"), executor=RayCluster("local"))} == {"done"}
    assert_same(plan, Path("own"), reference)
