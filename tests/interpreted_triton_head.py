"""The GPU kernels in Triton's interpreter, on the CPU, against the tiled head.

`test_triton_head.py` runs this file in a process of its own: Triton must be told before its first import.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from headscale.errors import UsageError
from headscale.kernels import tiled, triton_head
from headscale.pooling import max_logits, splade_pool


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    for size, blocks in triton_head.BLOCKS.items():
        monkeypatch.setitem(triton_head.BLOCKS, size, blocks._replace(terms=64, tokens=16))


def make(dtype: torch.dtype = torch.float32, shift: float = -1.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Texts longer than a block of tokens, a width and vocabulary no block divides, holes, one empty text."""
    gen = torch.Generator().manual_seed(0)
    hidden = torch.randn(4, 37, 40, generator=gen).to(dtype)
    weight = (torch.randn(150, 40, generator=gen) * 0.3).to(dtype)
    bias = (torch.randn(150, generator=gen) + shift).to(dtype)
    mask = torch.rand(4, 37, generator=gen) < 0.7
    mask[1] = False
    mask[2, 20:] = False
    return hidden, weight, bias, mask


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("with_bias", [True, False])
def test_maxima_equal_float64(dtype: torch.dtype, with_bias: bool) -> None:
    hidden, weight, bias, mask = make(dtype)
    shift = bias if with_bias else None
    values, winners = triton_head.fused_max(tiled.pack(hidden, mask, dtype), weight, shift)
    double = None if shift is None else shift.double()
    exact, where = tiled.tiled_max(tiled.pack(hidden, mask, torch.float64), weight.double(), double)
    assert values.dtype == torch.float32
    assert winners.dtype == torch.int16
    full = exact.isfinite()
    assert torch.equal(values[~full].double(), exact[~full])
    assert (values - exact)[full].abs().max() < 1e-5
    assert torch.equal(winners[full], where[full])


@pytest.mark.parametrize(
    ("shift", "masked", "dtype", "bound"),
    [
        (-6.0, True, torch.float32, 1e-6),
        (6.0, False, torch.float32, 1e-6),
        (-6.0, False, torch.float16, 1e-3),
        (6.0, True, torch.float16, 1e-3),
    ],
)
def test_gradients_equal_the_tiled_head(shift: float, masked: bool, dtype: torch.dtype, bound: float) -> None:
    hidden, weight, bias, mask = make(dtype, shift)
    leaves = [t.requires_grad_() for t in (hidden, weight, bias)]
    upstream = torch.randn(4, 150, generator=torch.Generator().manual_seed(1))
    outs = [
        splade_pool(*leaves, mask if masked else None, scale=0.5, implementation=name) for name in ("triton", "tiled")
    ]
    assert (outs[0] - outs[1]).abs().max() < 1e-6
    share = (outs[0] > 0).float().mean()
    assert 0 < share < 0.3 if shift < 0 else share > 0.7
    found, wanted = (torch.autograd.grad(out, leaves, upstream) for out in outs)
    for got, expected in zip(found, wanted, strict=True):
        assert got.dtype == dtype
        assert (got - expected).float().norm() < bound * expected.float().norm()


def test_ties_nan_and_strided_weight() -> None:
    weight = make()[1].abs()
    ones = torch.ones(2, 37, 40)
    ones[1, 20:] = 2.0
    positions = max_logits(ones, weight, implementation="triton").positions
    assert (positions[0] == 0).all()
    assert (positions[1] == 20).all()
    ones[0, 30, 3] = torch.nan
    values, positions = max_logits(ones, weight, implementation="triton")
    assert values[0].isnan().all()
    assert (positions[0] == 30).all()
    assert values[1].isfinite().all()
    strided = torch.stack([weight, weight * 0], 2)[:, :, 0]
    assert torch.equal(max_logits(ones, strided, implementation="triton").values[1], values[1])


def test_float64_is_refused() -> None:
    hidden, weight, _, _ = make(torch.float64)
    with pytest.raises(UsageError, match="does not compute in float64"):
        splade_pool(hidden, weight, implementation="triton")
