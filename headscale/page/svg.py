"""A figure as an element of the page: text stays text, colours follow the scheme; with a name and a description."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from headscale.page.contrast import MARK_CONTRAST, TEXT_CONTRAST, legible

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_HEX = re.compile(r"#[0-9a-fA-F]{6}\b")
_FONT_FAMILY = re.compile(r"font-family:[^;]*;?\s*")
_TEXT = ("text", "tspan")


@dataclass
class Inks:
    """The colours that the page's figures use, each as a custom property with a value for either scheme."""

    names: dict[tuple[str, str], str] = field(default_factory=dict)

    def of(self, colour: str, role: str) -> str:
        """The property to write for a colour; `role` is `text` or `mark`."""
        key = (colour.lower(), role)
        return f"var({self.names.setdefault(key, f'--{role}-{key[0][1:]}')})"

    def declarations(self, background: str) -> str:
        """The value of every property on a background."""
        least = {"text": TEXT_CONTRAST, "mark": MARK_CONTRAST}
        return "".join(
            f"{name}:{legible(colour, background, least[role])};" for (colour, role), name in self.names.items()
        )


def inline_svg(figure: Figure, *, key: str, title: str, description: str, inks: Inks) -> str:
    """A figure for the page.

    Args:
        figure: of `headscale.figures`.
        key: what its ids start with; another for each figure of a page.
        title: its name, for those who do not see it.
        description: what it shows, for the same.
        inks: takes up the colours; the page declares them.
    """
    from headscale.figures import style

    root = ElementTree.fromstring(style.to_svg(figure, prefix=key))
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.endswith("}style"):  # it would hold for the whole page; the page's own says the same
                parent.remove(child)
    for element in root.iter():
        _for_page(element, inks)
    width = float(root.attrib["viewBox"].split()[2])
    root.attrib = {
        "viewBox": root.attrib["viewBox"],
        "role": "img",
        "aria-labelledby": f"{key}-title {key}-desc",
        "fill": "currentColor",  # of what names no colour, which is black
        "style": f"--wide:{width:.0f}",
    }
    for place, (tag, text) in enumerate((("title", title), ("desc", description))):
        named = ElementTree.Element(tag, {"id": f"{key}-{tag}"})
        named.text = text
        root.insert(place, named)
    return ElementTree.tostring(root, encoding="unicode")


def _for_page(element: ElementTree.Element, inks: Inks) -> None:
    """Names without a namespace, as HTML has them; colours as properties; the page's font; no space between tags."""
    element.tag = element.tag.rpartition("}")[2]
    role = "text" if element.tag in _TEXT else "mark"
    attributes = {name.rpartition("}")[2]: value for name, value in element.attrib.items()}
    if "style" in attributes:
        attributes["style"] = _FONT_FAMILY.sub("", attributes["style"])
    for name in attributes.keys() & {"style", "fill", "stroke"}:
        attributes[name] = _HEX.sub(lambda found: inks.of(found[0], role), attributes[name])
    element.attrib = attributes
    if element.tag not in _TEXT:
        element.text = None
    if element.tag != "tspan":
        element.tail = None
