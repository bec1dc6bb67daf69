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


def test_without_a_device_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(UsageError, match="`triton` needs a CUDA device") as caught:
        splade_pool(torch.ones(1, 2, 4), torch.ones(8, 4), implementation="triton")
    assert caught.value.hint
