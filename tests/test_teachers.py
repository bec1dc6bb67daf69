"""Trials on files with a teacher's scores, through the command line, and the models they leave."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_corpus import tiny_pairs
from tiny_models import tiny_checkpoint

torch = pytest.importorskip("torch")

from headscale import arms  # noqa: E402
from headscale.cli import run  # noqa: E402
from headscale.errors import UsageError  # noqa: E402
from headscale.trials import TextSource, negatives_of  # noqa: E402

COMMON = ["--steps", "3", "--compressed", "--batch-size", "4", "--query-length", "8", "--document-length", "16",
          "--scale", "0.5", "--no-control", "--candidates", "0", "--full-length", "--json", "--lr", "1e-3"]  # fmt: skip


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: Any) -> Path:
    return Path(tiny_checkpoint("bert", tmp_path_factory.mktemp("tiny") / "bert"))


def written(folder: Path, *, scores: bool = True, factor: float = 1.0) -> str:
    rows = [
        {"query": p.query, "positive": p.document, "negatives": p.negatives}
        | ({"scores": [factor * s for s in p.scores]} if scores else {})
        for p in tiny_pairs(24, negatives=2)
    ]
    file = folder / f"pairs-{scores}-{factor}.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    return str(file)


def trial(backbone: Path, folder: Path, capsys: Any, *options: str) -> tuple[int, dict[str, Any]]:
    code = run(["trial", str(backbone), *COMMON, "--run", str(folder / "runs"), *options])
    return code, json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(("recipe", "loss"), [("naver-distil", "margin-mse"), ("naver-efficient", "kl")])
def test_a_teacher_is_distilled_from_a_file(
    backbone: Path, tmp_path: Path, capsys: Any, recipe: str, loss: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    original = arms.run_cell
    monkeypatch.setattr(arms, "run_cell", lambda *a, **k: seen.append(original(*a, **k)) or seen[-1])
    losses = []
    for factor in (1.0, 10.0):
        code, found = trial(backbone, tmp_path, capsys, "--recipe", recipe, "--pairs", written(tmp_path, factor=factor))
        assert code in (0, 1)
        (cell,) = found["results"][0]["cells"]
        assert (cell["run"]["config"]["loss"], cell["run"]["config"]["negatives"]) == (loss, 1)
        losses.append([step.ranking_loss for step in seen[-1].run.steps])
    assert len(losses[0]) == len(losses[1]) == 3
    assert losses[0][0] != losses[1][0]  # what the teacher says is what is learned


def test_the_loss_is_the_closed_form_of_the_files_scores(backbone: Path, tmp_path: Path) -> None:
    """Step 0 of MarginMSE, from the untrained model's own representations and the numbers in the file."""
    from headscale.backbone import load_backbone
    from headscale.batches import batches
    from headscale.encoder import SpladeEncoder
    from headscale.recipes import TrainingConfig
    from headscale.texts import read_pairs
    from headscale.training import train

    pairs = read_pairs(written(tmp_path))
    opened = load_backbone(backbone)
    for module in opened.model.modules():  # no dropout, so that training sees what evaluation sees
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    config = TrainingConfig(steps=2, batch_size=4, negatives=2, loss="margin-mse", query_length=8, document_length=16)
    batch = next(batches(pairs, batch_size=4, negatives=2, seed=0))
    encoder = SpladeEncoder(opened.loaded, opened.tokenizer)
    queries = encoder.encode(batch.queries, max_length=8).double()
    documents = encoder.encode(batch.documents, max_length=16).double()
    error = 0.0
    for i, query in enumerate(batch.queries):
        (pair,) = [p for p in pairs if p.query == query]
        own = [documents[i], documents[4 + 2 * i], documents[4 + 2 * i + 1]]
        student = [float(queries[i] @ one) for one in own]
        margins = [(student[0] - s) - (pair.scores[0] - t) for s, t in zip(student[1:], pair.scores[1:], strict=True)]
        error += sum(m**2 for m in margins) / 8
    step = train(opened.model, opened.tokenizer, pairs, config).steps[0]
    assert step.ranking_loss == pytest.approx(error, rel=1e-5)


def test_pairs_without_a_teacher_are_refused_before_anything_is_loaded(tmp_path: Path, capsys: Any) -> None:
    code = run(["trial", "nowhere/at-all", "--recipe", "naver-distil", "--pairs", written(tmp_path, scores=False)])
    assert code == 2
    said = capsys.readouterr().err
    assert "the recipe `naver-distil` distils a teacher's scores, and `" in said
    assert "hint: give `--pairs` with `negatives` and `scores`" in said
    with pytest.raises(UsageError, match="and the built-in pairs have none"):
        negatives_of("naver-efficient", None, TextSource())


def test_negatives_are_the_recipes_as_far_as_there_are_any(tmp_path: Path) -> None:
    source = TextSource(written(tmp_path))
    assert negatives_of("st-mnrl", None, TextSource()) == 0
    assert negatives_of("st-mnrl", None, source) == 1
    assert negatives_of("tevatron", None, source) == 2  # 7 are wanted
    assert negatives_of("st-mnrl", 0, source) == 0


def test_a_file_that_is_no_training_data_is_one_sentence(tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "p.tsv"
    path.write_text("q\td\nq\td\nalone\n")
    assert run(["trial", "bundled:tiny-bert", "--pairs", str(path), "--scale", "none", "--batch-size", "2"]) == 3
    assert (
        f"error: `{path}` row 3 has one column, not two or more\n\nhint: write `query<TAB>" in capsys.readouterr().err
    )


@pytest.mark.parametrize("options", [["--mode", "untie"], ["--mode", "fold"], ["--scale", "none"]])
def test_the_trained_model_is_kept_and_loads_everywhere(
    backbone: Path, tmp_path: Path, capsys: Any, options: list[str]
) -> None:
    from sentence_transformers import SparseEncoder

    from headscale.backbone import load_backbone
    from headscale.encoder import SpladeEncoder

    target, file = tmp_path / "trained", written(tmp_path)
    code, found = trial(backbone, tmp_path, capsys, "--pairs", file, *options, "--save-model", str(target))
    assert code in (0, 1)
    kept = json.loads((target / "headscale.json").read_text())
    assert kept["training"]["steps"] == found["results"][0]["cells"][0]["run"]["end"]["steps"] == 3
    opened, before = load_backbone(target), load_backbone(backbone)
    text = ["w5 w6 w7"]
    ours = SpladeEncoder(opened.loaded, opened.tokenizer).encode(text, max_length=16)
    theirs = SparseEncoder(str(target), device="cpu").encode(text, convert_to_sparse_tensor=False).cpu()
    assert (ours - theirs).abs().max() < 1e-5
    scale = kept["scale"] if "none" not in options else 1.0
    start = SpladeEncoder(before.loaded, before.tokenizer, scale=scale).encode(text, max_length=16)
    assert (ours - start).abs().max() > 1e-3  # it was trained


def test_what_could_not_be_kept_is_refused_before_training(tmp_path: Path, capsys: Any) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "something").touch()
    for options, message in (
        (["--mode", "logits", "--save-model", str(tmp_path / "new")], "keeps the constant out of the weights"),
        (["--save-model", str(full)], "holds something already"),
    ):
        assert run(["trial", "nowhere/at-all", "--scale", "0.5", *options]) == 2
        assert message in capsys.readouterr().err
