"""What every command does before and after its work: the program object, the first line, texts, errors kept apart."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from headscale import __version__
from headscale.environment import launched_rank
from headscale.errors import HeadscaleError, UsageError
from headscale.render import Voice

if TYPE_CHECKING:
    from headscale.api import Loading
    from headscale.inspection import Texts
    from headscale.records import Profile

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Measure and calibrate the MLM-head scale of a backbone before training a SPLADE retriever on it.",
)
state: dict[str, Any] = {"debug": False, "saved": None, "command": None, "silent": False}


def begin(sentence: str, quiet: bool, debug: bool, saved: Path | None) -> Voice:
    """The first line, at once: what follows imports for seconds."""
    state.update(debug=debug, saved=saved)
    voice = Voice(quiet=quiet or launched_rank() > 0, errors=[])  # of several processes the first one alone speaks
    voice.note(f"headscale {__version__}: {sentence}")
    return voice


def loading_with(voice: Voice, revision: str | None, trust: bool, device: str, spectral: bool) -> Loading:
    """How backbones are opened, as the options say."""
    from headscale.api import Loading

    return Loading(revision=revision, trust_remote_code=trust, device=device, spectral=spectral, tell=voice.note)


def watched(loading: Loading, bar: Callable[[int, int], None]) -> Loading:
    """The same, with a bar that follows the batches."""
    from dataclasses import replace

    return replace(loading, on_batch=bar)


def texts_from_options(
    texts: Path | None, pairs: str | None, count: int, query_length: int, document_length: int, voice: Voice
) -> Texts:
    """The pairs to measure on: a file of pairs, a file of texts, or the built-in docstrings."""
    from headscale.activations import CANDIDATES, Encoding
    from headscale.inspection import built_in_texts, halves, texts_of
    from headscale.texts import read_pairs, read_texts

    if texts is not None and pairs is not None:
        raise UsageError("`--texts` and `--pairs` exclude each other", hint="give the one that holds your data")
    encoding = Encoding(query_length, document_length, CANDIDATES)
    if pairs is not None:
        return texts_of(read_pairs(pairs, limit=count), str(pairs), encoding)
    if texts is not None:
        voice.note("plain texts: the first third of each asks for the rest of it")
        return texts_of(halves(read_texts(texts, limit=count)), str(texts), encoding)
    return built_in_texts(
        pairs=count,
        query_length=query_length,
        document_length=document_length,
        tell=lambda name: voice.note(f"reading docstrings of {name}"),
    )


def attempt(compute: Callable[[], Any], voice: Voice, subject: str) -> Any:
    """A result, or None with the error said: the other backbones still count."""
    try:
        return compute()
    except UsageError:
        raise
    except HeadscaleError as error:
        if state["debug"]:
            raise
        voice.error(error, subject)
        return None


def reference_or_none(find: Callable[[], Profile], voice: Voice) -> Profile | None:
    """The reference for a comparison; without one, the backbones are still measured."""
    try:
        return find()
    except UsageError:
        raise
    except HeadscaleError as error:
        voice.error(error, "reference")
        return None
