"""A tokenizer of made-up words for `tiny_models`, and pairs whose query is a part of its document."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from tiny_models import VOCAB

SPECIAL = ["[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]"]  # the ids that tiny_models' configurations name


@dataclass(frozen=True)
class Example:
    query: str
    document: str
    negatives: tuple[str, ...] = ()
    scores: tuple[float, ...] = ()


def tiny_tokenizer(vocab: int = VOCAB) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = SPECIAL + [f"w{i}" for i in range(vocab - len(SPECIAL))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 0), ("[SEP]", 2)]
    )
    names = {"cls": "[CLS]", "pad": "[PAD]", "sep": "[SEP]", "unk": "[UNK]", "mask": "[MASK]"}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=64, **{f"{k}_token": v for k, v in names.items()}
    )


def tiny_pairs(count: int = 40, *, negatives: int = 0, vocab: int = VOCAB, seed: int = 1) -> list[Example]:
    """Documents of 6 to 14 words, queries of 3 of them, negatives and teacher scores drawn at random."""
    source = random.Random(seed)

    def text(length: int) -> list[str]:
        return [f"w{source.randrange(vocab - len(SPECIAL))}" for _ in range(length)]

    pairs = []
    for _ in range(count):
        document = text(source.randint(6, 14))
        pairs.append(
            Example(
                query=" ".join(source.sample(document, 3)),
                document=" ".join(document),
                negatives=tuple(" ".join(text(source.randint(6, 14))) for _ in range(negatives)),
                scores=tuple(source.gauss(0, 2) for _ in range(1 + negatives)) if negatives else (),
            )
        )
    return pairs
