"""Which layers have weights to quantize, and which of a model are quantized."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from torch.nn.utils import parametrize

from hdrq.quantizers.modules import ActivationQuantizer, WeightQuantizer

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)
WEIGHTED = (*CONVOLUTIONS, nn.Linear, nn.Embedding)
_registered: dict[type[nn.Module], int] = {}  # more classes, each with the axis of its weight's output channels


def register_layer(kind: type[nn.Module], axis: int = 0) -> None:
    """Make a class of layers known: its ``weight`` is quantized, and the input of its calls.

    Args:
        kind: a module class with a parameter ``weight`` of two axes or more.
        axis: the axis of ``weight`` along which output channels lie, for ``per_channel=True``.

    Raises:
        TypeError: ``kind`` is no module class.
    """
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise TypeError(f"kind must be a class of modules, got {kind!r}")
    _registered[kind] = axis


def output_axis(layer: nn.Module) -> int:
    """The axis of a layer's weight along which its output channels lie."""
    known = next((axis for kind, axis in _kinds().items() if isinstance(layer, kind)), 0)
    return 1 if isinstance(layer, TRANSPOSED) else known


def layer_kinds() -> tuple[type[nn.Module], ...]:
    """The classes of modules whose weights are quantized."""
    return (*WEIGHTED, *_kinds())


def _kinds() -> dict[type[nn.Module], int]:
    """The registered classes, and ``Conv1D`` of transformers, which GPT-2 is made of, where that is imported."""
    conv1d = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)
    return _registered if conv1d is None else {conv1d: 1, **_registered}


@dataclass(frozen=True)
class QuantizedLayer:
    """A layer with its quantizers attached."""

    name: str
    module: Any

    @property
    def latent(self) -> nn.Parameter:
        """The weight before its quantizer; in a finished model, on the grid."""
        return self.module.parametrizations.weight.original

    @property
    def weight_quantizer(self) -> WeightQuantizer:
        return self.module.parametrizations.weight[0]

    @torch.no_grad()
    def settle(self) -> None:
        """Put the weight on its grid: what the integers and the scale say, and nothing else."""
        quantizer, latent = self.weight_quantizer, self.latent
        settled = quantizer.rounded(latent).to(quantizer.dtype or latent.dtype)
        if settled.dtype == latent.dtype:
            latent.data.copy_(settled)  # where it lies, be that a file
        else:
            latent.data = settled


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLayer]:
    """The layers of a model whose weights are quantized, by name, in the order of the module tree."""
    return {
        name: QuantizedLayer(name, module)
        for name, module in model.named_modules()
        if "parametrizations" in module._modules  # its own: a wrapper may pass on what is asked of it
        and parametrize.is_parametrized(module, "weight")
        and isinstance(module.parametrizations.weight[0], WeightQuantizer)
    }


def input_quantizers(model: nn.Module) -> dict[str, ActivationQuantizer]:
    """The quantizers of what modules read, by the name of the module; a shared one by its first reader's."""
    found: dict[int, str] = {}
    for name, quantizer in input_readers(model).items():
        found.setdefault(id(quantizer), name)
    return {name: cast(Any, model.get_submodule(name)).input_quantizer for name in found.values()}


def input_readers(model: nn.Module) -> dict[str, ActivationQuantizer]:
    """Every module whose input is quantized, by name, with its quantizer: modules that read one tensor share one."""
    modules: Iterable[tuple[str, Any]] = model.named_modules()
    return {n: m.input_quantizer for n, m in modules if "input_quantizer" in m._modules}


def weighted_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The convolutions, linear layers and embeddings of a model, subclasses and registered classes too, by name."""
    kinds = layer_kinds()
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def shared_weights(layers: Mapping[str, Any]) -> list[list[str]]:
    """The names of the layers that share a weight, for each weight that several have."""
    groups: dict[int, list[str]] = {}
    for name, layer in layers.items():
        if "weight" in layer._parameters:  # a computed one is a new tensor each time
            groups.setdefault(id(layer.weight), []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put ``new`` in the place of the module called ``name``."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)
