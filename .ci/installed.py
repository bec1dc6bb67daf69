"""Compare the installed headscale with the repository's: `git ls-files -z headscale | python .ci/installed.py ROOT`.

The tests and the demo say nothing about a package that lacks a file, or that is not the one that was installed.
"""

from __future__ import annotations

import sys
from pathlib import Path

import headscale

root = Path(sys.argv[1])
installed = Path(headscale.__file__).parent
if installed.is_relative_to(root):
    sys.exit(f"this is the repository's own headscale, not an installed one: {installed}")
expected = {Path(name) for name in sys.stdin.read().split("\0") if name}
found = {p.relative_to(installed.parent) for p in installed.rglob("*") if p.is_file() and p.suffix != ".pyc"}
differing = {p for p in expected & found if (root / p).read_bytes() != (installed.parent / p).read_bytes()}
for title, paths in (
    ("lacks", expected - found),
    ("has besides", found - expected),
    ("has otherwise", differing),
):
    for path in sorted(paths):
        print(f"the installed package {title} {path}")
print(f"{len(expected)} files")
sys.exit(1 if differing or expected != found else 0)
