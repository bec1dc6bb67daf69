import ast
import sys
import sysconfig
from pathlib import Path

import pytest

from headscale import docstrings as scanning
from headscale import texts
from headscale.docstrings import PACKAGES, docstrings, split_docstring, text_keys
from headscale.errors import UsageError
from headscale.texts import Pair, builtin_pairs, builtin_texts, corpus_fingerprint, group_ids

FEW = ("stdlib", "numpy")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """One cache for the module, away from the user's own."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("HEADSCALE_CACHE", str(folder))
        yield folder


# --- the scan --------------------------------------------------------------------------------------


def ast_docstrings(source: str) -> list[str]:
    """The oracle: triple-quoted docstrings, as the parser sees them."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.body:
            text = ast.get_docstring(node, clean=False)
            segment = ast.get_source_segment(source, node.body[0]) or ""
            if text and segment.lstrip("rRuU")[:3] in ('"""', "'''"):
                found.append(text)
    return sorted(found)


@pytest.mark.parametrize("package", ["json", "unittest", "email", "asyncio", "logging", "xml"])
def test_the_scan_finds_what_the_parser_finds(package):
    folder = Path(sysconfig.get_paths()["stdlib"]) / package
    files = [f for f in sorted(folder.rglob("*.py")) if "test" not in f.relative_to(folder).parts]
    sources = [file.read_text(encoding="utf-8") for file in files]
    expected = [text for source in sources for text in ast_docstrings(source)]
    got = [text for source in sources for text in sorted(docstrings(source))]
    missing, invented = set(expected) - set(got), set(got) - set(expected)
    assert len(expected) > 10
    assert not missing
    assert not invented


def test_quotes_in_comments_and_strings_do_not_derail_the_scan():
    source = '''# it's """ a trap
x = 'also """ one'
def f(a="'''
    source += '''", b=':'):  # don't
    """Take the bait."""
    return """not
    a docstring"""
class C:
    # a comment's apostrophe
    r"""Keep \\d raw."""
    y = f"""no {x}"""
    def g(self):
        f"""Not a docstring."""
'''
    assert list(docstrings(source)) == ["Take the bait.", "Keep \\d raw."]


def test_documenting_calls_count_as_docstrings():
    source = 'add_newdoc("numpy.core", "abs",\n    """Absolute value.""")\nadd_docstr(torch.exp, r"""Exponential.""")'
    assert list(docstrings(source)) == ["Absolute value.", "Exponential."]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Too short.\n\nA body that is long enough to be kept as a document, clearly, I think.", None),
        ("A summary of four words.\n\nShort body.", None),
        (
            "abs(x) -> Tensor\n\nReturn the absolute value. Each element is replaced by its own absolute\nvalue here.\n"
            "\nNotes\n-----\n>>> abs(-1)\n1",
            ("Return the absolute value.", "Each element is replaced by its own absolute value here. Notes 1"),
        ),
    ],
)
def test_summary_and_body(text, expected):
    assert split_docstring(text) == expected


# --- grouping and splitting ------------------------------------------------------------------------


def test_grouping_is_transitive():
    a, b, c, d = ("s1", "o1"), ("s1", "o2"), ("s2", "o2"), ("s3", "o3")
    assert group_ids([a, d, c, b]) == [0, 1, 0, 0]
    assert group_ids([c, a, d, b]) == [0, 0, 2, 0]


def test_grouping_agrees_with_connected_components():
    import numpy as np
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    rng = np.random.default_rng(0)
    keys = rng.integers(0, 260, size=(300, 2))
    left = np.repeat(np.arange(300), 2)
    graph = coo_array((np.ones(600), (left, 300 + keys.ravel())), shape=(560, 560))
    _, labels = connected_components(graph, directed=False)
    ours = group_ids([[str(k) for k in row] for row in keys])
    assert len({(a, b) for a, b in zip(ours, labels[:300], strict=True)}) == len(set(ours)) == len(set(labels[:300]))


def test_keys_ignore_case_punctuation_and_what_follows_20_words():
    body = " ".join(f"word{i}" for i in range(30))
    one = text_keys("Compute the mean.", body)
    assert text_keys("compute THE  mean", body.upper() + "!") == one
    other = text_keys("Compute the median.", body + " and more")
    assert [a == b for a, b in zip(one, other, strict=True)] == [False, False, True]


def test_no_group_crosses_the_splits(cache):
    owner: dict[str, str] = {}
    for split in ("train", "dev", "test"):
        rows = texts._rows(split, FEW, True, None)
        for key in {key for row in rows for key in row[2]}:
            assert owner.setdefault(key, split) == split
    assert len(owner) > 1000


def test_splits_have_their_shares_and_no_text_twice(cache):
    pairs = {split: builtin_pairs(split, packages=FEW) for split in ("train", "dev", "test")}
    total = sum(map(len, pairs.values()))
    # 80 / 10 / 10, less what pretraining saw; the binomial standard deviation is below 1 % of the total
    assert 0.74 < len(pairs["train"]) / total < 0.92
    every = [pair for part in pairs.values() for pair in part]
    assert len({pair.query for pair in every}) == len({pair.document for pair in every}) == len(every)
    assert all(len(pair.document) <= texts.DOCUMENT_CHARS and pair.query and pair.document for pair in every)


def test_nothing_the_bundled_models_saw_is_in_dev_or_test(cache):
    seen = texts._pretrained_keys()
    assert len(seen) > 10_000
    for split in ("dev", "test"):
        for pair in builtin_pairs(split, packages=FEW):
            summary, _, _ = text_keys(pair.query, pair.document)
            assert summary[:8] not in seen


def test_the_corpus_is_deterministic_and_cached(cache):
    calls: list[str] = []
    first = builtin_pairs("dev", packages=["numpy"], cache=False, progress=calls.append)
    assert calls == ["numpy"]
    builtin_pairs("dev", packages=["numpy"])
    again = builtin_pairs("dev", packages=["numpy"], progress=calls.append)
    assert calls == ["numpy"]
    assert again == first
    assert corpus_fingerprint(again) == corpus_fingerprint(first) != corpus_fingerprint(first[::-1])


@pytest.mark.parametrize("damage", [b"", b"3\n[1", b"\xff\xfe", b'5\n["a", "b", ["c", "d", "e"]]\n'])
def test_a_damaged_cache_is_read_again(tmp_path, monkeypatch, damage):
    monkeypatch.setenv("HEADSCALE_CACHE", str(tmp_path))
    expected = builtin_pairs("test", packages=["typer"])
    (stored,) = tmp_path.iterdir()
    whole = stored.read_bytes()
    stored.write_bytes(damage)
    assert builtin_pairs("test", packages=["typer"]) == expected
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [whole]


def test_a_failed_write_leaves_the_cache_as_it_was(tmp_path, monkeypatch):
    monkeypatch.setenv("HEADSCALE_CACHE", str(tmp_path))

    def refuse(self, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", refuse)
    assert builtin_texts("train", packages=["rich"])
    assert list(tmp_path.iterdir()) == []


def test_the_cache_follows_the_environment(monkeypatch):
    monkeypatch.delenv("HEADSCALE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert scanning.cache_dir() == Path("/somewhere/headscale")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert scanning.cache_dir() == Path.home() / ".cache" / "headscale"


def test_no_package_is_imported(cache):
    import subprocess

    code = (
        "import sys; from headscale.texts import builtin_texts; builtin_texts('test', packages=['numpy', 'typer']);"
        "print(sorted({'numpy', 'typer', 'torch', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_unknown_names_are_usage_errors():
    with pytest.raises(UsageError, match=r"^unknown split `valid`$"):
        builtin_pairs("valid")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"^unknown package `nope`$") as caught:
        builtin_pairs(packages=["numpy", "nope"])
    assert caught.value.hint == f"choose from {', '.join(PACKAGES)}"


def test_the_fingerprint_sees_the_teacher():
    pair = Pair("q", "d", ("n",))
    scored = Pair("q", "d", ("n",), (2.0, 1.0))
    assert len({corpus_fingerprint([one]) for one in (pair, scored, Pair("q", "d", ("n",), (1.0, 2.0)))}) == 3
