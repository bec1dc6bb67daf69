"""`inspect`: everything that can be measured of one backbone, from its weights alone or with texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from headscale.activations import (
    CANDIDATES,
    DEFAULT_ENCODING,
    DOCUMENT_LENGTH,
    QUERY_LENGTH,
    Encoding,
    Observation,
    gradient_norms,
    observe,
    output_statistics,
    scale_curve,
)
from headscale.diagnosis import judge
from headscale.errors import UsageError
from headscale.norms import loaded_weight_statistics, stored_weight_statistics
from headscale.records import Inspection, TextSettings
from headscale.stored import read_head
from headscale.vocabulary import read_vocabulary, tokenizer_vocabulary, vocabulary_statistics

if TYPE_CHECKING:
    from headscale.backbone import Backbone
    from headscale.texts import Pair

BUILT_IN_PAIRS = 128  # four batches of 32: the loss at step 0 is then known to about 3 % (sd over batches, measured)
BUILT_IN_PACKAGES = ("stdlib", "numpy", "pandas", "scipy")  # scanned in seconds, where torch alone takes half a minute
# Half-octaves from 2^-14 to 2^6: wider than any constant in use (1/512 to 16, and the 1/1265 of a toy).
CURVE_SCALES = tuple(2.0 ** (i / 2) for i in range(-28, 13))

Batches = Callable[[int, int], None]


@dataclass(frozen=True)
class Texts:
    """The pairs of a measurement and what identifies them."""

    pairs: Sequence[Pair]
    settings: TextSettings

    @property
    def encoding(self) -> Encoding:
        """Lengths and batch size."""
        return Encoding(self.settings.query_length, self.settings.document_length, self.settings.batch_size)


@dataclass
class Measured:
    """An inspection with what it was made from, for a calibration that goes on with it."""

    inspection: Inspection
    backbone: Backbone | None = None
    seen: Observation | None = None
    texts: Texts | None = None


def built_in_texts(
    *,
    pairs: int = BUILT_IN_PAIRS,
    query_length: int = QUERY_LENGTH,
    document_length: int = DOCUMENT_LENGTH,
    batch_size: int = CANDIDATES,
    tell: Callable[[str], None] | None = None,
) -> Texts:
    """The built-in docstring pairs of the development split; no bundled model was trained on them."""
    from headscale.texts import builtin_pairs

    found = builtin_pairs("dev", packages=BUILT_IN_PACKAGES, progress=tell)[:pairs]
    return texts_of(found, "built-in", Encoding(query_length, document_length, batch_size))


def texts_of(pairs: Sequence[Pair], source: str, encoding: Encoding = DEFAULT_ENCODING) -> Texts:
    """Pairs with their identity: where they came from, their fingerprint, how they are cut."""
    from headscale.texts import corpus_fingerprint

    settings = TextSettings(
        source=source,
        fingerprint=corpus_fingerprint(pairs),
        pairs=len(pairs),
        query_length=encoding.query_length,
        document_length=encoding.document_length,
        batch_size=encoding.batch_size,
    )
    return Texts(pairs, settings)


def halves(texts: Sequence[str]) -> list[Pair]:
    """Pairs from plain texts: the first third of the words asks for the rest of the same text."""
    from headscale.texts import Pair

    made = []
    for text in texts:
        words = text.split()
        cut = max(1, len(words) // 3)
        made.append(Pair(" ".join(words[:cut]), " ".join(words[cut:]) or text))
    return made


def inspect_weights(
    name: str | Path, *, revision: str | None = None, spectral: bool = False, tell: Callable[[str], None] | None = None
) -> Inspection:
    """Norms and vocabulary of a checkpoint from its files alone; neither the backbone nor torch is loaded.

    Args:
        name: a directory, `bundled:NAME` or a hub id, of which only the head's tensors are read.
        revision: branch, tag or commit of a hub id.
        spectral: add singular values.
        tell: told what is fetched.

    Raises:
        HeadscaleError: the checkpoint or its head cannot be read.
    """
    from headscale.checkpoint import open_checkpoint

    with open_checkpoint(name, revision=revision, on_progress=tell) as checkpoint:
        stored = read_head(checkpoint)
        vocabulary = read_vocabulary(checkpoint, stored.head.vocab_size)
        weights = stored_weight_statistics(
            checkpoint,
            stored,
            special_ids=vocabulary.special_ids if vocabulary else (),
            unused_ids=vocabulary.unused_ids if vocabulary else (),
            spectral=spectral,
        )
        return Inspection(
            name=str(name),
            revision=checkpoint.revision,
            head=stored.head,
            weights=weights,
            vocabulary=vocabulary_statistics(vocabulary) if vocabulary else None,
            texts=None,
            logits=None,
            output=None,
            curve=None,
            gradients=None,
            verdict=judge(None, None),
            warnings=stored.warnings,
            bytes_read=checkpoint.bytes_read,
        )


def measure_weights(backbone: Backbone, *, spectral: bool = False) -> Inspection:
    """Norms and vocabulary of a loaded backbone, without running a text.

    Args:
        backbone: from `load_backbone` or `handed_over`; the vocabulary is left out without a tokenizer.
        spectral: add singular values.
    """
    loaded, tokenizer = backbone.loaded, backbone.tokenizer
    vocabulary = None if tokenizer is None else tokenizer_vocabulary(tokenizer, loaded.vocab_size)
    return Inspection(
        name=backbone.name,
        revision=backbone.revision,
        head=loaded.head,
        weights=loaded_weight_statistics(
            loaded,
            special_ids=vocabulary.special_ids if vocabulary else (),
            unused_ids=vocabulary.unused_ids if vocabulary else (),
            spectral=spectral,
        ),
        vocabulary=vocabulary_statistics(vocabulary) if vocabulary else None,
        texts=None,
        logits=None,
        output=None,
        curve=None,
        gradients=None,
        verdict=judge(None, None),
        warnings=tuple(backbone.warnings),
    )


def measure(
    backbone: Backbone,
    texts: Texts,
    *,
    spectral: bool = False,
    is_reference: bool = False,
    on_batch: Batches | None = None,
) -> Measured:
    """Weights, outputs, gradients and verdict of a loaded backbone, from one forward pass over the texts.

    Args:
        backbone: from `load_backbone` or `handed_over`; left as it was.
        texts: the pairs to run.
        spectral: add singular values.
        is_reference: whether the verdict of a healthy one is `reference`.
        on_batch: called with (batches done, batches in all).

    Raises:
        HeadscaleError: the backbone has no tokenizer, or the texts cannot be run.
    """
    loaded = backbone.loaded
    if backbone.tokenizer is None:
        raise UsageError(f"`{backbone.name}` has no tokenizer to run texts with", hint="pass the model's tokenizer too")
    weights = measure_weights(backbone, spectral=spectral)  # first: they are at once there, and refuse what is broken
    vocabulary = tokenizer_vocabulary(backbone.tokenizer, loaded.vocab_size)
    seen = observe(loaded, backbone.tokenizer, texts.pairs, texts.encoding, on_batch=on_batch)
    output = output_statistics(seen, token=lambda i: vocabulary.tokens[i])
    curve = scale_curve(seen, CURVE_SCALES)
    verdict = judge(output, curve, is_reference=is_reference)
    inspection = replace(
        weights,
        texts=texts.settings,
        logits=seen.logits,
        output=output,
        curve=curve,
        gradients=gradient_norms(loaded, backbone.tokenizer, texts.pairs, texts.encoding),
        verdict=verdict,
    )
    return Measured(inspection, backbone, seen, texts)
