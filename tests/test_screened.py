"""Screening in bfloat16: what it rules out is inactive in float64, and what is left is what `tiled` computes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from headscale.errors import UsageError
from headscale.kernels import screened, tiled
from headscale.pooling import choose_implementation, max_logits, possible_share, splade_pool

needs_bf16 = pytest.mark.skipif(not screened.available(), reason="this processor has no bfloat16 products")

BATCH, SEQ, WIDTH, VOCAB = 4, 70, 272, 2049  # two tiles, the second of one term


def make(
    *, zeros: float = 0.97, spread: bool = False, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, weight and a bias for the wanted share of zeros; `spread`: norms over six orders of magnitude."""
    gen = torch.Generator().manual_seed(0)
    hidden = torch.randn(BATCH, SEQ, WIDTH, generator=gen)
    weight = torch.randn(VOCAB, WIDTH, generator=gen) * WIDTH**-0.5
    if spread:
        hidden *= 10 ** (3 * torch.rand(BATCH, SEQ, 1, generator=gen))
        weight *= 10 ** (3 * torch.rand(VOCAB, 1, generator=gen))
    weight = weight.to(dtype)
    norm = weight.double().norm(dim=1)
    best = (hidden.double() @ weight.double().T).amax(1) / norm
    bias = (torch.randn(VOCAB, generator=gen) * best.std() * 0.2 - best.quantile(zeros)) * norm
    return hidden, weight, bias.float()


def holes(hidden: Tensor) -> Tensor:
    """A mask of texts of several lengths, two of them equal, one empty."""
    mask = torch.ones(hidden.shape[:2], dtype=torch.bool)
    mask[0, ::3] = False
    mask[1] = False
    return mask


def possible(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    screen = screened._Screen(tiled.pack(hidden, None, torch.float32))
    return screen.possible(weight, bias)


@needs_bf16
@pytest.mark.parametrize("spread", [False, True])
@pytest.mark.parametrize("below", [0.0, 1e-7, 1e-4])
def test_nothing_active_is_ruled_out_even_at_the_very_edge(spread: bool, below: float) -> None:
    hidden, weight, _ = make(spread=spread)
    exact = (hidden.double() @ weight.double().T).amax(1)  # (batch, vocab)
    for row in exact:
        bias = (-row * (1 - below)).float()
        active = exact + bias.double() > 0
        assert active.any()
        assert possible(hidden, weight, bias)[active].all()


@needs_bf16
def test_rounding_that_all_goes_one_way_is_covered() -> None:
    # 1 + 2**-8 lies halfway between two bfloat16 numbers and goes to the even one, 1: every product loses alike,
    # and the second half brings the rounded sum to 0
    half = WIDTH // 2
    token = torch.cat([torch.full((half,), 1 + 2**-8), torch.ones(half)])
    term = torch.cat([torch.full((half,), 1 + 2**-8), -torch.ones(half)])
    exact = float(token.double() @ term.double())
    assert exact > 1
    assert float(token.bfloat16().float() @ term.bfloat16().float()) == 0
    bias = torch.tensor([0.01 - exact, 0.5 - exact, -2 * exact])
    assert possible(token.expand(1, 64, -1), term.expand(3, -1), bias).tolist() == [[True, True, False]]


@needs_bf16
def test_denormals_and_overflow_rule_nothing_out_wrongly() -> None:
    tiny, huge = 2.0**-130, 3.4e38  # flushed to zero, and rounded to infinity, by bfloat16 products
    hidden = torch.zeros(2, 64, WIDTH)
    hidden[0, 5, 0], hidden[1, 5, 1] = tiny, 1.0
    weight = torch.zeros(2, WIDTH)
    weight[0, 0], weight[1, 1] = 2.0**40, huge
    assert possible(hidden, weight, torch.tensor([-(2.0**-91), -1.0])).diagonal().all()


@needs_bf16
@pytest.mark.parametrize("zeros", [0.9, 0.97, 0.99])
def test_most_of_what_is_inactive_is_ruled_out(zeros: float) -> None:
    hidden, weight, bias = make(zeros=zeros)
    active = (hidden.double() @ weight.double().T).amax(1) + bias > 0
    share = possible(hidden, weight, bias).double().mean()
    assert active.double().mean() <= share < active.double().mean() + 0.05


@needs_bf16
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("spread", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_support_position_values_and_gradients_are_those_of_tiled(
    masked: bool, spread: bool, dtype: torch.dtype
) -> None:
    hidden, weight, bias = make(spread=spread, dtype=dtype)
    mask = holes(hidden) if masked else None
    packing = tiled.pack(hidden, mask, torch.float32)
    wanted, where = tiled.tiled_max(packing, weight, bias)
    values, winners = screened.screened_max(packing, weight, bias)
    active = wanted > 0
    assert torch.equal(values > 0, active)
    assert torch.equal(winners[active], where[active])
    assert winners.dtype == where.dtype
    # the textbook bound of two float32 inner products
    slack = 2 * WIDTH * 2**-24 * ((hidden.abs() @ weight.float().abs().T).amax(1) + bias.abs())
    order = slice(None) if packing.order is None else packing.order
    assert ((values - wanted).abs() <= slack[order])[active].all()
    assert 0.9 < values.isneginf().double().mean() < 1
    leaves = [t.clone().requires_grad_() for t in (hidden, weight, bias)]
    upstream = torch.randn(BATCH, VOCAB, generator=torch.Generator().manual_seed(1))
    found, expected = (
        torch.autograd.grad(splade_pool(*leaves, mask, implementation=name), leaves, upstream)
        for name in ("screened", "tiled")
    )
    for got, gradient in zip(found, expected, strict=True):
        assert (got - gradient).double().norm() <= 1e-6 * gradient.double().norm()


@needs_bf16
def test_gradients_equal_the_float64_closed_form() -> None:
    leaves = [t.requires_grad_() for t in make()]
    double = [t.detach().double().requires_grad_() for t in leaves]
    out = splade_pool(*leaves, implementation="screened")
    exact = torch.log1p(torch.relu((double[0] @ double[1].T + double[2]).amax(1)))
    assert torch.equal(out > 0, exact > 0)
    for got, wanted in zip(
        torch.autograd.grad(out.sum(), leaves), torch.autograd.grad(exact.sum(), double), strict=True
    ):
        assert (got - wanted).norm() < 1e-6 * wanted.norm()


@needs_bf16
def test_nan_and_inf_reach_the_result() -> None:
    hidden, weight, bias = make()
    hidden[0, 1, 2] = torch.nan
    hidden[1, 3, 0] = torch.inf
    weight[7, 4] = torch.inf
    bias[9] = torch.nan
    bias[11] = -torch.inf
    out = splade_pool(hidden, weight, bias, implementation="screened")
    wanted = splade_pool(hidden, weight, bias, implementation="tiled")
    assert torch.equal(out.isnan(), wanted.isnan())
    assert torch.equal(out.isinf(), wanted.isinf())
    assert wanted[0].isnan().all()
    assert wanted[1].isinf().any()


@needs_bf16
def test_dense_texts_are_left_to_tiled() -> None:
    hidden, weight, bias = make(zeros=0.5)
    packing = tiled.pack(hidden, None, torch.float32)
    assert screened.MAX_SHARE < possible_share(hidden, weight, bias) < 0.7
    values, _ = screened.screened_max(packing, weight, bias)
    assert torch.equal(values, tiled.tiled_max(packing, weight, bias)[0])  # the inactive ones too


@needs_bf16
def test_no_bias_no_token_and_repeats() -> None:
    hidden, weight, bias = make()
    bare, plain = (splade_pool(hidden - 5, weight.abs(), implementation=name) for name in ("screened", "tiled"))
    assert torch.equal(bare, plain)
    nothing = splade_pool(hidden, weight, bias, torch.zeros(BATCH, SEQ), implementation="screened")
    assert (nothing == 0).all()
    runs = [splade_pool(hidden, weight, bias, implementation="screened") for _ in range(3)]
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[0], runs[2])
    strided = torch.stack([weight, weight], 2)[:, :, 0]
    assert torch.equal(splade_pool(hidden, strided, bias, implementation="screened"), runs[0])


@needs_bf16
def test_raw_maxima_are_never_screened() -> None:
    hidden, weight, bias = make()
    assert torch.equal(max_logits(hidden, weight, bias, implementation="screened").values,
                       max_logits(hidden, weight, bias, implementation="tiled").values)  # fmt: skip


def test_it_is_chosen_where_it_pays_and_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight = torch.zeros(16, 64, 256), torch.zeros(8192, 256)
    monkeypatch.setattr(screened, "available", lambda: True)
    assert choose_implementation(hidden, weight) == "screened"
    assert choose_implementation(hidden.double(), weight) == "tiled"
    assert choose_implementation(hidden.bfloat16(), weight.bfloat16()) == "tiled"
    for small in (hidden[:15], hidden[:, :63].repeat(2, 1, 1), hidden[:, :, :255]):
        assert choose_implementation(small, weight[:, : small.shape[2]]) == "tiled"
    assert choose_implementation(hidden, weight[:8191]) == "tiled"
    with pytest.raises(UsageError, match="`screened` computes in float32 only") as caught:
        splade_pool(hidden.double(), weight, implementation="screened")
    assert caught.value.hint
    monkeypatch.setattr(screened, "available", lambda: False)
    assert choose_implementation(hidden, weight) == "tiled"
    with pytest.raises(UsageError, match="`screened` needs a CPU with bfloat16 products") as caught:
        possible_share(hidden, weight)
    assert caught.value.hint
