"""Their trainer under observation: the same weights as without us, and the numbers that they log themselves."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from sentence_transformers import SparseEncoder, SparseEncoderTrainer, SparseEncoderTrainingArguments
from sentence_transformers.sparse_encoder.losses import (
    CachedSpladeLoss,
    SparseMultipleNegativesRankingLoss,
    SpladeLoss,
)
from tiny_corpus import tiny_pairs, tiny_tokenizer
from tiny_models import tiny_model
from transformers import TrainerCallback, get_cosine_schedule_with_warmup

from headscale import api, bundled, results, trials
from headscale.calibration import Choice
from headscale.errors import UsageError
from headscale.interop.callback import HeadscaleCallback
from headscale.interop.schedule import TheirSchedule, learning_rates
from headscale.objective import Schedule
from headscale.rescaling import rescale_
from headscale.texts import builtin_pairs

LAMBDAS = {"document_regularizer_weight": 1e-2, "query_regularizer_weight": 3e-2}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: Any) -> Path:
    """A tiny BERT with dropout, as a checkpoint."""
    path: Path = tmp_path_factory.mktemp("model") / "tiny"
    tiny_model("bert", hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def encoder(directory: Path) -> SparseEncoder:
    return SparseEncoder(str(directory), device="cpu")


def data(negatives: int = 0) -> Dataset:
    pairs = tiny_pairs(48, negatives=negatives)
    hard = {f"negative_{i}": [p.negatives[i] for p in pairs] for i in range(negatives)}
    return Dataset.from_dict({"query": [p.query for p in pairs], "document": [p.document for p in pairs], **hard})


def arguments(folder: Path, **changes: Any) -> SparseEncoderTrainingArguments:
    usual = {
        "max_steps": 6, "per_device_train_batch_size": 8, "learning_rate": 1e-2, "warmup_steps": 2,
        "use_cpu": True, "report_to": "none", "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True,
        "max_grad_norm": 0.5,
    }  # fmt: skip
    return SparseEncoderTrainingArguments(output_dir=str(folder), **{**usual, **changes})


def splade_loss(model: SparseEncoder, kind: type = SpladeLoss, **changes: Any) -> Any:
    return kind(model, SparseMultipleNegativesRankingLoss(model), **{**LAMBDAS, **changes})


def trained(
    directory: Path, folder: Path, *, watched: bool = True, kind: type = SpladeLoss, negatives: int = 0,
    loss: dict[str, Any] | None = None, options: dict[str, Any] | None = None, **changes: Any,
) -> tuple[SparseEncoder, Any, HeadscaleCallback | None]:  # fmt: skip
    model = encoder(directory)
    found = splade_loss(model, kind, **(loss or {}))
    watch = HeadscaleCallback(found, **(options or {})) if watched else None
    trainer = SparseEncoderTrainer(
        model, arguments(folder, **changes), data(negatives), loss=found, callbacks=[watch] if watch else []
    )
    trainer.train()
    return model, trainer, watch


@pytest.mark.parametrize(
    ("kind", "loss", "changes"),
    [
        (SpladeLoss, {}, {}),
        (SpladeLoss, {"use_document_regularizer_only": True, "query_regularizer_weight": None}, {}),
        (CachedSpladeLoss, {"mini_batch_size": 3}, {}),
        (SpladeLoss, {}, {"gradient_accumulation_steps": 2, "bf16": True}),
    ],
)
def test_weights_are_bitwise_those_without_the_callback(
    directory: Path, tmp_path: Path, kind: type, loss: dict[str, Any], changes: dict[str, Any]
) -> None:
    plain, _, _ = trained(directory, tmp_path, watched=False, kind=kind, loss=loss, **changes)
    watched, _, watch = trained(directory, tmp_path, kind=kind, loss=loss, options={"run": tmp_path / "run"}, **changes)
    assert watch is not None
    assert len(watch.steps) == 6
    for name, value in plain.state_dict().items():
        assert torch.equal(value, watched.state_dict()[name]), name


@pytest.mark.parametrize("kind", [SpladeLoss, CachedSpladeLoss])
def test_records_agree_with_what_their_trainer_logs(directory: Path, tmp_path: Path, kind: type) -> None:
    _, trainer, watch = trained(directory, tmp_path, kind=kind, negatives=1)
    assert watch is not None
    rows = [row for row in trainer.state.log_history if "base_loss" in row]
    assert len(rows) == len(watch.steps) == 6
    for row, record in zip(rows, watch.steps, strict=True):
        assert record.step == row["step"] - 1
        expected = {
            "loss": row["loss"],
            "ranking_loss": row["base_loss"],
            "weighted_reg_document": row["document_regularizer_loss"],
            "weighted_reg_query": row["query_regularizer_loss"],
            "lr": row["learning_rate"],
            "grad_norm": row["grad_norm"],
            "lambda_document": LAMBDAS["document_regularizer_weight"] * min(1, record.step / 2) ** 2,  # a third of 6
            "lambda_query": LAMBDAS["query_regularizer_weight"] * min(1, record.step / 2) ** 2,
        }
        for name, value in expected.items():
            assert getattr(record, name) == pytest.approx(float(value), rel=2e-3, abs=1e-4), name
        # their contrastive loss has no temperature here, so it is ours over ln N; N counts the hard negatives
        assert record.loss_over_ln_n == pytest.approx(record.ranking_loss / math.log(16), rel=1e-5)
        assert math.hypot(record.grad_norm_head, record.grad_norm_encoder) == pytest.approx(record.grad_norm)
        assert record.clip_factor == pytest.approx(min(1.0, 0.5 / record.grad_norm), rel=1e-4)
    assert watch.steps[-1].regularizer_share > 0


def test_observations_are_those_of_the_vectors(directory: Path, tmp_path: Path) -> None:
    model = encoder(directory)
    loss = splade_loss(model)
    taken: list[list[torch.Tensor]] = []
    whole = loss.loss.compute_loss_from_embeddings

    def keep(embeddings: list[torch.Tensor], labels: Any) -> Any:
        taken.append([e.detach().double() for e in embeddings])
        return whole(embeddings, labels)

    loss.loss.compute_loss_from_embeddings = keep  # someone else's hook, to be left in place
    watch = HeadscaleCallback(loss)
    SparseEncoderTrainer(model, arguments(tmp_path), data(), loss=loss, callbacks=[watch]).train()
    assert loss.loss.compute_loss_from_embeddings is keep
    for (queries, documents), record in zip(taken, watch.steps, strict=True):
        scores = queries @ documents.T
        assert record.score_sd == pytest.approx(scores.std(correction=0).item(), rel=1e-5)
        assert record.active_dims_document == pytest.approx((documents > 0).sum(1).double().mean().item())
        assert record.reg_query == pytest.approx(queries.mean(0).square().sum().item(), rel=1e-5)
        units = documents / documents.norm(dim=1, keepdim=True)
        off = (units @ units.T)[~torch.eye(len(units), dtype=torch.bool)]
        assert record.cosine_document == pytest.approx(off.mean().item(), rel=1e-4)


def test_update_of_the_head_is_measured(directory: Path, tmp_path: Path) -> None:
    seen: list[torch.Tensor] = []

    class Keep(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            seen.append(given["model"][0].auto_model.cls.predictions.decoder.weight.detach().double().clone())

    model = encoder(directory)
    seen.append(model[0].auto_model.cls.predictions.decoder.weight.detach().double().clone())
    loss = splade_loss(model)
    watch = HeadscaleCallback(loss)
    SparseEncoderTrainer(model, arguments(tmp_path), data(), loss=loss, callbacks=[watch, Keep()]).train()
    for before, after, record in zip(seen, seen[1:], watch.steps, strict=False):
        assert record.update_ratio == pytest.approx(((after - before).norm() / before.norm()).item(), rel=1e-3)
        assert record.head_norm_drift == pytest.approx((after.norm() / seen[0].norm()).item(), rel=1e-5)


def test_head_has_its_own_learning_rate(directory: Path, tmp_path: Path) -> None:
    model = encoder(directory)
    rescale_(model[0].auto_model, 0.5)
    loss = splade_loss(model)
    watch = HeadscaleCallback(loss, run=tmp_path / "run")
    mapping = {r"decoder\.(weight|bias)$": 4e-2}
    SparseEncoderTrainer(
        model, arguments(tmp_path, learning_rate_mapping=mapping), data(), loss=loss, callbacks=[watch]
    ).train()
    assert [r.head_lr for r in watch.steps] == pytest.approx([4 * r.lr for r in watch.steps])
    assert watch.folder is not None
    cell = trials.read_trained(watch.folder)
    assert cell.run.config["head_lr_multiplier"] == pytest.approx(4)
    assert not cell.run.head_tied


def test_evaluation_in_between_is_not_observed(directory: Path, tmp_path: Path) -> None:
    weights = []
    for watched in (True, False):
        model = encoder(directory)
        loss = splade_loss(model)
        watch = HeadscaleCallback(loss)
        settings = arguments(tmp_path, eval_strategy="steps", eval_steps=1)
        callbacks = [watch] if watched else []
        SparseEncoderTrainer(model, settings, data(), data(), loss=loss, callbacks=callbacks).train()
        assert len(watch.steps) == (6 if watched else 0)
        weights.append(model[0].auto_model.cls.predictions.decoder.weight)
    assert torch.equal(*weights)


def test_nothing_is_left_behind(directory: Path, tmp_path: Path) -> None:
    model, trainer, _ = trained(directory, tmp_path)
    for module in (trainer.loss.loss, trainer.loss.document_regularizer, trainer.loss.query_regularizer):
        assert "compute_loss_from_embeddings" not in vars(module)
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_training_that_fails_is_kept_as_interrupted(directory: Path, tmp_path: Path) -> None:
    class Fail(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            if state.global_step == 3:
                raise RuntimeError("no more")

    model = encoder(directory)
    loss = splade_loss(model)
    watch = HeadscaleCallback(loss, run=tmp_path / "run")
    with pytest.raises(RuntimeError, match="no more"), watch:
        SparseEncoderTrainer(model, arguments(tmp_path), data(), loss=loss, callbacks=[watch, Fail()]).train()
    assert "compute_loss_from_embeddings" not in vars(loss.loss)
    assert watch.folder is not None
    cell = trials.read_trained(watch.folder)
    assert (cell.run.status, len(cell.run.steps)) == ("interrupted", 3)


def test_cell_is_a_trial_that_can_be_read_back(directory: Path, tmp_path: Path) -> None:
    _, _, watch = trained(directory, tmp_path, options={"run": tmp_path / "run", "name": "mine"})
    assert watch is not None
    assert watch.folder is not None
    cell = trials.read_trained(watch.folder)
    assert list(cell.run.steps) == watch.steps
    assert cell.verdict == watch.verdict
    assert cell.run.config["lambda_document"] == LAMBDAS["document_regularizer_weight"]
    assert cell.run.config["warmup_steps"] == 2
    assert cell.run.end.lr_sum_share == pytest.approx(1.0)
    found = results.load([tmp_path / "run"])
    assert [t.backbone for t in found.trainings] == ["mine"]


def test_another_constant_is_another_cell(directory: Path, tmp_path: Path) -> None:
    folders = set()
    for scale in (1.0, 0.5, 0.5):
        model = encoder(directory)
        rescale_(model[0].auto_model, scale)
        loss = splade_loss(model)
        watch = HeadscaleCallback(loss, run=tmp_path / "run")
        settings = arguments(tmp_path, max_steps=1)
        SparseEncoderTrainer(model, settings, data(), loss=loss, callbacks=[watch]).train()
        folders.add(watch.folder)
    assert len(folders) == 2


def test_the_cell_says_what_was_done_to_the_head_before(tmp_path: Path) -> None:
    from headscale.page.commands import commands_for
    from headscale.tables.recipes import is_untouched

    choice = Choice(match="constant", k=4, shift=True)
    written = tmp_path / "calibrated"
    found = api.calibrate("bundled:tiny-modernbert", reference="bundled:tiny-bert", choice=choice, save=written)
    _, _, watch = trained(written, tmp_path, options={"run": tmp_path / "run"}, max_steps=1)
    assert watch is not None
    (training,) = results.load([tmp_path / "run"]).trainings
    said = training.training
    assert (said["scale"], said["shift"], said["mode"]) == (0.25, found.shift, "untie")
    assert not is_untouched(training)
    assert commands_for(results.load([tmp_path / "run"]), tmp_path / "run") == ()  # it was not ours to ask for


def test_every_third_step(directory: Path, tmp_path: Path) -> None:
    _, _, every = trained(directory, tmp_path, max_steps=10)
    _, _, third = trained(directory, tmp_path, max_steps=10, options={"every": 3})
    assert every is not None
    assert third is not None
    assert [r.step for r in third.steps] == [0, 3, 6, 9]
    assert [r.loss for r in third.steps] == [r.loss for r in every.steps[::3]]
    assert third.verdict is not None
    assert 1 <= third.verdict.step <= 10


def test_their_schedule_is_ours_where_both_are_linear() -> None:
    ours = Schedule(total=100, warmup=10, ramp=33)
    theirs = TheirSchedule.of([ours.lr_factor(step) for step in range(100)])
    assert [theirs.lr_sum(n) for n in range(101)] == pytest.approx([ours.lr_sum(n) for n in range(101)])
    assert theirs.lr_sum() == pytest.approx(ours.lr_sum())
    third = TheirSchedule.of([ours.lr_factor(step) for step in range(100)], first=10, every=3)
    assert third.first == 12
    assert third.lr_sum(5) == pytest.approx(ours.lr_sum(12 + 5 * 3))  # up to the step that is observed next
    assert third.lr_sum() == pytest.approx(ours.lr_sum())
    assert third.steps_done(5) == 12 + 4 * 3 + 1


def test_schedule_that_is_not_linear_is_read_off_the_scheduler() -> None:
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))], lr=0.5)
    scheduler = get_cosine_schedule_with_warmup(optimizer, 4, 40)
    factors = learning_rates(scheduler, 40)
    for factor in factors:
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.5 * factor)
        optimizer.step()
        scheduler.step()
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
    assert learning_rates(plateau, 3) == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stop_on": {"colapsed"}}, "no verdict is called `colapsed`"),
        ({"every": 0}, "`every` must be at least 1"),
        ({"track": "paper"}, "no tracker is called `paper`"),
    ],
)
def test_options_that_cannot_be_taken(directory: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        HeadscaleCallback(splade_loss(encoder(directory)), **options)


def test_loss_without_regularizers_is_refused(directory: Path) -> None:
    with pytest.raises(UsageError, match="no ranking loss with regularizers"):
        HeadscaleCallback(SparseMultipleNegativesRankingLoss(encoder(directory)))


def docstrings(count: int = 400) -> Dataset:
    pairs = builtin_pairs("train", packages=("stdlib", "numpy"))[:count]
    return Dataset.from_dict({"query": [p.query for p in pairs], "document": [p.document for p in pairs]})


@pytest.mark.parametrize(("scale", "done"), [(None, False), (1 / 32, True)])
def test_failing_run_is_stopped_and_the_rescaled_one_finishes(tmp_path: Path, scale: float | None, done: bool) -> None:
    """12 steps of 16 pairs; the full-length one, 100 steps of 32, is the CI stage `examples`."""
    model = encoder(Path(bundled.path("bundled:tiny-modernbert")))
    model.max_seq_length = 48
    if scale is not None:
        rescale_(model[0].auto_model, scale)
    loss = SpladeLoss(model, SparseMultipleNegativesRankingLoss(model), 1e-3, 3e-3)
    watch = HeadscaleCallback(loss, stop_on={"collapsed", "diverged"})
    changes = {"max_steps": 12, "per_device_train_batch_size": 16, "learning_rate": 3e-4, "max_grad_norm": 1.0}
    SparseEncoderTrainer(model, arguments(tmp_path, **changes), docstrings(), loss=loss, callbacks=[watch]).train()
    assert watch.verdict is not None
    assert (len(watch.steps) == 12) is done, watch.verdict.evidence
    assert (watch.verdict.word in {"collapsed", "diverged"}) is not done


def test_folders_that_their_trainer_saves_can_be_inspected(directory: Path, tmp_path: Path) -> None:
    model, _, _ = trained(directory, tmp_path, watched=False)
    model.save_pretrained(str(tmp_path / "trained"))
    seen = api.inspect(str(tmp_path / "trained"), weights_only=True)
    weight = model[0].auto_model.cls.predictions.decoder.weight
    assert seen.weights.frobenius == pytest.approx(weight.double().norm().item(), rel=1e-6)
    assert seen.head.tied_to is not None


def test_a_calibrated_encoder_saved_and_trained_can_be_inspected(tmp_path: Path) -> None:
    """Calibrate writes it, sentence-transformers saves it anew; the constant and the untied head survive both."""
    source = "bundled:tiny-modernbert"
    choice = Choice(match="constant", k=32)
    found = api.calibrate(source, reference="bundled:tiny-bert", choice=choice, save=tmp_path / "calibrated")
    model = SparseEncoder(str(tmp_path / "calibrated"), device="cpu")
    model.save_pretrained(str(tmp_path / "saved"))
    before = api.inspect(source, weights_only=True).weights.frobenius
    assert found.scale is not None
    for folder in ("calibrated", "saved"):
        seen = api.inspect(str(tmp_path / folder), weights_only=True)
        assert seen.weights.frobenius == pytest.approx(found.scale * before, rel=1e-6)
        assert seen.head.tied_to is None
