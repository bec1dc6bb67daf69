"""The pooled head against the bare matmul, sentence-transformers' own path and the plain implementation.

Example:
    python benchmarks/pooled_head.py --json benchmarks/results/pooled_head.json
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import _harness as harness
import torch
from torch import Tensor
from torch.nn.functional import linear

from headscale.kernels import tiled
from headscale.pooling import choose_implementation, max_logits, possible_share, splade_pool, splade_pool_reference

SHAPES = ["16,128,768,30522", "8,256,256,30522", "16,128,768,50368", "32,48,128,8192"]
COLUMNS = [
    *("shape", "zeros", "padding", "dtype", "implementation", "possible", "matmul ms", "headscale ms", "spread ms"),
    *(
        "/ matmul",
        "/ tiled product",
        "/ tiled",
        "forward / matmul",
        "s-t / headscale",
        "plain / headscale",
        "compiled / headscale",
        "MB",
        "s-t MB",
        "s-t MB / MB",
    ),
]


class Problem(NamedTuple):
    hidden: Tensor
    weight: Tensor
    bias: Tensor
    mask: Tensor
    upstream: Tensor

    @property
    def leaves(self) -> list[Tensor]:
        return [self.hidden, self.weight, self.bias]

    @property
    def gradient_bytes(self) -> int:
        return sum(leaf.numel() * leaf.element_size() for leaf in self.leaves)


def make(shape: str, zeros: float, padding: float, dtype: torch.dtype) -> Problem:
    """Random tokens and weights; the bias is one number, chosen for the wanted share of zeros."""
    batch, seq, width, vocab = map(int, shape.split(","))
    gen = torch.Generator().manual_seed(0)
    hidden = torch.randn(batch, seq, width, generator=gen).to(dtype)
    weight = (torch.randn(vocab, width, generator=gen) * width**-0.5).to(dtype)
    lengths = torch.linspace(1 - 2 * padding, 1, batch).mul(seq).round()
    mask = (torch.arange(seq)[None] < lengths[:, None]).long()
    values = max_logits(hidden, weight[: min(vocab, 4096)], None, mask).values.flatten()
    bias = -float(values.sort().values[int(zeros * (len(values) - 1))]) + (1.0 if zeros == 0 else 0.0)
    leaves = (hidden, weight, torch.full((vocab,), bias, dtype=dtype))
    upstream = torch.randn(batch, vocab, generator=gen)
    return Problem(*(leaf.requires_grad_() for leaf in leaves), mask, upstream)


def contenders(problem: Problem, *, compiled: bool) -> dict[str, Callable[[], object]]:
    """Every call a full forward, and backward where its name does not say otherwise."""
    hidden, weight, bias, mask, _ = problem
    pooling = _sentence_transformers_pooling()

    def backward(pooled: Tensor) -> object:
        return torch.autograd.grad(pooled, problem.leaves, problem.upstream.to(pooled.dtype))

    def peer() -> object:
        features = {"token_embeddings": linear(hidden, weight, bias), "attention_mask": mask}
        return backward(pooling(features)["sentence_embedding"])

    found: dict[str, Callable[[], object]] = {
        "matmul": lambda: linear(hidden.detach(), weight.detach()),
        "tiled product": lambda: _tiled_product(problem),
        "headscale": lambda: backward(splade_pool(hidden, weight, bias, mask)),
        "forward": torch.no_grad()(lambda: splade_pool(hidden, weight, bias, mask)),
        "sentence-transformers": peer,
        "plain": lambda: backward(splade_pool_reference(hidden, weight, bias, mask)),
    }
    if choose_implementation(hidden, weight) == "screened":
        found["tiled"] = lambda: backward(splade_pool(hidden, weight, bias, mask, implementation="tiled"))
    if compiled:
        fast = torch.compile(splade_pool_reference)
        found["compiled"] = lambda: backward(fast(hidden, weight, bias, mask))
    return found


@torch.no_grad()
def _tiled_product(problem: Problem) -> None:
    """The product headscale makes, tile by tile, and nothing else: what no pooling can undercut."""
    mask = problem.mask.bool()
    dtype = tiled.compute_dtype(problem.hidden, problem.weight)
    tokens = tiled.pack(problem.hidden, mask, dtype).tokens
    for terms in tiled.tiles(len(problem.weight), tokens):
        tiled.product(tokens, problem.weight[terms], problem.bias[terms])


def _sentence_transformers_pooling() -> Any:
    from sentence_transformers.sparse_encoder.modules import SpladePooling

    return SpladePooling().train()


def timed_row(shape: str, zeros: float, padding: float, dtype: str, options: argparse.Namespace) -> dict[str, Any]:
    """Times and ratios of one shape."""
    problem = make(shape, zeros, padding, getattr(torch, dtype))
    clock = time.process_time if options.cpu_time else time.perf_counter
    calls = contenders(problem, compiled=options.compile)
    times = harness.interleaved(calls, rounds=options.rounds, clock=clock)
    ours, matmul = times["headscale"], times["matmul"]
    row: dict[str, Any] = {"shape": shape, "zeros": zeros, "padding": padding, "dtype": dtype}
    row |= {"implementation": choose_implementation(problem.hidden, problem.weight)}
    row |= {"matmul ms": 1e3 * matmul.median, "headscale ms": 1e3 * ours.median}
    row |= {"spread ms": f"{1e3 * ours.low:.0f}-{1e3 * ours.high:.0f}"}
    row |= {"/ matmul": ours.over(matmul), "/ tiled product": ours.over(times["tiled product"])}
    row |= {"forward / matmul": times["forward"].over(matmul)}
    row |= {
        "s-t / headscale": times["sentence-transformers"].over(ours),
        "plain / headscale": times["plain"].over(ours),
    }
    if "tiled" in times:
        row |= {"possible": possible_share(*problem[:4]), "/ tiled": ours.over(times["tiled"])}
    if options.compile:
        row["compiled / headscale"] = times["compiled"].over(ours)
    return row | {"times": [timing.to_dict() for timing in times.values()]}


def memory_row(shape: str, zeros: float, padding: float, dtype: str) -> dict[str, Any]:
    """Peak memory beyond inputs, weights and gradients, each contender in its own process."""
    found = {}
    for name in ("headscale", "sentence-transformers"):
        setting = json.dumps([name, shape, zeros, padding, dtype])
        found[name] = harness.in_fresh_process(__file__, "--memory-of", setting).get("bytes")
    ours, peer = found["headscale"], found["sentence-transformers"]
    row = {"MB": ours and ours / 2**20, "s-t MB": peer and peer / 2**20}
    return row | {"s-t MB / MB": peer / ours if ours and peer else None}


def measure_memory(name: str, shape: str, zeros: float, padding: float, dtype: str) -> dict[str, int]:
    """In the fresh process: a small problem to load every library, then the real one."""
    contenders(make("2,16,32,4096", zeros, 0.0, getattr(torch, dtype)), compiled=False)[name]()
    problem = make(shape, zeros, padding, getattr(torch, dtype))
    call = contenders(problem, compiled=False)[name]
    with harness.PeakMemory() as peak:
        call()
    return {"bytes": peak.bytes - problem.gradient_bytes, "total": harness.total_peak_bytes()}


def large_vocabulary() -> dict[str, Any]:
    """Whole-process peak at a vocabulary of 250,002, inputs and all."""
    setting = json.dumps(["headscale", "16,128,768,250002", 0.99, 0.0, "float32"])
    found = harness.in_fresh_process(__file__, "--memory-of", setting)
    return {"shape": "16,128,768,250002", "whole process GB": found.get("total", 0) / 2**30} | found


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", help="batch,seq,width,vocab; may be repeated")
    parser.add_argument("--zeros", type=float, action="append", help="share of zero entries; may be repeated")
    parser.add_argument("--padding", type=float, default=0.0, help="share of padding, lengths evenly spread")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cpu-time", action="store_true", help="one thread, CPU seconds: for a busy machine")
    parser.add_argument("--compile", action="store_true", help="add torch.compile of the plain one (30 s a shape)")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--large-vocabulary", action="store_true", help="add the peak at a vocabulary of 250,002")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options = parse()
    if options.memory_of:
        print(json.dumps(measure_memory(*json.loads(options.memory_of))))
        return
    if options.cpu_time:
        torch.set_num_threads(1)
    rows = []
    for shape in options.shape or SHAPES:
        for zeros in options.zeros or [0.0, 0.99]:
            row = timed_row(shape, zeros, options.padding, options.dtype, options)
            rows.append(row if options.no_memory else row | memory_row(shape, zeros, options.padding, options.dtype))
    print(harness.markdown(rows, [c for c in COLUMNS if any(c in row for row in rows)]))
    print("\n" + harness.machine_line())
    more = {"large_vocabulary": large_vocabulary()} if options.large_vocabulary else {}
    if more:
        print(json.dumps(more))
    if options.json:
        more["clock"] = "CPU seconds, one thread" if options.cpu_time else "wall"
        harness.save_json(options.json, "pooled_head", rows, **more)


if __name__ == "__main__":
    main()
