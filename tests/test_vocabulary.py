"""Vocabularies read from files against the tokenizers they make, and their redundancy by comparing every two terms."""

from __future__ import annotations

import json
import random
import string
from pathlib import Path
from typing import Any

import pytest
from tiny_models import tiny_checkpoint, tiny_model, tiny_tokenizer

from headscale.checkpoint import open_checkpoint
from headscale.errors import UnreadableError
from headscale.vocabulary import Vocabulary, read_vocabulary, tokenizer_vocabulary, vocabulary_statistics

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

TEXT = [
    "The model reads the text, and The text reads (the) model.",
    "Straße, naïve café; ÜBER über 東京 e=mc2 snake_case __init__ naïve.",
    "tokens Tokens TOKENS token. a-b a_b a.b -- !! the the",
] * 4


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint without any tokenizer."""
    directory = tmp_path_factory.mktemp("weights")
    tiny_model("bert").save_pretrained(directory)
    return directory


def beside(weights: Path, directory: Path) -> Path:
    for file in weights.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    return directory


def read(directory: Path, rows: int) -> Vocabulary:
    with open_checkpoint(directory) as checkpoint:
        found = read_vocabulary(checkpoint, rows)
    assert found is not None
    return found


# --- three families of tokenizers ----------------------------------------------------------------------------------


def word_pieces() -> Any:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[unused0]", "[unused1]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = tokenizers.trainers.WordPieceTrainer(vocab_size=150, special_tokens=special)
    tokenizer.train_from_iterator(TEXT, trainer)
    kind = transformers.PreTrainedTokenizerFast
    return kind(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", mask_token="[MASK]", cls_token="[CLS]"
    )


def byte_pairs() -> Any:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=340, special_tokens=["<s>", "<pad>", "</s>"], initial_alphabet=alphabet
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.add_tokens(["  ", "added"])
    kind = transformers.PreTrainedTokenizerFast
    return kind(tokenizer_object=tokenizer, bos_token="<s>", pad_token="<pad>", eos_token="</s>")


def unigrams() -> Any:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    trainer = tokenizers.trainers.UnigramTrainer(
        vocab_size=120, special_tokens=["<s>", "<pad>", "</s>", "<unk>"], unk_token="<unk>"
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    kind = transformers.PreTrainedTokenizerFast
    return kind(tokenizer_object=tokenizer, bos_token="<s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


FAMILIES = {"wordpiece": word_pieces, "byte-level": byte_pairs, "unigram": unigrams, "words": tiny_tokenizer}


@pytest.mark.parametrize("family", FAMILIES)
def test_files_say_what_the_tokenizer_says(family: str, weights: Path, tmp_path: Path) -> None:
    tokenizer = FAMILIES[family]()
    tokenizer.save_pretrained(beside(weights, tmp_path))
    rows = len(tokenizer) + 5
    found = read(tmp_path, rows)
    assert found == tokenizer_vocabulary(tokenizer, rows)
    assert found == tokenizer_vocabulary(transformers.AutoTokenizer.from_pretrained(tmp_path), rows)
    assert len(found.tokens) == rows
    table = tokenizer.get_vocab()
    assert all(found.tokens[i] == token for token, i in table.items())
    unused = {i for t, i in table.items() if t.startswith("[unused")}
    assert found.unused_ids == set(range(len(tokenizer), rows)) | unused
    named = {"[SEP]"} & set(table)  # special without a role of its own
    assert found.special_ids == set(tokenizer.all_special_ids) | {table[t] for t in named}


def test_a_tokenizer_with_more_ids_than_the_head_has_rows() -> None:
    found = tokenizer_vocabulary(tiny_tokenizer(), 100)
    assert (len(found.tokens), found.unused_ids) == (131, frozenset())


# --- files of older libraries --------------------------------------------------------------------------------------

WORDS = ["[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "##s", "café", "The"]


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
@pytest.mark.parametrize("settings", [None, {"do_lower_case": True}, {"cls_token": {"content": "[CLS]"}}])
def test_a_vocab_txt(settings: dict[str, Any] | None, line_end: str, weights: Path, tmp_path: Path) -> None:
    beside(weights, tmp_path)
    (tmp_path / "vocab.txt").write_bytes((line_end.join(WORDS) + line_end).encode())
    if settings is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    if settings and "cls_token" in settings:
        roles = {"pad_token": "[PAD]", "unk_token": "[UNK]", "sep_token": "[SEP]", "mask_token": {"content": "[MASK]"}}
        (tmp_path / "special_tokens_map.json").write_text(json.dumps(roles))
    found = read(tmp_path, 12)
    assert found.tokens[:10] == tuple(WORDS)
    assert found.special_ids >= {0, 2, 3, 4, 5}
    assert found.special_ids <= {0, 2, 3, 4, 5, 1}  # 1 where the configuration alone names the padding
    assert found.unused_ids | found.special_ids == {0, 1, 2, 3, 4, 5, 10, 11}
    assert vocabulary_statistics(found).cased


def test_a_vocab_json_with_added_tokens(weights: Path, tmp_path: Path) -> None:
    beside(weights, tmp_path)
    (tmp_path / "vocab.json").write_text(json.dumps({"<s>": 0, "a": 1, "\u0120a": 2}))
    (tmp_path / "merges.txt").write_text("")
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<new>": 3}))
    decoder = {"0": {"content": "<s>", "special": True}, "4": {"content": "<extra>", "special": False}}
    roles = {"additional_special_tokens": ["<new>"], "added_tokens_decoder": decoder}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(roles))
    found = read(tmp_path, 6)
    assert found == Vocabulary(("<s>", "a", "\u0120a", "<new>", "<extra>", ""), frozenset({0, 3}), frozenset({5}))


def test_without_tokenizer_files(weights: Path) -> None:
    with open_checkpoint(weights) as checkpoint:
        assert read_vocabulary(checkpoint, 131) is None


DAMAGED = {
    "not UTF-8": ("vocab.txt", "café".encode("latin-1")),
    "not JSON": ("tokenizer.json", b'{"model": {'),
    "a list": ("tokenizer.json", b"[1, 2]"),
    "no ids": ("tokenizer.json", b'{"model": {"vocab": {"a": 0}}, "added_tokens": [{"content": "b"}]}'),
    "text for ids": ("tokenizer.json", b'{"model": {"vocab": {"a": "x"}}}'),
    "a number for a vocabulary": ("tokenizer.json", b'{"model": {"vocab": 7}}'),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_files(kind: str, weights: Path, tmp_path: Path) -> None:
    name, content = DAMAGED[kind]
    (beside(weights, tmp_path) / name).write_bytes(content)
    with open_checkpoint(tmp_path) as checkpoint, pytest.raises(UnreadableError) as error:
        read_vocabulary(checkpoint, 131)
    assert error.value.hint


# --- statistics, against a comparison of every two terms -----------------------------------------------------------


def vocabulary(terms: list[str], special: int = 0) -> Vocabulary:
    names = [f"<s{i}>" for i in range(special)]
    return Vocabulary((*names, *terms), frozenset(range(special)), frozenset())


def brute(terms: list[str], same: Any) -> float:
    hits = [any(i != j and same(a, b) for j, b in enumerate(terms)) for i, a in enumerate(terms)]
    return sum(hits) / len(terms)


def unmarked(term: str, mark: str) -> str:
    bare = term[len(mark) :] if term.startswith(mark) else term
    return bare or term


def stripped(term: str, mark: str) -> str:
    """The term with its mark kept and ASCII punctuation around it gone."""
    kept = mark if term.startswith(mark) and term != mark else ""
    return kept + (term[len(kept) :].strip(string.punctuation) or term[len(kept) :])


MARKS = {"##": "##", "\u2581": "\u2581", "\u0120": " "}  # as stored: as it reads


@pytest.mark.parametrize("stored", MARKS)
def test_shares_by_brute_force(stored: str) -> None:
    source = random.Random(stored)
    words = [
        "the",
        "The",
        "THE",
        "cat",
        "Cat",
        "dog",
        "x",
        "(x",
        "x)",
        ".",
        "...",
        "naive",
        "NAIVE",
        "can't",
        "a_b",
        "ab",
    ]
    terms = sorted(
        {source.choice(["", stored]) + source.choice(words) + source.choice(["", ".", ",", ""]) for _ in range(60)}
    )
    found = vocabulary_statistics(vocabulary(terms, special=3))
    mark = MARKS[stored]
    shown = [t.replace(stored, mark) for t in terms]
    assert (found.size, found.special, found.unused) == (len(terms) + 3, 3, 0)
    assert found.uppercase_share == pytest.approx(sum(t != t.lower() for t in shown) / len(shown))
    assert found.cased
    assert found.case_variant_share == pytest.approx(brute(shown, lambda a, b: a.lower() == b.lower()))
    assert found.space_variant_share == pytest.approx(brute(shown, lambda a, b: unmarked(a, mark) == unmarked(b, mark)))
    assert found.punctuation_variant_share == pytest.approx(
        brute(shown, lambda a, b: stripped(a, mark) == stripped(b, mark))
    )

    def alike(a: str, b: str) -> bool:
        return stripped(unmarked(a.lower(), mark), mark) == stripped(unmarked(b.lower(), mark), mark)

    assert found.variant_share == pytest.approx(brute(shown, alike))
    assert found.variant_share > found.case_variant_share > 0


def test_byte_level_text_is_read_as_text() -> None:
    encoded = ["stra\u00c3\u0141e", "\u0120Stra\u00c3\u0141e", "\u0120a", "b"]  # "straße" and " Straße" in stand-ins
    found = vocabulary_statistics(vocabulary(encoded))
    assert found.variant_share == 0.5
    assert found.uppercase_share == 0.25


def test_a_word_start_that_looks_like_a_byte_is_none() -> None:
    """Maltese writes the letter that byte-level vocabularies use for a space."""
    terms = ["\u2581\u0120arra", "\u2581dar", "\u2581a", "arra"]
    assert vocabulary_statistics(vocabulary(terms)).space_variant_share == 0.0


def test_vowel_signs_are_no_punctuation() -> None:
    terms = ["\u0915", "\u0915\u093e", "\u0915\u0940", "\u0915\u0964"]  # ka, kaa, kii, and ka with a full stop
    assert vocabulary_statistics(vocabulary(terms)).punctuation_variant_share == 0.5


def test_an_uncased_vocabulary() -> None:
    found = vocabulary_statistics(vocabulary(["a", "##a", "b", "c"], special=2))
    assert (found.cased, found.uppercase_share, found.case_variant_share) == (False, 0.0, 0.0)
    assert found.space_variant_share == found.variant_share == 0.5


@pytest.mark.parametrize("terms", [[], ["##"], ["\u2581", "##", "."], ["\u0120"]])
def test_nothing_to_compare(terms: list[str]) -> None:
    found = vocabulary_statistics(vocabulary(terms))
    assert (found.variant_share, found.cased) == (0.0, False)


def test_a_quarter_of_a_million_terms_take_seconds() -> None:
    terms = [f"{mark}{chr(97 + i % 26)}{i}" for i in range(125_000) for mark in ("", "\u2581")]
    assert vocabulary_statistics(vocabulary(terms)).variant_share == 1.0


def test_inspect_reads_the_same_rows_apart_as_memory(tmp_path: Path) -> None:
    from headscale.backbone import load_backbone
    from headscale.inspection import inspect_weights, measure_weights

    tiny_checkpoint("bert", tmp_path)
    disk, memory = inspect_weights(tmp_path), measure_weights(load_backbone(tmp_path))
    assert disk.vocabulary == memory.vocabulary
    assert disk.weights.special_rows == memory.weights.special_rows == 5
    assert disk.weights.special_row_norm_mean == pytest.approx(memory.weights.special_row_norm_mean, rel=1e-12)
