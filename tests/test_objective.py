"""Losses and gradients against float64 oracles written another way, schedules against the libraries' own."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.special import logsumexp, softmax
from tiny_corpus import tiny_pairs, tiny_tokenizer
from tiny_models import tiny_model

from headscale.errors import UsageError
from headscale.objective import (
    Schedule,
    candidate_scores,
    flops_cost,
    flops_reg,
    info_nce,
    kl_distillation,
    l1_reg,
    margin_mse,
    own_scores,
    ranking_loss,
    regularize,
)
from headscale.pooling import splade_pool
from headscale.recipes import RECIPES, TrainingConfig

B, HARD, V = 5, 3, 23


def reps(rows: int, seed: int) -> torch.Tensor:
    values = torch.randn(rows, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.log1p(torch.relu(values))


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    teacher = torch.randn(B, 1 + HARD, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return reps(B, 1), reps(B, 2), reps(B * HARD, 3).view(B, HARD, V), teacher


# --- ranking losses ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [True, False])
def test_candidates_are_counted_and_scored_one_by_one(batch, shared):
    queries, documents, negatives, _ = batch
    scores = candidate_scores(queries, documents, negatives, shared=shared).numpy()
    for i in range(B):
        others = negatives.flatten(0, 1) if shared else negatives[i]
        expected = [(queries[i] * d).sum().item() for d in [*documents, *others]]
        np.testing.assert_allclose(scores[i], expected, rtol=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 0.05, 30.0])
def test_info_nce_is_minus_log_softmax_of_the_positive(batch, temperature):
    queries, documents, negatives, _ = batch
    scores = candidate_scores(queries, documents, negatives)
    table = scores.numpy() / temperature
    expected = np.mean([logsumexp(row) - row[i] for i, row in enumerate(table)])
    assert info_nce(scores, temperature=temperature).item() == pytest.approx(expected, rel=1e-12)


def test_gradient_of_info_nce_is_softmax_less_the_positive(batch):
    scores = candidate_scores(*batch[:3]).requires_grad_()
    info_nce(scores, temperature=0.5).backward()
    expected = (softmax(scores.detach().numpy() / 0.5, axis=1) - np.eye(*scores.shape)) / (B * 0.5)
    np.testing.assert_allclose(scores.grad.numpy(), expected, rtol=1e-9, atol=1e-15)


def test_margin_mse_pair_by_pair(batch):
    queries, documents, negatives, teacher = batch
    errors = [
        (queries[i] @ documents[i] - queries[i] @ negatives[i, j] - teacher[i, 0] + teacher[i, 1 + j]).item() ** 2
        for i, j in itertools.product(range(B), range(HARD))
    ]
    got = margin_mse(own_scores(queries, documents, negatives), teacher)
    assert got.item() == pytest.approx(np.mean(errors), rel=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_kl_distillation_row_by_row(batch, temperature):
    own = own_scores(*batch[:3])
    teacher = softmax(batch[3].numpy() / temperature, axis=1)
    student = softmax(own.numpy() / temperature, axis=1)
    expected = temperature**2 * np.mean(np.sum(teacher * np.log(teacher / student), axis=1))
    got = kl_distillation(own, batch[3], temperature=temperature)
    assert got.item() == pytest.approx(expected, rel=1e-10)


def test_distillation_observes_the_same_in_batch_scores_as_infonce(batch):
    queries, documents, negatives, teacher = batch
    plain = ranking_loss("infonce", queries, documents, negatives)
    for name in ("margin-mse", "kl"):
        distilled = ranking_loss(name, queries, documents, negatives, teacher=teacher)
        torch.testing.assert_close(distilled.scores, plain.scores)


@pytest.mark.parametrize("name", ["margin-mse", "kl"])
def test_distillation_without_a_teacher_is_refused(batch, name):
    with pytest.raises(UsageError, match="teacher scores"):
        ranking_loss(name, *batch[:3])
    with pytest.raises(UsageError, match="hard negatives"):
        ranking_loss(name, *batch[:2], teacher=batch[3])


def test_an_overflow_is_neither_replaced_nor_hidden():
    huge = torch.full((2, V), 1e25)
    assert not math.isfinite(ranking_loss("infonce", huge, huge).loss.item())
    assert math.isinf(flops_reg(huge).item())


# --- regularizers ------------------------------------------------------------------------------------------


def test_flops_reg_term_by_term():
    table = reps(B, 4)
    expected = sum(np.mean([row[v] for row in table.numpy()]) ** 2 for v in range(V))
    assert flops_reg(table).item() == pytest.approx(expected, rel=1e-12)


def test_flops_cost_is_the_mean_number_of_shared_terms():
    queries, documents = reps(B, 5), reps(7, 6)
    shared = [int(((q > 0) & (d > 0)).sum()) for q, d in itertools.product(queries, documents)]
    assert flops_cost(queries, documents).item() == pytest.approx(np.mean(shared), rel=1e-6)


def test_l1_is_the_mean_sum_and_none_is_nothing():
    table = reps(B, 4)
    assert l1_reg(table).item() == pytest.approx(np.abs(table.numpy()).sum() / B, rel=1e-12)
    assert regularize("none", table).item() == 0.0


@pytest.mark.parametrize("threshold", [None, 9, 12])
def test_flops_reg_equals_that_of_sentence_transformers(threshold):
    losses = pytest.importorskip("sentence_transformers.sparse_encoder.losses")
    table = reps(B, 4)
    theirs = losses.FlopsLoss(None, threshold=threshold).compute_loss_from_embeddings(table)
    assert flops_reg(table, threshold=threshold).item() == pytest.approx(theirs.item(), rel=1e-6)


@pytest.mark.parametrize("name", ["infonce", "margin-mse", "kl"])
def test_ranking_losses_equal_those_of_sentence_transformers(batch, name):
    losses = pytest.importorskip("sentence_transformers.sparse_encoder.losses")
    queries, documents, negatives, teacher = batch
    theirs = {
        "infonce": losses.SparseMultipleNegativesRankingLoss(None, scale=2.0),
        "margin-mse": losses.SparseMarginMSELoss(None),
        "kl": losses.SparseDistillKLDivLoss(None, temperature=0.5),
    }[name]
    want = theirs.compute_loss_from_embeddings([queries, documents, *negatives.unbind(1)], teacher)
    temperature = 1.0 if name == "margin-mse" else 0.5
    got = ranking_loss(name, queries, documents, negatives, teacher=teacher, temperature=temperature)
    assert got.loss.item() == pytest.approx(want.item(), rel=1e-9)


# --- the whole objective -----------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [True, False])
def test_gradients_of_the_objective_agree_with_a_float64_oracle(shared):
    """fp32 head, pooled without the logits, against plain float64 operations, to 1e-5 of the norm."""
    source = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(V, 8, generator=source), 0.1 * torch.randn(V, generator=source)
    hidden = [torch.randn(rows, 6, 8, generator=source) for rows in (B, B * (1 + HARD))]
    masks = [(torch.rand(h.shape[:2], generator=source) > 0.2).long() for h in hidden]
    for mask in masks:
        mask[:, 0] = 1

    def objective(dtype: torch.dtype, pool) -> tuple[torch.Tensor, list[torch.Tensor]]:
        leaves = [t.to(dtype).requires_grad_() for t in (weight, bias, *hidden)]
        queries, documents = (pool(h, leaves[0], leaves[1], m) for h, m in zip(leaves[2:], masks, strict=True))
        ranked = ranking_loss(
            "infonce", queries, documents[:B], documents[B:].view(B, HARD, V), shared_negatives=shared
        )
        loss = ranked.loss + 3e-3 * flops_reg(queries) + 1e-3 * flops_reg(documents)
        return loss.detach(), list(torch.autograd.grad(loss, leaves))

    def plain(h, w, b, m):
        logits = torch.einsum("bld,vd->blv", h, w) + b
        return torch.log(1 + logits.clamp(min=0)).mul(m[:, :, None]).amax(1)

    loss, gradients = objective(torch.float32, splade_pool)
    want, expected = objective(torch.float64, plain)
    assert loss.item() == pytest.approx(want.item(), rel=1e-5)
    for got, exact in zip(gradients, expected, strict=True):
        assert relative(got, exact) < 1e-5


@pytest.fixture(scope="module")
def sparse_encoder(tmp_path_factory):
    """The same tiny BERT for sentence-transformers and for us; dropout off."""
    st = pytest.importorskip("sentence_transformers")
    folder = tmp_path_factory.mktemp("bert")
    model = tiny_model("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return model, st.SparseEncoder(str(folder), device="cpu")


def test_one_step_equals_splade_loss_of_sentence_transformers(sparse_encoder):
    """Losses to 1e-5, every parameter's gradient to 1e-4 of its norm: one batch with a hard negative each."""
    from sentence_transformers.sparse_encoder import losses

    from headscale.batches import batches
    from headscale.trainer import Trainer

    model, encoder = sparse_encoder
    pairs = tiny_pairs(B, negatives=1)
    config = TrainingConfig(steps=1, batch_size=B, negatives=1, ramp_steps=0, query_length=20, document_length=20)
    trainer = Trainer(model, tiny_tokenizer(), config)
    batch = next(batches(pairs, batch_size=B, negatives=1))
    observed = trainer._backward(batch, (config.lambda_query, config.lambda_document), 1.0)

    encoder.train()
    loss = losses.SpladeLoss(
        encoder, losses.SparseMultipleNegativesRankingLoss(encoder),
        document_regularizer_weight=config.lambda_document, query_regularizer_weight=config.lambda_query,
    )  # fmt: skip
    columns = [batch.queries, batch.documents[:B], batch.documents[B:]]
    parts = loss([encoder.preprocess(list(column)) for column in columns])
    sum(parts.values()).backward()

    assert observed["ranking_loss"] == pytest.approx(parts["base_loss"].item(), rel=1e-5)
    for side in ("query", "document"):
        ours, theirs = observed[f"weighted_reg_{side}"], parts[f"{side}_regularizer_loss"].item()
        assert ours == pytest.approx(theirs, rel=1e-5)
    theirs_by_name = dict(encoder[0].model.named_parameters())
    gradients = {n: (p.grad, theirs_by_name[n].grad) for n, p in model.named_parameters() if p.grad is not None}
    whole = float(torch.stack([theirs.norm() for _, theirs in gradients.values()]).norm())
    for name, (ours, theirs) in gradients.items():
        floor = 1e-3 * whole  # a key's bias has no gradient but rounding
        assert float((ours - theirs).norm()) < 1e-4 * max(float(theirs.norm()), floor), name
    assert len(gradients) > 30
    model.zero_grad()


# --- schedules ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("total", "warmup"), [(20, 5), (20, 0), (7, 3)])
def test_learning_rate_is_that_of_transformers(total, warmup):
    from transformers import get_linear_schedule_with_warmup

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = get_linear_schedule_with_warmup(optimizer, warmup, total)
    for step in range(total + 3):
        assert Schedule(total, warmup, 1).lr_factor(step) == pytest.approx(scheduler.get_last_lr()[0], abs=1e-15)
        optimizer.step()
        scheduler.step()


def test_lambda_is_that_of_sentence_transformers(sparse_encoder):
    from sentence_transformers.sparse_encoder import losses
    from sentence_transformers.sparse_encoder.callbacks.splade_callbacks import (
        SpladeRegularizerWeightSchedulerCallback,
    )

    loss = losses.SpladeLoss(sparse_encoder[1], losses.SparseMarginMSELoss(None), 1.0, 1.0)
    callback = SpladeRegularizerWeightSchedulerCallback(loss, "quadratic", warmup_ratio=1 / 3)
    config = TrainingConfig(steps=100)
    callback.warmup_steps = int(config.steps * callback.warmup_ratio)
    for step in range(config.steps):
        theirs = callback._calculate_weight_value(step, 1.0)
        assert config.schedule().lambda_factor(step) == pytest.approx(theirs, rel=1e-12)


def test_a_trial_is_the_first_steps_of_the_full_run_and_compression_is_not():
    full = TrainingConfig(steps=1000)
    trial = full.replace(steps=100, horizon=1000)
    compressed = trial.replace(compressed=True)
    for step in range(100):
        for factor in ("lr_factor", "lambda_factor"):
            assert getattr(trial.schedule(), factor)(step) == getattr(full.schedule(), factor)(step)
            shape = getattr(full.schedule(), factor)(10 * step)
            assert getattr(compressed.schedule(), factor)(step) == pytest.approx(shape, abs=0.02)
    assert compressed.schedule().lr_sum() / full.schedule().lr_sum() == pytest.approx(0.1, rel=0.01)


def test_constant_lambda_where_there_is_no_ramp():
    assert [Schedule(10, 0, 0).lambda_factor(step) for step in (0, 5)] == [1.0, 1.0]


# --- configurations ----------------------------------------------------------------------------------------


def test_every_recipe_can_be_cut_to_a_trial():
    for name, recipe in RECIPES.items():
        trial = recipe.config.replace(steps=100, horizon=recipe.config.steps)
        assert trial.schedule() == recipe.config.schedule(), name
        assert recipe.source


def test_naver_recipe_reaches_its_lambda_after_50000_steps():
    schedule = RECIPES["naver-max"].config.schedule()
    assert (schedule.total, schedule.warmup) == (150_000, 6_000)
    assert schedule.lambda_factor(25_000) == 0.25
    assert schedule.lambda_factor(50_000) == schedule.lambda_factor(149_999) == 1.0


def test_all_problems_of_a_configuration_are_named_together():
    with pytest.raises(UsageError) as caught:
        TrainingConfig(steps=0, loss="mse", lr=-1.0, scale=0.5, horizon=3, clip=0.0)
    for word in ("steps", "loss", "lr", "scale", "clip"):
        assert f"`{word}`" in caught.value.message
    with pytest.raises(UsageError, match="shorter than"):
        TrainingConfig(steps=5, horizon=3)
    with pytest.raises(UsageError, match="has no temperature"):
        TrainingConfig(steps=5, loss="margin-mse", negatives=1, temperature=2.0)
