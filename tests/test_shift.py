"""A shift of every logit before the scale: the same in the weights and in forward, and through a whole training."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
from tiny_models import tiny_model, tiny_tokenizer

from headscale.arms import Plan
from headscale.errors import UnsupportedHeadError, UsageError
from headscale.ranking import rank_metrics
from headscale.recipes import TrainingConfig
from headscale.rescaling import rescale_
from headscale.texts import Pair
from headscale.training import train
from headscale.trials import ranking_of

torch = pytest.importorskip("torch")

STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
PAIRS = [Pair(f"t{i} t{i + 1}", f"t{i} t{i + 7} t{i + 1} t{2 * i}") for i in range(5, 17)]
CONFIG = TrainingConfig(steps=2, batch_size=4, lr=1e-3, query_length=8, document_length=12, device="cpu")


def logits_of(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits.double()


@pytest.mark.parametrize("mode", ["untie", "fold"])
@pytest.mark.parametrize("scale_bias", [True, False])
@pytest.mark.parametrize("kind", ["bert", "modernbert"])
def test_the_weights_hold_what_the_formula_says(kind: str, mode: str, scale_bias: bool) -> None:
    model = tiny_model(kind)
    with torch.no_grad():
        model.get_output_embeddings().bias.uniform_(-1, 1)
    ids = torch.arange(5, 29).view(2, 12)
    before, bias = logits_of(model, ids), model.get_output_embeddings().bias.detach().double().clone()
    changed = copy.deepcopy(model)
    rescale_(changed, 0.25, mode=mode, scale_bias=scale_bias, shift=-1.5)
    expected = 0.25 * (before - 1.5) if scale_bias else 0.25 * (before - bias - 1.5) + bias
    after = logits_of(changed, ids)
    assert (after - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_a_head_without_a_bias_is_refused() -> None:
    with pytest.raises(UnsupportedHeadError, match="no bias in its head to shift"):
        rescale_(tiny_model("modernbert", decoder_bias=False), 1.0, shift=-1.0)


@pytest.mark.parametrize("scale_bias", [True, False])
def test_in_forward_it_starts_as_in_the_weights(scale_bias: bool) -> None:
    model, tokenizer = tiny_model("bert", **STILL), tiny_tokenizer()
    with torch.no_grad():
        model.cls.predictions.bias.uniform_(0, 1)
    logs = []
    for mode in ("untie", "logits"):
        config = CONFIG.replace(mode=mode, scale=0.5, shift=-0.1, scale_bias=scale_bias)
        trained = copy.deepcopy(model)
        run = train(trained, tokenizer, PAIRS, config, inplace=True)
        logs.append((run.steps[0], ranking_of(trained, tokenizer, config, PAIRS)))
    plain = train(model, tokenizer, PAIRS, CONFIG.replace(mode="untie", scale=0.5, scale_bias=scale_bias)).steps[0]
    (untied, _), (forward, ranked) = logs
    assert forward.loss_over_ln_n == pytest.approx(untied.loss_over_ln_n, rel=1e-5)
    assert forward.active_dims_document == untied.active_dims_document < plain.active_dims_document
    assert ranked is not None


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(UsageError, match="`shift` must be 0"):
        CONFIG.replace(shift=-1.0)
    with pytest.raises(UsageError, match="`shift` must be finite"):
        CONFIG.replace(mode="untie", shift=math.nan)


def test_only_the_judged_arm_is_shifted() -> None:
    judged, control = Plan(CONFIG, scale=0.5, shift=-2.0).arms(None)
    assert (judged.training.shift, control.training.shift) == (-2.0, 0.0)
    assert [arm.training.shift for arm in Plan(CONFIG, scale=0.5).arms(None)] == [0.0, 0.0]


def test_ndcg_of_one_relevant_document_counts_ties_against_us() -> None:
    """Against the gain written out: rank 1, a tie of two (rank 2), and one beyond the cut-off."""
    queries = torch.eye(12)[:3]
    documents = torch.zeros(12, 12)
    documents[0, 0] = 1.0
    documents[[1, 5], 1] = 1.0
    documents[3:, 2] = 1.0
    found = rank_metrics(queries, documents)
    gains = [1.0, 1 / np.log2(3), 0.0]
    assert found.ndcg_at_10 == pytest.approx(np.mean(gains))
    assert found.mrr_at_10 == pytest.approx(np.mean([1.0, 0.5, 0.0]))
    assert rank_metrics(queries, documents[:9]).ndcg_at_10 is None
