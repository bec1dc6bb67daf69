"""The pooled head on a GPU against eager, torch.compile, the bare matmul and a compiled matmul plus max.

One file that needs torch and Triton alone, run from the root of the repository; on an H200 or its like it takes at
most 8 minutes (`--seconds`). Every contender gets the same inputs, drawn afresh for each row; every result is checked
against float64 (the gradients at the position that won), and repeated to see that not a bit changes. A contender that
runs out of memory says so and the others go on.

Example:
    python benchmarks/gpu.py --json benchmarks/results/gpu.json
    python benchmarks/gpu.py --device cpu --tiny
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the package may not be installed there

import torch
from torch import Tensor
from torch.nn.functional import linear

from headscale.pooling import max_logits, splade_pool

SHAPES = ["32,256,768,30522", "32,256,768,50368", "16,512,1024,250002"]
TINY = ["2,24,32,301", "3,17,40,129"]
ZEROS = [0.0, 0.99]
TILE = 8192  # terms of a tile of the compiled matmul plus max, as wide as keeps a GPU busy
BLOCKS = [(128, 128, 64, 4, 3), (128, 128, 64, 8, 3), (128, 256, 64, 8, 3), (128, 256, 64, 8, 4), (64, 256, 64, 4, 3)]
COLUMNS = [
    "shape",
    "zeros",
    "contender",
    "forward ms",
    "/ matmul",
    "both ms",
    "/ ours",
    "MB",
    "/ our MB",
    "error",
    "note",
]
OUT_OF_TIME = "left out: no time left"


class Problem(NamedTuple):
    hidden: Tensor  # (batch, seq, d)
    weight: Tensor  # (vocab, d)
    bias: Tensor  # (vocab,)
    upstream: Tensor  # (batch, vocab)
    exact: Tensor  # (batch, vocab) largest logits in float64

    @property
    def leaves(self) -> list[Tensor]:
        return [self.hidden, self.weight, self.bias]

    @property
    def gradient_bytes(self) -> int:
        return sum(leaf.numel() * leaf.element_size() for leaf in self.leaves)

    @property
    def slack(self) -> float:
        """Textbook bound of a float32 inner product's error; more where the result is kept in half precision."""
        norms = [float(leaf.detach().float().norm(dim=-1).max()) for leaf in self.leaves[:2]]
        rounding = 0.0 if our_choice(self) == "triton" else float(torch.finfo(self.hidden.dtype).eps)
        return self.weight.shape[1] * 2**-24 * norms[0] * norms[1] + rounding


Pool = Callable[[Problem], Tensor]


def make(shape: str, zeros: float, options: argparse.Namespace, seed: int) -> Problem:
    """Random tokens and weights; one bias for every term, chosen for the wanted share of zeros."""
    batch, seq, width, vocab = map(int, shape.split(","))
    dtype, device = getattr(torch, options.dtype), options.device
    gen = torch.Generator(device).manual_seed(seed)
    hidden = torch.randn(batch, seq, width, generator=gen, device=device).to(dtype)
    weight = (torch.randn(vocab, width, generator=gen, device=device) * width**-0.5).to(dtype)
    best = _largest(hidden, weight)
    some = best[:, :4096].flatten().sort().values
    shift = -float(some[int(zeros * (len(some) - 1))]) + (1.0 if zeros == 0 else 0.0)
    bias = torch.full((vocab,), shift, device=device).to(dtype)
    upstream = torch.randn(batch, vocab, generator=gen, device=device)
    leaves = (leaf.requires_grad_() for leaf in (hidden, weight, bias))
    return Problem(*leaves, upstream, best + bias.detach().double())


def _largest(hidden: Tensor, weight: Tensor) -> Tensor:
    """(batch, vocab) largest products in float64, by chunks of the vocabulary."""
    chunks = (chunk.double().T for chunk in weight.split(2048))
    return torch.cat([torch.stack([(text.double() @ chunk).amax(0) for text in hidden]) for chunk in chunks], 1)


def _matmul(problem: Problem) -> Tensor:
    return linear(problem.hidden, problem.weight)


def _plain(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.log1p(torch.relu(linear(hidden, weight, bias))).max(1).values


def _tile_max(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return linear(hidden, weight, bias).max(1).values


def contenders(tiny: bool) -> dict[str, Pool]:
    """Every way of computing the pooled head; `matmul` is the yardstick and pools nothing."""
    backend = "aot_eager" if tiny else "inductor"
    compiled = torch.compile(_plain, backend=backend, dynamic=False)
    tile = torch.compile(_tile_max, backend=backend, dynamic=False)

    def matmul_plus_max(problem: Problem) -> Tensor:
        # our own version of the design of Sparton (arXiv 2603.25011): a compiled product and its maximum per tile
        # of the vocabulary, of which autograd keeps the positions alone
        height = 100 if tiny else TILE
        tiles = zip(problem.weight.split(height), problem.bias.split(height), strict=True)
        logits = torch.cat([tile(problem.hidden, weight, bias) for weight, bias in tiles], 1)
        return torch.log1p(torch.relu(logits))

    return {
        "headscale": lambda p: splade_pool(*p[:3], implementation=our_choice(p)),
        "matmul": _matmul,
        "eager": lambda p: _plain(*p[:3]),
        "compiled": lambda p: compiled(*p[:3]),
        "compiled matmul + max": matmul_plus_max,
    }


def our_choice(problem: Problem) -> Any:
    """Triton on a GPU or in its interpreter, else tiles."""
    return "triton" if problem.hidden.is_cuda or os.environ.get("TRITON_INTERPRET") == "1" else "tiled"


def both(problem: Problem, pool: Pool) -> tuple[Tensor, ...]:
    """Forward and backward: the result and the gradients of hidden, weight and bias."""
    pooled = pool(problem)
    return pooled.detach(), *torch.autograd.grad(pooled, problem.leaves, problem.upstream.to(pooled.dtype))


@torch.no_grad()
def forward(problem: Problem, pool: Pool) -> Tensor:
    return pool(problem)


def milliseconds(call: Callable[[], object], device: str) -> float:
    """One call, by the device's own clock where it has one."""
    if device == "cpu":
        begin = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - begin)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def peak_megabytes(call: Callable[[], object], device: str) -> float | None:
    """Highest allocation beyond what was there before."""
    if device == "cpu":
        call()
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def correctness(problem: Problem, pool: Pool) -> dict[str, Any]:
    """Largest error on the scale of the logits, and whether two more calls give the same bits."""
    first = both(problem, pool)
    same = all(torch.equal(a, b) for _ in range(2) for a, b in zip(first, both(problem, pool), strict=True))
    error = torch.expm1(first[0].double()) - problem.exact.clamp_min(0)
    error = (error.abs() / problem.exact.abs().clamp_min(1)).max()
    return {"error": float(error), "bitwise": same}


@torch.no_grad()
def at_position(problem: Problem, pooled: Tensor, *gradients: Tensor) -> dict[str, float]:
    """Our gradients against the float64 closed form at the returned position, and how far that is from the maximum."""
    found = max_logits(*problem[:3], implementation=our_choice(problem))
    winners, hidden = found.positions.long(), problem.hidden.double()
    slope = torch.where(pooled > 0, problem.upstream.double() * torch.exp(-pooled.double()), 0.0)
    by_hidden, by_weight = torch.zeros_like(hidden), torch.zeros_like(problem.weight, dtype=torch.float64)
    short = 0.0
    for low in range(0, len(problem.weight), 16384):
        terms = slice(low, low + 16384)
        rows, shift = problem.weight[terms].double(), problem.bias[terms].double()
        for text in range(len(hidden)):
            at, own = winners[text, terms], slope[text, terms, None]
            by_hidden[text].index_add_(0, at, own * rows)
            by_weight[terms] += own * hidden[text, at]
            short = max(short, float((problem.exact[text, terms] - (hidden[text, at] * rows).sum(1) - shift).max()))
    gaps = [
        float((got.double() - exact).norm() / exact.norm())
        for got, exact in zip(gradients, (by_hidden, by_weight, slope.sum(0)), strict=True)
    ]
    return {"gradient error": max(gaps), "short of the maximum": short}


def examined(name: str, pool: Pool, problem: Problem, device: str) -> dict[str, Any]:
    """Memory and correctness of one contender, compiled by then; what stopped it where something did."""
    row: dict[str, Any] = {"contender": name}
    try:
        forward(problem, pool)
        if name == "matmul":
            return row | {"MB": peak_megabytes(lambda: forward(problem, pool), device)}
        row |= correctness(problem, pool)
        if name == "headscale":
            row |= at_position(problem, *both(problem, pool))
        peak = peak_megabytes(lambda: both(problem, pool), device)
        row["MB"] = None if peak is None else peak - problem.gradient_bytes / 2**20
    except Exception as stop:  # the others are still worth measuring
        row["stopped"] = "out of memory" if "out of memory" in str(stop) else f"{type(stop).__name__}: {stop}"[:120]
    return row


def add_times(
    rows: list[dict[str, Any]], pools: dict[str, Pool], problem: Problem, options: argparse.Namespace
) -> None:
    """Interleaved, A B .. then .. B A: forward, and forward with backward."""
    running = [row for row in rows if "stopped" not in row]
    for turn in range(options.rounds):
        for row in running[:: 1 if turn % 2 == 0 else -1]:
            pool = pools[row["contender"]]
            for name, step in (("forward", forward), ("both", both)):
                if step is forward or row["contender"] != "matmul":
                    taken = milliseconds(partial(step, problem, pool), options.device)
                    row.setdefault(f"{name} each ms", []).append(taken)
    for row in running:
        for name in ("forward", "both"):
            if f"{name} each ms" in row:
                row[f"{name} ms"] = statistics.median(row[f"{name} each ms"])


def note(row: dict[str, Any]) -> str:
    """What the table says beside the numbers."""
    found = [row["stopped"].splitlines()[0]] if "stopped" in row else []
    if "gradient error" in row:
        found.append(f"gradients {row['gradient error']:.1e}")
    if "bitwise" in row:
        found.append("bitwise" if row["bitwise"] else "repeats differ")
    return ", ".join(found)


def measured(shape: str, zeros: float, options: argparse.Namespace, seed: int, end: float) -> list[dict[str, Any]]:
    """The rows of one problem, with their ratios."""
    problem, pools, rows = make(shape, zeros, options, seed), contenders(options.tiny), []
    for name, pool in pools.items():
        late = time.monotonic() > end
        rows.append(
            {"contender": name, "stopped": OUT_OF_TIME} if late else examined(name, pool, problem, options.device)
        )
        if options.device != "cpu":
            torch.cuda.empty_cache()
    add_times(rows, pools, problem, options)
    for row in rows:
        row |= {"shape": shape, "zeros": zeros, "seed": seed, "slack": problem.slack, "note": note(row)}
        row["largest"] = float(problem.exact.abs().max())
        row |= {"/ matmul": _ratio(row, rows[1], "forward ms"), "/ ours": _ratio(row, rows[0], "both ms")}
        row["/ our MB"] = _ratio(row, rows[0], "MB")
    torch.compiler.reset()
    return rows


def _ratio(row: dict[str, Any], other: dict[str, Any], field: str) -> float | None:
    return row[field] / other[field] if row.get(field) and other.get(field) else None


def tune(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Forward time of our kernel with other block sizes at the first shape."""
    from headscale.kernels import triton_head

    problem, pool = make(options.shape[0], 0.0, options, 0), contenders(tiny=True)["headscale"]
    size = problem.hidden.element_size()
    kept, rows = triton_head.BLOCKS[size], []
    for blocks in BLOCKS:
        triton_head.BLOCKS[size] = triton_head.Blocks(*blocks)
        row: dict[str, Any] = {"shape": options.shape[0], "contender": f"blocks {blocks}"}
        try:
            forward(problem, pool)
            times = [milliseconds(partial(forward, problem, pool), options.device) for _ in range(options.rounds)]
            row["forward ms"] = statistics.median(times)
        except Exception as stop:  # too much shared memory, for one
            row["note"] = f"{type(stop).__name__}: {stop}".splitlines()[0][:120]
        rows.append(row)
    triton_head.BLOCKS[size] = kept
    return rows


def machine(device: str) -> dict[str, Any]:
    """Device, driver's view of it, versions and date."""
    found: dict[str, Any] = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "torch": torch.__version__}
    try:
        import triton

        found["triton"] = triton.__version__
    except ImportError:
        found["triton"] = None
    if device == "cpu":
        return found | {"device": platform.processor() or platform.machine(), "python": platform.python_version()}
    properties = torch.cuda.get_device_properties(0)
    return found | {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "GB": round(properties.total_memory / 2**30, 1),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, numbers to three digits."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]
    return "\n".join(lines + [f"| {' | '.join(_cell(row.get(column)) for column in COLUMNS)} |" for row in rows])


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) and abs(value) < 1000 else str(value)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", help="batch,seq,width,vocab; may be repeated")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--tiny", action="store_true", help="tiny shapes and no compiler: a dry run of every path")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=400, help="start no contender after these")
    parser.add_argument("--seed", type=int, help="of the random inputs; drawn from the clock if left out")
    parser.add_argument("--tune", action="store_true", help="also time other block sizes of the kernel")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.shape = options.shape or (TINY if options.tiny else SHAPES)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device here; `--device cpu --tiny` is the dry run")
    return options


def main() -> int:
    options = parse()
    end = time.monotonic() + options.seconds
    seed = options.seed if options.seed is not None else time.time_ns() % 2**31
    rows = tune(options) if options.tune else []
    for number, shape in enumerate(options.shape):
        for zeros in ZEROS:
            rows += measured(shape, zeros, options, seed + number, end)
            print(f"{shape} {zeros}: done", file=sys.stderr, flush=True)
    found = machine(options.device)
    print(table(rows))
    print("\n" + "; ".join(f"{key} {value}" for key, value in found.items()))
    if options.json:
        body = {"schema": "headscale.benchmark.gpu/1", "machine": found, "seed": seed, "rows": rows}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(body, indent=1) + "\n")
    wrong = [row for row in rows if row["contender"] == "headscale" and not good(row)]
    for row in wrong:
        print(f"headscale is wrong at {row['shape']}, {row['zeros']} zeros: {row['note']}", file=sys.stderr)
    return 1 if wrong else 0


def good(row: dict[str, Any]) -> bool:
    """Ours ran: repeats bitwise equal, values and positions within the products' error, gradients within 5e-3."""
    if "stopped" in row:
        return bool(row["stopped"] == OUT_OF_TIME)
    within = row["error"] <= row["slack"] and row["short of the maximum"] <= 2 * max(1, row["largest"]) * row["slack"]
    return bool(row["bitwise"] and within and row["gradient error"] < 5e-3)


if __name__ == "__main__":
    sys.exit(main())
