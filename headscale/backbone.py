"""Load a backbone whole, with its tokenizer and its head, and refuse one whose head would be random."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headscale.errors import HeadscaleError, NoHeadError, UnreadableError, UnsupportedHeadError
from headscale.layouts import layout_for
from headscale.records import Head
from headscale.stored import StoredHead, read_head

if TYPE_CHECKING:
    from headscale.checkpoint import Checkpoint
    from headscale.head import LoadedHead

Progress = Callable[[str], None]


@dataclass
class Backbone:
    """A model in memory with what is known about where it came from."""

    name: str
    loaded: LoadedHead
    tokenizer: Any
    revision: str | None = None
    directory: Path | None = None  # where the checkpoint lies, None for a model handed over in memory
    stored: StoredHead | None = None
    warnings: list[str] = field(default_factory=list)

    @property
    def model(self) -> Any:
        """The model itself."""
        return self.loaded.model

    @property
    def head(self) -> Head:
        """Where its head is."""
        return self.loaded.head


def local_copy(checkpoint: Checkpoint, *, on_progress: Progress | None = None, **hub_options: Any) -> Path:
    """The folder of a checkpoint's model on this machine, fetched whole from the hub where it must be."""
    if checkpoint.directory is not None and (checkpoint.origin != "cache" or _has_tokenizer(checkpoint)):
        return checkpoint.directory
    from headscale.hub import snapshot

    root = snapshot(checkpoint.name, revision=checkpoint.revision, on_progress=on_progress, **hub_options)
    return root / checkpoint.subfolder


def _has_tokenizer(checkpoint: Checkpoint) -> bool:
    """Whether a cached snapshot, which may hold the weights alone, can be used as it is."""
    names = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "sentencepiece.bpe.model")
    return any(checkpoint.has_file(name) for name in names)


def load_backbone(
    name: str | Path,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    device: str = "cpu",
    tokenizer: bool = True,
    on_progress: Progress | None = None,
) -> Backbone:
    """Load a masked (or causal) language model in fp32, its tokenizer and its head.

    Args:
        name: a directory, `bundled:NAME` or a hub id.
        revision: branch, tag or commit of a hub id.
        trust_remote_code: run the repository's own modelling code.
        device: where the model goes.
        tokenizer: whether to load it; None otherwise.
        on_progress: told in words what is fetched.

    Raises:
        NotFoundError: no such checkpoint, or no tokenizer with it.
        NoHeadError: the head is not in the checkpoint.
        UnsupportedHeadError: the head cannot serve SPLADE.
        UnreadableError: the files cannot be loaded.
    """
    from headscale.checkpoint import open_checkpoint
    from headscale.head import load_head

    with open_checkpoint(name, revision=revision, on_progress=on_progress) as checkpoint:
        known = layout_for(checkpoint.config) is not None
        stored = read_head(checkpoint) if known else None
        directory = local_copy(checkpoint, on_progress=on_progress)
        model, random = _model(checkpoint, directory, trust_remote_code, stored)
        loaded = load_head(model.to(device))
        return Backbone(
            name=str(name),
            loaded=loaded,
            tokenizer=_tokenizer(checkpoint, directory, trust_remote_code) if tokenizer else None,
            revision=checkpoint.revision,
            directory=directory,
            stored=stored,
            warnings=[*(stored.warnings if stored else ()), *random],
        )


def handed_over(model: Any, tokenizer: Any, name: str | None = None) -> Backbone:
    """A backbone from a model and tokenizer that the caller has in memory already."""
    from headscale.head import load_head
    from headscale.stored import refusal

    reason = refusal(model.config.to_dict())
    if reason:
        raise UnsupportedHeadError(
            f"`{type(model).__name__}` cannot serve SPLADE: {reason}", hint="give a masked language model of text"
        )
    title = name or getattr(model.config, "name_or_path", "") or type(model).__name__
    return Backbone(name=title, loaded=load_head(model), tokenizer=tokenizer)


def _model(
    checkpoint: Checkpoint, directory: Path, trust_remote_code: bool, stored: StoredHead | None
) -> tuple[Any, list[str]]:
    """The model in evaluation mode, and what of its encoder the loader had to make up, in a sentence."""
    import torch
    import transformers

    config = checkpoint.config
    if stored is None and not trust_remote_code and "auto_map" in config:
        raise UnsupportedHeadError(
            f"`{checkpoint.name}` brings its own modelling code, which is not run unasked",
            hint="read it, then pass `--trust-remote-code`",
        )
    causal = any(a.endswith("ForCausalLM") for a in config.get("architectures") or [])
    auto = transformers.AutoModelForCausalLM if causal else transformers.AutoModelForMaskedLM
    try:
        with quiet():
            model, info = auto.from_pretrained(
                directory, dtype=torch.float32, output_loading_info=True, trust_remote_code=trust_remote_code
            )
    except HeadscaleError:
        raise
    except Exception as error:
        raise UnreadableError(
            f"transformers cannot load `{checkpoint.name}`: {first_line(error)}",
            hint="check that the checkpoint is complete and that this transformers knows its model type",
        ) from error
    made_up = sorted(key for key in info["missing_keys"] if key.endswith("weight"))
    inside = [key for key in made_up if key.startswith(f"{model.base_model_prefix}.")]
    if stored is None and len(inside) < len(made_up):
        _refuse_random_head(checkpoint, [key for key in made_up if key not in inside])
    return model.eval(), [_random_encoder(inside)] if inside else []


def _refuse_random_head(checkpoint: Checkpoint, missing: list[str]) -> None:
    """For a layout not known on disk: nothing outside the backbone may have been initialised by the loader."""
    names = ", ".join(f"`{m}`" for m in missing[:4])
    raise NoHeadError(
        f"`{checkpoint.name}` carries no trained MLM head: {names} would be initialised at random",
        hint="give the checkpoint of the masked language model it was made from",
    )


def _random_encoder(missing: list[str]) -> str:
    return (
        f"{len(missing)} tensors of the encoder are not in the checkpoint, among them `{missing[0]}`: they were "
        "initialised at random, and what is measured of the outputs is worth as much"
    )


def _tokenizer(checkpoint: Checkpoint, directory: Path, trust_remote_code: bool) -> Any:
    import transformers

    folders: Sequence[Path] = (directory, directory.parent) if checkpoint.subfolder else (directory,)
    problem: Exception | None = None
    for folder in folders:
        try:
            with quiet():
                found = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        except Exception as error:
            problem = error
            continue
        if set(found.get_vocab().values()) - set(found.all_special_ids):
            return found
        # transformers 5 makes an empty one of the right class, to which every word is unknown
        problem = problem or ValueError("it holds no terms")
    raise UnreadableError(
        f"no tokenizer can be loaded from `{checkpoint.name}`: {first_line(problem)}",
        hint="put the tokenizer files beside the weights, or use `--weights-only`",
    ) from problem


def first_line(error: BaseException | None) -> str:
    """The first line of what a library said, short enough for one sentence."""
    text = str(error).strip().splitlines() if error is not None else []
    return (text[0] if text else type(error).__name__)[:200].rstrip(".")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers from printing: its bars and load reports are ours to tell; its settings come back after."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
