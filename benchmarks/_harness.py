"""What the benchmarks share: interleaved timing, peak memory in a fresh process, the machine, JSON and tables."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("headscale", "torch", "transformers", "sentence-transformers", "numpy")


@dataclass(frozen=True)
class Timing:
    """Seconds of one contender over the rounds of an interleaved run."""

    name: str
    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def low(self) -> float:
        return min(self.seconds)

    @property
    def high(self) -> float:
        return max(self.seconds)

    def over(self, other: Timing) -> float:
        """Median over rounds of this contender's time divided by the other's of the same round."""
        return statistics.median(a / b for a, b in zip(self.seconds, other.seconds, strict=True))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"median": self.median, "low": self.low, "high": self.high}


def interleaved(
    contenders: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 5,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Time every contender once a round, A B .. then .. B A, after one untimed round.

    A slow spell of the machine then falls on neighbours alike; ratios are taken within a round.
    """
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    for call in contenders.values():
        call()
    for turn in range(rounds):
        names = list(contenders) if turn % 2 == 0 else list(contenders)[::-1]
        for name in names:
            begin = clock()
            contenders[name]()
            taken[name].append(clock() - begin)
    return {name: Timing(name, tuple(seconds)) for name, seconds in taken.items()}


@dataclass(frozen=True)
class Process:
    """What one whole process took."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int


def run_process(command: Sequence[str]) -> Process:
    """Run a command to its end, output thrown away (Unix).

    The peak counts what this process held when it started the other one: keep this one small.

    Raises:
        RuntimeError: it failed.
    """
    begin = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    seconds = time.perf_counter() - begin
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise RuntimeError(f"exit {child.returncode}: {' '.join(command)}")
    return Process(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


def interleaved_processes(commands: Mapping[str, Sequence[str]], *, rounds: int = 5) -> dict[str, list[Process]]:
    """Run every command once a round, in turning order, after one round that does not count."""
    taken: dict[str, list[Process]] = {name: [] for name in commands}
    for turn in range(-1, rounds):
        names = list(commands) if turn % 2 == 0 else list(commands)[::-1]
        for name in names:
            found = run_process(commands[name])
            if turn >= 0:
                taken[name].append(found)
    return taken


class PeakMemory:
    """`with PeakMemory() as peak: ...` then `peak.bytes`: growth of the resident set to its highest (Linux)."""

    bytes = 0

    def __enter__(self) -> PeakMemory:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # so that nothing hides in pages freed before
        Path("/proc/self/clear_refs").write_text("5")  # forget the high-water mark so far
        self._before = _status("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        self.bytes = max(0, _status("VmHWM") - self._before)


def total_peak_bytes() -> int:
    """Highest resident set of this process so far."""
    return _status("VmHWM")


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def in_fresh_process(script: str | Path, *arguments: str, timeout: float = 900) -> dict[str, Any]:
    """Run a script that prints one JSON object as its last line, and read it; {"error": ...} if it died."""
    command = [sys.executable, str(script), *arguments]
    run = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    if run.returncode:
        last = (run.stderr.strip().splitlines() or [f"exit {run.returncode}"])[-1]
        return {"error": last, "returncode": run.returncode}
    found: dict[str, Any] = json.loads(run.stdout.strip().splitlines()[-1])
    return found


def machine() -> dict[str, Any]:
    """Processor, memory, load and versions: what a number needs beside it."""
    found: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load_1min": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "system": platform.platform(terse=True),
    }
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    if "torch" in sys.modules:
        torch = sys.modules["torch"]
        found["threads"] = torch.get_num_threads()
        found["cpu_capability"] = torch.backends.cpu.get_cpu_capability()
        found["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return found


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor()
    lines = info.read_text().splitlines()
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    name = fields.get("model name", platform.processor())
    return f"{name} (family {fields.get('cpu family')}, model {fields.get('model')})"


def save_json(path: Path, benchmark: str, rows: Sequence[Mapping[str, Any]], **more: Any) -> None:
    """Write `{"schema", "machine", "command", "rows", ...}`."""
    body = {"schema": f"headscale.benchmark.{benchmark}/1", "machine": machine(), "command": _command()}
    body |= {**more, "rows": list(rows)}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(body, indent=1) + "\n")


def _command() -> str:
    """The command line of this process, as from the repository's root."""
    return shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])


def markdown(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """A table of the given columns, numbers to three significant digits."""
    head = f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}"
    body = [f"| {' | '.join(_cell(row.get(column)) for column in columns)} |" for row in rows]
    return "\n".join([head, *body])


def machine_line() -> str:
    """One line under a table: machine and versions."""
    found = machine()
    kept: Iterable[str] = (f"{k} {v}" for k, v in found.items() if v is not None and k != "system")
    return "; ".join(kept)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return str(value)
