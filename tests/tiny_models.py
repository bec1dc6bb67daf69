"""Tiny, randomly initialised models of every masked-LM type that the installed transformers registers."""

from __future__ import annotations

from typing import Any

VOCAB = 131  # prime, and unlike every width and length below, so that a vocabulary axis cannot be mistaken

# Applied where the configuration class has the attribute.
_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "d_model": 32,
    "num_hidden_layers": 2,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "intermediate_size": 48,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "embedding_size": 24,
    "max_position_embeddings": 64,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "head_dim": 8,
    "embedding_rank": 24,
}

_VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
           "image_size": 32, "patch_size": 16}  # fmt: skip
_SMALL_LM = {"emb_dim": 32, "n_layers": 2, "n_heads": 4, "pad_index": 1, "mask_token_id": 3}

# Applied after the common ones, whatever the class has.
_SPECIAL: dict[str, dict[str, Any]] = {
    "big_bird": {"attention_type": "original_full"},
    "convbert": {"head_ratio": 2, "embedding_size": 32, "conv_kernel_size": 3},
    "distilbert": {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4},
    "flaubert": _SMALL_LM,
    "xlm": _SMALL_LM,
    "funnel": {"block_sizes": [1, 1], "num_decoder_layers": 1, "n_head": 4, "d_head": 8, "d_inner": 48},
    "longformer": {"attention_window": 8},
    "luke": {"entity_vocab_size": 17, "entity_emb_size": 16},
    "mobilebert": {"embedding_size": 16, "intra_bottleneck_size": 32, "true_hidden_size": 32},
    "neomme": {"head_dim": 16},
    "nystromformer": {"num_landmarks": 16, "segment_means_seq_len": 16},
    "perceiver": {
        "d_latents": 32, "d_model": 24, "num_latents": 6, "num_blocks": 1, "num_self_attends_per_block": 1,
        "num_self_attention_heads": 4, "num_cross_attention_heads": 4, "qk_channels": 32, "v_channels": 32,
    },
    "reformer": {
        "attn_layers": ["local", "local"], "axial_pos_embds": False, "is_decoder": False,
        "local_attn_chunk_length": 8, "attention_head_size": 8, "feed_forward_size": 48,
    },
    "rembert": {"input_embedding_size": 20, "output_embedding_size": 28},
    "roc_bert": {
        "pronunciation_vocab_size": 13, "shape_vocab_size": 13, "pronunciation_embed_dim": 8, "shape_embed_dim": 8,
    },
    "squeezebert": {
        "embedding_size": 32, "q_groups": 4, "k_groups": 4, "v_groups": 4, "post_attention_groups": 1,
        "intermediate_groups": 4, "output_groups": 4,
    },
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "yoso": {"use_expectation": True},
}  # fmt: skip

_NO_SUCH_OPTION = {"funnel": {"num_hidden_layers"}}
_VISION_LANGUAGE = {"modernvbert": "modernbert", "ultravbert": "ultrabert"}


def masked_lm_types() -> dict[str, str]:
    """Every registered masked-LM model type with its class name."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    return dict(MODEL_FOR_MASKED_LM_MAPPING_NAMES)


def tiny_config(model_type: str, **overrides: Any) -> Any:
    """A configuration of a few thousand parameters, with a vocabulary of `VOCAB` terms."""
    from transformers import CONFIG_MAPPING

    config_class = CONFIG_MAPPING[model_type]
    if model_type in _VISION_LANGUAGE:
        text = tiny_config(_VISION_LANGUAGE[model_type], **overrides)
        return config_class(text_config=text.to_dict(), vision_config=_VISION, image_token_id=VOCAB - 1)
    defaults = config_class()
    known = {k: v for k, v in _COMMON.items() if hasattr(defaults, k)}
    for name in _NO_SUCH_OPTION.get(model_type, ()):
        known.pop(name, None)
    return config_class(**{**known, **_SPECIAL.get(model_type, {}), **overrides})


def tiny_model(model_type: str, class_name: str | None = None, *, seed: int = 0, **overrides: Any) -> Any:
    """A tiny model in evaluation mode whose biases and gains are random, so that no term can hide at 0 or 1."""
    import torch
    import transformers

    torch.manual_seed(seed)
    name = class_name or masked_lm_types()[model_type]
    model = getattr(transformers, name)(tiny_config(model_type, **overrides)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
            else:
                parameter.mul_(4.0)  # initialised at sd 0.02: logits would all be near the bias
        for buffer_name, buffer in model.named_buffers():
            if buffer_name.endswith("final_logits_bias"):
                buffer.normal_(0.0, 0.3)
    return model


def tiny_batch(model_type: str = "", *, batch: int = 3, length: int = 16, seed: int = 1) -> dict[str, Any]:
    """Token ids away from every special token, nothing padded."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, VOCAB - 5, (batch, length), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def tiny_tokenizer() -> Any:
    """A word-level tokenizer over the tiny vocabulary: w5 is id 5, and so on."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    named = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "<mask>": 4}
    words = {**named, **{f"w{i}": i for i in range(5, VOCAB)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        mask_token="<mask>",
        model_input_names=["input_ids", "attention_mask"],
        model_max_length=64,
    )


def tiny_checkpoint(model_type: str, directory: Any, class_name: str | None = None, **overrides: Any) -> Any:
    """Save a tiny model with its tokenizer; returns the directory."""
    tiny_model(model_type, class_name, **overrides).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory
