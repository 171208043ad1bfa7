"""A quantized model in plain PyTorch whose weights stay integers: layers that compute their weight when it is read."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from hdrq import checks, ops
from hdrq.checkpoint.format import packs
from hdrq.export.graph import check_finished
from hdrq.prepare.copying import copy_model
from hdrq.quantizers.layers import QuantizedLayer, quantized_layers
from hdrq.quantizers.modules import WeightQuantizer


def deploy(model: nn.Module) -> nn.Module:
    """A copy of a quantized model, of the same modules, whose weights are integer codes and scales and nothing else.

    A layer's ``weight`` is computed where it is read, by :func:`hdrq.ops.unpack` and :func:`hdrq.ops.dequantize`, and
    is freed with the call; an ``nn.Embedding`` reads the rows that it is asked for. Inputs pass through the quantizers
    as before, so outputs are those of ``model`` to the bit.

    A weight of n elements takes ``ceil(n/2)`` bytes where its range fits 4 bits, n where it fits 8, else 2n, and four
    for each scale and zero point. While a layer runs, its float weight and its unpacked codes come on top. The result
    can be pickled, has a state dict, and passes ``torch.export`` and ``torch.compile``; it does not learn.

    Args:
        model: by :func:`hdrq.quantize`, :func:`hdrq.merge` or :func:`hdrq.load`, of any dtype, on any device; left as
            it is.

    Raises:
        TypeError, ValueError: "X must be …, got …": the model is not quantized, or a quantizer does not round.
    """
    check_finished(model)
    copy = copy_model("model", model).eval().requires_grad_(False)
    hold_weights(copy, lambda layer: PackedWeight(layer.weight_quantizer, layer.latent.detach()))
    return copy


class PackedWeight(nn.Module):
    """A weight's codes, two to a byte where they fit, and its quantizer; a call gives the weight."""

    codes: torch.Tensor
    like: torch.Tensor

    def __init__(self, quantizer: WeightQuantizer, latent: torch.Tensor) -> None:
        super().__init__()
        codes = quantizer.codes(latent)
        self.shape = tuple(codes.shape)
        self.packed = packs(quantizer.qmin, quantizer.qmax)
        self.quantizer = quantizer
        self.register_buffer("codes", ops.pack(codes) if self.packed else codes)
        self.register_buffer("like", latent.new_empty(0), persistent=False)  # changes its dtype as modules do

    def forward(self) -> torch.Tensor:
        return self.quantizer.values(self._unpacked(self.codes, self.shape)).to(self.like.dtype)

    def rows(self, index: torch.Tensor) -> torch.Tensor:
        """The rows at ``index`` of a weight of two axes: ``(*index.shape, columns)``."""
        quantizer, flat = self.quantizer, index.flatten()
        rows, columns = self.shape
        if self.packed and columns % 2:  # a row may begin inside a byte
            codes = F.embedding(flat, self._unpacked(self.codes, self.shape))
        else:
            codes = self._unpacked(F.embedding(flat, self.codes.view(rows, -1)), (flat.shape[0], columns))
        scale, zero_point = quantizer.scale.detach(), quantizer.zero_point
        if quantizer.axis in (0, -2) or quantizer.group_size is not None:
            shape = (rows,) if quantizer.group_size is None else (rows, -1)
            scale = scale.view(shape)[flat]
            zero_point = None if zero_point is None else zero_point.view(shape)[flat]
        values = ops.dequantize(codes, scale, zero_point=zero_point, **quantizer.where)
        return values.to(self.like.dtype).view(*index.shape, columns)

    def _unpacked(self, codes: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        return ops.unpack(codes.flatten(), shape, signed=self.quantizer.qmin < 0) if self.packed else codes

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors) -> None:
        """As torch loads a module's own part; codes of another type would be cast without a word."""
        given = state_dict.get(f"{prefix}codes")
        if isinstance(given, torch.Tensor) and given.dtype != self.codes.dtype:
            got = f"{checks.short(self.codes.dtype)}, got {checks.short(given.dtype)}"
            errors.append(f"{prefix}codes must be {got}: the model was quantized to other bits")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)

    def extra_repr(self) -> str:
        return f"shape={self.shape}, {'two codes to a byte' if self.packed else checks.short(self.codes.dtype)}"


def hold_weights(model: nn.Module, make: Callable[[QuantizedLayer], nn.Module]) -> None:
    """Put what ``make`` returns in the place of each quantized weight, in place, once where layers share a weight.

    A layer's ``weight`` is then what a call of that module gives, and an embedding returns its ``rows``.
    """
    made: dict[int, nn.Module] = {}
    layers = list(quantized_layers(model).values())
    latents = [layer.latent for layer in layers]  # they live, so no other has their id
    for layer, latent in zip(layers, latents, strict=True):
        if id(latent) not in made:
            made[id(latent)] = make(layer)
        module: Any = layer.module
        kind: Any = parametrize.type_before_parametrizations(module)
        del module.parametrizations["weight"]  # not by remove_parametrizations, which changes the original's class too
        if module.parametrizations:
            kind = type(module)
        else:
            del module.parametrizations
        module.quantized_weight = made[id(latent)]
        rows = kind.forward is nn.Embedding.forward and module.max_norm is None
        module.__class__ = _held_class(kind, _HeldRows if rows else _Held)


class _Held:
    """What a layer's class has before it, where the layer's weight is a module's result."""

    quantized_weight: Any

    @property
    def weight(self) -> torch.Tensor:
        return self.quantized_weight()

    def __reduce_ex__(self, protocol: Any) -> tuple:
        """A class that was made here has no name to be pickled by: it is made again from the layer's own."""
        held, kind = type(self).__bases__
        reduced: Any = super().__reduce_ex__(2)
        return _remade, (kind, held), *reduced[2:]


class _HeldRows(_Held):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.quantized_weight.rows(input)


@functools.cache
def _held_class(kind: Any, held: Any) -> Any:
    return type(f"Packed{kind.__name__}", (held, kind), {})


def _remade(kind: Any, held: Any) -> nn.Module:
    return object.__new__(_held_class(kind, held))
