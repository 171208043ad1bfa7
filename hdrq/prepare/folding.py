"""Folding BatchNorm into the layer whose output it reads."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence, ValuesView
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights
from torch.utils._pytree import tree_leaves

from hdrq.checks import listed
from hdrq.prepare.ledger import Ledger, Operation, storage_of
from hdrq.prepare.observe import observe, version_of
from hdrq.prepare.precision import full_precision
from hdrq.quantizers.layers import TRANSPOSED, WEIGHTED, replace_module, weighted_layers

BATCHNORM = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
PRODUCTS = ("linear", "addmm", "mm", "conv1d", "conv2d", "conv3d", "convolution", "cudnn_convolution")
PLAIN = (*(kind.forward for kind in BATCHNORM), *(kind.forward for kind in WEIGHTED))


@dataclass(frozen=True)
class Pair:
    """A BatchNorm and the layer whose output it reads, and nothing else does."""

    norm: str
    layer: str
    whole: bool  # the norm does nothing but normalize: nothing of it is left


@full_precision()
@torch.no_grad()
def fold_batchnorm(model: nn.Module, run) -> dict[str, str]:
    """Fold each BatchNorm into the layer whose output it reads, in place; ``run(model)`` executes the model.

    The pairs are found by running the model, so it does not matter how the modules are nested. A BatchNorm stays as it
    is where it reads no weighted layer's output, channel by channel and unchanged. It stays where something else reads
    that output too. A subclass that does more than BatchNorm, such as an activation, keeps its place and does that
    alone: its factor goes into the layer's weight. It stays where the run cannot show that this is the same.

    A fold that changes the outputs by more than 1e-3 of their size, or 4 roundings of half types, is undone, and the
    others stay. A warning names the norms that read a layer's output and were not folded.

    Returns:
        What was folded with nothing left: the names of the BatchNorms, each with the name of its layer.
    """
    if not any(_normalizes(module) for module in model.modules()):
        return {}
    pairs, stays, before = _batchnorm_pairs(model, run)
    folded = _fold_unchanged(model, run, list(pairs.values()), before)
    stays |= {
        name: f"folding it into {pairs[name].layer!r} changes the outputs" for name in pairs if name not in folded
    }
    if stays:
        reasons = [f"{name!r}: {why}" for name, why in stays.items()]
        warnings.warn(f"BatchNorm stays in full precision where it is not folded, got {listed(reasons)}", stacklevel=2)
    return {name: pair.layer for name, pair in pairs.items() if name in folded and pair.whole}


def _fold_unchanged(model: nn.Module, run: Callable, pairs: Sequence[Pair], before: object) -> set[str]:
    """Fold those of the pairs that leave the outputs ``before`` as they are; the names of their norms."""
    if not pairs:
        return set()
    undo = [_fold(model, pair) for pair in pairs]
    try:
        check_unchanged("folding BatchNorm", before, run(model), 1e-3)
        return {pair.norm for pair in pairs}
    except Exception as error:
        # The model itself may fail: one that reads the statistics of its norms, say.
        for step in reversed(undo):
            step()
        if len(pairs) == 1:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            return set()
    half = len(pairs) // 2
    first = _fold_unchanged(model, run, pairs[:half], before)
    return first | _fold_unchanged(model, run, pairs[half:], before)


def _fold(model: nn.Module, pair: Pair) -> Callable[[], None]:
    """Fold one BatchNorm; what is returned undoes it."""
    layer: Any = model.get_submodule(pair.layer)
    norm: Any = model.get_submodule(pair.norm)
    held = layer.weight, layer.bias
    gain = torch.ones_like(norm.running_var) if norm.weight is None else norm.weight
    shift = torch.zeros_like(norm.running_mean) if norm.bias is None else norm.bias
    statistics = (norm.running_mean, norm.running_var, norm.eps, gain, shift)
    if isinstance(layer, nn.Linear):
        layer.weight, layer.bias = fuse_linear_bn_weights(layer.weight, layer.bias, *statistics)
    else:
        transposed = isinstance(layer, TRANSPOSED)
        layer.weight, layer.bias = fuse_conv_bn_weights(layer.weight, layer.bias, *statistics, transposed)
    if pair.whole:
        replace_module(model, pair.norm, nn.Identity())
    else:
        kept = _become_identity(norm)
        if held[1] is None:  # the layer's state keeps its names: the shift stays in the norm
            norm.running_mean = (-layer.bias).detach().to(norm.running_mean.dtype)
            layer.bias = None

    def undo() -> None:
        layer.weight, layer.bias = held
        if pair.whole:
            replace_module(model, pair.norm, norm)
        else:
            norm.running_mean, norm.running_var, norm.weight, norm.bias = kept

    return undo


def _become_identity(norm: Any) -> tuple:
    """Give a BatchNorm statistics and weights that leave its input as it is; what it had."""
    kept = norm.running_mean, norm.running_var, norm.weight, norm.bias
    norm.running_mean = torch.zeros_like(norm.running_mean)
    norm.running_var = torch.full_like(norm.running_var, 1 - norm.eps)
    if norm.weight is not None:
        norm.weight = nn.Parameter(torch.ones_like(norm.weight), requires_grad=False)
    if norm.bias is not None:
        norm.bias = nn.Parameter(torch.zeros_like(norm.bias), requires_grad=False)
    return kept


def check_unchanged(what: str, before: object, after: object, bound: float) -> None:
    """No tensor among a model's outputs changed by more than ``bound`` of its norm, or 4 roundings of half types.

    Raises:
        ValueError: one did; ``what`` says by what.
    """
    error = relative_change(before, after)
    if not error <= allowed_change(before, bound):
        raise ValueError(f"{what} must leave the outputs as they are, got a relative change of {error:.2g}")


def relative_change(before: object, after: object) -> float:
    """The largest change of a tensor among a model's outputs, in units of its norm; infinite where a shape changed."""
    pairs = list(zip_longest(_tensors(after), _tensors(before)))
    if any(a is None or b is None or a.shape != b.shape for a, b in pairs):
        return math.inf
    return max((_relative(a, b) for a, b in pairs), default=0.0)


def allowed_change(outputs: object, bound: float) -> float:
    """``bound``, or 4 roundings of the half types among a model's outputs where that is more."""
    halves = [4 * torch.finfo(t.dtype).eps for t in _tensors(outputs) if t.dtype in (torch.float16, torch.bfloat16)]
    return max([bound, *halves])


def _batchnorm_pairs(model: nn.Module, run) -> tuple[dict[str, Pair], dict[str, str], object]:
    """What can be folded; the norms that read a layer's output and cannot, with the reason; the model's outputs."""
    made_by: dict[int, tuple[str, torch.Tensor, int, int]] = {}  # tensors are kept alive, so that no id is used twice
    unfit: dict[str, str] = {}  # layers that cannot take a factor, with the reason
    calls: Counter[str] = Counter()
    pairs: dict[str, Pair] = {}
    stays: dict[str, str] = {}
    own_reads: dict[str, int] = {}  # reads of the layer's output inside the norm's call, and before it
    layers = {n: m for n, m in weighted_layers(model).items() if not isinstance(m, nn.Embedding)}
    norms = {n: m for n, m in model.named_modules() if _normalizes(m)}
    plain = {n for n, m in (layers | norms).items() if _is_plain(m)}
    hooked = {n for n, m in (layers | norms).items() if m._forward_hooks or m._forward_pre_hooks}
    ledger = Ledger()

    def enter(name, module, args, kwargs) -> None:
        ledger.begin()

    def note(name, module, args, kwargs, output) -> None:
        calls[name] += 1
        operations = ledger.end()
        if name in layers:
            if isinstance(output, torch.Tensor) and (output.ndim == 2 or not isinstance(module, nn.Linear)):
                made_by[id(output)] = name, output, version_of(output), ledger.reads[storage_of(output)]
                if why := _unfit(module, operations, output, name in plain and name not in hooked):
                    unfit[name] = f"{name!r} {why}"
            return
        read = (*args, *kwargs.values())[0]
        layer, _, version, reads = made_by.get(id(read), (None, None, None, 0))
        if layer is None or version_of(read) != version or getattr(module, "running_mean", None) is None:
            return
        why = unfit.get(layer) or ("it has hooks" if name in hooked else None)
        why = why or _obstacle(module, operations, read, name in plain)
        if why:
            stays[name] = why
            return
        pairs[name] = Pair(name, layer, name in plain)
        own_reads[name] = reads + sum(storage_of(read) in operation.reads for operation in operations)

    with ledger:
        outputs = observe(model, run, before=enter, after=note, names=[*layers, *norms])
    returned = {storage_of(x) for x in tree_leaves(outputs) if isinstance(x, torch.Tensor)}
    read_by = Counter(pair.layer for pair in pairs.values())
    made = {name: storage_of(output) for name, output, _, _ in made_by.values()}
    for name, pair in list(pairs.items()):
        storage = made[pair.layer]
        if calls[name] > 1 or calls[pair.layer] > 1:
            stays[name] = f"it or {pair.layer!r} is called more than once"
        elif read_by[pair.layer] > 1 or storage in returned or ledger.reads[storage] != own_reads[name]:
            stays[name] = f"what {pair.layer!r} returns is read elsewhere too"
        if name in stays:
            del pairs[name]
    return pairs, stays, outputs


def _unfit(layer: Any, operations: Sequence[Operation], output: torch.Tensor, plain: bool) -> str | None:
    """Why a layer's weight cannot take a factor for each channel of its output, or None."""
    if "weight" not in layer._parameters:
        return "computes its weight"
    if isinstance(layer, TRANSPOSED) and layer.groups > 1:
        return "is a transposed convolution of groups"
    return None if plain or _is_product(layer, operations, output) else "does more than its class"


def _normalizes(module: Any) -> bool:
    """Whether a module is a BatchNorm, or is called one: a warning then names it where it stays."""
    return isinstance(module, BATCHNORM) or "BatchNorm" in type(module).__name__


def _is_plain(module: Any) -> bool:
    """Whether a call of a module does what a class of torch's does, and nothing more."""
    kind = type(module)
    own = "forward" in vars(module) or kind.__call__ is not nn.Module.__call__
    rest = getattr(kind, "_conv_forward", None) in (None, *(getattr(k, "_conv_forward", None) for k in WEIGHTED))
    return not own and rest and any(kind.forward is forward for forward in PLAIN)


def _is_product(layer: Any, operations: Sequence[Operation], output: torch.Tensor) -> bool:
    """Whether a layer with a forward of its own returns the product with its weight, plus its bias, as it is."""
    own = {storage_of(x) for x in (layer.weight, layer.bias) if x is not None}
    result = storage_of(output)
    readers = [o for o in operations if o.reads & own and not o.view]
    if len(readers) != 1 or readers[0].name not in PRODUCTS or not own <= readers[0].reads | _seen_through(operations):
        return False
    after = operations[operations.index(readers[0]) + 1 :]
    touched = [o for o in after if result in o.reads | o.made]
    return result in readers[0].made and all(o.view for o in touched)


def _seen_through(operations: Sequence[Operation]) -> frozenset[int]:
    return frozenset(s for o in operations if o.view for s in o.reads & o.made)


def _obstacle(norm: Any, operations: Sequence[Operation], read: torch.Tensor, plain: bool) -> str | None:
    """Why a norm cannot be folded, or None.

    What is left of one that does more must be a function of the normalized input alone: its statistics, its weights
    and its input are read by one operation, which normalizes.
    """
    if not isinstance(norm, BATCHNORM):
        return f"{type(norm).__name__} is no BatchNorm of torch's"
    if plain:
        return None
    more = f"{type(norm).__name__} does more than normalize what it reads"
    tensors = [read, norm.weight, norm.bias, norm.running_mean, norm.running_var]
    places = [None if x is None else storage_of(x) for x in tensors]
    readers = [o for o in operations if o.reads & {p for p in places if p is not None}]
    if len(readers) != 1 or "batch_norm" not in readers[0].name:
        return more
    args = readers[0].args
    trains = any(value is True for value in args[5:6])
    same = list(args[:5]) == places and [value for value in args[5:] if isinstance(value, float)][-1:] == [norm.eps]
    return more if trains or not same else None


def _tensors(outputs) -> list[torch.Tensor]:
    if isinstance(outputs, torch.Tensor):
        return [outputs]
    if isinstance(outputs, Mapping):
        outputs = outputs.values()
    return [t for item in outputs for t in _tensors(item)] if isinstance(outputs, tuple | list | ValuesView) else []


def _relative(a: torch.Tensor, b: torch.Tensor) -> float:
    wide = torch.complex128 if a.is_complex() or b.is_complex() else torch.float64
    a, b = a.to(wide), b.to(wide)
    same = (a == b) | (a.isnan() & b.isnan())  # infinities and NaN too
    return float((a - b).masked_fill(same, 0).norm() / b.nan_to_num(0, 0, 0).norm().clamp(min=1e-12))
