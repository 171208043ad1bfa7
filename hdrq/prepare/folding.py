"""Folding BatchNorm into the layer whose output it reads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, ValuesView

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

from hdrq.prepare.observe import observe
from hdrq.quantizers.layers import TRANSPOSED, replace_module, weighted_layers

BATCHNORM = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@torch.no_grad()
def fold_batchnorm(model: nn.Module, run) -> dict[str, str]:
    """Fold each BatchNorm into the layer whose output it reads, in place; ``run(model)`` executes the model.

    The pairs are found by running the model, so it does not matter how the modules are nested. A BatchNorm that reads
    no weighted layer's output, channel by channel and unchanged, stays as it is.

    Returns:
        What was folded: the names of the BatchNorms, each with the name of its layer.

    Raises:
        ValueError: folding changed the model's outputs by more than 1e-3 of their size, or 4 roundings of half types.
    """
    pairs, before = _batchnorm_pairs(model, run)
    modules = dict(model.named_modules())
    for norm_name, layer_name in pairs.items():
        layer, norm = modules[layer_name], modules[norm_name]
        gain = torch.ones_like(norm.running_var) if norm.weight is None else norm.weight
        shift = torch.zeros_like(norm.running_mean) if norm.bias is None else norm.bias
        statistics = (norm.running_mean, norm.running_var, norm.eps, gain, shift)
        if isinstance(layer, nn.Linear):
            layer.weight, layer.bias = fuse_linear_bn_weights(layer.weight, layer.bias, *statistics)
        else:
            transposed = isinstance(layer, TRANSPOSED)
            layer.weight, layer.bias = fuse_conv_bn_weights(layer.weight, layer.bias, *statistics, transposed)
        replace_module(model, norm_name, nn.Identity())
    check_unchanged("folding BatchNorm", before, run(model), 1e-3)
    return pairs


def check_unchanged(what: str, before: object, after: object, bound: float) -> None:
    """No tensor among a model's outputs changed by more than ``bound`` of its norm, or 4 roundings of half types.

    Raises:
        ValueError: one did; ``what`` says by what.
    """
    error = max((_relative(a, b) for a, b in zip(_tensors(after), _tensors(before), strict=True)), default=0.0)
    halves = [4 * torch.finfo(t.dtype).eps for t in _tensors(before) if t.dtype in (torch.float16, torch.bfloat16)]
    if not error <= max([bound, *halves]):
        raise ValueError(f"{what} must leave the outputs as they are, got a relative change of {error:.2g}")


def _batchnorm_pairs(model: nn.Module, run) -> tuple[dict[str, str], object]:
    made_by: dict[int, tuple[str, torch.Tensor, int]] = {}  # tensors are kept alive, so that no id is used twice
    calls: Counter[str] = Counter()
    pairs: dict[str, str] = {}

    foldable = {
        n: m
        for n, m in weighted_layers(model).items()
        if not isinstance(m, nn.Embedding) and not (isinstance(m, TRANSPOSED) and m.groups > 1)
    }
    norms = [n for n, m in model.named_modules() if isinstance(m, BATCHNORM)]

    def note(name, module, args, kwargs, output) -> None:
        calls[name] += 1
        if name in foldable:
            if output.ndim == 2 or not isinstance(module, nn.Linear):  # channels on axis 1, where BatchNorm has them
                made_by[id(output)] = (name, output, output._version)
            return
        read = (*args, *kwargs.values())[0]
        layer, _, version = made_by.get(id(read), (None, None, None))
        if layer is not None and read._version == version and module.track_running_stats:
            pairs[name] = layer

    outputs = observe(model, run, after=note, names=[*foldable, *norms])
    return {n: layer for n, layer in pairs.items() if calls[n] == 1 and calls[layer] == 1}, outputs


def _tensors(outputs) -> list[torch.Tensor]:
    if isinstance(outputs, torch.Tensor):
        return [outputs]
    if isinstance(outputs, Mapping):
        outputs = outputs.values()
    return [t for item in outputs for t in _tensors(item)] if isinstance(outputs, tuple | list | ValuesView) else []


def _relative(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.double(), b.double()
    same = (a == b) | (a.isnan() & b.isnan())  # infinities and NaN too
    return float((a - b).masked_fill(same, 0).norm() / b.nan_to_num(0, 0, 0).norm().clamp(min=1e-12))
