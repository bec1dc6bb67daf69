"""A report as one HTML file that needs nothing else, and as Markdown with its figures beside it."""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any

from headscale import __version__
from headscale.page.content import Report
from headscale.page.contrast import DARK, LIGHT
from headscale.page.svg import Inks, inline_svg

if TYPE_CHECKING:
    from jinja2 import Environment

    from headscale.page.plates import Plate

_MARKDOWN = re.compile(r"([\\`*_\[\]|<>#])")


def as_html(report: Report, *, refresh: int | None = None) -> str:
    """The page: styles, script and figures inside, nothing fetched, every text escaped.

    Args:
        report: what it says.
        refresh: seconds after which a browser reads the file again; None: never.
    """
    from markupsafe import Markup

    inks = Inks()
    drawn = [{"number": p.number, "title": p.title, "svg": Markup(_svg(p, inks))} for p in report.plates if p.figure]
    script = _asset("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return _environment().get_template("page.html").render(
        report=report, drawn=drawn, version=__version__, refresh=refresh, script=Markup(script),
        script_hash=Markup(f"'sha256-{digest}'"), css=Markup(_css(inks)),
    )  # fmt: skip


def as_markdown(report: Report, files: dict[str, str]) -> str:
    """The same as Markdown.

    Args:
        report: what it says.
        files: where each figure is, by key, as links are written.
    """
    text = _environment().get_template("page.md.jinja").render(report=report, files=files)
    return re.sub(r"\n{3,}", "\n\n", text)


def _svg(plate: Plate, inks: Inks) -> str:
    assert plate.figure is not None
    axes = [ax for ax in plate.figure.axes if ax.get_visible() and (ax.get_xlabel() or ax.get_ylabel())]
    shown = dict.fromkeys(f"{ax.get_ylabel() or 'panel'} against {ax.get_xlabel() or 'the shared axis'}" for ax in axes)
    description = "; ".join(" ".join(text.split()) for text in shown)
    return inline_svg(plate.figure, key=f"f{plate.number}", title=plate.title, description=description, inks=inks)


def _css(inks: Inks) -> str:
    """The page's style with the colours of its figures for either scheme; paper is light."""
    dark = f"@media screen and (prefers-color-scheme:dark){{:root{{{inks.declarations(DARK)}}}}}"
    return f"{_asset('page.css')}:root{{{inks.declarations(LIGHT)}}}\n{dark}"


@cache
def _asset(name: str) -> str:
    return (resources.files("headscale.page") / "templates" / name).read_text(encoding="utf-8")


@cache
def _environment() -> Environment:
    from jinja2 import Environment, FunctionLoader

    found = Environment(
        loader=FunctionLoader(_asset), autoescape=lambda name: bool(name) and str(name).endswith(".html"),
        keep_trailing_newline=True,
    )  # fmt: skip
    found.filters.update(words=_words, md=_md, fenced=_fenced, breakable=_breakable)
    return found


def _words(text: str) -> Any:
    """A sentence with what stands in backticks as code."""
    from markupsafe import Markup, escape

    parts = str(text).split("`")
    if len(parts) % 2 == 0:  # a backtick that is none of ours
        return escape(text)
    return Markup("").join(Markup("<code>{}</code>").format(p) if i % 2 else escape(p) for i, p in enumerate(parts))


def _breakable(name: str) -> Any:
    """A name that may go on in a second line behind its underscores."""
    from markupsafe import Markup, escape

    return Markup("_<wbr>").join(escape(part) for part in name.split("_"))


def _md(text: str) -> str:
    """A text that means itself in Markdown, also in a table; what stands in backticks stays code."""
    parts = " ".join(str(text).split()).split("`")
    if len(parts) % 2 == 0:
        return _MARKDOWN.sub(r"\\\1", "`".join(parts))
    code = (p.replace("|", r"\|") if i % 2 else _MARKDOWN.sub(r"\\\1", p) for i, p in enumerate(parts))
    return "`".join(code)


def _fenced(text: str, language: str) -> str:
    """A block of code, fenced by more backticks than are in it."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"
