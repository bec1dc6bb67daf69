"""The pooled head against float64 autograd, the closed form at the winning position, and sentence-transformers."""

from __future__ import annotations

import subprocess
import sys
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from headscale.errors import UsageError
from headscale.kernels import tiled
from headscale.pooling import (
    SMALL_LOGITS,
    SpladeHead,
    choose_implementation,
    max_logits,
    splade_pool,
    splade_pool_reference,
)

EMPTY_ROW = 2


class Inputs(NamedTuple):
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    mask: Tensor | None

    def doubled(self) -> Inputs:
        """The same numbers in float64, as fresh leaves."""
        return Inputs(
            _leaf(self.hidden.double()),
            _leaf(self.weight.double()),
            None if self.bias is None else _leaf(self.bias.double()),
            self.mask,
        )

    @property
    def leaves(self) -> list[Tensor]:
        return [t for t in self[:3] if t is not None]


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_()


def make(
    *,
    batch: int = 5,
    seq: int = 11,
    width: int = 24,
    vocab: int = 517,
    bias: float | None = 0.0,
    mask: str = "none",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Inputs:
    gen = torch.Generator().manual_seed(seed)
    hidden = torch.randn(batch, seq, width, generator=gen)
    weight = torch.randn(vocab, width, generator=gen) * width**-0.5
    shift = None if bias is None else torch.randn(vocab, generator=gen) * 0.5 + bias
    chosen = None
    if mask == "padded":
        lengths = torch.tensor([seq, 3, 0, 1, seq - 2, seq][:batch])
        chosen = (torch.arange(seq)[None] < lengths[:, None]).long()
    if mask == "holes":
        chosen = torch.rand(batch, seq, generator=gen) < 0.6
        chosen[EMPTY_ROW] = False
    return Inputs(
        _leaf(hidden.to(dtype)),
        _leaf(weight.to(dtype)),
        None if shift is None else _leaf(shift.to(dtype)),
        chosen,
    )


def oracle(inputs: Inputs, scale: float = 1.0) -> Tensor:
    """Independent of the package: loops over texts, float64."""
    hidden, weight, bias, mask = inputs
    texts = []
    for row in range(len(hidden)):
        tokens = hidden[row] if mask is None else hidden[row][mask[row].bool()]
        if not len(tokens):
            texts.append(weight.sum(1) * 0)
            continue
        logits = tokens @ weight.T if bias is None else tokens @ weight.T + bias
        texts.append(torch.log1p(torch.clamp(scale * logits.max(0).values, min=0)))
    return torch.stack(texts)


def closed_form(inputs: Inputs, positions: Tensor, scale: float, upstream: Tensor) -> list[Tensor]:
    """Gradients in float64, given which position won."""
    hidden, weight, bias, _ = inputs.doubled()
    at = positions.long().clamp(min=0)
    won = torch.gather(
        hidden[:, :, None].expand(-1, -1, 1, -1).squeeze(2), 1, at[..., None].expand(-1, -1, hidden.shape[2])
    )
    logit = (won * weight).sum(2) + (0 if bias is None else bias)
    active = (logit > 0) & (positions >= 0)
    slope = torch.where(active, upstream.double() * scale / (1 + scale * logit), 0.0)
    grad_hidden = torch.zeros_like(hidden)
    for row in range(len(hidden)):
        grad_hidden[row].index_add_(0, at[row], slope[row][:, None] * weight)
    grad_weight = (slope[..., None] * won).sum(0)
    return [g.detach() for g in ([grad_hidden, grad_weight] + ([] if bias is None else [slope.sum(0)]))]


def distance(value: Tensor, truth: Tensor) -> float:
    """Norm-relative; 0 where both are zero."""
    gap = (value.double() - truth.double()).norm()
    return float((gap / truth.double().norm().clamp_min(1e-300)).detach()) if gap else 0.0


def grads(out: Tensor, inputs: Inputs, upstream: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(out, inputs.leaves, upstream))


@pytest.fixture(params=["reference", "tiled"])
def implementation(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def tiny_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many tiles and many chunks even on a small vocabulary, neither dividing it."""
    monkeypatch.setitem(tiled.TILE_BYTES, "cpu", 64)
    monkeypatch.setitem(tiled.CHUNK_TERMS, "cpu", 70)


@pytest.mark.parametrize("mask", ["none", "padded", "holes"])
@pytest.mark.parametrize("bias", [None, 0.0, -2.5, 9.0])
@pytest.mark.parametrize("scale", [1.0, 0.0625])
@pytest.mark.usefixtures("tiny_tiles")
def test_float64_equals_autograd_oracle(implementation: str, mask: str, bias: float | None, scale: float) -> None:
    inputs = make(mask=mask, bias=bias, dtype=torch.float64)
    out = splade_pool(*inputs, scale=scale, implementation=implementation)
    expected = oracle(inputs, scale)
    upstream = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(1))
    assert out.dtype == torch.float64
    assert (out - expected).abs().max() < 1e-14
    for got, wanted in zip(grads(out, inputs, upstream), grads(expected, inputs, upstream), strict=True):
        assert distance(got, wanted) < 1e-14


@pytest.mark.parametrize(
    ("dtype", "bias", "bound"),
    [
        (torch.float32, 0.0, 1e-6),
        (torch.float32, -2.5, 1e-6),
        (torch.float32, 9.0, 1e-6),
        (torch.bfloat16, -2.5, 5e-3),
        (torch.bfloat16, 0.0, 5e-3),
        (torch.float16, -2.5, 1e-3),
    ],
)
@pytest.mark.parametrize("mask", ["none", "holes"])
def test_gradients_equal_closed_form_at_returned_position(
    dtype: torch.dtype, bias: float, bound: float, mask: str
) -> None:
    inputs = make(batch=6, seq=40, width=96, vocab=3001, dtype=dtype, bias=bias, mask=mask)
    upstream = torch.randn(6, 3001, generator=torch.Generator().manual_seed(1))
    out = splade_pool(*inputs, scale=0.5, implementation="tiled")
    positions = max_logits(*inputs, implementation="tiled").positions
    for got, wanted, leaf in zip(
        grads(out, inputs, upstream),
        closed_form(inputs, positions, 0.5, upstream),
        inputs.leaves,
        strict=True,
    ):
        assert got.dtype == leaf.dtype
        assert distance(got, wanted) < bound


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 2**-24), (torch.bfloat16, 2**-8)])
@pytest.mark.parametrize("mask", ["none", "padded", "holes"])
def test_position_attains_the_maximum(implementation: str, dtype: torch.dtype, rounding: float, mask: str) -> None:
    inputs = make(batch=6, seq=40, width=96, vocab=1003, dtype=dtype, mask=mask)
    values, positions = max_logits(*inputs, implementation=implementation)
    hidden, weight, bias, chosen = inputs.doubled()
    assert bias is not None
    logits = hidden @ weight.T + bias
    allowed = torch.ones(hidden.shape[:2], dtype=torch.bool) if chosen is None else chosen.bool()
    logits = logits.masked_fill(~allowed[:, :, None], -torch.inf)
    best = logits.amax(1)
    full = allowed.any(1)
    attained = logits.gather(1, positions.long().clamp(min=0)[:, None])[:, 0]
    # the textbook bound of a float32 inner product, and one rounding of the result
    slack = 96 * 2**-24 * (hidden.abs() @ weight.abs().T).amax(1) + rounding * best.abs()
    assert ((best - attained) <= 2 * slack)[full].all()
    assert ((best - values) <= slack)[full].all()
    assert (best - attained)[full].count_nonzero() < 0.1 * best[full].numel()
    assert (values[~full] == -torch.inf).all()
    assert (positions[~full] == -1).all()
    assert not values.requires_grad


@pytest.mark.usefixtures("tiny_tiles")
def test_tie_goes_to_the_smallest_allowed_position(implementation: str) -> None:
    hidden = torch.ones(2, 7, 8)
    weight = torch.randn(130, 8, generator=torch.Generator().manual_seed(0)).abs()
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[1, :3] = False
    positions = max_logits(hidden, weight, None, mask, implementation=implementation).positions
    assert (positions[0] == 0).all()
    assert (positions[1] == 3).all()
    leaf = _leaf(hidden)
    splade_pool(leaf, weight, None, mask, implementation=implementation).sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.abs().sum(2).nonzero().tolist() == [[0, 0], [1, 3]]


def test_empty_texts_are_zero_with_zero_gradient(implementation: str) -> None:
    inputs = make(mask="padded", bias=9.0)  # every term active wherever there is a token
    out = splade_pool(*inputs, implementation=implementation)
    assert (out[EMPTY_ROW] == 0).all()
    assert (out[0] > 0).all()
    (grad_hidden, grad_weight, _) = grads(out, inputs, torch.ones_like(out))
    assert (grad_hidden[EMPTY_ROW] == 0).all()
    assert inputs.mask is not None
    assert (grad_hidden[inputs.mask == 0] == 0).all()
    assert grad_weight.isfinite().all()


@pytest.mark.parametrize("shape", [(3, 0), (0, 4), (3, 4)])
def test_batches_without_any_token(implementation: str, shape: tuple[int, int]) -> None:
    hidden = torch.randn(*shape, 8, requires_grad=True)
    weight = torch.randn(33, 8, requires_grad=True)
    mask = torch.zeros(shape)
    out = splade_pool(hidden, weight, None, mask, implementation=implementation)
    assert out.shape == (shape[0], 33)
    assert (out == 0).all()
    out.sum().backward()
    assert weight.grad is not None
    assert (weight.grad == 0).all()
    values, positions = max_logits(hidden, weight, None, mask, implementation=implementation)
    assert (values == -torch.inf).all()
    assert (positions == -1).all()


def test_non_contiguous_inputs_and_expanded_upstream() -> None:
    inputs = make(width=24, vocab=300)
    hidden = _leaf(inputs.hidden.detach().permute(2, 0, 1).contiguous()).permute(1, 2, 0)
    weight = inputs.weight.detach().repeat(1, 2)[:, ::2].contiguous().T.contiguous().T
    wide = _leaf(torch.stack([weight, weight], 2))
    strided = wide[:, :, 1]
    assert not hidden.is_contiguous()
    assert not strided.is_contiguous()
    out = splade_pool(hidden, strided, inputs.bias, implementation="tiled")
    same = splade_pool(hidden.contiguous(), strided.contiguous(), inputs.bias, implementation="tiled")
    assert torch.equal(out, same)
    got = torch.autograd.grad(out.sum(), [hidden, strided])
    wanted = torch.autograd.grad(same.sum(), [hidden, strided])
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_two_uses_in_one_graph() -> None:
    query, document = make(batch=4, seq=5, mask="padded"), make(batch=4, seq=11, mask="holes", seed=3)
    weight, bias = query.weight, query.bias

    def loss(pool: str) -> Tensor:
        q = splade_pool(query.hidden, weight, bias, query.mask, implementation=pool)
        d = splade_pool(document.hidden, weight, bias, document.mask, implementation=pool)
        return (q @ d.T).logsumexp(1).sum() + (q * q).sum()

    leaves = [query.hidden, document.hidden, weight, bias]
    for got, wanted in zip(
        torch.autograd.grad(loss("tiled"), leaves),
        torch.autograd.grad(loss("reference"), leaves),
        strict=True,
    ):
        assert distance(got, wanted) < 1e-6


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True)])
def test_only_the_wanted_gradients_are_computed(wanted: tuple[bool, bool, bool]) -> None:
    inputs = make(bias=0.5)
    full = grads(splade_pool(*inputs, implementation="tiled").sum(), inputs, torch.tensor(1.0))
    for leaf, flag in zip(inputs.leaves, wanted, strict=True):
        leaf.requires_grad_(flag)
    splade_pool(*inputs, implementation="tiled").sum().backward()
    for leaf, flag, grad in zip(inputs.leaves, wanted, full, strict=True):
        if flag:
            assert leaf.grad is not None
            assert torch.equal(leaf.grad, grad)
        else:
            assert leaf.grad is None


def test_gradcheck() -> None:
    inputs = make(batch=3, seq=4, width=5, vocab=19, mask="padded", dtype=torch.float64)

    def pool(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return splade_pool(hidden, weight, bias, inputs.mask, scale=0.7, implementation="tiled")

    assert torch.autograd.gradcheck(pool, inputs.leaves, eps=1e-7, atol=1e-6)


def test_second_derivative_is_refused() -> None:
    inputs = make()
    out = splade_pool(*inputs, implementation="tiled").pow(2).sum()
    (grad,) = torch.autograd.grad(out, inputs.hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("bias", [-2.5, 9.0])
def test_repeats_are_bitwise_equal(bias: float) -> None:
    inputs = make(batch=6, seq=40, width=96, vocab=3001, bias=bias, mask="holes")
    upstream = torch.randn(6, 3001, generator=torch.Generator().manual_seed(1))
    runs = []
    for _ in range(3):
        out = splade_pool(*inputs, implementation="tiled")
        runs.append([out, *grads(out, inputs, upstream)])
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


def test_one_forward_serves_every_constant(implementation: str) -> None:
    inputs = make(mask="holes")
    values = max_logits(*inputs, implementation=implementation).values
    for scale in (4.0, 1.0, 1 / 16, 0.3):
        pooled = splade_pool(*inputs, scale=scale, implementation=implementation)
        assert torch.equal(pooled, torch.log1p(torch.relu(scale * values)))
        with torch.no_grad():
            scaled = oracle(Inputs(inputs.hidden, inputs.weight * scale, inputs.bias * scale, inputs.mask))
        assert distance(pooled, scaled) < 1e-6


def test_nan_and_inf_propagate_and_excluded_positions_never_matter(implementation: str) -> None:
    inputs = make(bias=2.0)
    hidden = inputs.hidden.detach().clone()
    mask = torch.ones(hidden.shape[:2])
    mask[0, 1] = 0
    clean = splade_pool(hidden, inputs.weight, inputs.bias, mask, implementation=implementation)
    hidden[0, 1] = torch.nan  # excluded
    hidden[1, 2, 3] = torch.nan
    weight = inputs.weight.detach().clone()
    weight[7, 0] = torch.inf
    leaf = _leaf(hidden)
    out = splade_pool(leaf, weight, inputs.bias, mask, implementation=implementation)
    others = [i for i in range(len(weight)) if i != 7]
    assert torch.equal(out[0, others], clean[0, others])
    assert out[1].isnan().all()
    assert (out[2:, 7] == torch.inf).all()
    assert torch.equal(out[2:, others], clean[2:, others])


def test_nan_reaches_the_gradients_of_what_it_touched(implementation: str) -> None:
    inputs = make(bias=2.0)
    with torch.no_grad():
        inputs.hidden[1, 2, 3] = torch.nan
    out = splade_pool(*inputs, implementation=implementation)
    grad_hidden, grad_weight, grad_bias = grads(out, inputs, torch.ones_like(out))
    assert grad_hidden[1, 2].isnan().all()
    assert grad_hidden[2:].isfinite().all()
    assert grad_weight.isnan().any(1).all()
    assert grad_bias.isnan().all()


def test_inactive_terms_stop_even_a_nan_from_above() -> None:
    inputs = make(bias=-20.0)
    out = splade_pool(*inputs, implementation="tiled")
    assert (out == 0).all()
    for grad in grads(out, inputs, torch.full_like(out, torch.nan)):
        assert (grad == 0).all()


def test_half_precision_is_rounded_after_the_bias() -> None:
    # product and bias cancel: rounding the product alone to bfloat16 would be off by up to 0.06
    inputs = make(width=64, vocab=2001, bias=None, dtype=torch.bfloat16)
    hidden, weight = inputs.hidden.detach() + 3, inputs.weight.detach() + 0.1
    bias = torch.full((2001,), -20.0, dtype=torch.bfloat16)
    exact = (hidden.double() @ weight.double().T + bias.double()).amax(1)
    values = max_logits(hidden, weight, bias, implementation="tiled").values
    assert values.dtype == torch.float32
    near = exact.abs() < 2
    assert near.float().mean() > 0.2
    assert ((values - exact)[near].abs() <= 2**-8 * exact[near].abs() + 1e-4).all()


def test_autocast_and_mixed_dtypes() -> None:
    inputs = make(batch=4, seq=20, width=64, vocab=2001)
    exact = oracle(inputs.doubled())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = splade_pool(*inputs, implementation="tiled")
        plain = splade_pool_reference(*inputs)
    assert out.dtype == plain.dtype == torch.float32
    assert 1e-5 < distance(plain, exact) < 5e-3  # autocast was on, and does what it does to nn.Linear
    assert distance(out, exact) < 5e-3
    for grad in grads(out, inputs, torch.ones_like(out)):
        assert grad.dtype == torch.float32
    mixed = splade_pool(inputs.hidden.bfloat16(), inputs.weight, inputs.bias, implementation="tiled")
    again = splade_pool(inputs.hidden.bfloat16().float(), inputs.weight, inputs.bias, implementation="tiled")
    assert torch.equal(mixed, again)


@pytest.mark.filterwarnings("ignore")
def test_torch_compile_around_it() -> None:
    inputs = make(batch=8, seq=16, width=32, vocab=2003, mask="none")
    assert choose_implementation(inputs.hidden, inputs.weight) == "tiled"

    def step(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        pooled = splade_pool(torch.tanh(hidden), weight, bias)
        return (pooled @ pooled.T).logsumexp(1).sum()

    compiled = torch.compile(step, backend="aot_eager")
    got = torch.autograd.grad(compiled(*inputs.leaves), inputs.leaves)
    wanted = torch.autograd.grad(step(*inputs.leaves), inputs.leaves)
    for a, b in zip(got, wanted, strict=True):
        assert distance(a, b) < 1e-6


@pytest.mark.parametrize("mask", ["padded", "holes"])
def test_equals_sentence_transformers(mask: str) -> None:
    modules = pytest.importorskip("sentence_transformers.sparse_encoder.modules")
    inputs = make(batch=6, seq=20, width=32, vocab=2003, mask=mask)
    assert inputs.mask is not None
    pooling = modules.SpladePooling()
    logits = torch.nn.functional.linear(inputs.hidden, inputs.weight, inputs.bias)
    expected = pooling({"token_embeddings": logits, "attention_mask": inputs.mask})["sentence_embedding"]
    out = splade_pool(*inputs, implementation="tiled")
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    assert (out - expected).abs().max() < 1e-6
    for got, wanted in zip(grads(out, inputs, upstream), grads(expected, inputs, upstream), strict=True):
        assert distance(got, wanted) < 1e-5


def test_module_keeps_a_tied_parameter_and_pools_like_the_function() -> None:
    inputs = make(mask="padded")
    embedding = torch.nn.Embedding.from_pretrained(inputs.weight.detach(), freeze=False)
    head = SpladeHead(embedding.weight, inputs.bias.detach(), scale=0.25)
    assert head.weight is embedding.weight
    assert dict(head.named_parameters()).keys() == {"weight", "bias"}
    expected = splade_pool(*inputs, scale=0.25)
    assert torch.equal(head(inputs.hidden, inputs.mask), expected)


def test_implementation_is_chosen_by_size_and_can_be_named() -> None:
    small, large = torch.randn(1, 2, 4), torch.randn(8, 64, 4)
    weight = torch.randn(SMALL_LOGITS // 64, 4)
    assert choose_implementation(small, weight) == "reference"
    assert choose_implementation(large, weight) == "tiled"
    with pytest.raises(UsageError, match="`implementation` is not known: `fast`"):
        splade_pool(small, weight, implementation="fast")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(3, 4)}, "`hidden` (3, 4) and `weight` (5, 8) do not fit each other"),
        ({"weight": torch.zeros(5, 7)}, "`hidden` (3, 4, 8) and `weight` (5, 7) do not fit each other"),
        ({"bias": torch.zeros(6)}, "`bias` (6,) does not fit `weight`"),
        ({"attention_mask": torch.ones(3, 5)}, "`attention_mask` (3, 5) does not fit `hidden`"),
        ({"scale": 0.0}, "`scale` must be positive, not 0.0"),
        ({"scale": float("nan")}, "`scale` must be positive, not nan"),
    ],
)
def test_misfits_are_named(change: dict[str, object], message: str) -> None:
    arguments = {"hidden": torch.zeros(3, 4, 8), "weight": torch.zeros(5, 8), "bias": torch.zeros(5)} | change
    with pytest.raises(UsageError) as caught:
        splade_pool(**arguments)  # type: ignore[arg-type]
    assert caught.value.message == message
    assert caught.value.hint


MEMORY_SCRIPT = """
import sys, torch
from headscale.pooling import splade_pool
torch.set_num_threads(1)

def peak():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024

def step(vocab):
    hidden = torch.ones(8, 128, 64).normal_().requires_grad_()
    weight = torch.ones(vocab, 64).normal_().requires_grad_()
    before = peak()
    splade_pool(hidden, weight, torch.zeros(vocab), implementation=sys.argv[1]).sum().backward()
    return peak() - before - weight.numel() * 4 / 2**20

step(2048)
print(step(30522))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("pool", "fits"), [("tiled", True), ("reference", False)])
def test_memory_stays_below_one_tensor_of_logits(pool: str, fits: bool) -> None:
    run = subprocess.run([sys.executable, "-c", MEMORY_SCRIPT, pool], capture_output=True, text=True, check=True)
    logits = 8 * 128 * 30522 * 4 / 2**20  # 119 MB; measured: 17 MB tiled
    assert (float(run.stdout) < logits / 2) is fits, run.stdout
