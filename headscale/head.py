"""Where the MLM head of a loaded model is, found by watching the model work rather than by its attribute names.

`get_output_embeddings()` is wrong or empty for several model types, so the head is taken from the product that
yields the vocabulary-sized logits: its operands are matched to parameters by storage, the live bias is the
vocabulary-sized tensor whose perturbation moves the logits, and the feeding norm is the module whose output is
the product's input and whose doubling doubles the logits.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from headscale.errors import NoHeadError, UnreadableError, UnsupportedHeadError
from headscale.records import Head

if TYPE_CHECKING:
    from torch import Tensor, nn

# Departure from linearity allowed, as a share of the largest logit: some hundred times the rounding unit.
_ROUNDINGS = 500.0
_PROBE_SHAPE = (2, 16)


@dataclass
class Product:
    """One vocabulary-sized matrix product, as it was seen."""

    features: Tensor  # (batch, seq, width)
    output: Tensor  # (batch, seq, vocab), before anything that is added later
    weight: Tensor  # the operand as passed, (vocab, width) or its transpose
    transposed: bool
    bias: Tensor | None
    blocks: tuple[Tensor, ...] = field(default=())  # what the operand was concatenated from


class _Found(Exception):
    def __init__(self, features: Tensor) -> None:
        super().__init__()
        self.features = features


def _watcher(vocab_size: int, seen: list[Product], *, stop: Callable[[Tensor], bool] | None = None) -> Any:
    """A torch function mode that lists every product with `vocab_size` columns, or stops before that of an operand."""
    import torch
    from torch.overrides import TorchFunctionMode

    linear = torch.nn.functional.linear
    matmuls = {torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.mm, torch.Tensor.mm}

    class Watcher(TorchFunctionMode):
        def __init__(self) -> None:
            super().__init__()
            self.concatenated: dict[int, tuple[Tensor, ...]] = {}

        def __torch_function__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            kwargs = kwargs or {}
            operand: Any = args[1] if len(args) > 1 else kwargs.get("weight", kwargs.get("other"))
            straight = func is linear and operand.shape[0] == vocab_size
            turned = func in matmuls and operand.dim() == 2 and operand.shape[-1] == vocab_size
            if (straight or turned) and stop is not None and stop(operand):
                raise _Found(args[0])
            out = func(*args, **kwargs)
            if straight or turned:
                bias = (args[2] if len(args) > 2 else kwargs.get("bias")) if straight else None
                blocks = self.concatenated.get(operand.data_ptr(), ())
                seen.append(Product(args[0], out, operand, turned, bias, blocks))
            elif func is torch.cat:
                self.concatenated[out.data_ptr()] = tuple(args[0])
            return out

    return Watcher()


class LoadedHead:
    """The MLM head of a model in memory: live tensors, and the features that feed them.

    `logits = features @ weight.T + bias` (times `head.factor`) holds for every position. The tensors are the
    model's own: training them trains the model.
    """

    def __init__(self, model: nn.Module, head: Head) -> None:
        self.model = model
        self.head = head
        self._tensors = _all_tensors(model)

    @property
    def vocab_size(self) -> int:
        """Number of rows of the matrix."""
        return self.head.vocab_size

    @property
    def width(self) -> int:
        """Number of columns of the matrix."""
        return self.head.width

    @property
    def weight(self) -> Tensor:
        """The matrix, (vocab, width); one parameter, or the blocks of one joined."""
        import torch

        if len(self.head.matrix) == 1:
            return self._tensors[self.head.matrix[0]]
        blocks = [self._tensors[name] for name in self.head.matrix]
        blocks = [b if b.shape[0] == self.vocab_size else b.t() for b in blocks]
        return torch.cat(blocks, dim=1)

    @property
    def bias(self) -> Tensor | None:
        """The live bias, (vocab,), or None."""
        if self.head.bias is None:
            return None
        return self._tensors[self.head.bias].reshape(-1)

    @property
    def parameters(self) -> list[Tensor]:
        """The matrix and the bias as parameters, for an optimizer group of their own."""
        names = [*self.head.matrix, *([self.head.bias] if self.head.bias else [])]
        return [self._tensors[name] for name in names]

    def features(self, **batch: Any) -> Tensor:
        """Run the model up to the vocabulary product, which is not computed.

        Args:
            batch: what the tokenizer returned, as tensors of shape (batch, seq).

        Returns:
            The input of the product, (batch, seq, width), with its autograd graph.
        """
        return self.features_of(lambda: self.model(**accepted(self.model, batch)))

    def features_of(self, call: Callable[[], object]) -> Tensor:
        """The same for any call that runs the model; what the call does after the product is left out.

        Raises:
            UnsupportedHeadError: the call ended without the product.
        """
        try:
            with _watcher(self.vocab_size, [], stop=self._is_matrix):
                call()
        except _Found as found:
            return found.features
        raise UnsupportedHeadError(f"`{self.head.architecture}` computed no vocabulary-sized product")

    def _is_matrix(self, operand: Tensor) -> bool:
        """Whether an operand is the head's matrix, and not that of a layer which happens to be as wide."""
        if operand.numel() != self.vocab_size * self.width:
            return False
        return len(self.head.matrix) > 1 or _same_storage(operand, self._tensors[self.head.matrix[0]])


def load_head(model: nn.Module) -> LoadedHead:
    """Find the head of a loaded model and bind it to the model's tensors."""
    return LoadedHead(model, find_head(model))


def find_head(model: nn.Module) -> Head:
    """Say where the MLM head of a loaded model is; the model is left as it was.

    Args:
        model: a masked (or causal) language model of transformers, in memory.

    Returns:
        Names of the matrix, the live bias and the feeding norm, what is tied to what, any factor or softcap.

    Raises:
        NoHeadError: the model puts out no logits.
        UnsupportedHeadError: no vocabulary-sized product, or logits that are not linear in the features.
    """
    import torch

    with undisturbed(model), torch.no_grad():
        return _find(model)


def _find(model: nn.Module) -> Head:
    config: Any = model.config
    vocab_size = _text_config(config).vocab_size
    batch = probe_batch(model)
    norms: list[tuple[str, Tensor]] = []
    with _norm_outputs(model, norms):
        product, logits = _observe(model, vocab_size, batch)
    if not bool(logits.isfinite().all()):
        raise UnreadableError(
            f"`{type(model).__name__}` computes logits that are not finite",
            hint="the checkpoint is damaged or diverged in training: use an earlier one",
        )
    tensors = _all_tensors(model)
    matrix = _names_of(product, tensors)
    if not matrix:
        raise UnsupportedHeadError(f"the vocabulary product of `{type(model).__name__}` uses no parameter of the model")
    weight = _as_rows(product)  # (vocab, width)
    bias = _live_bias(model, product, logits, tensors, batch)
    factor, softcap = _factor(product, logits, None if bias is None else tensors[bias], config, weight)
    norm = next((n for n, out in reversed(norms) if _same_values(out, product.features)), None)
    if norm is not None and not _doubles(model, norm, bias, tensors, batch, logits, softcap):
        norm = None
    return _describe(model, matrix, bias, norm, factor, softcap, weight, tensors)


def _describe(
    model: nn.Module,
    matrix: tuple[str, ...],
    bias: str | None,
    norm: str | None,
    factor: float,
    softcap: float | None,
    weight: Tensor,
    tensors: Mapping[str, Tensor],
) -> Head:
    config: Any = model.config
    embedding = _input_embedding(model)
    matrix = tuple(_canonical(name, tensors, embedding) for name in matrix)
    aliases = {n for m in matrix for n in _aliases(m, tensors)} - set(matrix)
    return Head(
        model_type=str(config.model_type),
        architecture=type(model).__name__,
        vocab_size=int(weight.shape[0]),
        width=int(weight.shape[1]),
        matrix=matrix,
        bias=None if bias is None else _canonical(bias, tensors, None),
        norm=norm,
        norm_kind=None if norm is None else _norm_kind(model.get_submodule(norm)),
        norm_in_backbone=norm is not None and norm.partition(".")[0] == (embedding or "").partition(".")[0],
        tied_to=embedding if embedding in aliases or embedding in matrix else None,
        factor=factor,
        softcap=softcap,
    )


# --- observing -------------------------------------------------------------------------------------------


def _text_config(config: Any) -> Any:
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def probe_batch(model: nn.Module) -> dict[str, Tensor]:
    """Ordinary token ids: none of the special ones, which some models read as pictures or as padding."""
    import torch

    config: Any = model.config
    vocab_size = _text_config(config).vocab_size
    special = {v for k, v in config.to_dict().items() if k.endswith("token_id") and isinstance(v, int)}
    allowed = [i for i in range(min(vocab_size, 4096)) if i not in special and i > 4] or [0]
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(len(allowed), _PROBE_SHAPE, generator=generator)
    device = next(model.parameters()).device
    ids = torch.tensor(allowed, device=device)[picks.to(device)]
    return accepted(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})


def accepted(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """What a model's `forward` takes of a batch: FNet knows no attention mask before transformers 5."""
    parameters = inspect.signature(model.forward).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return dict(batch)
    return {key: batch[key] for key in (p.name for p in parameters) if key in batch}


def _observe(model: nn.Module, vocab_size: int, batch: Mapping[str, Tensor]) -> tuple[Product, Tensor]:
    seen: list[Product] = []
    with _watcher(vocab_size, seen):
        logits = getattr(model(**batch), "logits", None)
    if logits is None:
        raise NoHeadError(
            f"`{type(model).__name__}` puts out no logits: it has no MLM head",
            hint="load it with `AutoModelForMaskedLM`, from a checkpoint that holds the head",
        )
    matching = [p for p in seen if p.output.shape == logits.shape]
    if not matching:
        raise UnsupportedHeadError(
            f"`{type(model).__name__}` yields its logits without a product of {vocab_size} columns",
            hint="give a masked language model whose head is one linear projection onto the vocabulary",
        )
    return matching[-1], logits


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; modes and random state as before on leaving."""
    import torch

    modes = {m: m.training for m in model.modules()}
    with torch.random.fork_rng(devices=[]):
        model.eval()
        try:
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode


@contextlib.contextmanager
def _norm_outputs(model: nn.Module, seen: list[tuple[str, Tensor]]) -> Iterator[None]:
    import torch

    def remember(name: str) -> Callable[..., None]:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            if isinstance(output, torch.Tensor):
                seen.append((name, output))

        return hook

    handles = [
        module.register_forward_hook(remember(name)) for name, module in model.named_modules() if _is_gain(module)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _is_gain(module: nn.Module) -> bool:
    """A leaf with a one-dimensional weight: LayerNorm, RMSNorm and their relatives under any name."""
    weight = getattr(module, "weight", None)
    return weight is not None and weight.dim() == 1 and not list(module.children())


def _same_values(a: Tensor, b: Tensor) -> bool:
    return a.numel() == b.numel() and bool((a.reshape(-1) == b.reshape(-1)).all())


# --- matching tensors to names ---------------------------------------------------------------------------


def _all_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every name of every parameter and buffer; tied tensors appear under each of their names."""
    named: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    named.update(model.named_buffers(remove_duplicate=False))
    return named


def _same_storage(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def _names_of(product: Product, tensors: Mapping[str, Tensor]) -> tuple[str, ...]:
    operands = product.blocks or (product.weight,)
    names = [next((n for n, t in tensors.items() if _same_storage(t, operand)), None) for operand in operands]
    return tuple(n for n in names if n is not None) if all(names) else ()


def _aliases(name: str, tensors: Mapping[str, Tensor]) -> list[str]:
    return [n for n, t in tensors.items() if _same_storage(t, tensors[name])]


def _canonical(name: str, tensors: Mapping[str, Tensor], embedding: str | None) -> str:
    """The head's own name of a tensor: not the embedding's, and the shortest where several remain."""
    own = [n for n in _aliases(name, tensors) if n != embedding and not n.endswith("embed_tokens.weight")]
    return min(own or [name], key=lambda n: (len(n), n))


def _input_embedding(model: Any) -> str | None:
    try:
        module = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    return next((f"{n}.weight" for n, m in model.named_modules() if m is module and hasattr(m, "weight")), None)


def _as_rows(product: Product) -> Tensor:
    return product.weight.t() if product.transposed else product.weight


# --- the bias, the factor, the norm ----------------------------------------------------------------------


def _live_bias(
    model: nn.Module,
    product: Product,
    logits: Tensor,
    tensors: Mapping[str, Tensor],
    batch: Mapping[str, Tensor],
) -> str | None:
    """The vocabulary-sized tensor that moves the logits when it is moved; not merely one with a likely name."""
    vocab_size = logits.shape[-1]
    candidates = [n for n, t in tensors.items() if t.numel() == vocab_size and t.is_floating_point()]
    passed = product.bias
    if passed is not None:  # the most likely one first: one forward pass is then enough
        candidates.sort(key=lambda n: not _same_storage(tensors[n], passed))
    tried: list[Tensor] = []
    for name in candidates:
        tensor = tensors[name]
        if any(_same_storage(tensor, t) for t in tried):
            continue
        tried.append(tensor)
        with _changed([(tensor, lambda t: t + 1.0)]):
            moved = model(**batch).logits - logits
        if bool((moved.abs() > 0.01).all()):
            return name
    return None


def _factor(
    product: Product, logits: Tensor, bias: Tensor | None, config: Any, weight: Tensor
) -> tuple[float, float | None]:
    """The constant between `features @ weight.T + bias` and the logits, or the softcap; refuses anything else."""
    import torch

    plain = product.features.float() @ weight.float().T
    if bias is not None:
        plain = plain + bias.reshape(-1).float()
    seen = logits.float().reshape(plain.shape)
    allowed = _tolerance(weight) * seen.abs().max()
    factor = float((seen * plain).sum() / plain.square().sum())
    if bool((seen - factor * plain).abs().max() <= allowed):
        return (1.0 if abs(factor - 1.0) < _tolerance(weight) else factor), None
    softcap = getattr(_text_config(config), "final_logit_softcapping", None)
    if softcap and bool((seen - softcap * torch.tanh(plain / softcap)).abs().max() <= 10 * allowed):
        return 1.0, float(softcap)
    raise UnsupportedHeadError(
        "the logits are not a constant times `features @ weight.T + bias`, so no factor can be found in the weights",
        hint="inspect a model whose MLM head ends in one linear projection",
    )


def _tolerance(tensor: Tensor) -> float:
    import torch

    return _ROUNDINGS * torch.finfo(tensor.dtype).eps if tensor.dtype is torch.float32 else 0.05


def _doubles(
    model: nn.Module,
    norm: str,
    bias: str | None,
    tensors: Mapping[str, Tensor],
    batch: Mapping[str, Tensor],
    logits: Tensor,
    softcap: float | None,
) -> bool:
    """Whether doubling this norm's output and the bias doubles every logit: then a constant can be folded there."""
    import torch

    module = model.get_submodule(norm)
    one_plus = _norm_kind(module) == "one_plus"
    changes: list[tuple[Tensor, Callable[[Tensor], Tensor]]] = [
        (module.weight, (lambda w: 2.0 * w + 1.0) if one_plus else (lambda w: 2.0 * w))  # type: ignore[list-item]
    ]
    if isinstance(getattr(module, "bias", None), torch.Tensor):
        changes.append((module.bias, lambda b: 2.0 * b))  # type: ignore[arg-type]
    if bias is not None:
        changes.append((tensors[bias], lambda b: 2.0 * b))
    with _changed(changes):
        doubled = model(**batch).logits
    if softcap:
        logits, doubled = (softcap * torch.atanh(x / softcap) for x in (logits, doubled))
    allowed = _tolerance(module.weight) * 2.0 * logits.abs().max()  # type: ignore[arg-type]
    return bool((doubled - 2.0 * logits).abs().max() <= allowed)


def _norm_kind(module: nn.Module) -> str:
    """`affine` where the gain is the weight, `one_plus` where it is one plus the weight (Gemma)."""
    import torch

    weight: Any = module.weight
    changes: list[tuple[Tensor, Callable[[Tensor], Tensor]]] = [(weight, torch.zeros_like)]
    if isinstance(getattr(module, "bias", None), torch.Tensor):
        changes.append((module.bias, torch.zeros_like))  # type: ignore[arg-type]
    probe = torch.linspace(-1.0, 1.0, weight.shape[0], dtype=weight.dtype, device=weight.device)
    with _changed(changes), torch.no_grad():
        return "affine" if bool((module(probe[None, None]) == 0).all()) else "one_plus"


@contextlib.contextmanager
def _changed(changes: list[tuple[Tensor, Callable[[Tensor], Tensor]]]) -> Iterator[None]:
    """Change tensors in place and put the very same values back."""
    import torch

    before = [tensor.detach().clone() for tensor, _ in changes]
    try:
        with torch.no_grad():
            for tensor, change in changes:
                tensor.copy_(change(tensor))
        yield
    finally:
        with torch.no_grad():
            for (tensor, _), values in zip(changes, before, strict=True):
                tensor.copy_(values)
