"""Runs the GPU kernels in Triton's interpreter, in a process told so before it imports Triton."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from headscale.errors import UsageError
from headscale.pooling import splade_pool

FILE = Path(__file__).with_name("interpreted_triton_head.py")


def test_kernels_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(FILE)]
    run = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout
    assert " passed" in run.stdout


COMPILE_SCRIPT = """
import sys, torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from headscale.kernels import triton_head as head

capability, dtype, size, places, even = int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4], sys.argv[5] == "1"
blocks = head.BLOCKS[size]
maximum = {
    **dict.fromkeys(("tokens", "weight", "bias"), "*" + dtype), "starts": "*i64", "lengths": "*i64",
    "values": "*fp32", "winners": "*" + places,
    **dict.fromkeys(("vocab", "width", "token_stride", "weight_stride"), "i32"),
}
constants = {
    "column_stride": 1, "has_bias": True, "even_width": even, "block_terms": blocks.terms,
    "block_tokens": blocks.tokens, "block_width": blocks.width,
}
bags = {
    "table": "*" + dtype, "indices": "*i32", "offsets": "*i64", "factors": "*fp32", "out": "*fp32",
    "width": "i32", "table_stride": "i32",
}
for kernel, types, fixed, options in (
    (head._max_kernel, maximum, constants, {"num_warps": blocks.warps, "num_stages": blocks.stages}),
    (head._bag_kernel, bags, {"block_entries": head.BLOCK_ENTRIES, "block_width": 256}, {}),
):
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if name in types}
    source = ASTSource(kernel, types | dict.fromkeys(fixed, "constexpr"), fixed, aligned if even else {})
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    print(len(built.asm["cubin"]) > 0, built.metadata.shared, "wgmma" in built.asm["ptx"])
"""


@pytest.mark.parametrize(
    ("capability", "dtype", "size", "places", "even", "shared", "tensor_cores"),
    [
        (90, "bf16", 2, "i16", True, 227 << 10, True),
        (86, "fp16", 2, "i32", False, 99 << 10, False),  # the smallest shared memory of the GPUs it is chosen on
        (80, "fp32", 4, "i16", True, 163 << 10, False),
    ],
)
def test_kernels_compile_for_gpus_that_are_not_here(
    tmp_path: Path, capability: int, dtype: str, size: int, places: str, even: bool, shared: int, tensor_cores: bool
) -> None:
    pytest.importorskip("triton")
    arguments = [str(capability), dtype, str(size), places, str(int(even))]
    script = tmp_path / "compile.py"
    script.write_text(COMPILE_SCRIPT)
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    command = [sys.executable, str(script), *arguments]
    run = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    (built, memory, warpgroups), bags = (line.split() for line in run.stdout.splitlines())
    assert built == bags[0] == "True"
    assert int(memory) <= shared
    assert (warpgroups == "True") is tensor_cores


def test_without_a_device_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(UsageError, match="`triton` needs a CUDA device") as caught:
        splade_pool(torch.ones(1, 2, 4), torch.ones(8, 4), implementation="triton")
    assert caught.value.hint
