"""Weights that are read without a call of their layer: no quantizer sees them, so they would silently stay in float."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hdrq.prepare.observe import observe
from hdrq.quantizers.bits import matches
from hdrq.quantizers.layers import weighted_layers


class _Reads(TorchDispatchMode):
    """The addresses of what operations read."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen |= {x.data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def refuse_uncalled(model: nn.Module, run: Callable, bits: str | Mapping[str, str]) -> None:
    """Every layer whose weight ``run(model)`` reads is called, or a pattern of ``bits`` keeps it in full precision.

    Attentions of BEiT and EVA hand the weight of their ``qkv`` to a function; a subclass of ``nn.MultiheadAttention``
    has projections that are no layers.

    Raises:
        ValueError: one is not; the message names it and counts the others.
    """
    called: dict[str, Any] = {}
    layers: dict[str, Any] = weighted_layers(model)
    with _Reads() as reads:
        observe(model, run, before=lambda name, module, args, kwargs: called.setdefault(name, module))
    quantized = {layers[name].weight.data_ptr() for name in called if name in layers}
    addresses = {name: layer.weight.data_ptr() for name, layer in layers.items() if name not in called}
    silent = [name for name, module in called.items() if isinstance(module, nn.MultiheadAttention)]
    silent += [name for name, address in addresses.items() if address in reads.seen - quantized]
    patterns = bits if isinstance(bits, Mapping) else {}
    chosen = {name: next((text for p, text in patterns.items() if matches(name, p)), None) for name in silent}
    if wrong := [name for name, text in chosen.items() if text != "float"]:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise ValueError(
            f"model must call its layers to quantize them, got {wrong[0]!r}{more}, whose weights are read without a "
            f'call; call nn.Linear, or keep it in full precision with bits={{"{wrong[0]}": "float", …}}'
        )
