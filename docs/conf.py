"""How the documentation is built: `sphinx-build -W docs OUT`; the command reference and the pictures are made anew."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from headscale import __version__

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

project = "headscale"
author = copyright = "The headscale authors"
release = version = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.doctest", "sphinx.ext.napoleon"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]
autodoc_member_order = "bysource"
autodoc_typehints = "description"
doctest_global_setup = "import headscale"
html_theme = "furo"
html_title = f"headscale {__version__}"


def generate(app: object) -> None:
    """Write the command reference from the program, and the pictures from the bundled backbones."""
    import pictures

    command = [sys.executable, "-m", "typer", "headscale.cli", "utils", "docs", "--name", "headscale"]
    reference = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    text = reference.replace("# `headscale`", "# Command reference", 1)
    (HERE / "commands.md").write_text(text, encoding="utf-8")
    pictures.draw_all(HERE / "pictures")


def setup(app: object) -> None:
    """Sphinx calls this first."""
    app.connect("builder-inited", generate)  # type: ignore[attr-defined]
