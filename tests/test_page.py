"""The page as text: what it says, what it escapes, and that its commands and its Python lines do what they claim."""

from __future__ import annotations

import re
import shlex
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from saved_results import TEXTS, grid_of_cells, inspection_cell, inspection_of, training_cell

from headscale.activations import Encoding
from headscale.demo import demo_config
from headscale.page.contrast import DARK, LIGHT, contrast, legible
from headscale.page.files import write_page
from headscale.page.plates import Plate
from headscale.recipes import recipe
from headscale.results import Results, load
from headscale.trials import TextSource, training_of

ENCODING = Encoding(TEXTS.query_length, TEXTS.document_length, TEXTS.batch_size)
EVIL = '<script>alert("1")</script>|`$x_1$` & co'


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    grid_of_cells(tmp_path / "runs")
    inspection_cell(tmp_path / "runs", EVIL)
    return tmp_path / "runs"


def one_figure(label: str = "x", number: int = 1) -> Plate:
    from matplotlib.figure import Figure

    figure = Figure()
    axes = figure.add_subplot()
    axes.plot([0, 1], [0, 1], color="#D55E00")
    axes.fill_between([0, 1], [0, 1], [1, 2], color="#808080", alpha=0.2)
    axes.set_xlabel(label, parse_math=False)
    axes.set_ylabel("y")
    return Plate(number, f"figure{number}", f"Title of {number}", figure)


class Parts(HTMLParser):
    """Headings, ids, tags and what would be fetched, as an HTML parser reads them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.headings: list[str] = []
        self.ids: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self._inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._inside = tag == "h2"
        for name, value in attrs:
            if name == "id":
                self.ids.append(str(value))
            if name in ("src", "href", "srcset", "action", "poster", "data", "xlink:href"):
                self.links.append(str(value))

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.headings.append(data)
        self._inside = False


def page_of(results: Results, tmp_path: Path, plates: list[Plate], name: str = "page.html") -> str:
    write_page(results, tmp_path / name, plates)
    return (tmp_path / name).read_text()


# --- colours -------------------------------------------------------------------------------------------------------


def test_contrast_is_that_of_the_standard() -> None:
    """Published pairs: 21 for black on white; #767676 is the lightest grey that passes 4.5 on white."""
    assert contrast("#000000", "#ffffff") == pytest.approx(21.0)
    assert contrast("#767676", "#ffffff") == pytest.approx(4.54, abs=0.005)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.005)
    assert contrast("#ffffff", "#0000ff") == pytest.approx(8.59, abs=0.005)


@pytest.mark.parametrize("background", [LIGHT, DARK])
def test_a_colour_is_moved_no_further_than_it_must(background: str) -> None:
    from headscale.figures import COLOURS, FOREGROUND, MUTED

    for colour in (*COLOURS, FOREGROUND, MUTED):
        moved = legible(colour, background, 5.0)
        assert contrast(moved, background) >= 5.0
        if contrast(colour, background) >= 5.0 and colour in COLOURS:
            assert moved == colour
        elif colour in COLOURS:
            assert contrast(moved, background) < 5.2


def test_a_faint_grey_stays_faint() -> None:
    for background in (LIGHT, DARK):
        assert contrast(legible("#dddddd", background, 3.0), background) == pytest.approx(
            contrast("#dddddd", LIGHT), abs=0.05
        )


# --- the page ------------------------------------------------------------------------------------------------------


def test_the_parts_come_in_their_order_and_nothing_is_fetched(runs: Path, tmp_path: Path) -> None:
    text = page_of(load([runs]), tmp_path, [one_figure()])
    parts = Parts(text)
    assert parts.headings == [
        "Results", "Figures", "What good looks like", "How to apply the constant", "Inputs", "Environment",
        "Commands to reproduce",
    ]  # fmt: skip
    assert text.index("<h1>") < text.index("<h2>")
    assert all(link.startswith(("#", "data:")) for link in parts.links)
    assert len(parts.ids) == len(set(parts.ids))
    assert "url(http" not in text
    assert "default-src 'none'" in text
    assert "refresh" not in text


def test_a_name_is_text_wherever_it_stands(runs: Path, tmp_path: Path) -> None:
    text = page_of(load([runs]), tmp_path, [one_figure(EVIL)])
    assert "<script>alert" not in text
    assert text.count("<script>") == 1
    escaped = "&lt;script&gt;alert(&#34;1&#34;)&lt;/script&gt;|`$x_1$` &amp; co"
    assert text.count(escaped) >= 2  # in the table and among the inputs
    assert f"headscale inspect {shlex.quote(EVIL)}" in unescape(text)  # quoted in the command, for a shell


def test_the_script_is_the_one_that_the_page_allows(runs: Path, tmp_path: Path) -> None:
    import base64
    import hashlib

    text = page_of(load([runs]), tmp_path, [])
    script = text[text.index("<script>") + 8 : text.index("</script>")]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in text


def test_figures_keep_their_text_and_get_colours_for_both_schemes(runs: Path, tmp_path: Path) -> None:
    text = page_of(load([runs]), tmp_path, [one_figure("the axis"), one_figure("the other", 2)])
    drawings = [ElementTree.fromstring(found) for found in re.findall(r"<svg.*?</svg>", text, re.DOTALL)]
    assert len(drawings) == 2
    for drawing, label in zip(drawings, ("the axis", "the other"), strict=True):
        assert label in [element.text for element in drawing.iter("text")]
        assert drawing.find("title") is not None
        assert drawing.find("desc").text == f"y against {label}"  # type: ignore[union-attr]
        assert not re.search(r"#[0-9a-f]{6}", ElementTree.tostring(drawing, encoding="unicode"))
    used = set(re.findall(r"var\((--(?:mark|text)-[0-9a-f]{6})\)", text))
    assert "--mark-d55e00" in used
    dark = text.rindex("@media screen and (prefers-color-scheme:dark)")
    for name in used:
        assert f"{name}:#" in text[dark:]
        assert f"{name}:#" in text[:dark]


def test_a_missing_figure_says_in_a_sentence_why(runs: Path, tmp_path: Path) -> None:
    absent = Plate(3, "gone", "What is gone", None, "no result holds <it>")
    for name in ("page.html", "page.md"):
        text = page_of(load([runs]), tmp_path, [absent], name)
        assert "What is gone" in text
        assert "not drawn, since no result holds" in text
        assert "<it>" not in text


def test_the_bands_are_those_that_verdicts_use() -> None:
    from headscale.diagnosis import LOSS_CEILING
    from headscale.page.advice import bands

    told = {(band.when, band.statistic): band for band in bands()}
    assert told["before training", "contrastive loss [ln N]"].good.startswith(f"at most {LOSS_CEILING:g}")
    assert told["after training", "active dims of a query"].good == "30 to 50"
    assert told["after training", "active dims of a document"].good == "150 to 250"
    assert all(band.source for band in bands())


def test_markdown_says_the_same_with_its_figures_beside_it(runs: Path, tmp_path: Path) -> None:
    write_page(load([runs]), tmp_path / "my page.md", [one_figure()])
    text = (tmp_path / "my page.md").read_text()
    links = re.findall(r"!\[[^]]*\]\(([^)]*)\)", text)
    assert links == ["my%20page-figure1.svg"]
    ElementTree.fromstring((tmp_path / "my page-figure1.svg").read_text())
    headings = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert headings == [
        "Results", "Figures", "What good looks like", "How to apply the constant", "Inputs", "Environment",
        "Commands to reproduce",
    ]  # fmt: skip
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert len(tables) >= 4
    for table in tables:  # a pipe in a name does not make a column
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}) == 1
    assert "<script>" not in re.sub(r"```.*?```", "", text, flags=re.DOTALL)


# --- the sentences -------------------------------------------------------------------------------------------------


def test_the_page_opens_with_what_the_constant_did(runs: Path) -> None:
    from headscale.page.story import further_sentences, verdict_sentence

    results = load([runs])
    assert verdict_sentence(results) == (
        "tiny-modernbert: untouched, collapsed in 2 of 2 (MRR@10 0.025); multiplied by 1/4 before training with 4 "
        "times the learning rate on the head, stable in 2 of 2 (MRR@10 0.350)."
    )
    others = further_sentences(results)
    assert "tiny-bert: untouched, stable in 2 of 2 (MRR@10 0.385)." in others
    assert any("is too high: the contrastive loss starts at 308" in sentence for sentence in others)


def test_many_backbones_are_counted(tmp_path: Path) -> None:
    from headscale.page.story import further_sentences, verdict_sentence

    for place in range(20):
        inspection_cell(tmp_path / "runs", f"b{place}", loss=1.0 if place % 4 else 99.0)
    results = load([tmp_path / "runs"])
    assert verdict_sentence(results) == "Of 20 backbones, 5 are too high, 15 are ok."
    assert further_sentences(results)[-1] == "The table has 14 more."


def test_nothing_finished_is_said() -> None:
    from headscale.page.story import verdict_sentence

    assert verdict_sentence(Results()) == "No result is finished yet."


# --- the commands --------------------------------------------------------------------------------------------------


@pytest.fixture
def pairs(tmp_path: Path) -> str:
    rows = [f"w{i} asks\tw{i} answers this and that" for i in range(64)]
    (tmp_path / "some pairs.tsv").write_text("\n".join(rows) + "\n")
    return str(tmp_path / "some pairs.tsv")


def printed(runs: Path) -> list[str]:
    from headscale.page.commands import commands_for

    return list(commands_for(load([runs]), runs))


def test_a_sweep_is_asked_for_in_one_command_that_plans_the_same_cells(
    tmp_path: Path, pairs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The program itself is the oracle: what it plans when given the printed command is what the cells hold."""
    from headscale import cli, grid

    base = recipe("tevatron").replace(steps=20, horizon=900, lr=1e-3, negatives=0, precision="fp32", device="cpu")
    source = TextSource(pairs, candidates=0)
    axes = grid.Axes((1 / 64, 0.3, None), ("untie", "fold"), (1.0, 4.0), seeds=(0, 1))
    wanted = axes.trainings(base)
    for one in wanted:
        training_cell(tmp_path / "runs", config=one, seed=one.seed, texts=source)
    (line,) = printed(tmp_path / "runs")
    planned: list[Any] = []
    monkeypatch.setattr(grid, "sweep", lambda plan, *a, **k: iter(planned.extend(plan) or ()))
    monkeypatch.chdir(tmp_path)
    assert cli.run([*shlex.split(line)[1:], "-q"]) == 0
    assert {training_of(one) for one in planned} == set(wanted)
    assert {one["texts"]["pairs"] for one in planned} == {pairs}


def test_trials_are_asked_for_arm_by_arm(tmp_path: Path, pairs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from headscale import arms, cli
    from headscale.trials import read_trained
    from headscale.verdict import RULES

    base = recipe("st-mnrl").replace(steps=12, horizon=5625, negatives=0, precision="fp32", lr=1e-4, batch_size=8)
    source = TextSource(pairs, candidates=0)
    kept = {
        scale: [
            training_cell(
                tmp_path / "runs", config=base, scale=scale, seed=seed, texts=source, stop_early=RULES.to_dict()
            )
            for seed in range(2)
        ]
        for scale in (None, 1 / 32, 0.3)
    }
    wanted = {training_of(read_configuration(folder)) for folders in kept.values() for folder in folders}
    lines = printed(tmp_path / "runs")
    assert len(lines) == 2
    assert ["--no-control" in line for line in lines] == [False, True]
    planned: list[Any] = []

    def remember(configuration: Any, *_: Any, **__: Any) -> Any:
        planned.append(configuration)
        return read_trained(kept[None][0])

    monkeypatch.setattr(arms, "run_cell", remember)
    monkeypatch.chdir(tmp_path)
    for line in lines:
        assert cli.run([*shlex.split(line)[1:], "-q"]) in (0, 1)
    assert {training_of(one) for one in planned} == wanted
    assert all(one["stop_early"] for one in planned)


def read_configuration(folder: Path) -> dict[str, Any]:
    from headscale.cells import read_cell

    found: dict[str, Any] = read_cell(folder)["configuration"]
    return found


def test_the_demo_is_asked_for_as_the_demo(tmp_path: Path) -> None:
    from headscale.demo import CANDIDATES, PACKAGES

    source = TextSource(packages=PACKAGES, candidates=CANDIDATES, rank_dev=False)
    for seed in range(3):
        training_cell(tmp_path / "runs", config=demo_config(seed), seed=seed, texts=source)
    assert printed(tmp_path / "runs") == ["headscale demo --seeds 3"]


def test_what_no_option_says_is_run_again_from_its_cell(runs: Path) -> None:
    """A learning-rate schedule that is its own horizon has no option: the cell describes itself."""
    lines = printed(runs)
    assert len(lines) == 2  # the inspection, and the trainings
    assert lines[1].startswith("python - <<'END'")
    body = lines[1].split("\n", 1)[1].removesuffix("END")
    compile(body, "<printed>", "exec")
    assert repr(str(runs)) in body


def test_a_calibration_is_asked_for_with_its_own_choice(
    tmp_path: Path, pairs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    from headscale import api, cli
    from headscale.calibration import Choice, choose
    from headscale.page.commands import calibrate_line
    from headscale.profiles import Reference, profile_of

    asked: list[Any] = []
    monkeypatch.setattr(api, "find_reference", lambda name, *a, **k: asked.append(name))
    monkeypatch.setattr(api, "calibrate_in_run", lambda name, *a, **k: asked.append((name, k["choice"], k["save"])))
    choice = Choice("score", "rms", "l1", "score_margin", 8.0, 2.0, False, False, None, 3.0)
    found = choose_from(choose, choice, Reference(profile_of(inspection_of("ref", loss=2.0)), "measured"))
    found = replace(found, texts=replace(TEXTS, source=pairs))
    monkeypatch.chdir(tmp_path)
    line = calibrate_line(found, "out dir")
    assert cli.run([*shlex.split(line)[1:], "-q"]) in (0, 1, 3)
    assert asked[0] == "ref"
    assert asked[1] == ("bundled:tiny-modernbert", choice, Path("out dir"))


@pytest.mark.parametrize(
    ("queries", "asked_for"), [("the collection's IDF", "idf"), ("`my idf.json`", "idf:my idf.json")]
)
def test_an_evaluation_is_asked_for_as_it_was_deployed(
    queries: str, asked_for: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from dataclasses import replace

    from test_results import evaluation

    from headscale import cli, collection
    from headscale import evaluation as evaluating
    from headscale.page.commands import evaluate_line
    from headscale.records import Impacts

    monkeypatch.chdir(tmp_path)
    usual = replace(evaluation("bundled:tiny-bert", 0.5), pooling="sum", activation="log1p_relu", queries=queries)
    rounded = [
        replace(usual.systems[0], impacts=Impacts(rounding, "kept", 0.01, 0.01, 9, 0.0, 0.0, 0))
        for rounding in ("x100", "8")
    ]
    found = replace(usual, systems=(*usual.systems, *rounded))
    asked: list[Any] = []
    monkeypatch.setattr(evaluating, "evaluate_in_run", lambda *a, setup, **k: asked.append(setup) or found)
    nothing = collection.Collection("docs", "test", (), (), (), (), (), (), ())
    monkeypatch.setattr(collection, "chosen_collection", lambda source, split: nothing)
    assert cli.run([*shlex.split(evaluate_line(found))[1:], "-q"]) == 0
    (setup,) = asked
    assert (setup.pooling, setup.activation, setup.queries) == ("sum", "log1p_relu", asked_for)
    assert setup.quantize == ("x100", "8")


def choose_from(choose: Any, choice: Any, reference: Any) -> Any:
    """A real calibration of a bundled backbone on two short pairs."""
    from headscale import bundled
    from headscale.backbone import load_backbone
    from headscale.inspection import measure, texts_of
    from headscale.texts import Pair

    pairs = [Pair(f"what is w{i}", f"w{i} is a thing of its own and no other") for i in range(32)]
    texts = texts_of(pairs, "x", ENCODING)
    name = f"{bundled.PREFIX}{bundled.FAILING}"
    return choose(measure(load_backbone(name), texts), reference, choice)


# --- the lines of Python -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("library", ["transformers", "sentence_transformers"])
def test_the_printed_lines_train_the_head_at_its_own_rate(
    library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run as printed on the checkpoint that the printed command writes; the head is what `headscale.json` edited."""
    pytest.importorskip(library)
    import json

    from headscale import bundled
    from headscale.api import calibrate
    from headscale.calibration import Choice
    from headscale.page.advice import applications
    from headscale.records import Calibration
    from headscale.texts import Pair

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HEADSCALE_CACHE", str(tmp_path / "cache"))
    pairs = [Pair(f"what is w{i}", f"w{i} is a thing of its own and no other") for i in range(32)]
    names = [f"{bundled.PREFIX}{name}" for name in (bundled.FAILING, bundled.REFERENCE)]
    choice = Choice("constant", shift=False)
    found = calibrate(
        names[0], reference=names[1], pairs=pairs, encoding=ENCODING, choice=choice, save="tiny-modernbert-calibrated",
        mode="untie",
    )  # fmt: skip
    assert isinstance(found, Calibration)
    (one,) = applications(Results(calibrations=(found,)))
    assert one.command == (
        f"headscale calibrate {names[0]} --reference {names[1]} --match constant --pairs given --num-pairs 32 "
        f"--query-length 16 --document-length 48 --save {tmp_path / 'tiny-modernbert-calibrated'}"
    )
    scope: dict[str, Any] = {}
    exec(getattr(one, library), scope)
    config = json.loads(Path("tiny-modernbert-calibrated/config.json").read_text())
    assert config["tie_word_embeddings"] is False
    if library == "transformers":
        encoder, head = scope["optimizer"].param_groups
        assert (encoder["lr"], head["lr"]) == (2e-5, found.head_lr_multiplier * 2e-5)
        chosen = {n for n, p in scope["model"].named_parameters() if any(p is q for q in head["params"])}
        assert chosen == {"decoder.weight", "decoder.bias"}
        assert len(encoder["params"]) + 2 == len(list(scope["model"].parameters()))
    else:
        ((pattern, rate),) = scope["arguments"].learning_rate_mapping.items()
        assert rate == found.head_lr_multiplier * 2e-5
        chosen = {n.rpartition("model.")[2] for n, _ in scope["model"].named_parameters() if re.search(pattern, n)}
        assert {n.rpartition("decoder.")[2] for n in chosen} == {"weight", "bias"}
        assert all("decoder." in n for n in chosen)
