"""The page as a browser shows it: a real, headless Chromium, at two widths and in both colour schemes."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from saved_results import grid_of_cells, inspection_cell, training_cell

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
if CHROMIUM is None:
    pytest.skip("no Chromium is installed (Debian: `apt-get install chromium`)", allow_module_level=True)
pytest.importorskip("playwright.sync_api", reason="playwright is missing: `pip install '.[test]'`")

WIDTHS, SCHEMES = (1280, 400), ("light", "dark")
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
         "--disable-sync", "--no-first-run"]  # fmt: skip
EVIL = '<script>document.title="stolen"</script><img src=x onerror="fetch(1)">&"'


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from headscale.cli import run

    root = tmp_path_factory.mktemp("report")
    grid_of_cells(root / "runs")
    training_cell(root / "runs", scale=1 / 2, unfinished=True)
    for place, name in enumerate([f"owner/backbone-{i}" for i in range(6)] + [EVIL, "a/" + "long-name-" * 12]):
        inspection_cell(root / "runs", name, loss=0.9 * 2.0**place, norm=20.0 + 15 * place)
    rows = [f"owner/backbone-{i},nDCG@10,{0.5 - 0.05 * i}" for i in range(6)]
    (root / "published.csv").write_text("\n".join(["backbone,metric,value", *rows]) + "\n")
    file = root / "report.html"
    published = ["--effectiveness", str(root / "published.csv")]
    assert run(["report", str(root / "runs"), "-o", str(file), "-q", *published]) == 0
    return file


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as tool:
        chromium = tool.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield chromium
        chromium.close()


@pytest.fixture
def opened(browser: Any, page_file: Path) -> Iterator[Any]:
    """Opens the page; whatever it says on the console or asks the network for fails the test."""
    said: list[str] = []
    pages = []

    def open_page(width: int = 1280, scheme: str = "light") -> Any:
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        page.on("console", lambda message: said.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: said.append(f"error: {error}"))
        page.on("request", lambda request: said.append(f"request: {request.url}"))
        page.goto(page_file.as_uri())
        pages.append(page)
        return page

    yield open_page
    for page in pages:
        page.close()
    assert [one for one in said if one != f"request: {page_file.as_uri()}"] == []


def column(page: Any, table: str, name: str) -> list[str]:
    """The texts of a column, of the rows that are shown, in their order."""
    found: list[str] = page.evaluate(
        """([table, name]) => {
            const t = document.getElementById(table);
            const i = [...t.tHead.rows[0].cells].findIndex(c => c.querySelector("span").textContent === name);
            return [...t.tBodies[0].rows].filter(r => !r.hidden).map(r => r.cells[i].textContent);
        }""",
        [table, name],
    )
    return found


def number(text: str) -> float:
    top, _, bottom = text.replace(",", "").partition("/")
    return float(top) / float(bottom or 1)


def test_nothing_in_a_name_becomes_a_part_of_the_page(opened: Any) -> None:
    page = opened()
    assert page.title().startswith("headscale: ")
    assert page.locator("img").count() == 0
    assert page.locator("script").count() == 1
    assert EVIL in column(page, "inspections", "backbone")


@pytest.mark.parametrize("name", ["loss at the end", "scale"])
def test_numbers_sort_as_numbers_in_both_directions(opened: Any, name: str) -> None:
    page = opened()

    def values() -> list[float]:
        return [number(text) for text in column(page, "trainings", name) if text != "-"]

    before = values()
    assert before != sorted(before)
    heading = page.locator("#trainings th", has=page.get_by_text(name, exact=True))
    heading.locator("button").click()
    assert heading.get_attribute("aria-sort") == "ascending"
    assert values() == sorted(before)
    heading.locator("button").click()
    assert heading.get_attribute("aria-sort") == "descending"
    assert values() == sorted(before, reverse=True)
    assert page.locator("#trainings th[aria-sort=ascending], #trainings th[aria-sort=descending]").count() == 1


def test_words_sort_from_the_keyboard(opened: Any) -> None:
    page = opened()
    button = page.locator("#trainings th button").first
    button.focus()
    page.keyboard.press("Enter")
    names = column(page, "trainings", "backbone")
    assert names == sorted(names)
    page.keyboard.press("Enter")
    assert column(page, "trainings", "backbone") == sorted(names, reverse=True)


def test_missing_values_stay_last_whichever_way_is_sorted(opened: Any) -> None:
    page = opened()
    heading = page.locator("#trainings th", has=page.get_by_text("loss at the end", exact=True)).locator("button")
    for _ in range(2):
        heading.click()
        losses = column(page, "trainings", "loss at the end")
        assert losses[-1] == "-"  # the training that goes on
        assert "-" not in losses[:-1]


def test_a_filter_keeps_the_rows_that_hold_every_word(opened: Any) -> None:
    page = opened()
    rows = page.locator("#trainings tbody tr").count()
    page.locator("[data-filter=trainings]").fill("MODERNBERT collapsed")
    shown = page.locator("#trainings tbody tr:visible")
    texts = shown.all_inner_texts()
    assert 0 < len(texts) < rows
    assert all("modernbert" in text and "collapsed" in text for text in texts)
    assert page.locator("[data-count=trainings]").inner_text() == f"{len(texts)} of {rows}"
    page.locator("[data-filter=trainings]").fill("no such row")
    assert page.locator("#trainings tbody tr:visible").count() == 0
    page.locator("[data-filter=trainings]").fill("")
    assert shown.count() == rows


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_text_stands_out_and_none_runs_over_the_page(opened: Any, width: int, scheme: str) -> None:
    page = opened(width, scheme)
    page.evaluate("for (const d of document.querySelectorAll('details')) d.open = true")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    faint = [one for one in page.evaluate(COLOURS) if ratio(one["colour"], one["background"], one["opacity"]) < 4.5]
    assert faint == []


def test_both_schemes_have_backgrounds_of_their_own(opened: Any) -> None:
    light, dark = (
        opened(scheme=scheme).evaluate("getComputedStyle(document.body).backgroundColor") for scheme in SCHEMES
    )
    assert luminance(rgba(light)) > 0.9
    assert luminance(rgba(dark)) < 0.05


@pytest.mark.parametrize("width", WIDTHS)
def test_no_two_texts_of_a_figure_lie_on_each_other(opened: Any, width: int) -> None:
    page = opened(width)
    figures = page.evaluate(BOXES)
    assert len(figures) >= 4
    found = [
        (figure["name"], one["text"], other["text"], round(share, 2))
        for figure in figures
        for i, one in enumerate(figure["boxes"])
        for other in figure["boxes"][:i]
        if (share := overlap(one, other)) > OVERLAP
    ]
    assert found == []


@pytest.mark.parametrize("width", WIDTHS)
def test_texts_of_figures_are_large_enough_to_read(opened: Any, width: int) -> None:
    """No smaller than on paper: the smallest label of a figure is 7.5 points, which are 10 px."""
    heights = [box["size"] for figure in opened(width).evaluate(BOXES) for box in figure["boxes"]]
    assert min(heights) >= 9.9


def test_figures_have_a_name_and_a_description(opened: Any) -> None:
    page = opened()
    count = page.locator("figure svg").count()
    assert count >= 4
    assert page.locator("figure svg[role=img] > title").count() == count
    for text in page.locator("figure svg > desc").all_text_contents():
        assert " against " in text


def test_the_page_prints_without_its_controls_and_with_whole_tables(opened: Any, tmp_path: Path) -> None:
    page = opened(1280, "dark")
    page.emulate_media(media="print")
    assert not page.locator(".controls").first.is_visible()
    assert page.evaluate("getComputedStyle(document.querySelector('.scroll')).maxHeight") == "none"
    assert page.evaluate("getComputedStyle(document.querySelector('figure')).breakInside") == "avoid"
    assert luminance(rgba(page.evaluate("getComputedStyle(document.body).backgroundColor"))) > 0.9
    page.set_viewport_size({"width": 688, "height": 1000})  # A4 less the margins of 14 mm, at 96 dpi
    assert page.evaluate("document.documentElement.scrollWidth") <= 688
    page.pdf(path=str(tmp_path / "page.pdf"), format="A4")
    content = (tmp_path / "page.pdf").read_bytes()
    assert content.startswith(b"%PDF-")
    assert len(re.findall(rb"/Type\s*/Page\b", content)) >= 3


# --- colours: WCAG 2.2, written down again so that the page's own arithmetic is checked and not repeated -----------


def rgba(text: str) -> tuple[float, ...]:
    values = [float(v) for v in re.findall(r"[\d.]+", text)]
    return (*values[:3], values[3] if len(values) > 3 else 1.0)


def luminance(colour: tuple[float, ...]) -> float:
    channels = []
    for value in colour[:3]:
        share = value / 255
        channels.append(share / 12.92 if share <= 0.03928 else ((share + 0.055) / 1.055) ** 2.4)
    return sum(weight * channel for weight, channel in zip((0.2126, 0.7152, 0.0722), channels, strict=True))


def ratio(text: str, background: str, opacity: float) -> float:
    below, above = rgba(background), rgba(text)
    alpha = above[3] * opacity
    seen = tuple(alpha * a + (1 - alpha) * b for a, b in zip(above[:3], below[:3], strict=True))
    high, low = sorted((luminance(seen), luminance(below)), reverse=True)
    return (high + 0.05) / (low + 0.05)


COLOURS = """() => {
    const found = [];
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
        const element = walker.currentNode.parentElement, text = walker.currentNode.textContent.trim();
        if (!text || ["SCRIPT", "STYLE", "title", "desc"].includes(element.tagName)) continue;
        const style = getComputedStyle(element);
        let opacity = 1, background = "rgb(0, 0, 0)";
        for (let e = element; e; e = e.parentElement) opacity *= Number(getComputedStyle(e).opacity);
        for (let e = element; e; e = e.parentElement) {
            background = getComputedStyle(e).backgroundColor;
            if (!/, 0\\)$/.test(background)) break;
        }
        const drawn = Boolean(element.closest("svg"));
        if (drawn) opacity *= Number(style.fillOpacity);
        found.push({text: text.slice(0, 40), colour: drawn ? style.fill : style.color, background, opacity});
    }
    return found;
}"""

# --- texts that overlap --------------------------------------------------------------------------------------------

OVERLAP = 0.15  # of the smaller box: boxes hold ascent and descent, which most letters leave empty

BOXES = """() => [...document.querySelectorAll("figure")].map(figure => ({
    name: figure.id,
    boxes: [...figure.querySelectorAll("svg text")].filter(t => t.textContent.trim()).map(t => {
        const box = t.getBoundingClientRect(), matrix = t.getScreenCTM();
        const scale = Math.hypot(matrix.a, matrix.b);
        const size = parseFloat(getComputedStyle(t).fontSize) * scale;
        return {text: t.textContent.trim(), left: box.left, right: box.right, top: box.top, bottom: box.bottom, size};
    }),
}))"""


def overlap(one: dict[str, float], other: dict[str, float]) -> float:
    """Shared area over that of the smaller box."""
    width = min(one["right"], other["right"]) - max(one["left"], other["left"])
    height = min(one["bottom"], other["bottom"]) - max(one["top"], other["top"])
    if width <= 0 or height <= 0:
        return 0.0
    areas = [(box["right"] - box["left"]) * (box["bottom"] - box["top"]) for box in (one, other)]
    return width * height / min(areas)
