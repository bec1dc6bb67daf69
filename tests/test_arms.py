"""`headscale.trial`: the same results however a backbone and its texts are given, and nothing left behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_checkpoint, tiny_model, tiny_tokenizer

import headscale
from headscale import Pair, Plan
from headscale.errors import UsageError
from headscale.training import TrainingConfig

TRAINING = TrainingConfig(
    steps=3, batch_size=4, lr=1e-3, query_length=12, document_length=16, device="cpu"
)  # fmt: skip
PLAN = Plan(TRAINING, scale=0.25, seeds=2, stop_early=False)
PAIRS = [Pair(f"w{5 + i} w{40 + i}", f"w{40 + i} w{60 + i % 30} w{5 + i} w{7 + i % 11}") for i in range(32)]


@pytest.fixture
def backbone(tmp_path: Path) -> str:
    return str(tiny_checkpoint("bert", tmp_path / "backbone"))


def losses(results: Any) -> list[list[list[float]]]:
    return [[[step.loss for step in cell.run.steps] for cell in result.cells] for result in results]


def test_a_loaded_model_gives_what_its_directory_gives_and_stays_as_it_was(
    tmp_path: Path, backbone: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = tiny_model("bert")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    seen: list[int] = []
    held = headscale.trial(
        model, tiny_tokenizer(), plan=PLAN, pairs=PAIRS, on_step=lambda record, verdict: seen.append(record.step)
    )
    Path("pairs.tsv").write_text("".join(f"{p.query}\t{p.document}\n" for p in PAIRS))
    kept = headscale.trial(backbone, plan=PLAN, pairs="pairs.tsv", run="runs")
    assert losses(held) == losses(kept)
    assert [r.arm for r in held] == ["given", "untouched"]
    assert [(r.scale, r.mode, len(r.cells)) for r in kept] == [(0.25, "untie", 2), (1.0, "none", 2)]
    assert held[0].cells[0].run.end.ranking is None
    assert seen == [0, 1, 2] * 4
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert sorted(p.name for p in Path().iterdir()) == ["backbone", "pairs.tsv", "runs"]
    assert len(list(Path("runs").iterdir())) == 4


def test_finished_trainings_are_read_back_and_other_weights_are_another_trial(tmp_path: Path) -> None:
    def tried(seed: int) -> tuple[Any, list[str]]:
        said: list[str] = []
        model = tiny_model("bert", seed=seed)
        loading = headscale.Loading(tell=said.append)
        plan = Plan(TRAINING, scale=0.25, control=False)
        found = headscale.trial(
            model, tiny_tokenizer(), plan=plan, pairs=PAIRS, test_pairs=PAIRS[:12], run=tmp_path, loading=loading
        )
        return found, [s for s in said if "reusing" in s]

    first, said = tried(0)
    assert said == []
    again, said = tried(0)
    assert again == first
    assert len(said) == 1
    other, said = tried(1)
    assert said == []
    assert losses(other) != losses(first)
    assert first[0].cells[0].run.end.ranking.queries == 12


def test_auto_takes_the_calibrated_pair_and_says_so(backbone: str) -> None:
    said: list[str] = []
    plan = Plan(TRAINING, reference=backbone)
    judged, control = headscale.trial(
        backbone, plan=plan, pairs=PAIRS, loading=headscale.Loading(tell=said.append)
    )  # fmt: skip
    chosen = headscale.calibrate(backbone, reference=backbone, pairs=PAIRS, encoding=headscale.Encoding(12, 16, 32))
    assert (judged.arm, judged.scale, judged.head_lr_multiplier) == (
        "calibrated", chosen.scale, chosen.head_lr_multiplier
    )  # fmt: skip
    assert (control.arm, control.scale) == ("untouched", 1.0)
    assert any(s.startswith(f"the constant is {chosen.scale:g}") for s in said)


def test_a_recipe_by_name_takes_the_negatives_that_there_are(backbone: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from headscale import arms

    asked: list[Plan] = []
    monkeypatch.setattr(arms, "run_trial", lambda _name, plan, *_a, **_k: asked.append(plan))
    headscale.trial(backbone, pairs=PAIRS)
    headscale.trial(backbone, pairs=[Pair(p.query, p.document, ("w9",)) for p in PAIRS])
    assert [plan.training.negatives for plan in asked] == [0, 1]
    assert asked[0].training.horizon == headscale.planned("st-mnrl", {}).horizon


def test_a_plan_refuses_what_it_cannot_take() -> None:
    with pytest.raises(UsageError, match="none of untie, fold, logits"):
        Plan(TRAINING, mode="magic")
    with pytest.raises(UsageError, match="`seeds` must be positive"):
        Plan(TRAINING, seeds=0)
