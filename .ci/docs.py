"""Hold the documents to the repository: `python .ci/docs.py COMMAND...`, the commands that the README must show.

Links inside the repository lead somewhere, the README's first 40 lines hold the commands that were run, and the
version is the same everywhere it is written.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from headscale import __version__

ROOT = Path(__file__).resolve().parent.parent
FENCED = re.compile(r"^```.*?\n(.*?)^```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s#]+)")


def documents() -> list[Path]:
    """Every tracked Markdown file."""
    listed = subprocess.run(["git", "ls-files", "-z", "*.md"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [ROOT / name for name in listed.stdout.split("\0") if name]


def dead_links(document: Path) -> list[str]:
    """Links of a document that lead to nothing in the repository."""
    targets = LINK.findall(FENCED.sub("", document.read_text(encoding="utf-8")))
    local = [t for t in targets if "://" not in t and not t.startswith("mailto:")]
    return [f"{document.relative_to(ROOT)} links to `{t}`" for t in local if not (document.parent / t).exists()]


def readme_faults(commands: list[str]) -> list[str]:
    """Commands that the README's opening does not show in a code block."""
    readme = ROOT / "README.md"
    if not readme.exists():
        return ["there is no README.md"]
    opening = "\n".join(readme.read_text(encoding="utf-8").splitlines()[:40]) + "\n"
    shown = {line.removeprefix("$ ").strip() for block in FENCED.findall(opening) for line in block.splitlines()}
    return [f"the README's first 40 lines do not show `{command}`" for command in commands if command not in shown]


def version_faults() -> list[str]:
    """Files that name another version."""
    written = {
        "pyproject.toml": rf'^version = "{re.escape(__version__)}"$',
        "CITATION.cff": rf"^version: {re.escape(__version__)}$",
        "CHANGELOG.md": rf"^## {re.escape(__version__)}\b",
    }
    texts = {name: (ROOT / name).read_text(encoding="utf-8") for name in written}
    return [f"{n} is not at {__version__}" for n, p in written.items() if not re.search(p, texts[n], re.MULTILINE)]


faults = [*(f for d in documents() for f in dead_links(d)), *readme_faults(sys.argv[1:]), *version_faults()]
print("\n".join(faults) or f"{len(documents())} documents")
sys.exit(1 if faults else 0)
