"""Run the console blocks of pages, each page in a fresh folder of its own: `python docs/console.py PAGE...`.

Lines that begin with `$ ` are run; a block after a line `<!-- not run: WHY -->` is not. The first command that fails
ends it.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

BLOCK = re.compile(r"(?:<!-- not run: (?P<why>[^>]*) -->\n)?```console\n(?P<lines>.*?)^```", re.DOTALL | re.MULTILINE)


def commands(page: Path) -> list[str]:
    """What a reader of the page would type."""
    blocks = [m["lines"] for m in BLOCK.finditer(page.read_text(encoding="utf-8")) if not m["why"]]
    return [line.removeprefix("$ ") for block in blocks for line in block.splitlines() if line.startswith("$ ")]


def main() -> None:
    """Run what the pages say."""
    for page in map(Path, sys.argv[1:]):
        with tempfile.TemporaryDirectory() as folder:
            for command in commands(page):
                done = subprocess.run(["bash", "-c", command], cwd=folder, capture_output=True, text=True)
                if done.returncode:
                    sys.exit(f"{page}: `{command}` ended with {done.returncode}\n{done.stdout}{done.stderr}")
                print(f"{page.name}: {command}")


if __name__ == "__main__":
    main()
