"""Rescale the MLM head of a model in memory, the two ways a constant can live in the weights.

`untie` multiplies a copy of the projection that belongs to the head alone (what arXiv 2606.18811 does, and what
gives the head its own step size under AdamW); `fold` multiplies the affine norm that feeds the projection and
leaves every tie as it is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from headscale.errors import UnsupportedHeadError
from headscale.head import find_head
from headscale.records import Head

if TYPE_CHECKING:
    from torch import Tensor, nn

MODES = ("untie", "fold", "logits", "auto")


def can_untie(head: Head) -> bool:
    """Whether the head can have a projection of its own: not where the matrix *is* the input embedding."""
    return head.tied_to not in head.matrix


def can_fold(head: Head) -> bool:
    """Whether an affine norm feeds the projection."""
    return head.norm is not None


def resolve_mode(head: Head, mode: str) -> tuple[str, str]:
    """The mode that will be used, and why.

    Args:
        head: where the head is.
        mode: `untie`, `fold` or `auto`.

    Raises:
        UnsupportedHeadError: the mode has no exact form for this head.
    """
    if head.softcap is not None:
        raise UnsupportedHeadError(
            f"the logits of `{head.model_type}` are softcapped at {head.softcap:g}, so no factor in the weights "
            "multiplies them",
            hint="inspect it, or calibrate a model without `final_logit_softcapping`",
        )
    if mode == "auto":
        return _automatic(head)
    if mode == "untie" and not can_untie(head):
        raise UnsupportedHeadError(
            f"the matrix of `{head.model_type}` is the input embedding itself and cannot be untied",
            hint="use `--mode fold`",
        )
    if mode == "fold" and not can_fold(head):
        raise UnsupportedHeadError(
            f"no affine norm feeds the projection of `{head.model_type}`, so there is nothing to fold into",
            hint="use `--mode untie`",
        )
    return mode, "as asked"


def _automatic(head: Head) -> tuple[str, str]:
    if can_untie(head):
        return "untie", "rescaling a projection of the head's own is what was shown to repair training"
    if can_fold(head):
        return (
            "fold",
            "the matrix is the input embedding itself, so the constant goes into the norm that feeds it",
        )
    raise UnsupportedHeadError(
        f"`{head.model_type}` has neither a projection of its own nor an affine norm that feeds it"
    )


def rescale_(
    model: nn.Module, scale: float, *, mode: str = "untie", scale_bias: bool = True, shift: float = 0.0
) -> Head:
    """Multiply the logits of a model by a constant, in its weights, in place.

    logits' = scale x (logits + shift), or with the bias kept scale x (logits - b + shift) + b.

    Args:
        model: the model to change; pass a copy to keep the original.
        scale: the factor on the logits, above zero; below one shrinks.
        mode: `untie`, `fold` or `auto`.
        scale_bias: scale the bias with the projection (the support is then unchanged), or keep it.
        shift: added to every logit before the scale, through the bias.

    Returns:
        The head as it is afterwards.

    Raises:
        UnsupportedHeadError: the mode has no exact form for this head, or it has no bias to shift.
    """
    import torch

    head = find_head(model)
    mode, _ = resolve_mode(head, mode)
    if shift and head.bias is None:
        raise UnsupportedHeadError(f"`{head.model_type}` has no bias in its head to shift", hint="leave out the shift")
    with torch.no_grad():
        if mode == "untie":
            _untie(model, head, scale, scale if scale_bias else 1.0)
        else:
            _fold(model, head, scale, scale if scale_bias else 1.0)
        head = find_head(model)
        if shift:
            assert head.bias is not None
            tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
            tensors[head.bias].add_(scale * shift / head.factor)  # logits are factor x (features W + bias)
    return head


def tied_names(model: Any) -> dict[str, str]:
    """Every name that the tie flag binds, with the name it is bound to (transformers 4 and 5)."""
    keys = getattr(model, "all_tied_weights_keys", None)
    if keys is not None:
        return dict(keys)
    tensors = dict(model.named_parameters(remove_duplicate=False))
    first: dict[int, str] = {}
    bound: dict[str, str] = {}
    for name, tensor in tensors.items():
        kept = first.setdefault(id(tensor), name)
        if kept != name:
            bound[name] = kept
    return bound


def folded_gain(weight: Any, scale: float, norm_kind: str | None) -> Any:
    """The norm's weight after folding: a w, or a (1 + w) - 1 where the gain is one plus the weight."""
    return scale * (1.0 + weight) - 1.0 if norm_kind == "one_plus" else scale * weight


def _untie(model: Any, head: Head, scale: float, bias_scale: float) -> None:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    own = {name for pair in tied_names(model).items() for name in pair} | set(head.matrix)
    own -= {head.tied_to}
    for name in sorted(own):
        if name not in parameters:
            continue
        factor = 1.0
        if name in head.matrix:
            factor = scale
        elif head.bias is not None and parameters[name] is parameters.get(head.bias):
            factor = bias_scale
        _assign(model, name, factor * parameters[name])
    if head.bias is not None and head.bias not in own:
        parameters_or_buffers = {**parameters, **dict(model.named_buffers())}
        parameters_or_buffers[head.bias].mul_(bias_scale)
    _text_config(model.config).tie_word_embeddings = False
    model.config.tie_word_embeddings = False


def _text_config(config: Any) -> Any:
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _assign(model: nn.Module, name: str, value: Tensor) -> None:
    """Give one name a parameter of its own."""
    from torch import nn

    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, nn.Parameter(value.detach().clone()))


def _fold(model: nn.Module, head: Head, scale: float, bias_scale: float) -> None:
    assert head.norm is not None
    norm: Any = model.get_submodule(head.norm)
    norm.weight.copy_(folded_gain(norm.weight, scale, head.norm_kind))
    if getattr(norm, "bias", None) is not None:
        norm.bias.mul_(scale)
    if head.bias is not None:
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        tensors[head.bias].mul_(bias_scale)
