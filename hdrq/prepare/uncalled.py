"""Weights that no quantizer would see, so that they would silently stay in float."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hdrq import checks
from hdrq.prepare.ledger import storage_of, storages
from hdrq.prepare.observe import hooks
from hdrq.quantizers.bits import matches
from hdrq.quantizers.layers import weighted_layers

PRODUCTS = {  # operations of ATen that multiply by a matrix, convolve with one, or look rows up in one
    *(
        "mm",
        "addmm",
        "bmm",
        "addbmm",
        "baddbmm",
        "mv",
        "addmv",
        "matmul",
        "linear",
        "bilinear",
        "_trilinear",
        "tensordot",
    ),
    *("_grouped_mm", "grouped_mm", "_scaled_mm", "mkldnn_linear", "_mkl_linear", "embedding", "embedding_bag"),
    *("_embedding_bag", "_embedding_bag_forward_only", "convolution", "_convolution", "convolution_overrideable"),
    *("mkldnn_convolution", "cudnn_convolution", "cudnn_convolution_transpose", "miopen_convolution", "lstm", "gru"),
    *("rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell", "mkldnn_rnn_layer", "_cudnn_rnn", "miopen_rnn"),
}


class _Reads(TorchDispatchMode):
    """The memory that operations read, and the memory that products read as operands other than layers' inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.by_any: set[int] = set()
        self.by_products: set[int] = set()
        self.parameters: dict[int, nn.Parameter] = {}  # that operations read, the model's or not
        self.inputs: list[frozenset[int]] = []  # of the layers that are running

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        read = storages((args, kwargs))
        self.by_any |= read
        self.parameters |= {storage_of(x): x for x in tree_leaves((args, kwargs)) if isinstance(x, nn.Parameter)}
        if func.overloadpacket.__name__ in PRODUCTS:
            self.by_products |= read - (self.inputs[-1] if self.inputs else frozenset())
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def refuse_uncalled(
    model: nn.Module, run: Callable, bits: str | Mapping[str, str], original: nn.Module | None = None
) -> None:
    """Every matrix that ``run(model)`` computes with is the weight of a layer that is called, or a pattern of ``bits``
    keeps it in full precision.

    Attentions of BEiT and EVA hand the weight of their ``qkv`` to a function; a subclass of ``nn.MultiheadAttention``
    has projections that are no layers; fused experts, recurrent layers, ``nn.Bilinear`` and ``nn.EmbeddingBag`` hold
    bare parameters; layers in a plain list are no modules of the model.

    Args:
        original: the model that ``model`` is a copy of, which must not run itself.

    Raises:
        ValueError: a matrix is not; the message names it and counts the others. Or the original's weights are read.
    """
    layers: dict[str, Any] = weighted_layers(model)
    called: dict[str, nn.Module] = {}
    handles = []
    with _Reads() as reads:
        for name, module in model.named_modules():
            handles += _watch(name, module, name in layers, called, reads)
        with hooks(handles):
            run(model)
    _refuse_original(original, model, reads)
    quantized = {storage_of(layers[name].weight) for name in called if name in layers}
    silent = [name for name, module in called.items() if isinstance(module, nn.MultiheadAttention)]
    silent += [
        n for n, layer in layers.items() if n not in called and storage_of(layer.weight) in reads.by_any - quantized
    ]
    silent += [
        name
        for name, p in model.named_parameters()
        if p.ndim > 1 and not checks.whole(p) and storage_of(p) in reads.by_products - quantized
    ]
    silent += _unregistered(model, reads)
    inside = [n for n in silent if any(n.startswith(f"{other}.") for other in silent)]
    patterns = bits if isinstance(bits, Mapping) else {}
    chosen = {n: next((t for p, t in patterns.items() if matches(n, p)), None) for n in silent if n not in inside}
    if wrong := [name for name, text in chosen.items() if text != "float"]:
        raise ValueError(
            f"model must call its layers to quantize them, got weights that are read without a call: "
            f"{checks.listed(map(repr, wrong))}; call nn.Linear, hold modules in nn.ModuleList and not in a list, "
            "register the class that holds it "
            f"(hdrq.quantizers.layers.register_layer), or keep it in full precision with "
            f'bits={{"{wrong[0]}": "float", …}}'
        )


def _unregistered(model: nn.Module, reads: _Reads) -> list[str]:
    """Where matrices lie that products read and that are parameters of no module of the model, as of layers in a list.

    Raises:
        ValueError: one lies in no attribute of the model.
    """
    own = {storage_of(p) for p in model.parameters()}
    foreign = {n: p for n, p in reads.parameters.items() if n in reads.by_products - own and p.ndim > 1}
    places = {storage_of(x): place for place, x in _attributes(model)} if foreign else {}
    if lost := [p for n, p in foreign.items() if n not in places]:
        raise ValueError(
            f"model must hold the weights that it computes with, got a parameter of {tuple(lost[0].shape)} in none of "
            "its attributes; make the module that has it one of the model's"
        )
    return [places[n] for n in foreign]


def _attributes(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors in attributes of a model's modules, and of modules that lie there in lists and dicts, with their names.

    What the model's own modules have registered is not among them.
    """
    seen = {id(module) for module in model.modules()}
    waiting: list[tuple[str, Any]] = [(name, vars(module)) for name, module in model.named_modules()]
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, torch.Tensor):
            yield name, value
        elif id(value) not in seen:
            seen.add(id(value))
            value = dict(value.named_parameters()) if isinstance(value, nn.Module) else value
            items: Iterable = value.items() if isinstance(value, Mapping) else ()
            items = enumerate(value) if isinstance(value, list | tuple) else items
            waiting += [(f"{name}.{key}" if name else str(key), inside) for key, inside in items]


def _refuse_original(original: nn.Module | None, model: nn.Module, reads: _Reads) -> None:
    """A copy's forward that was replaced, by a closure or a partial, may go on running the layers it was made with."""
    if original is None or original is model:
        return
    own = {storage_of(p) for p in model.parameters()}
    read = [n for n, p in original.named_parameters() if storage_of(p) in reads.by_any and storage_of(p) not in own]
    if read:
        raise ValueError(
            f"model must compute with its own weights when it is copied, got a copy that reads the original's "
            f"{checks.listed(map(repr, read))}: a forward was replaced by a function that holds the original module; "
            "undo that (checkpoint and offload wrappers have a method for it), or write it as a method of the class"
        )


def _watch(name: str, module: nn.Module, is_layer: bool, called: dict[str, nn.Module], reads: _Reads) -> list:
    def enter(module, args, kwargs):
        called.setdefault(name, module)
        if any(is_functorch_wrapped_tensor(x) for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)):
            raise ValueError(
                f"model must not call its modules inside torch.vmap or torch.func, where noise has no index and values "
                f"cannot be looked at, got a call of {name or 'the model'!r}; write the batch as an axis"
            )
        if is_layer:
            reads.inputs.append(storages((args, kwargs)))

    def leave(module, args, output):
        if is_layer:
            reads.inputs.pop()

    return [module.register_forward_pre_hook(enter, with_kwargs=True), module.register_forward_hook(leave)]
