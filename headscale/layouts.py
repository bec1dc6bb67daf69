"""Where each architecture keeps its MLM head: one row a model type, and the only place to add one.

The rows say what the loaded model does (a test holds every row against `headscale.head.find_head`), so that a
checkpoint can be read from its header alone, without building the model and without torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any


@dataclass(frozen=True)
class Layout:
    """The head of one model type, in the names of the loaded model.

    Attributes:
        matrix: the projection's name, or the blocks that are joined along the width.
        embedding: the input embedding that the first block is tied to when the configuration ties; None where
            the architecture never ties.
        biases: names of the bias; when tied they are one tensor and the first name is its name, untied the last
            one is live. Empty where there is none.
        norm: the module that feeds the projection with an affine norm, or None.
        dense: the transform before the norm; its weight must be in the file for the head to be a trained one.
        base: the backbone's prefix, which checkpoints of older libraries leave out.
        ties: what `tie_word_embeddings` means when the configuration does not say it.
        bias_flag: the configuration key that switches the bias, where one does (true when absent).
        one_plus: the norm's gain is 1 + weight.
        renames: (name in the model, name in the file), applied to the beginning of a name.
        entangled: other names that the tie flag binds and that an untied copy must keep: (name, its source).
        dormant: names of a bias that transformers 5 loads and never adds, and transformers 4 does.
        refusal: why it cannot serve SPLADE, in one sentence, or "".
    """

    matrix: tuple[str, ...]
    embedding: str | None
    biases: tuple[str, ...]
    norm: str | None
    base: str
    dense: str | None = None
    ties: bool = True
    bias_flag: str = ""
    one_plus: bool = False
    renames: tuple[tuple[str, str], ...] = ()
    entangled: tuple[tuple[str, str], ...] = ()
    dormant: tuple[str, ...] = ()
    refusal: str = ""

    @property
    def norm_in_backbone(self) -> bool:
        """Whether the feeding norm is the encoder's own last one."""
        return self.norm is not None and self.norm.startswith(self.base + ".")


def _bert(base: str, norm: str = "LayerNorm") -> Layout:
    """The BERT prediction head: dense, norm, decoder with two names for one bias."""
    head = "cls.predictions"
    return Layout(
        matrix=(f"{head}.decoder.weight",),
        embedding=f"{base}.embeddings.word_embeddings.weight",
        biases=(f"{head}.bias", f"{head}.decoder.bias"),
        norm=f"{head}.transform.{norm}",
        dense=f"{head}.transform.dense",
        base=base,
    )


def _roberta(base: str) -> Layout:
    """The RoBERTa head: `lm_head` with dense, layer_norm, decoder and two names for one bias."""
    return Layout(
        matrix=("lm_head.decoder.weight",),
        embedding=f"{base}.embeddings.word_embeddings.weight",
        biases=("lm_head.bias", "lm_head.decoder.bias"),
        norm="lm_head.layer_norm",
        dense="lm_head.dense",
        base=base,
    )


def _electra(base: str) -> Layout:
    """The ELECTRA generator's head."""
    return Layout(
        matrix=("generator_lm_head.weight",),
        embedding=f"{base}.embeddings.word_embeddings.weight",
        biases=("generator_lm_head.bias",),
        norm="generator_predictions.LayerNorm",
        dense="generator_predictions.dense",
        base=base,
    )


def _xlm() -> Layout:
    # The norm's index is the last layer's: `_last_layer` fills it in from the configuration.
    return Layout(
        matrix=("pred_layer.proj.weight",),
        embedding="transformer.embeddings.weight",
        biases=("pred_layer.proj.bias",),
        norm="transformer.layer_norm2.{last}",
        base="transformer",
    )


def _causal(*, ties: bool = False, one_plus: bool = False) -> Layout:
    return Layout(
        matrix=("lm_head.weight",),
        embedding="model.embed_tokens.weight",
        biases=(),
        norm="model.norm",
        base="model",
        ties=ties,
        one_plus=one_plus,
    )


def _refused(reason: str) -> Layout:
    return Layout(matrix=(), embedding=None, biases=(), norm=None, base="", refusal=reason)


_PROTEIN = _refused("its vocabulary is an alphabet of amino acids, not terms of text")
ENCODER_DECODER = "it is an encoder-decoder: its logits come from a decoder that reads the text shifted by one"

LAYOUTS: dict[str, Layout] = {
    "albert": replace(
        _bert("albert"),
        matrix=("predictions.decoder.weight",),
        biases=("predictions.bias", "predictions.decoder.bias"),
        norm="predictions.LayerNorm",
        dense="predictions.dense",
    ),
    "bart": _refused(ENCODER_DECODER),
    "bert": _bert("bert"),
    "big_bird": _bert("bert"),
    "camembert": _roberta("roberta"),
    "convbert": _electra("convbert"),
    "data2vec-text": _roberta("data2vec_text"),
    "deberta": _bert("deberta"),
    "deberta-v2": _bert("deberta"),
    "distilbert": Layout(
        matrix=("vocab_projector.weight",),
        embedding="distilbert.embeddings.word_embeddings.weight",
        biases=("vocab_projector.bias",),
        norm="vocab_layer_norm",
        dense="vocab_transform",
        base="distilbert",
    ),
    "electra": _electra("electra"),
    "ernie": _bert("ernie"),
    "esm": _PROTEIN,
    "esmc": _PROTEIN,
    "eurobert": _causal(),
    "flaubert": _xlm(),
    "fnet": _bert("fnet"),
    "funnel": Layout(
        matrix=("lm_head.weight",),
        embedding="funnel.embeddings.word_embeddings.weight",
        biases=("lm_head.bias",),
        norm="funnel.decoder.layers.{last_decoder}.ffn.layer_norm",
        base="funnel",
    ),
    "gte": replace(
        _roberta("gte"),
        biases=("lm_head.decoder.bias",),
        renames=(("lm_head.layer_norm", "lm_head.norm"), ("gte.", "new.")),
    ),
    "ibert": _roberta("ibert"),
    "jina_embeddings_v3": _roberta("roberta"),
    "layoutlm": _bert("layoutlm"),
    "longformer": _roberta("longformer"),
    "luke": replace(
        _roberta("luke"),
        embedding=None,
        entangled=(("entity_predictions.decoder.weight", "luke.entity_embeddings.entity_embeddings.weight"),),
    ),
    "mbart": _refused(ENCODER_DECODER),
    "megatron-bert": _bert("bert"),
    "mobilebert": replace(
        _bert("mobilebert"), matrix=("cls.predictions.decoder.weight", "cls.predictions.dense.weight")
    ),
    "modernbert": Layout(
        matrix=("decoder.weight",),
        embedding="model.embeddings.tok_embeddings.weight",
        biases=("decoder.bias",),
        norm="head.norm",
        dense="head.dense",
        base="model",
        bias_flag="decoder_bias",
    ),
    "modernbert-decoder": Layout(
        matrix=("decoder.weight",),
        embedding="model.embeddings.tok_embeddings.weight",
        biases=("decoder.bias",),
        norm="lm_head.norm",
        dense="lm_head.dense",
        base="model",
        bias_flag="decoder_bias",
    ),
    "modernvbert": Layout(
        matrix=("lm_head.weight",),
        embedding=None,
        biases=("lm_head.bias",),
        norm="projection_head.norm",
        dense="projection_head.dense",
        base="model",
        ties=False,
        bias_flag="text_config.decoder_bias",
    ),
    "mpnet": _roberta("mpnet"),
    "mra": _bert("mra"),
    "mvp": _refused(ENCODER_DECODER),
    "neomme": Layout(
        matrix=("lm_head.weight",),
        embedding="model.embed_tokens.word_embeddings.weight",
        biases=(),
        norm=None,
        base="model",
        entangled=(("unembedding_projection.weight", "model.embed_tokens.embedding_projection.weight"),),
    ),
    "nomic_bert": _bert("nomic_bert", norm="layer_norm"),
    "nystromformer": _bert("nystromformer"),
    "perceiver": _refused("it reads bytes: its vocabulary holds no terms, and its logits belong to fixed positions"),
    "reformer": Layout(
        matrix=("lm_head.decoder.weight",),
        embedding=None,
        biases=(),
        norm="reformer.encoder.layer_norm",
        base="reformer",
        ties=False,
        dormant=("lm_head.bias",),
    ),
    "rembert": replace(
        _bert("rembert"),
        embedding=None,
        biases=("cls.predictions.decoder.bias",),
        norm="cls.predictions.LayerNorm",
        dense="cls.predictions.dense",
        ties=False,
    ),
    "roberta": _roberta("roberta"),
    "roberta-prelayernorm": _roberta("roberta_prelayernorm"),
    "roc_bert": _bert("roc_bert"),
    "roformer": _bert("roformer"),
    "squeezebert": _bert("transformer"),
    "tapas": _bert("tapas"),
    "ultrabert": Layout(
        matrix=("head.decoder.weight",),
        embedding="model.embed_tokens.weight",
        biases=(),
        norm=None,
        dense="head.linear2",
        base="model",
        ties=False,
        renames=(("head.decoder.", "cls."), ("model.", "ultrabert.")),
    ),
    "ultravbert": Layout(
        matrix=("lm_head.weight",),
        embedding=None,
        biases=(),
        norm=None,
        dense="projection_head.linear2",
        base="model",
        ties=False,
        renames=(("lm_head.", "head.decoder."), ("projection_head.", "head.")),
    ),
    "xlm": _xlm(),
    "xlm-roberta": _roberta("roberta"),
    "xlm-roberta-xl": _roberta("roberta"),
    "xmod": _roberta("roberta"),
    "yoso": _bert("yoso"),
    # Causal models that sparse retrievers are built on; for inspection.
    "gemma": _causal(ties=True, one_plus=True),
    "gemma2": _causal(ties=True, one_plus=True),
    "gemma3_text": _causal(ties=True, one_plus=True),
    "llama": _causal(),
    "mistral": _causal(),
    "qwen2": _causal(),
    "qwen3": _causal(),
}

# What transformers 4 binds and transformers 5 does not: the matrix of LUKE, the bias of Reformer.
_IN_TRANSFORMERS_4: dict[str, dict[str, Any]] = {
    "luke": {"embedding": "luke.embeddings.word_embeddings.weight"},
    "reformer": {"biases": ("lm_head.bias",), "dormant": ()},
}

_DEBERTA_TYPES = ("deberta", "deberta-v2")
_LAST_LAYER_KEYS: dict[str, Callable[[dict[str, Any]], int]] = {
    "last": lambda c: int(c.get("n_layers", 12)) - 1,
    "last_decoder": lambda c: int(c.get("num_decoder_layers", 2)) - 1,
}


@cache
def is_transformers_4() -> bool:
    """Whether the installed transformers is of the 4 series, which binds the names of a bias whatever the flag says."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("transformers").startswith("4.")
    except PackageNotFoundError:
        return False


def layout_for(config: dict[str, Any]) -> Layout | None:
    """The row of a configuration (the content of `config.json`), or None for an unknown model type."""
    model_type = config.get("model_type", "")
    layout = LAYOUTS.get(model_type)
    if layout is None:
        return None
    if model_type in _DEBERTA_TYPES and config.get("legacy") is False:
        layout = _deberta_enhanced(layout)
    if is_transformers_4():
        layout = replace(layout, **_IN_TRANSFORMERS_4.get(model_type, {}))
    if layout.norm and "{" in layout.norm:
        layout = replace(layout, norm=layout.norm.format(**{k: f(config) for k, f in _LAST_LAYER_KEYS.items()}))
    return layout


def _deberta_enhanced(legacy: Layout) -> Layout:
    """DeBERTa with `legacy: false`: the matrix is the input embedding itself, and the bias has one name."""
    assert legacy.embedding is not None
    head = "lm_predictions.lm_head"
    return replace(
        legacy,
        matrix=(legacy.embedding,),
        biases=(f"{head}.bias",),
        norm=f"{head}.LayerNorm",
        dense=f"{head}.dense",
    )
