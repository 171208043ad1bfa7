"""The weights that measurements of the loss move: those of layers that can be quantized, before their quantizers."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import nn

from hdrq.quantizers.layers import output_axis, quantized_layers, weighted_layers
from hdrq.quantizers.modules import WeightQuantizer


class Weight(NamedTuple):
    """A layer's weight.

    ``value`` is what can be moved: the parameter, of a quantized layer the latent, which lies on its grid in a finished
    model.
    """

    value: nn.Parameter
    axis: int  # along which output channels lie
    quantizer: WeightQuantizer | None

    @property
    def step(self) -> torch.Tensor:
        """The quantizer's scale, float32, in a shape that broadcasts over the weight."""
        quantizer = cast(WeightQuantizer, self.quantizer)
        return quantizer.broadcast(quantizer.scale.detach(), self.value)


def weights_of(model: nn.Module) -> dict[str, Weight]:
    """The weights of a model's convolutions, linear layers, embeddings and registered layers, by the layer's name.

    One that layers share is there once. A model in full precision and the quantized model made of it have the same,
    once its BatchNorm is folded.

    Raises:
        ValueError: there is none; a weight is computed; a packed ``nn.MultiheadAttention``, whose weights would be left
            out.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            raise ValueError(
                f"model must have its weights in layers, got nn.MultiheadAttention in {name or 'the model itself'}; "
                "measure what hdrq.methods.post_training.fold makes of it"
            )
    quantized, found, seen = quantized_layers(model), {}, set()
    for name, layer in weighted_layers(model).items():
        own = quantized.get(name)
        value: Any = own.latent if own else cast(Any, layer)._parameters.get("weight")
        if value is None:
            raise ValueError(f"the weight of layer {name} must be a parameter to be moved, got one that is computed")
        if id(value) not in seen:
            seen.add(id(value))
            found[name] = Weight(value, output_axis(layer), own.weight_quantizer if own else None)
    if not found:
        raise ValueError("model must have a convolution, a linear layer or an embedding to be measured, got none")
    return found


def let_through(model: nn.Module) -> None:
    """Weight quantizers return what they are given from now on: the latents are the weights."""
    for layer in quantized_layers(model).values():
        layer.weight_quantizer.mode = "float"
