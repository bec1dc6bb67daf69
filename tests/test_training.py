"""Training: what it leaves alone, what it repeats exactly, and that every number it reports is the true one."""

from __future__ import annotations

import itertools
import json
import math
import re
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_corpus import tiny_pairs, tiny_tokenizer
from tiny_models import tiny_model

import headscale.encoder
import headscale.memory
import headscale.trainer
from headscale.batches import batches, epoch_order
from headscale.device import choose_device
from headscale.encoder import SpladeEncoder
from headscale.errors import MemoryForecastError, NotFoundError, UnreadableError, UsageError
from headscale.head import load_head
from headscale.memory import forecast_memory
from headscale.observation import batch_statistics, cosine, score_statistics, side_statistics
from headscale.pooling import splade_pool
from headscale.ranking import chance_mrr, rank_metrics, worst_ranks
from headscale.records import SAMENESS_EXCLUDES
from headscale.steplog import StepLog, read_steps
from headscale.trainer import Trainer
from headscale.training import TrainingConfig, train

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
CONFIG = TrainingConfig(
    steps=3, batch_size=4, lr=1e-3, warmup_ratio=0.0, ramp_steps=2, query_length=12, document_length=16,
    device="cpu",
)  # fmt: skip


@pytest.fixture
def model():
    return tiny_model("bert", **NO_DROPOUT)


@pytest.fixture
def dropping():
    return tiny_model("bert", hidden_dropout_prob=0.3)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def pairs():
    return tiny_pairs(40, negatives=2)


def rows(run) -> list[dict]:
    return [{k: v for k, v in r.to_dict().items() if k not in SAMENESS_EXCLUDES} for r in run.steps]


def weights(model) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_same_weights(one, other, tolerance=0.0):
    largest = max(float((one[n] - other[n]).abs().max()) for n in one)
    assert one.keys() == other.keys()
    assert largest <= tolerance, f"largest difference {largest}"


# --- what is left alone, and what repeats ------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["untie", "fold", "logits", "none"])
def test_the_callers_model_and_torch_are_left_as_they_were(dropping, tokenizer, pairs, mode):
    before, state = weights(dropping), torch.get_rng_state()
    tied = dropping.cls.predictions.decoder.weight is dropping.bert.embeddings.word_embeddings.weight
    train(dropping, tokenizer, pairs, CONFIG.replace(mode=mode, scale=1.0 if mode == "none" else 0.25))
    assert_same_weights(before, weights(dropping))
    assert torch.equal(state, torch.get_rng_state())
    assert not dropping.training
    assert all(p.grad is None for p in dropping.parameters())
    assert tied == (dropping.cls.predictions.decoder.weight is dropping.bert.embeddings.word_embeddings.weight)


def test_same_seed_same_log_and_another_seed_another(dropping, tokenizer, pairs):
    config = CONFIG.replace(mode="untie", scale=0.5, negatives=1)
    one, two = (train(dropping, tokenizer, pairs, config, evaluation=pairs[:12]) for _ in range(2))
    assert rows(one) == rows(two)
    assert one.end == two.end
    assert rows(one) != rows(train(dropping, tokenizer, pairs, config.replace(seed=1)))


def test_a_trial_logs_the_first_steps_of_the_full_run(dropping, tokenizer, pairs):
    full = train(dropping, tokenizer, pairs, CONFIG.replace(steps=6, warmup_ratio=0.5, ramp_steps=None))
    trial = CONFIG.replace(steps=3, horizon=6, warmup_ratio=0.5, ramp_steps=None)
    assert rows(train(dropping, tokenizer, pairs, trial)) == rows(full)[:3]


def test_arms_of_one_seed_see_the_same_pairs_and_the_same_dropout(dropping, tokenizer, pairs):
    """A power of two changes no sign, so at step 0 the very same dims are active, dropout included."""
    arms = [
        train(dropping, tokenizer, pairs, CONFIG.replace(steps=1, mode="untie", scale=scale)).steps[0]
        for scale in (1.0, 0.125)
    ]
    for name in ("active_dims_query", "active_dims_document", "coverage", "saturation", "flops_cost"):
        assert getattr(arms[0], name) == getattr(arms[1], name), name
    assert arms[0].score_mean > arms[1].score_mean


def test_every_epoch_is_a_permutation_and_no_batch_repeats_a_pair(pairs):
    orders = [epoch_order(40, seed=3, epoch=epoch) for epoch in (0, 1)]
    assert orders[0] != orders[1]
    assert all(sorted(order) == list(range(40)) for order in orders)
    assert epoch_order(8, seed=0, epoch=0) == [3, 5, 7, 1, 2, 0, 4, 6]  # a change here changes every log
    seen = [b.queries for b in itertools.islice(batches(pairs, batch_size=16, seed=3), 4)]
    assert all(len(set(queries)) == 16 for queries in seen)
    assert seen[0] == tuple(pairs[i].query for i in orders[0][:16])
    assert seen[2] == tuple(pairs[i].query for i in orders[1][:16])


def test_negatives_and_teacher_scores_stay_beside_their_query(pairs):
    batch = next(batches(pairs, batch_size=4, negatives=2, seed=0))
    chosen = [pairs[i] for i in epoch_order(40, seed=0, epoch=0)[:4]]
    assert batch.documents[:4] == tuple(p.document for p in chosen)
    assert batch.documents[4:] == tuple(n for p in chosen for n in p.negatives)
    assert batch.teacher == tuple(p.scores for p in chosen)
    with pytest.raises(UsageError, match="fewer than 3 hard negatives"):
        next(batches(pairs, batch_size=4, negatives=3))
    with pytest.raises(UsageError, match="do not fill a batch of 41"):
        next(batches(pairs, batch_size=41))


# --- where the constant goes -------------------------------------------------------------------------------


def test_all_modes_start_alike_and_then_part(model, tokenizer, pairs):
    runs = {
        mode: train(model, tokenizer, pairs, CONFIG.replace(mode=mode, scale=0.25))
        for mode in ("untie", "fold", "logits")
    }
    first = [run.steps[0].loss for run in runs.values()]
    assert first == pytest.approx([first[0]] * 3, rel=1e-5)
    last = [run.steps[-1].loss for run in runs.values()]
    assert len({round(loss, 6) for loss in last}) == 3
    assert [run.head_tied for run in runs.values()] == [False, True, True]


def test_logits_mode_can_spare_the_bias(model, tokenizer, pairs):
    arms = [
        train(model, tokenizer, pairs, CONFIG.replace(steps=1, mode=mode, scale=0.25, scale_bias=False))
        for mode in ("untie", "logits")
    ]
    assert arms[0].steps[0].loss == pytest.approx(arms[1].steps[0].loss, rel=1e-5)
    whole = train(model, tokenizer, pairs, CONFIG.replace(steps=1, mode="logits", scale=0.25))
    assert whole.steps[0].active_dims_query != arms[1].steps[0].active_dims_query


def test_head_learning_rate_moves_the_untied_head_alone(model, tokenizer, pairs):
    moved = {}
    for multiplier in (1.0, 4.0):
        config = CONFIG.replace(steps=1, mode="untie", head_lr_multiplier=multiplier)
        trainer = Trainer(tiny_model("bert", **NO_DROPOUT), tokenizer, config)
        before = weights(trainer.model)
        record = trainer.step([next(batches(pairs, batch_size=4))])
        after = weights(trainer.model)
        moved[multiplier] = {name: float((after[name] - before[name]).norm()) for name in after}, record
    (plain, one), (fast, four) = moved[1.0], moved[4.0]
    assert four.update_ratio == pytest.approx(4 * one.update_ratio, rel=1e-3)
    assert four.head_lr == 4 * four.lr == 4 * one.head_lr
    for name in plain:
        live = name in ("cls.predictions.decoder.weight", "cls.predictions.decoder.bias")
        assert fast[name] == pytest.approx(plain[name] * (4 if live else 1), rel=1e-3), name


def test_head_learning_rate_of_a_tied_head_is_refused(model, tokenizer, pairs):
    with pytest.raises(UsageError, match="shares its matrix"):
        train(model, tokenizer, pairs, CONFIG.replace(head_lr_multiplier=4.0))


def test_weight_decay_spares_vectors_unless_asked(model, tokenizer):
    for asked in (False, True):
        config = CONFIG.replace(weight_decay=0.1, decay_vectors=asked, mode="untie")
        trainer = Trainer(tiny_model("bert"), tokenizer, config)
        decays = {id(p): g["weight_decay"] for g in trainer.optimizer.param_groups for p in g["params"]}
        for parameter in trainer.model.parameters():
            assert decays[id(parameter)] == (0.1 if parameter.dim() > 1 or asked else 0.0)


@pytest.mark.parametrize("model_type", ["modernbert", "roberta", "mobilebert", "distilbert", "electra", "mpnet"])
def test_other_model_types_train(model_type, tokenizer, pairs):
    trained = tiny_model(model_type)
    run = train(trained, tokenizer, pairs, CONFIG.replace(mode="untie", scale=0.25))
    assert run.status == "finished"
    assert run.steps[-1].non_finite == 0
    assert run.steps[1].update_ratio > 0
    assert run.steps[1].grad_norm_encoder > 0


# --- every number is the true one --------------------------------------------------------------------------


def plain_reps(model, tokenizer, texts, length) -> torch.Tensor:
    """SPLADE from the model's own logits."""
    batch = tokenizer(list(texts), padding=True, truncation=True, max_length=length, return_tensors="pt")
    logits = model(**batch).logits
    return (torch.log1p(torch.relu(logits)) * batch["attention_mask"][:, :, None]).amax(1)


@pytest.mark.parametrize("clip", [0.5, 1e6, None])
def test_losses_scores_and_gradients_of_the_first_step(model, tokenizer, pairs, clip):
    config = CONFIG.replace(steps=1, ramp_steps=0, negatives=2, clip=clip, temperature=0.7)
    record = train(model, tokenizer, pairs, config).steps[0]
    batch = next(batches(pairs, batch_size=4, negatives=2))
    queries = plain_reps(model, tokenizer, batch.queries, 12)
    documents = plain_reps(model, tokenizer, batch.documents, 16)
    scores = queries @ documents.T
    ranking = torch.nn.functional.cross_entropy(scores / 0.7, torch.arange(4))
    flops = [reps.mean(0).pow(2).sum() for reps in (queries, documents)]
    loss = ranking + 5e-5 * flops[0] + 1e-3 * flops[1]
    loss.backward()
    near = {"rel": 1e-4}
    assert record.loss == pytest.approx(loss.item(), **near)
    assert record.ranking_loss == pytest.approx(ranking.item(), **near)
    assert record.loss_over_ln_n == pytest.approx(ranking.item() / math.log(12), **near)
    assert record.reg_document == record.flops_reg_document == pytest.approx(flops[1].item(), **near)
    assert record.weighted_reg_query == pytest.approx(5e-5 * flops[0].item(), **near)
    regularizers = 5e-5 * flops[0].item() + 1e-3 * flops[1].item()
    assert record.regularizer_share == pytest.approx(regularizers / loss.item(), **near)
    assert record.score_sd == pytest.approx(np.std(scores.detach().numpy()), **near)
    head = {"cls.predictions.decoder.weight", "cls.predictions.bias", "bert.embeddings.word_embeddings.weight"}
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    of_head = math.sqrt(sum(g.square().sum().item() for n, g in gradients.items() if n in head))
    of_rest = math.sqrt(sum(g.square().sum().item() for n, g in gradients.items() if n not in head))
    assert record.grad_norm_head == pytest.approx(of_head, **near)
    assert record.grad_norm_encoder == pytest.approx(of_rest, **near)
    assert record.grad_norm == pytest.approx(math.hypot(of_head, of_rest), **near)
    assert record.clip_factor == pytest.approx(min(1.0, (clip or math.inf) / record.grad_norm), **near)


def test_learning_rate_and_lambdas_are_those_of_the_schedule_at_every_step(model, tokenizer, pairs):
    config = CONFIG.replace(steps=5, horizon=10, warmup_steps=2, ramp_steps=2, lambda_query=3.0)
    run = train(model, tokenizer, pairs, config)
    assert [record.step for record in run.steps] == [0, 1, 2, 3, 4]
    assert [record.lr for record in run.steps] == pytest.approx([0, 5e-4, 1e-3, 8.75e-4, 7.5e-4])
    assert [record.lambda_query for record in run.steps] == [0.0, 0.75, 3.0, 3.0, 3.0]
    assert [record.lambda_document for record in run.steps] == [0.0, 2.5e-4, 1e-3, 1e-3, 1e-3]
    assert [record.update_ratio > 0 for record in run.steps] == [False, True, True, True, True]
    for record in run.steps:
        assert record.weighted_reg_query == pytest.approx(record.lambda_query * record.reg_query)
        parts = record.ranking_loss + record.weighted_reg_query + record.weighted_reg_document
        assert record.loss == pytest.approx(parts, rel=1e-6)


def test_update_norm_and_drift_of_the_head(model, tokenizer, pairs):
    matrices = [model.cls.predictions.decoder.weight.detach().clone()]

    def keep(_record) -> None:
        matrices.append(model.cls.predictions.decoder.weight.detach().clone())

    config = CONFIG.replace(update_every=2)
    run = train(model, tokenizer, pairs, config, on_step=keep, inplace=True)
    for i, record in enumerate(run.steps):
        before, after = matrices[i], matrices[i + 1]
        assert record.head_norm == pytest.approx(float(after.norm()), rel=1e-5)
        assert record.head_norm_drift == pytest.approx(float(after.norm() / matrices[0].norm()), rel=1e-5)
        if i % 2:
            assert record.update_ratio is None
        else:
            assert record.update_ratio == pytest.approx(float((after - before).norm() / before.norm()), rel=1e-4)


def test_statistics_of_representations_text_by_text():
    source = torch.Generator().manual_seed(0)
    queries, documents = (torch.relu(torch.randn(n, 17, generator=source) - 0.5) for n in (5, 9))
    queries[2] = 0  # an empty text
    documents[:, 3] = 1.5  # a term that every document has
    queries[:, 3] = 0.5
    queries[2] = 0
    got = {name: value.item() for name, value in batch_statistics(queries, documents).items()}
    for side, table in (("query", queries.numpy()), ("document", documents.numpy())):
        active = [sum(v > 0 for v in row) for row in table]
        filled = [row / np.linalg.norm(row) for row in table if row.any()]
        cosines = [a @ b for a, b in itertools.combinations(filled, 2)]
        assert got[f"active_dims_{side}"] == pytest.approx(np.mean(active))
        assert got[f"empty_{side}"] == pytest.approx(np.mean([a == 0 for a in active]))
        assert got[f"mean_weight_{side}"] == pytest.approx(table.mean())
        assert got[f"max_weight_{side}"] == pytest.approx(table.max())
        assert got[f"mean_cosine_{side}"] == pytest.approx(np.mean(cosines), rel=1e-5)
    everything = np.concatenate([queries.numpy(), documents.numpy()]) > 0
    assert got["coverage"] == pytest.approx(everything.any(0).mean())
    assert got["saturation"] == pytest.approx(everything.all(0).mean())
    assert 0 < got["empty_query"] < 1
    queries[2, 3] = 0.1
    assert batch_statistics(queries, documents)["saturation"].item() > 0


def test_a_cosine_of_fewer_than_two_texts_is_undefined():
    table = torch.zeros(3, 5)
    table[1, 2] = 1.0
    assert cosine(table) is None
    table[0, 2] = 2.0
    assert cosine(table) == pytest.approx(1.0)
    assert math.isnan(side_statistics(torch.zeros(3, 5))["mean_cosine"].item())


def test_a_lost_text_is_not_an_empty_one():
    table = torch.rand(3, 5)
    table[1] = math.nan
    got = side_statistics(table)
    assert got["empty"].item() == 0.0
    assert math.isnan(got["mean_cosine"].item())
    assert math.isnan(got["max_weight"].item())


def test_all_texts_empty_is_observed_without_a_cosine(tokenizer, pairs):
    silent = tiny_model("bert", **NO_DROPOUT)
    with torch.no_grad():
        silent.cls.predictions.bias.fill_(-1e4)
    record = train(silent, tokenizer, pairs, CONFIG).steps[-1]
    assert (record.empty_query, record.empty_document, record.active_dims_query) == (1.0, 1.0, 0.0)
    assert (record.cosine_query, record.cosine_document) == (None, None)
    assert record.loss_over_ln_n == pytest.approx(1.0)
    assert record.batch_accuracy == record.grad_norm == 0.0
    assert record.non_finite == 0


def test_statistics_of_scores_query_by_query():
    scores = torch.tensor([[3.0, 1.0, 2.0], [5.0, 5.0, 1.0]])  # the second ties: not accurate
    got = {name: value.item() for name, value in score_statistics(scores, temperature=2.0).items()}
    table = scores.numpy() / 2.0
    loss = np.mean([np.log(np.exp(row).sum()) - row[i] for i, row in enumerate(table)])
    assert got["batch_accuracy"] == 0.5
    assert got["score_margin"] == pytest.approx(((3 - 1.5) + (5 - 3)) / 2)
    assert got["score_sd"] == pytest.approx(np.std([3, 1, 2, 5, 5, 1]))
    assert got["loss_over_ln_n"] == pytest.approx(loss / math.log(3))
    assert got["score_within_sd"] == pytest.approx(math.sqrt((np.var([3, 1, 2]) + np.var([5, 5, 1])) / 2))
    assert got["score_common"] < 1.0
    same = score_statistics(torch.tensor([[1.0, 2.0, 4.0], [11.0, 12.0, 14.0]]))  # both queries rank alike
    assert same["score_common"].item() == pytest.approx(1.0)
    assert score_statistics(torch.zeros(3, 3))["score_common"].item() == 1.0
    assert score_statistics(torch.full((4, 4), math.nan))["batch_accuracy"].item() == 0.0


# --- parts of a batch, several batches, half precision -----------------------------------------------------


@pytest.mark.parametrize("size", [1, 3, 64])
def test_a_batch_in_parts_has_the_gradients_of_the_whole(model, tokenizer, pairs, size):
    config = CONFIG.replace(negatives=2, ramp_steps=0, mode="untie")
    whole = train(model, tokenizer, pairs, config)
    parts = train(model, tokenizer, pairs, config.replace(micro_batch=size))
    for one, other in zip(whole.steps, parts.steps, strict=True):
        for name in ("loss", "grad_norm_head", "grad_norm_encoder", "active_dims_document"):
            assert getattr(other, name) == pytest.approx(getattr(one, name), rel=2e-4), name


def test_the_second_pass_plays_the_same_dropout_again(dropping, tokenizer, pairs, monkeypatch):
    trainer = Trainer(dropping, tokenizer, CONFIG.replace(micro_batch=2))
    seen = []
    pool = SpladeEncoder.pool

    def noted(self, tokens):
        seen.append((tokens, pool(self, tokens)))
        return seen[-1][1]

    monkeypatch.setattr(SpladeEncoder, "pool", noted)
    trainer.step([next(batches(pairs, batch_size=4))])
    first, again = seen[:4], seen[4:]
    assert [rep.requires_grad for _, rep in first] == [False] * 4
    assert [rep.requires_grad for _, rep in again] == [True] * 4
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(first, again, strict=True))


def test_dropout_is_on_in_training(dropping, tokenizer, pairs):
    without = train(tiny_model("bert", **NO_DROPOUT), tokenizer, pairs, CONFIG.replace(steps=1))
    assert train(dropping, tokenizer, pairs, CONFIG.replace(steps=1)).steps[0].loss != without.steps[0].loss


def test_accumulation_averages_batches(tokenizer, pairs):
    stream = batches(pairs, batch_size=4)
    first, second = next(stream), next(stream)
    gradients = []
    for parts in ([first], [second], [first, second]):
        trainer = Trainer(tiny_model("bert", **NO_DROPOUT), tokenizer, CONFIG)
        for part in parts:
            trainer._backward(part, (1e-2, 1e-2), 1 / len(parts))
        gradients.append(torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None]))
    torch.testing.assert_close(gradients[2], (gradients[0] + gradients[1]) / 2, rtol=1e-4, atol=1e-5)
    record = Trainer(tiny_model("bert", **NO_DROPOUT), tokenizer, CONFIG).step([first, second])
    one, two = (Trainer(tiny_model("bert", **NO_DROPOUT), tokenizer, CONFIG).step([part]) for part in (first, second))
    assert record.loss == pytest.approx((one.loss + two.loss) / 2, rel=1e-5)
    assert record.max_weight_query == max(one.max_weight_query, two.max_weight_query)
    assert record.grad_norm == pytest.approx(float(gradients[2].norm()), rel=0.1)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_follows_fp32(model, tokenizer, pairs, precision):
    exact = train(model, tokenizer, pairs, CONFIG.replace(mode="untie", scale=0.125))
    config = CONFIG.replace(mode="untie", scale=0.125, precision=precision)
    half = train(model, tokenizer, pairs, config)
    for one, other in zip(exact.steps, half.steps, strict=True):
        assert other.loss == pytest.approx(one.loss, rel=0.1)
        assert other.loss != one.loss
    scales = [record.loss_scale for record in half.steps]
    assert scales[0] == (65536.0 if precision == "fp16" else None)


def test_a_score_beyond_half_precision_is_skipped_counted_and_lowers_the_scale(model, tokenizer, pairs):
    with torch.no_grad():
        model.cls.predictions.decoder.weight.mul_(30.0)
    config = CONFIG.replace(mode="logits", scale=1e6, precision="fp16")
    before = weights(model)
    run = train(model, tokenizer, pairs, config, inplace=True)
    assert run.status == "finished"
    assert all(record.skipped for record in run.steps)
    assert run.end.skipped_steps == run.end.non_finite_steps == 3
    assert [record.loss_scale for record in run.steps] == [65536.0, 32768.0, 16384.0]
    assert_same_weights(before, weights(model))


# --- how a run ends ----------------------------------------------------------------------------------------


def test_a_run_whose_weights_are_lost_says_so_and_logs_valid_json(model, tokenizer, pairs, tmp_path):
    path = tmp_path / "cell" / "steps.jsonl"
    with StepLog(path) as log:
        run = train(model, tokenizer, pairs, CONFIG.replace(steps=20, lr=1e25), on_step=log)
    assert run.status == "non-finite"
    assert len(run.steps) < 20
    assert not math.isfinite(run.steps[-1].loss)
    records = read_steps(path)
    assert len(records) == len(run.steps)
    assert records[-1]["loss"] is None
    numbers = [v for k, v in vars(run.steps[-1]).items() if k != "non_finite"]
    count = sum(isinstance(v, float) and not math.isfinite(v) for v in numbers)
    assert records[-1]["non_finite"] == count > 0
    json.dumps(run.to_dict(), allow_nan=False)


def test_ctrl_c_leaves_what_there_is(model, tokenizer, pairs, tmp_path):
    path = tmp_path / "steps.jsonl"

    def interrupt(record) -> None:
        log(record)
        if record.step == 1:
            raise KeyboardInterrupt

    with StepLog(path) as log:
        run = train(model, tokenizer, pairs, CONFIG, on_step=interrupt, evaluation=pairs)
    assert run.status == "interrupted"
    assert len(run.steps) == run.end.steps == 2
    assert run.end.ranking is None
    assert [record["step"] for record in read_steps(path)] == [0, 1]


def test_the_caller_can_stop_early(model, tokenizer, pairs):
    run = train(model, tokenizer, pairs, CONFIG, on_step=lambda record: record.step == 1)
    assert (run.status, len(run.steps)) == ("stopped", 2)
    assert run.end.lr_sum_share == pytest.approx((1 + 2 / 3) / 2)


def test_the_end_in_numbers(model, tokenizer, pairs):
    run = train(model, tokenizer, pairs, CONFIG.replace(steps=20, horizon=40), evaluation=pairs)
    assert run.end.tail_steps == 2
    last = run.steps[-2:]
    assert run.end.tail["active_dims_query"] == pytest.approx(sum(r.active_dims_query for r in last) / 2)
    assert run.end.lr_sum == pytest.approx(sum(record.lr for record in run.steps))
    assert run.end.ranking.candidates == len(pairs)
    assert run.candidates == 4
    assert run.head_parameters + run.encoder_parameters == sum(p.numel() for p in model.parameters())


def test_a_step_is_on_disk_before_the_next_begins(model, tokenizer, pairs, tmp_path):
    path = tmp_path / "steps.jsonl"
    lengths = []

    def look(record) -> None:
        log(record)
        lengths.append(len(path.read_text().splitlines()))

    with StepLog(path) as log:
        train(model, tokenizer, pairs, CONFIG, on_step=look)
    assert lengths == [1, 2, 3]


def test_reading_a_log_forgives_only_an_unfinished_last_line(model, tokenizer, pairs, tmp_path):
    path = tmp_path / "steps.jsonl"
    with StepLog(path) as log:
        run = train(model, tokenizer, pairs, CONFIG, on_step=log)
    assert read_steps(path) == [record.to_dict() for record in run.steps]
    text = path.read_text()
    path.write_text(text + text[:40])
    assert len(read_steps(path)) == 3
    path.write_text(text.replace('"loss"', '"cost"', 1))
    with pytest.raises(UnreadableError, match="line 1 of"):
        read_steps(path)
    with pytest.raises(NotFoundError):
        read_steps(tmp_path / "none.jsonl")


def full_above(texts, monkeypatch):
    """Let the pooling fail as CUDA's allocator does, for more than so many texts at once."""
    pool = splade_pool

    def small(hidden, *args, **kwargs):
        if len(hidden) > texts:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return pool(hidden, *args, **kwargs)

    monkeypatch.setattr(headscale.encoder, "splade_pool", small)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_where_memory_runs_short_the_batch_is_taken_in_parts(tokenizer, pairs, monkeypatch, dropout):
    """The log is that of parts of this size from the start; said once, recorded, and no recipe is changed."""
    full_above(5, monkeypatch)
    model = tiny_model("bert", hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
    config = CONFIG.replace(batch_size=6, negatives=1, accumulation=2)
    said = []
    halved = train(model, tokenizer, pairs, config, tell=said.append)
    assert (halved.status, halved.texts_at_once, halved.config["micro_batch"]) == ("finished", 3, None)
    assert [s for s in said if "taking 3 texts" in s] == said[1:]
    parts = train(model, tokenizer, pairs, config.replace(micro_batch=3))
    assert parts.texts_at_once is None
    assert rows(halved) == rows(parts)
    monkeypatch.undo()
    if not dropout:
        whole = train(model, tokenizer, pairs, config)
        for one, other in zip(whole.steps, halved.steps, strict=True):
            assert other.loss == pytest.approx(one.loss, rel=2e-4)
            assert other.grad_norm == pytest.approx(one.grad_norm, rel=2e-4)


def test_memory_that_runs_short_midway_leaves_the_steps_before_it(model, tokenizer, pairs, monkeypatch):
    undisturbed = train(model, tokenizer, pairs, CONFIG.replace(steps=6))

    def tighten(record):
        if record.step == 2:
            full_above(2, monkeypatch)

    run = train(model, tokenizer, pairs, CONFIG.replace(steps=6), on_step=tighten)
    assert rows(run)[:3] == rows(undisturbed)[:3]
    assert run.texts_at_once == 2
    for one, other in zip(undisturbed.steps, run.steps, strict=True):
        assert other.loss == pytest.approx(one.loss, rel=2e-4)


def test_the_batch_that_did_not_fit_is_let_go_before_parts_are_tried(model, tokenizer, pairs, monkeypatch):
    held = []
    ranked = headscale.trainer.ranking_loss

    def full_once(loss, queries, documents, *args, **kwargs):
        if not held:
            held.append(weakref.ref(queries))
            raise torch.OutOfMemoryError("CUDA out of memory")
        assert held[0]() is None
        return ranked(loss, queries, documents, *args, **kwargs)

    monkeypatch.setattr(headscale.trainer, "ranking_loss", full_once)
    trainer = Trainer(model, tokenizer, CONFIG)
    trainer.step([next(batches(pairs, batch_size=4))])
    assert trainer.texts_at_once == 2


def test_out_of_memory_in_every_part_says_that_nothing_fits(model, tokenizer, pairs, monkeypatch):
    def full(*_args, **_kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(headscale.encoder, "splade_pool", full)
    with pytest.raises(MemoryForecastError, match=r"4 queries and 4 documents .* not even one text at a time"):
        Trainer(model, tokenizer, CONFIG).step([next(batches(pairs, batch_size=4))])


def test_other_errors_are_no_shortage_of_memory(model, tokenizer, pairs, monkeypatch):
    monkeypatch.setattr(headscale.encoder, "splade_pool", lambda *_a, **_k: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="size"):
        Trainer(model, tokenizer, CONFIG).step([next(batches(pairs, batch_size=4))])


LIMITED = """
import json, resource, sys, torch
sys.path[:0] = sys.argv[1:]
from tiny_corpus import tiny_pairs, tiny_tokenizer
from headscale.records import SAMENESS_EXCLUDES
from headscale.training import TrainingConfig, train
from transformers import BertConfig, BertForMaskedLM
torch.set_num_threads(1)
torch.manual_seed(0)
model = BertForMaskedLM(BertConfig(vocab_size=9000, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
    intermediate_size=4096, max_position_embeddings=520, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
words = [f"w{i}" for i in range(400)]
pairs = [type(p)(p.query, " ".join(words[j:] + words[:j])) for j, p in enumerate(tiny_pairs(40, vocab=9000))]
config = TrainingConfig(steps=2, batch_size=32, query_length=16, document_length=400, warmup_ratio=0.0, mode="untie",
    scale=0.5, device="cpu", lr=1e-3)
free = lambda: int(next(l for l in open("/proc/self/status") if l.startswith("VmSize")).split()[1]) * 1024
def rows(run):
    return [{k: v for k, v in r.to_dict().items() if k not in SAMENESS_EXCLUDES} for r in run.steps]
parts = train(model, tiny_tokenizer(9000), pairs, config.replace(micro_batch=8))
before = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (free() + 420 * 2**20, before[1]))
said = []
import headscale.memory
headscale.memory.available_memory = lambda: None  # what a process may take is not what the machine has
tight = train(model, tiny_tokenizer(9000), pairs, config, tell=said.append)
resource.setrlimit(resource.RLIMIT_AS, before)
whole = train(model, tiny_tokenizer(9000), pairs, config)
print(json.dumps([tight.texts_at_once, said, rows(tight), rows(parts), rows(whole)]))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="limits its own address space")
def test_an_allocation_that_truly_fails_halves_too():
    """Under a limit of the address space; the halved log is near that of the whole batch."""
    here = Path(__file__).parent
    command = [sys.executable, "-c", LIMITED, str(here), str(here.parent)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    size, said, tight, parts, whole = json.loads(done.stdout)
    assert size in (1, 2, 4, 8, 16)
    assert said
    assert size != 8 or tight == parts
    for one, other in zip(whole, tight, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=2e-4)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=2e-3)


def test_a_step_that_would_not_fit_in_a_cpu_is_refused_before_it_starts(model, tokenizer, pairs, monkeypatch):
    config = CONFIG.replace(batch_size=16, negatives=2)
    steps = []
    parameters = list(model.parameters())
    encoder = SpladeEncoder(load_head(model), tokenizer)
    longest = max((pair.document for pair in pairs), key=len)
    forecast = forecast_memory(encoder, (pairs[0].query, 12), (longest, 16), parameters, [])
    whole, parts = forecast.needed(16, 48), forecast.needed(16, 48, 4)
    monkeypatch.setattr(headscale.memory, "available_memory", lambda: (whole + parts) // 2)
    with pytest.raises(MemoryForecastError, match="16 queries and 48 documents") as caught:
        train(model, tokenizer, pairs, config, on_step=steps.append)
    assert steps == []
    size = int(re.search(r"`micro_batch` (\d+)", caught.value.hint)[1])
    assert 4 <= size < 48
    assert train(model, tokenizer, pairs, config.replace(micro_batch=size)).status == "finished"
    monkeypatch.setattr(headscale.memory, "available_memory", lambda: 1000)
    with pytest.raises(MemoryForecastError) as caught:
        train(model, tokenizer, pairs, config)
    assert "smaller model" in caught.value.hint


MEASURE = """
import sys, torch
sys.path[:0] = sys.argv[1:]
from tiny_corpus import tiny_pairs, tiny_tokenizer
from headscale.batches import batches
from headscale.memory import forecast_memory
from headscale.trainer import Trainer
from headscale.training import TrainingConfig
from transformers import BertConfig, BertForMaskedLM
model = BertForMaskedLM(BertConfig(vocab_size=9000, hidden_size=128, num_hidden_layers=3, num_attention_heads=4,
    intermediate_size=512, max_position_embeddings=64))
config = TrainingConfig(steps=2, batch_size=48, query_length=16, document_length=16, warmup_ratio=0.0, mode="untie")
pairs = tiny_pairs(96, vocab=9000)
trainer = Trainer(model, tiny_tokenizer(9000), config)
longest = max((pair.document for pair in pairs), key=len)
parameters = [*trainer.head_parameters, *trainer.encoder_parameters]
forecast = forecast_memory(trainer.encoder, (pairs[0].query, 16), (longest, 16), parameters, trainer.matrices)
resident = next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmRSS"))
for batch in list(zip(range(2), batches(pairs, batch_size=48))):
    trainer.step([batch[1]])
grown = next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmHWM")) - resident
print(forecast.needed(48, 48) / (1024 * grown))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the resident set from /proc")
def test_the_forecast_is_near_what_a_step_then_takes():
    here = Path(__file__).parent
    command = [sys.executable, "-c", MEASURE, str(here), str(here.parent)]
    ratio = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert 0.7 < ratio < 1.6


# --- losses that need more than pairs, special tokens, devices ---------------------------------------------


@pytest.mark.parametrize("loss", ["infonce", "margin-mse", "kl"])
def test_every_loss_goes_down_on_the_batch_it_is_trained_on(model, tokenizer, pairs, loss):
    config = CONFIG.replace(
        steps=25, loss=loss, negatives=2, mode="untie", scale=0.125, lambda_query=0.0, lambda_document=0.0,
    )  # fmt: skip
    run = train(model, tokenizer, pairs[:4], config)
    assert run.steps[-1].loss < 0.7 * run.steps[0].loss, [record.loss for record in run.steps]


def test_distillation_needs_teacher_scores(model, tokenizer):
    bare = [type(p)(p.query, p.document, p.negatives) for p in tiny_pairs(8, negatives=1)]
    with pytest.raises(UsageError, match="teacher scores"):
        train(model, tokenizer, bare, CONFIG.replace(loss="kl", negatives=1))


def test_masked_special_tokens_take_no_part_in_the_maximum(model, tokenizer):
    texts = ["w1 w2 w3", "w4"]
    head = load_head(model)
    encoder = SpladeEncoder(head, tokenizer, mask_special_tokens=True)
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    logits = model(**batch).logits.detach()
    for i, length in enumerate((3, 1)):
        inside = torch.log1p(torch.relu(logits[i, 1 : 1 + length])).amax(0)
        torch.testing.assert_close(encoder(texts, 12)[i].detach(), inside, rtol=1e-4, atol=1e-5)


def test_encoding_keeps_order_and_mode_whatever_the_batch(dropping, tokenizer, pairs):
    encoder = SpladeEncoder(load_head(dropping), tokenizer)
    dropping.train()
    documents = [pair.document for pair in pairs[:10]]
    one, many = (encoder.encode(documents, max_length=16, batch_size=size) for size in (3, 64))
    assert dropping.training
    torch.testing.assert_close(one, many, rtol=1e-4, atol=1e-5)
    dropping.eval()
    expected = plain_reps(dropping, tokenizer, documents, 16).detach()
    torch.testing.assert_close(one, expected, rtol=1e-4, atol=1e-5)


def test_a_device_or_precision_that_is_not_there_is_refused():
    for name in ("cuda:7", "abacus", "xpu"):
        with pytest.raises(UsageError, match=name):
            choose_device(name)
    choice = choose_device("auto")
    assert choice.name in ("cpu", "cuda", "mps")
    assert len(choice.reason) > 10


# --- ranking -----------------------------------------------------------------------------------------------


def test_ranks_count_ties_and_nan_against_us():
    documents = torch.eye(4)
    queries = torch.tensor([[1.0, 0, 0, 0], [0, 1, 1, 0], [1, 1, 0.5, 1], [math.nan, 0, 0, 1]])
    assert worst_ranks(queries, documents).tolist() == [1, 2, 4, 4]
    assert worst_ranks(torch.zeros(3, 4), documents, block=2).tolist() == [4, 4, 4]


def test_rank_metrics_against_sorting():
    source = torch.Generator().manual_seed(0)
    queries, documents = torch.rand(30, 9, generator=source), torch.rand(50, 9, generator=source)
    metrics = rank_metrics(queries, documents)
    ranks = []
    for i, query in enumerate(queries.numpy()):
        scores = documents.numpy() @ query
        ranks.append(1 + list(np.argsort(-scores)).index(i))
    assert metrics.mrr_at_10 == pytest.approx(np.mean([1 / r if r <= 10 else 0 for r in ranks]))
    assert metrics.mean_rank == pytest.approx(np.mean(ranks))
    assert metrics.recall_at_1 == pytest.approx(np.mean([r == 1 for r in ranks]))
    assert (metrics.queries, metrics.candidates) == (30, 50)


@pytest.mark.parametrize("candidates", [3, 12])
def test_chance_is_the_mean_over_all_ranks(candidates):
    expected = np.mean([1 / rank if rank <= 10 else 0 for rank in range(1, candidates + 1)])
    assert chance_mrr(candidates) == pytest.approx(expected)
    small = rank_metrics(torch.eye(candidates), torch.eye(candidates))
    assert small.mrr_at_10 == (None if candidates < 10 else 1.0)


# --- the point of it all -----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_head_scaled_up_collapses_and_scaled_down_trains(seed):
    """The claim of arXiv 2606.18811 on a toy, with its signature: ln N, chance, all texts alike."""
    vocab = 300
    model = tiny_model("bert", vocab_size=vocab, seed=seed, **NO_DROPOUT)
    tokenizer, pairs = tiny_tokenizer(vocab), tiny_pairs(400, vocab=vocab)
    config = TrainingConfig(
        steps=60, batch_size=16, lr=3e-3, query_length=8, document_length=20, mode="untie", device="cpu",
        lambda_query=3e-3, lambda_document=1e-3, seed=seed,
    )  # fmt: skip
    loud, quiet = (
        train(model, tokenizer, pairs, config.replace(scale=scale), evaluation=pairs[:200]) for scale in (4.0, 0.25)
    )
    collapsed, trained = loud.end.tail, quiet.end.tail
    assert collapsed["loss_over_ln_n"] == pytest.approx(1.0, abs=0.01)
    assert collapsed["batch_accuracy"] < 0.15  # chance is 1/16
    assert collapsed["cosine_document"] > 0.99
    assert loud.end.ranking.mrr_at_10 < 3 * loud.end.ranking.chance_mrr_at_10
    assert trained["loss_over_ln_n"] < 0.6
    assert trained["batch_accuracy"] > 0.4
    assert quiet.end.ranking.mrr_at_10 > 0.25
