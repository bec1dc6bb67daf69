"""Docstrings of source files, found by scanning the text: nothing is imported, executed or parsed in full.

A scan is ten times faster than parsing every file, and finds what `ast` finds (a test compares them), plus
the docstrings that NumPy, SciPy and torch attach to compiled functions through `add_newdoc`-like calls.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

Row = tuple[str, str, tuple[str, str, str]]  # summary, body, keys: see `text_keys`

PACKAGES = (
    "stdlib",
    "numpy",
    "scipy",
    "pandas",
    "matplotlib",
    "torch",
    "transformers",
    "huggingface_hub",
    "typer",
    "rich",
    "sympy",
    "networkx",
    "fsspec",
    "PIL",
)
"""Packages whose docstrings make the corpus: headscale's dependencies, and theirs where prose is plenty."""

FORMAT = 1  # raise when extraction, cleaning or grouping changes: it is part of the cache key
OPENING_WORDS = 20  # documents that share their first 20 words count as one text: 26 % do (measured)
BODY_CHARS = 4000  # the part of a body that is kept; longer ones are parameter lists

# --- finding docstrings in source text ------------------------------------------------------------

# One alternative per thing that may hold a quote sign, so that the scan stays in step with the source.
_TOKEN = re.compile(
    r"""#[^\n]*"""
    r"""|(?P<prefix>\b[rRuUbBfFtT]{1,2})?(?P<literal>(?P<triple>\"{3}|'{3})(?:[^\\]|\\.)*?(?P=triple))"""
    r"""|"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*'""",
    re.DOTALL,
)
_HEADER_END = re.compile(r":\s*\n\s*\Z")
_DOC_CALL = re.compile(r"\badd_\w*doc\w*\([^)]{0,160}\Z")


def docstrings(source: str) -> Iterator[str]:
    """Every triple-quoted docstring of a module, its classes and functions, and of documenting calls."""
    code = ""  # what stood between literals since the last one, comments left out
    end = 0
    for token in _TOKEN.finditer(source):
        code += source[end : token.start()]
        end = token.end()
        if token.group().startswith("#"):
            continue
        if token["triple"] and _is_docstring(code, source, token.start()):
            text = _evaluate(token["prefix"] or "", token["literal"])
            if text:
                yield text
        code = "x"


def _is_docstring(code: str, source: str, start: int) -> bool:
    """Whether the literal at `start` opens a module or a block, or is handed to a documenting call."""
    if _HEADER_END.search(code) or not code.strip():
        return True
    return bool(_DOC_CALL.search(source[max(0, start - 200) : start]))


def _evaluate(prefix: str, literal: str) -> str:
    """The text of a literal; "" for bytes, f-strings and what does not evaluate."""
    if set(prefix.lower()) & set("bft"):
        return ""
    if "\\" not in literal or "r" in prefix.lower():
        return literal[3:-3]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's docstrings
            text = str(ast.literal_eval(literal))
        text.encode()  # lone surrogates cannot be encoded
    except (SyntaxError, ValueError):
        return ""
    return text


# --- from a docstring to a summary and a body -----------------------------------------------------

_SIGNATURE = re.compile(r"[\w.]+\s*\(.*\)\s*(->.*)?")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z`*\"'(])")
_RULE = re.compile(r"[-=~^*#+]{3,}")
_PLACEHOLDER = re.compile(r"\{[\w.]*\}|%\(\w+\)s")
_WORD = re.compile(r"\w+")


def split_docstring(text: str) -> tuple[str, str] | None:
    """(summary sentence, body), or None where either is too short to mean anything."""
    paragraphs = [p for p in (_clean(part) for part in re.split(r"\n[ \t]*\n", text)) if p]
    while paragraphs and _SIGNATURE.fullmatch(paragraphs[0]):
        paragraphs = paragraphs[1:]
    if not paragraphs:
        return None
    summary, *rest = _SENTENCE_END.split(paragraphs[0], maxsplit=1)
    body = " ".join([*rest, *paragraphs[1:]])[:BODY_CHARS]
    words = len(_WORD.findall(summary))
    if not 3 <= words <= 40 or len(_WORD.findall(body[:400])) < 10:
        return None
    return summary, body


def _clean(paragraph: str) -> str:
    """One paragraph on one line, without interpreter sessions, rulers and template placeholders."""
    lines = (line.strip() for line in paragraph.splitlines())
    kept = (line for line in lines if not line.startswith((">>>", "...")) and not _RULE.fullmatch(line))
    return " ".join(_PLACEHOLDER.sub("", " ".join(kept)).split())


# --- what makes two texts the same ----------------------------------------------------------------


def _normal(text: str) -> str:
    return " ".join(_WORD.findall(text.casefold()))


def text_keys(query: str, document: str) -> tuple[str, str, str]:
    """What makes two pairs the same text: digests of the normalised summary, body and opening words.

    Normalised means case-folded words only. Pairs that share any of the three belong to one group.

    Returns:
        three strings of 16 hexadecimal digits, comparable across positions only where the kind is the same.
    """
    body = _normal(document)
    opening = " ".join(body.split()[:OPENING_WORDS])
    kinds = (("s", _normal(query)), ("b", body), ("o", opening))
    summary_key, body_key, opening_key = (digest(f"{kind}:{text}")[:16] for kind, text in kinds)
    return summary_key, body_key, opening_key


def digest(text: str) -> str:
    """SHA-256 of a text, hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


# --- the packages of an installation --------------------------------------------------------------

_SKIPPED = {
    "tests",
    "test",
    "testing",
    "_vendor",
    "vendor",
    "vendored",
    "idle_test",
    "site-packages",
    "lib2to3",
}


def package_rows(name: str, cache: bool, progress: Callable[[str], None] | None) -> list[Row]:
    """The rows of one package, from the cache where it has them."""
    root = _package_root(name)
    if root is None:
        return []
    stored = cache_dir() / f"docstrings-{name}-{_package_key(name)}.jsonl"
    if cache and (rows := _load_rows(stored)) is not None:
        return rows
    if progress is not None:
        progress(name)
    rows = _scan(root)
    if cache:
        _store_rows(stored, rows)
    return rows


def _package_root(name: str) -> Path | None:
    """The folder of a package's sources, found without importing it; None where it is not installed."""
    if name == "stdlib":
        import sysconfig

        return Path(sysconfig.get_paths()["stdlib"])
    from importlib.util import find_spec

    spec = find_spec(name)
    return Path(spec.origin).parent if spec is not None and spec.origin else None


def _package_key(name: str) -> str:
    """Changes with the package's version, the Python version and the corpus format."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    try:
        own = platform.python_version() if name == "stdlib" else version(_distribution(name))
    except PackageNotFoundError:
        own = "unknown"
    return digest(f"{FORMAT}|{name}|{own}|{platform.python_version()}")[:16]


def _distribution(name: str) -> str:
    return {"PIL": "pillow"}.get(name, name)


def package_versions(packages: Sequence[str] | None = None) -> dict[str, str]:
    """Version of every corpus package that is installed: with `FORMAT`, what the corpus depends on."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in PACKAGES if packages is None else packages:
        try:
            found[name] = platform.python_version() if name == "stdlib" else version(_distribution(name))
        except PackageNotFoundError:
            continue
    return found


def _scan(root: Path) -> list[Row]:
    """The rows of every source file below a folder, in the order of their paths; equal rows once."""
    rows: dict[str, Row] = {}
    for file in sorted(_sources(root), key=lambda path: path.as_posix()):
        try:
            source = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        for docstring in docstrings(source):
            parts = split_docstring(docstring)
            if parts is not None:
                keys = text_keys(*parts)
                rows.setdefault("".join(keys), (*parts, keys))
    return list(rows.values())


def _sources(root: Path) -> Iterator[Path]:
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in _SKIPPED and not name.startswith((".", "__py"))]
        yield from (Path(folder, name) for name in files if name.endswith(".py"))


# --- the cache ------------------------------------------------------------------------------------


def cache_dir() -> Path:
    """`HEADSCALE_CACHE`, else `headscale` below `XDG_CACHE_HOME` or `~/.cache`."""
    if own := os.environ.get("HEADSCALE_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "headscale"


def _load_rows(path: Path) -> list[Row] | None:
    """Rows from the cache; None where there are none or the file cannot be trusted."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        rows: list[Row] = []
        for line in lines[1:]:
            summary, body, keys = json.loads(line)
            rows.append((summary, body, (keys[0], keys[1], keys[2])))
    except (OSError, ValueError, IndexError, TypeError):
        return None
    return rows if lines and lines[0] == str(len(rows)) else None


def _store_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write the cache in one step: no reader meets half a file, and a full disk costs only the cache."""
    text = "\n".join([str(len(rows)), *(json.dumps(row) for row in rows)]) + "\n"
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        Path(temporary).replace(path)
    except OSError:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
